/* put, get, rm, publish, tensors: what is published in the daemon. */
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "client/npy.h"
#include "client/opctl/print.h"
#include "client/safetensors.h"
#include "proto/bounds.h"

#define SHM_HELP "bytes go through memory shared with the daemon, not over the socket (Unix sockets)"

const struct option_use put_options[] = {{OPTION_AS, "what it is published as"}, {OPTION_ALL, "for every tenant, not yours alone"}, {OPTION_DEVICE, "where it is to live: cuda, cuda:1"}, {OPTION_SHM, SHM_HELP}, {OPTION_END, NULL}};
const struct option_use get_options[] = {{OPTION_OUTPUT, "the file to write: .npy or .safetensors"}, {OPTION_SHM, SHM_HELP}, {OPTION_END, NULL}};
const struct option_use publish_options[] = {{OPTION_AS, "the other name"}, {OPTION_ALL, "for every tenant, not yours alone"}, {OPTION_END, NULL}};

static int usage(struct opctl *ctl, const char *expected)
{
	opd_error error;
	(void)opd_fail(&error, OPD_INVALID_ARGUMENT, "expected %s", expected);
	return report_usage(ctl, &error);
}

static bool ends_in(const char *text, const char *end)
{
	const size_t bytes = strlen(text), wanted = strlen(end);
	return bytes > wanted && strcmp(text + bytes - wanted, end) == 0;
}

/* ---- put ---- */

struct put {
	struct opctl *ctl;
	const char *name; /* of the one under way */
	cJSON *list;      /* of --json */
	uint64_t count;
	uint64_t bytes;
};

static void show_progress(void *data, uint64_t done, uint64_t total)
{
	const struct put *put = data;
	if (total >= (uint64_t)8 << 20)
		(void)fprintf(stderr, "\r%s: %" PRIu64 " of %" PRIu64 " MiB\033[K", shown(put->name), done >> 20, total >> 20);
}

static void hex(const uint8_t *sha256, char out[65])
{
	for (int i = 0; i < 32; i++)
		(void)snprintf(out + 2 * i, 3, "%02x", sha256[i]);
}

static void add_publication(cJSON *list, const opd_publication *publication)
{
	char sha256[65];
	hex(publication->sha256, sha256);
	cJSON *item = cJSON_CreateObject();
	cJSON_AddStringToObject(item, "name", publication->name);
	cJSON_AddStringToObject(item, "sha256", sha256);
	cJSON_AddStringToObject(item, "dtype", opd_dtype_name(publication->dtype));
	cJSON *shape = cJSON_AddArrayToObject(item, "shape");
	for (uint32_t i = 0; i < publication->rank; i++)
		cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)publication->shape[i]));
	cJSON_AddNumberToObject(item, "bytes", (double)publication->bytes);
	cJSON_AddBoolToObject(item, "all", publication->all);
	cJSON_AddBoolToObject(item, "lasting", publication->lasting);
	cJSON_AddStringToObject(item, "tenant", publication->tenant);
	cJSON_AddNumberToObject(item, "holders", publication->holders);
	cJSON_AddItemToArray(list, item);
}

static void shape_text(const opd_publication *publication, char *out, size_t bytes)
{
	size_t used = (size_t)snprintf(out, bytes, "%s[", opd_dtype_name(publication->dtype));
	for (uint32_t i = 0; i < publication->rank && used < bytes; i++)
		used += (size_t)snprintf(out + used, bytes - used, i == 0 ? "%" PRId64 : ",%" PRId64, publication->shape[i]);
	if (used < bytes)
		(void)snprintf(out + used, bytes - used, "]");
}

static void print_publication(const opd_publication *publication)
{
	char sha256[65], shape[160];
	hex(publication->sha256, sha256);
	shape_text(publication, shape, sizeof shape);
	(void)printf("%-40s %-24s %12" PRIu64 "  %s %s %" PRIu32 " held  %s  ", shown(publication->name), shape, publication->bytes,
	             publication->all ? "all    " : "tenant ", publication->lasting ? "lasting" : "session", publication->holders, sha256);
	(void)puts(shown(publication->tenant));
}

