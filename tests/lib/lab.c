#include "tests/lib/lab.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "providers/builtin.h"

struct lab_counts lab_counts;
static _Atomic bool gate_open;

void lab_reset(void)
{
	/* One by one: a lane's thread of the last test may have counted without anything that orders it before this. */
	atomic_store(&lab_counts.predicates, 0);
	atomic_store(&lab_counts.reasons, 0);
	atomic_store(&lab_counts.plans, 0);
	atomic_store(&lab_counts.plans_freed, 0);
	atomic_store(&lab_counts.runs, 0);
	atomic_store(&lab_counts.waiting, 0);
	atomic_store(&lab_counts.working_most, 0);
	atomic_store(&lab_counts.shapes, 0);
	atomic_store(&lab_counts.data_in_shape, 0);
	lab_gate(false);
}

void lab_gate(bool open)
{
	atomic_store(&gate_open, open);
}

/* ---- Ops ---- */

static opd_status same_shape(const opd_tensor *x, opd_output *output)
{
	output->dtype = x->dtype;
	output->rank = x->rank;
	for (uint32_t i = 0; i < x->rank; i++)
		output->shape[i] = x->shape[i];
	return OPD_OK;
}

static opd_status scale_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *x = call->args[0].tensor;
	(void)op;
	(void)atomic_fetch_add(&lab_counts.shapes, 1);
	if (x->data != NULL)
		(void)atomic_fetch_add(&lab_counts.data_in_shape, 1);
	if (x->dtype != OPD_f32)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "lab_scale: x is %s, expected f32", opd_dtype_name(x->dtype));
	return same_shape(x, outputs[0]);
}

opd_status lab_shape_longer(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	opd_status status = scale_shape(op, call, outputs, error);
	if (status == OPD_OK && outputs[0]->rank > 0)
		outputs[0]->shape[0]++;
	return status;
}

static opd_status any_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	(void)op;
	(void)error;
	return same_shape(call->args[0].tensor, outputs[0]);
}

/* Row-major number of an element to its address. */
static const float *element(const opd_tensor *x, uint64_t index)
{
	int64_t at = 0;
	for (uint32_t d = x->rank; d-- > 0;) {
		at += (int64_t)(index % (uint64_t)x->shape[d]) * x->strides[d];
		index /= (uint64_t)x->shape[d];
	}
	return (const float *)opd_tensor_data(x) + at;
}

static void scale(const opd_tensor *x, double factor, const opd_tensor *y)
{
	for (uint64_t i = 0; i < y->elements; i++)
		((float *)opd_tensor_data(y))[i] = (float)(*element(x, i) * factor);
}

opd_status lab_scale_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl;
	(void)state;
	(void)exec;
	(void)atomic_fetch_add(&lab_counts.runs, 1);
	if (!opd_tensor_same_shape(call->args[0].tensor, call->outputs[0]))
		return opd_fail(error, OPD_INTERNAL, "lab_scale: the output's shape isn't x's");
	scale(call->args[0].tensor, call->args[1].f, call->outputs[0]);
	return OPD_OK;
}

static opd_status wait_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl;
	(void)state;
	(void)exec;
	(void)error;
	(void)atomic_fetch_add(&lab_counts.waiting, 1);
	while (!atomic_load(&gate_open))
		(void)nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
	scale(call->args[0].tensor, call->args[1].f, call->outputs[0]);
	return OPD_OK;
}

/* y = factor * x, after `ns` of the estimate's time */
static uint64_t work_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return call->args[2].i < 0 ? 100 : (uint64_t)call->args[2].i; /* of a negative time nobody is told */
}

