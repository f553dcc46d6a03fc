/* The module `cpu`: picks an instruction set and registers the implementations with its kernels. */
#include <stdlib.h>

#include "providers/builtin.h"
#include "providers/cpu/call.h"
#include "providers/cpu/isa.h"

static const opd_impl *const cpu_templates[] = {
	&cpu_rms_norm, &cpu_fused_add_rms_norm, &cpu_silu_and_mul, &cpu_softmax, &cpu_linear, &cpu_attention, &cpu_paged_attention,
	&cpu_rotary_embedding, &cpu_reshape_and_cache, &cpu_embedding, &cpu_argmax,
	&cpu_mul_and_silu, &cpu_gelu_and_mul, &cpu_silu, &cpu_gelu, &cpu_relu, &cpu_relu2, &cpu_sigmoid,
	&cpu_add, &cpu_sub, &cpu_mul, &cpu_cast, &cpu_static_quant_fp8, &cpu_dynamic_quant_fp8, &cpu_layer_norm, &cpu_gelu_and_mul_sparse,
	&cpu_topk, &cpu_matmul, &cpu_scaled_mm,
};

#define IMPLS (sizeof cpu_templates / sizeof cpu_templates[0])

struct cpu_state {
	opd_impl impls[IMPLS]; /* borrowed by the host until the module is closed */
};

static void cpu_log(const opd_host *host, opd_log_level level, const char *text)
{
	if (host->log_enabled(host, level))
		host->log(host, level, text);
}

static const struct cpu_kernels *cpu_pick(const opd_host *host)
{
	char text[160];
	const struct cpu_kernels *kernels = cpu_isa_pick(getenv("OPD_CPU_ISA"), text, sizeof text);
	if (text[0] != '\0')
		cpu_log(host, OPD_LOG_WARN, text);
	(void)snprintf(text, sizeof text, "cpu: kernels for %s", kernels->isa);
	cpu_log(host, OPD_LOG_DEBUG, text);
	return kernels;
}

static opd_status cpu_open(const opd_host *host, void *state, opd_error *error)
{
	struct cpu_state *cpu = state;
	const struct cpu_kernels *kernels = cpu_pick(host);
	for (size_t i = 0; i < IMPLS; i++) {
		cpu->impls[i] = *cpu_templates[i];
		cpu->impls[i].user = kernels;
		if (cpu_templates[i] == &cpu_linear && kernels->linear->pairs != NULL)
			cpu->impls[i].flags |= OPD_IMPL_BF16_DENORMALS_ZERO;
		opd_status status = host->register_impl(host, &cpu->impls[i], error);
		if (status != OPD_OK)
			return status;
	}
	return OPD_OK;
}

const opd_module cpu_module = {
	.abi = OPD_PROVIDER_ABI,
	.struct_bytes = sizeof(opd_module),
	.name = "cpu",
	.version = OPD_VERSION,
	.state_bytes = sizeof(struct cpu_state),
	.open = cpu_open,
};
