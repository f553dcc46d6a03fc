#include "tests/bench/gpu/remote_floor.h"

#include <arpa/inet.h>
#include <cuda_runtime_api.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "providers/builtin.h"
#include "tests/bench/report.h"
#include "tests/conformance/host.h"
#include "tests/lib/clock.h"

#define STORE_PIECE_BYTES ((uint64_t)4 << 20)
#define LINK_BYTES ((uint64_t)256 << 20)
#define BARE_ROWS 16

static struct host host;
static const struct host_impl *norm;
static void *weight_there;

static void must(cudaError_t code, const char *what)
{
	if (code != cudaSuccess)
		bench_fail("floor: %s: %s", what, cudaGetErrorString(code));
}

void remote_weight(uint16_t weight[REMOTE_HIDDEN])
{
	for (int i = 0; i < REMOTE_HIDDEN; i++)
		weight[i] = (uint16_t)(0x3f80 + i % 64); /* 1 to 1.5 */
}

/* ---- Sockets ---- */

/* False: the peer has gone. */
static bool receive_all(int fd, void *bytes, uint64_t count)
{
	for (char *at = bytes; count > 0;) {
		const ssize_t got = recv(fd, at, count, 0);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return false;
		at += got;
		count -= (uint64_t)got;
	}
	return true;
}

static bool send_all(int fd, const void *bytes, uint64_t count)
{
	for (const char *at = bytes; count > 0;) {
		const ssize_t sent = send(fd, at, count, MSG_NOSIGNAL);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return false;
		at += sent;
		count -= (uint64_t)sent;
	}
	return true;
}

/* ---- The kernel ---- */

struct norm_call {
	opd_tensor x, weight, y;
	int64_t shape[2], strides[2], weight_shape[1], weight_strides[1];
	opd_arg args[4];
	const opd_tensor *outputs[1];
	opd_call call;
};

static opd_tensor tensor_of(uint32_t rank, const int64_t *shape, const int64_t *strides, uint64_t elements, void *data)
{
	return (opd_tensor){.struct_bytes = sizeof(opd_tensor), .dtype = OPD_bf16, .rank = rank, .device = 1, .shape = shape, .strides = strides, .data = data,
	                    .elements = elements, .alignment = OPD_TENSOR_ALIGNMENT, .flags = OPD_TENSOR_CONTIGUOUS};
}

static void norm_make(struct norm_call *made, uint32_t rows, void *x, void *y)
{
	*made = (struct norm_call){.shape = {rows, REMOTE_HIDDEN}, .strides = {REMOTE_HIDDEN, 1}, .weight_shape = {REMOTE_HIDDEN}, .weight_strides = {1}};
	const uint64_t elements = (uint64_t)rows * REMOTE_HIDDEN;
	made->x = tensor_of(2, made->shape, made->strides, elements, x);
	made->y = tensor_of(2, made->shape, made->strides, elements, y);
	made->weight = tensor_of(1, made->weight_shape, made->weight_strides, REMOTE_HIDDEN, weight_there);
	made->args[0] = (opd_arg){.kind = OPD_ARG_TENSOR, .tensor = &made->x};
	made->args[1] = (opd_arg){.kind = OPD_ARG_TENSOR, .tensor = &made->weight};
	made->args[2] = (opd_arg){.kind = OPD_ARG_FLOAT, .f = 1e-5};
	made->args[3].kind = OPD_ARG_NONE;
	made->outputs[0] = &made->y;
	made->call = (opd_call){.struct_bytes = sizeof made->call, .arg_count = 4, .output_count = 1, .args = made->args, .outputs = made->outputs};
}

static void norm_launch(const struct norm_call *made, cudaStream_t stream)
{
	const opd_exec exec = {.struct_bytes = sizeof exec, .threads = 1, .host = &host.table, .stream = stream, .device = 1};
	opd_error error = {0};
	if (norm->impl->run(norm->impl, norm->state, &made->call, &exec, &error) != OPD_OK)
		bench_fail("floor: %s", error.text);
}

static void *pinned(uint64_t bytes)
{
	void *memory;
	must(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped), "cudaHostAlloc");
	return memory;
}

static void *device_memory(uint64_t bytes)
{
	void *memory;
	must(cudaMalloc(&memory, bytes), "cudaMalloc");
	must(cudaMemset(memory, 0x3f, bytes), "cudaMemset");
	return memory;
}

/* ---- Modes ---- */

static void serve_echo(int fd, const struct remote_ask *ask)
{
	const uint64_t bytes = ask->request_bytes > ask->reply_bytes ? ask->request_bytes : ask->reply_bytes;
	void *memory = calloc(1, bytes);
	while (memory != NULL && receive_all(fd, memory, ask->request_bytes) && send_all(fd, memory, ask->reply_bytes))
		;
	free(memory);
}

