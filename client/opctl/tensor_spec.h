/* Tensors as a command line writes them: files, generators, literals, bare shapes.
 *
 * Layer: client/opctl. Threads: one. README.md has the grammar. */
#ifndef OPCTL_TENSOR_SPEC_H
#define OPCTL_TENSOR_SPEC_H

#include <stdbool.h>

#include "client/file_tensor.h"

/* Whether the text can only be meant as a tensor: "@…", "zeros:…", "f32[…]". */
bool tensor_spec_looks_like(const char *text);

/* Reads, makes or describes the tensor; a bare shape has no data (NULL). *seed advances with each randn. `what` names the
 * argument in errors. Fini the tensor. */
OPD_MUST_USE opd_status tensor_spec_read(const char *what, const char *text, uint64_t *seed, struct file_tensor *tensor_out,
                                         opd_error *error);

#endif
