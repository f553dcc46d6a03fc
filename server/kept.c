#include "server/kept.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "server/derived.h"
#include "server/publications.h"

#define NO_SLOT UINT32_MAX
#define FAILED_MAX 1024 /* remembered failures, so that late references say ABORTED */
#define RESULT_BUCKETS_MIN 64

typedef enum result_state {
	RESULT_PENDING,
	RESULT_SETTLED,
	RESULT_FAILED,
} result_state;

struct kept_output {
	struct msg_handle handle; /* generation 0: not kept */
	uint64_t promised_to;     /* while it is still to come: the request that it is donated to; 0: none */
};

struct kept_result {
	uint64_t request;
	result_state state;
	uint32_t count;
	uint32_t live; /* handles of it not yet freed */
	struct kept_result *next;        /* in its bucket */
	struct kept_result *ended_next;  /* whose waiters are still to be called */
	struct kept_result *failed_next; /* by age */
	struct waiter *waiters;
	struct waiter **waiters_end;
	struct kept_output outputs[]; /* [count] */
};

static _Atomic uint64_t next_tensor_id = 1;

/* ---- Tensors ---- */

struct kept_tensor *kept_tensor_create(opd_dtype dtype, uint32_t rank, const int64_t *shape, uint64_t bytes, struct buffer *buffer)
{
	struct kept_tensor *tensor = calloc(1, sizeof *tensor);
	if (tensor == NULL)
		return NULL;
	tensor->refs = 1;
	tensor->dtype = dtype;
	tensor->rank = rank;
	memcpy(tensor->shape, shape, rank * sizeof shape[0]);
	tensor->bytes = bytes;
	tensor->id = atomic_fetch_add_explicit(&next_tensor_id, 1, memory_order_relaxed);
	tensor->version = 1;
	tensor->buffer = buffer_ref(buffer);
	tensor->memory = buffer_payer(buffer)->memory;
	return tensor;
}

struct kept_tensor *kept_tensor_ref(struct kept_tensor *tensor)
{
	(void)atomic_fetch_add_explicit(&tensor->refs, 1, memory_order_relaxed);
	return tensor;
}

void kept_tensor_unref(struct kept_tensor *tensor)
{
	if (tensor == NULL || atomic_fetch_sub_explicit(&tensor->refs, 1, memory_order_acq_rel) != 1)
		return;
	if (tensor->hold == NULL) /* else the publication has the contents, and may have them longer */
		derived_forget(tensor->memory->derived, tensor->id, tensor->version);
	buffer_unref(tensor->buffer);
	parts_destroy(tensor->parts);
	hold_release(tensor->hold);
	free(tensor);
}

void kept_tensor_changed(struct kept_tensor *tensor)
{
	derived_forget(tensor->memory->derived, tensor->id, tensor->version);
	tensor->version++;
}

/* ---- Slots ---- */

/* A guess must not find a live one: 64 random bits from the system, taken in batches. */
static uint64_t random_generation(void)
{
	static _Thread_local uint64_t batch[32];
	static _Thread_local unsigned left;
	if (left == 0) {
		if (getrandom(batch, sizeof batch, 0) != (ssize_t)sizeof batch)
			abort(); /* never with 256 bytes or less once the system is up */
		left = sizeof batch / sizeof batch[0];
	}
	uint64_t generation = batch[--left];
	return generation == 0 ? 1 : generation;
}

static bool slots_grow(struct kept *kept)
{
	uint32_t room = kept->slot_room == 0 ? 16 : kept->slot_room * 2;
	struct kept_slot *slots = realloc(kept->slots, room * sizeof slots[0]);
	if (slots == NULL)
		return false;
	kept->slots = slots;
	kept->slot_room = room;
	return true;
}

/* Takes the reference. NO_SLOT: out of memory. */
static uint32_t slot_take(struct kept *kept, struct kept_tensor *tensor, uint64_t request, uint32_t output)
{
	uint32_t index = kept->first_free;
	if (index != NO_SLOT) {
		kept->first_free = kept->slots[index].next_free;
	} else {
		if (kept->slot_count == kept->slot_room && !slots_grow(kept))
			return NO_SLOT;
		index = kept->slot_count++;
	}
	uint64_t generation = random_generation();
	kept->slots[index] = (struct kept_slot){.tensor = tensor, .generation = generation, .lineage = generation, .request = request, .output = output};
	return index;
}

