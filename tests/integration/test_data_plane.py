#!/usr/bin/env python3
"""Bad input of the data plane: clients that go in the middle of an upload, graphs of far too many nodes, large envelopes and what comes behind them.

    OPD_BIN=build/bin/opd test_data_plane.py"""
import socket
import struct
import unittest

import harness
from harness import CHUNKED, DATA, REQUEST, Client, DaemonCase, f32, frame, pb, tensor, unpack_f32, wait_until

F32 = 9
U8 = 2


def upload(elements, parts=False):
    request = pb.Request()
    request.upload.tensor.CopyFrom(pb.Tensor(dtype=F32, shape=[elements]))
    if parts:
        request.upload.parts = True
    else:
        request.upload.tensor.payload.offset = 0
        request.upload.tensor.payload.bytes = 4 * elements
    return request


MARK = 0x1FFFFF  # the largest number whose varint has three bytes


class Encoded(bytes):
    """A message that was never an object: of 10^5 nodes one takes Python seconds."""

    def SerializeToString(self):
        return bytes(self)


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes((value,))


def field(number, content):
    return Encoded(varint(number << 3 | 2) + varint(len(content)) + content)


def chain(nodes, last=None):
    """x → relu → relu → … → y, a template's bytes with another number in each node. last: the op of one node more, that nobody reads."""
    graph, first, other, end = (pb.Graph() for _ in range(4))
    graph.name = "chain"
    graph.inputs.add(name="x")
    graph.outputs.add().node.node = nodes - 1
    first.nodes.add(op="relu").args.add().tensor.graph_input = 0
    other.nodes.add(op="relu").args.add().tensor.node.node = MARK
    if last is not None:
        end.nodes.add(op=last).args.add().tensor.graph_input = 0
    before, after = other.SerializeToString().split(b"\xff\xff\x7f")
    numbers = (bytes((i & 0x7F | 0x80, i >> 7 & 0x7F | 0x80, i >> 14)) for i in range(nodes - 1))
    others = b"".join(before + number + after for number in numbers)
    return graph.SerializeToString() + first.SerializeToString() + others + end.SerializeToString()


def register(graph):
    return field(pb.Request.REGISTER_GRAPH_FIELD_NUMBER, field(pb.RegisterGraph.GRAPH_FIELD_NUMBER, graph))


def run_once(graph, elements=4, keep=False):
    """A run that brings its graph."""
    run = pb.RunGraph()
    run.inputs.add().tensor.CopyFrom(tensor([elements]))
    if keep:
        run.outputs.add(keep=True)
    return field(pb.Request.RUN_GRAPH_FIELD_NUMBER, run.SerializeToString() + field(pb.RunGraph.ONCE_FIELD_NUMBER, graph))


def run_graph(number, elements=4):
    request = pb.Request()
    request.run_graph.graph = number
    request.run_graph.inputs.add().tensor.CopyFrom(tensor([elements]))
    return request


