/* add, sub, mul: NumPy's broadcasting over operands of any strides, any dtype but bool. */
#include "providers/cpu/walk.h"
#include "uuid/cpu_arithmetic.h"

/* Elements that are an item. */
#define ITEM 4096

static bool arithmetic_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)state;
	const opd_tensor *a = cpu_tensor(call, false);
	if (cpu_kernels_of(impl)->arithmetic->run[CPU_ADD][a->dtype] == NULL)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "a %s, only integers and floats", opd_dtype_name(a->dtype));
	return true;
}

static uint64_t arithmetic_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *y = call->outputs[0];
	return cpu_any_cost_ns(&cpu_kernels_of(impl)->costs.arithmetic, y->dtype, y->elements);
}

struct arithmetic_work {
	cpu_arithmetic_fn kernel;
	struct walk walk;
	unsigned char *y;
	uint64_t elements;
	uint64_t bytes; /* of an element */
	enum cpu_reach reach;
};

/* Operands that are neither contiguous nor one element repeated are gathered, chunk by chunk. */
static void arithmetic_run_strided(const struct arithmetic_work *work, struct walk_run run, unsigned char *y)
{
	unsigned char buffers[WALK_OPERANDS][WALK_CHUNK * sizeof(uint64_t)] __attribute__((aligned(64)));
	while (run.count > 0) {
		uint64_t count = run.count < WALK_CHUNK ? run.count : WALK_CHUNK;
		const void *operands[WALK_OPERANDS];
		for (int k = 0; k < WALK_OPERANDS; k++) {
			operands[k] = run.data[k];
			if (run.strides[k] > 1) {
				walk_gather(buffers[k], run.data[k], run.strides[k], count, work->bytes);
				operands[k] = buffers[k];
			}
			run.data[k] += count * run.strides[k] * work->bytes;
		}
		work->kernel(operands[0], run.strides[0] != 0, operands[1], run.strides[1] != 0, y, (size_t)count, CPU_NEAR);
		y += count * work->bytes;
		run.count -= count;
	}
}

static void arithmetic_items(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct arithmetic_work *work = context;
	uint64_t stop = end * ITEM < work->elements ? end * ITEM : work->elements;
	for (uint64_t i = begin * ITEM; i < stop;) {
		struct walk_run run = walk_run_at(&work->walk, i, stop - i);
		unsigned char *y = work->y + i * work->bytes;
		if (run.strides[0] <= 1 && run.strides[1] <= 1)
			work->kernel(run.data[0], run.strides[0], run.data[1], run.strides[1], y, (size_t)run.count, work->reach);
		else
			arithmetic_run_strided(work, run, y);
		i += run.count;
	}
	cpu_streamed(work->reach != CPU_NEAR);
}

/* The shape that two operands broadcast to, whose extents the host has matched. */
static uint32_t broadcast_shape(const opd_tensor *a, const opd_tensor *b, int64_t *shape)
{
	uint32_t rank = a->rank > b->rank ? a->rank : b->rank;
	for (uint32_t i = 0; i < rank; i++) { /* i counts from the last dimension */
		int64_t of_a = i < a->rank ? a->shape[a->rank - 1 - i] : 1;
		int64_t of_b = i < b->rank ? b->shape[b->rank - 1 - i] : 1;
		shape[rank - 1 - i] = of_a == 1 ? of_b : of_a;
	}
	return rank;
}

static opd_status arithmetic_run(const opd_impl *impl, const opd_call *call, const opd_exec *exec, unsigned operation, opd_error *error)
{
	const opd_tensor *a = cpu_tensor(call, false);
	const opd_tensor *b = cpu_tensor(call, 1);
	int64_t shape[OPD_RANK_MAX];
	uint32_t rank = broadcast_shape(a, b, shape);
	opd_status status = cpu_expect_shape(impl, call, 0, a->dtype, rank, shape, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	struct arithmetic_work work = {
		.kernel = cpu_kernels_of(impl)->arithmetic->run[operation][a->dtype],
		.walk = walk_over(call->outputs[0], a, b),
		.y = opd_tensor_data(call->outputs[0]),
		.elements = call->outputs[0]->elements,
		.bytes = opd_dtype_bytes(a->dtype),
	};
	work.reach = cpu_reach((a->elements + b->elements + work.elements) * work.bytes);
	return cpu_for(exec, (work.elements + ITEM - 1) / ITEM, arithmetic_cost(impl, call), arithmetic_items, &work, error);
}

#define IMPL(name, operation)                                                                                                  \
	static opd_status name##_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error) \
	{                                                                                                                          \
		(void)state;                                                                                                           \
		return arithmetic_run(impl, call, exec, operation, error);                                                             \
	}                                                                                                                          \
	const opd_impl cpu_##name = {                                                                                              \
		.struct_bytes = sizeof(opd_impl),                                                                                      \
		.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,                                                         \
		.op = #name,                                                                                                           \
		.schema = #name "(Tensor a, Tensor b) -> Tensor",                                                                      \
		.device = "cpu",                                                                                                       \
		.uuid = OPD_UUID_cpu_arithmetic,                                                                                       \
		.predicate = arithmetic_predicate,                                                                                     \
		.cost_ns = arithmetic_cost,                                                                                            \
		.run = name##_run,                                                                                                     \
	};
IMPL(add, CPU_ADD)
IMPL(sub, CPU_SUB)
IMPL(mul, CPU_MUL)
