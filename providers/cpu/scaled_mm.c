/* scaled_mm: i8 products in i32 where they lie; f8 converted to f32 block by block and multiplied by linear's kernels, whose order of additions doesn't depend on
 * the way (linear_kernel.c). */
#include <assert.h>
#include <string.h>

#include "providers/cpu/call.h"
#include "uuid/cpu_scaled_mm.h"

enum { SCALED_A, SCALED_B, SCALED_A_SCALE, SCALED_B_SCALE, SCALED_BIAS, SCALED_DTYPE };

/* Multiples of every tile's rows and columns, of linear's and of the i8 ones. */
#define ITEM_ROWS 60
#define ITEM_COLUMNS 60
/* Beyond it a sum of products of i8 may not fit an i32. */
#define I8_DEPTH 131071
/* From here on f8 goes in register tiles: they cost as much for fewer rows. */
#define TILED_ROWS 3

static bool scaled_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *a = cpu_tensor(call, SCALED_A);
	if (a->dtype == OPD_i8 && a->shape[1] > I8_DEPTH)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "last dimension of a %lld, of i8 at most %d", (long long)a->shape[1], I8_DEPTH);
	return cpu_accept_rows("a", a, reason) && cpu_accept_rows("b", cpu_tensor(call, SCALED_B), reason) &&
	       cpu_accept_rows("scale_b", cpu_tensor(call, SCALED_B_SCALE), reason) &&
	       cpu_accept_rows("bias", cpu_tensor(call, SCALED_BIAS), reason);
}

struct scaled_work {
	const struct cpu_kernels *kernels;
	cpu_cast_fn to_f32; /* of f8; NULL: i8 */
	const unsigned char *a, *b;
	uint64_t a_stride, b_stride; /* bytes */
	const float *row_scales, *column_scales;
	uint64_t row_scale_stride; /* 0: one for all */
	bool scale_each;           /* column_scales has one a column */
	const unsigned char *bias; /* NULL: none */
	unsigned char *y;
	unsigned dtype; /* of y */
	uint64_t bytes; /* of an element of y */
	uint64_t rows, columns, depth;
	uint64_t row_items;
	float *scratch; /* of thread t: at t·scratch_floats */
	size_t scratch_floats;
	struct cpu_cancel *cancel; /* of items: asked once a block of depth */
};

static uint64_t scaled_cost(const opd_impl *impl, const opd_call *call)
{
	const struct cpu_costs *costs = &cpu_kernels_of(impl)->costs;
	const opd_tensor *a = cpu_tensor(call, SCALED_A), *b = cpu_tensor(call, SCALED_B);
	double products = (double)call->outputs[0]->elements * (double)a->shape[1];
	uint32_t product_fs = a->dtype == OPD_i8 ? costs->scaled_i8_product_fs : costs->linear_product_fs;
	double ns = (double)cpu_any_cost_ns(&costs->scaled_weight, b->dtype, b->elements) + products * product_fs * 1e-6;
	return ns < 1e18 ? (uint64_t)ns : (uint64_t)1e18;
}

/* Which results, and for f8 a thread's scratch for them. */
struct scaled_item {
	uint64_t row, column;
	size_t rows, columns;
	float *sums;   /* [ITEM_ROWS][ITEM_COLUMNS] */
	float *a;      /* [ITEM_ROWS][CPU_LINEAR_BLOCK] */
	float *weight; /* [ITEM_COLUMNS][CPU_LINEAR_BLOCK] */
};

enum { SUMS_FLOATS = ITEM_ROWS * ITEM_COLUMNS, A_FLOATS = ITEM_ROWS * CPU_LINEAR_BLOCK, WEIGHT_FLOATS = ITEM_COLUMNS * CPU_LINEAR_BLOCK };

static struct scaled_item scaled_item_of(const struct scaled_work *work, uint64_t index)
{
	struct scaled_item item = {.row = index % work->row_items * ITEM_ROWS, .column = index / work->row_items * ITEM_COLUMNS};
	item.rows = work->rows - item.row < ITEM_ROWS ? (size_t)(work->rows - item.row) : ITEM_ROWS;
	item.columns = work->columns - item.column < ITEM_COLUMNS ? (size_t)(work->columns - item.column) : ITEM_COLUMNS;
	return item;
}

