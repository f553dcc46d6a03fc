/* Which instruction set's kernels this process uses.
 *
 * Layer: providers/cpu. Threads: any; reads the environment (OPD_CPU_ISA), so call it where nobody changes that. */
#ifndef OPD_CPU_ISA_H
#define OPD_CPU_ISA_H

#include <stdbool.h>
#include <stddef.h>

#include "providers/cpu/kernels.h"

/* Every instruction set of this build, slowest first; NULL at the end. The first runs anywhere. */
extern const struct cpu_kernels *const cpu_isas[];

/* This machine (and its operating system) can run them. */
bool cpu_isa_supported(const struct cpu_kernels *kernels);

/* The best that this machine supports, or the one that `wanted` names (NULL or "": no wish). A wish that can't be met leaves the best, and a
 * text in `warning` [bytes], which is empty otherwise. */
const struct cpu_kernels *cpu_isa_pick(const char *wanted, char *warning, size_t bytes);

#endif
