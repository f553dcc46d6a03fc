/* opctl: the command line of opd. README.md has every command with an example. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "client/opctl/print.h"

#define OPCTL_VERSION_LINE "opctl " OPD_VERSION

const struct option_use no_options[] = {{OPTION_END, NULL}};

static const struct option_use common_options[] = {
    {OPTION_CONNECT,
     "unix:/path, tls://host:port, tcp://host:port or embedded: (default: $OPD_ADDRESS, else the default socket, else this process)"},
    {OPTION_CA, "tls://: authorities that may have signed the daemon's certificate, in PEM (default: the system's)"},
    {OPTION_CERT, "tls://: the client's own certificate, in PEM"},
    {OPTION_KEY, "tls://: its key"},
    {OPTION_SERVER_NAME, "tls://: the name that the daemon's certificate must have (default: the address's host)"},
    {OPTION_FINGERPRINT, "tls://: the daemon's certificate is this one, whoever signed it: sha256:… as opd --self-signed prints it"},
    {OPTION_TOKEN_FILE, "a file with the token that says who the client is (default: $OPD_TOKEN)"},
    {OPTION_RINGS, "requests and replies go through memory shared with the daemon (Unix sockets)"},
    {OPTION_POLL, "with --rings: both sides look for so many microseconds before they sleep (at most 1000000)"},
    {OPTION_JSON, "one JSON document on stdout instead of text"},
    {OPTION_HELP, "this text"},
    {OPTION_END, NULL},
};

static const char values_help[] =
    "VALUE is a number, true, false, none, a word, [1,2], or for tensors\n"
    "  @file.npy, @file.npy:bf16 (raw words taken as bf16), @file.safetensors:key\n"
    "  zeros:f32[2,4], ones:…, arange:…, randn:… (see --seed)\n"
    "  i64[3]=0,1,2 (one value fills)\n"
    "  f32[2,4] (no values: fake and explain only)\n"
    "The op's schema says which type a value has; values without a name are positional and come first.\n";

const struct command opctl_commands[] = {
    {"run", "OP [NAME=]VALUE…", "run an op; print or write its results", values_help, run_options, cmd_run},
    {"fake", "OP [NAME=]VALUE…", "the results' dtypes and shapes, without computing", values_help, fake_options, cmd_fake},
    {"explain", "OP [NAME=]VALUE…", "what would run and why, without running", values_help, explain_options, cmd_explain},
    {"graph", "FILE run|explain [NAME=]VALUE…", "run a graph of ops that a JSON file describes, or say what would run",
     "README.md in client/opctl has the file's form. VALUE is a tensor as `opctl help run` has it; explain takes bare shapes.\n", graph_options,
     cmd_graph},
    {"put", "FILE --as NAME", "upload a file's tensors and publish them, until withdrawn",
     ".npy: as NAME; .safetensors: each tensor as NAME/its-name. They are the tenant's (its sessions find them by name or contents) and held once.\n", put_options,
     cmd_put},
    {"get", "NAME --output FILE", "write what is published by that name to a file", NULL, get_options, cmd_get},
    {"rm", "NAME…", "withdraw publications; who has one open keeps it", "NAME/ withdraws all whose names begin so.\n", no_options, cmd_rm},
    {"publish", "NAME --as NAME", "publish the same bytes by another name, or (--all) for every tenant", NULL, publish_options, cmd_publish},
    {"tensors", "", "list what is published to you", NULL, no_options, cmd_tensors},
    {"ops", "", "list the ops", NULL, no_options, cmd_ops},
    {"describe", "OP", "one op: schema, implementations, effective list", NULL, no_options, cmd_describe},
    {"providers", "", "list the providers", NULL, no_options, cmd_providers},
    {"provider", "NAME restore [OP]", "end a provider's quarantine, or that of one op (administrators)", NULL, no_options, cmd_provider},
    {"priority", "get OP | set OP LIST | clear OP", "the server's default list of an op, or of '*'",
     "LIST is comma-separated; '' is an empty list: native runs, with a warning. set and clear hold until the daemon ends and "
     "need an administrator.\n",
     no_options, cmd_priority},
    {"verify", "CASE…", "run case files, or folders of them, and compare",
     "A line a case, then `N passed, N failed` (with --provider or --all `…, N skipped`). A case that the provider refuses is "
     "skipped.\n",
     verify_options, cmd_verify},
    {"bench", "OP", "throughput and latency of one op, on inputs that the daemon makes",
     "Prints requests per second, p50, p90, p99, and from the explain record of every 16th request where the time goes.\n",
     bench_options, cmd_bench},
    {"ping", "", "round trips to the daemon", NULL, ping_options, cmd_ping},
    {"info", "", "the daemon: version, listeners, memory, devices", NULL, no_options, cmd_info},
    {"health", "", "whether the daemon should get work: exit code 0, or 1 and what is wrong, or 3 when nobody answers", NULL, health_options, cmd_health},
    {"sessions", "", "who is connected: sessions, tenants, and what each has had of the lanes", NULL, no_options, cmd_sessions},
    {"session", "ID set weight|class|priority|quota|device VALUE | ID clear priority OP", "another weight, class, list, quota or pinned device for a session (administrators)",
     "weight: 1 to 1000000, among its tenant's sessions. class: realtime, interactive or batch, of its requests that name none.\n"
     "priority: OP=LIST, from its next request on, unless a map that it has pushed itself has another; OP= is an empty list. clear priority OP ends it.\n"
     "quota: NAME=LIMIT of in_flight, queued, bytes_in, bytes_out (a second), memory, device_memory, device_time (a second): in_flight=32, bytes_in=64MiB,\n"
     "device_time=500ms; 0: as the daemon's configuration has it.\n", no_options, cmd_session},
    {"stats", "[PREFIX]", "what the daemon has counted: the numbers of its metrics endpoint, or those whose names begin so", NULL, no_options, cmd_stats},
    {"top", "", "the lanes' use, live: sessions by the device time that they take", "On a terminal: q or Ctrl-C ends it, s j w u m i sort by share, jobs, mean wait, queued, memory, number, r reverses, arrows and page keys scroll, space looks now.\n"
     "Elsewhere a picture follows the other; with --json each is one line. Ends after -c N pictures.\n", top_options, cmd_top},
    {"module", "load PATH", "load a provider module into the daemon (administrators)", "PATH is the daemon's, not yours.\n",
     no_options, cmd_module},
    {"log-level", "LEVEL", "set the daemon's log level: error, warn, info, debug (administrators)", NULL, no_options,
     cmd_log_level},
    {"token", "new NAME", "make a token for an identity, and the line of the daemon's tokens file that knows it",
     "The token is the client's alone (--token-file, or $OPD_TOKEN); the line holds only its SHA-256.\n", no_options, cmd_token},
    {"drain", "", "let the daemon finish its work and end (administrators)", NULL, drain_options, cmd_drain},
    {"help", "[COMMAND]", "this text, or a command's", NULL, no_options, cmd_help},
    {NULL, NULL, NULL, NULL, NULL, NULL},
};

static const struct command *find_command(const char *name)
{
	for (const struct command *command = opctl_commands; command->name != NULL; command++)
		if (strcmp(command->name, name) == 0)
			return command;
	return NULL;
}

static void print_options(const struct option_use *uses)
{
	for (; uses->id != OPTION_END; uses++) {
		char label[64];
		options_describe(uses->id, label, sizeof label);
		(void)printf("  %-22s %s\n", label, uses->help);
	}
}

static void print_usage(void)
{
	(void)puts("usage: opctl [OPTION…] COMMAND [ARGUMENT…]\n\ncommands");
	for (const struct command *command = opctl_commands; command->name != NULL; command++)
		(void)printf("  %-10s %s\n", command->name, command->summary);
	(void)puts("\noptions of every command");
	print_options(common_options);
	(void)puts("  --version              print the version\n\n"
	           "exit codes: 0 done, 1 a request or a case failed, 2 the command line can't be understood, 3 no daemon answers, or one that can't be verified or doesn't know us\n"
	           "`opctl help COMMAND` says more.");
}

static void print_command(const struct command *command)
{
	(void)printf("usage: opctl %s%s%s [OPTION…]\n\n%s\n", command->name, command->arguments[0] == '\0' ? "" : " ",
	             command->arguments, command->summary);
	if (command->help != NULL)
		(void)printf("\n%s", command->help);
	(void)puts("\noptions");
	print_options(command->options);
	print_options(common_options);
}

static int help_on(const struct opctl *ctl, const char *name)
{
	const struct command *command = find_command(name);
	if (command != NULL) {
		print_command(command);
		return EXIT_DONE;
	}
	opd_error error;
	(void)opd_fail(&error, OPD_INVALID_ARGUMENT, "no command is called '%s' (opctl help lists them)", name);
	return report_usage(ctl, &error);
}

int cmd_help(struct opctl *ctl)
{
	if (ctl->options.count > 1)
		return help_on(ctl, ctl->options.positional[1]);
	print_usage();
	return EXIT_DONE;
}

static int run_command(struct opctl *ctl)
{
	opd_error error;
	if (ctl->options.count == 0) {
		(void)opd_fail(&error, OPD_INVALID_ARGUMENT, "no command is given (opctl --help lists them)");
		return report_usage(ctl, &error);
	}
	const char *name = ctl->options.positional[0];
	const struct command *command = find_command(name);
	if (command == NULL || options_has(&ctl->options, OPTION_HELP))
		return help_on(ctl, name);
	if (options_check(&ctl->options, name, command->options, &error) != OPD_OK)
		return report_usage(ctl, &error);
	return command->run(ctl);
}

int main(int argc, char **argv)
{
	struct opctl ctl = {0};
	opd_error error;
	const opd_status status = options_parse(&ctl.options, argc, argv, &error);
	ctl.json = options_has(&ctl.options, OPTION_JSON);
	int code;
	if (status != OPD_OK) {
		code = report_usage(&ctl, &error);
	} else if (options_has(&ctl.options, OPTION_VERSION)) {
		(void)puts(OPCTL_VERSION_LINE);
		code = EXIT_DONE;
	} else if (options_has(&ctl.options, OPTION_HELP) && ctl.options.count == 0) {
		print_usage();
		code = EXIT_DONE;
	} else {
		code = run_command(&ctl);
	}
	opd_close(ctl.client);
	options_fini(&ctl.options);
	/* A full disk or a closed pipe under stdout is a failure too; who closed the pipe wants to hear no more. */
	if (fflush(stdout) != 0 && code == EXIT_DONE) {
		if (errno != EPIPE)
			perror("opctl: stdout");
		code = EXIT_REQUEST;
	}
	return code;
}
