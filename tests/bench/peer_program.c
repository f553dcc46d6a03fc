#include "tests/bench/peer_program.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/bench/report.h"
#include "tests/lib/clock.h"
#include "tests/lib/histogram.h"

#define HUGE_PAGE_BYTES ((size_t)2 << 20)

void *peer_memory(size_t bytes)
{
	void *memory = NULL;
	if (posix_memalign(&memory, bytes >= HUGE_PAGE_BYTES ? HUGE_PAGE_BYTES : 4096, bytes) != 0)
		bench_fail("peer: no memory for %zu bytes", bytes);
	if (bytes >= HUGE_PAGE_BYTES)
		(void)madvise(memory, bytes, MADV_HUGEPAGE);
	memset(memory, 0, bytes);
	return memory;
}

void peer_listening(uint16_t port)
{
	printf("%u\n", port);
	(void)fflush(stdout);
}

/* ---- Calls ---- */

/* The same values as opd's calls have (call.c). */
static float *values_create(size_t elements)
{
	float *x = peer_memory(elements * sizeof *x);
	for (size_t i = 0; i < elements; i++)
		x[i] = (float)(i % 17) - 8;
	return x;
}

static float weight_at(size_t i)
{
	return 1 + (float)(i % 5) / 4;
}

static void weight_keep(const struct peer_program_ops *program)
{
	static float weight[PEER_WEIGHT_ELEMENTS];
	const float *result;
	for (size_t i = 0; i < PEER_WEIGHT_ELEMENTS; i++)
		weight[i] = weight_at(i);
	(void)program->exchange(&(struct peer_call){PEER_KEEP, weight, PEER_WEIGHT_ELEMENTS, false}, &result);
}

struct block {
	struct peer_call call;
	uint64_t calls;
	uint64_t window;
};

/* One in flight: every call's time is looked at. */
static void block_singly(const struct peer_program_ops *program, const struct block *block)
{
	static struct histogram histogram;
	const float *result;
	uint64_t kernel = 0, begin = clock_ns(), last = begin;
	memset(&histogram, 0, sizeof histogram);
	for (uint64_t i = 0; i < block->calls; i++) {
		kernel += program->exchange(&block->call, &result);
		uint64_t now = clock_ns();
		histogram_add(&histogram, now - last);
		last = now;
	}
	printf("%" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", last - begin, kernel,
	       histogram_quantile(&histogram, 0.5), histogram_quantile(&histogram, 0.9), histogram_quantile(&histogram, 0.99));
}

static void block_run(const struct peer_program_ops *program, const struct block *block)
{
	if (block->window == 1) {
		block_singly(program, block);
		return;
	}
	uint64_t begin = clock_ns();
	uint64_t kernel = program->pipeline(&block->call, block->calls, block->window);
	printf("%" PRIu64 " %" PRIu64 " 0 0 0\n", clock_ns() - begin, kernel);
}

static void block_parse(const struct peer_program_ops *program, const char *line)
{
	char name[16];
	int timed;
	struct block block;
	if (sscanf(line, "block %15s %zu %" SCNu64 " %" SCNu64 " %d", name, &block.call.elements, &block.calls, &block.window,
	           &timed) != 5 ||
	    (block.call.op = peer_op_of(name, strlen(name))) == PEER_OPS || block.call.elements < 2 || block.window == 0)
		bench_fail("%s: not understood: %s", program->name, line);
	block.call.timed = timed != 0;
	float *x = values_create(block.call.elements);
	block.call.x = x;
	block_run(program, &block);
	free(x);
}

static int call_main(const struct peer_program_ops *program, const char *path, uint16_t port)
{
	char line[256];
	while (fgets(line, sizeof line, stdin) != NULL) {
		line[strcspn(line, "\n")] = '\0';
		if (strcmp(line, "connect unix") == 0 || strcmp(line, "connect tcp") == 0) {
			program->connect(path, port, line[strlen("connect ")] == 't');
			weight_keep(program);
			puts("ok");
		} else if (strcmp(line, "close") == 0) {
			program->close();
			puts("ok");
		} else {
			block_parse(program, line);
		}
		(void)fflush(stdout);
	}
	return 0;
}

