/* Numbers of functions and of combinations: elementwise.c has the same. */
float activation(float x, long function)
{
	switch (function) {
	case 0:
		return x / (1.0f + exp(-x)); /* silu */
	case 1: /* gelu; erfc keeps the digits that 1 + erf loses for negative x */
		return 0.5f * x * erfc(-x * 0.70710678118654752f);
	case 2:
		return 0.5f * x * (1.0f + tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
	case 3:
		return x > 0 || isnan(x) ? x : 0;
	case 4:
		return x > 0 || isnan(x) ? x * x : 0;
	default:
		return 1.0f / (1.0f + exp(-x)); /* sigmoid */
	}
}

kernel void activate(global const T *x, long x_at, global T *y, long y_at, long count, long function)
{
	const long i = get_global_id(0);
	if (i < count)
		WRITE(y, y_at + i, activation(READ(x, x_at + i), function));
}

/* Rows of two halves; `second`: which goes through the function. */
kernel void activate_and_mul(global const T *x, long x_at, global T *y, long y_at, long count, long half_row, long function, long second)
{
	const long i = get_global_id(0);
	if (i >= count)
		return;
	const long at = x_at + i / half_row * 2 * half_row + i % half_row;
	const float first = READ(x, at), other = READ(x, at + half_row);
	WRITE(y, y_at + i, second ? first * activation(other, function) : activation(first, function) * other);
}

/* Operands are read by strides over the result's shape, dimensions of extent 1 first. */
struct layout {
	long shape[8];
	long a[8];
	long b[8];
};

kernel void combine(global const T *a, long a_at, global const T *b, long b_at, global T *y, long y_at, long count, long function,
                    struct layout layout)
{
	const long i = get_global_id(0);
	if (i >= count)
		return;
	long rest = i, from_a = a_at, from_b = b_at;
	for (int dimension = 7; dimension >= 0; dimension--) {
		const long at = rest % layout.shape[dimension];
		rest /= layout.shape[dimension];
		from_a += at * layout.a[dimension];
		from_b += at * layout.b[dimension];
	}
	const float left = READ(a, from_a), right = READ(b, from_b);
	WRITE(y, y_at + i, function == 0 ? left + right : function == 1 ? left - right : left * right);
}
