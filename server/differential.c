#include "server/differential.h"

#include <inttypes.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "providers/estimate.h"
#include "server/case_write.h"
#include "server/compare.h"
#include "server/containment.h"
#include "server/daemon.h"
#include "server/module.h"
#include "server/request.h"

#define CHECKS_MAX 4u
#define FILES_MAX 16u /* of one run of the daemon: the first ones tell, a disk isn't filled */
#define ARENA_BYTES (1u << 20)

struct differential {
	struct server *server;
	_Atomic uint64_t compared;
	_Atomic uint64_t diverged;
	_Atomic uint64_t left_out;
	_Atomic uint64_t held_bytes;
	_Atomic uint32_t checks; /* under way */
	_Atomic uint32_t files;
	pthread_mutex_t mutex; /* of what follows */
	uint64_t memory_bytes;
	char folder[512];
};

/* One comparison: all that it reads is its own, or held. */
struct check {
	struct lane_job job; /* first */
	struct differential *differential;
	struct arena arena;
	struct snapshot *snapshot;
	const struct op *op;
	const struct impl *impl;      /* whose results are looked at */
	const struct impl *reference;
	opd_call call;                /* its outputs are those results */
	const opd_tensor **wanted;    /* the reference's */
	uint64_t held_bytes;
	uint64_t bounds_bytes; /* of them, what compare_bounds_make takes: charged to the daemon */
	uint64_t session;
	char tenant[TENANT_NAME_BYTES];
	uint64_t request;
	uint32_t buffer_count;
	struct buffer **buffers;
	uint32_t kept_count;
	struct kept_tensor **kept;
};

opd_status differential_create(struct server *server, struct differential **differential_out, opd_error *error)
{
	struct differential *differential = calloc(1, sizeof *differential);
	if (differential == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "differential: out of memory");
	differential->server = server;
	(void)pthread_mutex_init(&differential->mutex, NULL); /* of glibc, it can't fail */
	*differential_out = differential;
	return OPD_OK;
}

void differential_destroy(struct differential *differential)
{
	if (differential == NULL)
		return;
	(void)pthread_mutex_destroy(&differential->mutex);
	free(differential);
}

void differential_configure(struct differential *differential, const struct config *config)
{
	(void)pthread_mutex_lock(&differential->mutex);
	differential->memory_bytes = config->differential_bytes;
	(void)snprintf(differential->folder, sizeof differential->folder, "%s", config->differential_folder == NULL ? "" : config->differential_folder);
	(void)pthread_mutex_unlock(&differential->mutex);
}

void differential_count(const struct differential *differential, struct differential_counts *counts_out)
{
	*counts_out = (struct differential_counts){
		atomic_load_explicit(&differential->compared, memory_order_relaxed),
		atomic_load_explicit(&differential->diverged, memory_order_relaxed),
		atomic_load_explicit(&differential->left_out, memory_order_relaxed),
	};
}

/* ---- Taking a sample ---- */

static void check_free(struct check *check)
{
	struct differential *differential = check->differential;
	for (uint32_t i = 0; i < check->buffer_count; i++)
		buffer_unref(check->buffers[i]);
	for (uint32_t i = 0; i < check->kept_count; i++)
		kept_tensor_unref(check->kept[i]);
	snapshot_unref(check->snapshot);
	arena_fini(&check->arena);
	account_release(differential->server->account, check->bounds_bytes);
	(void)atomic_fetch_sub_explicit(&differential->held_bytes, check->held_bytes, memory_order_relaxed);
	(void)atomic_fetch_sub_explicit(&differential->checks, 1, memory_order_relaxed);
	free(check);
}

static void hold_buffer(struct check *check, struct buffer *buffer)
{
	if (buffer == NULL)
		return;
	check->buffers[check->buffer_count++] = buffer_ref(buffer);
	check->held_bytes += buffer->charged_bytes;
}

static opd_tensor *copy_tensor(struct check *check, const opd_tensor *from)
{
	opd_tensor *tensor = arena_alloc(&check->arena, sizeof *tensor);
	int64_t *extents = arena_array(&check->arena, 2 * OPD_RANK_MAX, sizeof extents[0]);
	if (tensor == NULL || extents == NULL)
		return NULL;
	*tensor = *from;
	memcpy(extents, from->shape, from->rank * sizeof extents[0]);
	memcpy(extents + OPD_RANK_MAX, from->strides, from->rank * sizeof extents[0]);
	tensor->shape = extents;
	tensor->strides = extents + OPD_RANK_MAX;
	tensor->flags &= ~(uint32_t)OPD_TENSOR_CONSTANT; /* no derived copies for a check */
	return tensor;
}

