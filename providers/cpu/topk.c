/* topk: a heap of the best seen so far, and a look at what follows for anything above its worst.
 *
 * Elements become unsigned keys in the catalogue's order (topk_kernel.c), 32 bits wide but for i64 and f64. A key above, and the index turned around below, make one
 * number that says which of two comes first, equal values by lower index: the heap is made of these, and lies in the result's indices. A block of
 * elements none of which is above the worst of the heap is passed over by the kernel. 64-bit keys don't fit: there the heap holds
 * indices, and their keys are made again. */
#include <string.h>

#include "providers/cpu/walk.h"
#include "uuid/cpu_topk.h"

/* Elements between two looks at the heap's worst. */
#define BLOCK 128

static bool topk_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	if (opd_tensor_last(x) > UINT32_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "last dimension %lld, at most %u", (long long)opd_tensor_last(x), UINT32_MAX);
	return cpu_accept_rows("x", x, reason);
}

/* Reading, and what is kept: a heap's sinks and its sort. */
static uint64_t topk_cost(const opd_impl *impl, const opd_call *call)
{
	const struct cpu_costs *costs = &cpu_kernels_of(impl)->costs;
	const opd_tensor *x = cpu_tensor(call, 0);
	return estimate_add(cpu_any_cost_ns(&costs->topk, x->dtype, x->elements), estimate_multiply(call->outputs[0]->elements, costs->topk_kept_ns));
}

struct topk_work {
	const struct cpu_topk_kernels *kernels;
	opd_dtype dtype;
	uint64_t bytes; /* of an element */
	struct cpu_rows x;
	unsigned char *values;
	uint64_t *indices;
	size_t count, k;
};

/* ---- A heap of numbers whose least is the root -------------------------------------------------------------------------------- */

static void heap_sink(uint64_t *heap, size_t size, size_t at)
{
	const uint64_t sinking = heap[at];
	for (size_t child; (child = 2 * at + 1) < size; at = child) {
		child += child + 1 < size && heap[child + 1] < heap[child];
		if (heap[child] >= sinking)
			break;
		heap[at] = heap[child];
	}
	heap[at] = sinking;
}

static void heap_make(uint64_t *heap, size_t size)
{
	for (size_t i = size / 2; i-- > 0;)
		heap_sink(heap, size, i);
}

/* The greatest first. */
static void heap_sort(uint64_t *heap, size_t size)
{
	while (size > 1) {
		uint64_t least = heap[0];
		heap[0] = heap[--size];
		heap[size] = least;
		heap_sink(heap, size, 0);
	}
}

/* ---- 32-bit keys ---------------------------------------------------------------------------------------------------------- */

static uint64_t topk_entry(uint32_t key, size_t index)
{
	return (uint64_t)key << 32 | (uint32_t)~(uint32_t)index;
}

/* Indices of the k best of a row, in order. */
static void topk_select(const struct topk_work *work, const unsigned char *x, uint64_t *heap)
{
	uint32_t keys[BLOCK];
	size_t filled = 0;
	for (size_t from = 0; from < work->count; from += BLOCK) {
		size_t here = work->count - from < BLOCK ? work->count - from : BLOCK, i = 0;
		uint32_t worst = filled == work->k ? (uint32_t)(heap[0] >> 32) : 0;
		bool above = work->kernels->keys[work->dtype](x + from * work->bytes, here, worst, keys);
		if (filled == work->k && !above)
			continue;
		for (; i < here && filled < work->k; i++) {
			heap[filled++] = topk_entry(keys[i], from + i);
			if (filled == work->k)
				heap_make(heap, work->k);
		}
		for (; i < here; i++) {
			if (topk_entry(keys[i], from + i) <= heap[0])
				continue;
			heap[0] = topk_entry(keys[i], from + i);
			heap_sink(heap, work->k, 0);
		}
	}
	heap_sort(heap, work->k);
	for (size_t i = 0; i < work->k; i++)
		heap[i] = (uint32_t)~(uint32_t)heap[i];
}

/* ---- 64-bit keys ---------------------------------------------------------------------------------------------------------- */

static uint64_t wide_key(const struct topk_work *work, const unsigned char *x, uint64_t index)
{
	uint64_t key;
	work->kernels->wide_keys[work->dtype](x + index * work->bytes, 1, &key);
	return key;
}

