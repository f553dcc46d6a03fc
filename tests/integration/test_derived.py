#!/usr/bin/python3
"""Derived copies: what a provider keeps of tensors that stay, through a real daemon. The module tests/modules/derived adds a copy of b instead of b:
whoever gets a copy of other contents gets a wrong sum.

OPD_BIN names the daemon, OPD_MODULES the test module.
"""
import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
from harness import Client, Daemon, Failed, f32, inline, pb, run, tensor, unpack_f32

BUILD = os.environ.get("OPD_BUILD", os.path.join(harness.ROOT, "build"))
MODULE = harness.built_module("derived")
ONEDNN = os.path.join(BUILD, "lib", "opd", "opd-provider-onednn.so")
COUNT = 256
BYTES = 4 * COUNT


def values(first):
    return [float(first + i % 7) for i in range(COUNT)]


def of_handle(handle, **fields):
    return pb.Tensor(handle=handle, **fields)


class Derived(unittest.TestCase):
    def daemon(self, *flags, config=None):
        daemon = Daemon("--module", MODULE, *flags, config=config)
        self.addCleanup(daemon.stop)
        return daemon

    def client(self, daemon):
        client = Client(daemon.address)
        self.addCleanup(client.close)
        return client

    def upload(self, client, numbers, shape=None):
        reply, _ = client.ask(pb.Request(upload=pb.Upload(tensor=tensor(shape or [len(numbers)]))), f32(*numbers))
        return reply.run.outputs[0].kept

    def add(self, client, b, wanted_b, shape=None):
        """a + b by the module: right?"""
        a = values(100)
        reply, _ = client.ask(run("add", inline(shape or [COUNT], f32(*a)), b, run_priority=["derived"], run_strict=True, run_inline_results=True))
        self.assertEqual(reply.run.provider, "derived")
        self.assertEqual(list(unpack_f32(reply.run.outputs[0].tensor.inline)), [x + y for x, y in zip(a, wanted_b)])

    def derived(self, client):
        info = client.info()
        return info.derived_copies, info.derived_bytes, info.derived_made, info.derived_found

    def test_one_tensor_has_one_copy_from_its_second_use_on(self):
        client = self.client(self.daemon())
        b = self.upload(client, values(1))
        for expected in ((0, 0, 0, 0), (1, BYTES, 1, 0), (1, BYTES, 1, 1), (1, BYTES, 1, 2)):
            self.add(client, of_handle(b), values(1))
            self.assertEqual(self.derived(client), expected)

    def test_what_may_change_has_none(self):
        client = self.client(self.daemon())
        for _ in range(3):
            self.add(client, inline([COUNT], f32(*values(1))), values(1))
        self.assertEqual(self.derived(client), (0, 0, 0, 0))

    def test_a_view_has_its_own(self):
        client = self.client(self.daemon())
        numbers = values(1) + values(50)
        b = self.upload(client, numbers)
        for _ in range(3):
            for first in (0, COUNT):
                self.add(client, of_handle(b, dtype=pb.F32, shape=[COUNT], byte_offset=4 * first), numbers[first : first + COUNT])
        self.assertEqual(self.derived(client), (2, 2 * BYTES, 2, 2))

    def test_a_freed_tensor_takes_its_copies_along(self):
        client = self.client(self.daemon())
        before = client.info().memory_bytes
        b = self.upload(client, values(1))
        for _ in range(2):
            self.add(client, of_handle(b), values(1))
        self.assertEqual(client.info().memory_bytes - before, 2 * BYTES)
        client.ask(pb.Request(free=pb.Free(tensors=[of_handle(b)])))
        self.assertEqual((self.derived(client)[:2], client.info().memory_bytes), ((0, 0), before))
        for first in (30, 60):  # in the memory that the freed one had, most likely
            other = self.upload(client, values(first))
            for _ in range(3):
                self.add(client, of_handle(other), values(first))

    def test_a_session_that_ends_takes_its_copies_along(self):
        daemon = self.daemon()
        client = self.client(daemon)
        with Client(daemon.address) as other:
            b = self.upload(other, values(1))
            for _ in range(2):
                self.add(other, of_handle(b), values(1))
            self.assertEqual(self.derived(client)[0], 1)
        harness.wait_until(lambda: self.derived(client)[:2] == (0, 0), "the copy goes")

    def test_donated_contents_are_new_contents(self):
        for provider in ("cpu", "native"):  # one works in place, for the other the result is fresh memory
            with self.subTest(provider):
                client = self.client(self.daemon())
                numbers = values(1)
                b = self.upload(client, numbers, [1, COUNT])
                for round in range(3):
                    for _ in range(3):
                        self.add(client, of_handle(b, dtype=pb.F32, shape=[COUNT]), numbers)
                    self.assertEqual(self.derived(client), (1, BYTES, round + 1, round + 1))
                    request = run(
                        "fused_add_rms_norm", inline([1, COUNT], f32(*values(2))), of_handle(b, donate=True), weight=None, epsilon=1e-5, run_priority=[provider]
                    )
                    reply, _ = client.ask(request)
                    self.assertEqual(reply.run.provider, provider)
                    b = reply.run.outputs[1].kept
                    numbers = [x + y for x, y in zip(numbers, values(2))]
                    self.assertEqual(self.derived(client)[0], 0)

    def test_a_published_tensors_copy_is_shared_and_ends_with_it(self):
        daemon = self.daemon()
        first, second, third = (self.client(daemon) for _ in range(3))
        b = self.upload(first, values(1))
        b = first.ask(pb.Request(publish=pb.Publish(tensor=of_handle(b), name="w")))[0].publications.items[0].handle
        opened = second.ask(pb.Request(open_tensor=pb.OpenTensor(name="w")))[0].publications.items[0].handle
        self.add(first, of_handle(b), values(1))
        self.add(second, of_handle(opened), values(1))
        self.add(first, of_handle(b), values(1))
        self.assertEqual(self.derived(third), (1, BYTES, 1, 1))
        first.close()  # the publisher: withdrawn, but the second still has it
        harness.wait_until(lambda: third.info().sessions == 2, "the first ends")
        self.add(second, of_handle(opened), values(1))
        self.assertEqual(self.derived(third), (1, BYTES, 1, 2))
        second.ask(pb.Request(free=pb.Free(tensors=[of_handle(opened)])))
        self.assertEqual(self.derived(third)[:2], (0, 0))

    def test_sessions_share_no_copy_of_what_is_not_published(self):
        daemon = self.daemon()
        clients = [self.client(daemon) for _ in range(2)]
        handles = [self.upload(client, values(1)) for client in clients]  # the same bytes
        for _ in range(2):
            for client, handle in zip(clients, handles):
                self.add(client, of_handle(handle), values(1))
        self.assertEqual(self.derived(clients[0]), (2, 2 * BYTES, 2, 0))

    def test_copies_are_bounded_and_those_that_stay_are_used(self):
        client = self.client(self.daemon(config="limits:\n  derived: %d\n" % (3 * BYTES)))
        handles = [self.upload(client, values(first)) for first in range(8)]
        for _ in range(4):
            for first, handle in enumerate(handles):
                self.add(client, of_handle(handle), values(first))
        self.assertEqual(self.derived(client), (3, 3 * BYTES, 3, 6))

    def test_a_limit_of_nothing_keeps_none(self):
        client = self.client(self.daemon(config="limits: {derived: 0}\n"))
        b = self.upload(client, values(1))
        for _ in range(3):
            self.add(client, of_handle(b), values(1))
        self.assertEqual(self.derived(client), (0, 0, 0, 0))

    def test_copies_give_way_to_sessions(self):
        client = self.client(self.daemon(config="limits: {memory: 1 MiB, session: 1 MiB, derived: 512 KiB}\n"))
        numbers = values(1) * 256  # 256 KiB
        b = self.upload(client, numbers)
        for _ in range(2):
            self.add(client, of_handle(b, dtype=pb.F32, shape=[COUNT]), values(1))
            client.ask(run("add", of_handle(b), of_handle(b), run_priority=["derived"], run_inline_results=False))
        self.assertEqual(self.derived(client)[0], 2)
        with self.assertRaisesRegex(Failed, "memory"):
            self.upload(client, values(2) * 1024)  # never fits beside b
        self.upload(client, values(2) * 700)
        self.assertLess(self.derived(client)[0], 2)
        self.add(client, of_handle(b, dtype=pb.F32, shape=[COUNT]), values(1))

    def test_a_graphs_constants_have_copies(self):
        client = self.client(self.daemon())
        weights = [self.upload(client, values(first)) for first in (1, 2)]
        graph = pb.Graph(name="g")
        graph.inputs.add(name="x", kind=pb.GRAPH_INPUT)
        for i, handle in enumerate(weights):
            graph.inputs.add(name="w%d" % i, kind=pb.GRAPH_CONSTANT, tensor=of_handle(handle))
        for i in range(2):
            node = graph.nodes.add(op="add", strict=True)
            node.priority.names.append("derived")
            node.args.add().tensor.CopyFrom(pb.Tensor(graph_input=0) if i == 0 else pb.Tensor(node=pb.NodeOutput(node=0)))
            node.args.add().tensor.CopyFrom(pb.Tensor(graph_input=1 + i))
        graph.outputs.add(name="y", node=pb.NodeOutput(node=1))
        registered = client.ask(pb.Request(register_graph=pb.RegisterGraph(graph=graph)))[0].graph.graph
        wanted = [x + y + z for x, y, z in zip(values(100), values(1), values(2))]
        for expected in ((0, 0, 0, 0), (2, 2 * BYTES, 2, 0), (2, 2 * BYTES, 2, 2)):
            request = pb.Request(run_graph=pb.RunGraph(graph=registered, inline_results=True))
            request.run_graph.inputs.add().tensor.CopyFrom(inline([COUNT], f32(*values(100))))
            reply, _ = client.ask(request)
            self.assertEqual(list(unpack_f32(reply.run.outputs[0].tensor.inline)), wanted)
            self.assertEqual(self.derived(client), expected)
        client.ask(pb.Request(free=pb.Free(tensors=[of_handle(handle) for handle in weights])))
        self.assertEqual(self.derived(client)[0], 2)  # the graph still has them
        client.ask(pb.Request(free_graph=pb.FreeGraph(graph=registered)))
        self.assertEqual(self.derived(client)[:2], (0, 0))

    def test_many_sessions_use_one_copy_at_once(self):
        daemon = self.daemon("--threads", "2")
        first = self.client(daemon)
        b = self.upload(first, values(1))
        first.ask(pb.Request(publish=pb.Publish(tensor=of_handle(b), name="w")))
        clients = [self.client(daemon) for _ in range(4)]
        handles = [client.ask(pb.Request(open_tensor=pb.OpenTensor(name="w")))[0].publications.items[0].handle for client in clients]
        a = values(100)
        wanted = [x + y for x, y in zip(a, values(1))]
        for _ in range(8):
            for client, handle in zip(clients, handles):
                for _ in range(4):
                    client.submit(run("add", inline([COUNT], f32(*a)), of_handle(handle), run_priority=["derived"], run_inline_results=True))
            for client in clients:
                for _ in range(4):
                    reply = client.read_reply()[1]
                    self.assertEqual(list(unpack_f32(reply.run.outputs[0].tensor.inline)), wanted)
        copies, size, made, found = self.derived(first)
        self.assertEqual((copies, size, made), (1, BYTES, 1))
        self.assertGreater(found, 0)


