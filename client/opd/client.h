/* libopd: run tensor ops on an opd daemon, or in this process, and know what really ran.
 *
 * Layer: client, public (installed as opd/client.h with opd/status.h, opd/dtype.h, opd/tensor.h, opd/reason.h).
 * Life: opd_connect → requests → opd_close. A client is one connection and one session: its priorities and its kept tensors end with it.
 * Threads: a client, its requests and its results belong to one thread at a time (hand them over as you like, with your own ordering); different
 * clients in different threads share nothing. No function starts a thread, installs a signal handler or prints. SIGPIPE isn't raised.
 * Blocking: opd_submit, opd_process, opd_cancel and the request_ and result_ functions never block for the server (opd_submit keeps what the socket
 * won't take); the others wait for their answer, at most the client's timeout_us.
 * Errors: every function that can fail returns an opd_status and writes a text into `error` (NULL: not wanted). A failed request leaves the client usable;
 * OPD_UNAVAILABLE means that the connection is gone: close the client. (OPD_DATA_LOSS `malformed answer from the server` means it too, once; later calls say
 * OPD_UNAVAILABLE.) What was answered before can still be taken. Outputs are written only on success, unless said otherwise.
 * Not here: providers (opd/provider.h); the daemon in this process (opd/embedded.h).
 *
 *     opd_client *client;
 *     opd_error error;
 *     if (opd_connect("unix:/run/opd/opd.sock", NULL, &client, &error) != OPD_OK)
 *         die(error.text);
 *     float x[2 * 4] = {…}, weight[4] = {…};
 *     opd_request *request = opd_request_create("rms_norm");
 *     opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, x, 2, 4));
 *     opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, weight, 4));
 *     opd_request_float(request, "epsilon", 1e-5);
 *     opd_request_priority(request, (const char *[]){"cuda", "cpu"}, 2);
 *     opd_result *result;
 *     if (opd_run(client, request, &result, &error) != OPD_OK)
 *         die(error.text);
 *     printf("%s ran it\n", opd_result_provider(result));
 *     const float *y = opd_tensor_data(opd_result_tensor(result, 0));
 *     …
 *     opd_result_destroy(result);
 *     opd_request_destroy(request);
 *     opd_close(client);
 */
#ifndef OPD_CLIENT_H
#define OPD_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "opd/dtype.h"
#include "opd/reason.h"
#include "opd/status.h"
#include "opd/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

#define OPD_API __attribute__((visibility("default")))

typedef struct opd_client opd_client;
typedef struct opd_request opd_request;
typedef struct opd_result opd_result;
typedef struct opd_memory opd_memory;

/* Names a request in flight on its client: the request id of the wire; they rise. 0 names none. */
typedef uint64_t opd_ticket;

/* The library's version, as "0.1.0". */
OPD_API const char *opd_version(void);

/* ---- Connecting -------------------------------------------------------------------------------------------------------- */

/* For programs that connect often by TLS: what servers gave at one connection to make the next one cheap, without certificates and signatures. The server was verified then, and isn't again, so it
 * is used only for the same address and the same options of verification; a server that has reloaded its certificates, or has forgotten, makes a full handshake of it. Any number of
 * clients, on any threads, may share one. NULL: out of memory. */
typedef struct opd_resumption opd_resumption;
OPD_API opd_resumption *opd_resumption_create(void);
/* Clients that still have it keep it. NULL is allowed. */
OPD_API void opd_resumption_destroy(opd_resumption *resumption);

typedef struct opd_connect_options {
	uint32_t struct_bytes;  /* sizeof; fields are added at the end, zeroed ones mean the default */
	bool no_chunks;         /* don't cut payloads into DATA frames: for a client that never pipelines */
	uint64_t timeout_us;    /* of connecting and of every blocking call; 0: 30 s to connect, none for calls */
	uint64_t chunk_bytes;   /* 0: the server's default */
	const char *client;     /* name for the daemon's log; NULL: "libopd" */
	bool shared_memory;     /* opd_memory_create will be called: over a Unix socket the daemon then looks for descriptors */
	bool rings;             /* frames go through memory that both sides map, over a Unix socket that stays as the life line (else OPD_FAILED_PRECONDITION) */
	uint64_t poll_us;       /* with rings: look at them for so long before sleeping, and ask the daemon to do so too, within its configuration; 0: sleep at once */
	uint64_t ring_bytes;    /* of each of the two: a power of two, 4 KiB to 16 MiB; 0: 256 KiB */
	/* Of tls:// addresses (the token: of all), read during the call. The server's certificate must be signed by an authority and have the server's name; or have this fingerprint (with ca_file: both). */
	const char *ca_file;          /* authorities in PEM; NULL: the system's */
	const char *certificate_file; /* the client's own, the chain behind it, in PEM; NULL: none */
	const char *key_file;         /* … and its key */
	const char *server_name;      /* NULL: the address's host */
	const char *token;            /* who the client is, as `opctl token new` makes it; sent over TLS and on this machine only. NULL: none */
	const char *token_file;       /* … its first line; only its owner may read it. NULL: none */
	const char *fingerprint;      /* "sha256:" and 64 hexadecimal digits, as `opd --self-signed` prints it; NULL: not pinned */
	opd_resumption *resumption;   /* tickets of earlier connections; NULL: each handshake is a full one */
} opd_connect_options;

/* Addresses: "unix:/path", also with options ("unix:/path?rings&poll=20us&shm" is the path with rings, poll_us, shared_memory); "tls://host:port", also with options
 * ("tls://host:7777?ca=FILE&cert=FILE&key=FILE&server-name=NAME&fingerprint=sha256:…&token-file=FILE"); "tcp://host:port" is plain, whatever the host (IPv6 in brackets: "tcp://[::1]:7777");
 * "embedded:" once libopd-embedded has registered it (else OPD_UNIMPLEMENTED says what to link). OPD_INVALID_ARGUMENT: not an address, a file that can't be used; OPD_UNAVAILABLE: nobody
 * answers, or the server refused the session (its words in the text); OPD_UNAUTHENTICATED: the server's certificate is not the one expected (expired, another name, an unknown
 * authority: the text says which), or the server refuses ours, or doesn't know our token;
 * OPD_PERMISSION_DENIED: it knows us and refuses; OPD_FAILED_PRECONDITION: it doesn't speak TLS 1.3, or speaks something else than opd; a token for a plain connection to another machine. */
