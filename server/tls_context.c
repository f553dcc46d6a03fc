#include "server/tls_context.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/config.h"

#define SELF_DAYS 365
#define CHAIN_DEPTH 5

/* ---- A certificate of its own ---- */

struct tls_self {
	EVP_PKEY *key;
	X509 *certificate;
};

void tls_self_destroy(struct tls_self *self)
{
	if (self == NULL)
		return;
	EVP_PKEY_free(self->key);
	X509_free(self->certificate);
	free(self);
}

static bool add_extension(X509 *certificate, int kind, const char *value)
{
	X509V3_CTX context;
	X509V3_set_ctx_nodb(&context);
	X509V3_set_ctx(&context, certificate, certificate, NULL, NULL, 0);
	X509_EXTENSION *extension = X509V3_EXT_conf_nid(NULL, &context, kind, value);
	const bool added = extension != NULL && X509_add_ext(certificate, extension, -1) == 1;
	X509_EXTENSION_free(extension);
	return added;
}

/* A host name that is no name of the DNS would not be read back. */
static bool plain_name(const char *name)
{
	return name[0] != '\0' && strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.") == strlen(name);
}

static bool set_names(X509 *certificate)
{
	char host[65] = "";
	char names[160];
	if (gethostname(host, sizeof host - 1) != 0 || !plain_name(host))
		(void)snprintf(host, sizeof host, "localhost");
	(void)snprintf(names, sizeof names, "DNS:%s,DNS:localhost,IP:127.0.0.1,IP:::1", host);
	X509_NAME *name = X509_get_subject_name(certificate);
	return X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_UTF8, (const unsigned char *)host, -1, -1, 0) == 1 &&
	       X509_set_issuer_name(certificate, name) == 1 && add_extension(certificate, NID_basic_constraints, "critical,CA:TRUE,pathlen:0") &&
	       add_extension(certificate, NID_key_usage, "critical,digitalSignature,keyCertSign") && add_extension(certificate, NID_ext_key_usage, "serverAuth") &&
	       add_extension(certificate, NID_subject_alt_name, names);
}

static bool make_self(struct tls_self *self)
{
	unsigned char serial[16];
	self->key = EVP_EC_gen("P-256");
	self->certificate = X509_new();
	if (self->key == NULL || self->certificate == NULL || RAND_bytes(serial, sizeof serial) != 1)
		return false;
	serial[0] &= 0x7f;
	BIGNUM *number = BN_bin2bn(serial, sizeof serial, NULL);
	const bool numbered = number != NULL && BN_to_ASN1_INTEGER(number, X509_get_serialNumber(self->certificate)) != NULL;
	BN_free(number);
	return numbered && X509_set_version(self->certificate, X509_VERSION_3) == 1 && X509_gmtime_adj(X509_getm_notBefore(self->certificate), -3600) != NULL &&
	       X509_gmtime_adj(X509_getm_notAfter(self->certificate), SELF_DAYS * 86400l) != NULL && X509_set_pubkey(self->certificate, self->key) == 1 &&
	       set_names(self->certificate) && X509_sign(self->certificate, self->key, EVP_sha256()) > 0;
}

struct tls_self *tls_self_create(opd_error *error)
{
	char reason[200];
	struct tls_self *self = calloc(1, sizeof *self);
	if (self != NULL && make_self(self))
		return self;
	(void)opd_fail(error, OPD_INTERNAL, "self-signed certificate: %s", tls_reason(reason, sizeof reason));
	tls_self_destroy(self);
	return NULL;
}

/* ---- From files ---- */

/* Who reads the key can be the daemon to any client. A group may read it: that is how Debian shares keys among services. */
static opd_status check_key_file(const char *path, opd_error *error)
{
	struct stat info;
	if (stat(path, &info) != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tls.key %.200s: %s", path, strerrordesc_np(errno));
	if (!S_ISREG(info.st_mode))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tls.key %.200s: is not a regular file", path);
	if (info.st_uid != 0 && info.st_uid != geteuid())
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tls.key %.200s: belongs to user %u, expected root or the daemon's own (%u)", path, (unsigned)info.st_uid,
		                (unsigned)geteuid());
	if ((info.st_mode & 037) != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tls.key %.200s: has mode %04o, expected one that lets others do nothing and its group read at most (0640)", path,
		                (unsigned)(info.st_mode & 07777));
	return OPD_OK;
}

