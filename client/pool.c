#include "client/pool.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "client/result.h"
#include "proto/latch.h"

#define SMALL_SHIFT_MIN 8u  /* 256 bytes */
#define SMALL_SHIFT_MAX 19u /* 512 KiB: larger blocks are mapped, so that giving one up returns its pages */
#define SMALL_CLASSES (SMALL_SHIFT_MAX - SMALL_SHIFT_MIN + 1u)
#define SMALL_CACHE_BYTES ((size_t)8 << 20)
#define LARGE_CACHE_BYTES ((size_t)128 << 20) /* the bulk transfers in our targets move 64 MiB */
#define LARGE_STEP ((size_t)2 << 20)          /* a huge page */
#define RESULT_CACHE 256u

struct pool {
	struct latch latch;
	size_t references;
	struct block *small[SMALL_CLASSES];
	size_t small_bytes;
	struct block *large;
	size_t large_bytes;
	struct opd_result *results;
	size_t result_count;
};

struct pool *pool_create(void)
{
	struct pool *pool = calloc(1, sizeof *pool);
	if (pool == NULL)
		return NULL;
	pool->references = 1;
	return pool;
}

static void block_free(struct block *block)
{
	if (block->mapped_bytes != 0)
		(void)munmap(block, block->mapped_bytes);
	else
		free(block);
}

static void block_free_list(struct block *block)
{
	while (block != NULL) {
		struct block *next = block->next;
		block_free(block);
		block = next;
	}
}

static void pool_destroy(struct pool *pool)
{
	for (size_t i = 0; i < SMALL_CLASSES; i++)
		block_free_list(pool->small[i]);
	block_free_list(pool->large);
	while (pool->results != NULL) {
		struct opd_result *next = pool->results->next;
		arena_fini(&pool->results->arena);
		free(pool->results);
		pool->results = next;
	}
	free(pool);
}

void pool_unref(struct pool *pool)
{
	if (pool == NULL)
		return;
	latch_lock(&pool->latch);
	const bool last = --pool->references == 0;
	latch_unlock(&pool->latch);
	if (last)
		pool_destroy(pool);
}

static unsigned small_class(uint64_t bytes)
{
	unsigned shift = SMALL_SHIFT_MIN;
	while ((uint64_t)1 << shift < bytes)
		shift++;
	return shift - SMALL_SHIFT_MIN;
}

static struct block *small_create(unsigned class)
{
	const size_t capacity = (size_t)1 << (class + SMALL_SHIFT_MIN);
	struct block *block = aligned_alloc(64, sizeof *block + capacity);
	if (block == NULL)
		return NULL;
	*block = (struct block){.capacity = capacity};
	return block;
}

static struct block *large_create(uint64_t bytes)
{
	if (bytes > SIZE_MAX / 2)
		return NULL;
	const size_t mapped = ((size_t)bytes + sizeof(struct block) + LARGE_STEP - 1) & ~(LARGE_STEP - 1);
	struct block *block = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (block == MAP_FAILED)
		return NULL;
	(void)madvise(block, mapped,
	              MADV_HUGEPAGE); /* a quarter of the page-fault time; it is no failure where the kernel hasn't it */
	*block = (struct block){.capacity = mapped - sizeof *block, .mapped_bytes = mapped};
	return block;
}

/* One that fits and wastes at most half of itself. */
static struct block *large_find(struct pool *pool, uint64_t bytes)
{
	for (struct block **at = &pool->large; *at != NULL; at = &(*at)->next) {
		struct block *block = *at;
		if (block->capacity >= bytes && block->capacity / 2 <= bytes + LARGE_STEP) {
			*at = block->next;
			pool->large_bytes -= block->capacity;
			return block;
		}
	}
	return NULL;
}

struct block *pool_take_block(struct pool *pool, uint64_t bytes)
{
	const bool small = bytes <= (uint64_t)1 << SMALL_SHIFT_MAX;
	const unsigned class = small ? small_class(bytes) : 0;
	struct block *block;
	latch_lock(&pool->latch);
	if (small) {
		block = pool->small[class];
		if (block != NULL) {
			pool->small[class] = block->next;
			pool->small_bytes -= block->capacity;
		}
	} else {
		block = large_find(pool, bytes);
	}
	latch_unlock(&pool->latch);
	if (block == NULL)
		block = small ? small_create(class) : large_create(bytes);
	return block;
}

/* Under the lock. False: there is enough already. */
static bool pool_keep(struct pool *pool, struct block *block)
{
	const bool large = block->mapped_bytes != 0;
	size_t *bytes = large ? &pool->large_bytes : &pool->small_bytes;
	if (block->capacity > (large ? LARGE_CACHE_BYTES : SMALL_CACHE_BYTES) - *bytes)
		return false;
	struct block **list = large ? &pool->large : &pool->small[small_class(block->capacity)];
	*bytes += block->capacity;
	block->next = *list;
	*list = block;
	return true;
}

void pool_give_block(struct pool *pool, struct block *block)
{
	if (block == NULL)
		return;
	latch_lock(&pool->latch);
	const bool kept = pool_keep(pool, block);
	latch_unlock(&pool->latch);
	if (!kept)
		block_free(block);
}

struct opd_result *pool_take_result(struct pool *pool)
{
	latch_lock(&pool->latch);
	struct opd_result *result = pool->results;
	if (result != NULL) {
		pool->results = result->next;
		pool->result_count--;
		pool->references++;
	}
	latch_unlock(&pool->latch);
	if (result != NULL)
		return result;
	result = calloc(1, sizeof *result);
	if (result == NULL)
		return NULL;
	arena_init(&result->arena, RESULT_ARENA_BYTES);
	result->pool = pool;
	latch_lock(&pool->latch);
	pool->references++;
	latch_unlock(&pool->latch);
	return result;
}

void pool_give_result(struct pool *pool, struct opd_result *result, struct block *block)
{
	latch_lock(&pool->latch);
	if (block != NULL && pool_keep(pool, block))
		block = NULL;
	if (pool->result_count < RESULT_CACHE) {
		result->next = pool->results;
		pool->results = result;
		pool->result_count++;
		result = NULL;
	}
	const bool last = --pool->references == 0;
	latch_unlock(&pool->latch);
	if (block != NULL)
		block_free(block);
	if (result != NULL) {
		arena_fini(&result->arena);
		free(result);
	}
	if (last)
		pool_destroy(pool);
}
