#include "client/opctl/options.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"

static const struct {
	const char *name;
	char letter;
	const char *value;
} option_table[] = {
#define X(id, name, letter, value) {name, letter, value},
    OPTION_MAP(X)
#undef X
};

static bool is_option(const char *text)
{
	if (text[0] != '-' || text[1] == '\0')
		return false;
	const char next = text[1];
	return !(next >= '0' && next <= '9') && next != '.' && strcmp(text, "-inf") != 0;
}

/* Finds the option that `text` names, and the value after its '='. */
static option_id find_option(const char *text, const char **value_out)
{
	*value_out = NULL;
	for (int id = 0; id < OPTION_END; id++) {
		if (text[1] != '-') {
			if (text[1] == option_table[id].letter && text[2] == '\0')
				return (option_id)id;
			continue;
		}
		const size_t bytes = strlen(option_table[id].name);
		if (strncmp(text + 2, option_table[id].name, bytes) != 0 || (text[2 + bytes] != '\0' && text[2 + bytes] != '='))
			continue;
		if (text[2 + bytes] == '=')
			*value_out = text + 3 + bytes;
		return (option_id)id;
	}
	return OPTION_END;
}

/* Takes argv[*index], an option, and its value, which may be the next argument. */
static opd_status take_option(struct options *options, int argc, char **argv, int *index, opd_error *error)
{
	const char *value;
	const char *text = argv[*index];
	const option_id id = find_option(text, &value);
	if (id == OPTION_END)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "unknown option %s", text);
	if (options->values[id] != NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "--%s is given twice", option_table[id].name);
	if (option_table[id].value == NULL) {
		if (value != NULL)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "--%s takes no value, '%s' was given", option_table[id].name, value);
		options->values[id] = "";
		return OPD_OK;
	}
	if (value == NULL && *index + 1 < argc)
		value = argv[++*index];
	if (value == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "--%s needs a value: %s", option_table[id].name, option_table[id].value);
	options->values[id] = value;
	return OPD_OK;
}

opd_status options_parse(struct options *options, int argc, char **argv, opd_error *error)
{
	memset(options, 0, sizeof *options);
	options->positional = calloc((size_t)argc + 1, sizeof *options->positional);
	if (options->positional == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	bool ended = false;
	for (int i = 1; i < argc; i++) {
		if (!ended && strcmp(argv[i], "--") == 0) {
			ended = true;
		} else if (!ended && is_option(argv[i])) {
			const opd_status status = take_option(options, argc, argv, &i, error);
			if (status != OPD_OK)
				return status;
		} else {
			options->positional[options->count++] = argv[i];
		}
	}
	return OPD_OK;
}

void options_fini(struct options *options)
{
	free(options->positional);
	options->positional = NULL;
}

opd_status options_check(const struct options *options, const char *command, const struct option_use *uses, opd_error *error)
{
	for (int id = OPTION_VERSION + 1; id < OPTION_END; id++) {
		if (options->values[id] == NULL)
			continue;
		const struct option_use *use = uses;
		while (use->id != OPTION_END && use->id != (option_id)id)
			use++;
		if (use->id == OPTION_END)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s takes no --%s", command, option_table[id].name);
	}
	return OPD_OK;
}

bool options_has(const struct options *options, option_id id)
{
	return options->values[id] != NULL;
}

void options_describe(option_id id, char *out, size_t out_bytes)
{
	const char *value = option_table[id].value;
	char letter[8] = "";
	if (option_table[id].letter != 0)
		(void)snprintf(letter, sizeof letter, "-%c, ", option_table[id].letter);
	(void)snprintf(out, out_bytes, "%s--%s%s%s", letter, option_table[id].name, value == NULL ? "" : " ",
	               value == NULL ? "" : value);
}

static bool starts_number(const char *text)
{
	return *text != '\0' && strchr(" \t\n\v\f\r", *text) == NULL;
}

opd_status parse_int(const char *what, const char *text, int64_t low, int64_t high, int64_t *value_out, opd_error *error)
{
	char *end;
	errno = 0;
	const long long value = strtoll(text, &end, 10);
	if (!starts_number(text) || end == text || *end != '\0')
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s is '%s', expected an int", what, text);
	if (errno == ERANGE && low == INT64_MIN && high == INT64_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s is %s, which doesn't fit an int of 64 bits", what, text);
	if (errno == ERANGE || value < low || value > high)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s is %s, expected %lld to %lld", what, text, (long long)low,
		                (long long)high);
	*value_out = value;
	return OPD_OK;
}

opd_status parse_float(const char *what, const char *text, double *value_out, opd_error *error)
{
	char *end;
	errno = 0;
	const double value = strtod(text, &end);
	if (!starts_number(text) || end == text || *end != '\0')
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s is '%s', expected a float", what, text);
	if (errno == ERANGE && isinf(value))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s is %s, which doesn't fit a float of 64 bits", what, text);
	*value_out = value;
	return OPD_OK;
}

opd_status parse_seconds(const char *what, const char *text, uint64_t *us_out, opd_error *error)
{
	double value;
	const opd_status status = parse_float(what, text, &value, error);
	if (status != OPD_OK)
		return status;
	if (!(value >= 0) || value > 1e9)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s is %s, expected seconds from 0 to 1e9", what, text);
	*us_out = (uint64_t)(value * 1e6);
	return OPD_OK;
}

opd_status parse_dtype(const char *what, const char *text, opd_dtype *dtype_out, opd_error *error)
{
	const opd_dtype dtype = opd_dtype_parse(text);
	if (dtype == OPD_DTYPE_NONE)
		return opd_fail(error, OPD_INVALID_ARGUMENT,
		                "%s is '%s', expected bool, u8, i8, i16, i32, i64, f16, bf16, f32, f64, f8_e4m3fn or f8_e5m2", what,
		                text);
	*dtype_out = dtype;
	return OPD_OK;
}

opd_status options_int(const struct options *options, option_id id, int64_t low, int64_t high, int64_t otherwise,
                       int64_t *value_out, opd_error *error)
{
	char what[32];
	*value_out = otherwise;
	(void)snprintf(what, sizeof what, "--%s", option_table[id].name);
	return options->values[id] == NULL ? OPD_OK : parse_int(what, options->values[id], low, high, value_out, error);
}

opd_status options_seconds(const struct options *options, option_id id, uint64_t otherwise_us, uint64_t *us_out, opd_error *error)
{
	char what[32];
	*us_out = otherwise_us;
	(void)snprintf(what, sizeof what, "--%s", option_table[id].name);
	return options->values[id] == NULL ? OPD_OK : parse_seconds(what, options->values[id], us_out, error);
}

opd_status name_list_parse(const char *what, const char *text, struct name_list *list, opd_error *error)
{
	memset(list, 0, sizeof *list);
	list->text = strdup(text);
	list->names = calloc(BOUND_PROVIDERS + 1, sizeof *list->names);
	if (list->text == NULL || list->names == NULL) {
		name_list_fini(list);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	}
	char *at = list->text;
	while (*text != '\0' && at != NULL) {
		if (list->count == BOUND_PROVIDERS) {
			name_list_fini(list);
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s has more than %u providers", what, BOUND_PROVIDERS);
		}
		list->names[list->count++] = strsep(&at, ",");
	}
	return OPD_OK;
}

void name_list_fini(struct name_list *list)
{
	free(list->text);
	free(list->names);
	memset(list, 0, sizeof *list);
}
