/* Quantisation to f8_e4m3fn by a scale: static_quant_fp8 (given) and dynamic_quant_fp8 (from the values).
 *
 * Each step is rounded as f32 arithmetic rounds it, the reciprocal of the scale included: the results are exact, not within a
 * tolerance. An f64 x is scaled in f64; the scales are f32 all the same. */
#include <math.h>
#include <stdatomic.h>

#include "providers/ops/kernel.h"
#include "providers/ops/ops.h"
#include "uuid/native_quant.h"

/* The largest finite f8_e4m3fn. */
#define F8_LARGEST 448.0
/* Below it a scale would lose its precision to f32's denormals, and zeros would divide by zero. */
#define SCALE_LEAST (1 / (F8_LARGEST * 512))

/* ---- What both share --------------------------------------------------------------------------------------------------- */

/* 1/scale as a call of x's dtype computes it. */
static double quant_inverse(opd_dtype dtype, double scale)
{
	return kernel_round_work(dtype, 1 / scale);
}

/* clamp(x·inverse): what is stored rounds to nearest even; a NaN passes the comparisons and stays NaN. */
static double quant_value(opd_dtype dtype, double x, double inverse)
{
	double value = kernel_round_work(dtype, x * inverse);
	if (value > F8_LARGEST)
		return F8_LARGEST;
	return value < -F8_LARGEST ? -F8_LARGEST : value;
}

/* Quantises elements [begin, begin + count) of a line into those of an f8 line. */
static void quant_chunk(const struct kernel_line *from, const struct kernel_line *to, int64_t begin, int64_t count,
                        double inverse)
{
	double values[KERNEL_CHUNK];
	kernel_load(from, begin, count, values);
	for (int64_t i = 0; i < count; i++) {
		values[i] = quant_value(from->dtype, values[i], inverse);
		element_store_f64(OPD_f8_e4m3fn, kernel_line_at(to, begin + i), values[i]);
	}
}

static void quant_line(const struct kernel_line *from, const struct kernel_line *to, double inverse)
{
	for (int64_t i = 0; i < from->extent; i += KERNEL_CHUNK)
		quant_chunk(from, to, i, kernel_chunk(i, from->extent), inverse);
}

/* Chunks of `elements` elements. */
static uint64_t quant_chunks(uint64_t elements)
{
	return (elements + KERNEL_CHUNK - 1) / KERNEL_CHUNK;
}

/* All of x by one scale, a chunk an item. */
struct quant_all {
	struct kernel_view from;
	struct kernel_line to;
	double inverse;
	_Atomic uint64_t largest; /* bits of the largest magnitude: of doubles that are not negative they rise with the number */
};

/* Calls `visit` for the runs of x that make up chunk `item`. */
static void quant_all_chunk(struct quant_all *all, uint64_t item,
                            void (*visit)(struct quant_all *, const struct kernel_line *, uint64_t))
{
	uint64_t at = item * KERNEL_CHUNK;
	uint64_t end = at + (uint64_t)kernel_chunk((int64_t)at, all->to.extent);
	while (at < end) {
		struct kernel_line run = kernel_view_run(&all->from, at, (int64_t)(end - at));
		visit(all, &run, at);
		at += (uint64_t)run.extent;
	}
}

static void quant_all_visit(struct quant_all *all, const struct kernel_line *run, uint64_t at)
{
	struct kernel_line to = all->to;
	to.data = kernel_line_at(&all->to, (int64_t)at);
	quant_chunk(run, &to, 0, run->extent, all->inverse);
}

static void quant_all_item(const struct kernel_job *job, uint64_t item, void *scratch)
{
	(void)scratch;
	quant_all_chunk((struct quant_all *)job->context, item, quant_all_visit);
}

/* Nanoseconds an element: a conversion, a multiplication, an f8 rounded by the slow and obvious way. */
enum { QUANT_NS = 16 };

static uint64_t quant_cost(const opd_impl *impl, const opd_call *call)
{
	(void)impl;
	return kernel_ns(300 + (double)QUANT_NS * (double)call->outputs[0]->elements);
}

static struct quant_all quant_all_begin(const opd_call *call)
{
	const opd_tensor *x = kernel_tensor(call, 0);
	struct quant_all all = {.from = kernel_view(x, x->rank, x->shape), .to = kernel_flat(call->outputs[0])};
	return all;
}

/* ---- static_quant_fp8 -------------------------------------------------------------------------------------------------- */

static opd_status static_quant_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	static const int64_t one = 1;
	const opd_tensor *x = kernel_tensor(call, 0);
	const opd_tensor *scale = kernel_tensor(call, 1);
	opd_status status = kernel_expect_float(op, "x", x, error);
	if (status == OPD_OK)
		status = kernel_expect_dtype(op, "scale", scale, OPD_f32, error);
	if (status == OPD_OK)
		status = kernel_expect_shape(op, "scale", scale, 1, &one, "one for all of x", error);
	if (status == OPD_OK)
		status = kernel_output_like(op, outputs[0], OPD_f8_e4m3fn, x, error);
	return status;
}

