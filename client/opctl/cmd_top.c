/* top: the lanes' use and the sessions that have it, live. */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "client/opctl/picture.h"
#include "client/opctl/print.h"
#include "client/opctl/terminal.h"

const struct option_use top_options[] = {
    {OPTION_COUNT, "pictures, then it ends (default, or 0: until q or Ctrl-C)"},
    {OPTION_DURATION, "seconds between two (default 1)"},
    {OPTION_SORT, "share (default), jobs, wait, queued, memory or id"},
    {OPTION_END, NULL},
};

struct view {
	struct opctl *ctl;
	bool live; /* on a terminal, with keys */
	picture_order order;
	bool reversed;
	uint32_t first; /* line that is shown first */
	uint32_t rows, columns; /* of the terminal; 0: no end */
	uint32_t drawn; /* rows of the picture so far */
	struct picture before, now;
};

/* ---- Text ---- */

/* As much as the terminal is wide: a line that wraps would move the others. Escaped texts are UTF-8. */
OPD_PRINTF(2, 3)
static void draw(struct view *view, const char *format, ...)
{
	char text[1024];
	va_list args;
	va_start(args, format);
	(void)vsnprintf(text, sizeof text, format, args);
	va_end(args);
	uint32_t columns = 0;
	char *end = text;
	for (; *end != '\0'; end++) {
		if (((unsigned char)*end & 0xc0) != 0x80 && view->columns != 0 && columns++ == view->columns)
			break;
	}
	*end = '\0';
	(void)printf(view->live ? "\x1b[2K%s\n" : "%s\n", text); /* erased first: behind a full line the cursor stands on its last character */
	view->drawn++;
}

static void draw_age(struct view *view)
{
	const uint64_t up = view->now.pages[0]->uptime_us / 1000000;
	draw(view, "opd up %" PRIu64 " d %02" PRIu64 ":%02" PRIu64 ":%02" PRIu64 ", %" PRIu32 " sessions, by %s%s%s", up / 86400, up / 3600 % 24, up / 60 % 60, up % 60,
	     view->now.count, picture_order_names[view->order], view->reversed ? ", reversed" : "", view->live ? "   (s j w u m i: sort, r: reverse, arrows, space: now, q: quit)" : "");
}

static void draw_lanes(struct view *view)
{
	const opd_sharing *page = view->now.pages[0];
	for (uint32_t i = 0; i < page->lane_count; i++) {
		const opd_lane_state *lane = &page->lanes[i];
		draw(view, "lane %s: %5.1f %% of %u thread%s, %u queued, %u running", shown(lane->name), 100 * view->now.lane_use[i], lane->threads, lane->threads == 1 ? "" : "s",
		     lane->queued, lane->running);
	}
}

/* Characters of a text that fit. */
static const char *fitted(const char *text, uint32_t columns, char *out, size_t out_bytes)
{
	size_t bytes = 0;
	for (uint32_t seen = 0; text[bytes] != '\0' && bytes + 1 < out_bytes; bytes++)
		if (((unsigned char)text[bytes] & 0xc0) != 0x80 && seen++ == columns)
			break;
	(void)snprintf(out, out_bytes, "%.*s", (int)bytes, text);
	return out;
}

static void draw_session(struct view *view, const struct picture_line *line)
{
	const opd_session_state *session = line->session;
	char tenant[64];
	draw(view, "%7" PRIu64 "  %-14s %-11s %7u %5.1f%% %6u %6u %9.0f %10s %10s  %s", session->session, fitted(shown(session->tenant), 14, tenant, sizeof tenant),
	     class_text(session->service_class), session->weight, 100 * line->share, session->queued, session->running, line->jobs,
	     line->worked ? duration_text(line->wait_ns) : "-", bytes_text(session->memory_bytes), shown(session->peer));
}

/* Lines that are left for sessions, of which the last says how many more there are. */
static uint32_t room(const struct view *view)
{
	if (view->rows == 0)
		return view->now.count;
	return view->rows > view->drawn + 1 ? view->rows - view->drawn - 1 : 1;
}

