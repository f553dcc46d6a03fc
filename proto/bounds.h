/* The limits of the wire, all in one place: what a decoder refuses before it allocates anything.
 *
 * Layer: proto, internal. A daemon's configuration lowers some of them (server/config.h); nothing raises one. */
#ifndef OPD_PROTO_BOUNDS_H
#define OPD_PROTO_BOUNDS_H

#define BOUND_ENVELOPE_BYTES (16u << 20)     /* of any frame after Hello; the configured default is 1 MiB */
#define BOUND_HELLO_BYTES 4096u              /* of the first frame's envelope; it has no payload */
#define BOUND_PAYLOAD_BYTES (1ull << 40)     /* declared by one request or reply */
#define BOUND_CHUNK_BYTES_MIN (64u << 10)
#define BOUND_CHUNK_BYTES_MAX (64u << 20)
#define BOUND_CHUNK_BYTES_DEFAULT (1u << 20)
#define BOUND_NAME_BYTES 128u                /* of an op, provider, parameter or feature */
#define BOUND_STR_BYTES 65536u               /* of a str argument, a path, a message */
#define BOUND_ARGS 256u                      /* of a call */
#define BOUND_LIST 4096u                     /* tensors of a Tensor[], ints of an int[], tensors of a Free */
#define BOUND_PROVIDERS 64u                  /* in a priority list */
#define BOUND_PRIORITY_OPS 1024u             /* entries of a pushed map */
#define BOUND_PRIORITY_DEPTH 64u             /* pushed maps of a session */
#define BOUND_OUTPUTS 64u                    /* results of an op */
#define BOUND_FEATURES 64u
#define BOUND_GRAPH_NODES 65536u             /* of a graph */
#define BOUND_GRAPH_INPUTS 8192u             /* of a graph, constants and states included */
#define BOUND_GRAPH_RUN_INPUTS 64u           /* of them, those given at each run */
#define BOUND_GRAPH_STATES 1024u             /* of them, those that a run donates */
#define BOUND_GRAPHS 1024u                   /* registered by a session */
#define BOUND_RING_BYTES_MIN 4096u           /* of one direction of a session's rings */
#define BOUND_RING_BYTES_MAX (16u << 20)
#define BOUND_GRAPH_EXPLAIN 4096u            /* nodes that an explain record tells of */

#endif
