#include "server/tensors.h"

#include <assert.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "proto/tensor.h"
#include "server/derived.h"
#include "server/pins.h"

#define MAPPED_BYTES (1ull << 20) /* from here on by mmap */
#define MAPPED_SMALL_BYTES (64ull << 10) /* the same where devices copy from it */
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

void memory_init(struct memory *memory, uint64_t limit_bytes, uint64_t cache_limit_bytes)
{
	*memory = (struct memory){.name = "daemon", .limit_bytes = limit_bytes, .cache_limit_bytes = cache_limit_bytes, .mapped_from = MAPPED_BYTES};
}

void memory_init_device(struct memory *memory, uint32_t device, const char *name, uint64_t limit_bytes, struct memory_source source)
{
	memory_init(memory, limit_bytes, UINT64_MAX);
	memory->device = device;
	memory->name = name;
	memory->source = source;
}

void memory_map_small(struct memory *memory)
{
	atomic_store_explicit(&memory->mapped_from, MAPPED_SMALL_BYTES, memory_order_relaxed);
}

static void unmap(void *data, uint64_t class_bytes)
{
	pins_remove(data);
	(void)munmap(data, class_bytes);
}

static void buffer_destroy(struct memory *memory, struct buffer *buffer, uint64_t class_bytes)
{
	if (memory->device != 0)
		memory->source.free(memory->source.context, buffer->data);
	else if (buffer->mapped)
		unmap(buffer->data, class_bytes);
	else
		free(buffer->data);
	free(buffer);
}

static uint64_t class_bytes_at(unsigned class)
{
	unsigned shift = class / 4 + CLASS_MIN_SHIFT;
	return (1ull << shift) + (uint64_t)(class % 4) * (1ull << (shift - 2));
}

/* Frees cached buffers, largest first, until live and cached memory together take at most `limit`. */
static bool pool_shrink(struct memory *memory, uint64_t limit)
{
	struct buffer *victims = NULL;
	latch_lock(&memory->latch);
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
	latch_unlock(&memory->latch);
	const bool any = victims != NULL;
	while (victims != NULL) {
		struct buffer *buffer = victims;
		victims = buffer->next;
		buffer_destroy(memory, buffer, class_bytes_at(buffer->class));
	}
	return any;
}

uint64_t memory_cached_bytes(struct memory *memory)
{
	latch_lock(&memory->latch);
	const uint64_t bytes = memory->cached_bytes;
	latch_unlock(&memory->latch);
	return bytes;
}

/* Under the lock, so that nobody who has seen the old epoch still caches what is gone. */
void memory_forget(struct memory *memory)
{
	struct buffer *gone = NULL;
	latch_lock(&memory->latch);
	(void)atomic_fetch_add_explicit(&memory->epoch, 1, memory_order_release);
	for (unsigned class = 0; class < MEMORY_CLASSES; class ++) {
		while (memory->cached[class] != NULL) {
			struct buffer *buffer = memory->cached[class];
			memory->cached[class] = buffer->next;
			buffer->next = gone;
			gone = buffer;
		}
	}
	memory->cached_bytes = 0;
	latch_unlock(&memory->latch);
	while (gone != NULL) {
		struct buffer *buffer = gone;
		gone = buffer->next;
		free(buffer);
	}
}

bool memory_trim(struct memory *memory)
{
	return pool_shrink(memory, 0);
}

