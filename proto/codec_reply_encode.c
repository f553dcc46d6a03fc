/* Replies, from messages to envelopes. */
#include "proto/codec_internal.h"
#include "proto/plain.h"

static Opd__V1__Result *write_result(struct arena *arena, const struct msg_result *in)
{
	Opd__V1__Result *out = write_new(arena, &opd__v1__result__descriptor);
	if (out == NULL || (out->tensor = write_tensor(arena, &in->tensor)) == NULL)
		return NULL;
	if (in->kept.generation != 0 && (out->kept = write_handle(arena, in->kept)) == NULL)
		return NULL;
	return out;
}

static bool write_skips(struct arena *arena, const struct msg_explain *in, Opd__V1__Explain *out)
{
	out->skipped = arena_array(arena, in->skip_count, sizeof *out->skipped);
	if (out->skipped == NULL)
		return false;
	for (uint32_t i = 0; i < in->skip_count; i++) {
		Opd__V1__Skip *skip = write_new(arena, &opd__v1__skip__descriptor);
		if (skip == NULL)
			return false;
		skip->provider = write_text(in->skipped[i].provider);
		skip->code = (uint32_t)in->skipped[i].code;
		skip->reason = write_text(in->skipped[i].reason);
		out->skipped[i] = skip;
	}
	out->n_skipped = in->skip_count;
	return true;
}

static bool write_moves(struct arena *arena, const struct msg_explain *in, Opd__V1__Explain *out)
{
	out->moves = arena_array(arena, in->move_count, sizeof *out->moves);
	if (out->moves == NULL)
		return false;
	for (uint32_t i = 0; i < in->move_count; i++) {
		Opd__V1__Move *move = write_new(arena, &opd__v1__move__descriptor);
		if (move == NULL)
			return false;
		move->operand = write_text(in->moves[i].operand);
		move->from = write_text(in->moves[i].from);
		move->to = write_text(in->moves[i].to);
		move->bytes = in->moves[i].bytes;
		out->moves[i] = move;
	}
	out->n_moves = in->move_count;
	return true;
}

static Opd__V1__Times *write_times(struct arena *arena, const struct msg_times *in)
{
	Opd__V1__Times *out = write_new(arena, &opd__v1__times__descriptor);
	if (out == NULL)
		return NULL;
	out->decode = in->decode;
	out->dispatch = in->dispatch;
	out->queue = in->queue;
	out->kernel = in->kernel;
	out->moves = in->moves;
	out->pack = in->pack;
	out->receive = in->receive;
	return out;
}

static bool write_behind(struct arena *arena, const struct msg_behind *in, Opd__V1__Explain *explain)
{
	if (in == NULL)
		return true;
	Opd__V1__Behind *out = explain->behind = write_new(arena, &opd__v1__behind__descriptor);
	if (out == NULL)
		return false;
	out->own_jobs = in->own_jobs;
	out->tenant_jobs = in->tenant_jobs;
	out->other_jobs = in->other_jobs;
	out->realtime_jobs = in->realtime_jobs;
	out->interactive_jobs = in->interactive_jobs;
	out->batch_jobs = in->batch_jobs;
	out->own_ns = in->own_ns;
	out->tenant_ns = in->tenant_ns;
	out->other_ns = in->other_ns;
	out->running = in->running;
	return true;
}

Opd__V1__Explain *write_explain(struct arena *arena, const struct msg_explain *in)
{
	Opd__V1__Explain *out = write_new(arena, &opd__v1__explain__descriptor);
	if (out == NULL)
		return NULL;
	out->level = (Opd__V1__Level)in->level;
	out->device = write_text(in->device);
	out->on_loop = in->on_loop;
	out->batched = in->batched;
	out->narrowed = write_text(in->narrowed);
	out->times = write_times(arena, &in->times);
	if (out->times == NULL || !write_behind(arena, in->behind, out) || !write_skips(arena, in, out) || !write_moves(arena, in, out) ||
	    !write_texts(arena, in->effective_count, in->effective, &out->n_effective, &out->effective))
		return NULL;
	return out;
}

