#include "client/npy.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/tensor.h"

#define NPY_HEADER_MAX (64u << 10)
#define NPY_DTYPE_TEXT 16

static const char npy_magic[6] = {'\x93', 'N', 'U', 'M', 'P', 'Y'};

/* What the dictionary of the header says. */
struct npy_header {
	char descr[NPY_DTYPE_TEXT];
	bool fortran;
	bool has_descr;
	bool has_fortran;
	bool has_shape;
	uint32_t rank;
	int64_t shape[OPD_RANK_MAX];
};

struct npy_cursor {
	const char *at;
	const char *end;
	const char *path;
	opd_error *error;
};

static opd_status fail_at(const struct npy_cursor *cursor, const char *expected)
{
	if (cursor->at == cursor->end)
		return opd_fail(cursor->error, OPD_INVALID_ARGUMENT, "%s: .npy header ends, expected %s", cursor->path, expected);
	return opd_fail(cursor->error, OPD_INVALID_ARGUMENT, "%s: .npy header has '%.8s', expected %s", cursor->path, cursor->at,
	                expected);
}

static void skip_space(struct npy_cursor *cursor)
{
	while (cursor->at < cursor->end && (*cursor->at == ' ' || *cursor->at == '\n' || *cursor->at == '\t'))
		cursor->at++;
}

static bool take(struct npy_cursor *cursor, char wanted)
{
	skip_space(cursor);
	if (cursor->at == cursor->end || *cursor->at != wanted)
		return false;
	cursor->at++;
	return true;
}

static bool take_word(struct npy_cursor *cursor, const char *word)
{
	skip_space(cursor);
	const size_t bytes = strlen(word);
	if ((size_t)(cursor->end - cursor->at) < bytes || memcmp(cursor->at, word, bytes) != 0)
		return false;
	cursor->at += bytes;
	return true;
}

/* A quoted text without escapes, at most out_bytes - 1 long. */
static bool take_text(struct npy_cursor *cursor, char *out, size_t out_bytes)
{
	const char quote = take(cursor, '\'') ? '\'' : take(cursor, '"') ? '"' : '\0';
	if (quote == '\0')
		return false;
	size_t bytes = 0;
	while (cursor->at < cursor->end && *cursor->at != quote && *cursor->at != '\\' && bytes + 1 < out_bytes)
		out[bytes++] = *cursor->at++;
	out[bytes] = '\0';
	return take(cursor, quote);
}

static bool take_extent(struct npy_cursor *cursor, int64_t *extent_out)
{
	skip_space(cursor);
	int64_t value = 0;
	const char *start = cursor->at;
	while (cursor->at < cursor->end && *cursor->at >= '0' && *cursor->at <= '9') {
		if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, *cursor->at - '0', &value))
			return false;
		cursor->at++;
	}
	if (cursor->at == start)
		return false;
	(void)take(cursor, 'L'); /* Python 2 wrote long integers so */
	*extent_out = value;
	return true;
}

static opd_status take_shape(struct npy_cursor *cursor, struct npy_header *header)
{
	if (!take(cursor, '('))
		return fail_at(cursor, "a shape such as (2, 3)");
	while (!take(cursor, ')')) {
		if (header->rank == OPD_RANK_MAX)
			return opd_fail(cursor->error, OPD_INVALID_ARGUMENT, "%s: array has more than %d dimensions", cursor->path,
			                OPD_RANK_MAX);
		if (!take_extent(cursor, &header->shape[header->rank]))
			return fail_at(cursor, "an extent from 0 to 2^63 - 1");
		header->rank++;
		if (take(cursor, ','))
			continue;
		if (!take(cursor, ')'))
			return fail_at(cursor, "',' or ')' in the shape");
		break;
	}
	header->has_shape = true;
	return OPD_OK;
}

