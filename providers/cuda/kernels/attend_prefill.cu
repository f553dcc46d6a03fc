/* Attention of many queries, f16 and bf16, head sizes 64 and 128: tiles of queries against tiles of keys on the matrix unit, softmax on the way, nothing of the scores in memory.
 *
 * A block takes ROWS successive query rows of one sequence and head, counted from the sequence's first. Keys and values come in tiles of KEYS to shared memory, the next while one is
 * computed. A row of 16-byte chunks lies there with its chunk numbers exchanged by its own number, so that reads of eight rows meet eight banks. */
#include <type_traits>

#include "providers/cuda/kernels/attend.cuh"

enum { WARPS = 4, WARP_ROWS = 16, ROWS = WARPS * WARP_ROWS, KEYS = 64, STAGES = 2 };

template <class T, int D> struct prefill_memory {
	T tiles[STAGES][2][KEYS * D]; /* keys, values */
	int64_t rows[STAGES][KEYS];   /* where they lie */
};

/* A sequence whose queries the block has a part in. */
struct prefill_part {
	attend_sequence sequence; /* number, queries, keys */
	int64_t begin;            /* its first query row */
	int64_t end;
};

static __device__ __forceinline__ uint32_t shared_address(const void *pointer)
{
	return (uint32_t)__cvta_generic_to_shared(pointer);
}

/* 16 bytes to shared memory; zeros where there is nothing. */
static __device__ __forceinline__ void copy_chunk(void *to, const void *from, bool there)
{
	asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0));
}

template <bool TRANSPOSED> static __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void *from)
{
	if (TRANSPOSED)
		asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(from)));
	else
		asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(from)));
}

/* Chunk `chunk` of row `row` of a tile. */
template <class T, int D> static __device__ __forceinline__ T *chunk_of(T *tile, int row, int chunk)
{
	return tile + row * D + (chunk ^ (row & 7)) * 8;
}

/* Sequence b as the operands say; false: what they say can't be (another block reports it). */
static __device__ __forceinline__ bool part_get(const cuda_attention_call &call, int64_t b, prefill_part &part)
{
	if (call.paged) {
		part.begin = index_at(call.starts, b);
		part.end = index_at(call.starts, b + 1);
		part.sequence.keys = index_at(call.lengths, b);
	} else {
		part.begin = b * call.queries;
		part.end = part.begin + call.queries;
		part.sequence.keys = call.keys;
	}
	part.sequence.number = b;
	part.sequence.queries = part.end - part.begin;
	return part.begin >= 0 && part.end >= part.begin && part.end <= call.tokens && part.sequence.keys <= call.keys &&
	       (!call.paged || part.sequence.keys >= part.sequence.queries);
}

/* Keys that query row `token` sees; 0 past the sequence's. */
static __device__ __forceinline__ int64_t part_visible(const cuda_attention_call &call, const prefill_part &part, int64_t token)
{
	if (token < part.begin || token >= part.end)
		return 0;
	return attend_visible(call, token - part.begin, part.sequence.queries, part.sequence.keys);
}

/* The sequence of the block's tile, and the tile's number in it: tiles are numbered sequence after sequence. False: there are fewer. */
static __device__ __forceinline__ bool tile_find(const cuda_attention_call &call, int64_t tile, int64_t &number, int64_t &within)
{
	const int lane = threadIdx.x % 32;
	if (!call.paged) {
		const int64_t tiles = (call.queries + ROWS - 1) / ROWS;
		number = tile / tiles;
		within = tile % tiles;
		return number < call.sequences;
	}
	/* Each warp for itself: the tiles of 32 sequences, added up. */
	for (int64_t first = 0; first < call.sequences; first += 32) {
		const int64_t b = first + lane;
		const int64_t queries = b < call.sequences ? index_at(call.starts, b + 1) - index_at(call.starts, b) : 0;
		const int64_t tiles = queries > 0 && queries <= call.tokens ? (queries + ROWS - 1) / ROWS : 0;
		int64_t until = tiles;
#pragma unroll
		for (int step = 1; step < 32; step *= 2) {
			const int64_t before = __shfl_up_sync(0xffffffffu, until, step);
			until += lane >= step ? before : 0;
		}
		const unsigned past = __ballot_sync(0xffffffffu, tile < until);
		if (past != 0) {
			const int owner = __ffs(past) - 1;
			number = first + owner;
			within = tile - __shfl_sync(0xffffffffu, until - tiles, owner);
			return true;
		}
		tile -= __shfl_sync(0xffffffffu, until, 31);
	}
	return false;
}

