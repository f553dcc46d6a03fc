/* A device made of threads, for tests: its memory can't be read by address, its work is done later and by others, and it fails
 * where it is told to.
 *
 * Layer: tests, a provider module (opd/provider.h alone). Two devices of kind `test`.
 * Threads: memory and streams from one thread at a time a device; each stream has a thread of its own that does what was enqueued, in
 * order. Life: device_open (in the module's open) → device_close, which says through the log whether everything was given back.
 * What it catches: a device's address is one where nothing may be read or written, so that a host that touches device memory
 * dies; a kernel that is handed a host address, or one past an allocation's end, fails with INTERNAL; so does whoever calls while
 * another thread does.
 *
 * The environment, read once:
 *     OPD_TEST_DEVICE_MEMORY=BYTES       of each device (64 MiB)
 *     OPD_TEST_DEVICE_DELAY_US=N         before each kernel
 *     OPD_TEST_DEVICE_SLOW_US=N          more before each kernel of test:0
 *     OPD_TEST_DEVICE_EVENT_US=N         from an event's work being done to its being reported
 *     OPD_TEST_DEVICE_WHOLE=1            it says that a failure of the work always loses it (OPD_BACKEND_FAILS_WHOLE)
 *     OPD_TEST_DEVICE_INSTANT=1          what is enqueued on test:0 is done before that call returns, on the caller's thread
 *     OPD_TEST_DEVICE_OPEN_GATE=PATH     a file: open waits until it is there
 *     OPD_TEST_DEVICE_FAULT=POINT:N[+],… the Nth time (from then on) at POINT: alloc, stream, event, record, copy_in, copy_out,
 * launch (run fails), kernel (its event does), mute (launch without code or text that make sense), capture (capture_begin), lost (a
 * kernel after which the device is lost), hang (a kernel waits for the gate), stall (launch does), halt (launch says so in the log, and waits for the second one),
 * together (run_many refuses)
 *     OPD_TEST_DEVICE_GATE=PATH          a file: what hangs or stalls waits until it is there
 *     OPD_TEST_DEVICE_GATE2=PATH         another, for what halts
 *     OPD_TEST_DEVICE_RESET=1            a lost device can be reset
 *     OPD_TEST_DEVICE_TELL=1             each launch of a graph is logged once it is enqueued */
#ifndef OPD_TESTS_DEVICE_H
#define OPD_TESTS_DEVICE_H

#include <pthread.h>
#include <stdatomic.h>

#include <opd/provider.h>

enum { DEVICE_COUNT = 2, DEVICE_RANK = 8, DEVICE_INPUTS = 2 };

/* Where the device reaches host memory that it gave: no address of the host's. */
#define DEVICE_MAPPED ((uintptr_t)1 << 62)

enum device_fault {
	DEVICE_FAULT_ALLOC,
	DEVICE_FAULT_STREAM,
	DEVICE_FAULT_EVENT,
	DEVICE_FAULT_RECORD,
	DEVICE_FAULT_COPY_IN,
	DEVICE_FAULT_COPY_OUT,
	DEVICE_FAULT_LAUNCH,
	DEVICE_FAULT_KERNEL,
	DEVICE_FAULT_MUTE,
	DEVICE_FAULT_CAPTURE,
	DEVICE_FAULT_LOST,
	DEVICE_FAULT_HANG,
	DEVICE_FAULT_STALL,
	DEVICE_FAULT_HALT,
	DEVICE_FAULT_TOGETHER,
	DEVICE_FAULT_COUNT,
};

struct device_allocation;

/* The module's state. */
struct device {
	const opd_host *host;
	pthread_mutex_t mutex; /* of what follows */
	bool opened;
	struct device_allocation *allocations;
	uint64_t used_bytes[DEVICE_COUNT];

	_Atomic uint32_t streams;
	_Atomic uint32_t events;
	_Atomic uint32_t plans;
	_Atomic bool inside[DEVICE_COUNT]; /* a thread is between device_enter and device_leave */
	_Atomic bool lost[DEVICE_COUNT]; /* until it is reset */
	_Atomic uint32_t hosts; /* pieces of host memory that it gave */
	_Atomic uint32_t locked; /* and of the host's that it was told of, now */
	_Atomic uint32_t locks;  /* since the start */
	_Atomic uint32_t graphs; /* that exist */
	_Atomic uint32_t captures; /* since the start */
	_Atomic uint32_t launches;
	_Atomic uint32_t together; /* of several calls */
	_Atomic uint32_t calls;    /* in those */
	_Atomic uint32_t fault_seen[DEVICE_FAULT_COUNT];
	/* constant after open; a point's 0 is never */
	uint32_t fault_first[DEVICE_FAULT_COUNT];
	uint32_t fault_last[DEVICE_FAULT_COUNT];
	uint64_t memory_bytes;
	uint64_t delay_us;
	uint64_t slow_us;
	uint64_t event_us;
	uint64_t instant;
	uint64_t reset;
	uint64_t tell;
	uint64_t whole;
};

