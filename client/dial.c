/* Addresses, and sockets connected to them. */
#include <errno.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "client/connection.h"

#define HOST_BYTES 256u

static opd_status dial_unavailable(opd_error *error, const char *address, int number)
{
	const char *why = strerrordesc_np(number);
	return opd_fail(error, OPD_UNAVAILABLE, "%.300s: %s", address, why == NULL ? "can't connect" : why);
}

/* On Linux the send timeout bounds connect too. 0: none. */
static void set_timeout(int fd, int option, uint64_t timeout_us)
{
	const struct timeval value = {.tv_sec = (time_t)(timeout_us / 1000000u), .tv_usec = (suseconds_t)(timeout_us % 1000000u)};
	(void)setsockopt(fd, SOL_SOCKET, option, &value, sizeof value);
}

/* A connect that a signal interrupted goes on by itself: wait for its end. 0 or an errno. */
static int finish_connect(int fd, uint64_t deadline_us)
{
	for (;;) {
		const uint64_t now = clock_us();
		if (now >= deadline_us)
			return ETIMEDOUT;
		const uint64_t left_ms = (deadline_us - now) / 1000 + 1;
		struct pollfd entry = {.fd = fd, .events = POLLOUT};
		if (poll(&entry, 1, left_ms > 1000 ? 1000 : (int)left_ms) <= 0)
			continue;
		int number = 0;
		socklen_t bytes = sizeof number;
		return getsockopt(fd, SOL_SOCKET, SO_ERROR, &number, &bytes) == 0 ? number : errno;
	}
}

/* 0 or an errno. */
static int connect_until(int fd, const struct sockaddr *address, socklen_t bytes, uint64_t deadline_us)
{
	const uint64_t now = clock_us();
	if (now >= deadline_us)
		return ETIMEDOUT;
	set_timeout(fd, SO_SNDTIMEO, deadline_us == UINT64_MAX ? 0 : deadline_us - now);
	int number = connect(fd, address, bytes) == 0 ? 0 : errno;
	if (number == EINTR || (number == EINPROGRESS && clock_us() < deadline_us))
		number = address->sa_family == AF_UNIX ? connect_until(fd, address, bytes, deadline_us) : finish_connect(fd, deadline_us);
	set_timeout(fd, SO_SNDTIMEO, 0);
	return number == EINPROGRESS || number == EAGAIN ? ETIMEDOUT : number;
}

static opd_status dial_unix(const char *address, const char *path, uint64_t deadline_us, int *fd_out, opd_error *error)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	const size_t bytes = strlen(path);
	if (bytes == 0 || bytes >= sizeof name.sun_path)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "address %.300s: path of %zu bytes, expected 1 to %zu", address, bytes,
		                sizeof name.sun_path - 1);
	memcpy(name.sun_path, path, bytes + 1);
	const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return dial_unavailable(error, address, errno);
	/* What the system allows (it doubles it): more requests in flight leave by one call. */
	const int wide = 512 << 10;
	(void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &wide, sizeof wide);
	const int number = connect_until(fd, (const struct sockaddr *)&name, sizeof name, deadline_us);
	if (number != 0) {
		(void)close(fd);
		return dial_unavailable(error, address, number);
	}
	*fd_out = fd;
	return OPD_OK;
}

/* "host:port" or "[v6]:port" */
static opd_status split_host(const char *address, const char *rest, char host[HOST_BYTES], const char **port_out,
                             opd_error *error)
{
	const bool bracket = rest[0] == '[';
	const char *begin = bracket ? rest + 1 : rest;
	const char *end = bracket ? strchr(begin, ']') : strrchr(begin, ':');
	const char *colon = end == NULL || !bracket ? end : end + 1;
	if (colon == NULL || *colon != ':' || end == begin || (size_t)(end - begin) >= HOST_BYTES)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "address %.300s: expected %.3s://host:port", address, address);
	if (!bracket && memchr(begin, ':', (size_t)(end - begin)) != NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "address %.300s: an IPv6 host stands in brackets, as tcp://[::1]:7777",
		                address);
	memcpy(host, begin, (size_t)(end - begin));
	host[end - begin] = '\0';
	const char *port = colon + 1;
	const size_t digits = strspn(port, "0123456789");
	const unsigned long number = digits == 0 || digits > 5 || port[digits] != '\0' ? 0 : strtoul(port, NULL, 10);
	if (number == 0 || number > 65535)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "address %.300s: port %.20s, expected 1 to 65535", address, port);
	*port_out = port;
	return OPD_OK;
}

/* *host: what the address says it is. */
static opd_status dial_tcp(const char *address, uint64_t deadline_us, char host[HOST_BYTES], int *fd_out, opd_error *error)
{
	const char *port = NULL;
	opd_status status = split_host(address, address + 6, host, &port, error);
	if (status != OPD_OK)
		return status;
	const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
	struct addrinfo *found;
	const int failed = getaddrinfo(host, port, &hints, &found);
	if (failed != 0)
		return opd_fail(error, OPD_UNAVAILABLE, "%.300s: %s", address, gai_strerror(failed));
	int number = EHOSTUNREACH, fd = -1;
	for (const struct addrinfo *at = found; at != NULL && number != 0; at = at->ai_next) {
		fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
		number = fd < 0 ? errno : connect_until(fd, at->ai_addr, at->ai_addrlen, deadline_us);
		if (number != 0 && fd >= 0)
			(void)close(fd);
	}
	freeaddrinfo(found);
	if (number != 0)
		return dial_unavailable(error, address, number);
	const int on = 1; /* requests are whole frames in one call: waiting for more to send with them only costs time */
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	*fd_out = fd;
	return OPD_OK;
}

