/* ops, describe, providers: what the daemon has. */
#include <inttypes.h>
#include <string.h>

#include "client/opctl/print.h"

static int connect_or_report(struct opctl *ctl, size_t arguments, const char *expected)
{
	opd_error error;
	if (ctl->options.count != arguments + 1) {
		(void)opd_fail(&error, OPD_INVALID_ARGUMENT, "%s has %zu arguments, expected %s", ctl->options.positional[0],
		               ctl->options.count - 1, expected);
		return report_usage(ctl, &error);
	}
	const opd_status status = opctl_connect(ctl, CONNECT_ANY, &error);
	return status == OPD_OK ? EXIT_DONE : report_failure(ctl, status, &error);
}

/* ---- ops ---- */

static int print_ops_json(const opd_op_list *list)
{
	cJSON *document = cJSON_CreateArray();
	for (uint32_t i = 0; i < list->count; i++) {
		cJSON *op = cJSON_CreateObject();
		cJSON_AddStringToObject(op, "name", list->ops[i].name);
		cJSON_AddStringToObject(op, "schema", list->ops[i].schema);
		cJSON_AddStringToObject(op, "doc", list->ops[i].doc);
		cJSON_AddItemToArray(document, op);
	}
	return print_json(document);
}

int cmd_ops(struct opctl *ctl)
{
	int code = connect_or_report(ctl, 0, "none");
	if (code != EXIT_DONE)
		return code;
	opd_error error;
	const opd_op_list *list;
	const opd_status status = opd_ops(ctl->client, &list, &error);
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	if (ctl->json)
		code = print_ops_json(list);
	else
		for (uint32_t i = 0; i < list->count; i++)
			(void)printf("%s\n    %s\n", shown(list->ops[i].schema), shown(list->ops[i].doc));
	opd_document_free(list);
	return code;
}

/* ---- describe ---- */

static void print_implementation(const opd_implementation *impl)
{
	(void)printf("  %-12s %-8s %s", shown(impl->provider), shown(impl->device),
	             impl->supported ? "supported" : "not supported: ");
	if (!impl->supported)
		(void)printf("%s", shown(impl->reason));
	(void)printf("%s%s%s%s%s%s\n", impl->predicate ? ", has a predicate" : ", takes all arguments",
	             impl->plan_may_refuse ? ", its plan may refuse" : "", impl->in_place ? ", in place" : "",
	             impl->thread_invariant ? ", thread-invariant" : "", impl->batch_invariant ? ", batch-invariant" : "",
	             impl->bf16_denormals_zero ? ", bf16 denormals are zero" : "");
	(void)printf("  %-12s uuid %s\n", "", shown(impl->uuid));
}

static void print_description(const opd_op_description *op)
{
	(void)printf("%s\n    %s\n", shown(op->schema), shown(op->doc));
	if (op->activations[0] != '\0')
		(void)printf("activations  %s\n", shown(op->activations));
	for (uint32_t i = 0; i < op->in_place_count; i++)
		(void)printf("in place     %s, result %u\n", shown(op->in_place_params[i]), op->in_place_results[i]);
	if (op->dim_count > 0) {
		(void)printf("sizes        ");
		for (uint32_t i = 0; i < op->dim_count; i++)
			(void)printf("%s%s (%" PRId64 ")", i == 0 ? "" : " x ", shown(op->dims[i]), op->default_dims[i]);
		(void)putchar('\n');
	}
	print_list("effective    ", op->effective, op->effective_count);
	(void)printf("level        %s\nimplementations\n", shown(op->level));
	for (uint32_t i = 0; i < op->implementation_count; i++)
		print_implementation(&op->implementations[i]);
}

static cJSON *implementation_json(const opd_implementation *impl)
{
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "provider", impl->provider);
	cJSON_AddStringToObject(document, "device", impl->device);
	cJSON_AddBoolToObject(document, "supported", impl->supported);
	cJSON_AddStringToObject(document, "reason", impl->reason);
	cJSON_AddStringToObject(document, "schema", impl->schema);
	cJSON_AddStringToObject(document, "uuid", impl->uuid);
	cJSON_AddBoolToObject(document, "predicate", impl->predicate);
	cJSON_AddBoolToObject(document, "plan_may_refuse", impl->plan_may_refuse);
	cJSON_AddBoolToObject(document, "in_place", impl->in_place);
	cJSON_AddBoolToObject(document, "thread_invariant", impl->thread_invariant);
	cJSON_AddBoolToObject(document, "batch_invariant", impl->batch_invariant);
	cJSON_AddBoolToObject(document, "bf16_denormals_zero", impl->bf16_denormals_zero);
	return document;
}

