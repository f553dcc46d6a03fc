#include "server/publications.h"

#include <assert.h>
#include <openssl/crypto.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/bounds.h"
#include "proto/text.h"
#include "server/derived.h"
#include "server/kept.h"
#include "server/session.h"
#include "server/tenant.h"
#include "server/tensors.h"

/* How many kept tensors of a tenant's sessions have a content. */
struct holder {
	struct holder *next;
	struct tenant *tenant;
	uint32_t count;
};

/* Bytes that are held once. */
struct content {
	struct content *next;
	struct content **link;
	uint8_t sha256[MSG_SHA256_BYTES];
	opd_dtype dtype;
	uint32_t rank;
	int64_t shape[OPD_RANK_MAX];
	uint64_t bytes;
	uint64_t id;
	uint64_t version;
	struct buffer *buffer;
	uint32_t publications;
	struct publication *published; /* those, by age */
	struct publication **published_end;
	uint32_t holds;
	struct holder *holders;
	uint64_t payer; /* session whose account has the charge; 0: a tenant's has it */
};

struct publication {
	struct publication *next; /* by age */
	struct publication **link;
	struct publication *content_next; /* of the same content */
	struct publication **content_link;
	char name[BOUND_NAME_BYTES + 1];
	struct tenant *tenant;
	struct content *content;
	bool all;
	bool lasting;
	uint64_t session; /* publisher; 0: lasting, nobody's */
};

/* What a kept tensor has of a content. */
struct hold {
	struct publications *table;
	struct content *content;
	struct holder *holder;
};

struct publications {
	pthread_mutex_t mutex;
	struct memory *memory;
	struct tenants *tenants;
	struct content *contents;
	struct publication *first;
	struct publication **end;
	uint32_t count;
};

struct publications *publications_create(struct memory *memory, struct tenants *tenants)
{
	/* A process that ends with this daemon in it must not take OpenSSL away from lanes that still hash. */
	(void)OPENSSL_init_crypto(OPENSSL_INIT_NO_ATEXIT, NULL);
	struct publications *table = calloc(1, sizeof *table);
	if (table == NULL)
		return NULL;
	if (pthread_mutex_init(&table->mutex, NULL) != 0) {
		free(table);
		return NULL;
	}
	table->memory = memory;
	table->tenants = tenants;
	table->end = &table->first;
	return table;
}

static opd_status out_of_memory(opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "publish: out of memory");
}

/* ---- Contents ---- */

static struct content *content_find(const struct publications *table, const struct tenant *tenant, const struct kept_tensor *tensor, const uint8_t *sha256)
{
	for (const struct publication *at = table->first; at != NULL; at = at->next) {
		struct content *content = at->content;
		if (at->tenant == tenant && memcmp(content->sha256, sha256, MSG_SHA256_BYTES) == 0 && content->dtype == tensor->dtype &&
		    content->rank == tensor->rank && memcmp(content->shape, tensor->shape, tensor->rank * sizeof tensor->shape[0]) == 0)
			return content;
	}
	return NULL;
}

static struct content *content_create(struct publications *table, const struct session *session, const struct kept_tensor *tensor, const uint8_t *sha256)
{
	struct content *content = calloc(1, sizeof *content);
	if (content == NULL)
		return NULL;
	memcpy(content->sha256, sha256, sizeof content->sha256);
	content->dtype = tensor->dtype;
	content->rank = tensor->rank;
	memcpy(content->shape, tensor->shape, sizeof content->shape);
	content->bytes = tensor->bytes;
	content->id = tensor->id;
	content->version = tensor->version;
	content->buffer = buffer_ref(tensor->buffer);
	content->payer = session->id;
	content->published_end = &content->published;
	content->next = table->contents;
	content->link = &table->contents;
	if (content->next != NULL)
		content->next->link = &content->next;
	table->contents = content;
	return content;
}

/* When the session that pays has gone, or gave it away. */
static void content_move_charge(struct content *content)
{
	struct tenant *payer = content->holders == NULL ? NULL : content->holders->tenant;
	for (const struct publication *at = content->published; at != NULL; at = at->content_next) {
		payer = at->tenant;
		if (at->lasting)
			break;
	}
	content->payer = 0;
	if (payer != NULL && buffer_payer(content->buffer) != payer->account)
		buffer_recharge(content->buffer, payer->account);
}

