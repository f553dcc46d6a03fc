/* What opd was told on its command line, and the configuration that this and the file come to.
 *
 * Layer: server, beside main.c (the daemon as a library knows nothing of it). Threads: options_parse on the main thread, before others; options_config on any, one at a time.
 * Life: options_parse → options_config (again at each reload: flags go over the file each time) → options_free.
 * Not here: what the keys mean (server/config.h), the service manager (server/service.h). */
#ifndef OPD_SERVER_OPTIONS_H
#define OPD_SERVER_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>

#include "server/config.h"
#include "server/service.h"
#include "server/tls_context.h"

enum {
	EXIT_OK = 0,
	EXIT_FAILED = 1, /* while serving, or a drain that cut off work */
	EXIT_USAGE = 2,  /* flags or configuration */
	EXIT_LISTEN = 3,
};

struct options {
	const char *config_path; /* NULL: none. Borrows from argv, as the changes do */
	bool check;
	bool insecure_plain_tcp;
	bool self_signed;
	bool allow_anonymous;
	struct tls_self *self; /* once made, the same at every reload */
	struct service service;
	size_t change_count;
	struct options_change *changes; /* in the order of the command line */
};

/* Reads the flags. -1: go on; else the code to exit with, after it was printed why. Either way options_free. */
OPD_MUST_USE int options_parse(int argc, char **argv, struct options *options);
void options_free(struct options *options);

/* Makes a checked configuration of the file, the flags and the sockets that were passed, its certificate and tokens loaded. The caller's to destroy. */
OPD_MUST_USE opd_status options_config(const struct options *options, struct config **config_out, opd_error *error);

/* config_print.c: what it comes to, on stdout, for whoever reads --check-config. */
void config_print(const struct config *config);

/* Prints "opd: PREFIX TEXT" to stderr, for there is no log yet, and gives the code back. What is wrong may come from a file, so it is escaped. */
int options_fail(int code, const char *prefix, const char *text);

#endif
