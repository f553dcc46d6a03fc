#include "providers/cpu/call.h"

/* Below this a call stays on one thread, and a share isn't made smaller than half of it: waking a thread takes a few microseconds. */
#define PARALLEL_NS 20000
/* Work between two looks at whether the call was cancelled. */
#define STEP_NS 200000

struct cpu_rows cpu_rows_of(const opd_tensor *tensor)
{
	struct cpu_rows rows = {
		.base = opd_tensor_data(tensor),
		.row_bytes = (uint64_t)opd_tensor_last(tensor) * opd_dtype_bytes(tensor->dtype),
		.scattered = opd_tensor_contiguous(tensor) ? NULL : tensor,
	};
	return rows;
}

void *cpu_rows_scattered(const struct cpu_rows *rows, uint64_t index)
{
	const opd_tensor *tensor = rows->scattered;
	uint64_t offset = 0;
	for (uint32_t i = tensor->rank - 1; i-- > 0;) {
		uint64_t extent = (uint64_t)tensor->shape[i];
		offset += index % extent * (uint64_t)tensor->strides[i];
		index /= extent;
	}
	return rows->base + offset * opd_dtype_bytes(tensor->dtype);
}

static bool output_has_shape(const opd_tensor *output, const opd_tensor *x, int64_t last)
{
	if (output->rank != x->rank)
		return false;
	for (uint32_t i = 0; i < x->rank; i++)
		if (output->shape[i] != (i + 1 == x->rank ? last : x->shape[i]))
			return false;
	return true;
}

opd_status cpu_expect_output(const opd_impl *impl, const opd_call *call, uint32_t index, const opd_tensor *x, int64_t last,
                             opd_error *error)
{
	if (call->output_count <= index)
		return opd_fail(error, OPD_INTERNAL, "%s: %u results, the kernel writes more", impl->op, call->output_count);
	const opd_tensor *output = call->outputs[index];
	if (output->dtype != x->dtype)
		return opd_fail(error, OPD_INTERNAL, "%s: result %u is %s, the kernel writes %s", impl->op, index,
		                opd_dtype_name(output->dtype), opd_dtype_name(x->dtype));
	if (!output_has_shape(output, x, last) || !opd_tensor_contiguous(output))
		return opd_fail(error, OPD_INTERNAL, "%s: result %u has another shape or layout than the kernel writes (last dimension %lld)",
		                impl->op, index, (long long)last);
	return OPD_OK;
}

opd_status cpu_expect_shape(const opd_impl *impl, const opd_call *call, uint32_t index, opd_dtype dtype, uint32_t rank,
                            const int64_t *shape, opd_error *error)
{
	if (call->output_count <= index)
		return opd_fail(error, OPD_INTERNAL, "%s: %u results, the kernel writes more", impl->op, call->output_count);
	const opd_tensor *output = call->outputs[index];
	bool same = output->dtype == dtype && output->rank == rank && opd_tensor_contiguous(output);
	for (uint32_t i = 0; same && i < rank; i++)
		same = output->shape[i] == shape[i];
	if (!same)
		return opd_fail(error, OPD_INTERNAL,
		                "%s: result %u is %s of rank %u, or of another shape or layout than the kernel writes (%s of rank %u)", impl->op, index,
		                opd_dtype_name(output->dtype), output->rank, opd_dtype_name(dtype), rank);
	return OPD_OK;
}

/* Measured on a Zen 5 core with 32 MiB of third-level cache, one thread: rms_norm of rows of 4096 f32, 16 MiB: 349 to 232 us; 32 MiB: 1443 to 721; add of f32, 24 MiB: 375 to 273 us; 192 MiB: 5.65 to 3.94 ms. add is faster
 * so from 1.5 MiB on (12 MiB: 150 to 117 us), but below this, who reads such a result next loses as much (y = a + b; z = y + b of 12 MiB each: 281 us, 303 with y past the caches; of 24 MiB each: 827, 758). */
#define STREAM_BYTES (16u << 20)

bool cpu_streams_bytes(uint64_t bytes)
{
	return bytes >= STREAM_BYTES;
}

