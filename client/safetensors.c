#include "client/safetensors.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cjson/cJSON.h>

#include "proto/tensor.h"

#define HEADER_MAX (16u << 20)
#define METADATA "__metadata__"

struct safetensors {
	int fd;
	char *path;
	cJSON *header; /* names and texts point into it */
	const cJSON *metadata;
	size_t count;
	struct safetensors_entry *entries; /* by name */
};

static const struct {
	const char *name;
	opd_dtype dtype;
} safetensors_dtypes[] = {
#define X(dtype, number, bytes, text) {text, OPD_##dtype},
    OPD_DTYPE_MAP(X)
#undef X
};

static opd_dtype dtype_of(const char *name)
{
	for (size_t i = 0; i < sizeof safetensors_dtypes / sizeof safetensors_dtypes[0]; i++)
		if (strcmp(name, safetensors_dtypes[i].name) == 0)
			return safetensors_dtypes[i].dtype;
	return OPD_DTYPE_NONE;
}

static const char *dtype_text(opd_dtype dtype)
{
	for (size_t i = 0; i < sizeof safetensors_dtypes / sizeof safetensors_dtypes[0]; i++)
		if (safetensors_dtypes[i].dtype == dtype)
			return safetensors_dtypes[i].name;
	return NULL;
}

/* A JSON number that is a whole one from 0 to 2^53. */
static bool whole(const cJSON *item, uint64_t *value_out)
{
	if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0) || item->valuedouble > 9007199254740992.0)
		return false;
	const uint64_t value = (uint64_t)item->valuedouble;
	if ((double)value != item->valuedouble)
		return false;
	*value_out = value;
	return true;
}

static opd_status read_shape(const char *path, const cJSON *shape, struct safetensors_entry *entry, opd_error *error)
{
	if (!cJSON_IsArray(shape))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: tensor '%s' has no shape", path, entry->name);
	const cJSON *item;
	cJSON_ArrayForEach(item, shape)
	{
		uint64_t extent;
		if (!whole(item, &extent))
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: tensor '%s' has a dimension that is no whole number from 0 to 2^53",
			                path, entry->name);
		if (entry->rank < OPD_RANK_MAX)
			entry->shape[entry->rank] = (int64_t)extent;
		entry->rank++;
	}
	if (entry->rank > OPD_RANK_MAX)
		entry->dtype = OPD_DTYPE_NONE;
	return OPD_OK;
}

static opd_status read_range(const char *path, const cJSON *range, uint64_t base, uint64_t file_bytes,
                             struct safetensors_entry *entry, opd_error *error)
{
	uint64_t begin, end, bytes;
	if (!cJSON_IsArray(range) || cJSON_GetArraySize(range) != 2 || !whole(range->child, &begin) ||
	    !whole(range->child->next, &end))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: tensor '%s' has no data_offsets of two whole numbers", path,
		                entry->name);
	if (begin > end || end > file_bytes - base)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: tensor '%s' has data_offsets [%llu, %llu], the data has %llu bytes",
		                path, entry->name, (unsigned long long)begin, (unsigned long long)end,
		                (unsigned long long)(file_bytes - base));
	if (entry->dtype != OPD_DTYPE_NONE &&
	    (!tensor_bytes(entry->dtype, entry->rank, entry->shape, &bytes) || bytes != end - begin))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: tensor '%s' has %llu bytes, its dtype %s and shape need another number",
		                path, entry->name, (unsigned long long)(end - begin), entry->dtype_name);
	entry->offset = base + begin;
	entry->bytes = end - begin;
	return OPD_OK;
}

static opd_status read_entry(const char *path, const cJSON *item, uint64_t base, uint64_t file_bytes,
                             struct safetensors_entry *entry, opd_error *error)
{
	entry->name = item->string;
	entry->dtype_name = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "dtype"));
	if (entry->dtype_name == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: tensor '%s' has no dtype", path, entry->name);
	entry->dtype = dtype_of(entry->dtype_name);
	const opd_status status = read_shape(path, cJSON_GetObjectItemCaseSensitive(item, "shape"), entry, error);
	if (status != OPD_OK)
		return status;
	return read_range(path, cJSON_GetObjectItemCaseSensitive(item, "data_offsets"), base, file_bytes, entry, error);
}

