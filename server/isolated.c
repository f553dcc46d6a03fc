#include "server/isolated.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/clock.h"
#include "server/isolated_help.h"
#include "server/lane.h"
#include "server/module.h"

#define IMPLS_MAX 1024u
#define START_NS 60000000000u     /* for the module's open */
#define BACKOFF_FROM 2u           /* deaths in a row without a success between them */
#define BACKOFF_NS 100000000u
#define BACKOFF_DOUBLINGS 7u      /* up to 12.8 s */

struct proxy {
	opd_impl impl;
	struct isolated *owner;
	uint32_t number;
	char *op;
	char *schema;
	char *uuid;
	char *unsupported;
};

/* What the daemon has of a plan: the worker that made it may be gone, and another makes it again. */
struct plan_note {
	uint64_t number;
	uint64_t scratch_bytes;
};

struct isolated {
	opd_module def;
	struct isolated_services services;
	struct log *log;
	const struct provider *provider;
	char *path;
	char *name;
	char *version;
	char *unconfined; /* "": they are confined */
	bool confined;    /* they must be */
	uint32_t proxy_count;
	struct proxy *proxies;
	_Atomic uint64_t plans; /* numbers given out */
	struct constants constants;
	struct log_limit lines; /* of what the module says in its workers */
	pthread_mutex_t mutex;  /* of what follows */
	struct process *idle;
	uint64_t deaths;
	uint32_t deaths_in_row;
	uint64_t not_before_ns;
};

/* ---- What the worker says of the module ---- */

static void proxy_fini(struct proxy *proxy)
{
	free(proxy->op);
	free(proxy->schema);
	free(proxy->uuid);
	free(proxy->unsupported);
}

static opd_status proxy_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason, opd_error *error);
static opd_status proxy_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error);

/* What it does about threads, rows and denormals is its own; where its operands and results lie isn't. */
#define PROXY_FLAGS (OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT | OPD_IMPL_BF16_DENORMALS_ZERO)

static opd_status add_proxy(struct isolated *isolated, const struct isolated_message *message, opd_error *error)
{
	struct proxy *proxy = &isolated->proxies[isolated->proxy_count];
	const char *unsupported = isolated_text(message, 3);
	if (isolated->proxy_count == IMPLS_MAX)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: more than %u implementations", isolated->path, IMPLS_MAX);
	*proxy = (struct proxy){
		.owner = isolated,
		.number = isolated->proxy_count,
		.op = strdup(isolated_text(message, 0)),
		.schema = strdup(isolated_text(message, 1)),
		.uuid = strdup(isolated_text(message, 2)),
		.unsupported = unsupported[0] == '\0' ? NULL : strdup(unsupported),
	};
	isolated->proxy_count++;
	if (proxy->op == NULL || proxy->schema == NULL || proxy->uuid == NULL || (unsupported[0] != '\0' && proxy->unsupported == NULL))
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", isolated->path);
	proxy->impl = (opd_impl){
		.struct_bytes = sizeof proxy->impl,
		.flags = (message->flags & PROXY_FLAGS) | OPD_IMPL_PLAN_MAY_REFUSE,
		.op = proxy->op,
		.schema = proxy->schema,
		.device = "cpu",
		.unsupported = proxy->unsupported,
		.uuid = proxy->uuid,
		.plan = proxy_plan,
		.run = proxy_run,
		.user = proxy,
	};
	return OPD_OK;
}

/* A worker that is started later must have the same module. */
static opd_status same_proxy(const struct isolated *isolated, uint32_t number, const struct isolated_message *message, opd_error *error)
{
	const struct proxy *proxy = &isolated->proxies[number];
	if (number < isolated->proxy_count && strcmp(proxy->op, isolated_text(message, 0)) == 0 && strcmp(proxy->schema, isolated_text(message, 1)) == 0 &&
	    strcmp(proxy->uuid, isolated_text(message, 2)) == 0)
		return OPD_OK;
	return opd_fail(error, OPD_FAILED_PRECONDITION, "%s: the module has changed since it was loaded: restart the daemon", isolated->path);
}

