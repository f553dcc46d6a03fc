/* The functions of libcublasLt that are called, found when the module is opened.
 *
 * Layer: providers/cublaslt. Threads: library_open alone; then read only, library_handle from any thread.
 * Life: library_open → library_handle… → library_close. */
#ifndef OPD_CUBLASLT_LIBRARY_H
#define OPD_CUBLASLT_LIBRARY_H

#include <cublasLt.h>
#include <pthread.h>
#include <stddef.h>

#include "providers/provider.h"

enum { LIBRARY_DEVICES = 16 };

/* X(function without its prefix) */
#define LIBRARY_FUNCTIONS(X)  \
	X(Create)                 \
	X(Destroy)                \
	X(Matmul)                 \
	X(MatmulDescCreate)       \
	X(MatmulDescDestroy)      \
	X(MatmulDescSetAttribute) \
	X(MatrixLayoutCreate)     \
	X(MatrixLayoutDestroy)    \
	X(MatrixLayoutSetAttribute) \
	X(MatmulPreferenceCreate) \
	X(MatmulPreferenceDestroy) \
	X(MatmulPreferenceSetAttribute) \
	X(MatmulAlgoGetHeuristic) \
	X(GetStatusString)

struct library {
	void *library;
	char missing[200]; /* why it can't be used; empty: it can */
#define X(name) __typeof__(cublasLt##name) *name;
	LIBRARY_FUNCTIONS(X)
#undef X
	pthread_mutex_t mutex;
	cublasLtHandle_t handles[LIBRARY_DEVICES];
};

void library_open(struct library *library);
/* After library_open; NULLs are fine. */
void library_close(struct library *library);

/* The handle of the calling thread's device `ordinal`, made at first use. */
OPD_MUST_USE opd_status library_handle(struct library *library, uint32_t ordinal, cublasLtHandle_t *handle_out, opd_error *error);

/* A cublasStatus_t as a status. */
OPD_MUST_USE opd_status library_status(const struct library *library, const char *what, cublasStatus_t code, opd_error *error);

#endif
