/* What of the machine opd may use: how many threads its kernels get where nobody says.
 *
 * Layer: server, bottom. Threads: any; reads the system each time.
 * A core is a physical one: two kernels on the two threads of a core share its vector units and its cache, and don't gain. The kernel says in /sys which processors share one; where it doesn't, each processor of the
 * affinity mask counts. Either way no more than the control groups' quota of processor time allows, rounded up. (hwloc would say the same; for this one number it isn't worth a library in a daemon whose every
 * allocation may fail, tests/faults.)
 * Not here: which of them what runs on; the kernel's scheduler knows better who else is there. */
#ifndef OPD_SERVER_MACHINE_H
#define OPD_SERVER_MACHINE_H

#include <sched.h>
#include <stdint.h>

struct machine {
	uint32_t threads;    /* for kernels: at least 1 */
	uint32_t cores;      /* that this process may run on; 0: nobody knows */
	uint32_t processors; /* … as the kernel counts them, at least 1 */
	uint32_t quota;      /* how many of them at once its control groups allow, rounded up; 0: any */
};

void machine_read(struct machine *machine_out);

/* How many I/O loops it gets where nobody says: one of its threads in four, from four on at least two, and no more than four. */
uint32_t machine_loops(const struct machine *machine);

/* Of how many cores these are processors, with file systems below `root` ("" but in tests); 0: the kernel doesn't say. */
uint32_t machine_cores(const cpu_set_t *processors, const char *root);

/* The quota alone, of the control groups that the file `groups` names (/proc/self/cgroup), of version 1 or 2, with file systems below `root` ("" but in tests). */
uint32_t machine_quota(const char *groups, const char *root);

#endif
