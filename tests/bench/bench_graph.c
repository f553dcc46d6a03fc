/* What a node of a registered graph costs beyond its kernel: 1,000 small nodes in one run. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/bench.h"
#include "tests/lib/clock.h"
#include "tests/lib/pin.h"
#ifdef BENCH_EMBEDDED
#include "opd/embedded.h"
#endif

#define NODES 1000
#define ELEMENTS 16
#define ROUNDS 15

/* relu after relu of 16 floats. */
static opd_request *graph_request(opd_client *client, unsigned nodes)
{
	static const float x[ELEMENTS] = {1, -1, 2, -2};
	opd_graph *graph = opd_graph_create("chain");
	opd_error error;
	uint64_t id;
	if (graph == NULL)
		bench_fail("out of memory");
	opd_value value = opd_graph_input(graph, "x");
	for (unsigned i = 0; i < nodes; i++) {
		opd_request *node = opd_request_create("relu");
		if (node == NULL)
			bench_fail("out of memory");
		opd_request_value(node, NULL, value);
		value = opd_graph_node(graph, NULL, node);
		opd_request_destroy(node);
	}
	opd_graph_output(graph, "y", value);
	if (opd_graph_register(client, graph, &id, &error) != OPD_OK)
		bench_fail("%s", error.text);
	opd_graph_destroy(graph);
	opd_request *request = opd_request_graph(id);
	if (request == NULL)
		bench_fail("out of memory");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, x, ELEMENTS));
	return request;
}

/* Mean nanoseconds of a call. */
static double block(opd_client *client, const opd_request *request, unsigned calls)
{
	uint64_t begin = clock_ns();
	for (unsigned i = 0; i < calls; i++)
		call_run(client, request);
	return (double)(clock_ns() - begin) / calls;
}

static void print_graph(opd_client *client, const struct bench *bench, const char *where, bool direct)
{
	double run[ROUNDS], single[ROUNDS], kernel[ROUNDS];
	unsigned rounds = bench->quick ? 5 : ROUNDS, calls = bench->quick ? 100 : 500;
	opd_request *graph = graph_request(client, NODES), *one = graph_request(client, 1), *op = call_tiny(client);
	char what[96], note[96];
	(void)block(client, graph, calls);
	(void)block(client, one, calls);
	for (unsigned i = 0; i < rounds; i++) {
		run[i] = block(client, graph, calls) / 1e3;
		single[i] = block(client, one, calls) / 1e3;
		kernel[i] = call_kernel_ns(client, op, 100) / 1e3;
	}
	double each = report_median(run, rounds) / NODES, of_kernel = report_median(kernel, rounds);
	(void)snprintf(what, sizeof what, "graph of %d relu of %d f32, a node, %s", NODES, ELEMENTS, where);
	(void)snprintf(note, sizeof note, "kernel included; run %.0f us, of one node %.1f us%s", each * NODES,
	               report_median(single, rounds), direct ? ", no frames" : "");
	report_row(&(struct report_row){.what = what,
	                                .unit = "us",
	                                .floor = REPORT_NONE,
	                                .value = each,
	                                .kernel = of_kernel,
	                                .ratio = REPORT_NONE,
	                                .bound = REPORT_VALUE_MAX,
	                                .limit = 0.5,
	                                .note = note});
	opd_request_destroy(graph);
	opd_request_destroy(one);
	opd_request_destroy(op);
}

/* ---- Independent nodes ---- */

#define BRANCHES 8
#define LENGTH 12