static int print_description_json(const opd_op_description *op)
{
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "name", op->name);
	cJSON_AddStringToObject(document, "schema", op->schema);
	cJSON_AddStringToObject(document, "doc", op->doc);
	cJSON_AddStringToObject(document, "activations", op->activations);
	cJSON_AddStringToObject(document, "level", op->level);
	cJSON_AddItemToObject(document, "effective", json_texts(op->effective, op->effective_count));
	cJSON *sizes = cJSON_AddArrayToObject(document, "sizes");
	for (uint32_t i = 0; i < op->dim_count; i++) {
		cJSON *size = cJSON_CreateObject();
		cJSON_AddStringToObject(size, "name", op->dims[i]);
		cJSON_AddItemToObject(size, "default", json_i64(op->default_dims[i]));
		cJSON_AddItemToArray(sizes, size);
	}
	cJSON *in_place = cJSON_AddObjectToObject(document, "in_place");
	for (uint32_t i = 0; i < op->in_place_count; i++)
		cJSON_AddItemToObject(in_place, op->in_place_params[i], json_u64(op->in_place_results[i]));
	cJSON *implementations = cJSON_AddArrayToObject(document, "implementations");
	for (uint32_t i = 0; i < op->implementation_count; i++)
		cJSON_AddItemToArray(implementations, implementation_json(&op->implementations[i]));
	return print_json(document);
}

int cmd_describe(struct opctl *ctl)
{
	int code = connect_or_report(ctl, 1, "one: the op");
	if (code != EXIT_DONE)
		return code;
	opd_error error;
	const opd_op_description *description;
	const opd_status status = opd_describe(ctl->client, ctl->options.positional[1], &description, &error);
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	if (ctl->json)
		code = print_description_json(description);
	else
		print_description(description);
	opd_document_free(description);
	return code;
}

/* ---- providers ---- */

#define NOT_AVAILABLE "not available: "

static void print_provider(const opd_provider_description *provider)
{
	/* A module's own text says it as well: "not available: libcuda.so.1 not found". */
	const bool told = provider->available || strncmp(provider->reason, NOT_AVAILABLE, strlen(NOT_AVAILABLE)) == 0;
	(void)printf("%-12s %-10s %s", shown(provider->name), shown(provider->version), told ? "" : NOT_AVAILABLE);
	(void)printf("%s\n    source   ", provider->available ? "available" : shown(provider->reason));
	(void)printf("%s\n", shown(provider->source));
	if (provider->device_count > 0)
		print_list("    devices  ", provider->devices, provider->device_count);
	print_list("    ops      ", provider->ops, provider->op_count);
	if (provider->isolated)
		(void)printf("    isolated %" PRIu64 " worker processes died\n", provider->deaths);
	if (provider->unconfined[0] != '\0')
		(void)printf("    not confined %s\n", shown(provider->unconfined));
	if (provider->failures != 0)
		(void)printf("    failures %" PRIu64 "\n", provider->failures);
	for (uint32_t i = 0; i < provider->quarantined_count; i++)
		(void)printf("    quarantined %s\n", shown(provider->quarantined[i]));
}

static int print_providers_json(const opd_provider_list *list)
{
	cJSON *document = cJSON_CreateArray();
	for (uint32_t i = 0; i < list->count; i++) {
		const opd_provider_description *provider = &list->providers[i];
		cJSON *item = cJSON_CreateObject();
		cJSON_AddStringToObject(item, "name", provider->name);
		cJSON_AddStringToObject(item, "version", provider->version);
		cJSON_AddBoolToObject(item, "available", provider->available);
		cJSON_AddStringToObject(item, "reason", provider->reason);
		cJSON_AddStringToObject(item, "source", provider->source);
		cJSON_AddItemToObject(item, "ops", json_texts(provider->ops, provider->op_count));
		cJSON_AddItemToObject(item, "devices", json_texts(provider->devices, provider->device_count));
		cJSON_AddBoolToObject(item, "isolated", provider->isolated);
		cJSON_AddItemToObject(item, "deaths", json_u64(provider->deaths));
		cJSON_AddStringToObject(item, "unconfined", provider->unconfined);
		cJSON_AddItemToObject(item, "failures", json_u64(provider->failures));
		cJSON_AddItemToObject(item, "quarantined", json_texts(provider->quarantined, provider->quarantined_count));
		cJSON_AddItemToArray(document, item);
	}
	return print_json(document);
}

int cmd_providers(struct opctl *ctl)
{
	int code = connect_or_report(ctl, 0, "none");
	if (code != EXIT_DONE)
		return code;
	opd_error error;
	const opd_provider_list *list;
	const opd_status status = opd_providers(ctl->client, &list, &error);
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	if (ctl->json)
		code = print_providers_json(list);
	else
		for (uint32_t i = 0; i < list->count; i++)
			print_provider(&list->providers[i]);
	opd_document_free(list);
	return code;
}
