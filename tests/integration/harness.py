"""What the integration tests share: a daemon of their own, and a client that can do what no client should.

The client speaks proto/README.md by raw sockets, so that a test can send any bytes. Standard library and python3-protobuf only.

OPD_BIN names the daemon (default: build/bin/opd), OPD_MODULES the test modules that CMake has told the suite of (default: all of OPD_BUILD's, build/), OPD_TEST_LOOPS how many I/O loops it has where a test doesn't say (1); OPD_TEST_LONG=1 asks for the long runs, OPD_TEST_SANITIZED tells that programs are ten times as slow. opd_pb2 is made by protoc where OPD_PB2 names no
folder that has it.
"""
import atexit
import glob
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OPD = os.environ.get("OPD_BIN", os.path.join(ROOT, "build", "bin", "opd"))
LONG = os.environ.get("OPD_TEST_LONG", "") == "1"
SANITIZED = os.environ.get("OPD_TEST_SANITIZED", "") != ""


def _import_pb2():
    folder = os.environ.get("OPD_PB2")
    if not folder:
        folder = tempfile.mkdtemp(prefix="opd-pb2-")
        atexit.register(shutil.rmtree, folder, True)
        subprocess.run(["protoc", "-I", os.path.join(ROOT, "proto"), "--python_out", folder, "opd.proto"], check=True)
    sys.path.insert(0, folder)
    import opd_pb2

    return opd_pb2


pb = _import_pb2()

HELLO, HELLO_REPLY, REQUEST, REPLY, DATA, ABORT, CANCEL, GOAWAY = range(1, 9)
CHUNKED = 1
OK, CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED = range(8)
RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS, UNAUTHENTICATED = range(8, 17)
PATIENCE = 60  # seconds until something that should happen counts as never: no test measures time, and sanitizers are slow


def built_module(name):
    """The file of a test module (tests/modules): under CTest one that the suite is registered with, so that a build of no more than what the suite needs has it."""
    listed = os.environ.get("OPD_MODULES")
    if listed is None:
        found = glob.glob(os.path.join(os.environ.get("OPD_BUILD", os.path.join(ROOT, "build")), "tests", "modules", "*", name + ".so"))
    else:
        found = [path for path in listed.split(":") if os.path.basename(path) == name + ".so"]
    if not found:
        raise LookupError("test module %s: expected it among OPD_MODULES (%s): name it in CMake's opd_test_modules for this suite" % (name, listed))
    return found[0]


def frame(kind, request_id=0, envelope=b"", payload=b"", flags=0, **overrides):
    """A frame's bytes. overrides: magic, version, reserved, envelope_bytes, payload_bytes."""
    header = struct.pack(
        "<4sBBHQIIQ",
        overrides.get("magic", b"OPD1"),
        overrides.get("version", 1),
        kind,
        flags,
        request_id,
        overrides.get("envelope_bytes", len(envelope)),
        overrides.get("reserved", 0),
        overrides.get("payload_bytes", len(payload)),
    )
    return header + envelope + payload


def hello_envelope(**fields):
    fields.setdefault("version_min", 1)
    fields.setdefault("version_max", 1)
    fields.setdefault("client", "test")
    return pb.Hello(**fields).SerializeToString()


def connect(address):
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        try:
            sock.connect(address[5:])
        except OSError:
            sock.close()
            raise
        return sock
    host, port = re.fullmatch(r"t(?:cp|ls)://\[?(.*?)\]?:(\d+)", address).groups()
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


class Closed(Exception):
    """The daemon ended the connection; .goaway has what it said before, or None."""

    def __init__(self, goaway=None):
        super().__init__(goaway)
        self.goaway = goaway


class Failed(Exception):
    """A reply with a status other than OK."""

    def __init__(self, reply):
        super().__init__("%d: %s" % (reply.status, reply.message))
        self.status = reply.status
        self.text = reply.message
        self.reply = reply


