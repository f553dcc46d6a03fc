/* The native ops of the families matmul, position, attention and quant, where the golden cases don't look: every generated
 * variant in other layouts, in place and on several threads; the checks of index operands; claims of size that have no memory
 * behind them. */
#include <check.h>
#include <math.h>
#include <stdlib.h>

#include "providers/ops/kernel.h"
#include "providers/ops/ops.h"

/* ---- A host ------------------------------------------------------------------------------------------------------------ */

static bool host_cancels;
static bool host_has_memory;

static void *host_alloc(const opd_host *host, uint64_t bytes)
{
	(void)host;
	return host_has_memory ? malloc(bytes) : NULL;
}

static void host_free(const opd_host *host, void *memory)
{
	(void)host;
	free(memory);
}

static bool host_cancelled(const opd_exec *exec)
{
	(void)exec;
	return host_cancels;
}

/* Shares as small as they may be, the last first. */
static void split_backwards(const opd_exec *exec, uint64_t items, uint64_t grain, opd_range_fn range, void *argument)
{
	for (uint64_t end = items; end > 0;) {
		uint64_t begin = end > grain ? end - grain : 0;
		range(argument, begin, end, exec->threads - 1);
		end = begin;
	}
}

static const opd_host host = {
	.abi = OPD_PROVIDER_ABI,
	.struct_bytes = sizeof host,
	.alloc = host_alloc,
	.free = host_free,
	.parallel_for = split_backwards,
	.cancelled = host_cancelled,
};

/* ---- Operands ---------------------------------------------------------------------------------------------------------- */

#define ARGS 8
#define RESULTS 2

/* A tensor with its own shape and strides, and memory of its own or none. */
struct operand {
	opd_tensor tensor;
	int64_t shape[OPD_RANK_MAX];
	int64_t strides[OPD_RANK_MAX];
	void *owned;
};

static size_t operand_bytes(const struct operand *operand)
{
	return operand->tensor.elements * opd_dtype_bytes(operand->tensor.dtype);
}

/* strides NULL: row-major. data NULL: new zeroed memory, for contiguous ones. */
static void operand_init(struct operand *operand, opd_dtype dtype, uint32_t rank, const int64_t *shape, const int64_t *strides,
                         void *data)
{
	uint64_t elements = 1;
	bool contiguous = true;
	for (uint32_t i = rank; i-- > 0;) {
		operand->shape[i] = shape[i];
		operand->strides[i] = strides != NULL ? strides[i] : (int64_t)elements;
		contiguous = contiguous && (shape[i] == 1 || operand->strides[i] == (int64_t)elements);
		elements *= (uint64_t)shape[i];
	}
	if (data == NULL)
		data = operand->owned = calloc(elements + 1, opd_dtype_bytes(dtype));
	ck_assert_ptr_nonnull(data);
	operand->tensor = (opd_tensor){
		.struct_bytes = sizeof operand->tensor,
		.dtype = dtype,
		.rank = rank,
		.shape = operand->shape,
		.strides = operand->strides,
		.data = data,
		.elements = elements,
		.alignment = 1,
		.flags = (contiguous || elements == 0 ? OPD_TENSOR_CONTIGUOUS : 0u) | (elements == 0 ? OPD_TENSOR_EMPTY : 0u),
	};
}

/* A copy of a contiguous operand whose elements lie apart and whose last two dimensions are exchanged in memory; between the
 * elements lies 0xff: NaN, or an index out of range. */
static void operand_spread(struct operand *copy, const struct operand *from)
{
	const opd_tensor *tensor = &from->tensor;
	int64_t strides[OPD_RANK_MAX];
	int64_t place[OPD_RANK_MAX]; /* dimensions, innermost in memory first */
	int64_t step = 2;
	for (uint32_t i = 0; i < tensor->rank; i++)
		place[i] = tensor->rank - 1 - i;
	if (tensor->rank >= 2) {
		place[0] = tensor->rank - 2;
		place[1] = tensor->rank - 1;
	}
	for (uint32_t i = 0; i < tensor->rank; i++) {
		strides[place[i]] = step;
		step = step * tensor->shape[place[i]] + 3;
	}
	size_t bytes = opd_dtype_bytes(tensor->dtype);
	void *memory = malloc((size_t)(step + 1) * bytes);
	ck_assert_ptr_nonnull(memory);
	memset(memory, 0xff, (size_t)(step + 1) * bytes);
	operand_init(copy, tensor->dtype, tensor->rank, tensor->shape, strides, memory);
	copy->owned = memory;
	for (uint64_t i = 0; i < tensor->elements; i++)
		memcpy(kernel_element(&copy->tensor, i), (unsigned char *)tensor->data + i * bytes, bytes);
}

