/* attention and paged_attention for any dtype, head size and alignment; the merge of stretches; the choice among the kernels. */
#include "providers/cuda/kernels/attend.cuh"

enum { WARPS = 4, PER_LANE = ATTEND_HEAD_MAX / 32 };
/* So many queries a sequence, on average, share their keys through shared memory. */
enum { PREFILL_QUERIES = 4 };

/* A block computes one query row of one head over one stretch (or, stretches being 1, over all its keys); warps take keys in turn. */
template <class T> static __global__ void __launch_bounds__(WARPS * 32) attend_any(const __grid_constant__ cuda_attention_call call)
{
	__shared__ float parts[WARPS][ATTEND_HEAD_MAX], maxima[WARPS], sums[WARPS];
	const int64_t token = blockIdx.x, head = blockIdx.y;
	const unsigned stretch = blockIdx.z, stretches = gridDim.z;
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, size = call.head_size;
	attend_sequence sequence;
	behind_wait();
	if (!attend_find(call, token, token == 0 && head == 0 && stretch == 0, sequence))
		return;
	const int64_t begin = (int64_t)stretch * ATTEND_STRETCH;
	const int64_t end = stretches == 1 || begin + ATTEND_STRETCH > sequence.visible ? sequence.visible : begin + ATTEND_STRETCH;
	if (begin >= end && stretches > 1)
		return;
	const int64_t kv_head = head / (call.heads / call.kv_heads);
	const T *key = attend_base<T>(call, sequence, 0, kv_head), *value = attend_base<T>(call, sequence, 1, kv_head), *query = attend_query<T>(call, token, head);
	float q[PER_LANE], o[PER_LANE], maximum = -INFINITY, sum = 0;
#pragma unroll
	for (int i = 0; i < PER_LANE; i++) {
		q[i] = i * 32 + lane < size ? to_f32(query[i * 32 + lane]) : 0;
		o[i] = 0;
	}
	for (int64_t j = begin + warp; j < end; j += WARPS) {
		const int64_t row = attend_row(call, sequence, j);
		const T *k = key + row * call.key_stride[0], *v = value + row * call.key_stride[1];
		float score = 0;
#pragma unroll
		for (int i = 0; i < PER_LANE; i++)
			if (i * 32 + lane < size)
				score = fmaf(q[i], to_f32(k[i * 32 + lane]), score);
		score = warp_reduce<sum_of>(score) * call.scale;
		const float raised = score > maximum || score != score ? score : maximum;
		const float shrink = maximum == raised ? 1 : expf(maximum - raised); /* of −inf: 0 */
		const float weight = raised == -INFINITY ? 0 : expf(score - raised);
		maximum = raised;
		sum = sum * shrink + weight;
#pragma unroll
		for (int i = 0; i < PER_LANE; i++)
			if (i * 32 + lane < size)
				o[i] = fmaf(weight, to_f32(v[i * 32 + lane]), o[i] * shrink);
	}
#pragma unroll
	for (int i = 0; i < PER_LANE; i++)
		if (i * 32 + lane < size)
			parts[warp][i * 32 + lane] = o[i];
	maxima[warp] = maximum;
	sums[warp] = sum;
	__syncthreads();
	maximum = -INFINITY;
	for (int w = 0; w < WARPS; w++)
		maximum = maxima[w] > maximum || maxima[w] != maxima[w] ? maxima[w] : maximum;
	sum = 0;
	for (int w = 0; w < WARPS; w++)
		sum += maxima[w] == -INFINITY ? 0 : sums[w] * expf(maxima[w] - maximum);
	for (int d = threadIdx.x; d < size; d += WARPS * 32) {
		float mixed = 0;
		for (int w = 0; w < WARPS; w++)
			mixed += maxima[w] == -INFINITY ? 0 : parts[w][d] * expf(maxima[w] - maximum);
		if (stretches > 1)
			attend_partial(call, token, head, stretches, stretch)[d] = mixed;
		else
			((T *)call.y)[(token * call.heads + head) * size + d] = from_f32<T>(sequence.visible == 0 ? 0 : mixed / sum);
	}
	if (stretches > 1 && threadIdx.x == 0) {
		float *partial = attend_partial(call, token, head, stretches, stretch);
		partial[size] = maximum;
		partial[size + 1] = sum;
	}
}

