/* Publications, both ways. */
#include <string.h>

#include "proto/bounds.h"
#include "proto/codec_internal.h"

/* ---- Reading ---- */

opd_status read_publish(struct reader *reader, const Opd__V1__Publish *in, struct msg_publish *out)
{
	out->all = in->all;
	out->lasting = in->lasting;
	out->tensor = arena_zalloc(reader->arena, sizeof *out->tensor);
	if (out->tensor == NULL)
		return read_full(reader);
	opd_status status = read_text(reader, "name", in->name, BOUND_NAME_BYTES, &out->name);
	return status == OPD_OK && in->tensor != NULL ? read_tensor(reader, in->tensor, out->tensor) : status;
}

/* NULL where there is none. */
static opd_status read_sha256(struct reader *reader, ProtobufCBinaryData in, const uint8_t **out)
{
	if (in.len != 0 && in.len != MSG_SHA256_BYTES)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "sha256 has %zu bytes, expected %u", in.len, MSG_SHA256_BYTES);
	*out = in.len == 0 ? NULL : in.data;
	return OPD_OK;
}

opd_status read_open(struct reader *reader, const Opd__V1__OpenTensor *in, struct msg_open *out)
{
	opd_status status = read_text(reader, "name", in->name, BOUND_NAME_BYTES, &out->name);
	return status == OPD_OK ? read_sha256(reader, in->sha256, &out->sha256) : status;
}

static opd_status read_publication(struct reader *reader, const Opd__V1__Publication *in, struct msg_publication *out)
{
	const uint8_t *sha256 = NULL;
	if (in->n_shape > OPD_RANK_MAX)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "shape: rank %zu, at most %d", in->n_shape, OPD_RANK_MAX);
	*out = (struct msg_publication){.rank = (uint32_t)in->n_shape, .bytes = in->bytes, .all = in->all, .lasting = in->lasting, .holders = in->holders};
	for (size_t i = 0; i < in->n_shape; i++)
		out->shape[i] = in->shape[i];
	if (in->handle != NULL)
		out->handle = (struct msg_handle){in->handle->index, in->handle->generation};
	opd_status status = read_sha256(reader, in->sha256, &sha256);
	if (status == OPD_OK && sha256 != NULL)
		memcpy(out->sha256, sha256, sizeof out->sha256);
	if (status == OPD_OK)
		status = read_text(reader, "name", in->name, BOUND_NAME_BYTES, &out->name);
	if (status == OPD_OK)
		status = read_text(reader, "tenant", in->tenant, BOUND_STR_BYTES, &out->tenant);
	return status == OPD_OK ? read_dtype(reader, "publication", (int32_t)in->dtype, &out->dtype) : status;
}

opd_status read_publications(struct reader *reader, const Opd__V1__Publications *in, struct msg_reply *out)
{
	opd_status status = read_count(reader, "publications", in->n_items, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	struct msg_publication *items = arena_array(reader->arena, in->n_items, sizeof *items);
	if (items == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_items; i++) {
		status = read_publication(reader, in->items[i], &items[i]);
		if (status != OPD_OK)
			return opd_error_prefix(reader->error, status, "publications[%zu]", i);
	}
	out->publications.count = (uint32_t)in->n_items;
	out->publications.items = items;
	return OPD_OK;
}

/* ---- Writing ---- */

static ProtobufCBinaryData write_sha256(const uint8_t *sha256)
{
	return (ProtobufCBinaryData){.len = sha256 == NULL ? 0 : MSG_SHA256_BYTES, .data = (uint8_t *)(uintptr_t)sha256};
}

static Opd__V1__Publish *write_publish(struct arena *arena, const struct msg_publish *in)
{
	Opd__V1__Publish *out = write_new(arena, &opd__v1__publish__descriptor);
	if (out == NULL || (out->tensor = write_tensor(arena, in->tensor)) == NULL)
		return NULL;
	out->name = write_text(in->name);
	out->all = in->all;
	out->lasting = in->lasting;
	return out;
}

bool write_publish_request(struct arena *arena, const struct msg_request *in, Opd__V1__Request *out)
{
	switch (in->kind) {
	case MSG_REQUEST_PUBLISH:
		out->body_case = OPD__V1__REQUEST__BODY_PUBLISH;
		return (out->publish = write_publish(arena, &in->publish)) != NULL;
	case MSG_REQUEST_OPEN:
		out->body_case = OPD__V1__REQUEST__BODY_OPEN_TENSOR;
		out->open_tensor = write_new(arena, &opd__v1__open_tensor__descriptor);
		if (out->open_tensor == NULL)
			return false;
		out->open_tensor->name = write_text(in->open.name);
		out->open_tensor->sha256 = write_sha256(in->open.sha256);
		return true;
	case MSG_REQUEST_WITHDRAW:
		out->body_case = OPD__V1__REQUEST__BODY_WITHDRAW;
		out->withdraw = write_new(arena, &opd__v1__withdraw__descriptor);
		if (out->withdraw == NULL)
			return false;
		out->withdraw->name = write_text(in->withdraw);
		return true;
	default:
		out->body_case = OPD__V1__REQUEST__BODY_LIST_PUBLICATIONS;
		return (out->list_publications = write_new(arena, &opd__v1__list_publications__descriptor)) != NULL;
	}
}

static Opd__V1__Publication *write_publication(struct arena *arena, const struct msg_publication *in)
{
	Opd__V1__Publication *out = write_new(arena, &opd__v1__publication__descriptor);
	if (out == NULL)
		return NULL;
	if (in->handle.generation != 0 && (out->handle = write_handle(arena, in->handle)) == NULL)
		return NULL;
	out->name = write_text(in->name);
	out->sha256 = write_sha256(in->sha256);
	out->dtype = (Opd__V1__DType)in->dtype;
	out->n_shape = in->rank;
	out->shape = (int64_t *)(uintptr_t)in->shape;
	out->bytes = in->bytes;
	out->all = in->all;
	out->lasting = in->lasting;
	out->tenant = write_text(in->tenant);
	out->holders = in->holders;
	return out;
}

Opd__V1__Publications *write_publications(struct arena *arena, const struct msg_reply *in)
{
	Opd__V1__Publications *out = write_new(arena, &opd__v1__publications__descriptor);
	if (out == NULL || (out->items = arena_array(arena, in->publications.count, sizeof *out->items)) == NULL)
		return NULL;
	for (uint32_t i = 0; i < in->publications.count; i++)
		if ((out->items[i] = write_publication(arena, &in->publications.items[i])) == NULL)
			return NULL;
	out->n_items = in->publications.count;
	return out;
}
