#include "server/registry.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"
#include "proto/message.h"
#include "proto/text.h"
#include "server/module.h"
#include "server/priority.h"

#define REGISTRY_IMPLS_MAX 4096

/* An op as registered; snapshots copy it. */
struct entry {
	const opd_op *def;
	struct schema *schema;
	opd_shape_fn shape;
	const struct module *owner;
	struct plist *server;        /* defaults set at run time; NULL: none */
	struct plist *configuration; /* NULL: none */
};

struct registry {
	struct log *log;
	struct registry_services services;
	pthread_mutex_t mutex;        /* of everything below; recursive: a module's open may call set_shape */
	const struct module *opening; /* in its open function, */
	pthread_t opening_thread;     /* on this thread */
	pthread_mutex_t current_mutex; /* of `current` alone: a module may take long to open, and nobody waits for it to read the registry */
	struct snapshot *current;
	_Atomic uint64_t version;
	uint32_t op_count;
	struct entry ops[REGISTRY_OPS_MAX];
	uint32_t impl_count;
	struct impl *impls[REGISTRY_IMPLS_MAX]; /* in the order of registration */
	uint32_t provider_count;
	struct provider *providers[REGISTRY_PROVIDERS_MAX];
	uint32_t device_count;
	struct device devices[REGISTRY_DEVICES_MAX];
	struct module *modules; /* newest first */
	struct plist *server_star;
	struct plist *configuration_star;
	struct plist *none; /* stands for no list: remembers which ops were warned of */
};

/* ---- Snapshots ---- */

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

static bool snapshot_fill_op(struct registry *registry, struct snapshot *snapshot, uint32_t index)
{
	struct op *op = &snapshot->ops[index];
	const struct entry *entry = &registry->ops[index];
	*op = (struct op){.def = entry->def, .schema = entry->schema, .shape = entry->shape, .index = index};
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

/* The list that holds when neither request nor session has one: nearest level wins whole, an op's own entry beats `*` within a level. */
static struct effective *fallback_of(struct registry *registry, struct snapshot *snapshot, const struct op *op)
{
	const struct entry *entry = &registry->ops[op->index];
	struct plist *lists[] = {entry->server, registry->server_star, entry->configuration, registry->configuration_star};
	for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++)
		if (lists[i] != NULL)
			return effective_create(snapshot, op, lists[i]->level, lists[i]->names, lists[i]->count, NULL, lists[i]);
	struct effective *effective = effective_create_none(snapshot, op, NULL);
	if (effective != NULL)
		effective->list = plist_ref(registry->none);
	return effective;
}

