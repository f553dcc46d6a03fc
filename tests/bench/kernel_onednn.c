/* oneDNN 2.x by its C API; without its headers, nothing. */
#include "tests/bench/kernel_peers.h"

#if defined(BENCH_ONEDNN)

#include <string.h>

#include <oneapi/dnnl/dnnl.h>

#include "tests/bench/kernel_clock.h"

enum { ARGS = 4 };

/* One primitive with its memory. Everything is oneDNN's own, as a user would have it. */
struct dnn_call {
	struct dnn_call *next; /* runs after this one; NULL: nothing does */
	dnnl_engine_t engine;
	dnnl_stream_t stream;
	dnnl_primitive_desc_t desc;
	dnnl_primitive_t primitive;
	dnnl_exec_arg_t args[ARGS];
	int count;
};

static void dnn_run(void *argument)
{
	for (struct dnn_call *call = argument; call != NULL; call = call->next) {
		(void)dnnl_primitive_execute(call->primitive, call->stream, call->count, call->args);
		(void)dnnl_stream_wait(call->stream);
	}
}

static bool dnn_ok(dnnl_status_t status)
{
	return status == dnnl_success;
}

static dnnl_data_type_t dnn_type(opd_dtype dtype)
{
	return dtype == OPD_f32 ? dnnl_f32 : dtype == OPD_bf16 ? dnnl_bf16 : dtype == OPD_f16 ? dnnl_f16 : dnnl_data_type_undef;
}

/* Memory of its own, filled with ones of `type` where the layout is plain, else with zeros. */
static bool dnn_bind(struct dnn_call *call, int arg, const dnnl_memory_desc_t *desc)
{
	dnnl_memory_t memory;
	void *data;
	if (!dnn_ok(dnnl_memory_create(&memory, desc, call->engine, DNNL_MEMORY_ALLOCATE)))
		return false;
	call->args[call->count++] = (dnnl_exec_arg_t){arg, memory};
	if (!dnn_ok(dnnl_memory_get_data_handle(memory, &data)))
		return false;
	size_t bytes = dnnl_memory_desc_get_size(desc);
	if (desc->data_type == dnnl_f32)
		for (size_t i = 0; i < bytes / sizeof(float); i++)
			((float *)data)[i] = 1;
	else
		for (size_t i = 0; i < bytes / sizeof(uint16_t); i++)
			((uint16_t *)data)[i] = desc->data_type == dnnl_bf16 ? 0x3f80 : 0x3c00;
	return true;
}

static bool dnn_bind_query(struct dnn_call *call, int arg, dnnl_query_t query, int index)
{
	const dnnl_memory_desc_t *desc = dnnl_primitive_desc_query_md(call->desc, query, index);
	return desc != NULL && dnn_bind(call, arg, desc);
}

static bool dnn_make(struct dnn_call *call, const_dnnl_op_desc_t desc, const_dnnl_primitive_attr_t attr)
{
	return dnn_ok(dnnl_primitive_desc_create(&call->desc, desc, attr, call->engine, NULL)) &&
	       dnn_ok(dnnl_primitive_create(&call->primitive, call->desc));
}

static bool dnn_plain(dnnl_memory_desc_t *desc, int rank, const int64_t *dims, dnnl_data_type_t type)
{
	dnnl_dims_t extents;
	for (int i = 0; i < rank; i++)
		extents[i] = dims[i];
	return dnn_ok(dnnl_memory_desc_init_by_tag(desc, rank, extents, type, rank == 2 ? dnnl_ab : rank == 3 ? dnnl_abc : dnnl_a));
}

static bool make_linear(struct dnn_call *call, const struct peer_case *peer, dnnl_data_type_t type)
{
	const int64_t *d = peer->dims;
	dnnl_memory_desc_t x, weight, y;
	dnnl_dims_t extents = {d[2], d[1]};
	dnnl_inner_product_desc_t desc;
	return dnn_plain(&x, 2, (int64_t[]){d[0], d[1]}, type) && dnn_plain(&y, 2, (int64_t[]){d[0], d[2]}, type) &&
	       dnn_ok(dnnl_memory_desc_init_by_tag(&weight, 2, extents, type, dnnl_format_tag_any)) &&
	       dnn_ok(dnnl_inner_product_forward_desc_init(&desc, dnnl_forward_inference, &x, &weight, NULL, &y)) &&
	       dnn_make(call, &desc, NULL) && dnn_bind(call, DNNL_ARG_SRC, &x) &&
	       dnn_bind_query(call, DNNL_ARG_WEIGHTS, dnnl_query_weights_md, 0) && dnn_bind(call, DNNL_ARG_DST, &y);
}

