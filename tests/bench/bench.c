/* opd-bench: runs the named benchmarks of a daemon, or all. README.md says what each floor is. */
#include "tests/bench/bench.h"

#include <errno.h>
#include <getopt.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "tests/lib/clock.h"
#include "tests/lib/pin.h"

static const struct {
	const char *name;
	void (*run)(struct bench *bench);
} benchmarks[] = {
    {"latency", bench_latency},         {"rate", bench_rate},     {"bulk", bench_bulk},
    {"connections", bench_connections}, {"counts", bench_counts}, {"graph", bench_graph},
    {"memory", bench_memory},           {"product", bench_product},
    {"rings", bench_rings},             {"loops", bench_loops},
};
#define BENCHMARKS (sizeof benchmarks / sizeof benchmarks[0])

static _Noreturn void usage(FILE *to, int code)
{
	(void)fprintf(to, "usage: opd-bench --daemon FILE [--counter FILE] [--minimal FILE] [--grpc FILE] [--cores LIST] [--quick] [NAME...]\n"
	                  "  --daemon FILE   the opd binary to measure\n"
	                  "  --counter FILE  the library that counts a daemon's allocations and system calls\n"
	                  "  --minimal FILE  the program of the minimal peer; without it, its rows are skipped\n"
	                  "  --grpc FILE     the program of the gRPC peer; likewise\n"
	                  "  --cores LIST    the cores of everything that is started, as 2,3 or 4-7: their first is what a row calls one core (default: all that it may use)\n"
	                  "  --quick         short blocks: a look, not a measurement\n"
	                  "names:");
	for (size_t i = 0; i < BENCHMARKS; i++)
		(void)fprintf(to, " %s", benchmarks[i].name);
	(void)fputc('\n', to);
	exit(code);
}

/* Of the peers; NULL: not there. */
struct programs {
	const char *minimal;
	const char *grpc;
};

static void options_parse(struct bench *bench, struct programs *programs, int argc, char **argv)
{
	static const struct option options[] = {
	    {"daemon", required_argument, NULL, 'd'},
	    {"counter", required_argument, NULL, 'c'},
	    {"minimal", required_argument, NULL, 'm'},
	    {"grpc", required_argument, NULL, 'g'},
	    {"cores", required_argument, NULL, 'C'},
	    {"quick", no_argument, NULL, 'q'},
	    {"help", no_argument, NULL, 'h'},
	    {NULL, 0, NULL, 0},
	};
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
		if (option == 'd')
			bench->binary = optarg;
		else if (option == 'c')
			bench->counter = optarg;
		else if (option == 'm')
			programs->minimal = optarg;
		else if (option == 'g')
			programs->grpc = optarg;
		else if (option == 'C')
			bench->cores = optarg;
		else if (option == 'q')
			bench->quick = true;
		else
			usage(option == 'h' ? stdout : stderr, option == 'h' ? 0 : 2);
	}
	if (bench->binary == NULL)
		usage(stderr, 2);
}

/* Before anything asks which cores there are (tests/lib/pin.h). */
static void cores_choose(const char *list)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	for (const char *at = list; *at != '\0';) {
		unsigned first, last;
		int read = 0;
		if (sscanf(at, "%u%n", &first, &read) != 1)
			bench_fail("--cores %s: expected numbers and ranges of them, as 2,3 or 4-7", list);
		at += read;
		last = first;
		if (sscanf(at, "-%u%n", &last, &read) == 1)
			at += read;
		if (last < first || last >= CPU_SETSIZE || (*at != '\0' && *at++ != ','))
			bench_fail("--cores %s: expected numbers below %d and ranges of them, as 2,3 or 4-7", list, CPU_SETSIZE);
		for (unsigned core = first; core <= last; core++)
			CPU_SET(core, &set);
	}
	cpu_set_t got;
	if (sched_setaffinity(0, sizeof set, &set) != 0 || sched_getaffinity(0, sizeof got, &got) != 0 || !CPU_EQUAL(&set, &got))
		bench_fail("--cores %s: some of these aren't there for this process", list);
}

/* 1,000 sessions need as many descriptors here and in the daemon. */
static void raise_descriptors(void)
{
	struct rlimit limit;
	if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
		limit.rlim_cur = limit.rlim_max;
		(void)setrlimit(RLIMIT_NOFILE, &limit);
	}
}

static void machine_print(const struct bench *bench)
{
	struct utsname system;
	char line[256], model[128] = "unknown processor";
	FILE *file = fopen("/proc/cpuinfo", "re");
	while (file != NULL && fgets(line, sizeof line, file) != NULL)
		if (sscanf(line, "model name : %127[^\n]", model) == 1)
			break;
	if (file != NULL)
		(void)fclose(file);
	if (uname(&system) == 0)
		report_note("%s, %d cores%s%s, Linux %s, %s; medians%s", model, pin_cores(), bench->cores == NULL ? "" : " by --cores ", bench->cores == NULL ? "" : bench->cores, system.release,
		            opd_version(), bench->quick ? "; --quick: a look, not a measurement" : "");
}

static void benchmark_run(struct bench *bench, const char *name)
{
	for (size_t i = 0; i < BENCHMARKS; i++) {
		if (strcmp(benchmarks[i].name, name) != 0)
			continue;
		(void)pin_self(PIN_ANY);
		benchmarks[i].run(bench);
		return;
	}
	bench_fail("%s: no such benchmark", name);
}

int main(int argc, char **argv)
{
	struct bench bench = {
	    .directory = "/tmp/opd-bench-XXXXXX",
	    .peers = {{.name = "minimal", .why_skipped = "no --minimal", .divisor = 1},
	              {.name = "grpc", .why_skipped = "not built: tests/install.sh bench, then cmake again", .divisor = 8}},
	};
	struct programs programs = {0};
	options_parse(&bench, &programs, argc, argv);
	if (bench.cores != NULL)
		cores_choose(bench.cores);
	(void)pin_allowed();
	raise_descriptors();
	if (mkdtemp(bench.directory) == NULL)
		bench_fail("%s: %s", bench.directory, strerror(errno));
	machine_print(&bench);
	floor_start(&bench.floor, bench.directory);
	peer_start(&bench.peers[0], programs.minimal, bench.directory);
	peer_start(&bench.peers[1], programs.grpc, bench.directory);
	uint64_t begin = clock_ns();
	for (int i = optind; i < argc; i++)
		benchmark_run(&bench, argv[i]);
	for (size_t i = 0; optind == argc && i < BENCHMARKS; i++)
		benchmark_run(&bench, benchmarks[i].name);
	for (int i = 0; i < PEERS; i++)
		peer_stop(&bench.peers[i]);
	floor_stop(&bench.floor);
	(void)rmdir(bench.directory);
	report_note("\n%.0f s", (double)(clock_ns() - begin) / 1e9);
	return 0;
}
