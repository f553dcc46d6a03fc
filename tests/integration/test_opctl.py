#!/usr/bin/python3
"""opctl against a real daemon on a temporary socket: every command, JSON, exit codes, messages, the golden cases, the fallback without a daemon.

OPD_BIN and OPCTL_BIN name the binaries (default: build/bin/opd, build/bin/opctl); OPD_GOLDEN the cases. Needs the standard library alone.
"""
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OPD = os.environ.get("OPD_BIN", os.path.join(ROOT, "build/bin/opd"))
OPCTL = os.environ.get("OPCTL_BIN", os.path.join(ROOT, "build/bin/opctl"))
GOLDEN = os.environ.get("OPD_GOLDEN", os.path.join(ROOT, "tests/golden"))
SANITIZED = os.environ.get("OPD_TEST_SANITIZED", "") != ""
COMMANDS = ["run", "fake", "explain", "graph", "put", "get", "rm", "publish", "tensors", "ops", "describe", "providers", "priority", "verify", "bench", "ping", "info", "health", "module", "log-level", "drain", "help"]


def start_daemon(folder, *flags):
    path = os.path.join(folder, "opd.sock")
    log = open(os.path.join(folder, "log"), "ab")
    daemon = subprocess.Popen([OPD, "--listen", "unix:" + path, *flags], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    log.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and daemon.poll() is None:
        if subprocess.run([OPCTL, "--connect", "unix:" + path, "ping", "-c", "1"], capture_output=True, timeout=30).returncode == 0:
            return daemon, "unix:" + path
        time.sleep(0.05)
    daemon.kill()
    with open(os.path.join(folder, "log"), errors="replace") as text:
        raise RuntimeError("the daemon didn't start: " + text.read())


def stop_daemon(daemon):
    if daemon.poll() is None:
        daemon.send_signal(signal.SIGTERM)
    try:
        return daemon.wait(timeout=30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
        raise


def write_npy(path, descr, shape, data, fortran=False):
    head = "{'descr': '%s', 'fortran_order': %s, 'shape': (%s), }" % (descr, fortran, "".join("%d," % n for n in shape))
    head += " " * ((-(10 + len(head) + 1)) % 64) + "\n"
    with open(path, "wb") as file:
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + data)


def write_safetensors(path, tensors, metadata=None):
    """tensors: {name: (dtype, shape, bytes)}"""
    header, data = {}, b""
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, (dtype, shape, payload) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(payload)]}
        data += payload
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    with open(path, "rb") as file:
        data = file.read()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    body = data[8 + size :]
    return metadata, {name: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for name, e in header.items()}


def floats(*values):
    return struct.pack("<%df" % len(values), *values)


SAID_AS_JSON = set()


class Case(unittest.TestCase):
    daemon = None
    address = None

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="opctl-")
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.daemon, cls.address = start_daemon(cls.folder)

    @classmethod
    def tearDownClass(cls):
        code = stop_daemon(cls.daemon)
        if code != 0:
            raise AssertionError("the daemon ended with %d" % code)

    def path(self, name):
        return os.path.join(self.folder, name)

    def opctl(self, *args, code=0, env=None, connect=True):
        command = [OPCTL] + (["--connect", self.address] if connect else []) + list(args)
        environment = {k: v for k, v in os.environ.items() if k != "OPD_ADDRESS"}
        environment.update(env or {})
        done = subprocess.run(command, capture_output=True, timeout=300, env=environment)
        text = "\n%s\nstdout: %s\nstderr: %s" % (args, done.stdout.decode(errors="replace")[-2000:], done.stderr.decode(errors="replace")[-2000:])
        self.assertEqual(done.returncode, code, text)
        for byte in done.stdout + done.stderr:
            self.assertTrue(byte >= 32 or byte == 10, "control character %d reached the terminal%s" % (byte, text))
        return done.stdout.decode(), done.stderr.decode()

    def json(self, *args, **more):
        out = self.opctl("--json", *args, **more)[0]
        self.assertEqual(out.count("\n"), 1, "a JSON document is one line")
        self.assertTrue(out.isascii())
        return json.loads(out)

    def fails(self, code, status, *args, **more):
        """The command fails with that exit code and status; returns its message, checking that --json says the same."""
        error = self.opctl(*args, code=code, **more)[1]
        last = error.strip().split("\n")[-1]
        self.assertTrue(last.startswith("opctl: %s: " % status), last)
        if SANITIZED and args[0] in SAID_AS_JSON:
            return last  # a start of a sanitized program costs more than what it does: of each command, one failure is asked for twice
        SAID_AS_JSON.add(args[0])
        document = self.json(*args, code=code, **more)
        self.assertEqual(document["status"], status)
        self.assertTrue(document["message"])
        return last


