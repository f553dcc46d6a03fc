#include "server/isolated_process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "server/clock.h"
#include "server/worker.h"

#define MEMORY_MIN (256u << 10)
#define MEMORY_KEPT (256ull << 20) /* of an idle worker */
#define LOOK_NS 20000000u          /* how often a call is asked whether anybody still wants it */
#define END_NS 2000000000u         /* for closing the module */
#define LINES_A_MINUTE 600u        /* of a module: what it says is its own affair up to there */

extern char **environ;

/* ---- Starting ---- */

/* No signal blocked or ignored, a process group of its own (a terminal's Ctrl-C is the daemon's business), nothing open but /dev/null, the log's stderr and the socket. */
static int spawn(const char *program, char *const argv[], int socket, pid_t *pid_out)
{
	posix_spawnattr_t attributes;
	posix_spawn_file_actions_t files;
	sigset_t none, all;
	(void)sigemptyset(&none);
	(void)sigfillset(&all);
	int failed = posix_spawnattr_init(&attributes);
	if (failed != 0)
		return failed;
	failed = posix_spawn_file_actions_init(&files);
	if (failed != 0) {
		(void)posix_spawnattr_destroy(&attributes);
		return failed;
	}
	(void)posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
	(void)posix_spawnattr_setsigmask(&attributes, &none);
	(void)posix_spawnattr_setsigdefault(&attributes, &all);
	failed = posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
	if (failed == 0)
		failed = posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
	if (failed == 0)
		failed = posix_spawn_file_actions_adddup2(&files, socket, WORKER_SOCKET);
	if (failed == 0)
		failed = posix_spawn(pid_out, program, &files, &attributes, argv, environ);
	(void)posix_spawn_file_actions_destroy(&files);
	(void)posix_spawnattr_destroy(&attributes);
	return failed;
}

opd_status process_start(const char *program, const char *path, bool confined, struct account *account, struct log *log, struct log_limit *lines,
                         const char *provider, struct process **process_out, opd_error *error)
{
	int sockets[2];
	char parent[32];
	(void)snprintf(parent, sizeof parent, "%ld", (long)getpid());
	char *const argv[] = {(char *)"opd-worker", (char *)WORKER_FLAG, parent, (char *)path, confined ? (char *)WORKER_CONFINED : NULL, NULL};
	struct process *process = calloc(1, sizeof *process);
	if (process == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "worker: out of memory");
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) != 0) {
		free(process);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "worker: no socket pair: %s", strerror(errno));
	}
	const bool waits = fcntl(sockets[0], F_SETFL, O_NONBLOCK) != 0;
	const int failed = waits ? errno : spawn(program, argv, sockets[1], &process->pid);
	(void)close(sockets[1]);
	if (failed != 0) {
		(void)close(sockets[0]);
		free(process);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "worker: can't be started: %s", strerror(failed));
	}
	process->socket = sockets[0];
	process->helpers = -1;
	process->account = account_ref(account);
	process->log = log;
	process->lines = lines;
	process->provider = provider;
	*process_out = process;
	return OPD_OK;
}

/* ---- Telling ---- */

void process_condemn(struct process *process, const char *fault)
{
	if (process->fault == NULL)
		process->fault = fault;
	process_kill(process);
}

/* One that is gone is noticed by who waits for its answer. */
void process_tell(struct process *process, const struct isolated_message *message, int fd)
{
	if (process->fault != NULL || isolated_send(process->socket, message, fd) || errno == EPIPE || errno == ECONNRESET)
		return;
	process_condemn(process, errno == EAGAIN ? "doesn't read what it is sent" : "can't be sent anything");
}

/* ---- Memory ---- */

static void memory_drop(struct process *process)
{
	if (process->memory == NULL)
		return;
	(void)munmap(process->memory, process->memory_bytes);
	account_release(process->account, process->memory_bytes);
	process->memory = NULL;
	process->memory_bytes = 0;
}