/* With --shm the operand's bytes move to memory of their own that the daemon maps; memory_out is NULL where they don't. */
static opd_status share(const struct opctl *ctl, opd_operand *operand, uint64_t bytes, opd_memory **memory_out, opd_error *error)
{
	*memory_out = NULL;
	if (!options_has(&ctl->options, OPTION_SHM) || bytes == 0)
		return OPD_OK;
	const opd_status status = opd_memory_create(ctl->client, bytes, memory_out, error);
	if (status != OPD_OK)
		return status;
	memcpy(opd_memory_data(*memory_out), operand->data, bytes);
	operand->source = OPD_FROM_MEMORY;
	operand->memory = *memory_out;
	operand->data = opd_memory_data(*memory_out);
	return OPD_OK;
}

static opd_status upload(const struct put *put, const struct file_tensor *tensor, opd_handle *handle_out, opd_error *error)
{
	opd_operand operand = {.struct_bytes = sizeof operand, .dtype = tensor->dtype, .rank = tensor->rank, .shape = tensor->shape, .data = tensor->data};
	const struct options *options = &put->ctl->options;
	const opd_upload_options watched = {.struct_bytes = sizeof watched,
	                                    .on_progress = isatty(STDERR_FILENO) ? show_progress : NULL,
	                                    .progress_data = (void *)(uintptr_t)put,
	                                    .device = options_has(options, OPTION_DEVICE) ? options->values[OPTION_DEVICE] : NULL};
	opd_memory *memory;
	opd_status status = share(put->ctl, &operand, tensor->bytes, &memory, error);
	if (status == OPD_OK)
		status = opd_upload(put->ctl->client, &operand, &watched, handle_out, error);
	opd_memory_destroy(memory);
	if (isatty(STDERR_FILENO))
		(void)fputs("\r\033[K", stderr);
	return status;
}

static opd_status put_one(struct put *put, const char *name, const struct file_tensor *tensor, opd_error *error)
{
	const opd_publish_options lasting = {.struct_bytes = sizeof lasting, .all = options_has(&put->ctl->options, OPTION_ALL), .lasting = true};
	const opd_publication *publication;
	opd_handle handle;
	put->name = name;
	opd_status status = upload(put, tensor, &handle, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "%s", name);
	status = opd_publish(put->ctl->client, handle, name, &lasting, &publication, error);
	if (status == OPD_OK) {
		if (put->list != NULL)
			add_publication(put->list, publication);
		else
			print_publication(publication);
		opd_document_free(publication);
		put->count++;
		put->bytes += tensor->bytes;
	}
	const opd_status freed = opd_free(put->ctl->client, &handle, 1, status == OPD_OK ? error : NULL);
	return status == OPD_OK ? freed : status;
}

static opd_status row_major(const struct file_tensor *tensor, const char *path, opd_error *error)
{
	int64_t stride = 1;
	for (uint32_t i = tensor->rank; i-- > 0; stride *= tensor->shape[i])
		if (tensor->strides[i] != stride && tensor->shape[i] > 1)
			return opd_fail(error, OPD_UNIMPLEMENTED, "%s: an array in Fortran order, expected C order", path);
	return OPD_OK;
}

static opd_status put_npy(struct put *put, const char *path, const char *name, opd_error *error)
{
	struct file_tensor tensor;
	opd_status status = npy_read(path, OPD_DTYPE_NONE, &tensor, error);
	if (status != OPD_OK)
		return status;
	status = row_major(&tensor, path, error);
	if (status == OPD_OK)
		status = put_one(put, name, &tensor, error);
	file_tensor_fini(&tensor);
	return status;
}

