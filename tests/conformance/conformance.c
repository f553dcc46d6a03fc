/* Runs every implementation of every op against native: opd's conformance suite, for its own providers and anybody's.
 *
 *     conformance [--provider NAME] [--op NAME] [--dims N,N,...] [--module PATH.so]... [--seed N] [--shrink N] [--brief] [--verbose]
 *     conformance --time [--dtype NAME] [--dims N,N,...] [--threads N] [--provider NAME] [--op NAME] [--module PATH.so]...
 *
 * For each implementation: every dtype and variant that the op's generator knows, random, extreme and small values, several sizes (odd, one,
 * empty, large), contiguous, padded, strided and broadcast operands. Where the predicate accepts, results must be within compare.h's bounds of
 * native's; memory around results and all inputs must stay untouched; bits must not depend on threads, rows or donation where the implementation's
 * flags say so. native is held to the same bits for every layout. Exits with 0 when all passed, 1 after a failure, 77 when OPD_CPU_ISA names an
 * instruction set that this machine lacks, 2 for bad usage. */
#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "element.h"
#include "providers/builtin.h"
#include "tests/conformance/cases.h"
#include "tests/conformance/compare.h"
#include "tests/conformance/host.h"
#include "tests/conformance/timing.h"

/* `MANY` times the default rows are enough work for several threads; native is slow, and takes fewer. */
enum { MANY = 20, MANY_NATIVE = 4 };
enum { DIMS_MAX = 8, SETS_MAX = 3 + 3 * DIMS_MAX, FAILURES_SHOWN = 5, THREADS = 3 };

static int64_t shrink = 1;
static const struct timing *asked; /* its sizes stand for the ops' default ones where an op has as many; others are left out */
static bool brief; /* all kinds of values at default sizes only */

static const char *const values_names[] = {"random", "extreme", "small"};

/* One implementation's count. */
struct tally {
	const opd_op *op;
	const struct host_impl *impl;
	struct schema schema;
	uint64_t passed, failed, refused, invariance, in_place, derived, faults;
	double worst;
	opd_reason last_refusal;
};

/* Which case is being looked at, for messages. */
struct place {
	opd_dtype dtype;
	uint32_t variant;
	const int64_t *dims;
	opd_values values;
	enum case_layout layout;
};

static struct host host;
static uint64_t base_seed = 1;
static bool verbose;

static void dims_text(const struct tally *tally, const int64_t *dims, char *text, size_t bytes)
{
	size_t used = 0;
	text[0] = '\0';
	for (uint32_t i = 0; i < tally->op->dim_count && used < bytes; i++)
		used += (size_t)snprintf(text + used, bytes - used, "%s%lld", i == 0 ? "" : "x", (long long)dims[i]);
}

OPD_PRINTF(3, 4)
static void fail(struct tally *tally, const struct place *place, const char *format, ...)
{
	if (tally->failed++ >= FAILURES_SHOWN && !verbose)
		return;
	char dims[96], text[512];
	dims_text(tally, place->dims, dims, sizeof dims);
	va_list args;
	va_start(args, format);
	(void)vsnprintf(text, sizeof text, format, args);
	va_end(args);
	(void)printf("  FAIL %s %s: %s variant %u, %s (%s), %s values, %s: %s\n", tally->schema.name, tally->impl->provider,
	             opd_dtype_name(place->dtype), place->variant, dims, tally->op->dims, values_names[place->values],
	             case_layout_name(place->layout), text);
}

static struct host_impl native_of(const struct tally *tally)
{
	return (struct host_impl){.impl = tally->op->native, .provider = "native"};
}

static bool is_native(const struct tally *tally)
{
	return tally->impl->impl == tally->op->native;
}

static bool accepts(struct tally *tally, const opd_call *call)
{
	const opd_impl *impl = tally->impl->impl;
	if (impl->predicate == NULL || impl->predicate(impl, tally->impl->state, call, NULL))
		return true;
	opd_reason reason = {0};
	(void)impl->predicate(impl, tally->impl->state, call, &reason);
	tally->last_refusal = reason;
	return false;
}

