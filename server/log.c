#include "server/log.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "proto/text.h"

/* A line is at most PIPE_BUF: one write of it never interleaves with another process's, and never blocks once poll has said that a pipe
 * is writable. */
#define LINE_BYTES 4096u
/* Of one text field, escaped. Error texts are 504 bytes; four bytes of output for each still fit the line twice. */
#define FIELD_BYTES 1024u
/* Kept free for the mark of a cut line, the closing brace and the newline. */
#define TAIL_BYTES 24u

struct line {
	size_t used;
	log_format format;
	bool cut;
	char bytes[LINE_BYTES];
};

static const char *const level_names[] = {"error", "warn", "info", "debug"};

int log_level_parse(const char *name)
{
	for (int i = 0; i <= LOG_DEBUG; i++)
		if (strcmp(name, level_names[i]) == 0)
			return i;
	return -1;
}

const char *log_level_name(log_level level)
{
	return level >= LOG_ERROR && level <= LOG_DEBUG ? level_names[level] : "unknown";
}

void log_set_level(struct log *log, log_level level)
{
	atomic_store_explicit(&log->level, (int)level, memory_order_relaxed);
}

static int open_file(const char *path, opd_error *error)
{
	/* O_NONBLOCK: a FIFO that nobody reads is an error now, not a daemon that hangs. */
	int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0640);
	if (fd < 0)
		(void)opd_fail(error, OPD_UNAVAILABLE, "log: can't open %s: %s", path, strerror(errno));
	return fd;
}

opd_status log_init(struct log *log, log_level level, log_format format, const char *path, opd_error *error)
{
	char *copy = NULL;
	int fd = STDERR_FILENO;
	if (path != NULL) {
		copy = strdup(path);
		if (copy == NULL)
			return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "log: out of memory");
		fd = open_file(path, error);
		if (fd < 0) {
			free(copy);
			return OPD_UNAVAILABLE;
		}
	}
	*log = (struct log){.format = format, .path = copy, .fd = fd};
	(void)pthread_mutex_init(&log->mutex, NULL);
	log_set_level(log, level);
	return OPD_OK;
}

void log_fini(struct log *log)
{
	if (log == NULL)
		return;
	if (log->path != NULL) {
		(void)close(log->fd);
		(void)pthread_mutex_destroy(&log->mutex);
	}
	free(log->path);
	log->path = NULL;
	log->fd = -1;
}

opd_status log_reopen(struct log *log, opd_error *error)
{
	if (log->path == NULL)
		return OPD_OK;
	int fd = open_file(log->path, error);
	if (fd < 0)
		return OPD_UNAVAILABLE;
	(void)pthread_mutex_lock(&log->mutex);
	int old = log->fd;
	log->fd = fd;
	log->torn = false; /* the half line, if any, is the old file's */
	(void)pthread_mutex_unlock(&log->mutex);
	(void)close(old);
	return OPD_OK;
}

static bool line_append(struct line *line, const char *bytes, size_t count)
{
	if (count > LINE_BYTES - TAIL_BYTES - line->used)
		return false;
	memcpy(line->bytes + line->used, bytes, count);
	line->used += count;
	return true;
}

/* In quotes, with quotes escaped; in JSON backslashes as well, so that a reader gets the escaped text and no control character even after
 * decoding it. */
static bool line_append_quoted(struct line *line, const char *text)
{
	bool fits = line_append(line, "\"", 1);
	for (; fits && *text != '\0'; text++) {
		if (*text == '"' || (*text == '\\' && line->format == LOG_JSON))
			fits = line_append(line, "\\", 1);
		fits = fits && line_append(line, text, 1);
	}
	return fits && line_append(line, "\"", 1);
}

static bool line_append_text(struct line *line, const char *text)
{
	char escaped[FIELD_BYTES];
	if (text == NULL)
		text = "";
	(void)text_escape(text, strlen(text), escaped, sizeof escaped);
	bool plain = line->format == LOG_TEXT && escaped[0] != '\0' && strpbrk(escaped, " \"=") == NULL;
	return plain ? line_append(line, escaped, strlen(escaped)) : line_append_quoted(line, escaped);
}

static bool line_append_name(struct line *line, const char *name)
{
	if (line->format == LOG_TEXT)
		return line_append(line, " ", 1) && line_append(line, name, strlen(name)) && line_append(line, "=", 1);
	return (line->used == 1 || line_append(line, ",", 1)) && line_append_quoted(line, name) && line_append(line, ":", 1);
}

static bool line_append_value(struct line *line, const struct log_field *field)
{
	char number[24];
	if (field->kind == 's')
		return line_append_text(line, field->text);
	int length = field->kind == 'i' ? snprintf(number, sizeof number, "%" PRId64, field->i)
	                                : snprintf(number, sizeof number, "%" PRIu64, field->u);
	return line_append(line, number, (size_t)length);
}

