/* Built for another ABI. */
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
	module = bad_module("wrong_abi", open_module);
	module.abi = OPD_PROVIDER_ABI + 1;
	return &module;
}
