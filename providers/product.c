#include "providers/product.h"

#include <limits.h>

/* Below this a call stays on one thread: waking another takes a few microseconds. */
#define PARALLEL_NS 20000

/* rows x columns with these strides (elements); strides of extents up to 1 don't count. */
static bool matrix_of(int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, struct product_matrix *matrix_out)
{
	if ((columns <= 1 || column_stride == 1) && (rows <= 1 || row_stride >= columns)) {
		int64_t lead = rows <= 1 ? columns : row_stride;
		*matrix_out = (struct product_matrix){.transposed = false, .lead = lead > 0 ? lead : 1};
		return true;
	}
	if ((rows <= 1 || row_stride == 1) && (columns <= 1 || column_stride >= rows)) {
		int64_t lead = columns <= 1 ? rows : column_stride;
		*matrix_out = (struct product_matrix){.transposed = true, .lead = lead > 0 ? lead : 1};
		return true;
	}
	return false;
}

/* The last two dimensions. */
static bool matrix_of_tensor(const char *name, const opd_tensor *tensor, struct product_matrix *matrix_out, opd_reason *reason)
{
	const int64_t *shape = tensor->shape + tensor->rank - 2;
	const int64_t *strides = tensor->strides + tensor->rank - 2;
	if (opd_tensor_empty(tensor)) {
		*matrix_out = (struct product_matrix){.transposed = false, .lead = shape[1] > 0 ? shape[1] : 1};
		return true;
	}
	if (matrix_of(shape[0], shape[1], strides[0], strides[1], matrix_out))
		return true;
	return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s has strides [%lld, %lld] in its last dimensions, a matrix with one contiguous and none overlapping is taken",
	                  name, (long long)strides[0], (long long)strides[1]);
}

/* All dimensions but the last as rows at one distance. */
static bool rows_of(const opd_tensor *tensor, int64_t *rows_out, struct product_matrix *matrix_out)
{
	int64_t rows = 1, stride = 0;
	for (uint32_t i = tensor->rank - 1; i-- > 0;) {
		if (tensor->shape[i] == 1)
			continue;
		if (rows == 1)
			stride = tensor->strides[i];
		else if (!opd_tensor_empty(tensor) && tensor->strides[i] != stride * rows)
			return false;
		rows *= tensor->shape[i];
	}
	*rows_out = rows;
	if (!opd_tensor_empty(tensor))
		return matrix_of(rows, opd_tensor_last(tensor), stride, tensor->strides[tensor->rank - 1], matrix_out);
	*matrix_out = (struct product_matrix){.lead = opd_tensor_last(tensor) > 0 ? opd_tensor_last(tensor) : 1};
	return true;
}

static bool extents_fit(const struct product *product, opd_reason *reason)
{
	const int64_t extents[] = {product->rows, product->columns, product->depth, product->left.lead, product->right.lead};
	for (size_t i = 0; i < sizeof extents / sizeof extents[0]; i++)
		if (extents[i] > INT_MAX)
			return OPD_REFUSE(reason, OPD_REASON_SIZE, "an extent or stride of %lld, at most %d", (long long)extents[i], INT_MAX);
	return true;
}

bool product_of_linear(const opd_call *call, struct product *product_out, opd_reason *reason)
{
	const opd_tensor *x = call->args[0].tensor;
	const opd_tensor *weight = call->args[1].tensor;
	*product_out = (struct product){
		.left_tensor = x,
		.right_tensor = weight,
		.bias = call->args[2].kind == OPD_ARG_TENSOR ? call->args[2].tensor : NULL,
		.y = call->outputs[0],
		.batches = 1,
		.columns = weight->shape[0],
		.depth = opd_tensor_last(x),
		.block_columns = PRODUCT_BLOCK_COLUMNS,
	};
	if (!rows_of(x, &product_out->rows, &product_out->left))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "x is no matrix of rows at one distance with one contiguous dimension");
	if (!matrix_of_tensor("weight", weight, &product_out->right, reason))
		return false;
	product_out->right.transposed = !product_out->right.transposed;
	return extents_fit(product_out, reason);
}

static bool has_batches(const opd_tensor *tensor)
{
	for (uint32_t i = 0; i + 2 < tensor->rank; i++)
		if (tensor->shape[i] != 1)
			return true;
	return false;
}

