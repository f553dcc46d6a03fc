/* server/pins.h: what of host memory is locked, when, and that whoever locked it is asked to unlock it. */
#include <check.h>
#include <stdlib.h>

#include "server/pins.h"
#include "server/registry.h"

enum { PAGE = 4096 };

static unsigned char *memory;
static unsigned locks, unlocks;
static void *last_unlocked;
static bool refuse;

static opd_status lock(void *state, void *base, uint64_t bytes, opd_error *error)
{
	(void)state, (void)base, (void)bytes;
	locks++;
	return refuse ? opd_fail(error, OPD_RESOURCE_EXHAUSTED, "no") : OPD_OK;
}

static void unlock(void *state, void *base)
{
	(void)state;
	unlocks++;
	last_unlocked = base;
}

static void *mapped(void *state, uint32_t ordinal, void *host)
{
	(void)state, (void)ordinal;
	return (unsigned char *)host + 1;
}

static int state, other_state;
static const opd_backend backend = {.struct_bytes = sizeof backend, .host_register = lock, .host_unregister = unlock, .host_mapped = mapped};
static const struct device device = {.backend = &backend, .state = &state};

static void setup(void)
{
	locks = unlocks = 0;
	refuse = false;
	memory = aligned_alloc(PAGE, 4 * PAGE);
	ck_assert_ptr_nonnull(memory);
}

static void teardown(void)
{
	free(memory);
}

static bool use(const void *at, uint64_t bytes)
{
	void *place;
	return pins_use(&device, at, bytes, &place);
}

START_TEST(memory_is_locked_as_a_whole_when_it_comes_for_the_second_time)
{
	void *place;
	pins_add(memory, 2 * PAGE);
	ck_assert(!use(memory + 64, 100));
	ck_assert_uint_eq(locks, 0);
	ck_assert(pins_use(&device, memory + PAGE, PAGE, &place));
	ck_assert_ptr_eq(place, memory + PAGE + 1);
	ck_assert(use(memory, 2 * PAGE));
	ck_assert_uint_eq(locks, 1);
	pins_remove(memory);
	ck_assert_uint_eq(unlocks, 1);
	ck_assert_ptr_eq(last_unlocked, memory);
}
END_TEST

START_TEST(what_is_not_known_or_reaches_past_it_is_never_locked)
{
	pins_add(memory + PAGE, PAGE);
	for (int i = 0; i < 3; i++) {
		ck_assert(!use(memory, PAGE));
		ck_assert(!use(memory + PAGE + 1, PAGE));
		ck_assert(!use(memory + 2 * PAGE, 1));
		ck_assert(!use(memory + PAGE, UINT64_MAX));
	}
	pins_remove(memory + PAGE);
	pins_remove(memory); /* never added */
	ck_assert(!use(memory + PAGE, 1));
	ck_assert_uint_eq(locks + unlocks, 0);
}
END_TEST

START_TEST(neighbours_are_locked_each_for_itself)
{
	for (int i = 3; i >= 0; i--)
		pins_add(memory + i * PAGE, PAGE);
	for (int i = 0; i < 2; i++)
		(void)use(memory + 2 * PAGE, 8);
	ck_assert_uint_eq(locks, 1);
	ck_assert(!use(memory + PAGE, 8));
	ck_assert(!use(memory + 3 * PAGE, 8));
	for (int i = 0; i < 4; i++)
		pins_remove(memory + i * PAGE);
	ck_assert_uint_eq(unlocks, 1);
	ck_assert_ptr_eq(last_unlocked, memory + 2 * PAGE);
}
END_TEST

START_TEST(a_driver_that_refuses_is_not_asked_again)
{
	refuse = true;
	pins_add(memory, PAGE);
	for (int i = 0; i < 5; i++)
		ck_assert(!use(memory, PAGE));
	ck_assert_uint_eq(locks, 1);
	pins_remove(memory);
	ck_assert_uint_eq(unlocks, 0);
}
END_TEST

START_TEST(no_more_is_locked_than_the_process_may)
{
	pins_add(memory, PINS_BYTES_MAX + 1); /* only its address counts here */
	ck_assert(!use(memory, 1) && !use(memory, 1));
	ck_assert_uint_eq(locks, 0);
	pins_remove(memory);
	pins_add(memory, PINS_BYTES_MAX - PAGE);
	ck_assert(!use(memory, 1) && use(memory, 1));
	pins_remove(memory); /* what it took is there again */
	pins_add(memory, PAGE);
	ck_assert(!use(memory, 1) && use(memory, 1));
	pins_remove(memory);
}
END_TEST

START_TEST(a_backend_that_ends_is_asked_to_unlock_what_it_has_locked_and_nothing_later)
{
	const struct device other = {.backend = &backend, .state = &other_state};
	void *place;
	pins_add(memory, PAGE);
	pins_add(memory + PAGE, PAGE);
	for (int i = 0; i < 2; i++) {
		(void)use(memory, PAGE);
		(void)pins_use(&other, memory + PAGE, PAGE, &place);
	}
	ck_assert(!pins_use(&other, memory, PAGE, &place)); /* locked, but not by this one */
	pins_forget(&state);
	ck_assert_uint_eq(unlocks, 1);
	ck_assert_ptr_eq(last_unlocked, memory);
	pins_remove(memory);
	ck_assert_uint_eq(unlocks, 1);
	pins_remove(memory + PAGE);
	ck_assert_uint_eq(unlocks, 2);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("pins");
	TCase *tests = tcase_create("pins");
	tcase_add_checked_fixture(tests, setup, teardown);
	tcase_add_test(tests, memory_is_locked_as_a_whole_when_it_comes_for_the_second_time);
	tcase_add_test(tests, what_is_not_known_or_reaches_past_it_is_never_locked);
	tcase_add_test(tests, neighbours_are_locked_each_for_itself);
	tcase_add_test(tests, a_driver_that_refuses_is_not_asked_again);
	tcase_add_test(tests, no_more_is_locked_than_the_process_may);
	tcase_add_test(tests, a_backend_that_ends_is_asked_to_unlock_what_it_has_locked_and_nothing_later);
	suite_add_tcase(suite, tests);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	const int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
