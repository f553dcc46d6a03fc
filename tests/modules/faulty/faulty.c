/* A provider with faults on demand: relu and silu of contiguous f32 (and relu2 of one row and sigmoid in shares, see there). x[0] names relu's fault, and silu's length that of its predicate or plan; any other call is answered rightly. A kernel that
 * hangs goes on when the file named by FAULTY_GATE is there, so that tests need no clock. FAULTY_NTH=n: the nth kernel of all fails; FAULTY_COUNT: a file that is told how many there were. FAULTY_OPEN:
 * segv, fail. */
#include <opd/provider.h>

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "server/isolated_call.h"
#include "server/worker.h"

enum fault {
	FAULT_ERROR = 1001,   /* INTERNAL */
	FAULT_OVERRUN,        /* a byte past the result */
	FAULT_SHAPE,          /* another shape */
	FAULT_VALUE,          /* wrong numbers */
	FAULT_SCRATCH,        /* a byte past the scratch */
	FAULT_SEGV,
	FAULT_ABORT,
	FAULT_EXIT,
	FAULT_KILL,           /* as the kernel's OOM killer does */
	FAULT_HANG,           /* until the gate opens */
	FAULT_HANG_POLITE,    /* … or nobody wants the result any more */
	FAULT_ARGUMENT,       /* INVALID_ARGUMENT: the request's fault */
	FAULT_MUTE,           /* INTERNAL without a text */
	FAULT_ESCAPE,         /* result: a bit for each thing that a worker has no business to do and that it was let do */
	/* sigmoid's alone, which is a loop: */
	FAULT_MEET,           /* none: but it goes on only when a second thread has come to help */
	FAULT_ALONE,          /* none: it takes some milliseconds, and the first result is how many threads took part */
	FAULT_SHARES,         /* each result is the first item of the share that it was in */
	FAULT_HOLD,           /* in a worker: the thread that has come to help says that the call is done, and never goes back */
	/* relu's again: */
	FAULT_DEAF,           /* in a worker: answers what it is asked, and that for ever, without reading anything */
	FAULT_TALK,           /* none, but for TALK_LINES log lines */
};

enum { SCRATCH_BYTES = 100, TALK_LINES = 500 };

enum length {
	LENGTH_PREDICATE_SEGV = 101,
	LENGTH_PREDICATE_HANG,
	LENGTH_PREDICATE_NO,
	LENGTH_PLAN_SEGV,
	LENGTH_PLAN_NO,
	LENGTH_PLAN_ERROR,
	LENGTH_PLAN_HUGE,
};

static bool gate_is_open(void)
{
	const char *gate = getenv("FAULTY_GATE");
	return gate != NULL && access(gate, F_OK) == 0;
}

static void hang(const opd_exec *exec, bool polite)
{
	const struct timespec moment = {.tv_nsec = 2000000};
	while (!gate_is_open() && !(polite && exec->host->cancelled(exec)))
		(void)nanosleep(&moment, NULL);
}

/* A pointer that the compiler can't follow. */
static volatile int *nowhere(void)
{
	volatile uintptr_t address = 8;
	return (volatile int *)address;
}

static bool supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)state;
	const opd_tensor *x = call->args[0].tensor;
	if (x->dtype != OPD_f32 || !opd_tensor_contiguous(x))
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "x %s, only contiguous f32", opd_dtype_name(x->dtype));
	if (strcmp(impl->op, "silu") != 0)
		return true;
	if (x->elements == LENGTH_PREDICATE_SEGV)
		*nowhere() = 1;
	while (x->elements == LENGTH_PREDICATE_HANG && !gate_is_open())
		;
	if (x->elements == LENGTH_PREDICATE_NO)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "%d elements", LENGTH_PREDICATE_NO);
	return true;
}

static opd_status plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason, opd_error *error)
{
	(void)state;
	const uint64_t elements = call->args[0].tensor->elements;
	plan_out->scratch_bytes = SCRATCH_BYTES;
	if (strcmp(impl->op, "silu") != 0)
		return OPD_OK;
	if (elements == LENGTH_PLAN_SEGV)
		*nowhere() = 1;
	if (elements == LENGTH_PLAN_ERROR)
		return opd_fail(error, OPD_INTERNAL, "faulty.silu: no plan for %d", LENGTH_PLAN_ERROR);
	if (elements == LENGTH_PLAN_HUGE)
		plan_out->scratch_bytes = UINT64_MAX - 63; /* 0, with what the daemon puts behind it */
	if (elements != LENGTH_PLAN_NO)
		return OPD_OK;
	opd_reason_set(reason, OPD_REASON_PLAN, "%d elements", LENGTH_PLAN_NO);
	return OPD_FAILED_PRECONDITION;
}

