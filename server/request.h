/* One request, from its envelope to its reply: a straight way down, with two ways back up (a kernel is done, a plan refused).
 *
 * Layer: server. Threads: its context's; between lane_submit and the job's done callback a lane has run.bound, run.dispatch and error.
 * Life: request_create → request_accept (envelope) → request_start (payload is there) → on_reply (exactly once, reply encoded) → request_release (reply written or dropped).
 * A failure at any step is the reply. A request outlives its connection: on_reply's owner drops it in one place.
 * Not here: frames and sockets (server/conn.h). */
#ifndef OPD_SERVER_REQUEST_H
#define OPD_SERVER_REQUEST_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/arena.h"
#include "proto/codec.h"
#include "server/bind.h"
#include "server/context.h"
#include "server/device_lane.h"
#include "server/device_run.h"
#include "server/dispatch.h"
#include "server/donate.h"
#include "server/lane.h"
#include "server/outbox.h"
#include "server/session.h"

/* A piece of a reply's payload: where it lies. */
struct segment {
	const void *data;
	uint64_t bytes;
};

/* Nanosecond marks, 0 where nobody asked. */
struct request_clock {
	uint64_t received; /* the envelope is there: when it was read, or looked at, if its session asks for times */
	uint64_t accepted; /* decoded, arguments bound */
	uint64_t ready;    /* the payload, and all that it waited for, are there too */
	uint64_t bound;
	uint64_t dispatched;
	uint64_t queued;
	uint64_t started;
	uint64_t ended;
	uint64_t moves; /* duration */
};

struct request_run {
	const struct op *op;
	struct bound bound;
	struct effective *effective;     /* the list that holds, borrowed: of the snapshot, or list_made */
	struct effective *list_made;     /* the session's list or its own, cut; referenced. NULL: neither has one */
	struct dispatch dispatch;
	uint32_t waiting; /* operands that are results still to come */
	struct run_waiter *waiters; /* for those, newest first; in the arena */
	bool failed;      /* error is written; ends once nothing is waited for */
	bool expected;    /* kept_expect was called, neither settled nor failed yet */
	bool on_loop;     /* small enough to run at once */
	bool checked;     /* its outputs have canaries */
	bool plan_refused;          /* found on a lane */
	bool written;               /* a kernel has begun: outputs may hold half of a result */
	struct buffer **outputs;    /* [output_count]; NULL: not allocated yet */
	struct buffer **resident;   /* [output_count]: results that stay on the device where they were made; NULL: none do */
	struct device_run *on_device; /* the lane's, while a job is there */
	uint32_t bringing;          /* the operand that is being brought to the host */
	uint32_t move_count;
	struct msg_move *moves;     /* in the arena; NULL: nobody asked */
	struct kept_tensor **kept;  /* [operand_count]: kept operands, referenced */
	struct donation *donations; /* in the arena */
	uint32_t donation_count;
	struct buffer *scratch;
	uint32_t device;            /* number of the device that it runs on */
	uint32_t batched;           /* requests whose one kernel was its too; 0: it ran alone */
	sched_class class;          /* in the lane's order */
	struct sched_behind *behind; /* in the arena; NULL: nobody asks, or it waits for no lane */
	uint64_t cost_ns;           /* estimated; 0: unknown */
	uint64_t deadline_ns;       /* 0: none */
	struct heap_node deadline;  /* among its context's, while it waits to start */
	struct msg_handle *handles; /* [output_count], once settled */
	struct region **regions;    /* [region_count]: shared memory of operands, then of results, referenced; NULL where none (shared.c) */
	uint32_t region_count;
};

/* What other kinds run on a lane. */
typedef void (*request_task_fn)(struct request *request);

