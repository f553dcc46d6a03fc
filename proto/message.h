/* The messages of the wire as plain C structs: what client and server build and read. proto/codec.h turns them into envelopes and back.
 *
 * Layer: proto, internal. Threads: values.
 * Ownership: a decoded message and all it points to live in the arena it was decoded into (inline tensor bytes too). A message to be encoded
 * borrows everything.
 * Text: `struct msg_text` is NUL-terminated and, once decoded, valid UTF-8 without an inner NUL; its length is bounded (proto/bounds.h).
 * An absent text is {NULL, 0} or "". When encoding, `data` need not be NUL-terminated. */
#ifndef OPD_PROTO_MESSAGE_H
#define OPD_PROTO_MESSAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "opd/reason.h"
#include "opd/status.h"
#include "opd/tensor.h"

struct msg_text {
	const char *data;
	size_t bytes;
};

static inline struct msg_text msg_text(const char *text)
{
	return (struct msg_text){text, text == NULL ? 0 : strlen(text)};
}

/* ---- Session ---- */

struct msg_hello {
	uint32_t version_min;
	uint32_t version_max;
	uint32_t feature_count;
	const struct msg_text *features;
	struct msg_text client;
	uint64_t chunk_bytes;
	bool no_chunks;
	size_t reattach_bytes;
	struct msg_text token;
};

struct msg_limits {
	uint64_t envelope_bytes;
	uint64_t payload_bytes;
	uint64_t session_bytes;
	uint32_t in_flight;
};

struct msg_hello_reply {
	opd_status status;
	struct msg_text message;
	uint32_t version;
	uint32_t feature_count;
	const struct msg_text *features;
	struct msg_text server;
	uint64_t chunk_bytes;
	struct msg_limits limits;
	uint64_t session;
	struct msg_text tenant;
	bool admin;
	struct msg_text identity;
	uint32_t right_count;
	const struct msg_text *rights;
};

struct msg_goaway {
	opd_status status;
	struct msg_text message;
};

/* ---- Tensors ---- */

typedef enum msg_source {
	MSG_SOURCE_NONE = 0,
	MSG_SOURCE_INLINE,
	MSG_SOURCE_PAYLOAD,
	MSG_SOURCE_HANDLE,
	MSG_SOURCE_RESULT,
	MSG_SOURCE_SHARED,
	MSG_SOURCE_GRAPH_INPUT, /* within a graph's nodes */
	MSG_SOURCE_NODE,        /* … */
} msg_source;

struct msg_handle {
	uint32_t index;
	uint64_t generation; /* 0: no handle */
};

struct msg_node_output {
	uint32_t node;
	uint32_t output;
};

struct msg_shared_range {
	uint32_t region; /* 0: none */
	uint64_t offset;
	uint64_t bytes;
};

struct msg_tensor {
	opd_dtype dtype; /* decoded: a valid dtype or OPD_DTYPE_NONE; the shape and strides are not yet checked */
	uint32_t rank;   /* decoded: at most OPD_RANK_MAX */
	bool strided;    /* `strides` are given */
	bool donate;
	msg_source source;
	int64_t shape[OPD_RANK_MAX];
	int64_t strides[OPD_RANK_MAX];
	uint64_t byte_offset;
	union {
		struct {
			const uint8_t *data;
			size_t bytes;
		} inlined;
		struct {
			uint64_t offset;
			uint64_t bytes;
		} payload;
		struct msg_handle handle;
		struct {
			uint64_t request;
			uint32_t output;
		} result;
		struct msg_shared_range shared;
		uint32_t graph_input;
		struct msg_node_output node;
	};
};

/* One argument; kinds are opd_arg_kind's of opd/provider.h, which proto can't include. */
typedef enum msg_arg_kind {
	MSG_ARG_NONE = 0,
	MSG_ARG_TENSOR = 1,
	MSG_ARG_TENSORS = 2,
	MSG_ARG_INT = 3,
	MSG_ARG_INTS = 4,
	MSG_ARG_FLOAT = 5,
	MSG_ARG_BOOL = 6,
	MSG_ARG_STR = 7,
} msg_arg_kind;

struct msg_arg {
	struct msg_text name; /* empty: positional */
	msg_arg_kind kind;
	uint32_t count; /* of tensors and ints */
	union {
		struct msg_tensor *tensor;  /* [1], or [count] for TENSORS */
		const int64_t *ints;
		int64_t i;
		double f;
		bool b;
		struct msg_text str;
	};
};