/* Freed, if nobody has it. */
static void content_settle(struct publications *table, struct content *content)
{
	if (content->publications != 0 || content->holds != 0)
		return;
	*content->link = content->next;
	if (content->next != NULL)
		content->next->link = content->link;
	assert(content->holders == NULL);
	derived_forget(table->memory->derived, content->id, content->version);
	buffer_unref(content->buffer);
	free(content);
}

/* ---- Holds ---- */

static struct holder *holder_get(struct publications *table, struct content *content, struct tenant *tenant)
{
	for (struct holder *holder = content->holders; holder != NULL; holder = holder->next)
		if (holder->tenant == tenant)
			return holder;
	struct holder *holder = calloc(1, sizeof *holder);
	if (holder == NULL)
		return NULL;
	holder->tenant = tenant_ref(table->tenants, tenant);
	holder->next = content->holders;
	content->holders = holder;
	return holder;
}

static void holder_drop(struct publications *table, struct content *content, struct holder *holder)
{
	struct holder **link = &content->holders;
	while (*link != holder)
		link = &(*link)->next;
	*link = holder->next;
	if (content->payer == 0 && buffer_payer(content->buffer) == holder->tenant->account)
		content_move_charge(content);
	tenant_unref(table->tenants, holder->tenant);
	free(holder);
}

/* A kept tensor of the content for a session; NULL: out of memory. */
static struct kept_tensor *content_hold(struct publications *table, struct content *content, const struct session *session)
{
	struct hold *hold = calloc(1, sizeof *hold);
	struct holder *holder = hold == NULL ? NULL : holder_get(table, content, session->tenant);
	struct kept_tensor *tensor =
		holder == NULL ? NULL : kept_tensor_create(content->dtype, content->rank, content->shape, content->bytes, content->buffer);
	if (tensor == NULL) {
		if (holder != NULL && holder->count == 0)
			holder_drop(table, content, holder);
		free(hold);
		return NULL;
	}
	*hold = (struct hold){table, content, holder};
	holder->count++;
	content->holds++;
	tensor->id = content->id;
	tensor->version = content->version;
	tensor->hold = hold;
	return tensor;
}

void hold_release(struct hold *hold)
{
	if (hold == NULL)
		return;
	struct publications *table = hold->table;
	struct content *content = hold->content;
	(void)pthread_mutex_lock(&table->mutex);
	content->holds--;
	if (--hold->holder->count == 0)
		holder_drop(table, content, hold->holder);
	content_settle(table, content);
	(void)pthread_mutex_unlock(&table->mutex);
	free(hold);
}

/* ---- Publications ---- */

static bool describe(const struct publication *publication, struct arena *arena, struct msg_publication *out)
{
	const struct content *content = publication->content;
	*out = (struct msg_publication){
		.dtype = content->dtype,
		.rank = content->rank,
		.bytes = content->bytes,
		.all = publication->all,
		.lasting = publication->lasting,
		.holders = content->holds,
	};
	memcpy(out->shape, content->shape, sizeof out->shape);
	memcpy(out->sha256, content->sha256, sizeof out->sha256);
	const char *name = arena_text(arena, publication->name, strlen(publication->name));
	const char *tenant = arena_text(arena, publication->tenant->name, strlen(publication->tenant->name));
	if (name == NULL || tenant == NULL)
		return false;
	out->name = msg_text(name);
	out->tenant = msg_text(tenant);
	return true;
}

/* The tenant's of this name; NULL: none. */
static struct publication *find_own(const struct publications *table, const struct tenant *tenant, struct msg_text name)
{
	for (struct publication *at = table->first; at != NULL; at = at->next)
		if (at->tenant == tenant && strlen(at->name) == name.bytes && memcmp(at->name, name.data, name.bytes) == 0)
			return at;
	return NULL;
}

/* The tenant's own, else the oldest of others that is for all. */
static struct publication *find_visible(const struct publications *table, const struct session *session, const struct msg_open *open)
{
	struct publication *others = NULL;
	for (struct publication *at = table->first; at != NULL; at = at->next) {
		const bool right = open->sha256 != NULL ? memcmp(at->content->sha256, open->sha256, MSG_SHA256_BYTES) == 0
		                                        : strlen(at->name) == open->name.bytes && memcmp(at->name, open->name.data, open->name.bytes) == 0;
		if (right && at->tenant == session->tenant)
			return at;
		if (right && at->all && others == NULL)
			others = at;
	}
	return others;
}

static void unlink_publication(struct publications *table, struct publication *publication)
{
	*publication->link = publication->next;
	if (publication->next != NULL)
		publication->next->link = publication->link;
	else
		table->end = publication->link;
	*publication->content_link = publication->content_next;
	if (publication->content_next != NULL)
		publication->content_next->content_link = publication->content_link;
	else
		publication->content->published_end = publication->content_link;
}

