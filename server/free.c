/* Freeing kept tensors: requests accepted before read them first, since they took their references when they were accepted. */
#include "server/daemon.h"
#include "server/request.h"

struct free_waiter {
	struct waiter waiter; /* first */
	struct request *request;
	uint64_t result;
};

static void remember(struct request *request, opd_status status, const opd_error *error)
{
	if (status != OPD_OK && request->error.status == OPD_OK)
		request->error = *error; /* the first that isn't there; the others are freed all the same */
}

static void finish_when_settled(struct request *request)
{
	if (request->free_waiting == 0)
		request_reply_empty(request);
}

static void on_settled(struct waiter *waiter, struct kept_tensor *tensor, const opd_error *error)
{
	struct free_waiter *mine = (struct free_waiter *)waiter;
	struct request *request = mine->request;
	opd_error own;
	if (tensor == NULL)
		remember(request, (opd_status)error->status, error);
	else
		remember(request, kept_free_result(&request->session->kept, mine->result, waiter->output, &own), &own);
	kept_tensor_unref(tensor);
	request->free_waiting--;
	finish_when_settled(request);
}

static opd_status free_one(struct request *request, const struct msg_tensor *tensor, opd_error *error)
{
	struct kept *kept = &request->session->kept;
	if (tensor->source == MSG_SOURCE_HANDLE)
		return kept_free(kept, tensor->handle, error);
	if (tensor->source != MSG_SOURCE_RESULT)
		return opd_fail(error, OPD_INVALID_ARGUMENT, "free: a tensor is neither a handle nor a result");
	bool pending;
	struct kept_tensor *there = kept_find_result(kept, tensor->result.request, tensor->result.output, &pending, error);
	if (there == NULL && !pending && error->status != OPD_FAILED_PRECONDITION) /* an unfinished upload may be freed too */
		return (opd_status)error->status;
	kept_tensor_unref(there);
	if (!pending)
		return kept_free_result(kept, tensor->result.request, tensor->result.output, error);
	struct free_waiter *waiter = arena_zalloc(&request->arena, sizeof *waiter);
	if (waiter == NULL)
		return opd_fail(error, OPD_RESOURCE_EXHAUSTED, "free: out of memory");
	waiter->waiter.output = tensor->result.output;
	waiter->waiter.on_settled = on_settled;
	waiter->request = request;
	waiter->result = tensor->result.request;
	kept_wait(kept, tensor->result.request, &waiter->waiter);
	request->free_waiting++;
	return OPD_OK;
}

opd_status free_accept(struct request *request)
{
	const struct msg_free *message = &request->message.free;
	opd_error error;
	request->free_waiting = 1; /* until request_start: a reply must not come before the request is accepted */
	for (uint32_t i = 0; i < message->count; i++)
		remember(request, free_one(request, &message->tensors[i], &error), &error);
	return OPD_OK;
}

void free_start(struct request *request)
{
	request->free_waiting--;
	finish_when_settled(request);
}
