#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fuzz.h"

_Noreturn void fuzz_fail(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	(void)fputs("fuzz: ", stderr);
	(void)vfprintf(stderr, format, arguments);
	(void)fputc('\n', stderr);
	va_end(arguments);
	abort();
}

const char *fuzz_file(const uint8_t *data, size_t bytes)
{
	static char path[64];
	static int fd = -1;
	if (fd >= 0)
		(void)close(fd);
	fd = memfd_create("fuzz", MFD_CLOEXEC);
	if (fd < 0 || (bytes != 0 && write(fd, data, bytes) != (ssize_t)bytes))
		fuzz_fail("no memory file");
	(void)snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	return path;
}
