/* The module `cublaslt`: linear, matmul and scaled_mm by cuBLASLt, which is opened when the module is. It runs on the devices, memory and streams of the backend `cuda`, which must
 * be loaded before it. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "providers/cublaslt/gemm.h"
#include "providers/cublaslt/scale.h"
#include "providers/cudart.h"
#include "uuid/cublaslt_product.h"

enum { IMPLS = 3 };

struct cublaslt {
	struct library library;
	opd_impl impls[IMPLS];
};

static const opd_tensor *tensor_of(const opd_call *call, uint32_t index)
{
	return call->args[index].kind == OPD_ARG_TENSOR ? call->args[index].tensor : NULL;
}

/* ---- linear, matmul ------------------------------------------------------------------------------------------------------- */

typedef bool (*product_read_fn)(const opd_call *call, struct product *product_out, opd_reason *reason);

static product_read_fn reader_of(const opd_impl *impl)
{
	return strcmp(impl->op, "linear") == 0 ? product_of_linear : product_of_matmul;
}

/* Elements from one of y's batches to the next in a factor; false: they aren't at one distance. */
static bool batch_step(const struct product *product, const opd_tensor *factor, int64_t *step_out)
{
	int64_t extent = 1, step = 0;
	for (uint32_t i = 0; i < product->batch_rank; i++) { /* counts from the innermost */
		int64_t length = product->y->shape[product->batch_rank - 1 - i];
		bool there = i + 2 < factor->rank && factor->shape[factor->rank - 3 - i] > 1;
		int64_t stride = there ? factor->strides[factor->rank - 3 - i] : 0;
		if (length == 1)
			continue;
		if (extent == 1)
			step = stride;
		else if (stride != step * extent)
			return false;
		extent *= length;
	}
	*step_out = step;
	return true;
}

static bool accept_bias(const opd_tensor *bias, opd_reason *reason)
{
	if (bias == NULL)
		return true;
	if (!opd_tensor_contiguous(bias))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "bias is strided");
	/* No preference of the library's tells it of less, and some of its algorithms can't do with less. */
	return bias->alignment >= 16 || OPD_REFUSE(reason, OPD_REASON_ALIGNMENT, "bias is aligned to %u bytes, expected 16", (unsigned)bias->alignment);
}

static bool accept_bytes(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	uint32_t bytes = (uint32_t)opd_dtype_bytes(tensor->dtype);
	return tensor->alignment >= bytes || OPD_REFUSE(reason, OPD_REASON_ALIGNMENT, "%s is aligned to %u bytes, expected %u", name, (unsigned)tensor->alignment,
	                                                (unsigned)bytes);
}

static bool gemm_read(const opd_impl *impl, const opd_call *call, struct product *product, struct gemm *gemm, opd_reason *reason)
{
	const opd_dtype dtype = call->args[0].tensor->dtype;
	*gemm = (struct gemm){.factor = dtype, .result = dtype, .tf32 = (call->flags & OPD_CALL_ALLOW_TF32) != 0};
	if (dtype != OPD_f32 && dtype != OPD_f16 && dtype != OPD_bf16 && dtype != OPD_f64)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "%s, only f16, bf16, f32, f64", opd_dtype_name(dtype));
	if (!reader_of(impl)(call, product, reason) || !accept_bias(product->bias, reason))
		return false;
	if (product->depth == 0)
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "a depth of 0");
	if (product->bias != NULL && dtype == OPD_f64)
		return OPD_REFUSE(reason, OPD_REASON_ARGUMENT, "a bias of f64");
	if (!batch_step(product, product->left_tensor, &gemm->left_batch) || !batch_step(product, product->right_tensor, &gemm->right_batch))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "a factor's matrices aren't at one distance");
	if (product->batches > INT_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "%llu products, at most %d", (unsigned long long)product->batches, INT_MAX);
	gemm->bias = product->bias != NULL;
	gemm->left = product->left;
	gemm->right = product->right;
	gemm->rows = product->rows;
	gemm->columns = product->columns;
	gemm->depth = product->depth;
	gemm->batches = (int64_t)product->batches;
	gemm->left_alignment = product->left_tensor->alignment;
	gemm->right_alignment = product->right_tensor->alignment;
	return accept_bytes("the left factor", product->left_tensor, reason) && accept_bytes("the right factor", product->right_tensor, reason);
}

static bool product_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)state;
	struct product product;
	struct gemm gemm;
	return gemm_read(impl, call, &product, &gemm, reason);
}

