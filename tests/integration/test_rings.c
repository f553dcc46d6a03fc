/* Rings: the frames of a session in shared memory. All that a socket carries goes through them, also when they are full; whoever breaks them ends itself alone; no descriptor and no
 * byte stays behind. (The suites of sessions, tensors, donations and graphs run through rings too: CMakeLists.txt.) */
#include <check.h>
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "opd/client.h"
#include "proto/bounds.h"
#include "proto/codec.h"
#include "proto/frame.h"
#include "proto/ring.h"
#include "server/conn.h"
#include "server/daemon.h"
#include "tests/lib/house.h"
#include "tests/lib/lab.h"

static struct house house;
static opd_error error;
static opd_client *other; /* a plain session: it must go on whatever the others do */
static unsigned descriptors; /* open before the test's own client came */

#define OK(call) ck_assert_msg((call) == OPD_OK, "%s", error.text)

static unsigned open_descriptors(void)
{
	unsigned count = 0;
	DIR *folder = opendir("/proc/self/fd");
	while (readdir(folder) != NULL)
		count++;
	(void)closedir(folder);
	return count;
}

static void open_with(const char *const *settings)
{
	house_start(&house, settings);
	house_log_level(&house, LOG_INFO);
	OK(opd_connect(house.address, NULL, &other, &error));
	OK(opd_ping(other, &error));
	descriptors = open_descriptors();
}

static void open_house(void)
{
	open_with(NULL);
}

static void open_strict(void)
{
	open_with((const char *const[]){"limits.stall", "200ms", "limits.in_flight", "4", "limits.rings", "64 KiB", "polling.window", "30us", NULL});
}

static void await_descriptors(unsigned count)
{
	for (int i = 0; i < 5000 && open_descriptors() != count; i++)
		(void)poll(NULL, 0, 1);
	ck_assert_uint_eq(open_descriptors(), count);
}

/* The daemon has let go of everything, and nobody else noticed. */
static void close_house(void)
{
	OK(opd_ping(other, &error));
	await_descriptors(descriptors);
	house_await_bytes(&house, 0);
	opd_close(other);
	house_stop(&house);
}

static opd_client *ringing(uint64_t ring_bytes, uint64_t poll_us)
{
	const opd_connect_options options = {.struct_bytes = sizeof options, .shared_memory = true, .rings = true, .ring_bytes = ring_bytes, .poll_us = poll_us};
	opd_client *made = NULL;
	OK(opd_connect(house.address, &options, &made, &error));
	return made;
}

static void fails(opd_status got, opd_status expected, const char *part)
{
	ck_assert_msg(got == expected, "%s: %s", opd_status_name(got), got == OPD_OK ? "" : error.text);
	ck_assert_msg(strstr(error.text, part) != NULL, "\"%s\" isn't in \"%s\"", part, error.text);
}

/* relu of `count` floats, all from `first` up. */
static opd_request *relu_of(const float *values, int64_t count)
{
	opd_request *request = opd_request_create("relu");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, values, count));
	return request;
}

static float *numbers(size_t count)
{
	float *values = malloc(count * sizeof *values);
	ck_assert_ptr_nonnull(values);
	for (size_t i = 0; i < count; i++)
		values[i] = (float)(i % 4099 + 1);
	return values;
}

static void takes(opd_client *client, opd_ticket ticket, const float *values, size_t count)
{
	opd_result *result = NULL;
	OK(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	ck_assert(memcmp(opd_tensor_data(opd_result_tensor(result, 0)), values, count * sizeof *values) == 0);
	opd_result_destroy(result);
}

/* ---- What works ---- */

/* By sizes of the payload and of the rings, asleep and polling. Payloads of a multiple of the ring pass through it all the same, in DATA frames too. */
START_TEST(payloads_of_every_size_pass_through_rings_of_every_size)
{
	static const size_t counts[] = {1, 16, 1000, 4096, 300000, 1 << 20};
	static const uint64_t rings[] = {4096, 1 << 16, 1 << 20};
	opd_client *client = ringing(rings[_i % 3], _i < 3 ? 0 : 50);
	for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
		float *values = numbers(counts[i]);
		opd_request *request = relu_of(values, (int64_t)counts[i]);
		opd_ticket ticket;
		for (int round = 0; round < 3; round++) {
			OK(opd_submit(client, request, &ticket, &error));
			takes(client, ticket, values, counts[i]);
		}
		opd_request_destroy(request);
		free(values);
	}
	opd_close(client);
}
END_TEST

