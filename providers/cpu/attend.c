#include "providers/cpu/attend.h"

#include <math.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <string.h>

/* Rows from which on a chunk is first converted to f32 side by side: each element is then read often enough. */
#define PACKED_ROWS 8
/* How far ahead rows are asked for: their heads lie one after another, and the next pages aren't always those of the next tokens. */
#define LOOKAHEAD_BYTES 16384
#define LOOKAHEAD_KEYS 64
/* Products of pairs take values under 2^-126 for 0. With a query of normal elements up to 2^60 (pairs_lose) and a scale up to this, a score is off by less than 2^-30. */
#define PAIRS_SCALE 0x1p20f
/* Rows of a tile of one query in f32 whose heads share kv heads: 8 KiB of queries, 8 of results, and twice four keys of 2 KiB find room in a first-level cache of 48 KiB, whose sets the
 * tokens' power-of-two distance makes fewer. With 32 rows (4096 keys, 32 heads over 8, one thread on Zen 5) 977 us, with 16 849. */
#define GROUPED_ROWS 16
/* Keys are fewer than 2^63. */
#define ATTEND_LEVELS_MAX 63
/* With fewer items than so many a thread, stretches of splits are items, … */
#define ITEMS_A_THREAD 4
/* … as many as this, if there are keys enough: what is left to the last thread is then short, and the lane makes no more shares than four a thread of it. */
#define STRETCHES_A_THREAD 8
/* Binary digits of the most stretches of a sequence. */
#define STRETCHES_MOST 16

bool attend_accept(const opd_tensor *query, const opd_tensor *key, const char *key_name, const opd_tensor *value, const char *value_name,
                   opd_reason *reason)
{
	if (opd_tensor_last(query) > ATTEND_HEAD_SIZE_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "head size %lld, at most %d", (long long)opd_tensor_last(query),
		                  ATTEND_HEAD_SIZE_MAX);
	return cpu_accept_dtype_of("query", query, reason) && cpu_accept_rows("query", query, reason) &&
	       cpu_accept_rows(key_name, key, reason) && cpu_accept_rows(value_name, value, reason);
}

uint64_t attend_cost_ns(const struct cpu_kernels *kernels, opd_dtype dtype, double rows, double keys, double head_size,
                        double cache_elements)
{
	unsigned index = cpu_dtype_index(dtype);
	if (index == CPU_DTYPES)
		return 0;
	const struct cpu_cost *cost = &kernels->costs.attend_cache;
	double ns = cost->call_ns + cache_elements * cost->element_ps[index] * 1e-3 +
	            rows * (60 + 2 * keys * (head_size + 8) * kernels->costs.attend_product_fs * 1e-6);
	return ns < 1e18 ? (uint64_t)ns : (uint64_t)1e18;
}

/* Results of a split, or of several that are joined: `rows` rows of state, and their mixed values. */
struct attend_part {
	struct cpu_attend_row *rows; /* [CPU_ATTEND_ROWS] */
	float *mixed;                /* [CPU_ATTEND_ROWS][padded] */
};

/* Where two neighbouring runs of splits meet: whoever has the second one of them joins both, and goes on with the result. It lies with the item that begins the later one, in a line of
 * its own. */
struct attend_join {
	alignas(64) atomic_bool met; /* one of the two is there */
};

struct attend_work {
	const struct attend *attend;
	const opd_exec *exec;
	const struct cpu_attend_kernels *kernels;
	size_t padded;       /* head size, rounded up to whole vectors */
	uint64_t group;      /* heads that share a kv head */
	bool pairs;          /* scores are made by scores_pairs */
	uint64_t stretch;    /* so many splits are an item, a power of two; parts [items] keep their results, joins [items] say which are there. 0: all of a tile are */
	uint64_t levels;     /* of joins, of the longest sequence */
	uint64_t tile_rows;  /* most rows of a tile */
	const uint64_t *first; /* [sequences + 1]: first item of each sequence */
	unsigned char *parts;
	uint64_t part_bytes;
	struct attend_join *joins;
	unsigned char *scratch; /* of thread t: at t·scratch_bytes */
	uint64_t scratch_bytes;
	atomic_bool *cancelled;
};

