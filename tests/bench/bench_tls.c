/* TLS beside a bare peer: a libuv server that does OpenSSL over memory BIOs and nothing else. opd-bench-tls DAEMON prints, in turns within one run, the round trip of a small op and an
 * echo of the same bytes on one core, and 64 MiB up on two. README.md has the figures. */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <uv.h>

#include "opd/client.h"
#include "tests/lib/pin.h"

#define ELEMENTS 1024
#define ECHO_BYTES (4u * ELEMENTS + 160u) /* what a relu of so many floats is on the wire, each way */
#define BULK_BYTES ((size_t)64 << 20)
#define ROUNDS 7
#define CALLS 4000

static void need(bool good, const char *what)
{
	if (good)
		return;
	(void)fprintf(stderr, "opd-bench-tls: %s\n", what);
	exit(1);
}

static double now_s(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static int compare(const void *a, const void *b)
{
	const double x = *(const double *)a, y = *(const double *)b;
	return x < y ? -1 : x > y;
}

static double median(double *values, size_t count)
{
	qsort(values, count, sizeof *values, compare);
	return values[count / 2];
}

static int free_port(void)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t bytes = sizeof address;
	const int fd = socket(AF_INET, SOCK_STREAM, 0);
	need(bind(fd, (struct sockaddr *)&address, bytes) == 0 && getsockname(fd, (struct sockaddr *)&address, &bytes) == 0, "no port");
	(void)close(fd);
	return ntohs(address.sin_port);
}

/* ---- The bare peer: the first 8 bytes of a message are its length, the next 8 that of the answer ---- */

struct peer {
	uv_tcp_t listener;
	uv_tcp_t tcp;
	SSL_CTX *context;
	SSL *ssl;
	BIO *in, *out;
	uint64_t left;   /* of the message under way */
	uint64_t answer;
	char stage[256 << 10];
	char plain[256 << 10];
};

static void peer_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf)
{
	struct peer *peer = handle->data;
	(void)suggested;
	*buf = uv_buf_init(peer->stage, sizeof peer->stage);
}

static void peer_flush(struct peer *peer)
{
	char *data;
	const long bytes = BIO_get_mem_data(peer->out, &data);
	const uv_buf_t buf = uv_buf_init(data, (unsigned)bytes);
	if (bytes > 0)
		need(uv_try_write((uv_stream_t *)&peer->tcp, &buf, 1) == bytes, "the peer's answer doesn't fit the socket");
	(void)BIO_reset(peer->out);
}

static void peer_take(struct peer *peer, const char *data, size_t bytes)
{
	if (peer->left == 0) {
		memcpy(&peer->left, data, 8);
		memcpy(&peer->answer, data + 8, 8);
	}
	peer->left -= bytes;
	if (peer->left == 0)
		need(SSL_write(peer->ssl, peer->plain, (int)peer->answer) == (int)peer->answer, "the peer can't write");
}

static void peer_read(uv_stream_t *stream, ssize_t got, const uv_buf_t *buf)
{
	struct peer *peer = stream->data;
	int bytes;
	if (got < 0)
		exit(0);
	(void)BIO_write(peer->in, buf->base, (int)got);
	while ((bytes = SSL_read(peer->ssl, peer->plain, sizeof peer->plain)) > 0)
		peer_take(peer, peer->plain, (size_t)bytes);
	peer_flush(peer);
}

static void peer_accept(uv_stream_t *stream, int status)
{
	struct peer *peer = stream->data;
	need(status == 0 && uv_tcp_init(stream->loop, &peer->tcp) == 0 && uv_accept(stream, (uv_stream_t *)&peer->tcp) == 0, "accept");
	(void)uv_tcp_nodelay(&peer->tcp, 1);
	peer->tcp.data = peer;
	peer->ssl = SSL_new(peer->context);
	peer->in = BIO_new(BIO_s_mem());
	peer->out = BIO_new(BIO_s_mem());
	SSL_set_bio(peer->ssl, peer->in, peer->out);
	SSL_set_accept_state(peer->ssl);
	(void)uv_read_start((uv_stream_t *)&peer->tcp, peer_alloc, peer_read);
}