static opd_status take_entry(struct npy_cursor *cursor, struct npy_header *header)
{
	char key[NPY_DTYPE_TEXT];
	if (!take_text(cursor, key, sizeof key) || !take(cursor, ':'))
		return fail_at(cursor, "'descr', 'fortran_order' or 'shape', and ':'");
	if (strcmp(key, "shape") == 0 && !header->has_shape)
		return take_shape(cursor, header);
	if (strcmp(key, "descr") == 0 && !header->has_descr) {
		header->has_descr = take_text(cursor, header->descr, sizeof header->descr);
		return header->has_descr ? OPD_OK : fail_at(cursor, "a plain dtype such as '<f4' (structured ones aren't read)");
	}
	if (strcmp(key, "fortran_order") == 0 && !header->has_fortran) {
		header->fortran = take_word(cursor, "True");
		header->has_fortran = header->fortran || take_word(cursor, "False");
		return header->has_fortran ? OPD_OK : fail_at(cursor, "True or False");
	}
	return opd_fail(cursor->error, OPD_INVALID_ARGUMENT, "%s: .npy header has the key '%s' unexpectedly or twice", cursor->path,
	                key);
}

static opd_status parse_header(struct npy_cursor *cursor, struct npy_header *header)
{
	if (!take(cursor, '{'))
		return fail_at(cursor, "'{'");
	while (!take(cursor, '}')) {
		const opd_status status = take_entry(cursor, header);
		if (status != OPD_OK)
			return status;
		if (take(cursor, ','))
			continue;
		if (!take(cursor, '}'))
			return fail_at(cursor, "',' or '}'");
		break;
	}
	skip_space(cursor);
	if (cursor->at != cursor->end)
		return fail_at(cursor, "nothing after '}'");
	if (!header->has_descr || !header->has_fortran || !header->has_shape)
		return opd_fail(cursor->error, OPD_INVALID_ARGUMENT, "%s: .npy header lacks %s", cursor->path,
		                !header->has_descr     ? "'descr'"
		                : !header->has_fortran ? "'fortran_order'"
		                                       : "'shape'");
	return OPD_OK;
}

static const struct {
	const char *code;
	opd_dtype dtype;
} npy_codes[] = {
    {"b1", OPD_bool}, {"u1", OPD_u8},  {"i1", OPD_i8},  {"i2", OPD_i16}, {"i4", OPD_i32},
    {"i8", OPD_i64},  {"f2", OPD_f16}, {"f4", OPD_f32}, {"f8", OPD_f64},
};

bool npy_is_raw(opd_dtype dtype)
{
	return dtype == OPD_bf16 || opd_dtype_is_f8(dtype);
}

/* The dtype of a descr without its byte order; raw words ("u2", "V2") are `raw_as` where the size fits. */
static opd_dtype dtype_of(const char *code, opd_dtype raw_as)
{
	if ((code[0] == 'u' || code[0] == 'V') && code[1] >= '0' && code[1] <= '9' && code[2] == '\0' && raw_as != OPD_DTYPE_NONE)
		return opd_dtype_bytes(raw_as) == (size_t)(code[1] - '0') ? raw_as : OPD_DTYPE_NONE;
	for (size_t i = 0; i < sizeof npy_codes / sizeof npy_codes[0]; i++)
		if (strcmp(code, npy_codes[i].code) == 0 && (raw_as == OPD_DTYPE_NONE || raw_as == npy_codes[i].dtype))
			return npy_codes[i].dtype;
	return OPD_DTYPE_NONE;
}

static opd_status resolve_dtype(const char *path, const char *descr, opd_dtype raw_as, opd_dtype *dtype_out, bool *swap_out,
                                opd_error *error)
{
	const bool ordered = descr[0] != '\0' && strchr("<>|=", descr[0]) != NULL;
	const opd_dtype dtype = dtype_of(descr + ordered, raw_as);
	if (dtype == OPD_DTYPE_NONE && raw_as != OPD_DTYPE_NONE)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: elements are '%s', which can't be taken as %s", path, descr,
		                opd_dtype_name(raw_as));
	if (dtype == OPD_DTYPE_NONE)
		return opd_fail(
		    error, OPD_INVALID_ARGUMENT,
		    "%s: elements are '%s', expected bool, u1, i1, i2, i4, i8, f2, f4 or f8 (say %s:bf16 to read 16-bit words as bf16)",
		    path, descr, path);
	*dtype_out = dtype;
	*swap_out = descr[0] == '>' && opd_dtype_bytes(dtype) > 1;
	return OPD_OK;
}

