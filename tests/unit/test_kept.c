/* A session's kept tensors: waiting, settling, failing, in numbers that a hostile client may choose. */
#include <check.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "server/kept.h"

/* A request of a chain: it waits for `needs` and has a kept output itself. */
struct link {
	struct waiter waiter; /* first */
	struct kept *kept;
	uint64_t request;
	bool told;
	bool failed;
	uint64_t stack; /* where its callback's frame was */
};

static void on_settled(struct waiter *waiter, struct kept_tensor *tensor, const opd_error *error)
{
	struct link *link = (struct link *)waiter;
	ck_assert(!link->told);
	link->told = true;
	link->failed = tensor == NULL;
	link->stack = (uint64_t)(uintptr_t)__builtin_frame_address(0); /* a local may lie elsewhere under AddressSanitizer */
	if (tensor == NULL) {
		ck_assert_int_eq(error->status, OPD_ABORTED);
		kept_fail(link->kept, link->request);
	} else {
		struct msg_handle handle = {0};
		struct kept_tensor *own[] = {kept_tensor_ref(tensor)};
		kept_settle(link->kept, link->request, own, 1, &handle);
		kept_tensor_unref(tensor);
	}
}

static void wait_for(struct link *link, struct kept *kept, uint64_t request, uint64_t needs)
{
	opd_error error;
	*link = (struct link){.waiter.on_settled = on_settled, .kept = kept, .request = request};
	ck_assert_int_eq(kept_expect(kept, request, 1, &error), OPD_OK);
	kept_wait(kept, needs, &link->waiter);
}

static struct memory memory;
static struct account *account;

static void begin(struct kept *kept, uint32_t limit)
{
	opd_error error;
	memory_init(&memory, 1u << 20, 0);
	account = account_create(&memory, 1u << 20);
	kept_init(kept, limit);
	ck_assert_int_eq(kept_expect(kept, 1, 1, &error), OPD_OK);
}

static void end(struct kept *kept)
{
	kept_fini(kept);
	account_unref(account);
	memory_fini(&memory);
}

static struct kept_tensor *make_tensor(void)
{
	struct buffer *buffer;
	opd_error error;
	const int64_t shape[] = {4};
	ck_assert_int_eq(buffer_alloc(account, 16, 0, &buffer, &error), OPD_OK);
	struct kept_tensor *tensor = kept_tensor_create(OPD_f32, 1, shape, 16, buffer);
	buffer_unref(buffer);
	return tensor;
}

static uint64_t spread(const struct link *links, uint32_t count)
{
	uint64_t low = UINT64_MAX, high = 0;
	for (uint32_t i = 0; i < count; i++) {
		low = links[i].stack < low ? links[i].stack : low;
		high = links[i].stack > high ? links[i].stack : high;
	}
	return high - low;
}

#define MANY 5000u

START_TEST(a_chain_of_failures_is_no_deep_stack)
{
	struct kept kept;
	struct link *links = calloc(MANY, sizeof links[0]);
	begin(&kept, MANY + 1);
	for (uint32_t i = 0; i < MANY; i++)
		wait_for(&links[i], &kept, i + 2, i + 1);
	kept_fail(&kept, 1);
	for (uint32_t i = 0; i < MANY; i++)
		ck_assert(links[i].told && links[i].failed);
	ck_assert_uint_lt(spread(links, MANY), 4096);
	ck_assert_uint_eq(kept.live, 0);
	free(links);
	end(&kept);
}
END_TEST

START_TEST(a_chain_of_results_is_no_deep_stack)
{
	struct kept kept;
	struct link *links = calloc(MANY, sizeof links[0]);
	struct msg_handle handle = {0};
	begin(&kept, MANY + 1);
	for (uint32_t i = 0; i < MANY; i++)
		wait_for(&links[i], &kept, i + 2, i + 1);
	struct kept_tensor *tensors[] = {make_tensor()};
	kept_settle(&kept, 1, tensors, 1, &handle);
	for (uint32_t i = 0; i < MANY; i++)
		ck_assert(links[i].told && !links[i].failed);
	ck_assert_uint_lt(spread(links, MANY), 4096);
	ck_assert_uint_eq(kept.live, MANY + 1);
	free(links);
	end(&kept);
}
END_TEST

