/* A whole daemon against frames whose envelopes, payloads, flags and lengths are the input's own bytes: whatever comes, no reply says INTERNAL, and nothing of the session is left. */
#include "session.h"

#define PAYLOAD_MAX 4096u

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	session_start();
	return 0;
}

/* Two bytes of length, then as many bytes as there are. */
static const uint8_t *take_piece(struct fuzz_input *input, size_t *bytes_out)
{
	const size_t high = fuzz_u8(input);
	return fuzz_bytes(input, high << 8 | fuzz_u8(input), bytes_out);
}

/* A request as it should be, but for its envelope. */
static void send_request(struct peer *peer, struct fuzz_input *input)
{
	static const uint8_t zeros[PAYLOAD_MAX];
	size_t envelope_bytes;
	const uint64_t payload = (uint64_t)fuzz_u8(input) << 4;
	const uint8_t *envelope = take_piece(input, &envelope_bytes);
	peer_frame(peer, FRAME_REQUEST, peer->next_id++, 0, envelope, envelope_bytes, payload);
	peer_send(peer, zeros, payload);
}

/* Any type, flags and lengths. */
static void send_frame(struct peer *peer, struct fuzz_input *input)
{
	size_t envelope_bytes;
	const uint8_t type = fuzz_u8(input), flags = fuzz_u8(input);
	const uint64_t id = fuzz_u8(input), payload = fuzz_u8(input) % 16 == 15 ? fuzz_u64(input) : fuzz_u8(input);
	const uint8_t *envelope = take_piece(input, &envelope_bytes);
	peer_frame(peer, (frame_type)(type % 16), id, flags, envelope, envelope_bytes, payload);
}

static void send_bytes(struct peer *peer, struct fuzz_input *input)
{
	size_t bytes;
	const uint8_t *data = take_piece(input, &bytes);
	peer_send(peer, data, bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct fuzz_input input = {data, bytes};
	struct peer peer;
	const uint8_t how = fuzz_u8(&input);
	peer_open(&peer, &(struct peer_kind){.chunks = how % 2 != 0, .modules = how >= 128, .shares = how % 128 >= 64});
	peer.rude = true;
	while (input.bytes > 0 && !peer.ended && peer.next_id < PEER_IDS) {
		const uint8_t step = fuzz_u8(&input) % 8;
		if (step < 5)
			send_request(&peer, &input);
		else if (step < 7)
			send_frame(&peer, &input);
		else
			send_bytes(&peer, &input);
		if (step % 2 == 0)
			peer_turn(&peer);
	}
	peer_finish(&peer);
	return 0;
}
