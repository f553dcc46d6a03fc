#include "providers/cublaslt/gemm.h"

#include <cuda_runtime_api.h>
#include <float.h>
#include <string.h>

#include "providers/cudart.h"

enum { CANDIDATES = 16, ROUNDS = 5, RIGHTS = 4 };
/* Times candidates take: short ones over and over, until a host that launches or a cache that is warm doesn't show. */
static const double timed_products = 4e10, cache_bytes = 64e6;
enum { TIMED_MOST = 24, TIMED_LEAST = 2 };
/* A plan is made for whoever asks, dry runs too, with the whole device and with memory that no ledger knows: of larger products, or on more memory, the library's first choice is taken
 * untried, and no further candidate is tried once those before have taken so long. */
static const double trial_products_max = 0x1p42, trial_bytes_max = 4e9, trial_ms_max = 2000;
/* What the library recommends for Hopper; split sums of few-row products live there. */
static const uint64_t workspace_max = 32u << 20;

static cudaDataType_t type_of(opd_dtype dtype)
{
	switch (dtype) {
	case OPD_f16:
		return CUDA_R_16F;
	case OPD_bf16:
		return CUDA_R_16BF;
	case OPD_f64:
		return CUDA_R_64F;
	case OPD_f8_e4m3fn:
		return CUDA_R_8F_E4M3;
	case OPD_i8:
		return CUDA_R_8I;
	case OPD_i32:
		return CUDA_R_32I;
	default:
		return CUDA_R_32F;
	}
}

static cublasComputeType_t compute_of(const struct gemm *gemm)
{
	if (gemm->factor == OPD_f64)
		return CUBLAS_COMPUTE_64F;
	if (gemm->factor == OPD_i8)
		return CUBLAS_COMPUTE_32I;
	return gemm->factor == OPD_f32 && gemm->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
}

static cudaDataType_t scalar_of(opd_dtype factor)
{
	return factor == OPD_f64 ? CUDA_R_64F : factor == OPD_i8 ? CUDA_R_32I : CUDA_R_32F;
}

static const void *scalar(opd_dtype factor, bool one)
{
	static const double doubles[] = {0, 1};
	static const float floats[] = {0, 1};
	static const int32_t integers[] = {0, 1};
	return factor == OPD_f64 ? (const void *)&doubles[one] : factor == OPD_i8 ? (const void *)&integers[one] : (const void *)&floats[one];
}

/* ---- Descriptions ---------------------------------------------------------------------------------------------------------- */

/* The library's first failure. */
struct attempt {
	struct library *library;
	cublasStatus_t code;
};

static void attribute(struct attempt *attempt, cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t name, const void *value, size_t bytes)
{
	if (attempt->code == CUBLAS_STATUS_SUCCESS)
		attempt->code = attempt->library->MatmulDescSetAttribute(desc, name, value, bytes);
}

/* A description that the library made, as a value: it is a struct of numbers that may be copied. */
static void product_make(struct attempt *attempt, const struct gemm *gemm, cublasLtMatmulDescOpaque_t *made)
{
	const cublasOperation_t right = gemm->right.transposed ? CUBLAS_OP_T : CUBLAS_OP_N, left = gemm->left.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
	const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
	const cudaDataType_t bias = type_of(gemm->result);
	const int32_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
	cublasLtMatmulDesc_t desc = NULL;
	attempt->code = attempt->library->MatmulDescCreate(&desc, compute_of(gemm), scalar_of(gemm->factor));
	if (attempt->code != CUBLAS_STATUS_SUCCESS)
		return;
	attribute(attempt, desc, CUBLASLT_MATMUL_DESC_TRANSA, &right, sizeof right);
	attribute(attempt, desc, CUBLASLT_MATMUL_DESC_TRANSB, &left, sizeof left);
	if (gemm->bias) {
		attribute(attempt, desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
		attribute(attempt, desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias, sizeof bias);
	}
	if (gemm->scales == GEMM_SCALES_ROW) {
		attribute(attempt, desc, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode, sizeof mode);
		attribute(attempt, desc, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode, sizeof mode);
	}
	*made = *desc;
	(void)attempt->library->MatmulDescDestroy(desc);
}

static void layout_make(struct attempt *attempt, const struct gemm *gemm, opd_dtype dtype, int64_t rows, int64_t columns, int64_t lead, int64_t batch,
                        cublasLtMatrixLayoutOpaque_t *made)
{
	const int32_t batches = (int32_t)gemm->batches;
	cublasLtMatrixLayout_t layout = NULL;
	if (attempt->code == CUBLAS_STATUS_SUCCESS)
		attempt->code = attempt->library->MatrixLayoutCreate(&layout, type_of(dtype), (uint64_t)rows, (uint64_t)columns, lead);
	if (attempt->code != CUBLAS_STATUS_SUCCESS)
		return;
	attempt->code = attempt->library->MatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batches, sizeof batches);
	if (attempt->code == CUBLAS_STATUS_SUCCESS)
		attempt->code = attempt->library->MatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &batch, sizeof batch);
	*made = *layout;
	(void)attempt->library->MatrixLayoutDestroy(layout);
}