/* BRANCHES chains of LENGTH softmax, side by side or one behind the other: the same nodes and kernels; of a chain's results the last alone is wanted. */
static opd_request *branches_request(opd_client *client, int64_t elements, bool side_by_side)
{
	static float x[1 << 16];
	opd_graph *graph = opd_graph_create("branches");
	opd_error error;
	uint64_t id;
	if (graph == NULL)
		bench_fail("out of memory");
	const opd_value input = opd_graph_input(graph, "x");
	opd_value value = input;
	for (unsigned i = 0; i < BRANCHES * LENGTH; i++) {
		opd_request *node = opd_request_create("softmax");
		if (node == NULL)
			bench_fail("out of memory");
		opd_request_value(node, NULL, side_by_side && i % LENGTH == 0 ? input : value);
		value = opd_graph_node(graph, NULL, node);
		opd_request_destroy(node);
	}
	opd_graph_output(graph, NULL, value);
	if (opd_graph_register(client, graph, &id, &error) != OPD_OK)
		bench_fail("%s", error.text);
	opd_graph_destroy(graph);
	opd_request *request = opd_request_graph(id);
	if (request == NULL)
		bench_fail("out of memory");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, x, elements));
	opd_request_output(request, 0, false, true);
	return request;
}

static void print_branches(opd_client *client, const struct bench *bench, int64_t elements)
{
	double at_once[ROUNDS], serial[ROUNDS];
	unsigned rounds = bench->quick ? 5 : ROUNDS, calls = bench->quick ? 30 : 100;
	opd_request *wide = branches_request(client, elements, true), *chain = branches_request(client, elements, false);
	char what[96];
	(void)block(client, wide, calls);
	(void)block(client, chain, calls);
	for (unsigned i = 0; i < rounds; i++) {
		at_once[i] = block(client, wide, calls) / 1e3;
		serial[i] = block(client, chain, calls) / 1e3;
	}
	(void)snprintf(what, sizeof what, "%d branches of %d softmax of %d f32; floor: the same nodes as one chain", BRANCHES, LENGTH, (int)elements);
	report_row(&(struct report_row){.what = what,
	                                .unit = "us",
	                                .floor = report_median(serial, rounds),
	                                .value = report_median(at_once, rounds),
	                                .kernel = REPORT_NONE,
	                                .ratio = report_median(at_once, rounds) / report_median(serial, rounds),
	                                .bound = REPORT_NO_TARGET});
	opd_request_destroy(wide);
	opd_request_destroy(chain);
}

static void bench_branches(struct bench *bench)
{
	static const int64_t sizes[] = {64, 256, 1024, 4096, 16384};
	struct daemon daemon;
	(void)pin_self(PIN_ANY);
	daemon_start(&daemon, bench->binary, bench->directory, NULL);
	opd_client *client = call_connect(daemon.unix_address);
	report_section("Independent nodes of a graph, on all cores: a run");
	for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
		print_branches(client, bench, sizes[i]);
	opd_close(client);
	daemon_stop(&daemon);
}

/* ---- A cache that is given and comes back ---- */

#define CACHE_HEADS 8
#define CACHE_DEPTH 64
#define CACHE_BLOCK 16
#define CACHE_BLOCK_BYTES ((uint64_t)CACHE_BLOCK * CACHE_HEADS * CACHE_DEPTH * sizeof(float))

/* Keys and values, `bytes` together. */
struct cache {
	opd_client *client;
	opd_handle halves[2];
};

static void cache_upload(struct cache *cache, uint64_t bytes)
{
	opd_error error;
	const int64_t shape[] = {(int64_t)(bytes / 2 / CACHE_BLOCK_BYTES), CACHE_BLOCK, CACHE_HEADS, CACHE_DEPTH};
	void *zeros = calloc(1, bytes / 2);
	if (zeros == NULL)
		bench_fail("out of memory");
	for (int i = 0; i < 2; i++) {
		const opd_operand operand = {.struct_bytes = sizeof operand, .dtype = OPD_f32, .rank = 4, .shape = shape, .data = zeros};
		if (opd_upload(cache->client, &operand, NULL, &cache->halves[i], &error) != OPD_OK)
			bench_fail("a cache of %llu bytes: %s", (unsigned long long)bytes, error.text);
	}
	free(zeros);
}

