/* Generated calls: operands from an op's generator, laid out anew, cut to fewer rows; results with guarded memory.
 *
 * Layer: tests. Threads: one. Life: case_generate or case_copy → case_call with results_init → results_fini, case_fini. Zeroed memory may
 * be finished. A case and its results aren't moved: their calls point into them.
 * Not here: what results are compared with (compare.h). */
#ifndef OPD_TESTS_CONFORMANCE_CASES_H
#define OPD_TESTS_CONFORMANCE_CASES_H

#include "tests/conformance/schema.h"

/* Bytes before and after a result that nobody may write. */
enum { CASE_GUARD = 64, CASE_GUARD_BYTE = 0xa5 };

struct operand {
	opd_tensor tensor;
	int64_t shape[OPD_RANK_MAX];
	int64_t strides[OPD_RANK_MAX];
	unsigned char *memory; /* NULL: this argument is no tensor */
	uint64_t bytes;        /* of memory, guards included */
};

struct conf_case {
	opd_generator generator; /* first: the generator's callbacks get its address */
	const struct schema *schema;
	uint64_t random;
	struct operand operands[SCHEMA_PARAMS];
	opd_arg args[SCHEMA_PARAMS];
	char texts[SCHEMA_PARAMS][SCHEMA_NAME];
};

struct results {
	struct operand outputs[SCHEMA_RESULTS];
	const opd_tensor *pointers[SCHEMA_RESULTS];
	uint32_t count;
};

enum case_layout {
	CASE_CONTIGUOUS,
	CASE_PADDED,    /* a gap after each row, and one element before the first: rows are contiguous, aligned to an element only */
	CASE_STRIDED,   /* every other element of the last dimension */
	CASE_BROADCAST, /* stride 0 in one dimension of every float operand that case_make_uniform has made equal along it */
	CASE_LAYOUTS,
};

const char *case_layout_name(enum case_layout layout);

/* Arguments by the op's generator, contiguous. OPD_INVALID_ARGUMENT: not for this dtype or these dims; OPD_OUT_OF_RANGE: no such variant. */
OPD_MUST_USE opd_status case_generate(struct conf_case *made, const opd_op *op, const struct schema *schema, opd_dtype dtype,
                                      opd_values values, uint32_t variant, const int64_t *dims, uint64_t seed, opd_error *error);

/* The same arguments in another layout. */
void case_copy(struct conf_case *made, const struct conf_case *from, enum case_layout layout);

/* Makes float operands of two and more dimensions equal along the first dimension that isn't the last and is longer than 1, so that a
 * stride of 0 means the same. False: there was none. */
bool case_make_uniform(struct conf_case *conf_case);

/* Puts the largest finite value of their sign in place of every infinity. */
void case_make_finite(struct conf_case *conf_case);

/* Puts a zero of its sign in place of every bf16 denormal. */
void case_flush_bf16(struct conf_case *conf_case);

/* The largest finite value of a float dtype. */
double dtype_largest(opd_dtype dtype);

/* Rows [begin, end) of dimension 0 of every operand that the op calls an activation (a comma-separated list of names), the others whole.
 * False when an activation has another extent there than `extent`. */
OPD_MUST_USE bool case_cut(struct conf_case *made, const struct conf_case *from, const char *activations, int64_t extent, int64_t begin,
                           int64_t end);

void case_fini(struct conf_case *conf_case);

/* A tensor operand as f64, contiguous: used for bounds. `absolute` takes magnitudes; what isn't finite becomes 0. */
void operand_to_f64(struct operand *made, const struct operand *from, bool absolute);
/* Value of the element number `index` in row-major order. */
double operand_get(const struct operand *operand, uint64_t index);
/* Address of that element. */
void *operand_at(const struct operand *operand, uint64_t index);
void operand_fini(struct operand *operand);

/* Memory for the op's results, by its shape function. Filled with a pattern, so that an element that isn't written shows. */
OPD_MUST_USE opd_status results_init(struct results *results, const opd_op *op, const struct conf_case *conf_case, opd_error *error);
/* False when a guard was overwritten. */
bool results_guarded(const struct results *results);
void results_fini(struct results *results);

opd_call case_call(const struct conf_case *conf_case, const struct results *results);

/* Operands become tensors that stay, each with an identity of its own that no other case has: an implementation may keep derived copies of them. Those that the op calls
 * activations only where `all`. */
void case_make_constant(struct conf_case *conf_case, const char *activations, bool all);

#endif
