/* The provider contract: what a module exports so that opd runs its ops, its kernels and its devices.
 *
 * Layer: providers, public (installed as opd/provider.h with opd/status.h, opd/dtype.h, opd/tensor.h, opd/reason.h). A module
 * includes these and links nothing of opd: every service comes by the opd_host table handed to `open`, so that the same .so
 * also runs in a worker process.
 * Life: dlopen → opd_module_get → checks of ABI → open (probe the platform, register) → predicates, plans, runs → close →
 * dlclose. `close` also follows an `open` that failed; its state is zeroed memory, so that it can tell.
 * Threads: stated with each function. predicate, shape, cost_ns are pure and called on any thread, several at once; run and plan
 * on any lane thread, several at once; open and close alone.
 * Versions: opd_module begins with the ABI number; every struct begins with its size as its writer's compiler saw it, and
 * grows only at the end: never read a field past the struct_bytes you were given. opd_arg, opd_error, opd_reason are frozen.
 * Errors: whoever returns another status than OPD_OK writes a text; the host clears it before the call, puts the provider's and op's name
 * where none was written, and takes a status that is no code for UNKNOWN. Outputs (`…_out`) count only with OPD_OK.
 * Not here: dispatch, priorities, the wire. What a module wants to be preferred for is the operator's priority list.
 *
 * A whole provider (one op, one implementation):
 *
 *     #include <opd/provider.h>
 *
 *     static bool supports(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
 *     {
 *         const opd_tensor *x = call->args[0].tensor;
 *         if (x->dtype != OPD_f32)
 *             return OPD_REFUSE(reason, OPD_REASON_DTYPE, "x %s, only f32", opd_dtype_name(x->dtype));
 *         if (!opd_tensor_contiguous(x))
 *             return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "x is strided");
 *         return true;
 *     }
 *     static opd_status run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
 *     {
 *         const float *x = opd_tensor_data(call->args[0].tensor);
 *         float *y = opd_tensor_data(call->outputs[0]);
 *         for (uint64_t i = 0; i < call->outputs[0]->elements; i++)
 *             y[i] = x[i] > 0 ? x[i] : 0;
 *         return OPD_OK;
 *     }
 *     static const opd_impl relu = {
 *         .struct_bytes = sizeof relu, .op = "relu", .schema = "relu(Tensor x) -> Tensor", .device = "cpu",
 *         .predicate = supports, .run = run, .uuid = "<64 hex digits: SHA-256 of this file>",
 *     };
 *     static opd_status open_module(const opd_host *host, void *state, opd_error *error)
 *     {
 *         return host->register_impl(host, &relu, error);
 *     }
 *     static const opd_module module = {
 *         .abi = OPD_PROVIDER_ABI, .struct_bytes = sizeof module, .name = "mine", .version = "1.0", .open = open_module,
 *     };
 *     const opd_module *opd_module_get(void) { return &module; }
 */
#ifndef OPD_PROVIDER_H
#define OPD_PROVIDER_H

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

/* Raised only when an old module can't be loaded any more. */
#define OPD_PROVIDER_ABI 1

typedef struct opd_host opd_host;
typedef struct opd_impl opd_impl;
typedef struct opd_op opd_op;
typedef struct opd_exec opd_exec;

/* ---- A call ------------------------------------------------------------------------------------------------------------ */

typedef enum opd_arg_kind {
	OPD_ARG_NONE = 0, /* None: a Tensor?, int?, float? left out */
	OPD_ARG_TENSOR = 1,
	OPD_ARG_TENSORS = 2,
	OPD_ARG_INT = 3,
	OPD_ARG_INTS = 4,
	OPD_ARG_FLOAT = 5,
	OPD_ARG_BOOL = 6,
	OPD_ARG_STR = 7,
} opd_arg_kind;

