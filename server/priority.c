#include "server/priority.h"

#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"
#include "proto/text.h"

/* ---- Lists as given ---- */

struct plist *plist_create(msg_level level, bool star, const struct msg_text *names, uint32_t count)
{
	size_t bytes = sizeof(struct plist) + count * sizeof(struct msg_text);
	for (uint32_t i = 0; i < count; i++)
		bytes += names[i].bytes + 1;
	struct plist *list = calloc(1, bytes);
	if (list == NULL)
		return NULL;
	list->refs = 1;
	list->level = level;
	list->star = star;
	list->count = count;
	list->names = (struct msg_text *)(list + 1);
	char *text = (char *)(list->names + count);
	for (uint32_t i = 0; i < count; i++) {
		memcpy(text, names[i].data, names[i].bytes);
		list->names[i] = (struct msg_text){text, names[i].bytes};
		text += names[i].bytes + 1;
	}
	return list;
}

struct plist *plist_ref(struct plist *list)
{
	if (list != NULL)
		(void)atomic_fetch_add_explicit(&list->refs, 1, memory_order_relaxed);
	return list;
}

void plist_unref(struct plist *list)
{
	if (list == NULL || atomic_fetch_sub_explicit(&list->refs, 1, memory_order_acq_rel) != 1)
		return;
	while (list->cache != NULL) {
		struct effective *effective = list->cache;
		list->cache = effective->next;
		effective_unref(effective);
	}
	for (uint32_t i = 0; i < list->case_count; i++)
		plist_unref(list->cases[i].list);
	free(list->cases);
	free(list->narrowed);
	free(list);
}

opd_status plist_add_case(struct plist *list, const char *text, const struct priority_key *key, struct plist *narrow, opd_error *error)
{
	if (list->case_count == PLIST_CASES_MAX)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: more than %u lists narrow the op's", text, PLIST_CASES_MAX);
	struct plist_case *cases = reallocarray(list->cases, list->case_count + 1, sizeof cases[0]);
	if (cases != NULL)
		list->cases = cases;
	narrow->narrowed = strdup(text);
	if (cases == NULL || narrow->narrowed == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "priority list: out of memory");
	uint32_t at = list->case_count++;
	for (; at > 0 && priority_key_before(key, &cases[at - 1].key); at--)
		cases[at] = cases[at - 1];
	cases[at] = (struct plist_case){*key, plist_ref(narrow)};
	return OPD_OK;
}

/* SEMANTICS 16: a provider of the op (NULL: of any op), or a configured module that isn't there. */
static bool may_name(const struct snapshot *snapshot, const struct op *op, const struct provider *provider)
{
	if (provider->reason != NULL)
		return true;
	if (op != NULL)
		return op_impl(op, provider) != NULL;
	for (uint32_t i = 0; i < snapshot->op_count; i++)
		if (op_impl(&snapshot->ops[i], provider) != NULL)
			return true;
	return false;
}

/* "cpu, native": the providers that a list for this op may name. */
static void describe_choices(const struct snapshot *snapshot, const struct op *op, char *out, size_t out_bytes)
{
	size_t at = 0;
	out[0] = '\0';
	for (uint32_t i = 0; i < snapshot->provider_count && at < out_bytes; i++) {
		const struct provider *provider = snapshot->providers[i];
		if (may_name(snapshot, op, provider)) {
			int wrote = snprintf(out + at, out_bytes - at, "%s%s", at == 0 ? "" : ", ", provider->name);
			at += wrote > 0 ? (size_t)wrote : 0;
		}
	}
}

opd_status plist_check(const struct snapshot *snapshot, const struct op *op, const struct msg_text *names, uint32_t count, opd_error *error)
{
	if (count > BOUND_PROVIDERS)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "priority list of %u providers, at most %u", (unsigned)count, BOUND_PROVIDERS);
	for (uint32_t i = 0; i < count; i++) {
		const struct provider *provider = snapshot_provider(snapshot, names[i].data, names[i].bytes);
		if (provider != NULL && may_name(snapshot, op, provider))
			continue;
		char shown[160];
		char choices[256];
		text_escape(names[i].data, names[i].bytes, shown, sizeof shown);
		describe_choices(snapshot, op, choices, sizeof choices);
		return opd_fail(error, OPD_NOT_FOUND, "priority for %s: \"%s\" is no provider of %s (there are: %s)",
		                op == NULL ? "*" : op->schema->name, shown, op == NULL ? "any op" : "it", choices);
	}
	return OPD_OK;
}

