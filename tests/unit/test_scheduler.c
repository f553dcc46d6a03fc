/* server/scheduler.h on a virtual clock: who gets how much of a lane, who waits how long, whoever the others are. Seconds and hours of lanes with thousands of sessions,
 * the same each time. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/lib/simulator.h"
#include "tests/lib/suite.h"

#define US 1000.0
#define MS 1000000.0
#define SECOND 1000000000u

static struct simulator sim;

static void start(uint32_t servers, uint64_t seed)
{
	simulator_init(&sim, servers, seed);
}

/* Whatever is tested: no server stands still while somebody may run, and all time is somebody's. */
static void stop(void)
{
	uint64_t sum = 0;
	for (uint32_t i = 0; i < sim.client_count; i++)
		sum += sim.clients[i]->device_ns;
	ck_assert_uint_eq(sum, sim.busy_ns);
	ck_assert_uint_eq(sim.idle_while_waiting_ns, 0);
	for (uint32_t i = 0; i < sim.client_count; i++)
		ck_assert_uint_eq(sim.clients[i]->flow.usage.device_ns, sim.clients[i]->device_ns);
	simulator_fini(&sim);
	ck_assert_uint_eq(sim.scheduler.queued, 0);
	ck_assert_uint_eq(sim.scheduler.queued_ns, 0);
}

static struct sim_work saturating(sched_class class, sim_costs costs, double cost_ns)
{
	return (struct sim_work){.class = class, .in_flight = 8, .costs = costs, .cost_ns = cost_ns};
}

static struct sim_work arriving(sched_class class, double interval_ns, sim_costs costs, double cost_ns)
{
	return (struct sim_work){.class = class, .interval_ns = interval_ns, .costs = costs, .cost_ns = cost_ns};
}

static double share(const struct sim_client *client)
{
	return (double)client->device_ns / (double)sim.busy_ns;
}

static void expect_share(const struct sim_client *client, double expected, double within)
{
	ck_assert_msg(share(client) > expected - within && share(client) < expected + within, "share %.4f, expected %.4f within %.4f",
	              share(client), expected, within);
}

/* Jain's index of the clients [from, to): 1 where all have had the same. */
static double fairness(uint32_t from, uint32_t to)
{
	double sum = 0, squares = 0;
	for (uint32_t i = from; i < to; i++) {
		double x = (double)sim.clients[i]->device_ns;
		sum += x;
		squares += x * x;
	}
	return sum * sum / ((to - from) * squares);
}

/* ---- Shares ---- */

START_TEST(two_sessions_share_device_time_by_weight_whatever_their_ops_cost)
{
	const double costs[][2] = {{10 * US, 10 * MS}, {10 * MS, 10 * US}, {100 * US, 100 * US}, {3 * US, 700 * US}};
	start(_i < 4 ? 1 : 4, 1);
	struct sched_group *tenant = simulator_tenant(&sim, 100);
	struct sim_client *a = simulator_client(&sim, tenant, 1, saturating(CLASS_INTERACTIVE, SIM_FIXED, costs[_i % 4][0]));
	struct sim_client *b = simulator_client(&sim, tenant, 3, saturating(CLASS_INTERACTIVE, SIM_EXPONENTIAL, costs[_i % 4][1]));
	simulator_run(&sim, 5ull * SECOND);
	expect_share(a, 0.25, 0.02);
	expect_share(b, 0.75, 0.02);
	stop();
}
END_TEST

START_TEST(two_tenants_share_by_weight_however_many_sessions_they_open)
{
	start(2, 2);
	struct sched_group *small = simulator_tenant(&sim, 1);
	struct sched_group *large = simulator_tenant(&sim, 3);
	for (int i = 0; i < 200; i++)
		(void)simulator_client(&sim, small, 100, saturating(CLASS_BATCH, SIM_PARETO, 50 * US));
	struct sim_client *one = simulator_client(&sim, large, 100, saturating(CLASS_BATCH, SIM_FIXED, 2 * MS));
	simulator_run(&sim, 5ull * SECOND);
	expect_share(one, 0.75, 0.02);
	ck_assert_uint_gt(small->usage.device_ns, 0);
	stop();
}
END_TEST

