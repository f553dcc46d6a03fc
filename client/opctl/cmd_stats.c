/* stats: what the daemon counts. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "client/opctl/print.h"

static uint64_t count_of(const opd_stat *stat)
{
	uint64_t count = 0;
	for (uint32_t i = 0; i < stat->bucket_count; i++)
		count += stat->buckets[i];
	return count;
}

/* The bound below which this part of them lies, in nanoseconds. */
static double percentile(const opd_stat *stat, double part)
{
	const double wanted = part * (double)count_of(stat);
	double seen = 0;
	for (uint32_t i = 0; i < stat->bucket_count; i++) {
		seen += (double)stat->buckets[i];
		if (seen >= wanted && i + 1 < stat->bucket_count)
			return ldexp(OPD_STAT_FIRST_NS, (int)i);
	}
	return INFINITY;
}

static void print_name(const opd_stat *stat)
{
	(void)printf("%s", shown(stat->name));
	for (uint32_t i = 0; i < stat->label_count; i++)
		(void)printf("%s%s=\"%s\"", i == 0 ? "{" : ",", stat->labels[i].name, shown(stat->labels[i].value));
	(void)printf("%s ", stat->label_count == 0 ? "" : "}");
}

static void print_histogram(const opd_stat *stat)
{
	const uint64_t count = count_of(stat);
	(void)printf("%" PRIu64, count);
	if (count != 0)
		(void)printf(", mean %s", duration_text(stat->value * 1e9 / (double)count));
	static const double parts[] = {0.5, 0.99};
	for (size_t i = 0; count != 0 && i < sizeof parts / sizeof parts[0]; i++) {
		const double ns = percentile(stat, parts[i]);
		(void)printf(", %.0f %% %s %s", parts[i] * 100, isinf(ns) ? "over" : "within", duration_text(isinf(ns) ? 17.18e9 : ns));
	}
	(void)printf("\n");
}

static void add_json(cJSON *list, const opd_stat *stat)
{
	cJSON *item = cJSON_CreateObject();
	cJSON_AddItemToArray(list, item);
	cJSON_AddStringToObject(item, "name", stat->name);
	cJSON *labels = cJSON_AddObjectToObject(item, "labels");
	for (uint32_t i = 0; i < stat->label_count; i++)
		cJSON_AddStringToObject(labels, stat->labels[i].name, stat->labels[i].value);
	if (stat->kind != OPD_STAT_HISTOGRAM) {
		cJSON_AddItemToObject(item, "value", json_f64(stat->value));
		return;
	}
	cJSON_AddItemToObject(item, "count", json_u64(count_of(stat)));
	cJSON_AddItemToObject(item, "sum", json_f64(stat->value));
	cJSON *buckets = cJSON_AddArrayToObject(item, "buckets");
	for (uint32_t i = 0; i < stat->bucket_count; i++)
		cJSON_AddItemToArray(buckets, json_u64(stat->buckets[i]));
}

int cmd_stats(struct opctl *ctl)
{
	const struct options *options = &ctl->options;
	const char *prefix = options->count == 2 ? options->positional[1] : "";
	const opd_stats *stats = NULL;
	opd_error error;
	if (options->count > 2) {
		(void)opd_fail(&error, OPD_INVALID_ARGUMENT, "expected stats [PREFIX]");
		return report_usage(ctl, &error);
	}
	opd_status status = opctl_connect(ctl, CONNECT_DAEMON, &error);
	if (status == OPD_OK)
		status = opd_get_stats(ctl->client, &stats, &error);
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	cJSON *list = ctl->json ? cJSON_CreateArray() : NULL;
	for (uint32_t i = 0; i < stats->count; i++) {
		const opd_stat *stat = &stats->items[i];
		if (strncmp(stat->name, prefix, strlen(prefix)) != 0)
			continue;
		if (ctl->json) {
			add_json(list, stat);
			continue;
		}
		print_name(stat);
		if (stat->kind == OPD_STAT_HISTOGRAM)
			print_histogram(stat);
		else
			(void)printf("%.15g\n", stat->value);
	}
	if (stats->cut && !ctl->json)
		(void)puts("(more than a reply holds: the rest is at the metrics endpoint)");
	opd_document_free(stats);
	return ctl->json ? print_json(list) : EXIT_DONE;
}
