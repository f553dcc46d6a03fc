/* The functions of libcudnn that are called, found when the module is opened, and one handle a device.
 *
 * Layer: providers/cudnn. Threads: library_open and library_close alone; handles behind the library's mutex, which whoever uses one holds: a handle serves one thread at a time.
 * Life: library_open → library_handle… → library_close. */
#ifndef OPD_CUDNN_LIBRARY_H
#define OPD_CUDNN_LIBRARY_H

#include <cudnn_graph.h>
#include <pthread.h>

#include "providers/provider.h"

enum { LIBRARY_DEVICES = 16 };

/* X(function without its prefix) */
#define LIBRARY_FUNCTIONS(X)    \
	X(Create)                   \
	X(Destroy)                  \
	X(SetStream)                \
	X(GetErrorString)           \
	X(BackendCreateDescriptor)  \
	X(BackendDestroyDescriptor) \
	X(BackendSetAttribute)      \
	X(BackendGetAttribute)      \
	X(BackendFinalize)          \
	X(BackendExecute)

struct library {
	void *library;
	char missing[200]; /* why it can't be used; empty: it can */
#define X(name) __typeof__(cudnn##name) *name;
	LIBRARY_FUNCTIONS(X)
#undef X
	pthread_mutex_t mutex;
	cudnnHandle_t handles[LIBRARY_DEVICES];
};

void library_open(struct library *library);
void library_close(struct library *library);

/* The handle of the calling thread's device `ordinal`, made at first use (some hundred milliseconds). The caller holds the mutex. */
OPD_MUST_USE opd_status library_handle(struct library *library, uint32_t ordinal, cudnnHandle_t *handle_out, opd_error *error);

/* A cudnnStatus_t as a status. */
OPD_MUST_USE opd_status library_status(const struct library *library, const char *what, cudnnStatus_t code, opd_error *error);

#endif
