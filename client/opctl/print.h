/* What opctl writes: tables and lines for people, one JSON document for programs, errors.
 *
 * Layer: client/opctl. Threads: one.
 * Nothing that came from a peer, a file or the command line reaches the terminal raw: texts go through shown(), JSON is written
 * in printable ASCII. */
#ifndef OPCTL_PRINT_H
#define OPCTL_PRINT_H

#include <cjson/cJSON.h>

#include "client/opctl/opctl.h"

/* The text with control and other unprintable characters escaped. Valid until the eighth call after it; "" for NULL. */
const char *shown(const char *text);

/* Prints "opctl: STATUS: text" on stderr (and with --json {"status", "message"} on stdout) and returns the exit code:
 * EXIT_UNREACHABLE for UNAVAILABLE and UNAUTHENTICATED (which only connecting ends with), else EXIT_REQUEST. */
int report_failure(const struct opctl *ctl, opd_status status, const opd_error *error);
/* The same, for a command line that can't be understood: returns EXIT_USAGE. */
int report_usage(const struct opctl *ctl, const opd_error *error);

/* "opctl: note: …" on stderr. Arguments from outside must be shown() ones. */
OPD_PRINTF(1, 2)
void print_note(const char *format, ...);

/* Prints the document on stdout, one line, and deletes it. Returns EXIT_DONE, or EXIT_REQUEST when memory ran out. */
int print_json(cJSON *document);

/* Numbers that JSON's doubles would spoil; NaN and infinities are the texts "nan", "inf", "-inf". */
cJSON *json_u64(uint64_t value);
cJSON *json_i64(int64_t value);
cJSON *json_f64(double value);
cJSON *json_texts(const char *const *texts, size_t count);

/* "a, b" for people, shown; "(empty)" where there is none. Printed, with a line's end. */
void print_list(const char *label, const char *const *texts, size_t count);

/* "realtime"; "?" for one that opctl doesn't know. */
const char *class_text(opd_class service_class);
/* Nanoseconds as "812 ns", "1.23 us", "4.56 ms", "7.89 s". Valid until the eighth call after it. */
const char *duration_text(double ns);
/* "3.2 MiB"; as above. */
const char *bytes_text(uint64_t bytes);

#endif
