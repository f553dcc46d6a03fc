/* Ops, implementations, providers, devices: who can run what. The registry is written under a lock and read as immutable snapshots.
 *
 * Layer: server. Threads: registry_* from any (one writer at a time, a lock); a snapshot from any, while referenced.
 * Life: registry_create → registry_open_builtin, registry_load… → registry_snapshot… → registry_destroy (after the last snapshot is gone; closes the modules).
 * A change (a module loaded, another shape function, a server default set) publishes a new snapshot; requests keep the one they were bound with.
 * Not here: which implementation runs (server/priority.h makes lists, server/dispatch.h walks them). */
#ifndef OPD_SERVER_REGISTRY_H
#define OPD_SERVER_REGISTRY_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "proto/message.h"
#include "providers/provider.h"
#include "server/isolated.h"
#include "server/log.h"
#include "server/schema.h"

#define REGISTRY_OPS_MAX 1024
#define REGISTRY_PROVIDERS_MAX 256
#define REGISTRY_IMPLS_MAX 4096
#define REGISTRY_DEVICES_MAX 64

struct derived;
struct module;
struct effective;
struct plist;

/* A provider: a module that is there, or the configured name of one that couldn't be loaded. */
struct provider {
	const char *name;
	uint32_t name_hash; /* schema_hash */
	uint32_t index;
	const char *version;
	const char *source; /* "built in" or the module's path */
	bool isolated;      /* its code runs in worker processes */
	const char *reason; /* why it couldn't be loaded; NULL: it is there */
	struct module *module;
	struct provider *replaced; /* the entry of this name that couldn't be loaded before */
};

/* One implementation; constant once registered, lives as long as the registry. */
struct impl {
	const opd_impl *def;
	void *state; /* of its module */
	const struct provider *provider;
	uint32_t op_index;
	uint32_t index;  /* among all implementations */
	uint32_t params; /* of its schema: fewer than the op's, and it refuses calls that use the others */
	bool supported;  /* statically */
	bool complete;   /* takes all arguments: no predicate, no plan that may refuse, the op's whole schema */
	bool on_host;    /* device "cpu" */
	opd_run_many_fn run_many; /* several calls at once; NULL: it can't */
	const char *unsupported; /* why not; NULL when supported */
	opd_reason_code unsupported_code;
};

struct op {
	const opd_op *def;
	struct schema *schema;
	opd_shape_fn shape;
	uint64_t row_params; /* bits of the parameters whose first extent is rows that stand for themselves (OPD_OP_ROWS); 0: there are none */
	uint64_t index_params; /* bits of the parameters whose contents its check reads; 0: it has none */
	uint32_t index; /* the same in every snapshot */
	uint32_t impl_count;
	const struct impl **impls; /* native first, then in the order of registration */
	struct effective *fallback; /* of the server's defaults, the configuration, or of no list at all */
};

struct device {
	const char *name; /* "cpu", "cuda:0" */
	const char *kind;
	uint32_t ordinal;
	const opd_backend *backend; /* NULL: the host */
	const char *lost;           /* why it can't be used: "test:0 is lost: …"; NULL: it can. Lives as long as the registry */
	void *state;
};

struct snapshot {
	_Atomic uint32_t refs;
	uint64_t version;
	uint32_t op_count;
	struct op *ops;
	uint32_t op_mask; /* of op_table: index + 1, 0 is free; open addressing by schema_hash */
	uint16_t *op_table;
	uint32_t provider_count;
	const struct provider *const *providers;
	uint32_t device_count;
	const struct device *devices; /* [0] is the host */
	uint32_t impl_count;
	const char **quarantined; /* by impl->index: why it was taken out; NULL: it wasn't */
};

struct registry;

/* What the registry needs of the lanes for the modules' host table. */
struct registry_services {
	void (*parallel_for)(const opd_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument);
	bool (*cancelled)(const opd_exec *exec);
	void *(*alloc)(void *context, uint64_t bytes); /* host memory, 64-byte aligned, charged; NULL: refused */
	void (*free)(void *context, void *memory);
	void *context;
	struct derived *derived; /* NULL: no derived copies */
	struct isolated_services isolated;
};

OPD_MUST_USE opd_status registry_create(struct log *log, const struct registry_services *services, struct registry **registry_out,
                                        opd_error *error);
