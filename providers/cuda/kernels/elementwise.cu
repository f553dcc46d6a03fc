/* add, sub, mul over broadcast operands, and cast: wide accesses for the usual dtypes side by side, one element a thread for the rest. */
#include "providers/cuda/kernels/common.cuh"

/* ---- Any layout: element `index` of y is at Σ coordinate·stride -------------------------------------------------------------------- */

static __device__ __forceinline__ int64_t offset_of(int64_t index, uint32_t rank, const int64_t *shape, const int64_t *strides)
{
	int64_t offset = 0;
	for (uint32_t i = rank; i-- > 0;) {
		offset += index % shape[i] * strides[i];
		index /= shape[i];
	}
	return offset;
}

static __device__ __forceinline__ float load_float(opd_dtype dtype, const void *from, int64_t at)
{
	switch (dtype) {
	case OPD_f16:
		return to_f32(((const __half *)from)[at]);
	case OPD_bf16:
		return to_f32(((const __nv_bfloat16 *)from)[at]);
	case OPD_f8_e4m3fn:
		return (float)((const __nv_fp8_e4m3 *)from)[at];
	case OPD_f8_e5m2:
		return (float)((const __nv_fp8_e5m2 *)from)[at];
	default:
		return ((const float *)from)[at];
	}
}

static __device__ __forceinline__ int64_t load_integer(opd_dtype dtype, const void *from, int64_t at)
{
	switch (dtype) {
	case OPD_bool:
		return ((const uint8_t *)from)[at] != 0;
	case OPD_u8:
		return ((const uint8_t *)from)[at];
	case OPD_i8:
		return ((const int8_t *)from)[at];
	case OPD_i16:
		return ((const int16_t *)from)[at];
	case OPD_i32:
		return ((const int32_t *)from)[at];
	default:
		return ((const int64_t *)from)[at];
	}
}

static __device__ __forceinline__ void store_integer(opd_dtype dtype, void *to, int64_t at, int64_t value)
{
	switch (dtype) {
	case OPD_bool:
		((uint8_t *)to)[at] = value != 0;
		break;
	case OPD_u8:
	case OPD_i8:
		((uint8_t *)to)[at] = (uint8_t)value;
		break;
	case OPD_i16:
		((uint16_t *)to)[at] = (uint16_t)value;
		break;
	case OPD_i32:
		((uint32_t *)to)[at] = (uint32_t)value;
		break;
	default:
		((int64_t *)to)[at] = value;
	}
}

/* Truncates and saturates to [low, high]; a NaN is 0. */
static __device__ __forceinline__ int64_t integer_of(double value, opd_dtype dtype)
{
	switch (dtype) {
	case OPD_bool:
		return value != 0; /* a NaN is true */
	case OPD_u8:
		return value != value ? 0 : (int64_t)fmin(fmax(trunc(value), 0.0), 255.0);
	case OPD_i8:
		return value != value ? 0 : (int64_t)fmin(fmax(trunc(value), -128.0), 127.0);
	case OPD_i16:
		return value != value ? 0 : (int64_t)fmin(fmax(trunc(value), -32768.0), 32767.0);
	case OPD_i32:
		return value != value ? 0 : (int64_t)fmin(fmax(trunc(value), -2147483648.0), 2147483647.0);
	default:
		return value != value ? 0 : __double2ll_rz(value); /* saturates */
	}
}

/* Rounded once. */
static __device__ __forceinline__ void store_number(opd_dtype dtype, void *to, int64_t at, double value)
{
	switch (dtype) {
	case OPD_f16:
		((__half *)to)[at] = __double2half(value);
		break;
	case OPD_bf16:
		((__nv_bfloat16 *)to)[at] = __double2bfloat16(value);
		break;
	case OPD_f32:
		((float *)to)[at] = __double2float_rn(value);
		break;
	case OPD_f64:
		((double *)to)[at] = value;
		break;
	case OPD_f8_e4m3fn:
		((uint8_t *)to)[at] = (uint8_t)__nv_cvt_double_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
		break;
	case OPD_f8_e5m2:
		((uint8_t *)to)[at] = (uint8_t)__nv_cvt_double_to_fp8(value, __NV_SATFINITE, __NV_E5M2);
		break;
	default:
		store_integer(dtype, to, at, integer_of(value, dtype));
	}
}

