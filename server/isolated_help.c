#include "server/isolated_help.h"

#include <errno.h>
#include <pthread.h>
#include <sys/socket.h>

#include "server/lane.h"

/* So often may a thread come back from one of the worker's loops and help with the next while the worker says nothing else. */
enum { PLACES_PER_THREAD = 4 };

/* How often a thread that helps may look in vain while nobody listens to the worker: nothing is open then that it could help with, so that a worker has to send it back. */
#define LOOKS_MAX 20u

/* One loop of the lane's, open while the worker says nothing but that it has a loop: its caller listens to the worker, and who joins helps. */
struct help {
	struct process *process;
	uint64_t limit_ns;
	const opd_exec *exec;
	pthread_t listener;
	bool heard;
	process_event event;    /* what the listener has heard */
	uint32_t first;         /* the number of the worker's loop at turn 0 */
	uint32_t places;        /* shares of the lane's loop */
	_Atomic uint32_t taken; /* of them */
	_Atomic uint32_t turn;  /* even: counts the worker's loops; odd: the last one has no share left, or the worker has answered */
	_Atomic bool listening;
	_Atomic bool kept; /* a thread didn't come back: the worker was killed for it */
};

static bool exec_cancelled(const opd_exec *exec)
{
	return exec->lane != NULL && lane_cancelled(exec->lane);
}

static bool is_split(const struct process *process, process_event event)
{
	return event == PROCESS_MESSAGE && process->message.kind == ISOLATED_SPLIT;
}

/* Whoever is in a loop of its worker's gets away from there when it dies. */
static process_event wait_or_kill(struct process *process, uint64_t limit_ns, const opd_exec *exec)
{
	const process_event event = process_wait(process, limit_ns, exec, exec_cancelled);
	if (event != PROCESS_MESSAGE)
		process_kill(process);
	return event;
}

/* The worker has another loop. False: this one of the lane's has ended, or has few places left. */
static bool next_turn(struct help *help)
{
	uint32_t turn = atomic_load_explicit(&help->turn, memory_order_relaxed);
	if (atomic_load_explicit(&help->taken, memory_order_relaxed) + help->exec->threads > help->places)
		return false;
	return turn % 2 == 0 && atomic_compare_exchange_strong_explicit(&help->turn, &turn, turn + 2, memory_order_relaxed, memory_order_relaxed);
}

static void listen_to(struct help *help)
{
	atomic_store_explicit(&help->listening, true, memory_order_relaxed);
	do
		help->event = wait_or_kill(help->process, help->limit_ns, help->exec);
	while (is_split(help->process, help->event) && next_turn(help));
	help->heard = true;
	atomic_store_explicit(&help->listening, false, memory_order_relaxed);
	(void)atomic_fetch_or_explicit(&help->turn, 1, memory_order_relaxed);
}

/* Until the worker sends a packet back, or is no more. While it is listened to, its budget and who wants its result say how long that may take. */
static void wait_for_packet(struct help *help)
{
	uint32_t packet;
	uint32_t looks = 0;
	while (recv(help->process->helpers, &packet, sizeof packet, 0) < 0 && (errno == EINTR || errno == EAGAIN)) {
		looks = atomic_load_explicit(&help->listening, memory_order_relaxed) ? 0 : looks + (errno == EAGAIN);
		if (looks != LOOKS_MAX)
			continue;
		atomic_store_explicit(&help->kept, true, memory_order_relaxed);
		process_kill(help->process);
	}
}

/* A thread of the worker's takes shares as long as this one waits. When it comes back none is left, unless it is another loop by now. Without room for the packet nobody reads there. */
static void lend_a_thread(struct help *help, uint32_t turn)
{
	const uint32_t packet = help->first + turn / 2;
	if (send(help->process->helpers, &packet, sizeof packet, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)sizeof packet)
		wait_for_packet(help);
	(void)atomic_compare_exchange_strong_explicit(&help->turn, &turn, turn + 1, memory_order_relaxed, memory_order_relaxed);
}

static void take_part(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	struct help *help = argument;
	(void)begin, (void)end, (void)thread;
	const uint32_t turn = atomic_load_explicit(&help->turn, memory_order_relaxed);
	(void)atomic_fetch_add_explicit(&help->taken, 1, memory_order_relaxed);
	if (turn % 2 != 0)
		return;
	if (pthread_equal(help->listener, pthread_self()))
		listen_to(help);
	else
		lend_a_thread(help, turn);
}

/* The worker has opened a loop: what it says next. */
static process_event wait_with_help(struct process *process, uint64_t limit_ns, const opd_exec *exec)
{
	struct help help = {
		.process = process,
		.limit_ns = limit_ns,
		.exec = exec,
		.listener = pthread_self(),
		.first = process->message.number,
		.places = exec->threads * PLACES_PER_THREAD,
	};
	lane_parallel_for(exec->lane, help.places, 1, take_part, &help);
	if (atomic_load_explicit(&help.kept, memory_order_relaxed)) {
		process_condemn(process, "keeps threads that have helped it");
		return PROCESS_DIED;
	}
	if (help.heard)
		return help.event;
	return wait_or_kill(process, limit_ns, exec); /* others were here and have left before this thread came to listen */
}

process_event help_wait(struct process *process, uint64_t limit_ns, const opd_exec *exec)
{
	process_event event = wait_or_kill(process, limit_ns, exec);
	while (is_split(process, event))
		event = exec != NULL && exec->lane != NULL ? wait_with_help(process, limit_ns, exec) : wait_or_kill(process, limit_ns, exec);
	return event;
}