static struct kept_slot *slot_find(const struct kept *kept, struct msg_handle handle)
{
	if (handle.index >= kept->slot_count)
		return NULL;
	struct kept_slot *slot = &kept->slots[handle.index];
	return slot->tensor != NULL && slot->generation == handle.generation ? slot : NULL;
}

/* Why a handle names nothing. */
static opd_status no_tensor(const struct kept *kept, struct msg_handle handle, opd_error *error)
{
	const struct kept_slot *slot = handle.index < kept->slot_count ? &kept->slots[handle.index] : NULL;
	if (slot != NULL && slot->tensor != NULL && handle.generation != 0 && slot->donated_generation == handle.generation)
		return opd_fail(error, OPD_FAILED_PRECONDITION, "handle %u.%016" PRIx64 " was donated to request %" PRIu64, (unsigned)handle.index,
		                handle.generation, slot->donated_to);
	return opd_fail(error, OPD_NOT_FOUND, "handle %u.%016" PRIx64 " is no tensor of this session", (unsigned)handle.index, handle.generation);
}

/* A graph's own runs follow one another on its states, lent or not. */
static opd_status check_whole(const struct kept_slot *slot, bool lent, opd_error *error)
{
	if (slot->giving || (slot->lent != NULL && !lent))
		return opd_fail(error, OPD_FAILED_PRECONDITION, "the tensor is donated to request %" PRIu64 ", which hasn't ended", slot->donated_to);
	if (slot->lost_to == 0)
		return OPD_OK;
	return opd_fail(error, OPD_DATA_LOSS, "the tensor is lost: a kernel of request %" PRIu64 " failed while it wrote it", slot->lost_to);
}

/* ---- Results ---- */

/* Ids are the client's choice: unseeded, ids that share a bucket made every look-up walk all of them. */
static uint64_t result_hash(const struct kept *kept, uint64_t request)
{
	uint64_t hash = (request ^ kept->seed) * 0xff51afd7ed558ccdu;
	hash = (hash ^ hash >> 32) * (kept->seed | 1);
	return hash ^ hash >> 29;
}

static struct kept_result **result_link(const struct kept *kept, uint64_t request)
{
	struct kept_result **link = &kept->results[result_hash(kept, request) & kept->result_mask];
	while (*link != NULL && (*link)->request != request)
		link = &(*link)->next;
	return link;
}

static struct kept_result *result_find(const struct kept *kept, uint64_t request)
{
	return kept->results == NULL ? NULL : *result_link(kept, request);
}

static bool results_grow(struct kept *kept)
{
	uint32_t buckets = kept->results == NULL ? RESULT_BUCKETS_MIN : (kept->result_mask + 1) * 2;
	struct kept_result **before = kept->results;
	uint32_t before_buckets = before == NULL ? 0 : kept->result_mask + 1;
	struct kept_result **table = calloc(buckets, sizeof table[0]);
	if (table == NULL)
		return before != NULL; /* a long chain is slow, not wrong */
	if (before == NULL)
		kept->seed = random_generation();
	kept->results = table;
	kept->result_mask = buckets - 1;
	for (uint32_t i = 0; i < before_buckets; i++) {
		while (before[i] != NULL) {
			struct kept_result *result = before[i];
			before[i] = result->next;
			result->next = NULL;
			*result_link(kept, result->request) = result;
		}
	}
	free(before);
	return true;
}

static void result_remove(struct kept *kept, uint64_t request)
{
	struct kept_result **link = result_link(kept, request);
	struct kept_result *result = *link;
	*link = result->next;
	kept->result_count--;
	free(result);
}

static void forget_oldest_failure(struct kept *kept)
{
	struct kept_result *result = kept->failed_first;
	kept->failed_first = result->failed_next;
	if (kept->failed_first == NULL)
		kept->failed_last = NULL;
	kept->failed_count--;
	result_remove(kept, result->request);
}

void kept_init(struct kept *kept, uint32_t limit)
{
	*kept = (struct kept){.first_free = NO_SLOT, .limit = limit};
}

