/* What modules register through their table of host services: ops, implementations, backends, shape functions. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"
#include "proto/text.h"
#include "server/derived.h"
#include "server/lane.h"
#include "server/registry_internal.h"

static struct registry *host_registry(const opd_host *host)
{
	return ((struct module *)host->context)->registry;
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
		.index = registry->impl_count,
		.params = params,
		.supported = def->unsupported == NULL,
		.unsupported = def->unsupported,
		.unsupported_code = def->unsupported == NULL ? OPD_REASON_NONE : OPD_REASON_PLATFORM,
		.on_host = strcmp(def->device, "cpu") == 0,
		.run_many = def->plan == NULL && def->struct_bytes >= offsetof(opd_impl, run_many) + sizeof def->run_many ? def->run_many : NULL,
		.complete = def->predicate == NULL && (def->flags & OPD_IMPL_PLAN_MAY_REFUSE) == 0 &&
		            params == registry->ops[op_index].schema->param_count,
	};
	registry->impls_out[impl->index] = NULL;
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
	if (registry_find(registry, schema->name) != NULL)
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
	const struct entry *entry = registry_find(registry, def->op);
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
	const struct entry *entry = registry_find(registry, def->op);
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

/* The table as this header has it: what an older module doesn't know is NULL. NULL: out of memory. */
static opd_backend *backend_copy(const opd_backend *backend)
{
	opd_backend *copy = calloc(1, sizeof *copy);
	if (copy != NULL)
		memcpy(copy, backend, backend->struct_bytes < sizeof *copy ? backend->struct_bytes : sizeof *copy);
	return copy;
}

void register_drop_devices(struct registry *registry, uint32_t count)
{
	while (registry->device_count > count) {
		struct device *device = &registry->devices[--registry->device_count];
		if (device->ordinal == 0 && device->backend != NULL) /* the first of a kind owns the table */
			free((void *)device->backend);
		free((void *)device->name);
	}
}

/* A group of functions is there as a whole or not at all. */
static bool backend_groups_whole(const opd_backend *backend)
{
	const int capture = (backend->capture_begin != NULL) + (backend->capture_end != NULL) + (backend->graph_launch != NULL) +
	                    (backend->graph_destroy != NULL);
	return (capture == 0 || capture == 4) && (backend->host_alloc == NULL) == (backend->host_free == NULL) &&
	       (backend->host_register == NULL) == (backend->host_unregister == NULL);
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
	if (backend->device_count == 0)
		return OPD_OK;
	const opd_backend *copy = backend_copy(backend);
	const uint32_t before = registry->device_count;
	if (copy == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory");
	if (!backend_groups_whole(copy)) {
		free((void *)copy);
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: a group of the device backend's functions is there in part", module->def->name);
	}
	for (uint32_t i = 0; i < copy->device_count; i++) {
		char *name = NULL;
		if (asprintf(&name, "%s:%u", copy->kind, (unsigned)i) < 0) {
			register_drop_devices(registry, before);
			if (i == 0)
				free((void *)copy);
			return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory");
		}
		registry->devices[registry->device_count++] =
			(struct device){.name = name, .kind = copy->kind, .ordinal = i, .backend = copy, .state = module->state};
	}
	return OPD_OK;
}

static opd_status set_shape(struct registry *registry, const char *name, opd_shape_fn shape, const struct module *owner, opd_error *error)
{
	(void)pthread_mutex_lock(&registry->mutex);
	struct entry *entry = name == NULL ? NULL : registry_find(registry, name);
	opd_status status;
	if (entry == NULL || shape == NULL)
		status = opd_fail(error, OPD_NOT_FOUND, "set_shape: no such op, or no function");
	else if (owner != NULL && entry->owner != owner)
		status = opd_fail(error, OPD_PERMISSION_DENIED, "set_shape: op %s belongs to %s, not to %s", name, entry->owner->def->name,
		                  owner->def->name);
	else {
		entry->shape = shape;
		/* A module that is just being opened may still be rolled back: its ops are published when it is done. */
		status = registry->opening == owner && owner != NULL ? OPD_OK : registry_publish(registry, error);
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

/* NULL: not inside a kernel on the CPU. */
static struct derived_run *exec_derived(const opd_exec *exec)
{
	return exec->lane == NULL ? NULL : ((const struct lane_exec *)exec->lane)->derived;
}

static const void *host_derived_find(const opd_exec *exec, const opd_tensor *tensor, const void *key, uint32_t key_bytes)
{
	const struct module *module = exec->host->context;
	return derived_find(module->registry->services.derived, exec_derived(exec), module, tensor, key, key_bytes);
}

static void *host_derived_make(const opd_exec *exec, const opd_tensor *tensor, const void *key, uint32_t key_bytes, uint64_t bytes)
{
	const struct module *module = exec->host->context;
	return derived_make(module->registry->services.derived, exec_derived(exec), module, tensor, key, key_bytes, bytes);
}

static void host_derived_keep(const opd_exec *exec, const void *memory)
{
	const struct module *module = exec->host->context;
	derived_keep(module->registry->services.derived, exec_derived(exec), memory);
}

void register_fill_host(struct module *module, const struct registry *registry)
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
		.derived_find = host_derived_find,
		.derived_make = host_derived_make,
		.derived_keep = host_derived_keep,
	};
}