static opd_status set_name(struct isolated *isolated, const struct isolated_message *message, opd_error *error)
{
	if (isolated->name != NULL)
		return OPD_OK;
	isolated->name = strdup(isolated_text(message, 0));
	isolated->version = strdup(isolated_text(message, 1));
	isolated->unconfined = strdup(isolated_text(message, 2));
	if (isolated->name == NULL || isolated->version == NULL || isolated->unconfined == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", isolated->path);
	if (isolated->unconfined[0] != '\0')
		LOG(isolated->log, LOG_WARN, "the workers of an isolated module aren't confined", LOG_STR("provider", isolated->name), LOG_STR("missing", isolated->unconfined));
	isolated->def.name = isolated->name;
	isolated->def.version = isolated->version;
	return module_check(&isolated->def, error);
}

static opd_status opened(const struct isolated_message *message, opd_error *error)
{
	if (message->status == OPD_OK)
		return OPD_OK;
	(void)snprintf(error->text, sizeof error->text, "%s", isolated_text(message, 0));
	return module_failure((opd_status)message->status, error, "the module can't be opened");
}

/* Until its module is open. first: what it registers is what the module has. */
static opd_status greet(struct isolated *isolated, struct process *process, bool first, bool *died_out, opd_error *error)
{
	const struct isolated_message *message = &process->message;
	const uint64_t limit_ns = clock_now_ns() + START_NS;
	uint32_t count = 0;
	opd_status status = OPD_OK;
	while (status == OPD_OK) {
		const process_event event = process_wait(process, limit_ns, NULL, NULL);
		*died_out = event != PROCESS_MESSAGE;
		if (event == PROCESS_OVERDUE)
			return opd_fail(error, OPD_DEADLINE_EXCEEDED, "%s: its worker process wasn't ready within a minute", isolated->path);
		if (event != PROCESS_MESSAGE)
			return opd_fail(error, OPD_INTERNAL, "%s: its worker process died while it opened the module", isolated->path);
		if (message->kind == ISOLATED_OPENED) {
			status = opened(message, error);
			return status == OPD_OK && count != isolated->proxy_count ? same_proxy(isolated, isolated->proxy_count, message, error) : status;
		}
		if (message->kind == ISOLATED_MODULE) {
			status = set_name(isolated, message, error);
			process->provider = isolated->name == NULL ? "" : isolated->name;
		}
		if (message->kind == ISOLATED_IMPL && first)
			status = add_proxy(isolated, message, error);
		else if (message->kind == ISOLATED_IMPL)
			status = same_proxy(isolated, count, message, error);
		else if (message->kind != ISOLATED_MODULE)
			status = opd_fail(error, OPD_INTERNAL, "%s: its worker process says what it shouldn't", isolated->path);
		count += message->kind == ISOLATED_IMPL;
	}
	return status;
}

static opd_status start_process(struct isolated *isolated, bool first, struct process **process_out, opd_error *error)
{
	struct process *process;
	bool died = false;
	char end[120];
	opd_status status = process_start(isolated->services.program, isolated->path, isolated->confined, isolated->services.account, isolated->log, &isolated->lines,
	                                  isolated->name == NULL ? "" : isolated->name, &process, error);
	if (status != OPD_OK)
		return status;
	status = greet(isolated, process, first, &died, error);
	if (status == OPD_OK) {
		process->provider = isolated->name;
		LOG(isolated->log, LOG_DEBUG, "worker started", LOG_STR("provider", isolated->name), LOG_UINT("worker", process->pid));
		*process_out = process;
		return OPD_OK;
	}
	process_end(process, !died, end, sizeof end);
	if (died && status == OPD_INTERNAL)
		status = opd_fail(error, OPD_INTERNAL, "%s: its worker process %s while it opened the module", isolated->path, end);
	return status;
}

/* ---- Workers ---- */

static void note_death(struct isolated *isolated)
{
	(void)pthread_mutex_lock(&isolated->mutex);
	isolated->deaths++;
	isolated->deaths_in_row++;
	if (isolated->deaths_in_row >= BACKOFF_FROM) {
		const uint32_t more = isolated->deaths_in_row - BACKOFF_FROM;
		isolated->not_before_ns = clock_now_ns() + ((uint64_t)BACKOFF_NS << (more < BACKOFF_DOUBLINGS ? more : BACKOFF_DOUBLINGS));
	}
	(void)pthread_mutex_unlock(&isolated->mutex);
}

/* It has died, or dies now, and that wasn't its request's wish. How it ended is in `end`. */
static void bury(struct isolated *isolated, struct process *process, const char *event, const char *op, char *end, size_t end_bytes)
{
	const pid_t pid = process->pid;
	process_end(process, false, end, end_bytes);
	note_death(isolated);
	LOG(isolated->log, LOG_ERROR, event, LOG_STR("provider", isolated->name), LOG_STR("op", op), LOG_UINT("worker", pid), LOG_STR("end", end));
}

/* NULL: there is none, or one only that was condemned meanwhile, which goes. */
static struct process *take_idle(struct isolated *isolated)
{
	char end[120];
	for (;;) {
		(void)pthread_mutex_lock(&isolated->mutex);
		struct process *process = isolated->idle;
		if (process != NULL)
			isolated->idle = process->next;
		(void)pthread_mutex_unlock(&isolated->mutex);
		if (process == NULL || process->fault == NULL)
			return process;
		bury(isolated, process, "worker died", "", end, sizeof end);
	}
}

/* An idle one, or a new one. */
static opd_status acquire(struct isolated *isolated, struct process **process_out, opd_error *error)
{
	*process_out = take_idle(isolated);
	if (*process_out != NULL)
		return OPD_OK;
	(void)pthread_mutex_lock(&isolated->mutex);
	const uint64_t not_before_ns = isolated->not_before_ns;
	const uint32_t row = isolated->deaths_in_row;
	(void)pthread_mutex_unlock(&isolated->mutex);
	const uint64_t now_ns = clock_now_ns();
	if (now_ns < not_before_ns)
		return opd_fail(error, OPD_UNAVAILABLE, "%s: its last %" PRIu32 " worker processes died: the next starts in %" PRIu64 " ms", isolated->name, row,
		                (not_before_ns - now_ns) / 1000000 + 1);
	opd_status status = start_process(isolated, false, process_out, error);
	if (status == OPD_INTERNAL || status == OPD_DEADLINE_EXCEEDED)
		note_death(isolated);
	return status;
}

static void release(struct isolated *isolated, struct process *process)
{
	process_trim(process);
	process_forget(process, &isolated->constants);
	(void)pthread_mutex_lock(&isolated->mutex);
	isolated->deaths_in_row = 0;
	isolated->not_before_ns = 0;
	process->next = isolated->idle;
	isolated->idle = process;
	(void)pthread_mutex_unlock(&isolated->mutex);
}

void isolated_tick(struct isolated *isolated)
{
	(void)pthread_mutex_lock(&isolated->mutex);
	for (struct process *process = isolated->idle; process != NULL; process = process->next)
		process_forget(process, &isolated->constants);
	(void)pthread_mutex_unlock(&isolated->mutex);
}

/* exec: NULL while it plans. */
static void tell_failure(const struct proxy *proxy, failure_kind kind, const opd_exec *exec)
{
	const struct isolated *isolated = proxy->owner;
	const struct lane_exec *lane = exec == NULL ? NULL : exec->lane;
	if (isolated->provider != NULL)
		isolated->services.failed(isolated->services.context, isolated->provider, &proxy->impl, kind, lane == NULL ? NULL : lane->tenant);
}

/* ---- Calls ---- */

/* The worker hasn't answered: it has died, or dies now. */
static opd_status lose(const struct proxy *proxy, struct process *process, process_event event, const opd_exec *exec, opd_error *error)
{
	struct isolated *isolated = proxy->owner;
	char end[120];
	if (event == PROCESS_UNWANTED) {
		process_end(process, false, NULL, 0);
		return opd_fail(error, OPD_CANCELLED, "%s.%s: nobody wants its result any more", isolated->name, proxy->op);
	}
	bury(isolated, process, event == PROCESS_OVERDUE ? "worker exceeded its budget and was ended" : "worker died", proxy->op, end, sizeof end);
	tell_failure(proxy, event == PROCESS_OVERDUE ? FAILURE_HANG : FAILURE_CRASH, exec);
	if (event == PROCESS_OVERDUE)
		return opd_fail(error, OPD_DEADLINE_EXCEEDED, "%s.%s has exceeded its budget of %" PRIu64 " us, and its worker process was ended", isolated->name,
		                proxy->op, isolated->services.budget_ns(isolated->services.context, isolated->provider) / 1000);
	return opd_fail(error, OPD_INTERNAL, "%s.%s: its worker process %s", isolated->name, proxy->op, end);
}

/* Sends the call to a worker and waits for its end. OPD_OK: *process_out has the answer, and its memory the results; the caller releases it. */
static opd_status exchange(const struct proxy *proxy, struct packing *packing, isolated_kind kind, const opd_exec *exec, struct process **process_out,
                           opd_error *error)
{
	struct isolated *isolated = proxy->owner;
	struct process *process;
	if (!packing_measure(packing))
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s.%s: the call is too large for a worker process", isolated->name, proxy->op);
	opd_status status = acquire(isolated, &process, error);
	if (status != OPD_OK)
		return status;
	status = process_reserve(process, packing->bytes, error);
	if (status != OPD_OK) {
		release(isolated, process);
		return status;
	}
	for (uint32_t i = 0; i < packing->constant_count; i++)
		packing->constants[i].slot = process_keep(process, packing->constants[i].constant);
	packing_write(packing, process->memory);
	const uint32_t threads = exec == NULL ? 1 : exec->threads;
	if (threads > 1)
		process_offer_help(process);
	process_begin(process);
	const uint64_t budget_ns = isolated->provider == NULL ? 0 : isolated->services.budget_ns(isolated->services.context, isolated->provider);
	const struct isolated_message call = {.kind = kind, .number = threads};
	process_tell(process, &call, -1);
	process_event event = PROCESS_DIED;
	if (process->fault == NULL)
		event = help_wait(process, budget_ns == 0 ? 0 : clock_now_ns() + budget_ns, exec);
	if (event != PROCESS_MESSAGE)
		return lose(proxy, process, event, exec, error);
	if (process->message.kind == ISOLATED_DONE) {
		*process_out = process;
		return OPD_OK;
	}
	return lose(proxy, process, PROCESS_DIED, exec, error);
}

/* What the worker says of a failure. */
static opd_status read_failure(const struct proxy *proxy, const struct isolated_message *message, const opd_exec *exec, opd_error *error)
{
	(void)snprintf(error->text, sizeof error->text, "%s", isolated_text(message, 0));
	opd_status status = module_failure((opd_status)message->status, error, "%s.%s failed", proxy->owner->name, proxy->op);
	if (status == OPD_INTERNAL || status == OPD_UNKNOWN || status == OPD_DATA_LOSS)
		tell_failure(proxy, FAILURE_KERNEL, exec);
	return status;
}

/* Scratch lies in the worker's memory: the host gives none. */
static opd_status note_plan(const struct packing *packing, uint64_t scratch_bytes, opd_plan *plan_out, opd_error *error)
{
	struct plan_note *note = malloc(sizeof *note);
	if (note == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "plan: out of memory");
	*note = (struct plan_note){packing->plan, scratch_bytes};
	plan_out->memory_bytes = sizeof *note;
	plan_out->data = note;
	plan_out->destroy = free;
	return OPD_OK;
}

static opd_status proxy_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason, opd_error *error)
{
	const struct proxy *proxy = impl->user;
	struct isolated *isolated = proxy->owner;
	struct packing packing = {
		.call = call,
		.impl = proxy->number,
		.plan = atomic_fetch_add_explicit(&isolated->plans, 1, memory_order_relaxed) + 1,
	};
	struct process *process;
	(void)state;
	opd_status status = exchange(proxy, &packing, ISOLATED_PLAN, NULL, &process, error);
	if (status != OPD_OK)
		return status;
	const struct isolated_message *message = &process->message;
	if (message->status == OPD_FAILED_PRECONDITION) {
		const bool known = message->number <= OPD_REASON_NO_IMPLEMENTATION && message->number != OPD_REASON_NONE;
		opd_reason_set(reason, known ? (opd_reason_code)message->number : OPD_REASON_PLAN, "%s", isolated_text(message, 1));
		status = OPD_FAILED_PRECONDITION;
	} else if (message->status != OPD_OK) {
		status = read_failure(proxy, message, NULL, error);
	} else {
		status = note_plan(&packing, message->bytes, plan_out, error);
	}
	release(isolated, process);
	return status;
}

