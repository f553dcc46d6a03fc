/* Runs a fuzz target without libFuzzer: replays files and folders, and for --seconds N mutates what it has read.
 *
 * The mutations are few and blind; that is enough to shake a target where there is no clang, and to replay what libFuzzer has found. */
#include <dirent.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "fuzz.h"

#define INPUT_MAX (1u << 16)

struct input {
	uint8_t *data;
	size_t bytes;
};

static struct input *corpus;
static size_t corpus_count;
static uint64_t state = 0x9e3779b97f4a7c15u;

static uint64_t next_random(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static size_t below(size_t limit)
{
	return limit == 0 ? 0 : (size_t)(next_random() % limit);
}

static void add_file(const char *path)
{
	FILE *file = fopen(path, "rb");
	struct input input = {.data = malloc(INPUT_MAX)};
	if (file == NULL || input.data == NULL)
		fuzz_fail("%s can't be read", path);
	input.bytes = fread(input.data, 1, INPUT_MAX, file);
	(void)fclose(file);
	corpus = reallocarray(corpus, corpus_count + 1, sizeof corpus[0]);
	if (corpus == NULL)
		fuzz_fail("out of memory");
	corpus[corpus_count++] = input;
}

static int is_shown(const struct dirent *entry)
{
	return entry->d_name[0] != '.';
}

static void add(const char *path)
{
	struct stat status;
	if (stat(path, &status) != 0)
		fuzz_fail("%s isn't there", path);
	if (!S_ISDIR(status.st_mode)) {
		add_file(path);
		return;
	}
	struct dirent **entries;
	int count = scandir(path, &entries, is_shown, alphasort);
	for (int i = 0; i < count; i++) {
		char name[4096];
		(void)snprintf(name, sizeof name, "%s/%s", path, entries[i]->d_name);
		add_file(name);
		free(entries[i]);
	}
	free(entries);
}

static void mutate_once(struct input *input)
{
	static const uint8_t special[] = {0, 1, 2, 7, 8, 9, 0x7f, 0x80, 0xfe, 0xff};
	size_t at = below(input->bytes);
	size_t length = 1 + below(8);
	switch (input->bytes == 0 ? 3 : below(6)) {
	case 0:
		input->data[at] ^= (uint8_t)(1u << below(8));
		return;
	case 1:
		input->data[at] = special[below(sizeof special)];
		return;
	case 2: /* a piece goes */
		length = length < input->bytes - at ? length : input->bytes - at;
		memmove(input->data + at, input->data + at + length, input->bytes - at - length);
		input->bytes -= length;
		return;
	case 3: /* a piece comes */
		if (input->bytes + length > INPUT_MAX)
			return;
		memmove(input->data + at + length, input->data + at, input->bytes - at);
		for (size_t i = 0; i < length; i++)
			input->data[at + i] = (uint8_t)next_random();
		input->bytes += length;
		return;
	case 4: /* another one's tail */
	default: {
		const struct input *other = &corpus[below(corpus_count)];
		size_t from = below(other->bytes);
		length = other->bytes - from < INPUT_MAX - at ? other->bytes - from : INPUT_MAX - at;
		memcpy(input->data + at, other->data + from, length);
		input->bytes = at + length;
		return;
	}
	}
}

static void mutate(struct input *input)
{
	const struct input *from = &corpus[below(corpus_count)];
	memcpy(input->data, from->data, from->bytes);
	input->bytes = from->bytes;
	for (size_t i = 1 + below(8); i > 0; i--)
		mutate_once(input);
}

/* Exact in size, so that a sanitizer sees a read past the end. */
static void run(const struct input *input)
{
	uint8_t *copy = malloc(input->bytes == 0 ? 1 : input->bytes);
	if (copy == NULL)
		fuzz_fail("out of memory");
	memcpy(copy, input->data, input->bytes);
	(void)LLVMFuzzerTestOneInput(copy, input->bytes);
	free(copy);
}

/* What a process that fuzzes is at, for the one that watches it: a file for each input would cost more than most inputs. */
struct last {
	size_t bytes;
	uint8_t data[INPUT_MAX];
};

static void note(struct last *last, const struct input *input)
{
	memcpy(last->data, input->data, input->bytes);
	last->bytes = input->bytes;
}

/* What led to a crash is left behind for a replay. */
static void leave(const struct last *last)
{
	FILE *file = fopen("fuzz-last-input", "wb");
	if (file == NULL)
		return;
	(void)fwrite(last->data, 1, last->bytes, file);
	(void)fclose(file);
}

/* last NULL: a replay. */
static int work(int argc, char **argv, struct last *last)
{
	time_t seconds = 0;
	uint64_t executions = 0;
	(void)LLVMFuzzerInitialize(&argc, &argv);
	for (int i = 1; i < argc; i++) {
		if (strcmp(argv[i], "--seconds") == 0 && i + 1 < argc)
			seconds = atol(argv[++i]);
		else
			add(argv[i]);
	}
	if (corpus_count == 0)
		fuzz_fail("no inputs: name files or folders");
	for (size_t i = 0; i < corpus_count; i++, executions++)
		run(&corpus[i]);
	struct input input = {.data = malloc(INPUT_MAX)};
	state ^= (uint64_t)time(NULL) << 20;
	for (time_t end = time(NULL) + seconds; seconds != 0 && time(NULL) < end; executions++) {
		mutate(&input);
		note(last, &input);
		run(&input);
	}
	(void)printf("%llu executions, %zu of them inputs\n", (unsigned long long)executions, corpus_count);
	for (size_t i = 0; i < corpus_count; i++)
		free(corpus[i].data);
	free(corpus);
	free(input.data);
	return 0;
}

int main(int argc, char **argv)
{
	bool fuzzes = false;
	for (int i = 1; i < argc; i++)
		fuzzes = fuzzes || strcmp(argv[i], "--seconds") == 0;
	if (!fuzzes)
		return work(argc, argv, NULL);
	struct last *last = mmap(NULL, sizeof *last, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (last == MAP_FAILED)
		fuzz_fail("out of memory");
	const pid_t child = fork();
	if (child == 0)
		return work(argc, argv, last);
	int status = -1;
	if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
		leave(last);
		fuzz_fail("what it was at is in fuzz-last-input");
	}
	return 0;
}
