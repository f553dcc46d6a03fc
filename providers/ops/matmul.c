/* Products of matrices: linear, matmul, scaled_mm. One loop over tiles serves the three: they differ in where a line of a factor
 * lies, and in what is done with a finished sum.
 *
 * Sums are accumulated in double, in order of the summed dimension, and rounded to f32 and then to the result's dtype: at least
 * as exact as the catalogue's f32 accumulation (products of two floats of 24 bits are exact in a double), and a product of i8 is
 * exact for every length that fits into memory, where an i32 would wrap from 131072 on. */
#include <math.h>

#include "providers/ops/kernel.h"
#include "providers/ops/ops.h"
#include "uuid/native_matmul.h"

/* ---- The product ------------------------------------------------------------------------------------------------------- */

/* Both packed factors of a tile take 48 KiB of stack: so a product needs no scratch, and each element is converted once for 8
 * rows or 16 columns of the result. */
enum { TILE_ROWS = 8, TILE_COLUMNS = 16, TILE_DEPTH = 256 };

/* output[…, row, column] = Σ left[line of row]·right[line of column] · row_scale · column_scale + bias */
struct product {
	const opd_tensor *output;
	const opd_tensor *left;
	const opd_tensor *right;
	uint32_t left_dim; /* the dimension that is summed over; the others number the lines, row-major */
	uint32_t right_dim;
	uint32_t batch_rank; /* the output's leading dimensions over which both factors are broadcast */
	uint64_t batches;
	uint64_t rows;
	uint64_t columns;
	uint64_t depth;
	const opd_tensor *row_scale; /* NULL: none; one element: for all */
	const opd_tensor *column_scale;
	const opd_tensor *bias;
};

struct tile {
	uint64_t batch;
	uint64_t row;    /* the first */
	uint64_t column; /* the first */
	uint64_t rows;
	uint64_t columns;
};

static uint64_t tiles_down(const struct product *product)
{
	return (product->rows + TILE_ROWS - 1) / TILE_ROWS;
}