START_TEST(many_requests_in_flight_fill_both_rings_and_come_back)
{
	enum { FLIGHTS = 64, COUNT = 4096 };
	opd_client *client = ringing(_i == 0 ? 4096 : 1 << 16, _i == 2 ? 50 : 0);
	float *values = numbers(COUNT);
	opd_request *request = relu_of(values, COUNT);
	opd_ticket tickets[FLIGHTS];
	for (int round = 0; round < 5; round++) {
		for (int i = 0; i < FLIGHTS; i++)
			OK(opd_submit(client, request, &tickets[i], &error));
		for (int i = FLIGHTS; i-- > 0;)
			takes(client, tickets[i], values, COUNT);
	}
	opd_request_destroy(request);
	free(values);
	opd_close(client);
}
END_TEST

/* Each side falls asleep after every frame: a wake-up that is lost would leave both asleep. */
START_TEST(no_wake_up_is_lost_in_ten_thousand_calls)
{
	opd_client *client = ringing(4096, _i == 0 ? 0 : 5);
	for (int i = 0; i < 10000; i++)
		OK(opd_ping(client, &error));
	opd_close(client);
}
END_TEST

/* Such a request is a turn's last one; while both sides poll, the next comes in the same turn, when its answer has left already. */
START_TEST(requests_that_concern_all_are_answered_however_soon_they_follow_each_other)
{
	opd_client *client = ringing(65536, 1000);
	for (int i = 0; i < 2000; i++) {
		const opd_sharing *sharing;
		OK(opd_sessions(client, 0, &sharing, &error));
		opd_document_free(sharing);
	}
	opd_close(client);
}
END_TEST

START_TEST(operands_and_results_in_shared_ranges_go_with_rings)
{
	opd_client *client = ringing(0, 0);
	opd_memory *memory = NULL, *second = NULL;
	OK(opd_memory_create(client, 1 << 16, &memory, &error)); /* its descriptor goes by the socket */
	OK(opd_memory_create(client, 1 << 16, &second, &error));
	float *in = opd_memory_data(memory), *out = opd_memory_data(second);
	for (int i = 0; i < 4096; i++)
		in[i] = (float)(i - 2048);
	const int64_t shape[] = {4096};
	const opd_operand x = {.struct_bytes = sizeof x, .dtype = OPD_f32, .rank = 1, .shape = shape, .source = OPD_FROM_MEMORY, .data = in, .memory = memory};
	opd_request *request = opd_request_create("relu");
	opd_request_tensor(request, NULL, &x);
	opd_request_output_memory(request, 0, second, out, 16384);
	opd_result *result = NULL;
	OK(opd_run(client, request, &result, &error));
	ck_assert(out[0] == 0 && out[4095] == 2047);
	opd_result_destroy(result);
	opd_request_destroy(request);
	opd_memory_destroy(memory);
	opd_memory_destroy(second);
	opd_close(client);
}
END_TEST

/* poll() on the descriptor alone, with submissions in between: as a program with an event loop does it. */
START_TEST(an_event_loop_is_told_of_everything)
{
	enum { FLIGHTS = 40, COUNT = 20000 };
	opd_client *client = ringing(1 << 16, 0);
	float *values = numbers(COUNT);
	opd_request *request = relu_of(values, COUNT);
	size_t submitted = 0, taken = 0;
	while (taken < 200) {
		while (submitted < 200 && opd_in_flight(client) < FLIGHTS) {
			opd_ticket ticket;
			OK(opd_submit(client, request, &ticket, &error));
			submitted++;
		}
		struct pollfd entry = {.fd = opd_client_fd(client), .events = opd_client_events(client)};
		ck_assert_int_eq(poll(&entry, 1, 20000), 1);
		OK(opd_process(client, &error));
		while (opd_finished(client) != 0) {
			opd_ticket ticket;
			opd_result *result = NULL;
			OK(opd_wait_any(client, 0, &ticket, &result, &error));
			ck_assert(memcmp(opd_tensor_data(opd_result_tensor(result, 0)), values, COUNT * sizeof *values) == 0);
			opd_result_destroy(result);
			taken++;
		}
	}
	opd_request_destroy(request);
	free(values);
	opd_close(client);
}
END_TEST

START_TEST(a_wait_ends_at_its_time_and_a_cancel_reaches_the_daemon)
{
	opd_client *client = ringing(0, _i == 0 ? 0 : 20);
	float value = 1;
	opd_request *request = opd_request_create("lab_wait");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, &value, 1));
	opd_ticket held, queued;
	OK(opd_submit(client, request, &held, &error));
	OK(opd_submit(client, request, &queued, &error));
	house_await_count(&lab_counts.waiting, 1);
	opd_result *result = NULL;
	ck_assert_int_eq(opd_wait(client, held, 2000, &result, &error), OPD_DEADLINE_EXCEEDED);
	opd_cancel(client, queued);
	OK(opd_ping(client, &error));
	lab_gate(true);
	OK(opd_wait(client, held, UINT64_MAX, &result, &error));
	opd_result_destroy(result);
	opd_request_destroy(request);
	opd_close(client);
}
END_TEST

