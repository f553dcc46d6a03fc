#include "providers/cpu/isa.h"

#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* Costs: measured with one thread, rows of 4096, operands in cache (conformance --serve, Zen 5; norms, activations and softmax 2026-11-27, others the day before; topk of 4 x 32768, products of 64 x 1024 x 1024; f64, the fourth, of 8 rows); linear and attention from
 * memory. softmax_columns, and topk of f8 and i64, are estimates. conformance --time prints them beside what it measures. */
#define TABLE_OF_BF16(set) .norm = &cpu_norm_##set, .activation = &cpu_activation_##set, .softmax = &cpu_softmax_##set, .attend = &cpu_attend_##set, .linear = &cpu_linear_##set, \
                   .arithmetic = &cpu_arithmetic_##set, .moments = &cpu_moments_##set
#define TABLE_OF_OTHERS(set) .position = &cpu_position_##set, .cast = &cpu_cast_##set, .quant = &cpu_quant_##set, \
                   .topk = &cpu_topk_##set, .matmul = &cpu_matmul_##set, .columns = &cpu_columns_##set, .f64 = &cpu_f64_##set
#define TABLE(set) .isa = #set, TABLE_OF_BF16(set), TABLE_OF_OTHERS(set), .scaled_mm = &cpu_scaled_mm_##set

/* Costs of an op that takes any dtype: picoseconds an element of f32, bf16, f16, f8, f64, and of integers of 8, 16, 32, 64 bits. */
#define ANY(f32, bf16, f16, f8, f64, b8, b16, b32, b64)                                                                        \
	{                                                                                                                          \
		30,                                                                                                                    \
		{                                                                                                                      \
			[OPD_bool] = (b8), [OPD_u8] = (b8), [OPD_i8] = (b8), [OPD_i16] = (b16), [OPD_i32] = (b32), [OPD_i64] = (b64),      \
			[OPD_f16] = (f16), [OPD_bf16] = (bf16), [OPD_f32] = (f32), [OPD_f64] = (f64),                                      \
			[OPD_f8_e4m3fn] = (f8), [OPD_f8_e5m2] = (f8),                                                                      \
		}                                                                                                                      \
	}

static const struct cpu_kernels cpu_isa_baseline = {
	TABLE(baseline),
	.costs =
		{
			.rms_norm = {30, {220, 690, 3950, 495}},
			.fused_add_rms_norm = {30, {375, 1050, 5200, 735}},
			.silu_and_mul = {30, {1700, 1450, 4300, 6200}},
			.gelu = {30, {4400, 2450, 6500, 10000}},
			.softmax = {30, {1550, 1200, 2800, 4500}},
			.linear_weight = {100, {110, 170, 430}},
			.linear_product_fs = 75000,
			.attend_cache = {300, {110, 170, 430}},
			.attend_product_fs = 250000,
			.rotary = {30, {380, 1250, 2300, 340}},
			.argmax = {30, {490, 510, 600}},
			.arithmetic = ANY(140, 275, 2150, 4600, 320, 21, 41, 123, 262),
			.cast = ANY(235, 345, 625, 1740, 1980, 385, 365, 1600, 2300),
			.quant_largest = {30, {140, 60, 600}},
			.quant_scale = {30, {785, 1300, 1380}},
			.layer_norm = {30, {460, 680, 3100, 675}},
			.sparse = {30, {4700, 5000, 10500}},
			.softmax_columns = {30, {3200, 3800, 5500, 7000}},
			.topk = ANY(525, 680, 750, 4000, 1740, 146, 146, 146, 800),
			.topk_kept_ns = 60,
			.matmul_product_fs = 75000,
			.scaled_weight = ANY(0, 0, 0, 1300, 0, 60, 0, 0, 0),
			.scaled_i8_product_fs = 60000,
		},
};

