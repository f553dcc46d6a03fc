#include "client/opctl/call.h"

#include <stdlib.h>
#include <string.h>

#include "client/opctl/options.h"
#include "client/opctl/tensor_spec.h"
#include "proto/tensor.h"
#include "proto/text.h"

opd_status call_init_schema(struct call *call, const char *op, const struct schema *schema, opd_error *error)
{
	memset(call, 0, sizeof *call);
	call->op = op;
	if (schema != NULL)
		call->schema = *schema;
	call->request = opd_request_create(op);
	return call->request != NULL ? OPD_OK : opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
}

opd_status call_init(struct call *call, opd_client *client, const char *op, opd_error *error)
{
	struct schema *schema = malloc(sizeof *schema);
	const opd_op_description *description;
	if (schema == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	opd_status status = opd_describe(client, op, &description, error);
	if (status == OPD_OK) {
		status = schema_parse(description->schema, schema, error);
		opd_document_free(description);
	}
	if (status == OPD_OK)
		status = call_init_schema(call, op, schema, error);
	free(schema);
	return status;
}

void call_fini(struct call *call)
{
	opd_request_destroy(call->request);
	for (size_t i = 0; i < call->tensor_count; i++)
		file_tensor_fini(&call->tensors[i]);
	free(call->tensors);
	for (size_t i = 0; i < call->memory_count; i++)
		opd_memory_destroy(call->memories[i]);
	free(call->memories);
	memset(call, 0, sizeof *call);
}

/* ---- Tensors ---- */

static struct file_tensor *grow(struct call *call, size_t more)
{
	struct file_tensor *tensors = reallocarray(call->tensors, call->tensor_count + more, sizeof *tensors);
	if (tensors == NULL)
		return NULL;
	call->tensors = tensors;
	return tensors + call->tensor_count;
}

static opd_operand operand_of(const struct call *call, const struct file_tensor *tensor)
{
	opd_operand operand = {.struct_bytes = sizeof operand, .dtype = tensor->dtype, .rank = tensor->rank, .shape = tensor->shape};
	int64_t row_major[OPD_RANK_MAX];
	tensor_row_major(tensor->rank, tensor->shape, row_major);
	if (memcmp(row_major, tensor->strides, tensor->rank * sizeof row_major[0]) != 0)
		operand.strides = tensor->strides;
	operand.source = call->bare ? OPD_FROM_NOTHING : OPD_FROM_HOST;
	operand.data = call->bare ? NULL : tensor->data;
	operand.data_bytes = call->bare ? 0 : tensor->bytes;
	return operand;
}

/* The operand's bytes move to memory of their own that the daemon maps. */
static opd_status share(struct call *call, opd_operand *operand, opd_error *error)
{
	opd_memory *memory;
	if (call->shares == NULL || call->bare || operand->data_bytes == 0)
		return OPD_OK;
	opd_memory **grown = realloc(call->memories, (call->memory_count + 1) * sizeof *grown);
	if (grown == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	call->memories = grown;
	opd_status status = opd_memory_create(call->shares, operand->data_bytes, &memory, error);
	if (status != OPD_OK)
		return status;
	call->memories[call->memory_count++] = memory;
	memcpy(opd_memory_data(memory), operand->data, operand->data_bytes);
	operand->source = OPD_FROM_MEMORY;
	operand->memory = memory;
	operand->data = opd_memory_data(memory);
	return OPD_OK;
}

/* Room for the results, whose shapes a fake run tells. */
opd_status call_share_results(struct call *call, opd_error *error)
{
	opd_result *result;
	opd_memory **grown = realloc(call->memories, (call->memory_count + 1) * sizeof *grown);
	if (grown == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	call->memories = grown;
	opd_request_mode(call->request, OPD_MODE_FAKE);
	opd_status status = opd_run(call->shares, call->request, &result, error);
	opd_request_mode(call->request, OPD_MODE_RUN);
	uint64_t room = 0;
	for (uint32_t i = 0; status == OPD_OK && i < opd_result_count(result); i++) {
		const opd_tensor *tensor = opd_result_tensor(result, i);
		room += (tensor->elements * opd_dtype_bytes(tensor->dtype) + 63) / 64 * 64;
	}
	opd_memory *memory = NULL;
	if (status == OPD_OK && room != 0)
		status = opd_memory_create(call->shares, room, &memory, error);
	if (memory != NULL)
		call->memories[call->memory_count++] = memory;
	uint64_t at = 0;
	for (uint32_t i = 0; memory != NULL && i < opd_result_count(result); i++) {
		const opd_tensor *tensor = opd_result_tensor(result, i);
		const uint64_t bytes = tensor->elements * opd_dtype_bytes(tensor->dtype);
		if (bytes != 0)
			opd_request_output_memory(call->request, i, memory, (char *)opd_memory_data(memory) + at, bytes);
		at += (bytes + 63) / 64 * 64;
	}
	opd_result_destroy(result);
	return status;
}

opd_status call_add_tensor(struct call *call, const char *name, struct file_tensor *tensor, opd_error *error)
{
	struct file_tensor *place = grow(call, 1);
	if (place == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	*place = *tensor;
	memset(tensor, 0, sizeof *tensor);
	call->tensor_count++;
	opd_operand operand = operand_of(call, place);
	const opd_status status = share(call, &operand, error);
	if (status == OPD_OK)
		opd_request_tensor(call->request, name, &operand);
	return status;
}

static opd_status read_spec(struct call *call, const char *what, const char *text, struct file_tensor *tensor, opd_error *error)
{
	const opd_status status = tensor_spec_read(what, text, &call->seed, tensor, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "%s", call->op);
	if (tensor->data == NULL && !call->bare)
		return opd_fail(
		    error, OPD_INVALID_ARGUMENT,
		    "%s: %s is %s without values, which only fake and explain take (zeros:, ones:, arange:, randn: make some)", call->op,
		    what, text);
	return OPD_OK;
}

static opd_status add_tensor_text(struct call *call, const char *name, const char *what, const char *text, opd_error *error)
{
	struct file_tensor tensor = {0};
	opd_status status = read_spec(call, what, text, &tensor, error);
	if (status == OPD_OK)
		status = call_add_tensor(call, name, &tensor, error);
	file_tensor_fini(&tensor);
	return status;
}

/* "[SPEC;SPEC]" */
static opd_status add_tensors_text(struct call *call, const char *name, const char *what, const char *text, opd_error *error)
{
	const size_t bytes = strlen(text);
	if (bytes < 2 || text[0] != '[' || text[bytes - 1] != ']')
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s is '%.80s', expected tensors as [SPEC;SPEC]", call->op, what, text);
	char *copy = strndup(text + 1, bytes - 2);
	opd_operand *operands = calloc(bytes, sizeof *operands);
	opd_status status = copy == NULL || operands == NULL ? opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory") : OPD_OK;
	char *rest = bytes == 2 ? NULL : copy;
	const size_t first = call->tensor_count;
	for (char *word; status == OPD_OK && (word = strsep(&rest, ";")) != NULL;) {
		struct file_tensor *place = grow(call, 1);
		if (place == NULL) {
			status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
			break;
		}
		memset(place, 0, sizeof *place);
		call->tensor_count++;
		status = read_spec(call, what, word, place, error);
	}
	/* Only now: growing moves the tensors that operands point to. */
	const size_t count = call->tensor_count - first;
	for (size_t i = 0; i < count && status == OPD_OK; i++) {
		operands[i] = operand_of(call, &call->tensors[first + i]);
		status = share(call, &operands[i], error);
	}
	if (status == OPD_OK)
		opd_request_tensors(call->request, name, operands, count);
	free(operands);
	free(copy);
	return status;
}

/* ---- Numbers and words ---- */

static opd_status add_ints(struct call *call, const char *name, const char *what, const char *text, opd_error *error)
{
	const size_t bytes = strlen(text);
	const bool bracketed = bytes >= 2 && text[0] == '[' && text[bytes - 1] == ']';
	char *copy = bracketed ? strndup(text + 1, bytes - 2) : strdup(text);
	int64_t *values = calloc(bytes + 1, sizeof *values);
	opd_status status = copy == NULL || values == NULL ? opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory") : OPD_OK;
	size_t count = 0;
	char *rest = copy != NULL && copy[0] != '\0' ? copy : NULL;
	for (char *word; status == OPD_OK && (word = strsep(&rest, ",")) != NULL;)
		status = parse_int(what, word + strspn(word, " "), INT64_MIN, INT64_MAX, &values[count++], error);
	if (status == OPD_OK)
		opd_request_ints(call->request, name, values, count);
	else
		(void)opd_error_prefix(error, status, "%s", call->op);
	free(values);
	free(copy);
	return status;
}

static opd_status add_int(struct call *call, const char *name, const char *what, const char *text, opd_error *error)
{
	int64_t value;
	const opd_status status = parse_int(what, text, INT64_MIN, INT64_MAX, &value, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "%s", call->op);
	opd_request_int(call->request, name, value);
	return OPD_OK;
}

static opd_status add_float(struct call *call, const char *name, const char *what, const char *text, opd_error *error)
{
	double value;
	const opd_status status = parse_float(what, text, &value, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "%s", call->op);
	opd_request_float(call->request, name, value);
	return OPD_OK;
}

static int parse_bool(const char *text)
{
	return strcmp(text, "true") == 0 || strcmp(text, "True") == 0     ? 1
	       : strcmp(text, "false") == 0 || strcmp(text, "False") == 0 ? 0
	                                                                  : -1;
}

static opd_status add_bool(struct call *call, const char *name, const char *what, const char *text, opd_error *error)
{
	const int value = parse_bool(text);
	if (value < 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %s is '%.80s', expected true or false", call->op, what, text);
	opd_request_bool(call->request, name, value == 1);
	return OPD_OK;
}

static bool is_none(const char *text)
{
	return strcmp(text, "none") == 0 || strcmp(text, "None") == 0;
}

/* What a value looks like when no schema says. */
static param_type guess_type(const char *text)
{
	int64_t i;
	double f;
	if (tensor_spec_looks_like(text))
		return PARAM_TENSOR;
	if (parse_bool(text) >= 0)
		return PARAM_BOOL;
	if (parse_int("", text, INT64_MIN, INT64_MAX, &i, NULL) == OPD_OK)
		return PARAM_INT;
	return parse_float("", text, &f, NULL) == OPD_OK ? PARAM_FLOAT : PARAM_STR;
}

static opd_status add_value(struct call *call, const char *name, const char *what, const struct schema_param *param,
                            const char *text, opd_error *error)
{
	param_type type = param == NULL ? PARAM_UNKNOWN : param->type;
	if (type != PARAM_STR && is_none(text)) {
		opd_request_none(call->request, name);
		return OPD_OK;
	}
	if (type == PARAM_UNKNOWN)
		type = guess_type(text);
	switch (type) {
	case PARAM_TENSOR:
		return add_tensor_text(call, name, what, text, error);
	case PARAM_TENSORS:
		return add_tensors_text(call, name, what, text, error);
	case PARAM_INT:
		return add_int(call, name, what, text, error);
	case PARAM_INTS:
		return add_ints(call, name, what, text, error);
	case PARAM_FLOAT:
		return add_float(call, name, what, text, error);
	case PARAM_BOOL:
		return add_bool(call, name, what, text, error);
	case PARAM_STR:
	case PARAM_UNKNOWN:
		break;
	}
	opd_request_str(call->request, name, text);
	return OPD_OK;
}

static opd_status add_positional(struct call *call, const char *text, opd_error *error)
{
	const struct schema_param *param = call->positional < call->schema.count ? &call->schema.params[call->positional] : NULL;
	char what[32];
	if (call->named > 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: '%.80s' has no name and comes after values with one", call->op, text);
	(void)snprintf(what, sizeof what, "argument %zu", ++call->positional);
	return add_value(call, NULL, param == NULL ? what : param->name, param, text, error);
}

opd_status call_add_text(struct call *call, const char *text, opd_error *error)
{
	/* i64[3]=0,1,2 has an '=' too, but no name before it. */
	const char *equals = strchr(text, '=');
	if (equals == NULL || !text_is_name(text, (size_t)(equals - text)))
		return add_positional(call, text, error);
	call->named++;
	char *name = strndup(text, (size_t)(equals - text));
	if (name == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	const opd_status status = add_value(call, name, name, schema_find(&call->schema, name, strlen(name)), equals + 1, error);
	free(name);
	return status;
}

/* ---- A case's attrs ---- */

static bool json_int(const cJSON *value, int64_t *int_out)
{
	if (!cJSON_IsNumber(value) || !(value->valuedouble >= -9007199254740992.0 && value->valuedouble <= 9007199254740992.0))
		return false;
	*int_out = (int64_t)value->valuedouble;
	return (double)*int_out == value->valuedouble;
}

static opd_status add_json_ints(struct call *call, const char *name, const cJSON *value, opd_error *error)
{
	int64_t *ints = calloc((size_t)cJSON_GetArraySize(value) + 1, sizeof *ints);
	if (ints == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	opd_status status = OPD_OK;
	size_t count = 0;
	const cJSON *item;
	cJSON_ArrayForEach(item, value)
	{
		if (!json_int(item, &ints[count++]))
			status = opd_fail(error, OPD_INVALID_ARGUMENT, "%s: attrs: %s has an item that is no whole number up to 2^53",
			                  call->op, name);
	}
	if (status == OPD_OK)
		opd_request_ints(call->request, name, ints, count);
	free(ints);
	return status;
}

opd_status call_add_json(struct call *call, const char *name, const cJSON *value, opd_error *error)
{
	const struct schema_param *param = schema_find(&call->schema, name, strlen(name));
	int64_t i;
	if (cJSON_IsNull(value))
		opd_request_none(call->request, name);
	else if (cJSON_IsBool(value))
		opd_request_bool(call->request, name, cJSON_IsTrue(value));
	else if (cJSON_IsString(value) && param != NULL && param->type == PARAM_FLOAT)
		return add_float(call, name, name, value->valuestring, error); /* "nan", "inf": JSON has no number for them */
	else if (cJSON_IsString(value))
		opd_request_str(call->request, name, value->valuestring);
	else if (cJSON_IsArray(value))
		return add_json_ints(call, name, value, error);
	else if (cJSON_IsNumber(value) && (param == NULL || param->type != PARAM_FLOAT) && json_int(value, &i))
		opd_request_int(call->request, name, i);
	else if (cJSON_IsNumber(value))
		opd_request_float(call->request, name, value->valuedouble);
	else
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: attrs: %s is neither a number, text, bool, list nor null", call->op,
		                name);
	return OPD_OK;
}
