#include "server/ring.h"

#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "proto/bounds.h"
#include "proto/ring.h"
#include "server/conn_internal.h"
#include "server/daemon.h"
#include "server/reaper.h"
#include "server/request.h"

struct ring {
	struct conn *conn; /* NULL: it is closing */
	struct io_loop *io;
	struct ring *next; /* of those awake */
	bool awake;
	bool full;      /* replies wait for room */
	bool answering; /* the answer to attach_rings hasn't left */
	uint64_t poll_ns;   /* granted */
	uint64_t active_ns; /* when something last went */
	uv_poll_t poll;
	bool polled;   /* `poll` is initialised */
	int server_fd; /* eventfd that the client writes to */
	bool by_edges; /* io_loop_by_edges */
	int client_fd; /* eventfd that the daemon writes to; the client has it only inside watch_fd, so its flags are the daemon's own */
	int watch_fd;  /* epoll that reports client_fd; goes to the client. -1: gone */
	void *map;
	uint64_t map_bytes;
	struct ring_header *header;
	struct ring_reader requests;
	struct ring_writer replies;
};

/* ---- Waking ---- */

static void wake_client(const struct ring *ring)
{
	const uint64_t one = 1;
	(void)!write(ring->client_fd, &one, sizeof one);
}

/* Nothing of it is read until something is written or decoded, or ever: ring_wake comes when that changes. */
static bool is_deaf(const struct ring *ring)
{
	return ring->conn->throttled || ring->conn->held || ring->conn->broken;
}

/* Tells the client what to wake the daemon for. */
static void tell_waits(struct ring *ring)
{
	ring_wait(&ring->header->server_waits, (ring->awake || is_deaf(ring) ? 0 : RING_WAITS_BYTES) | (ring->full ? RING_WAITS_ROOM : 0));
}

static void wake(struct ring *ring)
{
	if (ring->awake || ring->answering)
		return;
	ring->awake = true;
	ring->next = ring->io->rings;
	ring->io->rings = ring;
	tell_waits(ring);
	io_loop_flush_soon(ring->io);
}

void ring_wake(struct conn *conn)
{
	wake(conn->ring);
}

static void unlink_awake(struct ring *ring)
{
	struct ring **link = &ring->io->rings;
	while (*link != NULL && *link != ring)
		link = &(*link)->next;
	if (*link != NULL)
		*link = ring->next;
	ring->awake = false;
}

/* Where edges aren't to be had the count goes back to 0 each time, unless the client has read it away or let reads of it block; neither is waited for. */
static void take_event(struct ring *ring)
{
	uint64_t count;
	const struct iovec to = {&count, sizeof count};
	if (ring->by_edges)
		return;
	ring->by_edges = io_loop_by_edges(ring->io, ring->server_fd);
	(void)!preadv2(ring->server_fd, &to, 1, -1, RWF_NOWAIT);
}

static void on_event(uv_poll_t *poll, int status, int events)
{
	struct ring *ring = poll->data;
	(void)events;
	if (status < 0) {
		conn_close(ring->conn, LOG_WARN, "rings: the eventfd has failed");
		return;
	}
	take_event(ring);
	wake(ring);
}

/* ---- Closing ---- */

static void close_fd(int fd)
{
	if (fd >= 0)
		(void)close(fd);
}

static void ring_free(struct ring *ring)
{
	if (ring->map != NULL)
		reaper_unmap(ring->map, ring->map_bytes);
	close_fd(ring->server_fd);
	close_fd(ring->client_fd);
	close_fd(ring->watch_fd);
	free(ring);
}

static void on_closed(uv_handle_t *handle)
{
	ring_free(handle->data);
}

void ring_close(struct conn *conn)
{
	struct ring *ring = conn->ring;
	if (ring == NULL)
		return;
	unlink_awake(ring);
	conn->ring = NULL;
	ring->conn = NULL;
	uv_close((uv_handle_t *)&ring->poll, on_closed);
}

