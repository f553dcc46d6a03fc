/* attention and paged_attention for any dtype, head size and alignment; the merge of stretches; the choice among the kernels. */
#include "providers/cuda/kernels/attend.cuh"

enum { WARPS = 4, PER_LANE = ATTEND_HEAD_MAX / 32, MERGE_THREADS = 128 };
/* So many queries a sequence, on average, share their keys through shared memory. */
enum { PREFILL_QUERIES = 4 };
/* Blocks of attend_decode that an H100 holds at once, and how many of them are a wave that is nearly full; waves after which it doesn't matter how full the last one is. */
enum { CHECK_THREADS = 128, CHECK_BLOCKS = 1024 };
enum { SLOTS = 264, NEARLY = SLOTS * 3 / 4, MANY_WAVES = 16 };

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

/* Parts first … last - 1 of a row and head, in order; their partial results are asked for together. */
static __device__ __forceinline__ attend_mixture parts_joined(const float *partial, int size, int d, unsigned first, unsigned last)
{
	enum { AT_ONCE = 8 };
	attend_mixture made = {{-INFINITY, 0}, 0};
	for (; first < last; first += AT_ONCE) {
		attend_mixture parts[AT_ONCE];
#pragma unroll
		for (int i = 0; i < AT_ONCE; i++) {
			const float *from = partial + (int64_t)(first + i) * (size + 2);
			parts[i] = {{-INFINITY, 0}, 0};
			if (first + i < last)
				parts[i] = {{from[size], from[size + 1]}, from[d]};
		}
#pragma unroll
		for (int i = 0; i < AT_ONCE; i++)
			if (first + i < last)
				made = attend_joined(made, parts[i]);
	}
	return made;
}

/* Of one query row and head: stretches are joined in order to chunks, and those in order to the result, whichever of the two the parts are: bits don't tell. */
template <class T> static __global__ void __launch_bounds__(MERGE_THREADS) attend_merge(const __grid_constant__ cuda_attention_call call, attend_parts parts)
{
	const int64_t token = blockIdx.x, head = blockIdx.y;
	const unsigned run = ATTEND_CHUNK / parts.several; /* parts of a chunk */
	attend_sequence sequence;
	behind_wait();
	if (!attend_find(call, token, false, sequence))
		return;
	const int64_t keys = (int64_t)parts.several * ATTEND_STRETCH;
	const unsigned used = (unsigned)((sequence.visible + keys - 1) / keys);
	const float *partial = attend_partial(call, token, head, parts.count, 0);
	for (int d = threadIdx.x; d < call.head_size; d += MERGE_THREADS) {
		attend_mixture made = {{-INFINITY, 0}, 0};
		if (run == 1)
			made = parts_joined(partial, call.head_size, d, 0, used);
		else
			for (unsigned first = 0; first < used; first += run)
				made = attend_joined(made, parts_joined(partial, call.head_size, d, first, min(first + run, used)));
		((T *)call.y)[(token * call.heads + head) * call.head_size + d] = from_f32<T>(used == 0 ? 0 : made.mixed / made.share.sum);
	}
}

int attend_any_launch(const struct cuda_attention_call *call, unsigned stretches, cudaStream_t stream)
{
	const dim3 grid((unsigned)call->tokens, (unsigned)call->heads, stretches);
	CUDA_BY_DTYPE(call->dtype, T, launch_behind(attend_any<T>, grid, WARPS * 32, stream, *call));
	return launched();
}

/* Starts, lengths and entries of the table, of sequences without queries or of `all`, by all threads together: a table may have more entries than one block could look at within minutes. */
static __global__ void check(const __grid_constant__ cuda_attention_call call, bool all)
{
	const int64_t thread = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, threads = (int64_t)gridDim.x * blockDim.x;
	if (faulted(call.fault))
		return;
	attend_check_sequences(call, thread, threads);
	for (int64_t i = thread; i < call.sequences * call.table_blocks; i += threads) {
		const int64_t b = i / call.table_blocks, entry = i % call.table_blocks;
		if (entry * call.block_size < attend_unread(call, b, all))
			attend_entry_ok(call, b, entry);
	}
}

static int check_launch(const struct cuda_attention_call *call, bool all, cudaStream_t stream)
{
	const int64_t entries = call->sequences * call->table_blocks, blocks = (entries + CHECK_THREADS - 1) / CHECK_THREADS;
	check<<<(unsigned)(blocks < 1 ? 1 : blocks > CHECK_BLOCKS ? CHECK_BLOCKS : blocks), CHECK_THREADS, 0, stream>>>(*call, all);
	return launched();
}

int cuda_attention_check_launch(const struct cuda_attention_call *call, cudaStream_t stream)
{
	return call->paged && call->fault.word != NULL ? check_launch(call, true, stream) : 0;
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

/* Blocks that take a chunk each keep the device busy to the end. */
static bool chunks_fill(int64_t blocks)
{
	const int64_t last = blocks % SLOTS;
	return blocks >= NEARLY && (last == 0 || last >= NEARLY || blocks >= MANY_WAVES * SLOTS);
}

/* Chunks whole where there are enough of them: partial results are written to memory and read again, 10 of 370 us for 64 sequences of 4096 keys. Few sequences are cut into stretches. */
static struct attend_parts parts_of(const struct cuda_attention_call *call, unsigned stretches)
{
	const unsigned chunks = (stretches + ATTEND_CHUNK - 1) / ATTEND_CHUNK;
	if (stretches == 1) /* a block takes them all, whatever they are */
		return (struct attend_parts){1, (unsigned)((call->keys + ATTEND_STRETCH - 1) / ATTEND_STRETCH)};
	if (!chunks_fill(call->tokens * attend_decode_places(call) * chunks))
		return (struct attend_parts){stretches, 1};
	return (struct attend_parts){chunks, ATTEND_CHUNK};
}

static int attention_launch(const struct cuda_attention_call *call, cudaStream_t stream)
{
	const unsigned stretches = stretches_of(call);
	struct attend_parts parts = {stretches, 1};
	int failed = 0;
	if (!attend_decode_takes(call))
		failed = attend_any_launch(call, stretches, stream);
	else if (call->tokens >= PREFILL_QUERIES * call->sequences)
		return attend_prefill_launch(call, stream);
	else {
		parts = parts_of(call, stretches);
		failed = attend_decode_launch(call, parts, stream);
	}
	if (failed != 0 || parts.count == 1)
		return failed;
	const dim3 grid((unsigned)call->tokens, (unsigned)call->heads);
	CUDA_BY_DTYPE(call->dtype, T, launch_behind(attend_merge<T>, grid, MERGE_THREADS, stream, *call, parts));
	return launched();
}

int cuda_attention_launch(const struct cuda_attention_call *call, cudaStream_t stream)
{
	struct cuda_attention_call made = *call;
	made.checked_apart = call->paged && call->fault.word != NULL && call->sequences * call->table_blocks > ATTEND_CHECKED_BESIDE;
	const int failed = made.checked_apart ? check_launch(call, false, stream) : 0;
	return failed != 0 ? failed : attention_launch(&made, stream);
}
