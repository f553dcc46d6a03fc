#include "providers/cpu/isa.h"

#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* Measured with one thread on a Zen 4 core (README.md); the estimate for what was not measured there is that of the next wider set, scaled. */
#define TABLE(set) .isa = #set, .norm = &cpu_norm_##set, .activation = &cpu_activation_##set, .softmax = &cpu_softmax_##set, \
                   .linear = &cpu_linear_##set

static const struct cpu_kernels cpu_isa_baseline = {
	TABLE(baseline),
	.costs =
		{
			.rms_norm = {60, {300, 500, 900}},
			.fused_add_rms_norm = {60, {400, 800, 1500}},
			.silu_and_mul = {60, {1500, 1700, 2000}},
			.softmax = {60, {1500, 2800, 3000}},
			.linear_weight = {200, {250, 250, 600}},
			.linear_product_fs = 100000,
		},
};

#if defined(__x86_64__)
static const struct cpu_kernels cpu_isa_avx2 = {
	TABLE(avx2),
	.costs =
		{
			.rms_norm = {60, {150, 150, 150}},
			.fused_add_rms_norm = {60, {250, 250, 250}},
			.silu_and_mul = {60, {450, 450, 450}},
			.softmax = {60, {500, 800, 800}},
			.linear_weight = {200, {200, 110, 110}},
			.linear_product_fs = 22000,
		},
};

static const struct cpu_kernels cpu_isa_avx512 = {
	TABLE(avx512),
	.costs =
		{
			.rms_norm = {60, {130, 130, 130}},
			.fused_add_rms_norm = {60, {220, 220, 220}},
			.silu_and_mul = {60, {400, 400, 400}},
			.softmax = {60, {350, 600, 600}},
			.linear_weight = {200, {200, 100, 100}},
			.linear_product_fs = 20000,
		},
};
#endif

const struct cpu_kernels *const cpu_isas[] = {
#define X(set) &cpu_isa_##set,
	CPU_ISA_MAP(X)
#undef X
	NULL,
};

#if defined(__x86_64__)
/* Not among the names that every compiler's __builtin_cpu_supports knows. */
static bool isa_has_f16c(void)
{
	unsigned a, b, c, d;
	return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

static bool isa_has_avx2(void)
{
	return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && isa_has_f16c();
}

static bool isa_has_avx512(void)
{
	return isa_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool cpu_isa_supported(const struct cpu_kernels *kernels)
{
	if (kernels == &cpu_isa_avx512)
		return isa_has_avx512();
	return kernels == &cpu_isa_avx2 ? isa_has_avx2() : true;
}
#else
bool cpu_isa_supported(const struct cpu_kernels *kernels)
{
	return kernels == &cpu_isa_baseline;
}
#endif

static const struct cpu_kernels *isa_best(void)
{
	const struct cpu_kernels *best = cpu_isas[0];
	for (size_t i = 0; cpu_isas[i] != NULL; i++)
		if (cpu_isa_supported(cpu_isas[i]))
			best = cpu_isas[i];
	return best;
}

static const struct cpu_kernels *isa_find(const char *name)
{
	for (size_t i = 0; cpu_isas[i] != NULL; i++)
		if (strcmp(cpu_isas[i]->isa, name) == 0)
			return cpu_isas[i];
	return NULL;
}

const struct cpu_kernels *cpu_isa_pick(const char *wanted, char *warning, size_t bytes)
{
	const struct cpu_kernels *best = isa_best();
	warning[0] = '\0';
	if (wanted == NULL || wanted[0] == '\0')
		return best;
	const struct cpu_kernels *found = isa_find(wanted);
	if (found == NULL) {
		(void)snprintf(warning, bytes, "cpu: OPD_CPU_ISA is none of this build's instruction sets (as baseline), using %s", best->isa);
		return best;
	}
	if (!cpu_isa_supported(found)) {
		(void)snprintf(warning, bytes, "cpu: OPD_CPU_ISA=%s, but this machine can't run that, using %s", found->isa, best->isa);
		return best;
	}
	return found;
}
