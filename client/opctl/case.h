/* A case file: an op, its arguments, what it must give (OPS.md's form; client/opctl/README.md documents it).
 *
 * Layer: client/opctl. Threads: one.
 * Life: case_open → case_add_arguments, once a call → case_check → case_close. */
#ifndef OPCTL_CASE_H
#define OPCTL_CASE_H

#include "client/opctl/call.h"
#include "client/safetensors.h"

struct case_file {
	struct safetensors *file;
	const char *op;
	const char *error_name; /* the status expected; NULL: results */
	opd_status error_status;
	cJSON *attrs;
};

struct case_outcome {
	bool passed;
	bool compared;  /* max_abs and max_rel count */
	double max_abs; /* over all results */
	double max_rel;
	char why[640]; /* what failed, or a word on what was expected and came */
};

/* INVALID_ARGUMENT: not a case. */
OPD_MUST_USE opd_status case_open(const char *path, struct case_file *test_out, opd_error *error);
void case_close(struct case_file *test);

OPD_MUST_USE opd_status case_add_arguments(const struct case_file *test, struct call *call, opd_error *error);

/* Compares what came with what the case wants. `result` may be NULL; `error` is the text of a status other than OK. */
void case_check(const struct case_file *test, opd_status status, const opd_error *error, const opd_result *result,
                struct case_outcome *out);

#endif
