#include "providers/ops/index.h"

opd_status index_invalid(const opd_op *op, const char *name, uint32_t rank, const int64_t *position, int64_t value, int64_t low,
                         int64_t limit, const char *why, opd_error *error)
{
	struct kernel_text at = rank == 0 ? (struct kernel_text){""} : kernel_extents_text(rank, position);
	if (limit <= 0)
		return kernel_invalid(op, error, "%s%s is %lld, expected none at all: there are 0 %s", name, at.text, (long long)value,
		                      why);
	if (low == INT64_MIN)
		return kernel_invalid(op, error, "%s%s is %lld, expected at most %lld (%s)", name, at.text, (long long)value,
		                      (long long)limit - 1, why);
	return kernel_invalid(op, error, "%s%s is %lld, expected %lld to %lld (%s)", name, at.text, (long long)value, (long long)low,
	                      (long long)limit - 1, why);
}

/* Coordinates of row-major number `index` in the tensor's shape. */
static void index_position(const opd_tensor *tensor, uint64_t index, int64_t *position)
{
	for (uint32_t i = tensor->rank; i-- > 0;) {
		position[i] = (int64_t)(index % (uint64_t)tensor->shape[i]);
		index /= (uint64_t)tensor->shape[i];
	}
}

opd_status index_check(const opd_op *op, const char *name, const opd_tensor *indices, int64_t low, int64_t limit, const char *why,
                       opd_error *error)
{
	int64_t shape[OPD_RANK_MAX];
	int64_t position[OPD_RANK_MAX];
	opd_tensor distinct = *indices;
	if (opd_tensor_empty(indices))
		return OPD_OK;
	distinct.shape = shape;
	distinct.elements = 1;
	for (uint32_t i = 0; i < indices->rank; i++) {
		shape[i] = indices->strides[i] == 0 ? 1 : indices->shape[i];
		distinct.elements *= (uint64_t)shape[i];
	}
	for (uint64_t i = 0; i < distinct.elements; i++) {
		int64_t value = kernel_index(&distinct, i);
		if (value >= low && value < limit)
			continue;
		index_position(&distinct, i, position);
		return index_invalid(op, name, distinct.rank, position, value, low, limit, why, error);
	}
	return OPD_OK;
}

int64_t index_multiply(int64_t a, int64_t b)
{
	int64_t product;
	return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

void index_set(void *memory, opd_dtype dtype, int64_t at, int64_t value)
{
	element_store_i64(dtype, (unsigned char *)memory + (size_t)at * opd_dtype_bytes(dtype), value);
}

int64_t index_get(const void *memory, opd_dtype dtype, int64_t at)
{
	return element_load_i64(dtype, (const unsigned char *)memory + (size_t)at * opd_dtype_bytes(dtype));
}

void index_generate(opd_generator *generator, void *memory, opd_dtype dtype, int64_t count, int64_t limit)
{
	for (int64_t i = 0; i < count; i++)
		index_set(memory, dtype, i, generator->pick(generator, 0, limit - 1));
}

static int64_t common_divisor(int64_t a, int64_t b)
{
	while (b != 0) {
		int64_t rest = a % b;
		a = b;
		b = rest;
	}
	return a;
}

struct index_scatter index_scatter_begin(opd_generator *generator, int64_t count)
{
	if (count < 1)
		return (struct index_scatter){0};
	struct index_scatter scatter = {
		.count = count,
		.step = generator->pick(generator, 1, count),
		.next = generator->pick(generator, 0, count - 1),
	};
	while (common_divisor(scatter.step, count) != 1)
		scatter.step++;
	return scatter;
}

int64_t index_scatter_next(struct index_scatter *scatter)
{
	int64_t value = scatter->next;
	scatter->next = (value + scatter->step) % scatter->count;
	return value;
}
