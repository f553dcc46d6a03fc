#include "server/config.h"

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#include "proto/bounds.h"
#include "proto/text.h"
#include "server/config_internal.h"
#include "server/installed.h"
#include "server/priority_key.h"
#include "server/tls_context.h"

#define NAME_RULE "[a-z_][a-z_0-9]*"

static opd_status out_of_memory(opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
}

/* What the kernel lets this container have; UINT64_MAX: no such limit. */
static uint64_t cgroup_memory(void)
{
	static const char *const files[] = {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"};
	for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
		FILE *file = fopen(files[i], "re");
		if (file == NULL)
			continue;
		uint64_t bytes;
		int count = fscanf(file, "%" SCNu64, &bytes);
		(void)fclose(file);
		if (count == 1 && bytes > 0)
			return bytes;
	}
	return UINT64_MAX;
}

static uint64_t machine_memory(void)
{
	long pages = sysconf(_SC_PHYS_PAGES);
	long page_bytes = sysconf(_SC_PAGESIZE);
	uint64_t bytes = pages > 0 && page_bytes > 0 ? (uint64_t)pages * (uint64_t)page_bytes : 1ull << 30;
	uint64_t limit = cgroup_memory();
	return bytes < limit ? bytes : limit;
}

struct config *config_create(void)
{
	struct config *config = calloc(1, sizeof *config);
	if (config == NULL)
		return NULL;
	config->limits = (struct config_limits){
		.memory_bytes = machine_memory() / 2,
		.envelope_bytes = 1u << 20,
		.sessions = 4096,
		.in_flight = 1024,
		.kept = 65536,
		.regions = 16,
		.shared_bytes = 4ull << 30,
		.ring_bytes = 32u << 20,
		.queue = 1024,
		.lane_queue = 65536,
		.handshakes = 1024,
		.refuse_uploads = 90,
		.refuse_sessions = 95,
		.drop_caches = 98,
		.handshake_us = 10 * 1000000,
		.stall_us = 60 * 1000000,
		.drain_us = 30 * 1000000,
		.stuck_us = 30 * 1000000,
	};
	config->quarantine = (struct config_quarantine){.failures = 5, .provider_failures = 20, .window_us = 60 * 1000000, .cooldown_us = 60 * 1000000};
	config->differential_bytes = 256u << 20;
	config->loops = 0;
	config->inline_ns = 5000;
	config->segment_ns = 2000000;
	config->batch_rows = 16;
	config->batch_shared_bytes = 32u << 20;
	config->batch_devices = true;
	config->polling_window_us = 50;
	config->polling_budget_us = 500000;
	config->level = LOG_INFO;
	config->log_lines = 600;
	config->format = LOG_TEXT;
	config_derive_limits(config);
	/* The order among providers where nobody says. */
	opd_error error;
	for (size_t i = 0; config_standard_priorities[i] != NULL; i++) {
		if (config_add_priority(config, config_standard_priorities[i], &error) != OPD_OK) {
			config_destroy(config);
			return NULL;
		}
		config->priorities[config->priority_count - 1].standard = true;
	}
	return config;
}

static void free_providers(struct config_priority *priority)
{
	for (size_t i = 0; i < priority->count; i++)
		free(priority->providers[i]);
	free(priority->providers);
	priority->providers = NULL;
	priority->count = 0;
}

static void listener_fini(struct config_listener *listener)
{
	free(listener->address);
	free(listener->path);
	free(listener->host);
}

void config_clear_listeners(struct config *config)
{
	for (size_t i = 0; i < config->listener_count; i++)
		listener_fini(&config->listeners[i]);
	free(config->listeners);
	config->listeners = NULL;
	config->listener_count = 0;
}

void config_destroy(struct config *config)
{
	if (config == NULL)
		return;
	listener_fini(&config->metrics);
	config_clear_listeners(config);
	for (size_t i = 0; i < config->priority_count; i++) {
		free(config->priorities[i].op);
		free_providers(&config->priorities[i]);
	}
	for (size_t i = 0; i < config->module_count; i++) {
		free(config->modules[i].name);
		free(config->modules[i].path);
	}
	config_clear_tenants(config);
	free(config->lanes);
	config_clear_identities(config);
	tls_context_destroy(config->tls_context);
	free(config->tls.certificate);
	free(config->tls.key);
	free(config->tls.client_ca);
	config_clear_providers(config);
	free(config->priorities);
	free(config->modules);
	free(config->path);
	free(config->log_path);
	free(config->differential_folder);
	free(config);
}

