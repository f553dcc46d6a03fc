/* What the daemon says of itself: ops, one op, providers, the daemon. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "proto/bounds.h"
#include "proto/text.h"
#include "server/containment.h"
#include "server/daemon.h"
#include "server/derived.h"
#include "server/differential.h"
#include "server/health.h"
#include "server/isolated.h"
#include "server/listener.h"
#include "server/module.h"
#include "server/request.h"

static void fail_memory(struct request *request, const char *what)
{
	(void)opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", what);
	request_fail(request);
}

void inspect_ops(struct request *request)
{
	const struct snapshot *snapshot = request->snapshot;
	struct msg_op *ops = arena_array(&request->arena, snapshot->op_count, sizeof ops[0]);
	if (ops == NULL) {
		fail_memory(request, "list_ops");
		return;
	}
	for (uint32_t i = 0; i < snapshot->op_count; i++) {
		const struct op *op = &snapshot->ops[i];
		ops[i].name = msg_text(op->schema->name);
		ops[i].schema = msg_text(op->schema->text);
		ops[i].doc = msg_text(op->def->doc);
	}
	request->reply.ops.items = ops;
	request->reply.ops.count = snapshot->op_count;
	request_reply(request, MSG_REPLY_OPS);
}

/* Why an implementation can't run now; no text: it can. False: out of memory. */
static bool fill_reason(struct request *request, const struct impl *impl, struct msg_text *out)
{
	opd_reason_code code;
	const char *reason = snapshot_unsupported(request->snapshot, impl, &code);
	if (reason == NULL || code != OPD_REASON_QUARANTINE) {
		*out = msg_text(reason);
		return true;
	}
	char text[320];
	(void)snprintf(text, sizeof text, "quarantined: %s", reason);
	*out = msg_text(arena_text(&request->arena, text, strlen(text)));
	return out->data != NULL;
}

static bool fill_impl(struct request *request, const struct op *op, const struct impl *impl, struct msg_impl *out)
{
	const opd_impl *def = impl->def;
	struct msg_text reason;
	if (!fill_reason(request, impl, &reason))
		return false;
	*out = (struct msg_impl){
		.provider = msg_text(impl->provider->name),
		.supported = reason.data == NULL,
		.reason = reason,
		.predicate = def->predicate != NULL || impl->params != op->schema->param_count,
		.plan_may_refuse = (def->flags & OPD_IMPL_PLAN_MAY_REFUSE) != 0,
		.in_place = (def->flags & OPD_IMPL_IN_PLACE) != 0,
		.thread_invariant = (def->flags & OPD_IMPL_THREAD_INVARIANT) != 0,
		.batch_invariant = (def->flags & OPD_IMPL_BATCH_INVARIANT) != 0,
		.bf16_denormals_zero = (def->flags & OPD_IMPL_BF16_DENORMALS_ZERO) != 0,
		.device = msg_text(def->device),
		.schema = msg_text(def->schema == NULL ? op->schema->text : def->schema),
		.uuid = msg_text(def->uuid),
	};
	return true;
}

/* "rows,hidden" as a list. */
static bool fill_dims(struct request *request, const struct op *op, struct msg_op *out)
{
	const char *at = op->def->dims == NULL ? "" : op->def->dims;
	struct msg_text *dims = arena_array(&request->arena, op->def->dim_count, sizeof dims[0]);
	uint32_t count = 0;
	while (dims != NULL && *at != '\0' && count < op->def->dim_count) {
		size_t bytes = strcspn(at, ",");
		dims[count++] = (struct msg_text){at, bytes};
		at += bytes + (at[bytes] == ',');
	}
	out->dims = dims;
	out->dim_count = count;
	out->default_dims = op->def->default_dims;
	out->default_dim_count = op->def->dim_count;
	return dims != NULL;
}

static bool fill_effective(struct request *request, const struct op *op, struct msg_op *out)
{
	struct plist *list = session_priority(request->session, op->index);
	struct effective *effective = list != NULL ? effective_get(request->snapshot, op, list) : effective_ref(op->fallback);
	const struct msg_text *names = effective == NULL ? NULL : effective_list_names(effective, effective->count, &request->arena);
	if (names != NULL) {
		out->effective = names;
		out->effective_count = effective->count;
		out->level = effective->level;
	}
	effective_unref(effective);
	return names != NULL;
}

static bool fill_in_place(struct request *request, const struct op *op, struct msg_op *out)
{
	struct msg_in_place *pairs = arena_array(&request->arena, op->def->in_place_count, sizeof pairs[0]);
	for (uint32_t i = 0; pairs != NULL && i < op->def->in_place_count; i++) {
		pairs[i].param = msg_text(op->schema->params[op->def->in_place[i].param].name);
		pairs[i].result = op->def->in_place[i].result;
	}
	out->in_place = pairs;
	out->in_place_count = op->def->in_place_count;
	return pairs != NULL;
}

