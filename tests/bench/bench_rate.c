/* How many small ops a second get through with many in flight, against a libuv echo that coalesces its replies; and whether
 * several clients together get as much as one, in equal shares. */
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

#include "tests/bench/bench.h"
#include "tests/lib/clock.h"

#define IN_FLIGHT 64
#define CLIENTS 8
#define ROUNDS_MAX 9

static void rate_submit(opd_client *client, const opd_request *request)
{
	opd_ticket ticket;
	opd_error error;
	if (opd_submit(client, request, &ticket, &error) != OPD_OK)
		bench_fail("submit: %s", error.text);
}

/* Waits for one, which must be a success. */
static void rate_take(opd_client *client)
{
	opd_ticket ticket;
	opd_result *result;
	opd_error error;
	if (opd_wait_any(client, UINT64_MAX, &ticket, &result, &error) != OPD_OK)
		bench_fail("wait: %s", error.text);
	opd_result_destroy(result);
}

/* `total` calls with `window` in flight, as a plain program does it: take one, submit one. Returns nanoseconds. */
static uint64_t rate_pipeline(opd_client *client, const opd_request *request, uint64_t total, uint64_t window)
{
	uint64_t submitted = 0, begin = clock_ns();
	for (uint64_t taken = 0; taken < total; taken++) {
		for (; submitted < total && submitted - taken < window; submitted++)
			rate_submit(client, request);
		rate_take(client);
	}
	return clock_ns() - begin;
}

/* ---- One client ---- */

static double per_second(uint64_t count, uint64_t ns)
{
	return (double)count * 1e9 / (double)ns;
}

/* A call as opd makes it and as the peers do. */
struct rate_case {
	const char *name;
	call_build_fn build;
	const char *peer_op;
	size_t elements;
};
static const struct rate_case norm_case = {"rms_norm 1x4096 f32", call_norm, "rms_norm", 4096};
static const struct rate_case tiny_case = {"relu 16 f32 (64 bytes)", call_tiny, "relu", 16};

struct rates {
	double floor[ROUNDS_MAX];
	double opd[ROUNDS_MAX];
	double ratio[ROUNDS_MAX];
	struct peer_series peers[PEERS];
};

/* After the round's floor and opd. */
static void rate_peers(struct bench *bench, const struct rate_case *what, uint64_t calls, unsigned round, struct rates *rates)
{
	for (int i = 0; i < PEERS; i++) {
		struct peer_block block = peer_block(&bench->peers[i], what->peer_op, what->elements, calls, IN_FLIGHT, false);
		if (block.total_ns != 0)
			peer_series_add(&rates->peers[i], per_second(block.calls, block.total_ns), 0, rates->floor[round], rates->opd[round]);
	}
}

static void rates_print(struct rates *rates, unsigned rounds, const char *what, report_bound bound, double limit)
{
	char note[64];
	(void)snprintf(note, sizeof note, "ratios %.2f to %.2f", report_quantile(rates->ratio, rounds, 0.1),
	               report_quantile(rates->ratio, rounds, 0.9));
	report_row(&(struct report_row){.what = what,
	                                .unit = "ops/s",
	                                .floor = report_median(rates->floor, rounds),
	                                .value = report_median(rates->opd, rounds),
	                                .kernel = REPORT_NONE,
	                                .ratio = report_median(rates->ratio, rounds),
	                                .bound = bound,
	                                .limit = limit,
	                                .note = note});
}

