#include "server/graph_layout.h"

#include <stdlib.h>
#include <string.h>

#include "proto/tensor.h"

#define NO_PART UINT32_MAX

/* When a step runs, in places of the schedule's row of steps. */
struct moment {
	uint32_t place;
	uint32_t time; /* of all the schedule: steps that run at once have one */
	uint32_t part; /* NO_PART: its stage has but one */
};

/* An item's life: by places within its part, or by times of all. */
struct life {
	uint32_t part;
	uint32_t first_place, last_place;
	uint32_t first_time, last_time;
};

struct laying {
	const struct layout *layout;
	const struct schedule *schedule;
	struct moment *moments;   /* [step_count + 1]: the last is the end's */
	struct life *lives;       /* [item_count] */
	uint32_t *by_part;        /* [item_count]: items of parts, part after part, then those of none */
	uint32_t *part_first;     /* [part_count + 2]: of by_part; the last group is those of none */
	struct plan_item *plan;   /* [item_count + part_count] */
	uint32_t *plan_of;        /* [item_count + part_count]: which item, or item_count + part */
	uint64_t *part_bytes;     /* [part_count] */
	uint64_t *part_offset;    /* [part_count] */
};

/* ---- When ---- */

static void find_moments(struct laying *l)
{
	const struct schedule *schedule = l->schedule;
	for (uint32_t s = 0; s < schedule->stage_count; s++) {
		const struct schedule_stage *stage = &schedule->stages[s];
		const uint32_t begin = schedule->parts[stage->first].first;
		for (uint32_t k = stage->first; k < stage->first + stage->count; k++) {
			const struct schedule_part *part = &schedule->parts[k];
			for (uint32_t i = part->first; i < part->first + part->count; i++)
				l->moments[schedule->steps[i]] = (struct moment){i, stage->count == 1 ? i : begin, stage->count == 1 ? NO_PART : k};
		}
	}
	l->moments[schedule->step_count] = (struct moment){schedule->step_count, schedule->step_count, NO_PART};
}

static void find_lives(struct laying *l)
{
	const struct layout *layout = l->layout;
	for (uint32_t i = 0; i < layout->item_count; i++) {
		const struct moment *made = &l->moments[layout->items[i].step];
		l->lives[i] = (struct life){made->part, made->place, made->place, made->time, made->time};
	}
	for (uint32_t i = 0; i < layout->use_count; i++) {
		struct life *life = &l->lives[layout->uses[i].item];
		const struct moment *used = &l->moments[layout->uses[i].step];
		if (used->part != life->part)
			life->part = NO_PART;
		if (used->place > life->last_place)
			life->last_place = used->place;
		if (used->time > life->last_time)
			life->last_time = used->time;
	}
}

/* ---- Where ---- */

static uint32_t group_of(const struct laying *l, uint32_t item)
{
	return l->lives[item].part == NO_PART ? l->schedule->part_count : l->lives[item].part;
}

static void sort_by_part(struct laying *l)
{
	const uint32_t count = l->layout->item_count, groups = l->schedule->part_count + 1;
	for (uint32_t i = 0; i < count; i++)
		l->part_first[group_of(l, i) + 1]++;
	for (uint32_t i = 0; i < groups; i++)
		l->part_first[i + 1] += l->part_first[i];
	uint32_t *next = l->plan_of; /* not needed yet */
	memcpy(next, l->part_first, groups * sizeof next[0]);
	for (uint32_t i = 0; i < count; i++)
		l->by_part[next[group_of(l, i)]++] = i;
}

/* Steps rise within a part, and items by step: so do these. */
static bool plan_part(struct laying *l, uint32_t part)
{
	const uint32_t first = l->part_first[part], count = l->part_first[part + 1] - first;
	struct plan_sizes sizes;
	for (uint32_t i = 0; i < count; i++) {
		const uint32_t item = l->by_part[first + i];
		l->plan[i] = (struct plan_item){.first = l->lives[item].first_place, .last = l->lives[item].last_place, .bytes = l->layout->items[item].bytes};
	}
	if (!graph_plan(l->plan, count, &sizes))
		return false;
	for (uint32_t i = 0; i < count; i++)
		l->layout->items[l->by_part[first + i]].offset = l->plan[i].offset;
	l->part_bytes[part] = sizes.peak_bytes;
	return true;
}

