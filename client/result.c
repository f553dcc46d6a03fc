#include "client/result.h"

#include "client/memory.h"
#include "proto/bounds.h"
#include "proto/tensor.h"

/* Where the data of an empty tensor points. */
static _Alignas(64) uint8_t empty_data[64];

const char *result_text(opd_result *result, struct msg_text text)
{
	if (text.data == NULL || text.bytes == 0)
		return "";
	if (!result->direct)
		return text.data;
	const char *copy = arena_text(&result->arena, text.data, text.bytes);
	return copy == NULL ? "" : copy;
}

const char *const *result_texts(opd_result *result, uint32_t count, const struct msg_text *texts)
{
	if (count == 0)
		return NULL;
	const char **list = arena_array(&result->arena, count, sizeof *list);
	for (uint32_t i = 0; list != NULL && i < count; i++)
		list[i] = result_text(result, texts[i]);
	return list;
}

/* ---- Checks ---- */

static opd_status bind_payload(const struct msg_tensor *tensor, uint32_t index, uint64_t extent, uint64_t payload_bytes,
                               uint64_t *end_out, opd_error *error)
{
	const uint64_t offset = tensor->payload.offset, bytes = tensor->payload.bytes;
	uint64_t end;
	if (offset % OPD_TENSOR_ALIGNMENT != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tensor %u begins at payload byte %llu, expected a multiple of 64", index,
		                (unsigned long long)offset);
	if (!size_add(offset, bytes, &end) || end > payload_bytes)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tensor %u has payload range [%llu, +%llu), the payload has %llu bytes",
		                index, (unsigned long long)offset, (unsigned long long)bytes, (unsigned long long)payload_bytes);
	if (bytes != extent)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tensor %u has %llu bytes in the payload, its shape has %llu", index,
		                (unsigned long long)bytes, (unsigned long long)extent);
	if (end > *end_out)
		*end_out = end;
	return OPD_OK;
}

static opd_status bind_inline(opd_result *result, struct msg_tensor *tensor, uint32_t index, uint64_t extent, opd_error *error)
{
	if (tensor->inlined.bytes != extent)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tensor %u has %zu inline bytes, its shape has %llu", index,
		                tensor->inlined.bytes, (unsigned long long)extent);
	if (result->direct || extent == 0)
		return OPD_OK;
	/* The envelope's bytes lie anywhere; ours are aligned and readable to the next boundary. */
	uint64_t padded;
	uint8_t *copy =
	    size_align(extent, &padded) && padded < SIZE_MAX / 2 ? arena_alloc(&result->arena, (size_t)padded + 63) : NULL;
	if (copy == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "no memory for tensor %u of the reply (%llu bytes)", index,
		                (unsigned long long)extent);
	copy = (uint8_t *)(((uintptr_t)copy + 63) & ~(uintptr_t)63);
	memcpy(copy, tensor->inlined.data, (size_t)extent);
	tensor->inlined.data = copy;
	return OPD_OK;
}

/* In memory that we gave; NULL data if that is destroyed by now. */
static opd_status bind_shared(const opd_result *result, struct msg_tensor *tensor, uint32_t index, uint64_t extent, opd_error *error)
{
	const uint64_t offset = tensor->shared.offset;
	const struct opd_memory *memory = memory_find(result->memories, tensor->shared.region);
	if (tensor->shared.bytes != extent || (memory != NULL && (offset > memory->bytes || extent > memory->bytes - offset)))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tensor %u of %llu bytes lies at bytes %llu + %llu of shared memory", index, (unsigned long long)extent,
		                (unsigned long long)offset, (unsigned long long)tensor->shared.bytes);
	tensor->inlined.data = memory == NULL ? NULL : memory->data + offset;
	tensor->inlined.bytes = (size_t)extent;
	tensor->source = memory == NULL ? MSG_SOURCE_NONE : MSG_SOURCE_INLINE;
	return OPD_OK;
}