void inspect_op(struct request *request)
{
	const struct op *op = snapshot_find_op(request->snapshot, request->message.op, &request->error);
	if (op == NULL) {
		request_fail(request);
		return;
	}
	struct msg_op *out = &request->reply.op;
	*out = (struct msg_op){
		.name = msg_text(op->schema->name),
		.schema = msg_text(op->schema->text),
		.doc = msg_text(op->def->doc),
		.activations = msg_text(op->def->activations),
		.impl_count = op->impl_count,
	};
	struct msg_impl *impls = arena_array(&request->arena, op->impl_count, sizeof impls[0]);
	out->impls = impls;
	if (impls == NULL || !fill_dims(request, op, out) || !fill_effective(request, op, out) || !fill_in_place(request, op, out)) {
		fail_memory(request, "describe");
		return;
	}
	for (uint32_t i = 0; i < op->impl_count; i++) {
		if (!fill_impl(request, op, op->impls[i], &impls[i])) {
			fail_memory(request, "describe");
			return;
		}
	}
	request_reply(request, MSG_REPLY_OP);
}

/* "relu: 5 failures (kernel error 5)"; NULL: out of memory. */
static const char *quarantine_text(struct request *request, const struct op *op, const char *reason)
{
	char text[320];
	(void)snprintf(text, sizeof text, "%s: %s", op->schema->name, reason);
	return arena_text(&request->arena, text, strlen(text));
}

/* Available: it has an implementation that can run here, or devices. Otherwise the first reason there is. */
static bool fill_provider(struct request *request, const struct provider *provider, struct msg_provider *out)
{
	const struct snapshot *snapshot = request->snapshot;
	struct msg_text *ops = arena_array(&request->arena, snapshot->op_count, sizeof ops[0]);
	struct msg_text *devices = arena_array(&request->arena, snapshot->device_count, sizeof devices[0]);
	struct msg_text *quarantined = arena_array(&request->arena, snapshot->op_count, sizeof quarantined[0]);
	if (ops == NULL || devices == NULL || quarantined == NULL)
		return false;
	out->quarantined = quarantined;
	out->failures = containment_failures(request->context->server->containment, provider);
	out->isolated = provider->isolated;
	out->deaths = provider->isolated ? isolated_deaths(provider->module->isolated) : 0;
	out->unconfined = msg_text(provider->isolated ? isolated_unconfined(provider->module->isolated) : "");
	out->name = msg_text(provider->name);
	out->version = msg_text(provider->version);
	out->source = msg_text(provider->source);
	out->reason = msg_text(provider->reason);
	out->ops = ops;
	out->devices = devices;
	for (uint32_t i = 0; i < snapshot->op_count; i++) {
		const struct impl *impl = op_impl(&snapshot->ops[i], provider);
		if (impl == NULL)
			continue;
		ops[out->op_count++] = msg_text(snapshot->ops[i].schema->name);
		struct msg_text reason;
		if (!fill_reason(request, impl, &reason))
			return false;
		out->available = out->available || reason.data == NULL;
		if (out->reason.data == NULL)
			out->reason = reason;
		const char *out_for = snapshot->quarantined[impl->index];
		if (out_for == NULL)
			continue;
		quarantined[out->quarantined_count] = msg_text(quarantine_text(request, &snapshot->ops[i], out_for));
		if (quarantined[out->quarantined_count++].data == NULL)
			return false;
	}
	for (uint32_t i = 1; i < snapshot->device_count && provider->module != NULL; i++)
		if (snapshot->devices[i].state == provider->module->state)
			devices[out->device_count++] = msg_text(snapshot->devices[i].name);
	/* A module may bring nothing but ops: their definitions are native's. */
	out->available = out->available || out->device_count > 0 || (provider->module != NULL && out->op_count == 0);
	if (out->available)
		out->reason = (struct msg_text){0};
	return true;
}

void inspect_providers(struct request *request)
{
	const struct snapshot *snapshot = request->snapshot;
	struct msg_provider *providers = arena_array(&request->arena, snapshot->provider_count, sizeof providers[0]);
	bool filled = providers != NULL;
	for (uint32_t i = 0; filled && i < snapshot->provider_count; i++)
		filled = fill_provider(request, snapshot->providers[i], &providers[i]);
	if (!filled) {
		fail_memory(request, "list_providers");
		return;
	}
	request->reply.providers.items = providers;
	request->reply.providers.count = snapshot->provider_count;
	request_reply(request, MSG_REPLY_PROVIDERS);
}

