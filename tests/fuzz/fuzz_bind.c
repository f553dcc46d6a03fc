/* Arguments against schemas, without a daemon: binding, placing, shapes, and the definition's kernel on what came through. The operands' memory ends where it says, so that a sanitizer
 * sees a kernel that looks past it. */
#include <stdlib.h>

#include "fuzz.h"
#include "proto/tensor.h"
#include "providers/builtin.h"
#include "server/bind.h"
#include "server/lane.h"
#include "server/module.h"

#define ARENA_BYTES (1u << 20)
#define ARGS_MAX 24u
#define OPERAND_BYTES 2048u
#define OUTPUT_BYTES (64u << 10)

static struct log quiet;
static struct registry *registry;
static struct snapshot *snapshot;

static void *host_alloc(void *context, uint64_t bytes)
{
	(void)context;
	return aligned_alloc(64, (bytes + 64) / 64 * 64);
}

static void host_free(void *context, void *memory)
{
	(void)context;
	free(memory);
}

static void parallel_for(const opd_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument)
{
	lane_parallel_for(exec->lane, items, grain, range, argument);
}

static bool cancelled(const opd_exec *exec)
{
	(void)exec;
	return false;
}

static void fini(void)
{
	snapshot_unref(snapshot);
	registry_destroy(registry);
	log_fini(&quiet);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	const struct registry_services services = {.parallel_for = parallel_for, .cancelled = cancelled, .alloc = host_alloc, .free = host_free};
	opd_error error;
	if (log_init(&quiet, LOG_ERROR, LOG_TEXT, "/dev/null", &error) != OPD_OK || registry_create(&quiet, &services, &registry, &error) != OPD_OK)
		fuzz_fail("%s", error.text);
	for (size_t i = 0; builtin_modules[i] != NULL; i++)
		if (registry_open_builtin(registry, builtin_modules[i], &error) != OPD_OK)
			fuzz_fail("%s", error.text);
	snapshot = registry_snapshot(registry);
	(void)atexit(fini);
	return 0;
}

/* ---- A call ---- */

static void *take(struct arena *arena, size_t count, size_t bytes)
{
	void *memory = arena_array(arena, count, bytes);
	if (memory == NULL)
		fuzz_fail("out of memory");
	return memory;
}

static int64_t pick_int(struct fuzz_input *input)
{
	static const int64_t odd[] = {INT64_MAX, INT64_MIN, INT32_MAX, INT32_MIN, 1ll << 32, 1ll << 61, 1ll << 40, -1};
	const uint8_t byte = fuzz_u8(input);
	return byte < 236 ? byte % 12 : byte < 250 ? odd[byte % 8] : (int64_t)fuzz_u64(input);
}

static void pick_tensor(struct fuzz_input *input, const struct msg_tensor *like, struct msg_tensor *out)
{
	const uint8_t byte = fuzz_u8(input);
	*out = (struct msg_tensor){.source = MSG_SOURCE_INLINE};
	if (like != NULL && byte % 3 != 0) { /* kernels want operands that fit each other */
		*out = *like;
		if (byte % 3 == 1 && out->rank > 0)
			out->shape[fuzz_u8(input) % out->rank] = pick_int(input);
		if (byte % 16 == 2)
			out->rank = out->rank == 0 ? 0 : out->rank - 1;
		if (byte % 5 == 0)
			out->dtype = (opd_dtype)(1 + fuzz_u8(input) % 11);
		return;
	}
	out->dtype = byte % 4 != 0 ? OPD_f32 : (opd_dtype)(fuzz_u8(input) % 16);
	out->rank = fuzz_u8(input) % 5;
	out->strided = byte % 9 == 8;
	for (uint32_t i = 0; i < out->rank; i++) {
		out->shape[i] = pick_int(input);
		out->strides[i] = out->strided ? pick_int(input) : 0;
	}
	if (byte % 13 == 12)
		out->byte_offset = (uint64_t)pick_int(input) * 4;
}

static void pick_arg(struct arena *arena, struct fuzz_input *input, const struct schema_param *param, struct msg_tensor **last, struct msg_arg *arg)
{
	const uint8_t byte = fuzz_u8(input);
	msg_arg_kind kind = (msg_arg_kind)schema_type_kind(param->type);
	if (byte >= 250)
		kind = (msg_arg_kind)(fuzz_u8(input) % 8); /* what the codec can give */
	else if (schema_type_optional(param->type) && byte % 4 == 0)
		kind = MSG_ARG_NONE;
	*arg = (struct msg_arg){.kind = kind};
	if (byte % 2 == 1)
		arg->name = (struct msg_text){param->name, param->name_bytes};
	static const char *const words[] = {"", "gelu", "silu", "relu", "tanh", "none", "f16", "mean", "neox", "f32", "bf16", "i64", "f8_e4m3fn", "bool", "i8", "u8"};
	switch (kind) {
	case MSG_ARG_TENSOR:
	case MSG_ARG_TENSORS:
		arg->count = kind == MSG_ARG_TENSOR ? 1 : fuzz_u8(input) % 4;
		arg->tensor = take(arena, arg->count + 1, sizeof arg->tensor[0]);
		for (uint32_t i = 0; i < arg->count; i++) {
			pick_tensor(input, *last, &arg->tensor[i]);
			*last = &arg->tensor[i];
		}
		return;
	case MSG_ARG_INT:
		arg->i = pick_int(input);
		return;
	case MSG_ARG_INTS: {
		arg->count = fuzz_u8(input) % 6;
		int64_t *ints = take(arena, arg->count + 1, sizeof ints[0]);
		for (uint32_t i = 0; i < arg->count; i++)
			ints[i] = pick_int(input);
		arg->ints = ints;
		return;
	}
	case MSG_ARG_FLOAT: {
		const uint64_t bits = byte % 8 == 7 ? fuzz_u64(input) : 0x3ee4f8b588e368f1; /* 1e-5 */
		memcpy(&arg->f, &bits, sizeof arg->f);
		return;
	}
	case MSG_ARG_BOOL:
		arg->b = byte % 4 == 1;
		return;
	default:
		arg->str = msg_text(words[fuzz_u8(input) % 16]);
		return;
	}
}

