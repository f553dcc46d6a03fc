/* The daemons that scripts talk to: one with what is linked in, and one with test modules (a device of threads, a provider that keeps derived copies) that keeps no freed memory, so that whoever reads what
 * was freed is seen by the sanitizer. Their loops have no threads of their own: they turn where a peer lets them. */
#include <signal.h>
#include <stdlib.h>

#include "server/daemon.h"
#include "session.h"

static struct session_daemon plain, modules;
static struct log server_log;

static void stop(struct session_daemon *daemon)
{
	server_drain(daemon->server, 1000000);
	(void)server_run(daemon->server);
	if (server_memory_bytes(daemon->server) > daemon->idle_bytes)
		fuzz_fail("%llu bytes are still charged at the end", (unsigned long long)server_memory_bytes(daemon->server));
	server_destroy(daemon->server);
}

/* At exit, so that a leak checker sees what a session left. */
static void stop_all(void)
{
	stop(&plain);
	stop(&modules);
	log_fini(&server_log);
	script_free();
}

static void must(opd_status status, const opd_error *error)
{
	if (status != OPD_OK)
		fuzz_fail("%s", error->text);
}

static void set(struct config *config, const char *key, const char *value)
{
	opd_error error;
	must(config_set(config, key, value, &error), &error);
}

static void add_modules(struct config *config)
{
	opd_error error;
	must(config_add_module(config, OPD_FUZZ_DEVICE, false, &error), &error);
	must(config_add_module(config, OPD_FUZZ_DERIVED, false, &error), &error);
	must(config_add_priority(config, "*=derived,cpu,testdev", &error), &error);
}

/* The limits are low: what they refuse costs no time, and what they let through little. */
static struct config *configure(const char *cache)
{
	struct config *config = config_create();
	opd_error error;
	if (config == NULL)
		fuzz_fail("no configuration");
	set(config, "limits.memory", "16 MiB");
	set(config, "limits.session", "1 MiB");
	set(config, "limits.request", "1 MiB");
	set(config, "limits.cache", cache);
	set(config, "limits.in_flight", "64");
	set(config, "limits.kept", "64");
	set(config, "threads", "2");
	set(config, "loops", "1");
	set(config, "checked", "true");
	must(config_add_listener(config, "tcp://127.0.0.1:0", &error), &error);
	return config;
}

static void start(struct session_daemon *daemon, struct config *config)
{
	opd_error error;
	must(config_check(config, false, &error), &error);
	config_clear_listeners(config);
	must(server_create(config, &server_log, &daemon->server, &error), &error);
	daemon->idle_bytes = server_memory_bytes(daemon->server);
}

static void learn(void)
{
	struct peer peer;
	const struct msg_request request = {.kind = MSG_REQUEST_LIST_OPS};
	peer_open(&peer, &(struct peer_kind){.chunks = false});
	peer_wait(&peer, peer_request(&peer, &request, 0, 0));
	for (uint32_t i = 0; script_op(i) != NULL; i++) {
		const struct msg_request describe = {.kind = MSG_REQUEST_DESCRIBE, .op = msg_text(script_op(i)->name)};
		peer_wait(&peer, peer_request(&peer, &describe, 0, 0));
	}
	peer_finish(&peer);
}

void session_start(void)
{
	opd_error error;
	(void)signal(SIGPIPE, SIG_IGN);
	/* One device at once and one later; of little memory, so that copies give way. */
	(void)setenv("OPD_TEST_DEVICE_INSTANT", "1", 1);
	(void)setenv("OPD_TEST_DEVICE_DELAY_US", "20", 1);
	(void)setenv("OPD_TEST_DEVICE_MEMORY", "131072", 1);
	const char *path = getenv("OPD_FUZZ_LOG");
	must(log_init(&server_log, path == NULL ? LOG_ERROR : LOG_INFO, LOG_TEXT, path == NULL ? "/dev/null" : path, &error), &error);
	start(&plain, configure("4 MiB"));
	struct config *config = configure("0");
	add_modules(config);
	start(&modules, config);
	(void)atexit(stop_all);
	learn();
}

struct session_daemon *session_daemon(bool with_modules)
{
	return with_modules ? &modules : &plain;
}
