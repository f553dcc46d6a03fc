/* Runs of a graph: what is prepared for one set of shapes, and one run of it.
 *
 * Layer: server. Threads: a run belongs to its session's thread but while it is in a lane; a prepared graph to the one run of its
 * graph that has begun. A run in order: graph_run_accept (operands taken, lists resolved, states donated, its place in the
 * session's order) → run_ready (its operands are there) → its turn (no earlier run of the same graph or of a state that it has is
 * left, but for one that is on a device's stream: graph_run_begun has handed on what it writes) → graph_execute on a lane or the loop, or graph_device_start → graph_run_done. Runs of other graphs pass it. One that is answered while a kernel of it exceeds its budget leaves the order then (abandoned): states that it
 * has begun to write are lost, and later runs are prepared anew; what it uses goes when the kernel has returned. A prepared graph holds for its
 * shapes, the nodes' lists and the registry's snapshot: one flat array of steps, each with its implementation, plan and bound
 * call; a run sets the addresses that have changed since the last one and calls kernel after kernel: nothing is inferred,
 * dispatched, planned or allocated for a node. Steps stand in stages of parts: the parts of a stage are run by several threads at once (graph_schedule.h). */
#ifndef OPD_SERVER_GRAPH_RUN_H
#define OPD_SERVER_GRAPH_RUN_H

#include "server/dispatch.h"
#include "server/graph.h"
#include "server/graph_plan.h"
#include "server/graph_schedule.h"
#include "server/lane.h"
#include "server/tensors.h"

/* Shape sets that are kept for a graph; the one unused for longest goes first. */
#define PREPARED_MAX 8u

/* Behind every result in checked mode. */
#define GRAPH_CANARY_BYTES 64u

/* A memory that tensors lie in: 0 is the arena, then the graph's inputs, then its outputs. */
struct patch {
	opd_tensor *tensor;
	uint64_t offset;
};

struct step {
	const struct impl *impl;
	const opd_op *def;
	const opd_plan *plan;
	opd_tensor *scratch; /* NULL: none */
	struct bound bound;
	struct dispatch dispatch;
	uint32_t node;
	uint32_t order; /* its place where one thread runs them all: of several that fail, the first is named */
	uint64_t cost_ns; /* estimated; 0: unknown */
	uint32_t donates; /* states that it writes: of prepared.donates, [first, first + count) */
	uint32_t donate_count;
	uint32_t copies; /* of prepared.copies: results of an implementation that doesn't work in place, to where they belong */
	uint32_t copy_count;
};

struct copy {
	const opd_tensor *from;
	const opd_tensor *to;
};

/* A graph's input as this shape set has it. */
struct prepared_input {
	opd_tensor tensor; /* data NULL */
	int64_t shape[OPD_RANK_MAX];
	int64_t strides[OPD_RANK_MAX];
};

struct prepared {
	struct prepared *next;
	_Atomic uint32_t refs; /* the graph's list, and runs on a device, of which several may be on its stream */
	struct account *account; /* referenced */
	uint64_t charged_bytes;
	struct snapshot *snapshot; /* referenced */
	struct graph_lists *lists; /* referenced */
	bool checked;              /* results have canaries */
	bool can_be_inline;        /* every node has a cost and comes from a provider that is linked in */
	uint64_t cost_ns;
	uint64_t step_ns;          /* of the costliest step */
	uint32_t device;           /* that all nodes run on; 0: the CPU */
	uint64_t scratch_bytes;    /* on a device: of the node that wants most */
	struct graph_device *on_device; /* what stays there between runs (graph_device.c); NULL: nothing yet */
	struct arena arena;
	uint32_t input_count;
	uint32_t output_count;
	uint32_t step_count;
	struct prepared_input *inputs;
	struct step *steps;
	opd_tensor *outputs;   /* [output_count]: as results, data NULL */
	uint32_t *donates;     /* states */
	struct schedule_part *parts;   /* of steps */
	struct schedule_stage *stages; /* of parts; one after the other */
	uint32_t stage_count;
	uint32_t width; /* most parts of a stage: 1: no steps run at once */
	struct copy *copies;
	uint32_t first_late; /* copies from here on are made when all nodes have run: outputs that lie elsewhere */
	uint32_t copy_count;
	struct plan_sizes sizes;
	uint32_t base_count;   /* 1 + input_count + output_count */
	uint32_t *first_patch; /* [base_count + 1] */
	struct patch *patches;
	void **bases; /* [base_count]: as set now */
};

/* A state in a run. */
struct state_use {
	struct kept_tensor *tensor; /* referenced once the run's turn has come */
	struct kept_tensor *fresh;  /* a copy that is written instead: somebody still reads the tensor; NULL: written where it is */
	struct msg_handle handle;   /* from acceptance on */
	struct kept_lend lend;      /* while it is donated */
	bool donated;
	bool shared; /* somebody else still reads it */
	bool written;
};

