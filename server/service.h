/* What opd and the service manager that started it tell each other, by systemd's protocol: sockets that are open already, and how the daemon is.
 *
 * Layer: server, beside main.c (the daemon as a library knows nothing of it). Threads: service_init first, on the main thread; then any.
 * Life: service_init → service_listen (each time a configuration is built) → service_notify….
 * The protocol is a datagram of text and four environment variables (sd_notify(3), sd_listen_fds(3)). It is spoken here, in 100 lines, and not by libsystemd: that would link a library with
 * compressors into every daemon for one sendmsg.
 * Not here: when to say what (main.c). */
#ifndef OPD_SERVER_SERVICE_H
#define OPD_SERVER_SERVICE_H

#include <stdint.h>
#include <sys/un.h>

#include "server/config.h"

#define SERVICE_SOCKETS_MAX 16u

struct service_socket {
	int fd;
	char address[sizeof "unix:" + sizeof ((struct sockaddr_un *)NULL)->sun_path]; /* as `listen` would name it */
};

struct service {
	struct sockaddr_un notify; /* where messages go */
	uint32_t notify_bytes;     /* of it; 0: nobody listens */
	int fd;                    /* to send from; -1: none */
	uint64_t watchdog_us;      /* a message within each; 0: nobody watches */
	uint32_t socket_count;
	struct service_socket sockets[SERVICE_SOCKETS_MAX];
};

/* Reads the environment, and takes its variables out: what the daemon starts is another service. INVALID_ARGUMENT: sockets were passed that can't be served. */
OPD_MUST_USE opd_status service_init(struct service *service, opd_error *error);

/* Gives the passed sockets to the listeners of the same address; without any listener they become the listeners. INVALID_ARGUMENT: one that `listen` doesn't name. */
OPD_MUST_USE opd_status service_listen(const struct service *service, struct config *config, opd_error *error);

/* Sends one message, such as "READY=1". Never blocks; one that isn't taken is lost. */
void service_notify(const struct service *service, const char *message);

#endif
