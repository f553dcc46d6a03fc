/* The registry's own memory, for the files that make it up: registry.c (changes, life, defaults), registry_open.c (opening modules), register.c (what modules register), snapshot.c.
 *
 * Layer: server, internal. Threads: under registry->mutex unless said otherwise. */
#ifndef OPD_SERVER_REGISTRY_INTERNAL_H
#define OPD_SERVER_REGISTRY_INTERNAL_H

#include "server/module.h"
#include "server/priority.h"
#include "server/registry.h"

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
	struct snapshot *staged; /* what a change of several steps would publish so far */
	struct registry_change *change; /* NULL: changes are published one by one */
	_Atomic uint64_t version;
	uint32_t op_count;
	struct entry ops[REGISTRY_OPS_MAX];
	uint32_t impl_count;
	struct impl *impls[REGISTRY_IMPLS_MAX]; /* in the order of registration */
	uint32_t provider_count;
	struct provider *providers[REGISTRY_PROVIDERS_MAX];
	uint32_t device_count;
	struct device devices[REGISTRY_DEVICES_MAX];
	struct lost_text *lost_texts; /* of lost devices, and of quarantines: snapshots may still show those of before */
	const char *impls_out[REGISTRY_IMPLS_MAX];         /* why an implementation is quarantined; NULL: it isn't */
	const char *providers_out[REGISTRY_PROVIDERS_MAX]; /* … or all of a provider's */
	struct module *modules; /* newest first */
	struct plist *server_star;
	struct plist *configuration_star;
	struct plist *none; /* stands for no list: remembers which ops were warned of */
};

struct lost_text {
	struct lost_text *next;
	char text[];
};

/* NULL: no such op. */
struct entry *registry_find(struct registry *registry, const char *name);
/* Makes and publishes a snapshot of what is there now. */
OPD_MUST_USE opd_status registry_publish(struct registry *registry, opd_error *error);
/* The newest snapshot; NULL: out of memory. */
struct snapshot *snapshot_create(struct registry *registry);
/* What a failed open, or a change that is cancelled, takes back. */
struct registry_mark {
	uint32_t ops;
	uint32_t impls;
	uint32_t devices;
};

struct registry_mark registry_mark(const struct registry *registry);
void registry_roll_back(struct registry *registry, const struct registry_mark *mark);
/* And those that it replaced. NULL is allowed. */
void registry_provider_destroy(struct provider *provider);
/* Gives the module its table of host services. */
void register_fill_host(struct module *module, const struct registry *registry);
/* Drops the devices from number `count` on. */
void register_drop_devices(struct registry *registry, uint32_t count);

#endif
