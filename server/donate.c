#include "server/donate.h"

#include <assert.h>
#include <inttypes.h>
#include <string.h>

#include "server/graph_run.h"
#include "server/request.h"

/* ---- Accepting ---- */

/* The result that stands in a pair with the operand; UINT32_MAX: none. */
static uint32_t find_pair(const struct op *op, const struct operand *operand)
{
	for (uint32_t i = 0; i < op->def->in_place_count; i++)
		if (strcmp(op->schema->params[op->def->in_place[i].param].name, operand->param) == 0)
			return op->def->in_place[i].result;
	return UINT32_MAX;
}

/* Both are there and the same tensor, or the same result still to come. */
static bool same_tensor(const struct request_run *run, uint32_t a, uint32_t b)
{
	const struct msg_tensor *x = run->bound.operands[a].source, *y = run->bound.operands[b].source;
	if (run->kept[a] != NULL || run->kept[b] != NULL)
		return run->kept[a] == run->kept[b];
	return x->source == MSG_SOURCE_RESULT && y->source == MSG_SOURCE_RESULT && x->result.request == y->result.request && x->result.output == y->result.output;
}

/* Nobody else of this call may read it. */
static opd_status check_readers(struct request *request, uint32_t index)
{
	const struct request_run *run = &request->run;
	for (uint32_t i = 0; i < run->bound.operand_count; i++)
		if (i != index && same_tensor(run, i, index))
			return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s is donated, but %s is the same tensor", run->op->schema->name,
			                run->bound.operands[index].param, run->bound.operands[i].param);
	return OPD_OK;
}

static opd_status find_handle(struct request *request, const struct msg_tensor *source, struct msg_handle *handle_out)
{
	*handle_out = source->source == MSG_SOURCE_HANDLE
	                  ? source->handle
	                  : kept_handle(&request->session->kept, source->result.request, source->result.output, &request->error);
	return handle_out->generation == 0 ? (opd_status)request->error.status : OPD_OK;
}

/* The tensor is there: which one it is, and that it may be given. */
static opd_status find_tensor(struct request *request, struct donation *donation)
{
	const struct request_run *run = &request->run;
	const struct operand *operand = &run->bound.operands[donation->operand];
	const char *name = run->op->schema->name;
	if (run->kept[donation->operand]->hold != NULL)
		return opd_fail(&request->error, OPD_FAILED_PRECONDITION, "%s: %s is donated, but it is published, hence read-only", name, operand->param);
	opd_status status = find_handle(request, operand->source, &donation->handle);
	if (status != OPD_OK)
		return status;
	if (graphs_run_uses(request->session, donation->handle.index))
		return opd_fail(&request->error, OPD_FAILED_PRECONDITION, "%s: %s is donated, but it is the state of a graph's run that hasn't ended", name,
		                operand->param);
	donation->lineage = kept_lineage(&request->session->kept, donation->handle, &request->error);
	return donation->lineage == 0 ? (opd_status)request->error.status : OPD_OK;
}

static opd_status prepare(struct request *request, uint32_t index, struct donation *donation)
{
	struct request_run *run = &request->run;
	const struct operand *operand = &run->bound.operands[index];
	const struct msg_tensor *source = operand->source;
	const char *name = run->op->schema->name;
	if (source->source != MSG_SOURCE_HANDLE && source->source != MSG_SOURCE_RESULT)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s is donated: expected a kept tensor, a handle or a result", name, operand->param);
	*donation = (struct donation){.operand = index, .result = find_pair(run->op, operand), .promised = run->kept[index] == NULL};
	if (donation->result == UINT32_MAX)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s is donated, but no result may take its place; schema: %s", name, operand->param,
		                run->op->schema->text);
	opd_status status = check_readers(request, index);
	return status != OPD_OK || donation->promised ? status : find_tensor(request, donation);
}

/* From here on its old name is refused. */
static void give(struct request *request, struct donation *donation)
{
	donation->handle = kept_give(&request->session->kept, donation->handle.index, request->id);
	donation->open = true;
}

static uint32_t count_donated(const struct bound *bound)
{
	uint32_t count = 0;
	for (uint32_t i = 0; i < bound->operand_count; i++)
		count += bound->operands[i].source->donate;
	return count;
}

opd_status donate_accept(struct request *request)
{
	struct request_run *run = &request->run;
	const uint32_t count = count_donated(&run->bound);
	uint32_t filled = 0;
	opd_status status = OPD_OK;
	if (count == 0)
		return OPD_OK;
	if (request->message.kind != MSG_REQUEST_RUN)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: an input of a graph is donated: make it a state", run->op->schema->name);
	struct donation *donations = arena_array(&request->arena, count, sizeof donations[0]);
	if (donations == NULL)
		return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", run->op->schema->name);
	for (uint32_t i = 0; i < run->bound.operand_count && status == OPD_OK; i++)
		if (run->bound.operands[i].source->donate)
			status = prepare(request, i, &donations[filled++]);
	if (status != OPD_OK || request->message.run.mode != MSG_RUN) /* one that only asks donates nothing */
		return status;
	run->donations = donations;
	run->donation_count = count;
	for (uint32_t i = 0; i < count; i++) {
		const struct msg_tensor *source = run->bound.operands[donations[i].operand].source;
		if (donations[i].promised)
			kept_promise(&request->session->kept, source->result.request, source->result.output, request->id);
		else
			give(request, &donations[i]);
	}
	return OPD_OK;
}

