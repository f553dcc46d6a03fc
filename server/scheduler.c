#include "server/scheduler.h"

#include <assert.h>
#include <string.h>

#define GROUP_OF(heap_node, class) \
	((struct sched_group *)(void *)((char *)(heap_node) - offsetof(struct sched_group, classes) - (class) * sizeof(struct sched_group_class)))
#define FLOW_OF(heap_node, class) \
	((struct sched_flow *)(void *)((char *)(heap_node) - offsetof(struct sched_flow, classes) - (class) * sizeof(struct sched_flow_class)))
#define THROTTLED_GROUP_OF(heap_node) ((struct sched_group *)(void *)((char *)(heap_node) - offsetof(struct sched_group, bucket.throttled)))
#define THROTTLED_FLOW_OF(heap_node) ((struct sched_flow *)(void *)((char *)(heap_node) - offsetof(struct sched_flow, bucket.throttled)))

/* Weight of a new measurement in a flow's mean. */
#define MEAN_STEP 0.125

static const char *const class_names[CLASS_COUNT] = {"realtime", "interactive", "batch"};

const char *sched_class_name(uint32_t class)
{
	return class < CLASS_COUNT ? class_names[class] : NULL;
}

sched_class sched_class_parse(const char *name, uint64_t bytes)
{
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		if (strlen(class_names[i]) == bytes && memcmp(class_names[i], name, bytes) == 0)
			return (sched_class)i;
	return CLASS_COUNT;
}

void scheduler_init(struct scheduler *scheduler)
{
	*scheduler = (struct scheduler){.servers = 1, .min_share = {[CLASS_INTERACTIVE] = 0.1, [CLASS_BATCH] = 0.05}};
}

void sched_group_init(struct sched_group *group, uint32_t weight)
{
	*group = (struct sched_group){.weight = weight};
}

void sched_flow_init(struct sched_flow *flow, struct sched_group *group, uint32_t weight)
{
	*flow = (struct sched_flow){.group = group, .weight = weight};
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		flow->classes[i].tail = &flow->classes[i].head;
}

/* ---- Levels ---- */

/* Somebody begins to wait: not before the time of who was served last. */
static void level_join(struct sched_level *level, struct heap_node *node, uint32_t weight)
{
	if (node->key < level->virtual_ns)
		node->key = level->virtual_ns;
	heap_insert(&level->waiting, node);
	level->weight += weight;
}

static void level_leave(struct sched_level *level, struct heap_node *node, uint32_t weight)
{
	heap_remove(&level->waiting, node);
	level->weight -= weight;
}

/* It has had `ns` of device time (less than nothing: a correction). */
static void level_charge(struct sched_level *level, struct heap_node *node, uint32_t weight, double ns)
{
	double key = node->key + ns / weight;
	if (heap_has(node))
		heap_move(&level->waiting, node, key);
	else
		node->key = key;
}

static void level_serve(struct sched_level *level, const struct heap_node *node)
{
	if (node->key > level->virtual_ns)
		level->virtual_ns = node->key;
}

/* ---- Rates ---- */

static void bucket_fill(struct sched_bucket *bucket, uint64_t now_ns)
{
	if (now_ns <= bucket->filled_ns)
		return;
	bucket->tokens_ns += (double)(now_ns - bucket->filled_ns) * (double)bucket->rate_ns / 1e9;
	if (bucket->tokens_ns > (double)bucket->rate_ns)
		bucket->tokens_ns = (double)bucket->rate_ns;
	bucket->filled_ns = now_ns;
}

static void bucket_set_rate(struct sched_bucket *bucket, uint64_t rate_ns, uint64_t now_ns)
{
	bucket->rate_ns = rate_ns;
	bucket->tokens_ns = (double)rate_ns;
	bucket->filled_ns = now_ns;
}

/* When it holds something again. A little more than nothing, so that it isn't asked for each job. */
static double bucket_ready_ns(const struct sched_bucket *bucket)
{
	const double missing = 1000.0 - bucket->tokens_ns;
	return (double)bucket->filled_ns + missing * 1e9 / (double)bucket->rate_ns;
}

static bool bucket_empty(const struct scheduler *scheduler, const struct sched_bucket *bucket)
{
	return bucket->rate_ns != 0 && bucket->tokens_ns < 0 && !scheduler->rates_forgotten;
}

