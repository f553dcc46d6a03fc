/* bench: one op again and again, a number of requests in flight, inputs made by the daemon.
 *
 * Every 16th request asks for an explain record, under the same load as the others. The split is the mean over those: the time in
 * opd_submit (client), what the daemon says, and the rest of the round trip (wire: sockets, wake-ups, waiting to be read,
 * decoding the reply). */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/opctl/latency.h"
#include "client/opctl/print.h"
#include "client/opctl/schema.h"

enum {
	EXPLAIN_EVERY = 16,
	IN_FLIGHT_MAX = 4096,
	DIMS_MAX = 32,
};

const struct option_use bench_options[] = {
    {OPTION_SHAPE, "the op's sizes, as 32x4096 (describe names them; default: the op's)"},
    {OPTION_DTYPE, "of the float inputs (default f32)"},
    {OPTION_PROVIDER, "run on this provider alone (default: dispatch picks)"},
    {OPTION_IN_FLIGHT, "requests in flight (default 1)"},
    {OPTION_DURATION, "time to measure (default 3)"},
    {OPTION_WARMUP, "time before (default 0.5)"},
    {OPTION_VARIANT, "of the op's input generator (default 0: the typical call)"},
    {OPTION_SEED, "of the input generator (default 0)"},
    {OPTION_RESIDENT, "inputs stay in the daemon, results aren't sent back"},
    {OPTION_MODULE, "load this provider module first (administrators; it stays loaded)"},
    {OPTION_END, NULL},
};

/* The parts of a round trip, in its order; sums in ns. */
#define SPLIT_MAP(X)                                                                                                             \
	X(client)                                                                                                                    \
	X(wire)                                                                                                                      \
	X(decode)                                                                                                                    \
	X(dispatch)                                                                                                                  \
	X(moves)                                                                                                                     \
	X(queue)                                                                                                                     \
	X(kernel)                                                                                                                    \
	X(pack)

struct split {
	uint64_t samples;
#define X(part) double part;
	SPLIT_MAP(X)
#undef X
};

struct slot {
	opd_ticket ticket; /* 0: free */
	uint64_t start_ns;
	uint64_t submit_ns; /* spent in opd_submit */
};

struct bench {
	opd_client *client;
	opd_request *request;
	const char *op;
	opd_generate_options generate;
	int64_t dims[DIMS_MAX];
	int64_t in_flight;
	uint64_t duration_us;
	uint64_t warmup_us;
	char provider[BOUND_NAME_BYTES + 1]; /* that ran last */
	uint64_t sent;
	uint64_t elapsed_ns;
	bool measuring;
	struct split split;
	struct latency latency;
	struct slot slots[IN_FLIGHT_MAX];
};

static uint64_t now_ns(void)
{
	struct timespec time;
	(void)clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* ---- Options ---- */

/* "32x4096" */
static opd_status read_dims(const char *text, struct bench *bench, opd_error *error)
{
	const char *at = text;
	for (;;) {
		char word[24];
		const size_t bytes = strcspn(at, "x");
		if (bytes >= sizeof word || bench->generate.dim_count == DIMS_MAX)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "--shape is '%.80s', expected sizes such as 32x4096", text);
		memcpy(word, at, bytes);
		word[bytes] = '\0';
		const opd_status status = parse_int("--shape", word, 0, INT64_MAX, &bench->dims[bench->generate.dim_count++], error);
		if (status != OPD_OK)
			return status;
		if (at[bytes] == '\0')
			break;
		at += bytes + 1;
	}
	bench->generate.dims = bench->dims;
	return OPD_OK;
}

static opd_status read_options(const struct options *options, struct bench *bench, opd_error *error)
{
	int64_t variant, seed;
	bench->generate = (opd_generate_options){
	    .struct_bytes = sizeof bench->generate, .dtype = OPD_f32, .keep = options_has(options, OPTION_RESIDENT)};
	if (options->count != 2)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "bench has %zu arguments, expected one: the op", options->count - 1);
	bench->op = options->positional[1];
	opd_status status = options_int(options, OPTION_IN_FLIGHT, 1, IN_FLIGHT_MAX, 1, &bench->in_flight, error);
	if (status == OPD_OK)
		status = options_int(options, OPTION_VARIANT, 0, UINT32_MAX, 0, &variant, error);
	if (status == OPD_OK)
		status = options_int(options, OPTION_SEED, 0, INT64_MAX, 0, &seed, error);
	if (status == OPD_OK)
		status = options_seconds(options, OPTION_DURATION, 3000000, &bench->duration_us, error);
	if (status == OPD_OK)
		status = options_seconds(options, OPTION_WARMUP, 500000, &bench->warmup_us, error);
	if (status == OPD_OK && options_has(options, OPTION_DTYPE))
		status = parse_dtype("--dtype", options->values[OPTION_DTYPE], &bench->generate.dtype, error);
	if (status == OPD_OK && options_has(options, OPTION_SHAPE))
		status = read_dims(options->values[OPTION_SHAPE], bench, error);
	if (status == OPD_OK) {
		bench->generate.variant = (uint32_t)variant;
		bench->generate.seed = (uint64_t)seed;
	}
	return status;
}

