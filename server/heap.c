#include "server/heap.h"

/* Two roots become one; either may be NULL. */
static struct heap_node *meld(struct heap_node *a, struct heap_node *b)
{
	if (a == NULL)
		return b;
	if (b == NULL)
		return a;
	if (b->key < a->key) {
		struct heap_node *other = a;
		a = b;
		b = other;
	}
	b->next = a->child;
	if (b->next != NULL)
		b->next->previous = b;
	b->previous = a;
	a->child = b;
	a->next = NULL;
	return a;
}

/* Siblings become one tree: in pairs from the left, then the pairs from the right, which is what makes removal logarithmic. */
static struct heap_node *meld_siblings(struct heap_node *first)
{
	struct heap_node *pairs = NULL; /* linked by previous */
	while (first != NULL) {
		struct heap_node *a = first;
		struct heap_node *b = a->next;
		first = b == NULL ? NULL : b->next;
		a->next = NULL;
		if (b != NULL)
			b->next = NULL;
		a = meld(a, b);
		a->previous = pairs;
		pairs = a;
	}
	struct heap_node *root = NULL;
	while (pairs != NULL) {
		struct heap_node *pair = pairs;
		pairs = pair->previous;
		root = meld(root, pair);
	}
	return root;
}

static void set_root(struct heap *heap, struct heap_node *root)
{
	heap->first = root;
	if (root != NULL)
		root->previous = root;
}

void heap_insert(struct heap *heap, struct heap_node *node)
{
	node->child = node->next = NULL;
	node->previous = node;
	set_root(heap, meld(heap->first, node));
}

void heap_remove(struct heap *heap, struct heap_node *node)
{
	struct heap_node *orphans = meld_siblings(node->child);
	if (node == heap->first) {
		set_root(heap, orphans);
	} else {
		if (node->previous->child == node)
			node->previous->child = node->next;
		else
			node->previous->next = node->next;
		if (node->next != NULL)
			node->next->previous = node->previous;
		set_root(heap, meld(heap->first, orphans));
	}
	node->child = node->next = node->previous = NULL;
}

void heap_move(struct heap *heap, struct heap_node *node, double key)
{
	if (heap_has(node))
		heap_remove(heap, node);
	node->key = key;
	heap_insert(heap, node);
}
