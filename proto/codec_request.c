/* Requests, both ways. */
#include <inttypes.h>

#include "proto/codec_internal.h"
#include "proto/plain.h"

/* ---- Reading ---- */

opd_status read_list(struct reader *reader, const Opd__V1__ProviderList *in, struct msg_list *out)
{
	out->present = in != NULL;
	if (in == NULL)
		return OPD_OK;
	return read_texts(reader, "providers", in->n_names, in->names, BOUND_PROVIDERS, BOUND_NAME_BYTES, &out->count, &out->names);
}

opd_status read_output_options(struct reader *reader, size_t count, Opd__V1__OutputOption *const *in, struct msg_run *out)
{
	opd_status status = read_count(reader, "outputs", count, BOUND_OUTPUTS);
	if (status != OPD_OK)
		return status;
	struct msg_output_option *options = arena_array(reader->arena, count, sizeof *options);
	if (options == NULL)
		return read_full(reader);
	for (size_t i = 0; i < count; i++) {
		options[i] = (struct msg_output_option){.keep = in[i]->keep, .no_copy = in[i]->no_copy};
		read_shared(in[i]->shared, &options[i].shared);
	}
	out->output_count = (uint32_t)count;
	out->outputs = options;
	return OPD_OK;
}

opd_status read_service_class(struct reader *reader, int class, uint32_t *out)
{
	if (class < 0 || class > MSG_SERVICE_CLASS_MAX)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "service_class: %d, expected 0 (normal), 1 (realtime), 2 (interactive) or 3 (batch)", class);
	*out = (uint32_t)class;
	return OPD_OK;
}

opd_status read_mode(struct reader *reader, int mode, msg_mode *out)
{
	if (mode < MSG_RUN || mode > MSG_DRY)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "mode: %d, expected 0 (run), 1 (fake) or 2 (dry)", mode);
	*out = (msg_mode)mode;
	return OPD_OK;
}

static opd_status read_run(struct reader *reader, const Opd__V1__Run *in, struct msg_run *out)
{
	out->strict = in->strict;
	out->explain = in->explain;
	out->retry = in->retry;
	out->allow_tf32 = in->allow_tf32;
	out->uuid = in->uuid;
	out->inline_results = in->inline_results;
	out->timeout_us = in->timeout_us;
	opd_status status = read_mode(reader, (int)in->mode, &out->mode);
	if (status == OPD_OK)
		status = read_service_class(reader, (int)in->service_class, &out->service_class);
	if (status == OPD_OK)
		status = read_text(reader, "op", in->op, BOUND_NAME_BYTES, &out->op);
	if (status == OPD_OK)
		status = read_args(reader, in->n_args, in->args, &out->arg_count, &out->args);
	if (status == OPD_OK)
		status = read_list(reader, in->priority, &out->priority);
	if (status == OPD_OK)
		status = read_text(reader, "device", in->device, BOUND_NAME_BYTES, &out->device);
	if (status == OPD_OK)
		status = read_output_options(reader, in->n_outputs, in->outputs, out);
	return status;
}

static opd_status read_push(struct reader *reader, const Opd__V1__PriorityMap *in, struct msg_priority_map *out)
{
	opd_status status = read_count(reader, "priorities", in->n_entries, BOUND_PRIORITY_OPS);
	if (status != OPD_OK)
		return status;
	struct msg_priority_entry *entries = arena_array(reader->arena, in->n_entries, sizeof *entries);
	if (entries == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_entries; i++) {
		status = read_text(reader, "op", in->entries[i]->op, BOUND_NAME_BYTES, &entries[i].op);
		if (status == OPD_OK)
			status = read_list(reader, in->entries[i]->list, &entries[i].list);
		if (status != OPD_OK)
			return opd_error_prefix(reader->error, status, "priorities[%zu]", i);
	}
	out->count = (uint32_t)in->n_entries;
	out->entries = entries;
	return OPD_OK;
}

