/* The explain record: what was skipped and why, the effective list, where it comes from, and where the time went. */
#include <string.h>

#include "server/daemon.h"
#include "server/metrics.h"
#include "server/request.h"

static uint64_t between(uint64_t from, uint64_t to)
{
	return from == 0 || to < from ? 0 : to - from;
}

static void fill_times(const struct request *request, struct msg_times *times)
{
	const struct request_clock *clock = &request->clock;
	times->decode = between(clock->received, clock->accepted) + between(clock->ready, clock->bound);
	times->dispatch = between(clock->bound, clock->dispatched);
	times->queue = between(clock->queued, clock->started);
	times->kernel = between(clock->started, clock->ended) - (clock->moves < between(clock->started, clock->ended) ? clock->moves : 0);
	times->moves = clock->moves;
	times->receive = between(clock->accepted, clock->ready);
	times->pack = clock->ended == 0 ? 0 : between(clock->ended, request_now_ns());
}

/* Counts alone: who the others are is none of its business. */
static const struct msg_behind *behind_of(struct request *request)
{
	const struct sched_behind *from = request->run.behind;
	struct msg_behind *to = arena_alloc(&request->arena, sizeof *to);
	if (to == NULL)
		return NULL;
	*to = (struct msg_behind){
		.own_jobs = from->own_jobs,
		.tenant_jobs = from->group_jobs,
		.other_jobs = from->other_jobs,
		.realtime_jobs = from->class_jobs[CLASS_REALTIME],
		.interactive_jobs = from->class_jobs[CLASS_INTERACTIVE],
		.batch_jobs = from->class_jobs[CLASS_BATCH],
		.own_ns = from->own_ns,
		.tenant_ns = from->group_ns,
		.other_ns = from->other_ns,
		.running = from->running,
	};
	return to;
}

/* Whether the operand would have to come over, and from where. */
static bool would_move(const struct request *request, uint32_t index, uint32_t *from_out)
{
	const struct request_run *run = &request->run;
	const struct buffer *buffer = run->kept == NULL || run->kept[index] == NULL ? NULL : run->kept[index]->buffer;
	*from_out = buffer == NULL ? 0 : buffer->device;
	return buffer == NULL ? run->device != 0 : !buffer_is_on(buffer, run->device);
}

/* Of a dry run: what would come over now. Results come back unless they stay without a copy in the reply. */
static void predict_moves(struct request *request, struct msg_explain *explain)
{
	struct request_run *run = &request->run;
	const struct device *devices = request->snapshot->devices;
	struct msg_move *moves = arena_array(&request->arena, run->bound.operand_count + run->bound.call.output_count, sizeof moves[0]);
	uint32_t count = 0;
	uint32_t from;
	for (uint32_t i = 0; moves != NULL && i < run->bound.operand_count; i++) {
		const struct operand *operand = &run->bound.operands[i];
		if (would_move(request, i, &from))
			moves[count++] = (struct msg_move){msg_text(operand->param), msg_text(devices[from].name), msg_text(devices[run->device].name),
			                                   operand->tensor.elements * opd_dtype_bytes(operand->tensor.dtype)};
	}
	for (uint32_t i = 0; moves != NULL && run->device != 0 && i < run->bound.call.output_count; i++)
		if (!run_leaves_out(request, i))
			moves[count++] = (struct msg_move){msg_text("result"), msg_text(devices[run->device].name), msg_text(devices[0].name),
			                                   run->bound.outputs[i].elements * opd_dtype_bytes(run->bound.outputs[i].dtype)};
	explain->moves = moves;
	explain->move_count = count;
}

void run_explain(struct request *request)
{
	struct request_run *run = &request->run;
	const struct dispatch *dispatch = &run->dispatch;
	if (!request->message.run.explain && request->message.run.mode != MSG_DRY)
		return;
	struct msg_explain *explain = arena_zalloc(&request->arena, sizeof *explain);
	if (explain == NULL)
		return; /* the reply goes without it; out of memory shows in what follows */
	explain->skipped = dispatch_skips(dispatch, run->op, &run->bound.call, &request->arena, &explain->skip_count);
	if (dispatch->impl != NULL) /* else whoever refused it has counted them */
		metrics_reasons(request->context->metrics, dispatch, explain->skipped, explain->skip_count);
	explain->effective = effective_list_names(dispatch->effective, dispatch->count, &request->arena);
	explain->effective_count = explain->effective == NULL ? 0 : dispatch->count;
	explain->level = dispatch->effective->level;
	if (dispatch->effective->narrowed != NULL) /* copied: a reload may drop the list before a direct caller reads this */
		explain->narrowed = msg_text(arena_text(&request->arena, dispatch->effective->narrowed, strlen(dispatch->effective->narrowed)));
	explain->on_loop = run->on_loop;
	explain->batched = run->batched;
	if (dispatch->impl != NULL && request->message.run.mode == MSG_DRY)
		execute_place(request); /* where it would run now */
	if (dispatch->impl != NULL)
		explain->device = msg_text(request->snapshot->devices[run->device].name);
	fill_times(request, &explain->times);
	explain->behind = run->behind == NULL || request->clock.started == 0 ? NULL : behind_of(request);
	if (request->message.run.mode == MSG_DRY && dispatch->impl != NULL) {
		predict_moves(request, explain);
	} else {
		explain->moves = run->moves;
		explain->move_count = run->moves == NULL ? 0 : run->move_count;
	}
	request->reply.kind = MSG_REPLY_RUN;
	request->reply.run.explain = explain;
}
