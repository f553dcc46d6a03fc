#include "server/derived.h"

#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "server/tensors.h"

#define BUCKETS 4096u     /* by tensor id */
#define ASKED_MAX 4096u   /* contents remembered that came once, or found no room */
#define COPIES_MAX 65536u /* however small they are */

typedef enum copy_state {
	COPY_ASKED, /* no memory: remembered */
	COPY_MAKING,
	COPY_KEPT,
} copy_state;

/* What a copy is of; behind it shape, strides and the module's key. */
struct subject {
	uint64_t id;
	uint64_t version;
	const void *owner;
	uint64_t byte_offset;
	uint32_t dtype;
	uint32_t rank;
};

#define SUBJECT_BYTES_MAX (sizeof(struct subject) + 2 * OPD_RANK_MAX * sizeof(int64_t) + OPD_DERIVED_KEY_MAX)

struct derived_copy {
	struct derived_copy *next;           /* in its bucket */
	struct derived_copy *newer, *older;  /* in its list */
	copy_state state;
	uint32_t runs;  /* that have it */
	bool forgotten; /* not in the table any more: the last run frees it */
	uint64_t used;  /* when it was found, or asked for, last */
	uint64_t bytes; /* of the copy; 0 unless making or kept */
	struct buffer *buffer;
	struct derived_own *own; /* instead of a buffer */
	uint32_t subject_bytes;
	_Alignas(8) unsigned char subject[];
};

/* By use. */
struct copy_list {
	struct derived_copy *newest;
	struct derived_copy *oldest;
	uint32_t count;
};

struct derived {
	struct memory *memory;
	struct account *account;
	pthread_mutex_t mutex; /* of what follows, but reads of whether a bucket is empty */
	uint64_t limit_bytes;
	uint64_t bytes; /* of copies being made, kept, or forgotten and still in a run */
	uint64_t clock;
	struct copy_list asked;
	struct copy_list kept;
	uint64_t found;
	uint64_t made;
	_Atomic(struct derived_copy *) buckets[BUCKETS];
};

opd_status derived_create(struct memory *memory, uint64_t limit_bytes, struct derived **derived_out, opd_error *error)
{
	struct derived *derived = calloc(1, sizeof *derived);
	struct account *account = derived == NULL ? NULL : account_create(memory, UINT64_MAX);
	if (account == NULL || pthread_mutex_init(&derived->mutex, NULL) != 0) {
		account_unref(account);
		free(derived);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "derived copies: out of memory");
	}
	account->gives_way = true;
	derived->memory = memory;
	derived->account = account;
	derived->limit_bytes = limit_bytes;
	memory->derived = derived;
	*derived_out = derived;
	return OPD_OK;
}

/* ---- Subjects ---- */

struct subject_text {
	uint32_t bytes;
	_Alignas(8) unsigned char data[SUBJECT_BYTES_MAX];
};

static void subject_put(struct subject_text *text, const void *data, size_t bytes)
{
	if (bytes != 0)
		memcpy(text->data + text->bytes, data, bytes);
	text->bytes += (uint32_t)bytes;
}

/* False: no copies are kept of this. */
static bool subject_fill(struct subject_text *text, const void *owner, const opd_tensor *tensor, const void *key, uint32_t key_bytes)
{
	if ((tensor->flags & OPD_TENSOR_CONSTANT) == 0 || tensor->id == 0 || tensor->rank > OPD_RANK_MAX || key_bytes > OPD_DERIVED_KEY_MAX)
		return false;
	const struct subject subject = {.id = tensor->id,
	                                .version = tensor->version,
	                                .owner = owner,
	                                .byte_offset = tensor->byte_offset,
	                                .dtype = (uint32_t)tensor->dtype,
	                                .rank = tensor->rank};
	text->bytes = 0;
	subject_put(text, &subject, sizeof subject);
	subject_put(text, tensor->shape, tensor->rank * sizeof tensor->shape[0]);
	subject_put(text, tensor->strides, tensor->rank * sizeof tensor->strides[0]);
	subject_put(text, key, key_bytes);
	return true;
}

static const struct subject *subject_of(const struct derived_copy *copy)
{
	return (const struct subject *)(const void *)copy->subject;
}

static _Atomic(struct derived_copy *) *bucket_of(struct derived *derived, uint64_t id)
{
	return &derived->buckets[(id * 0x9e3779b97f4a7c15u >> 32) % BUCKETS];
}

static struct derived_copy *find_locked(struct derived *derived, const struct subject_text *text)
{
	const uint64_t id = ((const struct subject *)(const void *)text->data)->id;
	struct derived_copy *copy = atomic_load_explicit(bucket_of(derived, id), memory_order_relaxed);
	while (copy != NULL && (copy->subject_bytes != text->bytes || memcmp(copy->subject, text->data, text->bytes) != 0))
		copy = copy->next;
	return copy;
}

