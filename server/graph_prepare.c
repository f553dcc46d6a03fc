/* Preparing a graph for one set of shapes: results inferred, implementations chosen, memory planned. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "proto/tensor.h"
#include "providers/estimate.h"
#include "server/daemon.h"
#include "server/graph_prepare.h"
#include "server/module.h"
#include "server/placement.h"
#include "server/request.h"

#define PREPARED_ARENA_BYTES ((size_t)1 << 30)
/* Memory is charged each time after so many nodes. */
#define CHARGE_NODES 256u

/* ---- Life ---- */

static void prepared_destroy(struct prepared *prepared)
{
	graph_device_release(prepared);
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

struct prepared *prepared_ref(struct prepared *prepared)
{
	(void)atomic_fetch_add_explicit(&prepared->refs, 1, memory_order_relaxed);
	return prepared;
}

void prepared_unref(struct prepared *prepared)
{
	if (prepared != NULL && atomic_fetch_sub_explicit(&prepared->refs, 1, memory_order_acq_rel) == 1)
		prepared_destroy(prepared);
}

/* A run on the CPU has the list's reference from here on, until graph_run_returned; one on a device has its own. */
void prepared_take(struct graph_run *run)
{
	struct prepared **link = &run->graph->prepared;
	while (*link != NULL && *link != run->prepared)
		link = &(*link)->next;
	if (*link == NULL)
		return;
	*link = run->prepared->next;
	if (run->held != NULL)
		prepared_unref(run->prepared);
}

void prepared_drop_all(struct graph *graph)
{
	while (graph->prepared != NULL) {
		struct prepared *prepared = graph->prepared;
		graph->prepared = prepared->next;
		prepared_unref(prepared);
	}
}

static bool same_layout(const opd_tensor *a, const opd_tensor *b)
{
	return a->dtype == b->dtype && a->alignment == b->alignment && opd_tensor_same_shape(a, b) &&
	       memcmp(a->strides, b->strides, a->rank * sizeof a->strides[0]) == 0;
}

/* A run of one op that was given a state may have left it in another shape. */
static bool same_shape(const opd_tensor *prepared, const struct kept_tensor *state)
{
	return prepared->dtype == state->dtype && prepared->rank == state->rank && memcmp(prepared->shape, state->shape, state->rank * sizeof state->shape[0]) == 0;
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
	for (uint32_t i = 0; i < graph->state_count; i++)
		if (!same_shape(&prepared->inputs[graph->states[i]].tensor, run->states[i].tensor))
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
		prepared_unref(prepared);
	}
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

/* ---- Choosing ---- */

/* Bytes of what the graph has bound that lie there. */
static uint64_t home_bytes(const void *what, uint32_t device)
{
	const struct preparing *p = what;
	uint64_t bytes = 0;
	for (uint32_t i = 0; i < p->graph->input_count; i++) {
		const struct graph_input *input = &p->graph->inputs[i];
		const struct kept_tensor *kept = input->kind == MSG_GRAPH_CONSTANT ? input->constant
		                                 : input->kind == MSG_GRAPH_STATE  ? p->run->states[input->state].tensor
		                                                                   : NULL;
		if (kept != NULL && buffer_is_on(kept->buffer, device))
			bytes += kept->bytes;
	}
	return bytes;
}

/* As for one op; the graph's bytes are what it has bound. 0: none. */
static uint32_t choose_device(const struct preparing *p, const struct graph_node *node, const char *kind)
{
	struct request *request = p->run->request;
	const struct placement_wish wish = {.device = node->run.device, .kind = kind, .class = request->run.class, .home_bytes = home_bytes, .what = p};
	return placement_choose(request->context->server, p->prepared->snapshot, request->session, &wish);
}

/* All nodes run on one device, or all on the CPU. */
static opd_status prepare_device(struct preparing *p, const struct step *step, const struct impl *impl)
{
	const struct device *devices = p->prepared->snapshot->devices;
	const struct graph_node *node = &p->graph->nodes[step->node];
	const bool first = p->prepared->step_count == 1;
	if (first && !impl->on_host)
		p->device = choose_device(p, node, impl->def->device);
	const uint32_t wanted = impl->on_host ? 0 : first ? p->device : choose_device(p, node, impl->def->device);
	const bool same = impl->on_host ? p->device == 0
	                                : p->device != 0 && (node->run.device.bytes == 0 ? strcmp(devices[p->device].kind, impl->def->device) == 0 : wanted == p->device);
	if (!same)
		return opd_fail(p->error, OPD_UNIMPLEMENTED, "%s: %s would run on %s, the nodes before it on %s: a graph's nodes run on one device so far (its list needs a provider of that device which takes this call)", impl->def->op,
		                impl->provider->name, devices[wanted].name, devices[p->device].name);
	if (!impl->on_host && step->bound.op->def->check != NULL && (impl->def->flags & OPD_IMPL_CHECKS_INDICES) == 0)
		return opd_fail(p->error, OPD_UNIMPLEMENTED, "%s: %s doesn't check indices on %s, as a graph's nodes there must", impl->def->op, impl->provider->name,
		                devices[p->device].name);
	return OPD_OK;
}

static opd_status refuse(struct preparing *p, const struct dispatch *dispatch, const struct op *op, const struct graph_node *node, const opd_call *call)
{
	uint32_t count = 0;
	const struct msg_skip *skips = dispatch_skips(dispatch, op, call, &p->scratch, &count);
	return dispatch_refused(dispatch, op, node->run.device, skips, count, p->error);
}

static opd_status choose(struct preparing *p, struct step *step, const struct op *op, const struct graph_node *node)
{
	struct dispatch *dispatch = &step->dispatch;
	opd_status status = dispatch_init(dispatch, p->prepared->snapshot, p->prepared->lists->effective[step->node], p->plans,
	                                  p->log, op, node->run.strict, &step->bound.call, p->error);
	if (status != OPD_OK)
		return status;
	dispatch_restrict(dispatch, p->graph->session->access);
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
		return refuse(p, dispatch, op, node, &step->bound.call);
	status = prepare_device(p, step, dispatch->impl);
	if (status != OPD_OK)
		return status;
	step->impl = dispatch->impl;
	step->def = op->def;
	step->plan = dispatch->plan == NULL ? NULL : &dispatch->plan->made;
	step->cost_ns = bound_cost_ns(&step->bound, step->impl);
	p->prepared->can_be_inline = p->prepared->can_be_inline && step->cost_ns != 0 && step->impl->provider->module->library == NULL;
	p->prepared->cost_ns = estimate_add(p->prepared->cost_ns, step->cost_ns);
	if (step->cost_ns > p->prepared->step_ns)
		p->prepared->step_ns = step->cost_ns;
	return OPD_OK;
}

/* ---- Steps ---- */

static opd_status make_step(struct preparing *p, uint32_t index)
{
	struct prepared *prepared = p->prepared;
	struct step *step = &prepared->steps[index];
	step->node = p->graph->order[index];
	step->order = index;
	const struct graph_node *node = &p->graph->nodes[step->node];
	const struct op *op = &prepared->snapshot->ops[node->op_index];
	prepared->step_count = index + 1;
	opd_status status = bind_args(&prepared->arena, op, &node->run, &step->bound, p->error);
	for (uint32_t i = 0; status == OPD_OK && i < step->bound.operand_count; i++)
		status = prepare_operand(p, index, op, &step->bound.operands[i]);
	if (status == OPD_OK)
		status = bind_outputs(&prepared->arena, &step->bound, p->error);
	if (status == OPD_OK)
		status = choose(p, step, op, node);
	if (status == OPD_OK)
		status = prepare_results(p, index, step, op);
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
	uint64_t output_bytes = 0;
	prepared->first_late = prepared->copy_count;
	for (uint32_t i = 0; i < p->graph->output_count; i++) {
		uint32_t value = p->graph->outputs[i].value;
		struct place place = p->places[value];
		struct place wanted = {1 + p->graph->input_count + i, NO_ITEM};
		uint64_t bytes;
		prepared->outputs[i] = *p->values[value];
		if (!size_align(prepare_bytes(p->values[value]), &bytes) ||
		    !size_add(output_bytes, bytes, &output_bytes))
			return opd_fail(p->error, OPD_INVALID_ARGUMENT, "graph '%s': its outputs have more bytes than fit",
			                p->graph->name.data);
		if (place.base == wanted.base)
			continue;
		if (!prepare_use(p, place, p->graph->node_count))
			return prepare_memory(p->error);
		opd_tensor *from = prepare_tensor(&prepared->arena, p->values[value]);
		opd_tensor *to = prepare_tensor(&prepared->arena, p->values[value]);
		if (from == NULL || to == NULL || !prepare_patch(p, from, place) || !prepare_patch(p, to, wanted) ||
		    !prepare_copy(p, from, to))
			return prepare_memory(p->error);
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
		return prepare_memory(p->error);
	uint32_t *first = prepared->first_patch;
	for (uint32_t i = 0; i < p->patch_count; i++)
		first[p->patches[i].place.base + 2]++;
	for (uint32_t i = 2; i < prepared->base_count + 2; i++)
		first[i] += first[i - 1];
	for (uint32_t i = 0; i < p->patch_count; i++) {
		const struct pending_patch *patch = &p->patches[i];
		uint64_t offset = patch->place.item == NO_ITEM ? 0 : p->items[patch->place.item].offset;
		if (prepared->device != 0) { /* a base there is opaque: what lies behind it is said by the tensor's own offset */
			patch->tensor->device = prepared->device;
			patch->tensor->byte_offset += offset;
			offset = 0;
		}
		prepared->patches[first[patch->place.base + 1]++] = (struct patch){patch->tensor, offset};
	}
	return OPD_OK;
}

static opd_status make_all(struct preparing *p)
{
	opd_status status = make_steps(p);
	if (status == OPD_OK)
		status = make_outputs(p);
	p->prepared->device = p->device;
	if (status == OPD_OK)
		status = prepare_arrange(p);
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
	atomic_store_explicit(&prepared->refs, 1, memory_order_relaxed);
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
	struct preparing p = {.run = run,
	                      .graph = graph,
	                      .operands = &run->request->run.bound,
	                      .plans = server->plans,
	                      .log = server->log,
	                      .error = error};
	drop_stale(run);
	arena_init(&p.scratch, PREPARED_ARENA_BYTES);
	p.prepared = create(run);
	p.values = arena_array(&p.scratch, graph->value_count, sizeof p.values[0]);
	p.places = arena_array(&p.scratch, graph->value_count, sizeof p.places[0]);
	opd_status status = p.prepared == NULL || p.values == NULL || p.places == NULL ? prepare_memory(error) : OPD_OK;
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
