#include "server/identity.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "server/config.h"
#include "server/conn_internal.h"
#include "server/conn_tls.h"
#include "server/daemon.h"

void identity_hash_token(const char *token, size_t bytes, uint8_t out[TOKEN_HASH_BYTES])
{
	unsigned length = TOKEN_HASH_BYTES;
	if (EVP_Digest(token, bytes, out, &length, EVP_sha256(), NULL) != 1)
		memset(out, 0xff, TOKEN_HASH_BYTES);
}

/* ---- Finding ---- */

static const struct config_identity *named(const struct config *config, const char *name)
{
	for (size_t i = 0; i < config->identity_count; i++)
		if (strcmp(config->identities[i].access->identity, name) == 0)
			return &config->identities[i];
	return NULL;
}

/* Its own entry's, else that of "*" under its own name, else `rights`. */
static struct access *access_of(const struct config *config, const char *name, uint32_t rights, opd_error *error)
{
	const struct config_identity *own = named(config, name);
	if (own != NULL)
		return access_ref(own->access);
	const struct config_identity *star = strcmp(name, "anonymous") == 0 || rights == ACCESS_ALL ? NULL : named(config, "*");
	struct access *access = star == NULL ? access_create(name, name, rights) : access_copy(star->access, name);
	if (access == NULL)
		(void)opd_fail(error, OPD_RESOURCE_EXHAUSTED, "identity %.80s: out of memory", name);
	return access;
}

static bool in_group(const struct credential *credential, gid_t gid)
{
	for (uint32_t i = 0; i < credential->gid_count; i++)
		if (credential->gids[i] == gid)
			return true;
	return false;
}

/* A user's own entry goes before its groups'. Root and the daemon's own user may do everything unless an entry says otherwise. */
static struct access *of_unix(const struct config *config, const struct credential *credential, opd_error *error)
{
	char name[IDENTITY_BYTES];
	for (size_t i = 0; i < config->identity_count; i++)
		if (config->identities[i].has_uid && config->identities[i].uid == credential->uid)
			return access_ref(config->identities[i].access);
	const bool owner = credential->uid == 0 || credential->uid == geteuid();
	for (size_t i = 0; !owner && i < config->identity_count; i++)
		if (config->identities[i].has_gid && in_group(credential, config->identities[i].gid))
			return access_ref(config->identities[i].access);
	(void)snprintf(name, sizeof name, "uid:%u", (unsigned)credential->uid);
	return access_of(config, name, owner ? ACCESS_ALL : ACCESS_USER, error);
}

static struct access *of_certificate(const struct config *config, const char *subject, opd_error *error)
{
	for (size_t i = 0; i < config->identity_count; i++)
		if (config->identities[i].certificate != NULL && strcmp(config->identities[i].certificate, subject) == 0)
			return access_ref(config->identities[i].access);
	char name[SUBJECT_BYTES + 8];
	(void)snprintf(name, sizeof name, "cert:%s", subject);
	if (strlen(name) < IDENTITY_BYTES)
		return access_of(config, name, ACCESS_USER, error);
	(void)opd_fail(error, OPD_UNAUTHENTICATED, "certificate %.200s: a subject of more than %u bytes needs an entry in identities", subject, IDENTITY_BYTES - 6);
	return NULL;
}

/* All are compared, whatever the first ones are. */
static struct access *of_token(const struct config *config, const uint8_t hash[TOKEN_HASH_BYTES], opd_error *error)
{
	const struct config_token *found = NULL;
	for (size_t i = 0; i < config->token_count; i++)
		if (CRYPTO_memcmp(config->tokens[i].hash, hash, TOKEN_HASH_BYTES) == 0)
			found = &config->tokens[i];
	if (found != NULL)
		return access_of(config, found->identity, ACCESS_USER, error);
	(void)opd_fail(error, OPD_UNAUTHENTICATED, "the token is not one that this server knows");
	return NULL;
}

struct access *identity_find(const struct config *config, const struct credential *credential, opd_error *error)
{
	switch (credential->kind) {
	case CREDENTIAL_UNIX:
		return of_unix(config, credential, error);
	case CREDENTIAL_CERTIFICATE:
		return of_certificate(config, credential->subject, error);
	case CREDENTIAL_TOKEN:
		return of_token(config, credential->token, error);
	case CREDENTIAL_EMBEDDED:
		return access_create("embedded", "embedded", ACCESS_ALL);
	case CREDENTIAL_NONE:
		break;
	}
	return access_of(config, "anonymous", ACCESS_USER, error);
}

