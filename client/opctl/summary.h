/* A tensor in a few numbers, and one element as text or JSON.
 *
 * Layer: client/opctl. Threads: pure. Row-major tensors in host memory. */
#ifndef OPCTL_SUMMARY_H
#define OPCTL_SUMMARY_H

#include <cjson/cJSON.h>

#include "opd/tensor.h"

struct summary {
	uint64_t nan;
	uint64_t inf;
	uint64_t finite; /* elements that min, max and mean are of */
	double min, max, mean;
	int64_t min_int, max_int; /* the same for integer dtypes, exactly */
};

void summary_of(const opd_tensor *tensor, struct summary *out);

/* "f32 [2, 4]" */
void shape_text(opd_dtype dtype, uint32_t rank, const int64_t *shape, char *out, size_t out_bytes);

/* The element at `index`, shortest that tells it from its neighbours in its dtype for JSON, six digits for people. */
void element_text(const opd_tensor *tensor, uint64_t index, char *out, size_t out_bytes);
cJSON *element_json(const opd_tensor *tensor, uint64_t index);

/* Two lines for people: dtype, shape and statistics; the first elements. A tensor without data: the first line's head alone. */
void summary_print(const char *label, const opd_tensor *tensor);
/* {"dtype", "shape", "min", "max", "mean", "nan", "inf", "first"}; without data dtype and shape. */
cJSON *summary_json(const opd_tensor *tensor);

#endif