void memory_fini(struct memory *memory)
{
	assert(atomic_load(&memory->used_bytes) == 0);
	(void)memory_trim(memory);
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

bool account_name(struct account *account, const char *format, ...)
{
	char name[128];
	va_list arguments;
	va_start(arguments, format);
	(void)vsnprintf(name, sizeof name, format, arguments);
	va_end(arguments);
	account->name = strdup(name);
	return account->name != NULL;
}

void account_set_above(struct account *account, struct account *above)
{
	assert(atomic_load(&account->used_bytes) == 0 && atomic_load(&account->devices) == NULL);
	struct account *before = account->above;
	account->above = above == NULL ? NULL : account_ref(above);
	account_unref(before);
}

/* What the account may have in a device's memory. */
static uint64_t device_limit(const struct account *account)
{
	const uint64_t limit = atomic_load_explicit(&account->device_limit_bytes, memory_order_relaxed);
	return limit == 0 ? UINT64_MAX : limit;
}

void account_set_limits(struct account *account, uint64_t bytes, uint64_t device_bytes)
{
	atomic_store_explicit(&account->limit_bytes, bytes, memory_order_relaxed);
	atomic_store_explicit(&account->device_limit_bytes, device_bytes, memory_order_relaxed);
	for (struct account *device = atomic_load_explicit(&account->devices, memory_order_acquire); device != NULL; device = device->next)
		atomic_store_explicit(&device->limit_bytes, device_limit(account), memory_order_relaxed);
}

struct account *account_ref(struct account *account)
{
	(void)atomic_fetch_add_explicit(account->parent == NULL ? &account->refs : &account->parent->refs, 1, memory_order_relaxed);
	return account;
}

static void account_destroy(struct account *account)
{
	struct account *device = atomic_load_explicit(&account->devices, memory_order_acquire);
	while (device != NULL) {
		struct account *next = device->next;
		account_destroy(device);
		device = next;
	}
	assert(atomic_load(&account->used_bytes) == 0);
	if (account->parent == NULL)
		account_unref(account->above);
	free(account->name);
	free(account);
}

void account_unref(struct account *account)
{
	if (account == NULL)
		return;
	struct account *counted = account->parent == NULL ? account : account->parent;
	if (atomic_fetch_sub_explicit(&counted->refs, 1, memory_order_acq_rel) == 1)
		account_destroy(counted);
}

static struct account *account_find(struct account *account, const struct memory *memory)
{
	struct account *device = atomic_load_explicit(&account->devices, memory_order_acquire);
	while (device != NULL && device->memory != memory)
		device = device->next;
	return device;
}

struct account *account_on(struct account *account, struct memory *memory)
{
	static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
	struct account *device = account->memory == memory ? account : account_find(account, memory);
	if (device != NULL)
		return device;
	struct account *above = account->above == NULL ? NULL : account_on(account->above, memory);
	if (account->above != NULL && above == NULL)
		return NULL;
	(void)pthread_mutex_lock(&making);
	device = account_find(account, memory);
	if (device == NULL && (device = account_create(memory, device_limit(account))) != NULL) {
		device->parent = account;
		device->above = above;
		device->next = atomic_load_explicit(&account->devices, memory_order_relaxed);
		atomic_store_explicit(&account->devices, device, memory_order_release);
	}
	(void)pthread_mutex_unlock(&making);
	return device;
}

struct account *buffer_payer(const struct buffer *buffer)
{
	return buffer->account->parent == NULL ? buffer->account : buffer->account->parent;
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

static opd_status refuse_charge(struct account *account, uint64_t bytes, uint64_t used, uint64_t limit, opd_error *error)
{
	const struct memory *memory = account->memory;
	struct account *owner = account->parent == NULL ? account : account->parent;
	(void)atomic_fetch_add_explicit(&account->refused, 1, memory_order_relaxed);
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s memory%s%s: %" PRIu64 " bytes wanted, %" PRIu64 " of at most %" PRIu64 " in use",
	                owner->name == NULL ? "session" : owner->name, memory->device != 0 ? " on " : "", memory->device != 0 ? memory->name : "", bytes, used,
	                limit);
}

/* Its own part, and that of whom it belongs to. */
static opd_status charge_accounts(struct account *account, uint64_t bytes, opd_error *error)
{
	uint64_t used;
	uint64_t limit = atomic_load_explicit(&account->limit_bytes, memory_order_relaxed);
	if (!charge(&account->used_bytes, limit, bytes, &used))
		return refuse_charge(account, bytes, used, limit, error);
	if (account->above == NULL)
		return OPD_OK;
	limit = atomic_load_explicit(&account->above->limit_bytes, memory_order_relaxed);
	if (charge(&account->above->used_bytes, limit, bytes, &used))
		return OPD_OK;
	(void)atomic_fetch_sub_explicit(&account->used_bytes, bytes, memory_order_relaxed);
	return refuse_charge(account->above, bytes, used, limit, error);
}

static void release_accounts(struct account *account, uint64_t bytes)
{
	if (account->above != NULL)
		(void)atomic_fetch_sub_explicit(&account->above->used_bytes, bytes, memory_order_relaxed);
	(void)atomic_fetch_sub_explicit(&account->used_bytes, bytes, memory_order_relaxed);
}

opd_status account_charge(struct account *account, uint64_t bytes, opd_error *error)
{
	uint64_t used;
	struct memory *memory = account->memory;
	opd_status status = charge_accounts(account, bytes, error);
	if (status != OPD_OK)
		return status;
	const uint64_t limit = atomic_load_explicit(&memory->limit_bytes, memory_order_relaxed);
	if (charge_daemon(account, bytes, limit, &used))
		return OPD_OK;
	release_accounts(account, bytes);
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s memory: %" PRIu64 " bytes wanted, %" PRIu64 " of at most %" PRIu64 " in use", memory->name, bytes, used,
	                limit);
}