class Help(Case):
    def test_help_names_every_command_and_each_has_its_own(self):
        text = self.opctl("--help")[0]
        self.assertEqual(self.opctl("help")[0], text)
        for name in COMMANDS:
            self.assertRegex(text, r"(?m)^  %s\b" % name)
            own = self.opctl("help", name)[0]
            self.assertTrue(own.startswith("usage: opctl " + name), own)
            self.assertEqual(self.opctl(name, "--help")[0], own)

    def test_version(self):
        self.assertRegex(self.opctl("--version")[0], r"^opctl \d+\.\d+\.\d+\n$")

    def test_a_command_line_that_makes_no_sense_is_exit_code_2(self):
        for args, expected in [
            ([], "no command"),
            (["nonsense"], "no command is called 'nonsense'"),
            (["help", "nonsense"], "nonsense"),
            (["run"], "needs an op"),
            (["ops", "--strict"], "ops takes no --strict"),
            (["ops", "--nonsense"], "unknown option --nonsense"),
            (["ops", "--json=1"], "--json takes no value"),
            (["ops", "extra"], "1 arguments, expected none"),
            (["run", "add", "--priority"], "--priority needs a value"),
            (["run", "add", "--seed", "x"], "--seed is 'x'"),
            (["run", "add", "--timeout", "-1"], "--timeout is -1"),
            (["run", "add", "-o", "y.txt"], "expected a name that ends in .npy or .safetensors"),
            (["verify"], "verify needs case files"),
            (["verify", "--all", "--provider", "cpu", GOLDEN], "exclude each other"),
            (["bench"], "expected one: the op"),
            (["bench", "rms_norm", "--shape", "3x"], "--shape"),
            (["bench", "rms_norm", "--in-flight", "0"], "--in-flight is 0, expected 1 to"),
            (["bench", "rms_norm", "--dtype", "f31"], "--dtype is 'f31'"),
            (["priority"], "expected priority get"),
            (["priority", "set", "add"], "expected priority get"),
            (["module", "unload", "x"], "expected module load PATH"),
            (["ping", "-c", "x"], "--count is 'x'"),
            (["drain", "--timeout", "soon"], "--timeout is 'soon'"),
        ]:
            with self.subTest(args=args):
                self.assertIn(expected, self.opctl(*args, code=2)[1])


