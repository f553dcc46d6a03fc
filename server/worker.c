#include "server/worker.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "server/confine.h"
#include "server/isolated_call.h"
#include "server/module.h"
#include "server/worker_loop.h"

#define IMPLS_MAX 1024u
#define PLANS_KEPT 256u
#define DESCRIPTORS 256u
#define ARENA_BYTES (16u << 20)

struct kept_plan {
	uint64_t number; /* 0: free */
	opd_plan plan;
};

struct worker {
	opd_host host; /* first: host.context is the worker */
	const opd_module *def;
	void *state;
	bool opening;
	unsigned char *memory;
	uint64_t memory_bytes;
	uint32_t impl_count;
	const opd_impl *impls[IMPLS_MAX];
	struct kept_plan plans[PLANS_KEPT]; /* by number: the oldest goes */
	unsigned char *slots[PACKED_SLOTS]; /* operands that are kept, to read; NULL: none there */
	uint64_t slot_bytes[PACKED_SLOTS];
	struct arena arena;
	struct worker_loop loop;
	uint32_t threads; /* of the call that runs */
	char unconfined[160]; /* what the kernel doesn't give it, "": nothing */
	struct isolated_message out;
};

static void say(struct worker *worker, isolated_kind kind, opd_status status, const char *text)
{
	worker->out = (struct isolated_message){.kind = kind, .status = (int32_t)status};
	isolated_put(&worker->out, text);
}

/* The daemon is gone, and with it all that this process is for. */
static void send_out(const struct worker *worker)
{
	if (!isolated_send(WORKER_SOCKET, &worker->out, -1))
		_exit(0);
}

/* ---- What the module sees of a host ---- */

static opd_status host_register_op(const opd_host *host, const opd_op *op, opd_error *error)
{
	(void)host, (void)op;
	return opd_fail(error, OPD_UNIMPLEMENTED, "an isolated module can't bring ops: their shape functions would run in the daemon");
}

static opd_status host_register_backend(const opd_host *host, const opd_backend *backend, opd_error *error)
{
	(void)host, (void)backend;
	return opd_fail(error, OPD_UNIMPLEMENTED, "an isolated module can't bring devices");
}

static opd_status host_set_shape(const opd_host *host, const char *op, opd_shape_fn shape, opd_error *error)
{
	(void)host, (void)op, (void)shape;
	return opd_fail(error, OPD_UNIMPLEMENTED, "an isolated module has no shape functions");
}

static opd_status host_register_impl(const opd_host *host, const opd_impl *impl, opd_error *error)
{
	struct worker *worker = host->context;
	if (!worker->opening)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "%s: register_impl outside of its open function", worker->def->name);
	if (impl == NULL || impl->struct_bytes < offsetof(opd_impl, user) || impl->op == NULL || impl->schema == NULL || impl->device == NULL ||
	    impl->run == NULL || impl->uuid == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "register_impl: op, schema, device, uuid or run is missing, or opd_impl is too short");
	if (strcmp(impl->device, "cpu") != 0)
		return opd_fail(error, OPD_UNIMPLEMENTED, "%s.%s: an isolated module can't have implementations for %s", worker->def->name, impl->op, impl->device);
	if (worker->impl_count == IMPLS_MAX)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: more than %u implementations", worker->def->name, IMPLS_MAX);
	say(worker, ISOLATED_IMPL, OPD_OK, impl->op);
	isolated_put(&worker->out, impl->schema);
	isolated_put(&worker->out, impl->uuid);
	isolated_put(&worker->out, impl->unsupported == NULL ? "" : impl->unsupported);
	worker->out.flags = impl->flags;
	send_out(worker);
	worker->impls[worker->impl_count++] = impl;
	return OPD_OK;
}

static bool host_find_backend(const opd_host *host, const char *kind, const opd_backend **backend_out, void **state_out)
{
	(void)host, (void)kind, (void)backend_out, (void)state_out;
	return false;
}

