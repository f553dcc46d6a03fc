/* All that the daemon counts, told one number after the other: to `opctl stats` as messages, to a metrics endpoint as text. Both have the same numbers.
 *
 * Layer: server. Threads: the loop's.
 * Names, units and labels are Prometheus': seconds and bytes, counters end in _total. README.md lists them. */
#ifndef OPD_SERVER_STATS_H
#define OPD_SERVER_STATS_H

#include <stdio.h>

#include "server/histogram.h"

#define STATS_LABELS_MAX 3u

struct server;
struct session;
struct request;

typedef enum stats_kind {
	STATS_COUNTER = 0,
	STATS_GAUGE = 1,
	STATS_HISTOGRAM = 2,
} stats_kind;

struct stats_label {
	const char *name;
	const char *value;
};

struct stats_sink {
	/* A name begins; its samples follow. */
	void (*family)(struct stats_sink *sink, stats_kind kind, const char *name, const char *help);
	void (*sample)(struct stats_sink *sink, const struct stats_label *labels, uint32_t count, double value);
	void (*spread)(struct stats_sink *sink, const struct stats_label *labels, uint32_t count, const struct histogram *histogram);
};

/* who: whose tenant is told of (an administrator: all); NULL: all. */
void stats_collect(struct server *server, const struct session *who, struct stats_sink *sink);
/* In Prometheus' text format, version 0.0.4. */
void stats_write(struct server *server, FILE *out);
/* The request. */
void stats_reply(struct request *request);

#endif
