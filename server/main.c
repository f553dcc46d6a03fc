/* opd: flags, signals and exit codes around server.h. README.md, "Operations", documents all of them. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <libgen.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "proto/text.h"
#include "server/config.h"
#include "server/log.h"
#include "server/server.h"
#include "server/tls_context.h"
#include "server/service.h"
#include "server/worker.h"

enum {
	EXIT_OK = 0,
	EXIT_FAILED = 1, /* while serving, or a drain that cut off work */
	EXIT_USAGE = 2,  /* flags or configuration */
	EXIT_LISTEN = 3,
};

/* ---- Flags ------------------------------------------------------------------------------------------------------------- */

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
	{"module", FLAG_MODULE, NULL, "[NAME=]PATH", "load a provider (repeatable)"},
	{"isolated", FLAG_ISOLATED, NULL, "[NAME=]PATH", "load a provider into worker processes: a crash of its is one request's error (repeatable)"},
	{"threads", FLAG_SET, "threads", "N", "of the CPU lane; 0: one a core"},
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

/* A flag that changes the configuration, in the order of the command line: every reload applies them again. */
struct change {
	const struct flag *flag;
	const char *value;
};

struct options {
	const char *config_path;
	bool check;
	bool insecure_plain_tcp;
	bool self_signed;
	bool allow_anonymous;
	struct tls_self *self; /* once made, the same at every reload */
	struct service service;
	size_t change_count;
	struct change *changes; /* [argc] */
};

static void print_help(void)
{
	(void)printf("opd serves tensor ops over Unix sockets and TCP.\n\nUsage: opd [flags]\n");
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

/* To stderr: there is no log yet. What is wrong may come from a file, so it is escaped. */
static int fail(int code, const char *prefix, const char *text)
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
		options->changes[options->change_count++] = (struct change){flag, value};
		return -1;
	}
}

/* -1: go on; else the exit code. */
static int parse_flags(int argc, char **argv, struct options *options)
{
	struct option long_options[FLAG_COUNT + 1];
	fill_long_options(long_options);
	for (int found; (found = getopt_long(argc, argv, "", long_options, NULL)) != -1;) {
		if (found == '?')
			return fail(EXIT_USAGE, "", "see opd --help");
		int code = take_flag(options, &flags[found - 256], optarg);
		if (code >= 0)
			return code;
	}
	return optind < argc ? fail(EXIT_USAGE, "no arguments are expected, see opd --help: ", argv[optind]) : -1;
}

/* ---- Configuration ----------------------------------------------------------------------------------------------------- */

static opd_status set_inline(struct config *config, const char *value, opd_error *error)
{
	char text[64];
	bool bare = value[0] != '\0' && strspn(value, "0123456789") == strlen(value);
	(void)snprintf(text, sizeof text, "%.50s%s", value, bare ? "ns" : "");
	return config_set(config, "inline", text, error);
}

static opd_status apply(struct config *config, const struct change *change, opd_error *error)
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

static opd_status build_config(const struct options *options, struct config **config_out, opd_error *error)
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

static void print_text(const char *text)
{
	char escaped[1024];
	(void)fputs(text_escape(text, strlen(text), escaped, sizeof escaped), stdout);
}

static void print_quotas(const char *prefix, const uint64_t limits[QUOTA_COUNT])
{
	for (uint32_t i = 0; i < QUOTA_COUNT; i++)
		if (limits[i] != 0)
			(void)printf(", %s%s %" PRIu64 "%s", prefix, quota_name(i), limits[i], i == QUOTA_DEVICE_TIME ? " ns" : "");
}