static uint64_t tiles_across(const struct product *product)
{
	return (product->columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
}

static struct tile tile_at(const struct product *product, uint64_t item)
{
	uint64_t across = item % tiles_across(product);
	uint64_t down = item / tiles_across(product) % tiles_down(product);
	struct tile tile = {
		.batch = item / tiles_across(product) / tiles_down(product),
		.row = down * TILE_ROWS,
		.column = across * TILE_COLUMNS,
	};
	tile.rows = product->rows - tile.row < TILE_ROWS ? product->rows - tile.row : TILE_ROWS;
	tile.columns = product->columns - tile.column < TILE_COLUMNS ? product->columns - tile.column : TILE_COLUMNS;
	return tile;
}

/* Number, among a factor's own matrices, of the one that belongs to the output's matrix `batch`. */
static uint64_t factor_batch(const struct product *product, const opd_tensor *factor, uint64_t batch)
{
	uint64_t number = 0;
	uint64_t matrices = 1;
	for (uint32_t i = 0; i < product->batch_rank && i + 2 < factor->rank; i++) { /* i counts from the innermost */
		uint64_t extent = (uint64_t)product->output->shape[product->batch_rank - 1 - i];
		uint64_t own = (uint64_t)factor->shape[factor->rank - 3 - i];
		if (own > 1)
			number += batch % extent * matrices;
		matrices *= own;
		batch /= extent;
	}
	return number;
}

static void pack_left(const struct kernel_line *lines, uint64_t count, int64_t begin, int64_t depth,
                      double packed[TILE_ROWS][TILE_DEPTH])
{
	for (uint64_t row = 0; row < count; row++)
		kernel_load(&lines[row], begin, depth, packed[row]);
}

/* Transposed, so that the multiplication's inner loop runs over columns, whose sums are independent. */
static void pack_right(const struct kernel_line *lines, uint64_t count, int64_t begin, int64_t depth,
                       double packed[TILE_DEPTH][TILE_COLUMNS])
{
	double line[TILE_DEPTH];
	for (uint64_t column = 0; column < count; column++) {
		kernel_load(&lines[column], begin, depth, line);
		for (int64_t k = 0; k < depth; k++)
			packed[k][column] = line[k];
	}
}

static void tile_multiply(uint64_t rows, int64_t depth, double left[TILE_ROWS][TILE_DEPTH],
                          double right[TILE_DEPTH][TILE_COLUMNS], double sums[TILE_ROWS][TILE_COLUMNS])
{
	for (uint64_t row = 0; row < rows; row++) {
		double sum[TILE_COLUMNS];
		memcpy(sum, sums[row], sizeof sum);
		for (int64_t k = 0; k < depth; k++) {
			double factor = left[row][k];
			for (int column = 0; column < TILE_COLUMNS; column++)
				sum[column] += factor * right[k][column];
		}
		memcpy(sums[row], sum, sizeof sum);
	}
}

static void tile_sum(const struct kernel_job *job, const struct tile *tile, double sums[TILE_ROWS][TILE_COLUMNS])
{
	const struct product *product = job->context;
	struct kernel_line left[TILE_ROWS];
	struct kernel_line right[TILE_COLUMNS];
	double packed_left[TILE_ROWS][TILE_DEPTH];
	double packed_right[TILE_DEPTH][TILE_COLUMNS];
	uint64_t left_first = factor_batch(product, product->left, tile->batch) * product->rows + tile->row;
	uint64_t right_first = factor_batch(product, product->right, tile->batch) * product->columns + tile->column;

	for (uint64_t row = 0; row < tile->rows; row++)
		left[row] = kernel_line(product->left, product->left_dim, left_first + row);
	for (uint64_t column = 0; column < tile->columns; column++)
		right[column] = kernel_line(product->right, product->right_dim, right_first + column);
	/* Columns that the tile hasn't are multiplied as zeros. */
	memset(packed_right, 0, sizeof packed_right);

	for (uint64_t begin = 0; begin < product->depth; begin += TILE_DEPTH) {
		int64_t depth = (int64_t)(product->depth - begin < TILE_DEPTH ? product->depth - begin : TILE_DEPTH);
		if (job->exec->host->cancelled(job->exec))
			return;
		pack_left(left, tile->rows, (int64_t)begin, depth, packed_left);
		pack_right(right, tile->columns, (int64_t)begin, depth, packed_right);
		tile_multiply(tile->rows, depth, packed_left, packed_right, sums);
	}
}

static double vector_at(const opd_tensor *vector, uint64_t index)
{
	return element_load_f64(vector->dtype, kernel_element(vector, vector->elements == 1 ? 0 : index));
}

static void tile_finish(const struct product *product, const struct tile *tile, double sums[TILE_ROWS][TILE_COLUMNS])
{
	for (uint64_t r = 0; r < tile->rows; r++) {
		for (uint64_t c = 0; c < tile->columns; c++) {
			if (product->row_scale != NULL)
				sums[r][c] *= vector_at(product->row_scale, tile->row + r);
			if (product->column_scale != NULL)
				sums[r][c] *= vector_at(product->column_scale, tile->column + c);
			if (product->bias != NULL)
				sums[r][c] += vector_at(product->bias, tile->column + c);
		}
		uint64_t element = (tile->batch * product->rows + tile->row + r) * product->columns + tile->column;
		struct kernel_line to = {
			.dtype = product->output->dtype,
			.data = kernel_element(product->output, element),
			.stride = 1,
			.extent = (int64_t)tile->columns,
		};
		kernel_store(&to, 0, to.extent, sums[r]);
	}
}

static void product_item(const struct kernel_job *job, uint64_t item, void *scratch)
{
	const struct product *product = job->context;
	struct tile tile = tile_at(product, item);
	double sums[TILE_ROWS][TILE_COLUMNS] = {{0}};
	(void)scratch;
	if (product->depth > 0)
		tile_sum(job, &tile, sums);
	tile_finish(product, &tile, sums);
}

/* Measured: 0.3 ns a multiplication, 4 ns to convert an element, both for whole tiles. */
static double tile_ns(const struct product *product)
{
	double rows = product->rows < TILE_ROWS ? (double)product->rows : TILE_ROWS;
	double columns = product->columns < TILE_COLUMNS ? (double)product->columns : TILE_COLUMNS;
	return 1000 + 20 * rows * columns + (double)product->depth * (0.3 * rows * TILE_COLUMNS + 4 * (rows + columns));
}

static uint64_t product_cost(const struct product *product)
{
	double tiles = (double)product->batches * (double)tiles_down(product) * (double)tiles_across(product);
	return kernel_ns(300 + tiles * tile_ns(product));
}

static opd_status product_run(const opd_impl *impl, const opd_call *call, const opd_exec *exec, const struct product *product,
                              opd_error *error)
{
	struct kernel_job job = {.impl = impl, .call = call, .exec = exec, .context = product};
	uint64_t tiles = product->batches * tiles_down(product) * tiles_across(product);
	if (opd_tensor_empty(product->output))
		return OPD_OK;
	return kernel_for_long(&job, tiles, kernel_ns(tile_ns(product)), product_item, error);
}

/* ---- linear ------------------------------------------------------------------------------------------------------------ */

static opd_status linear_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *x = kernel_tensor(call, 0);
	const opd_tensor *weight = kernel_tensor(call, 1);
	const opd_tensor *bias = kernel_tensor(call, 2);
	opd_status status = kernel_expect_float(op, "x", x, error);
	if (status == OPD_OK)
		status = kernel_expect_dtype_of(op, "weight", weight, "x", x, error);
	if (status == OPD_OK)
		status = kernel_expect_dtype_of(op, "bias", bias, "x", x, error);
	if (status == OPD_OK)
		status = kernel_expect_rank_min(op, "x", x, 1, error);
	if (status == OPD_OK)
		status = kernel_expect_rank(op, "weight", weight, 2, error);
	if (status != OPD_OK)
		return status;

	int64_t columns = weight->shape[0];
	int64_t weight_shape[2] = {columns, opd_tensor_last(x)};
	status = kernel_expect_shape(op, "weight", weight, 2, weight_shape, "last dimension of x", error);
	if (status == OPD_OK)
		status = kernel_expect_shape(op, "bias", bias, 1, &columns, "first dimension of weight", error);
	if (status == OPD_OK)
		status = kernel_output_like(op, outputs[0], x->dtype, x, error);
	if (status == OPD_OK)
		outputs[0]->shape[x->rank - 1] = columns;
	return status;
}

