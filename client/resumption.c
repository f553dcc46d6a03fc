#include "client/resumption.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TICKETS 16u

struct ticket {
	char *key;
	SSL_SESSION *session;
};

struct opd_resumption {
	_Atomic uint32_t refs;
	pthread_mutex_t mutex; /* of what follows */
	uint32_t count;
	struct ticket tickets[TICKETS]; /* oldest first */
};

opd_resumption *opd_resumption_create(void)
{
	opd_resumption *resumption = calloc(1, sizeof *resumption);
	if (resumption == NULL)
		return NULL;
	atomic_init(&resumption->refs, 1);
	(void)pthread_mutex_init(&resumption->mutex, NULL); /* of glibc, it can't fail */
	return resumption;
}

opd_resumption *resumption_ref(opd_resumption *resumption)
{
	if (resumption != NULL)
		(void)atomic_fetch_add_explicit(&resumption->refs, 1, memory_order_relaxed);
	return resumption;
}

/* Of the list, without freeing it. */
static struct ticket remove_at(opd_resumption *resumption, uint32_t index)
{
	const struct ticket removed = resumption->tickets[index];
	resumption->count--;
	memmove(&resumption->tickets[index], &resumption->tickets[index + 1], (resumption->count - index) * sizeof removed);
	return removed;
}

static void ticket_free(struct ticket ticket)
{
	free(ticket.key);
	SSL_SESSION_free(ticket.session);
}

void resumption_unref(opd_resumption *resumption)
{
	if (resumption == NULL || atomic_fetch_sub_explicit(&resumption->refs, 1, memory_order_acq_rel) != 1)
		return;
	while (resumption->count != 0)
		ticket_free(remove_at(resumption, 0));
	(void)pthread_mutex_destroy(&resumption->mutex);
	free(resumption);
}

void opd_resumption_destroy(opd_resumption *resumption)
{
	resumption_unref(resumption);
}

static const char *or_none(const char *text)
{
	return text == NULL ? "" : text;
}

char *resumption_key(const char *address, const opd_connect_options *options)
{
	char *key;
	const int bytes = asprintf(&key, "%s\n%s\n%s\n%s\n%s\n%s", address, or_none(options->server_name), or_none(options->ca_file), or_none(options->fingerprint),
	                           or_none(options->certificate_file), or_none(options->key_file));
	return bytes < 0 ? NULL : key;
}

SSL_SESSION *resumption_take(opd_resumption *resumption, const char *key)
{
	SSL_SESSION *found = NULL;
	if (resumption == NULL || key == NULL)
		return NULL;
	(void)pthread_mutex_lock(&resumption->mutex);
	for (uint32_t i = resumption->count; i-- > 0 && found == NULL;) {
		if (strcmp(resumption->tickets[i].key, key) != 0)
			continue;
		const struct ticket ticket = remove_at(resumption, i);
		found = ticket.session;
		free(ticket.key);
	}
	(void)pthread_mutex_unlock(&resumption->mutex);
	return found;
}

void resumption_put(opd_resumption *resumption, const char *key, SSL_SESSION *session)
{
	struct ticket ticket = {key == NULL ? NULL : strdup(key), session}, oldest = {NULL, NULL};
	if (resumption == NULL || ticket.key == NULL) {
		ticket_free(ticket);
		return;
	}
	(void)pthread_mutex_lock(&resumption->mutex);
	if (resumption->count == TICKETS)
		oldest = remove_at(resumption, 0);
	resumption->tickets[resumption->count++] = ticket;
	(void)pthread_mutex_unlock(&resumption->mutex);
	ticket_free(oldest);
}
