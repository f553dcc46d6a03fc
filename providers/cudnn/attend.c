#include "providers/cudnn/attend.h"

#include <math.h>

/* Names of tensors; those from VIRTUAL on have no memory. */
enum { UID_QUERY = 1, UID_KEY, UID_VALUE, UID_RESULT, UID_SCALE, UID_MASKED, UID_VIRTUAL };
enum { OPS_MAX = 16, DESCRIPTORS_MAX = 96, CONFIGS_MAX = 8, ALIGNMENT = 16 };

/* A graph while it is built: the first failure stays, and later steps do nothing. */
struct builder {
	struct library *library;
	cudnnStatus_t code;
	cudnnBackendDescriptor_t made[DESCRIPTORS_MAX]; /* all descriptors, freed at the end */
	int made_count;
	cudnnBackendDescriptor_t ops[OPS_MAX];
	int op_count;
	int64_t next_uid;
	int64_t score_dims[4]; /* [sequences, heads, queries, keys] */
};

static void check(struct builder *builder, cudnnStatus_t code)
{
	if (builder->code == CUDNN_STATUS_SUCCESS)
		builder->code = code;
}

static cudnnBackendDescriptor_t descriptor(struct builder *builder, cudnnBackendDescriptorType_t type)
{
	cudnnBackendDescriptor_t made = NULL;
	if (builder->made_count == DESCRIPTORS_MAX)
		builder->code = CUDNN_STATUS_INTERNAL_ERROR;
	if (builder->code == CUDNN_STATUS_SUCCESS)
		check(builder, builder->library->BackendCreateDescriptor(type, &made));
	if (made != NULL)
		builder->made[builder->made_count++] = made;
	return made;
}

static void set(struct builder *builder, cudnnBackendDescriptor_t of, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                const void *values)
{
	if (builder->code == CUDNN_STATUS_SUCCESS)
		check(builder, builder->library->BackendSetAttribute(of, name, type, count, values));
}

static void finalize(struct builder *builder, cudnnBackendDescriptor_t of)
{
	if (builder->code == CUDNN_STATUS_SUCCESS)
		check(builder, builder->library->BackendFinalize(of));
}

/* ---- Tensors ----------------------------------------------------------------------------------------------------------------- */

