#include "tests/bench/kernel_limits.h"

#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

#include "tests/bench/kernel_clock.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

enum { SHARE = 128 << 10, HUGE_PAGE = 2 << 20 };

typedef uint64_t block __attribute__((vector_size(64), aligned(8)));

struct limit {
	struct host *host;
	uint32_t threads;
	uint64_t bytes; /* of each buffer */
	unsigned char *from, *to;
	opd_range_fn range;
	_Atomic uint64_t sink; /* so that nothing that is read is left out */
	float factor;
};

static void *limit_alloc(uint64_t bytes)
{
	void *memory = NULL;
	if (posix_memalign(&memory, bytes < 2 * HUGE_PAGE ? 64 : HUGE_PAGE, bytes) != 0)
		abort();
	if (bytes >= 2 * HUGE_PAGE)
		(void)madvise(memory, bytes, MADV_HUGEPAGE);
	memset(memory, 1, bytes);
	return memory;
}

/* One pass: bytes in shares, so that a thread that is held up leaves the rest to the others. */
static void limit_pass(void *argument)
{
	struct limit *limit = argument;
	opd_exec exec = {.struct_bytes = sizeof exec, .threads = limit->threads, .host = &limit->host->table};
	uint64_t shares = (limit->bytes + SHARE - 1) / SHARE;
	if (limit->threads == 1 || shares == 1)
		limit->range(limit, 0, shares, 0);
	else
		limit->host->table.parallel_for(&exec, shares, 1, limit->range, limit);
}

static uint64_t limit_end(const struct limit *limit, uint64_t end)
{
	return end * SHARE < limit->bytes ? end * SHARE : limit->bytes;
}

static void copy_plain(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	struct limit *limit = argument;
	(void)thread;
	memcpy(limit->to + begin * SHARE, limit->from + begin * SHARE, limit_end(limit, end) - begin * SHARE);
}

static void copy_streaming(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
#if defined(__AVX512F__)
	struct limit *limit = argument;
	uint64_t stop = limit_end(limit, end) / 64 * 64;
	(void)thread;
	for (uint64_t at = begin * SHARE; at < stop; at += 64)
		_mm512_stream_si512((void *)(limit->to + at), _mm512_loadu_si512(limit->from + at));
	_mm_sfence();
#elif defined(__AVX2__)
	struct limit *limit = argument;
	uint64_t stop = limit_end(limit, end) / 32 * 32;
	(void)thread;
	for (uint64_t at = begin * SHARE; at < stop; at += 32)
		_mm256_stream_si256((void *)(limit->to + at), _mm256_loadu_si256((const void *)(limit->from + at)));
	_mm_sfence();
#else
	copy_plain(argument, begin, end, thread);
#endif
}

static uint64_t fold(const block *sums, size_t count)
{
	block all = sums[0];
	for (size_t i = 1; i < count; i++)
		all |= sums[i];
	return all[0] | all[1] | all[2] | all[3] | all[4] | all[5] | all[6] | all[7];
}

static block block_at(const unsigned char *memory)
{
	block value;
	memcpy(&value, memory, sizeof value);
	return value;
}

static void read_stream(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	struct limit *limit = argument;
	block sums[4] = {{0}, {0}, {0}, {0}};
	uint64_t stop = limit_end(limit, end) / 256 * 256;
	(void)thread;
	for (uint64_t at = begin * SHARE; at < stop; at += 256)
		for (size_t i = 0; i < 4; i++)
			sums[i] |= block_at(limit->from + at + 64 * i);
	(void)atomic_fetch_or(&limit->sink, fold(sums, 4));
}

/* A share is four streams, each with the lines after next asked for. */
static void read_streams(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	struct limit *limit = argument;
	block sums[4] = {{0}, {0}, {0}, {0}};
	(void)thread;
	for (uint64_t share = begin; share < end; share++) {
		uint64_t quarter = (limit_end(limit, share + 1) - share * SHARE) / 4 / 64 * 64;
		const unsigned char *from = limit->from + share * SHARE;
		for (uint64_t at = 0; at < quarter; at += 64)
			for (size_t i = 0; i < 4; i++) {
				sums[i] |= block_at(from + i * quarter + at);
				__builtin_prefetch(from + i * quarter + at + 1024, 0, 3);
			}
	}
	(void)atomic_fetch_or(&limit->sink, fold(sums, 4));
}