OPD_API OPD_MUST_USE opd_status opd_connect(const char *address, const opd_connect_options *options, opd_client **client_out, opd_error *error);

/* Ends the session; requests in flight are dropped, results already taken stay valid. NULL is allowed. */
OPD_API void opd_close(opd_client *client);

/* What the server said of itself and of this session, valid until close. */
typedef struct opd_session {
	uint32_t struct_bytes;
	bool admin;             /* administrative calls are accepted */
	uint64_t session;       /* what the daemon's log calls it */
	const char *server;     /* "opd 0.1.0" */
	const char *tenant;
	uint64_t chunk_bytes;   /* 0: payloads aren't cut */
	uint64_t payload_bytes; /* limit of one request */
	uint64_t session_bytes; /* limit of the session */
	uint32_t in_flight;     /* limit of requests not yet answered */
	const char *identity;   /* who this client is to the server */
	const char *rights;     /* what it may do beside running ops: "publish, drain" */
	bool resumed;           /* TLS went on where an earlier connection was (opd_resumption) */
} opd_session;
OPD_API const opd_session *opd_client_session(const opd_client *client);

/* ---- Building a request ------------------------------------------------------------------------------------------------ */

/* A kept tensor of this session. */
typedef struct opd_handle {
	uint32_t index;
	uint32_t reserved;
	uint64_t generation; /* 0: none */
} opd_handle;

typedef enum opd_operand_source {
	OPD_FROM_HOST = 0,   /* `data`, sent with the request */
	OPD_FROM_HANDLE = 1, /* a kept tensor */
	OPD_FROM_RESULT = 2, /* output `output` of the request `ticket`, submitted earlier on this client with keep, answered or not */
	OPD_FROM_NOTHING = 3, /* dtype and shape only: for fake and dry runs */
	OPD_FROM_VALUE = 4,  /* of a graph's node: an input of the graph, or another node's output */
	OPD_FROM_MEMORY = 5  /* `data` lies in `memory`, which the daemon maps too: nothing is sent */
} opd_operand_source;

/* Within one graph: output `output` of node number `node`; with node OPD_GRAPH_INPUT, the graph's input number `output`. */
typedef struct opd_value {
	uint32_t node;
	uint32_t output;
} opd_value;
#define OPD_GRAPH_INPUT UINT32_MAX

/* An operand. With a handle, a ticket or a value, dtype OPD_DTYPE_NONE takes the tensor whole; otherwise dtype, shape, strides and byte_offset are a view of it. */
typedef struct opd_operand {
	uint32_t struct_bytes;
	opd_dtype dtype;
	uint32_t rank;
	opd_operand_source source;
	const int64_t *shape;
	const int64_t *strides; /* in elements; NULL: row-major */
	uint64_t byte_offset;   /* of element 0, from `data` or from the start of the kept tensor */
	const void *data;
	uint64_t data_bytes; /* readable from `data`; 0: as many as shape, strides and byte_offset reach */
	opd_handle handle;
	opd_ticket ticket;
	uint32_t output;
	bool donate; /* its result takes its place (the op has such a pair, and dtype and shape are the result's): a kept tensor, whole; of a graph's nodes, a state or another
	              * node's output. The result's handle has the same index; from submission on the old one is OPD_FAILED_PRECONDITION */
	opd_value value;
	const opd_memory *memory;
} opd_operand;

/* OPD_OPERAND(OPD_f32, pointer, 2, 4096): an initialiser for a row-major host tensor, shape given by its extents. */
#define OPD_OPERAND(type, pointer, ...)                                                              \
	{                                                                                                \
		.struct_bytes = sizeof(opd_operand), .dtype = (type),                                        \
		.rank = sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t), .shape = (int64_t[]){__VA_ARGS__}, \
		.data = (pointer)                                                                            \
	}

/* NULL: out of memory. A builder never fails half-way: a bad or unaffordable argument is remembered and comes out of submit. */
OPD_API opd_request *opd_request_create(const char *op);
OPD_API void opd_request_destroy(opd_request *request);

/* Arguments: name NULL is positional, and positional ones come first. Everything is copied but the tensors' `data`, which is kept by reference until
 * the request's result was taken (opd_run, opd_wait…), or it was cancelled, or the client closed. A request may be submitted many times. */
OPD_API void opd_request_tensor(opd_request *request, const char *name, const opd_operand *operand);
OPD_API void opd_request_tensors(opd_request *request, const char *name, const opd_operand *operands, size_t count);
OPD_API void opd_request_int(opd_request *request, const char *name, int64_t value);
OPD_API void opd_request_ints(opd_request *request, const char *name, const int64_t *values, size_t count);
OPD_API void opd_request_float(opd_request *request, const char *name, double value);
OPD_API void opd_request_bool(opd_request *request, const char *name, bool value);
OPD_API void opd_request_str(opd_request *request, const char *name, const char *value);
OPD_API void opd_request_none(opd_request *request, const char *name);

