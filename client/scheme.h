/* How another library gives libopd a way to reach a server: libopd-embedded registers "embedded:" through it.
 *
 * Layer: client, internal to libopd and libopd-embedded (which are released together).
 * Threads: register from any thread; a connection's functions on its client's thread. */
#ifndef OPD_CLIENT_SCHEME_H
#define OPD_CLIENT_SCHEME_H

#include "opd/client.h"
#include "proto/message.h"

/* The answer to a direct call. Results' tensors have source MSG_SOURCE_INLINE and point to memory of the server. */
struct scheme_reply {
	struct msg_reply reply;
	void *owner;                   /* keeps reply and results alive */
	void (*release)(void *owner);  /* NULL: nothing to release. On the client's thread, also after disconnect */
};

struct scheme {
	const char *name; /* "embedded": addresses "embedded:rest" */
	/* A connected stream socket, whose ownership passes to the client, and the scheme's own state for it. */
	opd_status (*connect)(const char *rest, int *fd_out, void **state_out, opd_error *error);
	/* After the client has closed its socket; ends what connect started. */
	void (*disconnect)(void *state);
	/* Takes the session over from its loop, when no request is in flight on it; end gives it back. Not nested: libopd counts. */
	opd_status (*direct_begin)(void *state, opd_error *error);
	void (*direct_end)(void *state);
	/* One request, start to end, on this thread. Host operands have source MSG_SOURCE_INLINE and are borrowed for the call, not copied. The status is the
	 * reply's; reply_out is always filled in. */
	void (*direct_call)(void *state, uint64_t request_id, const struct msg_request *request, struct scheme_reply *reply_out);
};

/* Keeps `scheme`. The first of a name wins. */
OPD_API void opd_scheme_register(const struct scheme *scheme);

#endif
