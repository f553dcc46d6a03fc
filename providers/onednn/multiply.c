#include "providers/onednn/multiply.h"

#include <stdlib.h>
#include <string.h>

static uint64_t round_up(uint64_t bytes)
{
	return (bytes + 63) / 64 * 64;
}

static dnnl_data_type_t type_of(opd_dtype dtype)
{
	return dtype == OPD_i8 ? dnnl_s8 : dtype == OPD_bf16 ? dnnl_bf16 : dnnl_f32;
}

/* ---- Descriptions ---- */

static bool describe(const struct dnn *dnn, dnnl_memory_desc_t *desc, int64_t rows, int64_t columns, dnnl_data_type_t type,
                     struct product_matrix matrix)
{
	const dnnl_dims_t dims = {rows, columns};
	const dnnl_dims_t strides = {matrix.transposed ? 1 : matrix.lead, matrix.transposed ? matrix.lead : 1};
	return dnn->memory_desc_init_by_strides(desc, 2, dims, type, strides) == dnnl_success;
}

/* Of a block of this size. */
static bool describe_all(const struct dnn *dnn, struct multiply *made, const struct product *product, const struct multiply_set *set, int64_t rows, int64_t columns)
{
	opd_dtype dtype = product->left_tensor->dtype;
	dnnl_data_type_t from = type_of(dtype), to = dtype == OPD_i8 ? dnnl_s32 : from;
	struct product_matrix y = {.lead = rows == 1 || set->apart ? columns : product->columns};
	return describe(dnn, &made->left, rows, product->depth, from, product->left) &&
	       describe(dnn, &made->right, product->depth, columns, from, product->right) && describe(dnn, &made->y, rows, columns, to, y) &&
	       (product->bias == NULL || describe(dnn, &made->bias, 1, columns, from, (struct product_matrix){.lead = columns}));
}

/* ---- Primitives ---- */

/* The library takes scratch from us: it would allocate its own for each primitive and thread. */
static dnnl_status_t create_attr(const struct dnn *dnn, dnnl_primitive_attr_t *attr_out)
{
	dnnl_status_t status = dnn->primitive_attr_create(attr_out);
	return status == dnnl_success ? dnn->primitive_attr_set_scratchpad_mode(*attr_out, dnnl_scratchpad_mode_user) : status;
}

/* Takes the primitive desc. */
static dnnl_status_t create_primitive(const struct dnn *dnn, dnnl_primitive_desc_t desc, dnnl_memory_desc_t *scratchpad_out, dnnl_primitive_t *primitive_out)
{
	*scratchpad_out = *dnn->primitive_desc_query_md(desc, dnnl_query_scratchpad_md, 0);
	dnnl_status_t status = dnn->primitive_create(primitive_out, desc);
	(void)dnn->primitive_desc_destroy(desc);
	return status;
}

/* made->right of kind `any` becomes the layout that the library has chosen. */
static dnnl_status_t create_multiply(const struct dnn *dnn, struct multiply *made, const struct product *product)
{
	dnnl_matmul_desc_t desc;
	dnnl_primitive_attr_t attr = NULL;
	dnnl_primitive_desc_t primitive_desc = NULL;
	dnnl_status_t status = dnn->matmul_desc_init(&desc, &made->left, &made->right, product->bias != NULL ? &made->bias : NULL, &made->y);
	if (status == dnnl_success)
		status = create_attr(dnn, &attr);
	if (status == dnnl_success)
		status = dnn->primitive_desc_create(&primitive_desc, &desc, attr, dnn->engine, NULL);
	if (status == dnnl_success) {
		made->right = *dnn->primitive_desc_query_md(primitive_desc, dnnl_query_weights_md, 0);
		status = create_primitive(dnn, primitive_desc, &made->scratchpad, &made->primitive);
	}
	if (attr != NULL)
		(void)dnn->primitive_attr_destroy(attr);
	return status;
}