static void print_lists(const struct config *config)
{
	for (size_t i = 0; i < config->listener_count; i++) {
		(void)printf("listen: ");
		print_text(config->listeners[i].address);
		(void)printf("\n");
	}
	for (size_t i = 0; i < config->priority_count; i++) {
		(void)printf("priority: %s = [", config->priorities[i].op);
		for (size_t k = 0; k < config->priorities[i].count; k++)
			(void)printf("%s%s", k > 0 ? ", " : "", config->priorities[i].providers[k]);
		(void)printf("]\n");
	}
	for (size_t i = 0; i < config->tenant_count; i++) {
		const struct tenant_policy *policy = &config->tenants[i].policy;
		(void)printf("tenant: ");
		print_text(config->tenants[i].name);
		(void)printf(" = weight %" PRIu32 ", class %s (at most %s)", policy->weight, sched_class_name(policy->class), sched_class_name(policy->class_max));
		print_quotas("", policy->quota);
		print_quotas("session_", policy->session_quota);
		(void)printf("\n");
	}
	for (size_t i = 0; i < config->provider_count; i++) {
		const struct provider_policy *policy = &config->providers[i].policy;
		(void)printf("provider: %s = checked: %s", config->providers[i].name, policy->checked ? "true" : "false");
		if (policy->budget_us != 0)
			(void)printf(", budget %" PRIu64 " ms", policy->budget_us / 1000);
		if (policy->compare[0] != '\0')
			(void)printf(", compared with %s every %" PRIu32 " runs", policy->compare, policy->compare_every);
		(void)printf("\n");
	}
	for (size_t i = 0; i < config->module_count; i++) {
		(void)printf("module: %s%s", config->modules[i].name != NULL ? config->modules[i].name : "", config->modules[i].name != NULL ? " = " : "");
		print_text(config->modules[i].path);
		(void)printf("%s\n", config->modules[i].isolated ? " (isolated)" : "");
	}
}

static void print_summary(const struct config *config)
{
	const struct config_limits *limits = &config->limits;
	print_lists(config);
	(void)printf("limits: memory %" PRIu64 ", session %" PRIu64 ", request %" PRIu64 ", envelope %" PRIu64 ", cache %" PRIu64
	             ", derived %" PRIu64 " bytes\n",
	             limits->memory_bytes, limits->session_bytes, limits->request_bytes, limits->envelope_bytes, limits->cache_bytes, limits->derived_bytes);
	(void)printf("limits: %" PRIu32 " sessions, of each %" PRIu32 " requests in flight and %" PRIu32 " kept tensors\n", limits->sessions,
	             limits->in_flight, limits->kept);
	if (config->tls_context != NULL) {
		(void)printf("tls: ");
		print_text(config->tls_context->subject);
		(void)printf(", until %s, %s\n", config->tls_context->not_after, config->tls_context->fingerprint);
	}
	(void)printf("limits: of the memory in use, %" PRIu32 " %% refuse uploads, %" PRIu32 " %% new sessions, %" PRIu32 " %% drop caches\n", limits->refuse_uploads,
	             limits->refuse_sessions, limits->drop_caches);
	(void)printf("limits: handshake %" PRIu64 " ms, stall %" PRIu64 " ms, drain %" PRIu64 " ms\n", limits->handshake_us / 1000,
	             limits->stall_us / 1000, limits->drain_us / 1000);
	(void)printf("threads: %" PRIu32 "%s, inline: %" PRIu64 " ns, checked: %s\n", config->threads,
	             config->threads == 0 ? " (one a core)" : "", config->inline_ns, config->checked ? "true" : "false");
	(void)printf("quarantine: %" PRIu32 " failures, %" PRIu32 " of a provider, in %" PRIu64 " ms, for %" PRIu64 " ms\n", config->quarantine.failures,
	             config->quarantine.provider_failures, config->quarantine.window_us / 1000, config->quarantine.cooldown_us / 1000);
	(void)printf("polling: window %" PRIu64 " us, budget %" PRIu64 " us of a second\n", config->polling_window_us, config->polling_budget_us);
	(void)printf("metrics: ");
	print_text(config->metrics.address != NULL ? config->metrics.address : "off");
	(void)printf("\nlog: %s, %s, ", log_level_name(config->level), config->format == LOG_JSON ? "json" : "text");
	print_text(config->log_path != NULL ? config->log_path : "stderr");
	(void)printf("\n");
}

/* Everything that serving would do but listening: the providers are loaded and the priorities' names looked up. */
static int check_config(struct config *config)
{
	struct log log;
	struct server *server = NULL;
	opd_error error;
	opd_status status = log_init(&log, LOG_ERROR, LOG_TEXT, NULL, &error);
	print_summary(config);
	(void)!config_set_metrics(config, "off", &error);
	config_clear_listeners(config);
	config->level = LOG_ERROR;
	if (status == OPD_OK)
		status = server_create(config, &log, &server, &error);
	if (status != OPD_OK) {
		config_destroy(config);
		(void)fflush(stdout);
		return fail(EXIT_USAGE, "", error.text);
	}
	server_destroy(server);
	log_fini(&log);
	(void)printf("opd: the configuration is good\n");
	return fflush(stdout) == 0 ? EXIT_OK : fail(EXIT_FAILED, "stdout: ", strerror(errno));
}

