/* A lane on a virtual clock: server/scheduler.h in front of so many servers, and clients that send it jobs. Hours of it run in seconds, always the same for one seed.
 *
 * Layer: tests. Threads: one.
 * Life: simulator_init → simulator_tenant, simulator_client… → simulator_run… → results are read → simulator_fini. */
#ifndef OPD_TESTS_LIB_SIMULATOR_H
#define OPD_TESTS_LIB_SIMULATOR_H

#include <stdint.h>

#include "server/scheduler.h"
#include "tests/lib/histogram.h"

/* What one job costs. */
typedef enum sim_costs {
	SIM_FIXED = 0,
	SIM_EXPONENTIAL = 1,
	SIM_PARETO = 2, /* heavy tail: index 1.5, from cost_ns / 3, cut off at 1000 times the mean */
} sim_costs;

/* How a client sends, and what. */
struct sim_work {
	sched_class class;
	uint32_t in_flight;     /* closed: so many always under way, each followed by the next after think_ns. 0: open */
	double think_ns;
	double interval_ns;     /* open: mean between arrivals (exponential) */
	uint64_t from_ns, until_ns; /* when it sends; until 0: for ever */
	sim_costs costs;
	double cost_ns;         /* mean */
	bool estimated;         /* the scheduler is told the true cost; else nothing */
	const struct sim_arrival *trace; /* recorded instead: [trace_count] */
	uint32_t trace_count;
	struct sim_client *as; /* whose flow it uses: they wait in one queue; NULL: its own */
};

struct sim_arrival {
	uint64_t at_ns;
	uint64_t cost_ns;
};

struct sim_client {
	struct sim_work work;
	struct sched_flow flow;
	uint32_t next_arrival; /* of the trace */
	uint64_t refused;
	uint64_t completed;
	uint64_t device_ns;
	struct histogram *waits; /* NULL: not asked for */
};

struct simulator {
	struct scheduler scheduler;
	uint64_t now_ns;
	uint64_t random;
	uint32_t servers;
	uint32_t busy;
	uint64_t busy_ns; /* server time spent */
	uint64_t idle_while_waiting_ns; /* servers free though something waits and has a rate left: never, if the order conserves work */
	uint64_t picks;
	struct heap events;
	uint32_t tenant_count, client_count;
	struct sched_group **tenants;
	struct sim_client **clients;
};

/* Exits where memory is short: it is a test's. */
void simulator_init(struct simulator *simulator, uint32_t servers, uint64_t seed);
struct sched_group *simulator_tenant(struct simulator *simulator, uint32_t weight);
struct sim_client *simulator_client(struct simulator *simulator, struct sched_group *tenant, uint32_t weight, struct sim_work work);
/* The waits of this client from now on. */
void simulator_watch(struct sim_client *client);
/* Until the clock shows this. */
void simulator_run(struct simulator *simulator, uint64_t until_ns);
void simulator_fini(struct simulator *simulator);

/* Uniform in [0, 1). */
double simulator_random(struct simulator *simulator);

#endif