/* More waiters than failures are remembered: the failed result itself must outlive their calls. */
START_TEST(a_failure_tells_more_waiters_than_are_remembered)
{
	struct kept kept;
	struct link *links = calloc(MANY, sizeof links[0]);
	opd_error error;
	bool pending;
	begin(&kept, MANY + 1);
	for (uint32_t i = 0; i < MANY; i++)
		wait_for(&links[i], &kept, i + 2, 1);
	kept_fail(&kept, 1);
	for (uint32_t i = 0; i < MANY; i++)
		ck_assert(links[i].told && links[i].failed);
	ck_assert_ptr_null(kept_find_result(&kept, MANY + 1, 0, &pending, &error)); /* the newest is remembered */
	ck_assert_int_eq(error.status, OPD_ABORTED);
	ck_assert_ptr_null(kept_find_result(&kept, 1, 0, &pending, &error)); /* the oldest isn't any more */
	ck_assert_int_eq(error.status, OPD_NOT_FOUND);
	free(links);
	end(&kept);
}
END_TEST

static uint64_t now_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The time of 30000 requests that keep their output, and of as many look-ups. */
static uint64_t time_ids(uint64_t step)
{
	struct kept kept;
	opd_error error;
	bool pending;
	uint64_t begun = now_ns();
	begin(&kept, 65536);
	for (uint64_t i = 1; i < 30000; i++)
		ck_assert_int_eq(kept_expect(&kept, 1 + i * step, 1, &error), OPD_OK);
	for (uint64_t i = 1; i < 30000; i++)
		(void)kept_find_result(&kept, 1 + i * step, 0, &pending, &error);
	end(&kept);
	return now_ns() - begun;
}

/* 2^48 × 30000 wraps around: the step is what a plain multiplicative hash of the upper half, or the lower bits, would put into few buckets. */
START_TEST(ids_that_a_client_chooses_cost_no_more_than_others)
{
	uint64_t plain = time_ids(1);
	ck_assert_uint_lt(time_ids(1ull << 48), plain * 10 + 50000000u);
	ck_assert_uint_lt(time_ids(0xf1de83e19937733du << 18), plain * 10 + 50000000u); /* the inverse of 0x9e37…7c15, times 2^18 */
}
END_TEST

START_TEST(one_that_stops_waiting_is_not_called_and_the_others_are)
{
	enum { COUNT = 5 };
	struct link links[COUNT];
	struct link never = {0};
	struct kept kept;
	begin(&kept, 100);
	for (uint32_t i = 0; i < COUNT; i++)
		wait_for(&links[i], &kept, 2 + i, 1);
	ck_assert(kept_unwait(&links[2].waiter)); /* amid, first, last */
	ck_assert(kept_unwait(&links[0].waiter));
	ck_assert(kept_unwait(&links[COUNT - 1].waiter));
	ck_assert(!kept_unwait(&links[2].waiter));
	ck_assert(!kept_unwait(&never.waiter));
	kept_wait(&kept, 1, &links[2].waiter); /* and again, behind the others */
	kept_fail(&kept, 1);
	for (uint32_t i = 0; i < COUNT; i++)
		ck_assert_int_eq(links[i].told, i != 0 && i != COUNT - 1);
	ck_assert(!kept_unwait(&links[1].waiter));
	kept_fail(&kept, links[0].request);
	kept_fail(&kept, links[COUNT - 1].request);
	end(&kept);
}
END_TEST

/* ---- Lends ---- */

