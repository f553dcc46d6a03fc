/* Derived copies: found, made, kept, dropped; bounded, never under a run that has them. */
#include <check.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "proto/tensor.h"
#include "server/derived.h"
#include "server/kept.h"

#define MIB ((uint64_t)1 << 20)
#define LIMIT (4 * MIB)

static struct memory memory;
static struct derived *derived;
static const char owner[2]; /* two modules' addresses */

static void begin(void)
{
	opd_error error;
	memory_init(&memory, 64 * MIB, 16 * MIB);
	ck_assert_int_eq(derived_create(&memory, LIMIT, &derived, &error), OPD_OK);
}

static void end(void)
{
	derived_destroy(derived);
	ck_assert_uint_eq(atomic_load(&memory.used_bytes), 0);
	memory_fini(&memory);
}

/* A constant operand of one dimension. */
struct operand {
	opd_tensor tensor;
	int64_t shape[1], strides[1];
};

static const opd_tensor *describe(struct operand *operand, uint64_t id, uint64_t version, int64_t elements, uint64_t byte_offset)
{
	operand->shape[0] = elements;
	operand->strides[0] = 1;
	tensor_describe(&operand->tensor, OPD_f32, 1, operand->shape, operand->strides, byte_offset);
	operand->tensor.id = id;
	operand->tensor.version = version;
	operand->tensor.flags |= OPD_TENSOR_CONSTANT;
	return &operand->tensor;
}

/* What a kernel does: finds a copy, else tries to make one. 'f', 'm', or '-': neither. *value_out: the copy's first byte. */
static char use_keyed(const void *module, const opd_tensor *tensor, const char *key, uint64_t bytes, unsigned char fill, unsigned char *value_out)
{
	struct derived_run run = {.count = 0};
	const uint32_t key_bytes = (uint32_t)strlen(key);
	const unsigned char *found = derived_find(derived, &run, module, tensor, key, key_bytes);
	char what = found != NULL ? 'f' : '-';
	if (found != NULL && value_out != NULL)
		*value_out = found[bytes - 1];
	unsigned char *made = found != NULL ? NULL : derived_make(derived, &run, module, tensor, key, key_bytes, bytes);
	if (made != NULL) {
		ck_assert_uint_eq((uintptr_t)made % OPD_TENSOR_ALIGNMENT, 0);
		memset(made, fill, bytes);
		derived_keep(derived, &run, made);
		what = 'm';
	}
	derived_end(derived, &run);
	return what;
}

static char use(const opd_tensor *tensor, uint64_t bytes)
{
	return use_keyed(&owner[0], tensor, "", bytes, 0, NULL);
}

/* Copies of `count` tensors from id `first` on, of `bytes`, in one pass; what happened to each. */
static const char *pass(uint64_t first, uint32_t count, uint64_t bytes)
{
	static char text[64];
	struct operand operand;
	ck_assert_uint_lt(count, sizeof text);
	for (uint32_t i = 0; i < count; i++)
		text[i] = use(describe(&operand, first + i, 1, 8, 0), bytes);
	text[count] = '\0';
	return text;
}

static struct derived_statistics counted(void)
{
	struct derived_statistics statistics;
	derived_count(derived, &statistics);
	return statistics;
}

START_TEST(a_copy_is_made_when_contents_come_again_and_found_from_then_on)
{
	struct operand operand;
	unsigned char value = 0;
	begin();
	const opd_tensor *tensor = describe(&operand, 7, 1, 8, 0);
	ck_assert_int_eq(use_keyed(&owner[0], tensor, "k", 100, 3, &value), '-');
	ck_assert_int_eq(use_keyed(&owner[0], tensor, "k", 100, 3, &value), 'm');
	for (int i = 0; i < 3; i++) {
		ck_assert_int_eq(use_keyed(&owner[0], tensor, "k", 100, 9, &value), 'f');
		ck_assert_int_eq(value, 3);
	}
	ck_assert_uint_eq(counted().copies, 1);
	ck_assert_uint_eq(counted().bytes, 100);
	ck_assert_uint_eq(counted().found, 3);
	ck_assert_uint_eq(counted().made, 1);
	ck_assert_uint_eq(atomic_load(&memory.used_bytes), 100);
	end();
}
END_TEST

