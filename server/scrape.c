#include "server/scrape.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/daemon.h"
#include "server/request.h"
#include "server/stats.h"

#define SCRAPES_MAX 16u
#define HEAD_BYTES 4096u
#define PATIENCE_US 10000000u

struct scrape {
	struct scrape *next;
	struct server *server;
	union {
		uv_handle_t handle;
		uv_stream_t stream;
		uv_pipe_t pipe;
		uv_tcp_t tcp;
	};
	uv_write_t write;
	uint64_t opened_us;
	bool closing;
	size_t used;
	char head[HEAD_BYTES + 1]; /* what came so far, with a NUL */
	char *answer;
	size_t answer_bytes;
};

static void on_closed(uv_handle_t *handle)
{
	struct scrape *scrape = handle->data;
	struct server *server = scrape->server;
	struct scrape **link = &server->scrapes;
	while (*link != scrape)
		link = &(*link)->next;
	*link = scrape->next;
	server->scrape_count--;
	free(scrape->answer);
	free(scrape);
}

static void scrape_close(struct scrape *scrape)
{
	if (scrape->closing)
		return;
	scrape->closing = true;
	uv_close(&scrape->handle, on_closed);
}

static void on_written(uv_write_t *write, int status)
{
	(void)status;
	scrape_close(write->data);
}

/* Takes `body` (NULL: out of memory). */
static void answer(struct scrape *scrape, const char *status, const char *type, char *body, size_t body_bytes)
{
	FILE *out = body == NULL ? NULL : open_memstream(&scrape->answer, &scrape->answer_bytes);
	bool made = out != NULL;
	if (made) {
		(void)fprintf(out, "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n", status, type, body_bytes);
		(void)fwrite(body, 1, body_bytes, out);
		made = fclose(out) == 0;
	}
	free(body);
	const uv_buf_t buf = uv_buf_init(scrape->answer, made ? (unsigned)scrape->answer_bytes : 0);
	scrape->write.data = scrape;
	(void)uv_read_stop(&scrape->stream);
	if (!made || uv_write(&scrape->write, &scrape->stream, &buf, 1, on_written) != 0)
		scrape_close(scrape);
}

static void answer_error(struct scrape *scrape, const char *status)
{
	char *body;
	const int bytes = asprintf(&body, "%s: this is opd's metrics endpoint, it has GET /metrics\n", status);
	answer(scrape, status, "text/plain; charset=utf-8", bytes < 0 ? NULL : body, bytes < 0 ? 0 : (size_t)bytes);
}

static void answer_metrics(struct scrape *scrape)
{
	char *body = NULL;
	size_t bytes = 0;
	FILE *out = open_memstream(&body, &bytes);
	if (out != NULL) {
		stats_write(scrape->server, out);
		if (fclose(out) != 0) {
			free(body);
			body = NULL;
		}
	}
	answer(scrape, "200 OK", "text/plain; version=0.0.4; charset=utf-8", body, bytes);
}

/* The head is whole. */
static void on_head(struct scrape *scrape)
{
	static const char path[] = "/metrics";
	const char *text = scrape->head;
	if (strncmp(text, "GET ", 4) != 0) {
		answer_error(scrape, "405 Method Not Allowed");
		return;
	}
	const size_t bytes = strcspn(text + 4, " ?\r\n");
	if (bytes == sizeof path - 1 && memcmp(text + 4, path, bytes) == 0)
		answer_metrics(scrape);
	else
		answer_error(scrape, "404 Not Found");
}

static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buf)
{
	struct scrape *scrape = handle->data;
	(void)suggested;
	*buf = uv_buf_init(scrape->head + scrape->used, (unsigned)(HEAD_BYTES - scrape->used));
}

static void on_read(uv_stream_t *stream, ssize_t nread, const uv_buf_t *buf)
{
	struct scrape *scrape = stream->data;
	(void)buf;
	if (nread == UV_ENOBUFS) {
		answer_error(scrape, "431 Request Header Fields Too Large");
		return;
	}
	if (nread < 0) {
		scrape_close(scrape);
		return;
	}
	scrape->used += (size_t)nread;
	scrape->head[scrape->used] = '\0';
	if (memmem(scrape->head, scrape->used, "\r\n\r\n", 4) != NULL || memmem(scrape->head, scrape->used, "\n\n", 2) != NULL)
		on_head(scrape);
}

/* The oldest of those that haven't asked goes, else the oldest: whoever only connects keeps nobody out. */
static void make_room(struct server *server)
{
	struct scrape *oldest = NULL;
	struct scrape *silent = NULL;
	for (struct scrape *at = server->scrapes; at != NULL; at = at->next) { /* youngest first */
		if (at->closing)
			continue;
		oldest = at;
		silent = at->answer == NULL ? at : silent;
	}
	if (oldest != NULL)
		scrape_close(silent != NULL ? silent : oldest);
}

bool scrape_accept(struct server *server, uv_stream_t *listening, bool unix_socket)
{
	struct scrape *scrape = calloc(1, sizeof *scrape);
	if (scrape == NULL)
		return false;
	const int failed = unix_socket ? uv_pipe_init(&server->loops[0].loop, &scrape->pipe, 0) : uv_tcp_init(&server->loops[0].loop, &scrape->tcp);
	if (failed != 0) {
		free(scrape);
		return false;
	}
	scrape->server = server;
	scrape->handle.data = scrape;
	scrape->opened_us = request_now_ns() / 1000;
	scrape->next = server->scrapes;
	server->scrapes = scrape;
	server->scrape_count++;
	if (uv_accept(listening, &scrape->stream) != 0 || uv_read_start(&scrape->stream, on_alloc, on_read) != 0)
		scrape_close(scrape);
	if (server->scrape_count > SCRAPES_MAX)
		make_room(server);
	return true;
}

void scrape_tick(struct server *server, uint64_t now_us)
{
	for (struct scrape *scrape = server->scrapes, *next; scrape != NULL; scrape = next) {
		next = scrape->next;
		if (now_us > scrape->opened_us && now_us - scrape->opened_us > PATIENCE_US)
			scrape_close(scrape);
	}
}

void scrape_close_all(struct server *server)
{
	for (struct scrape *scrape = server->scrapes; scrape != NULL; scrape = scrape->next)
		scrape_close(scrape);
}
