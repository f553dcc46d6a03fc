/* The module: its devices are found, its implementations registered. */
#include "providers/opencl/opencl.h"

#include <stdlib.h>
#include <string.h>

static void add_device(struct opencl *cl, cl_device_id id)
{
	size_t most = 0;
	if (cl->device_count == OPENCL_DEVICES)
		return;
	if (cl->cl.GetDeviceInfo(id, CL_DEVICE_MAX_WORK_GROUP_SIZE, sizeof most, &most, NULL) != CL_SUCCESS || most < 64)
		return; /* it couldn't run the product's tiles */
	struct opencl_device *device = &cl->devices[cl->device_count];
	cl_int code;
	device->id = id;
	device->group = most < 256 ? 64 : 256;
	device->context = cl->cl.CreateContext(NULL, 1, &id, NULL, NULL, &code);
	if (code == CL_SUCCESS)
		cl->device_count++;
}

static void add_devices(struct opencl *cl, cl_device_type type)
{
	cl_platform_id platforms[16];
	cl_uint platform_count = 0;
	if (cl->cl.GetPlatformIDs(16, platforms, &platform_count) != CL_SUCCESS)
		return;
	for (cl_uint i = 0; i < platform_count && i < 16; i++) {
		cl_device_id ids[OPENCL_DEVICES];
		cl_uint count = 0;
		if (cl->cl.GetDeviceIDs(platforms[i], type, OPENCL_DEVICES, ids, &count) != CL_SUCCESS)
			continue;
		for (cl_uint k = 0; k < count && k < OPENCL_DEVICES; k++)
			add_device(cl, ids[k]);
	}
}

/* A processor that poses as a device (PoCL) is taken only where there is no other: beside a GPU it would get a share of its work. */
static void probe(struct opencl *cl)
{
	if (!library_open(&cl->cl, cl->missing, sizeof cl->missing))
		return;
	add_devices(cl, CL_DEVICE_TYPE_GPU | CL_DEVICE_TYPE_ACCELERATOR);
	if (cl->device_count == 0)
		add_devices(cl, CL_DEVICE_TYPE_CPU);
	if (cl->device_count == 0)
		(void)snprintf(cl->missing, sizeof cl->missing, "not available: no OpenCL device (is a driver installed?)");
}

static opd_status register_family(struct opencl *cl, const opd_host *host, const opd_impl *family, opd_error *error)
{
	opd_status status = OPD_OK;
	for (; status == OPD_OK && family->op != NULL; family++) {
		opd_impl *impl = &cl->impls[cl->impl_count++];
		*impl = *family;
		impl->unsupported = cl->missing[0] != '\0' ? cl->missing : NULL;
		status = host->register_impl(host, impl, error);
	}
	return status;
}

static opd_status opencl_open(const opd_host *host, void *state, opd_error *error)
{
	const opd_impl *const families[] = {opencl_norms, opencl_elementwises, opencl_softmaxes, opencl_positions, opencl_products};
	struct opencl *cl = state;
	opd_status status = OPD_OK;
	probe(cl);
	if (cl->device_count != 0) {
		cl->backend = opencl_backend;
		cl->backend.device_count = cl->device_count;
		status = host->register_backend(host, &cl->backend, error);
	}
	for (size_t i = 0; status == OPD_OK && i < sizeof families / sizeof families[0]; i++)
		status = register_family(cl, host, families[i], error);
	return status;
}

static void close_device(struct opencl *cl, struct opencl_device *device)
{
	for (uint32_t dtype = 0; dtype < OPENCL_DTYPES; dtype++) {
		for (uint32_t i = 0; i < OPENCL_KERNEL_COUNT; i++)
			if (device->kernels[i][dtype] != NULL)
				(void)cl->cl.ReleaseKernel(device->kernels[i][dtype]);
		for (uint32_t i = 0; i < OPENCL_FAMILIES; i++)
			if (device->programs[i][dtype] != NULL)
				(void)cl->cl.ReleaseProgram(device->programs[i][dtype]);
	}
	(void)cl->cl.ReleaseContext(device->context);
}

static void opencl_close(const opd_host *host, void *state)
{
	struct opencl *cl = state;
	(void)host;
	for (uint32_t i = 0; i < cl->device_count; i++)
		close_device(cl, &cl->devices[i]);
}

static const opd_module module = {
	.abi = OPD_PROVIDER_ABI,
	.struct_bytes = sizeof module,
	.name = "opencl",
	.version = OPD_VERSION,
	.state_bytes = sizeof(struct opencl),
	.open = opencl_open,
	.close = opencl_close,
};

const opd_module *opd_module_get(void)
{
	return &module;
}