static opd_status work_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	struct timespec now;
	(void)impl;
	(void)state;
	(void)exec;
	const uint64_t running = atomic_fetch_add(&lab_counts.working, 1) + 1;
	uint64_t most = atomic_load(&lab_counts.working_most);
	while (running > most && !atomic_compare_exchange_weak(&lab_counts.working_most, &most, running))
		;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	const int64_t end = now.tv_sec * 1000000000 + now.tv_nsec + llabs(call->args[2].i);
	while (now.tv_sec * 1000000000 + now.tv_nsec < end)
		(void)clock_gettime(CLOCK_MONOTONIC, &now);
	/* Somebody else should be here too: give it time to come. */
	for (int i = 0; i < 10000 && call->args[3].b && atomic_load(&lab_counts.working_most) < 2; i++)
		(void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	scale(call->args[0].tensor, call->args[1].f, call->outputs[0]);
	(void)atomic_fetch_sub(&lab_counts.working, 1);
	return call->args[1].f >= 0 ? OPD_OK : opd_fail(error, OPD_INTERNAL, "lab_work: the factor is %g", call->args[1].f);
}

static opd_status types_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl;
	(void)state;
	(void)exec;
	(void)error;
	scale(call->args[0].tensor, 1, call->outputs[0]);
	return OPD_OK;
}

static opd_status generate_scale(const opd_op *op, opd_generator *generator, opd_error *error)
{
	(void)op;
	if (generator->variant > 0)
		return opd_fail(error, OPD_OUT_OF_RANGE, "lab: one variant");
	void *x = generator->tensor(generator, "x", generator->dtype, 1, generator->dims);
	if (x == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "lab: x");
	generator->fill(generator, x, generator->dtype, (uint64_t)generator->dims[0], 1);
	return OPD_OK;
}

/* ---- One that may work in place: y = x + by ---- */

static opd_status add_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	if (!opd_tensor_same_shape(call->args[0].tensor, call->args[1].tensor))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "lab_add: by has another shape than x");
	return any_shape(op, call, outputs, error);
}

static opd_status add_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const float *x = opd_tensor_data(call->args[0].tensor), *by = opd_tensor_data(call->args[1].tensor);
	float *y = opd_tensor_data(call->outputs[0]);
	(void)impl;
	(void)state;
	(void)exec;
	(void)error;
	for (uint64_t i = 0; i < call->outputs[0]->elements; i++)
		y[i] = x[i] + by[i];
	return OPD_OK;
}

static opd_status run_halfway(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl;
	(void)state;
	(void)exec;
	memset(opd_tensor_data(call->outputs[0]), 0xff, call->outputs[0]->elements * sizeof(float) / 2);
	return opd_fail(error, OPD_INTERNAL, "halfway: it always stops there");
}

static opd_status generate_work(const opd_op *op, opd_generator *generator, opd_error *error)
{
	opd_status status = generate_scale(op, generator, error);
	if (status != OPD_OK)
		return status;
	generator->set_float(generator, "factor", 2);
	generator->set_int(generator, "ns", 1000);
	return OPD_OK;
}

static opd_status generate_add(const opd_op *op, opd_generator *generator, opd_error *error)
{
	opd_status status = generate_scale(op, generator, error);
	void *by = status == OPD_OK ? generator->tensor(generator, "by", generator->dtype, 1, generator->dims) : NULL;
	if (by == NULL)
		return status == OPD_OK ? opd_fail(error, OPD_RESOURCE_EXHAUSTED, "lab: by") : status;
	generator->fill(generator, by, generator->dtype, (uint64_t)generator->dims[0], 1);
	return OPD_OK;
}

#define IMPL(op_name, text, function, ...)                                                                                       \
	{                                                                                                                            \
		.struct_bytes = sizeof(opd_impl), .op = (op_name), .schema = (text), .device = "cpu", .uuid = LAB_UUID,                  \
		.run = (function), __VA_ARGS__                                                                                           \
	}
#define MODULE(id, function)                                                                                                     \
	static const opd_module module_##id = {                                                                                      \
	    .abi = OPD_PROVIDER_ABI, .struct_bytes = sizeof(opd_module), .name = #id, .version = "test", .open = (function)}

