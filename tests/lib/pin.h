/* Where threads run: pins a thread or all threads of a process to one core.
 *
 * Layer: tests, header only, Linux. Threads: any.
 * Cores are counted among those that the caller may use: core 0 is the first of them. PIN_ANY lifts a pin. All return false with
 * errno set when the kernel refuses. */
#ifndef OPD_TESTS_LIB_PIN_H
#define OPD_TESTS_LIB_PIN_H

#include <dirent.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>

#define PIN_ANY (-1)

/* What the process might use when it was started; filled in by the first call, before anything is pinned. */
static inline const cpu_set_t *pin_allowed(void)
{
	static cpu_set_t allowed;
	static bool known;
	if (!known) {
		CPU_ZERO(&allowed);
		known = sched_getaffinity(0, sizeof allowed, &allowed) == 0;
	}
	return &allowed;
}

static inline int pin_cores(void)
{
	return CPU_COUNT(pin_allowed());
}

/* The set of one core by its number among those allowed. */
static inline cpu_set_t pin_set(int core)
{
	cpu_set_t set = *pin_allowed();
	if (core == PIN_ANY)
		return set;
	int seen = 0;
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, pin_allowed()) && seen++ != core)
			CPU_CLR(cpu, &set);
	return set;
}

/* The calling thread, and threads and children that it makes later. */
static inline bool pin_self(int core)
{
	cpu_set_t set = pin_set(core);
	return sched_setaffinity(0, sizeof set, &set) == 0;
}

/* Every thread that the process has now. */
static inline bool pin_process(pid_t pid, int core)
{
	cpu_set_t set = pin_set(core);
	char path[64];
	(void)snprintf(path, sizeof path, "/proc/%d/task", (int)pid);
	DIR *tasks = opendir(path);
	if (tasks == NULL)
		return false;
	bool pinned = true;
	for (struct dirent *task = readdir(tasks); task != NULL; task = readdir(tasks))
		if (task->d_name[0] != '.' && sched_setaffinity((pid_t)atoi(task->d_name), sizeof set, &set) != 0)
			pinned = false;
	(void)closedir(tasks);
	return pinned;
}

#endif