/* ---- Listeners --------------------------------------------------------------------------------------------------------- */

static opd_status parse_unix(const char *path, struct config_listener *listener, opd_error *error)
{
	size_t room = sizeof ((struct sockaddr_un *)NULL)->sun_path;
	if (path[0] != '/')
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"unix:%.200s\": the path isn't absolute, expected unix:/path", path);
	if (strlen(path) >= room)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"unix:%.200s\": the path has %zu bytes, expected at most %zu", path,
		                strlen(path), room - 1);
	listener->kind = LISTEN_UNIX;
	listener->path = strdup(path);
	return listener->path != NULL ? OPD_OK : out_of_memory(error);
}

/* "host:port" or "[literal]:port"; *host_out points into text. */
static bool split_host(const char *text, const char **host_out, size_t *host_bytes_out, const char **port_out)
{
	const char *colon = strrchr(text, ':');
	if (colon == NULL)
		return false;
	const char *host = text;
	const char *end = colon;
	if (host[0] == '[') {
		host++;
		end--;
		if (end <= host || *end != ']')
			return false;
	} else if (memchr(host, ':', (size_t)(end - host)) != NULL) {
		return false; /* IPv6 without brackets: which colon is the port's? */
	}
	*host_out = host;
	*host_bytes_out = (size_t)(end - host);
	*port_out = colon + 1;
	return end > host;
}

static bool parse_port(const char *text, uint16_t *port_out)
{
	uint32_t port = 0;
	size_t digits = strspn(text, "0123456789");
	if (digits == 0 || digits > 5 || text[digits] != '\0')
		return false;
	for (size_t i = 0; i < digits; i++)
		port = port * 10 + (uint32_t)(text[i] - '0');
	*port_out = (uint16_t)port;
	return port <= UINT16_MAX;
}

/* A name other than localhost may resolve to anything, tomorrow to something else: it isn't loopback. */
static bool is_loopback(const char *host)
{
	struct in_addr v4;
	struct in6_addr v6;
	if (strcmp(host, "localhost") == 0)
		return true;
	if (inet_pton(AF_INET, host, &v4) == 1)
		return (ntohl(v4.s_addr) >> 24) == 127;
	if (inet_pton(AF_INET6, host, &v6) != 1)
		return false;
	return IN6_IS_ADDR_LOOPBACK(&v6) || (IN6_IS_ADDR_V4MAPPED(&v6) && v6.s6_addr[12] == 127);
}

/* "tcp://…" or "tls://…" */
static opd_status parse_tcp(const char *address, listen_kind kind, struct config_listener *listener, opd_error *error)
{
	const char *host, *port;
	size_t host_bytes;
	if (!split_host(address + 6, &host, &host_bytes, &port))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.200s\": expected %.3s://host:port (IPv6 in brackets)", address, address);
	if (!parse_port(port, &listener->port))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.200s\": port \"%.20s\", expected 0 to 65535", address, port);
	listener->kind = kind;
	listener->host = strndup(host, host_bytes);
	listener->loopback = listener->host != NULL && is_loopback(listener->host);
	return listener->host != NULL ? OPD_OK : out_of_memory(error);
}

static opd_status parse_address(const char *address, struct config_listener *listener, opd_error *error)
{
	listener->address = strdup(address);
	if (listener->address == NULL)
		return out_of_memory(error);
	if (strncmp(address, "unix:", 5) == 0)
		return parse_unix(address + 5, listener, error);
	if (strncmp(address, "tcp://", 6) == 0)
		return parse_tcp(address, LISTEN_TCP, listener, error);
	if (strncmp(address, "tls://", 6) == 0)
		return parse_tcp(address, LISTEN_TLS, listener, error);
	return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.200s\" is not an address, expected unix:/path, tls://host:port or tcp://host:port", address);
}

opd_status config_add_listener(struct config *config, const char *address, opd_error *error)
{
	struct config_listener listener = {0};
	opd_status status = parse_address(address, &listener, error);
	if (status != OPD_OK)
		goto free_listener;
	struct config_listener *grown =
		reallocarray(config->listeners, config->listener_count + 1, sizeof *config->listeners);
	if (grown == NULL) {
		status = out_of_memory(error);
		goto free_listener;
	}
	config->listeners = grown;
	config->listeners[config->listener_count++] = listener;
	return OPD_OK;
free_listener:
	listener_fini(&listener);
	return status;
}

