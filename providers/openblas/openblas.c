/* The module `openblas`: linear and matmul of f32 and f64 by OpenBLAS, which is opened when the module is.
 *
 * The lane's threads are the only ones that work: OpenBLAS runs each call on the thread that makes it (openblas_set_num_threads(1)), and a product
 * is cut into blocks of fixed sizes, one call each, which the lane's threads share. Blocks depend on the shape alone, so bits don't
 * depend on the number of threads. */
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "providers/product.h"
#include "uuid/openblas_product.h"

/* cblas.h's values and the prototypes of what is called (blasint is int in every packaged build but those named libopenblas64). */
enum { CBLAS_ROWS = 101, CBLAS_PLAIN = 111, CBLAS_TRANSPOSED = 112 };

typedef void (*sgemm_fn)(int order, int transa, int transb, int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb,
                         float beta, float *c, int ldc);
typedef void (*dgemm_fn)(int order, int transa, int transb, int m, int n, int k, double alpha, const double *a, int lda, const double *b,
                         int ldb, double beta, double *c, int ldc);
typedef void (*sgemv_fn)(int order, int trans, int m, int n, float alpha, const float *a, int lda, const float *x, int incx, float beta,
                         float *y, int incy);
typedef void (*dgemv_fn)(int order, int trans, int m, int n, double alpha, const double *a, int lda, const double *x, int incx, double beta,
                         double *y, int incy);

enum { OPENBLAS_IMPLS = 2 };

struct openblas {
	void *library;
	sgemm_fn sgemm;
	dgemm_fn dgemm;
	sgemv_fn sgemv;
	dgemv_fn dgemv;
	char missing[160]; /* why it can't be used; empty: it can */
	opd_impl impls[OPENBLAS_IMPLS];
};

typedef bool (*product_read_fn)(const opd_call *call, struct product *product_out, opd_reason *reason);

static product_read_fn reader_of(const opd_impl *impl)
{
	return strcmp(impl->op, "linear") == 0 ? product_of_linear : product_of_matmul;
}

static bool accept(const opd_call *call, product_read_fn read, opd_reason *reason)
{
	struct product product;
	opd_dtype dtype = call->args[0].tensor->dtype;
	if (dtype != OPD_f32 && dtype != OPD_f64)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "%s, only f32, f64", opd_dtype_name(dtype));
	return read(call, &product, reason);
}

static bool linear_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return accept(call, product_of_linear, reason);
}

static bool matmul_predicate(const opd_impl *impl, void *state, const opd_call *call, opd_reason *reason)
{
	(void)impl, (void)state;
	return accept(call, product_of_matmul, reason);
}

/* 40 multiplications a nanosecond in f32, half of that in f64; one row reads 8 bytes of its matrix a nanosecond. */
static double product_ns(const struct product *product)
{
	double products = (double)product->batches * (double)product->rows * (double)product->columns * (double)product->depth;
	double bytes = (double)opd_dtype_bytes(product->y->dtype);
	return 1000 + products * bytes / (product->rows == 1 ? 8 : 160);
}

static uint64_t cost_ns(const opd_impl *impl, const opd_call *call)
{
	struct product product;
	if (!reader_of(impl)(call, &product, NULL))
		return 0;
	double ns = product_ns(&product);
	return ns < 1e18 ? (uint64_t)ns : (uint64_t)1e18;
}

struct work {
	const struct openblas *blas;
	const opd_exec *exec;
	struct product product;
	atomic_bool cancelled;
};

static int trans_of(bool transposed)
{
	return transposed ? CBLAS_TRANSPOSED : CBLAS_PLAIN;
}

static void multiply_rows(const struct work *work, const struct product_block *block)
{
	const struct product *p = &work->product;
	int left = trans_of(p->left.transposed), right = trans_of(p->right.transposed);
	int m = (int)block->rows, n = (int)block->columns, k = (int)p->depth;
	int lda = (int)p->left.lead, ldb = (int)p->right.lead, ldc = (int)p->columns;
	if (p->y->dtype == OPD_f32)
		work->blas->sgemm(CBLAS_ROWS, left, right, m, n, k, 1, (const void *)block->left, lda, (const void *)block->right, ldb, 0,
		                  (void *)block->y, ldc);
	else
		work->blas->dgemm(CBLAS_ROWS, left, right, m, n, k, 1, (const void *)block->left, lda, (const void *)block->right, ldb, 0,
		                  (void *)block->y, ldc);
}

