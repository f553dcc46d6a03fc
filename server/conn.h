/* A connection: its socket, the frames that come in, the frames that go out.
 *
 * Layer: server. Threads: its loop.
 * Life: conn_create → the socket is accepted or opened into conn_stream → conn_start → … → conn_close → freed in the close callback. After conn_start succeeded every failure ends in
 * conn_close, with a reason in the log.
 * A turn of the loop reads and writes at most CONN_TURN_BYTES of one connection among several.
 * Not here: what a request does (server/request.h), the order of outgoing frames (server/outbox.h). */
#ifndef OPD_SERVER_CONN_H
#define OPD_SERVER_CONN_H

#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#include "server/log.h"
#include "server/outbox.h"
#include "server/session.h"
#include "server/stranger.h"

#define CONN_TURN_BYTES (256u << 10)
/* What a connection may write in a turn when no other did anything in the one before: over TCP, 64 MiB down go at 1.0 of libuv's direct rate instead of 0.7, and who comes
 * now waits 0.3 ms at most. */
#define CONN_TURN_ALONE_BYTES (1u << 20)
/* A client that reads fewer in limits.stall while more waits for it holds memory, a byte at a time, for as long as it likes: that is no progress. */
#define CONN_PROGRESS_BYTES (64u << 10)
#define CONN_TURN_REQUESTS 128u /* that a turn accepts, give or take what one read brings */
#define CONN_CHUNKED_BITS 5
#define CONN_ID_BITS 6
/* Features, as bits of conn.features; CONN_PASSES: those whose clients pass descriptors. */
#define CONN_CANCEL 1u
#define CONN_SHM 2u
#define CONN_RINGS 4u
#define CONN_PASSES (CONN_SHM | CONN_RINGS)
#define CONN_DESCRIPTORS 4u /* that may wait for their frame */
#define CONN_STAGE_BYTES (64u << 10)

struct io_loop;
struct server;
struct request;
struct ring;
struct conn_tls;

typedef enum conn_state {
	CONN_HEAD = 0,    /* a frame's header or envelope comes next */
	CONN_PAYLOAD = 1, /* payload of `reading` */
	CONN_DISCARD = 2, /* payload that nobody wants */
} conn_state;

struct conn {
	struct conn *next; /* of the loop's */
	struct conn *previous;
	struct conn *next_dirty;
	struct io_loop *io;
	struct server *server;
	struct session *session;
	union {
		uv_handle_t handle;
		uv_stream_t stream;
		uv_pipe_t pipe;
		uv_tcp_t tcp;
	};
	uv_write_t write;
	char peer[80];
	bool local;       /* a Unix socket: descriptors can be passed */
	bool remote;      /* came by a listener that other machines reach, over TLS: who it is must be said */
	bool greeted;     /* Hello was answered */
	bool closing;
	bool opened;      /* the handle is initialised */
	bool reading_on;  /* uv_read_start is in force */
	bool writing;     /* a uv_write is under way, or replies wait for room in the ring */
	bool dirty;       /* in the loop's list */
	bool busy;        /* counted in its busy_count */
	bool throttled;   /* a request has come that is one too many: nothing is read from there on until something is written */
	bool broken;      /* the client broke the framing: nothing of it is read any more */
	bool last_words;  /* close once everything is written */
	bool held;        /* an envelope is decoded on a lane: what comes behind it waits in held_bytes */
	uint8_t *held_data; /* what was read and isn't looked at yet, also of a throttled one */
	size_t held_bytes;
	uint64_t held_payload_bytes; /* of the request's header */
	bool held_chunked;
	uint64_t chunk_bytes;
	uint64_t opened_us;
	uint64_t read_us;  /* last progress */
	uint64_t write_us;
	uint64_t progress_bytes; /* written since write_us */

	conn_state state;
	uint32_t read_hint; /* how many bytes the next frame's header and envelope probably have; 0: read as much as there is */
	uint8_t *partial;   /* a frame's header and envelope, as far as they came */
	uint32_t partial_bytes;
	uint32_t partial_room;
	struct request *reading; /* state PAYLOAD */
	uint64_t frame_left;     /* payload bytes of the frame under way */
	struct request *chunked[1 << CONN_CHUNKED_BITS]; /* by id: requests whose DATA frames are still to come */
	uint32_t chunked_count;
	struct request *by_id[1 << CONN_ID_BITS];        /* by id: requests without a reply */
	uint32_t features;                               /* CONN_CANCEL…: negotiated */
	uint64_t chunked_seed;
	int descriptors[CONN_DESCRIPTORS];               /* passed, and not yet taken by the frame that they came with; oldest first */
	uint32_t descriptor_count;
	struct ring *ring;       /* its frames go through shared memory (server/ring.h); NULL: through the socket */
	struct conn_tls *tls;    /* its frames are sealed (server/conn_tls.h); NULL: they aren't */
	struct stranger stranger;
	struct outbox outbox;
	uint64_t turn;
	uint64_t turn_read;
	uint64_t turn_written;
	uint32_t turn_requests;
	bool turn_spent; /* what it asked for in this turn took long to answer: no request is begun in what is left of it */
	uint64_t unread_bytes; /* memory of large answers that aren't written yet */
	bool flooding; /* it sent as many as a turn may in the one before: it is read in small pieces */
	uint64_t wrote_bytes; /* of the uv_write under way */
};

/* On the thread of the loop where it is to live, which expects it (io_loop_expect), and doesn't any more when this fails. Takes `access`, also then (NULL: it fails). NULL: out of memory. */
struct conn *conn_create(struct io_loop *io, struct access *access);
/* Starts reading; the handle has been initialised and connected. refuse: greet with this error and close (NULL: serve). */
void conn_start(struct conn *conn, const opd_error *refuse);
/* Writes what is due; called once a turn for every dirty connection. */
void conn_flush(struct conn *conn);
/* Once a second: ends it when it stalls. */
void conn_tick(struct conn *conn, uint64_t now_us);
/* Tells the client that the server ends; it is closed when nothing is under way any more. */
void conn_goaway(struct conn *conn, const char *why);
/* A request of it that ends before its payload is whole: what still comes of that is skipped. */
void conn_skip_payload(struct conn *conn, struct request *request);
/* The reply to all that it has in flight will be there in some 10 us: what every frame begins with leaves ahead, so that the client's thread wakes meanwhile, which takes it as long. Only over a Unix
 * socket, where it costs 2 us (over TCP 6, and gains nothing), and where nothing else waits to be written. */
void conn_expect_reply(struct conn *conn);
/* What its session has asked for took long: what it sends behind that waits for the next turn. NULL is allowed. */
void conn_spend_turn(struct conn *conn);
/* Nothing accepted, nothing to write. */
bool conn_idle(const struct conn *conn);
/* The oldest descriptor that came with the frames being read, now the caller's, to be given to conn_let_go; -1: none. */
int conn_take_descriptor(struct conn *conn);
/* Closes a client's descriptor, without waiting for whoever is behind it. */
void conn_let_go(const struct conn *conn, int fd);
void conn_close(struct conn *conn, log_level level, const char *reason);

#endif