static const opd_impl scale_native = IMPL("lab_scale", NULL, lab_scale_run);
static const opd_impl wait_native = IMPL("lab_wait", NULL, wait_run);
static const opd_impl work_native = IMPL("lab_work", NULL, work_run, .cost_ns = work_cost);
static const opd_impl add_native = IMPL("lab_add", NULL, add_run, .flags = OPD_IMPL_IN_PLACE);
static const opd_impl types_native = IMPL("lab_types", NULL, types_run);
static const int64_t default_dims[] = {16};

const opd_op lab_scale = {
    .struct_bytes = sizeof lab_scale,
    .schema = LAB_SCALE,
    .doc = "y = factor * x",
    .activations = "x",
    .shape = scale_shape,
    .generate = generate_scale,
    .dims = "elements",
    .default_dims = default_dims,
    .dim_count = 1,
    .native = &scale_native,
};
static const opd_op lab_wait = {
    .struct_bytes = sizeof lab_wait,
    .schema = "lab_wait(Tensor x, float factor=2.0) -> Tensor",
    .doc = "waits for the gate",
    .activations = "x",
    .shape = any_shape,
    .generate = generate_scale,
    .dims = "elements",
    .default_dims = default_dims,
    .dim_count = 1,
    .native = &wait_native,
};
static const opd_op lab_work = {
    .struct_bytes = sizeof lab_work,
    .schema = "lab_work(Tensor x, float factor, int ns, bool company=False) -> Tensor",
    .doc = "takes its time; fails with a negative factor",
    .activations = "x",
    .shape = any_shape,
    .generate = generate_work,
    .dims = "elements",
    .default_dims = default_dims,
    .dim_count = 1,
    .native = &work_native,
};
static const opd_in_place add_pairs[] = {{0, 0}};
static const opd_op lab_add = {
    .struct_bytes = sizeof lab_add,
    .schema = LAB_ADD,
    .doc = "y = x + by, in place where x is donated",
    .activations = "x,by",
    .shape = add_shape,
    .generate = generate_add,
    .dims = "elements",
    .default_dims = default_dims,
    .dim_count = 1,
    .in_place = add_pairs,
    .in_place_count = 1,
    .native = &add_native,
};
static const opd_op lab_types = {
    .struct_bytes = sizeof lab_types,
    .schema = LAB_TYPES,
    .doc = "one parameter of every type",
    .activations = "x",
    .shape = any_shape,
    .generate = generate_scale,
    .dims = "elements",
    .default_dims = default_dims,
    .dim_count = 1,
    .native = &types_native,
};

static opd_status open_lab(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	opd_status status = host->register_op(host, &lab_scale, error);
	if (status == OPD_OK)
		status = host->register_op(host, &lab_wait, error);
	if (status == OPD_OK)
		status = host->register_op(host, &lab_work, error);
	if (status == OPD_OK)
		status = host->register_op(host, &lab_add, error);
	return status == OPD_OK ? host->register_op(host, &lab_types, error) : status;
}
MODULE(lab, open_lab);

/* ---- Providers ---- */

static bool takes_even(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl;
	(void)state;
	const opd_tensor *x = call->args[0].tensor;
	if (x->elements % 2 == 0)
		return true;
	(void)atomic_fetch_add(&lab_counts.predicates, 1);
	if (reason != NULL)
		(void)atomic_fetch_add(&lab_counts.reasons, 1);
	return OPD_REFUSE(reason, OPD_REASON_SHAPE, "x has %llu elements, an odd number", (unsigned long long)x->elements);
}

static bool takes_all(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl;
	(void)state;
	(void)call;
	(void)reason;
	return true;
}

static bool takes_aligned(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl;
	(void)state;
	if (call->args[0].tensor->alignment >= OPD_TENSOR_ALIGNMENT)
		return true;
	return OPD_REFUSE(reason, OPD_REASON_ALIGNMENT, "x is aligned to %u bytes, expected 64", call->args[0].tensor->alignment);
}