static void *host_alloc(const opd_host *host, uint64_t bytes)
{
	void *memory = NULL;
	(void)host;
	return posix_memalign(&memory, OPD_TENSOR_ALIGNMENT, bytes == 0 ? 1 : bytes) == 0 ? memory : NULL;
}

static void host_free(const opd_host *host, void *memory)
{
	(void)host;
	free(memory);
}

/* The daemon leaves out what is below its own level. */
static bool host_log_enabled(const opd_host *host, opd_log_level level)
{
	(void)host;
	return level <= OPD_LOG_INFO;
}

static void host_log(const opd_host *host, opd_log_level level, const char *text)
{
	struct isolated_message message = {.kind = ISOLATED_LOG, .number = (uint32_t)level};
	(void)host;
	isolated_put(&message, text == NULL ? "" : text);
	if (!isolated_send(WORKER_SOCKET, &message, -1))
		_exit(0);
}

static void host_parallel_for(const opd_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument)
{
	struct worker *worker = exec->host->context;
	worker_loop_run(&worker->loop, worker->threads, items, grain, range, argument);
}

static bool host_cancelled(const opd_exec *exec)
{
	const struct packed_call *packed = exec->lane;
	return atomic_load_explicit(&packed->cancelled, memory_order_relaxed) != 0;
}

static const void *host_derived_find(const opd_exec *exec, const opd_tensor *tensor, const void *key, uint32_t key_bytes)
{
	(void)exec, (void)tensor, (void)key, (void)key_bytes;
	return NULL;
}

static void *host_derived_make(const opd_exec *exec, const opd_tensor *tensor, const void *key, uint32_t key_bytes, uint64_t bytes)
{
	(void)exec, (void)tensor, (void)key, (void)key_bytes, (void)bytes;
	return NULL;
}

static void host_derived_keep(const opd_exec *exec, const void *memory)
{
	(void)exec, (void)memory;
}

static const opd_host host_table = {
	.abi = OPD_PROVIDER_ABI,
	.struct_bytes = sizeof host_table,
	.register_op = host_register_op,
	.register_impl = host_register_impl,
	.register_backend = host_register_backend,
	.set_shape = host_set_shape,
	.find_backend = host_find_backend,
	.alloc = host_alloc,
	.free = host_free,
	.log_enabled = host_log_enabled,
	.log = host_log,
	.parallel_for = host_parallel_for,
	.cancelled = host_cancelled,
	.derived_find = host_derived_find,
	.derived_make = host_derived_make,
	.derived_keep = host_derived_keep,
};

/* ---- Plans ---- */

static void plan_drop(struct kept_plan *kept)
{
	if (kept->number != 0 && kept->plan.destroy != NULL)
		kept->plan.destroy(kept->plan.data);
	kept->number = 0;
}

/* The module's plan of this number, made if it isn't there; FAILED_PRECONDITION with a reason: refused. *plan_out NULL: the implementation has none. */
static opd_status find_plan(struct worker *worker, const opd_impl *impl, uint64_t number, const opd_call *call, const opd_plan **plan_out,
                            opd_reason *reason, opd_error *error)
{
	struct kept_plan *kept = &worker->plans[number % PLANS_KEPT];
	*plan_out = NULL;
	if (impl->plan == NULL)
		return OPD_OK;
	if (kept->number != number) {
		plan_drop(kept);
		kept->plan = (opd_plan){.struct_bytes = sizeof kept->plan};
		reason->code = OPD_REASON_PLAN;
		opd_status status = impl->plan(impl, worker->state, call, &kept->plan, reason, error);
		if (status != OPD_OK)
			return status;
		kept->number = number;
	}
	*plan_out = &kept->plan;
	return OPD_OK;
}

/* ---- Calls ---- */

static opd_status plan_call(struct worker *worker, const struct packed_call *packed, const opd_call *call, opd_reason *reason, opd_error *error)
{
	const opd_impl *impl = worker->impls[packed->impl];
	const opd_plan *plan;
	if (impl->predicate != NULL && !impl->predicate(impl, worker->state, call, reason))
		return OPD_FAILED_PRECONDITION;
	opd_status status = find_plan(worker, impl, packed->plan, call, &plan, reason, error);
	if (status == OPD_OK)
		worker->out.bytes = plan == NULL ? 0 : plan->scratch_bytes;
	return status;
}

