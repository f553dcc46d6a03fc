/* Which bytes of a tensor are there while it is uploaded in parts: ranges in any order, repeated where a client sends one again.
 *
 * Layer: server. Threads: the session's.
 * Life: parts_create → parts_add… → complete → parts_destroy. */
#ifndef OPD_SERVER_PARTS_H
#define OPD_SERVER_PARTS_H

#include <stdbool.h>
#include <stdint.h>

#include "opd/status.h"

#define PARTS_MAX 1024u /* separate ranges: a client that leaves more gaps than that must fill some */

struct part {
	uint64_t begin;
	uint64_t end;
};

struct parts {
	uint64_t received_bytes;
	uint32_t writing; /* copies under way: complete only without them */
	uint32_t count;
	uint32_t room;
	struct part *ranges; /* ascending, apart */
};

/* NULL: out of memory. */
struct parts *parts_create(void);
void parts_destroy(struct parts *parts);

/* Bytes [begin, end) are there, begin < end. RESOURCE_EXHAUSTED: too many gaps, or out of memory; they don't count then. */
OPD_MUST_USE opd_status parts_add(struct parts *parts, uint64_t begin, uint64_t end, opd_error *error);

#endif