static void broken(struct ring *ring, const char *which, const _Atomic uint64_t *index, uint64_t own, uint64_t bytes)
{
	char text[160];
	(void)snprintf(text, sizeof text, "rings: the client's index of %s is %" PRIu64 ", the daemon's %" PRIu64 ", in a ring of %" PRIu64 " bytes", which,
	               atomic_load_explicit(index, memory_order_relaxed), own, bytes);
	conn_close(ring->conn, LOG_WARN, text);
}

/* ---- Reading ---- */

/* A head of its own, so that the payload behind it goes straight to where it belongs. Its length is read from the copy. */
static uint64_t copy_head(struct ring *ring, uint8_t *stage, uint64_t filled)
{
	if (ring->conn->partial_bytes != 0 || filled < FRAME_HEADER_BYTES) {
		const uint64_t bytes = filled < CONN_STAGE_BYTES ? filled : CONN_STAGE_BYTES;
		ring_read(&ring->requests, stage, bytes);
		return bytes;
	}
	ring_read(&ring->requests, stage, FRAME_HEADER_BYTES);
	const uint64_t envelope = frame_envelope_bytes(stage);
	if (envelope > filled - FRAME_HEADER_BYTES || envelope > CONN_STAGE_BYTES - FRAME_HEADER_BYTES)
		return FRAME_HEADER_BYTES;
	ring_read(&ring->requests, stage + FRAME_HEADER_BYTES, envelope);
	return FRAME_HEADER_BYTES + envelope;
}

static void take_some(struct ring *ring, uint64_t filled)
{
	struct conn *conn = ring->conn;
	uint64_t bytes;
	uint8_t *payload = conn_payload_room(conn, &bytes);
	if (payload != NULL) {
		bytes = bytes < filled ? bytes : filled;
		ring_read(&ring->requests, payload, bytes);
		conn->turn_read += bytes;
		conn_received_payload(conn, bytes);
		return;
	}
	uint8_t *stage = (uint8_t *)conn->io->stage;
	bytes = copy_head(ring, stage, filled);
	conn->turn_read += bytes;
	conn_consume(conn, stage, bytes);
}

/* Gives room back early enough that a client that fills the ring needn't wait for the end of the turn. */
static void release(struct ring *ring, bool all)
{
	if (!all && ring->requests.at - ring->requests.released < ring->requests.bytes / 4)
		return;
	if (ring_release(&ring->requests, &ring->header->client_waits))
		wake_client(ring);
}

static void take_requests(struct ring *ring)
{
	struct conn *conn = ring->conn;
	const uint64_t before = ring->requests.at;
	conn_new_turn(conn);
	while (conn_may_read(conn)) {
		const uint64_t filled = ring_filled(&ring->requests);
		if (filled == RING_BROKEN) {
			broken(ring, "requests written", ring->requests.head, ring->requests.at, ring->requests.bytes);
			return;
		}
		if (filled == 0)
			break;
		take_some(ring, filled);
		release(ring, false);
	}
	release(ring, true);
	if (ring->requests.at == before)
		return;
	conn->read_us = conn->io->turn_us;
}

/* ---- Writing ---- */

/* By the socket, with the two descriptors. Nothing else is under way, so the socket has room unless the client never reads. */
static int answer(struct ring *ring, const uv_buf_t *bufs, unsigned count)
{
	struct conn *conn = ring->conn;
	const int passed[2] = {ring->server_fd, ring->watch_fd};
	_Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof passed)] = {0};
	struct msghdr message = {.msg_iov = (struct iovec *)(uintptr_t)bufs, .msg_iovlen = count, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof passed);
	memcpy(CMSG_DATA(header), passed, sizeof passed);
	size_t bytes = 0;
	for (unsigned i = 0; i < count; i++)
		bytes += bufs[i].len;
	uv_os_fd_t fd;
	const ssize_t sent = uv_fileno(&conn->handle, &fd) == 0 ? sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) : -1;
	if (sent < 0 || (size_t)sent != bytes) {
		conn_close(conn, LOG_WARN, "rings: their answer can't be sent, the client doesn't read");
		return UV_ECANCELED;
	}
	close_fd(ring->watch_fd); /* the client's now */
	ring->watch_fd = -1;
	ring->answering = false;
	wake(ring);
	return (int)sent;
}

