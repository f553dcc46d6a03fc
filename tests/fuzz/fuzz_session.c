/* A whole daemon, asked over a socket pair by a client that an input makes up step by step. */
#include "session.h"

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	session_start();
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct fuzz_input input = {data, bytes};
	struct peer peer;
	const uint8_t how = fuzz_u8(&input);
	peer_open(&peer, &(struct peer_kind){.chunks = how % 4 != 0, .lanes = how % 32 >= 28, .modules = how >= 128, .shares = how % 128 >= 64});
	if (how % 64 >= 32)
		peer.beside = &input;
	script_run(&peer, &input);
	peer_finish(&peer);
	return 0;
}