void registry_destroy(struct registry *registry);

/* Opens one linked-in module, or one at `path` whose configured name is `name` (NULL: its own). A module that can't be loaded or opened is an error here; with `remember`, its name
 * stays as a provider that isn't there, for priority lists. */
OPD_MUST_USE opd_status registry_open_builtin(struct registry *registry, const opd_module *module, opd_error *error);
OPD_MUST_USE opd_status registry_load(struct registry *registry, const char *path, const char *name, bool remember, opd_error *error);
/* The same of a module that runs in worker processes (server/isolated.h); confined: not where these can't be confined. */
OPD_MUST_USE opd_status registry_load_isolated(struct registry *registry, const char *path, const char *name, bool confined, bool remember, opd_error *error);

/* A change of several steps: from begin to its end nothing that is loaded, remembered or set is published, and cancel takes all of it back (modules that were opened are closed). The
 * registry's writer lock is held meanwhile: all on one thread. The configuration's lists are set last: they aren't taken back. */
struct registry_change;
OPD_MUST_USE opd_status registry_change_begin(struct registry *registry, struct registry_change **change_out, opd_error *error);
void registry_change_commit(struct registry_change *change);
void registry_change_cancel(struct registry_change *change);

/* A name that lists may use although no module of it is there (SEMANTICS 16), with the reason why. Nothing happens when there is a provider of this name. */
void registry_remember(struct registry *registry, const char *name, const char *reason);

/* Another shape function for an op, by its owner. */
OPD_MUST_USE opd_status registry_set_shape(struct registry *registry, const char *op, opd_shape_fn shape, opd_error *error);

/* A device can't be used any more, or (NULL) can again: implementations of its kind count as unsupported while none of the kind is left. Any thread. */
void registry_set_lost(struct registry *registry, uint32_t device, const char *reason);

/* An implementation (NULL: all of the provider's) counts as unsupported from now on, with this reason; NULL: as registered again. Any thread; false: a module is being opened or there is no
 * memory, and nothing has changed: try again. */
OPD_MUST_USE bool registry_try_quarantine(struct registry *registry, const struct provider *provider, const struct impl *impl, const char *reason);
const char *registry_op_name(const struct registry *registry, const struct impl *impl); /* any thread */

/* The newest snapshot, referenced. */
struct snapshot *registry_snapshot(struct registry *registry);
uint64_t registry_version(const struct registry *registry);
struct snapshot *snapshot_ref(struct snapshot *snapshot);
void snapshot_unref(struct snapshot *snapshot);

/* NULL: no such op, provider, implementation. */
const struct op *snapshot_op(const struct snapshot *snapshot, const char *name, size_t bytes);
/* The same with NOT_FOUND written, and the op whose name comes closest. */
const struct op *snapshot_find_op(const struct snapshot *snapshot, struct msg_text name, opd_error *error);
const struct provider *snapshot_provider(const struct snapshot *snapshot, const char *name, size_t bytes);
const struct impl *op_impl(const struct op *op, const struct provider *provider);
/* Why it can't run whatever the call (code in *code_out), statically or since it was quarantined; NULL: it can. */
const char *snapshot_unsupported(const struct snapshot *snapshot, const struct impl *impl, opd_reason_code *code_out);

/* The lists below all sessions: the server's defaults and the configuration's. `op` NULL: `*`. names NULL: clear. INVALID_ARGUMENT or NOT_FOUND, and nothing changes, when a name isn't
 * a provider of the op (SEMANTICS 16). level: MSG_LEVEL_SERVER or MSG_LEVEL_CONFIGURATION. */
OPD_MUST_USE opd_status registry_set_priority(struct registry *registry, int level, const char *op, const char *const *names, uint32_t count,
                                              opd_error *error);
/* All of the configuration's lists in one step: requests see the old ones or the new ones. On failure nothing changes, and *failed_out is the bad one's index (count: memory). */
struct registry_list {
	const char *op; /* or "*", or an op narrowed: priority_key.h; an op that has narrowed lists has a plain one as well */
	const char *const *names;
	uint32_t count;
};
OPD_MUST_USE opd_status registry_set_configuration(struct registry *registry, const struct registry_list *lists, size_t count,
                                                   size_t *failed_out, opd_error *error);

#endif
