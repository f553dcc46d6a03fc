/* Results of two implementations of one call, compared by the op's tolerances (SEMANTICS 35).
 *
 * Layer: server. Threads: any (compare_bounds_make runs native's kernel).
 * Not here: which calls are compared (server/differential.h). */
#ifndef OPD_SERVER_COMPARE_H
#define OPD_SERVER_COMPARE_H

#include "proto/arena.h"
#include "server/registry.h"

/* What sums may differ by beside the tolerances: for each element of result 0. */
struct compare_bounds {
	double *magnitudes; /* malloc'd; NULL: the op is no sum */
	double factor;
	bool unknown; /* it is, and nothing says how large its terms are: not compared */
};

struct difference {
	uint32_t result;
	uint64_t element;
	double got;
	double wanted;
};

/* Memory that compare_bounds_make takes: operands and results as f64, laid out whatever their strides. */
uint64_t compare_bounds_bytes(const struct op *op, const opd_call *call);
/* RESOURCE_EXHAUSTED, or native's failure. exec: for its kernel. */
OPD_MUST_USE opd_status compare_bounds_make(const struct op *op, const opd_call *call, const opd_exec *exec, struct compare_bounds *bounds_out,
                                            opd_error *error);
void compare_bounds_free(struct compare_bounds *bounds);
/* False: *difference_out is the first element that is too far off. Both are contiguous and of one dtype and shape. */
bool compare_outputs(const opd_op *op, const struct compare_bounds *bounds, const opd_tensor *const *got, const opd_tensor *const *wanted, uint32_t count,
                     struct difference *difference_out);

#endif
