#include "client/opctl/graph_file.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/opctl/call.h"
#include "client/opctl/options.h"
#include "client/opctl/tensor_spec.h"

#define FILE_BYTES_MAX ((uint64_t)64 << 20)

/* Names a value: an input or a node of the file. */
struct names {
	size_t count;
	struct name {
		const char *text;
		opd_value value;
	} *items; /* sorted */
};

/* ---- Reading ---- */

static opd_status read_text(const char *path, char **text_out, opd_error *error)
{
	int fd;
	uint64_t bytes;
	opd_status status = file_open(path, &fd, &bytes, error);
	if (status != OPD_OK)
		return status;
	char *text = bytes > FILE_BYTES_MAX ? NULL : malloc((size_t)bytes + 1);
	if (text == NULL)
		status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: %llu bytes are too many for a graph's description", path, (unsigned long long)bytes);
	else
		status = file_read_at(fd, path, 0, text, bytes, error);
	(void)close(fd);
	if (status != OPD_OK) {
		free(text);
		return status;
	}
	text[bytes] = '\0';
	*text_out = text;
	return OPD_OK;
}

static const char *text_of(const cJSON *object, const char *key, const char *otherwise)
{
	const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
	return cJSON_IsString(item) ? item->valuestring : otherwise;
}

static opd_status check_member(const struct graph_file *file, const char *key, bool array, bool object, opd_error *error)
{
	const cJSON *item = cJSON_GetObjectItemCaseSensitive(file->document, key);
	if (item == NULL || (array && cJSON_IsArray(item)) || (object && cJSON_IsObject(item)))
		return OPD_OK;
	return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: \"%s\" is no %s", file->path, key, array && object ? "list and no object" : array ? "list" : "object");
}

static opd_status check_document(const struct graph_file *file, opd_error *error)
{
	opd_status status = cJSON_IsObject(file->document) ? OPD_OK : opd_fail(error, OPD_INVALID_ARGUMENT, "%s: not a JSON object", file->path);
	if (status == OPD_OK)
		status = check_member(file, "inputs", true, false, error);
	if (status == OPD_OK)
		status = check_member(file, "constants", false, true, error);
	if (status == OPD_OK)
		status = check_member(file, "states", false, true, error);
	if (status == OPD_OK)
		status = check_member(file, "nodes", true, false, error);
	return status == OPD_OK ? check_member(file, "outputs", true, true, error) : status;
}

static opd_status read_inputs(struct graph_file *file, opd_error *error)
{
	const cJSON *item;
	cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(file->document, "inputs"))
	{
		if (!cJSON_IsString(item) || strlen(item->valuestring) > BOUND_NAME_BYTES || file->inputs.count == BOUND_ARGS)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: inputs[%zu] is no name of at most %u bytes", file->path, file->inputs.count, BOUND_NAME_BYTES);
		struct schema_param *param = &file->inputs.params[file->inputs.count++];
		(void)snprintf(param->name, sizeof param->name, "%s", item->valuestring);
		param->type = PARAM_TENSOR;
	}
	return OPD_OK;
}

opd_status graph_file_open(struct graph_file *file, const char *path, opd_error *error)
{
	char *text = NULL;
	memset(file, 0, sizeof *file);
	file->path = path;
	opd_status status = read_text(path, &text, error);
	if (status != OPD_OK)
		return status;
	const char *end = text;
	file->document = cJSON_ParseWithOpts(text, &end, true);
	if (file->document == NULL)
		status = opd_fail(error, OPD_INVALID_ARGUMENT, "%s: not JSON, from byte %td on", path, end - text);
	free(text);
	if (status == OPD_OK)
		status = check_document(file, error);
	if (status == OPD_OK)
		status = read_inputs(file, error);
	if (status != OPD_OK)
		return status;
	file->name = text_of(file->document, "name", "graph");
	file->graph = opd_graph_create(file->name);
	return file->graph != NULL ? OPD_OK : opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
}

void graph_file_close(struct graph_file *file)
{
	opd_graph_destroy(file->graph);
	cJSON_Delete(file->document);
	memset(file, 0, sizeof *file);
}