#if defined(__x86_64__)
static const struct cpu_kernels cpu_isa_avx2 = {
	TABLE(avx2),
	.costs =
		{
			.rms_norm = {30, {145, 255, 190, 205}},
			.fused_add_rms_norm = {30, {275, 440, 290, 360}},
			.silu_and_mul = {30, {440, 450, 440, 2400}},
			.gelu = {30, {790, 715, 785, 10000}},
			.softmax = {30, {410, 380, 390, 2500}},
			.linear_weight = {100, {140, 58, 48}},
			.linear_product_fs = 29000,
			.attend_cache = {300, {140, 70, 70}},
			.attend_product_fs = 60000,
			.rotary = {30, {340, 430, 270, 150}},
			.argmax = {30, {250, 255, 255}},
			.arithmetic = ANY(114, 132, 95, 1240, 254, 15, 33, 110, 252),
			.cast = ANY(107, 120, 130, 367, 714, 225, 212, 1490, 1740),
			.quant_largest = {30, {24, 62, 60}},
			.quant_scale = {30, {390, 459, 430}},
			.layer_norm = {30, {205, 275, 250, 275}},
			.sparse = {30, {1400, 1700, 1450}},
			.softmax_columns = {30, {1000, 1100, 1050, 3700}},
			.topk = ANY(384, 428, 396, 400, 792, 96, 96, 96, 500),
			.topk_kept_ns = 60,
			.matmul_product_fs = 22000,
			.scaled_weight = ANY(0, 0, 0, 210, 0, 20, 0, 0, 0),
			.scaled_i8_product_fs = 19000,
		},
};

/* What the sets of AVX-512 share; scaled_mm's i8 products are their own. */
#define AVX512_COSTS \
	.rms_norm = {30, {115, 95, 105, 138}}, \
	.fused_add_rms_norm = {30, {290, 145, 190, 440}}, \
	.silu_and_mul = {30, {190, 115, 135, 1200}}, \
	.gelu = {30, {240, 190, 250, 9400}}, \
	.softmax = {30, {203, 130, 150, 1220}}, \
	.linear_weight = {100, {135, 55, 50}}, \
	.linear_product_fs = 27000, \
	.attend_cache = {300, {60, 35, 35}}, \
	.attend_product_fs = 10000, \
	.rotary = {30, {137, 210, 172, 150}}, \
	.argmax = {30, {190, 190, 190}}, \
	.arithmetic = ANY(122, 51, 61, 506, 258, 14, 29, 122, 272), \
	.cast = ANY(59, 50, 59, 142, 326, 144, 146, 495, 631), \
	.quant_largest = {30, {29, 24, 27}}, \
	.quant_scale = {30, {143, 183, 187}}, \
	.layer_norm = {30, {165, 120, 145, 230}}, \
	.sparse = {30, {520, 540, 580}}, \
	.softmax_columns = {30, {450, 500, 480, 2000}}, \
	.topk = ANY(170, 181, 183, 250, 1150, 82, 82, 82, 500), \
	.topk_kept_ns = 60, \
	.matmul_product_fs = 12000, \
	.scaled_weight = ANY(0, 0, 0, 110, 0, 15, 0, 0, 0),

static const struct cpu_kernels cpu_isa_avx512 = {
	TABLE(avx512),
	.costs = {AVX512_COSTS .scaled_i8_product_fs = 33000},
};

static const struct cpu_kernels cpu_isa_avx512_vnni = {
	.isa = "avx512_vnni",
	TABLE_OF_BF16(avx512),
	TABLE_OF_OTHERS(avx512),
	.scaled_mm = &cpu_scaled_mm_avx512_vnni,
	.costs = {AVX512_COSTS .scaled_i8_product_fs = 10000},
};

static const struct cpu_kernels cpu_isa_avx512_bf16 = {
	.isa = "avx512_bf16",
	TABLE_OF_BF16(avx512_bf16),
	TABLE_OF_OTHERS(avx512),
	.scaled_mm = &cpu_scaled_mm_avx512_vnni,
	.costs = {AVX512_COSTS .scaled_i8_product_fs = 10000},
};
#endif

const struct cpu_kernels *const cpu_isas[] = {
#define X(set) &cpu_isa_##set,
	CPU_ISA_MAP(X)
#undef X
#if defined(__x86_64__)
	&cpu_isa_avx512_vnni,
	&cpu_isa_avx512_bf16,
#endif
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
	if (kernels == &cpu_isa_avx512_bf16)
		return isa_has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
	if (kernels == &cpu_isa_avx512_vnni)
		return isa_has_avx512() && __builtin_cpu_supports("avx512vnni");
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
