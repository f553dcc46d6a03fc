#include "client/document.h"

/* In front of every document. */
struct document {
	_Alignas(16) opd_result *result;
};

/* Zeroed, with the result's name in front of it. */
void *document_alloc(opd_result *result, size_t bytes)
{
	struct document *document = arena_zalloc(&result->arena, sizeof *document + bytes);
	if (document == NULL)
		return NULL;
	document->result = result;
	return document + 1;
}

opd_status document_create(opd_result *result, document_fn make, const void **document_out, opd_error *error)
{
	const void *document = make(result);
	if (document == NULL) {
		opd_result_destroy(result);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory for the server's answer");
	}
	*document_out = document;
	return OPD_OK;
}

void opd_document_free(const void *document)
{
	if (document != NULL)
		opd_result_destroy(((const struct document *)document - 1)->result);
}

/* A list that couldn't be made is shown as empty. */
static const char *const *texts(opd_result *result, uint32_t count, const struct msg_text *from, uint32_t *count_out)
{
	const char *const *list = result_texts(result, count, from);
	*count_out = list == NULL ? 0 : count;
	return list;
}

void *document_priority(opd_result *result)
{
	const struct msg_priority_reply *from = &result->reply.priority;
	opd_priority *priority = document_alloc(result, sizeof *priority);
	if (priority == NULL)
		return NULL;
	priority->level = msg_level_name(from->level);
	priority->effective = texts(result, from->effective_count, from->effective, &priority->effective_count);
	priority->stored = texts(result, from->stored_count, from->stored, &priority->stored_count);
	struct opd_priority_case *cases = arena_array(&result->arena, from->case_count, sizeof *cases);
	for (uint32_t i = 0; cases != NULL && i < from->case_count; i++) {
		cases[i].key = result_text(result, from->cases[i].key);
		cases[i].effective = texts(result, from->cases[i].effective_count, from->cases[i].effective, &cases[i].effective_count);
		cases[i].stored = texts(result, from->cases[i].stored_count, from->cases[i].stored, &cases[i].stored_count);
	}
	priority->cases = cases;
	priority->case_count = cases == NULL ? 0 : from->case_count;
	return priority;
}

static void fill_implementation(opd_result *result, const struct msg_impl *from, opd_implementation *out)
{
	out->provider = result_text(result, from->provider);
	out->reason = result_text(result, from->reason);
	out->device = result_text(result, from->device);
	out->schema = result_text(result, from->schema);
	out->uuid = result_text(result, from->uuid);
	out->supported = from->supported;
	out->predicate = from->predicate;
	out->plan_may_refuse = from->plan_may_refuse;
	out->in_place = from->in_place;
	out->thread_invariant = from->thread_invariant;
	out->batch_invariant = from->batch_invariant;
	out->bf16_denormals_zero = from->bf16_denormals_zero;
}

static void fill_implementations(opd_result *result, const struct msg_op *from, opd_op_description *out)
{
	opd_implementation *list = from->impl_count == 0 ? NULL : arena_array(&result->arena, from->impl_count, sizeof *list);
	for (uint32_t i = 0; list != NULL && i < from->impl_count; i++)
		fill_implementation(result, &from->impls[i], &list[i]);
	out->implementations = list;
	out->implementation_count = list == NULL ? 0 : from->impl_count;
}

static void fill_in_place(opd_result *result, const struct msg_op *from, opd_op_description *out)
{
	const uint32_t count = from->in_place_count;
	const char **params = count == 0 ? NULL : arena_array(&result->arena, count, sizeof *params);
	uint32_t *results = count == 0 ? NULL : arena_array(&result->arena, count, sizeof *results);
	if (params == NULL || results == NULL)
		return;
	for (uint32_t i = 0; i < count; i++) {
		params[i] = result_text(result, from->in_place[i].param);
		results[i] = from->in_place[i].result;
	}
	out->in_place_params = params;
	out->in_place_results = results;
	out->in_place_count = count;
}

/* Names and default sizes come as two lists: what has both is shown. */
static void fill_dims(opd_result *result, const struct msg_op *from, opd_op_description *out)
{
	const uint32_t count = from->dim_count < from->default_dim_count ? from->dim_count : from->default_dim_count;
	int64_t *sizes = count == 0 ? NULL : arena_array(&result->arena, count, sizeof *sizes);
	if (sizes == NULL)
		return;
	memcpy(sizes, from->default_dims, count * sizeof *sizes);
	out->default_dims = sizes;
	out->dims = texts(result, count, from->dims, &out->dim_count);
}

static void fill_op(opd_result *result, const struct msg_op *from, opd_op_description *out)
{
	out->name = result_text(result, from->name);
	out->schema = result_text(result, from->schema);
	out->doc = result_text(result, from->doc);
	out->activations = result_text(result, from->activations);
	out->level = msg_level_name(from->level);
	fill_implementations(result, from, out);
	fill_in_place(result, from, out);
	fill_dims(result, from, out);
	out->effective = texts(result, from->effective_count, from->effective, &out->effective_count);
}

void *document_op(opd_result *result)
{
	opd_op_description *op = document_alloc(result, sizeof *op);
	if (op != NULL)
		fill_op(result, &result->reply.op, op);
	return op;
}

void *document_ops(opd_result *result)
{
	const uint32_t count = result->reply.ops.count;
	opd_op_list *list = document_alloc(result, sizeof *list);
	opd_op_description *ops = arena_array(&result->arena, count, sizeof *ops);
	if (list == NULL || ops == NULL)
		return NULL;
	for (uint32_t i = 0; i < count; i++)
		fill_op(result, &result->reply.ops.items[i], &ops[i]);
	list->count = count;
	list->ops = ops;
	return list;
}