void kept_fini(struct kept *kept)
{
	for (uint32_t i = 0; i < kept->slot_count; i++)
		kept_tensor_unref(kept->slots[i].tensor);
	for (uint32_t i = 0; kept->results != NULL && i <= kept->result_mask; i++) {
		while (kept->results[i] != NULL) {
			struct kept_result *result = kept->results[i];
			kept->results[i] = result->next;
			free(result);
		}
	}
	free(kept->slots);
	free(kept->results);
	kept_init(kept, kept->limit);
}

static opd_status check_limit(const struct kept *kept, uint32_t count, opd_error *error)
{
	if (count > kept->limit - kept->live)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "kept tensors: %u more wanted, %u of at most %u there", (unsigned)count,
		                (unsigned)kept->live, (unsigned)kept->limit);
	return OPD_OK;
}

opd_status kept_expect(struct kept *kept, uint64_t request, uint32_t count, opd_error *error)
{
	opd_status status = check_limit(kept, count, error);
	if (status != OPD_OK)
		return status;
	if ((kept->results == NULL || kept->result_count > 2 * kept->result_mask) && !results_grow(kept))
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "kept tensors: out of memory");
	struct kept_result *result = calloc(1, sizeof *result + count * sizeof result->outputs[0]);
	if (result == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "kept tensors: out of memory");
	result->request = request;
	result->count = count;
	result->waiters_end = &result->waiters;
	*result_link(kept, request) = result;
	kept->result_count++;
	kept->live += count; /* a promise: outputs not kept give theirs back when it is settled */
	return OPD_OK;
}

/* A result's waiters; nothing may free it meanwhile. */
static void call_waiters(struct kept *kept, struct kept_result *result)
{
	struct waiter *waiter = result->waiters;
	result->waiters = NULL;
	while (waiter != NULL) {
		struct waiter *next = waiter->next; /* the waiter's memory may be gone after the call */
		waiter->result = NULL;
		opd_error error;
		bool pending;
		struct kept_tensor *tensor = kept_find_result(kept, result->request, waiter->output, &pending, &error);
		waiter->on_settled(waiter, tensor, tensor == NULL ? &error : NULL);
		waiter = next;
	}
}

static void remember_failure(struct kept *kept, struct kept_result *result)
{
	*(kept->failed_last == NULL ? &kept->failed_first : &kept->failed_last->failed_next) = result;
	kept->failed_last = result;
	kept->failed_count++;
	while (kept->failed_count > FAILED_MAX)
		forget_oldest_failure(kept);
}

/* All have been told: what kept the result from being freed ends. */
static void result_told(struct kept *kept, struct kept_result *result)
{
	if (result->state == RESULT_FAILED)
		remember_failure(kept, result);
	else if (--result->live == 0)
		result_remove(kept, result->request);
}

/* Waiters end requests, which end others: one after the other, never one inside the other. */
static void tell(struct kept *kept, struct kept_result *result)
{
	*(kept->ended_last == NULL ? &kept->ended_first : &kept->ended_last->ended_next) = result;
	kept->ended_last = result;
	if (kept->telling)
		return;
	kept->telling = true;
	while (kept->ended_first != NULL) {
		struct kept_result *ended = kept->ended_first;
		call_waiters(kept, ended);
		kept->ended_first = ended->ended_next;
		if (kept->ended_first == NULL)
			kept->ended_last = NULL;
		result_told(kept, ended);
	}
	kept->telling = false;
}

/* A slot's handle leaves the result that it came from. */
static void slot_leave(struct kept *kept, struct kept_slot *slot, uint32_t index)
{
	struct kept_result *result = slot->request == 0 ? NULL : result_find(kept, slot->request);
	struct msg_handle *handle = result == NULL || slot->output >= result->count ? NULL : &result->outputs[slot->output].handle;
	if (handle == NULL || handle->index != index || handle->generation == 0)
		return;
	handle->generation = 0;
	if (--result->live == 0)
		result_remove(kept, slot->request);
}

