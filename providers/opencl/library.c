#include "providers/opencl/library.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#define LIBRARY "libOpenCL.so.1"

/* It is never closed: drivers leave threads and handlers behind that must not be unloaded under them. */
bool library_open(struct library *library, char *missing, size_t bytes)
{
	library->handle = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
	if (library->handle == NULL) {
		(void)snprintf(missing, bytes, "not available: %.130s", dlerror());
		return false;
	}
	void *symbol;
#define X(name)                                                                                  \
	symbol = dlsym(library->handle, "cl" #name);                                                 \
	if (symbol == NULL)                                                                          \
		(void)snprintf(missing, bytes, "not available: %s has no cl%s", LIBRARY, #name);         \
	memcpy(&library->name, &symbol, sizeof symbol);
	LIBRARY_FUNCTIONS(X)
#undef X
	return missing[0] == '\0';
}

const char *library_error(cl_int code)
{
	static const struct {
		cl_int code;
		const char *name;
	} names[] = {
	    {CL_DEVICE_NOT_AVAILABLE, "CL_DEVICE_NOT_AVAILABLE"},
	    {CL_MEM_OBJECT_ALLOCATION_FAILURE, "CL_MEM_OBJECT_ALLOCATION_FAILURE"},
	    {CL_OUT_OF_RESOURCES, "CL_OUT_OF_RESOURCES"},
	    {CL_OUT_OF_HOST_MEMORY, "CL_OUT_OF_HOST_MEMORY"},
	    {CL_BUILD_PROGRAM_FAILURE, "CL_BUILD_PROGRAM_FAILURE"},
	    {CL_INVALID_VALUE, "CL_INVALID_VALUE"},
	    {CL_INVALID_MEM_OBJECT, "CL_INVALID_MEM_OBJECT"},
	    {CL_INVALID_BUFFER_SIZE, "CL_INVALID_BUFFER_SIZE"},
	    {CL_INVALID_KERNEL_ARGS, "CL_INVALID_KERNEL_ARGS"},
	    {CL_INVALID_ARG_SIZE, "CL_INVALID_ARG_SIZE"},
	    {CL_INVALID_WORK_GROUP_SIZE, "CL_INVALID_WORK_GROUP_SIZE"},
	    {CL_INVALID_KERNEL_NAME, "CL_INVALID_KERNEL_NAME"},
	};
	for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
		if (names[i].code == code)
			return names[i].name;
	return "an OpenCL error";
}