/* ---- Names ---- */

static int by_text(const void *a, const void *b)
{
	return strcmp(((const struct name *)a)->text, ((const struct name *)b)->text);
}

static void names_add(struct names *names, const char *text, opd_value value)
{
	names->items[names->count++] = (struct name){text, value};
}

/* "$name" is output 0 of that node, or that input; "$name#2" its output 2. */
static opd_status names_find(const struct names *names, const char *text, opd_value *value_out, opd_error *error)
{
	char name[BOUND_NAME_BYTES + 16];
	const char *mark = strchr(text, '#');
	const size_t bytes = mark == NULL ? strlen(text + 1) : (size_t)(mark - text - 1);
	char *end = NULL;
	const unsigned long output = mark == NULL ? 0 : strtoul(mark + 1, &end, 10);
	if (bytes >= sizeof name || (mark != NULL && (end == mark + 1 || *end != '\0' || output >= BOUND_OUTPUTS)))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "'%.160s' names nothing: expected $NAME or $NAME#OUTPUT", text);
	(void)snprintf(name, sizeof name, "%.*s", (int)bytes, text + 1);
	const struct name key = {.text = name};
	const struct name *found = names->count == 0 ? NULL : bsearch(&key, names->items, names->count, sizeof key, by_text);
	if (found == NULL)
		return opd_fail(error, OPD_NOT_FOUND, "'%s' is neither an input nor a node of this file", name);
	*value_out = found->value;
	if (found->value.node != OPD_GRAPH_INPUT)
		value_out->output = (uint32_t)output;
	return OPD_OK;
}

/* ---- Inputs ---- */

/* Brings the tensor that a word describes to the daemon. */
static opd_status upload(struct graph_file *file, opd_client *client, const cJSON *item, opd_handle *handle_out, opd_error *error)
{
	struct file_tensor tensor = {0};
	if (!cJSON_IsString(item))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s is no text such as \"@file.npy\" or \"zeros:f32[2,4]\"", file->path, item->string);
	opd_status status = tensor_spec_read(item->string, item->valuestring, &file->seed, &tensor, error);
	if (status == OPD_OK && tensor.data == NULL)
		status = opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s has no values (zeros:, ones:, arange:, randn: make some)", file->path, item->string);
	if (status == OPD_OK) {
		const opd_operand operand = {.struct_bytes = sizeof operand, .dtype = tensor.dtype, .rank = tensor.rank, .shape = tensor.shape,
		                             .strides = tensor.strides, .data = tensor.data, .data_bytes = tensor.bytes};
		status = opd_upload(client, &operand, NULL, handle_out, error);
	}
	file_tensor_fini(&tensor);
	return status == OPD_OK ? OPD_OK : opd_error_prefix(error, status, "%s: %s", file->path, item->string);
}

static opd_status add_kept(struct graph_file *file, opd_client *client, struct names *names, const char *key, opd_error *error)
{
	const cJSON *item;
	cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(file->document, key))
	{
		opd_handle handle;
		const opd_status status = upload(file, client, item, &handle, error);
		if (status != OPD_OK)
			return status;
		names_add(names, item->string, key[0] == 's' ? opd_graph_state(file->graph, item->string, handle)
		                                             : opd_graph_constant(file->graph, item->string, handle));
	}
	return OPD_OK;
}

/* ---- Nodes ---- */

static size_t ints_of(const cJSON *list, int64_t out[OPD_RANK_MAX])
{
	size_t count = 0;
	const cJSON *item;
	cJSON_ArrayForEach(item, list)
	{
		if (count < OPD_RANK_MAX)
			out[count] = cJSON_IsNumber(item) ? (int64_t)item->valuedouble : -1;
		count++;
	}
	return count;
}

