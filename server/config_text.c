/* A configuration as text, key by key, and what differs between two. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/config_internal.h"

struct item {
	char *key;
	char *value;
};

struct items {
	struct item *items;
	size_t count;
	bool failed; /* out of memory */
};

static void items_add(struct items *items, char *key, char *value)
{
	struct item *grown = key == NULL || value == NULL ? NULL : reallocarray(items->items, items->count + 1, sizeof *grown);
	if (grown == NULL) {
		items->failed = true;
		free(key);
		free(value);
		return;
	}
	items->items = grown;
	grown[items->count++] = (struct item){key, value};
}

static void items_fini(struct items *items)
{
	for (size_t i = 0; i < items->count; i++) {
		free(items->items[i].key);
		free(items->items[i].value);
	}
	free(items->items);
}

/* "section.name"; NULL: out of memory */
static char *joined(const char *section, const char *name)
{
	char *text;
	return asprintf(&text, "%s.%s", section, name) < 0 ? NULL : text;
}

/* "[a, b]" */
static char *list_text(char *const *texts, size_t count)
{
	char *text = NULL;
	size_t bytes;
	FILE *stream = open_memstream(&text, &bytes);
	if (stream == NULL)
		return NULL;
	(void)fputc('[', stream);
	for (size_t i = 0; i < count; i++)
		(void)fprintf(stream, "%s%s", i > 0 ? ", " : "", texts[i]);
	(void)fputc(']', stream);
	if (fclose(stream) != 0) {
		free(text);
		return NULL;
	}
	return text;
}

static void add_keys(struct items *items, const struct config *config)
{
	const struct config_key *key;
	for (size_t i = 0; (key = config_key_at(i)) != NULL; i++) {
		char text[CONFIG_TEXT_BYTES];
		config_key_text(config, key, text, sizeof text);
		items_add(items, strdup(key->name), strdup(text));
	}
}

static void add_listeners(struct items *items, const struct config *config)
{
	char **addresses = calloc(config->listener_count + 1, sizeof *addresses);
	for (size_t i = 0; addresses != NULL && i < config->listener_count; i++)
		addresses[i] = config->listeners[i].address;
	items_add(items, strdup("listen"), addresses == NULL ? NULL : list_text(addresses, config->listener_count));
	free(addresses);
}

const char *config_isolation_text(const struct config_module *module)
{
	return module->confined ? " (isolated, confined)" : module->isolated ? " (isolated)" : "";
}

static char *module_text(const struct config_module *module)
{
	char *text;
	return asprintf(&text, "%s%s", module->path, config_isolation_text(module)) < 0 ? NULL : text;
}

static char *provider_text(const struct provider_policy *policy)
{
	char *text;
	return asprintf(&text, "{checked: %s, budget: %" PRIu64 "us, compare: \"%s\", compare_every: %" PRIu32 "}", policy->checked ? "true" : "false",
	                policy->budget_us, policy->compare, policy->compare_every) < 0
	           ? NULL
	           : text;
}

static char *lane_text(const struct config_lane *lane)
{
	char *text;
	return asprintf(&text, "threads: %" PRIu32, lane->threads) < 0 ? NULL : text;
}

static void add_lists(struct items *items, const struct config *config)
{
	for (size_t i = 0; i < config->priority_count; i++) {
		const struct config_priority *priority = &config->priorities[i];
		items_add(items, joined("priorities", priority->op), list_text(priority->providers, priority->count));
	}
	for (size_t i = 0; i < config->module_count; i++) {
		const struct config_module *module = &config->modules[i];
		items_add(items, joined("modules", module->name != NULL ? module->name : module->path), module_text(module));
	}
	for (size_t i = 0; i < config->provider_count; i++)
		items_add(items, joined("providers", config->providers[i].name), provider_text(&config->providers[i].policy));
	for (size_t i = 0; i < config->lane_count; i++)
		items_add(items, joined("lanes", config->lanes[i].name), lane_text(&config->lanes[i]));
	for (size_t i = 0; i < config->tenant_count; i++)
		items_add(items, joined("tenants", config->tenants[i].name), strdup(config->tenants[i].text == NULL ? "{}" : config->tenants[i].text));
}

static void add_identities(struct items *items, const struct config *config)
{
	for (size_t i = 0; i < config->identity_count; i++)
		items_add(items, joined("identities", config->identities[i].access->identity), config_identity_text(&config->identities[i]));
	for (size_t i = 0; i < config->token_count; i++) {
		const struct config_token *token = &config->tokens[i];
		char key[96]; /* the first bytes of a hash tell tokens apart, and tell nothing else */
		(void)snprintf(key, sizeof key, "%s (sha256:%02x%02x%02x%02x…)", token->identity, token->hash[0], token->hash[1], token->hash[2], token->hash[3]);
		items_add(items, joined("tokens", key), strdup("known"));
	}
}

static int compare_keys(const void *a, const void *b)
{
	return strcmp(((const struct item *)a)->key, ((const struct item *)b)->key);
}

static struct items items_of(const struct config *config)
{
	struct items items = {0};
	add_keys(&items, config);
	add_listeners(&items, config);
	add_lists(&items, config);
	add_identities(&items, config);
	if (items.count > 0)
		qsort(items.items, items.count, sizeof *items.items, compare_keys);
	return items;
}

/* Both are sorted: they are merged. */
static void walk(const struct items *before, const struct items *after, config_change_fn on_change, void *argument)
{
	for (size_t i = 0, k = 0; i < before->count || k < after->count;) {
		const struct item *old = i < before->count ? &before->items[i] : NULL;
		const struct item *new = k < after->count ? &after->items[k] : NULL;
		const int order = old == NULL ? 1 : new == NULL ? -1 : strcmp(old->key, new->key);
		if (order < 0)
			on_change(old->key, old->value, NULL, argument);
		else if (order > 0)
			on_change(new->key, NULL, new->value, argument);
		else if (strcmp(old->value, new->value) != 0)
			on_change(old->key, old->value, new->value, argument);
		i += order <= 0;
		k += order >= 0;
	}
}

opd_status config_compare(const struct config *before, const struct config *after, config_change_fn on_change, void *argument, opd_error *error)
{
	struct items old = items_of(before), new = items_of(after);
	const bool failed = old.failed || new.failed;
	if (!failed)
		walk(&old, &new, on_change, argument);
	items_fini(&old);
	items_fini(&new);
	return failed ? opd_fail(error, OPD_RESOURCE_EXHAUSTED, "configuration: out of memory") : OPD_OK;
}
