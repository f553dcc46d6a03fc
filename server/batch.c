#include "server/batch.h"

#include <stdlib.h>
#include <string.h>

#include "server/containment.h"
#include "server/daemon.h"
#include "server/derived.h"
#include "server/module.h"
#include "server/request.h"

/* More arguments than any op's that has rows. */
#define ARGS_MAX 16u
/* Copying more than so much a request costs what it saves. */
#define ROW_BYTES_MAX (256u << 10)

static struct request *request_of(struct lane_job *job)
{
	return (struct request *)((char *)job - offsetof(struct request, job));
}

/* ---- What is the same ---- */

static uint64_t mix(uint64_t hash, uint64_t value)
{
	return (hash ^ value) * 0x9e3779b97f4a7c15u ^ hash >> 29;
}

static bool is_rows(const struct op *op, uint32_t param)
{
	return (op->row_params >> param & 1u) != 0;
}

static uint64_t tensor_bytes(const opd_tensor *tensor)
{
	return tensor->elements * opd_dtype_bytes(tensor->dtype);
}

/* Everything but the first extent, which is 0 for whatever has none. */
static uint64_t hash_tensor(uint64_t hash, const opd_tensor *tensor, bool rows)
{
	hash = mix(mix(hash, (uint64_t)(uint32_t)tensor->dtype), tensor->rank);
	for (uint32_t i = rows ? 1 : 0; i < tensor->rank; i++)
		hash = mix(hash, (uint64_t)tensor->shape[i]);
	return rows ? hash : mix(hash, (uint64_t)(uintptr_t)opd_tensor_data(tensor));
}

static uint64_t hash_arg(uint64_t hash, const opd_arg *arg, bool rows)
{
	hash = mix(hash, arg->kind);
	uint64_t bits = 0;
	switch (arg->kind) {
	case OPD_ARG_TENSOR:
		return hash_tensor(hash, arg->tensor, rows);
	case OPD_ARG_INT:
		return mix(hash, (uint64_t)arg->i);
	case OPD_ARG_BOOL:
		return mix(hash, arg->b);
	case OPD_ARG_FLOAT:
		memcpy(&bits, &arg->f, sizeof bits);
		return mix(hash, bits);
	case OPD_ARG_STR:
		return mix(hash, arg->count);
	default:
		return hash;
	}
}

static bool same_tensor(const opd_tensor *a, const opd_tensor *b, bool rows)
{
	if (a->dtype != b->dtype || a->rank != b->rank || (!rows && opd_tensor_data(a) != opd_tensor_data(b)))
		return false;
	for (uint32_t i = rows ? 1 : 0; i < a->rank; i++)
		if (a->shape[i] != b->shape[i] || (!rows && a->strides[i] != b->strides[i]))
			return false;
	return true;
}

static bool same_arg(const opd_arg *a, const opd_arg *b, bool rows)
{
	if (a->kind != b->kind)
		return false;
	switch (a->kind) {
	case OPD_ARG_NONE:
		return true;
	case OPD_ARG_TENSOR:
		return same_tensor(a->tensor, b->tensor, rows);
	case OPD_ARG_INT:
		return a->i == b->i;
	case OPD_ARG_BOOL:
		return a->b == b->b;
	case OPD_ARG_FLOAT:
		return memcmp(&a->f, &b->f, sizeof a->f) == 0; /* bits: NaN is like itself, 0 not like -0 */
	case OPD_ARG_STR:
		return a->count == b->count && memcmp(a->str, b->str, a->count) == 0;
	default:
		return false;
	}
}

/* Under the lane's mutex. A kernel that exceeds its budget is answered for on its leader's loop, where requests of other loops can't be: of those with a budget each loop makes batches of its own. */
static bool joins(const struct lane_job *leader, const struct lane_job *job)
{
	const struct request *a = request_of((struct lane_job *)(uintptr_t)leader);
	const struct request *b = request_of((struct lane_job *)(uintptr_t)job);
	const opd_call *call = &a->run.bound.call;
	if (a->context->loop != b->context->loop && watch_budget_ns(a->context->server, a->run.dispatch.impl->provider) != 0)
		return false;
	if (a->run.dispatch.impl != b->run.dispatch.impl || a->run.op->def != b->run.op->def || call->flags != b->run.bound.call.flags || call->arg_count != b->run.bound.call.arg_count)
		return false;
	for (uint32_t i = 0; i < call->arg_count; i++)
		if (!same_arg(&call->args[i], &b->run.bound.call.args[i], is_rows(a->run.op, i)))
			return false;
	return true;
}

