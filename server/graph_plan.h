/* Where intermediate results lie in one buffer: those that live at different times share bytes.
 *
 * Layer: server, bottom. Threads: pure. */
#ifndef OPD_SERVER_GRAPH_PLAN_H
#define OPD_SERVER_GRAPH_PLAN_H

#include <stdbool.h>
#include <stdint.h>

/* Lives from step `first` to step `last`, both included. */
struct plan_item {
	uint32_t first;
	uint32_t last;
	uint64_t bytes;  /* a multiple of 64 */
	uint64_t offset; /* filled in */
};

struct plan_sizes {
	uint64_t peak_bytes; /* of the buffer */
	uint64_t sum_bytes;  /* of all items */
};

/* Items stand by rising `first`. Best fit among the first free gaps; a gap's bytes are used again from the step after its last use. False: out of memory, or
 * past 2^63 bytes. */
bool graph_plan(struct plan_item *items, uint32_t count, struct plan_sizes *sizes_out);

#endif
