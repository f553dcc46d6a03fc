/* Graphs of a session: copying and checking their inputs, the table, the lists that hold for their nodes. */
#include "server/graph.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/text.h"
#include "server/daemon.h"
#include "server/graph_run.h"
#include "server/request.h"

#define GRAPH_ARENA_BYTES ((size_t)256 << 20)

static opd_status out_of_memory(opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "graph: out of memory");
}

/* ---- Names ---- */

static bool name_char(char c)
{
	return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
	       (c != '\0' && strchr("_.-:/", c) != NULL);
}

opd_status graph_check_name(const char *what, struct msg_text name, opd_error *error)
{
	bool good = name.bytes != 0 && name.bytes <= BOUND_NAME_BYTES;
	for (size_t i = 0; good && i < name.bytes; i++)
		good = name_char(name.data[i]);
	if (good)
		return OPD_OK;
	char shown[160];
	return opd_fail(error, OPD_INVALID_ARGUMENT, "graph: %s \"%s\": expected 1 to %u of A-Z a-z 0-9 _ . - : /", what,
	                text_escape(name.data == NULL ? "" : name.data, name.bytes, shown, sizeof shown), BOUND_NAME_BYTES);
}

opd_status graph_check_unique(struct arena *scratch, const char *what, const struct msg_text *names, uint32_t count,
                              opd_error *error)
{
	uint32_t size = 16;
	while (size < 2 * (uint64_t)count)
		size *= 2;
	uint32_t *table = arena_array(scratch, size, sizeof table[0]); /* index + 1 */
	if (table == NULL)
		return out_of_memory(error);
	for (uint32_t i = 0; i < count; i++) {
		uint32_t at = schema_hash(names[i].data, names[i].bytes) & (size - 1);
		for (; table[at] != 0; at = (at + 1) & (size - 1)) {
			const struct msg_text *other = &names[table[at] - 1];
			if (other->bytes == names[i].bytes && memcmp(other->data, names[i].data, other->bytes) == 0)
				return opd_fail(error, OPD_ALREADY_EXISTS, "graph: two %ss are called '%s': %u and %u", what, names[i].data,
				                (unsigned)table[at] - 1, (unsigned)i);
		}
		table[at] = i + 1;
	}
	return OPD_OK;
}

opd_status graph_node_error(const struct graph *graph, uint32_t node, opd_status status, opd_error *error)
{
	return opd_error_prefix(error, status, "node '%s'", graph->nodes[node].name.data);
}

/* ---- Inputs ---- */

/* The kept tensor that a state or a constant is bound to. */
static opd_status bind_kept(struct graph *graph, const struct msg_tensor *source, struct graph_input *input, opd_error *error)
{
	struct kept *kept = &graph->session->kept;
	if (source->source != MSG_SOURCE_HANDLE && source->source != MSG_SOURCE_RESULT)
		return opd_fail(error, OPD_INVALID_ARGUMENT,
		                "a state or a constant is bound to a kept tensor: give it a handle or a result");
	if (source->dtype != OPD_DTYPE_NONE || source->donate)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "it is bound whole: views and donations belong to the nodes");
	struct msg_handle handle = source->handle;
	if (source->source == MSG_SOURCE_RESULT) {
		handle = kept_handle(kept, source->result.request, source->result.output, error);
		if (handle.generation == 0)
			return (opd_status)error->status;
	}
	struct kept_tensor *tensor = kept_find(kept, handle, error);
	if (tensor == NULL)
		return (opd_status)error->status;
	if (input->kind == MSG_GRAPH_CONSTANT) {
		input->constant = tensor;
		return OPD_OK;
	}
	kept_tensor_unref(tensor);
	input->slot = handle.index;
	input->lineage = kept_lineage(kept, handle, error);
	return OPD_OK;
}

