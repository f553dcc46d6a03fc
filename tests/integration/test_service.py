#!/usr/bin/python3
"""opd under a service manager: what it says of itself, sockets that are open before it is, the unit that comes with it.

OPD_MODULES names the test module.
"""
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import unittest

import harness
from harness import OK, PATIENCE, Client, Daemon, check_healthy, f32, inline, pb, run

HANGS = 102  # elements of a silu at which faulty's predicate, which the I/O loop asks, hangs until the gate opens
SERVER = os.path.join(harness.ROOT, "server")
# Becomes the daemon, as a service manager's child does: the variables name its own pid, the sockets lie from descriptor 3 on.
BECOME = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",") if fd]
copies = [os.dup(fd) for fd in fds]
for number, fd in enumerate(copies):
    os.dup2(fd, 3 + number)
    os.set_inheritable(3 + number, True)
for fd in set(fds + copies) - set(range(3, 3 + len(fds))):
    os.close(fd)
for name in ("LISTEN_PID", "WATCHDOG_PID"):
    os.environ[name] = str(os.getpid() + int(os.environ.get("OPD_TEST_OTHER", "0")))
os.environ["LISTEN_FDS"] = str(len(fds))
os.execv(sys.argv[2], sys.argv[2:])
"""


def wrapper(*sockets):
    return [sys.executable, "-c", BECOME, ",".join(str(sock.fileno()) for sock in sockets)]


class Service(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="opd-test-")
        self.addCleanup(shutil.rmtree, self.folder, True)
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(self.manager.close)
        self.manager.bind(os.path.join(self.folder, "notify"))
        self.manager.settimeout(PATIENCE)

    def start(self, *flags, sockets=(), environment=None, **options):
        environment = dict({"NOTIFY_SOCKET": os.path.join(self.folder, "notify")}, **(environment or {}))
        daemon = Daemon(*flags, environment=environment, wrapper=wrapper(*sockets), pass_fds=[sock.fileno() for sock in sockets], folder=self.folder, **options)
        self.addCleanup(daemon.stop, None)
        return daemon

    def said(self):
        """The next message's first line, and all of it as a dictionary."""
        fields = dict(line.split("=", 1) for line in self.manager.recv(4096).decode().split("\n"))
        return "%s=%s" % next(iter(fields.items())), fields

    def listener(self, family=socket.AF_UNIX, kind=socket.SOCK_STREAM, listen=True):
        sock = socket.socket(family, kind)
        self.addCleanup(sock.close)
        sock.bind(os.path.join(self.folder, "opd.sock") if family == socket.AF_UNIX else ("127.0.0.1", 0))
        if listen:
            sock.listen(16)
        return sock


