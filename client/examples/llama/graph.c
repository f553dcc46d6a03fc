/* A Llama forward pass as a graph of catalogue ops: some tokens of one text in, the next token's id out. The cache's tensors are the graph's states: reshape_and_cache
 * donates them, so a step writes its own rows and copies nothing. */
#include <string.h>

#include "client/examples/llama/llama.h"

struct building {
	struct llama *llama;
	opd_graph *graph;
	int64_t tokens;
	int64_t layer; /* -1: none */
	bool failed;   /* out of memory */
	opd_value positions, slots, length, starts, blocks, rope;
};

/* ---- Operands ---- */

static opd_operand whole(opd_value value)
{
	return (opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_VALUE, .value = value};
}

static opd_operand donated(opd_value value)
{
	opd_operand operand = whole(value);
	operand.donate = true;
	return operand;
}

/* Good until the request has it: the shape is copied then. */
struct view {
	int64_t shape[3];
	int64_t strides[3];
	opd_operand operand;
};

/* `columns` of rows that are `stride` apart, from column `from` on; as [rows, columns], or [rows, heads, columns / heads]. */
static const opd_operand *view_columns(struct view *view, const struct building *b, opd_value value, int64_t rows, int64_t stride, int64_t from, int64_t columns,
                                       int64_t heads)
{
	view->shape[0] = rows;
	view->shape[1] = heads == 0 ? columns : heads;
	view->shape[2] = heads == 0 ? 0 : columns / heads;
	view->strides[0] = stride;
	view->strides[1] = heads == 0 ? 1 : columns / heads;
	view->strides[2] = 1;
	view->operand = whole(value);
	view->operand.dtype = b->llama->dtype;
	view->operand.rank = heads == 0 ? 2 : 3;
	view->operand.shape = view->shape;
	view->operand.strides = view->strides;
	view->operand.byte_offset = (uint64_t)from * opd_dtype_bytes(b->llama->dtype);
	return &view->operand;
}

/* ---- Nodes ---- */

static opd_request *node_begin(struct building *b, const char *op)
{
	opd_request *request = opd_request_create(op);
	b->failed = b->failed || request == NULL;
	return request;
}

static opd_value node_end(struct building *b, const char *name, opd_request *request)
{
	char full[64];
	if (b->layer < 0)
		(void)snprintf(full, sizeof full, "%s", name);
	else
		(void)snprintf(full, sizeof full, "layer%lld.%s", (long long)b->layer, name);
	const opd_value value = opd_graph_node(b->graph, full, request);
	opd_request_destroy(request);
	return value;
}

static opd_value constant(struct building *b, const char *name, opd_handle handle)
{
	char full[64];
	if (b->layer < 0)
		(void)snprintf(full, sizeof full, "%s", name);
	else
		(void)snprintf(full, sizeof full, "layer%lld.%s.weight", (long long)b->layer, name);
	return opd_graph_constant(b->graph, full, handle);
}

static opd_value linear(struct building *b, const char *name, const opd_operand *x, opd_handle weight)
{
	const opd_value w = constant(b, name, weight);
	opd_request *request = node_begin(b, "linear");
	if (request == NULL)
		return w;
	opd_request_tensor(request, NULL, x);
	opd_request_value(request, NULL, w);
	return node_end(b, name, request);
}

/* *x becomes its norm after *residual was added to it, and *residual that sum; both in place. The first norm of all has no residual yet. */
static void norm(struct building *b, const char *name, opd_handle weight, opd_value *x, opd_value *residual)
{
	const opd_value w = constant(b, name, weight);
	const bool first = residual->node == x->node;
	opd_request *request = node_begin(b, first ? "rms_norm" : "fused_add_rms_norm");
	if (request == NULL)
		return;
	if (first) {
		opd_request_value(request, NULL, *x);
	} else {
		const opd_operand operands[] = {donated(*x), donated(*residual)};
		opd_request_tensor(request, NULL, &operands[0]);
		opd_request_tensor(request, NULL, &operands[1]);
	}
	opd_request_value(request, NULL, w);
	opd_request_float(request, "epsilon", b->llama->config.epsilon);
	const opd_value made = node_end(b, name, request);
	*x = made;
	if (!first)
		*residual = opd_value_output(made, 1);
}

/* Queries and keys turned by their positions; the outputs are rows of their own. */
static opd_value rotary(struct building *b, opd_value qkv)
{
	const struct llama_config *config = &b->llama->config;
	const int64_t query = config->heads * config->head_dim, key = config->kv_heads * config->head_dim;
	struct view view;
	opd_request *request = node_begin(b, "rotary_embedding");
	if (request == NULL)
		return qkv;
	opd_request_value(request, NULL, b->positions);
	opd_request_tensor(request, NULL, view_columns(&view, b, qkv, b->tokens, query + 2 * key, 0, query, 0));
	opd_request_tensor(request, NULL, view_columns(&view, b, qkv, b->tokens, query + 2 * key, query, key, 0));
	opd_request_int(request, NULL, config->head_dim);
	opd_request_value(request, NULL, b->rope);
	return node_end(b, "rotary", request);
}

