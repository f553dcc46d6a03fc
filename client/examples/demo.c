/* The demo of opd: a layer's first ops of a real model, run by a daemon, in this process or elsewhere, and checked.
 *
 *     opd-demo                        a daemon inside this process
 *     opd-demo unix:/run/opd/opd.sock one that runs already
 *
 * It exits with 0 only if every check was right. Each part is a page on how to use libopd: demo_dispatch.c, demo_session.c. */
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/examples/demo.h"
#include "opd/embedded.h"
#include "proto/text.h"

#define DEFAULT_MODEL "tests/models/kjv-llama/model.safetensors"
#define DEFAULT_TEXT "In the beginning God created the heaven and the earth."

/* The daemon inside this process: as installed, and a provider whose module can't be loaded, for the demo's list to name. */
static const char embedded_configuration[] = "modules:\n"
                                             "  - {name: cuda, path: /nonexistent/opd-provider-cuda.so}\n"
                                             "log: {level: error}\n";

struct arguments {
	const char *address; /* NULL: embedded, with the configuration above */
	const char *model;
	const char *text;
};

const char *shown(const char *text)
{
	static char ring[4][448];
	static unsigned next;
	char *out = ring[next++ % 4];
	return text == NULL ? "" : text_escape(text, strlen(text), out, sizeof ring[0]);
}

void demo_check(struct demo *demo, bool right, const char *format, ...)
{
	demo->checks++;
	demo->wrong += right ? 0 : 1;
	(void)fputs(right ? "  ok     " : "  WRONG  ", stdout);
	va_list args;
	va_start(args, format);
	(void)vprintf(format, args);
	va_end(args);
	(void)putchar('\n');
}

/* ---- Connecting ---- */

/* A client of a daemon in this process, which has read the configuration when the connection is there. */
static opd_status connect_embedded(const opd_connect_options *options, opd_client **client_out, opd_error *error)
{
	char path[] = "/tmp/opd-demo-XXXXXX";
	const int fd = mkstemp(path);
	if (fd < 0)
		return opd_fail(error, OPD_UNAVAILABLE, "%s: can't make a temporary file", path);
	const size_t bytes = sizeof embedded_configuration - 1;
	const bool written = write(fd, embedded_configuration, bytes) == (ssize_t)bytes;
	char address[64];
	(void)snprintf(address, sizeof address, "embedded:%s", path);
	const opd_status status = written && close(fd) == 0 ? opd_connect(address, options, client_out, error)
	                                                    : opd_fail(error, OPD_UNAVAILABLE, "%s: can't be written", path);
	(void)unlink(path);
	return status;
}

/* A provider that the daemon knows and that can't run, for the lists to name. */
static opd_status find_missing(struct demo *demo, opd_error *error)
{
	const opd_provider_list *list;
	const opd_status status = opd_providers(demo->client, &list, error);
	if (status != OPD_OK)
		return status;
	for (uint32_t i = 0; i < list->count && demo->missing[0] == '\0'; i++)
		if (!list->providers[i].available && strlen(list->providers[i].name) < sizeof demo->missing)
			(void)strcpy(demo->missing, list->providers[i].name);
	opd_document_free(list);
	return OPD_OK;
}

static opd_status demo_connect(struct demo *demo, const struct arguments *arguments, opd_error *error)
{
	const opd_connect_options options = {.struct_bytes = sizeof options, .client = "opd-demo", .timeout_us = 30 * 1000000u};
	const opd_status status = arguments->address == NULL ? connect_embedded(&options, &demo->client, error)
	                                                     : opd_connect(arguments->address, &options, &demo->client, error);
	if (status != OPD_OK)
		return status;
	const opd_session *session = opd_client_session(demo->client);
	(void)printf("connected to %s: %s, session %llu of tenant %s\n",
	             arguments->address == NULL ? "a daemon in this process" : shown(arguments->address), shown(session->server),
	             (unsigned long long)session->session, shown(session->tenant));
	return find_missing(demo, error);
}

/* ---- The demo ---- */

static void introduce(const struct demo *demo, const struct arguments *arguments)
{
	const struct demo_model *model = &demo->model;
	(void)printf("from %s: embed_tokens %s [%lld, %lld], layer 0's input_layernorm [%lld], q_proj [%lld, %lld]\n",
	             shown(arguments->model), opd_dtype_name(model->table.dtype), (long long)model->table.shape[0],
	             (long long)model->table.shape[1], (long long)model->norm.shape[0], (long long)model->query.shape[0],
	             (long long)model->query.shape[1]);
	(void)printf("the text is %lld bytes, a token each: \"%s\"\n", (long long)model->tokens, shown(arguments->text));
	if (demo->missing[0] == '\0')
		(void)puts("no provider of this daemon is unavailable: start it with --module cuda=/nonexistent/opd-provider-cuda.so to "
		           "see one passed over");
}

static bool run_parts(struct demo *demo)
{
	return part_ops(demo) && part_list(demo) && part_dry(demo) && part_session(demo) && part_kept(demo) && part_flight(demo) &&
	       part_direct(demo);
}

static bool tell(const struct arguments *arguments)
{
	struct demo demo = {0};
	opd_error error;
	opd_status status = demo_model_load(&demo.model, arguments->model, arguments->text, &error);
	if (status == OPD_OK)
		status = demo_connect(&demo, arguments, &error);
	bool right = false;
	if (status == OPD_OK) {
		introduce(&demo, arguments);
		right = run_parts(&demo) && demo.wrong == 0;
		(void)printf("\n%u checks, %u wrong%s\n", demo.checks, demo.wrong,
		             right || demo.wrong != 0 ? "" : ", and not all were reached");
	} else {
		(void)failed("the start", status, &error);
	}
	opd_result_destroy(demo.rows);
	opd_result_destroy(demo.normed);
	opd_result_destroy(demo.queries);
	opd_close(demo.client);
	demo_model_fini(&demo.model);
	return right;
}

static void usage(FILE *to)
{
	(void)fputs(
	    "usage: opd-demo [--model FILE.safetensors] [--text TEXT] [ADDRESS]\n\n"
	    "ADDRESS is unix:/path, tcp://host:port, embedded: or embedded:/path/opd.yaml; without one a daemon runs in this "
	    "process.\n"
	    "The model is by default " DEFAULT_MODEL ", from the folder where opd's source is.\n"
	    "Exit codes: 0 every check was right, 1 one was wrong or could not be made, 2 the command line can't be understood.\n",
	    to);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
	    {"model", required_argument, NULL, 'm'}, {"text", required_argument, NULL, 't'}, {"help", no_argument, NULL, 'h'}, {0}};
	struct arguments arguments = {.model = DEFAULT_MODEL, .text = DEFAULT_TEXT};
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
		if (option == 'm') {
			arguments.model = optarg;
		} else if (option == 't') {
			arguments.text = optarg;
		} else {
			usage(option == 'h' ? stdout : stderr);
			return option == 'h' ? EXIT_SUCCESS : 2;
		}
	}
	if (argc - optind > 1) {
		usage(stderr);
		return 2;
	}
	arguments.address = argc > optind ? argv[optind] : NULL;
	opd_embedded_register();
	return tell(&arguments) ? EXIT_SUCCESS : EXIT_FAILURE;
}