struct graph_run {
	struct graph_run *next; /* in the session's order */
	struct graph_run *previous;
	struct request *request;
	struct graph *graph;       /* referenced */
	struct graph_lists *lists; /* referenced */
	struct prepared *prepared; /* the graph's; NULL: not made yet */
	struct state_use *states;  /* [graph->state_count] */
	struct buffer *arena;
	struct buffer **hosts; /* [graph->input_count]: host memory with inputs that lie on a device, referenced; NULL: none does */
	uint32_t bringing;     /* the input that is on its way */
	uint32_t bringing_to;  /* for this device; 0: for the CPU */
	void (*brought)(struct graph_run *run);
	bool prepared_only;    /* a lane has prepared it and run nothing: it goes on elsewhere */
	int64_t (*shapes)[2][OPD_RANK_MAX]; /* [output_count]: of the results; the prepared graph may be gone before the reply is */
	uint32_t blockers; /* earlier runs in the session's order that it waits for */
	bool queued;       /* in that order */
	bool ready;        /* its operands are there */
	bool started;
	bool lending;   /* its job is on a device's lane */
	bool passed;    /* what it writes was handed to the runs behind it while it is on the device's stream: it has left the order, and only its answer is to come */
	bool abandoned; /* answered while a kernel of it runs on: others pass it, and what it was prepared with is its own */
	struct prepared *held; /* a device's run: `prepared`, referenced; NULL: it is no such run */
	/* A lane's while it runs. Not beside the flags above: the loop reads those together, of every run in the order. */
	opd_index_fault found; /* by the run's end on a device: what a node's kernel found in its indices */
	uint64_t prepare_ns;
	uint64_t *node_ns; /* [node_count], by step; NULL: nobody asked */
	bool dispatched;   /* it prepared what it ran */
	bool begun;        /* its first segment has run: it goes on at … */
	uint32_t at_stage;
	uint32_t at_step;  /* … of the stage's only part; 0: at its first */
	_Atomic uint32_t failed_order; /* lowest among the steps that have failed; GRAPH_NONE: none has */
};

/* graph_prepare.c. The one that fits, moved to the front; NULL: none. */
struct prepared *prepared_find(struct graph_run *run);
/* Infers, dispatches, plans. On a lane: plans may take long. */
OPD_MUST_USE opd_status prepared_make(struct graph_run *run, opd_error *error);
void prepared_drop_all(struct graph *graph);
/* No other run finds the prepared graph from here on. On a device, where several runs may have it, another may have done so before. */
void prepared_take(struct graph_run *run);
struct prepared *prepared_ref(struct prepared *prepared);
void prepared_unref(struct prepared *prepared);
/* A run's operand that is the graph's input. */
static inline const opd_tensor *graph_run_operand(const struct bound *bound, const struct graph_input *input)
{
	return bound->args[input->param].tensor;
}

/* graph_device.c. All nodes on prepared->device; its inputs are there or in host memory. Then graph_run_done. */
void graph_device_start(struct graph_run *run);
/* Somebody waits behind the run: graph_run_begun is called as soon as it is on the device's stream. */
void graph_device_ask(struct graph_run *run);
/* graph_run.c. Its kernels are on the device's stream: what comes there behind them finds its results and states as it leaves them. */
void graph_run_begun(struct graph_run *run);
void graph_device_release(struct prepared *prepared);

/* graph_bring.c. On the session's thread: inputs that lie on another device than this (0: on any) come to host memory, then `ready`, with request->status. */
void graph_bring(struct graph_run *run, uint32_t device, void (*ready)(struct graph_run *run));
/* Whether an input lies on a device. */
bool graph_brings(const struct graph_run *run);
void graph_bring_release(struct graph_run *run);
/* Where a kernel of the CPU reads the input's kept tensor. */
unsigned char *graph_host_data(const struct graph_run *run, uint32_t input, const struct kept_tensor *tensor);

/* graph_execute.c, for graph_device.c: where a base's tensors lie from now on; results as this run has them, and that those wanted in shared memory
 * fit there. */
void graph_set_base(struct prepared *prepared, uint32_t base, void *address);
OPD_MUST_USE opd_status graph_describe_outputs(struct graph_run *run);

/* graph_execute.c. On a lane or the loop: prepares unless that is done, and runs all nodes; the request's status and error say
 * how it went. */
void graph_execute(struct graph_run *run, struct lane_exec *lane);

/* graph_explain.c */
void graph_explain(struct graph_run *run);

/* A run that was accepted and hasn't ended has the slot's tensor as a state. */
bool graphs_run_uses(const struct session *session, uint32_t slot);

#endif
