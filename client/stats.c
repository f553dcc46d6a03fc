/* What the daemon counts. */
#include "client/connection.h"
#include "client/document.h"
#include "client/request.h"

static bool fill_stat(opd_result *result, const struct msg_stat *from, opd_stat *to)
{
	opd_stat_label *labels = arena_array(&result->arena, from->label_count, sizeof *labels);
	for (uint32_t i = 0; labels != NULL && i < from->label_count; i++)
		labels[i] = (opd_stat_label){result_text(result, from->labels[i].name), result_text(result, from->labels[i].value)};
	*to = (opd_stat){
		.name = result_text(result, from->name),
		.kind = (opd_stat_kind)from->kind,
		.value = from->value,
		.label_count = from->label_count,
		.labels = labels,
		.bucket_count = from->bucket_count,
		.buckets = from->buckets,
	};
	return labels != NULL;
}

static void *document_stats(opd_result *result)
{
	const struct msg_stats *from = &result->reply.stats;
	opd_stats *stats = document_alloc(result, sizeof *stats);
	opd_stat *items = arena_array(&result->arena, from->count, sizeof *items);
	if (stats == NULL || items == NULL)
		return NULL;
	for (uint32_t i = 0; i < from->count; i++)
		if (!fill_stat(result, &from->items[i], &items[i]))
			return NULL;
	*stats = (opd_stats){.count = from->count, .items = items, .cut = from->cut};
	return stats;
}

opd_status opd_get_stats(opd_client *client, const opd_stats **stats_out, opd_error *error)
{
	const struct msg_request message = {.kind = MSG_REQUEST_GET_STATS};
	opd_result *result;
	const void *document;
	opd_status status = client_call(client, &message, MSG_REPLY_STATS, &result, error);
	if (status == OPD_OK)
		status = document_create(result, document_stats, &document, error);
	if (status == OPD_OK)
		*stats_out = document;
	return status;
}
