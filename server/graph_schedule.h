/* Which of a graph's steps run at once: stages, one after the other, each of parts that don't know of each other.
 *
 * Layer: server, bottom. Threads: pure.
 * A stage with one part is run step after step by one thread; its kernels may share their own loops among threads, as a lone op's do. A stage with several is
 * handed to the lane's threads part by part. It is made where an estimate says that it pays: steps too small to be worth a hand-off stay on one thread, and so
 * do steps so large that their kernels use all threads themselves. Not here: memory (server/graph_layout.h), running (server/graph_execute.c). */
#ifndef OPD_SERVER_GRAPH_SCHEDULE_H
#define OPD_SERVER_GRAPH_SCHEDULE_H

#include <stdbool.h>
#include <stdint.h>

/* What handing a stage to several threads must save, at least. On the 2-core VM opening one and waking a thread cost 8 us, and the woken came 5 to 70 us later (opd-bench graph): with
 * less to gain, a stage on two threads was as often slower as faster than on one. */
#define SCHEDULE_STAGE_NS 20000u
/* Kernels estimated above this use several threads themselves (providers/cpu/call.c, providers/ops/kernel.c). */
#define SCHEDULE_WIDE_NS 20000u
/* Parts of a stage for each thread: one that comes late then costs half of its share. */
#define SCHEDULE_PARTS_PER_THREAD 2u
#define SCHEDULE_PARTS_MAX 64u

struct schedule_part {
	uint32_t first; /* of schedule.steps */
	uint32_t count;
};

struct schedule_stage {
	uint32_t first; /* of schedule.parts */
	uint32_t count;
};

struct schedule {
	uint32_t *steps; /* [count]: every step once, in the order in which parts have them */
	struct schedule_part *parts;
	struct schedule_stage *stages;
	uint32_t step_count;
	uint32_t part_count;
	uint32_t stage_count;
	uint32_t width; /* most parts of a stage */
};

/* What must end before a step begins: of step i, before[first[i]] to before[first[i + 1]]; all of them lower than i. */
struct schedule_steps {
	uint32_t count;
	const uint32_t *first;
	const uint32_t *before;
	const uint64_t *cost_ns; /* estimates; 0: unknown, taken for one that uses all threads */
};

/* One stage of one part, in the order given, where nothing pays. False: out of memory. */
bool schedule_make(const struct schedule_steps *steps, uint32_t threads, struct schedule *schedule_out);
/* All in one part. */
bool schedule_serial(uint32_t count, struct schedule *schedule_out);
void schedule_fini(struct schedule *schedule);

#endif
