/* What the attention kernels share: which keys a query sees, where they lie, and partial results of stretches of keys.
 *
 * Layer: providers/cuda, device code. A stretch's partial result is o [D] (sum of p·v over its own sum), its maximum and its sum; stretches are merged in order.
 * Not here: the loops over keys (attend_any.cu, attend_decode.cu, attend_prefill.cu). */
#ifndef OPD_CUDA_ATTEND_CUH
#define OPD_CUDA_ATTEND_CUH

#include "providers/cuda/kernels/mma.cuh"

/* Keys a stretch: fixed, so that a decode step's bits depend on its own sequence alone. */
enum { ATTEND_STRETCH = 512 };
/* Stretches a chunk, fixed too: partial results are joined to those of chunks and then to the whole, whether a block has taken a stretch or a chunk. */
enum { ATTEND_CHUNK = 8 };
enum { PAGED_TABLE = 3, PAGED_LENGTHS = 4, PAGED_STARTS = 5 };
enum { ATTEND_HEAD_MAX = 512 };

/* exp(x) = 2^(x·log2 e) */
#define ATTEND_LOG2E 1.4426950408889634f

/* How a call's keys are cut for blocks: `count` parts of `several` stretches each; 1: all of them, for one block. */
struct attend_parts {
	unsigned count;
	unsigned several;
};

int attend_any_launch(const struct cuda_attention_call *call, unsigned stretches, cudaStream_t stream);
bool attend_decode_takes(const struct cuda_attention_call *call);
/* The same calls, made for many queries a sequence. */
int attend_prefill_launch(const struct cuda_attention_call *call, cudaStream_t stream);
int attend_decode_launch(const struct cuda_attention_call *call, struct attend_parts parts, cudaStream_t stream);
/* Blocks a token and part. */
int64_t attend_decode_places(const struct cuda_attention_call *call);

/* A query row's sequence. */
struct attend_sequence {
	int64_t number;
	int64_t query;   /* its place among the sequence's */
	int64_t queries;
	int64_t keys;
	int64_t visible; /* the first so many keys */
};

static __device__ __forceinline__ int64_t attend_visible(const cuda_attention_call &call, int64_t query, int64_t queries, int64_t keys)
{
	int64_t visible = call.causal ? query + keys - queries + 1 : keys;
	return visible < 0 ? 0 : visible > keys ? keys : visible;
}

/* Entry of sequence b's row of the table. */
static __device__ __forceinline__ int64_t attend_block(const cuda_attention_call &call, int64_t b, int64_t entry)
{
	const int64_t at = b * call.table_stride + entry;
	return call.table.wide ? ((const int64_t *)call.table.data)[at] : ((const int32_t *)call.table.data)[at];
}

/* Entries of a table that a call's first block looks at beside its own work; more are looked at by a kernel of their own. */
enum { ATTEND_CHECKED_BESIDE = 65536 };

/* A sequence's keys, for whom the table says where they lie, and whether anybody reads them: who does has checked the entries it uses. */
static __device__ __forceinline__ int64_t attend_unread(const cuda_attention_call &call, int64_t b, bool all)
{
	return all || index_at(call.starts, b + 1) <= index_at(call.starts, b) ? index_at(call.lengths, b) : 0;
}

static __device__ __forceinline__ bool attend_entry_ok(const cuda_attention_call &call, int64_t b, int64_t entry)
{
	return index_ok(call.fault, PAGED_TABLE, b * call.table_blocks + entry, attend_block(call, b, entry), 0, call.blocks - 1);
}

/* Starts and lengths of all sequences, by `threads` threads. */
static __device__ __forceinline__ void attend_check_sequences(const cuda_attention_call &call, int64_t thread, int64_t threads)
{
	if (thread == 0) {
		index_ok(call.fault, PAGED_STARTS, 0, index_at(call.starts, 0), 0, 0);
		index_ok(call.fault, PAGED_STARTS, call.sequences, index_at(call.starts, call.sequences), call.tokens, call.tokens);
	}
	for (int64_t b = thread; b < call.sequences; b += threads) {
		const int64_t begin = index_at(call.starts, b), end = index_at(call.starts, b + 1);
		if (index_ok(call.fault, PAGED_STARTS, b + 1, end, begin, call.tokens))
			index_ok(call.fault, PAGED_LENGTHS, b, index_at(call.lengths, b), end - begin, call.keys);
	}
}

/* One block of a call, thread `thread` of `threads`, looks at all starts and lengths, and at the entries that nobody reads by. */
static __device__ __forceinline__ void attend_check(const cuda_attention_call &call, unsigned thread, unsigned threads)
{
	if (call.checked_apart)
		return;
	attend_check_sequences(call, thread, threads);
	for (int64_t b = thread; b < call.sequences; b += threads) {
		const int64_t keys = attend_unread(call, b, false);
		for (int64_t entry = 0; entry * call.block_size < keys && entry < call.table_blocks; entry++)
			attend_entry_ok(call, b, entry);
	}
}

