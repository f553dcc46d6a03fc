#include "server/shared.h"

#include <inttypes.h>
#include <string.h>

#include "proto/tensor.h"
#include "server/conn.h"
#include "server/daemon.h"
#include "server/donate.h"

/* Of integers, which are copied on the loop: 0.4 ms of it. */
#define COPY_BYTES (4ull << 20)

static const struct msg_shared_range *wanted(const struct request *request, uint32_t output)
{
	const struct msg_run *run = &request->message.run;
	return output < run->output_count && run->outputs[output].shared.region != 0 ? &run->outputs[output].shared : NULL;
}

static const char *op_name(const struct request *request)
{
	return request->run.op->schema->name;
}

/* Results' regions stand behind operands'. */
static struct region *result_region(const struct request *request, uint32_t output)
{
	return request->run.regions[request->run.bound.operand_count + output];
}

static bool is_integer(opd_dtype dtype)
{
	return dtype == OPD_i16 || dtype == OPD_i32 || dtype == OPD_i64 || dtype == OPD_i8 || dtype == OPD_u8 || dtype == OPD_bool;
}

/* ---- Taking ---- */

static opd_status take_named(struct request *request, uint32_t slot, uint32_t region, uint64_t offset, uint64_t bytes, const char *name, const char *what)
{
	uint64_t end;
	const struct conn *conn = request->session->conn;
	if (conn == NULL || (conn->features & CONN_SHM) == 0)
		return opd_fail(&request->error, OPD_UNIMPLEMENTED, "%s: %s: this session has no feature \"shm\"", name, what);
	struct region *found = regions_find(&request->session->regions, region, &request->error);
	if (found == NULL)
		return opd_error_prefix(&request->error, OPD_NOT_FOUND, "%s: %s", name, what);
	request->run.regions[slot] = found;
	if (offset % OPD_TENSOR_ALIGNMENT != 0)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s begins at byte %" PRIu64 " of region %u, expected a multiple of %d", name, what,
		                offset, (unsigned)region, OPD_TENSOR_ALIGNMENT);
	if (!size_add(offset, bytes, &end) || end > found->bytes)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s lies at bytes %" PRIu64 " + %" PRIu64 " of region %u, which has %" PRIu64,
		                name, what, offset, bytes, (unsigned)region, found->bytes);
	return OPD_OK;
}

static opd_status take(struct request *request, uint32_t slot, uint32_t region, uint64_t offset, uint64_t bytes, const char *what)
{
	return take_named(request, slot, region, offset, bytes, op_name(request), what);
}

opd_status shared_take_range(struct request *request, const char *what, const char *name, const struct msg_shared_range *range)
{
	request->run.regions = arena_array(&request->arena, 1, sizeof request->run.regions[0]);
	if (request->run.regions == NULL)
		return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", what);
	request->run.region_count = 1;
	return take_named(request, 0, range->region, range->offset, range->bytes, what, name);
}

unsigned char *shared_range(const struct request *request, uint64_t offset)
{
	return request->run.regions[0]->data + offset;
}

static opd_status take_result(struct request *request, uint32_t output)
{
	const struct msg_shared_range *range = wanted(request, output);
	char what[24];
	(void)snprintf(what, sizeof what, "result %u", (unsigned)output);
	if (range == NULL)
		return OPD_OK;
	if (request->message.run.outputs[output].keep)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s is to be kept, and can't lie in shared memory", op_name(request), what);
	return take(request, request->run.bound.operand_count + output, range->region, range->offset, range->bytes, what);
}

static bool uses_any(const struct request *request)
{
	const struct bound *bound = &request->run.bound;
	for (uint32_t i = 0; i < bound->operand_count; i++)
		if (bound->operands[i].source->source == MSG_SOURCE_SHARED)
			return true;
	for (uint32_t i = 0; i < request->message.run.output_count; i++)
		if (wanted(request, i) != NULL)
			return true;
	return false;
}

opd_status shared_take(struct request *request)
{
	const struct bound *bound = &request->run.bound;
	const uint32_t outputs = request->message.run.output_count;
	if (!uses_any(request))
		return OPD_OK;
	request->run.region_count = bound->operand_count + outputs;
	request->run.regions = arena_array(&request->arena, request->run.region_count, sizeof request->run.regions[0]);
	if (request->run.regions == NULL) {
		request->run.region_count = 0;
		return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "run: out of memory");
	}
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < bound->operand_count; i++) {
		const struct msg_tensor *source = bound->operands[i].source;
		if (source->source == MSG_SOURCE_SHARED)
			status = take(request, i, source->shared.region, source->shared.offset, source->shared.bytes, bound->operands[i].param);
	}
	for (uint32_t i = 0; status == OPD_OK && i < outputs; i++)
		status = take_result(request, i);
	return status;
}

void shared_release(struct request *request)
{
	for (uint32_t i = 0; i < request->run.region_count; i++)
		region_unref(request->run.regions[i]);
}

/* ---- Placing ---- */

static opd_status too_large(struct request *request, const char *what, uint64_t bytes)
{
	return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "%s: %s has %" PRIu64 " bytes of integers in shared memory, which are copied: at most %llu",
	                op_name(request), what, bytes, COPY_BYTES);
}

