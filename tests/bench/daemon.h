/* A daemon of its own for one benchmark: started, pinned, looked at from outside, ended.
 *
 * Layer: bench. Threads: one at a time.
 * Life: daemon_start → … → daemon_stop. It listens on a Unix socket in `directory` and on a free loopback port; it dies with the
 * benchmark. Errors: as everywhere in the benchmarks, bench_fail. */
#ifndef OPD_BENCH_DAEMON_H
#define OPD_BENCH_DAEMON_H

#include <stdint.h>
#include <sys/types.h>

struct daemon {
	pid_t pid;
	char unix_address[128]; /* as opd_connect takes it */
	char tcp_address[64];
};

/* `preload` goes into LD_PRELOAD of the daemon (NULL: none). Returns when it accepts connections. */
void daemon_start(struct daemon *daemon, const char *binary, const char *directory, const char *preload);
/* The same with further options of its command line, the last of them NULL (64 in all). */
void daemon_start_with(struct daemon *daemon, const char *binary, const char *directory, const char *preload, const char *const *more);
void daemon_stop(struct daemon *daemon);

/* Resident memory now, and its highest since the start or the last reset, in bytes. */
uint64_t daemon_resident_bytes(const struct daemon *daemon);
uint64_t daemon_peak_bytes(const struct daemon *daemon);
void daemon_peak_reset(const struct daemon *daemon);

#endif
