/* Its function returns nothing. */
#include "bad.h"

const opd_module *opd_module_get(void)
{
	return NULL;
}
