/* Structured log lines: a level, an event, fields; as text or JSON, to stderr or a file that can be rotated.
 *
 * Layer: server, bottom. Threads: any; lines never interleave. Nothing is formatted below the level.
 * Life: log_init, log_line…, log_reopen (on SIGUSR1), log_fini. Several logs may exist (tests, embedded daemons).
 * Every text field is escaped (proto/text.h): a peer's newlines and escape codes reach neither file nor terminal.
 * A full disk or a closed stderr loses lines, counts them, and says so once when writing works again; it never stops the daemon. */
#ifndef OPD_SERVER_LOG_H
#define OPD_SERVER_LOG_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "opd/status.h"

typedef enum log_level {
	LOG_ERROR = 0, /* as opd_log_level of the provider contract */
	LOG_WARN = 1,
	LOG_INFO = 2,
	LOG_DEBUG = 3,
} log_level;

typedef enum log_format {
	LOG_TEXT = 0,
	LOG_JSON = 1,
} log_format;

struct log {
	pthread_mutex_t mutex;
	_Atomic int level;
	log_format format;
	char *path; /* NULL: stderr */
	int fd;
	uint64_t lost; /* lines that could not be written since the last one that was */
	bool torn;     /* the last one that was begun is not whole: the next starts a new line */
};

OPD_MUST_USE opd_status log_init(struct log *log, log_level level, log_format format, const char *path, opd_error *error);
void log_fini(struct log *log);

/* Opens the file again by its path; keeps the old one when that fails. */
OPD_MUST_USE opd_status log_reopen(struct log *log, opd_error *error);

static inline bool log_enabled(const struct log *log, log_level level)
{
	return (int)level <= atomic_load_explicit(&log->level, memory_order_relaxed);
}
void log_set_level(struct log *log, log_level level);
/* -1: no such level */
int log_level_parse(const char *name);
const char *log_level_name(log_level level);

/* One field. Make them with LOG_STR and the like. */
struct log_field {
	const char *name;
	char kind; /* 's' text, 'i' signed, 'u' unsigned */
	union {
		const char *text; /* NULL prints as "" */
		int64_t i;
		uint64_t u;
	};
};
#define LOG_STR(key, value) ((struct log_field){.name = (key), .kind = 's', .text = (value)})
#define LOG_INT(key, value) ((struct log_field){.name = (key), .kind = 'i', .i = (int64_t)(value)})
#define LOG_UINT(key, value) ((struct log_field){.name = (key), .kind = 'u', .u = (uint64_t)(value)})

/* LOG(log, LOG_WARN, "priority not set", LOG_STR("op", name)): event is a constant phrase, fields carry what varies. Arguments are evaluated only at that level. */
#define LOG(log, level, event, ...)                                                                                       \
	do {                                                                                                                  \
		if (log_enabled((log), (level)))                                                                                  \
			log_line((log), (level), (event), (const struct log_field[]){__VA_ARGS__ __VA_OPT__(, ){0}});                 \
	} while (0)

/* fields ends with one whose name is NULL. */
void log_line(struct log *log, log_level level, const char *event, const struct log_field *fields);

/* At most `burst` lines of one kind a minute; the suppressed are counted. Zeroed memory is a fresh one. Threads: any. */
struct log_limit {
	_Atomic uint64_t window; /* minute of the monotonic clock */
	_Atomic uint32_t count;
	_Atomic uint32_t suppressed;
};
/* True: write the line, and put *suppressed_out (of windows before) into it where it isn't 0. burst 0: always. */
bool log_limit_take(struct log_limit *limit, uint32_t burst, uint32_t *suppressed_out);

/* LOG for a line that clients can cause as often as they like; the next one that is written says how many weren't. */
#define LOG_LIMITED(log, level, limit, burst, event, ...)                                                                              \
	do {                                                                                                                               \
		uint32_t suppressed_;                                                                                                          \
		if (log_enabled((log), (level)) && log_limit_take((limit), (burst), &suppressed_))                                             \
			log_line((log), (level), (event),                                                                                          \
			         (const struct log_field[]){__VA_ARGS__, suppressed_ > 0 ? LOG_UINT("suppressed", suppressed_) : (struct log_field){0}, {0}}); \
	} while (0)

#endif
