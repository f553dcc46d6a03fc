/* An input as a sequence of steps of a client: runs with arguments that nearly fit, generated ones that do, chunks in order and out of it, references to
 * results that are there, still to come or neither, raw bytes. */
#include <stdio.h>
#include <stdlib.h>

#include "proto/tensor.h"
#include "server/schema.h"
#include "session.h"

#define OPS_MAX 256u
#define STEPS_MAX 48
#define DIMS_MAX 8u
#define INLINE_MAX 4096u
#define PAYLOAD_MAX 8192u

static struct schema *ops[OPS_MAX];
static uint32_t dim_counts[OPS_MAX]; /* of what Generate takes */
static uint32_t op_count;

void script_learn(const struct msg_reply *reply)
{
	opd_error error;
	for (uint32_t i = 0; op_count == 0 && i < reply->ops.count && i < OPS_MAX; i++)
		if (schema_parse(reply->ops.items[i].schema.data, &ops[i], &error) != OPD_OK)
			fuzz_fail("the daemon's own schema: %s", error.text);
	if (op_count == 0)
		op_count = reply->ops.count < OPS_MAX ? reply->ops.count : OPS_MAX;
}

void script_learn_dims(const struct msg_reply *reply)
{
	for (uint32_t i = 0; i < op_count; i++)
		if (strcmp(reply->op.name.data, ops[i]->name) == 0)
			dim_counts[i] = reply->op.dim_count < DIMS_MAX ? reply->op.dim_count : DIMS_MAX;
}

const struct schema *script_op(uint32_t index)
{
	return index < op_count ? ops[index] : NULL;
}

void script_free(void)
{
	for (uint32_t i = 0; i < op_count; i++)
		schema_destroy(ops[i]);
	op_count = 0;
}

const struct schema *script_pick_op(struct fuzz_input *input)
{
	return ops[fuzz_u8(input) % op_count];
}

void *script_take(struct arena *arena, size_t count, size_t bytes)
{
	void *memory = arena_array(arena, count, bytes);
	if (memory == NULL)
		fuzz_fail("out of memory");
	return memory;
}

/* Mostly small; now and then what overflows. */
static int64_t pick_int(struct fuzz_input *input)
{
	static const int64_t odd[] = {INT64_MAX, INT64_MIN, INT32_MAX, INT32_MIN, 1ll << 32, 1ll << 61, 1ll << 40, -1};
	uint8_t byte = fuzz_u8(input);
	return byte < 240 ? byte % 16 : byte < 248 ? odd[byte - 240] : (int64_t)fuzz_u64(input);
}

static double pick_float(struct fuzz_input *input)
{
	static const double odd[] = {0.0, 1e-5, 1.0, -1.0, 1e308, -1e308, 1e-310, 3e9};
	uint8_t byte = fuzz_u8(input);
	uint64_t bits = byte < 240 ? 0 : fuzz_u64(input);
	double value = odd[byte % 8];
	if (byte >= 240)
		memcpy(&value, &bits, sizeof value);
	return value;
}

static struct msg_text pick_text(struct arena *arena, struct fuzz_input *input)
{
	static const char *const words[] = {"", "f32", "f16", "bf16", "i64", "gelu", "silu", "relu", "mean", "none", "cpu", "native", "cpu:0", "*", "bool", "f8_e5m2"};
	uint8_t byte = fuzz_u8(input);
	size_t bytes;
	if (byte < 224)
		return msg_text(words[byte % 16]);
	const uint8_t *data = fuzz_bytes(input, byte - 223, &bytes);
	return (struct msg_text){arena_text(arena, (const char *)data, bytes), bytes};
}

static void pick_shape(struct fuzz_input *input, struct msg_tensor *tensor)
{
	uint8_t byte = fuzz_u8(input);
	tensor->rank = byte < 250 ? byte % 5 : OPD_RANK_MAX;
	for (uint32_t i = 0; i < tensor->rank; i++)
		tensor->shape[i] = pick_int(input);
	tensor->strided = byte % 7 == 6;
	for (uint32_t i = 0; tensor->strided && i < tensor->rank; i++)
		tensor->strides[i] = pick_int(input);
	if (byte % 11 == 10)
		tensor->byte_offset = (uint64_t)pick_int(input) * 4;
}