static void plan_free(void *data)
{
	(void)atomic_fetch_add(&lab_counts.plans_freed, 1);
	free(data);
}

static opd_status plan_small(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan, opd_reason *reason,
                             opd_error *error)
{
	(void)impl;
	(void)state;
	(void)atomic_fetch_add(&lab_counts.plans, 1);
	if (call->args[0].tensor->elements > 8) {
		opd_reason_set(reason, OPD_REASON_SIZE, "x has %llu elements, at most 8",
		               (unsigned long long)call->args[0].tensor->elements);
		return OPD_FAILED_PRECONDITION;
	}
	plan->data = malloc(16);
	plan->destroy = plan_free;
	plan->scratch_bytes = 256;
	return plan->data != NULL ? OPD_OK : opd_fail(error, OPD_RESOURCE_EXHAUSTED, "planner: out of memory");
}

static opd_status run_planned(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	if (exec->plan == NULL || exec->plan->data == NULL || exec->scratch == NULL)
		return opd_fail(error, OPD_INTERNAL, "planner: no plan, or no scratch");
	memset(exec->scratch, 1, exec->plan->scratch_bytes);
	return lab_scale_run(impl, state, call, exec, error);
}

static opd_status run_breaks(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl;
	(void)state;
	(void)exec;
	memset(opd_tensor_data(call->outputs[0]), 0xff, call->outputs[0]->elements * sizeof(float));
	return opd_fail(error, OPD_INTERNAL, "breaks: it always does");
}

static opd_status run_spills(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	opd_status status = lab_scale_run(impl, state, call, exec, error);
	((volatile unsigned char *)opd_tensor_data(call->outputs[0]))[call->outputs[0]->elements * sizeof(float)] = 1;
	return status;
}

