/* A call and its results as a case file that `opctl verify` runs (client/opctl/README.md has the form).
 *
 * Layer: server. Threads: any; it writes to a disk. */
#ifndef OPD_SERVER_CASE_WRITE_H
#define OPD_SERVER_CASE_WRITE_H

#include "server/registry.h"

/* Makes the file at `path`, which must not be there, for its user alone. UNIMPLEMENTED: the form has no place for an argument (a list of tensors). */
OPD_MUST_USE opd_status case_write(const char *path, const struct op *op, const opd_call *call, const opd_tensor *const *results, opd_error *error);

#endif
