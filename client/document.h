/* Documents: what the inspecting calls give to people. They live in the memory of the reply that they show, and free it with
 * themselves.
 *
 * Layer: client, internal. Threads: one at a time.
 * Life: document_create takes the result → opd_document_free. */
#ifndef OPD_CLIENT_DOCUMENT_H
#define OPD_CLIENT_DOCUMENT_H

#include "client/result.h"

/* Makes the document in the result's arena by document_alloc; NULL: out of memory. */
typedef void *(*document_fn)(opd_result *result);

/* Takes `result`, also on failure. RESOURCE_EXHAUSTED alone. */
OPD_MUST_USE opd_status document_create(opd_result *result, document_fn make, const void **document_out, opd_error *error);

/* Zeroed, in the result's arena; NULL: out of memory. */
void *document_alloc(opd_result *result, size_t bytes);
void *document_priority(opd_result *result);
void *document_ops(opd_result *result);
void *document_op(opd_result *result);
void *document_providers(opd_result *result);
void *document_info(opd_result *result);
void *document_publication(opd_result *result);
void *document_publications(opd_result *result);
/* Fills in what the reply has of them; returns how many. */
uint32_t document_fill_kept(const opd_result *result, opd_kept_tensor *tensors_out);
/* The list is copied; NULL: out of memory, and the result stays the caller's. */
const opd_kept_list *document_kept(opd_result *result, const opd_kept_tensor *tensors, uint32_t count);

#endif
