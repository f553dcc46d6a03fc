/* Administrative requests: the step table has checked the right. */
#include "server/containment.h"
#include "server/daemon.h"
#include "server/installed.h"
#include "server/request.h"

static void load_task(struct request *request)
{
	struct registry *registry = request->context->server->registry;
	struct msg_text text = request->message.path;
	char path[PATH_MAX];
	request->status = installed_resolve(text.data == NULL ? "" : text.data, "load_module: path", path, &request->error);
	if (request->status == OPD_OK)
		request->status = registry_load(registry, path, NULL, false, &request->error);
}

static void load_done(struct request *request)
{
	struct log *log = request->context->server->log;
	struct server *server = request->context->server;
	if (request->status == OPD_OK && !request->direct) /* the configuration is the loop's */
		containment_configure(server->containment, server->config);
	if (request->status == OPD_OK)
		LOG(log, LOG_INFO, "module loaded", LOG_STR("path", request->message.path.data), LOG_UINT("session", request->session->id));
	else
		LOG(log, LOG_WARN, "module not loaded", LOG_STR("path", request->message.path.data), LOG_STR("reason", request->error.text));
	request_reply_empty(request);
}

struct load {
	uv_work_t work;
	struct request *request;
};

static void load_work(uv_work_t *work)
{
	load_task(((struct load *)work)->request);
}

static void load_work_done(uv_work_t *work, int status)
{
	(void)status;
	load_done(((struct load *)work)->request);
}

/* On a thread of libuv's pool: a module may take long to find out what its platform has, and the lane's threads belong to
 * kernels. */
void admin_load_module(struct request *request)
{
	struct load *load = request->direct ? NULL : arena_zalloc(&request->arena, sizeof *load);
	if (load == NULL) { /* a direct caller waits anyway */
		request_task(request, load_task, load_done);
		return;
	}
	load->request = request;
	/* It fails only without a function. */
	(void)uv_queue_work(&request->context->io->loop, &load->work, load_work, load_work_done);
}

void admin_restore_provider(struct request *request)
{
	const struct msg_restore *restore = &request->message.restore;
	opd_status status = containment_restore(request->context->server->containment, request->snapshot, restore->provider, restore->op, &request->error);
	if (status != OPD_OK)
		request_fail(request);
	else
		request_reply_empty(request);
}

void admin_set_log_level(struct request *request)
{
	struct log *log = request->context->server->log;
	const char *name = request->message.log_level.data == NULL ? "" : request->message.log_level.data;
	int level = log_level_parse(name);
	if (level < 0) {
		(void)opd_fail(&request->error, OPD_INVALID_ARGUMENT, "log level \"%.64s\": expected error, warn, info or debug", name);
	} else {
		log_set_level(log, (log_level)level);
		LOG(log, LOG_INFO, "log level set", LOG_STR("level", log_level_name((log_level)level)), LOG_UINT("session", request->session->id));
	}
	request_reply_empty(request);
}

void admin_drain(struct request *request)
{
	server_drain(request->context->server, request->message.timeout_us);
	request_reply_empty(request);
}
