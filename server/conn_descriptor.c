/* Descriptors that a client passes along with its frames. Every byte of a Unix socket is received here, not by libuv: any client may pass descriptors with any of them, asked for or not, and
 * one that is let go must not be closed by the loop, nor dropped by the kernel under it, which is the same. A close may take as long as somebody likes: a socket that lingers, a file system
 * in a process of theirs. */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include "server/conn_internal.h"
#include "server/daemon.h"
#include "server/ring.h"

#define PASSED_MAX 253 /* the kernel's own limit for a message */

void conn_let_go(const struct conn *conn, int fd)
{
	closer_close(&conn->io->closer, fd);
}

static void collect(struct conn *conn, const struct cmsghdr *header)
{
	const size_t count = header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS ? (header->cmsg_len - CMSG_LEN(0)) / sizeof(int) : 0;
	for (size_t i = 0; i < count; i++) {
		int fd;
		memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
		if ((conn->features & CONN_PASSES) != 0 && conn->descriptor_count < CONN_DESCRIPTORS)
			conn->descriptors[conn->descriptor_count++] = fd;
		else
			conn_let_go(conn, fd);
	}
}

ssize_t conn_receive(struct conn *conn, void *to, size_t bytes)
{
	_Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(PASSED_MAX * sizeof(int))];
	struct iovec room = {to, bytes};
	struct msghdr message = {.msg_iov = &room, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	uv_os_fd_t fd;
	if (uv_fileno(&conn->handle, &fd) != 0)
		return UV_EBADF;
	const ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (got < 0)
		return uv_translate_sys_error(errno);
	for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header != NULL; header = CMSG_NXTHDR(&message, header))
		collect(conn, header);
	return got;
}

/* Nothing more can be sent to it, so there is an end to what is to be read. Not into the server's stage: what lies there may be in use by whoever closes the connection. */
void conn_drain(struct conn *conn)
{
	char bytes[8192];
	uv_os_fd_t fd;
	if (uv_fileno(&conn->handle, &fd) != 0 || shutdown(fd, SHUT_RD) != 0)
		return;
	while (conn_receive(conn, bytes, sizeof bytes) > 0)
		;
}

void conn_drop_descriptors(struct conn *conn)
{
	while (conn->descriptor_count != 0)
		conn_let_go(conn, conn->descriptors[--conn->descriptor_count]);
}

/* Its frame comes by a ring, its byte by the socket: sent before, so it is there, but the loop may not have looked yet. An end of the connection is still there for it. */
static void receive_descriptor(struct conn *conn)
{
	uint8_t byte = 0;
	if (conn_receive(conn, &byte, 1) == 1)
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
