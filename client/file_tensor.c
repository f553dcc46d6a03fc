#include "client/file_tensor.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/tensor.h"

void file_tensor_fini(struct file_tensor *tensor)
{
	if (tensor == NULL)
		return;
	free(tensor->data);
	tensor->data = NULL;
}

void *file_tensor_alloc(uint64_t bytes)
{
	uint64_t aligned;
	if (!size_align(bytes == 0 ? 1 : bytes, &aligned) || aligned > SIZE_MAX)
		return NULL;
	return aligned_alloc(OPD_TENSOR_ALIGNMENT, (size_t)aligned);
}

static opd_status fail_errno(opd_error *error, const char *what, const char *path, int number)
{
	const opd_status status = number == ENOENT || number == ENOTDIR  ? OPD_NOT_FOUND
	                          : number == EACCES || number == EPERM  ? OPD_PERMISSION_DENIED
	                          : number == ENOSPC || number == EDQUOT ? OPD_RESOURCE_EXHAUSTED
	                                                                 : OPD_INVALID_ARGUMENT;
	return opd_fail(error, status, "%s: cannot %s: %s", path, what, strerror(number));
}

opd_status file_open(const char *path, int *fd_out, uint64_t *bytes_out, opd_error *error)
{
	/* O_NONBLOCK: opening a FIFO without a writer must not hang; it has no effect on regular files. */
	const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return fail_errno(error, "open", path, errno);
	struct stat status;
	if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
		(void)close(fd);
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: is not a regular file", path);
	}
	*fd_out = fd;
	*bytes_out = (uint64_t)status.st_size;
	return OPD_OK;
}

opd_status file_read_at(int fd, const char *path, uint64_t offset, void *buffer, uint64_t bytes, opd_error *error)
{
	uint64_t done = 0;
	while (done < bytes) {
		const ssize_t got = pread(fd, (char *)buffer + done, (size_t)(bytes - done), (off_t)(offset + done));
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return fail_errno(error, "read", path, errno);
		if (got == 0)
			return opd_fail(error, OPD_DATA_LOSS, "%s: ends at byte %llu, expected %llu bytes from %llu on", path,
			                (unsigned long long)(offset + done), (unsigned long long)bytes, (unsigned long long)offset);
		done += (uint64_t)got;
	}
	return OPD_OK;
}

static int write_all(int fd, const char *data, size_t bytes)
{
	while (bytes > 0) {
		const ssize_t put = write(fd, data, bytes);
		if (put < 0 && errno == EINTR)
			continue;
		if (put < 0)
			return errno;
		data += put;
		bytes -= (size_t)put;
	}
	return 0;
}

static int write_pieces(int fd, const struct iovec *pieces, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		const int number = write_all(fd, pieces[i].iov_base, pieces[i].iov_len);
		if (number != 0)
			return number;
	}
	const mode_t mask = umask(0);
	(void)umask(mask);
	return fchmod(fd, 0666 & ~mask) == 0 ? 0 : errno;
}

opd_status file_write_atomic(const char *path, const struct iovec *pieces, size_t count, opd_error *error)
{
	struct stat status;
	if (stat(path, &status) == 0 && !S_ISREG(status.st_mode))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: is there and is not a regular file", path);
	char *temporary = NULL;
	if (asprintf(&temporary, "%s.XXXXXX", path) < 0)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: out of memory", path);
	int number = 0;
	const int fd = mkostemp(temporary, O_CLOEXEC);
	if (fd < 0) {
		number = errno;
		free(temporary);
		return fail_errno(error, "create", path, number);
	}
	number = write_pieces(fd, pieces, count);
	if (close(fd) != 0 && number == 0)
		number = errno;
	if (number == 0 && rename(temporary, path) != 0)
		number = errno;
	if (number != 0)
		(void)unlink(temporary);
	free(temporary);
	return number == 0 ? OPD_OK : fail_errno(error, "write", path, number);
}