struct request {
	struct request *next; /* of free ones, or of a conn's requests */
	struct request *previous;
	struct request *id_next;  /* of a conn's requests in flight */
	struct request **id_link; /* NULL: it isn't one of them any more */
	struct context *context;
	struct session *session; /* referenced */
	struct snapshot *snapshot; /* referenced from accept on */
	uint64_t id;
	struct arena arena;
	uint64_t arena_charged_bytes; /* of it, to the session; 0: it is small */
	uint64_t answer_bytes; /* of it, until a large answer is written; 0: it is small */
	struct msg_request message;
	uint64_t payload_bytes; /* declared */
	uint64_t payload_received;
	struct buffer *payload;
	bool entered;   /* it counts against quotas */
	bool chunked;   /* the payload comes in DATA frames */
	bool started;
	bool unstoppable; /* started, and of a kind that can't be cancelled then: request_cancel doesn't look at a message that a lane may be decoding */
	bool replied;   /* on_reply was called */
	bool cancelled; /* by request_cancel: what runs is told, nothing more is begun */
	bool overdue;   /* answered while its kernel runs on: what that may touch is kept until it returns */
	bool released;  /* … and nothing else is: request_release was called */
	opd_status status; /* of what a lane ran */
	opd_error error;              /* this and device_job are written before they are read: what is used again doesn't clear them */
	struct device_job device_job;
	struct request_run run;
	struct request_clock clock;
	struct kept_tensor *tensor; /* that a write or a fetch is about: referenced */
	uint32_t free_waiting; /* a free's results still to come */
	void *task_data;       /* a generation's tensors, in the arena */
	struct graph_run *graph_run; /* of RUN_GRAPH, in the arena */
	struct graph *described;     /* of a graph that was decoded on a lane, until it is accepted; owned */
	bool decoding;               /* on a lane, which has message, described and error until then */
	void *envelope_memory;       /* owned: what a lane decodes, and where it lies */
	const uint8_t *envelope;
	size_t envelope_bytes; /* counted by bytes_in too */
	struct lane_job job;
	struct device_lane *device_lane; /* that device_job was submitted to; NULL: it means nothing */
	request_task_fn device_done;     /* of that job, on the context's thread */
	struct device_move move;         /* what it copies, unless it runs an op */
	request_task_fn move_done;
	struct device_ahead *ahead;      /* an upload's bytes that go to the device before all are there; NULL: none did */
	struct buffer *staged; /* host memory with bytes that came from a device, referenced */
	request_task_fn task;      /* on a lane */
	request_task_fn task_done; /* back on the context's thread */

	struct msg_reply reply;
	struct out out;            /* the connection's, while the reply is on its way */
	struct codec_buffer frame; /* encoded; empty for a direct caller */
	uint32_t segment_count;
	uint32_t segment_room;
	struct segment *segments;
	uint64_t reply_bytes; /* of the payload */

	void (*on_reply)(struct request *request); /* the owner's */
	void *owner;
	bool direct; /* the owner reads `reply`; nothing is encoded, results are INLINE */
};

/* "run"…, as the step table has it. */
const char *request_kind_name(msg_request_kind kind);
/* NULL: out of memory. Takes a reference of the session. */
struct request *request_create(struct context *context, struct session *session, uint64_t id);
/* The reply was written or dropped: gives everything back. */
void request_release(struct request *request);
/* For context_fini: frees one that was released. */
void request_destroy(struct request *request);

/* Decodes and checks what needs no tensor bytes. Not OK: the request has failed, call request_fail. */
OPD_MUST_USE opd_status request_accept(struct request *request, const uint8_t *envelope, size_t bytes, uint64_t payload_bytes);
/* The same in two steps, for envelopes that would keep the loop: decodes on a lane, and checks there what of a graph needs no session; then `decoded` is called on the
 * context's thread, for request_accept_decoded, unless the request was cancelled before a lane had begun. Takes `memory` (of malloc), in which the envelope lies. */
void request_decode(struct request *request, void *memory, const uint8_t *envelope, size_t bytes, request_task_fn decoded);
OPD_MUST_USE opd_status request_accept_decoded(struct request *request, uint64_t payload_bytes);
/* The same for a message that is decoded already. */
OPD_MUST_USE opd_status request_accept_message(struct request *request, uint64_t payload_bytes);