/* ---- Running ---- */

struct msg_list {
	bool present; /* an empty list differs from none */
	uint32_t count;
	const struct msg_text *names;
};

typedef enum msg_mode {
	MSG_RUN = 0,
	MSG_FAKE = 1,
	MSG_DRY = 2,
} msg_mode;

struct msg_output_option {
	bool keep;
	bool no_copy;
	struct msg_shared_range shared;
};

struct msg_graph;

#define MSG_SERVICE_CLASS_MAX 3

struct msg_run {
	struct msg_text op; /* of RUN_GRAPH: empty, or the client's name for it */
	uint64_t graph;     /* of RUN_GRAPH: 0 is `once` */
	const struct msg_graph *once;
	uint32_t arg_count;
	struct msg_arg *args;
	struct msg_list priority;
	bool strict;
	bool explain;
	bool retry;
	bool allow_tf32;
	bool uuid;
	bool inline_results;
	msg_mode mode;
	struct msg_text device;
	uint32_t output_count;
	const struct msg_output_option *outputs;
	uint64_t timeout_us;
	uint32_t service_class; /* 0: the session's; 1 realtime, 2 interactive, 3 batch */
};

struct msg_result {
	struct msg_tensor tensor;
	struct msg_handle kept;
};

typedef enum msg_level {
	MSG_LEVEL_NONE = 0,
	MSG_LEVEL_NODE = 1,
	MSG_LEVEL_REQUEST = 2,
	MSG_LEVEL_SESSION = 3,
	MSG_LEVEL_SERVER = 4,
	MSG_LEVEL_CONFIGURATION = 5,
} msg_level;

/* "request", "session", …, "none" */
const char *msg_level_name(msg_level level);

struct msg_skip {
	struct msg_text provider;
	opd_reason_code code;
	struct msg_text reason;
};

struct msg_move {
	struct msg_text operand;
	struct msg_text from;
	struct msg_text to;
	uint64_t bytes;
};

struct msg_times { /* nanoseconds */
	uint64_t decode;
	uint64_t dispatch;
	uint64_t queue;
	uint64_t kernel;
	uint64_t moves;
	uint64_t pack;
	uint64_t receive;
};

struct msg_behind {
	uint64_t own_jobs;
	uint64_t tenant_jobs;
	uint64_t other_jobs;
	uint64_t realtime_jobs;
	uint64_t interactive_jobs;
	uint64_t batch_jobs;
	uint64_t own_ns;
	uint64_t tenant_ns;
	uint64_t other_ns;
	uint64_t running;
};

struct msg_explain {
	uint32_t skip_count;
	const struct msg_skip *skipped;
	uint32_t effective_count;
	const struct msg_text *effective;
	msg_level level;
	struct msg_times times;
	uint32_t move_count;
	const struct msg_move *moves;
	struct msg_text device;
	bool on_loop;
	struct msg_text narrowed; /* key of the configuration's list, where it isn't the op's plain one */
	const struct msg_behind *behind; /* NULL: it waited for no lane */
	uint32_t batched;                /* 0: it ran alone */
};

struct msg_node_explain {
	struct msg_text node;
	struct msg_text op;
	struct msg_text provider;
	struct msg_explain explain;
};

struct msg_graph_explain {
	uint32_t count;
	const struct msg_node_explain *nodes;
	uint32_t node_count;
	bool dispatched;
	uint64_t arena_bytes;
	uint64_t unshared_bytes;
	uint64_t prepare_ns;
	uint32_t width;
};

struct msg_run_reply {
	struct msg_text provider;
	uint32_t output_count;
	struct msg_result *outputs;
	const struct msg_explain *explain; /* NULL: not asked for */
	struct msg_text uuid;
	const struct msg_graph_explain *graph; /* NULL: not asked for, or no graph */
	uint32_t state_count;
	const struct msg_handle *states;
};

/* ---- Inspecting ---- */

struct msg_impl {
	struct msg_text provider;
	bool supported;
	bool predicate;
	bool plan_may_refuse;
	bool in_place;
	bool thread_invariant;
	bool batch_invariant;
	bool bf16_denormals_zero;
	struct msg_text reason;
	struct msg_text device;
	struct msg_text schema;
	struct msg_text uuid;
};

struct msg_in_place {
	struct msg_text param;
	uint32_t result;
};

