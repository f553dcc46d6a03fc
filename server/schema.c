#include "server/schema.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/arena.h"
#include "proto/bounds.h"
#include "proto/text.h"

const char *schema_type_text(schema_type type)
{
	static const char *const texts[] = {
#define X(name, text, kind, optional) text,
		SCHEMA_TYPES(X)
#undef X
	};
	return texts[type];
}

opd_arg_kind schema_type_kind(schema_type type)
{
	static const opd_arg_kind kinds[] = {
#define X(name, text, kind, optional) kind,
		SCHEMA_TYPES(X)
#undef X
	};
	return kinds[type];
}

bool schema_type_optional(schema_type type)
{
	static const bool optionals[] = {
#define X(name, text, kind, optional) optional,
		SCHEMA_TYPES(X)
#undef X
	};
	return optionals[type];
}

uint32_t schema_hash(const char *text, size_t bytes)
{
	uint32_t hash = 2166136261u; /* FNV-1a: names are short */
	for (size_t i = 0; i < bytes; i++)
		hash = (hash ^ (uint8_t)text[i]) * 16777619u;
	return hash;
}

/* The memory behind a schema: its header, with the arena that holds everything else. */
struct schema_memory {
	struct schema schema;
	struct arena arena;
};

struct parser {
	const char *text;
	const char *at;
	struct arena *arena;
	opd_error *error;
};

static opd_status parse_fail(struct parser *parser, const char *expected)
{
	char quoted[300];
	text_escape(parser->text, strlen(parser->text), quoted, sizeof quoted);
	return opd_fail(parser->error, OPD_INVALID_ARGUMENT, "schema \"%s\": at character %zu: expected %s", quoted,
	                (size_t)(parser->at - parser->text), expected);
}

static opd_status parse_memory(struct parser *parser)
{
	return opd_fail(parser->error, OPD_RESOURCE_EXHAUSTED, "schema: out of memory");
}

static void skip_blanks(struct parser *parser)
{
	while (*parser->at == ' ')
		parser->at++;
}

static bool accept(struct parser *parser, const char *token)
{
	skip_blanks(parser);
	size_t bytes = strlen(token);
	if (strncmp(parser->at, token, bytes) != 0)
		return false;
	parser->at += bytes;
	return true;
}

static opd_status parse_name(struct parser *parser, const char **name_out, const char *what)
{
	skip_blanks(parser);
	size_t bytes = strspn(parser->at, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789.");
	if (!text_is_name(parser->at, bytes))
		return parse_fail(parser, what);
	*name_out = arena_text(parser->arena, parser->at, bytes);
	parser->at += bytes;
	return *name_out == NULL ? parse_memory(parser) : OPD_OK;
}

static opd_status parse_type(struct parser *parser, schema_type *type_out)
{
	skip_blanks(parser);
	size_t bytes = strspn(parser->at, "Tensorifloabtr[]?");
	static const schema_type types[] = {
#define X(name, text, kind, optional) SCHEMA_##name,
		SCHEMA_TYPES(X)
#undef X
	};
	for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
		const char *text = schema_type_text(types[i]);
		if (strlen(text) == bytes && strncmp(text, parser->at, bytes) == 0) {
			parser->at += bytes;
			*type_out = types[i];
			return OPD_OK;
		}
	}
	return parse_fail(parser, "a type (Tensor, Tensor?, Tensor[], int, int?, int[], float, float?, bool, str)");
}

static opd_status parse_int(struct parser *parser, int64_t *value_out)
{
	skip_blanks(parser);
	char *end;
	errno = 0;
	long long value = strtoll(parser->at, &end, 10);
	if (end == parser->at || errno != 0)
		return parse_fail(parser, "an integer of 64 bits");
	parser->at = end;
	*value_out = value;
	return OPD_OK;
}

static opd_status parse_ints(struct parser *parser, opd_arg *value)
{
	int64_t items[64];
	uint32_t count = 0;
	if (!accept(parser, "["))
		return parse_fail(parser, "[");
	while (!accept(parser, "]")) {
		if (count == sizeof items / sizeof items[0] || (count > 0 && !accept(parser, ",")))
			return parse_fail(parser, ", or ] (at most 64 integers)");
		opd_status status = parse_int(parser, &items[count]);
		if (status != OPD_OK)
			return status;
		count++;
	}
	int64_t *copy = arena_array(parser->arena, count, sizeof copy[0]);
	if (copy == NULL)
		return parse_memory(parser);
	memcpy(copy, items, count * sizeof items[0]);
	value->ints = copy;
	value->count = count;
	return OPD_OK;
}

