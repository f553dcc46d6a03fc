#!/usr/bin/env python3
"""TLS: what HARDENING.md says of the front door, against the real daemon. Python's ssl and the openssl program are the foreign peers; opctl, libopd and opd.py our own."""
import contextlib
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import certificates
import harness
from harness import Client, Closed, Daemon, Failed, check_healthy, frame, hello_envelope, pb, rms_norm, unpack_f32, wait_until
from test_service import wrapper

OPCTL = os.environ.get("OPCTL_BIN", os.path.join(os.path.dirname(harness.OPD), "opctl"))
_folder = None
ca = foreign = None


def setUpModule():
    global _folder, ca, foreign
    _folder = tempfile.mkdtemp(prefix="opd-tls-")
    ca, foreign = certificates.Authority(_folder), certificates.Authority(_folder, "foreign")
    ca.server()


def tearDownModule():
    shutil.rmtree(_folder, ignore_errors=True)


def path(name):
    return os.path.join(_folder, name)


def context(verify=True, protocols=("opd/1",), cert=None, authority=None):
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if verify:
        made.load_verify_locations((authority or ca).ca)
    else:
        made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    if protocols:
        made.set_alpn_protocols(list(protocols))
    if cert:
        made.load_cert_chain(*cert)
    return made


def copy_pair(pair, name):
    """The files that a daemon is told of, so that a reload finds others in their place."""
    for source, end in zip(pair, (".pem", ".key")):
        shutil.copy(source, path(name + end + ".new"))
        os.chmod(path(name + end + ".new"), 0o600)
        os.rename(path(name + end + ".new"), path(name + end))
    return path(name + ".pem"), path(name + ".key")


def server_flags(certificate=None, key=None):
    return ("--listen", "tls://127.0.0.1:0", "--tls-certificate", certificate or path("server.pem"), "--tls-key", key or path("server.key"))


