/* linear: what is taken, what it costs, and two ways through the weights that give the same bits.
 *
 * Few rows read each row of weight once, where it lies, against each row of x: as fast as memory. More rows go by items of ITEM_ROWS x
 * ITEM_COLUMNS results, whose blocks of x and weight are converted to f32 side by side in scratch (all of it stays in a second-level
 * cache) and multiplied in register tiles. linear_kernel.c says why an element's bits are the same either way.
 *
 * bf16 on processors that multiply pairs of it goes another way, the same for any number of rows: tiles of x and weight where they lie, as fast as memory up to some ten rows. */
#include <string.h>

#include "providers/cpu/call.h"
#include "uuid/cpu_linear.h"

/* From here on packing pays (measured with 4096x4096 weights: at 6 rows both ways take about as long). */
#define PACKED_ROWS 6
#define ITEM_ROWS 128
#define ITEM_COLUMNS 96 /* a multiple of every tile's columns */
/* Columns between two rows of x when there are few: so much weight stays in cache for the next. */
#define FEW_COLUMNS 16
/* Of products of pairs: columns of an item, a multiple of what their kernel takes side by side, and how many bytes of rows of x, at most, a second-level cache keeps while weights pass by. */
#define PAIR_COLUMNS 24
#define PAIR_ROWS 128
#define PAIR_ROWS_BYTES (512 << 10)
/* Femtoseconds of a product. */
#define PAIR_PRODUCT_FS 6000
/* Longer sums go the way of f32, which asks in their middle whether the call was cancelled. */
#define PAIR_DEPTH_MAX (1 << 20)

static bool linear_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	return cpu_accept_dtype(x, reason) && cpu_accept_rows("x", x, reason) &&
	       cpu_accept_rows("weight", cpu_tensor(call, 1), reason) && cpu_accept_rows("bias", cpu_tensor(call, 2), reason);
}

struct linear_work {
	const struct cpu_linear_kernels *kernels;
	unsigned dtype;
	uint32_t element_bytes;
	struct cpu_rows x, y;
	const unsigned char *weight;
	int64_t weight_stride; /* elements */
	const unsigned char *bias; /* NULL: none */
	size_t rows, columns, k;
	size_t row_items, item_rows;
	float *scratch; /* of thread t: at t·scratch_floats */
	size_t scratch_floats;
	struct cpu_cancel *cancel; /* of items: asked once a block of depth */
};

static bool linear_by_pairs(const struct cpu_linear_kernels *kernels, const opd_tensor *x)
{
	return x->dtype == OPD_bf16 && kernels->pairs != NULL && opd_tensor_last(x) <= PAIR_DEPTH_MAX;
}

static uint64_t linear_cost(const opd_impl *impl, const opd_call *call)
{
	const struct cpu_costs *costs = &cpu_kernels_of(impl)->costs;
	const opd_tensor *x = cpu_tensor(call, 0);
	const opd_tensor *weight = cpu_tensor(call, 1);
	double products = (double)call->outputs[0]->elements * (double)opd_tensor_last(x);
	const bool pairs = linear_by_pairs(cpu_kernels_of(impl)->linear, x);
	double ns = (double)cpu_cost_ns(&costs->linear_weight, x->dtype, weight->elements) + products * (pairs ? PAIR_PRODUCT_FS : costs->linear_product_fs) * 1e-6;
	return ns < 1e18 ? (uint64_t)ns : (uint64_t)1e18;
}

static const void *linear_weight_at(const struct linear_work *work, size_t column, size_t k)
{
	return work->weight + ((uint64_t)column * (uint64_t)work->weight_stride + k) * work->element_bytes;
}

/* sums + bias to columns [column, column + count) of row `row` of y. */
static void linear_finish_row(const struct linear_work *work, const float *sums, size_t row, size_t column, size_t count)
{
	const void *bias = work->bias == NULL ? NULL : work->bias + column * work->element_bytes;
	unsigned char *y = cpu_row(&work->y, row);
	work->kernels->finish[work->dtype](sums, bias, y + column * work->element_bytes, count);
}

static void linear_dots_at(const struct linear_work *work, size_t row, size_t column, size_t count, float *sums)
{
	if (work->k == 0)
		memset(sums, 0, count * sizeof(float));
	else
		work->kernels->dots[work->dtype](cpu_row(&work->x, row), linear_weight_at(work, column, 0), work->weight_stride, work->k,
		                                 count, row == 0, sums);
}

