/* Kernels of several jobs in one launch, where their implementation can (opd_impl.run_many): a launch costs the thread that enqueues 3 to 4 us, and the device as much, whatever a small kernel does.
 *
 * A kernel that may wait for others' is kept until there are enough, or something else comes to the stream, or an event is to tell of its job's end: nobody waits for others to come. Until then its job is
 * in flight like any other, with operands, results and arguments in place; none of them can be what another one that waits writes, since nobody knows a run's results before it has ended. */
#include "server/daemon.h"
#include "server/device_work.h"
#include "server/module.h"
#include "server/request.h"

static opd_status failed(struct device_lane *lane, struct request *request, opd_status status)
{
	struct device_job *job = &request->device_job;
	if (status == OPD_OK)
		return OPD_OK;
	device_note(lane, status, &job->error);
	return module_failure(status, &job->error, "%s.%s failed", request->run.dispatch.impl->provider->name, request->run.op->schema->name);
}

opd_exec device_exec(const struct device_lane *lane, const struct impl *impl, struct lane_exec *serial)
{
	*serial = lane_exec_serial(NULL);
	return (opd_exec){
		.struct_bytes = sizeof(opd_exec),
		.threads = 1,
		.host = &impl->provider->module->host,
		.stream = lane->stream,
		.device = lane->number,
		.ordinal = lane->device.ordinal,
		.lane = serial,
	};
}

opd_status device_kernel(struct device_lane *lane, struct request *request, const opd_call *call, const opd_exec *exec)
{
	const struct impl *impl = request->run.dispatch.impl;
	return failed(lane, request, impl->def->run(impl->def, impl->state, call, exec, &request->device_job.error));
}

/* True: all are enqueued, or none ever will be. */
static bool run_together(struct device_lane *lane, const struct device_many *many, const opd_exec *exec)
{
	opd_error error = {0};
	if (many->count < 2)
		return false;
	const opd_status status = many->impl->run_many(many->impl->def, many->impl->state, many->calls, many->count, exec, &error);
	for (uint32_t i = 0; status == OPD_DATA_LOSS && i < many->count; i++) {
		many->requests[i]->device_job.error = error;
		many->requests[i]->device_job.status = failed(lane, many->requests[i], status);
	}
	return status == OPD_OK || status == OPD_DATA_LOSS;
}

void device_many_end(struct device_lane *lane)
{
	const struct device_many many = lane->many;
	struct lane_exec serial;
	lane->many.count = 0;
	if (many.count == 0)
		return;
	const opd_exec exec = device_exec(lane, many.impl, &serial);
	if (run_together(lane, &many, &exec))
		return;
	for (uint32_t i = 0; i < many.count; i++)
		many.requests[i]->device_job.status = device_kernel(lane, many.requests[i], many.calls[i], &exec);
}

bool device_many_add(struct device_lane *lane, struct request *request, const opd_call *call)
{
	struct device_many *many = &lane->many;
	const struct impl *impl = request->run.dispatch.impl;
	if (impl->run_many == NULL || !device_shares_events(lane))
		return false;
	if (many->count == OPD_CALLS_MAX || (many->count != 0 && many->impl != impl))
		device_many_end(lane);
	many->impl = impl;
	many->requests[many->count] = request;
	many->calls[many->count++] = call;
	return true;
}
