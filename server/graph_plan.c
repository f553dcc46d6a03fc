#include "server/graph_plan.h"

#include <stdlib.h>
#include <string.h>

#include "proto/tensor.h"

/* So many gaps are looked at: a graph made to leave tens of thousands of them must not keep a thread. */
#define GAPS_SEEN 1024u

struct gap {
	uint64_t offset;
	uint64_t bytes;
};

struct layout {
	struct gap *gaps; /* by rising offset, never touching each other or the top */
	uint32_t gap_count;
	uint64_t top;
};

/* First gap at or past `offset`. */
static uint32_t gap_find(const struct layout *layout, uint64_t offset)
{
	uint32_t low = 0, high = layout->gap_count;
	while (low < high) {
		uint32_t middle = (low + high) / 2;
		if (layout->gaps[middle].offset < offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static void gap_remove(struct layout *layout, uint32_t index)
{
	layout->gap_count--;
	memmove(&layout->gaps[index], &layout->gaps[index + 1], (layout->gap_count - index) * sizeof layout->gaps[0]);
}

static void gap_insert(struct layout *layout, uint32_t index, struct gap gap)
{
	memmove(&layout->gaps[index + 1], &layout->gaps[index], (layout->gap_count - index) * sizeof layout->gaps[0]);
	layout->gaps[index] = gap;
	layout->gap_count++;
}

/* Joins neighbours; what touches the top lowers it. */
static void give(struct layout *layout, struct gap gap)
{
	uint32_t index = gap_find(layout, gap.offset);
	if (index < layout->gap_count && gap.offset + gap.bytes == layout->gaps[index].offset) {
		gap.bytes += layout->gaps[index].bytes;
		gap_remove(layout, index);
	}
	if (index > 0 && layout->gaps[index - 1].offset + layout->gaps[index - 1].bytes == gap.offset) {
		gap.offset = layout->gaps[index - 1].offset;
		gap.bytes += layout->gaps[index - 1].bytes;
		gap_remove(layout, --index);
	}
	if (gap.offset + gap.bytes == layout->top)
		layout->top = gap.offset;
	else
		gap_insert(layout, index, gap);
}

/* False: past 2^63. */
static bool take(struct layout *layout, uint64_t bytes, uint64_t *offset_out)
{
	uint32_t best = UINT32_MAX;
	for (uint32_t i = 0; i < layout->gap_count && i < GAPS_SEEN; i++)
		if (layout->gaps[i].bytes >= bytes && (best == UINT32_MAX || layout->gaps[i].bytes < layout->gaps[best].bytes))
			best = i;
	if (best == UINT32_MAX) {
		*offset_out = layout->top;
		return size_add(layout->top, bytes, &layout->top);
	}
	struct gap *gap = &layout->gaps[best];
	*offset_out = gap->offset;
	gap->offset += bytes;
	gap->bytes -= bytes;
	if (gap->bytes == 0)
		gap_remove(layout, best);
	return true;
}

/* Indices by rising last use: a counting sort over steps would need their number, and qsort's comparison the items. */
struct ending {
	uint32_t last;
	uint32_t item;
};

static int by_last(const void *a, const void *b)
{
	const struct ending *x = a, *y = b;
	return x->last != y->last ? (x->last < y->last ? -1 : 1) : (x->item > y->item) - (x->item < y->item);
}

static bool place_all(struct layout *layout, struct plan_item *items, uint32_t count, const struct ending *endings, struct plan_sizes *sizes)
{
	uint32_t ended = 0;
	for (uint32_t i = 0; i < count; i++) {
		/* One that begins later can't end before this one does begin. */
		for (; ended < count && endings[ended].last < items[i].first; ended++) {
			const struct plan_item *item = &items[endings[ended].item];
			if (item->bytes != 0)
				give(layout, (struct gap){item->offset, item->bytes});
		}
		items[i].offset = 0;
		if (items[i].bytes != 0 && (!take(layout, items[i].bytes, &items[i].offset) || !size_add(sizes->sum_bytes, items[i].bytes, &sizes->sum_bytes)))
			return false;
		if (layout->top > sizes->peak_bytes)
			sizes->peak_bytes = layout->top;
	}
	return true;
}

bool graph_plan(struct plan_item *items, uint32_t count, struct plan_sizes *sizes_out)
{
	struct layout layout = {.gaps = calloc((size_t)count + 1, sizeof *layout.gaps)};
	struct ending *endings = calloc((size_t)count + 1, sizeof *endings);
	struct plan_sizes sizes = {0};
	bool placed = layout.gaps != NULL && endings != NULL;
	if (placed) {
		for (uint32_t i = 0; i < count; i++)
			endings[i] = (struct ending){items[i].last, i};
		qsort(endings, count, sizeof *endings, by_last);
		placed = place_all(&layout, items, count, endings, &sizes);
	}
	free(layout.gaps);
	free(endings);
	if (placed)
		*sizes_out = sizes;
	return placed;
}
