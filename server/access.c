#include "server/access.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define CLASSES_ALL ((1u << CLASS_COUNT) - 1)
#define ADMINISTRATIVE (ACCESS_ALL & ~ACCESS_USER)

static const char *const right_names[] = {
#define X(name, text) [RIGHT_##name] = text,
	ACCESS_RIGHT_MAP(X)
#undef X
};

const char *access_right_name(access_right right)
{
	return right < RIGHT_COUNT ? right_names[right] : "?";
}

access_right access_right_parse(const char *name)
{
	access_right right = RIGHT_OPERATE;
	while (right < RIGHT_COUNT && strcmp(right_names[right], name) != 0)
		right++;
	return right;
}

/* ---- Life ---- */

struct access *access_create(const char *identity, const char *tenant, uint32_t rights)
{
	if (strlen(identity) >= IDENTITY_BYTES || strlen(tenant) >= IDENTITY_BYTES)
		return NULL;
	struct access *access = calloc(1, sizeof *access);
	if (access == NULL)
		return NULL;
	access->refs = 1;
	(void)snprintf(access->identity, sizeof access->identity, "%s", identity);
	(void)snprintf(access->tenant, sizeof access->tenant, "%s", tenant);
	access->rights = rights | 1u << RIGHT_NONE;
	access->classes = CLASSES_ALL;
	return access;
}

struct access *access_ref(struct access *access)
{
	(void)atomic_fetch_add_explicit(&access->refs, 1, memory_order_relaxed);
	return access;
}

static void list_destroy(struct access_list *list)
{
	for (size_t i = 0; list != NULL && i < list->count; i++)
		free(list->names[i]);
	if (list != NULL)
		free(list->names);
	free(list);
}

void access_unref(struct access *access)
{
	if (access == NULL || atomic_fetch_sub_explicit(&access->refs, 1, memory_order_acq_rel) != 1)
		return;
	list_destroy(access->ops);
	list_destroy(access->providers);
	free(access);
}

static bool copy_list(const struct access_list *from, struct access_list **to)
{
	bool copied = from == NULL || access_list_add(to, NULL);
	for (size_t i = 0; copied && from != NULL && i < from->count; i++)
		copied = access_list_add(to, from->names[i]);
	return copied;
}

struct access *access_copy(const struct access *from, const char *identity)
{
	const bool own = strcmp(from->tenant, from->identity) == 0;
	struct access *copy = access_create(identity, own ? identity : from->tenant, from->rights);
	if (copy == NULL)
		return NULL;
	copy->classes = from->classes;
	if (copy_list(from->ops, &copy->ops) && copy_list(from->providers, &copy->providers))
		return copy;
	access_unref(copy);
	return NULL;
}

static int compare_names(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

bool access_list_add(struct access_list **list, const char *name)
{
	if (*list == NULL && (*list = calloc(1, sizeof **list)) == NULL)
		return false;
	if (name == NULL)
		return true; /* an empty list differs from none */
	char **grown = reallocarray((*list)->names, (*list)->count + 1, sizeof *grown);
	char *copy = strdup(name);
	if (grown != NULL)
		(*list)->names = grown;
	if (grown == NULL || copy == NULL) {
		free(copy);
		return false;
	}
	grown[(*list)->count++] = copy;
	qsort(grown, (*list)->count, sizeof *grown, compare_names);
	return true;
}

static bool list_has(const struct access_list *list, const char *name)
{
	return list == NULL || (list->count != 0 && bsearch(&name, list->names, list->count, sizeof *list->names, compare_names) != NULL);
}

static bool same_list(const struct access_list *a, const struct access_list *b)
{
	if (a == NULL || b == NULL)
		return a == b;
	bool same = a->count == b->count;
	for (size_t i = 0; same && i < a->count; i++)
		same = strcmp(a->names[i], b->names[i]) == 0;
	return same;
}

bool access_same(const struct access *a, const struct access *b)
{
	return strcmp(a->identity, b->identity) == 0 && strcmp(a->tenant, b->tenant) == 0 && a->rights == b->rights && a->classes == b->classes &&
	       same_list(a->ops, b->ops) && same_list(a->providers, b->providers);
}

bool access_administers(const struct access *access)
{
	return (access->rights & ADMINISTRATIVE) != 0;
}

bool access_has_provider(const struct access *access, const char *name)
{
	return list_has(access->providers, name) || strcmp(name, "native") == 0;
}

/* ---- Checks ---- */

/* missing: "right drain", "op relu". */
static opd_status deny(struct access *access, const char *what, const char *missing, struct log *log, opd_error *error)
{
	uint32_t suppressed;
	if (log_limit_take(&access->denials, 1, &suppressed))
		LOG(log, LOG_WARN, "denied", LOG_STR("identity", access->identity), LOG_STR("missing", missing), LOG_STR("what", what), LOG_UINT("suppressed", suppressed));
	return opd_fail(error, OPD_PERMISSION_DENIED, "%s needs the %s, which %s doesn't have", what, missing, access->identity);
}

opd_status access_check_right(struct access *access, access_right right, const char *what, struct log *log, opd_error *error)
{
	char missing[40];
	if (access_may(access, right))
		return OPD_OK;
	(void)snprintf(missing, sizeof missing, "right %s", access_right_name(right));
	return deny(access, what, missing, log, error);
}

static opd_status deny_named(struct access *access, const char *kind, const char *name, struct log *log, opd_error *error)
{
	char missing[160];
	(void)snprintf(missing, sizeof missing, "%s %.100s", kind, name);
	return deny(access, "the request", missing, log, error);
}

opd_status access_check_op(struct access *access, const char *op, struct log *log, opd_error *error)
{
	return list_has(access->ops, op) ? OPD_OK : deny_named(access, "op", op, log, error);
}

opd_status access_check_providers(struct access *access, const struct msg_text *names, uint32_t count, struct log *log, opd_error *error)
{
	if (access->providers == NULL)
		return OPD_OK;
	for (uint32_t i = 0; i < count; i++)
		if (!access_has_provider(access, names[i].data == NULL ? "" : names[i].data))
			return deny_named(access, "provider", names[i].data == NULL ? "" : names[i].data, log, error);
	return OPD_OK;
}

opd_status access_check_class(struct access *access, sched_class class, struct log *log, opd_error *error)
{
	return (access->classes >> class & 1) != 0 ? OPD_OK : deny_named(access, "class", sched_class_name(class), log, error);
}
