/* What the kernels offer to the module's C side: one function a family that enqueues on a stream.
 *
 * Layer: providers/cuda; C and C++. Each returns a cudaError_t (0: enqueued). Pointers are device addresses of element 0; strides are in elements; outputs are
 * contiguous. Nothing is checked here but alignment, which only chooses the access width: shapes come from the op's shape function and the predicates.
 * Threads: any, one at a time a stream. Not here: reading a call (call.h). */
#ifndef OPD_CUDA_LAUNCH_H
#define OPD_CUDA_LAUNCH_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#include "providers/provider.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The dtypes that kernels are compiled for. */
enum cuda_dtype {
	CUDA_F32,
	CUDA_F16,
	CUDA_BF16,
};

/* Where a bad index is reported. */
struct cuda_fault {
	opd_index_fault *word; /* NULL: indices have been checked */
	uint32_t node;
};

/* An index operand of one dimension. */
struct cuda_index {
	const void *data;
	int64_t stride;
	bool wide; /* i64 */
};

/* ---- copy.cu */
struct cuda_copy_call {
	opd_copy copies[OPD_COPIES_MAX];
	uint32_t count;
};
int cuda_copy_launch(const struct cuda_copy_call *call, cudaStream_t stream);

/* ---- norm.cu */
enum cuda_norm {
	CUDA_RMS_NORM,
	CUDA_LAYER_NORM,
};

struct cuda_norm_call {
	enum cuda_norm norm;
	enum cuda_dtype dtype;
	bool weight_f32;
	bool bias_f32;
	int64_t rows;
	int hidden;
	int variance_size;
	float epsilon;
	const void *x;
	const void *residual; /* NULL: none */
	const void *weight;   /* NULL: none */
	const void *bias;     /* layer_norm's; NULL: none */
	void *y;
	void *sum; /* x + residual; y and sum may be x and residual */
	int64_t x_stride;
	int64_t residual_stride;
	struct cuda_fault fault;
};
int cuda_norm_launch(const struct cuda_norm_call *call, cudaStream_t stream);

struct cuda_norm_calls {
	uint32_t count;
	struct cuda_norm_call calls[OPD_CALLS_MAX];
};
/* All of them in one launch, with the bits that each has alone; cudaErrorNotSupported: they differ too much, or are large. */
int cuda_norm_together(const struct cuda_norm_calls *calls, cudaStream_t stream);

/* ---- activation.cu */
enum cuda_activation {
	CUDA_SILU,
	CUDA_GELU,
	CUDA_GELU_TANH,
	CUDA_SIGMOID,
	CUDA_RELU,
	CUDA_RELU2,
};

/* y = f(x), or f(first)·other where `other` isn't NULL. Rows of `hidden`. */
struct cuda_activation_call {
	enum cuda_activation function;
	enum cuda_dtype dtype;
	int64_t rows;
	int64_t hidden;
	int64_t x_stride; /* of x's rows, and of other's */
	const void *x;
	const void *other;
	void *y;
};
int cuda_activation_launch(const struct cuda_activation_call *call, cudaStream_t stream);

struct cuda_sparse_call {
	enum cuda_dtype dtype;
	bool tanh_form;
	float multiplier;
	int64_t rows;
	int hidden; /* of y */
	int64_t x_stride;
	const void *x;
	void *y;
};
int cuda_sparse_launch(const struct cuda_sparse_call *call, cudaStream_t stream);

/* ---- elementwise.cu */
enum cuda_arithmetic {
	CUDA_ADD,
	CUDA_SUB,
	CUDA_MUL,
};

/* Operands by strides (0 where they are broadcast) over y's shape, dimensions merged where they can be. */
struct cuda_arithmetic_call {
	enum cuda_arithmetic arithmetic;
	opd_dtype dtype;
	uint32_t rank;
	int64_t shape[OPD_RANK_MAX];
	int64_t a_strides[OPD_RANK_MAX];
	int64_t b_strides[OPD_RANK_MAX];
	int64_t elements;
	const void *a;
	const void *b;
	void *y;
};
int cuda_arithmetic_launch(const struct cuda_arithmetic_call *call, cudaStream_t stream);

struct cuda_cast_call {
	opd_dtype from;
	opd_dtype to;
	uint32_t rank;
	int64_t shape[OPD_RANK_MAX];
	int64_t strides[OPD_RANK_MAX];
	int64_t elements;
	const void *x;
	void *y;
};
int cuda_cast_launch(const struct cuda_cast_call *call, cudaStream_t stream);

/* ---- quant.cu: to f8_e4m3fn. */
struct cuda_quant_call {
	enum cuda_dtype dtype;
	bool per_token;
	int64_t rows;
	int hidden;
	int64_t x_stride;
	const void *x;
	const float *scale; /* given (static); else NULL */
	void *y;
	float *scales_out;   /* dynamic */
	uint32_t *largest;   /* dynamic per tensor: scratch, 4 bytes */
};
int cuda_quant_launch(const struct cuda_quant_call *call, cudaStream_t stream);

/* ---- reduce.cu: along the last dimension. */
struct cuda_softmax_call {
	enum cuda_dtype dtype;
	int64_t rows;
	int64_t size;
	int64_t x_stride;
	const void *x;
	void *y;
};
int cuda_softmax_launch(const struct cuda_softmax_call *call, cudaStream_t stream);

