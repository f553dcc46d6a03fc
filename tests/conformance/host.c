#include "tests/conformance/host.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "server/shares.h"

enum { THREADS_MAX = 64, HUGE_PAGE = 2 << 20, LARGE = 4 << 20 };

/* Length of the op's name at the start of a schema. */
static size_t schema_name_length(const char *schema)
{
	return strcspn(schema, "(");
}

static bool op_is_called(const opd_op *op, const char *name)
{
	size_t length = schema_name_length(op->schema);
	return strlen(name) == length && strncmp(op->schema, name, length) == 0;
}

const opd_op *host_find_op(const struct host *host, const char *name)
{
	for (size_t i = 0; i < host->op_count; i++)
		if (op_is_called(host->ops[i], name))
			return host->ops[i];
	return NULL;
}

const struct host_impl *host_find_impl(const struct host *host, const char *provider, const char *op)
{
	for (size_t i = 0; i < host->impl_count; i++)
		if (strcmp(host->impls[i].provider, provider) == 0 && strcmp(host->impls[i].impl->op, op) == 0)
			return &host->impls[i];
	return NULL;
}

static struct host_module *host_opening(struct host *host)
{
	return &host->modules[host->module_count];
}

static opd_status host_add_impl(struct host *host, const opd_impl *impl, const char *provider, opd_error *error)
{
	if (host->impl_count == HOST_IMPLS)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: more than %d implementations", impl->op, HOST_IMPLS);
	if (host_find_impl(host, provider, impl->op) != NULL)
		return opd_fail(error, OPD_ALREADY_EXISTS, "%s: provider %s has an implementation already", impl->op, provider);
	host->impls[host->impl_count++] = (struct host_impl){impl, provider, host_opening(host)->state};
	return OPD_OK;
}

static opd_status host_register_op(const opd_host *table, const opd_op *op, opd_error *error)
{
	struct host *host = table->context;
	char name[64];
	(void)snprintf(name, sizeof name, "%.*s", (int)schema_name_length(op->schema), op->schema);
	if (host_find_op(host, name) != NULL)
		return opd_fail(error, OPD_ALREADY_EXISTS, "op %s is taken", name);
	if (host->op_count == HOST_OPS)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "op %s: more than %d ops", name, HOST_OPS);
	host->ops[host->op_count++] = op;
	return op->native == NULL ? OPD_OK : host_add_impl(host, op->native, "native", error);
}

static opd_status host_register_impl(const opd_host *table, const opd_impl *impl, opd_error *error)
{
	struct host *host = table->context;
	if (host->op_count > 0 && host_find_op(host, impl->op) == NULL)
		return opd_fail(error, OPD_NOT_FOUND, "implementation of %s: no such op", impl->op);
	return host_add_impl(host, impl, host_opening(host)->module->name, error);
}

const struct device *host_find_device(const struct host *host, const char *kind)
{
	for (size_t i = 0; i < host->device_count; i++)
		if (strcmp(host->devices[i].backend->kind, kind) == 0)
			return &host->devices[i];
	return NULL;
}

static opd_status host_register_backend(const opd_host *table, const opd_backend *backend, opd_error *error)
{
	struct host *host = table->context;
	if (host_find_device(host, backend->kind) != NULL)
		return opd_fail(error, OPD_ALREADY_EXISTS, "a backend for devices of kind %s is there already", backend->kind);
	if (host->device_count == HOST_DEVICES || backend->device_count == 0)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "backend %s: %u devices, and at most %d backends", backend->kind,
		                (unsigned)backend->device_count, HOST_DEVICES);
	struct device *device = &host->devices[host->device_count];
	opd_status status = device_open(device, backend, host_opening(host)->state, error);
	if (status != OPD_OK)
		device_close(device);
	else
		host->device_count++;
	return status;
}

static opd_status host_set_shape(const opd_host *table, const char *op, opd_shape_fn shape, opd_error *error)
{
	(void)table, (void)shape;
	return opd_fail(error, OPD_UNIMPLEMENTED, "%s: this host sets no shape functions", op);
}

static bool host_find_backend(const opd_host *table, const char *kind, const opd_backend **backend_out, void **state_out)
{
	const struct device *device = host_find_device(table->context, kind);
	if (device == NULL)
		return false;
	*backend_out = device->backend;
	*state_out = device->state;
	return true;
}

