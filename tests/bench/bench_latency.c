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

/* A call as opd makes it and as the peers do. */
struct latency_case {
	const char *name;
	call_build_fn build;
	const char *peer_op; /* NULL: the peers have nothing of the kind, and the floor echoes ECHO_BYTES */
	size_t elements;
};
static const struct latency_case norm_case = {"rms_norm 1x4096 f32", call_norm, "rms_norm", 4096};
static const struct latency_case tiny_case = {"relu 16 f32", call_tiny, "relu", 16};
static const struct latency_case resident_case = {"the norm, resident, result kept; echo of 64 B", call_resident, NULL, 0};
static const struct latency_case shared_case = {"the norm in shared ranges; echo of 64 B", NULL, NULL, 0};

#define ECHO_BYTES 64u
#define KEPT_MAX 256u /* results that are let go together, outside of what is timed */

/* All ends of one transport, ready to be called. */
struct duel {
	const struct latency_case *what;
	struct peer *peers; /* PEERS */
	struct floor_shape shape;
	int fd;
	void *request_bytes;
	void *reply_bytes;
	opd_client *client;
	opd_request *request;
	opd_memory *memory; /* of shared ranges; NULL: none */
	opd_handle kept[KEPT_MAX];
	uint32_t kept_count;
};

/* opd's end: what->build's request, or the one in shared ranges. */
static void duel_connect(struct duel *duel, const struct daemon *daemon, bool tcp)
{
	const char *address = tcp ? daemon->tcp_address : daemon->unix_address;
	const bool shared = duel->what->build == NULL;
	duel->client = shared ? call_connect_shared(address) : call_connect(address);
	duel->request = shared ? call_shared(duel->client, &duel->memory) : duel->what->build(duel->client);
}

static void duel_init(struct duel *duel, struct bench *bench, const struct daemon *daemon, bool tcp,
                      const struct latency_case *what)
{
	*duel = (struct duel){.what = what, .peers = bench->peers, .shape = {ECHO_BYTES, ECHO_BYTES, 1}};
	for (int i = 0; what->peer_op != NULL && i < PEERS; i++)
		peer_connect(&duel->peers[i], tcp);
	if (what->peer_op != NULL)
		duel->shape = call_shape(daemon, what->build, 1);
	duel->fd = floor_connect(&bench->floor, tcp, &duel->shape);
	duel->request_bytes = floor_memory(duel->shape.request_bytes);
	duel->reply_bytes = floor_memory(duel->shape.reply_bytes);
	duel_connect(duel, daemon, tcp);
}

static void duel_fini(struct duel *duel)
{
	for (int i = 0; duel->what->peer_op != NULL && i < PEERS; i++)
		peer_close(&duel->peers[i]);
	opd_request_destroy(duel->request);
	opd_memory_destroy(duel->memory);
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

static void let_go(struct duel *duel)
{
	opd_error error;
	if (opd_free(duel->client, duel->kept, duel->kept_count, &error) != OPD_OK)
		bench_fail("free: %s", error.text);
	duel->kept_count = 0;
}

static uint64_t timed_call(struct duel *duel)
{
	opd_result *result;
	opd_error error;
	uint64_t begin = clock_ns();
	if (opd_run(duel->client, duel->request, &result, &error) != OPD_OK)
		bench_fail("a call failed: %s", error.text);
	const opd_handle handle = opd_result_handle(result, 0);
	opd_result_destroy(result);
	uint64_t ns = clock_ns() - begin;
	if (handle.generation != 0)
		duel->kept[duel->kept_count++] = handle;
	if (duel->kept_count == KEPT_MAX)
		let_go(duel);
	return ns;
}

static void opd_block(struct duel *duel, unsigned calls, struct histogram *histogram)
{
	memset(histogram, 0, sizeof *histogram);
	for (unsigned i = 0; i < calls; i++)
		histogram_add(histogram, timed_call(duel));
}

/* Microseconds by quantile and round. */
struct figures {
	double floor[QUANTILES][ROUNDS_MAX];
	double opd[QUANTILES][ROUNDS_MAX];
	double kernel[ROUNDS_MAX];
	double ratio[QUANTILES][ROUNDS_MAX];
	struct peer_series peers[PEERS][QUANTILES];
};

/* After the round's floor and opd. */
static void peer_round(struct duel *duel, unsigned calls, unsigned round, int peer, struct figures *figures)
{
	struct peer_block block = peer_block(&duel->peers[peer], duel->what->peer_op, duel->what->elements, calls, 1, false);
	struct peer_block timed = peer_block(&duel->peers[peer], duel->what->peer_op, duel->what->elements, 100, 1, true);
	double kernel = (double)timed.kernel_ns / (double)timed.calls / 1e3;
	for (int q = 0; q < QUANTILES; q++)
		peer_series_add(&figures->peers[peer][q], (double)block.quantile_ns[q] / 1e3, kernel, figures->floor[q][round],
		                figures->opd[q][round] - figures->kernel[round]);
}

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
	for (int i = 0; duel->what->peer_op != NULL && i < PEERS; i++)
		peer_round(duel, calls, round, i, figures);
}

