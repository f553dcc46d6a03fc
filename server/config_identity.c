/* Identities, what they may do, and the file of their tokens. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/text.h"
#include "server/config_internal.h"

#define TOKENS_BYTES_MAX (256u << 10)
#define TOKENS_MAX 4096u

/* ---- Entries ---- */

static struct config_identity *find(const struct config *config, const char *name)
{
	for (size_t i = 0; i < config->identity_count; i++)
		if (strcmp(config->identities[i].access->identity, name) == 0)
			return &config->identities[i];
	return NULL;
}

static opd_status out_of_memory(opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory");
}

static bool parse_id(const char *text, uint32_t *id_out)
{
	char *end;
	const unsigned long long id = text[0] >= '0' && text[0] <= '9' ? strtoull(text, &end, 10) : UINT64_MAX;
	if (id >= UINT32_MAX || *end != '\0') /* the last one is nobody's */
		return false;
	*id_out = (uint32_t)id;
	return true;
}

opd_status config_begin_identity(struct config *config, const char *name, unsigned line, struct config_identity **identity_out, opd_error *error)
{
	const struct config_identity *before = find(config, name);
	if (before != NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "there already, in line %u", before->line);
	if (name[0] == '\0' || strlen(name) >= IDENTITY_BYTES)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "a name of %zu bytes, expected 1 to %u, such as alice, uid:1000, anonymous or \"*\"", strlen(name), IDENTITY_BYTES - 1);
	struct config_identity *grown = reallocarray(config->identities, config->identity_count + 1, sizeof *grown);
	if (grown == NULL)
		return out_of_memory(error);
	config->identities = grown;
	struct config_identity *identity = &grown[config->identity_count];
	uint32_t uid = 0;
	*identity = (struct config_identity){.access = access_create(name, name, ACCESS_USER), .line = line};
	if (identity->access == NULL)
		return out_of_memory(error);
	identity->has_uid = strncmp(name, "uid:", 4) == 0 && parse_id(name + 4, &uid);
	identity->uid = uid;
	config->identity_count++;
	*identity_out = identity;
	return OPD_OK;
}

static opd_status set_id(const char *what, const char *value, bool *has_out, uint32_t *id_out, opd_error *error)
{
	if (!parse_id(value, id_out))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected a number as `id` prints it for the %s", value, what);
	*has_out = true;
	return OPD_OK;
}

static opd_status set_certificate(struct config_identity *identity, const char *value, opd_error *error)
{
	const char *name = identity->access->identity;
	if (strcmp(name, "*") == 0 || strcmp(name, "anonymous") == 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s has no certificate of its own", name);
	if (value[0] == '\0' || strlen(value) >= SUBJECT_BYTES || strchr(value, '=') == NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.200s\", expected a subject of at most %u bytes such as CN=alice,O=Example (openssl x509 -subject -nameopt RFC2253)", value,
		                SUBJECT_BYTES - 1);
	free(identity->certificate);
	identity->certificate = strdup(value);
	return identity->certificate != NULL ? OPD_OK : out_of_memory(error);
}

static opd_status set_tenant(struct config_identity *identity, const char *value, opd_error *error)
{
	if (value[0] == '\0' || strlen(value) >= IDENTITY_BYTES)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "a name of %zu bytes, expected 1 to %u", strlen(value), IDENTITY_BYTES - 1);
	(void)snprintf(identity->access->tenant, sizeof identity->access->tenant, "%s", value);
	return OPD_OK;
}

opd_status config_set_identity(struct config_identity *identity, const char *key, const char *value, opd_error *error)
{
	if (strcmp(key, "certificate") == 0)
		return set_certificate(identity, value, error);
	if (strcmp(key, "tenant") == 0)
		return set_tenant(identity, value, error);
	if (strcmp(key, "uid") == 0)
		return set_id("user", value, &identity->has_uid, &identity->uid, error);
	if (strcmp(key, "gid") == 0)
		return set_id("group", value, &identity->has_gid, &identity->gid, error);
	return opd_fail(error, OPD_NOT_FOUND, "no such key");
}

static opd_status add_right(struct access *access, const char *name, opd_error *error)
{
	if (name == NULL)
		access->rights = 1u << RIGHT_NONE;
	else if (strcmp(name, "admin") == 0)
		access->rights |= ACCESS_ALL;
	else if (access_right_parse(name) == RIGHT_COUNT)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected publish, defaults, modules, sessions, log, drain, operate, or admin for all of them", name);
	else
		access->rights |= 1u << access_right_parse(name);
	return OPD_OK;
}

