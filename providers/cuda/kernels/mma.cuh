/* The matrix unit's 16x8x16 product of f16 or bf16 with f32 sums, as warps see it.
 *
 * Layer: providers/cuda, device code. Lane 4·g + t holds of A (16x16, rows g and g + 8) a[0], a[2]: row g, columns 2t, 2t+1 and 2t+8, 2t+9; a[1], a[3]: row g + 8; of B (16x8)
 * b[0], b[1]: column g, the same k; of C c[0], c[1]: row g, columns 2t, 2t+1; c[2], c[3]: row g + 8. k may be numbered in any order that A and B share: that is how 16 bytes
 * of a row, as they lie in memory, serve as parts of two products (words 0 and 1, words 2 and 3). */
#ifndef OPD_CUDA_MMA_CUH
#define OPD_CUDA_MMA_CUH

#include "providers/cuda/kernels/common.cuh"

template <class T> static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <> __device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
	asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
	             : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <> __device__ __forceinline__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
	asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
	             : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* A product's c: rows of A by columns of B. */
enum { MMA_ROWS = 16, MMA_COLUMNS = 8 };

/* In shared memory: what each of a block's warps has made of its share of the depth, `COLUMNS` columns (tiles of 8). They are added up in the order of the warps, whatever the other columns are. */
template <int WARPS, int COLUMNS> struct mma_shares {
	float of[WARPS][MMA_ROWS][COLUMNS + 1];

	__device__ __forceinline__ void put(int warp, int tile, const float (&c)[4])
	{
		const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
		for (int i = 0; i < 4; i++)
			of[warp][g + i / 2 * 8][tile * MMA_COLUMNS + 2 * t + i % 2] = c[i];
	}

	__device__ __forceinline__ float sum(int row, int column) const
	{
		float sum = 0;
#pragma unroll
		for (int w = 0; w < WARPS; w++)
			sum += of[w][row][column];
		return sum;
	}
};

/* 16 bytes of a row that is read once: past L1. A warp's access has 64 bytes of each of 8 rows; the other half of the line comes from memory with them, which is what memory does best: a step of 8 B
 * parameters took 5.74 ms without that, 5.51 with it, decode attention of 64 sequences of 4096 keys 358.5 and 353.8 us. */
static __device__ __forceinline__ uint4 row_words(const void *from)
{
	uint4 bits;
	asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w) : "l"(from));
	return bits;
}

/* Two values in one word, `low` in the lower half. */
template <class T> static __device__ __forceinline__ uint32_t pair_of(float low, float high)
{
	pack<T, 2> both;
	both.e[0] = from_f32<T>(low);
	both.e[1] = from_f32<T>(high);
	return *reinterpret_cast<uint32_t *>(&both);
}

/* An 8x8 matrix of 16-bit elements, a row on every four lanes, turned. */
static __device__ __forceinline__ uint32_t transposed(uint32_t rows)
{
	uint32_t columns;
	asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
	return columns;
}

#endif