/* ---- Calls ------------------------------------------------------------------------------------------------------------- */

/* The arguments of a call, and what came of it. */
struct made {
	opd_generator generator; /* first: the generator's callbacks find the rest by it */
	const opd_op *op;
	struct operand operands[ARGS];
	opd_arg args[ARGS];
	uint32_t arg_count;
	struct operand results[RESULTS];
	uint32_t result_count;
	opd_error error;
	uint64_t random;
};

/* Begin of parameter `index` in the schema ("Tensor? bias=None…"); NULL past the last. */
static const char *parameter_at(const opd_op *op, uint32_t index)
{
	const char *at = strchr(op->schema, '(') + 1;
	for (; index > 0; index--) {
		at += strcspn(at, ",)");
		if (*at == ')')
			return NULL;
		at += strspn(at, ", ");
	}
	return at;
}

static bool parameter_is(const char *parameter, const char *name)
{
	const char *own = parameter + strcspn(parameter, " ") + 1;
	return strncmp(own, name, strlen(name)) == 0 && strchr("=,)", own[strlen(name)]) != NULL;
}

static uint32_t parameter_index(const opd_op *op, const char *name)
{
	const char *parameter;
	for (uint32_t i = 0; (parameter = parameter_at(op, i)) != NULL; i++)
		if (parameter_is(parameter, name))
			return i;
	ck_abort_msg("%s has no parameter %s", op->schema, name);
	return 0;
}

/* The defaults that these families have: None, True, False, "bf16". */
static opd_arg parameter_default(const char *parameter)
{
	size_t length = strcspn(parameter, ",)");
	const char *value = memchr(parameter, '=', length);
	if (value == NULL || strncmp(value, "=None", 5) == 0)
		return (opd_arg){.kind = OPD_ARG_NONE};
	if (value[1] == '"')
		return (opd_arg){.kind = OPD_ARG_STR, .count = 4, .str = "bf16"};
	return (opd_arg){.kind = OPD_ARG_BOOL, .b = value[1] == 'T'};
}

static void made_begin(struct made *made, const opd_op *op)
{
	const char *parameter;
	memset(made, 0, sizeof *made);
	made->op = op;
	made->random = 1;
	made->result_count = strstr(op->schema, "-> (Tensor, Tensor)") != NULL ? 2 : 1;
	for (; (parameter = parameter_at(op, made->arg_count)) != NULL; made->arg_count++)
		made->args[made->arg_count] = parameter_default(parameter);
	ck_assert_uint_le(made->arg_count, ARGS);
}

static void made_end(struct made *made)
{
	for (uint32_t i = 0; i < ARGS; i++)
		free(made->operands[i].owned);
	for (uint32_t i = 0; i < RESULTS; i++)
		free(made->results[i].owned);
}

static void *give_tensor(struct made *made, const char *name, opd_dtype dtype, uint32_t rank, const int64_t *shape,
                         const int64_t *strides, void *data)
{
	uint32_t index = parameter_index(made->op, name);
	operand_init(&made->operands[index], dtype, rank, shape, strides, data);
	made->args[index] = (opd_arg){.kind = OPD_ARG_TENSOR, .tensor = &made->operands[index].tensor};
	return made->operands[index].tensor.data;
}

static opd_arg *argument(struct made *made, const char *name, opd_arg_kind kind)
{
	opd_arg *arg = &made->args[parameter_index(made->op, name)];
	*arg = (opd_arg){.kind = kind};
	return arg;
}

static opd_call made_call(struct made *made)
{
	return (opd_call){
		.struct_bytes = sizeof(opd_call), .arg_count = made->arg_count, .output_count = made->result_count, .args = made->args};
}

/* Shape function and check, as a host does before it runs. */
static opd_status made_shape(struct made *made, opd_dtype *dtypes, uint32_t *ranks, int64_t (*shapes)[OPD_RANK_MAX])
{
	opd_call call = made_call(made);
	opd_output outputs[RESULTS];
	opd_output *pointers[RESULTS];
	for (uint32_t i = 0; i < RESULTS; i++) {
		outputs[i] = (opd_output){.struct_bytes = sizeof outputs[i], .rank_max = OPD_RANK_MAX, .shape = shapes[i]};
		pointers[i] = &outputs[i];
	}
	opd_status status = made->op->shape(made->op, &call, pointers, &made->error);
	for (uint32_t i = 0; i < RESULTS; i++) {
		dtypes[i] = outputs[i].dtype;
		ranks[i] = outputs[i].rank;
	}
	if (status == OPD_OK && made->op->check != NULL)
		status = made->op->check(made->op, &call, &made->error);
	return status;
}

