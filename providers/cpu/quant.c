/* static_quant_fp8 and dynamic_quant_fp8: rows or runs to the kernels, and where the scale comes from. */
#include <stdatomic.h>
#include <string.h>

#include "providers/cpu/walk.h"
#include "uuid/cpu_quant.h"

/* Elements that are an item, where one scale is for all of x: a multiple of WALK_CHUNK. */
#define ITEM 4096

/* The largest finite f8_e4m3fn, and the least scale: below it f32's denormals would cost precision, and zeros would divide by zero. */
#define LARGEST 448.0f
#define SCALE_LEAST (1.0f / (448.0f * 512.0f))

/* One scale for all of x. */
struct quant_all {
	const struct cpu_quant_kernels *kernels;
	unsigned dtype;
	struct walk walk;
	unsigned char *y;
	uint64_t elements;
	float factor;
	_Atomic uint32_t *largest; /* bits of a float that isn't negative: they rise with the number */
};

static struct quant_all quant_all_of(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	return (struct quant_all){
		.kernels = cpu_kernels_of(impl)->quant,
		.dtype = cpu_dtype_index(x->dtype),
		.walk = walk_over(call->outputs[0], x, NULL),
		.y = opd_tensor_data(call->outputs[0]),
		.elements = x->elements,
	};
}

/* Calls `visit` for the pieces of items [begin, end) that lie side by side. */
static void quant_all_visit(const struct quant_all *all, uint64_t begin, uint64_t end,
                            void (*visit)(const struct quant_all *all, const void *x, uint64_t index, uint64_t count))
{
	unsigned char gathered[WALK_CHUNK * sizeof(float)] __attribute__((aligned(64)));
	uint64_t stop = end * ITEM < all->elements ? end * ITEM : all->elements;
	uint64_t index = begin * ITEM;
	struct walk_run run = walk_run_at(&all->walk, index, stop - index);
	if (run.count == stop - index && run.strides[0] == 1) {
		visit(all, run.data[0], index, run.count);
		return;
	}
	for (uint64_t count; index < stop; index += count) {
		count = stop - index < WALK_CHUNK ? stop - index : WALK_CHUNK;
		visit(all, walk_elements(&all->walk, index, count, gathered), index, count);
	}
}

static void visit_scale(const struct quant_all *all, const void *x, uint64_t index, uint64_t count)
{
	all->kernels->scale[all->dtype](x, all->y + index, (size_t)count, all->factor);
}

static void quant_all_scale(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	quant_all_visit(context, begin, end, visit_scale);
}

/* The maximum doesn't depend on the order. */
static void visit_largest(const struct quant_all *all, const void *x, uint64_t index, uint64_t count)
{
	(void)index;
	float largest = all->kernels->largest[all->dtype](x, (size_t)count);
	uint32_t bits, seen = atomic_load_explicit(all->largest, memory_order_relaxed);
	memcpy(&bits, &largest, sizeof bits);
	while (bits > seen && !atomic_compare_exchange_weak(all->largest, &seen, bits))
		continue;
}

static void quant_all_largest(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	quant_all_visit(context, begin, end, visit_largest);
}

static uint64_t quant_items(const opd_tensor *x)
{
	return (x->elements + ITEM - 1) / ITEM;
}

static bool quant_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return cpu_accept_dtype(cpu_tensor(call, 0), reason);
}

static uint64_t scale_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_cost_ns(&cpu_kernels_of(impl)->costs.quant_scale, x->dtype, x->elements);
}

static uint64_t largest_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_cost_ns(&cpu_kernels_of(impl)->costs.quant_largest, x->dtype, x->elements);
}

/* ---- static_quant_fp8 --------------------------------------------------------------------------------------------------- */

static opd_status static_quant_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	opd_status status = cpu_expect_shape(impl, call, 0, OPD_f8_e4m3fn, x->rank, x->shape, error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	struct quant_all all = quant_all_of(impl, call);
	all.factor = 1.0f / *(const float *)opd_tensor_data(cpu_tensor(call, 1));
	return cpu_for(exec, quant_items(x), scale_cost(impl, call), quant_all_scale, &all, error);
}