/* The worker can't make it shorter under the daemon's feet, nor longer than what was charged. */
static int make_memfd(uint64_t bytes)
{
	const int fd = memfd_create("opd-worker", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0)
		return -1;
	if (ftruncate(fd, (off_t)bytes) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
		return fd;
	(void)close(fd);
	return -1;
}

static opd_status memory_make(struct process *process, uint64_t bytes, opd_error *error)
{
	const int fd = make_memfd(bytes);
	void *memory = fd < 0 ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	const struct isolated_message map = {.kind = ISOLATED_MAP, .bytes = bytes};
	if (memory == MAP_FAILED) {
		if (fd >= 0)
			(void)close(fd);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "worker: the system has no %llu bytes of shared memory", (unsigned long long)bytes);
	}
	process_tell(process, &map, fd);
	(void)close(fd);
	process->memory = memory;
	process->memory_bytes = bytes;
	return OPD_OK;
}

opd_status process_reserve(struct process *process, uint64_t bytes, opd_error *error)
{
	if (bytes <= process->memory_bytes)
		return OPD_OK;
	uint64_t room = MEMORY_MIN;
	while (room < bytes)
		room *= 2;
	memory_drop(process);
	opd_status status = account_charge(process->account, room, error);
	if (status != OPD_OK) /* rather exactly what is needed than nothing */
		status = account_charge(process->account, room = (bytes + 4095) / 4096 * 4096, error);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "worker");
	status = memory_make(process, room, error);
	if (status != OPD_OK)
		account_release(process->account, room);
	return status;
}

void process_trim(struct process *process)
{
	const struct isolated_message map = {.kind = ISOLATED_MAP};
	if (process->memory_bytes <= MEMORY_KEPT)
		return;
	memory_drop(process);
	process_tell(process, &map, -1);
}

/* ---- Constants ---- */

uint32_t process_keep(struct process *process, struct constant *constant)
{
	const uint32_t slot = (uint32_t)(constant->number % PACKED_SLOTS);
	const struct isolated_message keep = {.kind = ISOLATED_KEEP, .number = slot, .bytes = constant->bytes};
	if (process->slots[slot] == constant)
		return slot;
	constant_unref(process->slots[slot]);
	(void)atomic_fetch_add_explicit(&constant->refs, 1, memory_order_relaxed);
	process->slots[slot] = constant;
	process_tell(process, &keep, constant->fd);
	return slot;
}

void process_forget(struct process *process, const struct constants *constants)
{
	const uint64_t dropped = atomic_load_explicit(&constants->dropped, memory_order_acquire);
	if (process->dropped == dropped)
		return;
	process->dropped = dropped;
	struct isolated_message forget = {.kind = ISOLATED_FORGET};
	bool any = false;
	for (uint32_t slot = 0; slot < PACKED_SLOTS; slot++) {
		if (process->slots[slot] == NULL || !constant_is_dropped(process->slots[slot]))
			continue;
		constant_unref(process->slots[slot]);
		process->slots[slot] = NULL;
		forget.slots[slot / 64] |= 1ull << slot % 64;
		any = true;
	}
	if (any)
		process_tell(process, &forget, -1);
}

/* ---- Help ---- */

void process_offer_help(struct process *process)
{
	const struct isolated_message message = {.kind = ISOLATED_HELPERS};
	const struct timeval look = {.tv_usec = HELP_LOOK_US};
	int sockets[2];
	if (process->helpers >= 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) != 0)
		return;
	process->helpers = sockets[0];
	(void)setsockopt(process->helpers, SOL_SOCKET, SO_RCVTIMEO, &look, sizeof look);
	process_tell(process, &message, sockets[1]);
	(void)close(sockets[1]);
}

/* ---- Waiting ---- */

