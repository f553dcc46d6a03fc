/* One table for all benchmarks: rows with a floor, opd's figure, their ratio and the target; and medians.
 *
 * Layer: bench. Threads: one at a time.
 * A row only shows whether its target was met; nothing ends with a failure because of a time. */
#ifndef OPD_BENCH_REPORT_H
#define OPD_BENCH_REPORT_H

#include <stddef.h>

typedef enum report_bound {
	REPORT_NO_TARGET = 0,
	REPORT_RATIO_MAX,
	REPORT_RATIO_MIN,
	REPORT_VALUE_MAX,
	REPORT_VALUE_MIN,
} report_bound;

/* Numbers that a row doesn't have are REPORT_NONE. */
#define REPORT_NONE (-1.0)

struct report_row {
	const char *what;
	const char *unit; /* of floor, value and kernel */
	double floor;
	double value;  /* opd's */
	double kernel; /* the kernel's own share, not counted in the ratio */
	double ratio;
	report_bound bound;
	double limit;
	const char *note; /* NULL: none */
};

/* A heading, with the columns' names below it. */
void report_section(const char *title);
void report_row(const struct report_row *row);
/* A peer's row, below the one it is compared with: its figure stands in opd's column, `note` says how opd compares. With value 0
 * the peer was skipped, and `note` says why. */
void report_peer(const struct report_row *row);
/* A free line below the rows. */
void report_note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Sorts `values` and gives their median (quantile). 0 when there are none. */
double report_median(double *values, size_t count);
double report_quantile(double *values, size_t count, double fraction);

/* Prints and exits with 1. */
_Noreturn void bench_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
