/* The worker process of an isolated module: loads it, and runs its predicates, plans and kernels on calls that lie in memory shared with the daemon.
 *
 * Layer: server, a process of its own: nothing of the daemon's is here but this and what it uses (server/isolated_call.h, server/module.h). Threads: one,
 * and those that help with a kernel's loops (server/worker_loop.h).
 * Started by server/isolated_process.c as `opd --worker PID PATH [confined]` with the socket pair as descriptor WORKER_SOCKET. It closes every other descriptor but 0 to 2 (0 and 1 are /dev/null), gives up gaining privileges
 * and leaving core files, and dies with the daemon, also in mid-kernel. What the kernel doesn't give it of that is told to the daemon, or with `confined` its end. That contains faults, not malice: it is still
 * the daemon's user. */
#ifndef OPD_SERVER_WORKER_H
#define OPD_SERVER_WORKER_H

#include <stdbool.h>

#define WORKER_FLAG "--worker"
#define WORKER_CONFINED "confined"
#define WORKER_SOCKET 3

/* Serves until the daemon says so or is gone; the process's exit code. parent: the daemon's pid, as text. confined: not unless the kernel confines this process. */
int worker_main(const char *parent, const char *path, bool confined);

#endif
