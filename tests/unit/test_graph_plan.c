/* Memory of a graph's intermediate results: what lives at the same time never shares a byte, and what doesn't does. */
#include <check.h>
#include <stdlib.h>

#include "server/graph_plan.h"

static uint64_t state;

static uint32_t below(uint32_t bound)
{
	state = state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(state >> 33) % bound;
}

static bool live_together(const struct plan_item *a, const struct plan_item *b)
{
	return a->first <= b->last && b->first <= a->last;
}

static void check_items(const struct plan_item *items, uint32_t count, const struct plan_sizes *sizes)
{
	uint64_t sum = 0;
	for (uint32_t i = 0; i < count; i++) {
		sum += items[i].bytes;
		if (items[i].offset % 64 != 0 || items[i].offset + items[i].bytes > sizes->peak_bytes)
			ck_abort_msg("item %u is out of place", i);
		for (uint32_t k = 0; k < i; k++) {
			bool apart = items[i].offset + items[i].bytes <= items[k].offset || items[k].offset + items[k].bytes <= items[i].offset;
			if (!apart && items[i].bytes != 0 && items[k].bytes != 0 && live_together(&items[i], &items[k]))
				ck_abort_msg("items %u and %u live together and overlap", i, k);
		}
	}
	ck_assert_uint_eq(sum, sizes->sum_bytes);
}

/* Random graphs: any lifetimes, many sizes, some of nothing. */
START_TEST(no_two_live_items_overlap)
{
	struct plan_item items[300];
	for (uint32_t seed = 0; seed < 200; seed++) {
		state = seed;
		uint32_t count = 1 + below(300), step = 0, longest = 1 + below(50);
		for (uint32_t i = 0; i < count; i++) {
			step += below(3);
			items[i] = (struct plan_item){.first = step, .last = step + below(longest), .bytes = 64 * (uint64_t)below(1 + below(1000))};
		}
		struct plan_sizes sizes;
		ck_assert(graph_plan(items, count, &sizes));
		check_items(items, count, &sizes);
	}
}
END_TEST

START_TEST(a_chain_needs_two_buffers)
{
	struct plan_item items[1000];
	for (uint32_t i = 0; i < 1000; i++)
		items[i] = (struct plan_item){.first = i, .last = i + 1, .bytes = 4096};
	struct plan_sizes sizes;
	ck_assert(graph_plan(items, 1000, &sizes));
	check_items(items, 1000, &sizes);
	ck_assert_uint_eq(sizes.peak_bytes, 2 * 4096);
	ck_assert_uint_eq(sizes.sum_bytes, 1000 * 4096);
}
END_TEST

START_TEST(a_gap_is_joined_with_its_neighbours_and_used_again)
{
	struct plan_item items[] = {
		{.first = 0, .last = 1, .bytes = 128}, {.first = 0, .last = 1, .bytes = 64},   {.first = 0, .last = 2, .bytes = 192},
		{.first = 0, .last = 9, .bytes = 64},  {.first = 3, .last = 4, .bytes = 384}, {.first = 5, .last = 5, .bytes = 320},
	};
	struct plan_sizes sizes;
	ck_assert(graph_plan(items, 6, &sizes));
	check_items(items, 6, &sizes);
	ck_assert_uint_eq(items[4].offset, 0);
	ck_assert_uint_eq(items[5].offset, 0);
	ck_assert_uint_eq(sizes.peak_bytes, 448);
}
END_TEST

START_TEST(nothing_and_too_much_are_told_apart)
{
	struct plan_sizes sizes;
	ck_assert(graph_plan(NULL, 0, &sizes));
	ck_assert_uint_eq(sizes.peak_bytes, 0);
	struct plan_item items[] = {{.first = 0, .last = 2, .bytes = 1ull << 62}, {.first = 1, .last = 2, .bytes = 1ull << 62}};
	ck_assert(!graph_plan(items, 2, &sizes));
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("graph_plan");
	TCase *tests = tcase_create("plan");
	tcase_add_test(tests, no_two_live_items_overlap);
	tcase_add_test(tests, a_chain_needs_two_buffers);
	tcase_add_test(tests, a_gap_is_joined_with_its_neighbours_and_used_again);
	tcase_add_test(tests, nothing_and_too_much_are_told_apart);
	suite_add_tcase(suite, tests);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_NORMAL);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