static opd_status read_set(struct reader *reader, const Opd__V1__SetPriority *in, struct msg_set_priority *out)
{
	if ((int)in->scope < MSG_SCOPE_SESSION || (int)in->scope > MSG_SCOPE_SERVER)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "scope: %d, expected 0 (session) or 1 (server)", (int)in->scope);
	out->scope = (msg_scope)in->scope;
	out->session = in->session;
	opd_status status = read_text(reader, "op", in->op, BOUND_NAME_BYTES, &out->op);
	return status != OPD_OK ? status : read_list(reader, in->list, &out->list);
}

static opd_status read_generate(struct reader *reader, const Opd__V1__Generate *in, struct msg_generate *out)
{
	out->variant = in->variant;
	out->seed = in->seed;
	out->values = in->values;
	out->keep = in->keep;
	opd_status status = read_text(reader, "op", in->op, BOUND_NAME_BYTES, &out->op);
	if (status == OPD_OK)
		status = read_dtype(reader, "generate", (int32_t)in->dtype, &out->dtype);
	if (status == OPD_OK)
		status = read_ints(reader, "dims", in->n_dims, in->dims, BOUND_LIST, &out->dim_count, &out->dims);
	return status;
}

static opd_status read_restore(struct reader *reader, const Opd__V1__RestoreProvider *in, struct msg_restore *out)
{
	opd_status status = read_text(reader, "provider", in->provider, BOUND_NAME_BYTES, &out->provider);
	return status == OPD_OK ? read_text(reader, "op", in->op, BOUND_NAME_BYTES, &out->op) : status;
}