opd_status config_set_metrics(struct config *config, const char *address, opd_error *error)
{
	struct config_listener listener = {0};
	opd_status status = strcmp(address, "off") == 0 ? OPD_OK : parse_address(address, &listener, error);
	if (status == OPD_OK && listener.address != NULL && listener.kind != LISTEN_UNIX && !is_loopback(listener.host))
		status = opd_fail(error, OPD_INVALID_ARGUMENT,
		                  "%s is not a loopback address: nobody is authenticated there, and it tells tenants' names. Expected 127.0.0.1, [::1], a Unix socket or off",
		                  listener.address);
	if (status == OPD_OK && listener.kind == LISTEN_TLS)
		status = opd_fail(error, OPD_INVALID_ARGUMENT, "%s: the endpoint speaks plain HTTP, expected tcp:// or unix:", address);
	if (status != OPD_OK) {
		listener_fini(&listener);
		return status;
	}
	listener_fini(&config->metrics);
	config->metrics = listener;
	return OPD_OK;
}

/* ---- Priorities -------------------------------------------------------------------------------------------------------- */

static opd_status check_name(const char *what, const char *name, opd_error *error)
{
	if (text_is_name(name, strlen(name)))
		return OPD_OK;
	return opd_fail(error, OPD_INVALID_ARGUMENT, "%s \"%.64s\" is not a name, expected " NAME_RULE " of at most %u bytes", what, name,
	                BOUND_NAME_BYTES);
}

void config_clear_priorities(struct config *config)
{
	for (size_t i = 0; i < config->priority_count; i++) {
		free(config->priorities[i].op);
		free_providers(&config->priorities[i]);
	}
	config->priority_count = 0;
}

static struct config_priority *find_priority(struct config *config, const char *op)
{
	for (size_t i = 0; i < config->priority_count; i++)
		if (strcmp(config->priorities[i].op, op) == 0)
			return &config->priorities[i];
	return NULL;
}

/* The lists that come with opd were measured for its own list of everything else: who says another one isn't to find them before it. */
static void drop_standard(struct config *config)
{
	size_t kept = 0;
	for (size_t i = 0; i < config->priority_count; i++) {
		struct config_priority *priority = &config->priorities[i];
		if (!priority->standard || strcmp(priority->op, "*") == 0) {
			config->priorities[kept++] = *priority;
			continue;
		}
		free_providers(priority);
		free(priority->op);
	}
	config->priority_count = kept;
}

opd_status config_begin_priority(struct config *config, const char *op, unsigned line, struct config_priority **priority_out,
                                 opd_error *error)
{
	struct priority_key key;
	char name[BOUND_NAME_BYTES + 1];
	opd_status status = priority_key_parse(op, &key, error);
	if (status == OPD_OK && strcmp(op, "*") != 0) {
		(void)snprintf(name, sizeof name, "%.*s", (int)key.op_bytes, op);
		status = check_name("op", key.op_bytes < sizeof name ? name : op, error);
	}
	if (status != OPD_OK)
		return status;
	if (strcmp(op, "*") == 0)
		drop_standard(config);
	struct config_priority *priority = find_priority(config, op);
	if (priority == NULL) {
		struct config_priority *grown = reallocarray(config->priorities, config->priority_count + 1, sizeof *grown);
		if (grown == NULL)
			return out_of_memory(error);
		config->priorities = grown;
		priority = &grown[config->priority_count];
		*priority = (struct config_priority){.op = strdup(op)};
		if (priority->op == NULL)
			return out_of_memory(error);
		config->priority_count++;
	}
	free_providers(priority);
	priority->line = line;
	priority->standard = false;
	*priority_out = priority;
	return OPD_OK;
}

opd_status config_append_provider(struct config_priority *priority, const char *name, opd_error *error)
{
	opd_status status = check_name("provider", name, error);
	if (status != OPD_OK)
		return status;
	if (priority->count == BOUND_PROVIDERS)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "more than %u providers in one list", BOUND_PROVIDERS);
	char **grown = reallocarray(priority->providers, priority->count + 1, sizeof *grown);
	if (grown == NULL)
		return out_of_memory(error);
	priority->providers = grown;
	grown[priority->count] = strdup(name);
	if (grown[priority->count] == NULL)
		return out_of_memory(error);
	priority->count++;
	return OPD_OK;
}

