/* A client's rings: its frames go to a daemon on this host and come back through memory that both map; the socket stays as the life line, and carries descriptors.
 *
 * Layer: client, internal; between connection (which waits) and writer and reader (which move bytes). Threads: its client's.
 * Life: ring_attach, once the session is greeted → ring_send, ring_receive, ring_sleep → ring_destroy.
 * Not here: the memory's layout and its checks (proto/ring.h). */
#ifndef OPD_CLIENT_RING_H
#define OPD_CLIENT_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

#include "opd/client.h"

struct ring;

/* Asks for rings and waits for the answer; from then on client->ring is what the frames go through. FAILED_PRECONDITION: this session can't have any. */
OPD_MUST_USE opd_status ring_attach(opd_client *client, const opd_connect_options *options, opd_error *error);
void ring_destroy(struct ring *ring);

/* As sendmsg: what there is room for; -1 and EAGAIN: none. A descriptor with the message goes by the socket first. */
ssize_t ring_send(opd_client *client, const struct msghdr *message);
/* As readv: what is there; -1 and EAGAIN: nothing; 0: the server closed the connection; -1 and EPROTO: the ring is broken. */
ssize_t ring_receive(opd_client *client, const struct iovec *pieces, size_t count);

/* There is something to receive, or room for what waits to be sent, or the connection has ended. */
bool ring_ready(const opd_client *client);
/* Looks for as long as the client polls, then sleeps until ring_ready may be true or the deadline has passed (UINT64_MAX: none). False: passed. */
bool ring_sleep(opd_client *client, uint64_t deadline_us);

/* For callers with an event loop of their own: what they poll, and that it tells them from now on of whatever makes ring_ready true, also of what does already. */
int ring_fd(const struct ring *ring);
void ring_watch(opd_client *client);

/* While the answer to attach_rings may come: room for its descriptors in a recvmsg, and what came. */
#define RING_CONTROL_BYTES CMSG_SPACE(2 * sizeof(int))
void ring_take_descriptors(opd_client *client, struct msghdr *message);

#endif