static opd_status read_request(struct reader *reader, const Opd__V1__Request *in, struct msg_request *out)
{
	switch (in->body_case) {
	case OPD__V1__REQUEST__BODY_RUN:
		out->kind = MSG_REQUEST_RUN;
		return read_run(reader, in->run, &out->run);
	case OPD__V1__REQUEST__BODY_FREE:
		out->kind = MSG_REQUEST_FREE;
		return read_tensors(reader, "tensors", in->free->n_tensors, in->free->tensors, &out->free.count, &out->free.tensors);
	case OPD__V1__REQUEST__BODY_PUSH_PRIORITY:
		out->kind = MSG_REQUEST_PUSH_PRIORITY;
		return read_push(reader, in->push_priority, &out->push);
	case OPD__V1__REQUEST__BODY_POP_PRIORITY:
		out->kind = MSG_REQUEST_POP_PRIORITY;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_SET_PRIORITY:
		out->kind = MSG_REQUEST_SET_PRIORITY;
		return read_set(reader, in->set_priority, &out->set);
	case OPD__V1__REQUEST__BODY_GET_PRIORITY:
		out->kind = MSG_REQUEST_GET_PRIORITY;
		return read_text(reader, "op", in->get_priority->op, BOUND_NAME_BYTES, &out->op);
	case OPD__V1__REQUEST__BODY_LIST_OPS:
		out->kind = MSG_REQUEST_LIST_OPS;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_DESCRIBE:
		out->kind = MSG_REQUEST_DESCRIBE;
		return read_text(reader, "op", in->describe->op, BOUND_NAME_BYTES, &out->op);
	case OPD__V1__REQUEST__BODY_LIST_PROVIDERS:
		out->kind = MSG_REQUEST_LIST_PROVIDERS;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_PING:
		out->kind = MSG_REQUEST_PING;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_INFO:
		out->kind = MSG_REQUEST_INFO;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_GENERATE:
		out->kind = MSG_REQUEST_GENERATE;
		return read_generate(reader, in->generate, &out->generate);
	case OPD__V1__REQUEST__BODY_LOAD_MODULE:
		out->kind = MSG_REQUEST_LOAD_MODULE;
		return read_text(reader, "path", in->load_module->path, BOUND_STR_BYTES, &out->path);
	case OPD__V1__REQUEST__BODY_SET_LOG_LEVEL:
		out->kind = MSG_REQUEST_SET_LOG_LEVEL;
		return read_text(reader, "level", in->set_log_level->level, BOUND_NAME_BYTES, &out->log_level);
	case OPD__V1__REQUEST__BODY_DRAIN:
		out->kind = MSG_REQUEST_DRAIN;
		out->timeout_us = in->drain->timeout_us;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_UPLOAD:
		out->kind = MSG_REQUEST_UPLOAD;
		return read_upload(reader, in->upload, &out->upload);
	case OPD__V1__REQUEST__BODY_WRITE:
		out->kind = MSG_REQUEST_WRITE;
		return read_write(reader, in->write, &out->write);
	case OPD__V1__REQUEST__BODY_FETCH:
		out->kind = MSG_REQUEST_FETCH;
		return read_fetch(reader, in->fetch, &out->fetch);
	case OPD__V1__REQUEST__BODY_LIST_TENSORS:
		out->kind = MSG_REQUEST_LIST_TENSORS;
		out->first = in->list_tensors->first;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_PUBLISH:
		out->kind = MSG_REQUEST_PUBLISH;
		return read_publish(reader, in->publish, &out->publish);
	case OPD__V1__REQUEST__BODY_OPEN_TENSOR:
		out->kind = MSG_REQUEST_OPEN;
		return read_open(reader, in->open_tensor, &out->open);
	case OPD__V1__REQUEST__BODY_WITHDRAW:
		out->kind = MSG_REQUEST_WITHDRAW;
		return read_text(reader, "name", in->withdraw->name, BOUND_NAME_BYTES, &out->withdraw);
	case OPD__V1__REQUEST__BODY_LIST_PUBLICATIONS:
		out->kind = MSG_REQUEST_LIST_PUBLICATIONS;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_REGISTER_GRAPH:
		out->kind = MSG_REQUEST_REGISTER_GRAPH;
		return read_graph(reader, in->register_graph->graph, &out->graph);
	case OPD__V1__REQUEST__BODY_RUN_GRAPH:
		out->kind = MSG_REQUEST_RUN_GRAPH;
		return read_run_graph(reader, in->run_graph, &out->run);
	case OPD__V1__REQUEST__BODY_FREE_GRAPH:
		out->kind = MSG_REQUEST_FREE_GRAPH;
		out->graph_id = in->free_graph->graph;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_ATTACH_MEMORY:
		out->kind = MSG_REQUEST_ATTACH_MEMORY;
		out->memory_bytes = in->attach_memory->bytes;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_DETACH_MEMORY:
		out->kind = MSG_REQUEST_DETACH_MEMORY;
		out->region = in->detach_memory->region;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_ATTACH_RINGS:
		out->kind = MSG_REQUEST_ATTACH_RINGS;
		out->rings = (struct msg_attach_rings){in->attach_rings->request_bytes, in->attach_rings->reply_bytes, in->attach_rings->poll_us};
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_GET_STATS:
		out->kind = MSG_REQUEST_GET_STATS;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_LIST_SESSIONS:
		out->kind = MSG_REQUEST_LIST_SESSIONS;
		out->first_session = in->list_sessions->first;
		return OPD_OK;
	case OPD__V1__REQUEST__BODY_SET_SESSION:
		out->kind = MSG_REQUEST_SET_SESSION;
		return read_set_session(reader, in->set_session, &out->set_session);
	case OPD__V1__REQUEST__BODY_RESTORE_PROVIDER:
		out->kind = MSG_REQUEST_RESTORE_PROVIDER;
		return read_restore(reader, in->restore_provider, &out->restore);
	default:
		out->kind = MSG_REQUEST_NONE;
		return OPD_OK;
	}
}

opd_status codec_unpack_request(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_request *out,
                                opd_error *error)
{
	struct reader reader = {arena, error};
	opd_status status;
	Opd__V1__Request *in = codec_unpack(&reader, &opd__v1__request__descriptor, "Request", envelope, bytes, &status);
	if (in == NULL)
		return status;
	struct msg_request request = {0};
	status = read_request(&reader, in, &request);
	if (status == OPD_OK)
		*out = request;
	return status;
}

opd_status codec_decode_request(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_request *out,
                                opd_error *error)
{
	return plain_read_request(arena, envelope, bytes, out) ? OPD_OK : codec_unpack_request(arena, envelope, bytes, out, error);
}

