/* What the client's test files share. */
#ifndef OPD_TESTS_UNIT_TEST_CLIENT_H
#define OPD_TESTS_UNIT_TEST_CLIENT_H

#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "opd/client.h"
#include "tests/lib/peer.h"

/* Fails the test with the library's own words, which the call writes into `error`. */
#define MUST(call)                                                                                                               \
	do {                                                                                                                         \
		const opd_status must_status = (call);                                                                                   \
		ck_assert_msg(must_status == OPD_OK, "%s: %s: %s", #call, opd_status_name(must_status), error.text);                     \
	} while (0)

static inline opd_client *test_connect(const struct peer *peer, uint64_t timeout_us)
{
	opd_client *client = NULL;
	opd_error error = {0};
	const opd_connect_options options = {.struct_bytes = sizeof options, .timeout_us = timeout_us};
	opd_status status = opd_connect(peer->address, &options, &client, &error);
	ck_assert_msg(status == OPD_OK, "connect: %s", error.text);
	return client;
}

/* relu of a host vector. */
static inline opd_request *test_vector(const float *data, int64_t elements)
{
	opd_request *request = opd_request_create("relu");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, data, elements));
	return request;
}

static inline float *test_floats(size_t count, unsigned seed)
{
	float *data = malloc(count * sizeof *data + 1);
	for (size_t i = 0; i < count; i++)
		data[i] = (float)(((i * 2654435761u) ^ seed) & 0xffff) - 32768.0f;
	return data;
}

Suite *broken_suite(void);
Suite *sending_suite(void);
Suite *calls_suite(void);

#endif
