/* Operands whose contents stay (weights), as worker processes have them: a sealed file in memory, which a worker maps once, to read, instead of being sent a copy with every call.
 *
 * Layer: server, private to isolated*.c, above server/derived.h, which says when one is made (the contents come for the second time), charges it, and drops it when the contents end or memory is wanted.
 * Threads: any. Life: constant_get → constant_unref, of each who has it; after it was dropped, workers are told to unmap it (constant_is_dropped). */
#ifndef OPD_SERVER_ISOLATED_CONSTANT_H
#define OPD_SERVER_ISOLATED_CONSTANT_H

#include <stdatomic.h>

#include "server/derived.h"

/* Smaller ones are copied: a file has whole pages. */
#define CONSTANT_BYTES_MIN (64u << 10)

/* Of one module. Zeroed memory is one. */
struct constants {
	_Atomic uint64_t made;
	_Atomic uint64_t dropped; /* changes when one was: who has any looks */
};

struct constant {
	struct derived_own own; /* first */
	struct constants *all;
	_Atomic uint32_t refs;
	_Atomic bool gone; /* dropped */
	uint64_t number;   /* from 1 */
	uint64_t bytes;
	int fd;
};

/* `bytes` from the tensor's element 0 on, referenced; NULL: copy them, now at least. run NULL is allowed. */
struct constant *constant_get(struct constants *all, struct derived *derived, struct derived_run *run, const opd_tensor *tensor, uint64_t bytes);
bool constant_is_dropped(const struct constant *constant);
/* NULL is allowed. */
void constant_unref(struct constant *constant);

#endif
