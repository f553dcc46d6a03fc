/* matmul: what is taken, what it costs, and two ways through b that give the same bits (matmul_kernel.c says why).
 *
 * Few rows go against b's rows where they lie. More rows, or a b whose rows aren't contiguous, go by items of ITEM_ROWS x ITEM_COLUMNS results, whose blocks of a and b are
 * converted to f32 in scratch, b's side by side whatever its strides, and multiplied in register tiles. Where all batches share one b, their rows
 * are rows of one product. */
#include <string.h>

#include "providers/cpu/walk.h"
#include "uuid/cpu_matmul.h"

/* Up to here a row at a time is as fast as packing. */
#define FEW_ROWS 4
#define ITEM_ROWS 96     /* a multiple of every tile's rows */
#define ITEM_COLUMNS 128 /* a multiple of every tile's columns */
/* Distance between rows of a's block: not a power of two, whose rows would share sets of a cache. */
#define A_LEAD (CPU_MATMUL_BLOCK + 16)
/* Columns of b that are turned around together: a line of cache of f32. */
#define TURNED 16

static bool matmul_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return cpu_accept_dtype_of("a", cpu_tensor(call, 0), reason);
}

/* Some dimensions of a and how far apart their elements lie in it, and in b. */
struct matmul_dims {
	uint32_t rank;
	uint64_t shape[OPD_RANK_MAX];
	uint64_t a_strides[OPD_RANK_MAX], b_strides[OPD_RANK_MAX];
};

struct matmul_work {
	const struct cpu_matmul_kernels *kernels;
	cpu_cast_fn to_f32;
	const cpu_linear_finish_fn *finish; /* by index of dtype */
	unsigned dtype;
	uint64_t bytes; /* of an element */
	const unsigned char *a, *b;
	unsigned char *y;
	struct matmul_dims batch, row; /* row: all but b_strides */
	uint64_t a_step, b_step, b_column; /* elements between two k of a and of b, and between two columns of b */
	uint64_t batches, rows, columns, depth;
	uint64_t row_items, column_items, item_columns;
	float *scratch; /* of thread t: at t·scratch_floats */
	size_t scratch_floats;
	struct cpu_cancel *cancel; /* asked once a block of depth: strides of 0 make that as deep as a client likes */
};

static void dims_add(struct matmul_dims *dims, int64_t extent, uint64_t a_stride, uint64_t b_stride)
{
	dims->shape[dims->rank] = (uint64_t)extent;
	dims->a_strides[dims->rank] = a_stride;
	dims->b_strides[dims->rank++] = b_stride;
}

static uint64_t dims_offset(const struct matmul_dims *dims, const uint64_t *strides, uint64_t index)
{
	uint64_t offset = 0;
	for (uint32_t i = dims->rank; i-- > 0;) {
		offset += index % dims->shape[i] * strides[i];
		index /= dims->shape[i];
	}
	return offset;
}

/* Stride in a factor of the result's dimension `i`, one of its leading ones: 0 where the factor is broadcast. */
static uint64_t batch_stride(const opd_tensor *factor, uint32_t result_rank, uint32_t i)
{
	uint32_t missing = result_rank - factor->rank;
	return i < missing || factor->shape[i - missing] == 1 ? 0 : (uint64_t)factor->strides[i - missing];
}

static bool is_one_matrix(const opd_tensor *tensor)
{
	return tensor->elements == (uint64_t)tensor->shape[tensor->rank - 2] * (uint64_t)tensor->shape[tensor->rank - 1];
}

static struct matmul_work matmul_work_of(const opd_impl *impl, const opd_call *call)
{
	const opd_tensor *a = cpu_tensor(call, 0), *b = cpu_tensor(call, 1), *y = call->outputs[0];
	const struct cpu_kernels *kernels = cpu_kernels_of(impl);
	bool shared = is_one_matrix(b);
	struct matmul_work work = {
		.kernels = kernels->matmul,
		.to_f32 = kernels->cast->narrow[a->dtype][OPD_f32],
		.dtype = cpu_dtype_index(a->dtype),
		.finish = kernels->linear->finish,
		.bytes = opd_dtype_bytes(a->dtype),
		.a_step = (uint64_t)a->strides[a->rank - 1],
		.b_step = (uint64_t)b->strides[b->rank - 2],
		.b_column = (uint64_t)b->strides[b->rank - 1],
		.columns = (uint64_t)b->shape[b->rank - 1],
		.depth = (uint64_t)a->shape[a->rank - 1],
		.batches = 1,
		.rows = 1,
	};
	for (uint32_t i = 0; i + 2 < y->rank; i++)
		dims_add(shared ? &work.row : &work.batch, y->shape[i], batch_stride(a, y->rank, i), batch_stride(b, y->rank, i));
	dims_add(&work.row, y->shape[y->rank - 2], (uint64_t)a->strides[a->rank - 2], false);
	for (uint32_t i = 0; i < work.batch.rank; i++)
		work.batches *= work.batch.shape[i];
	for (uint32_t i = 0; i < work.row.rank; i++)
		work.rows *= work.row.shape[i];
	if (work.depth > 0) { /* else both are empty, and may have no memory at all */
		work.a = opd_tensor_data(a);
		work.b = opd_tensor_data(b);
	}
	return work;
}

