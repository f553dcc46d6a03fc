/* Publishing, opening, withdrawing, listing. The bytes are hashed on the lane. */
#include <openssl/evp.h>
#include <string.h>

#include "server/bring.h"
#include "server/daemon.h"
#include "server/publications.h"
#include "server/request.h"

/* Between looks at whether anybody still wants the hash. */
#define PIECE_BYTES ((uint64_t)8 << 20)

struct publishing {
	struct take take; /* first: a fetch's is too */
	uint8_t sha256[MSG_SHA256_BYTES];
};

static void reply_one(struct request *request, const struct msg_publication *publication)
{
	request->reply.publications.items = publication;
	request->reply.publications.count = 1;
	request_reply(request, MSG_REPLY_PUBLICATIONS);
}

static struct msg_publication *new_publication(struct request *request)
{
	struct msg_publication *publication = arena_zalloc(&request->arena, sizeof *publication);
	if (publication == NULL) {
		(void)opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "publications: out of memory");
		request_fail(request);
	}
	return publication;
}

/* ---- Publishing ---- */

static bool hash(EVP_MD_CTX *context, const struct request *request, uint8_t *sha256_out)
{
	const struct kept_tensor *tensor = request->tensor;
	bool right = EVP_DigestInit_ex(context, EVP_sha256(), NULL) == 1;
	for (uint64_t at = 0; right && at < tensor->bytes; at += PIECE_BYTES) {
		const uint64_t some = tensor->bytes - at < PIECE_BYTES ? tensor->bytes - at : PIECE_BYTES;
		right = !atomic_load_explicit(&request->session->gone, memory_order_relaxed) && EVP_DigestUpdate(context, request->staged->data + at, some) == 1;
	}
	return right && EVP_DigestFinal_ex(context, sha256_out, NULL) == 1;
}

static void publish_task(struct request *request)
{
	struct publishing *publishing = request->task_data;
	EVP_MD_CTX *context = EVP_MD_CTX_new();
	const bool right = context != NULL && hash(context, request, publishing->sha256);
	EVP_MD_CTX_free(context);
	request->status = right ? OPD_OK : opd_fail(&request->error, OPD_CANCELLED, "publish: the contents were not hashed: the session has ended, or no memory");
}

/* The publisher's own handle names the published bytes from now on: its copy goes where the tenant had them already. */
static void publish_done(struct request *request)
{
	const struct publishing *publishing = request->task_data;
	if (request->status == OPD_OK && atomic_load_explicit(&request->session->gone, memory_order_relaxed)) /* nobody would withdraw it */
		request->status = opd_fail(&request->error, OPD_CANCELLED, "publish: the session has ended");
	struct msg_publication *out = request->status == OPD_OK ? new_publication(request) : NULL;
	struct kept_tensor *published = NULL;
	if (request->status != OPD_OK)
		request_fail(request);
	if (out == NULL)
		return;
	opd_status status = publications_add(request->context->server->publications, request->session, request->tensor, publishing->sha256,
	                                     &request->message.publish, &request->arena, &published, out, &request->error);
	if (status != OPD_OK) {
		request_fail(request);
		return;
	}
	const struct msg_tensor *source = request->message.publish.tensor;
	const struct msg_handle handle = source->source == MSG_SOURCE_HANDLE
	                                     ? source->handle
	                                     : kept_handle(&request->session->kept, source->result.request, source->result.output, &request->error);
	out->handle = kept_exchange(&request->session->kept, handle, request->tensor, published);
	reply_one(request, out);
}

/* What lies on a device is hashed from a copy, which then goes. */
static void publish_here(struct request *request)
{
	if (request->status == OPD_OK && request->cancelled)
		request->status = opd_fail(&request->error, OPD_CANCELLED, "publish: the client cancelled the request");
	if (request->status != OPD_OK)
		request_fail(request);
	else
		request_task(request, publish_task, publish_done);
}

static void publish_ready(struct request *request)
{
	if (request->tensor == NULL)
		request_fail(request);
	else
		bring_to_host(request, request->tensor->buffer, 0, request->tensor->bytes, "publish", publish_here);
}

opd_status publish_accept(struct request *request)
{
	struct publishing *publishing = arena_zalloc(&request->arena, sizeof *publishing);
	const struct msg_tensor *source = request->message.publish.tensor;
	if (publishing == NULL)
		return opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "publish: out of memory");
	if (source->dtype != OPD_DTYPE_NONE || source->strided || source->byte_offset != 0)
		return opd_fail(&request->error, OPD_INVALID_ARGUMENT, "publish: a view, expected the whole tensor");
	return take_accept(request, &publishing->take, source, "publish", publish_ready);
}

/* ---- Opening ---- */

void publish_open(struct request *request)
{
	const struct msg_open *open = &request->message.open;
	struct msg_publication *out = new_publication(request);
	struct kept_tensor *tensor = NULL;
	if (out == NULL)
		return;
	opd_status status = (open->name.bytes != 0) == (open->sha256 != NULL)
	                        ? opd_fail(&request->error, OPD_INVALID_ARGUMENT, "open: expected either a name or a sha256")
	                        : publications_open(request->context->server->publications, request->session, open, &request->arena, &tensor, out, &request->error);
	if (status == OPD_OK) {
		out->handle = kept_add(&request->session->kept, tensor, &request->error);
		if (out->handle.generation == 0) {
			kept_tensor_unref(tensor);
			status = (opd_status)request->error.status;
		}
	}
	if (status == OPD_OK)
		reply_one(request, out);
	else
		request_fail(request);
}

void publish_withdraw(struct request *request)
{
	request->error.status =
		(int32_t)publications_withdraw(request->context->server->publications, request->session, request->message.withdraw, &request->error);
	request_reply_empty(request);
}

void publish_list(struct request *request)
{
	struct msg_publication *items = NULL;
	uint32_t count = 0;
	if (!publications_list(request->context->server->publications, request->session, &request->arena, &items, &count)) {
		(void)opd_fail(&request->error, OPD_RESOURCE_EXHAUSTED, "list_publications: out of memory");
		request_fail(request);
		return;
	}
	request->reply.publications.items = items;
	request->reply.publications.count = count;
	request_reply(request, MSG_REPLY_PUBLICATIONS);
}