static struct product linear_product(const opd_call *call)
{
	const opd_tensor *x = kernel_tensor(call, 0);
	struct product product = {
		.output = call->outputs[0],
		.left = x,
		.right = kernel_tensor(call, 1),
		.left_dim = x->rank - 1,
		.right_dim = 1,
		.batches = 1,
		.rows = 1,
		.columns = (uint64_t)kernel_tensor(call, 1)->shape[0],
		.depth = (uint64_t)opd_tensor_last(x),
		.bias = kernel_tensor(call, 2),
	};
	for (uint32_t i = 0; i + 1 < x->rank; i++)
		product.rows *= (uint64_t)x->shape[i];
	return product;
}

static uint64_t linear_cost(const opd_impl *impl, const opd_call *call)
{
	struct product product = linear_product(call);
	(void)impl;
	return product_cost(&product);
}

static opd_status linear_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK)
		return status;
	struct product product = linear_product(call);
	return product_run(impl, call, exec, &product, error);
}

/* Standard deviation of a weight that leaves a sum of `depth` products at the size of its other factor. */
static double weight_scale(int64_t depth)
{
	return depth > 0 ? 1 / sqrt((double)depth) : 1;
}

/* Variants: 0 two dimensions, no bias; 1 bias; 2 one row in three dimensions; 3 x of rank 1, bias; 4 three dimensions, bias. */
static opd_status linear_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	opd_status status = kernel_generator_begin(op, generator, 5, error);
	if (status == OPD_OK)
		status = kernel_generator_float(op, generator, error);
	if (status != OPD_OK)
		return status;
	uint32_t variant = generator->variant;
	int64_t rows = generator->dims[0], depth = generator->dims[1], columns = generator->dims[2];
	int64_t shapes[5][3] = {{rows, depth}, {rows, depth}, {1, 1, depth}, {depth}, {2, rows, depth}};
	static const uint32_t ranks[5] = {2, 2, 3, 1, 3};
	int64_t weight[2] = {columns, depth};

	status = kernel_generate(op, generator, "x", generator->dtype, ranks[variant], shapes[variant], 1, error);
	if (status == OPD_OK)
		status = kernel_generate(op, generator, "weight", generator->dtype, 2, weight, weight_scale(depth), error);
	if (status == OPD_OK && variant != 0 && variant != 2)
		status = kernel_generate(op, generator, "bias", generator->dtype, 1, &columns, 1, error);
	return status;
}

static const opd_op linear;
static const opd_impl linear_native = KERNEL_NATIVE("linear", &linear, linear_run, linear_cost, OPD_UUID_native_matmul);
static const int64_t linear_dims[] = {8, 320, 72};