/* What a tile is: rows [row, row + count) of a sequence's queries times group, with one kv head; or, for a single query, all rows of `heads` of them, which then
 * are read in the order of memory: 16 KiB of 4 tokens rather than 512 bytes every 4 KiB, where no prefetcher follows and rows share sets of a first-level cache
 * (from 0.45 to 0.95 of the rate of plain reading). */
struct attend_tile {
	struct attend_sequence sequence;
	uint64_t kv_head, heads, row, count; /* count: of all heads */
	uint64_t longest; /* keys that its last row sees */
	uint64_t splits; /* that its last row sees some of */
	uint64_t number, first, distance; /* where stretches are items: this one's number, the item of the first, and from there to that of the next */
};

static uint64_t divide_up(uint64_t value, uint64_t by)
{
	return (value + by - 1) / by;
}

/* Splits of so many keys; one where there are none. */
static uint64_t attend_splits(uint64_t keys)
{
	return keys > ATTEND_SPLIT ? divide_up(keys, ATTEND_SPLIT) : 1;
}

static uint64_t attend_tiles(const struct attend_work *work, const struct attend_sequence *sequence)
{
	return divide_up(sequence->queries * work->group, CPU_ATTEND_ROWS);
}

/* Kv heads that a tile takes together. */
static uint64_t attend_heads(const struct attend_work *work, const struct attend_sequence *sequence)
{
	if (sequence->queries != 1 || work->group > CPU_ATTEND_ROWS || work->padded != work->attend->head_size)
		return 1;
	bool grouped = work->group > 1 && work->group <= GROUPED_ROWS && work->attend->dtype == CPU_F32;
	uint64_t most = (grouped ? GROUPED_ROWS : CPU_ATTEND_ROWS) / work->group;
	return most < work->attend->kv_heads ? most : work->attend->kv_heads;
}

/* Items of a tile. */
static uint64_t attend_stretches(const struct attend_work *work, uint64_t splits)
{
	return work->stretch > 0 ? divide_up(splits, work->stretch) : 1;
}

/* Keys that row `row` of a sequence sees. */
static uint64_t attend_visible(const struct attend_work *work, const struct attend_sequence *sequence, uint64_t row)
{
	uint64_t query = row / work->group;
	if (!work->attend->causal)
		return sequence->keys;
	/* query + keys − queries + 1, at least 0 */
	uint64_t hidden = sequence->queries - 1 - query;
	return hidden < sequence->keys ? sequence->keys - hidden : 0;
}

static uint64_t attend_sequence_of(const struct attend_work *work, uint64_t item)
{
	uint64_t low = 0, high = work->attend->sequences;
	while (high - low > 1) {
		uint64_t middle = low + (high - low) / 2;
		if (work->first[middle] <= item)
			low = middle;
		else
			high = middle;
	}
	return low;
}

static struct attend_tile attend_tile_of(const struct attend_work *work, uint64_t item)
{
	struct attend_tile tile;
	uint64_t b = attend_sequence_of(work, item);
	work->attend->sequence(work->attend, b, &tile.sequence);
	uint64_t tiles = attend_tiles(work, &tile.sequence);
	uint64_t number = item - work->first[b];
	uint64_t heads = attend_heads(work, &tile.sequence);
	tile.distance = divide_up(work->attend->kv_heads, heads) * tiles;
	tile.number = number / tile.distance;
	tile.first = item - tile.number * tile.distance;
	tile.row = number % tiles * CPU_ATTEND_ROWS;
	tile.kv_head = number % tile.distance / tiles * heads;
	tile.heads = work->attend->kv_heads - tile.kv_head < heads ? work->attend->kv_heads - tile.kv_head : heads;
	uint64_t rows = tile.sequence.queries * work->group * tile.heads;
	tile.count = rows - tile.row < CPU_ATTEND_ROWS ? rows - tile.row : CPU_ATTEND_ROWS;
	tile.longest = tile.heads > 1 ? tile.sequence.keys : attend_visible(work, &tile.sequence, tile.row + tile.count - 1);
	tile.splits = attend_splits(tile.longest);
	return tile;
}