/* ---- Offering ---- */

/* Rows in a row-major tensor of two extents or more: how many, 0 where it has none. */
static uint32_t rows_in(const opd_tensor *tensor)
{
	const bool good = tensor->rank >= 2 && opd_tensor_contiguous(tensor) && tensor->elements != 0 && tensor->shape[0] <= UINT16_MAX;
	return good ? (uint32_t)tensor->shape[0] : 0;
}

/* 0: its rows can't be put below others'. *shared_out: bytes of the operands that all would read. */
static uint32_t rows_of(const struct request *request, uint64_t *shared_out)
{
	const struct request_run *run = &request->run;
	uint32_t rows = 0;
	*shared_out = 0;
	for (uint32_t i = 0; i < run->bound.call.arg_count; i++) {
		const opd_arg *arg = &run->bound.call.args[i];
		if (arg->kind == OPD_ARG_TENSORS || arg->kind == OPD_ARG_INTS)
			return 0;
		if (!is_rows(run->op, i)) {
			*shared_out += arg->kind == OPD_ARG_TENSOR ? tensor_bytes(arg->tensor) : 0;
			continue;
		}
		const uint32_t found = arg->kind == OPD_ARG_TENSOR ? rows_in(arg->tensor) : 0;
		if (found == 0 || (rows != 0 && found != rows))
			return 0;
		rows = found;
	}
	for (uint32_t i = 0; i < run->bound.call.output_count; i++)
		if (rows_in(&run->bound.outputs[i]) != rows)
			return 0;
	return rows;
}

/* Bytes that would be copied for it, of operands and results. */
static uint64_t copied_bytes(const struct request *request)
{
	const struct request_run *run = &request->run;
	uint64_t bytes = 0;
	for (uint32_t i = 0; i < run->bound.call.arg_count; i++)
		if (is_rows(run->op, i))
			bytes += tensor_bytes(run->bound.call.args[i].tensor);
	for (uint32_t i = 0; i < run->bound.call.output_count; i++)
		bytes += tensor_bytes(&run->bound.outputs[i]);
	return bytes;
}

static bool may_be_offered(const struct request *request)
{
	const struct request_run *run = &request->run;
	const struct impl *impl = run->dispatch.impl;
	/* A plan, and what a provider derives from weights by it, is made for one shape; checks of contents name positions of one request; canaries lie behind each result. */
	return run->op->row_params != 0 && (impl->def->flags & OPD_IMPL_BATCH_INVARIANT) != 0 && impl->on_host && impl->def->plan == NULL && run->op->def->check == NULL &&
	       !run->checked && run->donation_count == 0 && run->bound.call.arg_count <= ARGS_MAX && run->bound.call.output_count <= ARGS_MAX && !request->direct;
}

void batch_offer(struct request *request)
{
	const struct server *server = request->context->server;
	const uint32_t rows_max = atomic_load_explicit(&server->batch_rows, memory_order_relaxed);
	struct request_run *run = &request->run;
	uint64_t shared_bytes;
	if (rows_max < 2 || !may_be_offered(request))
		return;
	const uint32_t rows = rows_of(request, &shared_bytes);
	if (rows == 0 || rows >= rows_max || copied_bytes(request) > ROW_BYTES_MAX ||
	    shared_bytes < atomic_load_explicit(&server->batch_shared_bytes, memory_order_relaxed))
		return;
	uint64_t key = mix((uint64_t)(uintptr_t)run->dispatch.impl, run->bound.call.flags);
	for (uint32_t i = 0; i < run->bound.call.arg_count; i++)
		key = hash_arg(key, &run->bound.call.args[i], is_rows(run->op, i));
	request->job.batch = key == 0 ? 1 : key;
	request->job.batch_rows = rows;
	request->job.joins = joins;
}

