#include "tests/lib/house.h"

#include <check.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "client/scheme.h"
#include "server/daemon.h"
#include "server/listener.h"
#include "server/tls_context.h"
#include "tests/lib/lab.h"

/* ---- Starting and stopping ---- */

static void *serve(void *argument)
{
	struct house *house = argument;
	sigset_t all; /* as main does: a client that is gone is no reason to end */
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, NULL);
	(void)server_run(house->server);
	return NULL;
}

static void configure(struct config *config, const char *const *settings)
{
	opd_error error;
	for (; settings != NULL && settings[0] != NULL; settings += 2) {
		opd_status status = strcmp(settings[0], "module") == 0 ? config_add_module(config, settings[1], false, &error)
		                                                       : config_set(config, settings[0], settings[1], &error);
		ck_assert_msg(status == OPD_OK, "%s: %s", settings[0], error.text);
	}
}

/* The same tests over another way to the daemon: "?rings", "tls". */
static bool by_tls(void)
{
	const char *way = getenv("OPD_HOUSE_WAY");
	return way != NULL && strcmp(way, "tls") == 0;
}

/* Where clients find it: the port that the system gave, and the certificate that it made. */
static void name_way(struct house *house)
{
	const char *way = getenv("OPD_HOUSE_WAY");
	(void)snprintf(house->way, sizeof house->way, "%s%s", house->address, way == NULL || by_tls() ? "" : way);
	struct msg_text addresses[2];
	const uint32_t count = listener_list(house->server, addresses, 2);
	for (uint32_t i = 0; by_tls() && i < count; i++)
		if (strncmp(addresses[i].data, "tls:", 4) == 0)
			(void)snprintf(house->way, sizeof house->way, "%s?fingerprint=%s", addresses[i].data, house->server->config->tls_context->fingerprint);
}

