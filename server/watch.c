#include "server/watch.h"

#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "server/containment.h"
#include "server/daemon.h"
#include "server/request.h"

/* Under the mutex; from any thread. */
static void arm(struct watches *watches, uint64_t at_ns)
{
	const struct itimerspec when = {.it_value = {.tv_sec = (time_t)(at_ns / 1000000000u), .tv_nsec = (long)(at_ns % 1000000000u)}};
	if (watches->armed_ns != 0 && watches->armed_ns <= at_ns)
		return;
	watches->armed_ns = timerfd_settime(watches->fd, TFD_TIMER_ABSTIME, &when, NULL) == 0 ? at_ns : 0;
}

/* "relu", or '*' for a graph's nodes together. */
static const char *op_name(const struct watch *watch)
{
	const struct impl *impl = watch->subject.impl;
	return impl == NULL ? "*" : registry_op_name(watch->subject.request->context->server->registry, impl);
}

static void log_watch(const struct watch *watch, log_level level, const char *event, uint64_t now_ns)
{
	const struct watch_subject *subject = &watch->subject;
	const struct request *request = subject->request;
	LOG(request->context->server->log, level, event, LOG_STR("provider", subject->provider == NULL ? "*" : subject->provider->name), LOG_STR("op", op_name(watch)),
	    LOG_STR("node", subject->node == NULL ? "" : subject->node), LOG_STR("device", subject->device == NULL ? "cpu" : device_lane_name(subject->device)),
	    LOG_UINT("session", request->session->id), LOG_UINT("request", request->id), LOG_UINT("elapsed_us", (now_ns - watch->began_ns) / 1000),
	    LOG_UINT("budget_us", watch->budget_ns / 1000));
}

static void describe(const struct watch *watch, opd_error *error)
{
	const struct watch_subject *subject = &watch->subject;
	const uint64_t budget_us = watch->budget_ns / 1000;
	if (subject->impl == NULL)
		(void)opd_fail(error, OPD_DEADLINE_EXCEEDED, "graph '%s' has exceeded the budget of its nodes of %" PRIu64 " us on %s and is still running",
		               subject->request->run.op->schema->name, budget_us, device_lane_name(subject->device));
	else
		(void)opd_fail(error, OPD_DEADLINE_EXCEEDED, "%s%s%s%s.%s has exceeded its budget of %" PRIu64 " us and is still running", subject->node == NULL ? "" : "node '",
		               subject->node == NULL ? "" : subject->node, subject->node == NULL ? "" : "': ", subject->impl->provider->name, op_name(watch), budget_us);
}

static struct request *request_of(struct lane_job *job)
{
	return (struct request *)((char *)job - offsetof(struct request, job));
}

/* Those that the lane has taken along end when all do: each has its answer now. */
static void answer(const struct watch *watch)
{
	const struct watch_subject *subject = &watch->subject;
	const struct lane_exec *exec = subject->exec;
	opd_error error;
	describe(watch, &error);
	request_overdue(subject->request, &error);
	for (struct device_job *member = subject->members; member != NULL; member = member->next)
		request_overdue((struct request *)((char *)member - offsetof(struct request, device_job)), &error);
	if (exec == NULL || exec->others == NULL)
		return;
	lane_cancel(exec->leader);
	request_overdue(request_of(exec->leader), &error);
	for (struct lane_job *job = exec->others; job != NULL; job = job->next) {
		lane_cancel(job);
		request_overdue(request_of(job), &error);
	}
}

static void count_failure(const struct watch_subject *subject)
{
	struct containment *containment = subject->request->context->server->containment;
	const char *tenant = subject->request->session->tenant->name;
	if (subject->impl != NULL)
		containment_failed(containment, subject->impl, FAILURE_HANG, tenant);
	else if (subject->provider != NULL)
		containment_provider_failed(containment, subject->provider, FAILURE_HANG, tenant);
}

/* Its budget is over, and it runs on. */
static void on_overdue(struct watches *watches, struct watch *watch, uint64_t now_ns)
{
	struct server *server = watches->server;
	const struct watch_subject *subject = &watch->subject;
	watch->overdue = true;
	log_watch(watch, LOG_ERROR, "kernel exceeds its budget", now_ns);
	count_failure(subject);
	if (subject->device != NULL) {
		device_lane_set_stuck(subject->device, true);
	} else if (!subject->request->overdue) { /* else another node of its graph was first */
		lane_cancel(subject->exec->job);
		if (!lane_replace(subject->request->session->lane, subject->exec->leader))
			LOG(server->log, LOG_ERROR, "no thread could take the place of a stuck one", LOG_UINT("stuck", lanes_stuck(server)));
	}
	answer(watch);
}

