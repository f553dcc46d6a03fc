/* An intrusive priority queue: the node with the smallest key first. A pairing heap, since its nodes live in what they order and nothing is allocated.
 *
 * Layer: server, bottom. Threads: its owner's.
 * Zeroed memory is an empty heap, and a node in none. Insertion is constant; taking out the first, or any other, is logarithmic (amortised). Equal keys come
 * in no promised order: who wants one puts it into the key. */
#ifndef OPD_SERVER_HEAP_H
#define OPD_SERVER_HEAP_H

#include <stdbool.h>
#include <stddef.h>

struct heap_node {
	double key;
	struct heap_node *child; /* its first one */
	struct heap_node *next;  /* sibling */
	struct heap_node *previous; /* sibling, or parent of a first child; itself: the root; NULL: in no heap */
};

struct heap {
	struct heap_node *first;
};

/* The node is in no heap; its key is set. */
void heap_insert(struct heap *heap, struct heap_node *node);
/* The node is in this heap. */
void heap_remove(struct heap *heap, struct heap_node *node);
/* With another key, in this heap or in none before. */
void heap_move(struct heap *heap, struct heap_node *node, double key);

static inline bool heap_has(const struct heap_node *node)
{
	return node->previous != NULL;
}

#endif