int ring_put(struct conn *conn, const uv_buf_t *bufs, unsigned count)
{
	struct ring *ring = conn->ring;
	if (ring->answering)
		return answer(ring, bufs, count);
	uint64_t room = ring_room(&ring->replies);
	if (room == 0) {
		ring->full = true;
		tell_waits(ring);
		room = ring_room(&ring->replies); /* the client may have read before it saw that */
	}
	if (room == RING_BROKEN) {
		broken(ring, "replies read", ring->replies.tail, ring->replies.at, ring->replies.bytes);
		return UV_ECANCELED;
	}
	if (room == 0)
		return UV_EAGAIN;
	ring->full = false;
	uint64_t written = 0;
	for (unsigned i = 0; i < count && room != 0; i++) {
		const uint64_t bytes = bufs[i].len < room ? bufs[i].len : room;
		ring_write(&ring->replies, bufs[i].base, bytes);
		written += bytes;
		room -= bytes;
	}
	if (ring->poll_ns != 0) { /* before the client sees its answer: the next request then needs no wake-up */
		ring->active_ns = ring->io->now_ns;
		wake(ring);
	}
	if (ring_publish(&ring->replies, &ring->header->client_waits))
		wake_client(ring);
	return (int)written;
}

/* Replies that waited for room go on. */
static void look_for_room(struct ring *ring)
{
	if (!ring->full || ring_room(&ring->replies) == 0)
		return;
	ring->full = false;
	ring->conn->writing = false;
	conn_mark_dirty(ring->conn);
}

/* ---- Turns ---- */

/* The next request is probably near, its client having said that it polls and having all its answers; no kernel needs the core; and the second's budget isn't spent. */
static bool is_polling(const struct ring *ring, uint64_t now_ns)
{
	const struct io_loop *io = ring->io;
	return ring->poll_ns != 0 && ring->conn->session->in_flight == 0 && !lanes_busy(io->server) && io->polled_ns < io->server->config->polling_budget_us * 1000 &&
	       now_ns - ring->active_ns < ring->poll_ns;
}

/* False: something came while it did. */
static bool fall_asleep(struct ring *ring)
{
	ring->awake = false;
	tell_waits(ring);
	const bool slept = (is_deaf(ring) || ring_filled(&ring->requests) == 0) && (!ring->full || ring_room(&ring->replies) == 0);
	if (!slept) {
		ring->awake = true;
		tell_waits(ring);
	}
	return slept;
}

/* True: it is to be looked at in the next turn too. One that polls isn't put to sleep while its answers are about to leave: they would wake it, and the word that says so would go to and fro between
 * two cores. */
static bool stays_awake(struct ring *ring)
{
	if (ring->poll_ns != 0 && ring->conn->dirty)
		return true;
	if (!is_deaf(ring) && (ring_filled(&ring->requests) != 0 || (ring->poll_ns != 0 && is_polling(ring, request_now_ns()))))
		return true;
	return !fall_asleep(ring);
}

void rings_serve(struct io_loop *io)
{
	struct ring *kept = NULL;
	while (io->rings != NULL) {
		struct ring *ring = io->rings;
		io->rings = ring->next;
		look_for_room(ring);
		take_requests(ring);
		if (ring->conn == NULL || !stays_awake(ring))
			continue;
		ring->next = kept;
		kept = ring;
	}
	while (kept != NULL) {
		struct ring *ring = kept;
		kept = ring->next;
		if (ring->conn == NULL) /* closed while another was served */
			continue;
		ring->next = io->rings;
		io->rings = ring;
	}
}

/* How often it is looked before the clock is: that takes as long as some looks. */
#define LOOKS_A_CLOCK 8u

