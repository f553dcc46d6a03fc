#include "tests/bench/daemon.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/bench/report.h"
#include "tests/lib/clock.h"

#define START_LIMIT_NS 20000000000ull
#define ARGUMENTS_MAX 64

/* A port that was free a moment ago. */
static uint16_t free_port(void)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t bytes = sizeof address;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
	    getsockname(fd, (struct sockaddr *)&address, &bytes) != 0)
		bench_fail("no free loopback port: %s", strerror(errno));
	(void)close(fd);
	return ntohs(address.sin_port);
}

static _Noreturn void daemon_exec(const struct daemon *daemon, const char *binary, const char *preload, const char *const *more)
{
	const char *arguments[ARGUMENTS_MAX + 1] = {binary, "--listen", daemon->unix_address, "--listen", daemon->tcp_address, "--log-level", "error"};
	size_t count = 7;
	for (; more != NULL && *more != NULL && count < ARGUMENTS_MAX; more++)
		arguments[count++] = *more;
	(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (preload != NULL)
		(void)setenv("LD_PRELOAD", preload, 1);
	(void)execv(binary, (char *const *)arguments);
	(void)fprintf(stderr, "bench: %s: %s\n", binary, strerror(errno));
	_exit(127);
}

static bool daemon_answers(const struct daemon *daemon)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	(void)snprintf(address.sun_path, sizeof address.sun_path, "%s", daemon->unix_address + strlen("unix:"));
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		bench_fail("socket: %s", strerror(errno));
	bool answers = connect(fd, (struct sockaddr *)&address, sizeof address) == 0;
	(void)close(fd);
	return answers;
}

static void daemon_await(const struct daemon *daemon, const char *binary)
{
	uint64_t begin = clock_ns();
	while (!daemon_answers(daemon)) {
		int status;
		if (waitpid(daemon->pid, &status, WNOHANG) == daemon->pid)
			bench_fail("%s ended at its start (wait status %#x)", binary, (unsigned)status);
		if (clock_ns() - begin > START_LIMIT_NS)
			bench_fail("%s doesn't listen on %s after %u s", binary, daemon->unix_address,
			           (unsigned)(START_LIMIT_NS / 1000000000u));
		(void)usleep(2000);
	}
}

void daemon_start(struct daemon *daemon, const char *binary, const char *directory, const char *preload)
{
	daemon_start_with(daemon, binary, directory, preload, NULL);
}

void daemon_start_with(struct daemon *daemon, const char *binary, const char *directory, const char *preload, const char *const *more)
{
	static unsigned count;
	(void)snprintf(daemon->unix_address, sizeof daemon->unix_address, "unix:%.90s/opd-%u.sock", directory, count++);
	(void)snprintf(daemon->tcp_address, sizeof daemon->tcp_address, "tcp://127.0.0.1:%u", free_port());
	(void)fflush(stdout);
	daemon->pid = fork();
	if (daemon->pid < 0)
		bench_fail("fork: %s", strerror(errno));
	if (daemon->pid == 0)
		daemon_exec(daemon, binary, preload, more);
	daemon_await(daemon, binary);
}

void daemon_stop(struct daemon *daemon)
{
	int status = 0;
	(void)kill(daemon->pid, SIGTERM);
	uint64_t begin = clock_ns();
	while (waitpid(daemon->pid, &status, WNOHANG) == 0) {
		if (clock_ns() - begin > START_LIMIT_NS)
			bench_fail("the daemon doesn't end %u s after SIGTERM", (unsigned)(START_LIMIT_NS / 1000000000u));
		(void)usleep(2000);
	}
	if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
		bench_fail("the daemon ended with wait status %#x", (unsigned)status);
}

/* A line "Name:   123 kB" of /proc/<pid>/<file>; 0: there is none. */
static uint64_t proc_bytes(const struct daemon *daemon, const char *name, const char *line_name)
{
	char path[64], line[256];
	unsigned long long kib = 0;
	(void)snprintf(path, sizeof path, "/proc/%d/%s", (int)daemon->pid, name);
	FILE *file = fopen(path, "re");
	if (file == NULL)
		return 0;
	while (fgets(line, sizeof line, file) != NULL)
		if (strncmp(line, line_name, strlen(line_name)) == 0 && sscanf(line + strlen(line_name), ": %llu", &kib) == 1)
			break;
	(void)fclose(file);
	return (uint64_t)kib * 1024;
}

uint64_t daemon_resident_bytes(const struct daemon *daemon)
{
	/* smaps_rollup walks the pages; status may be some dozens of pages behind. */
	uint64_t bytes = proc_bytes(daemon, "smaps_rollup", "Rss");
	return bytes != 0 ? bytes : proc_bytes(daemon, "status", "VmRSS");
}

uint64_t daemon_peak_bytes(const struct daemon *daemon)
{
	return proc_bytes(daemon, "status", "VmHWM");
}

void daemon_peak_reset(const struct daemon *daemon)
{
	char path[64];
	(void)snprintf(path, sizeof path, "/proc/%d/clear_refs", (int)daemon->pid);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "5", 1) != 1)
		bench_fail("%s: %s", path, strerror(errno));
	(void)close(fd);
}