/* How to run. The list of this request alone; count 0 is an empty list (native, with a warning), which differs from no list. */
OPD_API void opd_request_priority(opd_request *request, const char *const *providers, size_t count);
OPD_API void opd_request_strict(opd_request *request, bool strict);   /* no fallback: FAILED_PRECONDITION when none of the list accepts */
OPD_API void opd_request_explain(opd_request *request, bool explain); /* the result carries an opd_explain */
OPD_API void opd_request_uuid(opd_request *request, bool uuid);
OPD_API void opd_request_retry(opd_request *request, bool retry);     /* a failed kernel lets the next in the list try */
OPD_API void opd_request_allow_tf32(opd_request *request, bool allow);
OPD_API void opd_request_device(opd_request *request, const char *device); /* "cpu", "cuda:1"; NULL: any. Of an upload: where the tensor is to live; NULL: host memory */
OPD_API void opd_request_timeout(opd_request *request, uint64_t timeout_us); /* of the server's, from receipt; 0: none */

/* How urgent: classes go in strict order on each lane, and none starves. At most what the tenant may (the daemon's configuration). */
typedef enum opd_class {
	OPD_CLASS_NORMAL = 0, /* the session's own: the tenant's default */
	OPD_CLASS_REALTIME = 1,
	OPD_CLASS_INTERACTIVE = 2,
	OPD_CLASS_BATCH = 3,
} opd_class;
OPD_API void opd_request_class(opd_request *request, opd_class service_class);

typedef enum opd_mode {
	OPD_MODE_RUN = 0,
	OPD_MODE_FAKE = 1, /* results' dtypes and shapes only; no tensor data moves */
	OPD_MODE_DRY = 2,  /* what would run, and why; no tensor data moves */
} opd_mode;
OPD_API void opd_request_mode(opd_request *request, opd_mode mode);

/* keep: the output stays in the session and can be named by later operands. copy: it is sent back too. Default: not kept, copied. */
OPD_API void opd_request_output(opd_request *request, uint32_t output, bool keep, bool copy);

/* The output goes to `to`, at a multiple of 64 in `memory`, which has room for `bytes` there: the result's tensor points to it, and nothing is sent. It must
 * overlap neither other outputs nor operands, and can't be kept. */
OPD_API void opd_request_output_memory(opd_request *request, uint32_t output, const opd_memory *memory, void *to, uint64_t bytes);

/* ---- Shared memory ----------------------------------------------------------------------------------------------------- */

/* Memory that this process and a daemon on this host both map (a sealed memfd): operands are read and outputs written where they lie, and no tensor byte
 * crosses the socket. Page-aligned, zeroed. It takes a connection to a Unix socket with the option shared_memory (else FAILED_PRECONDITION); the daemon
 * limits how many there are, and their bytes (RESOURCE_EXHAUSTED). While a request reads or writes a range, leave that alone: what it then computes is
 * undefined (but harms nobody). Integers (ids, positions, block tables) are copied by the daemon: at most 4 MiB an operand or output. */
OPD_API OPD_MUST_USE opd_status opd_memory_create(opd_client *client, uint64_t bytes, opd_memory **memory_out, opd_error *error);
OPD_API void *opd_memory_data(const opd_memory *memory);
OPD_API uint64_t opd_memory_bytes(const opd_memory *memory);
/* Tells the daemon, and unmaps it: results that lie in it must not be read any more. Requests in flight end undisturbed. It may outlive its client, as memory.
 * NULL is allowed. */
OPD_API void opd_memory_destroy(opd_memory *memory);

/* ---- Running ----------------------------------------------------------------------------------------------------------- */

/* Submits and waits. Returns the reply's status; *result_out is set whenever a reply came, also a failed one (it may carry an explain), else NULL. */
OPD_API OPD_MUST_USE opd_status opd_run(opd_client *client, const opd_request *request, opd_result **result_out, opd_error *error);

/* Queues the request and writes what the socket takes. Any number may be in flight; the server answers as they finish. What exceeds its limit of them waits
 * here, in order. While finished requests wait to be taken, small ones are gathered, and leave in one piece when the last is taken (or 64 KiB are together, or
 * anything waits or processes). */
OPD_API OPD_MUST_USE opd_status opd_submit(opd_client *client, const opd_request *request, opd_ticket *ticket_out, opd_error *error);

/* Waits for one. Returns the reply's status, with *result_out as in opd_run. OPD_DEADLINE_EXCEEDED with no result: not yet, it is still in flight;
 * timeout_us 0 looks and doesn't wait, UINT64_MAX waits without limit. OPD_NOT_FOUND: no such ticket in flight. */
OPD_API OPD_MUST_USE opd_status opd_wait(opd_client *client, opd_ticket ticket, uint64_t timeout_us, opd_result **result_out, opd_error *error);

/* Waits for whichever finishes first. OPD_NOT_FOUND: none is in flight. Otherwise as opd_wait. */
OPD_API OPD_MUST_USE opd_status opd_wait_any(opd_client *client, uint64_t timeout_us, opd_ticket *ticket_out, opd_result **result_out,
                                             opd_error *error);

/* Forgets a request: its reply is dropped when it comes. Its operands' data may be freed on return. A server that can (the feature "cancel") is told: what
 * it hasn't begun it doesn't begin, and a kernel that runs is asked to stop; requests that read its results fail with ABORTED. No-op for an unknown ticket. */
OPD_API void opd_cancel(opd_client *client, opd_ticket ticket);

/* For your own event loop: poll opd_client_fd for opd_client_events (POLLIN, with POLLOUT while something waits to be written), call opd_process, then take
 * what is done with opd_wait_any(client, 0, …). The descriptor is the client's. */
OPD_API int opd_client_fd(const opd_client *client);
OPD_API short opd_client_events(const opd_client *client);
OPD_API OPD_MUST_USE opd_status opd_process(opd_client *client, opd_error *error);

/* Requests in flight, and those of them whose reply is here. */
OPD_API size_t opd_in_flight(const opd_client *client);
OPD_API size_t opd_finished(const opd_client *client);

/* ---- Results ----------------------------------------------------------------------------------------------------------- */