static opd_status add_class(struct access *access, const char *name, opd_error *error)
{
	const sched_class class = name == NULL ? CLASS_COUNT : sched_class_parse(name, strlen(name));
	if (name == NULL)
		access->classes = 0;
	else if (class == CLASS_COUNT)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\", expected realtime, interactive or batch", name);
	else
		access->classes |= 1u << class;
	return OPD_OK;
}

static opd_status add_name(struct access_list **list, const char *what, const char *name, opd_error *error)
{
	if (name != NULL && !text_is_name(name, strlen(name)))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "\"%.64s\" is no %s's name", name, what);
	return access_list_add(list, name) ? OPD_OK : out_of_memory(error);
}

opd_status config_add_to_identity(struct config_identity *identity, const char *list, const char *name, opd_error *error)
{
	struct access *access = identity->access;
	if (strcmp(list, "rights") == 0)
		return add_right(access, name, error);
	if (strcmp(list, "classes") == 0)
		return add_class(access, name, error);
	if (strcmp(list, "ops") == 0)
		return add_name(&access->ops, "op", name, error);
	if (strcmp(list, "providers") == 0)
		return add_name(&access->providers, "provider", name, error);
	return opd_fail(error, OPD_NOT_FOUND, "no such list");
}

void config_clear_identities(struct config *config)
{
	for (size_t i = 0; i < config->identity_count; i++) {
		access_unref(config->identities[i].access);
		free(config->identities[i].certificate);
	}
	free(config->identities);
	free(config->tokens);
	free(config->tokens_path);
	config->identities = NULL;
	config->tokens = NULL;
	config->tokens_path = NULL;
	config->identity_count = config->token_count = 0;
}

/* ---- As text ---- */

static void print_list(FILE *stream, const char *name, const struct access_list *list)
{
	if (list == NULL)
		return;
	(void)fprintf(stream, ", %s: [", name);
	for (size_t i = 0; i < list->count; i++)
		(void)fprintf(stream, "%s%s", i > 0 ? ", " : "", list->names[i]);
	(void)fputc(']', stream);
}

static void print_rights(FILE *stream, const struct access *access)
{
	const char *comma = "";
	(void)fputs(", rights: [", stream);
	for (access_right right = RIGHT_OPERATE; right < RIGHT_COUNT; right++) {
		if (!access_may(access, right))
			continue;
		(void)fprintf(stream, "%s%s", comma, access_right_name(right));
		comma = ", ";
	}
	comma = "";
	(void)fputs("], classes: [", stream);
	for (int class = 0; class < CLASS_COUNT; class++) {
		if ((access->classes >> class & 1) == 0)
			continue;
		(void)fprintf(stream, "%s%s", comma, sched_class_name((sched_class)class));
		comma = ", ";
	}
	(void)fputc(']', stream);
}

char *config_identity_text(const struct config_identity *identity)
{
	char *text = NULL;
	size_t bytes;
	FILE *stream = open_memstream(&text, &bytes);
	if (stream == NULL)
		return NULL;
	(void)fprintf(stream, "{tenant: %s", identity->access->tenant);
	if (identity->certificate != NULL)
		(void)fprintf(stream, ", certificate: \"%s\"", identity->certificate);
	if (identity->has_uid)
		(void)fprintf(stream, ", uid: %u", (unsigned)identity->uid);
	if (identity->has_gid)
		(void)fprintf(stream, ", gid: %u", (unsigned)identity->gid);
	print_rights(stream, identity->access);
	print_list(stream, "ops", identity->access->ops);
	print_list(stream, "providers", identity->access->providers);
	(void)fputc('}', stream);
	if (fclose(stream) != 0) {
		free(text);
		return NULL;
	}
	return text;
}

/* ---- Tokens ---- */