struct msg_op {
	struct msg_text name;
	struct msg_text schema;
	struct msg_text doc;
	uint32_t impl_count;
	const struct msg_impl *impls;
	uint32_t effective_count;
	const struct msg_text *effective;
	msg_level level;
	struct msg_text activations;
	uint32_t in_place_count;
	const struct msg_in_place *in_place;
	uint32_t dim_count;
	const struct msg_text *dims;
	uint32_t default_dim_count;
	const int64_t *default_dims;
};

struct msg_provider {
	struct msg_text name;
	struct msg_text version;
	bool available;
	struct msg_text reason;
	struct msg_text source;
	uint32_t op_count;
	const struct msg_text *ops;
	uint32_t device_count;
	const struct msg_text *devices;
	uint64_t failures;
	uint32_t quarantined_count;
	const struct msg_text *quarantined;
	bool isolated;
	uint64_t deaths;
	struct msg_text unconfined;
};

struct msg_device_state {
	struct msg_text name;
	uint64_t memory_bytes;
	uint64_t cached_bytes;
	uint64_t memory_limit_bytes;
	uint32_t jobs;
	struct msg_text lost; /* data NULL: it isn't */
};

struct msg_info {
	struct msg_text version;
	uint64_t uptime_us;
	uint32_t listener_count;
	const struct msg_text *listeners;
	uint32_t loops;
	uint32_t threads;
	uint32_t device_count;
	const struct msg_text *devices;
	uint64_t sessions;
	uint64_t requests;
	uint64_t memory_bytes;
	uint64_t memory_limit_bytes;
	uint64_t session_memory_bytes;
	uint64_t pid;
	bool draining;
	uint64_t graph_runs;
	uint64_t graph_dispatches;
	uint64_t derived_copies;
	uint64_t derived_bytes;
	uint64_t derived_found;
	uint64_t derived_made;
	uint32_t unhealthy_count;
	const struct msg_text *unhealthy;
	uint32_t degraded_count;
	const struct msg_text *degraded;
	uint32_t stuck;
	uint64_t compared;
	uint64_t diverged;
	uint64_t left_out;
	uint32_t device_state_count;
	const struct msg_device_state *device_states;
};

/* ---- Graphs ---- */

typedef enum msg_graph_kind {
	MSG_GRAPH_INPUT = 0,
	MSG_GRAPH_STATE = 1,
	MSG_GRAPH_CONSTANT = 2,
} msg_graph_kind;

struct msg_graph_input {
	struct msg_text name;
	msg_graph_kind kind;
	struct msg_tensor tensor; /* of a state or a constant */
};

struct msg_graph_node {
	struct msg_text name;
	struct msg_text op;
	uint32_t arg_count;
	struct msg_arg *args;
	struct msg_list priority;
	bool strict;
	bool allow_tf32;
	struct msg_text device;
};

struct msg_graph_output {
	struct msg_text name;
	struct msg_node_output node;
};

struct msg_graph {
	struct msg_text name;
	uint32_t input_count;
	uint32_t node_count;
	uint32_t output_count;
	struct msg_graph_input *inputs;
	struct msg_graph_node *nodes;
	struct msg_graph_output *outputs;
};

struct msg_registered {
	uint64_t graph;
	uint32_t nodes;
	uint64_t bytes;
};

/* ---- Requests ---- */

struct msg_free {
	uint32_t count;
	struct msg_tensor *tensors;
};

struct msg_priority_entry {
	struct msg_text op;
	struct msg_list list;
};

struct msg_priority_map {
	uint32_t count;
	const struct msg_priority_entry *entries;
};

typedef enum msg_scope {
	MSG_SCOPE_SESSION = 0,
	MSG_SCOPE_SERVER = 1,
} msg_scope;

struct msg_set_priority {
	msg_scope scope;
	struct msg_text op;
	struct msg_list list; /* not present: clear */
	uint64_t session;     /* whose, by MSG_SCOPE_SESSION; 0: the sender's own */
};

struct msg_generate {
	struct msg_text op;
	opd_dtype dtype;
	uint32_t dim_count;
	const int64_t *dims;
	uint32_t variant;
	uint64_t seed;
	uint32_t values;
	bool keep;
};

struct msg_upload {
	struct msg_tensor *tensor;
	bool parts;
	struct msg_text device;
};

struct msg_write {
	struct msg_handle handle;
	uint64_t offset;
	struct msg_tensor *data;
};

struct msg_publish {
	struct msg_tensor *tensor;
	struct msg_text name;
	bool all;
	bool lasting;
};

#define MSG_SHA256_BYTES 32u