/* ---- Lists ---- */

static void list_take(struct copy_list *list, struct derived_copy *copy)
{
	*(copy->newer == NULL ? &list->newest : &copy->newer->older) = copy->older;
	*(copy->older == NULL ? &list->oldest : &copy->older->newer) = copy->newer;
	list->count--;
}

static void list_put(struct copy_list *list, struct derived_copy *copy)
{
	copy->newer = NULL;
	copy->older = list->newest;
	*(list->newest == NULL ? &list->oldest : &list->newest->newer) = copy;
	list->newest = copy;
	list->count++;
}

/* NULL: a copy that is being made is in none. */
static struct copy_list *list_of(struct derived *derived, const struct derived_copy *copy)
{
	return copy->state == COPY_ASKED ? &derived->asked : copy->state == COPY_KEPT ? &derived->kept : NULL;
}

static void set_state(struct derived *derived, struct derived_copy *copy, copy_state state)
{
	struct copy_list *before = list_of(derived, copy);
	if (before != NULL)
		list_take(before, copy);
	copy->state = state;
	struct copy_list *after = list_of(derived, copy);
	if (after != NULL)
		list_put(after, copy);
}

/* Takes it out of the table. One that no run has goes onto *victims, which copies_free frees without the lock. */
static void forget_locked(struct derived *derived, struct derived_copy *copy, struct derived_copy **victims)
{
	_Atomic(struct derived_copy *) *bucket = bucket_of(derived, subject_of(copy)->id);
	struct derived_copy *at = atomic_load_explicit(bucket, memory_order_relaxed);
	if (at == copy) {
		atomic_store_explicit(bucket, copy->next, memory_order_relaxed);
	} else {
		while (at->next != copy)
			at = at->next;
		at->next = copy->next;
	}
	struct copy_list *list = list_of(derived, copy);
	if (list != NULL)
		list_take(list, copy);
	copy->forgotten = true;
	if (copy->runs != 0)
		return;
	derived->bytes -= copy->bytes;
	copy->next = *victims;
	*victims = copy;
}

/* What a copy lay in. */
struct place {
	struct buffer *buffer;
	struct derived_own *own;
	uint64_t bytes;
};

static void place_free(const struct derived *derived, const struct place *place)
{
	buffer_unref(place->buffer);
	if (place->own == NULL)
		return;
	account_release(derived->account, place->bytes);
	place->own->release(place->own);
}

static void copies_free(const struct derived *derived, struct derived_copy *victims)
{
	while (victims != NULL) {
		struct derived_copy *copy = victims;
		victims = copy->next;
		place_free(derived, &(struct place){copy->buffer, copy->own, copy->bytes});
		free(copy);
	}
}

/* As its maker and its finders have it. */
static void *data_of(const struct derived_copy *copy)
{
	return copy->own != NULL ? (void *)copy->own : copy->buffer->data;
}

void derived_destroy(struct derived *derived)
{
	if (derived == NULL)
		return;
	struct derived_copy *victims = NULL;
	while (derived->kept.oldest != NULL)
		forget_locked(derived, derived->kept.oldest, &victims);
	while (derived->asked.oldest != NULL)
		forget_locked(derived, derived->asked.oldest, &victims);
	copies_free(derived, victims);
	assert(derived->bytes == 0);
	derived->memory->derived = NULL;
	account_unref(derived->account);
	(void)pthread_mutex_destroy(&derived->mutex);
	free(derived);
}

/* ---- Finding ---- */

static bool run_take(struct derived_run *run, struct derived_copy *copy)
{
	if (run->count == OPD_DERIVED_RUN_MAX)
		return false;
	run->copies[run->count++] = copy;
	copy->runs++;
	return true;
}

const void *derived_find(struct derived *derived, struct derived_run *run, const void *owner, const opd_tensor *tensor, const void *key, uint32_t key_bytes)
{
	struct subject_text text;
	if (derived == NULL || run == NULL || !subject_fill(&text, owner, tensor, key, key_bytes))
		return NULL;
	const void *data = NULL;
	(void)pthread_mutex_lock(&derived->mutex);
	struct derived_copy *copy = find_locked(derived, &text);
	if (copy != NULL && copy->state == COPY_KEPT && run_take(run, copy)) {
		copy->used = ++derived->clock;
		set_state(derived, copy, COPY_KEPT); /* the newest */
		derived->found++;
		data = data_of(copy);
	}
	(void)pthread_mutex_unlock(&derived->mutex);
	return data;
}

