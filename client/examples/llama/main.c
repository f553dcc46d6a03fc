/* opd-llama: text from a Llama model, computed by an opd daemon. */
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/address.h"
#include "client/examples/llama/llama.h"
#include "opd/embedded.h"
#include "proto/text.h"

static const char help[] =
	"Usage: opd-llama [--connect ADDRESS] --model FOLDER --prompt TEXT [-n COUNT]\n"
	"       opd-llama [--connect ADDRESS] --random CONFIG [--seed N] --ids LIST [-n COUNT]\n"
	"\n"
	"Generates text with a Llama model, all of whose arithmetic is done by an opd daemon. The text goes to stdout, everything else to stderr.\n"
	"\n"
	"  --connect ADDRESS  unix:/path, tls://…, tcp://…, embedded: (a daemon in this process); else $OPD_ADDRESS, else the default socket,\n"
	"                     else embedded:\n"
	"  --model FOLDER     config.json and .safetensors files with Hugging Face names\n"
	"  --random CONFIG    in place of --model: a config.json, or its folder; the weights are made from a seed, in the dtype asked for\n"
	"  --seed N           of those (default 1)\n"
	"  --prompt TEXT      what to go on with, where a token is a byte (\"tokenizer\": \"bytes\")\n"
	"  --ids LIST         the same as token ids, \"1,15043,3186\": for every other tokenizer; ids come out\n"
	"  -n COUNT           tokens to generate (default 128); fewer if the model ends its text\n"
	"  --dtype TYPE       f32 (default), bf16 or f16: what weights, activations and cache are kept in\n"
	"  --provider NAME    this provider alone runs every op, where it can: the session's list for all ops\n"
	"  --share NAME       the weights are published as NAME/… and kept until withdrawn (opctl rm NAME/): whoever names them next finds them there\n"
	"  --shm              a step's inputs lie in memory shared with the daemon (Unix sockets)\n"
	"  --rings            requests and replies go through shared memory too (Unix sockets)\n"
	"  --poll US          with --rings: both sides look for so many microseconds before they sleep\n"
	"  --ahead COUNT      tokens under way before the first of them is answered (default 4, at most 64)\n"
	"  --trace            of every step: which provider ran each node, and for how long\n"
	"  --stats            tokens a second, the share of time outside kernels, and what part of this machine's memory rate the weights read mean\n"
	"  --help             this\n"
	"\n"
	"Exit codes: 0 done, 1 failed, 2 wrong usage.\n";

struct arguments {
	const char *address;
	const char *model; /* or the config of a random one */
	const char *prompt;
	const char *ids;
	const char *provider;
	const char *share;
	opd_dtype dtype;
	int64_t count;
	int64_t ahead;
	int64_t seed;
	bool random;
	bool trace;
	bool stats;
	bool shm;
	bool rings;
	int64_t poll_us;
};

enum option_key { KEY_CONNECT = 256, KEY_MODEL, KEY_RANDOM, KEY_SEED, KEY_PROMPT, KEY_IDS, KEY_DTYPE, KEY_PROVIDER, KEY_SHARE, KEY_SHM, KEY_RINGS, KEY_POLL, KEY_AHEAD, KEY_TRACE, KEY_STATS, KEY_HELP };

static const struct option options[] = {
	{"connect", required_argument, NULL, KEY_CONNECT}, {"model", required_argument, NULL, KEY_MODEL},
	{"random", required_argument, NULL, KEY_RANDOM},   {"seed", required_argument, NULL, KEY_SEED},
	{"prompt", required_argument, NULL, KEY_PROMPT},   {"ids", required_argument, NULL, KEY_IDS},
	{"dtype", required_argument, NULL, KEY_DTYPE},     {"provider", required_argument, NULL, KEY_PROVIDER},
	{"share", required_argument, NULL, KEY_SHARE},
	{"shm", no_argument, NULL, KEY_SHM},
	{"rings", no_argument, NULL, KEY_RINGS},           {"poll", required_argument, NULL, KEY_POLL},
	{"ahead", required_argument, NULL, KEY_AHEAD},     {"trace", no_argument, NULL, KEY_TRACE},
	{"stats", no_argument, NULL, KEY_STATS},           {"help", no_argument, NULL, KEY_HELP},
	{0},
};

