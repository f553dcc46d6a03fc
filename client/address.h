/* Where a client looks for a daemon when nobody says.
 *
 * Layer: client, internal. Threads: pure but for the environment.
 * The rule is the daemon's own (server/config.h, config_default_socket): $XDG_RUNTIME_DIR/opd.sock, as root /run/opd/opd.sock,
 * else /tmp/opd-<uid>/opd.sock. The two stand apart because client and server include nothing of each other; README.md documents
 * them once. */
#ifndef OPD_CLIENT_ADDRESS_H
#define OPD_CLIENT_ADDRESS_H

#include <stddef.h>

/* Writes the socket's path into out, NUL-terminated and cut where it doesn't fit. */
void address_default_socket(char *out, size_t out_bytes);

/* The same as an address: "unix:/run/opd/opd.sock". */
void address_default(char *out, size_t out_bytes);

#endif