static opd_status put_entry(struct put *put, const struct safetensors *file, const struct safetensors_entry *entry, const char *name, opd_error *error)
{
	char full[BOUND_NAME_BYTES + 1];
	if (snprintf(full, sizeof full, "%s/%s", name, entry->name) >= (int)sizeof full)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s/%s: a name of more than %u bytes", name, entry->name, BOUND_NAME_BYTES);
	struct file_tensor tensor;
	opd_status status = safetensors_read(file, entry, &tensor, error);
	if (status != OPD_OK)
		return status;
	status = put_one(put, full, &tensor, error);
	file_tensor_fini(&tensor);
	return status;
}

static opd_status put_safetensors(struct put *put, const char *path, const char *name, opd_error *error)
{
	struct safetensors *file;
	opd_status status = safetensors_open(path, &file, error);
	if (status != OPD_OK)
		return status;
	for (size_t i = 0; i < safetensors_count(file) && status == OPD_OK; i++)
		status = put_entry(put, file, safetensors_at(file, i), name, error);
	safetensors_close(file);
	return status;
}

int cmd_put(struct opctl *ctl)
{
	opd_error error;
	const char *name = ctl->options.values[OPTION_AS];
	if (ctl->options.count != 2 || name == NULL)
		return usage(ctl, "put FILE --as NAME");
	const char *path = ctl->options.positional[1];
	const bool npy = ends_in(path, ".npy");
	if (!npy && !ends_in(path, ".safetensors"))
		return usage(ctl, "a file that ends in .npy or .safetensors");
	struct put put = {.ctl = ctl};
	opd_status status = opctl_connect(ctl, CONNECT_DAEMON, &error);
	if (ctl->json)
		put.list = cJSON_CreateArray();
	if (status == OPD_OK)
		status = npy ? put_npy(&put, path, name, &error) : put_safetensors(&put, path, name, &error);
	if (status != OPD_OK) {
		cJSON_Delete(put.list);
		return report_failure(ctl, status, &error);
	}
	return ctl->json ? print_json(put.list) : EXIT_DONE;
}

/* ---- get ---- */

static opd_status write_tensor(const char *path, const char *name, const opd_tensor *tensor, opd_error *error)
{
	const struct safetensors_item item = {name, tensor};
	return ends_in(path, ".npy") ? npy_write(path, tensor, error) : safetensors_write(path, &item, 1, NULL, 0, error);
}