/* Others may need this core, the client perhaps. Where nobody does, a yield costs 0.3 us. */
static void breathe(uint64_t looked_ns)
{
	if (looked_ns < RING_PAUSE_NS)
		ring_relax();
	else
		(void)sched_yield();
}

/* Whether a ring has something; *polling_out: whether another look may find more. */
static bool look(const struct io_loop *io, uint64_t now_ns, bool *polling_out)
{
	bool found = false, polling = false;
	for (const struct ring *ring = io->rings; ring != NULL && !found; ring = ring->next) {
		polling = polling || is_polling(ring, now_ns);
		found = conn_may_read(ring->conn) && ring_filled(&ring->requests) != 0;
	}
	*polling_out = polling;
	return found;
}

/* One that brings nothing costs the second's budget what it may take itself: whoever it yielded the core to may have kept it for milliseconds, and a hundred of those put
 * all rings to sleep until the next second (every call then cost a wake-up, 10 us instead of 3). */
bool rings_look(struct io_loop *io)
{
	bool polling = true;
	const uint64_t begin = io->now_ns; /* a moment ago: another reading of the clock would take as long as two looks */
	uint64_t now = begin;
	for (uint32_t looks = 1; polling && io->dirty == NULL && now < io->slice_end_ns; looks++) {
		if (look(io, now, &polling))
			return true;
		breathe(now - begin);
		if (looks % LOOKS_A_CLOCK == 0 || now - begin >= RING_PAUSE_NS)
			now = request_now_ns();
	}
	io->polled_ns += now - begin < RING_SLICE_NS ? now - begin : RING_SLICE_NS;
	return false;
}

/* ---- The socket ---- */

void ring_socket_bytes(struct conn *conn, const unsigned char *bytes, size_t count)
{
	if (conn->broken)
		return;
	for (size_t i = 0; i < count; i++) {
		if (bytes[i] != 0) {
			conn_protocol_error(conn, "bytes on the socket of a session with rings: frames go there, and a byte of 0 with each descriptor here");
			return;
		}
	}
}

/* ---- Attaching ---- */

static opd_status check_request(const struct request *request, opd_error *error)
{
	const struct msg_attach_rings *wish = &request->message.rings;
	const struct conn *conn = request->session->conn;
	const uint64_t limit = request->context->server->config->limits.ring_bytes;
	if (conn == NULL || (conn->features & CONN_RINGS) == 0)
		return opd_fail(error, OPD_FAILED_PRECONDITION,
		                "attach_rings: the session has no feature \"rings\": it is there over a Unix socket, for a client whose Hello names it");
	if (conn->ring != NULL)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "attach_rings: the session has its rings already");
	if (request->session->in_flight != 1 || !outbox_empty(&conn->outbox))
		return opd_fail(error, OPD_FAILED_PRECONDITION, "attach_rings: %u other requests are under way, expected none and all answers read",
		                (unsigned)request->session->in_flight - 1);
	if (!ring_bytes_valid(wish->request_bytes) || !ring_bytes_valid(wish->reply_bytes))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "attach_rings: rings of %" PRIu64 " and %" PRIu64 " bytes, expected powers of two from %u to %u",
		                wish->request_bytes, wish->reply_bytes, BOUND_RING_BYTES_MIN, BOUND_RING_BYTES_MAX);
	if (wish->request_bytes + wish->reply_bytes > limit)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "attach_rings: rings of %" PRIu64 " bytes together, at most %" PRIu64, wish->request_bytes + wish->reply_bytes,
		                limit);
	return OPD_OK;
}

static opd_status system_error(const char *what, int number, opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "attach_rings: %s: %s", what, strerror(number));
}

static opd_status make_descriptors(struct ring *ring, opd_error *error)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLET}; /* each write is an edge: nobody has to read the count back */
	uint64_t count;
	const struct iovec to = {&count, sizeof count};
	ring->server_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	ring->client_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	ring->watch_fd = epoll_create1(EPOLL_CLOEXEC);
	if (ring->server_fd < 0 || ring->client_fd < 0 || ring->watch_fd < 0 || epoll_ctl(ring->watch_fd, EPOLL_CTL_ADD, ring->client_fd, &event) != 0)
		return system_error("descriptors", errno, error);
	if (preadv2(ring->server_fd, &to, 1, -1, RWF_NOWAIT) >= 0 || errno != EAGAIN)
		return opd_fail(error, OPD_UNIMPLEMENTED, "attach_rings: this system can't read an eventfd without waiting (Linux 5.8 can)");
	return OPD_OK;
}