struct entry {
	struct plan_item item;
	uint32_t of;
};

static int by_first(const void *a, const void *b)
{
	const struct entry *x = a, *y = b;
	return x->item.first != y->item.first ? (x->item.first < y->item.first ? -1 : 1) : (x->of > y->of) - (x->of < y->of);
}

/* What is there for whole stages, and each part's bytes. */
static uint32_t list_all(const struct laying *l, struct entry *entries)
{
	const uint32_t items = l->layout->item_count, parts = l->schedule->part_count;
	uint32_t count = 0;
	for (uint32_t i = l->part_first[parts]; i < items; i++) {
		const uint32_t item = l->by_part[i];
		entries[count++] = (struct entry){{.first = l->lives[item].first_time, .last = l->lives[item].last_time, .bytes = l->layout->items[item].bytes}, item};
	}
	for (uint32_t part = 0; part < parts; part++) {
		if (l->part_bytes[part] == 0)
			continue;
		const uint32_t time = l->moments[l->schedule->steps[l->schedule->parts[part].first]].time;
		entries[count++] = (struct entry){{.first = time, .last = time, .bytes = l->part_bytes[part]}, items + part};
	}
	qsort(entries, count, sizeof entries[0], by_first);
	return count;
}

static bool plan_all(struct laying *l, struct plan_sizes *sizes)
{
	const uint32_t items = l->layout->item_count, parts = l->schedule->part_count;
	struct entry *entries = calloc((size_t)items + parts + 1, sizeof entries[0]);
	if (entries == NULL)
		return false;
	const uint32_t count = list_all(l, entries);
	for (uint32_t i = 0; i < count; i++) {
		l->plan[i] = entries[i].item;
		l->plan_of[i] = entries[i].of;
	}
	free(entries);
	if (!graph_plan(l->plan, count, sizes))
		return false;
	for (uint32_t i = 0; i < count; i++)
		*(l->plan_of[i] < items ? &l->layout->items[l->plan_of[i]].offset : &l->part_offset[l->plan_of[i] - items]) = l->plan[i].offset;
	return true;
}

static bool place(struct laying *l, struct plan_sizes *sizes)
{
	uint64_t sum = 0;
	bool placed = true;
	find_moments(l);
	find_lives(l);
	sort_by_part(l);
	for (uint32_t part = 0; placed && part < l->schedule->part_count; part++)
		placed = l->part_first[part] == l->part_first[part + 1] || plan_part(l, part);
	if (!placed || !plan_all(l, sizes))
		return false;
	for (uint32_t i = 0; i < l->layout->item_count; i++) {
		if (l->lives[i].part != NO_PART)
			l->layout->items[i].offset += l->part_offset[l->lives[i].part];
		if (!size_add(sum, l->layout->items[i].bytes, &sum))
			return false;
	}
	sizes->sum_bytes = sum;
	return true;
}

/* ---- */

bool graph_layout(const struct layout *layout, const struct schedule *schedule, struct plan_sizes *sizes_out)
{
	const size_t items = (size_t)layout->item_count + 1, parts = (size_t)schedule->part_count + 2;
	struct plan_sizes sizes = {0};
	struct laying l = {
	    .layout = layout,
	    .schedule = schedule,
	    .moments = calloc((size_t)schedule->step_count + 1, sizeof l.moments[0]),
	    .lives = calloc(items, sizeof l.lives[0]),
	    .by_part = calloc(items, sizeof l.by_part[0]),
	    .part_first = calloc(parts, sizeof l.part_first[0]),
	    .plan = calloc(items + parts, sizeof l.plan[0]),
	    .plan_of = calloc(items + parts, sizeof l.plan_of[0]),
	    .part_bytes = calloc(parts, sizeof l.part_bytes[0]),
	    .part_offset = calloc(parts, sizeof l.part_offset[0]),
	};
	const bool placed = l.moments != NULL && l.lives != NULL && l.by_part != NULL && l.part_first != NULL && l.plan != NULL && l.plan_of != NULL &&
	                    l.part_bytes != NULL && l.part_offset != NULL && place(&l, &sizes);
	free(l.moments);
	free(l.lives);
	free(l.by_part);
	free(l.part_first);
	free(l.plan);
	free(l.plan_of);
	free(l.part_bytes);
	free(l.part_offset);
	if (placed)
		*sizes_out = sizes;
	return placed;
}
