/* Runs an implementation on a device through its module's backend: operands in, kernel, results out.
 *
 * Layer: tests. Threads: one at a time a device. Life: device_open → device_run… → device_close.
 * Every operand has device memory of its own, as large as what it touches, so that a checker of device memory (compute-sanitizer) sees an access beside it; results lie between
 * guard bytes, and inputs are brought back and compared. Contents that kernels index with are theirs to check where OPD_IMPL_CHECKS_INDICES says so.
 * Not here: queues, pools, several calls in flight (the daemon's device lane). */
#ifndef OPD_TESTS_CONFORMANCE_DEVICE_H
#define OPD_TESTS_CONFORMANCE_DEVICE_H

#include "providers/provider.h"

struct device {
	const opd_backend *backend;
	void *state; /* the backend's module's */
	void *stream;
	void *event;
};

/* The backend's first device. */
OPD_MUST_USE opd_status device_open(struct device *device, const opd_backend *backend, void *state, opd_error *error);
void device_close(struct device *device);

/* Runs a call whose operands and results lie in host memory; a result in its operand's memory is in place there too. OPD_INVALID_ARGUMENT: the kernels found a bad index,
 * and no result was touched; OPD_INTERNAL also when something was written that mustn't be. */
OPD_MUST_USE opd_status device_run(const struct device *device, const opd_host *host, const opd_impl *impl, void *state, const opd_call *call,
                                   opd_error *error);

#endif