struct cuda_top_call {
	enum cuda_dtype dtype;
	int64_t rows;
	int64_t size;
	int64_t k;
	int64_t x_stride;
	const void *x;
	void *values;     /* NULL: argmax */
	int64_t *indices;
};
/* What the kernels take: 1 for argmax, else any k up to SORTED elements a row and up to FEW beyond. */
enum { CUDA_TOP_SORTED = 16384, CUDA_TOP_FEW = 256 };
int cuda_argmax_launch(const struct cuda_top_call *call, cudaStream_t stream);
int cuda_topk_launch(const struct cuda_top_call *call, cudaStream_t stream);

/* ---- position.cu */
struct cuda_embedding_call {
	struct cuda_index ids;
	int64_t tokens;
	int64_t vocabulary;
	int64_t row_bytes;
	int64_t table_stride_bytes;
	const void *table;
	void *y;
	struct cuda_fault fault;
};
int cuda_embedding_launch(const struct cuda_embedding_call *call, cudaStream_t stream);

struct cuda_rotary_call {
	enum cuda_dtype dtype;
	bool cache_f32;
	bool neox;
	struct cuda_index positions;
	int64_t tokens;
	int64_t positions_max;
	int head_size;
	int rot;
	int heads[2];           /* of query, of key */
	int64_t strides[2];     /* of their rows */
	const void *from[2];
	void *to[2];            /* may be from */
	const void *cache;
	int64_t cache_stride;
	struct cuda_fault fault;
};
int cuda_rotary_launch(const struct cuda_rotary_call *call, cudaStream_t stream);

struct cuda_cache_call {
	struct cuda_index slots;
	int64_t tokens;
	int64_t slot_count;
	int64_t row_bytes; /* of a token: kv_heads · D */
	int64_t token_stride_bytes[2];
	const void *tokens_from[2]; /* key, value */
	const void *cache_from[2];
	void *cache_to[2];          /* may be cache_from */
	uint64_t cache_bytes;
	int32_t *last;              /* cuda_cache_scratch bytes; NULL: none */
	struct cuda_fault fault;
};
uint64_t cuda_cache_scratch(const struct cuda_cache_call *call);
int cuda_cache_launch(const struct cuda_cache_call *call, cudaStream_t stream);

/* ---- linear.cu: up to CUDA_LINEAR_ROWS rows of x. */
enum { CUDA_LINEAR_ROWS = 8 };
struct cuda_linear_call {
	enum cuda_dtype dtype;
	int rows;
	int64_t columns;
	int64_t depth;
	int64_t x_stride;
	int64_t weight_stride;
	int64_t bias_stride;
	const void *x;
	const void *weight;
	const void *bias; /* NULL: none */
	void *y;
};
int cuda_linear_launch(const struct cuda_linear_call *call, cudaStream_t stream);

/* ---- scaled.cu: f8_e4m3fn, up to CUDA_SCALED_ROWS rows of a; the depth and the distances of rows are multiples of 16, a and b at multiples of 16 bytes. */
enum { CUDA_SCALED_ROWS = 16 };
struct cuda_scaled_call {
	enum cuda_dtype dtype; /* of y and bias */
	int rows;
	int64_t columns;
	int64_t depth;
	int64_t a_stride;
	int64_t b_stride;
	int64_t bias_stride;
	int64_t scale_a_stride; /* 0: one for all */
	int64_t scale_b_stride;
	const void *a;
	const void *b;
	const void *bias; /* NULL: none */
	const float *scale_a;
	const float *scale_b;
	void *y;
};
int cuda_scaled_launch(const struct cuda_scaled_call *call, cudaStream_t stream);

/* ---- attention.cu and attend_tile.cu */
/* Keys and values of sequence b: rows of D at distance kv_stride for successive tokens, head_stride for heads; in blocks where there is a table. */
struct cuda_attention_call {
	enum cuda_dtype dtype;
	bool causal;
	bool paged;
	float scale;
	int64_t sequences;
	int64_t tokens;      /* query rows in all */
	int64_t queries;     /* a sequence; paged: by starts */
	int64_t keys;        /* a sequence at most; paged: what a row of the table can hold */
	int heads;
	int kv_heads;
	int head_size;
	const void *query;   /* [token][head][D] by these strides; sequence b's first is b·queries unless paged */
	int64_t query_stride;      /* of tokens */
	int64_t query_head_stride;
	const void *key;
	const void *value;
	int64_t key_stride[2];       /* of tokens: key, value */
	int64_t key_head_stride[2];
	int64_t key_sequence_stride[2]; /* of sequences, or of blocks */
	void *y;                     /* contiguous */
	struct cuda_index table;     /* row-major by table_stride */
	int64_t table_stride;
	int64_t table_blocks;        /* a row */
	int64_t blocks;              /* of the cache */
	int block_size;
	struct cuda_index lengths;
	struct cuda_index starts;
	bool checked_apart;          /* set by cuda_attention_launch: a kernel before it has looked at starts, lengths and what nobody reads of the table */
	struct cuda_fault fault;
	void *scratch;               /* cuda_attention_scratch bytes */
};
/* What a call without results is still to say about its starts and lengths. */
int cuda_attention_check_launch(const struct cuda_attention_call *call, cudaStream_t stream);
uint64_t cuda_attention_scratch(const struct cuda_attention_call *call);
int cuda_attention_launch(const struct cuda_attention_call *call, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