/* Fresh results of `impl` over a case. A failure of native or of the shape function counts too. */
static bool run_case(struct tally *tally, const struct place *place, const struct host_impl *impl, const struct conf_case *conf_case,
                     uint32_t threads, struct results *results)
{
	opd_error error = {0};
	opd_status status = results_init(results, tally->op, conf_case, &error);
	if (status == OPD_OK) {
		opd_call call = case_call(conf_case, results);
		status = host_run(&host, impl, &call, threads, &error);
	}
	if (status != OPD_OK)
		fail(tally, place, "%s: %s: %s", impl->provider, opd_status_name(status), error.text);
	else if (!results_guarded(results))
		fail(tally, place, "%s wrote outside its results", impl->provider);
	else
		return true;
	results_fini(results);
	return false;
}

/* ---- What flags promise ---------------------------------------------------------------------------------------------------- */

static void check_threads(struct tally *tally, const struct place *place, const struct conf_case *conf_case, const struct results *one)
{
	struct results many;
	if ((tally->impl->impl->flags & OPD_IMPL_THREAD_INVARIANT) == 0 || !run_case(tally, place, tally->impl, conf_case, THREADS, &many))
		return;
	tally->invariance++;
	if (!compare_bits(&many, one, NULL))
		fail(tally, place, "other bits on %d threads than on one, but THREAD_INVARIANT", THREADS);
	results_fini(&many);
}

/* Rows [begin, end) of the case on their own against the same rows of `whole`. 1: the same bits, 0: not, -1: dimension 0 isn't one of rows. */
static int rows_alone(struct tally *tally, const struct place *place, const struct host_impl *impl, const struct conf_case *conf_case,
                      const struct results *whole, int64_t begin, int64_t end)
{
	int64_t extent = whole->outputs[0].tensor.rank < 2 ? 0 : whole->outputs[0].shape[0];
	struct conf_case part;
	struct results results = {0};
	uint64_t first[SCHEMA_RESULTS] = {0};
	opd_error error;
	if (extent < 2 || tally->op->activations == NULL || !case_cut(&part, conf_case, tally->op->activations, extent, begin, end))
		return -1;
	int same = -1;
	bool rows = results_init(&results, tally->op, &part, &error) == OPD_OK;
	for (uint32_t r = 0; r < results.count && rows; r++) {
		const opd_tensor *cut = &results.outputs[r].tensor, *full = &whole->outputs[r].tensor;
		rows = full->rank > 0 && full->shape[0] == extent && cut->elements * (uint64_t)extent == full->elements * (uint64_t)(end - begin);
		first[r] = full->elements / (uint64_t)extent * (uint64_t)begin;
	}
	results_fini(&results);
	opd_call call = case_call(&part, NULL);
	bool valid = rows && (tally->op->check == NULL || tally->op->check(tally->op, &call, &error) == OPD_OK);
	if (valid && run_case(tally, place, impl, &part, 1, &results)) {
		same = compare_bits(&results, whole, first);
		results_fini(&results);
	}
	case_fini(&part);
	return same;
}

/* Native, whose rows are independent by definition where there are rows, tells whether dimension 0 is one of rows. */
static void check_rows(struct tally *tally, const struct place *place, const struct conf_case *conf_case, const struct results *native,
                       const struct results *got)
{
	if ((tally->impl->impl->flags & OPD_IMPL_BATCH_INVARIANT) == 0 || native->outputs[0].tensor.rank < 2)
		return;
	int64_t extent = native->outputs[0].shape[0];
	const int64_t ranges[][2] = {{extent - 1, extent}, {0, extent / 2}, {extent / 3, extent / 3 + extent / 2}};
	for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
		struct host_impl reference = native_of(tally);
		if (rows_alone(tally, place, &reference, conf_case, native, ranges[i][0], ranges[i][1]) != 1)
			return;
		tally->invariance++;
		if (rows_alone(tally, place, tally->impl, conf_case, got, ranges[i][0], ranges[i][1]) == 0)
			fail(tally, place, "rows %lld to %lld have other bits alone, but BATCH_INVARIANT", (long long)ranges[i][0],
			     (long long)ranges[i][1]);
	}
}

