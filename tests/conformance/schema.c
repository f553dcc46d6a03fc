#include "tests/conformance/schema.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

static const char *skip_spaces(const char *at)
{
	while (*at == ' ')
		at++;
	return at;
}

/* The characters of a name or a number at `at`, copied; the position behind them, NULL when there are none or too many. */
static const char *read_word(const char *at, char *word_out, const char *more)
{
	size_t length = 0;
	at = skip_spaces(at);
	while (isalnum((unsigned char)at[length]) || (at[length] != '\0' && strchr(more, at[length]) != NULL))
		length++;
	if (length == 0 || length >= SCHEMA_NAME)
		return NULL;
	memcpy(word_out, at, length);
	word_out[length] = '\0';
	return at + length;
}

static bool kind_of(const char *type, struct schema_param *param)
{
	static const struct {
		const char *name;
		uint32_t kind;
	} kinds[] = {{"Tensor", OPD_ARG_TENSOR}, {"int", OPD_ARG_INT}, {"float", OPD_ARG_FLOAT}, {"bool", OPD_ARG_BOOL},
	             {"str", OPD_ARG_STR}};
	size_t length = strlen(type);
	param->optional = length > 0 && type[length - 1] == '?';
	if (param->optional)
		length--;
	for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
		if (strlen(kinds[i].name) == length && strncmp(type, kinds[i].name, length) == 0) {
			param->kind = kinds[i].kind;
			return true;
		}
	}
	return false;
}

static const char *read_text_default(const char *at, struct schema_param *param)
{
	char quote = *at++;
	const char *end = strchr(at, quote);
	if (end == NULL || (size_t)(end - at) >= sizeof param->text)
		return NULL;
	memcpy(param->text, at, (size_t)(end - at));
	param->text[end - at] = '\0';
	param->fallback = (opd_arg){.kind = OPD_ARG_STR, .count = (uint32_t)(end - at), .str = param->text};
	return end + 1;
}

static const char *read_default(const char *at, struct schema_param *param)
{
	at = skip_spaces(at);
	param->has_default = true;
	if (*at == '"' || *at == '\'')
		return param->kind == OPD_ARG_STR ? read_text_default(at, param) : NULL;
	const char *end = read_word(at, param->text, "+-._");
	if (end == NULL)
		return NULL;
	param->fallback.kind = param->kind;
	if (strcmp(param->text, "None") == 0 && param->optional)
		param->fallback = (opd_arg){.kind = OPD_ARG_NONE};
	else if (param->kind == OPD_ARG_INT)
		param->fallback.i = strtoll(param->text, NULL, 10);
	else if (param->kind == OPD_ARG_FLOAT)
		param->fallback.f = strtod(param->text, NULL);
	else if (param->kind == OPD_ARG_BOOL)
		param->fallback.b = strcmp(param->text, "True") == 0;
	else
		return NULL;
	return end;
}

/* "Tensor? weight", "int dim=-1" */
static const char *read_param(const char *at, struct schema_param *param)
{
	char type[SCHEMA_NAME];
	memset(param, 0, sizeof *param);
	at = read_word(at, type, "?[]");
	if (at == NULL || !kind_of(type, param))
		return NULL;
	at = read_word(at, param->name, "_");
	if (at == NULL)
		return NULL;
	at = skip_spaces(at);
	return *at == '=' ? read_default(at + 1, param) : at;
}

static uint32_t count_results(const char *arrow)
{
	uint32_t count = 0;
	for (const char *at = strstr(arrow, "Tensor"); at != NULL; at = strstr(at + 1, "Tensor"))
		count++;
	return count;
}

bool schema_read(const char *text, struct schema *schema_out)
{
	memset(schema_out, 0, sizeof *schema_out);
	const char *at = read_word(text, schema_out->name, "_");
	if (at == NULL || *at != '(')
		return false;
	at = skip_spaces(at + 1);
	while (*at != ')') {
		if (schema_out->param_count == SCHEMA_PARAMS)
			return false;
		at = read_param(at, &schema_out->params[schema_out->param_count++]);
		if (at == NULL)
			return false;
		at = skip_spaces(at);
		if (*at == ',')
			at = skip_spaces(at + 1);
		else if (*at != ')')
			return false;
	}
	at = strstr(at, "->");
	if (at == NULL)
		return false;
	schema_out->result_count = count_results(at);
	return schema_out->result_count > 0 && schema_out->result_count <= SCHEMA_RESULTS;
}

int schema_find(const struct schema *schema, const char *name)
{
	for (uint32_t i = 0; i < schema->param_count; i++)
		if (strcmp(schema->params[i].name, name) == 0)
			return (int)i;
	return -1;
}
