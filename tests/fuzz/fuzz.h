/* What the fuzz targets share: libFuzzer's entry points, and a reader of decisions from the input's bytes.
 *
 * Layer: tests. A target is one fuzz_<name>.c; it runs under libFuzzer (clang), or under main.c, which replays a corpus and mutates it. */
#ifndef OPD_TESTS_FUZZ_H
#define OPD_TESTS_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

/* Broken promises end the run, as a crash would. */
_Noreturn void fuzz_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* A path under which the bytes can be read as a regular file, until the next call. */
const char *fuzz_file(const uint8_t *data, size_t bytes);

/* The rest of an input; when it is used up everything is zero. */
struct fuzz_input {
	const uint8_t *data;
	size_t bytes;
};

static inline uint8_t fuzz_u8(struct fuzz_input *input)
{
	if (input->bytes == 0)
		return 0;
	input->bytes--;
	return *input->data++;
}

static inline uint64_t fuzz_u64(struct fuzz_input *input)
{
	uint64_t value = 0;
	for (int i = 0; i < 8; i++)
		value = value << 8 | fuzz_u8(input);
	return value;
}

/* At most `most` bytes, borrowed. */
static inline const uint8_t *fuzz_bytes(struct fuzz_input *input, size_t most, size_t *bytes_out)
{
	const uint8_t *start = input->data;
	size_t taken = most < input->bytes ? most : input->bytes;
	input->data += taken;
	input->bytes -= taken;
	*bytes_out = taken;
	return start;
}

#endif