struct msg_open {
	struct msg_text name;
	const uint8_t *sha256; /* [MSG_SHA256_BYTES]; NULL: by name */
};

typedef enum msg_request_kind {
	MSG_REQUEST_NONE = 0, /* no body, or one that this build doesn't know */
	MSG_REQUEST_RUN,
	MSG_REQUEST_FREE,
	MSG_REQUEST_PUSH_PRIORITY,
	MSG_REQUEST_POP_PRIORITY,
	MSG_REQUEST_SET_PRIORITY,
	MSG_REQUEST_GET_PRIORITY,
	MSG_REQUEST_LIST_OPS,
	MSG_REQUEST_DESCRIBE,
	MSG_REQUEST_LIST_PROVIDERS,
	MSG_REQUEST_PING,
	MSG_REQUEST_INFO,
	MSG_REQUEST_GENERATE,
	MSG_REQUEST_LOAD_MODULE,
	MSG_REQUEST_SET_LOG_LEVEL,
	MSG_REQUEST_DRAIN,
	MSG_REQUEST_UPLOAD,
	MSG_REQUEST_WRITE,
	MSG_REQUEST_FETCH,
	MSG_REQUEST_LIST_TENSORS,
	MSG_REQUEST_PUBLISH,
	MSG_REQUEST_OPEN,
	MSG_REQUEST_WITHDRAW,
	MSG_REQUEST_LIST_PUBLICATIONS,
	MSG_REQUEST_REGISTER_GRAPH,
	MSG_REQUEST_RUN_GRAPH, /* in `run`, whose args are the graph's inputs */
	MSG_REQUEST_FREE_GRAPH,
	MSG_REQUEST_ATTACH_MEMORY,
	MSG_REQUEST_DETACH_MEMORY,
	MSG_REQUEST_ATTACH_RINGS,
	MSG_REQUEST_LIST_SESSIONS,
	MSG_REQUEST_SET_SESSION,
	MSG_REQUEST_GET_STATS,
	MSG_REQUEST_RESTORE_PROVIDER,
} msg_request_kind;
/* More than there are kinds. */
#define MSG_REQUEST_KINDS 64u

struct msg_attach_rings {
	uint64_t request_bytes;
	uint64_t reply_bytes;
	uint64_t poll_us;
};

struct msg_restore {
	struct msg_text provider;
	struct msg_text op;
};

#define MSG_QUOTA_KINDS 8u

struct msg_quota {
	uint32_t kind; /* below MSG_QUOTA_KINDS */
	uint64_t limit;
	uint64_t used;
	uint64_t refused;
};

struct msg_set_session {
	uint64_t session;
	uint32_t weight;        /* 0: as it is */
	uint32_t service_class; /* 0: as it is */
	uint32_t quota_count;
	struct msg_quota *quotas;
	struct msg_text device; /* "any": none; empty: as it is */
};

struct msg_fetch {
	struct msg_tensor *tensor;
	struct msg_shared_range into;
};

struct msg_request {
	msg_request_kind kind;
	union {
		struct msg_run run;
		struct msg_free free;
		struct msg_priority_map push;
		struct msg_set_priority set;
		struct msg_text op; /* GET_PRIORITY, DESCRIBE */
		struct msg_generate generate;
		struct msg_text path;      /* LOAD_MODULE */
		struct msg_text log_level; /* SET_LOG_LEVEL */
		uint64_t timeout_us;       /* DRAIN */
		struct msg_upload upload;
		struct msg_write write;
		struct msg_fetch fetch;
		uint32_t first; /* LIST_TENSORS */
		struct msg_publish publish;
		struct msg_open open;
		struct msg_text withdraw;
		struct msg_graph graph;    /* REGISTER_GRAPH */
		uint64_t graph_id;         /* FREE_GRAPH */
		uint64_t memory_bytes; /* ATTACH_MEMORY */
		uint32_t region;       /* DETACH_MEMORY */
		struct msg_attach_rings rings;
		uint64_t first_session; /* LIST_SESSIONS */
		struct msg_set_session set_session;
		struct msg_restore restore; /* RESTORE_PROVIDER */
	};
};

/* A list of the configuration that holds for some of an op's calls. */
struct msg_priority_case {
	struct msg_text key; /* "linear/bf16/rows<=4" */
	uint32_t effective_count;
	const struct msg_text *effective;
	uint32_t stored_count;
	const struct msg_text *stored;
};

struct msg_priority_reply {
	uint32_t effective_count;
	const struct msg_text *effective;
	msg_level level;
	uint32_t stored_count;
	const struct msg_text *stored;
	uint32_t case_count;
	const struct msg_priority_case *cases; /* in the order in which they are asked */
};