/* All are borrowed from the result and valid until it is destroyed; a result may outlive its client. NULL is allowed in destroy. */
OPD_API void opd_result_destroy(opd_result *result);
OPD_API opd_status opd_result_status(const opd_result *result);
OPD_API const char *opd_result_message(const opd_result *result);  /* "" for OPD_OK. Escape it before a terminal sees it */
/* Of OPD_RESOURCE_EXHAUSTED that time heals (a full queue, a quota a second): when to try again, as the server estimated. 0: nobody knows. What a call writes into `error` has it too. */
OPD_API uint32_t opd_result_retry_after_us(const opd_result *result);
OPD_API const char *opd_result_provider(const opd_result *result); /* that ran; "" for a fake run */
OPD_API const char *opd_result_uuid(const opd_result *result);     /* "" unless asked for */
OPD_API uint32_t opd_result_count(const opd_result *result);       /* of outputs */
/* Row-major, in host memory, 64-byte aligned; data is NULL where nothing was sent (fake, dry, not copied). NULL past the count. */
OPD_API const opd_tensor *opd_result_tensor(const opd_result *result, uint32_t output);
/* generation 0: not kept */
OPD_API opd_handle opd_result_handle(const opd_result *result, uint32_t output);

typedef struct opd_skip {
	const char *provider;
	opd_reason_code code;
	uint32_t reserved;
	const char *reason; /* "dtype: weight bf16, x f32" */
} opd_skip;

typedef struct opd_explain {
	uint32_t struct_bytes;
	bool on_loop;      /* ran without a hand-off to a lane */
	const char *level; /* where the list comes from: "request", "session", "server", "configuration", "none" */
	const char *device;
	uint32_t skip_count;
	uint32_t effective_count;
	const opd_skip *skipped;
	const char *const *effective; /* the effective list */
	/* nanoseconds in the server */
	uint64_t decode_ns;
	uint64_t dispatch_ns;
	uint64_t queue_ns;
	uint64_t kernel_ns;
	uint64_t moves_ns;
	uint64_t pack_ns;
	uint32_t move_count;
	uint32_t reserved;
	const struct opd_move *moves;
	const char *narrowed; /* key of the list, where the configuration has one for such calls: "linear/bf16/rows<=4"; else "" */
	uint64_t receive_ns;  /* waiting for the payload, and for results of earlier requests */
	const struct opd_behind *behind; /* NULL: it waited for no lane */
	uint32_t batched;     /* requests that ran as one kernel, this one among them; 0: it ran alone */
} opd_explain;

/* Whom a request waited behind on its lane: jobs that were begun, and device time of those that ended, between its coming there and its own start. */
typedef struct opd_behind {
	uint64_t own_jobs;    /* of its own session */
	uint64_t tenant_jobs; /* of other sessions of its tenant */
	uint64_t other_jobs;  /* of other tenants */
	uint64_t realtime_jobs; /* all of them, by class */
	uint64_t interactive_jobs;
	uint64_t batch_jobs;
	uint64_t own_ns;
	uint64_t tenant_ns;
	uint64_t other_ns;
	uint64_t running; /* jobs that were running when it came */
} opd_behind;

typedef struct opd_move {
	const char *operand;
	const char *from;
	const char *to;
	uint64_t bytes;
} opd_move;

/* NULL unless asked for. */
OPD_API const opd_explain *opd_result_explain(const opd_result *result);

/* What a run of a graph says of itself. */
typedef struct opd_node_explain {
	const char *node;
	const char *op;
	const char *provider;
	opd_explain explain; /* of its times: kernel_ns alone */
} opd_node_explain;

typedef struct opd_graph_explain {
	uint32_t struct_bytes;
	uint32_t count;      /* of `nodes`: at most 4096, in the order in which they ran */
	uint32_t node_count; /* of the graph */
	bool dispatched;     /* this run inferred shapes, dispatched and planned; false: an earlier one had */
	const opd_node_explain *nodes;
	uint64_t arena_bytes;    /* peak of the intermediate results */
	uint64_t unshared_bytes; /* what they would take if no memory were used again */
	uint64_t prepare_ns;
	uint32_t width; /* so many parts of it are run by several threads at once, at most; 1: node after node */
} opd_graph_explain;
/* NULL unless asked for, and of a graph. */
OPD_API const opd_graph_explain *opd_result_graph(const opd_result *result);
/* A graph's states by number, as they are called from now on; generation 0 past the last. */
OPD_API opd_handle opd_result_state(const opd_result *result, uint32_t state);

/* ---- Graphs ------------------------------------------------------------------------------------------------------------ */

/* Ops that run as one request: described once, registered with a session, run many times. What a node gives stays in the daemon; only the outputs come back.
 *
 *     opd_graph *graph = opd_graph_create("mlp");
 *     opd_value x = opd_graph_input(graph, "x");
 *     opd_value w = opd_graph_constant(graph, "w", weights);
 *     opd_request *node = opd_request_create("linear");
 *     opd_request_value(node, NULL, x);
 *     opd_request_value(node, NULL, w);
 *     opd_value y = opd_graph_node(graph, "up", node);
 *     opd_request_destroy(node);
 *     opd_graph_output(graph, "y", y);
 *     uint64_t id;
 *     opd_graph_register(client, graph, &id, &error);
 *     opd_request *request = opd_request_graph(id);
 *     opd_request_tensor(request, "x", &operand);          // run and submit it like any other, as often as you like
 */
typedef struct opd_graph opd_graph;

/* NULL: out of memory. Names of graphs, inputs, nodes and outputs: 1 to 128 of A-Z a-z 0-9 _ . - : / (NULL: the server numbers them). Like a request's builder
 * it never fails half-way: what was wrong comes out of opd_graph_register, or of the submit of opd_request_once. */
OPD_API opd_graph *opd_graph_create(const char *name);
OPD_API void opd_graph_destroy(opd_graph *graph);

/* Given at each run, as an argument of the request by this name or in this order; at most 64. */
OPD_API opd_value opd_graph_input(opd_graph *graph, const char *name);
/* A kept tensor that nodes donate (opd_operand.donate): what they make of it is what the next run sees, in the same memory. Graphs may share states; their runs
 * then follow each other in the order of their submission. From a run's submission on only its result's opd_result_state names the tensor. */
