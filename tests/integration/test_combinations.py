#!/usr/bin/env python3
"""What each is allowed alone, in one request: results in shared memory, kept, left out, donated; views as inputs of graphs; states of graphs that are refused; devices that are full.

Each test's name is the promise that it checks. After every test the daemon is still there, and serves a new client."""
import fcntl
import os
import socket
import struct
import unittest

from harness import (ABORTED, INVALID_ARGUMENT, OK, REQUEST, RESOURCE_EXHAUSTED, Client, Daemon, built_module, check_healthy, f32, frame, inline, pb, run, tensor,
                     unpack_f32)

DEVICE, DERIVED = built_module("device"), built_module("derived")


def attach(client, size):
    """Memory shared with the daemon: its region, and the file."""
    memory = os.memfd_create("shared", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, size)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    number, client.next_id = client.next_id, client.next_id + 1
    socket.send_fds(client.sock, [frame(REQUEST, number, pb.Request(attach_memory=pb.AttachMemory(bytes=size)).SerializeToString())], [memory])
    return client.read_reply(number)[1].memory.region, memory


def upload(client, shape, data, **fields):
    return client.ask(pb.Request(upload=pb.Upload(tensor=tensor(shape), **fields)), data)[0].run.outputs[0].kept


def relu_graph(device, x):
    """A run of a graph of one node, on a device."""
    request = pb.Request()
    made = request.run_graph.once
    made.inputs.add(name="x", kind=0)
    node = made.nodes.add(op="relu", device=device)
    node.priority.names.append("testdev")
    node.args.add().tensor.graph_input = 0
    made.outputs.add().node.node = 0
    request.run_graph.inputs.add().tensor.CopyFrom(x)
    return request


class Case(unittest.TestCase):
    def start(self, *flags, features=(), config="", **environment):
        """A daemon and a client of it; at the end both must be well."""
        self.daemon = Daemon(*flags, config=config, environment={"OPD_TEST_DEVICE_" + name.upper(): str(value) for name, value in environment.items()})
        self.addCleanup(self.daemon.stop)
        client = Client(self.daemon.address, features=list(features))
        self.addCleanup(client.close)
        return client

    def tearDown(self):
        check_healthy(self, self.daemon)


