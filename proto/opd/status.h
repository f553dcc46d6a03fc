/* The one status type of opd: gRPC's canonical codes, and the text that travels with the work.
 *
 * Layer: proto, public (installed as opd/status.h). Header only, so that a provider module links nothing.
 * Threads: values, no shared state. An opd_error belongs to whoever declared it.
 * Not here: why a provider refused a call (that is no failure: opd/provider.h, opd_reason). */
#ifndef OPD_STATUS_H
#define OPD_STATUS_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define OPD_MUST_USE __attribute__((warn_unused_result))
#define OPD_PRINTF(format_index, first) __attribute__((format(printf, format_index, first)))

/* X(name, number): numbers are gRPC's and go on the wire; they never change. */
#define OPD_STATUS_MAP(X)     \
	X(OK, 0)                  \
	X(CANCELLED, 1)           \
	X(UNKNOWN, 2)             \
	X(INVALID_ARGUMENT, 3)    \
	X(DEADLINE_EXCEEDED, 4)   \
	X(NOT_FOUND, 5)           \
	X(ALREADY_EXISTS, 6)      \
	X(PERMISSION_DENIED, 7)   \
	X(RESOURCE_EXHAUSTED, 8)  \
	X(FAILED_PRECONDITION, 9) \
	X(ABORTED, 10)            \
	X(OUT_OF_RANGE, 11)       \
	X(UNIMPLEMENTED, 12)      \
	X(INTERNAL, 13)           \
	X(UNAVAILABLE, 14)        \
	X(DATA_LOSS, 15)          \
	X(UNAUTHENTICATED, 16)

typedef enum opd_status {
#define X(name, number) OPD_##name = number,
	OPD_STATUS_MAP(X)
#undef X
} opd_status;

/* "INVALID_ARGUMENT"; "UNKNOWN" for a number that no code has. */
static inline const char *opd_status_name(opd_status status)
{
	switch (status) {
#define X(name, number) \
	case OPD_##name:    \
		return #name;
		OPD_STATUS_MAP(X)
#undef X
	}
	return "UNKNOWN";
}

/* The code of a name such as "NOT_FOUND"; -1 when no code has it. */
static inline int opd_status_parse(const char *name)
{
#define X(code, number)            \
	if (strcmp(name, #code) == 0)  \
		return number;
	OPD_STATUS_MAP(X)
#undef X
	return -1;
}

#define OPD_ERROR_TEXT_BYTES 504

/* A failure's code and its text for people. 512 bytes, frozen: it crosses the provider ABI. The text names the object, the
 * value seen and what was expected; it is cut, never overrun. It may quote what a peer sent: whoever prints it to a
 * terminal or a log escapes it (proto/text.h). */
typedef struct opd_error {
	int32_t status; /* an opd_status */
	uint32_t retry_after_us; /* of a RESOURCE_EXHAUSTED that time heals: the same may be tried again in about so long; 0: nobody knows */
	char text[OPD_ERROR_TEXT_BYTES];
} opd_error;

/* Writes code and text into `error` (which may be NULL) and returns the code: `return opd_fail(error, OPD_NOT_FOUND, …)`. */
OPD_PRINTF(3, 4)
static inline opd_status opd_fail(opd_error *error, opd_status status, const char *format, ...)
{
	if (error != NULL) {
		error->status = (int32_t)status;
		error->retry_after_us = 0;
		va_list args;
		va_start(args, format);
		(void)vsnprintf(error->text, sizeof error->text, format, args);
		va_end(args);
	}
	return status;
}

/* After opd_fail: when the same may be tried again. At least 1 us, at most what fits (71 minutes). NULL is allowed. */
static inline void opd_error_retry_after(opd_error *error, uint64_t us)
{
	if (error != NULL)
		error->retry_after_us = us == 0 ? 1 : us < UINT32_MAX ? (uint32_t)us : UINT32_MAX;
}

/* Puts "prefix: " before the text of `error` and returns its code; a layer adds at most one. NULL is allowed. */
OPD_PRINTF(3, 4)
static inline opd_status opd_error_prefix(opd_error *error, opd_status status, const char *format, ...)
{
	if (error != NULL) {
		char text[OPD_ERROR_TEXT_BYTES];
		va_list args;
		va_start(args, format);
		int length = vsnprintf(text, sizeof text, format, args);
		va_end(args);
		if (length >= 0 && (size_t)length < sizeof text) {
			(void)snprintf(text + length, sizeof text - (size_t)length, ": %.*s", (int)(sizeof text - (size_t)length),
			               error->text);
			memcpy(error->text, text, sizeof text);
		}
	}
	return status;
}

#endif
