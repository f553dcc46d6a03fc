/* linear and matmul as products of matrices with leading dimensions: how libraries of linear algebra want to be called.
 *
 * Layer: providers, for modules of this tree that wrap such a library (compiled into each). Threads: pure functions of their arguments.
 * Not here: the product itself, dtypes. */
#ifndef OPD_PROVIDERS_PRODUCT_H
#define OPD_PROVIDERS_PRODUCT_H

#include "providers/provider.h"

/* How one factor's matrix lies: element (r, c) at r·lead + c, or transposed at c·lead + r. */
struct product_matrix {
	bool transposed;
	int64_t lead; /* elements, at least the length of what is contiguous, and 1 */
};

/* y[batch] = left[batch] (rows x depth) · right[batch] (depth x columns) + bias */
struct product {
	const opd_tensor *left_tensor;
	const opd_tensor *right_tensor;
	const opd_tensor *bias; /* [columns]; NULL: none */
	const opd_tensor *y;    /* contiguous */
	struct product_matrix left;
	struct product_matrix right;
	uint32_t batch_rank; /* leading dimensions of y that number the batches; 0: one batch */
	uint64_t batches;
	int64_t rows;
	int64_t columns;
	int64_t depth;
	int64_t block_columns; /* of a block; PRODUCT_BLOCK_COLUMNS unless the module says otherwise */
};

/* Reads a call of linear (x, weight, bias) or matmul (a, b). A matmul whose b is the same for all batches is one product of many rows where a lies
 * so. False with a reason: a factor's matrix has no contiguous dimension, or its rows overlap; or an extent is above 2^31 − 1. */
bool product_of_linear(const opd_call *call, struct product *product_out, opd_reason *reason);
bool product_of_matmul(const opd_call *call, struct product *product_out, opd_reason *reason);

/* One call to the library: which results of which batch, and where they and the factors begin (factors only if depth > 0). */
struct product_block {
	int64_t column, rows, columns;
	const unsigned char *left;
	const unsigned char *right;
	unsigned char *y;
};

/* Rows and columns of a block, where a module has no reason for others. Blocks follow from the shape alone, never from the number of threads: that is why bits don't depend on it. Larger blocks repeat less packing of the
 * left factor, smaller ones share better: of 4096 columns these are as many as a lane of sixteen threads needs (with 512 columns half of it had nothing to do: 0.51 of what the libraries make of sixteen threads). */
enum { PRODUCT_BLOCK_ROWS = 512, PRODUCT_BLOCK_COLUMNS = 256 };

uint64_t product_blocks(const struct product *product);
/* index: below product_blocks. */
struct product_block product_block_at(const struct product *product, uint64_t index);

/* Calls run(argument, begin, end, thread) for all blocks, on the lane's threads when `cost_ns` is worth it. */
void product_for(const opd_exec *exec, const struct product *product, double cost_ns, opd_range_fn run, void *argument);

/* OPD_INTERNAL unless the result has this dtype, the product's elements, and is contiguous. */
OPD_MUST_USE opd_status product_expect_output(const opd_impl *impl, const struct product *product, opd_dtype dtype, opd_error *error);

#endif