/* ---- Writing ---- */

Opd__V1__ProviderList *write_list(struct arena *arena, const struct msg_list *in, bool *fits_out)
{
	*fits_out = true;
	if (!in->present)
		return NULL;
	Opd__V1__ProviderList *out = write_new(arena, &opd__v1__provider_list__descriptor);
	*fits_out = out != NULL && write_texts(arena, in->count, in->names, &out->n_names, &out->names);
	return out;
}

bool write_output_options(struct arena *arena, const struct msg_run *in, size_t *count_out, Opd__V1__OutputOption ***out)
{
	Opd__V1__OutputOption **options = arena_array(arena, in->output_count, sizeof *options);
	if (options == NULL)
		return false;
	for (uint32_t i = 0; i < in->output_count; i++) {
		options[i] = write_new(arena, &opd__v1__output_option__descriptor);
		if (options[i] == NULL)
			return false;
		options[i]->keep = in->outputs[i].keep;
		options[i]->no_copy = in->outputs[i].no_copy;
		const struct msg_shared_range *shared = &in->outputs[i].shared;
		if (shared->region != 0 && (options[i]->shared = write_shared(arena, shared->region, shared->offset, shared->bytes)) == NULL)
			return false;
	}
	*out = options;
	*count_out = in->output_count;
	return true;
}

static Opd__V1__Run *write_run(struct arena *arena, const struct msg_run *in)
{
	Opd__V1__Run *out = write_new(arena, &opd__v1__run__descriptor);
	if (out == NULL)
		return NULL;
	out->op = write_text(in->op);
	out->strict = in->strict;
	out->mode = (Opd__V1__RunMode)in->mode;
	out->explain = in->explain;
	out->device = write_text(in->device);
	out->retry = in->retry;
	out->allow_tf32 = in->allow_tf32;
	out->timeout_us = in->timeout_us;
	out->uuid = in->uuid;
	out->inline_results = in->inline_results;
	out->service_class = (Opd__V1__ServiceClass)in->service_class;
	bool fits;
	out->priority = write_list(arena, &in->priority, &fits);
	if (!fits || !write_args(arena, in->arg_count, in->args, &out->n_args, &out->args) || !write_output_options(arena, in, &out->n_outputs, &out->outputs))
		return NULL;
	return out;
}

static Opd__V1__Free *write_free(struct arena *arena, const struct msg_free *in)
{
	Opd__V1__Free *out = write_new(arena, &opd__v1__free__descriptor);
	if (out == NULL || !write_tensors(arena, in->count, in->tensors, &out->n_tensors, &out->tensors))
		return NULL;
	return out;
}

static Opd__V1__PriorityEntry *write_entry(struct arena *arena, const struct msg_priority_entry *in)
{
	Opd__V1__PriorityEntry *out = write_new(arena, &opd__v1__priority_entry__descriptor);
	if (out == NULL)
		return NULL;
	bool fits;
	out->op = write_text(in->op);
	out->list = write_list(arena, &in->list, &fits);
	return fits ? out : NULL;
}

static Opd__V1__PriorityMap *write_push(struct arena *arena, const struct msg_priority_map *in)
{
	Opd__V1__PriorityMap *out = write_new(arena, &opd__v1__priority_map__descriptor);
	if (out == NULL)
		return NULL;
	out->entries = arena_array(arena, in->count, sizeof *out->entries);
	if (out->entries == NULL)
		return NULL;
	for (uint32_t i = 0; i < in->count; i++) {
		out->entries[i] = write_entry(arena, &in->entries[i]);
		if (out->entries[i] == NULL)
			return NULL;
	}
	out->n_entries = in->count;
	return out;
}

static Opd__V1__SetPriority *write_set(struct arena *arena, const struct msg_set_priority *in)
{
	Opd__V1__SetPriority *out = write_new(arena, &opd__v1__set_priority__descriptor);
	if (out == NULL)
		return NULL;
	bool fits;
	out->scope = (Opd__V1__Scope)in->scope;
	out->session = in->session;
	out->op = write_text(in->op);
	out->list = write_list(arena, &in->list, &fits);
	return fits ? out : NULL;
}

