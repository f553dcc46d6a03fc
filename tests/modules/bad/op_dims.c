/* Its op names two sizes and has none. */
#include "bad.h"

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	static opd_impl native;
	static opd_op op;
	native = bad_native();
	op = bad_op("bad_op(Tensor x) -> Tensor");
	op.native = &native;
	op.dims = "rows,hidden";
	op.dim_count = 2;
	return host->register_op(host, &op, error);
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("op_dims", open_module);
	return &module;
}