static int digit(char c)
{
	return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static bool parse_hash(const char *text, uint8_t out[TOKEN_HASH_BYTES])
{
	for (size_t i = 0; i < TOKEN_HASH_BYTES; i++) {
		const int high = digit(text[2 * i]), low = high < 0 ? -1 : digit(text[2 * i + 1]);
		if (low < 0)
			return false;
		out[i] = (uint8_t)(16 * high + low);
	}
	return text[2 * TOKEN_HASH_BYTES] == '\0';
}

/* "NAME sha256:HEX"; `line` is cut up. */
static opd_status read_token(struct config *config, char *line, unsigned number, opd_error *error)
{
	const char *path = config->tokens_path;
	line += strspn(line, " \t");
	if (line[0] == '\0' || line[0] == '#')
		return OPD_OK;
	size_t bytes = strlen(line);
	while (bytes > 0 && (line[bytes - 1] == ' ' || line[bytes - 1] == '\t' || line[bytes - 1] == '\r'))
		line[--bytes] = '\0';
	char *space = line + strcspn(line, " \t");
	char *hash = space + strspn(space, " \t");
	*space = '\0';
	struct config_token *token = &config->tokens[config->token_count];
	if (strlen(line) >= IDENTITY_BYTES || !text_valid(line, strlen(line)) || strncmp(hash, "sha256:", 7) != 0 || !parse_hash(hash + 7, token->hash))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s:%u: expected an identity's name (at most %u bytes), a space, and sha256: with 64 lower-case hexadecimal digits, as `opctl token new` makes it",
		                path, number, IDENTITY_BYTES - 1);
	if (strcmp(line, "anonymous") == 0 || strcmp(line, "*") == 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%s:%u: %s can't have a token", path, number, line);
	(void)snprintf(token->identity, sizeof token->identity, "%s", line);
	config->token_count++;
	return OPD_OK;
}

static opd_status check_tokens_file(const char *path, const struct stat *info, opd_error *error)
{
	if (!S_ISREG(info->st_mode))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tokens: %s: is not a regular file", path);
	if (info->st_uid != 0 && info->st_uid != geteuid())
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tokens: %s: belongs to user %u, expected root or the daemon's own (%u)", path, (unsigned)info->st_uid, (unsigned)geteuid());
	if ((info->st_mode & 077) != 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tokens: %s: has mode %04o, expected one that lets only its owner read and write it (0600)", path, (unsigned)(info->st_mode & 07777));
	if (info->st_size > TOKENS_BYTES_MAX)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tokens: %s: has %lld bytes, expected at most %u", path, (long long)info->st_size, TOKENS_BYTES_MAX);
	return OPD_OK;
}

static opd_status read_tokens(struct config *config, char *text, size_t bytes, opd_error *error)
{
	if (memchr(text, '\0', bytes) != NULL)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tokens: %s: there is a NUL in it", config->tokens_path);
	config->tokens = calloc(TOKENS_MAX + 1, sizeof *config->tokens);
	if (config->tokens == NULL)
		return out_of_memory(error);
	opd_status status = OPD_OK;
	unsigned number = 0;
	for (char *line; status == OPD_OK && (line = strsep(&text, "\n")) != NULL;) {
		if (config->token_count == TOKENS_MAX)
			return opd_fail(error, OPD_INVALID_ARGUMENT, "tokens: %s: more than %u tokens", config->tokens_path, TOKENS_MAX);
		status = read_token(config, line, ++number, error);
	}
	struct config_token *fitting = status == OPD_OK ? reallocarray(config->tokens, config->token_count + 1, sizeof *fitting) : NULL;
	if (fitting != NULL)
		config->tokens = fitting;
	return status;
}

opd_status config_load_tokens(struct config *config, opd_error *error)
{
	const char *path = config->tokens_path;
	struct stat info;
	if (path == NULL)
		return OPD_OK;
	const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	if (fd < 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "tokens: %s: %s", path, strerror(errno));
	opd_status status = fstat(fd, &info) == 0 ? check_tokens_file(path, &info, error) : opd_fail(error, OPD_INVALID_ARGUMENT, "tokens: %s: %s", path, strerror(errno));
	char *text = status == OPD_OK ? calloc(1, TOKENS_BYTES_MAX + 1) : NULL;
	if (status == OPD_OK && text == NULL)
		status = out_of_memory(error);
	const ssize_t got = text != NULL ? read(fd, text, TOKENS_BYTES_MAX) : 0; /* a regular file's read is whole, or the file is cut off: then a line is wrong */
	if (status == OPD_OK)
		status = got >= 0 ? read_tokens(config, text, (size_t)got, error) : opd_fail(error, OPD_INVALID_ARGUMENT, "tokens: %s: %s", path, strerror(errno));
	free(text);
	(void)close(fd);
	return status;
}
