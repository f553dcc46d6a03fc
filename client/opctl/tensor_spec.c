#include "client/opctl/tensor_spec.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/npy.h"
#include "client/opctl/options.h"
#include "client/safetensors.h"
#include "proto/element.h"
#include "proto/tensor.h"

typedef enum filler {
	FILL_ZEROS,
	FILL_ONES,
	FILL_ARANGE,
	FILL_RANDN,
	FILL_END,
} filler;

static const char *const filler_names[FILL_END] = {"zeros:", "ones:", "arange:", "randn:"};

/* The filler that text starts with; *rest_out is what follows it. */
static filler find_filler(const char *text, const char **rest_out)
{
	*rest_out = text;
	for (int i = 0; i < FILL_END; i++) {
		const size_t bytes = strlen(filler_names[i]);
		if (strncmp(text, filler_names[i], bytes) == 0) {
			*rest_out = text + bytes;
			return (filler)i;
		}
	}
	return FILL_END;
}

/* The dtype before '[', which *rest_out is then at. */
static opd_dtype leading_dtype(const char *text, const char **rest_out)
{
	char name[16];
	const size_t bytes = strcspn(text, "[");
	if (text[bytes] != '[' || bytes >= sizeof name)
		return OPD_DTYPE_NONE;
	memcpy(name, text, bytes);
	name[bytes] = '\0';
	*rest_out = text + bytes;
	return opd_dtype_parse(name);
}

bool tensor_spec_looks_like(const char *text)
{
	const char *rest;
	return text[0] == '@' || find_filler(text, &rest) != FILL_END || leading_dtype(text, &rest) != OPD_DTYPE_NONE;
}

/* ---- Files ---- */

static opd_status read_key(const char *path, const char *key, struct file_tensor *tensor_out, opd_error *error)
{
	struct safetensors *file;
	opd_status status = safetensors_open(path, &file, error);
	if (status != OPD_OK)
		return status;
	const struct safetensors_entry *entry = NULL;
	if (key[0] != '\0') {
		entry = safetensors_find(file, key);
		if (entry == NULL)
			status = opd_fail(error, OPD_NOT_FOUND, "%s: has no tensor '%s' among its %zu", path, key, safetensors_count(file));
	} else if (safetensors_count(file) == 1) {
		entry = safetensors_at(file, 0);
	} else {
		status = opd_fail(error, OPD_INVALID_ARGUMENT, "%s: has %zu tensors, say which: @%s:NAME", path, safetensors_count(file),
		                  path);
	}
	if (entry != NULL)
		status = safetensors_read(file, entry, tensor_out, error);
	safetensors_close(file);
	return status;
}

/* Cuts "path<extension>" or "path<extension>:rest" in two; NULL where the extension isn't there. The last occurrence counts, as
 * folders may be called anything. */
static char *split_path(char *text, const char *extension)
{
	char *found = NULL;
	const size_t bytes = strlen(extension);
	for (char *at = text; (at = strstr(at, extension)) != NULL; at += bytes)
		if (at[bytes] == '\0' || at[bytes] == ':')
			found = at + bytes;
	if (found == NULL)
		return NULL;
	if (*found == ':')
		*found++ = '\0';
	return found;
}

static opd_status read_file(const char *what, const char *text, struct file_tensor *tensor_out, opd_error *error)
{
	char *path = strdup(text);
	if (path == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	opd_status status;
	opd_dtype raw_as = OPD_DTYPE_NONE;
	char *rest = split_path(path, ".safetensors");
	if (rest != NULL) {
		status = read_key(path, rest, tensor_out, error);
	} else if ((rest = split_path(path, ".npy")) != NULL) {
		status = rest[0] == '\0' ? OPD_OK : parse_dtype(what, rest, &raw_as, error);
		if (status == OPD_OK)
			status = npy_read(path, raw_as, tensor_out, error);
	} else {
		status =
		    opd_fail(error, OPD_INVALID_ARGUMENT, "%s is @%s, expected a name that ends in .npy or .safetensors:KEY", what, text);
	}
	free(path);
	return status;
}

/* ---- Shapes and values ---- */

/* "[2,4]", "[]"; *rest_out is behind it. */
static opd_status read_shape(const char *what, const char *text, struct file_tensor *tensor, const char **rest_out,
                             opd_error *error)
{
	const char *at = text + 1;
	while (*at != ']') {
		char extent[24];
		const size_t bytes = strcspn(at, ",]");
		if (at[bytes] == '\0' || bytes >= sizeof extent || tensor->rank == OPD_RANK_MAX)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s has the shape '%.60s', expected at most %d extents such as [2,4]",
			                what, text, OPD_RANK_MAX);
		memcpy(extent, at, bytes);
		extent[bytes] = '\0';
		const opd_status status = parse_int(what, extent, 0, INT64_MAX, &tensor->shape[tensor->rank], error);
		if (status != OPD_OK)
			return status;
		tensor->rank++;
		at += bytes;
		if (*at == ',')
			at++;
	}
	*rest_out = at + 1;
	return OPD_OK;
}

