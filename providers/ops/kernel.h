/* What the native ops share: argument access, the checks of shape functions, walks over strided operands, loops over lines, and
 * the helpers of input generators.
 *
 * Layer: providers/ops, internal to the native module. Threads: pure functions of their arguments.
 * A native kernel is the definition of its op in portable C and the oracle of every test: it takes any strides, and prefers being
 * right and short to being fast. Values are computed in double; kernel_round puts in the roundings of the op's definition. A sum,
 * difference, product, quotient or square root of two floats, computed in double and rounded to f32, is what f32 arithmetic
 * gives, so one text serves f32 and f64.
 *
 * Not here: single elements of a dtype (proto/element.h), and checks of what the host guarantees (strides inside the source,
 * products that fit, argument types). */
#ifndef OPD_PROVIDERS_OPS_KERNEL_H
#define OPD_PROVIDERS_OPS_KERNEL_H

#include "proto/element.h"
#include "providers/estimate.h"
#include "providers/provider.h"

/* ---- Arguments --------------------------------------------------------------------------------------------------------- */

/* The tensor of argument `index`; NULL when it is None. */
static inline const opd_tensor *kernel_tensor(const opd_call *call, uint32_t index)
{
	return call->args[index].kind == OPD_ARG_TENSOR ? call->args[index].tensor : NULL;
}

/* An int argument, or `otherwise` when it is None. */
static inline int64_t kernel_int(const opd_call *call, uint32_t index, int64_t otherwise)
{
	return call->args[index].kind == OPD_ARG_INT ? call->args[index].i : otherwise;
}

static inline double kernel_float(const opd_call *call, uint32_t index)
{
	return call->args[index].f;
}

static inline bool kernel_bool(const opd_call *call, uint32_t index)
{
	return call->args[index].b;
}

static inline const char *kernel_str(const opd_call *call, uint32_t index)
{
	return call->args[index].str;
}

/* ---- Shape functions --------------------------------------------------------------------------------------------------- */

/* Fails with OPD_INVALID_ARGUMENT and the text "<op's name>: <format>". */
OPD_MUST_USE OPD_PRINTF(3, 4) opd_status kernel_invalid(const opd_op *op, opd_error *error, const char *format, ...);

/* "[2, 3]", "[]". Returned by value, so that a failing call can write `kernel_shape_text(x).text` among its arguments. */
struct kernel_text {
	char text[200];
};
struct kernel_text kernel_shape_text(const opd_tensor *tensor);
struct kernel_text kernel_extents_text(uint32_t rank, const int64_t *shape);

/* Each check below returns OPD_OK or the failure of kernel_invalid; `name` is the parameter's. A tensor that is None (NULL)
 * passes. */

/* f16, bf16, f32 or f64. */
OPD_MUST_USE opd_status kernel_expect_float(const opd_op *op, const char *name, const opd_tensor *tensor, opd_error *error);
OPD_MUST_USE opd_status kernel_expect_dtype(const opd_op *op, const char *name, const opd_tensor *tensor, opd_dtype dtype,
                                            opd_error *error);
/* The dtype of `like`; the text names both. */
OPD_MUST_USE opd_status kernel_expect_dtype_of(const opd_op *op, const char *name, const opd_tensor *tensor,
                                               const char *like_name, const opd_tensor *like, opd_error *error);
/* The dtype of `like`, or f32: norm weights and biases, cos_sin_cache. */
OPD_MUST_USE opd_status kernel_expect_dtype_of_or_f32(const opd_op *op, const char *name, const opd_tensor *tensor,
                                                      const char *like_name, const opd_tensor *like, opd_error *error);
/* i32 or i64. */
OPD_MUST_USE opd_status kernel_expect_index(const opd_op *op, const char *name, const opd_tensor *tensor, opd_error *error);
OPD_MUST_USE opd_status kernel_expect_rank(const opd_op *op, const char *name, const opd_tensor *tensor, uint32_t rank,
                                           opd_error *error);