START_TEST(a_hundred_sessions_of_equal_weight_get_the_same)
{
	start(2, 3);
	struct sched_group *tenant = simulator_tenant(&sim, 100);
	for (int i = 0; i < 100; i++)
		(void)simulator_client(&sim, tenant, 100, saturating(CLASS_INTERACTIVE, (sim_costs)(i % 3), (i % 7 + 1) * 40 * US));
	simulator_run(&sim, 5ull * SECOND);
	ck_assert_msg(fairness(0, 100) > 0.99, "Jain's index %.4f", fairness(0, 100));
	stop();
}
END_TEST

/* A simulation of a minute takes AddressSanitizer half of one. It looks at addresses; that shares are exact over an hour is the other builds' to prove. */
#ifdef __SANITIZE_ADDRESS__
#define HEAVY_SECONDS 15ull
#define LONG_SECONDS 360ull
#else
#define HEAVY_SECONDS 60ull
#define LONG_SECONDS 3600ull
#endif

START_TEST(thousands_of_sessions_with_heavy_tails_get_the_same)
{
	start(8, 4);
	for (int t = 0; t < 50; t++) {
		struct sched_group *tenant = simulator_tenant(&sim, 100);
		for (int i = 0; i < 60; i++)
			(void)simulator_client(&sim, tenant, 100,
			                       (struct sim_work){.class = CLASS_BATCH, .in_flight = 2, .costs = SIM_PARETO, .cost_ns = 100 * US});
	}
	simulator_run(&sim, HEAVY_SECONDS * SECOND);
	double least = 1e18, most = 0;
	for (int t = 0; t < 50; t++) {
		least = sim.tenants[t]->usage.device_ns < least ? (double)sim.tenants[t]->usage.device_ns : least;
		most = sim.tenants[t]->usage.device_ns > most ? (double)sim.tenants[t]->usage.device_ns : most;
	}
	ck_assert_msg(most / least < 1.05, "most over least of the tenants: %.3f", most / least);
	ck_assert_msg(fairness(0, sim.client_count) > 0.97, "Jain's index %.4f", fairness(0, sim.client_count));
	stop();
}
END_TEST

/* ---- As it was recorded: tests/golden/arrivals.txt ---- */

#define RECORDED_SESSIONS 8u
#define RECORDED_ROWS 8192u

static struct recorded {
	sched_class class;
	uint32_t count;
	uint64_t device_ns;
	struct sim_arrival arrivals[RECORDED_ROWS];
} recorded[RECORDED_SESSIONS];
static uint32_t recorded_count;
static uint64_t recorded_end_ns, recorded_cost_max_ns;

/* The times are divided by `faster`. */
static void load_recorded(double faster)
{
	unsigned long long at_us, cost_us;
	unsigned session;
	char class[16], line[128];
	FILE *file = fopen(OPD_TESTS_DIR "/golden/arrivals.txt", "r");
	ck_assert_ptr_nonnull(file);
	memset(recorded, 0, sizeof recorded);
	recorded_count = 0;
	recorded_cost_max_ns = 0;
	while (fgets(line, sizeof line, file) != NULL) {
		if (line[0] == '#')
			continue;
		ck_assert_int_eq(sscanf(line, "%llu %u %15s %llu", &at_us, &session, class, &cost_us), 4);
		ck_assert_uint_lt(session, RECORDED_SESSIONS);
		struct recorded *mine = &recorded[session];
		ck_assert_uint_lt(mine->count, RECORDED_ROWS);
		mine->class = sched_class_parse(class, strlen(class));
		recorded_end_ns = (uint64_t)((double)at_us * US / faster);
		mine->arrivals[mine->count++] = (struct sim_arrival){recorded_end_ns, cost_us * 1000};
		mine->device_ns += cost_us * 1000;
		recorded_count = session + 1 > recorded_count ? session + 1 : recorded_count;
		recorded_cost_max_ns = cost_us * 1000 > recorded_cost_max_ns ? cost_us * 1000 : recorded_cost_max_ns;
	}
	ck_assert_int_eq(fclose(file), 0);
	ck_assert_uint_gt(recorded_count, 3);
}

/* All of them come, each as a tenant of its own, or all as one session in one class: first come, first served. Its waits are watched. */
static void replay(bool in_order, struct sim_client *clients[RECORDED_SESSIONS])
{
	start(1, 1);
	struct sched_group *tenant = simulator_tenant(&sim, 100);
	for (uint32_t i = 0; i < recorded_count; i++) {
		const struct sim_work work = {.class = in_order ? CLASS_BATCH : recorded[i].class, .trace = recorded[i].arrivals, .trace_count = recorded[i].count};
		clients[i] = simulator_client(&sim, in_order ? tenant : simulator_tenant(&sim, 100), 100, work);
		clients[i]->work.as = in_order ? clients[0] : NULL;
		simulator_watch(clients[i]);
	}
	simulator_run(&sim, recorded_end_ns + 60ull * SECOND);
	for (uint32_t i = 0; i < recorded_count; i++)
		ck_assert_uint_eq(clients[i]->completed, recorded[i].count);
}

