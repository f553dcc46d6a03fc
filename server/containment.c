#include "server/containment.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/clock.h"
#include "server/tenant.h"

#define COOLDOWN_DOUBLINGS 6u
/* 50 times what a whole turn of the loop may take by estimates. */
#define LOOP_KERNEL_NS 1000000u
/* So many measured runs in a row: a guest's clock of CPU time goes on while its host runs others, so that one may be anybody's. */
#define LOOP_STRIKES 3u

/* Of one implementation, or of a provider as a whole. */
struct record {
	const struct provider *provider;
	const struct impl *impl; /* NULL: the provider's */
	struct record *next;
	uint64_t counts[FAILURE_KINDS]; /* since the start, or since it was restored */
	uint32_t recent;                /* of times that are filled in */
	struct failure {
		uint64_t time_ns;
		uint64_t tenant; /* of its name; 0: nobody's */
		failure_kind kind;
	} ring[QUARANTINE_FAILURES_MAX]; /* the newest is at (total - 1) */
	uint64_t total;
	uint64_t trial_until_ns; /* on trial until then */
	uint64_t out_until_ns;   /* 0: it is in */
	uint32_t doublings;
	bool alone;   /* it is out for one tenant's failures, which nobody else was there to mind */
	bool pending; /* the registry was busy: it still has to be told */
};

struct containment {
	struct registry *registry;
	struct tenants *tenants;
	struct log *log;
	struct containment_policy policies[REGISTRY_PROVIDERS_MAX]; /* by provider index */
	_Atomic uint64_t failures[REGISTRY_PROVIDERS_MAX];
	_Atomic uint8_t loop_strikes[REGISTRY_IMPLS_MAX]; /* by implementation index: measured runs in a row that took too long; LOOP_STRIKES: it has left the loop */
	pthread_mutex_t mutex; /* of what follows */
	struct config_quarantine rules;
	struct record *records;
};

opd_status containment_create(struct registry *registry, struct tenants *tenants, struct log *log, struct containment **containment_out, opd_error *error)
{
	struct containment *containment = calloc(1, sizeof *containment);
	if (containment == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "containment: out of memory");
	containment->registry = registry;
	containment->tenants = tenants;
	containment->log = log;
	(void)pthread_mutex_init(&containment->mutex, NULL); /* of glibc, it can't fail */
	*containment_out = containment;
	return OPD_OK;
}

void containment_destroy(struct containment *containment)
{
	if (containment == NULL)
		return;
	while (containment->records != NULL) {
		struct record *record = containment->records;
		containment->records = record->next;
		free(record);
	}
	(void)pthread_mutex_destroy(&containment->mutex);
	free(containment);
}

/* ---- What was configured ---- */

/* Those that come later have what is said of all others, until they are looked up. */
void containment_configure(struct containment *containment, const struct config *config)
{
	struct snapshot *snapshot = registry_snapshot(containment->registry);
	for (uint32_t i = 0; i < REGISTRY_PROVIDERS_MAX; i++) {
		struct containment_policy *policy = &containment->policies[i];
		struct provider_policy wanted;
		config_provider(config, i < snapshot->provider_count ? snapshot->providers[i]->name : "*", &wanted);
		atomic_store_explicit(&policy->checked, config->checked || wanted.checked, memory_order_relaxed);
		atomic_store_explicit(&policy->budget_ns, wanted.budget_us * 1000, memory_order_relaxed);
		const struct provider *reference = wanted.compare[0] == '\0' ? NULL : snapshot_provider(snapshot, wanted.compare, strlen(wanted.compare));
		atomic_store_explicit(&policy->compare, reference == NULL ? UINT32_MAX : reference->index, memory_order_relaxed);
		atomic_store_explicit(&policy->compare_every, reference == NULL ? 0 : wanted.compare_every, memory_order_relaxed);
	}
	snapshot_unref(snapshot);
	(void)pthread_mutex_lock(&containment->mutex);
	containment->rules = config->quarantine;
	(void)pthread_mutex_unlock(&containment->mutex);
}

const struct containment_policy *containment_policy(const struct containment *containment, const struct provider *provider)
{
	return &containment->policies[provider->index];
}

struct containment_policy *containment_policy_of(struct containment *containment, const struct provider *provider)
{
	return &containment->policies[provider->index];
}

