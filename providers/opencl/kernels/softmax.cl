kernel void softmax(global const T *x, long x_at, global T *y, long y_at, long columns, local float *part)
{
	const size_t row = get_group_id(0), first = get_local_id(0), step = get_local_size(0);
	const long from = (long)row * columns;
	float most = -INFINITY, sum = 0;
	for (long i = first; i < columns; i += step)
		most = fmax(most, READ(x, x_at + from + i));
	most = group_max(part, most);
	for (long i = first; i < columns; i += step)
		sum += exp(READ(x, x_at + from + i) - most);
	sum = group_sum(part, sum);
	for (long i = first; i < columns; i += step)
		WRITE(y, y_at + from + i, exp(READ(x, x_at + from + i) - most) / sum);
}