/* All its payload is there. on_reply may be called before this returns. */
void request_start(struct request *request);

/* Ends with request->error as the reply. */
void request_fail(struct request *request);
/* The same after request_accept has failed: a request that waits for results ends when they have been told of. */
void request_reject(struct request *request);
/* Its payload won't come (abort, disconnect): ends it with this status. */
void request_abandon(struct request *request, opd_status status, const char *why);

/* Nobody wants its result. One that hasn't begun on a lane ends with CANCELLED before this returns, and may be gone then; a kernel that runs is told,
 * and its end is the request's. Its owner expects no more of its payload. False: nothing was to be done. Not from on_reply or a waiter's callback. */
bool request_cancel(struct request *request);
/* Its deadline has come: answered now with DEADLINE_EXCEEDED, unless its kernel has begun. */
void request_expire(struct request *request);
/* Its kernel is still running when its budget is over, and nobody knows for how long: answered now with this error, released when the kernel has returned. */
void request_overdue(struct request *request, const opd_error *error);
/* The kernel of one that was answered so has returned. */
void request_returned(struct request *request);

/* ---- For the files that implement kinds of requests ---- */

/* Ends with what request->reply says. */
void request_reply(struct request *request, msg_reply_kind kind);
void request_reply_empty(struct request *request);
/* Runs `task` on the CPU lane, then `done` on the context's thread. */
void request_task(struct request *request, request_task_fn task, request_task_fn done);
/* Tensors to send: sets source and range of `tensor` and appends its segments. False: out of memory. */
bool request_send(struct request *request, struct msg_tensor *tensor, const void *data, uint64_t bytes);
uint64_t request_now_ns(void);

OPD_MUST_USE opd_status run_accept(struct request *request);   /* run.c */
void run_start(struct request *request); /* goes on when payload and all results of others are there */
void run_release(struct request *request); /* gives back what run_accept and later steps took */
void run_refused(struct request *request); /* it was never begun: whoever names its results is told that it failed, not that there never was such a result */
void run_failed(struct request *request);  /* the request ends with an error: whoever waits for its results learns of it */
/* It can't go on. True: it ends later, when what it waits for is there. */
bool run_abandoned(struct request *request);
void run_stop_waiting(struct request *request); /* run_operands.c: for results of others; it is about to end */
void run_explain(struct request *request); /* explain.c: puts the record into the reply */
void execute_graph(struct request *request); /* execute.c: graph_run_execute on a lane; then execute_done */
void execute_run(struct request *request);  /* execute.c: the chosen implementation, on the loop, a lane or a device; then execute_done */
/* A lane takes no more of this session, of its tenant, or of anybody: says so, and counts it. */
opd_status execute_refused(struct request *request, const char *what, const struct lane_refusal *refusal, const char *lane, opd_error *error);
void execute_device_done(struct request *request); /* execute.c: a device has run it; then execute_done */
void execute_place(struct request *request); /* execute.c: sets run.device for the chosen implementation */
void execute_plan(struct request *request); /* execute.c: makes the plan that a dry run asks about; then execute_done */
bool run_keeps(const struct request *request, uint32_t output); /* run_results.c: the result stays in the session */
bool run_leaves_out(const struct request *request, uint32_t output); /* run_results.c: the result goes nowhere, neither into the reply nor to shared memory */
void execute_done(struct request *request); /* run.c: on the context's thread */
/* A request that ends before it is run, or late; its status and error are written then. On a lane or the loop. */
bool execute_unwanted(struct request *request, const struct lane_exec *lane);
/* Whether this much kernel time fits into the loop's turn; counted if so. Of a direct caller: whether its thread does it itself. step_ns: of what may use several threads, the costliest kernel's,
 * UINT64_MAX where kernels may run at once. */
