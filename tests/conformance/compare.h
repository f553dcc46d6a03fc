/* How far an implementation's results may be from native's (SEMANTICS 35).
 *
 * Layer: tests. Threads: one.
 * |got − native| ≤ atol + rtol·|native|, with the op's or the dtype's tolerances; NaN equals NaN, an infinity only itself; integers are exact.
 * Sums of K products add 2·√K·u·Σ|aᵢbᵢ|, and attention 2·√K·u·Σ p·|v|, where Σ comes from native in f64 over the operands' magnitudes. Where
 * that Σ is past the largest f32, a sum in another order may overflow on its way: such an element isn't compared. Nor are attention's on
 * extreme values, whose scores may overflow the same way. Elsewhere NaN may stand for an infinity of native's where that is an infinite operand
 * times a factor below f32's range (silu(-95)·∞), which native computes in f64: f32 makes 0·∞ of it. */
#ifndef OPD_TESTS_CONFORMANCE_COMPARE_H
#define OPD_TESTS_CONFORMANCE_COMPARE_H

#include "tests/conformance/cases.h"
#include "tests/conformance/host.h"

struct bounds {
	double *magnitudes; /* [elements of result 0], NULL: no sum bound */
	double factor;      /* 2·√K·u */
	struct results finite; /* native's with the largest value for every infinity among the operands; count 0: not needed */
	bool skip;          /* nothing is compared */
};

/* Bounds of one case, by runs of native implementations; freed by bounds_fini. */
OPD_MUST_USE opd_status bounds_init(struct bounds *bounds, const struct host *host, const opd_op *op, const struct conf_case *conf_case,
                                    const struct results *native, opd_error *error);
void bounds_fini(struct bounds *bounds);

/* Largest |got − native| / bound over all results; INFINITY for a NaN, infinity or integer that differs. `detail` [bytes] describes
 * that element when the ratio is over 1. */
double compare_results(const opd_op *op, const struct bounds *bounds, const struct results *native, const struct results *got,
                       char *detail, size_t bytes);

/* Every element of `part` has the bits of the elements of `whole` from number `first[i]` on, i the result. */
bool compare_bits(const struct results *part, const struct results *whole, const uint64_t *first);

#endif