/* Distance in bytes of token and head of a tile's row, in query (strided) or y (contiguous). */
static uint64_t attend_row_at(const struct attend_work *work, const struct attend_tile *tile, uint64_t r, uint64_t token_bytes,
                              uint64_t head_bytes)
{
	uint64_t row = tile->row + r;
	if (tile->heads > 1)
		return (tile->kv_head * work->group + row) * head_bytes;
	return row / work->group * token_bytes + (tile->kv_head * work->group + row % work->group) * head_bytes;
}

/* Addresses of keys [begin, end) of the tile's sequence and kv head, and of their values. */
static void attend_places(const struct attend *attend, const struct attend_tile *tile, uint64_t begin, uint64_t end, uint64_t *keys,
                          uint64_t *values)
{
	uint64_t key = (uintptr_t)tile->sequence.key + tile->kv_head * attend->key_head;
	uint64_t value = (uintptr_t)tile->sequence.value + tile->kv_head * attend->value_head;
	const opd_tensor *table = attend->block_table;
	if (table == NULL) {
		for (uint64_t j = begin; j < end; j++) {
			*keys++ = key + j * attend->key_token;
			*values++ = value + j * attend->value_token;
		}
		return;
	}
	uint64_t row = tile->sequence.index * (uint64_t)table->strides[0];
	uint64_t slot = begin % attend->block_size;
	for (uint64_t j = begin; j < end; slot = 0) {
		uint64_t block = (uint64_t)cpu_index(table, row + j / attend->block_size * (uint64_t)table->strides[1]);
		for (; slot < attend->block_size && j < end; slot++, j++) {
			*keys++ = key + block * attend->key_block + slot * attend->key_token;
			*values++ = value + block * attend->value_block + slot * attend->value_token;
		}
	}
}

/* A thread's scratch. */
struct attend_scratch {
	float *query;  /* [CPU_ATTEND_ROWS][padded] */
	uint16_t *pairs; /* the same in bf16, where scores are made of pairs */
	bool apart[CPU_ATTEND_ROWS]; /* rows whose scores can't be */
	float *packed; /* [CPU_ATTEND_KEYS][padded] */
	float *scores; /* [CPU_ATTEND_ROWS][CPU_ATTEND_KEYS] */
	struct attend_part parts[ATTEND_LEVELS_MAX + 1]; /* runs of splits that wait for what follows, each longer than the next; there are levels + 1 */
	uint64_t packed_places[CPU_ATTEND_KEYS];
	uint64_t places[2 * (ATTEND_SPLIT + LOOKAHEAD_KEYS)]; /* a split's rows in the order in which they are read: of each chunk the keys, then the values; then what is asked for at the end */
};

static uint64_t attend_part_bytes(uint64_t rows, size_t padded)
{
	return divide_up(rows * (sizeof(struct cpu_attend_row) + padded * sizeof(float)), OPD_TENSOR_ALIGNMENT) * OPD_TENSOR_ALIGNMENT;
}

static struct attend_part attend_part_at(unsigned char *memory, uint64_t rows)
{
	struct attend_part part = {.rows = (struct cpu_attend_row *)(void *)memory};
	part.mixed = (float *)(void *)(part.rows + rows);
	return part;
}

static uint64_t attend_scratch_bytes(size_t padded, uint64_t levels)
{
	uint64_t floats = (2 * CPU_ATTEND_ROWS + CPU_ATTEND_KEYS) * padded + CPU_ATTEND_ROWS * CPU_ATTEND_KEYS;
	return floats * sizeof(float) + (levels + 1) * attend_part_bytes(CPU_ATTEND_ROWS, padded);
}