/* ---- Running ---- */

/* A tensor whose rows are those of several, in memory of the batch. */
struct joined {
	opd_tensor tensor;
	int64_t shape[OPD_RANK_MAX];
	int64_t strides[OPD_RANK_MAX];
};

struct batch {
	struct request *leader;
	struct lane_exec *exec;
	uint32_t count;
	uint64_t rows;
	bool spans_loops;
	opd_arg args[ARGS_MAX];
	opd_call call;
	struct joined *operands; /* [row operands] */
	struct joined *results;  /* [call.output_count] */
	const opd_tensor **outputs;
	struct buffer *buffer;
};

/* The leader, then those that it took along; NULL: that was the last. Those that nobody wants any more have no rows. */
static struct request *next_of(const struct batch *batch, const struct request *request)
{
	struct lane_job *job = request == batch->leader ? batch->exec->others : request->job.next;
	while (job != NULL && job->batch_rows == 0)
		job = job->next;
	return job == NULL ? NULL : request_of(job);
}

static void joined_init(struct joined *joined, const opd_tensor *like, uint64_t rows)
{
	joined->tensor = *like;
	joined->tensor.shape = joined->shape;
	joined->tensor.strides = joined->strides;
	memcpy(joined->shape, like->shape, like->rank * sizeof joined->shape[0]);
	joined->shape[0] = (int64_t)rows;
	int64_t stride = 1;
	for (uint32_t i = like->rank; i > 0; i--) {
		joined->strides[i - 1] = stride;
		stride *= joined->shape[i - 1];
	}
	joined->tensor.elements = (uint64_t)stride;
	joined->tensor.byte_offset = 0;
	joined->tensor.alignment = OPD_TENSOR_ALIGNMENT;
	joined->tensor.flags = OPD_TENSOR_CONTIGUOUS;
	joined->tensor.id = joined->tensor.version = 0;
}

static uint64_t padded(const struct joined *joined)
{
	return (tensor_bytes(&joined->tensor) + OPD_TENSOR_ALIGNMENT - 1) / OPD_TENSOR_ALIGNMENT * OPD_TENSOR_ALIGNMENT;
}

/* Describes the one call; its sizes are bounded by what each may bring, so that nothing overflows. */
static void describe(struct batch *batch)
{
	const struct request_run *run = &batch->leader->run;
	struct joined *operand = batch->operands;
	batch->call = run->bound.call;
	memcpy(batch->args, run->bound.call.args, run->bound.call.arg_count * sizeof batch->args[0]);
	batch->call.args = batch->args;
	batch->call.outputs = batch->outputs;
	for (uint32_t i = 0; i < batch->call.arg_count; i++)
		if (is_rows(run->op, i)) {
			joined_init(operand, batch->args[i].tensor, batch->rows);
			batch->args[i].tensor = &operand++->tensor;
		}
	for (uint32_t i = 0; i < batch->call.output_count; i++) {
		joined_init(&batch->results[i], &run->bound.outputs[i], batch->rows);
		batch->outputs[i] = &batch->results[i].tensor;
	}
}

/* One buffer for all of them. The daemon's: no session of them is to pay for the others. */
static bool make_room(struct batch *batch)
{
	const uint32_t operands = (uint32_t)__builtin_popcountll(batch->leader->run.op->row_params);
	uint64_t bytes = 0;
	for (uint32_t i = 0; i < operands; i++)
		bytes += padded(&batch->operands[i]);
	for (uint32_t i = 0; i < batch->call.output_count; i++)
		bytes += padded(&batch->results[i]);
	if (buffer_alloc(batch->leader->context->server->account, bytes, 0, &batch->buffer, NULL) != OPD_OK)
		return false;
	unsigned char *at = batch->buffer->data;
	for (uint32_t i = 0; i < operands; at += padded(&batch->operands[i++]))
		batch->operands[i].tensor.data = at;
	for (uint32_t i = 0; i < batch->call.output_count; at += padded(&batch->results[i++]))
		batch->results[i].tensor.data = at;
	return true;
}

