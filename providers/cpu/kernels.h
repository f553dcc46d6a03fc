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

/* f64 has a table of its own (struct cpu_f64_kernels), and costs among the others'. */
enum { CPU_F32, CPU_BF16, CPU_F16, CPU_DTYPES, CPU_F64 = CPU_DTYPES, CPU_COSTS };

/* Index into the tables below; CPU_DTYPES for a dtype that has no kernels there. */
static inline unsigned cpu_dtype_index(opd_dtype dtype)
{
	return dtype == OPD_f32 ? CPU_F32 : dtype == OPD_bf16 ? CPU_BF16 : dtype == OPD_f16 ? CPU_F16 : CPU_DTYPES;
}

/* Weights of a norm: none, of x's dtype, f32. */
enum { CPU_WEIGHT_NONE, CPU_WEIGHT_SAME, CPU_WEIGHT_F32, CPU_WEIGHTS };

/* One row of a norm: y = x · rsqrt(mean of its first `squares` elements' squares + epsilon), times weight. Of fused_add_rms_norm sum = x + residual, y the norm of the unrounded sum; y
 * may be x, sum may be residual. x_next, residual_next: rows that are read next (or the same again). streams: results go past the caches, where they are aligned to 64 bytes. */
struct cpu_norm {
	const void *x, *x_next;
	const void *residual, *residual_next;
	const void *weight;
	void *y, *sum;
	size_t count, squares;
	double epsilon;
	bool streams;
};
typedef void (*cpu_norm_fn)(const struct cpu_norm *norm);

/* The functions of activations. */
enum { CPU_SIGMOID, CPU_SILU, CPU_RELU, CPU_RELU2, CPU_GELU, CPU_GELU_TANH, CPU_ACTIVATIONS };

/* How single passes go through memory: through the caches; results past the caches, where they begin at a whole line of 64 bytes; and with operands asked for well before they are needed, too. */
enum cpu_reach { CPU_NEAR, CPU_PAST, CPU_PAST_AHEAD };

/* y = f(x), or f(x) · other, [count] each. */
typedef void (*cpu_activation_fn)(const void *x, const void *other, void *y, size_t count, enum cpu_reach reach);

/* next: the row that is read next (or x again). kept [count], or NULL: y, which begins at a whole line, goes past the caches, and powers are kept there meanwhile. */
typedef void (*cpu_softmax_fn)(const void *x, const void *next, void *y, size_t count, float *kept);

/* linear adds products in blocks of so many k: inside a block in VEC_LANES chains, the blocks' sums one after another. That order is
 * the same on every way through linear.c. */
#define CPU_LINEAR_BLOCK 1024

/* sums[n] = x [k] · row n of weight, for n < columns; stride in elements between rows of weight. ahead: weight comes from memory, and is asked for before it is needed. */
typedef void (*cpu_linear_dots_fn)(const void *x, const void *weight, int64_t stride, size_t k, size_t columns, bool ahead, float *sums);

/* bf16 by products of pairs: sums[m·sums_stride + n] = row x[m] · weight row n, m < rows (at most CPU_LINEAR_PAIR_ROWS), n < columns, weight rows `stride` elements apart. Each sum is one chain over k, folded as vec_sum does, whatever
 * rows and columns are beside it. Denormals count as zero. ahead: memory is asked for what follows in each row of weight. */
enum { CPU_LINEAR_PAIR_ROWS = 4 };
typedef void (*cpu_linear_pairs_fn)(const void *const *x, size_t rows, const void *weight, int64_t stride, size_t columns, size_t k, bool ahead, float *sums,
                                    size_t sums_stride);

/* `count` elements (at most CPU_LINEAR_BLOCK) to f32, followed by zeros up to `padded`, a multiple of 16. */
typedef void (*cpu_linear_pack_fn)(const void *source, size_t count, size_t padded, float *packed);

