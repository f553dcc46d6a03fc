/* The module `cuda`: the device backend and the kernels of this folder. */
#include "providers/cuda/backend.h"
#include "providers/cuda/call.h"

enum { IMPLS_MAX = 64 };

struct cuda {
	opd_backend backend;
	char missing[200]; /* why no device can be used; empty: one can */
	opd_impl impls[IMPLS_MAX];
	size_t impl_count;
};

static const opd_impl *const *const families[] = {cuda_impls_norm,     cuda_impls_activation, cuda_impls_elementwise, cuda_impls_quant,    cuda_impls_reduce,
                                                  cuda_impls_position, cuda_impls_linear,     cuda_impls_scaled,      cuda_impls_attention};

static opd_status register_family(const opd_host *host, struct cuda *cuda, const opd_impl *const *family, opd_error *error)
{
	opd_status status = OPD_OK;
	for (size_t i = 0; family[i] != NULL && status == OPD_OK; i++) {
		opd_impl *impl = &cuda->impls[cuda->impl_count++];
		*impl = *family[i];
		impl->unsupported = cuda->missing[0] == '\0' ? NULL : cuda->missing;
		status = host->register_impl(host, impl, error);
	}
	return status;
}

static opd_status cuda_open(const opd_host *host, void *state, opd_error *error)
{
	struct cuda *cuda = state;
	opd_status status = OPD_OK;
	uint32_t devices = cuda_backend_probe(cuda->missing, sizeof cuda->missing);
	if (devices > 0) {
		cuda_backend_init(&cuda->backend, devices);
		status = host->register_backend(host, &cuda->backend, error);
	}
	for (size_t i = 0; i < sizeof families / sizeof families[0] && status == OPD_OK; i++)
		status = register_family(host, cuda, families[i], error);
	return status;
}

static const opd_module module = {
	.abi = OPD_PROVIDER_ABI,
	.struct_bytes = sizeof module,
	.name = "cuda",
	.version = OPD_VERSION,
	.state_bytes = sizeof(struct cuda),
	.open = cuda_open,
};

const opd_module *opd_module_get(void)
{
	return &module;
}