/* ---- Failures ---- */

/* Under the mutex; made when it is first asked for. NULL: out of memory. */
static struct record *record_of(struct containment *containment, const struct provider *provider, const struct impl *impl)
{
	for (struct record *record = containment->records; record != NULL; record = record->next)
		if (record->provider == provider && record->impl == impl)
			return record;
	struct record *record = calloc(1, sizeof *record);
	if (record == NULL)
		return NULL;
	record->provider = provider;
	record->impl = impl;
	record->next = containment->records;
	containment->records = record;
	return record;
}

/* "5 failures (kernel error 4, overrun 1)" */
static void describe(const struct record *record, char *out, size_t out_bytes)
{
	static const char *const names[FAILURE_KINDS] = {"kernel error", "overrun", "hang", "crash", "divergence"};
	uint64_t total = 0;
	for (unsigned kind = 0; kind < FAILURE_KINDS; kind++)
		total += record->counts[kind];
	size_t at = (size_t)snprintf(out, out_bytes, "%" PRIu64 " failure%s (", total, total == 1 ? "" : "s");
	const char *comma = "";
	for (unsigned kind = 0; kind < FAILURE_KINDS && at < out_bytes; kind++) {
		if (record->counts[kind] == 0)
			continue;
		at += (size_t)snprintf(out + at, out_bytes - at, "%s%s %" PRIu64, comma, names[kind], record->counts[kind]);
		comma = ", ";
	}
	if (at < out_bytes)
		(void)snprintf(out + at, out_bytes - at, ")");
}

/* ---- Whose failures they are ---- */

/* Names come and go with their sessions, and who comes back is the same. FNV-1a: two names of one number are taken for one tenant, which keeps a provider in. */
static uint64_t tenant_number(const char *name)
{
	uint64_t number = 0xcbf29ce484222325u;
	for (; name != NULL && *name != '\0'; name++)
		number = (number ^ (unsigned char)*name) * 0x100000001b3u;
	return name == NULL ? 0 : number;
}

/* The others notice nothing of it; a thread that is lost, a worker that has to start again, memory written to are everybody's. */
static bool is_confined(failure_kind kind)
{
	return kind == FAILURE_KERNEL || kind == FAILURE_DIVERGENCE;
}

static const struct failure *nth_last(const struct record *record, uint32_t n)
{
	return &record->ring[(record->total - n) % QUARANTINE_FAILURES_MAX];
}

/* All failures within the window are confined, and one tenant's. */
static bool is_one_tenants(const struct record *record, uint64_t window_ns, uint64_t time_ns)
{
	uint64_t tenant = 0;
	for (uint32_t n = 1; n <= record->recent && time_ns - nth_last(record, n)->time_ns <= window_ns; n++) {
		const struct failure *failure = nth_last(record, n);
		if (!is_confined(failure->kind) || (tenant != 0 && failure->tenant != 0 && failure->tenant != tenant))
			return false;
		tenant = failure->tenant != 0 ? failure->tenant : tenant;
	}
	return true;
}

struct others {
	uint64_t tenant;
	bool found;
};

static void look_at(struct tenant *tenant, void *argument)
{
	struct others *others = argument;
	others->found = others->found || (atomic_load_explicit(&tenant->sessions, memory_order_relaxed) != 0 && tenant_number(tenant->name) != others->tenant);
}

/* Another tenant than the one that this record's newest failure was for has sessions. */
static bool others_are_there(const struct containment *containment, const struct record *record)
{
	struct others others = {.tenant = nth_last(record, 1)->tenant};
	tenants_walk(containment->tenants, look_at, &others);
	return others.found;
}

/* ---- Too many ---- */

/* Whether the newest failure is one too many, were it anybody's. */
static bool is_enough(const struct record *record, uint32_t limit, uint64_t window_ns, uint64_t time_ns)
{
	if (limit == 0)
		return false;
	if (time_ns < record->trial_until_ns)
		return true;
	if (record->total < limit || record->recent < limit)
		return false;
	return time_ns - nth_last(record, limit)->time_ns <= window_ns;
}

static void count(struct record *record, failure_kind kind, uint64_t tenant, uint64_t time_ns)
{
	record->counts[kind]++;
	record->ring[record->total++ % QUARANTINE_FAILURES_MAX] = (struct failure){time_ns, tenant, kind};
	record->recent += record->recent < QUARANTINE_FAILURES_MAX;
}

