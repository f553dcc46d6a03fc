#include "client/tls.h"

#include <arpa/inet.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "client/connection.h"
#include "client/resumption.h"
#include "proto/tls.h"

#define IN_BYTES ((size_t)128 << 10)
#define SEALED_BYTES (8 * (size_t)TLS_RECORD_ROOM)

struct client_tls {
	struct tls tls; /* first: on_ticket finds the whole by it */
	opd_resumption *resumption; /* NULL: none */
	char *key;                  /* of what it gives and gets */
	bool filled; /* the last receive filled the buffer: there may be more */
	bool ended;  /* the socket's end was read */
	opd_error failure;
	uint8_t in[IN_BYTES];
	uint8_t sealed[SEALED_BYTES];
};

/* ---- Sending ---- */

bool client_tls_unsent(const struct client_tls *tls)
{
	return tls->tls.out_bytes != 0;
}

bool client_tls_flush(struct client_tls *own, int fd)
{
	struct tls *tls = &own->tls;
	while (tls->out_bytes != 0) {
		const ssize_t sent = send(fd, tls->out, tls->out_bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (sent < 0 && errno == EINTR)
			continue;
		const int number = errno;
		if (!tls_sent(tls, sent < 0 ? 0 : (size_t)sent)) {
			errno = ENOMEM;
			return false;
		}
		errno = number;
		if (sent < 0)
			return false;
	}
	return true;
}

ssize_t client_tls_send(struct client_tls *own, int fd, const struct iovec *pieces, size_t count)
{
	size_t taken;
	if (!client_tls_flush(own, fd))
		return -1;
	tls_lend(&own->tls, own->sealed, sizeof own->sealed);
	if (tls_write(&own->tls, pieces, count, &taken, &own->failure) != OPD_OK) {
		errno = EPROTO;
		return -1;
	}
	return client_tls_flush(own, fd) || errno == EAGAIN ? (ssize_t)taken : -1;
}

/* ---- Receiving ---- */

bool client_tls_pending(const struct client_tls *own)
{
	return own->tls.in_bytes != 0 || tls_pending(&own->tls);
}

const opd_error *client_tls_failure(const struct client_tls *own)
{
	return own->failure.status == OPD_OK ? NULL : &own->failure;
}

/* More ciphertext. As recv. */
static ssize_t receive(struct client_tls *own, int fd, int flags)
{
	const ssize_t got = recv(fd, own->in, sizeof own->in, flags);
	own->filled = got == (ssize_t)sizeof own->in;
	own->ended = own->ended || got == 0;
	if (got > 0) {
		own->tls.in = own->in;
		own->tls.in_bytes = (size_t)got;
	}
	return got;
}

/* One piece, from what is at hand. False: it failed. */
static bool open_piece(struct client_tls *own, const struct iovec *piece, size_t *bytes_out)
{
	size_t done = 0, got = 1;
	while (done < piece->iov_len && got != 0) {
		if (tls_read(&own->tls, (uint8_t *)piece->iov_base + done, piece->iov_len - done, &got, &own->failure) != OPD_OK)
			return false;
		done += got;
	}
	*bytes_out = done;
	return true;
}

ssize_t client_tls_receive(struct client_tls *own, int fd, const struct iovec *pieces, size_t count, bool wait)
{
	size_t total = 0;
	for (size_t i = 0, at = 0; i < count;) {
		const struct iovec left = {(uint8_t *)pieces[i].iov_base + at, pieces[i].iov_len - at};
		size_t bytes = 0;
		if (!open_piece(own, &left, &bytes)) {
			errno = EPROTO;
			return -1;
		}
		total += bytes;
		at += bytes;
		if (bytes == left.iov_len) {
			at = 0;
			i++;
			continue;
		}
		/* All that was at hand is opened. More is asked for while nothing came, or where the last time filled the buffer: the system call that finds nothing is spared. */
		if (own->tls.ended || own->ended || (total != 0 && !own->filled))
			break;
		const ssize_t got = receive(own, fd, total == 0 && wait ? 0 : MSG_DONTWAIT);
		if (got < 0 && total == 0)
			return -1;
		if (got <= 0)
			break;
	}
	return (ssize_t)total;
}

/* ---- Verifying ---- */

static bool is_address(const char *host)
{
	unsigned char room[sizeof(struct in6_addr)];
	return inet_pton(AF_INET, host, room) == 1 || inet_pton(AF_INET6, host, room) == 1;
}

static opd_status expect_name(SSL *ssl, const char *name, opd_error *error)
{
	const bool address = is_address(name);
	const bool set = address ? X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), name) == 1 : SSL_set1_host(ssl, name) == 1 && SSL_set_tlsext_host_name(ssl, name) == 1;
	SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
	return set ? OPD_OK : opd_fail(error, OPD_INVALID_ARGUMENT, "TLS: server name \"%.200s\" is no name", name);
}