/* y[n] = sums[n] + bias[n], rounded; bias may be NULL. */
typedef void (*cpu_linear_finish_fn)(const float *sums, const void *bias, void *y, size_t count);

/* Attention: query rows that share a pass over keys, and keys of one step of that pass. */
#define CPU_ATTEND_ROWS 32
#define CPU_ATTEND_KEYS 64

/* Rows of a cache: row j lies at the address base + places[j]. Behind the run's places are those of what is read after it: while row j is read, memory is asked for row j + lookahead. */
struct cpu_attend_run {
	uint64_t base;
	const uint64_t *places; /* [count + lookahead]; of kernels that don't ask, [count] */
	size_t count;           /* at most CPU_ATTEND_KEYS */
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

/* y[i] = a[i] op b[i]; a step of 0 repeats the first element, 1 goes on. */
enum { CPU_ADD, CPU_SUB, CPU_MUL, CPU_OPERATIONS };
typedef void (*cpu_arithmetic_fn)(const void *a, size_t a_step, const void *b, size_t b_step, void *y, size_t count, enum cpu_reach reach);

/* [operation][dtype's number]; NULL: none (bool). */
struct cpu_arithmetic_kernels {
	cpu_arithmetic_fn run[CPU_OPERATIONS][OPD_DTYPE_COUNT];
};

/* x [count] in another dtype, to y. */
typedef void (*cpu_cast_fn)(const void *x, void *y, size_t count, enum cpu_reach reach);

/* By dtypes' numbers, NULL where there is none. cast.c chains them. */
struct cpu_cast_kernels {
	cpu_cast_fn narrow[OPD_DTYPE_COUNT][OPD_DTYPE_COUNT]; /* [from][to]: f32, bf16, f16 and both f8 */
	cpu_cast_fn small_to_f32[OPD_DTYPE_COUNT];            /* bool and integers of up to 16 bits: exact */
	cpu_cast_fn to_i64[OPD_DTYPE_COUNT];
	cpu_cast_fn from_i64[OPD_DTYPE_COUNT];
	cpu_cast_fn from_f32[OPD_DTYPE_COUNT];
	cpu_cast_fn from_f64[OPD_DTYPE_COUNT];
	cpu_cast_fn odd[OPD_DTYPE_COUNT]; /* i64 and f64 to f32, rounded to odd */
};

struct cpu_quant_kernels {
	float (*largest[CPU_DTYPES])(const void *x, size_t count);                      /* magnitude; NaN is passed over, of nothing 0 */
	void (*scale[CPU_DTYPES])(const void *x, void *y, size_t count, float factor); /* x·factor to f8_e4m3fn */
};

/* One row of layer_norm; weight, bias: NULL for none. */
struct cpu_layer_norm {
	const void *x;
	const void *next; /* the row that is read next (or x again) */
	const void *weight;
	const void *bias;
	void *y;
	size_t count;
	double epsilon;
	bool streams; /* y goes past the caches: its rows begin at whole lines */
};
typedef void (*cpu_layer_norm_fn)(const struct cpu_layer_norm *norm);

/* mean + multiplier·standard deviation of x [count], each step rounded to its dtype. */
typedef float (*cpu_cutoff_fn)(const void *x, size_t count, float multiplier);

/* y = relu of x − cutoff, rounded. */
typedef void (*cpu_gate_fn)(const void *x, void *y, size_t count, float cutoff);

struct cpu_moments_kernels {
	cpu_layer_norm_fn layer_norm[CPU_DTYPES][2][2]; /* [weight is f32 and x isn't][bias is f32 and x isn't] */
	cpu_cutoff_fn cutoff[CPU_DTYPES];
	cpu_gate_fn gate[CPU_DTYPES];
};

/* matmul adds products in blocks of so many k: inside a block in one chain, the blocks' sums one after another. */
#define CPU_MATMUL_BLOCK 512
/* Columns that one row may have at a time. */
#define CPU_MATMUL_COLUMNS 512

struct cpu_matmul_kernels {
	size_t tile_rows;
	size_t tile_columns;
	/* sums[m·stride + n] += Σ a[m·a_lead + k] · b[k·b_lead + n] over k < depth, one block, for the whole tile. */
	void (*tile)(const float *a, size_t a_lead, const float *b, size_t b_lead, size_t depth, float *sums, size_t stride);
	/* The same for one row a [depth] and b where it lies: row k at k·stride elements. */
	void (*row[CPU_DTYPES])(const float *a, const void *b, int64_t stride, size_t depth, size_t columns, float *sums);
};

/* sums[m·sums_stride + n] = a row m · b row n, of `depth` i8 each. */
struct cpu_scaled_bytes {
	const int8_t *a, *b;
	size_t a_stride, b_stride;
	size_t rows, columns, depth;
	int32_t *sums;
	size_t sums_stride;
};

/* y[n] = sums[n] · row_scale · column_scales[n] + bias[n], rounded. */
struct cpu_scaled_finish {
	const float *sums;
	float row_scale;
	const float *column_scales;
	bool scale_each; /* one a column, else one for all */
	const void *bias; /* of y's dtype; NULL: none */
	size_t count;
};

struct cpu_scaled_mm_kernels {
	void (*bytes)(const struct cpu_scaled_bytes *bytes);
	void (*convert)(const int32_t *sums, float *to, size_t count);
	void (*finish[CPU_DTYPES])(const struct cpu_scaled_finish *finish, void *y);
};

/* Neighbouring lines of `extent` elements; steps in bytes between the rows that hold one element of each. */
struct cpu_columns {
	const void *x;
	void *y;
	size_t x_step, y_step;
	size_t extent, columns;
};

struct cpu_columns_kernels {
	void (*softmax[CPU_DTYPES])(const struct cpu_columns *tile);
};

/* Keys of x [count] whose order is topk's. True when one is above `floor`. */
typedef bool (*cpu_keys_fn)(const void *x, size_t count, uint32_t floor, uint32_t *keys);

/* By dtype's number: of i64 and f64 the wide ones, of all others the narrow ones. */
struct cpu_topk_kernels {
	cpu_keys_fn keys[OPD_DTYPE_COUNT];
	void (*wide_keys[OPD_DTYPE_COUNT])(const void *x, size_t count, uint64_t *keys);
};

struct cpu_position_kernels {
	cpu_rotary_fn rotary[CPU_DTYPES][2][2]; /* [cos_sin of the heads' dtype, f32][neighbours are pairs, halves are] */
	cpu_argmax_fn argmax[CPU_DTYPES];
};

struct cpu_norm_kernels {
	cpu_norm_fn rms_norm[CPU_DTYPES][CPU_WEIGHTS];
	cpu_norm_fn fused_add_rms_norm[CPU_DTYPES][CPU_WEIGHTS];
};

struct cpu_activation_kernels {
	cpu_activation_fn alone[CPU_ACTIVATIONS][CPU_DTYPES]; /* other isn't looked at */
	cpu_activation_fn times[CPU_ACTIVATIONS][CPU_DTYPES];
};

struct cpu_softmax_kernels {
	cpu_softmax_fn softmax[CPU_DTYPES];
};

/* Of f64, whose weights, biases and cos_sin are f64 or f32. */
struct cpu_f64_kernels {
	cpu_norm_fn rms_norm[CPU_WEIGHTS];
	cpu_norm_fn fused_add_rms_norm[CPU_WEIGHTS];
	cpu_layer_norm_fn layer_norm[2][2]; /* [weight is f32][bias is f32] */
	cpu_activation_fn alone[CPU_ACTIVATIONS];
	cpu_activation_fn times[CPU_ACTIVATIONS];
	cpu_softmax_fn softmax;
	void (*softmax_columns)(const struct cpu_columns *tile);
	cpu_rotary_fn rotary[2][2]; /* [cos_sin is f32][neighbours are pairs, halves are] */
};

struct cpu_linear_kernels {
	size_t tile_rows;
	size_t tile_columns;
	cpu_linear_dots_fn dots[CPU_DTYPES];
	cpu_linear_pack_fn pack[CPU_DTYPES];
	cpu_linear_finish_fn finish[CPU_DTYPES];
	/* sums[m·stride + n] += x row m · weight row n over one packed block, for the whole tile. Rows are `padded` floats apart. */
	void (*tile)(const float *x, const float *weight, size_t padded, float *sums, size_t stride);
	cpu_linear_pairs_fn pairs; /* NULL: the processor has no products of pairs of bf16 */
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
	/* The same for rows and keys of bf16 whose head size is a multiple of 32, products of two elements at a time: another order of additions than `scores` has, and values below 2^-126
	 * count as 0 (not for rows of which pairs_lose says that it would show). heads is 1, or as above. NULL where the instruction set has none. */
	void (*scores_pairs)(const uint16_t *query, size_t heads, size_t rows, size_t head_size, const struct cpu_attend_run *run,
	                     uint64_t head_bytes, float *scores);
	/* Whether products of pairs would lose something of this row of bf16: a denormal element times a large key, or a key's denormals times elements above 2^60. There if scores_pairs is. */
	bool (*pairs_lose)(const uint16_t *query, size_t head_size);
	/* Scores of rows, `count` each, times scale, to weights e^(score − maximum); maxima and sums go on. shrinks[r]: what a row's older weights shrink by. */
	void (*weigh)(float *scores, size_t rows, size_t count, float scale, struct cpu_attend_row *state, float *shrinks);
	/* mixed[r] = mixed[r] · shrinks[r] + Σ weights[r][j] · value j. Of values of bf16, mixed has each whole 2·lanes elements as pairs: the even ones, then the odd ones. */
	void (*mix[CPU_DTYPES])(const float *weights, const float *shrinks, size_t rows, size_t padded, const struct cpu_attend_run *run,
	                        float *mixed);
	void (*mix_heads[CPU_DTYPES])(const float *weights, const float *shrinks, size_t heads, size_t rows, size_t padded,
	                              const struct cpu_attend_run *run, uint64_t head_bytes, float *mixed);
	/* Joins the softmax and the mixed values of rows, `part`, to those of the same rows, `to`. */
	void (*merge)(struct cpu_attend_row *to, float *mixed, const struct cpu_attend_row *part, const float *part_mixed, size_t rows, size_t padded);
	/* y = mixed / sum, rounded. pairs: mixed lies as mix leaves it for values of bf16. */
	void (*finish[CPU_DTYPES])(const float *mixed, float sum, bool pairs, void *y, size_t head_size);
};

/* Thousandths of a nanosecond an element of the work's longer operand, and nanoseconds a call, on one thread. Of f64 where the op has it. */
struct cpu_cost {
	uint32_t call_ns;
	uint32_t element_ps[CPU_COSTS];
};

/* The same by dtype's number. */
struct cpu_any_cost {
	uint32_t call_ns;
	uint32_t element_ps[OPD_DTYPE_COUNT];
};

struct cpu_costs {
	struct cpu_cost rms_norm;           /* elements of x */
	struct cpu_cost fused_add_rms_norm; /* elements of x */
	struct cpu_cost silu_and_mul;       /* elements of y; for every activation with one exponential and a quotient */
	struct cpu_cost gelu;               /* elements of y */
	struct cpu_cost softmax;            /* elements of x */
	struct cpu_cost linear_weight;      /* elements of weight, read once */
	uint32_t linear_product_fs;         /* femtoseconds a product */
	struct cpu_cost attend_cache;       /* elements of keys and values, read once */
	struct cpu_cost rotary;             /* elements of query and key */
	struct cpu_cost argmax;             /* elements of x */
	uint32_t attend_product_fs;         /* femtoseconds a product of a score or a result */
	struct cpu_any_cost arithmetic;     /* elements of the result */
	struct cpu_any_cost cast;           /* elements, of the dearer dtype of both */
	struct cpu_cost quant_largest;      /* elements of x */
	struct cpu_cost quant_scale;        /* elements of x */
	struct cpu_cost layer_norm;         /* elements of x */
	struct cpu_cost sparse;             /* elements of y */
	struct cpu_cost softmax_columns;    /* elements of x, along another dimension than the last */
	struct cpu_any_cost topk;           /* elements of x; for argmax of other dtypes, or along other dimensions, too */
	uint32_t topk_kept_ns;              /* nanoseconds a result */
	uint32_t matmul_product_fs;         /* femtoseconds a product */
	struct cpu_any_cost scaled_weight;  /* elements of b, read once */
	uint32_t scaled_i8_product_fs;      /* femtoseconds a product */
};

struct cpu_kernels {
	const char *isa; /* "baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16" */
	const struct cpu_norm_kernels *norm;
	const struct cpu_activation_kernels *activation;
	const struct cpu_softmax_kernels *softmax;
	const struct cpu_linear_kernels *linear;
	const struct cpu_attend_kernels *attend;
	const struct cpu_position_kernels *position;
	const struct cpu_arithmetic_kernels *arithmetic;
	const struct cpu_cast_kernels *cast;
	const struct cpu_quant_kernels *quant;
	const struct cpu_moments_kernels *moments;
	const struct cpu_topk_kernels *topk;
	const struct cpu_matmul_kernels *matmul;
	const struct cpu_scaled_mm_kernels *scaled_mm;
	const struct cpu_columns_kernels *columns;
	const struct cpu_f64_kernels *f64;
	struct cpu_costs costs;
};

/* In a kernel file: the name of what it exports, with its instruction set's at the end. */
#ifdef CPU_ISA
#define CPU_JOIN(name, isa) name##_##isa
#define CPU_JOIN_EXPANDED(name, isa) CPU_JOIN(name, isa)
#define CPU_SYMBOL(name) CPU_JOIN_EXPANDED(name, CPU_ISA)
#endif

/* X(isa): what this build has kernels of every family for, slowest first. */
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
	extern const struct cpu_position_kernels cpu_position_##isa;     \
	extern const struct cpu_arithmetic_kernels cpu_arithmetic_##isa; \
	extern const struct cpu_cast_kernels cpu_cast_##isa;             \
	extern const struct cpu_quant_kernels cpu_quant_##isa;           \
	extern const struct cpu_moments_kernels cpu_moments_##isa;       \
	extern const struct cpu_topk_kernels cpu_topk_##isa;             \
	extern const struct cpu_matmul_kernels cpu_matmul_##isa;         \
	extern const struct cpu_scaled_mm_kernels cpu_scaled_mm_##isa;   \
	extern const struct cpu_columns_kernels cpu_columns_##isa;       \
	extern const struct cpu_f64_kernels cpu_f64_##isa;
CPU_ISA_MAP(X)
#undef X
#if defined(__x86_64__)
extern const struct cpu_scaled_mm_kernels cpu_scaled_mm_avx512_vnni; /* all others are avx512's */
/* Those that gain by conversions and products of bf16; all others are avx512_vnni's. */
extern const struct cpu_norm_kernels cpu_norm_avx512_bf16;
extern const struct cpu_linear_kernels cpu_linear_avx512_bf16;
extern const struct cpu_activation_kernels cpu_activation_avx512_bf16;
extern const struct cpu_softmax_kernels cpu_softmax_avx512_bf16;
extern const struct cpu_attend_kernels cpu_attend_avx512_bf16;
extern const struct cpu_arithmetic_kernels cpu_arithmetic_avx512_bf16;
extern const struct cpu_moments_kernels cpu_moments_avx512_bf16;
#endif

#endif