static dnnl_status_t create_reorder(const struct dnn *dnn, const dnnl_memory_desc_t *from, const dnnl_memory_desc_t *to, dnnl_memory_desc_t *scratchpad_out,
                                    dnnl_primitive_t *reorder_out)
{
	dnnl_primitive_attr_t attr = NULL;
	dnnl_primitive_desc_t desc = NULL;
	dnnl_status_t status = create_attr(dnn, &attr);
	if (status == dnnl_success)
		status = dnn->reorder_primitive_desc_create(&desc, from, dnn->engine, to, dnn->engine, attr);
	if (status == dnnl_success)
		status = create_primitive(dnn, desc, scratchpad_out, reorder_out);
	if (attr != NULL)
		(void)dnn->primitive_attr_destroy(attr);
	return status;
}

static void need_scratchpad(struct multiply_plan *plan, const dnnl_memory_desc_t *scratchpad)
{
	uint64_t bytes = round_up(plan->dnn->memory_desc_get_size(scratchpad));
	plan->scratchpad_bytes = bytes > plan->scratchpad_bytes ? bytes : plan->scratchpad_bytes;
}

/* ---- Plans ---- */

static void set_destroy(const struct dnn *dnn, struct multiply_set *set)
{
	for (unsigned i = 0; i < SHAPES; i++)
		if (set->by_shape[i].primitive != NULL)
			(void)dnn->primitive_destroy(set->by_shape[i].primitive);
}

void multiply_plan_destroy(void *data)
{
	struct multiply_plan *plan = data;
	set_destroy(plan->dnn, &plan->plain);
	set_destroy(plan->dnn, &plan->packed);
	for (unsigned i = 0; i < 2; i++)
		if (plan->packing.reorders[i] != NULL)
			(void)plan->dnn->primitive_destroy(plan->packing.reorders[i]);
	free(plan);
}

/* Sizes of the blocks with this index; 0: there are none. */
static void block_extents(const struct product *product, int64_t block_columns, unsigned shape, int64_t *rows_out, int64_t *columns_out)
{
	*rows_out = (shape & EDGE_ROWS) != 0 ? product->rows % PRODUCT_BLOCK_ROWS : product->rows >= PRODUCT_BLOCK_ROWS ? PRODUCT_BLOCK_ROWS : 0;
	*columns_out = (shape & EDGE_COLUMNS) != 0 ? product->columns % block_columns : product->columns >= block_columns ? block_columns : 0;
}

const struct multiply *multiply_of(const struct multiply_set *set, const struct product_block *block)
{
	return &set->by_shape[(block->rows < PRODUCT_BLOCK_ROWS ? EDGE_ROWS : 0u) | (block->columns < set->block_columns ? EDGE_COLUMNS : 0u)];
}

static void need_sums(struct multiply_plan *plan, const struct multiply_set *set, const struct multiply *made)
{
	uint64_t bytes = set->apart ? round_up(plan->dnn->memory_desc_get_size(&made->y)) : 0;
	plan->sums_bytes = bytes > plan->sums_bytes ? bytes : plan->sums_bytes;
}

static opd_status plan_plain(struct multiply_plan *plan, const struct product *product, unsigned shape, opd_error *error)
{
	const struct dnn *dnn = plan->dnn;
	struct multiply *made = &plan->plain.by_shape[shape];
	int64_t rows, columns;
	block_extents(product, plan->plain.block_columns, shape, &rows, &columns);
	if (rows == 0 || columns == 0)
		return OPD_OK;
	dnnl_status_t status = describe_all(dnn, made, product, &plan->plain, rows, columns) ? create_multiply(dnn, made, product) : dnnl_invalid_arguments;
	if (status != dnnl_success)
		return opd_fail(error, status == dnnl_out_of_memory ? OPD_RESOURCE_EXHAUSTED : OPD_INTERNAL,
		                "no oneDNN primitive for a product of %lld x %lld x %lld: its status is %d", (long long)rows, (long long)product->depth,
		                (long long)columns, (int)status);
	need_scratchpad(plan, &made->scratchpad);
	need_sums(plan, &plan->plain, made);
	return OPD_OK;
}

