/* struct server itself, for the files of this folder that make it up; everyone else sees server/server.h.
 *
 * Layer: server, internal. Threads: stated with each field. */
#ifndef OPD_SERVER_DAEMON_H
#define OPD_SERVER_DAEMON_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#include "server/config.h"
#include "server/device_lane.h"
#include "server/io_loop.h"
#include "server/lane.h"
#include "server/lanes.h"
#include "server/machine.h"
#include "server/plans.h"
#include "server/registry.h"
#include "server/server.h"
#include "server/standstill.h"
#include "server/tensors.h"

struct allocation;
struct containment;
struct derived;
struct differential;
struct listener;
struct conn;
struct metrics;
struct placement;
struct scrape;

/* A lane of the CPU, as loop 0 sees it once a second; read by all. */
struct cpu_lane {
	struct lane *lane;
	uint64_t done_before; /* jobs that had ended at the last tick */
	_Atomic uint64_t progress_us; /* when it last got on, or had nothing that waits */
	_Atomic uint32_t waiting;     /* at the last tick */
};

struct server {
	struct log *log;
	struct config *config;         /* the loops' alone: a reload changes it at a standstill, and frees the one before */
	struct machine machine;        /* as it was at the start */
	struct io_loop *loops;         /* the first has the daemon's life */
	struct standstill standstill;  /* of the loops */
	uint32_t loop_count;
	struct metrics *direct_metrics; /* of all direct callers together; each loop has its own */
	_Atomic bool checked;          /* what lanes and direct callers need of it: some provider's outputs have canaries */
	_Atomic uint64_t inline_ns;
	_Atomic uint32_t refuse_uploads; /* percent */
	_Atomic uint64_t segment_ns;
	_Atomic uint32_t batch_rows;    /* of a batch, at most */
	_Atomic uint64_t batch_shared_bytes; /* of the operands that its requests share, at least */
	_Atomic bool batch_devices;     /* so on devices, too */
	_Atomic uint64_t batches;       /* kernels that ran for more than one request */
	_Atomic uint64_t batched;       /* those requests */
	struct registry *registry;
	struct containment *containment;
	struct differential *differential;
	struct plans *plans;
	struct derived *derived;
	struct memory memory;
	struct account *account; /* what modules allocate */
	struct placement *placement;
	struct tenants *tenants;
	struct publications *publications;
	struct lane *lane; /* everybody's, and the daemon's own work: the first of: */
	uint32_t lane_count;
	struct cpu_lane lanes[1 + CONFIG_LANES_MAX]; /* the others are kept for some tenants */
	_Atomic(struct device_lane *) device_lanes[REGISTRY_DEVICES_MAX]; /* by device number; started on first use, under the mutex */
	uint64_t started_us;

	uint32_t direct_count;  /* sessions that are handed over to a direct caller */
	struct listener *listeners;
	struct scrape *scrapes; /* connections of the metrics endpoint */
	uint32_t scrape_count;
	_Atomic uint64_t last_session; /* its number */
	bool draining;          /* the loops' alone: changed at a standstill */
	bool drain_failed;
	bool ending;            /* the lanes are stopped: nothing may be submitted to one any more */
	uint64_t drain_until_us;

	struct log_limit opened_lines;  /* what clients can fill a log with: `log.lines` a minute of each */
	struct log_limit closed_lines;
	struct log_limit refused_lines;
	struct log_limit broken_lines;
	struct log_limit list_warnings; /* of fallbacks that requests' own lists allow */
	_Atomic uint64_t requests; /* accepted since the start */
	_Atomic uint64_t uploads_refused;  /* for daemon memory */
	_Atomic uint64_t sessions_refused;         /* for daemon memory */
	_Atomic uint64_t caches_dropped;   /* for daemon memory: how often */
	_Atomic uint64_t slow_readers;             /* cut off */
	_Atomic uint64_t tls_handshakes;           /* that were finished */
	_Atomic uint64_t tls_resumed;              /* of them, by a ticket */
	_Atomic uint64_t sessions_opened;
	_Atomic uint64_t hellos_refused;
	bool caches_are_dropped;           /* memory has not come below the mark since */
	_Atomic uint64_t graph_runs;       /* begun since the start */
	_Atomic uint64_t graph_dispatches; /* of them, those that had to prepare anew */

	pthread_mutex_t mutex; /* of what other threads ask for: */
	struct allocation *allocations; /* host memory that modules hold */
	_Atomic int drain_asked;         /* how often */
	_Atomic uint64_t drain_timeout_us;
};

/* Any thread: wakes loop 0. */
void server_wake(struct server *server);

/* Makes the configuration's lists the registry's, all or none; an error says where in the file. */
OPD_MUST_USE opd_status server_set_priorities(struct server *server, const struct config *config, opd_error *error);

/* Keeps `config`; what lanes read of it is copied. The one before is the caller's to free. */
void server_take_config(struct server *server, struct config *config);
/* The configuration's bounds of queues become the lanes'. */
void server_bound_queues(struct server *server);

/* At least so many percent of limits.memory hold what can't be given up; written as the reason, which begins with `what`. 100: never. */
bool server_memory_filled(const struct server *server, uint32_t percent, const char *what, opd_error *error);

/* Connections of all loops, and those on their way to one. */
uint32_t server_sessions(const struct server *server);
/* What threads record into: direct callers together, and each loop. */
uint32_t server_metrics_count(const struct server *server);
struct metrics *server_metrics(const struct server *server, uint32_t index);

/* Loop 0's: it was woken, perhaps because a drain was asked for or can end; a second has passed. */
void server_on_wake(struct server *server);
void server_on_tick(struct server *server, uint64_t now_ns);

#endif