/* Faults that are no more than a wrong answer. */
static opd_status misbehave(int fault, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	opd_tensor *output = (opd_tensor *)call->outputs[0];
	float *y = opd_tensor_data(output);
	switch (fault) {
	case FAULT_OVERRUN:
		((unsigned char *)(y + output->elements))[0] ^= 1;
		break;
	case FAULT_SCRATCH:
		((unsigned char *)exec->scratch)[SCRATCH_BYTES] ^= 1;
		break;
	case FAULT_SHAPE:
		output->elements--;
		break;
	case FAULT_VALUE:
		for (uint64_t i = 0; i < output->elements; i++)
			y[i] += 1;
		break;
	case FAULT_ERROR:
		return opd_fail(error, OPD_INTERNAL, "faulty.relu: told to fail");
	case FAULT_MUTE:
		return OPD_INTERNAL;
	case FAULT_ARGUMENT:
		return opd_fail(error, OPD_INVALID_ARGUMENT, "faulty.relu: told not to like it");
	default:
		break;
	}
	return OPD_OK;
}

static void die(int fault)
{
	if (fault == FAULT_SEGV)
		*nowhere() = 1;
	if (fault == FAULT_ABORT)
		abort();
	if (fault == FAULT_EXIT)
		_exit(3);
	if (fault == FAULT_KILL)
		(void)raise(SIGKILL);
}

/* To the daemon, over its worker's head. False: it has gone. */
static bool say_done(void)
{
	const struct isolated_message done = {.kind = ISOLATED_DONE};
	return send(WORKER_SOCKET, &done, offsetof(struct isolated_message, text), MSG_NOSIGNAL) > 0;
}

static bool was_let(long returned)
{
	return returned >= 0 || (errno != EPERM && errno != EACCES);
}

static bool forks(void)
{
	const pid_t child = fork();
	if (child == 0)
		_exit(0);
	return child > 0 && waitpid(child, NULL, 0) == child;
}

static int escape(void)
{
	char *const none[] = {NULL};
	int found = 0;
	const int sockets[] = {socket(AF_INET, SOCK_STREAM, 0), socket(AF_UNIX, SOCK_STREAM, 0)};
	const int file = open("/dev/null", O_WRONLY);
	found |= was_let(sockets[0]) << 0 | was_let(sockets[1]) << 1 | was_let(file) << 2;
	found |= was_let(execve("/nowhere/at/all", none, none)) << 3;
	found |= forks() << 4;
	found |= was_let(kill(getppid(), 0)) << 5;
	found |= was_let(unlink("/nowhere/at/all")) << 6;
	found |= was_let(syscall(SYS_unshare, 0)) << 7;
	(void)close(sockets[0]);
	(void)close(sockets[1]);
	(void)close(file);
	return found;
}

/* Of all kernels together, in the order in which they begin. */
static _Atomic unsigned long kernels;

static bool is_the_nth(void)
{
	const char *wanted = getenv("FAULTY_NTH");
	const unsigned long count = atomic_fetch_add(&kernels, 1) + 1;
	return wanted != NULL && count == strtoul(wanted, NULL, 10);
}

static opd_status run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *output = call->outputs[0];
	const float *x = opd_tensor_data(call->args[0].tensor);
	float *y = opd_tensor_data(output);
	const bool relu = strcmp(impl->op, "relu") == 0;
	const int fault = is_the_nth() ? FAULT_ERROR : relu && output->elements != 0 ? (int)x[0] : 0;
	for (uint64_t i = 0; i < output->elements; i++)
		y[i] = relu ? (x[i] > 0 ? x[i] : 0) : x[i] / (1 + expf(-x[i]));
	die(fault);
	if (fault == FAULT_ESCAPE)
		y[0] = (float)escape();
	if (fault == FAULT_HANG || fault == FAULT_HANG_POLITE)
		hang(exec, fault == FAULT_HANG_POLITE);
	while (fault == FAULT_DEAF && say_done())
		;
	for (int i = 0; fault == FAULT_TALK && i < TALK_LINES; i++)
		exec->host->log(exec->host, OPD_LOG_INFO, "faulty talks");
	return misbehave(fault, call, exec, error);
}

#define IMPL(name)                                                                                                                       \
	{                                                                                                                                    \
		.struct_bytes = sizeof(opd_impl), .op = #name, .schema = #name "(Tensor x) -> Tensor", .device = "cpu",                            \
		.uuid = "0000000000000000000000000000000000000000000000000000000000000002", .flags = OPD_IMPL_PLAN_MAY_REFUSE, .predicate = supports, \
		.plan = plan, .run = run,                                                                                                        \
	}

/* ---- A loop ---- */

#define MEET_MS 20000 /* longer than any scheduler holds a thread back */

struct split {
	const opd_exec *exec;
	const float *x;
	float *y;
	int fault;
	_Atomic unsigned long long threads; /* that took part: a bit each */
};

static bool is_joined(const struct split *split)
{
	return (atomic_load(&split->threads) & ~1ull) != 0;
}

