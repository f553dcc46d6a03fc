/* Attention of few queries, f16 and bf16, head sizes 64 and 128: the time is that of reading keys and values once.
 *
 * A warp takes 16 keys at a time. Scores are K·Qᵀ: the keys are the matrix unit's 16 rows, read 16 bytes at a time straight into its registers, the query heads that share
 * them its 8 columns. The result is Vᵀ·Pᵀ: a lane reads 8 neighbouring elements of four values and pairs them by token; which dimension a row of the product is follows
 * from that. So nothing passes through shared memory until the warps' results are merged, and no key or value is read twice. */
#include <type_traits>

#include "providers/cuda/kernels/attend.cuh"

enum { WARPS = 8, KEYS = 16, GROUP = 8 };
/* Blocks that leave each of an H100's multiprocessors one at most. */
enum { FEW_BLOCKS = 132 };

template <class T, int D> struct decode_state {
	float o[D / 16][4];
	float maximum[2];
	float sum[2];
};

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

template <class T, int D> static __device__ __forceinline__ void decode_scores(float (&s)[4], const uint4 *q, const uint4 (&k)[D / 32][2])
{
	const int lane = threadIdx.x % 32;
#pragma unroll
	for (int i = 0; i < 4; i++)
		s[i] = 0;
#pragma unroll
	for (int i = 0; i < D / 32; i++) {
		const uint32_t low[4] = {k[i][0].x, k[i][1].x, k[i][0].y, k[i][1].y}, high[4] = {k[i][0].z, k[i][1].z, k[i][0].w, k[i][1].w};
		const uint4 words = q[i * 32 + lane];
		mma<T>(s, low, words.x, words.y);
		mma<T>(s, high, words.z, words.w);
	}
}