static opd_status static_quant_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec,
                                   opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK || opd_tensor_empty(call->outputs[0]))
		return status;
	struct quant_all all = quant_all_begin(call);
	const struct kernel_job job = {.impl = impl, .call = call, .exec = exec, .context = &all};
	all.inverse =
		quant_inverse(kernel_tensor(call, 0)->dtype, element_load_f64(OPD_f32, opd_tensor_data(kernel_tensor(call, 1))));
	return kernel_for(&job, quant_chunks(call->outputs[0]->elements), QUANT_NS * KERNEL_CHUNK, quant_all_item, error);
}

/* Variants: 0 rows of hidden; 1 rank 1; 2 rank 3; 3 a scale that clamps most values. */
static opd_status static_quant_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	static const uint32_t ranks[] = {2, 1, 3, 2};
	static const int64_t one = 1;
	opd_status status = kernel_generator_begin(op, generator, 4, error);
	if (status == OPD_OK)
		status = kernel_generator_float(op, generator, error);
	if (status != OPD_OK)
		return status;
	uint32_t variant = generator->variant;
	int64_t rows = generator->dims[0], hidden = generator->dims[1];
	int64_t shapes[4][3] = {{rows, hidden}, {hidden}, {2, rows, hidden}, {rows, hidden}};
	void *scale;
	status = kernel_generate(op, generator, "x", generator->dtype, ranks[variant], shapes[variant], 1, error);
	if (status == OPD_OK)
		status = kernel_generate_raw(op, generator, "scale", OPD_f32, 1, &one, &scale, error);
	if (status == OPD_OK)
		*(float *)scale = (float)generator->pick(generator, 1, 64) / (variant == 3 ? 65536 : 1024);
	return status;
}

static const opd_op static_quant_fp8;
static const opd_impl static_quant_native =
	KERNEL_NATIVE("static_quant_fp8", &static_quant_fp8, static_quant_run, quant_cost, OPD_UUID_native_quant);
static const int64_t quant_dims[] = {8, 320};

static const opd_op static_quant_fp8 = {
	.struct_bytes = sizeof static_quant_fp8,
	.schema = "static_quant_fp8(Tensor x, Tensor scale) -> Tensor",
	.doc = "x/scale [1], clamped to +-448, to f8_e4m3fn",
	.activations = "x",
	.flags = OPD_OP_ROWS,
	.shape = static_quant_shape,
	.generate = static_quant_generate,
	.dims = "rows,hidden",
	.default_dims = quant_dims,
	.dim_count = 2,
	.native = &static_quant_native,
};

/* ---- dynamic_quant_fp8 ------------------------------------------------------------------------------------------------- */

static opd_status dynamic_quant_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	static const int64_t one = 1;
	const opd_tensor *x = kernel_tensor(call, 0);
	const bool per_token = kernel_bool(call, 1);
	opd_status status = kernel_expect_float(op, "x", x, error);
	if (status == OPD_OK)
		status = kernel_expect_rank_min(op, "x", x, per_token ? 1 : 0, error);
	if (status == OPD_OK)
		status = kernel_output_like(op, outputs[0], OPD_f8_e4m3fn, x, error);
	if (status == OPD_OK && !per_token)
		status = kernel_output_set(op, outputs[1], OPD_f32, 1, &one, error);
	if (status == OPD_OK && per_token)
		status = kernel_output_like(op, outputs[1], OPD_f32, x, error);
	if (status == OPD_OK && per_token)
		outputs[1]->shape[x->rank - 1] = 1;
	return status;
}

/* The scale of values of this largest magnitude: a float. */
static double dynamic_quant_scale(opd_dtype dtype, double largest)
{
	double scale = kernel_round_work(dtype, largest / F8_LARGEST);
	double least = kernel_round_work(dtype, SCALE_LEAST);
	return (double)(float)(scale > least ? scale : least);
}

/* The largest magnitude of a line, or `largest` when that is more; NaN is passed over. */
static double line_largest(const struct kernel_line *line, double largest)
{
	double values[KERNEL_CHUNK];
	for (int64_t at = 0; at < line->extent; at += KERNEL_CHUNK) {
		int64_t count = kernel_chunk(at, line->extent);
		kernel_load(line, at, count, values);
		for (int64_t i = 0; i < count; i++)
			largest = fabs(values[i]) > largest ? fabs(values[i]) : largest;
	}
	return largest;
}

static void store_scale(const opd_tensor *scales, uint64_t index, double scale)
{
	element_store_f64(OPD_f32, kernel_element(scales, index), scale);
}

