/* Sizes, extents, views: proto/tensor.h against the same arithmetic in 128 bits, which can't overflow. */
#include "fuzz.h"
#include "proto/tensor.h"

typedef unsigned __int128 wide;

#define LARGEST ((wide)INT64_MAX)

struct picked {
	opd_dtype dtype;
	uint32_t rank;
	bool strided;
	int64_t shape[OPD_RANK_MAX + 2];
	int64_t strides[OPD_RANK_MAX + 2];
	uint64_t byte_offset;
};

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	return 0;
}

static int64_t pick_extent(struct fuzz_input *input)
{
	static const int64_t odd[] = {0, -1, INT64_MAX, INT64_MIN, 1ll << 32, 3037000500, 1ll << 61, 1ll << 62};
	const uint8_t byte = fuzz_u8(input);
	return byte < 200 ? byte % 20 : byte < 240 ? odd[byte % 8] : (int64_t)fuzz_u64(input);
}

static void pick(struct fuzz_input *input, struct picked *picked)
{
	picked->dtype = (opd_dtype)(fuzz_u8(input) % 24);
	picked->rank = fuzz_u8(input) % (OPD_RANK_MAX + 2);
	picked->strided = fuzz_u8(input) % 2 == 1;
	for (uint32_t i = 0; i < picked->rank; i++) {
		picked->shape[i] = pick_extent(input);
		picked->strides[i] = pick_extent(input);
	}
	picked->byte_offset = fuzz_u8(input) % 3 == 0 ? fuzz_u64(input) : (uint64_t)fuzz_u8(input) * 4;
}

/* The product of extents; false: it is past INT64_MAX, or an extent is negative. A zero doesn't excuse the others. */
static bool product(const struct picked *picked, wide *out)
{
	wide all = 1;
	bool zero = false;
	for (uint32_t i = 0; i < picked->rank; i++) {
		if (picked->shape[i] < 0)
			return false;
		zero = zero || picked->shape[i] == 0;
		if (picked->shape[i] != 0)
			all *= (wide)picked->shape[i];
		if (all > LARGEST)
			return false;
	}
	*out = zero ? 0 : all;
	return true;
}

/* An empty tensor has no bytes, whatever its elements would take. */
static bool all_bytes(const struct picked *picked, uint32_t element_bytes, wide *out)
{
	if (!product(picked, out))
		return false;
	*out *= element_bytes;
	return *out <= LARGEST;
}

/* One past the last byte touched. */
static bool extent(const struct picked *picked, uint32_t element_bytes, wide *end_out)
{
	wide bytes, last = 0;
	if (!all_bytes(picked, element_bytes, &bytes) || picked->byte_offset > INT64_MAX || picked->byte_offset % element_bytes != 0)
		return false;
	for (uint32_t i = 0; picked->strided && i < picked->rank; i++) {
		if (picked->strides[i] < 0)
			return false;
		if (picked->shape[i] > 0)
			last += (wide)(picked->shape[i] - 1) * (wide)picked->strides[i];
		if (last > LARGEST)
			return false;
	}
	*end_out = bytes == 0 ? picked->byte_offset : picked->byte_offset + (picked->strided ? (last + 1) * element_bytes : bytes);
	return *end_out <= LARGEST;
}

/* What is accepted is right. What is refused may be right only where the rules are stricter than the arithmetic: an extent of a tensor that is empty. */
static void check(const struct picked *picked)
{
	const uint32_t element_bytes = opd_dtype_bytes(picked->dtype);
	const bool known = element_bytes != 0 && picked->rank <= OPD_RANK_MAX;
	uint64_t got = 77;
	wide wanted = 0;
	if (tensor_elements(picked->rank, picked->shape, &got) && (picked->rank > OPD_RANK_MAX || !product(picked, &wanted) || wanted != got))
		fuzz_fail("tensor_elements: %llu", (unsigned long long)got);
	const bool fits = known && all_bytes(picked, element_bytes, &wanted);
	if (tensor_bytes(picked->dtype, picked->rank, picked->shape, &got) ? !fits || wanted != got : fits)
		fuzz_fail("tensor_bytes: %llu, fits %d", (unsigned long long)got, fits);
	const bool inside = known && extent(picked, element_bytes, &wanted);
	if (tensor_extent(picked->dtype, picked->rank, picked->shape, picked->strided ? picked->strides : NULL, picked->byte_offset, &got) &&
	    (!inside || wanted != got))
		fuzz_fail("tensor_extent: %llu, %llu expected, inside %d", (unsigned long long)got, (unsigned long long)wanted, inside);
}

static void check_sizes(struct fuzz_input *input)
{
	const uint64_t a = fuzz_u64(input), b = fuzz_u64(input);
	uint64_t got = 0;
	if (size_add(a, b, &got) && (wide)got != (wide)a + b)
		fuzz_fail("size_add: %llu", (unsigned long long)got);
	if (size_multiply(a, b, &got) && (wide)got != (wide)a * b)
		fuzz_fail("size_multiply: %llu", (unsigned long long)got);
	if (size_align(a, &got) && (got % 64 != 0 || got < a || got - a > 63))
		fuzz_fail("size_align: %llu", (unsigned long long)got);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
	struct fuzz_input input = {data, bytes};
	struct picked picked;
	while (input.bytes > 0) {
		pick(&input, &picked);
		check(&picked);
		check_sizes(&input);
	}
	return 0;
}
