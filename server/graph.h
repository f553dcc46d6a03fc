/* A registered graph: ops whose operands are the graph's inputs or other nodes' outputs, checked once, run many times.
 *
 * Layer: server, beside run.c. Threads: its session's; while a run of it is in a lane that run alone has `prepared`.
 * Life: graph_create (graph_describe checks everything that needs neither shapes nor a session, graph_bind the rest) → runs (server/graph_run.h) → graph_unref by the table and by each
 * run. Ownership: the description is copied into the graph's own arena and charged to the session; constants are referenced, so
 * that a freed handle doesn't touch them; a state is followed by slot and lineage through every donation, by this graph's runs,
 * another's or a request's. Errors name the graph, the node ("node 'attn'"), the parameter, the value and what was expected; a
 * cycle names its nodes. Not here: shapes, dispatch and memory (server/graph_prepare.c), runs and their order
 * (server/graph_run.c). */
#ifndef OPD_SERVER_GRAPH_H
#define OPD_SERVER_GRAPH_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "proto/arena.h"
#include "proto/bounds.h"
#include "proto/message.h"
#include "server/kept.h"
#include "server/priority.h"
#include "server/registry.h"

#define GRAPH_NONE UINT32_MAX

struct session;
struct request;
struct prepared;
struct graph_run;

struct graph_input {
	struct msg_text name;
	msg_graph_kind kind;
	uint32_t param;               /* INPUT: which of a run's parameters */
	struct kept_tensor *constant; /* CONSTANT: referenced */
	uint32_t slot;                /* STATE */
	uint64_t lineage;
	uint32_t state;   /* STATE: which of the states */
	uint32_t donated; /* STATE: by this node; GRAPH_NONE: only read */
};

struct graph_node {
	struct msg_text name;
	uint32_t op_index;
	uint32_t first_value; /* its output 0 among all nodes' outputs */
	uint32_t result_count;
	struct msg_run run; /* its arguments and how to run it, as bind_args wants them */
};

struct graph_value {
	uint32_t node;
	uint32_t donated; /* by this node; GRAPH_NONE: by none */
	uint32_t output;  /* of the graph; GRAPH_NONE: none (the last, where several outputs name it) */
};

struct graph_output {
	struct msg_text name;
	uint32_t value;
};

/* The effective lists of all nodes, resolved when a run is accepted; shared while nothing has changed. */
struct graph_lists {
	_Atomic uint32_t refs;
	uint64_t epoch;   /* of the session's priorities */
	uint64_t version; /* of the snapshot */
	uint32_t count;
	struct effective *effective[]; /* [count], by node */
};

struct graph {
	uint32_t refs;
	uint64_t id;             /* 0: not registered, to be run once */
	struct session *session; /* not referenced: it outlives the graph */
	uint64_t charged_bytes;
	struct arena arena;
	struct msg_text name;
	struct op op; /* what its runs are calls of: the inputs given at each run are the parameters, the outputs the results */
	struct schema schema;
	uint32_t input_count;
	uint32_t state_count;
	uint32_t node_count;
	uint32_t value_count;
	uint32_t output_count;
	struct graph_input *inputs;
	struct graph_node *nodes;
	struct graph_value *values;
	struct graph_output *outputs;
	uint32_t *states;          /* [state_count]: which inputs they are */
	uint32_t *slots;           /* [state_count]: theirs, rising */
	uint64_t slot_mask;        /* a bit for each slot, by its lowest six */
	uint32_t *order;           /* [node_count]: in which nodes run */
	struct graph_lists *lists; /* newest; NULL: none yet */
	struct prepared *prepared; /* most recently used first, bounded */
};

/* What a session has of graphs. */
struct graphs {
	uint32_t count;
	uint32_t room;
	struct graph **items;    /* registered, by rising id */
	struct graph_run *first; /* accepted runs, in order */
	struct graph_run *last;
	bool scheduling;
};

/* Checks and copies all that needs no session: on any thread. */
OPD_MUST_USE opd_status graph_describe(const struct snapshot *snapshot, const struct msg_graph *message, uint64_t id, struct graph **graph_out,
                                       opd_error *error);
/* Binds constants and states of what `message` describes, and charges it. Not OK: graph_unref is still to be called. */
OPD_MUST_USE opd_status graph_bind(struct graph *graph, struct session *session, const struct msg_graph *message, opd_error *error);
/* Both, for a request; the first may have been done on a lane (request_decode). Everything of `message` may go afterwards. */
OPD_MUST_USE opd_status graph_create(struct request *request, const struct msg_graph *message, uint64_t id, struct graph **graph_out);
struct graph *graph_ref(struct graph *graph);
void graph_unref(struct graph *graph);
/* "node 'attn'" before the error's text. */
opd_status graph_node_error(const struct graph *graph, uint32_t node, opd_status status, opd_error *error);

/* graph_check.c: nodes, donations, order, outputs; the graph's inputs are there. */
OPD_MUST_USE opd_status graph_check(struct graph *graph, const struct snapshot *snapshot, const struct msg_graph *message,
                                    opd_error *error);
/* graph_order.c, called by graph_check: fills in graph->order. INVALID_ARGUMENT names the nodes that wait for each other. */
OPD_MUST_USE opd_status graph_order(struct graph *graph, opd_error *error);
/* What must run before what: node i after before[first[i]] to before[first[i + 1]], some perhaps twice. False: out of memory. */
struct graph_edges {
	uint32_t count;
	uint32_t room;
	uint32_t (*pairs)[2]; /* {node, the one before it} */
	uint32_t *first;      /* [node_count + 1] */
	uint32_t *before;     /* [count] */
};
OPD_MUST_USE bool graph_edges_make(const struct graph *graph, struct graph_edges *edges);
void graph_edges_fini(struct graph_edges *edges);
/* Index of a value that a checked operand names. */
static inline uint32_t graph_value_of(const struct graph *graph, const struct msg_tensor *tensor)
{
	return graph->nodes[tensor->node.node].first_value + tensor->node.output;
}
/* graph.c's, for graph_check.c: a name of 1 to 128 of the allowed characters. */
OPD_MUST_USE opd_status graph_check_name(const char *what, struct msg_text name, opd_error *error);
OPD_MUST_USE opd_status graph_check_unique(struct arena *scratch, const char *what, const struct msg_text *names, uint32_t count,
                                           opd_error *error);

/* The session's table. NOT_FOUND: no such graph. */
struct graphs *graphs_get(struct session *session); /* NULL: out of memory */
void graphs_destroy(struct graphs *graphs);
OPD_MUST_USE opd_status graphs_find(struct session *session, uint64_t id, struct graph **graph_out, opd_error *error);

/* graph_lists.c. The nodes' lists as they hold now; referenced. NULL: error written. On the session's thread. */
struct graph_lists *graph_lists_get(struct graph *graph, struct request *request);
void graph_lists_unref(struct graph_lists *lists);

#endif
