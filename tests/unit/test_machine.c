/* server/machine.h: what of the machine kernels' threads are made for. */
#include <check.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/machine.h"
#include "tests/lib/suite.h"

static char root[64];

static void setup(void)
{
	(void)strcpy(root, "/tmp/opd-machine-XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(root));
}

static void teardown(void)
{
	char command[96];
	(void)snprintf(command, sizeof command, "rm -r %s", root);
	ck_assert_int_eq(system(command), 0);
}

/* A file below the root, with the folders above it. */
static void file(const char *path, const char *text)
{
	char whole[256];
	(void)snprintf(whole, sizeof whole, "%s%s", root, path);
	for (char *at = strchr(whole + strlen(root) + 1, '/'); at != NULL; at = strchr(at + 1, '/')) {
		*at = '\0';
		(void)mkdir(whole, 0700);
		*at = '/';
	}
	FILE *out = fopen(whole, "w");
	ck_assert_ptr_nonnull(out);
	(void)fputs(text, out);
	ck_assert_int_eq(fclose(out), 0);
}

static uint32_t quota(const char *groups)
{
	char path[96];
	(void)snprintf(path, sizeof path, "%s/groups", root);
	file("/groups", groups);
	return machine_quota(path, root);
}

START_TEST(no_quota_is_none)
{
	ck_assert_uint_eq(machine_quota("/no/such/file", root), 0);
	ck_assert_uint_eq(quota(""), 0);
	ck_assert_uint_eq(quota("0::/\n"), 0);
	ck_assert_uint_eq(quota("nonsense\n:\n::\n0:\n"), 0);
	file("/sys/fs/cgroup/cpu.max", "max 100000\n");
	ck_assert_uint_eq(quota("0::/\n"), 0);
	file("/sys/fs/cgroup/cpu.max", "");
	ck_assert_uint_eq(quota("0::/\n"), 0);
	file("/sys/fs/cgroup/cpu.max", "0 0\n");
	ck_assert_uint_eq(quota("0::/\n"), 0);
}
END_TEST

START_TEST(a_quota_counts_rounded_up_and_the_smallest_on_the_way_holds)
{
	file("/sys/fs/cgroup/a/b/cpu.max", "800000 100000\n");
	ck_assert_uint_eq(quota("0::/a/b\n"), 8);
	file("/sys/fs/cgroup/a/cpu.max", "250000 100000\n");
	ck_assert_uint_eq(quota("0::/a/b\n"), 3);
	file("/sys/fs/cgroup/cpu.max", "50000 100000\n");
	ck_assert_uint_eq(quota("0::/a/b\n"), 1);
	ck_assert_uint_eq(quota("0::/../../another/container\n"), 1); /* a path of the host's: the mount's top is ours */
	ck_assert_uint_eq(quota("0::a\n"), 0);
}
END_TEST

START_TEST(control_groups_of_version_1_count_too)
{
	file("/sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us", "400000\n");
	file("/sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000\n");
	file("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
	file("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
	ck_assert_uint_eq(quota("9:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/\n"), 4);
	ck_assert_uint_eq(quota("4:cpuset:/docker/x\n"), 0);
}
END_TEST

static uint32_t cores(const int *processors, size_t count)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	for (size_t i = 0; i < count; i++)
		CPU_SET(processors[i], &set);
	return machine_cores(&set, root);
}

START_TEST(processors_that_share_a_core_count_once)
{
	file("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list", "0,2\n");
	file("/sys/devices/system/cpu/cpu1/topology/thread_siblings_list", "1,3\n");
	file("/sys/devices/system/cpu/cpu2/topology/thread_siblings_list", "0,2\n");
	file("/sys/devices/system/cpu/cpu3/topology/thread_siblings_list", "1,3\n");
	file("/sys/devices/system/cpu/cpu4/topology/thread_siblings_list", "4-5\n");
	file("/sys/devices/system/cpu/cpu5/topology/thread_siblings_list", "4-5\n");
	ck_assert_uint_eq(cores((const int[]){0, 1, 2, 3, 4, 5}, 6), 3);
	ck_assert_uint_eq(cores((const int[]){2, 3}, 2), 2);
	ck_assert_uint_eq(cores((const int[]){1, 3}, 2), 1);
	ck_assert_uint_eq(cores((const int[]){0, 6}, 2), 0); /* the kernel doesn't say of one */
	file("/sys/devices/system/cpu/cpu6/topology/thread_siblings_list", "99999999\n");
	ck_assert_uint_eq(cores((const int[]){0, 6}, 2), 0);
	file("/sys/devices/system/cpu/cpu6/topology/thread_siblings_list", "\n");
	ck_assert_uint_eq(cores((const int[]){0, 6}, 2), 0);
}
END_TEST

START_TEST(threads_are_no_more_than_this_process_may_use_at_once)
{
	struct machine machine;
	cpu_set_t before, one;
	ck_assert_int_eq(sched_getaffinity(0, sizeof before, &before), 0);
	machine_read(&machine);
	ck_assert_uint_eq(machine.processors, (uint32_t)CPU_COUNT(&before));
	ck_assert_uint_ge(machine.threads, 1);
	ck_assert_uint_le(machine.threads, machine.processors);
	ck_assert_uint_le(machine.cores, machine.processors);
	int first = 0;
	while (!CPU_ISSET(first, &before))
		first++;
	CPU_ZERO(&one);
	CPU_SET(first, &one);
	ck_assert_int_eq(sched_setaffinity(0, sizeof one, &one), 0);
	machine_read(&machine);
	ck_assert_uint_eq(machine.processors, 1);
	ck_assert_uint_eq(machine.threads, 1);
	ck_assert_int_eq(sched_setaffinity(0, sizeof before, &before), 0);
}
END_TEST

START_TEST(a_machine_of_four_threads_or_more_gets_several_loops_and_no_more_than_four)
{
	static const uint32_t loops[][2] = {{1, 1}, {2, 1}, {3, 1}, {4, 2}, {8, 2}, {11, 2}, {12, 3}, {16, 4}, {128, 4}};
	for (size_t i = 0; i < sizeof loops / sizeof loops[0]; i++) {
		const struct machine machine = {.threads = loops[i][0]};
		ck_assert_uint_eq(machine_loops(&machine), loops[i][1]);
	}
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("machine");
	TCase *tests = tcase_create("quotas and cores");
	tcase_add_checked_fixture(tests, setup, teardown);
	tcase_add_test(tests, no_quota_is_none);
	tcase_add_test(tests, a_quota_counts_rounded_up_and_the_smallest_on_the_way_holds);
	tcase_add_test(tests, control_groups_of_version_1_count_too);
	tcase_add_test(tests, processors_that_share_a_core_count_once);
	tcase_add_test(tests, threads_are_no_more_than_this_process_may_use_at_once);
	tcase_add_test(tests, a_machine_of_four_threads_or_more_gets_several_loops_and_no_more_than_four);
	suite_add_tcase(suite, tests);
	return suite_run(suite);
}
