/* Times implementations on a GPU: `opd-bench-gpu MODULE.so... [--row TEXT] [--provider NAME]`.
 *
 * GPU time alone: launches of one call are captured into a CUDA graph, which is replayed between two events; the median over replays, divided by the launches, so that the gap
 * between two nodes (1.1 us on an H100) is in it, as it is in PERFORMANCE.md's bars. Calls that move 8 MiB and more take turns over several sets of operands, whose bytes together
 * are past the cache. Beside each row stands a plain copy kernel that moves as many bytes, in the same run.
 * Layer: tests. Needs a GPU; says so and ends with 77 where there is none. */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "providers/builtin.h"
#include "tests/bench/gpu/gpu_memory.h"
#include "tests/conformance/host.h"

enum { SETS = 8, TENSORS = 10, ARGS = 10, OUTPUTS = 2, REPLAYS = 15, WARM = 3, CHAIN_MAX = 200, ALLOCATIONS = 512 };
static const double spread_bytes = 200e6; /* what the sets of a row hold together */
static const double cached_bytes = 8e6;   /* below it one set does: the cache is where such operands lie */
static const double chain_us = 4000;

static struct host host;
static cudaStream_t stream;
static const char *only_row, *only_provider;

static void *allocations[ALLOCATIONS];
static size_t allocation_count;

static void must(int code, const char *what)
{
	if (code == 0)
		return;
	(void)fprintf(stderr, "%s: %s\n", what, cudaGetErrorString((cudaError_t)code));
	exit(EXIT_FAILURE);
}

static void *device_memory(uint64_t bytes)
{
	if (allocation_count == ALLOCATIONS) {
		(void)fprintf(stderr, "more than %d allocations in a row\n", ALLOCATIONS);
		exit(EXIT_FAILURE);
	}
	must((int)cudaMalloc(&allocations[allocation_count], bytes + 256), "cudaMalloc");
	return allocations[allocation_count++];
}

static void device_memory_reset(void)
{
	while (allocation_count > 0)
		(void)cudaFree(allocations[--allocation_count]);
}

/* ---- Calls --------------------------------------------------------------------------------------------------------------- */

struct made {
	opd_tensor tensors[TENSORS];
	int64_t shapes[TENSORS][OPD_RANK_MAX];
	int64_t strides[TENSORS][OPD_RANK_MAX];
	uint32_t tensor_count;
	opd_arg args[ARGS];
	const opd_tensor *outputs[OUTPUTS];
	opd_call call;
	double bytes; /* of operands and results, each once */
	uint64_t seed;
};

static opd_tensor *tensor_add(struct made *made, opd_dtype dtype, uint32_t rank, const int64_t *shape)
{
	opd_tensor *tensor = &made->tensors[made->tensor_count];
	int64_t *strides = made->strides[made->tensor_count], *extents = made->shapes[made->tensor_count];
	uint64_t elements = 1;
	made->tensor_count++;
	for (uint32_t i = rank; i-- > 0;) {
		extents[i] = shape[i];
		strides[i] = (int64_t)elements;
		elements *= (uint64_t)shape[i];
	}
	*tensor = (opd_tensor){
		.struct_bytes = sizeof *tensor,
		.dtype = dtype,
		.rank = rank,
		.device = 1,
		.shape = extents,
		.strides = strides,
		.data = device_memory(elements * opd_dtype_bytes(dtype)),
		.elements = elements,
		.alignment = OPD_TENSOR_ALIGNMENT,
		.flags = OPD_TENSOR_CONTIGUOUS,
	};
	made->bytes += (double)elements * (double)opd_dtype_bytes(dtype);
	return tensor;
}

static enum gpu_kind kind_of(opd_dtype dtype)
{
	return dtype == OPD_f32 ? GPU_F32 : dtype == OPD_f16 ? GPU_F16 : dtype == OPD_bf16 ? GPU_BF16 : GPU_BYTES;
}

