#include "server/batch_queue.h"

#include <stddef.h>

/* Jobs looked at for one batch, under the lane's mutex: numbers that share a list don't make it long. */
#define LOOKS 64u

static struct batch_list *list_of(struct batch_queue *queue, const struct batch_item *batch)
{
	return &queue->lists[batch->number & (BATCH_LISTS - 1)];
}

void batch_queue_init(struct batch_queue *queue)
{
	for (uint32_t i = 0; i < BATCH_LISTS; i++)
		queue->lists[i] = (struct batch_list){NULL, &queue->lists[i].first};
}

void batch_queue_add(struct batch_queue *queue, struct batch_item *batch, struct sched_item *item)
{
	struct batch_list *list = list_of(queue, batch);
	batch->item = item;
	batch->next = NULL;
	batch->link = list->end;
	*list->end = batch;
	list->end = &batch->next;
}

void batch_queue_remove(struct batch_queue *queue, struct batch_item *batch)
{
	if (batch->link == NULL)
		return;
	*batch->link = batch->next;
	if (batch->next != NULL)
		batch->next->link = batch->link;
	else
		list_of(queue, batch)->end = batch->link;
	batch->link = NULL;
}

struct batch_item *batch_queue_take(struct batch_queue *queue, struct scheduler *scheduler, const struct batch_item *leader, uint32_t rows_max, uint64_t now_ns)
{
	uint32_t rows = leader->rows;
	struct batch_item *first = NULL, **end = &first;
	struct batch_item *batch = list_of(queue, leader)->first;
	for (uint32_t looks = 0; batch != NULL && rows < rows_max && looks < LOOKS; looks++) {
		struct batch_item *next = batch->next;
		if (batch->number == leader->number && batch->rows <= rows_max - rows && leader->joins(leader, batch) && scheduler_take(scheduler, batch->item, now_ns)) {
			batch_queue_remove(queue, batch);
			rows += batch->rows;
			batch->next = NULL;
			*end = batch;
			end = &batch->next;
		}
		batch = next;
	}
	return first;
}