static void rate_single(struct bench *bench, const struct daemon *daemon, const struct placement *placement, bool tcp,
                        const struct rate_case *what, uint64_t total, double limit)
{
	unsigned rounds = bench->quick ? 3 : ROUNDS_MAX;
	uint64_t calls = bench->quick ? total / 4 : total;
	struct floor_shape shape = call_shape(daemon, what->build, IN_FLIGHT);
	int fd = floor_connect(&bench->floor, tcp, &shape);
	void *memory = floor_memory(floor_pipeline_bytes(&shape));
	opd_client *client = call_connect(tcp ? daemon->tcp_address : daemon->unix_address);
	opd_request *request = what->build(client);
	struct rates rates = {0};
	char title[96];
	for (int i = 0; i < PEERS; i++)
		peer_connect(&bench->peers[i], tcp);
	placement_apply(placement, bench, daemon);
	(void)floor_pipeline(fd, &shape, calls / 8, memory);
	(void)rate_pipeline(client, request, calls / 8, IN_FLIGHT);
	for (int i = 0; i < PEERS; i++)
		(void)peer_block(&bench->peers[i], what->peer_op, what->elements, calls / 8, IN_FLIGHT, false);
	for (unsigned i = 0; i < rounds; i++) {
		rates.floor[i] = per_second(calls, floor_pipeline(fd, &shape, calls, memory));
		rates.opd[i] = per_second(calls, rate_pipeline(client, request, calls, IN_FLIGHT));
		rates.ratio[i] = rates.opd[i] / rates.floor[i];
		rate_peers(bench, what, calls, i, &rates);
	}
	(void)snprintf(title, sizeof title, "%s, %s, %s", what->name, tcp ? "TCP" : "Unix", placement->name);
	rates_print(&rates, rounds, title, limit > 0 ? REPORT_VALUE_MIN : REPORT_NO_TARGET, limit);
	for (int i = 0; i < PEERS; i++) {
		peer_series_print(&rates.peers[i], &bench->peers[i], "ops/s", false);
		peer_close(&bench->peers[i]);
	}
	opd_request_destroy(request);
	opd_close(client);
	(void)close(fd);
	floor_memory_free(memory, floor_pipeline_bytes(&shape));
}

/* ---- Eight clients ---- */

/* One of several clients, on a thread of its own. All start at a barrier and run for the same time, since equal shares show in
 * what each got done. */
struct worker {
	pthread_t thread;
	pthread_barrier_t *barrier;
	const char *address;
	call_build_fn build;
	uint64_t window;
	uint64_t duration_ns;
	uint64_t taken;
	uint64_t ns;
};

static void *worker_main(void *argument)
{
	struct worker *worker = argument;
	opd_client *client = call_connect(worker->address);
	opd_request *request = worker->build(client);
	(void)pthread_barrier_wait(worker->barrier);
	uint64_t begin = clock_ns();
	for (uint64_t i = 0; i < worker->window; i++)
		rate_submit(client, request);
	do {
		rate_take(client);
		rate_submit(client, request);
		worker->taken++;
		worker->ns = clock_ns() - begin;
	} while (worker->ns < worker->duration_ns);
	(void)pthread_barrier_wait(worker->barrier); /* nobody has an easier end than the others */
	opd_request_destroy(request);
	opd_close(client);
	return NULL;
}

/* Ops a second of `count` clients with IN_FLIGHT in all; *uneven_out: how far the extremes lie from their mean. */
static double rate_shared(const struct bench *bench, const struct daemon *daemon, call_build_fn build, unsigned count,
                          double *uneven_out)
{
	struct worker workers[CLIENTS] = {0};
	pthread_barrier_t barrier;
	(void)pthread_barrier_init(&barrier, NULL, count);
	for (unsigned i = 0; i < count; i++) {
		workers[i] = (struct worker){.barrier = &barrier,
		                             .address = daemon->unix_address,
		                             .build = build,
		                             .window = IN_FLIGHT / count,
		                             .duration_ns = bench->quick ? 200000000u : 500000000u};
		if (pthread_create(&workers[i].thread, NULL, worker_main, &workers[i]) != 0)
			bench_fail("can't start a thread");
	}
	double sum = 0, low = 1e300, high = 0;
	for (unsigned i = 0; i < count; i++) {
		(void)pthread_join(workers[i].thread, NULL);
		double rate = per_second(workers[i].taken, workers[i].ns);
		sum += rate;
		low = rate < low ? rate : low;
		high = rate > high ? rate : high;
	}
	(void)pthread_barrier_destroy(&barrier);
	double mean = sum / count;
	*uneven_out = (high - mean > mean - low ? high - mean : mean - low) / mean;
	return sum;
}