static void on_time(uv_poll_t *poll, int status, int events)
{
	(void)status;
	(void)events;
	struct watches *watches = poll->data;
	uint64_t expirations;
	(void)pthread_mutex_lock(&watches->mutex);
	if (read(watches->fd, &expirations, sizeof expirations) == sizeof expirations) {
		const uint64_t now_ns = request_now_ns();
		watches->armed_ns = 0;
		for (struct watch *watch = watches->first; watch != NULL; watch = watch->next) {
			if (watch->overdue)
				continue;
			if (watch->began_ns + watch->budget_ns <= now_ns)
				on_overdue(watches, watch, now_ns);
			else
				arm(watches, watch->began_ns + watch->budget_ns);
		}
	}
	(void)pthread_mutex_unlock(&watches->mutex);
}

int watches_open(struct watches *watches, struct server *server, uv_loop_t *loop)
{
	watches->fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	if (watches->fd < 0)
		return uv_translate_sys_error(errno);
	(void)pthread_mutex_init(&watches->mutex, NULL); /* of glibc, it can't fail */
	watches->server = server;
	watches->opened = true;
	watches->poll.data = watches;
	int failed = uv_poll_init(loop, &watches->poll, watches->fd);
	return failed != 0 ? failed : uv_poll_start(&watches->poll, UV_READABLE, on_time);
}

void watches_close(struct watches *watches)
{
	if (!watches->opened)
		return;
	(void)close(watches->fd);
	(void)pthread_mutex_destroy(&watches->mutex);
	watches->opened = false;
}

uint64_t watch_budget_ns(const struct server *server, const struct provider *provider)
{
	return atomic_load_explicit(&containment_policy(server->containment, provider)->budget_ns, memory_order_relaxed);
}

/* Under the mutex. */
static void enter(struct watches *watches, struct watch *watch)
{
	watch->began_ns = request_now_ns();
	watch->link = &watches->first;
	watch->next = watches->first;
	if (watch->next != NULL)
		watch->next->link = &watch->next;
	watches->first = watch;
	arm(watches, watch->began_ns + watch->budget_ns);
}

/* Under the mutex. */
static void leave(struct watch *watch)
{
	if (watch->link == NULL)
		return;
	*watch->link = watch->next;
	if (watch->next != NULL)
		watch->next->link = watch->link;
	watch->link = NULL;
}

void watch_begin(struct watch *watch, const struct watch_subject *subject, uint64_t budget_ns)
{
	struct io_loop *io = subject->request->context->io;
	*watch = (struct watch){.subject = *subject, .budget_ns = io == NULL ? 0 : budget_ns, .watches = io == NULL ? NULL : &io->watches};
	watch_resume(watch);
}

void watch_begin_kernel(struct watch *watch, const struct impl *impl, const char *node, struct request *request, struct lane_exec *exec)
{
	const struct watch_subject subject = {.impl = impl, .provider = impl->provider, .node = node, .request = request, .exec = exec};
	const bool watched = exec->lane != NULL && !impl->provider->isolated;
	watch_begin(watch, &subject, watched ? watch_budget_ns(request->context->server, impl->provider) : 0);
}

void watch_resume(struct watch *watch)
{
	struct watches *watches = watch->watches;
	if (watch->budget_ns == 0) /* `link` is its neighbours' to change */
		return;
	(void)pthread_mutex_lock(&watches->mutex);
	if (watch->link == NULL && !watch->overdue)
		enter(watches, watch);
	(void)pthread_mutex_unlock(&watches->mutex);
}

void watch_pause(struct watch *watch)
{
	struct watches *watches = watch->watches;
	if (watch->budget_ns == 0)
		return;
	(void)pthread_mutex_lock(&watches->mutex);
	if (!watch->overdue)
		leave(watch);
	(void)pthread_mutex_unlock(&watches->mutex);
}

bool watch_end(struct watch *watch)
{
	struct watches *watches = watch->watches;
	if (watch->budget_ns == 0)
		return false;
	(void)pthread_mutex_lock(&watches->mutex);
	leave(watch);
	const bool overdue = watch->overdue;
	(void)pthread_mutex_unlock(&watches->mutex);
	if (overdue)
		log_watch(watch, LOG_WARN, "an overdue kernel has returned", request_now_ns());
	watch->budget_ns = 0;
	return overdue;
}
