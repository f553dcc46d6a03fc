#include "providers/cpu/columns.h"

struct columns columns_of(const opd_tensor *tensor, uint32_t dim)
{
	struct columns columns = {
		.extent = (uint64_t)tensor->shape[dim],
		.step = (uint64_t)tensor->strides[dim],
		.width = (uint64_t)opd_tensor_last(tensor),
		.base = opd_tensor_data(tensor),
		.bytes = opd_dtype_bytes(tensor->dtype),
	};
	columns.tiles = (columns.width + COLUMNS_TILE - 1) / COLUMNS_TILE;
	for (uint32_t i = 0; i + 1 < tensor->rank; i++) {
		if (i == dim)
			continue;
		columns.shape[columns.rank] = (uint64_t)tensor->shape[i];
		columns.strides[columns.rank++] = (uint64_t)tensor->strides[i];
		columns.tiles *= (uint64_t)tensor->shape[i];
	}
	return columns;
}

struct columns_tile columns_tile_at(const struct columns *columns, uint64_t index)
{
	uint64_t across = (columns->width + COLUMNS_TILE - 1) / COLUMNS_TILE;
	uint64_t outer = index / across, first = index % across * COLUMNS_TILE, offset = first;
	struct columns_tile tile = {.line = outer * columns->width + first};
	tile.count = columns->width - first < COLUMNS_TILE ? (size_t)(columns->width - first) : COLUMNS_TILE;
	for (uint32_t i = columns->rank; i-- > 0;) {
		offset += outer % columns->shape[i] * columns->strides[i];
		outer /= columns->shape[i];
	}
	tile.data = columns->base + offset * columns->bytes;
	return tile;
}