class Client:
    """One connection. hello=False leaves the handshake to the test."""

    def __init__(self, address, hello=True, tls=None, sock=None, **fields):
        """tls: an SSLContext for an address that begins with tls://. sock: connected already."""
        self.sock = sock or connect(address)
        if tls is not None:
            try:
                self.sock = tls.wrap_socket(self.sock, server_hostname="localhost")
            except BaseException:
                self.sock.close()
                raise
        try:
            self.start(hello, fields)
        except BaseException:
            self.sock.close()
            raise

    def start(self, hello, fields):
        self.buffer = b""
        self.next_id = 1
        self.goaway = None
        self.hello = None
        self.payloads = {}  # of chunked replies that aren't whole yet: id → (reply, bytearray, length)
        if hello:
            try:
                self.send(frame(HELLO, envelope=hello_envelope(**fields)))
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused already: what the daemon said is still there to be read
            kind, _, _, envelope, _ = self.read_frame()
            assert kind == HELLO_REPLY, kind
            self.hello = pb.HelloReply.FromString(envelope)
            if self.hello.status != OK:
                raise Failed(self.hello)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.sock.close()

    def send(self, data):
        self.sock.sendall(data)

    def receive(self, count):
        while len(self.buffer) < count:
            try:
                got = self.sock.recv(1 << 20)
            except (ConnectionResetError, BrokenPipeError):
                got = b""
            if not got:
                raise Closed(self.goaway)
            self.buffer += got
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def read_frame(self):
        """(type, flags, request id, envelope, payload); a GOAWAY is remembered as well."""
        magic, version, kind, flags, request_id, envelope_bytes, reserved, payload_bytes = struct.unpack("<4sBBHQIIQ", self.receive(32))
        assert magic == b"OPD1" and version == 1 and reserved == 0, (magic, version, reserved)
        envelope = self.receive(envelope_bytes)
        payload = b"" if flags & CHUNKED else self.receive(payload_bytes)
        if kind == GOAWAY:
            self.goaway = pb.Goaway.FromString(envelope)
        if kind == REPLY and flags & CHUNKED:
            self.payloads[request_id] = (envelope, bytearray(), payload_bytes)
        return kind, flags, request_id, envelope, payload

    def read_reply(self, request_id=None):
        """(request id, Reply, payload) of the next whole reply, or of that id; others are dropped."""
        while True:
            kind, flags, found, envelope, payload = self.read_frame()
            if kind == DATA:
                whole = self.payloads[found]
                assert struct.unpack("<Q", envelope)[0] == len(whole[1])
                whole[1].extend(payload)
                if len(whole[1]) < whole[2]:
                    continue
                envelope, payload = whole[0], bytes(whole[1])
                del self.payloads[found]
            elif kind != REPLY or flags & CHUNKED:
                continue
            if request_id is None or found == request_id:
                return found, pb.Reply.FromString(envelope), payload

    def submit(self, request, payload=b"", request_id=None):
        if request_id is None:
            request_id = self.next_id
        self.next_id = max(self.next_id, request_id) + 1
        self.send(frame(REQUEST, request_id, request.SerializeToString(), payload))
        return request_id

    def call(self, request, payload=b"", request_id=None):
        """The Reply and its payload, whatever the status."""
        return self.read_reply(self.submit(request, payload, request_id))[1:]

    def ask(self, request, payload=b""):
        """The same; raises Failed."""
        reply, data = self.call(request, payload)
        if reply.status != OK:
            raise Failed(reply)
        return reply, data

    def ping(self):
        self.ask(pb.Request(ping=pb.Empty()))

    def info(self):
        return self.ask(pb.Request(info=pb.Empty()))[0].info

    def expect_end(self):
        """Reads until the daemon closes; the GOAWAY's or refused HELLO_REPLY's (status, message), or None where it said nothing."""
        last = None
        try:
            while True:
                kind, _, _, envelope, _ = self.read_frame()
                if kind in (GOAWAY, HELLO_REPLY):
                    said = (pb.Goaway if kind == GOAWAY else pb.HelloReply).FromString(envelope)
                    last = (said.status, said.message)
        except Closed:
            return last


def f32(*values):
    return struct.pack("<%df" % len(values), *values)


