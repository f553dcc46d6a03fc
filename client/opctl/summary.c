#include "client/opctl/summary.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#include "client/opctl/print.h"
#include "proto/element.h"

enum { FIRST_ELEMENTS = 8 };

static const unsigned char *element_at(const opd_tensor *tensor, uint64_t index)
{
	return (const unsigned char *)opd_tensor_data(tensor) + index * opd_dtype_bytes(tensor->dtype);
}

static bool is_whole(opd_dtype dtype)
{
	return dtype == OPD_bool || opd_dtype_is_integer(dtype);
}

static void add_int(struct summary *out, int64_t value, double *sum)
{
	if (out->finite == 0 || value < out->min_int)
		out->min_int = value;
	if (out->finite == 0 || value > out->max_int)
		out->max_int = value;
	out->finite++;
	*sum += (double)value;
}

static void add_float(struct summary *out, double value, double *sum)
{
	if (isnan(value)) {
		out->nan++;
	} else if (isinf(value)) {
		out->inf++;
	} else {
		out->min = out->finite == 0 || value < out->min ? value : out->min;
		out->max = out->finite == 0 || value > out->max ? value : out->max;
		out->finite++;
		*sum += value;
	}
}

void summary_of(const opd_tensor *tensor, struct summary *out)
{
	*out = (struct summary){0};
	const bool whole = is_whole(tensor->dtype);
	double sum = 0;
	for (uint64_t i = 0; i < tensor->elements; i++) {
		if (whole)
			add_int(out, element_load_i64(tensor->dtype, element_at(tensor, i)), &sum);
		else
			add_float(out, element_load_f64(tensor->dtype, element_at(tensor, i)), &sum);
	}
	if (whole) {
		out->min = (double)out->min_int;
		out->max = (double)out->max_int;
	}
	out->mean = out->finite == 0 ? 0 : sum / (double)out->finite;
}

void shape_text(opd_dtype dtype, uint32_t rank, const int64_t *shape, char *out, size_t out_bytes)
{
	size_t at = (size_t)snprintf(out, out_bytes, "%s [", opd_dtype_name(dtype));
	for (uint32_t i = 0; i < rank && at < out_bytes; i++)
		at += (size_t)snprintf(out + at, out_bytes - at, "%s%" PRId64, i == 0 ? "" : ", ", shape[i]);
	if (at < out_bytes)
		(void)snprintf(out + at, out_bytes - at, "]");
}

void element_text(const opd_tensor *tensor, uint64_t index, char *out, size_t out_bytes)
{
	const unsigned char *at = element_at(tensor, index);
	if (tensor->dtype == OPD_bool)
		(void)snprintf(out, out_bytes, "%s", *at != 0 ? "true" : "false");
	else if (is_whole(tensor->dtype))
		(void)snprintf(out, out_bytes, "%" PRId64, element_load_i64(tensor->dtype, at));
	else
		(void)snprintf(out, out_bytes, "%.6g", element_load_f64(tensor->dtype, at));
}

cJSON *element_json(const opd_tensor *tensor, uint64_t index)
{
	const unsigned char *at = element_at(tensor, index);
	if (tensor->dtype == OPD_bool)
		return cJSON_CreateBool(*at != 0);
	if (is_whole(tensor->dtype))
		return json_i64(element_load_i64(tensor->dtype, at));
	const double value = element_load_f64(tensor->dtype, at);
	if (tensor->dtype == OPD_f64 || !isfinite(value))
		return json_f64(value);
	char text[32];
	(void)snprintf(text, sizeof text, "%.9g", value);
	return cJSON_CreateRaw(text);
}

static void print_range(const opd_tensor *tensor, const struct summary *summary)
{
	if (summary->finite == 0)
		return;
	if (is_whole(tensor->dtype))
		(void)printf("  min %" PRId64 "  max %" PRId64, summary->min_int, summary->max_int);
	else
		(void)printf("  min %.6g  max %.6g", summary->min, summary->max);
	(void)printf("  mean %.6g", summary->mean);
}

static void print_first(const opd_tensor *tensor)
{
	(void)printf("   [");
	for (uint64_t i = 0; i < tensor->elements && i < FIRST_ELEMENTS; i++) {
		char text[40];
		element_text(tensor, i, text, sizeof text);
		(void)printf("%s%s", i == 0 ? "" : ", ", text);
	}
	(void)printf("%s]\n", tensor->elements > FIRST_ELEMENTS ? ", ..." : "");
}

void summary_print(const char *label, const opd_tensor *tensor)
{
	char shape[256];
	shape_text(tensor->dtype, tensor->rank, tensor->shape, shape, sizeof shape);
	(void)printf("%s: %s", label, shape);
	if (tensor->data == NULL) {
		(void)putchar('\n');
		return;
	}
	struct summary summary;
	summary_of(tensor, &summary);
	print_range(tensor, &summary);
	(void)printf("  nan %" PRIu64 "  inf %" PRIu64 "\n", summary.nan, summary.inf);
	print_first(tensor);
}

cJSON *summary_json(const opd_tensor *tensor)
{
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "dtype", opd_dtype_name(tensor->dtype));
	cJSON *shape = cJSON_AddArrayToObject(document, "shape");
	for (uint32_t i = 0; i < tensor->rank; i++)
		cJSON_AddItemToArray(shape, json_i64(tensor->shape[i]));
	if (tensor->data == NULL)
		return document;
	struct summary summary;
	summary_of(tensor, &summary);
	const bool whole = is_whole(tensor->dtype), any = summary.finite > 0;
	cJSON_AddItemToObject(document, "min", !any ? cJSON_CreateNull() : whole ? json_i64(summary.min_int) : json_f64(summary.min));
	cJSON_AddItemToObject(document, "max", !any ? cJSON_CreateNull() : whole ? json_i64(summary.max_int) : json_f64(summary.max));
	cJSON_AddItemToObject(document, "mean", any ? json_f64(summary.mean) : cJSON_CreateNull());
	cJSON_AddItemToObject(document, "nan", json_u64(summary.nan));
	cJSON_AddItemToObject(document, "inf", json_u64(summary.inf));
	cJSON *first = cJSON_AddArrayToObject(document, "first");
	for (uint64_t i = 0; i < tensor->elements && i < FIRST_ELEMENTS; i++)
		cJSON_AddItemToArray(first, element_json(tensor, i));
	return document;
}
