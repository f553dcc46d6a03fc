#!/usr/bin/python3
"""opctl top against a real daemon: what it counts, on a terminal and elsewhere, and how it ends.

OPD_BIN names the daemon; opctl lies beside it.
"""
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
import unittest

from harness import OK, OPD, PATIENCE, Client, Daemon, DaemonCase, f32, inline, run

OPCTL = os.path.join(os.path.dirname(OPD), "opctl")
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


class Terminal:
    """opctl top on a terminal of so many rows and columns."""

    def __init__(self, address, rows, columns, *words):
        self.master, self.slave = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen([OPCTL, "--connect", address, "top", *words], stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True)
        self.text = ""

    def resize(self, rows, columns):
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, keys):
        os.write(self.master, keys.encode())

    def until(self, pattern):
        """Reads on to what matches, and forgets what was before its end."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = re.search(pattern, self.text, re.DOTALL)
            if found:
                self.text = self.text[found.end():]
                return found
            if not select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError("%r never came: %r" % (pattern, self.text[-3000:]))
            self.text += os.read(self.master, 65536).decode()

    def frame(self):
        """The lines of the next whole picture."""
        return self.until("\x1b\\[H(.*?)\x1b\\[J")[1].replace("\x1b[2K", "").split("\r\n")

    def ended(self):
        """How it ended, and what it said after it had given the terminal back."""
        code = self.process.wait(timeout=PATIENCE)
        said = self.until(re.escape(LEAVE) + "(.*)$")[1] if LEAVE in self.text or select.select([self.master], [], [], PATIENCE)[0] else None
        return code, said, termios.tcgetattr(self.slave) == self.before

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


class Top(DaemonCase):
    """Two lanes: one for anonymous alone, who comes by TCP."""
    config = "threads: 1\ninline: 0\nlanes: {fast: {threads: 1}}\ntenants: {anonymous: {lane: fast}}\n"
    flags = ("--listen", "tcp://127.0.0.1:0")

    def terminal(self, rows, columns, *words, address=None):
        terminal = Terminal(address or self.address, rows, columns, *words)
        self.addCleanup(terminal.close)
        return terminal

    def popen(self, *words, **more):
        process = subprocess.Popen([OPCTL, "--connect", self.address, "top", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def work(self, client):
        self.assertEqual(client.call(run("gelu", inline([64], f32(*[1] * 64))))[0].status, OK)

    def test_a_share_is_of_what_all_lanes_did(self):
        for client, lane in ((self.client(), "cpu"), (Client(self.daemon.tcp_addresses()[0]), "fast")):
            self.addCleanup(client.close)
            top = self.popen("--json", "--duration", "0.02")
            json.loads(top.stdout.readline())  # it has looked before the work begins
            self.work(client)
            used = set()
            while True:
                picture = json.loads(top.stdout.readline())
                used |= {each["lane"] for each in picture["lanes"] if each["use"] > 0}  # a job may end between a picture's sessions and its lanes
                mine, = [line for line in picture["sessions"] if line["session"] == client.hello.session]
                if mine["jobs_per_second"] > 0:
                    break
                self.assertEqual(mine["share"], 0)
            self.assertGreater(mine["share"], 0.5)
            self.assertLessEqual(sum(line["share"] for line in picture["sessions"]), 1.0001)
            self.assertEqual(used, {lane})

    def test_elsewhere_pictures_follow_each_other_as_text(self):
        self.client()
        done = subprocess.run([OPCTL, "--connect", self.address, "top", "-c", "2", "--duration", "0.01", "--sort", "id"], capture_output=True, text=True, check=True)
        self.assertEqual(done.stderr, "")
        self.assertNotIn("\x1b", done.stdout)
        self.assertEqual((done.stdout.count("lane cpu:"), done.stdout.count("lane fast:"), done.stdout.count(", by id\n")), (2, 2, 2))
        first = done.stdout.split("\n\n")[0]
        numbers = [int(number) for number in re.findall(r"(?m)^ +(\d+)  uid", first)]
        self.assertEqual(numbers, sorted(numbers))
        self.assertGreaterEqual(len(numbers), 2)

    def test_who_has_seen_enough_ends_it_without_a_word(self):
        for ignored in (False, True):
            top = self.popen("--duration", "0.01", restore_signals=not ignored, preexec_fn=(lambda: signal.signal(signal.SIGPIPE, signal.SIG_IGN)) if ignored else None)
            self.assertIn("opd up", top.stdout.readline())
            top.stdout.close()
            self.assertEqual(top.wait(timeout=PATIENCE), 0 if ignored else -signal.SIGPIPE)
            self.assertEqual(top.stderr.read(), "")

    def test_what_makes_no_sense_is_named(self):
        for words, pattern in ((["--sort", "size"], "--sort is 'size', expected share, jobs, wait, queued, memory or id"), (["-c", "-1"], "-c|count"), (["now"], "expected top")):
            done = subprocess.run([OPCTL, "--connect", self.address, "top", *words], capture_output=True, text=True)
            self.assertEqual(done.returncode, 2)
            self.assertRegex(done.stderr, pattern)

    def test_a_terminal_is_filled_and_no_more_and_given_back(self):
        clients = [self.client() for _ in range(12)]
        top = self.terminal(10, 60, "--duration", "60")
        top.until(re.escape(ENTER))
        frame = top.frame()
        self.assertLessEqual(len(frame), 10)
        self.assertLessEqual(max(map(len, frame)), 60)
        self.assertRegex(frame[-1], r"^1 to 5 of 1[34]$")
        top.type("\x1b[B")
        self.assertRegex(top.frame()[-1], "^2 to 6 of")
        top.type("\x1b[6~")
        self.assertRegex(top.frame()[-1], "^8 to 12 of")
        top.type("i")
        self.assertIn("by id", top.frame()[0])
        top.type("r")
        frame = top.frame()
        self.assertIn("by id, reversed", frame[0])
        shown = [int(line.split()[0]) for line in frame[4:9]]
        self.assertEqual(shown, sorted(shown, reverse=True))
        top.resize(40, 132)
        top.process.send_signal(signal.SIGWINCH)  # the kernel sends it where the terminal is a session's own
        frame = top.frame()
        self.assertTrue({client.hello.session for client in clients} <= {int(line.split()[0]) for line in frame[4:] if line})
        self.assertIn("q: quit", frame[0])
        top.type("q")
        self.assertEqual(top.ended(), (0, "", True))

    def test_an_interrupt_gives_the_terminal_back_too(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            top = self.terminal(24, 80, "--duration", "60")
            top.frame()
            top.process.send_signal(number)
            self.assertEqual(top.ended(), (0, "", True))

    def test_a_daemon_that_ends_is_told_of_on_the_users_own_screen(self):
        daemon = Daemon()
        top = self.terminal(24, 80, "--duration", "0.05", address=daemon.address)
        top.frame()
        daemon.stop()
        code, said, restored = top.ended()
        self.assertEqual((code, restored), (3, True))
        self.assertRegex(said, "^opctl: UNAVAILABLE: ")


if __name__ == "__main__":
    unittest.main(verbosity=2)