START_TEST(copies_differ_by_version_view_key_and_module)
{
	struct operand operand;
	begin();
	const char *kinds[] = {"a", "b"};
	for (int round = 0; round < 3; round++)
		for (uint64_t version = 1; version <= 2; version++)
			for (int64_t elements = 8; elements <= 16; elements += 8)
				for (uint64_t offset = 0; offset <= 64; offset += 64)
					for (int key = 0; key < 2; key++)
						for (int module = 0; module < 2; module++) {
							unsigned char tag = (unsigned char)(version + (uint64_t)elements * 2 + offset + (uint64_t)key * 7 + (uint64_t)module * 131), value = tag;
							char what = use_keyed(&owner[module], describe(&operand, 5, version, elements, offset), kinds[key], 64, tag, &value);
							ck_assert_int_eq(what, round == 0 ? '-' : round == 1 ? 'm' : 'f');
							ck_assert_int_eq(value, tag);
						}
	ck_assert_uint_eq(counted().copies, 32);
	end();
}
END_TEST

START_TEST(contents_that_may_change_have_no_copies)
{
	struct operand operand;
	begin();
	opd_tensor *tensor = (opd_tensor *)describe(&operand, 0, 1, 8, 0);
	for (int i = 0; i < 3; i++)
		ck_assert_int_eq(use(tensor, 64), '-');
	tensor->id = 4;
	tensor->flags &= ~(uint32_t)OPD_TENSOR_CONSTANT;
	for (int i = 0; i < 3; i++)
		ck_assert_int_eq(use(tensor, 64), '-');
	ck_assert_uint_eq(counted().copies, 0);
	end();
}
END_TEST

START_TEST(a_copy_that_its_run_does_not_keep_goes_with_it)
{
	struct operand operand;
	struct derived_run run = {.count = 0};
	begin();
	const opd_tensor *tensor = describe(&operand, 7, 1, 8, 0);
	ck_assert_int_eq(use(tensor, 64), '-');
	ck_assert_ptr_nonnull(derived_make(derived, &run, &owner[0], tensor, NULL, 0, 64));
	derived_end(derived, &run);
	ck_assert_uint_eq(counted().bytes, 0);
	ck_assert_int_eq(use(tensor, 64), 'm'); /* and it can be made again */
	ck_assert_int_eq(use(tensor, 64), 'f');
	end();
}
END_TEST

START_TEST(one_run_makes_a_copy_and_the_others_do_without)
{
	struct operand operand;
	struct derived_run first = {.count = 0}, second = {.count = 0};
	begin();
	const opd_tensor *tensor = describe(&operand, 7, 1, 8, 0);
	ck_assert_int_eq(use(tensor, 64), '-');
	void *made = derived_make(derived, &first, &owner[0], tensor, NULL, 0, 64);
	ck_assert_ptr_nonnull(made);
	ck_assert_ptr_null(derived_find(derived, &second, &owner[0], tensor, NULL, 0));
	ck_assert_ptr_null(derived_make(derived, &second, &owner[0], tensor, NULL, 0, 64));
	derived_keep(derived, &first, made);
	derived_end(derived, &first);
	ck_assert_ptr_eq(derived_find(derived, &second, &owner[0], tensor, NULL, 0), made);
	derived_end(derived, &second);
	end();
}
END_TEST

START_TEST(a_run_gets_four_copies_at_most)
{
	struct operand operand;
	struct derived_run run = {.count = 0};
	begin();
	(void)pass(1, 5, 64);
	ck_assert_str_eq(pass(1, 5, 64), "mmmmm");
	for (uint64_t id = 1; id <= 5; id++)
		ck_assert_int_eq(derived_find(derived, &run, &owner[0], describe(&operand, id, 1, 8, 0), NULL, 0) != NULL, id <= OPD_DERIVED_RUN_MAX);
	derived_end(derived, &run);
	end();
}
END_TEST

