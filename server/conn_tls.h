/* TLS on a connection: ciphertext of its socket to frames, what the outbox gives to ciphertext.
 *
 * Layer: server, internal. Threads: the loop's; a handshake's arithmetic (signatures, key exchange, certificates) is done by at most TLS_THREADS threads of libuv's pool (of several loops: one each), one job a
 * connection, so that a storm of handshakes delays no request by more than a read and a hand-off.
 * Life: conn_tls_create with the connection → nothing but its own few bytes until the first ciphertext → handshake → records → conn_tls_destroy in the connection's close callback,
 * or when the thread that still has it is done.
 * Small: OpenSSL's buffers are released whenever they are empty, ciphertext is read into and sealed into one buffer each of the loop. Before the handshake is over at most
 * TLS_HANDSHAKE_BYTES are taken from a client.
 * Not here: certificates and settings (server/tls_context.h), the engine (proto/tls.h). */
#ifndef OPD_SERVER_CONN_TLS_H
#define OPD_SERVER_CONN_TLS_H

#include <stdbool.h>
#include <uv.h>

#include "proto/tls.h"

#define TLS_THREADS 2u
#define TLS_HANDSHAKE_BYTES (32u << 10)
#define TLS_STAGE_BYTES (128u << 10)                      /* ciphertext that one read brings */
#define TLS_SEALED_BYTES (8 * (size_t)TLS_RECORD_ROOM)    /* … that one write takes */

struct conn;
struct conn_tls;

/* In struct io_loop. */
struct tls_jobs {
	struct conn_tls *first; /* handshakes that wait for a thread */
	struct conn_tls *last;
	uint32_t running;
};

/* NULL: out of memory. */
struct conn_tls *conn_tls_create(struct conn *conn);
/* Also of a connection without TLS. False: a thread has it; the connection's close callback runs again when that is done. */
OPD_MUST_USE bool conn_tls_destroy(struct conn *conn);

/* The client is refused as soon as it can be told why. False: out of memory. */
OPD_MUST_USE bool conn_tls_refuse_later(struct conn *conn, const opd_error *error);

/* The client's certificate, which was verified: whether there is one, and whose it is (false: the subject is empty, or too long). */
bool conn_tls_has_certificate(const struct conn *conn);
OPD_MUST_USE bool conn_tls_subject(const struct conn *conn, char out[TLS_SUBJECT_BYTES]);

/* libuv's callbacks for reading. */
void conn_tls_on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf);
void conn_tls_on_read(uv_stream_t *stream, ssize_t nread, const uv_buf_t *buf);
/* As uv_try_write, counted in plaintext: what was taken is on its way. conn->writing: no more before the socket has room again. */
int conn_tls_put(struct conn *conn, const uv_buf_t *bufs, unsigned count);
/* The connection is about to be closed: says so, if the socket takes it. */
void conn_tls_goodbye(struct conn *conn);

#endif