static opd_status describe(const char *what, const char *text, struct file_tensor *tensor, const char **rest_out,
                           opd_error *error)
{
	const char *shape = text;
	tensor->dtype = leading_dtype(text, &shape);
	if (tensor->dtype == OPD_DTYPE_NONE && access(text, F_OK) == 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s is '%.80s', expected a tensor: did you mean the file, @%.80s?", what, text, text);
	if (tensor->dtype == OPD_DTYPE_NONE)
		return opd_fail(error, OPD_INVALID_ARGUMENT,
		                "%s is '%.80s', expected a tensor: @file, DTYPE[SHAPE], randn:DTYPE[SHAPE] and the like", what, text);
	const opd_status status = read_shape(what, shape, tensor, rest_out, error);
	if (status != OPD_OK)
		return status;
	if (!tensor_bytes(tensor->dtype, tensor->rank, tensor->shape, &tensor->bytes))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s is '%.80s': its size doesn't fit 63 bits", what, text);
	tensor_row_major(tensor->rank, tensor->shape, tensor->strides);
	return OPD_OK;
}

static opd_status allocate(const char *what, struct file_tensor *tensor, opd_error *error)
{
	tensor->data = file_tensor_alloc(tensor->bytes);
	if (tensor->data == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: no memory for %llu bytes", what, (unsigned long long)tensor->bytes);
	return OPD_OK;
}

/* SplitMix64: any seed gives a fine sequence, 0 too. */
static uint64_t next_random(uint64_t *seed)
{
	uint64_t z = *seed += 0x9e3779b97f4a7c15u;
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

/* Box-Muller, one of its two. */
static double next_normal(uint64_t *seed)
{
	const double u = ((double)(next_random(seed) >> 11) + 1) * 0x1p-53; /* (0, 1] */
	const double v = (double)(next_random(seed) >> 11) * 0x1p-53;
	return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

static void fill(filler how, uint64_t *seed, struct file_tensor *tensor)
{
	const size_t element = opd_dtype_bytes(tensor->dtype);
	char *at = tensor->data;
	for (uint64_t i = 0; i < tensor->bytes / element; i++, at += element) {
		if (how == FILL_RANDN)
			element_store_f64(tensor->dtype, at, next_normal(seed));
		else
			element_store_i64(tensor->dtype, at, how == FILL_ONES ? 1 : how == FILL_ARANGE ? (int64_t)i : 0);
	}
}

static opd_status store_value(const char *what, const char *text, opd_dtype dtype, void *at, opd_error *error)
{
	static const int64_t low[OPD_DTYPE_COUNT] = {
	    [OPD_i8] = INT8_MIN, [OPD_i16] = INT16_MIN, [OPD_i32] = INT32_MIN, [OPD_i64] = INT64_MIN};
	static const int64_t high[OPD_DTYPE_COUNT] = {[OPD_bool] = 1,        [OPD_u8] = UINT8_MAX,  [OPD_i8] = INT8_MAX,
	                                              [OPD_i16] = INT16_MAX, [OPD_i32] = INT32_MAX, [OPD_i64] = INT64_MAX};
	if (dtype == OPD_bool || opd_dtype_is_integer(dtype)) {
		int64_t value;
		const opd_status status = parse_int(what, text, low[dtype], high[dtype], &value, error);
		if (status == OPD_OK)
			element_store_i64(dtype, at, value);
		return status;
	}
	double value;
	const opd_status status = parse_float(what, text, &value, error);
	if (status == OPD_OK)
		element_store_f64(dtype, at, value);
	return status;
}

static opd_status store_values(const char *what, char *list, struct file_tensor *tensor, opd_error *error)
{
	const size_t element = opd_dtype_bytes(tensor->dtype);
	const uint64_t wanted = tensor->bytes / element;
	uint64_t given = 0;
	char *rest = list[0] == '\0' ? NULL : list;
	for (char *word; (word = strsep(&rest, ",")) != NULL; given++) {
		unsigned char spare[8];
		const opd_status status = store_value(what, word, tensor->dtype,
		                                      given < wanted ? (char *)tensor->data + given * element : (void *)spare, error);
		if (status != OPD_OK)
			return status;
	}
	if (given != wanted && given != 1)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s has %llu values, its shape needs %llu (or one for all)", what,
		                (unsigned long long)given, (unsigned long long)wanted);
	for (uint64_t i = given; i < wanted; i++)
		memcpy((char *)tensor->data + i * element, tensor->data, element);
	return OPD_OK;
}

static opd_status read_values(const char *what, const char *text, struct file_tensor *tensor, opd_error *error)
{
	char *copy = strdup(text);
	const opd_status status =
	    copy == NULL ? opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory") : store_values(what, copy, tensor, error);
	free(copy);
	return status;
}

/* After DTYPE[SHAPE]: nothing, or =values; with a filler nothing. */
static opd_status finish(const char *what, filler how, const char *rest, uint64_t *seed, struct file_tensor *tensor,
                         opd_error *error)
{
	if ((how != FILL_END || rest[0] != '=') && rest[0] != '\0')
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s goes on with '%.40s' after its shape, expected %s", what, rest,
		                how == FILL_END ? "=VALUE,… or nothing" : "nothing");
	if (how == FILL_RANDN && !opd_dtype_is_float(tensor->dtype) && !opd_dtype_is_f8(tensor->dtype))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s is randn of %s, expected a float dtype", what,
		                opd_dtype_name(tensor->dtype));
	if (how == FILL_END && rest[0] == '\0')
		return OPD_OK;
	const opd_status status = allocate(what, tensor, error);
	if (status != OPD_OK)
		return status;
	if (how == FILL_END)
		return read_values(what, rest + 1, tensor, error);
	fill(how, seed, tensor);
	return OPD_OK;
}

opd_status tensor_spec_read(const char *what, const char *text, uint64_t *seed, struct file_tensor *tensor_out, opd_error *error)
{
	if (text[0] == '@')
		return read_file(what, text + 1, tensor_out, error);
	struct file_tensor tensor = {0};
	const char *rest;
	const filler how = find_filler(text, &rest);
	opd_status status = describe(what, rest, &tensor, &rest, error);
	if (status == OPD_OK)
		status = finish(what, how, rest, seed, &tensor, error);
	if (status != OPD_OK) {
		file_tensor_fini(&tensor);
		return status;
	}
	*tensor_out = tensor;
	return OPD_OK;
}
