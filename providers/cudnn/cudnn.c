/* The module `cudnn`: attention of many queries by cuDNN, which is opened when the module is. It runs on the devices, memory and streams of the backend `cuda`, which must be loaded
 * before it. */
#include <cuda_runtime_api.h>
#include <limits.h>
#include <stdlib.h>

#include "providers/cudart.h"
#include "providers/cudnn/attend.h"
#include "uuid/cudnn_attention.h"

enum { SIZE_MAX_HEAD = 128, SIZE_STEP = 8 };

struct cudnn {
	struct library library;
	opd_impl attention;
};

/* Bytes that the engine's copies of tiles need. */
enum { ALIGNMENT = 16 };

static bool accept_layout(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	bool fits = tensor->alignment >= ALIGNMENT && (tensor->shape[3] == 1 || tensor->strides[3] == 1);
	for (uint32_t i = 0; i < 3 && fits; i++)
		fits = tensor->shape[i] == 1 || (tensor->strides[i] % SIZE_STEP == 0 && tensor->strides[i] > 0);
	return fits || OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s has strides [%lld, %lld, %lld, %lld] and is aligned to %u bytes, expected heads that are contiguous at multiples of 16 bytes",
	                          name, (long long)tensor->strides[0], (long long)tensor->strides[1], (long long)tensor->strides[2], (long long)tensor->strides[3],
	                          (unsigned)tensor->alignment);
}

static bool attention_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *query = call->args[0].tensor, *key = call->args[1].tensor, *value = call->args[2].tensor;
	if (query->dtype != OPD_f16 && query->dtype != OPD_bf16)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "query %s, only f16, bf16", opd_dtype_name(query->dtype));
	if (query->dtype == OPD_bf16 && (call->flags & OPD_CALL_ALLOW_TF32) == 0)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "query bf16: weights are rounded to 8 bits before they multiply, only where the request allows TF32");
	if (query->shape[3] % SIZE_STEP != 0 || query->shape[3] > SIZE_MAX_HEAD || query->shape[3] == 0)
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "head size %lld, only multiples of %d up to %d", (long long)query->shape[3], SIZE_STEP, SIZE_MAX_HEAD);
	if (opd_tensor_empty(query) || opd_tensor_empty(key))
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "no query or no key");
	if (call->args[4].b && query->shape[1] != key->shape[1])
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "causal with %lld queries and %lld keys, only as many", (long long)query->shape[1], (long long)key->shape[1]);
	for (uint32_t i = 0; i < 4; i++)
		if (query->shape[i] > INT_MAX || key->shape[i] > INT_MAX)
			return OPD_REFUSE(reason, OPD_REASON_SIZE, "an extent above %d", INT_MAX);
	return accept_layout("query", query, reason) && accept_layout("key", key, reason) && accept_layout("value", value, reason);
}

/* [sequence, token, head, element] read as [sequence, head, token, element]; extents of 1 get the strides of a contiguous tensor. */
static void read_strides(const opd_tensor *tensor, int64_t *strides)
{
	int64_t own[4], step = 1;
	for (uint32_t i = 4; i-- > 0;) {
		own[i] = tensor->shape[i] == 1 ? step : tensor->strides[i];
		step *= tensor->shape[i];
	}
	strides[0] = own[0];
	strides[1] = own[2];
	strides[2] = own[1];
	strides[3] = own[3];
}

static struct attend attend_read(const opd_call *call)
{
	const opd_tensor *query = call->args[0].tensor, *key = call->args[1].tensor;
	struct attend attend = {
		.dtype = query->dtype,
		.causal = call->args[4].b,
		.sequences = query->shape[0],
		.heads = query->shape[2],
		.kv_heads = key->shape[2],
		.queries = query->shape[1],
		.keys = key->shape[1],
		.size = query->shape[3],
	};
	read_strides(query, attend.query_strides);
	read_strides(key, attend.key_strides);
	read_strides(call->args[2].tensor, attend.value_strides);
	read_strides(call->outputs[0], attend.result_strides);
	return attend;
}

static void plan_free(void *data)
{
	attend_plan_destroy(data);
	free(data);
}

static opd_status attention_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason, opd_error *error)
{
	struct cudnn *cudnn = state;
	struct attend attend = attend_read(call);
	int device = 0;
	opd_status status = cudart_status("cudaGetDevice", (int)cudaGetDevice(&device), error);
	struct attend_plan *plan = status == OPD_OK ? calloc(1, sizeof *plan) : NULL;
	if (plan == NULL)
		return status != OPD_OK ? status : opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: no memory for a plan", impl->op);
	status = attend_plan(&cudnn->library, (uint32_t)device, &attend, plan, reason, error);
	if (status != OPD_OK) {
		free(plan);
		return status;
	}
	plan_out->data = plan;
	plan_out->destroy = plan_free;
	plan_out->memory_bytes = 64 << 10; /* a compiled kernel */
	plan_out->scratch_bytes = plan->workspace_bytes;
	return OPD_OK;
}

static opd_status attention_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	(void)state;
	const opd_tensor *query = call->args[0].tensor, *y = call->outputs[0];
	if (y->dtype != query->dtype || !opd_tensor_same_shape(y, query) || !opd_tensor_contiguous(y))
		return opd_fail(error, OPD_INTERNAL, "%s: the result isn't the contiguous %s of query's shape that is written", impl->op, opd_dtype_name(query->dtype));
	opd_status status = cudart_begin(impl, exec, error);
	if (status != OPD_OK)
		return status;
	return attend_run(exec->plan->data, exec->ordinal, opd_tensor_data(query), opd_tensor_data(call->args[1].tensor), opd_tensor_data(call->args[2].tensor),
	                  opd_tensor_data(y), (float)call->args[3].f, exec->scratch, exec->stream, error);
}

static opd_status cudnn_open(const opd_host *host, void *state, opd_error *error)
{
	struct cudnn *cudnn = state;
	const opd_backend *backend;
	void *backend_state;
	library_open(&cudnn->library);
	if (cudnn->library.missing[0] == '\0' && !host->find_backend(host, "cuda", &backend, &backend_state))
		(void)snprintf(cudnn->library.missing, sizeof cudnn->library.missing, "not available: no backend cuda, whose module must be loaded before this one");
	cudnn->attention = (opd_impl){
		.struct_bytes = sizeof(opd_impl),
		.flags = OPD_IMPL_PLAN_MAY_REFUSE,
		.op = "attention",
		.schema = "attention(Tensor query, Tensor key, Tensor value, float scale, bool causal=False) -> Tensor",
		.device = "cuda",
		.unsupported = cudnn->library.missing[0] == '\0' ? NULL : cudnn->library.missing,
		.uuid = OPD_UUID_cudnn_attention,
		.predicate = attention_predicate,
		.plan = attention_plan,
		.run = attention_run,
	};
	return host->register_impl(host, &cudnn->attention, error);
}

static void cudnn_close(const opd_host *host, void *state)
{
	(void)host;
	struct cudnn *cudnn = state;
	library_close(&cudnn->library);
}

static const opd_module module = {
	.abi = OPD_PROVIDER_ABI,
	.struct_bytes = sizeof module,
	.name = "cudnn",
	.version = OPD_VERSION,
	.state_bytes = sizeof(struct cudnn),
	.open = cudnn_open,
	.close = cudnn_close,
};

const opd_module *opd_module_get(void)
{
	return &module;
}