/* Keys and values to their slots; output 0 and 1 are the caches. */
static opd_value cache(struct building *b, opd_value qkv, opd_value turned)
{
	const struct llama_config *config = &b->llama->config;
	const struct llama_layer *layer = &b->llama->layers[b->layer];
	const int64_t query = config->heads * config->head_dim, key = config->kv_heads * config->head_dim;
	char names[2][48];
	(void)snprintf(names[0], sizeof names[0], "layer%lld.keys", (long long)b->layer);
	(void)snprintf(names[1], sizeof names[1], "layer%lld.values", (long long)b->layer);
	const opd_operand caches[] = {donated(opd_graph_state(b->graph, names[0], layer->keys)), donated(opd_graph_state(b->graph, names[1], layer->values))};
	struct view view;
	opd_request *request = node_begin(b, "reshape_and_cache");
	if (request == NULL)
		return qkv;
	opd_request_tensor(request, NULL, view_columns(&view, b, opd_value_output(turned, 1), b->tokens, key, 0, key, config->kv_heads));
	opd_request_tensor(request, NULL, view_columns(&view, b, qkv, b->tokens, query + 2 * key, query + key, key, config->kv_heads));
	opd_request_tensor(request, NULL, &caches[0]);
	opd_request_tensor(request, NULL, &caches[1]);
	opd_request_value(request, NULL, b->slots);
	return node_end(b, "cache", request);
}

static opd_value attention(struct building *b, opd_value turned, opd_value caches)
{
	const struct llama_config *config = &b->llama->config;
	const int64_t query = config->heads * config->head_dim;
	struct view view;
	opd_request *request = node_begin(b, "paged_attention");
	if (request == NULL)
		return turned;
	opd_request_tensor(request, NULL, view_columns(&view, b, turned, b->tokens, query, 0, query, config->heads));
	opd_request_value(request, NULL, caches);
	opd_request_value(request, NULL, opd_value_output(caches, 1));
	opd_request_value(request, NULL, b->blocks);
	opd_request_value(request, NULL, b->length);
	opd_request_value(request, NULL, b->starts);
	opd_request_float(request, "scale", 1.0 / __builtin_sqrt((double)config->head_dim));
	return node_end(b, "attention", request);
}

static void add_layer(struct building *b, opd_value *x, opd_value *residual)
{
	const struct llama_config *config = &b->llama->config;
	const struct llama_layer *layer = &b->llama->layers[b->layer];
	const int64_t query = config->heads * config->head_dim;
	struct view view;
	norm(b, "input_norm", layer->input_norm, x, residual);
	opd_operand operand = whole(*x);
	const opd_value qkv = linear(b, "qkv", &operand, layer->qkv);
	const opd_value turned = rotary(b, qkv);
	const opd_value mixed = attention(b, turned, cache(b, qkv, turned));
	*x = linear(b, "output", view_columns(&view, b, mixed, b->tokens, query, 0, query, 0), layer->output);
	norm(b, "mlp_norm", layer->mlp_norm, x, residual);
	operand = whole(*x);
	const opd_value gate_up = linear(b, "gate_up", &operand, layer->gate_up);
	opd_request *request = node_begin(b, "silu_and_mul");
	if (request == NULL)
		return;
	opd_request_value(request, NULL, gate_up);
	operand = whole(node_end(b, "act", request));
	*x = linear(b, "down", &operand, layer->down);
}

/* Of the last token alone. */
static opd_value next_token(struct building *b, opd_value x)
{
	const struct llama_config *config = &b->llama->config;
	struct view view;
	const opd_operand *last = view_columns(&view, b, x, 1, config->hidden, (b->tokens - 1) * config->hidden, config->hidden, 0);
	const opd_value logits = linear(b, "head", last, b->llama->head);
	opd_request *request = node_begin(b, "argmax");
	if (request == NULL)
		return x;
	opd_request_value(request, NULL, logits);
	return node_end(b, "token", request);
}

static void build(struct building *b, opd_handle starts)
{
	struct llama *llama = b->llama;
	const opd_value ids = opd_graph_input(b->graph, "ids");
	b->positions = opd_graph_input(b->graph, "positions");
	b->slots = opd_graph_input(b->graph, "slots");
	b->length = opd_graph_input(b->graph, "length");
	b->blocks = opd_graph_constant(b->graph, "blocks", llama->blocks);
	b->starts = opd_graph_constant(b->graph, "starts", starts);
	b->rope = opd_graph_constant(b->graph, "rope", llama->rope);
	const opd_value table = opd_graph_constant(b->graph, "table", llama->table);
	opd_request *request = node_begin(b, "embedding");
	if (request == NULL)
		return;
	opd_request_value(request, NULL, ids);
	opd_request_value(request, NULL, table);
	opd_value x = node_end(b, "embedding", request);
	opd_value residual = x;
	for (b->layer = 0; b->layer < llama->config.layers && !b->failed; b->layer++)
		add_layer(b, &x, &residual);
	b->layer = -1;
	norm(b, "norm", llama->norm, &x, &residual);
	opd_graph_output(b->graph, "token", next_token(b, x));
}

opd_status llama_graph(struct llama *llama, int64_t tokens, uint64_t *graph_out, opd_error *error)
{
	struct building b = {.llama = llama, .graph = opd_graph_create(tokens == 1 ? "decode" : "prefill"), .tokens = tokens, .layer = -1};
	const int32_t starts[] = {0, (int32_t)tokens};
	const opd_operand operand = OPD_OPERAND(OPD_i32, starts, 2);
	opd_handle handle;
	if (b.graph == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "graph: out of memory");
	opd_status status = opd_upload(llama->client, &operand, NULL, &handle, error);
	if (status == OPD_OK) {
		build(&b, handle);
		status = b.failed ? opd_fail(error, OPD_RESOURCE_EXHAUSTED, "graph: out of memory") : opd_graph_register(llama->client, b.graph, graph_out, error);
		const opd_status freed = opd_free(llama->client, &handle, 1, status == OPD_OK ? error : NULL); /* the graph has it */
		status = status == OPD_OK ? freed : status;
	}
	opd_graph_destroy(b.graph);
	return status;
}