static struct snapshot *snapshot_create(struct registry *registry)
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
	bool made = snapshot->op_table != NULL && snapshot->ops != NULL && providers != NULL && devices != NULL;
	if (made) {
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

static opd_status publish_locked(struct registry *registry, opd_error *error)
{
	struct snapshot *snapshot = snapshot_create(registry);
	if (snapshot == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory");
	(void)pthread_mutex_lock(&registry->current_mutex);
	struct snapshot *before = registry->current;
	registry->current = snapshot;
	atomic_store_explicit(&registry->version, snapshot->version, memory_order_release);
	(void)pthread_mutex_unlock(&registry->current_mutex);
	snapshot_unref(before);
	return OPD_OK;
}

struct snapshot *registry_snapshot(struct registry *registry)
{
	(void)pthread_mutex_lock(&registry->current_mutex);
	struct snapshot *snapshot = snapshot_ref(registry->current);
	(void)pthread_mutex_unlock(&registry->current_mutex);
	return snapshot;
}

uint64_t registry_version(const struct registry *registry)
{
	return atomic_load_explicit(&registry->version, memory_order_acquire);
}

/* ---- What modules register ---- */

static struct registry *host_registry(const opd_host *host)
{
	return ((struct module *)host->context)->registry;
}

static struct entry *find_entry(struct registry *registry, const char *name)
{
	for (uint32_t i = 0; i < registry->op_count; i++)
		if (strcmp(registry->ops[i].schema->name, name) == 0)
			return &registry->ops[i];
	return NULL;
}

static bool uuid_valid(const char *uuid)
{
	return uuid != NULL && strlen(uuid) == 64 && strspn(uuid, "0123456789abcdef") == 64;
}

/* The structs of this ABI up to their last field of version 1: a module built against an older header has no more. */
#define OP_BYTES (offsetof(opd_op, user) + sizeof(void *))
#define IMPL_BYTES (offsetof(opd_impl, user) + sizeof(void *))
#define BACKEND_BYTES (offsetof(opd_backend, native_handle) + sizeof(void (*)(void)))

/* A native implementation may leave out what its op says. */
static opd_status check_native_schema(const opd_impl *native, const struct schema *schema, opd_error *error)
{
	if (native->op != NULL && strcmp(native->op, schema->name) != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "op %s: its native implementation is one of \"%.64s\"", schema->name, native->op);
	if (native->schema == NULL)
		return OPD_OK;
	struct schema *own;
	opd_status status = schema_parse(native->schema, &own, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "native.%s", schema->name);
	uint32_t params;
	if (!schema_accepts(schema, own, &params) || params != schema->param_count)
		status = opd_fail(error, OPD_INVALID_ARGUMENT, "native.%s: schema \"%s\" differs from the op's \"%s\"", schema->name, own->text,
		                  schema->text);
	schema_destroy(own);
	return status;
}

/* `native` is the op's definition: supported, on the host, without predicate or plan. */
static opd_status check_native(const opd_op *def, const struct schema *schema, opd_error *error)
{
	const opd_impl *native = def->native;
	if (native == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "op %s has no native implementation", schema->name);
	if (native->struct_bytes < IMPL_BYTES)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "op %s: its native opd_impl has %u bytes, expected at least %zu", schema->name,
		                (unsigned)native->struct_bytes, IMPL_BYTES);
	if (native->run == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "op %s: its native implementation has no run function", schema->name);
	if (native->predicate != NULL || native->plan != NULL || native->unsupported != NULL || native->device == NULL ||
	    strcmp(native->device, "cpu") != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT,
		                "op %s: its native implementation must run on cpu and support all arguments: no predicate, plan or unsupported reason",
		                schema->name);
	return check_native_schema(native, schema, error);
}

static opd_status check_in_place(const opd_op *def, const struct schema *schema, opd_error *error)
{
	if (def->in_place_count != 0 && def->in_place == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "op %s: %u in-place pairs, but no table of them", schema->name, (unsigned)def->in_place_count);
	for (uint32_t i = 0; i < def->in_place_count; i++) {
		const opd_in_place *pair = &def->in_place[i];
		if (pair->param >= schema->param_count || pair->result >= schema->result_count || schema->params[pair->param].type != SCHEMA_TENSOR)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "op %s: in-place pair %u names no Tensor parameter and result of its schema",
			                schema->name, (unsigned)i);
		for (uint32_t k = 0; k < i; k++)
			if (def->in_place[k].param == pair->param || def->in_place[k].result == pair->result)
				return opd_fail(error, OPD_INVALID_ARGUMENT, "op %s: in-place pairs %u and %u share a parameter or a result", schema->name,
				                (unsigned)k, (unsigned)i);
	}
	return OPD_OK;
}

/* Names and sizes that describe and generate rely on. */
static opd_status check_dims(const opd_op *def, const struct schema *schema, opd_error *error)
{
	uint32_t names = def->dims == NULL || def->dims[0] == '\0' ? 0 : 1;
	for (const char *at = def->dims; at != NULL && *at != '\0'; at++)
		names += *at == ',';
	if (names != def->dim_count || (names != 0 && def->default_dims == NULL))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "op %s: dims \"%.100s\" names %u sizes, dim_count is %u, default_dims are %s", schema->name,
		                def->dims == NULL ? "" : def->dims, (unsigned)names, (unsigned)def->dim_count, def->default_dims == NULL ? "missing" : "there");
	if (def->tolerance_count != 0 && def->tolerances == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "op %s: %u tolerances, but no table of them", schema->name, (unsigned)def->tolerance_count);
	return OPD_OK;
}

