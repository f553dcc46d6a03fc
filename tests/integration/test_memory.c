/* Shared memory: operands and results that lie in regions, what is refused, regions that go or change while a kernel runs, descriptors that nobody wants. */
#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "opd/client.h"
#include "proto/codec.h"
#include "proto/frame.h"
#include "server/daemon.h"
#include "tests/lib/house.h"
#include "tests/lib/lab.h"

#define MEMORY_BYTES ((uint64_t)1 << 20)

static struct house house;
static opd_client *client;
static opd_memory *memory;
static opd_error error;

#define OK(call) ck_assert_msg((call) == OPD_OK, "%s", error.text)

static opd_client *sharing_client(void)
{
	const opd_connect_options options = {.struct_bytes = sizeof options, .shared_memory = true};
	opd_client *made = NULL;
	OK(opd_connect(house.address, &options, &made, &error));
	return made;
}

static void open_with(const char *const *settings)
{
	house_start(&house, settings);
	client = sharing_client();
	OK(opd_memory_create(client, MEMORY_BYTES, &memory, &error));
	float *values = opd_memory_data(memory);
	for (size_t i = 0; i < MEMORY_BYTES / sizeof values[0]; i++)
		values[i] = (float)(i % 1009);
}

static void open_house(void)
{
	open_with(NULL);
}

static void open_checked(void)
{
	open_with((const char *const[]){"checked", "true", NULL});
}

static void open_narrow(void)
{
	open_with((const char *const[]){"limits.regions", "2", "limits.shared", "2 MiB", NULL});
}

static void open_scarce(void)
{
	open_with((const char *const[]){"limits.session", "1536 KiB", NULL});
}

static void open_single(void)
{
	open_with((const char *const[]){"limits.in_flight", "1", NULL});
}

static void close_house(void)
{
	opd_memory_destroy(memory);
	opd_close(client);
	house_stop(&house);
}

static void fails(opd_status got, opd_status expected, const char *part)
{
	ck_assert_msg(got == expected, "%s: %s", opd_status_name(got), got == OPD_OK ? "" : error.text);
	ck_assert_msg(strstr(error.text, part) != NULL, "\"%s\" isn't in \"%s\"", part, error.text);
}

static float *at(uint64_t offset)
{
	return (float *)((uint8_t *)opd_memory_data(memory) + offset);
}

/* Good until the next call. */
static opd_operand vector(void *data, int64_t elements)
{
	static int64_t shape;
	shape = elements;
	return (opd_operand){
	    .struct_bytes = sizeof(opd_operand), .dtype = OPD_f32, .rank = 1, .shape = &shape, .source = OPD_FROM_MEMORY, .data = data, .memory = memory};
}

static opd_request *relu_of(void *data, int64_t elements)
{
	opd_request *request = opd_request_create("relu");
	const opd_operand x = vector(data, elements);
	opd_request_tensor(request, "x", &x);
	return request;
}

static opd_status run(opd_request *request, opd_result **result_out)
{
	const opd_status status = opd_run(client, request, result_out, &error);
	opd_request_destroy(request);
	return status;
}

static void refuses(opd_request *request, opd_status expected, const char *part)
{
	opd_result *result = NULL;
	fails(run(request, &result), expected, part);
	opd_result_destroy(result);
}

/* ---- What works ---- */

START_TEST(operands_and_results_lie_in_shared_memory_and_nothing_is_copied)
{
	opd_result *result = NULL;
	at(0)[3] = -3;
	at(0)[4] = 4;
	opd_request *request = relu_of(at(0), 1000);
	opd_request_output_memory(request, 0, memory, at(8192), 4096);
	OK(run(request, &result));
	const opd_tensor *tensor = opd_result_tensor(result, 0);
	ck_assert_ptr_eq(opd_tensor_data(tensor), at(8192));
	ck_assert(at(8192)[3] == 0 && at(8192)[4] == 4 && at(8192)[999] == at(0)[999]);
	opd_result_destroy(result);
}
END_TEST

START_TEST(an_operand_may_begin_anywhere_that_its_elements_may)
{
	opd_result *result = NULL;
	OK(run(relu_of(at(4), 100), &result));
	ck_assert(memcmp(opd_tensor_data(opd_result_tensor(result, 0)), at(4), 400) == 0);
	opd_result_destroy(result);
	refuses(relu_of((uint8_t *)opd_memory_data(memory) + 6, 100), OPD_INVALID_ARGUMENT, "byte offset 6, expected a multiple of 4");
}
END_TEST

START_TEST(a_last_result_byte_may_be_the_region_s_last)
{
	opd_result *result = NULL;
	opd_request *request = relu_of(at(MEMORY_BYTES - 128), 16);
	opd_request_output_memory(request, 0, memory, at(MEMORY_BYTES - 64), 64);
	OK(run(request, &result));
	ck_assert(memcmp(at(MEMORY_BYTES - 64), at(MEMORY_BYTES - 128), 64) == 0);
	opd_result_destroy(result);
}
END_TEST

/* ---- Graphs ---- */

static opd_value relu_node(opd_graph *graph, opd_value x)
{
	opd_request *node = opd_request_create("relu");
	opd_request_value(node, NULL, x);
	const opd_value value = opd_graph_node(graph, NULL, node);
	opd_request_destroy(node);
	return value;
}

/* Floats: x's, relu once and (read by it, in the region) twice; ids: the largest of each. */
static uint64_t graph_of_three(void)
{
	uint64_t id = 0;
	opd_graph *graph = opd_graph_create("three");
	const opd_value once = relu_node(graph, opd_graph_input(graph, "x"));
	opd_request *node = opd_request_create("argmax");
	opd_request_value(node, NULL, once);
	opd_graph_output(graph, "once", once);
	opd_graph_output(graph, "twice", relu_node(graph, once));
	opd_graph_output(graph, "largest", opd_graph_node(graph, NULL, node));
	opd_request_destroy(node);
	OK(opd_graph_register(client, graph, &id, &error));
	opd_graph_destroy(graph);
	return id;
}

