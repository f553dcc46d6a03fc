#include "proto/tls.h"

#include <errno.h>
#include <limits.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* What a handshake or an answer to a key update may have us send at most before anybody takes it. */
#define OUT_BYTES_MAX (256u << 10)

static const unsigned char protocol[] = "\005opd/1";
#define PROTOCOL_BYTES (sizeof protocol - 1)

/* ---- Reasons ---- */

const char *tls_reason(char *out, size_t out_bytes)
{
	const unsigned long code = ERR_peek_last_error();
	const char *reason = code == 0 ? NULL : ERR_reason_error_string(code);
	if (code != 0 && ERR_SYSTEM_ERROR(code))
		reason = strerrordesc_np(ERR_GET_REASON(code));
	(void)snprintf(out, out_bytes, "%s", reason == NULL ? "OpenSSL gives no reason" : reason);
	ERR_clear_error();
	return out;
}

/* The peer says in an alert what it has against our certificate. */
static bool refuses_certificate(int reason)
{
	switch (reason) {
	case SSL_R_SSLV3_ALERT_BAD_CERTIFICATE:
	case SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE:
	case SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED:
	case SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED:
	case SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN:
	case SSL_R_TLSV1_ALERT_UNKNOWN_CA:
	case SSL_R_TLSV1_ALERT_ACCESS_DENIED:
	case SSL_R_TLSV1_ALERT_DECRYPT_ERROR:
	case SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED:
		return true;
	default:
		return false;
	}
}

static void date_text(const ASN1_TIME *date, char out[32])
{
	struct tm tm;
	if (ASN1_TIME_to_tm(date, &tm) != 1 || strftime(out, 32, "%Y-%m-%d %H:%M:%S UTC", &tm) == 0)
		(void)snprintf(out, 32, "?");
}

/* Whose certificate of the peer's chain it is, what is wrong with it, and when that began where it is a matter of time. */
static void complain(char *out, size_t out_bytes, X509 *certificate, int result)
{
	char subject[TLS_SUBJECT_BYTES] = "?", date[32] = "";
	if (certificate == NULL || !tls_subject(certificate, subject))
		(void)snprintf(subject, sizeof subject, "?");
	if (certificate != NULL && result == X509_V_ERR_CERT_HAS_EXPIRED)
		date_text(X509_get0_notAfter(certificate), date);
	if (certificate != NULL && result == X509_V_ERR_CERT_NOT_YET_VALID)
		date_text(X509_get0_notBefore(certificate), date);
	(void)snprintf(out, out_bytes, "(%.120s): %s%s%s%s", subject, X509_verify_cert_error_string(result), date[0] == '\0' ? "" : " (", date, date[0] == '\0' ? "" : ")");
}

#define COMPLAINT_BYTES 300u

int tls_on_verify(int good, X509_STORE_CTX *store)
{
	const SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
	struct tls *tls = ssl == NULL ? NULL : SSL_get_app_data(ssl);
	if (good == 1 || tls == NULL || tls->complaint != NULL)
		return good;
	tls->complaint = malloc(COMPLAINT_BYTES);
	if (tls->complaint != NULL)
		complain(tls->complaint, COMPLAINT_BYTES, X509_STORE_CTX_get_current_cert(store), X509_STORE_CTX_get_error(store));
	return good;
}

static opd_status bad_certificate(const struct tls *tls, opd_error *error)
{
	return opd_fail(error, OPD_UNAUTHENTICATED, "TLS: the peer's certificate %s", tls->complaint != NULL ? tls->complaint : "is not good");
}

static opd_status failed(const struct tls *tls, opd_error *error)
{
	const unsigned long code = ERR_peek_last_error();
	const int reason = ERR_GET_LIB(code) == ERR_LIB_SSL ? ERR_GET_REASON(code) : 0;
	char text[160];
	(void)tls_reason(text, sizeof text);
	if (reason == SSL_R_CERTIFICATE_VERIFY_FAILED)
		return bad_certificate(tls, error);
	if (reason == SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE)
		return opd_fail(error, OPD_UNAUTHENTICATED, "TLS: the peer has no certificate, and one is required");
	if (refuses_certificate(reason))
		return opd_fail(error, OPD_UNAUTHENTICATED, "TLS: the peer refuses our certificate: %s", text);
	if (reason == SSL_R_TLSV1_ALERT_PROTOCOL_VERSION || reason == SSL_R_UNSUPPORTED_PROTOCOL)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "TLS: the peer doesn't speak version 1.3, and nothing else is spoken here: %s", text);
	if (reason == SSL_R_WRONG_VERSION_NUMBER || reason == SSL_R_HTTP_REQUEST || reason == SSL_R_HTTPS_PROXY_REQUEST)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "TLS: the peer doesn't speak TLS: %s", text);
	if (reason == SSL_R_TLSV1_ALERT_NO_APPLICATION_PROTOCOL || reason == SSL_R_NO_APPLICATION_PROTOCOL || reason == SSL_R_CALLBACK_FAILED)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "TLS: no common application protocol, expected opd/1 (ALPN)");
	return opd_fail(error, OPD_UNAVAILABLE, "TLS: %s", text);
}

