/* opd's flags: the table that help and parser read, and the configuration that flags and file come to. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/text.h"
#include "server/options.h"

enum {
	FLAG_HELP = 1,
	FLAG_VERSION,
	FLAG_CONFIG,
	FLAG_CHECK,
	FLAG_SOCKET,
	FLAG_INSECURE,
	FLAG_SELF_SIGNED,
	FLAG_ANONYMOUS,
	FLAG_LISTEN,
	FLAG_PRIORITY,
	FLAG_MODULE,
	FLAG_ISOLATED,
	FLAG_SET,     /* config_set(key, value) */
	FLAG_CHECKED, /* config_set("checked", "true") */
	FLAG_INLINE,  /* a number of nanoseconds, or a duration */
};

struct flag {
	const char *name;
	int kind;         /* 0: a heading of the help */
	const char *key;  /* of FLAG_SET */
	const char *value; /* what the help calls it; NULL: takes none */
	const char *help;
};

static const struct flag flags[] = {
	{"Configuration", 0, NULL, NULL, NULL},
	{"config", FLAG_CONFIG, NULL, "FILE", "read this YAML file; flags go over it, also after a reload"},
	{"check-config", FLAG_CHECK, NULL, NULL, "check flags and file, print what they come to, don't serve"},
	{"Listening", 0, NULL, NULL, NULL},
	{"listen", FLAG_LISTEN, NULL, "ADDRESS", "unix:/path, tls://host:port or tcp://host:port (repeatable; replaces the file's)"},
	{"insecure-plain-tcp", FLAG_INSECURE, NULL, NULL, "let tcp:// listeners be reached from other machines: anyone on the way reads and runs everything"},
	{"print-default-socket", FLAG_SOCKET, NULL, NULL, "print where opd listens, and opctl looks, when nobody says"},
	{"TLS", 0, NULL, NULL, NULL},
	{"tls-certificate", FLAG_SET, "tls.certificate", "FILE", "the certificate, and the chain behind it, in PEM"},
	{"tls-key", FLAG_SET, "tls.key", "FILE", "its private key: at most its group may read it"},
	{"tls-client-ca", FLAG_SET, "tls.client_ca", "FILE", "who signs clients' certificates"},
	{"tls-client-certificates", FLAG_SET, "tls.client_certificates", "MODE", "off, optional or required; default: required where there is a client CA"},
	{"self-signed", FLAG_SELF_SIGNED, NULL, NULL, "without a certificate: make one in memory, for a first try, and print the fingerprint to pin"},
	{"Identities", 0, NULL, NULL, NULL},
	{"tokens", FLAG_SET, "tokens", "FILE", "tokens that clients may have, as `opctl token new` makes them"},
	{"allow-anonymous", FLAG_ANONYMOUS, NULL, NULL, "tls:// listeners that other machines reach serve also clients that don't say who they are"},
	{"Dispatch", 0, NULL, NULL, NULL},
	{"priority", FLAG_PRIORITY, NULL, "OP=LIST", "providers in the order of preference, as rms_norm=cuda,cpu or '*=cpu' (repeatable)"},
	{"module", FLAG_MODULE, NULL, "[NAME=]PATH", "load a provider; one that comes with opd by its name alone, as onednn, or all of those (repeatable)"},
	{"isolated", FLAG_ISOLATED, NULL, "[NAME=]PATH", "load a provider into worker processes: a crash of its is one request's error (repeatable)"},
	{"threads", FLAG_SET, "threads", "N", "of everybody's CPU lane; 0: those of the machine that other lanes leave"},
	{"loops", FLAG_SET, "loops", "N", "I/O loops, to 32: threads that read and write sockets; connections are spread over them (0: by the machine)"},
	{"inline", FLAG_INLINE, "inline", "NS", "run kernels estimated under this on the I/O loop; 0: never"},
	{"checked", FLAG_CHECKED, NULL, NULL, "put canaries behind outputs and verify them after each kernel"},
	{"Memory", 0, NULL, NULL, NULL},
	{"memory", FLAG_SET, "limits.memory", "SIZE", "of all tensors, as 64GiB; default: half of the machine's"},
	{"session-memory", FLAG_SET, "limits.session", "SIZE", "of one session's tensors; default: half of --memory"},
	{"Logging", 0, NULL, NULL, NULL},
	{"log-level", FLAG_SET, "log.level", "LEVEL", "error, warn, info or debug; default: info"},
	{"log-format", FLAG_SET, "log.format", "FORMAT", "text or json; default: text"},
	{"log-file", FLAG_SET, "log.file", "FILE", "default: stderr; opened again on SIGUSR1"},
	{"Other", 0, NULL, NULL, NULL},
	{"help", FLAG_HELP, NULL, NULL, "print this"},
	{"version", FLAG_VERSION, NULL, NULL, "print the version"},
};
#define FLAG_COUNT (sizeof flags / sizeof *flags)

/* A flag that changes the configuration: every reload applies them again. */
struct options_change {
	const struct flag *flag;
	const char *value;
};

static void print_help(void)
{
	(void)printf("opd serves tensor ops over Unix sockets, TCP and TLS.\n\nUsage: opd [flags]\n");
	for (const struct flag *flag = flags; flag < flags + FLAG_COUNT; flag++) {
		char left[64];
		if (flag->kind == 0) {
			(void)printf("\n%s\n", flag->name);
			continue;
		}
		(void)snprintf(left, sizeof left, "--%s%s%s", flag->name, flag->value != NULL ? " " : "", flag->value != NULL ? flag->value : "");
		(void)printf("  %-28s %s\n", left, flag->help);
	}
	(void)printf("\nSignals: SIGTERM, SIGINT drain (a second one ends at once); SIGHUP reads the configuration again; SIGUSR1 opens the\n"
	             "log file again.\n"
	             "Exit codes: 0 ended as asked; 1 failed, or the drain's limit cut off work; 2 wrong flags or configuration; 3 can't\n"
	             "listen.\n");
}