static int by_name(const void *a, const void *b)
{
	return strcmp(((const struct safetensors_entry *)a)->name, ((const struct safetensors_entry *)b)->name);
}

static int by_offset(const void *a, const void *b)
{
	const struct safetensors_entry *left = a, *right = b;
	if (left->offset != right->offset)
		return left->offset < right->offset ? -1 : 1;
	return left->bytes < right->bytes ? -1 : left->bytes > right->bytes;
}

/* The ranges, one after the other, are the data: no gap, no overlap, no tail. */
static opd_status check_ranges(struct safetensors *file, uint64_t base, uint64_t file_bytes, opd_error *error)
{
	if (file->count > 1)
		qsort(file->entries, file->count, sizeof file->entries[0], by_offset);
	uint64_t at = base;
	for (size_t i = 0; i < file->count; i++) {
		const struct safetensors_entry *entry = &file->entries[i];
		if (entry->offset != at)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: tensor '%s' starts at byte %llu of the data, expected %llu (%s)",
			                file->path, entry->name, (unsigned long long)(entry->offset - base), (unsigned long long)(at - base),
			                entry->offset < at ? "it overlaps the one before" : "there is a gap before it");
		at += entry->bytes;
	}
	if (at != file_bytes)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %llu bytes of the data belong to no tensor", file->path,
		                (unsigned long long)(file_bytes - at));
	return OPD_OK;
}

static opd_status check_names(struct safetensors *file, opd_error *error)
{
	if (file->count > 1)
		qsort(file->entries, file->count, sizeof file->entries[0], by_name);
	for (size_t i = 1; i < file->count; i++)
		if (strcmp(file->entries[i - 1].name, file->entries[i].name) == 0)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: tensor '%s' is there twice", file->path, file->entries[i].name);
	return OPD_OK;
}