/* Under the mutex; the log line comes when the registry has it. */
static void take_out(const struct containment *containment, struct record *record, uint64_t time_ns)
{
	record->doublings = time_ns < record->trial_until_ns ? record->doublings + (record->doublings < COOLDOWN_DOUBLINGS) : 0;
	record->out_until_ns = time_ns + ((containment->rules.cooldown_us * 1000) << record->doublings);
	record->trial_until_ns = 0;
	record->recent = 0;
	record->pending = true;
}

static const char *op_name(const struct containment *containment, const struct record *record)
{
	return record->impl == NULL ? "*" : registry_op_name(containment->registry, record->impl);
}

/* Under the mutex. The registry isn't waited for: a module may be opening, for long, and the caller may be the loop. */
static void tell(struct containment *containment, struct record *record)
{
	char reason[200] = "";
	const bool out = record->out_until_ns != 0;
	describe(record, reason, sizeof reason);
	record->pending = !registry_try_quarantine(containment->registry, record->provider, record->impl, out ? reason : NULL);
	if (record->pending)
		return;
	if (out)
		LOG(containment->log, LOG_ERROR, "provider quarantined", LOG_STR("provider", record->provider->name), LOG_STR("op", op_name(containment, record)),
		    LOG_STR("reason", reason), LOG_UINT("cooldown_us", containment->rules.cooldown_us << record->doublings));
	else
		LOG(containment->log, LOG_WARN, record->trial_until_ns != 0 ? "provider on trial after its quarantine" : "provider restored",
		    LOG_STR("provider", record->provider->name), LOG_STR("op", op_name(containment, record)));
}

static void log_kept(const struct containment *containment, const struct record *record, const char *tenant)
{
	static struct log_limit limit;
	uint32_t suppressed;
	char reason[200];
	if (!log_limit_take(&limit, 5, &suppressed))
		return;
	describe(record, reason, sizeof reason);
	LOG(containment->log, LOG_WARN, "provider fails for one tenant only, and stays", LOG_STR("provider", record->provider->name), LOG_STR("op", op_name(containment, record)),
	    LOG_STR("tenant", tenant == NULL ? "" : tenant), LOG_STR("reason", reason), LOG_UINT("suppressed", suppressed));
}

/* Under the mutex. */
static void failed(struct containment *containment, const struct provider *provider, const struct impl *impl, failure_kind kind, const char *tenant, uint32_t limit,
                   uint64_t time_ns)
{
	const uint64_t window_ns = containment->rules.window_us * 1000;
	struct record *record = record_of(containment, provider, impl);
	if (record == NULL)
		return;
	count(record, kind, tenant_number(tenant), time_ns);
	/* Requests of older snapshots may still fail while it is out. */
	if (record->out_until_ns != 0 || provider->index == 0 || !is_enough(record, limit, window_ns, time_ns))
		return;
	const bool one = is_one_tenants(record, window_ns, time_ns);
	if (one && others_are_there(containment, record)) {
		log_kept(containment, record, tenant);
		return;
	}
	record->alone = one;
	take_out(containment, record, time_ns);
	tell(containment, record);
}

void containment_provider_failed(struct containment *containment, const struct provider *provider, failure_kind kind, const char *tenant)
{
	(void)atomic_fetch_add_explicit(&containment->failures[provider->index], 1, memory_order_relaxed);
	(void)pthread_mutex_lock(&containment->mutex);
	failed(containment, provider, NULL, kind, tenant, containment->rules.provider_failures, clock_now_ns());
	(void)pthread_mutex_unlock(&containment->mutex);
}

void containment_failed(struct containment *containment, const struct impl *impl, failure_kind kind, const char *tenant)
{
	const uint64_t time_ns = clock_now_ns();
	const struct provider *provider = impl->provider;
	(void)atomic_fetch_add_explicit(&containment->failures[provider->index], 1, memory_order_relaxed);
	(void)pthread_mutex_lock(&containment->mutex);
	failed(containment, provider, impl, kind, tenant, containment->rules.failures, time_ns);
	failed(containment, provider, NULL, kind, tenant, containment->rules.provider_failures, time_ns);
	(void)pthread_mutex_unlock(&containment->mutex);
}