/* One completed argument: the type is the schema's (checked by the host), defaults are filled in. 16 bytes, frozen. */
typedef struct opd_arg {
	uint32_t kind;  /* an opd_arg_kind */
	uint32_t count; /* elements of tensors and ints, bytes of str (without its NUL) */
	union {
		const opd_tensor *tensor;
		const opd_tensor *const *tensors;
		int64_t i;
		const int64_t *ints;
		double f;
		bool b;
		const char *str; /* NUL-terminated, no NUL inside */
	};
} opd_arg;

enum {
	OPD_CALL_ALLOW_TF32 = 1u << 0, /* the request allows f32 products in TF32 */
};

/* A bound call: one argument for each parameter of the schema, in its order; one output for each result. An implementation
 * that registered a shorter schema may read only its own parameters. Everything is borrowed for the call. */
typedef struct opd_call {
	uint32_t struct_bytes;
	uint32_t flags; /* OPD_CALL_* */
	uint32_t arg_count;
	uint32_t output_count;
	const opd_arg *args;              /* [arg_count] */
	const opd_tensor *const *outputs; /* [output_count]: dtype and shape of the results; their data is only run's. NULL in shape */
} opd_call;

/* ---- Ops --------------------------------------------------------------------------------------------------------------- */

/* What a shape function fills in for one result. */
typedef struct opd_output {
	uint32_t struct_bytes;
	opd_dtype dtype;
	uint32_t rank;
	uint32_t rank_max; /* room in `shape` */
	int64_t *shape;    /* [rank_max] */
} opd_output;

/* Checks the operands' dtypes and shapes and the attributes' values, and gives the results' dtypes and shapes.
 * Pure, any thread, no contents (data is NULL). Returns OPD_OK, or OPD_INVALID_ARGUMENT with a text that names parameter, value
 * and what was expected; the host checks products of what it returns. outputs: one a result, rank 0 and no dtype at entry. */
typedef opd_status (*opd_shape_fn)(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error);

/* Checks contents that kernels index with (ids, positions, slots, block tables): called before any kernel, on the thread that
 * will run it, for operands in host memory; nobody changes them meanwhile. OPD_OK, or OPD_INVALID_ARGUMENT naming operand, position,
 * value and range. Kernels may trust what it checked. */
typedef opd_status (*opd_check_fn)(const opd_op *op, const opd_call *call, opd_error *error);

/* The same for contents of any number: it asks exec->host->cancelled every so often, and returns OPD_CANCELLED soon where nobody wants the result any more. Of exec only `host` and `lane` are set; exec is
 * NULL where nobody can cancel. */
typedef opd_status (*opd_check_long_fn)(const opd_op *op, const opd_call *call, const opd_exec *exec, opd_error *error);

/* Values that a generator is asked for. */
typedef enum opd_values {
	OPD_VALUES_RANDOM = 0,  /* what a user's data looks like: normal, a few units wide */
	OPD_VALUES_EXTREME = 1, /* sprinkled with NaN, infinities, denormals, the largest finite, both zeros */
	OPD_VALUES_SMALL = 2,   /* small integers: sums and products are exact in every dtype */
} opd_values;

/* What an input generator is given, and how it hands over arguments. Deterministic in its fields. */
typedef struct opd_generator opd_generator;
struct opd_generator {
	uint32_t struct_bytes;
	opd_dtype dtype;  /* of the main operand */
	opd_values values;
	uint32_t variant; /* 0: the typical call; 1…: the op's other forms (no weight, f32 weight, causal or not, i32 indices, …) */
	uint64_t seed;
	uint32_t dim_count; /* sizes as the op's `dims` names them; the op's default_dims when the caller gave none */
	uint32_t reserved;
	const int64_t *dims;
	/* The host's. Each names a parameter; one not named keeps its default. A tensor is contiguous and zeroed; NULL: out of
	 * memory or a shape that can't be, return OPD_RESOURCE_EXHAUSTED. */
	void *(*tensor)(opd_generator *generator, const char *name, opd_dtype dtype, uint32_t rank, const int64_t *shape);
	void (*set_int)(opd_generator *generator, const char *name, int64_t value);
	void (*set_float)(opd_generator *generator, const char *name, double value);
	void (*set_bool)(opd_generator *generator, const char *name, bool value);
	void (*set_str)(opd_generator *generator, const char *name, const char *value);
	/* Fills `elements` of dtype with values of the asked kind: mean 0, standard deviation `scale` for floats (f8 and integers likewise,
	 * rounded and kept in range). */
	void (*fill)(opd_generator *generator, void *memory, opd_dtype dtype, uint64_t elements, double scale);
	/* A uniform integer of [low, high]. */
	int64_t (*pick)(opd_generator *generator, int64_t low, int64_t high);
};