static void dynamic_quant_row_item(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const opd_tensor *x = kernel_tensor(job->call, 0);
	const struct kernel_line from = kernel_row(x, item);
	const struct kernel_line to = kernel_row(job->call->outputs[0], item);
	const double scale = dynamic_quant_scale(x->dtype, line_largest(&from, 0));
	(void)scratch;
	store_scale(job->call->outputs[1], item, scale);
	quant_line(&from, &to, quant_inverse(x->dtype, scale));
}

static opd_status dynamic_quant_rows(const struct kernel_job *job, opd_error *error)
{
	const opd_tensor *x = kernel_tensor(job->call, 0);
	const opd_tensor *scales = job->call->outputs[1];
	if (!opd_tensor_empty(x))
		return kernel_for(job, scales->elements, QUANT_NS * (uint64_t)opd_tensor_last(x), dynamic_quant_row_item, error);
	for (uint64_t i = 0; i < scales->elements; i++) /* rows of no elements */
		store_scale(scales, i, dynamic_quant_scale(x->dtype, 0));
	return OPD_OK;
}

/* Raises all->largest: the maximum doesn't depend on the order. */
static void largest_visit(struct quant_all *all, const struct kernel_line *run, uint64_t at)
{
	double largest = line_largest(run, 0);
	uint64_t bits;
	uint64_t seen = atomic_load(&all->largest);
	(void)at;
	memcpy(&bits, &largest, sizeof bits);
	while (bits > seen && !atomic_compare_exchange_weak(&all->largest, &seen, bits))
		continue;
}

static void largest_item(const struct kernel_job *job, uint64_t item, void *scratch)
{
	(void)scratch;
	quant_all_chunk((struct quant_all *)job->context, item, largest_visit);
}

static opd_status dynamic_quant_all(struct kernel_job *job, opd_error *error)
{
	const opd_dtype dtype = kernel_tensor(job->call, 0)->dtype;
	struct quant_all all = quant_all_begin(job->call);
	uint64_t chunks = quant_chunks(job->call->outputs[0]->elements);
	double largest = 0;
	job->context = &all;
	opd_status status = kernel_for(job, chunks, QUANT_NS / 4 * KERNEL_CHUNK, largest_item, error);
	if (status != OPD_OK)
		return status;
	uint64_t bits = atomic_load(&all.largest);
	memcpy(&largest, &bits, sizeof largest);
	double scale = dynamic_quant_scale(dtype, largest);
	store_scale(job->call->outputs[1], 0, scale);
	all.inverse = quant_inverse(dtype, scale);
	return kernel_for(job, chunks, QUANT_NS * KERNEL_CHUNK, quant_all_item, error);
}

static opd_status dynamic_quant_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec,
                                    opd_error *error)
{
	struct kernel_job job = {.impl = impl, .call = call, .exec = exec};
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK)
		return status;
	return kernel_bool(call, 1) ? dynamic_quant_rows(&job, error) : dynamic_quant_all(&job, error);
}

/* Variants: 0 per token; 1 per tensor; 2 per token, rank 3; 3 per tensor, rank 1; 4 per token, rows under the least scale. */
static opd_status dynamic_quant_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	static const uint32_t ranks[] = {2, 2, 3, 1, 2};
	opd_status status = kernel_generator_begin(op, generator, 5, error);
	if (status == OPD_OK)
		status = kernel_generator_float(op, generator, error);
	if (status != OPD_OK)
		return status;
	uint32_t variant = generator->variant;
	int64_t rows = generator->dims[0], hidden = generator->dims[1];
	int64_t shapes[5][3] = {{rows, hidden}, {rows, hidden}, {2, rows, hidden}, {hidden}, {rows, hidden}};
	generator->set_bool(generator, "per_token", variant % 2 == 0);
	return kernel_generate(op, generator, "x", generator->dtype, ranks[variant], shapes[variant], variant == 4 ? 1e-4 : 1, error);
}

static const opd_op dynamic_quant_fp8;
static const opd_impl dynamic_quant_native =
	KERNEL_NATIVE("dynamic_quant_fp8", &dynamic_quant_fp8, dynamic_quant_run, quant_cost, OPD_UUID_native_quant);

static const opd_op dynamic_quant_fp8 = {
	.struct_bytes = sizeof dynamic_quant_fp8,
	.schema = "dynamic_quant_fp8(Tensor x, bool per_token) -> (Tensor, Tensor)",
	.doc = "x over its largest magnitude/448, per token or in all, to f8_e4m3fn; and the scales",
	.activations = "x",
	.shape = dynamic_quant_shape,
	.generate = dynamic_quant_generate,
	.dims = "rows,hidden",
	.default_dims = quant_dims,
	.dim_count = 2,
	.native = &dynamic_quant_native,
};

const opd_op *const ops_quant[] = {&static_quant_fp8, &dynamic_quant_fp8, NULL};