opd_status donate_arrived(struct request *request, uint32_t operand)
{
	struct request_run *run = &request->run;
	for (uint32_t i = 0; i < run->donation_count; i++) {
		struct donation *donation = &run->donations[i];
		if (!donation->promised || donation->operand != operand)
			continue;
		donation->promised = false;
		opd_status status = find_tensor(request, donation);
		if (status == OPD_OK)
			give(request, donation);
		return status;
	}
	return OPD_OK;
}

opd_status donate_check(struct request *request)
{
	const struct request_run *run = &request->run;
	for (uint32_t i = 0; i < run->donation_count; i++) {
		const struct operand *operand = &run->bound.operands[run->donations[i].operand];
		const opd_tensor *given = &operand->tensor;
		const opd_tensor *result = &run->bound.outputs[run->donations[i].result];
		const char *name = run->op->schema->name;
		const uint64_t bytes = given->elements * opd_dtype_bytes(given->dtype);
		if (!opd_tensor_contiguous(given) || given->byte_offset != 0 || bytes != run->kept[run->donations[i].operand]->bytes)
			return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s is donated, but only %" PRIu64 " of its %" PRIu64 " bytes, or in another layout, are named",
			                name, operand->param, bytes, run->kept[run->donations[i].operand]->bytes);
		if (given->dtype != result->dtype || given->rank != result->rank || memcmp(given->shape, result->shape, given->rank * sizeof given->shape[0]) != 0)
			return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s is donated, but result %u has another dtype or shape", name, operand->param,
			                (unsigned)run->donations[i].result);
	}
	return OPD_OK;
}

/* ---- Running ---- */

void donate_again(struct request *request)
{
	struct request_run *run = &request->run;
	for (uint32_t i = 0; i < run->donation_count && run->outputs != NULL; i++) {
		buffer_unref(run->outputs[run->donations[i].result]);
		run->outputs[run->donations[i].result] = NULL;
	}
	for (uint32_t i = 0; i < run->donation_count; i++)
		run->donations[i].in_place = false;
}

/* The slot and this request. Nobody new gets hold of it: its former handle is refused. */
static bool is_alone(const struct kept_tensor *tensor)
{
	return atomic_load_explicit(&tensor->refs, memory_order_acquire) == 2 && atomic_load_explicit(&tensor->buffer->refs, memory_order_acquire) == 1;
}

struct donation *donate_of(struct request *request, uint32_t operand)
{
	struct request_run *run = &request->run;
	for (uint32_t i = 0; i < run->donation_count; i++)
		if (run->donations[i].operand == operand)
			return &run->donations[i];
	return NULL;
}

bool donate_in_place(struct request *request, struct donation *donation)
{
	const struct kept_tensor *tensor = request->run.kept[donation->operand];
	donation->in_place = (request->run.dispatch.impl->def->flags & OPD_IMPL_IN_PLACE) != 0 && is_alone(tensor);
	if (donation->in_place)
		buffer_drop_mirrors(tensor->buffer, NULL);
	return donation->in_place;
}

struct buffer *donate_output(struct request *request, uint32_t index)
{
	struct request_run *run = &request->run;
	for (uint32_t i = 0; i < run->donation_count; i++) {
		struct donation *donation = &run->donations[i];
		const struct kept_tensor *tensor = run->kept[donation->operand];
		if (donation->result != index)
			continue;
		return tensor->buffer->device == 0 && donate_in_place(request, donation) ? buffer_ref(tensor->buffer) : NULL;
	}
	return NULL;
}

bool donate_is_in_place(const struct request *request, uint32_t index)
{
	const struct request_run *run = &request->run;
	for (uint32_t i = 0; i < run->donation_count; i++)
		if (run->donations[i].result == index)
			return run->donations[i].in_place;
	return false;
}

bool donate_is_written(const struct request *request)
{
	const struct request_run *run = &request->run;
	bool in_place = false;
	for (uint32_t i = 0; i < run->donation_count; i++)
		in_place = in_place || run->donations[i].in_place;
	return in_place && run->written;
}

/* ---- Ending ---- */

bool donate_settle(struct request *request, struct msg_handle *handles)
{
	struct request_run *run = &request->run;
	for (uint32_t i = 0; i < run->donation_count; i++) {
		struct donation *donation = &run->donations[i];
		const opd_tensor *output = &run->bound.outputs[donation->result];
		const struct kept_tensor *before = run->kept[donation->operand];
		struct buffer *buffer = run->resident != NULL && run->resident[donation->result] != NULL ? run->resident[donation->result] : run->outputs[donation->result];
		struct kept_tensor *tensor = kept_tensor_create(output->dtype, output->rank, output->shape, before->bytes, buffer);
		if (tensor == NULL)
			return false;
		tensor->id = before->id;
		tensor->version = before->version + 1;
		kept_replace(&request->session->kept, donation->handle.index, donation->lineage, tensor);
		kept_given(&request->session->kept, donation->handle);
		handles[donation->result] = donation->handle;
		donation->open = false;
	}
	return true;
}

void donate_failed(struct request *request)
{
	struct request_run *run = &request->run;
	struct kept *kept = &request->session->kept;
	for (uint32_t i = 0; i < run->donation_count; i++) {
		struct donation *donation = &run->donations[i];
		const struct msg_tensor *source = run->bound.operands[donation->operand].source;
		if (donation->promised)
			kept_unpromise(kept, source->result.request, source->result.output, request->id);
		donation->promised = false;
		if (!donation->open)
			continue;
		donation->open = false;
		kept_given(kept, donation->handle);
		kept_take_back(kept, donation->handle); /* also a lost one's: it is the handle that the client has */
		if (run->written && donation->in_place)
			kept_lose(kept, donation->handle.index, donation->lineage, request->id);
	}
}
