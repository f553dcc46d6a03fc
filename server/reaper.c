#include "server/reaper.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SMALL_BYTES (1u << 20) /* of a file: what is gone within a tenth of a millisecond */

struct remains {
	struct remains *next;
	void *data; /* NULL: a descriptor */
	uint64_t bytes;
	int fd;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* of what follows */
static struct remains *first;
static bool running;

static void dispose(const struct remains *remains)
{
	if (remains->data != NULL)
		(void)munmap(remains->data, remains->bytes);
	else
		(void)close(remains->fd);
}

/* NULL: that was all, and the thread ends. */
static struct remains *take(void)
{
	(void)pthread_mutex_lock(&mutex);
	struct remains *remains = first;
	if (remains != NULL)
		first = remains->next;
	running = remains != NULL;
	(void)pthread_mutex_unlock(&mutex);
	return remains;
}

static void *reaper_main(void *argument)
{
	struct remains *remains;
	(void)argument;
	(void)pthread_setname_np(pthread_self(), "opd-reaper");
	while ((remains = take()) != NULL) {
		dispose(remains);
		free(remains);
	}
	return NULL;
}

/* Detached, and without signals. */
static bool start(void)
{
	pthread_t thread;
	pthread_attr_t attributes;
	sigset_t all, before;
	if (pthread_attr_init(&attributes) != 0)
		return false;
	(void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	const int failed = pthread_create(&thread, &attributes, reaper_main, NULL);
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	(void)pthread_attr_destroy(&attributes);
	return failed == 0;
}

/* False: it stays the caller's. */
static bool hand_over(const struct remains *what)
{
	struct remains *remains = malloc(sizeof *remains);
	if (remains == NULL)
		return false;
	*remains = *what;
	(void)pthread_mutex_lock(&mutex);
	running = running || start();
	const bool taken = running;
	if (taken) {
		remains->next = first;
		first = remains;
	}
	(void)pthread_mutex_unlock(&mutex);
	if (!taken)
		free(remains);
	return taken;
}

void reaper_unmap(void *data, uint64_t bytes)
{
	const struct remains remains = {.data = data, .bytes = bytes};
	if (!hand_over(&remains))
		dispose(&remains);
}

static bool is_small(int fd)
{
	struct stat file;
	return fstat(fd, &file) != 0 || file.st_blocks < (blkcnt_t)(SMALL_BYTES / 512);
}

void reaper_close(int fd)
{
	const struct remains remains = {.fd = fd};
	if (is_small(fd) || !hand_over(&remains))
		dispose(&remains);
}