/* Bytes that fit the shape where they can. */
static void pick_source(struct arena *arena, struct peer *peer, struct fuzz_input *input, struct msg_tensor *tensor, uint64_t *payload)
{
	uint8_t byte = fuzz_u8(input);
	uint64_t bytes;
	if (!tensor_bytes(tensor->dtype, tensor->rank, tensor->shape, &bytes) || bytes > INLINE_MAX)
		bytes = byte;
	switch (byte % 8) {
	case 0:
	case 1:
	case 2: {
		size_t found;
		const uint8_t *data = fuzz_bytes(input, (size_t)bytes < 64 ? (size_t)bytes : 64, &found);
		uint8_t *copy = script_take(arena, bytes + 1, 1);
		for (uint64_t i = 0; i < bytes; i++)
			copy[i] = found == 0 ? (uint8_t)i : data[i % found];
		tensor->source = MSG_SOURCE_INLINE;
		tensor->inlined.data = copy;
		tensor->inlined.bytes = byte % 31 == 30 ? bytes / 2 : bytes;
		return;
	}
	case 3:
	case 4:
		tensor->source = MSG_SOURCE_PAYLOAD;
		tensor->payload.offset = *payload;
		tensor->payload.bytes = bytes;
		*payload = (*payload + bytes + 63) & ~63ull;
		return;
	case 5:
		tensor->source = MSG_SOURCE_RESULT;
		tensor->result.request = peer->next_id - 1 - fuzz_u8(input) % 4;
		tensor->result.output = byte >> 7;
		tensor->donate = byte % 9 == 0;
		break;
	case 6:
		tensor->source = MSG_SOURCE_HANDLE;
		tensor->donate = byte % 9 == 0;
		if (peer->kept_count != 0 && byte % 4 != 2)
			tensor->handle = peer->kept[byte % (peer->kept_count < PEER_HANDLES ? peer->kept_count : PEER_HANDLES)];
		else
			tensor->handle = peer->handle_count == 0 ? (struct msg_handle){byte, byte} : peer->handles[byte % peer->handle_count].handle;
		break;
	default:
		if (beside_source(peer, tensor, bytes))
			return;
		tensor->source = byte % 3 == 0 ? MSG_SOURCE_SHARED : MSG_SOURCE_NONE;
		tensor->donate = byte % 5 == 0;
		return;
	}
	if (byte % 2 == 0) { /* the whole of it, not a view */
		tensor->dtype = OPD_DTYPE_NONE;
		tensor->rank = 0;
		tensor->strided = false;
		tensor->byte_offset = 0;
	}
}

void script_pick_tensor(struct arena *arena, struct peer *peer, struct fuzz_input *input, struct msg_tensor *tensor, uint64_t *payload)
{
	tensor->dtype = (opd_dtype)(fuzz_u8(input) % OPD_DTYPE_COUNT);
	if (tensor->dtype == OPD_DTYPE_NONE)
		tensor->dtype = OPD_f32;
	pick_shape(input, tensor);
	pick_source(arena, peer, input, tensor, payload);
}

/* An argument of the parameter's type, now and then of another. */
void script_pick_arg(struct arena *arena, struct peer *peer, struct fuzz_input *input, schema_type type, struct msg_arg *arg, uint64_t *payload)
{
	uint8_t byte = fuzz_u8(input);
	arg->kind = byte < 240 ? (msg_arg_kind)schema_type_kind(type) : (msg_arg_kind)(byte % 8);
	if (byte % 8 == 7 && schema_type_optional(type))
		arg->kind = MSG_ARG_NONE;
	arg->count = arg->kind == MSG_ARG_TENSOR ? 1 : byte % 4;
	switch (arg->kind) {
	case MSG_ARG_NONE:
		break;
	case MSG_ARG_TENSOR:
	case MSG_ARG_TENSORS:
		arg->tensor = script_take(arena, arg->count, sizeof arg->tensor[0]);
		for (uint32_t i = 0; i < arg->count; i++)
			script_pick_tensor(arena, peer, input, &arg->tensor[i], payload);
		break;
	case MSG_ARG_INT:
		arg->i = pick_int(input);
		break;
	case MSG_ARG_INTS: {
		int64_t *ints = script_take(arena, arg->count, sizeof ints[0]);
		for (uint32_t i = 0; i < arg->count; i++)
			ints[i] = pick_int(input);
		arg->ints = ints;
		break;
	}
	case MSG_ARG_FLOAT:
		arg->f = pick_float(input);
		break;
	case MSG_ARG_BOOL:
		arg->b = byte % 2 != 0;
		break;
	case MSG_ARG_STR:
		arg->str = pick_text(arena, input);
		break;
	}
}

