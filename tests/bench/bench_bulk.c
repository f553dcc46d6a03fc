/* Large tensors: how fast they go up and down against libuv's direct rate, what memory they take, and how long they hold up
 * others. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "tests/bench/bench.h"
#include "tests/lib/clock.h"
#include "tests/lib/histogram.h"
#include "tests/lib/pin.h"

#define MIB ((size_t)1 << 20)
#define GIB (1024.0 * 1024 * 1024)
#define BULK_BYTES (64 * MIB)
#define BULK_ELEMENTS ((int64_t)(BULK_BYTES / sizeof(float)))
#define PEAK_BYTES (256 * MIB)
#define BESIDE_BYTES (1024 * MIB)
#define BESIDE_US 1000.0 /* by which another session's upload may raise a small op's p99 */
#define SMALL_BYTES 128 /* of a floor's message beside a bulk transfer: header and envelope */
#define ROUNDS_MAX 15
#define TRANSFERS 2

/* One opd_run; nanoseconds without the kernel's. */
static uint64_t bulk_call(opd_client *client, const opd_request *request)
{
	opd_result *result;
	opd_error error;
	uint64_t begin = clock_ns();
	if (opd_run(client, request, &result, &error) != OPD_OK)
		bench_fail("a bulk call failed: %s", error.text);
	uint64_t ns = clock_ns() - begin;
	const opd_explain *explain = opd_result_explain(result);
	ns -= explain == NULL || explain->kernel_ns > ns ? 0 : explain->kernel_ns;
	opd_handle kept = opd_result_handle(result, 0);
	opd_result_destroy(result);
	if (kept.generation != 0 && opd_free(client, &kept, 1, &error) != OPD_OK)
		bench_fail("free: %s", error.text);
	return ns;
}

static opd_request *bulk_relu(const opd_operand *operand, bool keep)
{
	opd_request *request = opd_request_create("relu");
	if (request == NULL)
		bench_fail("out of memory");
	opd_request_tensor(request, NULL, operand);
	opd_request_explain(request, true);
	opd_request_output(request, 0, keep, !keep);
	return request;
}

/* The bytes go up; two of them far apart are the operand, so that there is next to no kernel. */
static opd_request *request_probe(opd_client *client, const float *data)
{
	(void)client;
	return bulk_relu(&(opd_operand){.struct_bytes = sizeof(opd_operand),
	                                .dtype = OPD_f32,
	                                .rank = 1,
	                                .shape = (int64_t[]){2},
	                                .strides = (int64_t[]){BULK_ELEMENTS - 1},
	                                .data = data,
	                                .data_bytes = BULK_BYTES},
	                 false);
}

/* The bytes go up and a result as large stays there. */
static opd_request *request_upload(opd_client *client, const float *data)
{
	(void)client;
	return bulk_relu(&(opd_operand)OPD_OPERAND(OPD_f32, data, BULK_ELEMENTS), true);
}

/* The operand is there; the result comes down. */
static opd_request *request_download(opd_client *client, const float *data)
{
	opd_handle handle = call_keep(client, data, BULK_ELEMENTS);
	return bulk_relu(&(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = handle}, false);
}

struct bulk_case {
	const char *name;
	opd_request *(*build)(opd_client *client, const float *data);
	struct floor_shape shape;
	report_bound bound;
	const char *peer_op;
	const char *peer_before; /* NULL: nothing has to be there */
};

static const struct bulk_case cases[] = {
    {"64 MiB up (two elements read)", request_probe, {BULK_BYTES, SMALL_BYTES, 1}, REPORT_RATIO_MIN, "probe", NULL},
    {"64 MiB up, relu, result kept", request_upload, {BULK_BYTES, SMALL_BYTES, 1}, REPORT_NO_TARGET, "keep", NULL},
    {"64 MiB down (relu of a kept one)", request_download, {SMALL_BYTES, BULK_BYTES, 1}, REPORT_RATIO_MIN, "fetch", "keep"},
};

