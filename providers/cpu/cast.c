/* cast: any dtype to any, of any strides; one step, or two through a chunk on the stack (cast_kernel.c says why the bits are right). */
#include <string.h>

#include "providers/cpu/walk.h"
#include "uuid/cpu_cast.h"

/* Elements that are an item: a multiple of WALK_CHUNK. */
#define ITEM 4096

static uint64_t cast_cost(const opd_impl *impl, const opd_call *call)
{
	const struct cpu_costs *costs = &cpu_kernels_of(impl)->costs;
	const opd_tensor *x = cpu_tensor(call, false);
	const opd_tensor *y = call->outputs[0];
	uint64_t in = cpu_any_cost_ns(&costs->cast, x->dtype, x->elements), out = cpu_any_cost_ns(&costs->cast, y->dtype, y->elements);
	return in > out ? in : out;
}

struct cast_work {
	cpu_cast_fn steps[3]; /* first to last; NULL behind the last */
	struct walk walk;
	unsigned char *y;
	uint64_t elements;
	uint64_t bytes; /* of an element of y */
	enum cpu_reach reach;
};

/* What leads from one dtype to another, in at most three steps. */
static void cast_plan(struct cast_work *work, const struct cpu_cast_kernels *kernels, opd_dtype from, opd_dtype to)
{
	cpu_cast_fn *step = work->steps;
	bool narrow = kernels->narrow[OPD_f32][to] != NULL;
	if (kernels->narrow[from][to] != NULL) {
		*step = kernels->narrow[from][to];
	} else if (kernels->narrow[from][OPD_f32] != NULL) {
		*step++ = kernels->narrow[from][OPD_f32];
		*step = kernels->from_f32[to];
	} else if (from == OPD_f64 && (to == OPD_f32 || !narrow)) {
		*step = kernels->from_f64[to];
	} else if (from == OPD_f64) {
		*step++ = kernels->odd[OPD_f64];
		*step = kernels->narrow[OPD_f32][to];
	} else if (narrow && kernels->small_to_f32[from] != NULL) {
		*step++ = kernels->small_to_f32[from];
		*step = kernels->narrow[OPD_f32][to];
	} else if (narrow && to != OPD_f32) {
		*step++ = kernels->to_i64[from];
		*step++ = kernels->odd[OPD_i64];
		*step = kernels->narrow[OPD_f32][to];
	} else {
		*step++ = kernels->to_i64[from];
		*step = kernels->from_i64[to];
	}
}

/* At most WALK_CHUNK elements. */
static void cast_chunk(const struct cast_work *work, const void *x, unsigned char *y, size_t count)
{
	unsigned char buffers[2][WALK_CHUNK * sizeof(uint64_t)] __attribute__((aligned(64)));
	for (int i = 0; i < 2 && work->steps[i + 1] != NULL; i++) {
		work->steps[i](x, buffers[i], count, CPU_NEAR);
		x = buffers[i];
	}
	work->steps[work->steps[1] == NULL ? 0 : work->steps[2] == NULL ? 1 : 2](x, y, count, CPU_NEAR);
}

static void cast_items(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct cast_work *work = context;
	unsigned char gathered[WALK_CHUNK * sizeof(uint64_t)] __attribute__((aligned(64)));
	uint64_t stop = end * ITEM < work->elements ? end * ITEM : work->elements;
	uint64_t i = begin * ITEM;
	struct walk_run run = walk_run_at(&work->walk, i, stop - i);
	if (work->steps[1] == NULL && run.count == stop - i && run.strides[0] == 1) {
		work->steps[0](run.data[0], work->y + i * work->bytes, (size_t)run.count, work->reach);
		cpu_streamed(work->reach != CPU_NEAR);
		return;
	}
	for (uint64_t count; i < stop; i += count) {
		count = stop - i < WALK_CHUNK ? stop - i : WALK_CHUNK;
		cast_chunk(work, walk_elements(&work->walk, i, count, gathered), work->y + i * work->bytes, (size_t)count);
	}
}

static opd_status cast_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, false);
	opd_dtype to = opd_dtype_parse(call->args[1].str);
	opd_status status = cpu_expect_shape(impl, call, 0, to, x->rank, x->shape, error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct cast_work work = {
		.walk = walk_over(call->outputs[0], x, NULL),
		.y = opd_tensor_data(call->outputs[0]),
		.elements = x->elements,
		.bytes = opd_dtype_bytes(to),
		.reach = cpu_reach(x->elements * (opd_dtype_bytes(x->dtype) + opd_dtype_bytes(to))),
	};
	cast_plan(&work, cpu_kernels_of(impl)->cast, x->dtype, to);
	return cpu_for(exec, (x->elements + ITEM - 1) / ITEM, cast_cost(impl, call), cast_items, &work, error);
}

const opd_impl cpu_cast = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "cast",
	.schema = "cast(Tensor x, str dtype) -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_cast,
	.cost_ns = cast_cost,
	.run = cast_run,
};