class Run(Case):
    def test_files_are_published_listed_fetched_and_withdrawn(self):
        path, back = os.path.join(self.folder, "w.npy"), os.path.join(self.folder, "back.npy")
        write_npy(path, "<f4", [2, 3], struct.pack("<6f", *range(6)))
        both = os.path.join(self.folder, "both.safetensors")
        write_safetensors(both, {"a": ("F32", [2, 3], struct.pack("<6f", *range(6))), "b": ("I64", [], struct.pack("<q", 7))})
        self.assertIn("lasting", self.opctl("put", path, "--as", "w")[0])
        self.opctl("put", both, "--as", "both", "--all")
        rows = {row["name"]: row for row in self.json("tensors")}
        self.assertEqual(sorted(rows), ["both/a", "both/b", "w"])
        self.assertEqual(rows["w"]["sha256"], rows["both/a"]["sha256"])
        self.assertEqual((rows["both/b"]["dtype"], rows["both/b"]["shape"], rows["both/b"]["all"]), ("i64", [], True))
        self.opctl("get", "w", "--output", back)
        with open(path, "rb") as one, open(back, "rb") as other:
            self.assertEqual(one.read()[-24:], other.read()[-24:])
        self.opctl("publish", "w", "--as", "again")
        self.fails(1, "NOT_FOUND", "get", "nothing", "-o", back)
        self.fails(1, "NOT_FOUND", "rm", "nothing")
        self.fails(2, "INVALID_ARGUMENT", "put", path)
        self.fails(2, "INVALID_ARGUMENT", "put", "w.txt", "--as", "w")
        self.fails(1, "INVALID_ARGUMENT", "put", path, "--as", "not a name")
        self.opctl("rm", "w", "again", "both/")
        self.assertEqual(self.json("tensors"), [])
        self.assertEqual(self.json("info")["memory_bytes"], 0)

    def test_tensors_through_shared_memory_give_the_same(self):
        for words in (["relu", "randn:f32[3,5]"], ["embedding", "ids=i64[3]=0,2,1", "table=randn:bf16[4,6]"], ["topk", "randn:f32[2,9]", "3"], ["relu", "f32[0,4]=1"]):
            self.assertEqual(self.opctl("run", *words, "--shm"), self.opctl("run", *words))
        graph = os.path.join(self.folder, "shm.json")
        with open(graph, "w") as file:
            json.dump({"inputs": ["x"], "nodes": [{"name": "y", "op": "relu", "args": {"x": "$x"}}, {"name": "z", "op": "silu", "args": {"x": "$y"}}],
                       "outputs": {"y": "$y", "z": "$z"}}, file)
        words = ("graph", graph, "run", "randn:f32[7,9]")
        self.assertEqual(self.opctl(*words, "--shm"), self.opctl(*words))

    def test_publications_go_through_shared_memory_both_ways(self):
        made, back = os.path.join(self.folder, "made.safetensors"), os.path.join(self.folder, "back.safetensors")
        for dtype, shape, data in (("F32", [33, 1000], os.urandom(132000)), ("I64", [5], os.urandom(40)), ("BF16", [0, 3], b"")):
            write_safetensors(made, {"t": (dtype, shape, data)})
            self.opctl("put", made, "--as", "sent")
            self.opctl("put", made, "--as", "shared", "--shm")
            contents = {item["name"]: item["sha256"] for item in self.json("tensors")}
            self.assertEqual(contents["sent/t"], contents["shared/t"])
            for name in contents:
                self.opctl("get", name, "-o", back, "--shm")
                with open(back, "rb") as file:
                    self.assertTrue(file.read().endswith(data))
            self.opctl("rm", "sent/", "shared/")

    def test_requests_through_rings_give_the_same(self):
        for words in (["run", "relu", "randn:f32[300,500]"], ["run", "rms_norm", "randn:f32[2,4096]", "ones:f32[4096]", "1e-5", "--shm"], ["ops"]):
            self.assertEqual(self.opctl(*words, "--rings"), self.opctl(*words))
            self.assertEqual(self.opctl(*words, "--rings", "--poll", "20"), self.opctl(*words))
        self.assertIn("--poll needs --rings", self.fails(1, "INVALID_ARGUMENT", "ping", "--poll", "20"))

    def test_a_client_killed_at_work_through_rings_leaves_nothing(self):
        before = len(os.listdir("/proc/%d/fd" % self.daemon.pid))
        for round in range(12):
            command = [OPCTL, "--connect", self.address + ("?rings" if round % 2 else "?rings&poll=50us"), "bench", "rms_norm", "--shape", "32x4096", "--in-flight", "8"]
            client = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(0.02 * round)
            client.kill()
            client.wait()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and len(os.listdir("/proc/%d/fd" % self.daemon.pid)) > before:
            time.sleep(0.05)
        self.assertLessEqual(len(os.listdir("/proc/%d/fd" % self.daemon.pid)), before)
        self.assertEqual(self.json("info")["memory_bytes"], 0)

    def test_values_of_every_kind(self):
        out = self.opctl("run", "rms_norm", "x=f32[2,4]=1,2,3,4,1,2,3,4", "weight=ones:f32[4]", "epsilon=1e-5")[0]
        self.assertRegex(out, r"^rms_norm: \w+ ran it\n0: f32 \[2, 4\]  min 0\.365\d+  max 1\.46\d+  mean 0\.91\d+  nan 0  inf 0\n   \[0\.365")
        document = self.json("run", "rms_norm", "f32[1,4]=1,2,3,4", "none", "1e-5", "variance_size=2")
        output = document["outputs"][0]
        self.assertEqual((document["op"], output["dtype"], output["shape"], output["nan"]), ("rms_norm", "f32", [1, 4], 0))
        for got, x in zip(output["first"], [1, 2, 3, 4]):
            self.assertAlmostEqual(got, x / math.sqrt(2.5 + 1e-5), places=6)
        document = self.json("run", "softmax", "x=i32[3]=1,2,3", "dim=-1", code=1)
        self.assertEqual(document["status"], "INVALID_ARGUMENT")
        self.assertEqual(self.json("run", "softmax", "zeros:f64[2,4]", "-1")["outputs"][0]["first"], [0.25] * 8)
        self.assertEqual(self.json("run", "gelu", "x=zeros:f16[3]", "approximate=tanh")["outputs"][0]["first"], [0, 0, 0])
        self.assertEqual(self.json("run", "argmax", "x=arange:f32[2,3]", "keepdim=true")["outputs"][0]["shape"], [2, 1])
        topk = self.json("run", "topk", "arange:bf16[5]", "2")["outputs"]
        self.assertEqual([o["first"] for o in topk], [[4, 3], [4, 3]])
        self.assertEqual([o["dtype"] for o in topk], ["bf16", "i64"])
        self.assertEqual(self.json("run", "add", "i64[2]=9223372036854775807,-5", "ones:i64[2]")["outputs"][0]["first"], [-(2**63), -4])

    def test_nan_and_infinities_are_counted(self):
        document = self.json("run", "relu", "x=f32[4]=nan,inf,-1,2")
        self.assertEqual({k: document["outputs"][0][k] for k in ("nan", "inf", "min", "max")}, {"nan": 1, "inf": 1, "min": 0, "max": 2})
        self.assertEqual(document["outputs"][0]["first"], ["nan", "inf", 0, 2])

    def test_an_empty_result_has_no_range(self):
        self.assertIsNone(self.json("run", "relu", "x=zeros:f32[0,4]")["outputs"][0]["min"])

    def test_randn_depends_on_the_seed_alone(self):
        one = self.json("run", "relu", "randn:f32[64]", "--seed", "7")
        self.assertEqual(one, self.json("run", "relu", "randn:f32[64]", "--seed", "7"))
        self.assertNotEqual(one["outputs"], self.json("run", "relu", "randn:f32[64]", "--seed", "8")["outputs"])

    def test_values_that_dont_fit_are_named(self):
        tensor = "x=ones:f32[2,4]"
        for args, expected in [
            ([tensor, "weight=none", "epsilon=abc"], "rms_norm: epsilon is 'abc', expected a float"),
            ([tensor, "weight=none", "epsilon=1e999"], "epsilon is 1e999, which doesn't fit"),
            ([tensor, "weight=none", "epsilon=1e-5", "variance_size=99999999999999999999"], "variance_size is 99999999999999999999, which doesn't fit an int"),
            ([tensor, "weight=none", "epsilon=1e-5", "variance_size=2.0"], "variance_size is '2.0', expected an int"),
            (["x=1"], "x is '1', expected a tensor"),
            (["x=" + __file__], "did you mean the file, @"),
            (["x=f32[2,4]"], "f32[2,4] without values"),
            (["x=f32[2,-4]"], "x is -4, expected 0 to"),
            (["x=zeros:f32[4611686018427387904,4]"], "doesn't fit 63 bits"),
            (["x=f32[3]=1,2"], "x has 2 values, its shape needs 3"),
            (["x=u8[1]=256"], "x is 256, expected 0 to 255"),
            (["x=randn:i32[2]"], "randn of i32"),
            (["x=zeros:f32[2]junk"], "goes on with 'junk'"),
            ([tensor, "1e-5"], "rms_norm: '1e-5' has no name and comes after values with one"),
            (["x=@x.txt"], "expected a name that ends in .npy or .safetensors"),
        ]:
            with self.subTest(args=args):
                self.assertIn(expected, self.fails(2, "INVALID_ARGUMENT", "run", "rms_norm", *args))
        self.assertIn("keepdim is 'yes', expected true or false", self.fails(2, "INVALID_ARGUMENT", "run", "argmax", tensor, "keepdim=yes"))

    def test_what_only_the_daemon_can_know_it_says(self):
        self.fails(1, "NOT_FOUND", "run", "no_such_op", "x=ones:f32[2]")
        self.assertIn("4095", self.fails(1, "INVALID_ARGUMENT", "run", "rms_norm", "zeros:f32[2,4096]", "zeros:f32[4095]", "1e-5"))
        self.assertIn("eps", self.fails(1, "INVALID_ARGUMENT", "run", "rms_norm", "x=ones:f32[4]", "weight=none", "epsilon=1", "eps=1"))
        self.fails(1, "INVALID_ARGUMENT", "run", "relu", "ones:f32[1]", "2", "3")
        self.fails(1, "NOT_FOUND", "run", "relu", "ones:f32[1]", "--priority", "no_such_provider")

    def test_files_in_and_out(self):
        write_npy(self.path("x.npy"), "<f4", (2, 3), floats(1, 2, 3, 4, 5, 6))
        write_npy(self.path("columns.npy"), "<f4", (2, 3), floats(1, 4, 2, 5, 3, 6), fortran=True)
        write_npy(self.path("big.npy"), ">f4", (2, 3), struct.pack(">6f", 1, 2, 3, 4, 5, 6))
        write_npy(self.path("words.npy"), "<u2", (2,), struct.pack("<2H", 0x3F80, 0xC000))
        write_safetensors(self.path("in.safetensors"), {"a.b": ("BF16", [2], struct.pack("<2H", 0x3F80, 0xC000)), "other": ("F32", [1], floats(9))})
        for name in ("x.npy", "columns.npy", "big.npy"):
            self.assertEqual(self.json("run", "relu", "x=@" + self.path(name))["outputs"][0]["first"], [1, 2, 3, 4, 5, 6], name)
        for source in ("words.npy:bf16", "in.safetensors:a.b"):
            self.assertEqual(self.json("run", "relu", "@" + self.path(source))["outputs"][0]["first"], [1, 0], source)
        self.opctl("run", "relu", "@" + self.path("x.npy"), "-o", self.path("y.npy"))
        with open(self.path("y.npy"), "rb") as file:
            data = file.read()
        self.assertEqual((data[:6], len(data) % 64, data[-24:]), (b"\x93NUMPY", 24, floats(1, 2, 3, 4, 5, 6)))
        note = self.opctl("run", "relu", "@" + self.path("in.safetensors:a.b"), "-o", self.path("raw.npy"))[1]
        self.assertIn(".npy has no bf16", note)
        self.assertEqual(self.json("run", "relu", "@" + self.path("raw.npy:bf16"))["outputs"][0]["first"], [1, 0])
        self.opctl("run", "topk", "arange:bf16[4]", "2", "-o", self.path("y.safetensors"))
        metadata, tensors = read_safetensors(self.path("y.safetensors"))
        self.assertEqual(metadata["op"], "topk")
        self.assertEqual(tensors["out.0"], ("BF16", [2], struct.pack("<2H", 0x4040, 0x4000)))
        self.assertEqual(tensors["out.1"], ("I64", [2], struct.pack("<2q", 3, 2)))
        self.opctl("run", "static_quant_fp8", "f32[2]=1,-500", "ones:f32[1]", "-o", self.path("q.safetensors"))
        self.assertEqual(read_safetensors(self.path("q.safetensors"))[1]["out.0"], ("F8_E4M3", [2], b"\x38\xfe"))
        self.opctl("run", "topk", "arange:f32[4]", "2", "-o", self.path("two.npy"))
        self.assertTrue(os.path.exists(self.path("two.0.npy")) and os.path.exists(self.path("two.1.npy")))
        self.assertEqual([n for n in os.listdir(self.folder) if re.search(r"\.(npy|safetensors)\.", n)], [], "no temporary file stays")

    def test_files_that_arent_there_or_arent_right(self):
        self.assertIn("No such file", self.fails(1, "NOT_FOUND", "run", "relu", "@" + self.path("absent.npy")))
        write_safetensors(self.path("one.safetensors"), {"a": ("F32", [1], floats(1)), "b": ("F32", [1], floats(1))})
        self.assertIn("no tensor 'c'", self.fails(1, "NOT_FOUND", "run", "relu", "@" + self.path("one.safetensors:c")))
        self.assertIn("say which", self.fails(2, "INVALID_ARGUMENT", "run", "relu", "@" + self.path("one.safetensors")))
        self.fails(1, "NOT_FOUND", "run", "relu", "ones:f32[1]", "-o", self.path("no/such/y.npy"))

    def test_priority_strict_device_uuid_and_explain(self):
        document = self.json("run", "relu", "ones:f32[4]", "--priority", "native", "--explain", "--uuid")
        self.assertEqual(document["provider"], "native")
        self.assertEqual((document["explain"]["level"], document["explain"]["effective"]), ("request", ["native"]))
        self.assertGreater(document["explain"]["times_ns"]["kernel"], 0)
        self.assertRegex(document["uuid"], r"^[0-9a-f]{64}$")
        out = self.opctl("run", "relu", "ones:f32[4]", "--priority", "native", "--explain", "--uuid")[0]
        for label in ("uuid ", "level ", "effective ", "device ", "times "):
            self.assertIn("\n" + label, out)
        self.assertEqual(self.json("run", "relu", "ones:f32[4]", "--priority", "", "--explain")["explain"]["effective"], ["native"])
        self.assertEqual(self.json("run", "relu", "ones:f32[4]", "--device", "cpu", "--explain")["explain"]["device"], "cpu")
        self.fails(1, "FAILED_PRECONDITION", "run", "relu", "ones:f32[4]", "--device", "cuda:7")
        self.fails(1, "FAILED_PRECONDITION", "run", "relu", "ones:f32[4]", "--priority", "", "--strict")

    def test_fake_and_explain_take_bare_shapes_and_compute_nothing(self):
        document = self.json("fake", "topk", "x=f32[2,4096]", "k=8")
        self.assertEqual(document["outputs"], [{"dtype": "f32", "shape": [2, 8]}, {"dtype": "i64", "shape": [2, 8]}])
        self.assertEqual(self.opctl("fake", "relu", "bf16[3]")[0], "0: bf16 [3]\n")
        huge = self.json("fake", "relu", "x=f32[1048576,1048576]")
        self.assertEqual(huge["outputs"][0]["shape"], [1048576, 1048576])
        document = self.json("explain", "rms_norm", "f32[2,8]", "none", "1e-5", "--priority", "native")
        self.assertEqual((document["provider"], document["explain"]["effective"]), ("native", ["native"]))
        self.assertNotIn("times_ns", document["explain"])
        self.assertIn("native would run", self.opctl("explain", "rms_norm", "f32[2,8]", "none", "1e-5", "--priority", "native")[0])
        self.fails(1, "INVALID_ARGUMENT", "fake", "rms_norm", "f32[2,8]", "f32[7]", "1e-5")

    def graph(self, **changes):
        path = os.path.join(self.folder, "graph.json")
        graph = {"name": "mlp", "inputs": ["x"], "constants": {"w": "ones:f32[6,4]"}, "states": {"sum": "zeros:f32[2,6]"}, "nodes": [
            {"name": "late", "op": "relu", "args": {"x": "$norm#1"}},
            {"name": "up", "op": "linear", "args": {"x": "$x", "weight": "$w"}},
            {"name": "turned", "op": "relu", "args": {"x": {"of": "$up", "dtype": "f32", "shape": [6, 2], "strides": [1, 6]}}, "priority": ["native"]},
            {"name": "norm", "op": "fused_add_rms_norm", "args": {"x": "$up", "x_residual": {"of": "$sum", "donate": True}, "weight": None, "epsilon": 1e-5}}],
            "outputs": {"turned": "$turned", "sum": "$late"}}
        graph.update(changes)
        with open(path, "w") as file:
            json.dump(graph, file)
        return path

    def test_a_graph_runs_from_a_file(self):
        out = json.loads(self.opctl("--json", "graph", self.graph(), "run", "x=ones:f32[2,4]", "--explain", "-c", "3")[0])
        self.assertEqual([o["name"] for o in out["outputs"]], ["turned", "sum"])
        self.assertEqual((out["outputs"][0]["shape"], out["outputs"][0]["min"], out["outputs"][1]["max"]), ([6, 2], 4, 12))  # the state grows by 4 a run
        nodes = {node["node"]: node for node in out["explain"]["nodes"]}
        self.assertEqual((nodes["turned"]["provider"], nodes["turned"]["level"]), ("native", "node"))
        self.assertFalse(out["explain"]["dispatched"])
        out = self.opctl("graph", self.graph(), "explain", "x=f32[2,4]")[0]
        self.assertIn("node       up: linear by", out)
        self.assertIn("turned: f32 [6, 2]\n", out)

    def test_what_is_wrong_with_a_graph_is_said(self):
        for changes, arguments, text in [
                ({"nodes": 3}, [], '"nodes" is no list'),
                ({"outputs": ["$nobody"]}, [], "outputs[0]: 'nobody' is neither an input nor a node"),
                ({"constants": {"w": "f32[2]"}}, [], "w has no values"),
                ({"constants": {"x": "ones:f32[2]"}}, [], "two inputs or nodes are called 'x'"),
                ({"nodes": [{"name": "a", "op": "relu", "args": {"x": "$b"}}, {"name": "b", "op": "relu", "args": {"x": "$a"}}], "outputs": []}, [],
                 "'a' waits for 'b' waits for 'a'"),
                ({}, ["x=ones:f32[2,5]"], "node 'up': linear: weight has shape [6, 4], expected [6, 5]"),
                ({}, ["y=ones:f32[2,5]"], "mlp: unknown argument \"y\"")]:
            self.assertIn(text, self.opctl("graph", self.graph(**changes), "run", *arguments, code=1)[1])
        self.opctl("graph", self.graph(), "walk", code=2)
        with open(self.graph(), "w") as file:
            file.write("{\"nodes\": [")
        self.assertIn("not JSON, from byte", self.opctl("graph", os.path.join(self.folder, "graph.json"), "run", code=1)[1])

    def test_no_control_character_reaches_the_terminal(self):
        evil = "a\x1b[31mb\x07\x7f\u009b\u202e"
        for args in (["run", evil, "1"], ["describe", evil], ["run", "relu", "@" + self.path(evil) + ".npy"], [evil], ["run", "relu", "x=" + evil]):
            for extra in ([], ["--json"]):
                code = 2 if args[0] == evil or args[-1].startswith("x=") else 1
                out, err = self.opctl(*args, *extra, code=code)
                for text in (out, err):
                    self.assertFalse(re.search("[\x1b\x07\x7f\u009b\u202e]", text), repr(text))
        write_safetensors(self.path("evil.safetensors"), {"in.x": ("F32", [1], floats(1))}, {"op": evil, "attrs": "{}", "error": "ABORTED"})
        out = self.opctl("verify", self.path("evil.safetensors"), code=1)[0]
        self.assertFalse(re.search("[\x1b\x07\x7f\u009b\u202e]", out), repr(out))
        self.assertIn("want ABORTED, got NOT_FOUND", out)