/* ---- Contexts ---- */

static int on_select_protocol(SSL *ssl, const unsigned char **out, unsigned char *out_bytes, const unsigned char *in, unsigned in_bytes, void *argument)
{
	(void)ssl;
	(void)argument;
	unsigned char *found;
	if (SSL_select_next_proto(&found, out_bytes, protocol, PROTOCOL_BYTES, in, in_bytes) != OPENSSL_NPN_NEGOTIATED)
		return SSL_TLSEXT_ERR_ALERT_FATAL;
	*out = found;
	return SSL_TLSEXT_ERR_OK;
}

/* A client that names no protocol may believe to speak with another kind of server, whose certificate is valid here too. */
static int on_client_hello(SSL *ssl, int *alert, void *argument)
{
	(void)argument;
	const unsigned char *extension;
	size_t bytes;
	if (SSL_client_hello_get0_ext(ssl, TLSEXT_TYPE_application_layer_protocol_negotiation, &extension, &bytes) == 1 ||
	    SSL_client_hello_get0_ext(ssl, TLSEXT_TYPE_supported_versions, &extension, &bytes) != 1) /* that one is refused for its version */
		return SSL_CLIENT_HELLO_SUCCESS;
	*alert = SSL_AD_NO_APPLICATION_PROTOCOL;
	return SSL_CLIENT_HELLO_ERROR;
}

/* A file with a passphrase is refused instead of a terminal being asked. */
static int no_passphrase(char *buffer, int bytes, int writing, void *argument)
{
	(void)buffer;
	(void)bytes;
	(void)writing;
	(void)argument;
	return -1;
}

static void set_server(SSL_CTX *context)
{
	static const unsigned char name[] = "opd"; /* tickets of sessions with client certificates are refused without one */
	SSL_CTX_set_alpn_select_cb(context, on_select_protocol, NULL);
	SSL_CTX_set_client_hello_cb(context, on_client_hello, NULL);
	(void)SSL_CTX_set_session_id_context(context, name, sizeof name - 1);
	(void)SSL_CTX_set_options(context, SSL_OP_CIPHER_SERVER_PREFERENCE | SSL_OP_PRIORITIZE_CHACHA);
	(void)SSL_CTX_set_num_tickets(context, 1);
	(void)SSL_CTX_set_max_early_data(context, 0);
}

SSL_CTX *tls_context_create(bool server)
{
	SSL_CTX *context = SSL_CTX_new(server ? TLS_server_method() : TLS_client_method());
	if (context == NULL)
		return NULL;
	/* AES-128 first: as safe for decades, and 64 MiB go through it in 0.85 of the time. Groups that cost a handshake little. */
	if (SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) != 1 || SSL_CTX_set_max_proto_version(context, TLS1_3_VERSION) != 1 ||
	    SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256") != 1 ||
	    SSL_CTX_set1_groups_list(context, "X25519:P-256:P-384") != 1 || SSL_CTX_set_alpn_protos(context, protocol, PROTOCOL_BYTES) != 0) {
		SSL_CTX_free(context);
		return NULL;
	}
	(void)SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
	(void)SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | (server ? SSL_MODE_RELEASE_BUFFERS : 0));
	(void)SSL_CTX_set_max_cert_list(context, 32 << 10);
	SSL_CTX_set_default_passwd_cb(context, no_passphrase);
	if (server)
		set_server(context);
	return context;
}

