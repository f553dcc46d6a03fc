/* A remote op on a GPU beside its floors, in one run: `opd-bench-gpu-remote --opd DAEMON [--quick] CUDA-MODULE [MODULE…]`.
 *
 * Floors and opd take turns, block by block; each figure is the median over blocks of a block's median. Floors are in remote_floor.h. What is compared gives the same bytes (checked).
 * Layer: bench, on libopd's public header. Needs a GPU; says so and ends with 77 where there is none. */
#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "opd/client.h"
#include "tests/bench/daemon.h"
#include "tests/bench/gpu/remote_floor.h"
#include "tests/bench/report.h"
#include "tests/lib/clock.h"

enum { BLOCKS = 9, MODULES_MAX = 8, ROWS_RESIDENT = 16, WINDOW = 64, ENVELOPE_BYTES = 64 };
#define SHARED_BYTES ((uint64_t)256 << 20)
#define SOCKET_BYTES ((uint64_t)64 << 20)

struct remote {
	bool quick;
	const char *binary;
	const char *modules[MODULES_MAX + 1];
	char directory[64];
	struct remote_floor floor;
	struct daemon daemon;
};

static void must(opd_status status, const opd_error *error, const char *what)
{
	if (status != OPD_OK)
		bench_fail("%s: %s", what, error->text);
}

/* ---- Turns ---- */

/* One thing that is timed: `once` is one round trip. */
struct timed {
	void (*once)(void *context);
	void *context;
	double block_us[BLOCKS];
};

static double block(const struct timed *timed, unsigned calls)
{
	double us[512];
	for (unsigned i = 0; i < calls; i++) {
		const uint64_t begin = clock_ns();
		timed->once(timed->context);
		us[i] = (double)(clock_ns() - begin) / 1e3;
	}
	return report_median(us, calls);
}

/* Fills in block_us of all, which take turns. */
static void turns(struct timed *timed, size_t count, unsigned calls)
{
	for (size_t i = 0; i < count; i++)
		(void)block(&timed[i], calls < 8 ? 3 : 8); /* warm: pools, pinned memory, measured costs */
	for (unsigned turn = 0; turn < BLOCKS; turn++)
		for (size_t i = 0; i < count; i++)
			timed[i].block_us[turn] = block(&timed[i], calls);
}

static double median_us(struct timed *timed)
{
	return report_median(timed->block_us, BLOCKS);
}

struct floor_call {
	int fd;
	struct remote_ask ask;
	const void *request;
	void *reply;
};

static void floor_once(void *context)
{
	const struct floor_call *call = context;
	remote_exchange(call->fd, &call->ask, call->request, call->reply);
}

static struct floor_call floor_call(const struct remote *remote, bool tcp, enum remote_mode mode, uint32_t rows, uint64_t bytes, uint64_t reply_bytes)
{
	struct floor_call call = {.ask = {.mode = mode, .rows = rows, .request_bytes = bytes, .reply_bytes = reply_bytes}};
	call.fd = remote_connect(&remote->floor, tcp, &call.ask);
	return call;
}

/* ---- opd's calls ---- */

struct opd_call_of {
	opd_client *client;
	opd_request *request;
	opd_handle weight;
	opd_handle x;
};

static void opd_once(void *context)
{
	const struct opd_call_of *call = context;
	opd_result *result;
	opd_error error;
	must(opd_run(call->client, call->request, &result, &error), &error, "a call");
	opd_result_destroy(result);
}

static opd_handle upload(opd_client *client, const opd_operand *operand)
{
	const opd_upload_options there = {.struct_bytes = sizeof there, .device = "cuda"};
	opd_handle handle;
	opd_error error;
	must(opd_upload(client, operand, &there, &handle, &error), &error, "an upload");
	return handle;
}

static struct opd_call_of norm_begin(const char *address)
{
	static uint16_t weight[REMOTE_HIDDEN];
	struct opd_call_of call = {0};
	opd_error error;
	must(opd_connect(address, NULL, &call.client, &error), &error, address);
	remote_weight(weight);
	call.weight = upload(call.client, &(opd_operand)OPD_OPERAND(OPD_bf16, weight, REMOTE_HIDDEN));
	return call;
}

static opd_request *norm_request(const struct opd_call_of *call, const opd_operand *x)
{
	opd_request *request = opd_request_create("rms_norm");
	opd_request_tensor(request, NULL, x);
	opd_request_tensor(request, NULL, &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = call->weight});
	opd_request_float(request, NULL, 1e-5);
	return request;
}

