/* Memory that a client shares: memfds that it passed over its Unix socket, mapped here, and what a session has of them.
 *
 * Layer: server. Threads: a table is its session's thread's; a region's references are atomic.
 * Life: regions_attach → regions_find (a reference for each request that uses it) → regions_detach; the mapping goes with the last reference. regions_fini ends a table.
 * A region's contents may change at any time, under a kernel too: what must not change between a check and its use is copied (server/shared.h).
 * Its bytes are charged to the session, and so to its tenant and the daemon, from before it is mapped until nobody uses it: the daemon may have to keep the pages alone. They are
 * given back by a thread of its own (server/reaper.h).
 * It can't shrink: its file is sealed against that, else its owner could end the daemon by SIGBUS. */
#ifndef OPD_SERVER_REGION_H
#define OPD_SERVER_REGION_H

#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#include "opd/status.h"
#include "server/config.h"
#include "server/tensors.h"

struct region {
	_Atomic uint32_t refs;
	uint32_t id;
	uint64_t bytes;
	unsigned char *data;
	dev_t device; /* of the file: two regions may be the same memory */
	ino_t inode;
	struct account *account; /* pays for the bytes: referenced */
	struct region *next; /* in its table */
};

struct regions {
	struct region *first;
	uint32_t count;
	uint32_t last_id;
	uint64_t bytes; /* mapped */
};

struct stat;

/* INVALID_ARGUMENT: not a memfd of ordinary pages, sealed against shrinking, open for reading and writing, of at least `bytes`. `what` begins the text. */
OPD_MUST_USE opd_status region_check_file(int fd, uint64_t bytes, const char *what, struct stat *file_out, opd_error *error);

void regions_fini(struct regions *regions);

/* Maps the first `bytes` of a memfd, which stays the caller's to close, at the account's cost. INVALID_ARGUMENT: it is none, isn't sealed, or is too short; RESOURCE_EXHAUSTED: the limits. */
OPD_MUST_USE opd_status regions_attach(struct regions *regions, struct account *account, const struct config_limits *limits, int fd, uint64_t bytes, uint32_t *id_out,
                                       opd_error *error);
/* NOT_FOUND: there is none. */
OPD_MUST_USE opd_status regions_detach(struct regions *regions, uint32_t id, opd_error *error);

/* Referenced; NULL: NOT_FOUND in error. */
struct region *regions_find(const struct regions *regions, uint32_t id, opd_error *error);
void region_unref(struct region *region);

#endif
