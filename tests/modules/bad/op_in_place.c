/* The in-place pair of its op names a result that it hasn't. */
#include "bad.h"

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	static opd_impl native;
	static const opd_in_place pair = {0, 1};
	static opd_op op;
	native = bad_native();
	op = bad_op("bad_op(Tensor x) -> Tensor");
	op.native = &native;
	op.in_place = &pair;
	op.in_place_count = 1;
	return host->register_op(host, &op, error);
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("op_in_place", open_module);
	return &module;
}