START_TEST(what_was_recorded_is_all_served_and_urgent_work_waits_for_one_kernel_at_most)
{
	struct sim_client *clients[RECORDED_SESSIONS];
	uint32_t urgent = RECORDED_SESSIONS;
	load_recorded(_i == 0 ? 1.0 : 2.0); /* as it came, and twice as fast */
	replay(false, clients);
	for (uint32_t i = 0; i < recorded_count; i++)
		urgent = recorded[i].class == CLASS_REALTIME ? i : urgent;
	ck_assert_uint_lt(urgent, RECORDED_SESSIONS);
	const uint64_t most = histogram_quantile(clients[urgent]->waits, 1);
	const uint64_t p99 = histogram_quantile(clients[urgent]->waits, 0.99);
	ck_assert_msg(most <= recorded_cost_max_ns * 1.01, "%.3f ms, a kernel takes at most %.3f", (double)most / MS, (double)recorded_cost_max_ns / MS);
	stop();
	replay(true, clients);
	const uint64_t in_order = histogram_quantile(clients[urgent]->waits, 0.99);
	ck_assert_msg(in_order > 2 * p99, "p99 %.3f ms, in the order of arrival %.3f", (double)p99 / MS, (double)in_order / MS);
	simulator_fini(&sim);
}
END_TEST

/* Twice as much as one thread can do, all in one class: whoever asks for less than its share hardly waits, whatever the others have piled up. */
START_TEST(who_was_recorded_to_ask_for_little_hardly_waits_when_all_is_too_much)
{
	struct sim_client *clients[RECORDED_SESSIONS];
	uint64_t all_ns = 0;
	uint32_t light = 0;
	load_recorded(1);
	for (uint32_t i = 0; i < recorded_count; i++)
		all_ns += recorded[i].device_ns;
	load_recorded(2.0 * (double)recorded_end_ns / (double)all_ns);
	start(1, 1);
	for (uint32_t i = 0; i < recorded_count; i++) {
		const struct sim_work work = {.class = CLASS_BATCH, .trace = recorded[i].arrivals, .trace_count = recorded[i].count};
		clients[i] = simulator_client(&sim, simulator_tenant(&sim, 100), 100, work);
		simulator_watch(clients[i]);
	}
	simulator_run(&sim, recorded_end_ns + 60ull * SECOND);
	for (uint32_t i = 0; i < recorded_count; i++) {
		if (recorded[i].device_ns > recorded_end_ns / recorded_count / 2)
			continue;
		light++;
		const uint64_t p99 = histogram_quantile(clients[i]->waits, 0.99);
		ck_assert_msg(p99 <= recorded_count * recorded_cost_max_ns, "session %u: %.3f ms", i, (double)p99 / MS);
	}
	ck_assert_uint_gt(light, 0);
	stop();
}
END_TEST

START_TEST(who_was_idle_gets_no_credit_for_it)
{
	start(1, 5);
	struct sched_group *a = simulator_tenant(&sim, 100), *b = simulator_tenant(&sim, 100);
	struct sim_client *first = simulator_client(&sim, a, 100, saturating(CLASS_BATCH, SIM_FIXED, 1 * MS));
	struct sim_work late = saturating(CLASS_BATCH, SIM_FIXED, 1 * MS);
	late.from_ns = 10ull * SECOND;
	struct sim_client *second = simulator_client(&sim, b, 100, late);
	simulator_run(&sim, 10ull * SECOND);
	const uint64_t before = first->device_ns;
	simulator_run(&sim, 12ull * SECOND);
	const double after = (double)(first->device_ns - before) / (2.0 * SECOND);
	ck_assert_msg(after > 0.49 && after < 0.51, "the older one's share since the other came: %.4f", after);
	ck_assert_uint_gt(second->device_ns, 0);
	stop();
}
END_TEST

