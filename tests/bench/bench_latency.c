/* How long one small op takes from call to result, beyond its kernel, against a libuv echo of the same bytes. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tests/bench/bench.h"
#include "tests/lib/clock.h"
#include "tests/lib/histogram.h"

#define ROUNDS_MAX 15
#define QUANTILES 3
static const double quantiles[QUANTILES] = {0.5, 0.9, 0.99};
static const char *const quantile_names[QUANTILES] = {"p50", "p90", "p99"};

/* Both ends of one transport, ready to be called. */
struct duel {
	struct floor_shape shape;
	int fd;
	void *request_bytes;
	void *reply_bytes;
	opd_client *client;
	opd_request *request;
};

static void duel_init(struct duel *duel, const struct bench *bench, const struct daemon *daemon, bool tcp, call_build_fn build)
{
	duel->shape = call_shape(daemon, build, 1);
	duel->fd = floor_connect(&bench->floor, tcp, &duel->shape);
	duel->request_bytes = floor_memory(duel->shape.request_bytes);
	duel->reply_bytes = floor_memory(duel->shape.reply_bytes);
	duel->client = call_connect(tcp ? daemon->tcp_address : daemon->unix_address);
	duel->request = build(duel->client);
}

static void duel_fini(struct duel *duel)
{
	opd_request_destroy(duel->request);
	opd_close(duel->client);
	(void)close(duel->fd);
	floor_memory_free(duel->request_bytes, duel->shape.request_bytes);
	floor_memory_free(duel->reply_bytes, duel->shape.reply_bytes);
}

static void floor_block(struct duel *duel, unsigned calls, struct histogram *histogram)
{
	memset(histogram, 0, sizeof *histogram);
	for (unsigned i = 0; i < calls; i++) {
		uint64_t begin = clock_ns();
		floor_exchange(duel->fd, &duel->shape, duel->request_bytes, duel->reply_bytes);
		histogram_add(histogram, clock_ns() - begin);
	}
}

static void opd_block(struct duel *duel, unsigned calls, struct histogram *histogram)
{
	memset(histogram, 0, sizeof *histogram);
	for (unsigned i = 0; i < calls; i++) {
		uint64_t begin = clock_ns();
		call_run(duel->client, duel->request);
		histogram_add(histogram, clock_ns() - begin);
	}
}

/* Microseconds by quantile and round. */
struct figures {
	double floor[QUANTILES][ROUNDS_MAX];
	double opd[QUANTILES][ROUNDS_MAX];
	double kernel[ROUNDS_MAX];
	double ratio[QUANTILES][ROUNDS_MAX];
};

static void duel_round(struct duel *duel, unsigned calls, unsigned round, struct figures *figures)
{
	static struct histogram floor, opd;
	floor_block(duel, calls, &floor);
	opd_block(duel, calls, &opd);
	figures->kernel[round] = call_kernel_ns(duel->client, duel->request, 100) / 1e3;
	for (int q = 0; q < QUANTILES; q++) {
		figures->floor[q][round] = (double)histogram_quantile(&floor, quantiles[q]) / 1e3;
		figures->opd[q][round] = (double)histogram_quantile(&opd, quantiles[q]) / 1e3;
		figures->ratio[q][round] = (figures->opd[q][round] - figures->kernel[round]) / figures->floor[q][round];
	}
}

static void figures_print(struct figures *figures, unsigned rounds, const char *title, report_bound bound, double limit)
{
	for (int q = 0; q < QUANTILES; q++) {
		char what[128], note[64];
		(void)snprintf(what, sizeof what, "%s, %s", title, quantile_names[q]);
		(void)snprintf(note, sizeof note, "ratios %.2f to %.2f", report_quantile(figures->ratio[q], rounds, 0.1),
		               report_quantile(figures->ratio[q], rounds, 0.9));
		report_row(&(struct report_row){
		    .what = what,
		    .unit = "us",
		    .floor = report_median(figures->floor[q], rounds),
		    .value = report_median(figures->opd[q], rounds),
		    .kernel = report_median(figures->kernel, rounds),
		    .ratio = report_median(figures->ratio[q], rounds),
		    .bound = q == 0 ? bound : REPORT_NO_TARGET,
		    .limit = limit,
		    .note = note,
		});
	}
}

static void latency_run(struct bench *bench, const struct daemon *daemon, const struct placement *placement, bool tcp,
                        call_build_fn build, const char *name, bool target)
{
	unsigned rounds = bench->quick ? 5 : ROUNDS_MAX, calls = bench->quick ? 500 : 2000;
	static struct figures figures;
	static struct histogram warm;
	struct duel duel;
	char title[96];
	duel_init(&duel, bench, daemon, tcp, build);
	placement_apply(placement, bench, daemon);
	floor_block(&duel, calls / 4, &warm);
	opd_block(&duel, calls / 4, &warm);
	for (unsigned round = 0; round < rounds; round++)
		duel_round(&duel, calls, round, &figures);
	(void)snprintf(title, sizeof title, "%s, %s, %s", name, tcp ? "TCP" : "Unix", placement->name);
	figures_print(&figures, rounds, title, target ? REPORT_RATIO_MAX : REPORT_NO_TARGET, 1.25);
	if (placement == &placement_same)
		report_note("    (%llu bytes to the server, %llu back)", (unsigned long long)duel.shape.request_bytes,
		            (unsigned long long)duel.shape.reply_bytes);
	duel_fini(&duel);
}

void bench_latency(struct bench *bench)
{
	struct daemon daemon;
	daemon_start(&daemon, bench->binary, bench->directory, NULL);
	report_section("One op at a time, against a libuv echo of the same bytes; the ratio is without the kernel's time");
	latency_run(bench, &daemon, &placement_same, false, call_norm, "rms_norm 1x4096 f32", true);
	latency_run(bench, &daemon, &placement_same, true, call_norm, "rms_norm 1x4096 f32", true);
	latency_run(bench, &daemon, &placement_two, false, call_norm, "rms_norm 1x4096 f32", false);
	latency_run(bench, &daemon, &placement_two, true, call_norm, "rms_norm 1x4096 f32", false);
	latency_run(bench, &daemon, &placement_same, false, call_tiny, "relu 16 f32", false);
	daemon_stop(&daemon);
}