/* A tensor that took another's place is its request's output; false: it was freed meanwhile. */
static bool slot_adopt(struct kept *kept, struct msg_handle handle, uint64_t request, uint32_t output)
{
	struct kept_slot *slot = slot_find(kept, handle);
	if (slot == NULL)
		return false;
	slot_leave(kept, slot, handle.index);
	slot->request = request;
	slot->output = output;
	return true;
}

void kept_settle(struct kept *kept, uint64_t request, struct kept_tensor *const *tensors, uint32_t count, struct msg_handle *handles_out)
{
	struct kept_result *result = result_find(kept, request);
	assert(result != NULL && result->state == RESULT_PENDING && result->count == count);
	for (uint32_t i = 0; i < count; i++) {
		if (handles_out[i].generation != 0) {
			kept->live--;
			if (!slot_adopt(kept, handles_out[i], request, i))
				handles_out[i].generation = 0;
			result->outputs[i].handle = handles_out[i];
			result->live += handles_out[i].generation != 0;
			continue;
		}
		uint32_t index = tensors[i] == NULL ? NO_SLOT : slot_take(kept, tensors[i], request, i);
		if (index == NO_SLOT) { /* not kept, or no memory for its slot: then it is gone, and says so when named */
			kept_tensor_unref(tensors[i]);
			kept->live--;
		} else {
			result->outputs[i].handle = (struct msg_handle){index, kept->slots[index].generation};
			result->live++;
		}
		handles_out[i] = result->outputs[i].handle;
	}
	result->state = RESULT_SETTLED;
	result->live++; /* a waiter may free the last handle, and the result with it: it stays until all were called */
	tell(kept, result);
}

void kept_fail(struct kept *kept, uint64_t request)
{
	struct kept_result *result = result_find(kept, request);
	assert(result != NULL && result->state == RESULT_PENDING);
	kept->live -= result->count;
	result->state = RESULT_FAILED;
	tell(kept, result); /* only then remembered as failed, and forgotten again after many others */
}

struct msg_handle kept_add(struct kept *kept, struct kept_tensor *tensor, opd_error *error)
{
	struct msg_handle none = {0, 0};
	if (check_limit(kept, 1, error) != OPD_OK)
		return none;
	uint32_t index = slot_take(kept, tensor, 0, 0);
	if (index == NO_SLOT) {
		(void)opd_fail(error, OPD_RESOURCE_EXHAUSTED, "kept tensors: out of memory");
		return none;
	}
	kept->live++;
	return (struct msg_handle){index, kept->slots[index].generation};
}

struct kept_tensor *kept_find(struct kept *kept, struct msg_handle handle, opd_error *error)
{
	struct kept_tensor *tensor = kept_find_any(kept, handle, error);
	if (tensor == NULL || tensor->parts == NULL)
		return tensor;
	(void)opd_fail(error, OPD_FAILED_PRECONDITION, "handle %u.%016" PRIx64 ": %" PRIu64 " of its %" PRIu64 " bytes are uploaded",
	               (unsigned)handle.index, handle.generation, tensor->parts->received_bytes, tensor->bytes);
	kept_tensor_unref(tensor);
	return NULL;
}

struct kept_tensor *kept_find_any(struct kept *kept, struct msg_handle handle, opd_error *error)
{
	struct kept_slot *slot = slot_find(kept, handle);
	if (slot == NULL)
		(void)no_tensor(kept, handle, error);
	return slot == NULL || check_whole(slot, false, error) != OPD_OK ? NULL : kept_tensor_ref(slot->tensor);
}

/* The handle of a settled result; generation 0 with the error written, or pending. */
static struct msg_handle result_handle(const struct kept *kept, uint64_t request, uint32_t output, bool *pending_out, opd_error *error)
{
	struct msg_handle none = {0, 0};
	const struct kept_result *result = result_find(kept, request);
	*pending_out = false;
	if (result != NULL && result->state == RESULT_FAILED) {
		(void)opd_fail(error, OPD_ABORTED, "request %" PRIu64 ", whose output %u is named, failed", request, (unsigned)output);
		return none;
	}
	if (result != NULL && result->state == RESULT_PENDING && output < result->count) {
		const uint64_t promised_to = result->outputs[output].promised_to;
		*pending_out = promised_to == 0;
		if (promised_to != 0)
			(void)opd_fail(error, OPD_FAILED_PRECONDITION, "result %" PRIu64 ".%u was donated to request %" PRIu64, request, (unsigned)output, promised_to);
		return none;
	}
	if (result == NULL || output >= result->count || result->outputs[output].handle.generation == 0) {
		(void)opd_fail(error, OPD_NOT_FOUND, "result %" PRIu64 ".%u was not kept, or was freed", request, (unsigned)output);
		return none;
	}
	return result->outputs[output].handle;
}