static opd_status map_memory(struct ring *ring, int fd, const struct msg_attach_rings *wish, opd_error *error)
{
	struct stat file;
	const uint64_t bytes = ring_memory_bytes(wish->request_bytes, wish->reply_bytes);
	opd_status status = region_check_file(fd, bytes, "attach_rings", &file, error);
	if (status != OPD_OK)
		return status;
	void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		return system_error("mmap", errno, error);
	(void)madvise(map, bytes, MADV_DONTDUMP);
	ring->map = map;
	ring->map_bytes = bytes;
	ring->header = map;
	uint8_t *data = (uint8_t *)map + RING_HEADER_BYTES;
	ring_reader_init(&ring->requests, &ring->header->request_head, &ring->header->request_tail, data, wish->request_bytes);
	ring_writer_init(&ring->replies, &ring->header->reply_head, &ring->header->reply_tail, data + wish->request_bytes, wish->reply_bytes);
	return OPD_OK;
}

static opd_status watch(struct ring *ring, opd_error *error)
{
	int failed = uv_poll_init(&ring->io->loop, &ring->poll, ring->server_fd);
	ring->polled = failed == 0;
	ring->poll.data = ring;
	if (failed == 0)
		failed = uv_poll_start(&ring->poll, UV_READABLE, on_event);
	return failed == 0 ? OPD_OK : opd_fail(error, OPD_RESOURCE_EXHAUSTED, "attach_rings: %s", uv_strerror(failed));
}

static opd_status make_ring(struct conn *conn, const struct msg_attach_rings *wish, int fd, opd_error *error)
{
	struct ring *ring = calloc(1, sizeof *ring);
	if (ring == NULL)
		return system_error("memory", ENOMEM, error);
	ring->server_fd = ring->client_fd = ring->watch_fd = -1;
	ring->io = conn->io;
	ring->conn = conn;
	ring->answering = true;
	const uint64_t window_us = conn->server->config->polling_window_us;
	ring->poll_ns = (wish->poll_us < window_us ? wish->poll_us : window_us) * 1000;
	opd_status status = map_memory(ring, fd, wish, error);
	if (status == OPD_OK)
		status = make_descriptors(ring, error);
	if (status == OPD_OK)
		status = watch(ring, error);
	if (status == OPD_OK)
		conn->ring = ring;
	else if (ring->polled)
		uv_close((uv_handle_t *)&ring->poll, on_closed);
	else
		ring_free(ring);
	return status;
}

void ring_attach_start(struct request *request)
{
	struct conn *conn = request->session->conn;
	opd_status status = check_request(request, &request->error);
	const int fd = status == OPD_OK ? conn_take_descriptor(conn) : -1;
	if (status == OPD_OK && fd < 0)
		status = opd_fail(&request->error, OPD_INVALID_ARGUMENT, "attach_rings: no descriptor came with the request's first byte");
	if (status == OPD_OK)
		status = make_ring(conn, &request->message.rings, fd, &request->error);
	if (fd >= 0)
		conn_let_go(conn, fd);
	if (status != OPD_OK) {
		request_fail(request);
		return;
	}
	LOG(conn->server->log, LOG_INFO, "rings attached", LOG_UINT("session", conn->session->id), LOG_UINT("request_bytes", request->message.rings.request_bytes),
	    LOG_UINT("reply_bytes", request->message.rings.reply_bytes), LOG_UINT("poll_us", conn->ring->poll_ns / 1000));
	request->reply.rings.poll_us = conn->ring->poll_ns / 1000;
	request_reply(request, MSG_REPLY_RINGS);
}