START_TEST(contents_that_end_take_their_copies_along)
{
	struct operand operand;
	begin();
	for (int i = 0; i < 2; i++) {
		(void)use(describe(&operand, 7, 1, 8, 0), 64);
		(void)use(describe(&operand, 7, 2, 8, 0), 128);
		(void)use(describe(&operand, 8, 1, 8, 0), 256);
	}
	derived_forget(derived, 7, 1);
	ck_assert_uint_eq(counted().bytes, 128 + 256);
	derived_forget(derived, 7, 2);
	ck_assert_uint_eq(counted().bytes, 256);
	ck_assert_int_eq(use(describe(&operand, 7, 2, 8, 0), 64), '-'); /* as if they had never come */
	ck_assert_int_eq(use(describe(&operand, 8, 1, 8, 0), 256), 'f');
	end();
}
END_TEST

START_TEST(a_kept_tensor_that_is_destroyed_or_changed_takes_its_copies_along)
{
	struct operand operand;
	const int64_t shape[] = {8};
	opd_error error;
	begin();
	struct account *account = account_create(&memory, MIB);
	struct buffer *buffer = NULL;
	ck_assert_int_eq(buffer_alloc(account, 32, 0, &buffer, &error), OPD_OK);
	struct kept_tensor *tensor = kept_tensor_create(OPD_f32, 1, shape, 32, buffer);
	buffer_unref(buffer);
	for (int i = 0; i < 2; i++)
		(void)use(describe(&operand, tensor->id, tensor->version, 8, 0), 64);
	ck_assert_uint_eq(counted().copies, 1);
	kept_tensor_changed(tensor);
	ck_assert_uint_eq(counted().copies, 0);
	for (int i = 0; i < 2; i++)
		(void)use(describe(&operand, tensor->id, tensor->version, 8, 0), 64);
	ck_assert_uint_eq(counted().copies, 1);
	kept_tensor_unref(tensor);
	ck_assert_uint_eq(counted().copies, 0);
	account_unref(account);
	end();
}
END_TEST

START_TEST(a_run_keeps_its_copy_when_the_contents_end)
{
	struct operand operand;
	struct derived_run run = {.count = 0};
	begin();
	const opd_tensor *tensor = describe(&operand, 7, 1, 8, 0);
	ck_assert_int_eq(use_keyed(&owner[0], tensor, "", MIB, 5, NULL), '-');
	ck_assert_int_eq(use_keyed(&owner[0], tensor, "", MIB, 5, NULL), 'm');
	const unsigned char *copy = derived_find(derived, &run, &owner[0], tensor, NULL, 0);
	derived_forget(derived, 7, 1);
	ck_assert_uint_eq(derived_reclaim(derived, MIB), 0);
	(void)pass(10, 3, MIB); /* fresh copies would come from the pool, were it there */
	(void)pass(10, 3, MIB);
	for (uint64_t i = 0; i < MIB; i++)
		ck_assert_int_eq(copy[i], 5);
	ck_assert_uint_eq(counted().bytes, 4 * MIB);
	derived_end(derived, &run);
	ck_assert_uint_eq(counted().bytes, 3 * MIB);
	end();
}
END_TEST

START_TEST(a_working_set_that_does_not_fit_is_packed_in_part_and_stays_so)
{
	begin();
	ck_assert_str_eq(pass(1, 8, MIB), "--------");
	ck_assert_str_eq(pass(1, 8, MIB), "mmmm----");
	for (int i = 0; i < 5; i++)
		ck_assert_str_eq(pass(1, 8, MIB), "ffff----");
	ck_assert_uint_eq(counted().bytes, LIMIT);
	ck_assert_uint_eq(counted().made, 4);
	end();
}
END_TEST

START_TEST(copies_that_nobody_uses_make_room_for_others)
{
	begin();
	(void)pass(1, 4, MIB);
	ck_assert_str_eq(pass(1, 4, MIB), "mmmm");
	ck_assert_str_eq(pass(11, 3, MIB), "---");
	ck_assert_str_eq(pass(11, 3, MIB), "mmm");
	ck_assert_uint_eq(counted().copies, 4);
	ck_assert_str_eq(pass(4, 1, MIB), "f"); /* the one used last */
	ck_assert_str_eq(pass(21, 1, LIMIT + 1), "-");
	ck_assert_str_eq(pass(21, 1, LIMIT + 1), "-");
	end();
}
END_TEST

