/* x, or x + residual in f32, over its root mean square; the sum, rounded, goes to `sums`. In place each item reads an element before it writes it. */
kernel void rms_norm(global const T *x, long x_at, global const T *residual, long residual_at, global const T *weight, long weight_at,
                     global T *y, long y_at, global T *sums, long sums_at, long columns, long counted, long has_residual, long has_weight,
                     long wide, float epsilon, local float *part)
{
	const size_t row = get_group_id(0), first = get_local_id(0), step = get_local_size(0);
	const long from = (long)row * columns;
	float sum = 0;
	for (long i = first; i < counted; i += step) {
		float value = READ(x, x_at + from + i);
		if (has_residual)
			value += READ(residual, residual_at + from + i);
		sum += value * value;
	}
	const float mean = group_sum(part, sum) / (float)counted;
	const float scale = 1.0f / sqrt(mean + epsilon);
	for (long i = first; i < columns; i += step) {
		float value = READ(x, x_at + from + i);
		if (has_residual) {
			value += READ(residual, residual_at + from + i);
			WRITE(sums, sums_at + from + i, value);
		}
		value *= scale;
		if (has_weight)
			value = wide ? value * ((global const float *)weight)[weight_at + i] : ROUND(value) * READ(weight, weight_at + i);
		WRITE(y, y_at + from + i, value);
	}
}

kernel void layer_norm(global const T *x, long x_at, global const T *weight, long weight_at, global const T *bias, long bias_at, global T *y,
                       long y_at, long columns, long has_weight, long wide_weight, long has_bias, long wide_bias, float epsilon,
                       local float *part)
{
	const size_t row = get_group_id(0), first = get_local_id(0), step = get_local_size(0);
	const long from = (long)row * columns;
	float sum = 0, squares = 0;
	for (long i = first; i < columns; i += step)
		sum += READ(x, x_at + from + i);
	float mean = group_sum(part, sum) / (float)columns;
	/* Once more about the first mean: what its rounding lost comes back. */
	sum = 0;
	for (long i = first; i < columns; i += step)
		sum += READ(x, x_at + from + i) - mean;
	const float rest = group_sum(part, sum) / (float)columns;
	for (long i = first; i < columns; i += step) {
		const float difference = READ(x, x_at + from + i) - mean - rest;
		squares += difference * difference;
	}
	const float scale = 1.0f / sqrt(group_sum(part, squares) / (float)columns + epsilon);
	for (long i = first; i < columns; i += step) {
		float value = (READ(x, x_at + from + i) - mean - rest) * scale;
		if (has_weight)
			value *= READ_WEIGHT(weight, weight_at + i, wide_weight);
		if (has_bias)
			value += READ_WEIGHT(bias, bias_at + i, wide_bias);
		WRITE(y, y_at + from + i, value);
	}
}
