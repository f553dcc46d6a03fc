/* The daemon's certificate, and whom it believes: what every TLS listener uses, made from the configuration.
 *
 * Layer: server. Threads: made by the one that builds a configuration (it reads files), then constant; connections keep what they use of it alive by themselves.
 * Life: tls_context_create → belongs to its struct config, a reload makes a new one (whose tickets the old one's clients don't have, so that nobody resumes past a changed CA) → tls_context_destroy.
 * Not here: connections (server/conn_tls.h), what a certificate's owner may do (server/access.h). */
#ifndef OPD_SERVER_TLS_CONTEXT_H
#define OPD_SERVER_TLS_CONTEXT_H

#include <openssl/ssl.h>

#include "proto/tls.h"

struct config;
struct log;

/* A key and a certificate of its own, for a first try: made once a process, so that a reload doesn't change what clients have pinned. */
struct tls_self;
/* NULL: OpenSSL can't (*error). P-256, a year, for this host's name, localhost, 127.0.0.1 and ::1. */
struct tls_self *tls_self_create(opd_error *error);
void tls_self_destroy(struct tls_self *self);

struct tls_context {
	SSL_CTX *ssl;
	char fingerprint[TLS_FINGERPRINT_TEXT_BYTES]; /* of the certificate */
	char subject[TLS_SUBJECT_BYTES];
	char not_after[32];
	bool expired; /* when it was read */
};

/* From config's tls keys, or from `self` (may be NULL) where they name no certificate. INVALID_ARGUMENT names the key, the file and what is wrong: permissions of the key, a key of
 * another certificate, no certificate at all, client certificates without a CA. */
OPD_MUST_USE opd_status tls_context_create_server(const struct config *config, const struct tls_self *self, struct tls_context **context_out, opd_error *error);
/* Which one is in use, and whether it has expired. NULL is allowed. */
void tls_context_log(const struct tls_context *context, struct log *log);
/* NULL is allowed. */
void tls_context_destroy(struct tls_context *context);

#endif
