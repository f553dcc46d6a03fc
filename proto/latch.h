/* A lock for a few instructions: one locked instruction to take it, none to let it go, and no call where nobody else has it.
 *
 * Layer: proto, internal. Threads: any. Life: zeroed memory is free; nothing is to be ended.
 * For what every request does several times: a mutex takes 55 instructions for each lock and unlock, two of them locked. Whoever holds it calls nothing that may wait.
 * Who finds it taken tries for a moment (the holder is at it on another core), then sleeps (the holder was interrupted, perhaps by a thread of a higher priority than its
 * own: yielding would not let it run). */
#ifndef OPD_PROTO_LATCH_H
#define OPD_PROTO_LATCH_H

#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#define LATCH_TRIES 64
#define LATCH_PAUSE_NS 20000

struct latch {
	_Atomic bool taken;
};

/* The rest of latch_lock: somebody has it. */
static __attribute__((noinline, unused)) void latch_wait(struct latch *latch)
{
	const struct timespec pause = {.tv_nsec = LATCH_PAUSE_NS};
	for (unsigned tries = 1; atomic_exchange_explicit(&latch->taken, true, memory_order_acquire); tries++)
		if (tries % LATCH_TRIES == 0)
			(void)nanosleep(&pause, NULL);
}

static inline void latch_lock(struct latch *latch)
{
	if (atomic_exchange_explicit(&latch->taken, true, memory_order_acquire))
		latch_wait(latch);
}

static inline void latch_unlock(struct latch *latch)
{
	atomic_store_explicit(&latch->taken, false, memory_order_release);
}

#endif
