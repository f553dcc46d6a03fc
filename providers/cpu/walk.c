#include "providers/cpu/walk.h"

#include <string.h>

/* Stride of dimension `i` of the result in an operand that is broadcast to it: dimensions are aligned at the end. */
static uint64_t stride_of(const opd_tensor *tensor, uint32_t result_rank, uint32_t i)
{
	uint32_t missing = result_rank - tensor->rank;
	if (i < missing || tensor->shape[i - missing] == 1)
		return 0;
	return (uint64_t)tensor->strides[i - missing];
}

/* The last dimension of `walk` goes on where the new one, inside it, ends. */
static bool walk_merges(const struct walk *walk, uint64_t extent, const uint64_t *strides)
{
	bool merges = walk->rank > 0;
	for (uint32_t k = 0; k < walk->operands && merges; k++)
		merges = walk->strides[k][walk->rank - 1] == strides[k] * extent;
	return merges;
}

static void walk_add(struct walk *walk, uint64_t extent, const uint64_t *strides)
{
	if (walk_merges(walk, extent, strides))
		walk->shape[walk->rank - 1] *= extent;
	else
		walk->shape[walk->rank++] = extent;
	for (uint32_t k = 0; k < walk->operands; k++)
		walk->strides[k][walk->rank - 1] = strides[k];
}

struct walk walk_over(const opd_tensor *result, const opd_tensor *a, const opd_tensor *b)
{
	const opd_tensor *const tensors[WALK_OPERANDS] = {a, b};
	struct walk walk = {.operands = b == NULL ? 1 : 2};
	for (uint32_t k = 0; k < walk.operands; k++) {
		walk.data[k] = opd_tensor_data(tensors[k]);
		walk.bytes[k] = opd_dtype_bytes(tensors[k]->dtype);
	}
	for (uint32_t i = 0; i < result->rank; i++) {
		uint64_t strides[WALK_OPERANDS] = {0};
		if (result->shape[i] == 1)
			continue;
		for (uint32_t k = 0; k < walk.operands; k++)
			strides[k] = stride_of(tensors[k], result->rank, i);
		walk_add(&walk, (uint64_t)result->shape[i], strides);
	}
	if (walk.rank == 0) /* one element */
		walk.shape[walk.rank++] = 1;
	return walk;
}

struct walk_run walk_run_at(const struct walk *walk, uint64_t index, uint64_t limit)
{
	const uint32_t last = walk->rank - 1;
	uint64_t inner = walk->rank == 1 ? index : index % walk->shape[last];
	uint64_t outer = walk->rank == 1 ? 0 : index / walk->shape[last];
	uint64_t offsets[WALK_OPERANDS];
	struct walk_run run = {.count = walk->shape[last] - inner < limit ? walk->shape[last] - inner : limit};
	for (uint32_t k = 0; k < walk->operands; k++)
		offsets[k] = inner * walk->strides[k][last];
	for (uint32_t i = last; i-- > 0;) {
		for (uint32_t k = 0; k < walk->operands; k++)
			offsets[k] += outer % walk->shape[i] * walk->strides[k][i];
		outer /= walk->shape[i];
	}
	for (uint32_t k = 0; k < walk->operands; k++) {
		run.data[k] = walk->data[k] + offsets[k] * walk->bytes[k];
		run.strides[k] = walk->strides[k][last];
	}
	return run;
}

#define GATHER(type)                                                        \
	do {                                                                    \
		type *out = to;                                                     \
		for (uint64_t i = 0; i < count; i++)                                \
			memcpy(&out[i], (const type *)from + i * stride, sizeof(type)); \
	} while (0)

void walk_gather(void *to, const void *from, uint64_t stride, uint64_t count, uint64_t bytes)
{
	if (stride == 1)
		memcpy(to, from, count * bytes);
	else if (bytes == 1)
		GATHER(uint8_t);
	else if (bytes == 2)
		GATHER(uint16_t);
	else if (bytes == 4)
		GATHER(uint32_t);
	else
		GATHER(uint64_t);
}

const void *walk_elements(const struct walk *walk, uint64_t index, uint64_t count, void *buffer)
{
	struct walk_run run = walk_run_at(walk, index, count);
	if (run.count == count && run.strides[0] == 1)
		return run.data[0];
	unsigned char *to = buffer;
	for (uint64_t done = 0; done < count; done += run.count) {
		run = walk_run_at(walk, index + done, count - done);
		walk_gather(to + done * walk->bytes[0], run.data[0], run.strides[0], run.count, walk->bytes[0]);
	}
	return buffer;
}