/* Makes the arguments of one call. OPD_OK; OPD_OUT_OF_RANGE: no such variant (the last one was variant - 1); OPD_INVALID_ARGUMENT:
 * the dtype isn't the op's or the dims aren't (text says what they should be). Any thread. */
typedef opd_status (*opd_generate_fn)(const opd_op *op, opd_generator *generator, opd_error *error);

/* |got − native| ≤ atol + rtol·|native| for results of this dtype, where the op differs from the default of its dtype. */
typedef struct opd_tolerance {
	opd_dtype dtype;
	uint32_t reserved;
	double atol;
	double rtol;
} opd_tolerance;

/* Parameter `param` may be donated: result `result`, of equal dtype and shape, takes its place. */
typedef struct opd_in_place {
	uint32_t param;
	uint32_t result;
} opd_in_place;

/* How far a sum's order may show (SEMANTICS 35). */
typedef enum opd_sum {
	OPD_SUM_NONE = 0,
	OPD_SUM_PRODUCTS = 1,  /* linear, matmul, scaled_mm: K products an element */
	OPD_SUM_ATTENTION = 2, /* Σ p·v */
} opd_sum;

enum {
	/* Where all of `activations` have two extents or more, the first is of rows: the same for all of them and for every result, and a row of the results depends on that row of the activations, and on
	 * the other parameters, alone. Requests whose other parameters are the same may then run as one call whose rows are those of all of them (with an implementation that has OPD_IMPL_BATCH_INVARIANT). */
	OPD_OP_ROWS = 1u << 0,
};

/* An op: borrowed by the host until the module is closed. */
struct opd_op {
	uint32_t struct_bytes;
	opd_sum sum;
	const char *schema;      /* "relu(Tensor x) -> Tensor": PyTorch's grammar; the name is the op's */
	const char *doc;         /* one line */
	const char *activations; /* parameters that differ from call to call, as "x,x_residual"; the others are weights or tables */
	opd_shape_fn shape;
	opd_check_fn check; /* NULL: no parameter's contents are used as an index */
	opd_generate_fn generate;
	const char *dims;            /* what generate's sizes mean, as "rows,hidden"; NULL or empty: it takes none */
	const int64_t *default_dims; /* [dim_count] */
	uint32_t dim_count;          /* as many as `dims` names */
	uint32_t tolerance_count;
	const opd_tolerance *tolerances;
	uint32_t in_place_count;
	uint32_t flags;               /* OPD_OP_* */
	const opd_in_place *in_place; /* a parameter and a result stand in one pair at most */
	const opd_impl *native; /* the definition: device "cpu", no predicate, no plan, same schema (op and schema may be NULL), any strides */
	const void *user;       /* the op's own, for functions that serve several ops */
	const char *indices;    /* parameters whose contents `check` reads, as "positions,slot_mapping"; NULL with a check: all of i32 and i64 */
	opd_check_long_fn check_long; /* called instead of `check` where it isn't NULL; an op that has it has `check` too, for hosts that don't know it */
};

/* ---- Implementations --------------------------------------------------------------------------------------------------- */