/* A loop in a worker process asks for help after its first share, and only if that took its time. */
static void wait_for_others(const struct split *split, bool first)
{
	const struct timespec moment = {.tv_nsec = 1000000};
	(void)nanosleep(&moment, NULL);
	for (int i = 0; i < MEET_MS && !first && split->fault != FAULT_ALONE && !is_joined(split); i++)
		(void)nanosleep(&moment, NULL);
}

static void run_range(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	struct split *split = argument;
	(void)atomic_fetch_or(&split->threads, 1ull << thread);
	if (split->fault != 0 && split->fault != FAULT_SHARES)
		wait_for_others(split, begin == 0);
	if (thread != 0)
		die(split->fault);
	while (thread != 0 && split->fault == FAULT_HOLD)
		(void)(say_done() && pause());
	if (thread != 0 && split->fault == FAULT_HANG) {
		split->exec->host->log(split->exec->host, OPD_LOG_INFO, "a helper hangs");
		hang(split->exec, false);
	}
	for (uint64_t i = begin; i < end; i++)
		split->y[i] = split->fault == FAULT_SHARES ? (float)begin : 1 / (1 + expf(-split->x[i]));
}

static opd_status run_split(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl, (void)state;
	const opd_tensor *output = call->outputs[0];
	struct split split = {.exec = exec, .x = opd_tensor_data(call->args[0].tensor), .y = opd_tensor_data(output)};
	split.fault = output->elements != 0 && split.x[0] > 1000 ? (int)split.x[0] : 0;
	exec->host->parallel_for(exec, output->elements, 1, run_range, &split);
	if (split.fault == FAULT_MEET && !is_joined(&split))
		return opd_fail(error, OPD_INTERNAL, "faulty.sigmoid: nobody has helped, of %u threads", exec->threads);
	if (split.fault == FAULT_ALONE)
		split.y[0] = (float)__builtin_popcountll(atomic_load(&split.threads));
	return OPD_OK;
}

/* Right for one row, and fails for more, though it promises that rows don't depend on each other. */
static opd_status run_one_row(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl, (void)state;
	const opd_tensor *output = call->outputs[0];
	const float *x = opd_tensor_data(call->args[0].tensor);
	float *y = opd_tensor_data(output);
	if (output->elements != 0 && x[0] == FAULT_HANG)
		hang(exec, false);
	if (output->rank >= 2 && output->shape[0] > 1)
		return opd_fail(error, OPD_INTERNAL, "faulty.relu2: %d rows are too many", (int)output->shape[0]);
	for (uint64_t i = 0; i < output->elements; i++)
		y[i] = x[i] > 0 ? x[i] * x[i] : 0;
	return OPD_OK;
}

static const opd_impl impls[] = {
	IMPL(relu),
	IMPL(silu),
	{
		.struct_bytes = sizeof(opd_impl),
		.op = "relu2",
		.schema = "relu2(Tensor x) -> Tensor",
		.device = "cpu",
		.uuid = "0000000000000000000000000000000000000000000000000000000000000003",
		.flags = OPD_IMPL_BATCH_INVARIANT,
		.run = run_one_row,
	},
	{
		.struct_bytes = sizeof(opd_impl),
		.op = "sigmoid",
		.schema = "sigmoid(Tensor x) -> Tensor",
		.device = "cpu",
		.uuid = "0000000000000000000000000000000000000000000000000000000000000004",
		.flags = OPD_IMPL_THREAD_INVARIANT,
		.predicate = supports,
		.run = run_split,
	},
};

static opd_status open_module(const opd_host *host, void *state, opd_error *error)
{
	(void)state;
	opd_status status = OPD_OK;
	host->log(host, OPD_LOG_INFO, "faulty is open");
	if (getenv("FAULTY_OPEN") != NULL && strcmp(getenv("FAULTY_OPEN"), "segv") == 0)
		*nowhere() = 1;
	if (getenv("FAULTY_OPEN") != NULL && strcmp(getenv("FAULTY_OPEN"), "fail") == 0)
		return opd_fail(error, OPD_UNAVAILABLE, "faulty: told not to open");
	for (size_t i = 0; status == OPD_OK && i < sizeof impls / sizeof impls[0]; i++)
		status = host->register_impl(host, &impls[i], error);
	return status;
}

static void close_module(const opd_host *host, void *state)
{
	(void)host;
	(void)state;
	const char *path = getenv("FAULTY_COUNT");
	FILE *file = path == NULL ? NULL : fopen(path, "we");
	if (file == NULL)
		return;
	(void)fprintf(file, "kernel %lu\n", atomic_load(&kernels));
	(void)fclose(file);
}

static const opd_module module = {
	.abi = OPD_PROVIDER_ABI,
	.struct_bytes = sizeof module,
	.name = "faulty",
	.version = "1.0",
	.open = open_module,
	.close = close_module,
};

const opd_module *opd_module_get(void)
{
	return &module;
}