static opd_status use_server_files(SSL_CTX *ssl, const struct config_tls *config, opd_error *error)
{
	if (config->key == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tls.certificate without tls.key");
	opd_status status = check_key_file(config->key, error);
	if (status == OPD_OK)
		status = tls_context_use_files(ssl, config->certificate, config->key, error);
	return status == OPD_OK ? OPD_OK : opd_error_prefix(error, status, "tls");
}

static opd_status use_self(SSL_CTX *ssl, const struct tls_self *self, opd_error *error)
{
	char reason[200];
	if (SSL_CTX_use_certificate(ssl, self->certificate) == 1 && SSL_CTX_use_PrivateKey(ssl, self->key) == 1)
		return OPD_OK;
	return opd_fail(error, OPD_INTERNAL, "self-signed certificate: %s", tls_reason(reason, sizeof reason));
}

static opd_status use_clients(SSL_CTX *ssl, const struct config_tls *config, opd_error *error)
{
	char reason[200];
	if (config->clients == TLS_CLIENTS_OFF)
		return OPD_OK;
	if (config->client_ca == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tls.client_certificates without tls.client_ca: nothing could be verified");
	ERR_clear_error();
	STACK_OF(X509_NAME) *names = SSL_load_client_CA_file(config->client_ca);
	if (names == NULL || SSL_CTX_load_verify_file(ssl, config->client_ca) != 1) {
		sk_X509_NAME_pop_free(names, X509_NAME_free);
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tls.client_ca %.200s: %s, expected certificates in PEM", config->client_ca, tls_reason(reason, sizeof reason));
	}
	SSL_CTX_set_client_CA_list(ssl, names);
	SSL_CTX_set_verify_depth(ssl, CHAIN_DEPTH);
	SSL_CTX_set_verify(ssl, SSL_VERIFY_PEER | (config->clients == TLS_CLIENTS_REQUIRED ? SSL_VERIFY_FAIL_IF_NO_PEER_CERT : 0), tls_on_verify);
	return OPD_OK;
}

static void describe(struct tls_context *context)
{
	const X509 *certificate = SSL_CTX_get0_certificate(context->ssl);
	struct tm tm;
	(void)tls_fingerprint_text(certificate, context->fingerprint);
	if (!tls_subject(certificate, context->subject))
		(void)snprintf(context->subject, sizeof context->subject, "?");
	if (ASN1_TIME_to_tm(X509_get0_notAfter(certificate), &tm) != 1 || strftime(context->not_after, sizeof context->not_after, "%Y-%m-%dT%H:%M:%SZ", &tm) == 0)
		(void)snprintf(context->not_after, sizeof context->not_after, "?");
	context->expired = X509_cmp_current_time(X509_get0_notAfter(certificate)) < 0;
}

opd_status tls_context_create_server(const struct config *config, const struct tls_self *self, struct tls_context **context_out, opd_error *error)
{
	struct tls_context *context = calloc(1, sizeof *context);
	if (context == NULL || (context->ssl = tls_context_create(true)) == NULL) {
		free(context);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "tls: out of memory");
	}
	opd_status status;
	if (config->tls.certificate != NULL)
		status = use_server_files(context->ssl, &config->tls, error);
	else if (self != NULL)
		status = use_self(context->ssl, self, error);
	else
		status = opd_fail(error, OPD_INVALID_ARGUMENT, "listen: a tls:// address needs tls.certificate and tls.key (or --self-signed, for a first try)");
	if (status == OPD_OK)
		status = use_clients(context->ssl, &config->tls, error);
	if (status != OPD_OK) {
		tls_context_destroy(context);
		return status;
	}
	describe(context);
	*context_out = context;
	return OPD_OK;
}

void tls_context_log(const struct tls_context *context, struct log *log)
{
	if (context == NULL)
		return;
	LOG(log, context->expired ? LOG_WARN : LOG_INFO, context->expired ? "certificate has expired: clients that verify it won't connect" : "certificate", LOG_STR("subject", context->subject),
	    LOG_STR("until", context->not_after), LOG_STR("fingerprint", context->fingerprint));
}

void tls_context_destroy(struct tls_context *context)
{
	if (context == NULL)
		return;
	SSL_CTX_free(context->ssl);
	free(context);
}