static void gather(struct batch *batch)
{
	const struct op *op = batch->leader->run.op;
	struct joined *operand = batch->operands;
	for (uint32_t i = 0; i < batch->call.arg_count; i++) {
		if (!is_rows(op, i))
			continue;
		unsigned char *to = operand++->tensor.data;
		for (const struct request *each = batch->leader; each != NULL; each = next_of(batch, each)) {
			const opd_tensor *from = each->run.bound.call.args[i].tensor;
			memcpy(to, opd_tensor_data(from), tensor_bytes(from));
			to += tensor_bytes(from);
		}
	}
}

static void scatter(struct batch *batch)
{
	for (uint32_t i = 0; i < batch->call.output_count; i++) {
		const unsigned char *from = batch->results[i].tensor.data;
		for (const struct request *each = batch->leader; each != NULL; each = next_of(batch, each)) {
			const opd_tensor *to = &each->run.bound.outputs[i];
			memcpy(opd_tensor_data(to), from, tensor_bytes(to));
			from += tensor_bytes(to);
		}
	}
}

static bool run_kernel(struct batch *batch)
{
	struct request *leader = batch->leader;
	struct server *server = leader->context->server;
	const struct impl *impl = leader->run.dispatch.impl;
	const opd_exec exec = {.struct_bytes = sizeof exec, .threads = batch->exec->threads, .host = &impl->provider->module->host, .lane = batch->exec};
	struct derived_run derived = {.count = 0};
	struct watch watch = {.budget_ns = 0};
	opd_error error;
	if (impl->def->predicate != NULL && !impl->def->predicate(impl->def, impl->state, &batch->call, NULL))
		return false;
	batch->exec->derived = &derived;
	batch->exec->together = true;
	batch->exec->tenant = NULL; /* a failure is nobody's in particular: each runs again alone then */
	if (!batch->spans_loops) /* else there was no budget when it was made */
		watch_begin_kernel(&watch, impl, NULL, leader, batch->exec);
	const opd_status status = impl->def->run(impl->def, impl->state, &batch->call, &exec, &error);
	(void)watch_end(&watch);
	batch->exec->together = false;
	batch->exec->derived = NULL;
	derived_end(server->derived, &derived);
	return status == OPD_OK;
}

/* Those whose client has gone, cancelled or waited long enough have their answer, and no rows. */
static void leave_out(struct batch *batch)
{
	for (struct lane_job *job = batch->exec->others; job != NULL; job = job->next) {
		const struct lane_exec alone = lane_exec_serial(job);
		if (execute_unwanted(request_of(job), &alone))
			job->batch_rows = 0;
	}
	batch->count = 0;
	for (const struct request *each = batch->leader; each != NULL; each = next_of(batch, each)) {
		batch->count++;
		batch->spans_loops = batch->spans_loops || each->context->loop != batch->leader->context->loop;
		batch->rows += each->job.batch_rows;
	}
}

static void settle(struct batch *batch, uint64_t began_ns)
{
	const uint64_t ended_ns = request_now_ns();
	struct server *server = batch->leader->context->server;
	for (struct request *each = batch->leader; each != NULL; each = next_of(batch, each)) {
		each->status = OPD_OK;
		each->run.written = true;
		each->run.batched = batch->count;
		each->clock.started = began_ns;
		each->clock.ended = ended_ns;
	}
	(void)atomic_fetch_add_explicit(&server->batches, 1, memory_order_relaxed);
	(void)atomic_fetch_add_explicit(&server->batched, batch->count, memory_order_relaxed);
}

static bool run(struct batch *batch)
{
	const uint64_t began_ns = request_now_ns();
	describe(batch);
	if (!make_room(batch))
		return false;
	gather(batch);
	const bool good = run_kernel(batch);
	if (good) {
		scatter(batch);
		settle(batch, began_ns);
	}
	buffer_unref(batch->buffer);
	return good;
}

bool batch_run(struct request *leader, struct lane_exec *exec)
{
	struct joined operands[ARGS_MAX], results[ARGS_MAX];
	const opd_tensor *outputs[ARGS_MAX];
	struct batch batch = {.leader = leader, .exec = exec, .operands = operands, .results = results, .outputs = outputs};
	leave_out(&batch);
	return batch.count > 1 && run(&batch);
}
