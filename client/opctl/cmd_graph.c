/* graph: ops that a file describes, run as one request. */
#include <string.h>

#include "client/opctl/call.h"
#include "client/opctl/explain.h"
#include "client/opctl/graph_file.h"
#include "client/opctl/print.h"
#include "client/opctl/summary.h"

const struct option_use graph_options[] = {
    {OPTION_OUTPUT, "write the outputs: .safetensors (all, as out.0, out.1) or .npy (one; several as FILE.0.npy …)"},
    {OPTION_EXPLAIN, "also which provider ran each node, what was skipped and why, times and memory"},
    {OPTION_COUNT, "run it so often, with the same inputs; the last run's outputs are shown (default 1)"},
    {OPTION_TIMEOUT, "give up after this long"},
    {OPTION_SEED, "of randn: (default 0)"},
    {OPTION_SHM, "inputs and outputs go through memory shared with the daemon, not over the socket (Unix sockets)"},
    {OPTION_MODULE, "load this provider module first (administrators; it stays loaded)"},
    {OPTION_END, NULL},
};

/* ---- Printing ---- */

static void print_graph(const opd_graph_explain *explain, bool ran)
{
	for (uint32_t i = 0; i < explain->count; i++) {
		const opd_node_explain *node = &explain->nodes[i];
		(void)printf("node       %s: %s by %s (%s)", shown(node->node), shown(node->op), shown(node->provider),
		             shown(node->explain.level));
		(void)printf(ran ? ", %s\n" : "%s\n", ran ? duration_text((double)node->explain.kernel_ns) : "");
		for (uint32_t k = 0; k < node->explain.skip_count; k++)
			(void)printf("skipped    %s: %s\n", shown(node->explain.skipped[k].provider), shown(node->explain.skipped[k].reason));
	}
	if (explain->count < explain->node_count)
		(void)printf("           … of %u nodes\n", explain->node_count);
	(void)printf("memory     %s of intermediate results, %s without reuse\n", bytes_text(explain->arena_bytes),
	             bytes_text(explain->unshared_bytes));
	if (explain->width > 1)
		(void)printf("at once    up to %u parts, by several threads\n", explain->width);
	if (explain->dispatched)
		(void)printf("dispatched in %s\n", duration_text((double)explain->prepare_ns));
	else
		(void)puts("dispatched by an earlier run");
}

static cJSON *graph_json(const opd_graph_explain *explain, bool ran)
{
	cJSON *document = cJSON_CreateObject();
	cJSON *nodes = cJSON_AddArrayToObject(document, "nodes");
	for (uint32_t i = 0; i < explain->count; i++) {
		cJSON *node = explain_json(&explain->nodes[i].explain, ran);
		cJSON_AddStringToObject(node, "node", explain->nodes[i].node);
		cJSON_AddStringToObject(node, "op", explain->nodes[i].op);
		cJSON_AddStringToObject(node, "provider", explain->nodes[i].provider);
		cJSON_AddItemToArray(nodes, node);
	}
	cJSON_AddItemToObject(document, "node_count", json_u64(explain->node_count));
	cJSON_AddBoolToObject(document, "dispatched", explain->dispatched);
	cJSON_AddItemToObject(document, "arena_bytes", json_u64(explain->arena_bytes));
	cJSON_AddItemToObject(document, "unshared_bytes", json_u64(explain->unshared_bytes));
	cJSON_AddItemToObject(document, "prepare_ns", json_u64(explain->prepare_ns));
	cJSON_AddItemToObject(document, "width", json_u64(explain->width));
	return document;
}

static const char *output_name(const struct graph_file *file, uint32_t index)
{
	return index < file->output_count ? file->outputs[index] : "";
}

static void print_result(const struct graph_file *file, const opd_result *result, bool ran)
{
	if (opd_result_graph(result) != NULL)
		print_graph(opd_result_graph(result), ran);
	for (uint32_t i = 0; i < opd_result_count(result); i++)
		summary_print(output_name(file, i), opd_result_tensor(result, i));
}

static int print_result_json(const struct graph_file *file, const opd_result *result, bool ran)
{
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "graph", file->name);
	cJSON *outputs = cJSON_AddArrayToObject(document, "outputs");
	for (uint32_t i = 0; i < opd_result_count(result); i++) {
		cJSON *output = summary_json(opd_result_tensor(result, i));
		cJSON_AddStringToObject(output, "name", output_name(file, i));
		cJSON_AddItemToArray(outputs, output);
	}
	if (opd_result_graph(result) != NULL)
		cJSON_AddItemToObject(document, "explain", graph_json(opd_result_graph(result), ran));
	return print_json(document);
}

