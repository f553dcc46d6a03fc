/* A small host for provider modules, without a daemon: registration into arrays, malloc, real threads.
 *
 * Layer: tests. Threads: host_init to host_fini on one thread; parallel_for starts threads that host_fini joins, and isn't nested.
 * It checks what a host must (names, one implementation an op and provider, known ops), loosely: the daemon's registry is the real one.
 * Not here: schemas and generated calls (cases.h). */
#ifndef OPD_TESTS_CONFORMANCE_HOST_H
#define OPD_TESTS_CONFORMANCE_HOST_H

#include "providers/provider.h"
#include "tests/conformance/derived.h"
#include "tests/conformance/device.h"

enum { HOST_OPS = 256, HOST_IMPLS = 1024, HOST_MODULES = 32, HOST_DEVICES = 8 };

struct host_impl {
	const opd_impl *impl;
	const char *provider;
	void *state; /* the module's */
};

struct host_module {
	const opd_module *module;
	void *state;
	void *library; /* dlopen's; NULL for a module that is linked in */
};

struct host {
	opd_host table;
	const opd_op *ops[HOST_OPS];
	size_t op_count;
	struct host_impl impls[HOST_IMPLS];
	size_t impl_count;
	struct host_module modules[HOST_MODULES];
	size_t module_count;
	struct device devices[HOST_DEVICES]; /* the first of each backend */
	size_t device_count;
	size_t warnings;       /* lines logged at OPD_LOG_WARN */
	char last_warning[256];
	bool cancel;           /* what `cancelled` answers */
	struct host_helper *helpers; /* the threads of parallel_for besides its caller */
	uint32_t helper_count;
	double watch_ns;             /* how long they watch for their next loop before they sleep */
	struct derived_copies copies; /* that implementations made; whoever marks operands as constant drops them */
};

void host_init(struct host *host);

/* For whoever times calls: threads of parallel_for watch for their next loop for long, so that waking cores isn't timed. Before the first call. */
void host_watch(struct host *host);

/* Memory as the daemon's for tensors and copies: large ones in huge pages, so that what is timed isn't the translation of addresses. NULL: there is none; else `free` takes it. */
void *host_memory(uint64_t bytes);

/* Opens a module that is linked in. */
OPD_MUST_USE opd_status host_open(struct host *host, const opd_module *module, opd_error *error);

/* Loads and opens a module's .so; its library stays loaded until host_fini. */
OPD_MUST_USE opd_status host_load(struct host *host, const char *path, opd_error *error);

/* The op of this name, NULL when there is none. */
const opd_op *host_find_op(const struct host *host, const char *name);

/* The implementation of an op by a provider, NULL when there is none. */
const struct host_impl *host_find_impl(const struct host *host, const char *provider, const char *op);

/* The device that runs implementations for `kind`; NULL: the host itself ("cpu"), or no module has such a backend. */
const struct device *host_find_device(const struct host *host, const char *kind);

/* Runs an implementation (its plan too) on so many threads, or on its device; the call's operands and outputs lie in host memory. */
OPD_MUST_USE opd_status host_run(const struct host *host, const struct host_impl *impl, const opd_call *call, uint32_t threads,
                                 opd_error *error);

/* A call's plan and scratch. */
struct host_prepared {
	opd_plan plan;
	void *scratch;
	bool planned;
};

/* The same in three steps, for a call that runs more than once, on the host. After a failure there is nothing to undo, and host_unprepare does nothing. */
OPD_MUST_USE opd_status host_prepare(const struct host_impl *impl, const opd_call *call, struct host_prepared *prepared_out, opd_error *error);
OPD_MUST_USE opd_status host_run_prepared(const struct host *host, const struct host_impl *impl, const opd_call *call,
                                          const struct host_prepared *prepared, uint32_t threads, opd_error *error);
void host_unprepare(struct host_prepared *prepared);

/* Forgets the derived copies that implementations made. */
void host_drop_derived(const struct host *host);

/* Closes the modules, in reverse. */
void host_fini(struct host *host);

#endif
