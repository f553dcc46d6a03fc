/* Jobs that are queued in front of a lane and may run together, found by the number that their owners gave them.
 *
 * Layer: server, bottom (knows the scheduler's items, no lane and no request). Threads: its owner's; a lane holds its mutex.
 * Life: batch_queue_init → batch_queue_add of a job that the scheduler has queued → batch_queue_remove when it is picked or withdrawn → batch_queue_take for one that was picked. Nothing is to be freed.
 * Not here: who is next (server/scheduler.h), what jobs do together (server/batch.h). */
#ifndef OPD_SERVER_BATCH_QUEUE_H
#define OPD_SERVER_BATCH_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

#include "server/scheduler.h"

/* A power of two. */
#define BATCH_LISTS 64u

/* In the job that it stands for; zeroed: one that always runs alone. */
struct batch_item {
	uint64_t number; /* the owner's: when one is begun, others that are queued with the same number, not 0, are taken along if it `joins` them */
	uint32_t rows;   /* how much of a batch it is. 0, by what runs them: it took no part, and pays nothing */
	bool (*joins)(const struct batch_item *leader, const struct batch_item *item); /* under the queue's lock: a few instructions */
	/* the queue's */
	struct sched_item *item;
	struct batch_item *next, **link; /* link NULL: it isn't queued */
};

struct batch_queue {
	struct batch_list {
		struct batch_item *first, **end; /* oldest first */
	} lists[BATCH_LISTS];
};

void batch_queue_init(struct batch_queue *queue);
/* item: the same job's, queued. */
void batch_queue_add(struct batch_queue *queue, struct batch_item *batch, struct sched_item *item);
/* Nothing happens to one that isn't queued. */
void batch_queue_remove(struct batch_queue *queue, struct batch_item *batch);
/* Those that may run with a job that was picked and is out of the queue, oldest first, linked by `next`, of at most so many rows with its own: out of both queues, and charged as if they had been picked.
 * NULL: none. */
struct batch_item *batch_queue_take(struct batch_queue *queue, struct scheduler *scheduler, const struct batch_item *leader, uint32_t rows_max, uint64_t now_ns);

#endif