OPD_API opd_value opd_graph_state(opd_graph *graph, const char *name, opd_handle handle);
/* A kept tensor as it is when the graph is registered; it may be freed afterwards. */
OPD_API opd_value opd_graph_constant(opd_graph *graph, const char *name, opd_handle handle);

/* Adds a node: op, arguments, priority, strict, device and allow_tf32 of `request`, which stays the caller's; its tensors come from values. Returns output 0.
 * Nodes may name nodes added later (by their number: they count from 0). */
OPD_API opd_value opd_graph_node(opd_graph *graph, const char *name, const opd_request *request);
static inline opd_value opd_value_output(opd_value node, uint32_t output)
{
	opd_value value = {node.node, output};
	return value;
}
/* Appends an operand: a whole value. Views and donations: opd_request_tensor with OPD_FROM_VALUE; a view's first extent may be -1, as many as the value has. */
OPD_API void opd_request_value(opd_request *request, const char *name, opd_value value);

/* What runs return, in this order: outputs of nodes that no other node donates; at most 64. */
OPD_API void opd_graph_output(opd_graph *graph, const char *name, opd_value value);

/* Checks everything that needs no shapes: names, ops, arguments, values, donations, cycles; an error names graph and node. The graph object isn't needed
 * afterwards. The registration ends with the session, or by opd_graph_free (runs submitted before are not touched). */
OPD_API OPD_MUST_USE opd_status opd_graph_register(opd_client *client, opd_graph *graph, uint64_t *id_out, opd_error *error);
OPD_API OPD_MUST_USE opd_status opd_graph_free(opd_client *client, uint64_t id, opd_error *error);

/* A run: its arguments are the graph's inputs; opd_request_output, _explain, _timeout and _mode hold, and all of opd_run, opd_submit, opd_wait. Runs of one graph
 * are ordered. `once`: of a graph that isn't registered; it must live as long as the request. NULL: out of memory. */
OPD_API opd_request *opd_request_graph(uint64_t id);
OPD_API opd_request *opd_request_once(const opd_graph *graph);

/* ---- Kept tensors ------------------------------------------------------------------------------------------------------ */

/* Requests that are no ops, for opd_run and opd_submit as those of ops are; they take no arguments and, but for a fetch's opd_request_output_memory, no output options. NULL: out of memory; what is wrong
 * with an operand comes out of submit.
 *   upload  a host tensor, row-major, becomes a kept one: the result has one output, its handle. Later requests may name it by the upload's ticket, answered or not.
 *           With OPD_FROM_NOTHING the tensor is made without bytes, which come in writes; until all are there, naming it is FAILED_PRECONDITION.
 *   write   `bytes` of `data` go to byte `offset` of such a tensor. Any order; a range may be written again while others are missing. After the last its bytes don't
 *           change any more, and a write is FAILED_PRECONDITION. The result has no outputs. `data` is kept by reference, as a tensor's is.
 *   fetch   a kept tensor (handle or result) comes back whole, or a view of it: the result has one output. With opd_request_output_memory of output 0 it is copied
 *           there by the server, and nothing is sent. */
OPD_API opd_request *opd_upload_create(const opd_operand *operand);
OPD_API opd_request *opd_write_create(opd_handle handle, uint64_t offset, const void *data, uint64_t bytes);
OPD_API opd_request *opd_fetch_create(const opd_operand *operand);

typedef struct opd_upload_options {
	uint32_t struct_bytes;
	uint32_t reserved;
	uint64_t part_bytes; /* 0: in one piece, or in parts of 4 MiB where it is watched or exceeds what the server takes in one request */
	void (*on_progress)(void *progress_data, uint64_t done_bytes, uint64_t total_bytes); /* after each part; NULL: none */
	void *progress_data;
	const char *device; /* where it is to live: "cuda:1"; NULL: in the server's host memory */
} opd_upload_options;

/* Uploads and waits; options NULL: the defaults. An operand in shared memory is copied by the server, whole, and nothing is sent. In parts, one that the server had no memory for is sent again, five times at most. A failed upload leaves nothing
 * in the session. */
OPD_API OPD_MUST_USE opd_status opd_upload(opd_client *client, const opd_operand *operand, const opd_upload_options *options, opd_handle *handle_out,
                                           opd_error *error);
/* Fetches and waits; *result_out as in opd_run. */
OPD_API OPD_MUST_USE opd_status opd_fetch(opd_client *client, const opd_operand *operand, opd_result **result_out, opd_error *error);

typedef struct opd_kept_tensor {
	opd_handle handle;
	opd_dtype dtype;
	uint32_t rank;
	int64_t shape[OPD_RANK_MAX];
	uint64_t bytes;
	uint64_t received_bytes; /* less than bytes: an upload in parts that isn't complete */
	opd_ticket ticket;       /* of the request whose output or upload it is; 0: none's */
	uint32_t output;
	uint32_t reserved;
} opd_kept_tensor;

typedef struct opd_kept_list {
	uint32_t count;
	uint32_t reserved;
	const opd_kept_tensor *tensors; /* by ascending handle index */
} opd_kept_list;

/* This session's kept tensors. */
OPD_API OPD_MUST_USE opd_status opd_kept_tensors(opd_client *client, const opd_kept_list **list_out, opd_error *error);

/* ---- Sharing: who uses the daemon's lanes ------------------------------------------------------------------------------- */

/* What has run on a lane; nanoseconds. */
typedef struct opd_usage {
	uint64_t jobs;
	uint64_t device_ns; /* measured: kernels, and what other threads did for them */
	uint64_t wait_ns;   /* all jobs' waiting together */
	uint64_t wait_max_ns;
} opd_usage;

