/* Steps: a prompt's tokens in chunks, then one token a step, each naming the one before it, whose answer needn't be here yet. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/examples/llama/llama.h"

/* With --stats every so many steps say how long their kernels took: asking all would slow them. */
#define ASK_EVERY 16

uint64_t llama_now_ns(void)
{
	struct timespec now;
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static opd_status no_memory(opd_error *error)
{
	return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "generate: out of memory");
}

/* ---- The cache ---- */

static opd_status upload_blocks(struct llama *llama, int64_t count, opd_error *error)
{
	int32_t *table = malloc((size_t)count * sizeof *table);
	if (table == NULL)
		return no_memory(error);
	for (int64_t i = 0; i < count; i++)
		table[i] = (int32_t)i;
	const opd_operand operand = OPD_OPERAND(OPD_i32, table, 1, count);
	const opd_status status = opd_upload(llama->client, &operand, NULL, &llama->blocks, error);
	free(table);
	return status;
}

opd_status llama_begin(struct llama *llama, int64_t tokens, opd_error *error)
{
	const struct llama_config *config = &llama->config;
	const int64_t blocks = (tokens + LLAMA_BLOCK - 1) / LLAMA_BLOCK;
	opd_status status = upload_blocks(llama, blocks, error);
	const size_t bytes = (size_t)(blocks * LLAMA_BLOCK * config->kv_heads * config->head_dim) * opd_dtype_bytes(llama->dtype);
	void *zeros = calloc(1, bytes);
	if (status == OPD_OK && zeros == NULL)
		status = no_memory(error);
	const opd_operand operand = OPD_OPERAND(llama->dtype, zeros, blocks, LLAMA_BLOCK, config->kv_heads, config->head_dim);
	for (int64_t i = 0; i < config->layers && status == OPD_OK; i++) {
		status = opd_upload(llama->client, &operand, NULL, &llama->layers[i].keys, error);
		if (status == OPD_OK)
			status = opd_upload(llama->client, &operand, NULL, &llama->layers[i].values, error);
	}
	free(zeros);
	llama->length = 0;
	return status == OPD_OK ? llama_graph(llama, 1, &llama->decoding, error) : status;
}

/* ---- Submitting ---- */

static opd_operand host(opd_dtype dtype, const int64_t *shape, const void *data)
{
	return (opd_operand){.struct_bytes = sizeof(opd_operand), .dtype = dtype, .rank = 1, .shape = shape, .data = data};
}

/* ids NULL: the last step's token. */
static opd_status submit(struct llama *llama, uint64_t graph, const int64_t *ids, int64_t count, opd_error *error)
{
	struct llama_step *step = &llama->steps[(llama->first + llama->in_flight) % LLAMA_AHEAD_MAX];
	opd_request_destroy(step->request);
	step->request = opd_request_graph(graph);
	if (step->request == NULL)
		return no_memory(error);
	for (int64_t i = 0; i < count; i++) {
		step->ids[i] = ids == NULL ? 0 : ids[i];
		step->positions[i] = step->slots[i] = llama->length + i;
	}
	step->length = (int32_t)(llama->length + count);
	const opd_operand operands[] = {
		ids != NULL ? host(OPD_i64, &count, step->ids)
	                : (opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_RESULT, .ticket = llama->last},
		host(OPD_i64, &count, step->positions),
		host(OPD_i64, &count, step->slots),
		host(OPD_i32, (const int64_t[]){1}, &step->length),
	};
	for (size_t i = 0; i < sizeof operands / sizeof operands[0]; i++)
		opd_request_tensor(step->request, NULL, &operands[i]);
	opd_request_output(step->request, 0, true, true);
	const uint64_t number = llama->times.decode_tokens + llama->in_flight;
	if (llama->trace || (llama->stats && ids == NULL && number % ASK_EVERY == 0))
		opd_request_explain(step->request, true);
	opd_status status = opd_submit(llama->client, step->request, &step->ticket, error);
	if (status != OPD_OK)
		return status;
	llama->last = step->ticket;
	llama->length += count;
	llama->in_flight++;
	return OPD_OK;
}

/* ---- Taking ---- */

