#include "server/service.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define FIRST_FD 3 /* of those passed: SD_LISTEN_FDS_START */

/* A number in the environment; 0: none, or no number. */
static uint64_t number(const char *name)
{
	const char *text = getenv(name);
	return text != NULL && text[0] >= '0' && text[0] <= '9' ? strtoull(text, NULL, 10) : 0;
}

/* Meant for another process where it names one that isn't this. */
static bool is_ours(const char *name)
{
	return getenv(name) == NULL || number(name) == (uint64_t)getpid();
}

/* ---- Messages ---- */

/* "/path", or "@name" in the abstract namespace. */
static void open_notify(struct service *service)
{
	const char *path = getenv("NOTIFY_SOCKET");
	service->fd = -1;
	if (path == NULL || (path[0] != '/' && path[0] != '@') || strlen(path) >= sizeof service->notify.sun_path)
		return;
	const size_t bytes = strlen(path);
	service->notify.sun_family = AF_UNIX;
	memcpy(service->notify.sun_path, path, bytes);
	if (path[0] == '@')
		service->notify.sun_path[0] = '\0';
	service->notify_bytes = (uint32_t)(offsetof(struct sockaddr_un, sun_path) + bytes);
	service->fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (number("WATCHDOG_USEC") > 0 && is_ours("WATCHDOG_PID"))
		service->watchdog_us = number("WATCHDOG_USEC");
}

void service_notify(const struct service *service, const char *message)
{
	if (service->fd >= 0)
		(void)sendto(service->fd, message, strlen(message), MSG_NOSIGNAL, (const struct sockaddr *)&service->notify, service->notify_bytes);
}

/* ---- Sockets ---- */

static void name_socket(struct service_socket *passed, const struct sockaddr_storage *own, socklen_t bytes)
{
	char host[INET6_ADDRSTRLEN] = "?";
	if (own->ss_family == AF_UNIX) {
		const struct sockaddr_un *path = (const struct sockaddr_un *)own;
		(void)snprintf(passed->address, sizeof passed->address, "unix:%.*s", (int)(bytes - offsetof(struct sockaddr_un, sun_path)), path->sun_path);
	} else if (own->ss_family == AF_INET6) {
		const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)own;
		(void)inet_ntop(AF_INET6, &six->sin6_addr, host, sizeof host);
		(void)snprintf(passed->address, sizeof passed->address, "tcp://[%s]:%u", host, (unsigned)ntohs(six->sin6_port));
	} else {
		const struct sockaddr_in *four = (const struct sockaddr_in *)own;
		(void)inet_ntop(AF_INET, &four->sin_addr, host, sizeof host);
		(void)snprintf(passed->address, sizeof passed->address, "tcp://%s:%u", host, (unsigned)ntohs(four->sin_port));
	}
}

/* A stream that listens, at an address that has a name. */
static opd_status take_socket(struct service_socket *passed, int fd, opd_error *error)
{
	struct sockaddr_storage own = {0};
	socklen_t bytes = sizeof own;
	int type = 0, listens = 0;
	socklen_t type_bytes = sizeof type, listens_bytes = sizeof listens;
	if (getsockname(fd, (struct sockaddr *)&own, &bytes) != 0 || getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &type_bytes) != 0 ||
	    getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &listens_bytes) != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "descriptor %d, passed by the service manager: %s", fd, strerror(errno));
	const bool known = own.ss_family == AF_UNIX || own.ss_family == AF_INET || own.ss_family == AF_INET6;
	if (!known || type != SOCK_STREAM || listens == 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "descriptor %d, passed by the service manager, is no stream socket that listens (ListenStream=)", fd);
	if (own.ss_family == AF_UNIX && (bytes <= offsetof(struct sockaddr_un, sun_path) || ((struct sockaddr_un *)&own)->sun_path[0] != '/'))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "descriptor %d, passed by the service manager, is a Unix socket without an absolute path", fd);
	passed->fd = fd;
	name_socket(passed, &own, bytes);
	(void)fcntl(fd, F_SETFD, FD_CLOEXEC);
	return OPD_OK;
}

static opd_status take_sockets(struct service *service, opd_error *error)
{
	const uint64_t count = getenv("LISTEN_PID") != NULL && is_ours("LISTEN_PID") ? number("LISTEN_FDS") : 0;
	if (count > SERVICE_SOCKETS_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "the service manager passed %llu sockets, expected at most %u", (unsigned long long)count,
		                SERVICE_SOCKETS_MAX);
	opd_status status = OPD_OK;
	for (; status == OPD_OK && service->socket_count < count; service->socket_count += status == OPD_OK)
		status = take_socket(&service->sockets[service->socket_count], FIRST_FD + (int)service->socket_count, error);
	return status;
}

opd_status service_init(struct service *service, opd_error *error)
{
	static const char *const names[] = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"};
	*service = (struct service){0};
	opd_status status = take_sockets(service, error); /* first: no descriptor of ours can be taken for one of those that were promised */
	open_notify(service);
	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		(void)unsetenv(names[i]);
	return status;
}

/* How a stream over TCP is spoken (tcp://, tls://) is the configuration's business: behind that the addresses must be the same, letter by letter. */
static bool same_address(const char *a, const char *b)
{
	const char *of_a = strstr(a, "://"), *of_b = strstr(b, "://");
	return of_a == NULL || of_b == NULL ? strcmp(a, b) == 0 : strcmp(of_a, of_b) == 0;
}

static opd_status give(struct config *config, const struct service_socket *passed, opd_error *error)
{
	for (size_t i = 0; i < config->listener_count; i++)
		if (same_address(config->listeners[i].address, passed->address)) {
			config->listeners[i].fd = passed->fd;
			return OPD_OK;
		}
	return opd_fail(error, OPD_INVALID_ARGUMENT, "listen: %s isn't there, but the service manager passed its socket", passed->address);
}

opd_status service_listen(const struct service *service, struct config *config, opd_error *error)
{
	opd_status status = OPD_OK;
	const bool none = config->listener_count == 0;
	for (uint32_t i = 0; status == OPD_OK && i < service->socket_count; i++) {
		if (none)
			status = config_add_listener(config, service->sockets[i].address, error);
		if (status == OPD_OK)
			status = give(config, &service->sockets[i], error);
	}
	return status;
}
