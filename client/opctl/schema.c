#include "client/opctl/schema.h"

#include <string.h>

static const struct {
	const char *text;
	param_type type;
	bool optional;
} types[] = {
    {"Tensor", PARAM_TENSOR, false}, {"Tensor?", PARAM_TENSOR, true}, {"Tensor[]", PARAM_TENSORS, false},
    {"int", PARAM_INT, false},       {"int?", PARAM_INT, true},       {"int[]", PARAM_INTS, false},
    {"float", PARAM_FLOAT, false},   {"float?", PARAM_FLOAT, true},   {"bool", PARAM_BOOL, false},
    {"str", PARAM_STR, false},
};

static opd_status fail_schema(opd_error *error, const char *at)
{
	return opd_fail(error, OPD_INVALID_ARGUMENT, "can't read the op's schema from '%.40s' on", at);
}

static void read_type(const char *text, size_t bytes, struct schema_param *param)
{
	param->type = PARAM_UNKNOWN;
	for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
		if (strlen(types[i].text) == bytes && memcmp(types[i].text, text, bytes) == 0) {
			param->type = types[i].type;
			param->optional = types[i].optional;
		}
	}
}

/* The end of a parameter: the ',' or ')' that is neither in quotes nor in brackets; NULL: none. */
static const char *param_end(const char *at)
{
	char quote = '\0';
	unsigned depth = 0;
	for (; *at != '\0'; at++) {
		if (quote != '\0') {
			quote = *at == quote ? '\0' : quote;
		} else if (*at == '"' || *at == '\'') {
			quote = *at;
		} else if (*at == '[' || *at == '(') {
			depth++;
		} else if (depth > 0 && (*at == ']' || *at == ')')) {
			depth--;
		} else if (depth == 0 && (*at == ',' || *at == ')')) {
			return at;
		}
	}
	return NULL;
}

/* "Type name" or "Type name=default", up to `end`. */
static opd_status read_param(const char *at, const char *end, struct schema_param *param, opd_error *error)
{
	at += strspn(at, " ");
	const size_t type_bytes = strcspn(at, " ,)=");
	const char *name = at + type_bytes + strspn(at + type_bytes, " ");
	const size_t name_bytes = strcspn(name, " ,)=");
	if (type_bytes == 0 || name_bytes == 0 || name_bytes > BOUND_NAME_BYTES || name + name_bytes > end)
		return fail_schema(error, at);
	read_type(at, type_bytes, param);
	memcpy(param->name, name, name_bytes);
	param->name[name_bytes] = '\0';
	return OPD_OK;
}

/* "-> Tensor" is one, "-> (Tensor, Tensor)" two, "-> ()" none. */
static unsigned count_results(const char *at)
{
	const char *arrow = strstr(at, "->");
	if (arrow == NULL)
		return 0;
	unsigned count = 0;
	for (const char *word = arrow; (word = strstr(word, "Tensor")) != NULL && count < BOUND_OUTPUTS; word += strlen("Tensor"))
		count++;
	return count;
}

opd_status schema_parse(const char *text, struct schema *schema, opd_error *error)
{
	memset(schema, 0, sizeof *schema);
	const char *at = strchr(text, '(');
	if (at == NULL)
		return fail_schema(error, text);
	at++;
	at += strspn(at, " ");
	while (*at != ')') {
		const char *end = param_end(at);
		if (end == NULL || schema->count == BOUND_ARGS)
			return fail_schema(error, at);
		const opd_status status = read_param(at, end, &schema->params[schema->count], error);
		if (status != OPD_OK)
			return status;
		schema->count++;
		at = *end == ',' ? end + 1 : end;
	}
	schema->results = count_results(at);
	return OPD_OK;
}

const struct schema_param *schema_find(const struct schema *schema, const char *name, size_t name_bytes)
{
	for (size_t i = 0; i < schema->count; i++)
		if (strlen(schema->params[i].name) == name_bytes && memcmp(schema->params[i].name, name, name_bytes) == 0)
			return &schema->params[i];
	return NULL;
}