/* The sequence of a query row, by the block's threads together; false: none that is in range, or an earlier fault. */
static __device__ __forceinline__ bool attend_find(const cuda_attention_call &call, int64_t token, bool check, attend_sequence &made)
{
	__shared__ int64_t found;
	if (!call.paged) {
		made.number = token / call.queries;
		made.query = token % call.queries;
		made.queries = call.queries;
		made.keys = call.keys;
		made.visible = attend_visible(call, made.query, made.queries, made.keys);
		return true;
	}
	/* A decode step has one query a sequence: looked at first, without waiting for anybody. */
	const bool guessed = token < call.sequences;
	int64_t begin = guessed ? index_at(call.starts, token) : 0, end = guessed ? index_at(call.starts, token + 1) : 0;
	made.number = token;
	made.keys = guessed ? index_at(call.lengths, token) : 0;
	if (faulted_together(call.fault))
		return false;
	if (check && call.fault.word != NULL && threadIdx.x + 32 >= blockDim.x) /* the last warp: the others needn't wait */
		attend_check(call, threadIdx.x % 32, 32);
	if (!guessed || token < begin || token >= end) {
		if (threadIdx.x == 0)
			found = -1;
		__syncthreads();
		for (int64_t b = threadIdx.x; b < call.sequences; b += blockDim.x)
			if (index_at(call.starts, b) <= token && token < index_at(call.starts, b + 1))
				found = b;
		__syncthreads();
		if (found < 0)
			return false;
		made.number = found;
		begin = index_at(call.starts, found);
		end = index_at(call.starts, found + 1);
		made.keys = index_at(call.lengths, found);
	}
	made.query = token - begin;
	made.queries = end - begin;
	if (begin < 0 || made.keys < made.queries || made.keys > call.keys)
		return false; /* attend_check reports it */
	made.visible = attend_visible(call, made.query, made.queries, made.keys);
	return true;
}

/* The table's entry for key j of a sequence; an unsigned j is divided faster, and keys fit into an int. */
template <class J> static __device__ __forceinline__ int64_t attend_entry(const cuda_attention_call &call, J j)
{
	return (int64_t)(j / (J)call.block_size);
}

/* Row number of key j of the sequence in the block that the table says, for strides of tokens; 0 after reporting a bad block. */
template <class J> static __device__ __forceinline__ int64_t attend_row_in(const cuda_attention_call &call, const attend_sequence &sequence, J j, int64_t block)
{
	if (!index_ok(call.fault, PAGED_TABLE, sequence.number * call.table_blocks + attend_entry(call, j), block, 0, call.blocks - 1))
		return 0;
	return block * call.block_size + (int64_t)(j % (J)call.block_size);
}

/* The same for any call. */
template <class J> static __device__ __forceinline__ int64_t attend_row(const cuda_attention_call &call, const attend_sequence &sequence, J j)
{
	if (!call.paged)
		return (int64_t)j;
	return attend_row_in(call, sequence, j, attend_block(call, sequence.number, attend_entry(call, j)));
}

/* Where a sequence's keys (which 0) or values (1) of a head begin. */
template <class T> static __device__ __forceinline__ const T *attend_base(const cuda_attention_call &call, const attend_sequence &sequence, int which, int64_t kv_head)
{
	const T *base = (const T *)(which == 0 ? call.key : call.value) + kv_head * call.key_head_stride[which];
	return call.paged ? base : base + sequence.number * call.key_sequence_stride[which];
}

template <class T> static __device__ __forceinline__ const T *attend_query(const cuda_attention_call &call, int64_t token, int64_t head)
{
	return (const T *)call.query + token * call.query_stride + head * call.query_head_stride;
}

/* Partial results in scratch: o [D], maximum, sum for (token, head, part). */
static __device__ __forceinline__ float *attend_partial(const cuda_attention_call &call, int64_t token, int64_t head, unsigned parts, unsigned part)
{
	return (float *)call.scratch + ((token * call.heads + head) * parts + part) * (call.head_size + 2);
}

struct attend_share {
	float maximum;
	float sum;
};

/* An element of some keys' result: of their sum of p·v. */
struct attend_mixture {
	attend_share share;
	float mixed;
};

/* Of the keys of a and then those of b. One order of operations for all who join: the compiler has no choice. Nothing yet is {-inf, 0}, 0. */
static __device__ __forceinline__ attend_mixture attend_joined(const attend_mixture &a, const attend_mixture &b)
{
	const float maximum = fmaxf(a.share.maximum, b.share.maximum), base = maximum == -INFINITY ? 0 : maximum;
	const float of_a = expf(a.share.maximum - base), of_b = expf(b.share.maximum - base);
	return {{maximum, fmaf(a.share.sum, of_a, b.share.sum * of_b)}, fmaf(a.mixed, of_a, b.mixed * of_b)};
}

static __device__ __forceinline__ void attend_partial_store(float *partial, int size, int d, const attend_mixture &made)
{
	partial[d] = made.mixed;
	if (d == 0) {
		partial[size] = made.share.maximum;
		partial[size + 1] = made.share.sum;
	}
}

#endif