static void call_end(struct opd_call_of *call)
{
	opd_request_destroy(call->request);
	opd_close(call->client);
}

/* What it gives is what the floor gives, made by `cuda`. */
static void check_norm(const struct opd_call_of *call, const void *expected, uint64_t bytes)
{
	opd_result *result;
	opd_error error;
	must(opd_run(call->client, call->request, &result, &error), &error, "a call");
	if (strcmp(opd_result_provider(result), "cuda") != 0)
		bench_fail("rms_norm was run by %s", opd_result_provider(result));
	if (memcmp(opd_tensor_data(opd_result_tensor(result, 0)), expected, bytes) != 0)
		bench_fail("the floor and opd differ");
	opd_result_destroy(result);
}

static void fill(uint16_t *x, uint64_t elements)
{
	uint64_t state = 1;
	for (uint64_t i = 0; i < elements; i++) {
		state = state * 6364136223846793005u + 1442695040888963407u;
		x[i] = (uint16_t)(0x3f00 + (state >> 57) + ((state >> 40 & 1) << 15)); /* ±0.5 to ±1.9 */
	}
}

/* ---- Rows on the wire ---- */

enum { ECHO, PINNED, MAPPED, OPD, WIRE_KINDS };

static void print_wire(struct timed timed[WIRE_KINDS], bool tcp, uint32_t rows)
{
	char what[64];
	const double echo = median_us(&timed[ECHO]), pinned = median_us(&timed[PINNED]), mapped = median_us(&timed[MAPPED]), value = median_us(&timed[OPD]);
	const double best = pinned < mapped ? pinned : mapped;
	char note[96];
	(void)snprintf(what, sizeof what, "rms_norm bf16, %u rows, %s", rows, tcp ? "TCP" : "Unix");
	(void)snprintf(note, sizeof note, "echo %.1f, pinned copies %.1f, mapped %.1f", echo, pinned, mapped);
	report_row(&(struct report_row){.what = what, .unit = "us", .floor = best, .value = value, .kernel = REPORT_NONE, .ratio = value / best, .bound = REPORT_RATIO_MAX,
	                                .limit = rows == 1 ? 1.3 : 1.15, .note = note});
}

static void wire_rows(const struct remote *remote, bool tcp, uint32_t rows, unsigned calls)
{
	static const enum remote_mode modes[] = {REMOTE_ECHO, REMOTE_PINNED, REMOTE_MAPPED};
	const uint64_t bytes = (uint64_t)rows * REMOTE_HIDDEN * sizeof(uint16_t);
	uint16_t *x = malloc(bytes), *y = malloc(bytes);
	struct floor_call floors[3];
	struct timed timed[WIRE_KINDS] = {{0}};
	if (x == NULL || y == NULL)
		bench_fail("out of memory");
	fill(x, bytes / sizeof *x);
	for (int i = 0; i < 3; i++) {
		floors[i] = floor_call(remote, tcp, modes[i], rows, bytes, bytes);
		floors[i].request = x;
		floors[i].reply = y;
		timed[i] = (struct timed){.once = floor_once, .context = &floors[i]};
	}
	struct opd_call_of call = norm_begin(tcp ? remote->daemon.tcp_address : remote->daemon.unix_address);
	call.request = norm_request(&call, &(opd_operand)OPD_OPERAND(OPD_bf16, x, rows, REMOTE_HIDDEN));
	timed[OPD] = (struct timed){.once = opd_once, .context = &call};
	floor_once(&floors[MAPPED]);
	check_norm(&call, y, bytes);
	turns(timed, WIRE_KINDS, calls);
	print_wire(timed, tcp, rows);
	for (int i = 0; i < 3; i++)
		(void)close(floors[i].fd);
	call_end(&call);
	free(x);
	free(y);
}

static void bench_wire(const struct remote *remote)
{
	static const struct {
		uint32_t rows;
		unsigned calls;
	} sizes[] = {{1, 300}, {16, 200}, {256, 60}, {4096, 6}};
	report_section("operands and result on the wire, one in flight");
	for (int tcp = 0; tcp < 2; tcp++)
		for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
			wire_rows(remote, tcp, sizes[i].rows, remote->quick ? (sizes[i].calls + 3) / 4 : sizes[i].calls);
}

