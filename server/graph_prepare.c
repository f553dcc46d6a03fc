/* Preparing a graph for one set of shapes: results inferred, implementations chosen, memory planned. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "proto/tensor.h"
#include "server/daemon.h"
#include "server/graph_run.h"
#include "server/module.h"
#include "server/request.h"

#define PREPARED_ARENA_BYTES ((size_t)1 << 30)
/* Memory is charged each time after so many nodes. */
#define CHARGE_NODES 256u
#define BASE_ARENA 0u
#define NO_ITEM UINT32_MAX

/* Where a value lies. */
struct place {
	uint32_t base;
	uint32_t item; /* of the arena */
};

struct pending_patch {
	opd_tensor *tensor;
	struct place place;
};

/* What is only needed while preparing; in `scratch`. */
struct preparing {
	struct graph_run *run;
	struct graph *graph;
	struct prepared *prepared;
	const struct bound *operands; /* the run's */
	struct plans *plans;
	struct log *log;
	struct arena scratch;
	const opd_tensor **values; /* [value_count]: descriptions */
	struct place *places;      /* [value_count] */
	struct plan_item *items;
	uint32_t item_count;
	uint32_t item_room;
	struct pending_patch *patches;
	uint32_t patch_count;
	uint32_t patch_room;
	uint32_t copy_room;
	uint32_t donate_count;
	opd_error *error;
};

static opd_status out_of_memory(opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
}

/* ---- Life ---- */

static void prepared_destroy(struct prepared *prepared)
{
	for (uint32_t i = 0; i < prepared->step_count; i++)
		dispatch_fini(&prepared->steps[i].dispatch);
	graph_lists_unref(prepared->lists);
	snapshot_unref(prepared->snapshot);
	if (prepared->charged_bytes != 0)
		account_release(prepared->account, prepared->charged_bytes);
	account_unref(prepared->account);
	arena_fini(&prepared->arena);
	free(prepared);
}

void prepared_drop_all(struct graph *graph)
{
	while (graph->prepared != NULL) {
		struct prepared *prepared = graph->prepared;
		graph->prepared = prepared->next;
		prepared_destroy(prepared);
	}
}

static bool same_layout(const opd_tensor *a, const opd_tensor *b)
{
	return a->dtype == b->dtype && a->alignment == b->alignment && opd_tensor_same_shape(a, b) &&
	       memcmp(a->strides, b->strides, a->rank * sizeof a->strides[0]) == 0;
}

/* Of element 0's address, as far as kernels look. */
static uint32_t operand_alignment(const opd_tensor *tensor)
{
	return tensor->alignment < OPD_TENSOR_ALIGNMENT ? tensor->alignment : OPD_TENSOR_ALIGNMENT;
}

static bool fits(const struct prepared *prepared, const struct graph_run *run)
{
	const struct graph *graph = run->graph;
	const struct request *request = run->request;
	if (prepared->lists != run->lists || prepared->snapshot != request->snapshot ||
	    prepared->checked != atomic_load_explicit(&request->context->server->checked, memory_order_relaxed))
		return false;
	for (uint32_t i = 0; i < graph->input_count; i++)
		if (graph->inputs[i].kind == MSG_GRAPH_INPUT &&
		    !same_layout(&prepared->inputs[i].tensor, graph_run_operand(&request->run.bound, &graph->inputs[i])))
			return false;
	return true;
}

struct prepared *prepared_find(struct graph_run *run)
{
	struct prepared **link = &run->graph->prepared;
	while (*link != NULL && !fits(*link, run))
		link = &(*link)->next;
	struct prepared *found = *link;
	if (found == NULL)
		return NULL;
	*link = found->next;
	found->next = run->graph->prepared;
	run->graph->prepared = found;
	return found;
}

/* Those that no run can use any more, and the oldest beyond the bound. */
static void drop_stale(struct graph_run *run)
{
	struct prepared **link = &run->graph->prepared;
	uint32_t left = 0;
	while (*link != NULL) {
		struct prepared *prepared = *link;
		if (prepared->snapshot == run->request->snapshot && prepared->lists == run->lists && ++left < PREPARED_MAX) {
			link = &prepared->next;
			continue;
		}
		*link = prepared->next;
		prepared_destroy(prepared);
	}
}

