#include "client/opctl/compare.h"

#include <inttypes.h>
#include <math.h>

#include "client/opctl/summary.h"
#include "proto/element.h"
#include "proto/tensor.h"

struct pair {
	double got;
	double want;
	double allowed;
};

static bool same_form(const opd_tensor *got, const struct file_tensor *want)
{
	if (got->dtype != want->dtype || got->rank != want->rank)
		return false;
	for (uint32_t i = 0; i < got->rank; i++)
		if (got->shape[i] != want->shape[i])
			return false;
	return true;
}

static void say_form(const opd_tensor *got, const struct file_tensor *want, struct comparison *out)
{
	char got_text[200], want_text[200];
	shape_text(got->dtype, got->rank, got->shape, got_text, sizeof got_text);
	shape_text(want->dtype, want->rank, want->shape, want_text, sizeof want_text);
	(void)snprintf(out->why, sizeof out->why, "is %.110s, want %.110s", got_text, want_text);
}

/* Loads a pair and notes its errors; false: it is out of tolerance. */
static bool compare_floats(opd_dtype dtype, const void *got, const void *want, double atol, double rtol, struct pair *pair,
                           struct comparison *out)
{
	*pair = (struct pair){element_load_f64(dtype, got), element_load_f64(dtype, want), 0};
	if (!isfinite(pair->got) || !isfinite(pair->want))
		return (isnan(pair->got) && isnan(pair->want)) || pair->got == pair->want;
	const double off = fabs(pair->got - pair->want), size = fabs(pair->want);
	out->max_abs = fmax(out->max_abs, off);
	if (size > 0)
		out->max_rel = fmax(out->max_rel, off / size);
	pair->allowed = atol + rtol * size;
	return off <= pair->allowed;
}

static bool compare_ints(opd_dtype dtype, const void *got, const void *want, struct pair *pair, struct comparison *out)
{
	const int64_t g = element_load_i64(dtype, got), w = element_load_i64(dtype, want);
	*pair = (struct pair){(double)g, (double)w, 0};
	out->max_abs = fmax(out->max_abs, fabs((double)g - (double)w));
	return g == w;
}

/* "[3, 5]" of the element at `index`. */
static void index_text(const opd_tensor *tensor, uint64_t index, char *out, size_t out_bytes)
{
	int64_t at[OPD_RANK_MAX];
	for (uint32_t i = tensor->rank; i-- > 0;) {
		at[i] = (int64_t)(index % (uint64_t)tensor->shape[i]);
		index /= (uint64_t)tensor->shape[i];
	}
	size_t length = (size_t)snprintf(out, out_bytes, "[");
	for (uint32_t i = 0; i < tensor->rank; i++)
		length += (size_t)snprintf(out + length, out_bytes - length, "%s%" PRId64, i == 0 ? "" : ", ", at[i]);
	(void)snprintf(out + length, out_bytes - length, "]");
}

static void say_pair(const opd_tensor *got, uint64_t index, const struct pair *pair, struct comparison *out)
{
	char where[200];
	index_text(got, index, where, sizeof where);
	(void)snprintf(out->why, sizeof out->why, "at %.100s got %.9g, want %.9g, off by %.3g, allowed %.3g", where, pair->got,
	               pair->want, fabs(pair->got - pair->want), pair->allowed);
}

void compare_tensors(const opd_tensor *got, const struct file_tensor *want, double atol, double rtol, struct comparison *out)
{
	*out = (struct comparison){0};
	if (!same_form(got, want)) {
		say_form(got, want, out);
		return;
	}
	const size_t element = opd_dtype_bytes(want->dtype);
	const bool whole = want->dtype == OPD_bool || opd_dtype_is_integer(want->dtype);
	uint64_t wrong = 0;
	for (uint64_t i = 0; i < got->elements; i++) {
		const char *got_at = (const char *)opd_tensor_data(got) + i * element, *want_at = (const char *)want->data + i * element;
		struct pair pair;
		const bool right = whole ? compare_ints(want->dtype, got_at, want_at, &pair, out)
		                         : compare_floats(want->dtype, got_at, want_at, atol, rtol, &pair, out);
		if (!right && wrong++ == 0)
			say_pair(got, i, &pair, out);
	}
	out->equal = wrong == 0;
	const size_t length = strlen(out->why);
	if (wrong > 0)
		(void)snprintf(out->why + length, sizeof out->why - length, " (%" PRIu64 " of %" PRIu64 " elements)", wrong,
		               got->elements);
}
