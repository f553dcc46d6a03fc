/* A client's token: read from a file, and sent only where nobody on the way can read it.
 *
 * Layer: client, internal. Threads: the caller's. */
#ifndef OPD_CLIENT_TOKEN_H
#define OPD_CLIENT_TOKEN_H

#include "opd/status.h"

#define TOKEN_ROOM_BYTES 260u

/* The first line of a file, into out. INVALID_ARGUMENT: it isn't there, is empty, longer than 256 bytes, or others may read or write it. */
OPD_MUST_USE opd_status token_read(const char *path, char out[TOKEN_ROOM_BYTES], opd_error *error);
/* FAILED_PRECONDITION: a plain connection to another machine. */
OPD_MUST_USE opd_status token_check_way(int fd, opd_error *error);

#endif
