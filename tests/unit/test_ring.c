/* The rings' memory: bytes come out as they went in, at every size and place; indices that can't be are seen; no wake-up is lost between two threads that sleep whenever they can. And the other thing that threads share without a system call: the latch. */
#include <check.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "proto/bounds.h"
#include "proto/latch.h"
#include "proto/ring.h"
#include "tests/lib/suite.h"

#define RING_BYTES 4096u

static struct ring_header *header;
static uint8_t *data;
static struct ring_writer writer;
static struct ring_reader reader;

static void make_ring(void)
{
	header = aligned_alloc(64, sizeof *header);
	data = malloc(RING_BYTES);
	ck_assert(header != NULL && data != NULL);
	memset(header, 0, sizeof *header);
	ring_writer_init(&writer, &header->request_head, &header->request_tail, data, RING_BYTES);
	ring_reader_init(&reader, &header->request_head, &header->request_tail, data, RING_BYTES);
}

static void free_ring(void)
{
	free(header);
	free(data);
}

START_TEST(a_ring_s_size_is_a_power_of_two_within_the_bounds)
{
	ck_assert(ring_bytes_valid(BOUND_RING_BYTES_MIN) && ring_bytes_valid(BOUND_RING_BYTES_MAX) && ring_bytes_valid(1u << 18));
	const uint64_t bad[] = {0, 1, BOUND_RING_BYTES_MIN / 2, BOUND_RING_BYTES_MIN + 1, 3 * BOUND_RING_BYTES_MIN, 2ull * BOUND_RING_BYTES_MAX, 1ull << 63, UINT64_MAX};
	for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
		ck_assert(!ring_bytes_valid(bad[i]));
}
END_TEST

START_TEST(bytes_come_out_as_they_went_in_across_the_end_of_the_ring)
{
	uint8_t in[RING_BYTES], out[RING_BYTES];
	for (unsigned round = 1; round < 3000; round++) {
		const unsigned bytes = round * 7 % RING_BYTES + 1;
		for (unsigned i = 0; i < bytes; i++)
			in[i] = (uint8_t)(i * 31 + round);
		ck_assert_uint_eq(ring_room(&writer), RING_BYTES);
		ring_write(&writer, in, bytes);
		ck_assert_uint_eq(ring_filled(&reader), 0); /* not shown yet */
		ck_assert(!ring_publish(&writer, &header->server_waits));
		ck_assert_uint_eq(ring_filled(&reader), bytes);
		ring_read(&reader, out, bytes);
		ck_assert_uint_eq(ring_room(&writer), RING_BYTES - bytes); /* not given back yet */
		ck_assert(!ring_release(&reader, &header->client_waits));
		ck_assert(memcmp(in, out, bytes) == 0);
	}
}
END_TEST

START_TEST(indices_that_cannot_be_are_seen)
{
	static const uint64_t heads[] = {RING_BYTES + 1, UINT64_MAX, 1ull << 63, (uint64_t)0 - 1};
	for (size_t i = 0; i < sizeof heads / sizeof heads[0]; i++) {
		atomic_store(&header->request_head, heads[i]);
		ck_assert_uint_eq(ring_filled(&reader), RING_BROKEN);
		atomic_store(&header->request_tail, heads[i]);
		ck_assert(ring_room(&writer) == RING_BROKEN || heads[i] > UINT64_MAX - RING_BYTES); /* behind by less than a ring: full */
	}
	atomic_store(&header->request_head, RING_BYTES);
	ck_assert_uint_eq(ring_filled(&reader), RING_BYTES);
}
END_TEST

START_TEST(who_waits_is_woken_once_and_for_what_it_waits)
{
	ring_write(&writer, "x", 1);
	ring_wait(&header->server_waits, RING_WAITS_ROOM);
	ck_assert(!ring_publish(&writer, &header->server_waits));
	ring_wait(&header->server_waits, RING_WAITS_ROOM | RING_WAITS_BYTES);
	ck_assert(ring_publish(&writer, &header->server_waits));
	ck_assert(!ring_publish(&writer, &header->server_waits));
	uint8_t byte;
	ring_read(&reader, &byte, 1);
	ring_wait(&header->client_waits, RING_WAITS_ROOM);
	ck_assert(ring_release(&reader, &header->client_waits));
	ck_assert(!ring_release(&reader, &header->client_waits));
}
END_TEST

/* ---- Two threads ---- */

#define STREAM_BYTES (8u << 20)

static int wakes[2]; /* the writer's, the reader's */

static void wake(int fd)
{
	const uint64_t one = 1;
	ck_assert_int_eq(write(fd, &one, sizeof one), sizeof one);
}

/* True: woken; a wake-up that doesn't come is a lost one. */
static bool sleep_on(int fd)
{
	struct pollfd entry = {.fd = fd, .events = POLLIN};
	uint64_t count;
	return poll(&entry, 1, 20000) == 1 && read(fd, &count, sizeof count) == sizeof count;
}

