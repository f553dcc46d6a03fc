/* _exit of a build for tests/coverage: the lines that ran are written first. Linked by --wrap=_exit. */
#include <gcov.h>

_Noreturn void __real__exit(int code);
_Noreturn void __wrap__exit(int code);

_Noreturn void __wrap__exit(int code)
{
	__gcov_dump();
	__real__exit(code);
}
