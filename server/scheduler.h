/* Who runs next on a lane: fair among tenants, then among a tenant's sessions, by measured device time, in classes.
 *
 * Layer: server, bottom. It reads no clock, takes no lock, allocates nothing and knows no request: its caller says what time it is, which is how the tests run hours of
 * it in seconds. Threads: its owner's (a lane holds its mutex).
 * Life: scheduler_init → group and flow init → scheduler_submit, scheduler_pick, scheduler_complete… Nothing is to be freed: a flow or group of which nothing is queued or
 * running is in no list of the scheduler's and may go.
 *
 * The order is that of start-time fair queueing (Goyal, Vin, Cheng: "Start-time Fair Queueing", 1996), one level for tenants and one for the sessions of each: whoever
 * has had the least device time by its weight comes first, and who was idle gets no credit for it (its time starts at that of who was served last). What
 * a job will take isn't known when it is picked: it is charged its estimate then, and the difference when it is done.
 * Classes go in strict order, but each lower one that waits is owed a share of what the higher ones use (min_share), and is served once that makes up for its next job.
 * Each class has its own order: what a tenant does in `batch` doesn't count against its `realtime` work. */
#ifndef OPD_SERVER_SCHEDULER_H
#define OPD_SERVER_SCHEDULER_H

#include <stdbool.h>
#include <stdint.h>

#include "server/heap.h"

typedef enum sched_class {
	CLASS_REALTIME = 0,
	CLASS_INTERACTIVE = 1,
	CLASS_BATCH = 2,
	CLASS_COUNT = 3,
} sched_class;

#define SCHED_WEIGHT_DEFAULT 100u
#define SCHED_WEIGHT_MAX 1000000u
/* A job that nobody could estimate, of a flow that has had none yet. */
#define SCHED_ESTIMATE_DEFAULT_NS 10000u
/* 18 minutes: what is estimated to take longer counts as this much, so that the sum of all that may be queued (16,777,216 jobs) is a number, and a charge taken back leaves no rounding behind. */
#define SCHED_ESTIMATE_MAX_NS (((uint64_t)1 << 40) - 1)
/* Credit of a waiting class is bounded: a long wait doesn't become a long burst. */
#define SCHED_CREDIT_MAX_NS 1000000000.0

struct sched_flow;

/* Whom an item has waited behind: jobs that were picked between its submission and its own pick, and device time of those that ended meanwhile. */
struct sched_behind {
	uint64_t own_jobs;    /* of its own flow */
	uint64_t group_jobs;  /* of other flows of its group */
	uint64_t other_jobs;  /* of other groups */
	uint64_t class_jobs[CLASS_COUNT]; /* all of them, by class */
	uint64_t own_ns;
	uint64_t group_ns;
	uint64_t other_ns;
	uint32_t running; /* when it came */
};

/* In the job that it stands for. */
struct sched_item {
	struct sched_item *next;
	struct sched_item **link; /* what points to it while it is queued, else NULL */
	struct sched_flow *flow;
	uint64_t estimate_ns; /* of its device time; 0: unknown. From pick on: what it was charged */
	uint64_t queued_ns;   /* by scheduler_submit */
	struct sched_behind *behind; /* filled in when it is picked; NULL: nobody asks */
	uint8_t class;        /* sched_class */
	bool unbounded;       /* never refused */
	bool first;           /* before what its flow has queued */
};

/* Whom a level serves: those that have something to run, by the device time that each has had over its weight. */
struct sched_level {
	struct heap waiting;
	double virtual_ns; /* of who was served last: where newcomers start */
	uint64_t weight;   /* of those that wait, together */
};

/* What has run, for whoever asks. */
struct sched_usage {
	uint64_t jobs;
	uint64_t device_ns;
	uint64_t wait_ns; /* from submit to pick */
	uint64_t wait_max_ns;
};

struct sched_flow_class {
	struct heap_node node; /* among its group's flows; key: virtual time */
	struct sched_item *head, **tail;
};

struct sched_group_class {
	struct heap_node node; /* among the groups */
	struct sched_level flows;
};

/* Device time a second that somebody may use, as a bucket that holds one second's. */
struct sched_bucket {
	uint64_t rate_ns; /* 0: any */
	double tokens_ns;
	uint64_t filled_ns;
	struct heap_node throttled; /* among the scheduler's, while the bucket is empty and something is queued; key: when it will not be */
};

/* A tenant on one lane. */
struct sched_group {
	struct sched_group_class classes[CLASS_COUNT];
	uint32_t weight;
	uint32_t queued;
	uint32_t queue_max; /* items of it that may be queued; 0: any */
	uint32_t running;
	uint64_t queued_ns; /* estimates of what is queued */
	uint64_t picks; /* of its items */
	struct sched_bucket bucket;
	struct sched_usage usage;
};

/* A session on one lane. */
struct sched_flow {
	struct sched_flow_class classes[CLASS_COUNT];
	struct sched_group *group;
	uint32_t weight;
	uint32_t queued;
	uint32_t queue_max; /* 0: the scheduler's flow_queue_max */
	uint32_t running;
	uint64_t queued_ns; /* estimates of what is queued */
	uint64_t picks;
	double mean_ns;     /* of its jobs, lately: the estimate of one that has none */
	struct sched_bucket bucket;
	struct sched_usage usage;
};