/* ---- Check ---- */

static double expected_at(const struct peer_call *call, size_t i)
{
	double sum = 0;
	if (call->op == PEER_PROBE)
		return call->x[i == 0 ? 0 : call->elements - 1];
	if (call->op != PEER_NORM)
		return call->x[i] > 0 ? call->x[i] : 0;
	for (size_t k = 0; k < call->elements; k++)
		sum += (double)call->x[k] * call->x[k];
	return call->x[i] / sqrt(sum / (double)call->elements + PEER_EPSILON) * weight_at(i);
}

static void check_op(const struct peer_program_ops *program, peer_op op, const float *x, size_t elements)
{
	const struct peer_call call = {op, x, elements, true};
	const float *result = NULL;
	(void)program->exchange(&call, &result);
	size_t count = peer_call_results(op, elements);
	for (size_t i = 0; i < count; i += count > 4096 ? 4093 : 61) {
		double expected = expected_at(&call, i);
		if (!(fabs((double)result[i] - expected) <= 1e-5 * (1 + fabs(expected))))
			bench_fail("%s: %s of %zu: element %zu is %g, expected %g", program->name, peer_op_name(op), elements, i,
			           (double)result[i], expected);
	}
}

static void check_transport(const struct peer_program_ops *program, const char *path, uint16_t port, bool tcp)
{
	enum { LARGE = 1 << 22 };
	float *x = values_create(LARGE);
	program->connect(path, port, tcp);
	weight_keep(program);
	check_op(program, PEER_NORM, x, PEER_WEIGHT_ELEMENTS);
	check_op(program, PEER_RELU, x, 16);
	(void)program->pipeline(&(struct peer_call){PEER_NORM, x, PEER_WEIGHT_ELEMENTS, false}, 1000, 64);
	(void)program->pipeline(&(struct peer_call){PEER_RELU, x, 16, false}, 1000, 64);
	check_op(program, PEER_PROBE, x, LARGE);
	check_op(program, PEER_KEEP, x, LARGE);
	check_op(program, PEER_FETCH, x, LARGE);
	check_op(program, PEER_RELU, x, LARGE);
	program->close();
	free(x);
}

static int check_main(const struct peer_program_ops *program, const char *self)
{
	char folder[] = "/tmp/opd-peer-XXXXXX", path[64], command[4096];
	unsigned port = 0;
	if (mkdtemp(folder) == NULL)
		bench_fail("%s: %s", folder, strerror(errno));
	(void)snprintf(path, sizeof path, "%s/sock", folder);
	/* exec: the shell's process becomes the server, which dies with this one. */
	if ((size_t)snprintf(command, sizeof command, "exec '%s' serve '%s'", self, path) >= sizeof command)
		bench_fail("%s: the path is too long", self);
	FILE *server = popen(command, "re");
	if (server == NULL || fscanf(server, "%u", &port) != 1)
		bench_fail("%s: its server doesn't start", program->name);
	for (int tcp = 0; tcp < 2; tcp++)
		check_transport(program, path, (uint16_t)port, tcp != 0);
	(void)unlink(path);
	(void)rmdir(folder);
	printf("%s: every op over Unix and TCP is right\n", program->name);
	return 0;
}

int peer_program(const struct peer_program_ops *program, int argc, char **argv)
{
	(void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* a benchmark that was interrupted leaves nothing behind */
	(void)signal(SIGPIPE, SIG_IGN);
	if (argc == 3 && strcmp(argv[1], "serve") == 0)
		program->serve(argv[2]);
	else if (argc == 4 && strcmp(argv[1], "call") == 0)
		return call_main(program, argv[2], (uint16_t)atoi(argv[3]));
	else if (argc == 2 && strcmp(argv[1], "check") == 0)
		return check_main(program, argv[0]);
	(void)fprintf(stderr, "usage: %s serve PATH | call PATH PORT | check\n", argv[0]);
	return 2;
}
