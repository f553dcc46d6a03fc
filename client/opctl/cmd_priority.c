/* priority get, set, clear: the server's default list of an op. */
#include <string.h>

#include "client/opctl/print.h"

typedef enum priority_verb {
	VERB_GET,
	VERB_SET,
	VERB_CLEAR,
	VERB_END,
} priority_verb;

static const struct {
	const char *name;
	size_t arguments; /* the verb included */
} verbs[VERB_END] = {{"get", 2}, {"set", 3}, {"clear", 2}};

static priority_verb find_verb(const struct options *options)
{
	for (int i = 0; i < VERB_END && options->count > 1; i++)
		if (strcmp(options->positional[1], verbs[i].name) == 0 && options->count == verbs[i].arguments + 1)
			return (priority_verb)i;
	return VERB_END;
}

static int print_priority(const struct opctl *ctl, const char *op, const opd_priority *priority)
{
	if (!ctl->json) {
		(void)printf("op         %s\nlevel      %s\n", shown(op), shown(priority->level));
		print_list("stored     ", priority->stored, priority->stored_count);
		print_list("effective  ", priority->effective, priority->effective_count);
		for (uint32_t i = 0; i < priority->case_count; i++) {
			(void)printf("calls of   %s\n", shown(priority->cases[i].key));
			print_list("           ", priority->cases[i].effective, priority->cases[i].effective_count);
		}
		return EXIT_DONE;
	}
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "op", op);
	cJSON_AddStringToObject(document, "level", priority->level);
	cJSON_AddItemToObject(document, "stored", json_texts(priority->stored, priority->stored_count));
	cJSON_AddItemToObject(document, "effective", json_texts(priority->effective, priority->effective_count));
	cJSON *cases = cJSON_AddArrayToObject(document, "cases");
	for (uint32_t i = 0; i < priority->case_count; i++) {
		cJSON *narrow = cJSON_CreateObject();
		cJSON_AddStringToObject(narrow, "key", priority->cases[i].key);
		cJSON_AddItemToObject(narrow, "stored", json_texts(priority->cases[i].stored, priority->cases[i].stored_count));
		cJSON_AddItemToObject(narrow, "effective", json_texts(priority->cases[i].effective, priority->cases[i].effective_count));
		cJSON_AddItemToArray(cases, narrow);
	}
	return print_json(document);
}

/* What holds now, also after a change. */
static int show(struct opctl *ctl, const char *op)
{
	opd_error error;
	const opd_priority *priority;
	const opd_status status = opd_priority_get(ctl->client, op, &priority, &error);
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	const int code = print_priority(ctl, op, priority);
	opd_document_free(priority);
	return code;
}

/* A list for all ops has no effective list of its own. */
static int show_change(struct opctl *ctl, const char *op, priority_verb verb)
{
	if (strcmp(op, "*") != 0)
		return show(ctl, op);
	if (!ctl->json) {
		(void)printf("op         *\n%s\n", verb == VERB_SET ? "set" : "cleared");
		return EXIT_DONE;
	}
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "op", op);
	cJSON_AddBoolToObject(document, "set", verb == VERB_SET);
	return print_json(document);
}

static int set_list(struct opctl *ctl, const char *op, const char *text)
{
	opd_error error;
	struct name_list list;
	if (name_list_parse("the list", text, &list, &error) != OPD_OK)
		return report_usage(ctl, &error);
	opd_status status = opctl_connect(ctl, CONNECT_DAEMON, &error);
	if (status == OPD_OK) {
		const opd_priority_entry entry = {.op = op, .providers = list.names, .count = list.count};
		status = opd_priority_set(ctl->client, OPD_SCOPE_SERVER, &entry, &error);
	}
	name_list_fini(&list);
	return status == OPD_OK ? show_change(ctl, op, VERB_SET) : report_failure(ctl, status, &error);
}

static int clear_list(struct opctl *ctl, const char *op)
{
	opd_error error;
	opd_status status = opctl_connect(ctl, CONNECT_DAEMON, &error);
	if (status == OPD_OK)
		status = opd_priority_clear(ctl->client, OPD_SCOPE_SERVER, op, &error);
	return status == OPD_OK ? show_change(ctl, op, VERB_CLEAR) : report_failure(ctl, status, &error);
}

int cmd_priority(struct opctl *ctl)
{
	const priority_verb verb = find_verb(&ctl->options);
	opd_error error;
	if (verb == VERB_END) {
		(void)opd_fail(&error, OPD_INVALID_ARGUMENT, "expected priority get OP, priority set OP LIST or priority clear OP");
		return report_usage(ctl, &error);
	}
	const char *op = ctl->options.positional[2];
	if (verb == VERB_SET)
		return set_list(ctl, op, ctl->options.positional[3]);
	if (verb == VERB_CLEAR)
		return clear_list(ctl, op);
	const opd_status status = opctl_connect(ctl, CONNECT_ANY, &error);
	return status == OPD_OK ? show(ctl, op) : report_failure(ctl, status, &error);
}
