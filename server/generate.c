/* Inputs made by the daemon: an op's generator on the lane, its tensors sent or kept. */
#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"
#include "proto/element.h"
#include "proto/tensor.h"
#include "proto/text.h"
#include "server/daemon.h"
#include "server/module.h"
#include "server/request.h"

/* One made argument; a tensor's memory is its own buffer. */
struct made {
	struct msg_arg arg;
	struct msg_tensor tensor;
	struct buffer *buffer;
	uint64_t bytes;
};

#define MADE_MAX SCHEMA_PARAMS_MAX

struct generation {
	opd_generator generator; /* first: callbacks get back to us from it */
	struct request *request;
	const struct op *op;
	uint64_t random[4]; /* xoshiro256** */
	bool failed;        /* request->error is written */
	uint32_t count;
	struct made made[MADE_MAX];
};

/* ---- Random numbers: David Blackman and Sebastiano Vigna's xoshiro256**, seeded by splitmix64 (public domain algorithms) ---- */

static uint64_t rotate(uint64_t word, int bits)
{
	return word << bits | word >> (64 - bits);
}

static uint64_t random_next(struct generation *generation)
{
	uint64_t *s = generation->random;
	uint64_t result = rotate(s[1] * 5, 7) * 9;
	uint64_t t = s[1] << 17;
	s[2] ^= s[0];
	s[3] ^= s[1];
	s[1] ^= s[2];
	s[0] ^= s[3];
	s[2] ^= t;
	s[3] = rotate(s[3], 45);
	return result;
}

static void random_seed(struct generation *generation, uint64_t seed)
{
	for (int i = 0; i < 4; i++) {
		uint64_t z = seed += 0x9e3779b97f4a7c15u;
		z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
		z = (z ^ z >> 27) * 0x94d049bb133111ebu;
		generation->random[i] = z ^ z >> 31;
	}
}

static double random_uniform(struct generation *generation)
{
	return (double)(random_next(generation) >> 11) * 0x1p-53;
}

/* Standard normal, as the sum of four uniforms: close enough for test data, and quick. */
static double random_normal(struct generation *generation)
{
	double sum = random_uniform(generation) + random_uniform(generation) + random_uniform(generation) + random_uniform(generation);
	return (sum - 2.0) * 1.7320508075688772;
}

static double extreme_value(struct generation *generation, opd_dtype dtype, double scale)
{
	switch (random_next(generation) % 32) {
	case 0:
		return (double)NAN;
	case 1:
		return (double)INFINITY;
	case 2:
		return -(double)INFINITY;
	case 3:
		return 0.0;
	case 4:
		return -0.0;
	case 5:
		return dtype == OPD_f16 ? 65504.0 : dtype == OPD_f64 ? 1.7976931348623157e308 : 3.4028234663852886e38;
	case 6:
		return dtype == OPD_f16 ? 0x1p-24 : dtype == OPD_f64 ? 0x1p-1074 : 0x1p-133;
	default:
		return random_normal(generation) * scale;
	}
}

static void store_value(struct generation *generation, opd_dtype dtype, unsigned char *at, double scale)
{
	if (generation->generator.values == OPD_VALUES_SMALL)
		element_store_f64(dtype, at, (double)((int64_t)(random_next(generation) % 9) - (dtype == OPD_u8 || dtype == OPD_bool ? 0 : 4)));
	else if (generation->generator.values == OPD_VALUES_EXTREME)
		element_store_f64(dtype, at, extreme_value(generation, dtype, scale));
	else
		element_store_f64(dtype, at, random_normal(generation) * scale);
}

/* ---- The generator's callbacks ---- */

static struct made *made_add(struct generation *generation, const char *name, msg_arg_kind kind)
{
	if (generation->count == MADE_MAX) {
		generation->failed = true;
		(void)opd_fail(&generation->request->error, OPD_INTERNAL, "%s: its generator makes more than %d arguments", generation->op->schema->name,
		               MADE_MAX);
		return NULL;
	}
	struct made *made = &generation->made[generation->count++];
	made->arg = (struct msg_arg){.name = msg_text(name), .kind = kind};
	return made;
}

