/* Donations of single runs (SEMANTICS 31 to 33): a kept tensor that the request gives away, whose place an output takes.
 *
 * Layer: server. Threads: the session's, but donate_of and donate_in_place.
 * Life: donate_accept (the old handle, or the result still to come, is refused from now on) → donate_arrived for each result that had to come → donate_check (shapes) → donate_output for every output before each attempt → donate_settle when the
 * kernel has succeeded, or donate_failed: undone where nothing can have been written, else the tensor is lost.
 * Written in place only when this request alone reads the tensor: whoever was accepted before it keeps the old value, and the result gets fresh memory.
 * Not here: the states of graphs (server/graph_run.h). */
#ifndef OPD_SERVER_DONATE_H
#define OPD_SERVER_DONATE_H

#include <stdbool.h>

#include "opd/status.h"
#include "proto/message.h"

struct buffer;
struct request;

struct donation {
	uint32_t operand;
	uint32_t result;
	uint64_t lineage;
	struct msg_handle handle; /* from now on; its index is the slot's */
	bool in_place;            /* the output's buffer is the tensor's */
	bool open;                /* neither settled nor undone nor lost */
	bool promised;            /* the operand is a result still to come */
};

/* Once kept operands are taken. INVALID_ARGUMENT or FAILED_PRECONDITION names the operand; nothing was donated then. */
OPD_MUST_USE opd_status donate_accept(struct request *request);
/* An operand that was still to come is there. FAILED_PRECONDITION: it was published meanwhile. */
OPD_MUST_USE opd_status donate_arrived(struct request *request, uint32_t operand);
/* Once operands are placed and results known: dtype and shape must be equal, and the operand the whole tensor. */
OPD_MUST_USE opd_status donate_check(struct request *request);

/* Forgets what an attempt of another implementation was given. */
void donate_again(struct request *request);
/* The tensor's own buffer, referenced, for output `index` of the chosen implementation; NULL: it needs fresh memory. */
struct buffer *donate_output(struct request *request, uint32_t index);
/* For a device, on its lane: the donation of an operand, NULL: it isn't donated; and whether the result may take the place of its bytes where they lie. */
struct donation *donate_of(struct request *request, uint32_t operand);
bool donate_in_place(struct request *request, struct donation *donation);
bool donate_is_in_place(const struct request *request, uint32_t index);
/* A kernel that may have written a donated tensor has begun: no other may try. */
bool donate_is_written(const struct request *request);

/* Its results are the tensors now; handles[output_count] of those are written. False: out of memory. */
bool donate_settle(struct request *request, struct msg_handle *handles);
void donate_failed(struct request *request);

#endif
