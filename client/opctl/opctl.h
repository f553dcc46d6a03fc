/* opctl's frame: exit codes, the context that every command gets, the table of commands.
 *
 * Layer: client/opctl, on top of libopd (and libopd-embedded where it is built). Threads: one.
 * Not here: options (options.h), what goes to the terminal (print.h). */
#ifndef OPCTL_OPCTL_H
#define OPCTL_OPCTL_H

#include <stdbool.h>

#include "opd/client.h"
#include "client/opctl/options.h"

enum {
	EXIT_DONE = 0,
	EXIT_REQUEST = 1,     /* a request failed, a case failed, a file couldn't be read or written */
	EXIT_USAGE = 2,       /* the command line can't be understood; nothing was sent */
	EXIT_UNREACHABLE = 3, /* no daemon answers, or it went away; it or we are not who the other believes */
};

struct opctl {
	struct options options;
	opd_client *client; /* after opctl_connect */
	bool embedded;      /* the client runs in this process because no daemon answered */
	bool json;
	uint64_t timeout_us; /* of every call; set before opctl_connect. 0: none */
};

struct command {
	const char *name;
	const char *arguments;            /* for the usage line */
	const char *summary;              /* one line */
	const char *help;                 /* the rest, in lines */
	const struct option_use *options; /* besides those that every command takes; ends with OPTION_END */
	int (*run)(struct opctl *ctl);    /* returns an exit code */
};

/* All commands, ended by a NULL name; in the order of the help. */
extern const struct command opctl_commands[];

typedef enum connect_need {
	CONNECT_ANY = 0,    /* without a daemon on the default socket the op runs in this process, and a note on stderr says so */
	CONNECT_DAEMON = 1, /* … the command fails with UNAVAILABLE */
} connect_need;

/* Connects as --connect, OPD_ADDRESS or the default say. */
OPD_MUST_USE opd_status opctl_connect(struct opctl *ctl, connect_need need, opd_error *error);

/* Loads the modules of --module, if any. */
OPD_MUST_USE opd_status opctl_load_modules(struct opctl *ctl, opd_error *error);

/* cmd_run.c. --class, where it is given. */
OPD_MUST_USE opd_status opctl_set_class(const struct opctl *ctl, opd_request *request, opd_error *error);
/* The file that --output names, by its ending; the name is checked before anything runs. */
OPD_MUST_USE opd_status opctl_check_output(const char *path, opd_error *error);
OPD_MUST_USE opd_status opctl_write_results(const struct opctl *ctl, const char *op, const opd_result *result, opd_error *error);

int cmd_run(struct opctl *ctl);
int cmd_fake(struct opctl *ctl);
int cmd_explain(struct opctl *ctl);
int cmd_graph(struct opctl *ctl);
int cmd_put(struct opctl *ctl);
int cmd_get(struct opctl *ctl);
int cmd_rm(struct opctl *ctl);
int cmd_publish(struct opctl *ctl);
int cmd_tensors(struct opctl *ctl);
int cmd_ops(struct opctl *ctl);
int cmd_describe(struct opctl *ctl);
int cmd_providers(struct opctl *ctl);
int cmd_priority(struct opctl *ctl);
int cmd_verify(struct opctl *ctl);
int cmd_bench(struct opctl *ctl);
int cmd_ping(struct opctl *ctl);
int cmd_info(struct opctl *ctl);
int cmd_health(struct opctl *ctl);
int cmd_sessions(struct opctl *ctl);
int cmd_session(struct opctl *ctl);
int cmd_stats(struct opctl *ctl);
int cmd_top(struct opctl *ctl);
extern const struct option_use top_options[];
int cmd_module(struct opctl *ctl);
int cmd_provider(struct opctl *ctl);
int cmd_token(struct opctl *ctl);
int cmd_log_level(struct opctl *ctl);
int cmd_drain(struct opctl *ctl);
int cmd_help(struct opctl *ctl);

extern const struct option_use run_options[], fake_options[], explain_options[], graph_options[], put_options[], get_options[], publish_options[], verify_options[], bench_options[],
    ping_options[], health_options[], drain_options[], no_options[];

#endif