enum {
	OPD_IMPL_PLAN_MAY_REFUSE = 1u << 0,  /* `plan` may say no: this implementation alone doesn't support all arguments */
	OPD_IMPL_IN_PLACE = 1u << 1,         /* may be run with an output in its in-place parameter's memory */
	OPD_IMPL_THREAD_INVARIANT = 1u << 2, /* bits don't depend on the number of threads */
	OPD_IMPL_BATCH_INVARIANT = 1u << 3,  /* a row's bits don't depend on how many other rows there are */
	OPD_IMPL_CHECKS_INDICES = 1u << 4,   /* on a device: its kernels check index contents themselves, see opd_index_fault */
	OPD_IMPL_NO_CAPTURE = 1u << 5,       /* on a device: what run enqueues can't be captured, see opd_backend.capture_begin */
	OPD_IMPL_MAPPED = 1u << 7,           /* on a device: reads operands as large as its largest, and writes results, about once, so that they may lie in host memory that it reaches over the link */
	OPD_IMPL_BF16_DENORMALS_ZERO = 1u << 6, /* bf16: denormal operands count as zero, as instructions for bf16 products have it (x86's do) */
};

/* Says whether the implementation takes the call. Pure: dtypes, shapes, strides, alignment, device, attributes; never contents.
 * Any thread; tens of nanoseconds, no allocation. `reason` is NULL on the hot path: use OPD_REFUSE. */
typedef bool (*opd_predicate_fn)(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason);

/* What `plan` prepared for all calls of one set of dtypes, shapes, strides, alignments and attributes. */
typedef struct opd_plan {
	uint32_t struct_bytes;
	uint32_t reserved;
	uint64_t scratch_bytes; /* the host gives run so much, 64-byte aligned, on the implementation's device */
	uint64_t memory_bytes;  /* what `data` holds: charged to the host's bounded cache */
	void *data;             /* the implementation's */
	void (*destroy)(void *data); /* NULL: nothing to free. Called once, when no run uses the plan any more */
} opd_plan;

/* Fills in plan_out (zeroed, struct_bytes set). OPD_OK; OPD_FAILED_PRECONDITION with *reason: refused, dispatch goes on with the next,
 * and the refusal is cached; another code: the request fails. On a lane thread; may take long; cached by the host. */
typedef opd_status (*opd_plan_fn)(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason,
                                  opd_error *error);

/* Estimated nanoseconds on one thread. Decides whether a call runs on the I/O loop (a few microseconds) and how large a share a
 * thread gets. Pure. 0: unknown, never on the loop. */
typedef uint64_t (*opd_cost_fn)(const opd_impl *impl, const opd_call *call);

/* What a kernel on a device found among contents that it indexes with. One lies in device memory for each request in flight (a graph's nodes share it), zeroed
 * before the request's first kernel and read with its completion. A kernel of an implementation with OPD_IMPL_CHECKS_INDICES checks each index before it reads or writes
 * by it, skips what that index leads to, and reports one: who changes `state` from 0 to 1 (atomically) fills in the rest, then sets 2. It does nothing at all where the state
 * isn't 0 when it starts; every kernel that writes in place does the same. The answer is INVALID_ARGUMENT: "embedding: ids[5] is 70000, expected 0 to 31999".
 * Without the flag the host brings index operands back from the device and asks the op's `check` before anything is enqueued. */
typedef struct opd_index_fault {
	uint32_t state;    /* 0: none; 1: being written; 2: written */
	uint32_t param;    /* of the op's schema */
	uint64_t position; /* number of the element in the operand's row-major order */
	int64_t value;
	int64_t low;       /* expected: low to high, both included */
	int64_t high;
	uint32_t node;     /* exec->fault_node */
	uint32_t reserved[5];
} opd_index_fault;

/* Runs the kernel. On the CPU it returns when done; on a device it enqueues on exec->stream and must not synchronise. Operands lie on
 * the implementation's device. Outputs are allocated, contiguous, uninitialised, and overlap no input, unless the implementation
 * has OPD_IMPL_IN_PLACE. If the outputs' dtypes or shapes aren't what it writes it returns OPD_INTERNAL and writes nothing. */
