#!/usr/bin/python3
"""Differential checking: a sample of runs is computed by a second provider too, after the reply; a difference is logged, counted, and left as a case file where somebody asked for that.

OPD_BIN names the daemon, OPCTL_BIN opctl, OPD_MODULES the test module.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
from harness import f32, inline, pb, run, tensor, unpack_f32
from test_containment import Faulty, OPCTL, VALUE, relu


class Differential(Faulty):
    def compared(self, more="", every=1):
        return self.daemon("providers: {faulty: {compare: native, compare_every: %d}, cpu: {compare: native, compare_every: 1}}\n%s" % (every, more))

    def wait(self, client, compared, diverged, left_out=0):
        def found():
            info = client.info()
            return info.compared, info.diverged, info.left_out

        harness.wait_until(lambda: found()[0] + found()[2] == compared + left_out, "the comparisons")
        harness.wait_until(lambda: client.info().memory_bytes == 0, "what they held is given back")
        self.assertEqual(found(), (compared, diverged, left_out))

    def test_a_wrong_result_is_logged_and_counted(self):
        daemon = self.compared()
        client = self.client(daemon)
        self.works(client)
        reply = client.ask(relu(VALUE))[0]
        self.assertEqual(unpack_f32(reply.run.outputs[0].tensor.inline)[3], 3)  # off the reply's path: it has gone out
        self.wait(client, 2, 1)
        line = daemon.wait_log("providers diverge")
        for word in ("provider=faulty", "reference=native", "op=relu", "f32[4]", "result=0", "element=0"):
            self.assertIn(word, line)
        self.assertNotIn("1005", line)  # no contents unless somebody asked for them
        self.assertEqual(self.provider(daemon)["failures"], 1)

    def test_a_provider_that_diverges_is_quarantined(self):
        daemon = self.compared("quarantine: {failures: 2}\n")
        client = self.client(daemon)
        for turn in range(1, 3):
            client.ask(relu(VALUE))
            self.wait(client, turn, turn)
        self.assertEqual(self.skipped(self.works(client, "native"))["faulty"][1], "quarantine: 2 failures (divergence 2)")

    def test_a_case_file_replays_it_where_a_folder_is_configured(self):
        folder = tempfile.mkdtemp(prefix="opd-cases-")
        self.addCleanup(shutil.rmtree, folder, True)
        daemon = self.compared("differential: {folder: %s}\n" % folder)
        client = self.client(daemon)
        client.ask(relu(VALUE))
        daemon.wait_log("case of a divergence written")
        name, = os.listdir(folder)
        path = os.path.join(folder, name)
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        verify = [OPCTL, "--connect", daemon.address, "verify", path, "--provider"]
        self.assertEqual(subprocess.run(verify + ["native"], capture_output=True).returncode, 0)
        done = subprocess.run(verify + ["faulty"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
        self.assertIn("got=1005 wanted=1004", daemon.wait_log("providers diverge"))

    def test_every_nth_run_is_compared(self):
        client = self.client(self.compared(every=3))
        for _ in range(7):
            self.works(client)
        self.wait(client, 3, 0)

    def test_sums_in_another_order_and_other_dtypes_dont_diverge(self):
        daemon = self.compared()
        client = self.client(daemon)
        values = [((i * 7919) % 2001 - 1000) / 37.0 for i in range(64 * 512)]
        x, weight = f32(*values[: 8 * 512]), f32(*values)
        request = run("linear", tensor([8, 512]), tensor([64, 512], len(x)), run_priority=["cpu"], run_strict=True)
        request.run.args.add(name="bias").none.SetInParent()
        client.ask(request, x + weight)
        half = inline([4], b"\0\x3c\0\xbc\x01\0\xff\x7b", dtype=7)
        client.call(run("silu", half, run_priority=["cpu"], run_strict=True))
        integers = inline([4], bytes(range(4)), dtype=2)
        client.call(run("relu", integers, run_priority=["cpu"], run_strict=True))
        harness.wait_until(lambda: client.info().compared >= 1 and client.info().memory_bytes == 0, "the comparisons")
        self.assertEqual(client.info().diverged, 0, daemon.log_text())

    def test_a_kept_operand_that_is_freed_meanwhile_is_compared_as_it_was(self):
        client = self.client(self.compared())
        x = client.ask(pb.Request(upload=pb.Upload(tensor=tensor([4]))), f32(0, -1, 1, 2))[0].run.outputs[0].kept
        client.ask(run("relu", pb.Tensor(handle=x), run_priority=["faulty"], run_strict=True))
        client.ask(pb.Request(free=pb.Free(tensors=[pb.Tensor(handle=x)])))
        self.wait(client, 1, 0)

    def test_what_doesnt_fit_its_memory_is_left_out(self):
        client = self.client(self.compared("differential: {memory: 0}\n"))
        self.works(client)
        self.wait(client, 0, 0, 1)

    def test_a_view_that_is_large_when_laid_out_is_left_out(self):
        """A kilobyte of weights as [1024, 256] is 2 MiB of doubles."""
        client = self.client(self.compared("differential: {memory: 1 MiB}\n"))
        x, row = inline([1, 256], bytes(1024)), bytes(1024)
        client.ask(run("linear", x, inline([1024, 256], row, strides=[0, 1]), bias=None, run_priority=["cpu"]))
        self.wait(client, 0, 0, 1)
        client.ask(run("linear", x, inline([8, 256], row, strides=[0, 1]), bias=None, run_priority=["cpu"]))
        self.wait(client, 1, 0, 1)

    def test_a_client_that_leaves_doesnt_end_the_comparison(self):
        daemon = self.compared()
        with harness.Client(daemon.address) as client:
            client.ask(relu(VALUE))
        self.wait(self.client(daemon), 1, 1)


if __name__ == "__main__":
    unittest.main(verbosity=2)
