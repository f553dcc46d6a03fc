/* run, fake, explain: one request from the command line. */
#include <stdlib.h>
#include <string.h>

#include "client/npy.h"
#include "client/opctl/call.h"
#include "client/opctl/explain.h"
#include "client/opctl/print.h"
#include "client/opctl/summary.h"
#include "client/safetensors.h"

#define DISPATCH_OPTIONS                                                                                                         \
	{OPTION_PRIORITY, "providers of this run, as a,b; '' is an empty list"},                                                     \
	    {OPTION_STRICT, "no fallback: fail when none of the list accepts"},                                                      \
	    {OPTION_DEVICE, "run only there: cpu, cuda, cuda:1"},                                                                    \
	{                                                                                                                            \
		OPTION_MODULE, "load this provider module first: a path, or the name of one that comes with opd (administrators; it stays loaded)"                                       \
	}

const struct option_use run_options[] = {
    {OPTION_OUTPUT, "write the results: .safetensors (all, as out.0, out.1) or .npy (one; several as FILE.0.npy …)"},
    DISPATCH_OPTIONS,
    {OPTION_SHM, "tensors go through memory shared with the daemon, not over the socket (Unix sockets)"},
    {OPTION_EXPLAIN, "also what was skipped and why, and the times"},
    {OPTION_UUID, "also the id of the source that ran"},
    {OPTION_RETRY, "a failed kernel lets the next provider try"},
    {OPTION_TF32, "f32 products may be rounded to TF32"},
    {OPTION_CLASS, "how urgent: realtime, interactive or batch (default: the session's)"},
    {OPTION_TIMEOUT, "give up after this long"},
    {OPTION_SEED, "of randn: (default 0)"},
    {OPTION_END, NULL},
};
const struct option_use fake_options[] = {{OPTION_TIMEOUT, "give up after this long"}, {OPTION_END, NULL}};
const struct option_use explain_options[] = {DISPATCH_OPTIONS, {OPTION_TIMEOUT, "give up after this long"}, {OPTION_END, NULL}};

opd_status opctl_set_class(const struct opctl *ctl, opd_request *request, opd_error *error)
{
	static const char *const names[] = {"normal", "realtime", "interactive", "batch"};
	const char *name = options_has(&ctl->options, OPTION_CLASS) ? ctl->options.values[OPTION_CLASS] : names[0];
	for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
		if (strcmp(name, names[i]) == 0) {
			opd_request_class(request, (opd_class)i);
			return OPD_OK;
		}
	return opd_fail(error, OPD_INVALID_ARGUMENT, "--class is '%s', expected realtime, interactive or batch", shown(name));
}

static opd_status set_options(const struct opctl *ctl, struct call *call, opd_mode mode, opd_error *error)
{
	const struct options *options = &ctl->options;
	opd_request_mode(call->request, mode);
	opd_request_strict(call->request, options_has(options, OPTION_STRICT));
	opd_request_explain(call->request, mode == OPD_MODE_DRY || options_has(options, OPTION_EXPLAIN));
	opd_request_uuid(call->request, options_has(options, OPTION_UUID));
	opd_request_retry(call->request, options_has(options, OPTION_RETRY));
	opd_request_allow_tf32(call->request, options_has(options, OPTION_TF32));
	opd_request_timeout(call->request, ctl->timeout_us);
	opd_status status = opctl_set_class(ctl, call->request, error);
	if (status != OPD_OK)
		return status;
	if (options_has(options, OPTION_DEVICE))
		opd_request_device(call->request, options->values[OPTION_DEVICE]);
	if (!options_has(options, OPTION_PRIORITY))
		return OPD_OK;
	struct name_list list;
	status = name_list_parse("--priority", options->values[OPTION_PRIORITY], &list, error);
	if (status != OPD_OK)
		return status;
	opd_request_priority(call->request, list.names, list.count);
	name_list_fini(&list);
	return OPD_OK;
}

/* ---- Writing results ---- */

