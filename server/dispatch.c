#include "server/dispatch.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "proto/text.h"

/* An older schema doesn't know the op's newest parameters: it takes the call only where those have their defaults. */
static bool knows_arguments(const struct impl *impl, const struct op *op, const opd_call *call, opd_reason *reason)
{
	for (uint32_t i = impl->params; i < op->schema->param_count; i++)
		if (!schema_arg_equal(&call->args[i], &op->schema->params[i].value))
			return OPD_REFUSE(reason, OPD_REASON_SCHEMA, "%s not known", op->schema->params[i].name);
	return true;
}

bool dispatch_accepts(const struct impl *impl, const struct op *op, const opd_call *call, opd_reason *reason)
{
	if (impl->params != op->schema->param_count && !knows_arguments(impl, op, call, reason))
		return false;
	return impl->def->predicate == NULL || impl->def->predicate(impl->def, impl->state, call, reason);
}

opd_status dispatch_init(struct dispatch *dispatch, const struct snapshot *snapshot, const struct effective *effective, struct plans *plans,
                         struct log *log, const struct op *op, bool strict, const opd_call *call, opd_error *error)
{
	effective = effective_for(effective, call);
	if (strict && effective->level == MSG_LEVEL_NONE)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "no priority is set for %s, and the request is strict", op->schema->name);
	*dispatch = (struct dispatch){
		.snapshot = snapshot,
		.effective = effective,
		.plans = plans,
		.log = log,
		.count = effective->count - (strict && effective->appended ? 1 : 0),
	};
	return OPD_OK;
}

void dispatch_fini(struct dispatch *dispatch)
{
	plan_unref(dispatch->plan);
	dispatch->plan = NULL;
	while (dispatch->refusal_count > 0)
		plan_unref(dispatch->refusals[--dispatch->refusal_count].plan);
}

/* Takes the reference. */
static void keep_refusal(struct dispatch *dispatch, struct plan *plan)
{
	if (dispatch->refusal_count < DISPATCH_REFUSALS_MAX)
		dispatch->refusals[dispatch->refusal_count++] = (struct dispatch_refusal){plan, dispatch->index};
	else
		plan_unref(plan);
}

/* Appends "name f32[2,4]"; returns the new end, at most out_bytes. */
static size_t describe_tensor(const char *name, const opd_tensor *tensor, size_t at, char *out, size_t out_bytes)
{
	at += (size_t)snprintf(out + at, out_bytes - at, "%s%s %s[", at == 0 ? "" : ", ", name, opd_dtype_name(tensor->dtype));
	for (uint32_t d = 0; d < tensor->rank && at < out_bytes; d++)
		at += (size_t)snprintf(out + at, out_bytes - at, "%s%" PRId64, d == 0 ? "" : ",", tensor->shape[d]);
	if (at < out_bytes)
		at += (size_t)snprintf(out + at, out_bytes - at, "]");
	return at < out_bytes ? at : out_bytes;
}

void dispatch_describe(const struct op *op, const opd_call *call, char *out, size_t out_bytes)
{
	size_t at = 0;
	out[0] = '\0';
	for (uint32_t i = 0; i < call->arg_count; i++) {
		const opd_arg *arg = &call->args[i];
		const char *name = op->schema->params[i].name;
		if (arg->kind == OPD_ARG_TENSOR && at < out_bytes)
			at = describe_tensor(name, arg->tensor, at, out, out_bytes);
		for (uint32_t k = 0; arg->kind == OPD_ARG_TENSORS && k < arg->count && at < out_bytes; k++)
			at = describe_tensor(name, arg->tensors[k], at, out, out_bytes);
	}
}

