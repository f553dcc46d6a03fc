#include "client/opctl/picture.h"

#include <stdlib.h>
#include <string.h>

#include "client/opctl/print.h"

#define X(id, key, name) name,
const char *const picture_order_names[ORDER_COUNT] = {PICTURE_ORDERS(X)};
#undef X
#define X(id, key, name) key,
const char picture_order_keys[ORDER_COUNT] = {PICTURE_ORDERS(X)};
#undef X

opd_status picture_order_parse(const char *name, picture_order *order_out, opd_error *error)
{
	for (unsigned i = 0; i < ORDER_COUNT; i++) {
		if (strcmp(name, picture_order_names[i]) != 0)
			continue;
		*order_out = (picture_order)i;
		return OPD_OK;
	}
	return opd_fail(error, OPD_INVALID_ARGUMENT, "--sort is '%s', expected share, jobs, wait, queued, memory or id", name);
}

/* ---- Taking one ---- */

#define SESSIONS_MAX 1000000u /* that a daemon may have; one that tells of more would fill our memory */

static opd_status out_of_memory(opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
}

static opd_status add_page(struct picture *picture, const opd_sharing *page, opd_error *error)
{
	const opd_sharing **pages = realloc(picture->pages, (picture->page_count + 1) * sizeof pages[0]);
	if (pages == NULL) {
		opd_document_free(page);
		return out_of_memory(error);
	}
	if (page->session_count > SESSIONS_MAX - picture->count) {
		opd_document_free(page);
		return opd_fail(error, OPD_DATA_LOSS, "malformed answer from the server: more than %u sessions", SESSIONS_MAX);
	}
	picture->pages = pages;
	picture->pages[picture->page_count++] = page;
	picture->count += page->session_count;
	return OPD_OK;
}

static opd_status make_lines(struct picture *picture, opd_error *error)
{
	uint32_t at = 0;
	picture->lane_count = picture->pages[0]->lane_count;
	picture->lines = calloc(picture->count + 1, sizeof picture->lines[0]);
	picture->lane_use = calloc(picture->lane_count + 1, sizeof picture->lane_use[0]);
	if (picture->lines == NULL || picture->lane_use == NULL)
		return out_of_memory(error);
	for (uint32_t i = 0; i < picture->page_count; i++)
		for (uint32_t k = 0; k < picture->pages[i]->session_count; k++)
			picture->lines[at++].session = &picture->pages[i]->sessions[k];
	return OPD_OK;
}

opd_status picture_take(opd_client *client, struct picture *picture, opd_error *error)
{
	const opd_sharing *page;
	uint64_t next = 0;
	opd_status status;
	*picture = (struct picture){0};
	do {
		status = opd_sessions(client, next, &page, error);
		if (status != OPD_OK)
			break;
		next = page->next;
		status = add_page(picture, page, error);
	} while (status == OPD_OK && next != 0);
	if (status == OPD_OK)
		status = make_lines(picture, error);
	if (status != OPD_OK)
		picture_free(picture);
	return status;
}

void picture_free(struct picture *picture)
{
	for (uint32_t i = 0; i < picture->page_count; i++)
		opd_document_free(picture->pages[i]);
	free(picture->pages);
	free(picture->lines);
	free(picture->lane_use);
	*picture = (struct picture){0};
}

/* ---- What was used between two ---- */

/* What a counter has risen by; one that has fallen is another's. */
static uint64_t risen(uint64_t before, uint64_t now)
{
	return now > before ? now - before : 0;
}