class Results(Case):
    def test_a_result_that_takes_a_donated_operands_place_cannot_lie_in_shared_memory(self):
        client = self.start(features=["shm"])
        region, memory = attach(client, 4096)
        os.close(memory)
        request = run("fused_add_rms_norm", inline([1, 4], f32(1, 2, 3, 4)), pb.Tensor(handle=upload(client, [1, 4], f32(1, 2, 3, 4)), donate=True), weight=None, epsilon=1e-5)
        request.run.outputs.add()
        request.run.outputs.add().shared.CopyFrom(pb.SharedRange(region=region, bytes=4096))
        reply, _ = client.call(request)
        self.assertEqual((reply.status, "donated operand's place" in reply.message), (INVALID_ARGUMENT, True), reply.message)

    def test_one_in_shared_memory_that_the_reply_leaves_out_is_there_whole_beside_a_kept_one(self):
        count = 1 << 17  # a megabyte goes back to the system when it is freed and isn't cached
        for config in ("", "limits: {cache: 0}\n"):
            for graph in (False, True):
                with self.subTest(config=config, graph=graph):
                    client = self.start(features=["shm"], config=config)
                    region, memory = attach(client, 8 * count)
                    x = upload(client, [1, count], f32(*range(count)))
                    if graph:
                        request = pb.Request()
                        made = request.run_graph.once
                        made.inputs.add(name="x", kind=0)
                        node = made.nodes.add(op="topk")
                        node.args.add().tensor.graph_input = 0
                        node.args.add(name="k").int = count
                        for output in range(2):
                            made.outputs.add().node.CopyFrom(pb.NodeOutput(node=0, output=output))
                        request.run_graph.inputs.add().tensor.handle.CopyFrom(x)
                        options = request.run_graph.outputs
                    else:
                        request = run("topk", pb.Tensor(handle=x), k=count)
                        options = request.run.outputs
                    options.add(keep=True)
                    options.add(no_copy=True).shared.CopyFrom(pb.SharedRange(region=region, bytes=8 * count))
                    self.assertEqual(client.call(request)[0].status, OK)
                    self.assertEqual(struct.unpack("<%dq" % count, os.pread(memory, 8 * count, 0)), tuple(range(count - 1, -1, -1)))
                    os.close(memory)

    def test_one_of_a_device_comes_to_shared_memory_though_the_reply_leaves_it_out(self):
        client = self.start("--module", DEVICE, features=["shm"])
        region, memory = attach(client, 4096)
        request = relu_graph("test:0", inline([4], f32(-1, 2, -3, 4)))
        request.run_graph.outputs.add(no_copy=True).shared.CopyFrom(pb.SharedRange(region=region, bytes=64))
        single = run("relu", inline([4], f32(1, -2, 3, -4)), run_device="test:0", run_priority=["testdev"], run_strict=True)
        single.run.outputs.add(no_copy=True).shared.CopyFrom(pb.SharedRange(region=region, offset=64, bytes=64))
        for each in (request, single):
            self.assertEqual(client.call(each)[0].status, OK)
        self.assertEqual([unpack_f32(os.pread(memory, 16, at)) for at in (0, 64)], [(0, 2, 0, 4), (1, 0, 3, 0)])
        os.close(memory)


    def test_results_that_the_reply_does_not_bring_need_not_fit_inline(self):
        client = self.start(features=["shm"])
        count = 1 << 18  # of f32 a megabyte: as much as a whole envelope may have
        region, memory = attach(client, 4 * count)
        x = pb.Tensor(handle=upload(client, [count], f32(*[-1.0] * count)))
        graph = pb.Request()
        made = graph.run_graph.once
        made.inputs.add(name="x", kind=0)
        made.nodes.add(op="relu").args.add().tensor.graph_input = 0
        made.outputs.add().node.node = 0
        graph.run_graph.inputs.add().tensor.CopyFrom(x)
        for request, options in ((run("relu", x), None), (graph, graph.run_graph)):
            options = options or request.run
            options.inline_results = True
            option = options.outputs.add(keep=True, no_copy=True)
            self.assertEqual(client.call(request)[0].status, OK)
            option.Clear()
            option.shared.CopyFrom(pb.SharedRange(region=region, bytes=4 * count))
            self.assertEqual(client.call(request)[0].status, OK)
            option.Clear()
            reply = client.call(request)[0]
            self.assertEqual((reply.status, "results of %d bytes don't fit inline" % (4 * count) in reply.message), (RESOURCE_EXHAUSTED, True), reply.message)
        os.close(memory)


class Refused(Case):
    def test_whoever_names_an_upload_that_was_refused_is_told_that_it_failed(self):
        client = self.start(config="limits: {memory: 4 MiB, session: 1 MiB}\n")
        data = f32(1, 2, 3, 4)
        for what, given in {
            "no dtype": pb.Upload(tensor=pb.Tensor(shape=[4], inline=data)),
            "too few bytes": pb.Upload(tensor=inline([5], data)),
            "no such device": pb.Upload(tensor=inline([4], data), device="cuda:7"),
            "no source": pb.Upload(tensor=tensor([4])),
            "more than the session may have": pb.Upload(tensor=pb.Tensor(dtype=9, shape=[1 << 20]), parts=True),
        }.items():
            with self.subTest(what):
                first = client.submit(pb.Request(upload=given))
                client.submit(run("relu", pb.Tensor(result=pb.ResultRef(request=first, output=0))))
                refused, named = (client.read_reply()[1] for _ in range(2))
                self.assertNotEqual(refused.status, OK)
                self.assertEqual((named.status, "request %d," % first in named.message), (ABORTED, True), named.message)


