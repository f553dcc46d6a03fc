/* Lines of a tensor along another dimension than the last, as tiles of neighbouring ones: row after row of a tile is contiguous.
 *
 * Layer: providers/cpu. Threads: pure functions of their arguments.
 * Not here: lines along the last dimension (call.h). */
#ifndef OPD_CPU_COLUMNS_H
#define OPD_CPU_COLUMNS_H

#include "providers/cpu/call.h"

/* Columns of a tile. */
enum { COLUMNS_TILE = 64 };

/* Of a tensor of rank 2 and more whose last dimension is contiguous, along `dim`, which isn't the last. */
struct columns {
	uint32_t rank; /* of the dimensions that are neither */
	uint64_t shape[OPD_RANK_MAX], strides[OPD_RANK_MAX];
	uint64_t extent, step; /* of a line; elements between its neighbours */
	uint64_t width;        /* of the last dimension */
	uint64_t tiles;        /* of the whole tensor */
	unsigned char *base;
	uint64_t bytes; /* of an element */
};

struct columns columns_of(const opd_tensor *tensor, uint32_t dim);

/* The first column of tile `index`, counted among all of the tensor's lines in row-major order, and how many the tile has. */
struct columns_tile {
	uint64_t line;
	size_t count;
	unsigned char *data;
};

struct columns_tile columns_tile_at(const struct columns *columns, uint64_t index);

#endif