static void serve_norm(int fd, const struct remote_ask *ask, cudaStream_t stream)
{
	const uint64_t bytes = (uint64_t)ask->rows * REMOTE_HIDDEN * sizeof(uint16_t);
	const bool mapped = ask->mode == REMOTE_MAPPED;
	void *in = pinned(bytes), *out = pinned(bytes);
	void *x = mapped ? in : device_memory(bytes), *y = mapped ? out : device_memory(bytes); /* one address space: a mapped address is the device's too */
	struct norm_call made;
	norm_make(&made, ask->rows, x, y);
	while (receive_all(fd, in, bytes)) {
		if (!mapped)
			must(cudaMemcpyAsync(x, in, bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
		norm_launch(&made, stream);
		if (!mapped)
			must(cudaMemcpyAsync(out, y, bytes, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
		must(cudaStreamSynchronize(stream), "the kernel");
		if (!send_all(fd, out, bytes))
			break;
	}
	if (!mapped) {
		(void)cudaFree(x);
		(void)cudaFree(y);
	}
	(void)cudaFreeHost(in);
	(void)cudaFreeHost(out);
}

static bool store_one(int fd, const struct remote_ask *ask, cudaStream_t stream, char *pieces, char *there, cudaEvent_t done[2])
{
	unsigned turn = 0;
	for (uint64_t at = 0; at < ask->request_bytes; turn ^= 1) {
		const uint64_t left = ask->request_bytes - at, bytes = left < STORE_PIECE_BYTES ? left : STORE_PIECE_BYTES;
		char *piece = pieces + turn * STORE_PIECE_BYTES;
		must(cudaEventSynchronize(done[turn]), "a copy");
		if (!receive_all(fd, piece, bytes))
			return false;
		must(cudaMemcpyAsync(there + at, piece, bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
		must(cudaEventRecord(done[turn], stream), "cudaEventRecord");
		at += bytes;
	}
	must(cudaStreamSynchronize(stream), "the copies");
	return true;
}

static void serve_store(int fd, const struct remote_ask *ask, cudaStream_t stream)
{
	char *pieces = pinned(2 * STORE_PIECE_BYTES), *there = device_memory(ask->request_bytes);
	cudaEvent_t done[2];
	for (int i = 0; i < 2; i++)
		must(cudaEventCreateWithFlags(&done[i], cudaEventDisableTiming), "cudaEventCreate");
	char ok = 1;
	while (store_one(fd, ask, stream, pieces, there, done) && send_all(fd, &ok, 1))
		;
	for (int i = 0; i < 2; i++)
		(void)cudaEventDestroy(done[i]);
	(void)cudaFreeHost(pieces);
	(void)cudaFree(there);
}

static double median_launch_us(const struct norm_call *made, cudaStream_t stream)
{
	enum { TURNS = 200 };
	double us[TURNS];
	for (int i = 0; i < TURNS; i++) {
		const uint64_t begin = clock_ns();
		norm_launch(made, stream);
		must(cudaStreamSynchronize(stream), "the kernel");
		us[i] = (double)(clock_ns() - begin) / 1e3;
	}
	return report_median(us, TURNS);
}

static double launch_rate(const struct norm_call *made, cudaStream_t stream)
{
	enum { LAUNCHES = 20000 };
	const uint64_t begin = clock_ns();
	for (int i = 0; i < LAUNCHES; i++)
		norm_launch(made, stream);
	must(cudaStreamSynchronize(stream), "the kernels");
	return LAUNCHES * 1e9 / (double)(clock_ns() - begin);
}

/* opd's own chain: the first reads x, the last writes y, and each of the others what the one before it has written, in two places in turn, as opd lays out intermediate results. */
struct chain {
	void *x, *places, *y;
	uint32_t nodes;
	struct norm_call calls[REMOTE_CHAIN];
	cudaGraphExec_t exec; /* NULL: of one node, which is launched as it is */
};

static cudaGraphExec_t chain_capture(const struct chain *chain, cudaStream_t stream)
{
	cudaGraph_t graph;
	cudaGraphExec_t exec;
	must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "capture");
	for (uint32_t i = 0; i < chain->nodes; i++)
		norm_launch(&chain->calls[i], stream);
	must(cudaStreamEndCapture(stream, &graph), "capture");
	must(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
	(void)cudaGraphDestroy(graph);
	return exec;
}

static struct chain *chain_make(uint32_t nodes, cudaStream_t stream)
{
	const uint64_t bytes = (uint64_t)BARE_ROWS * REMOTE_HIDDEN * sizeof(uint16_t);
	struct chain *chain = calloc(1, sizeof *chain);
	if (chain == NULL || nodes == 0 || nodes > REMOTE_CHAIN)
		bench_fail("floor: no chain of %u", nodes);
	*chain = (struct chain){.x = device_memory(bytes), .places = device_memory(2 * bytes), .y = device_memory(bytes), .nodes = nodes};
	for (uint32_t i = 0; i < nodes; i++) {
		unsigned char *from = (unsigned char *)chain->places + (i + 1) % 2 * bytes, *to = (unsigned char *)chain->places + i % 2 * bytes;
		norm_make(&chain->calls[i], BARE_ROWS, i == 0 ? chain->x : from, i + 1 == nodes ? chain->y : to);
	}
	chain->exec = nodes == 1 ? NULL : chain_capture(chain, stream);
	return chain;
}

static void chain_launch(const struct chain *chain, cudaStream_t stream)
{
	if (chain->exec == NULL)
		norm_launch(&chain->calls[0], stream);
	else
		must(cudaGraphLaunch(chain->exec, stream), "cudaGraphLaunch");
}

static void chain_destroy(struct chain *chain)
{
	if (chain->exec != NULL)
		(void)cudaGraphExecDestroy(chain->exec);
	(void)cudaFree(chain->x);
	(void)cudaFree(chain->places);
	(void)cudaFree(chain->y);
	free(chain);
}

static void serve_step(int fd, const struct remote_ask *ask, cudaStream_t stream)
{
	struct chain *chain = chain_make(ask->rows, stream);
	char *envelope = calloc(1, ask->request_bytes > ask->reply_bytes ? ask->request_bytes : ask->reply_bytes);
	while (envelope != NULL && receive_all(fd, envelope, ask->request_bytes)) {
		chain_launch(chain, stream);
		must(cudaStreamSynchronize(stream), "the step");
		if (!send_all(fd, envelope, ask->reply_bytes))
			break;
	}
	free(envelope);
	chain_destroy(chain);
}

static double median_chain_us(const struct chain *chain, cudaStream_t stream)
{
	enum { TURNS = 50 };
	cudaEvent_t begin, end;
	double us[TURNS];
	must(cudaEventCreate(&begin), "cudaEventCreate");
	must(cudaEventCreate(&end), "cudaEventCreate");
	for (int i = 0; i < TURNS; i++) {
		float ms;
		must(cudaEventRecord(begin, stream), "cudaEventRecord");
		chain_launch(chain, stream);
		must(cudaEventRecord(end, stream), "cudaEventRecord");
		must(cudaEventSynchronize(end), "the graph");
		must(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
		us[i] = (double)ms * 1e3;
	}
	(void)cudaEventDestroy(begin);
	(void)cudaEventDestroy(end);
	return report_median(us, TURNS);
}

static double link_rate(void *to, const void *from, enum cudaMemcpyKind kind, cudaStream_t stream)
{
	double best = 0;
	for (int i = 0; i < 5; i++) {
		const uint64_t begin = clock_ns();
		must(cudaMemcpyAsync(to, from, LINK_BYTES, kind, stream), "cudaMemcpyAsync");
		must(cudaStreamSynchronize(stream), "the copy");
		const double rate = (double)LINK_BYTES * 1e9 / (double)(clock_ns() - begin);
		best = rate > best ? rate : best;
	}
	return best;
}

static void serve_bare(int fd, cudaStream_t stream)
{
	const uint64_t bytes = BARE_ROWS * REMOTE_HIDDEN * sizeof(uint16_t);
	void *x = device_memory(bytes), *y = device_memory(bytes), *there = device_memory(LINK_BYTES), *here = pinned(LINK_BYTES);
	struct norm_call made;
	char request;
	norm_make(&made, BARE_ROWS, x, y);
	struct chain *chain = chain_make(REMOTE_CHAIN, stream);
	while (receive_all(fd, &request, 1)) {
		const struct remote_bare bare = {
			.launch_us = median_launch_us(&made, stream),
			.launch_rate = launch_rate(&made, stream),
			.chain_us = median_chain_us(chain, stream),
			.link_in = link_rate(there, here, cudaMemcpyHostToDevice, stream),
			.link_out = link_rate(here, there, cudaMemcpyDeviceToHost, stream),
		};
		if (!send_all(fd, &bare, sizeof bare))
			break;
	}
	chain_destroy(chain);
	(void)cudaFree(x);
	(void)cudaFree(y);
	(void)cudaFree(there);
	(void)cudaFreeHost(here);
}

/* ---- The server ---- */

static void *serve(void *argument)
{
	const int fd = (int)(intptr_t)argument;
	struct remote_ask ask;
	cudaStream_t stream;
	must(cudaSetDevice(0), "cudaSetDevice");
	must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
	if (receive_all(fd, &ask, sizeof ask)) {
		if (ask.mode == REMOTE_ECHO)
			serve_echo(fd, &ask);
		else if (ask.mode == REMOTE_PINNED || ask.mode == REMOTE_MAPPED)
			serve_norm(fd, &ask, stream);
		else if (ask.mode == REMOTE_STORE)
			serve_store(fd, &ask, stream);
		else if (ask.mode == REMOTE_STEP)
			serve_step(fd, &ask, stream);
		else
			serve_bare(fd, stream);
	}
	(void)cudaStreamDestroy(stream);
	(void)close(fd);
	return NULL;
}

static void begin_device(const char *module)
{
	uint16_t weight[REMOTE_HIDDEN];
	opd_error error = {0};
	host_init(&host);
	for (size_t i = 0; builtin_modules[i] != NULL; i++)
		if (host_open(&host, builtin_modules[i], &error) != OPD_OK)
			bench_fail("floor: %s", error.text);
	if (host_load(&host, module, &error) != OPD_OK)
		bench_fail("floor: %s: %s", module, error.text);
	norm = host_find_impl(&host, "cuda", "rms_norm");
	if (norm == NULL || norm->impl->unsupported != NULL)
		bench_fail("floor: %s", norm == NULL ? "no rms_norm" : norm->impl->unsupported);
	remote_weight(weight);
	weight_there = device_memory(sizeof weight);
	must(cudaMemcpy(weight_there, weight, sizeof weight, cudaMemcpyHostToDevice), "cudaMemcpy");
}

static _Noreturn void serve_all(int unix_listener, int tcp_listener, const char *module)
{
	struct pollfd listeners[2] = {{.fd = unix_listener, .events = POLLIN}, {.fd = tcp_listener, .events = POLLIN}};
	begin_device(module);
	for (;;) {
		if (poll(listeners, 2, -1) < 0 && errno != EINTR)
			bench_fail("floor: poll: %s", strerror(errno));
		for (int i = 0; i < 2; i++) {
			pthread_t thread;
			const int fd = (listeners[i].revents & POLLIN) == 0 ? -1 : accept4(listeners[i].fd, NULL, NULL, SOCK_CLOEXEC);
			if (fd < 0)
				continue;
			(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
			if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd) != 0)
				bench_fail("floor: no thread");
			(void)pthread_detach(thread);
		}
	}
}

static int listen_unix(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	(void)snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
	const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 16) != 0)
		bench_fail("floor: %s: %s", path, strerror(errno));
	return fd;
}

static int listen_tcp(uint16_t *port_out)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t bytes = sizeof address;
	const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 16) != 0 || getsockname(fd, (struct sockaddr *)&address, &bytes) != 0)
		bench_fail("floor: loopback: %s", strerror(errno));
	*port_out = ntohs(address.sin_port);
	return fd;
}

void remote_floor_start(struct remote_floor *floor, const char *directory, const char *module)
{
	if ((size_t)snprintf(floor->path, sizeof floor->path, "%s/gpu-floor.sock", directory) >= sizeof floor->path)
		bench_fail("floor: %s: the path is too long for a Unix socket", directory);
	const int unix_listener = listen_unix(floor->path), tcp_listener = listen_tcp(&floor->port);
	(void)fflush(stdout);
	floor->pid = fork(); /* before anything of CUDA, which doesn't live past a fork */
	if (floor->pid < 0)
		bench_fail("floor: fork: %s", strerror(errno));
	if (floor->pid == 0) {
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		serve_all(unix_listener, tcp_listener, module);
	}
	(void)close(unix_listener);
	(void)close(tcp_listener);
}

void remote_floor_stop(struct remote_floor *floor)
{
	(void)kill(floor->pid, SIGKILL);
	(void)waitpid(floor->pid, NULL, 0);
	(void)unlink(floor->path);
}

/* ---- Clients ---- */

int remote_connect(const struct remote_floor *floor, bool tcp, const struct remote_ask *ask)
{
	struct sockaddr_un local = {.sun_family = AF_UNIX};
	struct sockaddr_in loopback = {.sin_family = AF_INET, .sin_port = htons(floor->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	(void)snprintf(local.sun_path, sizeof local.sun_path, "%s", floor->path);
	const int fd = socket(tcp ? AF_INET : AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || connect(fd, tcp ? (struct sockaddr *)&loopback : (struct sockaddr *)&local, tcp ? sizeof loopback : sizeof local) != 0)
		bench_fail("floor: connect: %s", strerror(errno));
	if (tcp)
		(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
	if (!send_all(fd, ask, sizeof *ask))
		bench_fail("floor: the server has closed");
	return fd;
}

void remote_exchange(int fd, const struct remote_ask *ask, const void *request, void *reply)
{
	if (!send_all(fd, request, ask->request_bytes) || !receive_all(fd, reply, ask->reply_bytes))
		bench_fail("floor: the server has closed");
}