static const opd_op linear = {
	.struct_bytes = sizeof linear,
	.sum = OPD_SUM_PRODUCTS,
	.schema = "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
	.doc = "x [..., K] times weight [N, K] transposed, plus bias [N]; f32 accumulation",
	.activations = "x",
	.flags = OPD_OP_ROWS,
	.shape = linear_shape,
	.generate = linear_generate,
	.dims = "rows,in,out",
	.default_dims = linear_dims,
	.dim_count = 3,
	.native = &linear_native,
};

/* ---- matmul ------------------------------------------------------------------------------------------------------------ */

static opd_status matmul_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *a = kernel_tensor(call, 0);
	const opd_tensor *b = kernel_tensor(call, 1);
	opd_status status = kernel_expect_float(op, "a", a, error);
	if (status == OPD_OK)
		status = kernel_expect_dtype_of(op, "b", b, "a", a, error);
	if (status == OPD_OK)
		status = kernel_expect_rank_min(op, "a", a, 2, error);
	if (status == OPD_OK)
		status = kernel_expect_rank_min(op, "b", b, 2, error);
	if (status != OPD_OK)
		return status;

	int64_t depth = a->shape[a->rank - 1];
	if (b->shape[b->rank - 2] != depth)
		return kernel_invalid(op, error, "b has shape %s, expected %lld in its last dimension but one (last dimension of a, %s)",
		                      kernel_shape_text(b).text, (long long)depth, kernel_shape_text(a).text);
	int64_t shape[OPD_RANK_MAX + 2];
	uint32_t rank = (a->rank > b->rank ? a->rank : b->rank) - 2;
	status = kernel_broadcast(op, "a", a, a->rank - 2, "b", b, b->rank - 2, shape, error);
	if (status != OPD_OK)
		return status;
	shape[rank] = a->shape[a->rank - 2];
	shape[rank + 1] = b->shape[b->rank - 1];
	return kernel_output_set(op, outputs[0], a->dtype, rank + 2, shape, error);
}

static struct product matmul_product(const opd_call *call)
{
	const opd_tensor *a = kernel_tensor(call, 0);
	const opd_tensor *b = kernel_tensor(call, 1);
	struct product product = {
		.output = call->outputs[0],
		.left = a,
		.right = b,
		.left_dim = a->rank - 1,
		.right_dim = b->rank - 2,
		.batch_rank = call->outputs[0]->rank - 2,
		.batches = 1,
		.rows = (uint64_t)a->shape[a->rank - 2],
		.columns = (uint64_t)b->shape[b->rank - 1],
		.depth = (uint64_t)a->shape[a->rank - 1],
	};
	for (uint32_t i = 0; i < product.batch_rank; i++)
		product.batches *= (uint64_t)product.output->shape[i];
	return product;
}

static uint64_t matmul_cost(const opd_impl *impl, const opd_call *call)
{
	struct product product = matmul_product(call);
	(void)impl;
	return product_cost(&product);
}

static opd_status matmul_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK)
		return status;
	struct product product = matmul_product(call);
	return product_run(impl, call, exec, &product, error);
}

/* Variants: 0 two matrices; 1 equal batches; 2 one b for all; 3 both broadcast, in different dimensions; 4 one a for all. */
static opd_status matmul_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	opd_status status = kernel_generator_begin(op, generator, 5, error);
	if (status == OPD_OK)
		status = kernel_generator_float(op, generator, error);
	if (status != OPD_OK)
		return status;
	uint32_t variant = generator->variant;
	int64_t batch = generator->dims[0], m = generator->dims[1], k = generator->dims[2], n = generator->dims[3];
	int64_t a[5][4] = {{m, k}, {batch, m, k}, {batch, m, k}, {batch, 1, m, k}, {m, k}};
	int64_t b[5][4] = {{k, n}, {batch, k, n}, {k, n}, {3, k, n}, {2, batch, k, n}};
	static const uint32_t a_ranks[5] = {2, 3, 3, 4, 2};
	static const uint32_t b_ranks[5] = {2, 3, 2, 3, 4};

	status = kernel_generate(op, generator, "a", generator->dtype, a_ranks[variant], a[variant], 1, error);
	if (status == OPD_OK)
		status = kernel_generate(op, generator, "b", generator->dtype, b_ranks[variant], b[variant], weight_scale(k), error);
	return status;
}

static const opd_op matmul;
static const opd_impl matmul_native = KERNEL_NATIVE("matmul", &matmul, matmul_run, matmul_cost, OPD_UUID_native_matmul);
static const int64_t matmul_dims[] = {2, 12, 272, 40};