/* Row-major tensors of host bytes or of none: outputs, and generated inputs that weren't kept. */
static opd_status bind_tensor(opd_result *result, struct msg_tensor *tensor, uint32_t index, uint64_t payload_bytes,
                              uint64_t *end_out, opd_error *error)
{
	uint64_t extent;
	if (!tensor_bytes(tensor->dtype, tensor->rank, tensor->shape, &extent))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tensor %u has no valid dtype and shape (dtype %d, rank %u)", index,
		                (int)tensor->dtype, tensor->rank);
	int64_t strides[OPD_RANK_MAX];
	tensor_row_major(tensor->rank, tensor->shape, strides);
	if (tensor->strided && extent != 0 && memcmp(strides, tensor->strides, tensor->rank * sizeof *strides) != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tensor %u has strides, expected row-major", index);
	if (tensor->byte_offset != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tensor %u has byte offset %llu, expected 0", index,
		                (unsigned long long)tensor->byte_offset);
	memcpy(tensor->strides, strides, tensor->rank * sizeof *strides);
	switch (tensor->source) {
	case MSG_SOURCE_NONE:
		return OPD_OK;
	case MSG_SOURCE_PAYLOAD:
		return bind_payload(tensor, index, extent, payload_bytes, end_out, error);
	case MSG_SOURCE_INLINE:
		return bind_inline(result, tensor, index, extent, error);
	case MSG_SOURCE_SHARED:
		return bind_shared(result, tensor, index, extent, error);
	case MSG_SOURCE_HANDLE:
	case MSG_SOURCE_RESULT:
	case MSG_SOURCE_GRAPH_INPUT:
	case MSG_SOURCE_NODE:
		break;
	}
	return opd_fail(error, OPD_INVALID_ARGUMENT, "tensor %u has source %d, expected payload, inline or none", index,
	                (int)tensor->source);
}

/* ---- The public view of a run ---- */

static void output_describe(struct result_output *output, const struct msg_result *from)
{
	const struct msg_tensor *tensor = &from->tensor;
	tensor_describe(&output->tensor, tensor->dtype, tensor->rank, tensor->shape, tensor->strides, 0);
	output->handle = (opd_handle){.index = from->kept.index, .generation = from->kept.generation};
	if (tensor->source == MSG_SOURCE_NONE)
		return;
	if (tensor->source == MSG_SOURCE_INLINE)
		output->tensor.data = (void *)(uintptr_t)tensor->inlined.data;
	if (opd_tensor_empty(&output->tensor) || output->tensor.data == NULL)
		output->tensor.data = empty_data;
	output->tensor.alignment = tensor_alignment(output->tensor.data, 0);
}

static opd_status bind_outputs(opd_result *result, uint64_t payload_bytes, uint64_t *end_out, opd_error *error)
{
	struct msg_run_reply *run = &result->reply.run;
	if (run->output_count > BOUND_OUTPUTS)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%u outputs, at most %u", run->output_count, BOUND_OUTPUTS);
	if (run->output_count == 0)
		return OPD_OK;
	if (result->direct) { /* shapes, strides and aligned copies are ours, the reply is the server's */
		struct msg_result *copy = arena_array(&result->arena, run->output_count, sizeof *copy);
		if (copy == NULL)
			return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "no memory for %u outputs", run->output_count);
		memcpy(copy, run->outputs, run->output_count * sizeof *copy);
		run->outputs = copy;
	}
	result->outputs = arena_array(&result->arena, run->output_count, sizeof *result->outputs);
	if (result->outputs == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "no memory for %u outputs", run->output_count);
	for (uint32_t i = 0; i < run->output_count; i++) {
		opd_status status = bind_tensor(result, &run->outputs[i].tensor, i, payload_bytes, end_out, error);
		if (status != OPD_OK)
			return status;
		output_describe(&result->outputs[i], &run->outputs[i]);
	}
	result->output_count = run->output_count;
	return OPD_OK;
}