opd_status device_filter_parse(struct msg_text text, struct device_filter *filter_out, opd_error *error)
{
	const char *colon = memchr(text.data, ':', text.bytes);
	struct device_filter filter = {text.data, colon == NULL ? text.bytes : (size_t)(colon - text.data), -1};
	bool valid = text_is_name(filter.kind, filter.kind_bytes);
	if (valid && colon != NULL) {
		const char *end = text.data + text.bytes;
		valid = end - colon >= 2 && end - colon <= 6;
		filter.ordinal = 0;
		for (const char *at = colon + 1; valid && at < end; at++) {
			valid = *at >= '0' && *at <= '9';
			filter.ordinal = filter.ordinal * 10 + (*at - '0');
		}
	}
	if (!valid) {
		char shown[160];
		return opd_fail(error, OPD_INVALID_ARGUMENT, "device \"%s\": expected a kind or kind:number, as cpu or cuda:1",
		                text_escape(text.data, text.bytes, shown, sizeof shown));
	}
	*filter_out = filter;
	return OPD_OK;
}

bool device_filter_finds(const struct device_filter *filter, const struct snapshot *snapshot, const char *kind)
{
	if (strlen(kind) != filter->kind_bytes || memcmp(kind, filter->kind, filter->kind_bytes) != 0)
		return false;
	for (uint32_t i = 0; i < snapshot->device_count; i++)
		if (strcmp(snapshot->devices[i].kind, kind) == 0 && snapshot->devices[i].lost == NULL && (filter->ordinal < 0 || snapshot->devices[i].ordinal == (uint64_t)filter->ordinal))
			return true;
	return false;
}

/* ---- Lists as cut ---- */

/* Room while cutting: a list has at most BOUND_PROVIDERS names, and native may be appended. */
struct cut {
	uint32_t count;
	uint32_t skip_count;
	const struct impl *impls[BOUND_PROVIDERS + 1];
	struct effective_skip skips[BOUND_PROVIDERS + 1];
	char wanted[32]; /* "wanted cuda:1": packed behind the skips that say so */
	uint32_t named; /* supported implementations that the list names for this op, whatever the device */
};

static void cut_skip(struct cut *cut, const char *provider, opd_reason_code code, const char *reason)
{
	if (cut->skip_count < sizeof cut->skips / sizeof cut->skips[0])
		cut->skips[cut->skip_count++] = (struct effective_skip){provider, code, reason};
}

static bool cut_has(const struct cut *cut, const struct impl *impl)
{
	for (uint32_t i = 0; i < cut->count; i++)
		if (cut->impls[i] == impl)
			return true;
	return false;
}

static bool cut_skipped(const struct cut *cut, const struct provider *provider)
{
	for (uint32_t i = 0; i < cut->skip_count; i++)
		if (cut->skips[i].provider == provider->name)
			return true;
	return false;
}

/* A device implementation whose backend isn't loaded, or whose devices are all lost, can't run. NULL: it can. */
static const char *device_missing(const struct snapshot *snapshot, const struct impl *impl)
{
	const char *missing = "no backend for its kind of device is loaded";
	if (impl->on_host)
		return NULL;
	for (uint32_t i = 1; i < snapshot->device_count; i++) {
		if (strcmp(snapshot->devices[i].kind, impl->def->device) != 0)
			continue;
		if (snapshot->devices[i].lost == NULL)
			return NULL;
		missing = snapshot->devices[i].lost;
	}
	return missing;
}

/* Takes one name; true when the list ends with it. */
static bool cut_take(struct cut *cut, const struct snapshot *snapshot, const struct op *op, const struct provider *provider,
                     const struct device_filter *filter)
{
	const struct impl *impl = op_impl(op, provider);
	if (impl == NULL) {
		if (provider->reason != NULL)
			cut_skip(cut, provider->name, OPD_REASON_MODULE, provider->reason);
		else /* through `*`: passed over */
			cut_skip(cut, provider->name, OPD_REASON_NO_IMPLEMENTATION, op->schema->name);
		return false;
	}
	opd_reason_code code;
	const char *unsupported = snapshot_unsupported(snapshot, impl, &code);
	if (unsupported != NULL) {
		cut_skip(cut, provider->name, code, unsupported);
		return false;
	}
	const char *missing = device_missing(snapshot, impl);
	if (missing != NULL) {
		cut_skip(cut, provider->name, OPD_REASON_PLATFORM, missing);
		return false;
	}
	cut->named++;
	if (filter != NULL && !device_filter_finds(filter, snapshot, impl->def->device)) {
		cut_skip(cut, provider->name, OPD_REASON_DEVICE, cut->wanted);
		return false;
	}
	if (!cut_has(cut, impl))
		cut->impls[cut->count++] = impl;
	return impl->complete;
}

