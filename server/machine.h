/* What of the machine opd may use: how many threads its kernels get where nobody says.
 *
 * Layer: server, bottom. Threads: any; reads the system each time, which takes milliseconds: ask once.
 * A core is a physical one, where hwloc says which are (built with Debian's libhwloc-dev): two kernels on the two threads of a core share its vector units and its cache, and don't gain. Without
 * hwloc each processor of the affinity mask counts. Either way no more than the control groups' quota of processor time allows, rounded up.
 * Not here: which of them what runs on; the kernel's scheduler knows better who else is there. */
#ifndef OPD_SERVER_MACHINE_H
#define OPD_SERVER_MACHINE_H

#include <stdint.h>

struct machine {
	uint32_t threads;    /* for kernels: at least 1 */
	uint32_t cores;      /* that this process may run on; 0: nobody knows */
	uint32_t processors; /* … as the kernel counts them, at least 1 */
	uint32_t quota;      /* how many of them at once its control groups allow, rounded up; 0: any */
};

void machine_read(struct machine *machine_out);

/* The quota alone, of the control groups that the file `groups` names (/proc/self/cgroup), of version 1 or 2, with file systems below `root` ("" but in tests). */
uint32_t machine_quota(const char *groups, const char *root);

#endif
