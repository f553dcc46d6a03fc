/* Priority lists: as they were given (plist), and cut for one op (effective).
 *
 * Layer: server, on top of the registry. Threads: a plist belongs to one session or to a snapshot (constant but for its warned bits and cache); an effective is constant
 * and counted.
 * SEMANTICS 15 to 24 in one place. */
#ifndef OPD_SERVER_PRIORITY_H
#define OPD_SERVER_PRIORITY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "proto/arena.h"
#include "proto/message.h"
#include "server/registry.h"

/* A stored list: names as given. */
struct plist {
	_Atomic uint32_t refs;
	msg_level level;
	bool star; /* given for `*` */
	uint32_t count;
	struct msg_text *names; /* in the same block */
	_Atomic uint32_t warned[REGISTRY_OPS_MAX / 32]; /* by op index: the fallback to native was warned of */
	struct effective *cache; /* of a session's list: those resolved so far, newest first */
};

/* A provider that the list names and that was dropped before any predicate was asked. */
struct effective_skip {
	const char *provider; /* registry's, or in the effective's block */
	opd_reason_code code;
	const char *reason;
};

/* The effective list of one op. */
struct effective {
	_Atomic uint32_t refs;
	uint32_t op_index;
	uint64_t version;   /* of the snapshot it was cut for */
	msg_level level;
	bool appended;      /* its last is native, which the list doesn't name: a strict request doesn't see it */
	bool empty;         /* the list was empty or had only unsupported names */
	uint32_t count;
	uint32_t skip_count;
	const struct impl **impls;
	struct effective_skip *skips;
	struct plist *list;     /* whose warned bits count: of a snapshot's fallback; NULL otherwise */
	struct effective *next; /* in a plist's cache */
};

/* `device` of a request: a kind, and which of that kind. */
struct device_filter {
	const char *kind;
	size_t kind_bytes;
	int64_t ordinal; /* -1: any */
};
/* "cpu", "cuda", "cuda:1". INVALID_ARGUMENT otherwise. */
OPD_MUST_USE opd_status device_filter_parse(struct msg_text text, struct device_filter *filter_out, opd_error *error);

/* NULL: out of memory. Copies the names. */
struct plist *plist_create(msg_level level, bool star, const struct msg_text *names, uint32_t count);
struct plist *plist_ref(struct plist *list);
void plist_unref(struct plist *list);

/* SEMANTICS 16: every name is a provider of the op (NULL: of any op), or a configured module that couldn't be loaded. NOT_FOUND names the first that isn't, and says which there are. */
OPD_MUST_USE opd_status plist_check(const struct snapshot *snapshot, const struct op *op, const struct msg_text *names, uint32_t count,
                                    opd_error *error);

/* Cuts names for an op. filter NULL: no device asked for. NULL: out of memory. */
struct effective *effective_create(const struct snapshot *snapshot, const struct op *op, msg_level level, const struct msg_text *names,
                                   uint32_t count, const struct device_filter *filter, struct plist *list);
/* No list at any level: native alone. */
struct effective *effective_create_none(const struct snapshot *snapshot, const struct op *op, const struct device_filter *filter);
/* Of a session's stored list, from its cache or made now; referenced. */
struct effective *effective_get(const struct snapshot *snapshot, const struct op *op, struct plist *list);
/* The providers' names of its first `count`, in the arena; NULL: full. */
const struct msg_text *effective_list_names(const struct effective *effective, uint32_t count, struct arena *arena);
struct effective *effective_ref(struct effective *effective);
void effective_unref(struct effective *effective);

/* Warns once per op and stored list where dispatch may fall back to native unasked (SEMANTICS 19, 21, 22). once: the stored list's warned bits; NULL for a
 * request's own list, whose warnings `limit` bounds. */
void effective_warn(const struct effective *effective, const struct op *op, struct log *log, _Atomic uint32_t *once, struct log_limit *limit);

#endif