static Opd__V1__Generate *write_generate(struct arena *arena, const struct msg_generate *in)
{
	Opd__V1__Generate *out = write_new(arena, &opd__v1__generate__descriptor);
	if (out == NULL)
		return NULL;
	out->op = write_text(in->op);
	out->dtype = (Opd__V1__DType)in->dtype;
	out->n_dims = in->dim_count;
	out->dims = (int64_t *)(uintptr_t)in->dims;
	out->variant = in->variant;
	out->seed = in->seed;
	out->values = in->values;
	out->keep = in->keep;
	return out;
}

/* Bodies of one field. */
static bool write_small(struct arena *arena, const struct msg_request *in, Opd__V1__Request *out)
{
	switch (in->kind) {
	case MSG_REQUEST_GET_PRIORITY:
		out->body_case = OPD__V1__REQUEST__BODY_GET_PRIORITY;
		out->get_priority = write_new(arena, &opd__v1__get_priority__descriptor);
		if (out->get_priority == NULL)
			return false;
		out->get_priority->op = write_text(in->op);
		return true;
	case MSG_REQUEST_DESCRIBE:
		out->body_case = OPD__V1__REQUEST__BODY_DESCRIBE;
		out->describe = write_new(arena, &opd__v1__describe__descriptor);
		if (out->describe == NULL)
			return false;
		out->describe->op = write_text(in->op);
		return true;
	case MSG_REQUEST_LOAD_MODULE:
		out->body_case = OPD__V1__REQUEST__BODY_LOAD_MODULE;
		out->load_module = write_new(arena, &opd__v1__load_module__descriptor);
		if (out->load_module == NULL)
			return false;
		out->load_module->path = write_text(in->path);
		return true;
	case MSG_REQUEST_RESTORE_PROVIDER:
		out->body_case = OPD__V1__REQUEST__BODY_RESTORE_PROVIDER;
		out->restore_provider = write_new(arena, &opd__v1__restore_provider__descriptor);
		if (out->restore_provider == NULL)
			return false;
		out->restore_provider->provider = write_text(in->restore.provider);
		out->restore_provider->op = write_text(in->restore.op);
		return true;
	case MSG_REQUEST_SET_LOG_LEVEL:
		out->body_case = OPD__V1__REQUEST__BODY_SET_LOG_LEVEL;
		out->set_log_level = write_new(arena, &opd__v1__set_log_level__descriptor);
		if (out->set_log_level == NULL)
			return false;
		out->set_log_level->level = write_text(in->log_level);
		return true;
	case MSG_REQUEST_DRAIN:
		out->body_case = OPD__V1__REQUEST__BODY_DRAIN;
		out->drain = write_new(arena, &opd__v1__drain__descriptor);
		if (out->drain == NULL)
			return false;
		out->drain->timeout_us = in->timeout_us;
		return true;
	case MSG_REQUEST_FREE_GRAPH:
		out->body_case = OPD__V1__REQUEST__BODY_FREE_GRAPH;
		out->free_graph = write_new(arena, &opd__v1__free_graph__descriptor);
		if (out->free_graph == NULL)
			return false;
		out->free_graph->graph = in->graph_id;
		return true;
	default:
		return true;
	}
}

/* All Empty bodies lie in the same place of the union. */
static bool write_empty(struct arena *arena, Opd__V1__Request__BodyCase body, Opd__V1__Request *out)
{
	out->body_case = body;
	out->ping = write_new(arena, &opd__v1__empty__descriptor);
	return out->ping != NULL;
}