/* None at all, or as large as the system lets them be. The pages of tensors are never in one (tensors.c), but requests and small tensors would be. */
static void limit_core(bool allowed)
{
	struct rlimit limit;
	if (getrlimit(RLIMIT_CORE, &limit) != 0)
		return;
	limit.rlim_cur = allowed ? limit.rlim_max : 0;
	(void)setrlimit(RLIMIT_CORE, &limit);
}

/* ---- Signals ----------------------------------------------------------------------------------------------------------- */

/* What the signal thread and main share. */
struct daemon {
	const struct options *options;
	struct log *log;
	pthread_mutex_t mutex;
	struct server *server; /* NULL: not yet there, or gone */
	bool gone;
	unsigned ends;         /* SIGTERM and SIGINT so far */
	_Atomic bool beating;  /* a watchdog's beat is on its way to the loop */
	bool over;             /* the thread ends at its next signal */
	pthread_t thread;
};

static void fill_signals(sigset_t *set)
{
	(void)sigemptyset(set);
	(void)sigaddset(set, SIGTERM);
	(void)sigaddset(set, SIGINT);
	(void)sigaddset(set, SIGHUP);
	(void)sigaddset(set, SIGUSR1);
}

/* Under the mutex. The third one is for a daemon that hangs in a kernel and can't be drained at all. */
static void on_end(struct daemon *daemon, int number)
{
	if (daemon->gone)
		return;
	daemon->ends++;
	LOG(daemon->log, LOG_INFO, "ending", LOG_STR("signal", number == SIGTERM ? "SIGTERM" : "SIGINT"), LOG_UINT("count", daemon->ends));
	if (daemon->ends > 2 || (daemon->ends == 2 && daemon->server == NULL)) {
		LOG(daemon->log, LOG_ERROR, "ended by force");
		_exit(EXIT_FAILED);
	}
	service_notify(&daemon->options->service, "STOPPING=1\nSTATUS=draining");
	if (daemon->server != NULL)
		server_drain(daemon->server, 0);
}

/* A configuration on its way to the loop's thread, which alone may swap it. */
struct reload {
	struct daemon *daemon;
	struct server *server;
	struct config *config;
};

static void log_reload_failure(const struct daemon *daemon, const opd_error *error)
{
	LOG(daemon->log, LOG_ERROR, "configuration not reloaded, the old one stays", LOG_STR("path", daemon->options->config_path),
	    LOG_STR("error", error->text));
}

static void reload_on_loop(void *argument)
{
	struct reload *reload = argument;
	struct daemon *daemon = reload->daemon;
	opd_error error;
	const bool core = reload->config->core;
	if (server_reload(reload->server, reload->config, &error) == OPD_OK) {
		limit_core(core);
	} else {
		config_destroy(reload->config);
		log_reload_failure(daemon, &error);
	}
	service_notify(&daemon->options->service, "READY=1");
	free(reload);
}