/* One of the echo's clients. */
struct echo {
	pthread_t thread;
	pthread_barrier_t *barrier;
	const struct floor_shape *shape;
	uint64_t calls;
	int fd;
	void *memory;
};

static void *echo_main(void *argument)
{
	struct echo *echo = argument;
	(void)pthread_barrier_wait(echo->barrier);
	(void)floor_pipeline(echo->fd, echo->shape, echo->calls, echo->memory);
	return NULL;
}

/* The same of the echo: what many clients cost without any work. Each makes as many calls, so that the last one's end counts. */
static double echo_shared(const struct bench *bench, struct floor_shape shape, unsigned count, uint64_t calls)
{
	struct echo echoes[CLIENTS];
	pthread_barrier_t barrier;
	shape.window = IN_FLIGHT / count;
	(void)pthread_barrier_init(&barrier, NULL, count + 1);
	for (unsigned i = 0; i < count; i++) {
		echoes[i] = (struct echo){.barrier = &barrier, .shape = &shape, .calls = calls / count, .fd = floor_connect(&bench->floor, false, &shape)};
		echoes[i].memory = floor_memory(floor_pipeline_bytes(&shape));
		if (pthread_create(&echoes[i].thread, NULL, echo_main, &echoes[i]) != 0)
			bench_fail("can't start a thread");
	}
	(void)pthread_barrier_wait(&barrier);
	const uint64_t begin = clock_ns();
	for (unsigned i = 0; i < count; i++)
		(void)pthread_join(echoes[i].thread, NULL);
	const uint64_t ns = clock_ns() - begin;
	for (unsigned i = 0; i < count; i++) {
		(void)close(echoes[i].fd);
		floor_memory_free(echoes[i].memory, floor_pipeline_bytes(&shape));
	}
	(void)pthread_barrier_destroy(&barrier);
	return per_second(calls, ns);
}

static void rate_clients(struct bench *bench, const struct daemon *daemon, const struct placement *placement, call_build_fn build,
                         const char *name, uint64_t echo_calls)
{
	unsigned rounds = bench->quick ? 3 : 5;
	struct rates rates;
	double uneven[ROUNDS_MAX], echo_one[ROUNDS_MAX], echo_all[ROUNDS_MAX], echo_ratio[ROUNDS_MAX], of_echo[ROUNDS_MAX], alone;
	char what[96], note[96];
	const struct floor_shape shape = call_shape(daemon, build, IN_FLIGHT);
	placement_apply(placement, bench, daemon);
	for (unsigned i = 0; i < rounds; i++) {
		echo_one[i] = echo_shared(bench, shape, 1, echo_calls);
		echo_all[i] = echo_shared(bench, shape, CLIENTS, echo_calls);
		echo_ratio[i] = echo_all[i] / echo_one[i];
		rates.floor[i] = rate_shared(bench, daemon, build, 1, &alone);
		rates.opd[i] = rate_shared(bench, daemon, build, CLIENTS, &uneven[i]);
		rates.ratio[i] = rates.opd[i] / rates.floor[i];
		of_echo[i] = rates.ratio[i] / echo_ratio[i];
	}
	(void)snprintf(what, sizeof what, "echo of the same bytes, Unix, %s, 8 clients (floor: 1)", placement->name);
	report_row(&(struct report_row){.what = what,
	                                .unit = "ops/s",
	                                .floor = report_median(echo_one, rounds),
	                                .value = report_median(echo_all, rounds),
	                                .kernel = REPORT_NONE,
	                                .ratio = report_median(echo_ratio, rounds),
	                                .bound = REPORT_NO_TARGET,
	                                .note = "what many clients cost without any work"});
	(void)snprintf(what, sizeof what, "%s, Unix, %s, 8 clients (floor: 1)", name, placement->name);
	(void)snprintf(note, sizeof note, "%.2f of the echo's ratio; a client at most %.1f %% off the mean (target 10)", report_median(of_echo, rounds),
	               100 * report_median(uneven, rounds));
	report_row(&(struct report_row){.what = what,
	                                .unit = "ops/s",
	                                .floor = report_median(rates.floor, rounds),
	                                .value = report_median(rates.opd, rounds),
	                                .kernel = REPORT_NONE,
	                                .ratio = report_median(rates.ratio, rounds),
	                                .bound = REPORT_RATIO_MIN,
	                                .limit = 1.0,
	                                .note = note});
}