void account_release(struct account *account, uint64_t bytes)
{
	(void)atomic_fetch_sub_explicit(&account->memory->used_bytes, bytes, memory_order_relaxed);
	release_accounts(account, bytes);
}

static struct buffer *pool_take(struct memory *memory, unsigned class, uint64_t class_bytes)
{
	latch_lock(&memory->latch);
	struct buffer *buffer = memory->cached[class];
	if (buffer != NULL) {
		memory->cached[class] = buffer->next;
		memory->cached_bytes -= class_bytes;
	}
	latch_unlock(&memory->latch);
	return buffer;
}

/* False: the caller frees it. */
static bool pool_give(struct memory *memory, struct buffer *buffer, uint64_t class_bytes)
{
	bool kept = false;
	/* The ceiling holds for what is resident: cached memory must not push live memory past it. */
	uint64_t used = atomic_load_explicit(&memory->used_bytes, memory_order_relaxed);
	latch_lock(&memory->latch);
	const bool gone = buffer->epoch != atomic_load_explicit(&memory->epoch, memory_order_relaxed); /* with the device's reset */
	/* A device's is freed by its lane alone, when room is made for another. */
	const bool fits = memory->device != 0 ||
	                  (memory->cached_bytes + class_bytes <= memory->cache_limit_bytes &&
	                   used + memory->cached_bytes + class_bytes <= atomic_load_explicit(&memory->limit_bytes, memory_order_relaxed));
	if (fits && !gone) {
		buffer->next = memory->cached[buffer->class];
		memory->cached[buffer->class] = buffer;
		memory->cached_bytes += class_bytes;
		kept = true;
	}
	latch_unlock(&memory->latch);
	if (gone)
		free(buffer);
	return kept || gone;
}

