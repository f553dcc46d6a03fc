#include "server/isolated_call.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "proto/tensor.h"

struct packed_tensor {
	int32_t dtype;
	uint32_t rank;
	uint32_t alignment;
	uint32_t flags;
	uint64_t elements;
	uint64_t data_at; /* of element 0; 0: no contents */
	uint64_t id;
	uint64_t version;
	uint64_t slot; /* where the contents are, from 1; 0: in the call's memory */
	int64_t shape[OPD_RANK_MAX];
	int64_t strides[OPD_RANK_MAX];
};

struct packed_arg {
	uint32_t kind;
	uint32_t count;
	union {
		int64_t i;
		double f;
		uint64_t at; /* of tensors, ints, a text */
	};
};

/* Lays out, and writes where there is a base: both passes go the same way. */
struct packer {
	struct packing *packing;
	unsigned char *base; /* NULL: only measuring */
	uint64_t at;
	bool full;
};

#define PACKED_BYTES_MAX (1ull << 46)

/* Room for so many bytes, 64-byte aligned. */
static uint64_t take(struct packer *packer, uint64_t bytes)
{
	const uint64_t at = packer->at;
	uint64_t end;
	if (packer->full || !size_add(at, bytes, &end) || !size_align(end, &end) || end > PACKED_BYTES_MAX) {
		packer->full = true;
		return at;
	}
	packer->at = end;
	return at;
}

/* And for a canary behind them. How much scratch it wants is the worker's word. */
static uint64_t take_guarded(struct packer *packer, uint64_t bytes)
{
	uint64_t all;
	packer->full = packer->full || !size_add(bytes, PACKED_CANARY_BYTES, &all);
	return take(packer, packer->full ? 0 : all);
}

static uint64_t put(struct packer *packer, const void *data, uint64_t bytes)
{
	const uint64_t at = take(packer, bytes);
	if (packer->base != NULL && bytes != 0)
		memcpy(packer->base + at, data, bytes);
	return at;
}

uint64_t packed_operand_bytes(const opd_tensor *tensor)
{
	uint64_t end = 0;
	if (opd_tensor_empty(tensor) || !tensor_extent(tensor->dtype, tensor->rank, tensor->shape, tensor->strides, 0, &end))
		return 0;
	return end;
}

static uint64_t result_bytes(const opd_tensor *tensor)
{
	return tensor->elements * opd_dtype_bytes(tensor->dtype); /* checked by bind_outputs */
}

/* From 1; 0: it is copied. */
static uint64_t slot_of(const struct packing *packing, const opd_tensor *tensor)
{
	for (uint32_t i = 0; i < packing->constant_count; i++)
		if (packing->constants[i].tensor == tensor)
			return (uint64_t)packing->constants[i].slot + 1;
	return 0;
}

static void pack_tensor(struct packed_tensor *packed, const opd_tensor *tensor, uint64_t data_at, uint64_t slot)
{
	*packed = (struct packed_tensor){
		.dtype = (int32_t)tensor->dtype,
		.rank = tensor->rank,
		.alignment = tensor->alignment,
		.flags = tensor->flags,
		.elements = tensor->elements,
		.data_at = data_at,
		.id = tensor->id,
		.version = tensor->version,
		.slot = slot,
	};
	memcpy(packed->shape, tensor->shape, tensor->rank * sizeof tensor->shape[0]);
	memcpy(packed->strides, tensor->strides, tensor->rank * sizeof tensor->strides[0]);
}

/* Descriptions first, then each one's bytes. */
static uint64_t put_tensors(struct packer *packer, const opd_tensor *const *tensors, uint32_t count)
{
	const uint64_t at = take(packer, count * sizeof(struct packed_tensor));
	for (uint32_t i = 0; i < count; i++) {
		const uint64_t slot = slot_of(packer->packing, tensors[i]);
		const bool contents = packer->packing->contents && slot == 0;
		const uint64_t data_at = contents ? put(packer, tensors[i]->data == NULL ? NULL : opd_tensor_data(tensors[i]), packed_operand_bytes(tensors[i])) : 0;
		if (packer->base != NULL)
			pack_tensor((struct packed_tensor *)(void *)(packer->base + at) + i, tensors[i], data_at, slot);
	}
	return at;
}

static struct packed_arg pack_arg(struct packer *packer, const opd_arg *arg)
{
	struct packed_arg packed = {.kind = arg->kind, .count = arg->count};
	switch ((opd_arg_kind)arg->kind) {
	case OPD_ARG_TENSOR:
		packed.at = put_tensors(packer, &arg->tensor, 1);
		break;
	case OPD_ARG_TENSORS:
		packed.at = put_tensors(packer, arg->tensors, arg->count);
		break;
	case OPD_ARG_INTS:
		packed.at = put(packer, arg->ints, arg->count * sizeof arg->ints[0]);
		break;
	case OPD_ARG_STR:
		packed.at = put(packer, arg->str, (uint64_t)arg->count + 1);
		break;
	case OPD_ARG_FLOAT:
		packed.f = arg->f;
		break;
	case OPD_ARG_BOOL:
		packed.i = arg->b;
		break;
	case OPD_ARG_INT:
		packed.i = arg->i;
		break;
	case OPD_ARG_NONE:
		break;
	}
	return packed;
}

