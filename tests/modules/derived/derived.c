/* A provider that keeps derived copies: `add` of two contiguous f32 tensors of one shape, whose b is copied once. A result tells which copy it was made of: whoever
 * gets another tensor's, or an older version's, gets a wrong sum. */
#include <opd/provider.h>

#include <string.h>

enum { A, B };

static bool add_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *a = call->args[A].tensor, *b = call->args[B].tensor;
	if (a->dtype != OPD_f32 || !opd_tensor_contiguous(a) || !opd_tensor_contiguous(b) || !opd_tensor_same_shape(a, b))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "only contiguous f32 of one shape");
	return true;
}

/* b's values: from a copy where there is one, or may be one. */
static const float *read_b(const opd_exec *exec, const opd_tensor *b)
{
	static const char key[] = "plain";
	const uint64_t bytes = b->elements * sizeof(float);
	const float *copy = exec->host->derived_find(exec, b, key, sizeof key);
	if (copy != NULL)
		return copy;
	float *made = exec->host->derived_make(exec, b, key, sizeof key, bytes);
	if (made == NULL)
		return opd_tensor_data(b);
	memcpy(made, opd_tensor_data(b), bytes);
	exec->host->derived_keep(exec, made);
	return made;
}

static opd_status add_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl, (void)state;
	const opd_tensor *y = call->outputs[0];
	if (y->dtype != OPD_f32 || y->elements != call->args[A].tensor->elements)
		return opd_fail(error, OPD_INTERNAL, "derived.add: the result isn't f32 of a's size");
	const float *a = opd_tensor_data(call->args[A].tensor);
	const float *b = read_b(exec, call->args[B].tensor);
	float *to = opd_tensor_data(y);
	for (uint64_t i = 0; i < y->elements; i++)
		to[i] = a[i] + b[i];
	return OPD_OK;
}

static const opd_impl add = {
    .struct_bytes = sizeof add,
    .op = "add",
    .schema = "add(Tensor a, Tensor b) -> Tensor",
    .device = "cpu",
    .uuid = "0000000000000000000000000000000000000000000000000000000000000001",
    .predicate = add_supports,
    .run = add_run,
};

static opd_status derived_open(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	if (host->struct_bytes < offsetof(opd_host, derived_keep) + sizeof host->derived_keep)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "derived: the host keeps no derived copies");
	return host->register_impl(host, &add, error);
}

static const opd_module module = {
    .abi = OPD_PROVIDER_ABI,
    .struct_bytes = sizeof module,
    .name = "derived",
    .version = "1",
    .open = derived_open,
};

const opd_module *opd_module_get(void)
{
	return &module;
}
