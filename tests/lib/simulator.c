#include "tests/lib/simulator.h"

#include <math.h>
#include <stdlib.h>

/* Something happens at a time: its heap key. */
typedef enum event_kind { EVENT_ARRIVAL, EVENT_DONE, EVENT_RATE } event_kind;

struct event {
	struct heap_node node;
	event_kind kind;
	struct sim_client *client;
	struct job *job;
};

struct job {
	struct sched_item item;
	struct sim_client *client;
	uint64_t cost_ns;
	uint64_t begun_ns;
};

static void *make(size_t bytes)
{
	void *memory = calloc(1, bytes);
	if (memory == NULL)
		abort();
	return memory;
}

double simulator_random(struct simulator *simulator)
{
	simulator->random ^= simulator->random << 13;
	simulator->random ^= simulator->random >> 7;
	simulator->random ^= simulator->random << 17;
	return (double)(simulator->random >> 11) / 9007199254740992.0;
}

static double exponential(struct simulator *simulator, double mean)
{
	return -log(1 - simulator_random(simulator)) * mean;
}

static uint64_t draw_cost(struct simulator *simulator, const struct sim_work *work)
{
	double cost = work->cost_ns;
	if (work->costs == SIM_EXPONENTIAL)
		cost = exponential(simulator, cost);
	if (work->costs == SIM_PARETO)
		cost = fmin(cost / 3 * pow(1 - simulator_random(simulator), -1 / 1.5), cost * 1000);
	return cost < 1 ? 1 : (uint64_t)cost;
}

static void event_add(struct simulator *simulator, event_kind kind, double at_ns, struct sim_client *client, struct job *job)
{
	struct event *event = make(sizeof *event);
	event->kind = kind;
	event->client = client;
	event->job = job;
	event->node.key = at_ns;
	heap_insert(&simulator->events, &event->node);
}

/* The client's next request, at the earliest `after_ns` from now. */
static void plan_arrival(struct simulator *simulator, struct sim_client *client, double after_ns)
{
	double at = (double)simulator->now_ns + after_ns;
	const struct sim_work *work = &client->work;
	if (work->trace != NULL) {
		if (client->next_arrival == work->trace_count)
			return;
		at = (double)work->trace[client->next_arrival].at_ns;
	}
	if (at < (double)work->from_ns)
		at = (double)work->from_ns;
	if (work->until_ns == 0 || at < (double)work->until_ns)
		event_add(simulator, EVENT_ARRIVAL, at, client, NULL);
}

void simulator_init(struct simulator *simulator, uint32_t servers, uint64_t seed)
{
	*simulator = (struct simulator){.servers = servers, .random = seed * 0x9e3779b97f4a7c15u + 1};
	scheduler_init(&simulator->scheduler);
	simulator->scheduler.servers = servers;
}

struct sched_group *simulator_tenant(struct simulator *simulator, uint32_t weight)
{
	struct sched_group *tenant = make(sizeof *tenant);
	sched_group_init(tenant, weight);
	simulator->tenants = realloc(simulator->tenants, (simulator->tenant_count + 1) * sizeof simulator->tenants[0]);
	simulator->tenants[simulator->tenant_count++] = tenant;
	return tenant;
}

struct sim_client *simulator_client(struct simulator *simulator, struct sched_group *tenant, uint32_t weight, struct sim_work work)
{
	struct sim_client *client = make(sizeof *client);
	client->work = work;
	sched_flow_init(&client->flow, tenant, weight);
	simulator->clients = realloc(simulator->clients, (simulator->client_count + 1) * sizeof simulator->clients[0]);
	simulator->clients[simulator->client_count++] = client;
	if (work.in_flight == 0)
		plan_arrival(simulator, client, work.trace != NULL ? 0 : exponential(simulator, work.interval_ns));
	for (uint32_t i = 0; i < work.in_flight; i++)
		plan_arrival(simulator, client, 0);
	return client;
}

void simulator_watch(struct sim_client *client)
{
	client->waits = make(sizeof *client->waits);
}

