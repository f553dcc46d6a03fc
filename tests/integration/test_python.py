#!/usr/bin/env python3
"""The Python client: against a server played here (what a broken one may say), and against the daemon.

    OPD_BIN=build/bin/opd PYTHONPATH=build/python test_python.py

PYTHONPATH: the folder with opd.py and opd_pb2.py. The daemon's tests fail, rather than being skipped, without OPD_BIN."""
import array
import contextlib
import gc
import os
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import unittest

import numpy as np

import opd
import opd_pb2 as pb

RNG = np.random.default_rng(7)


# ---- A server played here ------------------------------------------------------------------------------------------------


def frame(kind, request, message=None, payload=b"", flags=0, declared=None):
    envelope = message if isinstance(message, bytes) else b"" if message is None else message.SerializeToString()
    count = len(payload) if declared is None else declared
    return struct.pack("<4sBBHQIIQ", b"OPD1", 1, kind, flags, request, len(envelope), 0, count) + envelope + payload


def read_exactly(sock, count):
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def read_frame(sock):
    _, _, kind, flags, request, envelope, _, payload = struct.unpack("<4sBBHQIIQ", read_exactly(sock, 32))
    return kind, flags, request, read_exactly(sock, envelope), b"" if flags & 1 else read_exactly(sock, payload), payload


HELLO = pb.HelloReply(version=1, chunk_bytes=65536, limits=pb.Limits(envelope_bytes=1 << 20, in_flight=8))


class PlayedServer:
    """Answers Hello, then runs script(sock) on a thread of its own."""

    def __init__(self, script, hello=HELLO):
        self.folder = tempfile.TemporaryDirectory()
        self.path = os.path.join(self.folder.name, "s")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(1)
        self.script, self.hello, self.error = script, hello, None
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        sock, _ = self.listener.accept()
        with sock:
            try:
                read_frame(sock)
                sock.sendall(frame(2, 0, self.hello))
                self.script(sock)
            except (EOFError, OSError):
                pass
            except Exception as error:  # shown by stop: an assertion of the script
                self.error = error

    def stop(self):
        self.thread.join(10)
        self.listener.close()
        self.folder.cleanup()
        if self.error is not None:
            raise self.error


def reply_f32(values, **source):
    tensor = pb.Tensor(dtype=pb.F32, shape=[len(values)])
    tensor.payload.bytes = 4 * len(values)
    return pb.Reply(run=pb.RunReply(provider="played", outputs=[pb.Result(tensor=tensor)]))


