#include "server/metrics.h"

#include <stdlib.h>

struct metrics *metrics_create(bool shared)
{
	struct metrics *metrics = calloc(1, sizeof *metrics);
	if (metrics != NULL)
		metrics->shared = shared;
	return metrics;
}

void metrics_destroy(struct metrics *metrics)
{
	if (metrics == NULL)
		return;
	for (uint32_t i = 0; i < REGISTRY_IMPLS_MAX; i++)
		free(metrics->impls[i]);
	free(metrics);
}

/* Made when it first runs or is skipped; NULL: out of memory, and nothing is counted. */
static struct metrics_impl *impl_of(struct metrics *metrics, const struct impl *impl)
{
	if (impl == NULL)
		return &metrics->graphs;
	struct metrics_impl *mine = atomic_load_explicit(&metrics->impls[impl->index], memory_order_acquire);
	if (mine != NULL)
		return mine;
	struct metrics_impl *made = calloc(1, sizeof *made);
	if (made == NULL)
		return NULL;
	if (atomic_compare_exchange_strong_explicit(&metrics->impls[impl->index], &mine, made, memory_order_release, memory_order_acquire))
		return made;
	free(made); /* another direct caller was faster */
	return mine;
}

static void count_run(struct metrics *metrics, struct metrics_impl *mine, uint64_t device_ns, opd_status status)
{
	tally_add(&mine->runs, 1, metrics->shared);
	tally_add(&mine->device_ns, device_ns, metrics->shared);
	if (status != OPD_OK)
		tally_add(&mine->failures, 1, metrics->shared);
}

void metrics_ran(struct metrics *metrics, const struct impl *impl, uint64_t wait_ns, uint64_t device_ns, opd_status status)
{
	struct metrics_impl *mine = impl_of(metrics, impl);
	if (mine == NULL)
		return;
	count_run(metrics, mine, device_ns, status);
	histogram_add(&mine->kernel, device_ns, metrics->shared);
	histogram_add(&mine->wait, wait_ns, metrics->shared);
}

void metrics_ran_on_loop(struct metrics *metrics, const struct impl *impl, uint64_t estimate_ns, opd_status status)
{
	struct metrics_impl *mine = impl_of(metrics, impl);
	if (mine == NULL)
		return;
	count_run(metrics, mine, estimate_ns, status);
	tally_add(&mine->on_loop, 1, metrics->shared);
}

void metrics_skipped(struct metrics *metrics, const struct dispatch *dispatch, uint32_t from)
{
	for (uint32_t i = from; i < dispatch->index && i < dispatch->count; i++) {
		struct metrics_impl *mine = impl_of(metrics, dispatch->effective->impls[i]);
		if (mine != NULL)
			tally_add(&mine->skips, 1, metrics->shared);
	}
}

/* Names that were dropped from the list come first: they are nobody's. */
void metrics_reasons(struct metrics *metrics, const struct dispatch *dispatch, const struct msg_skip *skips, uint32_t count)
{
	const struct effective *effective = dispatch->effective;
	for (uint32_t i = effective->skip_count; skips != NULL && i < count && i - effective->skip_count < effective->count; i++) {
		struct metrics_impl *mine = impl_of(metrics, effective->impls[i - effective->skip_count]);
		if (mine != NULL)
			tally_add(&mine->reasons[skips[i].code < METRICS_REASONS ? skips[i].code : 0], 1, metrics->shared);
	}
}

void metrics_replied(struct metrics *metrics, msg_request_kind kind, opd_status status)
{
	tally_add(&metrics->requests[kind], 1, metrics->shared);
	tally_add(&metrics->replies[(uint32_t)status < METRICS_STATUSES ? (uint32_t)status : (uint32_t)OPD_UNKNOWN], 1, metrics->shared);
}

void metrics_written(struct metrics *metrics, uint64_t ns)
{
	histogram_add(&metrics->latency, ns, metrics->shared);
}

void metrics_add_histogram(const struct histogram *from, struct histogram *sum)
{
	for (uint32_t i = 0; i < HISTOGRAM_BUCKETS; i++)
		tally_add(&sum->counts[i], tally_get(&from->counts[i]), false);
	tally_add(&sum->sum_ns, tally_get(&from->sum_ns), false);
}

void metrics_add_impl(const struct metrics_impl *from, struct metrics_impl *sum)
{
	tally_add(&sum->runs, tally_get(&from->runs), false);
	tally_add(&sum->failures, tally_get(&from->failures), false);
	tally_add(&sum->on_loop, tally_get(&from->on_loop), false);
	tally_add(&sum->device_ns, tally_get(&from->device_ns), false);
	tally_add(&sum->skips, tally_get(&from->skips), false);
	for (uint32_t i = 0; i < METRICS_REASONS; i++)
		tally_add(&sum->reasons[i], tally_get(&from->reasons[i]), false);
	metrics_add_histogram(&from->kernel, &sum->kernel);
	metrics_add_histogram(&from->wait, &sum->wait);
}