static const opd_op matmul = {
	.struct_bytes = sizeof matmul,
	.sum = OPD_SUM_PRODUCTS,
	.schema = "matmul(Tensor a, Tensor b) -> Tensor",
	.doc = "a [..., M, K] times b [..., K, N], leading dimensions broadcast; f32 accumulation",
	.activations = "a,b",
	.shape = matmul_shape,
	.generate = matmul_generate,
	.dims = "batch,rows,in,out",
	.default_dims = matmul_dims,
	.dim_count = 4,
	.native = &matmul_native,
};

/* ---- scaled_mm --------------------------------------------------------------------------------------------------------- */

static opd_status scaled_mm_expect_factors(const opd_op *op, const opd_tensor *a, const opd_tensor *b, opd_error *error)
{
	if (a->dtype != OPD_f8_e4m3fn && a->dtype != OPD_i8)
		return kernel_invalid(op, error, "a is %s, expected f8_e4m3fn or i8", opd_dtype_name(a->dtype));
	opd_status status = kernel_expect_dtype_of(op, "b", b, "a", a, error);
	if (status == OPD_OK)
		status = kernel_expect_rank(op, "a", a, 2, error);
	if (status == OPD_OK)
		status = kernel_expect_rank(op, "b", b, 2, error);
	if (status != OPD_OK)
		return status;
	int64_t b_shape[2] = {b->shape[0], a->shape[1]};
	return kernel_expect_shape(op, "b", b, 2, b_shape, "last dimension of a", error);
}

/* f32, [1] or one for each of `lines`: [lines, 1] (rank 2) or [lines] (rank 1). */
static opd_status scaled_mm_expect_scale(const opd_op *op, const char *name, const opd_tensor *scale, uint32_t rank,
                                         int64_t lines, const char *why, opd_error *error)
{
	int64_t shape[2] = {lines, 1};
	opd_status status = kernel_expect_dtype(op, name, scale, OPD_f32, error);
	if (status != OPD_OK || (scale->rank == 1 && scale->shape[0] == 1))
		return status;
	return kernel_expect_shape(op, name, scale, rank, shape, why, error);
}

static opd_status scaled_mm_out_dtype(const opd_op *op, const char *text, opd_dtype *dtype_out, opd_error *error)
{
	opd_dtype dtype = opd_dtype_parse(text);
	if (dtype != OPD_bf16 && dtype != OPD_f16 && dtype != OPD_f32)
		return kernel_invalid(op, error, "out_dtype is \"%.64s\", expected \"bf16\", \"f16\" or \"f32\"", text);
	*dtype_out = dtype;
	return OPD_OK;
}

static opd_status scaled_mm_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	const opd_tensor *a = kernel_tensor(call, 0);
	const opd_tensor *b = kernel_tensor(call, 1);
	const opd_tensor *bias = kernel_tensor(call, 4);
	opd_dtype dtype = OPD_DTYPE_NONE;
	opd_status status = scaled_mm_out_dtype(op, kernel_str(call, 5), &dtype, error);
	if (status == OPD_OK)
		status = scaled_mm_expect_factors(op, a, b, error);
	if (status != OPD_OK)
		return status;
	int64_t shape[2] = {a->shape[0], b->shape[0]};
	status = scaled_mm_expect_scale(op, "scale_a", kernel_tensor(call, 2), 2, shape[0], "or [1]; one a row of a", error);
	if (status == OPD_OK)
		status = scaled_mm_expect_scale(op, "scale_b", kernel_tensor(call, 3), 1, shape[1], "or [1]; one a row of b", error);
	if (status == OPD_OK)
		status = kernel_expect_dtype(op, "bias", bias, dtype, error);
	if (status == OPD_OK)
		status = kernel_expect_shape(op, "bias", bias, 1, &shape[1], "first dimension of b", error);
	if (status == OPD_OK)
		status = kernel_output_set(op, outputs[0], dtype, 2, shape, error);
	return status;
}

static struct product scaled_mm_product(const opd_call *call)
{
	const opd_tensor *a = kernel_tensor(call, 0);
	const opd_tensor *b = kernel_tensor(call, 1);
	return (struct product){
		.output = call->outputs[0],
		.left = a,
		.right = b,
		.left_dim = 1,
		.right_dim = 1,
		.batches = 1,
		.rows = (uint64_t)a->shape[0],
		.columns = (uint64_t)b->shape[0],
		.depth = (uint64_t)a->shape[1],
		.row_scale = kernel_tensor(call, 2),
		.column_scale = kernel_tensor(call, 3),
		.bias = kernel_tensor(call, 4),
	};
}

