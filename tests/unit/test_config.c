/* server/config.h: defaults, the YAML file, flags over it, and every kind of file that isn't one. */
#include <check.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/config_internal.h"
#include "tests/lib/suite.h"

static char folder[64];
static char path[96];
static struct config *config;
static opd_error error;

static void set_up(void)
{
	(void)snprintf(folder, sizeof folder, "/tmp/opd-test-config-XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(folder));
	(void)snprintf(path, sizeof path, "%s/opd.yaml", folder);
	config = config_create();
	ck_assert_ptr_nonnull(config);
}

static void tear_down(void)
{
	config_destroy(config);
	(void)unlink(path);
	ck_assert_int_eq(rmdir(folder), 0);
}

static opd_status load_bytes(const char *bytes, size_t count)
{
	FILE *file = fopen(path, "w");
	ck_assert_ptr_nonnull(file);
	ck_assert_uint_eq(fwrite(bytes, 1, count, file), count);
	ck_assert_int_eq(fclose(file), 0);
	return config_load(config, path, &error);
}

static opd_status load(const char *text)
{
	return load_bytes(text, strlen(text));
}

static void load_ok(const char *text)
{
	opd_status status = load(text);
	ck_assert_msg(status == OPD_OK, "%s", error.text);
}

/* The error is "<path><rest>". */
static void expect_error(const char *rest)
{
	ck_assert_msg(strncmp(error.text, path, strlen(path)) == 0, "no path in: %s", error.text);
	ck_assert_str_eq(error.text + strlen(path), rest);
}

struct differences {
	char text[4096];
};

static void note_difference(const char *key, const char *before, const char *after, void *argument)
{
	struct differences *found = argument;
	const size_t used = strlen(found->text);
	(void)snprintf(found->text + used, sizeof found->text - used, "%s: %s -> %s\n", key, before == NULL ? "-" : before, after == NULL ? "-" : after);
}

static void expect_differences(const struct config *before, const char *wanted)
{
	struct differences found = {""};
	ck_assert_int_eq(config_compare(before, config, note_difference, &found, &error), OPD_OK);
	ck_assert_str_eq(found.text, wanted);
}

static size_t lists_of(const struct config *of, const char *op)
{
	size_t count = 0;
	for (size_t i = 0; i < of->priority_count; i++)
		count += strncmp(of->priorities[i].op, op, strlen(op)) == 0;
	return count;
}

START_TEST(a_list_for_everything_replaces_what_comes_with_opd_and_nothing_that_was_said)
{
	struct config *made = config_create();
	ck_assert_ptr_nonnull(made);
	ck_assert_uint_gt(lists_of(made, "linear"), 1);
	ck_assert_int_eq(config_add_priority(made, "matmul=native", &error), OPD_OK);
	ck_assert_int_eq(config_add_priority(made, "*=cuda,cpu,native", &error), OPD_OK);
	ck_assert_uint_eq(lists_of(made, "linear"), 0);
	ck_assert_uint_eq(made->priority_count, 2);
	ck_assert_uint_eq(lists_of(made, "matmul"), 1);
	ck_assert_int_eq(config_add_priority(made, "linear=cpu", &error), OPD_OK);
	ck_assert_int_eq(config_add_priority(made, "*=cpu", &error), OPD_OK);
	ck_assert_uint_eq(lists_of(made, "linear"), 1);
	config_destroy(made);
}
END_TEST

START_TEST(every_key_is_told_as_the_file_would_say_it)
{
	const struct config_key *key;
	size_t count = 0;
	for (; (key = config_key_at(count)) != NULL; count++) {
		char text[CONFIG_TEXT_BYTES], again[CONFIG_TEXT_BYTES];
		config_key_text(config, key, text, sizeof text);
		ck_assert_msg(strcmp(text, "?") != 0, "%s: its way to set has no way to print in config_key.c", key->name);
		ck_assert_msg(text[0] == '\0' || config_set(config, key->name, text, &error) == OPD_OK, "%s: %s", key->name, error.text);
		config_key_text(config, key, again, sizeof again);
		ck_assert_str_eq(text, again);
	}
	ck_assert_uint_gt(count, 20);
}
END_TEST

START_TEST(two_configurations_differ_in_the_keys_that_changed)
{
	struct config *before = config_create();
	ck_assert_ptr_nonnull(before);
	expect_differences(before, "");
	ck_assert_int_eq(config_set(before, "limits.memory", "64 MiB", &error), OPD_OK);
	ck_assert_int_eq(config_set(before, "limits.stall", "90s", &error), OPD_OK);
	ck_assert_int_eq(config_add_module(before, "gone=/lib/gone.so", false, &error), OPD_OK);
	load_ok("listen: [unix:/tmp/a.sock]\nlimits: {memory: 128 MiB, session: 32 MiB}\npriorities: {relu: [cpu], \"*\": [native]}\n"
	        "tenants:\n  \"uid:1\": {weight: 300, class: batch}\n");
	config_clear_listeners(before);
	config_clear_priorities(before);
	ck_assert_int_eq(config_add_priority(before, "*=cpu", &error), OPD_OK);
	expect_differences(before, "limits.cache: 64 MiB -> 128 MiB\nlimits.derived: 16 MiB -> 32 MiB\nlimits.memory: 64 MiB -> 128 MiB\n"
	                           "limits.stall: 90s -> 1min\nlisten: [] -> [unix:/tmp/a.sock]\nmodules.gone: /lib/gone.so -> -\n"
	                           "priorities.*: [cpu] -> [native]\npriorities.relu: - -> [cpu]\ntenants.uid:1: - -> weight: 300, class: batch\n");
	config_destroy(before);
}
END_TEST

START_TEST(defaults_are_those_of_the_header)
{
	const struct config_limits *limits = &config->limits;
	ck_assert_uint_gt(limits->memory_bytes, 0);
	ck_assert_uint_eq(limits->session_bytes, limits->memory_bytes / 2);
	ck_assert_uint_le(limits->request_bytes, 4ull << 30);
	ck_assert_uint_le(limits->request_bytes, limits->session_bytes);
	ck_assert_uint_eq(limits->envelope_bytes, 1u << 20);
	ck_assert_uint_eq(limits->sessions, 4096);
	ck_assert_uint_eq(limits->in_flight, 1024);
	ck_assert_uint_eq(limits->kept, 65536);
	ck_assert_uint_eq(limits->handshake_us, 10000000);
	ck_assert_uint_eq(limits->stall_us, 60000000);
	ck_assert_uint_eq(limits->drain_us, 30000000);
	ck_assert_uint_eq(config->inline_ns, 5000);
	ck_assert(config->batch_rows == 16 && config->batch_shared_bytes == 32u << 20);
	ck_assert_int_eq(config->level, LOG_INFO);
	ck_assert_uint_eq(config->listener_count, 0);
	ck_assert_int_eq(config_check(config, false, &error), OPD_OK);
	ck_assert_uint_eq(config->listener_count, 1);
	ck_assert_int_eq(config->listeners[0].kind, LISTEN_UNIX);
}
END_TEST

START_TEST(a_whole_file_is_read)
{
	load_ok("# everything\n"
	        "listen: [unix:/run/opd/a.sock, \"tcp://127.0.0.1:7777\", 'tcp://[::1]:0']\n"
	        "priorities:\n"
	        "  rms_norm: [cuda, cpu]\n"
	        "  \"*\":\n"
	        "    - cpu\n"
	        "    - onednn\n"
	        "  relu: []\n"
	        "modules:\n"
	        "  - /opt/a.so\n"
	        "  - {name: mine, path: /opt/b.so}\n"
	        "limits:\n"
	        "  memory: 64 MiB\n"
	        "  session: 16MiB\n"
	        "  request: 8 MiB\n"
	        "  envelope: 65536\n"
	        "  cache: 0\n"
	        "  sessions: 10\n"
	        "  in_flight: 20\n"
	        "  kept: 30\n"
	        "  handshake: 500ms\n"
	        "  stall: 2 s\n"
	        "  drain: 1min\n"
	        "threads: 3\n"
	        "checked: true\n"
	        "inline: 7us\n"
	        "log:\n"
	        "  level: debug\n"
	        "  format: json\n"
	        "  file: /var/log/opd.log\n");
	ck_assert_uint_eq(config->listener_count, 3);
	ck_assert_str_eq(config->listeners[0].path, "/run/opd/a.sock");
	ck_assert_str_eq(config->listeners[1].host, "127.0.0.1");
	ck_assert_uint_eq(config->listeners[1].port, 7777);
	ck_assert_str_eq(config->listeners[2].host, "::1");
	ck_assert_str_eq(config->listeners[2].address, "tcp://[::1]:0");
	ck_assert_uint_eq(config->priority_count, 3);
	ck_assert_str_eq(config->priorities[0].op, "rms_norm");
	ck_assert_uint_eq(config->priorities[0].count, 2);
	ck_assert_str_eq(config->priorities[0].providers[1], "cpu");
	ck_assert_uint_eq(config->priorities[0].line, 4);
	ck_assert_str_eq(config->priorities[1].op, "*");
	ck_assert_str_eq(config->priorities[1].providers[1], "onednn");
	ck_assert_uint_eq(config->priorities[2].count, 0);
	ck_assert_uint_eq(config->module_count, 2);
	ck_assert_ptr_null(config->modules[0].name);
	ck_assert_str_eq(config->modules[0].path, "/opt/a.so");
	ck_assert_str_eq(config->modules[1].name, "mine");
	ck_assert_uint_eq(config->modules[1].line, 11);
	ck_assert_uint_eq(config->limits.memory_bytes, 64u << 20);
	ck_assert_uint_eq(config->limits.session_bytes, 16u << 20);
	ck_assert_uint_eq(config->limits.request_bytes, 8u << 20);
	ck_assert_uint_eq(config->limits.envelope_bytes, 65536);
	ck_assert_uint_eq(config->limits.cache_bytes, 0);
	ck_assert_uint_eq(config->limits.sessions, 10);
	ck_assert_uint_eq(config->limits.in_flight, 20);
	ck_assert_uint_eq(config->limits.kept, 30);
	ck_assert_uint_eq(config->limits.handshake_us, 500000);
	ck_assert_uint_eq(config->limits.stall_us, 2000000);
	ck_assert_uint_eq(config->limits.drain_us, 60000000);
	ck_assert_uint_eq(config->threads, 3);
	ck_assert(config->checked);
	ck_assert_uint_eq(config->inline_ns, 7000);
	ck_assert_int_eq(config->level, LOG_DEBUG);
	ck_assert_int_eq(config->format, LOG_JSON);
	ck_assert_str_eq(config->log_path, "/var/log/opd.log");
	ck_assert_int_eq(config_check(config, false, &error), OPD_OK);
}
END_TEST

START_TEST(files_that_say_nothing_are_fine)
{
	static const char *const texts[] = {"", "\n", "# a comment\n", "---\n", "{}\n", "limits:\nlog:\nlisten:\npriorities:\nmodules:\n"};
	load_ok(texts[_i]);
	ck_assert_uint_eq(config->listener_count, 0);
}
END_TEST

struct bad {
	const char *text;
	const char *rest; /* of the error, after the path */
};

static const struct bad bad_files[] = {
	{"colour: red\n", ":1: colour: no such key"},
	{"\nlimits:\n  memroy: 1\n", ":3: limits.memroy: no such key"},
	{"threads: 1\nthreads: 2\n", ":2: key \"threads\" is there twice"},
	{"log:\n  level: info\n  level: info\n", ":3: log: key \"level\" is there twice"},
	{"limits.memory: 1 GiB\n", ":1: limits.memory: no such key (write the part before the dot as a map of its own)"},
	{"threads: many\n", ":1: threads: \"many\", expected a whole number of 0 to 1024"},
	{"threads: -1\n", ":1: threads: \"-1\", expected a whole number of 0 to 1024"},
	{"threads: 1025\n", ":1: threads: \"1025\", expected a whole number of 0 to 1024"},
	{"threads: 18446744073709551617\n", ":1: threads: \"18446744073709551617\", expected a whole number of 0 to 1024"},
	{"threads: 1.5\n", ":1: threads: \"1.5\", expected a whole number of 0 to 1024"},
	{"threads:\n", ":1: threads: nothing, expected a single value"},
	{"threads: [1]\n", ":1: threads: a list, expected a single value"},
	{"checked: yes\n", ":1: checked: \"yes\", expected true or false"},
	{"limits: 7\n", ":1: limits: a single value, expected a map"},
	{"limits:\n  memory: 64 MB\n", ":2: limits.memory: \"64 MB\" is not a size, expected a whole number of bytes, KiB, MiB, GiB or TiB, "
	                               "such as 64 MiB"},
	{"limits:\n  memory: 100 B\n", ":2: limits.memory: 100 bytes, expected 1048576 to 1125899906842624"},
	{"limits:\n  envelope: 32 MiB\n", ":2: limits.envelope: 33554432 bytes, expected 4096 to 16777216"},
	{"limits:\n  memory: 99999999999999 TiB\n", ":2: limits.memory: \"99999999999999 TiB\" is not a size, expected a whole number of "
	                                            "bytes, KiB, MiB, GiB or TiB, such as 64 MiB"},
	{"limits:\n  drain: 10\n", ":2: limits.drain: \"10\" is not a duration, expected a whole number of ns, us, ms, s, min or h, such "
	                           "as 500ms"},
	{"limits:\n  drain: 1500ns\n", ":2: limits.drain: \"1500ns\", expected 1000us to 86400000000us"},
	{"limits:\n  stall: 0\n", ":2: limits.stall: \"0\", expected 100000us to 86400000000us"},
	{"log:\n  level: loud\n", ":2: log.level: \"loud\", expected error, warn, info or debug"},
	{"log:\n  format: xml\n", ":2: log.format: \"xml\", expected text or json"},
	{"log:\n  file: \"\"\n", ":2: log.file: empty, expected a path or stderr"},
	{"listen: unix:/a\n", ":1: listen: a single value, expected a list"},
	{"listen:\n- unix:/a\n- http://x\n", ":3: listen: \"http://x\" is not an address, expected unix:/path, tls://host:port or tcp://host:port"},
	{"listen: [\"unix:a\"]\n", ":1: listen: \"unix:a\": the path isn't absolute, expected unix:/path"},
	{"listen: [\"tcp://h\"]\n", ":1: listen: \"tcp://h\": expected tcp://host:port (IPv6 in brackets)"},
	{"listen: [\"tcp://::1:7\"]\n", ":1: listen: \"tcp://::1:7\": expected tcp://host:port (IPv6 in brackets)"},
	{"listen: [\"tcp://[]:7\"]\n", ":1: listen: \"tcp://[]:7\": expected tcp://host:port (IPv6 in brackets)"},
	{"listen: [\"tcp://h:65536\"]\n", ":1: listen: \"tcp://h:65536\": port \"65536\", expected 0 to 65535"},
	{"listen: [\"tcp://h:\"]\n", ":1: listen: \"tcp://h:\": port \"\", expected 0 to 65535"},
	{"listen: [{a: b}]\n", ":1: listen: a map, expected an address such as unix:/run/opd/opd.sock"},
	{"priorities: [cpu]\n", ":1: priorities: a list, expected a map"},
	{"priorities:\n  relu/half: [cpu]\n", ":2: priorities.relu/half: \"half\" is no dtype (as bf16) and no number of rows (as rows<=4)"},
	{"priorities:\n  relu/rows<=0: [cpu]\n", ":2: priorities.relu/rows<=0: \"rows<=0\" is no number of rows (as rows<=4)"},
	{"priorities:\n  relu/rows<=1x: [cpu]\n", ":2: priorities.relu/rows<=1x: \"rows<=1x\" is no number of rows (as rows<=4)"},
	{"priorities:\n  relu/rows<=99999999999999999999: [cpu]\n", ":2: priorities.relu/rows<=99999999999999999999: \"rows<=99999999999999999999\" is no number of rows (as rows<=4)"},
	{"priorities:\n  relu/rows<=4/bf16: [cpu]\n", ":2: priorities.relu/rows<=4/bf16: \"bf16\" is no number of rows (as rows<=4), which comes last"},
	{"priorities:\n  relu/bf16/f32: [cpu]\n", ":2: priorities.relu/bf16/f32: \"f32\" is no number of rows (as rows<=4), which comes last"},
	{"priorities:\n  '*/bf16': [cpu]\n", ":2: priorities.*/bf16: \"*\" is no op, and only an op's list may be narrowed"},
	{"priorities:\n  Relu/bf16: [cpu]\n", ":2: priorities.Relu/bf16: op \"Relu\" is not a name, expected [a-z_][a-z_0-9]* of at most 128 bytes"},
	{"priorities:\n  relu/bf16: [cpu]\n  relu/bf16: [cpu]\n", ":3: priorities.relu/bf16: there already, in line 2"},
	{"priorities:\n  relu: cpu\n", ":2: priorities.relu: a single value, expected a list"},
	{"priorities:\n  relu:\n", ":2: priorities.relu: nothing, expected a list of providers ([] for an empty one)"},
	{"priorities:\n  relu: [cpu]\n  add: [cpu]\n  relu: [native]\n", ":4: priorities.relu: there already, in line 2"},
	{"priorities:\n  Relu: [cpu]\n", ":2: priorities.Relu: op \"Relu\" is not a name, expected [a-z_][a-z_0-9]* of at most 128 bytes"},
	{"priorities:\n  relu: [cpu, \"a b\"]\n",
     ":2: priorities.relu: provider \"a b\" is not a name, expected [a-z_][a-z_0-9]* of at most 128 bytes"},
	{"priorities:\n  *: [cpu]\n",
     ":2: did not find expected alphabetic or numeric character (a * must be quoted: \"*\")"},
	{"modules:\n- {name: mine}\n", ":2: modules: a module without a path"},
	{"modules:\n- {path: /a, file: b}\n", ":2: modules.file: no such key, expected name, path or isolated"},
	{"modules:\n- {path: /a, path: /b}\n", ":2: modules: key \"path\" is there twice"},
	{"modules:\n- a.so\n", ":2: modules: module \"a.so\": expected an absolute path, or one of openblas, onednn, opencl, cuda, cublaslt, cudnn"},
	{"modules:\n- {name: x, path: all}\n", ":2: modules: module \"all\": expected no name, and not isolated: name those one by one"},
	{"modules:\n- {name: native, path: /a}\n", ":2: modules: module \"native\": the name is reserved"},
	{"modules:\n- {name: a, path: /a}\n- {name: a, path: /b}\n", ":3: modules: module \"a\" is named twice"},
	{"threads: &a 1\n", ":1: anchors and aliases (\"a\") aren't understood here"},
	{"log: {level: info, file: *a}\n", ":1: anchors and aliases (\"a\") aren't understood here"},
	{"threads: !!int 1\n", ":1: tags (\"tag:yaml.org,2002:int\") aren't understood here"},
	{"[1, 2]\n", ":1: a list, expected a map"},
	{"hello\n", ":1: a single value, expected a map"},
	{"? [a]\n: b\n", ":1: a list, expected a key"},
	{"threads: 1\n---\nthreads: 2\n", ":2: a second document begins, expected one"},
	{"limits:\n\tmemory: 1\n", ":2: found character that cannot start any token"},
	{"log: {level: info\n", ":2: did not find expected ',' or '}'"},
	{"log:\n  file: \"a\\0b\"\n", ":2: log.file: the value has a NUL or broken UTF-8 in it"},
	{"log:\n  file: \"\xff\xfe\"\n", ": byte 14: invalid leading UTF-8 octet, expected printable UTF-8"},
	{"log:\n  file: \"a\x1b[31m\"\n", ": byte 15: control characters are not allowed, expected printable UTF-8"},
};

START_TEST(a_bad_file_is_an_error_that_names_line_key_and_what_was_expected)
{
	const struct bad *bad = &bad_files[_i];
	ck_assert_int_ne(load(bad->text), OPD_OK);
	ck_assert_int_eq(error.status, OPD_INVALID_ARGUMENT);
	expect_error(bad->rest);
}
END_TEST

START_TEST(a_nul_is_refused_wherever_it_is)
{
	ck_assert_int_eq(load_bytes("threads: 1\n\0\n", 13), OPD_INVALID_ARGUMENT);
	expect_error(": byte 11 is NUL, expected UTF-8 text");
}
END_TEST

START_TEST(a_huge_file_is_refused_unread)
{
	ck_assert_int_eq(load("threads: 1\n"), OPD_OK);
	ck_assert_int_eq(truncate(path, 100 << 20), 0);
	ck_assert_int_eq(config_load(config, path, &error), OPD_INVALID_ARGUMENT);
	expect_error(": has 104857600 bytes, expected at most 1048576");
}
END_TEST

START_TEST(what_is_not_a_file_is_refused_and_hangs_nothing)
{
	(void)alarm(20);
	ck_assert_int_eq(config_load(config, "/no/such/file", &error), OPD_NOT_FOUND);
	ck_assert_str_eq(error.text, "/no/such/file: No such file or directory");
	ck_assert_int_eq(config_load(config, folder, &error), OPD_INVALID_ARGUMENT);
	ck_assert_int_eq(config_load(config, "/dev/zero", &error), OPD_INVALID_ARGUMENT);
	ck_assert_int_eq(mkfifo(path, 0600), 0);
	ck_assert_int_eq(config_load(config, path, &error), OPD_INVALID_ARGUMENT);
	expect_error(": is not a regular file");
}
END_TEST

/* 200,000 levels in each of the ways to nest. */
START_TEST(deep_nesting_ends_where_it_begins)
{
	static const char *const openings[] = {"[", "{a: ", "- ", "? "};
	static const char *const keys[] = {"listen: ", "threads: ", "", "priorities: "};
	size_t step = strlen(openings[_i]);
	size_t used = strlen(keys[_i]);
	char *text = calloc(1, 900000);
	memcpy(text, keys[_i], used);
	for (int i = 0; i < 200000; i++, used += step)
		memcpy(text + used, openings[_i], step);
	(void)alarm(30);
	ck_assert_int_eq(load_bytes(text, used), OPD_INVALID_ARGUMENT);
	free(text);
}
END_TEST

/* No file cut anywhere crashes, hangs or leaks; what is read either is right or an error. */
START_TEST(a_file_cut_at_every_byte_is_read_or_refused)
{
	static const char text[] = "listen: ['unix:/a', \"tcp://[::1]:1\"]\npriorities: {\"*\": [cpu, native], relu: []}\n"
	                           "modules:\n- {name: a, path: /b}\nlimits:\n  memory: 64 MiB\nlog: {level: warn}\n";
	for (size_t count = 0; count < sizeof text; count++) {
		config_destroy(config);
		config = config_create();
		error.status = 0;
		if (load_bytes(text, count) != OPD_OK)
			ck_assert_int_eq(error.status, OPD_INVALID_ARGUMENT);
	}
}
END_TEST

START_TEST(a_long_list_of_providers_is_refused)
{
	char text[1024] = "priorities: {relu: [p";
	for (int i = 0; i < 64; i++)
		strcat(text, ",p");
	strcat(text, "]}\n");
	ck_assert_int_eq(load(text), OPD_INVALID_ARGUMENT);
	expect_error(":1: priorities.relu: more than 64 providers in one list");
}
END_TEST

START_TEST(limits_that_contradict_each_other_are_refused)
{
	static const struct bad cases[] = {
		{"limits: {memory: 1 GiB, session: 2 GiB}", "limits.session: 2147483648 bytes, expected at most limits.memory (1073741824)"},
		{"limits: {memory: 1 GiB, request: 600 MiB}", "limits.request: 629145600 bytes, expected at most limits.session (536870912)"},
		{"limits: {memory: 1 MiB, cache: 2 MiB}", "limits.cache: 2097152 bytes, expected at most limits.memory (1048576)"},
	};
	load_ok(cases[_i].text);
	ck_assert_int_eq(config_check(config, false, &error), OPD_INVALID_ARGUMENT);
	ck_assert_str_eq(error.text, cases[_i].rest);
}
END_TEST

START_TEST(limits_that_nobody_set_follow_memory)
{
	load_ok("limits: {memory: 100 MiB}");
	ck_assert_uint_eq(config->limits.session_bytes, 50u << 20);
	ck_assert_uint_eq(config->limits.request_bytes, 50u << 20);
	ck_assert_uint_eq(config->limits.cache_bytes, 100u << 20);
	ck_assert_int_eq(config_set(config, "limits.session", "20 MiB", &error), OPD_OK);
	ck_assert_uint_eq(config->limits.request_bytes, 20u << 20);
}
END_TEST

START_TEST(tcp_beyond_loopback_needs_to_be_asked_for)
{
	static const char *const remote[] = {"tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://10.0.0.1:1", "tcp://example.org:1", "tcp://127.1:1"};
	ck_assert_int_eq(config_add_listener(config, remote[_i], &error), OPD_OK);
	ck_assert_int_eq(config_check(config, false, &error), OPD_INVALID_ARGUMENT);
	ck_assert_ptr_nonnull(strstr(error.text, "is not a loopback address"));
	ck_assert_ptr_nonnull(strstr(error.text, remote[_i]));
	ck_assert_int_eq(config_check(config, true, &error), OPD_OK);
}
END_TEST

START_TEST(tls_may_be_reached_from_anywhere)
{
	ck_assert_int_eq(config_add_listener(config, "tls://0.0.0.0:1", &error), OPD_OK);
	ck_assert_int_eq(config_add_listener(config, "tls://[::]:1", &error), OPD_OK);
	ck_assert_int_eq(config->listeners[1].kind, LISTEN_TLS);
	ck_assert_str_eq(config->listeners[1].host, "::");
	ck_assert_int_eq(config_check(config, false, &error), OPD_OK);
	ck_assert_int_eq(config_add_listener(config, "tcp://0.0.0.0:1", &error), OPD_OK); /* one port, two protocols */
	ck_assert_int_eq(config_check(config, true, &error), OPD_INVALID_ARGUMENT);
	ck_assert_str_eq(error.text, "listen: tcp://0.0.0.0:1 is there twice");
}
END_TEST

START_TEST(lanes_are_named_and_tenants_name_them)
{
	load_ok("tenants: {\"*\": {lane: slow}, alice: {lane: fast}, bob: {weight: 3}, carol: {lane: cpu}}\nlanes: {slow: {}, fast: {threads: 3}}");
	ck_assert_int_eq(config_check(config, false, &error), OPD_OK);
	ck_assert_uint_eq(config->lane_count, 2);
	ck_assert_str_eq(config->lanes[0].name, "slow");
	ck_assert(config->lanes[0].threads == 1 && config->lanes[1].threads == 3);
	static const struct {
		const char *tenant;
		uint32_t lane;
	} wanted[] = {{"alice", 2}, {"bob", 1}, {"carol", 0}, {"somebody", 1}};
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
		struct tenant_policy policy;
		config_tenant(config, wanted[i].tenant, &policy);
		ck_assert_msg(policy.lane == wanted[i].lane, "%s", wanted[i].tenant);
	}
}
END_TEST

