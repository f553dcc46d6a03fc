/* The daemon's configuration: defaults, the YAML file over them, flags over both.
 *
 * Layer: server. Threads: built by one, then constant.
 * Life: config_create (defaults) → config_load (file) → changes by flags → config_check → config_destroy. A reload makes a new one and swaps.
 * In seven files: config.c (the object, listeners, lists, checks), config_key.c (keys with one value), config_tenant.c (tenants), config_lane.c (lanes), config_provider.c (providers), config_file.c (YAML),
 * config_text.c (as text).
 * README.md documents every key; errors name file, line, key, value and what was expected. Unknown keys and repeated keys are errors.
 * Not here: whether the named ops and providers exist (server/registry.h checks that when the server starts or reloads). */
#ifndef OPD_SERVER_CONFIG_H
#define OPD_SERVER_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "opd/status.h"
#include "proto/bounds.h"
#include "server/identity.h"
#include "server/log.h"
#include "server/quota.h"
#include "server/scheduler.h"

typedef enum listen_kind {
	LISTEN_UNIX = 0,
	LISTEN_TCP = 1, /* plain */
	LISTEN_TLS = 2, /* over TCP */
} listen_kind;

struct config_listener {
	listen_kind kind;
	char *address; /* as it was written: "unix:/path", "tcp://host:port", "tls://host:port" */
	char *path;    /* UNIX */
	char *host;    /* TCP, TLS: a name or a literal address without brackets */
	uint16_t port; /* TCP, TLS; 0: any free one (printed when listening) */
	bool loopback; /* TCP, TLS: no other machine reaches it */
	int fd;        /* listens already, passed by the service manager; 0: to be opened */
};

/* Whether TLS clients show a certificate. */
typedef enum tls_clients {
	TLS_CLIENTS_UNSAID = 0, /* required where there is a CA for them, else off */
	TLS_CLIENTS_OFF,
	TLS_CLIENTS_OPTIONAL,
	TLS_CLIENTS_REQUIRED,
} tls_clients;

struct config_tls {
	char *certificate; /* PEM, the chain behind it; NULL: none */
	char *key;
	char *client_ca;
	tls_clients clients;
};

struct tls_context;
struct tls_self;

/* The lists of providers/priorities.txt, as config_add_priority takes them; NULL at the end. */
extern const char *const config_standard_priorities[];

/* One entry of `priorities`: its key (priority_key.h) and its list. */
struct config_priority {
	char *op;
	bool standard; /* of the lists that come with opd */
	size_t count;
	char **providers;
	unsigned line; /* in the file; 0: from a flag */
};

struct config_module {
	char *name; /* the provider's, so that lists may name it also when it can't be loaded; NULL: whatever the module calls itself */
	char *path;
	bool isolated; /* its code runs in worker processes */
	bool confined; /* … that the kernel confines, or not at all */
	unsigned line;
};

/* How a tenant is treated. */
struct tenant_policy {
	uint32_t weight;         /* of its device time, relative to other tenants'; default 100 */
	sched_class class;       /* of requests that name none; default interactive */
	sched_class class_max;   /* the most urgent one that its requests may have; default realtime */
	uint64_t quota[QUOTA_COUNT];         /* of all its sessions together; 0, the default: any */
	uint64_t session_quota[QUOTA_COUNT]; /* of each; 0: as `limits` has it */
	uint32_t lane;           /* where its work for the CPU runs: 0: everybody's, else of config.lanes the one before; by config_check */
};

#define CONFIG_LANES_MAX 15u
#define CONFIG_LOOPS_MAX 32u
#define CONFIG_LANE_NAME_BYTES 32u
#define CONFIG_LANE_THREADS_MAX 1024u

/* One entry of `lanes`: threads that only some tenants use. */
struct config_lane {
	char name[CONFIG_LANE_NAME_BYTES];
	uint32_t threads;
	unsigned line;
};

/* One entry of `tenants`. */
struct config_tenant {
	char *name; /* "uid:1000", "anonymous"; "*": every other */
	char *text; /* what the file says of it: "weight: 300, class: batch"; NULL: nothing */
	char *lane; /* as the file names it; NULL: everybody's */
	struct tenant_policy policy;
	unsigned line;
};

/* How far a provider is trusted. */
struct provider_policy {
	bool checked;       /* as config.checked, for its kernels alone */
	uint64_t budget_us; /* that a kernel of its may take; 0, the default: any */
	char compare[BOUND_NAME_BYTES + 1]; /* the provider that its results are compared with; "": none */
	uint32_t compare_every;             /* one of so many runs; default 1000 */
};