void *host_memory(uint64_t bytes)
{
	void *memory = NULL;
	if (posix_memalign(&memory, bytes < LARGE ? 64 : HUGE_PAGE, bytes == 0 ? 64 : bytes) != 0)
		return NULL;
	if (bytes >= LARGE)
		(void)madvise(memory, bytes, MADV_HUGEPAGE); /* only a wish */
	return memory;
}

static void *host_alloc(const opd_host *table, uint64_t bytes)
{
	(void)table;
	void *memory = NULL; /* malloc's, which has it again for the next call; the daemon keeps buffers too */
	return posix_memalign(&memory, 64, bytes == 0 ? 64 : bytes) == 0 ? memory : NULL;
}

static void host_free(const opd_host *table, void *memory)
{
	(void)table;
	free(memory);
}

static bool host_log_enabled(const opd_host *table, opd_log_level level)
{
	(void)table;
	return level <= OPD_LOG_WARN;
}

static void host_log(const opd_host *table, opd_log_level level, const char *text)
{
	struct host *host = table->context;
	if (level != OPD_LOG_WARN)
		return;
	host->warnings++;
	(void)snprintf(host->last_warning, sizeof host->last_warning, "%s", text);
}

static struct derived_copies *copies_of(const opd_exec *exec)
{
	struct host *host = exec->host->context;
	return &host->copies;
}

static const void *host_derived_find(const opd_exec *exec, const opd_tensor *tensor, const void *key, uint32_t key_bytes)
{
	return derived_copies_find(copies_of(exec), tensor, key, key_bytes);
}

static void *host_derived_make(const opd_exec *exec, const opd_tensor *tensor, const void *key, uint32_t key_bytes, uint64_t bytes)
{
	return derived_copies_make(copies_of(exec), tensor, key, key_bytes, bytes);
}

static void host_derived_keep(const opd_exec *exec, const void *memory)
{
	derived_copies_keep(copies_of(exec), memory);
}

static bool host_cancelled(const opd_exec *exec)
{
	const struct host *host = exec->host->context;
	return host->cancel;
}

/* ---- parallel_for: shares as the daemon's lane cuts them, taken by whichever thread is free --------------------------------- */

struct loop {
	uint64_t items;
	uint32_t shares;
	opd_range_fn range;
	void *argument;
	_Atomic uint32_t next;
};

static const double watch_ns = 20e3; /* unless host_watch says more */

struct host_helper {
	pthread_t thread;
	const struct host *host;
	uint32_t number;
	bool stop;                    /* under the mutex */
	atomic_bool asleep;           /* changed under the mutex */
	_Atomic(struct loop *) loop;  /* set by the owner, cleared by the helper when no share is left */
	pthread_mutex_t mutex;
	pthread_cond_t cond;
};

static void loop_work(struct loop *loop, uint32_t number)
{
	for (;;) {
		uint32_t share = atomic_fetch_add(&loop->next, 1);
		if (share >= loop->shares)
			return;
		loop->range(loop->argument, shares_begin(loop->items, loop->shares, share), shares_begin(loop->items, loop->shares, share + 1), number);
	}
}

static double now_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

/* NULL: told to stop. */
static struct loop *helper_wait(struct host_helper *helper)
{
	struct loop *loop = NULL;
	const double end = now_ns() + helper->host->watch_ns;
	for (int look = 0; loop == NULL && (look % 64 != 0 || now_ns() < end); look++) {
		loop = atomic_load_explicit(&helper->loop, memory_order_acquire);
		if (look % 64 == 63)
			(void)sched_yield();
	}
	if (loop != NULL)
		return loop;
	(void)pthread_mutex_lock(&helper->mutex);
	atomic_store(&helper->asleep, true);
	while ((loop = atomic_load(&helper->loop)) == NULL && !helper->stop)
		(void)pthread_cond_wait(&helper->cond, &helper->mutex);
	atomic_store(&helper->asleep, false);
	(void)pthread_mutex_unlock(&helper->mutex);
	return loop;
}

