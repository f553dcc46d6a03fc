#include "server/plans.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "server/module.h"
#include "server/schema.h"

#define BUCKETS 1024
#define KEY_BYTES_MAX 4096 /* a call with a longer key (many tensors in a list) is planned each time */

struct plans {
	pthread_mutex_t mutex;
	uint32_t entry_limit;
	uint64_t byte_limit;
	uint32_t entries;
	uint64_t bytes;
	struct plan *buckets[BUCKETS];
	struct plan *newest;
	struct plan *oldest;
};

opd_status plans_create(uint32_t entries, uint64_t bytes, struct plans **plans_out, opd_error *error)
{
	struct plans *plans = calloc(1, sizeof *plans);
	if (plans == NULL || pthread_mutex_init(&plans->mutex, NULL) != 0) {
		free(plans);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "plans: out of memory");
	}
	plans->entry_limit = entries;
	plans->byte_limit = bytes;
	*plans_out = plans;
	return OPD_OK;
}

void plan_unref(struct plan *plan)
{
	if (plan == NULL || atomic_fetch_sub_explicit(&plan->refs, 1, memory_order_acq_rel) != 1)
		return;
	if (plan->made.destroy != NULL)
		plan->made.destroy(plan->made.data);
	free(plan);
}

/* ---- Keys ---- */

struct key {
	size_t bytes;
	bool full;
	unsigned char data[KEY_BYTES_MAX];
};

static void key_put(struct key *key, const void *data, size_t bytes)
{
	if (bytes > KEY_BYTES_MAX - key->bytes) {
		key->full = true;
		return;
	}
	memcpy(key->data + key->bytes, data, bytes);
	key->bytes += bytes;
}

static void key_put_tensor(struct key *key, const opd_tensor *tensor)
{
	const uint32_t head[3] = {(uint32_t)tensor->dtype, tensor->rank, tensor->alignment < 64 ? tensor->alignment : 64};
	key_put(key, head, sizeof head);
	key_put(key, tensor->shape, tensor->rank * sizeof tensor->shape[0]);
	key_put(key, tensor->strides, tensor->rank * sizeof tensor->strides[0]);
}

static void key_put_arg(struct key *key, const opd_arg *arg)
{
	const uint32_t head[2] = {arg->kind, arg->count};
	key_put(key, head, sizeof head);
	switch ((opd_arg_kind)arg->kind) {
	case OPD_ARG_NONE:
		break;
	case OPD_ARG_TENSOR:
		key_put_tensor(key, arg->tensor);
		break;
	case OPD_ARG_TENSORS:
		for (uint32_t i = 0; i < arg->count && !key->full; i++)
			key_put_tensor(key, arg->tensors[i]);
		break;
	case OPD_ARG_INTS:
		key_put(key, arg->ints, arg->count * sizeof arg->ints[0]);
		break;
	case OPD_ARG_STR:
		key_put(key, arg->str, arg->count);
		break;
	case OPD_ARG_BOOL:
		key_put(key, &arg->b, sizeof arg->b);
		break;
	case OPD_ARG_INT:
	case OPD_ARG_FLOAT:
		key_put(key, &arg->i, sizeof arg->i);
		break;
	}
}

static void key_fill(struct key *key, const struct snapshot *snapshot, const struct impl *impl, const opd_call *call)
{
	key->bytes = 0;
	key->full = false;
	key_put(key, &snapshot->version, sizeof snapshot->version);
	key_put(key, &impl, sizeof(const struct impl *));
	key_put(key, &call->flags, sizeof call->flags);
	for (uint32_t i = 0; i < call->arg_count && !key->full; i++)
		key_put_arg(key, &call->args[i]);
}

static uint64_t key_hash(const struct key *key)
{
	uint64_t hash = 0x9e3779b97f4a7c15u;
	for (size_t at = 0; at < key->bytes; at += 8) {
		uint64_t word = 0;
		memcpy(&word, key->data + at, key->bytes - at < 8 ? key->bytes - at : 8);
		hash = (hash ^ word) * 0xff51afd7ed558ccdu;
		hash ^= hash >> 32;
	}
	return hash;
}

/* ---- The cache ---- */

static void unlink_locked(struct plans *plans, struct plan *plan)
{
	*(plan->newer == NULL ? &plans->newest : &plan->newer->older) = plan->older;
	*(plan->older == NULL ? &plans->oldest : &plan->older->newer) = plan->newer;
}

static void link_newest_locked(struct plans *plans, struct plan *plan)
{
	plan->newer = NULL;
	plan->older = plans->newest;
	*(plans->newest == NULL ? &plans->oldest : &plans->newest->newer) = plan;
	plans->newest = plan;
}

static struct plan *find_locked(struct plans *plans, const struct key *key, uint64_t hash)
{
	for (struct plan *plan = plans->buckets[hash % BUCKETS]; plan != NULL; plan = plan->next)
		if (plan->hash == hash && plan->key_bytes == key->bytes && memcmp(plan->key, key->data, key->bytes) == 0)
			return plan;
	return NULL;
}

