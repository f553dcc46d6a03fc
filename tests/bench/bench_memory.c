/* What shared ranges save: the same call with its tensors on the socket and in memory that both sides map, in turn. */
#include <stdio.h>
#include <string.h>

#include "tests/bench/bench.h"
#include "tests/lib/clock.h"
#include "tests/lib/histogram.h"

#define ROUNDS 9

struct pair {
	opd_client *client;
	opd_memory *memory;
	opd_request *socket;
	opd_request *shared;
};

static opd_request *relu_create(const opd_operand *x)
{
	opd_request *request = opd_request_create("relu");
	if (request == NULL)
		bench_fail("out of memory");
	opd_request_tensor(request, NULL, x);
	return request;
}

static void pair_init(struct pair *pair, const struct daemon *daemon, const int64_t *elements)
{
	const opd_connect_options options = {.struct_bytes = sizeof options, .shared_memory = true};
	const uint64_t bytes = (uint64_t)*elements * sizeof(float);
	opd_error error;
	if (opd_connect(daemon->unix_address, &options, &pair->client, &error) != OPD_OK ||
	    opd_memory_create(pair->client, 2 * bytes, &pair->memory, &error) != OPD_OK)
		bench_fail("shared memory: %s", error.text);
	opd_operand x = {.struct_bytes = sizeof x, .dtype = OPD_f32, .rank = 1, .shape = elements, .data = opd_memory_data(pair->memory)};
	pair->socket = relu_create(&x);
	x.source = OPD_FROM_MEMORY;
	x.memory = pair->memory;
	pair->shared = relu_create(&x);
	opd_request_output_memory(pair->shared, 0, pair->memory, (char *)opd_memory_data(pair->memory) + bytes, bytes);
}

static void pair_fini(struct pair *pair)
{
	opd_request_destroy(pair->socket);
	opd_request_destroy(pair->shared);
	opd_memory_destroy(pair->memory);
	opd_close(pair->client);
}

static double block_us(const struct pair *pair, const opd_request *request, unsigned calls)
{
	struct histogram histogram = {0};
	for (unsigned i = 0; i < calls; i++) {
		const uint64_t begin = clock_ns();
		call_run(pair->client, request);
		histogram_add(&histogram, clock_ns() - begin);
	}
	return (double)histogram_quantile(&histogram, 0.5) / 1000;
}

static void measure(const struct bench *bench, const struct daemon *daemon, const char *what, int64_t elements, unsigned calls)
{
	struct pair pair;
	double over_socket[ROUNDS], shared[ROUNDS];
	pair_init(&pair, daemon, &elements);
	const unsigned count = bench->quick ? calls / 10 + 1 : calls;
	(void)block_us(&pair, pair.shared, count);
	for (int i = 0; i < ROUNDS; i++) {
		over_socket[i] = block_us(&pair, pair.socket, count);
		shared[i] = block_us(&pair, pair.shared, count);
	}
	const double kernel = call_kernel_ns(pair.client, pair.shared, 101) / 1000;
	const double before = report_median(over_socket, ROUNDS), after = report_median(shared, ROUNDS);
	report_row(&(struct report_row){
	    .what = what, .unit = "us", .floor = before, .value = after, .kernel = kernel, .ratio = before > 0 ? after / before : REPORT_NONE, .note = "ratio with the kernel"});
	pair_fini(&pair);
}

void bench_memory(struct bench *bench)
{
	static const struct {
		const struct placement *placement;
		const char *tiny, *small, *large;
	} cases[] = {{&placement_same, "relu 16 f32, one core", "16 KiB, one core", "4 MiB, one core"}, {&placement_two, "relu 16 f32, two cores", "16 KiB, two cores", "4 MiB, two cores"}};
	struct daemon daemon;
	daemon_start(&daemon, bench->binary, bench->directory, NULL);
	report_section("Shared ranges: p50 of a call; the floor is the same call with its tensors on the Unix socket");
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
		placement_apply(cases[i].placement, bench, &daemon);
		measure(bench, &daemon, cases[i].tiny, 16, 20000);
		measure(bench, &daemon, cases[i].small, 4096, 20000);
		measure(bench, &daemon, cases[i].large, 1 << 20, 200);
	}
	daemon_stop(&daemon);
}