static opd_status add_input(struct graph *graph, const struct msg_graph_input *message, struct graph_input *input,
                            opd_error *error)
{
	opd_status status = graph_check_name("input", message->name, error);
	if (status != OPD_OK)
		return status;
	*input = (struct graph_input){.kind = message->kind, .donated = GRAPH_NONE};
	input->name = (struct msg_text){arena_text(&graph->arena, message->name.data, message->name.bytes), message->name.bytes};
	if (input->name.data == NULL)
		return out_of_memory(error);
	if (input->kind == MSG_GRAPH_INPUT) {
		if (graph->schema.param_count == BOUND_GRAPH_RUN_INPUTS)
			return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "graph: more than %u inputs are given at each run",
			                BOUND_GRAPH_RUN_INPUTS);
		input->param = graph->schema.param_count;
		graph->schema.params[graph->schema.param_count++] = (struct schema_param){
		    .name = input->name.data,
		    .name_bytes = (uint32_t)input->name.bytes,
		    .hash = schema_hash(input->name.data, input->name.bytes),
		    .type = SCHEMA_TENSOR,
		};
		return OPD_OK;
	}
	if (graph->state_count == BOUND_GRAPH_STATES)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "graph: more than %u states", BOUND_GRAPH_STATES);
	if (input->kind == MSG_GRAPH_STATE) {
		input->state = graph->state_count;
		graph->states[graph->state_count++] = (uint32_t)(input - graph->inputs);
	}
	return OPD_OK;
}

static int by_number(const void *a, const void *b)
{
	const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

/* Which tensors its runs change, so that runs that share one are soon found. */
static opd_status sort_slots(struct graph *graph, opd_error *error)
{
	graph->slots = arena_array(&graph->arena, graph->state_count, sizeof graph->slots[0]);
	if (graph->slots == NULL)
		return out_of_memory(error);
	for (uint32_t i = 0; i < graph->state_count; i++) {
		graph->slots[i] = graph->inputs[graph->states[i]].slot;
		graph->slot_mask |= 1ull << (graph->slots[i] % 64);
	}
	qsort(graph->slots, graph->state_count, sizeof graph->slots[0], by_number);
	for (uint32_t i = 1; i < graph->state_count; i++)
		if (graph->slots[i - 1] == graph->slots[i])
			return opd_fail(error, OPD_INVALID_ARGUMENT, "graph: two states are bound to one tensor, index %u",
			                (unsigned)graph->slots[i]);
	return OPD_OK;
}

static opd_status add_inputs(struct graph *graph, const struct msg_graph *message, struct arena *scratch, opd_error *error)
{
	if (message->input_count > BOUND_GRAPH_INPUTS)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "graph: %u inputs, at most %u", (unsigned)message->input_count,
		                BOUND_GRAPH_INPUTS);
	graph->inputs = arena_array(&graph->arena, message->input_count, sizeof graph->inputs[0]);
	graph->states = arena_array(&graph->arena, message->input_count, sizeof graph->states[0]);
	graph->schema.params = arena_array(&graph->arena, BOUND_GRAPH_RUN_INPUTS, sizeof graph->schema.params[0]);
	struct msg_text *names = arena_array(scratch, message->input_count, sizeof names[0]);
	if (graph->inputs == NULL || graph->states == NULL || graph->schema.params == NULL || names == NULL)
		return out_of_memory(error);
	for (uint32_t i = 0; i < message->input_count; i++) {
		graph->input_count = i + 1;
		opd_status status = add_input(graph, &message->inputs[i], &graph->inputs[i], error);
		if (status != OPD_OK)
			return status;
		names[i] = graph->inputs[i].name;
	}
	return graph_check_unique(scratch, "input", names, message->input_count, error);
}

/* ---- What its runs are calls of ---- */