class PackedWeights(unittest.TestCase):
    """The module onednn: a resident weight is packed once, for all numbers of rows whose layout is the same."""

    def test_a_resident_weight_is_packed_once_and_right(self):
        if not os.path.exists(ONEDNN):
            self.skipTest("onednn isn't built here")
        daemon = Daemon("--module", ONEDNN)
        self.addCleanup(daemon.stop)
        with Client(daemon.address) as client:
            described = client.ask(pb.Request(describe=pb.Describe(op="linear")))[0].op.implementations
            if not [one for one in described if one.provider == "onednn" and one.supported]:
                self.skipTest("oneDNN isn't installed")
            numbers = [float(i % 5 - 2) for i in range(96 * 64)]  # small integers: sums are exact in any order
            weight = client.ask(pb.Request(upload=pb.Upload(tensor=tensor([96, 64]))), f32(*numbers))[0].run.outputs[0].kept
            for _ in range(4):
                x = [float(i % 3 - 1) for i in range(8 * 64)]
                request = run("linear", inline([8, 64], f32(*x)), of_handle(weight), run_priority=["onednn"], run_strict=True, run_inline_results=True)
                got = unpack_f32(client.ask(request)[0].run.outputs[0].tensor.inline)
                wanted = [sum(x[r * 64 + k] * numbers[c * 64 + k] for k in range(64)) for r in range(8) for c in range(96)]
                self.assertEqual(list(got), wanted)
            info = client.info()
            self.assertEqual((info.derived_copies, info.derived_made, info.derived_found), (1, 1, 2))
            self.assertGreaterEqual(info.derived_bytes, 4 * 96 * 64)


if __name__ == "__main__":
    unittest.main(verbosity=2)