static bool bucket_throttles(const struct sched_bucket *bucket)
{
	return heap_has(&bucket->throttled);
}

/* The group's waiting flows join or leave the competition. */
static void group_join(struct scheduler *scheduler, struct sched_group *group, uint32_t class)
{
	struct sched_group_class *in = &group->classes[class];
	if (!heap_has(&in->node) && in->flows.waiting.first != NULL && !bucket_throttles(&group->bucket))
		level_join(&scheduler->classes[class], &in->node, group->weight);
}

static void group_leave(struct scheduler *scheduler, struct sched_group *group, uint32_t class)
{
	if (heap_has(&group->classes[class].node))
		level_leave(&scheduler->classes[class], &group->classes[class].node, group->weight);
}

/* The flow's queue joins or leaves its group's. */
static void flow_join(struct scheduler *scheduler, struct sched_flow *flow, uint32_t class)
{
	struct sched_flow_class *queue = &flow->classes[class];
	if (heap_has(&queue->node) || queue->head == NULL || bucket_throttles(&flow->bucket))
		return;
	level_join(&flow->group->classes[class].flows, &queue->node, flow->weight);
	group_join(scheduler, flow->group, class);
}

static void flow_leave(struct scheduler *scheduler, struct sched_flow *flow, uint32_t class)
{
	struct sched_group *group = flow->group;
	if (!heap_has(&flow->classes[class].node))
		return;
	level_leave(&group->classes[class].flows, &flow->classes[class].node, flow->weight);
	if (group->classes[class].flows.waiting.first == NULL)
		group_leave(scheduler, group, class);
}

/* Only who has something queued is throttled: who has nothing may go at any time. */
static void throttle_group(struct scheduler *scheduler, struct sched_group *group)
{
	if (group->queued == 0 || bucket_throttles(&group->bucket) || !bucket_empty(scheduler, &group->bucket))
		return;
	heap_move(&scheduler->throttled_groups, &group->bucket.throttled, bucket_ready_ns(&group->bucket));
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		group_leave(scheduler, group, i);
}

static void throttle_flow(struct scheduler *scheduler, struct sched_flow *flow)
{
	if (flow->queued == 0 || bucket_throttles(&flow->bucket) || !bucket_empty(scheduler, &flow->bucket))
		return;
	heap_move(&scheduler->throttled_flows, &flow->bucket.throttled, bucket_ready_ns(&flow->bucket));
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		flow_leave(scheduler, flow, i);
}

static void unthrottle_group(struct scheduler *scheduler, struct sched_group *group)
{
	heap_remove(&scheduler->throttled_groups, &group->bucket.throttled);
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		group_join(scheduler, group, i);
}

static void unthrottle_flow(struct scheduler *scheduler, struct sched_flow *flow)
{
	heap_remove(&scheduler->throttled_flows, &flow->bucket.throttled);
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		flow_join(scheduler, flow, i);
}

static bool is_due(const struct heap *throttled, uint64_t now_ns)
{
	return throttled->first != NULL && throttled->first->key <= (double)now_ns;
}

/* What was running meanwhile may have taken more: then it waits on. */
static void release_throttled(struct scheduler *scheduler, uint64_t now_ns)
{
	while (is_due(&scheduler->throttled_groups, now_ns)) {
		struct sched_group *group = THROTTLED_GROUP_OF(scheduler->throttled_groups.first);
		bucket_fill(&group->bucket, now_ns);
		unthrottle_group(scheduler, group);
		throttle_group(scheduler, group);
	}
	while (is_due(&scheduler->throttled_flows, now_ns)) {
		struct sched_flow *flow = THROTTLED_FLOW_OF(scheduler->throttled_flows.first);
		bucket_fill(&flow->bucket, now_ns);
		unthrottle_flow(scheduler, flow);
		throttle_flow(scheduler, flow);
	}
}

/* ---- Weights ---- */

void sched_group_set_weight(struct scheduler *scheduler, struct sched_group *group, uint32_t weight)
{
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		if (heap_has(&group->classes[i].node))
			scheduler->classes[i].weight += (uint64_t)weight - group->weight;
	group->weight = weight;
}