template <class T, int D>
static __device__ __forceinline__ void decode_mix(decode_state<T, D> &state, float (&s)[4], const uint4 (&v)[D / 64][4], int first, int end, float scale)
{
	const int g = threadIdx.x % 32 / 4;
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

/* Where the keys of a block's head lie; those of its stretch end before `end`. */
template <class T> struct decode_keys {
	const T *base[2];
	int64_t stride[2];
	int end;
};

/* A tile's keys and values. Lane i knows the row of key i % 16. */
template <class T, int D> struct decode_words {
	uint4 k[D / 32][2], v[D / 64][4];
};

template <class T, int D> static __device__ __forceinline__ void decode_load(const decode_keys<T> &keys, int row, int first, decode_words<T, D> &words)
{
	const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
	for (int h = 0; h < 2; h++) {
		const T *from = keys.base[0] + (int64_t)__shfl_sync(0xffffffffu, row, g + 8 * h) * keys.stride[0] + t * 8;
#pragma unroll
		for (int i = 0; i < D / 32; i++)
			words.k[i][h] = row_words(from + i * 32);
	}
#pragma unroll
	for (int i = 0; i < 4; i++) {
		const int at = 2 * t + i % 2 + i / 2 * 8;
		const T *from = keys.base[1] + (int64_t)__shfl_sync(0xffffffffu, row, at) * keys.stride[1] + g * 8;
#pragma unroll
		for (int h = 0; h < D / 64; h++) /* what lies past the end weighs nothing, and may be NaN */
			words.v[h][i] = first + at < keys.end ? row_words(from + h * 64) : make_uint4(0, 0, 0, 0);
	}
}

template <class T, int D>
static __device__ __forceinline__ void decode_tile(const cuda_attention_call &call, decode_state<T, D> &state, const uint4 *q, const decode_words<T, D> &words, int first, int end)
{
	float s[4];
	decode_scores<T, D>(s, q, words.k);
	decode_mix<T, D>(state, s, words.v, first, end, call.scale * ATTEND_LOG2E);
}

/* Row of the key that this lane looks up for the tile at `first`. */
static __device__ __forceinline__ int decode_row(const cuda_attention_call &call, const attend_sequence &sequence, int first, int end)
{
	const int key = first + threadIdx.x % 32 % KEYS;
	return key < end ? (int)attend_row(call, sequence, (unsigned)key) : 0;
}

/* A warp's tiles of a stretch: first, first + 128, …; where the next one lies is looked up while one is computed. WIDE: with the registers of two blocks, the next one's keys and values are
 * on their way too, for when there are too few blocks to hide that wait. */
template <class T, int D, bool WIDE>
static __device__ __forceinline__ void decode_tiles(const cuda_attention_call &call, const attend_sequence &sequence, const decode_keys<T> &keys, decode_state<T, D> &state, const uint4 *q, int first,
                                                    int row)
{
	enum { STEP = WARPS * KEYS };
	if (!WIDE) {
		for (; first < keys.end; first += STEP) {
			decode_words<T, D> words;
			decode_load<T, D>(keys, row, first, words);
			row = decode_row(call, sequence, first + STEP, keys.end);
			decode_tile<T, D>(call, state, q, words, first, keys.end);
		}
		return;
	}
	decode_words<T, D> words[2];
	if (first < keys.end)
		decode_load<T, D>(keys, row, first, words[0]);
	row = decode_row(call, sequence, first + STEP, keys.end);
	for (; first < keys.end; first += 2 * STEP) {
		if (first + STEP < keys.end)
			decode_load<T, D>(keys, row, first + STEP, words[1]);
		row = decode_row(call, sequence, first + 2 * STEP, keys.end);
		decode_tile<T, D>(call, state, q, words[0], first, keys.end);
		if (first + STEP >= keys.end)
			break;
		if (first + 2 * STEP < keys.end)
			decode_load<T, D>(keys, row, first + 2 * STEP, words[0]);
		row = decode_row(call, sequence, first + 3 * STEP, keys.end);
		decode_tile<T, D>(call, state, q, words[1], first + STEP, keys.end);
	}
}

template <int D> struct decode_memory {
	float parts[WARPS][GROUP][D], maxima[WARPS][GROUP], sums[WARPS][GROUP];
	uint4 q[D / 32 * 32];       /* as each lane of a warp wants it */
	float mixed[GROUP][D];      /* of the block's stretches so far */
	attend_share shares[2][GROUP]; /* theirs; before this stretch and after it */
};

template <class T, int D> static __device__ __forceinline__ void decode_publish(decode_memory<D> &memory, decode_state<T, D> &state)
{
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
	for (int h = 0; h < 2; h++) {
#pragma unroll
		for (int step = 4; step < 32; step *= 2)
			state.sum[h] += __shfl_xor_sync(0xffffffffu, state.sum[h], step);
		memory.maxima[warp][2 * t + h] = state.maximum[h];
		memory.sums[warp][2 * t + h] = state.sum[h];
#pragma unroll
		for (int j = 0; j < D / 16; j++) {
			memory.parts[warp][2 * t + h][dimension<D>(j, g, 0)] = state.o[j][h];
			memory.parts[warp][2 * t + h][dimension<D>(j, g, 1)] = state.o[j][h + 2];
		}
	}
}

/* Element d of head h of a stretch: its warps' parts, in order. */
template <int D> static __device__ __forceinline__ attend_mixture decode_stretch(const decode_memory<D> &memory, int h, int d)
{
	attend_mixture made = {{-INFINITY, 0}, 0};
#pragma unroll
	for (int w = 0; w < WARPS; w++)
		made.share.maximum = fmaxf(made.share.maximum, memory.maxima[w][h]);
#pragma unroll
	for (int w = 0; w < WARPS; w++) {
		const float share = memory.maxima[w][h] == -INFINITY ? 0 : exp2f(memory.maxima[w][h] - made.share.maximum);
		made.share.sum = fmaf(memory.sums[w][h], share, made.share.sum);
		made.mixed = fmaf(memory.parts[w][h][d], share, made.mixed);
	}
	made.share.maximum /= ATTEND_LOG2E;
	return made;
}

/* What a block asks for before it knows of its sequence: its queries, and the table's entry for its first tile where the sequence is the token's. */
template <class T, int D> struct decode_ahead {
	uint4 q;
	int64_t entry;
};

template <class T, int D> static __device__ __forceinline__ decode_ahead<T, D> decode_ask(const cuda_attention_call &call, int64_t token, int head, int heads, int first)
{
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
	const int64_t entry = call.paged ? attend_entry(call, (unsigned)(first + lane % KEYS)) : 0;
	decode_ahead<T, D> made = {make_uint4(0, 0, 0, 0), 0};
	if (warp < D / 32 && g < heads)
		made.q = row_words(attend_query<T>(call, token, head + g) + warp * 32 + t * 8);
	if (call.paged && token < call.sequences && entry < call.table_blocks)
		made.entry = attend_block(call, token, entry);
	return made;
}

template <class T, int D>
static __device__ __forceinline__ int decode_first_row(const cuda_attention_call &call, const attend_sequence &sequence, const decode_ahead<T, D> &ahead, int64_t token, int first, int end)
{
	const int key = first + threadIdx.x % 32 % KEYS;
	if (!call.paged || sequence.number != token)
		return decode_row(call, sequence, first, end);
	return key < end ? (int)attend_row_in(call, sequence, (unsigned)key, ahead.entry) : 0;
}

/* Grid: token, and in it kv head and group of its heads; part of the keys: `several` stretches, whose results are joined in order. */
template <class T, int D, bool WIDE>
static __global__ void __launch_bounds__(WARPS * 32, WIDE ? 1 : 2) attend_decode(const __grid_constant__ cuda_attention_call call, unsigned several)
{
	__shared__ decode_memory<D> memory;
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
	const int group = call.heads / call.kv_heads, groups = (group + GROUP - 1) / GROUP;
	const unsigned places = (unsigned)(call.kv_heads * groups), place = blockIdx.x % places, part = blockIdx.y, parts = gridDim.y;
	const int64_t token = blockIdx.x / places;
	const int kv_head = place / groups, head = kv_head * group + place % groups * GROUP, heads = min(GROUP, (kv_head + 1) * group - head);
	int begin = (int)(part * several * ATTEND_STRETCH);
	attend_sequence sequence;
	behind_wait();
	const decode_ahead<T, D> ahead = decode_ask<T, D>(call, token, head, heads, begin + warp * KEYS);
	if (!attend_find(call, token, token == 0 && place == 0 && part == 0, sequence) || (begin >= sequence.visible && parts > 1))
		return;
	const int last = (int)min(sequence.visible, (int64_t)begin + several * ATTEND_STRETCH);
	decode_keys<T> keys = {{attend_base<T>(call, sequence, 0, kv_head), attend_base<T>(call, sequence, 1, kv_head)}, {call.key_stride[0], call.key_stride[1]}, min(begin + ATTEND_STRETCH, last)};
	int row = decode_first_row<T, D>(call, sequence, ahead, token, begin + warp * KEYS, keys.end);
	if (warp < D / 32)
		memory.q[warp * 32 + lane] = ahead.q;
	__syncthreads();
	for (int turn = 0;; turn ^= 1) {
		decode_state<T, D> state = {{}, {-INFINITY, -INFINITY}, {0, 0}};
		decode_tiles<T, D, WIDE>(call, sequence, keys, state, memory.q, begin + warp * KEYS, row);
		decode_publish<T, D>(memory, state);
		__syncthreads();
		const bool is_first = begin == (int)(part * several * ATTEND_STRETCH), is_last = keys.end == last;
		for (int i = threadIdx.x; i < heads * D; i += WARPS * 32) {
			const int h = i / D, d = i % D;
			attend_mixture made = decode_stretch<D>(memory, h, d);
			if (!is_first)
				made = attend_joined({memory.shares[turn][h], memory.mixed[h][d]}, made);
			if (!is_last) {
				memory.mixed[h][d] = made.mixed;
				if (d == 0)
					memory.shares[turn ^ 1][h] = made.share;
			} else if (parts == 1) {
				((T *)call.y)[(token * call.heads + head + h) * D + d] = from_f32<T>(sequence.visible == 0 ? 0 : made.mixed / made.share.sum);
			} else {
				attend_partial_store(attend_partial(call, token, head + h, parts, part), D, d, made);
			}
		}
		if (is_last)
			return;
		begin = keys.end;
		keys.end = min(begin + ATTEND_STRETCH, last);
		row = decode_row(call, sequence, begin + warp * KEYS, keys.end);
		__syncthreads();
	}
}

bool attend_decode_takes(const struct cuda_attention_call *call)
{
	bool aligned = aligned16(call->query) && aligned16(call->key) && aligned16(call->value) && call->query_stride % 8 == 0 && call->query_head_stride % 8 == 0;
	for (int i = 0; i < 2; i++)
		aligned = aligned && call->key_stride[i] % 8 == 0 && call->key_head_stride[i] % 8 == 0 && call->key_sequence_stride[i] % 8 == 0;
	return aligned && call->dtype != CUDA_F32 && (call->head_size == 64 || call->head_size == 128);
}

template <class T, int D> static void decode_launch(const struct cuda_attention_call *call, struct attend_parts parts, cudaStream_t stream)
{
	const dim3 grid((unsigned)(call->tokens * attend_decode_places(call)), parts.count);
	if (parts.count > 1 && (uint64_t)grid.x * grid.y <= FEW_BLOCKS) /* one stretch alone is no faster WIDE: 6.5 us against 6.3 for 256 keys; eight are: 14.9 against 17.3 */
		launch_behind(attend_decode<T, D, true>, grid, WARPS * 32, stream, *call, parts.several);
	else
		launch_behind(attend_decode<T, D, false>, grid, WARPS * 32, stream, *call, parts.several);
}

int64_t attend_decode_places(const struct cuda_attention_call *call)
{
	const int group = call->heads / call->kv_heads;
	return (int64_t)call->kv_heads * ((group + GROUP - 1) / GROUP);
}

int attend_decode_launch(const struct cuda_attention_call *call, struct attend_parts parts, cudaStream_t stream)
{
	const bool bf16 = call->dtype == CUDA_BF16;
	if (call->head_size == 64 && bf16)
		decode_launch<__nv_bfloat16, 64>(call, parts, stream);
	else if (call->head_size == 64)
		decode_launch<__half, 64>(call, parts, stream);
	else if (bf16)
		decode_launch<__nv_bfloat16, 128>(call, parts, stream);
	else
		decode_launch<__half, 128>(call, parts, stream);
	return launched();
}
