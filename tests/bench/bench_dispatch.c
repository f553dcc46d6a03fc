/* opd-bench-dispatch: nanoseconds and allocations from a decoded envelope to the chosen implementation, inside one process, on
 * the server's own functions. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/codec.h"
#include "proto/plain.h"
#include "providers/builtin.h"
#include "server/dispatch.h"
#include "server/metrics.h"
#include "server/quota.h"
#include "server/scheduler.h"
#include "tests/bench/counter.h"
#include "tests/bench/report.h"
#include "tests/lib/clock.h"
#include "tests/lib/pin.h"

#define ROUNDS 151
#define CALLS 1000 /* a block of a fraction of a millisecond is seldom interrupted */
#define PROVIDERS 4
#define HIDDEN 4096

/* Not linked under sanitizers, which have their own allocator. */
__attribute__((weak)) struct counter_page *counter_own(void);

/* ---- Providers: three that refuse by dtype, as a provider for 16-bit floats would, and one that takes everything ---- */

static bool refuse_float32(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl;
	(void)state;
	const opd_tensor *x = call->args[0].tensor;
	if (x->dtype != OPD_bf16 && x->dtype != OPD_f16)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "x %s, only f16 and bf16", opd_dtype_name(x->dtype));
	return true;
}

static opd_status run_nothing(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl;
	(void)state;
	(void)call;
	(void)exec;
	return opd_fail(error, OPD_INTERNAL, "a kernel of the dispatch benchmark was run");
}

#define UUID "0000000000000000000000000000000000000000000000000000000000000000"
#define IMPL(name, accepts)                                                                                                      \
	static const opd_impl name = {.struct_bytes = sizeof name,                                                                   \
	                              .op = "rms_norm",                                                                              \
	                              .device = "cpu",                                                                               \
	                              .uuid = UUID,                                                                                  \
	                              .run = run_nothing,                                                                            \
	                              .predicate = (accepts),                                                                        \
	                              .schema =                                                                                      \
	                                  "rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor"}
IMPL(taking, NULL);
IMPL(refusing, refuse_float32);

static opd_status open_taking(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	return host->register_impl(host, &taking, error);
}

static opd_status open_refusing(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	return host->register_impl(host, &refusing, error);
}

#define MODULE(text, opens)                                                                                                      \
	{                                                                                                                            \
		.abi = OPD_PROVIDER_ABI, .struct_bytes = sizeof(opd_module), .name = (text), .version = "1", .open = (opens)             \
	}
static const opd_module modules[PROVIDERS] = {
    MODULE("refuses_a", open_refusing),
    MODULE("refuses_b", open_refusing),
    MODULE("refuses_c", open_refusing),
    MODULE("takes", open_taking),
};

/* ---- The server's parts ---- */

struct parts {
	struct log log;
	struct registry *registry;
	struct plans *plans;
	struct snapshot *snapshot;
	struct arena envelope_arena;
	struct arena arena;
	struct msg_request request; /* decoded */
	struct codec_buffer encoded;
	float *x, *weight;
};

