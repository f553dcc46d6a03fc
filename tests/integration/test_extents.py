#!/usr/bin/python3
"""Operands that are large by their description alone: a few bytes, strides of 0 or 1, and an extent that takes a kernel minutes, or an estimate past the end of its number.

Each test's name is the promise that it checks. None measures time: a request is refused, is told to have run elsewhere than on the I/O loop, or can be cancelled while it runs.
"""
import struct
import unittest

from harness import OK, RESOURCE_EXHAUSTED, DaemonCase, f32, inline, pb

F16, F32, I32, I64 = 7, 9, 5, 6


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


if __name__ == "__main__":
    unittest.main()