/* {"of": "$name", "donate": true} or {"of": "$name", "dtype": "f32", "shape": [2, 4], "strides": [1, 2], "offset": 16} */
static opd_status add_reference(const struct names *names, struct call *call, const char *param, const cJSON *value, opd_error *error)
{
	int64_t shape[OPD_RANK_MAX], strides[OPD_RANK_MAX];
	const cJSON *offset = cJSON_GetObjectItemCaseSensitive(value, "offset");
	const cJSON *given = cJSON_GetObjectItemCaseSensitive(value, "strides");
	opd_operand operand = {.struct_bytes = sizeof operand, .source = OPD_FROM_VALUE,
	                       .donate = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(value, "donate"))};
	const char *of = text_of(value, "of", ""), *dtype = text_of(value, "dtype", NULL);
	if (of[0] != '$')
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: expected {\"of\": \"$NAME\", …}", param);
	opd_status status = names_find(names, of, &operand.value, error);
	if (status == OPD_OK && dtype != NULL)
		status = parse_dtype(param, dtype, &operand.dtype, error);
	if (status != OPD_OK)
		return status;
	const size_t rank = ints_of(cJSON_GetObjectItemCaseSensitive(value, "shape"), shape);
	if (rank > OPD_RANK_MAX || (given != NULL && ints_of(given, strides) != rank) || (dtype == NULL) != (rank == 0 && offset == NULL))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: a view has dtype, shape of at most %d sizes, as many strides or none, and an offset in bytes", param,
		                OPD_RANK_MAX);
	operand.rank = (uint32_t)rank;
	operand.shape = shape;
	operand.strides = given == NULL ? NULL : strides;
	operand.byte_offset = cJSON_IsNumber(offset) ? (uint64_t)offset->valuedouble : 0;
	opd_request_tensor(call->request, param, &operand);
	return OPD_OK;
}

static opd_status add_list(const struct names *names, struct call *call, const char *param, const cJSON *value, opd_error *error)
{
	const int count = cJSON_GetArraySize(value);
	opd_operand *operands = calloc((size_t)count + 1, sizeof *operands);
	opd_status status = operands != NULL ? OPD_OK : opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	int i = 0;
	for (const cJSON *item = value->child; status == OPD_OK && item != NULL; item = item->next, i++) {
		operands[i] = (opd_operand){.struct_bytes = sizeof *operands, .source = OPD_FROM_VALUE};
		status = cJSON_IsString(item) && item->valuestring[0] == '$' ? names_find(names, item->valuestring, &operands[i].value, error)
		                                                             : opd_fail(error, OPD_INVALID_ARGUMENT, "%s[%d] is no \"$NAME\"", param, i);
	}
	if (status == OPD_OK)
		opd_request_tensors(call->request, param, operands, (size_t)count);
	free(operands);
	return status;
}

static opd_status add_argument(const struct names *names, struct call *call, const cJSON *value, opd_error *error)
{
	opd_value source;
	const cJSON *first = cJSON_IsArray(value) ? value->child : NULL;
	if (cJSON_IsObject(value))
		return add_reference(names, call, value->string, value, error);
	if (first != NULL && cJSON_IsString(first))
		return add_list(names, call, value->string, value, error);
	if (!cJSON_IsString(value) || value->valuestring[0] != '$')
		return call_add_json(call, value->string, value, error);
	const opd_status status = names_find(names, value->valuestring, &source, error);
	if (status == OPD_OK)
		opd_request_value(call->request, value->string, source);
	return status;
}

static opd_status add_priority(struct call *call, const cJSON *list, opd_error *error)
{
	const char *names[BOUND_PROVIDERS];
	size_t count = 0;
	const cJSON *item;
	if (list == NULL)
		return OPD_OK;
	cJSON_ArrayForEach(item, list)
	{
		if (!cJSON_IsString(item) || count == BOUND_PROVIDERS)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "priority[%zu] is no name, or more than %u are given", count, BOUND_PROVIDERS);
		names[count++] = item->valuestring;
	}
	opd_request_priority(call->request, names, count);
	return OPD_OK;
}

