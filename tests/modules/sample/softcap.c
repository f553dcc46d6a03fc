/* An op of somebody else: softcap(x) = cap·tanh(x/cap), which keeps logits within ±cap. Its schema, shape function, definition,
 * input generator, tolerances and in-place pair; and a faster implementation by the provider `softcap` for f32 in rows. */
#include <opd/provider.h>

#include <math.h>

enum { SOFTCAP_X, SOFTCAP_CAP };

#define SOFTCAP_SCHEMA "softcap(Tensor x, float cap=30.0) -> Tensor"

/* ---- The op ---- */

static opd_status softcap_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	(void)op;
	const opd_tensor *x = call->args[SOFTCAP_X].tensor;
	if (x->dtype != OPD_f32 && x->dtype != OPD_f64)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "softcap: x has dtype %s, expected f32 or f64", opd_dtype_name(x->dtype));
	if (!(call->args[SOFTCAP_CAP].f > 0))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "softcap: cap is %g, expected more than 0", call->args[SOFTCAP_CAP].f);
	if (x->rank > outputs[0]->rank_max)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "softcap: x has rank %u, at most %u", (unsigned)x->rank,
		                (unsigned)outputs[0]->rank_max);
	outputs[0]->dtype = x->dtype;
	outputs[0]->rank = x->rank;
	for (uint32_t i = 0; i < x->rank; i++)
		outputs[0]->shape[i] = x->shape[i];
	return OPD_OK;
}

/* dims: rows, hidden. Variants: the default cap, a cap that bites, a cap that hardly does. */
static opd_status softcap_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	(void)op;
	static const double caps[] = {30, 0.5, 1000};
	if (generator->variant >= sizeof caps / sizeof caps[0])
		return OPD_OUT_OF_RANGE;
	if (generator->dtype != OPD_f32 && generator->dtype != OPD_f64)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "softcap: no inputs of dtype %s, only f32 and f64",
		                opd_dtype_name(generator->dtype));
	if (generator->dim_count != 2 || generator->dims[0] < 0 || generator->dims[1] < 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "softcap: dims are rows,hidden, each at least 0");
	void *x = generator->tensor(generator, "x", generator->dtype, 2, generator->dims);
	if (x == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "softcap: no memory for x");
	generator->fill(generator, x, generator->dtype, (uint64_t)generator->dims[0] * (uint64_t)generator->dims[1], 10);
	if (generator->variant != 0)
		generator->set_float(generator, "cap", caps[generator->variant]);
	return OPD_OK;
}

static opd_status check_output(const opd_call *call, const char *who, opd_error *error)
{
	const opd_tensor *x = call->args[SOFTCAP_X].tensor;
	if (call->outputs[0]->dtype == x->dtype && opd_tensor_same_shape(call->outputs[0], x))
		return OPD_OK;
	return opd_fail(error, OPD_INTERNAL, "%s: the result isn't of x's dtype and shape", who);
}

/* Where the element of this row-major number lies, in elements: a definition takes any strides. */
static uint64_t element_at(const opd_tensor *tensor, uint64_t number)
{
	uint64_t at = 0;
	for (uint32_t i = tensor->rank; i-- > 0;) {
		at += number % (uint64_t)tensor->shape[i] * (uint64_t)tensor->strides[i];
		number /= (uint64_t)tensor->shape[i];
	}
	return at;
}

/* Each element is read before it is written: also right when the result lies over x. */
static opd_status softcap_native(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl, (void)state, (void)exec;
	opd_status status = check_output(call, "native.softcap", error);
	if (status != OPD_OK)
		return status;
	const opd_tensor *x = call->args[SOFTCAP_X].tensor;
	const void *from = opd_tensor_data(x);
	void *to = opd_tensor_data(call->outputs[0]);
	const double cap = call->args[SOFTCAP_CAP].f;
	for (uint64_t i = 0; i < x->elements; i++) {
		const uint64_t at = element_at(x, i);
		if (x->dtype == OPD_f64)
			((double *)to)[i] = cap * tanh(((const double *)from)[at] / cap);
		else
			((float *)to)[i] = (float)(cap * tanh((double)((const float *)from)[at] / cap));
	}
	return OPD_OK;
}

