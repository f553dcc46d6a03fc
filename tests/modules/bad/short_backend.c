/* Its device backend has no functions. */
#include "bad.h"

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	static const opd_backend backend = {.struct_bytes = sizeof backend, .device_count = 1, .kind = "bad"};
	return host->register_backend(host, &backend, error);
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("short_backend", open_module);
	return &module;
}
