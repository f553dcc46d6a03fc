#include "server/graph_schedule.h"

#include <stdlib.h>
#include <string.h>

/* Steps that hang together within the stage that is being made: a forest by size, without path compression, so that a trial can be taken back. */
struct piece {
	uint32_t parent;
	uint32_t size;
	uint64_t span_ns; /* of a root: one thread's time for all of it */
};

/* The stage that is being made, and what it is estimated to take. */
struct stage {
	uint32_t first_step; /* of `sorted` */
	uint32_t count;
	uint32_t pieces;
	uint64_t work_ns; /* all threads' time */
	uint64_t span_ns; /* one thread's, large kernels shared among all */
	uint64_t longest_ns;
};

struct making {
	const struct schedule_steps *steps;
	uint32_t threads;
	uint32_t *level;       /* [count] */
	uint32_t *sorted;      /* [count]: by level, then by number */
	uint32_t *level_first; /* [levels + 1]: of sorted */
	uint32_t levels;
	struct piece *pieces;
	uint32_t *joined; /* [count]: roots that were hung below others, newest last */
	uint32_t joined_count;
	struct schedule *schedule;
};

/* ---- Estimates ---- */

static uint64_t work_of(const struct making *making, uint32_t step)
{
	return making->steps->cost_ns[step];
}

static uint64_t span_of(const struct making *making, uint32_t step)
{
	const uint64_t cost = making->steps->cost_ns[step];
	return cost > SCHEDULE_WIDE_NS ? cost / making->threads : cost;
}

static uint64_t at_once_ns(const struct making *making, const struct stage *stage)
{
	const uint64_t shared = stage->work_ns / making->threads;
	return (stage->longest_ns > shared ? stage->longest_ns : shared) + SCHEDULE_STAGE_NS;
}

static bool pays(const struct making *making, const struct stage *stage)
{
	return stage->pieces > 1 && at_once_ns(making, stage) < stage->span_ns;
}

static uint64_t estimate(const struct making *making, const struct stage *stage)
{
	return pays(making, stage) ? at_once_ns(making, stage) : stage->span_ns;
}

/* ---- Levels ---- */

static void find_levels(struct making *making)
{
	const struct schedule_steps *steps = making->steps;
	for (uint32_t i = 0; i < steps->count; i++) {
		uint32_t level = 0;
		for (uint32_t k = steps->first[i]; k < steps->first[i + 1]; k++)
			if (making->level[steps->before[k]] >= level)
				level = making->level[steps->before[k]] + 1;
		making->level[i] = level;
		if (level >= making->levels)
			making->levels = level + 1;
	}
	for (uint32_t i = 0; i < steps->count; i++)
		making->level_first[making->level[i] + 1]++;
	for (uint32_t i = 0; i < making->levels; i++)
		making->level_first[i + 1] += making->level_first[i];
	uint32_t *next = making->joined; /* not needed yet */
	memcpy(next, making->level_first, making->levels * sizeof next[0]);
	for (uint32_t i = 0; i < steps->count; i++)
		making->sorted[next[making->level[i]]++] = i;
}

/* ---- Pieces ---- */

static uint32_t root_of(const struct making *making, uint32_t step)
{
	while (making->pieces[step].parent != step)
		step = making->pieces[step].parent;
	return step;
}

static void add_step(struct making *making, struct stage *stage, uint32_t step)
{
	const uint64_t span = span_of(making, step);
	making->pieces[step] = (struct piece){.parent = step, .size = 1, .span_ns = span};
	stage->count++;
	stage->pieces++;
	stage->work_ns += work_of(making, step);
	stage->span_ns += span;
	if (span > stage->longest_ns)
		stage->longest_ns = span;
}

static void join(struct making *making, struct stage *stage, uint32_t a, uint32_t b)
{
	a = root_of(making, a);
	b = root_of(making, b);
	if (a == b)
		return;
	const uint32_t top = making->pieces[a].size >= making->pieces[b].size ? a : b, below = top == a ? b : a;
	making->pieces[below].parent = top;
	making->pieces[top].size += making->pieces[below].size;
	making->pieces[top].span_ns += making->pieces[below].span_ns;
	making->joined[making->joined_count++] = below;
	stage->pieces--;
	if (making->pieces[top].span_ns > stage->longest_ns)
		stage->longest_ns = making->pieces[top].span_ns;
}