const opd_impl cpu_static_quant_fp8 = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "static_quant_fp8",
	.schema = "static_quant_fp8(Tensor x, Tensor scale) -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_quant,
	.predicate = quant_predicate,
	.cost_ns = scale_cost,
	.run = static_quant_run,
};

/* ---- dynamic_quant_fp8 -------------------------------------------------------------------------------------------------- */

static float scale_of(float largest)
{
	float scale = largest / LARGEST;
	return scale > SCALE_LEAST ? scale : SCALE_LEAST;
}

static bool dynamic_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	return quant_predicate(impl, state, call, reason) && (!call->args[1].b || cpu_accept_rows("x", x, reason));
}

static uint64_t dynamic_cost(const opd_impl *impl, const opd_call *call)
{
	return scale_cost(impl, call) + largest_cost(impl, call);
}

/* One scale a row. */
struct quant_rows {
	const struct cpu_quant_kernels *kernels;
	unsigned dtype;
	struct cpu_rows x;
	unsigned char *y;
	float *scales;
	size_t count;
};

static void quant_rows_run(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct quant_rows *rows = context;
	for (uint64_t r = begin; r < end; r++) {
		const void *x = cpu_row(&rows->x, r);
		float scale = scale_of(rows->kernels->largest[rows->dtype](x, rows->count));
		rows->scales[r] = scale;
		rows->kernels->scale[rows->dtype](x, rows->y + r * rows->count, rows->count, 1.0f / scale);
	}
}

static opd_status dynamic_rows(const opd_impl *impl, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	const opd_tensor *scales = call->outputs[1];
	struct quant_rows rows = {
		.kernels = cpu_kernels_of(impl)->quant,
		.dtype = cpu_dtype_index(x->dtype),
		.y = opd_tensor_data(call->outputs[0]),
		.scales = opd_tensor_data(scales),
		.count = (size_t)opd_tensor_last(x),
	};
	for (uint64_t r = 0; x->elements == 0 && r < scales->elements; r++)
		rows.scales[r] = scale_of(0.0f);
	if (x->elements == 0)
		return OPD_OK;
	rows.x = cpu_rows_of(x);
	return cpu_for(exec, scales->elements, dynamic_cost(impl, call), quant_rows_run, &rows, error);
}

static opd_status dynamic_all(const opd_impl *impl, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	_Atomic uint32_t largest_bits = 0;
	float largest, *scale = opd_tensor_data(call->outputs[1]);
	if (x->elements == 0) {
		*scale = scale_of(0.0f);
		return OPD_OK;
	}
	struct quant_all all = quant_all_of(impl, call);
	all.largest = &largest_bits;
	opd_status status = cpu_for(exec, quant_items(x), largest_cost(impl, call), quant_all_largest, &all, error);
	if (status != OPD_OK)
		return status;
	uint32_t bits = atomic_load(&largest_bits);
	memcpy(&largest, &bits, sizeof largest);
	*scale = scale_of(largest);
	all.factor = 1.0f / *scale;
	return cpu_for(exec, quant_items(x), scale_cost(impl, call), quant_all_scale, &all, error);
}

static opd_status dynamic_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	bool per_token = call->args[1].b;
	int64_t shape[OPD_RANK_MAX] = {1};
	for (uint32_t i = 0; i < x->rank && per_token; i++)
		shape[i] = i + 1 == x->rank ? 1 : x->shape[i];
	opd_status status = cpu_expect_shape(impl, call, 0, OPD_f8_e4m3fn, x->rank, x->shape, error);
	if (status == OPD_OK)
		status = cpu_expect_shape(impl, call, 1, OPD_f32, per_token ? x->rank : 1, shape, error);
	if (status != OPD_OK)
		return status;
	return per_token ? dynamic_rows(impl, call, exec, error) : dynamic_all(impl, call, exec, error);
}

const opd_impl cpu_dynamic_quant_fp8 = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "dynamic_quant_fp8",
	.schema = "dynamic_quant_fp8(Tensor x, bool per_token) -> (Tensor, Tensor)",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_quant,
	.predicate = dynamic_predicate,
	.cost_ns = dynamic_cost,
	.run = dynamic_run,
};
