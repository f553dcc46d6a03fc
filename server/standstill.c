#include "server/standstill.h"

#include "server/daemon.h"

void standstill_init(struct standstill *standstill)
{
	(void)pthread_mutex_init(&standstill->mutex, NULL); /* of glibc, neither can fail */
	(void)pthread_cond_init(&standstill->changed, NULL);
}

void standstill_fini(struct standstill *standstill)
{
	(void)pthread_cond_destroy(&standstill->changed);
	(void)pthread_mutex_destroy(&standstill->mutex);
}

/* Under the mutex: until nobody wants it any more. */
static void stand(struct standstill *standstill)
{
	standstill->standing++;
	(void)pthread_cond_broadcast(&standstill->changed);
	while (atomic_load_explicit(&standstill->held, memory_order_relaxed))
		(void)pthread_cond_wait(&standstill->changed, &standstill->mutex);
	if (--standstill->standing == 0)
		(void)pthread_cond_broadcast(&standstill->changed);
}

/* Those that stood still for another one go on before the next one begins: many in a row leave everybody a turn in between. */
static bool in_the_way(const struct standstill *standstill)
{
	return atomic_load_explicit(&standstill->held, memory_order_relaxed) || standstill->standing != 0;
}

/* Two that want it at once: the second one stands still for the first. */
void standstill_begin(struct server *server, struct io_loop *io)
{
	struct standstill *standstill = &server->standstill;
	const uint32_t others = server->loop_count - (io != NULL);
	if (io != NULL)
		io_loop_let_go(io);
	if (server->loop_count == 1)
		return;
	(void)pthread_mutex_lock(&standstill->mutex);
	while (in_the_way(standstill)) {
		if (io != NULL && atomic_load_explicit(&standstill->held, memory_order_relaxed))
			stand(standstill);
		else
			(void)pthread_cond_wait(&standstill->changed, &standstill->mutex);
	}
	atomic_store_explicit(&standstill->held, true, memory_order_release);
	for (uint32_t i = 0; i < server->loop_count; i++)
		if (&server->loops[i] != io)
			io_loop_wake(&server->loops[i]);
	while (standstill->standing < others)
		(void)pthread_cond_wait(&standstill->changed, &standstill->mutex);
	(void)pthread_mutex_unlock(&standstill->mutex);
}

void standstill_end(struct server *server)
{
	struct standstill *standstill = &server->standstill;
	if (server->loop_count == 1)
		return;
	(void)pthread_mutex_lock(&standstill->mutex);
	atomic_store_explicit(&standstill->held, false, memory_order_relaxed);
	(void)pthread_cond_broadcast(&standstill->changed);
	(void)pthread_mutex_unlock(&standstill->mutex);
}

void standstill_wait(struct server *server, struct io_loop *io)
{
	struct standstill *standstill = &server->standstill;
	if (!atomic_load_explicit(&standstill->held, memory_order_acquire))
		return;
	io_loop_let_go(io);
	(void)pthread_mutex_lock(&standstill->mutex);
	if (atomic_load_explicit(&standstill->held, memory_order_relaxed))
		stand(standstill);
	(void)pthread_mutex_unlock(&standstill->mutex);
}
