/* A shared object that is no provider module. */
int opd_tests_no_symbol(void);

__attribute__((visibility("default"))) int opd_tests_no_symbol(void)
{
	return 1;
}
