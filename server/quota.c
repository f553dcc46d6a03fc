#include "server/quota.h"

#include <inttypes.h>
#include <stddef.h>
#include <string.h>

#define SECOND_NS 1000000000u

static const char *const names[QUOTA_COUNT] = {"sessions",  "in_flight", "queued",        "bytes_in",
                                               "bytes_out", "memory",    "device_memory", "device_time"};

const char *quota_name(uint32_t kind)
{
	return kind < QUOTA_COUNT ? names[kind] : NULL;
}

quota_kind quota_parse(const char *name)
{
	uint32_t kind = 0;
	while (kind < QUOTA_COUNT && strcmp(names[kind], name) != 0)
		kind++;
	return (quota_kind)kind;
}

void quota_count_refusal(struct quota *quota, quota_kind kind)
{
	(void)atomic_fetch_add_explicit(&quota->refused[kind], 1, memory_order_relaxed);
}

opd_status quota_check(quota_kind kind, uint64_t limit, opd_error *error)
{
	const bool number = kind == QUOTA_SESSIONS || kind == QUOTA_IN_FLIGHT || kind == QUOTA_QUEUED;
	if (number && limit > QUOTA_NUMBER_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "quota %s: limit %" PRIu64 ", expected 0 to %u", names[kind], limit, QUOTA_NUMBER_MAX);
	if (kind == QUOTA_DEVICE_TIME && limit != 0 && (limit < QUOTA_RATE_MIN_NS || limit > QUOTA_RATE_MAX_NS))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "quota %s: limit %" PRIu64 " ns, expected 1ms to 1024s (of device time, each second), or 0 for any", names[kind], limit);
	return OPD_OK;
}

static bool refuse(struct quota *quota, bool of_tenant, quota_kind kind, uint64_t used, uint64_t wait_ns, struct quota_refusal *refusal_out)
{
	quota_count_refusal(quota, kind);
	*refusal_out = (struct quota_refusal){kind, of_tenant, used, quota_limit(quota, kind), wait_ns};
	return false;
}

/* ---- Rates ---- */

/* What was sent before is paid for, but for a second's worth. The time until it is, else 0. */
static uint64_t debt_ns(const _Atomic uint64_t *paid, uint64_t now_ns)
{
	const uint64_t paid_ns = atomic_load_explicit(paid, memory_order_relaxed);
	return paid_ns > now_ns + SECOND_NS ? paid_ns - now_ns - SECOND_NS : 0;
}

static void pay(_Atomic uint64_t *paid, uint64_t rate, uint64_t bytes, uint64_t now_ns)
{
	const double cost_ns = (double)bytes * SECOND_NS / (double)rate;
	const uint64_t cost = cost_ns < 1e15 ? (uint64_t)cost_ns : (uint64_t)1e15; /* eleven days: what nobody sends */
	uint64_t seen = atomic_load_explicit(paid, memory_order_relaxed);
	uint64_t from;
	do
		from = seen > now_ns ? seen : now_ns;
	while (!atomic_compare_exchange_weak_explicit(paid, &seen, from + cost, memory_order_relaxed, memory_order_relaxed));
}

static bool may_send(struct quota *quota, bool of_tenant, uint64_t bytes, uint64_t now_ns, struct quota_refusal *refusal_out)
{
	const uint64_t in_ns = quota_limit(quota, QUOTA_BYTES_IN) == 0 ? 0 : debt_ns(&quota->in_paid_ns, now_ns);
	if (in_ns != 0)
		return refuse(quota, of_tenant, QUOTA_BYTES_IN, bytes, in_ns, refusal_out);
	const uint64_t out_ns = quota_limit(quota, QUOTA_BYTES_OUT) == 0 ? 0 : debt_ns(&quota->out_paid_ns, now_ns);
	return out_ns == 0 || refuse(quota, of_tenant, QUOTA_BYTES_OUT, 0, out_ns, refusal_out);
}

static void count_in(struct quota *quota, bool of_tenant, uint64_t bytes, uint64_t now_ns)
{
	const uint64_t rate = quota_limit(quota, QUOTA_BYTES_IN);
	tally_add(&quota->bytes_in, bytes, of_tenant);
	if (rate != 0)
		pay(&quota->in_paid_ns, rate, bytes, now_ns);
}

static void count_out(struct quota *quota, bool of_tenant, uint64_t bytes, uint64_t now_ns)
{
	const uint64_t rate = quota_limit(quota, QUOTA_BYTES_OUT);
	tally_add(&quota->bytes_out, bytes, of_tenant);
	if (rate != 0)
		pay(&quota->out_paid_ns, rate, bytes, now_ns);
}

/* ---- In flight ---- */

/* Counted first: of two at once at most one is the last that may. */
static bool enter(struct quota *quota, bool of_tenant, struct quota_refusal *refusal_out)
{
	const uint64_t limit = quota_limit(quota, QUOTA_IN_FLIGHT);
	uint64_t before = tally_get(&quota->in_flight);
	if (of_tenant)
		before = atomic_fetch_add_explicit(&quota->in_flight, 1, memory_order_relaxed);
	else
		tally_add(&quota->in_flight, 1, false);
	if (limit == 0 || before < limit)
		return true;
	tally_add(&quota->in_flight, UINT64_MAX, of_tenant);
	return refuse(quota, of_tenant, QUOTA_IN_FLIGHT, before, 0, refusal_out);
}

static void leave(struct quota *quota, bool of_tenant)
{
	tally_add(&quota->in_flight, UINT64_MAX, of_tenant); /* one less */
}

bool quota_enter(struct quota *session, struct quota *tenant, uint64_t bytes, uint64_t now_ns, struct quota_refusal *refusal_out)
{
	if (!enter(session, false, refusal_out))
		return false;
	if (!enter(tenant, true, refusal_out)) {
		leave(session, false);
		return false;
	}
	if (!may_send(session, false, bytes, now_ns, refusal_out) || !may_send(tenant, true, bytes, now_ns, refusal_out)) {
		quota_leave(session, tenant);
		return false;
	}
	count_in(session, false, bytes, now_ns);
	count_in(tenant, true, bytes, now_ns);
	return true;
}

void quota_leave(struct quota *session, struct quota *tenant)
{
	leave(session, false);
	leave(tenant, true);
}

void quota_send(struct quota *session, struct quota *tenant, uint64_t bytes, uint64_t now_ns)
{
	count_out(session, false, bytes, now_ns);
	count_out(tenant, true, bytes, now_ns);
}