static opd_status parse_str(struct parser *parser, opd_arg *value)
{
	skip_blanks(parser);
	char quote = *parser->at;
	const char *end = quote == '"' || quote == '\'' ? strchr(parser->at + 1, quote) : NULL;
	if (end == NULL || memchr(parser->at, '\\', (size_t)(end - parser->at)) != NULL)
		return parse_fail(parser, "a quoted text without backslashes");
	value->count = (uint32_t)(end - parser->at - 1);
	value->str = arena_text(parser->arena, parser->at + 1, value->count);
	parser->at = end + 1;
	return value->str == NULL ? parse_memory(parser) : OPD_OK;
}

static opd_status parse_default(struct parser *parser, schema_type type, opd_arg *value)
{
	*value = (opd_arg){.kind = schema_type_kind(type)};
	if (accept(parser, "None")) {
		value->kind = OPD_ARG_NONE;
		return schema_type_optional(type) ? OPD_OK : parse_fail(parser, "a value: only Tensor?, int?, float? may be None");
	}
	char *end;
	switch (type) {
	case SCHEMA_INT:
	case SCHEMA_INT_OPTIONAL:
		return parse_int(parser, &value->i);
	case SCHEMA_INTS:
		return parse_ints(parser, value);
	case SCHEMA_FLOAT:
	case SCHEMA_FLOAT_OPTIONAL:
		skip_blanks(parser);
		value->f = strtod(parser->at, &end);
		if (end == parser->at)
			return parse_fail(parser, "a number");
		parser->at = end;
		return OPD_OK;
	case SCHEMA_BOOL:
		value->b = accept(parser, "True");
		return value->b || accept(parser, "False") ? OPD_OK : parse_fail(parser, "True or False");
	case SCHEMA_STR:
		return parse_str(parser, value);
	default:
		return parse_fail(parser, "None: a tensor has no other default");
	}
}

static opd_status parse_param(struct parser *parser, struct schema *schema)
{
	if (accept(parser, "*"))
		return parse_fail(parser, "a parameter: keyword-only parameters (*) are refused");
	if (schema->param_count == SCHEMA_PARAMS_MAX)
		return parse_fail(parser, "at most 64 parameters");
	struct schema_param *param = &schema->params[schema->param_count];
	opd_status status = parse_type(parser, &param->type);
	if (status == OPD_OK && *parser->at != ' ')
		status = parse_fail(parser, "a blank between type and name");
	if (status == OPD_OK)
		status = parse_name(parser, &param->name, "a parameter's name ([a-z_][a-z_0-9]*)");
	if (status != OPD_OK)
		return status;
	param->name_bytes = (uint32_t)strlen(param->name);
	param->hash = schema_hash(param->name, param->name_bytes);
	if (schema_find(schema, param->name, param->name_bytes) >= 0)
		return parse_fail(parser, "another name: this parameter is there already");
	param->has_default = accept(parser, "=");
	if (param->has_default)
		status = parse_default(parser, param->type, &param->value);
	else if (schema->param_count > 0 && param[-1].has_default)
		return parse_fail(parser, "a default: the parameter before has one");
	schema->param_count++;
	return status;
}

static opd_status parse_results(struct parser *parser, struct schema *schema)
{
	if (!accept(parser, "->"))
		return parse_fail(parser, "->");
	bool several = accept(parser, "(");
	do {
		if (schema->result_count == BOUND_OUTPUTS)
			return parse_fail(parser, "fewer results");
		opd_status status = parse_type(parser, &schema->results[schema->result_count]);
		if (status != OPD_OK)
			return status;
		if (schema->results[schema->result_count] != SCHEMA_TENSOR)
			return parse_fail(parser, "Tensor: every result is one");
		schema->result_count++;
	} while (several && accept(parser, ","));
	if (several && !accept(parser, ")"))
		return parse_fail(parser, ", or )");
	skip_blanks(parser);
	return *parser->at == '\0' ? OPD_OK : parse_fail(parser, "the end");
}

/* The text with blanks where the canonical form has them: after commas, around ->, between type and name. Blanks inside quotes stay. */
static opd_status canonical_text(struct parser *parser, const char **text_out)
{
	char *out = arena_alloc(parser->arena, 2 * strlen(parser->text) + 1);
	if (out == NULL)
		return parse_memory(parser);
	char *end = out;
	char quote = 0;
	for (const char *at = parser->text; *at != '\0'; at++) {
		if (quote != 0 || *at == '"' || *at == '\'') {
			quote = quote == 0 ? *at : (*at == quote ? 0 : quote);
			*end++ = *at;
		} else if (*at == ' ') {
			/* Kept only between two words. */
			const char *next = at + strspn(at, " ");
			if (end > out && strchr("([,=>) ", end[-1]) == NULL && *next != '\0' && strchr(")],=-(", *next) == NULL)
				*end++ = ' ';
		} else if (*at == ',') {
			*end++ = ',';
			*end++ = ' ';
		} else if (at[0] == '-' && at[1] == '>') {
			memcpy(end, " -> ", 4);
			end += 4;
			at++;
		} else {
			*end++ = *at;
		}
	}
	*end = '\0';
	*text_out = out;
	return OPD_OK;
}