/* What a session, or all sessions of a tenant together, may use. */
typedef enum opd_quota_kind {
	OPD_QUOTA_SESSIONS = 0,      /* open at once, of a tenant */
	OPD_QUOTA_IN_FLIGHT = 1,     /* requests accepted and not yet answered */
	OPD_QUOTA_QUEUED = 2,        /* of them, waiting for one lane */
	OPD_QUOTA_BYTES_IN = 3,      /* of requests, a second */
	OPD_QUOTA_BYTES_OUT = 4,     /* of replies, a second */
	OPD_QUOTA_MEMORY = 5,        /* tensor bytes in host memory */
	OPD_QUOTA_DEVICE_MEMORY = 6, /* tensor bytes on each device */
	OPD_QUOTA_DEVICE_TIME = 7,   /* nanoseconds a second, on each lane */
} opd_quota_kind;

typedef struct opd_quota {
	opd_quota_kind kind;
	uint64_t limit;   /* 0: any */
	uint64_t used;    /* now; of bytes in and out and of device time: since the beginning */
	uint64_t refused; /* so many times something was, for this limit */
} opd_quota;

typedef struct opd_session_state {
	uint64_t session;
	const char *tenant;
	const char *peer; /* "unix:uid=1000,pid=42", "tcp://127.0.0.1:5123" */
	uint64_t age_us;
	opd_class service_class; /* of requests that name none */
	uint32_t weight;
	uint32_t in_flight; /* requests not yet answered */
	uint32_t queued;    /* of them, waiting for the CPU lane */
	uint32_t running;
	uint64_t memory_bytes;
	double share; /* of the lane, 0 to 1, while all that wait now go on waiting */
	opd_usage usage;
	uint32_t quota_count;
	const opd_quota *quotas;
	const char *device; /* that it has pinned; "": none */
} opd_session_state;

typedef struct opd_tenant_state {
	const char *name;
	uint32_t weight;
	opd_class service_class;
	opd_class class_max;
	uint32_t sessions;
	uint64_t device_rate_ns; /* device time that it may use a second; 0: any */
	uint32_t queued;
	uint32_t running;
	opd_usage usage;
	uint32_t quota_count;
	const opd_quota *quotas;
} opd_tenant_state;

typedef struct opd_lane_state {
	const char *name;
	uint32_t threads;
	uint32_t queued;
	uint32_t running;
	uint64_t device_ns; /* used since the daemon's start */
} opd_lane_state;

typedef struct opd_sharing {
	uint64_t uptime_us;
	uint64_t next; /* session to go on with; 0: that was all */
	uint32_t session_count;
	uint32_t tenant_count;
	uint32_t lane_count;
	const opd_session_state *sessions; /* oldest first */
	const opd_tenant_state *tenants;
	const opd_lane_state *lanes;
} opd_sharing;

/* The sessions that this one sees, from number `first` on: its tenant's, an administrator all. DATA_LOSS: what the server says of the next page leads nowhere. A document (opd_document_free). */
OPD_API OPD_MUST_USE opd_status opd_sessions(opd_client *client, uint64_t first, const opd_sharing **sharing_out, opd_error *error);
/* Administrators: another weight among its tenant's sessions (0: as it is), another class for requests that name none (OPD_CLASS_NORMAL: as it is). OPD_NOT_FOUND. */
OPD_API OPD_MUST_USE opd_status opd_set_session(opd_client *client, uint64_t session, uint32_t weight, opd_class service_class, opd_error *error);
/* Administrators: another limit for the session (not OPD_QUOTA_SESSIONS, which is a tenant's); 0: as the daemon's configuration has it. What is in use above it stays. */
OPD_API OPD_MUST_USE opd_status opd_set_session_quota(opd_client *client, uint64_t session, opd_quota_kind kind, uint64_t limit, opd_error *error);
/* Pins a session to a device of several of a kind ("cuda:1"; "any": to none): requests that name no device, and what they upload to a kind, go there if what runs them is of that kind.
 * session 0: this one, which needs no right; others are administrators' to pin. OPD_FAILED_PRECONDITION: no such device. */
OPD_API OPD_MUST_USE opd_status opd_set_session_device(opd_client *client, uint64_t session, const char *device, opd_error *error);

/* ---- What the daemon has counted since its start ------------------------------------------------------------------------- */

/* A histogram's bucket k holds durations of at most this · 2^k, above those before; its last one all longer ones. */
#define OPD_STAT_FIRST_NS 1024

typedef enum opd_stat_kind {
	OPD_STAT_COUNTER = 0,
	OPD_STAT_GAUGE = 1,
	OPD_STAT_HISTOGRAM = 2,
} opd_stat_kind;

typedef struct opd_stat_label {
	const char *name;
	const char *value;
} opd_stat_label;

/* The daemon's README lists the names; seconds and bytes. */
typedef struct opd_stat {
	const char *name;
	opd_stat_kind kind;
	double value; /* of a histogram: the sum of its durations, in seconds */
	uint32_t label_count;
	const opd_stat_label *labels;
	uint32_t bucket_count;
	const uint64_t *buckets;
} opd_stat;

typedef struct opd_stats {
	uint32_t count;
	const opd_stat *items; /* those of a name stand together */
	bool cut;              /* there were more than a reply holds */
} opd_stats;

/* The same numbers as the daemon's metrics endpoint; of tenants its own, an administrator all. A document (opd_document_free). */
OPD_API OPD_MUST_USE opd_status opd_get_stats(opd_client *client, const opd_stats **stats_out, opd_error *error);

/* ---- Publications: tensors that several sessions have, once in memory -------------------------------------------------- */

typedef struct opd_publication {
	const char *name;
	const char *tenant; /* whose it is */
	opd_dtype dtype;
	uint32_t rank;
	int64_t shape[OPD_RANK_MAX];
	uint64_t bytes;
	uint8_t sha256[32]; /* of the tensor's bytes, computed by the daemon */
	bool all;           /* for every tenant, else for its own */
	bool lasting;       /* until withdrawn, else as long as its session */
	uint32_t holders;   /* handles of these bytes, in all sessions */
	opd_handle handle;  /* this session's, of opd_publish and opd_open */
} opd_publication;