/* The layout is chosen by the first block shape of these columns; the other has to take it. */
static dnnl_status_t plan_packed(struct multiply_plan *plan, const struct product *product, unsigned shape)
{
	const struct dnn *dnn = plan->dnn;
	const struct multiply *other = &plan->packed.by_shape[shape ^ EDGE_ROWS];
	struct multiply *made = &plan->packed.by_shape[shape];
	int64_t rows, columns;
	block_extents(product, plan->packed.block_columns, shape, &rows, &columns);
	if (rows == 0 || columns == 0)
		return dnnl_success;
	const dnnl_dims_t dims = {product->depth, columns};
	dnnl_status_t status = describe_all(dnn, made, product, &plan->packed, rows, columns) ? dnnl_success : dnnl_invalid_arguments;
	if (other->primitive != NULL)
		made->right = other->right;
	else if (status == dnnl_success)
		status = dnn->memory_desc_init_by_tag(&made->right, 2, dims, type_of(product->right_tensor->dtype), dnnl_format_tag_any);
	if (status == dnnl_success)
		status = create_multiply(dnn, made, product);
	if (status != dnnl_success)
		return status;
	need_scratchpad(plan, &made->scratchpad);
	need_sums(plan, &plan->packed, made);
	return dnnl_success;
}

/* The primitive that has chosen the layout of whole (0) or narrower (EDGE_COLUMNS) blocks; NULL: there are none. */
static const struct multiply *packed_of(const struct multiply_plan *plan, unsigned edge)
{
	const struct multiply *whole = &plan->packed.by_shape[edge], *fewer_rows = &plan->packed.by_shape[edge | EDGE_ROWS];
	return whole->primitive != NULL ? whole : fewer_rows->primitive != NULL ? fewer_rows : NULL;
}

static dnnl_status_t plan_reorder(struct multiply_plan *plan, const struct product *product, unsigned edge)
{
	struct packing *packing = &plan->packing;
	const struct multiply *chosen = packed_of(plan, edge);
	if (chosen == NULL)
		return dnnl_success;
	packing->key.right[edge] = chosen->right;
	if (!describe(plan->dnn, &packing->from[edge], product->depth, chosen->right.dims[1], type_of(product->right_tensor->dtype), product->right))
		return dnnl_invalid_arguments;
	dnnl_status_t status = create_reorder(plan->dnn, &packing->from[edge], &packing->key.right[edge], &packing->scratchpads[edge], &packing->reorders[edge]);
	if (status == dnnl_success)
		need_scratchpad(plan, &packing->scratchpads[edge]);
	return status;
}

/* No packing where the library has nothing better than what is there. */
static void plan_packing(struct multiply_plan *plan, const struct product *product)
{
	struct packing *packing = &plan->packing;
	const int64_t block = plan->packed.block_columns;
	dnnl_status_t status = dnnl_success;
	for (unsigned i = 0; i < SHAPES && status == dnnl_success; i++)
		status = plan_packed(plan, product, i);
	for (unsigned i = 0; i < 2 && status == dnnl_success; i++)
		status = plan_reorder(plan, product, i);
	if (status != dnnl_success)
		return;
	packing->key.block_columns = block;
	packing->blocks = (uint64_t)((product->columns + block - 1) / block);
	packing->block_bytes = round_up(plan->dnn->memory_desc_get_size(&packing->key.right[product->columns >= block ? 0 : EDGE_COLUMNS]));
	packing->bytes = packing->block_bytes * packing->blocks;
}

/* Columns of a block that reads a packed copy. The library's layouts are made of blocks of 64 columns, and wider ones are no faster by themselves, so these share best; but what the processor multiplies in tiles (AMX) takes so little
 * time that reading the rows once a block counts (README.md, for both). They are the same for any number of rows, so that one copy of a weight serves all. */
static int64_t packed_columns(opd_dtype dtype)
{
	return dtype == OPD_f32 ? 64 : dtype == OPD_bf16 ? 128 : PRODUCT_BLOCK_COLUMNS;
}

static void choose_blocks(struct multiply_plan *plan, const struct product *product)
{
	const opd_dtype dtype = product->left_tensor->dtype;
	plan->plain.block_columns = PRODUCT_BLOCK_COLUMNS;
	plan->plain.apart = dtype == OPD_i8 || (dtype == OPD_bf16 && product->columns > PRODUCT_BLOCK_COLUMNS);
	plan->packed.block_columns = packed_columns(dtype);
	plan->packed.apart = dtype == OPD_i8 || product->columns > plan->packed.block_columns;
}