static void pick_options(struct arena *arena, const struct peer *peer, struct fuzz_input *input, struct msg_run *run, uint32_t results)
{
	uint8_t byte = fuzz_u8(input);
	struct msg_output_option *options = script_take(arena, results, sizeof options[0]);
	for (uint32_t i = 0; i < results; i++)
		options[i] = (struct msg_output_option){.keep = byte % 2 != 0, .no_copy = byte % 3 == 0};
	run->outputs = options;
	run->output_count = byte < 250 ? results : 0;
	run->explain = byte % 5 == 0;
	run->inline_results = byte % 7 == 0;
	run->retry = byte % 11 == 0;
	run->mode = byte % 13 == 0 ? MSG_DRY : byte % 17 == 0 ? MSG_FAKE : MSG_RUN;
	run->strict = byte % 19 == 0;
	run->timeout_us = byte % 23 == 0 ? byte : 0;
	if (byte % 3 == 1) {
		struct msg_text *names = script_take(arena, 2, sizeof names[0]);
		names[0] = pick_text(arena, input);
		names[1] = msg_text("native");
		run->priority = (struct msg_list){true, byte % 4, names};
		run->priority.count = run->priority.count > 2 ? 2 : run->priority.count;
	}
	if (byte % 29 == 28)
		run->device = pick_text(arena, input);
	beside_run(peer, run, options);
}

static void send_zeros(struct peer *peer, uint64_t bytes)
{
	static const uint8_t zeros[PAYLOAD_MAX];
	for (; bytes > 0; bytes -= bytes < sizeof zeros ? bytes : sizeof zeros)
		peer_send(peer, zeros, bytes < sizeof zeros ? (size_t)bytes : sizeof zeros);
}

uint64_t script_send_run(struct peer *peer, const struct msg_request *request, uint64_t payload, bool chunked)
{
	payload += beside_payload(peer);
	chunked = chunked && payload != 0 && peer->half_count < PEER_HALF_SENT;
	uint64_t id = peer_request(peer, request, chunked ? FRAME_CHUNKED : 0, payload);
	if (id == 0)
		return 0;
	if (!chunked) {
		send_zeros(peer, payload);
		return id;
	}
	peer->half[peer->half_count].id = id;
	peer->half[peer->half_count].bytes = payload;
	peer->half[peer->half_count++].sent = 0;
	return id;
}

static void step_run(struct arena *arena, struct peer *peer, struct fuzz_input *input)
{
	const struct schema *op = script_pick_op(input);
	struct msg_request request = {.kind = MSG_REQUEST_RUN, .run.op = msg_text(op->name)};
	uint8_t byte = fuzz_u8(input);
	uint64_t payload = 0;
	uint32_t count = byte < 240 ? op->param_count : byte % (op->param_count + 2);
	request.run.args = script_take(arena, count, sizeof request.run.args[0]);
	request.run.arg_count = count;
	for (uint32_t i = 0; i < count; i++)
		script_pick_arg(arena, peer, input, i < op->param_count ? op->params[i].type : SCHEMA_INT, &request.run.args[i], &payload);
	pick_options(arena, peer, input, &request.run, op->result_count);
	(void)script_send_run(peer, &request, payload, byte % 4 == 3);
}

void script_pick_generate(struct arena *arena, struct fuzz_input *input, struct msg_generate *generate)
{
	const uint32_t index = fuzz_u8(input) % op_count;
	const uint8_t byte = fuzz_u8(input);
	*generate = (struct msg_generate){.op = msg_text(ops[index]->name), .keep = true};
	generate->dtype = (opd_dtype)(fuzz_u8(input) % OPD_DTYPE_COUNT);
	generate->values = byte % 3;
	generate->variant = byte % 5;
	generate->seed = byte;
	/* The op's own defaults would take most of an execution to fill. */
	int64_t *dims = script_take(arena, DIMS_MAX, sizeof dims[0]);
	for (uint32_t i = 0; i < DIMS_MAX; i++) {
		dims[i] = pick_int(input);
		if (byte >= 32)
			dims[i] = (int64_t)((uint64_t)dims[i] % 8 + 1);
	}
	generate->dims = dims;
	generate->dim_count = byte < 32 ? byte % DIMS_MAX : dim_counts[index];
}