static const opd_skip *explain_skips(opd_result *result, const struct msg_explain *from)
{
	opd_skip *skips = from->skip_count == 0 ? NULL : arena_array(&result->arena, from->skip_count, sizeof *skips);
	for (uint32_t i = 0; skips != NULL && i < from->skip_count; i++) {
		skips[i].provider = result_text(result, from->skipped[i].provider);
		skips[i].code = from->skipped[i].code;
		skips[i].reason = result_text(result, from->skipped[i].reason);
	}
	return skips;
}

static const struct opd_move *explain_moves(opd_result *result, const struct msg_explain *from)
{
	struct opd_move *moves = from->move_count == 0 ? NULL : arena_array(&result->arena, from->move_count, sizeof *moves);
	for (uint32_t i = 0; moves != NULL && i < from->move_count; i++) {
		moves[i].operand = result_text(result, from->moves[i].operand);
		moves[i].from = result_text(result, from->moves[i].from);
		moves[i].to = result_text(result, from->moves[i].to);
		moves[i].bytes = from->moves[i].bytes;
	}
	return moves;
}

/* NULL also without memory: the record goes without it. */
static const opd_behind *explain_behind(opd_result *result, const struct msg_behind *from)
{
	opd_behind *behind = from == NULL ? NULL : arena_alloc(&result->arena, sizeof *behind);
	if (behind != NULL)
		*behind = (opd_behind){from->own_jobs,   from->tenant_jobs, from->other_jobs, from->realtime_jobs, from->interactive_jobs,
		                       from->batch_jobs, from->own_ns,      from->tenant_ns,  from->other_ns,      from->running};
	return behind;
}

static void fill_explain(opd_result *result, const struct msg_explain *from, opd_explain *explain)
{
	explain->struct_bytes = sizeof *explain;
	explain->on_loop = from->on_loop;
	explain->batched = from->batched;
	explain->level = msg_level_name(from->level);
	explain->device = result_text(result, from->device);
	explain->narrowed = result_text(result, from->narrowed);
	explain->skipped = explain_skips(result, from);
	explain->skip_count = explain->skipped == NULL ? 0 : from->skip_count;
	explain->effective = result_texts(result, from->effective_count, from->effective);
	explain->effective_count = explain->effective == NULL ? 0 : from->effective_count;
	explain->moves = explain_moves(result, from);
	explain->move_count = explain->moves == NULL ? 0 : from->move_count;
	explain->decode_ns = from->times.decode;
	explain->dispatch_ns = from->times.dispatch;
	explain->queue_ns = from->times.queue;
	explain->kernel_ns = from->times.kernel;
	explain->moves_ns = from->times.moves;
	explain->pack_ns = from->times.pack;
	explain->receive_ns = from->times.receive;
	explain->behind = explain_behind(result, from->behind);
}

static opd_status bind_explain(opd_result *result, const struct msg_explain *from, opd_error *error)
{
	if (from == NULL)
		return OPD_OK;
	opd_explain *explain = arena_zalloc(&result->arena, sizeof *explain);
	if (explain == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "no memory for the explain record");
	fill_explain(result, from, explain);
	result->explain = explain;
	return OPD_OK;
}

static opd_status bind_graph(opd_result *result, const struct msg_graph_explain *from, opd_error *error)
{
	if (from == NULL)
		return OPD_OK;
	opd_graph_explain *graph = arena_zalloc(&result->arena, sizeof *graph);
	opd_node_explain *nodes = arena_array(&result->arena, from->count, sizeof *nodes);
	if (graph == NULL || nodes == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "no memory for the graph's explain record");
	for (uint32_t i = 0; i < from->count; i++) {
		nodes[i].node = result_text(result, from->nodes[i].node);
		nodes[i].op = result_text(result, from->nodes[i].op);
		nodes[i].provider = result_text(result, from->nodes[i].provider);
		fill_explain(result, &from->nodes[i].explain, &nodes[i].explain);
	}
	*graph = (opd_graph_explain){
	    .struct_bytes = sizeof *graph,
	    .count = from->count,
	    .node_count = from->node_count,
	    .dispatched = from->dispatched,
	    .nodes = nodes,
	    .arena_bytes = from->arena_bytes,
	    .unshared_bytes = from->unshared_bytes,
	    .prepare_ns = from->prepare_ns,
	    .width = from->width,
	};
	result->graph = graph;
	return OPD_OK;
}

