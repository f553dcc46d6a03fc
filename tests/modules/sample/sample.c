/* A provider of somebody else: rms_norm of f32, with a predicate, a plan and scratch. */
#include <opd/provider.h>

#include <math.h>
#include <stdlib.h>

/* The weight is widened into scratch once a call, and the scratch is bounded: longer rows are refused by the plan. */
enum { HIDDEN_MAX = 65536 };

/* Parameters of rms_norm's schema. */
enum { X, WEIGHT, EPSILON, VARIANCE_SIZE };

/* What the plan keeps for all calls of one set of shapes. */
struct norm_plan {
	uint64_t rows;
	uint64_t hidden;
	uint64_t summed; /* elements of a row that the variance is taken over */
};

/* Only what can't be done is a reason; whether it should be done here is the operator's priority list. */
static bool norm_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = call->args[X].tensor;
	if (x->dtype != OPD_f32)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "x %s, only f32", opd_dtype_name(x->dtype));
	if (!opd_tensor_contiguous(x))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "x is strided");
	if (call->args[WEIGHT].kind == OPD_ARG_NONE)
		return true;
	const opd_tensor *weight = call->args[WEIGHT].tensor;
	if (weight->dtype != OPD_f32)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "weight %s, x f32", opd_dtype_name(weight->dtype));
	return true;
}

static opd_status norm_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason,
                            opd_error *error)
{
	(void)impl, (void)state;
	const opd_tensor *x = call->args[X].tensor;
	const int64_t hidden = opd_tensor_last(x);
	if (hidden > HIDDEN_MAX) {
		opd_reason_set(reason, OPD_REASON_SIZE, "%lld elements a row, at most %d", (long long)hidden, HIDDEN_MAX);
		return OPD_FAILED_PRECONDITION;
	}
	struct norm_plan *plan = malloc(sizeof *plan);
	if (plan == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "sample.rms_norm: no memory for a plan");
	*plan = (struct norm_plan){
	    .rows = hidden == 0 ? 0 : x->elements / (uint64_t)hidden,
	    .hidden = (uint64_t)hidden,
	    .summed = call->args[VARIANCE_SIZE].kind == OPD_ARG_INT ? (uint64_t)call->args[VARIANCE_SIZE].i : (uint64_t)hidden,
	};
	plan_out->scratch_bytes = call->args[WEIGHT].kind == OPD_ARG_TENSOR ? plan->hidden * sizeof(float) : 0;
	plan_out->memory_bytes = sizeof *plan;
	plan_out->data = plan;
	plan_out->destroy = free;
	return OPD_OK;
}

/* One parallel loop over the rows. */
struct norm_loop {
	const struct norm_plan *plan;
	const float *x;
	const float *weight; /* NULL: none */
	float *y;
	double epsilon;
};

static void norm_rows(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct norm_loop *loop = argument;
	const uint64_t hidden = loop->plan->hidden;
	for (uint64_t row = begin; row < end; row++) {
		const float *x = loop->x + row * hidden;
		float *y = loop->y + row * hidden;
		double sum = 0;
		for (uint64_t i = 0; i < loop->plan->summed; i++)
			sum += (double)x[i] * (double)x[i];
		/* The op's mean square is an f32: what overflows there must overflow here. */
		const float mean = (float)(sum / (double)loop->plan->summed);
		const float scale = 1 / sqrtf(mean + (float)loop->epsilon);
		for (uint64_t i = 0; i < hidden; i++)
			y[i] = x[i] * scale * (loop->weight == NULL ? 1 : loop->weight[i]);
	}
}

/* A weight may have any stride; rows want it dense. */
static void widen_weight(const opd_tensor *weight, float *to)
{
	const float *from = opd_tensor_data(weight);
	for (int64_t i = 0; i < weight->shape[0]; i++)
		to[i] = from[i * weight->strides[0]];
}

static opd_status norm_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl, (void)state;
	const opd_tensor *x = call->args[X].tensor;
	const opd_tensor *y = call->outputs[0];
	const struct norm_plan *plan = exec->plan->data;
	if (y->dtype != OPD_f32 || !opd_tensor_same_shape(x, y))
		return opd_fail(error, OPD_INTERNAL, "sample.rms_norm: the result isn't f32 of x's shape");
	struct norm_loop loop = {.plan = plan, .x = opd_tensor_data(x), .y = opd_tensor_data(y), .epsilon = call->args[EPSILON].f};
	if (call->args[WEIGHT].kind == OPD_ARG_TENSOR) {
		widen_weight(call->args[WEIGHT].tensor, exec->scratch);
		loop.weight = exec->scratch;
	}
	exec->host->parallel_for(exec, plan->rows, plan->hidden == 0 ? 1 : 1 + 16384 / plan->hidden, norm_rows, &loop);
	return OPD_OK;
}

static uint64_t norm_cost_ns(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return 200 + call->args[X].tensor->elements / 2;
}

static const opd_impl rms_norm = {
    .struct_bytes = sizeof rms_norm,
    .flags = OPD_IMPL_PLAN_MAY_REFUSE | OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
    .op = "rms_norm",
    .schema = "rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor",
    .device = "cpu",
    .uuid = SAMPLE_UUID,
    .predicate = norm_supports,
    .plan = norm_plan,
    .cost_ns = norm_cost_ns,
    .run = norm_run,
};

static opd_status sample_open(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	return host->register_impl(host, &rms_norm, error);
}

static const opd_module module = {
    .abi = OPD_PROVIDER_ABI,
    .struct_bytes = sizeof module,
    .name = "sample",
    .version = "1.2.3",
    .open = sample_open,
};

const opd_module *opd_module_get(void)
{
	return &module;
}