/* "decode(Tensor ids, Tensor positions) -> (Tensor, Tensor)", for errors of runs. */
static bool write_schema(struct graph *graph)
{
	struct schema *schema = &graph->schema;
	size_t bytes = graph->name.bytes + 64 + 8 * (size_t)graph->output_count;
	for (uint32_t i = 0; i < schema->param_count; i++)
		bytes += schema->params[i].name_bytes + 9;
	char *text = arena_alloc(&graph->arena, bytes);
	if (text == NULL)
		return false;
	size_t at = (size_t)snprintf(text, bytes, "%s(", graph->name.data);
	for (uint32_t i = 0; i < schema->param_count; i++)
		at += (size_t)snprintf(text + at, bytes - at, "%sTensor %s", i == 0 ? "" : ", ", schema->params[i].name);
	at += (size_t)snprintf(text + at, bytes - at, ") -> (");
	for (uint32_t i = 0; i < graph->output_count; i++)
		at += (size_t)snprintf(text + at, bytes - at, "%sTensor", i == 0 ? "" : ", ");
	(void)snprintf(text + at, bytes - at, ")");
	schema->name = graph->name.data;
	schema->text = text;
	schema->result_count = graph->output_count;
	graph->op = (struct op){.schema = schema};
	return true;
}

/* ---- Life ---- */

static opd_status describe(struct graph *graph, const struct snapshot *snapshot, const struct msg_graph *message, opd_error *error)
{
	struct arena scratch;
	arena_init(&scratch, GRAPH_ARENA_BYTES);
	graph->name = message->name.bytes == 0 ? msg_text("graph")
	                                       : (struct msg_text){arena_text(&graph->arena, message->name.data, message->name.bytes),
	                                                           message->name.bytes};
	opd_status status = graph->name.data == NULL ? out_of_memory(error) : graph_check_name("name", graph->name, error);
	if (status == OPD_OK)
		status = add_inputs(graph, message, &scratch, error);
	arena_fini(&scratch);
	if (status == OPD_OK)
		status = graph_check(graph, snapshot, message, error);
	if (status == OPD_OK && !write_schema(graph))
		status = out_of_memory(error);
	return status;
}

opd_status graph_describe(const struct snapshot *snapshot, const struct msg_graph *message, uint64_t id, struct graph **graph_out, opd_error *error)
{
	struct graph *graph = calloc(1, sizeof *graph);
	if (graph == NULL)
		return out_of_memory(error);
	graph->refs = 1;
	graph->id = id;
	arena_init(&graph->arena, GRAPH_ARENA_BYTES);
	opd_status status = describe(graph, snapshot, message, error);
	if (status == OPD_OK)
		*graph_out = graph;
	else
		graph_unref(graph);
	return status;
}

/* Every node's op and list is one that the session's identity may use. */
static opd_status check_access(const struct graph *graph, const struct session *session, opd_error *error)
{
	struct access *access = session->access;
	struct log *log = session->server->log;
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < graph->node_count; i++) {
		const struct msg_run *run = &graph->nodes[i].run;
		status = access_check_op(access, run->op.data, log, error);
		if (status == OPD_OK && run->priority.present)
			status = access_check_providers(access, run->priority.names, run->priority.count, log, error);
		if (status != OPD_OK)
			return graph_node_error(graph, i, status, error);
	}
	return OPD_OK;
}

opd_status graph_bind(struct graph *graph, struct session *session, const struct msg_graph *message, opd_error *error)
{
	opd_status status = check_access(graph, session, error);
	graph->session = session;
	for (uint32_t i = 0; i < graph->input_count && status == OPD_OK; i++)
		if (graph->inputs[i].kind != MSG_GRAPH_INPUT && bind_kept(graph, &message->inputs[i].tensor, &graph->inputs[i], error) != OPD_OK)
			status = opd_error_prefix(error, (opd_status)error->status, "graph: input '%s'", graph->inputs[i].name.data);
	if (status == OPD_OK)
		status = sort_slots(graph, error);
	if (status != OPD_OK)
		return status;
	uint64_t bytes = sizeof *graph + graph->arena.used_bytes;
	status = account_charge(session->account, bytes, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "graph '%s'", graph->name.data);
	graph->charged_bytes = bytes;
	return OPD_OK;
}

opd_status graph_create(struct request *request, const struct msg_graph *message, uint64_t id, struct graph **graph_out)
{
	struct graph *graph = request->described; /* made on a lane, or found wrong there */
	opd_error *error = &request->error;
	opd_status status = (opd_status)error->status;
	request->described = NULL;
	if (graph == NULL && status == OPD_OK)
		status = graph_describe(request->snapshot, message, id, &graph, error);
	if (status == OPD_OK)
		status = graph_bind(graph, request->session, message, error);
	if (status == OPD_OK)
		*graph_out = graph;
	else
		graph_unref(graph);
	return status;
}