START_TEST(a_changed_weight_counts_from_then_on)
{
	start(1, 6);
	struct sched_group *a = simulator_tenant(&sim, 100), *b = simulator_tenant(&sim, 100);
	struct sim_client *one = simulator_client(&sim, a, 100, saturating(CLASS_BATCH, SIM_FIXED, 300 * US));
	(void)simulator_client(&sim, b, 100, saturating(CLASS_BATCH, SIM_FIXED, 200 * US));
	simulator_run(&sim, 1ull * SECOND);
	sched_group_set_weight(&sim.scheduler, a, 900);
	const uint64_t before = one->device_ns;
	simulator_run(&sim, 3ull * SECOND);
	const double after = (double)(one->device_ns - before) / (2.0 * SECOND);
	ck_assert_msg(after > 0.88 && after < 0.92, "share %.4f", after);
	stop();
}
END_TEST

/* ---- Classes ---- */

START_TEST(a_realtime_request_waits_for_one_running_kernel_at_most)
{
	start(1, 7);
	for (int t = 0; t < 20; t++)
		(void)simulator_client(&sim, simulator_tenant(&sim, 100), 100, saturating(CLASS_BATCH, SIM_FIXED, 2 * MS));
	struct sim_client *urgent =
		simulator_client(&sim, simulator_tenant(&sim, 1), 1, arriving(CLASS_REALTIME, 20 * MS, SIM_FIXED, 100 * US));
	simulator_watch(urgent);
	simulator_run(&sim, 20ull * SECOND);
	ck_assert_uint_gt(urgent->waits->count, 500);
	/* 2 ms, and its own requests that came just before: 4 in 20 ms are one in 10^8 */
	ck_assert_msg(histogram_quantile(urgent->waits, 0.99) <= 2.2 * MS, "p99 %.1f us", (double)histogram_quantile(urgent->waits, 0.99) / 1e3);
	ck_assert_msg(urgent->waits->max_ns <= 2.5 * MS, "longest %.1f us", (double)urgent->waits->max_ns / 1e3);
	stop();
}
END_TEST

START_TEST(no_class_starves)
{
	start(2, 8);
	for (int t = 0; t < 4; t++)
		(void)simulator_client(&sim, simulator_tenant(&sim, 100), 100, saturating(CLASS_REALTIME, SIM_EXPONENTIAL, 500 * US));
	struct sim_client *middle =
		simulator_client(&sim, simulator_tenant(&sim, 100), 100, saturating(CLASS_INTERACTIVE, SIM_EXPONENTIAL, 300 * US));
	struct sim_client *lowest = simulator_client(&sim, simulator_tenant(&sim, 100), 100, saturating(CLASS_BATCH, SIM_FIXED, 5 * MS));
	simulator_watch(lowest);
	simulator_run(&sim, 20ull * SECOND);
	expect_share(middle, 0.1 / 1.15, 0.02);
	expect_share(lowest, 0.05 / 1.15, 0.01);
	/* 8 of them wait for each other: 5 ms each, of a twentieth of two servers, and a little */
	ck_assert_msg(lowest->waits->max_ns < 8 * 5 * MS * 23 / 2 * 1.2, "longest %.1f ms", (double)lowest->waits->max_ns / 1e6);
	stop();
}
END_TEST

START_TEST(a_class_alone_has_all)
{
	start(2, 9);
	struct sim_client *lowest = simulator_client(&sim, simulator_tenant(&sim, 1), 1, saturating(CLASS_BATCH, SIM_FIXED, 1 * MS));
	simulator_run(&sim, 1ull * SECOND);
	ck_assert_uint_ge(lowest->device_ns, 1990000000u);
	stop();
}
END_TEST

/* ---- Waits, bounds, rates ---- */

START_TEST(small_sessions_hardly_notice_a_large_one)
{
	start(4, 10);
	for (int t = 0; t < 8; t++)
		(void)simulator_client(&sim, simulator_tenant(&sim, 100), 100,
		                       (struct sim_work){.class = CLASS_INTERACTIVE, .in_flight = 512, .costs = SIM_PARETO, .cost_ns = 300 * US});
	for (int i = 0; i < 2000; i++)
		simulator_watch(simulator_client(&sim, simulator_tenant(&sim, 100), 100,
		                                 arriving(CLASS_INTERACTIVE, 4000 * MS, SIM_EXPONENTIAL, 300 * US)));
	simulator_run(&sim, 20ull * SECOND);
	static struct histogram all;
	for (uint32_t i = 8; i < sim.client_count; i++)
		for (unsigned k = 0; k < HISTOGRAM_BUCKETS; k++) {
			all.buckets[k] += sim.clients[i]->waits->buckets[k];
			all.count += sim.clients[i]->waits->buckets[k];
		}
	/* First come, first served would make them wait for 4096 jobs: 300 ms. */
	ck_assert_uint_gt(all.count, 5000);
	ck_assert_msg(histogram_quantile(&all, 0.5) < 1 * MS, "median %.1f us", (double)histogram_quantile(&all, 0.5) / 1e3);
	ck_assert_msg(histogram_quantile(&all, 0.99) < 10 * MS, "p99 %.1f us", (double)histogram_quantile(&all, 0.99) / 1e3);
	stop();
}
END_TEST

