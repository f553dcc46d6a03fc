/* Isolated modules: a provider whose code runs in worker processes, so that a crash there is one request's error.
 *
 * Layer: server, below the registry (which alone opens modules). Threads: isolated_create and isolated_destroy alone; the module's functions as opd/provider.h says.
 * Life: isolated_create (starts a first worker: the module is loaded there, never here) → its `def` is opened as any module's → close → isolated_destroy.
 * To the rest of the daemon the module is an ordinary one: `plan` and `run` of its implementations go to a worker (server/worker.h) over a socket pair and shared memory. The module's predicates run in the
 * worker too, as part of `plan`, whose refusals are cached by shapes; its cost estimates aren't asked for. A worker runs one call at a time; there are as many as lane threads have
 * wanted at once, and an idle one is used again.
 * Operands are copied into the memory that a worker shares, results out of it, after their canaries were looked at: a worker sees nothing but what it is given, and can't change a result that was given
 * out. Large operands whose contents stay (weights) are kept by the workers that have had them, read-only (server/isolated_constant.h). All that memory is charged to the daemon.
 * A kernel has as many threads there as here, and lane threads without work help with its loops (server/isolated_help.h).
 * A worker that dies is one failure of what it ran (INTERNAL, with the signal or exit code); one that exceeds the provider's budget is killed (DEADLINE_EXCEEDED), and so is one whose result nobody has wanted for
 * CANCEL_GRACE. The next request starts another; if they die one after the other, not at once (UNAVAILABLE until then).
 * What isolated modules can't have: ops of their own, device backends and implementations for devices, set_shape, derived copies, in-place results. */
#ifndef OPD_SERVER_ISOLATED_H
#define OPD_SERVER_ISOLATED_H

#include <stdbool.h>
#include <stdint.h>

#include "providers/provider.h"
#include "server/failure.h"
#include "server/log.h"

struct account;
struct derived;
struct isolated;
struct provider;

/* What isolated modules need of the daemon. */
struct isolated_services {
	const char *program; /* that is a worker when it is started with --worker; NULL: there is none, and isolated modules are refused */
	struct account *account;
	struct derived *derived; /* that says which operands workers keep; NULL: none */
	uint64_t (*budget_ns)(void *context, const struct provider *provider); /* of one kernel; 0: any */
	/* tenant: whose call it was; NULL: nobody's in particular. */
	void (*failed)(void *context, const struct provider *provider, const opd_impl *impl, failure_kind kind, const char *tenant);
	void *context;
};

/* Starts a worker with the module at `path`, which was checked. UNIMPLEMENTED: no program. FAILED_PRECONDITION: `confined`, and this kernel doesn't confine it. Otherwise the module's own failure to load or to open, or
 * the worker's. `services` is copied. */
OPD_MUST_USE opd_status isolated_create(const char *path, bool confined, const struct isolated_services *services, struct log *log, struct isolated **isolated_out,
                                        opd_error *error);
void isolated_destroy(struct isolated *isolated);
const opd_module *isolated_module(const struct isolated *isolated);
/* Once a second: idle workers let go of what was dropped. */
void isolated_tick(struct isolated *isolated);
/* Once it is a provider: who is told of when its kernels fail. */
void isolated_set_provider(struct isolated *isolated, const struct provider *provider);
/* What of its workers' confinement this kernel doesn't give them ("seccomp filter: Invalid argument"); "": nothing. */
const char *isolated_unconfined(const struct isolated *isolated);
/* How many workers have ended before they were told to. */
uint64_t isolated_deaths(struct isolated *isolated);

#endif