static void *helper_run(void *argument)
{
	struct host_helper *helper = argument;
	for (struct loop *loop; (loop = helper_wait(helper)) != NULL;) {
		loop_work(loop, helper->number);
		atomic_store_explicit(&helper->loop, NULL, memory_order_release);
	}
	return NULL;
}

/* Whoever goes to sleep looks at `loop` again after it has said so: one of both sees the other. */
static void helper_post(struct host_helper *helper, struct loop *loop)
{
	atomic_store(&helper->loop, loop);
	if (!atomic_load(&helper->asleep))
		return;
	(void)pthread_mutex_lock(&helper->mutex);
	(void)pthread_cond_signal(&helper->cond);
	(void)pthread_mutex_unlock(&helper->mutex);
}

/* Starts helpers until there are so many; how many there are. They stay until host_fini. */
static uint32_t helpers_start(struct host *host, uint32_t count)
{
	if (host->helpers == NULL)
		host->helpers = calloc(THREADS_MAX, sizeof host->helpers[0]);
	while (host->helpers != NULL && host->helper_count < count) {
		struct host_helper *helper = &host->helpers[host->helper_count];
		helper->host = host;
		helper->number = host->helper_count + 1;
		(void)pthread_mutex_init(&helper->mutex, NULL);
		(void)pthread_cond_init(&helper->cond, NULL);
		if (pthread_create(&helper->thread, NULL, helper_run, helper) != 0)
			break;
		host->helper_count++;
	}
	return host->helper_count < count ? host->helper_count : count;
}

static void helpers_stop(struct host *host)
{
	for (uint32_t i = 0; i < host->helper_count; i++) {
		struct host_helper *helper = &host->helpers[i];
		(void)pthread_mutex_lock(&helper->mutex);
		helper->stop = true;
		(void)pthread_cond_signal(&helper->cond);
		(void)pthread_mutex_unlock(&helper->mutex);
		(void)pthread_join(helper->thread, NULL);
		(void)pthread_cond_destroy(&helper->cond);
		(void)pthread_mutex_destroy(&helper->mutex);
	}
	free(host->helpers);
	host->helpers = NULL;
	host->helper_count = 0;
}

static void host_parallel_for(const opd_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument)
{
	struct host *host = exec->host->context;
	uint32_t threads = exec->threads < THREADS_MAX ? exec->threads : THREADS_MAX;
	struct loop loop = {.items = items, .shares = shares_count(items, grain, threads), .range = range, .argument = argument};
	if (items > 0 && loop.shares <= 1)
		range(argument, 0, items, 0);
	if (loop.shares <= 1)
		return;
	atomic_init(&loop.next, 0);
	uint32_t helpers = helpers_start(host, threads > 0 ? threads - 1 : 0);
	for (uint32_t i = 0; i < helpers; i++)
		helper_post(&host->helpers[i], &loop);
	loop_work(&loop, 0);
	for (uint32_t i = 0; i < helpers; i++)
		while (atomic_load_explicit(&host->helpers[i].loop, memory_order_acquire) != NULL)
			(void)sched_yield();
}

/* ---- Life ------------------------------------------------------------------------------------------------------------- */

void host_init(struct host *host)
{
	memset(host, 0, sizeof *host);
	host->watch_ns = watch_ns;
	host->table = (opd_host){
		.abi = OPD_PROVIDER_ABI,
		.struct_bytes = sizeof(opd_host),
		.context = host,
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
}

/* By the clock, and this long: sixteen threads of which some ended early slept after 4000 looks, and waking fifteen one after another took 10 us until the first one began, and 30 until the last did, of
 * a call of 100. OpenMP's threads, which the libraries called beside have, watch for longer. */
void host_watch(struct host *host)
{
	host->watch_ns = 300e3;
}

static void module_close(struct host *host, struct host_module *module)
{
	if (module->module != NULL && module->module->close != NULL)
		module->module->close(&host->table, module->state);
	free(module->state);
	if (module->library != NULL)
		(void)dlclose(module->library);
	*module = (struct host_module){0};
}

/* The library is the module's from here on, also after a failure. */
static opd_status host_open_library(struct host *host, const opd_module *module, void *library, opd_error *error)
{
	if (host->module_count == HOST_MODULES || module->abi != OPD_PROVIDER_ABI) {
		if (library != NULL)
			(void)dlclose(library);
		return opd_fail(error, OPD_FAILED_PRECONDITION, "module with ABI %u, expected %d (and at most %d modules)", module->abi,
		                OPD_PROVIDER_ABI, HOST_MODULES);
	}
	struct host_module *slot = host_opening(host);
	*slot = (struct host_module){.module = module, .library = library};
	slot->state = calloc(1, module->state_bytes == 0 ? 1 : module->state_bytes);
	if (slot->state == NULL) {
		slot->module = NULL;
		module_close(host, slot);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: no %llu bytes of state", module->name,
		                (unsigned long long)module->state_bytes);
	}
	size_t ops = host->op_count, impls = host->impl_count;
	opd_status status = module->open(&host->table, slot->state, error);
	if (status != OPD_OK) {
		host->op_count = ops;
		host->impl_count = impls;
		module_close(host, slot);
		return status;
	}
	host->module_count++;
	return OPD_OK;
}