START_TEST(queues_are_bounded_and_others_go_on)
{
	start(1, 11);
	sim.scheduler.flow_queue_max = 16;
	sim.scheduler.queue_max = 40;
	struct sched_group *tenant = simulator_tenant(&sim, 100);
	struct sim_client *flood = simulator_client(&sim, tenant, 100, arriving(CLASS_BATCH, 10 * US, SIM_FIXED, 1 * MS));
	struct sim_client *calm = simulator_client(&sim, tenant, 100, arriving(CLASS_BATCH, 20 * MS, SIM_FIXED, 1 * MS));
	for (int i = 0; i < 200; i++) {
		simulator_run(&sim, (uint64_t)i * 5000000);
		ck_assert_uint_le(flood->flow.queued, 16);
		ck_assert_uint_le(sim.scheduler.queued, 40);
	}
	ck_assert_uint_gt(flood->refused, 50000);
	ck_assert_uint_eq(calm->refused, 0);
	/* What it is told to wait: its queue of 16, at half of the lane while the other waits, at all of it while it doesn't. */
	const uint64_t wait = scheduler_wait_ns(&sim.scheduler, &flood->flow, CLASS_BATCH);
	ck_assert_msg(wait >= 10 * MS && wait <= 40 * MS, "wait %.1f ms", (double)wait / 1e6);
	stop();
}
END_TEST

START_TEST(a_rate_bounds_device_time_and_leaves_the_rest_to_others)
{
	start(2, 12);
	struct sched_group *bounded = simulator_tenant(&sim, 900), *free_one = simulator_tenant(&sim, 100);
	sched_group_set_rate(&sim.scheduler, bounded, SECOND / 2, 0);
	struct sim_client *a = simulator_client(&sim, bounded, 100, saturating(CLASS_INTERACTIVE, SIM_EXPONENTIAL, 3 * MS));
	struct sim_client *b = simulator_client(&sim, free_one, 100, saturating(CLASS_BATCH, SIM_FIXED, 1 * MS));
	simulator_run(&sim, 20ull * SECOND);
	/* Half a second each second, and the bucket that was full at the start. */
	ck_assert_msg(a->device_ns > 9.9 * SECOND && a->device_ns < 10.6 * SECOND, "%.3f s", (double)a->device_ns / 1e9);
	ck_assert_msg(b->device_ns > 29.2 * SECOND, "%.3f s", (double)b->device_ns / 1e9);
	stop();
}
END_TEST

/* An hour of a tenant, a session and both on several threads: neither loses nor gains a job beyond the bucket that was full at the start and what was running when it became empty. */
START_TEST(a_rate_is_exact_over_a_long_time)
{
	static const struct {
		uint32_t servers;
		uint64_t tenant_ns, session_ns; /* a second; 0: any */
		sim_costs costs;
	} cases[] = {{1, SECOND / 4, 0, SIM_FIXED}, {1, 0, SECOND / 3, SIM_EXPONENTIAL}, {4, 1500 * (uint64_t)MS, 0, SIM_PARETO}, {4, SECOND, SECOND / 7, SIM_EXPONENTIAL}, {2, MS, 0, SIM_FIXED}};
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
		start(cases[i].servers, 40 + i);
		struct sched_group *tenant = simulator_tenant(&sim, 100);
		struct sim_client *client = simulator_client(&sim, tenant, 100, saturating(CLASS_INTERACTIVE, cases[i].costs, 5 * MS));
		if (cases[i].tenant_ns != 0)
			sched_group_set_rate(&sim.scheduler, tenant, cases[i].tenant_ns, 0);
		if (cases[i].session_ns != 0)
			sched_flow_set_rate(&sim.scheduler, &client->flow, cases[i].session_ns, 0);
		simulator_run(&sim, LONG_SECONDS * SECOND);
		const uint64_t rate_ns = cases[i].session_ns != 0 ? cases[i].session_ns : cases[i].tenant_ns;
		const double due = (double)rate_ns * (double)(LONG_SECONDS + 1), most = 5e6 * (cases[i].costs == SIM_FIXED ? 1 : cases[i].costs == SIM_EXPONENTIAL ? 40 : 1000);
		ck_assert_msg((double)client->device_ns > due - most - 2000 && (double)client->device_ns < due + cases[i].servers * most, "case %zu: %.6f s of %.6f", i, (double)client->device_ns / 1e9, due / 1e9);
		stop();
	}
}
END_TEST