static const char *shown(const char *text)
{
	static char out[1024];
	return text_escape(text, strlen(text), out, sizeof out);
}

/* Ends the program. */
static void usage(const char *what, const char *value)
{
	(void)fprintf(stderr, "opd-llama: %s%s%s\nTry opd-llama --help.\n", what, value == NULL ? "" : ": ", value == NULL ? "" : shown(value));
	exit(2);
}

static int64_t number(const char *what, const char *text, int64_t low, int64_t high)
{
	char *end;
	errno = 0;
	const long long value = strtoll(text, &end, 10);
	if (errno != 0 || end == text || *end != '\0' || value < low || value > high)
		usage(what, text);
	return value;
}

static opd_dtype dtype_of(const char *text)
{
	static const opd_dtype known[] = {OPD_f32, OPD_bf16, OPD_f16};
	for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
		if (strcmp(text, opd_dtype_name(known[i])) == 0)
			return known[i];
	usage("--dtype: expected f32, bf16 or f16", text);
	return OPD_DTYPE_NONE;
}

static void parse_one(struct arguments *arguments, int key)
{
	switch (key) {
	case KEY_CONNECT:
		arguments->address = optarg;
		return;
	case KEY_MODEL:
	case KEY_RANDOM:
		if (arguments->model != NULL)
			usage("expected one of --model and --random, once", NULL);
		arguments->model = optarg;
		arguments->random = key == KEY_RANDOM;
		return;
	case KEY_SEED:
		arguments->seed = number("--seed: expected a whole number from 0", optarg, 0, INT64_MAX);
		return;
	case KEY_PROMPT:
		arguments->prompt = optarg;
		return;
	case KEY_IDS:
		arguments->ids = optarg;
		return;
	case KEY_DTYPE:
		arguments->dtype = dtype_of(optarg);
		return;
	case KEY_PROVIDER:
		arguments->provider = optarg;
		return;
	case KEY_SHARE:
		arguments->share = optarg;
		return;
	case KEY_SHM:
		arguments->shm = true;
		return;
	case KEY_RINGS:
		arguments->rings = true;
		return;
	case KEY_POLL:
		arguments->poll_us = number("--poll: expected 0 to 1000000", optarg, 0, 1000000);
		return;
	case KEY_AHEAD:
		arguments->ahead = number("--ahead: expected 1 to 64", optarg, 1, LLAMA_AHEAD_MAX);
		return;
	case 'n':
		arguments->count = number("-n: expected 1 to 1000000", optarg, 1, 1000000);
		return;
	case KEY_TRACE:
		arguments->trace = true;
		return;
	case KEY_STATS:
		arguments->stats = true;
		return;
	case KEY_HELP:
		(void)fputs(help, stdout);
		exit(0);
	default:
		usage("wrong usage", NULL); /* getopt has said what */
	}
}

static struct arguments parse(int argc, char **argv)
{
	struct arguments arguments = {.dtype = OPD_f32, .count = 128, .ahead = 4, .seed = 1};
	for (int key; (key = getopt_long(argc, argv, "n:", options, NULL)) != -1;)
		parse_one(&arguments, key);
	if (optind != argc)
		usage("an argument too many", argv[optind]);
	if (arguments.model == NULL)
		usage("--model or --random is missing", NULL);
	if ((arguments.prompt == NULL) == (arguments.ids == NULL))
		usage("expected either --prompt or --ids", NULL);
	return arguments;
}

/* ---- Tokens ---- */

static opd_status prompt_of_bytes(const char *text, int64_t **ids_out, int64_t *count_out, opd_error *error)
{
	const size_t bytes = strlen(text);
	if (bytes == 0)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "the prompt is empty");
	int64_t *ids = malloc(bytes * sizeof *ids);
	if (ids == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory for the prompt");
	for (size_t i = 0; i < bytes; i++)
		ids[i] = (unsigned char)text[i];
	*ids_out = ids;
	*count_out = (int64_t)bytes;
	return OPD_OK;
}

