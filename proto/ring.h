/* Rings: two streams of bytes in memory that client and server both map, one a direction. They carry what the socket would.
 *
 * Layer: proto, internal. Threads: one end each, by one thread; the other end is another process, or another thread. README.md ("Rings") has the layout.
 * Life: the memory is there, zeroed → ring_reader_init, ring_writer_init on each side → bytes → nothing to undo.
 * The other side may write anything into the shared memory at any time: an end keeps its own index to itself, reads the other's once, and says RING_BROKEN where the two
 * can't be. What is in the memory is copied out before anybody looks at it.
 * Sleeping: each side has a word that says what it waits for. Who sleeps sets it and then looks at the indices again; who moves an index then looks at the word. Both are
 * sequentially consistent, so one of the two sees the other: no wake-up is lost. (Atomic operations and no fences: ThreadSanitizer doesn't know those.)
 * Not here: descriptors, mapping, waiting (server/ring.h, client/ring.h). */
#ifndef OPD_PROTO_RING_H
#define OPD_PROTO_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "opd/status.h"

#define RING_HEADER_BYTES 4096u
#define RING_BROKEN UINT64_MAX

/* What lies at the memory's beginning, each word in a cache line of its own. Then the ring of requests, then that of replies. */
struct ring_header {
	_Alignas(64) _Atomic uint64_t request_head; /* bytes ever written: the client's */
	_Alignas(64) _Atomic uint64_t request_tail; /* bytes ever read: the server's */
	_Alignas(64) _Atomic uint64_t reply_head;   /* the server's */
	_Alignas(64) _Atomic uint64_t reply_tail;   /* the client's */
	_Alignas(64) _Atomic uint32_t server_waits; /* set by the server, cleared by the client that wakes it */
	_Alignas(64) _Atomic uint32_t client_waits;
};
_Static_assert(offsetof(struct ring_header, reply_tail) == 192 && offsetof(struct ring_header, client_waits) == 320, "README.md has these offsets");
_Static_assert(sizeof(struct ring_header) <= RING_HEADER_BYTES, "the rings begin behind it");

enum {
	RING_WAITS_BYTES = 1u << 0, /* for something to read */
	RING_WAITS_ROOM = 1u << 1,  /* for room to write into */
};

struct ring_reader {
	_Atomic uint64_t *head;
	_Atomic uint64_t *tail;
	const uint8_t *data;
	uint64_t bytes;    /* a power of two */
	uint64_t at;       /* read so far */
	uint64_t released; /* … and given back */
};

struct ring_writer {
	_Atomic uint64_t *head;
	_Atomic uint64_t *tail;
	uint8_t *data;
	uint64_t bytes;
	uint64_t at; /* written so far */
};

/* A ring's size: a power of two within the bounds. */
bool ring_bytes_valid(uint64_t bytes);
/* Of the whole memory; both sizes are valid. */
uint64_t ring_memory_bytes(uint64_t request_bytes, uint64_t reply_bytes);

void ring_reader_init(struct ring_reader *reader, _Atomic uint64_t *head, _Atomic uint64_t *tail, const uint8_t *data, uint64_t bytes);
void ring_writer_init(struct ring_writer *writer, _Atomic uint64_t *head, _Atomic uint64_t *tail, uint8_t *data, uint64_t bytes);

/* Bytes that may be read now; RING_BROKEN: the head can't be where it is. */
uint64_t ring_filled(const struct ring_reader *reader);
/* Copies `bytes` out, at most what ring_filled said. */
void ring_read(struct ring_reader *reader, void *to, uint64_t bytes);
/* Gives what was read back to the writer. True: it waits for that, and is to be woken. */
OPD_MUST_USE bool ring_release(struct ring_reader *reader, _Atomic uint32_t *writer_waits);

/* Bytes that may be written now; RING_BROKEN: the tail can't be where it is. */
uint64_t ring_room(const struct ring_writer *writer);
/* Copies `bytes` in, at most what ring_room said; the reader doesn't see them yet. */
void ring_write(struct ring_writer *writer, const void *from, uint64_t bytes);
/* Shows the reader what was written. True: it waits for that, and is to be woken. */
OPD_MUST_USE bool ring_publish(struct ring_writer *writer, _Atomic uint32_t *reader_waits);

/* Says what this side is about to wait for; look at the indices again before sleeping. 0: it is awake. */
void ring_wait(_Atomic uint32_t *waits, uint32_t reasons);

/* Who polls keeps its core to itself for so long, and yields it between two looks after that. */
#define RING_PAUSE_NS 5000u

/* A breath of a loop that looks at an index. */
static inline void ring_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

#endif