/* Asks for the tile of keys from `first` on. Where its rows lie was found out before a barrier. */
template <class T, int D>
static __device__ __forceinline__ void tile_ask(const cuda_attention_call &call, prefill_memory<T, D> &memory, int stage, const T *key, const T *value, int64_t first, int64_t keys)
{
	constexpr int CHUNKS = D / 8;
#pragma unroll
	for (int i = 0; i < KEYS * CHUNKS / (WARPS * 32); i++) {
		const int at = i * WARPS * 32 + (int)threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
		const bool there = first + row < keys;
		const int64_t place = memory.rows[stage][row];
		copy_chunk(chunk_of<T, D>(memory.tiles[stage][0], row, chunk), key + place * call.key_stride[0] + chunk * 8, there);
		copy_chunk(chunk_of<T, D>(memory.tiles[stage][1], row, chunk), value + place * call.key_stride[1] + chunk * 8, there);
	}
	asm volatile("cp.async.commit_group;");
}

template <class T, int D> static __device__ __forceinline__ void tile_place(const cuda_attention_call &call, prefill_memory<T, D> &memory, int stage, const prefill_part &part, int64_t first)
{
	if (threadIdx.x < KEYS)
		memory.rows[stage][threadIdx.x] = first + threadIdx.x < part.sequence.keys ? attend_row(call, part.sequence, first + threadIdx.x) : 0;
}

/* What a warp knows of its rows: g and g + 8 of each lane. */
template <int D> struct prefill_state {
	float o[D / 8][4];
	float maximum[2];
	float sum[2];
};

template <class T, int D>
static __device__ __forceinline__ void tile_scores(T *keys, const uint32_t (&q)[D / 16][4], float (&s)[KEYS / 8][4])
{
	const int lane = threadIdx.x % 32;
#pragma unroll
	for (int n = 0; n < KEYS / 8; n++) {
		s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
		for (int k = 0; k < D / 16; k += 2) { /* four matrices: the chunks of two steps */
			uint32_t b[4];
			load_matrices<false>(b, chunk_of<T, D>(keys, n * 8 + lane % 8, 2 * k + lane / 8));
			mma<T>(s[n], q[k], b[0], b[1]);
			mma<T>(s[n], q[k + 1], b[2], b[3]);
		}
	}
}

/* Scores to weights, in units of log 2; what was summed so far shrinks to the new maximum. */
template <int D> static __device__ __forceinline__ void tile_weigh(prefill_state<D> &state, float (&s)[KEYS / 8][4], int64_t first, const int64_t (&visible)[2], float scale)
{
	const int t = threadIdx.x % 4;
#pragma unroll
	for (int h = 0; h < 2; h++) {
		const int64_t seen = visible[h] - first;
		float largest = state.maximum[h];
#pragma unroll
		for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
			for (int j = 0; j < 2; j++) {
				float &score = s[n][2 * h + j];
				score = n * 8 + 2 * t + j < seen ? score * scale : -INFINITY;
				largest = fmaxf(largest, score);
			}
		largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
		largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
		const float base = largest == -INFINITY ? 0 : largest, shrink = exp2f(state.maximum[h] - base);
		float sum = 0;
#pragma unroll
		for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
			for (int j = 0; j < 2; j++) {
				s[n][2 * h + j] = exp2f(s[n][2 * h + j] - base);
				sum += s[n][2 * h + j];
			}
		state.maximum[h] = largest;
		state.sum[h] = state.sum[h] * shrink + sum;
#pragma unroll
		for (int d = 0; d < D / 8; d++) {
			state.o[d][2 * h] *= shrink;
			state.o[d][2 * h + 1] *= shrink;
		}
	}
}