void house_start(struct house *house, const char *const *settings)
{
	opd_error error;
	*house = (struct house){0};
	lab_reset();
	(void)snprintf(house->folder, sizeof house->folder, "/tmp/opd-house-XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(house->folder));
	(void)snprintf(house->log_path, sizeof house->log_path, "%s/log", house->folder);
	(void)snprintf(house->address, sizeof house->address, "unix:%s/sock", house->folder);
	ck_assert_msg(log_init(&house->log, LOG_WARN, LOG_TEXT, house->log_path, &error) == OPD_OK, "%s", error.text);
	struct config *config = config_create();
	ck_assert_ptr_nonnull(config);
	/* Kernels fail here on purpose: test_containment.py has what becomes of those that do it often. */
	config->quarantine = (struct config_quarantine){.window_us = 1, .cooldown_us = 1};
	config->threads = 2;
	config->loops = getenv("OPD_HOUSE_LOOPS") == NULL ? 1 : (uint32_t)atoi(getenv("OPD_HOUSE_LOOPS"));
	configure(config, settings);
	ck_assert_msg(config_add_listener(config, house->address, &error) == OPD_OK, "%s", error.text);
	if (by_tls())
		ck_assert_msg(config_add_listener(config, "tls://127.0.0.1:0", &error) == OPD_OK, "%s", error.text);
	ck_assert_msg(config_check(config, false, &error) == OPD_OK, "%s", error.text);
	struct tls_self *self = by_tls() ? tls_self_create(&error) : NULL;
	ck_assert_msg(config_load_tls(config, self, &error) == OPD_OK, "%s", error.text);
	tls_self_destroy(self);
	ck_assert_msg(server_create(config, &house->log, &house->server, &error) == OPD_OK, "%s", error.text);
	name_way(house);
	size_t failed;
	ck_assert_int_eq(registry_set_configuration(house->server->registry, NULL, 0, &failed, NULL), OPD_OK); /* the default list for every op */
	ck_assert_msg(lab_open(house->server->registry, &error) == OPD_OK, "%s", error.text);
	ck_assert_int_eq(pthread_create(&house->thread, NULL, serve, house), 0);
}

void house_await_bytes(const struct house *house, uint64_t bytes)
{
	for (int i = 0; i < 5000 && server_memory_bytes(house->server) != bytes; i++)
		(void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	ck_assert_uint_eq(server_memory_bytes(house->server), bytes);
}

void house_stop(struct house *house)
{
	lab_gate(true);
	server_drain(house->server, 10000000);
	ck_assert_int_eq(pthread_join(house->thread, NULL), 0);
	ck_assert_uint_eq(server_memory_bytes(house->server), 0);
	server_destroy(house->server);
	log_fini(&house->log);
	char command[160];
	(void)snprintf(command, sizeof command, "rm -rf '%s'", house->folder);
	ck_assert_int_eq(system(command), 0);
}

/* ---- Clients ---- */

opd_client *house_client(const struct house *house)
{
	opd_client *client = NULL;
	opd_error error;
	ck_assert_msg(opd_connect(house->way, NULL, &client, &error) == OPD_OK, "%s", error.text);
	return client;
}

static struct house *direct_house; /* whom "house:" leads to */

struct door {
	struct server *server;
	struct session *session;
};

static opd_status door_connect(const char *rest, int *fd_out, void **state_out, opd_error *error)
{
	int pair[2];
	(void)rest;
	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
	struct door *door = calloc(1, sizeof *door);
	ck_assert_ptr_nonnull(door);
	door->server = direct_house->server;
	opd_status status = server_adopt(door->server, pair[1], &door->session, error);
	*fd_out = pair[0];
	*state_out = door;
	return status;
}

static void door_disconnect(void *state)
{
	struct door *door = state;
	server_forget(door->server, door->session);
	free(door);
}

static opd_status door_begin(void *state, opd_error *error)
{
	struct door *door = state;
	return server_direct_begin(door->server, door->session, error);
}

static void door_end(void *state)
{
	struct door *door = state;
	server_direct_end(door->server, door->session);
}

static void door_release(void *owner)
{
	server_reply_release(owner);
}

static void door_call(void *state, uint64_t request_id, const struct msg_request *request, struct scheme_reply *reply_out)
{
	struct door *door = state;
	struct server_reply *reply = server_direct_call(door->server, door->session, request_id, request);
	ck_assert_ptr_nonnull(reply);
	*reply_out = (struct scheme_reply){.reply = *server_reply_message(reply), .owner = reply, .release = door_release};
}

opd_client *house_direct_client(struct house *house)
{
	static const struct scheme scheme = {.name = "house",
	                                     .connect = door_connect,
	                                     .disconnect = door_disconnect,
	                                     .direct_begin = door_begin,
	                                     .direct_end = door_end,
	                                     .direct_call = door_call};
	opd_scheme_register(&scheme);
	direct_house = house;
	opd_client *client = NULL;
	opd_error error;
	ck_assert_msg(opd_connect("house:", NULL, &client, &error) == OPD_OK, "%s", error.text);
	return client;
}

/* ---- The log ---- */

char *house_log(const struct house *house)
{
	FILE *file = fopen(house->log_path, "re");
	ck_assert_ptr_nonnull(file);
	char *text = NULL;
	size_t room = 0;
	if (getdelim(&text, &room, '\0', file) < 0) {
		free(text);
		text = strdup("");
	}
	(void)fclose(file);
	return text;
}

void house_await_count(const _Atomic uint64_t *counter, uint64_t count)
{
	for (int i = 0; i < 20000 && atomic_load(counter) < count; i++)
		(void)nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
	ck_assert_uint_ge(atomic_load(counter), count);
}

size_t house_log_count(const struct house *house, const char *event, const char *also)
{
	char *text = house_log(house);
	size_t count = 0;
	char *rest = text;
	for (char *line = strsep(&rest, "\n"); line != NULL; line = strsep(&rest, "\n"))
		count += (event == NULL || strstr(line, event) != NULL) && (also == NULL || strstr(line, also) != NULL);
	free(text);
	return count;
}

void house_log_level(struct house *house, log_level level)
{
	log_set_level(&house->log, level);
}