static opd_status use_authorities(SSL_CTX *context, const opd_connect_options *options, opd_error *error)
{
	char reason[200];
	const bool known = options->ca_file != NULL ? SSL_CTX_load_verify_file(context, options->ca_file) == 1 : SSL_CTX_set_default_verify_paths(context) == 1;
	if (!known && options->ca_file != NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "CA file %.200s: %s, expected certificates in PEM", options->ca_file, tls_reason(reason, sizeof reason));
	if (!known)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "TLS: the system's authorities: %s", tls_reason(reason, sizeof reason));
	SSL_CTX_set_verify(context, SSL_VERIFY_PEER, tls_on_verify);
	return OPD_OK;
}

static opd_status make_context(const opd_connect_options *options, SSL_CTX **context_out, opd_error *error)
{
	uint8_t digest[TLS_FINGERPRINT_BYTES];
	if (options->fingerprint != NULL && !tls_fingerprint_parse(options->fingerprint, digest))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "fingerprint \"%.100s\": expected sha256: and 64 hexadecimal digits", options->fingerprint);
	if ((options->certificate_file == NULL) != (options->key_file == NULL))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "TLS: a client certificate needs both its file and its key's");
	SSL_CTX *context = tls_context_create(false);
	if (context == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "TLS: out of memory");
	opd_status status = OPD_OK;
	if (options->fingerprint == NULL || options->ca_file != NULL)
		status = use_authorities(context, options, error);
	if (status == OPD_OK && options->certificate_file != NULL)
		status = tls_context_use_files(context, options->certificate_file, options->key_file, error);
	if (status != OPD_OK) {
		SSL_CTX_free(context);
		return status;
	}
	*context_out = context;
	return OPD_OK;
}

static opd_status check_fingerprint(const struct tls *tls, const char *expected, opd_error *error)
{
	uint8_t wanted[TLS_FINGERPRINT_BYTES], found[TLS_FINGERPRINT_BYTES];
	char text[TLS_FINGERPRINT_TEXT_BYTES];
	X509 *certificate = SSL_get1_peer_certificate(tls->ssl);
	if (certificate == NULL || !tls_fingerprint_parse(expected, wanted)) {
		X509_free(certificate);
		return opd_fail(error, OPD_UNAUTHENTICATED, "TLS: the server has no certificate");
	}
	tls_fingerprint(certificate, found);
	(void)tls_fingerprint_text(certificate, text);
	X509_free(certificate);
	if (CRYPTO_memcmp(wanted, found, sizeof found) == 0)
		return OPD_OK;
	return opd_fail(error, OPD_UNAUTHENTICATED, "TLS: the server's certificate has the fingerprint %s, expected %.100s", text, expected);
}

/* ---- Resuming ---- */

static int on_ticket(SSL *ssl, SSL_SESSION *session)
{
	const struct client_tls *own = SSL_get_app_data(ssl);
	resumption_put(own->resumption, own->key, session);
	return 1; /* it is ours */
}

static void use_resumption(struct client_tls *own, SSL_CTX *context, const char *address, const opd_connect_options *options)
{
	if (options->resumption == NULL)
		return;
	own->resumption = resumption_ref(options->resumption);
	own->key = resumption_key(address, options);
	(void)SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
	SSL_CTX_sess_set_new_cb(context, on_ticket);
	SSL_SESSION *session = resumption_take(own->resumption, own->key);
	if (session != NULL && SSL_set_session(own->tls.ssl, session) != 1)
		ERR_clear_error(); /* a full handshake, then */
	SSL_SESSION_free(session);
}

bool client_tls_resumed(const struct client_tls *own)
{
	return SSL_session_reused(own->tls.ssl) == 1;
}

/* ---- Connecting ---- */