/* ---- Growing lists ---- */

static void *grow(struct arena *arena, void *array, uint32_t count, uint32_t *room, size_t element)
{
	if (count < *room)
		return array;
	uint32_t larger = *room == 0 ? 64 : *room * 2;
	void *grown = arena_alloc(arena, larger * element);
	if (grown == NULL)
		return NULL;
	if (count != 0)
		memcpy(grown, array, count * element);
	*room = larger;
	return grown;
}

static bool add_patch(struct preparing *p, opd_tensor *tensor, struct place place)
{
	struct pending_patch *patches = grow(&p->scratch, p->patches, p->patch_count, &p->patch_room, sizeof patches[0]);
	if (patches == NULL)
		return false;
	p->patches = patches;
	patches[p->patch_count++] = (struct pending_patch){tensor, place};
	return true;
}

/* Bytes of the arena from this step on. False: out of memory, or past what fits. */
static bool add_item(struct preparing *p, uint32_t step, uint64_t bytes, struct place *place_out)
{
	struct plan_item *items = grow(&p->scratch, p->items, p->item_count, &p->item_room, sizeof items[0]);
	uint64_t aligned;
	if (items == NULL || !size_align(bytes, &aligned))
		return false;
	p->items = items;
	items[p->item_count] = (struct plan_item){.first = step, .last = step, .bytes = aligned};
	*place_out = (struct place){BASE_ARENA, p->item_count++};
	return true;
}

static bool add_copy(struct preparing *p, const opd_tensor *from, const opd_tensor *to)
{
	struct prepared *prepared = p->prepared;
	struct copy *copies = grow(&prepared->arena, prepared->copies, prepared->copy_count, &p->copy_room, sizeof copies[0]);
	if (copies == NULL)
		return false;
	prepared->copies = copies;
	copies[prepared->copy_count++] = (struct copy){from, to};
	return true;
}

static uint64_t tensor_size(const opd_tensor *tensor)
{
	return tensor->elements * opd_dtype_bytes(tensor->dtype); /* checked where it was described */
}

static opd_tensor *copy_tensor(struct arena *arena, const opd_tensor *tensor)
{
	opd_tensor *copy = arena_alloc(arena, sizeof *copy);
	if (copy != NULL)
		*copy = *tensor;
	return copy;
}

/* ---- Inputs ---- */

static void describe_kept(struct prepared_input *input, const struct kept_tensor *kept)
{
	memcpy(input->shape, kept->shape, kept->rank * sizeof kept->shape[0]);
	tensor_row_major(kept->rank, input->shape, input->strides);
	tensor_describe(&input->tensor, kept->dtype, kept->rank, input->shape, input->strides, 0);
	input->tensor.alignment = OPD_TENSOR_ALIGNMENT;
}

/* As the run's operand is, but counted from its element 0. */
static void describe_operand(struct prepared_input *input, const opd_tensor *operand)
{
	memcpy(input->shape, operand->shape, operand->rank * sizeof operand->shape[0]);
	memcpy(input->strides, operand->strides, operand->rank * sizeof operand->strides[0]);
	tensor_describe(&input->tensor, operand->dtype, operand->rank, input->shape, input->strides, 0);
	input->tensor.alignment = operand_alignment(operand);
}

static void describe_inputs(struct preparing *p)
{
	for (uint32_t i = 0; i < p->graph->input_count; i++) {
		const struct graph_input *input = &p->graph->inputs[i];
		struct prepared_input *described = &p->prepared->inputs[i];
		if (input->kind == MSG_GRAPH_INPUT)
			describe_operand(described, graph_run_operand(p->operands, input));
		else
			describe_kept(described, input->kind == MSG_GRAPH_CONSTANT ? input->constant : p->run->states[input->state].tensor);
		if (input->kind == MSG_GRAPH_CONSTANT) {
			described->tensor.id = input->constant->id;
			described->tensor.version = input->constant->version;
			described->tensor.flags |= OPD_TENSOR_CONSTANT;
		}
	}
}

/* ---- Operands ---- */