static void draw_sessions(struct view *view)
{
	draw(view, "session  tenant         class        weight  share queued    run    jobs/s  mean wait     memory  peer");
	const uint32_t space = room(view);
	const uint32_t last = view->now.count > space ? view->now.count - space : 0;
	view->first = view->first < last ? view->first : last;
	for (uint32_t i = 0; i < space && view->first + i < view->now.count; i++)
		draw_session(view, &view->now.lines[view->first + i]);
	if (view->live && last != 0)
		(void)printf("%" PRIu32 " to %" PRIu32 " of %" PRIu32, view->first + 1, view->first + space, view->now.count);
}

static void draw_text(struct view *view)
{
	view->drawn = view->rows = view->columns = 0;
	if (view->live) {
		terminal_size(&view->rows, &view->columns);
		(void)fputs("\x1b[H", stdout);
	}
	picture_sort(&view->now, view->order, view->reversed);
	draw_age(view);
	draw_lanes(view);
	draw_sessions(view);
	(void)fputs(view->live ? "\x1b[J" : "\n", stdout);
}

/* ---- JSON ---- */

static void draw_json(struct view *view)
{
	cJSON *document = cJSON_CreateObject();
	const opd_sharing *page = view->now.pages[0];
	picture_sort(&view->now, view->order, view->reversed);
	cJSON_AddItemToObject(document, "uptime_us", json_u64(page->uptime_us));
	cJSON_AddItemToObject(document, "span_s", json_f64(view->now.span_s));
	cJSON *lanes = cJSON_AddArrayToObject(document, "lanes");
	for (uint32_t i = 0; i < page->lane_count; i++) {
		cJSON *item = cJSON_CreateObject();
		cJSON_AddItemToArray(lanes, item);
		cJSON_AddStringToObject(item, "lane", page->lanes[i].name);
		cJSON_AddItemToObject(item, "threads", json_u64(page->lanes[i].threads));
		cJSON_AddItemToObject(item, "use", json_f64(view->now.lane_use[i]));
		cJSON_AddItemToObject(item, "queued", json_u64(page->lanes[i].queued));
		cJSON_AddItemToObject(item, "running", json_u64(page->lanes[i].running));
	}
	cJSON *sessions = cJSON_AddArrayToObject(document, "sessions");
	for (uint32_t i = 0; i < view->now.count; i++) {
		const struct picture_line *line = &view->now.lines[i];
		cJSON *item = cJSON_CreateObject();
		cJSON_AddItemToArray(sessions, item);
		cJSON_AddItemToObject(item, "session", json_u64(line->session->session));
		cJSON_AddStringToObject(item, "tenant", line->session->tenant);
		cJSON_AddStringToObject(item, "peer", line->session->peer);
		cJSON_AddStringToObject(item, "class", class_text(line->session->service_class));
		cJSON_AddItemToObject(item, "weight", json_u64(line->session->weight));
		cJSON_AddItemToObject(item, "share", json_f64(line->share));
		cJSON_AddItemToObject(item, "queued", json_u64(line->session->queued));
		cJSON_AddItemToObject(item, "running", json_u64(line->session->running));
		cJSON_AddItemToObject(item, "jobs_per_second", json_f64(line->jobs));
		cJSON_AddItemToObject(item, "mean_wait_ns", json_f64(line->wait_ns));
		cJSON_AddItemToObject(item, "memory_bytes", json_u64(line->session->memory_bytes));
	}
	(void)print_json(document);
}

/* ---- Keys ---- */

/* False: the view is what it was. */
static bool scroll(struct view *view, int key)
{
	const uint32_t page = view->rows > view->drawn ? view->rows : 1;
	const uint32_t step = key == KEY_PAGE_UP || key == KEY_PAGE_DOWN ? (page > 4 ? page - 4 : 1) : 1;
	if (key == KEY_UP || key == KEY_PAGE_UP)
		view->first -= view->first < step ? view->first : step;
	else if (key == KEY_DOWN || key == KEY_PAGE_DOWN)
		view->first += step; /* to the end: draw_sessions */
	else
		return false;
	return true;
}

