/* What modules on CUDA's runtime share: its error codes as statuses, and the device that a run is for.
 *
 * Layer: providers, for modules of this tree (compiled into each, with a runtime of its own; all use the device's primary context). Threads: any. The header is public to C and C++.
 * Not here: the device backend (providers/cuda), which owns memory, streams and events. */
#ifndef OPD_PROVIDERS_CUDART_H
#define OPD_PROVIDERS_CUDART_H

#include "providers/provider.h"

/* A cudaError_t as a status, named by `what`: OPD_RESOURCE_EXHAUSTED for memory, OPD_DATA_LOSS when every later call to the device fails too, else OPD_INTERNAL. The runtime's
 * last error is taken, so that no other call answers for it. */
OPD_MUST_USE opd_status cudart_status(const char *what, int code, opd_error *error);

/* Makes the exec's device the calling thread's: the first thing that a run does. */
OPD_MUST_USE opd_status cudart_begin(const opd_impl *impl, const opd_exec *exec, opd_error *error);

#endif
