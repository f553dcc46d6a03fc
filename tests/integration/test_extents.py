#!/usr/bin/python3
"""Operands that are large by their description alone: a few bytes, strides of 0 or 1, and an extent that takes a kernel minutes, or an estimate past the end of its number.

Each test's name is the promise that it checks. None measures time: a request is refused, is told to have run elsewhere than on the I/O loop, or can be cancelled while it runs.
"""
import struct
import time
import unittest

from harness import CANCEL, CANCELLED, OK, RESOURCE_EXHAUSTED, DaemonCase, f32, frame, inline, pb, run, tensor

F16, BF16, F32, I32, I64 = 7, 8, 9, 5, 6


def whole(number):
    return pb.Tensor(graph_input=number)


def view(number, shape, strides, dtype=F32):
    return pb.Tensor(graph_input=number, dtype=dtype, shape=shape, strides=strides)


def node(op, *operands, priority=("native",), **attributes):
    made = pb.GraphNode(op=op, args=[pb.Argument(tensor=operand) for operand in operands], priority=pb.ProviderList(names=priority))
    for name, value in attributes.items():
        made.args.add(name=name, **{"float" if isinstance(value, float) else "int": value})
    return made


def graph_of(inputs, *nodes):
    """All nodes' results are its outputs."""
    return pb.Graph(name="g", inputs=[pb.GraphInput(name="i%d" % i) for i in range(inputs)], nodes=nodes,
                    outputs=[pb.GraphOutput(node=pb.NodeOutput(node=i)) for i in range(len(nodes))])