bool execute_fits_loop(struct request *request, uint64_t cost_ns, uint64_t step_ns);
/* run_operands.c: all that is kept is taken at once, and what isn't there yet is waited for; then where one lies */
OPD_MUST_USE opd_status run_take_operands(struct request *request);
OPD_MUST_USE opd_status run_place_operand(struct request *request, uint32_t index);
/* RESOURCE_EXHAUSTED when the operand, laid out, has more bytes than the session may have. */
OPD_MUST_USE opd_status operand_check_extent(const struct session *session, const struct op *op, const struct operand *operand, opd_error *error);
opd_status run_out_of_memory(struct request *request);
/* run.c's and run_results.c's, for graphs too */
OPD_MUST_USE opd_status run_take(struct request *request); /* payload, kept operands, room for kept results, deadline: run.op and run.bound are there */
OPD_MUST_USE opd_status run_check_inline(struct request *request); /* results that are wanted inline fit */
/* What it keeps goes into the session's table, if it hasn't yet. False: out of memory. */
OPD_MUST_USE bool run_keep(struct request *request);
void run_reply_results(struct request *request);
void run_reply_fake(struct request *request);
/* graph.c, graph_run.c */
OPD_MUST_USE opd_status graph_register_accept(struct request *request);
void graph_register_start(struct request *request);
OPD_MUST_USE opd_status graph_free_accept(struct request *request);
OPD_MUST_USE opd_status graph_run_accept(struct request *request);
void graph_run_ready(struct request *request); /* its operands are there: it runs when its turn has come */
void graph_run_done(struct request *request);  /* from execute_done */
void graph_run_failed(struct request *request); /* it ends with an error: its place in the order, its donations */
void graph_run_returned(struct request *request); /* it was answered while a kernel of it ran on, which has returned */
void graph_run_release(struct request *request);
void graph_run_execute(struct request *request, struct lane_exec *lane); /* on a lane */
bool graph_run_has_begun(const struct request *request); /* a node of it was run on the CPU */
OPD_MUST_USE opd_status free_accept(struct request *request); /* free.c */
void free_start(struct request *request);
OPD_MUST_USE opd_status upload_accept(struct request *request); /* upload.c */
void upload_start(struct request *request);
OPD_MUST_USE opd_status write_accept(struct request *request);
void write_start(struct request *request);
OPD_MUST_USE opd_status fetch_accept(struct request *request); /* fetch.c */
OPD_MUST_USE opd_status publish_accept(struct request *request); /* publish.c */
void publish_open(struct request *request);
void publish_withdraw(struct request *request);
void publish_list(struct request *request);

/* A request about one kept tensor (fetch, publish): request->tensor is taken when it is accepted, or when the result that it names is there; then `ready` is called, with
 * request->tensor NULL and the error written where that failed. In the arena; request->task_data is it. */
struct take {
	struct waiter waiter; /* first */
	struct request *request;
	bool waiting;
	void (*ready)(struct request *request);
};
OPD_MUST_USE opd_status take_accept(struct request *request, struct take *take, const struct msg_tensor *source, const char *what,
                                    void (*ready)(struct request *request));
void take_start(struct request *request);
void take_stop_waiting(struct request *request);

void generate_start(struct request *request); /* generate.c */
void generate_release(struct request *request);
void inspect_ops(struct request *request);    /* inspect.c */
void inspect_op(struct request *request);
void inspect_providers(struct request *request);
void inspect_info(struct request *request);
void inspect_tensors(struct request *request);
void admin_load_module(struct request *request); /* admin.c */
void admin_restore_provider(struct request *request);
void admin_set_log_level(struct request *request);
void inspect_sessions(struct request *request);
/* request_priority.c */
void priority_push(struct request *request);
void priority_pop(struct request *request);
void priority_set(struct request *request);
void priority_get(struct request *request);
/* inspect_sessions.c */
void admin_set_session(struct request *request);
OPD_MUST_USE opd_status admin_set_session_priority(struct request *request, const struct msg_set_priority *set);
void admin_drain(struct request *request);

#endif
