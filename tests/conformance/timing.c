#include "tests/conformance/timing.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/conformance/cases.h"

enum { SAMPLES = 401, SAMPLES_MIN = 5 };
static const double sample_ns = 20e3; /* shorter calls are repeated within a sample */
static const double total_ns = 300e6;
static const double served_ns = 40e6; /* of one answer to timing_serve: whoever asks, asks again */

static double now_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static int compare_doubles(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

/* Nanoseconds a call over `repeats` of them; negative after a failure. */
static double time_calls(const struct host *host, const struct host_impl *impl, const opd_call *call, const struct host_prepared *prepared,
                         uint32_t threads, int repeats)
{
	opd_error error;
	double start = now_ns();
	for (int i = 0; i < repeats; i++)
		if (host_run_prepared(host, impl, call, prepared, threads, &error) != OPD_OK)
			return -1;
	return (now_ns() - start) / repeats;
}

static double time_prepared(const struct host *host, const struct host_impl *impl, const opd_call *call, const struct host_prepared *prepared,
                            uint32_t threads, double budget_ns)
{
	double samples[SAMPLES];
	size_t count = 0;
	double first = time_calls(host, impl, call, prepared, threads, 1);
	int repeats = first >= sample_ns ? 1 : (int)(sample_ns / (first + 1)) + 1;
	for (double start = now_ns(); first >= 0 && count < SAMPLES && (count < SAMPLES_MIN || now_ns() - start < budget_ns); count++)
		samples[count] = time_calls(host, impl, call, prepared, threads, repeats);
	if (count == 0)
		return -1;
	qsort(samples, count, sizeof samples[0], compare_doubles);
	return samples[count / 2];
}

/* The plan is made once, as the daemon does, which keeps plans. */
static double time_median(const struct host *host, const struct host_impl *impl, const opd_call *call, uint32_t threads, double budget_ns)
{
	struct host_prepared prepared;
	opd_error error;
	double ns = -1;
	if (host_prepare(impl, call, &prepared, &error) == OPD_OK)
		ns = time_prepared(host, impl, call, &prepared, threads, budget_ns);
	host_unprepare(&prepared);
	host_drop_derived(host);
	return ns;
}

static double bytes_of(const struct conf_case *conf_case, const struct results *results)
{
	double bytes = 0;
	for (uint32_t i = 0; i < SCHEMA_PARAMS; i++)
		bytes += conf_case->operands[i].memory == NULL ? 0 : (double)conf_case->operands[i].bytes;
	for (uint32_t i = 0; i < results->count; i++)
		bytes += (double)results->outputs[i].bytes;
	return bytes;
}

static bool time_case(const struct host *host, const struct timing *timing, const struct host_impl *impl, const opd_op *op,
                      const struct conf_case *conf_case)
{
	struct results results;
	opd_error error;
	if (results_init(&results, op, conf_case, &error) != OPD_OK)
		return false;
	opd_call call = case_call(conf_case, &results);
	bool taken = impl->impl->predicate == NULL || impl->impl->predicate(impl->impl, impl->state, &call, NULL);
	double ns = taken ? time_median(host, impl, &call, timing->threads, total_ns) : -1;
	if (ns >= 0)
		(void)printf("%-20s %-10s %-5s %12.3f us  estimate %12.3f us  %8.2f GB/s\n", conf_case->schema->name, impl->provider,
		             opd_dtype_name(timing->dtype), ns / 1e3,
		             impl->impl->cost_ns == NULL ? 0 : (double)impl->impl->cost_ns(impl->impl, &call) / 1e3,
		             bytes_of(conf_case, &results) / ns);
	(void)fflush(stdout);
	results_fini(&results);
	return ns >= 0;
}

static bool time_impl(const struct host *host, const struct timing *timing, const struct host_impl *impl)
{
	const opd_op *op = host_find_op(host, impl->impl->op);
	struct schema schema;
	struct conf_case conf_case;
	opd_error error;
	if (op == NULL || op->generate == NULL || impl->impl->unsupported != NULL || strcmp(impl->impl->device, "cpu") != 0 ||
	    !schema_read(op->schema, &schema) || (timing->dim_count != 0 && timing->dim_count != op->dim_count))
		return false;
	const int64_t *dims = timing->dim_count == 0 ? op->default_dims : timing->dims;
	if (case_generate(&conf_case, op, &schema, timing->dtype, OPD_VALUES_RANDOM, 0, dims, 1, &error) != OPD_OK) {
		(void)fprintf(stderr, "%s %s: %s\n", impl->impl->op, opd_dtype_name(timing->dtype), error.text);
		return false;
	}
	case_make_constant(&conf_case, op->activations, false); /* weights are resident, as they are in a daemon that is worth timing */
	bool timed = time_case(host, timing, impl, op, &conf_case);
	case_fini(&conf_case);
	return timed;
}

size_t timing_run(const struct host *host, const struct timing *timing)
{
	size_t timed = 0;
	for (size_t i = 0; i < host->impl_count; i++) {
		const struct host_impl *impl = &host->impls[i];
		if ((timing->provider == NULL || strcmp(timing->provider, impl->provider) == 0) &&
		    (timing->op == NULL || strcmp(timing->op, impl->impl->op) == 0))
			timed += time_impl(host, timing, impl) ? 1 : 0;
	}
	return timed;
}

/* ---- Served ------------------------------------------------------------------------------------------------------------- */

/* The case that the last question was about: the next one is often about it too. */
struct served {
	char op[SCHEMA_NAME];
	opd_dtype dtype;
	uint32_t dim_count;
	int64_t dims[TIMING_DIMS];
	struct schema schema;
	struct conf_case conf_case;
	struct results results;
	bool made;
};

static void served_clear(struct served *served)
{
	if (served->made) {
		results_fini(&served->results);
		case_fini(&served->conf_case);
	}
	served->made = false;
}

static bool served_is(const struct served *served, const char *op, const struct timing *timing)
{
	return served->made && strcmp(served->op, op) == 0 && served->dtype == timing->dtype && served->dim_count == timing->dim_count &&
	       memcmp(served->dims, timing->dims, timing->dim_count * sizeof timing->dims[0]) == 0;
}

static bool served_make(struct served *served, const struct host *host, const char *name, const struct timing *timing)
{
	const opd_op *op = host_find_op(host, name);
	opd_error error;
	if (served_is(served, name, timing))
		return true;
	served_clear(served);
	if (op == NULL || op->generate == NULL || !schema_read(op->schema, &served->schema) || timing->dim_count != op->dim_count)
		return false;
	(void)snprintf(served->op, sizeof served->op, "%s", name);
	served->dtype = timing->dtype;
	served->dim_count = timing->dim_count;
	memcpy(served->dims, timing->dims, sizeof served->dims);
	if (case_generate(&served->conf_case, op, &served->schema, timing->dtype, OPD_VALUES_RANDOM, 0, timing->dims, 1, &error) != OPD_OK) {
		(void)fprintf(stderr, "%s %s: %s\n", name, opd_dtype_name(timing->dtype), error.text);
		case_fini(&served->conf_case);
		return false;
	}
	case_make_constant(&served->conf_case, op->activations, false);
	if (results_init(&served->results, op, &served->conf_case, &error) != OPD_OK) {
		case_fini(&served->conf_case);
		return false;
	}
	served->made = true;
	return true;
}

/* One answer: "US ESTIMATE_US BYTES", or "-" where the provider has no such op, or doesn't take the case. */
static void serve_one(struct served *served, const struct host *host, const struct timing *timing)
{
	const struct host_impl *impl = host_find_impl(host, timing->provider, timing->op);
	double ns = -1;
	opd_call call;
	if (impl != NULL && impl->impl->unsupported == NULL && strcmp(impl->impl->device, "cpu") == 0 &&
	    served_make(served, host, timing->op, timing)) {
		call = case_call(&served->conf_case, &served->results);
		if (impl->impl->predicate == NULL || impl->impl->predicate(impl->impl, impl->state, &call, NULL))
			ns = time_median(host, impl, &call, timing->threads, served_ns);
	}
	if (ns < 0)
		(void)puts("-");
	else
		(void)printf("%.4f %.4f %.0f\n", ns / 1e3, impl->impl->cost_ns == NULL ? 0 : (double)impl->impl->cost_ns(impl->impl, &call) / 1e3,
		             bytes_of(&served->conf_case, &served->results));
	(void)fflush(stdout);
}

bool timing_dims(const char *text, struct timing *timing)
{
	for (timing->dim_count = 0; timing->dim_count < TIMING_DIMS; text++) {
		char *end;
		long long dim = strtoll(text, &end, 10);
		if (end == text || dim < 0)
			return false;
		timing->dims[timing->dim_count++] = dim;
		if (*end == '\0')
			return true;
		text = end;
		if (*text != ',')
			return false;
	}
	return false;
}

bool timing_serve(const struct host *host)
{
	struct served served = {.made = false};
	char provider[SCHEMA_NAME], op[SCHEMA_NAME], dtype[SCHEMA_NAME], dims[128], line[512];
	while (fgets(line, sizeof line, stdin) != NULL) {
		struct timing timing = {.provider = provider, .op = op};
		unsigned threads;
		if (sscanf(line, "%31s %31s %31s %127s %u", provider, op, dtype, dims, &threads) != 5 || threads == 0 ||
		    (timing.dtype = opd_dtype_parse(dtype)) == OPD_DTYPE_NONE || !timing_dims(dims, &timing)) {
			(void)fprintf(stderr, "conformance --serve: expected PROVIDER OP DTYPE N,N,... THREADS, not: %s", line);
			served_clear(&served);
			return false;
		}
		timing.threads = threads;
		serve_one(&served, host, &timing);
	}
	served_clear(&served);
	return true;
}