/* A canary that the worker has overwritten: at which byte; UINT64_MAX: none. */
static uint64_t broken_at(const unsigned char *memory, uint64_t at, uint64_t bytes)
{
	for (uint64_t k = 0; k < PACKED_CANARY_BYTES; k++)
		if (memory[at + bytes + k] != PACKED_CANARY)
			return bytes + k;
	return UINT64_MAX;
}

static opd_status overrun(const struct proxy *proxy, const char *what, uint64_t broken, uint64_t bytes, opd_error *error)
{
	tell_failure(proxy, FAILURE_OVERRUN, NULL);
	return opd_fail(error, OPD_INTERNAL, "%s.%s wrote past the end of %s, at byte %" PRIu64 " of %" PRIu64, proxy->owner->name, proxy->op, what, broken, bytes);
}

static opd_status take_results(const struct proxy *proxy, const struct packing *packing, const struct process *process, opd_error *error)
{
	char name[40];
	uint64_t bytes = packing->scratch_bytes;
	uint64_t broken = bytes == 0 ? UINT64_MAX : broken_at(process->memory, packing->scratch_at, bytes);
	if (broken != UINT64_MAX)
		return overrun(proxy, "its scratch", broken, bytes, error);
	for (uint32_t i = 0; i < packing->call->output_count; i++) {
		const uint64_t at = packing_result(packing, i, &bytes);
		(void)snprintf(name, sizeof name, "result %" PRIu32, i);
		broken = broken_at(process->memory, at, bytes);
		if (broken != UINT64_MAX)
			return overrun(proxy, name, broken, bytes, error);
		if (bytes != 0)
			memcpy(opd_tensor_data(packing->call->outputs[i]), process->memory + at, bytes);
	}
	return OPD_OK;
}