static opd_request *run_of_three(uint64_t id, void *x, int64_t elements, const uint64_t at_bytes[3], const uint64_t bytes[3])
{
	opd_request *request = opd_request_graph(id);
	const opd_operand operand = vector(x, elements);
	opd_request_tensor(request, NULL, &operand);
	for (uint32_t i = 0; i < 3; i++)
		opd_request_output_memory(request, i, memory, at(at_bytes[i]), bytes[i]);
	return request;
}

static void graph_results_are_where_they_are_wanted(void)
{
	const uint64_t id = graph_of_three();
	for (uint64_t round = 0; round < 3; round++) { /* elsewhere each time, and in a buffer of the daemon's in between */
		const uint64_t places[3] = {8192 + round * 64, 16384 + round * 128, 65536 - 64 * (round + 1)};
		opd_result *result = NULL;
		at(0)[3] = -3;
		at(0)[500 + round] = 5000;
		OK(run(run_of_three(id, at(0), 1000, places, (const uint64_t[]){4000, 4000, 8}), &result));
		for (uint32_t i = 0; i < 3; i++)
			ck_assert_ptr_eq(opd_tensor_data(opd_result_tensor(result, i)), at(places[i]));
		ck_assert(at(places[0])[3] == 0 && at(places[0])[999] == at(0)[999] && at(places[1])[999] == at(0)[999]);
		ck_assert_int_eq(*(const int64_t *)(const void *)at(places[2]), 500 + (int64_t)round);
		opd_result_destroy(result);
		opd_request *sent = opd_request_graph(id);
		const opd_operand operand = vector(at(0), 1000);
		opd_request_tensor(sent, NULL, &operand);
		OK(run(sent, &result));
		ck_assert_float_eq(((const float *)opd_tensor_data(opd_result_tensor(result, 1)))[500 + round], 5000);
		opd_result_destroy(result);
		at(0)[500 + round] = 0;
	}
}

START_TEST(results_of_a_graph_lie_in_shared_memory_too)
{
	graph_results_are_where_they_are_wanted();
}
END_TEST

START_TEST(results_of_a_graph_are_copied_there_in_checked_mode)
{
	graph_results_are_where_they_are_wanted();
}
END_TEST

START_TEST(ranges_of_a_graph_s_results_are_held_to_the_same_rules)
{
	const uint64_t id = graph_of_three();
	at(4096)[0] = 99;
	refuses(run_of_three(id, at(0), 1000, (const uint64_t[]){4096, 8192, 16384}, (const uint64_t[]){3999, 4000, 8}), OPD_INVALID_ARGUMENT,
	        "three: result 0 has 4000 bytes, but 3999");
	refuses(run_of_three(id, at(0), 1000, (const uint64_t[]){4096, 8000, 16384}, (const uint64_t[]){4000, 4000, 8}), OPD_INVALID_ARGUMENT,
	        "three: result 1 overlaps result 0");
	refuses(run_of_three(id, at(0), 1000, (const uint64_t[]){8192, 16384, 3968}, (const uint64_t[]){4000, 4000, 64}), OPD_INVALID_ARGUMENT,
	        "three: result 2 overlaps x");
	ck_assert_float_eq(at(4096)[0], 99);
	opd_memory_destroy(memory);
	memory = NULL;
	OK(opd_memory_create(client, MEMORY_BYTES, &memory, &error));
	graph_results_are_where_they_are_wanted();
}
END_TEST

/* Hardening: memory-unregistered */
START_TEST(a_region_detached_in_flight_stays_until_the_kernel_is_done)
{
	enum { COUNT = 8, BYTES = 1 << 16 };
	opd_ticket tickets[COUNT];
	for (int i = 0; i < COUNT; i++) { /* each to a range of its own: several lanes' threads run them at once */
		opd_request *request = relu_of(at(0), BYTES / 4);
		opd_request_output_memory(request, 0, memory, at((uint64_t)(1 << 19) + (uint64_t)i * BYTES), BYTES);
		OK(opd_submit(client, request, &tickets[i], &error));
		opd_request_destroy(request);
	}
	opd_memory_destroy(memory);
	memory = NULL;
	for (int i = 0; i < COUNT; i++) {
		opd_result *result = NULL;
		OK(opd_wait(client, tickets[i], UINT64_MAX, &result, &error));
		opd_result_destroy(result);
	}
	OK(opd_memory_create(client, MEMORY_BYTES, &memory, &error));
}
END_TEST

START_TEST(memory_outlives_its_client)
{
	opd_close(client);
	at(0)[0] = 7;
	opd_memory_destroy(memory);
	client = sharing_client();
	OK(opd_memory_create(client, MEMORY_BYTES, &memory, &error));
}
END_TEST

/* The daemon may have to keep the pages when their client is gone. */
START_TEST(mapped_bytes_are_charged_until_nobody_needs_them)
{
	opd_memory *second = NULL;
	house_await_bytes(&house, MEMORY_BYTES);
	OK(opd_memory_create(client, 8192, &second, &error));
	house_await_bytes(&house, MEMORY_BYTES + 8192);
	const opd_sharing *sharing = NULL;
	OK(opd_sessions(client, 0, &sharing, &error));
	ck_assert_uint_eq(sharing->sessions[0].memory_bytes, MEMORY_BYTES + 8192);
	opd_document_free(sharing);
	opd_memory_destroy(second);
	house_await_bytes(&house, MEMORY_BYTES);
	opd_close(client);
	house_await_bytes(&house, 0);
	opd_memory_destroy(memory);
	client = sharing_client();
	OK(opd_memory_create(client, MEMORY_BYTES, &memory, &error));
}
END_TEST