/* All of it. `in_place`: results lie in the memory of the operands that may be donated. */
static opd_status made_run(struct made *made, uint32_t threads, bool in_place)
{
	opd_dtype dtypes[RESULTS];
	uint32_t ranks[RESULTS];
	int64_t shapes[RESULTS][OPD_RANK_MAX];
	const opd_tensor *outputs[RESULTS];
	opd_status status = made_shape(made, dtypes, ranks, shapes);
	if (status != OPD_OK)
		return status;
	for (uint32_t i = 0; i < made->result_count; i++) {
		void *data = NULL;
		for (uint32_t p = 0; in_place && p < made->op->in_place_count; p++)
			if (made->op->in_place[p].result == i)
				data = made->operands[made->op->in_place[p].param].tensor.data;
		operand_init(&made->results[i], dtypes[i], ranks[i], shapes[i], NULL, data);
		if (data == NULL)
			memset(made->results[i].owned, 0xa5, operand_bytes(&made->results[i]));
		outputs[i] = &made->results[i].tensor;
	}
	opd_call call = made_call(made);
	call.outputs = outputs;
	const opd_exec exec = {.struct_bytes = sizeof exec, .threads = threads, .host = &host};
	ck_assert_uint_gt(made->op->native->cost_ns(made->op->native, &call), 0);
	return made->op->native->run(made->op->native, NULL, &call, &exec, &made->error);
}

static double result_at(const struct made *made, uint64_t index)
{
	return element_load_f64(made->results[0].tensor.dtype, kernel_element(&made->results[0].tensor, index));
}

static void assert_same_results(const struct made *a, const struct made *b)
{
	for (uint32_t i = 0; i < a->result_count; i++) {
		ck_assert_uint_eq(operand_bytes(&a->results[i]), operand_bytes(&b->results[i]));
		ck_assert_mem_eq(a->results[i].tensor.data, b->results[i].tensor.data, operand_bytes(&a->results[i]));
	}
}

static void assert_text(const struct made *made, const char *text)
{
	ck_assert_msg(strstr(made->error.text, text) != NULL, "\"%s\" has no \"%s\"", made->error.text, text);
}

/* ---- A generator's host -------------------------------------------------------------------------------------------------- */

static uint64_t next_random(struct made *made)
{
	made->random = made->random * 6364136223846793005u + 1442695040888963407u;
	return made->random >> 33;
}

static void *make_tensor(opd_generator *generator, const char *name, opd_dtype dtype, uint32_t rank, const int64_t *shape)
{
	return give_tensor((struct made *)generator, name, dtype, rank, shape, NULL, NULL);
}

static void make_int(opd_generator *generator, const char *name, int64_t value)
{
	argument((struct made *)generator, name, OPD_ARG_INT)->i = value;
}

static void make_float(opd_generator *generator, const char *name, double value)
{
	argument((struct made *)generator, name, OPD_ARG_FLOAT)->f = value;
}

static void make_bool(opd_generator *generator, const char *name, bool value)
{
	argument((struct made *)generator, name, OPD_ARG_BOOL)->b = value;
}

static void make_str(opd_generator *generator, const char *name, const char *value)
{
	opd_arg *arg = argument((struct made *)generator, name, OPD_ARG_STR);
	arg->str = value;
	arg->count = (uint32_t)strlen(value);
}

/* Four uniform numbers are normal enough. */
static void make_values(opd_generator *generator, void *memory, opd_dtype dtype, uint64_t elements, double scale)
{
	struct made *made = (struct made *)generator;
	for (uint64_t i = 0; i < elements; i++) {
		double sum = 0;
		for (int k = 0; k < 4; k++)
			sum += (double)next_random(made) * 0x1p-31 - 0.5;
		element_store_f64(dtype, (unsigned char *)memory + i * opd_dtype_bytes(dtype), sum * 1.7 * scale);
	}
}

static int64_t pick_value(opd_generator *generator, int64_t low, int64_t high)
{
	ck_assert_int_le(low, high);
	return low + (int64_t)(next_random((struct made *)generator) % (uint64_t)(high - low + 1));
}

