#include "client/opctl/print.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/text.h"

enum { RING = 8 };

const char *shown(const char *text)
{
	static char *ring[RING];
	static unsigned next;
	if (text == NULL)
		return "";
	const size_t bytes = strlen(text);
	/* The worst: a byte becomes \xNN; a cut mark fits too. */
	const size_t out_bytes = bytes * 4 + 16;
	free(ring[next % RING]);
	char *out = malloc(out_bytes);
	ring[next++ % RING] = out;
	return out == NULL ? "(out of memory)" : text_escape(text, bytes, out, out_bytes);
}

static void report(const struct opctl *ctl, opd_status status, const opd_error *error)
{
	(void)fflush(stdout);
	(void)fprintf(stderr, "opctl: %s: %s\n", opd_status_name(status), shown(error->text));
	if (!ctl->json)
		return;
	cJSON *document = cJSON_CreateObject();
	cJSON_AddStringToObject(document, "status", opd_status_name(status));
	cJSON_AddStringToObject(document, "message", error->text);
	if (error->retry_after_us != 0)
		cJSON_AddNumberToObject(document, "retry_after_us", error->retry_after_us);
	(void)print_json(document);
}

int report_failure(const struct opctl *ctl, opd_status status, const opd_error *error)
{
	report(ctl, status, error);
	return status == OPD_UNAVAILABLE || status == OPD_UNAUTHENTICATED ? EXIT_UNREACHABLE : EXIT_REQUEST;
}

int report_usage(const struct opctl *ctl, const opd_error *error)
{
	report(ctl, OPD_INVALID_ARGUMENT, error);
	return EXIT_USAGE;
}

void print_note(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	(void)fflush(stdout);
	(void)fputs("opctl: note: ", stderr);
	(void)vfprintf(stderr, format, args);
	(void)fputc('\n', stderr);
	va_end(args);
}

/* Decodes one character of UTF-8 past ASCII; returns its bytes, 1 with U+FFFD where it is none. */
static size_t decode(const unsigned char *at, uint32_t *code_out)
{
	const unsigned char lead = at[0];
	const size_t bytes = lead >= 0xf0 && lead < 0xf5 ? 4 : lead >= 0xe0 && lead < 0xf0 ? 3 : lead >= 0xc2 && lead < 0xe0 ? 2 : 0;
	uint32_t code = bytes == 4 ? lead & 7u : bytes == 3 ? lead & 15u : lead & 31u;
	*code_out = 0xfffd;
	for (size_t i = 1; i < bytes; i++) {
		if ((at[i] & 0xc0) != 0x80)
			return 1;
		code = code << 6 | (at[i] & 63u);
	}
	if (bytes == 0 || code > 0x10ffff || (code >= 0xd800 && code < 0xe000) ||
	    code < (bytes == 4   ? 0x10000u
	            : bytes == 3 ? 0x800u
	                         : 0x80u))
		return 1;
	*code_out = code;
	return bytes;
}

/* cJSON escapes C0 only: DEL, C1 and direction marks inside its texts would reach the terminal. */
static void put_ascii(const char *text)
{
	const unsigned char *at = (const unsigned char *)text;
	while (*at != '\0') {
		if (*at < 0x7f) {
			(void)putchar(*at++);
			continue;
		}
		uint32_t code = 0x7f;
		at += *at == 0x7f ? 1 : decode(at, &code);
		if (code > 0xffff)
			(void)printf("\\u%04x\\u%04x", 0xd800 + ((code - 0x10000) >> 10), 0xdc00 + ((code - 0x10000) & 0x3ff));
		else
			(void)printf("\\u%04x", code);
	}
	(void)putchar('\n');
}

int print_json(cJSON *document)
{
	char *text = cJSON_PrintUnformatted(document);
	cJSON_Delete(document);
	if (text == NULL) {
		(void)fputs("opctl: RESOURCE_EXHAUSTED: out of memory\n", stderr);
		return EXIT_REQUEST;
	}
	put_ascii(text);
	cJSON_free(text);
	return EXIT_DONE;
}

cJSON *json_u64(uint64_t value)
{
	char text[24];
	(void)snprintf(text, sizeof text, "%" PRIu64, value);
	return cJSON_CreateRaw(text);
}

cJSON *json_i64(int64_t value)
{
	char text[24];
	(void)snprintf(text, sizeof text, "%" PRId64, value);
	return cJSON_CreateRaw(text);
}

cJSON *json_f64(double value)
{
	char text[40];
	if (!isfinite(value))
		return cJSON_CreateString(isnan(value) ? "nan" : value > 0 ? "inf" : "-inf");
	(void)snprintf(text, sizeof text, "%.17g", value);
	return cJSON_CreateRaw(text);
}

cJSON *json_texts(const char *const *texts, size_t count)
{
	cJSON *array = cJSON_CreateArray();
	for (size_t i = 0; i < count; i++)
		cJSON_AddItemToArray(array, cJSON_CreateString(texts[i]));
	return array;
}

void print_list(const char *label, const char *const *texts, size_t count)
{
	(void)printf("%s", label);
	for (size_t i = 0; i < count; i++)
		(void)printf("%s%s", i == 0 ? "" : ", ", shown(texts[i]));
	(void)puts(count == 0 ? "(empty)" : "");
}

const char *class_text(opd_class service_class)
{
	static const char *const names[] = {"normal", "realtime", "interactive", "batch"};
	return (unsigned)service_class < sizeof names / sizeof names[0] ? names[service_class] : "?";
}

static char *ring_text(void)
{
	static char ring[RING][32];
	static unsigned next;
	return ring[next++ % RING];
}

const char *duration_text(double ns)
{
	char *out = ring_text();
	if (ns < 1e3)
		(void)snprintf(out, 32, "%.0f ns", ns);
	else if (ns < 1e6)
		(void)snprintf(out, 32, "%.2f us", ns / 1e3);
	else if (ns < 1e9)
		(void)snprintf(out, 32, "%.2f ms", ns / 1e6);
	else
		(void)snprintf(out, 32, "%.2f s", ns / 1e9);
	return out;
}

const char *bytes_text(uint64_t bytes)
{
	static const char *const units[] = {"KiB", "MiB", "GiB", "TiB"};
	char *out = ring_text();
	if (bytes < 1024) {
		(void)snprintf(out, 32, "%" PRIu64 " bytes", bytes);
		return out;
	}
	double value = (double)bytes / 1024;
	size_t unit = 0;
	for (; value >= 1024 && unit + 1 < sizeof units / sizeof units[0]; unit++)
		value /= 1024;
	(void)snprintf(out, 32, "%.1f %s", value, units[unit]);
	return out;
}
