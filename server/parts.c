#include "server/parts.h"

#include <stdlib.h>
#include <string.h>

struct parts *parts_create(void)
{
	return calloc(1, sizeof(struct parts));
}

void parts_destroy(struct parts *parts)
{
	if (parts == NULL)
		return;
	free(parts->ranges);
	free(parts);
}

static opd_status make_room(struct parts *parts, opd_error *error)
{
	if (parts->count < parts->room)
		return OPD_OK;
	if (parts->count == PARTS_MAX)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "the upload has %u separate ranges, at most %u: fill gaps first", (unsigned)parts->count + 1,
		                PARTS_MAX);
	uint32_t room = parts->room == 0 ? 8 : parts->room * 2;
	struct part *ranges = realloc(parts->ranges, room * sizeof ranges[0]);
	if (ranges == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "upload: out of memory");
	parts->ranges = ranges;
	parts->room = room;
	return OPD_OK;
}

opd_status parts_add(struct parts *parts, uint64_t begin, uint64_t end, opd_error *error)
{
	uint32_t first = 0;
	while (first < parts->count && parts->ranges[first].end < begin)
		first++;
	uint32_t last = first; /* [first, last) touch the new one and become part of it */
	while (last < parts->count && parts->ranges[last].begin <= end)
		last++;
	if (first == last) {
		opd_status status = make_room(parts, error);
		if (status != OPD_OK)
			return status;
		memmove(parts->ranges + first + 1, parts->ranges + first, (parts->count - first) * sizeof parts->ranges[0]);
		parts->ranges[first] = (struct part){begin, end};
		parts->count++;
		parts->received_bytes += end - begin;
		return OPD_OK;
	}
	for (uint32_t i = first; i < last; i++) {
		parts->received_bytes -= parts->ranges[i].end - parts->ranges[i].begin;
		begin = parts->ranges[i].begin < begin ? parts->ranges[i].begin : begin;
		end = parts->ranges[i].end > end ? parts->ranges[i].end : end;
	}
	parts->ranges[first] = (struct part){begin, end};
	parts->received_bytes += end - begin;
	memmove(parts->ranges + first + 1, parts->ranges + last, (parts->count - last) * sizeof parts->ranges[0]);
	parts->count -= last - first - 1;
	return OPD_OK;
}
