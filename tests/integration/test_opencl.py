#!/usr/bin/python3
"""The module `opencl` in a real daemon, on whatever OpenCL device there is (on a machine without a GPU: PoCL). Skipped where there is none.

OPD_BIN, OPCTL_BIN name the programs, OPD_OPENCL_MODULE the module.
"""
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
from harness import Client, Daemon, f32, inline, pb, run, unpack_f32

MODULE = os.environ.get("OPD_OPENCL_MODULE", os.path.join(harness.ROOT, "build", "lib", "opd", "opd-provider-opencl.so"))
OPCTL = os.environ.get("OPCTL_BIN", os.path.join(harness.ROOT, "build", "bin", "opctl"))
GOLDEN = os.environ.get("OPD_GOLDEN", os.path.join(harness.ROOT, "tests", "golden"))
BF16, I64 = 8, 6


def opctl(daemon, *words):
    done = subprocess.run([OPCTL, "--connect", daemon.address, "--json", *words], capture_output=True, text=True, timeout=harness.PATIENCE * 4)
    return done.returncode, done.stdout


class Absent(unittest.TestCase):
    """Where there is no OpenCL the module loads all the same, and says what is missing."""

    def test_without_a_driver_the_daemon_says_what_is_missing(self):
        with tempfile.TemporaryDirectory() as nothing:  # an ICD loader that finds no driver
            daemon = Daemon("--module", "opencl=" + MODULE, "--priority", "relu=opencl,native", environment={"OCL_ICD_VENDORS": nothing})
            self.addCleanup(daemon.stop)
            with Client(daemon.address) as client:
                reply = client.ask(run("relu", inline([2], f32(-1, 1)), run_explain=True, run_inline_results=True))[0].run
            self.assertEqual(reply.provider, "native")
            self.assertEqual(reply.explain.skipped[0].provider, "opencl")
            self.assertIn("not available", reply.explain.skipped[0].reason)
            self.assertIn("not available", daemon.log_text())


