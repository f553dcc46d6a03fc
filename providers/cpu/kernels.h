/* The kernels of provider `cpu`, one table for each instruction set.
 *
 * Layer: providers/cpu. Threads: constants and pure functions; any number of threads at once.
 * A kernel does one row (or one tile); who calls it for which rows is call.h's business, which is why results can't depend on how
 * work is split. Rows are contiguous, of any alignment. Dtypes are indexed by cpu_dtype_index.
 * Not here: predicates, checks, strides (norm.c and its like). */
#ifndef OPD_CPU_KERNELS_H
#define OPD_CPU_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "opd/dtype.h"

enum { CPU_F32, CPU_BF16, CPU_F16, CPU_DTYPES };

/* Index into the tables below; CPU_DTYPES for a dtype that has no kernels. */
static inline unsigned cpu_dtype_index(opd_dtype dtype)
{
	return dtype == OPD_f32 ? CPU_F32 : dtype == OPD_bf16 ? CPU_BF16 : dtype == OPD_f16 ? CPU_F16 : CPU_DTYPES;
}

/* Weights of a norm: none, of x's dtype, f32. */
enum { CPU_WEIGHT_NONE, CPU_WEIGHT_SAME, CPU_WEIGHT_F32, CPU_WEIGHTS };

/* x [count] · rsqrt(mean of squares + epsilon), times weight [count], to y [count]. streams: past the caches,
 * where results are aligned to 64 bytes. */
typedef void (*cpu_rms_norm_fn)(const void *x, const void *weight, void *y, size_t count, float epsilon, bool streams);

/* sum = x + residual, y = the norm of the unrounded sum. y may be x, sum may be residual. */
typedef void (*cpu_fused_add_rms_norm_fn)(const void *x, const void *residual, const void *weight, void *y, void *sum, size_t count,
                                          float epsilon, bool streams);

/* The functions of activations. */
enum { CPU_SIGMOID, CPU_SILU, CPU_RELU, CPU_RELU2, CPU_GELU, CPU_GELU_TANH, CPU_ACTIVATIONS };

/* y = f(x), or f(x) · other, [count] each. */
typedef void (*cpu_activation_fn)(const void *x, const void *other, void *y, size_t count);

typedef void (*cpu_softmax_fn)(const void *x, void *y, size_t count);

/* linear adds products in blocks of so many k: inside a block in VEC_LANES chains, the blocks' sums one after another. That order is
 * the same on every way through linear.c. */
#define CPU_LINEAR_BLOCK 1024

/* sums[n] = x [k] · row n of weight, for n < columns; stride in elements between rows of weight. */
typedef void (*cpu_linear_dots_fn)(const void *x, const void *weight, int64_t stride, size_t k, size_t columns, float *sums);

/* `count` elements (at most CPU_LINEAR_BLOCK) to f32, followed by zeros up to `padded`, a multiple of 16. */
typedef void (*cpu_linear_pack_fn)(const void *source, size_t count, size_t padded, float *packed);

/* y[n] = sums[n] + bias[n], rounded; bias may be NULL. */
typedef void (*cpu_linear_finish_fn)(const float *sums, const void *bias, void *y, size_t count);

/* Attention: query rows that share a pass over keys, and keys of one step of that pass. */
#define CPU_ATTEND_ROWS 32
#define CPU_ATTEND_KEYS 64

/* Rows of a cache: row j lies at base + places[j]. `ahead` places are known, `count` are meant; memory is asked for `lookahead` rows early. */
struct cpu_attend_run {
	const unsigned char *base;
	const uint64_t *places;
	size_t count; /* at most CPU_ATTEND_KEYS */
	size_t ahead;
	size_t lookahead;
};

/* A softmax whose scores come step by step: Σ e^(score − maximum). */
struct cpu_attend_row {
	float maximum;
	float sum;
};

/* Heads of one token: `elements` in all, of which each head's first 2·half turn. */
struct cpu_rotary {
	size_t elements, head_size, half;
};

/* cos_sin: half cosines, then half sines. to may be from. */
typedef void (*cpu_rotary_fn)(const void *from, const void *cos_sin, void *to, const struct cpu_rotary *shape);

/* Index of the greatest of x [count], 1 to 2^31 − 1: the first of equals, the first NaN before all. */
typedef size_t (*cpu_argmax_fn)(const void *x, size_t count);

struct cpu_position_kernels {
	cpu_rotary_fn rotary[CPU_DTYPES][2][2]; /* [cos_sin of the heads' dtype, f32][neighbours are pairs, halves are] */
	cpu_argmax_fn argmax[CPU_DTYPES];
};

struct cpu_norm_kernels {
	cpu_rms_norm_fn rms_norm[CPU_DTYPES][CPU_WEIGHTS];
	cpu_fused_add_rms_norm_fn fused_add_rms_norm[CPU_DTYPES][CPU_WEIGHTS];
};

struct cpu_activation_kernels {
	cpu_activation_fn alone[CPU_ACTIVATIONS][CPU_DTYPES]; /* other isn't looked at */
	cpu_activation_fn times[CPU_ACTIVATIONS][CPU_DTYPES];
};

struct cpu_softmax_kernels {
	cpu_softmax_fn softmax[CPU_DTYPES];
};