static void arg_tensor(struct made *made, uint32_t index, opd_dtype dtype, uint32_t rank, const int64_t *shape)
{
	opd_tensor *tensor = tensor_add(made, dtype, rank, shape);
	uint64_t elements = tensor->elements;
	must(gpu_fill(tensor->data, kind_of(dtype), elements, ++made->seed, stream), "fill");
	made->args[index] = (opd_arg){.kind = OPD_ARG_TENSOR, .tensor = tensor};
}

/* i32 values start, start + step, … */
static void arg_indices(struct made *made, uint32_t index, uint32_t rank, const int64_t *shape, int32_t start, int32_t step)
{
	opd_tensor *tensor = tensor_add(made, OPD_i32, rank, shape);
	int32_t *values = malloc(tensor->elements * sizeof *values);
	if (values == NULL)
		exit(EXIT_FAILURE);
	for (uint64_t i = 0; i < tensor->elements; i++)
		values[i] = start + (int32_t)i * step;
	must((int)cudaMemcpy(tensor->data, values, tensor->elements * sizeof *values, cudaMemcpyHostToDevice), "cudaMemcpy");
	free(values);
	made->args[index] = (opd_arg){.kind = OPD_ARG_TENSOR, .tensor = tensor};
}

static void arg_int(struct made *made, uint32_t index, int64_t value)
{
	made->args[index] = (opd_arg){.kind = OPD_ARG_INT, .i = value};
}

static void arg_float(struct made *made, uint32_t index, double value)
{
	made->args[index] = (opd_arg){.kind = OPD_ARG_FLOAT, .f = value};
}

static void arg_bool(struct made *made, uint32_t index, bool value)
{
	made->args[index] = (opd_arg){.kind = OPD_ARG_BOOL, .b = value};
}

static void arg_str(struct made *made, uint32_t index, const char *value)
{
	made->args[index] = (opd_arg){.kind = OPD_ARG_STR, .count = (uint32_t)strlen(value), .str = value};
}

/* ---- Rows ------------------------------------------------------------------------------------------------------------------ */

struct row {
	const char *name;
	const char *op;
	opd_dtype dtype;
	int64_t n[6];
	double bar_us;  /* 0: none */
	double flops;   /* 0: bandwidth is what counts */
	double share;   /* of the copy's rate that PERFORMANCE.md asks for; 0: none */
	void (*make)(struct made *made, const struct row *row);
};

#define SHAPE(...) (uint32_t)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

static void make_norm(struct made *made, const struct row *row)
{
	uint32_t next = 0;
	arg_tensor(made, next++, row->dtype, SHAPE(row->n[0], row->n[1]));
	if (strcmp(row->op, "fused_add_rms_norm") == 0)
		arg_tensor(made, next++, row->dtype, SHAPE(row->n[0], row->n[1]));
	arg_tensor(made, next++, row->dtype, SHAPE(row->n[1]));
	if (strcmp(row->op, "layer_norm") == 0)
		arg_tensor(made, next++, row->dtype, SHAPE(row->n[1]));
	arg_float(made, next++, 1e-5);
	made->args[next].kind = OPD_ARG_NONE;
}

static void make_rows(struct made *made, const struct row *row)
{
	arg_tensor(made, 0, row->dtype, SHAPE(row->n[0], row->n[1]));
	if (strcmp(row->op, "dynamic_quant_fp8") == 0)
		arg_bool(made, 1, true);
	else
		arg_int(made, 1, strcmp(row->op, "topk") == 0 ? row->n[2] : -1);
	arg_bool(made, 2, false);
}

static void make_rotary(struct made *made, const struct row *row)
{
	arg_indices(made, 0, SHAPE(row->n[0]), 0, 1);
	arg_tensor(made, 1, row->dtype, SHAPE(row->n[0], row->n[1] * row->n[3]));
	arg_tensor(made, 2, row->dtype, SHAPE(row->n[0], row->n[2] * row->n[3]));
	arg_int(made, 3, row->n[3]);
	arg_tensor(made, 4, row->dtype, SHAPE(row->n[0], row->n[3]));
	arg_bool(made, 5, true);
}