static void show(const struct llama *llama, const opd_graph_explain *explain)
{
	(void)fprintf(stderr, "step at %lld: %u nodes, %llu bytes between them\n", (long long)llama->steps[llama->first].positions[0], explain->node_count,
	              (unsigned long long)explain->arena_bytes);
	for (uint32_t i = 0; i < explain->count; i++)
		(void)fprintf(stderr, "  %-22s %-20s %-10s %8.1f us\n", explain->nodes[i].node, explain->nodes[i].op, explain->nodes[i].provider,
		              (double)explain->nodes[i].explain.kernel_ns / 1e3);
}

static void account(struct llama *llama, const opd_graph_explain *explain, bool decoding)
{
	if (explain == NULL)
		return;
	if (llama->trace)
		show(llama, explain);
	if (!decoding)
		return;
	llama->times.asked_steps++;
	for (uint32_t i = 0; i < explain->count; i++)
		llama->times.kernel_ns += explain->nodes[i].explain.kernel_ns;
}

/* A token stays until the step that reads it is taken; they are freed together, since a free is a round trip. `handle` is the newest's. */
static opd_status let_go(struct llama *llama, opd_handle handle, opd_error *error)
{
	const uint32_t room = sizeof llama->kept / sizeof llama->kept[0];
	llama->kept[llama->kept_count++] = handle;
	if (llama->kept_count < room)
		return OPD_OK;
	const opd_status status = opd_free(llama->client, llama->kept, room - 1, error);
	llama->kept[0] = handle;
	llama->kept_count = 1;
	return status;
}

/* The oldest step's token. */
static opd_status take(struct llama *llama, bool decoding, int64_t *id_out, opd_error *error)
{
	struct llama_step *step = &llama->steps[llama->first];
	opd_result *result;
	opd_status status = opd_wait(llama->client, step->ticket, UINT64_MAX, &result, error);
	if (status == OPD_OK) {
		const opd_tensor *token = opd_result_tensor(result, 0);
		if (token == NULL || token->dtype != OPD_i64 || opd_tensor_data(token) == NULL)
			status = opd_fail(error, OPD_DATA_LOSS, "the daemon's answer has no token");
		else
			*id_out = *(const int64_t *)opd_tensor_data(token);
		account(llama, opd_result_graph(result), decoding);
	}
	const opd_handle handle = result == NULL ? (opd_handle){0} : opd_result_handle(result, 0);
	opd_result_destroy(result);
	step->ticket = 0;
	llama->first = (llama->first + 1) % LLAMA_AHEAD_MAX;
	llama->in_flight--;
	return status == OPD_OK ? let_go(llama, handle, error) : status;
}

opd_status llama_prompt(struct llama *llama, const int64_t *ids, int64_t count, opd_error *error)
{
	const uint64_t begin = llama_now_ns();
	opd_status status = OPD_OK;
	for (int64_t at = 0; at < count && status == OPD_OK; at += LLAMA_CHUNK) {
		const int64_t some = count - at < LLAMA_CHUNK ? count - at : LLAMA_CHUNK;
		uint64_t graph = llama->decoding;
		int64_t unused;
		if (some != 1)
			status = llama_graph(llama, some, &graph, error);
		if (status == OPD_OK)
			status = submit(llama, graph, ids + at, some, error);
		if (status == OPD_OK && at + some < count)
			status = take(llama, false, &unused, error);
		if (some != 1 && status == OPD_OK)
			status = opd_graph_free(llama->client, graph, error);
	}
	llama->times.prompt_ns = 0 - begin; /* until the first token is here */
	llama->times.prompt_tokens = (uint64_t)count;
	return status;
}

opd_status llama_next(struct llama *llama, int64_t more, int64_t *id_out, opd_error *error)
{
	opd_status status = OPD_OK;
	while (status == OPD_OK && (int64_t)llama->in_flight <= more && llama->in_flight < llama->ahead)
		status = submit(llama, llama->decoding, NULL, 1, error);
	return status == OPD_OK ? take(llama, true, id_out, error) : status;
}

void llama_fini(struct llama *llama)
{
	for (unsigned i = 0; i < LLAMA_AHEAD_MAX; i++) {
		if (llama->steps[i].ticket != 0)
			opd_cancel(llama->client, llama->steps[i].ticket);
		opd_request_destroy(llama->steps[i].request);
	}
}