/* One entry of `providers`. */
struct config_provider {
	char *name; /* "*": every other */
	struct provider_policy policy;
	unsigned line;
};

#define QUARANTINE_FAILURES_MAX 64u

/* When a provider that fails is taken out (server/containment.h). */
struct config_quarantine {
	uint32_t failures;          /* of one of its implementations, within the window; default 5, 0: never */
	uint32_t provider_failures; /* of all of its together; default 20, 0: never */
	uint64_t window_us;         /* default 60 s */
	uint64_t cooldown_us;       /* until it is tried again; default 60 s */
};

struct config_limits {
	uint64_t memory_bytes;         /* tensor bytes of the daemon; default: half of the machine's memory */
	uint64_t session_bytes;        /* … of a session; default: memory_bytes / 2 */
	uint64_t request_bytes;        /* payload of one request; default 4 GiB, at most session_bytes */
	uint64_t envelope_bytes;       /* default 1 MiB */
	uint64_t cache_bytes;          /* freed tensor memory kept warm for reuse; default 256 MiB */
	uint64_t derived_bytes;        /* copies that providers make of kept tensors; default: memory_bytes / 4 */
	uint32_t sessions;             /* open connections; default 4096 */
	uint32_t in_flight;            /* requests of a session not yet answered; default 1024 */
	uint32_t kept;                 /* kept tensors of a session; default 65536 */
	uint32_t regions;              /* of shared memory, of a session; default 16 */
	uint64_t shared_bytes;         /* of them together, mapped; default 4 GiB */
	uint64_t ring_bytes;           /* of a session's pair of rings together; default 32 MiB, 0: no rings */
	uint32_t queue;                /* requests of a session that wait for a lane; default 1024, 0: any */
	uint32_t lane_queue;           /* requests that wait for a lane; default 65536, 0: any */
	uint32_t handshakes;           /* connections by TCP or TLS that have not said Hello; default 1024 */
	uint32_t refuse_uploads;       /* percent of memory_bytes in use from which uploads are refused; default 90, 100: never before it is full */
	uint32_t refuse_sessions;      /* … new sessions; default 95 */
	uint32_t drop_caches;          /* … cached plans and derived copies are given up; default 98 */
	uint64_t handshake_us;         /* from accept to Hello; default 10 s */
	uint64_t stall_us;             /* a frame begun and not finished, or a reply not read, without a byte of progress; default 60 s */
	uint64_t drain_us;             /* default 30 s */
	uint64_t stuck_us;             /* all threads of a lane in kernels, work waiting and nothing ending for so long is unhealthy; default 30 s, 0: never */
};

struct config {
	char *path; /* of the file; NULL: none */
	const char *worker; /* the program that isolated modules run in; NULL, the default: they are refused. Borrowed */
	size_t listener_count;
	struct config_listener *listeners; /* empty: the default Unix socket */
	struct config_listener metrics; /* the metrics endpoint; address NULL, the default: none */
	size_t priority_count;
	struct config_priority *priorities;
	size_t module_count;
	struct config_module *modules;
	bool all_modules; /* also those that come with opd and are named nowhere (server/installed.h) */
	size_t tenant_count;
	struct config_tenant *tenants;
	size_t lane_count;
	struct config_lane *lanes; /* beside everybody's */
	struct config_tls tls;
	struct tls_context *tls_context; /* config_load_tls; NULL: no listener needs it */
	size_t provider_count;
	struct config_provider *providers;
	struct config_quarantine quarantine;
	size_t identity_count;
	struct config_identity *identities;
	char *tokens_path;   /* NULL: no tokens */
	size_t token_count;
	struct config_token *tokens; /* config_load_tokens */
	bool allow_anonymous; /* a flag: TLS listeners that other machines reach serve also who doesn't say who it is */
	uint64_t differential_bytes; /* that comparisons may hold; default 256 MiB */
	char *differential_folder;   /* for case files of divergences, with contents; NULL: none */
	struct config_limits limits;
	uint32_t loops;   /* that read and write sockets, each on a thread of its own; 0: by the machine (machine_loops) */
	uint32_t threads; /* of everybody's lane; 0: what of the machine (server/machine.h) the other lanes, and configured loops behind the first, leave, at least one */
	bool checked;     /* canaries behind every output, verified after each kernel */
	uint64_t inline_ns; /* a kernel estimated under this runs on the loop; default 5000, 0: never */
	uint64_t segment_ns; /* of work may be handed to a device before the scheduler is asked again; default 2 ms */
	uint32_t batch_rows;    /* of requests that run as one kernel, together; default 16, 0: each alone */
	bool batch_devices;          /* on devices too, whatever they share; default true */
	uint64_t batch_shared_bytes; /* … if the operands that they share have at least so many; default 32 MiB, 0: whatever they have */
	uint64_t polling_window_us; /* the loop goes on looking at a polling client's ring for at most so long; default 50, 0: never */
	uint64_t polling_budget_us; /* … and spends at most so much of a second in looks that bring nothing; default 500000 */
	log_level level;
	log_format format;
	char *log_path; /* NULL: stderr */
	uint32_t log_lines; /* of one kind a minute, of those that clients can cause; default 600, 0: any */
	bool core;          /* core dumps are allowed (of tensors only what is smaller than 1 MiB is in them) */
	uint32_t given; /* limits that somebody set (config_key.c's bits); the others follow memory_bytes */
};