class Messages(Service):
    def test_it_says_when_it_is_ready_reloads_and_stops(self):
        daemon = self.start(config="limits: {stall: 50s}")
        self.assertEqual(self.said()[0], "READY=1")
        daemon.signal(signal.SIGHUP)
        said, fields = self.said()
        self.assertEqual(said, "RELOADING=1")
        self.assertGreater(int(fields["MONOTONIC_USEC"]), 0)
        self.assertEqual(self.said()[0], "READY=1")
        daemon.write_config("limits: {stall: never}")
        daemon.signal(signal.SIGHUP)
        self.assertEqual([self.said()[0], self.said()[0]], ["RELOADING=1", "READY=1"])
        daemon.wait_log("error", "not reloaded")
        daemon.signal(signal.SIGTERM)
        self.assertEqual(self.said()[0], "STOPPING=1")
        self.assertEqual(daemon.wait(), 0)

    def test_ready_means_that_clients_are_served(self):
        daemon = self.start(wait=False)
        self.assertEqual(self.said()[0], "READY=1")
        check_healthy(self, daemon)

    def test_a_drain_that_a_client_asked_for_is_told_too(self):
        daemon = self.start()
        self.assertEqual(self.said()[0], "READY=1")
        with Client(daemon.address) as client:
            client.ask(harness.pb.Request(drain=harness.pb.Drain()))
        self.assertEqual(self.said()[0], "STOPPING=1")
        self.assertEqual(daemon.wait(), 0)

    def test_the_watchdog_hears_of_a_loop_that_turns(self):
        self.start(environment={"WATCHDOG_USEC": "100000"})
        self.assertEqual([self.said()[0] for _ in range(5)], ["READY=1"] + ["WATCHDOG=1"] * 4)

    def test_the_watchdog_hears_nothing_while_one_of_several_loops_hangs(self):
        gate = os.path.join(self.folder, "gate")
        daemon = self.start("--loops", "2", config="modules: [{name: faulty, path: %s}]\n" % harness.built_module("faulty"), wait=False,
                            environment={"WATCHDOG_USEC": "100000", "FAULTY_GATE": gate})
        self.assertEqual(self.said()[0], "READY=1")
        first, other = Client(daemon.address), Client(daemon.address)  # the daemon's first ones: of loop 0 and of loop 1
        self.addCleanup(first.close)
        self.addCleanup(other.close)
        self.assertEqual([self.said()[0] for _ in range(2)], ["WATCHDOG=1"] * 2)
        other.submit(run("silu", inline([HANGS], f32(*[1.0] * HANGS)), run_priority=["faulty"]))
        self.manager.settimeout(1)
        with self.assertRaises(socket.timeout):  # beats of before, then none
            for _ in range(200):
                self.assertEqual(self.said()[0], "WATCHDOG=1")
        first.ping()  # the loop that the signal thread asks turns
        self.manager.settimeout(PATIENCE)
        open(gate, "w").close()
        self.assertEqual(other.read_reply()[1].status, OK)
        self.assertEqual([self.said()[0] for _ in range(2)], ["WATCHDOG=1"] * 2)

    def test_nobody_is_told_where_nobody_listens(self):
        for path in ("", "relative", "/nowhere/at/all", "@opd-test-nobody", "/" + "x" * 200):
            daemon = self.start(environment={"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "10000"})
            check_healthy(self, daemon)
            daemon.stop()


class Sockets(Service):
    def test_a_passed_socket_serves_and_outlives_the_daemon(self):
        """Hardening: operations-sigterm"""
        sock = self.listener()
        first = self.start(sockets=[sock], listen=[])
        check_healthy(self, first)
        first.stop()
        self.assertTrue(os.path.exists(first.path))
        waiting = Client("unix:" + first.path, hello=False)  # connects: the service manager's socket takes it, and nobody is there yet
        self.addCleanup(waiting.close)
        waiting.send(harness.frame(harness.HELLO, envelope=harness.hello_envelope()))
        second = self.start(sockets=[sock])
        self.assertEqual(waiting.read_frame()[0], harness.HELLO_REPLY)
        check_healthy(self, second)
        second.stop()
        self.assertTrue(os.path.exists(first.path))

    def test_what_a_connection_may_do_depends_on_the_socket_not_on_who_opened_it(self):
        unix, tcp = self.listener(), self.listener(socket.AF_INET)
        daemon = self.start(sockets=[unix, tcp], listen=[])
        with Client(daemon.address) as client:
            self.assertEqual(client.hello.tenant, "uid:%d" % os.getuid())
            self.assertTrue(client.hello.admin)
        self.assertEqual(daemon.tcp_addresses(), ["tcp://127.0.0.1:%d" % tcp.getsockname()[1]])
        with Client(daemon.tcp_addresses()[0]) as client:
            self.assertFalse(client.hello.admin)

    def refused(self, words, *flags, **options):
        daemon = self.start(*flags, wait=False, **options)
        self.assertEqual(daemon.wait(), 2)
        self.assertIn(words, daemon.err_text())

    def test_a_passed_socket_that_listen_does_not_name_is_refused(self):
        sock = self.listener(socket.AF_INET)
        self.refused("listen: tcp://127.0.0.1:%d isn't there" % sock.getsockname()[1], sockets=[sock])

    def test_what_is_no_socket_that_listens_is_refused(self):
        self.refused("descriptor 3, passed by the service manager, is no stream socket that listens", sockets=[self.listener(listen=False)])
        os.unlink(os.path.join(self.folder, "opd.sock"))
        datagrams = self.listener(socket.AF_INET, socket.SOCK_DGRAM, listen=False)
        self.refused("is no stream socket that listens", sockets=[datagrams])
        with open(os.devnull) as file:
            self.refused("Socket operation on non-socket", sockets=[file])
        abstract = socket.socket(socket.AF_UNIX)
        self.addCleanup(abstract.close)
        abstract.bind("\0opd-test-%d" % os.getpid())
        abstract.listen()
        self.refused("without an absolute path", sockets=[abstract])

    def test_descriptors_meant_for_another_process_are_left_alone(self):
        sock = self.listener(socket.AF_INET)
        daemon = self.start(sockets=[sock], environment={"OPD_TEST_OTHER": "1"})
        self.assertEqual(daemon.tcp_addresses(), [])


class Unit(unittest.TestCase):
    def test_the_example_configuration_is_good(self):
        done = subprocess.run([harness.OPD, "--config", os.path.join(SERVER, "opd.yaml"), "--check-config"], capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("listen: unix:/run/opd/opd.sock", done.stdout)

    def test_unit_and_socket_name_the_configurations_socket(self):
        with open(os.path.join(SERVER, "opd.socket")) as file:
            self.assertIn("ListenStream=/run/opd/opd.sock\n", file.read())
        with open(os.path.join(SERVER, "opd.service.in")) as file:
            unit = file.read()
        flags = re.search(r"^ExecStart=@CMAKE_INSTALL_FULL_BINDIR@/opd (.*)$", unit, re.M).group(1)
        self.assertEqual(flags, "--config /etc/opd/opd.yaml")
        stop = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.M).group(1))
        self.assertGreater(stop, 30, "limits.drain is 30 s")

    @unittest.skipUnless(shutil.which("systemd-analyze"), "no systemd-analyze here")
    def test_systemd_understands_every_line(self):
        folder = tempfile.mkdtemp(prefix="opd-test-")
        self.addCleanup(shutil.rmtree, folder, True)
        with open(os.path.join(SERVER, "opd.service.in")) as file:
            unit = file.read().replace("@CMAKE_INSTALL_FULL_BINDIR@", os.path.dirname(os.path.abspath(harness.OPD)))
        with open(os.path.join(folder, "opd.service"), "w") as file:
            file.write(unit)
        shutil.copy(os.path.join(SERVER, "opd.socket"), folder)
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", *(os.path.join(folder, name) for name in ("opd.service", "opd.socket"))],
                              capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual([line for line in done.stderr.splitlines() if "/opd." in line or "opd.service" in line or "opd.socket" in line], [])


if __name__ == "__main__":
    unittest.main(verbosity=2)