static bool ends_with(const char *text, const char *end)
{
	const size_t bytes = strlen(text), end_bytes = strlen(end);
	return bytes > end_bytes && strcmp(text + bytes - end_bytes, end) == 0;
}

opd_status opctl_check_output(const char *path, opd_error *error)
{
	if (path == NULL || ends_with(path, ".npy") || ends_with(path, ".safetensors"))
		return OPD_OK;
	return opd_fail(error, OPD_INVALID_ARGUMENT, "--output is '%s', expected a name that ends in .npy or .safetensors", path);
}

static opd_status write_npy(const char *path, const opd_tensor *tensor, opd_error *error)
{
	const opd_status status = npy_write(path, tensor, error);
	if (status == OPD_OK && npy_is_raw(tensor->dtype))
		print_note("%s: .npy has no %s: its words are written raw, as u%zu; read them with @%s:%s", shown(path),
		           opd_dtype_name(tensor->dtype), opd_dtype_bytes(tensor->dtype), shown(path), opd_dtype_name(tensor->dtype));
	return status;
}

static opd_status write_npys(const char *path, const opd_result *result, opd_error *error)
{
	const uint32_t count = opd_result_count(result);
	if (count == 1)
		return write_npy(path, opd_result_tensor(result, 0), error);
	opd_status status = OPD_OK;
	for (uint32_t i = 0; i < count && status == OPD_OK; i++) {
		char *name = NULL;
		if (asprintf(&name, "%.*s.%u.npy", (int)(strlen(path) - strlen(".npy")), path, i) < 0)
			return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
		status = write_npy(name, opd_result_tensor(result, i), error);
		if (status == OPD_OK)
			print_note("result %u is in %s", i, shown(name));
		free(name);
	}
	return status;
}

static opd_status write_safetensors(const char *path, const char *op, const opd_result *result, opd_error *error)
{
	struct safetensors_item items[BOUND_OUTPUTS];
	char names[BOUND_OUTPUTS][16];
	const uint32_t count = opd_result_count(result) < BOUND_OUTPUTS ? opd_result_count(result) : BOUND_OUTPUTS;
	for (uint32_t i = 0; i < count; i++) {
		(void)snprintf(names[i], sizeof names[i], "out.%u", i);
		items[i] = (struct safetensors_item){names[i], opd_result_tensor(result, i)};
	}
	const struct safetensors_text texts[2] = {{"op", op}, {"provider", opd_result_provider(result)}};
	return safetensors_write(path, items, count, texts, 2, error);
}

opd_status opctl_write_results(const struct opctl *ctl, const char *op, const opd_result *result, opd_error *error)
{
	const char *path = ctl->options.values[OPTION_OUTPUT];
	if (path == NULL)
		return OPD_OK;
	return ends_with(path, ".npy") ? write_npys(path, result, error) : write_safetensors(path, op, result, error);
}

/* ---- Printing ---- */

static void print_result(const struct call *call, const opd_result *result, opd_mode mode)
{
	const opd_explain *explain = opd_result_explain(result);
	if (mode == OPD_MODE_RUN)
		(void)printf("%s: %s ran it\n", shown(call->op), shown(opd_result_provider(result)));
	if (mode == OPD_MODE_DRY)
		(void)printf("%s: %s would run\n", shown(call->op), shown(opd_result_provider(result)));
	if (opd_result_uuid(result)[0] != '\0')
		(void)printf("uuid       %s\n", shown(opd_result_uuid(result)));
	if (explain != NULL)
		explain_print(explain, mode == OPD_MODE_RUN);
	for (uint32_t i = 0; i < opd_result_count(result); i++) {
		char label[16];
		(void)snprintf(label, sizeof label, "%u", i);
		summary_print(label, opd_result_tensor(result, i));
	}
}