void containment_note(struct containment *containment, const struct impl *impl, opd_status status, const char *tenant)
{
	if (impl->provider->isolated) /* its workers' side has told already, and of what kind it was */
		return;
	if (status == OPD_INTERNAL || status == OPD_UNKNOWN || status == OPD_DATA_LOSS)
		containment_failed(containment, impl, FAILURE_KERNEL, tenant);
}

/* ---- On the loop ---- */

void containment_ran_on_loop(struct containment *containment, const struct impl *impl, uint64_t cpu_ns)
{
	_Atomic uint8_t *strikes = &containment->loop_strikes[impl->index];
	const uint8_t before = atomic_load_explicit(strikes, memory_order_relaxed);
	const bool slow = cpu_ns >= LOOP_KERNEL_NS;
	if (before == LOOP_STRIKES || (before == 0 && !slow))
		return;
	atomic_store_explicit(strikes, slow ? (uint8_t)(before + 1) : 0, memory_order_relaxed);
	if (slow && before + 1 == LOOP_STRIKES)
		LOG(containment->log, LOG_WARN, "kernel too slow for the loop, it runs on the lane from now on", LOG_STR("provider", impl->provider->name),
		    LOG_STR("op", registry_op_name(containment->registry, impl)), LOG_UINT("cpu_us", cpu_ns / 1000));
}

bool containment_off_loop(const struct containment *containment, const struct impl *impl)
{
	return atomic_load_explicit(&containment->loop_strikes[impl->index], memory_order_relaxed) == LOOP_STRIKES;
}

bool containment_suspects(const struct containment *containment, const struct impl *impl)
{
	return atomic_load_explicit(&containment->loop_strikes[impl->index], memory_order_relaxed) != 0;
}

/* ---- The way back ---- */

static bool comes_back(const struct containment *containment, const struct record *record, uint64_t time_ns)
{
	if (record->out_until_ns == 0 || record->pending)
		return false;
	return record->out_until_ns <= time_ns || (record->alone && others_are_there(containment, record));
}

void containment_tick(struct containment *containment, uint64_t time_ns)
{
	(void)pthread_mutex_lock(&containment->mutex);
	for (struct record *record = containment->records; record != NULL; record = record->next) {
		if (comes_back(containment, record, time_ns)) {
			record->out_until_ns = 0;
			record->trial_until_ns = time_ns + containment->rules.window_us * 1000;
			record->pending = true;
		}
		if (record->pending)
			tell(containment, record);
	}
	(void)pthread_mutex_unlock(&containment->mutex);
}

static void restore(struct containment *containment, struct record *record)
{
	memset(record->counts, 0, sizeof record->counts);
	record->recent = 0;
	record->doublings = 0;
	record->trial_until_ns = 0;
	record->out_until_ns = 0;
	tell(containment, record);
}

opd_status containment_restore(struct containment *containment, const struct snapshot *snapshot, struct msg_text provider, struct msg_text op,
                               opd_error *error)
{
	const struct provider *known = provider.data == NULL ? NULL : snapshot_provider(snapshot, provider.data, provider.bytes);
	const struct op *wanted = op.bytes == 0 ? NULL : snapshot_find_op(snapshot, op, error);
	uint32_t restored = 0;
	if (known == NULL)
		return opd_fail(error, OPD_NOT_FOUND, "restore: no provider \"%.64s\"", provider.data == NULL ? "" : provider.data);
	if (op.bytes != 0 && wanted == NULL)
		return OPD_NOT_FOUND;
	(void)pthread_mutex_lock(&containment->mutex);
	for (struct record *record = containment->records; record != NULL; record = record->next) {
		if (record->provider != known || record->out_until_ns == 0)
			continue;
		if (wanted != NULL && record->impl != NULL && record->impl->op_index != wanted->index)
			continue;
		restore(containment, record);
		restored++;
	}
	(void)pthread_mutex_unlock(&containment->mutex);
	if (restored != 0)
		return OPD_OK;
	return opd_fail(error, OPD_FAILED_PRECONDITION, "restore: nothing of %s is quarantined%s%s", known->name, wanted == NULL ? "" : " for ",
	                wanted == NULL ? "" : wanted->schema->name);
}

uint64_t containment_failures(struct containment *containment, const struct provider *provider)
{
	return atomic_load_explicit(&containment->failures[provider->index], memory_order_relaxed);
}