/* Takes the oldest out of the cache and returns it. */
static struct plan *evict_locked(struct plans *plans)
{
	struct plan *plan = plans->oldest;
	struct plan **link = &plans->buckets[plan->hash % BUCKETS];
	while (*link != plan)
		link = &(*link)->next;
	*link = plan->next;
	unlink_locked(plans, plan);
	plans->entries--;
	plans->bytes -= plan->made.memory_bytes;
	return plan;
}

struct plan *plans_find(struct plans *plans, const struct snapshot *snapshot, const struct impl *impl, const opd_call *call)
{
	struct key key;
	key_fill(&key, snapshot, impl, call);
	if (key.full)
		return NULL;
	uint64_t hash = key_hash(&key);
	(void)pthread_mutex_lock(&plans->mutex);
	struct plan *plan = find_locked(plans, &key, hash);
	if (plan != NULL) {
		(void)atomic_fetch_add_explicit(&plan->refs, 1, memory_order_relaxed);
		if (plan != plans->newest) {
			unlink_locked(plans, plan);
			link_newest_locked(plans, plan);
		}
	}
	(void)pthread_mutex_unlock(&plans->mutex);
	return plan;
}

/* Linked by next; without the lock: a plan's destroy is foreign code. */
static void unref_all(struct plan *plans)
{
	while (plans != NULL) {
		struct plan *plan = plans;
		plans = plan->next;
		plan_unref(plan);
	}
}

/* Keeps `plan` unless another thread was faster; returns the one that is kept, referenced for the caller. */
static struct plan *plans_keep(struct plans *plans, struct plan *plan, const struct key *key)
{
	struct plan *victims = NULL;
	(void)pthread_mutex_lock(&plans->mutex);
	struct plan *other = find_locked(plans, key, plan->hash);
	if (other == NULL) {
		plan->next = plans->buckets[plan->hash % BUCKETS];
		plans->buckets[plan->hash % BUCKETS] = plan;
		link_newest_locked(plans, plan);
		plans->entries++;
		plans->bytes += plan->made.memory_bytes;
		(void)atomic_fetch_add_explicit(&plan->refs, 1, memory_order_relaxed);
		while (plans->oldest != plan && (plans->entries > plans->entry_limit || plans->bytes > plans->byte_limit)) {
			struct plan *victim = evict_locked(plans);
			victim->next = victims;
			victims = victim;
		}
	} else {
		(void)atomic_fetch_add_explicit(&other->refs, 1, memory_order_relaxed);
	}
	(void)pthread_mutex_unlock(&plans->mutex);
	unref_all(victims);
	if (other == NULL)
		return plan;
	plan_unref(plan);
	return other;
}

opd_status plans_make(struct plans *plans, const struct snapshot *snapshot, const struct impl *impl, const opd_call *call,
                      struct plan **plan_out, opd_error *error)
{
	struct key key;
	key_fill(&key, snapshot, impl, call);
	size_t key_bytes = key.full ? 0 : key.bytes;
	struct plan *plan = calloc(1, sizeof *plan + key_bytes);
	if (plan == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "plans: out of memory");
	plan->refs = 1;
	plan->hash = key_hash(&key);
	plan->key_bytes = (uint32_t)key_bytes;
	memcpy(plan->key, key.data, key_bytes);
	plan->made.struct_bytes = sizeof plan->made;
	plan->reason.code = OPD_REASON_PLAN;
	error->text[0] = '\0';
	opd_status status = impl->def->plan(impl->def, impl->state, call, &plan->made, &plan->reason, error);
	if (status != OPD_OK && status != OPD_FAILED_PRECONDITION) {
		plan_unref(plan);
		return module_failure(status, error, "%s.%s: its plan failed", impl->provider->name, impl->def->op);
	}
	plan->refused = status != OPD_OK;
	plan->reason.detail[sizeof plan->reason.detail - 1] = '\0';
	*plan_out = key.full || plan->made.memory_bytes > plans->byte_limit ? plan : plans_keep(plans, plan, &key);
	return OPD_OK;
}

uint32_t plans_trim(struct plans *plans)
{
	struct plan *victims = NULL;
	uint32_t count = 0;
	(void)pthread_mutex_lock(&plans->mutex);
	for (; plans->oldest != NULL; count++) {
		struct plan *victim = evict_locked(plans);
		victim->next = victims;
		victims = victim;
	}
	(void)pthread_mutex_unlock(&plans->mutex);
	unref_all(victims);
	return count;
}

void plans_destroy(struct plans *plans)
{
	if (plans == NULL)
		return;
	while (plans->oldest != NULL)
		plan_unref(evict_locked(plans));
	(void)pthread_mutex_destroy(&plans->mutex);
	free(plans);
}
