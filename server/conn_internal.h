/* A connection's own functions, for the files that make it up: conn.c (life, Hello, stalls), conn_read.c, conn_frame.c, conn_write.c.
 *
 * Layer: server, internal. Threads: its loop. */
#ifndef OPD_SERVER_CONN_INTERNAL_H
#define OPD_SERVER_CONN_INTERNAL_H

#include "proto/arena.h"
#include "proto/codec.h"
#include "proto/frame.h"
#include "server/conn.h"

/* A frame of the session's own: Hello's reply, Goaway. Has its arena with it. */
struct notice {
	struct out out; /* first */
	struct arena arena;
};

/* conn.c */
/* The close callback: frees it, unless a thread still computes for it. */
void conn_closed(struct conn *conn);
void conn_refuse_hello(struct conn *conn, const opd_error *error);
void conn_on_hello(struct conn *conn, const uint8_t *envelope, size_t bytes);

/* conn_descriptor.c. A Unix socket's bytes, as recv, and the descriptors that came with them; UV_EAGAIN, another error of libuv's, 0: the end. Those that no frame took are let go. */
ssize_t conn_receive(struct conn *conn, void *to, size_t bytes);
/* It is about to be closed: takes the descriptors that nobody has read yet, which the kernel would else close under the loop. */
void conn_drain(struct conn *conn);
void conn_drop_descriptors(struct conn *conn);

/* conn_read.c */
void conn_start_reading(struct conn *conn);
/* The memory in which the head lies whose envelope conn_on_frame was given, now the caller's; NULL: not in memory of its own. */
void *conn_take_head(struct conn *conn, const uint8_t *envelope);
/* Nothing that comes is looked at before conn_go_on. */
void conn_hold(struct conn *conn);
void conn_go_on(struct conn *conn);
/* For what doesn't come by the socket (server/ring.h). Whether anything may be read now; where payload bytes belong, and how many are still to come (NULL: something else comes
 * next); so many are there; bytes of anything else, copied, which may hold many frames. Each may close the connection. */
bool conn_may_read(const struct conn *conn);
uint8_t *conn_payload_room(const struct conn *conn, uint64_t *bytes_out);
void conn_received_payload(struct conn *conn, uint64_t bytes);
void conn_consume(struct conn *conn, const uint8_t *data, size_t bytes);

/* conn_frame.c: what a header alone tells; a whole head; an end of what is half sent; the end of all reading. */
bool conn_check_header(struct conn *conn, const struct frame_header *header);
void conn_on_frame(struct conn *conn, const struct frame_header *header, const uint8_t *envelope);
/* Its reply is made: it can't be cancelled any more. */
void conn_forget_id(struct request *request);
/* The connection is gone: what is queued ends, what runs is asked to. */
void conn_cancel_all(struct conn *conn);
void conn_chunked_remove(struct conn *conn, struct request *request);
void conn_abandon_half_sent(struct conn *conn, const char *why);
void conn_protocol_error(struct conn *conn, const char *what);

/* conn_write.c */
void conn_new_turn(struct conn *conn);
void conn_mark_dirty(struct conn *conn);
/* The client has taken some of what waited for it. Its time (limits.stall) begins anew when that is CONN_PROGRESS_BYTES, or all: what TLS has sealed and the socket has no room for is not. */
void conn_progress(struct conn *conn);
void conn_stop_reading(struct conn *conn);
/* A request has come: true: it is one too many, and waits with all that comes behind it. */
bool conn_throttle(struct conn *conn);
void conn_on_reply(struct request *request);
/* NULL: out of memory. */
struct notice *conn_notice_create(void);
void conn_notice_send(struct conn *conn, struct notice *notice, frame_type type, const struct codec_buffer *buffer);
void conn_notice_written(struct out *out);
void conn_say_goodbye(struct conn *conn, opd_status status, const char *why);

#endif
