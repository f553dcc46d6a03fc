#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "tests/bench/kernel_clock.h"
#include "tests/bench/kernel_peers.h"

/* cblas.h's values. The library is opened rather than linked: Debian's headers come with another package than the library. */
enum { CBLAS_ROWS = 101, CBLAS_PLAIN = 111, CBLAS_TRANSPOSED = 112 };

typedef void (*sgemm_fn)(int order, int transa, int transb, int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb,
                         float beta, float *c, int ldc);
typedef void (*sgemv_fn)(int order, int trans, int m, int n, float alpha, const float *a, int lda, const float *x, int incx, float beta,
                         float *y, int incy);

struct blas_call {
	sgemm_fn sgemm;
	sgemv_fn sgemv;
	int trans, batches, m, n, k;
	float *a, *b, *c;
};

static void *blas_symbol(const char *name)
{
	static void *library;
	if (library == NULL)
		library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
	return library == NULL ? NULL : dlsym(library, name);
}

static void blas_run(void *argument)
{
	const struct blas_call *call = argument;
	bool transposed = call->trans == CBLAS_TRANSPOSED;
	for (int b = 0; b < call->batches; b++) {
		const float *left = call->a + (size_t)b * (size_t)call->m * (size_t)call->k;
		const float *right = call->b + (size_t)b * (size_t)call->n * (size_t)call->k;
		float *y = call->c + (size_t)b * (size_t)call->m * (size_t)call->n;
		if (call->m == 1)
			call->sgemv(CBLAS_ROWS, transposed ? CBLAS_PLAIN : CBLAS_TRANSPOSED, transposed ? call->n : call->k,
			            transposed ? call->k : call->n, 1, right, transposed ? call->k : call->n, left, 1, 0, y, 1);
		else
			call->sgemm(CBLAS_ROWS, CBLAS_PLAIN, call->trans, call->m, call->n, call->k, 1, left, call->k, right,
			            transposed ? call->k : call->n, 0, y, call->n);
	}
}

static float *blas_ones(int batches, int rows, int columns)
{
	size_t count = (size_t)batches * (size_t)rows * (size_t)columns;
	float *made = aligned_alloc(64, (count * sizeof *made + 63) / 64 * 64);
	for (size_t i = 0; made != NULL && i < count; i++)
		made[i] = 1;
	return made;
}

double peer_openblas_ns(const struct peer_case *peer)
{
	struct blas_call call = {.trans = CBLAS_PLAIN, .batches = 1};
	bool linear = strcmp(peer->op, "linear") == 0 && peer->dim_count == 3;
	bool matmul = strcmp(peer->op, "matmul") == 0 && peer->dim_count == 4;
	void *gemm = blas_symbol("cblas_sgemm"), *gemv = blas_symbol("cblas_sgemv");
	if (peer->dtype != OPD_f32 || !(linear || matmul) || gemm == NULL || gemv == NULL)
		return -1;
	memcpy(&call.sgemm, &gemm, sizeof gemm);
	memcpy(&call.sgemv, &gemv, sizeof gemv);
	if (linear)
		call.trans = CBLAS_TRANSPOSED;
	else
		call.batches = (int)peer->dims[0];
	call.m = (int)peer->dims[linear ? 0 : 1];
	call.k = (int)peer->dims[linear ? 1 : 2];
	call.n = (int)peer->dims[linear ? 2 : 3];
	call.a = blas_ones(call.batches, call.m, call.k);
	call.b = blas_ones(call.batches, call.n, call.k);
	call.c = blas_ones(call.batches, call.m, call.n);
	double ns = call.a == NULL || call.b == NULL || call.c == NULL ? -1 : clock_median(blas_run, &call);
	free(call.a);
	free(call.b);
	free(call.c);
	return ns;
}