static opd_status product_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason, opd_error *error)
{
	struct cublaslt *cublaslt = state;
	struct product product;
	struct gemm gemm;
	if (!gemm_read(impl, call, &product, &gemm, reason))
		return OPD_FAILED_PRECONDITION;
	if (opd_tensor_empty(product.y))
		return OPD_OK;
	struct gemm_plan *plan = calloc(1, sizeof *plan);
	if (plan == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: no memory for a plan", impl->op);
	opd_status status = gemm_plan(&cublaslt->library, &gemm, plan, reason, error);
	if (status != OPD_OK) {
		free(plan);
		return status;
	}
	plan_out->data = plan;
	plan_out->destroy = free;
	plan_out->memory_bytes = sizeof *plan;
	plan_out->scratch_bytes = plan->workspace_bytes;
	return OPD_OK;
}

static opd_status product_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	struct cublaslt *cublaslt = state;
	struct product product;
	cublasLtHandle_t handle;
	opd_reason reason;
	if (!reader_of(impl)(call, &product, &reason))
		return opd_fail(error, OPD_INTERNAL, "%s: the operands' layout isn't what the predicate accepted", impl->op);
	opd_status status = product_expect_output(impl, &product, product.left_tensor->dtype, error);
	if (status == OPD_OK)
		status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || product.y->elements == 0)
		return status;
	status = library_handle(&cublaslt->library, exec->ordinal, &handle, error);
	if (status != OPD_OK)
		return status;
	const struct gemm_operands operands = {
		.left = opd_tensor_data(product.left_tensor),
		.right = opd_tensor_data(product.right_tensor),
		.bias = product.bias == NULL ? NULL : opd_tensor_data(product.bias),
		.y = opd_tensor_data(product.y),
		.workspace = exec->scratch,
	};
	return gemm_run(&cublaslt->library, handle, exec->plan->data, &operands, exec->stream, error);
}

/* ---- scaled_mm ------------------------------------------------------------------------------------------------------------- */

enum { SCALED_A, SCALED_B, SCALED_SCALE_A, SCALED_SCALE_B, SCALED_BIAS, SCALED_OUT };

/* Sums that a kernel of ours scales lie at the beginning of the scratch. */
struct scaled_plan {
	struct gemm_plan gemm;
	bool by_kernel;
	uint64_t sums_bytes;
};

/* a and b as the matrix unit wants them: the depth contiguous, everything at multiples of 16 bytes. */
static bool accept_factor(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	const int64_t depth = tensor->shape[1];
	bool dense = tensor->strides[1] == 1 && (tensor->shape[0] == 1 || (tensor->strides[0] >= depth && tensor->strides[0] % 16 == 0));
	if (!opd_tensor_contiguous(tensor) && !dense)
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s has strides [%lld, %lld], its rows must be contiguous at multiples of 16 bytes", name,
		                  (long long)tensor->strides[0], (long long)tensor->strides[1]);
	if (tensor->alignment < 16)
		return OPD_REFUSE(reason, OPD_REASON_ALIGNMENT, "%s is aligned to %u bytes, expected 16", name, (unsigned)tensor->alignment);
	return true;
}

/* So many products of two i8 don't overflow an i32 sum. */
enum { I8_DEPTH_MAX = 131071 };

static bool scaled_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	const opd_tensor *a = tensor_of(call, SCALED_A), *b = tensor_of(call, SCALED_B);
	const int64_t depth = a->shape[1], rows = a->shape[0], columns = b->shape[0];
	if (depth == 0 || depth % 16 != 0 || columns % 16 != 0)
		return OPD_REFUSE(reason, OPD_REASON_SHAPE, "a depth of %lld and %lld columns, both must be multiples of 16", (long long)depth, (long long)columns);
	if (rows > INT_MAX || columns > INT_MAX || depth > INT_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "an extent above %d", INT_MAX);
	if (a->dtype == OPD_i8 && depth > I8_DEPTH_MAX)
		return OPD_REFUSE(reason, OPD_REASON_SIZE, "last dimension of a %lld, of i8 at most %d", (long long)depth, I8_DEPTH_MAX);
	return accept_factor("a", a, reason) && accept_factor("b", b, reason) && accept_bias(tensor_of(call, SCALED_BIAS), reason);
}

static int64_t lead_of(const opd_tensor *tensor)
{
	return tensor->shape[0] > 1 && !opd_tensor_contiguous(tensor) ? tensor->strides[0] : tensor->shape[1];
}

