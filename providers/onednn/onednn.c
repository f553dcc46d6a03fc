/* The module `onednn`: opens the library and registers what it does. */
#include "providers/onednn/onednn.h"

#include <dlfcn.h>
#include <string.h>

static void *find(struct dnn *dnn, const char *name)
{
	void *symbol = dlsym(dnn->library, name);
	if (symbol == NULL && dnn->missing[0] == '\0')
		(void)snprintf(dnn->missing, sizeof dnn->missing, "not available: libdnnl.so.2 has no %s", name);
	return symbol;
}

static void probe(struct dnn *dnn)
{
	dnn->library = dlopen("libdnnl.so.2", RTLD_NOW | RTLD_LOCAL);
	if (dnn->library == NULL) {
		(void)snprintf(dnn->missing, sizeof dnn->missing, "not available: %.130s", dlerror());
		return;
	}
	void *symbol = find(dnn, "omp_set_num_threads"); /* of the OpenMP that the library is linked with */
	memcpy(&dnn->set_threads, &symbol, sizeof symbol);
#define X(name)                                         \
	symbol = find(dnn, "dnnl_" #name);                  \
	memcpy(&dnn->name, &symbol, sizeof symbol);
	DNN_FUNCTIONS(X)
#undef X
	if (dnn->missing[0] == '\0' && dnn->engine_create(&dnn->engine, dnnl_cpu, 0) != dnnl_success)
		(void)snprintf(dnn->missing, sizeof dnn->missing, "not available: libdnnl.so.2 has no engine for the CPU");
}

static opd_status onednn_open(const opd_host *host, void *state, opd_error *error)
{
	static const opd_impl *const templates[DNN_IMPLS] = {&onednn_linear, &onednn_matmul, &onednn_scaled_mm};
	struct dnn *dnn = state;
	probe(dnn);
	dnn->has_bf16 = onednn_has_bf16();
	for (size_t i = 0; i < DNN_IMPLS; i++) {
		dnn->impls[i] = *templates[i];
		dnn->impls[i].unsupported = dnn->missing[0] != '\0' ? dnn->missing : NULL;
		if (templates[i] == &onednn_scaled_mm && dnn->missing[0] == '\0')
			dnn->impls[i].unsupported = onednn_scaled_mm_unsupported();
		opd_status status = host->register_impl(host, &dnn->impls[i], error);
		if (status != OPD_OK)
			return status;
	}
	return OPD_OK;
}

/* The library itself stays: OpenMP's threads may not be unloaded. */
static void onednn_close(const opd_host *host, void *state)
{
	struct dnn *dnn = state;
	(void)host;
	if (dnn->engine != NULL)
		(void)dnn->engine_destroy(dnn->engine);
}

static const opd_module module = {
	.abi = OPD_PROVIDER_ABI,
	.struct_bytes = sizeof module,
	.name = "onednn",
	.version = OPD_VERSION,
	.state_bytes = sizeof(struct dnn),
	.open = onednn_open,
	.close = onednn_close,
};

const opd_module *opd_module_get(void)
{
	return &module;
}
