/* The ops of f64 that are made of sums, exponentials and turns: plain loops, which the compiler makes vectors of; compiled once for each instruction set (kernels.h).
 *
 * Nobody serves a model in f64: these are for references and for what comes with f64 operands by itself, so that it isn't `native`'s definition that runs then. All is computed in f64; sums have
 * one order for every row. Results go through the caches whatever `reach` or `streams` says. Every NaN is the same one: which of two an operation hands on depends on the order of operands, and that on
 * whether an element falls into a vector. */
#include <math.h>
#include <string.h>

#include "providers/cpu/kernels.h"

/* Independent chains of a sum: an element's is its index modulo so many. */
#define CHAINS 16

static inline double f64_one_nan(double value)
{
	return value != value ? (double)NAN : value;
}

static inline double f64_fold(const double *chains)
{
	double sums[CHAINS];
	memcpy(sums, chains, sizeof sums);
	for (size_t width = CHAINS / 2; width > 0; width /= 2)
		for (size_t i = 0; i < width; i++)
			sums[i] += sums[i + width];
	return sums[0];
}

/* Σ of `expression`, in which `i` is an element's index, over [0, count). */
#define F64_SUM(result, count, expression)                          \
	do {                                                            \
		double chains_[CHAINS] = {0};                               \
		size_t base_ = 0;                                           \
		for (; base_ + CHAINS <= (count); base_ += CHAINS)          \
			for (size_t c_ = 0; c_ < CHAINS; c_++) {                \
				const size_t i = base_ + c_;                        \
				chains_[c_] += (expression);                        \
			}                                                       \
		for (size_t i = base_; i < (count); i++)                    \
			chains_[i - base_] += (expression);                     \
		(result) = f64_fold(chains_);                               \
	} while (0)

/* e^x of any x, relative error under 2 ulp but where the result is denormal: e^-inf is 0, overflow is +inf, NaN stays.
 * x = n·ln 2 + r with |r| ≤ ln 2 / 2; e^r by its Taylor series to r^13 / 13!, whose rest is 4e-18. ln 2 is split in two, the first part short, so that n·first is exact. */
static inline double f64_exp(double x)
{
	const double magic = 0x1.8p52; /* adding it rounds to a whole number, which ends up in the low bits */
	x = x < -746.0 ? -746.0 : x;
	x = x > 710.0 ? 710.0 : x;
	const double shifted = x * 0x1.71547652b82fep+0 + magic;
	const double n = shifted - magic;
	const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
	double p = 1.0 / 6227020800;
	p = p * r + 1.0 / 479001600;
	p = p * r + 1.0 / 39916800;
	p = p * r + 1.0 / 3628800;
	p = p * r + 1.0 / 362880;
	p = p * r + 1.0 / 40320;
	p = p * r + 1.0 / 5040;
	p = p * r + 1.0 / 720;
	p = p * r + 1.0 / 120;
	p = p * r + 1.0 / 24;
	p = p * r + 1.0 / 6;
	p = p * r + 0.5;
	p = p * r + 1.0;
	p = p * r + 1.0;
	/* 2^n in two steps: it is no normal number itself where the result is denormal or near the largest. */
	uint64_t bits, first, second;
	memcpy(&bits, &shifted, sizeof bits);
	bits = bits - 0x4338000000000000u + 2046;
	first = (bits >> 1) << 52;
	second = (bits - (bits >> 1)) << 52;
	double a, b;
	memcpy(&a, &first, sizeof a);
	memcpy(&b, &second, sizeof b);
	return p * a * b;
}

/* Element of a vector of f64 or f32: f32 is a constant of the caller. */
static inline double f64_at(const void *vector, bool f32, size_t i)
{
	return f32 ? (double)((const float *)vector)[i] : ((const double *)vector)[i];
}

/* ---- rms_norm, fused_add_rms_norm --------------------------------------------------------------------------------------- */

/* weights: a constant of the caller. y may be x, sum the residual: an element is read before it is written. */
static inline __attribute__((always_inline)) void norm_row(const struct cpu_norm *norm, unsigned weights, bool fused)
{
	const double *x = norm->x, *residual = norm->residual;
	double *y = norm->y, *sum = norm->sum;
	double squares;
	F64_SUM(squares, norm->squares, (x[i] + (fused ? residual[i] : 0.0)) * (x[i] + (fused ? residual[i] : 0.0)));
	const double factor = 1 / sqrt(squares / (double)norm->squares + norm->epsilon);
	for (size_t i = 0; i < norm->count; i++) {
		const double s = fused ? x[i] + residual[i] : x[i];
		double v = s * factor;
		if (weights != CPU_WEIGHT_NONE)
			v *= f64_at(norm->weight, weights == CPU_WEIGHT_F32, i);
		if (fused)
			sum[i] = f64_one_nan(s);
		y[i] = f64_one_nan(v);
	}
}