static opd_status check_op(const opd_op *def, const struct schema *schema, opd_error *error)
{
	if (def->shape == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "op %s has no shape function", schema->name);
	opd_status status = check_in_place(def, schema, error);
	if (status == OPD_OK)
		status = check_dims(def, schema, error);
	if (status != OPD_OK)
		return status;
	return check_native(def, schema, error);
}

static opd_status add_impl(struct registry *registry, struct module *module, const opd_impl *def, uint32_t op_index, uint32_t params,
                           const struct provider *provider, opd_error *error)
{
	if (registry->impl_count == REGISTRY_IMPLS_MAX)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: %d implementations, no more fit", REGISTRY_IMPLS_MAX);
	if (!uuid_valid(def->uuid))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s.%s: uuid \"%.80s\", expected 64 lowercase hex digits", provider->name,
		                registry->ops[op_index].schema->name, def->uuid == NULL ? "" : def->uuid);
	struct impl *impl = calloc(1, sizeof *impl);
	if (impl == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory");
	*impl = (struct impl){
		.def = def,
		.state = module->state,
		.provider = provider,
		.op_index = op_index,
		.params = params,
		.supported = def->unsupported == NULL,
		.unsupported = def->unsupported,
		.unsupported_code = def->unsupported == NULL ? OPD_REASON_NONE : OPD_REASON_PLATFORM,
		.on_host = strcmp(def->device, "cpu") == 0,
		.complete = def->predicate == NULL && (def->flags & OPD_IMPL_PLAN_MAY_REFUSE) == 0 &&
		            params == registry->ops[op_index].schema->param_count,
	};
	registry->impls[registry->impl_count++] = impl;
	return OPD_OK;
}

static const struct provider *native_provider(const struct registry *registry)
{
	for (uint32_t i = 0; i < registry->provider_count; i++)
		if (strcmp(registry->providers[i]->name, "native") == 0)
			return registry->providers[i];
	return NULL;
}

/* Registration is for `open` alone: elsewhere nobody holds the lock, and nothing would be published or taken back. */
static opd_status check_opening(const struct module *module, const char *what, opd_error *error)
{
	if (module->registry->opening == module && pthread_equal(module->registry->opening_thread, pthread_self()))
		return OPD_OK;
	return opd_fail(error, OPD_FAILED_PRECONDITION, "%s: %s outside of its open function", module->def->name, what);
}

static opd_status host_register_op(const opd_host *host, const opd_op *def, opd_error *error)
{
	struct module *module = host->context;
	struct registry *registry = module->registry;
	if (check_opening(module, "register_op", error) != OPD_OK)
		return OPD_FAILED_PRECONDITION;
	if (def == NULL || def->struct_bytes < OP_BYTES || def->schema == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "register_op: no schema, or opd_op has %u bytes, expected at least %zu",
		                def == NULL ? 0u : (unsigned)def->struct_bytes, OP_BYTES);
	if (registry->op_count == REGISTRY_OPS_MAX)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: %d ops, no more fit", REGISTRY_OPS_MAX);
	struct schema *schema;
	opd_status status = schema_parse(def->schema, &schema, error);
	if (status != OPD_OK)
		return status;
	if (find_entry(registry, schema->name) != NULL)
		status = opd_fail(error, OPD_ALREADY_EXISTS, "op %s is registered already", schema->name);
	if (status == OPD_OK)
		status = check_op(def, schema, error);
	const struct provider *native = native_provider(registry);
	if (status == OPD_OK && native == NULL)
		status = opd_fail(error, OPD_FAILED_PRECONDITION, "op %s: the provider native isn't open", schema->name);
	if (status == OPD_OK) {
		registry->ops[registry->op_count] = (struct entry){.def = def, .schema = schema, .shape = def->shape, .owner = module};
		status = add_impl(registry, module, def->native, registry->op_count, schema->param_count, native, error);
	}
	if (status != OPD_OK) {
		schema_destroy(schema);
		return status;
	}
	registry->op_count++;
	return OPD_OK;
}