static __device__ __forceinline__ bool is_integer(opd_dtype dtype)
{
	return dtype == OPD_bool || dtype == OPD_u8 || dtype == OPD_i8 || dtype == OPD_i16 || dtype == OPD_i32 || dtype == OPD_i64;
}

static __device__ __forceinline__ double load_number(opd_dtype dtype, const void *from, int64_t at)
{
	return dtype == OPD_f64 ? ((const double *)from)[at] : (double)load_float(dtype, from, at);
}

/* ---- add, sub, mul ----------------------------------------------------------------------------------------------------------------- */

template <class V> static __device__ __forceinline__ V combined(enum cuda_arithmetic arithmetic, V a, V b)
{
	return arithmetic == CUDA_ADD ? a + b : arithmetic == CUDA_SUB ? a - b : a * b;
}

static __global__ void arithmetic_any(const __grid_constant__ cuda_arithmetic_call call)
{
	const int64_t step = (int64_t)gridDim.x * blockDim.x;
	for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < call.elements; i += step) {
		const int64_t a = offset_of(i, call.rank, call.shape, call.a_strides), b = offset_of(i, call.rank, call.shape, call.b_strides);
		if (is_integer(call.dtype))
			store_integer(call.dtype, call.y, i,
			              (int64_t)combined(call.arithmetic, (uint64_t)load_integer(call.dtype, call.a, a), (uint64_t)load_integer(call.dtype, call.b, b)));
		else if (call.dtype == OPD_f64)
			((double *)call.y)[i] = combined(call.arithmetic, ((const double *)call.a)[a], ((const double *)call.b)[b]);
		else /* in f32, which store_number rounds as it stands */
			store_number(call.dtype, call.y, i, (double)combined(call.arithmetic, load_float(call.dtype, call.a, a), load_float(call.dtype, call.b, b)));
	}
}

enum { UNROLL = 4 };

/* Both contiguous, in y's shape. */
template <class T> static __global__ void arithmetic_flat(const __grid_constant__ cuda_arithmetic_call call)
{
	constexpr int N = vec_of<T>;
	const int64_t vectors = call.elements / N, first = (int64_t)blockIdx.x * blockDim.x * UNROLL + threadIdx.x;
	pack<T, N> a[UNROLL], b[UNROLL];
#pragma unroll
	for (int u = 0; u < UNROLL; u++) {
		int64_t i = first + u * (int64_t)blockDim.x;
		if (i < vectors) {
			a[u] = load<N>((const T *)call.a + i * N);
			b[u] = load<N>((const T *)call.b + i * N);
		}
	}
#pragma unroll
	for (int u = 0; u < UNROLL; u++) {
		int64_t i = first + u * (int64_t)blockDim.x;
		if (i >= vectors)
			continue;
#pragma unroll
		for (int j = 0; j < N; j++)
			a[u].e[j] = from_f32<T>(combined(call.arithmetic, to_f32(a[u].e[j]), to_f32(b[u].e[j])));
		store((T *)call.y + i * N, a[u]);
	}
	/* What is left of the last vector. */
	if (blockIdx.x == 0 && threadIdx.x < call.elements % N) {
		int64_t i = vectors * N + threadIdx.x;
		((T *)call.y)[i] = from_f32<T>(combined(call.arithmetic, to_f32(((const T *)call.a)[i]), to_f32(((const T *)call.b)[i])));
	}
}

static unsigned grid_of(int64_t items, int64_t per_block, int64_t most)
{
	int64_t blocks = (items + per_block - 1) / per_block;
	return (unsigned)(blocks < 1 ? 1 : blocks > most ? most : blocks);
}

template <class T> static void flat_launch(const cuda_arithmetic_call *call, cudaStream_t stream)
{
	arithmetic_flat<T><<<grid_of(call->elements / vec_of<T>, 256 * UNROLL, INT32_MAX), 256, 0, stream>>>(*call);
}

