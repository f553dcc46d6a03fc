/* Batches: small requests for one op that wait for a lane, by whomever, run as one kernel, where their rows can stand one below the other and each row's bits stay what they are alone.
 *
 * Layer: server. Threads: batch_offer the context's; the others a lane's.
 * An op says that its rows concatenate (OPD_OP_ROWS), an implementation that a row's bits don't depend on the others (OPD_IMPL_BATCH_INVARIANT). Then requests whose other arguments are the same, and
 * lie at the same place, may share a kernel: in practice those of many sessions that read the same published weights. Their rows are copied together, and the results' apart; that pays
 * where what they share lies in no cache (`batching.shared`), since it is read once instead of many times: eight products of a row with a weight of 4096 x 4096 f32 take 2.3 times as long alone, with one of
 * 1024 x 1024 1.2 times, and eight norms 0.4 times (tests/bench/README.md). Nobody waits for others to come: a batch is made of what waits when a thread begins the first of them.
 * Each is charged the device time of its rows, answered by itself, and may be cancelled or late by itself. What fails together runs again alone.
 * Not batched: implementations with a plan (oneDNN and OpenBLAS take another kernel for a row alone, so that its bits would change with who else is there), and nodes of graphs.
 * Not here: who is next (server/scheduler.h), and how a lane takes several jobs (server/lane.h). */
#ifndef OPD_SERVER_BATCH_H
#define OPD_SERVER_BATCH_H

#include <stdbool.h>
#include <stdint.h>

struct lane_exec;
struct request;

/* A run that is about to be submitted to a lane: whether others may join it, and what must be the same for that, is written into its job. */
void batch_offer(struct request *request);

/* The exec's job and those that it took along, as one kernel. True: each has its status, results or error. False: it couldn't be; nothing has happened to them. */
bool batch_run(struct request *leader, struct lane_exec *exec);

#endif