bool product_of_matmul(const opd_call *call, struct product *product_out, opd_reason *reason)
{
	const opd_tensor *a = call->args[0].tensor;
	const opd_tensor *b = call->args[1].tensor;
	*product_out = (struct product){
		.left_tensor = a,
		.right_tensor = b,
		.y = call->outputs[0],
		.batches = 1,
		.rows = a->shape[a->rank - 2],
		.columns = b->shape[b->rank - 1],
		.depth = opd_tensor_last(a),
		.block_columns = PRODUCT_BLOCK_COLUMNS,
	};
	if (!matrix_of_tensor("b", b, &product_out->right, reason))
		return false;
	if (!has_batches(b) && rows_of(a, &product_out->rows, &product_out->left))
		return extents_fit(product_out, reason);
	product_out->rows = a->shape[a->rank - 2];
	if (!matrix_of_tensor("a", a, &product_out->left, reason))
		return false;
	product_out->batch_rank = product_out->y->rank - 2;
	for (uint32_t i = 0; i < product_out->batch_rank; i++)
		product_out->batches *= (uint64_t)product_out->y->shape[i];
	return extents_fit(product_out, reason);
}

static const void *factor_at(const struct product *product, const opd_tensor *factor, uint64_t batch)
{
	int64_t offset = 0;
	for (uint32_t i = 0; i < product->batch_rank; i++) { /* counts from the innermost */
		uint64_t extent = (uint64_t)product->y->shape[product->batch_rank - 1 - i];
		if (i + 2 < factor->rank && factor->shape[factor->rank - 3 - i] > 1)
			offset += (int64_t)(batch % extent) * factor->strides[factor->rank - 3 - i];
		batch /= extent;
	}
	return (const unsigned char *)opd_tensor_data(factor) + (uint64_t)offset * opd_dtype_bytes(factor->dtype);
}

static uint64_t row_blocks(const struct product *product)
{
	return ((uint64_t)product->rows + PRODUCT_BLOCK_ROWS - 1) / PRODUCT_BLOCK_ROWS;
}

static uint64_t column_blocks(const struct product *product)
{
	return (uint64_t)((product->columns + product->block_columns - 1) / product->block_columns);
}

uint64_t product_blocks(const struct product *product)
{
	return product->batches * row_blocks(product) * column_blocks(product);
}

static int64_t least(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

struct product_block product_block_at(const struct product *product, uint64_t index)
{
	const struct product_matrix *left = &product->left, *right = &product->right;
	uint64_t bytes = opd_dtype_bytes(product->left_tensor->dtype);
	uint64_t batch = index / column_blocks(product) / row_blocks(product);
	int64_t row = (int64_t)(index % row_blocks(product)) * PRODUCT_BLOCK_ROWS;
	struct product_block block = {
		.column = (int64_t)(index / row_blocks(product) % column_blocks(product)) * product->block_columns,
		.rows = least(product->rows - row, PRODUCT_BLOCK_ROWS),
		.y = opd_tensor_data(product->y),
	};
	block.columns = least(product->columns - block.column, product->block_columns);
	block.y += ((batch * (uint64_t)product->rows + (uint64_t)row) * (uint64_t)product->columns + (uint64_t)block.column) *
	           opd_dtype_bytes(product->y->dtype);
	if (product->depth == 0)
		return block;
	block.left = factor_at(product, product->left_tensor, batch);
	block.left += (uint64_t)(row * (left->transposed ? 1 : left->lead)) * bytes;
	block.right = factor_at(product, product->right_tensor, batch);
	block.right += (uint64_t)(block.column * (right->transposed ? right->lead : 1)) * bytes;
	return block;
}

void product_for(const opd_exec *exec, const struct product *product, double cost_ns, opd_range_fn run, void *argument)
{
	uint64_t blocks = product_blocks(product);
	double block_ns = cost_ns / (double)blocks;
	if (blocks > 1 && cost_ns > PARALLEL_NS)
		exec->host->parallel_for(exec, blocks, block_ns > PARALLEL_NS / 2 ? 1 : (uint64_t)(PARALLEL_NS / 2 / block_ns) + 1, run, argument);
	else
		run(argument, 0, blocks, 0);
}

opd_status product_expect_output(const opd_impl *impl, const struct product *product, opd_dtype dtype, opd_error *error)
{
	uint64_t elements = product->batches * (uint64_t)product->rows * (uint64_t)product->columns;
	const opd_tensor *y = product->y;
	if (y->dtype != dtype)
		return opd_fail(error, OPD_INTERNAL, "%s: the result is %s, the kernel writes %s", impl->op, opd_dtype_name(y->dtype),
		                opd_dtype_name(dtype));
	if (y->elements != elements || !opd_tensor_contiguous(y))
		return opd_fail(error, OPD_INTERNAL, "%s: the result has %llu elements or is strided, the kernel writes %llu contiguous ones", impl->op,
		                (unsigned long long)y->elements, (unsigned long long)elements);
	return OPD_OK;
}
