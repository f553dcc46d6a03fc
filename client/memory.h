/* Memory shared with a daemon on this host.
 *
 * Layer: client, internal. Threads: its client's.
 * Life: opd_memory_create → operands and results lie in it → opd_memory_destroy; a client that is closed leaves it as plain memory. */
#ifndef OPD_CLIENT_MEMORY_H
#define OPD_CLIENT_MEMORY_H

#include "opd/client.h"

struct opd_memory {
	struct opd_memory *next; /* of its client's */
	opd_client *client;      /* NULL: closed */
	uint32_t region;
	uint8_t *data;
	uint64_t bytes;
};

/* A memfd that can neither shrink nor grow, the caller's to close; never descriptor 0. */
OPD_MUST_USE opd_status memory_file(uint64_t bytes, int *fd_out, opd_error *error);

/* The client ends: its memories stay, attached to nothing. */
void memory_detach_all(struct opd_memory *first);

/* NULL: none of that number. */
const struct opd_memory *memory_find(const struct opd_memory *first, uint32_t region);

/* Where [data, data + bytes) lies in it. False: not in it. */
bool memory_offset(const struct opd_memory *memory, const void *data, uint64_t bytes, uint64_t *offset_out);

#endif
