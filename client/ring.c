#include "client/ring.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client/connection.h"
#include "proto/codec.h"
#include "proto/ring.h"

#define RING_BYTES_DEFAULT ((uint64_t)256 << 10)
/* What the epoll says of the socket; of the daemon's wake-ups it says 0. */
#define SOCKET_EVENT 1u

struct ring {
	uint64_t poll_us;
	int wake_fd;  /* the daemon's eventfd */
	int watch_fd; /* epoll: of the daemon's wake-ups, and of the socket */
	bool ended;   /* the socket has: what is in the ring may still be read */
	bool nudged;  /* the epoll reports the socket as writable, so that whoever polls it comes at once */
	void *map;
	uint64_t map_bytes;
	struct ring_header *header;
	struct ring_writer requests;
	struct ring_reader replies;
};

/* ---- Moving bytes ---- */

static void wake_server(const struct ring *ring)
{
	const uint64_t one = 1;
	(void)!write(ring->wake_fd, &one, sizeof one);
}

/* False: the connection is gone. The daemon reads its socket at all times, and a byte is all that goes there: this doesn't wait. */
static bool pass_descriptor(const opd_client *client, const struct msghdr *from)
{
	uint8_t byte = 0;
	struct iovec piece = {&byte, 1};
	const struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = from->msg_control, .msg_controllen = from->msg_controllen};
	ssize_t sent;
	do
		sent = sendmsg(client->fd, &message, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent == 1;
}

ssize_t ring_send(opd_client *client, const struct msghdr *message)
{
	struct ring *ring = client->ring;
	uint64_t room = ring_room(&ring->requests);
	ring->ended = ring->ended || room == RING_BROKEN;
	if (room == 0 || ring->ended) {
		errno = room == 0 && !ring->ended ? EAGAIN : EPIPE;
		return -1;
	}
	if (message->msg_controllen != 0 && !pass_descriptor(client, message))
		return -1;
	uint64_t written = 0;
	for (size_t i = 0; i < message->msg_iovlen && room != 0; i++) {
		const struct iovec *piece = &message->msg_iov[i];
		const uint64_t bytes = piece->iov_len < room ? piece->iov_len : room;
		ring_write(&ring->requests, piece->iov_base, bytes);
		written += bytes;
		room -= bytes;
	}
	if (ring_publish(&ring->requests, &ring->header->server_waits))
		wake_server(ring);
	return (ssize_t)written;
}

ssize_t ring_receive(opd_client *client, const struct iovec *pieces, size_t count)
{
	struct ring *ring = client->ring;
	uint64_t filled = ring_filled(&ring->replies);
	if (filled == 0 && ring->ended)
		return 0;
	if (filled == 0 || filled == RING_BROKEN) {
		errno = filled == 0 ? EAGAIN : EPROTO;
		return -1;
	}
	uint64_t taken = 0;
	for (size_t i = 0; i < count && filled != 0; i++) {
		const uint64_t bytes = pieces[i].iov_len < filled ? pieces[i].iov_len : filled;
		ring_read(&ring->replies, pieces[i].iov_base, bytes);
		taken += bytes;
		filled -= bytes;
	}
	if (ring_release(&ring->replies, &ring->header->server_waits))
		wake_server(ring);
	return (ssize_t)taken;
}

/* ---- Waiting ---- */

bool ring_ready(const opd_client *client)
{
	const struct ring *ring = client->ring;
	return ring->ended || ring_filled(&ring->replies) != 0 || (writer_pending(client) && ring_room(&ring->requests) != 0);
}

static void nudge(opd_client *client, bool on)
{
	struct ring *ring = client->ring;
	struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | (on ? EPOLLOUT : 0), .data.u64 = SOCKET_EVENT};
	if (ring->nudged != on && epoll_ctl(ring->watch_fd, EPOLL_CTL_MOD, client->fd, &event) == 0)
		ring->nudged = on;
}

static void tell_waits(opd_client *client)
{
	ring_wait(&client->ring->header->client_waits, RING_WAITS_BYTES | (writer_pending(client) ? RING_WAITS_ROOM : 0));
}

/* The daemon says nothing on the socket: whatever can be read there is its end. */
static void on_events(opd_client *client, const struct epoll_event *events, int count)
{
	for (int i = 0; i < count; i++)
		if (events[i].data.u64 == SOCKET_EVENT && (events[i].events & ~(uint32_t)EPOLLOUT) != 0)
			client->ring->ended = true;
}

/* How often it is looked before the clock is: that takes as long as some looks. */
#define LOOKS_A_CLOCK 8u

/* True: ready. */
static bool spin(const opd_client *client, uint64_t deadline_us)
{
	const uint64_t begin_ns = clock_ns(), end_ns = begin_ns + client->ring->poll_us * 1000;
	uint64_t now_ns = begin_ns;
	for (uint32_t looks = 1; now_ns < end_ns && now_ns / 1000 < deadline_us; looks++) {
		if (ring_ready(client))
			return true;
		if (now_ns - begin_ns < RING_PAUSE_NS)
			ring_relax();
		else
			(void)sched_yield();
		if (looks % LOOKS_A_CLOCK == 0 || now_ns - begin_ns >= RING_PAUSE_NS)
			now_ns = clock_ns();
	}
	return ring_ready(client);
}