static int print_result_json(const struct call *call, const opd_result *result, opd_mode mode)
{
	const opd_explain *explain = opd_result_explain(result);
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "op", call->op);
	if (mode != OPD_MODE_FAKE)
		cJSON_AddStringToObject(document, "provider", opd_result_provider(result));
	if (opd_result_uuid(result)[0] != '\0')
		cJSON_AddStringToObject(document, "uuid", opd_result_uuid(result));
	cJSON *outputs = cJSON_AddArrayToObject(document, "outputs");
	for (uint32_t i = 0; i < opd_result_count(result); i++)
		cJSON_AddItemToArray(outputs, summary_json(opd_result_tensor(result, i)));
	if (explain != NULL)
		cJSON_AddItemToObject(document, "explain", explain_json(explain, mode == OPD_MODE_RUN));
	return print_json(document);
}

/* A refused request may say in its explain record what was skipped: worth a few lines on stderr. */
static void print_skips(const opd_result *result)
{
	const opd_explain *explain = opd_result_explain(result);
	for (uint32_t i = 0; explain != NULL && i < explain->skip_count; i++)
		print_note("skipped %s: %s", shown(explain->skipped[i].provider), shown(explain->skipped[i].reason));
}

static int submit(const struct opctl *ctl, struct call *call, opd_mode mode)
{
	opd_error error;
	opd_result *result = NULL;
	opd_status status = opd_run(ctl->client, call->request, &result, &error);
	if (status == OPD_OK)
		status = opctl_write_results(ctl, call->op, result, &error);
	else if (result != NULL)
		print_skips(result);
	int code = EXIT_DONE;
	if (status != OPD_OK)
		code = report_failure(ctl, status, &error);
	else if (ctl->json)
		code = print_result_json(call, result, mode);
	else
		print_result(call, result, mode);
	opd_result_destroy(result);
	return code;
}

/* Adds the arguments and options; the code says how it went, EXIT_DONE to go on. */
static int prepare(const struct opctl *ctl, struct call *call, opd_mode mode)
{
	opd_error error;
	int64_t seed;
	call->bare = mode != OPD_MODE_RUN;
	opd_status status = options_int(&ctl->options, OPTION_SEED, 0, INT64_MAX, 0, &seed, &error);
	if (status == OPD_OK) {
		call->seed = (uint64_t)seed;
		status = set_options(ctl, call, mode, &error);
	}
	for (size_t i = 2; i < ctl->options.count && status == OPD_OK; i++)
		status = call_add_text(call, ctl->options.positional[i], &error);
	if (status == OPD_OK)
		return EXIT_DONE;
	return status == OPD_INVALID_ARGUMENT ? report_usage(ctl, &error) : report_failure(ctl, status, &error);
}

static int run_mode(struct opctl *ctl, opd_mode mode)
{
	opd_error error;
	if (ctl->options.count < 2) {
		(void)opd_fail(&error, OPD_INVALID_ARGUMENT, "%s needs an op", ctl->options.positional[0]);
		return report_usage(ctl, &error);
	}
	if (opctl_check_output(ctl->options.values[OPTION_OUTPUT], &error) != OPD_OK ||
	    options_seconds(&ctl->options, OPTION_TIMEOUT, 0, &ctl->timeout_us, &error) != OPD_OK)
		return report_usage(ctl, &error);
	opd_status status = opctl_connect(ctl, CONNECT_ANY, &error);
	if (status == OPD_OK)
		status = opctl_load_modules(ctl, &error);
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	struct call call;
	status = call_init(&call, ctl->client, ctl->options.positional[1], &error);
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	const bool shm = options_has(&ctl->options, OPTION_SHM);
	call.shares = shm ? ctl->client : NULL;
	int code = prepare(ctl, &call, mode);
	if (code == EXIT_DONE && shm && (status = call_share_results(&call, &error)) != OPD_OK)
		code = report_failure(ctl, status, &error);
	if (code == EXIT_DONE)
		code = submit(ctl, &call, mode);
	call_fini(&call);
	return code;
}

int cmd_run(struct opctl *ctl)
{
	return run_mode(ctl, OPD_MODE_RUN);
}

int cmd_fake(struct opctl *ctl)
{
	return run_mode(ctl, OPD_MODE_FAKE);
}

int cmd_explain(struct opctl *ctl)
{
	return run_mode(ctl, OPD_MODE_DRY);
}
