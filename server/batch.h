/* Batches: small requests for one op that wait for a lane, by whomever, run as one kernel, where their rows can stand one below the other and each row's bits stay what they are alone.
 *
 * Layer: server. Threads: batch_offer the context's; the others a lane's.
 * An op says that its rows concatenate (OPD_OP_ROWS), an implementation that a row's bits don't depend on the others (OPD_IMPL_BATCH_INVARIANT). Then requests whose other arguments are the same, and
 * lie at the same place, may share a kernel: in practice those of many sessions that read the same published weights. Their rows are copied together, and the results' apart.
 * On a CPU that pays where what they share lies in no cache (`batching.shared`), since it is read once instead of many times: eight products of a row with a weight of 4096 x 4096 f32 take 2.3 times as long
 * alone, with one of 1024 x 1024 1.2 times, and eight norms 0.4 times. On a device it pays whatever they share, since enqueueing a kernel costs more than copying its rows (tests/bench/README.md).
 * Nobody waits for others to come: a batch is made of what waits when a thread begins the first of them.
 * Each is charged the device time of its rows, answered by itself, and may be cancelled or late by itself. What fails together runs again alone.
 * Not batched: implementations with a plan (oneDNN and OpenBLAS take another kernel for a row alone, so that its bits would change with who else is there), and nodes of graphs; on a device also not rows
 * that lie there, nor results that stay there.
 * Not here: who is next (server/scheduler.h), how jobs are found (server/batch_queue.h), and how a lane takes several (server/lane.h, server/device_lane.h). */
#ifndef OPD_SERVER_BATCH_H
#define OPD_SERVER_BATCH_H

#include <stdbool.h>
#include <stdint.h>

#include "providers/provider.h"

struct device_job;
struct device_lane;
struct lane_exec;
struct request;

/* More arguments than any op's that has rows. */
#define BATCH_ARGS_MAX 16u

/* A run that is about to be submitted to a lane, a device's if its implementation is one's: whether others may join it, and what must be the same for that, is written into its job. */
void batch_offer(struct request *request);

/* A tensor whose rows are those of several. */
struct batch_tensor {
	opd_tensor tensor; /* `data` is whoever's who runs it */
	int64_t shape[OPD_RANK_MAX];
	int64_t strides[OPD_RANK_MAX];
};

/* One call for several requests: the rows that they bring, and those of the results, one below the other. It points into itself. */
struct batch_call {
	opd_call call;
	opd_arg args[BATCH_ARGS_MAX];
	const opd_tensor *outputs[BATCH_ARGS_MAX];
	struct batch_tensor results[BATCH_ARGS_MAX];  /* [call.output_count] */
	struct batch_tensor operands[BATCH_ARGS_MAX]; /* [operand_count] */
	uint32_t params[BATCH_ARGS_MAX];              /* which argument each is */
	uint32_t operand_count;
};

/* The call of this request with so many rows: everything but where the tensors lie. */
void batch_describe(struct batch_call *batch, const struct request *request, uint64_t rows);
/* They were run together; from whichever thread. */
void batch_count(struct request *any, uint32_t requests);

/* The exec's job and those that it took along, as one kernel. True: each has its status, results or error. False: it couldn't be; nothing has happened to them. */
bool batch_run(struct request *leader, struct lane_exec *exec);

/* device_batch.c. A job of the lane's own that runs these, linked by `next`, as one; they stay the caller's until it has ended, with what each then has (device_job.members). NULL: out of memory. On the lane's thread. */
struct device_job *device_batch_create(struct device_lane *lane, struct device_job *members);

#endif
