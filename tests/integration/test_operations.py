#!/usr/bin/python3
"""What an operator must be able to forget about: the daemon's end at any moment and the start after it, cores, a clock that jumps, a log that somebody tries to fill."""
import os
import random
import re
import signal
import time
import unittest

import harness
from harness import DEADLINE_EXCEEDED, HELLO, NOT_FOUND, OK, REQUEST, Client, Daemon, check_healthy, f32, frame, hello_envelope, inline, pb, run, tensor, wait_until
from work import Work, slow

JUMPS = os.environ.get("OPD_CLOCK_JUMPS", "")
SANITIZED = os.environ.get("OPD_TEST_SANITIZED", "")


class Case(unittest.TestCase):
    def start(self, *flags, **options):
        daemon = Daemon(*flags, **options)
        self.addCleanup(daemon.stop, None)
        return daemon


class Endings(Case):
    def test_sigterm_in_the_middle_of_everything_ends_in_time(self):
        """Hardening: operations-sigterm, promise-drain"""
        chance = random.Random(11)
        for _ in range(harness.LONG and 100 or 3):
            daemon = Daemon("--threads", "2", config="limits: {drain: 100ms}\n")
            work = Work(daemon.address, chance)
            time.sleep(chance.uniform(0, 0.02))
            daemon.signal(signal.SIGTERM)
            code = daemon.wait()
            work.close()
            self.assertIn(code, (0, 1))
            last = daemon.log_text().splitlines()[-1]
            self.assertIn("ended before all work was done" if code == 1 else "ended", last)
            self.assertEqual(daemon.err_text(), "")
            self.assertFalse(os.path.exists(daemon.path))
            daemon.stop(None)

    def test_sigkill_in_the_middle_of_everything_and_the_next_start_is_clean(self):
        """Hardening: operations-sigkill, promise-restart"""
        chance = random.Random(12)
        first = self.start()
        for _ in range(harness.LONG and 100 or 3):
            work = Work(first.address, chance)
            time.sleep(chance.uniform(0, 0.02))
            first.signal(signal.SIGKILL)
            first.wait()
            work.close()
            first = self.start(folder=first.folder)
            check_healthy(self, first)
            with Client(first.address) as client:
                self.assertEqual(client.info().memory_bytes, 0)
                self.assertEqual(list(client.ask(pb.Request(list_publications=pb.ListPublications()))[0].publications.items), [])
                reply, _ = client.call(run("relu", pb.Tensor(handle=pb.Handle(index=0, generation=1))))
                self.assertEqual(reply.status, NOT_FOUND)
            self.assertEqual(set(os.listdir(first.folder)) - {"opd.sock", "log", "stderr", "opd.yaml"}, set())

    def test_of_daemons_that_start_at_once_on_a_stale_socket_one_serves(self):
        """Hardening: operations-sigkill"""
        for _ in range(harness.LONG and 30 or 2):
            stale = self.start()
            stale.signal(signal.SIGKILL)
            stale.wait()
            daemons = [self.start(folder=stale.folder, wait=False) for _ in range(4)]
            wait_until(lambda: sum(daemon.process.poll() is not None for daemon in daemons) == 3, "three of four give up")
            codes = [daemon.process.poll() for daemon in daemons]
            self.assertEqual(sorted(codes, key=str), [3, 3, 3, None])
            check_healthy(self, daemons[codes.index(None)])


