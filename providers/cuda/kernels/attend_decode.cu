/* Attention of few queries, f16 and bf16, head sizes 64 and 128: the time is that of reading keys and values once.
 *
 * A warp takes 16 keys at a time. Scores are K·Qᵀ: the keys are the matrix unit's 16 rows, read 16 bytes at a time straight into its registers, the query heads that share
 * them its 8 columns. The result is Vᵀ·Pᵀ: a lane reads 8 neighbouring elements of four values and pairs them by token; which dimension a row of the product is follows
 * from that. So nothing passes through shared memory until the warps' results are merged, and no key or value is read twice. */
#include <type_traits>

#include "providers/cuda/kernels/attend.cuh"

enum { WARPS = 8, KEYS = 16, GROUP = 8 };

template <class T, int D> struct decode_state {
	float o[D / 16][4];
	float maximum[2];
	float sum[2];
};

static __device__ __forceinline__ uint4 words_of(const void *from)
{
	uint4 bits;
	asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w) : "l"(from));
	return bits;
}

static __device__ __forceinline__ uint32_t word_at(const uint4 &words, int i)
{
	return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

/* Element `j` (of 8) of a and of b in one word. */
static __device__ __forceinline__ uint32_t paired(const uint4 &a, const uint4 &b, int j)
{
	return __byte_perm(word_at(a, j / 2), word_at(b, j / 2), j % 2 == 0 ? 0x5410 : 0x7632);
}

/* Which dimension row g (high 0) or g + 8 (high 1) of product j is: element j of the lane's 16 bytes. */
template <int D> static __device__ __forceinline__ int dimension(int j, int g, int high)
{
	return D == 128 ? high * 64 + g * 8 + j : g * 8 + high * 4 + j;
}

template <class T, int D>
static __device__ __forceinline__ void decode_tile(decode_state<T, D> &state, const uint4 *q, const uint4 (&k)[D / 32][2], const uint4 (&v)[D / 64][4],
                                                   int64_t first, int64_t end, float scale)
{
	const int lane = threadIdx.x % 32, g = lane / 4;
	float s[4] = {0, 0, 0, 0};
#pragma unroll
	for (int i = 0; i < D / 32; i++) {
		const uint32_t low[4] = {k[i][0].x, k[i][1].x, k[i][0].y, k[i][1].y}, high[4] = {k[i][0].z, k[i][1].z, k[i][0].w, k[i][1].w};
		const uint4 words = q[i * 32 + lane];
		mma<T>(s, low, words.x, words.y);
		mma<T>(s, high, words.z, words.w);
	}
	/* s[0], s[1]: key g, heads 2t and 2t + 1; s[2], s[3]: key g + 8. In units of log 2. */
#pragma unroll
	for (int i = 0; i < 4; i++)
		s[i] = first + g + i / 2 * 8 < end ? s[i] * scale : -INFINITY;
	float p[4];
#pragma unroll
	for (int h = 0; h < 2; h++) {
		float largest = fmaxf(s[h], s[h + 2]);
#pragma unroll
		for (int step = 4; step < 32; step *= 2)
			largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
		largest = fmaxf(largest, state.maximum[h]);
		const float base = largest == -INFINITY ? 0 : largest;
		const float shrink = exp2f(state.maximum[h] - base);
		p[h] = exp2f(s[h] - base);
		p[h + 2] = exp2f(s[h + 2] - base);
		state.maximum[h] = largest;
		state.sum[h] = state.sum[h] * shrink + p[h] + p[h + 2];
#pragma unroll
		for (int j = 0; j < D / 16; j++) {
			state.o[j][h] *= shrink;
			state.o[j][h + 2] *= shrink;
		}
	}
	const uint32_t b0 = transposed(pair_of<T>(p[0], p[1])), b1 = transposed(pair_of<T>(p[2], p[3]));
	/* bf16 keeps 8 bits of a weight, which shows in the result: what it loses is multiplied too. */
	constexpr bool REST = std::is_same<T, __nv_bfloat16>::value;
	uint32_t rest0 = 0, rest1 = 0;
	if (REST) {
		rest0 = transposed(pair_of<T>(p[0] - rounded<T>(p[0]), p[1] - rounded<T>(p[1])));
		rest1 = transposed(pair_of<T>(p[2] - rounded<T>(p[2]), p[3] - rounded<T>(p[3])));
	}
#pragma unroll
	for (int j = 0; j < D / 16; j++) {
		constexpr int HIGH = D == 128 ? 1 : 0; /* set of the rows g + 8 */
		const int high = D == 128 ? j : j + 4;
		const uint32_t a[4] = {paired(v[0][0], v[0][1], j), paired(v[HIGH][0], v[HIGH][1], high), paired(v[0][2], v[0][3], j),
		                       paired(v[HIGH][2], v[HIGH][3], high)};
		mma<T>(state.o[j], a, b0, b1);
		if (REST)
			mma<T>(state.o[j], a, rest0, rest1);
	}
}

/* Grid: token; kv head and group of its heads; stretch. */
template <class T, int D> static __global__ void __launch_bounds__(WARPS * 32, 2) attend_decode(const __grid_constant__ cuda_attention_call call)
{
	__shared__ float parts[WARPS][GROUP][D], maxima[WARPS][GROUP], sums[WARPS][GROUP];
	__shared__ uint4 q[D / 32 * 32]; /* as each lane of a warp wants it */
	const int64_t token = blockIdx.x;
	const unsigned stretch = blockIdx.z, stretches = gridDim.z;
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
	const int group = call.heads / call.kv_heads, groups = (group + GROUP - 1) / GROUP;
	const int kv_head = blockIdx.y / groups, head = kv_head * group + blockIdx.y % groups * GROUP;
	const int heads = min(GROUP, (kv_head + 1) * group - head);
	attend_sequence sequence;
	behind_wait();
	if (!attend_find(call, token, token == 0 && blockIdx.y == 0 && stretch == 0, sequence))
		return;
	const int64_t begin = (int64_t)stretch * ATTEND_STRETCH;
	const int64_t end = stretches == 1 || begin + ATTEND_STRETCH > sequence.visible ? sequence.visible : begin + ATTEND_STRETCH;
	if (begin >= end && stretches > 1)
		return;
	const T *key = attend_base<T>(call, sequence, 0, kv_head), *value = attend_base<T>(call, sequence, 1, kv_head);
	if (warp < D / 32)
		q[warp * 32 + lane] = g < heads ? words_of(attend_query<T>(call, token, head + g) + warp * 32 + t * 8) : make_uint4(0, 0, 0, 0);
	__syncthreads();
	decode_state<T, D> state = {{}, {-INFINITY, -INFINITY}, {0, 0}};
	int64_t first = begin + warp * KEYS;
	/* Lane i finds where key i % 16 of the next tile lies while this one is computed. */
	int row = first + lane % KEYS < end ? (int)attend_row(call, sequence, first + lane % KEYS) : 0;
	for (; first < end; first += WARPS * KEYS) {
		uint4 k[D / 32][2], v[D / 64][4];
#pragma unroll
		for (int h = 0; h < 2; h++) {
			const T *from = key + (int64_t)__shfl_sync(0xffffffffu, row, g + 8 * h) * call.key_stride[0] + t * 8;
#pragma unroll
			for (int i = 0; i < D / 32; i++)
				k[i][h] = words_of(from + i * 32);
		}
#pragma unroll
		for (int i = 0; i < 4; i++) {
			const int at = 2 * t + i % 2 + i / 2 * 8;
			const T *from = value + (int64_t)__shfl_sync(0xffffffffu, row, at) * call.key_stride[1] + g * 8;
#pragma unroll
			for (int h = 0; h < D / 64; h++) /* what lies past the end weighs nothing, and may be NaN */
				v[h][i] = first + at < end ? words_of(from + h * 64) : make_uint4(0, 0, 0, 0);
		}
		const int64_t next = first + WARPS * KEYS + lane % KEYS;
		row = next < end ? (int)attend_row(call, sequence, next) : 0;
		decode_tile<T, D>(state, q, k, v, first, end, call.scale * ATTEND_LOG2E);
	}
#pragma unroll
	for (int h = 0; h < 2; h++) {
#pragma unroll
		for (int step = 4; step < 32; step *= 2)
			state.sum[h] += __shfl_xor_sync(0xffffffffu, state.sum[h], step);
		maxima[warp][2 * t + h] = state.maximum[h];
		sums[warp][2 * t + h] = state.sum[h];
#pragma unroll
		for (int j = 0; j < D / 16; j++) {
			parts[warp][2 * t + h][dimension<D>(j, g, 0)] = state.o[j][h];
			parts[warp][2 * t + h][dimension<D>(j, g, 1)] = state.o[j][h + 2];
		}
	}
	__syncthreads();
	for (int i = threadIdx.x; i < heads * D; i += WARPS * 32) {
		const int h = i / D, d = i % D;
		float maximum = -INFINITY, sum = 0, mixed = 0;
#pragma unroll
		for (int w = 0; w < WARPS; w++)
			maximum = fmaxf(maximum, maxima[w][h]);
#pragma unroll
		for (int w = 0; w < WARPS; w++) {
			const float share = maxima[w][h] == -INFINITY ? 0 : exp2f(maxima[w][h] - maximum);
			sum += sums[w][h] * share;
			mixed += parts[w][h][d] * share;
		}
		if (stretches == 1) {
			((T *)call.y)[(token * call.heads + head + h) * D + d] = from_f32<T>(sequence.visible == 0 ? 0 : mixed / sum);
			continue;
		}
		float *partial = attend_partial(call, token, head + h, stretches, stretch);
		partial[d] = mixed;
		if (d == 0) {
			partial[D] = maximum / ATTEND_LOG2E;
			partial[D + 1] = sum;
		}
	}
}

bool attend_decode_takes(const struct cuda_attention_call *call)
{
	bool aligned = aligned16(call->query) && aligned16(call->key) && aligned16(call->value) && call->query_stride % 8 == 0 && call->query_head_stride % 8 == 0;
	for (int i = 0; i < 2; i++)
		aligned = aligned && call->key_stride[i] % 8 == 0 && call->key_head_stride[i] % 8 == 0 && call->key_sequence_stride[i] % 8 == 0;
	return aligned && call->dtype != CUDA_F32 && (call->head_size == 64 || call->head_size == 128);
}

template <class T> static void decode_launch(const struct cuda_attention_call *call, unsigned stretches, cudaStream_t stream)
{
	const int group = call->heads / call->kv_heads;
	const dim3 grid((unsigned)call->tokens, (unsigned)(call->kv_heads * ((group + GROUP - 1) / GROUP)), stretches);
	if (call->head_size == 64)
		launch_behind(attend_decode<T, 64>, grid, WARPS * 32, stream, *call);
	else
		launch_behind(attend_decode<T, 128>, grid, WARPS * 32, stream, *call);
}

int attend_decode_launch(const struct cuda_attention_call *call, unsigned stretches, cudaStream_t stream)
{
	if (call->dtype == CUDA_BF16)
		decode_launch<__nv_bfloat16>(call, stretches, stream);
	else
		decode_launch<__half>(call, stretches, stream);
	return launched();
}
