/* The library's primitives for one product: a primitive for each shape of a block, on the right factor as it lies, and on the layout that the library likes best.
 *
 * Layer: providers/onednn. Threads: made by one thread, then constant; any number of threads executes.
 * Life: multiply_plan_create → packing_* and multiply_execute → multiply_plan_destroy. Callers have called dnn_enter.
 * Not here: which blocks a product has (providers/product.h), who runs them (product.c). */
#ifndef OPD_ONEDNN_MULTIPLY_H
#define OPD_ONEDNN_MULTIPLY_H

#include "providers/onednn/onednn.h"

/* Index into a plan's primitives: bit 0, a block of fewer columns; bit 1, of fewer rows. */
enum { EDGE_COLUMNS = 1, EDGE_ROWS = 2, SHAPES = 4 };

struct multiply {
	dnnl_primitive_t primitive; /* NULL: no block has this shape */
	dnnl_memory_desc_t left, right, bias, y, scratchpad;
};

/* The primitives for the blocks of a product, and how these are. */
struct multiply_set {
	int64_t block_columns;
	/* A block's results are made side by side in scratch, from where they are to be taken: i8's sums, and what the library writes slowly, or not with its best kernels, at the distance that rows of the whole product have
	 * (README.md). A block of a single row has no distance, and needs no scratch but for i8. */
	bool apart;
	struct multiply by_shape[SHAPES];
};

/* What a packed copy of the right factor depends on beside its contents. */
struct packing_key {
	int64_t block_columns;
	dnnl_memory_desc_t right[2]; /* of a whole block; of the narrower last one */
};

/* The right factor packed: its column blocks one behind the other. */
struct packing {
	uint64_t bytes; /* 0: it isn't packed */
	uint64_t block_bytes;
	uint64_t blocks;
	dnnl_primitive_t reorders[2]; /* NULL: no block has this shape */
	dnnl_memory_desc_t from[2];   /* the blocks as they lie in the factor */
	dnnl_memory_desc_t scratchpads[2];
	struct packing_key key;
};

struct multiply_plan {
	const struct dnn *dnn;
	uint64_t scratchpad_bytes; /* of a thread */
	uint64_t sums_bytes;       /* of a thread, behind its scratchpad: the results of a block that are made apart */
	struct multiply_set plain;
	struct multiply_set packed; /* where packing.bytes isn't 0 */
	struct packing packing;
};

/* RESOURCE_EXHAUSTED, or INTERNAL: the library has no primitive for it. */
OPD_MUST_USE opd_status multiply_plan_create(const struct dnn *dnn, const struct product *product, struct multiply_plan **plan_out, opd_error *error);
void multiply_plan_destroy(void *plan);

/* Which of a set's primitives a block takes. */
const struct multiply *multiply_of(const struct multiply_set *set, const struct product_block *block);
/* y: the block's first result, or where its results are made apart. right: of the layout that the primitive has. */
dnnl_status_t multiply_execute(const struct dnn *dnn, const struct multiply *multiply, dnnl_stream_t stream, const struct product *product,
                               const struct product_block *block, const void *right, void *scratch, void *y);

/* Where a block's right factor lies in a packed copy. */
const unsigned char *packing_at(const struct multiply_plan *plan, const struct product_block *block, const unsigned char *packed);
/* Packs the right factor's column block number `index`. */
dnnl_status_t packing_fill(const struct multiply_plan *plan, const struct product *product, uint64_t index, dnnl_stream_t stream, void *scratch,
                           unsigned char *packed);

#endif