static opd_status check_impl(struct registry *registry, const opd_impl *def, const struct module *module, opd_error *error)
{
	if (check_opening(module, "register_impl", error) != OPD_OK)
		return OPD_FAILED_PRECONDITION;
	if (def == NULL || def->struct_bytes < IMPL_BYTES || def->op == NULL || def->schema == NULL || def->device == NULL || def->run == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT,
		                "register_impl: op, schema, device or run is missing, or opd_impl has %u bytes, expected at least %zu",
		                def == NULL ? 0u : (unsigned)def->struct_bytes, IMPL_BYTES);
	const struct entry *entry = find_entry(registry, def->op);
	char shown[160];
	if (entry == NULL)
		return opd_fail(error, OPD_NOT_FOUND, "%s: no op %s", module->def->name, text_escape(def->op, strnlen(def->op, 256), shown, sizeof shown));
	if (module->provider == native_provider(registry))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "native.%s: native is reserved for the op's own definition", def->op);
	for (uint32_t i = 0; i < registry->impl_count; i++)
		if (registry->impls[i]->provider == module->provider && &registry->ops[registry->impls[i]->op_index] == entry)
			return opd_fail(error, OPD_ALREADY_EXISTS, "%s.%s is registered already", module->def->name, def->op);
	return OPD_OK;
}

static bool has_priority(const struct registry *registry, const struct entry *entry)
{
	return entry->server != NULL || registry->server_star != NULL || entry->configuration != NULL || registry->configuration_star != NULL;
}

static opd_status host_register_impl(const opd_host *host, const opd_impl *def, opd_error *error)
{
	struct module *module = host->context;
	struct registry *registry = module->registry;
	opd_status status = check_impl(registry, def, module, error);
	if (status != OPD_OK)
		return status;
	const struct entry *entry = find_entry(registry, def->op);
	struct schema *schema;
	status = schema_parse(def->schema, &schema, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "%s.%s", module->def->name, def->op);
	uint32_t params;
	if (!schema_accepts(entry->schema, schema, &params))
		status = opd_fail(error, OPD_INVALID_ARGUMENT, "%s.%s: schema \"%s\" differs from the op's \"%s\"", module->def->name, def->op,
		                  schema->text, entry->schema->text);
	schema_destroy(schema);
	if (status == OPD_OK)
		status = add_impl(registry, module, def, (uint32_t)(entry - registry->ops), params, module->provider, error);
	if (status == OPD_OK && has_priority(registry, entry))
		LOG(registry->log, LOG_WARN, "implementation registered while a priority is set: it runs only where a list names it",
		    LOG_STR("provider", module->def->name), LOG_STR("op", entry->schema->name));
	return status;
}

/* The struct is long enough, and no function but the optional ones is missing. */
static bool backend_whole(const opd_backend *backend)
{
	return backend != NULL && backend->struct_bytes >= BACKEND_BYTES && backend->kind != NULL && text_is_name(backend->kind, strlen(backend->kind)) &&
	       backend->device_info != NULL && backend->alloc != NULL && backend->free != NULL && backend->stream_create != NULL &&
	       backend->stream_destroy != NULL && backend->copy_in != NULL && backend->copy_out != NULL && backend->copy_device != NULL &&
	       backend->event_create != NULL && backend->event_destroy != NULL && backend->event_record != NULL && backend->event_query != NULL;
}

static void drop_devices(struct registry *registry, uint32_t count)
{
	while (registry->device_count > count)
		free((void *)registry->devices[--registry->device_count].name);
}

