/* What the daemon does for one call: allocations, system calls, wake-ups, bytes; counted inside it by a preloaded library. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/bench/bench.h"
#include "tests/bench/counter.h"

#define CALLS 2000u

/* A file in the benchmark's directory that the daemon's counters live in. */
static struct counter_page *page_map(const struct bench *bench, char *path_out, size_t path_bytes)
{
	(void)snprintf(path_out, path_bytes, "%s/counts", bench->directory);
	int fd = open(path_out, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, sizeof(struct counter_page)) != 0)
		bench_fail("%s: %s", path_out, strerror(errno));
	void *memory = mmap(NULL, sizeof(struct counter_page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		bench_fail("%s: %s", path_out, strerror(errno));
	(void)close(fd);
	return memory;
}

static void page_read(const struct counter_page *page, double counts[COUNTER_COUNT])
{
	for (int i = 0; i < COUNTER_COUNT; i++)
		counts[i] = (double)atomic_load_explicit(&page->counts[i], memory_order_relaxed);
}

static void counts_print(const char *what, const double before[COUNTER_COUNT], const double after[COUNTER_COUNT], double calls)
{
	double each[COUNTER_COUNT];
	for (int i = 0; i < COUNTER_COUNT; i++)
		each[i] = (after[i] - before[i]) / calls;
	report_note("%-46s %11.2f %7.2f %7.2f %7.2f %7.2f %10.0f %10.0f", what, each[COUNTER_ALLOCATIONS], each[COUNTER_READS],
	            each[COUNTER_WRITES], each[COUNTER_WAITS], each[COUNTER_OTHER], each[COUNTER_READ_BYTES],
	            each[COUNTER_WRITTEN_BYTES]);
}

static void pipeline_run(opd_client *client, const opd_request *request, unsigned calls, unsigned window)
{
	opd_ticket ticket;
	opd_error error;
	opd_result *result;
	for (unsigned submitted = 0, taken = 0; taken < calls; taken++) {
		for (; submitted < calls && submitted - taken < window; submitted++)
			if (opd_submit(client, request, &ticket, &error) != OPD_OK)
				bench_fail("submit: %s", error.text);
		if (opd_wait_any(client, UINT64_MAX, &ticket, &result, &error) != OPD_OK)
			bench_fail("wait: %s", error.text);
		opd_result_destroy(result);
	}
}

static void counts_run(const struct counter_page *page, const char *address, call_build_fn build, unsigned window,
                       const char *what)
{
	double before[COUNTER_COUNT], after[COUNTER_COUNT];
	opd_client *client = call_connect(address);
	opd_request *request = build(client);
	pipeline_run(client, request, CALLS / 4, window);
	page_read(page, before);
	pipeline_run(client, request, CALLS, window);
	page_read(page, after);
	counts_print(what, before, after, CALLS);
	opd_request_destroy(request);
	opd_close(client);
}

void bench_counts(struct bench *bench)
{
	if (bench->counter == NULL) {
		report_note("\ncounts: skipped, no --counter library");
		return;
	}
	char path[128];
	struct daemon daemon;
	struct counter_page *page = page_map(bench, path, sizeof path);
	(void)setenv(COUNTER_ENVIRONMENT, path, 1);
	daemon_start(&daemon, bench->binary, bench->directory, bench->counter);
	(void)unsetenv(COUNTER_ENVIRONMENT);
	report_note("\nInside the daemon, for each call, steady state");
	report_note("%-46s %11s %7s %7s %7s %7s %10s %10s", "", "allocations", "reads", "writes", "waits", "mmaps", "bytes in",
	            "bytes out");
	placement_apply(&placement_two, bench, &daemon);
	counts_run(page, daemon.unix_address, call_norm, 1, "rms_norm 1x4096 f32, Unix, one at a time");
	counts_run(page, daemon.tcp_address, call_norm, 1, "rms_norm 1x4096 f32, TCP, one at a time");
	counts_run(page, daemon.unix_address, call_norm, 64, "rms_norm 1x4096 f32, Unix, 64 in flight");
	counts_run(page, daemon.unix_address, call_tiny, 64, "relu 16 f32, Unix, 64 in flight");
	daemon_stop(&daemon);
	(void)munmap(page, sizeof *page);
	(void)unlink(path);
}