class AgainstAPlayedServer(unittest.TestCase):
    def play(self, script, hello=HELLO):
        server = PlayedServer(script, hello)
        self.addCleanup(server.stop)
        return server.path

    def connect(self, script, hello=HELLO):
        client = opd.Client("unix:" + self.play(script, hello), timeout=10)
        self.addCleanup(client.close)
        return client

    def malformed(self, answer):
        """What the server says to request 1 is the connection's end, and typed."""
        client = self.connect(lambda sock: (read_frame(sock), sock.sendall(answer), read_exactly(sock, 1)))
        with self.assertRaises(opd.DataLoss):
            client.run("relu", np.zeros(4, "float32"))
        with self.assertRaises(opd.Unavailable):
            client.ping()

    def test_malformed_answers_end_the_client_with_a_typed_error(self):
        self.malformed(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"-" * 32)
        self.malformed(frame(4, 9, pb.Reply()))  # another request's
        self.malformed(frame(3, 1, pb.Reply()))  # what only clients send
        self.malformed(frame(5, 1, struct.pack("<Q", 0), b"x"))  # data before its reply
        self.malformed(struct.pack("<4sBBHQIIQ", b"OPD1", 1, 4, 0, 1, 1 << 30, 0, 0))
        self.malformed(frame(4, 1, reply_f32([1, 2]), bytes(8), 1, 8) + frame(5, 1, struct.pack("<Q", 4), b"1234"))
        self.malformed(frame(4, 1, reply_f32([1, 2]), b"", 1, 8) + frame(5, 1, struct.pack("<Q", 4), b"1234"))

    def test_an_output_outside_the_payload_is_a_typed_error(self):
        short = frame(4, 1, reply_f32([1, 2]), bytes(4))
        client = self.connect(lambda sock: (read_frame(sock), sock.sendall(short), read_exactly(sock, 1)))
        with self.assertRaisesRegex(opd.DataLoss, "payload of 4 bytes"):
            client.run("relu", np.zeros(2, "float32"))

    def test_a_failure_that_time_heals_says_when_to_try_again(self):
        for after_us, seconds in ((1500, 0.0015), (0, None)):
            reply = frame(4, 1, pb.Reply(status=8, message="quota", retry_after_us=after_us))
            client = self.connect(lambda sock, reply=reply: (read_frame(sock), sock.sendall(reply), read_exactly(sock, 1)))
            with self.assertRaisesRegex(opd.ResourceExhausted, "quota") as caught:
                client.run("relu", np.zeros(4, "float32"))
            self.assertEqual(caught.exception.retry_after, seconds)

    def test_a_refused_hello_raises_the_servers_status(self):
        for status, error in ((14, opd.Unavailable), (9, opd.FailedPrecondition), (99, opd.Unknown)):
            path = self.play(lambda sock: None, pb.HelloReply(status=status, message="no room"))
            with self.assertRaisesRegex(error, "no room"):
                opd.Client("unix:" + path)

    def test_a_goaway_is_what_the_lost_connection_says(self):
        goaway = frame(8, 0, pb.Goaway(status=14, message="draining"))
        client = self.connect(lambda sock: (read_frame(sock), sock.sendall(goaway)))
        with self.assertRaisesRegex(opd.Unavailable, "UNAVAILABLE: draining"):
            client.ping()

    def test_chunked_replies_interleave_with_others(self):
        a, b = np.arange(40000, dtype="float32"), np.arange(40000, dtype="float32") * 2
        pinged = threading.Event()

        def script(sock):
            read_frame(sock), read_frame(sock), read_frame(sock)
            data = {1: a.tobytes(), 2: b.tobytes()}
            for request in (1, 2):
                sock.sendall(frame(4, request, reply_f32(a), b"", 1, len(data[request])))
            for offset in range(0, 160000, 65536):
                for request in (2, 1):
                    sock.sendall(frame(5, request, struct.pack("<Q", offset), data[request][offset:offset + 65536]))
                if offset == 0:
                    sock.sendall(frame(4, 3, pb.Reply(empty=pb.Empty())))
                    pinged.wait(60)
            read_exactly(sock, 1)

        client = self.connect(script)
        futures = [client.submit("x"), client.submit("x")]
        client.ping()
        self.assertFalse(any(future.answered for future in futures))
        pinged.set()
        np.testing.assert_array_equal(futures[0].result()[0], a)
        np.testing.assert_array_equal(futures[1].result()[0], b)

    def test_a_large_payload_travels_in_ordered_pieces_between_which_others_go(self):
        x = RNG.integers(0, 256, 3000001, dtype="uint8")
        got = bytearray()
        submitted = threading.Event()

        def script(sock):
            kinds = []
            submitted.wait(60)  # until then the socket takes no more than its buffer: most of the payload stays with the client
            while len(got) < len(x) or 3 not in kinds[1:]:
                kind, flags, request, envelope, data, declared = read_frame(sock)
                kinds.append(kind)
                if kind == 5:
                    self.assertEqual((request, struct.unpack("<Q", envelope)[0]), (1, len(got)))
                    self.assertLessEqual(len(data), 65536)
                    got.extend(data)
                elif len(kinds) == 1:
                    self.assertEqual((kind, flags & 1, declared), (3, 1, len(x)))
            self.assertNotEqual(kinds[-1], 3)  # the second request didn't wait for the first one's payload
            sock.sendall(frame(4, 2, pb.Reply(empty=pb.Empty())) + frame(4, 1, pb.Reply(run=pb.RunReply(provider="p"))))
            read_exactly(sock, 1)

        client = self.connect(script)
        future = client.submit("relu", x)
        submitted.set()
        client.ping()
        self.assertEqual(future.result().provider, "p")
        self.assertEqual(bytes(got), x.tobytes())

    def test_an_early_error_ends_an_upload_with_abort(self):
        kinds = []

        def script(sock):
            read_frame(sock)
            sock.sendall(frame(4, 1, pb.Reply(status=8, message="too large")))
            while 6 not in kinds:
                kinds.append(read_frame(sock)[0])
            sock.sendall(frame(4, 2, pb.Reply(empty=pb.Empty())))
            read_exactly(sock, 1)

        client = self.connect(script)
        with self.assertRaisesRegex(opd.ResourceExhausted, "too large"):
            client.run("relu", np.zeros(64 << 20, "uint8"))
        client.ping()  # answered once the abort is there
        self.assertIn(6, kinds)

    def test_a_timeout_leaves_the_request_in_flight(self):
        def script(sock):
            read_frame(sock)
            time.sleep(0.3)
            sock.sendall(frame(4, 1, reply_f32([5.0]), struct.pack("<f", 5)))
            read_exactly(sock, 1)

        client = self.connect(script)
        future = client.submit("relu", np.zeros(1, "float32"))
        self.assertFalse(future.done())
        with self.assertRaises(opd.DeadlineExceeded):
            future.result(timeout=0.02)
        self.assertEqual(future.result()[0].tolist(), [5.0])
        self.assertTrue(future.done())

    def test_addresses_and_arguments_are_checked(self):
        for address in ("", "http://x", "unix:", "tcp://host", "tcp://host:port", "tcp:host:1"):
            with self.assertRaises(opd.InvalidArgument):
                opd.Client(address)
        with self.assertRaises(opd.Unavailable):
            opd.Client("unix:/nonexistent/socket")
        client = self.connect(lambda sock: read_exactly(sock, 1))
        for value in (object(), np.zeros(2, "complex64"), [1, "x"], 1 << 63):
            with self.assertRaises(opd.InvalidArgument):
                client.submit("relu", value)
        with self.assertRaises(opd.InvalidArgument):
            opd.Tensor(bytes(7), "f32", [2])
        with self.assertRaises(opd.InvalidArgument):
            opd.Tensor(bytes(8), "float32", [2])

    def test_bf16_rounds_to_nearest_even(self):
        values = np.array([1, 1 + 2 ** -8, 1 + 3 * 2 ** -8, np.inf, -0.0, 3.4e38, np.nan], "float32")
        made = opd.bf16_from_float32(values)
        np.testing.assert_array_equal(made.float32(), np.array([1, 1, 1 + 2 ** -6, np.inf, -0.0, np.inf, np.nan], "float32"))
        every = np.arange(65536, dtype="uint32").astype("uint16")
        finite = ~np.isnan(opd.float32_from_bf16(every))
        np.testing.assert_array_equal(opd.bf16_from_float32(opd.float32_from_bf16(every)).numpy()[finite], every[finite])

    def test_every_kind_of_argument_is_written(self):
        seen = []

        def script(sock):
            seen.append(pb.Request.FromString(read_frame(sock)[3]).run)
            sock.sendall(frame(4, 1, pb.Reply(run=pb.RunReply())))
            read_exactly(sock, 1)

        client = self.connect(script)
        client.run("op", np.zeros((2, 3), ">f4"), array.array("d", [1.0]), None, True, 3, 2.5, "s", [1, 2],
                   [np.zeros(2), np.zeros(0, "int64")], np.float32(0.5), opd.Tensor(bytes(10), "bf16", [2], [2], 2),
                   priority=["cpu"], strict=True, device="cpu", timeout=1.5, keep=[1], copy=False,
                   attrs={"priority": np.int64(4)})
        run = seen[0]
        kinds = [arg.WhichOneof("value") for arg in run.args]
        self.assertEqual(kinds, ["tensor", "tensor", "none", "bool", "int", "float", "str", "ints", "tensors", "float", "tensor",
                                 "int"])
        offsets = [run.args[i].tensor.payload.offset for i in (0, 1, 10)]
        self.assertEqual(offsets, [0, 64, 192])
        self.assertEqual((run.args[11].name, run.args[11].int, run.timeout_us), ("priority", 4, 1500000))
        self.assertEqual(run.priority.names, ["cpu"])
        self.assertEqual([(out.keep, out.no_copy) for out in run.outputs], [(False, False), (True, True)])
        self.assertEqual((list(run.args[10].tensor.strides), run.args[10].tensor.byte_offset), ([2], 2))