opd_status host_open(struct host *host, const opd_module *module, opd_error *error)
{
	return host_open_library(host, module, NULL, error);
}

opd_status host_load(struct host *host, const char *path, opd_error *error)
{
	void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (library == NULL)
		return opd_fail(error, OPD_NOT_FOUND, "%s", dlerror());
	opd_module_get_fn get = NULL;
	void *symbol = dlsym(library, OPD_MODULE_SYMBOL);
	memcpy(&get, &symbol, sizeof get);
	if (get == NULL) {
		(void)dlclose(library);
		return opd_fail(error, OPD_NOT_FOUND, "%s: exports no %s", path, OPD_MODULE_SYMBOL);
	}
	return host_open_library(host, get(), library, error);
}

opd_status host_prepare(const struct host_impl *impl, const opd_call *call, struct host_prepared *prepared_out, opd_error *error)
{
	struct host_prepared *prepared = prepared_out;
	*prepared = (struct host_prepared){.plan = {.struct_bytes = sizeof prepared->plan}};
	if (impl->impl->plan == NULL)
		return OPD_OK;
	opd_reason reason;
	opd_status planned = impl->impl->plan(impl->impl, impl->state, call, &prepared->plan, &reason, error);
	if (planned != OPD_OK)
		return planned;
	prepared->planned = true;
	if (prepared->plan.scratch_bytes > 0 && posix_memalign(&prepared->scratch, 64, prepared->plan.scratch_bytes) != 0) {
		host_unprepare(prepared);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: no scratch", impl->impl->op);
	}
	return OPD_OK;
}

opd_status host_run_prepared(const struct host *host, const struct host_impl *impl, const opd_call *call, const struct host_prepared *prepared,
                             uint32_t threads, opd_error *error)
{
	opd_exec exec = {.struct_bytes = sizeof exec, .threads = threads, .host = &host->table};
	exec.plan = prepared->planned ? &prepared->plan : NULL;
	exec.scratch = prepared->scratch;
	return impl->impl->run(impl->impl, impl->state, call, &exec, error);
}

void host_unprepare(struct host_prepared *prepared)
{
	if (prepared->planned && prepared->plan.destroy != NULL)
		prepared->plan.destroy(prepared->plan.data);
	free(prepared->scratch);
	*prepared = (struct host_prepared){0};
}

opd_status host_run(const struct host *host, const struct host_impl *impl, const opd_call *call, uint32_t threads, opd_error *error)
{
	struct host_prepared prepared;
	const struct device *device = host_find_device(host, impl->impl->device == NULL ? "cpu" : impl->impl->device);
	if (device != NULL)
		return device_run(device, &host->table, impl->impl, impl->state, call, error);
	opd_status status = host_prepare(impl, call, &prepared, error);
	if (status == OPD_OK)
		status = host_run_prepared(host, impl, call, &prepared, threads, error);
	host_unprepare(&prepared);
	return status;
}

void host_drop_derived(const struct host *host)
{
	struct host *own = host->table.context; /* itself, not const */
	derived_copies_drop(&own->copies);
}

void host_fini(struct host *host)
{
	helpers_stop(host);
	while (host->device_count > 0)
		device_close(&host->devices[--host->device_count]);
	while (host->module_count > 0)
		module_close(host, &host->modules[--host->module_count]);
	derived_copies_drop(&host->copies);
}
