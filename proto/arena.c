#include "proto/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT ARENA_ALIGNMENT
#define FIRST_BLOCK_BYTES 4096u        /* an ordinary envelope and its messages fit */
#define KEPT_BLOCK_BYTES (64u << 10)   /* reset keeps no larger one: an idle connection must stay small */
#define GROWN_BLOCK_BYTES (256u << 10) /* blocks double up to this */

struct arena_block {
	struct arena_block *older;
	size_t bytes; /* the whole block, this header included */
};

_Static_assert(sizeof(struct arena_block) % ALIGNMENT == 0, "a block's first allocation is aligned");

void arena_init(struct arena *arena, size_t cap_bytes)
{
	*arena = (struct arena){.cap_bytes = cap_bytes};
}

static void use_block(struct arena *arena, struct arena_block *block)
{
	arena->next = (char *)(block + 1);
	arena->end = (char *)block + block->bytes;
}

void arena_fini(struct arena *arena)
{
	while (arena->blocks != NULL) {
		struct arena_block *block = arena->blocks;
		arena->blocks = block->older;
		free(block);
	}
	arena->next = arena->end = NULL;
	arena->used_bytes = 0;
}

void arena_reset(struct arena *arena)
{
	struct arena_block *block = arena->blocks;
	while (block != NULL && (block->older != NULL || block->bytes > KEPT_BLOCK_BYTES)) {
		struct arena_block *older = block->older;
		arena->used_bytes -= block->bytes;
		free(block);
		block = older;
	}
	arena->blocks = block;
	arena->next = arena->end = NULL;
	if (block != NULL)
		use_block(arena, block);
}

/* A first block that came after the mark is kept, empty: the arena is about to be used again. */
void arena_rewind(struct arena *arena, struct arena_mark mark)
{
	while (arena->blocks != mark.newest && arena->blocks->older != NULL) {
		struct arena_block *block = arena->blocks;
		arena->blocks = block->older;
		arena->used_bytes -= block->bytes;
		free(block);
	}
	if (arena->blocks == NULL)
		return;
	use_block(arena, arena->blocks);
	if (arena->blocks == mark.newest)
		arena->next = mark.next;
}

static size_t block_bytes(const struct arena *arena)
{
	if (arena->blocks == NULL)
		return FIRST_BLOCK_BYTES;
	size_t doubled = arena->blocks->bytes * 2;
	return doubled > GROWN_BLOCK_BYTES ? GROWN_BLOCK_BYTES : doubled;
}

/* A new newest block with room for `bytes`; the rest of the one before is given up. */
static void *add_block(struct arena *arena, size_t bytes)
{
	size_t left = arena->cap_bytes > arena->used_bytes ? arena->cap_bytes - arena->used_bytes : 0;
	if (left < sizeof(struct arena_block) || bytes > left - sizeof(struct arena_block))
		return NULL;
	size_t wanted = sizeof(struct arena_block) + bytes;
	if (wanted < block_bytes(arena))
		wanted = block_bytes(arena);
	if (wanted > left)
		wanted = left;
	struct arena_block *block = malloc(wanted);
	if (block == NULL)
		return NULL;
	block->older = arena->blocks;
	block->bytes = wanted;
	arena->blocks = block;
	arena->used_bytes += wanted;
	use_block(arena, block);
	char *start = arena->next;
	arena->next += bytes;
	return start;
}

void *arena_grow(struct arena *arena, size_t bytes)
{
	if (bytes > SIZE_MAX - ALIGNMENT)
		return NULL;
	return add_block(arena, (bytes + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1));
}

char *arena_text(struct arena *arena, const char *text, size_t bytes)
{
	if (bytes == SIZE_MAX)
		return NULL;
	char *copy = arena_alloc(arena, bytes + 1);
	if (copy == NULL)
		return NULL;
	if (bytes != 0)
		memcpy(copy, text, bytes);
	copy[bytes] = '\0';
	return copy;
}