struct cpu_linear_kernels {
	size_t tile_rows;
	size_t tile_columns;
	cpu_linear_dots_fn dots[CPU_DTYPES];
	cpu_linear_pack_fn pack[CPU_DTYPES];
	cpu_linear_finish_fn finish[CPU_DTYPES];
	/* sums[m·stride + n] += x row m · weight row n over one packed block, for the whole tile. Rows are `padded` floats apart. */
	void (*tile)(const float *x, const float *weight, size_t padded, float *sums, size_t stride);
};

/* f32 rows of queries and mixed values are `padded` floats apart: the head size rounded up to whole vectors, zeros behind it. Scores and weights
 * of a row are CPU_ATTEND_KEYS floats. Kernels of a dtype read whole vectors: head sizes that aren't go through pack. */
struct cpu_attend_kernels {
	size_t lanes;
	/* to[j] = row j of the run. */
	void (*pack[CPU_DTYPES])(const struct cpu_attend_run *run, size_t head_size, size_t padded, float *to);
	/* scores[r][j] = query r · key j. */
	void (*scores[CPU_DTYPES])(const float *query, size_t rows, size_t padded, const struct cpu_attend_run *run, float *scores);
	/* The same for `heads` heads, whose keys lie head_bytes apart, of `rows` rows each: keys in the order of memory. Row r of head h is row h·rows + r. */
	void (*scores_heads[CPU_DTYPES])(const float *query, size_t heads, size_t rows, size_t padded, const struct cpu_attend_run *run,
	                                 uint64_t head_bytes, float *scores);
	/* One row's scores, times scale, to weights e^(score − maximum); maximum and sum go on. Returns what older weights shrink by. */
	float (*weigh)(float *scores, size_t count, float scale, float *maximum, float *sum);
	/* mixed[r] = mixed[r] · shrinks[r] + Σ weights[r][j] · value j. */
	void (*mix[CPU_DTYPES])(const float *weights, const float *shrinks, size_t rows, size_t padded, const struct cpu_attend_run *run,
	                        float *mixed);
	void (*mix_heads[CPU_DTYPES])(const float *weights, const float *shrinks, size_t heads, size_t rows, size_t padded,
	                              const struct cpu_attend_run *run, uint64_t head_bytes, float *mixed);
	/* Joins a part's softmax and mixed values to a row's. */
	void (*merge)(struct cpu_attend_row *row, float *mixed, const struct cpu_attend_row *part, const float *part_mixed, size_t padded);
	/* y = mixed / sum, rounded. */
	void (*finish[CPU_DTYPES])(const float *mixed, float sum, void *y, size_t head_size);
};

/* Thousandths of a nanosecond an element of the work's longer operand, and nanoseconds a call, on one thread. */
struct cpu_cost {
	uint32_t call_ns;
	uint32_t element_ps[CPU_DTYPES];
};

struct cpu_costs {
	struct cpu_cost rms_norm;           /* elements of x; for relu and relu2 too */
	struct cpu_cost fused_add_rms_norm; /* elements of x */
	struct cpu_cost silu_and_mul;       /* elements of y; for every activation with an exponential */
	struct cpu_cost softmax;            /* elements of x */
	struct cpu_cost linear_weight;      /* elements of weight, read once */
	uint32_t linear_product_fs;         /* femtoseconds a product */
	struct cpu_cost attend_cache;       /* elements of keys and values, read once */
	struct cpu_cost rotary;             /* elements of query and key */
	struct cpu_cost argmax;             /* elements of x */
	uint32_t attend_product_fs;         /* femtoseconds a product of a score or a result */
};

struct cpu_kernels {
	const char *isa; /* "baseline", "avx2", "avx512" */
	const struct cpu_norm_kernels *norm;
	const struct cpu_activation_kernels *activation;
	const struct cpu_softmax_kernels *softmax;
	const struct cpu_linear_kernels *linear;
	const struct cpu_attend_kernels *attend;
	const struct cpu_position_kernels *position;
	struct cpu_costs costs;
};

/* In a kernel file: the name of what it exports, with its instruction set's at the end. */
#ifdef CPU_ISA
#define CPU_JOIN(name, isa) name##_##isa
#define CPU_JOIN_EXPANDED(name, isa) CPU_JOIN(name, isa)
#define CPU_SYMBOL(name) CPU_JOIN_EXPANDED(name, CPU_ISA)
#endif

/* X(isa): what this build has, slowest first. */
#if defined(__x86_64__)
#define CPU_ISA_MAP(X) X(baseline) X(avx2) X(avx512)
#else
#define CPU_ISA_MAP(X) X(baseline)
#endif

#define X(isa)                                                    \
	extern const struct cpu_norm_kernels cpu_norm_##isa;             \
	extern const struct cpu_activation_kernels cpu_activation_##isa; \
	extern const struct cpu_softmax_kernels cpu_softmax_##isa;       \
	extern const struct cpu_linear_kernels cpu_linear_##isa;         \
	extern const struct cpu_attend_kernels cpu_attend_##isa;         \
	extern const struct cpu_position_kernels cpu_position_##isa;
CPU_ISA_MAP(X)
#undef X

#endif