/* A view of an input or of a node's output: inside it, of its dtype. */
static opd_status place_view(struct preparing *p, const struct op *op, struct operand *operand, const opd_tensor *from)
{
	struct msg_tensor *view = operand->source;
	if (view->rank != 0 && view->shape[0] == -1 && from->rank != 0) /* as many rows as there are */
		view->shape[0] = from->shape[0];
	if (view->dtype != from->dtype)
		return opd_fail(p->error, OPD_INVALID_ARGUMENT, "%s: %s views a tensor of %s as %s", op->schema->name, operand->param, opd_dtype_name(from->dtype),
		                opd_dtype_name(view->dtype));
	if (!opd_tensor_contiguous(from))
		return opd_fail(p->error, OPD_INVALID_ARGUMENT, "%s: %s views an input that is strided itself: give that input row-major", op->schema->name,
		                operand->param);
	opd_status status = bind_place(op, operand, NULL, tensor_size(from), false, p->error);
	if (status != OPD_OK)
		return status;
	uint32_t alignment = tensor_alignment(NULL, operand->tensor.byte_offset);
	operand->tensor.alignment = alignment < from->alignment ? alignment : from->alignment;
	operand->tensor.id = from->id;
	operand->tensor.version = from->version;
	operand->tensor.flags |= from->flags & OPD_TENSOR_CONSTANT;
	return OPD_OK;
}

static opd_status place_operand(struct preparing *p, uint32_t step, const struct op *op, struct operand *operand)
{
	struct msg_tensor *source = arena_alloc(&p->prepared->arena, sizeof *source); /* placing fills it in: the graph's stays as it was given */
	if (source == NULL)
		return out_of_memory(p->error);
	*source = *operand->source;
	operand->source = source;
	bool from_node = source->source == MSG_SOURCE_NODE;
	uint32_t value = from_node ? graph_value_of(p->graph, source) : 0;
	const opd_tensor *from = from_node ? p->values[value] : &p->prepared->inputs[source->graph_input].tensor;
	struct place place = from_node ? p->places[value] : (struct place){1 + source->graph_input, NO_ITEM};
	opd_status status = OPD_OK;
	if (source->dtype == OPD_DTYPE_NONE)
		operand->tensor = *from;
	else
		status = place_view(p, op, operand, from);
	if (status != OPD_OK)
		return status;
	if (place.base == BASE_ARENA)
		p->items[place.item].last = step;
	return add_patch(p, &operand->tensor, place) ? OPD_OK : out_of_memory(p->error);
}

/* ---- Choosing ---- */

static opd_status choose(struct preparing *p, struct step *step, const struct op *op, const struct graph_node *node)
{
	struct dispatch *dispatch = &step->dispatch;
	opd_status status = dispatch_init(dispatch, p->prepared->snapshot, p->prepared->lists->effective[step->node], p->plans, p->log, op,
	                                  node->run.strict, p->error);
	if (status != OPD_OK)
		return status;
	bool accepted = dispatch_walk(dispatch, &step->bound.call);
	while (accepted && dispatch->plan_missing) {
		status = plans_make(p->plans, dispatch->snapshot, dispatch->impl, &step->bound.call, &dispatch->plan, p->error);
		if (status != OPD_OK)
			return status;
		dispatch->plan_missing = false;
		if (dispatch->plan->refused)
			accepted = dispatch_next(dispatch, &step->bound.call);
	}
	if (!accepted)
		return dispatch_refused(dispatch, op, &step->bound.call, &p->scratch, p->error);
	if (!dispatch->impl->on_host)
		return opd_fail(p->error, OPD_UNIMPLEMENTED, "%s: %s runs on %s, and graphs run on the CPU so far: name a provider of the CPU, or device \"cpu\"",
		                op->schema->name, dispatch->impl->provider->name, dispatch->impl->def->device);
	step->impl = dispatch->impl;
	step->def = op->def;
	step->plan = dispatch->plan == NULL ? NULL : &dispatch->plan->made;
	uint64_t cost = step->impl->def->cost_ns == NULL ? 0 : step->impl->def->cost_ns(step->impl->def, &step->bound.call);
	p->prepared->can_be_inline = p->prepared->can_be_inline && cost != 0 && step->impl->provider->module->library == NULL;
	p->prepared->cost_ns += cost;
	return OPD_OK;
}

/* ---- Results ---- */