class Looking(Case):
    def test_ops_describe_providers(self):
        ops = self.json("ops")
        self.assertTrue({"rms_norm", "linear", "paged_attention"} <= {op["name"] for op in ops})
        self.assertIn("rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor\n", self.opctl("ops")[0])
        described = self.json("describe", "rms_norm")
        self.assertEqual(described["implementations"][0]["provider"], "native")
        self.assertTrue(described["sizes"] and described["doc"] and described["effective"])
        self.assertRegex(described["implementations"][0]["uuid"], r"^[0-9a-f]{64}$")
        text = self.opctl("describe", "rms_norm")[0]
        for word in ("native", "effective", "level", "uuid", "sizes"):
            self.assertIn(word, text)
        providers = {p["name"]: p for p in self.json("providers")}
        self.assertTrue(providers["native"]["available"] and "rms_norm" in providers["native"]["ops"])
        self.assertIn("native", self.opctl("providers")[0])
        self.fails(1, "NOT_FOUND", "describe", "no_such_op")
        self.opctl("describe", code=2)

    def test_health_is_an_exit_code_and_a_reason(self):
        self.assertEqual(self.opctl("health")[0], "healthy\n")
        self.assertEqual(self.json("health"), {"healthy": True, "unhealthy": [], "degraded": []})

    def test_info_and_ping(self):
        info = self.json("info")
        self.assertEqual(info["pid"], self.daemon.pid)
        self.assertTrue(info["session"]["admin"])
        self.assertTrue(any(self.address.split(":", 1)[1] in listener for listener in info["listeners"]))
        self.assertIn("pid %d" % self.daemon.pid, self.opctl("info")[0])
        ping = self.json("ping", "-c", "7")
        self.assertEqual(ping["count"], 7)
        self.assertTrue(0 < ping["min_ns"] <= ping["mean_ns"] <= ping["max_ns"])
        self.assertIn("10 round trips", self.opctl("ping")[0])

    def test_priority_get_set_clear(self):
        before = self.json("priority", "get", "silu")
        after = self.json("priority", "set", "silu", "native")
        self.assertEqual((after["level"], after["stored"], after["effective"]), ("server", ["native"], ["native"]))
        self.assertEqual(self.json("run", "silu", "ones:f32[2]", "--explain")["explain"]["level"], "server")
        self.assertEqual(self.json("priority", "set", "silu", "")["stored"], [])
        self.assertEqual(self.json("priority", "clear", "silu"), before)
        self.assertTrue(self.json("priority", "set", "*", "native")["set"])
        self.assertFalse(self.json("priority", "clear", "*")["set"])
        self.assertIn("effective  ", self.opctl("priority", "get", "silu")[0])
        self.fails(1, "NOT_FOUND", "priority", "set", "silu", "no_such_provider")
        self.fails(1, "NOT_FOUND", "priority", "get", "no_such_op")

    def test_log_level_and_module(self):
        self.assertEqual(self.json("log-level", "debug"), {"done": True})
        self.assertEqual(self.opctl("log-level", "info")[0], "set\n")
        self.fails(1, "INVALID_ARGUMENT", "log-level", "loud")
        self.opctl("module", "load", self.path("absent.so"), code=1)