template <class T> static __device__ __forceinline__ void weights_pack(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4])
{
	a[0] = pair_of<T>(low[0], low[1]);
	a[1] = pair_of<T>(low[2], low[3]);
	a[2] = pair_of<T>(high[0], high[1]);
	a[3] = pair_of<T>(high[2], high[3]);
}

template <class T> static __device__ __forceinline__ void weights_rest(float (&p)[4])
{
#pragma unroll
	for (int i = 0; i < 4; i++)
		p[i] -= rounded<T>(p[i]);
}

template <class T, int D> static __device__ __forceinline__ void tile_mix(prefill_state<D> &state, T *values, float (&p)[KEYS / 8][4])
{
	/* bf16 keeps 8 bits of a weight, which shows in the result: what it loses is multiplied too. */
	constexpr bool REST = std::is_same<T, __nv_bfloat16>::value;
	const int lane = threadIdx.x % 32;
#pragma unroll
	for (int k = 0; k < KEYS / 16; k++) {
		uint32_t a[4], rest[4];
		weights_pack<T>(a, p[2 * k], p[2 * k + 1]);
		if (REST) {
			weights_rest<T>(p[2 * k]);
			weights_rest<T>(p[2 * k + 1]);
			weights_pack<T>(rest, p[2 * k], p[2 * k + 1]);
		}
#pragma unroll
		for (int d = 0; d < D / 8; d += 2) {
			uint32_t b[4];
			load_matrices<true>(b, chunk_of<T, D>(values, k * 16 + lane % 16, d + lane / 16));
			mma<T>(state.o[d], a, b[0], b[1]);
			mma<T>(state.o[d + 1], a, b[2], b[3]);
			if (REST) {
				mma<T>(state.o[d], rest, b[0], b[1]);
				mma<T>(state.o[d + 1], rest, b[2], b[3]);
			}
		}
	}
}

/* All keys that rows of the block see in one sequence. */
template <class T, int D>
static __device__ __forceinline__ void part_run(const cuda_attention_call &call, prefill_memory<T, D> &memory, prefill_state<D> &state, const prefill_part &part, const uint32_t (&q)[D / 16][4],
                                                int64_t first_row, const int64_t (&visible)[2], int kv_head)
{
	const int64_t last = first_row + ROWS < part.end ? first_row + ROWS - 1 : part.end - 1; /* a later row never sees less */
	const int64_t longest = part_visible(call, part, last), tiles = (longest + KEYS - 1) / KEYS;
	const int64_t warp_last = first_row + (threadIdx.x / 32 + 1) * WARP_ROWS - 1;
	const int64_t warp_longest = part_visible(call, part, warp_last < part.end ? warp_last : part.end - 1);
	const T *key = attend_base<T>(call, part.sequence, 0, kv_head), *value = attend_base<T>(call, part.sequence, 1, kv_head);
	if (tiles == 0)
		return;
	tile_place<T, D>(call, memory, 0, part, 0);
	__syncthreads();
	tile_ask<T, D>(call, memory, 0, key, value, 0, part.sequence.keys);
	for (int64_t i = 0; i < tiles; i++) {
		const int stage = (int)(i % STAGES), next = (int)((i + 1) % STAGES);
		if (i + 1 < tiles)
			tile_place<T, D>(call, memory, next, part, (i + 1) * KEYS);
		__syncthreads(); /* the places are known, and nobody reads the other stage's tiles any more */
		if (i + 1 < tiles) {
			tile_ask<T, D>(call, memory, next, key, value, (i + 1) * KEYS, part.sequence.keys);
			asm volatile("cp.async.wait_group 1;");
		} else {
			asm volatile("cp.async.wait_group 0;");
		}
		__syncthreads();
		if (i * KEYS < warp_longest) {
			float s[KEYS / 8][4];
			tile_scores<T, D>(memory.tiles[stage][0], q, s);
			tile_weigh<D>(state, s, i * KEYS, visible, call.scale * ATTEND_LOG2E);
			tile_mix<T, D>(state, memory.tiles[stage][1], s);
		}
	}
}

