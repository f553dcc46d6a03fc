/* The native implementation of its op has another schema. */
#include "bad.h"

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	static opd_impl native;
	static opd_op op;
	native = bad_native();
	native.schema = "bad_op(Tensor y) -> Tensor";
	op = bad_op("bad_op(Tensor x) -> Tensor");
	op.native = &native;
	return host->register_op(host, &op, error);
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("op_native_schema", open_module);
	return &module;
}
