/* What an isolated module's worker process may ask of the kernel: to compute, to have threads and memory, to read files. No other process, no network, no file that is written, made or removed, no signal
 * to anybody else, no way around (namespaces, io_uring, tracing).
 *
 * Layer: server, of the worker. Threads: before there is a second one.
 * By a seccomp filter that also its threads have and nothing takes away. Refused calls fail with EPERM, opening to write with EACCES (ENOSYS, where libc then asks in a way that can be looked at): a library that can do
 * without goes on. It is the second wall: what keeps a worker's faults away from the daemon is that it is another process.
 * Not here: descriptors, privileges, limits (server/worker.c). */
#ifndef OPD_SERVER_CONFINE_H
#define OPD_SERVER_CONFINE_H

#include <stdbool.h>

/* After PR_SET_NO_NEW_PRIVS. False: this kernel or machine has no such filters, and nothing is confined; errno says why (ENOSYS: nobody has written one for this machine). */
bool confine_calls(void);

#endif
