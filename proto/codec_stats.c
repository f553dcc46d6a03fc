/* What the daemon counts, both ways. */
#include "proto/bounds.h"
#include "proto/codec_internal.h"

/* ---- Reading ---- */

static opd_status read_labels(struct reader *reader, const Opd__V1__Stat *in, struct msg_stat *out)
{
	opd_status status = read_count(reader, "labels", in->n_labels, MSG_STAT_LABELS);
	for (size_t i = 0; status == OPD_OK && i < in->n_labels; i++) {
		status = read_text(reader, "label", in->labels[i]->name, BOUND_STR_BYTES, &out->labels[i].name);
		if (status == OPD_OK)
			status = read_text(reader, "label", in->labels[i]->value, BOUND_STR_BYTES, &out->labels[i].value);
		out->label_count++;
	}
	return status;
}

static opd_status read_stat(struct reader *reader, const Opd__V1__Stat *in, struct msg_stat *out)
{
	*out = (struct msg_stat){.kind = (uint32_t)in->kind, .value = in->value};
	opd_status status = read_text(reader, "name", in->name, BOUND_STR_BYTES, &out->name);
	if (status == OPD_OK)
		status = read_labels(reader, in, out);
	if (status == OPD_OK)
		status = read_count(reader, "buckets", in->n_buckets, MSG_STAT_BUCKETS_MAX);
	if (status != OPD_OK)
		return status;
	out->buckets = arena_array(reader->arena, in->n_buckets, sizeof out->buckets[0]);
	if (out->buckets == NULL)
		return read_full(reader);
	for (; out->bucket_count < in->n_buckets; out->bucket_count++)
		out->buckets[out->bucket_count] = in->buckets[out->bucket_count];
	return OPD_OK;
}

opd_status read_stats(struct reader *reader, const Opd__V1__Stats *in, struct msg_stats *out)
{
	opd_status status = read_count(reader, "stats", in->n_items, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	*out = (struct msg_stats){.cut = in->cut, .items = arena_array(reader->arena, in->n_items, sizeof out->items[0])};
	if (out->items == NULL)
		return read_full(reader);
	for (; status == OPD_OK && out->count < in->n_items; out->count++)
		status = read_stat(reader, in->items[out->count], &out->items[out->count]);
	return status;
}

/* ---- Writing ---- */

/* NULL: out of memory. */
static Opd__V1__StatLabel **write_labels(struct arena *arena, const struct msg_stat *in, size_t *count_out)
{
	Opd__V1__StatLabel **list = arena_array(arena, in->label_count, sizeof list[0]);
	for (uint32_t i = 0; list != NULL && i < in->label_count; i++) {
		if ((list[i] = write_new(arena, &opd__v1__stat_label__descriptor)) == NULL)
			return NULL;
		list[i]->name = write_text(in->labels[i].name);
		list[i]->value = write_text(in->labels[i].value);
	}
	*count_out = in->label_count;
	return list;
}

static Opd__V1__Stat *write_stat(struct arena *arena, const struct msg_stat *in)
{
	Opd__V1__Stat *out = write_new(arena, &opd__v1__stat__descriptor);
	if (out == NULL || (out->labels = write_labels(arena, in, &out->n_labels)) == NULL)
		return NULL;
	out->name = write_text(in->name);
	out->kind = (Opd__V1__StatKind)in->kind;
	out->value = in->value;
	out->n_buckets = in->bucket_count;
	out->buckets = in->buckets;
	return out;
}

Opd__V1__Stats *write_stats(struct arena *arena, const struct msg_stats *in)
{
	Opd__V1__Stats *out = write_new(arena, &opd__v1__stats__descriptor);
	if (out == NULL || (out->items = arena_array(arena, in->count, sizeof out->items[0])) == NULL)
		return NULL;
	out->cut = in->cut;
	for (; out->n_items < in->count; out->n_items++)
		if ((out->items[out->n_items] = write_stat(arena, &in->items[out->n_items])) == NULL)
			return NULL;
	return out;
}