static uint8_t byte_at(uint64_t at)
{
	return (uint8_t)(at * 2654435761u >> 13);
}

/* As many as there is room for, up to a length that changes; sleeps as soon as there is none. */
static void *write_stream(void *lost)
{
	uint8_t piece[RING_BYTES];
	uint64_t at = 0;
	for (unsigned round = 1; at < STREAM_BYTES && !*(bool *)lost; round++) {
		uint64_t bytes = round * 37 % 900 + 1;
		const uint64_t room = ring_room(&writer);
		bytes = bytes < room ? bytes : room;
		bytes = bytes < STREAM_BYTES - at ? bytes : STREAM_BYTES - at;
		if (bytes == 0) {
			ring_wait(&header->client_waits, RING_WAITS_ROOM);
			*(bool *)lost = ring_room(&writer) == 0 && !sleep_on(wakes[0]);
			ring_wait(&header->client_waits, 0);
			continue;
		}
		for (uint64_t i = 0; i < bytes; i++)
			piece[i] = byte_at(at + i);
		ring_write(&writer, piece, bytes);
		at += bytes;
		if (ring_publish(&writer, &header->server_waits))
			wake(wakes[1]);
	}
	return NULL;
}

START_TEST(no_wake_up_is_lost_between_two_that_sleep_whenever_they_can)
{
	uint8_t piece[RING_BYTES];
	bool lost[2] = {false, false};
	pthread_t thread;
	wakes[0] = eventfd(0, EFD_CLOEXEC);
	wakes[1] = eventfd(0, EFD_CLOEXEC);
	ck_assert_int_eq(pthread_create(&thread, NULL, write_stream, &lost[0]), 0);
	uint64_t at = 0, wrong = 0;
	for (unsigned round = 1; at < STREAM_BYTES && !lost[1]; round++) {
		uint64_t bytes = round * 53 % 1300 + 1;
		const uint64_t filled = ring_filled(&reader);
		bytes = bytes < filled ? bytes : filled;
		if (bytes == 0) {
			ring_wait(&header->server_waits, RING_WAITS_BYTES);
			lost[1] = ring_filled(&reader) == 0 && !sleep_on(wakes[1]);
			ring_wait(&header->server_waits, 0);
			continue;
		}
		ring_read(&reader, piece, bytes);
		for (uint64_t i = 0; i < bytes; i++)
			wrong += piece[i] != byte_at(at + i);
		at += bytes;
		if (ring_release(&reader, &header->client_waits))
			wake(wakes[0]);
	}
	(void)pthread_join(thread, NULL);
	ck_assert(!lost[0] && !lost[1]);
	ck_assert_uint_eq(wrong, 0);
	ck_assert_uint_eq(at, STREAM_BYTES);
	(void)close(wakes[0]);
	(void)close(wakes[1]);
}
END_TEST

struct counter {
	struct latch latch;
	uint64_t number; /* no atomic: the latch alone keeps it right */
};

#define LATCH_ROUNDS 20000u
#define LATCH_THREADS 4

static void *count_up(void *context)
{
	struct counter *counter = context;
	for (unsigned i = 0; i < LATCH_ROUNDS; i++) {
		latch_lock(&counter->latch);
		const uint64_t seen = counter->number;
		if (i % 1024 == 0)
			(void)sched_yield(); /* the holder is interrupted: the others find it taken for long */
		counter->number = seen + 1;
		latch_unlock(&counter->latch);
	}
	return NULL;
}

START_TEST(a_latch_keeps_threads_apart_also_when_its_holder_is_interrupted)
{
	struct counter counter = {.number = 0};
	pthread_t threads[LATCH_THREADS];
	for (int i = 0; i < LATCH_THREADS; i++)
		ck_assert_int_eq(pthread_create(&threads[i], NULL, count_up, &counter), 0);
	for (int i = 0; i < LATCH_THREADS; i++)
		(void)pthread_join(threads[i], NULL);
	ck_assert_uint_eq(counter.number, LATCH_THREADS * LATCH_ROUNDS);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("ring");
	TCase *all = tcase_create("all");
	tcase_set_timeout(all, 120);
	tcase_add_checked_fixture(all, make_ring, free_ring);
	tcase_add_test(all, a_ring_s_size_is_a_power_of_two_within_the_bounds);
	tcase_add_test(all, bytes_come_out_as_they_went_in_across_the_end_of_the_ring);
	tcase_add_test(all, indices_that_cannot_be_are_seen);
	tcase_add_test(all, who_waits_is_woken_once_and_for_what_it_waits);
	tcase_add_test(all, no_wake_up_is_lost_between_two_that_sleep_whenever_they_can);
	tcase_add_test(all, a_latch_keeps_threads_apart_also_when_its_holder_is_interrupted);
	suite_add_tcase(suite, all);
	return suite_run(suite);
}