START_TEST(copies_give_way_when_the_ledger_is_full)
{
	opd_error error;
	begin();
	(void)pass(1, 4, MIB);
	(void)pass(1, 4, MIB);
	struct account *account = account_create(&memory, 64 * MIB);
	ck_assert_int_eq(account_charge(account, 62 * MIB, &error), OPD_OK);
	ck_assert_uint_eq(counted().copies, 2);
	ck_assert_str_eq(pass(3, 2, MIB), "ff"); /* the ones used last */
	(void)pass(11, 1, MIB);
	ck_assert_str_eq(pass(11, 1, MIB), "-"); /* none is made at others' cost */
	ck_assert_int_eq(account_charge(account, 3 * MIB, &error), OPD_RESOURCE_EXHAUSTED);
	ck_assert_int_eq(account_charge(account, 2 * MIB, &error), OPD_OK);
	ck_assert_uint_eq(counted().copies, 0);
	account_release(account, 64 * MIB);
	account_unref(account);
	end();
}
END_TEST

struct elsewhere {
	struct derived_own own; /* first */
	int released;
};

static void on_release(struct derived_own *own)
{
	((struct elsewhere *)own)->released++;
}

/* As use: 'm' where the copy that lies there was made, and kept if so. */
static char use_elsewhere(const opd_tensor *tensor, struct elsewhere *place, bool keep)
{
	struct derived_run run = {.count = 0};
	const bool found = derived_find(derived, &run, &owner[0], tensor, NULL, 0) == place;
	const bool made = !found && derived_make_own(derived, &run, &owner[0], tensor, 1000, &place->own);
	if (made && keep)
		derived_keep(derived, &run, place);
	derived_end(derived, &run);
	return found ? 'f' : made ? 'm' : '-';
}

START_TEST(a_copy_that_lies_elsewhere_is_charged_found_and_released_once)
{
	struct operand operand;
	struct elsewhere place = {.own = {on_release}};
	begin();
	const opd_tensor *tensor = describe(&operand, 7, 1, 8, 0);
	ck_assert_int_eq(use_elsewhere(tensor, &place, true), '-');
	ck_assert_int_eq(use_elsewhere(tensor, &place, false), 'm');
	ck_assert_int_eq(place.released, 1); /* not kept, it went with its run */
	ck_assert_uint_eq(atomic_load(&memory.used_bytes), 0);
	ck_assert_int_eq(use_elsewhere(tensor, &place, true), 'm');
	ck_assert_int_eq(use_elsewhere(tensor, &place, true), 'f');
	ck_assert_uint_eq(atomic_load(&memory.used_bytes), 1000);
	derived_forget(derived, 7, 1);
	ck_assert_int_eq(place.released, 2);
	ck_assert_uint_eq(atomic_load(&memory.used_bytes), 0);
	end();
}
END_TEST

START_TEST(a_copy_that_lies_elsewhere_gives_way_and_needs_room_like_others)
{
	struct operand operand;
	struct elsewhere place = {.own = {on_release}};
	begin();
	const opd_tensor *tensor = describe(&operand, 7, 1, 8, 0);
	derived_set_limit(derived, 999);
	for (int i = 0; i < 3; i++)
		ck_assert_int_eq(use_elsewhere(tensor, &place, true), '-');
	ck_assert_int_eq(place.released, 0); /* still its maker's */
	derived_set_limit(derived, LIMIT);
	ck_assert_int_eq(use_elsewhere(tensor, &place, true), '-'); /* no limit that is too small has remembered it */
	ck_assert_int_eq(use_elsewhere(tensor, &place, true), 'm');
	ck_assert_uint_eq(derived_reclaim(derived, UINT64_MAX), 1000);
	ck_assert_int_eq(place.released, 1);
	ck_assert_int_eq(use_elsewhere(tensor, &place, true), '-');
	ck_assert_int_eq(use_elsewhere(tensor, &place, true), 'm'); /* what is left at the end is released as well */
	end();
	ck_assert_int_eq(place.released, 2);
}
END_TEST