struct kept_tensor *kept_find_result(struct kept *kept, uint64_t request, uint32_t output, bool *pending_out, opd_error *error)
{
	struct msg_handle handle = result_handle(kept, request, output, pending_out, error);
	return handle.generation == 0 ? NULL : kept_find(kept, handle, error);
}

void kept_wait(struct kept *kept, uint64_t request, struct waiter *waiter)
{
	struct kept_result *result = result_find(kept, request);
	assert(result != NULL && result->state == RESULT_PENDING);
	waiter->next = NULL;
	waiter->link = result->waiters_end;
	waiter->result = result;
	*result->waiters_end = waiter;
	result->waiters_end = &waiter->next;
}

bool kept_unwait(struct waiter *waiter)
{
	struct kept_result *result = waiter->result;
	if (result == NULL)
		return false;
	*waiter->link = waiter->next;
	if (waiter->next != NULL)
		waiter->next->link = waiter->link;
	else
		result->waiters_end = waiter->link;
	waiter->result = NULL;
	return true;
}

/* ---- Donations ---- */

uint64_t kept_lineage(const struct kept *kept, struct msg_handle handle, opd_error *error)
{
	const struct kept_slot *slot = slot_find(kept, handle);
	if (slot == NULL)
		(void)no_tensor(kept, handle, error);
	return slot == NULL ? 0 : slot->lineage;
}

struct msg_handle kept_handle(const struct kept *kept, uint64_t request, uint32_t output, opd_error *error)
{
	bool pending;
	struct msg_handle handle = result_handle(kept, request, output, &pending, error);
	if (pending)
		(void)opd_fail(error, OPD_FAILED_PRECONDITION, "result %" PRIu64 ".%u is still to come", request, (unsigned)output);
	return handle;
}

static struct kept_slot *slot_follow(const struct kept *kept, uint32_t index, uint64_t lineage)
{
	struct kept_slot *slot = index < kept->slot_count ? &kept->slots[index] : NULL;
	return slot != NULL && slot->tensor != NULL && slot->lineage == lineage ? slot : NULL;
}

struct kept_tensor *kept_follow(const struct kept *kept, uint32_t index, uint64_t lineage, struct msg_handle *handle_out, opd_error *error)
{
	const struct kept_slot *slot = slot_follow(kept, index, lineage);
	if (slot == NULL)
		(void)opd_fail(error, OPD_NOT_FOUND, "the tensor that it was bound to (index %u) was freed", (unsigned)index);
	if (slot == NULL || check_whole(slot, true, error) != OPD_OK)
		return NULL;
	*handle_out = (struct msg_handle){index, slot->generation};
	return slot->tensor;
}

/* Under another handle. */
static struct msg_handle donate(struct kept *kept, uint32_t index, uint64_t request)
{
	struct kept_slot *slot = &kept->slots[index];
	slot->donated_generation = slot->generation;
	slot->donated_to = request;
	slot->generation = random_generation();
	return (struct msg_handle){index, slot->generation};
}

struct msg_handle kept_give(struct kept *kept, uint32_t index, uint64_t request)
{
	kept->slots[index].giving = true;
	return donate(kept, index, request);
}

void kept_promise(struct kept *kept, uint64_t request, uint32_t output, uint64_t to)
{
	struct kept_result *result = result_find(kept, request);
	assert(result != NULL && result->state == RESULT_PENDING && result->outputs[output].promised_to == 0);
	result->outputs[output].promised_to = to;
}

void kept_unpromise(struct kept *kept, uint64_t request, uint32_t output, uint64_t to)
{
	struct kept_result *result = result_find(kept, request);
	if (result != NULL && output < result->count && result->outputs[output].promised_to == to)
		result->outputs[output].promised_to = 0;
}