static void plan_describe(struct attempt *attempt, const struct gemm *gemm, struct gemm_plan *plan)
{
	product_make(attempt, gemm, &plan->product);
	layout_make(attempt, gemm, gemm->factor, gemm->right.transposed ? gemm->depth : gemm->columns, gemm->right.transposed ? gemm->columns : gemm->depth,
	            gemm->right.lead, gemm->right_batch, &plan->right);
	layout_make(attempt, gemm, gemm->factor, gemm->left.transposed ? gemm->rows : gemm->depth, gemm->left.transposed ? gemm->depth : gemm->rows, gemm->left.lead,
	            gemm->left_batch, &plan->left);
	layout_make(attempt, gemm, gemm->result, gemm->columns, gemm->rows, gemm->columns, gemm->rows * gemm->columns, &plan->y);
	plan->factor = gemm->factor;
	plan->result = gemm->result;
	plan->bias = gemm->bias;
	plan->scales = gemm->scales;
}

/* ---- Candidates --------------------------------------------------------------------------------------------------------------- */

static uint32_t at_most_16(uint32_t alignment)
{
	return alignment < 16 ? alignment : 16;
}

static int candidates_get(struct attempt *attempt, cublasLtHandle_t handle, const struct gemm *gemm, struct gemm_plan *plan,
                          cublasLtMatmulHeuristicResult_t *candidates)
{
	struct library *library = attempt->library;
	const uint32_t right = at_most_16(gemm->right_alignment), left = at_most_16(gemm->left_alignment);
	cublasLtMatmulPreference_t preference = NULL;
	int count = 0;
	if (attempt->code == CUBLAS_STATUS_SUCCESS)
		attempt->code = library->MatmulPreferenceCreate(&preference);
	if (attempt->code != CUBLAS_STATUS_SUCCESS)
		return 0;
	(void)library->MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_max, sizeof workspace_max);
	(void)library->MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &right, sizeof right);
	(void)library->MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &left, sizeof left);
	attempt->code = library->MatmulAlgoGetHeuristic(handle, &plan->product, &plan->right, &plan->left, &plan->y, &plan->y, preference, CANDIDATES, candidates,
	                                                &count);
	(void)library->MatmulPreferenceDestroy(preference);
	return count;
}

/* Memory of the operands' sizes, to time candidates on. */
struct trial {
	struct gemm_operands operands;
	const void *rights[RIGHTS]; /* taken in turns: weights don't lie in the cache when a model comes back to them */
	int right_count;
	int times;
	void *memory[6 + RIGHTS];
	size_t memory_count;
	cudaStream_t stream;
	cudaEvent_t start, end;
};

static void trial_fini(struct trial *trial)
{
	if (trial->stream != NULL) {
		(void)cudaStreamSynchronize(trial->stream);
		(void)cudaStreamDestroy(trial->stream);
	}
	if (trial->start != NULL)
		(void)cudaEventDestroy(trial->start);
	if (trial->end != NULL)
		(void)cudaEventDestroy(trial->end);
	while (trial->memory_count > 0)
		(void)cudaFree(trial->memory[--trial->memory_count]);
	(void)cudaGetLastError();
}

static void *trial_memory(struct trial *trial, int64_t elements, opd_dtype dtype)
{
	void *memory = NULL;
	size_t bytes = ((size_t)elements * opd_dtype_bytes(dtype) + 255) / 256 * 256 + 256;
	if (elements < 0 || cudaMalloc(&memory, bytes) != cudaSuccess)
		return NULL;
	trial->memory[trial->memory_count++] = memory;
	/* 0x3f3f… is 0.75 in 16 and 32 bits, 1.875 in f8: neither the zeros nor the NaNs that would let a chip run faster. */
	return cudaMemsetAsync(memory, 0x3f, bytes, trial->stream) == cudaSuccess ? memory : NULL;
}

static int64_t factor_elements(const struct product_matrix *matrix, int64_t rows, int64_t columns, int64_t batches, int64_t step)
{
	return (batches - 1) * step + (matrix->transposed ? columns : rows) * matrix->lead;
}