struct graph *graph_ref(struct graph *graph)
{
	graph->refs++;
	return graph;
}

void graph_unref(struct graph *graph)
{
	if (graph == NULL || --graph->refs != 0)
		return;
	prepared_drop_all(graph);
	graph_lists_unref(graph->lists);
	for (uint32_t i = 0; i < graph->input_count; i++)
		kept_tensor_unref(graph->inputs[i].constant);
	if (graph->charged_bytes != 0)
		account_release(graph->session->account, graph->charged_bytes);
	arena_fini(&graph->arena);
	free(graph);
}

/* ---- The table ---- */

struct graphs *graphs_get(struct session *session)
{
	if (session->graphs == NULL)
		session->graphs = calloc(1, sizeof *session->graphs);
	return session->graphs;
}

void graphs_destroy(struct graphs *graphs)
{
	if (graphs == NULL)
		return;
	for (uint32_t i = 0; i < graphs->count; i++)
		graph_unref(graphs->items[i]);
	free(graphs->items);
	free(graphs);
}

/* Where it is, or would be. */
static uint32_t table_place(const struct graphs *graphs, uint64_t id)
{
	uint32_t low = 0, high = graphs->count;
	while (low < high) {
		uint32_t middle = (low + high) / 2;
		if (graphs->items[middle]->id < id)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

opd_status graphs_find(struct session *session, uint64_t id, struct graph **graph_out, opd_error *error)
{
	const struct graphs *graphs = session->graphs;
	uint32_t place = graphs == NULL ? 0 : table_place(graphs, id);
	if (graphs == NULL || place == graphs->count || graphs->items[place]->id != id)
		return opd_fail(error, OPD_NOT_FOUND, "graph %" PRIu64 " is not registered in this session, or was freed", id);
	*graph_out = graphs->items[place];
	return OPD_OK;
}

/* Ids rise with the requests. */
static opd_status table_add(struct session *session, struct graph *graph, opd_error *error)
{
	struct graphs *graphs = session->graphs;
	if (graphs->count == BOUND_GRAPHS)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "graph: %u are registered in this session, no more may be", BOUND_GRAPHS);
	if (graphs->count == graphs->room) {
		uint32_t room = graphs->room == 0 ? 4 : graphs->room * 2;
		struct graph **items = realloc(graphs->items, room * sizeof items[0]);
		if (items == NULL)
			return out_of_memory(error);
		graphs->items = items;
		graphs->room = room;
	}
	graphs->items[graphs->count++] = graph;
	return OPD_OK;
}

/* When the request is accepted: a run that is sent right behind it finds the graph. */
opd_status graph_register_accept(struct request *request)
{
	struct graph *graph = NULL;
	if (graphs_get(request->session) == NULL)
		return out_of_memory(&request->error);
	opd_status status = graph_create(request, &request->message.graph, request->id, &graph);
	if (status == OPD_OK)
		status = table_add(request->session, graph, &request->error);
	if (status == OPD_OK)
		request->reply.registered = (struct msg_registered){graph->id, graph->node_count, graph->charged_bytes};
	else
		graph_unref(graph);
	return status;
}

void graph_register_start(struct request *request)
{
	request_reply(request, MSG_REPLY_REGISTERED);
}

opd_status graph_free_accept(struct request *request)
{
	struct graph *graph = NULL;
	opd_status status = graphs_find(request->session, request->message.graph_id, &graph, &request->error);
	if (status != OPD_OK)
		return status;
	struct graphs *graphs = request->session->graphs;
	uint32_t place = table_place(graphs, graph->id);
	graphs->count--;
	memmove(&graphs->items[place], &graphs->items[place + 1], (graphs->count - place) * sizeof graphs->items[0]);
	graph_unref(graph);
	return OPD_OK;
}