typedef struct opd_publication_list {
	uint32_t count;
	uint32_t reserved;
	const opd_publication *publications; /* oldest first */
} opd_publication_list;

typedef struct opd_publish_options {
	uint32_t struct_bytes;
	bool all;
	bool lasting;
} opd_publish_options;

/* Publishes a kept tensor, which is read-only from then on: donating it is FAILED_PRECONDITION. Name: 1 to 128 of A-Z a-z 0-9 _ . - : /, each tenant's own. The handle stays
 * good, and names the bytes already there where the tenant has published the same before. The same name with the same contents again is no error; with others
 * OPD_ALREADY_EXISTS. options NULL: for the own tenant, as long as this session. The publication is a document (opd_document_free). */
OPD_API OPD_MUST_USE opd_status opd_publish(opd_client *client, opd_handle handle, const char *name, const opd_publish_options *options,
                                            const opd_publication **publication_out, opd_error *error);
/* A handle of what is published to this session's tenant (its own names first), to be freed like any other. It outlives the publication. OPD_NOT_FOUND. */
OPD_API OPD_MUST_USE opd_status opd_open(opd_client *client, const char *name, const opd_publication **publication_out, opd_error *error);
OPD_API OPD_MUST_USE opd_status opd_open_contents(opd_client *client, const uint8_t sha256[32], const opd_publication **publication_out, opd_error *error);
/* The tenant's own (an administrator: anybody's). Those who have it keep it. */
OPD_API OPD_MUST_USE opd_status opd_withdraw(opd_client *client, const char *name, opd_error *error);
/* What this session may open (an administrator: all). */
OPD_API OPD_MUST_USE opd_status opd_publications(opd_client *client, const opd_publication_list **list_out, opd_error *error);

/* Frees kept tensors; requests submitted before it read them first. OPD_NOT_FOUND names the first that isn't there; the others are freed. */
OPD_API OPD_MUST_USE opd_status opd_free(opd_client *client, const opd_handle *handles, size_t count, opd_error *error);

/* ---- Priorities -------------------------------------------------------------------------------------------------------- */

typedef struct opd_priority_entry {
	const char *op; /* or "*" */
	const char *const *providers;
	size_t count;
} opd_priority_entry;

typedef enum opd_scope {
	OPD_SCOPE_SESSION = 0, /* the newest pushed map, or the session's base */
	OPD_SCOPE_SERVER = 1,  /* every session's default until the daemon ends: administrators */
} opd_scope;

/* A map that holds for this session until popped. A bad entry changes nothing. They apply to requests submitted later. */
OPD_API OPD_MUST_USE opd_status opd_priority_push(opd_client *client, const opd_priority_entry *entries, size_t count, opd_error *error);
OPD_API OPD_MUST_USE opd_status opd_priority_pop(opd_client *client, opd_error *error);
OPD_API OPD_MUST_USE opd_status opd_priority_set(opd_client *client, opd_scope scope, const opd_priority_entry *entry, opd_error *error);
OPD_API OPD_MUST_USE opd_status opd_priority_clear(opd_client *client, opd_scope scope, const char *op, opd_error *error);
/* Administrators: the session's list of an op, or of "*", from its next request on, unless a map that it has pushed itself has another. OPD_NOT_FOUND. */
OPD_API OPD_MUST_USE opd_status opd_set_session_priority(opd_client *client, uint64_t session, const opd_priority_entry *entry, opd_error *error);
OPD_API OPD_MUST_USE opd_status opd_clear_session_priority(opd_client *client, uint64_t session, const char *op, opd_error *error);

/* Every document below is freed as a whole, with opd_document_free (NULL is allowed). It may outlive its client. Texts in it come from the server. */
OPD_API void opd_document_free(const void *document);

typedef struct opd_priority {
	const char *level; /* "session", "server", "configuration", "none" */
	uint32_t effective_count;
	uint32_t stored_count;
	const char *const *effective; /* what dispatch walks */
	const char *const *stored;    /* the list as it was given */
	uint32_t case_count;
	const struct opd_priority_case *cases; /* lists of the configuration for some of the op's calls, in the order in which they are asked; the first that holds is walked */
} opd_priority;

typedef struct opd_priority_case {
	const char *key; /* "linear/bf16/rows<=4" */
	uint32_t effective_count;
	uint32_t stored_count;
	const char *const *effective;
	const char *const *stored;
} opd_priority_case;
OPD_API OPD_MUST_USE opd_status opd_priority_get(opd_client *client, const char *op, const opd_priority **priority_out, opd_error *error);

/* ---- Inspecting -------------------------------------------------------------------------------------------------------- */

typedef struct opd_implementation {
	const char *provider;
	const char *reason; /* why it isn't supported; "" when it is */
	const char *device;
	const char *schema;
	const char *uuid;
	bool supported;
	bool predicate;
	bool plan_may_refuse;
	bool in_place;
	bool thread_invariant;
	bool batch_invariant;
	bool bf16_denormals_zero; /* denormal bf16 operands count as zero */
} opd_implementation;

typedef struct opd_op_description {
	const char *name;
	const char *schema;
	const char *doc;
	const char *activations;
	const char *level;
	uint32_t implementation_count;
	uint32_t effective_count;
	uint32_t dim_count;
	uint32_t in_place_count;
	const opd_implementation *implementations;
	const char *const *effective;
	const char *const *dims;
	const int64_t *default_dims;            /* [dim_count] */
	const char *const *in_place_params;     /* [in_place_count] */
	const uint32_t *in_place_results;       /* [in_place_count] */
} opd_op_description;

typedef struct opd_op_list {
	uint32_t count;
	uint32_t reserved;
	const opd_op_description *ops; /* name, schema and doc only */
} opd_op_list;

