/* softmax along another dimension than the last, a tile of neighbouring columns at a time: compiled once for each instruction set (kernels.h). A column is a lane,
 * whose additions follow one another: its bits don't depend on its neighbours. */
#include <math.h>

#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_f8.h"

#define VECTORS 4

VEC_INLINE size_t columns_here(size_t columns, size_t at)
{
	return columns - at < VEC_LANES ? columns - at : VEC_LANES;
}

/* Columns [0, columns), at most VECTORS vectors of them. NaN is missed by the maximum and shows in the sum. */
VEC_INLINE void softmax_columns(opd_dtype dtype, const struct cpu_columns *tile, const unsigned char *x, unsigned char *y, size_t columns)
{
	const size_t vectors = (columns + VEC_LANES - 1) / VEC_LANES;
	vec_f32 highest[VECTORS], sums[VECTORS];
	for (size_t v = 0; v < vectors; v++) {
		highest[v] = vec_splat(-INFINITY);
		sums[v] = vec_splat(0.0f);
	}
	for (size_t e = 0; e < tile->extent; e++)
		for (size_t v = 0; v < vectors; v++)
			highest[v] = vec_max(vec_load_some(dtype, x + e * tile->x_step, v * VEC_LANES, columns_here(columns, v * VEC_LANES)), highest[v]);
	for (size_t e = 0; e < tile->extent; e++)
		for (size_t v = 0; v < vectors; v++)
			sums[v] = sums[v] + vec_exp(vec_load_some(dtype, x + e * tile->x_step, v * VEC_LANES, columns_here(columns, v * VEC_LANES)) -
			                            highest[v]);
	for (size_t v = 0; v < vectors; v++)
		sums[v] = vec_splat(1.0f) / sums[v];
	for (size_t e = 0; e < tile->extent; e++)
		for (size_t v = 0; v < vectors; v++) {
			size_t here = columns_here(columns, v * VEC_LANES);
			vec_f32 power = vec_exp(vec_load_some(dtype, x + e * tile->x_step, v * VEC_LANES, here) - highest[v]);
			vec_store_some(dtype, y + e * tile->y_step, v * VEC_LANES, here, power * sums[v]);
		}
}

VEC_INLINE void softmax_tile(opd_dtype dtype, const struct cpu_columns *tile)
{
	const size_t bytes = opd_dtype_bytes(dtype);
	for (size_t at = 0; at < tile->columns; at += VECTORS * VEC_LANES) {
		size_t here = tile->columns - at < VECTORS * VEC_LANES ? tile->columns - at : VECTORS * VEC_LANES;
		softmax_columns(dtype, tile, (const unsigned char *)tile->x + at * bytes, (unsigned char *)tile->y + at * bytes, here);
	}
}

#define X(name)                                                           \
	static void softmax_##name(const struct cpu_columns *tile)            \
	{                                                                     \
		softmax_tile(OPD_##name, tile);                                   \
	}
X(f32)
X(bf16)
X(f16)
#undef X

const struct cpu_columns_kernels CPU_SYMBOL(cpu_columns) = {
	.softmax = {softmax_f32, softmax_bf16, softmax_f16},
};
