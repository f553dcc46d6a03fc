/* The module `opencl`: its devices, its programs, and what its kernels' launches share.
 *
 * Layer: provider opencl. Threads: opened and closed alone; a device's context, programs and kernels by whoever works with the device, one at a time.
 * A device pointer of the contract is a cl_mem; element 0 of a tensor is byte_offset bytes into it. */
#ifndef OPD_OPENCL_OPENCL_H
#define OPD_OPENCL_OPENCL_H

#include <opd/provider.h>

#include "providers/opencl/library.h"

enum { OPENCL_DEVICES = 16, OPENCL_IMPLS = 32 };

/* A source each, in kernels/. */
enum opencl_family {
	OPENCL_NORM,
	OPENCL_ELEMENTWISE,
	OPENCL_SOFTMAX,
	OPENCL_POSITION,
	OPENCL_PRODUCT,
	OPENCL_FAMILIES,
};

/* Every kernel of every family; the name in the source. */
#define OPENCL_KERNELS(X)                                                                                                           \
	X(NORM, rms_norm) X(NORM, layer_norm) X(ELEMENTWISE, activate) X(ELEMENTWISE, activate_and_mul) X(ELEMENTWISE, combine)         \
	X(SOFTMAX, softmax) X(POSITION, rotary_embedding) X(POSITION, embedding) X(POSITION, index_check) X(PRODUCT, product) X(PRODUCT, product_rows)

enum opencl_kernel {
#define X(family, name) OPENCL_##name,
	OPENCL_KERNELS(X)
#undef X
	OPENCL_KERNEL_COUNT,
};

enum opencl_dtype { OPENCL_F32, OPENCL_F16, OPENCL_BF16, OPENCL_DTYPES };

struct opencl_device {
	cl_device_id id;
	cl_context context;
	cl_program programs[OPENCL_FAMILIES][OPENCL_DTYPES]; /* built when first used */
	cl_kernel kernels[OPENCL_KERNEL_COUNT][OPENCL_DTYPES];
	size_t group; /* items of a work group that reduces a row */
};

/* The module's state. */
struct opencl {
	struct library cl;
	char missing[160];
	uint32_t device_count;
	struct opencl_device devices[OPENCL_DEVICES];
	opd_backend backend;
	uint32_t impl_count;
	opd_impl impls[OPENCL_IMPLS];
};

/* Of one device; what an exec->stream or the backend's stream points to. */
struct opencl_stream {
	struct opencl_device *device;
	cl_command_queue queue;
};

extern const opd_backend opencl_backend;

/* Each family's implementations, ended by one without an op. */
extern const opd_impl opencl_norms[], opencl_elementwises[], opencl_softmaxes[], opencl_positions[], opencl_products[];

/* OPD_OK, or what an OpenCL code means, with `what` and its name in the text. */
opd_status opencl_status(cl_int code, const char *what, opd_error *error);

/* ---- For predicates ---- */

/* f32, f16 or bf16; false with the reason. */
bool opencl_takes_dtype(const char *name, const opd_tensor *tensor, opd_reason *reason);
/* The same and row-major. NULL tensors are taken. */
bool opencl_takes(const char *name, const opd_tensor *tensor, opd_reason *reason);
/* Sizes are counted in 32 bits in the kernels. */
bool opencl_fits(const char *name, const opd_tensor *tensor, opd_reason *reason);
static inline const opd_tensor *opencl_tensor(const opd_call *call, uint32_t index)
{
	return call->args[index].kind == OPD_ARG_TENSOR ? call->args[index].tensor : NULL;
}

/* ---- Launching ---- */

/* A kernel with its arguments so far. After a failure nothing more happens, and launch_run answers with it. */
struct launch {
	struct opencl *cl;
	struct opencl_stream *stream;
	cl_kernel kernel;
	cl_uint arg;
	opd_status status;
	opd_error *error;
};

/* Builds the kernel's program if this is its first use on the device. `data`: names the variant by its dtype. */
struct launch launch_begin(void *state, const opd_exec *exec, enum opencl_kernel kernel, opd_dtype dtype, opd_error *error);
/* Memory and the number of its element 0, two arguments. NULL: any other memory, and 0; the kernel is told otherwise not to look. */
void launch_tensor(struct launch *launch, const opd_tensor *tensor, const opd_tensor *otherwise);
void launch_memory(struct launch *launch, void *memory);
void launch_int(struct launch *launch, int64_t value);
void launch_float(struct launch *launch, double value);
void launch_value(struct launch *launch, size_t bytes, const void *value);
void launch_local(struct launch *launch, size_t bytes);
/* Enqueues over `dimensions` of global and local sizes. */
OPD_MUST_USE opd_status launch_run(struct launch *launch, cl_uint dimensions, const size_t *global, const size_t *local);
/* A work group a row. */
OPD_MUST_USE opd_status launch_rows(struct launch *launch, uint64_t rows);
/* An item an element. */
OPD_MUST_USE opd_status launch_elements(struct launch *launch, uint64_t elements);
/* Outputs have the first operand's dtype, or INTERNAL. */
OPD_MUST_USE opd_status opencl_verify(const opd_impl *impl, const opd_call *call, const opd_tensor *like, uint32_t output, opd_error *error);

#endif