typedef opd_status (*opd_run_fn)(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error);

#define OPD_CALLS_MAX 8u

/* On a device: enqueues 2 to OPD_CALLS_MAX calls as one piece of work, which costs the host and the device one launch instead of so many. Each is of another request and such that run would take
 * it; none reads or writes what another one writes; each result has the very bits that run gives it. `exec` is run's, without plan, scratch and fault. OPD_UNIMPLEMENTED, or any other failure but
 * OPD_DATA_LOSS: nothing has been enqueued, and the host runs them one after the other. */
typedef opd_status (*opd_run_many_fn)(const opd_impl *impl, void *state, const opd_call *const *calls, uint32_t count, const opd_exec *exec, opd_error *error);

/* Borrowed by the host until the module is closed. */
struct opd_impl {
	uint32_t struct_bytes;
	uint32_t flags;          /* OPD_IMPL_* */
	const char *op;          /* name of the op */
	const char *schema;      /* equal to the op's, or a prefix whose missing parameters have defaults. NULL: taken from the op (native) */
	const char *device;      /* kind of the device backend it runs on: "cpu", "cuda", … */
	const char *unsupported; /* NULL: the platform can run it; else why not, as "needs AVX2" */
	const char *uuid;        /* 64 hex digits: SHA-256 over the source that implements the kernel */
	opd_predicate_fn predicate; /* NULL: takes all arguments */
	opd_plan_fn plan;           /* NULL: none */
	opd_cost_fn cost_ns;        /* NULL: unknown */
	opd_run_fn run;
	const void *user; /* the implementation's own, for functions that serve several */
	opd_run_many_fn run_many; /* NULL: each call alone. Only for those without a plan and on a backend with OPD_BACKEND_FAILS_WHOLE */
};

/* What run is given beside the call. */
struct opd_exec {
	uint32_t struct_bytes;
	uint32_t threads; /* that parallel_for may use, this one included */
	const opd_host *host;
	const opd_plan *plan; /* NULL: the implementation has none */
	void *scratch;        /* [plan->scratch_bytes] */
	void *stream;         /* the device backend's; NULL on the CPU */
	uint32_t device;      /* host's number of the device that it runs on */
	uint32_t ordinal;     /* the same device's number within its backend */
	void *lane;           /* the host's */
	uint32_t flags;       /* OPD_EXEC_* */
	uint32_t fault_node;  /* for opd_index_fault.node */
	void *fault;          /* on a device: base of device memory that begins with an opd_index_fault; NULL: no index of this call is to be checked */
};

enum {
	/* What is enqueued is captured: it runs later and again, with the same operands at the same addresses. */
	OPD_EXEC_CAPTURING = 1u << 0,
};

/* ---- Device backends --------------------------------------------------------------------------------------------------- */

typedef struct opd_device_info {
	uint32_t struct_bytes;
	uint32_t reserved;
	uint64_t memory_bytes;
	char name[128];
} opd_device_info;

/* A kind of device: memory, copies, streams, events. One backend a kind, the first loaded wins. `state` is the module's.
 * One thread at a time works with a device (the lane's, or a loop that launches a lone small op): nothing may rest on state of the calling thread, such as a current device or
 * context. event_query and the create/destroy pairs may come from any thread at any time. Offsets and sizes are in bytes and checked.
 * Memory, streams and events are made seldom: the host pools them, so none of these functions needs a pool of its own.
 * A device that can't go on (a sticky error, fallen off the bus) answers OPD_DATA_LOSS wherever that shows, and from then on: the host fails what is in flight, gives back streams, events
 * and memory that no tensor has (free, stream_destroy and event_destroy must still work), and uses it again only after device_reset has returned OPD_OK, which frees what was still allocated.
 * Implementations of its kind count as unsupported while none of the kind is left (`cuda:0 is lost: …`). Any other failure is that one call's.
 * No function may be NULL but those that say so. */