static Opd__V1__RunReply *write_run_reply(struct arena *arena, const struct msg_run_reply *in)
{
	Opd__V1__RunReply *out = write_new(arena, &opd__v1__run_reply__descriptor);
	if (out == NULL)
		return NULL;
	out->provider = write_text(in->provider);
	out->uuid = write_text(in->uuid);
	out->outputs = arena_array(arena, in->output_count, sizeof *out->outputs);
	if (out->outputs == NULL)
		return NULL;
	for (uint32_t i = 0; i < in->output_count; i++) {
		out->outputs[i] = write_result(arena, &in->outputs[i]);
		if (out->outputs[i] == NULL)
			return NULL;
	}
	out->n_outputs = in->output_count;
	if (in->explain != NULL && (out->explain = write_explain(arena, in->explain)) == NULL)
		return NULL;
	return write_graph_reply(arena, in, out) ? out : NULL;
}

static bool write_cases(struct arena *arena, const struct msg_priority_reply *in, Opd__V1__PriorityReply *out)
{
	out->cases = arena_array(arena, in->case_count, sizeof *out->cases);
	for (uint32_t i = 0; out->cases != NULL && i < in->case_count; i++) {
		Opd__V1__PriorityCase *narrow = write_new(arena, &opd__v1__priority_case__descriptor);
		const struct msg_priority_case *from = &in->cases[i];
		if (narrow == NULL || !write_texts(arena, from->effective_count, from->effective, &narrow->n_effective, &narrow->effective) ||
		    !write_texts(arena, from->stored_count, from->stored, &narrow->n_stored, &narrow->stored))
			return false;
		narrow->key = write_text(from->key);
		out->cases[i] = narrow;
	}
	out->n_cases = in->case_count;
	return out->cases != NULL;
}

static Opd__V1__PriorityReply *write_priority(struct arena *arena, const struct msg_priority_reply *in)
{
	Opd__V1__PriorityReply *out = write_new(arena, &opd__v1__priority_reply__descriptor);
	if (out == NULL || !write_texts(arena, in->effective_count, in->effective, &out->n_effective, &out->effective) ||
	    !write_texts(arena, in->stored_count, in->stored, &out->n_stored, &out->stored) || !write_cases(arena, in, out))
		return NULL;
	out->level = (Opd__V1__Level)in->level;
	return out;
}

static Opd__V1__Implementation *write_impl(struct arena *arena, const struct msg_impl *in)
{
	Opd__V1__Implementation *out = write_new(arena, &opd__v1__implementation__descriptor);
	if (out == NULL)
		return NULL;
	out->provider = write_text(in->provider);
	out->supported = in->supported;
	out->reason = write_text(in->reason);
	out->predicate = in->predicate;
	out->plan_may_refuse = in->plan_may_refuse;
	out->in_place = in->in_place;
	out->thread_invariant = in->thread_invariant;
	out->batch_invariant = in->batch_invariant;
	out->bf16_denormals_zero = in->bf16_denormals_zero;
	out->device = write_text(in->device);
	out->schema = write_text(in->schema);
	out->uuid = write_text(in->uuid);
	return out;
}

static bool write_impls(struct arena *arena, const struct msg_op *in, Opd__V1__OpDescription *out)
{
	out->implementations = arena_array(arena, in->impl_count, sizeof *out->implementations);
	if (out->implementations == NULL)
		return false;
	for (uint32_t i = 0; i < in->impl_count; i++) {
		out->implementations[i] = write_impl(arena, &in->impls[i]);
		if (out->implementations[i] == NULL)
			return false;
	}
	out->n_implementations = in->impl_count;
	return true;
}

static bool write_in_place(struct arena *arena, const struct msg_op *in, Opd__V1__OpDescription *out)
{
	out->in_place = arena_array(arena, in->in_place_count, sizeof *out->in_place);
	if (out->in_place == NULL)
		return false;
	for (uint32_t i = 0; i < in->in_place_count; i++) {
		out->in_place[i] = write_new(arena, &opd__v1__in_place__descriptor);
		if (out->in_place[i] == NULL)
			return false;
		out->in_place[i]->param = write_text(in->in_place[i].param);
		out->in_place[i]->result = in->in_place[i].result;
	}
	out->n_in_place = in->in_place_count;
	return true;
}

