#include "providers/ops/attend.h"

#include <math.h>

/* Keys between two looks at whether anybody still wants the result. */
enum { ATTEND_KEYS = 256 };

/* State of a softmax whose scores come one by one. */
struct attend_row {
	double maximum;
	double sum;      /* Σ exp(score − maximum) */
	int64_t visible; /* keys that the row sees: the first so many */
	double *query;   /* [head_size] */
	double *mixed;   /* [head_size]: Σ exp(score − maximum)·value */
};

uint64_t attend_scratch_bytes(const struct attend *attend)
{
	/* The host holds a row of so many elements, so the product fits. */
	return (2 * ATTEND_ROWS + 2) * sizeof(double) * (uint64_t)attend->head_size;
}

static int64_t attend_visible(const struct attend *attend, const struct attend_part *part, int64_t row)
{
	int64_t visible = part->query + row + part->keys - part->queries + 1;
	if (!attend->causal || visible > part->keys)
		return part->keys;
	return visible < 0 ? 0 : visible;
}

/* Row number of a sequence's key `j` in key and value. */
static uint64_t attend_key_row(const struct attend *attend, const struct attend_part *part, int64_t j)
{
	int64_t place = part->sequence * part->keys + j;
	if (attend->block_table != NULL) {
		uint64_t entry = (uint64_t)(part->sequence * attend->block_table->shape[1] + j / attend->block_size);
		place = kernel_index(attend->block_table, entry) * attend->block_size + j % attend->block_size;
	}
	int64_t kv_head = part->head / (attend->heads / attend->kv_heads);
	return (uint64_t)(place * attend->kv_heads + kv_head);
}

/* Sums of eight interleaved shares, so that additions don't wait for each other. */
static double dot(const double *a, const double *b, int64_t count)
{
	double sums[8] = {0};
	int64_t i = 0;
	for (; i + 8 <= count; i += 8)
		for (int lane = 0; lane < 8; lane++)
			sums[lane] += a[i + lane] * b[i + lane];
	for (; i < count; i++)
		sums[0] += a[i] * b[i];
	return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

static void attend_row_raise(struct attend_row *row, double maximum, int64_t head_size)
{
	double shrink = exp(row->maximum - maximum);
	row->maximum = maximum;
	row->sum *= shrink;
	for (int64_t d = 0; d < head_size; d++)
		row->mixed[d] *= shrink;
}

static void attend_row_add(struct attend_row *row, double score, const double *value, int64_t head_size)
{
	if (score > row->maximum)
		attend_row_raise(row, score, head_size);
	/* Before the first score above −inf, a −inf weighs nothing; if none follows, the sum stays 0 and the row becomes 0/0. */
	double weight = isinf(row->maximum) && isinf(score) && score < 0 ? 0 : exp(score - row->maximum);
	row->sum += weight;
	for (int64_t d = 0; d < head_size; d++)
		row->mixed[d] += weight * value[d];
}

static void attend_keys(const struct kernel_job *job, const struct attend_part *part, struct attend_row *rows, double *key,
                        double *value)
{
	const struct attend *attend = job->context;
	const int64_t longest = part->count > 0 ? rows[part->count - 1].visible : 0; /* later queries never see less */
	for (int64_t j = 0; j < longest; j++) {
		if (j % ATTEND_KEYS == 0 && job->exec->host->cancelled(job->exec))
			return;
		uint64_t number = attend_key_row(attend, part, j);
		struct kernel_line key_line = kernel_row(attend->key, number);
		struct kernel_line value_line = kernel_row(attend->value, number);
		kernel_load(&key_line, 0, attend->head_size, key);
		kernel_load(&value_line, 0, attend->head_size, value);
		for (int64_t r = 0; r < part->count; r++)
			if (j < rows[r].visible)
				attend_row_add(&rows[r], dot(rows[r].query, key, attend->head_size) * attend->scale, value, attend->head_size);
	}
}

void attend_part_run(const struct kernel_job *job, const struct attend_part *part, double *scratch)
{
	const struct attend *attend = job->context;
	const int64_t size = attend->head_size;
	struct attend_row rows[ATTEND_ROWS];
	double *key = scratch + 2 * ATTEND_ROWS * size;

	for (int64_t r = 0; r < part->count; r++) {
		rows[r] = (struct attend_row){
			.maximum = -INFINITY,
			.visible = attend_visible(attend, part, r),
			.query = scratch + 2 * r * size,
			.mixed = scratch + (2 * r + 1) * size,
		};
		struct kernel_line from = kernel_row(attend->query, (uint64_t)((part->token + r) * attend->heads + part->head));
		kernel_load(&from, 0, size, rows[r].query);
		memset(rows[r].mixed, 0, (size_t)size * sizeof *rows[r].mixed);
	}
	attend_keys(job, part, rows, key, key + size);
	for (int64_t r = 0; r < part->count; r++) {
		struct kernel_line to = kernel_row(job->call->outputs[0], (uint64_t)((part->token + r) * attend->heads + part->head));
		for (int64_t d = 0; d < size && rows[r].visible > 0; d++)
			rows[r].mixed[d] /= rows[r].sum;
		kernel_store(&to, 0, size, rows[r].mixed);
	}
}

/* Measured: 5 ns to convert an element of a key and of its value, once a part; 0.9 ns to multiply them, once a row. */
double attend_ns(const struct attend *attend, double rows, double keys)
{
	double parts = ceil(rows / ATTEND_ROWS);
	return rows * (50 + 10 * (double)attend->head_size) +
	       keys * (parts * (100 + 5 * (double)attend->head_size) + rows * (30 + 0.9 * (double)attend->head_size));
}

opd_status attend_expect_heads(const opd_op *op, int64_t heads, const char *key_name, int64_t kv_heads, opd_error *error)
{
	if (kv_heads == 0 ? heads == 0 : heads % kv_heads == 0)
		return OPD_OK;
	return kernel_invalid(op, error, "query has %lld heads, expected a multiple of the %lld of %s", (long long)heads,
	                      (long long)kv_heads, key_name);
}

double attend_generate_scale(int64_t head_size)
{
	return head_size > 0 ? 1 / sqrt((double)head_size) : 1;
}

opd_status attend_generate_expect_heads(const opd_op *op, int64_t heads, int64_t kv_heads, opd_error *error)
{
	if (kv_heads > 0 && heads % kv_heads == 0)
		return OPD_OK;
	return kernel_invalid(op, error, "dim heads is %lld, expected a multiple of dim kv_heads, %lld", (long long)heads,
	                      (long long)kv_heads);
}
