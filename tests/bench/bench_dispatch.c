/* opd-bench-dispatch: nanoseconds and allocations from a decoded envelope to the chosen implementation, inside one process, on the server's own functions. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/codec.h"
#include "providers/builtin.h"
#include "server/dispatch.h"
#include "tests/bench/counter.h"
#include "tests/bench/report.h"
#include "tests/lib/clock.h"
#include "tests/lib/pin.h"

#define ROUNDS 15
#define CALLS 20000
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
	static const opd_impl name = {.struct_bytes = sizeof name, .op = "rms_norm", .device = "cpu", .uuid = UUID, .run = run_nothing, \
	                              .predicate = (accepts),                                                                        \
	                              .schema = "rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor"}
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

#define MODULE(text, opens) {.abi = OPD_PROVIDER_ABI, .struct_bytes = sizeof(opd_module), .name = (text), .version = "1", .open = (opens)}
static const opd_module modules[PROVIDERS] = {
	MODULE("refuses_a", open_refusing), MODULE("refuses_b", open_refusing), MODULE("refuses_c", open_refusing), MODULE("takes", open_taking),
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
	static const struct registry_services services = {serial_for, never_cancelled, host_alloc, host_free, NULL};
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
	                           &parts->request, &error), &error, "decode");
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
	check(registry_set_priority(parts->registry, MSG_LEVEL_CONFIGURATION, "rms_norm", names, refusals + 1, &error), &error, "priority");
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
	opd_error *error = NULL;
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
		if (dispatch_init(&dispatch, parts->snapshot, effective, parts->plans, &parts->log, op, false, error) != OPD_OK ||
		    !dispatch_walk(&dispatch, &bound.call))
			bench_fail("nobody takes the call");
		impl = dispatch.impl;
		dispatch_fini(&dispatch);
	}
	effective_unref(effective);
	return impl;
}

static void call_decode(struct parts *parts)
{
	struct msg_request request;
	arena_reset(&parts->arena);
	if (codec_decode_request(&parts->arena, parts->encoded.frame + FRAME_HEADER_BYTES, parts->encoded.envelope_bytes, &request, NULL) != OPD_OK)
		bench_fail("the envelope doesn't decode");
}

static void call_encode(struct parts *parts)
{
	struct msg_result output = {.tensor = norm_operand(2, 0)};
	struct msg_reply reply = {.kind = MSG_REPLY_RUN, .run = {.provider = msg_text("cpu"), .output_count = 1, .outputs = &output}};
	struct codec_buffer encoded;
	arena_reset(&parts->arena);
	if (codec_encode_reply(&parts->arena, &reply, &encoded, NULL) != OPD_OK)
		bench_fail("the reply doesn't encode");
}

static double allocations(void)
{
	return counter_own == NULL ? 0 : (double)atomic_load(&counter_own()->counts[COUNTER_ALLOCATIONS]);
}

struct cost {
	double ns;
	double allocations; /* a call */
};

/* Median over rounds; `last` below 0: decoding, below that: encoding. */
static struct cost cost_measure(struct parts *parts, int last)
{
	double ns[ROUNDS], before = 0;
	for (int round = -1; round < ROUNDS; round++) { /* one to warm up */
		uint64_t begin = clock_ns();
		if (round == 0)
			before = allocations();
		for (int i = 0; i < CALLS; i++) {
			if (last == -1)
				call_decode(parts);
			else if (last == -2)
				call_encode(parts);
			else if (call_steps(parts, (step)last) == NULL)
				bench_fail("no implementation");
		}
		if (round >= 0)
			ns[round] = (double)(clock_ns() - begin) / CALLS;
	}
	double counted = allocations() - before;
	return (struct cost){report_median(ns, ROUNDS), counted / ((double)ROUNDS * CALLS)};
}

static void cost_row(const char *what, double ns, double allocated, report_bound bound, double limit)
{
	char note[64];
	(void)snprintf(note, sizeof note, counter_own == NULL ? "allocations not counted" : "%.3f allocations", allocated);
	report_row(&(struct report_row){.what = what, .unit = "ns", .floor = REPORT_NONE, .value = ns, .kernel = REPORT_NONE,
	                                .ratio = REPORT_NONE, .bound = bound, .limit = limit, .note = note});
}

static void print_steps(struct parts *parts)
{
	static const char *const names[STEPS] = {"  of it: op and its list found by name", "  of it: arguments bound (3 positional, 1 default)",
	                                         "  of it: 2 operands checked and placed", "  of it: result shapes",
	                                         "  of it: implementation chosen"};
	double before = 0;
	for (int i = 0; i < STEPS; i++) {
		struct cost cost = cost_measure(parts, i);
		cost_row(names[i], cost.ns > before ? cost.ns - before : 0, cost.allocations, REPORT_NO_TARGET, 0);
		before = cost.ns;
	}
}

static void print_providers(struct parts *parts)
{
	parts_priority(parts, 0);
	struct cost one = cost_measure(parts, STEP_CHOOSE);
	cost_row("decoded rms_norm to chosen implementation, 1 provider", one.ns, one.allocations, REPORT_VALUE_MAX, 150);
	print_steps(parts);
	parts_priority(parts, 1);
	struct cost two = cost_measure(parts, STEP_CHOOSE);
	cost_row("2 providers, one refuses", two.ns, two.allocations, REPORT_NO_TARGET, 0);
	parts_priority(parts, 3);
	struct cost four = cost_measure(parts, STEP_CHOOSE);
	cost_row("4 providers, three refuse", four.ns, four.allocations, REPORT_NO_TARGET, 0);
	cost_row("a refusal (of three)", four.ns > one.ns ? (four.ns - one.ns) / 3 : 0, four.allocations, REPORT_VALUE_MAX, 25);
}

int main(void)
{
	static struct parts parts;
	(void)pin_self(0);
	parts_open(&parts);
	parts_request(&parts);
	report_section("Dispatch, in one process");
	print_providers(&parts);
	char what[64];
	struct cost decode = cost_measure(&parts, -1), encode = cost_measure(&parts, -2);
	(void)snprintf(what, sizeof what, "request envelope decoded (%zu bytes)", parts.encoded.envelope_bytes);
	cost_row(what, decode.ns, decode.allocations, REPORT_NO_TARGET, 0);
	cost_row("reply envelope encoded", encode.ns, encode.allocations, REPORT_NO_TARGET, 0);
	parts_close(&parts);
	return 0;
}