void sched_flow_set_weight(struct sched_flow *flow, uint32_t weight)
{
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		if (heap_has(&flow->classes[i].node))
			flow->group->classes[i].flows.weight += (uint64_t)weight - flow->weight;
	flow->weight = weight;
}

void sched_group_set_rate(struct scheduler *scheduler, struct sched_group *group, uint64_t rate_ns, uint64_t now_ns)
{
	bucket_set_rate(&group->bucket, rate_ns, now_ns);
	if (bucket_throttles(&group->bucket))
		unthrottle_group(scheduler, group);
}

void sched_flow_set_rate(struct scheduler *scheduler, struct sched_flow *flow, uint64_t rate_ns, uint64_t now_ns)
{
	bucket_set_rate(&flow->bucket, rate_ns, now_ns);
	if (bucket_throttles(&flow->bucket))
		unthrottle_flow(scheduler, flow);
}

void scheduler_forget_rates(struct scheduler *scheduler)
{
	scheduler->rates_forgotten = true;
	while (scheduler->throttled_groups.first != NULL)
		unthrottle_group(scheduler, THROTTLED_GROUP_OF(scheduler->throttled_groups.first));
	while (scheduler->throttled_flows.first != NULL)
		unthrottle_flow(scheduler, THROTTLED_FLOW_OF(scheduler->throttled_flows.first));
}

/* ---- Queueing ---- */

static uint64_t estimate(const struct sched_item *item)
{
	if (item->estimate_ns != 0)
		return item->estimate_ns < SCHED_ESTIMATE_MAX_NS ? item->estimate_ns : SCHED_ESTIMATE_MAX_NS;
	return item->flow->mean_ns > 0 ? (uint64_t)item->flow->mean_ns + 1 : SCHED_ESTIMATE_DEFAULT_NS;
}

static void count(struct scheduler *scheduler, const struct sched_item *item, int by)
{
	struct sched_flow *flow = item->flow;
	const uint64_t ns = by > 0 ? item->estimate_ns : 0 - item->estimate_ns;
	scheduler->queued += (uint32_t)by;
	scheduler->waiting[item->class] += (uint32_t)by;
	flow->queued += (uint32_t)by;
	flow->group->queued += (uint32_t)by;
	scheduler->queued_ns += ns;
	scheduler->waiting_ns[item->class] += ns;
	flow->queued_ns += ns;
	flow->group->queued_ns += ns;
}

static bool is_full(uint32_t queued, uint32_t limit, uint32_t *queued_out, uint32_t *limit_out)
{
	*queued_out = queued;
	*limit_out = limit;
	return limit != 0 && queued >= limit;
}

sched_full scheduler_full(const struct scheduler *scheduler, const struct sched_flow *flow, uint32_t *queued_out, uint32_t *limit_out)
{
	const struct sched_group *group = flow->group;
	if (is_full(flow->queued, flow->queue_max != 0 ? flow->queue_max : scheduler->flow_queue_max, queued_out, limit_out))
		return SCHED_FULL_FLOW;
	if (is_full(group->queued, group->queue_max, queued_out, limit_out))
		return SCHED_FULL_GROUP;
	return is_full(scheduler->queued, scheduler->queue_max, queued_out, limit_out) ? SCHED_FULL_LANE : SCHED_ROOM;
}

/* What was earned since the last job counts before it is known whether this one waits for its rate. */
static void check_rates(struct scheduler *scheduler, struct sched_flow *flow, uint64_t now_ns)
{
	if (flow->group->bucket.rate_ns != 0) {
		bucket_fill(&flow->group->bucket, now_ns);
		throttle_group(scheduler, flow->group);
	}
	if (flow->bucket.rate_ns != 0) {
		bucket_fill(&flow->bucket, now_ns);
		throttle_flow(scheduler, flow);
	}
}

/* ---- Whom one waits behind ---- */

static uint64_t all_picks(const struct scheduler *scheduler)
{
	return scheduler->picks[CLASS_REALTIME] + scheduler->picks[CLASS_INTERACTIVE] + scheduler->picks[CLASS_BATCH];
}

