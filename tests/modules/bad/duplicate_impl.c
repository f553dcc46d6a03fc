/* It registers two implementations of an op. */
#include "bad.h"

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	static opd_impl relu;
	relu = bad_relu();
	opd_status status = host->register_impl(host, &relu, error);
	return status != OPD_OK ? status : host->register_impl(host, &relu, error);
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("duplicate_impl", open_module);
	return &module;
}
