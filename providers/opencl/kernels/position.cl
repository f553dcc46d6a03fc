/* As in opd/provider.h. */
struct fault {
	int state;
	uint param;
	ulong position;
	long value;
	long low;
	long high;
	uint node;
	uint reserved[5];
};

/* The first that says so. */
void report(global struct fault *fault, uint node, ulong position, long value, long limit)
{
	if (atomic_cmpxchg(&fault->state, 0, 1) != 0)
		return;
	fault->param = 0;
	fault->position = position;
	fault->value = value;
	fault->low = 0;
	fault->high = limit - 1;
	fault->node = node;
	mem_fence(CLK_GLOBAL_MEM_FENCE);
	(void)atomic_xchg(&fault->state, 2);
}

long index_at(global const int *indices, long at, long wide)
{
	return wide ? ((global const long *)indices)[at] : (long)indices[at];
}

/* An item an index, of results that have no elements. */
kernel void index_check(global const int *indices, long at, long count, long rows, long wide, global struct fault *fault, long node, long checks)
{
	const long i = get_global_id(0);
	if (i >= count || !checks || fault->state != 0)
		return;
	const long index = index_at(indices, at + i, wide);
	if (index < 0 || index >= rows)
		report(fault, (uint)node, (ulong)i, index, rows);
}

/* An item a unit of a row: `unit` bytes, a row has `units`. */
kernel void embedding(global const int *ids, long ids_at, global const uchar *table, global uchar *y, long y_at, long count, long units, long unit,
                      long rows, long wide, global struct fault *fault, long node, long checks, long table_at)
{
	const long i = get_global_id(0);
	if (i >= count || (checks && fault->state != 0))
		return;
	const long token = i / units, at = i % units;
	const long id = index_at(ids, ids_at + token, wide);
	if (id < 0 || id >= rows) {
		if (checks && at == 0)
			report(fault, (uint)node, (ulong)token, id, rows);
		return;
	}
	const long from = table_at + (id * units + at) * unit, to = y_at + i * unit;
	if (unit == 4)
		*(global uint *)(y + to) = *(global const uint *)(table + from);
	else if (unit == 2)
		*(global ushort *)(y + to) = *(global const ushort *)(table + from);
	else
		y[to] = table[from];
}

/* An item a pair, or an element that passes through, of one token's head. */
kernel void rotary_embedding(global const int *positions, long positions_at, global const T *x, long x_at, global const T *cache, long cache_at,
                             global T *y, long y_at, long count, long heads, long head_size, long rotated, long rows, long neox, long wide,
                             long wide_cache, global struct fault *fault, long node, long checks)
{
	const long i = get_global_id(0);
	const long pairs = rotated / 2, work = pairs + head_size - rotated; /* of a head */
	if (i >= count || (checks && fault->state != 0))
		return;
	const long token = i / (heads * work), rest = i % (heads * work);
	const long head = rest / work, item = rest % work;
	const long position = index_at(positions, positions_at + token, wide);
	if (position < 0 || position >= rows) {
		if (checks && rest == 0)
			report(fault, (uint)node, (ulong)token, position, rows);
		return;
	}
	const long from = (token * heads + head) * head_size;
	if (item >= pairs) {
		COPY(y, y_at + from + rotated + item - pairs, x, x_at + from + rotated + item - pairs);
		return;
	}
	const long line = cache_at + position * rotated;
	const float cosine = READ_WEIGHT(cache, line + item, wide_cache), sine = READ_WEIGHT(cache, line + pairs + item, wide_cache);
	const long first = from + (neox ? item : 2 * item), second = from + (neox ? item + pairs : 2 * item + 1);
	const float a = READ(x, x_at + first), b = READ(x, x_at + second);
	/* What rounding takes from one product comes back: without it nearly equal products leave no right digit. */
	const float bs = b * sine, as = a * sine;
	WRITE(y, y_at + first, fma(a, cosine, -bs) + fma(-b, sine, bs));
	WRITE(y, y_at + second, fma(b, cosine, as) + fma(a, sine, -as));
}