static opd_status bind_run(opd_result *result, uint64_t payload_bytes, uint64_t *end_out, opd_error *error)
{
	const struct msg_run_reply *run = &result->reply.run;
	result->provider = result_text(result, run->provider);
	result->uuid = result_text(result, run->uuid);
	opd_status status = bind_outputs(result, payload_bytes, end_out, error);
	if (status == OPD_OK)
		status = bind_explain(result, run->explain, error);
	return status == OPD_OK ? bind_graph(result, run->graph, error) : status;
}

/* ---- Generated arguments ---- */

static opd_status bind_generated_tensor(opd_result *result, struct msg_tensor *tensor, uint32_t index, uint64_t payload_bytes,
                                        uint64_t *end_out, opd_error *error)
{
	if (tensor->source == MSG_SOURCE_HANDLE)
		return OPD_OK; /* a name, of which only the server can say whether it is good */
	return bind_tensor(result, tensor, index, payload_bytes, end_out, error);
}

static opd_status bind_generated(opd_result *result, uint64_t payload_bytes, uint64_t *end_out, opd_error *error)
{
	if (result->reply.generated.count > BOUND_ARGS)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%u arguments, at most %u", result->reply.generated.count, BOUND_ARGS);
	for (uint32_t i = 0; i < result->reply.generated.count; i++) {
		struct msg_arg *arg = &result->reply.generated.args[i];
		if (arg->kind != MSG_ARG_TENSOR && arg->kind != MSG_ARG_TENSORS)
			continue;
		const uint32_t count = arg->kind == MSG_ARG_TENSOR ? 1 : arg->count;
		for (uint32_t k = 0; k < count; k++) {
			opd_status status = bind_generated_tensor(result, &arg->tensor[k], i, payload_bytes, end_out, error);
			if (status != OPD_OK)
				return status;
		}
	}
	return OPD_OK;
}

/* ---- Binding ---- */

static opd_status check_kind(const struct msg_reply *reply, msg_reply_kind expected, opd_error *error)
{
	if (expected == MSG_REPLY_EMPTY || reply->kind == expected)
		return OPD_OK;
	if (reply->status != OPD_OK && (reply->kind == MSG_REPLY_NONE || reply->kind == MSG_REPLY_EMPTY))
		return OPD_OK;
	return opd_fail(error, OPD_INVALID_ARGUMENT, "body %d, expected %d", (int)reply->kind, (int)expected);
}

opd_status result_bind(opd_result *result, msg_reply_kind expected, uint64_t payload_bytes, opd_error *error)
{
	uint64_t end = 0;
	result->message = result_text(result, result->reply.message);
	result->provider = "";
	result->uuid = "";
	opd_status status = check_kind(&result->reply, expected, error);
	if (status == OPD_OK && expected == MSG_REPLY_RUN && result->reply.kind == MSG_REPLY_RUN)
		status = bind_run(result, payload_bytes, &end, error);
	else if (status == OPD_OK && expected == MSG_REPLY_GENERATED && result->reply.kind == MSG_REPLY_GENERATED)
		status = bind_generated(result, payload_bytes, &end, error);
	if (status != OPD_OK)
		return status;
	/* Nothing but padding may follow the last tensor: a payload is allocated at its announced size before a byte of it is here.
	 */
	if (payload_bytes > end + (OPD_TENSOR_ALIGNMENT - 1))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "payload of %llu bytes, its tensors end at %llu",
		                (unsigned long long)payload_bytes, (unsigned long long)end);
	return OPD_OK;
}