/* ---- Making ---- */

static void remember_locked(struct derived *derived, const struct subject_text *text, struct derived_copy **victims)
{
	struct derived_copy *copy = calloc(1, sizeof *copy + text->bytes);
	if (copy == NULL)
		return;
	copy->subject_bytes = text->bytes;
	memcpy(copy->subject, text->data, text->bytes);
	copy->used = ++derived->clock;
	_Atomic(struct derived_copy *) *bucket = bucket_of(derived, subject_of(copy)->id);
	copy->next = atomic_load_explicit(bucket, memory_order_relaxed);
	atomic_store_explicit(bucket, copy, memory_order_relaxed);
	list_put(&derived->asked, copy);
	if (derived->asked.count > ASKED_MAX)
		forget_locked(derived, derived->asked.oldest, victims);
}

/* Evicts what `bytes` more need: only copies that no run has and that weren't used since `last`. False: they don't suffice, and all stay. */
static bool make_room_locked(struct derived *derived, uint64_t bytes, uint64_t last, struct derived_copy **victims)
{
	uint64_t room = derived->limit_bytes > derived->bytes ? derived->limit_bytes - derived->bytes : 0;
	uint32_t count = derived->kept.count;
	uint32_t evicted = 0;
	for (struct derived_copy *copy = derived->kept.oldest; room < bytes || count - evicted >= COPIES_MAX; copy = copy->newer) {
		if (copy == NULL || copy->runs != 0 || copy->used > last)
			return false;
		room += copy->bytes;
		evicted++;
	}
	for (; evicted > 0; evicted--)
		forget_locked(derived, derived->kept.oldest, victims);
	return true;
}

/* The copy, of which `bytes` are reserved; NULL: not now. */
static struct derived_copy *reserve_locked(struct derived *derived, struct derived_run *run, const struct subject_text *text, uint64_t bytes,
                                           struct derived_copy **victims)
{
	struct derived_copy *copy = find_locked(derived, text);
	if (copy == NULL) {
		remember_locked(derived, text, victims);
		return NULL;
	}
	if (copy->state != COPY_ASKED) /* another run makes it, or has just made it */
		return NULL;
	const uint64_t last = copy->used;
	copy->used = ++derived->clock;
	if (!make_room_locked(derived, bytes, last, victims) || !run_take(run, copy)) {
		set_state(derived, copy, COPY_ASKED); /* the newest */
		return NULL;
	}
	set_state(derived, copy, COPY_MAKING);
	copy->bytes = bytes;
	derived->bytes += bytes;
	return copy;
}

/* It didn't become a copy: remembered as asked for, as before. *place_out: the caller frees it. */
static void give_up_locked(struct derived *derived, struct derived_copy *copy, struct place *place_out)
{
	*place_out = (struct place){copy->buffer, copy->own, copy->bytes};
	derived->bytes -= copy->bytes;
	copy->bytes = 0;
	copy->buffer = NULL;
	copy->own = NULL;
	set_state(derived, copy, COPY_ASKED);
}

/* A run lets go of it. */
static void let_go_locked(struct derived *derived, struct derived_copy *copy, struct derived_copy **victims, struct place *place_out)
{
	copy->runs--;
	if (copy->forgotten && copy->runs == 0) {
		derived->bytes -= copy->bytes;
		copy->next = *victims;
		*victims = copy;
	} else if (!copy->forgotten && copy->state == COPY_MAKING) {
		give_up_locked(derived, copy, place_out);
	}
}

static void let_go(struct derived *derived, struct derived_copy *copy)
{
	struct derived_copy *victims = NULL;
	struct place place = {.buffer = NULL};
	(void)pthread_mutex_lock(&derived->mutex);
	let_go_locked(derived, copy, &victims, &place);
	(void)pthread_mutex_unlock(&derived->mutex);
	place_free(derived, &place);
	copies_free(derived, victims);
}

/* A copy of so many bytes that has no place yet; NULL: not now. */
static struct derived_copy *reserve(struct derived *derived, struct derived_run *run, const void *owner, const opd_tensor *tensor, const void *key, uint32_t key_bytes,
                                    uint64_t bytes)
{
	struct subject_text text;
	if (derived == NULL || run == NULL || bytes == 0 || !subject_fill(&text, owner, tensor, key, key_bytes))
		return NULL;
	struct derived_copy *victims = NULL;
	(void)pthread_mutex_lock(&derived->mutex);
	struct derived_copy *copy = bytes > derived->limit_bytes ? NULL : reserve_locked(derived, run, &text, bytes, &victims);
	(void)pthread_mutex_unlock(&derived->mutex);
	copies_free(derived, victims);
	return copy;
}