static uint64_t canary(const struct preparing *p)
{
	return p->prepared->checked ? GRAPH_CANARY_BYTES : 0;
}

/* The donated operand whose place a result takes; NULL: none. */
static const struct operand *donated_operand(const struct op *op, const struct step *step, uint32_t result)
{
	for (uint32_t i = 0; i < op->def->in_place_count; i++) {
		if (op->def->in_place[i].result != result)
			continue;
		const opd_arg *arg = &step->bound.args[op->def->in_place[i].param];
		for (uint32_t k = 0; arg->kind == OPD_ARG_TENSOR && k < step->bound.operand_count; k++)
			if (arg->tensor == &step->bound.operands[k].tensor)
				return step->bound.operands[k].source->donate ? &step->bound.operands[k] : NULL;
	}
	return NULL;
}

/* A result that replaces a state: there at once if the implementation works in place, else copied there. */
static opd_status place_state(struct preparing *p, uint32_t index, struct step *step, opd_tensor *output, uint32_t input, bool in_place)
{
	struct place there = {1 + input, NO_ITEM}, aside;
	p->prepared->donates[p->donate_count++] = p->graph->inputs[input].state;
	step->donate_count++;
	if (in_place)
		return add_patch(p, output, there) ? OPD_OK : out_of_memory(p->error);
	opd_tensor *target = copy_tensor(&p->prepared->arena, output);
	if (target == NULL || !add_item(p, index, tensor_size(output), &aside) || !add_patch(p, output, aside) || !add_patch(p, target, there) ||
	    !add_copy(p, output, target))
		return out_of_memory(p->error);
	step->copy_count++;
	return OPD_OK;
}

static opd_status place_donated(struct preparing *p, uint32_t index, struct step *step, const struct op *op, uint32_t result, const struct operand *operand)
{
	opd_tensor *output = &step->bound.outputs[result];
	const struct msg_tensor *source = operand->source;
	uint32_t value = p->graph->nodes[step->node].first_value + result;
	bool in_place = (step->impl->def->flags & OPD_IMPL_IN_PLACE) != 0;
	struct place from = source->source == MSG_SOURCE_NODE ? p->places[graph_value_of(p->graph, source)] : (struct place){1 + source->graph_input, NO_ITEM};
	if (output->dtype != operand->tensor.dtype || !opd_tensor_same_shape(output, &operand->tensor))
		return opd_fail(p->error, OPD_INVALID_ARGUMENT, "%s: %s is donated, but result %u has another dtype or shape", op->schema->name, operand->param,
		                (unsigned)result);
	const opd_tensor *whole = source->source == MSG_SOURCE_NODE ? p->values[graph_value_of(p->graph, source)] : &p->prepared->inputs[source->graph_input].tensor;
	if (tensor_size(output) != tensor_size(whole))
		return opd_fail(p->error, OPD_INVALID_ARGUMENT, "%s: %s is donated as a part of %" PRIu64 " of its %" PRIu64 " bytes: a donated operand is a whole tensor",
		                op->schema->name, operand->param, tensor_size(output), tensor_size(whole));
	p->places[value] = from;
	if (from.base != BASE_ARENA)
		return place_state(p, index, step, output, from.base - 1, in_place);
	if (!in_place && !add_item(p, index, tensor_size(output) + canary(p), &p->places[value]))
		return out_of_memory(p->error);
	return add_patch(p, output, p->places[value]) ? OPD_OK : out_of_memory(p->error);
}

/* A result of its own: the reply's buffer when it is wanted, else a part of the arena. */
static opd_status place_fresh(struct preparing *p, uint32_t index, struct step *step, uint32_t result)
{
	opd_tensor *output = &step->bound.outputs[result];
	uint32_t value = p->graph->nodes[step->node].first_value + result;
	const struct graph_value *described = &p->graph->values[value];
	if (described->output != GRAPH_NONE)
		p->places[value] = (struct place){1 + p->graph->input_count + described->output, NO_ITEM};
	else if (!add_item(p, index, tensor_size(output) + canary(p), &p->places[value]))
		return out_of_memory(p->error);
	return add_patch(p, output, p->places[value]) ? OPD_OK : out_of_memory(p->error);
}

