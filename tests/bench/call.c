#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "tests/bench/bench.h"
#include "tests/lib/pin.h"

#define NORM_ELEMENTS 4096
#define TINY_ELEMENTS 16

const struct placement placement_same = {"one core", 0, 0};
const struct placement placement_two = {"two cores", 1, 0};

void placement_apply(const struct placement *placement, const struct bench *bench, const struct daemon *daemon)
{
	int last = pin_cores() - 1;
	int server = placement->server < last ? placement->server : last;
	if (!pin_self(placement->client) || !pin_process(bench->floor.pid, server) || !pin_process(daemon->pid, server))
		bench_fail("can't pin the processes to cores %d and %d", placement->client, server);
	for (int i = 0; i < PEERS; i++)
		peer_pin(&bench->peers[i], server, placement->client);
}

void placement_server(const struct placement *placement, pid_t pid)
{
	const int last = pin_cores() - 1;
	if (!pin_process(pid, placement->server < last ? placement->server : last))
		bench_fail("can't pin process %d", (int)pid);
}

static opd_client *connect_with(const char *address, const opd_connect_options *options)
{
	opd_client *client;
	opd_error error;
	if (opd_connect(address, options, &client, &error) != OPD_OK)
		bench_fail("%s: %s", address, error.text);
	return client;
}

opd_client *call_connect(const char *address)
{
	return connect_with(address, NULL);
}

opd_client *call_connect_shared(const char *address)
{
	return connect_with(address, &(opd_connect_options){.struct_bytes = sizeof(opd_connect_options), .shared_memory = true});
}

void call_run(opd_client *client, const opd_request *request)
{
	opd_result *result;
	opd_error error;
	if (opd_run(client, request, &result, &error) != OPD_OK)
		bench_fail("a call failed: %s", error.text);
	opd_result_destroy(result);
}

static opd_request *request_create(const char *op)
{
	opd_request *request = opd_request_create(op);
	if (request == NULL)
		bench_fail("out of memory");
	return request;
}

opd_handle call_keep(opd_client *client, const float *data, int64_t elements)
{
	opd_request *request = request_create("relu");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, data, elements));
	opd_request_output(request, 0, true, false);
	opd_result *result;
	opd_error error;
	if (opd_run(client, request, &result, &error) != OPD_OK)
		bench_fail("keeping %lld floats failed: %s", (long long)elements, error.text);
	opd_handle handle = opd_result_handle(result, 0);
	opd_result_destroy(result);
	opd_request_destroy(request);
	return handle;
}

static void norm_fill(float *x, float *weight)
{
	for (int i = 0; i < NORM_ELEMENTS; i++) {
		x[i] = (float)(i % 17) - 8;
		weight[i] = 1 + (float)(i % 5) / 4;
	}
}

/* Of `x`, with a kept weight. */
static opd_request *norm_create(opd_client *client, const opd_operand *x, const float *weight)
{
	opd_handle handle = call_keep(client, weight, NORM_ELEMENTS);
	opd_request *request = request_create("rms_norm");
	opd_request_tensor(request, NULL, x);
	opd_request_tensor(request, NULL,
	                   &(opd_operand){.struct_bytes = sizeof(opd_operand), .source = OPD_FROM_HANDLE, .handle = handle});
	opd_request_float(request, NULL, 1e-5);
	return request;
}

opd_request *call_norm(opd_client *client)
{
	static float x[NORM_ELEMENTS], weight[NORM_ELEMENTS];
	norm_fill(x, weight);
	return norm_create(client, &(opd_operand)OPD_OPERAND(OPD_f32, x, 1, NORM_ELEMENTS), weight);
}

opd_request *call_resident(opd_client *client)
{
	static float x[NORM_ELEMENTS], weight[NORM_ELEMENTS];
	norm_fill(x, weight);
	const opd_operand kept = {.struct_bytes = sizeof kept, .source = OPD_FROM_HANDLE, .handle = call_keep(client, x, NORM_ELEMENTS)};
	opd_request *request = norm_create(client, &kept, weight);
	opd_request_output(request, 0, true, false);
	return request;
}

opd_request *call_shared(opd_client *client, opd_memory **memory_out)
{
	static float weight[NORM_ELEMENTS];
	const uint64_t bytes = NORM_ELEMENTS * sizeof(float);
	opd_error error;
	if (opd_memory_create(client, 2 * bytes, memory_out, &error) != OPD_OK)
		bench_fail("shared memory: %s", error.text);
	float *x = opd_memory_data(*memory_out);
	norm_fill(x, weight);
	const opd_operand shared = {.struct_bytes = sizeof shared, .dtype = OPD_f32, .rank = 1, .shape = (const int64_t[]){NORM_ELEMENTS},
	                            .source = OPD_FROM_MEMORY, .memory = *memory_out, .data = x};
	opd_request *request = norm_create(client, &shared, weight);
	opd_request_output_memory(request, 0, *memory_out, x + NORM_ELEMENTS, bytes);
	return request;
}

opd_request *call_tiny(opd_client *client)
{
	(void)client;
	static const float x[TINY_ELEMENTS] = {1, -1, 2, -2};
	opd_request *request = request_create("relu");
	opd_request_tensor(request, NULL, &(opd_operand)OPD_OPERAND(OPD_f32, x, TINY_ELEMENTS));
	return request;
}

static double call_explained_ns(opd_client *client, const opd_request *request)
{
	opd_result *result;
	opd_error error;
	if (opd_run(client, request, &result, &error) != OPD_OK)
		bench_fail("an explained call failed: %s", error.text);
	const opd_explain *explain = opd_result_explain(result);
	if (explain == NULL)
		bench_fail("a reply lacks the explain that was asked for");
	double ns = (double)explain->kernel_ns;
	opd_result_destroy(result);
	return ns;
}

double call_kernel_ns(opd_client *client, opd_request *request, unsigned calls)
{
	double ns[256];
	unsigned count = calls < 256 ? calls : 256;
	opd_request_explain(request, true);
	for (unsigned i = 0; i < count; i++)
		ns[i] = call_explained_ns(client, request);
	opd_request_explain(request, false);
	return report_median(ns, count);
}

static struct tcp_info socket_info(opd_client *client)
{
	struct tcp_info info = {0};
	socklen_t bytes = sizeof info;
	if (getsockopt(opd_client_fd(client), IPPROTO_TCP, TCP_INFO, &info, &bytes) != 0 || bytes < sizeof info - sizeof(uint64_t))
		bench_fail("the kernel doesn't count a TCP connection's bytes");
	return info;
}

struct floor_shape call_shape(const struct daemon *daemon, call_build_fn build, uint64_t window)
{
	enum { CALLS = 16 };
	opd_client *client = call_connect(daemon->tcp_address);
	opd_request *request = build(client);
	call_run(client, request);
	struct tcp_info before = socket_info(client);
	for (int i = 0; i < CALLS; i++)
		call_run(client, request);
	struct tcp_info after = socket_info(client);
	opd_request_destroy(request);
	opd_close(client);
	return (struct floor_shape){
	    .request_bytes = (after.tcpi_bytes_sent - before.tcpi_bytes_sent) / CALLS,
	    .reply_bytes = (after.tcpi_bytes_received - before.tcpi_bytes_received) / CALLS,
	    .window = window,
	};
}
