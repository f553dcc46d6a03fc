/* Replies, from envelopes to messages. */
#include "proto/codec_internal.h"
#include "proto/plain.h"

/* ---- Reading ---- */

/* What one array of a reply may hold: more than any registry has, less than what a hostile server could make a client walk. */
static opd_status read_names(struct reader *reader, const char *field, size_t count, const ProtobufCBinaryData *in,
                             uint32_t *count_out, const struct msg_text **out)
{
	return read_texts(reader, field, count, in, BOUND_LIST, BOUND_STR_BYTES, count_out, out);
}

struct text_field {
	const char *name;
	const ProtobufCBinaryData *in;
	struct msg_text *out;
};

static opd_status read_fields(struct reader *reader, const struct text_field *fields, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		opd_status status = read_text(reader, fields[i].name, *fields[i].in, BOUND_STR_BYTES, fields[i].out);
		if (status != OPD_OK)
			return status;
	}
	return OPD_OK;
}

#define READ_FIELDS(reader, fields) read_fields((reader), (fields), sizeof(fields) / sizeof(fields)[0])

static opd_status read_results(struct reader *reader, const Opd__V1__RunReply *in, struct msg_run_reply *out)
{
	opd_status status = read_count(reader, "outputs", in->n_outputs, BOUND_OUTPUTS);
	if (status != OPD_OK)
		return status;
	out->outputs = arena_array(reader->arena, in->n_outputs, sizeof *out->outputs);
	if (out->outputs == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_outputs; i++) {
		const Opd__V1__Result *result = in->outputs[i];
		if (result->kept != NULL)
			out->outputs[i].kept = (struct msg_handle){result->kept->index, result->kept->generation};
		status = result->tensor == NULL ? OPD_OK : read_tensor(reader, result->tensor, &out->outputs[i].tensor);
		if (status != OPD_OK)
			return opd_error_prefix(reader->error, status, "outputs[%zu]", i);
	}
	out->output_count = (uint32_t)in->n_outputs;
	return OPD_OK;
}