/* There was no memory for the copy that this run has reserved last. */
static void unreserve(struct derived *derived, struct derived_run *run, struct derived_copy *copy)
{
	run->count--;
	let_go(derived, copy);
}

void *derived_make(struct derived *derived, struct derived_run *run, const void *owner, const opd_tensor *tensor, const void *key, uint32_t key_bytes,
                   uint64_t bytes)
{
	struct derived_copy *copy = reserve(derived, run, owner, tensor, key, key_bytes, bytes);
	if (copy == NULL)
		return NULL;
	struct buffer *buffer = NULL;
	if (buffer_alloc(derived->account, bytes, 0, &buffer, NULL) != OPD_OK) {
		unreserve(derived, run, copy);
		return NULL;
	}
	copy->buffer = buffer; /* this run's alone while it is being made */
	return buffer->data;
}

bool derived_make_own(struct derived *derived, struct derived_run *run, const void *owner, const opd_tensor *tensor, uint64_t bytes, struct derived_own *own)
{
	struct derived_copy *copy = reserve(derived, run, owner, tensor, NULL, 0, bytes);
	if (copy == NULL)
		return false;
	if (account_charge(derived->account, bytes, NULL) != OPD_OK) {
		unreserve(derived, run, copy);
		return false;
	}
	copy->own = own;
	return true;
}

void derived_keep(struct derived *derived, const struct derived_run *run, const void *memory)
{
	if (derived == NULL || run == NULL || memory == NULL)
		return;
	(void)pthread_mutex_lock(&derived->mutex);
	for (uint32_t i = 0; i < run->count; i++) {
		struct derived_copy *copy = run->copies[i];
		if (copy->state != COPY_MAKING || copy->forgotten || data_of(copy) != memory)
			continue;
		set_state(derived, copy, COPY_KEPT);
		derived->made++;
	}
	(void)pthread_mutex_unlock(&derived->mutex);
}

void derived_end(struct derived *derived, struct derived_run *run)
{
	while (run != NULL && run->count > 0)
		let_go(derived, run->copies[--run->count]);
}

/* ---- Dropping ---- */

void derived_forget(struct derived *derived, uint64_t id, uint64_t version)
{
	/* Whoever had the contents has let go of them before, so that its copy is seen here. */
	if (derived == NULL || atomic_load_explicit(bucket_of(derived, id), memory_order_relaxed) == NULL)
		return;
	struct derived_copy *victims = NULL;
	(void)pthread_mutex_lock(&derived->mutex);
	struct derived_copy *copy = atomic_load_explicit(bucket_of(derived, id), memory_order_relaxed);
	while (copy != NULL) {
		struct derived_copy *next = copy->next;
		if (subject_of(copy)->id == id && subject_of(copy)->version <= version)
			forget_locked(derived, copy, &victims);
		copy = next;
	}
	(void)pthread_mutex_unlock(&derived->mutex);
	copies_free(derived, victims);
}

/* Until at least `bytes` are free; *freed_out: how many are. */
static struct derived_copy *evict_locked(struct derived *derived, uint64_t bytes, uint64_t *freed_out)
{
	struct derived_copy *victims = NULL;
	*freed_out = 0;
	for (struct derived_copy *copy = derived->kept.oldest; copy != NULL && *freed_out < bytes;) {
		struct derived_copy *newer = copy->newer;
		if (copy->runs == 0) {
			*freed_out += copy->bytes;
			forget_locked(derived, copy, &victims);
		}
		copy = newer;
	}
	return victims;
}

uint64_t derived_reclaim(struct derived *derived, uint64_t bytes)
{
	uint64_t freed;
	(void)pthread_mutex_lock(&derived->mutex);
	struct derived_copy *victims = evict_locked(derived, bytes, &freed);
	(void)pthread_mutex_unlock(&derived->mutex);
	copies_free(derived, victims);
	return freed;
}

void derived_set_limit(struct derived *derived, uint64_t limit_bytes)
{
	uint64_t freed;
	(void)pthread_mutex_lock(&derived->mutex);
	derived->limit_bytes = limit_bytes;
	struct derived_copy *victims = evict_locked(derived, derived->bytes > limit_bytes ? derived->bytes - limit_bytes : 0, &freed);
	(void)pthread_mutex_unlock(&derived->mutex);
	copies_free(derived, victims);
}

void derived_count(struct derived *derived, struct derived_statistics *out)
{
	(void)pthread_mutex_lock(&derived->mutex);
	*out = (struct derived_statistics){derived->kept.count, derived->bytes, derived->found, derived->made};
	(void)pthread_mutex_unlock(&derived->mutex);
}
