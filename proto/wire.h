/* protobuf's wire format, a field at a time: what the hand-written envelopes (proto/plain.h) are read and written with.
 *
 * Layer: proto, internal. Threads: pure.
 * A reader takes what every protobuf library writes, and any longer varint; it says no (without a reason) to the rest: protobuf-c then decides what that is.
 * A pen writes backwards, from the last field to the first: a message's length is known when it is put in front of it. */
#ifndef OPD_PROTO_WIRE_H
#define OPD_PROTO_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "proto/frame.h"

/* A field's number and how it lies there, as on the wire. */
#define WIRE_VARINT(number) ((number) << 3)
#define WIRE_FIXED64(number) ((number) << 3 | 1u)
#define WIRE_BYTES(number) ((number) << 3 | 2u)

/* ---- Reading ---- */

struct wire {
	const uint8_t *at;
	const uint8_t *end;
};

struct wire_field {
	uint32_t tag;       /* WIRE_…(number) */
	uint64_t value;     /* of WIRE_VARINT and WIRE_FIXED64 */
	struct wire bytes;  /* of WIRE_BYTES */
};

/* The rest of wire_varint, for more than one byte. */
static inline bool wire_long_varint(struct wire *in, uint64_t *out)
{
	const uint8_t *at = in->at;
	uint64_t value = 0;
	for (unsigned shift = 0; shift < 64 && at != in->end; shift += 7) {
		const uint8_t byte = *at++;
		if (shift == 63 && byte > 1)
			return false;
		value |= (uint64_t)(byte & 0x7fu) << shift;
		if (byte < 0x80) {
			in->at = at;
			*out = value;
			return true;
		}
	}
	return false;
}

/* Up to ten bytes. False: cut short, or more than 64 bits: protobuf-c takes the latter for some types and cuts them off. */
static inline bool wire_varint(struct wire *in, uint64_t *out)
{
	if (in->at == in->end || *in->at >= 0x80)
		return wire_long_varint(in, out);
	*out = *in->at++;
	return true;
}

/* Tags of one and two bytes: all fields of ours. (protobuf-c stops at five, as it does for lengths.) */
static inline bool wire_tag(struct wire *in, uint32_t *out)
{
	const uint32_t first = *in->at++;
	*out = first;
	if (first < 0x80)
		return true;
	if (in->at == in->end || *in->at >= 0x80)
		return false;
	*out = (first & 0x7f) | (uint32_t)*in->at++ << 7;
	return true;
}

static inline bool wire_bytes(struct wire *in, struct wire *out)
{
	const uint8_t *start = in->at;
	uint64_t bytes;
	if (!wire_varint(in, &bytes) || in->at - start > 5 || bytes > (uint64_t)(in->end - in->at))
		return false;
	*out = (struct wire){in->at, in->at + bytes};
	in->at += bytes;
	return true;
}

/* The next field; `in` isn't at its end. False also for groups and 32-bit fields, which no message of ours has. Always inlined: a dozen fields make a request, and a call
 * for each was a twentieth of its instructions. */
static inline __attribute__((always_inline)) bool wire_next(struct wire *in, struct wire_field *out)
{
	*out = (struct wire_field){0}; /* compilers don't see that a tag tells which of them are there */
	if (!wire_tag(in, &out->tag))
		return false;
	switch (out->tag & 7) {
	case 0:
		return wire_varint(in, &out->value);
	case 1:
		if (in->end - in->at < 8)
			return false;
		out->value = frame_load_u64(in->at);
		in->at += 8;
		return true;
	case 2:
		return wire_bytes(in, &out->bytes);
	default:
		return false;
	}
}

/* ---- Writing ---- */

/* What is written lies from `at` on; what is before `start` isn't ours. */
struct pen {
	uint8_t *start;
	uint8_t *at;
	bool full; /* there was no room for all of it: nothing of it is of use */
};

/* Room for `bytes` in front of what is there; NULL: full. */
static inline uint8_t *pen_take(struct pen *pen, size_t bytes)
{
	if (bytes > (size_t)(pen->at - pen->start)) {
		pen->full = true;
		return NULL;
	}
	pen->at -= bytes;
	return pen->at;
}

/* The rest of pen_varint, for more than one byte. */
static inline void pen_long_varint(struct pen *pen, uint64_t value)
{
	size_t bytes = 1;
	for (uint64_t rest = value >> 7; rest != 0; rest >>= 7)
		bytes++;
	uint8_t *to = pen_take(pen, bytes);
	if (to == NULL)
		return;
	for (; value >= 0x80; value >>= 7)
		*to++ = (uint8_t)(value | 0x80);
	*to = (uint8_t)value;
}

static inline void pen_varint(struct pen *pen, uint64_t value)
{
	if (value >= 0x80 || pen->at == pen->start)
		pen_long_varint(pen, value);
	else
		*--pen->at = (uint8_t)value;
}

static inline void pen_fixed64(struct pen *pen, uint32_t number, uint64_t value)
{
	uint8_t *to = pen_take(pen, 8);
	if (to != NULL)
		frame_store_u64(to, value);
	pen_varint(pen, WIRE_FIXED64(number));
}

/* A scalar that is 0 isn't written, but as a oneof's member. */
static inline void pen_member(struct pen *pen, uint32_t number, uint64_t value)
{
	pen_varint(pen, value);
	pen_varint(pen, WIRE_VARINT(number));
}

static inline void pen_number(struct pen *pen, uint32_t number, uint64_t value)
{
	if (value != 0)
		pen_member(pen, number, value);
}

/* An enum's or an int32's value: a negative one takes ten bytes. */
static inline void pen_enum(struct pen *pen, uint32_t number, int value)
{
	pen_number(pen, number, (uint64_t)(int64_t)value);
}

static inline void pen_bytes(struct pen *pen, uint32_t number, const void *data, size_t bytes)
{
	uint8_t *to = pen_take(pen, bytes);
	if (to != NULL && bytes != 0)
		memcpy(to, data, bytes);
	pen_varint(pen, bytes);
	pen_varint(pen, WIRE_BYTES(number));
}

/* Ends a message (or a packed array) that was written since the pen was at `end`. */
static inline void pen_close(struct pen *pen, uint32_t number, const uint8_t *end)
{
	pen_varint(pen, (uint64_t)(end - pen->at));
	pen_varint(pen, WIRE_BYTES(number));
}

#endif
