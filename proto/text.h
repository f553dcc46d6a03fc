/* Text that came from a peer, made fit for a terminal or a log, and checks of names.
 *
 * Layer: proto, internal. Threads: pure. */
#ifndef OPD_PROTO_TEXT_H
#define OPD_PROTO_TEXT_H

#include <stdbool.h>
#include <stddef.h>

/* Writes `bytes` of text into out (size out_bytes ≥ 8, always NUL-terminated): printable UTF-8 stays; control characters (C0, DEL, C1), broken
 * UTF-8, bidirectional and other format characters become \n, \t, \xNN or \u{NNNN}; what doesn't fit is cut and ends in "…". Returns out. */
const char *text_escape(const char *text, size_t bytes, char *out, size_t out_bytes);

/* Valid UTF-8 (no surrogates, no overlong forms, at most U+10FFFF) without NUL. */
bool text_valid(const char *text, size_t bytes);

/* [a-z_][a-z_0-9]*, at most BOUND_NAME_BYTES: names of ops, providers, parameters. */
bool text_is_name(const char *text, size_t bytes);

#endif
