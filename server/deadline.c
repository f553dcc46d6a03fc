#include "server/deadline.h"

#include <errno.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "server/conn.h"
#include "server/request.h"

#define REQUEST_OF(node) ((struct request *)(void *)((char *)(node) - offsetof(struct request, run.deadline)))

static void arm(struct deadlines *deadlines, uint64_t at_ns)
{
	const struct itimerspec when = {.it_value = {.tv_sec = (time_t)(at_ns / 1000000000u), .tv_nsec = (long)(at_ns % 1000000000u)}};
	deadlines->armed_ns = timerfd_settime(deadlines->fd, TFD_TIMER_ABSTIME, &when, NULL) == 0 ? at_ns : 0;
}

static void on_time(uv_poll_t *poll, int status, int events)
{
	(void)status;
	(void)events;
	struct deadlines *deadlines = poll->data;
	uint64_t expirations;
	if (read(deadlines->fd, &expirations, sizeof expirations) != sizeof expirations)
		return;
	const double now_ns = (double)request_now_ns();
	while (deadlines->waiting.first != NULL && deadlines->waiting.first->key <= now_ns) {
		struct request *request = REQUEST_OF(deadlines->waiting.first);
		heap_remove(&deadlines->waiting, &request->run.deadline);
		if (!request->started && request->session->conn != NULL)
			conn_skip_payload(request->session->conn, request);
		request_expire(request);
	}
	deadlines->armed_ns = 0;
	if (deadlines->waiting.first != NULL)
		arm(deadlines, REQUEST_OF(deadlines->waiting.first)->run.deadline_ns);
}

int deadlines_open(struct deadlines *deadlines, uv_loop_t *loop)
{
	deadlines->fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	if (deadlines->fd < 0)
		return uv_translate_sys_error(errno);
	deadlines->opened = true;
	deadlines->poll.data = deadlines;
	int failed = uv_poll_init(loop, &deadlines->poll, deadlines->fd);
	return failed != 0 ? failed : uv_poll_start(&deadlines->poll, UV_READABLE, on_time);
}

void deadlines_close(struct deadlines *deadlines)
{
	if (deadlines->opened)
		(void)close(deadlines->fd);
	deadlines->opened = false;
}

void deadline_set(struct deadlines *deadlines, struct request *request)
{
	request->run.deadline.key = (double)request->run.deadline_ns;
	heap_insert(&deadlines->waiting, &request->run.deadline);
	if (deadlines->armed_ns == 0 || request->run.deadline_ns < deadlines->armed_ns)
		arm(deadlines, request->run.deadline_ns);
}

void deadline_clear(struct deadlines *deadlines, struct request *request)
{
	if (heap_has(&request->run.deadline))
		heap_remove(&deadlines->waiting, &request->run.deadline);
}