opd_status tls_context_use_files(SSL_CTX *context, const char *certificate, const char *key, opd_error *error)
{
	char reason[200];
	ERR_clear_error();
	if (SSL_CTX_use_certificate_chain_file(context, certificate) != 1)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "certificate %.200s: %s, expected a chain in PEM, leaf first", certificate, tls_reason(reason, sizeof reason));
	if (SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1) {
		const bool mismatch = ERR_GET_REASON(ERR_peek_last_error()) == X509_R_KEY_VALUES_MISMATCH;
		(void)tls_reason(reason, sizeof reason);
		return mismatch ? opd_fail(error, OPD_INVALID_ARGUMENT, "key %.200s: is not that of the certificate %.200s", key, certificate)
		                : opd_fail(error, OPD_INVALID_ARGUMENT, "key %.200s: %s, expected a private key in PEM without a passphrase", key, reason);
	}
	/* A key of another kind than the certificate's is taken without a word. */
	if (SSL_CTX_check_private_key(context) != 1) {
		ERR_clear_error();
		return opd_fail(error, OPD_INVALID_ARGUMENT, "key %.200s: is not that of the certificate %.200s", key, certificate);
	}
	return OPD_OK;
}

/* ---- Bytes in and out ---- */

static int on_bio_read(BIO *bio, char *to, int room)
{
	struct tls *tls = BIO_get_data(bio);
	BIO_clear_retry_flags(bio);
	if (tls->in_bytes == 0) {
		BIO_set_retry_read(bio);
		return -1;
	}
	const size_t bytes = tls->in_bytes < (size_t)room ? tls->in_bytes : (size_t)room;
	memcpy(to, tls->in, bytes);
	tls->in += bytes;
	tls->in_bytes -= bytes;
	return (int)bytes;
}

static bool grow(struct tls *tls, size_t bytes)
{
	if (bytes <= tls->out_room)
		return true;
	if (bytes > OUT_BYTES_MAX || tls->out_lent)
		return false;
	const size_t room = bytes < 4096 ? 4096 : 2 * bytes;
	uint8_t *out = realloc(tls->out, room);
	if (out == NULL)
		return false;
	tls->out = out;
	tls->out_room = room;
	return true;
}

static int on_bio_write(BIO *bio, const char *from, int bytes)
{
	struct tls *tls = BIO_get_data(bio);
	BIO_clear_retry_flags(bio);
	if (bytes < 0 || !grow(tls, tls->out_bytes + (size_t)bytes))
		return -1;
	memcpy(tls->out + tls->out_bytes, from, (size_t)bytes);
	tls->out_bytes += (size_t)bytes;
	return bytes;
}

static long on_bio_control(BIO *bio, int command, long number, void *pointer)
{
	(void)bio;
	(void)number;
	(void)pointer;
	return command == BIO_CTRL_FLUSH ? 1 : 0;
}

static int on_bio_create(BIO *bio)
{
	BIO_set_init(bio, 1);
	return 1;
}

static pthread_once_t method_once = PTHREAD_ONCE_INIT;
static BIO_METHOD *method; /* one a process, for its life */

static void free_method(void)
{
	BIO_meth_free(method);
	method = NULL;
}

static void make_method(void)
{
	method = BIO_meth_new(BIO_TYPE_SOURCE_SINK, "opd");
	if (method == NULL)
		return;
	(void)BIO_meth_set_read(method, on_bio_read);
	(void)BIO_meth_set_write(method, on_bio_write);
	(void)BIO_meth_set_ctrl(method, on_bio_control);
	(void)BIO_meth_set_create(method, on_bio_create);
	(void)OPENSSL_atexit(free_method);
}

/* ---- One connection ---- */

opd_status tls_init(struct tls *tls, SSL_CTX *context, bool server, opd_error *error)
{
	*tls = (struct tls){0};
	(void)pthread_once(&method_once, make_method);
	BIO *bio = method == NULL ? NULL : BIO_new(method);
	tls->ssl = bio == NULL ? NULL : SSL_new(context);
	if (tls->ssl == NULL) {
		BIO_free(bio);
		ERR_clear_error();
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "TLS: out of memory for a connection");
	}
	BIO_set_data(bio, tls);
	(void)SSL_set_app_data(tls->ssl, tls);
	SSL_set_bio(tls->ssl, bio, bio);
	if (server)
		SSL_set_accept_state(tls->ssl);
	else
		SSL_set_connect_state(tls->ssl);
	return OPD_OK;
}

void tls_fini(struct tls *tls)
{
	SSL_free(tls->ssl);
	free(tls->complaint);
	if (!tls->out_lent)
		free(tls->out);
	*tls = (struct tls){0};
}

