#include "server/scheduler.h"

#include <assert.h>
#include <string.h>

#define GROUP_OF(heap_node, class) \
	((struct sched_group *)(void *)((char *)(heap_node) - offsetof(struct sched_group, classes) - (class) * sizeof(struct sched_group_class)))
#define FLOW_OF(heap_node, class) \
	((struct sched_flow *)(void *)((char *)(heap_node) - offsetof(struct sched_flow, classes) - (class) * sizeof(struct sched_flow_class)))
#define THROTTLED_OF(heap_node) ((struct sched_group *)(void *)((char *)(heap_node) - offsetof(struct sched_group, throttled)))

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

/* ---- Groups that have used up their rate ---- */

static void bucket_fill(struct sched_group *group, uint64_t now_ns)
{
	if (now_ns <= group->filled_ns)
		return;
	group->tokens_ns += (double)(now_ns - group->filled_ns) * (double)group->rate_ns / 1e9;
	if (group->tokens_ns > (double)group->rate_ns)
		group->tokens_ns = (double)group->rate_ns;
	group->filled_ns = now_ns;
}

static bool is_throttled(const struct sched_group *group)
{
	return heap_has(&group->throttled);
}

/* The group's waiting flows join or leave the competition. */
static void group_join(struct scheduler *scheduler, struct sched_group *group, uint32_t class)
{
	struct sched_group_class *in = &group->classes[class];
	if (!heap_has(&in->node) && in->flows.waiting.first != NULL && !is_throttled(group))
		level_join(&scheduler->classes[class], &in->node, group->weight);
}

static void group_leave(struct scheduler *scheduler, struct sched_group *group, uint32_t class)
{
	if (heap_has(&group->classes[class].node))
		level_leave(&scheduler->classes[class], &group->classes[class].node, group->weight);
}

static void throttle(struct scheduler *scheduler, struct sched_group *group)
{
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		group_leave(scheduler, group, i);
	/* A little more than empty, so that it isn't asked for each job. */
	double missing = 1000.0 - group->tokens_ns;
	heap_move(&scheduler->throttled, &group->throttled, (double)group->filled_ns + missing * 1e9 / (double)group->rate_ns);
}

static void unthrottle(struct scheduler *scheduler, struct sched_group *group)
{
	heap_remove(&scheduler->throttled, &group->throttled);
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		group_join(scheduler, group, i);
}

static void release_throttled(struct scheduler *scheduler, uint64_t now_ns)
{
	while (scheduler->throttled.first != NULL && scheduler->throttled.first->key <= (double)now_ns) {
		struct sched_group *group = THROTTLED_OF(scheduler->throttled.first);
		bucket_fill(group, now_ns);
		unthrottle(scheduler, group);
		if (group->tokens_ns < 0) /* what was running meanwhile took more */
			throttle(scheduler, group);
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
	group->rate_ns = rate_ns;
	group->tokens_ns = (double)rate_ns;
	group->filled_ns = now_ns;
	if (is_throttled(group))
		unthrottle(scheduler, group);
}

void scheduler_forget_rates(struct scheduler *scheduler)
{
	scheduler->rates_forgotten = true;
	while (scheduler->throttled.first != NULL)
		unthrottle(scheduler, THROTTLED_OF(scheduler->throttled.first));
}

/* ---- Queueing ---- */

static uint64_t estimate(const struct sched_item *item)
{
	if (item->estimate_ns != 0)
		return item->estimate_ns;
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
	flow->queued_ns += ns;
}

bool scheduler_submit(struct scheduler *scheduler, struct sched_item *item, uint64_t now_ns)
{
	struct sched_flow *flow = item->flow;
	struct sched_flow_class *queue = &flow->classes[item->class];
	const bool full = (scheduler->queue_max != 0 && scheduler->queued >= scheduler->queue_max) ||
	                  (scheduler->flow_queue_max != 0 && flow->queued >= scheduler->flow_queue_max);
	if (full && !flow->unbounded)
		return false;
	item->estimate_ns = estimate(item);
	item->queued_ns = now_ns;
	item->next = NULL;
	item->link = queue->tail;
	*queue->tail = item;
	queue->tail = &item->next;
	count(scheduler, item, 1);
	if (!heap_has(&queue->node)) {
		level_join(&flow->group->classes[item->class].flows, &queue->node, flow->weight);
		group_join(scheduler, flow->group, item->class);
	}
	return true;
}

/* Out of its queue; a flow, and a group, whose last item it was no longer waits. */
static void dequeue(struct scheduler *scheduler, struct sched_item *item)
{
	struct sched_flow *flow = item->flow;
	struct sched_group *group = flow->group;
	struct sched_flow_class *queue = &flow->classes[item->class];
	*item->link = item->next;
	if (item->next != NULL)
		item->next->link = item->link;
	else
		queue->tail = item->link;
	item->link = NULL;
	item->next = NULL;
	count(scheduler, item, -1);
	if (queue->head != NULL)
		return;
	level_leave(&group->classes[item->class].flows, &queue->node, flow->weight);
	if (group->classes[item->class].flows.waiting.first == NULL)
		group_leave(scheduler, group, item->class);
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
	if (group->rate_ns == 0 || scheduler->rates_forgotten)
		return;
	group->tokens_ns -= ns;
	if (group->tokens_ns < 0 && !is_throttled(group))
		throttle(scheduler, group);
}

struct sched_item *scheduler_pick(struct scheduler *scheduler, uint64_t now_ns, uint64_t *ready_ns_out)
{
	release_throttled(scheduler, now_ns);
	const uint32_t class = choose_class(scheduler);
	if (class == CLASS_COUNT) {
		*ready_ns_out = scheduler->throttled.first == NULL ? UINT64_MAX : (uint64_t)scheduler->throttled.first->key + 1;
		return NULL;
	}
	struct sched_item *item = next_of(scheduler, class);
	struct sched_flow *flow = item->flow;
	struct sched_group *group = flow->group;
	level_serve(&scheduler->classes[class], &group->classes[class].node);
	level_serve(&group->classes[class].flows, &flow->classes[class].node);
	dequeue(scheduler, item);
	if (group->rate_ns != 0)
		bucket_fill(group, now_ns);
	charge(scheduler, flow, class, (double)item->estimate_ns);
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
	return item;
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

uint64_t scheduler_wait_ns(const struct scheduler *scheduler, const struct sched_flow *flow, sched_class class)
{
	const double mine = (double)flow->queued_ns / scheduler_share(scheduler, flow, class);
	const double all = (double)scheduler->queued_ns;
	/* Nobody waits longer for its share than for everybody's work. */
	const double ns = (flow->queued == 0 || mine > all ? all : mine) / scheduler->servers;
	return ns < 1e15 ? (uint64_t)ns : (uint64_t)1e15;
}
