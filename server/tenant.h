/* A tenant: an authenticated identity, whose sessions share a weight, quotas and what they publish.
 *
 * Layer: server. Threads: any; the table has one lock, held for a few instructions. Fields say whose they are.
 * Life: tenants_create → tenant_get, tenant_ref, tenant_unref → tenants_destroy, when nobody has one any more. A tenant is there while a session or a publication of it is, and, where it has
 * quotas a second, for a while longer: who comes back finds what it has used up.
 * Not here: who a peer is (server/listener.h), what tenants publish (server/publications.h), in which order they run (server/scheduler.h). */
#ifndef OPD_SERVER_TENANT_H
#define OPD_SERVER_TENANT_H

#include <pthread.h>
#include <stdint.h>

#include "server/config.h"
#include "server/registry.h"
#include "server/scheduler.h"

#define TENANT_NAME_BYTES 64u

struct account;
struct memory;

struct tenant {
	struct tenant *next;       /* the table's */
	char name[TENANT_NAME_BYTES];
	uint32_t refs;             /* under the table's lock */
	uint64_t resting_until_ns; /* nobody has it; until then it may come back */
	_Atomic uint32_t sessions; /* that are there */
	uint32_t publications;     /* under the publications' lock */
	struct account *total;     /* all that it and its sessions have */
	struct account *account;   /* pays for what no session pays */
	struct tenant_policy policy; /* the loops': a reload changes it at a standstill */
	uint32_t lane;             /* number of its CPU lane; for as long as it is there, whatever a reload says */
	struct quota quota;        /* of its sessions together */
	struct sched_group *groups[REGISTRY_DEVICES_MAX]; /* by device number, 0: the CPU lane. Made on first use, under the table's lock; in use under the lane's */
};

struct tenants;

/* NULL: out of memory. */
struct tenants *tenants_create(struct memory *memory);
/* NULL is allowed. */
void tenants_destroy(struct tenants *table);
/* Now and then: forgets tenants that nobody has had for long enough. */
void tenants_sweep(struct tenants *table, uint64_t now_ns);

/* The tenant of this name, made with `policy` where there is none yet; referenced. NULL: out of memory. */
struct tenant *tenant_get(struct tenants *table, const char *name, const struct tenant_policy *policy);
struct tenant *tenant_ref(struct tenants *table, struct tenant *tenant);
/* NULL is allowed. */
void tenant_unref(struct tenants *table, struct tenant *tenant);
/* It is treated so from now on, but on the lanes, which are their owner's to tell. */
void tenant_set_policy(struct tenant *tenant, const struct tenant_policy *policy);
/* Its place in the order of a lane. NULL: out of memory. */
struct sched_group *tenant_group(struct tenants *table, struct tenant *tenant, uint32_t device);
/* Each tenant that is there, under the lock: no calls back into the table. */
void tenants_walk(struct tenants *table, void (*visit)(struct tenant *tenant, void *argument), void *argument);

#endif
