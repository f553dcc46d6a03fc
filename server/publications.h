/* What sessions have published: tensors that others open by name or by content, each held once in memory however many have it.
 *
 * Layer: server. Threads: any; one lock, held for table work alone (never while bytes are hashed or copied).
 * Life: publications_create → add, open, withdraw, list, end of sessions → publications_destroy, when no session is left.
 * Who pays: the publishing session, until it withdraws or ends; then, as at once for a lasting one, a tenant that still has it (whose publication it is first, else whose
 * sessions hold it). Moving a charge may pass the new payer's limit: it is never refused.
 * A tenant is the peer's identity (tenant.h). Names are a tenant's own: its sessions see its names first, then those that others published to all, oldest first. */
#ifndef OPD_SERVER_PUBLICATIONS_H
#define OPD_SERVER_PUBLICATIONS_H

#include <stdint.h>

#include "opd/status.h"
#include "proto/arena.h"
#include "proto/message.h"

#define PUBLICATIONS_MAX 4096u /* in all (one list's worth), and a tenant's at most half of it */

struct hold;
struct kept_tensor;
struct publications;
struct memory;
struct session;
struct tenants;

/* NULL: out of memory. */
struct publications *publications_create(struct memory *memory, struct tenants *tenants);
/* Lasting ones end here. NULL is allowed. */
void publications_destroy(struct publications *table);

/* Publishes `tensor`, whose bytes hash to `sha256`. tensor_out: what takes its place in the publisher's table (the caller's reference): the same bytes, or those already
 * published by the same tenant. ALREADY_EXISTS: the name has other contents; RESOURCE_EXHAUSTED: too many, the tenant's limit, memory. `out`'s texts are in the arena. */
OPD_MUST_USE opd_status publications_add(struct publications *table, const struct session *session, const struct kept_tensor *tensor, const uint8_t *sha256,
                                         const struct msg_publish *publish, struct arena *arena, struct kept_tensor **tensor_out, struct msg_publication *out,
                                         opd_error *error);
/* sha256 NULL: by name. NOT_FOUND, also for what isn't published to this session. */
OPD_MUST_USE opd_status publications_open(struct publications *table, const struct session *session, const struct msg_open *open, struct arena *arena,
                                          struct kept_tensor **tensor_out, struct msg_publication *out, opd_error *error);
/* The tenant's own; an administrator's: anybody's, its own first. */
OPD_MUST_USE opd_status publications_withdraw(struct publications *table, const struct session *session, struct msg_text name, opd_error *error);
/* Those that the session may open (an administrator: all), oldest first. False: the arena is full. */
OPD_MUST_USE bool publications_list(struct publications *table, const struct session *session, struct arena *arena, struct msg_publication **items_out,
                                    uint32_t *count_out);
/* Its connection is gone: what it published and isn't lasting is withdrawn. */
void publications_session_ended(struct publications *table, const struct session *session);

/* A kept tensor that had it is destroyed. NULL is allowed. */
void hold_release(struct hold *hold);

#endif
