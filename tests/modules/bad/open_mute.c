/* Its open fails with a code that is none, and without a word. */
#include "bad.h"

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	(void)host, (void)error;
	return (opd_status)1234;
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("open_mute", open_module);
	return &module;
}
