/* A walk over all elements of a result, in row-major order, beside one or two operands of any strides that are broadcast to its shape.
 *
 * Layer: providers/cpu. Threads: a walk is read only; its runs are a caller's own. Dimensions that lie behind each other in every operand are merged, so
 * contiguous operands are one run.
 * Not here: rows of a kernel that needs whole ones (call.h). */
#ifndef OPD_CPU_WALK_H
#define OPD_CPU_WALK_H

#include "providers/cpu/call.h"

enum { WALK_OPERANDS = 2 };

struct walk {
	uint32_t rank; /* at least 1 */
	uint32_t operands;
	uint64_t shape[OPD_RANK_MAX + 1];
	uint64_t strides[WALK_OPERANDS][OPD_RANK_MAX + 1]; /* elements */
	const unsigned char *data[WALK_OPERANDS];
	uint64_t bytes[WALK_OPERANDS]; /* of an element */
};

/* `a`, and `b` unless that is NULL, over the shape of `result`, which has elements. In run. */
struct walk walk_over(const opd_tensor *result, const opd_tensor *a, const opd_tensor *b);

/* Elements that follow element `index` of the result at one stride an operand. */
struct walk_run {
	uint64_t count; /* at most the limit */
	const unsigned char *data[WALK_OPERANDS];
	uint64_t strides[WALK_OPERANDS]; /* elements */
};

struct walk_run walk_run_at(const struct walk *walk, uint64_t index, uint64_t limit);

/* Elements that kernels handle at a time where an operand has to be gathered first. */
enum { WALK_CHUNK = 256 };

/* `count` elements of `bytes` each, `stride` elements apart, side by side into `to`. */
void walk_gather(void *to, const void *from, uint64_t stride, uint64_t count, uint64_t bytes);

/* One operand's elements [index, index + count), count at most WALK_CHUNK, side by side: where they lie if they do, else gathered into `buffer`
 * [WALK_CHUNK elements]. */
const void *walk_elements(const struct walk *walk, uint64_t index, uint64_t count, void *buffer);

#endif