static void attend_scratch_init(const struct attend_work *work, uint32_t thread, struct attend_scratch *scratch)
{
	unsigned char *memory = work->scratch + thread * work->scratch_bytes;
	uint64_t part_bytes = attend_part_bytes(CPU_ATTEND_ROWS, work->padded);
	for (uint64_t i = 0; i <= work->levels; i++, memory += part_bytes)
		scratch->parts[i] = attend_part_at(memory, CPU_ATTEND_ROWS);
	scratch->query = (float *)(void *)memory;
	scratch->packed = scratch->query + CPU_ATTEND_ROWS * work->padded;
	scratch->scores = scratch->packed + CPU_ATTEND_KEYS * work->padded;
	scratch->pairs = (uint16_t *)(void *)(scratch->scores + CPU_ATTEND_ROWS * CPU_ATTEND_KEYS);
	for (uint64_t j = 0; j < CPU_ATTEND_KEYS; j++)
		scratch->packed_places[j] = j * work->padded * sizeof(float);
}

static void attend_part_clear(const struct attend_work *work, struct attend_part *part, uint64_t rows)
{
	for (uint64_t r = 0; r < rows; r++)
		part->rows[r] = (struct cpu_attend_row){.maximum = -INFINITY, .sum = 0.0f};
	memset(part->mixed, 0, rows * work->padded * sizeof(float));
}

static void attend_load_query(const struct attend_work *work, const struct attend_tile *tile, struct attend_scratch *scratch)
{
	const struct attend *attend = work->attend;
	uint64_t places[CPU_ATTEND_ROWS];
	for (uint64_t r = 0; r < tile->count; r++)
		places[r] = attend_row_at(work, tile, r, attend->query_token, attend->query_head);
	struct cpu_attend_run run = {.base = (uintptr_t)tile->sequence.query, .places = places, .count = (size_t)tile->count};
	work->kernels->pack[attend->dtype](&run, (size_t)attend->head_size, work->padded, scratch->query);
	for (uint64_t r = 0; r < tile->count && work->pairs; r++) {
		memcpy(scratch->pairs + r * attend->head_size, tile->sequence.query + places[r], attend->head_size * sizeof(uint16_t));
		scratch->apart[r] = work->kernels->pairs_lose(scratch->pairs + r * attend->head_size, (size_t)attend->head_size);
	}
}

/* Scores of all rows by products of pairs; then again, one by one, those of rows that would lose by it. */
static void attend_score_pairs(const struct attend_work *work, const struct attend_tile *tile, const struct cpu_attend_run *keys,
                               struct attend_scratch *scratch)
{
	const struct attend *attend = work->attend;
	uint64_t rows = tile->heads > 1 ? work->group : tile->count;
	work->kernels->scores_pairs(scratch->pairs, (size_t)tile->heads, (size_t)rows, (size_t)attend->head_size, keys, attend->key_head,
	                            scratch->scores);
	for (uint64_t r = 0; r < tile->count; r++) {
		struct cpu_attend_run again = *keys;
		again.base += r / rows * attend->key_head;
		if (scratch->apart[r])
			work->kernels->scores[CPU_BF16](scratch->query + r * work->padded, 1, work->padded, &again, scratch->scores + r * CPU_ATTEND_KEYS);
	}
}

/* Whether a tile's keys and values are read where they lie, rather than converted to f32 first. */
static bool attend_in_place(const struct attend_work *work, const struct attend_tile *tile)
{
	if (work->padded != work->attend->head_size)
		return false;
	return tile->heads > 1 || tile->count < PACKED_ROWS || work->attend->dtype == CPU_F32;
}

/* The run as the kernels of *dtype can read it: where it lies, or converted to f32 in scratch. */
static struct cpu_attend_run attend_readable(const struct attend_work *work, const struct attend_tile *tile,
                                             const struct cpu_attend_run *run, struct attend_scratch *scratch, unsigned *dtype)
{
	const struct attend *attend = work->attend;
	*dtype = attend->dtype;
	if (attend_in_place(work, tile))
		return *run;
	work->kernels->pack[attend->dtype](run, (size_t)attend->head_size, work->padded, scratch->packed);
	*dtype = CPU_F32;
	return (struct cpu_attend_run){
		.base = (uintptr_t)scratch->packed, .places = scratch->packed_places, .count = run->count};
}