static void log_refusal(const struct dispatch *dispatch, const struct impl *impl, const struct op *op, const opd_call *call,
                        const opd_reason *known)
{
	static struct log_limit limit; /* a flood of skips must not drown the log */
	uint32_t suppressed;
	if (!log_limit_take(&limit, 600, &suppressed))
		return;
	opd_reason reason = {0};
	if (known == NULL)
		(void)dispatch_accepts(impl, op, call, &reason);
	else
		reason = *known;
	char arguments[400];
	dispatch_describe(op, call, arguments, sizeof arguments);
	LOG(dispatch->log, LOG_DEBUG, "provider skipped", LOG_STR("provider", impl->provider->name), LOG_STR("op", op->schema->name),
	    LOG_STR("reason", opd_reason_code_text((opd_reason_code)reason.code)), LOG_STR("detail", reason.detail),
	    LOG_STR("arguments", arguments), LOG_UINT("suppressed", suppressed));
}

/* Looks for the plan; false when it is known to refuse. */
static bool check_plan(struct dispatch *dispatch, const struct impl *impl, const struct op *op, const opd_call *call)
{
	struct plan *plan = plans_find(dispatch->plans, dispatch->snapshot, impl, call);
	if (plan != NULL && plan->refused) {
		if (log_enabled(dispatch->log, LOG_DEBUG))
			log_refusal(dispatch, impl, op, call, &plan->reason);
		keep_refusal(dispatch, plan);
		return false;
	}
	dispatch->plan = plan;
	dispatch->plan_missing = plan == NULL;
	return true;
}

bool dispatch_walk(struct dispatch *dispatch, const opd_call *call)
{
	const struct op *op = &dispatch->snapshot->ops[dispatch->effective->op_index];
	plan_unref(dispatch->plan);
	dispatch->plan = NULL;
	dispatch->plan_missing = false;
	for (; dispatch->index < dispatch->count; dispatch->index++) {
		const struct impl *impl = dispatch->effective->impls[dispatch->index];
		if (dispatch->access != NULL && !access_has_provider(dispatch->access, impl->provider->name))
			continue;
		if (!dispatch_accepts(impl, op, call, NULL)) {
			if (log_enabled(dispatch->log, LOG_DEBUG))
				log_refusal(dispatch, impl, op, call, NULL);
			continue;
		}
		if (impl->def->plan != NULL && !check_plan(dispatch, impl, op, call))
			continue;
		dispatch->impl = impl;
		return true;
	}
	dispatch->impl = NULL;
	return false;
}

bool dispatch_next(struct dispatch *dispatch, const opd_call *call)
{
	if (dispatch->plan != NULL && dispatch->plan->refused) {
		keep_refusal(dispatch, dispatch->plan);
		dispatch->plan = NULL;
	}
	dispatch->index++;
	return dispatch_walk(dispatch, call);
}

/* The reason of the walked implementation at `index`; false when there is none to give (it accepted, and failed later). */
static bool walked_reason(const struct dispatch *dispatch, uint32_t index, const struct op *op, const opd_call *call,
                          opd_reason *reason)
{
	const struct impl *impl = dispatch->effective->impls[index];
	for (uint32_t i = 0; i < dispatch->refusal_count; i++)
		if (dispatch->refusals[i].index == index) {
			*reason = dispatch->refusals[i].plan->reason;
			return true;
		}
	if (dispatch->access != NULL && !access_has_provider(dispatch->access, impl->provider->name))
		return !OPD_REFUSE(reason, OPD_REASON_PERMISSION, "not for %s", dispatch->access->identity);
	if (!dispatch_accepts(impl, op, call, reason))
		return true;
	if (impl->def->plan == NULL)
		return false;
	struct plan *plan = plans_find(dispatch->plans, dispatch->snapshot, impl, call);
	bool refused = plan != NULL && plan->refused;
	if (refused)
		*reason = plan->reason;
	plan_unref(plan);
	return refused;
}

static struct msg_text reason_text(struct arena *arena, opd_reason_code code, const char *detail)
{
	char text[400];
	char shown[800]; /* a detail may be cut within a character, or quote a client's text */
	(void)snprintf(text, sizeof text, "%s: %s", opd_reason_code_text(code), detail);
	text_escape(text, strlen(text), shown, sizeof shown);
	return msg_text(arena_text(arena, shown, strlen(shown)));
}

