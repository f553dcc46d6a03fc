/* A tensor read from a file, and what the readers and writers of files share.
 *
 * Layer: client, internal (opctl, examples, tests). Threads: values; every object belongs to one thread at a time.
 * Files are read, not mapped: a file cut short while a map of it is in use would end the process with SIGBUS. What a file says
 * about itself is checked against its size before anything is allocated, so a tensor never takes more memory than the file has
 * bytes. Not here: the formats (npy.h, safetensors.h). */
#ifndef OPD_CLIENT_FILE_TENSOR_H
#define OPD_CLIENT_FILE_TENSOR_H

#include <stdint.h>
#include <sys/uio.h>

#include "opd/status.h"
#include "opd/tensor.h"

struct file_tensor {
	opd_dtype dtype;
	uint32_t rank;
	int64_t shape[OPD_RANK_MAX];
	int64_t strides[OPD_RANK_MAX]; /* in elements; not row-major for an .npy in Fortran order */
	uint64_t bytes;
	void *data; /* owned, 64-byte aligned, never NULL once read */
};

void file_tensor_fini(struct file_tensor *tensor);

/* 64-byte aligned, for at least one byte; NULL: out of memory. Freed with free(). */
void *file_tensor_alloc(uint64_t bytes);

/* Opens a regular file for reading; the caller closes fd. NOT_FOUND, PERMISSION_DENIED, or INVALID_ARGUMENT for what isn't a
 * regular file. */
OPD_MUST_USE opd_status file_open(const char *path, int *fd_out, uint64_t *bytes_out, opd_error *error);

/* Reads exactly `bytes` at `offset`; DATA_LOSS when the file has become shorter. */
OPD_MUST_USE opd_status file_read_at(int fd, const char *path, uint64_t offset, void *buffer, uint64_t bytes, opd_error *error);

/* Replaces `path` by the pieces, all or nothing: a temporary file beside it, renamed at the end. The mode is that of any new file
 * (umask), an existing file's is lost. INVALID_ARGUMENT when `path` is there and isn't a regular file (a device, a directory). */
OPD_MUST_USE opd_status file_write_atomic(const char *path, const struct iovec *pieces, size_t count, opd_error *error);

#endif