static bool fill_devices(struct server *server, const struct snapshot *snapshot, struct arena *arena, struct msg_info *info)
{
	const uint32_t count = snapshot->device_count - 1;
	struct msg_device_state *states = arena_array(arena, count, sizeof states[0]);
	if (states == NULL)
		return false;
	for (uint32_t i = 0; i < count; i++) {
		const struct device *device = &snapshot->devices[1 + i];
		struct device_lane_use use;
		device_lane_use(server, 1 + i, &use);
		states[i] = (struct msg_device_state){msg_text(device->name), use.memory_bytes, use.cached_bytes, use.memory_limit_bytes, use.jobs,
		                                      device->lost == NULL ? (struct msg_text){0} : msg_text(device->lost)};
	}
	info->device_state_count = count;
	info->device_states = states;
	return true;
}

void inspect_info(struct request *request)
{
	struct server *server = request->context->server;
	const struct snapshot *snapshot = request->snapshot;
	struct msg_text *devices = arena_array(&request->arena, snapshot->device_count, sizeof devices[0]);
	uint32_t listener_count = listener_list(server, NULL, 0);
	struct msg_text *listeners = arena_array(&request->arena, listener_count, sizeof listeners[0]);
	if (devices == NULL || listeners == NULL) {
		fail_memory(request, "info");
		return;
	}
	(void)listener_list(server, listeners, listener_count);
	struct derived_statistics derived;
	struct differential_counts checks;
	differential_count(server->differential, &checks);
	derived_count(server->derived, &derived);
	for (uint32_t i = 0; i < snapshot->device_count; i++)
		devices[i] = msg_text(snapshot->devices[i].name);
	request->reply.info = (struct msg_info){
		.version = msg_text(OPD_VERSION),
		.uptime_us = request_now_ns() / 1000 - server->started_us,
		.listener_count = listener_count,
		.listeners = listeners,
		.loops = server->loop_count,
		.threads = lanes_threads(server),
		.device_count = snapshot->device_count,
		.devices = devices,
		.sessions = server_sessions(server),
		.requests = atomic_load_explicit(&server->requests, memory_order_relaxed),
		.memory_bytes = atomic_load_explicit(&server->memory.used_bytes, memory_order_relaxed),
		.memory_limit_bytes = atomic_load_explicit(&server->memory.limit_bytes, memory_order_relaxed),
		.session_memory_bytes = atomic_load_explicit(&request->session->account->used_bytes, memory_order_relaxed),
		.pid = (uint64_t)getpid(),
		.draining = server->draining,
		.graph_runs = atomic_load_explicit(&server->graph_runs, memory_order_relaxed),
		.graph_dispatches = atomic_load_explicit(&server->graph_dispatches, memory_order_relaxed),
		.derived_copies = derived.copies,
		.derived_bytes = derived.bytes,
		.derived_found = derived.found,
		.derived_made = derived.made,
		.stuck = lanes_stuck(server),
		.compared = checks.compared,
		.diverged = checks.diverged,
		.left_out = checks.left_out,
	};
	if (!health_fill(server, snapshot, &request->arena, &request->reply.info) || !fill_devices(server, snapshot, &request->arena, &request->reply.info)) {
		fail_memory(request, "info");
		return;
	}
	request_reply(request, MSG_REPLY_INFO);
}

/* A tensor's row of the list. */
static void fill_kept(const struct kept *kept, const struct snapshot *snapshot, uint32_t index, struct msg_kept *out)
{
	const struct kept_slot *slot = &kept->slots[index];
	const struct kept_tensor *tensor = slot->tensor;
	*out = (struct msg_kept){
		.handle = {index, slot->generation},
		.dtype = tensor->dtype,
		.rank = tensor->rank,
		.bytes = tensor->bytes,
		.received = tensor->parts == NULL ? tensor->bytes : tensor->parts->received_bytes,
		.request = slot->request,
		.output = slot->output,
		.device = msg_text(snapshot->devices[tensor->buffer->device].name),
	};
	memcpy(out->shape, tensor->shape, sizeof out->shape);
}

void inspect_tensors(struct request *request)
{
	const struct kept *kept = &request->session->kept;
	const uint32_t first = request->message.first;
	uint32_t count = 0;
	uint32_t next = first;
	for (; next < kept->slot_count && count < BOUND_LIST; next++)
		count += kept->slots[next].tensor != NULL;
	struct msg_kept *items = arena_array(&request->arena, count, sizeof items[0]);
	if (items == NULL) {
		fail_memory(request, "list_tensors");
		return;
	}
	uint32_t filled = 0;
	for (uint32_t i = first; i < next; i++)
		if (kept->slots[i].tensor != NULL)
			fill_kept(kept, request->snapshot, i, &items[filled++]);
	request->reply.tensors.items = items;
	request->reply.tensors.count = count;
	request->reply.tensors.next = next < kept->slot_count ? next : 0;
	request_reply(request, MSG_REPLY_TENSORS);
}
