/* opd: what is around server.h, from its start to its exit code. README.md, "Operations", documents all of them. */
#include <errno.h>
#include <libgen.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/options.h"
#include "server/process.h"
#include "server/signals.h"
#include "server/worker.h"

/* Everything that serving would do but listening: the providers are loaded and the priorities' names looked up. */
static int check_config(struct config *config)
{
	struct log log;
	struct server *server = NULL;
	opd_error error;
	opd_status status = log_init(&log, LOG_ERROR, LOG_TEXT, NULL, &error);
	config_print(config);
	(void)!config_set_metrics(config, "off", &error);
	config_clear_listeners(config);
	config->level = LOG_ERROR;
	if (status == OPD_OK)
		status = server_create(config, &log, &server, &error);
	if (status != OPD_OK) {
		config_destroy(config);
		(void)fflush(stdout);
		return options_fail(EXIT_USAGE, "", error.text);
	}
	server_destroy(server);
	log_fini(&log);
	(void)printf("opd: the configuration is good\n");
	return fflush(stdout) == 0 ? EXIT_OK : options_fail(EXIT_FAILED, "stdout: ", strerror(errno));
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
static int serve(struct signals *signals, struct config *config)
{
	struct server *server = NULL;
	opd_error error;
	opd_status status = prepare_folders(config, &error);
	if (status == OPD_OK)
		status = server_create(config, signals->log, &server, &error);
	if (status != OPD_OK) {
		LOG(signals->log, LOG_ERROR, "can't start", LOG_STR("status", opd_status_name(status)), LOG_STR("error", error.text));
		config_destroy(config);
		return exit_code(status);
	}
	signals_serve(signals, server);
	service_notify(&signals->options->service, "READY=1\nSTATUS=serving");
	status = server_run(server);
	service_notify(&signals->options->service, "STOPPING=1");
	signals_serve(signals, NULL);
	if (status != OPD_OK) {
		/* Work was cut off: a kernel may still be running, for hours, and taking the daemon apart would wait for it. The drain has a limit. */
		LOG(signals->log, LOG_ERROR, "ended before all work was done", LOG_STR("status", opd_status_name(status)));
		_exit(EXIT_FAILED);
	}
	server_destroy(server);
	LOG(signals->log, LOG_INFO, "ended");
	return EXIT_OK;
}

/* Takes config. */
static int run_daemon(const struct options *options, struct config *config)
{
	struct log log;
	opd_error error;
	signals_block();
	process_raise_file_limit();
	process_limit_core(config->core);
	if (log_init(&log, config->level, config->format, config->log_path, &error) != OPD_OK) {
		config_destroy(config);
		return options_fail(EXIT_USAGE, "", error.text);
	}
	struct signals signals;
	if (!signals_start(&signals, options, &log)) {
		config_destroy(config);
		log_fini(&log);
		return options_fail(EXIT_FAILED, "", "can't start a thread");
	}
	int code = serve(&signals, config);
	signals_stop(&signals);
	log_fini(&log);
	return code;
}

static int run(int argc, char **argv, struct options *options)
{
	struct config *config;
	opd_error error;
	int code = options_parse(argc, argv, options);
	if (code >= 0)
		return code;
	if (options->self_signed && (options->self = tls_self_create(&error)) == NULL)
		return options_fail(EXIT_FAILED, "", error.text);
	if (service_init(&options->service, &error) != OPD_OK || options_config(options, &config, &error) != OPD_OK)
		return options_fail(EXIT_USAGE, "", error.text);
	if (options->self_signed && config->tls_context != NULL && config->tls.certificate == NULL) {
		(void)printf("opd: a certificate of its own, until it ends; clients pin it: --fingerprint %s\n", config->tls_context->fingerprint);
		(void)fflush(stdout);
	}
	return options->check ? check_config(config) : run_daemon(options, config);
}

int main(int argc, char **argv)
{
	struct options options = {0};
	if ((argc == 4 || argc == 5) && strcmp(argv[1], WORKER_FLAG) == 0) /* for isolated modules; nobody else starts it so */
		return worker_main(argv[2], argv[3], argc == 5 && strcmp(argv[4], WORKER_CONFINED) == 0);
	process_open_standard_files();
	int code = run(argc, argv, &options);
	options_free(&options);
	return code;
}