/* `names` is cut up. */
static opd_status append_providers(struct config_priority *priority, char *names, opd_error *error)
{
	if (names[0] == '\0')
		return OPD_OK; /* an empty list, which differs from none */
	for (char *name; (name = strsep(&names, ",")) != NULL;) {
		opd_status status = config_append_provider(priority, name, error);
		if (status != OPD_OK)
			return status;
	}
	return OPD_OK;
}

/* A list given for an op replaces those that narrow it too. */
static void drop_narrowed(struct config *config, const char *op)
{
	size_t kept = 0, bytes = strlen(op);
	for (size_t i = 0; i < config->priority_count; i++) {
		struct config_priority *priority = &config->priorities[i];
		if (strncmp(priority->op, op, bytes) == 0 && priority->op[bytes] == '/') {
			free(priority->op);
			free_providers(priority);
		} else {
			config->priorities[kept++] = *priority;
		}
	}
	config->priority_count = kept;
}

opd_status config_add_priority(struct config *config, const char *text, opd_error *error)
{
	char *copy = strdup(text);
	if (copy == NULL)
		return out_of_memory(error);
	char *equals = strchr(copy, '=');
	if (equals != NULL && equals > copy && equals[-1] == '<') /* of rows<=4 */
		equals = strchr(equals + 1, '=');
	struct config_priority *priority;
	opd_status status;
	if (equals == NULL) {
		status = opd_fail(error, OPD_INVALID_ARGUMENT, "priority \"%.200s\": expected op=provider,provider", text);
	} else {
		*equals = '\0';
		if (strchr(copy, '/') == NULL)
			drop_narrowed(config, copy);
		status = config_begin_priority(config, copy, 0, &priority, error);
		if (status == OPD_OK)
			status = append_providers(priority, equals + 1, error);
		if (status != OPD_OK)
			status = opd_error_prefix(error, status, "priority \"%.200s\"", text);
	}
	free(copy);
	return status;
}

/* ---- Modules ----------------------------------------------------------------------------------------------------------- */

static opd_status check_module(const struct config *config, const char *name, opd_error *error)
{
	opd_status status = name == NULL ? OPD_OK : check_name("module", name, error);
	if (status != OPD_OK)
		return status;
	if (name != NULL && (strcmp(name, "native") == 0 || strcmp(name, "unfused") == 0))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "module \"%s\": the name is reserved", name);
	for (size_t i = 0; name != NULL && i < config->module_count; i++)
		if (config->modules[i].name != NULL && strcmp(config->modules[i].name, name) == 0)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "module \"%s\" is named twice", name);
	return OPD_OK;
}

static opd_status want_all_modules(struct config *config, const char *name, bool isolated, opd_error *error)
{
	if (name != NULL || isolated)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "module \"" INSTALLED_ALL "\": expected no name, and not isolated: name those one by one");
	config->all_modules = true;
	return OPD_OK;
}

opd_status config_append_module(struct config *config, const char *name, const char *text, bool isolated, unsigned line, opd_error *error)
{
	char path[PATH_MAX];
	if (strcmp(text, INSTALLED_ALL) == 0)
		return want_all_modules(config, name, isolated, error);
	if (name == NULL && installed_is(text))
		name = text;
	opd_status status = installed_resolve(text, "module", path, error);
	if (status == OPD_OK)
		status = check_module(config, name, error);
	if (status != OPD_OK)
		return status;
	struct config_module *grown = reallocarray(config->modules, config->module_count + 1, sizeof *grown);
	if (grown == NULL)
		return out_of_memory(error);
	config->modules = grown;
	struct config_module module = {.name = name != NULL ? strdup(name) : NULL, .path = strdup(path), .isolated = isolated, .line = line};
	if (module.path == NULL || (name != NULL && module.name == NULL)) {
		free(module.name);
		free(module.path);
		return out_of_memory(error);
	}
	grown[config->module_count++] = module;
	return OPD_OK;
}