static void *make_tensor(opd_generator *generator, const char *name, opd_dtype dtype, uint32_t rank, const int64_t *shape)
{
	struct generation *generation = (struct generation *)generator;
	opd_error *error = &generation->request->error;
	uint64_t bytes;
	if (rank > OPD_RANK_MAX || !tensor_bytes(dtype, rank, shape, &bytes)) {
		generation->failed = true;
		(void)opd_fail(error, OPD_INVALID_ARGUMENT, "%s: with these sizes, %s is larger than fits", generation->op->schema->name, name);
		return NULL;
	}
	struct made *made = made_add(generation, name, MSG_ARG_TENSOR);
	if (made == NULL)
		return NULL;
	if (buffer_alloc(generation->request->session->account, bytes, 0, &made->buffer, error) != OPD_OK) {
		generation->failed = true;
		return NULL;
	}
	memset(made->buffer->data, 0, bytes);
	made->bytes = bytes;
	made->tensor = (struct msg_tensor){.dtype = dtype, .rank = rank};
	memcpy(made->tensor.shape, shape, rank * sizeof shape[0]);
	made->arg.tensor = &made->tensor;
	return made->buffer->data;
}

static void make_int(opd_generator *generator, const char *name, int64_t value)
{
	struct made *made = made_add((struct generation *)generator, name, MSG_ARG_INT);
	if (made != NULL)
		made->arg.i = value;
}

static void make_float(opd_generator *generator, const char *name, double value)
{
	struct made *made = made_add((struct generation *)generator, name, MSG_ARG_FLOAT);
	if (made != NULL)
		made->arg.f = value;
}

static void make_bool(opd_generator *generator, const char *name, bool value)
{
	struct made *made = made_add((struct generation *)generator, name, MSG_ARG_BOOL);
	if (made != NULL)
		made->arg.b = value;
}

static void make_str(opd_generator *generator, const char *name, const char *value)
{
	struct made *made = made_add((struct generation *)generator, name, MSG_ARG_STR);
	if (made != NULL)
		made->arg.str = msg_text(value);
}

static void fill(opd_generator *generator, void *memory, opd_dtype dtype, uint64_t elements, double scale)
{
	struct generation *generation = (struct generation *)generator;
	unsigned char *at = memory;
	size_t element = opd_dtype_bytes(dtype);
	for (uint64_t i = 0; i < elements; i++, at += element)
		store_value(generation, dtype, at, scale);
}

static int64_t pick(opd_generator *generator, int64_t low, int64_t high)
{
	struct generation *generation = (struct generation *)generator;
	if (high <= low)
		return low;
	return low + (int64_t)(random_next(generation) % ((uint64_t)(high - low) + 1));
}

/* ---- The request ---- */

static opd_status check_generate(struct request *request, const struct op *op, const struct msg_generate *message)
{
	opd_error *error = &request->error;
	const char *name = op->schema->name;
	if (op->def->generate == NULL)
		return opd_fail(error, OPD_UNIMPLEMENTED, "%s has no input generator", name);
	if (message->dtype == OPD_DTYPE_NONE)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: generate needs a dtype", name);
	if (message->values > OPD_VALUES_SMALL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: values %u, expected 0 (random), 1 (extreme) or 2 (small integers)", name,
		                (unsigned)message->values);
	if (message->dim_count != 0 && message->dim_count != op->def->dim_count)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: %u sizes, expected %u (%s)", name, (unsigned)message->dim_count,
		                (unsigned)op->def->dim_count, op->def->dims);
	for (uint32_t i = 0; i < message->dim_count; i++)
		if (message->dims[i] < 0)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: size %u is %" PRId64 ", expected 0 or more (%s)", name, (unsigned)i,
			                message->dims[i], op->def->dims);
	return OPD_OK;
}

