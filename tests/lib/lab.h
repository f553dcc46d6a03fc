/* Ops and providers made for tests: one of each kind that dispatch must treat differently.
 *
 * Layer: tests. Threads: kernels, predicates and plans on any; counters are atomics, zeroed by lab_reset.
 * Everything that SEMANTICS.md promises of implementations is provoked by one of these modules:
 *   lab        owns the ops lab_scale (y = factor * x), lab_wait (the same, once the gate is open), lab_work (the same, and takes its time), lab_add (y = x + by; x may be
 * donated), lab_types (every type of parameter) even_only  takes an even number of elements               plain      takes everything absent     is statically
 * unsupported                      planner    its plan refuses more than 8 elements breaks     accepts, and its kernel fails
 * spills     accepts, and writes a byte past the end older      knows lab_scale without its last parameter     picky      takes
 * operands aligned to 64 bytes toy        a device backend with two devices in host memory, and lab_scale on them */
#ifndef OPD_TESTS_LAB_H
#define OPD_TESTS_LAB_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "providers/provider.h"
#include "server/registry.h"

#define LAB_SCALE "lab_scale(Tensor x, float factor=2.0, int? mode=None) -> Tensor"
#define LAB_ADD "lab_add(Tensor x, Tensor by) -> Tensor"
#define LAB_TYPES                                                                                                                \
	"lab_types(Tensor x, Tensor? y, Tensor[] parts, int i, int? j, int[] ks, float f, float? g, bool b, str s=\"none\") -> "     \
	"Tensor"
#define LAB_UUID "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

/* In the order in which they must be opened; NULL-terminated. */
extern const opd_module *const lab_modules[];

struct lab_counts {
	_Atomic uint64_t predicates; /* calls of predicates that refuse */
	_Atomic uint64_t reasons;    /* … that were asked to format why */
	_Atomic uint64_t plans;      /* plans asked for */
	_Atomic uint64_t plans_freed;
	_Atomic uint64_t runs;          /* kernels of lab_scale, of any provider */
	_Atomic uint64_t waiting;       /* kernels of lab_wait that have begun */
	_Atomic uint64_t working;       /* kernels of lab_work that run now */
	_Atomic uint64_t working_most;  /* … at once, since lab_reset */
	_Atomic uint64_t shapes;        /* calls of lab_scale's shape function */
	_Atomic uint64_t data_in_shape; /* … that were shown contents */
};
extern struct lab_counts lab_counts;

/* Zeroes the counters and shuts the gate. */
void lab_reset(void);
/* Kernels of lab_wait end once it is open. */
void lab_gate(bool open);

/* Opens them; native is open already. */
OPD_MUST_USE opd_status lab_open(struct registry *registry, opd_error *error);

/* A shape function of another opinion: lab_scale's result with one more element. */
opd_status lab_shape_longer(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error);

/* Like every other kernel of lab_scale's: y = factor * x for a row-major f32 x. */
opd_status lab_scale_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error);
extern const opd_op lab_scale;

#endif