static uint64_t matmul_cost(const opd_impl *impl, const opd_call *call)
{
	const struct cpu_costs *costs = &cpu_kernels_of(impl)->costs;
	const opd_tensor *a = cpu_tensor(call, 0), *b = cpu_tensor(call, 1);
	double products = (double)call->outputs[0]->elements * (double)opd_tensor_last(a);
	double ns = (double)cpu_cost_ns(&costs->linear_weight, a->dtype, b->elements) + products * costs->matmul_product_fs * 1e-6;
	return ns < 1e18 ? (uint64_t)ns : (uint64_t)1e18;
}

/* Elements [from, from + count) of a line whose neighbours are `step` elements apart, as f32; count at most CPU_MATMUL_BLOCK. */
static void matmul_line(const struct matmul_work *work, const unsigned char *line, uint64_t step, uint64_t from, size_t count, float *to)
{
	uint32_t gathered[CPU_MATMUL_BLOCK];
	line += from * step * work->bytes;
	if (step != 1) {
		walk_gather(gathered, line, step, count, work->bytes);
		line = (const unsigned char *)gathered;
	}
	work->to_f32(line, to, count, CPU_NEAR);
}

static size_t block_of(const struct matmul_work *work, uint64_t from)
{
	return work->depth - from < CPU_MATMUL_BLOCK ? (size_t)(work->depth - from) : CPU_MATMUL_BLOCK;
}

/* One item: which results of which batch. */
struct matmul_item {
	const unsigned char *a, *b; /* of the batch */
	uint64_t batch, row, column;
	size_t rows, columns;
};

static struct matmul_item matmul_item_of(const struct matmul_work *work, uint64_t index)
{
	struct matmul_item item = {
		.row = index % work->row_items * ITEM_ROWS,
		.column = index / work->row_items % work->column_items * work->item_columns,
		.batch = index / work->row_items / work->column_items,
	};
	item.rows = work->rows - item.row < ITEM_ROWS ? (size_t)(work->rows - item.row) : ITEM_ROWS;
	item.columns = work->columns - item.column < work->item_columns ? (size_t)(work->columns - item.column) : (size_t)work->item_columns;
	if (work->depth > 0) {
		item.a = work->a + dims_offset(&work->batch, work->batch.a_strides, item.batch) * work->bytes;
		item.b = work->b + (dims_offset(&work->batch, work->batch.b_strides, item.batch) + item.column * work->b_column) * work->bytes;
	}
	return item;
}

static const unsigned char *item_row(const struct matmul_work *work, const struct matmul_item *item, size_t m)
{
	return item->a + dims_offset(&work->row, work->row.a_strides, item->row + m) * work->bytes;
}

static void item_finish(const struct matmul_work *work, const struct matmul_item *item, size_t m, const float *sums)
{
	uint64_t element = (item->batch * work->rows + item->row + m) * work->columns + item->column;
	work->finish[work->dtype](sums, NULL, work->y + element * work->bytes, item->columns);
}

/* ---- Few rows ----------------------------------------------------------------------------------------------------------- */

static void matmul_few(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	const struct matmul_work *work = context;
	float a[CPU_MATMUL_BLOCK], sums[FEW_ROWS][CPU_MATMUL_COLUMNS];
	for (uint64_t i = begin; i < end; i++) {
		struct matmul_item item = matmul_item_of(work, i);
		memset(sums, 0, item.rows * sizeof sums[0]);
		for (uint64_t from = 0; from < work->depth && !cpu_cancelled(work->cancel); from += CPU_MATMUL_BLOCK) {
			const unsigned char *b = item.b + from * work->b_step * work->bytes;
			for (size_t m = 0; m < item.rows; m++) {
				matmul_line(work, item_row(work, &item, m), work->a_step, from, block_of(work, from), a);
				work->kernels->row[work->dtype](a, b, (int64_t)work->b_step, block_of(work, from), item.columns, sums[m]);
			}
		}
		for (size_t m = 0; m < item.rows; m++)
			item_finish(work, &item, m, sums[m]);
	}
}