static void put_canary(struct packer *packer, uint64_t at)
{
	if (packer->base != NULL)
		memset(packer->base + at, PACKED_CANARY, PACKED_CANARY_BYTES);
}

static void pack_outputs(struct packer *packer, uint64_t outputs_at)
{
	const opd_call *call = packer->packing->call;
	packer->packing->results_at = packer->at;
	for (uint32_t i = 0; i < call->output_count; i++) {
		const uint64_t bytes = result_bytes(call->outputs[i]);
		const uint64_t at = packer->packing->contents ? take_guarded(packer, bytes) : 0;
		if (packer->packing->contents && !packer->full)
			put_canary(packer, at + bytes);
		if (packer->base != NULL)
			pack_tensor((struct packed_tensor *)(void *)(packer->base + outputs_at) + i, call->outputs[i], at, 0);
	}
}

static bool pack(struct packing *packing, unsigned char *base)
{
	const opd_call *call = packing->call;
	struct packer packer = {.packing = packing, .base = base};
	const uint64_t head_at = take(&packer, sizeof(struct packed_call));
	const uint64_t args_at = take(&packer, call->arg_count * sizeof(struct packed_arg));
	const uint64_t outputs_at = take(&packer, call->output_count * sizeof(struct packed_tensor));
	for (uint32_t i = 0; i < call->arg_count; i++) {
		const struct packed_arg packed = pack_arg(&packer, &call->args[i]);
		if (base != NULL)
			((struct packed_arg *)(void *)(base + args_at))[i] = packed;
	}
	packing->scratch_at = packing->scratch_bytes == 0 ? 0 : take_guarded(&packer, packing->scratch_bytes);
	if (packing->scratch_bytes != 0 && !packer.full)
		put_canary(&packer, packing->scratch_at + packing->scratch_bytes);
	pack_outputs(&packer, outputs_at);
	packing->bytes = packer.at;
	if (base == NULL)
		return !packer.full;
	struct packed_call *packed = (struct packed_call *)(void *)(base + head_at);
	atomic_store_explicit(&packed->cancelled, 0, memory_order_relaxed);
	packed->impl = packing->impl;
	packed->flags = call->flags;
	packed->arg_count = call->arg_count;
	packed->output_count = call->output_count;
	packed->plan = packing->plan;
	packed->args_at = args_at;
	packed->outputs_at = outputs_at;
	packed->scratch_at = packing->scratch_at;
	packed->scratch_bytes = packing->scratch_bytes;
	return true;
}

bool packing_measure(struct packing *packing)
{
	return pack(packing, NULL);
}

void packing_write(struct packing *packing, unsigned char *base)
{
	(void)pack(packing, base);
}

uint64_t packing_result(const struct packing *packing, uint32_t index, uint64_t *bytes_out)
{
	struct packer packer = {.at = packing->results_at};
	uint64_t at = packer.at;
	for (uint32_t i = 0; i <= index; i++) {
		*bytes_out = result_bytes(packing->call->outputs[i]);
		at = take_guarded(&packer, *bytes_out);
	}
	return at;
}

/* ---- The worker's side ---- */

struct unpacker {
	unsigned char *base;
	unsigned char *const *slots;
	struct arena *arena;
};

static void *data_of(const struct unpacker *unpacker, const struct packed_tensor *packed)
{
	if (packed->slot != 0)
		return unpacker->slots[packed->slot - 1];
	return packed->data_at == 0 ? NULL : unpacker->base + packed->data_at;
}

static void read_tensor(const struct unpacker *unpacker, const struct packed_tensor *packed, opd_tensor *tensor)
{
	*tensor = (opd_tensor){
		.struct_bytes = sizeof *tensor,
		.dtype = (opd_dtype)packed->dtype,
		.rank = packed->rank,
		.shape = packed->shape,
		.strides = packed->strides,
		.data = data_of(unpacker, packed),
		.elements = packed->elements,
		.alignment = packed->alignment,
		.flags = packed->flags,
		.id = packed->id,
		.version = packed->version,
	};
}

/* NULL: out of memory. */
static const opd_tensor *const *read_tensors(const struct unpacker *unpacker, uint64_t at, uint32_t count)
{
	const struct packed_tensor *packed = (const struct packed_tensor *)(const void *)(unpacker->base + at);
	opd_tensor *tensors = arena_array(unpacker->arena, count, sizeof tensors[0]);
	const opd_tensor **list = arena_array(unpacker->arena, count, sizeof list[0]);
	if (tensors == NULL || list == NULL)
		return NULL;
	for (uint32_t i = 0; i < count; i++) {
		read_tensor(unpacker, &packed[i], &tensors[i]);
		list[i] = &tensors[i];
	}
	return list;
}

