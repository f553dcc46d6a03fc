/* Snapshots: the registry as requests see it. */
#include <stdlib.h>
#include <string.h>

#include "proto/text.h"
#include "server/registry_internal.h"

struct snapshot *snapshot_ref(struct snapshot *snapshot)
{
	(void)atomic_fetch_add_explicit(&snapshot->refs, 1, memory_order_relaxed);
	return snapshot;
}

void snapshot_unref(struct snapshot *snapshot)
{
	if (snapshot == NULL || atomic_fetch_sub_explicit(&snapshot->refs, 1, memory_order_acq_rel) != 1)
		return;
	for (uint32_t i = 0; i < snapshot->op_count; i++) {
		free(snapshot->ops[i].impls);
		effective_unref(snapshot->ops[i].fallback);
	}
	free(snapshot->ops);
	free(snapshot->op_table);
	free((void *)snapshot->providers);
	free((void *)snapshot->devices);
	free(snapshot->quarantined);
	free(snapshot);
}

static bool name_is(const char *own, const char *name, size_t bytes)
{
	return strlen(own) == bytes && memcmp(own, name, bytes) == 0;
}

const struct op *snapshot_op(const struct snapshot *snapshot, const char *name, size_t bytes)
{
	uint32_t hash = schema_hash(name, bytes);
	for (uint32_t at = hash & snapshot->op_mask; snapshot->op_table[at] != 0; at = (at + 1) & snapshot->op_mask) {
		const struct op *op = &snapshot->ops[snapshot->op_table[at] - 1];
		if (name_is(op->schema->name, name, bytes))
			return op;
	}
	return NULL;
}

/* How many letters have to be put in, left out or changed to make `own` of `name` (Levenshtein's distance); both are short. */
static unsigned name_distance(const char *own, const char *name, size_t bytes)
{
	unsigned row[65];
	size_t own_bytes = strlen(own);
	if (own_bytes > 64)
		return UINT32_MAX;
	for (size_t i = 0; i <= own_bytes; i++)
		row[i] = (unsigned)i;
	for (size_t k = 0; k < bytes; k++) {
		unsigned diagonal = row[0]++;
		for (size_t i = 1; i <= own_bytes; i++) {
			unsigned changed = diagonal + (own[i - 1] != name[k]);
			unsigned longer = row[i] < row[i - 1] ? row[i] + 1 : row[i - 1] + 1;
			diagonal = row[i];
			row[i] = changed < longer ? changed : longer;
		}
	}
	return row[own_bytes];
}

const struct op *snapshot_find_op(const struct snapshot *snapshot, struct msg_text name, opd_error *error)
{
	const char *text = name.data == NULL ? "" : name.data;
	const struct op *op = snapshot_op(snapshot, text, name.bytes);
	if (op != NULL)
		return op;
	char shown[160];
	const char *closest = NULL;
	unsigned best = 3; /* from here on it is another word */
	for (uint32_t i = 0; i < snapshot->op_count && name.bytes <= 64; i++) {
		unsigned distance = name_distance(snapshot->ops[i].schema->name, text, name.bytes);
		if (distance < best) {
			best = distance;
			closest = snapshot->ops[i].schema->name;
		}
	}
	text_escape(text, name.bytes, shown, sizeof shown);
	if (closest != NULL)
		(void)opd_fail(error, OPD_NOT_FOUND, "no op \"%s\": did you mean %s?", shown, closest);
	else
		(void)opd_fail(error, OPD_NOT_FOUND, "no op \"%s\" among the %u that are here", shown, (unsigned)snapshot->op_count);
	return NULL;
}

const struct provider *snapshot_provider(const struct snapshot *snapshot, const char *name, size_t bytes)
{
	uint32_t hash = schema_hash(name, bytes);
	for (uint32_t i = 0; i < snapshot->provider_count; i++) {
		const struct provider *provider = snapshot->providers[i];
		if (provider->name_hash == hash && name_is(provider->name, name, bytes))
			return provider;
	}
	return NULL;
}

const struct impl *op_impl(const struct op *op, const struct provider *provider)
{
	for (uint32_t i = 0; i < op->impl_count; i++)
		if (op->impls[i]->provider == provider)
			return op->impls[i];
	return NULL;
}

const char *snapshot_unsupported(const struct snapshot *snapshot, const struct impl *impl, opd_reason_code *code_out)
{
	const char *out = snapshot->quarantined[impl->index];
	*code_out = !impl->supported ? impl->unsupported_code : OPD_REASON_QUARANTINE;
	return !impl->supported ? impl->unsupported : out;
}

static void fill_quarantined(const struct registry *registry, struct snapshot *snapshot)
{
	for (uint32_t i = 0; i < registry->impl_count; i++) {
		const char *own = registry->impls_out[i];
		snapshot->quarantined[i] = own != NULL ? own : registry->providers_out[registry->impls[i]->provider->index];
	}
	snapshot->impl_count = registry->impl_count;
}

static bool is_named(const char *list, const char *name)
{
	const size_t bytes = strlen(name);
	for (const char *at = list; at != NULL; at = strchr(at, ',')) {
		at += *at == ',';
		if (strncmp(at, name, bytes) == 0 && (at[bytes] == ',' || at[bytes] == '\0'))
			return true;
	}
	return false;
}