static void peer_certify(SSL_CTX *context)
{
	EVP_PKEY *key = EVP_EC_gen("P-256");
	X509 *certificate = X509_new();
	(void)X509_gmtime_adj(X509_getm_notBefore(certificate), 0);
	(void)X509_gmtime_adj(X509_getm_notAfter(certificate), 86400);
	(void)X509_set_pubkey(certificate, key);
	need(X509_sign(certificate, key, EVP_sha256()) > 0 && SSL_CTX_use_certificate(context, certificate) == 1 && SSL_CTX_use_PrivateKey(context, key) == 1, "certificate");
}

static SSL_CTX *context_of(const SSL_METHOD *method)
{
	SSL_CTX *context = SSL_CTX_new(method);
	need(context != NULL && SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) == 1 && SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256") == 1, "context");
	return context;
}

static void peer_serve(int port)
{
	struct peer *peer = calloc(1, sizeof *peer);
	struct sockaddr_in address;
	uv_loop_t *loop = uv_default_loop();
	peer->context = context_of(TLS_server_method());
	peer_certify(peer->context);
	peer->listener.data = peer;
	need(uv_tcp_init(loop, &peer->listener) == 0 && uv_ip4_addr("127.0.0.1", port, &address) == 0 &&
	         uv_tcp_bind(&peer->listener, (struct sockaddr *)&address, 0) == 0 && uv_listen((uv_stream_t *)&peer->listener, 1, peer_accept) == 0,
	     "the peer can't listen");
	(void)uv_run(loop, UV_RUN_DEFAULT);
	exit(0);
}

static SSL *peer_connect(int port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons((uint16_t)port)};
	const int one = 1;
	int fd = -1, connected = -1;
	for (int i = 0; i < 500 && connected != 0; i++) {
		(void)usleep(10000);
		fd = socket(AF_INET, SOCK_STREAM, 0);
		connected = connect(fd, (struct sockaddr *)&address, sizeof address);
		if (connected != 0)
			(void)close(fd);
	}
	need(connected == 0, "the peer doesn't answer");
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	SSL *ssl = SSL_new(context_of(TLS_client_method()));
	need(SSL_set_fd(ssl, fd) == 1 && SSL_connect(ssl) == 1, "the peer's handshake");
	return ssl;
}

/* A message and its answer. */
static void peer_call(SSL *ssl, char *message, uint64_t bytes, uint64_t answer)
{
	static char room[1 << 20];
	memcpy(message, &bytes, 8);
	memcpy(message + 8, &answer, 8);
	for (uint64_t at = 0; at < bytes;) {
		const uint64_t left = bytes - at;
		const int wrote = SSL_write(ssl, message + at, left < 1 << 20 ? (int)left : 1 << 20);
		need(wrote > 0, "write to the peer");
		at += (uint64_t)wrote;
	}
	for (uint64_t at = 0; at < answer;) {
		const int got = SSL_read(ssl, room, (int)(answer - at));
		need(got > 0, "read from the peer");
		at += (uint64_t)got;
	}
}

/* ---- opd ---- */

/* Its address with the fingerprint. */
static pid_t daemon_serve(const char *binary, int port, char address[256])
{
	int out[2];
	char listen_at[64], line[256] = "";
	(void)snprintf(listen_at, sizeof listen_at, "tls://127.0.0.1:%d", port);
	need(pipe(out) == 0, "pipe");
	const pid_t pid = fork();
	if (pid == 0) {
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		(void)dup2(out[1], STDOUT_FILENO);
		(void)execl(binary, binary, "--self-signed", "--listen", listen_at, "--log-level", "error", (char *)NULL);
		_exit(127);
	}
	(void)close(out[1]);
	FILE *said = fdopen(out[0], "r");
	need(said != NULL && fgets(line, sizeof line, said) != NULL && strstr(line, "sha256:") != NULL, "the daemon prints no fingerprint");
	line[strcspn(line, "\n")] = '\0';
	(void)snprintf(address, 256, "%s?fingerprint=%s", listen_at, strstr(line, "sha256:"));
	return pid;
}

static opd_client *daemon_connect(const char *address)
{
	opd_client *client = NULL;
	opd_error error;
	opd_status status = OPD_UNAVAILABLE;
	for (int i = 0; i < 500 && status != OPD_OK; i++) {
		(void)usleep(10000);
		status = opd_connect(address, NULL, &client, &error);
	}
	need(status == OPD_OK, error.text);
	return client;
}

