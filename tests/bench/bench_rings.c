/* Calls through rings in shared memory, asleep between frames and polling, against two processes that hand 64 bytes to and fro in shared memory and do nothing else. */
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proto/ring.h"
#include "tests/bench/bench.h"
#include "tests/lib/clock.h"
#include "tests/lib/histogram.h"

#define ROUNDS 9
#define MESSAGE_BYTES 64
#define ELEMENTS 4096
#define IN_FLIGHT 64
#define POLL_US 50

/* ---- The floor ---- */

struct table {
	_Alignas(64) _Atomic uint32_t asked;
	uint8_t question[MESSAGE_BYTES];
	_Alignas(64) _Atomic uint32_t answered;
	uint8_t answer[MESSAGE_BYTES];
};

/* A process that answers what is put on the table. */
struct echo {
	struct table *table;
	bool spins;
	int asked_fd; /* eventfds; not used by one that spins */
	int answered_fd;
	pid_t pid;
};

static void signal_fd(int fd)
{
	const uint64_t one = 1;
	if (write(fd, &one, sizeof one) != sizeof one)
		bench_fail("an eventfd can't be written");
}

/* Until the word has this value. */
static void await(const struct echo *echo, const _Atomic uint32_t *word, uint32_t value, int fd)
{
	uint64_t count;
	if (!echo->spins && read(fd, &count, sizeof count) != sizeof count)
		bench_fail("an eventfd can't be read");
	while (atomic_load_explicit(word, memory_order_acquire) != value)
		ring_relax();
}