static bool copy_arg(struct check *check, const opd_arg *from, opd_arg *to)
{
	*to = *from;
	switch ((opd_arg_kind)from->kind) {
	case OPD_ARG_TENSOR:
		return (to->tensor = copy_tensor(check, from->tensor)) != NULL;
	case OPD_ARG_TENSORS: {
		const opd_tensor **list = arena_array(&check->arena, from->count, sizeof list[0]);
		for (uint32_t i = 0; list != NULL && i < from->count; i++)
			if ((list[i] = copy_tensor(check, from->tensors[i])) == NULL)
				return false;
		to->tensors = list;
		return list != NULL;
	}
	case OPD_ARG_INTS: {
		int64_t *ints = arena_array(&check->arena, from->count, sizeof ints[0]);
		if (ints != NULL && from->count != 0)
			memcpy(ints, from->ints, from->count * sizeof ints[0]);
		to->ints = ints;
		return ints != NULL;
	}
	case OPD_ARG_STR:
		return (to->str = arena_text(&check->arena, from->str, from->count)) != NULL;
	default:
		return true;
	}
}

static bool copy_call(struct check *check, const opd_call *from)
{
	opd_arg *args = arena_array(&check->arena, from->arg_count, sizeof args[0]);
	const opd_tensor **outputs = arena_array(&check->arena, from->output_count, sizeof outputs[0]);
	bool copied = args != NULL && outputs != NULL;
	for (uint32_t i = 0; copied && i < from->arg_count; i++)
		copied = copy_arg(check, &from->args[i], &args[i]);
	for (uint32_t i = 0; copied && i < from->output_count; i++)
		copied = (outputs[i] = copy_tensor(check, from->outputs[i])) != NULL;
	check->call = (opd_call){.struct_bytes = sizeof check->call, .flags = from->flags, .arg_count = from->arg_count, .output_count = from->output_count,
	                         .args = args, .outputs = outputs};
	return copied;
}

/* What the call reads and has written stays as it is: nothing of it may be the client's, or be written in place. */
static bool can_be_held(const struct request *request)
{
	const struct request_run *run = &request->run;
	if (request->direct || run->donation_count != 0 || run->region_count != 0 || !run->dispatch.impl->on_host || run->resident != NULL)
		return false;
	for (uint32_t i = 0; i < run->bound.operand_count; i++)
		if (run->bound.operands[i].tensor.data == NULL)
			return false;
	for (uint32_t i = 0; i < run->bound.call.output_count; i++)
		if (run->outputs[i] == NULL)
			return false;
	return true;
}

/* The results of the reference, in memory of the daemon's. */
static bool make_wanted(struct check *check, struct account *account)
{
	check->wanted = arena_array(&check->arena, check->call.output_count, sizeof check->wanted[0]);
	for (uint32_t i = 0; check->wanted != NULL && i < check->call.output_count; i++) {
		opd_tensor *tensor = copy_tensor(check, check->call.outputs[i]);
		struct buffer *buffer;
		if (tensor == NULL || buffer_alloc(account, tensor->elements * opd_dtype_bytes(tensor->dtype), 0, &buffer, NULL) != OPD_OK)
			return false;
		tensor->data = buffer->data;
		tensor->byte_offset = 0;
		check->wanted[i] = tensor;
		hold_buffer(check, buffer);
		buffer_unref(buffer);
	}
	return check->wanted != NULL;
}

static bool hold_all(struct check *check, struct request *request)
{
	struct request_run *run = &request->run;
	const uint32_t operands = run->bound.operand_count;
	check->buffers = arena_array(&check->arena, operands + 2 * run->bound.call.output_count + 1, sizeof check->buffers[0]);
	check->kept = arena_array(&check->arena, operands, sizeof check->kept[0]);
	if (check->buffers == NULL || check->kept == NULL || !copy_call(check, &run->bound.call))
		return false;
	hold_buffer(check, request->payload);
	for (uint32_t i = 0; i < operands; i++) {
		hold_buffer(check, run->bound.operands[i].buffer);
		if (run->kept != NULL && run->kept[i] != NULL)
			check->kept[check->kept_count++] = kept_tensor_ref(run->kept[i]);
	}
	for (uint32_t i = 0; i < run->bound.call.output_count; i++)
		hold_buffer(check, run->outputs[i]);
	return make_wanted(check, request->context->server->account);
}

