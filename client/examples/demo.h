/* The demo: what its files share.
 *
 * Layer: client/examples, on top of libopd, libopd-embedded and the readers of files. Threads: one.
 * Life: demo_model_load → the parts, in order → demo_model_fini. */
#ifndef OPD_EXAMPLES_DEMO_H
#define OPD_EXAMPLES_DEMO_H

#include "client/file_tensor.h"
#include "opd/client.h"

/* What the demo computes with. */
struct demo_model {
	struct file_tensor table; /* [V, H], V at least 256: a token is a byte */
	struct file_tensor norm;  /* [H]: the norm before layer 0's attention */
	struct file_tensor query; /* [N, H]: layer 0's query projection */
	int32_t *ids;             /* [tokens]: the text's bytes */
	int64_t tokens;           /* at least 1 */
};

struct demo {
	opd_client *client;
	struct demo_model model;
	char missing[160];   /* a configured provider that can't run here; "": none */
	opd_result *rows;    /* embedding: [tokens, H] */
	opd_result *normed;  /* rms_norm of rows */
	opd_result *queries; /* linear of normed */
	unsigned checks, wrong;
};

/* The epsilon of the model's norms. */
#define DEMO_EPSILON 1e-5

/* ---- demo.c ---- */

/* Prints one line, "  ok     …" or "  WRONG  …", and counts it. Arguments from outside must be shown() ones. */
OPD_PRINTF(3, 4)
void demo_check(struct demo *demo, bool right, const char *format, ...);

/* The text with control characters escaped, cut after some 400 bytes. Valid until the fourth call after it; "" for NULL. */
const char *shown(const char *text);

/* ---- demo_model.c ---- */

/* Reads three tensors of a Llama model with Hugging Face names, and takes the bytes of `text` for ids. Fini also after a failure.
 */
OPD_MUST_USE opd_status demo_model_load(struct demo_model *model, const char *path, const char *text, opd_error *error);
void demo_model_fini(struct demo_model *model);

/* ---- demo_reference.c ---- */

/* How far an op's result is from the same definition in f64, and the furthest as a share of what opd promises for the dtype. */
struct demo_distance {
	double error;
	double share; /* at most 1: as promised. Infinite where dtype or shape isn't the expected one */
};

struct demo_distance demo_compare_embedding(const struct demo_model *model, const opd_tensor *rows); /* exact: 0 or infinite */
struct demo_distance demo_compare_rms_norm(const struct demo_model *model, const opd_tensor *x, double epsilon,
                                           const opd_tensor *got);
struct demo_distance demo_compare_linear(const struct demo_model *model, const opd_tensor *x, const opd_tensor *got);

/* ---- demo_request.c ---- */

opd_operand operand_of_file(const struct file_tensor *tensor);
opd_operand operand_of_tensor(const opd_tensor *tensor);
opd_operand operand_of_ids(const struct demo_model *model);
opd_operand operand_of_result(opd_ticket ticket); /* output 0 of a request that keeps it, answered or not */

/* Requests; destroyed by the caller, or by run. Without memory the program ends. */
opd_request *embedding_request(const struct demo_model *model);
opd_request *rms_norm_request(const struct demo_model *model, const opd_operand *x);
opd_request *linear_request(const struct demo_model *model, const opd_operand *x);

/* Runs and destroys the request. NULL: it failed, and the failure is printed. */
opd_result *run(struct demo *demo, opd_request *request);

/* Prints what failed and why; returns false. */
bool failed(const char *what, opd_status status, const opd_error *error);

/* The provider ran this result. */
bool ran_on(const opd_result *result, const char *provider);

/* Output 0 of both has the same dtype, shape and bytes. */
bool same_bits(const opd_result *a, const opd_result *b);

/* ---- The parts, in the order of the demo ---- */

/* Each prints a heading, does its job, and says what it checked. False: it could not go on (the reason is printed). */
bool part_ops(struct demo *demo);     /* demo_dispatch.c: three ops on real tensors, against f64 */
bool part_list(struct demo *demo);    /* a list of which one can't run, one refuses, one runs */
bool part_dry(struct demo *demo);     /* fake and dry runs, calls that don't bind */
bool part_session(struct demo *demo); /* demo_session.c: lists of the session */
bool part_kept(struct demo *demo);    /* results that stay, and requests that read them before they exist */
bool part_flight(struct demo *demo);  /* many requests in flight */
bool part_direct(struct demo *demo);  /* without frames, where the daemon is in this process */

#endif
