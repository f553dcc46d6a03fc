#include <stdlib.h>
#include <string.h>

#include "client/examples/demo.h"
#include "client/safetensors.h"

#define TEXT_BYTES_MAX 4096
#define TOKENS_OF_A_BYTE 256

static opd_status read_named(const struct safetensors *file, const char *path, const char *name, uint32_t rank,
                             struct file_tensor *out, opd_error *error)
{
	const struct safetensors_entry *entry = safetensors_find(file, name);
	if (entry == NULL)
		return opd_fail(error, OPD_NOT_FOUND, "%s: has no tensor %s", path, name);
	if (entry->rank != rank || (entry->dtype != OPD_bf16 && entry->dtype != OPD_f32))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s is %s of rank %u, expected bf16 or f32 of rank %u", path, name,
		                entry->dtype_name, entry->rank, rank);
	return safetensors_read(file, entry, out, error);
}

/* The three fit together, and a row of the table exists for every byte. */
static opd_status check_shapes(const struct demo_model *model, const char *path, opd_error *error)
{
	const int64_t width = model->table.shape[1];
	if (model->table.shape[0] < TOKENS_OF_A_BYTE || width < 2)
		return opd_fail(error, OPD_INVALID_ARGUMENT,
		                "%s: the embedding table has shape [%lld, %lld], expected [256 or more, 2 or more]", path,
		                (long long)model->table.shape[0], (long long)width);
	if (model->norm.shape[0] != width || model->query.shape[1] != width)
		return opd_fail(error, OPD_INVALID_ARGUMENT,
		                "%s: norm [%lld] and projection [%lld, %lld], expected the table's width %lld", path,
		                (long long)model->norm.shape[0], (long long)model->query.shape[0], (long long)model->query.shape[1],
		                (long long)width);
	if (model->norm.dtype != model->table.dtype || model->query.dtype != model->table.dtype)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: table %s, norm %s, projection %s, expected one dtype", path,
		                opd_dtype_name(model->table.dtype), opd_dtype_name(model->norm.dtype),
		                opd_dtype_name(model->query.dtype));
	return OPD_OK;
}

static opd_status read_tensors(struct demo_model *model, const char *path, opd_error *error)
{
	struct safetensors *file;
	opd_status status = safetensors_open(path, &file, error);
	if (status != OPD_OK)
		return status;
	status = read_named(file, path, "model.embed_tokens.weight", 2, &model->table, error);
	if (status == OPD_OK)
		status = read_named(file, path, "model.layers.0.input_layernorm.weight", 1, &model->norm, error);
	if (status == OPD_OK)
		status = read_named(file, path, "model.layers.0.self_attn.q_proj.weight", 2, &model->query, error);
	if (status == OPD_OK)
		status = check_shapes(model, path, error);
	safetensors_close(file);
	return status;
}

static opd_status read_ids(struct demo_model *model, const char *text, opd_error *error)
{
	const size_t bytes = strlen(text);
	if (bytes == 0 || bytes > TEXT_BYTES_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "the text has %zu bytes, expected 1 to %d", bytes, TEXT_BYTES_MAX);
	model->ids = malloc(bytes * sizeof *model->ids);
	if (model->ids == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	for (size_t i = 0; i < bytes; i++)
		model->ids[i] = (unsigned char)text[i];
	model->tokens = (int64_t)bytes;
	return OPD_OK;
}

opd_status demo_model_load(struct demo_model *model, const char *path, const char *text, opd_error *error)
{
	*model = (struct demo_model){0};
	const opd_status status = read_tensors(model, path, error);
	return status == OPD_OK ? read_ids(model, text, error) : status;
}

void demo_model_fini(struct demo_model *model)
{
	file_tensor_fini(&model->table);
	file_tensor_fini(&model->norm);
	file_tensor_fini(&model->query);
	free(model->ids);
	model->ids = NULL;
}
