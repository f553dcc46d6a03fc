/* What `opctl top` shows: what sessions and lanes have had between two looks at the daemon.
 *
 * Layer: client/opctl. Threads: one.
 * Life: picture_take → picture_compare with the one before → picture_free. Zeroed memory is a picture of nothing.
 * Not here: how it is drawn (cmd_top.c). */
#ifndef OPCTL_PICTURE_H
#define OPCTL_PICTURE_H

#include "client/opctl/opctl.h"

/* What is sorted by: X(id, key, name) */
#define PICTURE_ORDERS(X)                                                                                                        \
	X(SHARE, 's', "share")                                                                                                       \
	X(JOBS, 'j', "jobs")                                                                                                         \
	X(WAIT, 'w', "wait")                                                                                                         \
	X(QUEUED, 'u', "queued")                                                                                                     \
	X(MEMORY, 'm', "memory")                                                                                                     \
	X(ID, 'i', "id")

typedef enum picture_order {
#define X(id, key, name) ORDER_##id,
	PICTURE_ORDERS(X)
#undef X
	    ORDER_COUNT,
} picture_order;

extern const char *const picture_order_names[ORDER_COUNT];
extern const char picture_order_keys[ORDER_COUNT];

struct picture_line {
	const opd_session_state *session;
	double share;     /* of all device time used since the picture before, 0 to 1 */
	double jobs;      /* a second */
	double wait_ns;   /* mean of those jobs; 0 where there were none */
	bool worked;      /* there were some */
};

struct picture {
	uint32_t page_count; /* the daemon tells its sessions in pages */
	const opd_sharing **pages;
	uint32_t count;
	struct picture_line *lines; /* in the order of sessions' numbers until picture_sort */
	uint32_t lane_count;
	double *lane_use; /* of each lane of the first page: parts of its threads' time, 0 to 1 */
	double span_s;
};

/* All that the daemon shows. */
OPD_MUST_USE opd_status picture_take(opd_client *client, struct picture *picture, opd_error *error);
void picture_free(struct picture *picture);

/* Fills in what was used since `before`. Neither is sorted yet. */
void picture_compare(const struct picture *before, struct picture *now);
/* Most first, by number where they are equal; ORDER_ID: oldest first. */
void picture_sort(struct picture *picture, picture_order order, bool reversed);
/* INVALID_ARGUMENT names those there are. */
OPD_MUST_USE opd_status picture_order_parse(const char *name, picture_order *order_out, opd_error *error);

#endif