START_TEST(lanes_that_are_not_are_named)
{
	static const struct {
		const char *text;
		const char *rest;
	} bad[] = {
		{"lanes: {cpu: {}}", ":1: lanes.cpu: expected a name of at most 31 small letters, digits and _, but not cpu (everybody's lane)"},
		{"lanes: {\"a b\": {}}", ":1: lanes.a b: expected a name of at most 31 small letters, digits and _, but not cpu (everybody's lane)"},
		{"lanes: {a: {threads: 0}}", ":1: lanes.a.threads: \"0\", expected a whole number of 1 to 1024"},
		{"lanes: {a: {cores: 1}}", ":1: lanes.a.cores: no such key, expected threads"},
		{"lanes: {a: 3}", ":1: lanes.a: a single value, expected a map"},
	};
	opd_status status = load(bad[_i].text);
	ck_assert_int_ne(status, OPD_OK);
	expect_error(bad[_i].rest);
}
END_TEST

/* Whether the file `tenants: {a: {<key>: <value>}}` is good; a bad one is an error that names the key. */
static bool quota_is_good(const char *key, const char *value)
{
	char text[200], name[100];
	(void)snprintf(text, sizeof text, "tenants: {a: {%s: \"%s\"}}\n", key, value);
	(void)snprintf(name, sizeof name, ":1: tenants.a.%s: ", key);
	config_destroy(config);
	config = config_create();
	const opd_status status = load(text);
	if (status == OPD_OK)
		return true;
	ck_assert_int_eq(status, OPD_INVALID_ARGUMENT);
	ck_assert_msg(strncmp(error.text + strlen(path), name, strlen(name)) == 0 && strstr(error.text, "expected") != NULL, "%s", error.text);
	return false;
}