static bool make_matmul(struct dnn_call *call, const struct peer_case *peer, dnnl_data_type_t type)
{
	const int64_t *d = peer->dims;
	dnnl_memory_desc_t a, b, y;
	dnnl_matmul_desc_t desc;
	return dnn_plain(&a, 3, (int64_t[]){d[0], d[1], d[2]}, type) && dnn_plain(&b, 3, (int64_t[]){d[0], d[2], d[3]}, type) &&
	       dnn_plain(&y, 3, (int64_t[]){d[0], d[1], d[3]}, type) && dnn_ok(dnnl_matmul_desc_init(&desc, &a, &b, NULL, &y)) &&
	       dnn_make(call, &desc, NULL) && dnn_bind(call, DNNL_ARG_SRC, &a) && dnn_bind(call, DNNL_ARG_WEIGHTS, &b) &&
	       dnn_bind(call, DNNL_ARG_DST, &y);
}

static bool make_softmax(struct dnn_call *call, const struct peer_case *peer, dnnl_data_type_t type)
{
	dnnl_memory_desc_t x;
	dnnl_softmax_desc_t desc;
	return dnn_plain(&x, 2, peer->dims, type) && dnn_ok(dnnl_softmax_forward_desc_init(&desc, dnnl_forward_inference, &x, 1)) &&
	       dnn_make(call, &desc, NULL) && dnn_bind(call, DNNL_ARG_SRC, &x) && dnn_bind(call, DNNL_ARG_DST, &x);
}

static bool make_layer_norm(struct dnn_call *call, const struct peer_case *peer, dnnl_data_type_t type)
{
	dnnl_memory_desc_t x, scale;
	dnnl_layer_normalization_desc_t desc;
	return dnn_plain(&x, 2, peer->dims, type) && dnn_plain(&scale, 2, (int64_t[]){2, peer->dims[1]}, dnnl_f32) &&
	       dnn_ok(dnnl_layer_normalization_forward_desc_init(&desc, dnnl_forward_inference, &x, NULL, 1e-5F, dnnl_use_scaleshift)) &&
	       dnn_make(call, &desc, NULL) && dnn_bind(call, DNNL_ARG_SRC, &x) && dnn_bind(call, DNNL_ARG_SCALE_SHIFT, &scale) &&
	       dnn_bind(call, DNNL_ARG_DST, &x);
}

static bool make_eltwise(struct dnn_call *call, const struct peer_case *peer, dnnl_data_type_t type, dnnl_alg_kind_t kind)
{
	dnnl_memory_desc_t x;
	dnnl_eltwise_desc_t desc;
	return dnn_plain(&x, 2, peer->dims, type) && dnn_ok(dnnl_eltwise_forward_desc_init(&desc, dnnl_forward_inference, kind, &x, 1, 0)) &&
	       dnn_make(call, &desc, NULL) && dnn_bind(call, DNNL_ARG_SRC, &x) && dnn_bind(call, DNNL_ARG_DST, &x);
}

static bool make_binary(struct dnn_call *call, const struct peer_case *peer, dnnl_data_type_t type, dnnl_alg_kind_t kind)
{
	dnnl_memory_desc_t x;
	dnnl_binary_desc_t desc;
	return dnn_plain(&x, 2, peer->dims, type) && dnn_ok(dnnl_binary_desc_init(&desc, kind, &x, &x, &x)) && dnn_make(call, &desc, NULL) &&
	       dnn_bind(call, DNNL_ARG_SRC_0, &x) && dnn_bind(call, DNNL_ARG_SRC_1, &x) && dnn_bind(call, DNNL_ARG_DST, &x);
}