/* The socket has ended, and what the daemon said before is in the ring. */
START_TEST(a_drain_answers_what_is_in_flight_and_says_goodbye)
{
	opd_client *client = ringing(0, 0);
	float value = 3;
	opd_request *request = opd_request_create("lab_wait");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, &value, 1));
	opd_ticket ticket;
	OK(opd_submit(client, request, &ticket, &error));
	house_await_count(&lab_counts.waiting, 1);
	server_drain(house.server, 10000000);
	/* The loop begins to drain a little later: what it still accepts must end, so it doesn't wait for the gate. */
	opd_request *small = opd_request_create("lab_scale");
	opd_request_tensor(small, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, &value, 1));
	opd_ticket late;
	while (opd_submit(client, small, &late, &error) == OPD_OK) { /* until the goodbye is here */
		opd_result *answer = NULL;
		const opd_status status = opd_wait(client, late, UINT64_MAX, &answer, &error);
		if (status != OPD_OK)
			fails(status, OPD_UNAVAILABLE, "draining");
		opd_result_destroy(answer);
	}
	opd_request_destroy(small);
	ck_assert_ptr_nonnull(strstr(error.text, "draining"));
	lab_gate(true);
	opd_result *result = NULL;
	OK(opd_wait(client, ticket, UINT64_MAX, &result, &error));
	ck_assert(*(const float *)opd_tensor_data(opd_result_tensor(result, 0)) == 6);
	opd_result_destroy(result);
	opd_request_destroy(request);
	opd_close(client);
	opd_close(other);
	house_stop(&house);
	open_house(); /* for close_house */
}
END_TEST

static void read_turn(void *turn)
{
	atomic_store((_Atomic uint64_t *)turn, house.server->loops[0].turn);
}

/* How often the loop has gone round. */
static uint64_t loop_turns(void)
{
	static _Atomic uint64_t turn;
	atomic_store(&turn, 0);
	OK(server_post(house.server, read_turn, &turn, &error));
	house_await_count(&turn, 1);
	return atomic_load(&turn);
}

/* Counted in turns of the loop, which are 20 us each while it looks at a ring, and a handful a second while it sleeps. */
START_TEST(a_polling_client_that_does_nothing_lets_the_loop_sleep)
{
	opd_client *client = ringing(0, 1000000);
	OK(opd_ping(client, &error));
	(void)poll(NULL, 0, 50);
	const uint64_t before = loop_turns();
	(void)poll(NULL, 0, 400);
	ck_assert_uint_lt(loop_turns() - before, 100);
	OK(opd_ping(client, &error));
	opd_close(client);
}
END_TEST

START_TEST(who_cannot_have_rings_is_told_why)
{
	opd_client *client = NULL;
	opd_connect_options options = {.struct_bytes = sizeof options, .rings = true, .ring_bytes = 5000};
	fails(opd_connect(house.address, &options, &client, &error), OPD_INVALID_ARGUMENT, "expected a power of two");
	options.ring_bytes = 1 << 16;
	fails(opd_connect(house.address, &options, &client, &error), OPD_RESOURCE_EXHAUSTED, "131072 bytes together, at most 65536");
	char address[160];
	(void)snprintf(address, sizeof address, "%s?rings&poll=20", house.address);
	fails(opd_connect(address, NULL, &client, &error), OPD_INVALID_ARGUMENT, "option \"poll=20\", expected rings, shm or poll= with a time");
	const char *const settings[] = {"limits.rings", "0", NULL};
	opd_close(other);
	house_stop(&house);
	open_with(settings);
	fails(opd_connect(house.address, &options, &client, &error), OPD_FAILED_PRECONDITION, "this session can't");
}
END_TEST

/* ---- By hand ---- */

struct raw {
	int fd;
	int memory;
	int wake;
	int watch;
	uint64_t last;
	struct arena arena;
	uint8_t *map;
	struct ring_header *header;
	struct ring_writer requests;
	struct ring_reader replies;
};

#define RAW_BYTES 4096u

static void *encode(struct raw *raw, const struct msg_request *message, size_t *bytes_out)
{
	struct codec_buffer buffer;
	OK(codec_encode_request(&raw->arena, message, &buffer, &error));
	const struct frame_header header = {
	    .version = FRAME_VERSION, .type = FRAME_REQUEST, .request_id = ++raw->last, .envelope_bytes = (uint32_t)buffer.envelope_bytes};
	frame_encode(&header, buffer.frame);
	*bytes_out = FRAME_HEADER_BYTES + buffer.envelope_bytes;
	return buffer.frame;
}