class Verify(Case):
    def test_every_golden_case_passes(self):
        out = self.opctl("verify", GOLDEN)[0]
        count = len([n for n in os.listdir(GOLDEN) if n.endswith(".safetensors")])
        lines = out.strip().split("\n")
        self.assertEqual(lines[-1], "%d passed, 0 failed" % count)
        self.assertEqual(len(lines), count + 1)
        self.assertTrue(all(line.startswith("PASS  ") for line in lines[:-1]))

    def test_provider_skips_what_it_refuses_and_all_runs_each(self):
        out = self.opctl("verify", "--provider", "native", GOLDEN)[0]
        self.assertRegex(out.strip().split("\n")[-1], r"^\d+ passed, 0 failed, 0 skipped$")
        document = self.json("verify", "--all", *sorted(os.path.join(GOLDEN, n) for n in os.listdir(GOLDEN) if n.startswith("rms_norm-0")))
        self.assertEqual(document["failed"], 0)
        self.assertIn("native", {c["provider"] for c in document["cases"]})
        self.assertGreaterEqual(len(document["cases"]), 10)
        self.fails(1, "NOT_FOUND", "verify", "--provider", "no_such_provider", GOLDEN)

    def one(self, outputs, metadata, code, inputs=None):
        path = self.path("case.safetensors")
        tensors = dict(inputs or {"in.x": ("F32", [2], floats(1, -2))})
        tensors.update(outputs)
        write_safetensors(path, tensors, dict({"op": "relu", "attrs": "{}"}, **metadata))
        document = self.json("verify", path, code=code)
        self.assertEqual(document["failed"], 1 if code else 0)
        return document["cases"][0]

    def test_a_wrong_result_fails_and_says_why(self):
        good = {"out.0": ("F32", [2], floats(1, 0))}
        self.assertEqual(self.one(good, {"atol": "0", "rtol": "0"}, 0)["max_abs"], 0)
        wrong = self.one({"out.0": ("F32", [2], floats(1.5, 0))}, {"atol": "0.25", "rtol": "0"}, 1)
        self.assertIn("result 0 at [0] got 1, want 1.5, off by 0.5, allowed 0.25 (1 of 2 elements)", wrong["why"])
        self.assertEqual(wrong["max_abs"], 0.5)
        self.one({"out.0": ("F32", [2], floats(1.5, 0))}, {"atol": "0.5", "rtol": "0"}, 0)
        self.one({"out.0": ("F32", [2], floats(1.5, 0))}, {"atol": "0", "rtol": "0", "atol.0": "0.5"}, 0)
        self.assertIn("is f32 [2], want f32 [1, 2]", self.one({"out.0": ("F32", [1, 2], floats(1, 0))}, {}, 1)["why"])
        self.assertIn("want f64 [2]", self.one({"out.0": ("F64", [2], struct.pack("<2d", 1, 0))}, {}, 1)["why"])
        self.assertIn("gave 1 results, want 2", self.one(dict(good, **{"out.1": good["out.0"]}), {}, 1)["why"])
        self.one({"out.0": ("F32", [2], floats(math.nan, 0))}, {"atol": "9", "rtol": "9"}, 1)
        self.one({"out.0": ("F32", [2], floats(math.inf, 0))}, {"atol": "9", "rtol": "9"}, 1)
        both = {"in.x": ("F32", [2], floats(math.nan, math.inf))}
        self.one({"out.0": both["in.x"]}, {"atol": "0", "rtol": "0"}, 0, inputs=both)
        self.assertIn("ran, want INVALID_ARGUMENT", self.one({}, {"error": "INVALID_ARGUMENT"}, 1)["why"])
        self.assertIn("no status", self.one({}, {"error": "WRONG"}, 1)["why"])
        self.assertIn("atol is 'x'", self.one(good, {"atol": "x"}, 1)["why"])
        self.assertIn("NOT_FOUND", self.one(good, {"op": "no_such_op"}, 1)["why"])
        self.assertIn("no JSON object", self.one(good, {"attrs": "7"}, 1)["why"])
        out = self.opctl("verify", self.path("absent.safetensors"), self.folder + "/nowhere", code=1)[0]
        self.assertTrue(out.endswith("\n0 passed, 2 failed\n"), out)


