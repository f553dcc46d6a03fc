/* Which steps of a graph run at once, and where their memory lies then. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "server/graph_layout.h"
#include "server/graph_schedule.h"

#define STEPS_MAX 400u
#define EDGES_MAX 2000u

static uint64_t state;

static uint32_t below(uint32_t bound)
{
	state = state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(state >> 33) % bound;
}

/* ---- Graphs ---- */

static uint32_t first[STEPS_MAX + 1], before[EDGES_MAX], edges;
static uint64_t cost[STEPS_MAX];
static struct schedule_steps steps;

static void begin(void)
{
	edges = 0;
	steps = (struct schedule_steps){0, first, before, cost};
}

static void add(uint64_t cost_ns)
{
	cost[steps.count] = cost_ns;
	first[steps.count++] = edges;
	first[steps.count] = edges;
}

static void after(uint32_t step)
{
	before[edges++] = step;
	first[steps.count] = edges;
}

static void random_graph(void)
{
	begin();
	const uint32_t count = 1 + below(STEPS_MAX - 1), fan = below(4), near = 1 + below(60), dear = 1 + below(60000);
	for (uint32_t i = 0; i < count; i++) {
		add(below(8) == 0 ? 0 : below(dear));
		for (uint32_t k = 0; i > 0 && k < fan && edges < EDGES_MAX; k++)
			if (below(3) != 0)
				after(i - 1 - below(i < near ? i : near));
	}
}

/* ---- What must hold ---- */

static uint32_t stage_of[STEPS_MAX], part_of[STEPS_MAX], place_of[STEPS_MAX];

static bool happens_before(uint32_t a, uint32_t b)
{
	return stage_of[a] < stage_of[b] || (part_of[a] == part_of[b] && place_of[a] < place_of[b]);
}

static void locate(const struct schedule *schedule)
{
	uint32_t seen = 0, part = 0;
	for (uint32_t s = 0; s < schedule->stage_count; s++) {
		ck_assert_uint_eq(schedule->stages[s].first, part);
		ck_assert_uint_gt(schedule->stages[s].count, 0);
		ck_assert_uint_le(schedule->stages[s].count, schedule->width);
		for (uint32_t k = 0; k < schedule->stages[s].count; k++, part++) {
			ck_assert_uint_eq(schedule->parts[part].first, seen);
			ck_assert_uint_gt(schedule->parts[part].count, 0);
			for (uint32_t i = 0; i < schedule->parts[part].count; i++, seen++) {
				stage_of[schedule->steps[seen]] = s;
				part_of[schedule->steps[seen]] = part;
				place_of[schedule->steps[seen]] = seen;
			}
		}
	}
	ck_assert_uint_eq(part, schedule->part_count);
	ck_assert_uint_eq(seen, steps.count);
}

static void check_schedule(const struct schedule *schedule)
{
	bool there[STEPS_MAX] = {false};
	locate(schedule);
	for (uint32_t i = 0; i < steps.count; i++) {
		ck_assert(!there[schedule->steps[i]]);
		there[schedule->steps[i]] = true;
	}
	for (uint32_t i = 0; i < steps.count; i++)
		for (uint32_t k = first[i]; k < first[i + 1]; k++)
			ck_assert_msg(happens_before(before[k], i), "step %u may run before step %u, which it waits for", i, before[k]);
}

START_TEST(every_step_runs_once_and_after_all_that_it_waits_for)
{
	uint32_t wide = 0;
	for (uint32_t seed = 0; seed < 600; seed++) {
		struct schedule schedule;
		state = seed;
		random_graph();
		ck_assert(schedule_make(&steps, 1 + seed % 9, &schedule));
		check_schedule(&schedule);
		wide += schedule.width > 1;
		schedule_fini(&schedule);
	}
	ck_assert_uint_gt(wide, 100);
	ck_assert_uint_lt(wide, 600);
}
END_TEST

static uint32_t width(uint32_t threads)
{
	struct schedule schedule;
	ck_assert(schedule_make(&steps, threads, &schedule));
	check_schedule(&schedule);
	const uint32_t found = schedule.width;
	schedule_fini(&schedule);
	return found;
}

START_TEST(small_steps_and_chains_stay_on_one_thread_in_the_order_given)
{
	struct schedule schedule;
	begin();
	for (uint32_t i = 0; i < 300; i++) { /* 30 threads of 10 nodes, 6 us together */
		add(20);
		if (i >= 30)
			after(i - 30);
	}
	ck_assert(schedule_make(&steps, 16, &schedule));
	ck_assert_uint_eq(schedule.width, 1);
	ck_assert_uint_eq(schedule.stage_count, 1);
	for (uint32_t i = 0; i < steps.count; i++)
		ck_assert_uint_eq(schedule.steps[i], i);
	schedule_fini(&schedule);
	begin();
	for (uint32_t i = 0; i < 300; i++) {
		add(50000);
		if (i > 0)
			after(i - 1);
	}
	ck_assert_uint_eq(width(16), 1);
}
END_TEST

START_TEST(kernels_that_use_all_threads_themselves_run_one_after_the_other)
{
	begin();
	for (uint32_t i = 0; i < 8; i++)
		add(2000000);
	ck_assert_uint_eq(width(4), 1);
}
END_TEST