static void send_with(const struct raw *raw, const void *frame, size_t bytes, int descriptor)
{
	_Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec piece = {(void *)(uintptr_t)frame, bytes};
	struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
	if (descriptor >= 0) {
		message.msg_control = control;
		message.msg_controllen = sizeof control;
		struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
		rights->cmsg_level = SOL_SOCKET;
		rights->cmsg_type = SCM_RIGHTS;
		rights->cmsg_len = CMSG_LEN(sizeof descriptor);
		memcpy(CMSG_DATA(rights), &descriptor, sizeof descriptor);
	}
	ck_assert_int_eq(sendmsg(raw->fd, &message, MSG_NOSIGNAL), (ssize_t)bytes);
}

/* A frame of the socket; descriptors that come with it are the session's rings'. */
static struct msg_reply reply_of(struct raw *raw)
{
	uint8_t bytes[4096];
	_Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(2 * sizeof(int))];
	struct iovec piece = {bytes, sizeof bytes};
	struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	ck_assert_int_ge(recvmsg(raw->fd, &message, MSG_CMSG_CLOEXEC), FRAME_HEADER_BYTES);
	const struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
	if (rights != NULL) {
		ck_assert_uint_eq(rights->cmsg_len, CMSG_LEN(2 * sizeof(int)));
		memcpy(&raw->wake, CMSG_DATA(rights), sizeof(int));
		memcpy(&raw->watch, CMSG_DATA(rights) + sizeof(int), sizeof(int));
	}
	struct frame_header header;
	struct msg_reply reply = {0};
	OK(frame_decode(bytes, &header, &error));
	if (header.type == FRAME_REPLY)
		OK(codec_decode_reply(&raw->arena, bytes + FRAME_HEADER_BYTES, header.envelope_bytes, &reply, &error));
	return reply;
}

static void raw_open(struct raw *raw)
{
	*raw = (struct raw){.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), .memory = -1, .wake = -1, .watch = -1};
	arena_init(&raw->arena, 1u << 20);
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	const char *path = house.address + strlen("unix:");
	ck_assert_uint_lt(strlen(path), sizeof address.sun_path);
	memcpy(address.sun_path, path, strlen(path) + 1);
	ck_assert_int_eq(connect(raw->fd, (const struct sockaddr *)&address, sizeof address), 0);
	const struct msg_text features[] = {msg_text("rings"), msg_text("cancel")};
	const struct msg_hello hello = {.version_min = 1, .version_max = 1, .feature_count = 2, .features = features};
	struct codec_buffer buffer;
	OK(codec_encode_hello(&raw->arena, &hello, &buffer, &error));
	const struct frame_header header = {.version = FRAME_VERSION, .type = FRAME_HELLO, .envelope_bytes = (uint32_t)buffer.envelope_bytes};
	frame_encode(&header, buffer.frame);
	send_with(raw, buffer.frame, FRAME_HEADER_BYTES + buffer.envelope_bytes, -1);
	(void)reply_of(raw);
}

static void close_fd(int fd)
{
	if (fd >= 0)
		(void)close(fd);
}

static void raw_close(struct raw *raw)
{
	close_fd(raw->fd);
	close_fd(raw->memory);
	close_fd(raw->wake);
	close_fd(raw->watch);
	if (raw->map != NULL)
		(void)munmap(raw->map, RING_HEADER_BYTES + 2 * RAW_BYTES);
	arena_fini(&raw->arena);
}

static int memfd_of(off_t bytes, int seals)
{
	const int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, bytes), 0);
	ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
	return fd;
}

static struct msg_reply attach(struct raw *raw, int fd, uint64_t request_bytes, uint64_t reply_bytes)
{
	const struct msg_request message = {.kind = MSG_REQUEST_ATTACH_RINGS, .rings = {request_bytes, reply_bytes, 1000}};
	size_t bytes;
	const void *frame = encode(raw, &message, &bytes);
	send_with(raw, frame, bytes, fd);
	return reply_of(raw);
}