static void make_linear(struct made *made, const struct row *row)
{
	arg_tensor(made, 0, row->dtype, SHAPE(row->n[0], row->n[2]));
	arg_tensor(made, 1, row->dtype, SHAPE(row->n[1], row->n[2]));
	made->args[2].kind = OPD_ARG_NONE;
}

static void make_scaled_mm(struct made *made, const struct row *row)
{
	arg_tensor(made, 0, row->dtype, SHAPE(row->n[0], row->n[2]));
	arg_tensor(made, 1, row->dtype, SHAPE(row->n[1], row->n[2]));
	arg_tensor(made, 2, OPD_f32, SHAPE(1));
	arg_tensor(made, 3, OPD_f32, SHAPE(1));
	made->args[4].kind = OPD_ARG_NONE;
	arg_str(made, 5, "bf16");
}

/* B, S, S_kv, heads, kv_heads, D */
static void make_attention(struct made *made, const struct row *row)
{
	const int64_t *n = row->n;
	arg_tensor(made, 0, row->dtype, SHAPE(n[0], n[1], n[3], n[5]));
	arg_tensor(made, 1, row->dtype, SHAPE(n[0], n[2], n[4], n[5]));
	arg_tensor(made, 2, row->dtype, SHAPE(n[0], n[2], n[4], n[5]));
	arg_float(made, 3, 1 / sqrt((double)n[5]));
	arg_bool(made, 4, true);
}

static void make_paged(struct made *made, const struct row *row)
{
	enum { BLOCK = 16 };
	const int64_t *n = row->n;
	const int64_t blocks = n[2] / BLOCK;
	arg_tensor(made, 0, row->dtype, SHAPE(n[0] * n[1], n[3], n[5]));
	arg_tensor(made, 1, row->dtype, SHAPE(n[0] * blocks, BLOCK, n[4], n[5]));
	arg_tensor(made, 2, row->dtype, SHAPE(n[0] * blocks, BLOCK, n[4], n[5]));
	arg_indices(made, 3, SHAPE(n[0], blocks), 0, 1);
	arg_indices(made, 4, SHAPE(n[0]), (int32_t)n[2], 0);
	arg_indices(made, 5, SHAPE(n[0] + 1), 0, (int32_t)n[1]);
	arg_float(made, 6, 1 / sqrt((double)n[5]));
	arg_bool(made, 7, true);
}

static void make_embedding(struct made *made, const struct row *row)
{
	arg_indices(made, 0, SHAPE(row->n[0]), 0, 7);
	double before = made->bytes;
	arg_tensor(made, 1, row->dtype, SHAPE(row->n[1], row->n[2]));
	made->bytes = before + (double)row->n[0] * (double)row->n[2] * (double)opd_dtype_bytes(row->dtype);
}

static void make_pair(struct made *made, const struct row *row)
{
	arg_tensor(made, 0, row->dtype, SHAPE(row->n[0], row->n[1]));
	arg_tensor(made, 1, row->dtype, SHAPE(row->n[0], row->n[1]));
}

static void make_cast(struct made *made, const struct row *row)
{
	arg_tensor(made, 0, row->dtype, SHAPE(row->n[0], row->n[1]));
	arg_str(made, 1, row->dtype == OPD_f32 ? "bf16" : "f32");
}

#define GEMM(m, n, k) 2.0 * (m) * (n) * (k)