static struct gemm scaled_gemm(const opd_call *call)
{
	const opd_tensor *a = tensor_of(call, SCALED_A), *b = tensor_of(call, SCALED_B);
	return (struct gemm){
		.factor = a->dtype,
		.result = a->dtype == OPD_i8 ? OPD_i32 : OPD_f32,
		.left = {.transposed = false, .lead = lead_of(a)},
		.right = {.transposed = true, .lead = lead_of(b)},
		.rows = a->shape[0],
		.columns = b->shape[0],
		.depth = a->shape[1],
		.batches = 1,
		.left_alignment = a->alignment,
		.right_alignment = b->alignment,
	};
}

/* f8 scaled by the library: one scale for each factor, or one a row of each, contiguous. */
static enum gemm_scales scales_of(const opd_call *call)
{
	const opd_tensor *a = tensor_of(call, SCALED_A), *b = tensor_of(call, SCALED_B);
	const opd_tensor *scale_a = tensor_of(call, SCALED_SCALE_A), *scale_b = tensor_of(call, SCALED_SCALE_B);
	if (a->dtype != OPD_f8_e4m3fn || !opd_tensor_contiguous(scale_a) || !opd_tensor_contiguous(scale_b))
		return GEMM_SCALES_NONE;
	if (scale_a->elements == 1 && scale_b->elements == 1)
		return GEMM_SCALES_ONE;
	if (scale_a->elements == (uint64_t)a->shape[0] && scale_b->elements == (uint64_t)b->shape[0])
		return GEMM_SCALES_ROW;
	return GEMM_SCALES_NONE;
}

static opd_status scaled_make(struct cublaslt *cublaslt, const opd_call *call, struct scaled_plan *plan, opd_reason *reason, opd_error *error)
{
	struct gemm gemm = scaled_gemm(call), inside = gemm;
	inside.scales = scales_of(call);
	inside.result = call->outputs[0]->dtype;
	inside.bias = tensor_of(call, SCALED_BIAS) != NULL;
	opd_status status = OPD_FAILED_PRECONDITION;
	if (inside.scales != GEMM_SCALES_NONE)
		status = gemm_plan(&cublaslt->library, &inside, &plan->gemm, reason, error);
	if (status != OPD_FAILED_PRECONDITION)
		return status;
	plan->by_kernel = true;
	plan->sums_bytes = ((uint64_t)gemm.rows * (uint64_t)gemm.columns * 4 + 255) / 256 * 256;
	return gemm_plan(&cublaslt->library, &gemm, &plan->gemm, reason, error);
}

static opd_status scaled_plan(const opd_impl *impl, void *state, const opd_call *call, opd_plan *plan_out, opd_reason *reason, opd_error *error)
{
	if (opd_tensor_empty(call->outputs[0]))
		return OPD_OK;
	struct scaled_plan *plan = calloc(1, sizeof *plan);
	if (plan == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "%s: no memory for a plan", impl->op);
	opd_status status = scaled_make(state, call, plan, reason, error);
	if (status != OPD_OK) {
		free(plan);
		return status;
	}
	plan_out->data = plan;
	plan_out->destroy = free;
	plan_out->memory_bytes = sizeof *plan;
	plan_out->scratch_bytes = plan->sums_bytes + plan->gemm.workspace_bytes;
	return OPD_OK;
}

static opd_status scale_sums(const opd_call *call, const void *sums, void *stream, opd_error *error)
{
	const opd_tensor *a = tensor_of(call, SCALED_A), *scale_a = tensor_of(call, SCALED_SCALE_A), *scale_b = tensor_of(call, SCALED_SCALE_B);
	const opd_tensor *bias = tensor_of(call, SCALED_BIAS);
	const struct scale_call made = {
		.integers = a->dtype == OPD_i8,
		.sums = sums,
		.rows = a->shape[0],
		.columns = tensor_of(call, SCALED_B)->shape[0],
		.scale_a = opd_tensor_data(scale_a),
		.scale_a_stride = scale_a->elements == 1 ? 0 : scale_a->strides[0],
		.scale_b = opd_tensor_data(scale_b),
		.scale_b_stride = scale_b->elements == 1 ? 0 : scale_b->strides[0],
		.bias = bias == NULL ? NULL : opd_tensor_data(bias),
		.bias_stride = 1,
		.dtype = call->outputs[0]->dtype,
		.y = opd_tensor_data(call->outputs[0]),
	};
	return cudart_status("scaled_mm", scale_launch(&made, stream), error);
}

