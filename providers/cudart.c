#include "providers/cudart.h"

#include <cuda_runtime_api.h>

/* After these every call to the device fails. */
static bool is_sticky(cudaError_t code)
{
	switch (code) {
	case cudaErrorIllegalAddress:
	case cudaErrorLaunchFailure:
	case cudaErrorLaunchTimeout:
	case cudaErrorIllegalInstruction:
	case cudaErrorMisalignedAddress:
	case cudaErrorInvalidAddressSpace:
	case cudaErrorInvalidPc:
	case cudaErrorHardwareStackError:
	case cudaErrorAssert:
	case cudaErrorECCUncorrectable:
	case cudaErrorNvlinkUncorrectable:
	case cudaErrorContained:
	case cudaErrorUnknown:
	case cudaErrorDevicesUnavailable:
		return true;
	default:
		return false;
	}
}

opd_status cudart_status(const char *what, int code, opd_error *error)
{
	cudaError_t failed = (cudaError_t)code;
	if (failed == cudaSuccess)
		return OPD_OK;
	(void)cudaGetLastError(); /* the next call doesn't inherit it */
	opd_status status = failed == cudaErrorMemoryAllocation ? OPD_RESOURCE_EXHAUSTED : is_sticky(failed) ? OPD_DATA_LOSS : OPD_INTERNAL;
	return opd_fail(error, status, "%s: CUDA: %s (%s)", what, cudaGetErrorString(failed), cudaGetErrorName(failed));
}

opd_status cudart_begin(const opd_impl *impl, const opd_exec *exec, opd_error *error)
{
	return cudart_status(impl->op, (int)cudaSetDevice((int)exec->ordinal), error);
}
