/* Where a prepared graph's tensors lie: operands in what they name, results in the arena, in a reply's buffer, or in the place of
 * what is donated. */
#include <inttypes.h>
#include <string.h>

#include "proto/tensor.h"
#include "server/graph_prepare.h"
#include "server/request.h"

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

bool prepare_patch(struct preparing *p, opd_tensor *tensor, struct place place)
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
	struct layout_item *items = grow(&p->scratch, p->items, p->item_count, &p->item_room, sizeof items[0]);
	uint64_t aligned;
	if (items == NULL || !size_align(bytes, &aligned))
		return false;
	p->items = items;
	items[p->item_count] = (struct layout_item){.step = step, .bytes = aligned};
	*place_out = (struct place){BASE_ARENA, p->item_count++};
	return true;
}

bool prepare_use(struct preparing *p, struct place place, uint32_t step)
{
	if (place.base != BASE_ARENA)
		return true;
	struct layout_use *uses = grow(&p->scratch, p->uses, p->use_count, &p->use_room, sizeof uses[0]);
	if (uses == NULL)
		return false;
	p->uses = uses;
	uses[p->use_count++] = (struct layout_use){place.item, step};
	return true;
}

bool prepare_copy(struct preparing *p, const opd_tensor *from, const opd_tensor *to)
{
	struct prepared *prepared = p->prepared;
	struct copy *copies = grow(&prepared->arena, prepared->copies, prepared->copy_count, &p->copy_room, sizeof copies[0]);
	if (copies == NULL)
		return false;
	prepared->copies = copies;
	copies[prepared->copy_count++] = (struct copy){from, to};
	return true;
}

opd_tensor *prepare_tensor(struct arena *arena, const opd_tensor *tensor)
{
	opd_tensor *copy = arena_alloc(arena, sizeof *copy);
	if (copy != NULL)
		*copy = *tensor;
	return copy;
}

/* ---- Operands ---- */

/* A view of an input or of a node's output: inside it, of its dtype, and no larger than a run's own operands may be. */
static opd_status place_view(struct preparing *p, const struct op *op, struct operand *operand, const opd_tensor *from)
{
	struct msg_tensor *view = operand->source;
	if (view->rank != 0 && view->shape[0] == -1 && from->rank != 0) /* as many rows as there are */
		view->shape[0] = from->shape[0];
	if (view->dtype != from->dtype)
		return opd_fail(p->error, OPD_INVALID_ARGUMENT, "%s: %s views a tensor of %s as %s", op->schema->name, operand->param,
		                opd_dtype_name(from->dtype), opd_dtype_name(view->dtype));
	if (!opd_tensor_contiguous(from))
		return opd_fail(p->error, OPD_INVALID_ARGUMENT, "%s: %s views an input that is strided itself: give that input row-major",
		                op->schema->name, operand->param);
	opd_status status = bind_place(op, operand, NULL, prepare_bytes(from), false, p->error);
	if (status == OPD_OK) /* in a dry run too: what it prepares is run later */
		status = operand_check_extent(p->run->request->session, op, operand, p->error);
	if (status != OPD_OK)
		return status;
	uint32_t alignment = tensor_alignment(NULL, operand->tensor.byte_offset);
	operand->tensor.alignment = alignment < from->alignment ? alignment : from->alignment;
	operand->tensor.id = from->id;
	operand->tensor.version = from->version;
	operand->tensor.flags |= from->flags & OPD_TENSOR_CONSTANT;
	return OPD_OK;
}