static opd_status read_metadata(struct safetensors *file, const cJSON *item, opd_error *error)
{
	if (!cJSON_IsObject(item) || file->metadata != NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: " METADATA " is there twice or is no object", file->path);
	const cJSON *text;
	cJSON_ArrayForEach(text, item)
	{
		if (!cJSON_IsString(text))
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: " METADATA " '%s' is no text", file->path, text->string);
	}
	file->metadata = item;
	return OPD_OK;
}

static opd_status read_entries(struct safetensors *file, uint64_t base, uint64_t file_bytes, opd_error *error)
{
	if (!cJSON_IsObject(file->header))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: the header is no JSON object", file->path);
	const int children = cJSON_GetArraySize(file->header);
	file->entries = calloc((size_t)children + 1, sizeof file->entries[0]);
	if (file->entries == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", file->path);
	const cJSON *item;
	cJSON_ArrayForEach(item, file->header)
	{
		const opd_status status = strcmp(item->string, METADATA) == 0
		                              ? read_metadata(file, item, error)
		                              : read_entry(file->path, item, base, file_bytes, &file->entries[file->count++], error);
		if (status != OPD_OK)
			return status;
	}
	const opd_status status = check_ranges(file, base, file_bytes, error);
	return status != OPD_OK ? status : check_names(file, error);
}

static opd_status parse_header(struct safetensors *file, const char *text, uint64_t bytes, opd_error *error)
{
	const char *end = NULL;
	file->header = cJSON_ParseWithLengthOpts(text, (size_t)bytes, &end, false);
	if (file->header == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: the header is not JSON (at byte %lld of %llu)", file->path,
		                end == NULL ? 0 : (long long)(end - text), (unsigned long long)bytes);
	for (; end < text + bytes; end++)
		if (*end != ' ' && *end != '\n')
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: the header goes on after its JSON, expected spaces", file->path);
	return OPD_OK;
}

static opd_status read_header(struct safetensors *file, uint64_t file_bytes, opd_error *error)
{
	unsigned char length[8];
	if (file_bytes < sizeof length)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: has %llu bytes, too few for a .safetensors file", file->path,
		                (unsigned long long)file_bytes);
	opd_status status = file_read_at(file->fd, file->path, 0, length, sizeof length, error);
	if (status != OPD_OK)
		return status;
	uint64_t bytes = 0;
	for (unsigned i = 0; i < 8; i++)
		bytes |= (uint64_t)length[i] << (8 * i);
	if (bytes > HEADER_MAX || bytes > file_bytes - 8)
		return opd_fail(error, OPD_INVALID_ARGUMENT,
		                "%s: header of %llu bytes, the file has %llu after its length and the limit is %u", file->path,
		                (unsigned long long)bytes, (unsigned long long)(file_bytes - 8), HEADER_MAX);
	char *text = malloc((size_t)bytes + 1);
	if (text == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", file->path);
	status = file_read_at(file->fd, file->path, 8, text, bytes, error);
	if (status == OPD_OK)
		status = parse_header(file, text, bytes, error);
	free(text);
	return status != OPD_OK ? status : read_entries(file, 8 + bytes, file_bytes, error);
}

opd_status safetensors_open(const char *path, struct safetensors **file_out, opd_error *error)
{
	uint64_t bytes;
	int fd;
	opd_status status = file_open(path, &fd, &bytes, error);
	if (status != OPD_OK)
		return status;
	struct safetensors *file = calloc(1, sizeof *file);
	char *copy = strdup(path);
	if (file == NULL || copy == NULL) {
		free(file);
		free(copy);
		(void)close(fd);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", path);
	}
	file->fd = fd;
	file->path = copy;
	status = read_header(file, bytes, error);
	if (status != OPD_OK) {
		safetensors_close(file);
		return status;
	}
	*file_out = file;
	return OPD_OK;
}

void safetensors_close(struct safetensors *file)
{
	if (file == NULL)
		return;
	(void)close(file->fd);
	cJSON_Delete(file->header);
	free(file->entries);
	free(file->path);
	free(file);
}

size_t safetensors_count(const struct safetensors *file)
{
	return file->count;
}

const struct safetensors_entry *safetensors_at(const struct safetensors *file, size_t index)
{
	return index < file->count ? &file->entries[index] : NULL;
}

const struct safetensors_entry *safetensors_find(const struct safetensors *file, const char *name)
{
	const struct safetensors_entry wanted = {.name = name};
	return file->count == 0 ? NULL : bsearch(&wanted, file->entries, file->count, sizeof file->entries[0], by_name);
}

const char *safetensors_metadata(const struct safetensors *file, const char *key)
{
	return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(file->metadata, key));
}

opd_status safetensors_read(const struct safetensors *file, const struct safetensors_entry *entry, struct file_tensor *tensor_out,
                            opd_error *error)
{
	if (entry->dtype == OPD_DTYPE_NONE)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: tensor '%s' has dtype %s and rank %u, which opd doesn't have",
		                file->path, entry->name, entry->dtype_name, entry->rank);
	struct file_tensor tensor = {.dtype = entry->dtype, .rank = entry->rank, .bytes = entry->bytes};
	memcpy(tensor.shape, entry->shape, sizeof tensor.shape);
	tensor_row_major(tensor.rank, tensor.shape, tensor.strides);
	tensor.data = file_tensor_alloc(tensor.bytes);
	if (tensor.data == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: no memory for the %llu bytes of tensor '%s'", file->path,
		                (unsigned long long)tensor.bytes, entry->name);
	const opd_status status = file_read_at(file->fd, file->path, entry->offset, tensor.data, tensor.bytes, error);
	if (status != OPD_OK) {
		file_tensor_fini(&tensor);
		return status;
	}
	*tensor_out = tensor;
	return OPD_OK;
}

/* ---- Writing ---- */