static opd_status host_register_backend(const opd_host *host, const opd_backend *backend, opd_error *error)
{
	struct module *module = host->context;
	struct registry *registry = module->registry;
	if (check_opening(module, "register_backend", error) != OPD_OK)
		return OPD_FAILED_PRECONDITION;
	if (!backend_whole(backend))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: a device backend needs a kind ([a-z_][a-z_0-9]*) and its whole table",
		                module->def->name);
	for (uint32_t i = 0; i < registry->device_count; i++)
		if (strcmp(registry->devices[i].kind, backend->kind) == 0)
			return opd_fail(error, OPD_ALREADY_EXISTS, "%s: a backend for devices of kind %s is there already", module->def->name,
			                backend->kind);
	if (backend->device_count > REGISTRY_DEVICES_MAX - registry->device_count)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: %u devices, at most %u more fit", module->def->name,
		                (unsigned)backend->device_count, (unsigned)(REGISTRY_DEVICES_MAX - registry->device_count));
	const uint32_t before = registry->device_count;
	for (uint32_t i = 0; i < backend->device_count; i++) {
		char *name = NULL;
		if (asprintf(&name, "%s:%u", backend->kind, (unsigned)i) < 0) {
			drop_devices(registry, before);
			return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory");
		}
		registry->devices[registry->device_count++] =
			(struct device){.name = name, .kind = backend->kind, .ordinal = i, .backend = backend, .state = module->state};
	}
	return OPD_OK;
}

static opd_status set_shape(struct registry *registry, const char *name, opd_shape_fn shape, const struct module *owner, opd_error *error)
{
	(void)pthread_mutex_lock(&registry->mutex);
	struct entry *entry = name == NULL ? NULL : find_entry(registry, name);
	opd_status status;
	if (entry == NULL || shape == NULL)
		status = opd_fail(error, OPD_NOT_FOUND, "set_shape: no such op, or no function");
	else if (owner != NULL && entry->owner != owner)
		status = opd_fail(error, OPD_PERMISSION_DENIED, "set_shape: op %s belongs to %s, not to %s", name, entry->owner->def->name,
		                  owner->def->name);
	else {
		entry->shape = shape;
		/* A module that is just being opened may still be rolled back: its ops are published when it is done. */
		status = registry->opening == owner && owner != NULL ? OPD_OK : publish_locked(registry, error);
	}
	(void)pthread_mutex_unlock(&registry->mutex);
	return status;
}

opd_status registry_set_shape(struct registry *registry, const char *op, opd_shape_fn shape, opd_error *error)
{
	return set_shape(registry, op, shape, NULL, error);
}

static opd_status host_set_shape(const opd_host *host, const char *op, opd_shape_fn shape, opd_error *error)
{
	return set_shape(host_registry(host), op, shape, host->context, error);
}

static bool host_find_backend(const opd_host *host, const char *kind, const opd_backend **backend_out, void **state_out)
{
	struct registry *registry = host_registry(host);
	const struct device *found = NULL;
	(void)pthread_mutex_lock(&registry->mutex);
	for (uint32_t i = 1; i < registry->device_count && found == NULL; i++)
		if (strcmp(registry->devices[i].kind, kind) == 0)
			found = &registry->devices[i];
	if (found != NULL) {
		*backend_out = found->backend;
		*state_out = found->state;
	}
	(void)pthread_mutex_unlock(&registry->mutex);
	return found != NULL;
}

static void *host_alloc(const opd_host *host, uint64_t bytes)
{
	const struct registry_services *services = &host_registry(host)->services;
	return services->alloc(services->context, bytes);
}

static void host_free(const opd_host *host, void *memory)
{
	const struct registry_services *services = &host_registry(host)->services;
	services->free(services->context, memory);
}

static bool host_log_enabled(const opd_host *host, opd_log_level level)
{
	return log_enabled(host_registry(host)->log, (log_level)level);
}

static void host_log(const opd_host *host, opd_log_level level, const char *text)
{
	const struct module *module = host->context;
	const log_level known = (unsigned)level > OPD_LOG_DEBUG ? LOG_DEBUG : (log_level)level;
	LOG(module->registry->log, known, "provider", LOG_STR("provider", module->def->name), LOG_STR("text", text == NULL ? "" : text));
}

/* ---- Opening modules ---- */

/* What a failed open takes back. */
struct mark {
	uint32_t ops;
	uint32_t impls;
	uint32_t devices;
};

