/* linear and matmul: tiles in local memory, or a work group a result where there are few rows. */
#include "providers/opencl/opencl.h"
#include "uuid/opencl_product.h"

/* Up to here linear reads its weight once a row: the tiles would be mostly empty. */
enum { FEW_ROWS = 8, TILE = 64, SIDE = 16 };

struct product {
	const opd_tensor *a, *b, *bias, *y;
	int64_t rows, columns, depth;
	int64_t b_k, b_n; /* strides of b, in elements */
	int64_t batches, a_batch, b_batch;
};

static opd_status run_tiles(const struct product *product, void *state, const opd_exec *exec, opd_error *error)
{
	struct launch launch = launch_begin(state, exec, OPENCL_product, product->a->dtype, error);
	const size_t local[3] = {SIDE, SIDE, 1};
	const size_t global[3] = {(size_t)(product->columns + TILE - 1) / TILE * SIDE, (size_t)(product->rows + TILE - 1) / TILE * SIDE,
	                          (size_t)product->batches};
	launch_tensor(&launch, product->a, NULL);
	launch_tensor(&launch, product->b, NULL);
	launch_tensor(&launch, product->bias, product->a);
	launch_tensor(&launch, product->y, NULL);
	launch_int(&launch, product->rows);
	launch_int(&launch, product->columns);
	launch_int(&launch, product->depth);
	launch_int(&launch, product->b_k);
	launch_int(&launch, product->b_n);
	launch_int(&launch, product->a_batch);
	launch_int(&launch, product->b_batch);
	launch_int(&launch, product->bias != NULL);
	return launch_run(&launch, 3, global, local);
}

static opd_status run_rows(const struct product *product, void *state, const opd_exec *exec, opd_error *error)
{
	struct launch launch = launch_begin(state, exec, OPENCL_product_rows, product->a->dtype, error);
	launch_tensor(&launch, product->a, NULL);
	launch_tensor(&launch, product->b, NULL);
	launch_tensor(&launch, product->bias, product->a);
	launch_tensor(&launch, product->y, NULL);
	launch_int(&launch, product->rows);
	launch_int(&launch, product->columns);
	launch_int(&launch, product->depth);
	launch_int(&launch, product->bias != NULL);
	return launch_rows(&launch, (uint64_t)product->columns);
}

/* ---- linear ---- */

static bool linear_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return opencl_takes("x", opencl_tensor(call, 0), reason) && opencl_takes("weight", opencl_tensor(call, 1), reason) &&
	       opencl_takes("bias", opencl_tensor(call, 2), reason);
}

static opd_status linear_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const opd_tensor *x = opencl_tensor(call, 0);
	const opd_tensor *weight = opencl_tensor(call, 1);
	const opd_tensor *y = call->outputs[0];
	opd_status status = opencl_verify(impl, call, x, 0, error);
	if (status != OPD_OK || opd_tensor_empty(y))
		return status;
	const struct product product = {
		.a = x, .b = weight, .bias = opencl_tensor(call, 2), .y = y, .rows = (int64_t)y->elements / weight->shape[0], .columns = weight->shape[0],
		.depth = weight->shape[1], .b_k = 1, .b_n = weight->shape[1], .batches = 1};
	return product.rows <= FEW_ROWS ? run_rows(&product, state, exec, error) : run_tiles(&product, state, exec, error);
}

/* ---- matmul ---- */

static bool matmul_supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	const opd_tensor *a = opencl_tensor(call, 0);
	const opd_tensor *b = opencl_tensor(call, 1);
	(void)impl, (void)state;
	if (!opencl_takes("a", a, reason) || !opencl_takes("b", b, reason))
		return false;
	if (b->rank == 2 || a->rank == 2)
		return true;
	if (a->rank != b->rank)
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "a has rank %u, b %u: leading dimensions are the same or there are none", (unsigned)a->rank,
		                  (unsigned)b->rank);
	for (uint32_t i = 0; i + 2 < a->rank; i++)
		if (a->shape[i] != b->shape[i])
			return OPD_REFUSE(reason, OPD_REASON_SHAPE, "leading dimensions differ: no broadcasting");
	return true;
}

static opd_status matmul_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const opd_tensor *a = opencl_tensor(call, 0);
	const opd_tensor *b = opencl_tensor(call, 1);
	const opd_tensor *y = call->outputs[0];
	opd_status status = opencl_verify(impl, call, a, 0, error);
	if (status != OPD_OK || opd_tensor_empty(y))
		return status;
	struct product product = {.a = a, .b = b, .y = y, .rows = a->shape[a->rank - 2], .columns = opd_tensor_last(b), .depth = opd_tensor_last(a),
	                          .b_k = opd_tensor_last(b), .b_n = 1};
	product.batches = (int64_t)y->elements / (product.rows * product.columns);
	product.a_batch = a->rank == 2 ? 0 : product.rows * product.depth;
	product.b_batch = b->rank == 2 ? 0 : product.depth * product.columns;
	return run_tiles(&product, state, exec, error);
}

#define PRODUCT(NAME, SCHEMA, SUPPORTS, RUN)                                                                                     \
	{                                                                                                                            \
		.struct_bytes = sizeof(opd_impl), .op = NAME, .schema = NAME SCHEMA, .device = "opencl", .uuid = OPD_UUID_opencl_product, \
		.predicate = SUPPORTS, .run = RUN                                                                                        \
	}

const opd_impl opencl_products[] = {
	PRODUCT("linear", "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", linear_supports, linear_run),
	PRODUCT("matmul", "(Tensor a, Tensor b) -> Tensor", matmul_supports, matmul_run),
	{0},
};