static opd_status post_reload(struct daemon *daemon, struct config *config, opd_error *error)
{
	struct reload *reload = malloc(sizeof *reload);
	if (reload == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	*reload = (struct reload){daemon, daemon->server, config};
	opd_status status = server_post(daemon->server, reload_on_loop, reload, error);
	if (status != OPD_OK)
		free(reload);
	return status;
}

static void notify_reloading(const struct service *service)
{
	struct timespec now;
	char message[64];
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	(void)snprintf(message, sizeof message, "RELOADING=1\nMONOTONIC_USEC=%" PRIu64, (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000);
	service_notify(service, message);
}

/* Under the mutex. The file is read here, so that the loop doesn't wait for a disk. */
static void on_reload(struct daemon *daemon)
{
	struct config *config;
	opd_error error;
	if (daemon->server == NULL)
		return;
	notify_reloading(&daemon->options->service);
	opd_status status = build_config(daemon->options, &config, &error);
	if (status == OPD_OK) {
		status = post_reload(daemon, config, &error);
		if (status != OPD_OK)
			config_destroy(config);
	}
	if (status != OPD_OK) {
		log_reload_failure(daemon, &error);
		service_notify(&daemon->options->service, "READY=1");
	}
}

static void on_reopen(struct daemon *daemon)
{
	opd_error error;
	if (log_reopen(daemon->log, &error) == OPD_OK)
		LOG(daemon->log, LOG_INFO, "log opened again");
	else
		LOG(daemon->log, LOG_ERROR, "log not opened again, the old file stays", LOG_STR("error", error.text));
}

/* On the loop: it turns. */
static void beat_on_loop(void *argument)
{
	struct daemon *daemon = argument;
	service_notify(&daemon->options->service, "WATCHDOG=1");
	atomic_store(&daemon->beating, false);
}

/* Under the mutex. A loop that hangs has the last beat still before it, and gets no second one. */
static void beat(struct daemon *daemon)
{
	opd_error error;
	if (daemon->server == NULL || atomic_exchange(&daemon->beating, true))
		return;
	if (server_post(daemon->server, beat_on_loop, daemon, &error) != OPD_OK)
		atomic_store(&daemon->beating, false);
}

/* The next signal; 0: half of the watchdog's time went by without one. */
static int next_signal(const struct service *service, const sigset_t *set)
{
	const uint64_t wait_us = service->watchdog_us / 2;
	const struct timespec wait = {(time_t)(wait_us / 1000000), (long)(wait_us % 1000000) * 1000};
	const int number = wait_us == 0 ? sigwaitinfo(set, NULL) : sigtimedwait(set, NULL, &wait);
	return number < 0 ? 0 : number;
}

static void *signal_main(void *argument)
{
	struct daemon *daemon = argument;
	sigset_t set;
	fill_signals(&set);
	for (;;) {
		const int number = next_signal(&daemon->options->service, &set);
		(void)pthread_mutex_lock(&daemon->mutex);
		bool over = daemon->over;
		if (!over && number == 0)
			beat(daemon);
		else if (!over && number == SIGHUP)
			on_reload(daemon);
		else if (!over && number == SIGUSR1)
			on_reopen(daemon);
		else if (!over)
			on_end(daemon, number);
		(void)pthread_mutex_unlock(&daemon->mutex);
		if (over)
			return NULL;
	}
}

/* Before any other thread is started: they all inherit the mask, and only the signal thread hears of a signal. */
static void block_signals(void)
{
	sigset_t set;
	fill_signals(&set);
	(void)pthread_sigmask(SIG_BLOCK, &set, NULL);
	(void)signal(SIGPIPE, SIG_IGN);
}

static bool start_signals(struct daemon *daemon)
{
	if (pthread_create(&daemon->thread, NULL, signal_main, daemon) != 0)
		return false;
	(void)pthread_setname_np(daemon->thread, "opd-signals");
	return true;
}

static void stop_signals(struct daemon *daemon)
{
	(void)pthread_mutex_lock(&daemon->mutex);
	daemon->over = true;
	(void)pthread_mutex_unlock(&daemon->mutex);
	(void)pthread_kill(daemon->thread, SIGTERM);
	(void)pthread_join(daemon->thread, NULL);
}

/* A signal that came while the server was being made counts from now on. */
static void set_server(struct daemon *daemon, struct server *server)
{
	(void)pthread_mutex_lock(&daemon->mutex);
	daemon->server = server;
	daemon->gone = server == NULL;
	if (server != NULL && daemon->ends > 0)
		server_drain(server, 0);
	(void)pthread_mutex_unlock(&daemon->mutex);
}

/* ---- Serving ----------------------------------------------------------------------------------------------------------- */

/* Descriptors 0 to 2 exist: a socket must not become the stderr that something prints to. */
static void open_standard_files(void)
{
	int fd;
	do
		fd = open("/dev/null", O_RDWR);
	while (fd >= 0 && fd <= STDERR_FILENO);
	if (fd >= 0)
		(void)close(fd);
}

static void raise_file_limit(void)
{
	struct rlimit limit;
	if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
		return;
	limit.rlim_cur = limit.rlim_max;
	(void)setrlimit(RLIMIT_NOFILE, &limit); /* else the old one stays, and the sessions that don't fit are refused */
}

/* The default socket's folder is made where it is missing. In /tmp anybody could have made it first: then it must be ours alone. */
static opd_status prepare_folder(const struct config_listener *listener, opd_error *error)
{
	char path[512];
	struct stat info;
	config_default_socket(path, sizeof path);
	if (listener->kind != LISTEN_UNIX || strcmp(listener->path, path) != 0)
		return OPD_OK;
	const char *folder = dirname(path);
	if (mkdir(folder, 0700) != 0 && errno != EEXIST)
		return opd_fail(error, OPD_UNAVAILABLE, "%s: can't make the folder %s: %s", listener->address, folder, strerror(errno));
	if (strncmp(folder, "/tmp/", 5) != 0)
		return OPD_OK;
	if (lstat(folder, &info) != 0 || !S_ISDIR(info.st_mode) || info.st_uid != geteuid() || (info.st_mode & 077) != 0)
		return opd_fail(error, OPD_UNAVAILABLE, "%s: %s is not a folder that only user %u may enter", listener->address, folder,
		                (unsigned)geteuid());
	return OPD_OK;
}

static opd_status prepare_folders(const struct config *config, opd_error *error)
{
	opd_status status = OPD_OK;
	for (size_t i = 0; status == OPD_OK && i < config->listener_count; i++)
		status = prepare_folder(&config->listeners[i], error);
	return status;
}

static int exit_code(opd_status status)
{
	switch (status) {
	case OPD_UNAVAILABLE:
		return EXIT_LISTEN;
	case OPD_INVALID_ARGUMENT:
	case OPD_NOT_FOUND:
	case OPD_ALREADY_EXISTS:
		return EXIT_USAGE;
	default:
		return EXIT_FAILED;
	}
}

/* Takes config. */
static int serve(struct daemon *daemon, struct config *config)
{
	struct server *server = NULL;
	opd_error error;
	opd_status status = prepare_folders(config, &error);
	if (status == OPD_OK)
		status = server_create(config, daemon->log, &server, &error);
	if (status != OPD_OK) {
		LOG(daemon->log, LOG_ERROR, "can't start", LOG_STR("status", opd_status_name(status)), LOG_STR("error", error.text));
		config_destroy(config);
		return exit_code(status);
	}
	set_server(daemon, server);
	service_notify(&daemon->options->service, "READY=1\nSTATUS=serving");
	status = server_run(server);
	service_notify(&daemon->options->service, "STOPPING=1");
	set_server(daemon, NULL);
	if (status != OPD_OK) {
		/* Work was cut off: a kernel may still be running, for hours, and taking the daemon apart would wait for it. The drain has a limit. */
		LOG(daemon->log, LOG_ERROR, "ended before all work was done", LOG_STR("status", opd_status_name(status)));
		_exit(EXIT_FAILED);
	}
	server_destroy(server);
	LOG(daemon->log, LOG_INFO, "ended");
	return EXIT_OK;
}

/* Takes config. */
static int run_daemon(const struct options *options, struct config *config)
{
	struct log log;
	opd_error error;
	block_signals();
	raise_file_limit();
	limit_core(config->core);
	if (log_init(&log, config->level, config->format, config->log_path, &error) != OPD_OK) {
		config_destroy(config);
		return fail(EXIT_USAGE, "", error.text);
	}
	struct daemon daemon = {.options = options, .log = &log, .mutex = PTHREAD_MUTEX_INITIALIZER};
	if (!start_signals(&daemon)) {
		config_destroy(config);
		log_fini(&log);
		return fail(EXIT_FAILED, "", "can't start a thread");
	}
	int code = serve(&daemon, config);
	stop_signals(&daemon);
	log_fini(&log);
	return code;
}

static int run(int argc, char **argv, struct options *options)
{
	struct config *config;
	opd_error error;
	int code = parse_flags(argc, argv, options);
	if (code >= 0)
		return code;
	if (options->self_signed && (options->self = tls_self_create(&error)) == NULL)
		return fail(EXIT_FAILED, "", error.text);
	if (service_init(&options->service, &error) != OPD_OK || build_config(options, &config, &error) != OPD_OK)
		return fail(EXIT_USAGE, "", error.text);
	if (options->self_signed && config->tls_context != NULL && config->tls.certificate == NULL) {
		(void)printf("opd: a certificate of its own, until it ends; clients pin it: --fingerprint %s\n", config->tls_context->fingerprint);
		(void)fflush(stdout);
	}
	return options->check ? check_config(config) : run_daemon(options, config);
}

int main(int argc, char **argv)
{
	struct options options = {0};
	if (argc == 4 && strcmp(argv[1], WORKER_FLAG) == 0) /* for isolated modules; nobody else starts it so */
		return worker_main(argv[2], argv[3]);
	open_standard_files();
	options.changes = calloc((size_t)argc, sizeof *options.changes);
	if (options.changes == NULL)
		return fail(EXIT_FAILED, "", "out of memory");
	int code = run(argc, argv, &options);
	tls_self_destroy(options.self);
	free(options.changes);
	return code;
}
