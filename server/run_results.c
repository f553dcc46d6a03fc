/* What a run gives: results kept, sent, inline, or only their shapes. */
#include <inttypes.h>
#include <string.h>

#include "proto/tensor.h"
#include "server/daemon.h"
#include "server/request.h"
#include "server/shared.h"

static bool donates(const struct request_run *run, uint32_t output)
{
	for (uint32_t i = 0; i < run->donation_count; i++)
		if (run->donations[i].result == output)
			return true;
	return false;
}

/* What is kept, and goes nowhere else, is the table's alone from now on: whoever has waited for it may be given its memory. */
static void let_go(struct request *request)
{
	struct request_run *run = &request->run;
	for (uint32_t i = 0; i < run->bound.call.output_count; i++) {
		if (!run_leaves_out(request, i))
			continue;
		buffer_unref(run->outputs[i]);
		run->outputs[i] = NULL;
		if (run->resident != NULL)
			buffer_unref(run->resident[i]);
		if (run->resident != NULL)
			run->resident[i] = NULL;
	}
	for (uint32_t i = 0; i < run->donation_count; i++) {
		const uint32_t operand = run->donations[i].operand;
		kept_tensor_unref(run->kept[operand]);
		run->kept[operand] = NULL;
	}
}

bool run_leaves_out(const struct request *request, uint32_t output)
{
	const struct msg_run *message = &request->message.run;
	return output < message->output_count && message->outputs[output].no_copy && message->outputs[output].shared.region == 0;
}

bool run_keeps(const struct request *request, uint32_t output)
{
	const struct msg_run *message = &request->message.run;
	return donates(&request->run, output) || (output < message->output_count && message->outputs[output].keep);
}

/* Where the result is: on a device if it stays there. */
static struct buffer *result_buffer(const struct request_run *run, uint32_t output)
{
	return run->resident != NULL && run->resident[output] != NULL ? run->resident[output] : run->outputs[output];
}

/* Kept outputs go into the session's table; false when there is no memory for that. */
static bool keep_outputs(struct request *request)
{
	struct request_run *run = &request->run;
	const struct msg_run *message = &request->message.run;
	uint32_t count = run->bound.call.output_count;
	struct kept_tensor **tensors = arena_array(&request->arena, count, sizeof tensors[0]);
	run->handles = arena_array(&request->arena, count, sizeof run->handles[0]);
	bool made = tensors != NULL && run->handles != NULL;
	for (uint32_t i = 0; made && i < count && i < message->output_count; i++) {
		const opd_tensor *output = &run->bound.outputs[i];
		if (!message->outputs[i].keep || donates(run, i))
			continue;
		tensors[i] = kept_tensor_create(output->dtype, output->rank, output->shape, output->elements * opd_dtype_bytes(output->dtype),
		                                result_buffer(run, i));
		made = tensors[i] != NULL;
	}
	if (!made || !donate_settle(request, run->handles)) {
		for (uint32_t i = 0; tensors != NULL && i < count; i++)
			kept_tensor_unref(tensors[i]);
		return false;
	}
	run->expected = false;
	let_go(request);
	kept_settle(&request->session->kept, request->id, tensors, count, run->handles);
	return true;
}

bool run_keep(struct request *request)
{
	return !request->run.expected || keep_outputs(request);
}

static bool fill_result(struct request *request, uint32_t index, struct msg_result *result)
{
	const struct msg_run *message = &request->message.run;
	const opd_tensor *output = &request->run.bound.outputs[index];
	struct msg_tensor *tensor = &result->tensor;
	tensor->dtype = output->dtype;
	tensor->rank = output->rank;
	memcpy(tensor->shape, output->shape, output->rank * sizeof output->shape[0]);
	if (request->run.handles != NULL)
		result->kept = request->run.handles[index];
	if (shared_fill(request, index, tensor) || (index < message->output_count && message->outputs[index].no_copy))
		return true;
	uint64_t bytes = output->elements * opd_dtype_bytes(output->dtype);
	if (message->inline_results) {
		tensor->source = MSG_SOURCE_INLINE;
		tensor->inlined.data = opd_tensor_data(output);
		tensor->inlined.bytes = bytes;
		return true;
	}
	return request_send(request, tensor, opd_tensor_data(output), bytes);
}

/* Results that the reply brings; those that it leaves out or that go to shared memory aren't in its envelope. */
static uint64_t sent_bytes(const struct request *request)
{
	const struct msg_run *message = &request->message.run;
	const struct bound *bound = &request->run.bound;
	uint64_t bytes = 0;
	for (uint32_t i = 0; i < bound->call.output_count; i++) {
		const bool stays = i < message->output_count && (message->outputs[i].no_copy || message->outputs[i].shared.region != 0);
		bytes += stays ? 0 : bound_bytes(&bound->outputs[i]); /* the sum of all was checked when they were bound */
	}
	return bytes;
}

opd_status run_check_inline(struct request *request)
{
	if (!request->message.run.inline_results || request->direct)
		return OPD_OK;
	const uint64_t limit = request->context->server->config->limits.envelope_bytes, bytes = sent_bytes(request);
	if (bytes > limit / 2)
		return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "%s: results of %" PRIu64 " bytes don't fit inline (at most %" PRIu64 "): take them as payload",
		                request->run.op->schema->name, bytes, limit / 2);
	return OPD_OK;
}

/* Nobody reads the operands any more, and the next request finds their memory warm instead of writing over that of all replies that wait to leave. */
static void drop_payload(struct request *request)
{
	if (request->direct)
		return;
	buffer_unref(request->payload);
	request->payload = NULL;
}

void run_reply_results(struct request *request)
{
	struct request_run *run = &request->run;
	uint32_t count = run->bound.call.output_count;
	const struct impl *impl = run->dispatch.impl;
	struct msg_result *results = arena_array(&request->arena, count, sizeof results[0]);
	bool filled = results != NULL && run_keep(request);
	for (uint32_t i = 0; filled && i < count; i++)
		filled = fill_result(request, i, &results[i]);
	if (!filled) {
		(void)run_out_of_memory(request);
		request_fail(request);
		return;
	}
	if (impl != NULL) { /* a graph has one a node */
		request->reply.run.provider = msg_text(impl->provider->name);
		if (request->message.run.uuid)
			request->reply.run.uuid = msg_text(impl->def->uuid);
		run_explain(request);
	}
	request->reply.run.outputs = results;
	request->reply.run.output_count = count;
	drop_payload(request);
	request_reply(request, MSG_REPLY_RUN);
}

void run_reply_fake(struct request *request)
{
	struct bound *bound = &request->run.bound;
	uint32_t count = bound->call.output_count;
	struct msg_result *results = arena_array(&request->arena, count, sizeof results[0]);
	if (results == NULL) {
		(void)run_out_of_memory(request);
		request_fail(request);
		return;
	}
	for (uint32_t i = 0; i < count; i++) {
		results[i].tensor.dtype = bound->outputs[i].dtype;
		results[i].tensor.rank = bound->outputs[i].rank;
		memcpy(results[i].tensor.shape, bound->outputs[i].shape, bound->outputs[i].rank * sizeof(int64_t));
	}
	request->reply.run.outputs = results;
	request->reply.run.output_count = count;
	if (request->run.dispatch.impl != NULL) {
		const struct impl *impl = request->run.dispatch.impl;
		request->reply.run.provider = msg_text(impl->provider->name);
		if (request->message.run.uuid)
			request->reply.run.uuid = msg_text(impl->def->uuid);
	}
	request_reply(request, MSG_REPLY_RUN);
}
