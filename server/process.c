#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "server/process.h"

void process_open_standard_files(void)
{
	int fd;
	do
		fd = open("/dev/null", O_RDWR);
	while (fd >= 0 && fd <= STDERR_FILENO);
	if (fd >= 0)
		(void)close(fd);
}

static void set_soft_limit(int resource, bool all)
{
	struct rlimit limit;
	if (getrlimit(resource, &limit) != 0)
		return;
	limit.rlim_cur = all ? limit.rlim_max : 0;
	(void)setrlimit(resource, &limit);
}

void process_raise_file_limit(void)
{
	set_soft_limit(RLIMIT_NOFILE, true);
}

void process_limit_core(bool allowed)
{
	set_soft_limit(RLIMIT_CORE, allowed);
}