static Opd__V1__OpDescription *write_op(struct arena *arena, const struct msg_op *in)
{
	Opd__V1__OpDescription *out = write_new(arena, &opd__v1__op_description__descriptor);
	if (out == NULL)
		return NULL;
	out->name = write_text(in->name);
	out->schema = write_text(in->schema);
	out->doc = write_text(in->doc);
	out->level = (Opd__V1__Level)in->level;
	out->activations = write_text(in->activations);
	out->n_default_dims = in->default_dim_count;
	out->default_dims = (int64_t *)(uintptr_t)in->default_dims;
	if (!write_impls(arena, in, out) || !write_in_place(arena, in, out) ||
	    !write_texts(arena, in->effective_count, in->effective, &out->n_effective, &out->effective) ||
	    !write_texts(arena, in->dim_count, in->dims, &out->n_dims, &out->dims))
		return NULL;
	return out;
}

static Opd__V1__OpList *write_ops(struct arena *arena, uint32_t count, const struct msg_op *in)
{
	Opd__V1__OpList *out = write_new(arena, &opd__v1__op_list__descriptor);
	if (out == NULL || (out->ops = arena_array(arena, count, sizeof *out->ops)) == NULL)
		return NULL;
	for (uint32_t i = 0; i < count; i++) {
		out->ops[i] = write_op(arena, &in[i]);
		if (out->ops[i] == NULL)
			return NULL;
	}
	out->n_ops = count;
	return out;
}

static Opd__V1__Provider *write_provider(struct arena *arena, const struct msg_provider *in)
{
	Opd__V1__Provider *out = write_new(arena, &opd__v1__provider__descriptor);
	if (out == NULL || !write_texts(arena, in->op_count, in->ops, &out->n_ops, &out->ops) ||
	    !write_texts(arena, in->device_count, in->devices, &out->n_devices, &out->devices) ||
	    !write_texts(arena, in->quarantined_count, in->quarantined, &out->n_quarantined, &out->quarantined))
		return NULL;
	out->failures = in->failures;
	out->isolated = in->isolated;
	out->deaths = in->deaths;
	out->unconfined = write_text(in->unconfined);
	out->name = write_text(in->name);
	out->version = write_text(in->version);
	out->available = in->available;
	out->reason = write_text(in->reason);
	out->source = write_text(in->source);
	return out;
}

static Opd__V1__Providers *write_providers(struct arena *arena, uint32_t count, const struct msg_provider *in)
{
	Opd__V1__Providers *out = write_new(arena, &opd__v1__providers__descriptor);
	if (out == NULL || (out->providers = arena_array(arena, count, sizeof *out->providers)) == NULL)
		return NULL;
	for (uint32_t i = 0; i < count; i++) {
		out->providers[i] = write_provider(arena, &in[i]);
		if (out->providers[i] == NULL)
			return NULL;
	}
	out->n_providers = count;
	return out;
}

static bool write_device_states(struct arena *arena, uint32_t count, const struct msg_device_state *in, Opd__V1__Info *out)
{
	out->device_states = arena_array(arena, count, sizeof *out->device_states);
	if (out->device_states == NULL)
		return false;
	for (uint32_t i = 0; i < count; i++) {
		Opd__V1__DeviceState *state = write_new(arena, &opd__v1__device_state__descriptor);
		if (state == NULL)
			return false;
		state->name = write_text(in[i].name);
		state->memory_bytes = in[i].memory_bytes;
		state->cached_bytes = in[i].cached_bytes;
		state->memory_limit_bytes = in[i].memory_limit_bytes;
		state->jobs = in[i].jobs;
		state->lost = write_text(in[i].lost);
		out->device_states[i] = state;
	}
	out->n_device_states = count;
	return true;
}

static Opd__V1__Info *write_info(struct arena *arena, const struct msg_info *in)
{
	Opd__V1__Info *out = write_new(arena, &opd__v1__info__descriptor);
	if (out == NULL || !write_texts(arena, in->listener_count, in->listeners, &out->n_listeners, &out->listeners) ||
	    !write_texts(arena, in->device_count, in->devices, &out->n_devices, &out->devices) ||
	    !write_texts(arena, in->unhealthy_count, in->unhealthy, &out->n_unhealthy, &out->unhealthy) ||
	    !write_texts(arena, in->degraded_count, in->degraded, &out->n_degraded, &out->degraded) ||
	    !write_device_states(arena, in->device_state_count, in->device_states, out))
		return NULL;
	out->version = write_text(in->version);
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
	return out;
}

