#include "server/machine.h"

#include <inttypes.h>
#include <limits.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* ---- Control groups ---- */

/* "200000 100000" of cpu.max; 0: "max", or no such file. */
static uint32_t read_max(const char *path)
{
	uint64_t quota, period;
	FILE *file = fopen(path, "re");
	if (file == NULL)
		return 0;
	const int count = fscanf(file, "%" SCNu64 " %" SCNu64, &quota, &period);
	(void)fclose(file);
	const uint64_t processors = count == 2 && quota != 0 && period != 0 ? (quota - 1) / period + 1 : 0;
	return processors < UINT32_MAX ? (uint32_t)processors : 0;
}

/* A number that may be negative: no limit, as is a missing file. */
static uint64_t read_number(const char *folder, const char *name)
{
	char path[PATH_MAX];
	int64_t number = 0;
	if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path)
		return 0;
	FILE *file = fopen(path, "re");
	if (file == NULL)
		return 0;
	const int count = fscanf(file, "%" SCNd64, &number);
	(void)fclose(file);
	return count == 1 && number > 0 ? (uint64_t)number : 0;
}

static uint32_t read_folder(const char *folder, bool v2)
{
	char path[PATH_MAX];
	if (v2)
		return snprintf(path, sizeof path, "%s/cpu.max", folder) < (int)sizeof path ? read_max(path) : 0;
	const uint64_t quota = read_number(folder, "cpu.cfs_quota_us");
	const uint64_t period = read_number(folder, "cpu.cfs_period_us");
	return quota == 0 || period == 0 || quota / period >= UINT32_MAX ? 0 : (uint32_t)((quota - 1) / period + 1);
}

static uint32_t less(uint32_t one, uint32_t other)
{
	return one == 0 || (other != 0 && other < one) ? other : one;
}

/* A group's own, and those of all that it is in. In a container the path is one of the host's that isn't there: the mount's top is its own group then. */
static uint32_t read_group(const char *mount, const char *group, bool v2)
{
	char folder[PATH_MAX];
	const size_t top = strlen(mount);
	if (snprintf(folder, sizeof folder, "%s%s", mount, group) >= (int)sizeof folder)
		return 0;
	uint32_t found = read_folder(folder, v2);
	for (size_t end = strlen(folder); end > top; end--)
		if (folder[end - 1] == '/') {
			folder[end - 1] = '\0';
			found = less(read_folder(folder, v2), found);
		}
	return found;
}

/* Whether "cpu" is one of "cpu,cpuacct". */
static bool has_cpu(const char *controllers)
{
	while (controllers != NULL) {
		if (strncmp(controllers, "cpu", 3) == 0 && (controllers[3] == ',' || controllers[3] == '\0'))
			return true;
		controllers = strchr(controllers, ',');
		controllers = controllers == NULL ? NULL : controllers + 1;
	}
	return false;
}

/* A line of /proc/self/cgroup: "0::/user.slice", "4:cpu,cpuacct:/docker/…". */
static uint32_t read_line(char *line, const char *root)
{
	char *controllers = strchr(line, ':');
	char *group = controllers == NULL ? NULL : strchr(controllers + 1, ':');
	if (group == NULL)
		return 0;
	*group++ = '\0';
	controllers++;
	group[strcspn(group, "\n")] = '\0';
	char mount[PATH_MAX];
	const bool v2 = *controllers == '\0';
	if ((!v2 && !has_cpu(controllers)) || snprintf(mount, sizeof mount, "%s/sys/fs/cgroup%s%s", root, v2 ? "" : "/", controllers) >= (int)sizeof mount)
		return 0;
	return read_group(mount, group, v2);
}

uint32_t machine_quota(const char *groups, const char *root)
{
	char line[PATH_MAX];
	uint32_t found = 0;
	FILE *file = fopen(groups, "re");
	while (file != NULL && fgets(line, sizeof line, file) != NULL)
		found = less(found, read_line(line, root));
	if (file != NULL)
		(void)fclose(file);
	return found;
}

/* ---- Loops ---- */

#define THREADS_A_LOOP 4u
#define LOOPS_MAX 4u /* four loops read and write for more small requests than a machine's other cores compute */

/* Below four a second loop competes with kernels and clients for the same cores. */
uint32_t machine_loops(const struct machine *machine)
{
	const uint32_t loops = machine->threads / THREADS_A_LOOP;
	if (machine->threads < THREADS_A_LOOP)
		return 1;
	return loops < 2 ? 2 : loops < LOOPS_MAX ? loops : LOOPS_MAX;
}

/* ---- Cores ---- */

/* The first of the processors that share a core with this one ("0,64" or "0-1"); -1: the kernel doesn't say. */
static int first_sibling(int processor, const char *root)
{
	char path[PATH_MAX];
	if (snprintf(path, sizeof path, "%s/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", root, processor) >= (int)sizeof path)
		return -1;
	FILE *file = fopen(path, "re");
	if (file == NULL)
		return -1;
	int first = -1;
	const int count = fscanf(file, "%d", &first);
	(void)fclose(file);
	return count == 1 && first >= 0 && first < CPU_SETSIZE ? first : -1;
}

uint32_t machine_cores(const cpu_set_t *processors, const char *root)
{
	cpu_set_t cores;
	CPU_ZERO(&cores);
	for (int i = 0; i < CPU_SETSIZE; i++) {
		if (!CPU_ISSET(i, processors))
			continue;
		const int first = first_sibling(i, root);
		if (first < 0)
			return 0;
		CPU_SET(first, &cores);
	}
	return (uint32_t)CPU_COUNT(&cores);
}

void machine_read(struct machine *machine_out)
{
	struct machine machine = {.processors = 1, .quota = machine_quota("/proc/self/cgroup", "")};
	cpu_set_t processors;
	if (sched_getaffinity(0, sizeof processors, &processors) == 0 && CPU_COUNT(&processors) > 0) {
		machine.processors = (uint32_t)CPU_COUNT(&processors);
		machine.cores = machine_cores(&processors, "");
	}
	machine.threads = machine.cores != 0 ? machine.cores : machine.processors;
	if (machine.quota != 0 && machine.quota < machine.threads)
		machine.threads = machine.quota;
	*machine_out = machine;
}