START_TEST(mapped_bytes_are_held_to_the_session_s_memory)
{
	opd_memory *second = NULL;
	fails(opd_memory_create(client, MEMORY_BYTES / 2 + 4096, &second, &error), OPD_RESOURCE_EXHAUSTED, "attach_memory: session memory: 528384 bytes wanted, 1048576 of at most 1572864");
	house_await_bytes(&house, MEMORY_BYTES);
	OK(opd_memory_create(client, MEMORY_BYTES / 2, &second, &error));
	opd_request *request = relu_of(at(0), 4);
	refuses(request, OPD_RESOURCE_EXHAUSTED, "session memory: 16 bytes wanted, 1572864 of at most 1572864");
	opd_memory_destroy(second);
}
END_TEST

/* On the loop, and on a lane. What is written to the memory afterwards isn't the tensor's. */
START_TEST(uploads_and_their_parts_come_from_shared_memory)
{
	static const int64_t counts[] = {16, 50000};
	for (size_t i = 0; i < 2; i++) {
		opd_operand x = vector(at(0), counts[i]);
		opd_handle handle;
		opd_result *result = NULL;
		float *expected = malloc((size_t)counts[i] * sizeof *expected);
		memcpy(expected, at(0), (size_t)counts[i] * sizeof *expected);
		OK(opd_upload(client, &x, NULL, &handle, &error));
		at(0)[5] += 1;
		const opd_operand kept = {.struct_bytes = sizeof kept, .source = OPD_FROM_HANDLE, .handle = handle};
		OK(opd_fetch(client, &kept, &result, &error));
		ck_assert(memcmp(opd_tensor_data(opd_result_tensor(result, 0)), expected, (size_t)counts[i] * sizeof *expected) == 0);
		opd_result_destroy(result);
		free(expected);
	}
	opd_operand outside = vector(at(MEMORY_BYTES - 64), 64);
	opd_handle none;
	ck_assert_int_eq(opd_upload(client, &outside, NULL, &none, &error), OPD_INVALID_ARGUMENT);
}
END_TEST

static opd_request *fetch_into(const opd_operand *operand, void *to, uint64_t bytes)
{
	opd_request *request = opd_fetch_create(operand);
	opd_request_output_memory(request, 0, memory, to, bytes);
	return request;
}

static opd_handle upload_of(const float *values, int64_t elements)
{
	const opd_operand x = {.struct_bytes = sizeof x, .dtype = OPD_f32, .rank = 1, .shape = &elements, .data = values};
	opd_handle handle;
	OK(opd_upload(client, &x, NULL, &handle, &error));
	return handle;
}

/* On the loop, on a lane, strided, empty; there is more room than the tensor needs, and what lies behind it stays. */
START_TEST(fetches_go_to_shared_memory_whole_or_as_views)
{
	enum { COUNT = 50000 };
	float *values = malloc(COUNT * sizeof *values);
	for (int i = 0; i < COUNT; i++)
		values[i] = (float)i / 3;
	const opd_handle handle = upload_of(values, COUNT);
	const int64_t small[1] = {16}, turned[2] = {100, 400}, turned_strides[2] = {1, 100}, none[2] = {3, 0};
	const struct {
		uint32_t rank;
		const int64_t *shape, *strides;
		uint64_t elements;
	} views[] = {{0, NULL, NULL, COUNT}, {1, small, NULL, 16}, {2, turned, turned_strides, 40000}, {2, none, NULL, 0}};
	for (size_t v = 0; v < sizeof views / sizeof views[0]; v++) {
		opd_operand kept = {.struct_bytes = sizeof kept, .source = OPD_FROM_HANDLE, .handle = handle};
		kept.dtype = views[v].shape == NULL ? OPD_DTYPE_NONE : OPD_f32;
		kept.rank = views[v].rank;
		kept.shape = views[v].shape;
		kept.strides = views[v].strides;
		const float behind = at(64)[views[v].elements];
		opd_result *result = NULL;
		OK(run(fetch_into(&kept, at(64), views[v].elements * 4 + 64), &result));
		const opd_tensor *tensor = opd_result_tensor(result, 0);
		ck_assert_uint_eq(tensor->elements, views[v].elements);
		ck_assert(views[v].elements == 0 || opd_tensor_data(tensor) == (const void *)at(64));
		for (uint64_t i = 0; i < views[v].elements; i++)
			ck_assert_float_eq(at(64)[i], values[views[v].strides == NULL ? i : i / 400 + i % 400 * 100]);
		ck_assert_float_eq(at(64)[views[v].elements], behind);
		opd_result_destroy(result);
	}
	free(values);
}
END_TEST

/* It waits for its tensor, and its memory is detached meanwhile. */
START_TEST(a_region_detached_while_a_fetch_waits_for_it_stays_until_it_is_filled)
{
	const opd_operand x = vector(at(0), 16);
	opd_ticket made, fetched;
	opd_result *result = NULL;
	opd_request *request = opd_request_create("lab_wait");
	lab_reset();
	opd_request_tensor(request, NULL, &x);
	opd_request_output(request, 0, true, false);
	OK(opd_submit(client, request, &made, &error));
	opd_request_destroy(request);
	const opd_operand kept = {.struct_bytes = sizeof kept, .source = OPD_FROM_RESULT, .ticket = made, .output = 0};
	request = fetch_into(&kept, at(4096), 64);
	OK(opd_submit(client, request, &fetched, &error));
	opd_request_destroy(request);
	opd_memory_destroy(memory);
	memory = NULL;
	OK(opd_ping(client, &error)); /* the daemon has seen all that */
	lab_gate(true);
	OK(opd_wait(client, made, UINT64_MAX, &result, &error));
	opd_result_destroy(result);
	OK(opd_wait(client, fetched, UINT64_MAX, &result, &error));
	ck_assert_uint_eq(opd_result_tensor(result, 0)->elements, 16);
	opd_result_destroy(result);
	OK(opd_memory_create(client, MEMORY_BYTES, &memory, &error));
}
END_TEST

/* ---- What is refused ---- */

