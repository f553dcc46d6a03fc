#include "server/context.h"

#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"
#include "server/daemon.h"
#include "server/request.h"

void context_init(struct context *context, struct server *server)
{
	*context = (struct context){.server = server, .metrics = server->direct_metrics};
}

void context_fini(struct context *context)
{
	for (uint32_t i = 0; i < CONTEXT_LISTS; i++) {
		effective_unref(context->lists[i]);
		free(context->list_keys[i]);
	}
	while (context->free_requests != NULL) {
		struct request *request = context->free_requests;
		context->free_requests = request->next;
		request_destroy(request);
	}
	snapshot_unref(context->snapshot);
	context->snapshot = NULL;
}

struct snapshot *context_snapshot(struct context *context)
{
	struct registry *registry = context->server->registry;
	if (context->snapshot == NULL || context->snapshot->version != registry_version(registry)) {
		snapshot_unref(context->snapshot);
		context->snapshot = registry_snapshot(registry);
	}
	return context->snapshot;
}

/* The names, each with a NUL behind it; 0: too many bytes to cache. */
static uint32_t list_key(const struct msg_list *list, char *key, size_t key_bytes)
{
	size_t at = 0;
	for (uint32_t i = 0; i < list->count; i++) {
		if (list->names[i].bytes + 1 > key_bytes - at)
			return 0;
		memcpy(key + at, list->names[i].data, list->names[i].bytes);
		at += list->names[i].bytes;
		key[at++] = '\0';
	}
	return (uint32_t)at;
}

static void list_keep(struct context *context, uint32_t slot, const char *key, uint32_t key_bytes, struct effective *effective)
{
	char *copy = malloc(key_bytes);
	if (copy == NULL)
		return;
	memcpy(copy, key, key_bytes);
	effective_unref(context->lists[slot]);
	free(context->list_keys[slot]);
	context->lists[slot] = effective_ref(effective);
	context->list_keys[slot] = copy;
	context->list_key_bytes[slot] = key_bytes;
}

opd_status context_list(struct context *context, const struct snapshot *snapshot, const struct op *op, const struct msg_list *list,
                        struct effective **effective_out, opd_error *error)
{
	char key[512] = "";
	uint32_t key_bytes = list_key(list, key, sizeof key);
	uint32_t slot = (schema_hash(key, key_bytes) ^ op->index * 2654435761u) % CONTEXT_LISTS;
	struct effective *seen = context->lists[slot];
	if (key_bytes != 0 && seen != NULL && seen->op_index == op->index && seen->version == snapshot->version &&
	    context->list_key_bytes[slot] == key_bytes && memcmp(context->list_keys[slot], key, key_bytes) == 0) {
		*effective_out = effective_ref(seen);
		return OPD_OK;
	}
	opd_status status = plist_check(snapshot, op, list->names, list->count, error);
	if (status != OPD_OK)
		return status;
	struct effective *made = effective_create(snapshot, op, MSG_LEVEL_REQUEST, list->names, list->count, NULL, NULL);
	if (made == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "priority list: out of memory");
	if (key_bytes != 0)
		list_keep(context, slot, key, key_bytes, made);
	*effective_out = made;
	return OPD_OK;
}
