/* What the demo shows of a session: its lists, its tensors, its requests in flight. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/examples/demo.h"

static opd_request *norm_request(const struct demo *demo)
{
	const opd_operand x = operand_of_tensor(opd_result_tensor(demo->rows, 0));
	return rms_norm_request(&demo->model, &x);
}

/* ---- Lists of the session ---- */

/* Which provider runs the norm now, by no list but what holds for the session. The result is right either way. */
static void check_norm(struct demo *demo, const char *when, const char *expected)
{
	const opd_priority *priority = NULL;
	opd_error error;
	const opd_status status = opd_priority_get(demo->client, "rms_norm", &priority, &error);
	opd_result *result = run(demo, norm_request(demo));
	const bool right = result != NULL && status == OPD_OK && ran_on(result, expected) &&
	                   demo_compare_rms_norm(&demo->model, opd_result_tensor(demo->rows, 0), DEMO_EPSILON,
	                                         opd_result_tensor(result, 0))
	                           .share <= 1;
	demo_check(demo, right, "%s: %s ran rms_norm, by the list of the %s", when,
	           result == NULL ? "nobody" : shown(opd_result_provider(result)),
	           status == OPD_OK ? shown(priority->level) : "(unknown)");
	opd_result_destroy(result);
	opd_document_free(priority);
}

bool part_session(struct demo *demo)
{
	(void)puts("\n4. Lists of this session: pushed, popped; no other session sees them");
	const char *before = opd_result_provider(demo->normed);
	const opd_priority_entry entry = {.op = "rms_norm", .providers = (const char *const[]){"native"}, .count = 1};
	const opd_priority_entry unknown = {.op = "rms_norm", .providers = (const char *const[]){"abacus"}, .count = 1};
	opd_error error;
	check_norm(demo, "at first", before);
	opd_status status = opd_priority_push(demo->client, &entry, 1, &error);
	if (status != OPD_OK)
		return failed("pushing a list", status, &error);
	check_norm(demo, "after push", "native");
	status = opd_priority_push(demo->client, &unknown, 1, &error);
	demo_check(demo, status == OPD_NOT_FOUND, "a list with a name that nobody has changes nothing: %s: %s",
	           opd_status_name(status), status == OPD_OK ? "" : shown(error.text));
	status = opd_priority_pop(demo->client, &error);
	if (status != OPD_OK)
		return failed("popping the list", status, &error);
	check_norm(demo, "after pop", before);
	return true;
}

/* ---- Results that stay ---- */

/* Submits and destroys the request, whose output 0 stays and comes back only if `copy`. */
static bool submit_kept(struct demo *demo, opd_request *request, bool copy, opd_ticket *ticket_out)
{
	opd_error error;
	opd_request_output(request, 0, true, copy);
	const opd_status status = opd_submit(demo->client, request, ticket_out, &error);
	opd_request_destroy(request);
	return status == OPD_OK || failed("submitting", status, &error);
}

static opd_result *wait_for(struct demo *demo, opd_ticket ticket)
{
	opd_error error;
	opd_result *result = NULL;
	const opd_status status = opd_wait(demo->client, ticket, UINT64_MAX, &result, &error);
	if (status == OPD_OK)
		return result;
	opd_result_destroy(result);
	(void)failed("a request", status, &error);
	return NULL;
}

static bool submit_chain(struct demo *demo, opd_ticket tickets[3])
{
	if (!submit_kept(demo, embedding_request(&demo->model), false, &tickets[0]))
		return false;
	const opd_operand rows = operand_of_result(tickets[0]);
	if (!submit_kept(demo, rms_norm_request(&demo->model, &rows), false, &tickets[1]))
		return false;
	const opd_operand normed = operand_of_result(tickets[1]);
	return submit_kept(demo, linear_request(&demo->model, &normed), true, &tickets[2]);
}

/* Frees the three; then the first handle names nothing any more. */
static bool check_freed(struct demo *demo, const opd_handle handles[3])
{
	opd_error error = {0};
	opd_status status = opd_free(demo->client, handles, 3, &error);
	if (status != OPD_OK)
		return failed("freeing kept tensors", status, &error);
	const opd_operand gone = {.struct_bytes = sizeof gone, .source = OPD_FROM_HANDLE, .handle = handles[0]};
	opd_request *request = rms_norm_request(&demo->model, &gone);
	opd_result *result = NULL;
	status = opd_run(demo->client, request, &result, &error);
	demo_check(demo, status == OPD_NOT_FOUND, "freed; whoever names one now is told so: %s: %s", opd_status_name(status),
	           shown(error.text));
	opd_result_destroy(result);
	opd_request_destroy(request);
	return true;
}

bool part_kept(struct demo *demo)
{
	(void)puts("\n5. Kept results: the three ops sent at once, each naming the result of the one before, which isn't there yet");
	opd_ticket tickets[3];
	if (!submit_chain(demo, tickets))
		return false;
	opd_handle handles[3];
	bool kept = true, right = false;
	for (size_t i = 0; i < 3; i++) {
		opd_result *result = wait_for(demo, tickets[i]);
		if (result == NULL)
			return false;
		handles[i] = opd_result_handle(result, 0);
		kept = kept && handles[i].generation != 0;
		if (i == 2)
			right = same_bits(result, demo->queries);
		opd_result_destroy(result);
	}
	demo_check(demo, kept && right, "only the last came back, with the bits of part 1; three tensors stay in the session");
	return check_freed(demo, handles);
}

