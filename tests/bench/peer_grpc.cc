/* An op server over gRPC's callback API with tensors in bytes fields, and its client (peer_program.h): what one gets from the usual
 * tools. No size limits, no TLS; the client builds a request once and sends it again and again. */
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include <grpcpp/grpcpp.h>

#include "peer_grpc.grpc.pb.h"
#include "tests/bench/peer_program.h"

using opd::bench::GrpcCall;
using opd::bench::GrpcReply;
using opd::bench::GrpcTensor;
using opd::bench::Ops;

namespace
{

constexpr unsigned dtype_f32 = 9;

[[noreturn]] void fail(const std::string &text)
{
	(void)fprintf(stderr, "bench: grpc: %s\n", text.c_str());
	exit(1);
}

/* ---- Server ---- */

/* One kept tensor for all connections: gRPC's handlers don't know theirs. */
class Service final : public Ops::CallbackService
{
	std::shared_mutex mutex;
	std::vector<float> kept;

	void run_keep(const GrpcCall *call, GrpcReply *reply, const float *x, size_t elements)
	{
		std::unique_lock lock(mutex);
		kept.resize(elements);
		reply->set_kernel_ns(peer_kernel(PEER_KEEP, x, nullptr, elements, kept.data(), call->timed()));
	}

	grpc::Status run_other(const GrpcCall *call, GrpcReply *reply, peer_op op, const float *x, size_t elements)
	{
		std::shared_lock lock(mutex);
		if (op == PEER_FETCH)
			elements = kept.size();
		if (elements == 0 || (op == PEER_NORM && elements != kept.size()))
			return {grpc::StatusCode::INVALID_ARGUMENT, call->op() + ": " + std::to_string(elements) + " elements"};
		GrpcTensor *output = reply->add_outputs();
		size_t results = peer_call_results(op, elements);
		output->set_dtype(dtype_f32);
		output->add_shape((int64_t)results);
		output->mutable_data()->resize(results * sizeof(float));
		float *y = reinterpret_cast<float *>(output->mutable_data()->data());
		reply->set_kernel_ns(peer_kernel(op, x, kept.data(), elements, y, call->timed()));
		return grpc::Status::OK;
	}

	grpc::Status run(const GrpcCall *call, GrpcReply *reply)
	{
		peer_op op = peer_op_of(call->op().data(), call->op().size());
		if (op == PEER_OPS || (call->inputs_size() == 0) != (op == PEER_FETCH))
			return {grpc::StatusCode::INVALID_ARGUMENT, call->op() + ": no such call"};
		const float *x = op == PEER_FETCH ? nullptr : reinterpret_cast<const float *>(call->inputs(0).data().data());
		size_t elements = op == PEER_FETCH ? 0 : call->inputs(0).data().size() / sizeof(float);
		if (op != PEER_KEEP)
			return run_other(call, reply, op, x, elements);
		run_keep(call, reply, x, elements);
		return grpc::Status::OK;
	}

