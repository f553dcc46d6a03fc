#include "proto/codec.h"

#include <string.h>

#include "proto/codec_internal.h"
#include "proto/text.h"

/* ---- Memory ---- */

struct unpack_memory {
	struct arena *arena;
	bool full;
};

/* One byte more than asked for, zero: an unpacked text ends in NUL without a copy. The arena rounds to 16 bytes anyway. */
static void *unpack_alloc(void *data, size_t bytes)
{
	struct unpack_memory *memory = data;
	char *start = bytes < SIZE_MAX ? arena_alloc(memory->arena, bytes + 1) : NULL;
	if (start == NULL) {
		memory->full = true;
		return NULL;
	}
	start[bytes] = '\0';
	return start;
}

static void unpack_free(void *data, void *pointer)
{
	(void)data;
	(void)pointer; /* goes with the arena */
}

void *codec_unpack(struct reader *reader, const ProtobufCMessageDescriptor *descriptor, const char *name, const uint8_t *envelope,
                   size_t bytes, opd_status *status_out)
{
	struct unpack_memory memory = {reader->arena, false};
	ProtobufCAllocator allocator = {unpack_alloc, unpack_free, &memory};
	static const uint8_t nothing[1] = {0};
	void *message = protobuf_c_message_unpack(descriptor, &allocator, bytes, bytes == 0 ? nothing : envelope);
	if (message != NULL)
		*status_out = OPD_OK;
	else if (memory.full)
		*status_out = read_full(reader);
	else
		*status_out = opd_fail(reader->error, OPD_INVALID_ARGUMENT, "envelope: not a valid opd.v1.%s (%zu bytes)", name, bytes);
	return message;
}

opd_status codec_pack(struct arena *arena, const ProtobufCMessage *message, const char *name, struct codec_buffer *out,
                      opd_error *error)
{
	size_t bytes = message == NULL ? 0 : protobuf_c_message_get_packed_size(message);
	if (bytes > BOUND_ENVELOPE_BYTES)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "envelope: %s takes %zu bytes, at most %u", name, bytes,
		                BOUND_ENVELOPE_BYTES);
	uint8_t *frame = message == NULL ? NULL : arena_alloc(arena, FRAME_HEADER_BYTES + bytes);
	if (frame == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "envelope: encoding %s takes more than %zu bytes", name, arena->cap_bytes);
	(void)protobuf_c_message_pack(message, frame + FRAME_HEADER_BYTES);
	*out = (struct codec_buffer){frame, bytes};
	return OPD_OK;
}

/* ---- What every message has ---- */

opd_status read_full(struct reader *reader)
{
	return opd_fail(reader->error, OPD_RESOURCE_EXHAUSTED, "envelope: decoding takes more than %zu bytes",
	                reader->arena->cap_bytes);
}

opd_status read_status(uint32_t number)
{
	return number <= OPD_UNAUTHENTICATED ? (opd_status)number : OPD_UNKNOWN;
}

static opd_status fail_text(struct reader *reader, const char *field, ProtobufCBinaryData in, size_t bound)
{
	char shown[80];
	(void)text_escape((const char *)in.data, in.len, shown, sizeof shown);
	if (in.len > bound)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "%s: %zu bytes, at most %zu: \"%s\"", field, in.len, bound, shown);
	return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "%s: \"%s\" is not UTF-8 without NUL", field, shown);
}

opd_status read_text(struct reader *reader, const char *field, ProtobufCBinaryData in, size_t bound, struct msg_text *out)
{
	if (in.len == 0) {
		*out = (struct msg_text){"", 0};
		return OPD_OK;
	}
	if (in.len > bound || !text_valid((const char *)in.data, in.len))
		return fail_text(reader, field, in, bound);
	*out = (struct msg_text){(const char *)in.data, in.len};
	return OPD_OK;
}

opd_status read_count(struct reader *reader, const char *field, size_t count, size_t bound)
{
	if (count > bound)
		return opd_fail(reader->error, OPD_INVALID_ARGUMENT, "%s: %zu entries, at most %zu", field, count, bound);
	return OPD_OK;
}