/* The stretches of one query row and head, in order. */
template <class T> static __global__ void attend_merge(const __grid_constant__ cuda_attention_call call, unsigned stretches)
{
	const int64_t token = blockIdx.x, head = blockIdx.y;
	const int size = call.head_size;
	attend_sequence sequence;
	behind_wait();
	if (!attend_find(call, token, false, sequence))
		return;
	const unsigned used = (unsigned)((sequence.visible + ATTEND_STRETCH - 1) / ATTEND_STRETCH);
	const float *partial = attend_partial(call, token, head, stretches, 0);
	float maximum = -INFINITY, sum = 0;
	for (unsigned s = 0; s < used; s++) {
		float other = partial[s * (size + 2) + size];
		maximum = other > maximum || other != other ? other : maximum;
	}
	for (unsigned s = 0; s < used; s++) {
		const float *from = partial + s * (size + 2);
		sum += from[size] == -INFINITY ? 0 : from[size + 1] * expf(from[size] - maximum);
	}
	for (int d = threadIdx.x; d < size; d += blockDim.x) {
		float mixed = 0;
		for (unsigned s = 0; s < used; s++) {
			const float *from = partial + s * (size + 2);
			mixed += from[size] == -INFINITY ? 0 : from[d] * expf(from[size] - maximum);
		}
		((T *)call.y)[(token * call.heads + head) * size + d] = from_f32<T>(used == 0 ? 0 : mixed / sum);
	}
}

int attend_any_launch(const struct cuda_attention_call *call, unsigned stretches, cudaStream_t stream)
{
	const dim3 grid((unsigned)call->tokens, (unsigned)call->heads, stretches);
	CUDA_BY_DTYPE(call->dtype, T, launch_behind(attend_any<T>, grid, WARPS * 32, stream, *call));
	return launched();
}

static __global__ void check(const __grid_constant__ cuda_attention_call call)
{
	if (!faulted(call.fault))
		attend_check(call, true);
}

int cuda_attention_check_launch(const struct cuda_attention_call *call, cudaStream_t stream)
{
	if (call->paged && call->fault.word != NULL)
		check<<<1, 128, 0, stream>>>(*call);
	return launched();
}

/* A step with one query a sequence is cut into stretches, so that few sequences fill the device; more queries do that by themselves. */
static unsigned stretches_of(const struct cuda_attention_call *call)
{
	if (call->tokens > call->sequences || call->keys <= ATTEND_STRETCH)
		return 1;
	const int64_t stretches = (call->keys + ATTEND_STRETCH - 1) / ATTEND_STRETCH;
	return stretches > 65535 ? 1 : (unsigned)stretches;
}

uint64_t cuda_attention_scratch(const struct cuda_attention_call *call)
{
	const unsigned stretches = stretches_of(call);
	return stretches == 1 ? 0 : (uint64_t)call->tokens * (uint64_t)call->heads * stretches * (uint64_t)(call->head_size + 2) * sizeof(float);
}

int cuda_attention_launch(const struct cuda_attention_call *call, cudaStream_t stream)
{
	const unsigned stretches = stretches_of(call);
	int failed = 0;
	if (!attend_decode_takes(call))
		failed = attend_any_launch(call, stretches, stream);
	else if (call->tokens >= PREFILL_QUERIES * call->sequences)
		failed = attend_prefill_launch(call, stream);
	else
		failed = attend_decode_launch(call, stretches, stream);
	if (failed != 0 || stretches == 1)
		return failed;
	const dim3 grid((unsigned)call->tokens, (unsigned)call->heads);
	CUDA_BY_DTYPE(call->dtype, T, launch_behind(attend_merge<T>, grid, 128, stream, *call, stretches));
	return launched();
}