static void find_constant(struct isolated *isolated, struct packing *packing, struct derived_run *run, const opd_tensor *tensor)
{
	if (packing->constant_count == PACKED_CONSTANTS || opd_tensor_empty(tensor))
		return;
	struct constant *constant = constant_get(&isolated->constants, isolated->services.derived, run, tensor, packed_operand_bytes(tensor));
	for (uint32_t i = 0; constant != NULL && i < packing->constant_count; i++) {
		const struct constant *other = packing->constants[i].constant;
		if (other == constant || other->number % PACKED_SLOTS != constant->number % PACKED_SLOTS)
			continue;
		constant_unref(constant); /* they want the same slot: this one is copied */
		constant = NULL;
	}
	if (constant != NULL)
		packing->constants[packing->constant_count++] = (struct packed_constant){.tensor = tensor, .constant = constant};
}

/* Operands that workers keep. */
static void find_constants(struct isolated *isolated, struct packing *packing, const opd_exec *exec)
{
	const struct lane_exec *lane = exec->lane;
	const opd_call *call = packing->call;
	for (uint32_t i = 0; lane != NULL && lane->derived != NULL && i < call->arg_count; i++) {
		const opd_arg *arg = &call->args[i];
		if (arg->kind == OPD_ARG_TENSOR)
			find_constant(isolated, packing, lane->derived, arg->tensor);
		for (uint32_t k = 0; arg->kind == OPD_ARG_TENSORS && k < arg->count; k++)
			find_constant(isolated, packing, lane->derived, arg->tensors[k]);
	}
}

