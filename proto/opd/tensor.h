/* A tensor as kernels, predicates and clients see it: dtype, shape, strides, where its bytes lie.
 *
 * Layer: proto, public (installed as opd/tensor.h), header only.
 * Threads: a value; nobody changes one that another thread reads.
 * Not here: checks of shapes and strides from outside, and every size computed from them (proto/tensor.h, not installed: a host
 * has done that before a provider sees a tensor), and memory (server/tensors.h). */
#ifndef OPD_TENSOR_H
#define OPD_TENSOR_H

#include <stdbool.h>
#include <stdint.h>

#include "opd/dtype.h"

/* Today's limit of the wire. Shapes are passed as a pointer and a rank, so that it can grow: never declare an array of this
 * size in a module and trust that it suffices; refuse a rank that you can't take. */
#define OPD_RANK_MAX 8

/* Every tensor buffer of the host starts at a multiple of this, and may be read (not written) to the next one past its end. */
#define OPD_TENSOR_ALIGNMENT 64

enum {
	OPD_TENSOR_CONTIGUOUS = 1u << 0, /* strides are row-major (dimensions of extent 1 don't count), or the tensor is empty */
	OPD_TENSOR_EMPTY = 1u << 1,      /* some dimension is 0: no element */
	OPD_TENSOR_CONSTANT = 1u << 2,   /* contents don't change while id and version stay: derived copies may be kept */
};

/* One operand or result. Element (i0, i1, …) lies at data + byte_offset + bytes(dtype)·Σ ik·strides[k]. */
typedef struct opd_tensor {
	uint32_t struct_bytes; /* sizeof of the writer's struct; fields are added at the end */
	opd_dtype dtype;
	uint32_t rank;          /* 0 to OPD_RANK_MAX */
	uint32_t device;        /* host's number of the device where it lies; 0 is host memory */
	const int64_t *shape;   /* [rank], each at least 0, products checked by the host */
	const int64_t *strides; /* [rank], in elements, at least 0; never NULL. Inputs may overlap, outputs are contiguous */
	void *data;             /* base of the memory, on the device; only run may look at it: NULL or not elsewhere */
	uint64_t byte_offset;   /* of element 0, a multiple of the element's size */
	uint64_t elements;      /* product of the shape */
	uint32_t alignment;     /* of element 0's address: a power of two, at most OPD_TENSOR_ALIGNMENT; known also where data is NULL */
	uint32_t flags;         /* OPD_TENSOR_* */
	uint64_t id;            /* identity in run: never reused, 0 where contents may change (inline, payload, shared memory) */
	uint64_t version;       /* changes whenever the contents of `id` do */
} opd_tensor;

/* Address of element 0. */
static inline void *opd_tensor_data(const opd_tensor *tensor)
{
	return (unsigned char *)tensor->data + tensor->byte_offset;
}

static inline bool opd_tensor_contiguous(const opd_tensor *tensor)
{
	return (tensor->flags & OPD_TENSOR_CONTIGUOUS) != 0;
}

static inline bool opd_tensor_empty(const opd_tensor *tensor)
{
	return (tensor->flags & OPD_TENSOR_EMPTY) != 0;
}

/* Extent of the last dimension; 1 for rank 0. */
static inline int64_t opd_tensor_last(const opd_tensor *tensor)
{
	return tensor->rank == 0 ? 1 : tensor->shape[tensor->rank - 1];
}

/* Rank and every extent are equal. */
static inline bool opd_tensor_same_shape(const opd_tensor *a, const opd_tensor *b)
{
	if (a->rank != b->rank)
		return false;
	for (uint32_t i = 0; i < a->rank; i++)
		if (a->shape[i] != b->shape[i])
			return false;
	return true;
}

#endif