void bench_rate(struct bench *bench)
{
	struct daemon daemon;
	daemon_start(&daemon, bench->binary, bench->directory, NULL);
	report_section("64 in flight, against a libuv echo of the same bytes that coalesces; the kernel is counted in");
	rate_single(bench, &daemon, &placement_two, false, &norm_case, 40000, 133000);
	rate_single(bench, &daemon, &placement_two, true, &norm_case, 40000, 73000);
	rate_single(bench, &daemon, &placement_same, false, &norm_case, 20000, 0);
	rate_single(bench, &daemon, &placement_two, false, &tiny_case, 200000, 600000);
	rate_single(bench, &daemon, &placement_two, true, &tiny_case, 200000, 0);
	rate_single(bench, &daemon, &placement_same, false, &tiny_case, 100000, 0);
	rate_clients(bench, &daemon, &placement_two, call_norm, "rms_norm 1x4096 f32", 20000);
	rate_clients(bench, &daemon, &placement_two, call_tiny, "relu 16 f32 (64 bytes)", 100000);
	daemon_stop(&daemon);
}

/* ---- I/O loops ---- */

/* 8 clients against one of the same daemon's, in turns. */
static void rate_loops(const struct bench *bench, const struct daemon *daemon, const char *loops, call_build_fn build, const char *name)
{
	const unsigned rounds = bench->quick ? 3 : 5;
	struct rates rates;
	double uneven[ROUNDS_MAX], alone;
	char what[96], note[96];
	for (unsigned i = 0; i < rounds; i++) {
		rates.floor[i] = rate_shared(bench, daemon, build, 1, &alone);
		rates.opd[i] = rate_shared(bench, daemon, build, CLIENTS, &uneven[i]);
		rates.ratio[i] = rates.opd[i] / rates.floor[i];
	}
	(void)snprintf(what, sizeof what, "%s, Unix, 8 clients, %s", name, loops);
	(void)snprintf(note, sizeof note, "a client at most %.1f %% off the mean (target 10)", 100 * report_median(uneven, rounds));
	report_row(&(struct report_row){.what = what,
	                                .unit = "ops/s",
	                                .floor = report_median(rates.floor, rounds),
	                                .value = report_median(rates.opd, rounds),
	                                .kernel = REPORT_NONE,
	                                .ratio = report_median(rates.ratio, rounds),
	                                .bound = REPORT_RATIO_MIN,
	                                .limit = 1.0,
	                                .note = note});
}

void bench_loops(struct bench *bench)
{
	static const struct {
		const char *name, *flag;
	} all[] = {{"1 loop", "1"}, {"2 loops", "2"}, {"loops by the machine", "0"}};
	report_section("64 in flight of 8 clients, nobody pinned; floor: of one client of the same daemon");
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
		struct daemon daemon;
		daemon_start_with(&daemon, bench->binary, bench->directory, NULL, (const char *const[]){"--loops", all[i].flag, NULL});
		rate_loops(bench, &daemon, all[i].name, call_norm, "rms_norm 1x4096 f32");
		rate_loops(bench, &daemon, all[i].name, call_tiny, "relu 16 f32 (64 bytes)");
		daemon_stop(&daemon);
	}
}