START_TEST(every_quota_takes_what_it_can_be_and_names_what_it_cant)
{
	static const char *const numbers[] = {"sessions", "in_flight", "queued", "session_in_flight", "session_queued"};
	static const char *const sizes[] = {"bytes_in", "bytes_out", "memory", "device_memory", "session_bytes_in", "session_bytes_out", "session_memory", "session_device_memory"};
	static const char *const times[] = {"device_time", "session_device_time"};
	static const struct {
		const char *const *keys;
		size_t count;
		const char *good[4], *bad[8];
	} kinds[] = {
		{numbers, sizeof numbers / sizeof numbers[0], {"0", "1", "1000000"}, {"-1", "1.5", "1000001", "4294967296", "18446744073709551616", "many", " 1", ""}},
		{sizes, sizeof sizes / sizeof sizes[0], {"0", "1", "64 KiB", "18446744073709551615"}, {"-1", "1.5 GiB", "18446744073709551616", "16777216 TiB", "1 parsec", "KiB", "0x10", ""}},
		{times, sizeof times / sizeof times[0], {"0", "1ms", "1024s"}, {"-1s", "5", "999999ns", "1025s", "18446744073709551616s", "18446744073709551615s", "1 day", ""}},
	};
	for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
		for (size_t k = 0; k < kinds[i].count; k++) {
			for (size_t n = 0; n < sizeof kinds[i].good / sizeof kinds[i].good[0] && kinds[i].good[n] != NULL; n++)
				ck_assert_msg(quota_is_good(kinds[i].keys[k], kinds[i].good[n]), "%s", error.text);
			for (size_t n = 0; n < sizeof kinds[i].bad / sizeof kinds[i].bad[0]; n++)
				ck_assert_msg(!quota_is_good(kinds[i].keys[k], kinds[i].bad[n]), "%s: %s", kinds[i].keys[k], kinds[i].bad[n]);
		}
}
END_TEST

