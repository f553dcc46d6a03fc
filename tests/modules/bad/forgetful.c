/* It loads, but never frees the host's memory: the daemon must say so and end as if nothing were. */
#include "bad.h"

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	if (host->alloc(host, 1u << 20) == NULL || host->alloc(host, 1) == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "no memory to be forgotten");
	return OPD_OK;
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("forgetful", open_module);
	return &module;
}