def opctl(*words):
    done = subprocess.run([OPCTL, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=harness.PATIENCE, check=False, env=dict(os.environ, OPD_ADDRESS=""))
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def client_hello(made=None):
    """The bytes of a good ClientHello."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    half = (made or context()).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        half.do_handshake()
    return outgoing.read()


class Case(unittest.TestCase):
    flags = ()
    config = None

    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon(*server_flags(), *cls.flags, config=cls.config)
        cls.address = cls.daemon.tls_address()

    @classmethod
    def tearDownClass(cls):
        cls.daemon.stop()

    def tearDown(self):
        check_healthy(self, self.daemon)

    def client(self, *, tls=None, **fields):
        made = Client(self.address, tls=tls or context(), **fields)
        self.addCleanup(made.close)
        return made

    def raw(self):
        made = harness.connect(self.address)
        self.addCleanup(made.close)
        return made

    def check_ends(self, sock):
        """The daemon closes; what it says before is returned."""
        said = b""
        with contextlib.suppress(ConnectionError):
            while True:
                got = sock.recv(65536)
                if not got:
                    break
                said += got
        return said

    def check_served(self, client):
        request, payload, wanted = rms_norm()
        _, data = client.ask(request, payload)
        for got, want in zip(unpack_f32(data), wanted):
            self.assertAlmostEqual(got, want, places=5)


class Traffic(Case):
    def test_small_and_large_results_are_those_of_the_unix_socket(self):
        request, payload, _ = rms_norm(1024, 1024)
        small = rms_norm()
        with Client(self.daemon.address) as plain:
            wanted = plain.ask(request, payload)[1]
        for fields in ({}, {"no_chunks": True}):
            client = self.client(**fields)
            self.check_served(client)
            for _ in range(3):
                self.assertEqual(client.ask(request, payload)[1], wanted) if fields else self.assertEqual(self.chunked(client, request, payload), wanted)
            self.assertEqual(len(client.ask(small[0], small[1])[1]), 32)
            client.close()

    def chunked(self, client, request, payload):
        request_id = client.next_id
        client.next_id += 1
        client.send(frame(harness.REQUEST, request_id, request.SerializeToString(), b"", harness.CHUNKED, payload_bytes=len(payload)))
        for at in range(0, len(payload), 1 << 20):
            client.send(frame(harness.DATA, request_id, struct.pack("<Q", at), payload[at : at + (1 << 20)]))
        return client.read_reply(request_id)[2]

    def test_a_frame_in_records_of_one_byte(self):
        client = self.client(hello=False)
        for byte in frame(harness.HELLO, envelope=hello_envelope()):
            client.send(bytes([byte]))
        self.assertEqual(client.read_frame()[0], harness.HELLO_REPLY)
        self.check_served(client)

    def test_many_requests_in_flight(self):
        client = self.client()
        request, payload, wanted = rms_norm()
        ids = [client.submit(request, payload) for _ in range(200)]
        for request_id in ids:
            data = client.read_reply(request_id)[2]
            self.assertAlmostEqual(unpack_f32(data)[0], wanted[0], places=5)

    def test_a_client_that_reads_nothing_holds_up_nobody(self):
        sleeper = self.client(no_chunks=True)
        request, payload, _ = rms_norm(1024, 1024)
        for _ in range(8):
            sleeper.submit(request, payload)
        for _ in range(20):
            with Client(self.address, tls=context()) as other:
                self.check_served(other)
        self.assertEqual(len(sleeper.read_reply()[2]), 1 << 22)

    def test_the_second_handshake_resumes_the_first_session(self):
        made = context()
        first = self.client(tls=made)
        first.ping()  # behind the ticket
        session = first.sock.session
        self.assertTrue(session.has_ticket)
        with socket.create_connection(first.sock.getpeername()) as plain, made.wrap_socket(plain, server_hostname="localhost", session=session) as again:
            self.assertTrue(again.session_reused)

    def test_a_key_update_that_the_client_asks_for_is_answered(self):
        host = self.address[6:]
        command = ["openssl", "s_client", "-connect", host, "-alpn", "opd/1", "-CAfile", ca.ca, "-verify_return_error", "-verify_hostname", "localhost"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as peer:
            said = b""
            for step in (frame(harness.HELLO, envelope=hello_envelope()), b"K\n", frame(harness.REQUEST, 1, pb.Request(ping=pb.Empty()).SerializeToString())):
                peer.stdin.write(step)
                peer.stdin.flush()
                wanted = 1 + said.count(b"OPD1") if step[:1] == b"O" else 0
                while said.count(b"OPD1") < wanted or (step[:1] == b"K" and b"KEYUPDATE" not in said):
                    got = os.read(peer.stdout.fileno(), 4096)
                    self.assertTrue(got, said)
                    said += got
            peer.kill()

    def test_goodbye_is_said_before_the_end(self):
        client = self.client()
        client.send(frame(harness.HELLO, envelope=hello_envelope()))  # a second Hello
        self.assertEqual(client.expect_end()[0], harness.INVALID_ARGUMENT)  # an SSLEOFError if there were no close_notify


class InFlight(Case):
    """What a session may have in flight is what it has, however much came in one read: on every transport."""

    config = "threads: 1\ninline: 0\nlimits: {in_flight: 4}\n"
    flags = ("--listen", "tcp://127.0.0.1:0")

    def setUp(self):
        self.watch = Client(self.daemon.address)
        self.addCleanup(self.watch.close)

    def states(self):
        listed = self.watch.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions
        return {state.session: state for state in listed.sessions}, listed.lanes[0]

    def occupy(self):
        """The lane's thread is in a kernel that ends when it is cancelled."""
        holder = Client(self.daemon.address, features=["cancel"])
        self.addCleanup(holder.close)
        left, right = (harness.tensor(shape, size=4, strides=[0, 0]) for shape in ([4096, 1 << 16], [1 << 16, 4096]))
        request = harness.run("matmul", left, right, run_priority=["native"])
        request.run.outputs.add(no_copy=True)
        number = holder.submit(request, harness.f32(1))
        wait_until(lambda: self.states()[1].running == 1, "the thread has the kernel")
        return lambda: holder.send(frame(harness.CANCEL, number))

    def check_exact(self, flood):
        release = self.occupy()
        relu = harness.run("relu", harness.inline([2], harness.f32(-1, 2)), run_priority=["native"], run_inline_results=True).SerializeToString()
        before = self.watch.info().requests
        flood.send(b"".join(frame(harness.REQUEST, 100 + i, relu) for i in range(150)))
        wait_until(lambda: self.states()[0][flood.hello.session].in_flight >= 4, "as many as may be are in flight")
        state = self.states()[0][flood.hello.session]
        self.assertEqual((state.in_flight, state.queued), (4, 4))
        release()
        for i in range(150):
            request_id, reply, _ = flood.read_reply(100 + i)
            self.assertEqual((request_id, unpack_f32(reply.run.outputs[0].tensor.inline)), (100 + i, (0, 2)))
        self.assertGreater(self.watch.info().requests, before + 150)
        flood.next_id = 300
        self.check_served(flood)

    def test_over_tls(self):
        self.check_exact(self.client())

    def test_over_tcp(self):
        with Client(self.daemon.tcp_addresses()[0]) as flood:
            self.check_exact(flood)

    def test_over_a_unix_socket(self):
        with Client(self.daemon.address) as flood:
            self.check_exact(flood)

    def test_a_client_that_leaves_with_more_than_it_may_have_takes_nothing_along(self):
        release = self.occupy()
        relu = harness.run("relu", harness.inline([2], harness.f32(-1, 2)), run_priority=["native"]).SerializeToString()
        flood = self.client()
        flood.send(b"".join(frame(harness.REQUEST, 100 + i, relu) for i in range(50)))
        wait_until(lambda: self.states()[0][flood.hello.session].in_flight == 4, "as many as may be are in flight")
        flood.sock.close()
        release()
        wait_until(lambda: self.watch.info().memory_bytes == 0 and len(self.states()[0]) == 2, "nothing is left of it")


class Counted(Case):
    def counts(self):
        items = self.client().ask(pb.Request(get_stats=pb.GetStats()))[0].stats.items
        found = {item.name: int(item.value) for item in items}
        return found["opd_tls_handshakes_total"], found["opd_tls_resumed_total"]

    def test_handshakes_are_counted_and_those_of_them_that_a_ticket_has_shortened(self):
        done, resumed = self.counts()  # its own is one of them
        made = context()
        first = self.client(tls=made)
        first.ping()  # behind the ticket
        self.assertEqual(self.counts(), (done + 2, resumed))
        with socket.create_connection(first.sock.getpeername()) as plain, made.wrap_socket(plain, server_hostname="localhost", session=first.sock.session) as again:
            self.assertTrue(again.session_reused)
            wait_until(lambda: self.counts()[1] == resumed + 1, "the handshake that was resumed")
        with self.raw() as other:  # none of these is a handshake that was finished
            other.sendall(client_hello())
        with self.raw() as other:
            other.sendall(b"x" * 100)
        before = self.counts()
        self.assertEqual(self.counts(), (before[0] + 1, resumed + 1))


class FrontDoor(Case):
    """Each ends the connection with a reason in the log, and the next client is served (tearDown)."""

    def refused(self, made, reason):
        with self.assertRaises((ssl.SSLError, ConnectionError)) as caught:
            with made.wrap_socket(self.raw(), server_hostname="localhost") as sock:
                sock.recv(1)
        self.daemon.wait_log("handshake failed")
        return str(caught.exception) if reason is None else self.assertRegex(str(caught.exception), reason)

    def test_another_version(self):
        made = context()
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        self.refused(made, "(?i)protocol.version|reset")

    def test_another_protocol_and_none(self):
        for protocols in (["h2", "http/1.1"], []):
            self.refused(context(protocols=protocols), "(?i)no.application.protocol|reset")

    def test_garbage(self):
        for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\x00\x05hello", b"\x80\x2e\x01\x00\x02" + bytes(64), os.urandom(600)):
            sock = self.raw()
            sock.sendall(data)
            said = self.check_ends(sock)
            self.assertNotIn(b"OPD1", said)

    def test_a_plain_client_is_told_to_use_tls(self):
        """Hardening: framing-plain-to-tls"""
        sock = self.raw()
        sock.sendall(frame(harness.HELLO, envelope=hello_envelope()))
        said = self.check_ends(sock)
        reply = pb.HelloReply.FromString(said[32:])
        self.assertEqual(reply.status, harness.FAILED_PRECONDITION)
        self.assertIn("tls://", reply.message)

    def test_tls_to_the_plain_port(self):
        """Hardening: framing-tls-to-plain"""
        daemon = Daemon(listen=["unix:" + path("plain.sock"), "tcp://127.0.0.1:0"], wait=False)
        daemon.address = "unix:" + path("plain.sock")
        daemon.wait_ready()
        self.addCleanup(daemon.stop)
        with self.assertRaises((ssl.SSLError, ConnectionError)):
            context().wrap_socket(harness.connect(daemon.tcp_addresses()[0]), server_hostname="localhost")
        check_healthy(self, daemon)

    def test_a_handshake_cut_off_at_every_kind_of_byte(self):
        hello = client_hello()
        for count in (1, 4, 5, 6, 9, 43, len(hello) // 2, len(hello) - 1, len(hello)):
            sock = self.raw()
            sock.sendall(hello[:count])
            if count % 2:  # the socket's end, or a reset
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()

    def test_a_handshake_byte_by_byte(self):
        sock = self.raw()
        for byte in client_hello():
            sock.sendall(bytes([byte]))
        self.assertEqual(sock.recv(1), b"\x16")

    def test_clients_that_vanish_in_their_handshake_leave_nothing(self):
        """Hardening: sessions-storm"""
        before = self.daemon.descriptors()
        hello = client_hello()
        for i in range(100):
            sock = harness.connect(self.address)
            if i % 2:
                sock.sendall(hello)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        wait_until(lambda: self.daemon.descriptors() <= before, "the descriptors come back")

    def test_records_that_are_too_long(self):
        for header in (b"\x16\x03\x03\xff\xff", b"\x16\x03\x03\x48\x01", b"\x17\x03\x03\x40\x00"):
            sock = self.raw()
            with contextlib.suppress(ConnectionError):
                sock.sendall(header + bytes(0x4900))
            self.check_ends(sock)
        client = self.client()
        with contextlib.suppress(OSError):
            os.write(client.sock.fileno(), b"\x17\x03\x03\x41\x20" + bytes(20000))
        self.check_broken(client)

    def check_broken(self, client):
        with self.assertRaises((ssl.SSLError, Closed, ConnectionError)):
            while True:
                client.read_frame()

    def test_more_bytes_than_a_handshake_has(self):
        """Hardening: framing-preauth"""
        sock = self.raw()
        record = b"\x16\x03\x01\x40\x00"
        with contextlib.suppress(ConnectionError):
            sock.sendall(record + b"\x01\x00\xff\xff" + bytes(16380))  # a ClientHello of 64 KiB
            for _ in range(3):
                sock.sendall(record + bytes(16384))
        self.check_ends(sock)
        self.daemon.wait_log("handshake failed")

    def test_a_second_handshake_in_the_session(self):
        client = self.client()
        os.write(client.sock.fileno(), client_hello())
        self.check_broken(client)

    def test_a_record_that_was_changed_on_the_way(self):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        half, sock = context().wrap_bio(incoming, outgoing, server_hostname="localhost"), self.raw()
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                half.do_handshake()
                break
            sock.sendall(outgoing.read())
            incoming.write(sock.recv(65536))
        half.write(frame(harness.HELLO, envelope=hello_envelope()))
        sealed = bytearray(outgoing.read())
        sealed[-1] ^= 1
        sock.sendall(sealed)
        self.assertNotIn(b"OPD1", self.check_ends(sock))
        self.daemon.wait_log("session closed", "bad record mac")


class Strangers(Case):
    flags = ("--loops", "1")  # each has its part of the places
    config = "limits: {handshakes: 4, handshake: 10min}\n"

    def test_the_oldest_connection_without_a_hello_makes_room(self):
        """Hardening: sessions-storm"""
        hello = client_hello()
        half_open = [self.raw() for _ in range(4)]
        for sock in half_open[1:3]:
            sock.sendall(hello)
        for oldest in range(3):  # an honest one comes and goes while the others hold all places: it pushes out the oldest
            self.client().ping()
            self.check_ends(half_open[oldest])
            half_open.append(self.raw())
        half_open[3].sendall(hello)
        self.assertEqual(half_open[3].recv(1), b"\x16")
        self.daemon.wait_log("session closed", "limits.handshakes", count=3)


class Slow(Case):
    config = "limits: {handshake: 1s}\n"  # which a whole one doesn't need, also under a sanitizer

    def test_a_handshake_that_takes_too_long(self):
        socks = []
        for data in (b"", client_hello()[:60], client_hello()):
            socks.append(self.raw())
            socks[-1].sendall(data)
        for sock in socks:
            self.check_ends(sock)
        self.daemon.wait_log("session closed", "no Hello within", count=3)

    def test_a_client_that_says_nothing_after_its_handshake(self):
        client = self.client(hello=False)
        self.assertIsNone(client.expect_end())


class SlowReader(Case):
    """Of a daemon whose sockets hold little: the listening one that is passed to it says how much."""

    @classmethod
    def setUpClass(cls):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            cls.address = "tls://127.0.0.1:%d" % listening.getsockname()[1]
            flags = ("--listen", cls.address, *server_flags()[2:])
            cls.daemon = Daemon(*flags, config="limits: {stall: 1s, in_flight: 256}\n", wrapper=wrapper(listening), pass_fds=[listening.fileno()])

    def test_a_client_that_reads_small_replies_a_few_at_a_time_is_cut_off(self):
        """Every few of its bytes let a batch of replies leave, and yet they aren't 64 KiB within the time."""
        narrow = socket.socket()  # one that says of every few KiB that it was read
        narrow.settimeout(harness.PATIENCE)
        narrow.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.connect(client_address(self.address))
        slow = self.client(sock=narrow)
        request = harness.run("relu", harness.tensor([16], inline=harness.f32(1), strides=[0]))

        def send():  # more than is ever answered
            with contextlib.suppress(OSError):
                while True:
                    slow.submit(request)

        sender = threading.Thread(target=send)
        sender.start()
        with socket.socket(fileno=os.dup(slow.sock.fileno())) as ciphertext:
            ciphertext.settimeout(harness.PATIENCE)
            while "the client doesn't read its replies" not in self.daemon.log_text():
                with contextlib.suppress(OSError):
                    ciphertext.recv(4096)  # what its window holds: less, and the kernels don't tell each other
                time.sleep(0.15)  # how slow it is, not how long the test waits
        sender.join()
        self.client().ping()


class Reload(unittest.TestCase):
    def setUp(self):
        self.first, self.second = ca.server("first"), ca.server("second")
        self.files = copy_pair(self.first, "live")
        self.daemon = Daemon(*server_flags(*self.files), config="limits: {kept: 7}\n")
        self.addCleanup(self.daemon.stop)
        self.address = self.daemon.tls_address()

    def served_by(self):
        with Client(self.address, tls=context()) as client:
            return dict(pair[0] for pair in client.sock.getpeercert()["subject"])["commonName"]

    def reload(self, event, count=1):
        self.daemon.signal(signal.SIGHUP)
        self.daemon.wait_log(event, count=count)

    def test_a_new_certificate_serves_new_sessions_and_the_old_ones_go_on(self):
        with Client(self.address, tls=context()) as old:
            self.assertEqual(self.served_by(), "first")
            copy_pair(self.second, "live")
            self.reload("configuration reloaded")
            self.assertEqual(self.served_by(), "second")
            old.ping()
        check_healthy(self, self.daemon)

    def test_a_key_of_another_certificate_changes_nothing(self):
        """Hardening: operations-certificate"""
        copy_pair((self.first[0], self.second[1]), "live")
        self.reload("configuration not reloaded")
        self.assertIn("is not that of the certificate", self.daemon.wait_log("not reloaded"))
        copy_pair(self.first, "live")
        self.reload("configuration reloaded")
        os.chmod(self.files[1], 0o644)
        self.reload("configuration not reloaded", count=2)
        self.assertIn("0644", self.daemon.wait_log("not reloaded", count=2))
        os.unlink(self.files[0])
        self.reload("configuration not reloaded", count=3)
        self.assertEqual(self.served_by(), "first")
        check_healthy(self, self.daemon)

    def test_tickets_of_the_old_certificate_are_worth_a_full_handshake(self):
        made = context()
        with Client(self.address, tls=made) as client:
            client.ping()
            session = client.sock.session
        self.reload("configuration reloaded")
        with socket.create_connection(client_address(self.address)) as plain, made.wrap_socket(plain, server_hostname="localhost", session=session) as again:
            self.assertFalse(again.session_reused)

    def test_reloads_under_load_lose_no_request(self):
        stop, failures, done = threading.Event(), [], [0, 0]

        def work(index):
            try:
                with Client(self.address, tls=context()) as client:
                    while not stop.is_set():
                        client.ping()
                        with Client(self.address, tls=context()) as fresh:
                            fresh.ping()
                        done[index] += 1
            except Exception as error:  # any failure is the test's
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for i in range(10):
            copy_pair((self.first, self.second)[i % 2], "live")
            self.reload("configuration reloaded", count=i + 1)
        wait_until(lambda: all(done) or failures, "both have gone round")
        stop.set()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])
        check_healthy(self, self.daemon)