static opd_status place_results(struct preparing *p, uint32_t index, struct step *step, const struct op *op)
{
	opd_status status = OPD_OK;
	step->donates = p->donate_count;
	step->copies = p->prepared->copy_count;
	for (uint32_t i = 0; status == OPD_OK && i < step->bound.call.output_count; i++) {
		const struct operand *donated = donated_operand(op, step, i);
		p->values[p->graph->nodes[step->node].first_value + i] = &step->bound.outputs[i];
		status = donated != NULL ? place_donated(p, index, step, op, i, donated) : place_fresh(p, index, step, i);
	}
	struct place scratch;
	if (status != OPD_OK || step->plan == NULL || step->plan->scratch_bytes == 0)
		return status;
	step->scratch = arena_zalloc(&p->prepared->arena, sizeof *step->scratch);
	if (step->scratch == NULL || !add_item(p, index, step->plan->scratch_bytes, &scratch) || !add_patch(p, step->scratch, scratch))
		return out_of_memory(p->error);
	return OPD_OK;
}

/* ---- Steps ---- */

static opd_status make_step(struct preparing *p, uint32_t index)
{
	struct prepared *prepared = p->prepared;
	struct step *step = &prepared->steps[index];
	step->node = p->graph->order[index];
	const struct graph_node *node = &p->graph->nodes[step->node];
	const struct op *op = &prepared->snapshot->ops[node->op_index];
	prepared->step_count = index + 1;
	opd_status status = bind_args(&prepared->arena, op, &node->run, &step->bound, p->error);
	for (uint32_t i = 0; status == OPD_OK && i < step->bound.operand_count; i++)
		status = place_operand(p, index, op, &step->bound.operands[i]);
	if (status == OPD_OK)
		status = bind_outputs(&prepared->arena, &step->bound, p->error);
	if (status == OPD_OK)
		status = choose(p, step, op, node);
	if (status == OPD_OK)
		status = place_results(p, index, step, op);
	return status == OPD_OK ? OPD_OK : graph_node_error(p->graph, step->node, status, p->error);
}

/* Of the arena, what isn't charged yet. */
static opd_status charge(struct prepared *prepared, opd_error *error)
{
	uint64_t bytes = sizeof *prepared + prepared->arena.used_bytes - prepared->charged_bytes;
	opd_status status = account_charge(prepared->account, bytes, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "preparing the graph");
	prepared->charged_bytes += bytes;
	return OPD_OK;
}

static opd_status make_steps(struct preparing *p)
{
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < p->graph->node_count; i++) {
		status = make_step(p, i);
		if (status == OPD_OK && i % CHARGE_NODES == CHARGE_NODES - 1)
			status = charge(p->prepared, p->error);
	}
	return status;
}

/* Wanted results that lie elsewhere: in a state, in another's place, or wanted twice. */
static opd_status make_outputs(struct preparing *p)
{
	struct prepared *prepared = p->prepared;
	prepared->first_late = prepared->copy_count;
	for (uint32_t i = 0; i < p->graph->output_count; i++) {
		uint32_t value = p->graph->outputs[i].value;
		struct place place = p->places[value];
		struct place wanted = {1 + p->graph->input_count + i, NO_ITEM};
		uint64_t bytes;
		prepared->outputs[i] = *p->values[value];
		if (!size_align(tensor_size(p->values[value]), &bytes) || !size_add(prepared->output_bytes, bytes, &prepared->output_bytes))
			return opd_fail(p->error, OPD_INVALID_ARGUMENT, "graph '%s': its outputs have more bytes than fit", p->graph->name.data);
		if (place.base == wanted.base)
			continue;
		if (place.base == BASE_ARENA)
			p->items[place.item].last = p->graph->node_count;
		opd_tensor *from = copy_tensor(&prepared->arena, p->values[value]);
		opd_tensor *to = copy_tensor(&prepared->arena, p->values[value]);
		if (from == NULL || to == NULL || !add_patch(p, from, place) || !add_patch(p, to, wanted) || !add_copy(p, from, to))
			return out_of_memory(p->error);
	}
	return OPD_OK;
}

/* ---- Addresses ---- */

