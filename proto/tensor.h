/* Checked size arithmetic: every shape, stride, offset and length that comes from outside goes through here, and nowhere else.
 *
 * Layer: proto, internal. Threads: pure.
 * All functions return false on what doesn't fit (a negative extent or stride, a product or sum past INT64_MAX bytes, a rank past
 * OPD_RANK_MAX, no dtype) and then write nothing.
 * Not here: the struct that kernels see (opd/tensor.h) and the memory (server/tensors.h). */
#ifndef OPD_PROTO_TENSOR_H
#define OPD_PROTO_TENSOR_H

#include <stdbool.h>
#include <stdint.h>

#include "opd/status.h"
#include "opd/tensor.h"

OPD_MUST_USE bool size_add(uint64_t a, uint64_t b, uint64_t *sum_out);
OPD_MUST_USE bool size_multiply(uint64_t a, uint64_t b, uint64_t *product_out);

/* The next multiple of 64 at or past `bytes`. */
OPD_MUST_USE bool size_align(uint64_t bytes, uint64_t *aligned_out);

/* Product of the extents; 1 for rank 0. Extents are checked before a zero makes the product small. */
OPD_MUST_USE bool tensor_elements(uint32_t rank, const int64_t *shape, uint64_t *elements_out);

/* Bytes of the row-major tensor. */
OPD_MUST_USE bool tensor_bytes(opd_dtype dtype, uint32_t rank, const int64_t *shape, uint64_t *bytes_out);

/* One past the last byte that an element touches, counted from the source's first byte; byte_offset for an empty tensor. strides NULL:
 * row-major. A byte_offset that is no multiple of the element's size doesn't fit either. */
OPD_MUST_USE bool tensor_extent(opd_dtype dtype, uint32_t rank, const int64_t *shape, const int64_t *strides, uint64_t byte_offset,
                                uint64_t *end_out);

/* Row-major strides of a checked shape. */
void tensor_row_major(uint32_t rank, const int64_t *shape, int64_t *strides_out);

/* Fills in rank, shape, strides, elements, flags and byte_offset of a checked tensor; data, device, identity and alignment stay. `strides`
 * may be row-major ones from tensor_row_major. Shape and strides are kept by reference. */
void tensor_describe(opd_tensor *tensor, opd_dtype dtype, uint32_t rank, const int64_t *shape, const int64_t *strides,
                     uint64_t byte_offset);

/* Largest power of two, at most 4096, that divides the address. */
uint32_t tensor_alignment(const void *address, uint64_t byte_offset);

#endif