static bool read_arg(const struct unpacker *unpacker, const struct packed_arg *packed, opd_arg *arg)
{
	*arg = (opd_arg){.kind = packed->kind, .count = packed->count};
	switch ((opd_arg_kind)packed->kind) {
	case OPD_ARG_TENSOR: {
		const opd_tensor *const *list = read_tensors(unpacker, packed->at, 1);
		arg->tensor = list == NULL ? NULL : list[0];
		return list != NULL;
	}
	case OPD_ARG_TENSORS:
		arg->tensors = read_tensors(unpacker, packed->at, packed->count);
		return arg->tensors != NULL;
	case OPD_ARG_INTS:
		arg->ints = (const int64_t *)(const void *)(unpacker->base + packed->at);
		break;
	case OPD_ARG_STR:
		arg->str = (const char *)unpacker->base + packed->at;
		break;
	case OPD_ARG_FLOAT:
		arg->f = packed->f;
		break;
	case OPD_ARG_BOOL:
		arg->b = packed->i != 0;
		break;
	case OPD_ARG_INT:
		arg->i = packed->i;
		break;
	case OPD_ARG_NONE:
		break;
	}
	return true;
}

const opd_call *packed_read(const struct packed_call *packed, unsigned char *base, unsigned char *const slots[PACKED_SLOTS], struct arena *arena)
{
	const struct unpacker unpacker = {base, slots, arena};
	const struct packed_arg *from = (const struct packed_arg *)(const void *)(base + packed->args_at);
	opd_call *call = arena_zalloc(arena, sizeof *call);
	opd_arg *args = arena_array(arena, packed->arg_count, sizeof args[0]);
	const opd_tensor *const *outputs = read_tensors(&unpacker, packed->outputs_at, packed->output_count);
	bool made = call != NULL && args != NULL && outputs != NULL;
	for (uint32_t i = 0; made && i < packed->arg_count; i++)
		made = read_arg(&unpacker, &from[i], &args[i]);
	if (!made)
		return NULL;
	*call = (opd_call){
		.struct_bytes = sizeof *call,
		.flags = packed->flags,
		.arg_count = packed->arg_count,
		.output_count = packed->output_count,
		.args = args,
		.outputs = outputs,
	};
	return call;
}

/* ---- Messages ---- */

void isolated_put(struct isolated_message *message, const char *text)
{
	const size_t room = sizeof message->text - message->text_bytes;
	if (message->text_count == ISOLATED_TEXTS || room == 0)
		return;
	const size_t bytes = strnlen(text, room - 1);
	memcpy(message->text + message->text_bytes, text, bytes);
	message->text[message->text_bytes + bytes] = '\0';
	message->text_bytes += (uint32_t)bytes + 1;
	message->text_count++;
}

const char *isolated_text(const struct isolated_message *message, uint32_t index)
{
	uint32_t at = 0;
	for (uint32_t i = 0; i < index && at < message->text_bytes; i++)
		at += (uint32_t)strlen(message->text + at) + 1;
	return at < message->text_bytes ? message->text + at : "";
}

bool isolated_send(int socket, const struct isolated_message *message, int fd)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = {.iov_base = (void *)message, .iov_len = offsetof(struct isolated_message, text) + message->text_bytes};
	struct msghdr packet = {.msg_iov = &part, .msg_iovlen = 1};
	if (fd >= 0) {
		memset(&control, 0, sizeof control);
		packet.msg_control = control.bytes;
		packet.msg_controllen = sizeof control.bytes;
		struct cmsghdr *head = CMSG_FIRSTHDR(&packet);
		head->cmsg_level = SOL_SOCKET;
		head->cmsg_type = SCM_RIGHTS;
		head->cmsg_len = CMSG_LEN(sizeof fd);
		memcpy(CMSG_DATA(head), &fd, sizeof fd);
	}
	ssize_t sent;
	do
		sent = sendmsg(socket, &packet, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent == (ssize_t)part.iov_len;
}

/* The first descriptor, or -1; others are closed. */
static int take_descriptor(struct msghdr *packet, bool wanted)
{
	int found = -1;
	for (struct cmsghdr *head = CMSG_FIRSTHDR(packet); head != NULL; head = CMSG_NXTHDR(packet, head)) {
		if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS)
			continue;
		const size_t count = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < count; i++) {
			int fd;
			memcpy(&fd, CMSG_DATA(head) + i * sizeof fd, sizeof fd);
			if (wanted && found < 0)
				found = fd;
			else
				(void)close(fd);
		}
	}
	return found;
}

bool isolated_receive(int socket, struct isolated_message *message, int *fd_out)
{
	union {
		char bytes[CMSG_SPACE(4 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = {.iov_base = message, .iov_len = sizeof *message};
	struct msghdr packet = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
	const size_t head = offsetof(struct isolated_message, text);
	ssize_t got;
	do
		got = recvmsg(socket, &packet, MSG_CMSG_CLOEXEC);
	while (got < 0 && errno == EINTR);
	if (got <= 0)
		return false;
	const int fd = take_descriptor(&packet, fd_out != NULL);
	if (fd_out != NULL)
		*fd_out = fd;
	if ((size_t)got < head || message->text_bytes != (size_t)got - head || (message->text_bytes != 0 && message->text[message->text_bytes - 1] != '\0')) {
		message->kind = 0;
		message->text_bytes = 0;
	}
	return true;
}
