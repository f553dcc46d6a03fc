/* Tensors on their way between devices and the host: what a request must read where it isn't.
 *
 * Layer: server. Threads: the request's context's.
 * A kept tensor lies where it was made or uploaded to, and wherever it has a mirror. An operand that the chosen implementation can't reach is brought over in host memory: one job of the
 * device's lane at a time, after which the request goes on. What was brought stays as a mirror as long as its tensor.
 * Not here: from host memory to a device, which the device's own job does (server/device_work.h). */
#ifndef OPD_SERVER_BRING_H
#define OPD_SERVER_BRING_H

#include <stdbool.h>
#include <stdint.h>

struct request;
struct buffer;

/* All operands of the run are where run.dispatch.impl, on run.device, reads them. False: one is on its way, and execute_run is called again; or the request has ended. */
bool bring_operands(struct request *request);

/* request->staged becomes host memory that holds the tensor's bytes [offset, offset + bytes): its own if it lies there. Then `ready`, with request->status. */
void bring_to_host(struct request *request, struct buffer *buffer, uint64_t offset, uint64_t bytes, const char *name, void (*ready)(struct request *request));

#endif