/* ---- Resident ---- */

static struct opd_call_of resident_begin(const char *address)
{
	static uint16_t x[ROWS_RESIDENT * REMOTE_HIDDEN];
	struct opd_call_of call = norm_begin(address);
	fill(x, ROWS_RESIDENT * REMOTE_HIDDEN);
	call.x = upload(call.client, &(opd_operand)OPD_OPERAND(OPD_bf16, x, ROWS_RESIDENT, REMOTE_HIDDEN));
	call.request = norm_request(&call, &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = call.x});
	opd_request_output(call.request, 0, false, false);
	return call;
}

static void pipeline(const struct opd_call_of *call, unsigned total)
{
	opd_error error;
	opd_ticket ticket;
	opd_result *result;
	for (unsigned sent = 0, done = 0; done < total;) {
		for (; sent < total && sent - done < WINDOW; sent++)
			must(opd_submit(call->client, call->request, &ticket, &error), &error, "a call");
		must(opd_wait_any(call->client, UINT64_MAX, &ticket, &result, &error), &error, "a call");
		opd_result_destroy(result);
		done++;
	}
}

static opd_request *chain_request(const struct opd_call_of *call)
{
	opd_graph *graph = opd_graph_create("chain");
	opd_value value = opd_graph_input(graph, "x"), weight = opd_graph_constant(graph, "w", call->weight);
	uint64_t id;
	opd_error error;
	for (int i = 0; i < REMOTE_CHAIN; i++) {
		opd_request *node = opd_request_create("rms_norm");
		opd_request_value(node, NULL, value);
		opd_request_value(node, NULL, weight);
		opd_request_float(node, NULL, 1e-5);
		value = opd_graph_node(graph, NULL, node);
		opd_request_destroy(node);
	}
	opd_graph_output(graph, "y", value);
	must(opd_graph_register(call->client, graph, &id, &error), &error, "a graph");
	opd_graph_destroy(graph);
	opd_request *request = opd_request_graph(id);
	opd_request_tensor(request, NULL, &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = call->x});
	opd_request_output(request, 0, false, false);
	return request;
}

struct bare_samples {
	double launch_us[BLOCKS], rate[BLOCKS], chain_us[BLOCKS], opd_rate[BLOCKS];
	double link_in, link_out;
};

/* One turn more of what the device does alone, and of as many requests in flight as a client may have. */
static void sample_bare(struct bare_samples *samples, const struct floor_call *bare, const struct opd_call_of *call, unsigned turn, unsigned total)
{
	struct remote_bare said;
	remote_exchange(bare->fd, &bare->ask, "", &said);
	samples->launch_us[turn] = said.launch_us;
	samples->rate[turn] = said.launch_rate;
	samples->chain_us[turn] = said.chain_us;
	samples->link_in = said.link_in > samples->link_in ? said.link_in : samples->link_in;
	samples->link_out = said.link_out > samples->link_out ? said.link_out : samples->link_out;
	const uint64_t begin = clock_ns();
	pipeline(call, total);
	samples->opd_rate[turn] = total * 1e9 / (double)(clock_ns() - begin);
}

/* plain_us: of a plain program that does the same between request and reply. */
static void print_beyond(const char *what, double device_us, double echo_us, double plain_us, double value, double limit)
{
	char note[128];
	(void)snprintf(note, sizeof note, "device alone %.1f, echo of %d bytes %.1f, opd %.1f; a plain server %.1f", device_us, (int)ENVELOPE_BYTES, echo_us, value, plain_us);
	report_row(&(struct report_row){.what = what, .unit = "us", .floor = device_us + echo_us, .value = value - device_us - echo_us, .kernel = REPORT_NONE,
	                                .ratio = value / (device_us + echo_us), .bound = REPORT_VALUE_MAX, .limit = limit, .note = note});
}