/* The op's activations, where it says that their rows stand for themselves. */
static uint64_t row_params(const struct entry *entry)
{
	uint64_t bits = 0;
	for (uint32_t i = 0; (entry->def->flags & OPD_OP_ROWS) != 0 && i < entry->schema->param_count && i < 64; i++)
		if (is_named(entry->def->activations, entry->schema->params[i].name))
			bits |= UINT64_C(1) << i;
	return bits;
}

/* The parameters whose contents are indices: those that it names, else all (of which only those of i32 and i64 count). */
static uint64_t index_params(const struct entry *entry)
{
	const opd_op *def = entry->def;
	const char *names = def->struct_bytes >= offsetof(opd_op, indices) + sizeof def->indices ? def->indices : NULL;
	uint64_t bits = 0;
	for (uint32_t i = 0; def->check != NULL && i < entry->schema->param_count && i < 64; i++)
		if (names == NULL || is_named(names, entry->schema->params[i].name))
			bits |= UINT64_C(1) << i;
	return bits;
}

static bool snapshot_fill_op(struct registry *registry, struct snapshot *snapshot, uint32_t index)
{
	struct op *op = &snapshot->ops[index];
	const struct entry *entry = &registry->ops[index];
	*op = (struct op){.def = entry->def, .schema = entry->schema, .shape = entry->shape, .row_params = row_params(entry), .index_params = index_params(entry), .index = index};
	for (uint32_t i = 0; i < registry->impl_count; i++)
		op->impl_count += registry->impls[i]->op_index == index;
	op->impls = calloc(op->impl_count, sizeof op->impls[0]);
	if (op->impls == NULL)
		return false;
	uint32_t at = 0;
	for (uint32_t i = 0; i < registry->impl_count; i++)
		if (registry->impls[i]->op_index == index)
			op->impls[at++] = registry->impls[i];
	uint32_t slot = schema_hash(op->schema->name, strlen(op->schema->name)) & snapshot->op_mask;
	while (snapshot->op_table[slot] != 0)
		slot = (slot + 1) & snapshot->op_mask;
	snapshot->op_table[slot] = (uint16_t)(index + 1);
	return true;
}

static struct effective *fallback_create(const struct snapshot *snapshot, const struct op *op, struct plist *list)
{
	struct effective *effective = effective_create(snapshot, op, list->level, list->names, list->count, NULL, list);
	if (effective != NULL && effective_add_cases(effective, snapshot, op, list, NULL))
		return effective;
	effective_unref(effective);
	return NULL;
}

/* The list that holds when neither request nor session has one: nearest level wins whole, an op's own entry beats `*` within a level. */
static struct effective *fallback_of(struct registry *registry, struct snapshot *snapshot, const struct op *op)
{
	const struct entry *entry = &registry->ops[op->index];
	struct plist *lists[] = {entry->server, registry->server_star, entry->configuration, registry->configuration_star};
	for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++)
		if (lists[i] != NULL)
			return fallback_create(snapshot, op, lists[i]);
	struct effective *effective = effective_create_none(snapshot, op, NULL);
	if (effective != NULL)
		effective->list = plist_ref(registry->none);
	return effective;
}

struct snapshot *snapshot_create(struct registry *registry)
{
	struct snapshot *snapshot = calloc(1, sizeof *snapshot);
	if (snapshot == NULL)
		return NULL;
	snapshot->refs = 1;
	snapshot->version = registry->version + 1;
	uint32_t slots = 64;
	while (slots < registry->op_count * 4)
		slots *= 2;
	snapshot->op_mask = slots - 1;
	snapshot->op_table = calloc(slots, sizeof snapshot->op_table[0]);
	snapshot->ops = calloc(registry->op_count + 1, sizeof snapshot->ops[0]);
	const struct provider **providers = calloc(registry->provider_count + 1, sizeof providers[0]);
	struct device *devices = calloc(registry->device_count + 1, sizeof devices[0]);
	snapshot->providers = providers;
	snapshot->devices = devices;
	snapshot->quarantined = calloc(registry->impl_count + 1, sizeof snapshot->quarantined[0]);
	bool made = snapshot->op_table != NULL && snapshot->ops != NULL && providers != NULL && devices != NULL && snapshot->quarantined != NULL;
	if (made) {
		fill_quarantined(registry, snapshot);
		memcpy(providers, registry->providers, registry->provider_count * sizeof providers[0]);
		memcpy(devices, registry->devices, registry->device_count * sizeof devices[0]);
		snapshot->provider_count = registry->provider_count;
		snapshot->device_count = registry->device_count;
	}
	for (uint32_t i = 0; made && i < registry->op_count; i++) {
		made = snapshot_fill_op(registry, snapshot, i);
		snapshot->op_count += made;
		if (made) {
			snapshot->ops[i].fallback = fallback_of(registry, snapshot, &snapshot->ops[i]);
			made = snapshot->ops[i].fallback != NULL;
		}
	}
	if (!made) {
		snapshot_unref(snapshot);
		return NULL;
	}
	return snapshot;
}