static void publication_remove(struct publications *table, struct publication *publication)
{
	struct content *content = publication->content;
	unlink_publication(table, publication);
	table->count--;
	publication->tenant->publications--;
	content->publications--;
	if (content->payer != 0 && content->payer == publication->session)
		content->payer = 0;
	if (content->payer == 0)
		content_move_charge(content);
	content_settle(table, content);
	tenant_unref(table->tenants, publication->tenant);
	free(publication);
}

static bool name_is_good(struct msg_text name)
{
	if (name.bytes == 0 || name.bytes > BOUND_NAME_BYTES)
		return false;
	for (size_t i = 0; i < name.bytes; i++) {
		const char c = name.data[i];
		if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || (c != '\0' && strchr("_.-:/", c) != NULL)))
			return false;
	}
	return true;
}

static opd_status check_room(const struct publications *table, const struct tenant *tenant, opd_error *error)
{
	if (table->count >= PUBLICATIONS_MAX || tenant->publications >= PUBLICATIONS_MAX / 2)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "publish: %u publications, %u of them this tenant's: at most %u and %u", (unsigned)table->count,
		                (unsigned)tenant->publications, PUBLICATIONS_MAX, PUBLICATIONS_MAX / 2);
	return OPD_OK;
}

/* A new one, in the table. */
static opd_status publication_create(struct publications *table, const struct session *session, struct tenant *tenant, struct content *content,
                                     const struct msg_publish *publish, struct publication **out, opd_error *error)
{
	opd_status status = check_room(table, tenant, error);
	struct publication *publication = status == OPD_OK ? calloc(1, sizeof *publication) : NULL;
	if (publication == NULL)
		return status == OPD_OK ? out_of_memory(error) : status;
	memcpy(publication->name, publish->name.data, publish->name.bytes);
	publication->tenant = tenant_ref(table->tenants, tenant);
	publication->content = content;
	publication->all = publish->all;
	publication->lasting = publish->lasting;
	publication->session = publish->lasting ? 0 : session->id;
	publication->link = table->end;
	*table->end = publication;
	table->end = &publication->next;
	publication->content_link = content->published_end;
	*content->published_end = publication;
	content->published_end = &publication->content_next;
	table->count++;
	tenant->publications++;
	content->publications++;
	*out = publication;
	return OPD_OK;
}

/* The same name again, with the same contents: it may come to last longer, and be for more. */
static opd_status publication_again(struct publication *publication, const struct content *content, const struct msg_publish *publish, opd_error *error)
{
	if (publication->content != content)
		return opd_fail(error, OPD_ALREADY_EXISTS, "publish: %s is published already, with other contents", publication->name);
	publication->all = publication->all || publish->all;
	if (publish->lasting) {
		publication->lasting = true;
		publication->session = 0;
	}
	return OPD_OK;
}

static opd_status add(struct publications *table, const struct session *session, struct tenant *tenant, const struct kept_tensor *tensor, const uint8_t *sha256,
                      const struct msg_publish *publish, struct publication **publication_out, struct kept_tensor **tensor_out, opd_error *error)
{
	struct publication *publication = find_own(table, tenant, publish->name);
	struct content *content = content_find(table, tenant, tensor, sha256);
	const bool fresh = content == NULL && publication == NULL;
	if (fresh && (content = content_create(table, session, tensor, sha256)) == NULL)
		return out_of_memory(error);
	opd_status status = publication != NULL ? publication_again(publication, content, publish, error)
	                                        : publication_create(table, session, tenant, content, publish, &publication, error);
	if (status == OPD_OK && (*tensor_out = content_hold(table, content, session)) == NULL) {
		status = out_of_memory(error);
		if (fresh) {
			publication_remove(table, publication);
			return status;
		}
	}
	if (status != OPD_OK && fresh)
		content_settle(table, content);
	if (status == OPD_OK && publication->lasting)
		content_move_charge(content);
	*publication_out = publication;
	return status;
}