START_TEST(a_lone_bounded_tenant_is_served_again_when_its_bucket_fills)
{
	start(1, 13);
	struct sched_group *bounded = simulator_tenant(&sim, 100);
	sched_group_set_rate(&sim.scheduler, bounded, SECOND / 10, 0);
	struct sim_client *a = simulator_client(&sim, bounded, 100, saturating(CLASS_INTERACTIVE, SIM_FIXED, 1 * MS));
	simulator_run(&sim, 10ull * SECOND);
	ck_assert_msg(a->device_ns > 1.0 * SECOND && a->device_ns < 1.12 * SECOND, "%.3f s", (double)a->device_ns / 1e9);
	stop();
}
END_TEST

START_TEST(a_bounded_session_leaves_its_tenants_time_to_the_others)
{
	start(1, 15);
	struct sched_group *tenant = simulator_tenant(&sim, 100);
	struct sim_client *bounded = simulator_client(&sim, tenant, 900, saturating(CLASS_INTERACTIVE, SIM_EXPONENTIAL, 2 * MS));
	struct sim_client *other = simulator_client(&sim, tenant, 100, saturating(CLASS_INTERACTIVE, SIM_FIXED, 1 * MS));
	sched_flow_set_rate(&sim.scheduler, &bounded->flow, SECOND / 5, 0);
	simulator_run(&sim, 20ull * SECOND);
	ck_assert_msg(bounded->device_ns > 3.9 * SECOND && bounded->device_ns < 4.3 * SECOND, "%.3f s", (double)bounded->device_ns / 1e9);
	ck_assert_msg(other->device_ns > 15.6 * SECOND, "%.3f s", (double)other->device_ns / 1e9);
	stop();
}
END_TEST

/* What has used up its rate and has nothing queued must not be in any list: its memory goes. */
START_TEST(who_waits_for_a_rate_and_leaves_leaves_nothing)
{
	struct scheduler scheduler;
	struct sched_group group;
	struct sched_flow flow;
	struct sched_item items[2];
	uint64_t ready;
	scheduler_init(&scheduler);
	for (int i = 0; i < 2; i++) { /* a bounded tenant, then a bounded session */
		sched_group_init(&group, 100);
		sched_flow_init(&flow, &group, 100);
		if (i == 0)
			sched_group_set_rate(&scheduler, &group, MS, 0);
		else
			sched_flow_set_rate(&scheduler, &flow, MS, 0);
		for (int k = 0; k < 2; k++) {
			items[k] = (struct sched_item){.flow = &flow, .class = CLASS_BATCH, .estimate_ns = 5 * MS};
			ck_assert(scheduler_submit(&scheduler, &items[k], 0));
		}
		ck_assert_ptr_eq(scheduler_pick(&scheduler, 0, &ready), &items[0]);
		ck_assert_ptr_null(scheduler_pick(&scheduler, 0, &ready)); /* the bucket is empty */
		ck_assert(ready > SECOND && ready != UINT64_MAX);
		ck_assert_uint_ge(scheduler_wait_ns(&scheduler, &flow, CLASS_BATCH), 4ull * SECOND);
		scheduler_complete(&scheduler, &flow, CLASS_BATCH, items[0].estimate_ns, 5 * MS);
		ck_assert(scheduler_withdraw(&scheduler, &items[1]));
		ck_assert(scheduler.throttled_groups.first == NULL && scheduler.throttled_flows.first == NULL);
		ck_assert_ptr_null(scheduler.classes[CLASS_BATCH].waiting.first);
	}
}
END_TEST