static struct effective *effective_pack(const struct snapshot *snapshot, const struct op *op, msg_level level, const struct cut *cut,
                                        struct plist *list)
{
	const size_t wanted_bytes = strlen(cut->wanted) + 1;
	size_t bytes = sizeof(struct effective) + cut->count * sizeof cut->impls[0] + cut->skip_count * sizeof cut->skips[0] + wanted_bytes;
	struct effective *effective = calloc(1, bytes);
	if (effective == NULL)
		return NULL;
	effective->refs = 1;
	effective->op_index = op->index;
	effective->version = snapshot->version;
	effective->level = level;
	effective->count = cut->count;
	effective->skip_count = cut->skip_count;
	effective->skips = (struct effective_skip *)(effective + 1);
	effective->impls = (const struct impl **)(effective->skips + cut->skip_count);
	memcpy(effective->skips, cut->skips, cut->skip_count * sizeof cut->skips[0]);
	memcpy(effective->impls, cut->impls, cut->count * sizeof cut->impls[0]);
	char *wanted = memcpy(effective->impls + cut->count, cut->wanted, wanted_bytes);
	for (uint32_t i = 0; i < cut->skip_count; i++)
		if (effective->skips[i].code == OPD_REASON_DEVICE)
			effective->skips[i].reason = wanted;
	effective->list = plist_ref(list);
	return effective;
}

struct effective *effective_create(const struct snapshot *snapshot, const struct op *op, msg_level level, const struct msg_text *names,
                                   uint32_t count, const struct device_filter *filter, struct plist *list)
{
	struct cut cut = {0};
	bool ended = false;
	if (filter != NULL && filter->ordinal >= 0)
		(void)snprintf(cut.wanted, sizeof cut.wanted, "wanted %.*s:%lld", (int)filter->kind_bytes, filter->kind, (long long)filter->ordinal);
	else if (filter != NULL)
		(void)snprintf(cut.wanted, sizeof cut.wanted, "wanted %.*s", (int)filter->kind_bytes, filter->kind);
	for (uint32_t i = 0; i < count && !ended && i < BOUND_PROVIDERS; i++) {
		const struct provider *provider = snapshot_provider(snapshot, names[i].data, names[i].bytes);
		if (provider != NULL)
			ended = cut_take(&cut, snapshot, op, provider, filter);
	}
	/* Native is the first implementation of every op. With a device asked for, nothing of another kind is appended. */
	bool append = !ended && (filter == NULL || device_filter_finds(filter, snapshot, "cpu"));
	if (append)
		cut.impls[cut.count++] = op->impls[0];
	else if (!ended && !cut_skipped(&cut, op->impls[0]->provider))
		cut_skip(&cut, op->impls[0]->provider->name, OPD_REASON_DEVICE, cut.wanted);
	struct effective *effective = effective_pack(snapshot, op, level, &cut, list);
	if (effective != NULL) {
		effective->appended = append;
		effective->empty = cut.named == 0;
	}
	return effective;
}

bool effective_add_cases(struct effective *effective, const struct snapshot *snapshot, const struct op *op, const struct plist *list,
                         const struct device_filter *filter)
{
	if (list->case_count == 0)
		return true;
	effective->cases = calloc(list->case_count, sizeof effective->cases[0]);
	if (effective->cases == NULL)
		return false;
	for (uint32_t i = 0; i < list->case_count; i++) {
		const struct plist_case *narrow = &list->cases[i];
		struct effective *cut =
			effective_create(snapshot, op, list->level, narrow->list->names, narrow->list->count, filter, narrow->list);
		if (cut == NULL)
			return false;
		cut->narrowed = narrow->list->narrowed;
		effective->cases[effective->case_count++] = (struct effective_case){narrow->key.dtype, narrow->key.rows_max, cut};
	}
	return true;
}

static const opd_tensor *first_tensor(const opd_call *call)
{
	for (uint32_t i = 0; i < call->arg_count; i++) {
		if (call->args[i].kind == OPD_ARG_TENSOR)
			return call->args[i].tensor;
		if (call->args[i].kind == OPD_ARG_TENSORS && call->args[i].count > 0)
			return call->args[i].tensors[0];
	}
	return NULL;
}

