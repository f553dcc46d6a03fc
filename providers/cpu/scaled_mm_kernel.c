/* scaled_mm: register tiles of i8 products in i32, and the scales and bias at the end: compiled once for each instruction set (kernels.h).
 *
 * Sums of i8 are exact in any order, so that every instruction set and every way has the same ones. VNNI multiplies unsigned by signed bytes: it gets a + 128, and
 * 128·Σb is taken off; what overflows i32 on the way comes back by the same amount. */
#include "providers/cpu/kernels.h"
#include "providers/cpu/vec_dtype.h"

/* STEP bytes of a row become one `bytes_vec` (in the form that the multiplication takes), whose products with another are added to a `sums_vec`. */
#if defined(VEC_AVX512) && defined(__AVX512VNNI__)
#define STEP 64
#define OFFSET 128 /* added to a */
#define TILE_ROWS 4
#define TILE_COLUMNS 5 /* 20 sums, 5 of b alone, 4 of a, 1 of b: of 32 registers */
typedef __m512i bytes_vec;
typedef __m512i sums_vec;

VEC_INLINE sums_vec sums_zero(void)
{
	return _mm512_setzero_si512();
}

VEC_INLINE bytes_vec bytes_load(const int8_t *at)
{
	return _mm512_loadu_si512(at);
}

VEC_INLINE bytes_vec bytes_load_part(const int8_t *at, size_t count)
{
	return _mm512_maskz_loadu_epi8(((__mmask64)1 << count) - 1, at);
}

VEC_INLINE bytes_vec bytes_offset(bytes_vec a)
{
	return _mm512_xor_si512(a, _mm512_set1_epi8((char)0x80));
}

VEC_INLINE sums_vec sums_add(sums_vec sums, bytes_vec a, bytes_vec b)
{
	return _mm512_dpbusd_epi32(sums, a, b);
}

VEC_INLINE sums_vec sums_add_offset(sums_vec sums, bytes_vec b)
{
	return _mm512_dpbusd_epi32(sums, _mm512_set1_epi8((char)OFFSET), b);
}

/* By 2^32: what the offset adds may be past an int, and is taken off again. */
VEC_INLINE int32_t sums_total(sums_vec sums)
{
	uint32_t lanes[16], total = 0;
	memcpy(lanes, &sums, sizeof lanes);
	for (int i = 0; i < 16; i++)
		total += lanes[i];
	return (int32_t)total;
}

#else
#define OFFSET 0

#if defined(VEC_AVX512)
#define STEP 32
#define TILE_ROWS 4
#define TILE_COLUMNS 5
typedef __m512i bytes_vec;
typedef __m512i sums_vec;

VEC_INLINE sums_vec sums_zero(void)
{
	return _mm512_setzero_si512();
}

VEC_INLINE bytes_vec bytes_load(const int8_t *at)
{
	return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i_u *)at));
}

VEC_INLINE sums_vec sums_add(sums_vec sums, bytes_vec a, bytes_vec b)
{
	return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
}

/* By 2^32: what the offset adds may be past an int, and is taken off again. */
VEC_INLINE int32_t sums_total(sums_vec sums)
{
	uint32_t lanes[16], total = 0;
	memcpy(lanes, &sums, sizeof lanes);
	for (int i = 0; i < 16; i++)
		total += lanes[i];
	return (int32_t)total;
}

#elif defined(VEC_AVX2)
#define STEP 16
#define TILE_ROWS 2
#define TILE_COLUMNS 4
typedef __m256i bytes_vec;
typedef __m256i sums_vec;

VEC_INLINE sums_vec sums_zero(void)
{
	return _mm256_setzero_si256();
}

VEC_INLINE bytes_vec bytes_load(const int8_t *at)
{
	return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i_u *)at));
}

VEC_INLINE sums_vec sums_add(sums_vec sums, bytes_vec a, bytes_vec b)
{
	return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
}

VEC_INLINE int32_t sums_total(sums_vec sums)
{
	int32_t lanes[8], total = 0;
	memcpy(lanes, &sums, sizeof lanes);
	for (int i = 0; i < 8; i++)
		total += lanes[i];
	return total;
}

#else
/* The compiler's vectors of 16-bit products: SSE2, NEON. */
#define STEP 8
#define TILE_ROWS 2
#define TILE_COLUMNS 2
typedef int8_t narrow_vec __attribute__((vector_size(STEP)));
typedef int16_t bytes_vec __attribute__((vector_size(2 * STEP)));
typedef int32_t sums_vec __attribute__((vector_size(4 * STEP / 2)));

VEC_INLINE sums_vec sums_zero(void)
{
	return (sums_vec){0};
}

VEC_INLINE bytes_vec bytes_load(const int8_t *at)
{
#if defined(__SSE2__)
	__m128i bytes = _mm_loadl_epi64((const __m128i_u *)at);
	return (bytes_vec)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
#else
	narrow_vec bytes;
	memcpy(&bytes, at, sizeof bytes);
	return __builtin_convertvector(bytes, bytes_vec);
#endif
}