static const struct impl *find_reference(const struct request *request, const struct containment_policy *policy)
{
	const struct request_run *run = &request->run;
	const uint32_t index = atomic_load_explicit(&policy->compare, memory_order_relaxed);
	const struct impl *reference =
		index >= request->snapshot->provider_count ? NULL : op_impl(run->op, request->snapshot->providers[index]);
	opd_reason_code code;
	if (reference == NULL || reference == run->dispatch.impl || !reference->on_host || snapshot_unsupported(request->snapshot, reference, &code) != NULL ||
	    !dispatch_accepts(reference, run->op, &run->bound.call, NULL))
		return NULL;
	return reference;
}

static void check_run(struct lane_job *job, struct lane_exec *exec);
static void check_done(struct lane_job *job);

static uint64_t memory_limit(struct differential *differential)
{
	(void)pthread_mutex_lock(&differential->mutex);
	const uint64_t limit = differential->memory_bytes;
	(void)pthread_mutex_unlock(&differential->mutex);
	return limit;
}

static bool within_memory(struct differential *differential, const struct check *check)
{
	return atomic_fetch_add_explicit(&differential->held_bytes, check->held_bytes, memory_order_relaxed) + check->held_bytes <= memory_limit(differential);
}

/* A few bytes may be many elements, by strides of 0: what the comparison makes of them is held to the same limit, before it is made. */
static bool charge_bounds(struct check *check)
{
	struct differential *differential = check->differential;
	const uint64_t bytes = compare_bounds_bytes(check->op, &check->call);
	if (bytes > memory_limit(differential) || account_charge(differential->server->account, bytes, NULL) != OPD_OK)
		return false;
	check->bounds_bytes = bytes;
	check->held_bytes += bytes;
	return true;
}

/* False: it is left out. */
static bool start(struct differential *differential, struct request *request, const struct impl *reference)
{
	struct check *check = calloc(1, sizeof *check);
	if (check == NULL)
		return false;
	(void)atomic_fetch_add_explicit(&differential->checks, 1, memory_order_relaxed);
	arena_init(&check->arena, ARENA_BYTES);
	check->differential = differential;
	check->snapshot = snapshot_ref(request->snapshot);
	check->op = request->run.op;
	check->impl = request->run.dispatch.impl;
	check->reference = reference;
	check->session = request->session->id;
	(void)snprintf(check->tenant, sizeof check->tenant, "%s", request->session->tenant->name);
	check->request = request->id;
	const bool held = hold_all(check, request) && charge_bounds(check);
	if (!within_memory(differential, check) || !held) {
		check_free(check);
		return false;
	}
	check->job = (struct lane_job){.run = check_run, .done = check_done};
	lane_submit_list(request->session->lane, &check->job);
	return true;
}

void differential_sample(struct differential *differential, struct request *request)
{
	struct containment_policy *policy = containment_policy_of(differential->server->containment, request->run.dispatch.impl->provider);
	const uint32_t every = atomic_load_explicit(&policy->compare_every, memory_order_relaxed);
	if (every == 0 || atomic_fetch_add_explicit(&policy->compare_seen, 1, memory_order_relaxed) % every != 0)
		return;
	const struct impl *reference = find_reference(request, policy);
	if (reference != NULL && can_be_held(request) && atomic_load_explicit(&differential->checks, memory_order_relaxed) < CHECKS_MAX &&
	    start(differential, request, reference))
		return;
	(void)atomic_fetch_add_explicit(&differential->left_out, 1, memory_order_relaxed);
}

/* ---- On the lane ---- */

static opd_status run_reference(struct check *check, const struct lane_exec *lane, opd_exec *exec, opd_error *error)
{
	const struct impl *reference = check->reference;
	struct server *server = check->differential->server;
	opd_call call = check->call;
	struct plan *plan = NULL;
	struct buffer *scratch = NULL;
	opd_status status = OPD_OK;
	call.outputs = check->wanted;
	*exec = (opd_exec){.struct_bytes = sizeof *exec, .threads = lane->threads, .host = &reference->provider->module->host, .lane = (void *)lane};
	if (reference->def->plan != NULL)
		status = plans_make(server->plans, check->snapshot, reference, &check->call, &plan, error);
	if (status == OPD_OK && plan != NULL && plan->refused)
		status = opd_fail(error, OPD_FAILED_PRECONDITION, "%s.%s: its plan refuses", reference->provider->name, check->op->schema->name);
	if (status == OPD_OK && plan != NULL && plan->made.scratch_bytes != 0)
		status = buffer_alloc(server->account, plan->made.scratch_bytes, 0, &scratch, error);
	if (status == OPD_OK) {
		exec->plan = plan == NULL ? NULL : &plan->made;
		exec->scratch = scratch == NULL ? NULL : scratch->data;
		status = reference->def->run(reference->def, reference->state, &call, exec, error);
	}
	buffer_unref(scratch);
	plan_unref(plan);
	return status;
}