static void linear_few(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct linear_work *work = context;
	float sums[FEW_COLUMNS];
	for (uint64_t n = begin; n < end; n += FEW_COLUMNS) {
		size_t count = end - n < FEW_COLUMNS ? (size_t)(end - n) : FEW_COLUMNS;
		for (size_t r = 0; r < work->rows; r++) {
			linear_dots_at(work, r, (size_t)n, count, sums);
			linear_finish_row(work, sums, r, (size_t)n, count);
		}
	}
}

/* One item: which results, and the scratch for their blocks. */
struct linear_item {
	size_t row, rows, padded_rows;
	size_t column, columns, padded_columns;
	float *x;      /* [padded_rows][padded k of the block] */
	float *weight; /* [padded_columns][padded k of the block] */
	float *sums;   /* [padded_rows][padded_columns] */
};

static size_t round_up(size_t value, size_t multiple)
{
	return (value + multiple - 1) / multiple * multiple;
}

static struct linear_item linear_item_of(const struct linear_work *work, uint64_t index, float *scratch)
{
	struct linear_item item = {
		.row = (size_t)(index % work->row_items) * ITEM_ROWS,
		.column = (size_t)(index / work->row_items) * ITEM_COLUMNS,
	};
	item.rows = work->rows - item.row < ITEM_ROWS ? work->rows - item.row : ITEM_ROWS;
	item.columns = work->columns - item.column < ITEM_COLUMNS ? work->columns - item.column : ITEM_COLUMNS;
	item.padded_rows = round_up(item.rows, work->kernels->tile_rows);
	item.padded_columns = round_up(item.columns, work->kernels->tile_columns);
	item.x = scratch;
	item.weight = item.x + item.padded_rows * CPU_LINEAR_BLOCK;
	item.sums = item.weight + item.padded_columns * CPU_LINEAR_BLOCK;
	return item;
}

/* Rows and columns that only fill up a tile are zeros. */
static void linear_pack_block(const struct linear_work *work, const struct linear_item *item, size_t from, size_t count, size_t padded)
{
	cpu_linear_pack_fn pack = work->kernels->pack[work->dtype];
	for (size_t m = 0; m < item->padded_rows; m++) {
		const unsigned char *row = m < item->rows ? cpu_row(&work->x, item->row + m) : NULL;
		if (row != NULL)
			pack(row + from * work->element_bytes, count, padded, item->x + m * padded);
		else
			memset(item->x + m * padded, 0, padded * sizeof(float));
	}
	for (size_t n = 0; n < item->padded_columns; n++) {
		if (n < item->columns)
			pack(linear_weight_at(work, item->column + n, from), count, padded, item->weight + n * padded);
		else
			memset(item->weight + n * padded, 0, padded * sizeof(float));
	}
}

static void linear_multiply_block(const struct linear_work *work, const struct linear_item *item, size_t padded)
{
	const struct cpu_linear_kernels *kernels = work->kernels;
	for (size_t n = 0; n < item->padded_columns; n += kernels->tile_columns)
		for (size_t m = 0; m < item->padded_rows; m += kernels->tile_rows)
			kernels->tile(item->x + m * padded, item->weight + n * padded, padded, item->sums + m * item->padded_columns + n,
			              item->padded_columns);
}

static void linear_items(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	const struct linear_work *work = context;
	for (uint64_t i = begin; i < end; i++) {
		struct linear_item item = linear_item_of(work, i, work->scratch + thread * work->scratch_floats);
		memset(item.sums, 0, item.padded_rows * item.padded_columns * sizeof(float));
		for (size_t from = 0; from < work->k && !cpu_cancelled(work->cancel); from += CPU_LINEAR_BLOCK) {
			size_t count = work->k - from < CPU_LINEAR_BLOCK ? work->k - from : CPU_LINEAR_BLOCK;
			size_t padded = round_up(count, 16);
			linear_pack_block(work, &item, from, count, padded);
			linear_multiply_block(work, &item, padded);
		}
		for (size_t m = 0; m < item.rows; m++)
			linear_finish_row(work, item.sums + m * item.padded_columns, item.row + m, item.column, item.columns);
	}
}

static opd_status linear_run_packed(struct linear_work *work, const opd_exec *exec, uint64_t cost_ns, opd_error *error)
{
	size_t rows = work->rows < ITEM_ROWS ? work->rows : ITEM_ROWS;
	size_t columns = work->columns < ITEM_COLUMNS ? round_up(work->columns, work->kernels->tile_columns) : ITEM_COLUMNS;
	rows = round_up(rows, work->kernels->tile_rows);
	work->scratch_floats = round_up((rows + columns) * CPU_LINEAR_BLOCK + rows * columns, 16);
	work->row_items = (work->rows + ITEM_ROWS - 1) / ITEM_ROWS;
	uint64_t items = (uint64_t)work->row_items * ((work->columns + ITEM_COLUMNS - 1) / ITEM_COLUMNS);
	uint64_t bytes = work->scratch_floats * sizeof(float) * cpu_threads(exec, items, cost_ns);
	work->scratch = exec->host->alloc(exec->host, bytes);
	if (work->scratch == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "linear: no %llu bytes of host memory for scratch", (unsigned long long)bytes);
	struct cpu_cancel cancel = {.exec = exec};
	work->cancel = &cancel;
	opd_status status = cpu_for_long(&cancel, items, cost_ns, linear_items, work, error);
	exec->host->free(exec->host, work->scratch);
	return status;
}

