/* Why an implementation doesn't take a call: a short code that machines may count, and a detail for people.
 *
 * Layer: proto (its numbers go on the wire), public (installed as opd/reason.h), header only. Threads: values.
 * A refusal is no error: dispatch goes on with the next in the list. Preference is no reason ("slower here" belongs in the
 * priority list); a reason says what the implementation cannot do. */
#ifndef OPD_REASON_H
#define OPD_REASON_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "opd/status.h"

/* X(name, number, text): numbers go on the wire and never change; new ones are added at the end. */
#define OPD_REASON_MAP(X)             \
	X(NONE, 0, "none")                \
	X(PLATFORM, 1, "platform")        /* static: instruction set, operating system, device kind */   \
	X(LIBRARY, 2, "library")          /* static: a library is missing, too old, or failed to start */ \
	X(MODULE, 3, "module")            /* static: the configured module could not be loaded */         \
	X(QUARANTINE, 4, "quarantine")    /* static: the daemon took it out after failures */             \
	X(DTYPE, 5, "dtype")              \
	X(SHAPE, 6, "shape")              \
	X(LAYOUT, 7, "layout")            /* strides */                                                   \
	X(ALIGNMENT, 8, "alignment")      \
	X(ATTRIBUTE, 9, "attribute")      /* a value of an int, float, bool or str argument */            \
	X(ARGUMENT, 10, "argument")       /* an optional tensor that is there, or isn't */                \
	X(SCHEMA, 11, "schema")           /* an argument that its older schema doesn't know */            \
	X(DEVICE, 12, "device")           /* the request wants another device */                          \
	X(SIZE, 13, "size")               /* too large for its index type or scratch */                   \
	X(PLAN, 14, "plan")               /* its plan found out */                                        \
	X(NO_IMPLEMENTATION, 15, "no implementation") /* named through `*`, has none of this op */ \
	X(PERMISSION, 16, "permission")   /* not for this session's identity */

typedef enum opd_reason_code {
#define X(name, number, text) OPD_REASON_##name = number,
	OPD_REASON_MAP(X)
#undef X
} opd_reason_code;

static inline const char *opd_reason_code_text(opd_reason_code code)
{
	switch (code) {
#define X(name, number, text)  \
	case OPD_REASON_##name:    \
		return text;
		OPD_REASON_MAP(X)
#undef X
	}
	return "unknown";
}

/* 256 bytes, frozen: it crosses the provider ABI. Printed as "dtype: weight bf16, x f32". */
typedef struct opd_reason {
	int32_t code; /* an opd_reason_code */
	char detail[252];
} opd_reason;

OPD_PRINTF(3, 4)
static inline void opd_reason_set(opd_reason *reason, opd_reason_code code, const char *format, ...)
{
	reason->code = (int32_t)code;
	va_list args;
	va_start(args, format);
	(void)vsnprintf(reason->detail, sizeof reason->detail, format, args);
	va_end(args);
}

/* `return OPD_REFUSE(reason, OPD_REASON_DTYPE, "weight %s, x %s", …);` in a predicate: false, and the text only where somebody
 * asked for it (reason is NULL on the hot path, and then no argument is evaluated). */
#define OPD_REFUSE(reason, code, ...) ((reason) != NULL ? opd_reason_set((reason), (code), __VA_ARGS__) : (void)0, false)

#endif
