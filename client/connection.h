/* The client object: a socket, what waits to be written to it, what has been read from it, the requests in flight.
 *
 * Layer: client, internal. The files on top of it, in order: dial, writer, reader, greeting, connection (sending and receiving
 * until something comes; over rings with ring beside writer and reader), wait (submitting and taking), direct, call, client.
 * Threads: one at a time.
 * Life: opd_connect → opd_close. A failure of the connection is recorded once (connection_break): requests without a reply are
 * dropped there and then, so that nobody's memory is read any more; finished ones can still be taken. */
#ifndef OPD_CLIENT_CONNECTION_H
#define OPD_CLIENT_CONNECTION_H

#include <stdbool.h>
#include <stdint.h>

#include "client/flight.h"
#include "client/list.h"
#include "client/memory.h"
#include "client/pool.h"
#include "client/ring.h"
#include "client/scheme.h"
#include "client/tls.h"
#include "opd/client.h"
#include "proto/arena.h"

/* What one receive call can bring beside a payload that has its own block. */
#define STAGE_BYTES ((size_t)128 << 10)

/* Pieces of frames that are being written, in order; nothing is added until all are out. */
struct batch {
	struct iovec *pieces;
	struct flight **owners; /* [i] of pieces[i] */
	size_t capacity;
	size_t count;
	size_t index;    /* first that isn't out */
	size_t bytes;    /* of those added */
	uint64_t number; /* of batches made so far */
};

struct writer {
	struct list ready;   /* whole frames: REQUEST (ids rise), ABORT, CANCEL */
	struct list bulk;    /* flights with DATA left, served in turn */
	struct list waiting; /* beyond the server's limit of requests in flight */
	uint32_t passing;    /* flights whose descriptor hasn't left yet */
	size_t ready_bytes;  /* about; of ready and the batch */
	struct batch batch;
	bool broken; /* the peer doesn't read any more; what it has sent may still be read */
};

typedef enum sink_kind {
	SINK_NONE = 0,
	SINK_ENVELOPE, /* one too large for the stage */
	SINK_PAYLOAD,  /* of `flight` */
	SINK_DISCARD,
} sink_kind;

struct reader {
	uint8_t *stage;
	size_t begin; /* bytes not yet parsed: [begin, end) */
	size_t end;
	sink_kind sink;
	uint8_t *sink_to; /* NULL: discard */
	uint64_t sink_left;
	struct flight *flight; /* whose payload it is; NULL for an envelope */
	uint8_t *envelope;     /* malloc; SINK_ENVELOPE's */
	uint8_t envelope_header[FRAME_HEADER_BYTES];
};

struct opd_client {
	int fd;
	uint64_t timeout_us;         /* of blocking calls; 0: none */
	bool receive_blocks;         /* waiting is a blocking receive, where nothing else is to be waited for; else a poll comes first */
	bool receive_timeout;        /* the socket's own receive timeout is timeout_us */
	const struct scheme *scheme; /* NULL: a plain address */
	void *scheme_state;
	uint32_t direct_depth;

	opd_session session;
	struct arena session_arena; /* its texts */
	uint64_t envelope_limit;
	bool greeted;
	bool shares;  /* … "shm" */
	struct opd_memory *memories;
	bool cancels; /* the session has the feature "cancel" */
	bool rings;   /* … "rings" */
	struct client_tls *tls;  /* … sealed; NULL: plain */
	struct ring *ring;       /* what frames go through; NULL: the socket */
	bool takes_descriptors;  /* the answer to attach_rings may come: with … */
	int ring_descriptors[2]; /* … these; -1: not there */

	struct pool *pool;
	struct arena scratch; /* encoding of what isn't a built request */
	struct flights flights;
	struct list done; /* finished, oldest first */
	size_t done_count;
	size_t live;    /* submitted, neither taken nor cancelled */
	size_t counted; /* what the server counts against its limit */
	uint64_t last_id;
	struct writer writer;
	struct reader reader;

	opd_error failure; /* status OK: connected */
	bool failure_told;
	bool leaving; /* the server has said goodbye */
	char leaving_text[OPD_ERROR_TEXT_BYTES];
};

/* ---- dial.c: addresses ---- */

#define DIAL_ROOM_BYTES 2048u

/* Finds the registered scheme of `address` ("embedded:rest"), and rest; NULL: none. */
const struct scheme *scheme_find(const char *address, const char **rest_out);

/* Takes the options off a "unix:/path?rings&poll=20us&shm" or a "tls://host:port?ca=FILE". *plain_out: what is to be dialled, `address` itself or in `room`; texts of the options are in
 * `room` too. */