static void figures_print(struct figures *figures, const struct duel *duel, unsigned rounds, const char *title,
                          report_bound bound)
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
		    .limit = 1.25,
		    .note = note,
		});
		for (int i = 0; duel->what->peer_op != NULL && i < PEERS; i++)
			peer_series_print(&figures->peers[i][q], &duel->peers[i], "us", true);
	}
}

static void latency_run(struct bench *bench, const struct daemon *daemon, const struct placement *placement, bool tcp,
                        const struct latency_case *what, bool target)
{
	unsigned rounds = bench->quick ? 5 : ROUNDS_MAX, calls = bench->quick ? 500 : 2000;
	static struct figures figures;
	static struct histogram warm;
	struct duel duel;
	char title[96];
	memset(&figures, 0, sizeof figures);
	duel_init(&duel, bench, daemon, tcp, what);
	placement_apply(placement, bench, daemon);
	floor_block(&duel, calls / 4, &warm);
	opd_block(&duel, calls / 4, &warm);
	for (int i = 0; what->peer_op != NULL && i < PEERS; i++)
		(void)peer_block(&duel.peers[i], what->peer_op, what->elements, calls / 4, 1, false);
	for (unsigned round = 0; round < rounds; round++)
		duel_round(&duel, calls, round, &figures);
	(void)snprintf(title, sizeof title, "%s, %s, %s", what->name, tcp ? "TCP" : "Unix", placement->name);
	figures_print(&figures, &duel, rounds, title, target ? REPORT_RATIO_MAX : REPORT_NO_TARGET);
	if (placement == &placement_same && what->peer_op != NULL)
		report_note("    (%llu bytes to the server, %llu back)", (unsigned long long)duel.shape.request_bytes,
		            (unsigned long long)duel.shape.reply_bytes);
	duel_fini(&duel);
}

void bench_latency(struct bench *bench)
{
	struct daemon daemon;
	daemon_start(&daemon, bench->binary, bench->directory, NULL);
	report_section("One op at a time, against a libuv echo of the same bytes; the ratio is without the kernel's time");
	latency_run(bench, &daemon, &placement_same, false, &norm_case, true);
	latency_run(bench, &daemon, &placement_same, true, &norm_case, true);
	latency_run(bench, &daemon, &placement_two, false, &norm_case, false);
	latency_run(bench, &daemon, &placement_two, true, &norm_case, false);
	latency_run(bench, &daemon, &placement_same, false, &tiny_case, false);
	latency_run(bench, &daemon, &placement_same, false, &resident_case, true);
	latency_run(bench, &daemon, &placement_same, false, &shared_case, true);
	daemon_stop(&daemon);
}