static Opd__V1__Generated *write_generated(struct arena *arena, uint32_t count, const struct msg_arg *args)
{
	Opd__V1__Generated *out = write_new(arena, &opd__v1__generated__descriptor);
	if (out == NULL || !write_args(arena, count, args, &out->n_args, &out->args))
		return NULL;
	return out;
}

static bool write_body(struct arena *arena, const struct msg_reply *in, Opd__V1__Reply *out)
{
	switch (in->kind) {
	case MSG_REPLY_NONE:
		return true;
	case MSG_REPLY_RUN:
		out->body_case = OPD__V1__REPLY__BODY_RUN;
		return (out->run = write_run_reply(arena, &in->run)) != NULL;
	case MSG_REPLY_PRIORITY:
		out->body_case = OPD__V1__REPLY__BODY_PRIORITY;
		return (out->priority = write_priority(arena, &in->priority)) != NULL;
	case MSG_REPLY_OPS:
		out->body_case = OPD__V1__REPLY__BODY_OPS;
		return (out->ops = write_ops(arena, in->ops.count, in->ops.items)) != NULL;
	case MSG_REPLY_OP:
		out->body_case = OPD__V1__REPLY__BODY_OP;
		return (out->op = write_op(arena, &in->op)) != NULL;
	case MSG_REPLY_PROVIDERS:
		out->body_case = OPD__V1__REPLY__BODY_PROVIDERS;
		return (out->providers = write_providers(arena, in->providers.count, in->providers.items)) != NULL;
	case MSG_REPLY_INFO:
		out->body_case = OPD__V1__REPLY__BODY_INFO;
		return (out->info = write_info(arena, &in->info)) != NULL;
	case MSG_REPLY_GENERATED:
		out->body_case = OPD__V1__REPLY__BODY_GENERATED;
		return (out->generated = write_generated(arena, in->generated.count, in->generated.args)) != NULL;
	case MSG_REPLY_EMPTY:
		out->body_case = OPD__V1__REPLY__BODY_EMPTY;
		return (out->empty = write_new(arena, &opd__v1__empty__descriptor)) != NULL;
	case MSG_REPLY_TENSORS:
		out->body_case = OPD__V1__REPLY__BODY_TENSORS;
		return (out->tensors = write_kept_tensors(arena, in)) != NULL;
	case MSG_REPLY_MEMORY:
	case MSG_REPLY_RINGS:
		return write_memory_reply(arena, in, out);
	case MSG_REPLY_STATS:
		out->body_case = OPD__V1__REPLY__BODY_STATS;
		return (out->stats = write_stats(arena, &in->stats)) != NULL;
	case MSG_REPLY_SESSIONS:
		out->body_case = OPD__V1__REPLY__BODY_SESSIONS;
		return (out->sessions = write_sessions(arena, &in->sessions)) != NULL;
	case MSG_REPLY_PUBLICATIONS:
		out->body_case = OPD__V1__REPLY__BODY_PUBLICATIONS;
		return (out->publications = write_publications(arena, in)) != NULL;
	case MSG_REPLY_REGISTERED:
		out->body_case = OPD__V1__REPLY__BODY_GRAPH;
		out->graph = write_new(arena, &opd__v1__graph_registered__descriptor);
		if (out->graph == NULL)
			return false;
		out->graph->graph = in->registered.graph;
		out->graph->nodes = in->registered.nodes;
		out->graph->bytes = in->registered.bytes;
		return true;
	}
	return true;
}

opd_status codec_pack_reply(struct arena *arena, const struct msg_reply *message, struct codec_buffer *out, opd_error *error)
{
	Opd__V1__Reply pb = OPD__V1__REPLY__INIT;
	pb.status = (uint32_t)message->status;
	pb.message = write_text(message->message);
	pb.retry_after_us = message->retry_after_us;
	bool fits = write_body(arena, message, &pb);
	return codec_pack(arena, fits ? &pb.base : NULL, "Reply", out, error);
}

opd_status codec_encode_reply(struct arena *arena, const struct msg_reply *message, struct codec_buffer *out, opd_error *error)
{
	return plain_write_reply(arena, message, out) ? OPD_OK : codec_pack_reply(arena, message, out, error);
}