/* A case file has every element. */
static uint64_t laid_out_bytes(const struct check *check)
{
	uint64_t bytes = 0;
	for (uint32_t i = 0; i < check->call.arg_count; i++)
		if (check->call.args[i].kind == OPD_ARG_TENSOR)
			bytes = estimate_add(bytes, bound_bytes(check->call.args[i].tensor));
	return bytes;
}

/* The first of a run leave a file, where somebody wants them. */
static void write_case(struct check *check)
{
	struct differential *differential = check->differential;
	struct log *log = differential->server->log;
	char path[800];
	opd_error error;
	(void)pthread_mutex_lock(&differential->mutex);
	const bool wanted = differential->folder[0] != '\0';
	(void)snprintf(path, sizeof path, "%s/%s-%s-%" PRIu64 "-%" PRIu64 ".safetensors", differential->folder, check->op->schema->name,
	               check->impl->provider->name, check->session, check->request);
	(void)pthread_mutex_unlock(&differential->mutex);
	if (wanted && laid_out_bytes(check) > memory_limit(differential)) {
		LOG(log, LOG_WARN, "case of a divergence not written", LOG_STR("error", "its operands, laid out, are larger than differential.memory"), LOG_UINT("bytes", laid_out_bytes(check)));
		return;
	}
	if (!wanted || atomic_fetch_add_explicit(&differential->files, 1, memory_order_relaxed) >= FILES_MAX)
		return;
	if (case_write(path, check->op, &check->call, check->wanted, &error) == OPD_OK)
		LOG(log, LOG_INFO, "case of a divergence written", LOG_STR("path", path));
	else
		LOG(log, LOG_WARN, "case of a divergence not written", LOG_STR("error", error.text));
}

/* Where the operator wants case files, values may be told as well. */
static bool tells_contents(struct differential *differential)
{
	(void)pthread_mutex_lock(&differential->mutex);
	const bool tells = differential->folder[0] != '\0';
	(void)pthread_mutex_unlock(&differential->mutex);
	return tells;
}

static void on_difference(struct check *check, const struct difference *difference)
{
	struct server *server = check->differential->server;
	char arguments[400], got[32], wanted[32];
	(void)atomic_fetch_add_explicit(&check->differential->diverged, 1, memory_order_relaxed);
	dispatch_describe(check->op, &check->call, arguments, sizeof arguments);
	const bool contents = tells_contents(check->differential);
	(void)snprintf(got, sizeof got, contents ? "%.9g" : "", difference->got);
	(void)snprintf(wanted, sizeof wanted, contents ? "%.9g" : "", difference->wanted);
	LOG(server->log, LOG_ERROR, "providers diverge", LOG_STR("provider", check->impl->provider->name), LOG_STR("reference", check->reference->provider->name),
	    LOG_STR("op", check->op->schema->name), LOG_STR("arguments", arguments), LOG_UINT("result", difference->result),
	    LOG_UINT("element", difference->element), LOG_STR("got", got), LOG_STR("wanted", wanted), LOG_UINT("session", check->session),
	    LOG_UINT("request", check->request));
	write_case(check);
	containment_failed(server->containment, check->impl, FAILURE_DIVERGENCE, check->tenant);
}

static void check_run(struct lane_job *job, struct lane_exec *lane)
{
	struct check *check = (struct check *)job;
	struct compare_bounds bounds;
	struct difference difference;
	opd_exec exec;
	opd_error error = {0};
	opd_status status = run_reference(check, lane, &exec, &error);
	if (status == OPD_OK)
		status = compare_bounds_make(check->op, &check->call, &exec, &bounds, &error);
	if (status == OPD_OK && !bounds.unknown) {
		(void)atomic_fetch_add_explicit(&check->differential->compared, 1, memory_order_relaxed);
		if (!compare_outputs(check->op->def, &bounds, check->call.outputs, check->wanted, check->call.output_count, &difference))
			on_difference(check, &difference);
	} else {
		(void)atomic_fetch_add_explicit(&check->differential->left_out, 1, memory_order_relaxed);
	}
	if (status == OPD_OK)
		compare_bounds_free(&bounds);
	else if (status != OPD_FAILED_PRECONDITION)
		LOG(check->differential->server->log, LOG_WARN, "a comparison failed", LOG_STR("op", check->op->schema->name), LOG_STR("error", error.text));
}

static void check_done(struct lane_job *job)
{
	check_free((struct check *)job);
}
