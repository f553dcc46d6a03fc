#include "providers/builtin.h"

const opd_module *const builtin_modules[] = {&native_module, &cpu_module, NULL};