/* A server that knows no ALPN answers without. */
static opd_status check_protocol(const struct tls *tls, opd_error *error)
{
	const unsigned char *selected;
	unsigned bytes;
	SSL_get0_alpn_selected(tls->ssl, &selected, &bytes);
	if (bytes == PROTOCOL_BYTES - 1 && memcmp(selected, protocol + 1, bytes) == 0)
		return OPD_OK;
	return opd_fail(error, OPD_FAILED_PRECONDITION, "TLS: the peer agrees to no application protocol, expected opd/1 (ALPN)");
}

opd_status tls_handshake(struct tls *tls, opd_error *error)
{
	ERR_clear_error();
	const int done = SSL_do_handshake(tls->ssl);
	if (done == 1) {
		tls->established = true;
		return check_protocol(tls, error);
	}
	return SSL_get_error(tls->ssl, done) == SSL_ERROR_WANT_READ ? OPD_OK : failed(tls, error);
}

/* Somebody else's errors on this thread (a client's program uses OpenSSL too) aren't ours. To clear what is empty already was a twentieth of a small op's instructions. */
static void forget_errors(void)
{
	if (ERR_peek_error() != 0)
		ERR_clear_error();
}

opd_status tls_read(struct tls *tls, uint8_t *to, size_t room, size_t *got_out, opd_error *error)
{
	*got_out = 0;
	if (tls->in_bytes == 0 && SSL_has_pending(tls->ssl) == 0) /* OpenSSL would make a buffer to find that out */
		return OPD_OK;
	forget_errors();
	const int got = SSL_read(tls->ssl, to, room < INT_MAX ? (int)room : INT_MAX);
	if (got > 0) {
		*got_out = (size_t)got;
		return OPD_OK;
	}
	const int why = SSL_get_error(tls->ssl, got);
	if (why == SSL_ERROR_WANT_READ)
		return OPD_OK;
	if (why == SSL_ERROR_ZERO_RETURN) {
		tls->ended = true;
		return OPD_OK;
	}
	return failed(tls, error);
}

void tls_keep_buffers(struct tls *tls)
{
	(void)SSL_clear_mode(tls->ssl, SSL_MODE_RELEASE_BUFFERS);
}

bool tls_pending(const struct tls *tls)
{
	return SSL_pending(tls->ssl) != 0;
}

static opd_status seal(struct tls *tls, const uint8_t *from, size_t bytes, opd_error *error)
{
	forget_errors();
	for (size_t sealed = 0; sealed < bytes;) {
		const int done = SSL_write(tls->ssl, from + sealed, (int)(bytes - sealed));
		if (done <= 0)
			return failed(tls, error);
		sealed += (size_t)done;
	}
	return OPD_OK;
}

static size_t records_free(const struct tls *tls)
{
	return (tls->out_room - tls->out_bytes) / TLS_RECORD_ROOM;
}

/* What doesn't fill a record by itself. */
struct joined {
	size_t bytes;
	uint8_t data[TLS_RECORD_BYTES];
};

static opd_status seal_joined(struct tls *tls, struct joined *joined, size_t *taken, opd_error *error)
{
	if (joined->bytes == 0 || records_free(tls) == 0)
		return OPD_OK;
	opd_status status = seal(tls, joined->data, joined->bytes, error);
	*taken += status == OPD_OK ? joined->bytes : 0;
	joined->bytes = 0;
	return status;
}

/* One piece, behind what is joined already. */
static opd_status write_piece(struct tls *tls, const struct iovec *piece, bool last, struct joined *joined, size_t *taken, opd_error *error)
{
	const uint8_t *at = piece->iov_base;
	size_t left = piece->iov_len;
	opd_status status = OPD_OK;
	while (status == OPD_OK && left != 0 && records_free(tls) != 0) {
		size_t bytes;
		if (joined->bytes == 0 && (left >= TLS_RECORD_BYTES || last)) {
			const size_t room = records_free(tls) * TLS_RECORD_BYTES;
			bytes = left < room ? left : room;
			if (!last)
				bytes -= bytes % TLS_RECORD_BYTES;
			status = seal(tls, at, bytes, error);
			*taken += status == OPD_OK ? bytes : 0;
		} else {
			bytes = left < TLS_RECORD_BYTES - joined->bytes ? left : TLS_RECORD_BYTES - joined->bytes;
			memcpy(joined->data + joined->bytes, at, bytes);
			joined->bytes += bytes;
			if (joined->bytes == TLS_RECORD_BYTES)
				status = seal_joined(tls, joined, taken, error);
		}
		at += bytes;
		left -= bytes;
	}
	return status;
}