static bool write_request(struct arena *arena, const struct msg_request *in, Opd__V1__Request *out)
{
	switch (in->kind) {
	case MSG_REQUEST_NONE:
		return true;
	case MSG_REQUEST_RUN:
		out->body_case = OPD__V1__REQUEST__BODY_RUN;
		return (out->run = write_run(arena, &in->run)) != NULL;
	case MSG_REQUEST_FREE:
		out->body_case = OPD__V1__REQUEST__BODY_FREE;
		return (out->free = write_free(arena, &in->free)) != NULL;
	case MSG_REQUEST_PUSH_PRIORITY:
		out->body_case = OPD__V1__REQUEST__BODY_PUSH_PRIORITY;
		return (out->push_priority = write_push(arena, &in->push)) != NULL;
	case MSG_REQUEST_SET_PRIORITY:
		out->body_case = OPD__V1__REQUEST__BODY_SET_PRIORITY;
		return (out->set_priority = write_set(arena, &in->set)) != NULL;
	case MSG_REQUEST_GENERATE:
		out->body_case = OPD__V1__REQUEST__BODY_GENERATE;
		return (out->generate = write_generate(arena, &in->generate)) != NULL;
	case MSG_REQUEST_REGISTER_GRAPH:
		out->body_case = OPD__V1__REQUEST__BODY_REGISTER_GRAPH;
		return (out->register_graph = write_register_graph(arena, &in->graph)) != NULL;
	case MSG_REQUEST_RUN_GRAPH:
		out->body_case = OPD__V1__REQUEST__BODY_RUN_GRAPH;
		return (out->run_graph = write_run_graph(arena, &in->run)) != NULL;
	case MSG_REQUEST_POP_PRIORITY:
		return write_empty(arena, OPD__V1__REQUEST__BODY_POP_PRIORITY, out);
	case MSG_REQUEST_LIST_OPS:
		return write_empty(arena, OPD__V1__REQUEST__BODY_LIST_OPS, out);
	case MSG_REQUEST_LIST_PROVIDERS:
		return write_empty(arena, OPD__V1__REQUEST__BODY_LIST_PROVIDERS, out);
	case MSG_REQUEST_PING:
		return write_empty(arena, OPD__V1__REQUEST__BODY_PING, out);
	case MSG_REQUEST_INFO:
		return write_empty(arena, OPD__V1__REQUEST__BODY_INFO, out);
	case MSG_REQUEST_UPLOAD:
	case MSG_REQUEST_WRITE:
	case MSG_REQUEST_FETCH:
	case MSG_REQUEST_LIST_TENSORS:
		return write_kept_request(arena, in, out);
	case MSG_REQUEST_PUBLISH:
	case MSG_REQUEST_OPEN:
	case MSG_REQUEST_WITHDRAW:
	case MSG_REQUEST_LIST_PUBLICATIONS:
		return write_publish_request(arena, in, out);
	case MSG_REQUEST_GET_PRIORITY:
	case MSG_REQUEST_DESCRIBE:
	case MSG_REQUEST_LOAD_MODULE:
	case MSG_REQUEST_RESTORE_PROVIDER:
	case MSG_REQUEST_SET_LOG_LEVEL:
	case MSG_REQUEST_DRAIN:
	case MSG_REQUEST_FREE_GRAPH:
		return write_small(arena, in, out);
	case MSG_REQUEST_GET_STATS:
		out->body_case = OPD__V1__REQUEST__BODY_GET_STATS;
		return (out->get_stats = write_new(arena, &opd__v1__get_stats__descriptor)) != NULL;
	case MSG_REQUEST_LIST_SESSIONS:
	case MSG_REQUEST_SET_SESSION:
		return write_session_request(arena, in, out);
	case MSG_REQUEST_ATTACH_MEMORY:
	case MSG_REQUEST_DETACH_MEMORY:
	case MSG_REQUEST_ATTACH_RINGS:
		return write_memory_request(arena, in, out);
	}
	return true;
}

opd_status codec_pack_request(struct arena *arena, const struct msg_request *message, struct codec_buffer *out, opd_error *error)
{
	Opd__V1__Request pb = OPD__V1__REQUEST__INIT;
	bool fits = write_request(arena, message, &pb);
	return codec_pack(arena, fits ? &pb.base : NULL, "Request", out, error);
}

opd_status codec_encode_request(struct arena *arena, const struct msg_request *message, struct codec_buffer *out, opd_error *error)
{
	return plain_write_request(arena, message, out) ? OPD_OK : codec_pack_request(arena, message, out, error);
}