typedef struct opd_provider_description {
	const char *name;
	const char *version;
	const char *reason; /* why it isn't available; "" when it is */
	const char *source; /* "built in" or a path */
	bool available;
	uint32_t op_count;
	uint32_t device_count;
	const char *const *ops;
	const char *const *devices;
	uint64_t failures; /* of its kernels, since the daemon's start */
	bool isolated;     /* its code runs in worker processes */
	uint64_t deaths;   /* of those processes */
	uint32_t quarantined_count;
	const char *const *quarantined; /* "relu: 5 failures (kernel error 5)": implementations that were taken out */
	const char *unconfined; /* what of the worker processes' confinement the daemon's kernel doesn't give them; "": nothing */
} opd_provider_description;

typedef struct opd_provider_list {
	uint32_t count;
	uint32_t reserved;
	const opd_provider_description *providers;
} opd_provider_list;

typedef struct opd_device_state {
	const char *name;            /* "cuda:0" */
	uint64_t memory_bytes;       /* tensors and scratch there, of all sessions */
	uint64_t cached_bytes;       /* free, and kept for what comes next */
	uint64_t memory_limit_bytes; /* what it has; 0: not known, nothing has run there yet */
	uint32_t jobs;               /* that wait for it or run on it */
	const char *lost;            /* why it can't be used; "": it can */
} opd_device_state;

typedef struct opd_server_info {
	const char *version;
	uint64_t uptime_us;
	uint64_t pid;
	uint64_t sessions;
	uint64_t requests;
	uint64_t memory_bytes;
	uint64_t memory_limit_bytes;
	uint64_t session_memory_bytes;
	uint32_t loops;
	uint32_t threads;
	bool draining;
	uint32_t listener_count;
	uint32_t device_count;
	const char *const *listeners;
	const char *const *devices;
	uint64_t graph_runs;       /* begun since the start */
	uint64_t graph_dispatches; /* of them, those that had to infer, dispatch and plan */
	uint64_t derived_copies;   /* that providers have of kept tensors (packed weights) */
	uint64_t derived_bytes;
	uint64_t derived_found; /* runs that were given one that was there */
	uint64_t derived_made;
	uint32_t unhealthy_count;
	uint32_t degraded_count;
	const char *const *unhealthy; /* what should keep new work away, each "object: what"; none: healthy */
	const char *const *degraded;  /* what an operator should look at while everything is served */
	uint32_t stuck; /* threads in kernels that have exceeded their budget and still run */
	uint64_t compared; /* runs whose results another provider was asked to confirm */
	uint64_t diverged; /* of them, those that it didn't */
	uint64_t left_out; /* of the sample: not compared */
	uint32_t device_state_count;
	const opd_device_state *device_states; /* in the order of devices, without "cpu" */
} opd_server_info;

OPD_API OPD_MUST_USE opd_status opd_ops(opd_client *client, const opd_op_list **list_out, opd_error *error);
OPD_API OPD_MUST_USE opd_status opd_describe(opd_client *client, const char *op, const opd_op_description **description_out, opd_error *error);
OPD_API OPD_MUST_USE opd_status opd_providers(opd_client *client, const opd_provider_list **list_out, opd_error *error);
OPD_API OPD_MUST_USE opd_status opd_info(opd_client *client, const opd_server_info **info_out, opd_error *error);
OPD_API OPD_MUST_USE opd_status opd_ping(opd_client *client, opd_error *error);

/* ---- Inputs made by the daemon ----------------------------------------------------------------------------------------- */

typedef struct opd_generate_options {
	uint32_t struct_bytes;
	opd_dtype dtype;
	uint32_t variant; /* 0: the typical call */
	uint32_t values;  /* 0 random, 1 extreme, 2 small integers */
	uint64_t seed;
	uint32_t dim_count; /* 0: the op's default_dims */
	bool keep;          /* leave the tensors in the session: the request then names them by handle */
	const int64_t *dims;
} opd_generate_options;

/* A request of that op with made-up arguments, ready to run; it owns its tensors' data. */
OPD_API OPD_MUST_USE opd_status opd_generate(opd_client *client, const char *op, const opd_generate_options *options, opd_request **request_out,
                                             opd_error *error);

/* ---- Administration (PERMISSION_DENIED unless opd_session.admin) ------------------------------------------------------------ */

OPD_API OPD_MUST_USE opd_status opd_load_module(opd_client *client, const char *path, opd_error *error);
/* Ends the quarantine of a provider, or (op not NULL) of its implementation of one op. FAILED_PRECONDITION: nothing of it is quarantined. */
OPD_API OPD_MUST_USE opd_status opd_restore_provider(opd_client *client, const char *provider, const char *op, opd_error *error);
OPD_API OPD_MUST_USE opd_status opd_set_log_level(opd_client *client, const char *level, opd_error *error);
/* Stop accepting, finish what is under way within timeout_us (0: the configuration's), end. */
OPD_API OPD_MUST_USE opd_status opd_drain(opd_client *client, uint64_t timeout_us, opd_error *error);

/* ---- In this process ------------------------------------------------------------------------------------------------------- */

/* Only with "embedded:" addresses, else FAILED_PRECONDITION. Between begin and end the client calls the dispatcher directly, on the caller's thread,
 * instead of through encoded frames; results, provider choice and errors are the same. It also runs kernels of the CPU that come with opd and that several
 * threads wouldn't do sooner (estimated under 40 us each; any where the lane has one thread); others go to the daemon's threads. Scopes nest; only this client is affected. begin wants no request in
 * flight (FAILED_PRECONDITION); opd_submit runs at once inside. */
OPD_API OPD_MUST_USE opd_status opd_direct_begin(opd_client *client, opd_error *error);
OPD_API void opd_direct_end(opd_client *client);

#ifdef __cplusplus
}
#endif
#endif