#define OPD_COPIES_MAX 32u

/* One of several copies. Either side is device memory, or host memory that kernels reach (its device's base). */
typedef struct opd_copy {
	void *to;
	uint64_t to_offset;
	const void *from; /* NULL: zeros */
	uint64_t from_offset;
	uint64_t bytes;
} opd_copy;

typedef struct opd_backend {
	uint32_t struct_bytes;
	uint32_t device_count;
	const char *kind; /* "cuda": requests then say device "cuda:0" */
	opd_status (*device_info)(void *state, uint32_t ordinal, opd_device_info *info_out, opd_error *error);
	/* Device memory, 64-byte aligned at least. An opaque base: only the backend and implementations of its kind use it. OPD_RESOURCE_EXHAUSTED:
	 * asked again when work in flight has ended. */
	opd_status (*alloc)(void *state, uint32_t ordinal, uint64_t bytes, void **memory_out, opd_error *error);
	void (*free)(void *state, uint32_t ordinal, void *memory);
	opd_status (*stream_create)(void *state, uint32_t ordinal, void **stream_out, opd_error *error);
	/* Returns when nothing that was enqueued can touch memory any more. Events recorded on the stream have come then, and may still be queried. */
	void (*stream_destroy)(void *state, void *stream);
	/* Enqueue; host memory stays valid until an event recorded later on the stream has come. */
	opd_status (*copy_in)(void *state, void *stream, void *to, uint64_t to_offset, const void *host_from, uint64_t bytes,
	                      opd_error *error);
	opd_status (*copy_out)(void *state, void *stream, void *host_to, const void *from, uint64_t from_offset, uint64_t bytes,
	                       opd_error *error);
	opd_status (*copy_device)(void *state, void *stream, void *to, uint64_t to_offset, const void *from, uint64_t from_offset,
	                          uint64_t bytes, opd_error *error);
	opd_status (*event_create)(void *state, uint32_t ordinal, void **event_out, opd_error *error);
	void (*event_destroy)(void *state, void *event);
	opd_status (*event_record)(void *state, void *event, void *stream, opd_error *error);
	/* OPD_OK: all work before it is done; OPD_UNAVAILABLE: not yet; another code: the work since the event before failed, and nothing of it runs
	 * any more. Other requests' work on the stream must not inherit a failure, unless the device is lost. Never blocks. */
	opd_status (*event_query)(void *state, void *event, opd_error *error);
	/* Optional (NULL): makes host memory fast to copy from and to. */
	opd_status (*host_register)(void *state, void *memory, uint64_t bytes, opd_error *error);
	void (*host_unregister)(void *state, void *memory);
	/* Optional: native objects for other modules of the kind; `what` is the backend's word ("context", "device"). NULL: has none. */
	void *(*native_handle)(void *state, uint32_t ordinal, const char *what);

	/* ---- Since the table grew; each may be NULL. ---- */

	/* Host memory that copies run from and to at full speed and, where *device_out isn't NULL, that kernels of the device reach at that base (mapped, "zero copy"). 64-byte aligned.
	 * Slow: the host allocates it once and hands it out in pieces. What a kernel wrote there the host sees once a later event has come. */
	opd_status (*host_alloc)(void *state, uint32_t ordinal, uint64_t bytes, void **host_out, void **device_out, opd_error *error);
	void (*host_free)(void *state, uint32_t ordinal, void *host);
	/* Enqueue: zero bytes. NULL: the host copies zeros in. */
	opd_status (*zero)(void *state, void *stream, void *to, uint64_t to_offset, uint64_t bytes, opd_error *error);
	/* What is enqueued on `stream` from now on starts when the event has come; it was recorded on another stream of the kind. NULL: the host uses one stream a device. */
	opd_status (*stream_wait)(void *state, void *stream, void *event, opd_error *error);
	/* From another device of the kind; `stream` is of the device that has `to`. NULL: the host goes through its own memory. */
	opd_status (*copy_peer)(void *state, void *stream, void *to, uint64_t to_offset, uint32_t from_ordinal, const void *from, uint64_t from_offset,
	                        uint64_t bytes, opd_error *error);

	/* Capture: all four or none. Between begin and end what is enqueued on the stream (copy_device, zero and kernels, no other function) is recorded and not done. capture_end ends it also
	 * when something failed in between; an error, or *graph_out NULL, means that it can't be replayed, and the host enqueues instead. graph_launch enqueues all of it at once, any
	 * number of times: the host keeps what it touches (operands, scratch, plans) where it is until graph_destroy, and brings new inputs to those places by copies before
	 * the launch. graph_destroy: nothing of it is in flight. */
	opd_status (*capture_begin)(void *state, void *stream, opd_error *error);
	opd_status (*capture_end)(void *state, void *stream, void **graph_out, opd_error *error);
	opd_status (*graph_launch)(void *state, void *graph, void *stream, opd_error *error);
	void (*graph_destroy)(void *state, void *graph);

	/* After OPD_DATA_LOSS: makes the device usable again, with nothing on it: memory that wasn't freed is gone, and isn't freed later. NULL: it stays lost. */
	opd_status (*device_reset)(void *state, uint32_t ordinal, opd_error *error);

	/* Where kernels of the device reach host memory that host_register has taken, like host_alloc's *device_out. NULL, the function or its answer: nowhere. */
	void *(*host_mapped)(void *state, uint32_t ordinal, void *host);
	uint32_t flags; /* OPD_BACKEND_* */
	uint32_t reserved;
	/* Enqueue: up to OPD_COPIES_MAX small copies that don't overlap each other, in one piece of work. Not while the stream captures. NULL: the host enqueues one after the other. */
	opd_status (*copy_many)(void *state, void *stream, const opd_copy *copies, uint32_t count, opd_error *error);
} opd_backend;

