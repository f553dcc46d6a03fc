/* From a decoded run to a bound call: arguments by position and name, defaults, types; operands placed in memory; results' shapes.
 *
 * Layer: server. Threads: pure but for the arena; any thread.
 * In order: bind_args → bind_place for every operand → bind_outputs. Then the call is what predicates and kernels see.
 * Errors are INVALID_ARGUMENT and name op, parameter, value and what was expected (SEMANTICS 5).
 * Not here: where operands come from (server/operands.h), who runs the call (server/dispatch.h). */
#ifndef OPD_SERVER_BIND_H
#define OPD_SERVER_BIND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/arena.h"
#include "proto/message.h"
#include "server/registry.h"
#include "server/tensors.h"

/* A tensor among the arguments. */
struct operand {
	const char *param; /* its name */
	struct msg_tensor *source; /* dtype, shape, strides as the client gave them, or as filled in from a whole kept tensor */
	opd_tensor tensor;
	struct buffer *buffer; /* referenced; NULL: memory that isn't ours (direct calls), or none (fake, dry) */
};

struct bound {
	const struct op *op;
	opd_call call;
	opd_arg *args; /* [op->schema->param_count] */
	uint32_t operand_count;
	struct operand *operands;
	opd_tensor *outputs; /* [call.output_count] */
	uint64_t output_bytes; /* their sum, each padded to 64; not a graph's */
};

/* Of all its elements, packed: bind_place and bind_outputs have checked that it is a number. */
static inline uint64_t bound_bytes(const opd_tensor *tensor)
{
	return tensor->elements * opd_dtype_bytes(tensor->dtype);
}

/* Which of the operands this tensor of the call's arguments is. */
static inline uint32_t bound_index(const struct bound *bound, const opd_tensor *tensor)
{
	const struct operand *operand = (const struct operand *)(const void *)((const char *)tensor - offsetof(struct operand, tensor));
	return (uint32_t)(operand - bound->operands);
}

/* Fills in op, args, operands (not yet placed). Everything in the arena. RESOURCE_EXHAUSTED: the arena is full. */
OPD_MUST_USE opd_status bind_args(struct arena *arena, const struct op *op, const struct msg_run *run, struct bound *bound, opd_error *error);

/* Checks the operand's shape and strides against `bytes` of memory at `data` (NULL with bytes UINT64_MAX: there is none and any size will do) and fills in its tensor. `exact`:
 * a row-major operand without offset must fill them exactly. */
OPD_MUST_USE opd_status bind_place(const struct op *op, struct operand *operand, void *data, uint64_t bytes, bool exact, opd_error *error);

/* Calls the shape function and describes the outputs (data NULL). */
OPD_MUST_USE opd_status bind_outputs(struct arena *arena, struct bound *bound, opd_error *error);

/* Nanoseconds of one thread for the call: as the implementation estimates, and for the check of its indices, which is done where the kernel runs. 0: unknown. */
uint64_t bound_cost_ns(const struct bound *bound, const struct impl *impl);

#endif