bool ring_sleep(opd_client *client, uint64_t deadline_us)
{
	struct ring *ring = client->ring;
	struct epoll_event events[2];
	if (ring_ready(client) || (ring->poll_us != 0 && spin(client, deadline_us)))
		return true;
	nudge(client, false);
	tell_waits(client);
	bool ready = ring_ready(client);
	if (!ready) {
		struct timespec left, *limit = NULL;
		if (deadline_us != UINT64_MAX) {
			const uint64_t now = clock_us(), us = deadline_us > now ? deadline_us - now : 0;
			left = (struct timespec){.tv_sec = (time_t)(us / 1000000u), .tv_nsec = (long)(us % 1000000u) * 1000};
			limit = &left;
		}
		const int count = epoll_pwait2(ring->watch_fd, events, 2, limit, NULL);
		on_events(client, events, count);
		ready = count != 0; /* an interruption counts as news: the caller looks at its deadline again */
	}
	ring_wait(&ring->header->client_waits, 0);
	return ready;
}

int ring_fd(const struct ring *ring)
{
	return ring->watch_fd;
}

void ring_watch(opd_client *client)
{
	struct epoll_event events[2];
	on_events(client, events, epoll_wait(client->ring->watch_fd, events, 2, 0)); /* what it told before is over */
	tell_waits(client);
	nudge(client, ring_ready(client));
}

/* ---- Attaching ---- */

void ring_take_descriptors(opd_client *client, struct msghdr *message)
{
	int *const kept = client->ring_descriptors;
	for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header != NULL; header = CMSG_NXTHDR(message, header)) {
		if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
			continue;
		const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < count; i++) {
			int fd;
			memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
			if (count == 2 && kept[i] < 0)
				kept[i] = fd;
			else
				(void)close(fd);
		}
	}
}

static void close_fd(int fd)
{
	if (fd >= 0)
		(void)close(fd);
}

void ring_destroy(struct ring *ring)
{
	if (ring == NULL)
		return;
	if (ring->map != NULL)
		(void)munmap(ring->map, (size_t)ring->map_bytes);
	close_fd(ring->wake_fd);
	close_fd(ring->watch_fd);
	free(ring);
}

/* Its descriptor is the caller's to close. */
static opd_status ring_create(uint64_t bytes, struct ring **ring_out, int *fd_out, opd_error *error)
{
	struct ring *ring = calloc(1, sizeof *ring);
	if (ring == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "rings: out of memory");
	ring->wake_fd = ring->watch_fd = -1;
	ring->map_bytes = ring_memory_bytes(bytes, bytes);
	opd_status status = memory_file(ring->map_bytes, fd_out, error);
	void *map = status != OPD_OK ? MAP_FAILED : mmap(NULL, (size_t)ring->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd_out, 0);
	if (map == MAP_FAILED) {
		if (status == OPD_OK) {
			status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "rings of %llu bytes: %s", (unsigned long long)ring->map_bytes, strerrordesc_np(errno));
			(void)close(*fd_out);
		}
		free(ring);
		return status;
	}
	ring->map = map;
	ring->header = map;
	uint8_t *data = (uint8_t *)map + RING_HEADER_BYTES;
	ring_writer_init(&ring->requests, &ring->header->request_head, &ring->header->request_tail, data, bytes);
	ring_reader_init(&ring->replies, &ring->header->reply_head, &ring->header->reply_tail, data + bytes, bytes);
	*ring_out = ring;
	return OPD_OK;
}

static opd_status ask(opd_client *client, const struct msg_attach_rings *wish, int fd, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_ATTACH_RINGS, .rings = *wish};
	struct codec_buffer envelope;
	arena_reset(&client->scratch);
	opd_status status = codec_encode_request(&client->scratch, &message, &envelope, error);
	const struct submission submission = {.envelope = &envelope, .expected = MSG_REPLY_RINGS, .descriptor = fd};
	struct flight *flight;
	opd_result *result = NULL;
	client->ring_descriptors[0] = client->ring_descriptors[1] = -1;
	client->takes_descriptors = true;
	if (status == OPD_OK)
		status = connection_submit(client, &submission, &flight, error);
	if (status == OPD_OK)
		status = connection_finish(client, flight, &result, error);
	client->takes_descriptors = false;
	opd_result_destroy(result);
	return status;
}

/* Takes the two descriptors, whatever comes of it. */
static opd_status adopt(opd_client *client, struct ring *ring, opd_error *error)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP, .data.u64 = SOCKET_EVENT};
	ring->wake_fd = client->ring_descriptors[0];
	ring->watch_fd = client->ring_descriptors[1];
	if (ring->wake_fd < 0 || ring->watch_fd < 0)
		return opd_fail(error, OPD_DATA_LOSS, "malformed answer from the server: rings without their two descriptors");
	if (epoll_ctl(ring->watch_fd, EPOLL_CTL_ADD, client->fd, &event) != 0)
		return opd_fail(error, OPD_DATA_LOSS, "malformed answer from the server: the second descriptor of its rings isn't an epoll: %s", strerrordesc_np(errno));
	return OPD_OK;
}

opd_status ring_attach(opd_client *client, const opd_connect_options *options, opd_error *error)
{
	const uint64_t bytes = options->ring_bytes == 0 ? RING_BYTES_DEFAULT : options->ring_bytes;
	if (!client->rings)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "rings: this session can't: they need a Unix socket and a server with the feature \"rings\"");
	if (!ring_bytes_valid(bytes))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "rings of %llu bytes, expected a power of two from 4 KiB to 16 MiB", (unsigned long long)bytes);
	struct ring *ring = NULL;
	int fd = -1;
	opd_status status = ring_create(bytes, &ring, &fd, error);
	if (status != OPD_OK)
		return status;
	const struct msg_attach_rings wish = {bytes, bytes, options->poll_us};
	status = ask(client, &wish, fd, error);
	(void)close(fd);
	const opd_status adopted = adopt(client, ring, status == OPD_OK ? error : NULL);
	if (status == OPD_OK)
		status = adopted;
	if (status != OPD_OK) {
		ring_destroy(ring);
		return status;
	}
	ring->poll_us = options->poll_us;
	client->ring = ring;
	return OPD_OK;
}