/* What has been so far, as the item's flow sees it. */
static struct sched_behind behind_now(const struct scheduler *scheduler, const struct sched_flow *flow)
{
	const struct sched_group *group = flow->group;
	struct sched_behind now = {
		.own_jobs = flow->picks,
		.group_jobs = group->picks - flow->picks,
		.other_jobs = all_picks(scheduler) - group->picks,
		.own_ns = flow->usage.device_ns,
		.group_ns = group->usage.device_ns - flow->usage.device_ns,
		.other_ns = scheduler->device_ns - group->usage.device_ns,
		.running = scheduler->running,
	};
	memcpy(now.class_jobs, scheduler->picks, sizeof now.class_jobs);
	return now;
}

/* Before the item itself counts. */
static void behind_settle(const struct scheduler *scheduler, const struct sched_flow *flow, struct sched_behind *behind)
{
	const struct sched_behind now = behind_now(scheduler, flow);
	behind->own_jobs = now.own_jobs - behind->own_jobs;
	behind->group_jobs = now.group_jobs - behind->group_jobs;
	behind->other_jobs = now.other_jobs - behind->other_jobs;
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		behind->class_jobs[i] = now.class_jobs[i] - behind->class_jobs[i];
	behind->own_ns = now.own_ns - behind->own_ns;
	behind->group_ns = now.group_ns - behind->group_ns;
	behind->other_ns = now.other_ns - behind->other_ns;
}

static void queue_last(struct sched_flow_class *queue, struct sched_item *item)
{
	item->next = NULL;
	item->link = queue->tail;
	*queue->tail = item;
	queue->tail = &item->next;
}

static void queue_first(struct sched_flow_class *queue, struct sched_item *item)
{
	item->next = queue->head;
	item->link = &queue->head;
	if (queue->head != NULL)
		queue->head->link = &item->next;
	else
		queue->tail = &item->next;
	queue->head = item;
}

static void enqueue(struct scheduler *scheduler, struct sched_item *item, uint64_t now_ns)
{
	struct sched_flow *flow = item->flow;
	item->estimate_ns = estimate(item);
	item->queued_ns = now_ns;
	(item->first ? queue_first : queue_last)(&flow->classes[item->class], item);
	count(scheduler, item, 1);
	check_rates(scheduler, flow, now_ns);
	flow_join(scheduler, flow, item->class);
}

bool scheduler_submit(struct scheduler *scheduler, struct sched_item *item, uint64_t now_ns)
{
	uint32_t queued, limit;
	if (!item->unbounded && scheduler_full(scheduler, item->flow, &queued, &limit) != SCHED_ROOM)
		return false;
	if (item->behind != NULL)
		*item->behind = behind_now(scheduler, item->flow);
	enqueue(scheduler, item, now_ns);
	return true;
}

void scheduler_resubmit(struct scheduler *scheduler, struct sched_item *item, uint64_t now_ns)
{
	item->behind = NULL;
	item->first = true;
	enqueue(scheduler, item, now_ns);
}

/* Nothing queued, nothing to wait for. */
static void forget_rates_of(struct scheduler *scheduler, struct sched_flow *flow)
{
	if (flow->queued == 0 && bucket_throttles(&flow->bucket))
		heap_remove(&scheduler->throttled_flows, &flow->bucket.throttled);
	if (flow->group->queued == 0 && bucket_throttles(&flow->group->bucket))
		heap_remove(&scheduler->throttled_groups, &flow->group->bucket.throttled);
}

/* Out of its queue; a flow, and a group, whose last item it was no longer waits. */
static void dequeue(struct scheduler *scheduler, struct sched_item *item)
{
	struct sched_flow *flow = item->flow;
	struct sched_flow_class *queue = &flow->classes[item->class];
	*item->link = item->next;
	if (item->next != NULL)
		item->next->link = item->link;
	else
		queue->tail = item->link;
	item->link = NULL;
	item->next = NULL;
	count(scheduler, item, -1);
	if (queue->head == NULL)
		flow_leave(scheduler, flow, item->class);
	forget_rates_of(scheduler, flow);
}

bool scheduler_withdraw(struct scheduler *scheduler, struct sched_item *item)
{
	if (item->link == NULL)
		return false;
	dequeue(scheduler, item);
	return true;
}

/* ---- Picking ---- */

static struct sched_item *next_of(const struct scheduler *scheduler, uint32_t class)
{
	const struct sched_group *group = GROUP_OF(scheduler->classes[class].waiting.first, class);
	const struct sched_flow *flow = FLOW_OF(group->classes[class].flows.waiting.first, class);
	return flow->classes[class].head;
}