/* False: nothing came within `ns`. */
static bool wait_readable(const struct process *process, uint64_t ns)
{
	struct pollfd poll = {.fd = process->socket, .events = POLLIN};
	const struct timespec limit = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
	return ppoll(&poll, 1, &limit, NULL) > 0;
}

static void log_message(const struct process *process)
{
	const struct isolated_message *message = &process->message;
	const log_level level = message->number > OPD_LOG_DEBUG ? LOG_DEBUG : (log_level)message->number;
	LOG_LIMITED(process->log, level, process->lines, LINES_A_MINUTE, "provider", LOG_STR("provider", process->provider),
	            LOG_STR("text", isolated_text(message, 0)), LOG_UINT("worker", process->pid));
}

void process_begin(struct process *process)
{
	process->unwanted_ns = 0;
}

static bool is_unwanted(struct process *process, const opd_exec *exec, bool (*cancelled)(const opd_exec *exec), uint64_t now_ns)
{
	if (exec == NULL || !cancelled(exec))
		return false;
	if (process->unwanted_ns == 0) {
		process->unwanted_ns = now_ns;
		struct packed_call *packed = (struct packed_call *)(void *)process->memory;
		atomic_store_explicit(&packed->cancelled, 1, memory_order_relaxed);
	}
	return now_ns - process->unwanted_ns > CANCEL_GRACE_NS;
}

process_event process_wait(struct process *process, uint64_t limit_ns, const opd_exec *exec, bool (*cancelled)(const opd_exec *exec))
{
	for (uint64_t now_ns = clock_now_ns();; now_ns = clock_now_ns()) {
		if (limit_ns != 0 && now_ns >= limit_ns)
			return PROCESS_OVERDUE;
		if (is_unwanted(process, exec, cancelled, now_ns)) /* also of one that never stops talking */
			return PROCESS_UNWANTED;
		const uint64_t left_ns = limit_ns == 0 ? LOOK_NS : limit_ns - now_ns;
		if (!wait_readable(process, left_ns < LOOK_NS ? left_ns : LOOK_NS))
			continue;
		if (!isolated_receive(process->socket, &process->message, NULL))
			return PROCESS_DIED;
		if (process->message.kind != ISOLATED_LOG)
			return PROCESS_MESSAGE;
		log_message(process);
	}
}

/* ---- Ending ---- */

static void describe_end(const struct process *process, int status, char *text, size_t text_bytes)
{
	if (process->fault != NULL)
		(void)snprintf(text, text_bytes, "%s, and was ended", process->fault);
	else if (WIFSIGNALED(status))
		(void)snprintf(text, text_bytes, "died of signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
	else
		(void)snprintf(text, text_bytes, "exited with code %d", WIFEXITED(status) ? WEXITSTATUS(status) : -1);
}

/* It says nothing more: its socket's end is its own. */
static void wait_for_end(struct process *process)
{
	const struct isolated_message end = {.kind = ISOLATED_END};
	const uint64_t limit_ns = clock_now_ns() + END_NS;
	process_tell(process, &end, -1);
	while (process->fault == NULL && process_wait(process, limit_ns, NULL, NULL) == PROCESS_MESSAGE)
		;
}

void process_kill(const struct process *process)
{
	(void)kill(process->pid, SIGKILL); /* one that has ended by itself keeps its own status */
}

void process_end(struct process *process, bool ask, char *text, size_t text_bytes)
{
	int status = 0;
	pid_t ended;
	if (ask)
		wait_for_end(process);
	process_kill(process);
	do
		ended = waitpid(process->pid, &status, 0);
	while (ended < 0 && errno == EINTR);
	if (text != NULL)
		describe_end(process, status, text, text_bytes);
	(void)close(process->socket);
	if (process->helpers >= 0)
		(void)close(process->helpers);
	memory_drop(process);
	for (uint32_t slot = 0; slot < PACKED_SLOTS; slot++)
		constant_unref(process->slots[slot]);
	account_unref(process->account);
	free(process);
}