enum {
	/* No work on a stream fails alone: what fails once it is enqueued loses the device. The host then lets one event tell of several requests' end. */
	OPD_BACKEND_FAILS_WHOLE = 1u << 0,
};

/* ---- The host ---------------------------------------------------------------------------------------------------------- */

typedef enum opd_log_level {
	OPD_LOG_ERROR = 0,
	OPD_LOG_WARN = 1,
	OPD_LOG_INFO = 2,
	OPD_LOG_DEBUG = 3,
} opd_log_level;

/* One share of a parallel loop: items [begin, end), on thread number `thread` (0 to exec->threads − 1, no two shares at once with one
 * number). */
typedef void (*opd_range_fn)(void *argument, uint64_t begin, uint64_t end, uint32_t thread);

/* The host's services. Borrowed: valid until `close` returns. */
struct opd_host {
	uint32_t abi;
	uint32_t struct_bytes;
	void *context; /* the host's */

	/* Registration: during `open`, by its thread; OPD_FAILED_PRECONDITION elsewhere. What is passed is borrowed until the module is closed. A failure leaves everything as it
	 * was and comes with a text: OPD_ALREADY_EXISTS (a taken op, a second implementation, a second backend), OPD_INVALID_ARGUMENT (name,
	 * schema, reserved name), OPD_NOT_FOUND (no such op). A module may go on after one. */
	opd_status (*register_op)(const opd_host *host, const opd_op *op, opd_error *error);
	opd_status (*register_impl)(const opd_host *host, const opd_impl *impl, opd_error *error);
	opd_status (*register_backend)(const opd_host *host, const opd_backend *backend, opd_error *error);
	/* Another shape function for an op of this module, at any time, any thread: calls bound from then on use it, cached plans drop. */
	opd_status (*set_shape)(const opd_host *host, const char *op, opd_shape_fn shape, opd_error *error);