/* False: the view is what it was. */
static bool set_order(struct view *view, int key)
{
	const char *found = key <= 0 || key > 127 ? NULL : memchr(picture_order_keys, key, ORDER_COUNT);
	if (key == 'r') {
		view->reversed = !view->reversed;
		return true;
	}
	if (found == NULL)
		return false;
	view->order = (picture_order)(found - picture_order_keys);
	view->reversed = false;
	view->first = 0;
	return true;
}

static uint64_t now_us(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* Until the next picture is due: keys change how this one is seen. False: the user has seen enough. */
static bool watch(struct view *view, uint64_t interval_us)
{
	const uint64_t due_us = now_us() + interval_us;
	for (uint64_t time_us = now_us(); time_us < due_us; time_us = now_us()) {
		const int key = terminal_key(due_us - time_us);
		if (key == 'q' || key == 'Q' || key == KEY_QUIT)
			return false;
		if (key == ' ')
			return true;
		if (scroll(view, key) || set_order(view, key) || key == KEY_RESIZE) {
			draw_text(view);
			(void)fflush(stdout);
		}
	}
	return true;
}

static bool wait_for_next(struct view *view, uint64_t interval_us)
{
	if (view->live)
		return watch(view, interval_us);
	const struct timespec interval = {(time_t)(interval_us / 1000000), (long)(interval_us % 1000000) * 1000};
	(void)nanosleep(&interval, NULL);
	return true;
}

/* ---- The command ---- */

static opd_status next_picture(struct view *view, opd_error *error)
{
	struct picture next;
	const opd_status status = picture_take(view->ctl->client, &next, error);
	if (status != OPD_OK)
		return status;
	picture_free(&view->before);
	view->before = view->now;
	view->now = next;
	if (view->before.page_count != 0) {
		picture_sort(&view->before, ORDER_ID, false);
		picture_compare(&view->before, &view->now);
	}
	return OPD_OK;
}

/* Pictures until there are enough, somebody has seen enough, or nobody reads them any more. */
static opd_status show(struct view *view, uint64_t count, uint64_t interval_us, opd_error *error)
{
	opd_status status = next_picture(view, error);
	if (status == OPD_OK && view->live) /* what there is at once; what it uses a picture later */
		draw_text(view);
	(void)fflush(stdout);
	for (uint64_t i = 0; status == OPD_OK && (count == 0 || i < count); i++) {
		if (!wait_for_next(view, interval_us))
			break;
		status = next_picture(view, error);
		if (status != OPD_OK)
			break;
		if (view->ctl->json)
			draw_json(view);
		else
			draw_text(view);
		if (fflush(stdout) != 0) /* of a pipe whose reader has seen enough that is no failure, as it isn't with `q` */
			return errno == EPIPE ? OPD_OK : opd_fail(error, OPD_INTERNAL, "stdout: %s", strerror(errno));
	}
	return status;
}

static opd_status parse(struct opctl *ctl, struct view *view, uint64_t *count_out, uint64_t *interval_us_out, opd_error *error)
{
	int64_t count;
	const char *order = ctl->options.values[OPTION_SORT];
	opd_status status = options_int(&ctl->options, OPTION_COUNT, 0, INT64_MAX, 0, &count, error);
	if (status == OPD_OK)
		status = options_seconds(&ctl->options, OPTION_DURATION, 1000000, interval_us_out, error);
	if (status == OPD_OK && order != NULL)
		status = picture_order_parse(order, &view->order, error);
	if (status == OPD_OK && ctl->options.count != 1)
		status = opd_fail(error, OPD_INVALID_ARGUMENT, "expected top [-c N] [--duration SECONDS] [--sort KEY]");
	*count_out = (uint64_t)count;
	return status;
}

int cmd_top(struct opctl *ctl)
{
	struct view view = {.ctl = ctl};
	uint64_t count, interval_us;
	opd_error error;
	if (parse(ctl, &view, &count, &interval_us, &error) != OPD_OK)
		return report_usage(ctl, &error);
	opd_status status = opctl_connect(ctl, CONNECT_DAEMON, &error);
	if (status == OPD_OK) {
		view.live = !ctl->json && terminal_open();
		status = show(&view, count, interval_us, &error);
		terminal_close();
	}
	picture_free(&view.before);
	picture_free(&view.now);
	return status == OPD_OK ? EXIT_DONE : report_failure(ctl, status, &error);
}