static opd_status make(struct made *made, const opd_op *op, opd_dtype dtype, uint32_t variant)
{
	made_begin(made, op);
	made->generator = (opd_generator){
		.struct_bytes = sizeof made->generator,
		.dtype = dtype,
		.variant = variant,
		.dim_count = op->dim_count,
		.dims = op->default_dims,
		.tensor = make_tensor,
		.set_int = make_int,
		.set_float = make_float,
		.set_bool = make_bool,
		.set_str = make_str,
		.fill = make_values,
		.pick = pick_value,
	};
	opd_status status = op->generate(op, &made->generator, &made->error);
	if (status != OPD_OK)
		made_end(made);
	return status;
}

/* ---- Every variant of every op ------------------------------------------------------------------------------------------- */

static const opd_op *op_at(int number)
{
	static const opd_op *const *const families[] = {ops_matmul, ops_position, ops_attention, ops_quant};
	for (size_t i = 0; i < sizeof families / sizeof families[0]; i++)
		for (const opd_op *const *op = families[i]; *op != NULL; op++)
			if (number-- == 0)
				return *op;
	return NULL;
}

#define OPS 10

static const opd_op *find_op(const char *name)
{
	for (int i = 0; i < OPS; i++)
		if (strcmp(op_at(i)->native->op, name) == 0)
			return op_at(i);
	ck_abort_msg("no op %s", name);
	return NULL;
}

/* Calls `visit` with the run result of each variant and dtype of an op. */
static void for_each_variant(const opd_op *op, void (*visit)(const struct made *))
{
	uint32_t calls = 0;
	for (int number = 1; number < OPD_DTYPE_COUNT; number++) {
		struct made made;
		opd_status status = OPD_OK;
		for (uint32_t variant = 0; (status = make(&made, op, (opd_dtype)number, variant)) == OPD_OK; variant++, calls++) {
			ck_assert_msg(made_run(&made, 1, false) == OPD_OK, "variant %u: %s", variant, made.error.text);
			visit(&made);
			made_end(&made);
		}
		ck_assert_msg(status == OPD_OUT_OF_RANGE || status == OPD_INVALID_ARGUMENT, "%s", made.error.text);
	}
	ck_assert_uint_ge(calls, 6); /* at least three variants for two dtypes */
}

static void visit_threads(const struct made *made)
{
	struct made again;
	ck_assert_int_eq(make(&again, made->op, made->generator.dtype, made->generator.variant), OPD_OK);
	ck_assert_int_eq(made_run(&again, 4, false), OPD_OK);
	assert_same_results(made, &again);
	made_end(&again);
}

START_TEST(bits_do_not_depend_on_the_number_of_threads)
{
	for_each_variant(op_at(_i), visit_threads);
}
END_TEST

static void visit_layout(const struct made *made)
{
	struct made spread;
	made_begin(&spread, made->op);
	memcpy(spread.args, made->args, sizeof spread.args);
	for (uint32_t i = 0; i < made->arg_count; i++) {
		if (made->args[i].kind != OPD_ARG_TENSOR)
			continue;
		operand_spread(&spread.operands[i], &made->operands[i]);
		spread.args[i].tensor = &spread.operands[i].tensor;
	}
	ck_assert_msg(made_run(&spread, 2, false) == OPD_OK, "%s", spread.error.text);
	assert_same_results(made, &spread);
	made_end(&spread);
}

START_TEST(an_operands_layout_does_not_show_in_the_result)
{
	for_each_variant(op_at(_i), visit_layout);
}
END_TEST

static void visit_in_place(const struct made *made)
{
	struct made again;
	ck_assert_int_eq(make(&again, made->op, made->generator.dtype, made->generator.variant), OPD_OK);
	ck_assert_int_eq(made_run(&again, 3, true), OPD_OK);
	assert_same_results(made, &again);
	made_end(&again);
}

START_TEST(in_place_gives_the_same_bits)
{
	const opd_op *op = find_op(_i == 0 ? "rotary_embedding" : "reshape_and_cache");
	ck_assert_uint_ne(op->native->flags & OPD_IMPL_IN_PLACE, 0);
	ck_assert_uint_eq(op->in_place_count, 2);
	for_each_variant(op, visit_in_place);
}
END_TEST

