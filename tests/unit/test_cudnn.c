/* Provider `cudnn`: which calls it takes. Its predicate needs no GPU and no library. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "tests/conformance/host.h"

static struct host host;

/* Query, key and value of [1, 16, 2, 64]. */
struct call {
	opd_tensor tensor;
	opd_arg args[5];
	const opd_tensor *outputs[1];
	opd_call call;
};

static void call_init(struct call *made, opd_dtype dtype, uint32_t flags)
{
	static const int64_t shape[4] = {1, 16, 2, 64}, strides[4] = {2048, 128, 64, 1};
	memset(made, 0, sizeof *made);
	made->tensor = (opd_tensor){.struct_bytes = sizeof made->tensor, .dtype = dtype, .rank = 4, .shape = shape, .strides = strides, .elements = 2048, .alignment = 64,
	                            .flags = OPD_TENSOR_CONTIGUOUS};
	for (int i = 0; i < 3; i++)
		made->args[i] = (opd_arg){.kind = OPD_ARG_TENSOR, .tensor = &made->tensor};
	made->args[3] = (opd_arg){.kind = OPD_ARG_FLOAT, .f = 0.125};
	made->args[4] = (opd_arg){.kind = OPD_ARG_BOOL, .b = false};
	made->outputs[0] = &made->tensor;
	made->call = (opd_call){.struct_bytes = sizeof made->call, .args = made->args, .arg_count = 5, .outputs = made->outputs, .output_count = 1, .flags = flags};
}

static bool takes(opd_dtype dtype, uint32_t flags, opd_reason *reason)
{
	struct call made;
	const struct host_impl *impl = host_find_impl(&host, "cudnn", "attention");
	ck_assert_ptr_nonnull(impl);
	call_init(&made, dtype, flags);
	memset(reason, 0, sizeof *reason);
	return impl->impl->predicate(impl->impl, impl->state, &made.call, reason);
}

/* SEMANTICS 35: an implementation agrees with native within its dtype's tolerance, unless the request allows less. */
START_TEST(bf16_is_taken_where_the_request_allows_less_exact_products)
{
	opd_reason reason;
	opd_error error;
	host_init(&host);
	ck_assert_int_eq(host_load(&host, getenv("OPD_TEST_CUDA"), &error), OPD_OK);
	ck_assert_int_eq(host_load(&host, getenv("OPD_TEST_CUDNN"), &error), OPD_OK);
	ck_assert(takes(OPD_f16, 0, &reason));
	ck_assert(!takes(OPD_bf16, 0, &reason));
	ck_assert_int_eq(reason.code, OPD_REASON_DTYPE);
	ck_assert_ptr_nonnull(strstr(reason.detail, "query bf16"));
	ck_assert(takes(OPD_bf16, OPD_CALL_ALLOW_TF32, &reason));
	ck_assert(!takes(OPD_f32, OPD_CALL_ALLOW_TF32, &reason));
	host_fini(&host);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("cudnn");
	TCase *tcase = tcase_create("predicate");
	tcase_add_test(tcase, bf16_is_taken_where_the_request_allows_less_exact_products);
	suite_add_tcase(suite, tcase);
	SRunner *runner = srunner_create(suite);
	srunner_set_fork_status(runner, CK_NOFORK);
	srunner_run_all(runner, CK_NORMAL);
	const int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
