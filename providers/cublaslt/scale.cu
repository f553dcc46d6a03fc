#include "providers/cublaslt/scale.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

static __device__ float bias_at(const scale_call &call, int64_t column)
{
	const int64_t at = column * call.bias_stride;
	switch (call.dtype) {
	case OPD_f16:
		return __half2float(((const __half *)call.bias)[at]);
	case OPD_bf16:
		return __bfloat162float(((const __nv_bfloat16 *)call.bias)[at]);
	default:
		return ((const float *)call.bias)[at];
	}
}

static __global__ void scale(const __grid_constant__ scale_call call)
{
	const int64_t elements = call.rows * call.columns;
	for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += (int64_t)gridDim.x * blockDim.x) {
		const int64_t row = i / call.columns, column = i % call.columns;
		float value = call.integers ? (float)((const int32_t *)call.sums)[i] : ((const float *)call.sums)[i];
		value = value * call.scale_a[row * call.scale_a_stride] * call.scale_b[column * call.scale_b_stride];
		if (call.bias != NULL)
			value += bias_at(call, column);
		if (call.dtype == OPD_f16)
			((__half *)call.y)[i] = __float2half_rn(value);
		else if (call.dtype == OPD_bf16)
			((__nv_bfloat16 *)call.y)[i] = __float2bfloat16_rn(value);
		else
			((float *)call.y)[i] = value;
	}
}

int scale_launch(const struct scale_call *call, cudaStream_t stream)
{
	const int64_t blocks = (call->rows * call->columns + 255) / 256;
	if (blocks > 0)
		scale<<<(unsigned)(blocks < 132 * 32 ? blocks : 132 * 32), 256, 0, stream>>>(*call);
	return (int)cudaGetLastError();
}