/* With rings of RAW_BYTES. */
static void raw_ring(struct raw *raw)
{
	raw_open(raw);
	raw->memory = memfd_of(RING_HEADER_BYTES + 2 * RAW_BYTES, F_SEAL_SHRINK);
	const struct msg_reply reply = attach(raw, raw->memory, RAW_BYTES, RAW_BYTES);
	ck_assert_msg(reply.status == OPD_OK && reply.kind == MSG_REPLY_RINGS, "%s", reply.message.data);
	ck_assert(raw->wake >= 0 && raw->watch >= 0);
	raw->map = mmap(NULL, RING_HEADER_BYTES + 2 * RAW_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, raw->memory, 0);
	ck_assert_ptr_ne(raw->map, MAP_FAILED);
	raw->header = (struct ring_header *)(void *)raw->map;
	uint8_t *data = raw->map + RING_HEADER_BYTES;
	ring_writer_init(&raw->requests, &raw->header->request_head, &raw->header->request_tail, data, RAW_BYTES);
	ring_reader_init(&raw->replies, &raw->header->reply_head, &raw->header->reply_tail, data + RAW_BYTES, RAW_BYTES);
}

static void wake(const struct raw *raw)
{
	const uint64_t one = 1;
	ck_assert_int_eq(write(raw->wake, &one, sizeof one), sizeof one);
}

/* Whatever the daemon waits for. */
static void put(struct raw *raw, const void *bytes, size_t count)
{
	ring_write(&raw->requests, bytes, count);
	(void)!ring_publish(&raw->requests, &raw->header->server_waits);
	wake(raw);
}

static void put_request(struct raw *raw, msg_request_kind kind)
{
	const struct msg_request message = {.kind = kind};
	size_t bytes;
	const void *frame = encode(raw, &message, &bytes);
	put(raw, frame, bytes);
}

static void await_log(const char *event, const char *also)
{
	for (int i = 0; i < 5000 && house_log_count(&house, event, also) == 0; i++)
		(void)poll(NULL, 0, 1);
	ck_assert_msg(house_log_count(&house, event, also) != 0, "\"%s\" … \"%s\" isn't in the log: %s", event, also, house_log(&house));
}

static void await_filled(const struct raw *raw)
{
	for (int i = 0; i < 5000 && ring_filled(&raw->replies) == 0; i++)
		(void)poll(NULL, 0, 1);
	ck_assert_uint_ne(ring_filled(&raw->replies), 0);
}

static void await_end(const struct raw *raw)
{
	char byte;
	ck_assert_int_eq(recv(raw->fd, &byte, 1, 0), 0);
}

static void refuses(struct raw *raw, int fd, uint64_t request_bytes, uint64_t reply_bytes, opd_status expected, const char *part)
{
	const struct msg_reply reply = attach(raw, fd, request_bytes, reply_bytes);
	ck_assert_msg(reply.status == expected && strstr(reply.message.data, part) != NULL, "%s: %s", opd_status_name(reply.status), reply.message.data);
	close_fd(fd);
}

START_TEST(every_other_descriptor_and_size_is_refused)
{
	struct raw raw;
	int pipes[2];
	raw_open(&raw);
	ck_assert_int_eq(pipe2(pipes, O_CLOEXEC), 0);
	refuses(&raw, pipes[0], 4096, 4096, OPD_INVALID_ARGUMENT, "attach_rings: the descriptor is pipe:[");
	(void)close(pipes[1]);
	refuses(&raw, open("/dev/zero", O_RDWR | O_CLOEXEC), 4096, 4096, OPD_INVALID_ARGUMENT, "/dev/zero, expected a memfd");
	refuses(&raw, memfd_of(12288, F_SEAL_GROW), 4096, 4096, OPD_INVALID_ARGUMENT, "isn't sealed against shrinking");
	refuses(&raw, memfd_of(12288, F_SEAL_SHRINK | F_SEAL_WRITE), 4096, 4096, OPD_INVALID_ARGUMENT, "can't be written");
	refuses(&raw, memfd_of(12287, F_SEAL_SHRINK), 4096, 4096, OPD_INVALID_ARGUMENT, "12288 bytes of a memfd of 12287");
	refuses(&raw, memfd_of(12288, F_SEAL_SHRINK), 4096, 0, OPD_INVALID_ARGUMENT, "expected powers of two from 4096 to 16777216");
	refuses(&raw, memfd_of(12288, F_SEAL_SHRINK), 6000, 4096, OPD_INVALID_ARGUMENT, "expected powers of two");
	refuses(&raw, memfd_of(12288, F_SEAL_SHRINK), 1ull << 63, 1ull << 63, OPD_INVALID_ARGUMENT, "expected powers of two");
	refuses(&raw, -1, 4096, 4096, OPD_INVALID_ARGUMENT, "no descriptor came");
	raw_close(&raw);
	descriptors += 2; /* the pipe to the thread that closes what isn't memory */
}
END_TEST

