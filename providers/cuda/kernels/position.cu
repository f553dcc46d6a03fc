/* embedding, rotary_embedding, reshape_and_cache: kernels that follow indices, and check them. */
#include <initializer_list>

#include "providers/cuda/kernels/common.cuh"

/* ---- embedding ----------------------------------------------------------------------------------------------------------------- */

enum { EMBEDDING_IDS = 0 };

template <class Word> static __global__ void embedding_rows(const __grid_constant__ cuda_embedding_call call)
{
	const int64_t token = blockIdx.x;
	behind_wait();
	const int64_t id = index_at(call.ids, token);
	if (faulted(call.fault))
		return;
	if (id < 0 || id >= call.vocabulary) {
		if (threadIdx.x == 0)
			index_ok(call.fault, EMBEDDING_IDS, token, id, 0, call.vocabulary - 1);
		return;
	}
	const Word *from = (const Word *)((const char *)call.table + id * call.table_stride_bytes);
	Word *to = (Word *)((char *)call.y + token * call.row_bytes);
	for (int64_t i = threadIdx.x; i < call.row_bytes / (int64_t)sizeof(Word); i += blockDim.x)
		to[i] = from[i];
}

static inline bool all_multiples(uint64_t of, std::initializer_list<uint64_t> values)
{
	for (uint64_t value : values)
		if (value % of != 0)
			return false;
	return true;
}

int cuda_embedding_launch(const struct cuda_embedding_call *call, cudaStream_t stream)
{
	const unsigned grid = (unsigned)call->tokens;
	const std::initializer_list<uint64_t> values = {(uint64_t)call->row_bytes, (uint64_t)call->table_stride_bytes, (uint64_t)call->table, (uint64_t)call->y};
	if (all_multiples(16, values))
		launch_behind(embedding_rows<uint4>, grid, call->row_bytes >= 4096 ? 256 : 64, stream, *call);
	else if (all_multiples(4, values))
		launch_behind(embedding_rows<uint32_t>, grid, 128, stream, *call);
	else
		launch_behind(embedding_rows<uint8_t>, grid, 128, stream, *call);
	return launched();
}

/* ---- rotary_embedding ------------------------------------------------------------------------------------------------------------ */

enum { ROTARY_POSITIONS = 0 };

/* a·cosine + b·sine with what rounding takes from the second product: where the two nearly cancel it is as large as the result. (W. Kahan's sum of two products.) */
static __device__ __forceinline__ float turned(float a, float cosine, float b, float sine)
{
	float product = b * sine;
	return fmaf(a, cosine, product) + fmaf(b, sine, -product);
}

/* In double, which doesn't overflow on its way: for what isn't finite above. */
static __device__ __noinline__ float turned_wide(float a, float cosine, float b, float sine)
{
	return (float)((double)a * (double)cosine + (double)b * (double)sine);
}

/* Pair j of N: elements of both halves (neox), or neighbours. x[0] are the lower N elements, x[1] the upper, as they lie in memory. False: something isn't finite, and x is spoiled. */
template <class T, int N, bool NEOX> static __device__ __forceinline__ bool turn_pairs(pack<T, N> (&x)[2], const float (&cosine)[N], const float (&sine)[N])
{
	float y[2 * N], probe = 0;
#pragma unroll
	for (int j = 0; j < N; j++) {
		const int first = NEOX ? j : 2 * j, second = NEOX ? N + j : 2 * j + 1;
		const float a = to_f32(x[first / N].e[first % N]), b = to_f32(x[second / N].e[second % N]);
		y[first] = turned(a, cosine[j], b, -sine[j]);
		y[second] = turned(b, cosine[j], a, sine[j]);
		probe = fmaf(y[first], 0.0f, probe);
		probe = fmaf(y[second], 0.0f, probe);
	}
#pragma unroll
	for (int j = 0; j < 2 * N; j++)
		x[j / N].e[j % N] = from_f32<T>(y[j]);
	return probe == 0.0f;
}

/* Pairs [pair, pair + count) of a head once more, from memory, where they still are what they were: in double what isn't finite in f32. Apart, so that the registers of what is rare cost the rest
 * nothing. */