static void daemon_call(opd_client *client, const opd_request *request)
{
	opd_result *result;
	opd_error error;
	need(opd_run(client, request, &result, &error) == OPD_OK, error.text);
	opd_result_destroy(result);
}

static void daemon_upload(opd_client *client, const float *data)
{
	opd_error error;
	opd_handle handle;
	const opd_operand operand = OPD_OPERAND(OPD_f32, data, BULK_BYTES / 4);
	need(opd_upload(client, &operand, NULL, &handle, &error) == OPD_OK, error.text);
	need(opd_free(client, &handle, 1, &error) == OPD_OK, error.text);
}

/* ---- Measuring ---- */

static void measure_small(SSL *peer, opd_client *client, char *bulk)
{
	double opd_us[ROUNDS], peer_us[ROUNDS], times[CALLS];
	opd_request *request = opd_request_create("relu");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, bulk, ELEMENTS));
	for (int round = 0; round < ROUNDS; round++) {
		for (int i = 0; i < CALLS; i++) {
			const double begin = now_s();
			peer_call(peer, bulk, ECHO_BYTES, ECHO_BYTES);
			times[i] = (now_s() - begin) * 1e6;
		}
		peer_us[round] = median(times, CALLS);
		for (int i = 0; i < CALLS; i++) {
			const double begin = now_s();
			daemon_call(client, request);
			times[i] = (now_s() - begin) * 1e6;
		}
		opd_us[round] = median(times, CALLS);
	}
	opd_request_destroy(request);
	const double a = median(peer_us, ROUNDS), b = median(opd_us, ROUNDS);
	(void)printf("relu of %d floats over TLS, one core, p50: echo %.1f us, opd %.1f us, %.2f times\n", ELEMENTS, a, b, b / a);
}

static void measure_bulk(SSL *peer, opd_client *client, char *bulk)
{
	double opd_rate[ROUNDS], peer_rate[ROUNDS];
	for (int round = 0; round < ROUNDS; round++) {
		double begin = now_s();
		peer_call(peer, bulk, BULK_BYTES, 16);
		peer_rate[round] = (double)BULK_BYTES / (now_s() - begin) / (double)(1 << 30);
		begin = now_s();
		daemon_upload(client, (const float *)(const void *)bulk);
		opd_rate[round] = (double)BULK_BYTES / (now_s() - begin) / (double)(1 << 30);
	}
	const double a = median(peer_rate, ROUNDS), b = median(opd_rate, ROUNDS);
	(void)printf("64 MiB up over TLS, two cores: stream %.2f GiB/s, opd %.2f GiB/s, %.2f of it\n", a, b, b / a);
}

static _Noreturn void usage(FILE *to, int code)
{
	(void)fprintf(to, "usage: opd-bench-tls DAEMON\n"
	                  "  DAEMON  the opd binary to measure\n"
	                  "Prints what a relu of %d floats takes over TLS beside an echo of as many bytes at a bare libuv and OpenSSL server, on one core, and 64 MiB up beside\n"
	                  "its stream, on two; a minute.\n", ELEMENTS);
	exit(code);
}

int main(int argc, char **argv)
{
	char address[256];
	if (argc == 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0))
		usage(stdout, 0);
	if (argc != 2 || argv[1][0] == '-')
		usage(stderr, 2);
	const int port = free_port(), own = free_port(), cores = pin_cores();
	char *bulk = aligned_alloc(64, BULK_BYTES);
	need(bulk != NULL, "out of memory");
	memset(bulk, 0, BULK_BYTES);
	const pid_t peer = fork();
	if (peer == 0) {
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		peer_serve(own);
	}
	const pid_t daemon = daemon_serve(argv[1], port, address);
	SSL *ssl = peer_connect(own);
	opd_client *client = daemon_connect(address);
	(void)pin_process(peer, 0);
	(void)pin_process(daemon, 0);
	(void)pin_self(0);
	measure_small(ssl, client, bulk);
	(void)pin_self(cores > 1 ? 1 : 0);
	measure_bulk(ssl, client, bulk);
	opd_close(client);
	(void)kill(daemon, SIGKILL);
	(void)kill(peer, SIGKILL);
	(void)waitpid(daemon, NULL, 0);
	(void)waitpid(peer, NULL, 0);
	free(bulk);
	return 0;
}
