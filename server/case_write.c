#include "server/case_write.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "providers/ops/tolerance.h"
#include "server/compare.h"

static const char *safetensors_dtype(opd_dtype dtype)
{
	switch (dtype) {
#define X(name, number, bytes, text) \
	case OPD_##name:             \
		return text;
		OPD_DTYPE_MAP(X)
#undef X
	default:
		return NULL;
	}
}

/* A JSON text's inside; twice: as a text within a text. */
static void put_escaped(FILE *to, const char *text, bool twice)
{
	for (; *text != '\0'; text++) {
		const unsigned char c = (unsigned char)*text;
		if (c < 0x20)
			(void)fprintf(to, twice ? "\\\\u%04x" : "\\u%04x", c);
		else if (c == '"' || c == '\\')
			(void)fprintf(to, twice ? (c == '"' ? "\\\\\\\"" : "\\\\\\\\") : "\\%c", c);
		else
			(void)fputc(c, to);
	}
}

/* An attribute's value, inside of a JSON text. */
static void put_value(FILE *to, const opd_arg *arg)
{
	switch ((opd_arg_kind)arg->kind) {
	case OPD_ARG_INT:
		(void)fprintf(to, "%" PRId64, arg->i);
		break;
	case OPD_ARG_BOOL:
		(void)fputs(arg->b ? "true" : "false", to);
		break;
	case OPD_ARG_FLOAT:
		if (isfinite(arg->f))
			(void)fprintf(to, "%.17g", arg->f);
		else
			(void)fprintf(to, "\\\"%s\\\"", isnan(arg->f) ? "nan" : arg->f > 0 ? "inf" : "-inf");
		break;
	case OPD_ARG_INTS:
		(void)fputc('[', to);
		for (uint32_t i = 0; i < arg->count; i++)
			(void)fprintf(to, "%s%" PRId64, i > 0 ? ", " : "", arg->ints[i]);
		(void)fputc(']', to);
		break;
	case OPD_ARG_STR:
		(void)fputs("\\\"", to);
		put_escaped(to, arg->str, true);
		(void)fputs("\\\"", to);
		break;
	default:
		(void)fputs("null", to);
		break;
	}
}

static void put_attributes(FILE *to, const struct op *op, const opd_call *call)
{
	const char *comma = "";
	for (uint32_t i = 0; i < call->arg_count; i++) {
		if (call->args[i].kind == OPD_ARG_TENSOR || call->args[i].kind == OPD_ARG_NONE)
			continue;
		(void)fprintf(to, "%s\\\"%s\\\": ", comma, op->schema->params[i].name);
		put_value(to, &call->args[i]);
		comma = ", ";
	}
}

