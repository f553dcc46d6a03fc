/* server/outbox.h: what leaves when, whole and in order. */
#include <check.h>
#include <string.h>

#include "server/outbox.h"
#include "server/request.h"
#include "tests/lib/suite.h"

enum { ENVELOPE_BYTES = 10, ROOM = 512 };

struct message {
	struct out out; /* first */
	uint8_t frame[FRAME_HEADER_BYTES + ENVELOPE_BYTES];
	bool written;
};

static void on_written(struct out *out)
{
	((struct message *)out)->written = true;
}

static void add(struct outbox *box, struct message *message, uint64_t id, const struct segment *payload)
{
	memset(message, 0, sizeof *message);
	memset(message->frame + FRAME_HEADER_BYTES, (int)id, ENVELOPE_BYTES);
	message->out.written = on_written;
	outbox_add(box, &message->out, FRAME_REPLY, id, message->frame, ENVELOPE_BYTES, payload, payload == NULL ? 0 : payload->bytes, 0);
}

/* All that leaves, `step` bytes a write. Returns how much it is. */
static size_t leave(struct outbox *box, size_t step, uint8_t out[ROOM])
{
	size_t at = 0;
	uv_buf_t bufs[8];
	uint64_t bytes;
	while (outbox_gather(box, bufs, 8, ROOM, &bytes) != 0) {
		size_t left = step < bytes ? step : (size_t)bytes, taken = 0;
		for (unsigned i = 0; left > 0; left -= taken, i++) {
			taken = bufs[i].len < left ? bufs[i].len : left;
			ck_assert_uint_le(at + taken, ROOM);
			memcpy(out + at, bufs[i].base, taken);
			at += taken;
		}
		outbox_consume(box, step < bytes ? step : bytes);
	}
	return at;
}

START_TEST(what_left_ahead_of_a_frame_is_not_sent_again)
{
	const size_t step = (size_t)_i + 1;
	const struct segment payload = {.data = "payload", .bytes = 7};
	struct outbox box = {.begun_bytes = 0}, ahead = box;
	struct message first, second;
	uint8_t plain[ROOM], begun[ROOM];
	add(&box, &first, 1, &payload);
	add(&box, &second, 2, NULL);
	const size_t bytes = leave(&box, step, plain);
	ck_assert_uint_eq(bytes, 2 * sizeof first.frame + payload.bytes);
	for (uint32_t before = 0; before <= FRAME_BEGIN_BYTES; before++) {
		outbox_begin(&ahead, before / 2);
		outbox_begin(&ahead, before - before / 2);
		ck_assert(outbox_empty(&ahead));
		add(&ahead, &first, 1, &payload);
		add(&ahead, &second, 2, NULL);
		ck_assert_uint_eq(leave(&ahead, step, begun), bytes - before);
		ck_assert_mem_eq(begun, plain + before, bytes - before);
		ck_assert(first.written && second.written && outbox_empty(&ahead));
	}
}
END_TEST

START_TEST(every_frame_begins_with_the_same_bytes)
{
	static const frame_type types[] = {FRAME_REPLY, FRAME_DATA, FRAME_GOAWAY};
	uint8_t any[FRAME_HEADER_BYTES], header[FRAME_HEADER_BYTES];
	frame_encode(&(struct frame_header){.version = FRAME_VERSION}, any);
	for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
		frame_encode(&(struct frame_header){.version = FRAME_VERSION, .type = types[i], .flags = FRAME_CHUNKED, .request_id = UINT64_MAX, .envelope_bytes = UINT32_MAX}, header);
		ck_assert_mem_eq(header, any, FRAME_BEGIN_BYTES);
	}
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("outbox");
	TCase *tests = tcase_create("outbox");
	tcase_add_loop_test(tests, what_left_ahead_of_a_frame_is_not_sent_again, 0, 64);
	tcase_add_test(tests, every_frame_begins_with_the_same_bytes);
	suite_add_tcase(suite, tests);
	return suite_run(suite);
}