opd_status tls_write(struct tls *tls, const struct iovec *pieces, size_t count, size_t *taken_out, opd_error *error)
{
	struct joined joined;
	joined.bytes = 0;
	*taken_out = 0;
	opd_status status = OPD_OK;
	for (size_t i = 0; status == OPD_OK && i < count; i++)
		status = write_piece(tls, &pieces[i], i + 1 == count, &joined, taken_out, error);
	return status == OPD_OK ? seal_joined(tls, &joined, taken_out, error) : status;
}

void tls_lend(struct tls *tls, uint8_t *buffer, size_t room)
{
	if (!tls->out_lent)
		free(tls->out);
	tls->out = buffer;
	tls->out_room = room;
	tls->out_lent = true;
}

bool tls_sent(struct tls *tls, size_t sent)
{
	const size_t left = tls->out_bytes - sent;
	const uint8_t *rest = tls->out + sent;
	uint8_t *copy = NULL;
	if (tls->out_lent || left == 0) {
		copy = left == 0 ? NULL : malloc(left);
		if (copy != NULL)
			memcpy(copy, rest, left);
		if (!tls->out_lent)
			free(tls->out);
		tls->out = copy;
		tls->out_room = copy == NULL ? 0 : left;
		tls->out_lent = false;
	} else {
		memmove(tls->out, rest, left);
	}
	tls->out_bytes = tls->out == NULL ? 0 : left;
	return left == 0 || tls->out != NULL;
}

void tls_shutdown(struct tls *tls)
{
	if (tls->ssl == NULL || !tls->established)
		return;
	(void)SSL_shutdown(tls->ssl);
	ERR_clear_error();
}

/* ---- Certificates ---- */

void tls_fingerprint(const X509 *certificate, uint8_t out[TLS_FINGERPRINT_BYTES])
{
	unsigned bytes = TLS_FINGERPRINT_BYTES;
	if (X509_digest(certificate, EVP_sha256(), out, &bytes) != 1)
		memset(out, 0, TLS_FINGERPRINT_BYTES);
}

const char *tls_fingerprint_text(const X509 *certificate, char out[TLS_FINGERPRINT_TEXT_BYTES])
{
	uint8_t digest[TLS_FINGERPRINT_BYTES];
	tls_fingerprint(certificate, digest);
	(void)snprintf(out, TLS_FINGERPRINT_TEXT_BYTES, "sha256:");
	for (size_t i = 0; i < sizeof digest; i++)
		(void)snprintf(out + 7 + 2 * i, 3, "%02x", digest[i]);
	return out;
}

static int digit_value(char digit)
{
	if (digit >= '0' && digit <= '9')
		return digit - '0';
	const char lower = (char)(digit | 0x20);
	return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

bool tls_fingerprint_parse(const char *text, uint8_t out[TLS_FINGERPRINT_BYTES])
{
	if (strncmp(text, "sha256:", 7) == 0)
		text += 7;
	for (size_t i = 0; i < TLS_FINGERPRINT_BYTES; i++) {
		if (i != 0 && *text == ':')
			text++;
		const int high = digit_value(text[0]), low = high < 0 ? -1 : digit_value(text[1]);
		if (low < 0)
			return false;
		out[i] = (uint8_t)(16 * high + low);
		text += 2;
	}
	return *text == '\0';
}

bool tls_subject(const X509 *certificate, char out[TLS_SUBJECT_BYTES])
{
	BIO *bio = BIO_new(BIO_s_mem());
	const X509_NAME *name = X509_get_subject_name(certificate);
	bool fits = bio != NULL && name != NULL && X509_NAME_print_ex(bio, name, 0, XN_FLAG_RFC2253 & ~(unsigned long)ASN1_STRFLGS_ESC_MSB) >= 0;
	char *text;
	const long bytes = fits ? BIO_get_mem_data(bio, &text) : 0;
	fits = fits && bytes > 0 && bytes < (long)TLS_SUBJECT_BYTES;
	if (fits) {
		memcpy(out, text, (size_t)bytes);
		out[bytes] = '\0';
	}
	BIO_free(bio);
	return fits;
}
