/* How far a result may be from the definition's (SEMANTICS 35): the op's own tolerance for a dtype, else the dtype's.
 *
 * Layer: providers. Threads: a pure function.
 * For whoever compares results: the daemon (server/compare.h) and the conformance tool. What sums may differ by beside it is theirs. */
#ifndef OPD_PROVIDERS_OPS_TOLERANCE_H
#define OPD_PROVIDERS_OPS_TOLERANCE_H

#include "providers/provider.h"

/* Zero where results are exact: integers, bool. */
opd_tolerance tolerance_of(const opd_op *op, opd_dtype dtype);

#endif