static opd_status read_skips(struct reader *reader, const Opd__V1__Explain *in, struct msg_explain *out)
{
	opd_status status = read_count(reader, "skipped", in->n_skipped, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	struct msg_skip *skips = arena_array(reader->arena, in->n_skipped, sizeof *skips);
	if (skips == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_skipped && status == OPD_OK; i++) {
		const Opd__V1__Skip *skip = in->skipped[i];
		skips[i].code = (opd_reason_code)skip->code;
		const struct text_field fields[] = {
		    {"skipped provider", &skip->provider, &skips[i].provider},
		    {"skipped reason", &skip->reason, &skips[i].reason},
		};
		status = READ_FIELDS(reader, fields);
	}
	out->skip_count = (uint32_t)in->n_skipped;
	out->skipped = skips;
	return status;
}

static opd_status read_moves(struct reader *reader, const Opd__V1__Explain *in, struct msg_explain *out)
{
	opd_status status = read_count(reader, "moves", in->n_moves, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	struct msg_move *moves = arena_array(reader->arena, in->n_moves, sizeof *moves);
	if (moves == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_moves && status == OPD_OK; i++) {
		const Opd__V1__Move *move = in->moves[i];
		moves[i].bytes = move->bytes;
		const struct text_field fields[] = {
		    {"moved operand", &move->operand, &moves[i].operand},
		    {"move from", &move->from, &moves[i].from},
		    {"move to", &move->to, &moves[i].to},
		};
		status = READ_FIELDS(reader, fields);
	}
	out->move_count = (uint32_t)in->n_moves;
	out->moves = moves;
	return status;
}

static opd_status read_behind(struct reader *reader, const Opd__V1__Behind *in, const struct msg_behind **out)
{
	struct msg_behind *behind = in == NULL ? NULL : arena_alloc(reader->arena, sizeof *behind);
	*out = behind;
	if (in == NULL)
		return OPD_OK;
	if (behind == NULL)
		return read_full(reader);
	*behind = (struct msg_behind){in->own_jobs,   in->tenant_jobs, in->other_jobs, in->realtime_jobs, in->interactive_jobs,
	                              in->batch_jobs, in->own_ns,      in->tenant_ns,  in->other_ns,      in->running};
	return OPD_OK;
}

opd_status read_explain(struct reader *reader, const Opd__V1__Explain *in, struct msg_explain *explain)
{
	explain->level = (msg_level)in->level;
	explain->on_loop = in->on_loop;
	explain->batched = in->batched;
	if (in->times != NULL)
		explain->times = (struct msg_times){in->times->decode, in->times->dispatch, in->times->queue,
		                                    in->times->kernel, in->times->moves,    in->times->pack,
		                                    in->times->receive};
	opd_status status = read_text(reader, "device", in->device, BOUND_STR_BYTES, &explain->device);
	if (status == OPD_OK)
		status = read_text(reader, "narrowed", in->narrowed, BOUND_STR_BYTES, &explain->narrowed);
	if (status == OPD_OK)
		status = read_skips(reader, in, explain);
	if (status == OPD_OK)
		status = read_moves(reader, in, explain);
	if (status == OPD_OK)
		status = read_behind(reader, in->behind, &explain->behind);
	if (status == OPD_OK)
		status = read_names(reader, "effective", in->n_effective, in->effective, &explain->effective_count, &explain->effective);
	return status;
}

static opd_status read_new_explain(struct reader *reader, const Opd__V1__Explain *in, const struct msg_explain **out)
{
	struct msg_explain *explain = arena_zalloc(reader->arena, sizeof *explain);
	*out = explain;
	return explain == NULL ? read_full(reader) : read_explain(reader, in, explain);
}

static opd_status read_run_reply(struct reader *reader, const Opd__V1__RunReply *in, struct msg_run_reply *out)
{
	const struct text_field fields[] = {
	    {"provider", &in->provider, &out->provider},
	    {"uuid", &in->uuid, &out->uuid},
	};
	opd_status status = READ_FIELDS(reader, fields);
	if (status == OPD_OK)
		status = read_results(reader, in, out);
	if (status == OPD_OK && in->explain != NULL)
		status = read_new_explain(reader, in->explain, &out->explain);
	return status != OPD_OK ? status : read_graph_reply(reader, in, out);
}

static opd_status read_cases(struct reader *reader, const Opd__V1__PriorityReply *in, struct msg_priority_reply *out)
{
	opd_status status = read_count(reader, "cases", in->n_cases, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	struct msg_priority_case *cases = arena_array(reader->arena, in->n_cases, sizeof *cases);
	if (cases == NULL)
		return read_full(reader);
	for (size_t i = 0; status == OPD_OK && i < in->n_cases; i++) {
		const Opd__V1__PriorityCase *from = in->cases[i];
		status = read_text(reader, "key", from->key, BOUND_STR_BYTES, &cases[i].key);
		if (status == OPD_OK)
			status = read_names(reader, "effective", from->n_effective, from->effective, &cases[i].effective_count, &cases[i].effective);
		if (status == OPD_OK)
			status = read_names(reader, "stored", from->n_stored, from->stored, &cases[i].stored_count, &cases[i].stored);
	}
	out->case_count = (uint32_t)in->n_cases;
	out->cases = cases;
	return status;
}

static opd_status read_priority(struct reader *reader, const Opd__V1__PriorityReply *in, struct msg_priority_reply *out)
{
	out->level = (msg_level)in->level;
	opd_status status = read_names(reader, "effective", in->n_effective, in->effective, &out->effective_count, &out->effective);
	if (status == OPD_OK)
		status = read_names(reader, "stored", in->n_stored, in->stored, &out->stored_count, &out->stored);
	return status == OPD_OK ? read_cases(reader, in, out) : status;
}

static opd_status read_impl(struct reader *reader, const Opd__V1__Implementation *in, struct msg_impl *out)
{
	out->supported = in->supported;
	out->predicate = in->predicate;
	out->plan_may_refuse = in->plan_may_refuse;
	out->in_place = in->in_place;
	out->thread_invariant = in->thread_invariant;
	out->batch_invariant = in->batch_invariant;
	out->bf16_denormals_zero = in->bf16_denormals_zero;
	const struct text_field fields[] = {
	    {"provider", &in->provider, &out->provider}, {"reason", &in->reason, &out->reason}, {"device", &in->device, &out->device},
	    {"schema", &in->schema, &out->schema},       {"uuid", &in->uuid, &out->uuid},
	};
	return READ_FIELDS(reader, fields);
}

static opd_status read_impls(struct reader *reader, const Opd__V1__OpDescription *in, struct msg_op *out)
{
	opd_status status = read_count(reader, "implementations", in->n_implementations, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	struct msg_impl *impls = arena_array(reader->arena, in->n_implementations, sizeof *impls);
	if (impls == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_implementations; i++) {
		status = read_impl(reader, in->implementations[i], &impls[i]);
		if (status != OPD_OK)
			return opd_error_prefix(reader->error, status, "implementations[%zu]", i);
	}
	out->impl_count = (uint32_t)in->n_implementations;
	out->impls = impls;
	return OPD_OK;
}

static opd_status read_in_place(struct reader *reader, const Opd__V1__OpDescription *in, struct msg_op *out)
{
	opd_status status = read_count(reader, "in_place", in->n_in_place, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	struct msg_in_place *pairs = arena_array(reader->arena, in->n_in_place, sizeof *pairs);
	if (pairs == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_in_place && status == OPD_OK; i++) {
		pairs[i].result = in->in_place[i]->result;
		status = read_text(reader, "in_place", in->in_place[i]->param, BOUND_STR_BYTES, &pairs[i].param);
	}
	out->in_place_count = (uint32_t)in->n_in_place;
	out->in_place = pairs;
	return status;
}

static opd_status read_op(struct reader *reader, const Opd__V1__OpDescription *in, struct msg_op *out)
{
	out->level = (msg_level)in->level;
	const struct text_field fields[] = {
	    {"name", &in->name, &out->name},
	    {"schema", &in->schema, &out->schema},
	    {"doc", &in->doc, &out->doc},
	    {"activations", &in->activations, &out->activations},
	};
	opd_status status = READ_FIELDS(reader, fields);
	if (status == OPD_OK)
		status = read_impls(reader, in, out);
	if (status == OPD_OK)
		status = read_in_place(reader, in, out);
	if (status == OPD_OK)
		status = read_names(reader, "effective", in->n_effective, in->effective, &out->effective_count, &out->effective);
	if (status == OPD_OK)
		status = read_names(reader, "dims", in->n_dims, in->dims, &out->dim_count, &out->dims);
	if (status == OPD_OK)
		status = read_ints(reader, "default_dims", in->n_default_dims, in->default_dims, BOUND_LIST, &out->default_dim_count,
		                   &out->default_dims);
	return status;
}

static opd_status read_ops(struct reader *reader, const Opd__V1__OpList *in, struct msg_reply *out)
{
	opd_status status = read_count(reader, "ops", in->n_ops, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	struct msg_op *ops = arena_array(reader->arena, in->n_ops, sizeof *ops);
	if (ops == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_ops; i++) {
		status = read_op(reader, in->ops[i], &ops[i]);
		if (status != OPD_OK)
			return opd_error_prefix(reader->error, status, "ops[%zu]", i);
	}
	out->ops.count = (uint32_t)in->n_ops;
	out->ops.items = ops;
	return OPD_OK;
}

static opd_status read_provider(struct reader *reader, const Opd__V1__Provider *in, struct msg_provider *out)
{
	out->available = in->available;
	const struct text_field fields[] = {
	    {"name", &in->name, &out->name},
	    {"version", &in->version, &out->version},
	    {"reason", &in->reason, &out->reason},
	    {"source", &in->source, &out->source},
	    {"unconfined", &in->unconfined, &out->unconfined},
	};
	opd_status status = READ_FIELDS(reader, fields);
	if (status == OPD_OK)
		status = read_names(reader, "ops", in->n_ops, in->ops, &out->op_count, &out->ops);
	if (status == OPD_OK)
		status = read_names(reader, "devices", in->n_devices, in->devices, &out->device_count, &out->devices);
	if (status == OPD_OK)
		status = read_names(reader, "quarantined", in->n_quarantined, in->quarantined, &out->quarantined_count, &out->quarantined);
	out->failures = in->failures;
	out->isolated = in->isolated;
	out->deaths = in->deaths;
	return status;
}

static opd_status read_providers(struct reader *reader, const Opd__V1__Providers *in, struct msg_reply *out)
{
	opd_status status = read_count(reader, "providers", in->n_providers, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	struct msg_provider *providers = arena_array(reader->arena, in->n_providers, sizeof *providers);
	if (providers == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_providers; i++) {
		status = read_provider(reader, in->providers[i], &providers[i]);
		if (status != OPD_OK)
			return opd_error_prefix(reader->error, status, "providers[%zu]", i);
	}
	out->providers.count = (uint32_t)in->n_providers;
	out->providers.items = providers;
	return OPD_OK;
}

static opd_status read_device_state(struct reader *reader, const Opd__V1__DeviceState *in, struct msg_device_state *out)
{
	out->memory_bytes = in->memory_bytes;
	out->cached_bytes = in->cached_bytes;
	out->memory_limit_bytes = in->memory_limit_bytes;
	out->jobs = in->jobs;
	opd_status status = read_text(reader, "name", in->name, BOUND_NAME_BYTES, &out->name);
	return status == OPD_OK ? read_text(reader, "lost", in->lost, BOUND_STR_BYTES, &out->lost) : status;
}

static opd_status read_device_states(struct reader *reader, const Opd__V1__Info *in, struct msg_info *out)
{
	opd_status status = read_count(reader, "device_states", in->n_device_states, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	struct msg_device_state *states = arena_array(reader->arena, in->n_device_states, sizeof *states);
	if (states == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_device_states; i++) {
		status = read_device_state(reader, in->device_states[i], &states[i]);
		if (status != OPD_OK)
			return opd_error_prefix(reader->error, status, "device_states[%zu]", i);
	}
	out->device_state_count = (uint32_t)in->n_device_states;
	out->device_states = states;
	return OPD_OK;
}

static opd_status read_info(struct reader *reader, const Opd__V1__Info *in, struct msg_info *out)
{
	out->uptime_us = in->uptime_us;
	out->loops = in->loops;
	out->threads = in->threads;
	out->sessions = in->sessions;
	out->requests = in->requests;
	out->memory_bytes = in->memory_bytes;
	out->memory_limit_bytes = in->memory_limit_bytes;
	out->session_memory_bytes = in->session_memory_bytes;
	out->pid = in->pid;
	out->draining = in->draining;
	out->graph_runs = in->graph_runs;
	out->graph_dispatches = in->graph_dispatches;
	out->derived_copies = in->derived_copies;
	out->derived_bytes = in->derived_bytes;
	out->derived_found = in->derived_found;
	out->derived_made = in->derived_made;
	out->stuck = in->stuck;
	out->compared = in->compared;
	out->diverged = in->diverged;
	out->left_out = in->left_out;
	opd_status status = read_text(reader, "version", in->version, BOUND_STR_BYTES, &out->version);
	if (status == OPD_OK)
		status = read_names(reader, "listeners", in->n_listeners, in->listeners, &out->listener_count, &out->listeners);
	if (status == OPD_OK)
		status = read_names(reader, "devices", in->n_devices, in->devices, &out->device_count, &out->devices);
	if (status == OPD_OK)
		status = read_names(reader, "unhealthy", in->n_unhealthy, in->unhealthy, &out->unhealthy_count, &out->unhealthy);
	if (status == OPD_OK)
		status = read_names(reader, "degraded", in->n_degraded, in->degraded, &out->degraded_count, &out->degraded);
	return status == OPD_OK ? read_device_states(reader, in, out) : status;
}

static opd_status read_body(struct reader *reader, const Opd__V1__Reply *in, struct msg_reply *out)
{
	switch (in->body_case) {
	case OPD__V1__REPLY__BODY_RUN:
		out->kind = MSG_REPLY_RUN;
		return read_run_reply(reader, in->run, &out->run);
	case OPD__V1__REPLY__BODY_PRIORITY:
		out->kind = MSG_REPLY_PRIORITY;
		return read_priority(reader, in->priority, &out->priority);
	case OPD__V1__REPLY__BODY_OPS:
		out->kind = MSG_REPLY_OPS;
		return read_ops(reader, in->ops, out);
	case OPD__V1__REPLY__BODY_OP:
		out->kind = MSG_REPLY_OP;
		return read_op(reader, in->op, &out->op);
	case OPD__V1__REPLY__BODY_PROVIDERS:
		out->kind = MSG_REPLY_PROVIDERS;
		return read_providers(reader, in->providers, out);
	case OPD__V1__REPLY__BODY_INFO:
		out->kind = MSG_REPLY_INFO;
		return read_info(reader, in->info, &out->info);
	case OPD__V1__REPLY__BODY_GENERATED:
		out->kind = MSG_REPLY_GENERATED;
		return read_args(reader, in->generated->n_args, in->generated->args, &out->generated.count, &out->generated.args);
	case OPD__V1__REPLY__BODY_EMPTY:
		out->kind = MSG_REPLY_EMPTY;
		return OPD_OK;
	case OPD__V1__REPLY__BODY_TENSORS:
		out->kind = MSG_REPLY_TENSORS;
		return read_kept_tensors(reader, in->tensors, out);
	case OPD__V1__REPLY__BODY_PUBLICATIONS:
		out->kind = MSG_REPLY_PUBLICATIONS;
		return read_publications(reader, in->publications, out);
	case OPD__V1__REPLY__BODY_GRAPH:
		out->kind = MSG_REPLY_REGISTERED;
		out->registered = (struct msg_registered){in->graph->graph, in->graph->nodes, in->graph->bytes};
		return OPD_OK;
	case OPD__V1__REPLY__BODY_MEMORY:
		out->kind = MSG_REPLY_MEMORY;
		out->memory.region = in->memory->region;
		out->memory.bytes = in->memory->bytes;
		return OPD_OK;
	case OPD__V1__REPLY__BODY_STATS:
		out->kind = MSG_REPLY_STATS;
		return read_stats(reader, in->stats, &out->stats);
	case OPD__V1__REPLY__BODY_SESSIONS:
		out->kind = MSG_REPLY_SESSIONS;
		return read_sessions(reader, in->sessions, &out->sessions);
	case OPD__V1__REPLY__BODY_RINGS:
		out->kind = MSG_REPLY_RINGS;
		out->rings.poll_us = in->rings->poll_us;
		return OPD_OK;
	default:
		out->kind = MSG_REPLY_NONE;
		return OPD_OK;
	}
}

opd_status codec_unpack_reply(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_reply *out, opd_error *error)
{
	struct reader reader = {arena, error};
	opd_status status;
	Opd__V1__Reply *in = codec_unpack(&reader, &opd__v1__reply__descriptor, "Reply", envelope, bytes, &status);
	if (in == NULL)
		return status;
	struct msg_reply reply = {.status = read_status(in->status), .retry_after_us = in->retry_after_us};
	status = read_text(&reader, "message", in->message, BOUND_STR_BYTES, &reply.message);
	if (status == OPD_OK)
		status = read_body(&reader, in, &reply);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "reply");
	*out = reply;
	return OPD_OK;
}

opd_status codec_decode_reply(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_reply *out, opd_error *error)
{
	return plain_read_reply(arena, envelope, bytes, out) ? OPD_OK : codec_unpack_reply(arena, envelope, bytes, out, error);
}
