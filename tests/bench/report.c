#include "tests/bench/report.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

void report_section(const char *title)
{
	printf("\n%s\n", title);
	printf("%-58s %-7s %10s %10s %9s %7s  %-16s %s\n", "", "unit", "floor", "opd", "kernel", "ratio", "target", "");
	(void)fflush(stdout);
}

/* A number with about four significant digits, or a dash. */
static void number_format(char *out, size_t out_bytes, double value)
{
	if (value < 0)
		(void)snprintf(out, out_bytes, "-");
	else
		(void)snprintf(out, out_bytes, "%.*f", value < 10 ? 3 : value < 100 ? 2 : value < 10000 ? 1 : 0, value);
}

static bool target_met(const struct report_row *row)
{
	switch (row->bound) {
	case REPORT_RATIO_MAX:
		return row->ratio <= row->limit;
	case REPORT_RATIO_MIN:
		return row->ratio >= row->limit;
	case REPORT_VALUE_MAX:
		return row->value <= row->limit;
	case REPORT_VALUE_MIN:
		return row->value >= row->limit;
	case REPORT_NO_TARGET:
		break;
	}
	return true;
}

static void target_format(char *out, size_t out_bytes, const struct report_row *row)
{
	char limit[32];
	out[0] = '\0';
	if (row->bound == REPORT_NO_TARGET)
		return;
	bool ratio = row->bound == REPORT_RATIO_MAX || row->bound == REPORT_RATIO_MIN;
	bool max = row->bound == REPORT_RATIO_MAX || row->bound == REPORT_VALUE_MAX;
	if (ratio)
		(void)snprintf(limit, sizeof limit, "%.2f x", row->limit);
	else
		(void)snprintf(limit, sizeof limit, "%g", row->limit);
	(void)snprintf(out, out_bytes, "%s %s %s", max ? "<=" : ">=", limit, target_met(row) ? "met" : "MISSED");
}

void report_row(const struct report_row *row)
{
	char floor[32], value[32], kernel[32], ratio[32], target[64];
	number_format(floor, sizeof floor, row->floor);
	number_format(value, sizeof value, row->value);
	number_format(kernel, sizeof kernel, row->kernel);
	number_format(ratio, sizeof ratio, row->ratio);
	target_format(target, sizeof target, row);
	printf("%-58s %-7s %10s %10s %9s %7s  %-16s %s\n", row->what, row->unit, floor, value, kernel, ratio, target,
	       row->note == NULL ? "" : row->note);
	(void)fflush(stdout);
}

void report_peer(const struct report_row *row)
{
	char what[64], value[32], kernel[32], ratio[32];
	(void)snprintf(what, sizeof what, "  peer: %s", row->what);
	number_format(value, sizeof value, row->value);
	number_format(kernel, sizeof kernel, row->kernel);
	number_format(ratio, sizeof ratio, row->ratio);
	bool skipped = row->value <= 0;
	printf("%-58s %-7s %10s %10s %9s %7s  %-16s %s\n", what, row->unit, "", skipped ? "skipped" : value, skipped ? "-" : kernel,
	       skipped ? "-" : ratio, "", row->note);
	(void)fflush(stdout);
}

void report_note(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	(void)vprintf(format, args);
	va_end(args);
	(void)putchar('\n');
	(void)fflush(stdout);
}

static int compare_doubles(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

double report_quantile(double *values, size_t count, double fraction)
{
	if (count == 0)
		return 0;
	qsort(values, count, sizeof *values, compare_doubles);
	double place = fraction * (double)(count - 1);
	size_t below = (size_t)place;
	if (below + 1 >= count)
		return values[count - 1];
	double part = place - (double)below;
	return values[below] * (1 - part) + values[below + 1] * part;
}

double report_median(double *values, size_t count)
{
	return report_quantile(values, count, 0.5);
}

void bench_fail(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	(void)fflush(stdout);
	(void)fputs("bench: ", stderr);
	(void)vfprintf(stderr, format, args);
	(void)fputc('\n', stderr);
	va_end(args);
	exit(1);
}
