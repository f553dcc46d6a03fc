#include "server/bring.h"

#include <string.h>

#include "server/daemon.h"
#include "server/device_run.h"
#include "server/request.h"

/* ---- Operands ---- */

/* The chosen implementation, or the check of its indices, reads the operand in host memory; or another device has it, and there is no copy here to start from. */
static bool needs_host(const struct request *request, uint32_t index)
{
	const struct request_run *run = &request->run;
	const struct impl *impl = run->dispatch.impl;
	if (impl->on_host)
		return true;
	if ((impl->def->flags & OPD_IMPL_CHECKS_INDICES) == 0 && device_is_index(run->op->def, &run->bound.operands[index]))
		return true;
	return !buffer_is_on(run->kept[index]->buffer, run->device);
}

/* The operand's host copy is where kernels look for it. */
static void place(struct request *request, uint32_t index, struct buffer *host)
{
	struct operand *operand = &request->run.bound.operands[index];
	buffer_unref(operand->buffer);
	operand->buffer = host;
	operand->tensor.data = host->data;
}

static void brought(struct request *request)
{
	struct buffer *host = request->staged;
	request->staged = NULL;
	if (request->status == OPD_OK && request->cancelled)
		request->status = opd_fail(&request->error, OPD_CANCELLED, "%s: the client cancelled the request", request->run.op->schema->name);
	if (request->status != OPD_OK) {
		buffer_unref(host);
		execute_done(request);
		return;
	}
	buffer_add_mirror(request->run.kept[request->run.bringing]->buffer, host);
	place(request, request->run.bringing, host);
	execute_run(request);
}

static void note_move(struct request *request, uint32_t index)
{
	struct request_run *run = &request->run;
	const struct device *devices = request->snapshot->devices;
	const struct kept_tensor *kept = run->kept[index];
	if (request->message.run.explain && run->moves == NULL)
		run->moves = arena_array(&request->arena, 2 * run->bound.operand_count + run->bound.call.output_count, sizeof run->moves[0]);
	if (run->moves != NULL)
		run->moves[run->move_count++] = (struct msg_move){msg_text(run->bound.operands[index].param), msg_text(devices[kept->buffer->device].name),
		                                                  msg_text(devices[0].name), kept->bytes};
}

bool bring_operands(struct request *request)
{
	struct request_run *run = &request->run;
	for (uint32_t i = 0; i < run->bound.operand_count; i++) {
		const struct kept_tensor *kept = run->kept[i];
		if (kept == NULL || run->bound.operands[i].tensor.data != NULL || !needs_host(request, i))
			continue;
		struct buffer *host = buffer_on(kept->buffer, 0);
		if (host != NULL) {
			place(request, i, host);
			continue;
		}
		run->bringing = i;
		note_move(request, i);
		bring_to_host(request, kept->buffer, 0, kept->bytes, run->op->schema->name, brought);
		return false;
	}
	return true;
}

/* ---- Anything ---- */

void bring_to_host(struct request *request, struct buffer *buffer, uint64_t offset, uint64_t bytes, const char *name, void (*ready)(struct request *request))
{
	request->staged = buffer->device == 0 ? buffer_ref(buffer) : NULL;
	request->status = OPD_OK;
	if (buffer_lost(buffer))
		request->status = opd_fail(&request->error, OPD_DATA_LOSS, "%s: the tensor is lost: it lay on %s, %s", name,
		                           request->snapshot->devices[buffer->device].name, buffer_lost_why(buffer));
	else if (request->staged == NULL)
		request->status = buffer_alloc(request->session->account, bytes, 0, &request->staged, &request->error);
	if (request->status != OPD_OK || buffer->device == 0) {
		ready(request);
		return;
	}
	request->move = (struct device_move){
		.device = buffer->device, .buffer = buffer, .offset = offset, .bytes = bytes, .host = request->staged->data, .out = true};
	device_move_start(request, name, ready);
}
