/* What the bad modules share: parts that would be good. Each file spoils one thing, and its first line says which. */
#ifndef OPD_TESTS_BAD_H
#define OPD_TESTS_BAD_H

#include <opd/provider.h>

#define BAD_UUID "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

static inline opd_status bad_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)impl, (void)state, (void)call, (void)exec;
	return opd_fail(error, OPD_INTERNAL, "a bad module's kernel was run");
}

static inline opd_status bad_shape(const opd_op *op, const opd_call *call, opd_output *const *outputs, opd_error *error)
{
	(void)op, (void)call, (void)outputs;
	return opd_fail(error, OPD_INTERNAL, "a bad module's shape function was called");
}

/* An implementation of relu that could be registered. */
static inline opd_impl bad_relu(void)
{
	return (opd_impl){
	    .struct_bytes = sizeof(opd_impl),
	    .op = "relu",
	    .schema = "relu(Tensor x) -> Tensor",
	    .device = "cpu",
	    .uuid = BAD_UUID,
	    .run = bad_run,
	};
}

/* An op that could be registered, but for its native implementation. */
static inline opd_op bad_op(const char *schema)
{
	return (opd_op){.struct_bytes = sizeof(opd_op), .schema = schema, .doc = "of a bad module", .shape = bad_shape};
}

/* Its native implementation. */
static inline opd_impl bad_native(void)
{
	return (opd_impl){.struct_bytes = sizeof(opd_impl), .device = "cpu", .uuid = BAD_UUID, .run = bad_run};
}

static inline opd_module bad_module(const char *name, opd_status (*open)(const opd_host *host, void *state, opd_error *error))
{
	return (opd_module){.abi = OPD_PROVIDER_ABI, .struct_bytes = sizeof(opd_module), .name = name, .version = "0", .open = open};
}

#endif
