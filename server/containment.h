/* Containment: what operators have said of a provider, failures of its kernels counted, and the quarantine of those that fail too often.
 *
 * Layer: server, above the registry. Threads: containment_failed and containment_policy from any; the others from loops'. One short lock, never held across the registry's.
 * Life: containment_create → containment_configure (with each configuration, and after a module was loaded) → containment_failed…, containment_tick once a second → containment_destroy.
 * An implementation with `failures` of them within `window`, or all of a provider's with `provider_failures` of its together, is taken out of the registry's snapshot: lists pass it over
 * (SEMANTICS 27), requests dispatched before go on. After the cool-down it is back on trial: the first failure within a window takes it out again, for twice as long (at most 64 times
 * the cool-down); a window without one ends the trial. `native` is an op's definition: its failures are counted, and it stays.
 * Nobody takes a provider away from others: failures that only their own requests notice (statuses, divergences) must be of two tenants at least, unless no other tenant has a session; what was
 * taken out then is back within a second of another's coming. Hangs, crashes and overruns hurt everybody, and count whoever caused them.
 * What counts: the kernel's own failures (statuses INTERNAL, UNKNOWN, DATA_LOSS), writing past an output, hanging, crashing (isolated modules), results that another provider doesn't confirm.
 * What the request is to blame for (INVALID_ARGUMENT, OUT_OF_RANGE…), memory that isn't there and cancelling don't.
 * Not here: the checks themselves (server/execute.c, server/watch.h). */
#ifndef OPD_SERVER_CONTAINMENT_H
#define OPD_SERVER_CONTAINMENT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "server/config.h"
#include "server/failure.h"
#include "server/registry.h"

struct containment;
struct tenants;

/* What holds for a provider; read by lanes while the loop changes it. */
struct containment_policy {
	_Atomic bool checked;
	_Atomic uint64_t budget_ns; /* a kernel's; 0: any */
	_Atomic uint32_t compare;       /* index of the provider that its results are compared with; UINT32_MAX: none */
	_Atomic uint32_t compare_every; /* one run of so many; 0: none */
	_Atomic uint64_t compare_seen;
};

OPD_MUST_USE opd_status containment_create(struct registry *registry, struct tenants *tenants, struct log *log, struct containment **containment_out, opd_error *error);
void containment_destroy(struct containment *containment);

/* Takes over `quarantine`, `checked` and `providers`; looks the names up among the providers that are there now. */
void containment_configure(struct containment *containment, const struct config *config);

const struct containment_policy *containment_policy(const struct containment *containment, const struct provider *provider);

struct containment_policy *containment_policy_of(struct containment *containment, const struct provider *provider);

/* A kernel has failed for a request of this tenant (NULL: nobody's in particular). Whoever asks the registry for a snapshot after this has returned doesn't get the implementation any more, if this was one failure too many (while a module opens: within
 * a second). */
void containment_failed(struct containment *containment, const struct impl *impl, failure_kind kind, const char *tenant);
/* The same, where nobody knows which of the provider's implementations it was. */
void containment_provider_failed(struct containment *containment, const struct provider *provider, failure_kind kind, const char *tenant);
/* The same for a status of a kernel, if it is one that counts. */
void containment_note(struct containment *containment, const struct impl *impl, opd_status status, const char *tenant);

/* A kernel on the I/O loop took so much of its thread's CPU time (a sample of them is looked at): where that is too much by far three times in a row, its implementation runs on the lane from now on,
 * whatever it estimates. Any thread; of two at once one may not count. */
void containment_ran_on_loop(struct containment *containment, const struct impl *impl, uint64_t cpu_ns);
/* The last measured one took too long: the next is to be measured as well. */
bool containment_suspects(const struct containment *containment, const struct impl *impl);
/* It must not run on the loop any more. */
bool containment_off_loop(const struct containment *containment, const struct impl *impl);

/* Ends cool-downs. */
void containment_tick(struct containment *containment, uint64_t now_ns);

/* Back at once, with a clean slate: of the provider, all that is out, or its implementation of one op (NULL: all). NOT_FOUND: no such provider or op; FAILED_PRECONDITION: nothing of it is
 * out. */
OPD_MUST_USE opd_status containment_restore(struct containment *containment, const struct snapshot *snapshot, struct msg_text provider, struct msg_text op,
                                            opd_error *error);

/* Failures of all kinds since the start. */
uint64_t containment_failures(struct containment *containment, const struct provider *provider);

#endif