OPD_MUST_USE opd_status kernel_expect_rank_min(const opd_op *op, const char *name, const opd_tensor *tensor, uint32_t rank,
                                               opd_error *error);
/* Exactly this shape; `why` says where it comes from, as "last dimension of x". */
OPD_MUST_USE opd_status kernel_expect_shape(const opd_op *op, const char *name, const opd_tensor *tensor, uint32_t rank,
                                            const int64_t *shape, const char *why, opd_error *error);
/* The shape of `like`. */
OPD_MUST_USE opd_status kernel_expect_shape_of(const opd_op *op, const char *name, const opd_tensor *tensor,
                                               const char *like_name, const opd_tensor *like, opd_error *error);
/* An attribute: neither NaN nor infinite. */
OPD_MUST_USE opd_status kernel_expect_finite(const opd_op *op, const char *name, double value, opd_error *error);
/* An attribute that kernels compute with in f32: finite there too. */
OPD_MUST_USE opd_status kernel_expect_f32(const opd_op *op, const char *name, double value, opd_error *error);
/* `approximate` of the gelu family: "none" or "tanh". */
OPD_MUST_USE opd_status kernel_expect_approximate(const opd_op *op, const char *value, opd_error *error);

/* dim in [-rank, rank) (rank 0 counts as 1) to [0, rank). */
OPD_MUST_USE opd_status kernel_expect_dim(const opd_op *op, const opd_tensor *x, int64_t dim, uint32_t *dim_out,
                                          opd_error *error);

/* Fills in a result. A rank that `output` has no room for is OPD_INVALID_ARGUMENT. */
OPD_MUST_USE opd_status kernel_output_set(const opd_op *op, opd_output *output, opd_dtype dtype, uint32_t rank,
                                          const int64_t *shape, opd_error *error);
/* Fills in a result of x's shape. */
OPD_MUST_USE opd_status kernel_output_like(const opd_op *op, opd_output *output, opd_dtype dtype, const opd_tensor *x,
                                           opd_error *error);
/* NumPy's broadcast of the first a_rank dimensions of a and the first b_rank dimensions of b (matmul leaves out the last two).
 * Ranks up to OPD_RANK_MAX. shape_out: [max(a_rank, b_rank)]. */
OPD_MUST_USE opd_status kernel_broadcast(const opd_op *op, const char *a_name, const opd_tensor *a, uint32_t a_rank,
                                         const char *b_name, const opd_tensor *b, uint32_t b_rank, int64_t *shape_out,
                                         opd_error *error);

/* ---- Running ----------------------------------------------------------------------------------------------------------- */

/* A native implementation's fields. Its `user` is its op: kernel_verify_outputs relies on it; what the kernel needs of its own
 * goes into the op's `user`. */
#define KERNEL_NATIVE(name, op_address, run_function, cost_function, uuid_text)                                                  \
	{                                                                                                                            \
		.struct_bytes = sizeof(opd_impl), .flags = OPD_IMPL_THREAD_INVARIANT | OPD_IMPL_BATCH_INVARIANT, .op = (name),           \
		.device = "cpu", .uuid = (uuid_text), .cost_ns = (cost_function), .run = (run_function), .user = (op_address),           \
	}

/* OPD_INTERNAL unless the outputs have the dtypes and shapes that the op's own shape function gives: the first line of every run.
 * (The host may have been given another shape function.) */
OPD_MUST_USE opd_status kernel_verify_outputs(const opd_impl *impl, const opd_call *call, opd_error *error);

/* A loop over independent items (rows, lines, chunks), spread over the lane's threads where there are many. */
struct kernel_job {
	const opd_impl *impl;
	const opd_call *call;
	const opd_exec *exec;
	const void *context;    /* the kernel's own: read by all threads */
	uint64_t scratch_bytes; /* each thread gets such a block of the host's, uninitialised; 0: none, `scratch` is NULL */
};

