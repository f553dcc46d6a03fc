/* Lane threads that help a worker process with its kernel's loops: each wakes a thread there and waits until that has nothing left to do.
 *
 * Layer: server, private to isolated*.c. Threads: the lane thread that has the process.
 * So a loop in a worker is to the lane what one in the daemon is: only threads without work help, until it has no share left, and their time is charged to the job (server/lane.h).
 * The worker's side, and what goes over process->helpers: server/worker_loop.h. */
#ifndef OPD_SERVER_ISOLATED_HELP_H
#define OPD_SERVER_ISOLATED_HELP_H

#include "server/isolated_process.h"

/* process_wait for the end of what the kernel was sent, with help for its loops meanwhile. What isn't PROCESS_MESSAGE has killed it. exec: NULL where it has no lane. */
process_event help_wait(struct process *process, uint64_t limit_ns, const opd_exec *exec);

#endif