static void bench_resident(const struct remote *remote, bool tcp, struct bare_samples *samples)
{
	const char *address = tcp ? remote->daemon.tcp_address : remote->daemon.unix_address;
	char bytes[ENVELOPE_BYTES] = {0}, reply[ENVELOPE_BYTES];
	struct floor_call echo = floor_call(remote, tcp, REMOTE_ECHO, 0, ENVELOPE_BYTES, ENVELOPE_BYTES);
	struct floor_call bare = floor_call(remote, tcp, REMOTE_BARE, 0, 1, sizeof(struct remote_bare));
	struct floor_call one = floor_call(remote, tcp, REMOTE_STEP, 1, ENVELOPE_BYTES, ENVELOPE_BYTES), step = floor_call(remote, tcp, REMOTE_STEP, REMOTE_CHAIN, ENVELOPE_BYTES, ENVELOPE_BYTES);
	struct opd_call_of call = resident_begin(address), chain = call;
	chain.request = chain_request(&call);
	echo.request = one.request = step.request = bytes;
	echo.reply = one.reply = step.reply = reply;
	struct timed timed[] = {{.once = floor_once, .context = &echo},
	                        {.once = opd_once, .context = &call},
	                        {.once = floor_once, .context = &one},
	                        {.once = opd_once, .context = &chain},
	                        {.once = floor_once, .context = &step}};
	turns(timed, 5, remote->quick ? 50 : 200);
	pipeline(&call, 2000);
	for (unsigned turn = 0; turn < BLOCKS; turn++)
		sample_bare(samples, &bare, &call, turn, remote->quick ? 5000 : 20000);
	report_section(tcp ? "resident operands, TCP" : "resident operands, Unix");
	const double echo_us = median_us(&timed[0]), rate = report_median(samples->rate, BLOCKS), opd_rate = report_median(samples->opd_rate, BLOCKS);
	print_beyond("rms_norm bf16, 16 rows: beyond launch, sync and echo", report_median(samples->launch_us, BLOCKS), echo_us, median_us(&timed[2]), median_us(&timed[1]), 12);
	print_beyond("100 captured nodes: beyond the graph and the echo", report_median(samples->chain_us, BLOCKS), echo_us, median_us(&timed[4]), median_us(&timed[3]), 20);
	report_row(&(struct report_row){.what = "64 in flight beside bare asynchronous launches", .unit = "1/s", .floor = rate, .value = opd_rate, .kernel = REPORT_NONE,
	                                .ratio = opd_rate / rate, .bound = REPORT_RATIO_MIN, .limit = 0.8});
	opd_request_destroy(chain.request);
	call_end(&call);
	(void)close(echo.fd);
	(void)close(one.fd);
	(void)close(step.fd);
	(void)close(bare.fd);
}

/* ---- Uploads ---- */

struct upload_call {
	opd_client *client;
	opd_operand operand;
};

static void upload_once(void *context)
{
	const struct upload_call *call = context;
	const opd_handle handle = upload(call->client, &call->operand);
	opd_error error;
	must(opd_free(call->client, &handle, 1, &error), &error, "a free");
}

static void print_rate(const char *what, uint64_t bytes, double floor_rate, double us, const char *note)
{
	const double rate = (double)bytes / us * 1e6;
	report_row(&(struct report_row){.what = what, .unit = "GB/s", .floor = floor_rate / 1e9, .value = rate / 1e9, .kernel = REPORT_NONE, .ratio = rate / floor_rate,
	                                .bound = REPORT_RATIO_MIN, .limit = 0.9, .note = note});
}

static void upload_shared(const struct remote *remote, double link_in)
{
	const opd_connect_options how = {.struct_bytes = sizeof how, .shared_memory = true};
	struct upload_call call;
	opd_memory *memory;
	opd_error error;
	must(opd_connect(remote->daemon.unix_address, &how, &call.client, &error), &error, "connect");
	must(opd_memory_create(call.client, SHARED_BYTES, &memory, &error), &error, "shared memory");
	memset(opd_memory_data(memory), 0x3f, SHARED_BYTES);
	call.operand = (opd_operand){.struct_bytes = sizeof call.operand, .dtype = OPD_bf16, .rank = 1, .shape = (const int64_t[]){SHARED_BYTES / 2}, .source = OPD_FROM_MEMORY,
	                             .memory = memory, .data = opd_memory_data(memory)};
	struct timed timed = {.once = upload_once, .context = &call};
	turns(&timed, 1, 2);
	print_rate("upload of 256 MiB from shared memory", SHARED_BYTES, link_in, median_us(&timed), "beside the pinned link");
	opd_memory_destroy(memory);
	opd_close(call.client);
}