/* The results of some rows and PAIR_COLUMNS columns. */
static void linear_pair_item(const struct linear_work *work, size_t row, size_t rows, size_t column, size_t columns)
{
	float sums[CPU_LINEAR_PAIR_ROWS * PAIR_COLUMNS];
	for (size_t m = 0; m < rows; m += CPU_LINEAR_PAIR_ROWS) {
		const void *x[CPU_LINEAR_PAIR_ROWS];
		size_t count = rows - m < CPU_LINEAR_PAIR_ROWS ? rows - m : CPU_LINEAR_PAIR_ROWS;
		for (size_t i = 0; i < count; i++)
			x[i] = cpu_row(&work->x, row + m + i);
		work->kernels->pairs(x, count, linear_weight_at(work, column, 0), work->weight_stride, columns, work->k, row + m == 0, sums, PAIR_COLUMNS);
		for (size_t i = 0; i < count; i++)
			linear_finish_row(work, sums + i * PAIR_COLUMNS, row + m + i, column, columns);
	}
}

static void linear_pair_items(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	const struct linear_work *work = context;
	(void)thread;
	for (uint64_t i = begin; i < end; i++) {
		size_t row = (size_t)(i % work->row_items) * work->item_rows, column = (size_t)(i / work->row_items) * PAIR_COLUMNS;
		linear_pair_item(work, row, work->rows - row < work->item_rows ? work->rows - row : work->item_rows, column,
		                 work->columns - column < PAIR_COLUMNS ? work->columns - column : PAIR_COLUMNS);
	}
}

static opd_status linear_run_pairs(struct linear_work *work, const opd_exec *exec, uint64_t cost_ns, opd_error *error)
{
	const size_t fit = PAIR_ROWS_BYTES / (work->k * sizeof(uint16_t)) / CPU_LINEAR_PAIR_ROWS * CPU_LINEAR_PAIR_ROWS;
	work->item_rows = fit < CPU_LINEAR_PAIR_ROWS ? CPU_LINEAR_PAIR_ROWS : fit < PAIR_ROWS ? fit : PAIR_ROWS;
	work->row_items = (work->rows + work->item_rows - 1) / work->item_rows;
	return cpu_for(exec, (uint64_t)work->row_items * ((work->columns + PAIR_COLUMNS - 1) / PAIR_COLUMNS), cost_ns, linear_pair_items, work, error);
}

static opd_status linear_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *x = cpu_tensor(call, 0);
	const opd_tensor *weight = cpu_tensor(call, 1);
	const opd_tensor *bias = cpu_tensor(call, 2);
	opd_status status = cpu_expect_output(impl, call, 0, x, weight->shape[0], error);
	if (status != OPD_OK || call->outputs[0]->elements == 0)
		return status;
	struct linear_work work = {
		.kernels = cpu_kernels_of(impl)->linear,
		.dtype = cpu_dtype_index(x->dtype),
		.element_bytes = (uint32_t)opd_dtype_bytes(x->dtype),
		.y = cpu_rows_of(call->outputs[0]),
		.weight_stride = weight->strides[0],
		.bias = bias == NULL ? NULL : opd_tensor_data(bias),
		.columns = (size_t)weight->shape[0],
		.k = (size_t)opd_tensor_last(x),
	};
	work.rows = (size_t)(call->outputs[0]->elements / work.columns);
	if (work.k > 0) { /* else both are empty, and may have no memory at all */
		work.x = cpu_rows_of(x);
		work.weight = opd_tensor_data(weight);
	}
	uint64_t cost_ns = linear_cost(impl, call);
	if (linear_by_pairs(work.kernels, x) && work.k > 0)
		return linear_run_pairs(&work, exec, cost_ns, error);
	if (work.rows >= PACKED_ROWS && work.k > 0)
		return linear_run_packed(&work, exec, cost_ns, error);
	return cpu_for(exec, work.columns, cost_ns, linear_few, &work, error);
}

const opd_impl cpu_linear = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "linear",
	.schema = "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_linear,
	.predicate = linear_predicate,
	.cost_ns = linear_cost,
	.run = linear_run,
};