static double lesser(double a, double b)
{
	return a < b ? a : b;
}

double limit_copy_ns(struct host *host, uint32_t threads, uint64_t bytes)
{
	struct limit limit = {.host = host, .threads = threads, .bytes = (bytes / 2 + 63) / 64 * 64, .range = copy_plain};
	limit.from = limit_alloc(limit.bytes);
	limit.to = limit_alloc(limit.bytes);
	double plain = clock_median(limit_pass, &limit);
	limit.range = copy_streaming;
	double streaming = clock_median(limit_pass, &limit);
	free(limit.from);
	free(limit.to);
	return lesser(plain, streaming);
}

double limit_read_ns(struct host *host, uint32_t threads, uint64_t bytes)
{
	struct limit limit = {.host = host, .threads = threads, .bytes = (bytes + 255) / 256 * 256, .range = read_stream};
	limit.from = limit_alloc(limit.bytes);
	double one = clock_median(limit_pass, &limit);
	limit.range = read_streams;
	double four = clock_median(limit_pass, &limit);
	free(limit.from);
	return lesser(one, four);
}

enum { CHAINS = 20, ROUNDS = 2000 };

#if defined(__AVX512F__)
typedef float lanes __attribute__((vector_size(64)));
#else
typedef float lanes __attribute__((vector_size(32)));
#endif

static void multiply_f32(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	struct limit *limit = argument;
	lanes chains[CHAINS], factor = {0};
	(void)thread;
	factor += limit->factor;
	for (size_t i = 0; i < CHAINS; i++)
		chains[i] = factor + (float)i;
	for (uint64_t share = begin; share < end; share++)
		for (int round = 0; round < ROUNDS; round++)
			for (size_t i = 0; i < CHAINS; i++)
				chains[i] = chains[i] * factor + factor;
	lanes all = chains[0];
	for (size_t i = 1; i < CHAINS; i++)
		all += chains[i];
	(void)atomic_fetch_or(&limit->sink, (uint64_t)(all[0] > 0));
}

#if defined(__AVX512BF16__)
static void multiply_bf16(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	struct limit *limit = argument;
	__m512 chains[CHAINS];
	__m512bh factor = _mm512_cvtne2ps_pbh(_mm512_set1_ps(limit->factor), _mm512_set1_ps(limit->factor));
	(void)thread;
	for (size_t i = 0; i < CHAINS; i++)
		chains[i] = _mm512_set1_ps((float)i);
	for (uint64_t share = begin; share < end; share++)
		for (int round = 0; round < ROUNDS; round++)
			for (size_t i = 0; i < CHAINS; i++)
				chains[i] = _mm512_dpbf16_ps(chains[i], factor, factor);
	float all = 0;
	for (size_t i = 0; i < CHAINS; i++)
		all += chains[i][0];
	(void)atomic_fetch_or(&limit->sink, (uint64_t)(all > 0));
}
#endif

double limit_products(struct host *host, uint32_t threads, opd_dtype dtype)
{
	enum { SHARES = 16 };
	struct limit limit = {.host = host, .threads = threads, .bytes = SHARES * SHARE, .range = multiply_f32, .factor = 0.5f};
	double products = SHARES * (double)ROUNDS * CHAINS * (double)(sizeof(lanes) / sizeof(float));
	if (dtype == OPD_bf16) {
#if defined(__AVX512BF16__)
		limit.range = multiply_bf16;
		products = SHARES * (double)ROUNDS * CHAINS * 32;
#else
		return 0;
#endif
	} else if (dtype != OPD_f32) {
		return 0;
	}
	return products / clock_median(limit_pass, &limit);
}
