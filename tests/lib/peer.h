/* A scripted server for tests of the client: a real socket, a thread, and calls to read and write single frames of the wire.
 *
 * Threads: the script runs on its own thread; what goes wrong there is remembered and comes out of peer_join.
 * Life: peer_start → (connect to peer.address) → peer_join. */
#ifndef OPD_TESTS_PEER_H
#define OPD_TESTS_PEER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/arena.h"
#include "proto/codec.h"
#include "proto/frame.h"
#include "proto/message.h"

struct peer;
typedef void peer_fn(struct peer *peer, void *argument);

typedef enum peer_kind {
	PEER_UNIX = 0,
	PEER_TCP4,
	PEER_TCP6,
} peer_kind;

struct peer {
	char address[160];
	char path[128]; /* of a Unix socket */
	int listener;
	int fd;
	pthread_t thread;
	peer_fn *script;
	void *argument;
	_Atomic int stage; /* for scripts and tests to wait for each other */
	bool failed;
	char failure[300];
	uint64_t chunk_bytes; /* agreed in peer_hello */
	size_t split;         /* peer_send waits after so many bytes until the client has read them; 0: never */
};

struct peer_frame {
	struct frame_header header;
	uint8_t *envelope;
	uint8_t *payload; /* NULL for a chunked request */
};

/* Listens; `script` begins when the client has connected. */
void peer_start(struct peer *peer, peer_kind kind, peer_fn *script, void *argument);
/* Waits for the script's end; false, with peer->failure, when something in it failed. */
bool peer_join(struct peer *peer);

/* In a script: remembers the first failure. Returns `ok`. */
bool peer_check(struct peer *peer, bool ok, const char *what, int line);
#define PEER_CHECK(peer, condition) peer_check((peer), (condition), #condition, __LINE__)

void peer_stage_set(struct peer *peer, int stage);
void peer_stage_wait(struct peer *peer, int stage);

/* Answers the client's Hello. NULL: no limits, an administrator, chunks of 1 MiB or what the client asked for. */
void peer_hello(struct peer *peer, const struct msg_hello_reply *answer);

/* Until something of the client's is there to be read; reads nothing. */
void peer_wait_readable(struct peer *peer);

/* False: the connection has ended. */
bool peer_read(struct peer *peer, struct peer_frame *frame_out);
void peer_frame_free(struct peer_frame *frame);

/* Reads a Run request and, if it is chunked, its payload. Decodes into `arena`. */
bool peer_read_request(struct peer *peer, struct arena *arena, struct peer_frame *frame_out, struct msg_request *request_out);

bool peer_send(struct peer *peer, const void *data, size_t bytes);
bool peer_send_frame(struct peer *peer, frame_type type, uint16_t flags, uint64_t id, const void *envelope,
                     uint32_t envelope_bytes, const void *payload, uint64_t payload_bytes);
/* A whole frame of a reply in malloc'ed memory. */
uint8_t *peer_encode_reply(const struct msg_reply *reply, uint64_t id, uint16_t flags, const void *payload,
                           uint64_t payload_bytes, size_t *bytes_out);
bool peer_reply(struct peer *peer, uint64_t id, const struct msg_reply *reply, const void *payload, uint64_t payload_bytes);
/* In DATA frames of `chunk` bytes. */
bool peer_reply_chunked(struct peer *peer, uint64_t id, const struct msg_reply *reply, const void *payload,
                        uint64_t payload_bytes, uint64_t chunk);
bool peer_send_data(struct peer *peer, uint64_t id, uint64_t offset, const void *data, uint64_t bytes);
bool peer_reply_status(struct peer *peer, uint64_t id, opd_status status, const char *message);

/* An f32 vector as the only output, from the payload; `result` is storage for it. */
struct msg_reply peer_vector(struct msg_result *result, int64_t elements);

/* Answers Run requests with their first host operand, until the client leaves. */
void peer_echo(struct peer *peer);

#endif
