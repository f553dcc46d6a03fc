/* It wants more state than anybody has. */
#include "bad.h"

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	static opd_impl relu;
	relu = bad_relu();
	return host->register_impl(host, &relu, error);
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("huge_state", open_module);
	module.state_bytes = UINT64_MAX;
	return &module;
}
