/* What a connection has to write: whole frames in an order in which small replies overtake bulk ones, sent from where their bytes lie.
 *
 * Layer: server. Threads: the connection's loop. Knows nothing of sockets: outbox_gather says what to write next, outbox_consume what was written.
 * A reply over the chunk size goes as one REPLY frame and DATA frames, which take turns with everything else. */
#ifndef OPD_SERVER_OUTBOX_H
#define OPD_SERVER_OUTBOX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <uv.h>

#include "proto/frame.h"

struct segment;

/* One message to send; embedded in its owner, which gets it back through `written`. */
struct out {
	struct out *next;
	void (*written)(struct out *out); /* all of it was written, or it was dropped */
	const uint8_t *head; /* of the frame under way */
	size_t head_bytes;
	uint64_t frame_left; /* payload bytes of the frame under way */
	uint64_t sent;       /* payload bytes of frames before, and of this one */
	uint64_t payload_bytes;
	uint64_t chunk_bytes; /* 0: the payload follows the envelope */
	uint64_t request_id;
	const struct segment *segment; /* where `sent` is */
	uint64_t segment_at;
	uint8_t data_head[FRAME_HEADER_BYTES + FRAME_DATA_OFFSET_BYTES];
};

struct out_list {
	struct out *first;
	struct out *last;
};

struct outbox {
	struct out_list wire;  /* frames whose order is settled; the first may be half written */
	struct out_list small; /* whole messages */
	struct out_list bulk;  /* messages with DATA frames to come */
	uint64_t wire_bytes;
	uint32_t begun_bytes; /* of the next frame, which isn't here yet, so many have left */
};

/* frame: FRAME_HEADER_BYTES and the envelope; the header is written here. segments hold payload_bytes. Kept until `written`. */
void outbox_add(struct outbox *box, struct out *out, frame_type type, uint64_t request_id, uint8_t *frame, size_t envelope_bytes,
                const struct segment *segments, uint64_t payload_bytes, uint64_t chunk_bytes);

bool outbox_empty(const struct outbox *box);

/* Of FRAME_BEGIN_BYTES, which are the same whatever comes next, so many have left ahead of it: what is added next goes on behind them. The box is empty. */
void outbox_begin(struct outbox *box, uint32_t bytes);

/* Fills bufs[max] with what comes next, at most `bytes` in all (32 KiB more where that ends a frame); returns how many, and their size in *bytes_out. */
unsigned outbox_gather(struct outbox *box, uv_buf_t *bufs, unsigned max, uint64_t bytes, uint64_t *bytes_out);
/* The first `bytes` of what was gathered were written. Calls `written`. */
void outbox_consume(struct outbox *box, uint64_t bytes);
/* Drops everything. Calls `written`. */
void outbox_drop(struct outbox *box);

#endif