#define NORM(name, weights)                                    \
	static void rms_norm_##name(const struct cpu_norm *norm)   \
	{                                                          \
		norm_row(norm, weights, false);                        \
	}                                                          \
	static void fused_##name(const struct cpu_norm *norm)      \
	{                                                          \
		norm_row(norm, weights, true);                         \
	}
NORM(none, CPU_WEIGHT_NONE)
NORM(same, CPU_WEIGHT_SAME)
NORM(f32, CPU_WEIGHT_F32)

/* ---- layer_norm ------------------------------------------------------------------------------------------------------------ */

static double f64_mean(const double *x, size_t count)
{
	double sum;
	F64_SUM(sum, count, x[i]);
	return sum / (double)count;
}

static double f64_variance(const double *x, size_t count, double mean)
{
	double sum;
	F64_SUM(sum, count, (x[i] - mean) * (x[i] - mean));
	return sum / (double)count;
}

static inline __attribute__((always_inline)) void layer_norm_row(const struct cpu_layer_norm *norm, bool f32_weight, bool f32_bias)
{
	const double *x = norm->x;
	double *y = norm->y;
	const double mean = f64_mean(x, norm->count);
	const double factor = 1 / sqrt(f64_variance(x, norm->count, mean) + norm->epsilon);
	for (size_t i = 0; i < norm->count; i++) {
		double v = (x[i] - mean) * factor;
		if (norm->weight != NULL)
			v *= f64_at(norm->weight, f32_weight, i);
		if (norm->bias != NULL)
			v += f64_at(norm->bias, f32_bias, i);
		y[i] = f64_one_nan(v);
	}
}

#define LAYER_NORM(name, f32_weight, f32_bias)                            \
	static void layer_norm_##name(const struct cpu_layer_norm *norm)      \
	{                                                                     \
		layer_norm_row(norm, f32_weight, f32_bias);                       \
	}
LAYER_NORM(f64_f64, false, false)
LAYER_NORM(f64_f32, false, true)
LAYER_NORM(f32_f64, true, false)
LAYER_NORM(f32_f32, true, true)

/* ---- Activations --------------------------------------------------------------------------------------------------------- */

static inline double sigmoid_of(double x)
{
	return 1 / (1 + f64_exp(-x));
}

static inline double silu_of(double x)
{
	return x / (1 + f64_exp(-x));
}

static inline double relu_of(double x)
{
	return x <= 0 ? 0 : x;
}

static inline double relu2_of(double x)
{
	return relu_of(x) * relu_of(x);
}

/* erfc is the C library's, element by element. */
static inline double gelu_of(double x)
{
	return 0.5 * x * erfc(-x * M_SQRT1_2);
}

/* (1 + tanh u)/2 is the sigmoid of 2u. */
static inline double gelu_tanh_of(double x)
{
	return x / (1 + f64_exp(-2 * M_2_SQRTPI * M_SQRT1_2 * (x + 0.044715 * x * x * x)));
}

