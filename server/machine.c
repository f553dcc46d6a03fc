#include "server/machine.h"

#include <inttypes.h>
#include <limits.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#ifdef OPD_HWLOC
#include <hwloc.h>
#endif

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

/* ---- Cores ---- */

static uint32_t count_processors(void)
{
	cpu_set_t set;
	const int count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
	return count < 1 ? 1 : (uint32_t)count;
}

/* Those of which this process may use a processor; 0: hwloc isn't there, or can't say. */
static uint32_t count_cores(void)
{
	uint32_t cores = 0;
#ifdef OPD_HWLOC
	hwloc_topology_t topology;
	if (hwloc_topology_init(&topology) != 0)
		return 0;
	/* Caches, devices and whatever else aren't asked for: looking for them takes most of the time. */
	(void)hwloc_topology_set_all_types_filter(topology, HWLOC_TYPE_FILTER_KEEP_NONE);
	(void)hwloc_topology_set_type_filter(topology, HWLOC_OBJ_CORE, HWLOC_TYPE_FILTER_KEEP_ALL);
	hwloc_bitmap_t mine = hwloc_bitmap_alloc();
	if (mine != NULL && hwloc_topology_load(topology) == 0 && hwloc_get_cpubind(topology, mine, HWLOC_CPUBIND_THREAD) == 0) {
		const int count = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_CORE);
		for (int i = 0; i < count; i++)
			cores += hwloc_bitmap_intersects(hwloc_get_obj_by_type(topology, HWLOC_OBJ_CORE, (unsigned)i)->cpuset, mine) != 0;
	}
	hwloc_bitmap_free(mine);
	hwloc_topology_destroy(topology);
#endif
	return cores;
}

void machine_read(struct machine *machine_out)
{
	struct machine machine = {.cores = count_cores(), .processors = count_processors(), .quota = machine_quota("/proc/self/cgroup", "")};
	machine.threads = machine.cores != 0 ? machine.cores : machine.processors;
	if (machine.quota != 0 && machine.quota < machine.threads)
		machine.threads = machine.quota;
	*machine_out = machine;
}
