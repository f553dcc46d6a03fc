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
#include "server/priority_key.h"
#include "server/registry.h"

/* Lists of an op that hold for some calls instead of its plain one. */
#define PLIST_CASES_MAX 64u
struct plist_case {
	struct priority_key key;
	struct plist *list;
};

/* A stored list: names as given. */
struct plist {
	_Atomic uint32_t refs;
	msg_level level;
	bool star; /* given for `*` */
	uint32_t count;
	struct msg_text *names; /* in the same block */
	_Atomic uint32_t warned[REGISTRY_OPS_MAX / 32]; /* by op index: the fallback to native was warned of */
	char *narrowed;          /* of a case: its key, as "linear/bf16"; NULL otherwise */
	uint32_t case_count;     /* of the configuration's list of an op: those that narrow it, in the order in which they are asked */
	struct plist_case *cases;
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
	uint32_t case_count;
	struct effective_case *cases; /* of a list with cases: the same, cut, in their order */
	const char *narrowed;   /* of a case: its key, the list's own; NULL otherwise */
	struct effective *next; /* in a plist's cache */
};

struct effective_case {
	opd_dtype dtype;
	uint64_t rows_max;
	struct effective *effective;
};

/* `device` of a request: a kind, and which of that kind. */
struct device_filter {
	const char *kind;
	size_t kind_bytes;
	int64_t ordinal; /* -1: any */
};
/* "cpu", "cuda", "cuda:1". INVALID_ARGUMENT otherwise. */
OPD_MUST_USE opd_status device_filter_parse(struct msg_text text, struct device_filter *filter_out, opd_error *error);
/* Whether a device of `kind`, as an implementation names it, is what is wanted, and is there. */
bool device_filter_finds(const struct device_filter *filter, const struct snapshot *snapshot, const char *kind);

/* NULL: out of memory. Copies the names. */
struct plist *plist_create(msg_level level, bool star, const struct msg_text *names, uint32_t count);
struct plist *plist_ref(struct plist *list);
void plist_unref(struct plist *list);

/* Adds a list that narrows another, which isn't shared yet; takes a reference of its own, and gives it its key. RESOURCE_EXHAUSTED: memory, or too many of them. */
OPD_MUST_USE opd_status plist_add_case(struct plist *list, const char *text, const struct priority_key *key, struct plist *narrow, opd_error *error);

/* SEMANTICS 16: every name is a provider of the op (NULL: of any op), or a configured module that couldn't be loaded. NOT_FOUND names the first that isn't, and says which there are. */
OPD_MUST_USE opd_status plist_check(const struct snapshot *snapshot, const struct op *op, const struct msg_text *names, uint32_t count,
                                    opd_error *error);

/* Cuts names for an op. filter NULL: no device asked for. NULL: out of memory. */
struct effective *effective_create(const struct snapshot *snapshot, const struct op *op, msg_level level, const struct msg_text *names,
                                   uint32_t count, const struct device_filter *filter, struct plist *list);
/* Cuts the list's cases for the op, and gives them to its effective. False: out of memory. */
OPD_MUST_USE bool effective_add_cases(struct effective *effective, const struct snapshot *snapshot, const struct op *op, const struct plist *list,
                                      const struct device_filter *filter);
/* The one that holds for these arguments: a case, or itself. Borrowed. */
const struct effective *effective_for(const struct effective *effective, const opd_call *call);
/* No list at any level: native alone. */
struct effective *effective_create_none(const struct snapshot *snapshot, const struct op *op, const struct device_filter *filter);
/* Of a session's stored list, from its cache or made now; referenced. */
struct effective *effective_get(const struct snapshot *snapshot, const struct op *op, struct plist *list);
/* The providers' names of its first `count`, in the arena; NULL: full. */
const struct msg_text *effective_list_names(const struct effective *effective, uint32_t count, struct arena *arena);
struct effective *effective_ref(struct effective *effective);
void effective_unref(struct effective *effective);

/* Warns once per op and stored list (those of cases too) where dispatch may fall back to native unasked (SEMANTICS 19, 21, 22). once: the stored list's warned bits; NULL for a
 * request's own list, whose warnings `limit` bounds. */
void effective_warn(const struct effective *effective, const struct op *op, struct log *log, _Atomic uint32_t *once, struct log_limit *limit);

#endif
