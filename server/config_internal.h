/* What the files of the configuration share.
 *
 * Layer: server, private to config*.c. Threads: as config.h. */
#ifndef OPD_SERVER_CONFIG_INTERNAL_H
#define OPD_SERVER_CONFIG_INTERNAL_H

#include "server/config.h"

/* A key with one value: where it lies in struct config, and what it may be. */
struct config_key {
	const char *name; /* "limits.memory" */
	opd_status (*set)(struct config *config, const struct config_key *key, const char *value, opd_error *error);
	size_t offset;
	uint64_t low, high; /* of numbers, in the field's unit */
	uint32_t given;     /* bit of config->given */
};

/* NULL: no such key. */
const struct config_key *config_key_find(const char *name);
/* All of them; NULL: no more. */
const struct config_key *config_key_at(size_t index);

/* The key's value, as the file would say it: "64 MiB", "10s". Longer ones are cut. */
#define CONFIG_TEXT_BYTES 512u
void config_key_text(const struct config *config, const struct config_key *key, char *out, size_t out_bytes);

/* Fills the limits that nobody set from memory_bytes. */
void config_derive_limits(struct config *config);
/* Limits that were set and contradict each other. */
OPD_MUST_USE opd_status config_check_limits(const struct config *config, opd_error *error);

/* Append an entry; the texts are copied. Errors say what is wrong with a name, not where it stands. */
OPD_MUST_USE opd_status config_append_module(struct config *config, const char *name, const char *path, bool isolated, unsigned line,
                                             opd_error *error);
/* An entry with the defaults, or with those of "*" where that came before. `name` is copied. */
OPD_MUST_USE opd_status config_begin_tenant(struct config *config, const char *name, unsigned line, struct config_tenant **tenant_out,
                                            opd_error *error);
/* NOT_FOUND: no such key. */
OPD_MUST_USE opd_status config_set_tenant(struct config_tenant *tenant, const char *key, const char *value, opd_error *error);
/* Remembers that `key` was given, for config_compare. */
OPD_MUST_USE opd_status config_note_tenant(struct config_tenant *tenant, const char *key, const char *value, opd_error *error);
void config_clear_tenants(struct config *config);
/* A lane of one thread. */
OPD_MUST_USE opd_status config_begin_lane(struct config *config, const char *name, unsigned line, struct config_lane **lane_out, opd_error *error);
/* NOT_FOUND: no such key. */
OPD_MUST_USE opd_status config_set_lane(struct config_lane *lane, const char *key, const char *value, opd_error *error);
/* Tenants may name lanes that come later in the file: once it is read. */
OPD_MUST_USE opd_status config_resolve_lanes(struct config *config, opd_error *error);
/* An entry that has only the rights of who isn't configured. Its lists begin empty when their keys are given. */
OPD_MUST_USE opd_status config_begin_identity(struct config *config, const char *name, unsigned line, struct config_identity **identity_out, opd_error *error);
/* certificate, uid, gid, tenant. NOT_FOUND: no such key with one value. */
OPD_MUST_USE opd_status config_set_identity(struct config_identity *identity, const char *key, const char *value, opd_error *error);
/* rights, ops, providers, classes: NULL begins the list, then one name after the other. NOT_FOUND: no such list. */
OPD_MUST_USE opd_status config_add_to_identity(struct config_identity *identity, const char *list, const char *name, opd_error *error);
void config_clear_identities(struct config *config);
/* As the file would say it, without secrets; malloc. NULL: out of memory. */
char *config_identity_text(const struct config_identity *identity);
/* The same of `providers`. */
OPD_MUST_USE opd_status config_begin_provider(struct config *config, const char *name, unsigned line, struct config_provider **provider_out,
                                              opd_error *error);
OPD_MUST_USE opd_status config_set_provider(struct config_provider *provider, const char *key, const char *value, opd_error *error);
void config_clear_providers(struct config *config);
/* An empty list for `op` ("*" or a name); replaces an entry of that op. */
void config_clear_priorities(struct config *config);
OPD_MUST_USE opd_status config_begin_priority(struct config *config, const char *op, unsigned line,
                                              struct config_priority **priority_out, opd_error *error);
OPD_MUST_USE opd_status config_append_provider(struct config_priority *priority, const char *name, opd_error *error);

#endif