static void roll_back(struct registry *registry, const struct mark *mark)
{
	while (registry->impl_count > mark->impls)
		free(registry->impls[--registry->impl_count]);
	while (registry->op_count > mark->ops)
		schema_destroy(registry->ops[--registry->op_count].schema);
	drop_devices(registry, mark->devices);
}

static void provider_destroy(struct provider *provider)
{
	if (provider == NULL)
		return;
	provider_destroy(provider->replaced);
	free((void *)provider->name);
	free((void *)provider->version);
	free((void *)provider->source);
	free((void *)provider->reason);
	free(provider);
}

/* Texts are copied: a module's own vanish with it. */
static struct provider *provider_create(const char *name, const char *version, const char *source, const char *reason)
{
	struct provider *provider = calloc(1, sizeof *provider);
	if (provider == NULL)
		return NULL;
	*provider = (struct provider){
		.name = strdup(name),
		.version = strdup(version == NULL ? "" : version),
		.source = strdup(source),
		.reason = reason == NULL ? NULL : strdup(reason),
		.name_hash = schema_hash(name, strlen(name)),
	};
	if (provider->name == NULL || provider->version == NULL || provider->source == NULL || (reason != NULL && provider->reason == NULL)) {
		provider_destroy(provider);
		return NULL;
	}
	return provider;
}

static struct provider **provider_slot(struct registry *registry, const char *name)
{
	for (uint32_t i = 0; i < registry->provider_count; i++)
		if (strcmp(registry->providers[i]->name, name) == 0)
			return &registry->providers[i];
	return registry->provider_count < REGISTRY_PROVIDERS_MAX ? &registry->providers[registry->provider_count] : NULL;
}

/* Puts a provider into its slot: a new name, or one that was remembered as missing. */
static void provider_place(struct registry *registry, struct provider **slot, struct provider *provider)
{
	provider->index = (uint32_t)(slot - registry->providers);
	if (provider->index == registry->provider_count)
		registry->provider_count++;
	*slot = provider;
}

static void fill_host(struct module *module, const struct registry *registry)
{
	module->host = (opd_host){
		.abi = OPD_PROVIDER_ABI,
		.struct_bytes = sizeof(opd_host),
		.context = module,
		.register_op = host_register_op,
		.register_impl = host_register_impl,
		.register_backend = host_register_backend,
		.set_shape = host_set_shape,
		.find_backend = host_find_backend,
		.alloc = host_alloc,
		.free = host_free,
		.log_enabled = host_log_enabled,
		.log = host_log,
		.parallel_for = registry->services.parallel_for,
		.cancelled = registry->services.cancelled,
	};
}

static bool name_reserved(const struct registry *registry, const opd_module *def, const void *library)
{
	bool first_native = library == NULL && registry->provider_count == 0 && strcmp(def->name, "native") == 0;
	return (strcmp(def->name, "native") == 0 && !first_native) || strcmp(def->name, "unfused") == 0;
}