START_TEST(a_tenants_lane_must_be_there)
{
	load_ok("tenants:\n  alice: {lane: fast}\n");
	ck_assert_int_eq(config_check(config, false, &error), OPD_INVALID_ARGUMENT);
	expect_error(":2: tenants.alice.lane: \"fast\" is no lane of `lanes`, nor cpu");
}
END_TEST

START_TEST(tls_has_its_keys)
{
	load_ok("tls: {certificate: /c, key: k.pem, client_ca: /ca, client_certificates: optional}\nlimits: {handshakes: 7}");
	ck_assert_str_eq(config->tls.certificate, "/c");
	ck_assert_str_eq(config->tls.key, "k.pem");
	ck_assert_str_eq(config->tls.client_ca, "/ca");
	ck_assert_int_eq(config->tls.clients, TLS_CLIENTS_OPTIONAL);
	ck_assert_uint_eq(config->limits.handshakes, 7);
	ck_assert_int_eq(config_load_tls(config, NULL, &error), OPD_OK); /* nobody listens: no file is read */
	ck_assert_ptr_null(config->tls_context);
	ck_assert_int_eq(config_add_listener(config, "tls://127.0.0.1:0", &error), OPD_OK);
	ck_assert_int_eq(config_load_tls(config, NULL, &error), OPD_INVALID_ARGUMENT);
}
END_TEST