/* Donates each pair's operand: the output's memory is the operand's. */
static void check_in_place(struct tally *tally, const struct place *place, const struct conf_case *conf_case, const struct results *got)
{
	struct conf_case donated;
	struct results results;
	opd_error error = {0};
	if ((tally->impl->impl->flags & OPD_IMPL_IN_PLACE) == 0 || tally->op->in_place_count == 0)
		return;
	case_copy(&donated, conf_case, CASE_CONTIGUOUS);
	opd_status status = results_init(&results, tally->op, &donated, &error);
	for (uint32_t i = 0; i < tally->op->in_place_count && status == OPD_OK; i++) {
		const opd_in_place *pair = &tally->op->in_place[i];
		results.outputs[pair->result].tensor.data = donated.operands[pair->param].tensor.data;
	}
	if (status == OPD_OK) {
		opd_call call = case_call(&donated, &results);
		status = host_run(&host, tally->impl, &call, 1, &error);
	}
	tally->in_place++;
	if (status != OPD_OK)
		fail(tally, place, "in place: %s: %s", opd_status_name(status), error.text);
	else if (!compare_bits(&results, got, NULL))
		fail(tally, place, "other bits in place");
	results_fini(&results);
	case_fini(&donated);
}

/* ---- Indices that a device checks --------------------------------------------------------------------------------------------- */

/* Spoils one element of each index operand in turn. Where the op's own check refuses that, the kernels must too, and touch nothing. */
static void check_index(struct tally *tally, const struct place *place, const struct conf_case *conf_case, uint32_t param, int64_t value)
{
	struct conf_case spoilt;
	struct results results;
	opd_error expected = {0}, error = {0};
	case_copy(&spoilt, conf_case, CASE_CONTIGUOUS);
	const opd_tensor *indices = &spoilt.operands[param].tensor;
	element_store_i64(indices->dtype, operand_at(&spoilt.operands[param], indices->elements / 2), value);
	opd_call call = case_call(&spoilt, NULL);
	if (tally->op->check(tally->op, &call, &expected) == OPD_INVALID_ARGUMENT && results_init(&results, tally->op, &spoilt, &error) == OPD_OK) {
		call = case_call(&spoilt, &results);
		opd_status status = host_run(&host, tally->impl, &call, 1, &error);
		tally->faults++;
		if (status != OPD_INVALID_ARGUMENT)
			fail(tally, place, "%s with index %lld, expected INVALID_ARGUMENT: %s %s", opd_status_name(status), (long long)value, expected.text, error.text);
		results_fini(&results);
	}
	case_fini(&spoilt);
}

static void check_indices(struct tally *tally, const struct place *place, const struct conf_case *conf_case)
{
	if ((tally->impl->impl->flags & OPD_IMPL_CHECKS_INDICES) == 0 || tally->op->check == NULL || place->values != OPD_VALUES_RANDOM)
		return;
	for (uint32_t p = 0; p < tally->schema.param_count; p++) {
		const opd_tensor *tensor = &conf_case->operands[p].tensor;
		if (conf_case->operands[p].memory == NULL || (tensor->dtype != OPD_i32 && tensor->dtype != OPD_i64) || tensor->elements == 0)
			continue;
		check_index(tally, place, conf_case, p, -5);
		check_index(tally, place, conf_case, p, INT32_MAX);
	}
}

