/* What all kernels share: how elements are read and written. DTYPE: 0 f32, 1 f16, 2 bf16. Arithmetic is f32, each result is rounded once. */
#pragma OPENCL FP_CONTRACT OFF

float bf16_read(ushort bits)
{
	return as_float((uint)bits << 16);
}

ushort bf16_round(float value)
{
	uint bits = as_uint(value);
	if (isnan(value))
		return (ushort)(bits >> 16 | 0x40);
	return (ushort)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if DTYPE == 0
typedef float T;
#define READ(p, i) ((p)[i])
#define WRITE(p, i, v) ((p)[i] = (v))
#define ROUND(v) (v)
#elif DTYPE == 1
typedef half T;
#define READ(p, i) vload_half((size_t)(i), p)
#define WRITE(p, i, v) vstore_half_rte(v, (size_t)(i), p)
float half_round(float value)
{
	ushort bits;
	vstore_half_rte(value, 0, (half *)&bits);
	return vload_half(0, (const half *)&bits);
}
#define ROUND(v) half_round(v)
#else
typedef ushort T;
#define READ(p, i) bf16_read((p)[i])
#define WRITE(p, i, v) ((p)[i] = bf16_round(v))
#define ROUND(v) bf16_read(bf16_round(v))
#endif

/* As it is, bit for bit. */
#if DTYPE == 0
#define COPY(to, i, from, j) ((to)[i] = (from)[j])
#else
#define COPY(to, i, from, j) (((global ushort *)(to))[i] = ((global const ushort *)(from))[j])
#endif

/* A weight is of the call's dtype, or f32. */
#define READ_WEIGHT(p, i, wide) ((wide) ? ((const global float *)(p))[i] : READ(p, i))

/* Over a work group; every item gets it. `part` has an element an item. */
float group_sum(local float *part, float mine)
{
	const size_t item = get_local_id(0);
	barrier(CLK_LOCAL_MEM_FENCE);
	part[item] = mine;
	for (size_t width = get_local_size(0) / 2; width > 0; width /= 2) {
		barrier(CLK_LOCAL_MEM_FENCE);
		if (item < width)
			part[item] += part[item + width];
	}
	barrier(CLK_LOCAL_MEM_FENCE);
	return part[0];
}

float group_max(local float *part, float mine)
{
	const size_t item = get_local_id(0);
	barrier(CLK_LOCAL_MEM_FENCE);
	part[item] = mine;
	for (size_t width = get_local_size(0) / 2; width > 0; width /= 2) {
		barrier(CLK_LOCAL_MEM_FENCE);
		if (item < width)
			part[item] = fmax(part[item], part[item + width]);
	}
	barrier(CLK_LOCAL_MEM_FENCE);
	return part[0];
}