static const opd_impl native = {
    .struct_bytes = sizeof native,
    .flags = OPD_IMPL_IN_PLACE | OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
    .op = "softcap",
    .schema = SOFTCAP_SCHEMA,
    .device = "cpu",
    .uuid = SAMPLE_UUID,
    .run = softcap_native,
};

static const int64_t default_dims[] = {16, 1024};
/* tanhf's own error, times the cap. */
static const opd_tolerance tolerances[] = {{.dtype = OPD_f32, .atol = 1e-5, .rtol = 2e-6}};
static const opd_in_place in_place[] = {{.param = SOFTCAP_X, .result = 0}};

static const opd_op softcap = {
    .struct_bytes = sizeof softcap,
    .schema = SOFTCAP_SCHEMA,
    .doc = "cap * tanh(x / cap): x within -cap and cap",
    .activations = "x",
    .shape = softcap_shape,
    .generate = softcap_generate,
    .dims = "rows,hidden",
    .default_dims = default_dims,
    .dim_count = 2,
    .tolerance_count = 1,
    .tolerances = tolerances,
    .in_place_count = 1,
    .in_place = in_place,
    .native = &native,
};

/* ---- A faster implementation ---- */

static bool fast_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = call->args[SOFTCAP_X].tensor;
	if (x->dtype != OPD_f32)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "x %s, only f32", opd_dtype_name(x->dtype));
	if (!opd_tensor_contiguous(x))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "x is strided");
	if (!((float)call->args[SOFTCAP_CAP].f > 1e-30f && (float)call->args[SOFTCAP_CAP].f < 1e30f))
		return OPD_REFUSE(reason, OPD_REASON_ATTRIBUTE, "cap %g, only 1e-30 to 1e30", call->args[SOFTCAP_CAP].f);
	return true;
}

struct fast_loop {
	const float *x;
	float *y;
	float cap;
};

static void fast_range(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct fast_loop *loop = argument;
	for (uint64_t i = begin; i < end; i++)
		loop->y[i] = loop->cap * tanhf(loop->x[i] / loop->cap);
}

static opd_status fast_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl, (void)state;
	opd_status status = check_output(call, "softcap.softcap", error);
	if (status != OPD_OK)
		return status;
	struct fast_loop loop = {
	    .x = opd_tensor_data(call->args[SOFTCAP_X].tensor),
	    .y = opd_tensor_data(call->outputs[0]),
	    .cap = (float)call->args[SOFTCAP_CAP].f,
	};
	exec->host->parallel_for(exec, call->outputs[0]->elements, 4096, fast_range, &loop);
	return OPD_OK;
}

static uint64_t fast_cost_ns(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return 100 + call->args[SOFTCAP_X].tensor->elements * 8;
}

static const opd_impl fast = {
    .struct_bytes = sizeof fast,
    .flags = OPD_IMPL_IN_PLACE | OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
    .op = "softcap",
    .schema = SOFTCAP_SCHEMA,
    .device = "cpu",
    .uuid = SAMPLE_UUID,
    .predicate = fast_supports,
    .cost_ns = fast_cost_ns,
    .run = fast_run,
};

/* ---- The module ---- */

static opd_status softcap_open(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	opd_status status = host->register_op(host, &softcap, error);
	return status == OPD_OK ? host->register_impl(host, &fast, error) : status;
}

static const opd_module module = {
    .abi = OPD_PROVIDER_ABI,
    .struct_bytes = sizeof module,
    .name = "softcap",
    .version = "0.9",
    .open = softcap_open,
};

const opd_module *opd_module_get(void)
{
	return &module;
}
