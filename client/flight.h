/* A request in flight: what is still to be sent of it, what has come back, and the table that finds it by its id.
 *
 * Layer: client, internal. Threads: its client's.
 * Life: flights_add → writer and reader work on it → flights_remove when its result was taken (or its reply dropped) → back to
 * the free list as soon as the writer doesn't need its memory any more (flight_settle). */
#ifndef OPD_CLIENT_FLIGHT_H
#define OPD_CLIENT_FLIGHT_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "client/list.h"
#include "client/pool.h"
#include "client/result.h"
#include "opd/client.h"
#include "proto/frame.h"
#include "proto/message.h"

#define FLIGHT_PIECES 8u

typedef enum flight_state {
	FLIGHT_QUEUED = 0, /* its REQUEST frame waits, for the socket or for room under the server's limit */
	FLIGHT_DATA,       /* the REQUEST frame is out, DATA frames remain */
	FLIGHT_ABORT,      /* answered early: an ABORT frame waits instead of the remaining DATA */
	FLIGHT_CANCEL,     /* sent, and nobody wants the reply: a CANCEL frame waits */
	FLIGHT_SENT,       /* nothing to be put into a batch any more */
} flight_state;

struct flight {
	uint64_t id;
	struct list send; /* in one of the writer's lists */
	struct list done; /* in the client's list of finished ones */
	struct flight *next_free;

	flight_state state;
	bool in_table;
	bool counted;     /* the server counts it: sent and not answered */
	bool answered;    /* the whole reply is here */
	bool forgotten;   /* cancelled: the reply is to be dropped */
	uint32_t batched; /* entries of the writer's batch that point to its memory or the caller's */
	msg_reply_kind expected;

	/* Sending. The payload's pieces lie in the caller's memory until `detached` has what is left of them. */
	uint8_t *frame; /* header, envelope, and a small payload */
	size_t frame_bytes;
	size_t frame_capacity;
	uint8_t data_header[FRAME_HEADER_BYTES + FRAME_DATA_OFFSET_BYTES]; /* of the DATA, ABORT or CANCEL frame in the batch */
	uint64_t data_batch;                                               /* the last batch that has a DATA frame of it */
	bool chunked;
	struct iovec inline_pieces[FLIGHT_PIECES];
	struct iovec *pieces;
	size_t piece_count;
	size_t piece_index; /* of DATA frames: the next byte to be sent */
	size_t piece_offset;
	uint64_t payload_bytes; /* in pieces */
	uint64_t payload_sent;
	void *detached;

	/* Receiving. */
	opd_result *result; /* NULL: no reply yet, or it is being dropped */
	struct block *block;
	bool receiving; /* DATA frames of the reply are due */
	uint64_t reply_bytes;
	uint64_t reply_received;
};

/* Open addressing with linear probing. Ids rise by one, which the golden ratio spreads evenly: taken by their low bits they would
 * form one long run, and removing one would walk it (5 % of the time at 64 in flight). */
struct flights {
	struct flight **slots;
	size_t capacity; /* a power of two, or 0 */
	unsigned shift;  /* 64 - log2(capacity) */
	size_t count;
	struct flight *free;
};

void flights_fini(struct flights *flights);

/* A zeroed flight (its frame buffer is kept from an earlier one) that is in no list and not in the table. NULL: out of memory. */
struct flight *flights_take(struct flights *flights);

/* False: out of memory. */
bool flights_add(struct flights *flights, struct flight *flight);
struct flight *flights_find(const struct flights *flights, uint64_t id);
void flights_remove(struct flights *flights, struct flight *flight);

/* Gives the flight back if neither table nor writer hold it. */
void flight_settle(struct flights *flights, struct flight *flight);

/* Room for a frame and for `count` pieces. False: out of memory. */
bool flight_reserve(struct flight *flight, size_t frame_bytes, size_t piece_count);

/* Drops what has been received. */
void flight_drop_reply(struct flight *flight, struct pool *pool);

#endif