START_TEST(fetches_to_other_places_are_refused_and_write_nothing)
{
	const float values[16] = {1};
	const opd_handle handle = upload_of(values, 16);
	const opd_operand kept = {.struct_bytes = sizeof kept, .source = OPD_FROM_HANDLE, .handle = handle};
	at(4096)[0] = 99;
	refuses(fetch_into(&kept, at(4096), 63), OPD_INVALID_ARGUMENT, "fetch: the tensor has 64 bytes, but 63 of region 1 were named");
	refuses(fetch_into(&kept, at(4096), 0), OPD_INVALID_ARGUMENT, "64 bytes, but 0 of region 1");
	refuses(fetch_into(&kept, at(4096) + 1, 64), OPD_INVALID_ARGUMENT, "doesn't lie at a multiple of 64");
	refuses(fetch_into(&kept, at(MEMORY_BYTES - 64), 128), OPD_INVALID_ARGUMENT, "doesn't lie at a multiple of 64");
	opd_request *second = opd_fetch_create(&kept);
	opd_request_output_memory(second, 1, memory, at(4096), 64);
	refuses(second, OPD_INVALID_ARGUMENT, "fetch: options of output 1, which only runs have");
	ck_assert_float_eq(at(4096)[0], 99);
	OK(opd_free(client, &handle, 1, &error));
	refuses(fetch_into(&kept, at(4096), 64), OPD_NOT_FOUND, "");
}
END_TEST

START_TEST(results_overlap_neither_operands_nor_each_other)
{
	opd_request *request = relu_of(at(0), 100);
	opd_request_output_memory(request, 0, memory, at(384), 400);
	refuses(request, OPD_INVALID_ARGUMENT, "result 0 overlaps x in shared memory");
}
END_TEST

START_TEST(a_range_that_is_too_small_for_the_result_is_refused_before_the_kernel)
{
	at(4096)[0] = 99;
	opd_request *request = relu_of(at(0), 100);
	opd_request_output_memory(request, 0, memory, at(4096), 399);
	refuses(request, OPD_INVALID_ARGUMENT, "result 0 has 400 bytes, but 399 of region 1 were named");
	ck_assert(at(4096)[0] == 99);
}
END_TEST

START_TEST(the_limits_of_regions_and_bytes_hold)
{
	opd_memory *second = NULL, *third = NULL;
	fails(opd_memory_create(client, 2 * MEMORY_BYTES, &second, &error), OPD_RESOURCE_EXHAUSTED, "1048576 of at most 2097152 in use");
	OK(opd_memory_create(client, 4096, &second, &error));
	fails(opd_memory_create(client, 4096, &third, &error), OPD_RESOURCE_EXHAUSTED, "2 regions, at most 2");
	opd_memory_destroy(second);
	OK(opd_memory_create(client, 4096, &second, &error));
	opd_memory_destroy(second);
}
END_TEST

START_TEST(a_client_that_did_not_ask_has_no_shared_memory)
{
	opd_client *plain = house_client(&house);
	opd_memory *none = NULL;
	fails(opd_memory_create(plain, 4096, &none, &error), OPD_FAILED_PRECONDITION, "shared_memory");
	opd_close(plain);
}
END_TEST

/* ---- Contents that change ---- */

struct rewriter {
	int64_t *ids;
	_Atomic bool stop;
};

/* In turn an id that is good and one far outside of the table. */
static void *rewrite(void *context)
{
	struct rewriter *rewriter = context;
	for (uint64_t i = 0; !atomic_load(&rewriter->stop); i++)
		*(volatile int64_t *)&rewriter->ids[i % 512] = i % 3 == 0 ? INT64_MAX / 8 : 1;
	return NULL;
}

/* Hardening: memory-rewritten */
START_TEST(ids_rewritten_while_a_kernel_runs_are_read_once)
{
	struct rewriter rewriter = {.ids = (int64_t *)at(1 << 19)};
	pthread_t thread;
	for (int i = 0; i < 512; i++)
		rewriter.ids[i] = 1;
	ck_assert_int_eq(pthread_create(&thread, NULL, rewrite, &rewriter), 0);
	unsigned answered = 0;
	for (int i = 0; i < 300; i++) {
		const int64_t ids_shape[] = {512}, table_shape[] = {4, 16};
		opd_request *request = opd_request_create("embedding");
		opd_operand ids = vector(rewriter.ids, 512), table = vector(at(0), 64);
		ids.dtype = OPD_i64;
		ids.shape = ids_shape;
		table.rank = 2;
		table.shape = table_shape;
		opd_request_tensor(request, "ids", &ids);
		opd_request_tensor(request, "table", &table);
		opd_result *result = NULL;
		const opd_status status = run(request, &result);
		ck_assert_msg(status == OPD_OK || status == OPD_INVALID_ARGUMENT, "%s", error.text);
		answered++;
		opd_result_destroy(result);
	}
	atomic_store(&rewriter.stop, true);
	(void)pthread_join(thread, NULL);
	ck_assert_uint_eq(answered, 300);
}
END_TEST

/* ---- Descriptors, by hand ---- */

struct raw {
	int fd;
	uint64_t last;
	struct arena arena;
};

static void send_bytes(const struct raw *raw, void *data, size_t bytes, const int *fds, size_t count)
{
	_Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(16 * sizeof(int))] = {0};
	struct iovec piece = {data, bytes};
	struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
	if (count != 0) {
		message.msg_control = control;
		message.msg_controllen = CMSG_SPACE(count * sizeof(int));
		struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
		rights->cmsg_level = SOL_SOCKET;
		rights->cmsg_type = SCM_RIGHTS;
		rights->cmsg_len = CMSG_LEN(count * sizeof(int));
		memcpy(CMSG_DATA(rights), fds, count * sizeof(int));
	}
	ck_assert_int_eq(sendmsg(raw->fd, &message, MSG_NOSIGNAL), (ssize_t)bytes);
}

/* With its header. */
static size_t complete(struct raw *raw, struct codec_buffer *buffer, frame_type type)
{
	const struct frame_header header = {
	    .version = FRAME_VERSION, .type = (uint8_t)type, .request_id = type == FRAME_HELLO ? 0 : ++raw->last, .envelope_bytes = (uint32_t)buffer->envelope_bytes};
	frame_encode(&header, buffer->frame);
	return FRAME_HEADER_BYTES + buffer->envelope_bytes;
}

