/* Its op has no shape function. */
#include "bad.h"

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	static opd_impl native;
	static opd_op op;
	native = bad_native();
	op = bad_op("bad_op(Tensor x) -> Tensor");
	op.native = &native;
	op.shape = NULL;
	return host->register_op(host, &op, error);
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("op_no_shape", open_module);
	return &module;
}