static void swap_bytes(void *data, uint64_t bytes, size_t element)
{
	unsigned char *at = data;
	for (uint64_t i = 0; i < bytes; i += element) {
		for (size_t k = 0; k < element / 2; k++) {
			const unsigned char low = at[i + k];
			at[i + k] = at[i + element - 1 - k];
			at[i + element - 1 - k] = low;
		}
	}
}

static void column_major(uint32_t rank, const int64_t *shape, int64_t *strides_out)
{
	int64_t stride = 1;
	for (uint32_t i = 0; i < rank; i++) {
		strides_out[i] = stride;
		if (shape[i] > 0)
			stride *= shape[i];
	}
}

/* Fills tensor_out but for its data; nothing is allocated. */
static opd_status describe(const char *path, const struct npy_header *header, opd_dtype dtype, uint64_t data_bytes,
                           struct file_tensor *tensor_out, opd_error *error)
{
	struct file_tensor tensor = {.dtype = dtype, .rank = header->rank};
	memcpy(tensor.shape, header->shape, sizeof tensor.shape);
	if (!tensor_bytes(dtype, tensor.rank, tensor.shape, &tensor.bytes))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: the shape's size doesn't fit 63 bits", path);
	if (tensor.bytes != data_bytes)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: has %llu bytes after its header, expected %llu (by dtype and shape)",
		                path, (unsigned long long)data_bytes, (unsigned long long)tensor.bytes);
	if (header->fortran)
		column_major(tensor.rank, tensor.shape, tensor.strides);
	else
		tensor_row_major(tensor.rank, tensor.shape, tensor.strides);
	*tensor_out = tensor;
	return OPD_OK;
}

/* Offset and length of the header's text. */
static opd_status locate_header(int fd, const char *path, uint64_t file_bytes, uint64_t *offset_out, uint64_t *bytes_out,
                                opd_error *error)
{
	unsigned char start[12];
	if (file_bytes < sizeof start)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: has %llu bytes, too few for an .npy file", path,
		                (unsigned long long)file_bytes);
	const opd_status status = file_read_at(fd, path, 0, start, sizeof start, error);
	if (status != OPD_OK)
		return status;
	if (memcmp(start, npy_magic, sizeof npy_magic) != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: is not an .npy file (it doesn't start with \\x93NUMPY)", path);
	if (start[6] < 1 || start[6] > 3)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: .npy version %u.%u, expected 1 to 3", path, start[6], start[7]);
	const bool wide = start[6] > 1;
	const uint64_t offset = wide ? 12 : 10;
	const uint64_t bytes =
	    start[8] | (uint64_t)start[9] << 8 | (wide ? (uint64_t)start[10] << 16 | (uint64_t)start[11] << 24 : 0);
	if (bytes > NPY_HEADER_MAX || bytes > file_bytes - offset)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: .npy header of %llu bytes, the file has %llu and the limit is %u", path,
		                (unsigned long long)bytes, (unsigned long long)(file_bytes - offset), NPY_HEADER_MAX);
	*offset_out = offset;
	*bytes_out = bytes;
	return OPD_OK;
}

