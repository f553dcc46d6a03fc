/* From a folder of safetensors files to kept tensors of the daemon. */
#include <dirent.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/examples/llama/llama.h"
#include "client/safetensors.h"

#define FILES_MAX 64

struct files {
	uint32_t count;
	struct safetensors *files[FILES_MAX];
	uint64_t bytes; /* of all tensors */
	uint64_t done;
	bool quiet;
	const char *folder;
};

static void files_close(struct files *files)
{
	for (uint32_t i = 0; i < files->count; i++)
		safetensors_close(files->files[i]);
}

static opd_status files_add(struct files *files, const char *name, opd_error *error)
{
	char path[4096];
	if (files->count == FILES_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: more than %d files of weights", files->folder, FILES_MAX);
	if (snprintf(path, sizeof path, "%s/%s", files->folder, name) >= (int)sizeof path)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: the name of a file there is too long", files->folder);
	opd_status status = safetensors_open(path, &files->files[files->count], error);
	if (status != OPD_OK)
		return status;
	const struct safetensors *file = files->files[files->count++];
	for (size_t i = 0; i < safetensors_count(file); i++)
		files->bytes += safetensors_at(file, i)->bytes;
	return OPD_OK;
}

static opd_status files_open(struct files *files, opd_error *error)
{
	DIR *folder = opendir(files->folder);
	opd_status status = OPD_OK;
	if (folder == NULL)
		return opd_fail(error, OPD_NOT_FOUND, "%s: no folder that can be read", files->folder);
	for (const struct dirent *entry; status == OPD_OK && (entry = readdir(folder)) != NULL;) {
		const char *end = strrchr(entry->d_name, '.');
		if (end != NULL && strcmp(end, ".safetensors") == 0)
			status = files_add(files, entry->d_name, error);
	}
	(void)closedir(folder);
	if (status == OPD_OK && files->count == 0)
		status = opd_fail(error, OPD_NOT_FOUND, "%s: no .safetensors file", files->folder);
	return status;
}

static void show_progress(const struct files *files)
{
	if (!files->quiet)
		(void)fprintf(stderr, "\rweights: %llu of %llu MiB", (unsigned long long)(files->done >> 20), (unsigned long long)(files->bytes >> 20));
}

/* One of the tensors that make up a weight: [rows, columns], or [columns] with rows 0. */
struct piece {
	const char *name;
	int64_t rows;
};

static opd_status piece_read(struct files *files, const struct piece *piece, int64_t columns, struct file_tensor *out, opd_error *error)
{
	const struct safetensors_entry *entry = NULL;
	uint32_t file = 0;
	for (; file < files->count && entry == NULL; file++)
		entry = safetensors_find(files->files[file], piece->name);
	if (entry == NULL)
		return opd_fail(error, OPD_NOT_FOUND, "%s: no tensor %s", files->folder, piece->name);
	const bool shaped = piece->rows == 0 ? entry->rank == 1 && entry->shape[0] == columns
	                                     : entry->rank == 2 && entry->shape[0] == piece->rows && entry->shape[1] == columns;
	const bool usable = entry->dtype == OPD_f32 || entry->dtype == OPD_f16 || entry->dtype == OPD_bf16;
	if (!shaped || !usable)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s is %s%s[%lld, %lld], expected f32, f16 or bf16 [%lld, %lld]", files->folder, piece->name,
		                entry->dtype_name, entry->rank > 2 ? " of a higher rank " : "", (long long)(entry->rank > 0 ? entry->shape[0] : 0),
		                (long long)(entry->rank > 1 ? entry->shape[1] : 0), (long long)(piece->rows == 0 ? columns : piece->rows),
		                (long long)(piece->rows == 0 ? 0 : columns));
	return safetensors_read(files->files[file - 1], entry, out, error);
}

/* In the daemon, in another dtype; the first is freed. */
static opd_status cast(struct llama *llama, opd_handle *handle, opd_error *error)
{
	opd_request *request = opd_request_create("cast");
	if (request == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "weights: out of memory");
	const opd_operand operand = {.struct_bytes = sizeof operand, .source = OPD_FROM_HANDLE, .handle = *handle};
	opd_request_tensor(request, NULL, &operand);
	opd_request_str(request, NULL, opd_dtype_name(llama->dtype));
	opd_request_output(request, 0, true, false);
	opd_result *result;
	opd_status status = opd_run(llama->client, request, &result, error);
	if (status == OPD_OK)
		status = opd_free(llama->client, handle, 1, error);
	if (status == OPD_OK)
		*handle = opd_result_handle(result, 0);
	opd_result_destroy(result);
	opd_request_destroy(request);
	return status;
}

