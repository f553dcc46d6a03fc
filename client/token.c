#include "client/token.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static opd_status read_open(int fd, const char *path, char out[TOKEN_ROOM_BYTES], opd_error *error)
{
	struct stat info;
	if (fstat(fd, &info) != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "token file %.200s: %s", path, strerrordesc_np(errno));
	if (!S_ISREG(info.st_mode) || (info.st_mode & 077) != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "token file %.200s: has mode %04o, expected a regular file that only its owner reads and writes (0600)", path,
		                (unsigned)(info.st_mode & 07777));
	const ssize_t got = read(fd, out, TOKEN_ROOM_BYTES - 1);
	if (got < 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "token file %.200s: %s", path, strerrordesc_np(errno));
	out[got] = '\0';
	out[strcspn(out, "\r\n")] = '\0';
	if (out[0] == '\0' || strlen(out) > 256)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "token file %.200s: a first line of %zu bytes, expected a token of 1 to 256", path, strlen(out));
	return OPD_OK;
}

opd_status token_read(const char *path, char out[TOKEN_ROOM_BYTES], opd_error *error)
{
	const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	if (fd < 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "token file %.200s: %s", path, strerrordesc_np(errno));
	opd_status status = read_open(fd, path, out, error);
	(void)close(fd);
	return status;
}

static bool is_here(const struct sockaddr_storage *peer)
{
	if (peer->ss_family == AF_INET)
		return ntohl(((const struct sockaddr_in *)peer)->sin_addr.s_addr) >> 24 == 127;
	if (peer->ss_family != AF_INET6)
		return true; /* a Unix socket */
	const struct in6_addr *six = &((const struct sockaddr_in6 *)peer)->sin6_addr;
	return IN6_IS_ADDR_LOOPBACK(six) || (IN6_IS_ADDR_V4MAPPED(six) && six->s6_addr[12] == 127);
}

opd_status token_check_way(int fd, opd_error *error)
{
	struct sockaddr_storage peer = {0};
	socklen_t bytes = sizeof peer;
	if (getpeername(fd, (struct sockaddr *)&peer, &bytes) == 0 && is_here(&peer))
		return OPD_OK;
	return opd_fail(error, OPD_FAILED_PRECONDITION, "a token would be read by anyone on the way: use a tls:// address");
}
