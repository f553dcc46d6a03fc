/* The schema of its op has a keyword-only parameter. */
#include "bad.h"

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	static opd_impl native;
	static opd_op op;
	native = bad_native();
	op = bad_op("bad_keyword(Tensor x, *, float scale=1.0) -> Tensor");
	op.native = &native;
	return host->register_op(host, &op, error);
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("keyword_only", open_module);
	return &module;
}