/* y = rightᵀ · the one row of left. */
static void multiply_row(const struct work *work, const struct product_block *block)
{
	const struct product *p = &work->product;
	bool dots = p->right.transposed; /* a column of right is contiguous */
	int m = (int)(dots ? block->columns : p->depth), n = (int)(dots ? p->depth : block->columns);
	int trans = trans_of(!dots), lda = (int)p->right.lead, step = p->left.transposed ? (int)p->left.lead : 1;
	if (p->y->dtype == OPD_f32)
		work->blas->sgemv(CBLAS_ROWS, trans, m, n, 1, (const void *)block->right, lda, (const void *)block->left, step, 0,
		                  (void *)block->y, 1);
	else
		work->blas->dgemv(CBLAS_ROWS, trans, m, n, 1, (const void *)block->right, lda, (const void *)block->left, step, 0,
		                  (void *)block->y, 1);
}

static void add_bias(const struct product *product, const struct product_block *block)
{
	int64_t step = product->bias->strides[0];
	for (int64_t r = 0; r < block->rows; r++) {
		if (product->y->dtype == OPD_f32) {
			const float *bias = (const float *)opd_tensor_data(product->bias) + block->column * step;
			float *y = (float *)(void *)block->y + r * product->columns;
			for (int64_t c = 0; c < block->columns; c++)
				y[c] += bias[c * step];
		} else {
			const double *bias = (const double *)opd_tensor_data(product->bias) + block->column * step;
			double *y = (double *)(void *)block->y + r * product->columns;
			for (int64_t c = 0; c < block->columns; c++)
				y[c] += bias[c * step];
		}
	}
}

static void clear(const struct product *product, const struct product_block *block)
{
	uint64_t bytes = opd_dtype_bytes(product->y->dtype);
	for (int64_t r = 0; r < block->rows; r++)
		memset(block->y + (uint64_t)(r * product->columns) * bytes, 0, (uint64_t)block->columns * bytes);
}

static void run_blocks(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	(void)thread;
	struct work *work = argument;
	for (uint64_t i = begin; i < end && !atomic_load_explicit(&work->cancelled, memory_order_relaxed); i++) {
		struct product_block block = product_block_at(&work->product, i);
		if (work->product.depth == 0)
			clear(&work->product, &block);
		else if (work->product.rows == 1)
			multiply_row(work, &block);
		else
			multiply_rows(work, &block);
		if (work->product.bias != NULL)
			add_bias(&work->product, &block);
		if (i + 1 < end && work->exec->host->cancelled(work->exec))
			atomic_store_explicit(&work->cancelled, true, memory_order_relaxed);
	}
}

static opd_status run(const opd_impl *impl, void *state, const opd_call *call, const opd_exec *exec, opd_error *error)
{
	struct work work = {.blas = state, .exec = exec};
	opd_reason reason;
	if (!reader_of(impl)(call, &work.product, &reason))
		return opd_fail(error, OPD_INTERNAL, "%s: the operands' layout isn't what the predicate accepted", impl->op);
	const struct product *product = &work.product;
	opd_status status = product_expect_output(impl, product, product->left_tensor->dtype, error);
	if (status != OPD_OK || product->y->elements == 0)
		return status;
	atomic_init(&work.cancelled, false);
	product_for(exec, product, product_ns(product), run_blocks, &work);
	return atomic_load(&work.cancelled) ? opd_fail(error, OPD_CANCELLED, "%s: cancelled while the kernel ran", impl->op) : OPD_OK;
}

static const opd_impl templates[OPENBLAS_IMPLS] = {
	{
		.struct_bytes = sizeof(opd_impl),
		.flags = OPD_IMPL_THREAD_INVARIANT,
		.op = "linear",
		.schema = "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
		.device = "cpu",
		.uuid = OPD_UUID_openblas_product,
		.predicate = linear_predicate,
		.cost_ns = cost_ns,
		.run = run,
	},
	{
		.struct_bytes = sizeof(opd_impl),
		.flags = OPD_IMPL_THREAD_INVARIANT,
		.op = "matmul",
		.schema = "matmul(Tensor a, Tensor b) -> Tensor",
		.device = "cpu",
		.uuid = OPD_UUID_openblas_product,
		.predicate = matmul_predicate,
		.cost_ns = cost_ns,
		.run = run,
	},
};