static opd_status dial_tls(const char *address, const opd_connect_options *options, uint64_t deadline_us, int *fd_out, struct client_tls **tls_out, opd_error *error)
{
	char host[HOST_BYTES];
	int fd;
	opd_status status = dial_tcp(address, deadline_us, host, &fd, error);
	if (status != OPD_OK)
		return status;
	status = client_tls_connect(fd, address, host, options, deadline_us, tls_out, error);
	if (status != OPD_OK) {
		(void)close(fd);
		return opd_error_prefix(error, status, "%.200s", address);
	}
	*fd_out = fd;
	return OPD_OK;
}

/* "20us", "1ms", "2s" */
static bool parse_poll(const char *text, uint64_t *us_out)
{
	char *unit;
	const unsigned long long value = text[0] < '0' || text[0] > '9' ? ULLONG_MAX : strtoull(text, &unit, 10);
	if (value > 3600000000u)
		return false;
	const uint64_t factor = strcmp(unit, "us") == 0 ? 1 : strcmp(unit, "ms") == 0 ? 1000 : strcmp(unit, "s") == 0 ? 1000000 : 0;
	*us_out = value * factor;
	return factor != 0;
}

static bool take_option(const char *option, opd_connect_options *options)
{
	if (strcmp(option, "rings") == 0)
		options->rings = true;
	else if (strcmp(option, "shm") == 0)
		options->shared_memory = true;
	else
		return strncmp(option, "poll=", 5) == 0 && parse_poll(option + 5, &options->poll_us);
	return true;
}

/* What the caller's options say goes first: an address may come from a file that many read. */
static bool take_text(const char *option, const char *name, const char **field)
{
	const size_t bytes = strlen(name);
	if (strncmp(option, name, bytes) != 0 || option[bytes] != '=' || option[bytes + 1] == '\0')
		return false;
	if (*field == NULL)
		*field = option + bytes + 1;
	return true;
}

static bool take_tls_option(const char *option, opd_connect_options *options)
{
	return take_text(option, "ca", &options->ca_file) || take_text(option, "cert", &options->certificate_file) || take_text(option, "key", &options->key_file) ||
	       take_text(option, "server-name", &options->server_name) || take_text(option, "fingerprint", &options->fingerprint) ||
	       take_text(option, "token-file", &options->token_file);
}

opd_status dial_options(const char *address, opd_connect_options *options, char room[DIAL_ROOM_BYTES], const char **plain_out, opd_error *error)
{
	const bool tls = strncmp(address, "tls://", 6) == 0;
	const char *question = tls ? strchr(address, '?') : strncmp(address, "unix:", 5) == 0 ? strrchr(address, '?') : NULL;
	*plain_out = address;
	if (question == NULL)
		return OPD_OK;
	if (strlen(address) >= DIAL_ROOM_BYTES)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "address %.300s: %zu bytes, at most %u", address, strlen(address), DIAL_ROOM_BYTES - 1);
	(void)snprintf(room, DIAL_ROOM_BYTES, "%s", address);
	char *rest = room + (question - address);
	*rest++ = '\0';
	while (rest != NULL) {
		const char *option = strsep(&rest, "&");
		if (tls && !take_tls_option(option, options))
			return opd_fail(error, OPD_INVALID_ARGUMENT, "address %.300s: option \"%.100s\", expected ca=, cert=, key=, server-name=, fingerprint= or token-file=", address, option);
		if (!tls && !take_option(option, options))
			return opd_fail(error, OPD_INVALID_ARGUMENT, "address %.300s: option \"%s\", expected rings, shm or poll= with a time, such as poll=20us", address, option);
	}
	*plain_out = room;
	return OPD_OK;
}

opd_status dial(const char *address, const opd_connect_options *options, uint64_t timeout_us, int *fd_out, struct client_tls **tls_out, opd_error *error)
{
	char host[HOST_BYTES];
	const uint64_t deadline_us = deadline_after(timeout_us);
	if (strncmp(address, "unix:", 5) == 0)
		return dial_unix(address, address + 5, deadline_us, fd_out, error);
	if (strncmp(address, "tcp://", 6) == 0)
		return dial_tcp(address, deadline_us, host, fd_out, error);
	if (strncmp(address, "tls://", 6) == 0)
		return dial_tls(address, options, deadline_us, fd_out, tls_out, error);
	if (strncmp(address, "embedded:", 9) == 0)
		return opd_fail(
		    error, OPD_UNIMPLEMENTED,
		    "address %.300s: the daemon in this process needs libopd-embedded: link it and call opd_embedded_register() first",
		    address);
	return opd_fail(error, OPD_INVALID_ARGUMENT, "address %.300s: expected unix:/path, tls://host:port, tcp://host:port or embedded:", address);
}