static void generate_task(struct request *request)
{
	struct generation *generation = request->task_data;
	const struct op *op = generation->op;
	opd_error error = {0};
	request->status = op->def->generate(op->def, &generation->generator, &error);
	if (generation->failed) { /* a callback's own text says more */
		request->status = (opd_status)request->error.status;
	} else if (request->status != OPD_OK) {
		request->status = module_failure(request->status, &error, "%s: no inputs of variant %u", op->schema->name,
		                                 (unsigned)generation->generator.variant);
		request->error = error;
	}
}

static bool send_made(struct request *request, struct made *made)
{
	if (made->arg.kind != MSG_ARG_TENSOR)
		return true;
	if (!request->message.generate.keep)
		return request_send(request, &made->tensor, made->buffer->data, made->bytes);
	struct kept_tensor *kept =
		kept_tensor_create(made->tensor.dtype, made->tensor.rank, made->tensor.shape, made->bytes, made->buffer);
	if (kept == NULL)
		return false;
	made->tensor.source = MSG_SOURCE_HANDLE;
	made->tensor.handle = kept_add(&request->session->kept, kept, &request->error);
	if (made->tensor.handle.generation == 0)
		kept_tensor_unref(kept);
	return made->tensor.handle.generation != 0;
}

/* Nobody will learn of these handles. */
static void unkeep(struct request *request, struct generation *generation)
{
	opd_status status = OPD_OK;
	for (uint32_t i = 0; i < generation->count; i++)
		if (generation->made[i].tensor.source == MSG_SOURCE_HANDLE && generation->made[i].tensor.handle.generation != 0)
			status = kept_free(&request->session->kept, generation->made[i].tensor.handle, NULL);
	assert(status == OPD_OK);
	(void)status;
}

/* The buffers stay until the request is released: the reply sends them from where they lie. */
static void generate_done(struct request *request)
{
	struct generation *generation = request->task_data;
	struct msg_arg *args = request->status == OPD_OK ? arena_array(&request->arena, generation->count, sizeof args[0]) : NULL;
	bool sent = args != NULL;
	if (request->status == OPD_OK)
		(void)opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "generate: out of memory");
	for (uint32_t i = 0; sent && i < generation->count; i++) {
		sent = send_made(request, &generation->made[i]);
		args[i] = generation->made[i].arg;
	}
	if (!sent) {
		unkeep(request, generation);
		request_fail(request);
		return;
	}
	request->reply.generated.args = args;
	request->reply.generated.count = generation->count;
	request_reply(request, MSG_REPLY_GENERATED);
}

void generate_start(struct request *request)
{
	const struct msg_generate *message = &request->message.generate;
	const struct op *op = snapshot_find_op(request->snapshot, message->op, &request->error);
	opd_status status = op == NULL ? OPD_NOT_FOUND : check_generate(request, op, message);
	struct generation *generation = status == OPD_OK ? arena_zalloc(&request->arena, sizeof *generation) : NULL;
	if (status == OPD_OK && generation == NULL)
		status = opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "generate: out of memory");
	if (status != OPD_OK) {
		request_fail(request);
		return;
	}
	generation->request = request;
	generation->op = op;
	random_seed(generation, message->seed);
	generation->generator = (opd_generator){
		.struct_bytes = sizeof generation->generator,
		.dtype = message->dtype,
		.values = (opd_values)message->values,
		.variant = message->variant,
		.seed = message->seed,
		.dim_count = op->def->dim_count,
		.dims = message->dim_count != 0 ? message->dims : op->def->default_dims,
		.tensor = make_tensor,
		.set_int = make_int,
		.set_float = make_float,
		.set_bool = make_bool,
		.set_str = make_str,
		.fill = fill,
		.pick = pick,
	};
	request->task_data = generation;
	request_task(request, generate_task, generate_done);
}

void generate_release(struct request *request)
{
	struct generation *generation = request->task_data;
	for (uint32_t i = 0; generation != NULL && i < generation->count; i++)
		buffer_unref(generation->made[i].buffer);
	request->task_data = NULL;
}
