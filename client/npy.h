/* NumPy's .npy files: one array each.
 *
 * Layer: client, internal. Threads: pure but for the file system.
 * Read: versions 1 to 3; bool, integers and floats of the catalogue in either byte order (big-endian is swapped); C or Fortran
 * order (the latter as strides). Refused: other dtypes, structured ones, pickled objects, a header over 64 KiB, a file shorter or
 * longer than its array. bf16 and f8 have no .npy dtype: they are written as unsigned words of their size (<u2, |u1), and read
 * back by saying so (`raw_as`). Not here: .npz archives. */
#ifndef OPD_CLIENT_NPY_H
#define OPD_CLIENT_NPY_H

#include <stdbool.h>

#include "client/file_tensor.h"

/* raw_as: OPD_DTYPE_NONE, or the dtype that elements of its size are taken as (of <u2, <V2, |u1, |V1 and their like). Fini the
 * tensor. */
OPD_MUST_USE opd_status npy_read(const char *path, opd_dtype raw_as, struct file_tensor *tensor_out, opd_error *error);

/* Writes a row-major host tensor, atomically. */
OPD_MUST_USE opd_status npy_write(const char *path, const opd_tensor *tensor, opd_error *error);

/* npy_write writes this dtype as raw words. */
bool npy_is_raw(opd_dtype dtype);

#endif