template <class T, class C, bool NEOX> static __device__ __noinline__ void turn_again(const T *from, T *to, const C *cache, int half, int pair, int count)
{
#pragma unroll 1
	for (int j = pair; j < pair + count; j++) {
		const int first = NEOX ? j : 2 * j, second = NEOX ? half + j : 2 * j + 1;
		const float a = to_f32(from[first]), b = to_f32(from[second]), cosine = to_f32(cache[j]), sine = to_f32(cache[half + j]);
		const float low = turned(a, cosine, b, -sine), high = turned(b, cosine, a, sine);
		to[first] = from_f32<T>(low - low == 0.0f ? low : turned_wide(a, cosine, b, -sine));
		to[second] = from_f32<T>(high - high == 0.0f ? high : turned_wide(b, cosine, a, sine));
	}
}

/* Thread: x the pairs of a head, y heads. Grid: x more heads, y and z tokens. */
template <class T, class C, int N, bool NEOX> static __global__ void rotary_turn(const __grid_constant__ cuda_rotary_call call)
{
	const int64_t token = (int64_t)blockIdx.y + (int64_t)blockIdx.z * gridDim.y;
	const int half = call.rot / 2, pair = (int)threadIdx.x * N, head = (int)(blockIdx.x * blockDim.y + threadIdx.y), which = head >= call.heads[0];
	const int low = NEOX ? pair : 2 * pair, high = NEOX ? half + pair : 2 * pair + N;
	behind_wait();
	if (token >= call.tokens || head >= call.heads[0] + call.heads[1])
		return;
	const int64_t position = index_at(call.positions, token);
	const T *from = (const T *)call.from[which] + token * call.strides[which] + (int64_t)(head - which * call.heads[0]) * call.head_size;
	T *to = (T *)call.to[which] + (token * call.heads[which] + head - which * call.heads[0]) * call.head_size;
	pack<T, N> x[2] = {load_passing<N>(from + low), load_passing<N>(from + high)};
	if (faulted(call.fault)) /* looked at while the others are on their way */
		return;
	if (position < 0 || position >= call.positions_max) {
		if (threadIdx.x == 0)
			index_ok(call.fault, ROTARY_POSITIONS, token, position, 0, call.positions_max - 1);
		return;
	}
	const C *cache = (const C *)call.cache + position * call.cache_stride;
	float cosine[N], sine[N];
	load_f32<N>(cache + pair, cosine);
	load_f32<N>(cache + half + pair, sine);
	if (!turn_pairs<T, N, NEOX>(x, cosine, sine)) {
		turn_again<T, C, NEOX>(from, to, cache, half, pair, N);
		return;
	}
	store_passing(to + low, x[0]);
	store_passing(to + high, x[1]);
}

/* What lies past the turned part of a head, where it isn't there already. */
template <class T> static __global__ void rotary_rest(const __grid_constant__ cuda_rotary_call call)
{
	const int64_t token = blockIdx.x;
	const int rest = call.head_size - call.rot, items = (call.heads[0] + call.heads[1]) * rest;
	behind_wait();
	if (faulted(call.fault))
		return;
	const int64_t position = index_at(call.positions, token);
	if (position < 0 || position >= call.positions_max) {
		if (threadIdx.x == 0)
			index_ok(call.fault, ROTARY_POSITIONS, token, position, 0, call.positions_max - 1);
		return;
	}
	for (int item = threadIdx.x; item < items; item += blockDim.x) {
		int head = item / rest;
		const int which = head >= call.heads[0];
		head -= which ? call.heads[0] : 0;
		const int64_t at = (int64_t)head * call.head_size + call.rot + item % rest;
		const T *from = (const T *)call.from[which] + token * call.strides[which] + at;
		T *to = (T *)call.to[which] + token * call.heads[which] * call.head_size + at;
		if (from != to)
			*to = *from;
	}
}