template <class T> static __device__ __forceinline__ uint32_t query_pair(const T *query, bool there, int at)
{
	return there ? *reinterpret_cast<const uint32_t *>(query + at) : 0;
}

/* Grid: tile of query rows, head. */
template <class T, int D> static __global__ void __launch_bounds__(WARPS * 32, 2) attend_prefill(const __grid_constant__ cuda_attention_call call)
{
	extern __shared__ __align__(128) unsigned char bytes[];
	prefill_memory<T, D> &memory = *reinterpret_cast<prefill_memory<T, D> *>(bytes);
	const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, head = blockIdx.y, kv_head = head / (call.heads / call.kv_heads);
	prefill_part part;
	int64_t number, within;
	if (faulted_together(call.fault))
		return;
	if (call.paged && call.fault.word != NULL && blockIdx.x == 0 && head == 0)
		attend_check(call, threadIdx.x, blockDim.x);
	/* The last tiles, which see most, start first. */
	if (!tile_find(call, gridDim.x - 1 - blockIdx.x, number, within) || !part_get(call, number, part))
		return;
	const int64_t first_row = part.begin + within * ROWS, token = first_row + threadIdx.x / 32 * WARP_ROWS + g;
	const bool there[2] = {token < part.end, token + 8 < part.end};
	const T *query[2] = {attend_query<T>(call, there[0] ? token : part.begin, head), attend_query<T>(call, there[1] ? token + 8 : part.begin, head)};
	uint32_t q[D / 16][4];
#pragma unroll
	for (int k = 0; k < D / 16; k++) {
		q[k][0] = query_pair(query[0], there[0], k * 16 + 2 * t);
		q[k][1] = query_pair(query[1], there[1], k * 16 + 2 * t);
		q[k][2] = query_pair(query[0], there[0], k * 16 + 2 * t + 8);
		q[k][3] = query_pair(query[1], there[1], k * 16 + 2 * t + 8);
	}
	prefill_state<D> state = {{}, {-INFINITY, -INFINITY}, {0, 0}};
	const int64_t visible[2] = {part_visible(call, part, token), part_visible(call, part, token + 8)};
	part_run<T, D>(call, memory, state, part, q, first_row, visible, kv_head);
#pragma unroll
	for (int h = 0; h < 2; h++) {
		float sum = state.sum[h];
		sum += __shfl_xor_sync(0xffffffffu, sum, 1);
		sum += __shfl_xor_sync(0xffffffffu, sum, 2);
		if (!there[h])
			continue;
		T *y = (T *)call.y + ((token + 8 * h) * call.heads + head) * D;
#pragma unroll
		for (int d = 0; d < D / 8; d++)
			*reinterpret_cast<uint32_t *>(y + d * 8 + 2 * t) =
				visible[h] == 0 ? 0 : pair_of<T>(state.o[d][2 * h] / sum, state.o[d][2 * h + 1] / sum);
	}
}

template <class T, int D> static int prefill_launch(const struct cuda_attention_call *call, cudaStream_t stream)
{
	/* Paged: at most so many; how many queries each sequence has lies on the device. */
	const int64_t tiles = call->paged ? (call->tokens + ROWS - 1) / ROWS + call->sequences : (call->queries + ROWS - 1) / ROWS * call->sequences;
	const dim3 grid((unsigned)tiles, (unsigned)call->heads);
	const int bytes = (int)sizeof(prefill_memory<T, D>);
	cudaError_t failed = cudaFuncSetAttribute(attend_prefill<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
	if (failed != cudaSuccess)
		return (int)failed;
	attend_prefill<T, D><<<grid, WARPS * 32, bytes, stream>>>(*call);
	return launched();
}

int attend_prefill_launch(const struct cuda_attention_call *call, cudaStream_t stream)
{
	if (call->dtype == CUDA_BF16)
		return call->head_size == 64 ? prefill_launch<__nv_bfloat16, 64>(call, stream) : prefill_launch<__nv_bfloat16, 128>(call, stream);
	return call->head_size == 64 ? prefill_launch<__half, 64>(call, stream) : prefill_launch<__half, 128>(call, stream);
}
