/* Rings: a session's frames in memory that its client shares, instead of over the socket, which stays open as its life line.
 *
 * Layer: server, beside conn_read and conn_write. Threads: the loop's.
 * Life: an attach_rings request → its answer leaves by the socket, with two descriptors → bytes come by rings_serve and go by ring_put → ring_close, with the connection.
 * A ring is *awake* while the loop looks at it in every turn, and *asleep* while only its client can wake it, through an eventfd. One whose client polls stays awake for a while after the
 * last request: the loop then looks at it alone, in slices between two looks at everything else, as long as the configuration's window and budget allow.
 * Nothing that the client can do keeps the loop waiting: it never writes to a descriptor whose flags the client can change, and reads one only with RWF_NOWAIT.
 * Not here: the memory's layout and its checks (proto/ring.h), frames (server/conn.h). */
#ifndef OPD_SERVER_RING_H
#define OPD_SERVER_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <uv.h>

/* How long the loop looks at rings before it looks at everything else, which costs 0.5 us. */
#define RING_SLICE_NS 20000u

struct conn;
struct request;
struct io_loop;

/* The request. */
void ring_attach_start(struct request *request);

/* Writes what there is room for, as uv_try_write does. UV_EAGAIN: none; conn->writing is to be set, and is cleared when there is. Other errors: the connection is closing. */
int ring_put(struct conn *conn, const uv_buf_t *bufs, unsigned count);
/* The connection may read on: looks at its ring in the next turn. */
void ring_wake(struct conn *conn);
/* What came over the socket beside the ring: descriptors, each with a byte of 0. */
void ring_socket_bytes(struct conn *conn, const unsigned char *bytes, size_t count);
/* With its connection. */
void ring_close(struct conn *conn);

/* A turn's share of all rings that are awake. */
void rings_serve(struct io_loop *io);
/* Looks at rings whose clients poll until one has something (true), or the slice is over, or nobody polls. */
bool rings_look(struct io_loop *io);

#endif