START_TEST(a_result_of_another_shape_is_internal_and_stays_unwritten)
{
	const opd_op *op = op_at(_i);
	struct made made;
	ck_assert_int_eq(make(&made, op, strcmp(op->native->op, "scaled_mm") == 0 ? OPD_i8 : OPD_f32, 0), OPD_OK);
	ck_assert_int_eq(made_run(&made, 1, false), OPD_OK);
	const opd_tensor *outputs[RESULTS] = {&made.results[0].tensor, &made.results[1].tensor};
	const opd_exec exec = {.struct_bytes = sizeof exec, .threads = 1, .host = &host};
	opd_call call = made_call(&made);
	call.outputs = outputs;
	made.results[0].shape[made.results[0].tensor.rank - 1]--;
	memset(made.results[0].owned, 0xa5, operand_bytes(&made.results[0]));
	ck_assert_int_eq(op->native->run(op->native, NULL, &call, &exec, &made.error), OPD_INTERNAL);
	for (size_t i = 0; i < operand_bytes(&made.results[0]); i++)
		ck_assert_uint_eq(((unsigned char *)made.results[0].owned)[i], 0xa5);
	made_end(&made);
}
END_TEST

/* NaN lies in every unused slot of the ragged variants' caches, and −1 or a block too many in the unused table entries. */
static void visit_no_nan(const struct made *made)
{
	for (uint64_t i = 0; i < made->results[0].tensor.elements; i++)
		ck_assert_msg(!isnan(result_at(made, i)), "variant %u, element %llu", made->generator.variant, (unsigned long long)i);
}

START_TEST(what_lies_past_a_sequences_end_never_shows)
{
	for_each_variant(find_op("paged_attention"), visit_no_nan);
}
END_TEST

START_TEST(a_cancelled_run_says_so)
{
	struct made made;
	ck_assert_int_eq(make(&made, find_op(_i == 0 ? "linear" : "attention"), OPD_f32, 0), OPD_OK);
	host_cancels = true;
	ck_assert_int_eq(made_run(&made, 1, false), OPD_CANCELLED);
	made_end(&made);
}
END_TEST

START_TEST(attention_without_scratch_is_resource_exhausted)
{
	struct made made;
	ck_assert_int_eq(make(&made, find_op("attention"), OPD_f32, 0), OPD_OK);
	host_has_memory = false;
	ck_assert_int_eq(made_run(&made, 1, false), OPD_RESOURCE_EXHAUSTED);
	assert_text(&made, "attention: no memory for ");
	made_end(&made);
}
END_TEST

/* ---- Values ------------------------------------------------------------------------------------------------------------ */

START_TEST(an_i8_sum_past_2_to_31_does_not_wrap)
{
	static int8_t least = -128;
	static float one = 1;
	const int64_t shape[2] = {1, 140000}, strides[2] = {0, 0}, scalar = 1;
	struct made made;
	made_begin(&made, find_op("scaled_mm"));
	give_tensor(&made, "a", OPD_i8, 2, shape, strides, &least);
	give_tensor(&made, "b", OPD_i8, 2, shape, strides, &least);
	give_tensor(&made, "scale_a", OPD_f32, 1, &scalar, NULL, &one);
	give_tensor(&made, "scale_b", OPD_f32, 1, &scalar, NULL, &one);
	make_str(&made.generator, "out_dtype", "f32");
	ck_assert_int_eq(made_run(&made, 1, false), OPD_OK);
	ck_assert_double_eq(result_at(&made, 0), 140000.0 * 16384);
	made_end(&made);
}
END_TEST

/* One query, D of 1, over two keys whose scores are given; values 1 and 3. */
static double mixed_value(double score, double other)
{
	const int64_t one[4] = {1, 1, 1, 1}, two[4] = {1, 2, 1, 1};
	struct made made;
	made_begin(&made, find_op("attention"));
	*(double *)give_tensor(&made, "query", OPD_f64, 4, one, NULL, NULL) = 1;
	double *key = give_tensor(&made, "key", OPD_f64, 4, two, NULL, NULL);
	double *value = give_tensor(&made, "value", OPD_f64, 4, two, NULL, NULL);
	key[0] = score;
	key[1] = other;
	value[0] = 1;
	value[1] = 3;
	make_float(&made.generator, "scale", 1);
	ck_assert_int_eq(made_run(&made, 1, false), OPD_OK);
	double result = result_at(&made, 0);
	made_end(&made);
	return result;
}

