/* server/placement.h: what an op has cost on each device. Where work goes then is test_modules.py's. */
#include <check.h>
#include <stdlib.h>

#include "server/placement.h"
#include "tests/lib/suite.h"

#define SECOND UINT64_C(1000000000)

static const struct impl impl = {.index = 3};
static const struct impl other = {.index = 4};

static struct placement *placement;

static void setup(void)
{
	placement = placement_create();
	ck_assert_ptr_nonnull(placement);
}

static void teardown(void)
{
	placement_destroy(placement);
}

static uint64_t cost(uint32_t device, uint64_t bytes, uint64_t now_ns)
{
	return placement_cost_ns(placement, &impl, device, bytes, now_ns);
}

START_TEST(the_first_run_of_a_size_on_a_device_is_not_believed)
{
	ck_assert_uint_eq(cost(1, 4096, SECOND), 0);
	placement_note(placement, &impl, 1, 4096, 900000, SECOND); /* the kernel was built */
	ck_assert_uint_eq(cost(1, 4096, SECOND), 0);
	placement_note(placement, &impl, 1, 4096, 1000, SECOND);
	ck_assert_uint_eq(cost(1, 4096, SECOND), 1000);
}
END_TEST

START_TEST(costs_of_other_devices_sizes_and_implementations_are_their_own)
{
	for (int i = 0; i < 2; i++) {
		placement_note(placement, &impl, 1, 4096, 1000, SECOND);
		placement_note(placement, &impl, 2, 4096, 2000, SECOND);
		placement_note(placement, &impl, 1, 1u << 20, 3000, SECOND);
		placement_note(placement, &impl, 1, UINT64_MAX, 5000, SECOND);
		placement_note(placement, &other, 1, 4096, 4000, SECOND);
	}
	ck_assert_uint_eq(cost(1, 4096, SECOND), 1000);
	ck_assert_uint_eq(cost(1, 5000, SECOND), 1000); /* the same class */
	ck_assert_uint_eq(cost(2, 4096, SECOND), 2000);
	ck_assert_uint_eq(cost(1, 1u << 20, SECOND), 3000);
	ck_assert_uint_eq(cost(1, UINT64_MAX, SECOND), 5000);
	ck_assert_uint_eq(cost(1, 0, SECOND), 0);
	ck_assert_uint_eq(cost(REGISTRY_DEVICES_MAX - 1, 4096, SECOND), 0);
	ck_assert_uint_eq(placement_cost_ns(placement, &other, 1, 4096, SECOND), 4000);
}
END_TEST

START_TEST(a_cost_follows_what_is_measured_and_one_run_does_not_make_it)
{
	for (int i = 0; i < 10; i++)
		placement_note(placement, &impl, 1, 4096, 1000, SECOND);
	const uint64_t before = cost(1, 4096, SECOND);
	ck_assert(before >= 990 && before <= 1010);
	placement_note(placement, &impl, 1, 4096, 100000, SECOND);
	ck_assert_uint_lt(cost(1, 4096, SECOND), 30000);
	for (int i = 0; i < 40; i++)
		placement_note(placement, &impl, 1, 4096, 8000, SECOND);
	const uint64_t after = cost(1, 4096, SECOND);
	ck_assert(after >= 7900 && after <= 8100);
	placement_note(placement, &impl, 1, 4096, UINT64_MAX, SECOND); /* more than fits */
	ck_assert_uint_lt(cost(1, 4096, SECOND), UINT64_C(1) << 40);
}
END_TEST

START_TEST(what_was_not_confirmed_for_a_minute_is_tried_again)
{
	placement_note(placement, &impl, 1, 4096, 1000000, SECOND);
	placement_note(placement, &impl, 1, 4096, 1000000, SECOND);
	ck_assert_uint_eq(cost(1, 4096, 60 * SECOND), 1000000);
	ck_assert_uint_eq(cost(1, 4096, 63 * SECOND), 0);
	placement_note(placement, &impl, 1, 4096, 1000, 63 * SECOND);
	ck_assert_uint_eq(cost(1, 4096, 63 * SECOND), 1000);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("placement");
	TCase *tests = tcase_create("costs");
	tcase_add_checked_fixture(tests, setup, teardown);
	tcase_add_test(tests, the_first_run_of_a_size_on_a_device_is_not_believed);
	tcase_add_test(tests, costs_of_other_devices_sizes_and_implementations_are_their_own);
	tcase_add_test(tests, a_cost_follows_what_is_measured_and_one_run_does_not_make_it);
	tcase_add_test(tests, what_was_not_confirmed_for_a_minute_is_tried_again);
	suite_add_tcase(suite, tests);
	return suite_run(suite);
}