static opd_status read_header(int fd, const char *path, uint64_t file_bytes, struct npy_header *header, uint64_t *data_offset_out,
                              opd_error *error)
{
	uint64_t offset = 0, bytes = 0;
	opd_status status = locate_header(fd, path, file_bytes, &offset, &bytes, error);
	if (status != OPD_OK)
		return status;
	char *text = malloc((size_t)bytes + 1);
	if (text == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", path);
	status = file_read_at(fd, path, offset, text, bytes, error);
	if (status == OPD_OK) {
		text[bytes] = '\0'; /* so that fail_at may quote up to the end */
		struct npy_cursor cursor = {.at = text, .end = text + bytes, .path = path, .error = error};
		status = parse_header(&cursor, header);
	}
	free(text);
	*data_offset_out = offset + bytes;
	return status;
}

static opd_status read_array(int fd, const char *path, uint64_t file_bytes, opd_dtype raw_as, struct file_tensor *tensor_out,
                             opd_error *error)
{
	struct npy_header header = {0};
	uint64_t offset = 0;
	opd_status status = read_header(fd, path, file_bytes, &header, &offset, error);
	opd_dtype dtype = OPD_DTYPE_NONE;
	bool swap = false;
	if (status == OPD_OK)
		status = resolve_dtype(path, header.descr, raw_as, &dtype, &swap, error);
	struct file_tensor tensor = {0};
	if (status == OPD_OK)
		status = describe(path, &header, dtype, file_bytes - offset, &tensor, error);
	if (status != OPD_OK)
		return status;
	tensor.data = file_tensor_alloc(tensor.bytes);
	if (tensor.data == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: no memory for %llu bytes", path, (unsigned long long)tensor.bytes);
	status = file_read_at(fd, path, offset, tensor.data, tensor.bytes, error);
	if (status != OPD_OK) {
		file_tensor_fini(&tensor);
		return status;
	}
	if (swap)
		swap_bytes(tensor.data, tensor.bytes, opd_dtype_bytes(dtype));
	*tensor_out = tensor;
	return OPD_OK;
}

opd_status npy_read(const char *path, opd_dtype raw_as, struct file_tensor *tensor_out, opd_error *error)
{
	int fd;
	uint64_t bytes;
	opd_status status = file_open(path, &fd, &bytes, error);
	if (status != OPD_OK)
		return status;
	status = read_array(fd, path, bytes, raw_as, tensor_out, error);
	(void)close(fd);
	return status;
}

static const char *code_of(opd_dtype dtype)
{
	if (npy_is_raw(dtype))
		return dtype == OPD_bf16 ? "u2" : "u1";
	for (size_t i = 0; i < sizeof npy_codes / sizeof npy_codes[0]; i++)
		if (npy_codes[i].dtype == dtype)
			return npy_codes[i].code;
	return NULL;
}

/* Magic, length and dictionary, padded with spaces so that the data starts at a multiple of 64. Returns its bytes. */
static size_t format_header(const opd_tensor *tensor, const char *code, char out[512])
{
	char shape[OPD_RANK_MAX * 24 + 1] = "";
	size_t length = 0;
	for (uint32_t i = 0; i < tensor->rank; i++)
		length +=
		    (size_t)snprintf(shape + length, sizeof shape - length, i == 0 ? "%lld," : " %lld,", (long long)tensor->shape[i]);
	if (tensor->rank > 1)
		shape[length - 1] = '\0';
	const char order = opd_dtype_bytes(tensor->dtype) == 1 ? '|' : '<';
	size_t bytes = 10 + (size_t)snprintf(out + 10, 512 - 10, "{'descr': '%c%s', 'fortran_order': False, 'shape': (%s), }", order,
	                                     code, shape);
	while ((bytes + 1) % 64 != 0)
		out[bytes++] = ' ';
	out[bytes++] = '\n';
	memcpy(out, npy_magic, sizeof npy_magic);
	out[6] = 1;
	out[7] = 0;
	out[8] = (char)((bytes - 10) & 0xff);
	out[9] = (char)((bytes - 10) >> 8);
	return bytes;
}

opd_status npy_write(const char *path, const opd_tensor *tensor, opd_error *error)
{
	const char *code = code_of(tensor->dtype);
	uint64_t bytes;
	if (code == NULL || !opd_tensor_contiguous(tensor) || !tensor_bytes(tensor->dtype, tensor->rank, tensor->shape, &bytes))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: can't write a tensor of dtype %s as .npy, or it isn't row-major", path,
		                opd_dtype_name(tensor->dtype));
	char header[512];
	const size_t header_bytes = format_header(tensor, code, header);
	const struct iovec pieces[2] = {{header, header_bytes}, {bytes == 0 ? NULL : opd_tensor_data(tensor), (size_t)bytes}};
	return file_write_atomic(path, pieces, 2, error);
}