/* An implementation that asked for derived copies: once more with operands that stay, which makes them, and again, which finds them. */
static void check_derived(struct tally *tally, const struct place *place, const struct bounds *bounds, const struct results *native,
                          struct conf_case *conf_case)
{
	struct results made, found;
	char detail[256] = "";
	if (host.copies.asked == 0)
		return;
	case_make_constant(conf_case, tally->op->activations, true);
	if (run_case(tally, place, tally->impl, conf_case, 1, &made)) {
		const uint64_t before = host.copies.found;
		tally->derived++;
		if (compare_results(tally->op, bounds, native, &made, detail, sizeof detail) > 1)
			fail(tally, place, "of a derived copy: %s", detail);
		if (run_case(tally, place, tally->impl, conf_case, THREADS, &found)) {
			if (host.copies.first != NULL && host.copies.found == before)
				fail(tally, place, "derived copies were made and not found again");
			else if (!compare_bits(&found, &made, NULL))
				fail(tally, place, "other bits of a derived copy on %d threads than when it was made on one", THREADS);
			results_fini(&found);
		}
		results_fini(&made);
	}
	derived_copies_drop(&host.copies);
}

/* ---- One case ------------------------------------------------------------------------------------------------------------- */

/* A copy of every byte of the operands, to see that none has changed. */
static bool operands_equal(const struct conf_case *a, const struct conf_case *b)
{
	for (uint32_t p = 0; p < SCHEMA_PARAMS; p++)
		if (a->operands[p].bytes != b->operands[p].bytes ||
		    (a->operands[p].bytes > 0 && memcmp(a->operands[p].memory, b->operands[p].memory, a->operands[p].bytes) != 0))
			return false;
	return true;
}

static void judge(struct tally *tally, const struct place *place, const struct bounds *bounds, const struct results *native,
                  const struct results *got)
{
	char detail[256] = "";
	double ratio = is_native(tally) ? 0 : compare_results(tally->op, bounds, native, got, detail, sizeof detail);
	if (ratio > 1)
		fail(tally, place, "%s", detail);
	else if (is_native(tally) && !compare_bits(got, native, NULL))
		fail(tally, place, "other bits than over contiguous operands");
	else
		tally->passed++;
	if (isfinite(ratio))
		tally->worst = fmax(tally->worst, ratio);
}

/* The case `base` in one layout. `native` are its right results. */
static void check_layout(struct tally *tally, struct place *place, const struct conf_case *base, const struct bounds *bounds,
                         const struct results *native)
{
	struct conf_case laid, before;
	struct results got;
	case_copy(&laid, base, place->layout);
	case_copy(&before, base, place->layout);
	host.copies.asked = 0;
	opd_call call = case_call(&laid, native);
	if (!accepts(tally, &call)) {
		tally->refused++;
	} else if (run_case(tally, place, tally->impl, &laid, 1, &got)) {
		if (!operands_equal(&laid, &before))
			fail(tally, place, "an input was changed");
		judge(tally, place, bounds, native, &got);
		check_threads(tally, place, &laid, &got);
		if (place->layout == CASE_CONTIGUOUS) {
			check_rows(tally, place, &laid, native, &got);
			check_in_place(tally, place, &laid, &got);
			check_indices(tally, place, &laid);
		}
		check_derived(tally, place, bounds, native, &laid);
		results_fini(&got);
	}
	case_fini(&laid);
	case_fini(&before);
}

/* Layouts [first, last] of a generated case, against native's results for it. */
static void check_layouts(struct tally *tally, struct place *place, const struct conf_case *base, enum case_layout first,
                          enum case_layout last)
{
	struct host_impl reference = native_of(tally);
	struct results native;
	struct bounds bounds = {0};
	opd_error error = {0};
	place->layout = first;
	if (!run_case(tally, place, &reference, base, 1, &native))
		return;
	opd_status status = is_native(tally) ? OPD_OK : bounds_init(&bounds, &host, tally->op, base, &native, &error);
	if (status != OPD_OK)
		fail(tally, place, "no bounds: %s", error.text);
	for (int layout = (int)first; layout <= (int)last && status == OPD_OK; layout++) {
		place->layout = (enum case_layout)layout;
		check_layout(tally, place, base, &bounds, &native);
	}
	bounds_fini(&bounds);
	results_fini(&native);
}

