/* What a request has in shared memory: operands read from ranges of regions, results written there.
 *
 * Layer: server. Threads: the request's context's. Regions are referenced from accept to release, so that a detach in between changes nothing.
 * Integers (ids, positions, slots, block tables) are copied before anything looks at them, and integer results are written privately and copied out at the end:
 * a client that rewrites them between a check and its use gets wrong numbers, never an access out of bounds. Operands have no identity.
 * Not here: the regions themselves (server/region.h). */
#ifndef OPD_SERVER_SHARED_H
#define OPD_SERVER_SHARED_H

#include "server/request.h"

/* At accept, after the arguments are bound: references regions. */
OPD_MUST_USE opd_status shared_take(struct request *request);
OPD_MUST_USE opd_status shared_place(struct request *request, uint32_t operand);
/* The results' shapes are known: ranges are large enough, and overlap neither each other nor operands. */
OPD_MUST_USE opd_status shared_check_results(struct request *request);
/* For requests that are no runs: their one range, checked, its region referenced until the request's release. `what` and `name` begin errors. Then where its bytes lie. */
OPD_MUST_USE opd_status shared_take_range(struct request *request, const char *what, const char *name, const struct msg_shared_range *range);
unsigned char *shared_range(const struct request *request, uint64_t offset);
/* Where a kernel is to write a result; NULL: to a buffer of the daemon's. */
unsigned char *shared_result(const struct request *request, uint32_t output);
/* Says where the result lies, and puts it there unless the kernel did. False: it isn't in shared memory. */
bool shared_fill(struct request *request, uint32_t output, struct msg_tensor *tensor);
void shared_release(struct request *request);

void region_attach_start(struct request *request);
void region_detach_start(struct request *request);

#endif