START_TEST(infinite_scores_are_a_softmaxs)
{
	ck_assert_double_eq(mixed_value(0, 0), 2);
	ck_assert_double_eq(mixed_value(-INFINITY, 5), 3); /* also when the −inf comes first */
	ck_assert_double_eq(mixed_value(5, -INFINITY), 1);
	ck_assert_double_nan(mixed_value(-INFINITY, -INFINITY));
	ck_assert_double_nan(mixed_value(INFINITY, 0));
	ck_assert_double_nan(mixed_value(0, INFINITY));
	ck_assert_double_nan(mixed_value(NAN, 0));
	ck_assert_double_eq(mixed_value(-1e300, 1e300), 3);
}
END_TEST

START_TEST(of_two_tokens_for_one_slot_one_stays_whole)
{
	const int64_t token_shape[3] = {3, 2, 4}, cache_shape[4] = {1, 2, 2, 4}, tokens = 3;
	static const int64_t slots[3] = {1, 1, -1};
	struct made made;
	made_begin(&made, find_op("reshape_and_cache"));
	uint8_t *key = give_tensor(&made, "key", OPD_u8, 3, token_shape, NULL, NULL);
	uint8_t *value = give_tensor(&made, "value", OPD_u8, 3, token_shape, NULL, NULL);
	give_tensor(&made, "key_cache", OPD_u8, 4, cache_shape, NULL, NULL);
	give_tensor(&made, "value_cache", OPD_u8, 4, cache_shape, NULL, NULL);
	memcpy(give_tensor(&made, "slot_mapping", OPD_i64, 1, &tokens, NULL, NULL), slots, sizeof slots);
	for (uint8_t i = 0; i < 24; i++)
		key[i] = value[i] = (uint8_t)(1 + i / 8);
	ck_assert_int_eq(made_run(&made, 2, true), OPD_OK);
	for (uint64_t i = 0; i < 16; i++)
		ck_assert_double_eq(result_at(&made, i), i < 8 ? 0 : 2);
	made_end(&made);
}
END_TEST

/* ---- Index operands ---------------------------------------------------------------------------------------------------- */

static const opd_dtype index_dtypes[] = {OPD_i32, OPD_i64};

static void give_indices(struct made *made, const char *name, opd_dtype dtype, uint32_t rank, const int64_t *shape,
                         const int64_t *values)
{
	unsigned char *memory = give_tensor(made, name, dtype, rank, shape, NULL, NULL);
	int64_t count = rank == 1 ? shape[0] : shape[0] * shape[1];
	for (int64_t i = 0; i < count; i++)
		element_store_i64(dtype, memory + (size_t)i * opd_dtype_bytes(dtype), values[i]);
}

static void assert_refused(struct made *made, const char *text)
{
	ck_assert_int_eq(made_run(made, 1, false), OPD_INVALID_ARGUMENT);
	assert_text(made, text);
	made_end(made);
}

START_TEST(a_scale_that_f32_doesnt_have_is_refused)
{
	const int64_t one[4] = {1, 1, 1, 1};
	static const double scales[] = {1e39, -1e300};
	for (int i = 0; i < 2; i++) {
		struct made made;
		made_begin(&made, find_op("attention"));
		give_tensor(&made, "query", OPD_f32, 4, one, NULL, NULL);
		give_tensor(&made, "key", OPD_f32, 4, one, NULL, NULL);
		give_tensor(&made, "value", OPD_f32, 4, one, NULL, NULL);
		make_float(&made.generator, "scale", scales[i]);
		assert_refused(&made, i == 0 ? "attention: scale is 1e+39, expected at most 3.40282e+38 in magnitude, as f32 has it"
		                             : "attention: scale is -1e+300, expected at most 3.40282e+38 in magnitude, as f32 has it");
	}
}
END_TEST

START_TEST(an_id_out_of_range_is_named_with_its_place_and_the_range)
{
	const int64_t table[2] = {5, 3}, ids[2] = {2, 2};
	static const int64_t high[4] = {0, 4, 5, 9}, low[4] = {0, 4, 3, -2};
	struct made made;
	made_begin(&made, find_op("embedding"));
	give_tensor(&made, "table", OPD_bf16, 2, table, NULL, NULL);
	give_indices(&made, "ids", index_dtypes[_i], 2, ids, high);
	assert_refused(&made, "embedding: ids[1, 0] is 5, expected 0 to 4 (rows of table)");
	made_begin(&made, find_op("embedding"));
	give_tensor(&made, "table", OPD_bf16, 2, table, NULL, NULL);
	give_indices(&made, "ids", index_dtypes[_i], 2, ids, low);
	assert_refused(&made, "embedding: ids[1, 1] is -2, expected 0 to 4 (rows of table)");
}
END_TEST