static void fill_provider(opd_result *result, const struct msg_provider *from, opd_provider_description *out)
{
	out->name = result_text(result, from->name);
	out->version = result_text(result, from->version);
	out->reason = result_text(result, from->reason);
	out->source = result_text(result, from->source);
	out->available = from->available;
	out->ops = texts(result, from->op_count, from->ops, &out->op_count);
	out->devices = texts(result, from->device_count, from->devices, &out->device_count);
	out->quarantined = texts(result, from->quarantined_count, from->quarantined, &out->quarantined_count);
	out->failures = from->failures;
	out->isolated = from->isolated;
	out->deaths = from->deaths;
	out->unconfined = result_text(result, from->unconfined);
}

void *document_providers(opd_result *result)
{
	const uint32_t count = result->reply.providers.count;
	opd_provider_list *list = document_alloc(result, sizeof *list);
	opd_provider_description *providers = arena_array(&result->arena, count, sizeof *providers);
	if (list == NULL || providers == NULL)
		return NULL;
	for (uint32_t i = 0; i < count; i++)
		fill_provider(result, &result->reply.providers.items[i], &providers[i]);
	list->count = count;
	list->providers = providers;
	return list;
}

static const opd_device_state *device_states(opd_result *result, uint32_t count, const struct msg_device_state *from)
{
	opd_device_state *states = arena_array(&result->arena, count, sizeof *states);
	for (uint32_t i = 0; states != NULL && i < count; i++)
		states[i] = (opd_device_state){result_text(result, from[i].name), from[i].memory_bytes, from[i].cached_bytes, from[i].memory_limit_bytes, from[i].jobs,
		                               result_text(result, from[i].lost)};
	return states;
}

void *document_info(opd_result *result)
{
	const struct msg_info *from = &result->reply.info;
	opd_server_info *info = document_alloc(result, sizeof *info);
	if (info == NULL)
		return NULL;
	info->version = result_text(result, from->version);
	info->uptime_us = from->uptime_us;
	info->pid = from->pid;
	info->sessions = from->sessions;
	info->requests = from->requests;
	info->memory_bytes = from->memory_bytes;
	info->memory_limit_bytes = from->memory_limit_bytes;
	info->session_memory_bytes = from->session_memory_bytes;
	info->loops = from->loops;
	info->threads = from->threads;
	info->draining = from->draining;
	info->graph_runs = from->graph_runs;
	info->graph_dispatches = from->graph_dispatches;
	info->derived_copies = from->derived_copies;
	info->derived_bytes = from->derived_bytes;
	info->derived_found = from->derived_found;
	info->derived_made = from->derived_made;
	info->stuck = from->stuck;
	info->compared = from->compared;
	info->diverged = from->diverged;
	info->left_out = from->left_out;
	info->listeners = texts(result, from->listener_count, from->listeners, &info->listener_count);
	info->devices = texts(result, from->device_count, from->devices, &info->device_count);
	info->unhealthy = texts(result, from->unhealthy_count, from->unhealthy, &info->unhealthy_count);
	info->degraded = texts(result, from->degraded_count, from->degraded, &info->degraded_count);
	info->device_states = device_states(result, from->device_state_count, from->device_states);
	info->device_state_count = info->device_states == NULL ? 0 : from->device_state_count;
	return info;
}

uint32_t document_fill_kept(const opd_result *result, opd_kept_tensor *tensors_out)
{
	for (uint32_t i = 0; i < result->reply.tensors.count; i++) {
		const struct msg_kept *from = &result->reply.tensors.items[i];
		opd_kept_tensor *to = &tensors_out[i];
		*to = (opd_kept_tensor){
		    .handle = {.index = from->handle.index, .generation = from->handle.generation},
		    .dtype = from->dtype,
		    .rank = from->rank,
		    .bytes = from->bytes,
		    .received_bytes = from->received,
		    .ticket = from->request,
		    .output = from->output,
		};
		memcpy(to->shape, from->shape, sizeof to->shape);
	}
	return result->reply.tensors.count;
}

const opd_kept_list *document_kept(opd_result *result, const opd_kept_tensor *tensors, uint32_t count)
{
	opd_kept_list *list = document_alloc(result, sizeof *list);
	opd_kept_tensor *copy = list == NULL ? NULL : arena_array(&result->arena, count, sizeof *copy);
	if (copy == NULL)
		return NULL;
	if (count != 0)
		memcpy(copy, tensors, count * sizeof *copy);
	list->count = count;
	list->tensors = copy;
	return list;
}

static void fill_publication(opd_result *result, const struct msg_publication *from, opd_publication *to)
{
	to->name = result_text(result, from->name);
	to->tenant = result_text(result, from->tenant);
	to->dtype = from->dtype;
	to->rank = from->rank;
	to->bytes = from->bytes;
	to->all = from->all;
	to->lasting = from->lasting;
	to->holders = from->holders;
	to->handle = (opd_handle){.index = from->handle.index, .generation = from->handle.generation};
	memcpy(to->shape, from->shape, sizeof to->shape);
	memcpy(to->sha256, from->sha256, sizeof to->sha256);
}

void *document_publication(opd_result *result)
{
	opd_publication *publication = document_alloc(result, sizeof *publication);
	if (publication != NULL)
		fill_publication(result, &result->reply.publications.items[0], publication);
	return publication;
}

void *document_publications(opd_result *result)
{
	const uint32_t count = result->reply.publications.count;
	opd_publication_list *list = document_alloc(result, sizeof *list);
	opd_publication *items = list == NULL ? NULL : arena_array(&result->arena, count, sizeof *items);
	if (items == NULL)
		return NULL;
	for (uint32_t i = 0; i < count; i++)
		fill_publication(result, &result->reply.publications.items[i], &items[i]);
	list->count = count;
	list->publications = items;
	return list;
}
