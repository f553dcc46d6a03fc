/* A bump allocator for one request's envelope: one block in the common case, given back as a whole.
 *
 * Layer: proto, internal. Threads: one owner at a time.
 * Life: arena_init, arena_alloc…, arena_rewind (gives back what came after a mark), arena_reset (keeps the first block for the next request), arena_fini.
 * The cap bounds what a hostile envelope can make us allocate: past it arena_alloc returns NULL, and decoding ends in
 * RESOURCE_EXHAUSTED. */
#ifndef OPD_PROTO_ARENA_H
#define OPD_PROTO_ARENA_H

#include <stddef.h>

struct arena_block;

struct arena {
	struct arena_block *blocks; /* newest first; the last one is kept by reset */
	char *next;
	char *end;
	size_t used_bytes; /* in all blocks */
	size_t cap_bytes;
};

/* Allocates nothing yet. */
void arena_init(struct arena *arena, size_t cap_bytes);
void arena_fini(struct arena *arena);
void arena_reset(struct arena *arena);

/* What is allocated after the mark is given back by a rewind to it. */
struct arena_mark {
	struct arena_block *newest;
	char *next;
};

static inline struct arena_mark arena_mark(const struct arena *arena)
{
	return (struct arena_mark){arena->blocks, arena->next};
}

void arena_rewind(struct arena *arena, struct arena_mark mark);

/* 16-byte aligned, uninitialised; NULL past the cap or out of memory. `bytes` 0 gives a valid pointer. */
void *arena_alloc(struct arena *arena, size_t bytes);

/* Zeroed. */
void *arena_zalloc(struct arena *arena, size_t bytes);

/* count elements of element_bytes, checked, zeroed. */
void *arena_array(struct arena *arena, size_t count, size_t element_bytes);

/* A NUL-terminated copy. */
char *arena_text(struct arena *arena, const char *text, size_t bytes);

#endif