START_TEST(a_lower_limit_takes_effect_at_once)
{
	begin();
	(void)pass(1, 4, MIB);
	(void)pass(1, 4, MIB);
	derived_set_limit(derived, MIB);
	ck_assert_uint_eq(counted().bytes, MIB);
	derived_set_limit(derived, 0);
	ck_assert_uint_eq(counted().bytes, 0);
	for (int i = 0; i < 3; i++)
		ck_assert_str_eq(pass(1, 1, MIB), "-");
	end();
}
END_TEST

START_TEST(what_came_once_is_remembered_in_bounded_memory)
{
	struct operand operand;
	begin();
	for (uint64_t id = 1; id <= 20000; id++)
		ck_assert_int_eq(use(describe(&operand, id, 1, 8, 0), 64), '-');
	ck_assert_int_eq(use(describe(&operand, 1, 1, 8, 0), 64), '-'); /* forgotten again */
	ck_assert_int_eq(use(describe(&operand, 20000, 1, 8, 0), 64), 'm');
	end();
}
END_TEST

/* ---- Threads ---- */

/* Few enough contents that threads meet, more than fit, and contents that end meanwhile. */
static void *storm(void *argument)
{
	uint64_t seed = (uint64_t)(uintptr_t)argument + 1;
	struct operand operand;
	for (int i = 0; i < 4000; i++) {
		seed = seed * 6364136223846793005u + 1442695040888963407u;
		const uint64_t id = 1 + (seed >> 33) % 12;
		const unsigned char tag = (unsigned char)id;
		unsigned char value = tag;
		(void)use_keyed(&owner[0], describe(&operand, id, 1, 8, 0), "", MIB / 2, tag, &value);
		ck_assert_int_eq(value, tag);
		if ((seed >> 40) % 16 == 0)
			derived_forget(derived, id, 1);
		if ((seed >> 50) % 64 == 0)
			(void)derived_reclaim(derived, MIB);
	}
	return NULL;
}

START_TEST(threads_never_see_a_copy_of_other_contents)
{
	pthread_t threads[4];
	begin();
	for (uintptr_t i = 0; i < 4; i++)
		ck_assert_int_eq(pthread_create(&threads[i], NULL, storm, (void *)i), 0);
	for (int i = 0; i < 4; i++)
		ck_assert_int_eq(pthread_join(threads[i], NULL), 0);
	ck_assert_uint_le(counted().bytes, LIMIT);
	ck_assert_uint_gt(counted().found, 0);
	end();
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("derived");
	TCase *tests = tcase_create("derived");
	tcase_set_timeout(tests, 120);
	tcase_add_test(tests, a_copy_is_made_when_contents_come_again_and_found_from_then_on);
	tcase_add_test(tests, copies_differ_by_version_view_key_and_module);
	tcase_add_test(tests, contents_that_may_change_have_no_copies);
	tcase_add_test(tests, a_copy_that_its_run_does_not_keep_goes_with_it);
	tcase_add_test(tests, one_run_makes_a_copy_and_the_others_do_without);
	tcase_add_test(tests, a_run_gets_four_copies_at_most);
	tcase_add_test(tests, contents_that_end_take_their_copies_along);
	tcase_add_test(tests, a_kept_tensor_that_is_destroyed_or_changed_takes_its_copies_along);
	tcase_add_test(tests, a_run_keeps_its_copy_when_the_contents_end);
	tcase_add_test(tests, a_working_set_that_does_not_fit_is_packed_in_part_and_stays_so);
	tcase_add_test(tests, copies_that_nobody_uses_make_room_for_others);
	tcase_add_test(tests, copies_give_way_when_the_ledger_is_full);
	tcase_add_test(tests, a_copy_that_lies_elsewhere_is_charged_found_and_released_once);
	tcase_add_test(tests, a_copy_that_lies_elsewhere_gives_way_and_needs_room_like_others);
	tcase_add_test(tests, a_lower_limit_takes_effect_at_once);
	tcase_add_test(tests, what_came_once_is_remembered_in_bounded_memory);
	tcase_add_test(tests, threads_never_see_a_copy_of_other_contents);
	suite_add_tcase(suite, tests);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	const int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
