/* Gives memory back to the system that may be much, on a thread of its own: how large a client's file is, whose last mapping or descriptor ends here, is the client's to decide, and the system frees all of its pages
 * before it returns (a tenth of a second to a second a GiB).
 *
 * Layer: server, bottom. Threads: any; one table for the process. The thread is there while there is something to give back.
 * Unlike a close (server/closer.h) none of it waits for anybody, so that one thread does for all. Where there is no memory for the note or no thread, the caller does it.
 * Not here: memory that the ledger still counts (tensors.c): whoever needs that must find it given back. */
#ifndef OPD_SERVER_REAPER_H
#define OPD_SERVER_REAPER_H

#include <stdint.h>

/* A mapping of a file. Takes it: nobody uses it any more, and it isn't locked (server/pins.h). */
void reaper_unmap(void *data, uint64_t bytes);
/* Takes the descriptor of a memory file; a small one is closed at once. */
void reaper_close(int fd);

#endif