/* {"dtype": …, "shape": […], "data_offsets": […]}; NULL: out of memory. */
static cJSON *make_entry(const opd_tensor *tensor, uint64_t begin, uint64_t end)
{
	cJSON *entry = cJSON_CreateObject();
	cJSON *shape = cJSON_AddArrayToObject(entry, "shape");
	bool complete = cJSON_AddStringToObject(entry, "dtype", dtype_text(tensor->dtype)) != NULL && shape != NULL;
	for (uint32_t i = 0; i < tensor->rank && complete; i++)
		complete = cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)tensor->shape[i]));
	cJSON *range = cJSON_AddArrayToObject(entry, "data_offsets");
	complete = complete && range != NULL && cJSON_AddItemToArray(range, cJSON_CreateNumber((double)begin)) &&
	           cJSON_AddItemToArray(range, cJSON_CreateNumber((double)end));
	if (complete)
		return entry;
	cJSON_Delete(entry);
	return NULL;
}

static bool add_metadata(cJSON *header, const struct safetensors_text *texts, size_t count)
{
	if (count == 0)
		return true;
	cJSON *metadata = cJSON_AddObjectToObject(header, METADATA);
	for (size_t i = 0; i < count && metadata != NULL; i++)
		if (cJSON_AddStringToObject(metadata, texts[i].key, texts[i].value) == NULL)
			return false;
	return metadata != NULL;
}

/* Fills the header and, from pieces[0] on, the tensors' bytes. */
static opd_status add_items(const char *path, const struct safetensors_item *items, size_t count, cJSON *header,
                            struct iovec *pieces, opd_error *error)
{
	uint64_t at = 0;
	for (size_t i = 0; i < count; i++) {
		const opd_tensor *tensor = items[i].tensor;
		uint64_t bytes, end;
		if (dtype_text(tensor->dtype) == NULL || !opd_tensor_contiguous(tensor) ||
		    !tensor_bytes(tensor->dtype, tensor->rank, tensor->shape, &bytes) || !size_add(at, bytes, &end))
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: can't write tensor '%s': it isn't row-major, or too large", path,
			                items[i].name);
		if (cJSON_GetObjectItemCaseSensitive(header, items[i].name) != NULL)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: tensor '%s' is given twice", path, items[i].name);
		if (!cJSON_AddItemToObject(header, items[i].name, make_entry(tensor, at, end)))
			return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", path);
		pieces[i] = (struct iovec){bytes == 0 ? NULL : opd_tensor_data(tensor), (size_t)bytes};
		at = end;
	}
	return OPD_OK;
}

/* Length, JSON, and spaces so that the data starts at a multiple of 8. */
static opd_status write_file(const char *path, const cJSON *header, struct iovec *pieces, size_t count, opd_error *error)
{
	char *text = cJSON_PrintUnformatted(header);
	if (text == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", path);
	const size_t bytes = strlen(text), padding = (8 - bytes % 8) % 8;
	unsigned char length[8];
	for (unsigned i = 0; i < 8; i++)
		length[i] = (unsigned char)((uint64_t)(bytes + padding) >> (8 * i));
	char spaces[8];
	memset(spaces, ' ', sizeof spaces);
	pieces[0] = (struct iovec){length, sizeof length};
	pieces[1] = (struct iovec){text, bytes};
	pieces[2] = (struct iovec){spaces, padding};
	const opd_status status = file_write_atomic(path, pieces, count, error);
	cJSON_free(text);
	return status;
}

opd_status safetensors_write(const char *path, const struct safetensors_item *items, size_t count,
                             const struct safetensors_text *texts, size_t text_count, opd_error *error)
{
	cJSON *header = cJSON_CreateObject();
	struct iovec *pieces = calloc(count + 3, sizeof *pieces);
	opd_status status;
	if (header == NULL || pieces == NULL || !add_metadata(header, texts, text_count))
		status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", path);
	else
		status = add_items(path, items, count, header, pieces + 3, error);
	if (status == OPD_OK)
		status = write_file(path, header, pieces, count + 3, error);
	free(pieces);
	cJSON_Delete(header);
	return status;
}
