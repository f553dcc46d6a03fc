/* The command line: options anywhere, positional arguments in order.
 *
 * Layer: client/opctl. Threads: one.
 * An argument that starts with '-' and then a digit, '.' or "inf" is a number, not an option; "--" ends the options.
 * "--name=value" and "--name value" are the same. An option given twice is an error. */
#ifndef OPCTL_OPTIONS_H
#define OPCTL_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "opd/dtype.h"
#include "opd/status.h"

/* X(id, long name, short name or 0, value's name or NULL for a switch) */
#define OPTION_MAP(X)                                                                                                            \
	X(CONNECT, "connect", 0, "ADDRESS")                                                                                          \
	X(CA, "ca", 0, "FILE")                                                                                                       \
	X(CERT, "cert", 0, "FILE")                                                                                                   \
	X(KEY, "key", 0, "FILE")                                                                                                     \
	X(SERVER_NAME, "server-name", 0, "NAME")                                                                                     \
	X(FINGERPRINT, "fingerprint", 0, "SHA256")                                                                                   \
	X(TOKEN_FILE, "token-file", 0, "FILE")                                                                                       \
	X(RINGS, "rings", 0, NULL)                                                                                                   \
	X(POLL, "poll", 0, "US")                                                                                                     \
	X(JSON, "json", 0, NULL)                                                                                                     \
	X(HELP, "help", 'h', NULL)                                                                                                   \
	X(VERSION, "version", 0, NULL)                                                                                               \
	X(OUTPUT, "output", 'o', "FILE")                                                                                             \
	X(PRIORITY, "priority", 0, "LIST")                                                                                           \
	X(STRICT, "strict", 0, NULL)                                                                                                 \
	X(DEVICE, "device", 0, "DEVICE")                                                                                             \
	X(UUID, "uuid", 0, NULL)                                                                                                     \
	X(CLASS, "class", 0, "CLASS")                                                                                                \
	X(TIMEOUT, "timeout", 0, "SECONDS")                                                                                          \
	X(EXPLAIN, "explain", 0, NULL)                                                                                               \
	X(RETRY, "retry", 0, NULL)                                                                                                   \
	X(TF32, "allow-tf32", 0, NULL)                                                                                               \
	X(SEED, "seed", 0, "N")                                                                                                      \
	X(PROVIDER, "provider", 0, "PROVIDER")                                                                                       \
	X(AS, "as", 0, "NAME")                                                                                                       \
	X(ALL, "all", 0, NULL)                                                                                                       \
	X(SHAPE, "shape", 0, "SIZES")                                                                                                \
	X(DTYPE, "dtype", 0, "DTYPE")                                                                                                \
	X(IN_FLIGHT, "in-flight", 0, "N")                                                                                            \
	X(DURATION, "duration", 0, "SECONDS")                                                                                        \
	X(WARMUP, "warmup", 0, "SECONDS")                                                                                            \
	X(VARIANT, "variant", 0, "N")                                                                                                \
	X(RESIDENT, "resident", 0, NULL)                                                                                             \
	X(COUNT, "count", 'c', "N")                                                                                                  \
	X(SHM, "shm", 0, NULL)                                                                                                       \
	X(SORT, "sort", 0, "KEY")                                                                                                    \
	X(MODULE, "module", 0, "PATH")

typedef enum option_id {
#define X(id, name, letter, value) OPTION_##id,
	OPTION_MAP(X)
#undef X
	    OPTION_END,
} option_id;

/* That a command takes an option, and what it means there. */
struct option_use {
	option_id id;
	const char *help;
};

struct options {
	const char *values[OPTION_END]; /* NULL: not given; "" for a switch */
	char **positional;              /* owned array, borrowed texts; [0] is the command */
	size_t count;
};

/* Sorts argv. INVALID_ARGUMENT names the option. Fini in either case. */
OPD_MUST_USE opd_status options_parse(struct options *options, int argc, char **argv, opd_error *error);
void options_fini(struct options *options);

/* INVALID_ARGUMENT names the first option given that is neither for every command nor in `uses`. */
OPD_MUST_USE opd_status options_check(const struct options *options, const char *command, const struct option_use *uses,
                                      opd_error *error);

bool options_has(const struct options *options, option_id id);

/* "--output FILE, -o" and the like, for help. */
void options_describe(option_id id, char *out, size_t out_bytes);

/* Values, parsed strictly: the whole text, in range. `what` names them in errors ("--seed"). */
OPD_MUST_USE opd_status parse_int(const char *what, const char *text, int64_t low, int64_t high, int64_t *value_out,
                                  opd_error *error);
OPD_MUST_USE opd_status parse_float(const char *what, const char *text, double *value_out, opd_error *error);
OPD_MUST_USE opd_status parse_seconds(const char *what, const char *text, uint64_t *us_out, opd_error *error);
OPD_MUST_USE opd_status parse_dtype(const char *what, const char *text, opd_dtype *dtype_out, opd_error *error);

/* The option's value, or `otherwise` where it isn't given. */
OPD_MUST_USE opd_status options_int(const struct options *options, option_id id, int64_t low, int64_t high, int64_t otherwise,
                                    int64_t *value_out, opd_error *error);
OPD_MUST_USE opd_status options_seconds(const struct options *options, option_id id, uint64_t otherwise_us, uint64_t *us_out,
                                        opd_error *error);

/* "a,b": names, at most BOUND_PROVIDERS; "": none. */
struct name_list {
	char *text; /* owned */
	const char **names;
	size_t count;
};
OPD_MUST_USE opd_status name_list_parse(const char *what, const char *text, struct name_list *list, opd_error *error);
void name_list_fini(struct name_list *list);

#endif