static void send_with(struct raw *raw, struct codec_buffer *buffer, frame_type type, const int *fds, size_t count)
{
	const size_t bytes = complete(raw, buffer, type);
	send_bytes(raw, buffer->frame, bytes, fds, count);
}

static void receive(int fd, void *to, size_t bytes)
{
	ck_assert_int_eq(recv(fd, to, bytes, MSG_WAITALL), (ssize_t)bytes);
}

static struct msg_reply reply_of(struct raw *raw)
{
	uint8_t head[FRAME_HEADER_BYTES], envelope[4096];
	struct frame_header header;
	struct msg_reply reply = {0};
	receive(raw->fd, head, sizeof head);
	OK(frame_decode(head, &header, &error));
	ck_assert_uint_le(header.envelope_bytes, sizeof envelope);
	receive(raw->fd, envelope, header.envelope_bytes);
	if (header.type == FRAME_REPLY)
		OK(codec_decode_reply(&raw->arena, envelope, header.envelope_bytes, &reply, &error));
	return reply;
}

static void raw_open(struct raw *raw, const char *feature)
{
	*raw = (struct raw){.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
	arena_init(&raw->arena, 1u << 20);
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	const char *path = house.address + strlen("unix:");
	ck_assert_uint_lt(strlen(path), sizeof address.sun_path);
	memcpy(address.sun_path, path, strlen(path) + 1);
	ck_assert_int_eq(connect(raw->fd, (const struct sockaddr *)&address, sizeof address), 0);
	const struct msg_text features[] = {msg_text(feature)};
	const struct msg_hello hello = {.version_min = 1, .version_max = 1, .feature_count = 1, .features = features};
	struct codec_buffer buffer;
	OK(codec_encode_hello(&raw->arena, &hello, &buffer, &error));
	send_with(raw, &buffer, FRAME_HELLO, NULL, 0);
	(void)reply_of(raw);
}

static void raw_close(struct raw *raw)
{
	(void)close(raw->fd);
	arena_fini(&raw->arena);
}

static struct msg_reply ask(struct raw *raw, struct msg_request message, const int *fds, size_t count)
{
	struct codec_buffer buffer;
	OK(codec_encode_request(&raw->arena, &message, &buffer, &error));
	send_with(raw, &buffer, FRAME_REQUEST, fds, count);
	return reply_of(raw);
}

static struct msg_reply attach(struct raw *raw, int fd, uint64_t bytes)
{
	return ask(raw, (struct msg_request){.kind = MSG_REQUEST_ATTACH_MEMORY, .memory_bytes = bytes}, &fd, fd < 0 ? 0 : 1);
}

static void says(const struct msg_reply *reply, opd_status expected, const char *part)
{
	ck_assert_msg(reply->status == expected, "%s: %s", opd_status_name(reply->status), reply->message.data);
	ck_assert_msg(strstr(reply->message.data, part) != NULL, "\"%s\" isn't in \"%s\"", part, reply->message.data);
}

static int memfd_of(off_t bytes, int seals)
{
	const int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, bytes), 0);
	ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
	return fd;
}

static unsigned open_descriptors(void)
{
	unsigned count = 0;
	DIR *folder = opendir("/proc/self/fd");
	while (readdir(folder) != NULL)
		count++;
	(void)closedir(folder);
	return count;
}