static double rate_gib(uint64_t bytes, uint64_t ns)
{
	return (double)bytes * 1e9 / GIB / (double)ns;
}

static uint64_t floor_transfers(int fd, const struct floor_shape *shape, void *out, void *in)
{
	uint64_t begin = clock_ns();
	for (int i = 0; i < TRANSFERS; i++)
		floor_exchange(fd, shape, out, in);
	return clock_ns() - begin;
}

static uint64_t opd_transfers(opd_client *client, const opd_request *request)
{
	uint64_t ns = 0;
	for (int i = 0; i < TRANSFERS; i++)
		ns += bulk_call(client, request);
	return ns;
}

/* What must be there, and warm memory. */
static void bulk_peer_begin(struct peer *peer, bool tcp, const struct bulk_case *bulk)
{
	peer_connect(peer, tcp);
	if (bulk->peer_before != NULL)
		(void)peer_block(peer, bulk->peer_before, (size_t)BULK_ELEMENTS, 1, 1, true);
	(void)peer_block(peer, bulk->peer_op, (size_t)BULK_ELEMENTS, 1, 1, true);
}

static void bulk_peer_round(struct peer *peer, const struct bulk_case *bulk, double floor, double opd, struct peer_series *series)
{
	struct peer_block block = peer_block(peer, bulk->peer_op, (size_t)BULK_ELEMENTS, TRANSFERS, 1, true);
	if (block.total_ns > block.kernel_ns)
		peer_series_add(series, rate_gib(block.calls * BULK_BYTES, block.total_ns - block.kernel_ns), 0, floor, opd);
}

static void bulk_run(struct bench *bench, const struct daemon *daemon, bool tcp, const struct bulk_case *bulk, float *data,
                     void *room)
{
	unsigned rounds = bench->quick ? 3 : ROUNDS_MAX;
	double floor[ROUNDS_MAX], opd[ROUNDS_MAX], ratio[ROUNDS_MAX];
	char what[96], note[64];
	opd_client *client = call_connect(tcp ? daemon->tcp_address : daemon->unix_address);
	opd_request *request = bulk->build(client, data);
	int fd = floor_connect(&bench->floor, tcp, &bulk->shape);
	placement_apply(&placement_two, bench, daemon);
	(void)floor_transfers(fd, &bulk->shape, data, room);
	(void)opd_transfers(client, request);
	struct peer_series peers[PEERS] = {0};
	for (int p = 0; p < PEERS; p++)
		bulk_peer_begin(&bench->peers[p], tcp, bulk);
	for (unsigned i = 0; i < rounds; i++) {
		floor[i] = rate_gib(TRANSFERS * BULK_BYTES, floor_transfers(fd, &bulk->shape, data, room));
		opd[i] = rate_gib(TRANSFERS * BULK_BYTES, opd_transfers(client, request));
		ratio[i] = opd[i] / floor[i];
		for (int p = 0; p < PEERS; p++)
			bulk_peer_round(&bench->peers[p], bulk, floor[i], opd[i], &peers[p]);
	}
	(void)snprintf(what, sizeof what, "%s, %s, %s", bulk->name, tcp ? "TCP" : "Unix", placement_two.name);
	(void)snprintf(note, sizeof note, "ratios %.2f to %.2f", report_quantile(ratio, rounds, 0.1),
	               report_quantile(ratio, rounds, 0.9));
	report_row(&(struct report_row){.what = what,
	                                .unit = "GiB/s",
	                                .floor = report_median(floor, rounds),
	                                .value = report_median(opd, rounds),
	                                .kernel = REPORT_NONE,
	                                .ratio = report_median(ratio, rounds),
	                                .bound = bulk->bound,
	                                .limit = 0.9,
	                                .note = note});
	for (int p = 0; p < PEERS; p++) {
		peer_series_print(&peers[p], &bench->peers[p], "GiB/s", false);
		peer_close(&bench->peers[p]);
	}
	(void)close(fd);
	opd_request_destroy(request);
	opd_close(client);
}

