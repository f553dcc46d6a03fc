#include "providers/cudnn/library.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

static void *find(struct library *library, const char *name)
{
	void *symbol = dlsym(library->library, name);
	if (symbol == NULL && library->missing[0] == '\0')
		(void)snprintf(library->missing, sizeof library->missing, "not available: libcudnn.so.9 has no %s", name);
	return symbol;
}

void library_open(struct library *library)
{
	(void)pthread_mutex_init(&library->mutex, NULL);
	library->library = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
	if (library->library == NULL) {
		(void)snprintf(library->missing, sizeof library->missing, "not available: libcudnn.so.9 not found");
		return;
	}
	void *symbol;
#define X(name)                              \
	symbol = find(library, "cudnn" #name);   \
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

opd_status library_status(const struct library *library, const char *what, cudnnStatus_t code, opd_error *error)
{
	if (code == CUDNN_STATUS_SUCCESS)
		return OPD_OK;
	return opd_fail(error, OPD_INTERNAL, "%s: cuDNN: %s", what, library->GetErrorString(code));
}

opd_status library_handle(struct library *library, uint32_t ordinal, cudnnHandle_t *handle_out, opd_error *error)
{
	opd_status status = OPD_OK;
	if (ordinal >= LIBRARY_DEVICES)
		return opd_fail(error, OPD_UNIMPLEMENTED, "cudnn: device %u, only the first %d", (unsigned)ordinal, LIBRARY_DEVICES);
	if (library->handles[ordinal] == NULL)
		status = library_status(library, "cudnnCreate", library->Create(&library->handles[ordinal]), error);
	*handle_out = library->handles[ordinal];
	return status;
}
