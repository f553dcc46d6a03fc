/* A graph as a JSON file describes it (README.md has the form): read, its constants and states brought to the daemon, registered.
 *
 * Layer: client/opctl. Threads: one.
 * Life: graph_file_open → graph_file_register → runs by id → graph_file_close (the session's end frees what the daemon has). */
#ifndef OPCTL_GRAPH_FILE_H
#define OPCTL_GRAPH_FILE_H

#include <cjson/cJSON.h>

#include "client/opctl/schema.h"
#include "opd/client.h"

struct graph_file {
	const char *path; /* borrowed */
	const char *name; /* the document's */
	cJSON *document;
	opd_graph *graph;
	uint64_t id;
	uint64_t seed;        /* of the next randn */
	struct schema inputs; /* those given at each run, as a schema's parameters */
	size_t output_count;
	const char *outputs[BOUND_OUTPUTS]; /* names; "" where the file gives none */
};

/* INVALID_ARGUMENT says where in the file. Close in either case. */
OPD_MUST_USE opd_status graph_file_open(struct graph_file *file, const char *path, opd_error *error);
OPD_MUST_USE opd_status graph_file_register(struct graph_file *file, opd_client *client, opd_error *error);
void graph_file_close(struct graph_file *file);

#endif
