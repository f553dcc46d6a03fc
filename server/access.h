/* What an identity may do: ops, providers, classes, publishing, administrative actions; and whose tenant it is.
 *
 * Layer: server. Threads: constant once made, but for the counter of denials, which is atomic; references are atomic.
 * Life: access_create → filled by whoever made it, before anybody else sees it → access_ref, access_unref. A session holds the one that it was given at Hello until it ends: a reload that
 * changes an identity ends its sessions (server/identity.h).
 * Everything that is not restricted is one pointer that is NULL.
 * Not here: who a peer is (server/identity.h), how much it may use (struct tenant_policy). */
#ifndef OPD_SERVER_ACCESS_H
#define OPD_SERVER_ACCESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "opd/status.h"
#include "proto/message.h"
#include "server/log.h"
#include "server/scheduler.h"

#define IDENTITY_BYTES 64u /* a name of it, with its NUL: that of its tenant where none is given */

/* X(name, text): the text is the configuration's. The first is no right, the second what any administrative action needs that has none of its own. */
#define ACCESS_RIGHT_MAP(X) \
	X(NONE, "none")         \
	X(OPERATE, "operate")   \
	X(PUBLISH, "publish")   \
	X(DEFAULTS, "defaults") \
	X(MODULES, "modules")   \
	X(SESSIONS, "sessions") \
	X(LOG, "log")           \
	X(DRAIN, "drain")

typedef enum access_right {
#define X(name, text) RIGHT_##name,
	ACCESS_RIGHT_MAP(X)
#undef X
	    RIGHT_COUNT
} access_right;

#define ACCESS_ALL ((1u << RIGHT_COUNT) - 1)
#define ACCESS_USER (1u << RIGHT_NONE | 1u << RIGHT_PUBLISH) /* who isn't configured */

/* Names, sorted. */
struct access_list {
	size_t count;
	char **names;
};

struct access {
	_Atomic uint32_t refs;
	char identity[IDENTITY_BYTES];
	char tenant[IDENTITY_BYTES];
	uint32_t rights;                /* bits by access_right */
	uint32_t classes;               /* bits by sched_class */
	struct access_list *ops;        /* NULL: all */
	struct access_list *providers;  /* NULL: all; `native` is everybody's */
	struct log_limit denials;
};

/* Everything but `rights` unrestricted. NULL: out of memory, or a name is too long. */
struct access *access_create(const char *identity, const char *tenant, uint32_t rights);
/* For another name: whose tenant is its own unless `from` names one that isn't `from`'s own. */
struct access *access_copy(const struct access *from, const char *identity);
struct access *access_ref(struct access *access);
/* NULL is allowed. */
void access_unref(struct access *access);
/* Adds a name to *list, made where it is NULL. False: out of memory. */
OPD_MUST_USE bool access_list_add(struct access_list **list, const char *name);
/* The same identity with the same rights. */
bool access_same(const struct access *a, const struct access *b);

static inline bool access_may(const struct access *access, access_right right)
{
	return (access->rights >> right & 1) != 0;
}
/* Any administrative right. */
bool access_administers(const struct access *access);
bool access_has_provider(const struct access *access, const char *name);
const char *access_right_name(access_right right);
/* RIGHT_COUNT: no right is called so. */
access_right access_right_parse(const char *name);

/* PERMISSION_DENIED names the right that is missing, and who lacks it; the log has it once a minute for each identity, with a count. `what` is what needs the right. */
OPD_MUST_USE opd_status access_check_right(struct access *access, access_right right, const char *what, struct log *log, opd_error *error);
OPD_MUST_USE opd_status access_check_op(struct access *access, const char *op, struct log *log, opd_error *error);
/* Of a list that a client gives. */
OPD_MUST_USE opd_status access_check_providers(struct access *access, const struct msg_text *names, uint32_t count, struct log *log, opd_error *error);
OPD_MUST_USE opd_status access_check_class(struct access *access, sched_class class, struct log *log, opd_error *error);

#endif
