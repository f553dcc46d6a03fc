/* token: makes one, and what the daemon is told of it. Talks to no daemon. */
#include <errno.h>
#include <openssl/evp.h>
#include <string.h>
#include <sys/random.h>

#include "client/opctl/print.h"

#define SECRET_BYTES 32u
#define NAME_BYTES_MAX 63u

static void write_hex(const unsigned char *bytes, size_t count, char *out)
{
	for (size_t i = 0; i < count; i++)
		(void)snprintf(out + 2 * i, 3, "%02x", bytes[i]);
}

/* A name that a line of the tokens' file can hold. */
static opd_status check_name(const char *name, opd_error *error)
{
	const size_t bytes = strlen(name);
	if (bytes == 0 || bytes > NAME_BYTES_MAX || strpbrk(name, " \t\r\n") != NULL || name[0] == '#' || strcmp(name, "*") == 0 || strcmp(name, "anonymous") == 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "token new: \"%.80s\" is no identity's name, expected 1 to %u bytes without blanks", name, NAME_BYTES_MAX);
	return OPD_OK;
}

static opd_status make(const char *name, char token[80], char line[200], opd_error *error)
{
	unsigned char secret[SECRET_BYTES], hash[32];
	char digits[2 * sizeof hash + 1];
	unsigned length = sizeof hash;
	if (getrandom(secret, sizeof secret, 0) != (ssize_t)sizeof secret)
		return opd_fail(error, OPD_INTERNAL, "token new: no random numbers: %s", strerrordesc_np(errno));
	(void)snprintf(token, 80, "opd_");
	write_hex(secret, sizeof secret, token + 4);
	if (EVP_Digest(token, strlen(token), hash, &length, EVP_sha256(), NULL) != 1)
		return opd_fail(error, OPD_INTERNAL, "token new: SHA-256 failed");
	write_hex(hash, sizeof hash, digits);
	(void)snprintf(line, 200, "%s sha256:%s", name, digits);
	return OPD_OK;
}

int cmd_token(struct opctl *ctl)
{
	opd_error error;
	char token[80], line[200];
	if (ctl->options.count != 3 || strcmp(ctl->options.positional[1], "new") != 0) {
		(void)opd_fail(&error, OPD_INVALID_ARGUMENT, "expected token new NAME");
		return report_usage(ctl, &error);
	}
	opd_status status = check_name(ctl->options.positional[2], &error);
	if (status == OPD_OK)
		status = make(ctl->options.positional[2], token, line, &error);
	if (status != OPD_OK)
		return report_failure(ctl, status, &error);
	if (!ctl->json) {
		(void)printf("token  %s\nline   %s\n", token, shown(line));
		return EXIT_DONE;
	}
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "token", token);
	cJSON_AddStringToObject(document, "line", line);
	return print_json(document);
}