/* The first class that waits, unless a lower one is owed its next job. CLASS_COUNT: nobody waits. */
static uint32_t choose_class(const struct scheduler *scheduler)
{
	uint32_t first = 0;
	while (first < CLASS_COUNT && scheduler->classes[first].waiting.first == NULL)
		first++;
	for (uint32_t i = first + 1; i < CLASS_COUNT; i++)
		if (scheduler->classes[i].waiting.first != NULL && scheduler->credit_ns[i] >= (double)next_of(scheduler, i)->estimate_ns)
			return i;
	return first;
}

/* What a class uses is owed in part to the lower ones that wait, and pays what it was owed. */
static void settle_credit(struct scheduler *scheduler, uint32_t class, double ns)
{
	double *own = &scheduler->credit_ns[class];
	if (ns > 0) /* an estimate that was too high gives no credit back: it could be more than was paid */
		*own = *own > ns ? *own - ns : 0;
	for (uint32_t i = class + 1; i < CLASS_COUNT; i++) {
		double *credit = &scheduler->credit_ns[i];
		if (scheduler->classes[i].waiting.first == NULL)
			continue;
		*credit += ns * scheduler->min_share[i];
		if (*credit > SCHED_CREDIT_MAX_NS)
			*credit = SCHED_CREDIT_MAX_NS;
		if (*credit < 0)
			*credit = 0;
	}
}

static void charge(struct scheduler *scheduler, struct sched_flow *flow, uint32_t class, double ns)
{
	struct sched_group *group = flow->group;
	level_charge(&group->classes[class].flows, &flow->classes[class].node, flow->weight, ns);
	level_charge(&scheduler->classes[class], &group->classes[class].node, group->weight, ns);
	settle_credit(scheduler, class, ns);
	if (group->bucket.rate_ns != 0) {
		group->bucket.tokens_ns -= ns;
		throttle_group(scheduler, group);
	}
	if (flow->bucket.rate_ns != 0) {
		flow->bucket.tokens_ns -= ns;
		throttle_flow(scheduler, flow);
	}
}

/* When the first of those that wait for their rates may go on; UINT64_MAX: nobody does. */
static uint64_t ready_ns(const struct scheduler *scheduler)
{
	const struct heap_node *group = scheduler->throttled_groups.first;
	const struct heap_node *flow = scheduler->throttled_flows.first;
	if (group == NULL && flow == NULL)
		return UINT64_MAX;
	const double key = group == NULL || (flow != NULL && flow->key < group->key) ? flow->key : group->key;
	return (uint64_t)key + 1;
}

/* It runs: whoever has a bucket pays, and those who ask learn whom it waited behind. */
static void begin(struct scheduler *scheduler, struct sched_item *item, uint64_t now_ns)
{
	struct sched_flow *flow = item->flow;
	struct sched_group *group = flow->group;
	dequeue(scheduler, item);
	if (group->bucket.rate_ns != 0)
		bucket_fill(&group->bucket, now_ns);
	if (flow->bucket.rate_ns != 0)
		bucket_fill(&flow->bucket, now_ns);
	charge(scheduler, flow, item->class, (double)item->estimate_ns);
	if (item->behind != NULL)
		behind_settle(scheduler, flow, item->behind);
	flow->picks++;
	group->picks++;
	scheduler->picks[item->class]++;
	flow->running++;
	group->running++;
	scheduler->running++;
	const uint64_t waited = now_ns > item->queued_ns ? now_ns - item->queued_ns : 0;
	flow->usage.wait_ns += waited;
	group->usage.wait_ns += waited;
	if (waited > flow->usage.wait_max_ns)
		flow->usage.wait_max_ns = waited;
	if (waited > group->usage.wait_max_ns)
		group->usage.wait_max_ns = waited;
}

struct sched_item *scheduler_pick(struct scheduler *scheduler, uint64_t now_ns, uint64_t *ready_ns_out)
{
	release_throttled(scheduler, now_ns);
	const uint32_t class = choose_class(scheduler);
	if (class == CLASS_COUNT) {
		*ready_ns_out = ready_ns(scheduler);
		return NULL;
	}
	struct sched_item *item = next_of(scheduler, class);
	struct sched_flow *flow = item->flow;
	level_serve(&scheduler->classes[class], &flow->group->classes[class].node);
	level_serve(&flow->group->classes[class].flows, &flow->classes[class].node);
	begin(scheduler, item, now_ns);
	return item;
}