static opd_status prompt_of_ids(const char *text, int64_t vocabulary, int64_t **ids_out, int64_t *count_out, opd_error *error)
{
	int64_t *ids = malloc((strlen(text) / 2 + 1) * sizeof *ids);
	int64_t count = 0;
	if (ids == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "out of memory for the prompt");
	for (const char *at = text;;) {
		char *end;
		errno = 0;
		const long long id = strtoll(at, &end, 10);
		if (errno != 0 || end == at || (*end != ',' && *end != '\0') || id < 0 || id >= vocabulary) {
			free(ids);
			return opd_fail(error, OPD_INVALID_ARGUMENT, "--ids: number %lld isn't one from 0 to %lld", (long long)count + 1, (long long)vocabulary - 1);
		}
		ids[count++] = id;
		if (*end == '\0')
			break;
		at = end + 1;
	}
	*ids_out = ids;
	*count_out = count;
	return OPD_OK;
}

static opd_status prompt(const struct llama *llama, const struct arguments *arguments, int64_t **ids_out, int64_t *count_out, opd_error *error)
{
	if (arguments->ids != NULL)
		return prompt_of_ids(arguments->ids, llama->config.vocabulary, ids_out, count_out, error);
	if (!llama->config.bytes)
		return opd_fail(error, OPD_UNIMPLEMENTED, "%s: its tokens aren't bytes: tokenize the prompt yourself and give --ids", arguments->model);
	return prompt_of_bytes(arguments->prompt, ids_out, count_out, error);
}

static bool ends(const struct llama *llama, int64_t id)
{
	for (uint32_t i = 0; i < llama->config.eos_count; i++)
		if (llama->config.eos[i] == id)
			return true;
	return false;
}

static void put(const struct llama *llama, int64_t id)
{
	if (llama->config.bytes)
		(void)putchar((int)id);
	else
		(void)printf("%lld ", (long long)id);
	(void)fflush(stdout);
}

/* ---- The run ---- */

static opd_status connect_to(const struct arguments *arguments, opd_client **client_out, opd_error *error)
{
	const opd_connect_options how = {.struct_bytes = sizeof how, .client = "opd-llama " OPD_VERSION, .shared_memory = arguments->shm,
	                                 .rings = arguments->rings, .poll_us = (uint64_t)arguments->poll_us};
	const char *address = arguments->address != NULL ? arguments->address : getenv("OPD_ADDRESS");
	opd_embedded_register();
	if (address != NULL)
		return opd_connect(address, &how, client_out, error);
	char standard[160];
	address_default(standard, sizeof standard);
	if (opd_connect(standard, &how, client_out, error) == OPD_OK)
		return OPD_OK;
	(void)fprintf(stderr, "no daemon answers: running in this process\n");
	return opd_connect("embedded:", &how, client_out, error);
}

/* A daemon in this process is called directly: frames would go over its loop's thread, and kernels over a third one. */
static opd_status call_directly(struct llama *llama, opd_error *error)
{
	const opd_status status = opd_direct_begin(llama->client, error);
	return status == OPD_FAILED_PRECONDITION ? OPD_OK : status; /* it is another process */
}

static opd_status use_provider(struct llama *llama, const char *provider, opd_error *error)
{
	const opd_priority_entry entry = {.op = "*", .providers = &provider, .count = 1};
	return provider == NULL ? OPD_OK : opd_priority_push(llama->client, &entry, 1, error);
}

static void show_stats(const struct llama *llama)
{
	const struct llama_times *times = &llama->times;
	const double token_ns = times->decode_tokens == 0 ? 0 : (double)times->decode_ns / (double)times->decode_tokens;
	const double kernel_ns = times->asked_steps == 0 ? 0 : (double)times->kernel_ns / (double)times->asked_steps;
	(void)fprintf(stderr, "prompt  %llu tokens in %.2f ms\n", (unsigned long long)times->prompt_tokens, (double)times->prompt_ns / 1e6);
	if (token_ns != 0)
		(void)fprintf(stderr, "decode  %llu tokens, %.0f tokens/s: %.1f us a token, %.1f in kernels, %.1f outside (%.0f %%)\n",
		              (unsigned long long)times->decode_tokens, 1e9 / token_ns, token_ns / 1e3, kernel_ns / 1e3, (token_ns - kernel_ns) / 1e3,
		              100 * (token_ns - kernel_ns) / token_ns);
}