START_TEST(rings_are_attached_once_and_when_nothing_is_under_way)
{
	struct raw raw;
	raw_open(&raw);
	const uint8_t value[4] = {0};
	struct msg_tensor tensor = {.dtype = OPD_f32, .rank = 1, .shape = {1}, .source = MSG_SOURCE_INLINE, .inlined = {value, sizeof value}};
	struct msg_arg arg = {.kind = MSG_ARG_TENSOR, .count = 1, .tensor = &tensor};
	const struct msg_request held = {.kind = MSG_REQUEST_RUN, .run = {.op = msg_text("lab_wait"), .arg_count = 1, .args = &arg}};
	size_t bytes;
	const void *frame = encode(&raw, &held, &bytes);
	send_with(&raw, frame, bytes, -1);
	refuses(&raw, memfd_of(12288, F_SEAL_SHRINK), 4096, 4096, OPD_FAILED_PRECONDITION, "1 other requests are under way");
	lab_gate(true);
	raw_close(&raw);
	raw_ring(&raw);
	put_request(&raw, MSG_REQUEST_PING);
	await_filled(&raw);
	raw.replies.at = ring_filled(&raw.replies);
	(void)!ring_release(&raw.replies, &raw.header->server_waits);
	const struct msg_request again = {.kind = MSG_REQUEST_ATTACH_RINGS, .rings = {4096, 4096, 0}};
	frame = encode(&raw, &again, &bytes);
	put(&raw, frame, bytes);
	await_filled(&raw);
	ck_assert_ptr_nonnull(memmem(raw.map, RING_HEADER_BYTES + 2 * RAW_BYTES, "has its rings already", strlen("has its rings already")));
	raw_close(&raw);
}
END_TEST

START_TEST(indices_out_of_range_end_the_session_with_a_logged_reason)
{
	static const uint64_t values[] = {RAW_BYTES + 1, UINT64_MAX, 1ull << 63, 1ull << 32};
	struct raw raw;
	raw_ring(&raw);
	if (_i < 4) {
		atomic_store(&raw.header->request_head, values[_i]);
		wake(&raw);
		await_log("session closed", "rings: the client's index of requests written is");
	} else {
		atomic_store(&raw.header->reply_tail, values[_i - 4] / 2 + RAW_BYTES);
		put_request(&raw, MSG_REQUEST_PING);
		await_log("session closed", "rings: the client's index of replies read is");
	}
	await_end(&raw);
	raw_close(&raw);
}
END_TEST

/* An index that goes back within the ring shows old bytes again, which are whatever they are; the session's own daemon state doesn't move with it. */
START_TEST(garbage_in_the_ring_is_a_protocol_error_said_in_the_ring)
{
	static const char *const lines[] = {"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: y\r\n\r\n", "OPD1\1\3\0\0\1\0\0\0\0\0\0\0\xff\xff\xff\xff\0\0\0\0\0\0\0\0\0\0\0\0"};
	struct raw raw;
	raw_ring(&raw);
	put(&raw, lines[_i], _i == 0 ? strlen(lines[0]) : FRAME_HEADER_BYTES);
	await_log("protocol error", _i == 0 ? "an HTTP request" : "envelope of 4294967295 bytes");
	await_filled(&raw); /* the goodbye */
	uint8_t bytes[FRAME_HEADER_BYTES];
	struct frame_header header;
	ring_read(&raw.replies, bytes, sizeof bytes);
	OK(frame_decode(bytes, &header, &error));
	ck_assert_int_eq(header.type, FRAME_GOAWAY);
	await_end(&raw);
	raw_close(&raw);
}
END_TEST

START_TEST(frames_on_the_socket_are_refused_once_there_are_rings)
{
	struct raw raw;
	raw_ring(&raw);
	const struct msg_request message = {.kind = MSG_REQUEST_PING};
	size_t bytes;
	const void *frame = encode(&raw, &message, &bytes);
	send_with(&raw, frame, bytes, -1);
	await_log("protocol error", "bytes on the socket of a session with rings");
	await_filled(&raw);
	await_end(&raw);
	raw_close(&raw);
}
END_TEST

/* What comes behind the request, in one piece with it, is on the socket too. */
START_TEST(nothing_may_follow_the_request_for_rings_on_the_socket)
{
	struct raw raw;
	raw_open(&raw);
	const struct msg_request message = {.kind = MSG_REQUEST_ATTACH_RINGS, .rings = {RAW_BYTES, RAW_BYTES, 0}}, ping = {.kind = MSG_REQUEST_PING};
	uint8_t both[512];
	size_t first, second;
	const void *frame = encode(&raw, &message, &first);
	memcpy(both, frame, first);
	frame = encode(&raw, &ping, &second);
	memcpy(both + first, frame, second);
	const int fd = memfd_of(RING_HEADER_BYTES + 2 * RAW_BYTES, F_SEAL_SHRINK);
	send_with(&raw, both, first + second, fd);
	(void)close(fd);
	await_log("protocol error", "bytes on the socket of a session with rings");
	raw_close(&raw);
}
END_TEST