static const struct row rows[] = {
	{"rms_norm bf16 16x4096", "rms_norm", OPD_bf16, {16, 4096}, 2.5, 0, 0, make_norm},
	{"rms_norm bf16 256x4096", "rms_norm", OPD_bf16, {256, 4096}, 3.6, 0, 0, make_norm},
	{"rms_norm bf16 4096x4096", "rms_norm", OPD_bf16, {4096, 4096}, 26.0, 0, 0.95, make_norm},
	{"rms_norm bf16 16384x4096", "rms_norm", OPD_bf16, {16384, 4096}, 94, 0, 0.95, make_norm},
	{"rms_norm bf16 16384x8192", "rms_norm", OPD_bf16, {16384, 8192}, 182, 0, 0.95, make_norm},
	{"rms_norm f32 4096x4096", "rms_norm", OPD_f32, {4096, 4096}, 49.6, 0, 0.95, make_norm},
	{"rms_norm f32 16384x4096", "rms_norm", OPD_f32, {16384, 4096}, 181, 0, 0.95, make_norm},
	{"fused_add_rms_norm bf16 16x4096", "fused_add_rms_norm", OPD_bf16, {16, 4096}, 2.8, 0, 0, make_norm},
	{"fused_add_rms_norm bf16 4096x4096", "fused_add_rms_norm", OPD_bf16, {4096, 4096}, 49, 0, 0.95, make_norm},
	{"fused_add_rms_norm bf16 16384x4096", "fused_add_rms_norm", OPD_bf16, {16384, 4096}, 182, 0, 0.95, make_norm},
	{"silu_and_mul bf16 16x2x14336", "silu_and_mul", OPD_bf16, {16, 28672}, 2.3, 0, 0, make_rows},
	{"silu_and_mul bf16 256x2x14336", "silu_and_mul", OPD_bf16, {256, 28672}, 9.6, 0, 0, make_rows},
	{"silu_and_mul bf16 4096x2x14336", "silu_and_mul", OPD_bf16, {4096, 28672}, 119.6, 0, 0.95, make_rows},
	{"rotary bf16 4096x(32+8)x128", "rotary_embedding", OPD_bf16, {4096, 32, 8, 128}, 38.5, 0, 0.95, make_rotary},
	{"dynamic_quant_fp8 4096x4096", "dynamic_quant_fp8", OPD_bf16, {4096, 4096}, 25.5, 0, 0, make_rows},
	{"dynamic_quant_fp8 16384x8192", "dynamic_quant_fp8", OPD_bf16, {16384, 8192}, 157, 0, 0.95, make_rows},
	{"softmax bf16 4096x4096", "softmax", OPD_bf16, {4096, 4096}, 42.7, 0, 0.95, make_rows},
	{"softmax f32 256x128256", "softmax", OPD_f32, {256, 128256}, 188, 0, 0.85, make_rows},
	{"layer_norm bf16 4096x4096", "layer_norm", OPD_bf16, {4096, 4096}, 29.4, 0, 0.95, make_norm},
	{"layer_norm bf16 16384x4096", "layer_norm", OPD_bf16, {16384, 4096}, 106, 0, 0.95, make_norm},
	{"topk 8 of 128 bf16, 16384 rows", "topk", OPD_bf16, {16384, 128, 8}, 137, 0, 0, make_rows},
	{"argmax bf16 1x128256", "argmax", OPD_bf16, {1, 128256}, 0, 0, 0, make_rows},
	{"argmax bf16 64x128256", "argmax", OPD_bf16, {64, 128256}, 0, 0, 0, make_rows},
	{"embedding bf16 4096 of 32000x4096", "embedding", OPD_bf16, {4096, 32000, 4096}, 0, 0, 0, make_embedding},
	{"add bf16 4096x8192", "add", OPD_bf16, {4096, 8192}, 0, 0, 0, make_pair},
	{"cast f32 to bf16 4096x8192", "cast", OPD_f32, {4096, 8192}, 0, 0, 0, make_cast},
	{"linear bf16 1x4096x4096", "linear", OPD_bf16, {1, 4096, 4096}, 15.4, 0, 0.85, make_linear},
	{"linear bf16 1x14336x4096", "linear", OPD_bf16, {1, 14336, 4096}, 0, 0, 0.85, make_linear},
	{"linear bf16 1x4096x14336", "linear", OPD_bf16, {1, 4096, 14336}, 0, 0, 0.85, make_linear},
	{"linear bf16 1x6144x4096", "linear", OPD_bf16, {1, 6144, 4096}, 0, 0, 0.85, make_linear},
	{"linear bf16 1x28672x4096", "linear", OPD_bf16, {1, 28672, 4096}, 0, 0, 0.85, make_linear},
	{"fused_add_rms_norm bf16 1x4096", "fused_add_rms_norm", OPD_bf16, {1, 4096}, 0, 0, 0, make_norm},
	{"silu_and_mul bf16 1x2x14336", "silu_and_mul", OPD_bf16, {1, 28672}, 0, 0, 0, make_rows},
	{"rotary bf16 1x(32+8)x128", "rotary_embedding", OPD_bf16, {1, 32, 8, 128}, 0, 0, 0, make_rotary},
	{"paged_attention bf16 B1 S1 of 256 H32/8 D128", "paged_attention", OPD_bf16, {1, 1, 256, 32, 8, 128}, 0, 0, 0, make_paged},
	{"linear bf16 1x128256x4096", "linear", OPD_bf16, {1, 128256, 4096}, 0, 0, 0.85, make_linear},
	{"linear bf16 8x4096x4096", "linear", OPD_bf16, {8, 4096, 4096}, 0, 0, 0.85, make_linear},
	{"linear f32 1x4096x4096", "linear", OPD_f32, {1, 4096, 4096}, 0, 0, 0.85, make_linear},
	{"linear f32 8x4096x4096", "linear", OPD_f32, {8, 4096, 4096}, 0, 0, 0.85, make_linear},
	{"linear bf16 16x4096x4096", "linear", OPD_bf16, {16, 4096, 4096}, 15.8, 0, 0, make_linear},
	{"linear bf16 256x4096x4096", "linear", OPD_bf16, {256, 4096, 4096}, 19.0, GEMM(256, 4096, 4096), 0, make_linear},
	{"linear bf16 4096x4096x4096", "linear", OPD_bf16, {4096, 4096, 4096}, 174, GEMM(4096, 4096, 4096), 0, make_linear},
	{"linear bf16 8192x8192x8192", "linear", OPD_bf16, {8192, 8192, 8192}, 1510, GEMM(8192.0, 8192, 8192), 0, make_linear},
	{"scaled_mm f8 1x4096x4096", "scaled_mm", OPD_f8_e4m3fn, {1, 4096, 4096}, 8.6, 0, 0, make_scaled_mm},
	{"scaled_mm f8 16x4096x4096", "scaled_mm", OPD_f8_e4m3fn, {16, 4096, 4096}, 8.8, 0, 0, make_scaled_mm},
	{"scaled_mm f8 256x4096x4096", "scaled_mm", OPD_f8_e4m3fn, {256, 4096, 4096}, 11.7, GEMM(256, 4096, 4096), 0, make_scaled_mm},
	{"scaled_mm f8 4096x4096x4096", "scaled_mm", OPD_f8_e4m3fn, {4096, 4096, 4096}, 104, GEMM(4096, 4096, 4096), 0, make_scaled_mm},
	{"scaled_mm f8 8192x8192x8192", "scaled_mm", OPD_f8_e4m3fn, {8192, 8192, 8192}, 859, GEMM(8192.0, 8192, 8192), 0, make_scaled_mm},
	{"scaled_mm i8 4096x4096x4096", "scaled_mm", OPD_i8, {4096, 4096, 4096}, 0, GEMM(4096, 4096, 4096), 0, make_scaled_mm},
	{"attention bf16 B1 S4096 H32/8 D128 causal", "attention", OPD_bf16, {1, 4096, 4096, 32, 8, 128}, 261, GEMM(4096, 4096, 128 * 32), 0, make_attention},
	{"attention bf16 B1 S512 H32/8 D128 causal", "attention", OPD_bf16, {1, 512, 512, 32, 8, 128}, 0, GEMM(512, 512, 128 * 32), 0, make_attention},
	{"attention bf16 B64 S1 of 4096 H32/8 D128", "attention", OPD_bf16, {64, 1, 4096, 32, 8, 128}, 358, 0, 0.95, make_attention},
	{"paged_attention bf16 B64 S1 of 4096 H32/8 D128", "paged_attention", OPD_bf16, {64, 1, 4096, 32, 8, 128}, 358, 0, 0.95, make_paged},
	{"paged_attention bf16 B1 S1 of 4096 H32/8 D128", "paged_attention", OPD_bf16, {1, 1, 4096, 32, 8, 128}, 0, 0, 0, make_paged},
	{"paged_attention bf16 B1 S4096 H32/8 D128", "paged_attention", OPD_bf16, {1, 4096, 4096, 32, 8, 128}, 0, GEMM(4096, 4096, 128 * 32), 0, make_paged},
	{"paged_attention f32 B8 S1 of 1024 H32/8 D128", "paged_attention", OPD_f32, {8, 1, 1024, 32, 8, 128}, 0, 0, 0, make_paged},
};

