#include "proto/tensor.h"

bool size_add(uint64_t a, uint64_t b, uint64_t *sum_out)
{
	uint64_t sum;
	if (__builtin_add_overflow(a, b, &sum) || sum > INT64_MAX)
		return false;
	*sum_out = sum;
	return true;
}

bool size_multiply(uint64_t a, uint64_t b, uint64_t *product_out)
{
	uint64_t product;
	if (__builtin_mul_overflow(a, b, &product) || product > INT64_MAX)
		return false;
	*product_out = product;
	return true;
}

bool size_align(uint64_t bytes, uint64_t *aligned_out)
{
	uint64_t padded;
	if (!size_add(bytes, OPD_TENSOR_ALIGNMENT - 1, &padded))
		return false;
	*aligned_out = padded & ~(uint64_t)(OPD_TENSOR_ALIGNMENT - 1);
	return true;
}

bool tensor_elements(uint32_t rank, const int64_t *shape, uint64_t *elements_out)
{
	if (rank > OPD_RANK_MAX)
		return false;
	uint64_t product = 1;
	bool empty = false;
	for (uint32_t i = 0; i < rank; i++) {
		if (shape[i] < 0)
			return false;
		if (shape[i] == 0)
			empty = true;
		else if (!size_multiply(product, (uint64_t)shape[i], &product))
			return false;
	}
	*elements_out = empty ? 0 : product;
	return true;
}

bool tensor_bytes(opd_dtype dtype, uint32_t rank, const int64_t *shape, uint64_t *bytes_out)
{
	uint64_t elements;
	return opd_dtype_valid(dtype) && tensor_elements(rank, shape, &elements) &&
	       size_multiply(elements, opd_dtype_bytes(dtype), bytes_out);
}

bool tensor_extent(opd_dtype dtype, uint32_t rank, const int64_t *shape, const int64_t *strides, uint64_t byte_offset, uint64_t *end_out)
{
	uint64_t bytes;
	if (!tensor_bytes(dtype, rank, shape, &bytes))
		return false;
	const uint64_t element = opd_dtype_bytes(dtype);
	if (byte_offset % element != 0 || byte_offset > INT64_MAX)
		return false;
	uint64_t last = 0; /* index of the highest element */
	for (uint32_t i = 0; i < rank && strides != NULL; i++) {
		if (strides[i] < 0)
			return false;
		uint64_t step;
		if (shape[i] > 0 &&
		    (!size_multiply((uint64_t)shape[i] - 1, (uint64_t)strides[i], &step) || !size_add(last, step, &last)))
			return false;
	}
	if (strides != NULL && bytes != 0) {
		if (!size_add(last, 1, &last) || !size_multiply(last, element, &bytes))
			return false;
	}
	return size_add(byte_offset, bytes, end_out);
}

void tensor_row_major(uint32_t rank, const int64_t *shape, int64_t *strides_out)
{
	int64_t stride = 1;
	for (uint32_t i = rank; i-- > 0;) {
		strides_out[i] = stride;
		if (shape[i] > 0)
			stride *= shape[i];
	}
}

void tensor_describe(opd_tensor *tensor, opd_dtype dtype, uint32_t rank, const int64_t *shape, const int64_t *strides,
                     uint64_t byte_offset)
{
	uint64_t elements = 1;
	bool contiguous = true;
	for (uint32_t i = rank; i-- > 0;) {
		if (shape[i] != 1 && (uint64_t)strides[i] != elements)
			contiguous = false;
		elements *= (uint64_t)shape[i];
	}
	tensor->struct_bytes = sizeof *tensor;
	tensor->dtype = dtype;
	tensor->rank = rank;
	tensor->shape = shape;
	tensor->strides = strides;
	tensor->byte_offset = byte_offset;
	tensor->elements = elements;
	tensor->flags = (contiguous || elements == 0 ? OPD_TENSOR_CONTIGUOUS : 0u) | (elements == 0 ? OPD_TENSOR_EMPTY : 0u);
}

uint32_t tensor_alignment(const void *address, uint64_t byte_offset)
{
	uint64_t bits = (uint64_t)(uintptr_t)address + byte_offset;
	uint64_t lowest = bits & (~bits + 1);
	return lowest == 0 || lowest > 4096 ? 4096 : (uint32_t)lowest;
}