/* Defaults. NULL: out of memory. */
struct config *config_create(void);
void config_destroy(struct config *config);

/* Reads the YAML file over `config`. On failure `config` is to be destroyed. */
OPD_MUST_USE opd_status config_load(struct config *config, const char *path, opd_error *error);

/* Sets a key that has one value, as the file would: config_set(config, "limits.memory", "64 GiB", error). */
OPD_MUST_USE opd_status config_set(struct config *config, const char *key, const char *value, opd_error *error);
/* Forgets the listeners so far: --listen replaces the file's. */
void config_clear_listeners(struct config *config);
/* "unix:/path", "tcp://host:port" or "tls://host:port"; appends. */
OPD_MUST_USE opd_status config_add_listener(struct config *config, const char *address, opd_error *error);
/* Where the metrics endpoint listens: an address as above, of this machine alone, or "off". */
OPD_MUST_USE opd_status config_set_metrics(struct config *config, const char *address, opd_error *error);
/* "op=provider,provider" or "*=…"; replaces an entry of that op. */
OPD_MUST_USE opd_status config_add_priority(struct config *config, const char *text, opd_error *error);
/* "name=/path.so" or "/path.so" */
/* " (isolated)", " (isolated, confined)" or "". */
const char *config_isolation_text(const struct config_module *module);
OPD_MUST_USE opd_status config_add_module(struct config *config, const char *text, bool isolated, opd_error *error);
/* How a tenant of this name is treated: by its own entry, else by that of "*", else by default. */
void config_tenant(const struct config *config, const char *name, struct tenant_policy *policy_out);
bool config_same_lanes(const struct config *a, const struct config *b);
/* How far a provider is trusted: what its own entry says, else that of "*", else the defaults. */
void config_provider(const struct config *config, const char *name, struct provider_policy *policy_out);
/* "64 MiB", "1GiB", "4096": binary units. */
OPD_MUST_USE opd_status config_parse_bytes(const char *text, uint64_t *bytes_out, opd_error *error);
/* "500ms", "10 s", "2min": units ns, us, ms, s, min, h; a bare 0 needs none. */
OPD_MUST_USE opd_status config_parse_duration(const char *text, uint64_t *ns_out, opd_error *error);

/* What one key alone can't tell: limits that contradict each other, listeners twice, a plain TCP listener that is not loopback (refused unless the flag that asks for it is given).
 * Adds the default listener where there is none. */
OPD_MUST_USE opd_status config_check(struct config *config, bool insecure_plain_tcp, opd_error *error);

/* After the check: reads the certificates, where a listener speaks TLS. self: NULL or what --self-signed has made. */
OPD_MUST_USE opd_status config_load_tls(struct config *config, const struct tls_self *self, opd_error *error);

/* Reads the tokens' file, if one is configured. INVALID_ARGUMENT names file and line; a file that others may read or write, or of another owner than root and the daemon's user, is refused. */
OPD_MUST_USE opd_status config_load_tokens(struct config *config, opd_error *error);

/* What differs between two of them, key by key, as the file would say it: on_change(key, before, after, argument), sorted by key; NULL: the key isn't there. Tenants are told as they
 * were written. */
typedef void (*config_change_fn)(const char *key, const char *before, const char *after, void *argument);
OPD_MUST_USE opd_status config_compare(const struct config *before, const struct config *after, config_change_fn on_change, void *argument, opd_error *error);

/* Where opd listens and opctl looks when nobody says: $XDG_RUNTIME_DIR/opd.sock, as root /run/opd/opd.sock, else /tmp/opd-<uid>/opd.sock. Written into out. The same rule stands in
 * client/address.h: README.md documents it. */
void config_default_socket(char *out, size_t out_bytes);

#endif
