/* The program behind tests/bench/kernels for limits and libraries: opd-bench-kernels THREADS answers lines of stdin, one each, until it ends.
 *
 *     copy BYTES, read BYTES          nanoseconds
 *     products DTYPE                  multiplications a nanosecond
 *     onednn|openblas OP DTYPE N,N…   microseconds
 *
 * "-" is the answer to what can't be measured here. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/kernel_limits.h"
#include "tests/bench/kernel_peers.h"

static struct host host;

static bool read_dims(const char *text, struct peer_case *peer)
{
	for (peer->dim_count = 0; peer->dim_count < 8;) {
		char *end;
		peer->dims[peer->dim_count++] = strtoll(text, &end, 10);
		if (end == text || peer->dims[peer->dim_count - 1] <= 0)
			return false;
		if (*end == '\0')
			return true;
		text = end + 1;
	}
	return false;
}

/* Negative: not here. False: no such question. */
static bool answer(uint32_t threads, int words, char word[4][64], double *value_out)
{
	struct peer_case peer = {.op = word[1]};
	if (strcmp(word[0], "copy") == 0 && words == 2)
		*value_out = limit_copy_ns(&host, threads, strtoull(word[1], NULL, 10));
	else if (strcmp(word[0], "read") == 0 && words == 2)
		*value_out = limit_read_ns(&host, threads, strtoull(word[1], NULL, 10));
	else if (strcmp(word[0], "products") == 0 && words == 2)
		*value_out = limit_products(&host, threads, opd_dtype_parse(word[1]));
	else if (words == 4 && (peer.dtype = opd_dtype_parse(word[2])) != OPD_DTYPE_NONE && read_dims(word[3], &peer))
		*value_out = strcmp(word[0], "onednn") == 0 ? peer_onednn_ns(&peer) / 1e3 : peer_openblas_ns(&peer) / 1e3;
	else
		return false;
	return true;
}

static int serve(uint32_t threads)
{
	char line[300], word[4][64];
	while (fgets(line, sizeof line, stdin) != NULL) {
		double value;
		int words = sscanf(line, "%63s %63s %63s %63s", word[0], word[1], word[2], word[3]);
		if (words < 2 || !answer(threads, words, word, &value)) {
			(void)fprintf(stderr, "opd-bench-kernels: no such question: %s", line);
			return EXIT_FAILURE;
		}
		if (value <= 0)
			(void)puts("-");
		else
			(void)printf("%.4f\n", value);
		(void)fflush(stdout);
	}
	return EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
	unsigned long threads = argc == 2 ? strtoul(argv[1], NULL, 10) : 0;
	if (threads == 0 || threads > 64) {
		(void)fprintf(stderr, "usage: %s THREADS < questions (see tests/bench/README.md)\n", argv[0]);
		return 2;
	}
	host_init(&host);
	host_watch(&host);
	int result = serve((uint32_t)threads);
	host_fini(&host);
	return result;
}
