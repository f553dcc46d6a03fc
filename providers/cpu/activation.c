/* silu_and_mul, mul_and_silu, gelu_and_mul, silu, gelu, relu, relu2, sigmoid: what is taken, what it costs, rows to kernels. */
#include <string.h>

#include "providers/cpu/call.h"
#include "uuid/cpu_activation.h"

/* Elements that are an item where x is one run of memory: its rows don't count then. */
#define FLAT_ITEM 4096

static bool activation_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_accept_float(x, reason) && cpu_accept_rows("x", x, reason);
}

static uint64_t activation_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_cost_ns(&cpu_kernels_of(impl)->costs.silu_and_mul, x->dtype, call->outputs[0]->elements);
}

static uint64_t relu_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_any_cost_ns(&cpu_kernels_of(impl)->costs.arithmetic, x->dtype, x->elements); /* one operand less, one operation more */
}

static uint64_t gelu_cost(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_cost_ns(&cpu_kernels_of(impl)->costs.gelu, x->dtype, call->outputs[0]->elements);
}

struct activation_work {
	cpu_activation_fn kernel;
	struct cpu_rows x, y;
	size_t count;        /* of y's row; of y, where flat */
	uint64_t first, other; /* bytes into x's row: what goes through the function, what multiplies */
	size_t element_bytes;
	enum cpu_reach reach;
};

static void activation_rows(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct activation_work *work = context;
	for (uint64_t r = begin; r < end; r++) {
		const unsigned char *row = cpu_row(&work->x, r);
		work->kernel(row + work->first, row + work->other, cpu_row(&work->y, r), work->count, work->reach);
	}
	cpu_streamed(work->reach != CPU_NEAR);
}

static void activation_flat(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct activation_work *work = context;
	uint64_t from = begin * FLAT_ITEM;
	uint64_t count = end * FLAT_ITEM < work->count ? end * FLAT_ITEM - from : work->count - from;
	work->kernel(work->x.base + from * work->element_bytes, NULL, work->y.base + from * work->element_bytes, (size_t)count, work->reach);
	cpu_streamed(work->reach != CPU_NEAR);
}

/* relu as other single passes. The others compute about as long as one thread's share of memory takes: on a Zen 5 core results past the caches make them slower by a twentieth up to 32 MiB, and no different at 128; sixteen
 * threads of a Xeon, which wait for memory, are faster by a tenth to nine tenths from 64 MiB on. */
static enum cpu_reach activation_reach(unsigned function, uint64_t bytes)
{
	return cpu_reach(function == CPU_RELU || function == CPU_RELU2 ? bytes : bytes / 4);
}

static opd_status activation_alone(const opd_impl *impl, const opd_call *call, const opd_exec *exec, unsigned function, uint64_t cost_ns,
                                   opd_error *error)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	opd_status status = cpu_expect_output(impl, call, 0, x, opd_tensor_last(x), error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	const struct cpu_kernels *kernels = cpu_kernels_of(impl);
	struct activation_work work = {
		.kernel = x->dtype == OPD_f64 ? kernels->f64->alone[function] : kernels->activation->alone[function][cpu_dtype_index(x->dtype)],
		.x = cpu_rows_of(x),
		.y = cpu_rows_of(call->outputs[0]),
		.count = (size_t)opd_tensor_last(x),
		.element_bytes = opd_dtype_bytes(x->dtype),
		.reach = activation_reach(function, 2 * x->elements * opd_dtype_bytes(x->dtype)),
	};
	if (work.x.scattered != NULL)
		return cpu_for(exec, x->elements / work.count, cost_ns, activation_rows, &work, error);
	work.count = (size_t)x->elements;
	return cpu_for(exec, (x->elements + FLAT_ITEM - 1) / FLAT_ITEM, cost_ns, activation_flat, &work, error);
}

/* `second`: it is the second half that goes through the function. */
static opd_status activation_times(const opd_impl *impl, const opd_call *call, const opd_exec *exec, unsigned function, uint64_t cost_ns,
                                   bool second, opd_error *error)
{
	const opd_tensor *x = cpu_tensor(call, 0);
	opd_status status = cpu_expect_output(impl, call, 0, x, opd_tensor_last(x) / 2, error);
	if (status != OPD_OK || x->elements == 0)
		return status;
	const struct cpu_kernels *kernels = cpu_kernels_of(impl);
	struct activation_work work = {
		.kernel = x->dtype == OPD_f64 ? kernels->f64->times[function] : kernels->activation->times[function][cpu_dtype_index(x->dtype)],
		.x = cpu_rows_of(x),
		.y = cpu_rows_of(call->outputs[0]),
		.count = (size_t)opd_tensor_last(x) / 2,
		.reach = cpu_reach((x->elements + call->outputs[0]->elements) * opd_dtype_bytes(x->dtype)),
	};
	work.first = second ? work.y.row_bytes : 0;
	work.other = second ? 0 : work.y.row_bytes;
	return cpu_for(exec, call->outputs[0]->elements / work.count, cost_ns, activation_rows, &work, error);
}

/* Which gelu parameter 1 asks for. */
static unsigned gelu_function(const opd_call *call)
{
	return strcmp(call->args[1].str, "tanh") == 0 ? CPU_GELU_TANH : CPU_GELU;
}

/* An op: its run calls one of the two above with `function`, and for the halved ones whether it is the second half's. */
#define IMPL(name, schema_text, cost, expression)                                                                              \
	static opd_status name##_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error) \
	{                                                                                                                          \
		(void)state;                                                                                                           \
		return expression;                                                                                                     \
	}                                                                                                                          \
	const opd_impl cpu_##name = {                                                                                              \
		.struct_bytes = sizeof(opd_impl),                                                                                      \
		.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,                                                         \
		.op = #name,                                                                                                           \
		.schema = (schema_text),                                                                                               \
		.device = "cpu",                                                                                                       \
		.uuid = OPD_UUID_cpu_activation,                                                                                       \
		.predicate = activation_predicate,                                                                                     \
		.cost_ns = (cost),                                                                                                     \
		.run = name##_run,                                                                                                     \
	};
#define ALONE(name, cost, function) \
	IMPL(name, #name "(Tensor x) -> Tensor", cost, activation_alone(impl, call, exec, function, cost(impl, call), error))

ALONE(sigmoid, activation_cost, CPU_SIGMOID)
ALONE(silu, activation_cost, CPU_SILU)
ALONE(relu, relu_cost, CPU_RELU)
ALONE(relu2, relu_cost, CPU_RELU2)
IMPL(gelu, "gelu(Tensor x, str approximate=\"none\") -> Tensor", gelu_cost,
     activation_alone(impl, call, exec, gelu_function(call), gelu_cost(impl, call), error))
IMPL(silu_and_mul, "silu_and_mul(Tensor x) -> Tensor", activation_cost,
     activation_times(impl, call, exec, CPU_SILU, activation_cost(impl, call), false, error))
IMPL(mul_and_silu, "mul_and_silu(Tensor x) -> Tensor", activation_cost,
     activation_times(impl, call, exec, CPU_SILU, activation_cost(impl, call), true, error))
IMPL(gelu_and_mul, "gelu_and_mul(Tensor x, str approximate=\"none\") -> Tensor", gelu_cost,
     activation_times(impl, call, exec, gelu_function(call), gelu_cost(impl, call), false, error))
