/* Requests on a device's lane: an op, or a copy between a device and the host.
 *
 * Layer: server. Threads: the request's context's; what runs on the lane is in device_run.c, device_move.c and device_ahead.c.
 * One job a request at a time: request->device_job; pieces of an upload that is still coming have jobs of their own (server/device_ahead.c). A direct caller waits on its own thread.
 * Not here: the lane (server/device_lane.h), which tensors must be moved (server/bring.h). */
#ifndef OPD_SERVER_DEVICE_RUN_H
#define OPD_SERVER_DEVICE_RUN_H

#include "proto/message.h"
#include "server/registry.h"
#include "server/tensors.h"

struct device_lane;
struct operand;
struct op;
struct request;

/* Submits request->device_job; `done` on the context's thread once it has ended, perhaps before this returns. */
void device_submit(struct request *request, struct device_lane *lane, void (*done)(struct request *request));

/* The device for the chosen implementation (server/placement.h). 0: there is none. */
uint32_t device_choose(const struct request *request);
/* The chosen implementation on run.device; its operands are on that device or in host memory. Then execute_device_done. */
void device_run_start(struct request *request);

/* How long a caller may look for the end of a job of its own request that costs so much (device_job.here_ns); 0: it isn't the caller's to enqueue. Charges the loop's turn. */
uint64_t device_here_ns(struct request *request, uint64_t cost_ns);

/* The op's check reads the operand's contents. */
bool device_is_index(const opd_op *def, const struct operand *operand);
/* What a kernel found, in words. */
opd_status device_fault_error(const struct op *op, const opd_index_fault *fault, opd_error *error);

/* The device that a text names ("cuda:1", or "cuda": the session's, else the one with the least to do); 0: "cpu", or no text. INVALID_ARGUMENT, or FAILED_PRECONDITION when there is none. */
OPD_MUST_USE opd_status device_wanted(struct request *request, struct msg_text text, uint32_t *number_out);

/* A range of a buffer on a device, copied to or from host memory. */
struct device_move {
	uint32_t device;
	struct buffer *buffer; /* on the device; a move in with NULL takes a new one of `bytes`, for the caller to unref */
	uint64_t offset;
	uint64_t bytes;
	void *host; /* valid until done */
	bool out;   /* to the host */
	bool taken; /* `buffer` was NULL */
};
/* request->move says what; request->status how it went, with the error written; then `done`. */
void device_move_start(struct request *request, const char *name, void (*done)(struct request *request));

/* An upload to a device whose payload still comes, by the socket or by rings: more of it has. Copies what is there, if that is worth it. */
void device_ahead_received(struct request *request);
/* All of it is there. True: some of it went ahead; `done` once the rest has, perhaps before this returns, as after device_move_start. False: nothing has. */
OPD_MUST_USE bool device_ahead_finish(struct request *request, void (*done)(struct request *request));
/* The request ends: what is on its way to the device is nobody's any more. */
void device_ahead_release(struct request *request);

#endif
