/* The modules that are linked in, in the order in which they are opened.
 *
 * Layer: providers. Threads: constants.
 * native registers the catalogue (every op with its definition); cpu registers vectorised implementations of some. Which one runs is the
 * priority lists' business: this order means nothing to dispatch. */
#ifndef OPD_PROVIDERS_BUILTIN_H
#define OPD_PROVIDERS_BUILTIN_H

#include "providers/provider.h"

extern const opd_module native_module; /* providers/ops/native.c */
extern const opd_module cpu_module;    /* providers/cpu/cpu.c */

/* NULL-terminated. */
extern const opd_module *const builtin_modules[];

#endif