static const void *trial_factor(struct trial *trial, int64_t elements, opd_dtype dtype, uint32_t alignment)
{
	unsigned char *memory = trial_memory(trial, elements, dtype);
	return memory == NULL || alignment >= 16 ? memory : memory + alignment;
}

static bool trial_is_small(const struct gemm *gemm)
{
	const double left = (double)factor_elements(&gemm->left, gemm->rows, gemm->depth, gemm->batches, gemm->left_batch);
	const double right = (double)factor_elements(&gemm->right, gemm->depth, gemm->columns, gemm->batches, gemm->right_batch);
	const double results = (double)gemm->batches * (double)gemm->rows * (double)gemm->columns;
	const double bytes = (left + right) * (double)opd_dtype_bytes(gemm->factor) + results * (double)opd_dtype_bytes(gemm->result);
	return results * (double)gemm->depth <= trial_products_max && bytes <= trial_bytes_max;
}

static bool trial_init(struct trial *trial, const struct gemm *gemm)
{
	struct gemm_operands *operands = &trial->operands;
	if (cudaStreamCreateWithFlags(&trial->stream, cudaStreamNonBlocking) != cudaSuccess || cudaEventCreate(&trial->start) != cudaSuccess ||
	    cudaEventCreate(&trial->end) != cudaSuccess)
		return false;
	/* As badly aligned as the real ones: some algorithms say only when they are run that they can't do with less. */
	operands->left = trial_factor(trial, factor_elements(&gemm->left, gemm->rows, gemm->depth, gemm->batches, gemm->left_batch), gemm->factor, gemm->left_alignment);
	const int64_t right = factor_elements(&gemm->right, gemm->depth, gemm->columns, gemm->batches, gemm->right_batch);
	const double products = (double)gemm->batches * (double)gemm->rows * (double)gemm->columns * (double)gemm->depth;
	trial->times = products * TIMED_LEAST > timed_products ? TIMED_LEAST : products * TIMED_MOST < timed_products ? TIMED_MOST : (int)(timed_products / products);
	do
		trial->rights[trial->right_count] = trial_factor(trial, right, gemm->factor, gemm->right_alignment);
	while (trial->rights[trial->right_count++] != NULL && trial->right_count < RIGHTS &&
	       trial->right_count * (double)right * (double)opd_dtype_bytes(gemm->factor) < cache_bytes);
	operands->right = trial->rights[trial->right_count - 1];
	operands->y = trial_memory(trial, gemm->batches * gemm->rows * gemm->columns, gemm->result);
	operands->bias = trial_memory(trial, gemm->columns, gemm->result);
	operands->scale_left = trial_memory(trial, gemm->rows, OPD_f32);
	operands->scale_right = trial_memory(trial, gemm->columns, OPD_f32);
	operands->workspace = trial_memory(trial, (int64_t)workspace_max, OPD_u8);
	return operands->left != NULL && operands->right != NULL && operands->y != NULL && operands->bias != NULL && operands->scale_left != NULL &&
	       operands->scale_right != NULL && operands->workspace != NULL;
}

/* A graph of some runs; NULL: the candidate can't run. */
static cudaGraphExec_t trial_capture(const struct trial *trial, struct library *library, cublasLtHandle_t handle, const struct gemm_plan *plan)
{
	cudaGraph_t graph = NULL;
	cudaGraphExec_t made = NULL;
	opd_error error;
	bool ran = true;
	if (cudaStreamBeginCapture(trial->stream, cudaStreamCaptureModeRelaxed) != cudaSuccess)
		return NULL;
	for (int i = 0; i < trial->times && ran; i++) {
		struct gemm_operands operands = trial->operands;
		operands.right = trial->rights[i % trial->right_count];
		ran = gemm_run(library, handle, plan, &operands, trial->stream, &error) == OPD_OK;
	}
	if (cudaStreamEndCapture(trial->stream, &graph) != cudaSuccess || !ran || cudaGraphInstantiate(&made, graph, 0) != cudaSuccess)
		made = NULL;
	if (graph != NULL)
		(void)cudaGraphDestroy(graph);
	(void)cudaGetLastError();
	return made;
}