/* Whole or not at all: a JSON line stays JSON however long its fields are. */
static void line_append_field(struct line *line, const struct log_field *field)
{
	size_t before = line->used;
	if (line_append_name(line, field->name) && line_append_value(line, field))
		return;
	line->used = before;
	line->cut = true;
}

static void format_time(char *out, size_t out_bytes)
{
	struct timespec now;
	struct tm utc;
	(void)clock_gettime(CLOCK_REALTIME, &now);
	(void)gmtime_r(&now.tv_sec, &utc);
	size_t used = strftime(out, out_bytes, "%Y-%m-%dT%H:%M:%S", &utc);
	(void)snprintf(out + used, out_bytes - used, ".%06ldZ", now.tv_nsec / 1000);
}

static void line_begin(struct line *line, log_format format, log_level level, const char *event)
{
	char now[40];
	format_time(now, sizeof now);
	line->format = format;
	line->used = 0;
	line->cut = false;
	if (format == LOG_JSON) {
		(void)line_append(line, "{", 1);
		line_append_field(line, &LOG_STR("time", now));
		line_append_field(line, &LOG_STR("level", log_level_name(level)));
		line_append_field(line, &LOG_STR("event", event));
		return;
	}
	(void)line_append(line, now, strlen(now));
	(void)line_append(line, " ", 1);
	(void)line_append(line, log_level_name(level), strlen(log_level_name(level)));
	(void)line_append(line, " ", 1);
	if (!line_append(line, event, strlen(event)))
		line->cut = true;
}

/* Fits: TAIL_BYTES were kept free. */
static void line_end(struct line *line)
{
	const char *end = line->format == LOG_JSON ? (line->cut ? ",\"cut\":1}\n" : "}\n") : (line->cut ? " cut=1\n" : "\n");
	memcpy(line->bytes + line->used, end, strlen(end));
	line->used += strlen(end);
}

/* Not by blocking: a terminal or a pipe that nobody reads would stop the thread that serves everyone. */
static bool can_write(int fd)
{
	struct pollfd entry = {.fd = fd, .events = POLLOUT};
	return poll(&entry, 1, 0) == 1 && (entry.revents & POLLOUT) != 0 && (entry.revents & (POLLERR | POLLNVAL)) == 0;
}

/* Whole, or counted as lost. A disk that fills up in mid-line leaves half of it: the next line then begins on a new one. */
static bool put(struct log *log, const char *bytes, size_t count)
{
	size_t done = 0;
	while (done < count) {
		if (!can_write(log->fd))
			break;
		ssize_t written = write(log->fd, bytes + done, count - done);
		if (written < 0 && errno == EINTR)
			continue;
		if (written <= 0)
			break;
		done += (size_t)written;
	}
	if (done > 0)
		log->torn = done < count;
	return done == count;
}

static bool put_line(struct log *log, struct line *line)
{
	return (!log->torn || put(log, "\n", 1)) && put(log, line->bytes, line->used);
}

static bool put_lost(struct log *log)
{
	struct line line;
	line_begin(&line, log->format, LOG_WARN, "log lines lost");
	line_append_field(&line, &LOG_UINT("count", log->lost));
	line_end(&line);
	return put_line(log, &line);
}

void log_line(struct log *log, log_level level, const char *event, const struct log_field *fields)
{
	int saved = errno;
	struct line line;
	line_begin(&line, log->format, level, event);
	for (; fields->name != NULL; fields++)
		line_append_field(&line, fields);
	line_end(&line);
	(void)pthread_mutex_lock(&log->mutex);
	if (log->lost > 0 && put_lost(log))
		log->lost = 0;
	if (log->lost > 0 || !put_line(log, &line))
		log->lost++;
	(void)pthread_mutex_unlock(&log->mutex);
	errno = saved;
}

bool log_limit_take(struct log_limit *limit, uint32_t burst, uint32_t *suppressed_out)
{
	struct timespec now;
	*suppressed_out = 0;
	if (burst == 0)
		return true;
	(void)clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	uint64_t minute = (uint64_t)now.tv_sec / 60;
	uint64_t window = atomic_load_explicit(&limit->window, memory_order_relaxed);
	/* Whoever turns the window resets the count; a line counted in between goes to the old or the new one, which doesn't matter. */
	if (window != minute && atomic_compare_exchange_strong(&limit->window, &window, minute))
		atomic_store_explicit(&limit->count, 0, memory_order_relaxed);
	/* The load first: a flood then never wraps the count. */
	if (atomic_load_explicit(&limit->count, memory_order_relaxed) < burst &&
	    atomic_fetch_add_explicit(&limit->count, 1, memory_order_relaxed) < burst) {
		*suppressed_out = atomic_exchange_explicit(&limit->suppressed, 0, memory_order_relaxed);
		return true;
	}
	(void)atomic_fetch_add_explicit(&limit->suppressed, 1, memory_order_relaxed);
	return false;
}
