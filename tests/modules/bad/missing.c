/* The library that missing_library.so needs, kept where the loader doesn't look. */
int opd_tests_missing(void);

__attribute__((visibility("default"))) int opd_tests_missing(void)
{
	return 1;
}