_Noreturn static void echo_serve(struct echo *echo)
{
	(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (uint32_t i = 1;; i++) {
		await(echo, &echo->table->asked, i, echo->asked_fd);
		memcpy(echo->table->answer, echo->table->question, MESSAGE_BYTES);
		atomic_store_explicit(&echo->table->answered, i, memory_order_release);
		if (!echo->spins)
			signal_fd(echo->answered_fd);
	}
}

static void echo_start(struct echo *echo, bool spins, const struct placement *placement)
{
	echo->spins = spins;
	echo->table = mmap(NULL, sizeof *echo->table, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	echo->asked_fd = eventfd(0, EFD_CLOEXEC);
	echo->answered_fd = eventfd(0, EFD_CLOEXEC);
	if (echo->table == MAP_FAILED || echo->asked_fd < 0 || echo->answered_fd < 0)
		bench_fail("no memory or eventfds for the floor");
	echo->pid = fork();
	if (echo->pid == 0)
		echo_serve(echo);
	if (echo->pid < 0)
		bench_fail("the floor's process can't be started");
	placement_server(placement, echo->pid);
}

static void echo_stop(struct echo *echo)
{
	(void)kill(echo->pid, SIGKILL);
	(void)waitpid(echo->pid, NULL, 0);
	(void)close(echo->asked_fd);
	(void)close(echo->answered_fd);
	(void)munmap(echo->table, sizeof *echo->table);
}

static double echo_block_us(struct echo *echo, unsigned calls)
{
	static struct histogram histogram;
	uint8_t message[MESSAGE_BYTES] = {1};
	memset(&histogram, 0, sizeof histogram);
	for (unsigned i = 0; i < calls; i++) {
		const uint64_t begin = clock_ns();
		const uint32_t number = atomic_load_explicit(&echo->table->asked, memory_order_relaxed) + 1;
		memcpy(echo->table->question, message, MESSAGE_BYTES);
		atomic_store_explicit(&echo->table->asked, number, memory_order_release);
		if (!echo->spins)
			signal_fd(echo->asked_fd);
		await(echo, &echo->table->answered, number, echo->answered_fd);
		memcpy(message, echo->table->answer, MESSAGE_BYTES);
		histogram_add(&histogram, clock_ns() - begin);
	}
	return (double)histogram_quantile(&histogram, 0.5) / 1e3;
}

/* ---- opd ---- */

struct subject {
	opd_client *client;
	opd_memory *memory;
	opd_request *request;
};

static opd_client *connect_rings(const struct daemon *daemon, bool rings, uint64_t poll_us)
{
	const opd_connect_options options = {.struct_bytes = sizeof options, .shared_memory = true, .rings = rings, .poll_us = poll_us};
	opd_client *client;
	opd_error error;
	if (opd_connect(daemon->unix_address, &options, &client, &error) != OPD_OK)
		bench_fail("%s", error.text);
	return client;
}

/* rms_norm whose operand and result lie in shared ranges, or relu of 64 bytes in the frames. */
static void subject_init(struct subject *subject, const struct daemon *daemon, bool norm, uint64_t poll_us)
{
	opd_error error;
	*subject = (struct subject){.client = connect_rings(daemon, true, poll_us)};
	if (!norm) {
		subject->request = call_tiny(subject->client);
		return;
	}
	const uint64_t bytes = ELEMENTS * sizeof(float);
	if (opd_memory_create(subject->client, 2 * bytes, &subject->memory, &error) != OPD_OK)
		bench_fail("%s", error.text);
	float *x = opd_memory_data(subject->memory);
	for (int i = 0; i < ELEMENTS; i++)
		x[i] = (float)(i % 17) - 8;
	const int64_t shape[] = {1, ELEMENTS};
	const opd_operand operand = {
	    .struct_bytes = sizeof operand, .dtype = OPD_f32, .rank = 2, .shape = shape, .source = OPD_FROM_MEMORY, .data = x, .memory = subject->memory};
	const opd_operand weight = {.struct_bytes = sizeof weight, .source = OPD_FROM_HANDLE, .handle = call_keep(subject->client, x, ELEMENTS)};
	subject->request = opd_request_create("rms_norm");
	if (subject->request == NULL)
		bench_fail("out of memory");
	opd_request_tensor(subject->request, NULL, &operand);
	opd_request_tensor(subject->request, NULL, &weight);
	opd_request_float(subject->request, NULL, 1e-5);
	opd_request_output_memory(subject->request, 0, subject->memory, x + ELEMENTS, bytes);
}

static void subject_fini(struct subject *subject)
{
	opd_request_destroy(subject->request);
	opd_memory_destroy(subject->memory);
	opd_close(subject->client);
}

static double subject_block_us(const struct subject *subject, unsigned calls)
{
	static struct histogram histogram;
	memset(&histogram, 0, sizeof histogram);
	for (unsigned i = 0; i < calls; i++) {
		const uint64_t begin = clock_ns();
		call_run(subject->client, subject->request);
		histogram_add(&histogram, clock_ns() - begin);
	}
	return (double)histogram_quantile(&histogram, 0.5) / 1e3;
}

/* limit: of the whole where asleep, of what is beyond the kernel where polling; 0: none. */
static void latency(const struct bench *bench, const struct daemon *daemon, bool norm, bool polls, double limit)
{
	const struct placement *placement = polls ? &placement_two : &placement_same;
	const unsigned calls = bench->quick ? 1000 : 10000;
	double floor[ROUNDS], opd[ROUNDS];
	struct echo echo;
	struct subject subject;
	char what[96], note[64];
	placement_apply(placement, bench, daemon);
	echo_start(&echo, polls, placement);
	(void)kill(echo.pid, SIGSTOP); /* one that spins takes the daemon's core: it stands still while opd's turn is */
	subject_init(&subject, daemon, norm, polls ? POLL_US : 0);
	(void)subject_block_us(&subject, calls);
	for (int i = 0; i < ROUNDS; i++) {
		(void)kill(echo.pid, SIGCONT);
		floor[i] = echo_block_us(&echo, calls);
		(void)kill(echo.pid, SIGSTOP);
		opd[i] = subject_block_us(&subject, calls);
	}
	const double kernel = call_kernel_ns(subject.client, subject.request, 101) / 1e3;
	(void)snprintf(what, sizeof what, "%s, %s", norm ? "rms_norm 16 KiB in shared ranges" : "relu 64 bytes in the frames", polls ? "polling, two cores" : "asleep, one core");
	(void)snprintf(note, sizeof note, "target: %.0f us%s; %.2f to %.2f us", limit, polls ? " beyond the kernel" : "", report_quantile(opd, ROUNDS, 0.1),
	               report_quantile(opd, ROUNDS, 0.9));
	const double value = report_median(opd, ROUNDS), base = report_median(floor, ROUNDS);
	report_row(&(struct report_row){.what = what,
	                                .unit = "us",
	                                .floor = base,
	                                .value = value,
	                                .kernel = kernel,
	                                .ratio = (value - kernel) / base,
	                                .bound = limit > 0 ? REPORT_VALUE_MAX : REPORT_NO_TARGET,
	                                .limit = limit + (polls ? kernel : 0),
	                                .note = limit > 0 ? note : strchr(note, ';') + 2});
	subject_fini(&subject);
	echo_stop(&echo);
}

/* ---- Rates ---- */

/* `total` calls with IN_FLIGHT under way. */
static double per_second(opd_client *client, const opd_request *request, uint64_t total)
{
	uint64_t submitted = 0;
	const uint64_t begin = clock_ns();
	opd_error error;
	for (uint64_t taken = 0; taken < total; taken++) {
		opd_ticket ticket;
		opd_result *result;
		for (; submitted < total && submitted - taken < IN_FLIGHT; submitted++)
			if (opd_submit(client, request, &ticket, &error) != OPD_OK)
				bench_fail("submit: %s", error.text);
		if (opd_wait_any(client, UINT64_MAX, &ticket, &result, &error) != OPD_OK)
			bench_fail("wait: %s", error.text);
		opd_result_destroy(result);
	}
	return (double)total * 1e9 / (double)(clock_ns() - begin);
}

static void rate(const struct bench *bench, const struct daemon *daemon, bool norm, uint64_t poll_us)
{
	const uint64_t calls = (norm ? 60000u : 200000u) / (bench->quick ? 10 : 1);
	opd_client *clients[2] = {connect_rings(daemon, false, 0), connect_rings(daemon, true, poll_us)};
	opd_request *requests[2];
	double rates[2][ROUNDS];
	char what[96];
	placement_apply(&placement_two, bench, daemon);
	for (int i = 0; i < 2; i++)
		requests[i] = norm ? call_norm(clients[i]) : call_tiny(clients[i]);
	for (int round = 0; round < ROUNDS; round++)
		for (int i = 0; i < 2; i++)
			rates[i][round] = per_second(clients[i], requests[i], calls);
	const double socket = report_median(rates[0], ROUNDS), rings = report_median(rates[1], ROUNDS);
	(void)snprintf(what, sizeof what, "%s, 64 in flight, %s, two cores", norm ? "rms_norm 16 KiB in the frames" : "relu 64 bytes", poll_us == 0 ? "asleep" : "polling");
	report_row(&(struct report_row){
	    .what = what, .unit = "ops/s", .floor = socket, .value = rings, .kernel = REPORT_NONE, .ratio = rings / socket, .note = "floor: the same over the socket"});
	for (int i = 0; i < 2; i++) {
		opd_request_destroy(requests[i]);
		opd_close(clients[i]);
	}
}

void bench_rings(struct bench *bench)
{
	struct daemon daemon;
	daemon_start(&daemon, bench->binary, bench->directory, NULL);
	report_section("Rings: p50 of a call; the floor hands 64 bytes to and fro in shared memory, with eventfds or spinning");
	latency(bench, &daemon, true, false, 12);
	latency(bench, &daemon, false, false, 0);
	latency(bench, &daemon, true, true, 3);
	latency(bench, &daemon, false, true, 0);
	for (int polls = 0; polls < 2; polls++) {
		rate(bench, &daemon, false, polls * POLL_US);
		rate(bench, &daemon, true, polls * POLL_US);
	}
	daemon_stop(&daemon);
}
