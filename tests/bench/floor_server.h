/* The server side of the floor (floor.h has the protocol): one libuv loop.
 *
 * Layer: bench, internal to the floor. Threads: none but the caller's.
 * Not here: forking and clients (floor.c). */
#ifndef OPD_BENCH_FLOOR_SERVER_H
#define OPD_BENCH_FLOOR_SERVER_H

/* Serves two listening sockets until the process is killed. */
_Noreturn void floor_serve(int unix_listener, int tcp_listener);

#endif