extern const opd_backend device_backend;

opd_status device_open(struct device *device, const opd_host *host, opd_error *error);
void device_close(struct device *device);

/* ---- device.c, for the others ---- */

/* True when it is this point's turn to fail. */
bool device_faulty(struct device *device, enum device_fault point);
void device_sleep_us(uint64_t us);
/* Until the file that this variable of the environment names is there; at once where there is none. */
void device_await_gate(const char *name);
uint64_t device_now_ns(void);
/* INTERNAL when another thread is working with the device, DATA_LOSS when it is lost; from OK to device_leave the caller is. */
OPD_MUST_USE opd_status device_enter(struct device *device, uint32_t ordinal, const char *what, opd_error *error);
void device_leave(struct device *device, uint32_t ordinal);

/* ---- memory.c ---- */

opd_status device_alloc(void *state, uint32_t ordinal, uint64_t bytes, void **memory_out, opd_error *error);
void device_free(void *state, uint32_t ordinal, void *memory);
opd_status device_host_register(void *state, void *memory, uint64_t bytes, opd_error *error);
void device_host_unregister(void *state, void *memory);
/* Where `bytes` at `offset` of device memory are really kept; NULL (and the text says what `name` is instead) where they aren't
 * all the device's. */
unsigned char *device_contents(struct device *device, uint32_t ordinal, const void *memory, uint64_t offset, uint64_t bytes,
                               const char *name, opd_error *error);

/* ---- kernels.c ---- */

/* A tensor by value: what `run` is given is borrowed until it returns, and the kernel runs later. */
struct device_operand {
	const char *name;
	void *memory;
	uint64_t byte_offset;
	uint64_t elements;
	uint32_t rank;
	int64_t shape[DEVICE_RANK];
	int64_t strides[DEVICE_RANK];
};

struct device_launch;
typedef opd_status (*device_kernel_fn)(struct device *device, uint32_t ordinal, const struct device_launch *launch,
                                       opd_error *error);
struct device_launch {
	device_kernel_fn kernel;
	uint32_t input_count;
	struct device_operand inputs[DEVICE_INPUTS];
	struct device_operand output;
	struct device_operand second; /* the other result, where there are two */
	void *scratch;
	void *fault; /* exec->fault */
	double epsilon;
};

struct device_operand device_operand_of(const char *name, const opd_tensor *tensor);
/* Of a kernel's operand; NULL with the text where it isn't all the device's. */
float *device_floats(struct device *device, uint32_t ordinal, const struct device_operand *operand, opd_error *error);
/* What `run` ends with: the launch is copied to the stream. */
opd_status device_launch(const opd_exec *exec, struct device *device, const struct device_launch *what, opd_error *error);

opd_status device_register_kernels(const opd_host *host, opd_error *error);
opd_status device_register_resident(const opd_host *host, opd_error *error); /* resident.c */

/* ---- stream.c ---- */

/* Enqueues a kernel; the launch is copied. */
OPD_MUST_USE opd_status device_enqueue(void *stream, const struct device_launch *launch, opd_error *error);

opd_status device_stream_create(void *state, uint32_t ordinal, void **stream_out, opd_error *error);
void device_stream_destroy(void *state, void *stream);
opd_status device_copy_in(void *state, void *stream, void *to, uint64_t to_offset, const void *host_from, uint64_t bytes,
                          opd_error *error);
opd_status device_copy_out(void *state, void *stream, void *host_to, const void *from, uint64_t from_offset, uint64_t bytes,
                           opd_error *error);
opd_status device_copy_device(void *state, void *stream, void *to, uint64_t to_offset, const void *from, uint64_t from_offset,
                              uint64_t bytes, opd_error *error);
opd_status device_copy_many(void *state, void *stream, const opd_copy *copies, uint32_t count, opd_error *error);
opd_status device_event_create(void *state, uint32_t ordinal, void **event_out, opd_error *error);
void device_event_destroy(void *state, void *event);
opd_status device_event_record(void *state, void *event, void *stream, opd_error *error);
opd_status device_event_query(void *state, void *event, opd_error *error);
opd_status device_capture_begin(void *state, void *stream, opd_error *error);
opd_status device_capture_end(void *state, void *stream, void **graph_out, opd_error *error);
opd_status device_graph_launch(void *state, void *graph, void *stream, opd_error *error);
void device_graph_destroy(void *state, void *graph);

opd_status device_host_alloc(void *state, uint32_t ordinal, uint64_t bytes, void **host_out, void **device_out, opd_error *error);
void device_host_free(void *state, uint32_t ordinal, void *host);
opd_status device_reset(void *state, uint32_t ordinal, opd_error *error); /* memory.c */
/* DATA_LOSS when it is lost. */
OPD_MUST_USE opd_status device_check_lost(struct device *device, uint32_t ordinal, opd_error *error);

#endif