/* ---- Timing ------------------------------------------------------------------------------------------------------------------ */

typedef int (*enqueue_fn)(void *context, unsigned turn);

static int compare_floats(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;
	return (x > y) - (x < y);
}

/* Microseconds of one of `launches` in a graph; negative: it can't be captured. */
static double time_chain(enqueue_fn enqueue, void *context, unsigned launches)
{
	cudaGraph_t graph = NULL;
	cudaGraphExec_t exec = NULL;
	cudaEvent_t start, end;
	float samples[REPLAYS];
	int failed = 0;
	must((int)cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
	for (unsigned i = 0; i < launches && failed == 0; i++)
		failed = enqueue(context, i);
	if (cudaStreamEndCapture(stream, &graph) != cudaSuccess || failed != 0 || cudaGraphInstantiate(&exec, graph, 0) != cudaSuccess) {
		(void)cudaGetLastError();
		return -1;
	}
	must((int)cudaEventCreate(&start), "cudaEventCreate");
	must((int)cudaEventCreate(&end), "cudaEventCreate");
	for (int i = 0; i < WARM; i++)
		must((int)cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
	for (int i = 0; i < REPLAYS; i++) {
		must((int)cudaEventRecord(start, stream), "cudaEventRecord");
		must((int)cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
		must((int)cudaEventRecord(end, stream), "cudaEventRecord");
		must((int)cudaEventSynchronize(end), "the graph");
		must((int)cudaEventElapsedTime(&samples[i], start, end), "cudaEventElapsedTime");
	}
	(void)cudaEventDestroy(start);
	(void)cudaEventDestroy(end);
	(void)cudaGraphExecDestroy(exec);
	(void)cudaGraphDestroy(graph);
	qsort(samples, REPLAYS, sizeof samples[0], compare_floats);
	return (double)samples[REPLAYS / 2] * 1e3 / launches;
}

/* As many launches as fill a few milliseconds, the operands' sets each equally often. */
static double time_calls(enqueue_fn enqueue, void *context, unsigned sets)
{
	double once = time_chain(enqueue, context, sets);
	if (once < 0)
		return once;
	unsigned launches = (unsigned)fmin(CHAIN_MAX, fmax(sets, chain_us / once));
	return time_chain(enqueue, context, launches / sets * sets);
}

struct timed {
	const struct host_impl *impl;
	struct made *sets;
	unsigned set_count;
	opd_plan plan;
	void *scratch;
	opd_error error;
};

static int enqueue_call(void *context, unsigned turn)
{
	struct timed *timed = context;
	const opd_impl *impl = timed->impl->impl;
	opd_exec exec = {
		.struct_bytes = sizeof exec,
		.threads = 1,
		.host = &host.table,
		.plan = impl->plan == NULL ? NULL : &timed->plan,
		.scratch = timed->scratch,
		.stream = stream,
		.device = 1,
	};
	return impl->run(impl, timed->impl->state, &timed->sets[turn % timed->set_count].call, &exec, &timed->error) == OPD_OK ? 0 : 1;
}

struct copied {
	void *from[SETS], *to[SETS];
	uint64_t bytes;
	unsigned set_count;
};

static int enqueue_copy(void *context, unsigned turn)
{
	const struct copied *copied = context;
	unsigned set = turn % copied->set_count;
	return gpu_copy(copied->to[set], copied->from[set], copied->bytes, stream);
}

/* Microseconds of a copy kernel that moves so many bytes, half of them reads. */
static double time_copy(double bytes, unsigned sets)
{
	struct copied copied = {.bytes = (uint64_t)(bytes / 2) / 16 * 16, .set_count = sets};
	for (unsigned i = 0; i < sets; i++) {
		copied.from[i] = device_memory(copied.bytes);
		copied.to[i] = device_memory(copied.bytes);
		must((int)cudaMemsetAsync(copied.from[i], 1, copied.bytes, stream), "cudaMemsetAsync");
	}
	return time_calls(enqueue_copy, &copied, sets);
}

/* ---- A row -------------------------------------------------------------------------------------------------------------------- */

static bool outputs_add(struct made *made, const opd_op *op, uint32_t count)
{
	int64_t shapes[OUTPUTS][OPD_RANK_MAX];
	opd_output outputs[OUTPUTS];
	opd_output *pointers[OUTPUTS];
	opd_error error = {0};
	for (uint32_t i = 0; i < OUTPUTS; i++) {
		outputs[i] = (opd_output){.struct_bytes = sizeof outputs[i], .rank_max = OPD_RANK_MAX, .shape = shapes[i]};
		pointers[i] = &outputs[i];
	}
	if (op->shape(op, &made->call, pointers, &error) != OPD_OK) {
		(void)fprintf(stderr, "%s\n", error.text);
		return false;
	}
	for (uint32_t i = 0; i < count; i++)
		made->outputs[i] = tensor_add(made, outputs[i].dtype, outputs[i].rank, shapes[i]);
	return true;
}

static bool set_make(struct made *made, const struct row *row, const opd_op *op, uint64_t seed)
{
	uint32_t results = strstr(op->schema, "-> (") != NULL ? 2 : 1;
	*made = (struct made){.seed = seed * 1000};
	row->make(made, row);
	made->call = (opd_call){.struct_bytes = sizeof made->call, .arg_count = ARGS, .output_count = results, .args = made->args, .outputs = made->outputs};
	return outputs_add(made, op, results);
}

static void row_print(const struct row *row, const char *provider, double us, double copy_us, double bytes)
{
	char bar[32] = "      -", goal[32] = "";
	if (row->bar_us > 0)
		(void)snprintf(bar, sizeof bar, "%7.1f", row->bar_us);
	if (row->bar_us > 0 && us > row->bar_us)
		(void)snprintf(goal, sizeof goal, "over the bar");
	else if (row->share > 0 && copy_us / us < row->share && bytes >= 64 * 1048576.0)
		(void)snprintf(goal, sizeof goal, "under %.2f", row->share);
	(void)printf("%-48s %-9s %9.2f us  bar %s  copy %8.2f (%.2f)  %7.0f GB/s", row->name, provider, us, bar, copy_us, copy_us / us, bytes / us / 1e3);
	if (row->flops > 0)
		(void)printf("  %6.0f TFLOP/s", row->flops / us / 1e6);
	(void)printf("  %s\n", goal);
	(void)fflush(stdout);
}

static void row_time_impl(const struct row *row, const struct host_impl *impl, struct made *sets, unsigned set_count, double copy_us)
{
	struct timed timed = {.impl = impl, .sets = sets, .set_count = set_count, .plan = {.struct_bytes = sizeof timed.plan}};
	opd_reason reason = {0};
	const opd_impl *def = impl->impl;
	for (unsigned i = 0; i < set_count; i++) /* cuDNN's bf16 is only for requests that say so */
		sets[i].call.flags = strcmp(impl->provider, "cudnn") == 0 ? OPD_CALL_ALLOW_TF32 : 0;
	if (def->unsupported != NULL || (def->predicate != NULL && !def->predicate(def, impl->state, &sets[0].call, &reason))) {
		(void)printf("%-48s %-9s refused: %s\n", row->name, impl->provider, def->unsupported != NULL ? def->unsupported : reason.detail);
		return;
	}
	opd_status status = def->plan == NULL ? OPD_OK : def->plan(def, impl->state, &sets[0].call, &timed.plan, &reason, &timed.error);
	if (status == OPD_OK && timed.plan.scratch_bytes > 0)
		timed.scratch = device_memory(timed.plan.scratch_bytes);
	double us = status == OPD_OK && enqueue_call(&timed, 0) == 0 ? time_calls(enqueue_call, &timed, set_count) : -1;
	if (us < 0)
		(void)printf("%-48s %-9s failed: %s%s\n", row->name, impl->provider, reason.detail, timed.error.text);
	else
		row_print(row, impl->provider, us, copy_us, sets[0].bytes);
	must((int)cudaStreamSynchronize(stream), row->name);
	if (timed.plan.destroy != NULL)
		timed.plan.destroy(timed.plan.data);
}

static void row_time(const struct row *row)
{
	struct made sets[SETS];
	unsigned set_count = 1;
	const opd_op *op = host_find_op(&host, row->op);
	if (op == NULL || !set_make(&sets[0], row, op, 1))
		return;
	if (sets[0].bytes >= cached_bytes)
		set_count = (unsigned)fmin(SETS, ceil(spread_bytes / sets[0].bytes));
	for (unsigned i = 1; i < set_count; i++)
		if (!set_make(&sets[i], row, op, i + 1))
			return;
	double copy_us = time_copy(sets[0].bytes, set_count);
	for (size_t i = 0; i < host.impl_count; i++)
		if (strcmp(host.impls[i].impl->op, row->op) == 0 && strcmp(host.impls[i].impl->device == NULL ? "cpu" : host.impls[i].impl->device, "cuda") == 0 &&
		    (only_provider == NULL || strcmp(only_provider, host.impls[i].provider) == 0))
			row_time_impl(row, &host.impls[i], sets, set_count, copy_us);
	device_memory_reset();
}

/* ---- Command line --------------------------------------------------------------------------------------------------------------- */

static bool modules_open(char **paths, int count)
{
	opd_error error = {0};
	for (size_t i = 0; builtin_modules[i] != NULL; i++)
		if (host_open(&host, builtin_modules[i], &error) != OPD_OK)
			return false;
	for (int i = 0; i < count; i++)
		if (host_load(&host, paths[i], &error) != OPD_OK) {
			(void)fprintf(stderr, "%s: %s\n", paths[i], error.text);
			return false;
		}
	return true;
}

static int run(int argc, char **argv)
{
	static const struct option options[] = {{"row", required_argument, NULL, 'r'}, {"provider", required_argument, NULL, 'p'}, {NULL, 0, NULL, 0}};
	struct cudaDeviceProp properties;
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
		if (option == '?')
			return 2;
		*(option == 'r' ? &only_row : &only_provider) = optarg;
	}
	if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
		(void)printf("skipped: %s\n", cudaGetErrorString(cudaGetLastError()));
		return 77;
	}
	if (!modules_open(argv + optind, argc - optind))
		return EXIT_FAILURE;
	must((int)cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
	(void)printf("%s; a copy kernel over 1 GiB: %.0f GB/s read and written\n", properties.name, 2.0 * (1 << 30) / time_copy(2.0 * (1 << 30), 2) / 1e3);
	device_memory_reset();
	for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
		if (only_row == NULL || strstr(rows[i].name, only_row) != NULL)
			row_time(&rows[i]);
	(void)cudaStreamDestroy(stream);
	return EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
	host_init(&host);
	int result = run(argc, argv);
	host_fini(&host);
	return result;
}