opd_status prepare_operand(struct preparing *p, uint32_t step, const struct op *op, struct operand *operand)
{
	struct msg_tensor *source =
	    arena_alloc(&p->prepared->arena, sizeof *source); /* placing fills it in: the graph's stays as it was given */
	if (source == NULL)
		return prepare_memory(p->error);
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
	return prepare_use(p, place, step) && prepare_patch(p, &operand->tensor, place) ? OPD_OK : prepare_memory(p->error);
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
static opd_status place_state(struct preparing *p, uint32_t index, struct step *step, opd_tensor *output, uint32_t input,
                              bool in_place)
{
	struct place there = {1 + input, NO_ITEM}, aside;
	p->prepared->donates[p->donate_count++] = p->graph->inputs[input].state;
	step->donate_count++;
	if (in_place)
		return prepare_patch(p, output, there) ? OPD_OK : prepare_memory(p->error);
	opd_tensor *target = prepare_tensor(&p->prepared->arena, output);
	if (target == NULL || !add_item(p, index, prepare_bytes(output), &aside) || !prepare_patch(p, output, aside) ||
	    !prepare_patch(p, target, there) || !prepare_copy(p, output, target))
		return prepare_memory(p->error);
	step->copy_count++;
	return OPD_OK;
}

static opd_status place_donated(struct preparing *p, uint32_t index, struct step *step, const struct op *op, uint32_t result,
                                const struct operand *operand)
{
	opd_tensor *output = &step->bound.outputs[result];
	const struct msg_tensor *source = operand->source;
	uint32_t value = p->graph->nodes[step->node].first_value + result;
	bool in_place = (step->impl->def->flags & OPD_IMPL_IN_PLACE) != 0;
	struct place from = source->source == MSG_SOURCE_NODE ? p->places[graph_value_of(p->graph, source)]
	                                                      : (struct place){1 + source->graph_input, NO_ITEM};
	if (output->dtype != operand->tensor.dtype || !opd_tensor_same_shape(output, &operand->tensor))
		return opd_fail(p->error, OPD_INVALID_ARGUMENT, "%s: %s is donated, but result %u has another dtype or shape",
		                op->schema->name, operand->param, (unsigned)result);
	const opd_tensor *whole = source->source == MSG_SOURCE_NODE ? p->values[graph_value_of(p->graph, source)]
	                                                            : &p->prepared->inputs[source->graph_input].tensor;
	if (prepare_bytes(output) != prepare_bytes(whole))
		return opd_fail(p->error, OPD_INVALID_ARGUMENT,
		                "%s: %s is donated as a part of %" PRIu64 " of its %" PRIu64
		                " bytes: a donated operand is a whole tensor",
		                op->schema->name, operand->param, prepare_bytes(output), prepare_bytes(whole));
	p->places[value] = from;
	if (from.base != BASE_ARENA)
		return place_state(p, index, step, output, from.base - 1, in_place);
	if (!in_place && !add_item(p, index, prepare_bytes(output) + canary(p), &p->places[value]))
		return prepare_memory(p->error);
	return prepare_patch(p, output, p->places[value]) ? OPD_OK : prepare_memory(p->error);
}

/* A result of its own: the reply's buffer when it is wanted, else a part of the arena. */
static opd_status place_fresh(struct preparing *p, uint32_t index, struct step *step, uint32_t result)
{
	opd_tensor *output = &step->bound.outputs[result];
	uint32_t value = p->graph->nodes[step->node].first_value + result;
	const struct graph_value *described = &p->graph->values[value];
	if (described->output != GRAPH_NONE)
		p->places[value] = (struct place){1 + p->graph->input_count + described->output, NO_ITEM};
	else if (!add_item(p, index, prepare_bytes(output) + canary(p), &p->places[value]))
		return prepare_memory(p->error);
	return prepare_patch(p, output, p->places[value]) ? OPD_OK : prepare_memory(p->error);
}

opd_status prepare_results(struct preparing *p, uint32_t index, struct step *step, const struct op *op)
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
	if (!step->impl->on_host) { /* one for all, since they run one after the other; it has no offset to lie behind others */
		if (step->plan->scratch_bytes > p->prepared->scratch_bytes)
			p->prepared->scratch_bytes = step->plan->scratch_bytes;
		return OPD_OK;
	}
	step->scratch = arena_zalloc(&p->prepared->arena, sizeof *step->scratch);
	if (step->scratch == NULL || !add_item(p, index, step->plan->scratch_bytes, &scratch) ||
	    !prepare_patch(p, step->scratch, scratch))
		return prepare_memory(p->error);
	return OPD_OK;
}