START_TEST(descriptors_that_no_frame_takes_are_bounded_and_closed)
{
	struct raw raw;
	raw_ring(&raw);
	const int fd = memfd_of(4096, F_SEAL_SHRINK);
	const unsigned before = open_descriptors();
	const uint8_t zero = 0;
	for (int i = 0; i < 100; i++)
		send_with(&raw, &zero, 1, fd);
	put_request(&raw, MSG_REQUEST_PING);
	await_filled(&raw);
	/* One more may just have come, and be about to be closed: each time that is looked. */
	unsigned open = open_descriptors();
	for (int i = 0; i < 5000 && open > before + CONN_DESCRIPTORS; i++) {
		(void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
		open = open_descriptors();
	}
	ck_assert_uint_le(open, before + CONN_DESCRIPTORS);
	(void)close(fd);
	raw_close(&raw);
}
END_TEST

/* The eventfd's flags are the client's to change, and its count too: neither a read nor a write of the daemon may wait for it. */
START_TEST(an_eventfd_made_blocking_emptied_or_filled_holds_nobody_up)
{
	struct raw raw;
	raw_ring(&raw);
	for (int i = 0; i < 200; i++) {
		uint64_t count = 1;
		ck_assert_int_eq(fcntl(raw.wake, F_SETFL, O_NONBLOCK), 0); /* it is full, and the daemon needn't empty it: who fills it waits for nobody but himself */
		(void)!write(raw.wake, &count, sizeof count);
		(void)!read(raw.wake, &count, sizeof count);
		count = UINT64_MAX - 1;
		(void)!write(raw.wake, &count, sizeof count);
		ck_assert_int_eq(fcntl(raw.wake, F_SETFL, 0), 0);
		OK(opd_ping(other, &error));
	}
	raw_close(&raw);
}
END_TEST

struct scribbler {
	struct raw *raw;
	_Atomic bool stop;
	unsigned seed;
	bool indices;
};

/* All over the memory: indices now and then, lengths of frames, everything. */
static void *scribble(void *context)
{
	struct scribbler *scribbler = context;
	uint64_t state = scribbler->seed * 2654435761u + 1;
	while (!atomic_load(&scribbler->stop)) {
		state = state * 6364136223846793005u + 1442695040888963407u;
		const uint64_t at = (state >> 33) % (2 * RAW_BYTES / 8);
		*(volatile uint64_t *)(void *)(scribbler->raw->map + RING_HEADER_BYTES + at * 8) = state;
		if (scribbler->indices && (state >> 20) % 50 == 0)
			atomic_store((state & 1) != 0 ? &scribbler->raw->header->request_head : &scribbler->raw->header->reply_tail, (state >> 30) % (3 * RAW_BYTES));
	}
	return NULL;
}

/* Requests go in whole and change under the daemon's eyes. It may answer, refuse, or end that session; the others go on. Hardening: memory-rewritten */
START_TEST(memory_rewritten_at_any_time_harms_nobody_else)
{
	for (unsigned seed = 0; seed < 30; seed++) {
		struct raw raw;
		raw_ring(&raw);
		struct scribbler scribbler = {.raw = &raw, .seed = seed, .indices = seed % 3 == 0};
		pthread_t thread;
		ck_assert_int_eq(pthread_create(&thread, NULL, scribble, &scribbler), 0);
		for (int i = 0; i < 50; i++) {
			const uint64_t room = ring_room(&raw.requests);
			if (room != RING_BROKEN && room >= 128)
				put_request(&raw, i % 2 == 0 ? MSG_REQUEST_PING : MSG_REQUEST_INFO);
			OK(opd_ping(other, &error));
		}
		atomic_store(&scribbler.stop, true);
		(void)pthread_join(thread, NULL);
		raw_close(&raw);
	}
}
END_TEST

/* Replies that nobody reads fill their ring; the daemon holds what is left, reads no more requests than it may, and ends the session when nothing moves. */
START_TEST(a_client_that_reads_no_replies_is_ended)
{
	struct raw raw;
	raw_ring(&raw);
	for (int i = 0; i < 40; i++) {
		if (ring_room(&raw.requests) >= 128)
			put_request(&raw, MSG_REQUEST_LIST_OPS);
		OK(opd_ping(other, &error));
	}
	await_log("session closed", "the client doesn't read its replies");
	await_end(&raw);
	raw_close(&raw);
}
END_TEST

START_TEST(half_a_frame_in_the_ring_stalls_and_is_ended)
{
	struct raw raw;
	raw_ring(&raw);
	put(&raw, "OPD1\1\3", 6);
	await_log("session closed", "a half-sent request stalled");
	await_end(&raw);
	raw_close(&raw);
}
END_TEST

/* Leaves in every state: with requests queued, half written, answers unread. */
START_TEST(a_client_that_vanishes_at_any_point_leaves_nothing)
{
	enum { COUNT = 5000 };
	float *values = numbers(COUNT);
	for (int i = 0; i < 60; i++) {
		opd_client *client = ringing(4096, i % 2 == 0 ? 0 : 20);
		opd_request *request = relu_of(values, COUNT);
		for (int k = 0; k < i % 7; k++) {
			opd_ticket ticket;
			OK(opd_submit(client, request, &ticket, &error));
		}
		if (i % 3 == 0)
			OK(opd_process(client, &error));
		opd_request_destroy(request);
		opd_close(client);
	}
	free(values);
}
END_TEST

/* Requests beyond the limit wait in the ring, read or not. */
START_TEST(the_limit_of_requests_in_flight_holds)
{
	opd_client *client = ringing(1 << 15, 1000); /* granted: the configuration's 30 us */
	await_log("rings attached", "poll_us=30");
	float value = 1;
	opd_request *request = opd_request_create("lab_wait");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, &value, 1));
	opd_ticket tickets[20];
	for (int i = 0; i < 20; i++)
		OK(opd_submit(client, request, &tickets[i], &error));
	house_await_count(&lab_counts.waiting, 1);
	lab_gate(true);
	for (int i = 0; i < 20; i++) {
		opd_result *result = NULL;
		OK(opd_wait(client, tickets[i], UINT64_MAX, &result, &error));
		opd_result_destroy(result);
	}
	opd_request_destroy(request);
	opd_close(client);
}
END_TEST

