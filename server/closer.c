#include "server/closer.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <unistd.h>

#include "server/reaper.h"

static void *closer_main(void *argument)
{
	const int from = (int)(intptr_t)argument;
	int fd;
	while (read(from, &fd, sizeof fd) == (ssize_t)sizeof fd)
		(void)close(fd);
	(void)close(from);
	return NULL;
}

/* Detached, and without signals. */
static bool start_thread(int from)
{
	pthread_t thread;
	pthread_attr_t attributes;
	sigset_t all, before;
	if (pthread_attr_init(&attributes) != 0)
		return false;
	(void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	const int failed = pthread_create(&thread, &attributes, closer_main, (void *)(intptr_t)from);
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	(void)pthread_attr_destroy(&attributes);
	if (failed == 0)
		(void)pthread_setname_np(thread, "opd-closer");
	return failed == 0;
}

static bool start(struct closer *closer)
{
	int ends[2];
	if (pipe2(ends, O_CLOEXEC) != 0)
		return false;
	if (fcntl(ends[1], F_SETFL, O_NONBLOCK) != 0 || !start_thread(ends[0])) {
		(void)close(ends[0]);
		(void)close(ends[1]);
		return false;
	}
	closer->to = ends[1];
	closer->running = true;
	return true;
}

void closer_close(struct closer *closer, int fd)
{
	if (fcntl(fd, F_GET_SEALS) >= 0) {
		reaper_close(fd);
		return;
	}
	/* Without a thread, or with thousands that hang, it stays open: that harms less than a loop that waits. */
	if (closer->running || start(closer))
		(void)!write(closer->to, &fd, sizeof fd);
}

void closer_fini(struct closer *closer)
{
	if (closer->running)
		(void)close(closer->to);
	*closer = (struct closer){0};
}
