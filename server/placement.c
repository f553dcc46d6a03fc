#include "server/placement.h"

#include <stdlib.h>
#include <string.h>

#include "server/daemon.h"
#include "server/request.h"

/* Costs are kept by powers of four of the bytes: within a class they differ less than from run to run on a shared machine. */
#define SIZES 16u
#define BELIEVED_S 60u
/* Of a new measurement, in what is believed. */
#define STEP_SHIFT 2u

/* A cost and when it was last confirmed, in one word so that nobody reads half of it. */
#define COST_BITS 40u
#define COST_MAX ((UINT64_C(1) << COST_BITS) - 1)
#define STAMP_MASK ((UINT64_C(1) << (64u - COST_BITS)) - 1)

struct placement_impl {
	_Atomic uint64_t costs[REGISTRY_DEVICES_MAX][SIZES]; /* 0: never run; no cost with a stamp: run once */
};

struct placement {
	_Atomic(struct placement_impl *) impls[REGISTRY_IMPLS_MAX]; /* by impl->index; NULL: nothing yet */
};

struct placement *placement_create(void)
{
	return calloc(1, sizeof(struct placement));
}

void placement_destroy(struct placement *placement)
{
	for (uint32_t i = 0; placement != NULL && i < REGISTRY_IMPLS_MAX; i++)
		free(atomic_load_explicit(&placement->impls[i], memory_order_relaxed));
	free(placement);
}

/* ---- Costs ---- */

static uint32_t size_of(uint64_t bytes)
{
	const uint32_t log = bytes == 0 ? 0 : 63u - (uint32_t)__builtin_clzll(bytes);
	const uint32_t size = log < 8 ? 0 : (log - 8) / 2; /* below 1 KiB they are one */
	return size < SIZES ? size : SIZES - 1;
}

/* Seconds, never 0: that is "never". */
static uint64_t stamp(uint64_t now_ns)
{
	return (now_ns / 1000000000u + 1) & STAMP_MASK;
}

static uint64_t pack(uint64_t cost_ns, uint64_t now_ns)
{
	return stamp(now_ns) << COST_BITS | (cost_ns < COST_MAX ? cost_ns : COST_MAX);
}

static bool believed(uint64_t packed, uint64_t now_ns)
{
	return packed != 0 && ((stamp(now_ns) - (packed >> COST_BITS)) & STAMP_MASK) <= BELIEVED_S;
}

/* Made when it first runs on a device; NULL: out of memory, and nothing is known. */
static struct placement_impl *impl_of(struct placement *placement, const struct impl *impl)
{
	struct placement_impl *mine = atomic_load_explicit(&placement->impls[impl->index], memory_order_acquire);
	if (mine != NULL)
		return mine;
	struct placement_impl *made = calloc(1, sizeof *made);
	if (made == NULL)
		return NULL;
	if (atomic_compare_exchange_strong_explicit(&placement->impls[impl->index], &mine, made, memory_order_acq_rel, memory_order_acquire))
		return made;
	free(made); /* another thread was faster */
	return mine;
}

void placement_note(struct placement *placement, const struct impl *impl, uint32_t device, uint64_t bytes, uint64_t device_ns, uint64_t now_ns)
{
	struct placement_impl *mine = impl_of(placement, impl);
	if (mine == NULL)
		return;
	_Atomic uint64_t *cost = &mine->costs[device][size_of(bytes)];
	const uint64_t before = atomic_load_explicit(cost, memory_order_relaxed);
	const uint64_t known_ns = before & COST_MAX;
	uint64_t now_known_ns = device_ns == 0 ? 1 : device_ns;
	if (before == 0)
		now_known_ns = 0;
	else if (known_ns != 0 && believed(before, now_ns))
		now_known_ns = known_ns - (known_ns >> STEP_SHIFT) + (now_known_ns >> STEP_SHIFT) + 1;
	atomic_store_explicit(cost, pack(now_known_ns, now_ns), memory_order_relaxed); /* of two at once one is lost, which costs nothing but itself */
}

uint64_t placement_cost_ns(const struct placement *placement, const struct impl *impl, uint32_t device, uint64_t bytes, uint64_t now_ns)
{
	const struct placement_impl *mine = atomic_load_explicit(&placement->impls[impl->index], memory_order_acquire);
	const uint64_t packed = mine == NULL ? 0 : atomic_load_explicit(&mine->costs[device][size_of(bytes)], memory_order_relaxed);
	return believed(packed, now_ns) ? packed & COST_MAX : 0;
}

/* ---- Choosing ---- */

