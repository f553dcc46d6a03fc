/* It needs a shared library that isn't there. */
#include "bad.h"

int opd_tests_missing(void);

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	(void)host, (void)state;
	return opd_fail(error, OPD_INTERNAL, "the missing library says %d", opd_tests_missing());
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("missing_library", open_module);
	return &module;
}