/* Merged to one dimension of stride 1. */
static bool is_flat(uint32_t rank, const int64_t *strides)
{
	return rank == 0 || (rank == 1 && strides[0] == 1);
}

int cuda_arithmetic_launch(const struct cuda_arithmetic_call *call, cudaStream_t stream)
{
	bool flat = is_flat(call->rank, call->a_strides) && is_flat(call->rank, call->b_strides) && aligned16(call->a) && aligned16(call->b) && aligned16(call->y);
	if (flat && call->dtype == OPD_f32)
		flat_launch<float>(call, stream);
	else if (flat && call->dtype == OPD_f16)
		flat_launch<__half>(call, stream);
	else if (flat && call->dtype == OPD_bf16)
		flat_launch<__nv_bfloat16>(call, stream);
	else
		arithmetic_any<<<grid_of(call->elements, 256, 132 * 64), 256, 0, stream>>>(*call);
	return launched();
}

/* ---- cast --------------------------------------------------------------------------------------------------------------------------- */

static __global__ void cast_any(const __grid_constant__ cuda_cast_call call)
{
	const int64_t step = (int64_t)gridDim.x * blockDim.x;
	for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < call.elements; i += step) {
		const int64_t at = offset_of(i, call.rank, call.shape, call.strides);
		if (!is_integer(call.from)) {
			store_number(call.to, call.y, i, load_number(call.from, call.x, at));
			continue;
		}
		const int64_t value = load_integer(call.from, call.x, at);
		if (is_integer(call.to))
			store_integer(call.to, call.y, i, value);
		else if (call.to == OPD_f32)
			((float *)call.y)[i] = __ll2float_rn(value);
		else if (call.to == OPD_bf16)
			((__nv_bfloat16 *)call.y)[i] = __ll2bfloat16_rn(value);
		else /* f16 and f8 overflow, and f64 rounds, long before a double's 53 bits matter twice */
			store_number(call.to, call.y, i, (double)value);
	}
}

/* Between f32, f16 and bf16: 8 elements a thread and access. */
template <class From, class To> static __global__ void cast_flat(const __grid_constant__ cuda_cast_call call)
{
	constexpr int N = 8;
	const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, groups = call.elements / N;
	if (i < groups) {
		float v[N];
		load_f32<N>((const From *)call.x + i * N, v);
		store_f32<N>((To *)call.y + i * N, v);
	}
	if (blockIdx.x == 0 && threadIdx.x < call.elements % N) {
		int64_t at = groups * N + threadIdx.x;
		((To *)call.y)[at] = from_f32<To>(to_f32(((const From *)call.x)[at]));
	}
}

template <class From, class To> static void cast_launch(const cuda_cast_call *call, cudaStream_t stream)
{
	cast_flat<From, To><<<grid_of(call->elements / 8, 256, INT32_MAX), 256, 0, stream>>>(*call);
}

int cuda_cast_launch(const struct cuda_cast_call *call, cudaStream_t stream)
{
	const bool flat = is_flat(call->rank, call->strides) && aligned16(call->x) && aligned16(call->y);
	if (flat && call->from == OPD_f32 && call->to == OPD_bf16)
		cast_launch<float, __nv_bfloat16>(call, stream);
	else if (flat && call->from == OPD_f32 && call->to == OPD_f16)
		cast_launch<float, __half>(call, stream);
	else if (flat && call->from == OPD_bf16 && call->to == OPD_f32)
		cast_launch<__nv_bfloat16, float>(call, stream);
	else if (flat && call->from == OPD_bf16 && call->to == OPD_f16)
		cast_launch<__nv_bfloat16, __half>(call, stream);
	else if (flat && call->from == OPD_f16 && call->to == OPD_f32)
		cast_launch<__half, float>(call, stream);
	else if (flat && call->from == OPD_f16 && call->to == OPD_bf16)
		cast_launch<__half, __nv_bfloat16>(call, stream);
	else
		cast_any<<<grid_of(call->elements, 256, 132 * 64), 256, 0, stream>>>(*call);
	return launched();
}
