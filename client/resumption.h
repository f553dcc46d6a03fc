/* Tickets of TLS sessions that were, for the next connection to the same server: opd_resumption of the public header.
 *
 * Layer: client, internal. Threads: any; one lock, held for a few instructions.
 * Life: opd_resumption_create → resumption_ref for each connection that has it → resumption_unref, opd_resumption_destroy; gone with the last.
 * A ticket is used once (so that nobody on the way can tell that two connections are one client's), for connections that would verify the server in the same way: resuming means that its certificate
 * isn't looked at again.
 * Not here: the handshake (client/tls.h). */
#ifndef OPD_CLIENT_RESUMPTION_H
#define OPD_CLIENT_RESUMPTION_H

#include <openssl/ssl.h>

#include "opd/client.h"

/* NULL is allowed in all of these. */
opd_resumption *resumption_ref(opd_resumption *resumption);
void resumption_unref(opd_resumption *resumption);

/* What a ticket is good for: this server, and how it was verified. malloc'd; NULL: out of memory, nothing is resumed. */
char *resumption_key(const char *address, const opd_connect_options *options);
/* The newest ticket of this key, now the caller's; NULL: none. */
SSL_SESSION *resumption_take(opd_resumption *resumption, const char *key);
/* Takes `session`; the oldest goes when there are too many. */
void resumption_put(opd_resumption *resumption, const char *key, SSL_SESSION *session);

#endif