class Graphs(Case):
    def test_a_view_from_further_on_is_not_taken_for_the_tensors_beginning(self):
        client, count = self.start("--module", DERIVED), 256
        values = [float(i) for i in range(2 * count)]
        kept = upload(client, [2 * count], f32(*values))
        for offset in (count, count, 0):  # the module keeps what it reads a second time
            view = pb.Tensor(handle=kept, dtype=9, shape=[count], byte_offset=4 * offset)
            request = pb.Request()
            made = request.run_graph.once
            made.inputs.add(name="a", kind=0)
            made.inputs.add(name="b", kind=0)
            node = made.nodes.add(op="add", strict=True)
            node.priority.names.append("derived")
            for operand in range(2):
                node.args.add().tensor.graph_input = operand
            made.outputs.add().node.node = 0
            request.run_graph.inputs.add().tensor.CopyFrom(inline([count], bytes(4 * count)))
            request.run_graph.inputs.add().tensor.CopyFrom(view)
            alone = run("add", inline([count], bytes(4 * count)), view, run_priority=["derived"], run_strict=True)
            for each in (request, alone):
                self.assertEqual(list(unpack_f32(client.ask(each)[1])), values[offset:offset + count])

    def register(self, client, states):
        request = pb.Request()
        made = request.register_graph.graph
        made.inputs.add(name="x", kind=0)
        for number, state in enumerate(states):
            made.inputs.add(name="s%d" % number, kind=1).tensor.handle.CopyFrom(state)
        for number in range(len(states)):
            node = made.nodes.add(op="fused_add_rms_norm")
            node.args.add().tensor.graph_input = 0
            state = node.args.add().tensor
            state.graph_input, state.donate = 1 + number, True
            getattr(node.args.add(name="weight"), "none").SetInParent()
            node.args.add(name="epsilon").float = 1e-5
        made.outputs.add().node.node = 0
        return client.ask(request)[0].graph.graph

    def call(self, client, graph):
        request = pb.Request()
        request.run_graph.graph = graph
        request.run_graph.inputs.add().tensor.CopyFrom(inline([1, 4], f32(1, 1, 1, 1)))
        return client.call(request)[0]

    def test_a_run_that_is_refused_for_one_state_leaves_the_others_as_they_are(self):
        client = self.start()
        first, second = (upload(client, [1, 4], f32(1, 2, 3, 4)) for _ in range(2))
        one, both = self.register(client, [first]), self.register(client, [first, second])
        client.ask(pb.Request(free=pb.Free(tensors=[pb.Tensor(handle=second)])))
        newest = self.call(client, one).run.states[0]
        for _ in range(2):
            self.assertNotEqual(self.call(client, both).status, OK)
        self.assertEqual(unpack_f32(client.ask(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=newest))))[1]), (2, 3, 4, 5))
        again = self.call(client, one)
        self.assertEqual(again.status, OK)
        self.assertEqual(unpack_f32(client.ask(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=again.run.states[0]))))[1]), (3, 4, 5, 6))

    def test_a_state_that_a_run_of_one_op_has_left_in_another_shape_is_read_in_that(self):
        client = self.start()
        state = upload(client, [1, 4], f32(1, 2, 3, 4))
        graph = self.register(client, [state])
        newest = self.call(client, graph).run.states[0]
        view = pb.Tensor(handle=newest, dtype=9, shape=[2, 2], donate=True)
        alone = run("fused_add_rms_norm", inline([2, 2], f32(0, 0, 0, 0)), view, weight=None, epsilon=1e-5)
        self.assertEqual(client.call(alone)[0].status, OK)
        reply = self.call(client, graph)
        self.assertEqual((reply.status, "[2, 2]" in reply.message), (INVALID_ARGUMENT, True), reply.message)


class Full(Case):
    def test_an_operand_whose_copy_has_given_way_on_a_full_device_is_told_of(self):
        count = 1 << 16
        client = self.start("--module", DEVICE, "--inline", "0", memory=(5 << 18) + 8192)
        x = upload(client, [count], f32(*[1.0] * count), device="test:0")
        relu = run("relu", pb.Tensor(handle=x), run_device="test:1", run_priority=["testdev"])
        relu.run.outputs.add(no_copy=True, keep=True)
        self.assertEqual(client.call(relu)[0].status, OK)
        upload(client, [count], f32(*[1.0] * count), device="test:1")
        reply, data = client.call(relu_graph("test:1", pb.Tensor(handle=x)))
        self.assertIn(reply.status, (OK, RESOURCE_EXHAUSTED), reply.message)
        if reply.status == OK:
            self.assertEqual(data, f32(*[1.0] * count))


if __name__ == "__main__":
    unittest.main(verbosity=2)
