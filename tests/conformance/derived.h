/* The test host's derived copies: unbounded, made at the first use.
 *
 * Layer: tests. Threads: run's own. Life: zeroed → the host table's derived_find, derived_make, derived_keep → derived_drop.
 * Not here: when a daemon makes, shares and drops copies (server/derived.h and its tests). */
#ifndef OPD_TESTS_CONFORMANCE_DERIVED_H
#define OPD_TESTS_CONFORMANCE_DERIVED_H

#include "providers/provider.h"

struct derived_copy;

struct derived_copies {
	struct derived_copy *first;
	uint64_t asked; /* calls of derived_find */
	uint64_t found;
};

const void *derived_copies_find(struct derived_copies *copies, const opd_tensor *tensor, const void *key, uint32_t key_bytes);
void *derived_copies_make(struct derived_copies *copies, const opd_tensor *tensor, const void *key, uint32_t key_bytes, uint64_t bytes);
void derived_copies_keep(struct derived_copies *copies, const void *memory);
/* Forgets all. No run is under way. */
void derived_copies_drop(struct derived_copies *copies);

#endif