static opd_status send(struct llama *llama, const struct file_tensor *tensor, int64_t rows, int64_t columns, opd_handle *out, opd_error *error)
{
	const int64_t shape[] = {rows, columns};
	const opd_operand operand = {.struct_bytes = sizeof operand, .dtype = tensor->dtype, .rank = rows == 0 ? 1 : 2,
	                             .shape = rows == 0 ? shape + 1 : shape, .data = tensor->data};
	opd_status status = opd_upload(llama->client, &operand, NULL, out, error);
	return status == OPD_OK && tensor->dtype != llama->dtype ? cast(llama, out, error) : status;
}

/* A weight of one tensor, or of several of the same columns and dtype, one below the other. */
static opd_status upload(struct llama *llama, struct files *files, const struct piece *pieces, uint32_t count, int64_t columns, opd_handle *out,
                       opd_error *error)
{
	struct file_tensor all = {0};
	int64_t rows = 0;
	opd_status status = OPD_OK;
	for (uint32_t i = 0; i < count && status == OPD_OK; i++) {
		struct file_tensor part = {0};
		status = llama->random ? llama_random_piece(llama, pieces[i].name, pieces[i].rows, columns, &part, error)
		                       : piece_read(files, &pieces[i], columns, &part, error);
		if (status == OPD_OK && i > 0 && part.dtype != all.dtype)
			status = opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s is %s, but %s is %s", files->folder, pieces[i].name, opd_dtype_name(part.dtype),
			                  pieces[0].name, opd_dtype_name(all.dtype));
		void *grown = status == OPD_OK && i > 0 ? file_tensor_alloc(all.bytes + part.bytes) : NULL;
		if (grown != NULL) {
			memcpy(grown, all.data, all.bytes);
			memcpy((char *)grown + all.bytes, part.data, part.bytes);
			part.bytes += all.bytes;
			free(part.data);
			part.data = grown;
		} else if (status == OPD_OK && i > 0) {
			status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "weights: out of memory");
		}
		rows += pieces[i].rows;
		file_tensor_fini(&all);
		all = part;
	}
	if (status == OPD_OK)
		status = send(llama, &all, rows, columns, out, error);
	files->done += all.bytes;
	file_tensor_fini(&all);
	show_progress(files);
	return status;
}

/* What it is published as: the first tensor's name, which others are with it, and the dtype. */
static void shared_name(const struct llama *llama, const struct piece *pieces, uint32_t count, char *out, size_t bytes)
{
	static const char *const with[] = {"", "", ".gate_up", ".qkv"};
	char seed[24] = "";
	if (llama->random)
		(void)snprintf(seed, sizeof seed, ":%llu", (unsigned long long)llama->seed);
	(void)snprintf(out, bytes, "%s/%s%s:%s%s", llama->share, pieces[0].name, with[count], opd_dtype_name(llama->dtype), seed);
}

/* Opened where it is published already; else uploaded, and published until withdrawn. */
static opd_status load(struct llama *llama, struct files *files, const struct piece *pieces, uint32_t count, int64_t columns, opd_handle *out,
                       opd_error *error)
{
	char name[256];
	const opd_publication *publication;
	const opd_publish_options lasting = {.struct_bytes = sizeof lasting, .lasting = true};
	if (llama->share == NULL)
		return upload(llama, files, pieces, count, columns, out, error);
	shared_name(llama, pieces, count, name, sizeof name);
	opd_status status = opd_open(llama->client, name, &publication, error);
	if (status == OPD_NOT_FOUND) {
		status = upload(llama, files, pieces, count, columns, out, error);
		if (status == OPD_OK)
			status = opd_publish(llama->client, *out, name, &lasting, &publication, error);
	}
	if (status == OPD_OK) {
		*out = publication->handle;
		opd_document_free(publication);
	}
	return status;
}

/* One tensor; rows 0: a vector. */
static opd_status load_one(struct llama *llama, struct files *files, const char *name, int64_t rows, int64_t columns, opd_handle *out, opd_error *error)
{
	const struct piece piece = {name, rows};
	return load(llama, files, &piece, 1, columns, out, error);
}

#define NAME_BYTES 96

static const char *layer_name(char out[NAME_BYTES], int64_t layer, const char *name)
{
	(void)snprintf(out, NAME_BYTES, "model.layers.%lld.%s.weight", (long long)layer, name);
	return out;
}