static uint64_t put_entry(FILE *to, const char *name, const opd_tensor *tensor, uint64_t at)
{
	const uint64_t end = at + tensor->elements * opd_dtype_bytes(tensor->dtype);
	(void)fprintf(to, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", name, safetensors_dtype(tensor->dtype));
	for (uint32_t d = 0; d < tensor->rank; d++)
		(void)fprintf(to, "%s%" PRId64, d > 0 ? "," : "", tensor->shape[d]);
	(void)fprintf(to, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", at, end);
	return end;
}

static void put_header(FILE *to, const struct op *op, const opd_call *call, const opd_tensor *const *results)
{
	char name[160];
	uint64_t at = 0;
	(void)fprintf(to, "{\"__metadata__\":{\"op\":\"%s\",\"attrs\":\"{", op->schema->name);
	put_attributes(to, op, call);
	(void)fputs("}\"", to);
	for (uint32_t i = 0; i < call->output_count; i++) {
		const opd_tolerance tolerance = tolerance_of(op->def, results[i]->dtype);
		(void)fprintf(to, ",\"atol.%" PRIu32 "\":\"%.9g\",\"rtol.%" PRIu32 "\":\"%.9g\"", i, tolerance.atol, i, tolerance.rtol);
	}
	(void)fputc('}', to);
	for (uint32_t i = 0; i < call->arg_count; i++) {
		(void)snprintf(name, sizeof name, "in.%s", op->schema->params[i].name);
		if (call->args[i].kind == OPD_ARG_TENSOR)
			at = put_entry(to, name, call->args[i].tensor, at);
	}
	for (uint32_t i = 0; i < call->output_count; i++) {
		(void)snprintf(name, sizeof name, "out.%" PRIu32, i);
		at = put_entry(to, name, results[i], at);
	}
	(void)fputc('}', to);
}

/* Row-major, whatever its strides. */
static void put_tensor(FILE *to, const opd_tensor *tensor)
{
	const uint64_t bytes = opd_dtype_bytes(tensor->dtype);
	for (uint64_t i = 0; i < tensor->elements; i++) {
		uint64_t offset = 0, left = i;
		for (uint32_t d = tensor->rank; d-- > 0;) {
			offset += left % (uint64_t)tensor->shape[d] * (uint64_t)tensor->strides[d];
			left /= (uint64_t)tensor->shape[d];
		}
		(void)fwrite((const unsigned char *)opd_tensor_data(tensor) + offset * bytes, bytes, 1, to);
	}
}

static void put_file(FILE *to, const opd_call *call, const opd_tensor *const *results, const char *header, size_t header_bytes)
{
	const size_t padding = (8 - header_bytes % 8) % 8;
	const uint64_t length = header_bytes + padding;
	for (unsigned i = 0; i < 8; i++)
		(void)fputc((int)(length >> (8 * i) & 0xff), to);
	(void)fwrite(header, header_bytes, 1, to);
	(void)fprintf(to, "%*s", (int)padding, "");
	for (uint32_t i = 0; i < call->arg_count; i++)
		if (call->args[i].kind == OPD_ARG_TENSOR)
			put_tensor(to, call->args[i].tensor);
	for (uint32_t i = 0; i < call->output_count; i++)
		put_tensor(to, results[i]);
}

static opd_status check_args(const struct op *op, const opd_call *call, const opd_tensor *const *results, opd_error *error)
{
	for (uint32_t i = 0; i < call->arg_count; i++) {
		const opd_arg *arg = &call->args[i];
		if (arg->kind == OPD_ARG_TENSORS || (arg->kind == OPD_ARG_TENSOR && safetensors_dtype(arg->tensor->dtype) == NULL))
			return opd_fail(error, OPD_UNIMPLEMENTED, "%s: a case file has no place for %s", op->schema->name, op->schema->params[i].name);
	}
	for (uint32_t i = 0; i < call->output_count; i++)
		if (safetensors_dtype(results[i]->dtype) == NULL)
			return opd_fail(error, OPD_UNIMPLEMENTED, "%s: a case file has no place for result %" PRIu32, op->schema->name, i);
	return OPD_OK;
}

opd_status case_write(const char *path, const struct op *op, const opd_call *call, const opd_tensor *const *results, opd_error *error)
{
	char *header = NULL;
	size_t header_bytes = 0;
	opd_status status = check_args(op, call, results, error);
	FILE *text = status == OPD_OK ? open_memstream(&header, &header_bytes) : NULL;
	if (status == OPD_OK && text == NULL)
		status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", path);
	if (status != OPD_OK)
		return status;
	put_header(text, op, call, results);
	const int fd = fclose(text) != 0 ? -1 : open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	FILE *file = fd < 0 ? NULL : fdopen(fd, "wb");
	if (file == NULL) {
		free(header);
		if (fd >= 0)
			(void)close(fd);
		return opd_fail(error, OPD_UNAVAILABLE, "%s: %s", path, strerror(errno));
	}
	put_file(file, call, results, header, header_bytes);
	free(header);
	const bool whole = ferror(file) == 0;
	if (fclose(file) == 0 && whole)
		return OPD_OK;
	(void)unlink(path);
	return opd_fail(error, OPD_UNAVAILABLE, "%s: can't be written whole", path);
}