/* Milliseconds of a candidate: the least of some rounds; FLT_MAX: it can't run. */
static float trial_time(const struct trial *trial, struct library *library, cublasLtHandle_t handle, const struct gemm_plan *plan)
{
	cudaGraphExec_t graph = trial_capture(trial, library, handle, plan);
	float best = FLT_MAX;
	if (graph == NULL)
		return best;
	bool ran = cudaGraphLaunch(graph, trial->stream) == cudaSuccess; /* once to warm up */
	for (int round = 0; round < ROUNDS && ran; round++) {
		float ms;
		ran = cudaEventRecord(trial->start, trial->stream) == cudaSuccess && cudaGraphLaunch(graph, trial->stream) == cudaSuccess &&
		      cudaEventRecord(trial->end, trial->stream) == cudaSuccess && cudaEventSynchronize(trial->end) == cudaSuccess &&
		      cudaEventElapsedTime(&ms, trial->start, trial->end) == cudaSuccess;
		if (ran && ms < best)
			best = ms;
	}
	(void)cudaGraphExecDestroy(graph);
	(void)cudaGetLastError();
	return ran ? best : FLT_MAX;
}

/* Number of the fastest candidate; the heuristic's first where there is no memory to time them on, or too much to do; -1: none runs. */
static int candidates_choose(struct library *library, cublasLtHandle_t handle, const struct gemm *gemm, struct gemm_plan *plan,
                             const cublasLtMatmulHeuristicResult_t *candidates, int count)
{
	struct trial trial = {0};
	float best = FLT_MAX;
	double spent_ms = 0;
	bool timed = trial_is_small(gemm) && trial_init(&trial, gemm);
	int chosen = timed ? -1 : 0;
	for (int i = 0; i < count && timed && spent_ms < trial_ms_max; i++) {
		plan->algorithm = candidates[i].algo;
		plan->workspace_bytes = candidates[i].workspaceSize;
		float ms = candidates[i].state == CUBLAS_STATUS_SUCCESS ? trial_time(&trial, library, handle, plan) : FLT_MAX;
		spent_ms += ms < FLT_MAX ? (ROUNDS + 1) * (double)ms : 0;
		if (ms < best) {
			best = ms;
			chosen = i;
		}
	}
	trial_fini(&trial);
	return chosen;
}

opd_status gemm_plan(struct library *library, const struct gemm *gemm, struct gemm_plan *plan_out, opd_reason *reason, opd_error *error)
{
	struct attempt attempt = {.library = library, .code = CUBLAS_STATUS_SUCCESS};
	cublasLtMatmulHeuristicResult_t candidates[CANDIDATES] = {0};
	cublasLtHandle_t handle;
	int device = 0;
	opd_status status = cudart_status("cudaGetDevice", (int)cudaGetDevice(&device), error);
	if (status == OPD_OK)
		status = library_handle(library, (uint32_t)device, &handle, error);
	if (status != OPD_OK)
		return status;
	plan_describe(&attempt, gemm, plan_out);
	int count = candidates_get(&attempt, handle, gemm, plan_out, candidates);
	if (attempt.code != CUBLAS_STATUS_SUCCESS || count == 0) {
		opd_reason_set(reason, OPD_REASON_PLAN, "cuBLASLt has no algorithm: %s", library->GetStatusString(attempt.code));
		return OPD_FAILED_PRECONDITION;
	}
	int chosen = candidates_choose(library, handle, gemm, plan_out, candidates, count);
	if (chosen < 0) {
		opd_reason_set(reason, OPD_REASON_PLAN, "none of cuBLASLt's %d algorithms runs", count);
		return OPD_FAILED_PRECONDITION;
	}
	plan_out->algorithm = candidates[chosen].algo;
	plan_out->workspace_bytes = candidates[chosen].workspaceSize;
	return OPD_OK;
}

opd_status gemm_run(struct library *library, cublasLtHandle_t handle, const struct gemm_plan *plan, const struct gemm_operands *operands, void *stream,
                    opd_error *error)
{
	/* Copies: the library's prototypes take them as if it wrote there, and the plan may be running elsewhere with other pointers. */
	cublasLtMatmulDescOpaque_t product = plan->product;
	cublasLtMatrixLayoutOpaque_t right = plan->right, left = plan->left, y = plan->y;
	struct attempt attempt = {.library = library, .code = CUBLAS_STATUS_SUCCESS};
	if (plan->bias)
		attribute(&attempt, &product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &operands->bias, sizeof operands->bias);
	if (plan->scales != GEMM_SCALES_NONE) {
		attribute(&attempt, &product, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &operands->scale_right, sizeof operands->scale_right);
		attribute(&attempt, &product, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &operands->scale_left, sizeof operands->scale_left);
	}
	if (attempt.code == CUBLAS_STATUS_SUCCESS)
		attempt.code = library->Matmul(handle, &product, scalar(plan->factor, true), operands->right, &right, operands->left, &left,
		                               scalar(plan->factor, false), operands->y, &y, operands->y, &y, &plan->algorithm, operands->workspace,
		                               plan->workspace_bytes, stream);
	return library_status(library, "cublasLtMatmul", attempt.code, error);
}