static opd_status add_node(struct graph_file *file, opd_client *client, const struct names *names, const cJSON *node, opd_error *error)
{
	struct call call;
	const char *name = text_of(node, "name", NULL);
	opd_status status = call_init(&call, client, text_of(node, "op", ""), error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "%s: node '%s'", file->path, name == NULL ? "" : name);
	const cJSON *args = cJSON_GetObjectItemCaseSensitive(node, "args");
	for (const cJSON *value = args == NULL ? NULL : args->child; status == OPD_OK && value != NULL; value = value->next)
		status = value->string == NULL ? opd_fail(error, OPD_INVALID_ARGUMENT, "args: expected an object, by the op's parameters")
		                               : add_argument(names, &call, value, error);
	if (status == OPD_OK)
		status = add_priority(&call, cJSON_GetObjectItemCaseSensitive(node, "priority"), error);
	if (status == OPD_OK) {
		opd_request_strict(call.request, cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(node, "strict")));
		opd_request_allow_tf32(call.request, cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(node, "allow_tf32")));
		if (text_of(node, "device", NULL) != NULL)
			opd_request_device(call.request, text_of(node, "device", NULL));
		(void)opd_graph_node(file->graph, name, call.request);
	}
	call_fini(&call);
	return status == OPD_OK ? OPD_OK : opd_error_prefix(error, status, "%s: node '%s'", file->path, name == NULL ? "" : name);
}

static opd_status add_outputs(struct graph_file *file, const struct names *names, opd_error *error)
{
	const cJSON *item;
	cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(file->document, "outputs"))
	{
		opd_value value;
		opd_status status = cJSON_IsString(item) && item->valuestring[0] == '$' ? names_find(names, item->valuestring, &value, error)
		                                                                        : opd_fail(error, OPD_INVALID_ARGUMENT, "no \"$NODE\"");
		if (status == OPD_OK && file->output_count == BOUND_OUTPUTS)
			status = opd_fail(error, OPD_INVALID_ARGUMENT, "more than %u", BOUND_OUTPUTS);
		if (status != OPD_OK)
			return opd_error_prefix(error, status, "%s: outputs[%zu]", file->path, file->output_count);
		opd_graph_output(file->graph, item->string, value);
		file->outputs[file->output_count++] = item->string != NULL ? item->string : item->valuestring + 1;
	}
	return OPD_OK;
}

static opd_status describe(struct graph_file *file, opd_client *client, struct names *names, opd_error *error)
{
	const cJSON *nodes = cJSON_GetObjectItemCaseSensitive(file->document, "nodes");
	for (size_t i = 0; i < file->inputs.count; i++)
		names_add(names, file->inputs.params[i].name, opd_graph_input(file->graph, file->inputs.params[i].name));
	opd_status status = add_kept(file, client, names, "constants", error);
	if (status == OPD_OK)
		status = add_kept(file, client, names, "states", error);
	const cJSON *node;
	uint32_t index = 0;
	cJSON_ArrayForEach(node, nodes)
	{
		if (text_of(node, "name", NULL) != NULL)
			names_add(names, text_of(node, "name", NULL), (opd_value){index, 0});
		index++;
	}
	qsort(names->items, names->count, sizeof names->items[0], by_text);
	for (size_t i = 1; status == OPD_OK && i < names->count; i++)
		if (strcmp(names->items[i - 1].text, names->items[i].text) == 0)
			status = opd_fail(error, OPD_INVALID_ARGUMENT, "%s: two inputs or nodes are called '%.128s'", file->path, names->items[i].text);
	for (node = nodes == NULL ? NULL : nodes->child; status == OPD_OK && node != NULL; node = node->next)
		status = add_node(file, client, names, node, error);
	return status == OPD_OK ? add_outputs(file, names, error) : status;
}

opd_status graph_file_register(struct graph_file *file, opd_client *client, opd_error *error)
{
	static const char *const keys[] = {"inputs", "constants", "states", "nodes"};
	size_t room = 1;
	for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
		room += (size_t)cJSON_GetArraySize(cJSON_GetObjectItemCaseSensitive(file->document, keys[i]));
	struct names names = {.items = calloc(room, sizeof names.items[0])};
	if (names.items == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	opd_status status = describe(file, client, &names, error);
	free(names.items);
	return status == OPD_OK ? opd_graph_register(client, file->graph, &file->id, error) : status;
}