static opd_status sort_patches(struct preparing *p)
{
	struct prepared *prepared = p->prepared;
	prepared->first_patch = arena_array(&prepared->arena, (size_t)prepared->base_count + 2, sizeof prepared->first_patch[0]);
	prepared->patches = arena_array(&prepared->arena, p->patch_count, sizeof prepared->patches[0]);
	prepared->bases = arena_array(&prepared->arena, prepared->base_count, sizeof prepared->bases[0]);
	if (prepared->first_patch == NULL || prepared->patches == NULL || prepared->bases == NULL)
		return out_of_memory(p->error);
	uint32_t *first = prepared->first_patch;
	for (uint32_t i = 0; i < p->patch_count; i++)
		first[p->patches[i].place.base + 2]++;
	for (uint32_t i = 2; i < prepared->base_count + 2; i++)
		first[i] += first[i - 1];
	for (uint32_t i = 0; i < p->patch_count; i++) {
		const struct pending_patch *patch = &p->patches[i];
		uint64_t offset = patch->place.item == NO_ITEM ? 0 : p->items[patch->place.item].offset;
		prepared->patches[first[patch->place.base + 1]++] = (struct patch){patch->tensor, offset};
	}
	return OPD_OK;
}

static opd_status make_all(struct preparing *p)
{
	opd_status status = make_steps(p);
	if (status == OPD_OK)
		status = make_outputs(p);
	if (status == OPD_OK && !graph_plan(p->items, p->item_count, &p->prepared->sizes))
		status = out_of_memory(p->error);
	if (status == OPD_OK)
		status = sort_patches(p);
	return status == OPD_OK ? charge(p->prepared, p->error) : status;
}

static struct prepared *create(struct graph_run *run)
{
	const struct graph *graph = run->graph;
	const struct request *request = run->request;
	struct prepared *prepared = calloc(1, sizeof *prepared);
	if (prepared == NULL)
		return NULL;
	arena_init(&prepared->arena, PREPARED_ARENA_BYTES);
	prepared->account = account_ref(request->session->account);
	prepared->snapshot = snapshot_ref(request->snapshot);
	prepared->lists = run->lists;
	(void)atomic_fetch_add_explicit(&run->lists->refs, 1, memory_order_relaxed);
	prepared->checked = atomic_load_explicit(&request->context->server->checked, memory_order_relaxed);
	prepared->can_be_inline = true;
	prepared->input_count = graph->input_count;
	prepared->output_count = graph->output_count;
	prepared->base_count = 1 + graph->input_count + graph->output_count;
	prepared->inputs = arena_array(&prepared->arena, graph->input_count, sizeof prepared->inputs[0]);
	prepared->outputs = arena_array(&prepared->arena, graph->output_count, sizeof prepared->outputs[0]);
	prepared->steps = arena_array(&prepared->arena, graph->node_count, sizeof prepared->steps[0]);
	prepared->donates = arena_array(&prepared->arena, graph->value_count, sizeof prepared->donates[0]);
	if (prepared->inputs != NULL && prepared->outputs != NULL && prepared->steps != NULL && prepared->donates != NULL)
		return prepared;
	prepared_destroy(prepared);
	return NULL;
}

opd_status prepared_make(struct graph_run *run, opd_error *error)
{
	struct graph *graph = run->graph;
	struct server *server = run->request->context->server;
	struct preparing p = {
		.run = run, .graph = graph, .operands = &run->request->run.bound, .plans = server->plans, .log = server->log, .error = error};
	drop_stale(run);
	arena_init(&p.scratch, PREPARED_ARENA_BYTES);
	p.prepared = create(run);
	p.values = arena_array(&p.scratch, graph->value_count, sizeof p.values[0]);
	p.places = arena_array(&p.scratch, graph->value_count, sizeof p.places[0]);
	opd_status status = p.prepared == NULL || p.values == NULL || p.places == NULL ? out_of_memory(error) : OPD_OK;
	if (status == OPD_OK) {
		describe_inputs(&p);
		status = make_all(&p);
	}
	arena_fini(&p.scratch);
	if (status != OPD_OK) {
		if (p.prepared != NULL)
			prepared_destroy(p.prepared);
		return status;
	}
	p.prepared->next = graph->prepared;
	graph->prepared = p.prepared;
	run->prepared = p.prepared;
	return OPD_OK;
}