/* Rows that see equally many keys of a chunk mix its values together. */
static void attend_mix_chunk(const struct attend_work *work, const struct attend_tile *tile, uint64_t begin, struct cpu_attend_run *run,
                             unsigned dtype, struct attend_scratch *scratch, struct attend_part *part)
{
	const size_t count = run->count;
	float shrinks[CPU_ATTEND_ROWS];
	for (uint64_t r = 0, next; r < tile->count; r = next) {
		uint64_t visible = attend_visible(work, &tile->sequence, tile->row + r);
		uint64_t seen = visible <= begin ? 0 : visible - begin < count ? visible - begin : count;
		for (next = r; next < tile->count; next++) {
			uint64_t other = attend_visible(work, &tile->sequence, tile->row + next);
			if ((other <= begin ? 0 : other - begin < count ? other - begin : count) != seen)
				break;
		}
		run->count = (size_t)seen;
		if (seen == 0)
			continue;
		work->kernels->weigh(scratch->scores + r * CPU_ATTEND_KEYS, (size_t)(next - r), (size_t)seen, work->attend->scale, part->rows + r, shrinks + r);
		work->kernels->mix[dtype](scratch->scores + r * CPU_ATTEND_KEYS, shrinks + r, (size_t)(next - r), work->padded, run,
		                          part->mixed + r * work->padded);
	}
	run->count = count;
}

/* One chunk of a single kv head. */
static void attend_chunk(const struct attend_work *work, const struct attend_tile *tile, uint64_t at, struct cpu_attend_run keys,
                         struct cpu_attend_run values, struct attend_scratch *scratch, struct attend_part *part)
{
	unsigned dtype;
	if (work->pairs) {
		attend_score_pairs(work, tile, &keys, scratch);
	} else {
		keys = attend_readable(work, tile, &keys, scratch, &dtype);
		work->kernels->scores[dtype](scratch->query, (size_t)tile->count, work->padded, &keys, scratch->scores);
	}
	values = attend_readable(work, tile, &values, scratch, &dtype);
	attend_mix_chunk(work, tile, at, &values, dtype, scratch, part);
}

/* One chunk of several: a single query sees all of its keys. */
static void attend_chunk_heads(const struct attend_work *work, const struct attend_tile *tile, const struct cpu_attend_run *keys,
                               const struct cpu_attend_run *values, struct attend_scratch *scratch, struct attend_part *part)
{
	const struct attend *attend = work->attend;
	float shrinks[CPU_ATTEND_ROWS];
	if (work->pairs)
		attend_score_pairs(work, tile, keys, scratch);
	else
		work->kernels->scores_heads[attend->dtype](scratch->query, (size_t)tile->heads, (size_t)work->group, work->padded, keys,
		                                           attend->key_head, scratch->scores);
	work->kernels->weigh(scratch->scores, (size_t)tile->count, keys->count, attend->scale, part->rows, shrinks);
	work->kernels->mix_heads[attend->dtype](scratch->scores, shrinks, (size_t)tile->heads, (size_t)work->group, work->padded, values,
	                                        attend->value_head, part->mixed);
}

static size_t attend_lookahead(uint64_t token_bytes)
{
	uint64_t keys = token_bytes > 0 ? LOOKAHEAD_BYTES / token_bytes : LOOKAHEAD_KEYS;
	return (size_t)(keys < 1 ? 1 : keys < LOOKAHEAD_KEYS ? keys : LOOKAHEAD_KEYS);
}

static uint64_t attend_chunk_end(uint64_t at, uint64_t end)
{
	return end - at < CPU_ATTEND_KEYS ? end : at + CPU_ATTEND_KEYS;
}

/* What is asked for at a split's end are keys behind it, or, where there are none, its last value again. (A head's place in what comes later is taken to be that in what is read: if keys and
 * values differ in it, some lines are asked for in vain.) */