# ---- The daemon ----------------------------------------------------------------------------------------------------------


def rms_norm(x, weight, epsilon):
    return x / np.sqrt((x.astype("float64") ** 2).mean(-1, keepdims=True) + epsilon) * weight


class RefusedAtOnce(unittest.TestCase):
    def test_what_a_server_said_before_it_was_asked_is_the_error_although_it_has_closed(self):
        mine, its = socket.socketpair()
        envelope = pb.HelloReply(status=8, message="6 sessions are open, no more may be").SerializeToString()
        its.sendall(struct.pack("<4sBBHQIIQ", b"OPD1", 1, 2, 0, 0, len(envelope), 0, 0) + envelope)
        its.close()
        mine.setblocking(False)
        self.addCleanup(setattr, opd, "_dial", opd._dial)
        opd._dial = lambda *_: mine
        with self.assertRaisesRegex(opd.ResourceExhausted, "6 sessions are open"):
            opd.Client("unix:/nowhere")


class AgainstTheDaemon(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.unix = "unix:" + os.path.join(cls.folder.name, "opd.sock")
        cls.log = open(os.path.join(cls.folder.name, "log"), "w+b")
        cls.daemon = subprocess.Popen([os.environ["OPD_BIN"], "--listen", cls.unix, "--listen", "tcp://127.0.0.1:0"],
                                      stderr=cls.log, stdin=subprocess.DEVNULL)
        cls.tcp = next(address for address in cls.first_client().info().listeners if address.startswith("tcp:"))

    @classmethod
    def first_client(cls):
        limit = time.monotonic() + 20
        while True:
            try:
                client = opd.Client(cls.unix)
                cls.addClassCleanup(client.close)
                return client
            except opd.Unavailable:
                if time.monotonic() > limit or cls.daemon.poll() is not None:
                    cls.log.seek(0)
                    raise AssertionError("the daemon doesn't answer: " + cls.log.read().decode(errors="replace")) from None
                time.sleep(0.05)

    @classmethod
    def tearDownClass(cls):
        cls.daemon.send_signal(signal.SIGTERM)
        code = cls.daemon.wait(40)
        cls.log.close()
        cls.folder.cleanup()
        if code != 0:
            raise AssertionError(f"the daemon ended with {code}")

    def setUp(self):
        self.client = opd.Client(self.unix, timeout=60)
        self.addCleanup(self.client.close)

    def test_inspection(self):
        client = self.client
        self.assertEqual((client.hello.version, client.hello.tenant), (1, f"uid:{os.getuid()}"))
        self.assertTrue(client.hello.admin)
        self.assertLess(client.ping(), 10)
        names = [op.name for op in client.ops()]
        self.assertTrue({"rms_norm", "matmul", "topk", "paged_attention"} <= set(names))
        op = client.describe("rms_norm")
        self.assertTrue(op.schema.startswith("rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None)"))
        self.assertEqual(op.implementations[0].provider, "native")
        providers = {provider.name: provider for provider in client.providers()}
        self.assertTrue(providers["cpu"].available and "rms_norm" in providers["cpu"].ops)
        info = client.info()
        self.assertEqual((info.pid, info.draining), (self.daemon.pid, False))
        self.assertGreaterEqual(info.sessions, 1)

    def test_ops_agree_with_numpy_over_unix_and_tcp(self):
        x, w = RNG.standard_normal((3, 64)).astype("float32"), RNG.standard_normal(64).astype("float32")
        a, b = RNG.standard_normal((5, 7)).astype("float32"), RNG.standard_normal((7, 9)).astype("float32")
        softmax = np.exp(x - x.max(-1, keepdims=True))
        cases = [
            ("rms_norm", (x, w), {"epsilon": 1e-5}, [rms_norm(x, w, 1e-5)]),
            ("rms_norm", (x, None), {"epsilon": 1e-5}, [rms_norm(x, 1, 1e-5)]),
            ("relu", (x,), {}, [np.maximum(x, 0)]),
            ("add", (x, w), {}, [x + w]),
            ("sub", (np.int64(5) - np.arange(6), np.arange(6)), {}, [5 - 2 * np.arange(6)]),
            ("softmax", (x,), {"dim": -1}, [softmax / softmax.sum(-1, keepdims=True)]),
            ("matmul", (a, b), {}, [a @ b]),
            ("argmax", (x,), {"keepdim": True}, [x.argmax(-1, keepdims=True)]),
            ("topk", (x, 4), {}, [-np.sort(-x, -1)[:, :4], np.argsort(-x, -1, kind="stable")[:, :4]]),
            ("embedding", (np.array([4, 0, 2]), a), {}, [a[[4, 0, 2]]]),
            ("silu_and_mul", (x,), {}, [x[:, :32] / (1 + np.exp(-x[:, :32])) * x[:, 32:]]),
            ("cast", (x,), {"dtype": "f16"}, [x.astype("float16")]),
            ("cast", (np.array(3.7, "float32"),), {"dtype": "i32"}, [np.array(3, "int32")]),
            ("relu", (np.zeros((0, 4), "float32"),), {}, [np.zeros((0, 4), "float32")]),
        ]
        for address in (self.unix, self.tcp):
            with opd.Client(address, timeout=60) as client:
                for op, args, attrs, expected in cases:
                    result = client.run(op, *args, **attrs)
                    self.assertEqual(len(result), len(expected), op)
                    self.assertIn(result.provider, [impl.provider for impl in client.describe(op).implementations])
                    for got, want in zip(result, expected):
                        self.assertEqual(got.shape, np.shape(want), op)
                        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=op)

    def test_bf16_and_f8_come_back_as_tensors(self):
        x = RNG.standard_normal((4, 32)).astype("float32")
        got = self.client.run("relu", opd.bf16_from_float32(x))[0]
        self.assertEqual(got.dtype, "bf16")
        np.testing.assert_array_equal(got.float32(), np.maximum(opd.bf16_from_float32(x).float32(), 0))
        quantised = self.client.run("static_quant_fp8", x, np.array([0.5], "float32"))[0]
        self.assertEqual((quantised.dtype, quantised.shape), ("f8_e4m3fn", (4, 32)))
        np.testing.assert_allclose(quantised.float32() * 0.5, x, rtol=0.07, atol=1e-3)

    def test_strided_operands_are_read_where_they_lie(self):
        base = np.arange(40, dtype="float32")
        view = opd.Tensor(base, "f32", [3, 2], [10, 3], 8)
        np.testing.assert_array_equal(self.client.run("relu", view)[0], base[2:].reshape(-1)[[[0, 3], [10, 13], [20, 23]]])
        with self.assertRaises(opd.InvalidArgument):
            self.client.run("relu", opd.Tensor(base, "f32", [4, 2], [13, 3], 0))
        np.testing.assert_array_equal(self.client.run("relu", base.reshape(5, 8)[::-1, ::2])[0], base.reshape(5, 8)[::-1, ::2])

    def test_large_tensors_travel_both_ways(self):
        x = RNG.standard_normal(6 << 20).astype("float32")
        expected = np.maximum(x, 0)
        for options in ({}, {"chunk_bytes": 65536}, {"no_chunks": True}):
            for address in (self.unix, self.tcp):
                with opd.Client(address, timeout=120, **options) as client:
                    np.testing.assert_array_equal(client.run("relu", x)[0], expected)

    def test_operands_and_results_lie_in_shared_memory(self):
        before = len(os.listdir("/proc/self/fd"))
        self.use_shared_memory()
        gc.collect()  # a map has a descriptor of its own, and lives as long as its tensors
        self.assertEqual(len(os.listdir("/proc/self/fd")), before)

    def use_shared_memory(self):
        with opd.Client(self.unix, shared_memory=True) as client:
            memory = client.memory(1 << 16)
            x, y, ids = memory.tensor("f32", [2, 600]), memory.tensor("f32", [2, 600]), memory.tensor("i64", [3])
            x.numpy()[:] = RNG.standard_normal((2, 600))
            result = client.run("relu", x, out=y)
            np.testing.assert_array_equal(result[0], np.maximum(x.numpy(), 0))
            self.assertTrue(np.shares_memory(result[0], y.numpy()))
            futures = [client.submit("relu", x, out=[memory.tensor("f32", [2, 600])]) for _ in range(5)]
            for future in futures:
                np.testing.assert_array_equal(future.result()[0], y.numpy())
            ids.numpy()[:] = [1, 0, 1]
            taken = client.run("embedding", ids, x, out=memory.tensor("f32", [3, 600]))[0]
            np.testing.assert_array_equal(taken, x.numpy()[[1, 0, 1]])
            kept = client.upload(x).result()
            np.testing.assert_array_equal(client.fetch(kept, out=y).result(), x.numpy())
            column = client.fetch(kept.view([2, 1], strides=[600, 1], byte_offset=4), out=memory.tensor("f32", [2, 1])).result()
            np.testing.assert_array_equal(column, x.numpy()[:, 1:2])
            with self.assertRaisesRegex(opd.InvalidArgument, "4800 bytes, but 4 of region"):
                client.fetch(kept, out=memory.tensor("f32", [1])).result()
            np.testing.assert_array_equal(client.run("relu", x, out=y)[0], y.numpy())
            with self.assertRaisesRegex(opd.InvalidArgument, "overlaps x"):
                client.run("relu", x, out=memory.tensor("f32", [2, 600], offset=x.offset + 64))
            with self.assertRaisesRegex(opd.InvalidArgument, "expected a multiple of 64 with room"):
                memory.tensor("f32", [1 << 20])
            with self.assertRaisesRegex(opd.InvalidArgument, "out: .*expected a Tensor of an open Memory"):
                client.run("relu", x, out=opd.Tensor(bytes(4800), "f32", [2, 600]))
            region = memory.region
            memory.close()
            memory.close()
            np.testing.assert_array_equal(client.run("relu", x)[0], y.numpy())  # sent, as any other
            memory.region = region
            with self.assertRaisesRegex(opd.NotFound, "isn't attached"):
                client.run("relu", x)
            memory.region = 0
        with opd.Client(self.unix) as client, self.assertRaisesRegex(opd.FailedPrecondition, "shared_memory=True"):
            client.memory(4096)
        with opd.Client(self.tcp, shared_memory=True) as client, self.assertRaisesRegex(opd.FailedPrecondition, "Unix socket"):
            client.memory(4096)

    def test_many_requests_in_flight_each_get_their_own_answer(self):
        inputs = [np.full((1 + i % 7, 8), i, "float32") for i in range(300)]
        futures = [self.client.submit("add", x, x) for x in inputs]
        for x, future in reversed(list(zip(inputs, futures))):
            np.testing.assert_array_equal(future.result()[0], x + x)

    def test_a_small_request_overtakes_a_large_upload(self):
        large = self.client.submit("relu", np.zeros(32 << 20, "float32"), keep=[0], copy=False)
        np.testing.assert_array_equal(self.client.run("relu", np.ones(4, "float32"))[0], np.ones(4))
        self.assertIsNone(large.result()[0])

    def test_fake_and_dry_runs_move_no_tensor(self):
        x = opd.Tensor(None, "f32", [1 << 20, 1 << 10])
        made = self.client.fake("relu", x)
        self.assertEqual((made[0].dtype, made[0].shape, made[0].data), ("f32", (1 << 20, 1 << 10), None))
        dry = self.client.dry_run("silu_and_mul", x, priority=["cpu"])
        self.assertEqual((dry.provider, list(dry.explain.effective)[0]), ("cpu", "cpu"))
        self.assertEqual(dry.explain.level, pb.REQUEST)

    def test_kept_results_are_operands(self):
        client, x = self.client, RNG.standard_normal((4, 8)).astype("float32")
        first = client.submit("relu", x, keep=True, copy=False)
        second = client.submit("add", first.output(0), first.output(0))  # before the first is answered
        np.testing.assert_array_equal(second.result()[0], 2 * np.maximum(x, 0))
        handle = first.result().handles[0]
        np.testing.assert_array_equal(client.run("relu", handle)[0], np.maximum(x, 0))
        last = handle.view([1, 8], byte_offset=3 * 32)
        np.testing.assert_array_equal(client.run("relu", last)[0], np.maximum(x, 0)[3:])
        np.testing.assert_array_equal(client.run("relu", handle.view([8, 4], [1, 8]))[0], np.maximum(x, 0).T)
        with self.assertRaises(opd.InvalidArgument):
            client.run("relu", handle.view([5, 8]))
        client.free(handle)
        for use in (lambda: client.run("relu", handle), lambda: client.free(handle), lambda: client.run("relu", first.output(0))):
            with self.assertRaises(opd.NotFound):
                use()
        with opd.Client(self.unix) as other, self.assertRaises(opd.NotFound):
            kept = client.run("relu", x, keep=True).handles[0]
            other.run("relu", kept)

    def test_a_result_that_was_not_kept_cannot_be_named(self):
        future = self.client.submit("relu", np.zeros(4, "float32"))
        future.result()
        with self.assertRaises(opd.NotFound):
            self.client.run("relu", future.output(0))

    def test_a_failed_request_aborts_those_that_need_it(self):
        failed = self.client.submit("rms_norm", np.zeros((2, 4), "float32"), np.zeros(3, "float32"), epsilon=1e-5, keep=[0])
        dependent = self.client.submit("relu", failed.output(0))
        with self.assertRaises(opd.InvalidArgument):
            failed.result()
        with self.assertRaises(opd.Aborted):
            dependent.result()

    def test_priorities(self):
        client, x = self.client, np.ones((2, 8), "float32")
        before = list(client.get_priority("silu_and_mul").effective)
        with client.push_priority({"silu_and_mul": ["native"], "*": ["cpu"]}):
            reply = client.get_priority("silu_and_mul")
            self.assertEqual((list(reply.effective), reply.level, list(reply.stored)), (["native"], pb.SESSION, ["native"]))
            self.assertEqual(client.run("silu_and_mul", x).provider, "native")
            self.assertEqual(client.run("softmax", x, dim=-1).provider, "cpu")
            with client.push_priority({"silu_and_mul": ["cpu"]}):
                self.assertEqual(client.run("silu_and_mul", x).provider, "cpu")
                self.assertEqual(client.run("silu_and_mul", x, priority=["native"]).provider, "native")
            self.assertEqual(client.run("silu_and_mul", x).provider, "native")
        self.assertEqual(list(client.get_priority("silu_and_mul").effective), before)
        client.set_priority("silu_and_mul", ["native"])
        self.assertEqual(client.run("silu_and_mul", x).provider, "native")
        client.clear_priority("silu_and_mul")
        self.assertEqual(list(client.get_priority("silu_and_mul").effective), before)
        self.assertEqual(client.run("silu_and_mul", x, priority=[]).provider, "native")
        for names in (["nobody"], ["cpu", "nobody"]):
            with self.assertRaisesRegex(opd.NotFound, "nobody"):
                client.set_priority("silu_and_mul", names)
        request = pb.Request()
        request.pop_priority.SetInParent()
        with self.assertRaises(opd.FailedPrecondition):
            client._call(request)

    def test_explain_and_uuid(self):
        result = self.client.run("silu_and_mul", np.ones(4, "float32"), priority=["cpu"], explain=True, uuid=True)
        self.assertEqual((result.provider, result.explain.level, result.explain.effective[0]), ("cpu", pb.REQUEST, "cpu"))
        self.assertRegex(result.uuid, "^[0-9a-f]{64}$")
        self.assertGreater(result.explain.times.kernel, 0)
        self.assertIsNone(self.client.run("silu_and_mul", np.ones(4, "float32")).explain)

    def test_inline_results(self):
        result = self.client.run("relu", np.array([-1, 2], "float32"), inline_results=True)
        self.assertEqual(result[0].tolist(), [0.0, 2.0])

    def test_generated_arguments_run(self):
        for keep in (False, True):
            args = self.client.generate("rms_norm", "f32", seed=3, keep=keep)
            kept = [value for value in args.values() if isinstance(value, opd.Handle)]
            self.assertEqual(bool(kept), keep)
            self.assertTrue(np.isfinite(self.client.run("rms_norm", **args)[0]).all())
            if keep:
                self.client.free(*kept)

    def test_errors_are_typed_and_name_what_is_wrong(self):
        client, x = self.client, np.ones((2, 8), "float32")
        cases = [
            (opd.NotFound, "no_such_op", lambda: client.run("no_such_op", x)),
            (opd.InvalidArgument, "weight", lambda: client.run("rms_norm", x, np.ones(7, "float32"), epsilon=1e-5)),
            (opd.InvalidArgument, "epsilon", lambda: client.run("rms_norm", x, None)),
            (opd.InvalidArgument, "nonsense", lambda: client.run("relu", x, nonsense=1)),
            (opd.InvalidArgument, "", lambda: client.run("relu", 3)),
            (opd.InvalidArgument, "", lambda: client.run("relu", x, x)),
            (opd.InvalidArgument, "9", lambda: client.run("embedding", np.array([0, 9]), x)),
            (opd.NotFound, "nobody", lambda: client.run("relu", x, priority=["nobody"])),
            (opd.NotFound, "no_such_op", lambda: client.describe("no_such_op")),
            (opd.InvalidArgument, "rank 9", lambda: client.run("relu", np.ones((1,) * 9, "float32"))),
            (opd.InvalidArgument, "", lambda: client.run("relu\0x", x)),
            (opd.InvalidArgument, "", lambda: client.run("a" * 1000, x)),
            (opd.NotFound, "", lambda: client.free(opd.Handle(0, 12345))),
        ]
        for error, text, call in cases:
            with self.assertRaisesRegex(error, text):
                call()
        self.assertEqual(client.run("relu", x)[0].shape, (2, 8))

    def test_ids_rise_strictly(self):
        self.client.ping()
        self.client._last -= 1
        with self.assertRaises(opd.InvalidArgument):
            self.client.ping()
        self.client.ping()

    def test_a_tcp_client_is_no_administrator(self):
        with opd.Client(self.tcp) as client:
            self.assertFalse(client.hello.admin)
            with self.assertRaises(opd.PermissionDenied):
                client.set_log_level("debug")
            with self.assertRaises(opd.PermissionDenied):
                client.set_priority("relu", ["native"], server=True)

    def test_an_unknown_first_word_is_answered_and_closed(self):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self.unix[5:])
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            sock.settimeout(20)
            answer = b""
            with contextlib.suppress(ConnectionResetError):  # what it didn't read resets, behind the answer
                while piece := sock.recv(4096):
                    answer += piece
            self.assertIn(b"HTTP", answer)

    def test_an_upload_is_an_operand_before_and_after_its_answer(self):
        x = np.arange(12, dtype="float32").reshape(3, 4)
        future = self.client.upload(x)
        self.assertTrue((self.client.fetch(future.output()).result() == x).all())
        handle = future.result()
        self.assertEqual((handle.dtype, handle.shape), ("f32", (3, 4)))
        self.assertTrue((self.client.run("relu", handle)[0] == x).all())
        self.assertTrue((self.client.fetch(handle.view([4], [1], 16)).result() == x[1]).all())

    def test_a_graph_is_described_registered_and_run(self):
        x, w = RNG.normal(size=(3, 8)).astype("float32"), RNG.normal(size=(6, 8)).astype("float32")
        graph = opd.Graph("mlp")
        given = graph.input("x")
        total = graph.state("total", self.client.upload(np.zeros((3, 6), "float32")).result())
        up = graph.node("linear", given, graph.constant("w", self.client.upload(w).result()), name="up")
        norm = graph.node("fused_add_rms_norm", up, total.donate(), None, 1e-5, name="norm", priority=["native"])
        graph.output(norm.output(1), "sum")
        graph.output(graph.node("relu", up.view("f32", [6, 3], [1, 6]), name="turned"))
        mlp = self.client.register(graph)
        futures = [mlp.submit(x=x) for _ in range(4)]
        for count, future in enumerate(futures, 1):
            total, turned = future.result()
            np.testing.assert_allclose(total, count * (x @ w.T), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(turned, np.maximum(x @ w.T, 0).T, rtol=1e-4, atol=1e-5)
        result = mlp(x, explain=True, keep=[0], copy=False)
        self.assertEqual([(n.node, n.op) for n in result.graph.nodes], [("up", "linear"), ("norm", "fused_add_rms_norm"), ("turned", "relu")])
        self.assertEqual(result.graph.nodes[1].provider, "native")
        self.assertFalse(result.graph.dispatched)
        self.assertIsNone(result[0])
        np.testing.assert_allclose(self.client.fetch(result.states[0]).result(), self.client.fetch(result.handles[0]).result())
        with self.assertRaisesRegex(opd.InvalidArgument, "mlp: argument x \\(Tensor\\) is missing"):
            mlp()
        mlp.free()
        with self.assertRaises(opd.NotFound):
            mlp(x)
        graph = opd.Graph()
        later = graph.node("relu", opd.Value(graph, 99))
        with self.assertRaisesRegex(opd.NotFound, "node 'n0': x names node 99"):
            self.client.register(graph)
        with self.assertRaises(opd.InvalidArgument):
            graph.node("add", later, x)

    def test_parts_are_listed_until_they_are_whole(self):
        x = np.arange(1000, dtype="float64")
        handle = self.client.upload_parts("f64", [1000])
        self.client.write(handle, 4000, x[500:]).result()
        with self.assertRaises(opd.FailedPrecondition):
            self.client.fetch(handle).result()
        row, = self.client.tensors()
        self.assertEqual((row.bytes, row.received, list(row.shape)), (8000, 4000, [1000]))
        self.client.write(handle, 0, x[:500]).result()
        self.assertTrue((self.client.fetch(handle).result() == x).all())
        self.client.free(handle)
        self.assertEqual(self.client.tensors(), [])

    def test_malformed_uploads_are_refused_by_the_daemon_too(self):
        def send(request, data=b""):
            payload = opd._Payload()
            if data:
                payload.add(memoryview(data))
            return self.client._submit(request, lambda reply, bytes_: reply, payload).result()

        tensor = pb.Tensor(dtype=pb.F32, shape=[4])
        bad = [
            (pb.Request(upload=pb.Upload()), b"", "no dtype"),
            (pb.Request(upload=pb.Upload(tensor=tensor)), b"", "neither payload, inline nor shared"),
            (pb.Request(upload=pb.Upload(tensor=pb.Tensor(dtype=pb.F32, shape=[4], inline=bytes(15)))), b"", "15"),
            (pb.Request(upload=pb.Upload(tensor=pb.Tensor(
                dtype=pb.F32, shape=[4], payload=pb.Range(offset=0, bytes=16)))), bytes(80), "the whole payload of 80"),
            (pb.Request(upload=pb.Upload(tensor=pb.Tensor(dtype=pb.F32, shape=[1 << 40, 1 << 40]))), b"", "2^63"),
            (pb.Request(upload=pb.Upload(tensor=pb.Tensor(dtype=pb.F32, shape=[-1]), parts=True)), b"", "negative"),
            (pb.Request(upload=pb.Upload(tensor=pb.Tensor(dtype=pb.F32, shape=[4], inline=bytes(16)), parts=True)), b"",
             "brings no bytes"),
            (pb.Request(upload=pb.Upload(tensor=tensor, parts=True)), bytes(16), "brings no bytes"),
            (pb.Request(upload=pb.Upload(tensor=pb.Tensor(dtype=pb.F32, shape=[4], inline=bytes(16), donate=True))), b"",
             "donate"),
            (pb.Request(write=pb.Write()), b"", "rank 1"),
            (pb.Request(fetch=pb.Fetch()), b"", "neither a handle nor a result"),
        ]
        for request, data, words in bad:
            with self.assertRaises(opd.InvalidArgument) as caught:
                send(request, data)
            self.assertIn(words, str(caught.exception))
        self.assertEqual(self.client.tensors(), [])


if __name__ == "__main__":
    unittest.main()
