#include "providers/ops/tolerance.h"

static const opd_tolerance defaults[] = {
	{.dtype = OPD_f64, .atol = 1e-8, .rtol = 1e-8}, {.dtype = OPD_f32, .atol = 1e-5, .rtol = 1.3e-6},   {.dtype = OPD_f16, .atol = 1e-3, .rtol = 1e-3},
	{.dtype = OPD_bf16, .atol = 1e-3, .rtol = 1.6e-2}, {.dtype = OPD_f8_e4m3fn, .atol = 0.1, .rtol = 0.1}, {.dtype = OPD_f8_e5m2, .atol = 0.2, .rtol = 0.2},
};

static const opd_tolerance *find(const opd_tolerance *list, uint32_t count, opd_dtype dtype)
{
	for (uint32_t i = 0; i < count; i++)
		if (list[i].dtype == dtype)
			return &list[i];
	return NULL;
}

opd_tolerance tolerance_of(const opd_op *op, opd_dtype dtype)
{
	const opd_tolerance *found = find(op->tolerances, op->tolerance_count, dtype);
	if (found == NULL)
		found = find(defaults, sizeof defaults / sizeof *defaults, dtype);
	return found != NULL ? *found : (opd_tolerance){.dtype = dtype};
}