opd_status read_texts(struct reader *reader, const char *field, size_t count, const ProtobufCBinaryData *in, size_t count_bound,
                      size_t bound, uint32_t *count_out, const struct msg_text **out)
{
	opd_status status = read_count(reader, field, count, count_bound);
	if (status != OPD_OK)
		return status;
	struct msg_text *texts = arena_array(reader->arena, count, sizeof *texts);
	if (texts == NULL)
		return read_full(reader);
	for (size_t i = 0; i < count; i++) {
		status = read_text(reader, field, in[i], bound, &texts[i]);
		if (status != OPD_OK)
			return status;
	}
	*count_out = (uint32_t)count;
	*out = texts;
	return OPD_OK;
}

opd_status read_ints(struct reader *reader, const char *field, size_t count, const int64_t *in, size_t bound, uint32_t *count_out,
                     const int64_t **out)
{
	opd_status status = read_count(reader, field, count, bound);
	if (status == OPD_OK) {
		*count_out = (uint32_t)count;
		*out = in;
	}
	return status;
}

void *write_new(struct arena *arena, const ProtobufCMessageDescriptor *descriptor)
{
	void *message = arena_alloc(arena, descriptor->sizeof_message);
	if (message != NULL)
		protobuf_c_message_init(descriptor, message);
	return message;
}

bool write_texts(struct arena *arena, uint32_t count, const struct msg_text *in, size_t *count_out, ProtobufCBinaryData **out)
{
	ProtobufCBinaryData *texts = arena_array(arena, count, sizeof *texts);
	if (texts == NULL)
		return false;
	for (uint32_t i = 0; i < count; i++)
		texts[i] = write_text(in[i]);
	*count_out = count;
	*out = texts;
	return true;
}

/* ---- Session ---- */

static opd_status read_hello(struct reader *reader, const Opd__V1__Hello *in, struct msg_hello *out)
{
	out->version_min = in->version_min;
	out->version_max = in->version_max;
	out->chunk_bytes = in->chunk_bytes;
	out->no_chunks = in->no_chunks;
	out->reattach_bytes = in->reattach.len;
	opd_status status = read_text(reader, "client", in->client, BOUND_STR_BYTES, &out->client);
	if (status == OPD_OK)
		status = read_text(reader, "token", in->token, BOUND_STR_BYTES, &out->token);
	if (status != OPD_OK)
		return status;
	return read_texts(reader, "features", in->n_features, in->features, BOUND_FEATURES, BOUND_NAME_BYTES, &out->feature_count,
	                  &out->features);
}

opd_status codec_decode_hello(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_hello *out, opd_error *error)
{
	struct reader reader = {arena, error};
	opd_status status;
	Opd__V1__Hello *in = codec_unpack(&reader, &opd__v1__hello__descriptor, "Hello", envelope, bytes, &status);
	if (in == NULL)
		return status;
	struct msg_hello hello = {0};
	status = read_hello(&reader, in, &hello);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "hello");
	*out = hello;
	return OPD_OK;
}

static void read_limits(const Opd__V1__Limits *in, struct msg_limits *out)
{
	if (in != NULL)
		*out = (struct msg_limits){in->envelope_bytes, in->payload_bytes, in->session_bytes, in->in_flight};
}

static opd_status read_hello_reply(struct reader *reader, const Opd__V1__HelloReply *in, struct msg_hello_reply *out)
{
	out->status = read_status(in->status);
	out->version = in->version;
	out->chunk_bytes = in->chunk_bytes;
	out->session = in->session;
	out->admin = in->admin;
	read_limits(in->limits, &out->limits);
	opd_status status = read_text(reader, "message", in->message, BOUND_STR_BYTES, &out->message);
	if (status == OPD_OK)
		status = read_text(reader, "server", in->server, BOUND_STR_BYTES, &out->server);
	if (status == OPD_OK)
		status = read_text(reader, "tenant", in->tenant, BOUND_STR_BYTES, &out->tenant);
	if (status == OPD_OK)
		status = read_texts(reader, "features", in->n_features, in->features, BOUND_FEATURES, BOUND_NAME_BYTES,
		                    &out->feature_count, &out->features);
	if (status == OPD_OK)
		status = read_text(reader, "identity", in->identity, BOUND_STR_BYTES, &out->identity);
	if (status == OPD_OK)
		status = read_texts(reader, "rights", in->n_rights, in->rights, BOUND_FEATURES, BOUND_NAME_BYTES, &out->right_count, &out->rights);
	return status;
}