static void attend_order(const struct attend *attend, const struct attend_tile *tile, uint64_t begin, uint64_t end, uint64_t *places)
{
	for (uint64_t at = begin, next; at < end; at = next) {
		next = attend_chunk_end(at, end);
		attend_places(attend, tile, at, next, places, places + (next - at));
		places += 2 * (next - at);
	}
	uint64_t behind = tile->longest - end < LOOKAHEAD_KEYS ? tile->longest - end : LOOKAHEAD_KEYS;
	attend_places(attend, tile, end, end + behind, places, places + LOOKAHEAD_KEYS);
	for (; behind < LOOKAHEAD_KEYS; behind++)
		places[behind] = places[-1];
}

/* Keys [begin, end) of one split, to `part`. */
static void attend_split(const struct attend_work *work, const struct attend_tile *tile, uint64_t begin, uint64_t end,
                         struct attend_scratch *scratch, struct attend_part *part)
{
	attend_part_clear(work, part, tile->count);
	if (begin < end)
		attend_order(work->attend, tile, begin, end, scratch->places);
	for (uint64_t at = begin; at < end; at += CPU_ATTEND_KEYS) {
		size_t count = (size_t)(attend_chunk_end(at, end) - at);
		const uint64_t *places = scratch->places + 2 * (at - begin);
		struct cpu_attend_run keys = {0, places, count, attend_lookahead(work->attend->key_token)};
		struct cpu_attend_run values = {0, places + count, count, attend_lookahead(work->attend->value_token)};
		if (tile->heads > 1)
			attend_chunk_heads(work, tile, &keys, &values, scratch, part);
		else
			attend_chunk(work, tile, at, keys, values, scratch, part);
	}
}

/* Joins a run of splits, whose first one is `split`, to the run before it. A row has nothing of keys that it doesn't see: from row to row they become more. */
static void attend_merge(const struct attend_work *work, const struct attend_tile *tile, uint64_t split, struct attend_part *whole,
                         const struct attend_part *part)
{
	uint64_t r = 0;
	while (tile->heads == 1 && r < tile->count && attend_visible(work, &tile->sequence, tile->row + r) <= split * ATTEND_SPLIT)
		r++;
	work->kernels->merge(whole->rows + r, whole->mixed + r * work->padded, part->rows + r, part->mixed + r * work->padded, (size_t)(tile->count - r),
	                     work->padded);
}

/* The result. A row that sees no key is zeros. */
static void attend_finish(const struct attend_work *work, const struct attend_tile *tile, const struct attend_part *whole)
{
	const struct attend *attend = work->attend;
	uint64_t head_bytes = attend->head_size * attend->element_bytes;
	bool pairs = attend->dtype == CPU_BF16 && attend_in_place(work, tile);
	for (uint64_t r = 0; r < tile->count; r++) {
		unsigned char *y = tile->sequence.y + attend_row_at(work, tile, r, attend->heads * head_bytes, head_bytes);
		if (tile->longest == 0 || (tile->heads == 1 && attend_visible(work, &tile->sequence, tile->row + r) == 0))
			memset(y, 0, head_bytes);
		else
			work->kernels->finish[attend->dtype](whole->mixed + r * work->padded, whole->rows[r].sum, pairs, y, (size_t)attend->head_size);
	}
}

static bool attend_cancelled(const struct attend_work *work)
{
	if (!atomic_load_explicit(work->cancelled, memory_order_relaxed) && work->exec->host->cancelled(work->exec))
		atomic_store(work->cancelled, true);
	return atomic_load_explicit(work->cancelled, memory_order_relaxed);
}

/* Splits [split, end) of a tile, to parts[0] of scratch; `split` is a multiple of a power of two that they aren't more than. False: cancelled.
 * Each is joined to what it completes: after as many of them as a number says, there are as many runs as the number has binary ones, of so many splits. What then is left is joined from its end. */