START_TEST(loopback_needs_nothing)
{
	static const char *const local[] = {"tcp://127.0.0.1:1", "tcp://127.9.9.9:1", "tcp://[::1]:1", "tcp://localhost:1",
	                                    "tcp://[::ffff:127.0.0.1]:1"};
	ck_assert_int_eq(config_add_listener(config, local[_i], &error), OPD_OK);
	ck_assert_int_eq(config_check(config, false, &error), OPD_OK);
}
END_TEST

START_TEST(a_listener_twice_is_refused_but_any_free_port_may_repeat)
{
	ck_assert_int_eq(config_add_listener(config, "tcp://127.0.0.1:0", &error), OPD_OK);
	ck_assert_int_eq(config_add_listener(config, "tcp://127.0.0.1:0", &error), OPD_OK);
	ck_assert_int_eq(config_check(config, false, &error), OPD_OK);
	ck_assert_int_eq(config_add_listener(config, "unix:/a", &error), OPD_OK);
	ck_assert_int_eq(config_add_listener(config, "unix:/a", &error), OPD_OK);
	ck_assert_int_eq(config_check(config, false, &error), OPD_INVALID_ARGUMENT);
	ck_assert_str_eq(error.text, "listen: unix:/a is there twice");
	config_clear_listeners(config);
	ck_assert_uint_eq(config->listener_count, 0);
}
END_TEST

