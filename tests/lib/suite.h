/* The end of a suite's main: all of its tests are run, and the exit code says whether they passed. CK_VERBOSITY says how much is printed.
 *
 * Layer: tests. */
#ifndef OPD_TESTS_LIB_SUITE_H
#define OPD_TESTS_LIB_SUITE_H

#include <check.h>
#include <stdlib.h>

/* Takes the suite. */
static inline int suite_run(Suite *suite)
{
	SRunner *runner = srunner_create(suite);
	srunner_run_all(runner, CK_ENV);
	const int failed = srunner_ntests_failed(runner);
	srunner_free(runner);
	return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

#endif