static opd_status scaled_run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	struct cublaslt *cublaslt = state;
	const opd_tensor *a = tensor_of(call, SCALED_A), *b = tensor_of(call, SCALED_B), *bias = tensor_of(call, SCALED_BIAS), *y = call->outputs[0];
	cublasLtHandle_t handle;
	if (y->dtype != opd_dtype_parse(call->args[SCALED_OUT].str) || y->rank != 2 || y->shape[0] != a->shape[0] || y->shape[1] != b->shape[0] ||
	    !opd_tensor_contiguous(y))
		return opd_fail(error, OPD_INTERNAL, "%s: the result isn't the contiguous %s of [%lld, %lld] that is written", impl->op, call->args[SCALED_OUT].str,
		                (long long)a->shape[0], (long long)b->shape[0]);
	opd_status status = cudart_begin(impl, exec, error);
	if (status != OPD_OK || y->elements == 0)
		return status;
	const struct scaled_plan *plan = exec->plan->data;
	status = library_handle(&cublaslt->library, exec->ordinal, &handle, error);
	if (status != OPD_OK)
		return status;
	const struct gemm_operands operands = {
		.left = opd_tensor_data(a),
		.right = opd_tensor_data(b),
		.bias = bias == NULL ? NULL : opd_tensor_data(bias),
		.scale_left = opd_tensor_data(tensor_of(call, SCALED_SCALE_A)),
		.scale_right = opd_tensor_data(tensor_of(call, SCALED_SCALE_B)),
		.y = plan->by_kernel ? exec->scratch : opd_tensor_data(y),
		.workspace = plan->gemm.workspace_bytes == 0 ? NULL : (unsigned char *)exec->scratch + plan->sums_bytes,
	};
	status = gemm_run(&cublaslt->library, handle, &plan->gemm, &operands, exec->stream, error);
	return status == OPD_OK && plan->by_kernel ? scale_sums(call, exec->scratch, exec->stream, error) : status;
}

/* ---- The module ------------------------------------------------------------------------------------------------------------- */

#define IMPL(name, schema_text, name_predicate, name_plan, name_run)                                                                                     \
	{                                                                                                                                                   \
		.struct_bytes = sizeof(opd_impl), .flags = OPD_IMPL_PLAN_MAY_REFUSE, .op = (name), .schema = (schema_text), .device = "cuda",                   \
		.uuid = OPD_UUID_cublaslt_product, .predicate = (name_predicate), .plan = (name_plan), .run = (name_run),                                       \
	}
static const opd_impl templates[IMPLS] = {
	IMPL("linear", "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", product_predicate, product_plan, product_run),
	IMPL("matmul", "matmul(Tensor a, Tensor b) -> Tensor", product_predicate, product_plan, product_run),
	IMPL("scaled_mm", "scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias=None, str out_dtype=\"bf16\") -> Tensor", scaled_predicate,
         scaled_plan, scaled_run),
};

static opd_status cublaslt_open(const opd_host *host, void *state, opd_error *error)
{
	struct cublaslt *cublaslt = state;
	const opd_backend *backend;
	void *backend_state;
	opd_status status = OPD_OK;
	library_open(&cublaslt->library);
	if (cublaslt->library.missing[0] == '\0' && !host->find_backend(host, "cuda", &backend, &backend_state))
		(void)snprintf(cublaslt->library.missing, sizeof cublaslt->library.missing, "not available: no backend cuda, whose module must be loaded before this one");
	for (size_t i = 0; i < IMPLS && status == OPD_OK; i++) {
		cublaslt->impls[i] = templates[i];
		cublaslt->impls[i].unsupported = cublaslt->library.missing[0] == '\0' ? NULL : cublaslt->library.missing;
		status = host->register_impl(host, &cublaslt->impls[i], error);
	}
	return status;
}

static void cublaslt_close(const opd_host *host, void *state)
{
	(void)host;
	struct cublaslt *cublaslt = state;
	library_close(&cublaslt->library);
}

static const opd_module module = {
	.abi = OPD_PROVIDER_ABI,
	.struct_bytes = sizeof module,
	.name = "cublaslt",
	.version = OPD_VERSION,
	.state_bytes = sizeof(struct cublaslt),
	.open = cublaslt_open,
	.close = cublaslt_close,
};

const opd_module *opd_module_get(void)
{
	return &module;
}
