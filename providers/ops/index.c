#include "providers/ops/index.h"

#include <string.h>

/* Elements between two looks at whether the check is cancelled: a millisecond or two. */
#define ASK_EVERY ((int64_t)1 << 20)

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

opd_status index_check_op(const opd_op *op, const opd_call *call, opd_error *error)
{
	return op->check_long(op, call, NULL, error);
}

static int64_t scan_i32(const int32_t *data, int64_t stride, int64_t count, int64_t low, int64_t limit)
{
	int64_t i = 0;
	while (i < count && data[i * stride] >= low && data[i * stride] < limit)
		i++;
	return i;
}

static int64_t scan_i64(const int64_t *data, int64_t stride, int64_t count, int64_t low, int64_t limit)
{
	int64_t i = 0;
	while (i < count && data[i * stride] >= low && data[i * stride] < limit)
		i++;
	return i;
}

opd_status index_ask(struct index_reader *reader, int64_t elements, opd_error *error)
{
	reader->unasked += elements;
	if (reader->unasked < ASK_EVERY)
		return OPD_OK;
	reader->unasked = 0;
	if (reader->exec == NULL || !reader->exec->host->cancelled(reader->exec))
		return OPD_OK;
	return opd_fail(error, OPD_CANCELLED, "%.*s: cancelled while its indices were checked", (int)strcspn(reader->op->schema, "("), reader->op->schema);
}

opd_status index_scan(struct index_reader *reader, const struct kernel_line *line, int64_t low, int64_t limit, int64_t *at_out, opd_error *error)
{
	int64_t at = 0, good = 0, count = 0;
	for (; at < line->extent && good == count; at += good) {
		const void *data = kernel_line_at(line, at);
		count = line->extent - at < ASK_EVERY ? line->extent - at : ASK_EVERY;
		opd_status status = index_ask(reader, count, error);
		if (status != OPD_OK)
			return status;
		good = line->dtype == OPD_i32 ? scan_i32(data, line->stride, count, low, limit) : scan_i64(data, line->stride, count, low, limit);
	}
	*at_out = at;
	return OPD_OK;
}

opd_status index_check(const opd_op *op, const opd_exec *exec, const char *name, const opd_tensor *indices, int64_t low, int64_t limit, const char *why,
                       opd_error *error)
{
	int64_t shape[OPD_RANK_MAX];
	int64_t position[OPD_RANK_MAX];
	struct index_reader reader = {.op = op, .exec = exec};
	opd_tensor distinct = *indices;
	if (opd_tensor_empty(indices))
		return OPD_OK;
	distinct.shape = shape;
	distinct.elements = 1;
	for (uint32_t i = 0; i < indices->rank; i++) {
		shape[i] = indices->strides[i] == 0 ? 1 : indices->shape[i];
		distinct.elements *= (uint64_t)shape[i];
	}
	const struct kernel_view view = kernel_view(&distinct, distinct.rank, shape);
	for (uint64_t i = 0; i < distinct.elements;) {
		const struct kernel_line run = kernel_view_run(&view, i, INT64_MAX);
		int64_t at;
		opd_status status = index_scan(&reader, &run, low, limit, &at, error);
		if (status != OPD_OK)
			return status;
		i += (uint64_t)at;
		if (at == run.extent)
			continue;
		index_position(&distinct, i, position);
		return index_invalid(op, name, distinct.rank, position, kernel_index(&distinct, i), low, limit, why, error);
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
