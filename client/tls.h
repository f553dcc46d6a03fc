/* TLS on a client's socket: verifying the server, sealing and opening what libopd sends and receives.
 *
 * Layer: client, internal. Threads: the client's.
 * Life: client_tls_connect (blocks, within its deadline) → client_tls_send, client_tls_receive as sendmsg and recvmsg → client_tls_destroy.
 * The server is verified: its chain by the system's authorities or a file's, its name; or its certificate is known by its fingerprint.
 * Not here: the engine (proto/tls.h), addresses (client/dial.c). */
#ifndef OPD_CLIENT_TLS_H
#define OPD_CLIENT_TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "opd/client.h"

struct client_tls;

/* On a socket that is connected to `address`. host: the name that the server's certificate must have unless the options name another. UNAUTHENTICATED: its certificate, or ours; FAILED_PRECONDITION: it
 * speaks no TLS 1.3 or not opd's protocol; INVALID_ARGUMENT: a file or an option of ours; UNAVAILABLE: the rest. */
OPD_MUST_USE opd_status client_tls_connect(int fd, const char *address, const char *host, const opd_connect_options *options, uint64_t deadline_us,
                                           struct client_tls **tls_out, opd_error *error);
/* The server took a ticket of options->resumption. */
bool client_tls_resumed(const struct client_tls *tls);
/* Says goodbye, if the socket takes it. NULL is allowed. */
void client_tls_destroy(struct client_tls *tls, int fd);

/* As a sendmsg that doesn't block, counted in plaintext. What was taken but the socket didn't is kept: client_tls_flush. */
ssize_t client_tls_send(struct client_tls *tls, int fd, const struct iovec *pieces, size_t count);
/* False: the socket is full (errno EAGAIN) or broken. */
bool client_tls_flush(struct client_tls *tls, int fd);
bool client_tls_unsent(const struct client_tls *tls);

/* As recvmsg, counted in plaintext; wait: blocks. -1 with EPROTO: client_tls_failure says why. */
ssize_t client_tls_receive(struct client_tls *tls, int fd, const struct iovec *pieces, size_t count, bool wait);
/* Something has been received and not yet been asked for: a poll of the socket would not tell. */
bool client_tls_pending(const struct client_tls *tls);
/* NULL: none. */
const opd_error *client_tls_failure(const struct client_tls *tls);

#endif