struct choice {
	struct server *server;
	const struct snapshot *snapshot;
	struct session *session;
	const struct placement_wish *wish;
	struct device_filter filter;
	bool stuck_too; /* also devices in a kernel that exceeds its budget */
	uint32_t only; /* the device that the session has pinned; 0: none of this kind */
	uint64_t now_ns;
};

static bool is_stuck(const struct choice *choice, uint32_t number)
{
	const struct device_lane *lane = device_lane_started(choice->server, number);
	return lane != NULL && device_lane_is_stuck(lane);
}

static bool may(const struct choice *choice, uint32_t number)
{
	const struct device *device = &choice->snapshot->devices[number];
	const struct device_filter *filter = &choice->filter;
	return device->lost == NULL && (choice->only == 0 || choice->only == number) && strlen(device->kind) == filter->kind_bytes &&
	       memcmp(device->kind, filter->kind, filter->kind_bytes) == 0 && (filter->ordinal < 0 || device->ordinal == (uint64_t)filter->ordinal);
}

/* A pin of another kind, or of a device that is lost, says nothing. */
static uint32_t pinned(struct choice *choice)
{
	const uint32_t number = choice->session == NULL ? 0 : atomic_load_explicit(&choice->session->pinned_device, memory_order_relaxed);
	return number != 0 && number < choice->snapshot->device_count && may(choice, number) ? number : 0;
}

/* The least that it costs anywhere; 0: measured nowhere. */
static uint64_t least_cost(const struct choice *choice)
{
	const struct placement_wish *wish = choice->wish;
	uint64_t least_ns = 0;
	for (uint32_t i = 1; i < choice->snapshot->device_count; i++) {
		const uint64_t cost_ns = placement_cost_ns(choice->server->placement, wish->impl, i, wish->bytes, choice->now_ns);
		if (cost_ns != 0 && (least_ns == 0 || cost_ns < least_ns))
			least_ns = cost_ns;
	}
	return least_ns;
}

static uint64_t cost_on(const struct choice *choice, uint32_t number)
{
	const struct placement_wish *wish = choice->wish;
	uint64_t cost_ns = wish->impl == NULL ? 0 : placement_cost_ns(choice->server->placement, wish->impl, number, wish->bytes, choice->now_ns);
	if (cost_ns == 0 && wish->impl != NULL)
		cost_ns = least_cost(choice);
	if (cost_ns == 0)
		cost_ns = wish->estimate_ns;
	return cost_ns != 0 ? cost_ns : SCHED_ESTIMATE_DEFAULT_NS;
}

/* When it would be done there, from now. */
static uint64_t finish_ns(const struct choice *choice, uint32_t number)
{
	return device_lane_finish_ns(choice->server, number, session_find_flow(choice->session, number), choice->wish->class, cost_on(choice, number), choice->now_ns);
}

/* Queues are looked at only where homes don't decide: one device, or one with more of the operands, is chosen without a lock. */
static uint32_t first_done(const struct choice *choice)
{
	const struct placement_wish *wish = choice->wish;
	uint32_t best = 0;
	uint64_t best_home = 0;
	uint64_t best_ns = 0; /* 0: not asked yet */
	for (uint32_t i = 1; i < choice->snapshot->device_count; i++) {
		if (!may(choice, i) || (!choice->stuck_too && is_stuck(choice, i)))
			continue;
		const uint64_t home = wish->home_bytes == NULL ? 0 : wish->home_bytes(wish->what, i);
		if (best != 0 && home < best_home)
			continue;
		uint64_t ns = 0;
		if (best != 0 && home == best_home) {
			best_ns = best_ns == 0 ? finish_ns(choice, best) : best_ns;
			ns = finish_ns(choice, i);
			if (ns >= best_ns)
				continue;
		}
		best = i;
		best_home = home;
		best_ns = ns;
	}
	return best;
}

uint32_t placement_choose(struct server *server, const struct snapshot *snapshot, struct session *session, const struct placement_wish *wish)
{
	struct choice choice = {.server = server, .snapshot = snapshot, .session = session, .wish = wish, .now_ns = request_now_ns()};
	if (wish->device.bytes == 0 || device_filter_parse(wish->device, &choice.filter, NULL) != OPD_OK)
		choice.filter.ordinal = -1;
	if (wish->kind != NULL) {
		choice.filter.kind = wish->kind;
		choice.filter.kind_bytes = strlen(wish->kind);
	}
	if (choice.filter.ordinal < 0)
		choice.only = pinned(&choice);
	const uint32_t number = first_done(&choice);
	choice.stuck_too = true; /* rather one that says why than none */
	return number != 0 ? number : first_done(&choice);
}