/* ---- Packed ------------------------------------------------------------------------------------------------------------- */

static size_t round_up(size_t value, size_t multiple)
{
	return (value + multiple - 1) / multiple * multiple;
}

/* Scratch of one thread, for the rows and the depth that the product has. */
struct matmul_blocks {
	float *a;      /* [rows][A_LEAD] */
	float *sums;   /* [rows][ITEM_COLUMNS] */
	float *b;      /* [depth][ITEM_COLUMNS] */
	float *turned; /* [TURNED][CPU_MATMUL_BLOCK], where b's columns are turned around */
};

static size_t blocks_rows(const struct matmul_work *work)
{
	return round_up(work->rows < ITEM_ROWS ? (size_t)work->rows : ITEM_ROWS, work->kernels->tile_rows);
}

static size_t blocks_floats(const struct matmul_work *work)
{
	size_t turned = work->b_column == 1 ? 0 : TURNED * CPU_MATMUL_BLOCK;
	return blocks_rows(work) * (A_LEAD + ITEM_COLUMNS) + block_of(work, 0) * ITEM_COLUMNS + turned;
}

static struct matmul_blocks blocks_of(const struct matmul_work *work, uint32_t thread)
{
	struct matmul_blocks blocks = {.a = work->scratch + thread * work->scratch_floats};
	blocks.sums = blocks.a + blocks_rows(work) * A_LEAD;
	blocks.b = blocks.sums + blocks_rows(work) * ITEM_COLUMNS;
	blocks.turned = blocks.b + block_of(work, 0) * ITEM_COLUMNS;
	return blocks;
}

/* Rows that only fill up a tile are zeros, columns (pack_b) too. */
static void pack_a(const struct matmul_work *work, const struct matmul_item *item, uint64_t from, size_t count, float *to)
{
	for (size_t m = 0; m < item->rows; m++)
		matmul_line(work, item_row(work, item, m), work->a_step, from, count, to + m * A_LEAD);
	for (size_t m = item->rows; m % work->kernels->tile_rows != 0; m++)
		memset(to + m * A_LEAD, 0, count * sizeof(float));
}

/* Columns of b, `turned` of them at a time, to columns of the block. */
static void pack_b_turned(const struct matmul_work *work, const struct matmul_item *item, uint64_t from, size_t count,
                          const struct matmul_blocks *blocks)
{
	for (size_t n = 0; n < item->columns; n += TURNED) {
		size_t here = item->columns - n < TURNED ? item->columns - n : TURNED;
		for (size_t i = 0; i < here; i++)
			matmul_line(work, item->b + (n + i) * work->b_column * work->bytes, work->b_step, from, count,
			            blocks->turned + i * CPU_MATMUL_BLOCK);
		for (size_t k = 0; k < count; k++)
			for (size_t i = 0; i < here; i++)
				blocks->b[k * ITEM_COLUMNS + n + i] = blocks->turned[i * CPU_MATMUL_BLOCK + k];
	}
}

static void pack_b(const struct matmul_work *work, const struct matmul_item *item, uint64_t from, size_t count,
                   const struct matmul_blocks *blocks)
{
	size_t rest = round_up(item->columns, work->kernels->tile_columns) - item->columns;
	for (size_t k = 0; k < count && rest > 0; k++)
		memset(blocks->b + k * ITEM_COLUMNS + item->columns, 0, rest * sizeof(float));
	if (work->b_column != 1) {
		pack_b_turned(work, item, from, count, blocks);
		return;
	}
	for (size_t k = 0; k < count; k++)
		work->to_f32(item->b + (from + k) * work->b_step * work->bytes, blocks->b + k * ITEM_COLUMNS, item->columns, CPU_NEAR);
}