/* Results and operands are descriptions that the module may scribble on: copies of this call's. */
static opd_status run_call(struct worker *worker, struct packed_call *packed, const opd_call *call, opd_reason *reason, opd_error *error)
{
	const opd_impl *impl = worker->impls[packed->impl];
	const opd_plan *plan;
	opd_status status = find_plan(worker, impl, packed->plan, call, &plan, reason, error);
	if (status == OPD_OK && plan != NULL && plan->scratch_bytes > packed->scratch_bytes)
		status = opd_fail(error, OPD_INTERNAL, "%s.%s: its plan wants %llu bytes of scratch, and wanted %llu before", worker->def->name, impl->op,
		                  (unsigned long long)plan->scratch_bytes, (unsigned long long)packed->scratch_bytes);
	if (status != OPD_OK)
		return status;
	const opd_exec exec = {
		.struct_bytes = sizeof exec,
		.threads = worker->threads,
		.host = &worker->host,
		.plan = plan,
		.scratch = packed->scratch_bytes == 0 ? NULL : worker->memory + packed->scratch_at,
		.lane = packed,
	};
	return impl->run(impl, worker->state, call, &exec, error);
}

static void serve_call(struct worker *worker, isolated_kind kind, uint32_t threads)
{
	struct packed_call *packed = (struct packed_call *)(void *)worker->memory;
	opd_error error = {0};
	opd_reason reason = {0};
	const opd_call *call = packed == NULL || packed->impl >= worker->impl_count ? NULL : packed_read(packed, worker->memory, worker->slots, &worker->arena);
	worker->threads = threads == 0 ? 1 : threads;
	say(worker, ISOLATED_DONE, OPD_OK, "");
	uint64_t scratch_bytes = 0;
	opd_status status;
	if (call == NULL) {
		status = opd_fail(&error, OPD_RESOURCE_EXHAUSTED, "worker: no memory for the call");
	} else if (kind == ISOLATED_PLAN) {
		status = plan_call(worker, packed, call, &reason, &error);
		scratch_bytes = worker->out.bytes;
	} else {
		status = run_call(worker, packed, call, &reason, &error);
	}
	error.text[sizeof error.text - 1] = '\0';
	reason.detail[sizeof reason.detail - 1] = '\0';
	say(worker, ISOLATED_DONE, status, error.text);
	isolated_put(&worker->out, reason.detail);
	worker->out.number = (uint32_t)reason.code;
	worker->out.bytes = scratch_bytes;
	send_out(worker);
	arena_reset(&worker->arena);
}

static void map(struct worker *worker, uint64_t bytes, int fd)
{
	if (worker->memory != NULL)
		(void)munmap(worker->memory, worker->memory_bytes);
	worker->memory = NULL;
	if (fd < 0)
		return;
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	(void)close(fd);
	if (memory == MAP_FAILED)
		_exit(1);
	worker->memory = memory;
	worker->memory_bytes = bytes;
}

static void let_go(struct worker *worker, uint32_t slot)
{
	if (worker->slots[slot] != NULL)
		(void)munmap(worker->slots[slot], worker->slot_bytes[slot]);
	worker->slots[slot] = NULL;
}

static void forget(struct worker *worker, const uint64_t slots[PACKED_SLOTS / 64])
{
	for (uint32_t slot = 0; slot < PACKED_SLOTS; slot++)
		if ((slots[slot / 64] >> slot % 64 & 1) != 0)
			let_go(worker, slot);
}

static void keep(struct worker *worker, uint32_t slot, uint64_t bytes, int fd)
{
	let_go(worker, slot);
	if (fd < 0)
		return;
	void *memory = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
	(void)close(fd);
	if (memory == MAP_FAILED)
		_exit(1);
	worker->slots[slot] = memory;
	worker->slot_bytes[slot] = bytes;
}

