#include "client/opctl/explain.h"

#include <inttypes.h>

#include "client/opctl/print.h"

static void print_times(const opd_explain *explain)
{
	const struct {
		const char *name;
		uint64_t ns;
	} times[] = {{"receive", explain->receive_ns}, {"decode", explain->decode_ns}, {"dispatch", explain->dispatch_ns}, {"queue", explain->queue_ns},
	             {"kernel", explain->kernel_ns}, {"moves", explain->moves_ns},       {"pack", explain->pack_ns}};
	(void)printf("times      ");
	for (size_t i = 0; i < sizeof times / sizeof times[0]; i++)
		(void)printf("%s%s %s", i == 0 ? "" : ", ", times[i].name, duration_text((double)times[i].ns));
	(void)puts(explain->on_loop ? " (on the loop, no hand-off)" : "");
}

/* Of a request that waited: "behind     3 jobs of this session, 0 of its tenant's others, 12 of other tenants (2 realtime, 13 interactive, 0 batch), 1 running; 14 ms of device time" */
static void print_behind(const opd_behind *behind)
{
	(void)printf("behind     %" PRIu64 " jobs of this session, %" PRIu64 " of its tenant's others, %" PRIu64 " of other tenants (%" PRIu64 " realtime, %" PRIu64
	             " interactive, %" PRIu64 " batch), %" PRIu64 " running; ",
	             behind->own_jobs, behind->tenant_jobs, behind->other_jobs, behind->realtime_jobs, behind->interactive_jobs, behind->batch_jobs,
	             behind->running);
	(void)printf("%s of device time\n", duration_text((double)(behind->own_ns + behind->tenant_ns + behind->other_ns)));
}

void explain_print(const opd_explain *explain, bool ran)
{
	(void)printf("level      %s\n", shown(explain->level));
	if (explain->narrowed[0] != '\0')
		(void)printf("list of    %s\n", shown(explain->narrowed));
	print_list("effective  ", explain->effective, explain->effective_count);
	(void)printf("device     %s\n", shown(explain->device));
	for (uint32_t i = 0; i < explain->skip_count; i++)
		(void)printf("skipped    %s: %s\n", shown(explain->skipped[i].provider), shown(explain->skipped[i].reason));
	for (uint32_t i = 0; i < explain->move_count; i++)
		(void)printf("move       %s: %s to %s, %s\n", shown(explain->moves[i].operand), shown(explain->moves[i].from),
		             shown(explain->moves[i].to), bytes_text(explain->moves[i].bytes));
	if (ran)
		print_times(explain);
	if (ran && explain->batched != 0)
		(void)printf("batched    with %" PRIu32 " other requests, as one kernel\n", explain->batched - 1);
	if (ran && explain->behind != NULL && explain->behind->own_jobs + explain->behind->tenant_jobs + explain->behind->other_jobs + explain->behind->running > 0)
		print_behind(explain->behind);
}

static cJSON *times_json(const opd_explain *explain)
{
	cJSON *times = cJSON_CreateObject();
	cJSON_AddItemToObject(times, "receive", json_u64(explain->receive_ns));
	cJSON_AddItemToObject(times, "decode", json_u64(explain->decode_ns));
	cJSON_AddItemToObject(times, "dispatch", json_u64(explain->dispatch_ns));
	cJSON_AddItemToObject(times, "queue", json_u64(explain->queue_ns));
	cJSON_AddItemToObject(times, "kernel", json_u64(explain->kernel_ns));
	cJSON_AddItemToObject(times, "moves", json_u64(explain->moves_ns));
	cJSON_AddItemToObject(times, "pack", json_u64(explain->pack_ns));
	return times;
}

static cJSON *behind_json(const opd_behind *behind)
{
	cJSON *item = cJSON_CreateObject();
	const struct {
		const char *name;
		uint64_t value;
	} numbers[] = {{"own_jobs", behind->own_jobs},     {"tenant_jobs", behind->tenant_jobs},           {"other_jobs", behind->other_jobs},
	               {"realtime", behind->realtime_jobs}, {"interactive", behind->interactive_jobs},      {"batch", behind->batch_jobs},
	               {"own_ns", behind->own_ns},         {"tenant_ns", behind->tenant_ns},               {"other_ns", behind->other_ns},
	               {"running", behind->running}};
	for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
		cJSON_AddItemToObject(item, numbers[i].name, json_u64(numbers[i].value));
	return item;
}

cJSON *explain_json(const opd_explain *explain, bool ran)
{
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "level", explain->level);
	cJSON_AddItemToObject(document, "effective", json_texts(explain->effective, explain->effective_count));
	cJSON_AddStringToObject(document, "narrowed", explain->narrowed);
	cJSON_AddStringToObject(document, "device", explain->device);
	cJSON_AddBoolToObject(document, "on_loop", explain->on_loop);
	if (ran)
		cJSON_AddItemToObject(document, "batched", json_u64(explain->batched));
	if (ran && explain->behind != NULL)
		cJSON_AddItemToObject(document, "behind", behind_json(explain->behind));
	cJSON *skipped = cJSON_AddArrayToObject(document, "skipped");
	for (uint32_t i = 0; i < explain->skip_count; i++) {
		cJSON *skip = cJSON_CreateObject();
		cJSON_AddStringToObject(skip, "provider", explain->skipped[i].provider);
		cJSON_AddStringToObject(skip, "code", opd_reason_code_text(explain->skipped[i].code));
		cJSON_AddStringToObject(skip, "reason", explain->skipped[i].reason);
		cJSON_AddItemToArray(skipped, skip);
	}
	cJSON *moves = cJSON_AddArrayToObject(document, "moves");
	for (uint32_t i = 0; i < explain->move_count; i++) {
		cJSON *move = cJSON_CreateObject();
		cJSON_AddStringToObject(move, "operand", explain->moves[i].operand);
		cJSON_AddStringToObject(move, "from", explain->moves[i].from);
		cJSON_AddStringToObject(move, "to", explain->moves[i].to);
		cJSON_AddItemToObject(move, "bytes", json_u64(explain->moves[i].bytes));
		cJSON_AddItemToArray(moves, move);
	}
	if (ran)
		cJSON_AddItemToObject(document, "times_ns", times_json(explain));
	return document;
}