/* Results of a resident run stay where they are and are dropped. */
static opd_status drop_results(struct bench *bench, opd_error *error)
{
	const opd_op_description *description;
	struct schema *schema = malloc(sizeof *schema);
	if (schema == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	opd_status status = opd_describe(bench->client, bench->op, &description, error);
	if (status == OPD_OK) {
		status = schema_parse(description->schema, schema, error);
		opd_document_free(description);
	}
	for (unsigned i = 0; status == OPD_OK && i < schema->results; i++)
		opd_request_output(bench->request, i, false, false);
	free(schema);
	return status;
}

static opd_status prepare(const struct opctl *ctl, struct bench *bench, opd_error *error)
{
	const char *provider = ctl->options.values[OPTION_PROVIDER];
	bench->client = ctl->client;
	opd_status status = opd_generate(bench->client, bench->op, &bench->generate, &bench->request, error);
	if (status != OPD_OK)
		return status;
	if (provider != NULL) {
		opd_request_priority(bench->request, &provider, 1);
		opd_request_strict(bench->request, true);
	}
	return bench->generate.keep ? drop_results(bench, error) : OPD_OK;
}

/* ---- The loop ---- */

static opd_status submit(struct bench *bench, struct slot *slot, opd_error *error)
{
	opd_request_explain(bench->request, bench->measuring && bench->sent++ % EXPLAIN_EVERY == 0);
	slot->start_ns = now_ns();
	const opd_status status = opd_submit(bench->client, bench->request, &slot->ticket, error);
	slot->submit_ns = now_ns() - slot->start_ns;
	return status;
}

static void add_sample(struct bench *bench, const opd_explain *explain, const struct slot *slot, uint64_t total_ns)
{
	struct split *split = &bench->split;
	const uint64_t server_ns =
	    explain->decode_ns + explain->dispatch_ns + explain->moves_ns + explain->queue_ns + explain->kernel_ns + explain->pack_ns;
	const uint64_t known_ns = server_ns + slot->submit_ns;
	split->samples++;
	split->client += (double)slot->submit_ns;
	split->decode += (double)explain->decode_ns;
	split->dispatch += (double)explain->dispatch_ns;
	split->moves += (double)explain->moves_ns;
	split->queue += (double)explain->queue_ns;
	split->kernel += (double)explain->kernel_ns;
	split->pack += (double)explain->pack_ns;
	/* opd_submit and the daemon can overlap by a little when the reply's work starts before the write returns. */
	split->wire += total_ns > known_ns ? (double)(total_ns - known_ns) : 0;
}

static struct slot *find_slot(struct bench *bench, opd_ticket ticket)
{
	for (int64_t i = 0; i < bench->in_flight; i++)
		if (bench->slots[i].ticket == ticket)
			return &bench->slots[i];
	return NULL;
}

/* Waits for one reply, notes it, and frees its slot. */
static opd_status take_one(struct bench *bench, struct slot **slot_out, opd_error *error)
{
	opd_ticket ticket;
	opd_result *result = NULL;
	const opd_status status = opd_wait_any(bench->client, UINT64_MAX, &ticket, &result, error);
	if (status == OPD_OK) {
		struct slot *slot = find_slot(bench, ticket);
		const uint64_t total_ns = now_ns() - slot->start_ns;
		const opd_explain *explain = opd_result_explain(result);
		if (bench->measuring)
			latency_add(&bench->latency, total_ns);
		if (bench->measuring && explain != NULL)
			add_sample(bench, explain, slot, total_ns);
		if (bench->provider[0] == '\0')
			(void)snprintf(bench->provider, sizeof bench->provider, "%s", opd_result_provider(result));
		slot->ticket = 0;
		*slot_out = slot;
	}
	opd_result_destroy(result);
	return status;
}

/* Keeps in_flight requests going for so long, then waits for the last ones. */
static opd_status loop(struct bench *bench, uint64_t duration_us, opd_error *error)
{
	const uint64_t start_ns = now_ns(), end_ns = start_ns + duration_us * 1000;
	opd_status status = OPD_OK;
	for (int64_t i = 0; i < bench->in_flight && status == OPD_OK; i++)
		status = submit(bench, &bench->slots[i], error);
	while (status == OPD_OK && now_ns() < end_ns) {
		struct slot *slot;
		status = take_one(bench, &slot, error);
		if (status == OPD_OK)
			status = submit(bench, slot, error);
	}
	while (status == OPD_OK && opd_in_flight(bench->client) > 0) {
		struct slot *slot;
		status = take_one(bench, &slot, error);
	}
	bench->elapsed_ns = now_ns() - start_ns;
	return status;
}

static opd_status measure(struct bench *bench, opd_error *error)
{
	opd_status status = loop(bench, bench->warmup_us, error);
	if (status != OPD_OK)
		return status;
	bench->measuring = true;
	return loop(bench, bench->duration_us, error);
}

/* ---- Printing ---- */

static double rate_of(const struct bench *bench)
{
	return (double)bench->latency.count / ((double)bench->elapsed_ns / 1e9);
}

static void print_bench(const struct bench *bench)
{
	const struct latency *latency = &bench->latency;
	const struct split *split = &bench->split;
	const double samples = split->samples == 0 ? 1 : (double)split->samples;
	(void)printf("%s on %s, %s, %" PRId64 " in flight%s\n", shown(bench->op), shown(bench->provider),
	             opd_dtype_name(bench->generate.dtype), bench->in_flight, bench->generate.keep ? ", resident" : "");
	(void)printf("requests   %" PRIu64 " in %s: %.0f a second\n", latency->count, duration_text((double)bench->elapsed_ns),
	             rate_of(bench));
	(void)printf("latency    mean %s, p50 %s, p90 %s, p99 %s, max %s\n",
	             duration_text((double)latency->sum_ns / (double)latency->count), duration_text((double)latency_at(latency, 0.5)),
	             duration_text((double)latency_at(latency, 0.9)), duration_text((double)latency_at(latency, 0.99)),
	             duration_text((double)latency->max_ns));
	(void)printf("split      ");
#define X(part) (void)printf(#part " %s, ", duration_text(split->part / samples));
	SPLIT_MAP(X)
#undef X
	(void)printf("means of %" PRIu64 " samples\n", split->samples);
}

static int print_bench_json(const struct bench *bench)
{
	const struct latency *latency = &bench->latency;
	const struct split *split = &bench->split;
	const double samples = split->samples == 0 ? 1 : (double)split->samples;
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "op", bench->op);
	cJSON_AddStringToObject(document, "provider", bench->provider);
	cJSON_AddStringToObject(document, "dtype", opd_dtype_name(bench->generate.dtype));
	cJSON *sizes = cJSON_AddArrayToObject(document, "sizes");
	for (uint32_t i = 0; i < bench->generate.dim_count; i++)
		cJSON_AddItemToArray(sizes, json_i64(bench->dims[i]));
	cJSON_AddItemToObject(document, "variant", json_u64(bench->generate.variant));
	cJSON_AddBoolToObject(document, "resident", bench->generate.keep);
	cJSON_AddItemToObject(document, "in_flight", json_i64(bench->in_flight));
	cJSON_AddItemToObject(document, "requests", json_u64(latency->count));
	cJSON_AddItemToObject(document, "seconds", json_f64((double)bench->elapsed_ns / 1e9));
	cJSON_AddItemToObject(document, "per_second", json_f64(rate_of(bench)));
	cJSON *times = cJSON_AddObjectToObject(document, "latency_ns");
	cJSON_AddItemToObject(times, "mean", json_f64((double)latency->sum_ns / (double)latency->count));
	cJSON_AddItemToObject(times, "p50", json_u64(latency_at(latency, 0.5)));
	cJSON_AddItemToObject(times, "p90", json_u64(latency_at(latency, 0.9)));
	cJSON_AddItemToObject(times, "p99", json_u64(latency_at(latency, 0.99)));
	cJSON_AddItemToObject(times, "max", json_u64(latency->max_ns));
	cJSON *parts = cJSON_AddObjectToObject(document, "split_ns");
#define X(part) cJSON_AddItemToObject(parts, #part, json_f64(split->part / samples));
	SPLIT_MAP(X)
#undef X
	cJSON_AddItemToObject(parts, "samples", json_u64(split->samples));
	return print_json(document);
}

static int run_bench(struct opctl *ctl, struct bench *bench)
{
	opd_error error;
	if (read_options(&ctl->options, bench, &error) != OPD_OK)
		return report_usage(ctl, &error);
	opd_status status = opctl_connect(ctl, CONNECT_ANY, &error);
	if (status == OPD_OK)
		status = opctl_load_modules(ctl, &error);
	if (status == OPD_OK)
		status = prepare(ctl, bench, &error);
	if (status == OPD_OK)
		status = measure(bench, &error);
	/* After a failure others may be in flight still, which read the request's tensors until the client is closed. */
	opd_close(ctl->client);
	ctl->client = NULL;
	opd_request_destroy(bench->request);
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	if (ctl->json)
		return print_bench_json(bench);
	print_bench(bench);
	return EXIT_DONE;
}

int cmd_bench(struct opctl *ctl)
{
	struct bench *bench = calloc(1, sizeof *bench);
	if (bench == NULL) {
		opd_error error;
		const opd_status status = opd_fail(&error, OPD_RESOURCE_EXHAUSTED, "out of memory");
		return report_failure(ctl, status, &error);
	}
	const int code = run_bench(ctl, bench);
	free(bench);
	return code;
}