opd_status shared_place(struct request *request, uint32_t index)
{
	struct operand *operand = &request->run.bound.operands[index];
	const struct msg_tensor *source = operand->source;
	unsigned char *data = request->run.regions[index]->data + source->shared.offset;
	const uint64_t bytes = source->shared.bytes;
	if (is_integer(source->dtype)) {
		if (bytes > COPY_BYTES)
			return too_large(request, operand->param, bytes);
		opd_status status = buffer_alloc(request->session->account, bytes, 0, &operand->buffer, &request->error);
		if (status != OPD_OK)
			return status;
		memcpy(operand->buffer->data, data, bytes);
		data = operand->buffer->data;
	}
	return bind_place(request->run.op, operand, data, bytes, true, &request->error);
}

struct extent {
	const struct region *region;
	uint64_t begin;
	uint64_t end;
};

static bool overlap(const struct extent *a, const struct extent *b)
{
	return a->region->inode == b->region->inode && a->region->device == b->region->device && a->begin < b->end && b->begin < a->end && a->begin != a->end &&
	       b->begin != b->end;
}

static opd_status check_apart(struct request *request, uint32_t output, const struct extent *mine)
{
	const struct bound *bound = &request->run.bound;
	for (uint32_t i = 0; i < bound->operand_count; i++) {
		const struct msg_tensor *source = bound->operands[i].source;
		const struct extent other = {request->run.regions[i], source->shared.offset, source->shared.offset + source->shared.bytes};
		if (source->source == MSG_SOURCE_SHARED && overlap(mine, &other))
			return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: result %u overlaps %s in shared memory", op_name(request), (unsigned)output,
			                bound->operands[i].param);
	}
	for (uint32_t i = 0; i < output; i++) {
		const struct msg_shared_range *range = wanted(request, i);
		if (range == NULL)
			continue;
		const struct extent other = {result_region(request, i), range->offset, range->offset + range->bytes};
		if (overlap(mine, &other))
			return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: result %u overlaps result %u in shared memory", op_name(request), (unsigned)output,
			                (unsigned)i);
	}
	return OPD_OK;
}

opd_status shared_check_results(struct request *request)
{
	const struct bound *bound = &request->run.bound;
	if (request->run.regions == NULL)
		return OPD_OK;
	for (uint32_t i = 0; i < bound->call.output_count; i++) {
		const struct msg_shared_range *range = wanted(request, i);
		const uint64_t bytes = bound->outputs[i].elements * opd_dtype_bytes(bound->outputs[i].dtype); /* checked by bind_outputs */
		char what[24];
		(void)snprintf(what, sizeof what, "result %u", (unsigned)i);
		if (range == NULL)
			continue;
		if (run_keeps(request, i))
			return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s takes a donated operand's place, and can't lie in shared memory", op_name(request), what);
		if (bytes > range->bytes)
			return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "%s: %s has %" PRIu64 " bytes, but %" PRIu64 " of region %u were named", op_name(request),
			                what, bytes, range->bytes, (unsigned)range->region);
		if (is_integer(bound->outputs[i].dtype) && bytes > COPY_BYTES)
			return too_large(request, what, bytes);
		const struct extent mine = {result_region(request, i), range->offset, range->offset + range->bytes};
		opd_status status = check_apart(request, i, &mine);
		if (status != OPD_OK)
			return status;
	}
	return OPD_OK;
}

/* ---- Results ---- */

unsigned char *shared_result(const struct request *request, uint32_t output)
{
	const struct msg_shared_range *range = wanted(request, output);
	if (range == NULL || is_integer(request->run.bound.outputs[output].dtype))
		return NULL;
	return result_region(request, output)->data + range->offset;
}

bool shared_fill(struct request *request, uint32_t output, struct msg_tensor *tensor)
{
	const struct msg_shared_range *range = wanted(request, output);
	const opd_tensor *made = &request->run.bound.outputs[output];
	const uint64_t bytes = made->elements * opd_dtype_bytes(made->dtype);
	if (range == NULL)
		return false;
	unsigned char *there = result_region(request, output)->data + range->offset;
	if (opd_tensor_data(made) != there && bytes != 0)
		memcpy(there, opd_tensor_data(made), bytes);
	tensor->source = MSG_SOURCE_SHARED;
	tensor->shared.region = range->region;
	tensor->shared.offset = range->offset;
	tensor->shared.bytes = bytes;
	return true;
}

/* ---- Requests ---- */

void region_attach_start(struct request *request)
{
	struct session *session = request->session;
	if (session->conn == NULL || (session->conn->features & CONN_SHM) == 0) {
		(void)opd_fail(&request->error, OPD_FAILED_PRECONDITION,
		               "attach_memory: the session has no feature \"shm\": it is there over a Unix socket, for a client whose Hello names it");
		request_fail(request);
		return;
	}
	const int fd = conn_take_descriptor(session->conn);
	uint32_t id = 0;
	opd_status status = fd < 0 ? opd_fail(&request->error, OPD_INVALID_ARGUMENT, "attach_memory: no descriptor came with the request's first byte")
	                           : regions_attach(&session->regions, session->account, &request->context->server->config->limits, fd, request->message.memory_bytes, &id, &request->error);
	if (fd >= 0)
		conn_let_go(session->conn, fd);
	if (status != OPD_OK) {
		request_fail(request);
		return;
	}
	request->reply.memory.region = id;
	request->reply.memory.bytes = request->message.memory_bytes;
	request_reply(request, MSG_REPLY_MEMORY);
}

void region_detach_start(struct request *request)
{
	if (regions_detach(&request->session->regions, request->message.region, &request->error) != OPD_OK)
		(void)opd_error_prefix(&request->error, OPD_NOT_FOUND, "detach_memory");
	request_reply_empty(request);
}
