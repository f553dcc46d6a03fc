/* What the demo shows of ops and dispatch: running, choosing a provider, asking without running. */
#include <stdlib.h>
#include <string.h>

#include "client/examples/demo.h"

/* ---- Three ops ---- */

static void show_run(struct demo *demo, const char *what, const opd_result *result, struct demo_distance distance)
{
	const opd_tensor *tensor = opd_result_tensor(result, 0);
	const opd_explain *explain = opd_result_explain(result);
	if (tensor == NULL || tensor->rank != 2) {
		demo_check(demo, false, "%s: no result of rank 2", what);
		return;
	}
	char accuracy[96] = "exact";
	if (distance.error != 0)
		(void)snprintf(accuracy, sizeof accuracy, "off by at most %.2g, %.0f %% of what is allowed", distance.error,
		               distance.share * 100);
	demo_check(demo, distance.share <= 1, "%-9s %s [%lld, %lld]  %-6s ran it in %6.1f us  %s", what,
	           opd_dtype_name(tensor->dtype), (long long)tensor->shape[0], (long long)tensor->shape[1],
	           shown(opd_result_provider(result)), explain == NULL ? 0 : (double)explain->kernel_ns / 1e3, accuracy);
}

static opd_result *run_explained(struct demo *demo, opd_request *request)
{
	opd_request_explain(request, true);
	return run(demo, request);
}

bool part_ops(struct demo *demo)
{
	(void)puts("\n1. Three ops of layer 0, each on what came out of the one before; every element checked against f64 here");
	const struct demo_model *model = &demo->model;
	demo->rows = run_explained(demo, embedding_request(model));
	if (demo->rows == NULL)
		return false;
	const opd_tensor *rows = opd_result_tensor(demo->rows, 0);
	const struct demo_distance rows_distance = demo_compare_embedding(model, rows);
	show_run(demo, "embedding", demo->rows, rows_distance);
	if (rows_distance.share > 1)
		return false;

	const opd_operand x = operand_of_tensor(rows);
	demo->normed = run_explained(demo, rms_norm_request(model, &x));
	if (demo->normed == NULL)
		return false;
	const opd_tensor *normed = opd_result_tensor(demo->normed, 0);
	show_run(demo, "rms_norm", demo->normed, demo_compare_rms_norm(model, rows, DEMO_EPSILON, normed));

	const opd_operand y = operand_of_tensor(normed);
	demo->queries = run_explained(demo, linear_request(model, &y));
	if (demo->queries == NULL)
		return false;
	show_run(demo, "linear", demo->queries, demo_compare_linear(model, normed, opd_result_tensor(demo->queries, 0)));
	return true;
}

/* ---- A list ---- */

static void print_explain(const opd_explain *explain)
{
	(void)printf("         list of the %s; dispatch walks ", shown(explain->level));
	for (uint32_t i = 0; i < explain->effective_count; i++)
		(void)printf("%s%s", i == 0 ? "" : ", ", shown(explain->effective[i]));
	(void)putchar('\n');
	for (uint32_t i = 0; i < explain->skip_count; i++)
		(void)printf("         skipped %s: %s\n", shown(explain->skipped[i].provider), shown(explain->skipped[i].reason));
}

static bool was_skipped(const opd_explain *explain, const char *provider, opd_reason_code code)
{
	for (uint32_t i = 0; i < explain->skip_count; i++)
		if (strcmp(explain->skipped[i].provider, provider) == 0)
			return explain->skipped[i].code == code || code == OPD_REASON_NONE;
	return false;
}

/* The names that go into the demo's lists: the one that can't run here, where there is one, then cpu, then native. */
static size_t list_of(const struct demo *demo, const char *names[3])
{
	size_t count = 0;
	if (demo->missing[0] != '\0')
		names[count++] = demo->missing;
	names[count++] = "cpu";
	names[count++] = "native";
	return count;
}

/* A copy of rows that lies column by column, with a gap behind each column, so that a single row isn't contiguous either. NULL: no memory. */
static unsigned char *copy_by_columns(const opd_tensor *rows)
{
	const size_t bytes = opd_dtype_bytes(rows->dtype);
	const uint64_t height = (uint64_t)rows->shape[0], width = (uint64_t)rows->shape[1];
	unsigned char *copy = calloc(width * (height + 1), bytes);
	for (uint64_t i = 0; copy != NULL && i < rows->elements; i++)
		memcpy(copy + (i % width * (height + 1) + i / width) * bytes, (const unsigned char *)opd_tensor_data(rows) + i * bytes, bytes);
	return copy;
}

static void check_strict(struct demo *demo, const opd_operand *x, const char *const *names, size_t count)
{
	opd_request *request = rms_norm_request(&demo->model, x);
	opd_request_priority(request, names, count);
	opd_request_strict(request, true);
	opd_error error = {0};
	opd_result *result = NULL;
	const opd_status status = opd_run(demo->client, request, &result, &error);
	demo_check(demo, status == OPD_FAILED_PRECONDITION && strstr(error.text, "cpu (layout") != NULL,
	           "the same without native, strict: refused with %s\n         %s", opd_status_name(status), shown(error.text));
	opd_result_destroy(result);
	opd_request_destroy(request);
}