static void multiply_block(const struct matmul_work *work, const struct matmul_item *item, size_t count,
                           const struct matmul_blocks *blocks)
{
	const struct cpu_matmul_kernels *kernels = work->kernels;
	for (size_t n = 0; n < item->columns; n += kernels->tile_columns)
		for (size_t m = 0; m < item->rows; m += kernels->tile_rows)
			kernels->tile(blocks->a + m * A_LEAD, A_LEAD, blocks->b + n, ITEM_COLUMNS, count, blocks->sums + m * ITEM_COLUMNS + n,
			              ITEM_COLUMNS);
}

static void matmul_packed(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	const struct matmul_work *work = context;
	struct matmul_blocks blocks = blocks_of(work, thread);
	for (uint64_t i = begin; i < end; i++) {
		struct matmul_item item = matmul_item_of(work, i);
		memset(blocks.sums, 0, round_up(item.rows, work->kernels->tile_rows) * ITEM_COLUMNS * sizeof(float));
		for (uint64_t from = 0; from < work->depth && !cpu_cancelled(work->cancel); from += CPU_MATMUL_BLOCK) {
			pack_a(work, &item, from, block_of(work, from), blocks.a);
			pack_b(work, &item, from, block_of(work, from), &blocks);
			multiply_block(work, &item, block_of(work, from), &blocks);
		}
		for (size_t m = 0; m < item.rows; m++)
			item_finish(work, &item, m, blocks.sums + m * ITEM_COLUMNS);
	}
}

static opd_status matmul_run_packed(struct matmul_work *work, const opd_exec *exec, uint64_t items, uint64_t cost_ns, opd_error *error)
{
	work->scratch_floats = round_up(blocks_floats(work), 16);
	uint64_t bytes = work->scratch_floats * sizeof(float) * cpu_threads(exec, items, cost_ns);
	work->scratch = exec->host->alloc(exec->host, bytes);
	if (work->scratch == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "matmul: no %llu bytes of host memory for scratch", (unsigned long long)bytes);
	opd_status status = cpu_for_long(work->cancel, items, cost_ns, matmul_packed, work, error);
	exec->host->free(exec->host, work->scratch);
	return status;
}

static bool output_is_right(const opd_tensor *y, const opd_tensor *a, const opd_tensor *b)
{
	uint32_t rank = a->rank > b->rank ? a->rank : b->rank;
	bool right = y->dtype == a->dtype && y->rank == rank && opd_tensor_contiguous(y) &&
	             y->shape[rank - 2] == a->shape[a->rank - 2] && y->shape[rank - 1] == b->shape[b->rank - 1];
	for (uint32_t i = 2; i < rank && right; i++) { /* i counts from the last dimension */
		int64_t of_a = i < a->rank ? a->shape[a->rank - 1 - i] : 1;
		int64_t of_b = i < b->rank ? b->shape[b->rank - 1 - i] : 1;
		right = y->shape[rank - 1 - i] == (of_a == 1 ? of_b : of_a);
	}
	return right;
}

static opd_status matmul_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *a = cpu_tensor(call, false);
	if (call->output_count < 1 || !output_is_right(call->outputs[0], a, cpu_tensor(call, 1)))
		return opd_fail(error, OPD_INTERNAL, "%s: result 0 has another dtype, shape or layout than the kernel writes (%s, a · b)", impl->op,
		                opd_dtype_name(a->dtype));
	if (call->outputs[0]->elements == 0)
		return OPD_OK;
	struct matmul_work work = matmul_work_of(impl, call);
	struct cpu_cancel cancel = {.exec = exec};
	work.cancel = &cancel;
	bool few = work.rows <= FEW_ROWS && work.b_column == 1;
	work.y = opd_tensor_data(call->outputs[0]);
	work.item_columns = few && work.rows == 1 ? CPU_MATMUL_COLUMNS : ITEM_COLUMNS;
	work.row_items = (work.rows + ITEM_ROWS - 1) / ITEM_ROWS;
	work.column_items = (work.columns + work.item_columns - 1) / work.item_columns;
	uint64_t items = work.batches * work.row_items * work.column_items, cost_ns = matmul_cost(impl, call);
	return few ? cpu_for_long(&cancel, items, cost_ns, matmul_few, &work, error) : matmul_run_packed(&work, exec, items, cost_ns, error);
}

const opd_impl cpu_matmul = {
	.struct_bytes = sizeof(opd_impl),
	.flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT,
	.op = "matmul",
	.schema = "matmul(Tensor a, Tensor b) -> Tensor",
	.device = "cpu",
	.uuid = OPD_UUID_cpu_matmul,
	.predicate = matmul_predicate,
	.cost_ns = matmul_cost,
	.run = matmul_run,
};
