/* Programs built when they are first used, and kernels' launches. */
#include <stdio.h>
#include <string.h>

#include "providers/opencl/opencl.h"
#include "sources.h"

static const char *const kernel_names[OPENCL_KERNEL_COUNT] = {
#define X(family, name) #name,
	OPENCL_KERNELS(X)
#undef X
};

static const enum opencl_family kernel_families[OPENCL_KERNEL_COUNT] = {
#define X(family, name) OPENCL_##family,
	OPENCL_KERNELS(X)
#undef X
};

/* Kept by the host for people who write kernels: the driver's own words. */
static opd_status build_failed(const struct opencl *cl, const struct opencl_device *device, cl_program program, cl_int code, opd_error *error)
{
	char text[400] = "";
	(void)cl->cl.GetProgramBuildInfo(program, device->id, CL_PROGRAM_BUILD_LOG, sizeof text - 1, text, NULL);
	return opd_fail(error, OPD_INTERNAL, "kernels could not be built: %s (%d): %.300s", library_error(code), (int)code, text);
}

static opd_status need_program(const struct opencl *cl, struct opencl_device *device, enum opencl_family family, enum opencl_dtype dtype, opd_error *error)
{
	static const char *const options[OPENCL_DTYPES] = {"-DDTYPE=0 -cl-std=CL1.2", "-DDTYPE=1 -cl-std=CL1.2", "-DDTYPE=2 -cl-std=CL1.2"};
	const char *texts[2] = {source_common, source_texts[family]};
	cl_int code;
	if (device->programs[family][dtype] != NULL)
		return OPD_OK;
	cl_program program = cl->cl.CreateProgramWithSource(device->context, 2, texts, NULL, &code);
	if (code != CL_SUCCESS)
		return opencl_status(code, "clCreateProgramWithSource", error);
	code = cl->cl.BuildProgram(program, 1, &device->id, options[dtype], NULL, NULL);
	if (code != CL_SUCCESS) {
		opd_status status = build_failed(cl, device, program, code, error);
		(void)cl->cl.ReleaseProgram(program);
		return status;
	}
	device->programs[family][dtype] = program;
	return OPD_OK;
}

static opd_status need_kernel(const struct opencl *cl, struct opencl_device *device, enum opencl_kernel kernel, enum opencl_dtype dtype, opd_error *error)
{
	cl_int code;
	if (device->kernels[kernel][dtype] != NULL)
		return OPD_OK;
	opd_status status = need_program(cl, device, kernel_families[kernel], dtype, error);
	if (status != OPD_OK)
		return status;
	cl_kernel made = cl->cl.CreateKernel(device->programs[kernel_families[kernel]][dtype], kernel_names[kernel], &code);
	if (code == CL_SUCCESS)
		device->kernels[kernel][dtype] = made;
	return opencl_status(code, "clCreateKernel", error);
}

static enum opencl_dtype variant(opd_dtype dtype)
{
	return dtype == OPD_f16 ? OPENCL_F16 : dtype == OPD_bf16 ? OPENCL_BF16 : OPENCL_F32;
}

struct launch launch_begin(void *state, const opd_exec *exec, enum opencl_kernel kernel, opd_dtype dtype, opd_error *error)
{
	struct launch launch = {.cl = state, .stream = exec->stream, .error = error};
	launch.status = need_kernel(launch.cl, launch.stream->device, kernel, variant(dtype), error);
	if (launch.status == OPD_OK)
		launch.kernel = launch.stream->device->kernels[kernel][variant(dtype)];
	return launch;
}

static void set(struct launch *launch, size_t bytes, const void *value)
{
	if (launch->status != OPD_OK)
		return;
	launch->status = opencl_status(launch->cl->cl.SetKernelArg(launch->kernel, launch->arg, bytes, value), "clSetKernelArg", launch->error);
	launch->arg++;
}

void launch_memory(struct launch *launch, void *memory)
{
	const cl_mem object = memory;
	set(launch, sizeof object, &object);
}

void launch_tensor(struct launch *launch, const opd_tensor *tensor, const opd_tensor *otherwise)
{
	launch_memory(launch, (tensor == NULL ? otherwise : tensor)->data);
	launch_int(launch, tensor == NULL ? 0 : (int64_t)(tensor->byte_offset / opd_dtype_bytes(tensor->dtype)));
}

void launch_int(struct launch *launch, int64_t value)
{
	const cl_long number = value;
	set(launch, sizeof number, &number);
}

void launch_float(struct launch *launch, double value)
{
	const cl_float number = (cl_float)value;
	set(launch, sizeof number, &number);
}

void launch_value(struct launch *launch, size_t bytes, const void *value)
{
	set(launch, bytes, value);
}

void launch_local(struct launch *launch, size_t bytes)
{
	set(launch, bytes, NULL);
}

opd_status launch_run(struct launch *launch, cl_uint dimensions, const size_t *global, const size_t *local)
{
	if (launch->status != OPD_OK)
		return launch->status;
	cl_int code = launch->cl->cl.EnqueueNDRangeKernel(launch->stream->queue, launch->kernel, dimensions, NULL, global, local, 0, NULL, NULL);
	return opencl_status(code, "clEnqueueNDRangeKernel", launch->error);
}

opd_status launch_rows(struct launch *launch, uint64_t rows)
{
	const size_t local = launch->stream->device->group;
	const size_t global = rows * local;
	launch_local(launch, local * sizeof(cl_float));
	return launch_run(launch, 1, &global, &local);
}

opd_status launch_elements(struct launch *launch, uint64_t elements)
{
	const size_t local = 64;
	const size_t global = (elements + local - 1) / local * local;
	return launch_run(launch, 1, &global, &local);
}

opd_status opencl_verify(const opd_impl *impl, const opd_call *call, const opd_tensor *like, uint32_t output, opd_error *error)
{
	if (call->outputs[output]->dtype == like->dtype && call->outputs[output]->device == like->device)
		return OPD_OK;
	return opd_fail(error, OPD_INTERNAL, "opencl.%s: result %u is %s on device %u, expected %s on %u", impl->op, (unsigned)output,
	                opd_dtype_name(call->outputs[output]->dtype), (unsigned)call->outputs[output]->device, opd_dtype_name(like->dtype),
	                (unsigned)like->device);
}

/* ---- Predicates ---- */

bool opencl_takes_dtype(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	if (tensor->dtype == OPD_f32 || tensor->dtype == OPD_f16 || tensor->dtype == OPD_bf16)
		return true;
	return OPD_REFUSE(reason, OPD_REASON_DTYPE, "%s %s, only f32, f16, bf16", name, opd_dtype_name(tensor->dtype));
}

bool opencl_fits(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	if (tensor->elements <= INT32_MAX)
		return true;
	return OPD_REFUSE(reason, OPD_REASON_SIZE, "%s has %llu elements, at most 2^31 - 1", name, (unsigned long long)tensor->elements);
}

bool opencl_takes(const char *name, const opd_tensor *tensor, opd_reason *reason)
{
	if (tensor == NULL)
		return true;
	if (!opencl_takes_dtype(name, tensor, reason) || !opencl_fits(name, tensor, reason))
		return false;
	if (!opd_tensor_contiguous(tensor))
		return OPD_REFUSE(reason, OPD_REASON_LAYOUT, "%s is strided", name);
	return true;
}
