/* Shared memory, both ways: attaching, detaching, rings, where a result goes. */
#include "proto/codec_internal.h"

void read_shared(const Opd__V1__SharedRange *in, struct msg_shared_range *out)
{
	*out = in == NULL ? (struct msg_shared_range){0} : (struct msg_shared_range){in->region, in->offset, in->bytes};
}

static bool write_attach_rings(struct arena *arena, const struct msg_attach_rings *in, Opd__V1__Request *out)
{
	out->body_case = OPD__V1__REQUEST__BODY_ATTACH_RINGS;
	out->attach_rings = write_new(arena, &opd__v1__attach_rings__descriptor);
	if (out->attach_rings == NULL)
		return false;
	out->attach_rings->request_bytes = in->request_bytes;
	out->attach_rings->reply_bytes = in->reply_bytes;
	out->attach_rings->poll_us = in->poll_us;
	return true;
}

bool write_memory_request(struct arena *arena, const struct msg_request *in, Opd__V1__Request *out)
{
	if (in->kind == MSG_REQUEST_ATTACH_MEMORY) {
		out->body_case = OPD__V1__REQUEST__BODY_ATTACH_MEMORY;
		out->attach_memory = write_new(arena, &opd__v1__attach_memory__descriptor);
		if (out->attach_memory != NULL)
			out->attach_memory->bytes = in->memory_bytes;
		return out->attach_memory != NULL;
	}
	if (in->kind == MSG_REQUEST_ATTACH_RINGS)
		return write_attach_rings(arena, &in->rings, out);
	out->body_case = OPD__V1__REQUEST__BODY_DETACH_MEMORY;
	out->detach_memory = write_new(arena, &opd__v1__detach_memory__descriptor);
	if (out->detach_memory != NULL)
		out->detach_memory->region = in->region;
	return out->detach_memory != NULL;
}

bool write_memory_reply(struct arena *arena, const struct msg_reply *in, Opd__V1__Reply *out)
{
	if (in->kind == MSG_REPLY_RINGS) {
		out->body_case = OPD__V1__REPLY__BODY_RINGS;
		out->rings = write_new(arena, &opd__v1__rings_attached__descriptor);
		if (out->rings != NULL)
			out->rings->poll_us = in->rings.poll_us;
		return out->rings != NULL;
	}
	out->body_case = OPD__V1__REPLY__BODY_MEMORY;
	out->memory = write_new(arena, &opd__v1__memory_attached__descriptor);
	if (out->memory == NULL)
		return false;
	out->memory->region = in->memory.region;
	out->memory->bytes = in->memory.bytes;
	return true;
}
