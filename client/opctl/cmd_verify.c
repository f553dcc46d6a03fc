/* verify: case files, each on the provider that dispatch picks, on one provider, or on all. */
#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "client/opctl/case.h"
#include "client/opctl/print.h"

const struct option_use verify_options[] = {
    {OPTION_PROVIDER, "run on this provider alone (strict); a case that it refuses is skipped"},
    {OPTION_ALL, "run each case on every provider that has its op"},
    {OPTION_MODULE, "load this provider module first (administrators; it stays loaded)"},
    {OPTION_TIMEOUT, "of each call"},
    {OPTION_END, NULL},
};

/* What the daemon says of an op, asked once a row of cases of the same op. */
struct op_cache {
	char *op;
	const opd_op_description *description; /* NULL: the daemon doesn't know it */
	struct schema schema;
};

struct verify {
	struct opctl *ctl;
	const char *provider; /* NULL: dispatch picks */
	bool all;
	uint64_t passed, failed, skipped;
	opd_status lost; /* UNAVAILABLE once the daemon is gone */
	opd_error error;
	cJSON *cases; /* with --json */
	struct op_cache cache;
};

typedef enum verdict {
	VERDICT_PASS,
	VERDICT_FAIL,
	VERDICT_SKIP,
} verdict;

static void cache_fini(struct op_cache *cache)
{
	free(cache->op);
	opd_document_free(cache->description);
	memset(cache, 0, sizeof *cache);
}

