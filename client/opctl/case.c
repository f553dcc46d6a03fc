#include "client/opctl/case.h"

#include <math.h>
#include <string.h>

#include "client/opctl/compare.h"
#include "client/opctl/options.h"

static opd_status read_expectation(const char *path, struct case_file *test, opd_error *error)
{
	test->error_name = safetensors_metadata(test->file, "error");
	if (test->error_name == NULL)
		return safetensors_find(test->file, "out.0") != NULL
		           ? OPD_OK
		           : opd_fail(error, OPD_INVALID_ARGUMENT, "%s: has neither out.0 nor an error in its metadata", path);
	const int number = opd_status_parse(test->error_name);
	if (number <= 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: expects the error '%s', which is no status", path, test->error_name);
	test->error_status = (opd_status)number;
	return OPD_OK;
}

static opd_status read_metadata(const char *path, struct case_file *test, opd_error *error)
{
	test->op = safetensors_metadata(test->file, "op");
	const char *attrs = safetensors_metadata(test->file, "attrs");
	if (test->op == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: is no case: its metadata has no op", path);
	test->attrs = cJSON_Parse(attrs == NULL ? "{}" : attrs);
	if (!cJSON_IsObject(test->attrs))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s: attrs is no JSON object", path);
	return read_expectation(path, test, error);
}

opd_status case_open(const char *path, struct case_file *test_out, opd_error *error)
{
	struct case_file test = {0};
	opd_status status = safetensors_open(path, &test.file, error);
	if (status != OPD_OK)
		return status;
	status = read_metadata(path, &test, error);
	if (status != OPD_OK) {
		case_close(&test);
		return status;
	}
	*test_out = test;
	return OPD_OK;
}

void case_close(struct case_file *test)
{
	cJSON_Delete(test->attrs);
	safetensors_close(test->file);
	memset(test, 0, sizeof *test);
}

opd_status case_add_arguments(const struct case_file *test, struct call *call, opd_error *error)
{
	opd_status status = OPD_OK;
	for (size_t i = 0; i < safetensors_count(test->file) && status == OPD_OK; i++) {
		const struct safetensors_entry *entry = safetensors_at(test->file, i);
		if (strncmp(entry->name, "in.", 3) != 0)
			continue;
		struct file_tensor tensor = {0};
		status = safetensors_read(test->file, entry, &tensor, error);
		if (status == OPD_OK)
			status = call_add_tensor(call, entry->name + 3, &tensor, error);
		file_tensor_fini(&tensor);
	}
	const cJSON *item;
	cJSON_ArrayForEach(item, test->attrs)
	{
		if (status == OPD_OK)
			status = call_add_json(call, item->string, item, error);
	}
	/* A Tensor? that the case doesn't have is None, though the schema may give it no default. */
	for (size_t i = 0; i < call->schema.count && status == OPD_OK; i++) {
		const struct schema_param *param = &call->schema.params[i];
		char name[BOUND_NAME_BYTES + 8];
		(void)snprintf(name, sizeof name, "in.%s", param->name);
		if (param->type == PARAM_TENSOR && param->optional && safetensors_find(test->file, name) == NULL &&
		    !cJSON_HasObjectItem(test->attrs, param->name))
			opd_request_none(call->request, param->name);
	}
	return status;
}

/* "atol.<i>", else "atol"; 0 where the case has neither. */
static opd_status tolerance(const struct case_file *test, const char *name, uint32_t output, double *value_out, opd_error *error)
{
	char key[32];
	(void)snprintf(key, sizeof key, "%s.%u", name, output);
	const char *text = safetensors_metadata(test->file, key);
	if (text == NULL)
		text = safetensors_metadata(test->file, name);
	*value_out = 0;
	if (text == NULL)
		return OPD_OK;
	const opd_status status = parse_float(name, text, value_out, error);
	if (status == OPD_OK && !(*value_out >= 0))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s is %s, expected 0 or more", name, text);
	return status;
}

static opd_status check_output(const struct case_file *test, const opd_result *result, uint32_t output, struct case_outcome *out,
                               opd_error *error)
{
	char name[32];
	(void)snprintf(name, sizeof name, "out.%u", output);
	const struct safetensors_entry *entry = safetensors_find(test->file, name);
	struct file_tensor want = {0};
	double atol, rtol;
	opd_status status = tolerance(test, "atol", output, &atol, error);
	if (status == OPD_OK)
		status = tolerance(test, "rtol", output, &rtol, error);
	if (status == OPD_OK)
		status = safetensors_read(test->file, entry, &want, error);
	if (status != OPD_OK)
		return status;
	struct comparison comparison;
	compare_tensors(opd_result_tensor(result, output), &want, atol, rtol, &comparison);
	file_tensor_fini(&want);
	out->max_abs = fmax(out->max_abs, comparison.max_abs);
	out->max_rel = fmax(out->max_rel, comparison.max_rel);
	if (!comparison.equal)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "result %u %s", output, comparison.why);
	return OPD_OK;
}

static uint32_t count_outputs(const struct case_file *test)
{
	uint32_t count = 0;
	for (size_t i = 0; i < safetensors_count(test->file); i++)
		count += strncmp(safetensors_at(test->file, i)->name, "out.", 4) == 0;
	return count;
}

static void check_results(const struct case_file *test, const opd_result *result, struct case_outcome *out)
{
	const uint32_t wanted = count_outputs(test), got = result == NULL ? 0 : opd_result_count(result);
	if (got != wanted) {
		(void)snprintf(out->why, sizeof out->why, "gave %u results, want %u", got, wanted);
		return;
	}
	out->compared = true;
	opd_status status = OPD_OK;
	opd_error error;
	for (uint32_t i = 0; i < wanted && status == OPD_OK; i++) {
		char name[32];
		(void)snprintf(name, sizeof name, "out.%u", i);
		status = safetensors_find(test->file, name) == NULL || opd_result_tensor(result, i)->data == NULL
		             ? opd_fail(&error, OPD_INVALID_ARGUMENT, "result %u is not in the case, or came without data", i)
		             : check_output(test, result, i, out, &error);
	}
	out->passed = status == OPD_OK;
	if (!out->passed)
		(void)snprintf(out->why, sizeof out->why, "%s", error.text);
}

void case_check(const struct case_file *test, opd_status status, const opd_error *error, const opd_result *result,
                struct case_outcome *out)
{
	*out = (struct case_outcome){0};
	if (test->error_name == NULL && status == OPD_OK) {
		check_results(test, result, out);
	} else if (test->error_name == NULL) {
		(void)snprintf(out->why, sizeof out->why, "%s: %s", opd_status_name(status), error->text);
	} else if (status == test->error_status) {
		out->passed = true;
		(void)snprintf(out->why, sizeof out->why, "%s, as expected", opd_status_name(status));
	} else if (status == OPD_OK) {
		(void)snprintf(out->why, sizeof out->why, "ran, want %s", test->error_name);
	} else {
		(void)snprintf(out->why, sizeof out->why, "want %s, got %s: %s", test->error_name, opd_status_name(status), error->text);
	}
}