int options_fail(int code, const char *prefix, const char *text)
{
	char escaped[2 * OPD_ERROR_TEXT_BYTES];
	(void)fprintf(stderr, "opd: %s%s\n", prefix, text_escape(text, strlen(text), escaped, sizeof escaped));
	return code;
}

static void fill_long_options(struct option out[FLAG_COUNT + 1])
{
	size_t count = 0;
	for (size_t i = 0; i < FLAG_COUNT; i++)
		if (flags[i].kind != 0)
			out[count++] = (struct option){flags[i].name, flags[i].value != NULL ? required_argument : no_argument, NULL, (int)i + 256};
	out[count] = (struct option){0};
}

/* -1: go on; else the exit code. */
static int take_flag(struct options *options, const struct flag *flag, const char *value)
{
	char path[512];
	switch (flag->kind) {
	case FLAG_HELP:
		print_help();
		return EXIT_OK;
	case FLAG_VERSION:
		(void)printf("opd %s\n", OPD_VERSION);
		return EXIT_OK;
	case FLAG_SOCKET:
		config_default_socket(path, sizeof path);
		(void)printf("%s\n", path);
		return EXIT_OK;
	case FLAG_CONFIG:
		options->config_path = value;
		return -1;
	case FLAG_CHECK:
		options->check = true;
		return -1;
	case FLAG_INSECURE:
		options->insecure_plain_tcp = true;
		return -1;
	case FLAG_ANONYMOUS:
		options->allow_anonymous = true;
		return -1;
	case FLAG_SELF_SIGNED:
		options->self_signed = true;
		return -1;
	default:
		options->changes[options->change_count++] = (struct options_change){flag, value};
		return -1;
	}
}

int options_parse(int argc, char **argv, struct options *options)
{
	struct option long_options[FLAG_COUNT + 1];
	options->changes = calloc((size_t)argc, sizeof *options->changes);
	if (options->changes == NULL)
		return options_fail(EXIT_FAILED, "", "out of memory");
	fill_long_options(long_options);
	for (int found; (found = getopt_long(argc, argv, "", long_options, NULL)) != -1;) {
		if (found == '?')
			return options_fail(EXIT_USAGE, "", "see opd --help");
		int code = take_flag(options, &flags[found - 256], optarg);
		if (code >= 0)
			return code;
	}
	return optind < argc ? options_fail(EXIT_USAGE, "no arguments are expected, see opd --help: ", argv[optind]) : -1;
}

void options_free(struct options *options)
{
	tls_self_destroy(options->self);
	free(options->changes);
}

/* ---- Configuration ----------------------------------------------------------------------------------------------------- */

static opd_status set_inline(struct config *config, const char *value, opd_error *error)
{
	char text[64];
	bool bare = value[0] != '\0' && strspn(value, "0123456789") == strlen(value);
	(void)snprintf(text, sizeof text, "%.50s%s", value, bare ? "ns" : "");
	return config_set(config, "inline", text, error);
}

static opd_status apply(struct config *config, const struct options_change *change, opd_error *error)
{
	switch (change->flag->kind) {
	case FLAG_LISTEN:
		return config_add_listener(config, change->value, error);
	case FLAG_PRIORITY:
		return config_add_priority(config, change->value, error);
	case FLAG_MODULE:
		return config_add_module(config, change->value, false, error);
	case FLAG_ISOLATED:
		return config_add_module(config, change->value, true, error);
	case FLAG_CHECKED:
		return config_set(config, "checked", "true", error);
	case FLAG_INLINE:
		return set_inline(config, change->value, error);
	default:
		return config_set(config, change->flag->key, change->value, error);
	}
}

static opd_status apply_all(struct config *config, const struct options *options, opd_error *error)
{
	for (size_t i = 0; i < options->change_count; i++)
		if (options->changes[i].flag->kind == FLAG_LISTEN) {
			config_clear_listeners(config);
			break;
		}
	for (size_t i = 0; i < options->change_count; i++) {
		opd_status status = apply(config, &options->changes[i], error);
		if (status != OPD_OK)
			return opd_error_prefix(error, status, "--%s", options->changes[i].flag->name);
	}
	return OPD_OK;
}

opd_status options_config(const struct options *options, struct config **config_out, opd_error *error)
{
	struct config *config = config_create();
	if (config == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	config->worker = "/proc/self/exe";
	opd_status status = options->config_path != NULL ? config_load(config, options->config_path, error) : OPD_OK;
	if (status == OPD_OK)
		status = apply_all(config, options, error);
	if (status == OPD_OK)
		status = service_listen(&options->service, config, error);
	if (status == OPD_OK)
		status = config_check(config, options->insecure_plain_tcp, error);
	if (status == OPD_OK)
		status = config_load_tls(config, options->self, error);
	if (status == OPD_OK)
		status = config_load_tokens(config, error);
	config->allow_anonymous = options->allow_anonymous;
	if (status != OPD_OK) {
		config_destroy(config);
		return status;
	}
	*config_out = config;
	return OPD_OK;
}