static opd_status open_locked(struct registry *registry, struct module *module, const char *source, opd_error *error)
{
	const opd_module *def = module->def;
	struct provider **slot = provider_slot(registry, def->name);
	if (name_reserved(registry, def, module->library))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "provider name %s is reserved", def->name);
	if (slot == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: %d providers, no more fit", REGISTRY_PROVIDERS_MAX);
	struct provider *replaced = slot == &registry->providers[registry->provider_count] ? NULL : *slot;
	if (replaced != NULL && replaced->module != NULL)
		return opd_fail(error, OPD_ALREADY_EXISTS, "provider %s is there already (%s)", def->name, replaced->source);
	struct provider *provider = provider_create(def->name, def->version, source, NULL);
	if (provider == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory");
	provider->module = module;
	module->provider = provider;
	fill_host(module, registry);
	uint32_t count = registry->provider_count;
	provider_place(registry, slot, provider);

	const struct mark mark = {registry->op_count, registry->impl_count, registry->device_count};
	registry->opening = module;
	registry->opening_thread = pthread_self();
	error->text[0] = '\0';
	opd_status status = def->open(&module->host, module->state, error);
	registry->opening = NULL;
	if (status != OPD_OK) {
		status = module_failure(status, error, "open failed");
		(void)opd_error_prefix(error, status, "%s", def->name);
	} else {
		status = publish_locked(registry, error);
	}
	if (status != OPD_OK) {
		roll_back(registry, &mark);
		*slot = replaced;
		registry->provider_count = count;
		provider_destroy(provider);
		return status;
	}
	module->next = registry->modules;
	registry->modules = module;
	provider->replaced = replaced; /* older snapshots still show it */
	return OPD_OK;
}

/* Opens and publishes; on failure the module is closed and unloaded. */
static opd_status open_module(struct registry *registry, const opd_module *def, void *library, const char *source, opd_error *error)
{
	struct module *module = module_create(registry, def, library);
	if (module == NULL) {
		module_unload(library);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory");
	}
	(void)pthread_mutex_lock(&registry->mutex);
	uint32_t opened_before = registry->impl_count;
	opd_status status = open_locked(registry, module, source, error);
	bool tried = module->provider != NULL;
	if (status != OPD_OK)
		module_destroy(module, tried);
	else
		LOG(registry->log, LOG_DEBUG, "provider opened", LOG_STR("provider", def->name), LOG_STR("source", source),
		    LOG_UINT("implementations", registry->impl_count - opened_before));
	(void)pthread_mutex_unlock(&registry->mutex);
	return status;
}

opd_status registry_open_builtin(struct registry *registry, const opd_module *def, opd_error *error)
{
	opd_status status = module_check(def, error);
	return status == OPD_OK ? open_module(registry, def, NULL, "built in", error) : status;
}

static void remember_missing(struct registry *registry, const char *name, const char *path, const char *reason)
{
	(void)pthread_mutex_lock(&registry->mutex);
	struct provider **slot = provider_slot(registry, name);
	if (slot == &registry->providers[registry->provider_count]) {
		struct provider *provider = provider_create(name, "", path, reason);
		if (provider != NULL)
			provider_place(registry, slot, provider);
		if (provider == NULL || publish_locked(registry, NULL) != OPD_OK)
			LOG(registry->log, LOG_ERROR, "registry: out of memory");
	}
	(void)pthread_mutex_unlock(&registry->mutex);
}

opd_status registry_load(struct registry *registry, const char *path, const char *name, bool remember, opd_error *error)
{
	void *library = NULL;
	const opd_module *def = NULL;
	opd_error own;
	opd_status status = module_find(path, &library, &def, &own);
	char known[BOUND_NAME_BYTES + 1] = "";
	if (name != NULL || status == OPD_OK)
		(void)snprintf(known, sizeof known, "%s", name != NULL ? name : def->name);
	if (status == OPD_OK && name != NULL && strcmp(def->name, name) != 0) {
		status = opd_fail(&own, OPD_INVALID_ARGUMENT, "%s: its provider is called %.100s, configured as %s", path, def->name, name);
		module_unload(library);
	}
	if (status == OPD_OK)
		status = open_module(registry, def, library, path, &own);
	if (status == OPD_OK)
		return OPD_OK;
	if (remember && text_is_name(known, strlen(known)) && strcmp(known, "native") != 0 && strcmp(known, "unfused") != 0)
		remember_missing(registry, known, path, own.text);
	if (error != NULL)
		*error = own;
	return status;
}

/* ---- Life ---- */

opd_status registry_create(struct log *log, const struct registry_services *services, struct registry **registry_out, opd_error *error)
{
	struct registry *registry = calloc(1, sizeof *registry);
	pthread_mutexattr_t recursive;
	(void)pthread_mutexattr_init(&recursive);
	(void)pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
	if (registry == NULL || pthread_mutex_init(&registry->mutex, &recursive) != 0) {
		free(registry);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory");
	}
	(void)pthread_mutex_init(&registry->current_mutex, NULL); /* of glibc, it can't fail */
	registry->log = log;
	registry->services = *services;
	registry->devices[0] = (struct device){.name = strdup("cpu"), .kind = "cpu"};
	registry->device_count = 1;
	registry->none = plist_create(MSG_LEVEL_NONE, false, NULL, 0);
	opd_status status = registry->none == NULL || registry->devices[0].name == NULL
	                        ? opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory")
	                        : publish_locked(registry, error);
	if (status != OPD_OK) {
		registry_destroy(registry);
		return status;
	}
	*registry_out = registry;
	return OPD_OK;
}

void registry_destroy(struct registry *registry)
{
	if (registry == NULL)
		return;
	snapshot_unref(registry->current);
	for (uint32_t i = 0; i < registry->op_count; i++) {
		plist_unref(registry->ops[i].server);
		plist_unref(registry->ops[i].configuration);
	}
	plist_unref(registry->server_star);
	plist_unref(registry->configuration_star);
	plist_unref(registry->none);
	roll_back(registry, &(struct mark){0, 0, 0});
	/* Newest first: a module may use the backend of an older one. */
	while (registry->modules != NULL) {
		struct module *module = registry->modules;
		registry->modules = module->next;
		module_destroy(module, true);
	}
	for (uint32_t i = 0; i < registry->provider_count; i++)
		provider_destroy(registry->providers[i]);
	(void)pthread_mutex_destroy(&registry->current_mutex);
	(void)pthread_mutex_destroy(&registry->mutex);
	free(registry);
}

/* ---- Defaults ---- */

static struct plist **list_slot(struct registry *registry, int level, struct entry *entry)
{
	if (level == MSG_LEVEL_SERVER)
		return entry == NULL ? &registry->server_star : &entry->server;
	return entry == NULL ? &registry->configuration_star : &entry->configuration;
}

static opd_status set_locked(struct registry *registry, int level, const char *name, const char *const *names, uint32_t count,
                             opd_error *error)
{
	bool star = name == NULL || strcmp(name, "*") == 0;
	struct entry *entry = star ? NULL : find_entry(registry, name);
	char shown[160];
	if (!star && entry == NULL)
		return opd_fail(error, OPD_NOT_FOUND, "no op %s", text_escape(name, strnlen(name, 256), shown, sizeof shown));
	struct plist *list = NULL;
	if (names != NULL) {
		struct msg_text texts[BOUND_PROVIDERS];
		if (count > BOUND_PROVIDERS)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "priority list of %u providers, at most %u", (unsigned)count, BOUND_PROVIDERS);
		for (uint32_t i = 0; i < count; i++)
			texts[i] = msg_text(names[i]);
		const struct op *op = star ? NULL : &registry->current->ops[entry - registry->ops];
		opd_status status = plist_check(registry->current, op, texts, count, error);
		if (status != OPD_OK)
			return status;
		list = plist_create((msg_level)level, star, texts, count);
		if (list == NULL)
			return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "priority list: out of memory");
	}
	struct plist **slot = list_slot(registry, level, entry);
	struct plist *before = *slot;
	*slot = list;
	opd_status status = publish_locked(registry, error);
	if (status != OPD_OK)
		*slot = before;
	plist_unref(status == OPD_OK ? before : list);
	return status;
}

opd_status registry_set_priority(struct registry *registry, int level, const char *op, const char *const *names, uint32_t count,
                                 opd_error *error)
{
	(void)pthread_mutex_lock(&registry->mutex);
	opd_status status = set_locked(registry, level, op, names, count, error);
	(void)pthread_mutex_unlock(&registry->mutex);
	return status;
}

void registry_clear_configuration(struct registry *registry)
{
	(void)pthread_mutex_lock(&registry->mutex);
	for (uint32_t i = 0; i < registry->op_count; i++) {
		plist_unref(registry->ops[i].configuration);
		registry->ops[i].configuration = NULL;
	}
	plist_unref(registry->configuration_star);
	registry->configuration_star = NULL;
	if (publish_locked(registry, NULL) != OPD_OK)
		LOG(registry->log, LOG_ERROR, "registry: out of memory");
	(void)pthread_mutex_unlock(&registry->mutex);
}
