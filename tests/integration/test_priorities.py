#!/usr/bin/env python3
"""The default lists of providers: what a table of measured times comes to, that the committed lists are those of the committed table, and that they hold in a daemon
with and without the modules that they name.

    OPD_BIN=build/bin/opd test_priorities.py"""
import os
import sys
import unittest

import harness
from harness import Client, Daemon, inline, pb, run

sys.path.insert(0, os.path.join(harness.ROOT, "tests", "bench"))
import kernels_lists  # noqa: E402

TABLE = os.path.join(harness.ROOT, "providers", "measured.tsv")
LISTS = os.path.join(harness.ROOT, "providers", "priorities.txt")
MODULES = os.path.join(os.path.dirname(os.path.dirname(harness.OPD)), "lib", "opd")
ABSENT = "no such module is configured"


def table(*lines):
    return ["# op, dtype, sizes, threads, provider, us"] + ["\t".join(str(word) for word in line.split()) for line in lines]


def lists(*lines):
    return dict(line.rsplit("=", 1) for line in kernels_lists.write(table(*lines)).splitlines() if not line.startswith("#"))


class Table(unittest.TestCase):
    def test_the_faster_provider_comes_first_and_native_last(self):
        self.assertEqual(lists("linear f32 8,64,64 1 cpu 30", "linear f32 8,64,64 1 a 10", "linear f32 8,64,64 1 b 20"), {"*": "cpu,native", "linear": "a,b,cpu,native"})

    def test_a_module_that_leads_by_no_more_than_the_noise_does_not_pass_cpu(self):
        self.assertEqual(lists("linear f32 8,64,64 1 a 10", "linear f32 8,64,64 1 cpu 10.4")["linear"], "cpu,a,native")
        self.assertEqual(lists("linear f32 8,64,64 1 a 10", "linear f32 8,64,64 1 cpu 10.6")["linear"], "a,cpu,native")

    def test_sizes_count_alike_however_long_they_take(self):
        self.assertEqual(lists("linear f32 64,8,8 1 a 10", "linear f32 64,8,8 1 cpu 20", "linear f32 64,8,9 1 a 1200", "linear f32 64,8,9 1 cpu 1000")["linear"], "a,cpu,native")

    def test_a_dtype_and_few_rows_get_lists_of_their_own_where_these_begin_otherwise(self):
        found = lists("linear f32 1,8,8 1 a 20", "linear f32 1,8,8 1 cpu 10", "linear f32 8,8,8 1 a 30", "linear f32 8,8,8 1 cpu 10",
                      "linear f32 512,8,8 1 a 1", "linear f32 512,8,8 1 cpu 100", "linear bf16 1,8,8 1 a 20", "linear bf16 1,8,8 1 cpu 10",
                      "linear bf16 512,8,8 1 a 20", "linear bf16 512,8,8 1 cpu 10")
        self.assertEqual(found, {"*": "cpu,native", "linear": "a,cpu,native", "linear/f32/rows<=8": "cpu,a,native", "linear/bf16": "cpu,a,native"})

    def test_a_provider_that_does_not_take_a_dtype_makes_no_list_of_its_own(self):
        found = lists("linear f32 64,8,8 1 a 10", "linear f32 64,8,8 1 b 20", "linear f32 64,8,8 1 cpu 30", "linear bf16 64,8,8 1 a 10", "linear bf16 64,8,8 1 cpu 20")
        self.assertEqual(found, {"*": "cpu,native", "linear": "a,b,cpu,native"})

    def test_rows_of_a_product_of_batches_are_those_of_all_batches(self):
        found = lists("matmul f32 8,4,8,8 1 a 10", "matmul f32 8,4,8,8 1 cpu 20", "matmul f32 8,64,8,8 1 a 30", "matmul f32 8,64,8,8 1 cpu 10")
        self.assertEqual(found["matmul/f32/rows<=32"], "a,cpu,native")

    def test_every_machine_of_the_table_counts(self):
        machines = table("linear f32 8,64,64 1 a 10", "linear f32 8,64,64 1 cpu 20") + table("linear f32 8,64,64 1 a 90", "linear f32 8,64,64 1 cpu 30")
        self.assertEqual(kernels_lists.write(machines).splitlines()[-1], "linear=cpu,a,native")

    def test_the_committed_lists_are_those_of_the_committed_table(self):
        with open(TABLE, encoding="utf-8") as measured, open(LISTS, encoding="utf-8") as committed:
            self.assertEqual(committed.read(), kernels_lists.write(measured))


class InADaemon(unittest.TestCase):
    def client(self, *flags):
        daemon = Daemon(*flags)
        self.addCleanup(daemon.stop)
        client = Client(daemon.address)
        self.addCleanup(client.close)
        return client

    def expected(self, op, dtype, rows):
        """The committed list for a call."""
        with open(LISTS, encoding="utf-8") as committed:
            found = dict(line.strip().rsplit("=", 1) for line in committed if not line.startswith("#"))
        narrow = sorted((int(key.rsplit("<=")[1]), key) for key in found if key.startswith(f"{op}/{dtype}/rows<="))
        keys = [key for most, key in narrow if rows <= most] + [f"{op}/{dtype}", op, "*"]
        return next(found[key] for key in keys if key in found).split(",")

    def linear(self, client, dtype, rows):
        size = 4 if dtype == "f32" else 2
        operands = [inline([count, 8], bytes(count * 8 * size), dtype=pb.F32 if dtype == "f32" else pb.BF16) for count in (rows, 16)]
        return client.ask(run("linear", *operands, run_explain=True))[0].run

    def test_modules_that_are_absent_are_passed_over_with_the_reason(self):
        client = self.client()
        for dtype in ("f32", "bf16"):
            for rows in (1, 8, 32, 33):
                with self.subTest(dtype=dtype, rows=rows):
                    wanted, ran = self.expected("linear", dtype, rows), self.linear(client, dtype, rows)
                    self.assertEqual(ran.provider, "cpu")
                    skipped = {skip.provider: skip.reason for skip in ran.explain.skipped}
                    for name in wanted[:wanted.index("cpu")]:
                        self.assertIn(ABSENT, skipped[name])

    def test_modules_that_are_there_lead_where_the_table_says_so(self):
        names = [name for name in ("onednn", "openblas") if os.path.exists(os.path.join(MODULES, f"opd-provider-{name}.so"))]
        if not names or "thread" in os.environ.get("OPD_TEST_SANITIZED", ""):
            self.skipTest("no module is built here, or its library's threads aren't ThreadSanitizer's to judge")
        client = self.client(*(word for name in names for word in ("--module", f"{name}={MODULES}/opd-provider-{name}.so")))
        known = {provider.name: provider for provider in client.ask(pb.Request(list_providers=pb.Empty()))[0].providers.providers}
        for dtype in ("f32", "bf16"):
            for rows in (1, 8, 32, 33):
                with self.subTest(dtype=dtype, rows=rows):
                    ran = self.linear(client, dtype, rows)
                    skipped = {skip.provider for skip in ran.explain.skipped}
                    first = next(name for name in self.expected("linear", dtype, rows) if name in known and name not in skipped)
                    self.assertEqual(ran.provider, first)
                    self.assertFalse({name for name in names if known[name].available and dtype == "f32"} & skipped)


if __name__ == "__main__":
    unittest.main()
