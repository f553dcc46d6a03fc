/* server/log.h: lines, escapes, levels, lost lines, rotation, rate limits. */
#include <check.h>
#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "server/log.h"

static char folder[64];
static char path[96];

static void make_folder(void)
{
	(void)snprintf(folder, sizeof folder, "/tmp/opd-test-log-XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(folder));
	(void)snprintf(path, sizeof path, "%s/log", folder);
}

static void remove_folder(void)
{
	char command[160];
	(void)snprintf(command, sizeof command, "rm -rf '%s'", folder);
	ck_assert_int_eq(system(command), 0);
}

static void open_log(struct log *log, log_level level, log_format format)
{
	opd_error error;
	ck_assert_int_eq(log_init(log, level, format, path, &error), OPD_OK);
}

/* The file's text; freed by the caller. */
static char *read_all(const char *file_path)
{
	FILE *file = fopen(file_path, "r");
	ck_assert_ptr_nonnull(file);
	char *text = calloc(1, 1 << 20);
	size_t count = fread(text, 1, (1 << 20) - 1, file);
	text[count] = '\0';
	(void)fclose(file);
	return text;
}

static size_t count_lines(const char *text)
{
	size_t lines = 0;
	for (; *text != '\0'; text++)
		lines += *text == '\n';
	return lines;
}

static cJSON *parse_line(const char *text)
{
	cJSON *line = cJSON_ParseWithOpts(text, NULL, 0);
	ck_assert_msg(line != NULL, "not JSON: %s", text);
	return line;
}

START_TEST(text_line_has_time_level_event_and_fields)
{
	struct log log;
	open_log(&log, LOG_INFO, LOG_TEXT);
	LOG(&log, LOG_WARN, "priority not set", LOG_STR("op", "rms_norm"), LOG_INT("left", -3), LOG_UINT("count", UINT64_MAX));
	LOG(&log, LOG_INFO, "started");
	log_fini(&log);
	char *text = read_all(path);
	ck_assert_ptr_nonnull(strstr(text, "Z warn priority not set op=rms_norm left=-3 count=18446744073709551615\n"));
	ck_assert_ptr_nonnull(strstr(text, "Z info started\n"));
	ck_assert_int_eq(text[4], '-');
	ck_assert_int_eq(text[10], 'T');
	free(text);
}
END_TEST

START_TEST(text_values_with_blanks_and_quotes_are_quoted)
{
	struct log log;
	open_log(&log, LOG_INFO, LOG_TEXT);
	LOG(&log, LOG_INFO, "e", LOG_STR("a", "two words"), LOG_STR("b", ""), LOG_STR("c", NULL), LOG_STR("d", "x=\"1\""));
	log_fini(&log);
	char *text = read_all(path);
	ck_assert_ptr_nonnull(strstr(text, " e a=\"two words\" b=\"\" c=\"\" d=\"x=\\\"1\\\"\"\n"));
	free(text);
}
END_TEST

START_TEST(newlines_and_escape_codes_of_a_peer_never_reach_the_file)
{
	static const log_format formats[] = {LOG_TEXT, LOG_JSON};
	struct log log;
	open_log(&log, LOG_INFO, formats[_i]);
	LOG(&log, LOG_INFO, "hello", LOG_STR("client", "a\nb\x1b[31m\r\x7f\xff\xc2\x9b"));
	log_fini(&log);
	char *text = read_all(path);
	ck_assert_uint_eq(count_lines(text), 1);
	for (const char *at = text; *at != '\0'; at++)
		ck_assert(*at == '\n' || ((unsigned char)*at >= 0x20 && (unsigned char)*at < 0x7f));
	free(text);
}
END_TEST

START_TEST(json_line_parses_and_keeps_types)
{
	struct log log;
	open_log(&log, LOG_INFO, LOG_JSON);
	LOG(&log, LOG_ERROR, "kernel failed", LOG_STR("op", "a \"quoted\" \\ one"), LOG_INT("code", -13), LOG_UINT("ns", 12));
	log_fini(&log);
	char *text = read_all(path);
	cJSON *line = parse_line(text);
	ck_assert_str_eq(cJSON_GetObjectItem(line, "level")->valuestring, "error");
	ck_assert_str_eq(cJSON_GetObjectItem(line, "event")->valuestring, "kernel failed");
	ck_assert_str_eq(cJSON_GetObjectItem(line, "op")->valuestring, "a \"quoted\" \\ one");
	ck_assert_int_eq(cJSON_GetObjectItem(line, "code")->valueint, -13);
	ck_assert_int_eq(cJSON_GetObjectItem(line, "ns")->valueint, 12);
	cJSON_Delete(line);
	free(text);
}
END_TEST

START_TEST(a_line_too_long_is_cut_at_a_field_and_says_so)
{
	static char big[100000];
	static const log_format formats[] = {LOG_TEXT, LOG_JSON};
	memset(big, _i == 0 ? 'x' : '"', sizeof big - 1);
	struct log log;
	open_log(&log, LOG_INFO, formats[_i]);
	LOG(&log, LOG_INFO, "e", LOG_STR("a", big), LOG_STR("b", big), LOG_STR("c", big), LOG_STR("d", big), LOG_INT("last", 7));
	log_fini(&log);
	char *text = read_all(path);
	ck_assert_uint_eq(count_lines(text), 1);
	ck_assert_uint_le(strlen(text), 4096);
	ck_assert_ptr_nonnull(strstr(text, formats[_i] == LOG_JSON ? "\"cut\":1}" : " cut=1\n"));
	ck_assert_ptr_nonnull(strstr(text, formats[_i] == LOG_JSON ? "\"last\":7" : " last=7"));
	if (formats[_i] == LOG_JSON)
		cJSON_Delete(parse_line(text));
	free(text);
}
END_TEST

static int evaluations;

static const char *evaluated(void)
{
	evaluations++;
	return "x";
}

START_TEST(nothing_is_evaluated_below_the_level_and_the_level_can_change)
{
	struct log log;
	open_log(&log, LOG_WARN, LOG_TEXT);
	LOG(&log, LOG_INFO, "e", LOG_STR("a", evaluated()));
	ck_assert_int_eq(evaluations, 0);
	log_set_level(&log, LOG_DEBUG);
	LOG(&log, LOG_DEBUG, "e", LOG_STR("a", evaluated()));
	ck_assert_int_eq(evaluations, 1);
	log_fini(&log);
}
END_TEST

START_TEST(levels_have_names)
{
	ck_assert_int_eq(log_level_parse("error"), LOG_ERROR);
	ck_assert_int_eq(log_level_parse("debug"), LOG_DEBUG);
	ck_assert_int_eq(log_level_parse("Debug"), -1);
	ck_assert_int_eq(log_level_parse(""), -1);
	for (int level = LOG_ERROR; level <= LOG_DEBUG; level++)
		ck_assert_int_eq(log_level_parse(log_level_name((log_level)level)), level);
}
END_TEST

START_TEST(a_file_that_cannot_be_opened_is_an_error_that_names_it)
{
	struct log log;
	opd_error error;
	ck_assert_int_eq(log_init(&log, LOG_INFO, LOG_TEXT, "/no/such/folder/log", &error), OPD_UNAVAILABLE);
	ck_assert_str_eq(error.text, "log: can't open /no/such/folder/log: No such file or directory");
}
END_TEST

START_TEST(reopen_follows_a_rotation)
{
	struct log log;
	char old[128];
	opd_error error;
	open_log(&log, LOG_INFO, LOG_TEXT);
	LOG(&log, LOG_INFO, "first");
	(void)snprintf(old, sizeof old, "%s.1", path);
	ck_assert_int_eq(rename(path, old), 0);
	LOG(&log, LOG_INFO, "second");
	ck_assert_int_eq(log_reopen(&log, &error), OPD_OK);
	LOG(&log, LOG_INFO, "third");
	log_fini(&log);
	char *before = read_all(old), *after = read_all(path);
	ck_assert_uint_eq(count_lines(before), 2);
	ck_assert_uint_eq(count_lines(after), 1);
	ck_assert_ptr_nonnull(strstr(after, "third"));
	free(before);
	free(after);
}
END_TEST

START_TEST(a_failed_reopen_keeps_the_old_file)
{
	struct log log;
	char moved[96];
	opd_error error;
	open_log(&log, LOG_INFO, LOG_TEXT);
	(void)snprintf(moved, sizeof moved, "%s-moved", folder);
	ck_assert_int_eq(rename(folder, moved), 0);
	ck_assert_int_eq(log_reopen(&log, &error), OPD_UNAVAILABLE);
	LOG(&log, LOG_INFO, "still here");
	ck_assert_int_eq(rename(moved, folder), 0);
	log_fini(&log);
	char *text = read_all(path);
	ck_assert_ptr_nonnull(strstr(text, "still here"));
	free(text);
}
END_TEST

START_TEST(lines_lost_to_a_full_disk_are_counted_and_told_once)
{
	struct log log;
	opd_error error;
	ck_assert_int_eq(log_init(&log, LOG_INFO, LOG_TEXT, "/dev/full", &error), OPD_OK);
	for (int i = 0; i < 3; i++)
		LOG(&log, LOG_INFO, "lost");
	ck_assert_uint_eq(log.lost, 3);
	/* The disk has room again. */
	free(log.path);
	log.path = strdup(path);
	ck_assert_int_eq(log_reopen(&log, &error), OPD_OK);
	LOG(&log, LOG_INFO, "works");
	LOG(&log, LOG_INFO, "works");
	log_fini(&log);
	char *text = read_all(path);
	ck_assert_uint_eq(count_lines(text), 3);
	ck_assert_ptr_nonnull(strstr(text, "log lines lost count=3\n"));
	free(text);
}
END_TEST

START_TEST(a_half_written_line_is_ended_before_the_next)
{
	struct log log;
	open_log(&log, LOG_INFO, LOG_TEXT);
	/* RLIMIT_FSIZE would do as well; what counts is the state that a short write leaves. */
	ck_assert_int_eq(write(log.fd, "half a li", 9), 9);
	log.torn = true;
	LOG(&log, LOG_INFO, "whole");
	log_fini(&log);
	char *text = read_all(path);
	ck_assert_int_eq(strncmp(text, "half a li\n2", 11), 0);
	ck_assert_uint_eq(count_lines(text), 2);
	free(text);
}
END_TEST

/* A pipe as stderr: fds[0] is its reading end. */
static void log_to_pipe(struct log *log, int fds[2])
{
	opd_error error;
	ck_assert_int_eq(pipe(fds), 0);
	ck_assert_int_eq(log_init(log, LOG_INFO, LOG_TEXT, NULL, &error), OPD_OK);
	log->fd = fds[1];
}

START_TEST(a_pipe_that_nobody_reads_loses_lines_and_never_blocks)
{
	struct log log;
	int fds[2];
	log_to_pipe(&log, fds);
	(void)alarm(20);
	for (int i = 0; i < 10000; i++)
		LOG(&log, LOG_INFO, "a line that fills the pipe soon", LOG_INT("i", i));
	ck_assert_uint_gt(log.lost, 0);
	char bytes[8192];
	while (log.lost > 0) {
		ck_assert_int_gt(read(fds[0], bytes, sizeof bytes), 0);
		LOG(&log, LOG_INFO, "again");
	}
	(void)close(fds[0]);
	(void)close(fds[1]);
	log_fini(&log);
}
END_TEST

START_TEST(a_pipe_whose_reader_is_gone_raises_no_signal)
{
	struct log log;
	int fds[2];
	log_to_pipe(&log, fds);
	(void)signal(SIGPIPE, SIG_DFL);
	(void)close(fds[0]);
	LOG(&log, LOG_INFO, "nobody hears this");
	ck_assert_uint_eq(log.lost, 1);
	(void)close(fds[1]);
	LOG(&log, LOG_INFO, "and this descriptor is closed");
	ck_assert_uint_eq(log.lost, 2);
	log_fini(&log);
}
END_TEST

static void *write_lines(void *argument)
{
	struct log *log = argument;
	for (int i = 0; i < 500; i++)
		LOG(log, LOG_INFO, "from a thread", LOG_STR("text", "abcdefghijklmnopqrstuvwxyz"), LOG_INT("i", i));
	return NULL;
}

START_TEST(lines_of_several_threads_do_not_interleave_also_while_rotating)
{
	struct log log;
	opd_error error;
	pthread_t threads[4];
	open_log(&log, LOG_INFO, LOG_JSON);
	for (size_t i = 0; i < 4; i++)
		ck_assert_int_eq(pthread_create(&threads[i], NULL, write_lines, &log), 0);
	for (int i = 0; i < 20; i++)
		ck_assert_int_eq(log_reopen(&log, &error), OPD_OK);
	for (size_t i = 0; i < 4; i++)
		ck_assert_int_eq(pthread_join(threads[i], NULL), 0);
	log_fini(&log);
	char *text = read_all(path);
	ck_assert_uint_eq(count_lines(text), 2000);
	for (char *save = NULL, *line = strtok_r(text, "\n", &save); line != NULL; line = strtok_r(NULL, "\n", &save))
		cJSON_Delete(parse_line(line));
	free(text);
}
END_TEST

START_TEST(a_limit_lets_a_burst_through_and_counts_the_rest)
{
	struct log_limit limit = {0};
	uint32_t suppressed = 99;
	for (int i = 0; i < 3; i++) {
		ck_assert(log_limit_take(&limit, 3, &suppressed));
		ck_assert_uint_eq(suppressed, 0);
	}
	for (int i = 0; i < 5; i++)
		ck_assert(!log_limit_take(&limit, 3, &suppressed));
	atomic_fetch_sub(&limit.window, 1); /* a minute goes by */
	ck_assert(log_limit_take(&limit, 3, &suppressed));
	ck_assert_uint_eq(suppressed, 5);
	ck_assert(log_limit_take(&limit, 3, &suppressed));
	ck_assert_uint_eq(suppressed, 0);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("log");
	TCase *tests = tcase_create("log");
	tcase_add_checked_fixture(tests, make_folder, remove_folder);
	tcase_add_test(tests, text_line_has_time_level_event_and_fields);
	tcase_add_test(tests, text_values_with_blanks_and_quotes_are_quoted);
	tcase_add_loop_test(tests, newlines_and_escape_codes_of_a_peer_never_reach_the_file, 0, 2);
	tcase_add_test(tests, json_line_parses_and_keeps_types);
	tcase_add_loop_test(tests, a_line_too_long_is_cut_at_a_field_and_says_so, 0, 2);
	tcase_add_test(tests, nothing_is_evaluated_below_the_level_and_the_level_can_change);
	tcase_add_test(tests, levels_have_names);
	tcase_add_test(tests, a_file_that_cannot_be_opened_is_an_error_that_names_it);
	tcase_add_test(tests, reopen_follows_a_rotation);
	tcase_add_test(tests, a_failed_reopen_keeps_the_old_file);
	tcase_add_test(tests, lines_lost_to_a_full_disk_are_counted_and_told_once);
	tcase_add_test(tests, a_half_written_line_is_ended_before_the_next);
	tcase_add_test(tests, a_pipe_that_nobody_reads_loses_lines_and_never_blocks);
	tcase_add_test(tests, a_pipe_whose_reader_is_gone_raises_no_signal);
	tcase_add_test(tests, lines_of_several_threads_do_not_interleave_also_while_rotating);
	tcase_add_test(tests, a_limit_lets_a_burst_through_and_counts_the_rest);
	suite_add_tcase(suite, tests);
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? 0 : 1;
}