def client_address(address):
    host, _, port = address[6:].rpartition(":")
    return host, int(port)


class ClientCertificates(unittest.TestCase):
    def start(self, mode):
        daemon = Daemon(*server_flags(), "--tls-client-ca", ca.ca, *(["--tls-client-certificates", mode] if mode else []))
        self.addCleanup(daemon.stop)
        return daemon, daemon.tls_address()

    def refused(self, address, cert):
        """In TLS 1.3 a client learns of it when it reads."""
        with self.assertRaises((ssl.SSLError, Closed, ConnectionError)):
            Client(address, tls=context(cert=cert)).close()

    def test_required_is_the_default_and_takes_only_its_own(self):
        daemon, address = self.start(None)
        with Client(address, tls=context(cert=ca.client("alice"))) as client:
            client.ping()
        for cert in (None, foreign.client("mallory"), ca.client("late", days="-1"), ca.server("no-client")):
            self.refused(address, cert)
        daemon.wait_log("handshake failed", count=4)
        check_healthy(self, daemon)

    def test_optional_serves_who_has_none_and_refuses_a_wrong_one(self):
        daemon, address = self.start("optional")
        with Client(address, tls=context()) as client:
            client.ping()
        self.refused(address, foreign.client("mallory"))
        check_healthy(self, daemon)

    def test_off_asks_for_none(self):
        _, address = self.start("off")
        with Client(address, tls=context(cert=foreign.client("mallory"))) as client:
            client.ping()

    def test_our_client_is_told_what_was_wrong_with_its_certificate(self):
        _, address = self.start("required")
        tls = ("--connect", address, "--ca", ca.ca, "--server-name", "localhost")
        alice, late = ca.client("alice"), ca.client("late", days="-1")
        self.assertEqual(opctl("ping", "--cert", alice[0], "--key", alice[1], *tls)[0], 0)
        for words, said in (((), "certificate required"), (("--cert", late[0], "--key", late[1]), "expired")):
            code, _, err = opctl("ping", *words, *tls)
            self.assertNotEqual(code, 0)
            self.assertIn("UNAUTHENTICATED", err)
            self.assertIn(said, err)
        code, _, err = opctl("ping", "--cert", alice[0], "--key", late[1], *tls)
        self.assertIn("is not that of the certificate", err)