/* ---- Memory ---- */

static void peak_run(struct bench *bench)
{
	struct daemon daemon;
	daemon_start(&daemon, bench->binary, bench->directory, NULL);
	float *data = floor_memory(PEAK_BYTES);
	opd_client *client = call_connect(daemon.unix_address);
	opd_request *request = bulk_relu(&(opd_operand)OPD_OPERAND(OPD_f32, data, (int64_t)(PEAK_BYTES / sizeof(float))), false);
	uint64_t idle = daemon_resident_bytes(&daemon);
	for (int i = 0; i < 2; i++)
		(void)bulk_call(client, request);
	double peak = (double)daemon_peak_bytes(&daemon) / (double)MIB;
	char note[64];
	(void)snprintf(note, sizeof note, "%.1f MiB when idle, before", (double)idle / (double)MIB);
	report_row(&(struct report_row){.what = "peak resident memory, 256 MiB in and out",
	                                .unit = "MiB",
	                                .floor = 512,
	                                .value = peak,
	                                .kernel = REPORT_NONE,
	                                .ratio = peak / 512,
	                                .bound = REPORT_VALUE_MAX,
	                                .limit = 528,
	                                .note = note});
	opd_request_destroy(request);
	opd_close(client);
	floor_memory_free(data, PEAK_BYTES);
	daemon_stop(&daemon);
}

/* ---- Beside others ---- */

/* Uploads again and again on a connection and a thread of its own: 1 GiB to the daemon, 64 MiB to the floor. */
struct uploader {
	pthread_t thread;
	const struct bench *bench;
	const struct daemon *daemon; /* NULL: the floor */
	const float *data;           /* BESIDE_BYTES */
	_Atomic bool stop;
	_Atomic uint64_t transfers;
};

static void upload_once(opd_client *client, const float *data)
{
	opd_handle handle;
	opd_error error;
	const opd_operand operand = OPD_OPERAND(OPD_f32, data, (int64_t)(BESIDE_BYTES / sizeof(float)));
	if (opd_upload(client, &operand, NULL, &handle, &error) != OPD_OK || opd_free(client, &handle, 1, &error) != OPD_OK)
		bench_fail("uploading 1 GiB failed: %s", error.text);
}

static void *uploader_main(void *argument)
{
	struct uploader *uploader = argument;
	/* The small ops' client shares this core: what is measured is the wait in the server, not for a turn on the core. */
	(void)setpriority(PRIO_PROCESS, (id_t)gettid(), 19);
	const struct floor_shape shape = {BULK_BYTES, SMALL_BYTES, 1};
	char reply[SMALL_BYTES];
	opd_client *client = uploader->daemon == NULL ? NULL : call_connect(uploader->daemon->unix_address);
	int fd = client == NULL ? floor_connect(&uploader->bench->floor, false, &shape) : -1;
	while (!atomic_load(&uploader->stop)) {
		if (client == NULL)
			floor_exchange(fd, &shape, uploader->data, reply);
		else
			upload_once(client, uploader->data);
		atomic_fetch_add(&uploader->transfers, 1);
	}
	opd_close(client);
	if (fd >= 0)
		(void)close(fd);
	return NULL;
}

static void beside_pings(const struct bench *bench, const struct daemon *daemon, struct histogram *histogram)
{
	static char out[SMALL_BYTES], in[SMALL_BYTES];
	const struct floor_shape shape = {SMALL_BYTES, SMALL_BYTES, 1};
	opd_client *client = daemon == NULL ? NULL : call_connect(daemon->unix_address);
	opd_request *request = client == NULL ? NULL : call_tiny(client);
	int fd = client == NULL ? floor_connect(&bench->floor, false, &shape) : -1;
	uint64_t end = clock_ns() + (bench->quick ? 500000000u : 2000000000u);
	for (uint64_t begin = clock_ns(); begin < end; begin = clock_ns()) {
		if (client == NULL)
			floor_exchange(fd, &shape, out, in);
		else
			call_run(client, request);
		histogram_add(histogram, clock_ns() - begin);
		(void)usleep(200); /* an occasional op, not a second load */
	}
	opd_request_destroy(request);
	opd_close(client);
	if (fd >= 0)
		(void)close(fd);
}