static opd_status proxy_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	const struct proxy *proxy = impl->user;
	const struct plan_note *note = exec->plan->data;
	struct packing packing = {
		.call = call,
		.impl = proxy->number,
		.plan = note->number,
		.contents = true,
		.scratch_bytes = note->scratch_bytes,
	};
	struct process *process;
	(void)state;
	find_constants(proxy->owner, &packing, exec);
	opd_status status = exchange(proxy, &packing, ISOLATED_RUN, exec, &process, error);
	for (uint32_t i = 0; i < packing.constant_count; i++) /* the worker has its own reference */
		constant_unref(packing.constants[i].constant);
	if (status != OPD_OK)
		return status;
	const struct isolated_message *message = &process->message;
	status = message->status == OPD_OK ? take_results(proxy, &packing, process, error) : read_failure(proxy, message, exec, error);
	release(proxy->owner, process);
	return status;
}

/* ---- The module ---- */

static opd_status proxy_open(const opd_host *host, void *state, opd_error *error)
{
	struct isolated *isolated = *(struct isolated **)state;
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < isolated->proxy_count; i++)
		status = host->register_impl(host, &isolated->proxies[i].impl, error);
	return status;
}

const opd_module *isolated_module(const struct isolated *isolated)
{
	return &isolated->def;
}