VEC_INLINE sums_vec sums_add(sums_vec sums, bytes_vec a, bytes_vec b)
{
#if defined(__SSE2__)
	return sums + (sums_vec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
	/* A product of two i8 is at most 2^14. */
	typedef int16_t half_vec __attribute__((vector_size(STEP)));
	bytes_vec products = a * b;
	half_vec halves[2];
	memcpy(halves, &products, sizeof halves);
	return sums + __builtin_convertvector(halves[0], sums_vec) + __builtin_convertvector(halves[1], sums_vec);
#endif
}

VEC_INLINE int32_t sums_total(sums_vec sums)
{
	return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}
#endif

VEC_INLINE bytes_vec bytes_load_part(const int8_t *at, size_t count)
{
	int8_t bytes[STEP] = {0};
	memcpy(bytes, at, count);
	return bytes_load(bytes);
}

VEC_INLINE bytes_vec bytes_offset(bytes_vec a)
{
	return a;
}

VEC_INLINE sums_vec sums_add_offset(sums_vec sums, bytes_vec b)
{
	(void)b;
	return sums;
}
#endif

VEC_INLINE bytes_vec bytes_at(const int8_t *row, size_t k, size_t depth)
{
	return depth - k >= STEP ? bytes_load(row + k) : bytes_load_part(row + k, depth - k);
}

/* sums[m·stride + n] of `rows` x `columns` (constants of the caller). */
VEC_INLINE void scaled_some(const struct cpu_scaled_bytes *bytes, const int8_t *a, const int8_t *b, size_t rows, size_t columns,
                            int32_t *sums)
{
	sums_vec chains[TILE_ROWS][TILE_COLUMNS], offsets[TILE_COLUMNS];
	for (size_t n = 0; n < columns; n++) {
		offsets[n] = sums_zero();
		for (size_t m = 0; m < rows; m++)
			chains[m][n] = sums_zero();
	}
	for (size_t k = 0; k < bytes->depth; k += STEP) {
		bytes_vec v[TILE_ROWS];
		for (size_t m = 0; m < rows; m++)
			v[m] = bytes_offset(bytes_at(a + m * bytes->a_stride, k, bytes->depth));
		for (size_t n = 0; n < columns; n++) {
			bytes_vec w = bytes_at(b + n * bytes->b_stride, k, bytes->depth);
			offsets[n] = sums_add_offset(offsets[n], w);
			for (size_t m = 0; m < rows; m++)
				chains[m][n] = sums_add(chains[m][n], v[m], w);
		}
	}
	for (size_t n = 0; n < columns; n++) {
		uint32_t offset = OFFSET == 0 ? 0 : (uint32_t)sums_total(offsets[n]);
		for (size_t m = 0; m < rows; m++)
			sums[m * bytes->sums_stride + n] = (int32_t)((uint32_t)sums_total(chains[m][n]) - offset);
	}
}

VEC_INLINE void scaled_rows(const struct cpu_scaled_bytes *bytes, const int8_t *a, size_t rows, int32_t *sums)
{
	size_t n = 0;
	for (; n + TILE_COLUMNS <= bytes->columns; n += TILE_COLUMNS)
		scaled_some(bytes, a, bytes->b + n * bytes->b_stride, rows, TILE_COLUMNS, sums + n);
	for (; n < bytes->columns; n++)
		scaled_some(bytes, a, bytes->b + n * bytes->b_stride, rows, 1, sums + n);
}

static void scaled_bytes(const struct cpu_scaled_bytes *bytes)
{
	size_t m = 0;
	for (; m + TILE_ROWS <= bytes->rows; m += TILE_ROWS)
		scaled_rows(bytes, bytes->a + m * bytes->a_stride, TILE_ROWS, bytes->sums + m * bytes->sums_stride);
	for (; m < bytes->rows; m++)
		scaled_rows(bytes, bytes->a + m * bytes->a_stride, 1, bytes->sums + m * bytes->sums_stride);
}

static void scaled_convert(const int32_t *sums, float *to, size_t count)
{
	for (size_t i = 0; i < count; i++)
		to[i] = (float)sums[i];
}

VEC_INLINE void scaled_finish(opd_dtype dtype, const struct cpu_scaled_finish *finish, void *y)
{
	vec_f32 row = vec_splat(finish->row_scale);
	vec_f32 column = vec_splat(finish->column_scales[0]);
	for (size_t n = 0; n < finish->count; n += VEC_LANES) {
		size_t here = finish->count - n < VEC_LANES ? finish->count - n : VEC_LANES;
		if (finish->scale_each)
			column = vec_load_part(OPD_f32, finish->column_scales, n, here, 0.0f);
		vec_f32 v = vec_load_part(OPD_f32, finish->sums, n, here, 0.0f) * row * column;
		if (finish->bias != NULL)
			v = v + vec_load_part(dtype, finish->bias, n, here, 0.0f);
		vec_store_part(dtype, y, n, here, vec_one_nan(v));
	}
}

#define X(name)                                                                                 \
	static void scaled_finish_##name(const struct cpu_scaled_finish *finish, void *y)           \
	{                                                                                           \
		scaled_finish(OPD_##name, finish, y);                                                   \
	}
X(f32)
X(bf16)
X(f16)
#undef X

const struct cpu_scaled_mm_kernels CPU_SYMBOL(cpu_scaled_mm) = {
	.bytes = scaled_bytes,
	.convert = scaled_convert,
	.finish = {scaled_finish_f32, scaled_finish_bf16, scaled_finish_f16},
};