/* Latency of small ops while another connection uploads; daemon NULL: the floor's. */
static void beside_measure(const struct bench *bench, const struct daemon *daemon, const float *data, struct histogram *histogram)
{
	struct uploader uploader = {.bench = bench, .daemon = daemon, .data = data};
	memset(histogram, 0, sizeof *histogram);
	if (pthread_create(&uploader.thread, NULL, uploader_main, &uploader) != 0)
		bench_fail("can't start a thread");
	while (atomic_load(&uploader.transfers) == 0)
		(void)usleep(1000);
	beside_pings(bench, daemon, histogram);
	atomic_store(&uploader.stop, true);
	(void)pthread_join(uploader.thread, NULL);
}

static void beside_print(const char *what, const struct histogram *floor, const struct histogram *opd, double quantile, double idle_us)
{
	const double base = (double)histogram_quantile(floor, quantile) / 1e3, value = (double)histogram_quantile(opd, quantile) / 1e3;
	char note[64];
	(void)snprintf(note, sizeof note, "idle: %.0f us", idle_us);
	report_row(&(struct report_row){.what = what,
	                                .unit = "us",
	                                .floor = base,
	                                .value = value,
	                                .kernel = REPORT_NONE,
	                                .ratio = value / base,
	                                .bound = quantile == 0.99 ? REPORT_VALUE_MAX : REPORT_NO_TARGET,
	                                .limit = idle_us + BESIDE_US,
	                                .note = note});
}

static void beside_run(struct bench *bench, const struct daemon *daemon)
{
	static const struct {
		const char *what;
		double quantile;
	} rows[] = {{"small op beside another session's 1 GiB up, Unix, p50", 0.5}, {"..., p99 (target: idle and 1 ms)", 0.99}, {"..., max", 1}};
	static struct histogram floor, idle, opd;
	float *data = floor_memory(BESIDE_BYTES);
	memset(&idle, 0, sizeof idle);
	placement_apply(&placement_two, bench, daemon);
	beside_measure(bench, NULL, data, &floor);
	beside_pings(bench, daemon, &idle);
	beside_measure(bench, daemon, data, &opd);
	for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
		beside_print(rows[i].what, &floor, &opd, rows[i].quantile, (double)histogram_quantile(&idle, rows[i].quantile) / 1e3);
	floor_memory_free(data, BESIDE_BYTES);
}

void bench_bulk(struct bench *bench)
{
	struct daemon daemon;
	daemon_start(&daemon, bench->binary, bench->directory, NULL);
	float *data = floor_memory(BULK_BYTES);
	void *room = floor_memory(BULK_BYTES);
	report_section("Bulk, against libuv straight between socket and one reused buffer; kernels subtracted");
	report_row(&(struct report_row){.what = "memcpy of 64 MiB, one core",
	                                .unit = "GiB/s",
	                                .floor = floor_memcpy_rate(BULK_BYTES, 5) / GIB,
	                                .value = REPORT_NONE,
	                                .kernel = REPORT_NONE,
	                                .ratio = REPORT_NONE});
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
		for (int tcp = 0; tcp < 2; tcp++)
			bulk_run(bench, &daemon, tcp != 0, &cases[i], data, room);
	beside_run(bench, &daemon);
	daemon_stop(&daemon);
	floor_memory_free(data, BULK_BYTES);
	floor_memory_free(room, BULK_BYTES);
	(void)pin_self(PIN_ANY);
	peak_run(bench);
}