/* A token reads all weights once. The machine measured is this one: the daemon's too, unless it is far away. */
static void show_rate(struct llama *llama)
{
	const struct llama_times *times = &llama->times;
	const opd_server_info *info = NULL;
	opd_error error;
	if (times->decode_tokens == 0 || opd_info(llama->client, &info, &error) != OPD_OK)
		return;
	const unsigned threads = info->threads;
	opd_document_free(info);
	const double bytes = (double)llama_weight_bytes(llama), rate = llama_read_rate(threads);
	const double read = bytes * (double)times->decode_tokens / (double)times->decode_ns * 1e9;
	(void)fprintf(stderr, "weights %.1f MB a token: %.2f GB/s", bytes / 1e6, read / 1e9);
	if (rate != 0)
		(void)fprintf(stderr, ", %.0f %% of the %.2f GB/s that %u threads read here", 100 * read / rate, rate / 1e9, threads);
	(void)fputc('\n', stderr);
}

static opd_status generate(struct llama *llama, const struct arguments *arguments, const int64_t *ids, int64_t count, opd_error *error)
{
	const int64_t positions = llama->config.positions;
	if (count + arguments->count > positions + 1)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "%lld tokens of prompt and %lld to generate, the model has %lld positions", (long long)count,
		                (long long)arguments->count, (long long)positions);
	opd_status status = llama_begin(llama, count + arguments->count - 1, error);
	if (status == OPD_OK)
		status = llama_prompt(llama, ids, count, error);
	uint64_t began = 0;
	for (int64_t i = 0; i < arguments->count && status == OPD_OK; i++) {
		int64_t id;
		status = llama_next(llama, arguments->count - 1 - i, &id, error);
		if (status != OPD_OK || ends(llama, id))
			break;
		put(llama, id);
		if (i == 0) { /* the prompt's own */
			began = llama_now_ns();
			llama->times.prompt_ns += began;
			llama->times.kernel_ns = llama->times.asked_steps = 0;
		} else {
			llama->times.decode_tokens++;
			llama->times.decode_ns = llama_now_ns() - began;
		}
	}
	return status;
}

static opd_status work(struct llama *llama, const struct arguments *arguments, opd_error *error)
{
	int64_t *ids = NULL;
	int64_t count = 0;
	opd_status status = llama_read_config(arguments->model, &llama->config, error);
	if (status == OPD_OK)
		status = prompt(llama, arguments, &ids, &count, error);
	if (status == OPD_OK)
		status = connect_to(arguments, &llama->client, error);
	if (status == OPD_OK)
		status = use_provider(llama, arguments->provider, error);
	if (status == OPD_OK)
		status = llama_load(llama, arguments->model, isatty(STDERR_FILENO) == 0, error);
	if (status == OPD_OK)
		status = call_directly(llama, error);
	if (status == OPD_OK)
		status = generate(llama, arguments, ids, count, error);
	free(ids);
	return status;
}

int main(int argc, char **argv)
{
	const struct arguments arguments = parse(argc, argv);
	struct llama *llama = calloc(1, sizeof *llama);
	opd_error error;
	if (llama == NULL)
		return 1;
	llama->dtype = arguments.dtype;
	llama->ahead = (unsigned)arguments.ahead;
	llama->share = arguments.share;
	llama->trace = arguments.trace;
	llama->stats = arguments.stats;
	llama->shm = arguments.shm;
	llama->random = arguments.random;
	llama->seed = (uint64_t)arguments.seed;
	const opd_status status = work(llama, &arguments, &error);
	if (isatty(STDOUT_FILENO))
		(void)putchar('\n');
	if (status != OPD_OK)
		(void)fprintf(stderr, "opd-llama: %s: %s\n", opd_status_name(status), shown(error.text));
	else if (arguments.stats) {
		show_stats(llama);
		show_rate(llama);
	}
	llama_fini(llama);
	opd_close(llama->client);
	free(llama);
	return status == OPD_OK && fflush(stdout) == 0 ? 0 : 1;
}