static cudnnBackendDescriptor_t tensor(struct builder *builder, int64_t uid, cudnnDataType_t type, const int64_t *dims, const int64_t *strides)
{
	cudnnBackendDescriptor_t made = descriptor(builder, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
	const int64_t alignment = ALIGNMENT;
	const bool is_virtual = uid >= UID_VIRTUAL, by_value = uid == UID_SCALE || uid == UID_MASKED;
	set(builder, made, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &uid);
	set(builder, made, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
	set(builder, made, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dims);
	set(builder, made, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, strides);
	set(builder, made, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
	set(builder, made, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual);
	set(builder, made, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &by_value);
	finalize(builder, made);
	return made;
}

/* One of the scores' shape, or with one column, that exists only between two steps. */
static cudnnBackendDescriptor_t between(struct builder *builder, cudnnDataType_t type, bool one_column)
{
	const int64_t *d = builder->score_dims;
	const int64_t dims[4] = {d[0], d[1], d[2], one_column ? 1 : d[3]};
	const int64_t strides[4] = {dims[1] * dims[2] * dims[3], dims[2] * dims[3], dims[3], 1};
	return tensor(builder, builder->next_uid++, type, dims, strides);
}

static cudnnBackendDescriptor_t number(struct builder *builder, int64_t uid)
{
	static const int64_t ones[4] = {1, 1, 1, 1};
	return tensor(builder, uid, CUDNN_DATA_FLOAT, ones, ones);
}

/* ---- Steps -------------------------------------------------------------------------------------------------------------------- */

static void add_op(struct builder *builder, cudnnBackendDescriptor_t op)
{
	finalize(builder, op);
	if (builder->op_count < OPS_MAX)
		builder->ops[builder->op_count++] = op;
	else
		builder->code = CUDNN_STATUS_INTERNAL_ERROR;
}

static void matmul(struct builder *builder, cudnnBackendDescriptor_t a, cudnnBackendDescriptor_t b, cudnnBackendDescriptor_t c)
{
	const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
	cudnnBackendDescriptor_t kind = descriptor(builder, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
	set(builder, kind, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
	finalize(builder, kind);
	cudnnBackendDescriptor_t op = descriptor(builder, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
	set(builder, op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &a);
	set(builder, op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &b);
	set(builder, op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &c);
	set(builder, op, CUDNN_ATTR_OPERATION_MATMUL_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &kind);
	add_op(builder, op);
}

/* y = mode(x, b), b and `chosen` (of BINARY_SELECT) NULL where the mode has none; axis: of GEN_INDEX, else -1. */
static void pointwise(struct builder *builder, cudnnPointwiseMode_t mode, cudnnDataType_t compute, int64_t axis, cudnnBackendDescriptor_t x,
                      cudnnBackendDescriptor_t b, cudnnBackendDescriptor_t chosen, cudnnBackendDescriptor_t y)
{
	cudnnBackendDescriptor_t kind = descriptor(builder, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
	set(builder, kind, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
	set(builder, kind, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &compute);
	if (axis >= 0)
		set(builder, kind, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis);
	finalize(builder, kind);
	cudnnBackendDescriptor_t op = descriptor(builder, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
	set(builder, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &kind);
	set(builder, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &x);
	if (b != NULL)
		set(builder, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &b);
	if (chosen != NULL)
		set(builder, op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &chosen);
	set(builder, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &y);
	add_op(builder, op);
}

static void reduce(struct builder *builder, cudnnReduceTensorOp_t mode, cudnnBackendDescriptor_t x, cudnnBackendDescriptor_t y)
{
	const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
	cudnnBackendDescriptor_t kind = descriptor(builder, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
	set(builder, kind, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &mode);
	set(builder, kind, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
	finalize(builder, kind);
	cudnnBackendDescriptor_t op = descriptor(builder, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
	set(builder, op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &x);
	set(builder, op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &y);
	set(builder, op, CUDNN_ATTR_OPERATION_REDUCTION_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &kind);
	add_op(builder, op);
}

/* Scores of keys past the query's own place become −∞. */
static cudnnBackendDescriptor_t mask_causal(struct builder *builder, cudnnBackendDescriptor_t scores)
{
	cudnnBackendDescriptor_t row = between(builder, CUDNN_DATA_INT32, false), column = between(builder, CUDNN_DATA_INT32, false);
	cudnnBackendDescriptor_t seen = between(builder, CUDNN_DATA_BOOLEAN, false), masked = between(builder, CUDNN_DATA_FLOAT, false);
	pointwise(builder, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_INT32, 2, scores, NULL, NULL, row);
	pointwise(builder, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_INT32, 3, scores, NULL, NULL, column);
	pointwise(builder, CUDNN_POINTWISE_CMP_GE, CUDNN_DATA_BOOLEAN, -1, row, column, NULL, seen);
	pointwise(builder, CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT, -1, scores, number(builder, UID_MASKED), seen, masked);
	return masked;
}

/* The engine recognises a softmax that also gives the logarithm of its sums, wanted or not. */
static void softmax(struct builder *builder, cudnnBackendDescriptor_t scores, cudnnBackendDescriptor_t weights)
{
	cudnnBackendDescriptor_t largest = between(builder, CUDNN_DATA_FLOAT, true), sum = between(builder, CUDNN_DATA_FLOAT, true);
	cudnnBackendDescriptor_t log = between(builder, CUDNN_DATA_FLOAT, true), statistics = between(builder, CUDNN_DATA_FLOAT, true);
	cudnnBackendDescriptor_t lowered = between(builder, CUDNN_DATA_FLOAT, false), raised = between(builder, CUDNN_DATA_FLOAT, false);
	reduce(builder, CUDNN_REDUCE_TENSOR_MAX, scores, largest);
	pointwise(builder, CUDNN_POINTWISE_SUB, CUDNN_DATA_FLOAT, -1, scores, largest, NULL, lowered);
	pointwise(builder, CUDNN_POINTWISE_EXP, CUDNN_DATA_FLOAT, -1, lowered, NULL, NULL, raised);
	reduce(builder, CUDNN_REDUCE_TENSOR_ADD, raised, sum);
	pointwise(builder, CUDNN_POINTWISE_LOG, CUDNN_DATA_FLOAT, -1, sum, NULL, NULL, log);
	pointwise(builder, CUDNN_POINTWISE_ADD, CUDNN_DATA_FLOAT, -1, largest, log, NULL, statistics);
	pointwise(builder, CUDNN_POINTWISE_DIV, CUDNN_DATA_FLOAT, -1, raised, sum, NULL, weights);
}

static void attend_build(struct builder *builder, const struct attend *attend)
{
	const cudnnDataType_t type = attend->dtype == OPD_bf16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_HALF;
	const int64_t *k = attend->key_strides;
	const int64_t query_dims[4] = {attend->sequences, attend->heads, attend->queries, attend->size};
	const int64_t key_dims[4] = {attend->sequences, attend->kv_heads, attend->size, attend->keys}, key_strides[4] = {k[0], k[1], k[3], k[2]};
	const int64_t value_dims[4] = {attend->sequences, attend->kv_heads, attend->keys, attend->size};
	cudnnBackendDescriptor_t query = tensor(builder, UID_QUERY, type, query_dims, attend->query_strides);
	cudnnBackendDescriptor_t key = tensor(builder, UID_KEY, type, key_dims, key_strides);
	cudnnBackendDescriptor_t value = tensor(builder, UID_VALUE, type, value_dims, attend->value_strides);
	cudnnBackendDescriptor_t result = tensor(builder, UID_RESULT, type, query_dims, attend->result_strides);
	cudnnBackendDescriptor_t scores = between(builder, CUDNN_DATA_FLOAT, false), scaled = between(builder, CUDNN_DATA_FLOAT, false);
	cudnnBackendDescriptor_t weights = between(builder, type, false);
	matmul(builder, query, key, scores);
	pointwise(builder, CUDNN_POINTWISE_MUL, CUDNN_DATA_FLOAT, -1, scores, number(builder, UID_SCALE), NULL, scaled);
	softmax(builder, attend->causal ? mask_causal(builder, scaled) : scaled, weights);
	matmul(builder, weights, value, result);
}

/* ---- Plans ---------------------------------------------------------------------------------------------------------------------- */

/* An execution plan of the first engine that makes one; NULL: none does. */
static cudnnBackendDescriptor_t plan_first(struct builder *builder, cudnnHandle_t handle)
{
	struct library *library = builder->library;
	const cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
	cudnnBackendDescriptor_t configs[CONFIGS_MAX], plan = NULL;
	int64_t count = 0;
	cudnnBackendDescriptor_t graph = descriptor(builder, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
	set(builder, graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
	set(builder, graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, builder->op_count, builder->ops);
	finalize(builder, graph);
	cudnnBackendDescriptor_t heuristic = descriptor(builder, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
	set(builder, heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &graph);
	set(builder, heuristic, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
	finalize(builder, heuristic);
	for (int i = 0; i < CONFIGS_MAX; i++)
		configs[i] = descriptor(builder, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
	if (builder->code == CUDNN_STATUS_SUCCESS)
		check(builder, library->BackendGetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, CONFIGS_MAX, &count, configs));
	for (int64_t i = 0; builder->code == CUDNN_STATUS_SUCCESS && i < count && i < CONFIGS_MAX; i++) {
		if (library->BackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &plan) != CUDNN_STATUS_SUCCESS)
			return NULL;
		if (library->BackendSetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle) == CUDNN_STATUS_SUCCESS &&
		    library->BackendSetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &configs[i]) == CUDNN_STATUS_SUCCESS &&
		    library->BackendFinalize(plan) == CUDNN_STATUS_SUCCESS)
			return plan;
		(void)library->BackendDestroyDescriptor(plan);
	}
	return NULL;
}

static opd_status plan_make(struct library *library, cudnnHandle_t handle, const struct attend *attend, struct attend_plan *plan_out, opd_reason *reason)
{
	struct builder builder = {
		.library = library,
		.code = CUDNN_STATUS_SUCCESS,
		.next_uid = UID_VIRTUAL,
		.score_dims = {attend->sequences, attend->heads, attend->queries, attend->keys},
	};
	int64_t bytes = 0, count = 0;
	attend_build(&builder, attend);
	plan_out->library = library;
	plan_out->plan = plan_first(&builder, handle);
	while (builder.made_count > 0)
		(void)library->BackendDestroyDescriptor(builder.made[--builder.made_count]);
	if (plan_out->plan == NULL) {
		opd_reason_set(reason, OPD_REASON_PLAN, "cuDNN has no engine for it: %s", library->GetErrorString(builder.code));
		return OPD_FAILED_PRECONDITION;
	}
	(void)library->BackendGetAttribute(plan_out->plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &count, &bytes);
	plan_out->causal = attend->causal;
	plan_out->workspace_bytes = bytes > 0 ? (uint64_t)bytes : 0;
	return OPD_OK;
}

opd_status attend_plan(struct library *library, uint32_t ordinal, const struct attend *attend, struct attend_plan *plan_out, opd_reason *reason,
                       opd_error *error)
{
	cudnnHandle_t handle;
	(void)pthread_mutex_lock(&library->mutex);
	opd_status status = library_handle(library, ordinal, &handle, error);
	if (status == OPD_OK)
		status = plan_make(library, handle, attend, plan_out, reason);
	(void)pthread_mutex_unlock(&library->mutex);
	return status;
}

void attend_plan_destroy(struct attend_plan *plan)
{
	if (plan->plan != NULL)
		(void)plan->library->BackendDestroyDescriptor(plan->plan);
	plan->plan = NULL;
}

opd_status attend_run(const struct attend_plan *plan, uint32_t ordinal, const void *query, const void *key, const void *value, void *result, float scale,
                      void *workspace, void *stream, opd_error *error)
{
	static float masked = -INFINITY;
	struct builder builder = {.library = plan->library, .code = CUDNN_STATUS_SUCCESS};
	const int64_t uids[] = {UID_QUERY, UID_KEY, UID_VALUE, UID_RESULT, UID_SCALE, UID_MASKED};
	const void *pointers[] = {query, key, value, result, &scale, &masked}; /* numbers are read from the host's memory, now */
	const int64_t count = plan->causal ? 6 : 5; /* the graph has no mask otherwise */
	cudnnHandle_t handle;
	(void)pthread_mutex_lock(&plan->library->mutex);
	opd_status status = library_handle(plan->library, ordinal, &handle, error);
	if (status == OPD_OK) {
		cudnnBackendDescriptor_t pack = descriptor(&builder, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
		set(&builder, pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, count, uids);
		set(&builder, pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, count, pointers);
		if (plan->workspace_bytes > 0)
			set(&builder, pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
		finalize(&builder, pack);
		check(&builder, plan->library->SetStream(handle, stream));
		if (builder.code == CUDNN_STATUS_SUCCESS)
			check(&builder, plan->library->BackendExecute(handle, plan->plan, pack));
		if (pack != NULL)
			(void)plan->library->BackendDestroyDescriptor(pack);
		status = library_status(plan->library, "attention", builder.code, error);
	}
	(void)pthread_mutex_unlock(&plan->library->mutex);
	return status;
}