static bool attend_splits_run(const struct attend_work *work, const struct attend_tile *tile, uint64_t split, uint64_t end, struct attend_scratch *scratch)
{
	uint64_t runs = 0, done = 0;
	for (; split + done < end; runs++) {
		uint64_t begin = (split + done++) * ATTEND_SPLIT;
		attend_split(work, tile, begin, tile->longest - begin < ATTEND_SPLIT ? tile->longest : begin + ATTEND_SPLIT, scratch, &scratch->parts[runs]);
		for (uint64_t length = 1; (done & length) == 0; length *= 2, runs--)
			attend_merge(work, tile, split + done - length, &scratch->parts[runs - 1], &scratch->parts[runs]);
		if (attend_cancelled(work))
			return false;
	}
	for (; runs > 1; runs--) {
		done &= done - 1;
		attend_merge(work, tile, split + done, &scratch->parts[runs - 2], &scratch->parts[runs - 1]);
	}
	return true;
}

static void attend_tile_run(const struct attend_work *work, const struct attend_tile *tile, struct attend_scratch *scratch)
{
	attend_load_query(work, tile, scratch);
	if (attend_splits_run(work, tile, 0, tile->splits, scratch))
		attend_finish(work, tile, &scratch->parts[0]);
}

static struct attend_part attend_part_of(const struct attend_work *work, uint64_t item)
{
	return attend_part_at(work->parts + item * work->part_bytes, work->tile_rows);
}

/* Joins what a stretch completes, in the order of attend_splits_run, as far as others have computed the rest; the last one writes the result. */
static void attend_join_up(const struct attend_work *work, const struct attend_tile *tile)
{
	uint64_t at = tile->number, stretches = attend_stretches(work, tile->splits);
	struct attend_part whole = attend_part_of(work, tile->first);
	for (uint64_t length = 1; length < stretches; length *= 2) {
		uint64_t left = at & ~(2 * length - 1), right = left + length;
		at = left;
		if (right >= stretches)
			continue;
		uint64_t item = tile->first + right * tile->distance;
		if (!atomic_exchange(&work->joins[item].met, true))
			return;
		struct attend_part part = attend_part_of(work, item);
		whole = attend_part_of(work, tile->first + left * tile->distance);
		attend_merge(work, tile, right * work->stretch, &whole, &part);
	}
	attend_finish(work, tile, &whole);
}

static void attend_stretch_run(const struct attend_work *work, const struct attend_tile *tile, uint64_t item, struct attend_scratch *scratch)
{
	uint64_t split = tile->number * work->stretch;
	if (split >= tile->splits || attend_cancelled(work))
		return;
	struct attend_part own = scratch->parts[0];
	scratch->parts[0] = attend_part_of(work, item);
	attend_load_query(work, tile, scratch);
	if (attend_splits_run(work, tile, split, tile->splits - split < work->stretch ? tile->splits : split + work->stretch, scratch))
		attend_join_up(work, tile);
	scratch->parts[0] = own;
}

static void attend_items(const void *context, uint64_t begin, uint64_t end, uint32_t thread)
{
	const struct attend_work *work = context;
	struct attend_scratch scratch;
	attend_scratch_init(work, thread, &scratch);
	for (uint64_t i = begin; i < end; i++) {
		struct attend_tile tile = attend_tile_of(work, i);
		if (work->stretch > 0)
			attend_stretch_run(work, &tile, i, &scratch);
		else
			attend_tile_run(work, &tile, &scratch);
	}
}

/* Numbers the items; *cost_ns_out is their time on one thread. */
static uint64_t attend_count(struct attend_work *work, uint64_t *first, uint64_t *cost_ns_out)
{
	const struct attend *attend = work->attend;
	uint64_t items = 0;
	double rows = 0, pairs = 0, elements = 0;
	work->tile_rows = 1;
	work->levels = 0;
	for (uint64_t b = 0; b < attend->sequences; b++) {
		struct attend_sequence sequence;
		attend->sequence(attend, b, &sequence);
		uint64_t here = sequence.queries * work->group, heads = attend_heads(work, &sequence);
		first[b] = items;
		items += divide_up(attend->kv_heads, heads) * attend_tiles(work, &sequence) * attend_stretches(work, attend_splits(sequence.keys));
		rows += (double)here * (double)attend->kv_heads;
		pairs += (double)here * (double)attend->kv_heads * (double)sequence.keys;
		elements += 2 * (double)attend_tiles(work, &sequence) * (double)sequence.keys * (double)(attend->kv_heads * attend->head_size);
		here *= heads;
		while (here > 0 && attend_splits(sequence.keys) > UINT64_C(1) << work->levels)
			work->levels++;
		if (here > work->tile_rows)
			work->tile_rows = here < CPU_ATTEND_ROWS ? here : CPU_ATTEND_ROWS;
	}
	first[attend->sequences] = items;
	*cost_ns_out = attend_cost_ns(attend->kernels, attend->dtype == CPU_F32 ? OPD_f32 : attend->dtype == CPU_BF16 ? OPD_bf16 : OPD_f16,
	                              rows, rows > 0 ? pairs / rows : 0, (double)attend->head_size, elements);
	return items;
}