/* With --shm it comes to memory that must live as long as the result. */
static opd_status fetch(const struct opctl *ctl, const opd_publication *publication, opd_memory **memory_out, opd_result **result_out, opd_error *error)
{
	const opd_operand operand = {.struct_bytes = sizeof operand, .source = OPD_FROM_HANDLE, .handle = publication->handle};
	*memory_out = NULL;
	if (!options_has(&ctl->options, OPTION_SHM) || publication->bytes == 0)
		return opd_fetch(ctl->client, &operand, result_out, error);
	opd_status status = opd_memory_create(ctl->client, publication->bytes, memory_out, error);
	if (status != OPD_OK)
		return status;
	opd_request *request = opd_fetch_create(&operand);
	if (request == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	opd_request_output_memory(request, 0, *memory_out, opd_memory_data(*memory_out), publication->bytes);
	status = opd_run(ctl->client, request, result_out, error);
	opd_request_destroy(request);
	return status;
}

static opd_status get(struct opctl *ctl, const char *name, const char *path, opd_error *error)
{
	const opd_publication *publication;
	opd_result *result = NULL;
	opd_memory *memory;
	opd_status status = opd_open(ctl->client, name, &publication, error);
	if (status != OPD_OK)
		return status;
	status = fetch(ctl, publication, &memory, &result, error);
	if (status == OPD_OK)
		status = write_tensor(path, name, opd_result_tensor(result, 0), error);
	opd_result_destroy(result);
	opd_memory_destroy(memory);
	opd_document_free(publication);
	return status;
}

static int done(const struct opctl *ctl, opd_status status, const opd_error *error)
{
	if (status != OPD_OK)
		return report_failure(ctl, status, error);
	if (!ctl->json)
		return EXIT_DONE;
	cJSON *document = cJSON_CreateObject();
	cJSON_AddBoolToObject(document, "done", true);
	return print_json(document);
}

int cmd_get(struct opctl *ctl)
{
	opd_error error;
	const char *path = ctl->options.values[OPTION_OUTPUT];
	if (ctl->options.count != 2 || path == NULL || (!ends_in(path, ".npy") && !ends_in(path, ".safetensors")))
		return usage(ctl, "get NAME --output FILE, which ends in .npy or .safetensors");
	opd_status status = opctl_connect(ctl, CONNECT_DAEMON, &error);
	if (status == OPD_OK)
		status = get(ctl, ctl->options.positional[1], path, &error);
	return done(ctl, status, &error);
}

/* ---- rm, publish ---- */

static opd_status withdraw_under(struct opctl *ctl, const char *prefix, opd_error *error)
{
	const opd_publication_list *list;
	opd_status status = opd_publications(ctl->client, &list, error);
	if (status != OPD_OK)
		return status;
	uint32_t found = 0;
	for (uint32_t i = 0; i < list->count && status == OPD_OK; i++)
		if (strncmp(list->publications[i].name, prefix, strlen(prefix)) == 0) {
			status = opd_withdraw(ctl->client, list->publications[i].name, error);
			found++;
		}
	opd_document_free(list);
	return status == OPD_OK && found == 0 ? opd_fail(error, OPD_NOT_FOUND, "nothing is published under %s", shown(prefix)) : status;
}

int cmd_rm(struct opctl *ctl)
{
	opd_error error;
	if (ctl->options.count < 2)
		return usage(ctl, "rm NAME…");
	opd_status status = opctl_connect(ctl, CONNECT_DAEMON, &error);
	for (size_t i = 1; i < ctl->options.count && status == OPD_OK; i++)
		status = ends_in(ctl->options.positional[i], "/") ? withdraw_under(ctl, ctl->options.positional[i], &error)
		                                                  : opd_withdraw(ctl->client, ctl->options.positional[i], &error);
	return done(ctl, status, &error);
}

static opd_status publish_again(struct opctl *ctl, const char *from, const char *to, opd_error *error)
{
	const opd_publish_options lasting = {.struct_bytes = sizeof lasting, .all = options_has(&ctl->options, OPTION_ALL), .lasting = true};
	const opd_publication *publication, *other;
	opd_status status = opd_open(ctl->client, from, &publication, error);
	if (status != OPD_OK)
		return status;
	status = opd_publish(ctl->client, publication->handle, to, &lasting, &other, error);
	if (status == OPD_OK && !ctl->json)
		print_publication(other);
	if (status == OPD_OK)
		opd_document_free(other);
	opd_document_free(publication);
	return status;
}

int cmd_publish(struct opctl *ctl)
{
	opd_error error;
	const char *name = ctl->options.values[OPTION_AS];
	if (ctl->options.count != 2 || name == NULL)
		return usage(ctl, "publish NAME --as NAME");
	opd_status status = opctl_connect(ctl, CONNECT_DAEMON, &error);
	if (status == OPD_OK)
		status = publish_again(ctl, ctl->options.positional[1], name, &error);
	return done(ctl, status, &error);
}

/* ---- tensors ---- */

int cmd_tensors(struct opctl *ctl)
{
	opd_error error;
	const opd_publication_list *list;
	if (ctl->options.count != 1)
		return usage(ctl, "no argument");
	opd_status status = opctl_connect(ctl, CONNECT_DAEMON, &error);
	if (status == OPD_OK)
		status = opd_publications(ctl->client, &list, &error);
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	cJSON *document = ctl->json ? cJSON_CreateArray() : NULL;
	for (uint32_t i = 0; i < list->count; i++)
		if (ctl->json)
			add_publication(document, &list->publications[i]);
		else
			print_publication(&list->publications[i]);
	opd_document_free(list);
	return ctl->json ? print_json(document) : EXIT_DONE;
}