static void *system_map(uint64_t class_bytes)
{
	void *map = mmap(NULL, class_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (map == MAP_FAILED)
		return NULL;
	if (class_bytes >= 2 * MAPPED_BYTES)
		(void)madvise(map, class_bytes, MADV_HUGEPAGE); /* only a wish */
	(void)madvise(map, class_bytes, MADV_DONTDUMP); /* users' data has no place in a core */
	pins_add(map, class_bytes);
	return map;
}

/* What is only cached gives way to what is wanted. */
static opd_status buffer_create(struct memory *memory, unsigned class, uint64_t class_bytes, struct buffer **buffer_out, opd_error *error)
{
	(void)pool_shrink(memory, atomic_load_explicit(&memory->limit_bytes, memory_order_relaxed));
	struct buffer *buffer = calloc(1, sizeof *buffer);
	const bool mapped = memory->device == 0 && class_bytes >= atomic_load_explicit(&memory->mapped_from, memory_order_relaxed);
	void *data = NULL;
	opd_status status = buffer == NULL ? opd_fail(error, OPD_RESOURCE_EXHAUSTED, "tensor memory: out of memory") : OPD_OK;
	if (status == OPD_OK && memory->device != 0) {
		status = memory->source.alloc(memory->source.context, class_bytes, &data, error);
	} else if (status == OPD_OK && (data = mapped ? system_map(class_bytes) : aligned_alloc(OPD_TENSOR_ALIGNMENT, class_bytes)) == NULL) {
		status = opd_fail(error, OPD_RESOURCE_EXHAUSTED, "tensor memory: the system has no %" PRIu64 " bytes", class_bytes);
	}
	if (status != OPD_OK) {
		free(buffer);
		return status;
	}
	buffer->data = data;
	buffer->mapped = mapped;
	buffer->class = (uint16_t)class;
	buffer->device = memory->device;
	*buffer_out = buffer;
	return OPD_OK;
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
		status = buffer_create(account->memory, class, class_bytes, &buffer, error);
	if (status != OPD_OK) {
		account_release(account, bytes);
		return status;
	}
	atomic_store_explicit(&buffer->refs, 1, memory_order_relaxed);
	atomic_store_explicit(&buffer->failed, false, memory_order_relaxed);
	buffer->bytes = bytes + slack_bytes;
	buffer->charged_bytes = bytes;
	buffer->account = account_ref(account);
	buffer->epoch = atomic_load_explicit(&account->memory->epoch, memory_order_relaxed);
	buffer->memory = account->memory;
	*buffer_out = buffer;
	return OPD_OK;
}

/* ---- Mirrors ---- */

/* One for all: it is held for a few instructions, and only where tensors of devices are looked for. */
static pthread_mutex_t mirrors_mutex = PTHREAD_MUTEX_INITIALIZER;

static void age_remove(struct buffer *mirror)
{
	struct memory *memory = mirror->account->memory;
	*(mirror->older == NULL ? &memory->mirrors_first : &mirror->older->newer) = mirror->newer;
	*(mirror->newer == NULL ? &memory->mirrors_last : &mirror->newer->older) = mirror->older;
	mirror->older = mirror->newer = NULL;
}

static void age_append(struct buffer *mirror)
{
	struct memory *memory = mirror->account->memory;
	mirror->older = memory->mirrors_last;
	*(memory->mirrors_last == NULL ? &memory->mirrors_first : &memory->mirrors_last->newer) = mirror;
	memory->mirrors_last = mirror;
}

struct buffer *buffer_on(struct buffer *buffer, uint32_t device)
{
	if (buffer->device == device)
		return buffer_ref(buffer);
	(void)pthread_mutex_lock(&mirrors_mutex);
	struct buffer *mirror = buffer->mirrors;
	while (mirror != NULL && mirror->device != device)
		mirror = mirror->sibling;
	if (mirror != NULL) {
		age_remove(mirror);
		age_append(mirror);
		(void)buffer_ref(mirror);
	}
	(void)pthread_mutex_unlock(&mirrors_mutex);
	return mirror;
}

bool buffer_is_on(const struct buffer *buffer, uint32_t device)
{
	if (buffer->device == device)
		return true;
	(void)pthread_mutex_lock(&mirrors_mutex);
	const struct buffer *mirror = buffer->mirrors;
	while (mirror != NULL && mirror->device != device)
		mirror = mirror->sibling;
	(void)pthread_mutex_unlock(&mirrors_mutex);
	return mirror != NULL;
}

void buffer_add_mirror(struct buffer *buffer, struct buffer *mirror)
{
	(void)pthread_mutex_lock(&mirrors_mutex);
	const struct buffer *there = buffer->mirrors;
	while (there != NULL && there->device != mirror->device)
		there = there->sibling;
	if (there == NULL && buffer->device != mirror->device && mirror->mirror_of == NULL) {
		mirror->mirror_of = buffer;
		mirror->sibling = buffer->mirrors;
		buffer->mirrors = buffer_ref(mirror);
		age_append(mirror);
	}
	(void)pthread_mutex_unlock(&mirrors_mutex);
}

/* Under the lock; the caller drops the reference after it. */
static void mirror_remove(struct buffer *mirror)
{
	struct buffer **link = &mirror->mirror_of->mirrors;
	while (*link != mirror)
		link = &(*link)->sibling;
	*link = mirror->sibling;
	mirror->sibling = mirror->mirror_of = NULL;
	age_remove(mirror);
}

void buffer_drop_mirrors(struct buffer *buffer, const struct buffer *mirror)
{
	struct buffer *dropped = NULL;
	(void)pthread_mutex_lock(&mirrors_mutex);
	for (struct buffer *next, *each = buffer->mirrors; each != NULL; each = next) {
		next = each->sibling;
		if (mirror != NULL && each != mirror)
			continue;
		mirror_remove(each);
		each->sibling = dropped;
		dropped = each;
	}
	(void)pthread_mutex_unlock(&mirrors_mutex);
	while (dropped != NULL) {
		struct buffer *each = dropped;
		dropped = each->sibling;
		each->sibling = NULL;
		buffer_unref(each);
	}
}

bool memory_evict(struct memory *memory)
{
	(void)pthread_mutex_lock(&mirrors_mutex);
	struct buffer *mirror = memory->mirrors_first;
	while (mirror != NULL && atomic_load_explicit(&mirror->refs, memory_order_acquire) != 1)
		mirror = mirror->newer;
	if (mirror != NULL)
		mirror_remove(mirror);
	(void)pthread_mutex_unlock(&mirrors_mutex);
	buffer_unref(mirror);
	return mirror != NULL;
}

/* ---- */

static void recharge(struct buffer *buffer, struct account *account)
{
	struct account *to = account_on(account, buffer->account->memory);
	struct account *before = buffer->account;
	if (to == NULL) /* out of memory: the payer stays */
		return;
	(void)atomic_fetch_add_explicit(&to->used_bytes, buffer->charged_bytes, memory_order_relaxed);
	if (to->above != NULL)
		(void)atomic_fetch_add_explicit(&to->above->used_bytes, buffer->charged_bytes, memory_order_relaxed);
	buffer->account = account_ref(to);
	release_accounts(before, buffer->charged_bytes);
	account_unref(before);
}

void buffer_recharge(struct buffer *buffer, struct account *account)
{
	(void)pthread_mutex_lock(&mirrors_mutex);
	recharge(buffer, account);
	for (struct buffer *mirror = buffer->mirrors; mirror != NULL; mirror = mirror->sibling)
		recharge(mirror, account);
	(void)pthread_mutex_unlock(&mirrors_mutex);
}

/* Whoever has the only reference has nobody to race with: most buffers end without a locked instruction. */
static inline bool reference_ends(_Atomic uint32_t *refs)
{
	return atomic_load_explicit(refs, memory_order_acquire) == 1 || atomic_fetch_sub_explicit(refs, 1, memory_order_acq_rel) == 1;
}

struct buffer *buffer_ref(struct buffer *buffer)
{
	(void)atomic_fetch_add_explicit(&buffer->refs, 1, memory_order_relaxed);
	return buffer;
}

void buffer_unref(struct buffer *buffer)
{
	if (buffer == NULL || !reference_ends(&buffer->refs))
		return;
	struct account *account = buffer->account;
	struct memory *memory = account->memory;
	uint64_t class_bytes = class_bytes_at(buffer->class);
	if (buffer->mirrors != NULL)
		buffer_drop_mirrors(buffer, NULL);
	account_release(account, buffer->charged_bytes);
	buffer->account = NULL;
	if (!pool_give(memory, buffer, class_bytes))
		buffer_destroy(memory, buffer, class_bytes);
	account_unref(account);
}

bool buffer_lost(const struct buffer *buffer)
{
	const struct memory *memory = buffer->memory;
	return buffer->device != 0 && (atomic_load_explicit(&memory->lost, memory_order_acquire) || atomic_load_explicit(&buffer->failed, memory_order_acquire) ||
	                               buffer->epoch != atomic_load_explicit(&memory->epoch, memory_order_acquire));
}

const char *buffer_lost_why(const struct buffer *buffer)
{
	return atomic_load_explicit(&buffer->failed, memory_order_acquire) ? "where what was to write it failed" : "which was lost";
}

/* A job gives back its reference after its part in in_jobs: seen in between it counts as somebody else's. */
bool buffer_shared(const struct buffer *buffer)
{
	const uint32_t refs = atomic_load_explicit(&buffer->refs, memory_order_acquire);
	return refs > 1 + atomic_load_explicit(&buffer->in_jobs, memory_order_acquire);
}
