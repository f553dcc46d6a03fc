/* What the daemon adds to a large product on tensors that stay in the session, against the same call in one process. */
#include <stdio.h>
#include <stdlib.h>

#include "tests/bench/bench.h"
#include "tests/lib/clock.h"
#include "tests/lib/pin.h"
#ifdef BENCH_EMBEDDED
#include "opd/embedded.h"

#define ROWS 512
#define SIZE 4096
#define ROUNDS 41 /* of a sixth of a second each: whatever else runs on the core takes some of most of them */

static opd_handle keep_values(opd_client *client, int64_t rows)
{
	size_t elements = (size_t)rows * SIZE;
	float *data = malloc(elements * sizeof *data);
	if (data == NULL)
		bench_fail("out of memory");
	for (size_t i = 0; i < elements; i++)
		data[i] = (float)(i % 13) / 16;
	opd_request *request = opd_request_create("relu");
	if (request == NULL)
		bench_fail("out of memory");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, data, rows, SIZE));
	opd_request_output(request, 0, true, false);
	opd_result *result;
	opd_error error;
	if (opd_run(client, request, &result, &error) != OPD_OK)
		bench_fail("keeping a matrix failed: %s", error.text);
	opd_handle handle = opd_result_handle(result, 0);
	opd_result_destroy(result);
	opd_request_destroy(request);
	free(data);
	return handle;
}

/* linear of kept 512x4096 by kept 4096x4096; its result is kept, too. */
static opd_request *product_request(opd_client *client)
{
	opd_request *request = opd_request_create("linear");
	if (request == NULL)
		bench_fail("out of memory");
	opd_operand x = {.struct_bytes = sizeof x, .source = OPD_FROM_HANDLE, .handle = keep_values(client, ROWS)};
	opd_operand weight = {.struct_bytes = sizeof weight, .source = OPD_FROM_HANDLE, .handle = keep_values(client, SIZE)};
	opd_request_tensor(request, NULL, &x);
	opd_request_tensor(request, NULL, &weight);
	opd_request_output(request, 0, true, false);
	return request;
}

/* Milliseconds of a call, from the request to the handle of its result. */
static double product_ms(opd_client *client, const opd_request *request)
{
	opd_result *result;
	opd_error error;
	uint64_t begin = clock_ns();
	if (opd_run(client, request, &result, &error) != OPD_OK)
		bench_fail("a product failed: %s", error.text);
	double ms = (double)(clock_ns() - begin) / 1e6;
	opd_handle handle = opd_result_handle(result, 0);
	opd_result_destroy(result);
	if (opd_free(client, &handle, 1, &error) != OPD_OK)
		bench_fail("%s", error.text);
	return ms;
}

void bench_product(struct bench *bench)
{
	struct daemon daemon;
	double floor[ROUNDS], value[ROUNDS], ratio[ROUNDS];
	unsigned rounds = bench->quick ? 11 : ROUNDS;
	char note[128];
	opd_error error;
	daemon_start(&daemon, bench->binary, bench->directory, NULL);
	report_section("A product of kept tensors, result kept: floor is the same call in one process (embedded, direct)");
	placement_apply(&placement_same, bench, &daemon);
	opd_embedded_register();
	opd_client *inside = call_connect("embedded:"), *outside = call_connect(daemon.unix_address);
	if (opd_direct_begin(inside, &error) != OPD_OK)
		bench_fail("%s", error.text);
	opd_request *direct = product_request(inside), *request = product_request(outside);
	(void)product_ms(inside, direct);
	(void)product_ms(outside, request);
	for (unsigned i = 0; i < rounds; i++) {
		if (i % 2 == 0)
			floor[i] = product_ms(inside, direct);
		value[i] = product_ms(outside, request);
		if (i % 2 == 1)
			floor[i] = product_ms(inside, direct);
		ratio[i] = value[i] / floor[i];
	}
	(void)snprintf(note, sizeof note, "%.3f to %.3f over the rounds; least over least %.3f", report_quantile(ratio, rounds, 0.1),
	               report_quantile(ratio, rounds, 0.9), report_quantile(value, rounds, 0) / report_quantile(floor, rounds, 0));
	report_row(&(struct report_row){.what = "linear 512x4096 by 4096x4096 f32, Unix, one core",
	                                .unit = "ms",
	                                .floor = report_median(floor, rounds),
	                                .value = report_median(value, rounds),
	                                .kernel = REPORT_NONE,
	                                .ratio = report_median(ratio, rounds),
	                                .bound = REPORT_RATIO_MAX,
	                                .limit = 1.02,
	                                .note = note});
	opd_request_destroy(direct);
	opd_request_destroy(request);
	opd_direct_end(inside);
	opd_close(inside);
	opd_close(outside);
	daemon_stop(&daemon);
}

#else

void bench_product(struct bench *bench)
{
	(void)bench;
	report_note("product: skipped, this build has no embedded daemon to compare with");
}

#endif