struct scheduler {
	struct sched_level classes[CLASS_COUNT]; /* of groups */
	double credit_ns[CLASS_COUNT];
	double min_share[CLASS_COUNT]; /* of the time that higher classes use while this one waits; 0 to 1 */
	uint32_t waiting[CLASS_COUNT]; /* items queued */
	uint64_t waiting_ns[CLASS_COUNT]; /* their estimates */
	uint64_t picks[CLASS_COUNT];
	struct heap throttled_groups;
	struct heap throttled_flows;
	bool rates_forgotten;
	uint32_t queued;
	uint32_t running;
	uint64_t queued_ns;
	uint64_t device_ns;      /* used by all so far */
	uint32_t queue_max;      /* items; 0: any */
	uint32_t flow_queue_max; /* of one flow */
	uint32_t servers;        /* that run jobs at once, for estimates of waits; at least 1 */
};

/* Shares of 0.1 for interactive and 0.05 for batch, no bounds, one server. */
void scheduler_init(struct scheduler *scheduler);

/* weight: 1 to SCHED_WEIGHT_MAX, relative to the others' at its level. */
void sched_group_init(struct sched_group *group, uint32_t weight);
void sched_flow_init(struct sched_flow *flow, struct sched_group *group, uint32_t weight);
void sched_group_set_weight(struct scheduler *scheduler, struct sched_group *group, uint32_t weight);
void sched_flow_set_weight(struct sched_flow *flow, uint32_t weight);
/* Device nanoseconds a second; 0: no bound. */
void sched_group_set_rate(struct scheduler *scheduler, struct sched_group *group, uint64_t rate_ns, uint64_t now_ns);
void sched_flow_set_rate(struct scheduler *scheduler, struct sched_flow *flow, uint64_t rate_ns, uint64_t now_ns);
/* Nobody waits for its rate any more: at the end, what is queued still runs. */
void scheduler_forget_rates(struct scheduler *scheduler);

/* Whose queue is full, and how full, if one is. */
typedef enum sched_full {
	SCHED_ROOM = 0,
	SCHED_FULL_FLOW = 1,
	SCHED_FULL_GROUP = 2,
	SCHED_FULL_LANE = 3,
} sched_full;
sched_full scheduler_full(const struct scheduler *scheduler, const struct sched_flow *flow, uint32_t *queued_out, uint32_t *limit_out);

/* item->flow, class, estimate_ns, unbounded and first are set. False: the queue of the lane, of the group or of the flow is full (scheduler_full); nothing has changed. */
bool scheduler_submit(struct scheduler *scheduler, struct sched_item *item, uint64_t now_ns);
/* One that was picked and completed for now goes on later: before what its flow has queued since, whatever the bounds. estimate_ns is set anew. */
void scheduler_resubmit(struct scheduler *scheduler, struct sched_item *item, uint64_t now_ns);
/* Takes a queued item back. False: it isn't queued. */
bool scheduler_withdraw(struct scheduler *scheduler, struct sched_item *item);
/* The item to run now; NULL: none. Where all that wait have used up their rates, *ready_ns_out says when to ask again (else UINT64_MAX). */
struct sched_item *scheduler_pick(struct scheduler *scheduler, uint64_t now_ns, uint64_t *ready_ns_out);
/* Takes a queued item out of its turn, to run with one that was picked: charged and counted as if it had been picked itself. False: it waits for its rate, and stays. */
bool scheduler_take(struct scheduler *scheduler, struct sched_item *item, uint64_t now_ns);
/* Something is queued that waits for no rate: scheduler_pick would give it now. */
bool scheduler_runnable(const struct scheduler *scheduler);
/* A picked item of this flow and class, charged estimate_ns, took device_ns. The item itself may be gone already. */
void scheduler_complete(struct scheduler *scheduler, struct sched_flow *flow, sched_class class, uint64_t estimate_ns, uint64_t device_ns);
/* Device time that went by the scheduler: a kernel that ran on the I/O loop. */
void scheduler_charge(struct scheduler *scheduler, struct sched_flow *flow, sched_class class, uint64_t device_ns);

/* How long the flow's queue will take at its present share and within its rates: what a client that was refused is told to wait. */
uint64_t scheduler_wait_ns(const struct scheduler *scheduler, const struct sched_flow *flow, sched_class class);
/* How long what is queued before a job of this class and cost would take, and the job itself, if it came now; what runs isn't counted. flow NULL: one that nobody has seen yet. */
uint64_t scheduler_finish_ns(const struct scheduler *scheduler, const struct sched_flow *flow, sched_class class, uint64_t cost_ns);
/* Of the lane's time, what the flow gets while everybody who waits now goes on waiting; 0 to 1. */
double scheduler_share(const struct scheduler *scheduler, const struct sched_flow *flow, sched_class class);

/* "realtime"…; NULL for a number out of range. */
const char *sched_class_name(uint32_t class);
/* CLASS_COUNT: no such name. */
sched_class sched_class_parse(const char *name, uint64_t bytes);

#endif
