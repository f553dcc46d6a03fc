/* What the readers of plain envelopes share.
 *
 * Layer: proto, below plain.h. Threads: any. All of them are false for whatever isn't plain: the envelope is then read by protobuf-c, which says what is wrong with it.
 * Not here: what plain means (plain.h), fields and varints (wire.h). */
#ifndef OPD_PROTO_PLAIN_INTERNAL_H
#define OPD_PROTO_PLAIN_INTERNAL_H

#include "proto/plain.h"
#include "proto/wire.h"

/* Fields that are counted by their numbers; RunReply has the most that repeat. */
#define PLAIN_NUMBERS 16u

/* How often each field of a message is there. */
bool plain_count_fields(struct wire in, uint32_t counts[PLAIN_NUMBERS]);
/* Copied to the arena: valid UTF-8 of at most `bound` bytes. */
bool plain_read_text(struct arena *arena, struct wire in, size_t bound, struct msg_text *out);
bool plain_new_texts(struct arena *arena, uint32_t count, uint32_t count_bound, struct msg_text **out);
/* Numbers 1, 2, … of a message that has only varints; those that aren't there are left. */
bool plain_read_numbers(struct wire in, uint32_t count, uint64_t *const out[]);
bool plain_read_handle(struct wire in, struct msg_handle *out);
/* `out` is zeroed. */
bool plain_read_tensor(struct arena *arena, struct wire in, struct msg_tensor *out);

#endif