class Bench(Case):
    def test_bench_measures_and_splits(self):
        for extra in ([], ["--resident"], ["--in-flight", "8", "--provider", "native", "--dtype", "bf16"]):
            with self.subTest(extra=extra):
                document = self.json("bench", "rms_norm", "--shape", "4x64", "--duration", "0.3", "--warmup", "0.05", *extra)
                self.assertGreater(document["requests"], 10)
                latency = document["latency_ns"]
                self.assertTrue(0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"])
                self.assertGreater(document["split_ns"]["samples"], 0)
                self.assertGreater(document["split_ns"]["kernel"], 0)
                self.assertTrue(document["provider"])
        out = self.opctl("bench", "rms_norm", "--duration", "0.1", "--warmup", "0")[0]
        for label in ("requests ", "latency ", "split "):
            self.assertIn("\n" + label, out)
        self.fails(1, "NOT_FOUND", "bench", "no_such_op", "--duration", "0.1")


class Reaching(unittest.TestCase):
    """Where opctl connects; each test has its own daemon or none."""

    opctl = Case.opctl
    json = Case.json
    fails = Case.fails

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="opctl-")
        self.nowhere = {"XDG_RUNTIME_DIR": self.folder}

    def tearDown(self):
        shutil.rmtree(self.folder)

    def test_without_a_daemon_ops_run_in_this_process_and_opctl_says_so(self):
        out, err = self.opctl("run", "relu", "f32[2]=-1,1", env=self.nowhere, connect=False)
        self.assertIn("[0, 1]", out)
        self.assertRegex(err, r"^opctl: note: no daemon answers \(.*\): running in this process\n")
        out = self.opctl("verify", os.path.join(GOLDEN, "rms_norm-00.safetensors"), env=self.nowhere, connect=False)[0]
        self.assertTrue(out.endswith("\n1 passed, 0 failed\n"))
        self.assertTrue(self.json("ops", env=self.nowhere, connect=False))
        asked = self.opctl("--connect", "embedded:", "run", "relu", "ones:f32[1]", env=self.nowhere, connect=False)
        self.assertNotIn("note", asked[1], "who asks for it needn't be told")

    def test_without_a_daemon_commands_about_it_are_unavailable(self):
        for args in (["info"], ["ping"], ["priority", "set", "relu", "native"], ["priority", "clear", "relu"], ["module", "load", "/x.so"],
                     ["log-level", "debug"], ["drain"]):
            with self.subTest(args=args):
                self.assertIn("needs a daemon", self.fails(3, "UNAVAILABLE", *args, env=self.nowhere, connect=False))

    def test_an_address_that_nobody_answers_is_no_reason_to_run_here(self):
        absent = "unix:" + os.path.join(self.folder, "absent.sock")
        self.fails(3, "UNAVAILABLE", "ops", env={"OPD_ADDRESS": absent}, connect=False)
        self.fails(3, "UNAVAILABLE", "--connect", absent, "ops", connect=False)
        self.opctl("--connect", "carrier-pigeon:x", "ops", code=1, connect=False)

    def test_default_socket_and_drain(self):
        daemon, self.address = start_daemon(self.folder)
        try:
            self.assertEqual(self.opctl("run", "relu", "ones:f32[1]", env=self.nowhere, connect=False)[1], "")
            self.assertEqual(self.json("info", env=self.nowhere, connect=False)["pid"], daemon.pid)
            self.assertEqual(self.opctl("info", env={"OPD_ADDRESS": self.address}, connect=False)[1], "")
            self.assertEqual(self.opctl("drain", "--timeout", "5")[0], "draining\n")
            self.assertEqual(daemon.wait(timeout=20), 0)
        finally:
            stop_daemon(daemon)


if __name__ == "__main__":
    unittest.main(verbosity=2)
