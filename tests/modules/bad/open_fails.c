/* Its open registers an op, an implementation and takes host memory, then fails; close must be called, with the state that open
 * left. */
#include "bad.h"

struct state {
	void *memory;
};

static opd_status open_module(const opd_host *host, void *state_of, opd_error *error)
{
	static opd_impl relu, native;
	static opd_op op;
	struct state *state = state_of;
	relu = bad_relu();
	native = bad_native();
	op = bad_op("bad_half(Tensor x) -> Tensor");
	op.native = &native;
	state->memory = host->alloc(host, 4096);
	opd_status status = host->register_impl(host, &relu, error);
	if (status == OPD_OK)
		status = host->register_op(host, &op, error);
	return status != OPD_OK ? status : opd_fail(error, OPD_FAILED_PRECONDITION, "its library is too old: 1.2, at least 2.0");
}

static void close_module(const opd_host *host, void *state_of)
{
	struct state *state = state_of;
	host->log(host, OPD_LOG_INFO, state->memory != NULL ? "closed with its memory" : "closed without its memory");
	host->free(host, state->memory);
}

const opd_module *opd_module_get(void)
{
	static opd_module module;
	module = bad_module("open_fails", open_module);
	module.state_bytes = sizeof(struct state);
	module.close = close_module;
	return &module;
}