/* Positions alone: nothing is turned. */
static __global__ void rotary_check(const __grid_constant__ cuda_rotary_call call)
{
	const int64_t token = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
	behind_wait();
	if (token < call.tokens && !faulted(call.fault))
		index_ok(call.fault, ROTARY_POSITIONS, token, index_at(call.positions, token), 0, call.positions_max - 1);
}

/* Small blocks: what a token's heads wait for, its position and then its angles, is waited for by few at a time (4096 tokens of 40 heads of 128 in bf16: 30.2 us by blocks of 64, 32.2 by blocks of
 * 160 with two heads a thread). */
enum { ROTARY_THREADS = 64 };

template <class T, class C, int N> static void turn_launch(const cuda_rotary_call *call, cudaStream_t stream)
{
	const int parts = call->rot / 2 / N, heads = call->heads[0] + call->heads[1];
	const int beside = parts >= ROTARY_THREADS ? 1 : heads < ROTARY_THREADS / parts ? heads : ROTARY_THREADS / parts;
	const int64_t high = call->tokens > 32768 ? 32768 : call->tokens;
	const dim3 block((unsigned)parts, (unsigned)beside);
	const dim3 grid((unsigned)((heads + beside - 1) / beside), (unsigned)high, (unsigned)((call->tokens + high - 1) / high));
	if (call->neox)
		launch_behind(rotary_turn<T, C, N, true>, grid, block, stream, *call);
	else
		launch_behind(rotary_turn<T, C, N, false>, grid, block, stream, *call);
}

template <class T, class C> static void rotary_launch(const cuda_rotary_call *call, cudaStream_t stream)
{
	constexpr int N = vec_of<T>;
	bool vectors = call->rot / 2 % N == 0 && call->rot / 2 / N <= 1024 && call->head_size * sizeof(T) % 16 == 0 && rows_aligned(call->cache, call->cache_stride, sizeof(C)) &&
	               (call->rot / 2) * sizeof(C) % 16 == 0;
	for (int i = 0; i < 2; i++)
		vectors = vectors && rows_aligned(call->from[i], call->strides[i], sizeof(T)) && aligned16(call->to[i]);
	if (call->rot >= 2 && vectors)
		turn_launch<T, C, N>(call, stream);
	else if (call->rot >= 2)
		turn_launch<T, C, 1>(call, stream);
	if (call->rot < call->head_size)
		launch_behind(rotary_rest<T>, (unsigned)call->tokens, 256, stream, *call);
}

int cuda_rotary_launch(const struct cuda_rotary_call *call, cudaStream_t stream)
{
	if (call->heads[0] + call->heads[1] == 0) {
		launch_behind(rotary_check, (unsigned)((call->tokens + 255) / 256), 256, stream, *call);
		return launched();
	}
	CUDA_BY_DTYPE(call->dtype, T, if (call->cache_f32) rotary_launch<T, float>(call, stream); else rotary_launch<T, T>(call, stream));
	return launched();
}

/* ---- reshape_and_cache ----------------------------------------------------------------------------------------------------------- */

/* Tokens that each look through those behind them; of more, the last for each slot is found first. */
enum { CACHE_SLOTS = 4, CACHE_LOOKED = 1024 };

/* The last token for each slot. */
static __global__ void cache_last(const __grid_constant__ cuda_cache_call call)
{
	const int64_t token = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
	behind_wait();
	if (token >= call.tokens || faulted(call.fault))
		return;
	const int64_t slot = index_at(call.slots, token);
	if (slot >= 0 && slot < call.slot_count)
		atomicMax(&call.last[slot], (int32_t)token);
}

/* By all threads of a block: whether a later token is for the same slot. */
static __device__ __forceinline__ bool cache_replaced(const cuda_cache_call &call, int64_t token, int64_t slot)
{
	bool later = false;
	if (call.last != NULL)
		return call.last[slot] != token;
	for (int64_t t = token + 1 + threadIdx.x; t < call.tokens; t += blockDim.x)
		later |= index_at(call.slots, t) == slot;
	return __syncthreads_or(later) != 0;
}

