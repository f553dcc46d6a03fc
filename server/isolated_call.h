/* A call as it lies in the memory that the daemon shares with a worker process, and the messages between them.
 *
 * Layer: server; both sides of server/isolated.h. Threads: the one that has the worker.
 * Operands whose contents stay may lie elsewhere: in a mapping that the worker has of a constant (server/isolated_constant.h), in a slot that KEEP has filled.
 * The memory is one memfd, sealed against shrinking. The daemon writes a call there (struct packed_call at its start, then arguments, operands' bytes, scratch, room for results), and sends PLAN or RUN;
 * the worker answers DONE. Of that memory the daemon reads results alone, from places that it has computed itself: the worker may have written anywhere.
 * Messages are packets of a socket pair: a fixed head and up to four texts. */
#ifndef OPD_SERVER_ISOLATED_CALL_H
#define OPD_SERVER_ISOLATED_CALL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "proto/arena.h"
#include "providers/provider.h"

struct constant;

/* ---- Calls ---- */

#define PACKED_CANARY_BYTES 64u
#define PACKED_CANARY 0xa5

struct packed_call {
	_Atomic uint32_t cancelled; /* nobody wants the result any more */
	uint32_t impl;
	uint32_t flags;
	uint32_t arg_count;
	uint32_t output_count;
	uint32_t reserved;
	uint64_t plan; /* the daemon's number of it */
	uint64_t args_at;
	uint64_t outputs_at; /* packed_tensor[output_count] */
	uint64_t scratch_at;
	uint64_t scratch_bytes;
};

#define PACKED_CONSTANTS 8u     /* of one call */
#define PACKED_SLOTS 1024u

/* An operand that isn't copied. */
struct packed_constant {
	const opd_tensor *tensor;
	struct constant *constant;
	uint32_t slot; /* once there is a worker */
};

/* How to lay a call out. */
struct packing {
	const opd_call *call;
	uint32_t impl;
	uint64_t plan;
	bool contents;          /* operands' bytes, scratch and results have room; else the call is described */
	uint64_t scratch_bytes;
	uint32_t constant_count;
	struct packed_constant constants[PACKED_CONSTANTS];
	/* out */
	uint64_t bytes;         /* of all */
	uint64_t scratch_at;
	uint64_t results_at;    /* of the first result's bytes; packing_result has each */
};

/* How much memory it takes. False: more than can be addressed. */
OPD_MUST_USE bool packing_measure(struct packing *packing);
/* Writes it to `base`, 64-byte aligned, packing->bytes long, and canaries behind scratch and results. */
void packing_write(struct packing *packing, unsigned char *base);
/* Bytes of an operand from its element 0 on; 0: none, or more than can be said. */
uint64_t packed_operand_bytes(const opd_tensor *tensor);
/* Offset and bytes of a result. */
uint64_t packing_result(const struct packing *packing, uint32_t index, uint64_t *bytes_out);

/* The worker's side: the call as kernels see it, in the arena, its data in the memory and in the slots. NULL: out of memory. */
const opd_call *packed_read(const struct packed_call *packed, unsigned char *base, unsigned char *const slots[PACKED_SLOTS], struct arena *arena);

/* ---- Messages ---- */

typedef enum isolated_kind {
	ISOLATED_MODULE = 1, /* to the daemon: name, version, what it isn't confined by */
	ISOLATED_IMPL,       /* one that was registered: number, flags; op, schema, uuid, why it is unsupported */
	ISOLATED_OPENED,     /* status; text: the module's open has returned */
	ISOLATED_LOG,        /* number: level; text */
	ISOLATED_DONE,       /* status, number: reason's code, bytes: scratch; error's text, reason's detail */
	ISOLATED_MAP,        /* to the worker: bytes, with the descriptor; 0: lets the memory go */
	ISOLATED_KEEP,       /* to the worker: number: slot, bytes, with the descriptor of what it is to map there instead of what is there */
	ISOLATED_FORGET,     /* to the worker: lets go of what is in `slots` */
	ISOLATED_HELPERS, /* to the worker: with the descriptor of the socket over which its loops get help */
	ISOLATED_PLAN,
	ISOLATED_RUN,     /* number: threads that the kernel's loops may have */
	ISOLATED_SPLIT,   /* to the daemon: a loop is open, and worth help; number: the loop's */
	ISOLATED_END,
} isolated_kind;

#define ISOLATED_TEXTS 4u
#define ISOLATED_TEXT_BYTES 8192u

struct isolated_message {
	uint32_t kind;
	int32_t status;
	uint32_t number;
	uint32_t flags;
	uint64_t bytes;
	uint64_t slots[PACKED_SLOTS / 64]; /* a bit each */
	uint32_t text_count;
	uint32_t text_bytes;
	char text[ISOLATED_TEXT_BYTES]; /* one after the other, each with its NUL */
};

void isolated_put(struct isolated_message *message, const char *text); /* cut where there is no room */
/* The index-th text, "" where there is none. */
const char *isolated_text(const struct isolated_message *message, uint32_t index);
/* fd: passed along, -1: none. False: the other side is gone, or, where the socket doesn't wait, its queue is full (EAGAIN) or the system has no room. */
OPD_MUST_USE bool isolated_send(int socket, const struct isolated_message *message, int fd);
/* Waits for one. A packet that is no message is one of kind 0. fd_out: NULL, or where a descriptor goes (-1: none came). False: the other side is gone. */
OPD_MUST_USE bool isolated_receive(int socket, struct isolated_message *message, int *fd_out);

#endif