void isolated_set_provider(struct isolated *isolated, const struct provider *provider)
{
	isolated->provider = provider;
}

const char *isolated_unconfined(const struct isolated *isolated)
{
	return isolated->unconfined;
}

uint64_t isolated_deaths(struct isolated *isolated)
{
	(void)pthread_mutex_lock(&isolated->mutex);
	const uint64_t deaths = isolated->deaths;
	(void)pthread_mutex_unlock(&isolated->mutex);
	return deaths;
}

opd_status isolated_create(const char *path, bool confined, const struct isolated_services *services, struct log *log, struct isolated **isolated_out, opd_error *error)
{
	struct process *process;
	if (services->program == NULL)
		return opd_fail(error, OPD_UNIMPLEMENTED, "%s: isolated modules need the program opd: there is none in this process", path);
	struct isolated *isolated = calloc(1, sizeof *isolated);
	if (isolated == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", path);
	isolated->services = *services;
	isolated->log = log;
	isolated->confined = confined;
	isolated->path = strdup(path);
	isolated->proxies = calloc(IMPLS_MAX + 1, sizeof isolated->proxies[0]);
	isolated->def = (opd_module){
		.abi = OPD_PROVIDER_ABI,
		.struct_bytes = sizeof isolated->def,
		.state_bytes = sizeof(struct isolated *),
		.open = proxy_open,
	};
	(void)pthread_mutex_init(&isolated->mutex, NULL);
	opd_status status = isolated->path == NULL || isolated->proxies == NULL ? opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", path) : OPD_OK;
	if (status == OPD_OK)
		status = start_process(isolated, true, &process, error);
	if (status == OPD_OK && isolated->name == NULL) {
		process_end(process, true, NULL, 0);
		status = opd_fail(error, OPD_INTERNAL, "%s: its worker process didn't say what the module is called", path);
	}
	if (status != OPD_OK) {
		isolated_destroy(isolated);
		return status;
	}
	release(isolated, process);
	*isolated_out = isolated;
	return OPD_OK;
}

void isolated_destroy(struct isolated *isolated)
{
	if (isolated == NULL)
		return;
	while (isolated->idle != NULL) {
		struct process *process = isolated->idle;
		isolated->idle = process->next;
		process_end(process, true, NULL, 0);
	}
	for (uint32_t i = 0; i < isolated->proxy_count; i++)
		proxy_fini(&isolated->proxies[i]);
	free(isolated->proxies);
	free(isolated->path);
	free(isolated->name);
	free(isolated->version);
	free(isolated->unconfined);
	(void)pthread_mutex_destroy(&isolated->mutex);
	free(isolated);
}
