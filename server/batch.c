#include "server/batch.h"

#include <stdlib.h>
#include <string.h>

#include "server/containment.h"
#include "server/daemon.h"
#include "server/derived.h"
#include "server/module.h"
#include "server/request.h"

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

/* Of rows everything but their number. Not where it lies: on a device that may change. */
static uint64_t hash_tensor(uint64_t hash, const opd_tensor *tensor, bool rows)
{
	hash = mix(mix(hash, (uint64_t)(uint32_t)tensor->dtype), tensor->rank);
	for (uint32_t i = rows ? 1 : 0; i < tensor->rank; i++)
		hash = mix(hash, (uint64_t)tensor->shape[i]);
	return hash;
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

static bool same_tensor(const opd_tensor *a, const opd_tensor *b, bool anywhere, bool rows)
{
	if (a->dtype != b->dtype || a->rank != b->rank || (!anywhere && opd_tensor_data(a) != opd_tensor_data(b)))
		return false;
	for (uint32_t i = rows ? 1 : 0; i < a->rank; i++)
		if (a->shape[i] != b->shape[i] || (!rows && a->strides[i] != b->strides[i]))
			return false;
	return true;
}

static bool same_arg(const opd_arg *a, const opd_arg *b, bool anywhere, bool rows)
{
	if (a->kind != b->kind)
		return false;
	switch (a->kind) {
	case OPD_ARG_NONE:
		return true;
	case OPD_ARG_TENSOR:
		return same_tensor(a->tensor, b->tensor, anywhere, rows);
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

/* NULL: it came with its request. */
static const struct kept_tensor *kept_of(const struct request *request, const opd_tensor *tensor)
{
	return request->run.kept == NULL ? NULL : request->run.kept[bound_index(&request->run.bound, tensor)];
}

/* On a device what isn't rows must be one kept tensor, wherever it lies now: what comes with a request is nobody else's. */
static bool same_buffer(const struct request *a, const struct request *b, const opd_tensor *of_a, const opd_tensor *of_b)
{
	const struct kept_tensor *kept_a = kept_of(a, of_a), *kept_b = kept_of(b, of_b);
	return kept_a != NULL && kept_b != NULL && kept_a->buffer == kept_b->buffer && of_a->byte_offset == of_b->byte_offset;
}

/* A number for where it lies. */
static uint64_t place_of(const struct request *request, const opd_tensor *tensor)
{
	const struct kept_tensor *kept = request->run.dispatch.impl->on_host ? NULL : kept_of(request, tensor);
	return kept != NULL ? (uint64_t)(uintptr_t)kept->buffer : (uint64_t)(uintptr_t)opd_tensor_data(tensor);
}

/* Under the lanes' mutexes. A kernel that exceeds its budget is answered for on its leader's loop, where requests of other loops can't be: of those with a budget each loop makes batches of its own. */
static bool joins(const struct request *a, const struct request *b)
{
	const opd_call *call = &a->run.bound.call;
	const bool on_host = a->run.dispatch.impl->on_host;
	if (a->context->loop != b->context->loop && watch_budget_ns(a->context->server, a->run.dispatch.impl->provider) != 0)
		return false;
	if (a->run.dispatch.impl != b->run.dispatch.impl || a->run.op->def != b->run.op->def || call->flags != b->run.bound.call.flags || call->arg_count != b->run.bound.call.arg_count)
		return false;
	for (uint32_t i = 0; i < call->arg_count; i++) {
		const opd_arg *of_a = &call->args[i], *of_b = &b->run.bound.call.args[i];
		const bool rows = is_rows(a->run.op, i);
		if (!same_arg(of_a, of_b, rows || !on_host, rows))
			return false;
		if (!on_host && !rows && of_a->kind == OPD_ARG_TENSOR && !same_buffer(a, b, of_a->tensor, of_b->tensor))
			return false;
	}
	return true;
}

static bool joins_on_lane(const struct batch_item *leader, const struct batch_item *item)
{
	return joins((const struct request *)(const void *)((const char *)leader - offsetof(struct request, job.batch)),
	             (const struct request *)(const void *)((const char *)item - offsetof(struct request, job.batch)));
}

static bool joins_on_device(const struct batch_item *leader, const struct batch_item *item)
{
	return joins((const struct request *)(const void *)((const char *)leader - offsetof(struct request, device_job.batch)),
	             (const struct request *)(const void *)((const char *)item - offsetof(struct request, device_job.batch)));
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
			*shared_out += arg->kind == OPD_ARG_TENSOR ? bound_bytes(arg->tensor) : 0;
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
			bytes += bound_bytes(run->bound.call.args[i].tensor);
	for (uint32_t i = 0; i < run->bound.call.output_count; i++)
		bytes += bound_bytes(&run->bound.outputs[i]);
	return bytes;
}

/* The rows come with the request, and leave with its reply: what stays on a device is copied there by nobody. */
static bool passes_through(const struct request *request)
{
	const struct request_run *run = &request->run;
	bool passes = true;
	for (uint32_t i = 0; i < run->bound.call.arg_count; i++)
		if (is_rows(run->op, i))
			passes = passes && run->bound.call.args[i].kind == OPD_ARG_TENSOR && kept_of(request, run->bound.call.args[i].tensor) == NULL;
	for (uint32_t i = 0; i < run->bound.call.output_count; i++)
		passes = passes && run->bound.outputs[i].data != NULL && !run_keeps(request, i);
	return passes;
}

static bool may_be_offered(const struct request *request)
{
	const struct request_run *run = &request->run;
	const struct impl *impl = run->dispatch.impl;
	/* A plan, and what a provider derives from weights by it, is made for one shape; checks of contents name positions of one request; canaries lie behind each result. */
	return run->op->row_params != 0 && (impl->def->flags & OPD_IMPL_BATCH_INVARIANT) != 0 && impl->def->plan == NULL && run->op->def->check == NULL &&
	       !run->checked && run->donation_count == 0 && run->bound.call.arg_count <= BATCH_ARGS_MAX && run->bound.call.output_count <= BATCH_ARGS_MAX && !request->direct &&
	       (impl->on_host || passes_through(request));
}

/* Whether its time is well spent so. */
static bool pays(const struct request *request, uint64_t shared_bytes)
{
	const struct server *server = request->context->server;
	if (copied_bytes(request) > ROW_BYTES_MAX)
		return false;
	if (!request->run.dispatch.impl->on_host)
		return atomic_load_explicit(&server->batch_devices, memory_order_relaxed);
	return shared_bytes >= atomic_load_explicit(&server->batch_shared_bytes, memory_order_relaxed);
}

void batch_offer(struct request *request)
{
	const uint32_t rows_max = atomic_load_explicit(&request->context->server->batch_rows, memory_order_relaxed);
	const struct request_run *run = &request->run;
	const bool on_host = run->dispatch.impl->on_host;
	uint64_t shared_bytes;
	if (rows_max < 2 || !may_be_offered(request))
		return;
	const uint32_t rows = rows_of(request, &shared_bytes);
	if (rows == 0 || rows >= rows_max || !pays(request, shared_bytes))
		return;
	uint64_t number = mix((uint64_t)(uintptr_t)run->dispatch.impl, run->bound.call.flags);
	for (uint32_t i = 0; i < run->bound.call.arg_count; i++) {
		const opd_arg *arg = &run->bound.call.args[i];
		number = hash_arg(number, arg, is_rows(run->op, i));
		if (arg->kind == OPD_ARG_TENSOR && !is_rows(run->op, i))
			number = mix(number, place_of(request, arg->tensor));
	}
	struct batch_item *item = on_host ? &request->job.batch : &request->device_job.batch;
	*item = (struct batch_item){.number = number == 0 ? 1 : number, .rows = rows, .joins = on_host ? joins_on_lane : joins_on_device};
}

/* ---- Running ---- */

static void describe_tensor(struct batch_tensor *all, const opd_tensor *like, uint64_t rows)
{
	all->tensor = *like;
	all->tensor.shape = all->shape;
	all->tensor.strides = all->strides;
	memcpy(all->shape, like->shape, like->rank * sizeof all->shape[0]);
	all->shape[0] = (int64_t)rows;
	int64_t stride = 1;
	for (uint32_t i = like->rank; i > 0; i--) {
		all->strides[i - 1] = stride;
		stride *= all->shape[i - 1];
	}
	all->tensor.elements = (uint64_t)stride;
	all->tensor.byte_offset = 0;
	all->tensor.alignment = OPD_TENSOR_ALIGNMENT;
	all->tensor.flags = OPD_TENSOR_CONTIGUOUS;
	all->tensor.id = all->tensor.version = 0;
}

/* Sizes are bounded by what each may bring, so that nothing overflows. */
void batch_describe(struct batch_call *batch, const struct request *request, uint64_t rows)
{
	const struct request_run *run = &request->run;
	batch->call = run->bound.call;
	memcpy(batch->args, run->bound.call.args, run->bound.call.arg_count * sizeof batch->args[0]);
	batch->call.args = batch->args;
	batch->call.outputs = batch->outputs;
	batch->operand_count = 0;
	for (uint32_t i = 0; i < batch->call.arg_count; i++)
		if (is_rows(run->op, i)) {
			struct batch_tensor *operand = &batch->operands[batch->operand_count];
			batch->params[batch->operand_count++] = i;
			describe_tensor(operand, batch->args[i].tensor, rows);
			batch->args[i].tensor = &operand->tensor;
		}
	for (uint32_t i = 0; i < batch->call.output_count; i++) {
		describe_tensor(&batch->results[i], &run->bound.outputs[i], rows);
		batch->outputs[i] = &batch->results[i].tensor;
	}
}

void batch_count(struct request *any, uint32_t requests)
{
	struct server *server = any->context->server;
	(void)atomic_fetch_add_explicit(&server->batches, 1, memory_order_relaxed);
	(void)atomic_fetch_add_explicit(&server->batched, requests, memory_order_relaxed);
}

/* ---- On a CPU lane ---- */

struct batch {
	struct request *leader;
	struct lane_exec *exec;
	uint32_t count;
	uint64_t rows;
	bool spans_loops;
	struct batch_call *call;
	struct buffer *buffer;
};

/* The leader, then those that it took along; NULL: that was the last. Those that nobody wants any more have no rows. */
static struct request *next_of(const struct batch *batch, const struct request *request)
{
	struct lane_job *job = request == batch->leader ? batch->exec->others : request->job.next;
	while (job != NULL && job->batch.rows == 0)
		job = job->next;
	return job == NULL ? NULL : request_of(job);
}

static uint64_t padded(const struct batch_tensor *all)
{
	return (bound_bytes(&all->tensor) + OPD_TENSOR_ALIGNMENT - 1) / OPD_TENSOR_ALIGNMENT * OPD_TENSOR_ALIGNMENT;
}

/* One buffer for all of them. The daemon's: no session of them is to pay for the others. */
static bool make_room(struct batch *batch)
{
	struct batch_call *call = batch->call;
	uint64_t bytes = 0;
	for (uint32_t i = 0; i < call->operand_count; i++)
		bytes += padded(&call->operands[i]);
	for (uint32_t i = 0; i < call->call.output_count; i++)
		bytes += padded(&call->results[i]);
	if (buffer_alloc(batch->leader->context->server->account, bytes, 0, &batch->buffer, NULL) != OPD_OK)
		return false;
	unsigned char *at = batch->buffer->data;
	for (uint32_t i = 0; i < call->operand_count; at += padded(&call->operands[i++]))
		call->operands[i].tensor.data = at;
	for (uint32_t i = 0; i < call->call.output_count; at += padded(&call->results[i++]))
		call->results[i].tensor.data = at;
	return true;
}

static void gather(struct batch *batch)
{
	for (uint32_t i = 0; i < batch->call->operand_count; i++) {
		unsigned char *to = batch->call->operands[i].tensor.data;
		for (const struct request *each = batch->leader; each != NULL; each = next_of(batch, each)) {
			const opd_tensor *from = each->run.bound.call.args[batch->call->params[i]].tensor;
			memcpy(to, opd_tensor_data(from), bound_bytes(from));
			to += bound_bytes(from);
		}
	}
}

static void scatter(struct batch *batch)
{
	for (uint32_t i = 0; i < batch->call->call.output_count; i++) {
		const unsigned char *from = batch->call->results[i].tensor.data;
		for (const struct request *each = batch->leader; each != NULL; each = next_of(batch, each)) {
			const opd_tensor *to = &each->run.bound.outputs[i];
			memcpy(opd_tensor_data(to), from, bound_bytes(to));
			from += bound_bytes(to);
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
	if (impl->def->predicate != NULL && !impl->def->predicate(impl->def, impl->state, &batch->call->call, NULL))
		return false;
	batch->exec->derived = &derived;
	batch->exec->together = true;
	batch->exec->tenant = NULL; /* a failure is nobody's in particular: each runs again alone then */
	if (!batch->spans_loops) /* else there was no budget when it was made */
		watch_begin_kernel(&watch, impl, NULL, leader, batch->exec);
	const opd_status status = impl->def->run(impl->def, impl->state, &batch->call->call, &exec, &error);
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
			job->batch.rows = 0;
	}
	batch->count = 0;
	for (const struct request *each = batch->leader; each != NULL; each = next_of(batch, each)) {
		batch->count++;
		batch->spans_loops = batch->spans_loops || each->context->loop != batch->leader->context->loop;
		batch->rows += each->job.batch.rows;
	}
}

static void settle(struct batch *batch, uint64_t began_ns)
{
	const uint64_t ended_ns = request_now_ns();
	for (struct request *each = batch->leader; each != NULL; each = next_of(batch, each)) {
		each->status = OPD_OK;
		each->run.written = true;
		each->run.batched = batch->count;
		each->clock.started = began_ns;
		each->clock.ended = ended_ns;
	}
	batch_count(batch->leader, batch->count);
}

static bool run(struct batch *batch)
{
	const uint64_t began_ns = request_now_ns();
	batch_describe(batch->call, batch->leader, batch->rows);
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
	struct batch_call call;
	struct batch batch = {.leader = leader, .exec = exec, .call = &call};
	leave_out(&batch);
	return batch.count > 1 && run(&batch);
}