/* From one step, eight chains of fifty small ones, joined at the end: one stage for all of the chains. */
START_TEST(chains_that_know_nothing_of_each_other_run_at_once_without_meeting)
{
	struct schedule schedule;
	begin();
	add(1000);
	for (uint32_t i = 0; i < 300; i++) {
		add(500);
		after(i < 6 ? 0 : steps.count - 7);
	}
	add(1000);
	for (uint32_t i = 0; i < 6; i++)
		after(steps.count - 2 - i);
	ck_assert_uint_eq(width(1), 1);
	ck_assert(schedule_make(&steps, 3, &schedule));
	check_schedule(&schedule);
	ck_assert_uint_eq(schedule.stage_count, 3);
	ck_assert_uint_eq(schedule.stages[1].count, 6);
	for (uint32_t i = 1; i <= 6; i++)
		ck_assert_uint_eq(schedule.parts[i].count, 50);
	schedule_fini(&schedule);
}
END_TEST

/* ---- Memory ---- */

#define ITEMS_MAX 600u

static struct layout_item items[ITEMS_MAX];
static struct layout_use uses[EDGES_MAX + ITEMS_MAX];
static uint32_t item_count, use_count;

/* An item a step, and perhaps scratch; whoever waits for a step reads its item; some are wanted at the end. */
static void random_items(void)
{
	uint32_t item_of[STEPS_MAX];
	item_count = use_count = 0;
	for (uint32_t i = 0; i < steps.count; i++) {
		item_of[i] = item_count;
		items[item_count++] = (struct layout_item){.step = i, .bytes = 64 * (uint64_t)below(20)};
		if (below(4) == 0)
			items[item_count++] = (struct layout_item){.step = i, .bytes = 64 * (uint64_t)below(50)};
		for (uint32_t k = first[i]; k < first[i + 1]; k++)
			uses[use_count++] = (struct layout_use){item_of[before[k]], i};
		if (below(20) == 0)
			uses[use_count++] = (struct layout_use){item_of[i], steps.count};
	}
}

/* Everything that touches `item` is over before `step` begins. */
static bool over_before(uint32_t item, uint32_t step)
{
	if (!happens_before(items[item].step, step))
		return false;
	for (uint32_t i = 0; i < use_count; i++)
		if (uses[i].item == item && (uses[i].step == steps.count || !happens_before(uses[i].step, step)))
			return false;
	return true;
}

static void check_layout(const struct plan_sizes *sizes)
{
	uint64_t sum = 0;
	for (uint32_t a = 0; a < item_count; a++) {
		sum += items[a].bytes;
		ck_assert_uint_eq(items[a].offset % 64, 0);
		ck_assert_uint_le(items[a].offset + items[a].bytes, sizes->peak_bytes);
		for (uint32_t b = 0; b < a; b++) {
			const bool apart = items[a].offset + items[a].bytes <= items[b].offset || items[b].offset + items[b].bytes <= items[a].offset;
			if (!apart && items[a].bytes != 0 && items[b].bytes != 0 && !over_before(a, items[b].step) && !over_before(b, items[a].step))
				ck_abort_msg("items %u and %u may be there at once, and overlap", a, b);
		}
	}
	ck_assert_uint_eq(sum, sizes->sum_bytes);
}

START_TEST(no_two_items_that_may_be_there_at_once_overlap)
{
	for (uint32_t seed = 0; seed < 150; seed++) {
		struct schedule schedule;
		struct plan_sizes sizes;
		state = seed;
		random_graph();
		random_items();
		ck_assert(seed % 5 == 0 ? schedule_serial(steps.count, &schedule) : schedule_make(&steps, 1 + seed % 9, &schedule));
		locate(&schedule);
		ck_assert(graph_layout(&(struct layout){items, item_count, uses, use_count}, &schedule, &sizes));
		check_layout(&sizes);
		schedule_fini(&schedule);
	}
}
END_TEST

/* Four chains of fifty steps, each of which reads the last one's result: two buffers each, not fifty. */
START_TEST(each_part_uses_its_bytes_again)
{
	struct schedule schedule;
	struct plan_sizes sizes;
	begin();
	item_count = use_count = 0;
	for (uint32_t i = 0; i < 200; i++) {
		add(5000);
		items[item_count++] = (struct layout_item){.step = i, .bytes = 4096};
		if (i < 4)
			continue;
		after(i - 4);
		uses[use_count++] = (struct layout_use){i - 4, i};
	}
	ck_assert(schedule_make(&steps, 2, &schedule));
	ck_assert_uint_eq(schedule.width, 4);
	ck_assert(graph_layout(&(struct layout){items, item_count, uses, use_count}, &schedule, &sizes));
	ck_assert_uint_eq(sizes.peak_bytes, (uint64_t)4 * 2 * 4096);
	ck_assert_uint_eq(sizes.sum_bytes, (uint64_t)200 * 4096);
	schedule_fini(&schedule);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("graph_schedule");
	TCase *tests = tcase_create("graph_schedule");
	tcase_set_timeout(tests, 60);
	tcase_add_test(tests, every_step_runs_once_and_after_all_that_it_waits_for);
	tcase_add_test(tests, small_steps_and_chains_stay_on_one_thread_in_the_order_given);
	tcase_add_test(tests, kernels_that_use_all_threads_themselves_run_one_after_the_other);
	tcase_add_test(tests, chains_that_know_nothing_of_each_other_run_at_once_without_meeting);
	tcase_add_test(tests, no_two_items_that_may_be_there_at_once_overlap);
	tcase_add_test(tests, each_part_uses_its_bytes_again);
	suite_add_tcase(suite, tests);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_NORMAL);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