	grpc::ServerUnaryReactor *Run(grpc::CallbackServerContext *context, const GrpcCall *call, GrpcReply *reply) override
	{
		grpc::ServerUnaryReactor *reactor = context->DefaultReactor();
		reactor->Finish(run(call, reply));
		return reactor;
	}
};

void grpc_serve(const char *path)
{
	Service service;
	grpc::ServerBuilder builder;
	int port = 0;
	builder.AddListeningPort(std::string("unix:") + path, grpc::InsecureServerCredentials());
	builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
	builder.SetMaxReceiveMessageSize(-1);
	builder.SetMaxSendMessageSize(-1);
	builder.RegisterService(&service);
	std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
	if (server == nullptr || port == 0)
		fail(std::string(path) + ": the server can't listen");
	peer_listening((uint16_t)port);
	server->Wait();
}

/* ---- Client ---- */

std::unique_ptr<Ops::Stub> stub;
GrpcReply last_reply;

void grpc_connect(const char *path, uint16_t port, bool tcp)
{
	grpc::ChannelArguments arguments;
	arguments.SetMaxReceiveMessageSize(-1);
	arguments.SetMaxSendMessageSize(-1);
	std::string address = tcp ? "127.0.0.1:" + std::to_string(port) : std::string("unix:") + path;
	stub = Ops::NewStub(grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
}

void grpc_close()
{
	stub.reset();
}

/* The request of the last call is used again where it is the same. */
const GrpcCall &message_of(const peer_call *call)
{
	static GrpcCall message;
	static peer_call last;
	if (last.op == call->op && last.x == call->x && last.elements == call->elements && last.timed == call->timed &&
	    !message.op().empty())
		return message;
	last = *call;
	message.Clear();
	message.set_op(peer_op_name(call->op));
	message.set_timed(call->timed);
	if (peer_call_inputs(call) > 0) {
		GrpcTensor *input = message.add_inputs();
		input->set_dtype(dtype_f32);
		input->add_shape(1);
		input->add_shape((int64_t)call->elements);
		input->set_data(call->x, call->elements * sizeof(float));
	}
	return message;
}

void reply_check(const peer_call *call, const grpc::Status &status, const GrpcReply &reply)
{
	size_t results = peer_call_results(call->op, call->elements);
	if (!status.ok())
		fail(status.error_message());
	if (reply.outputs_size() != (results > 0) || (results > 0 && reply.outputs(0).data().size() != results * sizeof(float)))
		fail(std::string(peer_op_name(call->op)) + ": the reply isn't what was asked for");
}

/* Blocking: quicker than a callback that wakes a waiting thread. */
uint64_t grpc_exchange(const peer_call *call, const float **result_out)
{
	grpc::ClientContext context;
	grpc::Status status = stub->Run(&context, message_of(call), &last_reply);
	reply_check(call, status, last_reply);
	*result_out = last_reply.outputs_size() == 0 ? nullptr : reinterpret_cast<const float *>(last_reply.outputs(0).data().data());
	return last_reply.kernel_ns();
}

/* Calls in flight; each starts the next from its callback, which is quicker than handing over to another thread. */
class Pipeline
{
	const peer_call *call;
	const GrpcCall &message;
	uint64_t to_start;
	uint64_t to_end;
	uint64_t kernel_ns = 0;
	std::mutex mutex;
	std::condition_variable ended;

	struct Flight {
		grpc::ClientContext context;
		GrpcReply reply;
	};

	void start()
	{
		auto *flight = new Flight;
		stub->async()->Run(&flight->context, &message, &flight->reply,
		                   [this, flight](const grpc::Status &status) { finish(flight, status); });
	}

	void finish(Flight *flight, const grpc::Status &status)
	{
		reply_check(call, status, flight->reply);
		uint64_t flight_kernel_ns = flight->reply.kernel_ns();
		delete flight; /* before the end is told: it holds on to the channel, which mustn't end in a callback */
		std::unique_lock lock(mutex);
		kernel_ns += flight_kernel_ns;
		bool more = to_start > 0;
		to_start -= more;
		if (--to_end == 0)
			ended.notify_one();
		lock.unlock();
		if (more)
			start();
	}

      public:
	Pipeline(const peer_call *of, uint64_t total) : call(of), message(message_of(of)), to_start(total), to_end(total)
	{
	}

	uint64_t run(uint64_t window)
	{
		std::unique_lock lock(mutex);
		uint64_t first = window < to_start ? window : to_start;
		to_start -= first;
		lock.unlock();
		for (uint64_t i = 0; i < first; i++)
			start();
		lock.lock();
		ended.wait(lock, [this] { return to_end == 0; });
		return kernel_ns;
	}
};

uint64_t grpc_pipeline(const peer_call *call, uint64_t total, uint64_t window)
{
	return Pipeline(call, total).run(window);
}

} // namespace

int main(int argc, char **argv)
{
	static const peer_program_ops program = {"grpc", grpc_serve, grpc_connect, grpc_close, grpc_exchange, grpc_pipeline};
	return peer_program(&program, argc, argv);
}