class DataPlane(DaemonCase):
    config = "limits: {envelope: 16 MiB}\n"

    def nothing_is_left(self):
        with Client(self.address) as other:
            wait_until(lambda: other.info().memory_bytes == 0, "the ledger at zero")
            wait_until(lambda: other.info().sessions == 1, "no other session")

    def reset(self, client):
        """As a killed client's socket, unread replies and all."""
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    def test_a_client_killed_at_every_step_of_an_upload_leaves_nothing(self):
        data = f32(*range(64))
        whole = frame(REQUEST, 1, upload(64).SerializeToString(), data)
        chunked = frame(REQUEST, 2, upload(64).SerializeToString(), b"", CHUNKED, payload_bytes=len(data))
        pieces = [frame(DATA, 2, struct.pack("<Q", at), data[at : at + 64]) for at in range(0, len(data), 64)]
        script = whole + chunked + b"".join(pieces)
        publish = pb.Request()
        publish.publish.name = "half"
        publish.publish.tensor.result.request = 2
        script += frame(REQUEST, 3, publish.SerializeToString())
        for cut in range(len(script) + 1):
            client = Client(self.address)
            client.send(script[:cut])
            self.reset(client)
        self.nothing_is_left()

    def test_a_client_killed_between_the_parts_of_an_upload_leaves_nothing(self):
        data = f32(*range(64))
        for writes in range(5):
            for cut in (0, 1, 40, 60):
                client = Client(self.address)
                handle = client.ask(upload(64, parts=True))[0].run.outputs[0].kept
                for i in range(writes + 1):
                    request = pb.Request()
                    request.write.handle.CopyFrom(handle)
                    request.write.offset = 64 * i
                    request.write.data.CopyFrom(pb.Tensor(dtype=U8, shape=[64]))
                    request.write.data.payload.offset = 0
                    request.write.data.payload.bytes = 64
                    if i < writes and i < 4:
                        client.ask(request, data[64 * i : 64 * i + 64])
                    elif i < 4:
                        client.send(frame(REQUEST, client.next_id, request.SerializeToString(), data[64 * i : 64 * i + 64])[: cut + 32])
                self.reset(client)
        self.nothing_is_left()

    def test_a_graph_of_a_hundred_thousand_nodes_gets_a_typed_error_and_the_session_goes_on(self):
        client = self.client()
        graph = chain(100_000)
        for request, payload in ((register(graph), b""), (run_once(graph, keep=True), f32(1, 2, 3, 4))):
            reply, _ = client.call(request, payload)
            self.assertIn(reply.status, (harness.RESOURCE_EXHAUSTED, harness.INVALID_ARGUMENT))
            self.assertIn("100000 entries, at most 65536", reply.message)
        client.ping()
        client.close()
        self.nothing_is_left()

    def test_what_stands_behind_a_large_graph_finds_it_registered(self):
        """In one write: the graph, a run of it with its payload, a ping, an error in a second graph, what names it."""
        client = self.client()
        large, wrong = register(chain(5_000)), register(chain(5_000, last="nobody"))
        data = f32(-1, 2, -3, 4)
        self.assertGreater(len(large), 64 << 10)
        client.send(
            frame(REQUEST, 1, large.SerializeToString())
            + frame(REQUEST, 2, run_graph(1).SerializeToString(), data)
            + frame(REQUEST, 3, pb.Request(ping=pb.Empty()).SerializeToString())
            + frame(REQUEST, 4, wrong.SerializeToString())
            + frame(REQUEST, 5, run_graph(4).SerializeToString(), data)
            + frame(REQUEST, 6, run_graph(1).SerializeToString(), data)
        )
        replies = {}
        while len(replies) < 6:
            number, reply, payload = client.read_reply()
            replies[number] = (reply, payload)
        self.assertEqual(replies[1][0].graph.nodes, 5_000, replies[1][0].message)
        for number in (2, 6):
            self.assertEqual(unpack_f32(replies[number][1]), (0, 2, 0, 4))
        self.assertEqual(replies[3][0].status, harness.OK)
        self.assertEqual(replies[4][0].status, harness.NOT_FOUND)
        self.assertIn("n5000", replies[4][0].message)
        self.assertEqual(replies[5][0].status, harness.NOT_FOUND)
        client.close()
        self.nothing_is_left()

    def test_a_large_envelope_with_a_payload_is_read_in_place_behind_it(self):
        client = self.client()
        request = run_once(chain(6_000), 1 << 16)
        data = f32(*([-1.0, 5.0] * (1 << 15)))
        for _ in range(3):
            _, payload = client.ask(request, data)
            self.assertEqual(unpack_f32(payload[:16]), (0, 5, 0, 5))
        number = client.next_id
        client.send(frame(REQUEST, number, request.SerializeToString(), b"", CHUNKED, payload_bytes=len(data)))
        for at in range(0, len(data), 65536):
            client.send(frame(DATA, number, struct.pack("<Q", at), data[at : at + 65536]))
        self.assertEqual(unpack_f32(client.read_reply(number)[2][-8:]), (0, 5))

    def test_a_client_that_goes_while_its_graph_is_read_leaves_nothing(self):
        more = pb.Graph()
        more.inputs.add(name="w", kind=2).tensor.result.request = 1
        request = register(chain(5_000) + more.SerializeToString())
        whole = frame(REQUEST, 2, request.SerializeToString()) + frame(REQUEST, 3, run_graph(2).SerializeToString(), f32(1, 2, 3, 4)) * 3
        for _ in range(8):
            client = Client(self.address)
            client.submit(upload(4), f32(1, 2, 3, 4))
            client.send(whole)
            self.reset(client)
        self.nothing_is_left()

    def test_a_large_envelope_that_cannot_be_decoded_is_refused_and_the_next_is_served(self):
        client = self.client()
        number = client.next_id
        client.send(frame(REQUEST, number, b"\xc2\x01" + b"\xff" * (100 << 10)) + frame(REQUEST, number + 1, pb.Request(ping=pb.Empty()).SerializeToString()))
        self.assertEqual(client.read_reply()[1].status, harness.INVALID_ARGUMENT)
        self.assertEqual(client.read_reply()[1].status, harness.OK)


if __name__ == "__main__":
    unittest.main()
