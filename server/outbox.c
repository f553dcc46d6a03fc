#include "server/outbox.h"

#include <assert.h>
#include <string.h>

#include "server/request.h"

/* How much is put in order ahead of writing: what one turn may write. */
#define WIRE_BYTES (256u << 10)
/* By how much a turn may be passed to end a frame. */
#define TAIL_BYTES (32u << 10)

static void list_push(struct out_list *list, struct out *out)
{
	out->next = NULL;
	*(list->last == NULL ? &list->first : &list->last->next) = out;
	list->last = out;
}

static struct out *list_pop(struct out_list *list)
{
	struct out *out = list->first;
	if (out != NULL) {
		list->first = out->next;
		if (list->first == NULL)
			list->last = NULL;
	}
	return out;
}

void outbox_add(struct outbox *box, struct out *out, frame_type type, uint64_t request_id, uint8_t *frame, size_t envelope_bytes,
                const struct segment *segments, uint64_t payload_bytes, uint64_t chunk_bytes)
{
	bool chunked = chunk_bytes != 0 && payload_bytes > chunk_bytes;
	const struct frame_header header = {
		.version = FRAME_VERSION,
		.type = type,
		.flags = chunked ? FRAME_CHUNKED : 0,
		.request_id = request_id,
		.envelope_bytes = (uint32_t)envelope_bytes,
		.payload_bytes = payload_bytes,
	};
	frame_encode(&header, frame);
	out->head = frame + box->begun_bytes;
	out->head_bytes = FRAME_HEADER_BYTES + envelope_bytes - box->begun_bytes;
	box->begun_bytes = 0;
	out->frame_left = chunked ? 0 : payload_bytes;
	out->sent = 0;
	out->payload_bytes = payload_bytes;
	out->chunk_bytes = chunked ? chunk_bytes : 0;
	out->request_id = request_id;
	out->segment = segments;
	out->segment_at = 0;
	list_push(&box->small, out);
}

bool outbox_empty(const struct outbox *box)
{
	return box->wire.first == NULL && box->small.first == NULL && box->bulk.first == NULL;
}

static void next_data_frame(struct out *out)
{
	uint64_t left = out->payload_bytes - out->sent;
	out->frame_left = left < out->chunk_bytes ? left : out->chunk_bytes;
	const struct frame_header header = {
		.version = FRAME_VERSION,
		.type = FRAME_DATA,
		.request_id = out->request_id,
		.envelope_bytes = FRAME_DATA_OFFSET_BYTES,
		.payload_bytes = out->frame_left,
	};
	frame_encode(&header, out->data_head);
	frame_store_u64(out->data_head + FRAME_HEADER_BYTES, out->sent);
	out->head = out->data_head;
	out->head_bytes = sizeof out->data_head;
}

void outbox_begin(struct outbox *box, uint32_t bytes)
{
	assert(outbox_empty(box) && box->begun_bytes + bytes <= FRAME_BEGIN_BYTES);
	box->begun_bytes += bytes;
}

/* Puts frames in order until a turn's worth is there: small ones first, then one DATA frame of each bulk message in turn. */
static void fill_wire(struct outbox *box)
{
	while (box->wire_bytes < WIRE_BYTES) {
		struct out *out = list_pop(&box->small);
		if (out == NULL) {
			out = list_pop(&box->bulk);
			if (out == NULL)
				return;
			next_data_frame(out);
		}
		box->wire_bytes += out->head_bytes + out->frame_left;
		list_push(&box->wire, out);
	}
}

struct gathering {
	uv_buf_t *bufs;
	unsigned count;
	unsigned max;
	uint64_t left;
};

/* False: full. */
static bool gather_piece(struct gathering *gathering, const void *data, uint64_t bytes)
{
	if (bytes == 0)
		return true;
	if (gathering->count == gathering->max || gathering->left == 0)
		return false;
	uint64_t taken = bytes < gathering->left ? bytes : gathering->left;
	gathering->bufs[gathering->count++] = uv_buf_init((char *)data, (unsigned)taken);
	gathering->left -= taken;
	return taken == bytes;
}

static bool gather_frame(struct gathering *gathering, const struct out *out)
{
	if (!gather_piece(gathering, out->head, out->head_bytes))
		return false;
	const struct segment *segment = out->segment;
	uint64_t at = out->segment_at;
	for (uint64_t left = out->frame_left; left > 0; segment++, at = 0) {
		uint64_t bytes = segment->bytes - at < left ? segment->bytes - at : left;
		if (!gather_piece(gathering, (const uint8_t *)segment->data + at, bytes))
			return false;
		left -= bytes;
	}
	return true;
}

unsigned outbox_gather(struct outbox *box, uv_buf_t *bufs, unsigned max, uint64_t bytes, uint64_t *bytes_out)
{
	fill_wire(box);
	/* The frame under way is ended rather than cut just before its end: its tail would be a packet of its own, and wake the reader for it. */
	const struct out *first = box->wire.first;
	const uint64_t rest = first == NULL ? 0 : first->head_bytes + first->frame_left;
	if (rest > bytes && rest - bytes < TAIL_BYTES)
		bytes = rest;
	struct gathering gathering = {.bufs = bufs, .max = max, .left = bytes};
	for (const struct out *out = box->wire.first; out != NULL && gather_frame(&gathering, out); out = out->next)
		;
	*bytes_out = bytes - gathering.left;
	return gathering.count;
}

/* Moves on by `bytes` payload bytes of the frame under way. */
static void advance(struct out *out, uint64_t bytes)
{
	out->frame_left -= bytes;
	out->sent += bytes;
	while (bytes > 0) {
		uint64_t here = out->segment->bytes - out->segment_at;
		uint64_t step = bytes < here ? bytes : here;
		out->segment_at += step;
		bytes -= step;
		if (out->segment_at == out->segment->bytes) {
			out->segment++;
			out->segment_at = 0;
		}
	}
}

void outbox_consume(struct outbox *box, uint64_t bytes)
{
	assert(bytes <= box->wire_bytes);
	box->wire_bytes -= bytes;
	while (box->wire.first != NULL) {
		struct out *out = box->wire.first;
		uint64_t head = bytes < out->head_bytes ? bytes : out->head_bytes;
		out->head += head;
		out->head_bytes -= head;
		bytes -= head;
		uint64_t body = bytes < out->frame_left ? bytes : out->frame_left;
		advance(out, body);
		bytes -= body;
		if (out->head_bytes != 0 || out->frame_left != 0)
			return;
		(void)list_pop(&box->wire);
		if (out->sent < out->payload_bytes)
			list_push(&box->bulk, out);
		else
			out->written(out);
	}
}

static void list_drop(struct out_list *list)
{
	for (struct out *out = list_pop(list); out != NULL; out = list_pop(list))
		out->written(out);
}

void outbox_drop(struct outbox *box)
{
	list_drop(&box->wire);
	list_drop(&box->small);
	list_drop(&box->bulk);
	box->wire_bytes = 0;
}