/* False when the generator has no such variant. */
static bool check_case(struct tally *tally, struct place *place)
{
	struct conf_case base;
	opd_error error = {0};
	uint64_t seed = base_seed * 1000003 + place->variant * 101 + (uint64_t)place->dtype * 7 + place->values;
	opd_status status = case_generate(&base, tally->op, &tally->schema, place->dtype, place->values, place->variant, place->dims, seed, &error);
	if (status == OPD_OUT_OF_RANGE)
		return false;
	if (status == OPD_INVALID_ARGUMENT)
		return true;
	place->layout = CASE_CONTIGUOUS;
	if (status == OPD_OK && (tally->impl->impl->flags & OPD_IMPL_BF16_DENORMALS_ZERO) != 0)
		case_flush_bf16(&base);
	opd_call call = {0};
	if (status == OPD_OK) {
		call = case_call(&base, NULL);
		status = tally->op->check == NULL ? OPD_OK : tally->op->check(tally->op, &call, &error);
	}
	if (status != OPD_OK) {
		fail(tally, place, "generator: %s: %s", opd_status_name(status), error.text);
	} else {
		check_layouts(tally, place, &base, CASE_CONTIGUOUS, CASE_STRIDED);
		if (case_make_uniform(&base))
			check_layouts(tally, place, &base, CASE_BROADCAST, CASE_BROADCAST);
	}
	case_fini(&base);
	return true;
}

/* ---- All cases of an implementation ------------------------------------------------------------------------------------------- */

/* A default size, divided by --shrink where it is large: what matters is around the vector width, and sanitizers are slow. */
static int64_t shrunk(int64_t dim)
{
	return dim >= 64 && dim / shrink >= 8 ? dim / shrink : dim;
}

/* The default sizes, all ones, many rows; then each size in turn odd, one, and empty. */
static size_t dims_sets(const opd_op *op, int64_t many, int64_t sets[SETS_MAX][DIMS_MAX])
{
	size_t count = 3;
	for (uint32_t i = 0; i < op->dim_count; i++) {
		sets[0][i] = asked->dim_count > 0 ? asked->dims[i] : shrunk(op->default_dims[i]);
		sets[1][i] = 1;
		sets[2][i] = sets[0][i] * (i == 0 ? many : 1);
	}
	for (uint32_t i = 0; i < op->dim_count; i++) {
		const int64_t changed[] = {sets[0][i] * 3 / 4 | 1, 1, 0};
		for (size_t c = 0; c < sizeof changed / sizeof changed[0]; c++, count++) {
			memcpy(sets[count], sets[0], sizeof sets[count]);
			sets[count][i] = changed[c];
		}
	}
	return count;
}

static void check_impl(struct tally *tally)
{
	int64_t sets[SETS_MAX][DIMS_MAX];
	size_t count = dims_sets(tally->op, is_native(tally) ? MANY_NATIVE : MANY, sets);
	for (int dtype = 1; dtype < OPD_DTYPE_COUNT; dtype++) {
		for (size_t s = 0; s < count; s++) {
			for (int values = OPD_VALUES_RANDOM; values <= OPD_VALUES_SMALL; values++) {
				/* Native differs from itself only by layout: one kind of values shows it. Many rows are about threads. */
				if (values != OPD_VALUES_RANDOM && (is_native(tally) || s == 2))
					continue;
				if (brief && values != OPD_VALUES_EXTREME && s != 0 && s != 2 && !is_native(tally))
					continue;
				struct place place = {.dtype = (opd_dtype)dtype, .dims = sets[s], .values = (opd_values)values};
				while (check_case(tally, &place))
					place.variant++;
			}
		}
	}
}