/* Element i comes before element j. */
static bool wide_before(const struct topk_work *work, const unsigned char *x, uint64_t i, uint64_t j)
{
	uint64_t a = wide_key(work, x, i), b = wide_key(work, x, j);
	return a > b || (a == b && i < j);
}

/* The root is the last in topk's order. */
static void wide_sink(const struct topk_work *work, const unsigned char *x, uint64_t *heap, size_t size, size_t at)
{
	const uint64_t sinking = heap[at];
	for (size_t child; (child = 2 * at + 1) < size; at = child) {
		child += child + 1 < size && wide_before(work, x, heap[child], heap[child + 1]);
		if (!wide_before(work, x, sinking, heap[child]))
			break;
		heap[at] = heap[child];
	}
	heap[at] = sinking;
}

static void wide_select(const struct topk_work *work, const unsigned char *x, uint64_t *heap)
{
	uint64_t keys[BLOCK];
	for (size_t i = 0; i < work->k; i++)
		heap[i] = i;
	for (size_t i = work->k / 2; i-- > 0;)
		wide_sink(work, x, heap, work->k, i);
	for (size_t from = work->k; from < work->count; from += BLOCK) {
		size_t here = work->count - from < BLOCK ? work->count - from : BLOCK;
		uint64_t worst = wide_key(work, x, heap[0]);
		work->kernels->wide_keys[work->dtype](x + from * work->bytes, here, keys);
		for (size_t i = 0; i < here; i++) {
			if (keys[i] <= worst) /* a later one of equals doesn't come before */
				continue;
			heap[0] = from + i;
			wide_sink(work, x, heap, work->k, 0);
			worst = wide_key(work, x, heap[0]);
		}
	}
	for (size_t size = work->k; size-- > 1;) {
		uint64_t last = heap[0];
		heap[0] = heap[size];
		heap[size] = last;
		wide_sink(work, x, heap, size, 0);
	}
}

/* ---- Rows ----------------------------------------------------------------------------------------------------------------- */

/* Elements as they are, a NaN's bits too; a bool is 0 or 1. */
static void topk_copy(const struct topk_work *work, const unsigned char *x, const uint64_t *indices, unsigned char *values)
{
	for (size_t i = 0; i < work->k; i++)
		memcpy(values + i * work->bytes, x + indices[i] * work->bytes, work->bytes);
	for (size_t i = 0; i < work->k && work->dtype == OPD_bool; i++)
		values[i] = values[i] != 0;
}

static void topk_rows(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct topk_work *work = context;
	for (uint64_t r = begin; r < end; r++) {
		const unsigned char *x = cpu_row(&work->x, r);
		uint64_t *indices = work->indices + r * work->k;
		if (work->bytes == sizeof(uint64_t))
			wide_select(work, x, indices);
		else
			topk_select(work, x, indices);
		topk_copy(work, x, indices, work->values + r * work->k * work->bytes);
	}
}

static opd_status topk_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	int64_t shape[OPD_RANK_MAX];
	memcpy(shape, x->shape, x->rank * sizeof shape[0]);
	shape[x->rank - 1] = call->args[1].i;
	opd_status status = cpu_expect_shape(impl, call, 0, x->dtype, x->rank, shape, error);
	if (status == OPD_OK)
		status = cpu_expect_shape(impl, call, 1, OPD_i64, x->rank, shape, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	struct topk_work work = {
		.kernels = cpu_kernels_of(impl)->topk,
		.dtype = x->dtype,
		.bytes = opd_dtype_bytes(x->dtype),
		.x = cpu_rows_of(x),
		.values = opd_tensor_data(call->outputs[0]),
		.indices = opd_tensor_data(call->outputs[1]),
		.count = (size_t)opd_tensor_last(x),
		.k = (size_t)call->args[1].i,
	};
	return cpu_for(exec, call->outputs[0]->elements / work.k, topk_cost(impl, call), topk_rows, &work, error);
}

const opd_impl cpu_topk = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "topk",
	.schema = "topk(Tensor x, int k) -> (Tensor, Tensor)",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_topk,
	.predicate = topk_predicate,
	.cost_ns = topk_cost,
	.run = topk_run,
};
