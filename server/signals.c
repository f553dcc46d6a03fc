/* The thread that hears of signals, and what each of them does. */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "server/clock.h"
#include "server/process.h"
#include "server/signals.h"

static void fill_signals(sigset_t *set)
{
	(void)sigemptyset(set);
	(void)sigaddset(set, SIGTERM);
	(void)sigaddset(set, SIGINT);
	(void)sigaddset(set, SIGHUP);
	(void)sigaddset(set, SIGUSR1);
}

/* Under the mutex. The third one is for a daemon that hangs in a kernel and can't be drained at all. */
static void on_end(struct signals *signals, int number)
{
	if (signals->gone)
		return;
	signals->ends++;
	LOG(signals->log, LOG_INFO, "ending", LOG_STR("signal", number == SIGTERM ? "SIGTERM" : "SIGINT"), LOG_UINT("count", signals->ends));
	if (signals->ends > 2 || (signals->ends == 2 && signals->server == NULL)) {
		LOG(signals->log, LOG_ERROR, "ended by force");
		_exit(EXIT_FAILED);
	}
	service_notify(&signals->options->service, "STOPPING=1\nSTATUS=draining");
	if (signals->server != NULL)
		server_drain(signals->server, 0);
}

/* A configuration on its way to the loop's thread, which alone may swap it. */
struct reload {
	struct signals *signals;
	struct server *server;
	struct config *config;
};

static void log_reload_failure(const struct signals *signals, const opd_error *error)
{
	LOG(signals->log, LOG_ERROR, "configuration not reloaded, the old one stays", LOG_STR("path", signals->options->config_path),
	    LOG_STR("error", error->text));
}

static void reload_on_loop(void *argument)
{
	struct reload *reload = argument;
	struct signals *signals = reload->signals;
	opd_error error;
	const bool core = reload->config->core;
	if (server_reload(reload->server, reload->config, &error) == OPD_OK) {
		process_limit_core(core);
	} else {
		config_destroy(reload->config);
		log_reload_failure(signals, &error);
	}
	service_notify(&signals->options->service, "READY=1");
	free(reload);
}

static opd_status post_reload(struct signals *signals, struct config *config, opd_error *error)
{
	struct reload *reload = malloc(sizeof *reload);
	if (reload == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
	*reload = (struct reload){signals, signals->server, config};
	opd_status status = server_post(signals->server, reload_on_loop, reload, error);
	if (status != OPD_OK)
		free(reload);
	return status;
}

static void notify_reloading(const struct service *service)
{
	char message[64];
	(void)snprintf(message, sizeof message, "RELOADING=1\nMONOTONIC_USEC=%" PRIu64, clock_now_ns() / 1000);
	service_notify(service, message);
}

/* Under the mutex. The file is read here, so that the loop doesn't wait for a disk. */
static void on_reload(struct signals *signals)
{
	struct config *config;
	opd_error error;
	if (signals->server == NULL)
		return;
	notify_reloading(&signals->options->service);
	opd_status status = options_config(signals->options, &config, &error);
	if (status == OPD_OK) {
		status = post_reload(signals, config, &error);
		if (status != OPD_OK)
			config_destroy(config);
	}
	if (status != OPD_OK) {
		log_reload_failure(signals, &error);
		service_notify(&signals->options->service, "READY=1");
	}
}

static void on_reopen(struct signals *signals)
{
	opd_error error;
	if (log_reopen(signals->log, &error) == OPD_OK)
		LOG(signals->log, LOG_INFO, "log opened again");
	else
		LOG(signals->log, LOG_ERROR, "log not opened again, the old file stays", LOG_STR("error", error.text));
}

/* On the last loop: all of them turn. */
static void on_round(void *argument, bool all)
{
	struct signals *signals = argument;
	if (all)
		service_notify(&signals->options->service, "WATCHDOG=1");
	atomic_store(&signals->beating, false);
}

/* Under the mutex. A loop that hangs has the last beat still before it, and there is no second one. */
static void beat(struct signals *signals)
{
	opd_error error;
	if (signals->server == NULL || atomic_exchange(&signals->beating, true))
		return;
	if (server_round(signals->server, on_round, signals, &error) != OPD_OK)
		atomic_store(&signals->beating, false);
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
	struct signals *signals = argument;
	sigset_t set;
	fill_signals(&set);
	for (;;) {
		const int number = next_signal(&signals->options->service, &set);
		(void)pthread_mutex_lock(&signals->mutex);
		bool over = signals->over;
		if (!over && number == 0)
			beat(signals);
		else if (!over && number == SIGHUP)
			on_reload(signals);
		else if (!over && number == SIGUSR1)
			on_reopen(signals);
		else if (!over)
			on_end(signals, number);
		(void)pthread_mutex_unlock(&signals->mutex);
		if (over)
			return NULL;
	}
}

void signals_block(void)
{
	sigset_t set;
	fill_signals(&set);
	(void)pthread_sigmask(SIG_BLOCK, &set, NULL);
	(void)signal(SIGPIPE, SIG_IGN);
}

bool signals_start(struct signals *signals, const struct options *options, struct log *log)
{
	*signals = (struct signals){.options = options, .log = log, .mutex = PTHREAD_MUTEX_INITIALIZER};
	if (pthread_create(&signals->thread, NULL, signal_main, signals) != 0)
		return false;
	(void)pthread_setname_np(signals->thread, "opd-signals");
	return true;
}

void signals_stop(struct signals *signals)
{
	(void)pthread_mutex_lock(&signals->mutex);
	signals->over = true;
	(void)pthread_mutex_unlock(&signals->mutex);
	(void)pthread_kill(signals->thread, SIGTERM);
	(void)pthread_join(signals->thread, NULL);
}

void signals_serve(struct signals *signals, struct server *server)
{
	(void)pthread_mutex_lock(&signals->mutex);
	signals->server = server;
	signals->gone = server == NULL;
	if (server != NULL && signals->ends > 0)
		server_drain(server, 0);
	(void)pthread_mutex_unlock(&signals->mutex);
}