#define PROVIDER(id, text, function, ...) PROVIDER_OF(id, "lab_scale", text, function, __VA_ARGS__)
#define PROVIDER_OF(id, op_name, text, function, ...)                                                                            \
	static const opd_impl impl_##id = IMPL(op_name, text, function, __VA_ARGS__);                                                \
	static opd_status open_##id(const opd_host *host, void *state, opd_error *error)                                             \
	{                                                                                                                            \
		(void)state;                                                                                                             \
		return host->register_impl(host, &impl_##id, error);                                                                     \
	}                                                                                                                            \
	MODULE(id, open_##id)

PROVIDER(even_only, LAB_SCALE, lab_scale_run, .predicate = takes_even);
PROVIDER(plain, LAB_SCALE, lab_scale_run, .user = NULL);
PROVIDER(absent, LAB_SCALE, lab_scale_run, .unsupported = "needs a flux capacitor");
PROVIDER(planner, LAB_SCALE, run_planned, .plan = plan_small, .flags = OPD_IMPL_PLAN_MAY_REFUSE);
PROVIDER(breaks, LAB_SCALE, run_breaks, .predicate = takes_all);
PROVIDER(spills, LAB_SCALE, run_spills, .predicate = takes_all);
PROVIDER(older, "lab_scale(Tensor x, float factor=2.0) -> Tensor", lab_scale_run, .user = NULL);
PROVIDER_OF(aside, "lab_add", LAB_ADD, add_run, .user = NULL);
PROVIDER_OF(halfway, "lab_add", LAB_ADD, run_halfway, .predicate = takes_all, .flags = OPD_IMPL_IN_PLACE);
PROVIDER(picky, LAB_SCALE, lab_scale_run, .predicate = takes_aligned);

/* ---- A device in host memory: everything that is enqueued is done at once ---- */

static opd_status toy_info(void *state, uint32_t ordinal, opd_device_info *info, opd_error *error)
{
	(void)state;
	(void)error;
	info->memory_bytes = 1u << 30;
	(void)snprintf(info->name, sizeof info->name, "toy %u", (unsigned)ordinal);
	return OPD_OK;
}

static opd_status toy_alloc(void *state, uint32_t ordinal, uint64_t bytes, void **memory_out, opd_error *error)
{
	(void)state;
	(void)ordinal;
	*memory_out = aligned_alloc(64, (bytes + 64) / 64 * 64);
	return *memory_out != NULL ? OPD_OK : opd_fail(error, OPD_RESOURCE_EXHAUSTED, "toy: out of memory");
}

static void toy_free(void *state, uint32_t ordinal, void *memory)
{
	(void)state;
	(void)ordinal;
	free(memory);
}

/* Streams and events are one byte each, so that a sanitizer tells who forgets one. */
static opd_status toy_object(void *state, uint32_t ordinal, void **object_out, opd_error *error)
{
	(void)state;
	(void)ordinal;
	*object_out = malloc(1);
	return *object_out != NULL ? OPD_OK : opd_fail(error, OPD_RESOURCE_EXHAUSTED, "toy: out of memory");
}

static void toy_object_free(void *state, void *object)
{
	(void)state;
	free(object);
}

static opd_status toy_copy_in(void *state, void *stream, void *to, uint64_t to_offset, const void *from, uint64_t bytes,
                              opd_error *error)
{
	(void)state;
	(void)stream;
	(void)error;
	memcpy((char *)to + to_offset, from, bytes);
	return OPD_OK;
}

static opd_status toy_copy_out(void *state, void *stream, void *to, const void *from, uint64_t from_offset, uint64_t bytes,
                               opd_error *error)
{
	(void)state;
	(void)stream;
	(void)error;
	memcpy(to, (const char *)from + from_offset, bytes);
	return OPD_OK;
}

static opd_status toy_copy_device(void *state, void *stream, void *to, uint64_t to_offset, const void *from, uint64_t from_offset,
                                  uint64_t bytes, opd_error *error)
{
	(void)state;
	(void)stream;
	(void)error;
	memcpy((char *)to + to_offset, (const char *)from + from_offset, bytes);
	return OPD_OK;
}

static opd_status toy_record(void *state, void *event, void *stream, opd_error *error)
{
	(void)state;
	(void)event;
	(void)stream;
	(void)error;
	return OPD_OK;
}

static opd_status toy_query(void *state, void *event, opd_error *error)
{
	(void)state;
	(void)event;
	(void)error;
	return OPD_OK;
}

static const opd_backend toy_backend = {
    .struct_bytes = sizeof toy_backend,
    .device_count = 2,
    .kind = "toy",
    .device_info = toy_info,
    .alloc = toy_alloc,
    .free = toy_free,
    .stream_create = toy_object,
    .stream_destroy = toy_object_free,
    .copy_in = toy_copy_in,
    .copy_out = toy_copy_out,
    .copy_device = toy_copy_device,
    .event_create = toy_object,
    .event_destroy = toy_object_free,
    .event_record = toy_record,
    .event_query = toy_query,
};
static const opd_impl impl_toy = {
    .struct_bytes = sizeof impl_toy,
    .op = "lab_scale",
    .schema = LAB_SCALE,
    .device = "toy",
    .uuid = LAB_UUID,
    .run = lab_scale_run,
};

static opd_status open_toy(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	opd_status status = host->register_backend(host, &toy_backend, error);
	return status == OPD_OK ? host->register_impl(host, &impl_toy, error) : status;
}
MODULE(toy, open_toy);

const opd_module *const lab_modules[] = {
    &module_lab,   &module_even_only, &module_plain, &module_absent, &module_planner, &module_breaks, &module_aside, &module_halfway, &module_spills,
    &module_older, &module_picky,     &module_toy,   NULL,
};

opd_status lab_open(struct registry *registry, opd_error *error)
{
	opd_status status = OPD_OK;
	for (size_t i = 0; status == OPD_OK && lab_modules[i] != NULL; i++)
		status = registry_open_builtin(registry, lab_modules[i], error);
	return status;
}