class OurClients(Case):
    """opctl (libopd) and opd.py verify by default and say what failed."""

    flags = ()

    def test_opctl_carries_tensors_through_tls(self):
        tls = ("--connect", "%s?ca=%s&server-name=localhost" % (self.address, ca.ca))
        rows = 1 << 16
        with open(path("big.npy"), "wb") as file:
            file.write(npy_header((rows, 64)) + os.urandom(rows * 256))
        for words in (("put", path("big.npy"), "--as", "big"), ("get", "big", "--output", path("back.npy")), ("rm", "big")):
            code, _, err = opctl(*words, *tls)
            self.assertEqual((code, err), (0, ""))
        with open(path("big.npy"), "rb") as one, open(path("back.npy"), "rb") as two:
            self.assertEqual(one.read()[-rows * 256 :], two.read()[-rows * 256 :])
        self.assertIn("relu", opctl("run", "relu", "randn:f32[64,64]", "--explain", *tls)[1])

    def complain(self, address, *words):
        code, _, err = opctl("ping", "--connect", address, *words)
        self.assertEqual(code, 3 if "UNAUTHENTICATED" in err or "UNAVAILABLE" in err else 1, err)
        return err

    def test_errors_name_what_failed(self):
        fingerprint = certificates.fingerprint(path("server.pem"))
        self.assertEqual(opctl("ping", "--connect", self.address, "--fingerprint", fingerprint)[0], 0)
        for words, status, said in (
            ((), "UNAUTHENTICATED", "unable to get local issuer"),
            ((), "UNAUTHENTICATED", "--ca FILE"),
            (("--ca", foreign.ca), "UNAUTHENTICATED", "unable to get local issuer"),
            (("--ca", ca.ca, "--server-name", "nobody.example"), "UNAUTHENTICATED", "hostname mismatch"),
            (("--ca", path("nowhere.pem")), "INVALID_ARGUMENT", "nowhere.pem"),
            (("--fingerprint", "sha256:" + "00" * 32), "UNAUTHENTICATED", fingerprint.replace(":", "").lower()),
            (("--fingerprint", "sha256:1"), "INVALID_ARGUMENT", "64 hexadecimal digits"),
            (("--cert", path("server.pem"), "--ca", ca.ca), "INVALID_ARGUMENT", "key"),
        ):
            err = self.complain(self.address, *words)
            self.assertIn(status, err)
            self.assertIn(said, err)
        self.assertIn("IP address mismatch", self.complain(self.address.replace("127.0.0.1", "localhost"), "--ca", ca.ca, "--server-name", "127.0.0.2"))
        self.assertIn("INVALID_ARGUMENT", self.complain(self.address + "?color=red"))
        self.assertIn("use tls://", self.complain(self.address.replace("tls:", "tcp:")))
        self.assertIn("tls:// addresses", self.complain(self.daemon.address, "--ca", ca.ca))

    def test_an_expired_server(self):
        late = copy_pair(ca.server("late-server", days="-1"), "expired")
        daemon = Daemon(*server_flags(*late))
        self.addCleanup(daemon.stop)
        self.assertIn("has expired (", self.complain(daemon.tls_address(), "--ca", ca.ca))
        daemon.wait_log("certificate has expired")

    def stranger(self, behaviour):
        """The address of a server that does something else to one client."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)

        def serve():
            with contextlib.suppress(OSError), listener.accept()[0] as sock:
                behaviour(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        self.addCleanup(thread.join)
        return "tls://127.0.0.1:%d" % listener.getsockname()[1]

    def test_servers_that_are_something_else(self):
        def old(sock):
            made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            made.load_cert_chain(path("server.pem"), path("server.key"))
            made.maximum_version = ssl.TLSVersion.TLSv1_2
            made.wrap_socket(sock, server_side=True).close()

        def web(sock):
            sock.recv(10)
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        def other(sock):
            made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            made.load_cert_chain(path("server.pem"), path("server.key"))
            made.set_alpn_protocols(["h2"])
            with made.wrap_socket(sock, server_side=True) as sealed:
                sealed.recv(1)

        for behaviour, status, said in ((old, "FAILED_PRECONDITION", "1.3"), (web, "FAILED_PRECONDITION", "doesn't speak TLS"), (lambda sock: sock.recv(10), "UNAVAILABLE", "TLS: ")):
            err = self.complain(self.stranger(behaviour), "--ca", ca.ca)
            self.assertIn(status, err)
            self.assertIn(said, err)
        self.assertRegex(self.complain(self.stranger(other), "--ca", ca.ca), "FAILED_PRECONDITION.*opd/1")

    def test_the_python_client_resumes_where_it_was(self):
        try:
            import opd
        except ImportError:
            self.skipTest("no opd.py")
        kept = opd.Resumption()
        found = []
        for _ in range(3):
            with opd.Client(self.address, ca=ca.ca, resumption=kept) as client:
                client.ping()
                found.append(client.resumed)
        with opd.Client(self.address, fingerprint=certificates.fingerprint(path("server.pem")), resumption=kept) as client:
            found.append(client.resumed)  # verified in another way: not by what was
        self.assertEqual(found, [False, True, True, False])

    def test_the_python_client(self):
        try:
            import opd
        except ImportError:
            self.skipTest("no opd.py")
        data = os.urandom(4 << 20)
        with opd.Client(self.address, ca=ca.ca) as client:
            handle = client.upload(opd.Tensor(data, "u8", [len(data)])).result()
            self.assertEqual(bytes(memoryview(client.fetch(handle).result()).cast("B")), data)
            futures = [client.submit("relu", opd.Tensor(harness.f32(-1.0, 2.0), "f32", [2])) for _ in range(100)]
            for future in futures:
                self.assertEqual(list(future.result()[0]), [0.0, 2.0])
        with opd.Client("%s?fingerprint=%s" % (self.address, certificates.fingerprint(path("server.pem")))) as client:
            client.ping()
        for options, kind, said in (
            ({}, opd.Unauthenticated, "local issuer.*fingerprint="),
            ({"ca": ca.ca, "server_name": "nobody.example"}, opd.Unauthenticated, "nobody.example"),
            ({"fingerprint": "00" * 32}, opd.Unauthenticated, "fingerprint"),
            ({"fingerprint": "00"}, opd.InvalidArgument, "fingerprint"),
            ({"ca": path("nowhere.pem")}, opd.InvalidArgument, "nowhere.pem"),
        ):
            with self.assertRaisesRegex(kind, said):
                opd.Client(self.address, **options)
        with self.assertRaises(opd.InvalidArgument):
            opd.Client(self.daemon.address, ca=ca.ca)
        with self.assertRaisesRegex(opd.FailedPrecondition, "use tls://"):
            opd.Client(self.address.replace("tls:", "tcp:"))


def npy_header(shape):
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': %r, }" % (shape,)
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


class Starting(unittest.TestCase):
    def fails(self, *flags):
        daemon = Daemon(*flags, wait=False)
        self.addCleanup(daemon.stop, None)
        self.assertEqual(daemon.wait(), 2)
        return daemon.err_text()

    def test_what_a_listener_needs(self):
        tls = ("--listen", "tls://127.0.0.1:0")
        self.assertIn("--self-signed", self.fails(*tls))
        self.assertIn("without tls.key", self.fails(*tls, "--tls-certificate", path("server.pem")))
        self.assertIn("nowhere", self.fails(*server_flags(key=path("nowhere"))))
        self.assertIn("expected a chain in PEM", self.fails(*server_flags(certificate=path("server.key"))))
        self.assertIn("nothing could be verified", self.fails(*server_flags(), "--tls-client-certificates", "required"))
        self.assertIn("expected off, optional or required", self.fails(*server_flags(), "--tls-client-certificates", "maybe"))

    def test_a_plain_port_for_other_machines_must_be_asked_for(self):
        self.assertIn("--insecure-plain-tcp", self.fails("--listen", "tcp://0.0.0.0:0"))

    def test_self_signed_prints_the_fingerprint_that_clients_pin_and_keeps_it(self):
        daemon = Daemon("--listen", "tls://127.0.0.1:0", "--self-signed", config="threads: 1\n")
        self.addCleanup(daemon.stop)
        fingerprint = daemon.err_text().strip().split()[-1]
        self.assertRegex(fingerprint, "^sha256:[0-9a-f]{64}$")
        address = daemon.tls_address()
        code, _, err = opctl("ping", "--connect", address)
        self.assertEqual(code, 3)
        self.assertRegex(err, "self-signed certificate; .*--ca FILE.*--fingerprint sha256:")
        for _ in range(2):
            self.assertEqual(opctl("ping", "--connect", address, "--fingerprint", fingerprint)[0], 0)
            daemon.signal(signal.SIGHUP)
            daemon.wait_log("configuration reloaded")


if __name__ == "__main__":
    unittest.main()