/* One token's keys and values into their slot, both caches donated. */
static void cache_update(struct cache *cache, int64_t slot)
{
	static const float row[CACHE_HEADS * CACHE_DEPTH];
	opd_result *result;
	opd_error error;
	opd_request *request = opd_request_create("reshape_and_cache");
	if (request == NULL)
		bench_fail("out of memory");
	for (int i = 0; i < 2; i++)
		opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, row, 1, CACHE_HEADS, CACHE_DEPTH));
	for (int i = 0; i < 2; i++)
		opd_request_tensor(request, NULL,
		                   &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = cache->halves[i], .donate = true});
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_i64, &slot, 1));
	for (uint32_t i = 0; i < 2; i++)
		opd_request_output(request, i, true, false);
	if (opd_run(cache->client, request, &result, &error) != OPD_OK)
		bench_fail("reshape_and_cache: %s", error.text);
	for (uint32_t i = 0; i < 2; i++)
		cache->halves[i] = opd_result_handle(result, i);
	opd_result_destroy(result);
	opd_request_destroy(request);
}

static double cache_block(struct cache *cache, uint64_t bytes, unsigned calls)
{
	const uint64_t slots = bytes / 2 / CACHE_BLOCK_BYTES * CACHE_BLOCK, begin = clock_ns();
	for (unsigned i = 0; i < calls; i++)
		cache_update(cache, (int64_t)(i * 7919ull % slots));
	return (double)(clock_ns() - begin) / 1e3 / calls;
}

static void bench_cache(struct bench *bench)
{
	const uint64_t small_bytes = 1ull << 20, large_bytes = bench->quick ? 1ull << 26 : 1ull << 30;
	double small[ROUNDS], large[ROUNDS];
	unsigned rounds = bench->quick ? 5 : ROUNDS, calls = bench->quick ? 100 : 500;
	struct daemon daemon;
	daemon_start(&daemon, bench->binary, bench->directory, NULL);
	placement_apply(&placement_same, bench, &daemon);
	struct cache of_small = {.client = call_connect(daemon.unix_address)}, of_large = {.client = of_small.client};
	char what[96];
	report_section("A token's keys and values written to a donated cache, Unix, one core; floor: a cache of 1 MiB");
	cache_upload(&of_small, small_bytes);
	cache_upload(&of_large, large_bytes);
	(void)cache_block(&of_small, small_bytes, calls);
	(void)cache_block(&of_large, large_bytes, calls);
	for (unsigned i = 0; i < rounds; i++) {
		small[i] = cache_block(&of_small, small_bytes, calls);
		large[i] = cache_block(&of_large, large_bytes, calls);
	}
	(void)snprintf(what, sizeof what, "reshape_and_cache of one token, a cache of %llu MiB", (unsigned long long)(large_bytes >> 20));
	const double floor = report_median(small, rounds), value = report_median(large, rounds);
	report_row(&(struct report_row){.what = what, .unit = "us", .floor = floor, .value = value, .kernel = REPORT_NONE, .ratio = value / floor,
	                                .bound = REPORT_RATIO_MAX, .limit = 1.1});
	opd_close(of_small.client);
	daemon_stop(&daemon);
}

void bench_graph(struct bench *bench)
{
	struct daemon daemon;
	daemon_start(&daemon, bench->binary, bench->directory, NULL);
	report_section("A registered graph: time of a run over its nodes; the kernel's own, with two reads of the clock, may be more "
	               "than a node's");
	opd_client *client = call_connect(daemon.unix_address);
	placement_apply(&placement_same, bench, &daemon);
	print_graph(client, bench, "Unix, one core", false);
	placement_apply(&placement_two, bench, &daemon);
	print_graph(client, bench, "Unix, two cores", false);
	opd_close(client);
	daemon_stop(&daemon);
#ifdef BENCH_EMBEDDED
	opd_error error;
	(void)pin_self(PIN_ANY);
	opd_embedded_register();
	client = call_connect("embedded:");
	print_graph(client, bench, "embedded, frames", false);
	if (opd_direct_begin(client, &error) != OPD_OK)
		bench_fail("%s", error.text);
	print_graph(client, bench, "embedded, direct", true);
	opd_direct_end(client);
	opd_close(client);
#endif
	bench_branches(bench);
	bench_cache(bench);
}