/* Lanes come in one order; a device's appears when it is first used. Returns the device time of all. */
static uint64_t compare_lanes(const struct picture *before, struct picture *now, double span_ns)
{
	const opd_sharing *page = now->pages[0], *was = before->pages[0];
	uint64_t all_ns = 0;
	for (uint32_t i = 0; i < page->lane_count; i++) {
		const opd_lane_state *lane = &page->lanes[i];
		uint64_t start_ns = 0;
		for (uint32_t k = 0; k < was->lane_count; k++)
			if (strcmp(was->lanes[k].name, lane->name) == 0)
				start_ns = was->lanes[k].device_ns;
		const uint64_t used_ns = risen(start_ns, lane->device_ns);
		now->lane_use[i] = span_ns > 0 ? (double)used_ns / span_ns / (lane->threads == 0 ? 1 : lane->threads) : 0;
		all_ns += used_ns;
	}
	return all_ns;
}

/* Both rise by session. Returns the device time of all sessions; `share` is in ns yet. */
static uint64_t compare_sessions(const struct picture *before, struct picture *now)
{
	static const opd_usage none;
	uint64_t all_ns = 0;
	uint32_t k = 0;
	for (uint32_t i = 0; i < now->count; i++) {
		struct picture_line *line = &now->lines[i];
		const uint64_t number = line->session->session;
		while (k < before->count && before->lines[k].session->session < number)
			k++;
		const opd_usage *was = k < before->count && before->lines[k].session->session == number ? &before->lines[k].session->usage : &none;
		const opd_usage *usage = &line->session->usage;
		const uint64_t used_ns = risen(was->device_ns, usage->device_ns), jobs = risen(was->jobs, usage->jobs);
		line->share = (double)used_ns;
		line->jobs = now->span_s > 0 ? (double)jobs / now->span_s : 0;
		line->worked = jobs != 0;
		line->wait_ns = jobs == 0 ? 0 : (double)risen(was->wait_ns, usage->wait_ns) / (double)jobs;
		all_ns += used_ns;
	}
	return all_ns;
}

void picture_compare(const struct picture *before, struct picture *now)
{
	now->span_s = (double)risen(before->pages[0]->uptime_us, now->pages[0]->uptime_us) / 1e6;
	const uint64_t of_lanes_ns = compare_lanes(before, now, now->span_s * 1e9);
	const uint64_t of_sessions_ns = compare_sessions(before, now);
	/* A lane is told of what ran on the loop a little later than the session is; and who sees only its tenant's sessions sees all of a lane. */
	const uint64_t all_ns = of_lanes_ns > of_sessions_ns ? of_lanes_ns : of_sessions_ns;
	for (uint32_t i = 0; i < now->count; i++)
		now->lines[i].share = all_ns == 0 ? 0 : now->lines[i].share / (double)all_ns;
}

/* ---- Sorting ---- */

struct sort {
	picture_order order;
	bool reversed;
};

static int compare_values(double one, double other)
{
	return one < other ? 1 : one > other ? -1 : 0;
}

static int compare_by(picture_order order, const struct picture_line *one, const struct picture_line *other)
{
	switch (order) {
	case ORDER_SHARE:
		return compare_values(one->share, other->share);
	case ORDER_JOBS:
		return compare_values(one->jobs, other->jobs);
	case ORDER_WAIT:
		return compare_values(one->wait_ns, other->wait_ns);
	case ORDER_QUEUED:
		return compare_values(one->session->queued, other->session->queued);
	case ORDER_MEMORY:
		return compare_values((double)one->session->memory_bytes, (double)other->session->memory_bytes);
	case ORDER_ID:
	case ORDER_COUNT:
		break;
	}
	return 0;
}

static int compare_lines(const void *a, const void *b, void *argument)
{
	const struct sort *sort = argument;
	const struct picture_line *one = a, *other = b;
	int way = compare_by(sort->order, one, other);
	if (way == 0)
		way = one->session->session < other->session->session ? -1 : one->session->session > other->session->session;
	return sort->reversed ? -way : way;
}

void picture_sort(struct picture *picture, picture_order order, bool reversed)
{
	struct sort sort = {order, reversed};
	qsort_r(picture->lines, picture->count, sizeof picture->lines[0], compare_lines, &sort);
}