START_TEST(when_a_job_would_be_done_is_said_by_class_and_share)
{
	struct scheduler scheduler;
	struct sched_group groups[2];
	struct sched_flow flows[2];
	struct sched_item items[10];
	scheduler_init(&scheduler);
	for (int i = 0; i < 2; i++) {
		sched_group_init(&groups[i], 100);
		sched_flow_init(&flows[i], &groups[i], 100);
	}
	ck_assert_uint_eq(scheduler_finish_ns(&scheduler, &flows[0], CLASS_BATCH, MS), MS);
	for (int i = 0; i < 10; i++) {
		items[i] = (struct sched_item){.flow = &flows[0], .class = CLASS_BATCH, .estimate_ns = MS};
		ck_assert(scheduler_submit(&scheduler, &items[i], 0));
	}
	ck_assert_uint_eq(scheduler_finish_ns(&scheduler, &flows[0], CLASS_BATCH, MS), 11 * MS); /* behind its own */
	ck_assert_uint_eq(scheduler_finish_ns(&scheduler, NULL, CLASS_BATCH, MS), 11 * MS);
	ck_assert_uint_eq(scheduler_finish_ns(&scheduler, &flows[1], CLASS_BATCH, MS), 2 * MS); /* half of the lane is its */
	ck_assert_uint_eq(scheduler_finish_ns(&scheduler, &flows[0], CLASS_REALTIME, MS), MS); /* before all that */
	scheduler.servers = 2;
	ck_assert_uint_eq(scheduler_finish_ns(&scheduler, NULL, CLASS_BATCH, MS), 6 * MS);
	for (int i = 0; i < 10; i++)
		ck_assert(scheduler_withdraw(&scheduler, &items[i]));
	ck_assert_uint_eq(scheduler_finish_ns(&scheduler, NULL, CLASS_BATCH, MS), MS);
}
END_TEST

START_TEST(whose_queue_is_full_is_said)
{
	struct scheduler scheduler;
	struct sched_group group;
	struct sched_flow flows[3];
	struct sched_item items[9];
	uint32_t queued, limit;
	scheduler_init(&scheduler);
	sched_group_init(&group, 100);
	for (int i = 0; i < 3; i++)
		sched_flow_init(&flows[i], &group, 100);
	scheduler.flow_queue_max = 2;
	flows[1].queue_max = 3;
	group.queue_max = 6;
	scheduler.queue_max = 8;
	int at = 0;
	for (int i = 0; i < 3; i++)
		while (scheduler_full(&scheduler, &flows[i], &queued, &limit) == SCHED_ROOM) {
			items[at] = (struct sched_item){.flow = &flows[i]};
			ck_assert(scheduler_submit(&scheduler, &items[at++], 0));
		}
	ck_assert_int_eq(at, 6); /* two, three, and one that the group still has room for */
	ck_assert_int_eq(scheduler_full(&scheduler, &flows[0], &queued, &limit), SCHED_FULL_FLOW);
	ck_assert(queued == 2 && limit == 2);
	ck_assert_int_eq(scheduler_full(&scheduler, &flows[1], &queued, &limit), SCHED_FULL_FLOW);
	ck_assert(queued == 3 && limit == 3);
	ck_assert_int_eq(scheduler_full(&scheduler, &flows[2], &queued, &limit), SCHED_FULL_GROUP);
	ck_assert(queued == 6 && limit == 6);
	scheduler.queue_max = 6;
	group.queue_max = 0;
	ck_assert_int_eq(scheduler_full(&scheduler, &flows[2], &queued, &limit), SCHED_FULL_LANE);
	items[8] = (struct sched_item){.flow = &flows[2]};
	ck_assert(!scheduler_submit(&scheduler, &items[8], 0));
}
END_TEST

START_TEST(withdrawn_items_leave_nothing)
{
	struct scheduler scheduler;
	struct sched_group group;
	struct sched_flow flows[3];
	struct sched_item items[300];
	scheduler_init(&scheduler);
	sched_group_init(&group, 100);
	for (int i = 0; i < 3; i++)
		sched_flow_init(&flows[i], &group, 100);
	srand(14);
	for (int round = 0; round < 200; round++) {
		bool queued[300];
		uint32_t left = 300;
		for (int i = 0; i < 300; i++) {
			items[i] = (struct sched_item){.flow = &flows[rand() % 3], .class = (uint8_t)(rand() % 3), .estimate_ns = (uint64_t)(rand() % 5000)};
			ck_assert(scheduler_submit(&scheduler, &items[i], 0));
			queued[i] = true;
		}
		while (left > 0) {
			int i = rand() % 300;
			if (rand() % 2 == 0) {
				ck_assert(scheduler_withdraw(&scheduler, &items[i]) == queued[i]);
			} else {
				uint64_t ready;
				struct sched_item *item = scheduler_pick(&scheduler, 0, &ready);
				ck_assert_ptr_nonnull(item);
				i = (int)(item - items);
				ck_assert(queued[i]);
				scheduler_complete(&scheduler, item->flow, item->class, item->estimate_ns, (uint64_t)(rand() % 9000));
			}
			left -= queued[i];
			queued[i] = false;
		}
		ck_assert_uint_eq(scheduler.queued, 0);
		ck_assert_uint_eq(scheduler.queued_ns, 0);
		ck_assert_uint_eq(scheduler.running, 0);
		for (int i = 0; i < CLASS_COUNT; i++)
			ck_assert_ptr_null(scheduler.classes[i].waiting.first);
	}
}
END_TEST

