/* The first exchange of a connection: Hello and its answer.
 *
 * Layer: client, internal. Threads: the client's. */
#ifndef OPD_CLIENT_GREETING_H
#define OPD_CLIENT_GREETING_H

#include "client/connection.h"

/* The largest envelope believed of a server that hasn't introduced itself. */
#define GREETING_BYTES (64u << 10)

/* Sends Hello, waits for the answer, fills in client->session. UNAVAILABLE: refused, or nobody answers. */
OPD_MUST_USE opd_status greeting_exchange(opd_client *client, const opd_connect_options *options, opd_error *error);

/* The answer has come (the reader calls this). */
OPD_MUST_USE opd_status greeting_accept(opd_client *client, const uint8_t *envelope, size_t bytes, opd_error *error);

#endif