static void item_finish(const struct scaled_work *work, const struct scaled_item *item)
{
	for (size_t m = 0; m < item->rows; m++) {
		uint64_t row = item->row + m;
		struct cpu_scaled_finish finish = {
			.sums = item->sums + m * ITEM_COLUMNS,
			.row_scale = work->row_scales[row * work->row_scale_stride],
			.column_scales = work->column_scales + (work->scale_each ? item->column : 0),
			.scale_each = work->scale_each,
			.bias = work->bias == NULL ? NULL : work->bias + item->column * work->bytes,
			.count = item->columns,
		};
		work->kernels->scaled_mm->finish[work->dtype](&finish, work->y + (row * work->columns + item->column) * work->bytes);
	}
}

/* ---- i8 ----------------------------------------------------------------------------------------------------------------- */

static void scaled_i8(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct scaled_work *work = context;
	int32_t sums[SUMS_FLOATS];
	float converted[SUMS_FLOATS];
	for (uint64_t i = begin; i < end; i++) {
		struct scaled_item item = scaled_item_of(work, i);
		item.sums = converted;
		struct cpu_scaled_bytes bytes = {
			.a = (const int8_t *)work->a + item.row * work->a_stride,
			.b = (const int8_t *)work->b + item.column * work->b_stride,
			.a_stride = work->a_stride,
			.b_stride = work->b_stride,
			.rows = item.rows,
			.columns = item.columns,
			.depth = (size_t)work->depth,
			.sums = sums,
			.sums_stride = ITEM_COLUMNS,
		};
		work->kernels->scaled_mm->bytes(&bytes);
		for (size_t m = 0; m < item.rows; m++)
			work->kernels->scaled_mm->convert(sums + m * ITEM_COLUMNS, item.sums + m * ITEM_COLUMNS, item.columns);
		item_finish(work, &item);
	}
}

/* ---- f8 ----------------------------------------------------------------------------------------------------------------- */

static size_t round_up(size_t value, size_t multiple)
{
	return (value + multiple - 1) / multiple * multiple;
}

/* Rows [0, count) of an f8 matrix, elements [from, from + depth) of each, as f32 rows of `padded` elements: zeros behind them, and rows of zeros up to
 * `padded_count`. */
static void f8_block(const struct scaled_work *work, const unsigned char *rows, uint64_t stride, size_t count, size_t padded_count,
                     uint64_t from, size_t depth, size_t padded, float *to)
{
	for (size_t r = 0; r < count; r++) {
		work->to_f32(rows + r * stride + from, to + r * padded, depth, CPU_NEAR);
		memset(to + r * padded + depth, 0, (padded - depth) * sizeof(float));
	}
	memset(to + count * padded, 0, (padded_count - count) * padded * sizeof(float));
}

/* A row at a time: linear's sums of one block begin at 0. */
static void f8_multiply_rows(const struct scaled_work *work, const struct scaled_item *item, size_t depth, size_t padded)
{
	for (size_t m = 0; m < item->rows; m++) {
		float sums[ITEM_COLUMNS];
		work->kernels->linear->dots[CPU_F32](item->a + m * padded, item->weight, (int64_t)padded, depth, item->columns, false, sums);
		for (size_t n = 0; n < item->columns; n++)
			item->sums[m * ITEM_COLUMNS + n] += sums[n];
	}
}

static void f8_multiply_tiles(const struct scaled_work *work, const struct scaled_item *item, size_t padded)
{
	const struct cpu_linear_kernels *kernels = work->kernels->linear;
	for (size_t n = 0; n < item->columns; n += kernels->tile_columns)
		for (size_t m = 0; m < item->rows; m += kernels->tile_rows)
			kernels->tile(item->a + m * padded, item->weight + n * padded, padded, item->sums + m * ITEM_COLUMNS + n, ITEM_COLUMNS);
}

static void scaled_f8(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	const struct scaled_work *work = context;
	for (uint64_t i = begin; i < end; i++) {
		struct scaled_item item = scaled_item_of(work, i);
		item.sums = work->scratch + thread * work->scratch_floats;
		item.a = item.sums + SUMS_FLOATS;
		item.weight = item.a + A_FLOATS;
		size_t rows = round_up(item.rows, work->kernels->linear->tile_rows);
		size_t columns = round_up(item.columns, work->kernels->linear->tile_columns);
		memset(item.sums, 0, rows * ITEM_COLUMNS * sizeof(float));
		for (uint64_t from = 0; from < work->depth && !cpu_cancelled(work->cancel); from += CPU_LINEAR_BLOCK) {
			size_t depth = work->depth - from < CPU_LINEAR_BLOCK ? (size_t)(work->depth - from) : CPU_LINEAR_BLOCK;
			size_t padded = round_up(depth, 16);
			f8_block(work, work->a + item.row * work->a_stride, work->a_stride, item.rows, rows, from, depth, padded, item.a);
			f8_block(work, work->b + item.column * work->b_stride, work->b_stride, item.columns, columns, from, depth, padded, item.weight);
			if (item.rows < TILED_ROWS)
				f8_multiply_rows(work, &item, depth, padded);
			else
				f8_multiply_tiles(work, &item, padded);
		}
		item_finish(work, &item);
	}
}