static void pick_run(struct arena *arena, struct fuzz_input *input, const struct op *op, struct msg_run *run)
{
	const struct schema *schema = op->schema;
	struct msg_arg *args = take(arena, ARGS_MAX, sizeof args[0]);
	struct msg_tensor *last = NULL;
	*run = (struct msg_run){.op = msg_text(schema->name), .args = args};
	const uint32_t left_out = fuzz_u8(input) % 8 == 7 ? 1 : 0;
	for (uint32_t i = 0; i + left_out < schema->param_count && i < ARGS_MAX - 1; i++)
		pick_arg(arena, input, &schema->params[i], &last, &args[run->arg_count++]);
	if (fuzz_u8(input) % 32 == 31 && schema->param_count > 0)
		pick_arg(arena, input, &schema->params[fuzz_u8(input) % schema->param_count], &last, &args[run->arg_count++]);
}

/* ---- What must hold ---- */

/* Every element of a placed operand lies in its memory. */
static void check_operand(const struct operand *operand, uint64_t bytes)
{
	const opd_tensor *tensor = &operand->tensor;
	uint64_t end;
	if (!tensor_extent(tensor->dtype, tensor->rank, tensor->shape, tensor->strides, tensor->byte_offset, &end) || end > bytes)
		fuzz_fail("%s was placed in %llu bytes, which it doesn't fit", operand->param, (unsigned long long)bytes);
}

static bool place(struct bound *bound, struct fuzz_input *input, opd_error *error)
{
	for (uint32_t i = 0; i < bound->operand_count; i++) {
		struct operand *operand = &bound->operands[i];
		uint64_t bytes;
		if (!tensor_extent(operand->source->dtype, operand->source->rank, operand->source->shape, operand->source->strided ? operand->source->strides : NULL,
		                   operand->source->byte_offset, &bytes) ||
		    bytes > OPERAND_BYTES)
			bytes = fuzz_u8(input);
		if (fuzz_u8(input) % 16 == 15)
			bytes = bytes * 3 / 4;
		unsigned char *data = aligned_alloc(64, (bytes + 127) / 64 * 64); /* readable to the next multiple of 64 */
		if (data == NULL)
			fuzz_fail("out of memory");
		for (uint64_t k = 0; k < bytes; k++)
			data[k] = fuzz_u8(input);
		if (bind_place(bound->op, operand, data, bytes, true, error) != OPD_OK) {
			free(data);
			return false;
		}
		operand->tensor.data = data;
		check_operand(operand, bytes);
	}
	return true;
}

static void free_operands(struct bound *bound)
{
	for (uint32_t i = 0; i < bound->operand_count; i++)
		free(bound->operands[i].tensor.data);
}

/* Returns what the kernel or the check of its operands said. */
static opd_status run_native(const struct bound *bound, opd_error *error)
{
	const struct impl *impl = bound->op->impls[0];
	const opd_op *def = bound->op->def;
	struct lane_exec lane = lane_exec_serial(NULL);
	const opd_exec exec = {.struct_bytes = sizeof exec, .threads = 1, .host = &impl->provider->module->host, .lane = &lane};
	opd_status status = def->check == NULL ? OPD_OK : def->check(def, &bound->call, error);
	return status != OPD_OK ? status : impl->def->run(impl->def, impl->state, &bound->call, &exec, error);
}

static void run_bound(struct bound *bound, opd_error *error)
{
	if (bound->output_bytes > OUTPUT_BYTES)
		return;
	for (uint32_t i = 0; i < bound->call.output_count; i++) {
		opd_tensor *output = &bound->outputs[i];
		uint64_t bytes;
		if (!tensor_bytes(output->dtype, output->rank, output->shape, &bytes) || bytes > OUTPUT_BYTES)
			fuzz_fail("%s: output %u is larger than all outputs", bound->op->schema->name, i);
		output->data = aligned_alloc(64, (bytes + 127) / 64 * 64);
		if (output->data == NULL)
			fuzz_fail("out of memory");
	}
	const opd_status status = run_native(bound, error);
	if (status == OPD_INTERNAL)
		fuzz_fail("%s: INTERNAL: %s", bound->op->schema->name, error->text);
	for (uint32_t i = 0; i < bound->call.output_count; i++)
		free(bound->outputs[i].data);
}

/* A strided operand may stand for many elements: the definition would compute for long on few bytes. */
static bool is_small(const struct bound *bound)
{
	uint64_t work = 1;
	for (uint32_t i = 0; i < bound->operand_count; i++)
		if (bound->operands[i].tensor.elements > 4096 || !size_multiply(work, bound->operands[i].tensor.elements + 1, &work))
			return false;
	return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct fuzz_input input = {data, bytes};
	struct arena arena;
	struct msg_run run;
	struct bound bound = {0};
	opd_error error = {0};
	arena_init(&arena, ARENA_BYTES);
	const struct op *op = &snapshot->ops[fuzz_u8(&input) % snapshot->op_count];
	pick_run(&arena, &input, op, &run);
	if (bind_args(&arena, op, &run, &bound, &error) == OPD_OK) {
		if (place(&bound, &input, &error) && bind_outputs(&arena, &bound, &error) == OPD_OK && is_small(&bound))
			run_bound(&bound, &error);
		free_operands(&bound);
	}
	arena_fini(&arena);
	return 0;
}