opd_status codec_decode_hello_reply(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_hello_reply *out,
                                    opd_error *error)
{
	struct reader reader = {arena, error};
	opd_status status;
	Opd__V1__HelloReply *in = codec_unpack(&reader, &opd__v1__hello_reply__descriptor, "HelloReply", envelope, bytes, &status);
	if (in == NULL)
		return status;
	struct msg_hello_reply reply = {0};
	status = read_hello_reply(&reader, in, &reply);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "hello reply");
	*out = reply;
	return OPD_OK;
}

opd_status codec_decode_goaway(struct arena *arena, const uint8_t *envelope, size_t bytes, struct msg_goaway *out,
                               opd_error *error)
{
	struct reader reader = {arena, error};
	opd_status status;
	Opd__V1__Goaway *in = codec_unpack(&reader, &opd__v1__goaway__descriptor, "Goaway", envelope, bytes, &status);
	if (in == NULL)
		return status;
	struct msg_goaway goaway = {.status = read_status(in->status)};
	status = read_text(&reader, "message", in->message, BOUND_STR_BYTES, &goaway.message);
	if (status != OPD_OK)
		return opd_error_prefix(error, status, "goaway");
	*out = goaway;
	return OPD_OK;
}

opd_status codec_encode_hello(struct arena *arena, const struct msg_hello *message, struct codec_buffer *out, opd_error *error)
{
	Opd__V1__Hello pb = OPD__V1__HELLO__INIT;
	pb.version_min = message->version_min;
	pb.version_max = message->version_max;
	pb.client = write_text(message->client);
	pb.chunk_bytes = message->chunk_bytes;
	pb.no_chunks = message->no_chunks;
	pb.token = write_text(message->token);
	/* reattach_bytes is only what a peer sent: there is nothing to re-attach to yet. */
	bool fits = write_texts(arena, message->feature_count, message->features, &pb.n_features, &pb.features);
	return codec_pack(arena, fits ? &pb.base : NULL, "Hello", out, error);
}

opd_status codec_encode_hello_reply(struct arena *arena, const struct msg_hello_reply *message, struct codec_buffer *out,
                                    opd_error *error)
{
	Opd__V1__HelloReply pb = OPD__V1__HELLO_REPLY__INIT;
	Opd__V1__Limits limits = OPD__V1__LIMITS__INIT;
	limits.envelope_bytes = message->limits.envelope_bytes;
	limits.payload_bytes = message->limits.payload_bytes;
	limits.session_bytes = message->limits.session_bytes;
	limits.in_flight = message->limits.in_flight;
	pb.status = (uint32_t)message->status;
	pb.message = write_text(message->message);
	pb.version = message->version;
	pb.server = write_text(message->server);
	pb.chunk_bytes = message->chunk_bytes;
	pb.limits = &limits;
	pb.session = message->session;
	pb.tenant = write_text(message->tenant);
	pb.admin = message->admin;
	pb.identity = write_text(message->identity);
	const bool fits = write_texts(arena, message->feature_count, message->features, &pb.n_features, &pb.features) &&
	                  write_texts(arena, message->right_count, message->rights, &pb.n_rights, &pb.rights);
	return codec_pack(arena, fits ? &pb.base : NULL, "HelloReply", out, error);
}

opd_status codec_encode_goaway(struct arena *arena, const struct msg_goaway *message, struct codec_buffer *out, opd_error *error)
{
	Opd__V1__Goaway pb = OPD__V1__GOAWAY__INIT;
	pb.status = (uint32_t)message->status;
	pb.message = write_text(message->message);
	return codec_pack(arena, &pb.base, "Goaway", out, error);
}

const char *msg_level_name(msg_level level)
{
	switch (level) {
	case MSG_LEVEL_NONE:
		return "none";
	case MSG_LEVEL_NODE:
		return "node";
	case MSG_LEVEL_REQUEST:
		return "request";
	case MSG_LEVEL_SESSION:
		return "session";
	case MSG_LEVEL_SERVER:
		return "server";
	case MSG_LEVEL_CONFIGURATION:
		return "configuration";
	}
	return "unknown";
}