static opd_status attend_go(struct attend_work *work, uint64_t items, uint64_t cost_ns, opd_error *error)
{
	const opd_exec *exec = work->exec;
	uint64_t threads = cpu_threads(exec, items, cost_ns);
	work->scratch_bytes = attend_scratch_bytes(work->padded, work->levels);
	work->part_bytes = work->stretch > 0 ? attend_part_bytes(work->tile_rows, work->padded) : 0;
	uint64_t join_bytes = work->stretch > 0 ? items * sizeof *work->joins : 0;
	uint64_t bytes = threads * work->scratch_bytes + items * work->part_bytes + join_bytes;
	work->scratch = exec->host->alloc(exec->host, bytes);
	if (work->scratch == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "attention: no %llu bytes of host memory for scratch", (unsigned long long)bytes);
	work->parts = work->scratch + threads * work->scratch_bytes;
	work->joins = (struct attend_join *)(void *)(work->parts + items * work->part_bytes);
	memset(work->joins, 0, join_bytes);
	opd_status status = work->stretch > 0 ? cpu_for_grain(exec, items, 1, cost_ns, attend_items, work, error)
	                                       : cpu_for(exec, items, cost_ns, attend_items, work, error);
	if (status == OPD_OK && atomic_load(work->cancelled))
		status = opd_fail(error, OPD_CANCELLED, "cpu: cancelled while the kernel ran");
	exec->host->free(exec->host, work->scratch);
	return status;
}

opd_status attend_run(const struct attend *attend, const opd_exec *exec, opd_error *error)
{
	const struct cpu_attend_kernels *kernels = attend->kernels->attend;
	atomic_bool cancelled;
	atomic_init(&cancelled, false);
	struct attend_work work = {
		.attend = attend,
		.exec = exec,
		.kernels = kernels,
		.padded = (size_t)divide_up(attend->head_size, kernels->lanes) * kernels->lanes,
		.group = attend->heads / attend->kv_heads,
		.pairs = kernels->scores_pairs != NULL && attend->dtype == CPU_BF16 && attend->head_size % 32 == 0 && fabsf(attend->scale) <= PAIRS_SCALE,
		.cancelled = &cancelled,
	};
	uint64_t *first = exec->host->alloc(exec->host, (attend->sequences + 1) * sizeof *first);
	uint64_t cost_ns;
	if (first == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "attention: no host memory for a list of %llu sequences",
		                (unsigned long long)attend->sequences);
	uint64_t items = attend_count(&work, first, &cost_ns);
	if (cpu_threads(exec, 2, cost_ns) > 1 && items < (uint64_t)exec->threads * ITEMS_A_THREAD) {
		/* As few splits an item as make items few enough for their parts' memory: lengths come from a caller. */
		work.stretch = work.levels > STRETCHES_MOST ? UINT64_C(1) << (work.levels - STRETCHES_MOST) : 1;
		while ((items = attend_count(&work, first, &cost_ns)) > (uint64_t)exec->threads * STRETCHES_A_THREAD && work.stretch < UINT64_C(1) << work.levels)
			work.stretch *= 2;
	}
	work.first = first;
	opd_status status = attend_go(&work, items, cost_ns, error);
	exec->host->free(exec->host, first);
	return status;
}
