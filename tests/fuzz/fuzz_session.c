/* A whole daemon, asked over a socket pair by a client that an input makes up step by step. */
#include "session.h"

static struct server *server;

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	server = session_start();
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct fuzz_input input = {data, bytes};
	struct peer peer;
	peer_open(&peer, server, fuzz_u8(&input) % 4 != 0);
	script_run(&peer, &input);
	peer_finish(&peer, server);
	return 0;
}