START_TEST(one_session_is_served_in_the_order_of_its_requests)
{
	struct scheduler scheduler;
	struct sched_group group;
	struct sched_flow flow;
	struct sched_item items[50];
	scheduler_init(&scheduler);
	sched_group_init(&group, 1);
	sched_flow_init(&flow, &group, 1);
	for (int i = 0; i < 50; i++) {
		items[i] = (struct sched_item){.flow = &flow, .class = CLASS_INTERACTIVE};
		ck_assert(scheduler_submit(&scheduler, &items[i], 0));
	}
	uint64_t ready;
	for (int i = 0; i < 50; i++) {
		ck_assert_ptr_eq(scheduler_pick(&scheduler, 0, &ready), &items[i]);
		scheduler_complete(&scheduler, &flow, CLASS_INTERACTIVE, items[i].estimate_ns, (uint64_t)i * 1000);
	}
	ck_assert_ptr_null(scheduler_pick(&scheduler, 0, &ready));
	ck_assert_uint_eq(ready, UINT64_MAX);
}
END_TEST

START_TEST(classes_have_names)
{
	for (uint32_t i = 0; i < CLASS_COUNT; i++)
		ck_assert_uint_eq(sched_class_parse(sched_class_name(i), strlen(sched_class_name(i))), i);
	ck_assert_uint_eq(sched_class_parse("batch2", 6), CLASS_COUNT);
	ck_assert_uint_eq(sched_class_parse("", 0), CLASS_COUNT);
	ck_assert_ptr_null(sched_class_name(CLASS_COUNT));
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("scheduler");
	TCase *tests = tcase_create("scheduler");
	tcase_set_timeout(tests, 120);
	tcase_add_loop_test(tests, two_sessions_share_device_time_by_weight_whatever_their_ops_cost, 0, 8);
	tcase_add_test(tests, two_tenants_share_by_weight_however_many_sessions_they_open);
	tcase_add_test(tests, a_hundred_sessions_of_equal_weight_get_the_same);
	tcase_add_test(tests, thousands_of_sessions_with_heavy_tails_get_the_same);
	tcase_add_loop_test(tests, what_was_recorded_is_all_served_and_urgent_work_waits_for_one_kernel_at_most, 0, 2);
	tcase_add_test(tests, who_was_recorded_to_ask_for_little_hardly_waits_when_all_is_too_much);
	tcase_add_test(tests, who_was_idle_gets_no_credit_for_it);
	tcase_add_test(tests, a_changed_weight_counts_from_then_on);
	tcase_add_test(tests, a_realtime_request_waits_for_one_running_kernel_at_most);
	tcase_add_test(tests, no_class_starves);
	tcase_add_test(tests, a_class_alone_has_all);
	tcase_add_test(tests, small_sessions_hardly_notice_a_large_one);
	tcase_add_test(tests, queues_are_bounded_and_others_go_on);
	tcase_add_test(tests, a_rate_bounds_device_time_and_leaves_the_rest_to_others);
	tcase_add_test(tests, a_rate_is_exact_over_a_long_time);
	tcase_add_test(tests, a_lone_bounded_tenant_is_served_again_when_its_bucket_fills);
	tcase_add_test(tests, a_bounded_session_leaves_its_tenants_time_to_the_others);
	tcase_add_test(tests, who_waits_for_a_rate_and_leaves_leaves_nothing);
	tcase_add_test(tests, when_a_job_would_be_done_is_said_by_class_and_share);
	tcase_add_test(tests, whose_queue_is_full_is_said);
	tcase_add_test(tests, withdrawn_items_leave_nothing);
	tcase_add_test(tests, one_session_is_served_in_the_order_of_its_requests);
	tcase_add_test(tests, classes_have_names);
	suite_add_tcase(suite, tests);
	return suite_run(suite);
}