/* *function_out, and what is missing when the library hasn't got it. */
static void find(struct openblas *blas, const char *name, void *function_out)
{
	void *symbol = dlsym(blas->library, name);
	if (symbol == NULL && blas->missing[0] == '\0')
		(void)snprintf(blas->missing, sizeof blas->missing, "not available: libopenblas.so.0 has no %s", name);
	memcpy(function_out, &symbol, sizeof symbol);
}

/* The name of the kernels that the library has chosen; empty where it doesn't tell. */
static const char *core_name(const struct openblas *blas)
{
	char *(*corename)(void) = NULL;
	void *symbol = blas->library == NULL ? NULL : dlsym(blas->library, "openblas_get_corename");
	memcpy(&corename, &symbol, sizeof symbol);
	return corename == NULL ? "" : corename();
}

/* Better kernels for this processor than those called `core`; NULL: none. The library goes by the processor's model, and for one that is newer than itself takes those of
 * Haswell, or its oldest, whatever the processor has. */
static const char *better_core(const char *core)
{
#if defined __x86_64__
	const bool oldest = strcmp(core, "Prescott") == 0;
	const bool avx2 = strcmp(core, "Haswell") == 0 || strcmp(core, "Zen") == 0;
	const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
	                        __builtin_cpu_supports("avx512vl");
	if (has_avx512 && (oldest || avx2))
		return "SkylakeX";
	if (__builtin_cpu_supports("avx2") && oldest)
		return "Haswell";
#else
	(void)core;
#endif
	return NULL;
}

#define CORE_VARIABLE "OPENBLAS_CORETYPE"

/* The variable is read when the library is opened, and nowhere else: it is closed and opened again. What the operator has set holds. */
static void choose_core(const opd_host *host, struct openblas *blas)
{
	char before[32], text[200];
	(void)snprintf(before, sizeof before, "%s", core_name(blas));
	const char *better = better_core(before);
	if (better == NULL || getenv(CORE_VARIABLE) != NULL || dlclose(blas->library) != 0)
		return;
	(void)setenv(CORE_VARIABLE, better, 1);
	blas->library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
	(void)unsetenv(CORE_VARIABLE);
	const bool taken = strcmp(core_name(blas), better) == 0;
	(void)snprintf(text, sizeof text, taken ? "openblas: kernels of %s for a processor that the library doesn't know, and chose those of %s for"
	                                        : "openblas: set " CORE_VARIABLE "=%s: the library chose kernels of %s for a processor that it doesn't know",
	               better, before);
	host->log(host, taken ? OPD_LOG_INFO : OPD_LOG_WARN, text);
}

static void probe(const opd_host *host, struct openblas *blas)
{
	void (*set_num_threads)(int) = NULL;
	blas->library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
	if (blas->library != NULL)
		choose_core(host, blas);
	if (blas->library == NULL) {
		(void)snprintf(blas->missing, sizeof blas->missing, "not available: %.130s", dlerror());
		return;
	}
	find(blas, "openblas_set_num_threads", &set_num_threads);
	find(blas, "cblas_sgemm", &blas->sgemm);
	find(blas, "cblas_dgemm", &blas->dgemm);
	find(blas, "cblas_sgemv", &blas->sgemv);
	find(blas, "cblas_dgemv", &blas->dgemv);
	if (blas->missing[0] == '\0')
		set_num_threads(1);
}

static opd_status openblas_open(const opd_host *host, void *state, opd_error *error)
{
	struct openblas *blas = state;
	probe(host, blas);
	for (size_t i = 0; i < OPENBLAS_IMPLS; i++) {
		blas->impls[i] = templates[i];
		blas->impls[i].unsupported = blas->missing[0] == '\0' ? NULL : blas->missing;
		opd_status status = host->register_impl(host, &blas->impls[i], error);
		if (status != OPD_OK)
			return status;
	}
	return OPD_OK;
}

/* The library stays: its idle threads run its code. */
static const opd_module module = {
	.abi = OPD_PROVIDER_ABI,
	.struct_bytes = sizeof module,
	.name = "openblas",
	.version = OPD_VERSION,
	.state_bytes = sizeof(struct openblas),
	.open = openblas_open,
};

const opd_module *opd_module_get(void)
{
	return &module;
}