static void print_row(const struct tally *tally, const char *remark)
{
	(void)printf("%-20s %-10s %8llu %7llu %8llu %10llu %9llu %8llu %7llu %10.3f  %s\n", tally->schema.name, tally->impl->provider,
	             (unsigned long long)tally->passed, (unsigned long long)tally->failed, (unsigned long long)tally->refused,
	             (unsigned long long)tally->invariance, (unsigned long long)tally->in_place, (unsigned long long)tally->derived,
	             (unsigned long long)tally->faults, tally->worst, remark);
	(void)fflush(stdout);
}

/* Counts an implementation that took nothing as a failure: nothing was shown. */
static void check_and_print(struct tally *tally, uint64_t *passed, uint64_t *failed)
{
	const opd_impl *impl = tally->impl->impl;
	char remark[320] = "";
	if (impl->unsupported != NULL) {
		(void)snprintf(remark, sizeof remark, "not run: %s", impl->unsupported);
	} else if (strcmp(impl->device, "cpu") != 0 && host_find_device(&host, impl->device) == NULL) {
		(void)snprintf(remark, sizeof remark, "not run: needs a %s device", impl->device);
	} else if (tally->op->dim_count > DIMS_MAX || tally->op->generate == NULL || !schema_read(tally->op->schema, &tally->schema)) {
		tally->failed++;
		(void)snprintf(remark, sizeof remark, "no generator, or a schema that this tool can't read: %.200s", tally->op->schema);
	} else {
		check_impl(tally);
		if (tally->refused > 0)
			(void)snprintf(remark, sizeof remark, "last refusal: %s: %s",
			               opd_reason_code_text((opd_reason_code)tally->last_refusal.code), tally->last_refusal.detail);
		if (tally->passed + tally->failed == 0)
			tally->failed++;
	}
	print_row(tally, remark);
	*passed += tally->passed;
	*failed += tally->failed;
}