/* Whether operands of single passes past the caches are asked for ahead of what the processor asks for by itself: Intel's gains by a third with sixteen threads and up to a half with one (vec.h), a Zen 5 core loses up to a
 * tenth (add, relu, cast of f32), and gains nothing. */
static bool asks_ahead(void)
{
#if defined(__x86_64__)
	return __builtin_cpu_is("intel") != 0;
#else
	return false;
#endif
}

enum cpu_reach cpu_reach(uint64_t bytes)
{
	return !cpu_streams_bytes(bytes) ? CPU_NEAR : asks_ahead() ? CPU_PAST_AHEAD : CPU_PAST;
}

bool cpu_streams(const struct cpu_rows *results, uint64_t bytes)
{
	return cpu_streams_bytes(bytes) && (uintptr_t)results->base % 64 == 0 && results->row_bytes % 64 == 0;
}

struct steps {
	const opd_exec *exec;
	cpu_items_fn run;
	const void *context;
	uint64_t step;
	atomic_bool cancelled;
};

static void steps_run(void *argument, uint64_t begin, uint64_t end, uint32_t thread)
{
	struct steps *steps = argument;
	while (begin < end) {
		uint64_t stop = end - begin > steps->step ? begin + steps->step : end;
		steps->run(steps->context, begin, stop, thread);
		begin = stop;
		if (begin < end && steps->exec->host->cancelled(steps->exec)) {
			atomic_store(&steps->cancelled, true);
			return;
		}
	}
}

static uint64_t items_in(uint64_t wanted_ns, uint64_t items, uint64_t cost_ns)
{
	uint64_t item_ns = cost_ns / items + 1;
	return wanted_ns / item_ns + 1;
}

uint32_t cpu_threads(const opd_exec *exec, uint64_t items, uint64_t cost_ns)
{
	return items > 1 && cost_ns > PARALLEL_NS && exec->threads > 1 ? exec->threads : 1;
}

opd_status cpu_for_grain(const opd_exec *exec, uint64_t items, uint64_t grain, uint64_t cost_ns, cpu_items_fn run, const void *context,
                         opd_error *error)
{
	if (items == 0)
		return OPD_OK;
	if (cost_ns <= PARALLEL_NS) {
		run(context, 0, items, 0);
		return OPD_OK;
	}
	struct steps steps = {.exec = exec, .run = run, .context = context, .step = items_in(STEP_NS, items, cost_ns)};
	atomic_init(&steps.cancelled, false);
	if (cpu_threads(exec, items, cost_ns) > 1)
		exec->host->parallel_for(exec, items, grain, steps_run, &steps);
	else
		steps_run(&steps, 0, items, 0);
	return atomic_load(&steps.cancelled) ? opd_fail(error, OPD_CANCELLED, "cpu: cancelled while the kernel ran") : OPD_OK;
}

opd_status cpu_for(const opd_exec *exec, uint64_t items, uint64_t cost_ns, cpu_items_fn run, const void *context, opd_error *error)
{
	return cpu_for_grain(exec, items, items == 0 ? 1 : items_in(PARALLEL_NS / 2, items, cost_ns), cost_ns, run, context, error);
}

bool cpu_cancelled(struct cpu_cancel *cancel)
{
	if (!atomic_load_explicit(&cancel->seen, memory_order_relaxed) && cancel->exec->host->cancelled(cancel->exec))
		atomic_store_explicit(&cancel->seen, true, memory_order_relaxed);
	return atomic_load_explicit(&cancel->seen, memory_order_relaxed);
}

opd_status cpu_for_long(struct cpu_cancel *cancel, uint64_t items, uint64_t cost_ns, cpu_items_fn run, const void *context, opd_error *error)
{
	opd_status status = cpu_for(cancel->exec, items, cost_ns, run, context, error);
	if (status == OPD_OK && atomic_load_explicit(&cancel->seen, memory_order_relaxed))
		status = opd_fail(error, OPD_CANCELLED, "cpu: cancelled while the kernel ran");
	return status;
}