static void serve(struct worker *worker)
{
	struct isolated_message message;
	int fd;
	while (isolated_receive(WORKER_SOCKET, &message, &fd) && message.kind != ISOLATED_END) {
		if (message.kind == ISOLATED_MAP)
			map(worker, message.bytes, fd);
		else if (message.kind == ISOLATED_KEEP)
			keep(worker, message.number % PACKED_SLOTS, message.bytes, fd);
		else if (message.kind == ISOLATED_FORGET)
			forget(worker, message.slots);
		else if (message.kind == ISOLATED_HELPERS)
			worker_loop_set_helpers(&worker->loop, fd);
		else if (message.kind == ISOLATED_PLAN || message.kind == ISOLATED_RUN)
			serve_call(worker, (isolated_kind)message.kind, message.number);
	}
}

/* ---- The process ---- */

static void limit(__rlimit_resource_t resource, rlim_t most)
{
	struct rlimit now;
	if (getrlimit(resource, &now) != 0)
		return;
	now.rlim_cur = now.rlim_cur < most ? now.rlim_cur : most;
	now.rlim_max = now.rlim_max < most ? now.rlim_max : most;
	(void)setrlimit(resource, &now);
}

static void note_missing(struct worker *worker, const char *what)
{
	const size_t at = strlen(worker->unconfined);
	(void)snprintf(worker->unconfined + at, sizeof worker->unconfined - at, "%s%s: %s", at == 0 ? "" : ", ", what, strerror(errno));
}

/* False: the daemon has gone before the kernel could be told to end this process with it. */
static bool confine(struct worker *worker, const char *parent)
{
	if (close_range(WORKER_SOCKET + 1, ~0u, 0) != 0)
		note_missing(worker, "close_range");
	(void)prctl(PR_SET_NAME, "opd-worker");
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
		note_missing(worker, "no new privileges");
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0)
		note_missing(worker, "end with the daemon");
	limit(RLIMIT_CORE, 0);
	limit(RLIMIT_NOFILE, DESCRIPTORS);
	if (!confine_calls())
		note_missing(worker, "seccomp filter");
	return getppid() == (pid_t)strtol(parent, NULL, 10);
}

static opd_status open_module(struct worker *worker, const char *path, opd_error *error)
{
	void *library;
	opd_status status = module_find(path, &library, &worker->def, error);
	if (status != OPD_OK)
		return status;
	worker->host = host_table;
	worker->host.context = worker;
	worker->state = calloc(1, worker->def->state_bytes == 0 ? 1 : worker->def->state_bytes);
	if (worker->state == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", worker->def->name);
	say(worker, ISOLATED_MODULE, OPD_OK, worker->def->name);
	isolated_put(&worker->out, worker->def->version == NULL ? "" : worker->def->version);
	isolated_put(&worker->out, worker->unconfined);
	send_out(worker);
	worker->opening = true;
	error->text[0] = '\0';
	status = worker->def->open(&worker->host, worker->state, error);
	worker->opening = false;
	error->text[sizeof error->text - 1] = '\0';
	return status;
}

int worker_main(const char *parent, const char *path, bool confined)
{
	opd_error error = {0};
	opd_status status;
	struct worker *worker = calloc(1, sizeof *worker);
	if (worker == NULL || !confine(worker, parent))
		return 1;
	arena_init(&worker->arena, ARENA_BYTES);
	worker->loop.helpers = -1;
	worker->loop.daemon = WORKER_SOCKET;
	if (confined && worker->unconfined[0] != '\0')
		status = opd_fail(&error, OPD_FAILED_PRECONDITION, "%s: it must be confined, and this kernel doesn't: %s", path, worker->unconfined);
	else
		status = open_module(worker, path, &error);
	say(worker, ISOLATED_OPENED, status, error.text);
	send_out(worker);
	if (status == OPD_OK)
		serve(worker);
	for (uint32_t i = 0; i < PLANS_KEPT; i++)
		plan_drop(&worker->plans[i]);
	if (worker->state != NULL && worker->def->close != NULL)
		worker->def->close(&worker->host, worker->state);
	_exit(0); /* destructors of a library that was never made for this are no business of ours */
}