START_TEST(a_socket_path_that_does_not_fit_is_refused)
{
	char address[200] = "unix:/";
	memset(address + 6, 'a', 107);
	ck_assert_int_eq(config_add_listener(config, address, &error), OPD_INVALID_ARGUMENT);
	ck_assert_ptr_nonnull(strstr(error.text, "the path has 108 bytes, expected at most 107"));
	address[6 + 106] = '\0';
	ck_assert_int_eq(config_add_listener(config, address, &error), OPD_OK);
}
END_TEST

START_TEST(flags_go_over_the_file)
{
	load_ok("priorities: {relu: [cpu], add: [cpu]}\nthreads: 2\n");
	ck_assert_int_eq(config_add_priority(config, "relu=native,cpu", &error), OPD_OK);
	ck_assert_int_eq(config_add_priority(config, "*=cpu", &error), OPD_OK);
	ck_assert_int_eq(config_add_priority(config, "add=", &error), OPD_OK);
	ck_assert_int_eq(config_set(config, "threads", "5", &error), OPD_OK);
	ck_assert_uint_eq(config->priority_count, 3);
	ck_assert_uint_eq(config->priorities[0].count, 2);
	ck_assert_str_eq(config->priorities[0].providers[0], "native");
	ck_assert_uint_eq(config->priorities[0].line, 0);
	ck_assert_uint_eq(config->priorities[1].count, 0);
	ck_assert_uint_eq(config->threads, 5);
}
END_TEST