const struct msg_skip *dispatch_skips(const struct dispatch *dispatch, const struct op *op, const opd_call *call, struct arena *arena,
                                      uint32_t *count_out)
{
	const struct effective *effective = dispatch->effective;
	struct msg_skip *skips = arena_array(arena, effective->skip_count + dispatch->index + 1, sizeof skips[0]);
	if (skips == NULL)
		return NULL;
	uint32_t count = 0;
	for (uint32_t i = 0; i < effective->skip_count; i++) {
		const struct effective_skip *skip = &effective->skips[i];
		skips[count++] = (struct msg_skip){msg_text(skip->provider), skip->code, reason_text(arena, skip->code, skip->reason)};
	}
	for (uint32_t i = 0; i < dispatch->index && i < dispatch->count; i++) {
		const struct impl *impl = effective->impls[i];
		opd_reason reason = {0};
		if (!walked_reason(dispatch, i, op, call, &reason))
			opd_reason_set(&reason, OPD_REASON_NONE, "accepted, but its kernel failed");
		opd_reason_code code = (opd_reason_code)reason.code;
		skips[count++] = (struct msg_skip){msg_text(impl->provider->name), code, reason_text(arena, code, reason.detail)};
	}
	*count_out = count;
	return skips;
}

/* Appends to `text`, which has at + 1 bytes already; returns the new length, at most text_bytes - 1. */
OPD_PRINTF(4, 5)
static size_t append(char *text, size_t text_bytes, size_t at, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	const int wrote = vsnprintf(text + at, text_bytes - at, format, arguments);
	va_end(arguments);
	const size_t end = at + (wrote > 0 ? (size_t)wrote : 0);
	return end < text_bytes ? end : text_bytes - 1;
}

static bool was_skipped(const struct msg_skip *skips, uint32_t count, const char *provider)
{
	for (uint32_t i = 0; i < count; i++)
		if (strcmp(skips[i].provider.data, provider) == 0)
			return true;
	return false;
}

/* Whether a request could have named it: it isn't among the skips, and it runs where the call wants to. */
static bool may_be_named(const struct dispatch *dispatch, const struct impl *impl, struct msg_text wanted, const struct msg_skip *skips, uint32_t count)
{
	struct device_filter filter;
	opd_error ignored; /* a text that is none has been refused before */
	if (!impl->supported || was_skipped(skips, count, impl->provider->name))
		return false;
	return wanted.bytes == 0 || (device_filter_parse(wanted, &filter, &ignored) == OPD_OK && device_filter_finds(&filter, dispatch->snapshot, impl->def->device));
}

opd_status dispatch_refused(const struct dispatch *dispatch, const struct op *op, struct msg_text wanted, const struct msg_skip *skips, uint32_t count, opd_error *error)
{
	char reasons[OPD_ERROR_TEXT_BYTES] = "the list is empty";
	size_t at = count == 0 ? strlen(reasons) : 0;
	count = skips == NULL ? 0 : count;
	for (uint32_t i = 0; i < count; i++)
		at = append(reasons, sizeof reasons, at, "%s%s (%s)", i == 0 ? "" : ", ", skips[i].provider.data, skips[i].reason.data == NULL ? "" : skips[i].reason.data);
	/* Who else has the op: the way out is another list, by whoever asked. */
	const char *between = "; not on it: ";
	for (uint32_t i = 0; i < op->impl_count; i++)
		if (may_be_named(dispatch, op->impls[i], wanted, skips, count)) {
			at = append(reasons, sizeof reasons, at, "%s%s", between, op->impls[i]->provider->name);
			between = ", ";
		}
	return opd_fail(error, OPD_FAILED_PRECONDITION, "%s: no provider of the list takes this call: %s", op->schema->name, reasons);
}