opd_status multiply_plan_create(const struct dnn *dnn, const struct product *product, struct multiply_plan **plan_out, opd_error *error)
{
	struct multiply_plan *plan = calloc(1, sizeof *plan);
	if (plan == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "no memory for a plan");
	plan->dnn = dnn;
	choose_blocks(plan, product);
	opd_status status = OPD_OK;
	const bool nothing = product->depth == 0 || product->batches == 0;
	for (unsigned i = 0; i < SHAPES && status == OPD_OK && !nothing; i++)
		status = plan_plain(plan, product, i, error);
	if (status != OPD_OK) {
		multiply_plan_destroy(plan);
		return status;
	}
	if (!nothing && product->batches == 1)
		plan_packing(plan, product);
	*plan_out = plan;
	return OPD_OK;
}

/* ---- Running ---- */

struct operand {
	int name;
	const dnnl_memory_desc_t *desc;
	void *data;
};

enum { OPERANDS_MAX = 5 };

static dnnl_status_t execute(const struct dnn *dnn, dnnl_primitive_t primitive, dnnl_stream_t stream, const struct operand *operands, int count)
{
	dnnl_exec_arg_t args[OPERANDS_MAX];
	dnnl_status_t status = dnnl_success;
	int made = 0;
	for (; made < count && status == dnnl_success; made++) {
		args[made] = (dnnl_exec_arg_t){.arg = operands[made].name, .memory = NULL};
		status = dnn->memory_create(&args[made].memory, operands[made].desc, dnn->engine, operands[made].data);
	}
	if (status == dnnl_success)
		status = dnn->primitive_execute(primitive, stream, count, args);
	for (int i = 0; i < made; i++)
		(void)dnn->memory_destroy(args[i].memory);
	return status;
}

/* The library's memory objects take non-const addresses; sources are only read. */
static void *source(const void *from)
{
	union {
		const void *from;
		void *to;
	} address = {from};
	return address.to;
}

dnnl_status_t multiply_execute(const struct dnn *dnn, const struct multiply *multiply, dnnl_stream_t stream, const struct product *product,
                               const struct product_block *block, const void *right, void *scratch, void *y)
{
	struct operand operands[OPERANDS_MAX] = {
		{DNNL_ARG_SRC, &multiply->left, source(block->left)},
		{DNNL_ARG_WEIGHTS, &multiply->right, source(right)},
		{DNNL_ARG_DST, &multiply->y, y},
		{DNNL_ARG_SCRATCHPAD, &multiply->scratchpad, scratch},
	};
	int count = 4;
	if (product->bias != NULL) {
		unsigned char *bias = (unsigned char *)opd_tensor_data(product->bias) + (uint64_t)block->column * opd_dtype_bytes(product->bias->dtype);
		operands[count++] = (struct operand){DNNL_ARG_BIAS, &multiply->bias, bias};
	}
	return execute(dnn, multiply->primitive, stream, operands, count);
}

const unsigned char *packing_at(const struct multiply_plan *plan, const struct product_block *block, const unsigned char *packed)
{
	return packed + (uint64_t)(block->column / plan->packing.key.block_columns) * plan->packing.block_bytes;
}

dnnl_status_t packing_fill(const struct multiply_plan *plan, const struct product *product, uint64_t index, dnnl_stream_t stream, void *scratch,
                           unsigned char *packed)
{
	const struct packing *packing = &plan->packing;
	const int64_t columns = packing->key.block_columns, column = (int64_t)index * columns;
	const unsigned edge = product->columns - column < columns ? EDGE_COLUMNS : 0;
	const struct product_matrix *right = &product->right;
	const unsigned char *from = (const unsigned char *)opd_tensor_data(product->right_tensor) +
	                            (uint64_t)(column * (right->transposed ? right->lead : 1)) * opd_dtype_bytes(product->right_tensor->dtype);
	const struct operand operands[] = {
		{DNNL_ARG_FROM, &packing->from[edge], source(from)},
		{DNNL_ARG_TO, &packing->key.right[edge], packed + index * packing->block_bytes},
		{DNNL_ARG_SCRATCHPAD, &packing->scratchpads[edge], scratch},
	};
	return execute(plan->dnn, packing->reorders[edge], stream, operands, 3);
}