/* ---- Of a connection ---- */

void identity_of_unix(struct conn *conn)
{
	struct credential *credential = &conn->session->credential;
	uv_os_fd_t fd;
	struct ucred peer;
	socklen_t bytes = sizeof peer;
	if (uv_fileno(&conn->handle, &fd) != 0 || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0)
		return; /* anonymous, with no more rights than that */
	(void)snprintf(conn->peer, sizeof conn->peer, "unix:uid=%u,pid=%d", (unsigned)peer.uid, (int)peer.pid);
	credential->kind = CREDENTIAL_UNIX;
	credential->uid = peer.uid;
	bytes = sizeof credential->gids - sizeof credential->gids[0];
	credential->gid_count = getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, credential->gids, &bytes) == 0 ? bytes / (socklen_t)sizeof credential->gids[0] : 0;
	credential->gids[credential->gid_count++] = peer.gid;
}

static opd_status take_token(struct credential *credential, struct msg_text token, opd_error *error)
{
	if (token.bytes > TOKEN_BYTES_MAX)
		return opd_fail(error, OPD_UNAUTHENTICATED, "a token of %zu bytes, expected at most %u", token.bytes, TOKEN_BYTES_MAX);
	identity_hash_token(token.data, token.bytes, credential->token);
	credential->kind = CREDENTIAL_TOKEN;
	return OPD_OK;
}

static opd_status take_certificate(struct conn *conn, struct credential *credential, opd_error *error)
{
	char subject[SUBJECT_BYTES];
	if (conn->tls == NULL || !conn_tls_has_certificate(conn))
		return OPD_OK;
	if (!conn_tls_subject(conn, subject))
		return opd_fail(error, OPD_UNAUTHENTICATED, "the certificate's subject is empty, or has more than %u bytes", SUBJECT_BYTES - 1);
	credential->subject = strdup(subject);
	if (credential->subject == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "identity: out of memory");
	credential->kind = CREDENTIAL_CERTIFICATE;
	return OPD_OK;
}

/* NULL: the daemon doesn't serve it, or not here. */
static struct access *identity_of(const struct conn *conn, opd_error *error)
{
	const struct config *config = conn->server->config;
	const struct credential *credential = &conn->session->credential;
	if (credential->kind != CREDENTIAL_NONE || !conn->remote || config->allow_anonymous || named(config, "anonymous") != NULL)
		return identity_find(config, credential, error);
	(void)opd_fail(error, OPD_UNAUTHENTICATED, "this port wants to know who its clients are: connect with a token%s",
	               config->tls.clients == TLS_CLIENTS_OPTIONAL ? " or a certificate" : "");
	return NULL;
}

opd_status identity_settle(struct conn *conn, struct msg_text token, opd_error *error)
{
	struct session *session = conn->session;
	struct credential *credential = &session->credential;
	opd_status status = token.bytes != 0 ? take_token(credential, token, error) : take_certificate(conn, credential, error);
	struct access *access = status == OPD_OK ? identity_of(conn, error) : NULL;
	if (status == OPD_OK && access == NULL)
		return (opd_status)error->status;
	if (status == OPD_OK && !session_set_access(session, access)) {
		access_unref(access);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "identity: out of memory");
	}
	return status;
}

static void recheck(struct server *server, struct io_loop *io)
{
	for (struct conn *conn = io->conns; conn != NULL; conn = conn->next) {
		opd_error error;
		if (!conn->greeted || conn->closing)
			continue;
		struct access *now = identity_of(conn, &error);
		if (now == NULL || !access_same(now, conn->session->access)) {
			LOG(server->log, LOG_INFO, "identity changed", LOG_UINT("session", conn->session->id), LOG_STR("identity", conn->session->access->identity));
			conn->broken = true; /* nothing more is taken from it; what it has in flight is answered */
			conn_stop_reading(conn);
			conn_abandon_half_sent(conn, "the session ends before the payload is there");
			conn_goaway(conn, "what this identity may do has changed: connect again");
		}
		access_unref(now);
	}
}

void identity_recheck(struct server *server)
{
	for (uint32_t i = 0; i < server->loop_count; i++)
		recheck(server, &server->loops[i]);
}
