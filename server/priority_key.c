#include "server/priority_key.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "proto/text.h"

#define ROWS "rows<="

static opd_status key_fail(const char *part, const char *expected, opd_error *error)
{
	char shown[160];
	return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%s\" is no %s", text_escape(part, strlen(part), shown, sizeof shown), expected);
}

static bool read_rows(const char *part, uint64_t *rows_out)
{
	char *end;
	if (part[0] < '1' || part[0] > '9')
		return false;
	errno = 0;
	unsigned long long rows = strtoull(part, &end, 10);
	*rows_out = rows;
	return errno == 0 && *end == '\0' && rows < UINT64_MAX;
}

/* One part behind the op's name: a dtype, or rows, which come last. */
static opd_status read_part(const char *part, struct priority_key *key, opd_error *error)
{
	if (strncmp(part, ROWS, strlen(ROWS)) == 0)
		return read_rows(part + strlen(ROWS), &key->rows_max) ? OPD_OK : key_fail(part, "number of rows (as rows<=4)", error);
	key->dtype = opd_dtype_parse(part);
	return key->dtype != OPD_DTYPE_NONE ? OPD_OK : key_fail(part, "dtype (as bf16) and no number of rows (as rows<=4)", error);
}

opd_status priority_key_parse(const char *text, struct priority_key *key_out, opd_error *error)
{
	char parts[160];
	*key_out = (struct priority_key){.op_bytes = strcspn(text, "/"), .rows_max = UINT64_MAX};
	if (text[key_out->op_bytes] == '\0')
		return OPD_OK;
	if (strlen(text) >= sizeof parts)
		return key_fail(text, "key: it is too long", error);
	if (key_out->op_bytes == 1 && text[0] == '*')
		return key_fail("*", "op, and only an op's list may be narrowed", error);
	(void)strcpy(parts, text + key_out->op_bytes + 1);
	char *second = strchr(parts, '/');
	if (second != NULL)
		*second++ = '\0';
	opd_status status = read_part(parts, key_out, error);
	if (status == OPD_OK && second != NULL && (key_out->dtype == OPD_DTYPE_NONE || strncmp(second, ROWS, strlen(ROWS)) != 0))
		return key_fail(second, "number of rows (as rows<=4), which comes last", error);
	return status == OPD_OK && second != NULL ? read_part(second, key_out, error) : status;
}

static int rank_of(const struct priority_key *key)
{
	bool rows = key->rows_max != UINT64_MAX;
	return key->dtype != OPD_DTYPE_NONE ? (rows ? 0 : 1) : rows ? 2 : 3;
}

bool priority_key_before(const struct priority_key *a, const struct priority_key *b)
{
	int difference = rank_of(a) - rank_of(b);
	return difference != 0 ? difference < 0 : a->rows_max < b->rows_max;
}