static void upload_socket(const struct remote *remote, bool tcp)
{
	struct upload_call call;
	char *bytes = malloc(SOCKET_BYTES), ok[2];
	opd_error error;
	if (bytes == NULL)
		bench_fail("out of memory");
	memset(bytes, 0x3f, SOCKET_BYTES);
	must(opd_connect(tcp ? remote->daemon.tcp_address : remote->daemon.unix_address, NULL, &call.client, &error), &error, "connect");
	call.operand = (opd_operand)OPD_OPERAND(OPD_bf16, bytes, (int64_t)(SOCKET_BYTES / 2));
	struct floor_call echo = floor_call(remote, tcp, REMOTE_ECHO, 0, SOCKET_BYTES, 1), store = floor_call(remote, tcp, REMOTE_STORE, 0, SOCKET_BYTES, 1);
	echo.request = store.request = bytes;
	echo.reply = &ok[0];
	store.reply = &ok[1];
	struct timed timed[] = {{.once = floor_once, .context = &echo}, {.once = floor_once, .context = &store}, {.once = upload_once, .context = &call}};
	turns(timed, 3, 1);
	char note[96];
	(void)snprintf(note, sizeof note, "beside the socket alone; received and stored by a plain program %.2f", (double)SOCKET_BYTES / median_us(&timed[1]) / 1e3);
	print_rate(tcp ? "upload of 64 MiB over TCP" : "upload of 64 MiB over Unix", SOCKET_BYTES, (double)SOCKET_BYTES / median_us(&timed[0]) * 1e6, median_us(&timed[2]), note);
	(void)close(echo.fd);
	(void)close(store.fd);
	opd_close(call.client);
	free(bytes);
}

/* ---- Command line ---- */

static _Noreturn void usage(void)
{
	(void)fprintf(stderr, "Usage: opd-bench-gpu-remote --opd DAEMON [--quick] CUDA-MODULE [MODULE...]\n");
	exit(2);
}

static void parse(struct remote *remote, int argc, char **argv)
{
	static const struct option options[] = {{"opd", required_argument, NULL, 'o'}, {"quick", no_argument, NULL, 'q'}, {0}};
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
		if (option == '?')
			usage();
		if (option == 'o')
			remote->binary = optarg;
		else
			remote->quick = true;
	}
	if (remote->binary == NULL || optind == argc || argc - optind > MODULES_MAX)
		usage();
	for (int i = optind; i < argc; i++)
		remote->modules[i - optind] = argv[i];
}

static void start_daemon(struct remote *remote)
{
	const char *more[2 * MODULES_MAX + 8] = {"--priority", "*=cuda,cublaslt,cpu,native"};
	char names[MODULES_MAX][512], path[PATH_MAX];
	size_t count = 2;
	for (size_t i = 0; remote->modules[i] != NULL; i++) {
		const char *name = strstr(remote->modules[i], "opd-provider-");
		if (name == NULL)
			bench_fail("%s: expected opd-provider-NAME.so", remote->modules[i]);
		name += strlen("opd-provider-");
		if (realpath(remote->modules[i], path) == NULL)
			bench_fail("%s: %s", remote->modules[i], strerror(errno));
		(void)snprintf(names[i], sizeof names[i], "%.*s=%.400s", (int)strcspn(name, "."), name, path);
		more[count++] = "--module";
		more[count++] = names[i];
	}
	daemon_start_with(&remote->daemon, remote->binary, remote->directory, NULL, more);
}

int main(int argc, char **argv)
{
	struct remote remote = {.directory = "/tmp/opd-bench-gpu-XXXXXX"};
	struct bare_samples samples = {.link_in = 0};
	parse(&remote, argc, argv);
	if (access("/dev/nvidiactl", R_OK) != 0) {
		(void)printf("skipped: /dev/nvidiactl: %s\n", strerror(errno));
		return 77;
	}
	if (mkdtemp(remote.directory) == NULL)
		bench_fail("%s: %s", remote.directory, strerror(errno));
	remote_floor_start(&remote.floor, remote.directory, remote.modules[0]);
	start_daemon(&remote);
	bench_resident(&remote, false, &samples);
	bench_resident(&remote, true, &samples);
	bench_wire(&remote);
	report_section("uploads to the device");
	upload_shared(&remote, samples.link_in);
	upload_socket(&remote, false);
	upload_socket(&remote, true);
	report_note("the pinned link: %.1f GB/s in, %.1f out", samples.link_in / 1e9, samples.link_out / 1e9);
	daemon_stop(&remote.daemon);
	remote_floor_stop(&remote.floor);
	(void)rmdir(remote.directory);
	return EXIT_SUCCESS;
}