static void *host_alloc(void *context, uint64_t bytes)
{
	(void)context;
	return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static void host_free(void *context, void *memory)
{
	(void)context;
	free(memory);
}

static void serial_for(const opd_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument)
{
	(void)exec;
	(void)grain;
	range(argument, 0, items, 0);
}

static bool never_cancelled(const opd_exec *exec)
{
	(void)exec;
	return false;
}

static void check(opd_status status, const opd_error *error, const char *what)
{
	if (status != OPD_OK)
		bench_fail("%s: %s", what, error->text);
}

static void parts_open(struct parts *parts)
{
	static const struct registry_services services = {.parallel_for = serial_for, .cancelled = never_cancelled, .alloc = host_alloc, .free = host_free};
	opd_error error;
	check(log_init(&parts->log, LOG_ERROR, LOG_TEXT, NULL, &error), &error, "log");
	check(registry_create(&parts->log, &services, &parts->registry, &error), &error, "registry");
	check(plans_create(64, 1 << 20, &parts->plans, &error), &error, "plans");
	for (size_t i = 0; builtin_modules[i] != NULL; i++)
		check(registry_open_builtin(parts->registry, builtin_modules[i], &error), &error, builtin_modules[i]->name);
	for (size_t i = 0; i < PROVIDERS; i++)
		check(registry_open_builtin(parts->registry, &modules[i], &error), &error, modules[i].name);
}

static struct msg_tensor norm_operand(uint32_t rank, uint64_t offset)
{
	struct msg_tensor tensor = {.dtype = OPD_f32, .rank = rank, .source = MSG_SOURCE_PAYLOAD};
	tensor.shape[0] = 1;
	tensor.shape[rank - 1] = HIDDEN;
	tensor.payload.offset = offset;
	tensor.payload.bytes = HIDDEN * sizeof(float);
	return tensor;
}

/* rms_norm(x, weight, 1e-5), encoded and decoded as it would come over the wire. */
static void parts_request(struct parts *parts)
{
	static struct msg_tensor x, weight;
	static struct msg_arg args[3];
	opd_error error;
	x = norm_operand(2, 0);
	weight = norm_operand(1, HIDDEN * sizeof(float));
	args[0] = (struct msg_arg){.kind = MSG_ARG_TENSOR, .count = 1, .tensor = &x};
	args[1] = (struct msg_arg){.kind = MSG_ARG_TENSOR, .count = 1, .tensor = &weight};
	args[2] = (struct msg_arg){.kind = MSG_ARG_FLOAT, .f = 1e-5};
	struct msg_request request = {.kind = MSG_REQUEST_RUN, .run = {.op = msg_text("rms_norm"), .arg_count = 3, .args = args}};
	arena_init(&parts->envelope_arena, 1 << 20);
	arena_init(&parts->arena, 1 << 20);
	check(codec_encode_request(&parts->envelope_arena, &request, &parts->encoded, &error), &error, "encode");
	check(codec_decode_request(&parts->envelope_arena, parts->encoded.frame + FRAME_HEADER_BYTES, parts->encoded.envelope_bytes,
	                           &parts->request, &error),
	      &error, "decode");
	parts->x = host_alloc(NULL, HIDDEN * sizeof(float));
	parts->weight = host_alloc(NULL, HIDDEN * sizeof(float));
}

/* `refusing` providers in front of the one that takes the call, as the configuration's list. */
static void parts_priority(struct parts *parts, unsigned refusals)
{
	const char *names[PROVIDERS];
	opd_error error;
	for (unsigned i = 0; i < refusals; i++)
		names[i] = modules[i].name;
	names[refusals] = "takes";
	check(registry_set_priority(parts->registry, MSG_LEVEL_CONFIGURATION, "rms_norm", names, refusals + 1, &error), &error,
	      "priority");
	snapshot_unref(parts->snapshot);
	parts->snapshot = registry_snapshot(parts->registry);
}

static void parts_close(struct parts *parts)
{
	snapshot_unref(parts->snapshot);
	plans_destroy(parts->plans);
	registry_destroy(parts->registry);
	arena_fini(&parts->arena);
	arena_fini(&parts->envelope_arena);
	free(parts->x);
	free(parts->weight);
	log_fini(&parts->log);
}

/* ---- What is measured ---- */

/* Steps of a call, each including those before. */
typedef enum step {
	STEP_FIND,   /* op by name, its list */
	STEP_BIND,   /* arguments by position, defaults, types */
	STEP_PLACE,  /* operands checked against their memory */
	STEP_SHAPES, /* result shapes */
	STEP_CHOOSE, /* the walk */
	STEPS
} step;

static const struct impl *call_steps(struct parts *parts, step last)
{
	const struct msg_run *run = &parts->request.run;
	struct bound bound;
	struct dispatch dispatch;
	static opd_error own;
	opd_error *error = &own; /* as a request has one */
	arena_reset(&parts->arena);
	const struct op *op = snapshot_op(parts->snapshot, run->op.data, run->op.bytes);
	struct effective *effective = effective_ref(op->fallback);
	const struct impl *impl = effective->impls[0];
	if (last >= STEP_BIND && bind_args(&parts->arena, op, run, &bound, error) != OPD_OK)
		bench_fail("the call doesn't bind");
	if (last >= STEP_PLACE && (bind_place(op, &bound.operands[0], parts->x, HIDDEN * sizeof(float), true, error) != OPD_OK ||
	                           bind_place(op, &bound.operands[1], parts->weight, HIDDEN * sizeof(float), true, error) != OPD_OK))
		bench_fail("the operands don't fit");
	if (last >= STEP_SHAPES && bind_outputs(&parts->arena, &bound, error) != OPD_OK)
		bench_fail("the call has no result shapes");
	if (last >= STEP_CHOOSE) {
		if (dispatch_init(&dispatch, parts->snapshot, effective, parts->plans, &parts->log, op, false, &bound.call, error) != OPD_OK ||
		    !dispatch_walk(&dispatch, &bound.call))
			bench_fail("nobody takes the call");
		impl = dispatch.impl;
		dispatch_fini(&dispatch);
	}
	effective_unref(effective);
	return impl;
}

typedef opd_status (*decode_fn)(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_request *out, opd_error *error);
typedef opd_status (*encode_fn)(struct arena *arena, const struct msg_reply *message, struct codec_buffer *out, opd_error *error);

static void call_decode(struct parts *parts, decode_fn decode)
{
	struct msg_request request;
	arena_reset(&parts->arena);
	if (decode(&parts->arena, parts->encoded.frame + FRAME_HEADER_BYTES, parts->encoded.envelope_bytes, &request, NULL) != OPD_OK)
		bench_fail("the envelope doesn't decode");
}

static void call_encode(struct parts *parts, encode_fn encode)
{
	struct msg_result output = {.tensor = norm_operand(2, 0)};
	struct msg_reply reply = {.kind = MSG_REPLY_RUN, .run = {.provider = msg_text("cpu"), .output_count = 1, .outputs = &output}};
	struct codec_buffer encoded;
	arena_reset(&parts->arena);
	if (encode(&parts->arena, &reply, &encoded, NULL) != OPD_OK)
		bench_fail("the reply doesn't encode");
}

static double allocations(void)
{
	return counter_own == NULL ? 0 : (double)atomic_load(&counter_own()->counts[COUNTER_ALLOCATIONS]);
}

/* One thing that is measured: a call's steps up to one, behind some refusals, or a conversion of envelopes. */
struct lap {
	const char *what;
	unsigned refusals;
	int last; /* a step, or one of the conversions below */
	report_bound bound;
	double limit;
	double ns[ROUNDS];
	double allocations; /* a call */
};
enum { DECODE = -1, ENCODE = -2, DECODE_PROTOBUF = -3, ENCODE_PROTOBUF = -4 };

static struct lap laps[] = {
    {.what = "op and its list found by name", .last = STEP_FIND},
    {.what = "... and arguments bound (3 positional, 1 default)", .last = STEP_BIND},
    {.what = "... and 2 operands checked and placed", .last = STEP_PLACE},
    {.what = "... and result shapes", .last = STEP_SHAPES},
    {.what = "decoded rms_norm to chosen implementation, 1 provider",
     .last = STEP_CHOOSE,
     .bound = REPORT_VALUE_MAX,
     .limit = 150},
    {.what = "2 providers, one refuses", .last = STEP_CHOOSE, .refusals = 1},
    {.what = "4 providers, three refuse", .last = STEP_CHOOSE, .refusals = 3},
    {.what = "request envelope decoded", .last = DECODE},
    {.what = "... by protobuf-c", .last = DECODE_PROTOBUF},
    {.what = "reply envelope encoded", .last = ENCODE},
    {.what = "... by protobuf-c", .last = ENCODE_PROTOBUF},
};
#define LAPS (sizeof laps / sizeof laps[0])
#define LAP_ONE 4 /* a single provider */
#define LAP_FOUR 6

static void lap_calls(struct parts *parts, const struct lap *lap)
{
	for (int i = 0; i < CALLS; i++) {
		if (lap->last == DECODE || lap->last == DECODE_PROTOBUF)
			call_decode(parts, lap->last == DECODE ? codec_decode_request : codec_unpack_request);
		else if (lap->last == ENCODE || lap->last == ENCODE_PROTOBUF)
			call_encode(parts, lap->last == ENCODE ? codec_encode_reply : codec_pack_reply);
		else if (call_steps(parts, (step)lap->last) == NULL)
			bench_fail("no implementation");
	}
}

static void lap_run(struct parts *parts, struct lap *lap, unsigned round)
{
	parts_priority(parts, lap->refusals);
	lap_calls(parts, lap); /* warm */
	double counted = allocations();
	uint64_t begin = clock_ns();
	lap_calls(parts, lap);
	lap->ns[round] = (double)(clock_ns() - begin) / CALLS;
	lap->allocations = (allocations() - counted) / CALLS;
}

static void lap_print(struct lap *lap)
{
	char note[96], counted[48] = "allocations not counted";
	if (counter_own != NULL)
		(void)snprintf(counted, sizeof counted, "%.3f allocations", lap->allocations);
	double median = report_median(lap->ns, ROUNDS);
	(void)snprintf(note, sizeof note, "%s; best %.0f", counted, lap->ns[0]);
	report_row(&(struct report_row){.what = lap->what,
	                                .unit = "ns",
	                                .floor = REPORT_NONE,
	                                .value = median,
	                                .kernel = REPORT_NONE,
	                                .ratio = REPORT_NONE,
	                                .bound = lap->bound,
	                                .limit = lap->limit,
	                                .note = note});
}

/* What one refusal adds: from three more, round by round, since rounds differ more than refusals do. Before the laps are printed,
 * which sorts them. */
static double refusal_ns(void)
{
	double each[ROUNDS];
	for (int i = 0; i < ROUNDS; i++) {
		double ns = (laps[LAP_FOUR].ns[i] - laps[LAP_ONE].ns[i]) / 3;
		each[i] = ns > 0 ? ns : 0;
	}
	return report_median(each, ROUNDS);
}

/* ---- The scheduler in front of a lane ---- */

#define FLOWS 1000
#define TENANTS 50

/* Nanoseconds of submitting, picking and completing one job, while so many sessions of so many tenants have one waiting. */
static double schedule_block(struct scheduler *scheduler, struct sched_item *items, unsigned count)
{
	uint64_t ready, begin = clock_ns();
	for (unsigned i = 0; i < count; i++) {
		struct sched_item *item = scheduler_pick(scheduler, i, &ready);
		scheduler_complete(scheduler, item->flow, (sched_class)item->class, item->estimate_ns, 1000 + (uint64_t)(item - items) * 7 % 5000);
		if (!scheduler_submit(scheduler, item, i))
			bench_fail("a queue without a bound is full");
	}
	return (double)(clock_ns() - begin) / count;
}

static void bench_schedule(void)
{
	static struct scheduler scheduler;
	static struct sched_group groups[TENANTS];
	static struct sched_flow flows[FLOWS];
	static struct sched_item items[FLOWS];
	double ns[ROUNDS];
	scheduler_init(&scheduler);
	for (unsigned i = 0; i < TENANTS; i++)
		sched_group_init(&groups[i], 50 + i);
	for (unsigned i = 0; i < FLOWS; i++) {
		sched_flow_init(&flows[i], &groups[i % TENANTS], 50 + i % 100);
		items[i] = (struct sched_item){.flow = &flows[i], .class = (uint8_t)(i % 11 == 0 ? CLASS_BATCH : CLASS_INTERACTIVE)};
		if (!scheduler_submit(&scheduler, &items[i], 0))
			bench_fail("a queue without a bound is full");
	}
	(void)schedule_block(&scheduler, items, 10 * FLOWS); /* warm, and out of the order in which they came */
	for (unsigned round = 0; round < ROUNDS; round++)
		ns[round] = schedule_block(&scheduler, items, CALLS);
	report_row(&(struct report_row){.what = "scheduled: submit, pick, complete; 1,000 active sessions",
	                                .unit = "ns",
	                                .floor = REPORT_NONE,
	                                .value = report_median(ns, ROUNDS),
	                                .kernel = REPORT_NONE,
	                                .ratio = REPORT_NONE,
	                                .bound = REPORT_VALUE_MAX,
	                                .limit = 300});
}

/* ---- What counting a request costs ---- */

static double count_block(struct metrics *metrics, const struct impl *impls, unsigned count)
{
	uint64_t begin = clock_ns();
	for (unsigned i = 0; i < count; i++) {
		metrics_ran(metrics, &impls[i % 7], 500 + i % 5000, 1000 + i % 9000, OPD_OK);
		metrics_replied(metrics, MSG_REQUEST_RUN, OPD_OK);
		metrics_written(metrics, 2000 + i % 9000);
	}
	return (double)(clock_ns() - begin) / count;
}

/* A session's and its tenant's. */
static double quota_block(struct quota *session, struct quota *tenant, unsigned count)
{
	struct quota_refusal refusal;
	uint64_t begin = clock_ns();
	for (unsigned i = 0; i < count; i++) {
		if (!quota_enter(session, tenant, 100, i, &refusal))
			bench_fail("no quota, and one is passed");
		quota_send(session, tenant, 100, i);
		quota_leave(session, tenant);
	}
	return (double)(clock_ns() - begin) / count;
}

static void count_row(const char *what, double ns[ROUNDS], double limit)
{
	report_row(&(struct report_row){.what = what,
	                                .unit = "ns",
	                                .floor = REPORT_NONE,
	                                .value = report_median(ns, ROUNDS),
	                                .kernel = REPORT_NONE,
	                                .ratio = REPORT_NONE,
	                                .bound = REPORT_VALUE_MAX,
	                                .limit = limit});
}

static void bench_counting(void)
{
	static struct quota session, tenant;
	struct impl impls[7];
	struct metrics *metrics = metrics_create(false);
	double counted[ROUNDS], entered[ROUNDS];
	if (metrics == NULL)
		bench_fail("out of memory");
	for (uint32_t i = 0; i < 7; i++)
		impls[i] = (struct impl){.index = i * 100};
	for (unsigned round = 0; round < ROUNDS; round++) {
		counted[round] = count_block(metrics, impls, CALLS);
		entered[round] = quota_block(&session, &tenant, CALLS);
	}
	metrics_destroy(metrics);
	count_row("counted: op and provider, kind, status, three histograms", counted, 30);
	count_row("quotas: in flight and bytes, session and tenant", entered, 100);
}

int main(void)
{
	static struct parts parts;
	(void)pin_self(0);
	parts_open(&parts);
	parts_request(&parts);
	report_section("Dispatch, in one process");
	for (unsigned round = 0; round < ROUNDS; round++)
		for (size_t i = 0; i < LAPS; i++)
			lap_run(&parts, &laps[i], round);
	double refusal = refusal_ns();
	for (size_t i = 0; i < LAPS; i++)
		lap_print(&laps[i]);
	report_row(&(struct report_row){.what = "a refusal (of three)",
	                                .unit = "ns",
	                                .floor = REPORT_NONE,
	                                .value = refusal,
	                                .kernel = REPORT_NONE,
	                                .ratio = REPORT_NONE,
	                                .bound = REPORT_VALUE_MAX,
	                                .limit = 25});
	bench_schedule();
	bench_counting();
	parts_close(&parts);
	return 0;
}