static void arrive(struct simulator *simulator, struct sim_client *client)
{
	struct job *job = make(sizeof *job);
	const struct sim_work *work = &client->work;
	job->client = client;
	job->cost_ns = work->trace != NULL ? work->trace[client->next_arrival++].cost_ns : draw_cost(simulator, work);
	job->item = (struct sched_item){.flow = work->as != NULL ? &work->as->flow : &client->flow, .class = (uint8_t)work->class, .estimate_ns = work->estimated ? job->cost_ns : 0};
	if (!scheduler_submit(&simulator->scheduler, &job->item, simulator->now_ns)) {
		client->refused++;
		free(job);
		if (work->in_flight != 0) /* as a client that is told to come again */
			plan_arrival(simulator, client, 1e6);
	}
	if (work->in_flight == 0)
		plan_arrival(simulator, client, work->trace != NULL ? 0 : exponential(simulator, work->interval_ns));
}

static void begin(struct simulator *simulator, struct sched_item *item)
{
	struct job *job = (struct job *)(void *)item;
	job->begun_ns = simulator->now_ns;
	simulator->busy++;
	simulator->picks++;
	if (job->client->waits != NULL)
		histogram_add(job->client->waits, simulator->now_ns - item->queued_ns);
	event_add(simulator, EVENT_DONE, (double)(simulator->now_ns + job->cost_ns), job->client, job);
}

static void done(struct simulator *simulator, struct job *job)
{
	struct sim_client *client = job->client;
	simulator->busy--;
	simulator->busy_ns += job->cost_ns;
	client->completed++;
	client->device_ns += job->cost_ns;
	scheduler_complete(&simulator->scheduler, job->item.flow, job->item.class, job->item.estimate_ns, job->cost_ns);
	free(job);
	if (client->work.in_flight != 0)
		plan_arrival(simulator, client, client->work.think_ns);
}

static void start_servers(struct simulator *simulator)
{
	uint64_t ready = UINT64_MAX;
	while (simulator->busy < simulator->servers) {
		struct sched_item *item = scheduler_pick(&simulator->scheduler, simulator->now_ns, &ready);
		if (item == NULL)
			break;
		begin(simulator, item);
	}
	if (simulator->busy < simulator->servers && ready != UINT64_MAX)
		event_add(simulator, EVENT_RATE, (double)ready, NULL, NULL);
}

static void handle(struct simulator *simulator, struct event *event)
{
	if (event->kind == EVENT_ARRIVAL)
		arrive(simulator, event->client);
	if (event->kind == EVENT_DONE)
		done(simulator, event->job);
	free(event);
}

static void advance(struct simulator *simulator, uint64_t to_ns)
{
	if (simulator->busy < simulator->servers && simulator->scheduler.queued > 0 && simulator->scheduler.throttled_groups.first == NULL && simulator->scheduler.throttled_flows.first == NULL)
		simulator->idle_while_waiting_ns += to_ns - simulator->now_ns;
	simulator->now_ns = to_ns;
}

void simulator_run(struct simulator *simulator, uint64_t until_ns)
{
	while (simulator->events.first != NULL && simulator->events.first->key <= (double)until_ns) {
		struct event *event = (struct event *)(void *)simulator->events.first;
		heap_remove(&simulator->events, &event->node);
		if ((uint64_t)event->node.key > simulator->now_ns)
			advance(simulator, (uint64_t)event->node.key);
		handle(simulator, event);
		/* All that happens at one time has happened before anybody is picked. */
		if (simulator->events.first == NULL || simulator->events.first->key > (double)simulator->now_ns)
			start_servers(simulator);
	}
	advance(simulator, until_ns);
}

static void drop_queue(struct simulator *simulator, struct sim_client *client)
{
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		for (struct sched_item *item; (item = client->flow.classes[i].head) != NULL; free(item))
			(void)scheduler_withdraw(&simulator->scheduler, item);
}

void simulator_fini(struct simulator *simulator)
{
	for (struct event *event; (event = (struct event *)(void *)simulator->events.first) != NULL; free(event)) {
		heap_remove(&simulator->events, &event->node);
		free(event->job);
	}
	for (uint32_t i = 0; i < simulator->client_count; i++) {
		drop_queue(simulator, simulator->clients[i]);
		free(simulator->clients[i]->waits);
		free(simulator->clients[i]);
	}
	for (uint32_t i = 0; i < simulator->tenant_count; i++)
		free(simulator->tenants[i]);
	free(simulator->clients);
	free(simulator->tenants);
}
