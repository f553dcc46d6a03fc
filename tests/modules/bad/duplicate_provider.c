/* A provider of this name is there already. */
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
	module = bad_module("cpu", open_module);
	return &module;
}