struct msg_handle kept_lend(struct kept *kept, uint32_t index, uint64_t request, struct kept_lend *lend)
{
	struct kept_slot *slot = &kept->slots[index];
	*lend = (struct kept_lend){.older = slot->lent, .request = request, .before = slot->generation};
	if (lend->older != NULL)
		lend->older->newer = lend;
	slot->lent = lend;
	const struct msg_handle handle = donate(kept, index, request);
	lend->generation = handle.generation;
	return handle;
}

/* What was lent last gives nothing away. Another one's generation: that was told, by a run that came behind it and has ended. */
static void slot_take_back(struct kept_slot *slot, const struct kept_lend *lend)
{
	if (slot->generation != lend->generation)
		return;
	slot->generation = lend->before;
	slot->donated_generation = lend->older == NULL ? 0 : lend->older->before;
	slot->donated_to = lend->older == NULL ? 0 : lend->older->request;
}

void kept_returned(struct kept *kept, uint32_t index, uint64_t lineage, struct kept_lend *lend, bool given)
{
	struct kept_slot *slot = slot_follow(kept, index, lineage);
	struct kept_lend *newer = lend->newer;
	if (lend->older != NULL)
		lend->older->newer = newer;
	if (newer != NULL)
		newer->older = lend->older;
	else if (slot != NULL)
		slot->lent = lend->older;
	if (given || slot == NULL)
		return;
	if (newer == NULL)
		slot_take_back(slot, lend);
	else if (newer->before == lend->generation)
		newer->before = lend->before;
	if (slot->lent != NULL && slot->lent == newer)
		slot->donated_generation = newer->before;
}

void kept_given(struct kept *kept, struct msg_handle donated)
{
	struct kept_slot *slot = slot_find(kept, donated);
	if (slot != NULL)
		slot->giving = false;
}

void kept_take_back(struct kept *kept, struct msg_handle donated)
{
	struct kept_slot *slot = slot_find(kept, donated);
	if (slot == NULL || slot->donated_generation == 0)
		return;
	slot->generation = slot->donated_generation;
	slot->donated_generation = 0;
}

void kept_replace(struct kept *kept, uint32_t index, uint64_t lineage, struct kept_tensor *tensor)
{
	struct kept_slot *slot = slot_follow(kept, index, lineage);
	kept_tensor_unref(slot == NULL ? tensor : slot->tensor);
	if (slot != NULL)
		slot->tensor = tensor;
}

struct msg_handle kept_exchange(struct kept *kept, struct msg_handle handle, const struct kept_tensor *expected, struct kept_tensor *tensor)
{
	struct kept_slot *slot = slot_find(kept, handle);
	const bool there = slot != NULL && slot->tensor == expected;
	kept_tensor_unref(there ? slot->tensor : tensor);
	if (there)
		slot->tensor = tensor;
	return there ? handle : (struct msg_handle){0, 0};
}

void kept_lose(struct kept *kept, uint32_t index, uint64_t lineage, uint64_t request)
{
	struct kept_slot *slot = slot_follow(kept, index, lineage);
	if (slot != NULL && slot->lost_to == 0) /* else it was lost before it came to this one */
		slot->lost_to = request;
}

opd_status kept_free(struct kept *kept, struct msg_handle handle, opd_error *error)
{
	struct kept_slot *slot = slot_find(kept, handle);
	if (slot == NULL)
		return no_tensor(kept, handle, error);
	if (slot->giving || slot->lent != NULL)
		return check_whole(slot, false, error);
	slot_leave(kept, slot, handle.index);
	kept_tensor_unref(slot->tensor);
	*slot = (struct kept_slot){.next_free = kept->first_free};
	kept->first_free = handle.index;
	kept->live--;
	return OPD_OK;
}

opd_status kept_free_result(struct kept *kept, uint64_t request, uint32_t output, opd_error *error)
{
	bool pending;
	struct msg_handle handle = result_handle(kept, request, output, &pending, error);
	if (handle.generation == 0)
		return pending ? opd_fail(error, OPD_INTERNAL, "result %" PRIu64 ".%u is still to come", request, (unsigned)output)
		               : (opd_status)(error == NULL ? OPD_NOT_FOUND : error->status);
	return kept_free(kept, handle, error);
}