const struct effective *effective_for(const struct effective *effective, const opd_call *call)
{
	const opd_tensor *first = effective->case_count == 0 ? NULL : first_tensor(call);
	if (first == NULL)
		return effective;
	uint64_t last = first->rank == 0 ? 1 : (uint64_t)first->shape[first->rank - 1];
	uint64_t rows = last == 0 ? 0 : first->elements / last;
	for (uint32_t i = 0; i < effective->case_count; i++) {
		const struct effective_case *narrow = &effective->cases[i];
		if ((narrow->dtype == OPD_DTYPE_NONE || narrow->dtype == first->dtype) && rows <= narrow->rows_max)
			return narrow->effective;
	}
	return effective;
}

struct effective *effective_create_none(const struct snapshot *snapshot, const struct op *op, const struct device_filter *filter)
{
	return effective_create(snapshot, op, MSG_LEVEL_NONE, NULL, 0, filter, NULL);
}

struct effective *effective_get(const struct snapshot *snapshot, const struct op *op, struct plist *list)
{
	struct effective **link = &list->cache;
	while (*link != NULL) {
		struct effective *seen = *link;
		if (seen->op_index == op->index && seen->version == snapshot->version)
			return effective_ref(seen);
		if (seen->version != snapshot->version) { /* of a registry that has changed since */
			*link = seen->next;
			effective_unref(seen);
		} else {
			link = &seen->next;
		}
	}
	struct effective *made = effective_create(snapshot, op, list->level, list->names, list->count, NULL, NULL);
	if (made == NULL)
		return NULL;
	made->next = list->cache;
	list->cache = made;
	return effective_ref(made);
}

const struct msg_text *effective_list_names(const struct effective *effective, uint32_t count, struct arena *arena)
{
	struct msg_text *names = arena_array(arena, count, sizeof names[0]);
	for (uint32_t i = 0; names != NULL && i < count; i++)
		names[i] = msg_text(effective->impls[i]->provider->name);
	return names;
}

struct effective *effective_ref(struct effective *effective)
{
	(void)atomic_fetch_add_explicit(&effective->refs, 1, memory_order_relaxed);
	return effective;
}

void effective_unref(struct effective *effective)
{
	if (effective == NULL || atomic_fetch_sub_explicit(&effective->refs, 1, memory_order_acq_rel) != 1)
		return;
	for (uint32_t i = 0; i < effective->case_count; i++)
		effective_unref(effective->cases[i].effective);
	free(effective->cases);
	plist_unref(effective->list);
	free(effective);
}

/* ---- Warnings ---- */

/* True the first time for this op. */
static bool first_time(_Atomic uint32_t *bits, uint32_t index)
{
	uint32_t bit = 1u << (index % 32);
	if ((atomic_load_explicit(&bits[index / 32], memory_order_relaxed) & bit) != 0)
		return false;
	return (atomic_fetch_or_explicit(&bits[index / 32], bit, memory_order_relaxed) & bit) == 0;
}

static void effective_warn_one(const struct effective *effective, const struct op *op, struct log *log, _Atomic uint32_t *once, struct log_limit *limit)
{
	if (!effective->appended)
		return;
	uint32_t suppressed = 0;
	if (once != NULL ? !first_time(once, op->index) : !log_limit_take(limit, 10, &suppressed))
		return;
	const char *name = op->schema->name;
	if (effective->level == MSG_LEVEL_NONE)
		LOG(log, LOG_WARN, "priority not set, using native: set one to silence this", LOG_STR("op", name));
	else if (effective->empty)
		LOG(log, LOG_WARN, "priority list is empty or has only unsupported providers, using native: add native to the list to silence this",
		    LOG_STR("op", name), LOG_STR("level", msg_level_name(effective->level)), LOG_UINT("suppressed", suppressed));
	else
		LOG(log, LOG_WARN, "no listed provider supports all arguments, falling back to native is possible: add native to the list to silence this",
		    LOG_STR("op", name), LOG_STR("level", msg_level_name(effective->level)), LOG_UINT("suppressed", suppressed));
}

void effective_warn(const struct effective *effective, const struct op *op, struct log *log, _Atomic uint32_t *once, struct log_limit *limit)
{
	effective_warn_one(effective, op, log, once, limit);
	for (uint32_t i = 0; i < effective->case_count; i++)
		effective_warn_one(effective->cases[i].effective, op, log, effective->cases[i].effective->list->warned, limit);
}
