#include "server/tensors.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "proto/tensor.h"
#include "server/derived.h"

#define MAPPED_BYTES (1ull << 20) /* from here on by mmap */
#define CLASS_MIN_SHIFT 8         /* the smallest class: 256 bytes */

/* Four classes a power of two: 256, 320, 384, 448, 512, 640, … so that at most a quarter is wasted, and powers of two fit exactly. */
static unsigned class_of(uint64_t bytes, uint64_t *class_bytes_out)
{
	if (bytes < 1u << CLASS_MIN_SHIFT)
		bytes = 1u << CLASS_MIN_SHIFT;
	unsigned shift = 63u - (unsigned)__builtin_clzll(bytes);
	uint64_t step = 1ull << (shift - 2);
	uint64_t steps = (bytes - (1ull << shift) + step - 1) / step; /* 0 to 4; 4 is the next power of two */
	*class_bytes_out = (1ull << shift) + steps * step;
	return (shift - CLASS_MIN_SHIFT) * 4 + (unsigned)steps;
}

opd_status memory_init(struct memory *memory, uint64_t limit_bytes, uint64_t cache_limit_bytes, opd_error *error)
{
	*memory = (struct memory){.limit_bytes = limit_bytes, .cache_limit_bytes = cache_limit_bytes};
	if (pthread_mutex_init(&memory->mutex, NULL) != 0)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "tensor memory: no mutex");
	return OPD_OK;
}

static void buffer_destroy(struct buffer *buffer, uint64_t class_bytes)
{
	if (class_bytes >= MAPPED_BYTES)
		(void)munmap(buffer->data, class_bytes);
	else
		free(buffer->data);
	free(buffer);
}

static uint64_t class_bytes_at(unsigned class)
{
	unsigned shift = class / 4 + CLASS_MIN_SHIFT;
	return (1ull << shift) + (uint64_t)(class % 4) * (1ull << (shift - 2));
}

void memory_fini(struct memory *memory)
{
	assert(atomic_load(&memory->used_bytes) == 0);
	for (unsigned class = 0; class < MEMORY_CLASSES; class ++) {
		while (memory->cached[class] != NULL) {
			struct buffer *buffer = memory->cached[class];
			memory->cached[class] = buffer->next;
			buffer_destroy(buffer, class_bytes_at(class));
		}
	}
	(void)pthread_mutex_destroy(&memory->mutex);
}

struct account *account_create(struct memory *memory, uint64_t limit_bytes)
{
	struct account *account = calloc(1, sizeof *account);
	if (account == NULL)
		return NULL;
	account->refs = 1;
	account->limit_bytes = limit_bytes;
	account->memory = memory;
	return account;
}

struct account *account_ref(struct account *account)
{
	(void)atomic_fetch_add_explicit(&account->refs, 1, memory_order_relaxed);
	return account;
}

void account_unref(struct account *account)
{
	if (account != NULL && atomic_fetch_sub_explicit(&account->refs, 1, memory_order_acq_rel) == 1) {
		assert(atomic_load(&account->used_bytes) == 0);
		free(account);
	}
}

/* Adds unless that passes the limit; *used_out is what was there. */
static bool charge(_Atomic uint64_t *used, uint64_t limit, uint64_t bytes, uint64_t *used_out)
{
	uint64_t seen = atomic_load_explicit(used, memory_order_relaxed);
	do {
		*used_out = seen;
		if (bytes > limit || seen > limit - bytes)
			return false;
	} while (!atomic_compare_exchange_weak_explicit(used, &seen, seen + bytes, memory_order_relaxed, memory_order_relaxed));
	return true;
}

/* The daemon's part. Derived copies go first, so that a full ledger never means copies. */
static bool charge_daemon(const struct account *account, uint64_t bytes, uint64_t limit, uint64_t *used_out)
{
	struct memory *memory = account->memory;
	if (charge(&memory->used_bytes, limit, bytes, used_out))
		return true;
	if (account->gives_way || memory->derived == NULL || bytes > limit)
		return false;
	const uint64_t wanted = *used_out - (limit - bytes);
	return derived_reclaim(memory->derived, wanted) >= wanted && charge(&memory->used_bytes, limit, bytes, used_out);
}

opd_status account_charge(struct account *account, uint64_t bytes, opd_error *error)
{
	uint64_t used;
	uint64_t limit = atomic_load_explicit(&account->limit_bytes, memory_order_relaxed);
	if (!charge(&account->used_bytes, limit, bytes, &used))
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED,
		                "session memory: %" PRIu64 " bytes wanted, %" PRIu64 " of at most %" PRIu64 " in use", bytes, used, limit);
	struct memory *memory = account->memory;
	limit = atomic_load_explicit(&memory->limit_bytes, memory_order_relaxed);
	if (!charge_daemon(account, bytes, limit, &used)) {
		(void)atomic_fetch_sub_explicit(&account->used_bytes, bytes, memory_order_relaxed);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED,
		                "daemon memory: %" PRIu64 " bytes wanted, %" PRIu64 " of at most %" PRIu64 " in use", bytes, used, limit);
	}
	return OPD_OK;
}

void account_release(struct account *account, uint64_t bytes)
{
	(void)atomic_fetch_sub_explicit(&account->memory->used_bytes, bytes, memory_order_relaxed);
	(void)atomic_fetch_sub_explicit(&account->used_bytes, bytes, memory_order_relaxed);
}