opd_status config_add_module(struct config *config, const char *text, bool isolated, opd_error *error)
{
	const char *equals = strchr(text, '=');
	if (text[0] == '/' || equals == NULL)
		return config_append_module(config, NULL, text, isolated, 0, error);
	char *name = strndup(text, (size_t)(equals - text));
	if (name == NULL)
		return out_of_memory(error);
	opd_status status = config_append_module(config, name, equals + 1, isolated, 0, error);
	free(name);
	return status;
}

/* ---- What one key alone can't tell ------------------------------------------------------------------------------------- */

static bool same_listener(const struct config_listener *a, const struct config_listener *b)
{
	if ((a->kind == LISTEN_UNIX) != (b->kind == LISTEN_UNIX))
		return false;
	if (a->kind == LISTEN_UNIX)
		return strcmp(a->path, b->path) == 0;
	return a->port == b->port && a->port != 0 && strcmp(a->host, b->host) == 0;
}

static opd_status check_listener(const struct config *config, size_t index, bool insecure_plain_tcp, opd_error *error)
{
	const struct config_listener *listener = &config->listeners[index];
	for (size_t i = 0; i < index; i++)
		if (same_listener(&config->listeners[i], listener))
			return opd_fail(error, OPD_INVALID_ARGUMENT, "listen: %s is there twice", listener->address);
	if (listener->kind == LISTEN_TCP && !insecure_plain_tcp && !listener->loopback)
		return opd_fail(error, OPD_INVALID_ARGUMENT,
		                "listen: %s is not a loopback address, and plain: anyone on the way could read and run everything. Use tls://%s, 127.0.0.1, "
		                "[::1] or a Unix socket, or start with --insecure-plain-tcp",
		                listener->address, listener->address + 6);
	return OPD_OK;
}

static opd_status add_default_listener(struct config *config, opd_error *error)
{
	char address[512] = "unix:";
	config_default_socket(address + 5, sizeof address - 5);
	opd_status status = config_add_listener(config, address, error);
	return status == OPD_OK ? OPD_OK : opd_error_prefix(error, status, "default socket");
}

static bool has_module(const struct config *config, const char *name, const char *path)
{
	for (size_t i = 0; i < config->module_count; i++)
		if ((config->modules[i].name != NULL && strcmp(config->modules[i].name, name) == 0) || strcmp(config->modules[i].path, path) == 0)
			return true;
	return false;
}

static opd_status add_installed_modules(struct config *config, opd_error *error)
{
	opd_status status = OPD_OK;
	for (size_t i = 0; config->all_modules && status == OPD_OK && installed_modules[i] != NULL; i++) {
		const char *name = installed_modules[i];
		char path[PATH_MAX];
		if (installed_path(name, path) && !has_module(config, name, path))
			status = config_append_module(config, name, path, false, 0, error);
	}
	return status;
}

opd_status config_check(struct config *config, bool insecure_plain_tcp, opd_error *error)
{
	config_derive_limits(config);
	opd_status status = config_check_limits(config, error);
	if (status == OPD_OK)
		status = config_resolve_lanes(config, error);
	if (status == OPD_OK)
		status = add_installed_modules(config, error);
	for (size_t i = 0; status == OPD_OK && i < config->listener_count; i++)
		status = check_listener(config, i, insecure_plain_tcp, error);
	if (status == OPD_OK && config->listener_count == 0)
		status = add_default_listener(config, error);
	return status;
}

opd_status config_load_tls(struct config *config, const struct tls_self *self, opd_error *error)
{
	if (config->tls.clients == TLS_CLIENTS_UNSAID)
		config->tls.clients = config->tls.client_ca != NULL ? TLS_CLIENTS_REQUIRED : TLS_CLIENTS_OFF;
	for (size_t i = 0; i < config->listener_count; i++)
		if (config->listeners[i].kind == LISTEN_TLS)
			return tls_context_create_server(config, self, &config->tls_context, error);
	return OPD_OK;
}

void config_default_socket(char *out, size_t out_bytes)
{
	const char *runtime = getenv("XDG_RUNTIME_DIR");
	if (runtime != NULL && runtime[0] == '/')
		(void)snprintf(out, out_bytes, "%s/opd.sock", runtime);
	else if (geteuid() == 0)
		(void)snprintf(out, out_bytes, "/run/opd/opd.sock");
	else
		(void)snprintf(out, out_bytes, "/tmp/opd-%u/opd.sock", (unsigned)geteuid());
}