def unpack_f32(data):
    return struct.unpack("<%df" % (len(data) // 4), data)


def tensor(shape, offset=0, size=None, dtype=9, **fields):
    """A Tensor in the payload; size: in bytes (default: f32's)."""
    if size is None:
        size = 4
        for extent in shape:
            size *= extent
    return pb.Tensor(dtype=dtype, shape=shape, payload=pb.Range(offset=offset, bytes=size), **fields)


def inline(shape, data, dtype=9, **fields):
    return pb.Tensor(dtype=dtype, shape=shape, inline=data, **fields)


def run(op, *tensors, **attributes):
    """A run request: positional tensors, then attributes by name. priority, strict, … are Run's own fields when they begin with run_."""
    request = pb.Request()
    request.run.op = op
    for operand in tensors:
        request.run.args.add().tensor.CopyFrom(operand)
    for name, value in attributes.items():
        if name.startswith("run_"):
            field = getattr(request.run, name[4:])
            if isinstance(field, pb.ProviderList):
                request.run.priority.SetInParent()
                request.run.priority.names.extend(value)
            else:
                setattr(request.run, name[4:], value)
            continue
        argument = request.run.args.add(name=name)
        if isinstance(value, bool):
            argument.bool = value
        elif isinstance(value, int):
            argument.int = value
        elif isinstance(value, float):
            argument.float = value
        elif isinstance(value, str):
            argument.str = value
        elif value is None:
            getattr(argument, "none").SetInParent()
        else:
            argument.tensor.CopyFrom(value)
    return request


def rms_norm(rows=2, columns=4):
    """(request, payload, what the result's elements are) of a small rms_norm with ones as weight."""
    values = [float(i % 7 + 1) for i in range(rows * columns)]
    x = f32(*values)
    weight_at = (len(x) + 63) // 64 * 64
    payload = x.ljust(weight_at, b"\0") + f32(*[1.0] * columns)
    request = run("rms_norm", tensor([rows, columns]), tensor([columns], weight_at), epsilon=0.0)
    wanted = []
    for row in range(rows):
        part = values[row * columns : (row + 1) * columns]
        mean = sum(v * v for v in part) / columns
        wanted += [v / mean**0.5 for v in part]
    return request, payload, wanted


class Daemon:
    """A daemon on a temporary Unix socket (and what else flags say), logging into a file."""

    def __init__(self, *flags, listen=None, config=None, log=True, limits=None, wait=True, environment=None, folder=None, wrapper=(), pass_fds=()):
        self.folder = folder or tempfile.mkdtemp(prefix="opd-test-")
        self.own_folder = folder is None
        self.path = os.path.join(self.folder, "opd.sock")
        self.address = "unix:" + self.path
        self.log_path = os.path.join(self.folder, "log")
        self.err_path = os.path.join(self.folder, "stderr")
        command = [*wrapper, OPD]
        if config is not None:
            command += ["--config", self.write_config(config)]
        for address in [self.address] if listen is None else listen:
            command += ["--listen", address]
        if log:
            command += ["--log-file", self.log_path]
        if "loops:" not in (config or ""):  # else on machines of four cores and more what different clients send would come in another order now and then
            command += ["--loops", os.environ.get("OPD_TEST_LOOPS", "1")]
        self.command = command + list(flags)
        with open(self.err_path, "ab") as err:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=err, stderr=err, preexec_fn=limits, env=dict(os.environ, **(environment or {})),
                pass_fds=pass_fds,
            )
        if wait:
            self.wait_ready()

    def write_config(self, text):
        path = os.path.join(self.folder, "opd.yaml")
        with open(path + ".new", "w") as file:
            file.write(text)
        os.rename(path + ".new", path)
        return path

    def wait_ready(self):
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError("the daemon ended with %d: %s" % (self.process.returncode, self.output()))
            try:
                with Client(self.address):
                    return
            except (OSError, Closed):
                time.sleep(0.02)
        raise AssertionError("the daemon doesn't answer: " + self.output())

    def output(self):
        return self.log_text() + self.err_text()

    def log_text(self):
        try:
            with open(self.log_path, errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    def err_text(self):
        with open(self.err_path, errors="replace") as file:
            return file.read()

    def wait_log(self, *words, count=1):
        """Until `count` lines have all the words; returns the last one."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            lines = [line for line in self.log_text().splitlines() if all(word in line for word in words)]
            if len(lines) >= count:
                return lines[-1]
            time.sleep(0.02)
        raise AssertionError("no line with %r in the log: %s" % (words, self.output()))

    def tcp_addresses(self):
        """Of the TCP listeners, with the ports that they got."""
        with Client(self.address) as client:
            return [address for address in client.info().listeners if address.startswith("tcp://")]

    def tls_address(self):
        """Of the only TLS listener, with the port that it got."""
        with Client(self.address) as client:
            return [address for address in client.info().listeners if address.startswith("tls://")][0]

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self):
        """The exit code."""
        return self.process.wait(timeout=PATIENCE)

    def memory_kib(self):
        with open("/proc/%d/status" % self.process.pid) as file:
            return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1))

    def descriptors(self):
        """How many are open; without those of /dev/null, of which libuv keeps one for each loop that has had a connection."""
        folder = "/proc/%d/fd" % self.process.pid
        count = 0
        for name in os.listdir(folder):
            try:
                count += os.readlink(os.path.join(folder, name)) != os.devnull
            except FileNotFoundError:
                pass  # closed meanwhile
        return count

    def stop(self, code=0):
        """Ends it by SIGTERM; code: what it must end with (None: whatever)."""
        try:
            if self.process.poll() is None:
                self.signal(signal.SIGTERM)
            found = self.wait()
            if code is not None and found != code:
                raise AssertionError("the daemon ended with %d, expected %d: %s" % (found, code, self.output()))
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            if self.own_folder:
                shutil.rmtree(self.folder, ignore_errors=True)


class DaemonCase(unittest.TestCase):
    """Tests that share one daemon. After each, the next client must be served and nothing of the last one may be left."""

    flags = ()
    environment = None
    config = None

    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon(*cls.flags, environment=cls.environment, config=cls.config)
        cls.address = cls.daemon.address

    @classmethod
    def tearDownClass(cls):
        cls.daemon.stop()

    def tearDown(self):
        check_healthy(self, self.daemon)

    def client(self, **fields):
        client = Client(self.address, **fields)
        self.addCleanup(client.close)
        return client


def check_healthy(case, daemon):
    """A new client pings, runs an op and gets the right numbers; the daemon is the same process."""
    case.assertIsNone(daemon.process.poll(), daemon.output())
    with Client(daemon.address) as client:
        client.ping()
        request, payload, wanted = rms_norm()
        reply, data = client.ask(request, payload)
        case.assertEqual(list(reply.run.outputs[0].tensor.shape), [2, 4])
        for got, want in zip(unpack_f32(data), wanted):
            case.assertAlmostEqual(got, want, places=5)


def wait_until(condition, what="it"):
    until = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise AssertionError("never: " + what)
        time.sleep(0.02)
