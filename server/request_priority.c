/* Priority lists that clients push, pop, set and ask for. */
#include <inttypes.h>
#include <string.h>

#include "server/daemon.h"
#include "server/request.h"

/* A list that a client gives names nothing that its identity may not use. */
static opd_status check_list(struct request *request, const struct msg_list *list)
{
	return access_check_providers(request->session->access, list->names, list->count, request->context->server->log, &request->error);
}

void priority_push(struct request *request)
{
	opd_status status = OPD_OK;
	for (uint32_t i = 0; status == OPD_OK && i < request->message.push.count; i++)
		status = check_list(request, &request->message.push.entries[i].list);
	if (status == OPD_OK)
		status = session_push_priority(request->session, request->snapshot, &request->message.push, &request->error);
	request->error.status = (int32_t)status;
	request_reply_empty(request);
}

void priority_pop(struct request *request)
{
	request->error.status = (int32_t)session_pop_priority(request->session, &request->error);
	request_reply_empty(request);
}

static opd_status set_server_priority(struct request *request, const struct msg_set_priority *set)
{
	struct registry *registry = request->context->server->registry;
	const char *names[64];
	for (uint32_t i = 0; i < set->list.count && i < 64; i++)
		names[i] = set->list.names[i].data;
	opd_status status = access_check_right(request->session->access, RIGHT_DEFAULTS, "set_priority (server)", request->context->server->log, &request->error);
	if (status != OPD_OK)
		return status;
	/* Without an op it is no op's, and not everyone's either. */
	return registry_set_priority(registry, MSG_LEVEL_SERVER, set->op.data == NULL ? "" : set->op.data, set->list.present ? names : NULL, set->list.count, &request->error);
}

static opd_status set_priority(struct request *request, const struct msg_set_priority *set)
{
	if (set->scope == MSG_SCOPE_SERVER)
		return set->session == 0 ? set_server_priority(request, set)
		                         : opd_fail(&request->error, OPD_INVALID_ARGUMENT, "set_priority: session %" PRIu64 " with the server's scope, expected a session's", set->session);
	if (set->session != 0)
		return admin_set_session_priority(request, set);
	return session_set_priority(request->session, request->snapshot, set->op, &set->list, &request->error);
}

void priority_set(struct request *request)
{
	const struct msg_set_priority *set = &request->message.set;
	opd_status status = check_list(request, &set->list);
	if (status == OPD_OK)
		status = set_priority(request, set);
	request->error.status = (int32_t)status;
	request_reply_empty(request);
}

/* Copied: a pop or a reload may drop the list before the reply is encoded for a direct caller. False: no room. */
static bool copy_stored(struct request *request, const struct plist *list, const struct msg_text **stored_out, uint32_t *count_out)
{
	struct msg_text *stored = arena_array(&request->arena, list->count, sizeof stored[0]);
	for (uint32_t i = 0; stored != NULL && i < list->count; i++)
		stored[i] = (struct msg_text){arena_text(&request->arena, list->names[i].data, list->names[i].bytes), list->names[i].bytes};
	*stored_out = stored;
	*count_out = list->count;
	return stored != NULL;
}

/* The lists that narrow this one. False: no room. */
static bool fill_cases(struct request *request, const struct effective *effective, struct msg_priority_reply *reply)
{
	struct msg_priority_case *cases = arena_array(&request->arena, effective->case_count, sizeof cases[0]);
	for (uint32_t i = 0; cases != NULL && i < effective->case_count; i++) {
		const struct effective *narrow = effective->cases[i].effective;
		cases[i].key = msg_text(arena_text(&request->arena, narrow->narrowed, strlen(narrow->narrowed)));
		cases[i].effective = effective_list_names(narrow, narrow->count, &request->arena);
		cases[i].effective_count = narrow->count;
		if (cases[i].key.data == NULL || cases[i].effective == NULL ||
		    !copy_stored(request, narrow->list, &cases[i].stored, &cases[i].stored_count))
			return false;
	}
	reply->cases = cases;
	reply->case_count = effective->case_count;
	return cases != NULL;
}

void priority_get(struct request *request)
{
	const struct op *op = snapshot_find_op(request->snapshot, request->message.op, &request->error);
	if (op == NULL) {
		request_fail(request);
		return;
	}
	struct plist *list = session_priority(request->session, op->index);
	struct effective *effective = list != NULL ? effective_get(request->snapshot, op, list) : effective_ref(op->fallback);
	struct msg_priority_reply *reply = &request->reply.priority;
	*reply = (struct msg_priority_reply){0};
	if (list == NULL && effective->level != MSG_LEVEL_NONE)
		list = effective->list;
	reply->effective = effective == NULL ? NULL : effective_list_names(effective, effective->count, &request->arena);
	bool made = reply->effective != NULL;
	if (made && list != NULL)
		made = copy_stored(request, list, &reply->stored, &reply->stored_count);
	made = made && fill_cases(request, effective, reply);
	if (made) {
		reply->effective_count = effective->count;
		reply->level = effective->level;
	}
	effective_unref(effective);
	if (made) {
		request_reply(request, MSG_REPLY_PRIORITY);
		return;
	}
	(void)opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "get_priority: out of memory");
	request_fail(request);
}