opd_status publications_add(struct publications *table, const struct session *session, const struct kept_tensor *tensor, const uint8_t *sha256,
                            const struct msg_publish *publish, struct arena *arena, struct kept_tensor **tensor_out, struct msg_publication *out,
                            opd_error *error)
{
	char shown[160];
	if (!name_is_good(publish->name))
		return opd_fail(error, OPD_INVALID_ARGUMENT, "publish: name \"%s\", expected 1 to %u of A-Z a-z 0-9 _ . - : /",
		                text_escape(publish->name.data == NULL ? "" : publish->name.data, publish->name.bytes, shown, sizeof shown), BOUND_NAME_BYTES);
	(void)pthread_mutex_lock(&table->mutex);
	struct publication *publication = NULL;
	*tensor_out = NULL;
	opd_status status = add(table, session, session->tenant, tensor, sha256, publish, &publication, tensor_out, error);
	if (status == OPD_OK && !describe(publication, arena, out))
		status = out_of_memory(error); /* it is published all the same; saying so takes no more than asking again */
	(void)pthread_mutex_unlock(&table->mutex);
	if (status != OPD_OK) {
		kept_tensor_unref(*tensor_out);
		*tensor_out = NULL;
	}
	return status;
}

static opd_status not_published(const struct msg_open *open, opd_error *error)
{
	char shown[160];
	if (open->sha256 == NULL)
		return opd_fail(error, OPD_NOT_FOUND, "nothing is published to this tenant as \"%s\"",
		                text_escape(open->name.data == NULL ? "" : open->name.data, open->name.bytes, shown, sizeof shown));
	for (uint32_t i = 0; i < MSG_SHA256_BYTES; i++)
		(void)snprintf(shown + 2 * i, 3, "%02x", open->sha256[i]);
	return opd_fail(error, OPD_NOT_FOUND, "nothing is published to this tenant with the contents %s", shown);
}

opd_status publications_open(struct publications *table, const struct session *session, const struct msg_open *open, struct arena *arena,
                             struct kept_tensor **tensor_out, struct msg_publication *out, opd_error *error)
{
	(void)pthread_mutex_lock(&table->mutex);
	const struct publication *publication = find_visible(table, session, open);
	*tensor_out = publication == NULL ? NULL : content_hold(table, publication->content, session);
	opd_status status = publication == NULL                                                  ? not_published(open, error)
	                    : *tensor_out == NULL || !describe(publication, arena, out) ? out_of_memory(error)
	                                                                                        : OPD_OK;
	(void)pthread_mutex_unlock(&table->mutex);
	if (status != OPD_OK) {
		kept_tensor_unref(*tensor_out);
		*tensor_out = NULL;
	}
	return status;
}

opd_status publications_withdraw(struct publications *table, const struct session *session, struct msg_text name, opd_error *error)
{
	const struct msg_open open = {.name = name};
	(void)pthread_mutex_lock(&table->mutex);
	struct publication *publication = find_own(table, session->tenant, name);
	for (struct publication *at = table->first; access_may(session->access, RIGHT_OPERATE) && publication == NULL && at != NULL; at = at->next)
		if (strlen(at->name) == name.bytes && memcmp(at->name, name.data, name.bytes) == 0)
			publication = at;
	if (publication != NULL)
		publication_remove(table, publication);
	(void)pthread_mutex_unlock(&table->mutex);
	return publication != NULL ? OPD_OK : not_published(&open, error);
}

bool publications_list(struct publications *table, const struct session *session, struct arena *arena, struct msg_publication **items_out, uint32_t *count_out)
{
	(void)pthread_mutex_lock(&table->mutex);
	struct msg_publication *items = arena_array(arena, table->count, sizeof items[0]);
	bool made = items != NULL;
	uint32_t count = 0;
	for (const struct publication *at = table->first; made && at != NULL; at = at->next)
		if (access_may(session->access, RIGHT_OPERATE) || at->all || at->tenant == session->tenant)
			made = describe(at, arena, &items[count++]);
	(void)pthread_mutex_unlock(&table->mutex);
	*items_out = items;
	*count_out = count;
	return made;
}

void publications_session_ended(struct publications *table, const struct session *session)
{
	(void)pthread_mutex_lock(&table->mutex);
	for (struct publication *at = table->first, *next; at != NULL; at = next) {
		next = at->next;
		if (at->session == session->id)
			publication_remove(table, at);
	}
	for (struct content *content = table->contents; content != NULL; content = content->next)
		if (content->payer == session->id)
			content_move_charge(content);
	(void)pthread_mutex_unlock(&table->mutex);
}

void publications_destroy(struct publications *table)
{
	if (table == NULL)
		return;
	while (table->first != NULL)
		publication_remove(table, table->first);
	assert(table->contents == NULL);
	(void)pthread_mutex_destroy(&table->mutex);
	free(table);
}
