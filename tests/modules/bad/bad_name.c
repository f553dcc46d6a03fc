/* Its name is no name, and must not reach a terminal as it is. */
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
	module = bad_module("bad_name", open_module);
	module.name = "bad\x1b[31m name";
	return &module;
}