/* Computes one item. Items run in any order and at once: each writes only what is its own. */
typedef void (*kernel_item_fn)(const struct kernel_job *job, uint64_t item, void *scratch);

/* Runs `item` for [0, items); item_ns estimates one. OPD_OK; OPD_CANCELLED; OPD_RESOURCE_EXHAUSTED: no scratch. */
OPD_MUST_USE opd_status kernel_for(const struct kernel_job *job, uint64_t items, uint64_t item_ns, kernel_item_fn item,
                                   opd_error *error);

/* The same for items so long that they look at host->cancelled in their middle and give up: also OPD_CANCELLED when the result
 * stopped being wanted before the last item was done. */
OPD_MUST_USE opd_status kernel_for_long(const struct kernel_job *job, uint64_t items, uint64_t item_ns, kernel_item_fn item,
                                        opd_error *error);

/* An estimate as a number of nanoseconds, however large. */
static inline uint64_t kernel_ns(double value)
{
	return estimate_of(value);
}

/* A cost estimate for kernels that pass over their operands: so many nanoseconds for each element of every tensor of the call. */
uint64_t kernel_cost_pass(const opd_call *call, uint64_t element_ns);

/* ---- Lines: a tensor cut along one dimension ----------------------------------------------------------------------------- */

/* Extent and stride (elements) of a dimension; 1 and 0 for rank 0, where dim is 0. */
static inline int64_t kernel_extent(const opd_tensor *tensor, uint32_t dim)
{
	return tensor->rank == 0 ? 1 : tensor->shape[dim];
}

static inline int64_t kernel_stride(const opd_tensor *tensor, uint32_t dim)
{
	return tensor->rank == 0 ? 0 : tensor->strides[dim];
}

/* A run of elements: where a row lies. */
struct kernel_line {
	opd_dtype dtype;
	void *data;     /* element 0 */
	int64_t stride; /* elements */
	int64_t extent;
};

/* Line number `line` along `dim`: the other dimensions counted row-major. The tensor is not empty. */
struct kernel_line kernel_line(const opd_tensor *tensor, uint32_t dim, uint64_t line);

/* Row number `row`: a line along the last dimension (of a tensor of rank 0: its element). */
struct kernel_line kernel_row(const opd_tensor *tensor, uint64_t row);

/* Number of lines along dim, of a tensor that is not empty. */
static inline uint64_t kernel_lines(const opd_tensor *tensor, uint32_t dim)
{
	return tensor->elements / (uint64_t)kernel_extent(tensor, dim);
}

/* Address of element `i` of a line. */
static inline void *kernel_line_at(const struct kernel_line *line, int64_t i)
{
	return (unsigned char *)line->data + i * line->stride * (int64_t)opd_dtype_bytes(line->dtype);
}

/* All elements of a contiguous tensor (a result) as one line. */
struct kernel_line kernel_flat(const opd_tensor *tensor);

/* Address of the element with row-major number `index`, whatever the strides. */
void *kernel_element(const opd_tensor *tensor, uint64_t index);

/* Value of an index operand's (i32, i64) element, by its row-major number. */
static inline int64_t kernel_index(const opd_tensor *tensor, uint64_t index)
{
	return element_load_i64(tensor->dtype, kernel_element(tensor, index));
}

/* Elements [begin, begin + count) of a line into or from a contiguous buffer. Any dtype; i64 beyond 2^53 needs the i64 form. */
void kernel_load(const struct kernel_line *line, int64_t begin, int64_t count, double *to);
void kernel_load_f32(const struct kernel_line *line, int64_t begin, int64_t count, float *to);
void kernel_load_i64(const struct kernel_line *line, int64_t begin, int64_t count, int64_t *to);
/* Float dtypes and f8. f64 keeps the double; the others round it to f32, then as cast does. */
void kernel_store(const struct kernel_line *line, int64_t begin, int64_t count, const double *from);
void kernel_store_f32(const struct kernel_line *line, int64_t begin, int64_t count, const float *from);
/* Wraps, as element_store_i64. */
void kernel_store_i64(const struct kernel_line *line, int64_t begin, int64_t count, const int64_t *from);