static opd_status load_layer(struct llama *llama, struct files *files, int64_t index, opd_error *error)
{
	const struct llama_config *config = &llama->config;
	struct llama_layer *layer = &llama->layers[index];
	const int64_t query = config->heads * config->head_dim;
	const int64_t key = config->kv_heads * config->head_dim;
	char a[NAME_BYTES], b[NAME_BYTES], c[NAME_BYTES];
	opd_status status = load_one(llama, files, layer_name(a, index, "input_layernorm"), 0, config->hidden, &layer->input_norm, error);
	const struct piece qkv[] = {{layer_name(a, index, "self_attn.q_proj"), query},
	                            {layer_name(b, index, "self_attn.k_proj"), key},
	                            {layer_name(c, index, "self_attn.v_proj"), key}};
	if (status == OPD_OK)
		status = load(llama, files, qkv, 3, config->hidden, &layer->qkv, error);
	if (status == OPD_OK)
		status = load_one(llama, files, layer_name(a, index, "self_attn.o_proj"), config->hidden, query, &layer->output, error);
	if (status == OPD_OK)
		status = load_one(llama, files, layer_name(a, index, "post_attention_layernorm"), 0, config->hidden, &layer->mlp_norm, error);
	const struct piece gate_up[] = {{layer_name(a, index, "mlp.gate_proj"), config->intermediate},
	                                {layer_name(b, index, "mlp.up_proj"), config->intermediate}};
	if (status == OPD_OK)
		status = load(llama, files, gate_up, 2, config->hidden, &layer->gate_up, error);
	if (status == OPD_OK)
		status = load_one(llama, files, layer_name(a, index, "mlp.down_proj"), config->hidden, config->intermediate, &layer->down, error);
	return status;
}

/* A row a position: the cosines of its angles, then the sines. f32 whatever the model computes in, unless that is the table's too. */
static opd_status load_rope(struct llama *llama, opd_error *error)
{
	const struct llama_config *config = &llama->config;
	const int64_t half = config->head_dim / 2;
	float *table = malloc((size_t)(config->positions * config->head_dim) * sizeof *table);
	if (table == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "weights: out of memory for the table of %lld positions", (long long)config->positions);
	for (int64_t position = 0; position < config->positions; position++) {
		float *row = table + position * config->head_dim;
		for (int64_t i = 0; i < half; i++) {
			const double angle = (double)position * pow(config->theta, -2.0 * (double)i / (double)config->head_dim);
			row[i] = (float)cos(angle);
			row[half + i] = (float)sin(angle);
		}
	}
	const opd_operand operand = OPD_OPERAND(OPD_f32, table, config->positions, config->head_dim);
	opd_status status = opd_upload(llama->client, &operand, NULL, &llama->rope, error);
	if (status == OPD_OK && llama->dtype != OPD_f32)
		status = cast(llama, &llama->rope, error);
	free(table);
	return status;
}

static opd_status load_all(struct llama *llama, struct files *files, opd_error *error)
{
	const struct llama_config *config = &llama->config;
	opd_status status = load_one(llama, files, "model.embed_tokens.weight", config->vocabulary, config->hidden, &llama->table, error);
	for (int64_t i = 0; i < config->layers && status == OPD_OK; i++)
		status = load_layer(llama, files, i, error);
	if (status == OPD_OK)
		status = load_one(llama, files, "model.norm.weight", 0, config->hidden, &llama->norm, error);
	llama->head = llama->table;
	if (status == OPD_OK && !config->tied)
		status = load_one(llama, files, "lm_head.weight", config->vocabulary, config->hidden, &llama->head, error);
	return status == OPD_OK ? load_rope(llama, error) : status;
}

uint64_t llama_weight_bytes(const struct llama *llama)
{
	const struct llama_config *config = &llama->config;
	const uint64_t hidden = (uint64_t)config->hidden, query = (uint64_t)(config->heads * config->head_dim), key = (uint64_t)(config->kv_heads * config->head_dim);
	const uint64_t layer = hidden * (query + 2 * key) + hidden * query + 3 * hidden * (uint64_t)config->intermediate + 2 * hidden;
	return ((uint64_t)config->layers * layer + ((uint64_t)config->vocabulary + 2) * hidden) * opd_dtype_bytes(llama->dtype); /* the head, the last norm, a row of the table */
}

opd_status llama_load(struct llama *llama, const char *folder, bool quiet, opd_error *error)
{
	struct files files = {.folder = folder, .quiet = quiet};
	if (llama->random)
		files.bytes = llama_weight_bytes(llama);
	opd_status status = llama->random ? OPD_OK : files_open(&files, error);
	if (status == OPD_OK)
		status = load_all(llama, &files, error);
	if (!quiet)
		(void)fputs("\r\033[K", stderr);
	files_close(&files);
	return status;
}