/* Until the socket is ready. */
static opd_status wait_for(int fd, short events, uint64_t deadline_us, opd_error *error)
{
	for (;;) {
		const uint64_t now = clock_us();
		if (now >= deadline_us)
			return opd_fail(error, OPD_UNAVAILABLE, "TLS: no answer in time");
		const uint64_t left_ms = (deadline_us - now) / 1000 + 1;
		struct pollfd entry = {.fd = fd, .events = events};
		if (poll(&entry, 1, left_ms > 1000 ? 1000 : (int)left_ms) > 0)
			return OPD_OK;
	}
}

static opd_status send_all(struct client_tls *own, int fd, uint64_t deadline_us, opd_error *error)
{
	while (!client_tls_flush(own, fd)) {
		if (errno != EAGAIN)
			return opd_fail(error, OPD_UNAVAILABLE, "TLS: %s", strerrordesc_np(errno));
		opd_status status = wait_for(fd, POLLOUT, deadline_us, error);
		if (status != OPD_OK)
			return status;
	}
	return OPD_OK;
}

static opd_status receive_some(struct client_tls *own, int fd, uint64_t deadline_us, opd_error *error)
{
	opd_status status = wait_for(fd, POLLIN, deadline_us, error);
	if (status != OPD_OK)
		return status;
	const ssize_t got = receive(own, fd, MSG_DONTWAIT);
	if (got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR)))
		return OPD_OK;
	return opd_fail(error, OPD_UNAVAILABLE, "TLS: %s", got == 0 ? "the server closed the connection during the handshake" : strerrordesc_np(errno));
}

static opd_status handshake(struct client_tls *own, int fd, uint64_t deadline_us, opd_error *error)
{
	for (;;) {
		opd_status status = tls_handshake(&own->tls, error);
		if (status != OPD_OK) {
			(void)client_tls_flush(own, fd); /* the alert */
			return status;
		}
		status = send_all(own, fd, deadline_us, error);
		if (status != OPD_OK || own->tls.established)
			return status;
		status = receive_some(own, fd, deadline_us, error);
		if (status != OPD_OK)
			return status;
	}
}

/* Nobody that we believe has signed it: how to be believed. */
static bool is_unknown(const SSL *ssl)
{
	switch (SSL_get_verify_result(ssl)) {
	case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
	case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
	case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
	case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
	case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
		return true;
	default:
		return false;
	}
}

static void say_how_to_trust(const SSL *ssl, opd_error *error)
{
	const size_t used = strlen(error->text);
	if (error->status == OPD_UNAUTHENTICATED && is_unknown(ssl))
		(void)snprintf(error->text + used, sizeof error->text - used, "; who has signed it is said by ca_file (--ca FILE), or the certificate is pinned by fingerprint (--fingerprint sha256:…)");
}

opd_status client_tls_connect(int fd, const char *address, const char *host, const opd_connect_options *options, uint64_t deadline_us, struct client_tls **tls_out, opd_error *error)
{
	SSL_CTX *context = NULL;
	opd_status status = make_context(options, &context, error);
	if (status != OPD_OK)
		return status;
	struct client_tls *own = malloc(sizeof *own); /* its buffers are touched as far as they are used */
	if (own == NULL) {
		SSL_CTX_free(context);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "TLS: out of memory");
	}
	own->resumption = NULL;
	own->key = NULL;
	own->filled = own->ended = false;
	own->failure.status = OPD_OK;
	status = tls_init(&own->tls, context, false, error);
	if (status == OPD_OK)
		use_resumption(own, context, address, options);
	SSL_CTX_free(context); /* the connection keeps it */
	if (status == OPD_OK)
		status = expect_name(own->tls.ssl, options->server_name != NULL ? options->server_name : host, error);
	if (status == OPD_OK) {
		status = handshake(own, fd, deadline_us, error);
		if (status != OPD_OK)
			say_how_to_trust(own->tls.ssl, error);
	}
	if (status == OPD_OK && options->fingerprint != NULL)
		status = check_fingerprint(&own->tls, options->fingerprint, error);
	if (status != OPD_OK) {
		client_tls_destroy(own, fd);
		return status;
	}
	*tls_out = own;
	return OPD_OK;
}

void client_tls_destroy(struct client_tls *own, int fd)
{
	if (own == NULL)
		return;
	if (own->tls.ssl != NULL && own->tls.out_bytes == 0) {
		tls_shutdown(&own->tls);
		(void)client_tls_flush(own, fd);
	}
	tls_fini(&own->tls);
	resumption_unref(own->resumption);
	free(own->key);
	free(own);
}