class Extents(DaemonCase):
    config = "threads: 1\nlimits: {session: 8 GiB, memory: 8 GiB, request: 1 GiB}\n"

    def setUp(self):
        self.one = self.client(features=["cancel"])

    def register(self, graph):
        return self.one.ask(pb.Request(register_graph=pb.RegisterGraph(graph=graph)))[0].graph.graph

    def run_graph(self, number, *inputs, **fields):
        return self.one.call(pb.Request(run_graph=pb.RunGraph(graph=number, inputs=[pb.Argument(tensor=operand) for operand in inputs], explain=True, **fields)))[0]

    def test_a_view_in_a_graph_is_no_larger_than_what_the_session_may_have(self):
        x, y = view(0, [1, 1 << 40], [0, 0]), view(0, [1 << 40, 1], [0, 0])
        number = self.register(graph_of(1, node("matmul", x, y, priority=["cpu"])))
        for mode in (pb.DRY, pb.RUN):
            reply = self.run_graph(number, inline([1], f32(1.0)), mode=mode)
            self.assertEqual(reply.status, RESOURCE_EXHAUSTED, reply.message)
            self.assertIn("matmul: a is a view of 4398046511104 bytes, of at most 8589934592 that the session may have", reply.message)

    def test_a_graph_of_kernels_beyond_estimation_is_no_small_one(self):
        """Four estimates of 2^62 ns come to 2^64."""
        attention = [node("paged_attention", *map(whole, (0, 1, 1, 2, 3, 4)), scale=1.0) for _ in range(4)]
        number = self.register(graph_of(6, *attention, node("relu", whole(5))))
        inputs = [
            inline([1, 1, 1], bytes(2), dtype=F16),
            inline([1, 1 << 27, 1, 1], bytes(2), dtype=F16, strides=[0] * 4),
            inline([1, 1 << 28], bytes(4), dtype=I32, strides=[0, 0]),
            inline([1], struct.pack("<q", 1), dtype=I64),
            inline([2], struct.pack("<2i", 0, 1), dtype=I32),
            inline([1], f32(1.0)),
        ]
        for _ in range(2):  # the first is prepared on the lane
            reply = self.run_graph(number, *inputs)
            self.assertEqual(reply.status, OK, reply.message)
            self.assertFalse(reply.run.explain.on_loop)

    def test_a_dry_run_is_of_no_more_than_what_the_session_may_have(self):
        """Its plan may take memory of the operands' sizes, to try itself out."""
        request = run("linear", pb.Tensor(dtype=BF16, shape=[1 << 17, 1 << 16]), pb.Tensor(dtype=BF16, shape=[1 << 10, 1 << 16]), bias=None, run_mode=pb.DRY)
        reply = self.one.call(request)[0]
        self.assertEqual(reply.status, RESOURCE_EXHAUSTED, reply.message)
        self.assertIn("linear: x is a view of 17179869184 bytes, of at most 8589934592 that the session may have", reply.message)
        request.run.mode = pb.FAKE
        self.assertEqual(self.one.call(request)[0].status, OK)

    def paged(self, rows, length, **fields):
        """No query and a table of rows × rows zeros that lie one after the other, all of which are checked."""
        table = struct.pack("<i", 0) * (2 * rows - 1)
        request = run("paged_attention", inline([0, 1, 0], b"", dtype=F16), *[inline([1, 1, 1, 0], b"", dtype=F16)] * 2,
                      inline([rows, rows], table, dtype=I32, strides=[1, 1]), inline([rows], struct.pack("<i", length), dtype=I32, strides=[0]),
                      inline([rows + 1], bytes(4), dtype=I32, strides=[0]), scale=1.0, **fields)
        request.run.explain = True
        return self.one.call(request)[0]

    def test_indices_to_check_count_in_what_the_loop_runs(self):
        for provider in ("native", "cpu"):
            reply = self.paged(1024, 1024, run_priority=[provider])
            self.assertEqual(reply.status, OK, reply.message)
            self.assertFalse(reply.run.explain.on_loop, provider)

    def test_indices_to_check_count_in_a_graphs_cost(self):
        operands = [view(2, [1024, 1024], [1, 1], dtype=I32), view(3, [1024], [0], dtype=I32), view(4, [1025], [0], dtype=I32)]
        number = self.register(graph_of(5, node("paged_attention", whole(0), whole(1), whole(1), *operands, scale=1.0)))
        inputs = [inline([0, 1, 0], b"", dtype=F16), inline([1, 1, 1, 0], b"", dtype=F16), inline([2047], bytes(4 * 2047), dtype=I32),
                  inline([1], struct.pack("<i", 1024), dtype=I32), inline([1], bytes(4), dtype=I32)]
        for _ in range(2):  # the first is prepared on the lane
            reply = self.run_graph(number, *inputs)
            self.assertEqual(reply.status, OK, reply.message)
            self.assertFalse(reply.run.explain.on_loop)

    def expect_cancelled_while_it_runs(self, request, payload, text):
        for _ in range(50):
            running = self.one.submit(request, payload)
            self.one.ping()
            time.sleep(0.05)
            self.one.send(frame(CANCEL, running))
            reply = self.one.read_reply(running)[1]
            self.assertEqual(reply.status, CANCELLED, reply.message)
            if text in reply.message:
                return  # else the thread hadn't begun it yet
        self.fail(reply.message)

    def test_a_check_of_indices_is_stopped(self):
        """Two thousand million ids in 400 KB."""
        ids = tensor([1 << 15, 1 << 16], size=4 * 98304, dtype=I32, strides=[1, 1])
        request = run("embedding", ids, inline([1, 0], b""), run_priority=["native"])
        self.expect_cancelled_while_it_runs(request, bytes(4 * 98304), "embedding: cancelled while its indices were checked")

    def test_a_product_of_any_depth_is_stopped(self):
        operands = inline([1, 1 << 30], f32(1.0), strides=[0, 0]), inline([1 << 30, 1], f32(1.0), strides=[0, 0])
        self.expect_cancelled_while_it_runs(run("matmul", *operands, run_priority=["cpu"]), b"", "cpu: cancelled while the kernel ran")

    def test_the_largest_of_equals_is_the_first_however_many_there_are(self):
        reply, data = self.one.ask(run("argmax", inline([1 << 32, 2], b"\x03\x04", dtype=2, strides=[0, 1]), dim=0, run_priority=["cpu"]))
        self.assertEqual(reply.run.provider, "cpu")
        self.assertEqual(struct.unpack("<2q", data), (0, 0))


if __name__ == "__main__":
    unittest.main()
