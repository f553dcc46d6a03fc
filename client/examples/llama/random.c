/* Weights made from a seed: a model of any size without a file, to measure with. What it says is noise, but always the same noise. */
#include <math.h>
#include <string.h>

#include "client/examples/llama/llama.h"
#include "proto/element.h"

/* splitmix64: every 64 bits of it are four elements. */
static uint64_t next(uint64_t *state)
{
	uint64_t value = *state += 0x9e3779b97f4a7c15u;
	value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
	value = (value ^ value >> 27) * 0x94d049bb133111ebu;
	return value ^ value >> 31;
}

static uint64_t state_of(uint64_t seed, const char *name)
{
	uint64_t state = seed;
	for (const char *at = name; *at != '\0'; at++)
		state = next(&state) ^ (uint8_t)*at;
	return state;
}

static void put(opd_dtype dtype, void *to, uint64_t index, float value)
{
	if (dtype == OPD_f32)
		((float *)to)[index] = value;
	else
		((uint16_t *)to)[index] = dtype == OPD_f16 ? element_f32_to_f16(value) : element_f32_to_bf16(value);
}

/* Uniform, of mean 0 and variance 1 / columns, so that what goes through a product keeps its size; a norm's are 1. */
opd_status llama_random_piece(const struct llama *llama, const char *name, int64_t rows, int64_t columns, struct file_tensor *out, opd_error *error)
{
	const uint64_t elements = (uint64_t)(rows == 0 ? columns : rows * columns);
	const float scale = (float)(sqrt(3.0 / (double)columns) / 32768);
	*out = (struct file_tensor){.dtype = llama->dtype, .bytes = elements * opd_dtype_bytes(llama->dtype)};
	out->data = file_tensor_alloc(out->bytes);
	if (out->data == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "weights: out of memory for %s", name);
	uint64_t state = state_of(llama->seed, name), bits = 0;
	for (uint64_t i = 0; i < elements; i++) {
		bits = i % 4 == 0 ? next(&state) : bits >> 16;
		put(llama->dtype, out->data, i, rows == 0 ? 1 : (float)(int16_t)(uint16_t)bits * scale);
	}
	return OPD_OK;
}
