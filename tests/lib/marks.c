/* What libcheck writes into a file whenever an assertion holds, so that a crash can be said to have come after that line: a system call, which took nine tenths of the tests that look at many values (unit_ops_a
 * under AddressSanitizer: 57 s). Here the first time that a test's process comes to a line is enough. Linked by --wrap=_mark_point. */
#include <stdatomic.h>
#include <stdint.h>

#define MARKS 4096u

void __real__mark_point(const char *file, int line);
void __wrap__mark_point(const char *file, int line);

/* By a line's hash: two lines that share a place are noted as one. Threads of a test may assert, too. */
static _Atomic uint8_t marked[MARKS];

void __wrap__mark_point(const char *file, int line)
{
	const uint32_t place = ((uint32_t)line * 31u + (uint32_t)((uintptr_t)file >> 4)) % MARKS;
	if (atomic_load_explicit(&marked[place], memory_order_relaxed) == 0 && atomic_exchange_explicit(&marked[place], 1, memory_order_relaxed) == 0)
		__real__mark_point(file, line);
}
