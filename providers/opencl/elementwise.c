/* Activations, gated activations, add, sub, mul: an item an element. */
#include <string.h>

#include "providers/opencl/opencl.h"
#include "uuid/opencl_elementwise.h"

/* As kernels/elementwise.cl numbers them. */
enum { SILU, GELU, GELU_TANH, RELU, RELU2, SIGMOID };
enum { ADD, SUB, MUL };

struct form {
	int function;
	bool approximate; /* argument 1 says whether it is gelu's tanh form */
	bool second;      /* of a gated one: the second half goes through the function */
};

static bool one_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return opencl_takes("x", opencl_tensor(call, 0), reason);
}

static int function_of(const struct form *form, const opd_call *call)
{
	return form->approximate && strcmp(call->args[1].str, "tanh") == 0 ? GELU_TANH : form->function;
}

static opd_status activate_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const opd_tensor *x = opencl_tensor(call, 0);
	const opd_tensor *y = call->outputs[0];
	opd_status status = opencl_verify(impl, call, x, 0, error);
	if (status != OPD_OK || opd_tensor_empty(y))
		return status;
	struct launch launch = launch_begin(state, exec, OPENCL_activate, x->dtype, error);
	launch_tensor(&launch, x, NULL);
	launch_tensor(&launch, y, NULL);
	launch_int(&launch, (int64_t)y->elements);
	launch_int(&launch, function_of(impl->user, call));
	return launch_elements(&launch, y->elements);
}

static opd_status gated_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const struct form *form = impl->user;
	const opd_tensor *x = opencl_tensor(call, 0);
	const opd_tensor *y = call->outputs[0];
	opd_status status = opencl_verify(impl, call, x, 0, error);
	if (status != OPD_OK || opd_tensor_empty(y))
		return status;
	struct launch launch = launch_begin(state, exec, OPENCL_activate_and_mul, x->dtype, error);
	launch_tensor(&launch, x, NULL);
	launch_tensor(&launch, y, NULL);
	launch_int(&launch, (int64_t)y->elements);
	launch_int(&launch, opd_tensor_last(y));
	launch_int(&launch, function_of(form, call));
	launch_int(&launch, form->second);
	return launch_elements(&launch, y->elements);
}

/* ---- add, sub, mul: any strides, NumPy's broadcasting ---- */

enum { DIMENSIONS = 8 };

struct layout {
	cl_long shape[DIMENSIONS];
	cl_long strides[2][DIMENSIONS];
};

static bool combine_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	for (uint32_t i = 0; i < 2; i++) {
		const char *name = i == 0 ? "a" : "b";
		const opd_tensor *tensor = opencl_tensor(call, i);
		if (!opencl_takes_dtype(name, tensor, reason) || !opencl_fits(name, tensor, reason))
			return false;
		if (tensor->rank > DIMENSIONS)
			return OPD_REFUSE(reason, OPD_REASON_SHAPE, "%s has rank %u, at most %d", name, (unsigned)tensor->rank, DIMENSIONS);
	}
	return true;
}

/* The last dimensions stand together; one of extent 1 is read with stride 0. */
static struct layout layout_of(const opd_tensor *y, const opd_call *call)
{
	struct layout layout = {0};
	for (uint32_t i = 0; i < DIMENSIONS; i++)
		layout.shape[i] = i + y->rank < DIMENSIONS ? 1 : y->shape[i + y->rank - DIMENSIONS];
	for (uint32_t k = 0; k < 2; k++) {
		const opd_tensor *from = opencl_tensor(call, k);
		for (uint32_t i = 0; i < from->rank; i++)
			layout.strides[k][DIMENSIONS - from->rank + i] = from->shape[i] == 1 ? 0 : from->strides[i];
	}
	return layout;
}

static opd_status combine_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const struct form *form = impl->user;
	const opd_tensor *a = opencl_tensor(call, 0);
	const opd_tensor *y = call->outputs[0];
	opd_status status = opencl_verify(impl, call, a, 0, error);
	if (status != OPD_OK || opd_tensor_empty(y))
		return status;
	const struct layout layout = layout_of(y, call);
	struct launch launch = launch_begin(state, exec, OPENCL_combine, a->dtype, error);
	launch_tensor(&launch, a, NULL);
	launch_tensor(&launch, opencl_tensor(call, 1), NULL);
	launch_tensor(&launch, y, NULL);
	launch_int(&launch, (int64_t)y->elements);
	launch_int(&launch, form->function);
	launch_value(&launch, sizeof layout, &layout);
	return launch_elements(&launch, y->elements);
}

static const struct form forms[] = {
	{SILU, false, false}, {GELU, true, false}, {RELU, false, false}, {RELU2, false, false}, {SIGMOID, false, false},
	{SILU, false, true},
};
static const struct form combinations[] = {{ADD, false, false}, {SUB, false, false}, {MUL, false, false}};

#define ELEMENTWISE(NAME, SCHEMA, SUPPORTS, RUN, USER)                                                                                             \
	{                                                                                                                                              \
		.struct_bytes = sizeof(opd_impl), .flags = OPD_IMPL_BATCH_INVARIANT, .op = NAME, .schema = NAME SCHEMA, .device = "opencl",                \
		.uuid = OPD_UUID_opencl_elementwise, .predicate = SUPPORTS, .run = RUN, .user = USER                                                       \
	}

const opd_impl opencl_elementwises[] = {
	ELEMENTWISE("silu", "(Tensor x) -> Tensor", one_supports, activate_run, &forms[0]),
	ELEMENTWISE("gelu", "(Tensor x, str approximate=\"none\") -> Tensor", one_supports, activate_run, &forms[1]),
	ELEMENTWISE("relu", "(Tensor x) -> Tensor", one_supports, activate_run, &forms[2]),
	ELEMENTWISE("relu2", "(Tensor x) -> Tensor", one_supports, activate_run, &forms[3]),
	ELEMENTWISE("sigmoid", "(Tensor x) -> Tensor", one_supports, activate_run, &forms[4]),
	ELEMENTWISE("silu_and_mul", "(Tensor x) -> Tensor", one_supports, gated_run, &forms[0]),
	ELEMENTWISE("mul_and_silu", "(Tensor x) -> Tensor", one_supports, gated_run, &forms[5]),
	ELEMENTWISE("gelu_and_mul", "(Tensor x, str approximate=\"none\") -> Tensor", one_supports, gated_run, &forms[1]),
	ELEMENTWISE("add", "(Tensor a, Tensor b) -> Tensor", combine_supports, combine_run, &combinations[0]),
	ELEMENTWISE("sub", "(Tensor a, Tensor b) -> Tensor", combine_supports, combine_run, &combinations[1]),
	ELEMENTWISE("mul", "(Tensor a, Tensor b) -> Tensor", combine_supports, combine_run, &combinations[2]),
	{0},
};