#define ACTIVATION(function)                                                                             \
	static void function##_alone(const void *x, const void *other, void *y, size_t count, enum cpu_reach reach)  \
	{                                                                                                    \
		(void)other, (void)reach;                                                                        \
		const double *restrict from = x;                                                                 \
		double *restrict to = y;                                                                         \
		for (size_t i = 0; i < count; i++)                                                               \
			to[i] = f64_one_nan(function##_of(from[i]));                                                 \
	}                                                                                                    \
	static void function##_times(const void *x, const void *other, void *y, size_t count, enum cpu_reach reach)  \
	{                                                                                                    \
		(void)reach;                                                                                     \
		const double *restrict from = x, *restrict factor = other;                                       \
		double *restrict to = y;                                                                         \
		for (size_t i = 0; i < count; i++)                                                               \
			to[i] = f64_one_nan(function##_of(from[i]) * factor[i]);                                     \
	}
ACTIVATION(sigmoid)
ACTIVATION(silu)
ACTIVATION(relu)
ACTIVATION(relu2)
ACTIVATION(gelu)
ACTIVATION(gelu_tanh)

/* ---- softmax -------------------------------------------------------------------------------------------------------------- */

/* Misses NaN: it then shows in the sum, and so in every element. */
static double softmax_highest(const double *x, size_t count)
{
	double chains[CHAINS], highest = -INFINITY;
	for (size_t c = 0; c < CHAINS; c++)
		chains[c] = -INFINITY;
	size_t base = 0;
	for (; base + CHAINS <= count; base += CHAINS)
		for (size_t c = 0; c < CHAINS; c++)
			chains[c] = x[base + c] > chains[c] ? x[base + c] : chains[c];
	for (; base < count; base++)
		highest = x[base] > highest ? x[base] : highest;
	for (size_t c = 0; c < CHAINS; c++)
		highest = chains[c] > highest ? chains[c] : highest;
	return highest;
}

static void softmax_row(const void *x, const void *next, void *y, size_t count, float *kept)
{
	(void)next, (void)kept;
	const double *restrict from = x;
	double *restrict to = y;
	const double highest = softmax_highest(from, count);
	double sum;
	for (size_t i = 0; i < count; i++)
		to[i] = f64_exp(from[i] - highest);
	F64_SUM(sum, count, to[i]);
	const double scale = 1 / sum;
	for (size_t i = 0; i < count; i++)
		to[i] = f64_one_nan(to[i] * scale);
}

/* Columns that go down together. */
#define COLUMNS 32

static void softmax_columns_part(const struct cpu_columns *tile, const unsigned char *x, unsigned char *y, size_t columns)
{
	double highest[COLUMNS], sums[COLUMNS] = {0};
	for (size_t c = 0; c < columns; c++)
		highest[c] = -INFINITY;
	for (size_t e = 0; e < tile->extent; e++) {
		const double *from = (const double *)(const void *)(x + e * tile->x_step);
		for (size_t c = 0; c < columns; c++)
			highest[c] = from[c] > highest[c] ? from[c] : highest[c];
	}
	for (size_t e = 0; e < tile->extent; e++) {
		const double *restrict from = (const double *)(const void *)(x + e * tile->x_step);
		double *restrict to = (double *)(void *)(y + e * tile->y_step);
		for (size_t c = 0; c < columns; c++) {
			to[c] = f64_exp(from[c] - highest[c]);
			sums[c] += to[c];
		}
	}
	for (size_t c = 0; c < columns; c++)
		sums[c] = 1 / sums[c];
	for (size_t e = 0; e < tile->extent; e++) {
		double *to = (double *)(void *)(y + e * tile->y_step);
		for (size_t c = 0; c < columns; c++)
			to[c] = f64_one_nan(to[c] * sums[c]);
	}
}

/* A column's additions follow one another: its bits don't depend on its neighbours. */
static void softmax_columns(const struct cpu_columns *tile)
{
	for (size_t at = 0; at < tile->columns; at += COLUMNS) {
		const size_t here = tile->columns - at < COLUMNS ? tile->columns - at : COLUMNS;
		softmax_columns_part(tile, (const unsigned char *)tile->x + at * sizeof(double), (unsigned char *)tile->y + at * sizeof(double), here);
	}
}

/* ---- rotary_embedding ------------------------------------------------------------------------------------------------------ */

/* Pairs i with i + half (neox), else 2i with 2i + 1: both are read before either is written, so `to` may be `from`. */
static inline __attribute__((always_inline)) void rotary_token(const double *from, const void *cos_sin, double *to, const struct cpu_rotary *shape, bool f32, bool neox)
{
	const size_t half = shape->half, rest = shape->head_size - 2 * half, apart = neox ? half : 1, step = neox ? 1 : 2;
	for (size_t head = 0; head < shape->elements; head += shape->head_size) {
		for (size_t i = 0; i < half; i++) {
			const double cosine = f64_at(cos_sin, f32, i), sine = f64_at(cos_sin, f32, half + i);
			const double a = from[head + step * i], b = from[head + step * i + apart];
			to[head + step * i] = f64_one_nan(a * cosine - b * sine);
			to[head + step * i + apart] = f64_one_nan(b * cosine + a * sine);
		}
		if (rest > 0 && from != to)
			memcpy(to + head + 2 * half, from + head + 2 * half, rest * sizeof(double));
	}
}

#define ROTARY(name, f32, neox)                                                                                            \
	static void rotary_##name(const void *from, const void *cos_sin, void *to, const struct cpu_rotary *shape)             \
	{                                                                                                                      \
		rotary_token(from, cos_sin, to, shape, f32, neox);                                                                 \
	}
ROTARY(pairs_f64, false, false)
ROTARY(neox_f64, false, true)
ROTARY(pairs_f32, true, false)
ROTARY(neox_f32, true, true)

#define ALL(form) {sigmoid_##form, silu_##form, relu_##form, relu2_##form, gelu_##form, gelu_tanh_##form}

const struct cpu_f64_kernels CPU_SYMBOL(cpu_f64) = {
	.rms_norm = {rms_norm_none, rms_norm_same, rms_norm_f32},
	.fused_add_rms_norm = {fused_none, fused_same, fused_f32},
	.layer_norm = {{layer_norm_f64_f64, layer_norm_f64_f32}, {layer_norm_f32_f64, layer_norm_f32_f32}},
	.alone = ALL(alone),
	.times = ALL(times),
	.softmax = softmax_row,
	.softmax_columns = softmax_columns,
	.rotary = {{rotary_pairs_f64, rotary_neox_f64}, {rotary_pairs_f32, rotary_neox_f32}},
};