/* Elements that kernels handle at a time, in a buffer on the stack: so a long row needs no memory. */
#define KERNEL_CHUNK 512

/* Elements of a chunk that begins at `begin`. */
static inline int64_t kernel_chunk(int64_t begin, int64_t end)
{
	return end - begin < KERNEL_CHUNK ? end - begin : KERNEL_CHUNK;
}

/* ---- Rounding ---------------------------------------------------------------------------------------------------------- */

/* The value as `dtype` (a float dtype or f8) holds it: f64 as it is, f32 rounded once, the others through f32. */
double kernel_round(opd_dtype dtype, double value);

/* The dtype in which a call of this dtype computes: f64, or f32. */
static inline opd_dtype kernel_work(opd_dtype dtype)
{
	return dtype == OPD_f64 ? OPD_f64 : OPD_f32;
}

/* kernel_round(kernel_work(dtype), value), inline. */
static inline double kernel_round_work(opd_dtype dtype, double value)
{
	return dtype == OPD_f64 ? value : (double)(float)value;
}

/* ---- Views: all elements of a tensor, in another shape --------------------------------------------------------------------- */

/* A tensor's elements in the row-major order of a shape that it is broadcast to. */
struct kernel_view {
	opd_dtype dtype;
	uint32_t rank;
	unsigned char *data; /* element 0 */
	int64_t shape[OPD_RANK_MAX];
	int64_t strides[OPD_RANK_MAX]; /* elements */
};

/* `tensor` broadcast to a shape (one that kernel_broadcast gave, or its own), rank up to OPD_RANK_MAX. Dimensions that lie behind
 * each other are merged, so a contiguous tensor is one run. */
struct kernel_view kernel_view(const opd_tensor *tensor, uint32_t rank, const int64_t *shape);

/* The half of `tensor`'s last dimension that begins at `first`, as a view of that half's shape; rank 1 to OPD_RANK_MAX. */
struct kernel_view kernel_view_half(const opd_tensor *tensor, int64_t first);

/* The longest run (up to `count` elements) from row-major number `begin` on. */
struct kernel_line kernel_view_run(const struct kernel_view *view, uint64_t begin, int64_t count);

/* Elements [begin, begin + count) of a view. */
void kernel_gather(const struct kernel_view *view, uint64_t begin, int64_t count, double *to);
void kernel_gather_i64(const struct kernel_view *view, uint64_t begin, int64_t count, int64_t *to);

/* ---- Generators -------------------------------------------------------------------------------------------------------- */

/* OPD_INVALID_ARGUMENT unless there are the op's dims, each in [0, 2^40]; OPD_OUT_OF_RANGE unless variant < variants. First line
 * of a generator. */
OPD_MUST_USE opd_status kernel_generator_begin(const opd_op *op, const opd_generator *generator, uint32_t variants,
                                               opd_error *error);
/* OPD_INVALID_ARGUMENT unless generator->dtype is a float dtype. */
OPD_MUST_USE opd_status kernel_generator_float(const opd_op *op, const opd_generator *generator, opd_error *error);
/* A tensor argument, filled by the host (standard deviation `scale`). */
OPD_MUST_USE opd_status kernel_generate(const opd_op *op, opd_generator *generator, const char *name, opd_dtype dtype,
                                        uint32_t rank, const int64_t *shape, double scale, opd_error *error);
/* A tensor argument left zeroed, for the caller to write: *memory_out. */
OPD_MUST_USE opd_status kernel_generate_raw(const opd_op *op, opd_generator *generator, const char *name, opd_dtype dtype,
                                            uint32_t rank, const int64_t *shape, void **memory_out, opd_error *error);

#endif