static void place_generated(opd_result *result)
{
	for (uint32_t i = 0; i < result->reply.generated.count; i++) {
		struct msg_arg *arg = &result->reply.generated.args[i];
		if (arg->kind != MSG_ARG_TENSOR && arg->kind != MSG_ARG_TENSORS)
			continue;
		const uint32_t count = arg->kind == MSG_ARG_TENSOR ? 1 : arg->count;
		for (uint32_t k = 0; k < count; k++) {
			struct msg_tensor *tensor = &arg->tensor[k];
			if (tensor->source != MSG_SOURCE_PAYLOAD)
				continue;
			const uint64_t offset = tensor->payload.offset, bytes = tensor->payload.bytes;
			tensor->source = MSG_SOURCE_INLINE;
			tensor->inlined.data = result->payload->data + offset;
			tensor->inlined.bytes = (size_t)bytes;
		}
	}
}

void result_place(opd_result *result, struct block *block)
{
	result->payload = block;
	if (result->reply.kind == MSG_REPLY_GENERATED)
		place_generated(result);
	for (uint32_t i = 0; i < result->output_count; i++) {
		const struct msg_tensor *from = &result->reply.run.outputs[i].tensor;
		opd_tensor *tensor = &result->outputs[i].tensor;
		if (from->source != MSG_SOURCE_PAYLOAD || opd_tensor_empty(tensor))
			continue;
		tensor->data = block->data + from->payload.offset;
		tensor->alignment = tensor_alignment(tensor->data, 0);
	}
}

void result_set_failure(opd_result *result, const opd_error *error)
{
	const char *copy = arena_text(&result->arena, error->text, strlen(error->text));
	result->reply = (struct msg_reply){.status = (opd_status)error->status, .retry_after_us = error->retry_after_us, .kind = MSG_REPLY_NONE};
	result->message = copy == NULL ? "out of memory" : copy;
	result->provider = "";
	result->uuid = "";
	result->output_count = 0;
	result->outputs = NULL;
	result->explain = NULL;
	result->graph = NULL;
}

opd_status result_report(const opd_result *result, opd_error *error)
{
	const opd_status status = result->reply.status;
	if (status == OPD_OK)
		return OPD_OK;
	(void)opd_fail(error, status, "%s", result->message);
	if (error != NULL)
		error->retry_after_us = result->reply.retry_after_us;
	return status;
}

/* ---- Public ---- */

void opd_result_destroy(opd_result *result)
{
	if (result == NULL)
		return;
	if (result->release != NULL)
		result->release(result->owner);
	struct pool *pool = result->pool;
	struct block *payload = result->payload;
	struct arena arena = result->arena;
	arena_reset(&arena);
	*result = (opd_result){.pool = pool, .arena = arena};
	pool_give_result(pool, result, payload);
}

opd_status opd_result_status(const opd_result *result)
{
	return result->reply.status;
}

const char *opd_result_message(const opd_result *result)
{
	return result->reply.status == OPD_OK ? "" : result->message;
}

uint32_t opd_result_retry_after_us(const opd_result *result)
{
	return result->reply.retry_after_us;
}

const char *opd_result_provider(const opd_result *result)
{
	return result->provider;
}

const char *opd_result_uuid(const opd_result *result)
{
	return result->uuid;
}

uint32_t opd_result_count(const opd_result *result)
{
	return result->output_count;
}

const opd_tensor *opd_result_tensor(const opd_result *result, uint32_t output)
{
	return output < result->output_count ? &result->outputs[output].tensor : NULL;
}

opd_handle opd_result_handle(const opd_result *result, uint32_t output)
{
	return output < result->output_count ? result->outputs[output].handle : (opd_handle){0};
}

const opd_explain *opd_result_explain(const opd_result *result)
{
	return result->explain;
}

const opd_graph_explain *opd_result_graph(const opd_result *result)
{
	return result->graph;
}

opd_handle opd_result_state(const opd_result *result, uint32_t state)
{
	const struct msg_run_reply *run = &result->reply.run;
	if (result->reply.kind != MSG_REPLY_RUN || state >= run->state_count)
		return (opd_handle){0};
	return (opd_handle){.index = run->states[state].index, .generation = run->states[state].generation};
}