/* A block a token, y the key or the value. Of tokens for one slot the last stays, whole: an earlier one looks for it. */
template <class Word> static __global__ void cache_rows(const __grid_constant__ cuda_cache_call call)
{
	const int64_t token = blockIdx.x;
	const int which = blockIdx.y;
	behind_wait();
	const int64_t words = call.row_bytes / (int64_t)sizeof(Word), slot = index_at(call.slots, token);
	const Word *from = (const Word *)((const char *)call.tokens_from[which] + token * call.token_stride_bytes[which]);
	Word first = {};
	if (threadIdx.x < words)
		first = from[threadIdx.x];
	if (faulted(call.fault)) /* looked at while the others are on their way */
		return;
	if (slot < 0)
		return;
	if (slot >= call.slot_count) {
		if (threadIdx.x == 0)
			index_ok(call.fault, CACHE_SLOTS, token, slot, INT64_MIN, call.slot_count - 1);
		return;
	}
	if (words == 0 || cache_replaced(call, token, slot))
		return;
	Word *to = (Word *)((char *)call.cache_to[which] + slot * call.row_bytes);
	if (threadIdx.x < words)
		to[threadIdx.x] = first;
	for (int64_t i = threadIdx.x + blockDim.x; i < words; i += blockDim.x)
		to[i] = from[i];
}

uint64_t cuda_cache_scratch(const struct cuda_cache_call *call)
{
	uint64_t bytes;
	if (call->tokens <= CACHE_LOOKED || call->slots.stride == 0 || call->row_bytes == 0)
		return 0;
	return __builtin_mul_overflow((uint64_t)call->slot_count, (uint64_t)sizeof(int32_t), &bytes) ? UINT64_MAX : bytes;
}

static int last_launch(const cuda_cache_call *call, cudaStream_t stream)
{
	const cudaError_t failed = cudaMemsetAsync(call->last, 0xff, (size_t)call->slot_count * sizeof *call->last, stream);
	if (failed != cudaSuccess)
		return (int)failed;
	launch_behind(cache_last, (unsigned)((call->tokens + 255) / 256), 256, stream, *call);
	return launched();
}

static int rows_launch(const cuda_cache_call *call, cudaStream_t stream)
{
	const dim3 grid((unsigned)call->tokens, 2);
	const std::initializer_list<uint64_t> values = {(uint64_t)call->row_bytes,      (uint64_t)call->token_stride_bytes[0], (uint64_t)call->token_stride_bytes[1],
	                                                (uint64_t)call->tokens_from[0], (uint64_t)call->tokens_from[1],        (uint64_t)call->cache_to[0],
	                                                (uint64_t)call->cache_to[1]};
	if (all_multiples(16, values))
		launch_behind(cache_rows<uint4>, grid, 128, stream, *call);
	else if (all_multiples(4, values))
		launch_behind(cache_rows<uint32_t>, grid, 128, stream, *call);
	else
		launch_behind(cache_rows<uint8_t>, grid, 128, stream, *call);
	return launched();
}

/* All for one slot: the last token's call. */
static struct cuda_cache_call last_of(const struct cuda_cache_call *call)
{
	struct cuda_cache_call last = *call;
	for (int i = 0; i < 2; i++)
		last.tokens_from[i] = (const char *)call->tokens_from[i] + (call->tokens - 1) * call->token_stride_bytes[i];
	last.tokens = 1;
	return last;
}

int cuda_cache_launch(const struct cuda_cache_call *call, cudaStream_t stream)
{
	for (int i = 0; i < 2; i++) {
		if (call->cache_to[i] == call->cache_from[i] || call->cache_bytes == 0)
			continue;
		cudaError_t failed = cudaMemcpyAsync(call->cache_to[i], call->cache_from[i], call->cache_bytes, cudaMemcpyDeviceToDevice, stream);
		if (failed != cudaSuccess)
			return (int)failed;
	}
	if (call->tokens == 0)
		return 0;
	if (call->slots.stride == 0) {
		const struct cuda_cache_call last = last_of(call);
		return rows_launch(&last, stream);
	}
	const int failed = call->last == NULL ? 0 : last_launch(call, stream);
	return failed != 0 ? failed : rows_launch(call, stream);
}