static Suite *suite(void)
{
	Suite *made = suite_create("rings");
	TCase *works = tcase_create("works"), *hostile = tcase_create("hostile"), *strict = tcase_create("strict");
	TCase *const cases[] = {works, hostile, strict};
	for (size_t i = 0; i < 3; i++) {
		tcase_set_timeout(cases[i], 60);
		tcase_add_checked_fixture(cases[i], cases[i] == strict ? open_strict : open_house, close_house);
		suite_add_tcase(made, cases[i]);
	}
	tcase_add_loop_test(works, payloads_of_every_size_pass_through_rings_of_every_size, 0, 6);
	tcase_add_loop_test(works, many_requests_in_flight_fill_both_rings_and_come_back, 0, 3);
	tcase_add_loop_test(works, no_wake_up_is_lost_in_ten_thousand_calls, 0, 2);
	tcase_add_test(works, requests_that_concern_all_are_answered_however_soon_they_follow_each_other);
	tcase_add_test(works, operands_and_results_in_shared_ranges_go_with_rings);
	tcase_add_test(works, an_event_loop_is_told_of_everything);
	tcase_add_loop_test(works, a_wait_ends_at_its_time_and_a_cancel_reaches_the_daemon, 0, 2);
	tcase_add_test(works, a_polling_client_that_does_nothing_lets_the_loop_sleep);
	tcase_add_test(works, a_drain_answers_what_is_in_flight_and_says_goodbye);
	tcase_add_test(hostile, every_other_descriptor_and_size_is_refused);
	tcase_add_test(hostile, rings_are_attached_once_and_when_nothing_is_under_way);
	tcase_add_loop_test(hostile, indices_out_of_range_end_the_session_with_a_logged_reason, 0, 8);
	tcase_add_loop_test(hostile, garbage_in_the_ring_is_a_protocol_error_said_in_the_ring, 0, 2);
	tcase_add_test(hostile, frames_on_the_socket_are_refused_once_there_are_rings);
	tcase_add_test(hostile, nothing_may_follow_the_request_for_rings_on_the_socket);
	tcase_add_test(hostile, descriptors_that_no_frame_takes_are_bounded_and_closed);
	tcase_add_test(hostile, an_eventfd_made_blocking_emptied_or_filled_holds_nobody_up);
	tcase_add_test(hostile, memory_rewritten_at_any_time_harms_nobody_else);
	tcase_add_test(hostile, a_client_that_vanishes_at_any_point_leaves_nothing);
	tcase_add_test(strict, who_cannot_have_rings_is_told_why);
	tcase_add_test(strict, a_client_that_reads_no_replies_is_ended);
	tcase_add_test(strict, half_a_frame_in_the_ring_stalls_and_is_ended);
	tcase_add_test(strict, the_limit_of_requests_in_flight_holds);
	return made;
}

int main(void)
{
	SRunner *runner = srunner_create(suite());
	srunner_run_all(runner, CK_ENV);
	const int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
