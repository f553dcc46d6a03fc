#include "client/scheme.h"

#include <pthread.h>
#include <string.h>

#include "client/connection.h"

#define SCHEMES_MAX 8u

static pthread_mutex_t schemes_mutex = PTHREAD_MUTEX_INITIALIZER;
static const struct scheme *schemes[SCHEMES_MAX];

void opd_scheme_register(const struct scheme *scheme)
{
	(void)pthread_mutex_lock(&schemes_mutex);
	for (size_t i = 0; i < SCHEMES_MAX; i++) {
		if (schemes[i] == NULL)
			schemes[i] = scheme;
		if (strcmp(schemes[i]->name, scheme->name) == 0)
			break;
	}
	(void)pthread_mutex_unlock(&schemes_mutex);
}

const struct scheme *scheme_find(const char *address, const char **rest_out)
{
	const char *colon = strchr(address, ':');
	const struct scheme *found = NULL;
	if (colon == NULL)
		return NULL;
	const size_t bytes = (size_t)(colon - address);
	(void)pthread_mutex_lock(&schemes_mutex);
	for (size_t i = 0; i < SCHEMES_MAX && schemes[i] != NULL && found == NULL; i++)
		if (strlen(schemes[i]->name) == bytes && memcmp(schemes[i]->name, address, bytes) == 0)
			found = schemes[i];
	(void)pthread_mutex_unlock(&schemes_mutex);
	*rest_out = colon + 1;
	return found;
}
