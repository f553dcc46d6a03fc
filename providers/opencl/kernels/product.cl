/* y[m, n] = sum over k of a[m, k]·b(k, n), plus bias[n]: b's strides say whether it is a weight [N, K] or a matrix [K, N]. Tiles of 64 by 64, 16 of K at a time in
 * local memory; an item has 4 by 4 results. */
#define TILE 64
#define DEPTH 16
#define MINE 4

kernel __attribute__((reqd_work_group_size(16, 16, 1)))
void product(global const T *a, long a_at, global const T *b, long b_at, global const T *bias, long bias_at, global T *y, long y_at, long rows,
             long columns, long depth, long b_k, long b_n, long a_batch, long b_batch, long has_bias)
{
	local float left[DEPTH][TILE + 1], right[DEPTH][TILE + 1];
	const long x0 = (long)get_group_id(0) * TILE, y0 = (long)get_group_id(1) * TILE, batch = get_group_id(2);
	const int column = get_local_id(0), row = get_local_id(1), item = row * 16 + column;
	float sums[MINE][MINE] = {{0}};
	a_at += batch * a_batch;
	b_at += batch * b_batch;
	y_at += batch * rows * columns;
	for (long k0 = 0; k0 < depth; k0 += DEPTH) {
		for (int i = item; i < TILE * DEPTH; i += 256) {
			const long k = k0 + i % DEPTH, m = y0 + i / DEPTH;
			left[i % DEPTH][i / DEPTH] = m < rows && k < depth ? READ(a, a_at + m * depth + k) : 0;
			/* Neighbours in memory are read by neighbours: along n for a matrix, along k for a weight. */
			const int in_k = b_n == 1 ? i / TILE : i % DEPTH, in_n = b_n == 1 ? i % TILE : i / DEPTH;
			const long kb = k0 + in_k, n = x0 + in_n;
			right[in_k][in_n] = n < columns && kb < depth ? READ(b, b_at + kb * b_k + n * b_n) : 0;
		}
		barrier(CLK_LOCAL_MEM_FENCE);
		const int some = depth - k0 < DEPTH ? (int)(depth - k0) : DEPTH;
		for (int k = 0; k < some; k++)
			for (int i = 0; i < MINE; i++)
				for (int j = 0; j < MINE; j++)
					sums[i][j] = fma(left[k][row + 16 * i], right[k][column + 16 * j], sums[i][j]);
		barrier(CLK_LOCAL_MEM_FENCE);
	}
	for (int i = 0; i < MINE; i++)
		for (int j = 0; j < MINE; j++) {
			const long m = y0 + row + 16 * i, n = x0 + column + 16 * j;
			if (m < rows && n < columns)
				WRITE(y, y_at + m * columns + n, sums[i][j] + (has_bias ? READ(bias, bias_at + n) : 0));
		}
}

/* Few rows against a weight [N, K]: a work group for each result, since such a call is the reading of the weight. */
kernel void product_rows(global const T *a, long a_at, global const T *b, long b_at, global const T *bias, long bias_at, global T *y, long y_at,
                         long rows, long columns, long depth, long has_bias, local float *part)
{
	const long n = get_group_id(0);
	const size_t first = get_local_id(0), step = get_local_size(0);
	for (long m = 0; m < rows; m++) {
		float sum = 0;
		for (long k = first; k < depth; k += step)
			sum = fma(READ(a, a_at + m * depth + k), READ(b, b_at + n * depth + k), sum);
		sum = group_sum(part, sum);
		if (first == 0)
			WRITE(y, y_at + m * columns + n, sum + (has_bias ? READ(bias, bias_at + n) : 0));
	}
}
