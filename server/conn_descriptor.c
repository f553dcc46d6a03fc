/* Descriptors that a client passes along with its frames. libuv takes any from a pipe of its kind "ipc", and hands one out only as a handle of its own: it is accepted into a handle
 * that lives as long as it takes to duplicate the descriptor, whatever that is. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "server/conn_internal.h"
#include "server/daemon.h"
#include "server/ring.h"

static void on_passed_closed(uv_handle_t *handle)
{
	free(handle);
}

/* False: out of memory. */
static bool collect_one(struct conn *conn)
{
	uv_pipe_t *passed = malloc(sizeof *passed);
	if (passed == NULL)
		return false;
	if (uv_pipe_init(&conn->server->loop, passed, 0) != 0) {
		free(passed);
		return false;
	}
	uv_os_fd_t fd;
	const bool accepted = uv_accept(&conn->stream, (uv_stream_t *)passed) == 0;
	if (accepted && conn->descriptor_count < CONN_DESCRIPTORS && uv_fileno((uv_handle_t *)passed, &fd) == 0) {
		const int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
		if (own >= 0)
			conn->descriptors[conn->descriptor_count++] = own;
	}
	uv_close((uv_handle_t *)passed, on_passed_closed);
	return accepted;
}

void conn_collect_descriptors(struct conn *conn)
{
	while (uv_pipe_pending_count(&conn->pipe) > 0) {
		if (!collect_one(conn)) {
			conn_close(conn, LOG_ERROR, "out of memory for a descriptor");
			return;
		}
	}
}

void conn_drop_descriptors(struct conn *conn)
{
	while (conn->descriptor_count != 0)
		(void)close(conn->descriptors[--conn->descriptor_count]);
}

/* Its frame comes by a ring, its byte by the socket: sent before, so it is there, but libuv may not have looked yet. */
static void receive_descriptor(struct conn *conn)
{
	uint8_t byte = 0;
	_Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(int))];
	struct iovec to = {&byte, 1};
	struct msghdr message = {.msg_iov = &to, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	uv_os_fd_t fd;
	if (uv_fileno(&conn->handle, &fd) != 0 || recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) != 1)
		return; /* an end of the connection is still there for libuv */
	const struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	if (header != NULL && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS && header->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(&conn->descriptors[conn->descriptor_count++], CMSG_DATA(header), sizeof(int));
	ring_socket_bytes(conn, &byte, 1);
}

int conn_take_descriptor(struct conn *conn)
{
	if (conn->descriptor_count == 0 && conn->ring != NULL)
		receive_descriptor(conn);
	if (conn->descriptor_count == 0)
		return -1;
	const int fd = conn->descriptors[0];
	conn->descriptor_count--;
	for (uint32_t i = 0; i < conn->descriptor_count; i++)
		conn->descriptors[i] = conn->descriptors[i + 1];
	return fd;
}
