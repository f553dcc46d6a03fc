/* The three ops once more, straight from their definitions, in f64 and in one loop each: what came back is held against this. */
#include <math.h>
#include <string.h>

#include "client/examples/demo.h"
#include "proto/element.h"

static const struct demo_distance nothing_alike = {INFINITY, INFINITY};

/* What opd promises for f32 or bf16: |got - want| at most atol + rtol·|want|. */
static double allowed(opd_dtype dtype, double want)
{
	return dtype == OPD_f32 ? 1e-5 + 1.3e-6 * fabs(want) : 1e-3 + 1.6e-2 * fabs(want);
}

static void distance_add(struct demo_distance *distance, double got, double want, double bound)
{
	const double error = fabs(got - want);
	if (error > distance->error)
		distance->error = error;
	const double share = isfinite(error) ? error / bound : INFINITY;
	if (share > distance->share)
		distance->share = share;
}

static bool is_matrix(const opd_tensor *tensor, opd_dtype dtype, int64_t rows, int64_t columns)
{
	return tensor->dtype == dtype && tensor->rank == 2 && tensor->shape[0] == rows && tensor->shape[1] == columns &&
	       tensor->data != NULL;
}

/* Element `index` of row-major bytes. */
static double element_at(opd_dtype dtype, const void *data, int64_t index)
{
	return element_load_f64(dtype, (const unsigned char *)data + (size_t)index * opd_dtype_bytes(dtype));
}

struct demo_distance demo_compare_embedding(const struct demo_model *model, const opd_tensor *rows)
{
	const int64_t width = model->table.shape[1];
	if (!is_matrix(rows, model->table.dtype, model->tokens, width))
		return nothing_alike;
	const size_t row_bytes = (size_t)width * opd_dtype_bytes(rows->dtype);
	const unsigned char *row = opd_tensor_data(rows);
	for (int64_t t = 0; t < model->tokens; t++, row += row_bytes)
		if (memcmp(row, (const unsigned char *)model->table.data + (size_t)model->ids[t] * row_bytes, row_bytes) != 0)
			return nothing_alike;
	return (struct demo_distance){0, 0};
}

struct demo_distance demo_compare_rms_norm(const struct demo_model *model, const opd_tensor *x, double epsilon,
                                           const opd_tensor *got)
{
	const int64_t width = model->norm.shape[0];
	if (!is_matrix(x, x->dtype, model->tokens, width) || !is_matrix(got, x->dtype, model->tokens, width))
		return nothing_alike;
	struct demo_distance distance = {0, 0};
	for (int64_t row = 0; row < model->tokens; row++) {
		double squares = 0;
		for (int64_t i = 0; i < width; i++) {
			const double value = element_at(x->dtype, opd_tensor_data(x), row * width + i);
			squares += value * value;
		}
		const double scale = 1 / sqrt(squares / (double)width + epsilon);
		for (int64_t i = 0; i < width; i++) {
			const double want = element_at(x->dtype, opd_tensor_data(x), row * width + i) * scale *
			                    element_at(model->norm.dtype, model->norm.data, i);
			distance_add(&distance, element_at(got->dtype, opd_tensor_data(got), row * width + i), want,
			             allowed(got->dtype, want));
		}
	}
	return distance;
}

struct demo_distance demo_compare_linear(const struct demo_model *model, const opd_tensor *x, const opd_tensor *got)
{
	const int64_t width = model->query.shape[1], columns = model->query.shape[0];
	if (!is_matrix(x, x->dtype, model->tokens, width) || !is_matrix(got, x->dtype, model->tokens, columns))
		return nothing_alike;
	struct demo_distance distance = {0, 0};
	/* A sum of K products in f32 may be off by this much of the sum of their magnitudes. */
	const double sum_share = 2 * sqrt((double)width) * 0x1p-24;
	for (int64_t row = 0; row < model->tokens; row++) {
		for (int64_t n = 0; n < columns; n++) {
			double want = 0, magnitudes = 0;
			for (int64_t k = 0; k < width; k++) {
				const double product = element_at(x->dtype, opd_tensor_data(x), row * width + k) *
				                       element_at(model->query.dtype, model->query.data, n * width + k);
				want += product;
				magnitudes += fabs(product);
			}
			distance_add(&distance, element_at(got->dtype, opd_tensor_data(got), row * columns + n), want,
			             allowed(got->dtype, want) + sum_share * magnitudes);
		}
	}
	return distance;
}
