#include "providers/cublaslt/library.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* Of the release whose headers this was compiled with; where it is installed beside the toolkit the loader may not look there. */
static const char *const names[] = {"libcublasLt.so.13", "/usr/local/cuda/lib64/libcublasLt.so.13"};

static void *find(struct library *library, const char *name)
{
	void *symbol = dlsym(library->library, name);
	if (symbol == NULL && library->missing[0] == '\0')
		(void)snprintf(library->missing, sizeof library->missing, "not available: %s has no %s", names[0], name);
	return symbol;
}

void library_open(struct library *library)
{
	(void)pthread_mutex_init(&library->mutex, NULL);
	for (size_t i = 0; i < sizeof names / sizeof names[0] && library->library == NULL; i++)
		library->library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
	if (library->library == NULL) {
		(void)snprintf(library->missing, sizeof library->missing, "not available: %s not found", names[0]);
		return;
	}
	void *symbol;
#define X(name)                                   \
	symbol = find(library, "cublasLt" #name);     \
	memcpy(&library->name, &symbol, sizeof symbol);
	LIBRARY_FUNCTIONS(X)
#undef X
}

void library_close(struct library *library)
{
	for (size_t i = 0; i < LIBRARY_DEVICES; i++)
		if (library->handles[i] != NULL)
			(void)library->Destroy(library->handles[i]);
	(void)pthread_mutex_destroy(&library->mutex);
}

opd_status library_status(const struct library *library, const char *what, cublasStatus_t code, opd_error *error)
{
	if (code == CUBLAS_STATUS_SUCCESS)
		return OPD_OK;
	opd_status status = code == CUBLAS_STATUS_ALLOC_FAILED ? OPD_RESOURCE_EXHAUSTED : OPD_INTERNAL;
	return opd_fail(error, status, "%s: cuBLASLt: %s", what, library->GetStatusString(code));
}

opd_status library_handle(struct library *library, uint32_t ordinal, cublasLtHandle_t *handle_out, opd_error *error)
{
	opd_status status = OPD_OK;
	if (ordinal >= LIBRARY_DEVICES)
		return opd_fail(error, OPD_UNIMPLEMENTED, "cublaslt: device %u, only the first %d", (unsigned)ordinal, LIBRARY_DEVICES);
	(void)pthread_mutex_lock(&library->mutex);
	if (library->handles[ordinal] == NULL)
		status = library_status(library, "cublasLtCreate", library->Create(&library->handles[ordinal]), error);
	*handle_out = library->handles[ordinal];
	(void)pthread_mutex_unlock(&library->mutex);
	return status;
}
