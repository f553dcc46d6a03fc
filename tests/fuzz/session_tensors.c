/* Steps about tensors that stay: uploads whole and in parts, writes in and out of place, fetches, publications. Nothing is published lastingly: it would outlive the session,
 * whose end is checked. */
#include <string.h>

#include "session.h"

static struct msg_handle pick_kept(const struct peer *peer, uint8_t byte)
{
	const uint32_t count = peer->kept_count < PEER_HANDLES ? peer->kept_count : PEER_HANDLES;
	return count == 0 || byte % 16 == 15 ? (struct msg_handle){byte, byte} : peer->kept[byte % count];
}

static void upload(struct arena *arena, struct peer *peer, struct fuzz_input *input)
{
	struct msg_request request = {.kind = MSG_REQUEST_UPLOAD};
	uint64_t payload = 0;
	request.upload.tensor = script_take(arena, 1, sizeof *request.upload.tensor);
	script_pick_tensor(arena, peer, input, request.upload.tensor, &payload);
	beside_upload(peer, &request.upload);
	request.upload.parts = fuzz_u8(input) % 3 == 0;
	if (request.upload.parts && request.upload.tensor->source != MSG_SOURCE_NONE && payload == 0)
		request.upload.tensor->source = MSG_SOURCE_NONE;
	(void)script_send_run(peer, &request, payload, fuzz_u8(input) % 4 == 3);
}

static void write_part(struct arena *arena, struct peer *peer, struct fuzz_input *input)
{
	const uint8_t byte = fuzz_u8(input);
	struct msg_request request = {.kind = MSG_REQUEST_WRITE, .write = {.handle = pick_kept(peer, fuzz_u8(input)), .offset = byte < 240 ? byte : fuzz_u64(input)}};
	struct msg_tensor *data = script_take(arena, 1, sizeof *data);
	const size_t bytes = 1 + fuzz_u8(input) % 64;
	data->dtype = OPD_u8;
	data->rank = 1;
	data->shape[0] = (int64_t)bytes;
	data->source = byte % 2 == 0 ? MSG_SOURCE_PAYLOAD : MSG_SOURCE_INLINE;
	data->payload.bytes = bytes;
	if (data->source == MSG_SOURCE_INLINE) {
		data->inlined.data = script_take(arena, bytes, 1);
		data->inlined.bytes = bytes;
	}
	request.write.data = data;
	(void)script_send_run(peer, &request, data->source == MSG_SOURCE_PAYLOAD ? bytes : 0, byte % 8 == 6);
}

static void fetch(struct arena *arena, struct peer *peer, struct fuzz_input *input)
{
	struct msg_request request = {.kind = MSG_REQUEST_FETCH};
	uint64_t payload = 0;
	request.fetch.tensor = script_take(arena, 1, sizeof *request.fetch.tensor);
	script_pick_tensor(arena, peer, input, request.fetch.tensor, &payload);
	beside_fetch(peer, &request.fetch);
	(void)script_send_run(peer, &request, 0, false);
}

static void publish(struct arena *arena, struct peer *peer, struct fuzz_input *input)
{
	static const char *const names[] = {"a", "b/c", "", "not a name"};
	const uint8_t byte = fuzz_u8(input);
	struct msg_request request = {.kind = MSG_REQUEST_PUBLISH, .publish = {.name = msg_text(names[byte % 16 < 14 ? byte % 2 : byte % 4]), .all = byte % 3 == 0}};
	request.publish.tensor = script_take(arena, 1, sizeof *request.publish.tensor);
	request.publish.tensor->source = MSG_SOURCE_HANDLE;
	request.publish.tensor->handle = pick_kept(peer, fuzz_u8(input));
	if (byte % 5 == 4) {
		request.publish.tensor->source = MSG_SOURCE_RESULT;
		request.publish.tensor->result.request = peer->next_id - 1 - fuzz_u8(input) % 4;
		request.publish.tensor->result.output = 0;
	}
	(void)script_send_run(peer, &request, 0, false);
}

static void others(struct peer *peer, struct fuzz_input *input)
{
	static const uint8_t zeros[MSG_SHA256_BYTES];
	const uint8_t byte = fuzz_u8(input);
	const struct msg_text name = msg_text(byte % 2 == 0 ? "a" : "b/c");
	struct msg_request request = {.kind = MSG_REQUEST_LIST_TENSORS, .first = byte % 4 == 0 ? byte : 0};
	if (byte % 8 < 4)
		request = (struct msg_request){.kind = MSG_REQUEST_OPEN, .open = {.name = byte % 16 == 3 ? msg_text("") : name, .sha256 = byte % 16 == 3 ? zeros : NULL}};
	else if (byte % 8 == 4)
		request = (struct msg_request){.kind = MSG_REQUEST_WITHDRAW, .withdraw = name};
	else if (byte % 8 == 5)
		request = (struct msg_request){.kind = MSG_REQUEST_LIST_PUBLICATIONS};
	(void)script_send_run(peer, &request, 0, false);
}

void script_tensors(struct arena *arena, struct peer *peer, struct fuzz_input *input)
{
	switch (fuzz_u8(input) % 8) {
	case 0:
	case 1:
		upload(arena, peer, input);
		return;
	case 2:
	case 3:
		write_part(arena, peer, input);
		return;
	case 4:
		fetch(arena, peer, input);
		return;
	case 5:
		publish(arena, peer, input);
		return;
	default:
		others(peer, input);
	}
}