static void take_back(struct making *making, uint32_t joined_before)
{
	while (making->joined_count > joined_before) {
		const uint32_t below = making->joined[--making->joined_count], top = making->pieces[below].parent;
		making->pieces[top].size -= making->pieces[below].size;
		making->pieces[top].span_ns -= making->pieces[below].span_ns;
		making->pieces[below].parent = below;
	}
}

/* ---- Stages ---- */

/* A level's steps on their own: nothing joins them. */
static struct stage level_stage(struct making *making, uint32_t level)
{
	struct stage stage = {.first_step = making->level_first[level]};
	for (uint32_t i = making->level_first[level]; i < making->level_first[level + 1]; i++)
		add_step(making, &stage, making->sorted[i]);
	return stage;
}

/* The stage with a level more. */
static struct stage extended(struct making *making, const struct stage *stage, uint32_t level)
{
	const struct schedule_steps *steps = making->steps;
	struct stage larger = *stage;
	for (uint32_t i = making->level_first[level]; i < making->level_first[level + 1]; i++) {
		const uint32_t step = making->sorted[i];
		add_step(making, &larger, step);
		for (uint32_t k = steps->first[step]; k < steps->first[step + 1]; k++)
			if (making->level[steps->before[k]] >= making->level[making->sorted[stage->first_step]])
				join(making, &larger, step, steps->before[k]);
	}
	return larger;
}