START_TEST(a_flag_for_an_op_replaces_the_lists_that_narrow_it_too)
{
	load_ok("priorities: {relu: [cpu], relu/bf16: [native], 'relu/bf16/rows<=4': [cpu], 'add/rows<=4': [cpu], add: [native]}\n");
	ck_assert_uint_eq(config->priority_count, 5);
	ck_assert_int_eq(config_add_priority(config, "add/rows<=4=native,cpu", &error), OPD_OK);
	ck_assert_uint_eq(config->priority_count, 5);
	ck_assert_str_eq(config->priorities[3].op, "add/rows<=4");
	ck_assert_uint_eq(config->priorities[3].count, 2);
	ck_assert_int_eq(config_add_priority(config, "relu=native", &error), OPD_OK);
	ck_assert_uint_eq(config->priority_count, 3);
	ck_assert_str_eq(config->priorities[0].op, "relu");
	ck_assert_str_eq(config->priorities[0].providers[0], "native");
	ck_assert_str_eq(config->priorities[1].op, "add/rows<=4");
}
END_TEST

START_TEST(bad_flags_are_refused)
{
	ck_assert_int_eq(config_add_priority(config, "relu", &error), OPD_INVALID_ARGUMENT);
	ck_assert_str_eq(error.text, "priority \"relu\": expected op=provider,provider");
	ck_assert_int_eq(config_add_priority(config, "relu=a,,b", &error), OPD_INVALID_ARGUMENT);
	ck_assert_int_eq(config_add_priority(config, "=a", &error), OPD_INVALID_ARGUMENT);
	ck_assert_int_eq(config_add_module(config, "mine=", false, &error), OPD_INVALID_ARGUMENT);
	ck_assert_int_eq(config_add_module(config, "relative.so", false, &error), OPD_INVALID_ARGUMENT);
	ck_assert_int_eq(config_set(config, "listen", "x", &error), OPD_NOT_FOUND);
	ck_assert_int_eq(config_set(config, "threads", "", &error), OPD_INVALID_ARGUMENT);
}
END_TEST

START_TEST(modules_come_with_and_without_a_name)
{
	ck_assert_int_eq(config_add_module(config, "mine=/a=b.so", false, &error), OPD_OK);
	ck_assert_int_eq(config_add_module(config, "/a=b.so", false, &error), OPD_OK);
	ck_assert_str_eq(config->modules[0].name, "mine");
	ck_assert_str_eq(config->modules[0].path, "/a=b.so");
	ck_assert_ptr_null(config->modules[1].name);
	ck_assert_str_eq(config->modules[1].path, "/a=b.so");
}
END_TEST