const struct schema *script_find_op(struct msg_text name)
{
	for (uint32_t i = 0; i < op_count; i++)
		if (strcmp(ops[i]->name, name.data) == 0)
			return ops[i];
	return NULL;
}

/* Arguments made by the daemon, so that kernels run on what they accept, extreme values among them. */
static void step_generated(struct arena *arena, struct peer *peer, struct fuzz_input *input)
{
	struct msg_request request = {.kind = MSG_REQUEST_GENERATE};
	script_pick_generate(arena, input, &request.generate);
	const struct schema *op = script_find_op(request.generate.op);
	peer_wait(peer, peer_request(peer, &request, 0, 0));
	if (peer->handle_count == 0)
		return;
	struct msg_request run = {.kind = MSG_REQUEST_RUN, .run.op = msg_text(op->name)};
	run.run.args = script_take(arena, peer->handle_count + 1, sizeof run.run.args[0]);
	for (uint32_t i = 0; i < peer->handle_count; i++) {
		struct msg_arg *arg = &run.run.args[run.run.arg_count++];
		*arg = (struct msg_arg){.name = msg_text(peer->handles[i].param), .kind = MSG_ARG_TENSOR, .count = 1};
		arg->tensor = script_take(arena, 1, sizeof arg->tensor[0]);
		arg->tensor->source = MSG_SOURCE_HANDLE;
		arg->tensor->handle = peer->handles[i].handle;
	}
	uint64_t payload = 0;
	uint32_t extra = fuzz_u8(input) % (op->param_count + 1);
	if (extra < op->param_count && schema_type_kind(op->params[extra].type) != OPD_ARG_TENSOR) {
		struct msg_arg *arg = &run.run.args[run.run.arg_count++];
		script_pick_arg(arena, peer, input, op->params[extra].type, arg, &payload);
		arg->name = msg_text(op->params[extra].name);
	}
	pick_options(arena, peer, input, &run.run, op->result_count);
	(void)script_send_run(peer, &run, payload, false);
}

static void step_data(struct peer *peer, struct fuzz_input *input)
{
	uint8_t byte = fuzz_u8(input);
	if (peer->half_count == 0)
		return;
	uint32_t index = byte % peer->half_count;
	uint64_t left = peer->half[index].bytes - peer->half[index].sent;
	uint64_t bytes = byte < 128 ? left : 1 + byte % left;
	uint8_t offset[FRAME_DATA_OFFSET_BYTES];
	frame_store_u64(offset, peer->half[index].sent + (byte >= 250 ? byte : 0)); /* at times out of place */
	peer_frame(peer, FRAME_DATA, peer->half[index].id, 0, offset, sizeof offset, bytes);
	send_zeros(peer, bytes);
	peer->half[index].sent += bytes;
	if (byte >= 250 || peer->half[index].sent == peer->half[index].bytes)
		peer->half[index] = peer->half[--peer->half_count];
}

static void step_abort(struct peer *peer, struct fuzz_input *input)
{
	uint8_t byte = fuzz_u8(input);
	bool half = peer->half_count != 0 && byte < 200;
	uint32_t index = half ? byte % peer->half_count : 0;
	uint64_t id = half ? peer->half[index].id : byte;
	peer_frame(peer, byte % 2 == 0 || half ? FRAME_ABORT : FRAME_CANCEL, id == 0 ? 1 : id, 0, NULL, 0, 0);
	if (half)
		peer->half[index] = peer->half[--peer->half_count];
	for (uint32_t i = 0; !half && i < peer->half_count; i++) /* by chance one of ours */
		if (peer->half[i].id == id)
			peer->half[i] = peer->half[--peer->half_count];
}

static void step_free(struct arena *arena, struct peer *peer, struct fuzz_input *input)
{
	struct msg_request request = {.kind = MSG_REQUEST_FREE};
	uint64_t payload = 0;
	request.free.count = fuzz_u8(input) % 4;
	request.free.tensors = script_take(arena, request.free.count, sizeof request.free.tensors[0]);
	for (uint32_t i = 0; i < request.free.count; i++)
		pick_source(arena, peer, input, &request.free.tensors[i], &payload);
	(void)script_send_run(peer, &request, 0, false);
}

