/* opd-llama: a Llama model that generates text through an opd daemon. What its files share.
 *
 * Layer: client/examples, on libopd and the readers of files alone (libopd-embedded for a daemon in this process). Threads: one.
 * Life: llama_load (weights go to the daemon, once) → llama_begin (an empty cache) → llama_prompt → llama_next… → llama_fini.
 * Everything computes in the daemon: a step is one run of a registered graph, and what crosses the wire is a token's id, its position and its slot. */
#ifndef OPD_EXAMPLES_LLAMA_H
#define OPD_EXAMPLES_LLAMA_H

#include <stdbool.h>
#include <stdint.h>

#include "client/file_tensor.h"
#include "opd/client.h"

#define LLAMA_LAYERS_MAX 256
#define LLAMA_EOS_MAX 8
#define LLAMA_BLOCK 16 /* tokens in a block of the cache */
#define LLAMA_CHUNK 256 /* of a prompt: tokens in one run */
#define LLAMA_AHEAD_MAX 64

/* config.json, checked. */
struct llama_config {
	int64_t hidden;
	int64_t intermediate;
	int64_t layers;
	int64_t heads;
	int64_t kv_heads;
	int64_t head_dim;
	int64_t vocabulary;
	int64_t positions; /* the longest text */
	double epsilon;
	double theta;
	bool tied;  /* the head is the embedding table */
	bool bytes; /* a token is a byte; otherwise ids go in and out */
	uint32_t eos_count;
	int64_t eos[LLAMA_EOS_MAX];
};

struct llama_layer {
	opd_handle input_norm; /* [hidden] */
	opd_handle qkv;        /* [(heads + 2 kv_heads) * head_dim, hidden]: query, key and value rows */
	opd_handle output;     /* [hidden, heads * head_dim] */
	opd_handle mlp_norm;   /* [hidden] */
	opd_handle gate_up;    /* [2 * intermediate, hidden]: gate, then up */
	opd_handle down;       /* [hidden, intermediate] */
	opd_handle keys;       /* the cache: [blocks, LLAMA_BLOCK, kv_heads, head_dim] */
	opd_handle values;
};

/* The host tensors that a step reads: in memory shared with the daemon, or sent. */
struct llama_inputs {
	_Alignas(64) int64_t ids[LLAMA_CHUNK];
	_Alignas(64) int64_t positions[LLAMA_CHUNK];
	_Alignas(64) int64_t slots[LLAMA_CHUNK];
	_Alignas(64) int32_t length; /* of the text with this step's tokens */
};

/* A run of a graph. */
struct llama_step {
	opd_request *request;
	opd_ticket ticket; /* 0: none in flight */
	struct llama_inputs *inputs;
};

struct llama_times {
	uint64_t prompt_ns;
	uint64_t prompt_tokens;
	uint64_t decode_ns;
	uint64_t decode_tokens;
	uint64_t kernel_ns;   /* of the steps that were asked */
	uint64_t asked_steps;
};

struct llama {
	opd_client *client;
	struct llama_config config;
	opd_dtype dtype; /* of weights, activations and cache */
	opd_handle table;
	opd_handle rope; /* [positions, head_dim] */
	opd_handle norm;
	opd_handle head;
	opd_handle blocks; /* [1, …]: block i of the text is block i of the cache */
	struct llama_layer layers[LLAMA_LAYERS_MAX];
	int64_t length;    /* tokens submitted */
	uint64_t decoding; /* graph of one token */
	unsigned ahead;    /* steps in flight */
	const char *share; /* NULL: the weights are this session's alone */
	bool random;       /* weights are made from `seed`, in `dtype` */
	uint64_t seed;
	bool trace;
	bool stats;
	bool shm;             /* inputs lie in `memory` */
	opd_memory *memory;
	struct llama_inputs *inputs; /* [LLAMA_AHEAD_MAX] */
	struct llama_step steps[LLAMA_AHEAD_MAX]; /* a ring */
	unsigned first;
	unsigned in_flight;
	opd_ticket last; /* whose output is the next step's token */
	uint32_t kept_count;
	opd_handle kept[32]; /* tokens taken, the newest last */
	struct llama_times times;
};

/* ---- config.c ---- */

/* DIR/config.json, or a file whose name ends in .json. INVALID_ARGUMENT names what isn't there or isn't supported. */
OPD_MUST_USE opd_status llama_read_config(const char *folder, struct llama_config *config_out, opd_error *error);

/* ---- weights.c ---- */

/* Uploads the weights of every DIR/…safetensors (or random ones, for which the folder is but a name), fused (query, key and value; gate and up) and cast to `dtype` by the daemon. `quiet`: no progress on stderr. */
OPD_MUST_USE opd_status llama_load(struct llama *llama, const char *folder, bool quiet, opd_error *error);

/* Bytes of weights that a step of one token reads. */
uint64_t llama_weight_bytes(const struct llama *llama);

/* ---- random.c: a tensor of the model, from its name and the seed; rows 0: a norm's ---- */
OPD_MUST_USE opd_status llama_random_piece(const struct llama *llama, const char *name, int64_t rows, int64_t columns, struct file_tensor *out, opd_error *error);

/* ---- rate.c: bytes a second that so many threads read of this machine's memory; 0: not known. Takes a tenth of a second ---- */
double llama_read_rate(unsigned threads);

/* ---- graph.c ---- */

/* Registers the graph of `tokens` tokens of one text: inputs ids, positions, slots (i64 [tokens]) and length (i32 [1]); output 0 is the next token's id (i64 [1]). */
OPD_MUST_USE opd_status llama_graph(struct llama *llama, int64_t tokens, uint64_t *graph_out, opd_error *error);

/* ---- generate.c ---- */

/* An empty cache for texts of at most `tokens`. */
OPD_MUST_USE opd_status llama_begin(struct llama *llama, int64_t tokens, opd_error *error);
/* Runs the prompt; the first token comes with llama_next. count at least 1. */
OPD_MUST_USE opd_status llama_prompt(struct llama *llama, const int64_t *ids, int64_t count, opd_error *error);
/* The next token; at most `more` will still be asked for after it, and steps for those may be under way already. */
OPD_MUST_USE opd_status llama_next(struct llama *llama, int64_t more, int64_t *id_out, opd_error *error);
/* Drops what is in flight. */
void llama_fini(struct llama *llama);

uint64_t llama_now_ns(void);

#endif