/* To what opd's generator casts to. */
static bool make_cast(struct dnn_call *call, const struct peer_case *peer, dnnl_data_type_t type)
{
	dnnl_memory_desc_t x, y;
	return dnn_plain(&x, 2, peer->dims, type) && dnn_plain(&y, 2, peer->dims, type == dnnl_bf16 ? dnnl_f32 : dnnl_bf16) &&
	       dnn_ok(dnnl_reorder_primitive_desc_create(&call->desc, &x, call->engine, &y, call->engine, NULL)) &&
	       dnn_ok(dnnl_primitive_create(&call->primitive, call->desc)) && dnn_bind(call, DNNL_ARG_SRC, &x) && dnn_bind(call, DNNL_ARG_DST, &y);
}

/* Ops of "rows,hidden" that are one primitive with an algorithm's name. */
struct dnn_wide {
	const char *op;
	bool (*make)(struct dnn_call *call, const struct peer_case *peer, dnnl_data_type_t type, dnnl_alg_kind_t kind);
	dnnl_alg_kind_t kind;
};

static bool make_any(struct dnn_call *call, const struct peer_case *peer)
{
	static const struct dnn_wide wide[] = {
		{"silu", make_eltwise, dnnl_eltwise_swish},      {"sigmoid", make_eltwise, dnnl_eltwise_logistic},
		{"relu", make_eltwise, dnnl_eltwise_relu},       {"gelu", make_eltwise, dnnl_eltwise_gelu_erf},
		{"add", make_binary, dnnl_binary_add},           {"sub", make_binary, dnnl_binary_sub},
		{"mul", make_binary, dnnl_binary_mul},           {"silu_and_mul", make_eltwise, dnnl_eltwise_swish},
		{"mul_and_silu", make_eltwise, dnnl_eltwise_swish}, {"gelu_and_mul", make_eltwise, dnnl_eltwise_gelu_erf},
	};
	dnnl_data_type_t type = dnn_type(peer->dtype);
	if (type == dnnl_data_type_undef)
		return false;
	if (strcmp(peer->op, "linear") == 0 && peer->dim_count == 3)
		return make_linear(call, peer, type);
	if (strcmp(peer->op, "matmul") == 0 && peer->dim_count == 4)
		return make_matmul(call, peer, type);
	if (peer->dim_count != 2)
		return false;
	if (strcmp(peer->op, "softmax") == 0)
		return make_softmax(call, peer, type);
	if (strcmp(peer->op, "layer_norm") == 0)
		return make_layer_norm(call, peer, type);
	if (strcmp(peer->op, "cast") == 0)
		return make_cast(call, peer, type);
	for (size_t i = 0; i < sizeof wide / sizeof wide[0]; i++)
		if (strcmp(peer->op, wide[i].op) == 0)
			return wide[i].make(call, peer, type, wide[i].kind);
	return false;
}

static void dnn_free(struct dnn_call *call)
{
	for (int i = 0; i < call->count; i++)
		(void)dnnl_memory_destroy(call->args[i].memory);
	if (call->primitive != NULL)
		(void)dnnl_primitive_destroy(call->primitive);
	if (call->desc != NULL)
		(void)dnnl_primitive_desc_destroy(call->desc);
}

double peer_onednn_ns(const struct peer_case *peer)
{
	static dnnl_engine_t engine;
	static dnnl_stream_t stream;
	if (stream == NULL && (!dnn_ok(dnnl_engine_create(&engine, dnnl_cpu, 0)) ||
	                       !dnn_ok(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags))))
		return -1;
	struct dnn_call call = {.engine = engine, .stream = stream}, product = call;
	bool made = make_any(&call, peer);
	/* A gated activation is two primitives, on halves that lie apart: with rows of both, or with the product as a post-op, it takes oneDNN 2.6 sixty times as long. */
	if (made && (strstr(peer->op, "_and_mul") != NULL || strstr(peer->op, "mul_and_") != NULL)) {
		call.next = &product;
		made = make_binary(&product, peer, dnn_type(peer->dtype), dnnl_binary_mul);
	}
	double ns = made ? clock_median(dnn_run, &call) : -1;
	dnn_free(&call);
	dnn_free(&product);
	return ns;
}

#else

double peer_onednn_ns(const struct peer_case *peer)
{
	(void)peer;
	return -1;
}

#endif