static void step_other(struct arena *arena, struct peer *peer, struct fuzz_input *input)
{
	static const msg_request_kind kinds[] = {
		MSG_REQUEST_PUSH_PRIORITY, MSG_REQUEST_POP_PRIORITY, MSG_REQUEST_SET_PRIORITY, MSG_REQUEST_GET_PRIORITY, MSG_REQUEST_DESCRIBE, MSG_REQUEST_PING,
		MSG_REQUEST_INFO,          MSG_REQUEST_LIST_OPS,     MSG_REQUEST_LIST_PROVIDERS, MSG_REQUEST_DRAIN,      MSG_REQUEST_LOAD_MODULE, MSG_REQUEST_NONE,
	};
	struct msg_request request = {.kind = kinds[fuzz_u8(input) % (sizeof kinds / sizeof kinds[0])]};
	struct msg_text *names = script_take(arena, 2, sizeof names[0]);
	struct msg_priority_entry *entry = script_take(arena, 1, sizeof *entry);
	uint8_t byte = fuzz_u8(input);
	struct msg_text op = byte % 4 == 0 ? pick_text(arena, input) : byte % 4 == 1 ? msg_text("*") : msg_text(script_pick_op(input)->name);
	names[0] = pick_text(arena, input);
	names[1] = msg_text("cpu");
	*entry = (struct msg_priority_entry){.op = op, .list = {byte % 8 != 0, byte % 3, names}};
	switch (request.kind) {
	case MSG_REQUEST_PUSH_PRIORITY:
		request.push = (struct msg_priority_map){byte % 2, entry};
		break;
	case MSG_REQUEST_SET_PRIORITY:
		request.set = (struct msg_set_priority){byte % 5 == 0 ? MSG_SCOPE_SERVER : MSG_SCOPE_SESSION, op, entry->list, byte % 7 == 0 ? byte % 3 : 0};
		break;
	case MSG_REQUEST_GET_PRIORITY:
	case MSG_REQUEST_DESCRIBE:
	case MSG_REQUEST_LOAD_MODULE:
		request.op = op;
		break;
	default:
		break;
	}
	(void)script_send_run(peer, &request, 0, false);
}

/* A request whose envelope nobody encoded; the frame around it is right, and so is what follows. */
static void step_envelope(struct peer *peer, struct fuzz_input *input)
{
	size_t bytes;
	uint8_t payload = fuzz_u8(input);
	const uint8_t *envelope = fuzz_bytes(input, fuzz_u8(input), &bytes);
	if (peer->next_id == PEER_IDS)
		return;
	peer_frame(peer, FRAME_REQUEST, peer->next_id++, 0, envelope, bytes, payload);
	send_zeros(peer, payload);
}

static void step_raw(struct peer *peer, struct fuzz_input *input)
{
	size_t bytes;
	const uint8_t *data = fuzz_bytes(input, fuzz_u8(input), &bytes);
	peer->rude = true;
	peer_send(peer, data, bytes);
}

void script_run(struct peer *peer, struct fuzz_input *input)
{
	for (int i = 0; i < STEPS_MAX && input->bytes != 0 && !peer->ended; i++) {
		struct arena arena;
		arena_init(&arena, 64u << 20);
		uint8_t byte = fuzz_u8(input);
		switch (byte >= 224 ? 16 : byte >= 176 ? 17 : byte % 16) {
		case 0:
		case 1:
		case 2:
		case 3:
			step_run(&arena, peer, input);
			break;
		case 4:
		case 5:
		case 6:
			step_generated(&arena, peer, input);
			break;
		case 7:
		case 8:
			step_data(peer, input);
			break;
		case 9:
			step_abort(peer, input);
			break;
		case 10:
			step_free(&arena, peer, input);
			break;
		case 11:
		case 12:
			step_other(&arena, peer, input);
			break;
		case 13:
			step_envelope(peer, input);
			break;
		case 16:
			script_graph(&arena, peer, input);
			break;
		case 17:
			script_tensors(&arena, peer, input);
			break;
		case 14:
			peer_wait(peer, peer->half_count == 0 ? peer->next_id - 1 : 0);
			break;
		default:
			byte = fuzz_u8(input);
			if (byte % 8 == 0)
				step_raw(peer, input);
			else if (byte % 2 == 0 && peer->beside != NULL)
				script_check(&arena, peer, input);
			else
				peer_turn(peer);
		}
		arena_fini(&arena);
	}
}