enum { LENDS = 3, ORDERS = 6, OUTCOMES = 1 << LENDS };
static const unsigned orders[ORDERS][LENDS] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};

/* Those whose bit is set succeed; the handle that the client knows then. */
static struct msg_handle lend_in_turn(struct kept *kept, struct msg_handle first, const unsigned order[LENDS], unsigned outcome)
{
	opd_error error;
	struct kept_lend lends[LENDS];
	struct msg_handle handles[LENDS];
	struct msg_handle known = first;
	const uint64_t lineage = kept_lineage(kept, first, &error);
	for (unsigned i = 0; i < LENDS; i++) {
		handles[i] = kept_lend(kept, first.index, 10 + i, &lends[i]);
		ck_assert(kept_find(kept, known, &error) == NULL);
		if ((outcome >> i & 1) != 0)
			known = handles[i];
	}
	for (unsigned i = 0; i < LENDS; i++)
		kept_returned(kept, first.index, lineage, &lends[order[i]], (outcome >> order[i] & 1) != 0);
	return known;
}

START_TEST(whatever_runs_end_before_others_the_last_handle_that_was_told_is_good)
{
	for (unsigned outcome = 0; outcome < OUTCOMES; outcome++)
		for (unsigned order = 0; order < ORDERS; order++) {
			struct kept kept;
			opd_error error;
			begin(&kept, 10);
			struct msg_handle first = kept_add(&kept, make_tensor(), &error);
			const struct msg_handle known = lend_in_turn(&kept, first, orders[order], outcome);
			struct kept_tensor *tensor = kept_find(&kept, known, &error);
			ck_assert_msg(tensor != NULL, "outcome %u, order %u: %s", outcome, order, error.text);
			kept_tensor_unref(tensor);
			ck_assert_int_eq(kept_free(&kept, known, &error), OPD_OK);
			kept_fail(&kept, 1);
			end(&kept);
		}
}
END_TEST

START_TEST(a_run_that_is_still_on_its_way_has_the_tensor_whoever_ended_behind_it)
{
	struct kept kept;
	opd_error error;
	struct kept_lend first, second;
	begin(&kept, 10);
	const struct msg_handle handle = kept_add(&kept, make_tensor(), &error);
	const uint64_t lineage = kept_lineage(&kept, handle, &error);
	const struct msg_handle given = kept_lend(&kept, handle.index, 10, &first);
	(void)kept_lend(&kept, handle.index, 11, &second);
	kept_returned(&kept, handle.index, lineage, &second, false);
	ck_assert(kept_find(&kept, handle, &error) == NULL);
	ck_assert_msg(error.status == OPD_FAILED_PRECONDITION && strstr(error.text, "was donated to request 10") != NULL, "%s", error.text);
	ck_assert(kept_find(&kept, given, &error) == NULL);
	ck_assert_int_eq(kept_free(&kept, given, &error), OPD_FAILED_PRECONDITION);
	kept_returned(&kept, handle.index, lineage, &first, true);
	ck_assert_int_eq(kept_free(&kept, given, &error), OPD_OK);
	kept_fail(&kept, 1);
	end(&kept);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("kept");
	TCase *tests = tcase_create("kept");
	tcase_set_timeout(tests, 60);
	tcase_add_test(tests, a_chain_of_failures_is_no_deep_stack);
	tcase_add_test(tests, a_chain_of_results_is_no_deep_stack);
	tcase_add_test(tests, a_failure_tells_more_waiters_than_are_remembered);
	tcase_add_test(tests, ids_that_a_client_chooses_cost_no_more_than_others);
	tcase_add_test(tests, one_that_stops_waiting_is_not_called_and_the_others_are);
	tcase_add_test(tests, whatever_runs_end_before_others_the_last_handle_that_was_told_is_good);
	tcase_add_test(tests, a_run_that_is_still_on_its_way_has_the_tensor_whoever_ended_behind_it);
	suite_add_tcase(suite, tests);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
