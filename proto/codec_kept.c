/* Uploads, writes, fetches and the list of kept tensors, both ways. */
#include <string.h>

#include "proto/codec_internal.h"

/* ---- Reading ---- */

/* An absent tensor is one of no dtype and no source. */
static opd_status read_one(struct reader *reader, const Opd__V1__Tensor *in, struct msg_tensor **out)
{
	*out = arena_zalloc(reader->arena, sizeof **out);
	if (*out == NULL)
		return read_full(reader);
	return in == NULL ? OPD_OK : read_tensor(reader, in, *out);
}

static struct msg_handle read_handle(const Opd__V1__Handle *in)
{
	return in == NULL ? (struct msg_handle){0, 0} : (struct msg_handle){in->index, in->generation};
}

opd_status read_upload(struct reader *reader, const Opd__V1__Upload *in, struct msg_upload *out)
{
	out->parts = in->parts;
	opd_status status = read_text(reader, "device", in->device, BOUND_NAME_BYTES, &out->device);
	return status == OPD_OK ? read_one(reader, in->tensor, &out->tensor) : status;
}

opd_status read_write(struct reader *reader, const Opd__V1__Write *in, struct msg_write *out)
{
	out->handle = read_handle(in->handle);
	out->offset = in->offset;
	return read_one(reader, in->data, &out->data);
}

opd_status read_fetch(struct reader *reader, const Opd__V1__Fetch *in, struct msg_fetch *out)
{
	read_shared(in->into, &out->into);
	return read_one(reader, in->tensor, &out->tensor);
}

static opd_status read_kept(struct reader *reader, const Opd__V1__KeptTensor *in, struct msg_kept *out)
{
	if (in->n_shape > OPD_RANK_MAX)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "shape: rank %zu, at most %d", in->n_shape, OPD_RANK_MAX);
	*out = (struct msg_kept){
	    .handle = read_handle(in->handle),
	    .rank = (uint32_t)in->n_shape,
	    .bytes = in->bytes,
	    .received = in->received,
	    .request = in->request,
	    .output = in->output,
	};
	for (size_t i = 0; i < in->n_shape; i++)
		out->shape[i] = in->shape[i];
	opd_status status = read_text(reader, "device", in->device, BOUND_NAME_BYTES, &out->device);
	return status == OPD_OK ? read_dtype(reader, "tensor", (int32_t)in->dtype, &out->dtype) : status;
}

opd_status read_kept_tensors(struct reader *reader, const Opd__V1__KeptTensors *in, struct msg_reply *out)
{
	opd_status status = read_count(reader, "tensors", in->n_tensors, BOUND_LIST);
	if (status != OPD_OK)
		return status;
	struct msg_kept *items = arena_array(reader->arena, in->n_tensors, sizeof *items);
	if (items == NULL)
		return read_full(reader);
	for (size_t i = 0; i < in->n_tensors; i++) {
		status = read_kept(reader, in->tensors[i], &items[i]);
		if (status != OPD_OK)
			return opd_error_prefix(reader->error, status, "tensors[%zu]", i);
	}
	out->tensors.count = (uint32_t)in->n_tensors;
	out->tensors.next = in->next;
	out->tensors.items = items;
	return OPD_OK;
}

/* ---- Writing ---- */

static Opd__V1__Upload *write_upload(struct arena *arena, const struct msg_upload *in)
{
	Opd__V1__Upload *out = write_new(arena, &opd__v1__upload__descriptor);
	if (out == NULL || (out->tensor = write_tensor(arena, in->tensor)) == NULL)
		return NULL;
	out->parts = in->parts;
	out->device = write_text(in->device);
	return out;
}

static Opd__V1__Write *write_write(struct arena *arena, const struct msg_write *in)
{
	Opd__V1__Write *out = write_new(arena, &opd__v1__write__descriptor);
	if (out == NULL || (out->handle = write_handle(arena, in->handle)) == NULL || (out->data = write_tensor(arena, in->data)) == NULL)
		return NULL;
	out->offset = in->offset;
	return out;
}

static Opd__V1__Fetch *write_fetch(struct arena *arena, const struct msg_fetch *in)
{
	const struct msg_shared_range *into = &in->into;
	Opd__V1__Fetch *out = write_new(arena, &opd__v1__fetch__descriptor);
	if (out == NULL || (out->tensor = write_tensor(arena, in->tensor)) == NULL)
		return NULL;
	if (into->region != 0 && (out->into = write_shared(arena, into->region, into->offset, into->bytes)) == NULL)
		return NULL;
	return out;
}

bool write_kept_request(struct arena *arena, const struct msg_request *in, Opd__V1__Request *out)
{
	switch (in->kind) {
	case MSG_REQUEST_UPLOAD:
		out->body_case = OPD__V1__REQUEST__BODY_UPLOAD;
		return (out->upload = write_upload(arena, &in->upload)) != NULL;
	case MSG_REQUEST_WRITE:
		out->body_case = OPD__V1__REQUEST__BODY_WRITE;
		return (out->write = write_write(arena, &in->write)) != NULL;
	case MSG_REQUEST_FETCH:
		out->body_case = OPD__V1__REQUEST__BODY_FETCH;
		return (out->fetch = write_fetch(arena, &in->fetch)) != NULL;
	default:
		out->body_case = OPD__V1__REQUEST__BODY_LIST_TENSORS;
		out->list_tensors = write_new(arena, &opd__v1__list_tensors__descriptor);
		if (out->list_tensors == NULL)
			return false;
		out->list_tensors->first = in->first;
		return true;
	}
}

static Opd__V1__KeptTensor *write_kept(struct arena *arena, const struct msg_kept *in)
{
	Opd__V1__KeptTensor *out = write_new(arena, &opd__v1__kept_tensor__descriptor);
	if (out == NULL || (out->handle = write_handle(arena, in->handle)) == NULL)
		return NULL;
	out->dtype = (Opd__V1__DType)in->dtype;
	out->n_shape = in->rank;
	out->shape = (int64_t *)(uintptr_t)in->shape;
	out->bytes = in->bytes;
	out->received = in->received;
	out->request = in->request;
	out->output = in->output;
	out->device = write_text(in->device);
	return out;
}

Opd__V1__KeptTensors *write_kept_tensors(struct arena *arena, const struct msg_reply *in)
{
	Opd__V1__KeptTensors *out = write_new(arena, &opd__v1__kept_tensors__descriptor);
	if (out == NULL || (out->tensors = arena_array(arena, in->tensors.count, sizeof *out->tensors)) == NULL)
		return NULL;
	for (uint32_t i = 0; i < in->tensors.count; i++)
		if ((out->tensors[i] = write_kept(arena, &in->tensors.items[i])) == NULL)
			return NULL;
	out->n_tensors = in->tensors.count;
	out->next = in->tensors.next;
	return out;
}