class Cores(Case):
    def soft_and_hard(self, daemon):
        with open("/proc/%d/limits" % daemon.process.pid) as file:
            return re.search(r"Max core file size\s+(\S+)\s+(\S+)", file.read()).groups()

    def test_there_are_none_unless_they_are_asked_for(self):
        daemon = self.start(config="core: true")
        soft, hard = self.soft_and_hard(daemon)
        self.assertEqual(soft, hard)
        daemon.write_config("core: false")
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("configuration reloaded")
        wait_until(lambda: self.soft_and_hard(daemon) == ("0", hard), "the limit is changed behind the log line")
        self.assertEqual(self.soft_and_hard(self.start())[0], "0")

    def test_tensors_are_in_none(self):
        daemon = self.start(config="core: true")
        with Client(daemon.address) as client:
            request = run("relu", inline([1 << 21], f32(1), strides=[0]))
            request.run.outputs.add(keep=True, no_copy=True)
            client.ask(request)
            with open("/proc/%d/smaps" % daemon.process.pid) as file:
                mappings = re.findall(r"^Size:\s+(\d+) kB$.*?^VmFlags: ([^\n]*)$", file.read(), re.M | re.S)
        self.assertTrue([flags for size, flags in mappings if int(size) >= 8192 and "dd" in flags.split()], "no large mapping is left out of cores")


@unittest.skipIf(SANITIZED or not JUMPS, "a sanitizer wants to be the first library")
class Clock(Case):
    def test_a_wall_clock_that_jumps_by_years_ends_nothing_and_hastens_nothing(self):
        daemon = self.start(environment={"LD_PRELOAD": JUMPS}, config="limits: {handshake: 60s, stall: 60s, drain: 60s}\n")
        half_open = Client(daemon.address, hello=False)
        self.addCleanup(half_open.close)
        half_open.send(b"O")
        with Client(daemon.address) as client, Client(daemon.address) as other:
            half_sent = frame(REQUEST, 1, run("relu", tensor([4])).SerializeToString(), bytes(16))
            other.send(half_sent[:-1])
            reply, _ = client.call(run("relu", inline([1], f32(1)), run_timeout_us=60 * 10**6))
            self.assertEqual(reply.status, OK)
            long_ago = client.info().uptime_us
            wait_until(lambda: client.info().uptime_us > long_ago + 2200000, "two ticks")
            self.assertLess(client.info().uptime_us, 10**12)
            other.send(half_sent[-1:])
            self.assertEqual(other.read_reply()[1].status, OK)
            late = run("matmul", tensor([2048, 2048]), tensor([2048, 2048]), run_priority=["native"], run_timeout_us=1)
            self.assertEqual(client.call(late, bytes(4 * 2048 * 2048))[0].status, DEADLINE_EXCEEDED)
        half_open.send(frame(HELLO, envelope=hello_envelope())[1:])
        self.assertEqual(half_open.read_frame()[0], harness.HELLO_REPLY)
        daemon.signal(signal.SIGTERM)
        self.assertEqual(daemon.wait(), 0)
        years = {line[:4] for line in daemon.log_text().splitlines()}
        self.assertGreater(len(years), 1, "the clock didn't jump")


class LogLines(Case):
    def count(self, daemon, *words):
        return sum(all(word in line for word in words) for line in daemon.log_text().splitlines())

    def test_clients_cannot_fill_the_log(self):
        """Hardening: operations-disk"""
        daemon = self.start(config="log: {lines: 5}")
        for _ in range(40):
            with Client(daemon.address, hello=False) as client:
                client.send(frame(HELLO, envelope=b"\xff"))
                client.expect_end()
            with Client(daemon.address) as client:
                client.send(b"garbage" * 8)
                client.expect_end()
        for words in ("session refused", "session opened", "session closed", "protocol error"):
            self.assertLessEqual(self.count(daemon, words), 10, "two minutes' worth: the window may turn in between")

    def test_what_ends_without_a_reply_is_always_in_the_log(self):
        """Hardening: promise-one-reply"""
        daemon = self.start("--threads", "1", config="log: {lines: 1}")
        for _ in range(8):
            with Client(daemon.address) as client:
                slow(client, 64)
                slow(client, 512)
                client.sock.shutdown(1)
        with Client(daemon.address) as other:
            wait_until(lambda: other.info().sessions == 1)
        unanswered = [line for line in daemon.log_text().splitlines() if "session closed" in line and not line.rstrip().endswith("in_flight=0")]
        self.assertGreaterEqual(len(unanswered), 1, daemon.log_text())


if __name__ == "__main__":
    unittest.main(verbosity=2)