/* ---- Run ---------------------------------------------------------------------------------------------------------------- */

static struct scaled_work scaled_work_of(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *a = cpu_tensor(call, SCALED_A), *b = cpu_tensor(call, SCALED_B), *bias = cpu_tensor(call, SCALED_BIAS);
	const opd_tensor *row_scales = cpu_tensor(call, SCALED_A_SCALE), *column_scales = cpu_tensor(call, SCALED_B_SCALE);
	const opd_tensor *y = call->outputs[0];
	return (struct scaled_work){
		.kernels = cpu_kernels_of(impl),
		.to_f32 = a->dtype == OPD_i8 ? NULL : cpu_kernels_of(impl)->cast->narrow[a->dtype][OPD_f32],
		.a = a->shape[1] == 0 ? NULL : opd_tensor_data(a),
		.b = a->shape[1] == 0 ? NULL : opd_tensor_data(b),
		.a_stride = a->shape[1] == 0 ? 0 : (uint64_t)a->strides[0],
		.b_stride = a->shape[1] == 0 ? 0 : (uint64_t)b->strides[0],
		.row_scales = opd_tensor_data(row_scales),
		.row_scale_stride = row_scales->elements == 1 ? 0 : (uint64_t)row_scales->strides[0],
		.column_scales = opd_tensor_data(column_scales),
		.scale_each = column_scales->elements != 1,
		.bias = bias == NULL ? NULL : opd_tensor_data(bias),
		.y = opd_tensor_data(y),
		.dtype = cpu_dtype_index(y->dtype),
		.bytes = opd_dtype_bytes(y->dtype),
		.rows = (uint64_t)a->shape[0],
		.columns = (uint64_t)b->shape[0],
		.depth = (uint64_t)a->shape[1],
		.row_items = ((uint64_t)a->shape[0] + ITEM_ROWS - 1) / ITEM_ROWS,
	};
}

static opd_status scaled_run_f8(struct scaled_work *work, const opd_exec *exec, uint64_t items, uint64_t cost_ns, opd_error *error)
{
	assert(ITEM_ROWS % work->kernels->linear->tile_rows == 0 && ITEM_COLUMNS % work->kernels->linear->tile_columns == 0);
	work->scratch_floats = SUMS_FLOATS + A_FLOATS + WEIGHT_FLOATS;
	uint64_t bytes = work->scratch_floats * sizeof(float) * cpu_threads(exec, items, cost_ns);
	work->scratch = exec->host->alloc(exec->host, bytes);
	if (work->scratch == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "scaled_mm: no %llu bytes of host memory for scratch", (unsigned long long)bytes);
	struct cpu_cancel cancel = {.exec = exec};
	work->cancel = &cancel;
	opd_status status = cpu_for_long(&cancel, items, cost_ns, scaled_f8, work, error);
	exec->host->free(exec->host, work->scratch);
	return status;
}

static opd_status scaled_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const int64_t shape[2] = {cpu_tensor(call, SCALED_A)->shape[0], cpu_tensor(call, SCALED_B)->shape[0]};
	opd_status status = cpu_expect_shape(impl, call, 0, opd_dtype_parse(call->args[SCALED_DTYPE].str), 2, shape, error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	struct scaled_work work = scaled_work_of(impl, call);
	uint64_t items = work.row_items * ((work.columns + ITEM_COLUMNS - 1) / ITEM_COLUMNS), cost_ns = scaled_cost(impl, call);
	if (work.to_f32 == NULL)
		return cpu_for(exec, items, cost_ns, scaled_i8, &work, error);
	return scaled_run_f8(&work, exec, items, cost_ns, error);
}

const opd_impl cpu_scaled_mm = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "scaled_mm",
	.schema = "scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias=None, str out_dtype=\"bf16\") -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_scaled_mm,
	.predicate = scaled_predicate,
	.cost_ns = scaled_cost,
	.run = scaled_run,
};
