/* Inputs of a graph's run that lie on a device and are read by the CPU, or by another device: they come to host memory before it starts, one after the other. */
#include "server/bring.h"
#include "server/daemon.h"
#include "server/graph_run.h"
#include "server/request.h"

static struct buffer *input_buffer(const struct graph_run *run, uint32_t index)
{
	const struct graph_input *input = &run->graph->inputs[index];
	const struct request_run *own = &run->request->run;
	if (input->kind == MSG_GRAPH_CONSTANT)
		return input->constant->buffer;
	if (input->kind == MSG_GRAPH_STATE)
		return run->states[input->state].tensor->buffer;
	const opd_tensor *tensor = graph_run_operand(&own->bound, input);
	const struct kept_tensor *kept = own->kept[bound_index(&own->bound, tensor)];
	return kept == NULL ? NULL : kept->buffer;
}

static void take(struct graph_run *run, uint32_t index, struct buffer *host)
{
	const struct graph_input *input = &run->graph->inputs[index];
	run->hosts[index] = host;
	if (input->kind == MSG_GRAPH_INPUT)
		((opd_tensor *)graph_run_operand(&run->request->run.bound, input))->data = host->data;
}

static void brought(struct request *request)
{
	struct graph_run *run = request->graph_run;
	struct buffer *host = request->staged;
	request->staged = NULL;
	if (request->status == OPD_OK && request->cancelled)
		request->status = opd_fail(&request->error, OPD_CANCELLED, "graph '%s': the client cancelled the run", run->graph->name.data);
	if (request->status == OPD_OK) {
		buffer_add_mirror(input_buffer(run, run->bringing), host);
		take(run, run->bringing, host);
		graph_bring(run, run->bringing_to, run->brought);
		return;
	}
	buffer_unref(host);
	run->brought(run);
}

bool graph_brings(const struct graph_run *run)
{
	bool any = false;
	for (uint32_t i = 0; !any && i < run->graph->input_count; i++) {
		const struct buffer *buffer = input_buffer(run, i);
		any = buffer != NULL && buffer->device != 0;
	}
	return any;
}

void graph_bring(struct graph_run *run, uint32_t device, void (*ready)(struct graph_run *run))
{
	struct request *request = run->request;
	run->brought = ready;
	run->bringing_to = device;
	request->status = OPD_OK;
	for (uint32_t i = 0; i < run->graph->input_count; i++) {
		struct buffer *buffer = input_buffer(run, i);
		if (buffer == NULL || buffer->device == 0 || (device != 0 && buffer_is_on(buffer, device)) || (run->hosts != NULL && run->hosts[i] != NULL))
			continue;
		if (run->hosts == NULL)
			run->hosts = arena_array(&request->arena, run->graph->input_count, sizeof run->hosts[0]);
		if (run->hosts == NULL) {
			request->status = opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "graph '%s': out of memory", run->graph->name.data);
			break;
		}
		struct buffer *host = buffer_on(buffer, 0);
		if (host != NULL) {
			take(run, i, host);
			continue;
		}
		run->bringing = i;
		bring_to_host(request, buffer, 0, buffer->bytes, run->graph->name.data, brought);
		return;
	}
	ready(run);
}

void graph_bring_release(struct graph_run *run)
{
	for (uint32_t i = 0; run->hosts != NULL && i < run->graph->input_count; i++)
		buffer_unref(run->hosts[i]);
	run->hosts = NULL;
}

unsigned char *graph_host_data(const struct graph_run *run, uint32_t input, const struct kept_tensor *tensor)
{
	return run->hosts != NULL && run->hosts[input] != NULL ? run->hosts[input]->data : tensor->buffer->data;
}
