/* OpenCL's functions, found when the module is opened: it loads where there is no OpenCL.
 *
 * Layer: provider opencl. Threads: any, once library_open has returned. Life: library_open → library_close. */
#ifndef OPD_OPENCL_LIBRARY_H
#define OPD_OPENCL_LIBRARY_H

#define CL_TARGET_OPENCL_VERSION 120
#include <CL/cl.h>
#include <stdbool.h>
#include <stddef.h>

#define LIBRARY_FUNCTIONS(X)                                                                                                             \
	X(GetPlatformIDs) X(GetDeviceIDs) X(GetDeviceInfo) X(CreateContext) X(ReleaseContext) X(CreateCommandQueue) X(ReleaseCommandQueue)   \
	X(CreateBuffer) X(ReleaseMemObject) X(EnqueueWriteBuffer) X(EnqueueReadBuffer) X(EnqueueCopyBuffer) X(EnqueueFillBuffer)             \
	X(EnqueueMarkerWithWaitList) X(EnqueueNDRangeKernel) X(GetEventInfo) X(ReleaseEvent) X(Flush) X(Finish) X(CreateProgramWithSource)   \
	X(BuildProgram) X(GetProgramBuildInfo) X(ReleaseProgram) X(CreateKernel) X(SetKernelArg) X(ReleaseKernel)

struct library {
	void *handle;
#define X(name) __typeof__(cl##name) *name;
	LIBRARY_FUNCTIONS(X)
#undef X
};

/* False: `missing` says what isn't there. */
bool library_open(struct library *library, char *missing, size_t bytes);
/* "CL_OUT_OF_RESOURCES" */
const char *library_error(cl_int code);

#endif
