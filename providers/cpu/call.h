/* What the implementations of provider `cpu` share: reading a call, refusing it, finding rows, spreading them over threads.
 *
 * Layer: providers/cpu. Threads: pure functions of their arguments; cpu_for runs its function on the lane's threads.
 * A row is the last dimension: its elements must be next to each other. Rows themselves may lie anywhere (strides, also 0).
 * Not here: kernels (kernels.h). */
#ifndef OPD_CPU_CALL_H
#define OPD_CPU_CALL_H

#include <stdatomic.h>

#include "providers/cpu/kernels.h"
#include "providers/estimate.h"
#include "providers/provider.h"

/* The implementations, in the order in which `open` registers them. Templates: each copy's `user` is the struct cpu_kernels to use. */
extern const opd_impl cpu_rms_norm;
extern const opd_impl cpu_fused_add_rms_norm;
extern const opd_impl cpu_silu_and_mul;
extern const opd_impl cpu_mul_and_silu;
extern const opd_impl cpu_gelu_and_mul;
extern const opd_impl cpu_silu;
extern const opd_impl cpu_gelu;
extern const opd_impl cpu_relu;
extern const opd_impl cpu_relu2;
extern const opd_impl cpu_sigmoid;
extern const opd_impl cpu_softmax;
extern const opd_impl cpu_linear;
extern const opd_impl cpu_attention;
extern const opd_impl cpu_paged_attention;
extern const opd_impl cpu_rotary_embedding;
extern const opd_impl cpu_argmax;
extern const opd_impl cpu_embedding;
extern const opd_impl cpu_reshape_and_cache;
extern const opd_impl cpu_add;
extern const opd_impl cpu_sub;
extern const opd_impl cpu_mul;
extern const opd_impl cpu_cast;
extern const opd_impl cpu_static_quant_fp8;
extern const opd_impl cpu_dynamic_quant_fp8;
extern const opd_impl cpu_layer_norm;
extern const opd_impl cpu_gelu_and_mul_sparse;
extern const opd_impl cpu_topk;
extern const opd_impl cpu_matmul;
extern const opd_impl cpu_scaled_mm;

static inline const struct cpu_kernels *cpu_kernels_of(const opd_impl *impl)
{
	return impl->user;
}

/* The tensor of argument `index`; NULL when it is None. */
static inline const opd_tensor *cpu_tensor(const opd_call *call, uint32_t index)
{
	return call->args[index].kind == OPD_ARG_TENSOR ? call->args[index].tensor : NULL;
}

/* f32, bf16 or f16. Its other operands' dtypes follow from the first's by the op's own rules, which the host has checked. */
static inline bool cpu_accept_dtype_of(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	if (cpu_dtype_index(tensor->dtype) == CPU_DTYPES)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "%s %s, only f32, bf16, f16", name, opd_dtype_name(tensor->dtype));
	return true;
}

static inline bool cpu_accept_dtype(const opd_tensor *x, opd_reason *reason)
{
	return cpu_accept_dtype_of("x", x, reason);
}

/* The same for ops that have kernels of f64, too. */
static inline bool cpu_accept_float_of(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	if (cpu_dtype_index(tensor->dtype) == CPU_DTYPES && tensor->dtype != OPD_f64)
		return OPD_REFUSE(reason, OPD_REASON_DTYPE, "%s %s, only f32, bf16, f16, f64", name, opd_dtype_name(tensor->dtype));
	return true;
}

static inline bool cpu_accept_float(const opd_tensor *x, opd_reason *reason)
{
	return cpu_accept_float_of("x", x, reason);
}

/* A `dim` argument counted from the front; of rank 0 it is 0. The host has checked it. */
static inline uint32_t cpu_dim(const opd_tensor *x, int64_t dim)
{
	int64_t rank = x->rank == 0 ? 1 : x->rank;
	return (uint32_t)(dim < 0 ? dim + rank : dim);
}

static inline bool cpu_dim_is_last(const opd_tensor *x, int64_t dim)
{
	return cpu_dim(x, dim) + 1 >= x->rank;
}

/* Elements of the last dimension lie next to each other. NULL passes. */
static inline bool cpu_accept_rows(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	if (tensor == NULL || opd_tensor_contiguous(tensor) || opd_tensor_last(tensor) <= 1)
		return true;
	int64_t stride = tensor->strides[tensor->rank - 1];
	if (stride != 1)
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s has stride %lld in its last dimension, only 1", name, (long long)stride);
	return true;
}

/* Index of a norm's weight into its kernels. */
static inline unsigned cpu_weight_index(const opd_tensor *x, const opd_tensor *weight)
{
	if (weight == NULL)
		return CPU_WEIGHT_NONE;
	return weight->dtype == x->dtype ? CPU_WEIGHT_SAME : CPU_WEIGHT_F32;
}

