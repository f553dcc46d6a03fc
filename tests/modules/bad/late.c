/* It registers an implementation outside of open, when its predicate is asked. */
#include "bad.h"

struct state {
	const opd_host *host;
};

static bool supports(const opd_impl *impl, void *state_of, const opd_call *call, opd_reason *reason)
{
	static opd_impl silu;
	const struct state *state = state_of;
	opd_error error;
	(void)impl, (void)call;
	silu = bad_relu();
	silu.op = "silu";
	silu.schema = "silu(Tensor x) -> Tensor";
	if (state->host->register_impl(state->host, &silu, &error) == OPD_OK)
		return true;
	return OPD_REFUSE(reason, OPD_REASON_PLATFORM, "%s", error.text);
}

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	static opd_impl relu;
	relu = bad_relu();
	relu.predicate = supports;
	((struct state *)state)->host = host;
	return host->register_impl(host, &relu, error);
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("late", open_module);
	module.state_bytes = sizeof(struct state);
	return &module;
}