/* It isn't its turn: where newcomers start stays where it was. */
bool scheduler_take(struct scheduler *scheduler, struct sched_item *item, uint64_t now_ns)
{
	if (bucket_throttles(&item->flow->bucket) || bucket_throttles(&item->flow->group->bucket))
		return false;
	begin(scheduler, item, now_ns);
	return true;
}

bool scheduler_runnable(const struct scheduler *scheduler)
{
	bool any = false;
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		any = any || scheduler->classes[i].waiting.first != NULL;
	return any;
}

static void record(struct scheduler *scheduler, struct sched_flow *flow, uint64_t device_ns)
{
	scheduler->device_ns += device_ns;
	flow->usage.jobs++;
	flow->usage.device_ns += device_ns;
	flow->group->usage.jobs++;
	flow->group->usage.device_ns += device_ns;
}

void scheduler_complete(struct scheduler *scheduler, struct sched_flow *flow, sched_class class, uint64_t estimate_ns, uint64_t device_ns)
{
	assert(flow->running > 0);
	flow->running--;
	flow->group->running--;
	scheduler->running--;
	flow->mean_ns += flow->mean_ns == 0 ? (double)device_ns : ((double)device_ns - flow->mean_ns) * MEAN_STEP;
	charge(scheduler, flow, class, (double)device_ns - (double)estimate_ns);
	record(scheduler, flow, device_ns);
}

void scheduler_charge(struct scheduler *scheduler, struct sched_flow *flow, sched_class class, uint64_t device_ns)
{
	charge(scheduler, flow, class, (double)device_ns);
	record(scheduler, flow, device_ns);
}

/* ---- Estimates ---- */

double scheduler_share(const struct scheduler *scheduler, const struct sched_flow *flow, sched_class class)
{
	const struct sched_group *group = flow->group;
	const struct sched_level *flows = &group->classes[class].flows;
	const bool waits = heap_has(&flow->classes[class].node);
	const bool group_waits = heap_has(&group->classes[class].node);
	const double among_flows = (double)flow->weight / (double)(flows->weight + (waits ? 0 : flow->weight));
	const double among_groups =
		(double)group->weight / (double)(scheduler->classes[class].weight + (group_waits ? 0 : group->weight));
	return among_flows * among_groups;
}

uint64_t scheduler_finish_ns(const struct scheduler *scheduler, const struct sched_flow *flow, sched_class class, uint64_t cost_ns)
{
	double all = 0;
	for (uint32_t i = 0; i <= (uint32_t)class; i++)
		all += (double)scheduler->waiting_ns[i];
	all = all / scheduler->servers + (double)cost_ns;
	if (flow == NULL)
		return (uint64_t)all;
	const double mine = (double)(flow->queued_ns + cost_ns) / scheduler_share(scheduler, flow, class) / scheduler->servers;
	const double ns = mine < all ? mine : all;
	return ns > (double)cost_ns ? (uint64_t)ns : cost_ns;
}

/* How long what is queued of it, and what it owes, takes at its rate. */
static double rate_wait_ns(const struct sched_bucket *bucket, uint64_t queued_ns)
{
	const double missing = (double)queued_ns - bucket->tokens_ns;
	return bucket->rate_ns == 0 || missing < 0 ? 0 : missing * 1e9 / (double)bucket->rate_ns;
}

uint64_t scheduler_wait_ns(const struct scheduler *scheduler, const struct sched_flow *flow, sched_class class)
{
	const double mine = (double)flow->queued_ns / scheduler_share(scheduler, flow, class);
	const double all = (double)scheduler->queued_ns;
	/* Nobody waits longer for its share than for everybody's work. */
	double ns = (flow->queued == 0 || mine > all ? all : mine) / scheduler->servers;
	const double flow_ns = rate_wait_ns(&flow->bucket, flow->queued_ns);
	const double group_ns = rate_wait_ns(&flow->group->bucket, flow->group->queued_ns);
	ns = ns > flow_ns ? ns : flow_ns;
	ns = ns > group_ns ? ns : group_ns;
	return ns < 1e15 ? (uint64_t)ns : (uint64_t)1e15;
}