/* What isn't memory is closed by a thread of its own, soon. */
static void await_descriptors(unsigned count)
{
	for (int i = 0; i < 5000 && open_descriptors() != count; i++)
		(void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	ck_assert_uint_eq(open_descriptors(), count);
}

/* That thread is there, with the pipe by which it is told: two descriptors, from now on. */
static void make_closer(struct raw *raw)
{
	const unsigned before = open_descriptors();
	const int folder = open("/etc", O_RDONLY | O_CLOEXEC);
	(void)ask(raw, (struct msg_request){.kind = MSG_REQUEST_PING}, &folder, 1);
	(void)close(folder);
	await_descriptors(before + 2);
}

static void refuses_descriptor(struct raw *raw, int fd, uint64_t bytes, const char *part)
{
	ck_assert_int_ge(fd, 0);
	const struct msg_reply reply = attach(raw, fd, bytes);
	says(&reply, OPD_INVALID_ARGUMENT, part);
	(void)close(fd);
}

/* Hardening: memory-unsealed, memory-pipe, memory-directory, memory-device */
START_TEST(every_other_descriptor_is_refused_and_none_is_leaked)
{
	struct raw raw;
	int pipes[2];
	raw_open(&raw, "shm");
	make_closer(&raw);
	const unsigned before = open_descriptors();
	ck_assert_int_eq(pipe2(pipes, O_CLOEXEC), 0);
	refuses_descriptor(&raw, pipes[0], 4096, "pipe:[");
	(void)close(pipes[1]);
	refuses_descriptor(&raw, open("/etc", O_RDONLY | O_CLOEXEC), 4096, "the descriptor is /etc, expected a memfd");
	refuses_descriptor(&raw, open("/dev/zero", O_RDWR | O_CLOEXEC), 4096, "the descriptor is /dev/zero, expected a memfd");
	refuses_descriptor(&raw, open("/proc/self/exe", O_RDONLY | O_CLOEXEC), 4096, "expected a memfd");
	refuses_descriptor(&raw, memfd_of(8192, F_SEAL_GROW), 4096, "isn't sealed against shrinking");
	refuses_descriptor(&raw, memfd_of(8192, F_SEAL_SHRINK | F_SEAL_WRITE), 4096, "can't be written");
	refuses_descriptor(&raw, memfd_of(8192, F_SEAL_SHRINK), 8193, "8193 bytes of a memfd of 8192");
	refuses_descriptor(&raw, memfd_of(8192, F_SEAL_SHRINK), 0, "0 bytes of a memfd of 8192");
	refuses_descriptor(&raw, memfd_of(8192, F_SEAL_SHRINK), UINT64_MAX, "of a memfd of 8192");
	const struct msg_reply none = attach(&raw, -1, 4096);
	says(&none, OPD_INVALID_ARGUMENT, "no descriptor came");
	await_descriptors(before);
	raw_close(&raw);
}
END_TEST

START_TEST(descriptors_that_nobody_wants_are_closed)
{
	struct raw raw;
	raw_open(&raw, "shm");
	const int fd = memfd_of(4096, F_SEAL_SHRINK);
	const unsigned before = open_descriptors();
	const int many[16] = {fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd, fd};
	for (int i = 0; i < 50; i++) {
		const struct msg_reply reply = ask(&raw, (struct msg_request){.kind = MSG_REQUEST_PING}, many, 16);
		ck_assert_int_eq(reply.status, OPD_OK);
	}
	const struct msg_reply late = attach(&raw, -1, 4096);
	says(&late, OPD_INVALID_ARGUMENT, "no descriptor came");
	ck_assert_uint_eq(open_descriptors(), before);
	(void)close(fd);
	raw_close(&raw);
	raw_open(&raw, "cancel"); /* and a session without the feature gets none at all */
	const int other = memfd_of(4096, F_SEAL_SHRINK);
	const struct msg_reply refused = attach(&raw, other, 4096);
	says(&refused, OPD_FAILED_PRECONDITION, "no feature \"shm\"");
	(void)close(other);
	raw_close(&raw);
}
END_TEST

/* A TCP connection with more to send than its peer takes: closing it for the last time waits for the peer, for as long as LINGER_S. */
#define LINGER_S 600
static void make_lingering(int *out, int *peer)
{
	static const char bytes[65536];
	const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t size = sizeof address;
	ck_assert_int_eq(bind(listener, (const struct sockaddr *)&address, size), 0);
	ck_assert_int_eq(listen(listener, 1), 0);
	ck_assert_int_eq(getsockname(listener, (struct sockaddr *)&address, &size), 0);
	*out = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	ck_assert_int_eq(connect(*out, (const struct sockaddr *)&address, size), 0);
	*peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	ck_assert_int_ge(*peer, 0);
	(void)close(listener);
	while (send(*out, bytes, sizeof bytes, MSG_DONTWAIT | MSG_NOSIGNAL) > 0)
		;
	const struct linger linger = {1, LINGER_S};
	ck_assert_int_eq(setsockopt(*out, SOL_SOCKET, SO_LINGER, &linger, sizeof linger), 0);
}

/* Whoever is behind it decides how long a close takes. It comes with the first byte of a frame, so that the daemon has it while we let go of ours; the rest of the frame makes the
 * daemon let go, the last to do so. */
START_TEST(a_descriptor_whose_close_waits_holds_nobody_up)
{
	struct raw raw;
	struct codec_buffer buffer;
	const struct msg_request ping = {.kind = MSG_REQUEST_PING};
	int out, peer;
	raw_open(&raw, "shm");
	make_closer(&raw);
	const unsigned before = open_descriptors();
	make_lingering(&out, &peer);
	OK(codec_encode_request(&raw.arena, &ping, &buffer, &error));
	const size_t bytes = complete(&raw, &buffer, FRAME_REQUEST);
	send_bytes(&raw, buffer.frame, 1, &out, 1);
	await_descriptors(before + 3);
	(void)close(out);
	send_bytes(&raw, (uint8_t *)buffer.frame + 1, bytes - 1, NULL, 0);
	ck_assert_int_eq(reply_of(&raw).status, OPD_OK);
	OK(opd_ping(client, &error));
	(void)close(peer); /* with bytes that it didn't read: the connection is reset, and nothing lingers any more */
	await_descriptors(before);
	raw_close(&raw);
}
END_TEST

/* Nor does one that nobody has read when its connection ends: with one request in flight, which is all that may be, the daemon doesn't read it. */
START_TEST(a_descriptor_that_was_never_read_holds_nobody_up_at_the_end)
{
	struct raw raw;
	int out, peer;
	lab_reset();
	raw_open(&raw, "shm");
	make_lingering(&out, &peer);
	const uint8_t value[4] = {0};
	struct msg_tensor tensor = {.dtype = OPD_f32, .rank = 1, .shape = {1}, .source = MSG_SOURCE_INLINE, .inlined = {value, sizeof value}};
	struct msg_arg arg = {.kind = MSG_ARG_TENSOR, .count = 1, .tensor = &tensor};
	const struct msg_request waits = {.kind = MSG_REQUEST_RUN, .run = {.op = msg_text("lab_wait"), .arg_count = 1, .args = &arg}};
	struct codec_buffer buffer;
	OK(codec_encode_request(&raw.arena, &waits, &buffer, &error));
	send_with(&raw, &buffer, FRAME_REQUEST, NULL, 0);
	house_await_count(&lab_counts.waiting, 1);
	send_bytes(&raw, (uint8_t[]){0}, 1, &out, 1);
	(void)close(out);
	raw_close(&raw);
	lab_gate(true); /* its answer can't be written: the connection ends */
	for (int i = 0; i < 20; i++)
		OK(opd_ping(client, &error));
	(void)close(peer);
}
END_TEST

/* ---- Files as large as their clients like ---- */
#ifdef OPD_TEST_GATE

/* How long the system takes for one is stood in for by a gate, for every thread but the test's. */
#define LARGE_BYTES ((uint64_t)3 << 20)
static struct {
	pthread_mutex_t mutex;
	pthread_cond_t changed;
	pthread_t tester;
	bool shut;
	unsigned waiting;
} gate = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void pass_gate(void)
{
	(void)pthread_mutex_lock(&gate.mutex);
	gate.waiting++;
	(void)pthread_cond_broadcast(&gate.changed);
	while (gate.shut && !pthread_equal(gate.tester, pthread_self()))
		(void)pthread_cond_wait(&gate.changed, &gate.mutex);
	gate.waiting--;
	(void)pthread_mutex_unlock(&gate.mutex);
}

static void shut_gate(bool shut)
{
	(void)pthread_mutex_lock(&gate.mutex);
	gate.tester = pthread_self();
	gate.shut = shut;
	(void)pthread_cond_broadcast(&gate.changed);
	(void)pthread_mutex_unlock(&gate.mutex);
}

static void await_gate(unsigned waiting)
{
	(void)pthread_mutex_lock(&gate.mutex);
	while (gate.waiting != waiting)
		(void)pthread_cond_wait(&gate.changed, &gate.mutex);
	(void)pthread_mutex_unlock(&gate.mutex);
}

int __real_munmap(void *data, size_t bytes);
int __wrap_munmap(void *data, size_t bytes);
int __wrap_munmap(void *data, size_t bytes)
{
	if (bytes == LARGE_BYTES)
		pass_gate();
	return __real_munmap(data, bytes);
}

int __real_close(int fd);
int __wrap_close(int fd);
int __wrap_close(int fd)
{
	struct stat file;
	if (fcntl(fd, F_GET_SEALS) >= 0 && fstat(fd, &file) == 0 && file.st_size == (off_t)LARGE_BYTES + 4096)
		pass_gate();
	return __real_close(fd);
}

/* … and that although what is mapped of one, or is charged for it, may be little. */
START_TEST(a_large_file_is_given_back_by_no_loop)
{
	struct raw raw;
	raw_open(&raw, "shm");
	const int mapped = memfd_of((off_t)LARGE_BYTES, F_SEAL_SHRINK);
	const int refused = memfd_of((off_t)LARGE_BYTES + 4096, 0);
	ck_assert_int_eq(posix_fallocate(refused, 0, (off_t)LARGE_BYTES), 0);
	ck_assert_int_eq(attach(&raw, mapped, LARGE_BYTES).status, OPD_OK);
	shut_gate(true);
	ck_assert_int_eq(ask(&raw, (struct msg_request){.kind = MSG_REQUEST_DETACH_MEMORY, .region = 1}, NULL, 0).status, OPD_OK);
	const struct msg_reply reply = attach(&raw, refused, LARGE_BYTES);
	says(&reply, OPD_INVALID_ARGUMENT, "isn't sealed against shrinking");
	OK(opd_ping(client, &error));
	await_gate(1);
	shut_gate(false);
	(void)close(mapped);
	(void)close(refused);
	raw_close(&raw);
}
END_TEST

#endif

/* Hardening: memory-shortened, memory-wrap */
START_TEST(an_attached_file_cannot_shrink_and_ranges_outside_are_refused)
{
	struct raw raw;
	raw_open(&raw, "shm");
	const int fd = memfd_of(8192, F_SEAL_SHRINK);
	const struct msg_reply attached = attach(&raw, fd, 8192);
	ck_assert_int_eq(attached.status, OPD_OK);
	ck_assert_int_eq(attached.kind, MSG_REPLY_MEMORY);
	ck_assert_int_eq(ftruncate(fd, 4096), -1);
	ck_assert_int_eq(errno, EPERM);
	const struct {
		uint32_t region;
		uint64_t offset, bytes;
		opd_status status;
		const char *part;
	} cases[] = {
	    {1, UINT64_MAX - 63, 64, OPD_INVALID_ARGUMENT, "which has 8192"},
	    {1, 64, UINT64_MAX - 32, OPD_INVALID_ARGUMENT, "which has 8192"},
	    {1, 8192, 64, OPD_INVALID_ARGUMENT, "which has 8192"},
	    {1, 8160, 32, OPD_INVALID_ARGUMENT, "expected a multiple of 64"},
	    {1, 0, 63, OPD_INVALID_ARGUMENT, "doesn't lie in its 63 bytes"},
	    {1, 0, 128, OPD_INVALID_ARGUMENT, "128 were sent"},
	    {2, 0, 64, OPD_NOT_FOUND, "region 2 isn't attached"},
	    {0, 0, 64, OPD_NOT_FOUND, "region 0 isn't attached"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
		struct msg_tensor tensor = {.dtype = OPD_f32, .rank = 1, .shape = {16}, .source = MSG_SOURCE_SHARED};
		tensor.shared.region = cases[i].region;
		tensor.shared.offset = cases[i].offset;
		tensor.shared.bytes = cases[i].bytes;
		struct msg_arg arg = {.kind = MSG_ARG_TENSOR, .count = 1, .tensor = &tensor};
		const struct msg_request message = {.kind = MSG_REQUEST_RUN, .run = {.op = msg_text("relu"), .arg_count = 1, .args = &arg}};
		const struct msg_reply reply = ask(&raw, message, NULL, 0);
		says(&reply, cases[i].status, cases[i].part);
	}
	struct msg_tensor inlined = {.dtype = OPD_u8, .rank = 1, .shape = {64}, .source = MSG_SOURCE_INLINE, .inlined = {(const uint8_t *)cases, 64}};
	const struct msg_reply uploaded = ask(&raw, (struct msg_request){.kind = MSG_REQUEST_UPLOAD, .upload = {.tensor = &inlined}}, NULL, 0);
	struct msg_tensor kept = {.source = MSG_SOURCE_HANDLE, .handle = uploaded.run.outputs[0].kept};
	for (size_t i = 0; i < 4; i++) {
		const struct msg_shared_range into = {1, cases[i].offset, cases[i].bytes};
		const struct msg_reply reply = ask(&raw, (struct msg_request){.kind = MSG_REQUEST_FETCH, .fetch = {&kept, into}}, NULL, 0);
		says(&reply, cases[i].status, cases[i].part);
	}
	const struct msg_reply nowhere = ask(&raw, (struct msg_request){.kind = MSG_REQUEST_FETCH, .fetch = {&kept, {2, 0, 64}}}, NULL, 0);
	says(&nowhere, OPD_NOT_FOUND, "fetch: the range: region 2 isn't attached");
	(void)close(fd);
	raw_close(&raw);
	raw_open(&raw, "cancel"); /* and a session without the feature has none at all */
	const struct msg_reply again = ask(&raw, (struct msg_request){.kind = MSG_REQUEST_UPLOAD, .upload = {.tensor = &inlined}}, NULL, 0);
	kept.handle = again.run.outputs[0].kept;
	const struct msg_reply without = ask(&raw, (struct msg_request){.kind = MSG_REQUEST_FETCH, .fetch = {&kept, {1, 0, 64}}}, NULL, 0);
	says(&without, OPD_UNIMPLEMENTED, "no feature \"shm\"");
	raw_close(&raw);
}
END_TEST

/* The same file twice is the same memory, whatever its regions are called. */
START_TEST(overlap_is_seen_through_two_regions_of_one_file)
{
	struct raw raw;
	raw_open(&raw, "shm");
	const int fd = memfd_of(8192, F_SEAL_SHRINK);
	ck_assert_int_eq(attach(&raw, fd, 8192).status, OPD_OK);
	ck_assert_int_eq(attach(&raw, fd, 8192).status, OPD_OK);
	struct msg_tensor tensor = {.dtype = OPD_f32, .rank = 1, .shape = {16}, .source = MSG_SOURCE_SHARED};
	tensor.shared.region = 1;
	tensor.shared.offset = 64;
	tensor.shared.bytes = 64;
	struct msg_arg arg = {.kind = MSG_ARG_TENSOR, .count = 1, .tensor = &tensor};
	struct msg_output_option output = {.shared = {2, 64, 64}};
	struct msg_request message = {.kind = MSG_REQUEST_RUN, .run = {.op = msg_text("relu"), .arg_count = 1, .args = &arg, .output_count = 1, .outputs = &output}};
	const struct msg_reply overlapping = ask(&raw, message, NULL, 0);
	says(&overlapping, OPD_INVALID_ARGUMENT, "result 0 overlaps x");
	output.shared.offset = 128;
	output.keep = true;
	const struct msg_reply kept = ask(&raw, message, NULL, 0);
	says(&kept, OPD_INVALID_ARGUMENT, "can't lie in shared memory");
	output.keep = false;
	ck_assert_int_eq(ask(&raw, message, NULL, 0).status, OPD_OK);
	ck_assert_int_eq(ask(&raw, (struct msg_request){.kind = MSG_REQUEST_DETACH_MEMORY, .region = 1}, NULL, 0).status, OPD_OK);
	const struct msg_reply twice = ask(&raw, (struct msg_request){.kind = MSG_REQUEST_DETACH_MEMORY, .region = 1}, NULL, 0);
	says(&twice, OPD_NOT_FOUND, "region 1 isn't attached");
	(void)close(fd);
	raw_close(&raw);
}
END_TEST

static Suite *suite(void)
{
	Suite *made = suite_create("memory");
	TCase *wide = tcase_create("wide");
	tcase_set_timeout(wide, 60);
	tcase_add_checked_fixture(wide, open_house, close_house);
	tcase_add_test(wide, operands_and_results_lie_in_shared_memory_and_nothing_is_copied);
	tcase_add_test(wide, an_operand_may_begin_anywhere_that_its_elements_may);
	tcase_add_test(wide, a_last_result_byte_may_be_the_region_s_last);
	tcase_add_test(wide, uploads_and_their_parts_come_from_shared_memory);
	tcase_add_test(wide, fetches_go_to_shared_memory_whole_or_as_views);
	tcase_add_test(wide, a_region_detached_while_a_fetch_waits_for_it_stays_until_it_is_filled);
	tcase_add_test(wide, fetches_to_other_places_are_refused_and_write_nothing);
	tcase_add_test(wide, a_region_detached_in_flight_stays_until_the_kernel_is_done);
	tcase_add_test(wide, results_of_a_graph_lie_in_shared_memory_too);
	tcase_add_test(wide, ranges_of_a_graph_s_results_are_held_to_the_same_rules);
	tcase_add_test(wide, memory_outlives_its_client);
	tcase_add_test(wide, mapped_bytes_are_charged_until_nobody_needs_them);
	tcase_add_test(wide, results_overlap_neither_operands_nor_each_other);
	tcase_add_test(wide, a_range_that_is_too_small_for_the_result_is_refused_before_the_kernel);
	tcase_add_test(wide, a_client_that_did_not_ask_has_no_shared_memory);
	tcase_add_test(wide, ids_rewritten_while_a_kernel_runs_are_read_once);
	tcase_add_test(wide, every_other_descriptor_is_refused_and_none_is_leaked);
	tcase_add_test(wide, descriptors_that_nobody_wants_are_closed);
	tcase_add_test(wide, a_descriptor_whose_close_waits_holds_nobody_up);
#ifdef OPD_TEST_GATE
	tcase_add_test(wide, a_large_file_is_given_back_by_no_loop);
#endif
	tcase_add_test(wide, an_attached_file_cannot_shrink_and_ranges_outside_are_refused);
	tcase_add_test(wide, overlap_is_seen_through_two_regions_of_one_file);
	suite_add_tcase(made, wide);
	TCase *checked = tcase_create("checked");
	tcase_add_checked_fixture(checked, open_checked, close_house);
	suite_add_tcase(made, checked);
	tcase_add_test(checked, results_of_a_graph_are_copied_there_in_checked_mode);
	TCase *scarce = tcase_create("scarce");
	tcase_add_checked_fixture(scarce, open_scarce, close_house);
	tcase_add_test(scarce, mapped_bytes_are_held_to_the_session_s_memory);
	suite_add_tcase(made, scarce);
	TCase *single = tcase_create("single");
	tcase_set_timeout(single, 60);
	tcase_add_checked_fixture(single, open_single, close_house);
	tcase_add_test(single, a_descriptor_that_was_never_read_holds_nobody_up_at_the_end);
	suite_add_tcase(made, single);
	TCase *narrow = tcase_create("narrow");
	tcase_set_timeout(narrow, 60);
	tcase_add_checked_fixture(narrow, open_narrow, close_house);
	tcase_add_test(narrow, the_limits_of_regions_and_bytes_hold);
	suite_add_tcase(made, narrow);
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
