/* The module `native`: every op of the catalogue, each with its definition in portable C. */
#include "providers/builtin.h"
#include "providers/ops/ops.h"

static const opd_op *const *const families[] = {
    ops_norm, ops_activation, ops_elementwise, ops_reduce, ops_matmul, ops_position, ops_attention, ops_quant, NULL,
};

/* One failure fails the module: a catalogue with a hole in it is a bug, not a platform. */
static opd_status native_open(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	for (const opd_op *const *const *family = families; *family != NULL; family++) {
		for (const opd_op *const *op = *family; *op != NULL; op++) {
			opd_status status = host->register_op(host, *op, error);
			if (status != OPD_OK)
				return status;
		}
	}
	return OPD_OK;
}

const opd_module native_module = {
	.abi = OPD_PROVIDER_ABI,
	.struct_bytes = sizeof native_module,
	.name = "native",
	.version = OPD_VERSION,
	.open = native_open,
};
