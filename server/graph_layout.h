/* Where intermediate results lie when some steps run at once: no two that may be there at the same time share a byte.
 *
 * Layer: server, over graph_plan and graph_schedule. Threads: pure.
 * What is made and used within one part of a stage is laid out for that part alone, in the order of its steps; each part of a stage has bytes of its own. What passes from one
 * stage to another is there for all of both. Where nothing runs at once this is graph_plan. */
#ifndef OPD_SERVER_GRAPH_LAYOUT_H
#define OPD_SERVER_GRAPH_LAYOUT_H

#include "server/graph_plan.h"
#include "server/graph_schedule.h"

struct layout_item {
	uint32_t step; /* that makes it */
	uint64_t bytes;  /* a multiple of 64 */
	uint64_t offset; /* filled in */
};

struct layout_use {
	uint32_t item;
	uint32_t step; /* the schedule's step_count: it is there to the end */
};

struct layout {
	struct layout_item *items; /* by rising step */
	uint32_t item_count;
	const struct layout_use *uses;
	uint32_t use_count;
};

/* False: out of memory, or past 2^63 bytes. */
bool graph_layout(const struct layout *layout, const struct schedule *schedule, struct plan_sizes *sizes_out);

#endif
