#include "server/watch.h"

#include <errno.h>
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

static void log_watch(const struct watch *watch, log_level level, const char *event, uint64_t now_ns)
{
	const struct request *request = watch->request;
	LOG(request->context->server->log, level, event, LOG_STR("provider", watch->impl->provider->name),
	    LOG_STR("op", registry_op_name(request->context->server->registry, watch->impl)), LOG_UINT("session", request->session->id),
	    LOG_UINT("request", request->id), LOG_UINT("elapsed_us", (now_ns - watch->began_ns) / 1000), LOG_UINT("budget_us", watch->budget_ns / 1000));
}

/* Its budget is over, and it runs on. */
static void on_overdue(struct watches *watches, struct watch *watch, uint64_t now_ns)
{
	struct server *server = watches->server;
	watch->overdue = true;
	log_watch(watch, LOG_ERROR, "kernel exceeds its budget", now_ns);
	containment_failed(server->containment, watch->impl, FAILURE_HANG, watch->request->session->tenant->name);
	lane_cancel(watch->exec->job);
	if (!lane_replace(watch->request->session->lane, watch->exec->job))
		LOG(server->log, LOG_ERROR, "no thread could take the place of a stuck one", LOG_UINT("stuck", lanes_stuck(server)));
	request_overdue(watch->request, watch->impl, watch->budget_ns / 1000);
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

void watch_begin(struct watch *watch, const struct impl *impl, struct request *request, struct lane_exec *exec)
{
	const struct containment_policy *policy = containment_policy(request->context->server->containment, impl->provider);
	*watch = (struct watch){.budget_ns = atomic_load_explicit(&policy->budget_ns, memory_order_relaxed)};
	if (watch->budget_ns == 0 || exec->lane == NULL || request->direct || impl->provider->isolated)
		return;
	struct watches *watches = &request->context->io->watches;
	watch->watches = watches;
	watch->impl = impl;
	watch->request = request;
	watch->exec = exec;
	watch->began_ns = request_now_ns();
	(void)pthread_mutex_lock(&watches->mutex);
	watch->link = &watches->first;
	watch->next = watches->first;
	if (watch->next != NULL)
		watch->next->link = &watch->next;
	watches->first = watch;
	arm(watches, watch->began_ns + watch->budget_ns);
	(void)pthread_mutex_unlock(&watches->mutex);
}

void watch_end(struct watch *watch)
{
	if (watch->impl == NULL) /* `link` is its neighbours' to change */
		return;
	struct watches *watches = watch->watches;
	(void)pthread_mutex_lock(&watches->mutex);
	*watch->link = watch->next;
	if (watch->next != NULL)
		watch->next->link = watch->link;
	const bool overdue = watch->overdue;
	(void)pthread_mutex_unlock(&watches->mutex);
	if (overdue)
		log_watch(watch, LOG_WARN, "an overdue kernel has returned", request_now_ns());
}