START_TEST(the_default_socket_follows_its_rule)
{
	char socket[200];
	ck_assert_int_eq(setenv("XDG_RUNTIME_DIR", "/run/user/7", 1), 0);
	config_default_socket(socket, sizeof socket);
	ck_assert_str_eq(socket, "/run/user/7/opd.sock");
	ck_assert_int_eq(setenv("XDG_RUNTIME_DIR", "relative", 1), 0);
	config_default_socket(socket, sizeof socket);
	char expected[200];
	(void)snprintf(expected, sizeof expected, geteuid() == 0 ? "/run/opd/opd.sock" : "/tmp/opd-%u/opd.sock", (unsigned)geteuid());
	ck_assert_str_eq(socket, expected);
}
END_TEST

START_TEST(sizes_and_durations_have_units)
{
	uint64_t value;
	ck_assert_int_eq(config_parse_bytes("1GiB", &value, &error), OPD_OK);
	ck_assert_uint_eq(value, 1u << 30);
	ck_assert_int_eq(config_parse_bytes("3 KiB", &value, &error), OPD_OK);
	ck_assert_uint_eq(value, 3072);
	ck_assert_int_eq(config_parse_bytes("18446744073709551615", &value, &error), OPD_OK);
	ck_assert_uint_eq(value, UINT64_MAX);
	ck_assert_int_eq(config_parse_duration("2h", &value, &error), OPD_OK);
	ck_assert_uint_eq(value, 7200000000000);
	ck_assert_int_eq(config_parse_duration("0", &value, &error), OPD_OK);
	ck_assert_uint_eq(value, 0);
	static const char *const bad[] = {"", " 1", "+1", "-1", "0x10", "1 gib", "1GiB ", "1 GiB x", "18446744073709551616", "16777216 TiB"};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
		ck_assert_msg(config_parse_bytes(bad[i], &value, &error) == OPD_INVALID_ARGUMENT, "%s", bad[i]);
	ck_assert_int_eq(config_parse_duration("5", &value, &error), OPD_INVALID_ARGUMENT);
}
END_TEST

static void add_file_tests(TCase *tests)
{
	tcase_add_test(tests, a_list_for_everything_replaces_what_comes_with_opd_and_nothing_that_was_said);
	tcase_add_test(tests, every_key_is_told_as_the_file_would_say_it);
	tcase_add_test(tests, two_configurations_differ_in_the_keys_that_changed);
	tcase_add_test(tests, defaults_are_those_of_the_header);
	tcase_add_test(tests, a_whole_file_is_read);
	tcase_add_loop_test(tests, files_that_say_nothing_are_fine, 0, 6);
	tcase_add_loop_test(tests, a_bad_file_is_an_error_that_names_line_key_and_what_was_expected, 0,
	                    (int)(sizeof bad_files / sizeof *bad_files));
	tcase_add_test(tests, a_nul_is_refused_wherever_it_is);
	tcase_add_test(tests, a_huge_file_is_refused_unread);
	tcase_add_test(tests, what_is_not_a_file_is_refused_and_hangs_nothing);
	tcase_add_loop_test(tests, deep_nesting_ends_where_it_begins, 0, 4);
	tcase_add_test(tests, a_file_cut_at_every_byte_is_read_or_refused);
	tcase_add_test(tests, a_long_list_of_providers_is_refused);
}

static void add_check_tests(TCase *tests)
{
	tcase_add_loop_test(tests, limits_that_contradict_each_other_are_refused, 0, 3);
	tcase_add_test(tests, limits_that_nobody_set_follow_memory);
	tcase_add_loop_test(tests, tcp_beyond_loopback_needs_to_be_asked_for, 0, 5);
	tcase_add_loop_test(tests, loopback_needs_nothing, 0, 5);
	tcase_add_test(tests, a_listener_twice_is_refused_but_any_free_port_may_repeat);
	tcase_add_test(tests, tls_may_be_reached_from_anywhere);
	tcase_add_test(tests, lanes_are_named_and_tenants_name_them);
	tcase_add_loop_test(tests, lanes_that_are_not_are_named, 0, 5);
	tcase_add_test(tests, every_quota_takes_what_it_can_be_and_names_what_it_cant);
	tcase_add_test(tests, a_tenants_lane_must_be_there);
	tcase_add_test(tests, tls_has_its_keys);
	tcase_add_test(tests, a_socket_path_that_does_not_fit_is_refused);
	tcase_add_test(tests, flags_go_over_the_file);
	tcase_add_test(tests, a_flag_for_an_op_replaces_the_lists_that_narrow_it_too);
	tcase_add_test(tests, bad_flags_are_refused);
	tcase_add_test(tests, modules_come_with_and_without_a_name);
	tcase_add_test(tests, the_default_socket_follows_its_rule);
	tcase_add_test(tests, sizes_and_durations_have_units);
}

int main(void)
{
	Suite *suite = suite_create("config");
	TCase *tests = tcase_create("config");
	tcase_set_timeout(tests, 60);
	tcase_add_checked_fixture(tests, set_up, tear_down);
	add_file_tests(tests);
	add_check_tests(tests);
	suite_add_tcase(suite, tests);
	return suite_run(suite);
}
