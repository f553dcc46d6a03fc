/* A result against what a case wants.
 *
 * Layer: client/opctl. Threads: pure.
 * As real numbers (f8 decoded): |got - want| <= atol + rtol*|want|; NaN equals NaN, an infinity only itself. bool and integers
 * are exact, whatever the tolerances. */
#ifndef OPCTL_COMPARE_H
#define OPCTL_COMPARE_H

#include <stdbool.h>

#include "client/file_tensor.h"

struct comparison {
	bool equal;
	double max_abs; /* over finite pairs */
	double max_rel; /* … where want isn't 0 */
	char why[256];  /* "" when equal */
};

/* `got` is row-major with data in host memory. */
void compare_tensors(const opd_tensor *got, const struct file_tensor *want, double atol, double rtol, struct comparison *out);

#endif
