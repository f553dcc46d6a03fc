/* Who a peer is: by a token, a certificate, or what the kernel says of a Unix socket; and what the configuration lets it do.
 *
 * Layer: server. Threads: identities_… are made with the configuration by one thread, then constant; identity_… are the connection's loop's, identity_recheck loop 0's at a standstill.
 * Life: config_begin_identity, config_set_identity (config_identity.c) → config_load_tokens → identity_find for each session → config_destroy.
 * A token goes before a certificate, a certificate before the socket's peer; none of them is `anonymous`. Tokens are kept as SHA-256: they have 256 bits of chance, so that nothing is gained
 * by a slow hash, which would be a lever for who sends wrong ones. All are compared, in constant time.
 * Not here: what is then checked (server/access.h). */
#ifndef OPD_SERVER_IDENTITY_H
#define OPD_SERVER_IDENTITY_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "server/access.h"

#define TOKEN_HASH_BYTES 32u
#define TOKEN_BYTES_MAX 256u
#define SUBJECT_BYTES 256u

struct config;
struct conn;
struct server;

/* One entry of `identities`. */
struct config_identity {
	struct access *access; /* its name is the identity's; "*": every other that has authenticated itself */
	char *certificate;     /* subject, as RFC 2253 writes it; NULL: none */
	bool has_uid;
	bool has_gid;
	uid_t uid;
	gid_t gid;
	unsigned line;
};

/* One line of the tokens' file. */
struct config_token {
	char identity[IDENTITY_BYTES];
	uint8_t hash[TOKEN_HASH_BYTES];
};

/* How a session said who it is, so that a reload can ask again. */
typedef enum credential_kind {
	CREDENTIAL_NONE = 0,
	CREDENTIAL_UNIX,
	CREDENTIAL_CERTIFICATE,
	CREDENTIAL_TOKEN,
	CREDENTIAL_EMBEDDED, /* this process */
} credential_kind;

struct credential {
	credential_kind kind;
	uid_t uid;
	uint32_t gid_count;
	gid_t gids[32];
	char *subject; /* malloc */
	uint8_t token[TOKEN_HASH_BYTES];
};

/* Takes nothing, keeps nothing of `token`. */
void identity_hash_token(const char *token, size_t bytes, uint8_t out[TOKEN_HASH_BYTES]);
/* The access of whoever has this credential, referenced. NULL: UNAUTHENTICATED (*error says why), or RESOURCE_EXHAUSTED. */
struct access *identity_find(const struct config *config, const struct credential *credential, opd_error *error);

/* At accept: what the kernel says. */
void identity_of_unix(struct conn *conn);
/* At Hello, with its token ("": none): the session's access and tenant are settled. UNAUTHENTICATED: the listener wants to know who it is, and it doesn't say, or what it says isn't so. */
OPD_MUST_USE opd_status identity_settle(struct conn *conn, struct msg_text token, opd_error *error);
/* After a reload: sessions whose identity isn't there any more, or may do something else now, are told to connect again. */
void identity_recheck(struct server *server);

#endif