/* cpu takes rows whose elements are neighbours only: the predicate says so before anything runs. */
static bool run_list(struct demo *demo, const opd_operand *x, const char *const *names, size_t count)
{
	opd_request *request = rms_norm_request(&demo->model, x);
	opd_request_priority(request, names, count);
	opd_result *result = run_explained(demo, request);
	if (result == NULL)
		return false;
	const opd_explain *explain = opd_result_explain(result);
	const struct demo_distance distance =
	    demo_compare_rms_norm(&demo->model, opd_result_tensor(demo->rows, 0), DEMO_EPSILON, opd_result_tensor(result, 0));
	const bool skipped = explain != NULL && was_skipped(explain, "cpu", OPD_REASON_LAYOUT) &&
	                     (demo->missing[0] == '\0' || was_skipped(explain, demo->missing, OPD_REASON_NONE));
	demo_check(demo, skipped && ran_on(result, "native") && distance.share <= 1,
	           "rms_norm of rows that lie column by column: %s ran it, and right", shown(opd_result_provider(result)));
	if (explain != NULL)
		print_explain(explain);
	opd_result_destroy(result);
	return true;
}

bool part_list(struct demo *demo)
{
	const char *names[3];
	const size_t count = list_of(demo, names);
	(void)puts("\n2. A priority list: who can't run here is passed over, who refuses the arguments too; the next runs");
	const opd_tensor *rows = opd_result_tensor(demo->rows, 0);
	unsigned char *copy = copy_by_columns(rows);
	if (copy == NULL)
		return false;
	opd_operand x = operand_of_tensor(rows);
	const int64_t strides[2] = {1, rows->shape[0] + 1};
	x.data = copy;
	x.strides = strides;
	const bool ran = run_list(demo, &x, names, count);
	if (ran)
		check_strict(demo, &x, names, count - 1);
	free(copy);
	return ran;
}

/* ---- Asking without running ---- */

static void check_fake(struct demo *demo)
{
	const int64_t many = INT64_C(1000000000), width = demo->model.query.shape[1];
	const opd_operand x = {.struct_bytes = sizeof x,
	                       .dtype = demo->model.table.dtype,
	                       .rank = 2,
	                       .shape = (const int64_t[]){many, width},
	                       .source = OPD_FROM_NOTHING};
	opd_request *request = linear_request(&demo->model, &x);
	opd_request_mode(request, OPD_MODE_FAKE);
	opd_result *result = run(demo, request);
	const opd_tensor *tensor = result == NULL ? NULL : opd_result_tensor(result, 0);
	const bool right = tensor != NULL && tensor->rank == 2 && tensor->shape[0] == many &&
	                   tensor->shape[1] == demo->model.query.shape[0] && tensor->data == NULL;
	demo_check(demo, right, "fake: linear of [%lld, %lld] would give [%lld, %lld]; no element was sent or computed",
	           (long long)many, (long long)width, right ? (long long)tensor->shape[0] : -1,
	           right ? (long long)tensor->shape[1] : -1);
	opd_result_destroy(result);
}

static void check_dry(struct demo *demo)
{
	const char *names[3];
	const size_t count = list_of(demo, names);
	const opd_operand x = operand_of_tensor(opd_result_tensor(demo->rows, 0));
	opd_request *request = rms_norm_request(&demo->model, &x);
	opd_request_mode(request, OPD_MODE_DRY);
	opd_request_priority(request, names, count);
	opd_result *result = run_explained(demo, request);
	demo_check(demo, result != NULL && ran_on(result, "cpu") && opd_result_explain(result) != NULL,
	           "dry: rms_norm of the whole row would run on %s", result == NULL ? "nobody" : shown(opd_result_provider(result)));
	opd_result_destroy(result);
}

/* The norm's weight is one element short. */
static void check_refusal(struct demo *demo)
{
	struct demo_model wrong = demo->model;
	wrong.norm.shape[0]--;
	const opd_operand x = operand_of_tensor(opd_result_tensor(demo->rows, 0));
	opd_request *request = rms_norm_request(&wrong, &x);
	opd_error error = {0};
	opd_result *result = NULL;
	const opd_status status = opd_run(demo->client, request, &result, &error);
	demo_check(demo, status == OPD_INVALID_ARGUMENT, "a weight that is too short: refused with %s\n         %s",
	           opd_status_name(status), shown(error.text));
	opd_result_destroy(result);
	opd_request_destroy(request);
}

bool part_dry(struct demo *demo)
{
	(void)puts("\n3. Asking without running, and a call that can't be right");
	check_fake(demo);
	check_dry(demo);
	check_refusal(demo);
	opd_error error;
	const opd_status status = opd_ping(demo->client, &error);
	if (status != OPD_OK)
		return failed("the ping after it", status, &error);
	demo_check(demo, true, "the session goes on: a ping was answered");
	return true;
}