static opd_status cache_fill(struct verify *verify, const char *op, opd_error *error)
{
	struct op_cache *cache = &verify->cache;
	if (cache->op != NULL && strcmp(cache->op, op) == 0)
		return OPD_OK;
	cache_fini(cache);
	cache->op = strdup(op);
	if (cache->op == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	opd_status status = opd_describe(verify->ctl->client, op, &cache->description, error);
	if (status == OPD_OK)
		status = schema_parse(cache->description->schema, &cache->schema, error);
	/* An op that isn't there: the case may be about that, so it runs. */
	if (status != OPD_OK) {
		opd_document_free(cache->description);
		cache->description = NULL;
	}
	return status == OPD_UNAVAILABLE ? status : OPD_OK;
}

/* ---- Lines ---- */

static void add_json(struct verify *verify, const char *name, const char *provider, verdict what,
                     const struct case_outcome *outcome)
{
	static const char *const verdicts[] = {"passed", "failed", "skipped"};
	cJSON *item = cJSON_CreateObject();
	cJSON_AddStringToObject(item, "case", name);
	cJSON_AddStringToObject(item, "provider", provider);
	cJSON_AddStringToObject(item, "verdict", verdicts[what]);
	if (outcome->compared) {
		cJSON_AddItemToObject(item, "max_abs", json_f64(outcome->max_abs));
		cJSON_AddItemToObject(item, "max_rel", json_f64(outcome->max_rel));
	}
	cJSON_AddStringToObject(item, "why", outcome->why);
	cJSON_AddItemToArray(verify->cases, item);
}

static void print_line(const char *name, const char *provider, verdict what, const struct case_outcome *outcome)
{
	static const char *const verdicts[] = {"PASS", "FAIL", "SKIP"};
	(void)printf("%s  %-26s %-10s", verdicts[what], shown(name), provider[0] == '\0' ? "-" : shown(provider));
	if (outcome->compared)
		(void)printf("  abs %-9.3g rel %.3g", outcome->max_abs, outcome->max_rel);
	(void)printf("%s%s\n", outcome->why[0] == '\0' ? "" : "  ", shown(outcome->why));
}

static void add_verdict(struct verify *verify, const char *name, const char *provider, verdict what,
                        const struct case_outcome *outcome)
{
	uint64_t *counts[] = {&verify->passed, &verify->failed, &verify->skipped};
	(*counts[what])++;
	if (verify->cases != NULL)
		add_json(verify, name, provider, what, outcome);
	else
		print_line(name, provider, what, outcome);
}

static void add_plain(struct verify *verify, const char *name, const char *provider, verdict what, const char *why)
{
	struct case_outcome outcome = {0};
	(void)snprintf(outcome.why, sizeof outcome.why, "%s", why);
	add_verdict(verify, name, provider, what, &outcome);
}

/* ---- One case ---- */

static opd_status build_call(struct verify *verify, const struct case_file *test, const char *provider, struct call *call,
                             opd_error *error)
{
	const struct schema *schema = verify->cache.description == NULL ? NULL : &verify->cache.schema;
	opd_status status = call_init_schema(call, test->op, schema, error);
	if (status != OPD_OK)
		return status;
	if (provider != NULL) {
		opd_request_priority(call->request, &provider, 1);
		opd_request_strict(call->request, true);
	}
	opd_request_timeout(call->request, verify->ctl->timeout_us);
	status = case_add_arguments(test, call, error);
	if (status != OPD_OK)
		call_fini(call);
	return status;
}

static void judge(struct verify *verify, const struct case_file *test, const char *name, const char *provider, opd_status status,
                  const opd_error *error, const opd_result *result)
{
	const char *ran = result == NULL ? "" : opd_result_provider(result);
	/* Strict on one provider: FAILED_PRECONDITION means that it refused, with its reason. */
	if (provider != NULL && status == OPD_FAILED_PRECONDITION && test->error_status != OPD_FAILED_PRECONDITION) {
		add_plain(verify, name, provider, VERDICT_SKIP, error->text);
		return;
	}
	struct case_outcome outcome;
	case_check(test, status, error, result, &outcome);
	if (outcome.passed && status == OPD_OK && provider != NULL && strcmp(ran, provider) != 0) {
		outcome.passed = false;
		(void)snprintf(outcome.why, sizeof outcome.why, "%.100s ran instead", ran);
	}
	add_verdict(verify, name,
	            status == OPD_OK   ? ran
	            : provider == NULL ? ""
	                               : provider,
	            outcome.passed ? VERDICT_PASS : VERDICT_FAIL, &outcome);
}

static void run_case(struct verify *verify, const struct case_file *test, const char *name, const char *provider)
{
	struct call call;
	opd_error error = {0};
	opd_status status = build_call(verify, test, provider, &call, &error);
	if (status != OPD_OK) {
		add_plain(verify, name, provider == NULL ? "" : provider, VERDICT_FAIL, error.text);
		return;
	}
	opd_result *result = NULL;
	status = opd_run(verify->ctl->client, call.request, &result, &error);
	if (status == OPD_UNAVAILABLE) {
		verify->lost = status;
		verify->error = error;
	}
	judge(verify, test, name, provider, status, &error, result);
	opd_result_destroy(result);
	call_fini(&call);
}

static bool has_provider(const opd_op_description *description, const char *provider)
{
	for (uint32_t i = 0; i < description->implementation_count; i++)
		if (strcmp(description->implementations[i].provider, provider) == 0)
			return true;
	return false;
}

static void run_everywhere(struct verify *verify, const struct case_file *test, const char *name)
{
	const opd_op_description *description = verify->cache.description;
	for (uint32_t i = 0; i < description->implementation_count && verify->lost == OPD_OK; i++) {
		const opd_implementation *impl = &description->implementations[i];
		if (impl->supported)
			run_case(verify, test, name, impl->provider);
		else
			add_plain(verify, name, impl->provider, VERDICT_SKIP, impl->reason);
	}
}

static void verify_open_case(struct verify *verify, const struct case_file *test, const char *name)
{
	opd_error error;
	const opd_status status = cache_fill(verify, test->op, &error);
	const opd_op_description *description = verify->cache.description;
	if (status != OPD_OK) {
		verify->lost = status;
		verify->error = error;
		add_plain(verify, name, "", VERDICT_FAIL, error.text);
	} else if (description == NULL) {
		run_case(verify, test, name, NULL);
	} else if (verify->all) {
		run_everywhere(verify, test, name);
	} else if (verify->provider != NULL && !has_provider(description, verify->provider)) {
		char why[BOUND_NAME_BYTES + 64];
		(void)snprintf(why, sizeof why, "has no implementation of %.*s", (int)BOUND_NAME_BYTES, test->op);
		add_plain(verify, name, verify->provider, VERDICT_SKIP, why);
	} else {
		run_case(verify, test, name, verify->provider);
	}
}

/* "tests/golden/add-00.safetensors" → "add-00" */
static char *case_name(const char *path)
{
	const char *slash = strrchr(path, '/');
	const char *base = slash == NULL ? path : slash + 1;
	const char *dot = strrchr(base, '.');
	return strndup(base, dot == NULL || dot == base ? strlen(base) : (size_t)(dot - base));
}

static void verify_file(struct verify *verify, const char *path)
{
	struct case_file test;
	opd_error error;
	char *name = case_name(path);
	if (name == NULL)
		return add_plain(verify, path, "", VERDICT_FAIL, "out of memory");
	if (case_open(path, &test, &error) != OPD_OK) {
		add_plain(verify, name, "", VERDICT_FAIL, error.text);
	} else {
		verify_open_case(verify, &test, name);
		case_close(&test);
	}
	free(name);
}

/* ---- Folders ---- */

static int is_case(const struct dirent *entry)
{
	const size_t bytes = strlen(entry->d_name), end = strlen(".safetensors");
	return bytes > end && strcmp(entry->d_name + bytes - end, ".safetensors") == 0;
}

static void verify_folder(struct verify *verify, const char *path)
{
	struct dirent **entries;
	const int count = scandir(path, &entries, is_case, alphasort);
	if (count <= 0)
		add_plain(verify, path, "", VERDICT_FAIL, count < 0 ? "the folder can't be read" : "the folder has no .safetensors file");
	for (int i = 0; i < count; i++) {
		char *file = NULL;
		if (verify->lost == OPD_OK && asprintf(&file, "%s/%s", path, entries[i]->d_name) >= 0) {
			verify_file(verify, file);
			free(file);
		}
		free(entries[i]);
	}
	if (count >= 0)
		free(entries);
}

static void verify_path(struct verify *verify, const char *path)
{
	struct stat status;
	if (stat(path, &status) == 0 && S_ISDIR(status.st_mode))
		verify_folder(verify, path);
	else
		verify_file(verify, path);
}

/* ---- The command ---- */

static int finish(struct verify *verify)
{
	const bool skips = verify->all || verify->provider != NULL;
	int code = verify->failed > 0 ? EXIT_REQUEST : EXIT_DONE;
	if (verify->cases != NULL) {
		cJSON *document = cJSON_CreateObject();
		cJSON_AddItemToObject(document, "cases", verify->cases);
		cJSON_AddItemToObject(document, "passed", json_u64(verify->passed));
		cJSON_AddItemToObject(document, "failed", json_u64(verify->failed));
		cJSON_AddItemToObject(document, "skipped", json_u64(verify->skipped));
		if (print_json(document) != EXIT_DONE)
			code = EXIT_REQUEST;
	} else {
		(void)printf("%llu passed, %llu failed", (unsigned long long)verify->passed, (unsigned long long)verify->failed);
		if (skips)
			(void)printf(", %llu skipped", (unsigned long long)verify->skipped);
		(void)putchar('\n');
	}
	if (verify->lost != OPD_OK) {
		(void)fflush(stdout);
		(void)fprintf(stderr, "opctl: %s: %s\n", opd_status_name(verify->lost), shown(verify->error.text));
		return EXIT_UNREACHABLE;
	}
	if (verify->passed == 0 && verify->failed == 0)
		print_note("nothing ran");
	return code;
}

/* NOT_FOUND when no provider is called so: else every case would be "skipped" and the answer OK. */
static opd_status check_provider(struct opctl *ctl, const char *provider, opd_error *error)
{
	const opd_provider_list *list;
	const opd_status status = opd_providers(ctl->client, &list, error);
	if (status != OPD_OK)
		return status;
	bool found = false;
	for (uint32_t i = 0; i < list->count; i++)
		found = found || strcmp(list->providers[i].name, provider) == 0;
	opd_document_free(list);
	return found ? OPD_OK : opd_fail(error, OPD_NOT_FOUND, "no provider is called '%s' (opctl providers lists them)", provider);
}

static opd_status check_usage(const struct options *options, opd_error *error)
{
	if (options->count < 2)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "verify needs case files or folders of them");
	if (options_has(options, OPTION_ALL) && options_has(options, OPTION_PROVIDER))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "--all and --provider exclude each other");
	return OPD_OK;
}

