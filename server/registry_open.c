/* Providers: opening their modules, and remembering those that can't be. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"
#include "proto/text.h"
#include "server/registry_internal.h"

struct registry_mark registry_mark(const struct registry *registry)
{
	return (struct registry_mark){registry->op_count, registry->impl_count, registry->device_count};
}

void registry_roll_back(struct registry *registry, const struct registry_mark *mark)
{
	while (registry->impl_count > mark->impls)
		free(registry->impls[--registry->impl_count]);
	while (registry->op_count > mark->ops)
		schema_destroy(registry->ops[--registry->op_count].schema);
	register_drop_devices(registry, mark->devices);
}

void registry_provider_destroy(struct provider *provider)
{
	if (provider == NULL)
		return;
	registry_provider_destroy(provider->replaced);
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
		registry_provider_destroy(provider);
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
	provider->isolated = module->isolated != NULL;
	module->provider = provider;
	register_fill_host(module, registry);
	uint32_t count = registry->provider_count;
	provider_place(registry, slot, provider);

	const struct registry_mark mark = registry_mark(registry);
	registry->opening = module;
	registry->opening_thread = pthread_self();
	error->text[0] = '\0';
	opd_status status = def->open(&module->host, module->state, error);
	registry->opening = NULL;
	if (status != OPD_OK) {
		status = module_failure(status, error, "open failed");
		(void)opd_error_prefix(error, status, "%s", def->name);
	} else {
		status = registry_publish(registry, error);
	}
	if (status != OPD_OK) {
		registry_roll_back(registry, &mark);
		*slot = replaced;
		registry->provider_count = count;
		registry_provider_destroy(provider);
		return status;
	}
	if (module->isolated != NULL)
		isolated_set_provider(module->isolated, provider);
	module->next = registry->modules;
	registry->modules = module;
	provider->replaced = replaced; /* older snapshots still show it */
	return OPD_OK;
}

/* Opens and publishes; on failure the module is closed and unloaded. */
static opd_status open_module(struct registry *registry, const opd_module *def, void *library, struct isolated *isolated, const char *source,
                              opd_error *error)
{
	struct module *module = module_create(registry, def, library);
	if (module == NULL) {
		module_unload(library);
		isolated_destroy(isolated);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory");
	}
	module->isolated = isolated;
	if (isolated != NULL)
		*(struct isolated **)module->state = isolated;
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
	return status == OPD_OK ? open_module(registry, def, NULL, NULL, "built in", error) : status;
}

static void remember_missing(struct registry *registry, const char *name, const char *path, const char *reason)
{
	(void)pthread_mutex_lock(&registry->mutex);
	struct provider **slot = provider_slot(registry, name);
	if (slot == &registry->providers[registry->provider_count]) {
		struct provider *provider = provider_create(name, "", path, reason);
		if (provider != NULL)
			provider_place(registry, slot, provider);
		if (provider == NULL || registry_publish(registry, NULL) != OPD_OK)
			LOG(registry->log, LOG_ERROR, "registry: out of memory");
	}
	(void)pthread_mutex_unlock(&registry->mutex);
}

void registry_remember(struct registry *registry, const char *name, const char *reason)
{
	remember_missing(registry, name, "", reason);
}

/* What a module is loaded into: this process, or a worker's. */
struct loaded {
	void *library;
	struct isolated *isolated;
	const opd_module *def;
};

/* Where a module's code runs. */
enum home { HOME_HERE, HOME_WORKER, HOME_CONFINED_WORKER };

static opd_status find_module(const struct registry *registry, const char *path, enum home home, struct loaded *loaded, opd_error *error)
{
	char real[PATH_MAX];
	if (home == HOME_HERE)
		return module_find(path, &loaded->library, &loaded->def, error);
	opd_status status = module_resolve(path, real, error);
	if (status == OPD_OK)
		status = isolated_create(real, home == HOME_CONFINED_WORKER, &registry->services.isolated, registry->log, &loaded->isolated, error);
	if (status == OPD_OK)
		loaded->def = isolated_module(loaded->isolated);
	return status;
}

static opd_status load(struct registry *registry, const char *path, const char *name, enum home home, bool remember, opd_error *error)
{
	struct loaded loaded = {0};
	opd_error own;
	opd_status status = find_module(registry, path, home, &loaded, &own);
	char known[BOUND_NAME_BYTES + 1] = "";
	if (name != NULL || status == OPD_OK)
		(void)snprintf(known, sizeof known, "%s", name != NULL ? name : loaded.def->name);
	if (status == OPD_OK && name != NULL && strcmp(loaded.def->name, name) != 0) {
		status = opd_fail(&own, OPD_INVALID_ARGUMENT, "%s: its provider is called %.100s, configured as %s", path, loaded.def->name, name);
		module_unload(loaded.library);
		isolated_destroy(loaded.isolated);
	}
	if (status == OPD_OK)
		status = open_module(registry, loaded.def, loaded.library, loaded.isolated, path, &own);
	if (status == OPD_OK)
		return OPD_OK;
	if (remember && text_is_name(known, strlen(known)) && strcmp(known, "native") != 0 && strcmp(known, "unfused") != 0)
		remember_missing(registry, known, path, own.text);
	if (error != NULL)
		*error = own;
	return status;
}

opd_status registry_load(struct registry *registry, const char *path, const char *name, bool remember, opd_error *error)
{
	return load(registry, path, name, HOME_HERE, remember, error);
}

opd_status registry_load_isolated(struct registry *registry, const char *path, const char *name, bool confined, bool remember, opd_error *error)
{
	return load(registry, path, name, confined ? HOME_CONFINED_WORKER : HOME_WORKER, remember, error);
}