/* ---- Many in flight ---- */

enum { IN_FLIGHT = 256 };

static uint64_t now_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* cpu promises that a row's bits don't depend on the rows beside it; other providers need not. */
static const char *const on_cpu[] = {"cpu"};

/* Submits the norm of row number `index` modulo tokens. */
static bool submit_row(struct demo *demo, size_t index, opd_ticket *ticket_out)
{
	const opd_tensor *rows = opd_result_tensor(demo->rows, 0);
	const int64_t width = rows->shape[1];
	const size_t row = index % (size_t)demo->model.tokens;
	const opd_operand x = {
	    .struct_bytes = sizeof x,
	    .dtype = rows->dtype,
	    .rank = 2,
	    .shape = (const int64_t[]){1, width},
	    .data = (const unsigned char *)opd_tensor_data(rows) + row * (size_t)width * opd_dtype_bytes(rows->dtype),
	};
	opd_error error;
	opd_request *request = rms_norm_request(&demo->model, &x);
	opd_request_priority(request, on_cpu, 1);
	const opd_status status = opd_submit(demo->client, request, ticket_out, &error);
	opd_request_destroy(request);
	return status == OPD_OK || failed("submitting", status, &error);
}

/* The bits of that row of `all`. */
static bool is_row(const opd_tensor *all, const opd_result *result, size_t row)
{
	const opd_tensor *one = opd_result_tensor(result, 0);
	if (one == NULL || one->data == NULL || one->dtype != all->dtype || one->elements != (uint64_t)all->shape[1])
		return false;
	const size_t row_bytes = (size_t)one->elements * opd_dtype_bytes(one->dtype);
	return memcmp(opd_tensor_data(one), (const unsigned char *)opd_tensor_data(all) + row * row_bytes, row_bytes) == 0;
}

/* Takes one answer, whichever comes first, and counts it where it is right. */
static bool take_one(struct demo *demo, const opd_tensor *all, const opd_ticket *tickets, size_t *right)
{
	opd_error error;
	opd_ticket ticket = 0;
	opd_result *result = NULL;
	const opd_status status = opd_wait_any(demo->client, UINT64_MAX, &ticket, &result, &error);
	if (status != OPD_OK) {
		opd_result_destroy(result);
		return failed("a request in flight", status, &error);
	}
	for (size_t i = 0; i < IN_FLIGHT; i++)
		if (tickets[i] == ticket && is_row(all, result, i % (size_t)demo->model.tokens))
			(*right)++;
	opd_result_destroy(result);
	return true;
}

static bool fly(struct demo *demo, const opd_tensor *all)
{
	opd_ticket tickets[IN_FLIGHT];
	size_t right = 0;
	const uint64_t began = now_ns();
	for (size_t i = 0; i < IN_FLIGHT; i++)
		if (!submit_row(demo, i, &tickets[i]))
			return false;
	for (size_t i = 0; i < IN_FLIGHT; i++)
		if (!take_one(demo, all, tickets, &right))
			return false;
	demo_check(demo, right == IN_FLIGHT && opd_in_flight(demo->client) == 0,
	           "%zu rows of rms_norm, one a request, in %.2f ms: each has the bits that it has in one call of all rows", right,
	           (double)(now_ns() - began) / 1e6);
	return true;
}

bool part_flight(struct demo *demo)
{
	(void)printf("\n6. %d requests in flight on this one connection, answered as they finish\n", IN_FLIGHT);
	opd_request *request = norm_request(demo);
	opd_request_priority(request, on_cpu, 1);
	opd_result *all = run(demo, request);
	bool right = false;
	if (all != NULL) {
		const opd_tensor *tensor = opd_result_tensor(all, 0), *rows = opd_result_tensor(demo->rows, 0);
		if (tensor != NULL && tensor->data != NULL && opd_tensor_same_shape(tensor, rows))
			right = fly(demo, tensor);
		else
			demo_check(demo, false, "rms_norm gave another shape than its x has");
	}
	opd_result_destroy(all);
	return right;
}

/* ---- Without frames ---- */

bool part_direct(struct demo *demo)
{
	opd_error error;
	(void)puts("\n7. Without frames: calls straight into the dispatcher, where the daemon is in this process");
	opd_status status = opd_direct_begin(demo->client, &error);
	if (status == OPD_FAILED_PRECONDITION) {
		(void)printf("  -      not here: %s\n", shown(error.text));
		return true;
	}
	if (status != OPD_OK)
		return failed("the direct path", status, &error);
	opd_result *result = run(demo, norm_request(demo));
	demo_check(demo, result != NULL && same_bits(result, demo->normed) && ran_on(result, opd_result_provider(demo->normed)),
	           "the same provider, the same bits");
	opd_result_destroy(result);
	opd_direct_end(demo->client);
	return true;
}
