#include "client/flight.h"

#include <stdlib.h>
#include <string.h>

/* A recycled flight keeps a frame buffer up to this size. */
#define FRAME_KEEP_BYTES 4096u

static void flight_destroy(struct flight *flight)
{
	if (flight->pieces != flight->inline_pieces)
		free(flight->pieces);
	free(flight->detached);
	free(flight->frame);
	free(flight);
}

void flights_fini(struct flights *flights)
{
	while (flights->free != NULL) {
		struct flight *next = flights->free->next_free;
		flight_destroy(flights->free);
		flights->free = next;
	}
	free(flights->slots);
	*flights = (struct flights){0};
}

struct flight *flights_take(struct flights *flights)
{
	struct flight *flight = flights->free;
	if (flight != NULL)
		flights->free = flight->next_free;
	else
		flight = calloc(1, sizeof *flight);
	if (flight == NULL)
		return NULL;
	uint8_t *frame = flight->frame;
	const size_t frame_capacity = flight->frame_capacity;
	memset(flight, 0, sizeof *flight);
	flight->frame = frame;
	flight->frame_capacity = frame_capacity;
	flight->pieces = flight->inline_pieces;
	list_init(&flight->send);
	list_init(&flight->done);
	return flight;
}

void flight_settle(struct flights *flights, struct flight *flight)
{
	if (flight->in_table || flight->batched != 0 || flight->state != FLIGHT_SENT)
		return;
	if (flight->pieces != flight->inline_pieces)
		free(flight->pieces);
	flight->pieces = flight->inline_pieces;
	free(flight->detached);
	flight->detached = NULL;
	if (flight->frame_capacity > FRAME_KEEP_BYTES) {
		free(flight->frame);
		flight->frame = NULL;
		flight->frame_capacity = 0;
	}
	flight->next_free = flights->free;
	flights->free = flight;
}

bool flight_reserve(struct flight *flight, size_t frame_bytes, size_t piece_count)
{
	if (frame_bytes > flight->frame_capacity) {
		const size_t capacity = frame_bytes < 256 ? 256 : frame_bytes;
		uint8_t *frame = realloc(flight->frame, capacity);
		if (frame == NULL)
			return false;
		flight->frame = frame;
		flight->frame_capacity = capacity;
	}
	if (piece_count > FLIGHT_PIECES) {
		flight->pieces = calloc(piece_count, sizeof *flight->pieces);
		if (flight->pieces == NULL) {
			flight->pieces = flight->inline_pieces;
			return false;
		}
	}
	return true;
}

void flight_drop_reply(struct flight *flight, struct pool *pool)
{
	opd_result_destroy(flight->result);
	flight->result = NULL;
	pool_give_block(pool, flight->block);
	flight->block = NULL;
}

/* ---- Table ---- */

static size_t slot_of(const struct flights *flights, uint64_t id)
{
	return (size_t)((id * 0x9e3779b97f4a7c15u) >> flights->shift);
}

static void slot_insert(struct flights *flights, struct flight *flight)
{
	size_t slot = slot_of(flights, flight->id);
	while (flights->slots[slot] != NULL)
		slot = (slot + 1) & (flights->capacity - 1);
	flights->slots[slot] = flight;
}

static bool flights_grow(struct flights *flights)
{
	const size_t capacity = flights->capacity == 0 ? 128 : flights->capacity * 2;
	struct flight **slots = calloc(capacity, sizeof *slots);
	if (slots == NULL)
		return false;
	struct flights old = *flights;
	flights->slots = slots;
	flights->capacity = capacity;
	flights->shift = 64u - (unsigned)__builtin_ctzll(capacity);
	for (size_t i = 0; i < old.capacity; i++)
		if (old.slots[i] != NULL)
			slot_insert(flights, old.slots[i]);
	free(old.slots);
	return true;
}

bool flights_add(struct flights *flights, struct flight *flight)
{
	if (flights->count * 2 >= flights->capacity && !flights_grow(flights))
		return false;
	slot_insert(flights, flight);
	flights->count++;
	flight->in_table = true;
	return true;
}

struct flight *flights_find(const struct flights *flights, uint64_t id)
{
	if (flights->capacity == 0)
		return NULL;
	for (size_t slot = slot_of(flights, id); flights->slots[slot] != NULL; slot = (slot + 1) & (flights->capacity - 1))
		if (flights->slots[slot]->id == id)
			return flights->slots[slot];
	return NULL;
}

/* Closes the gap behind a removed entry, so that no probe ends early: an entry moves back unless that put it before its own slot.
 */
static void slot_close(struct flights *flights, size_t gap)
{
	const size_t mask = flights->capacity - 1;
	for (size_t slot = (gap + 1) & mask; flights->slots[slot] != NULL; slot = (slot + 1) & mask) {
		const size_t home = slot_of(flights, flights->slots[slot]->id);
		if (((slot - home) & mask) < ((slot - gap) & mask))
			continue;
		flights->slots[gap] = flights->slots[slot];
		flights->slots[slot] = NULL;
		gap = slot;
	}
}

void flights_remove(struct flights *flights, struct flight *flight)
{
	if (!flight->in_table)
		return;
	flight->in_table = false;
	size_t slot = slot_of(flights, flight->id);
	while (flights->slots[slot] != flight)
		slot = (slot + 1) & (flights->capacity - 1);
	flights->slots[slot] = NULL;
	flights->count--;
	slot_close(flights, slot);
}
