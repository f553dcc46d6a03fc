/* How a kernel can fail its provider: what server/containment.h counts, and who finds it.
 *
 * Layer: server, bottom. Threads: values. */
#ifndef OPD_SERVER_FAILURE_H
#define OPD_SERVER_FAILURE_H

typedef enum failure_kind {
	FAILURE_KERNEL = 0, /* its status says so */
	FAILURE_OVERRUN,    /* canaries, or a result's shape changed */
	FAILURE_HANG,       /* its budget is over */
	FAILURE_CRASH,      /* the worker process died */
	FAILURE_DIVERGENCE, /* another provider's result differs */
	FAILURE_KINDS,
} failure_kind;

#endif