/* Element of an index operand (i32 or i64) at a distance of elements. */
static inline int64_t cpu_index(const opd_tensor *tensor, uint64_t offset)
{
	const void *data = opd_tensor_data(tensor);
	return tensor->dtype == OPD_i32 ? ((const int32_t *)data)[offset] : ((const int64_t *)data)[offset];
}

/* A tensor as rows. */
struct cpu_rows {
	unsigned char *base;
	uint64_t row_bytes;          /* of a contiguous row */
	const opd_tensor *scattered; /* NULL: row r lies at base + r·row_bytes */
};

/* Only for a tensor with elements, in run. */
struct cpu_rows cpu_rows_of(const opd_tensor *tensor);

/* Address of row `index` of a scattered tensor, counted in row-major order of the leading dimensions. */
void *cpu_rows_scattered(const struct cpu_rows *rows, uint64_t index);

static inline void *cpu_row(const struct cpu_rows *rows, uint64_t index)
{
	return rows->scattered == NULL ? rows->base + index * rows->row_bytes : cpu_rows_scattered(rows, index);
}

/* Whether results of a call that moves so many bytes should go past the caches, which don't hold them all anyway. Good for ops that read a row twice and write it once, and for single passes that do little beside reading and
 * writing; bad where functions are computed (activation.c), and for softmax, whose results are read again (slower by a quarter to a half). */
bool cpu_streams_bytes(uint64_t bytes);

/* The same for single passes. */
enum cpu_reach cpu_reach(uint64_t bytes);

/* cpu_streams_bytes for kernels that want rows of whole lines. */
bool cpu_streams(const struct cpu_rows *results, uint64_t bytes);

/* What kernels have written past the caches is seen by others after this: once at the end of a share. After every row it is a wait for memory, too. */
static inline void cpu_streamed(bool streams)
{
#if defined(__x86_64__)
	if (streams)
		__builtin_ia32_sfence();
#else
	(void)streams;
#endif
}

/* OPD_INTERNAL unless result `index` is contiguous, has x's dtype, and x's shape but for its last extent, which is `last`. A rank-0 x has
 * a rank-0 result. */
OPD_MUST_USE opd_status cpu_expect_output(const opd_impl *impl, const opd_call *call, uint32_t index, const opd_tensor *x, int64_t last,
                                          opd_error *error);

/* OPD_INTERNAL unless result `index` is contiguous and has this dtype and shape [rank]. */
OPD_MUST_USE opd_status cpu_expect_shape(const opd_impl *impl, const opd_call *call, uint32_t index, opd_dtype dtype, uint32_t rank,
                                         const int64_t *shape, opd_error *error);

/* Nanoseconds of a call on so many elements. */
static inline uint64_t cpu_cost_ns(const struct cpu_cost *cost, opd_dtype dtype, uint64_t elements)
{
	unsigned index = dtype == OPD_f64 ? CPU_F64 : cpu_dtype_index(dtype);
	return index == CPU_DTYPES && dtype != OPD_f64 ? 0 : cost->call_ns + estimate_multiply(elements, cost->element_ps[index]) / 1000;
}

static inline uint64_t cpu_any_cost_ns(const struct cpu_any_cost *cost, opd_dtype dtype, uint64_t elements)
{
	return cost->call_ns + estimate_multiply(elements, cost->element_ps[dtype]) / 1000;
}

/* Items [begin, end) on the lane's thread `thread`. */
typedef void (*cpu_items_fn)(const void *context, uint64_t begin, uint64_t end, uint32_t thread);

/* Threads that cpu_for may use for so much work: exec's, or 1 when waking a second one would cost more than it saves. */
uint32_t cpu_threads(const opd_exec *exec, uint64_t items, uint64_t cost_ns);

/* Runs `run` over [0, items), which take cost_ns in all on one thread; in steps, so that a cancelled call ends soon. OPD_OK or
 * OPD_CANCELLED. How items are split varies: results must not depend on it. */
OPD_MUST_USE opd_status cpu_for(const opd_exec *exec, uint64_t items, uint64_t cost_ns, cpu_items_fn run, const void *context,
                                opd_error *error);

/* For items so long that they look in their middle at whether the call was cancelled, and give up. */
struct cpu_cancel {
	const opd_exec *exec;
	atomic_bool seen; /* by one of them: the others see it too */
};

bool cpu_cancelled(struct cpu_cancel *cancel);

/* cpu_for for them: their context leads to `cancel`, which has `exec` and is zeroed otherwise. Also OPD_CANCELLED when one has given up. */
OPD_MUST_USE opd_status cpu_for_long(struct cpu_cancel *cancel, uint64_t items, uint64_t cost_ns, cpu_items_fn run, const void *context,
                                     opd_error *error);

/* cpu_for in shares of `grain` items or more, as the host has it, for items that are few and large: cpu_for makes shares of some microseconds, which must not be several of those. */
OPD_MUST_USE opd_status cpu_for_grain(const opd_exec *exec, uint64_t items, uint64_t grain, uint64_t cost_ns, cpu_items_fn run, const void *context,
                                      opd_error *error);

#endif