static int by_number(const void *a, const void *b)
{
	const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

static void add_part(struct schedule *schedule, uint32_t count)
{
	const uint32_t first = schedule->part_count == 0 ? 0 : schedule->parts[schedule->part_count - 1].first + schedule->parts[schedule->part_count - 1].count;
	qsort(schedule->steps + first, count, sizeof schedule->steps[0], by_number);
	schedule->parts[schedule->part_count++] = (struct schedule_part){first, count};
}

static void add_stage(struct schedule *schedule, uint32_t parts)
{
	schedule->stages[schedule->stage_count++] = (struct schedule_stage){schedule->part_count - parts, parts};
	if (parts > schedule->width)
		schedule->width = parts;
}

/* One part, joined with the one before it where that is a stage of one part too: then steps stand as they were given. */
static void close_serial(struct making *making, const struct stage *stage)
{
	struct schedule *schedule = making->schedule;
	uint32_t count = stage->count;
	memcpy(schedule->steps + stage->first_step, making->sorted + stage->first_step, count * sizeof schedule->steps[0]);
	if (schedule->stage_count != 0 && schedule->stages[schedule->stage_count - 1].count == 1) {
		schedule->stage_count--;
		count += schedule->parts[--schedule->part_count].count;
	}
	add_part(schedule, count);
	add_stage(schedule, 1);
}

struct root {
	uint64_t span_ns;
	uint32_t step;
};

static int longest_first(const void *a, const void *b)
{
	const struct root *x = a, *y = b;
	return x->span_ns != y->span_ns ? (x->span_ns < y->span_ns ? 1 : -1) : (x->step > y->step) - (x->step < y->step);
}

/* Which part each piece goes to: the longest first, each to the part with the least so far. part_of is by root. */
static uint32_t share_out(struct making *making, const struct stage *stage, struct root *roots, uint32_t *part_of)
{
	uint64_t load[SCHEDULE_PARTS_MAX] = {0};
	uint32_t count = 0, parts = making->threads * SCHEDULE_PARTS_PER_THREAD;
	for (uint32_t i = stage->first_step; i < stage->first_step + stage->count; i++) {
		const uint32_t step = making->sorted[i];
		if (making->pieces[step].parent == step)
			roots[count++] = (struct root){making->pieces[step].span_ns, step};
	}
	qsort(roots, count, sizeof roots[0], longest_first);
	parts = parts > SCHEDULE_PARTS_MAX ? SCHEDULE_PARTS_MAX : parts;
	parts = parts > count ? count : parts;
	for (uint32_t i = 0; i < count; i++) {
		uint32_t least = 0;
		for (uint32_t k = 1; k < parts; k++)
			if (load[k] < load[least])
				least = k;
		load[least] += roots[i].span_ns + 1; /* those of no known cost are spread too */
		part_of[roots[i].step] = least;
	}
	return parts;
}

static bool close_parallel(struct making *making, const struct stage *stage)
{
	struct schedule *schedule = making->schedule;
	struct root *roots = calloc(stage->pieces, sizeof roots[0]);
	uint32_t *part_of = calloc(making->steps->count, sizeof part_of[0]);
	const bool made = roots != NULL && part_of != NULL;
	const uint32_t parts = made ? share_out(making, stage, roots, part_of) : 0;
	uint32_t placed = stage->first_step;
	for (uint32_t part = 0; part < parts; part++) {
		const uint32_t before = placed;
		for (uint32_t i = stage->first_step; i < stage->first_step + stage->count; i++)
			if (part_of[root_of(making, making->sorted[i])] == part)
				schedule->steps[placed++] = making->sorted[i];
		add_part(schedule, placed - before);
	}
	if (made)
		add_stage(schedule, parts);
	free(roots);
	free(part_of);
	return made;
}

static bool close_stage(struct making *making, const struct stage *stage)
{
	if (pays(making, stage))
		return close_parallel(making, stage);
	close_serial(making, stage);
	return true;
}

/* Level by level: a level joins the stage before it unless the two are faster, or wider, one after the other. */
static bool make_stages(struct making *making)
{
	struct stage stage = level_stage(making, 0);
	for (uint32_t level = 1; level < making->levels; level++) {
		const uint32_t joined = making->joined_count;
		const struct stage larger = extended(making, &stage, level);
		const uint64_t together = estimate(making, &larger);
		take_back(making, joined);
		const struct stage alone = level_stage(making, level);
		const uint64_t apart = estimate(making, &stage) + estimate(making, &alone);
		if (together < apart || (together == apart && larger.pieces >= alone.pieces)) {
			stage = extended(making, &stage, level);
			continue;
		}
		if (!close_stage(making, &stage))
			return false;
		stage = alone;
		making->joined_count = 0;
	}
	return close_stage(making, &stage);
}

/* ---- */

static bool schedule_alloc(uint32_t count, struct schedule *schedule)
{
	*schedule = (struct schedule){
	    .steps = calloc((size_t)count + 1, sizeof schedule->steps[0]),
	    .parts = calloc((size_t)count + 1, sizeof schedule->parts[0]),
	    .stages = calloc((size_t)count + 1, sizeof schedule->stages[0]),
	    .step_count = count,
	};
	if (schedule->steps != NULL && schedule->parts != NULL && schedule->stages != NULL)
		return true;
	schedule_fini(schedule);
	return false;
}

bool schedule_serial(uint32_t count, struct schedule *schedule_out)
{
	if (!schedule_alloc(count, schedule_out))
		return false;
	for (uint32_t i = 0; i < count; i++)
		schedule_out->steps[i] = i;
	add_part(schedule_out, count);
	add_stage(schedule_out, 1);
	return true;
}

static bool making_init(struct making *making)
{
	const size_t room = (size_t)making->steps->count + 2;
	making->level = calloc(room, sizeof making->level[0]);
	making->sorted = calloc(room, sizeof making->sorted[0]);
	making->level_first = calloc(room, sizeof making->level_first[0]);
	making->pieces = calloc(room, sizeof making->pieces[0]);
	making->joined = calloc(room, sizeof making->joined[0]);
	return making->level != NULL && making->sorted != NULL && making->level_first != NULL && making->pieces != NULL && making->joined != NULL;
}

static void making_fini(struct making *making)
{
	free(making->level);
	free(making->sorted);
	free(making->level_first);
	free(making->pieces);
	free(making->joined);
}

bool schedule_make(const struct schedule_steps *steps, uint32_t threads, struct schedule *schedule_out)
{
	struct making making = {.steps = steps, .threads = threads, .schedule = schedule_out};
	if (threads <= 1 || steps->count <= 1)
		return schedule_serial(steps->count, schedule_out);
	if (!schedule_alloc(steps->count, schedule_out))
		return false;
	bool made = making_init(&making);
	if (made) {
		find_levels(&making);
		made = make_stages(&making);
	}
	making_fini(&making);
	if (!made)
		schedule_fini(schedule_out);
	return made;
}

void schedule_fini(struct schedule *schedule)
{
	free(schedule->steps);
	free(schedule->parts);
	free(schedule->stages);
	*schedule = (struct schedule){0};
}