static struct buffer *pool_take(struct memory *memory, unsigned class, uint64_t class_bytes)
{
	(void)pthread_mutex_lock(&memory->mutex);
	struct buffer *buffer = memory->cached[class];
	if (buffer != NULL) {
		memory->cached[class] = buffer->next;
		memory->cached_bytes -= class_bytes;
	}
	(void)pthread_mutex_unlock(&memory->mutex);
	return buffer;
}

static bool pool_give(struct memory *memory, struct buffer *buffer, uint64_t class_bytes)
{
	bool kept = false;
	/* The ceiling holds for what is resident: cached memory must not push live memory past it. */
	uint64_t used = atomic_load_explicit(&memory->used_bytes, memory_order_relaxed);
	(void)pthread_mutex_lock(&memory->mutex);
	if (memory->cached_bytes + class_bytes <= memory->cache_limit_bytes &&
	    used + memory->cached_bytes + class_bytes <= atomic_load_explicit(&memory->limit_bytes, memory_order_relaxed)) {
		buffer->next = memory->cached[buffer->class];
		memory->cached[buffer->class] = buffer;
		memory->cached_bytes += class_bytes;
		kept = true;
	}
	(void)pthread_mutex_unlock(&memory->mutex);
	return kept;
}

/* Frees cached buffers, largest first, until live (what is wanted included) and cached memory fit the ceiling. */
static void pool_make_room(struct memory *memory)
{
	uint64_t limit = atomic_load_explicit(&memory->limit_bytes, memory_order_relaxed);
	struct buffer *victims = NULL;
	(void)pthread_mutex_lock(&memory->mutex);
	for (unsigned class = MEMORY_CLASSES; class-- > 0;) {
		while (memory->cached[class] != NULL &&
		       atomic_load_explicit(&memory->used_bytes, memory_order_relaxed) + memory->cached_bytes > limit) {
			struct buffer *buffer = memory->cached[class];
			memory->cached[class] = buffer->next;
			memory->cached_bytes -= class_bytes_at(class);
			buffer->next = victims;
			victims = buffer;
		}
	}
	(void)pthread_mutex_unlock(&memory->mutex);
	while (victims != NULL) {
		struct buffer *buffer = victims;
		victims = buffer->next;
		buffer_destroy(buffer, class_bytes_at(buffer->class));
	}
}

static struct buffer *buffer_create(struct memory *memory, unsigned class, uint64_t class_bytes)
{
	pool_make_room(memory);
	struct buffer *buffer = calloc(1, sizeof *buffer);
	if (buffer == NULL)
		return NULL;
	if (class_bytes >= MAPPED_BYTES) {
		void *map = mmap(NULL, class_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		buffer->data = map == MAP_FAILED ? NULL : map;
		if (buffer->data != NULL && class_bytes >= 2 * MAPPED_BYTES)
			(void)madvise(map, class_bytes, MADV_HUGEPAGE); /* only a wish */
	} else {
		buffer->data = aligned_alloc(OPD_TENSOR_ALIGNMENT, class_bytes);
	}
	if (buffer->data == NULL) {
		free(buffer);
		return NULL;
	}
	buffer->class = (uint16_t)class;
	return buffer;
}

opd_status buffer_alloc(struct account *account, uint64_t bytes, uint64_t slack_bytes, struct buffer **buffer_out, opd_error *error)
{
	uint64_t padded;
	if (!size_add(bytes, slack_bytes, &padded) || !size_align(padded, &padded) || padded > 1ull << 46)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "tensor memory: %" PRIu64 " bytes are more than can be addressed", bytes);
	opd_status status = account_charge(account, bytes, error);
	if (status != OPD_OK)
		return status;
	uint64_t class_bytes;
	unsigned class = class_of(padded, &class_bytes);
	struct buffer *buffer = pool_take(account->memory, class, class_bytes);
	if (buffer == NULL)
		buffer = buffer_create(account->memory, class, class_bytes);
	if (buffer == NULL) {
		account_release(account, bytes);
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "tensor memory: the system has no %" PRIu64 " bytes", bytes);
	}
	atomic_store_explicit(&buffer->refs, 1, memory_order_relaxed);
	buffer->bytes = bytes + slack_bytes;
	buffer->charged_bytes = bytes;
	buffer->account = account_ref(account);
	*buffer_out = buffer;
	return OPD_OK;
}

void buffer_recharge(struct buffer *buffer, struct account *account)
{
	struct account *before = buffer->account;
	(void)atomic_fetch_add_explicit(&account->used_bytes, buffer->charged_bytes, memory_order_relaxed);
	buffer->account = account_ref(account);
	(void)atomic_fetch_sub_explicit(&before->used_bytes, buffer->charged_bytes, memory_order_relaxed);
	account_unref(before);
}

struct buffer *buffer_ref(struct buffer *buffer)
{
	(void)atomic_fetch_add_explicit(&buffer->refs, 1, memory_order_relaxed);
	return buffer;
}

void buffer_unref(struct buffer *buffer)
{
	if (buffer == NULL || atomic_fetch_sub_explicit(&buffer->refs, 1, memory_order_acq_rel) != 1)
		return;
	struct account *account = buffer->account;
	struct memory *memory = account->memory;
	uint64_t class_bytes = class_bytes_at(buffer->class);
	account_release(account, buffer->charged_bytes);
	buffer->account = NULL;
	if (!pool_give(memory, buffer, class_bytes))
		buffer_destroy(buffer, class_bytes);
	account_unref(account);
}