struct msg_kept {
	struct msg_handle handle;
	opd_dtype dtype;
	uint32_t rank;
	int64_t shape[OPD_RANK_MAX];
	uint64_t bytes;
	uint64_t received;
	uint64_t request;
	uint32_t output;
	struct msg_text device;
};

struct msg_publication {
	struct msg_text name;
	uint8_t sha256[MSG_SHA256_BYTES];
	opd_dtype dtype;
	uint32_t rank;
	int64_t shape[OPD_RANK_MAX];
	uint64_t bytes;
	bool all;
	bool lasting;
	uint32_t holders;
	struct msg_text tenant;
	struct msg_handle handle;
};

typedef enum msg_reply_kind {
	MSG_REPLY_NONE = 0,
	MSG_REPLY_RUN,
	MSG_REPLY_PRIORITY,
	MSG_REPLY_OPS,
	MSG_REPLY_OP,
	MSG_REPLY_PROVIDERS,
	MSG_REPLY_INFO,
	MSG_REPLY_GENERATED,
	MSG_REPLY_EMPTY,
	MSG_REPLY_TENSORS,
	MSG_REPLY_PUBLICATIONS,
	MSG_REPLY_REGISTERED,
	MSG_REPLY_MEMORY,
	MSG_REPLY_SESSIONS,
	MSG_REPLY_RINGS,
	MSG_REPLY_STATS,
} msg_reply_kind;

struct msg_usage {
	uint64_t jobs;
	uint64_t device_ns;
	uint64_t wait_ns;
	uint64_t wait_max_ns;
};

struct msg_session_state {
	uint64_t session;
	struct msg_text tenant;
	struct msg_text peer;
	uint64_t age_us;
	uint32_t service_class;
	uint32_t weight;
	uint32_t in_flight;
	uint32_t queued;
	uint32_t running;
	uint64_t memory_bytes;
	double share;
	struct msg_usage usage;
	uint32_t quota_count;
	struct msg_quota *quotas;
	struct msg_text device; /* pinned; empty: none */
};

struct msg_tenant_state {
	struct msg_text name;
	uint32_t weight;
	uint32_t service_class;
	uint32_t class_max;
	uint64_t device_rate_ns;
	uint32_t sessions;
	uint32_t queued;
	uint32_t running;
	struct msg_usage usage;
	uint32_t quota_count;
	struct msg_quota *quotas;
};

struct msg_lane_state {
	struct msg_text name;
	uint32_t threads;
	uint32_t queued;
	uint32_t running;
	uint64_t device_ns;
};

struct msg_sessions {
	uint32_t session_count;
	uint32_t tenant_count;
	uint32_t lane_count;
	struct msg_session_state *sessions;
	struct msg_tenant_state *tenants;
	struct msg_lane_state *lanes;
	uint64_t uptime_us;
	uint64_t next;
};

#define MSG_STAT_LABELS 4u
#define MSG_STAT_BUCKETS_MAX 64u

struct msg_stat_label {
	struct msg_text name;
	struct msg_text value;
};

struct msg_stat {
	struct msg_text name;
	uint32_t kind;
	uint32_t label_count;
	struct msg_stat_label labels[MSG_STAT_LABELS];
	double value;
	uint32_t bucket_count;
	uint64_t *buckets;
};

struct msg_stats {
	uint32_t count;
	struct msg_stat *items;
	bool cut;
};

struct msg_reply {
	opd_status status;
	uint32_t retry_after_us; /* 0: unknown */
	struct msg_text message;
	msg_reply_kind kind;
	union {
		struct msg_run_reply run;
		struct msg_priority_reply priority;
		struct {
			uint32_t count;
			const struct msg_op *items;
		} ops;
		struct msg_op op;
		struct {
			uint32_t count;
			const struct msg_provider *items;
		} providers;
		struct msg_info info;
		struct {
			uint32_t count;
			struct msg_arg *args;
		} generated;
		struct {
			uint32_t count;
			uint32_t next;
			const struct msg_kept *items;
		} tensors;
		struct {
			uint32_t count;
			const struct msg_publication *items;
		} publications;
		struct msg_sessions sessions;
		struct msg_stats stats;
		struct msg_registered registered;
		struct {
			uint32_t region;
			uint64_t bytes;
		} memory;
		struct {
			uint64_t poll_us;
		} rings;
	};
};

#endif