OPD_MUST_USE opd_status dial_options(const char *address, opd_connect_options *options, char room[DIAL_ROOM_BYTES], const char **plain_out, opd_error *error);

/* A connected stream socket, with TLS on it if the address says so (else *tls_out stays). */
OPD_MUST_USE opd_status dial(const char *address, const opd_connect_options *options, uint64_t timeout_us, int *fd_out, struct client_tls **tls_out, opd_error *error);

/* ---- clock ---- */

/* Monotonic microseconds. UINT64_MAX as a deadline: none. */
uint64_t clock_us(void);
uint64_t clock_ns(void);
uint64_t deadline_after(uint64_t timeout_us);

/* ---- writer.c ---- */

bool writer_init(struct writer *writer);
void writer_fini(struct writer *writer);

/* Room for a batch of so many pieces, so that sending never allocates. False: out of memory. */
OPD_MUST_USE bool writer_reserve(struct writer *writer, size_t pieces);

/* Queues the flight's REQUEST frame: at once, or when replies have made room under the server's limit. Its pieces and one more
 * are reserved. */
void writer_add(opd_client *client, struct flight *flight);

/* Writes what the socket takes. */
void writer_flush(opd_client *client);

/* Something waits for the socket. */
bool writer_pending(const opd_client *client);

/* The flight was answered or cancelled: nothing of it that hasn't begun is sent, a half-sent payload ends with ABORT. */
void writer_stop(opd_client *client, struct flight *flight);

/* The flight is on its way, and its reply isn't wanted: tells a server that takes CANCEL. */
void writer_cancel(opd_client *client, struct flight *flight);

/* The caller's memory goes: copies what the batch still needs of it. False: out of memory. */
OPD_MUST_USE bool writer_detach(opd_client *client, struct flight *flight);

/* A reply has made room under the server's limit. */
void writer_admit(opd_client *client);

/* Forgets all that waits. */
void writer_clear(opd_client *client);

/* ---- reader.c ---- */

bool reader_init(struct reader *reader);
void reader_fini(struct reader *reader);

/* Receives once and parses what came; more_out: the buffer was filled, so there may be more. wait: blocks (at most the socket's
 * receive timeout). OPD_OK also when nothing came; anything else is the connection's end. */
OPD_MUST_USE opd_status reader_receive(opd_client *client, bool wait, bool *more_out, opd_error *error);

/* The reply is complete: counts it, and hands it to whoever waits, or drops it. */
void flight_answer(opd_client *client, struct flight *flight);

/* ---- connection.c ---- */

/* Sends and receives until something came or the deadline has passed (DEADLINE_EXCEEDED, nothing written into error). Any other
 * failure means that the connection is gone, and has been recorded. `fresh`: the deadline was set just now to the client's
 * timeout. */
OPD_MUST_USE opd_status connection_pump(opd_client *client, uint64_t deadline_us, bool fresh, opd_error *error);

/* Sends and receives without waiting. */
OPD_MUST_USE opd_status connection_poll(opd_client *client, opd_error *error);

void connection_break(opd_client *client, const opd_error *failure);

/* OK, or why the connection is gone: its own status the first time, UNAVAILABLE from then on. */
OPD_MUST_USE opd_status connection_check(opd_client *client, opd_error *error);

/* ---- wait.c ---- */

/* What is to be sent: a frame from the codec, whose envelope is copied, and pieces that are not. */
struct submission {
	const struct codec_buffer *envelope;
	const struct iovec *pieces;
	size_t piece_count;
	uint64_t payload_bytes;
	msg_reply_kind expected;
	int descriptor; /* passed with the frame's first byte, open until the answer; 0: none */
};
OPD_MUST_USE opd_status connection_submit(opd_client *client, const struct submission *submission, struct flight **flight_out,
                                          opd_error *error);

/* Waits with the client's timeout and takes the result; on DEADLINE_EXCEEDED the request is forgotten. As opd_run. */
OPD_MUST_USE opd_status connection_finish(opd_client *client, struct flight *flight, opd_result **result_out, opd_error *error);

void connection_forget(opd_client *client, struct flight *flight);

/* ---- direct.c ---- */

/* Runs the message on this thread; result_out is always set unless memory ran out. */
OPD_MUST_USE opd_status direct_call(opd_client *client, const struct msg_request *message, msg_reply_kind expected,
                                    opd_result **result_out, opd_error *error);

/* ---- call.c ---- */

/* Sends `message` and waits, by either way. The result is the caller's on success alone. */
OPD_MUST_USE opd_status client_call(opd_client *client, const struct msg_request *message, msg_reply_kind expected, opd_result **result_out,
                                    opd_error *error);

#endif