static int check_all(const char *provider, const char *op_name)
{
	uint64_t passed = 0, failed = 0, rows = 0;
	(void)printf("%-20s %-10s %8s %7s %8s %10s %9s %8s %7s %10s\n", "op", "provider", "passed", "failed", "refused", "invariance", "in place",
	             "derived", "faults", "worst");
	for (size_t i = 0; i < host.impl_count; i++) {
		struct tally tally = {.impl = &host.impls[i], .op = host_find_op(&host, host.impls[i].impl->op)};
		(void)snprintf(tally.schema.name, sizeof tally.schema.name, "%s", host.impls[i].impl->op);
		if (tally.op == NULL || (provider != NULL && strcmp(provider, tally.impl->provider) != 0) ||
		    (op_name != NULL && strcmp(op_name, tally.impl->impl->op) != 0) || (asked->dim_count > 0 && asked->dim_count != tally.op->dim_count))
			continue;
		rows++;
		check_and_print(&tally, &passed, &failed);
	}
	if (rows == 0) {
		(void)printf("no implementation of op %s by provider %s\n", op_name == NULL ? "*" : op_name, provider == NULL ? "*" : provider);
		failed++;
	}
	(void)printf("%llu passed, %llu failed\n", (unsigned long long)passed, (unsigned long long)failed);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

/* ---- Command line ---------------------------------------------------------------------------------------------------------- */

static bool open_builtin(void)
{
	for (size_t i = 0; builtin_modules[i] != NULL; i++) {
		opd_error error = {0};
		if (host_open(&host, builtin_modules[i], &error) != OPD_OK) {
			(void)fprintf(stderr, "%s: %s\n", builtin_modules[i]->name, error.text);
			return false;
		}
	}
	return true;
}

static bool load_module(const char *path)
{
	opd_error error = {0};
	if (host_load(&host, path, &error) == OPD_OK)
		return true;
	(void)fprintf(stderr, "%s: %s\n", path, error.text);
	return false;
}

static int usage(const char *program)
{
	(void)fprintf(stderr,
	              "usage: %s [--provider NAME] [--op NAME] [--dims N,N,...] [--module PATH.so]... [--seed N] [--shrink N] [--brief] [--verbose]\n"
	              "       %s --time [--dtype NAME] [--dims N,N,...] [--threads N] [--provider NAME] [--op NAME] [--module PATH.so]...\n"
	              "       %s --serve [--module PATH.so]...\n",
	              program, program, program);
	return 2;
}

struct arguments {
	struct timing timing; /* provider and op serve both modes */
	bool time;
	bool serve;
	bool bad;
};

/* False when a module can't be loaded. */
static bool read_option(int option, struct arguments *arguments)
{
	struct timing *timing = &arguments->timing;
	if (option == 'p')
		timing->provider = optarg;
	else if (option == 'o')
		timing->op = optarg;
	else if (option == 's')
		base_seed = strtoull(optarg, NULL, 10);
	else if (option == 'b')
		brief = true;
	else if (option == 'k')
		arguments->bad |= (shrink = strtoll(optarg, NULL, 10)) < 1;
	else if (option == 'v')
		verbose = true;
	else if (option == 't')
		arguments->time = true;
	else if (option == 'S')
		arguments->serve = true;
	else if (option == 'y')
		arguments->bad |= (timing->dtype = opd_dtype_parse(optarg)) == OPD_DTYPE_NONE;
	else if (option == 'd')
		arguments->bad |= !timing_dims(optarg, timing);
	else if (option == 'n')
		arguments->bad |= (timing->threads = (uint32_t)strtoul(optarg, NULL, 10)) == 0;
	else if (option == 'm')
		return load_module(optarg);
	else
		arguments->bad = true;
	return true;
}

static bool read_arguments(int argc, char **argv, struct arguments *arguments)
{
	static const struct option options[] = {
		{"provider", required_argument, NULL, 'p'}, {"op", required_argument, NULL, 'o'},    {"module", required_argument, NULL, 'm'},
		{"seed", required_argument, NULL, 's'},     {"shrink", required_argument, NULL, 'k'}, {"brief", no_argument, NULL, 'b'},  {"verbose", no_argument, NULL, 'v'},     {"time", no_argument, NULL, 't'},      {"serve", no_argument, NULL, 'S'},
		{"dtype", required_argument, NULL, 'y'},    {"dims", required_argument, NULL, 'd'},  {"threads", required_argument, NULL, 'n'},
		{NULL, 0, NULL, 0}};
	bool loaded = true;
	for (int option; loaded && !arguments->bad && (option = getopt_long(argc, argv, "", options, NULL)) != -1;)
		loaded = read_option(option, arguments);
	arguments->bad |= loaded && !arguments->bad && optind < argc;
	return loaded;
}

/* The instruction set that OPD_CPU_ISA asks for isn't this machine's. */
static bool isa_is_missing(void)
{
	if (getenv("OPD_CPU_ISA") == NULL || host.warnings == 0)
		return false;
	(void)printf("skipped: %s\n", host.last_warning);
	return true;
}

static int run(int argc, char **argv)
{
	struct arguments arguments = {.timing = {.dtype = OPD_f32, .threads = 1}};
	if (!open_builtin())
		return EXIT_FAILURE;
	if (isa_is_missing())
		return 77;
	if (!read_arguments(argc, argv, &arguments))
		return EXIT_FAILURE;
	if (arguments.bad)
		return usage(argv[0]);
	if (arguments.serve || arguments.time)
		host_watch(&host);
	if (arguments.serve)
		return timing_serve(&host) ? EXIT_SUCCESS : EXIT_FAILURE;
	if (arguments.time)
		return timing_run(&host, &arguments.timing) > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
	asked = &arguments.timing;
	return check_all(arguments.timing.provider, arguments.timing.op);
}

int main(int argc, char **argv)
{
	host_init(&host);
	int result = run(argc, argv);
	host_fini(&host);
	return result;
}
