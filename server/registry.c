/* Providers: what is there now, changes of several steps, and the lists below all sessions. */
#include "server/registry.h"

#include <assert.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"
#include "server/registry_internal.h"

struct entry *registry_find(struct registry *registry, const char *name)
{
	for (uint32_t i = 0; i < registry->op_count; i++)
		if (strcmp(registry->ops[i].schema->name, name) == 0)
			return &registry->ops[i];
	return NULL;
}

static void make_current(struct registry *registry, struct snapshot *snapshot)
{
	(void)pthread_mutex_lock(&registry->current_mutex);
	struct snapshot *before = registry->current;
	registry->current = snapshot;
	atomic_store_explicit(&registry->version, snapshot->version, memory_order_release);
	(void)pthread_mutex_unlock(&registry->current_mutex);
	snapshot_unref(before);
}

opd_status registry_publish(struct registry *registry, opd_error *error)
{
	struct snapshot *snapshot = snapshot_create(registry);
	if (snapshot == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory");
	if (registry->change == NULL) {
		make_current(registry, snapshot);
	} else {
		snapshot_unref(registry->staged);
		registry->staged = snapshot;
	}
	return OPD_OK;
}

/* What a writer builds on. */
static const struct snapshot *newest(const struct registry *registry)
{
	return registry->staged != NULL ? registry->staged : registry->current;
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

/* ---- Changes of several steps ---- */

struct registry_change {
	struct registry *registry;
	struct registry_mark mark;
	struct module *modules; /* the newest one of before */
	uint32_t provider_count;
	struct provider *providers[REGISTRY_PROVIDERS_MAX];
};

opd_status registry_change_begin(struct registry *registry, struct registry_change **change_out, opd_error *error)
{
	struct registry_change *change = calloc(1, sizeof *change);
	if (change == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory");
	(void)pthread_mutex_lock(&registry->mutex);
	change->registry = registry;
	change->mark = registry_mark(registry);
	change->modules = registry->modules;
	change->provider_count = registry->provider_count;
	memcpy(change->providers, registry->providers, registry->provider_count * sizeof registry->providers[0]);
	registry->change = change;
	*change_out = change;
	return OPD_OK;
}

static void change_end(struct registry_change *change)
{
	struct registry *registry = change->registry;
	registry->staged = NULL;
	registry->change = NULL;
	(void)pthread_mutex_unlock(&registry->mutex);
	free(change);
}

void registry_change_commit(struct registry_change *change)
{
	struct registry *registry = change->registry;
	if (registry->staged != NULL)
		make_current(registry, registry->staged);
	change_end(change);
}

/* Names that are new, or have taken the place of those that were missing. */
static void restore_providers(struct registry *registry, const struct registry_change *change)
{
	for (uint32_t i = 0; i < registry->provider_count; i++) {
		struct provider *before = i < change->provider_count ? change->providers[i] : NULL;
		struct provider *provider = registry->providers[i];
		if (provider == before)
			continue;
		provider->replaced = NULL;
		registry_provider_destroy(provider);
		registry->providers[i] = before;
	}
	registry->provider_count = change->provider_count;
}

void registry_change_cancel(struct registry_change *change)
{
	struct registry *registry = change->registry;
	snapshot_unref(registry->staged);
	registry_roll_back(registry, &change->mark);
	restore_providers(registry, change);
	while (registry->modules != change->modules) {
		struct module *module = registry->modules;
		registry->modules = module->next;
		module_destroy(module, true);
	}
	change_end(change);
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
	                        : registry_publish(registry, error);
	if (status != OPD_OK) {
		registry_destroy(registry);
		return status;
	}
	*registry_out = registry;
	return OPD_OK;
}

/* The text as long as the registry lives; NULL: out of memory. Devices and kernels fail seldom, and a cool-down lies between two quarantines. */
OPD_PRINTF(2, 3)
static const char *keep_text(struct registry *registry, const char *format, ...)
{
	char text[OPD_ERROR_TEXT_BYTES];
	va_list args;
	va_start(args, format);
	(void)vsnprintf(text, sizeof text, format, args);
	va_end(args);
	struct lost_text *kept = malloc(sizeof *kept + strlen(text) + 1);
	if (kept == NULL)
		return NULL;
	memcpy(kept->text, text, strlen(text) + 1);
	kept->next = registry->lost_texts;
	registry->lost_texts = kept;
	return kept->text;
}

static const char *remember_lost(struct registry *registry, const char *device, const char *reason)
{
	const char *text = keep_text(registry, "%s is lost: %s", device, reason);
	return text == NULL ? "the device is lost" : text;
}

void registry_set_lost(struct registry *registry, uint32_t device, const char *reason)
{
	opd_error error;
	(void)pthread_mutex_lock(&registry->mutex);
	struct device *lost = &registry->devices[device];
	lost->lost = reason == NULL ? NULL : remember_lost(registry, lost->name, reason);
	if (registry_publish(registry, &error) != OPD_OK)
		LOG(registry->log, LOG_WARN, "a device's loss shows with the next change only", LOG_STR("device", lost->name), LOG_STR("error", error.text));
	(void)pthread_mutex_unlock(&registry->mutex);
}

bool registry_try_quarantine(struct registry *registry, const struct provider *provider, const struct impl *impl, const char *reason)
{
	opd_error error;
	if (pthread_mutex_trylock(&registry->mutex) != 0)
		return false;
	const char **out = impl != NULL ? &registry->impls_out[impl->index] : &registry->providers_out[provider->index];
	const char *before = *out;
	const char *text = reason == NULL ? NULL : keep_text(registry, "%s", reason);
	*out = reason != NULL && text == NULL ? "too many failures" : text;
	const bool published = registry_publish(registry, &error) == OPD_OK;
	if (!published)
		*out = before;
	(void)pthread_mutex_unlock(&registry->mutex);
	return published;
}

/* An op that has implementations stays where it is, and so does its name. */
const char *registry_op_name(const struct registry *registry, const struct impl *impl)
{
	return registry->ops[impl->op_index].schema->name;
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
	registry_roll_back(registry, &(struct registry_mark){0, 0, registry->device_count});
	/* Newest first: a module may use the backend of an older one, also while it closes. */
	while (registry->modules != NULL) {
		struct module *module = registry->modules;
		registry->modules = module->next;
		module_destroy(module, true);
	}
	register_drop_devices(registry, 0);
	while (registry->lost_texts != NULL) {
		struct lost_text *lost = registry->lost_texts;
		registry->lost_texts = lost->next;
		free(lost);
	}
	for (uint32_t i = 0; i < registry->provider_count; i++)
		registry_provider_destroy(registry->providers[i]);
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

/* The list for an op (NULL or "*": for all), checked and made; names NULL: no list, *list_out is NULL. *slot_out: where it belongs. */
static opd_status make_list(struct registry *registry, int level, const char *name, const char *const *names, uint32_t count,
                            struct plist **list_out, struct plist ***slot_out, opd_error *error)
{
	bool star = name == NULL || strcmp(name, "*") == 0;
	const struct op *op = star ? NULL : snapshot_find_op(newest(registry), msg_text(name), error);
	if (!star && op == NULL)
		return OPD_NOT_FOUND;
	*slot_out = list_slot(registry, level, star ? NULL : &registry->ops[op->index]);
	*list_out = NULL;
	if (names == NULL)
		return OPD_OK;
	struct msg_text texts[BOUND_PROVIDERS];
	if (count > BOUND_PROVIDERS)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "priority list of %u providers, at most %u", (unsigned)count, BOUND_PROVIDERS);
	for (uint32_t i = 0; i < count; i++)
		texts[i] = msg_text(names[i]);
	opd_status status = plist_check(newest(registry), op, texts, count, error);
	if (status != OPD_OK)
		return status;
	*list_out = plist_create((msg_level)level, star, texts, count);
	return *list_out != NULL ? OPD_OK : opd_fail(error, OPD_RESOURCE_EXHAUSTED, "priority list: out of memory");
}

opd_status registry_set_priority(struct registry *registry, int level, const char *op, const char *const *names, uint32_t count,
                                 opd_error *error)
{
	struct plist *list;
	struct plist **slot;
	(void)pthread_mutex_lock(&registry->mutex);
	opd_status status = make_list(registry, level, op, names, count, &list, &slot, error);
	if (status == OPD_OK) {
		struct plist *before = *slot;
		*slot = list;
		status = registry_publish(registry, error);
		if (status != OPD_OK)
			*slot = before;
		plist_unref(status == OPD_OK ? before : list);
	}
	(void)pthread_mutex_unlock(&registry->mutex);
	return status;
}

/* The configuration's lists, all at once: those of ops by index, then the one for `*`. */
struct configured {
	struct plist *lists[REGISTRY_OPS_MAX + 1];
};

static void configured_swap(struct registry *registry, struct configured *configured)
{
	for (uint32_t i = 0; i <= registry->op_count; i++) {
		struct plist **slot = i < registry->op_count ? &registry->ops[i].configuration : &registry->configuration_star;
		struct plist *before = *slot;
		*slot = configured->lists[i];
		configured->lists[i] = before;
	}
}

static opd_status configured_plain(struct registry *registry, struct configured *configured, const struct registry_list *list, opd_error *error)
{
	struct plist *made;
	struct plist **slot;
	opd_status status = make_list(registry, MSG_LEVEL_CONFIGURATION, list->op, list->names, list->count, &made, &slot, error);
	if (status != OPD_OK)
		return status;
	uint32_t at = slot == &registry->configuration_star ? registry->op_count : (uint32_t)(registry_find(registry, list->op) - registry->ops);
	plist_unref(configured->lists[at]);
	configured->lists[at] = made;
	return OPD_OK;
}

/* A list for some of an op's calls: it hangs on the op's plain one. */
static opd_status configured_narrow(struct registry *registry, struct configured *configured, const struct registry_list *list,
                                    const struct priority_key *key, opd_error *error)
{
	const struct op *op = snapshot_find_op(newest(registry), (struct msg_text){list->op, key->op_bytes}, error);
	if (op == NULL)
		return OPD_NOT_FOUND;
	struct plist *plain = configured->lists[op->index];
	if (plain == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "priority for %s: it narrows a list of %s, and there is none", list->op, op->schema->name);
	struct plist *narrow;
	struct plist **slot;
	opd_status status = make_list(registry, MSG_LEVEL_CONFIGURATION, op->schema->name, list->names, list->count, &narrow, &slot, error);
	if (status == OPD_OK)
		status = plist_add_case(plain, list->op, key, narrow, error);
	else
		narrow = NULL;
	plist_unref(narrow);
	return status;
}

/* Plain lists first, then those that narrow them. */
static opd_status configured_fill(struct registry *registry, struct configured *configured, const struct registry_list *lists, size_t count,
                                  size_t *failed_out, opd_error *error)
{
	opd_status status = OPD_OK;
	for (size_t turn = 0; turn < 2; turn++)
		for (size_t i = 0; i < count; i++) {
			struct priority_key key;
			status = priority_key_parse(lists[i].op, &key, error);
			if (status == OPD_OK && priority_key_narrow(&key) == (turn == 1))
				status = turn == 0 ? configured_plain(registry, configured, &lists[i], error)
				                   : configured_narrow(registry, configured, &lists[i], &key, error);
			if (status != OPD_OK) {
				*failed_out = i;
				return status;
			}
		}
	return status;
}

opd_status registry_set_configuration(struct registry *registry, const struct registry_list *lists, size_t count, size_t *failed_out,
                                      opd_error *error)
{
	struct configured *configured = calloc(1, sizeof *configured);
	*failed_out = count;
	if (configured == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "registry: out of memory");
	(void)pthread_mutex_lock(&registry->mutex);
	opd_status status = configured_fill(registry, configured, lists, count, failed_out, error);
	if (status == OPD_OK) {
		configured_swap(registry, configured);
		status = registry_publish(registry, error);
		if (status != OPD_OK)
			configured_swap(registry, configured);
	}
	for (uint32_t i = 0; i <= registry->op_count; i++)
		plist_unref(configured->lists[i]);
	(void)pthread_mutex_unlock(&registry->mutex);
	free(configured);
	return status;
}