opd_status schema_parse(const char *text, struct schema **schema_out, opd_error *error)
{
	struct schema_memory *memory = calloc(1, sizeof *memory);
	if (memory == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "schema: out of memory");
	arena_init(&memory->arena, 64u << 10);
	struct schema *schema = &memory->schema;
	schema->memory = memory;
	struct parser parser = {.text = text, .at = text, .arena = &memory->arena, .error = error};
	schema->params = arena_array(parser.arena, SCHEMA_PARAMS_MAX, sizeof schema->params[0]);
	schema->results = arena_array(parser.arena, BOUND_OUTPUTS, sizeof schema->results[0]);
	opd_status status = schema->params == NULL || schema->results == NULL ? parse_memory(&parser) : OPD_OK;
	if (status == OPD_OK && strlen(text) > 4096)
		status = opd_fail(error, OPD_INVALID_ARGUMENT, "schema: %zu bytes long, at most 4096", strlen(text));
	if (status == OPD_OK)
		status = parse_name(&parser, &schema->name, "an op's name ([a-z_][a-z_0-9]*)");
	if (status == OPD_OK && !accept(&parser, "("))
		status = parse_fail(&parser, "(");
	bool more = status == OPD_OK && !accept(&parser, ")");
	while (more && status == OPD_OK) {
		status = parse_param(&parser, schema);
		more = status == OPD_OK && !accept(&parser, ")");
		if (more && !accept(&parser, ","))
			status = parse_fail(&parser, ", or )");
	}
	if (status == OPD_OK)
		status = parse_results(&parser, schema);
	if (status == OPD_OK)
		status = canonical_text(&parser, &schema->text);
	if (status != OPD_OK) {
		schema_destroy(schema);
		return status;
	}
	*schema_out = schema;
	return OPD_OK;
}

void schema_destroy(struct schema *schema)
{
	if (schema == NULL)
		return;
	struct schema_memory *memory = schema->memory;
	arena_fini(&memory->arena);
	free(memory);
}

bool schema_arg_equal(const opd_arg *a, const opd_arg *b)
{
	if (a->kind != b->kind)
		return false;
	switch ((opd_arg_kind)a->kind) {
	case OPD_ARG_NONE:
		return true;
	case OPD_ARG_INT:
		return a->i == b->i;
	case OPD_ARG_FLOAT:
		return memcmp(&a->f, &b->f, sizeof a->f) == 0;
	case OPD_ARG_BOOL:
		return a->b == b->b;
	case OPD_ARG_STR:
		return a->count == b->count && memcmp(a->str, b->str, a->count) == 0;
	case OPD_ARG_INTS:
		return a->count == b->count && (a->count == 0 || memcmp(a->ints, b->ints, a->count * sizeof a->ints[0]) == 0);
	default:
		return false; /* a tensor never equals a default */
	}
}

static bool param_equal(const struct schema_param *a, const struct schema_param *b)
{
	return a->type == b->type && strcmp(a->name, b->name) == 0 && a->has_default == b->has_default &&
	       (!a->has_default || schema_arg_equal(&a->value, &b->value));
}

bool schema_accepts(const struct schema *op, const struct schema *impl, uint32_t *params_out)
{
	if (strcmp(op->name, impl->name) != 0 || op->result_count != impl->result_count || impl->param_count > op->param_count)
		return false;
	for (uint32_t i = 0; i < op->param_count; i++)
		if (i < impl->param_count ? !param_equal(&op->params[i], &impl->params[i]) : !op->params[i].has_default)
			return false;
	for (uint32_t i = 0; i < op->result_count; i++)
		if (op->results[i] != impl->results[i])
			return false;
	*params_out = impl->param_count;
	return true;
}

int schema_find(const struct schema *schema, const char *name, size_t bytes)
{
	uint32_t hash = schema_hash(name, bytes);
	for (uint32_t i = 0; i < schema->param_count; i++) {
		const struct schema_param *param = &schema->params[i];
		if (param->hash == hash && param->name_bytes == bytes && memcmp(param->name, name, bytes) == 0)
			return (int)i;
	}
	return -1;
}