int cmd_verify(struct opctl *ctl)
{
	opd_error error;
	const struct options *options = &ctl->options;
	if (check_usage(options, &error) != OPD_OK || options_seconds(options, OPTION_TIMEOUT, 0, &ctl->timeout_us, &error) != OPD_OK)
		return report_usage(ctl, &error);
	const char *provider = options->values[OPTION_PROVIDER];
	opd_status status = opctl_connect(ctl, CONNECT_ANY, &error);
	if (status == OPD_OK)
		status = opctl_load_modules(ctl, &error);
	if (status == OPD_OK && provider != NULL)
		status = check_provider(ctl, provider, &error);
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	struct verify *verify = calloc(1, sizeof *verify);
	if (verify == NULL) {
		status = opd_fail(&error, OPD_RESOURCE_EXHAUSTED, "out of memory");
		return report_failure(ctl, status, &error);
	}
	verify->ctl = ctl;
	verify->provider = provider;
	verify->all = options_has(options, OPTION_ALL);
	verify->cases = ctl->json ? cJSON_CreateArray() : NULL;
	for (size_t i = 1; i < options->count && verify->lost == OPD_OK; i++)
		verify_path(verify, options->positional[i]);
	const int code = finish(verify);
	cache_fini(&verify->cache);
	free(verify);
	return code;
}