class OpenCL(unittest.TestCase):
    """Golden cases, random operands against native, tensors that live on the device, indices checked there."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon("--module", "opencl=" + MODULE, "--inline", "0")
        cls.addClassCleanup(cls.daemon.stop)
        with Client(cls.daemon.address) as client:
            if "opencl:0" not in client.info().devices:
                raise unittest.SkipTest("no OpenCL device here")

    def client(self):
        client = Client(self.daemon.address)
        self.addCleanup(client.close)
        return client

    def upload(self, client, shape, data, dtype=9, device="opencl:0"):
        request = pb.Request(upload=pb.Upload(device=device))
        request.upload.tensor.CopyFrom(inline(shape, data, dtype=dtype))
        return pb.Tensor(handle=client.ask(request)[0].run.outputs[0].kept)

    def test_info_tells_what_a_device_holds(self):
        client = self.client()
        data = f32(*range(1 << 16))
        tensor = self.upload(client, [1 << 16], data)
        before = client.info().device_states[0]
        self.assertEqual((before.name, before.lost), ("opencl:0", ""))
        self.assertGreaterEqual(before.memory_bytes, len(data))
        self.assertGreater(before.memory_limit_bytes, before.memory_bytes)
        client.ask(pb.Request(free=pb.Free(tensors=[tensor])))
        after = client.info().device_states[0]
        self.assertEqual(before.memory_bytes - after.memory_bytes, len(data))
        self.assertGreaterEqual(after.cached_bytes, len(data))
        code, out = opctl(self.daemon, "info")
        self.assertEqual(code, 0, out)
        shown = json.loads(out)["device_states"][0]
        self.assertEqual((shown["name"], shown["memory_bytes"]), ("opencl:0", after.memory_bytes))

    def test_golden_cases_pass(self):
        code, out = opctl(self.daemon, "verify", "--provider", "opencl", GOLDEN)
        self.assertEqual(code, 0, out[-2000:])

    def generated(self, client, op, dtype, variant, dims):
        request = pb.Request(generate=pb.Generate(op=op, dtype=dtype, variant=variant, dims=dims, seed=7, keep=True))
        return client.ask(request)[0].generated.args

    def test_random_operands_agree_with_native(self):
        tolerance = {9: (2e-5, 1e-5), 7: (1e-2, 4e-3), 8: (2e-2, 1.6e-2)}
        formats = {9: "f", 7: "e"}
        client = self.client()
        for op, dims in (("rms_norm", [7, 300]), ("fused_add_rms_norm", [5, 65]), ("layer_norm", [6, 257]), ("silu_and_mul", [3, 130]),
                         ("gelu_and_mul", [3, 77]), ("softmax", [9, 515]), ("rotary_embedding", []), ("embedding", []),
                         ("linear", [3, 70, 90]), ("linear", [130, 70, 90]), ("matmul", [])):
            for dtype in (9, 7, 8):
                with self.subTest(op=op, dims=dims, dtype=dtype):
                    arguments = self.generated(client, op, dtype, 0, dims)
                    results = []
                    for provider in ("opencl", "native"):
                        request = pb.Request()
                        request.run.op = op
                        request.run.args.extend(arguments)
                        request.run.priority.names.append(provider)
                        request.run.strict = True
                        reply, payload = client.ask(request)
                        self.assertEqual(reply.run.provider, provider)
                        outputs = []
                        for output in reply.run.outputs:
                            data = payload[output.tensor.payload.offset:][:output.tensor.payload.bytes]
                            if dtype == BF16:
                                outputs.append([struct.unpack("<f", b"\0\0" + data[i:i + 2])[0] for i in range(0, len(data), 2)])
                            else:
                                outputs.append([value for value, in struct.iter_unpack("<" + formats[dtype], data)])
                        results.append(outputs)
                    atol, rtol = tolerance[dtype]
                    for got, want in zip(*results):
                        self.assertEqual(len(got), len(want))
                        for a, b in zip(got, want):
                            self.assertTrue(abs(a - b) <= atol + rtol * abs(b) or (math.isnan(a) and math.isnan(b)), (a, b))

    def test_a_chain_of_ops_stays_on_the_device(self):
        client = self.client()
        values = [((i * 37) % 11 - 5) / 4 for i in range(8 * 16)]
        x = self.upload(client, [8, 16], f32(*values))
        weight = self.upload(client, [16, 16], f32(*[1.0 if i // 16 == i % 16 else 0.0 for i in range(256)]))
        for op, operands in (("linear", [x, weight]), ("silu", None), ("add", "twice")):
            operands = operands if isinstance(operands, list) else [x, x] if operands == "twice" else [x]
            request = run(op, *operands, run_priority=["opencl"], run_strict=True, run_explain=True)
            request.run.outputs.add(keep=True, no_copy=True)
            reply = client.ask(request)[0].run
            self.assertEqual((list(reply.explain.moves), reply.explain.device), ([], "opencl:0"))
            x = pb.Tensor(handle=reply.outputs[0].kept)
        data = client.ask(pb.Request(fetch=pb.Fetch(tensor=x)))[1]
        for got, value in zip(unpack_f32(data), values):
            self.assertAlmostEqual(got, 2 * value / (1 + math.exp(-value)), places=5)

    def test_indices_of_results_without_elements_are_checked_too(self):
        client = self.client()
        bad = self.upload(client, [3], struct.pack("<3q", 0, 2, 7), dtype=I64)
        empty = [inline([3, 0], b""), inline([3, 0], b"")]
        for op, operands, param in (("embedding", [bad, inline([5, 0], b"")], "ids"), ("rotary_embedding", [bad, *empty], "positions")):
            with self.subTest(op=op):
                request = run(op, *operands, run_priority=["opencl"], run_strict=True)
                if op == "rotary_embedding":
                    request.run.args.add(name="head_size").int = 4
                    request.run.args.add(name="cos_sin_cache").tensor.CopyFrom(inline([5, 4], f32(*[0] * 20)))
                reply = client.call(request)[0]
                self.assertEqual((reply.status, reply.message), (harness.INVALID_ARGUMENT, "%s: %s[2] is 7, expected 0 to 4" % (op, param)))

    def test_a_donated_key_is_turned_in_place(self):
        client = self.client()
        positions = self.upload(client, [2], struct.pack("<2q", 1, 0), dtype=I64)
        query = self.upload(client, [2, 4], f32(1, 0, 1, 0, 1, 2, 3, 4))
        key = self.upload(client, [2, 4], f32(1, 0, 1, 0, 5, 6, 7, 8))
        cache = self.upload(client, [2, 4], f32(1, 1, 0, 0, 0, 0, 1, 1))  # a quarter turn at position 1
        query.donate = key.donate = True
        request = run("rotary_embedding", positions, query, key, head_size=4, cos_sin_cache=None, run_priority=["opencl"], run_explain=True)
        del request.run.args[-1]
        request.run.args.add(name="cos_sin_cache").tensor.CopyFrom(cache)
        for _ in range(2):
            request.run.outputs.add(no_copy=True)
        reply = client.ask(request)[0].run
        self.assertEqual(list(reply.explain.moves), [])
        data = client.ask(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=reply.outputs[1].kept))))[1]
        self.assertEqual(list(unpack_f32(data)), [-1, 0, 1, 0, 5, 6, 7, 8])

    def test_indices_that_live_there_are_checked_there(self):
        client = self.client()
        table = self.upload(client, [3, 2], f32(0, 1, 2, 3, 4, 5))
        for ids, wanted in (([2, 0], [4, 5, 0, 1]), ([1, 3], 3), ([-1, 2], -1), ([0], [0, 1])):
            handle = self.upload(client, [len(ids)], struct.pack("<%dq" % len(ids), *ids), dtype=I64)
            reply = client.call(run("embedding", handle, table, run_priority=["opencl"], run_strict=True, run_inline_results=True))[0]
            if isinstance(wanted, list):
                self.assertEqual((reply.message, list(unpack_f32(reply.run.outputs[0].tensor.inline))), ("", wanted))
            else:
                self.assertEqual((reply.status, reply.message),
                                 (harness.INVALID_ARGUMENT, "embedding: ids[%d] is %d, expected 0 to 2" % (ids.index(wanted), wanted)))

    def test_what_it_refuses_goes_to_the_next(self):
        client = self.client()
        data = inline([2], struct.pack("<2d", -1, 1), dtype=10)
        reply = client.ask(run("relu", data, run_priority=["opencl", "native"], run_explain=True))[0].run
        self.assertEqual((reply.provider, reply.explain.skipped[0].reason), ("native", "dtype: x f64, only f32, f16, bf16"))

    def test_many_sessions_at_once_and_the_ledger_at_zero(self):
        clients = [Client(self.daemon.address) for _ in range(4)]
        wanted = {}
        for round in range(25):
            for number, client in enumerate(clients):
                x = [float((round * 7 + number * 3 + i) % 13 - 6) for i in range(33)]
                request = run("relu", inline([33], f32(*x)), run_priority=["opencl"], run_strict=True, run_inline_results=True)
                wanted[number, client.submit(request)] = [max(value, 0) for value in x]
        for number, client in enumerate(clients):
            for _ in range(25):
                found, reply, _ = client.read_reply()
                self.assertEqual(list(unpack_f32(reply.run.outputs[0].tensor.inline)), wanted[number, found])
            client.close()
        with Client(self.daemon.address) as client:
            harness.wait_until(lambda: client.info().memory_bytes == 0, "the ledger at zero")


class TwoDevices(unittest.TestCase):
    """Which of two devices a request runs on: what it says, what its session says, where its operands are, which is done first. PoCL shows as many as it is told to, each with a context and a queue of its own:
    memory of one isn't the other's."""

    @classmethod
    def setUpClass(cls):
        for drivers in ("pthread pthread", "cpu cpu"):  # as PoCL calls them up to 3, and since 4
            cls.daemon = Daemon("--module", "opencl=" + MODULE, "--inline", "0", environment={"POCL_DEVICES": drivers})
            with Client(cls.daemon.address) as client:
                if "opencl:1" in client.info().devices:
                    cls.addClassCleanup(cls.daemon.stop)
                    return
            cls.daemon.stop()
        raise unittest.SkipTest("no two OpenCL devices here")

    def setUp(self):
        self.client = Client(self.daemon.address)
        self.addCleanup(self.client.close)

    def add(self, *operands, **options):
        """The request a + b, of 64 elements each."""
        return run("add", *operands, run_priority=["opencl"], run_strict=True, run_explain=True, run_inline_results=True, **options)

    def ran(self, request, wanted):
        """Where it ran, and what moved for it."""
        reply = self.client.ask(request)[0].run
        self.assertEqual(list(unpack_f32(reply.outputs[0].tensor.inline)), wanted)
        return reply.explain.device, [(move.operand, getattr(move, "from"), move.to) for move in reply.explain.moves]

    def values(self, first):
        return [float(first + i) for i in range(64)]

    def inline(self, first):
        return inline([64], f32(*self.values(first)))

    def upload(self, first, device):
        reply = self.client.ask(pb.Request(upload=pb.Upload(device=device, tensor=self.inline(first))))[0]
        return pb.Tensor(handle=reply.run.outputs[0].kept)

    def sum(self, a, b):
        return [x + y for x, y in zip(self.values(a), self.values(b))]

    def test_a_request_says_which(self):
        for device in ("opencl:1", "opencl:0", "opencl:1"):
            where, moves = self.ran(self.add(self.inline(1), self.inline(2), run_device=device), self.sum(1, 2))
            self.assertEqual((where, moves), (device, [("a", "cpu", device), ("b", "cpu", device), ("result", device, "cpu")]))

    def test_a_session_says_which_for_requests_that_do_not(self):
        for device, other in (("opencl:1", "opencl:0"), ("opencl:0", "opencl:1")):
            self.client.ask(pb.Request(set_session=pb.SetSession(device=device)))
            self.assertEqual([self.ran(self.add(self.inline(i), self.inline(2)), self.sum(i, 2))[0] for i in range(4)], [device] * 4)
            self.assertEqual(self.ran(self.add(self.inline(1), self.inline(2), run_device=other), self.sum(1, 2))[0], other)

    def test_operands_that_live_on_one_are_worked_on_there(self):
        for home, other in (("opencl:1", "opencl:0"), ("opencl:0", "opencl:1")):
            a, b, far = self.upload(3, home), self.upload(4, home), self.upload(5, other)
            self.assertEqual(self.ran(self.add(a, b), self.sum(3, 4)), (home, [("result", home, "cpu")]))
            self.assertEqual(self.ran(self.add(a, self.inline(6)), self.sum(3, 6))[0], home)
            # Where the request says otherwise they come over, by whichever way.
            where, moves = self.ran(self.add(a, far, run_device=other), self.sum(3, 5))
            ways = [(source, target) for operand, source, target in moves if operand == "a"]
            self.assertEqual((where, ways[0][0], ways[-1][1], {operand for operand, *_ in moves}), (other, home, other, {"a", "result"}))

    def test_without_a_home_the_one_that_is_done_first_is_taken(self):
        rows = inline([32, 128], f32(*[0.5] * (32 * 128)))
        weight = inline([128, 128], f32(*[1.0] * (128 * 128)))
        used = set()
        for _ in range(100):  # a device that is done before the next request is there is the first again
            sent = [self.client.submit(run("linear", rows, weight, run_priority=["opencl"], run_strict=True, run_explain=True)) for _ in range(8)]
            used |= {self.client.read_reply()[1].run.explain.device for _ in sent}
            if len(used) == 2:
                break
        self.assertEqual(used, {"opencl:0", "opencl:1"})


if __name__ == "__main__":
    unittest.main(verbosity=2)