/* Two sequences of 1 and 2 queries over 3 blocks of 4; the table's second column is unused. */
static void make_paged(struct made *made, opd_dtype dtype, const int64_t *table, const int64_t *lengths, const int64_t *starts)
{
	const int64_t query[3] = {3, 2, 4}, cache[4] = {3, 4, 1, 4}, table_shape[2] = {2, 2}, two = 2, three = 3;
	made_begin(made, find_op("paged_attention"));
	give_tensor(made, "query", OPD_f32, 3, query, NULL, NULL);
	give_tensor(made, "key_cache", OPD_f32, 4, cache, NULL, NULL);
	give_tensor(made, "value_cache", OPD_f32, 4, cache, NULL, NULL);
	give_indices(made, "block_table", dtype, 2, table_shape, table);
	give_indices(made, "seq_lens", dtype, 1, &two, lengths);
	give_indices(made, "query_start_loc", dtype, 1, &three, starts);
	make_float(&made->generator, "scale", 1);
}

START_TEST(paged_attentions_indices_are_checked_each)
{
	static const int64_t table[4] = {2, -7, 0, INT32_MAX}, lengths[2] = {4, 3}, starts[3] = {0, 1, 3};
	static const int64_t bad_table[4] = {2, 0, 3, 0}, longer[2] = {5, 3}, too_long[2] = {4, 9}, negative[2] = {-1, 3},
	                     short_length[2] = {4, 1};
	static const int64_t late[3] = {1, 1, 3}, falls[3] = {0, 1, 0}, past[3] = {0, 4, 3}, ends_early[3] = {0, 1, 2};
	opd_dtype dtype = index_dtypes[_i];
	struct made made;
	make_paged(&made, dtype, table, lengths, starts);
	ck_assert_msg(made_run(&made, 1, false) == OPD_OK, "%s", made.error.text);
	made_end(&made);
	make_paged(&made, dtype, bad_table, lengths, starts);
	assert_refused(&made, "paged_attention: block_table[1, 0] is 3, expected 0 to 2 (blocks of key_cache)");
	make_paged(&made, dtype, table, longer, starts); /* now the second entry counts */
	assert_refused(&made, "paged_attention: block_table[0, 1] is -7, expected 0 to 2");
	make_paged(&made, dtype, table, too_long, starts);
	assert_refused(&made, "paged_attention: seq_lens[1] is 9, expected 0 to 8");
	make_paged(&made, dtype, table, negative, starts);
	assert_refused(&made, "paged_attention: seq_lens[0] is -1, expected 0 to 8");
	make_paged(&made, dtype, table, short_length, starts);
	assert_refused(&made, "paged_attention: seq_lens[1] is 1, expected at least 2");
	make_paged(&made, dtype, table, lengths, late);
	assert_refused(&made, "paged_attention: query_start_loc[0] is 1, expected 0");
	make_paged(&made, dtype, table, lengths, falls);
	assert_refused(&made, "paged_attention: query_start_loc[2] is 0, expected 1 (the entry before) to 3");
	make_paged(&made, dtype, table, lengths, past);
	assert_refused(&made, "paged_attention: query_start_loc[1] is 4, expected 0 (the entry before) to 3");
	make_paged(&made, dtype, table, lengths, ends_early);
	assert_refused(&made, "paged_attention: query_start_loc[2] is 2, expected 3");
}
END_TEST

/* ---- Sizes that only strides of 0 can claim: a check may take no longer than the memory behind them ------------------------ */

#define HUGE ((int64_t)1 << 56)

START_TEST(a_repeated_index_is_checked_once)
{
	static int64_t id = 3;
	const int64_t huge = HUGE, zero = 0, table[2] = {3, 0};
	struct made made;
	made_begin(&made, find_op("embedding"));
	give_tensor(&made, "ids", OPD_i64, 1, &huge, &zero, &id);
	give_tensor(&made, "table", OPD_u8, 2, table, NULL, NULL);
	assert_refused(&made, "embedding: ids[0] is 3, expected 0 to 2");
	id = 2;
	made_begin(&made, find_op("embedding"));
	give_tensor(&made, "ids", OPD_i64, 1, &huge, &zero, &id);
	give_tensor(&made, "table", OPD_u8, 2, table, NULL, NULL);
	ck_assert_int_eq(made_run(&made, 1, false), OPD_OK);
	made_end(&made);
}
END_TEST