/* ---- Running ---- */

static opd_status run_often(const struct opctl *ctl, const struct graph_file *file, const struct call *call, int64_t count,
                            opd_result **result_out, opd_error *error)
{
	opd_status status = OPD_OK;
	for (int64_t i = 0; status == OPD_OK && i < count; i++) {
		opd_result_destroy(*result_out);
		status = opd_run(ctl->client, call->request, result_out, error);
	}
	return status == OPD_OK ? opctl_write_results(ctl, file->name, *result_out, error) : status;
}

static int submit(const struct opctl *ctl, const struct graph_file *file, const struct call *call, int64_t count, bool ran)
{
	opd_error error;
	opd_result *result = NULL;
	const opd_status status = run_often(ctl, file, call, count, &result, &error);
	int code = EXIT_DONE;
	if (status != OPD_OK)
		code = report_failure(ctl, status, &error);
	else if (ctl->json)
		code = print_result_json(file, result, ran);
	else
		print_result(file, result, ran);
	opd_result_destroy(result);
	return code;
}

/* A call whose op is the graph: its inputs are typed and read as an op's are. */
static opd_status make_call(const struct opctl *ctl, struct graph_file *file, bool ran, struct call *call, opd_error *error)
{
	opd_status status = call_init_schema(call, file->name, &file->inputs, error);
	if (status != OPD_OK)
		return status;
	opd_request_destroy(call->request);
	call->request = opd_request_graph(file->id);
	if (call->request == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	call->bare = !ran;
	call->shares = ran && options_has(&ctl->options, OPTION_SHM) ? ctl->client : NULL;
	call->seed = file->seed;
	opd_request_mode(call->request, ran ? OPD_MODE_RUN : OPD_MODE_DRY);
	opd_request_explain(call->request, !ran || options_has(&ctl->options, OPTION_EXPLAIN));
	opd_request_timeout(call->request, ctl->timeout_us);
	for (size_t i = 3; i < ctl->options.count && status == OPD_OK; i++)
		status = call_add_text(call, ctl->options.positional[i], error);
	return status == OPD_OK && call->shares != NULL ? call_share_results(call, error) : status;
}

static int run_file(struct opctl *ctl, struct graph_file *file, int64_t count, bool ran)
{
	opd_error error;
	struct call call = {0};
	opd_status status = opctl_connect(ctl, CONNECT_ANY, &error);
	if (status == OPD_OK)
		status = opctl_load_modules(ctl, &error);
	if (status == OPD_OK)
		status = graph_file_register(file, ctl->client, &error);
	if (status == OPD_OK)
		status = make_call(ctl, file, ran, &call, &error);
	const int code = status == OPD_OK ? submit(ctl, file, &call, count, ran) : report_failure(ctl, status, &error);
	call_fini(&call);
	return code;
}

int cmd_graph(struct opctl *ctl)
{
	opd_error error;
	int64_t seed, count;
	const char *verb = ctl->options.count < 3 ? "" : ctl->options.positional[2];
	const bool ran = strcmp(verb, "run") == 0;
	if (!ran && strcmp(verb, "explain") != 0) {
		(void)opd_fail(&error, OPD_INVALID_ARGUMENT, "graph needs a file, then run or explain");
		return report_usage(ctl, &error);
	}
	if (opctl_check_output(ctl->options.values[OPTION_OUTPUT], &error) != OPD_OK ||
	    options_int(&ctl->options, OPTION_SEED, 0, INT64_MAX, 0, &seed, &error) != OPD_OK ||
	    options_int(&ctl->options, OPTION_COUNT, 1, INT32_MAX, 1, &count, &error) != OPD_OK ||
	    options_seconds(&ctl->options, OPTION_TIMEOUT, 0, &ctl->timeout_us, &error) != OPD_OK)
		return report_usage(ctl, &error);
	struct graph_file file;
	const opd_status status = graph_file_open(&file, ctl->options.positional[1], &error);
	file.seed = (uint64_t)seed;
	const int code = status == OPD_OK ? run_file(ctl, &file, count, ran) : report_failure(ctl, status, &error);
	graph_file_close(&file);
	return code;
}
