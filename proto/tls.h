/* TLS 1.3 as opd uses it, over bytes that somebody else moves: what the daemon and libopd have in common.
 *
 * Layer: proto, internal (target opd_tls, the only one of this folder that needs OpenSSL). Threads: a struct tls belongs to one thread at a time; a context may be shared.
 * Life: tls_context_create → tls_init for each connection → ciphertext that came is put into `in`, what is to be sent is found in `out` → tls_fini.
 * Only TLS 1.3, only the protocol "opd/1" (ALPN), no early data. Tickets make a second handshake cheap; they are of one context, so a new one forgets them.
 * Not here: sockets (server/conn_tls.c, client/tls.c), whose certificate is good for what (server/tls_context.h, client/tls.h). */
#ifndef OPD_PROTO_TLS_H
#define OPD_PROTO_TLS_H

#include <openssl/ssl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "opd/status.h"

#define TLS_RECORD_BYTES 16384u
#define TLS_RECORD_ROOM (TLS_RECORD_BYTES + 256u) /* what a sealed record takes at most */
#define TLS_FINGERPRINT_BYTES 32u
#define TLS_FINGERPRINT_TEXT_BYTES (7u + 2 * TLS_FINGERPRINT_BYTES + 1) /* "sha256:", hexadecimal digits, NUL */
#define TLS_SUBJECT_BYTES 256u

struct tls {
	SSL *ssl;
	const uint8_t *in; /* ciphertext at hand, borrowed; each call takes from its front */
	size_t in_bytes;
	uint8_t *out;      /* ciphertext to be sent; malloc, or lent */
	size_t out_bytes;
	size_t out_room;
	bool out_lent;
	bool established;
	bool ended; /* the peer has said that it sends nothing more */
	char *complaint; /* about the peer's certificate; NULL: none */
};

/* ---- Contexts ---- */

/* NULL: out of memory, or an OpenSSL that can't do TLS 1.3. Freed by SSL_CTX_free. */
SSL_CTX *tls_context_create(bool server);
/* A chain (leaf first) and its key from PEM files. INVALID_ARGUMENT names the file and what is wrong, also where the key isn't the certificate's. */
OPD_MUST_USE opd_status tls_context_use_files(SSL_CTX *context, const char *certificate, const char *key, opd_error *error);

/* For SSL_CTX_set_verify: remembers which certificate was wrong, and why, for the handshake's error. */
int tls_on_verify(int good, X509_STORE_CTX *store);

/* ---- One connection ---- */

OPD_MUST_USE opd_status tls_init(struct tls *tls, SSL_CTX *context, bool server, opd_error *error);
/* Zeroed memory is allowed. */
void tls_fini(struct tls *tls);

/* As far as `in` goes; `established` tells whether it is over. A failure's status says what to do: UNAUTHENTICATED (a certificate, theirs or ours), FAILED_PRECONDITION (the peer
 * speaks another version, another protocol, or no TLS), UNAVAILABLE (anything else). `out` may then hold an alert, to be sent. */
OPD_MUST_USE opd_status tls_handshake(struct tls *tls, opd_error *error);

/* OpenSSL's two buffers of 17 KiB stay with a server's connection, instead of being allocated for each record. */
void tls_keep_buffers(struct tls *tls);

/* At most `room` bytes of one record; *got_out 0: more ciphertext is needed, or the peer has `ended`. Failures as the handshake's: a client learns here that its certificate was refused. */
OPD_MUST_USE opd_status tls_read(struct tls *tls, uint8_t *to, size_t room, size_t *got_out, opd_error *error);
/* Opened bytes wait for tls_read though no ciphertext is at hand. */
bool tls_pending(const struct tls *tls);

/* Seals what fits into `out` (whole records of large pieces from where they lie, small pieces together); *taken_out: plaintext bytes, from the front of the pieces. */
OPD_MUST_USE opd_status tls_write(struct tls *tls, const struct iovec *pieces, size_t count, size_t *taken_out, opd_error *error);
/* `out` is empty and becomes `buffer`, until it is given back. */
void tls_lend(struct tls *tls, uint8_t *buffer, size_t room);
/* The first `sent` bytes of `out` are on their way: the others are kept (copied, if the buffer was lent, which then isn't any more). False: out of memory. */
OPD_MUST_USE bool tls_sent(struct tls *tls, size_t sent);
/* Says goodbye, in `out`. */
void tls_shutdown(struct tls *tls);

/* ---- Certificates ---- */

/* Of the DER form: what `openssl x509 -fingerprint -sha256` prints. */
void tls_fingerprint(const X509 *certificate, uint8_t out[TLS_FINGERPRINT_BYTES]);
const char *tls_fingerprint_text(const X509 *certificate, char out[TLS_FINGERPRINT_TEXT_BYTES]);
/* "sha256:" or nothing, then 64 hexadecimal digits, with colons or without. */
bool tls_fingerprint_parse(const char *text, uint8_t out[TLS_FINGERPRINT_BYTES]);
/* RFC 2253: "CN=alice,O=Example". False: it doesn't fit, or isn't text. */
bool tls_subject(const X509 *certificate, char out[TLS_SUBJECT_BYTES]);
/* OpenSSL's words for the last thing that went wrong on this thread, which it then forgets. */
const char *tls_reason(char *out, size_t out_bytes);

#endif