START_TEST(repeated_sequences_and_blocks_are_checked_once)
{
	static int64_t block = 0, length = HUGE, start = 0;
	static float cache_memory = 0;
	const int64_t query[3] = {0, 1, 1}, cache[4] = {1, 4, 1, 1}, table[2] = {64, HUGE}, lengths = 64, starts = 65;
	const int64_t strides[4] = {0, 0, 0, 0};
	struct made made;
	made_begin(&made, find_op("paged_attention"));
	give_tensor(&made, "query", OPD_f32, 3, query, NULL, NULL);
	give_tensor(&made, "key_cache", OPD_f32, 4, cache, strides, &cache_memory);
	give_tensor(&made, "value_cache", OPD_f32, 4, cache, strides, &cache_memory);
	give_tensor(&made, "block_table", OPD_i64, 2, table, strides, &block);
	give_tensor(&made, "seq_lens", OPD_i64, 1, &lengths, strides, &length);
	give_tensor(&made, "query_start_loc", OPD_i64, 1, &starts, strides, &start);
	make_float(&made.generator, "scale", 1);
	ck_assert_msg(made_run(&made, 1, false) == OPD_OK, "%s", made.error.text);
	made_end(&made);
}
END_TEST

START_TEST(tokens_for_one_repeated_slot_cost_one_copy)
{
	static uint8_t token = 7;
	static int64_t slot = 2;
	const int64_t tokens[3] = {HUGE, 1, 1}, cache[4] = {2, 2, 1, 1}, strides[3] = {0, 0, 0};
	struct made made;
	made_begin(&made, find_op("reshape_and_cache"));
	give_tensor(&made, "key", OPD_u8, 3, tokens, strides, &token);
	give_tensor(&made, "value", OPD_u8, 3, tokens, strides, &token);
	give_tensor(&made, "key_cache", OPD_u8, 4, cache, NULL, NULL);
	give_tensor(&made, "value_cache", OPD_u8, 4, cache, NULL, NULL);
	give_tensor(&made, "slot_mapping", OPD_i64, 1, tokens, strides, &slot);
	ck_assert_int_eq(made_run(&made, 1, false), OPD_OK);
	for (uint64_t i = 0; i < 4; i++)
		ck_assert_double_eq(result_at(&made, i), i == 2 ? 7 : 0);
	made_end(&made);
}
END_TEST

/* ---- The suite --------------------------------------------------------------------------------------------------------- */

static void setup(void)
{
	host_cancels = false;
	host_has_memory = true;
}

static Suite *suite(void)
{
	Suite *s = suite_create("ops_b");
	TCase *t = tcase_create("native");
	suite_add_tcase(s, t);
	tcase_set_timeout(t, 60); /* under a sanitizer */
	tcase_add_checked_fixture(t, setup, NULL);
	tcase_add_loop_test(t, bits_do_not_depend_on_the_number_of_threads, 0, OPS);
	tcase_add_loop_test(t, an_operands_layout_does_not_show_in_the_result, 0, OPS);
	tcase_add_loop_test(t, in_place_gives_the_same_bits, 0, 2);
	tcase_add_loop_test(t, a_result_of_another_shape_is_internal_and_stays_unwritten, 0, OPS);
	tcase_add_test(t, what_lies_past_a_sequences_end_never_shows);
	tcase_add_loop_test(t, a_cancelled_run_says_so, 0, 2);
	tcase_add_test(t, attention_without_scratch_is_resource_exhausted);
	tcase_add_test(t, an_i8_sum_past_2_to_31_does_not_wrap);
	tcase_add_test(t, infinite_scores_are_a_softmaxs);
	tcase_add_test(t, a_scale_that_f32_doesnt_have_is_refused);
	tcase_add_test(t, of_two_tokens_for_one_slot_one_stays_whole);
	tcase_add_loop_test(t, an_id_out_of_range_is_named_with_its_place_and_the_range, 0, 2);
	tcase_add_loop_test(t, paged_attentions_indices_are_checked_each, 0, 2);
	tcase_add_test(t, a_repeated_index_is_checked_once);
	tcase_add_test(t, repeated_sequences_and_blocks_are_checked_once);
	tcase_add_test(t, tokens_for_one_repeated_slot_cost_one_copy);
	return s;
}

int main(void)
{
	SRunner *runner = srunner_create(suite());
	srunner_run_all(runner, CK_NORMAL);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