static uint64_t scaled_mm_cost(const opd_impl *impl, const opd_call *call)
{
	struct product product = scaled_mm_product(call);
	(void)impl;
	return product_cost(&product);
}

static opd_status scaled_mm_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	opd_status status = kernel_verify_outputs(impl, call, error);
	if (status != OPD_OK)
		return status;
	struct product product = scaled_mm_product(call);
	return product_run(impl, call, exec, &product, error);
}

/* Positive scales of a few hundredths: 1/1024 to 64/1024, exact in every dtype. */
static opd_status scaled_mm_generate_scale(const opd_op *op, opd_generator *generator, const char *name, uint32_t rank,
                                           int64_t lines, opd_error *error)
{
	int64_t shape[2] = {lines, 1};
	void *memory;
	opd_status status = kernel_generate_raw(op, generator, name, OPD_f32, rank, shape, &memory, error);
	if (status != OPD_OK)
		return status;
	float *scales = memory;
	for (int64_t i = 0; i < lines; i++)
		scales[i] = (float)generator->pick(generator, 1, 64) / 1024;
	return OPD_OK;
}

struct scaled_mm_form {
	bool row_scale; /* one a row of a, else [1] */
	bool column_scale;
	bool bias;
	opd_dtype dtype; /* of the result */
};

/* dtype of the generator: a's and b's, f8_e4m3fn or i8. */
static opd_status scaled_mm_generate(const opd_op *op, opd_generator *generator, opd_error *error)
{
	static const struct scaled_mm_form forms[] = {
		{true, true, false, OPD_bf16}, {false, false, true, OPD_bf16}, {true, false, true, OPD_f16},
		{false, true, false, OPD_f32}, {true, true, true, OPD_f32},
	};
	opd_status status = kernel_generator_begin(op, generator, sizeof forms / sizeof forms[0], error);
	if (status != OPD_OK)
		return status;
	if (generator->dtype != OPD_f8_e4m3fn && generator->dtype != OPD_i8)
		return kernel_invalid(op, error, "dtype is %s, expected f8_e4m3fn or i8", opd_dtype_name(generator->dtype));
	const struct scaled_mm_form *form = &forms[generator->variant];
	int64_t a[2] = {generator->dims[0], generator->dims[1]};
	int64_t b[2] = {generator->dims[2], generator->dims[1]};
	double scale = generator->dtype == OPD_i8 ? 40 : 1;

	generator->set_str(generator, "out_dtype", opd_dtype_name(form->dtype));
	status = kernel_generate(op, generator, "a", generator->dtype, 2, a, scale, error);
	if (status == OPD_OK)
		status = kernel_generate(op, generator, "b", generator->dtype, 2, b, scale, error);
	if (status == OPD_OK)
		status = scaled_mm_generate_scale(op, generator, "scale_a", form->row_scale ? 2 : 1, form->row_scale ? a[0] : 1, error);
	if (status == OPD_OK)
		status = scaled_mm_generate_scale(op, generator, "scale_b", 1, form->column_scale ? b[0] : 1, error);
	if (status == OPD_OK && form->bias)
		status = kernel_generate(op, generator, "bias", form->dtype, 1, &b[0], 1, error);
	return status;
}

static const opd_op scaled_mm;
static const opd_impl scaled_mm_native =
	KERNEL_NATIVE("scaled_mm", &scaled_mm, scaled_mm_run, scaled_mm_cost, OPD_UUID_native_matmul);
static const int64_t scaled_mm_dims[] = {8, 320, 72};

static const opd_op scaled_mm = {
	.struct_bytes = sizeof scaled_mm,
	.sum = OPD_SUM_PRODUCTS,
	.schema =
        "scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias=None, str out_dtype=\"bf16\") -> Tensor",
	.doc = "a [M, K] times b [N, K] transposed, both f8_e4m3fn or i8, times scales per tensor or per row, plus bias",
	.activations = "a,scale_a",
	.shape = scaled_mm_shape,
	.generate = scaled_mm_generate,
	.dims = "rows,in,out",
	.default_dims = scaled_mm_dims,
	.dim_count = 3,
	.native = &scaled_mm_native,
};

const opd_op *const ops_matmul[] = {&linear, &matmul, &scaled_mm, NULL};
