/* A client that does what an input says, and checks what the daemon must do whatever that is: every frame it sends decodes, every request is answered
 * once, and nothing of the session is left when it has ended.
 *
 * The daemon's loop has no thread of its own: it turns where the client waits for it or lets it, so that what is interleaved is the input's choice, and an execution costs no switch of threads but
 * those to the lanes.
 *
 * Layer: tests. Threads: one. Life: session_start, then for each input peer_open → peer_send, peer_turn… → peer_finish. session_script.c turns an input into frames. */
#ifndef OPD_TESTS_FUZZ_SESSION_H
#define OPD_TESTS_FUZZ_SESSION_H

#include <stdbool.h>

#include "fuzz.h"
#include "proto/arena.h"
#include "proto/codec.h"
#include "server/schema.h"

#define PEER_IDS 512u
#define PEER_HALF_SENT 8u
#define PEER_HANDLES 32u
#define PEER_SHARED_BYTES 16384u

/* A tensor that the daemon keeps for us. */
struct peer_handle {
	struct msg_handle handle;
	char param[64];
};

/* A reply as it came. */
struct peer_answer {
	uint8_t *data; /* envelope, then payload */
	size_t envelope_bytes;
	size_t payload_bytes;
	size_t payload_due;
	bool chunked; /* its payload isn't here */
};

/* What a peer is, as an input says. */
struct peer_kind {
	bool chunks;
	bool lanes;   /* every kernel runs on a lane's thread; otherwise most run on the loop */
	bool modules; /* of the daemon with test modules */
	bool shares;  /* memory, by one region */
};

/* A daemon, and what it holds with no session. */
struct session_daemon {
	struct server *server;
	uint64_t idle_bytes;
};

struct peer {
	int fd;
	struct session_daemon *daemon;
	bool greeted;
	bool ended;  /* the daemon has closed, or said that it will */
	bool rude;   /* what was sent may end the connection, or repeats ids: no promise about replies holds */
	uint64_t next_id;
	uint8_t replies[PEER_IDS]; /* by id */
	uint32_t half_count;
	struct {
		uint64_t id;
		uint64_t bytes;
		uint64_t sent;
	} half[PEER_HALF_SENT];
	uint32_t handle_count; /* of the last generation */
	struct peer_handle handles[PEER_HANDLES];
	uint32_t kept_count; /* of uploads and other results that stay, the newest; may be more than there is room */
	struct msg_handle kept[PEER_HANDLES];
	uint8_t *out; /* not yet sent */
	size_t out_bytes;
	size_t out_room;
	uint8_t *in;
	size_t in_bytes;
	size_t in_room;
	uint64_t skip; /* payload bytes still to come */
	struct fuzz_input *beside; /* says what goes beside requests (session_beside.c); NULL: nothing does */
	uint32_t region;           /* of shared memory; 0: none */
	uint8_t *shared;           /* … [PEER_SHARED_BYTES] */
	uint64_t watched;          /* the request whose reply is kept in `answer`; 0: none */
	struct peer_answer answer;
};

/* session_daemon.c: both daemons, until the process ends; then nothing may be left of any session. */
void session_start(void);
struct session_daemon *session_daemon(bool with_modules);

void peer_open(struct peer *peer, const struct peer_kind *kind);
/* With the next turn; does nothing once the connection has ended. */
void peer_send(struct peer *peer, const void *data, size_t bytes);
void peer_frame(struct peer *peer, frame_type type, uint64_t id, uint16_t flags, const void *envelope, size_t envelope_bytes, uint64_t payload_bytes);
/* A request under the next id; its payload is still to be sent. 0: no more ids. */
uint64_t peer_request(struct peer *peer, const struct msg_request *message, uint16_t flags, uint64_t payload_bytes);
/* A request with a descriptor and no payload, once all before it is sent. */
uint64_t peer_request_with(struct peer *peer, const struct msg_request *message, int fd);
/* Sends what there is, lets the loop turn once and reads what came. */
void peer_turn(struct peer *peer);
/* Until that request is answered or the connection has ended. */
void peer_wait(struct peer *peer, uint64_t id);
/* Ends what is half sent and waits for all replies. */
void peer_settle(struct peer *peer);
/* … and closes. */
void peer_finish(struct peer *peer);

/* The ops that the scripts run: of the daemon's own list. */
void script_learn(const struct msg_reply *ops);
/* … and of what each of them says of itself. */
void script_learn_dims(const struct msg_reply *op);
/* NULL: there are fewer. */
const struct schema *script_op(uint32_t index);
void script_run(struct peer *peer, struct fuzz_input *input);
void script_free(void);
/* session_graph.c: registers, runs or frees a graph of a few nodes. */
void script_graph(struct arena *arena, struct peer *peer, struct fuzz_input *input);

/* session_check.c: a call in several ways, whose results must be the same. */
void script_check(struct arena *arena, struct peer *peer, struct fuzz_input *input);

/* session_tensors.c: uploads, whole or in parts, writes, fetches, publications, lists. */
void script_tensors(struct arena *arena, struct peer *peer, struct fuzz_input *input);

/* What scripts are made of. */
void script_pick_tensor(struct arena *arena, struct peer *peer, struct fuzz_input *input, struct msg_tensor *tensor, uint64_t *payload);
void *script_take(struct arena *arena, size_t count, size_t bytes);
const struct schema *script_pick_op(struct fuzz_input *input);
const struct schema *script_find_op(struct msg_text name);
/* An argument of the parameter's type, now and then of another. */
void script_pick_arg(struct arena *arena, struct peer *peer, struct fuzz_input *input, schema_type type, struct msg_arg *arg, uint64_t *payload);
/* At once, or half sent from now on. The payload is zeros. Its id; 0: no more ids. */
uint64_t script_send_run(struct peer *peer, const struct msg_request *request, uint64_t payload, bool chunked);
/* A Generate of an op: sizes that fit it, but for a few. */
void script_pick_generate(struct arena *arena, struct fuzz_input *input, struct msg_generate *generate);

/* session_beside.c: what nothing is without `beside`. */
void peer_attach(struct peer *peer);
/* False: no shared memory. */
bool beside_source(const struct peer *peer, struct msg_tensor *tensor, uint64_t bytes);
void beside_run(const struct peer *peer, struct msg_run *run, struct msg_output_option *options);
void beside_upload(const struct peer *peer, struct msg_upload *upload);
void beside_fetch(const struct peer *peer, struct msg_fetch *fetch);
uint64_t beside_payload(const struct peer *peer);

#endif
