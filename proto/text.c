#include "proto/text.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "proto/bounds.h"

/* Decodes one code point; returns its length, or 0 where the bytes are no UTF-8. `bytes` is at least 1. */
static size_t utf8_decode(const unsigned char *text, size_t bytes, uint32_t *point_out)
{
	static const uint32_t lowest[5] = {0, 0, 0x80, 0x800, 0x10000};
	unsigned char first = text[0];
	if (first < 0x80) {
		*point_out = first;
		return 1;
	}
	size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
	if (first < 0xc2 || first > 0xf4 || length > bytes)
		return 0;
	uint32_t point = first & (0x7fu >> length);
	for (size_t i = 1; i < length; i++) {
		if ((text[i] & 0xc0) != 0x80)
			return 0;
		point = point << 6 | (text[i] & 0x3fu);
	}
	if (point < lowest[length] || point > 0x10ffff || (point >= 0xd800 && point <= 0xdfff))
		return 0;
	*point_out = point;
	return length;
}

/* Unicode's format characters (category Cf), line and paragraph separators, tags and noncharacters: invisible, or they reorder
 * what stands around them. */
static bool point_hidden(uint32_t point)
{
	static const struct {
		uint32_t first;
		uint32_t last;
	} hidden[] = {
	    {0x0000, 0x001f},   {0x007f, 0x009f},   {0x00ad, 0x00ad},   {0x0600, 0x0605},   {0x061c, 0x061c},    {0x06dd, 0x06dd},
	    {0x070f, 0x070f},   {0x0890, 0x0891},   {0x08e2, 0x08e2},   {0x180e, 0x180e},   {0x200b, 0x200f},    {0x2028, 0x202e},
	    {0x2060, 0x206f},   {0xfdd0, 0xfdef},   {0xfeff, 0xfeff},   {0xfff0, 0xfffb},   {0xfffe, 0xffff},    {0x110bd, 0x110bd},
	    {0x110cd, 0x110cd}, {0x13430, 0x1343f}, {0x1bca0, 0x1bca3}, {0x1d173, 0x1d17a}, {0xe0000, 0x10ffff},
	};
	for (size_t i = 0; i < sizeof hidden / sizeof hidden[0]; i++)
		if (point <= hidden[i].last)
			return point >= hidden[i].first;
	return false;
}

/* How the text at `text` is shown: writes up to 10 bytes and a NUL into piece, returns how many bytes of the text that covers. */
static size_t escape_one(const unsigned char *text, size_t bytes, char piece[16])
{
	uint32_t point = 0;
	size_t length = utf8_decode(text, bytes, &point);
	if (length == 0) {
		(void)snprintf(piece, 16, "\\x%02x", text[0]);
		return 1;
	}
	if (!point_hidden(point)) {
		memcpy(piece, text, length);
		piece[length] = '\0';
	} else if (point == '\n' || point == '\t') {
		(void)snprintf(piece, 16, "\\%c", point == '\n' ? 'n' : 't');
	} else if (point < 0x80) {
		(void)snprintf(piece, 16, "\\x%02x", (unsigned)point);
	} else {
		(void)snprintf(piece, 16, "\\u{%04x}", (unsigned)point);
	}
	return length;
}

const char *text_escape(const char *text, size_t bytes, char *out, size_t out_bytes)
{
	static const char ellipsis[] = "…";
	const unsigned char *from = (const unsigned char *)text;
	size_t written = 0;
	size_t cut = 0; /* the last end of a piece after which the ellipsis still fits */
	for (size_t i = 0; i < bytes;) {
		char piece[16];
		i += escape_one(from + i, bytes - i, piece);
		size_t length = strlen(piece);
		if (written + length + 1 > out_bytes) {
			memcpy(out + cut, ellipsis, sizeof ellipsis);
			return out;
		}
		memcpy(out + written, piece, length);
		written += length;
		if (written + sizeof ellipsis <= out_bytes)
			cut = written;
	}
	out[written] = '\0';
	return out;
}

bool text_valid(const char *text, size_t bytes)
{
	const unsigned char *from = (const unsigned char *)text;
	for (size_t i = 0; i < bytes;) {
		if (from[i] - 1u < 0x7f) {
			i++;
			continue;
		}
		uint32_t point = 0;
		size_t length = utf8_decode(from + i, bytes - i, &point);
		if (length == 0 || point == 0)
			return false;
		i += length;
	}
	return true;
}

bool text_is_name(const char *text, size_t bytes)
{
	if (bytes == 0 || bytes > BOUND_NAME_BYTES)
		return false;
	for (size_t i = 0; i < bytes; i++) {
		bool letter = (text[i] >= 'a' && text[i] <= 'z') || text[i] == '_';
		bool digit = text[i] >= '0' && text[i] <= '9';
		if (!letter && !(digit && i > 0))
			return false;
	}
	return true;
}
