/* How a parallel loop is cut into shares: the same in a lane's threads (server/lane.h) and in a worker process's (server/worker_loop.h), so that a kernel whose bits depend on its shares has the same bits in both.
 *
 * Layer: server, bottom; arithmetic alone. */
#ifndef OPD_SERVER_SHARES_H
#define OPD_SERVER_SHARES_H

#include <stdint.h>

/* Of a thread: a helper that comes late, or a core that is slower, then costs a sixteenth of a thread's part at most. Sixteen threads of a virtual machine, whose cores differ: relu past the caches takes
 * 4.65 ms with four shares each, 3.87 with sixteen, 3.88 with 64; with four the first is done after 3.4 ms, the last after 4.0. */
#define SHARES_PER_THREAD 16u

/* At least `grain` items each (0 is taken as 1). */
static inline uint32_t shares_count(uint64_t items, uint64_t grain, uint32_t threads)
{
	const uint64_t shares = items / (grain == 0 ? 1 : grain);
	const uint64_t most = (uint64_t)threads * SHARES_PER_THREAD;
	return (uint32_t)(shares < most ? shares : most);
}

/* The first item of a share; of the one after the last: `items`. */
static inline uint64_t shares_begin(uint64_t items, uint32_t shares, uint32_t share)
{
	const uint64_t each = items / shares;
	const uint64_t more = items % shares; /* so many of the first have one item more */
	return each * share + (share < more ? share : more);
}

#endif
