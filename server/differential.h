/* Differential checking: a sample of requests is run by a second provider as well, off the reply's path, and the results are compared.
 *
 * Layer: server, above containment. Threads: differential_sample on the request's loop's; the check on a thread of the session's CPU lane; the others as containment.h says.
 * Life: differential_create → differential_configure → differential_sample… → differential_destroy (no check is under way: the lanes are stopped).
 * Which ones: every `compare_every`-th successful run of an implementation for the CPU whose provider has `compare`. Operands and results are kept by reference until the check is done: payloads and
 * inline operands don't change, a kept tensor that somebody holds is copied when it is donated. Left out, and counted as such: runs that donate (their operands are written in place), operands and
 * results in shared memory (the client may rewrite them at any time), calls without frames, graphs, what doesn't fit `differential.memory`, and more than CHECKS_MAX at once.
 * Equal is what the op's tolerances say (SEMANTICS 35): |got − reference| ≤ atol + rtol·|reference|, for sums of products and attention plus 2·√K·u·Σ, where Σ is native's result over magnitudes in f64. Values whose Σ
 * no op gives (scaled_mm) aren't compared. A difference is logged with op, shapes and place, counts towards the provider's quarantine, and, where a folder is configured, is left there as a case file for opctl verify. */
#ifndef OPD_SERVER_DIFFERENTIAL_H
#define OPD_SERVER_DIFFERENTIAL_H

#include <stdint.h>

#include "opd/status.h"

struct config;
struct differential;
struct request;
struct server;

struct differential_counts {
	uint64_t compared;
	uint64_t diverged;
	uint64_t left_out;
};

OPD_MUST_USE opd_status differential_create(struct server *server, struct differential **differential_out, opd_error *error);
void differential_destroy(struct differential *differential);
void differential_configure(struct differential *differential, const struct config *config);

/* The request's kernel has succeeded, and its results are where they will be sent or kept from. */
void differential_sample(struct differential *differential, struct request *request);

void differential_count(const struct differential *differential, struct differential_counts *counts_out);

#endif