	/* The backend of a kind and its module's state, for implementations that share its context and streams; false when none is loaded. Any
	 * thread, but it may wait while another module opens: ask in `open`. */
	bool (*find_backend)(const opd_host *host, const char *kind, const opd_backend **backend_out, void **state_out);

	/* Host memory, 64-byte aligned, charged to the daemon's ceiling; any thread. NULL: refused. free takes NULL. What `close` leaves is freed
	 * by the host, with a warning. */
	void *(*alloc)(const opd_host *host, uint64_t bytes);
	void (*free)(const opd_host *host, void *memory);

	/* One line, without a newline; any thread. Nothing is printed below the configured level: ask first where formatting costs. */
	bool (*log_enabled)(const opd_host *host, opd_log_level level);
	void (*log)(const opd_host *host, opd_log_level level, const char *text);

	/* Inside run, on its thread: splits [0, items) into shares of at least `grain` items over the lane's threads and returns when all are done.
	 * How it splits may differ from run to run: results must not depend on it. Doesn't nest. */
	void (*parallel_for)(const opd_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument);
	/* Inside run: nobody wants the result any more; return OPD_CANCELLED soon if you can. */
	bool (*cancelled)(const opd_exec *exec);

	/* Derived copies: what an implementation for the CPU makes of an operand whose contents stay (packed weights), in memory of the host's that outlives the run. Inside run,
	 * on its thread. A copy belongs to the module, the operand's contents (id, version), its view (dtype, shape, strides, byte offset) and `key` (at most
	 * OPD_DERIVED_KEY_MAX bytes): whatever else it depends on, as the library's layout. The host drops copies when the contents end, when it wants the memory, and before the
	 * module is closed; never while a run that was given one lasts. At most OPD_DERIVED_RUN_MAX a run. NULL is an everyday answer: the run then works on the operand itself.
	 * Look at struct_bytes: an older host's table ends before these.
	 *
	 * derived_find: a copy that an earlier run has kept; NULL: none. */
	const void *(*derived_find)(const opd_exec *exec, const opd_tensor *tensor, const void *key, uint32_t key_bytes);
	/* After derived_find found none: `bytes` of memory for one, 64-byte aligned, uninitialised, this run's alone. NULL: not now (the contents may change, come for the first
	 * time, another run is making it, or there is no room). */
	void *(*derived_make)(const opd_exec *exec, const opd_tensor *tensor, const void *key, uint32_t key_bytes, uint64_t bytes);
	/* What derived_make gave is filled in: later runs find it. Without this call it goes when run returns. */
	void (*derived_keep)(const opd_exec *exec, const void *memory);
};

#define OPD_DERIVED_KEY_MAX 2048 /* bytes */
#define OPD_DERIVED_RUN_MAX 4

/* ---- The module -------------------------------------------------------------------------------------------------------- */

typedef struct opd_module {
	uint32_t abi;          /* OPD_PROVIDER_ABI: read before anything else */
	uint32_t struct_bytes;
	const char *name;      /* the provider's: [a-z_][a-z_0-9]*, not native, not unfused */
	const char *version;   /* for people */
	uint64_t state_bytes;  /* zeroed memory of so many bytes is `state` in every call */
	/* Probes the platform and registers. A platform that can't run it is no failure: register the implementations with `unsupported` set.
	 * A failure unloads the module; its name stays in priority lists as statically unsupported with this text. */
	opd_status (*open)(const opd_host *host, void *state, opd_error *error);
	/* Frees what open made, also after a failed open. No run is under way. NULL: nothing to do. */
	void (*close)(const opd_host *host, void *state);
} opd_module;

/* The one symbol that a module exports. */
typedef const opd_module *(*opd_module_get_fn)(void);
#define OPD_MODULE_SYMBOL "opd_module_get"
__attribute__((visibility("default"))) const opd_module *opd_module_get(void);

#ifdef __cplusplus
}
#endif
#endif
