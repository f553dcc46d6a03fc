#!/usr/bin/python3
"""Provider modules: one built outside of the tree against an installed opd, bad ones, and a device, each in a real daemon.

    test_modules.py [Sample] [Bad] [Device] [Resident] [Together] [Ahead] [DeviceGraphs] [LostDevice] [StuckDevice]

OPD_BIN, OPCTL_BIN, OPD_CONFORMANCE name the programs, OPD_BUILD the build folder (it is installed from), OPD_MODULES the test modules,
OPD_CMAKE and OPD_CC what the sample is built with. Defaults: build/ of this tree.
"""
import glob
import hashlib
import json
import math
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
from harness import Client, Daemon, Failed, f32, inline, pb, run, unpack_f32

BUILD = os.environ.get("OPD_BUILD", os.path.join(harness.ROOT, "build"))
OPCTL = os.environ.get("OPCTL_BIN", os.path.join(BUILD, "bin", "opctl"))
CONFORMANCE = os.environ.get("OPD_CONFORMANCE", os.path.join(BUILD, "bin", "conformance"))
CMAKE = os.environ.get("OPD_CMAKE", "cmake")
CC = os.environ.get("OPD_CC", "cc")
SAMPLE = os.path.join(harness.ROOT, "tests", "modules", "sample")
GOLDEN = os.path.join(harness.ROOT, "tests", "golden")
DEVICE = harness.built_module("device")
REASON_MODULE, REASON_DTYPE, REASON_DEVICE, REASON_SIZE = 3, 5, 12, 13


def bad(name):
    return harness.built_module(name)


def command(*words, code=0, **options):
    """Runs a program; its stdout. Its exit code must be `code`."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=harness.PATIENCE, **options)
    if done.returncode != code:
        raise AssertionError("%s ended with %d, expected %d:\n%s%s" % (words, done.returncode, code, done.stdout, done.stderr))
    return done.stdout


def opctl(daemon, *words, code=0):
    """opctl --json; the document."""
    return json.loads(command(OPCTL, "--connect", daemon.address, "--json", *words, code=code))


def daemon_for(case, *flags, **options):
    """One that the test's end stops, which must work."""
    daemon = Daemon(*flags, **options)
    case.addCleanup(daemon.stop)
    return daemon


def write_case(path, op, attrs, inputs, outputs, atol):
    """A file for opctl verify; inputs and outputs: name → (shape, f32 values)."""
    header = {"__metadata__": {"op": op, "attrs": json.dumps(attrs), "atol": str(atol), "rtol": "0"}}
    data = b""
    for name, (shape, values) in list(inputs.items()) + list(outputs.items()):
        part = f32(*values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


# ---- A third party's modules ----------------------------------------------------------------------------------------------------


class Sample(unittest.TestCase):
    """Somebody else's provider and op, built elsewhere from what an installation has."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="opd-sample-")
        cls.addClassCleanup(shutil.rmtree, cls.folder, True)
        cls.prefix = os.path.join(cls.folder, "prefix")
        command(CMAKE, "--install", BUILD, "--prefix", cls.prefix)
        source = shutil.copytree(SAMPLE, os.path.join(cls.folder, "source"))
        cls.by_cmake = os.path.join(cls.folder, "by-cmake")
        command(CMAKE, "-G", "Ninja", "-S", source, "-B", cls.by_cmake, "-DCMAKE_PREFIX_PATH=" + cls.prefix, "-DCMAKE_C_COMPILER=" + CC)
        command(CMAKE, "--build", cls.by_cmake)
        cls.by_cc = os.path.join(cls.folder, "by-cc")
        packages = os.path.dirname(glob.glob(cls.prefix + "/**/opd-provider.pc", recursive=True)[0])
        command("sh", os.path.join(source, "build.sh"), cls.by_cc, env=dict(os.environ, CC=CC, PKG_CONFIG_PATH=packages))
        flags = [word for name in ("sample", "softcap") for word in ("--module", cls.module(name))]
        cls.daemon = Daemon(*flags)
        cls.addClassCleanup(cls.daemon.stop)

    @classmethod
    def module(cls, name, folder=None):
        return os.path.join(folder or cls.by_cmake, "opd-provider-%s.so" % name)

    def tearDown(self):
        harness.check_healthy(self, self.daemon)

    def test_headers_and_package_are_installed_and_link_nothing_of_opd(self):
        for name in ("provider", "status", "dtype", "tensor", "reason"):
            self.assertTrue(os.path.exists(os.path.join(self.prefix, "include", "opd", name + ".h")), name)
        for folder in (self.by_cmake, self.by_cc):
            for name in ("sample", "softcap"):
                needed = [line for line in command("readelf", "-d", self.module(name, folder)).splitlines() if "NEEDED" in line]
                self.assertFalse([line for line in needed if "opd" in line], needed)
                exported = command("nm", "-D", "--defined-only", self.module(name, folder)).split("\n")
                self.assertEqual([line.split()[-1] for line in exported if line], ["opd_module_get"])

    def test_the_daemon_says_who_they_are(self):
        found = {provider["name"]: provider for provider in opctl(self.daemon, "providers")}
        self.assertEqual((found["sample"]["version"], found["sample"]["source"], found["sample"]["available"]), ("1.2.3", self.module("sample"), True))
        self.assertEqual(found["softcap"]["version"], "0.9")

    def test_describe_has_the_ops_schema_sizes_and_implementations(self):
        op = opctl(self.daemon, "describe", "softcap")
        self.assertEqual(op["schema"], "softcap(Tensor x, float cap=30.0) -> Tensor")
        text = json.dumps(op)
        for word in ("cap * tanh(x / cap)", '"rows"', '"hidden"', "1024"):
            self.assertIn(word, text)
        self.assertEqual({one["provider"] for one in op["implementations"]}, {"native", "softcap"})
        with open(os.path.join(SAMPLE, "softcap.c"), "rb") as file:
            uuid = hashlib.sha256(file.read()).hexdigest()
        self.assertEqual({one["uuid"] for one in op["implementations"]}, {uuid})

    def test_the_op_runs_and_defaults_are_filled_in(self):
        values = [-100.0, -1.0, 0.0, 0.5, 30.0, 1000.0]
        with Client(self.daemon.address) as client:
            for priority in (["softcap"], ["native"]):
                for cap in (30.0, 2.0):
                    attributes = {} if cap == 30.0 else {"cap": cap}
                    request = run("softcap", inline([2, 3], f32(*values)), run_priority=priority, run_inline_results=True, **attributes)
                    reply, _ = client.ask(request)
                    self.assertEqual(reply.run.provider, priority[0])
                    for got, x in zip(unpack_f32(reply.run.outputs[0].tensor.inline), values):
                        self.assertAlmostEqual(got, cap * math.tanh(x / cap), delta=1e-4)

    def test_the_ops_own_errors_name_the_value(self):
        with Client(self.daemon.address) as client:
            with self.assertRaisesRegex(Failed, "softcap: cap is -1, expected more than 0") as caught:
                client.ask(run("softcap", inline([1], f32(1)), cap=-1.0))
            self.assertEqual(caught.exception.status, harness.INVALID_ARGUMENT)
            with self.assertRaisesRegex(Failed, "softcap: x has dtype i32, expected f32 or f64"):
                client.ask(run("softcap", inline([1], struct.pack("<i", 1), dtype=5)))

    def test_the_provider_runs_with_its_plan_and_its_uuid(self):
        done = opctl(self.daemon, "run", "rms_norm", "ones:f32[4,4096]", "ones:f32[4096]", "0.0", "--priority", "sample", "--strict", "--uuid")
        with open(os.path.join(SAMPLE, "sample.c"), "rb") as file:
            self.assertEqual(done["uuid"], hashlib.sha256(file.read()).hexdigest())
        self.assertEqual(done["provider"], "sample")
        self.assertEqual((done["outputs"][0]["min"], done["outputs"][0]["max"]), (1, 1))

    def test_verify_passes_or_skips_every_case_of_its_op(self):
        cases = sorted(glob.glob(GOLDEN + "/rms_norm-*.safetensors"))
        done = opctl(self.daemon, "verify", "--provider", "sample", *cases)
        self.assertEqual(done["failed"], 0, done)
        self.assertGreater(done["passed"], 3)
        self.assertGreater(done["skipped"], 0)
        self.assertEqual(done["passed"] + done["skipped"], len(cases))

    def test_verify_runs_a_case_of_the_new_op_on_every_provider_and_finds_a_wrong_one(self):
        with tempfile.TemporaryDirectory() as folder:
            values = [-3.0, 0.0, 0.25, 7.0]
            for name, error in (("good", 0.0), ("wrong", 0.5)):
                wanted = [2 * math.tanh(x / 2) + error for x in values]
                write_case(folder + "/%s.safetensors" % name, "softcap", {"cap": 2.0}, {"in.x": ([2, 2], values)}, {"out.0": ([2, 2], wanted)}, 1e-5)
            done = opctl(self.daemon, "verify", "--all", folder + "/good.safetensors")
            self.assertEqual((done["passed"], done["failed"]), (2, 0))
            done = opctl(self.daemon, "verify", "--all", folder + "/wrong.safetensors", code=1)
            self.assertEqual((done["passed"], done["failed"]), (0, 2))

    def test_explain_gives_the_predicates_and_the_plans_reasons(self):
        done = opctl(self.daemon, "explain", "rms_norm", "x=bf16[2,8]", "weight=bf16[8]", "epsilon=1e-5", "--priority", "sample,cpu")
        self.assertEqual(done["provider"], "cpu")
        self.assertEqual(done["explain"]["skipped"], [{"provider": "sample", "code": "dtype", "reason": "dtype: x bf16, only f32"}])
        done = opctl(self.daemon, "explain", "rms_norm", "x=f32[2,70000]", "weight=f32[70000]", "epsilon=1e-5", "--priority", "sample,cpu")
        self.assertEqual(done["explain"]["skipped"], [{"provider": "sample", "code": "size", "reason": "size: 70000 elements a row, at most 65536"}])
        done = opctl(self.daemon, "explain", "softcap", "x=f32[2,8]", "--priority", "softcap")
        self.assertEqual((done["provider"], done["explain"]["effective"]), ("softcap", ["softcap", "native"]))

    def test_a_plans_refusal_runs_the_next_and_strict_says_why(self):
        words = ("run", "rms_norm", "ones:f32[1,65537]", "none", "0.0", "--priority")
        self.assertEqual(opctl(self.daemon, *words, "sample,cpu")["provider"], "cpu")
        failed = opctl(self.daemon, *words, "sample", "--strict", code=1)
        self.assertEqual(failed["status"], "FAILED_PRECONDITION")
        self.assertIn("sample (size: 65537 elements a row, at most 65536)", failed["message"])

    def test_the_ops_generator_feeds_bench(self):
        done = opctl(self.daemon, "bench", "softcap", "--provider", "softcap", "--shape", "4x64", "--duration", "0.2")
        self.assertGreater(done["requests"], 0)

    def test_conformance_passes_for_both_builds(self):
        for folder in (self.by_cmake, self.by_cc):
            for name, op, rows in (("sample", "rms_norm", 1), ("softcap", "softcap", 2)):
                words = ("--module", self.module(name, folder), "--op", op) + (("--provider", name) if rows == 1 else ())
                out = command(CONFORMANCE, *words, "--shrink", "8")
                self.assertEqual(len([line for line in out.splitlines() if line.startswith(op)]), rows, out)
                self.assertRegex(out.splitlines()[-1], r"^[1-9]\d+ passed, 0 failed$")

    def test_loaded_at_run_time_it_serves_sessions_that_were_there_before(self):
        daemon = daemon_for(self)
        with Client(daemon.address) as client:
            request = run("softcap", inline([1], f32(0)))
            with self.assertRaisesRegex(Failed, 'no op "softcap"'):
                client.ask(request)
            opctl(daemon, "module", "load", self.module("softcap", self.by_cc))
            self.assertEqual(client.ask(request)[0].run.provider, "native")
            self.assertEqual(opctl(daemon, "module", "load", self.module("softcap", self.by_cmake), code=1)["status"], "ALREADY_EXISTS")
            self.assertEqual(client.ask(request)[0].run.provider, "native")

    def test_a_priority_that_is_set_gets_a_warning_when_an_implementation_comes(self):
        daemon = daemon_for(self)
        opctl(daemon, "priority", "set", "rms_norm", "native")
        opctl(daemon, "module", "load", self.module("sample"))
        daemon.wait_log("warn", "registered while a priority is set", "provider=sample", "op=rms_norm")
        done = opctl(daemon, "run", "rms_norm", "ones:f32[1,8]", "none", "0.0")
        self.assertEqual(done["provider"], "native")


# ---- Bad modules ----------------------------------------------------------------------------------------------------------------

# name → (status, what the text says beside the path or the provider's name)
BAD = {
    "bad_name": ("INVALID_ARGUMENT", "expected [a-z_][a-z_0-9]*"),
    "bad_schema": ("INVALID_ARGUMENT", "relu(Tensor x -> Tensor"),
    "bad_uuid": ("INVALID_ARGUMENT", 'uuid "0123", expected 64 lowercase hex digits'),
    "duplicate_impl": ("ALREADY_EXISTS", "duplicate_impl.relu is registered already"),
    "duplicate_provider": ("ALREADY_EXISTS", "provider cpu is there already (built in)"),
    "huge_state": ("INVALID_ARGUMENT", "at most 1 GiB"),
    "keyword_only": ("INVALID_ARGUMENT", "keyword-only parameters (*) are refused"),
    "missing_library": ("FAILED_PRECONDITION", "libopd-test-missing.so"),
    "name_native": ("INVALID_ARGUMENT", "provider name native is reserved"),
    "name_unfused": ("INVALID_ARGUMENT", "provider name unfused is reserved"),
    "no_name": ("INVALID_ARGUMENT", "expected [a-z_][a-z_0-9]*"),
    "no_open": ("INVALID_ARGUMENT", "no open function"),
    "no_symbol": ("INVALID_ARGUMENT", "no symbol opd_module_get"),
    "null_table": ("INVALID_ARGUMENT", "opd_module_get returned NULL"),
    "op_dims": ("INVALID_ARGUMENT", 'dims "rows,hidden" names 2 sizes'),
    "op_in_place": ("INVALID_ARGUMENT", "in-place pair 0 names no Tensor parameter and result"),
    "op_name": ("INVALID_ARGUMENT", "[a-z_][a-z_0-9]*"),
    "op_native_schema": ("INVALID_ARGUMENT", "differs from the op's"),
    "op_no_native": ("INVALID_ARGUMENT", "op bad_op has no native implementation"),
    "op_no_shape": ("INVALID_ARGUMENT", "op bad_op has no shape function"),
    "op_taken": ("ALREADY_EXISTS", "op relu is registered already"),
    "open_fails": ("FAILED_PRECONDITION", "its library is too old: 1.2, at least 2.0"),
    "open_mute": ("UNKNOWN", "open failed"),
    "other_schema": ("INVALID_ARGUMENT", 'differs from the op\'s "relu(Tensor x) -> Tensor"'),
    "short_backend": ("INVALID_ARGUMENT", "needs a kind"),
    "short_impl": ("INVALID_ARGUMENT", "opd_impl has 24 bytes"),
    "short_module": ("INVALID_ARGUMENT", "opd_module has 16 bytes"),
    "unknown_op": ("NOT_FOUND", "no op no_such_op"),
    "wrong_abi": ("FAILED_PRECONDITION", "built for provider ABI 2, this opd has 1"),
}


class Bad(unittest.TestCase):
    """Each is refused for its reason, and nothing of it remains."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp(prefix="opd-bad-")
        cls.addClassCleanup(shutil.rmtree, cls.folder, True)
        cls.daemon = Daemon("--priority", "relu=native")
        cls.addClassCleanup(cls.daemon.stop)

    def tearDown(self):
        harness.check_healthy(self, self.daemon)

    def registry(self, client):
        return [client.ask(request)[0] for request in
                (pb.Request(list_providers=pb.Empty()), pb.Request(list_ops=pb.Empty()), pb.Request(describe=pb.Describe(op="relu")))]

    def refused(self, path, status, words):
        with Client(self.daemon.address) as client:
            before = self.registry(client)
            logged = self.daemon.log_text().count("module not loaded")
            failed = client.call(pb.Request(load_module=pb.LoadModule(path=path)))[0]
            self.assertEqual(failed.status, getattr(harness, status), failed)
            self.assertIn(words, failed.message)
            self.assertNotRegex(failed.message, "[\x00-\x1f]")
            line = self.daemon.wait_log("warn", "module not loaded", count=logged + 1)
            self.assertIn("path=", line)
            self.assertEqual(self.registry(client), before)
            return line

    def file(self, name, mode=0o755, source=DEVICE):
        path = os.path.join(self.folder, name)
        shutil.copyfile(source, path)
        os.chmod(path, mode)
        return path

    def test_every_bad_module_is_there(self):
        sources = glob.glob(os.path.join(harness.ROOT, "tests", "modules", "bad", "*.c"))
        self.assertEqual({os.path.basename(path)[:-2] for path in sources} - {"forgetful", "late", "missing"}, set(BAD))

    def test_bad_modules_are_refused_with_their_reason(self):
        """Hardening: providers-abi, providers-symbol"""
        for name, (status, words) in BAD.items():
            with self.subTest(name):
                self.refused(bad(name), status, words)
                self.refused(bad(name), status, words)

    def test_an_open_that_fails_is_closed_with_its_state(self):
        seen = self.daemon.log_text().count("closed with its memory")
        self.refused(bad("open_fails"), "FAILED_PRECONDITION", "too old")
        self.daemon.wait_log("closed with its memory", "provider=open_fails", count=seen + 1)
        self.assertNotIn("closed without its memory", self.daemon.log_text())
        with Client(self.daemon.address) as client, self.assertRaisesRegex(Failed, 'no op "bad_half"'):
            client.ask(run("bad_half", inline([1], f32(0))))

    def test_what_is_no_module_is_refused(self):
        text = self.file("text.so")
        with open(text, "w") as file:
            file.write("not an ELF file at all, although it is long enough for a header of one" * 4)
        self.refused(text, "FAILED_PRECONDITION", "invalid ELF header")
        short = self.file("short.so")
        with open(short, "w"):
            pass
        self.refused(short, "FAILED_PRECONDITION", "file too short")
        self.refused(self.folder, "INVALID_ARGUMENT", "not a regular file")
        self.refused("/dev/null", "INVALID_ARGUMENT", "not a regular file")
        self.refused(os.path.join(self.folder, "nothing.so"), "NOT_FOUND", "No such file")
        self.refused("relative.so", "INVALID_ARGUMENT", "expected an absolute path")

    def test_a_cut_module_is_refused(self):
        for size in (70, 2000, 4096):
            path = self.file("cut-%d.so" % size)
            with open(path, "r+b") as file:
                file.truncate(size)
            self.refused(path, "FAILED_PRECONDITION", "the file is cut off: %d bytes are less" % size)

    def test_a_file_that_others_can_write_is_refused(self):
        self.refused(self.file("others.so", 0o757), "PERMISSION_DENIED", "mode 0757: others could have written it")
        self.refused(self.file("group.so", 0o775), "PERMISSION_DENIED", "mode 0775: others could have written it")

    def test_a_file_in_a_folder_that_others_can_write_is_refused_also_behind_a_link(self):
        folder = os.path.join(self.folder, "open")
        os.mkdir(folder)
        path = shutil.copy(DEVICE, folder + "/device.so")
        os.chmod(path, 0o755)
        os.chmod(folder, 0o777)
        self.refused(path, "PERMISSION_DENIED", "its folder is owned by uid")
        link = os.path.join(self.folder, "link.so")
        os.symlink(path, link)
        self.refused(link, "PERMISSION_DENIED", "its folder is owned by uid")

    def test_somebody_elses_file_is_refused(self):
        if os.geteuid() != 0:
            self.skipTest("only root can give a file away")
        path = self.file("foreign.so")
        os.chown(path, 12345, 12345)
        self.refused(path, "PERMISSION_DENIED", "owned by uid 12345")

    def test_configured_names_stay_usable_in_lists_as_statically_unsupported(self):
        """Hardening: sessions-list-unsupported"""
        flags = []
        for name in BAD:
            flags += ["--module", "m_%s=%s" % (name, bad(name))]
        flags += ["--module", "gone=" + self.folder + "/never-there.so", "--priority", "relu=gone,m_wrong_abi,native"]
        daemon = daemon_for(self, *flags)
        with Client(daemon.address) as client:
            reply, _ = client.ask(run("relu", inline([2], f32(-1, 1)), run_explain=True))
            self.assertEqual(reply.run.provider, "native")
            self.assertEqual([(skip.provider, skip.code) for skip in reply.run.explain.skipped], [("gone", REASON_MODULE), ("m_wrong_abi", REASON_MODULE)])
            self.assertIn("No such file", reply.run.explain.skipped[0].reason)
            self.assertIn("built for provider ABI 2", reply.run.explain.skipped[1].reason)
            for name in BAD:
                reply, _ = client.ask(run("relu", inline([1], f32(1)), run_priority=["m_" + name, "native"], run_explain=True))
                self.assertEqual(reply.run.provider, "native")
                self.assertEqual([(skip.provider, skip.code) for skip in reply.run.explain.skipped], [("m_" + name, REASON_MODULE)])
            with self.assertRaises(Failed) as caught:
                client.ask(run("relu", inline([1], f32(1)), run_priority=["m_bad_uuid"], run_strict=True))
            self.assertEqual(caught.exception.status, harness.FAILED_PRECONDITION)
        found = {provider["name"]: provider for provider in opctl(daemon, "providers")}
        for name in BAD:
            self.assertFalse(found["m_" + name]["available"])
            self.assertTrue(found["m_" + name]["reason"])
            self.assertEqual(found["m_" + name]["source"], bad(name))
        self.assertFalse({"native", "cpu", "gone"} - set(found))
        self.assertNotIn("unfused", found)
        self.assertEqual(daemon.log_text().count("module not loaded"), len(BAD) + 1)

    def test_without_a_configured_name_reserved_ones_are_not_remembered(self):
        daemon = daemon_for(self, "--module", bad("name_unfused"), "--module", bad("name_native"), "--module", bad("duplicate_provider"))
        found = {provider["name"]: provider["reason"] for provider in opctl(daemon, "providers")}
        self.assertFalse({"native", "cpu"} - set(found))
        self.assertNotIn("unfused", found)
        for name in set(found) - {"native", "cpu"}:  # the default lists name them
            self.assertTrue(found[name].startswith("no such module is configured"), found[name])

    def test_modules_that_come_with_opd_are_known_by_name(self):
        folder = os.path.realpath(os.path.join(os.path.dirname(harness.OPD), "..", "lib", "opd"))
        built = {name[len("opd-provider-"):-len(".so")] for name in os.listdir(folder)}
        self.assertIn("openblas", built)
        daemon = daemon_for(self)
        path = os.path.join(folder, "opd-provider-openblas.so")
        before = {provider["name"]: provider for provider in opctl(daemon, "providers")}
        self.assertEqual(before["openblas"]["reason"], "no such module is configured; --module openblas would load it")
        opctl(daemon, "module", "load", "openblas")
        after = {provider["name"]: provider for provider in opctl(daemon, "providers")}
        self.assertEqual(after["openblas"]["source"], path)
        # All of them, but those that are there already; what can't be opened here is told.
        daemon = daemon_for(self, "--module", "all", "--isolated", "openblas")
        found = {provider["name"]: provider for provider in opctl(daemon, "providers")}
        self.assertEqual({name for name, provider in found.items() if provider["source"] != "built in"}, built)
        for name in built:
            self.assertEqual(found[name]["source"], os.path.join(folder, "opd-provider-%s.so" % name))
            self.assertEqual(found[name]["available"], not found[name]["reason"], found[name])
        self.assertTrue(found["openblas"]["isolated"])
        self.assertFalse(found["onednn"]["isolated"])

    def test_a_module_that_this_opd_was_built_without_is_told_and_the_others_run(self):
        alone = os.path.join(self.folder, "opd")  # nothing lies beside it
        shutil.copy(harness.OPD, alone)
        daemon = daemon_for(self, "--module", "cuda", "--priority", "relu=cuda,cpu", wrapper=("sh", "-c", 'shift; exec "$0" "$@"', alone))
        found = {provider["name"]: provider for provider in opctl(daemon, "providers")}
        self.assertRegex(found["cuda"]["reason"], r"/opd-provider-cuda\.so: No such file or directory \(a module that comes with opd, where it was built and installed with what that needs\)$")
        self.assertIn("a module that comes with opd", daemon.log_text())
        with Client(daemon.address) as client:
            reply = client.ask(run("relu", inline([2], f32(-1, 1)), run_explain=True))[0].run
        self.assertEqual((reply.provider, reply.explain.skipped[0].provider, reply.explain.skipped[0].code), ("cpu", "cuda", REASON_MODULE))

    def test_a_module_that_comes_later_takes_the_place_of_its_missing_name(self):
        path = os.path.join(self.folder, "later.so")
        daemon = daemon_for(self, "--module", "testdev=" + path, "--priority", "relu=testdev,native")
        with Client(daemon.address) as client:
            request = run("relu", inline([2], f32(-1, 1)))
            self.assertEqual(client.ask(request)[0].run.provider, "native")
            self.file("later.so")
            opctl(daemon, "module", "load", path)
            self.assertEqual(client.ask(request)[0].run.provider, "testdev")

    def test_registering_outside_of_open_is_refused(self):
        daemon = daemon_for(self, "--module", bad("late"))
        with Client(daemon.address) as client:
            reply, _ = client.ask(run("relu", inline([1], f32(1)), run_priority=["late", "native"], run_explain=True))
            self.assertIn("late: register_impl outside of its open function", reply.run.explain.skipped[0].reason)
        self.assertNotIn("late", json.dumps(opctl(daemon, "describe", "silu")))

    def test_memory_that_a_module_forgets_ends_in_a_warning_not_in_a_crash(self):
        daemon = Daemon("--module", bad("forgetful"))
        self.addCleanup(shutil.rmtree, daemon.folder, True)
        daemon.own_folder = False
        daemon.stop()
        self.assertIn("providers left host memory unfreed allocations=2", daemon.log_text())

    def test_a_module_that_takes_long_to_open_holds_up_nobody(self):
        gate = os.path.join(self.folder, "gate")
        daemon = daemon_for(self, "--threads", "1", environment={"OPD_TEST_DEVICE_OPEN_GATE": gate})
        with Client(daemon.address) as loader, Client(daemon.address) as client:
            loader.submit(pb.Request(load_module=pb.LoadModule(path=DEVICE)))
            try:
                for _ in range(20):
                    request, payload, _ = harness.rms_norm(rows=64, columns=512)
                    client.ask(request, payload)
                client.info()
                with Client(daemon.address) as another:
                    another.ping()
            finally:
                open(gate, "w").close()
            self.assertEqual(loader.read_reply()[1].status, harness.OK)

    def test_a_reload_that_fails_leaves_no_module_behind(self):
        daemon = daemon_for(self, config="limits: {stall: 50s}")
        module = "modules: [{name: testdev, path: %s}]\n" % self.file("reloaded.so")
        self.assertNotIn("testdev", {provider["name"] for provider in opctl(daemon, "providers")})
        for count, lists in enumerate(("{relu: [testdev, nobody]}", "{relu: [testdev], nothing: [testdev]}"), 1):
            daemon.write_config(module + "limits: {stall: 51s}\npriorities: " + lists)
            daemon.signal(signal.SIGHUP)
            daemon.wait_log("error", "not reloaded", count=count)
            self.assertNotIn("testdev", {provider["name"] for provider in opctl(daemon, "providers")})
            self.assertEqual([name for name in opctl(daemon, "info")["devices"] if name.startswith("test")], [])
        daemon.write_config(module + "priorities: {relu: [testdev]}")
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("info", "configuration reloaded")
        with Client(daemon.address) as client:
            self.assertEqual(client.ask(run("relu", inline([2], f32(-1, 1))))[0].run.provider, "testdev")

    def test_a_module_taken_out_of_the_configuration_while_it_is_busy_stays_until_the_end(self):
        """Hardening: providers-unload"""
        module = "modules: [{name: testdev, path: %s}]\npriorities: {relu: [testdev]}\n" % self.file("busy.so")
        daemon = daemon_for(self, config=module, environment={"OPD_TEST_DEVICE_DELAY_US": "20000"})
        with Client(daemon.address) as client:
            request = run("relu", inline([2], f32(-1, 1)))
            ids = [client.submit(request) for _ in range(20)]
            ping = client.submit(pb.Request(ping=pb.Empty()))
            replies = []
            while not replies or replies[-1][0] != ping:  # whose answer comes when the others have been dispatched
                replies.append(client.read_reply())
            daemon.write_config("priorities: {relu: [native]}\n")
            daemon.signal(signal.SIGHUP)
            daemon.wait_log("warn", "a module stays loaded until a restart", "busy.so")
            replies[-1:] = [client.read_reply() for _ in range(len(ids) + 1 - len(replies))]
            self.assertEqual(sorted(found for found, _, _ in replies), sorted(ids))
            for _, reply, data in replies:
                self.assertEqual((reply.status, reply.run.provider, unpack_f32(data)), (harness.OK, "testdev", (0.0, 1.0)))
            self.assertEqual(client.ask(request)[0].run.provider, "native")
            daemon.write_config(module)
            daemon.signal(signal.SIGHUP)
            daemon.wait_log("configuration reloaded", count=2)
            self.assertEqual(client.ask(request)[0].run.provider, "testdev")

    def test_check_config_names_a_module_that_is_missing_from_the_lists(self):
        command(harness.OPD, "--check-config", "--module", "gone=/nowhere.so", "--priority", "relu=gone,native")
        done = subprocess.run([harness.OPD, "--check-config", "--priority", "relu=gone,native"], capture_output=True, text=True, timeout=harness.PATIENCE)
        self.assertEqual(done.returncode, 2)
        self.assertIn('"gone" is no provider of it', done.stderr)


# ---- A device -------------------------------------------------------------------------------------------------------------------


def numbers(count, start=0):
    return [float((start + 7 * i) % 23 - 11) for i in range(count)]


def add_request(start, count=32, **options):
    """(request, wanted) of a + b, different for every start."""
    a, b = numbers(count, start), numbers(count, start * 3 + 1)
    shape = [count]
    request = run("add", inline(shape, f32(*a)), inline(shape, f32(*b)), run_priority=["testdev"], run_strict=True, run_inline_results=True, **options)
    return request, [x + y for x, y in zip(a, b)]


def relu_request(start, count=32, **options):
    x = numbers(count, start)
    request = run("relu", inline([count], f32(*x)), run_priority=["testdev"], run_strict=True, run_inline_results=True, **options)
    return request, [max(value, 0.0) for value in x]


def inline_result(reply):
    return list(unpack_f32(reply.run.outputs[0].tensor.inline))


class DeviceDaemon(Daemon):
    """With the test device; its end checks that the device got everything back."""

    def __init__(self, *flags, fault=None, config=None, **settings):
        environment = {"OPD_TEST_DEVICE_" + name.upper(): str(value) for name, value in settings.items()}
        if fault is not None:
            environment["OPD_TEST_DEVICE_FAULT"] = fault
        super().__init__("--module", DEVICE, "--inline", "0", *flags, config=config, environment=environment)

    def stop(self, code=0):
        folder, self.own_folder = self.folder, False
        try:
            super().stop(code)
            self.said = self.log_text()
            if "closed clean: 0 allocations, 0 streams, 0 events, 0 plans were left" not in self.log_text():
                raise AssertionError("the device didn't get everything back: " + self.output())
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Device(unittest.TestCase):
    """Work on a device: right, ordered, failing alone, and nobody else's trouble."""

    @classmethod
    def setUpClass(cls):
        cls.shared = DeviceDaemon()
        cls.addClassCleanup(cls.shared.stop)

    def daemon(self, *flags, **settings):
        daemon = DeviceDaemon(*flags, **settings)
        self.addCleanup(daemon.stop)
        return daemon

    def client(self, daemon=None):
        client = Client((daemon or self.shared).address)
        self.addCleanup(client.close)
        return client

    def check(self, reply, wanted, provider="testdev"):
        self.assertEqual((reply.status, reply.message), (harness.OK, ""))
        self.assertEqual(reply.run.provider, provider)
        self.assertEqual(inline_result(reply), wanted)

    # ---- What waits

    def test_what_was_taken_out_of_the_queue_together_can_be_taken_back(self):
        folder = tempfile.mkdtemp(prefix="opd-gate-")
        self.addCleanup(shutil.rmtree, folder, True)
        gates = [folder + "/first", folder + "/second"]
        daemon = self.daemon(fault="stall:1,halt:2", gate=gates[0], gate2=gates[1])
        client = Client(daemon.address, features=["cancel"])
        self.addCleanup(client.close)
        watcher = self.client(daemon)
        requests = [add_request(i, run_device="test:0") for i in range(7)]
        numbers = [client.submit(request) for request, _ in requests]
        harness.wait_until(lambda: watcher.info().device_states[0].jobs == len(numbers), "one that stalls, and the others in the queue")
        open(gates[0], "w").close()
        daemon.wait_log("a launch halts")  # of the first of those that were taken together
        cancelled = {numbers[3], numbers[6]}
        client.send(b"".join(harness.frame(harness.CANCEL, number) for number in sorted(cancelled)))
        replies = {}
        while not cancelled <= replies.keys():  # of the others only the one that stalled can have ended
            number, reply, _ = client.read_reply()
            replies[number] = reply
        self.assertEqual([replies.pop(number).status for number in sorted(cancelled)], [harness.CANCELLED] * len(cancelled))
        self.assertLessEqual(set(replies), {numbers[0]})
        open(gates[1], "w").close()
        while len(replies) < len(numbers) - len(cancelled):
            number, reply, _ = client.read_reply()
            replies[number] = reply
        for number, (_, wanted) in zip(numbers, requests):
            if number not in cancelled:
                self.check(replies[number], wanted)

    # ---- What runs where

    def test_results_are_right_and_explain_names_device_and_moves(self):
        client = self.client()
        request, payload, wanted = harness.rms_norm(rows=3, columns=8)
        request.run.priority.names.append("testdev")
        request.run.explain = True
        reply, data = client.ask(request, payload)
        for got, want in zip(unpack_f32(data), wanted):
            self.assertAlmostEqual(got, want, places=5)
        explain = reply.run.explain
        self.assertIn(explain.device, ("test:0", "test:1"))
        moves = [(move.operand, getattr(move, "from"), move.to, move.bytes) for move in explain.moves]
        here = explain.device
        self.assertEqual(moves, [("x", "cpu", here, 96), ("weight", "cpu", here, 32), ("result", here, "cpu", 96)])
        self.assertFalse(explain.on_loop)
        for make in (add_request, relu_request):
            request, wanted = make(5)
            self.check(client.ask(request)[0], wanted)

    def test_a_dry_run_names_device_and_moves(self):
        done = opctl(self.shared, "explain", "relu", "f32[2,8]", "--priority", "testdev", "--device", "test:1")
        self.assertEqual((done["provider"], done["explain"]["device"]), ("testdev", "test:1"))
        self.assertEqual([move["bytes"] for move in done["explain"]["moves"]], [64, 64])

    def test_views_offsets_and_empty_tensors_come_over_whole(self):
        client = self.client()
        data = numbers(40, 3)
        strided = inline([3, 2], f32(*data), strides=[7, 3], byte_offset=84)
        plain = inline([3, 2], f32(*numbers(6)))
        request = run("add", strided, plain, run_priority=["testdev"], run_strict=True, run_inline_results=True)
        wanted = [data[21 + 7 * i + 3 * j] + numbers(6)[2 * i + j] for i in range(3) for j in range(2)]
        self.check(client.ask(request)[0], wanted)
        overlapping = inline([4, 3], f32(*data), strides=[0, 1], byte_offset=140)
        other = inline([4, 3], f32(*numbers(12)))
        request = run("add", overlapping, other, run_priority=["testdev"], run_strict=True, run_inline_results=True)
        self.check(client.ask(request)[0], [data[35 + i % 3] + numbers(12)[i] for i in range(12)])
        for op, operands in (("add", 2), ("relu", 1)):
            request = run(op, *[inline([0, 4], b"")] * operands, run_priority=["testdev"], run_strict=True, run_inline_results=True)
            self.check(client.ask(request)[0], [])

    def test_a_kept_result_is_an_operand_on_the_device(self):
        client = self.client()
        request, wanted = add_request(1)
        request.run.outputs.add(keep=True)
        first = client.submit(request)
        second = run("relu", pb.Tensor(result=pb.ResultRef(request=first, output=0)), run_priority=["testdev"], run_inline_results=True)
        client.submit(second)
        replies = dict(client.read_reply()[:2] for _ in range(2))
        self.check(replies[first], wanted)
        self.check(replies[first + 1], [max(value, 0.0) for value in wanted])

    def test_device_filters(self):
        client = self.client()
        for device, found in (("test", ("test:0", "test:1")), ("test:0", ("test:0",)), ("test:1", ("test:1",))):
            request, wanted = add_request(2, run_device=device, run_explain=True)
            reply, _ = client.ask(request)
            self.check(reply, wanted)
            self.assertIn(reply.run.explain.device, found)
        request, wanted = add_request(2, run_device="cpu", run_explain=True)
        request.run.strict = False
        reply, _ = client.ask(request)
        self.check(reply, wanted, "native")
        self.assertEqual([(skip.provider, skip.code) for skip in reply.run.explain.skipped], [("testdev", REASON_DEVICE)])
        for device in ("test:2", "test:65535", "nowhere", "nowhere:0"):
            request, _ = add_request(2, run_device=device)
            with self.assertRaises(Failed) as caught:
                client.ask(request)
            self.assertEqual(caught.exception.status, harness.FAILED_PRECONDITION, device)
            self.assertIn("testdev (device: ", caught.exception.text)
        for device in ("test:", "test:x", ":1", "Test", "test:0:0"):
            with self.assertRaises(Failed) as caught:
                client.ask(add_request(2, run_device=device)[0])
            self.assertEqual(caught.exception.status, harness.INVALID_ARGUMENT, device)

    def test_a_predicate_and_a_plan_on_the_device_refuse(self):
        client = self.client()
        double = inline([2], struct.pack("<2d", -1, 1), dtype=10)
        reply, _ = client.ask(run("relu", double, run_priority=["testdev", "native"], run_explain=True))
        self.assertEqual(reply.run.provider, "native")
        self.assertEqual(reply.run.explain.skipped[0].code, REASON_DTYPE)
        for _ in range(2):  # the second time the refusal is known before
            request, wanted = relu_request(1, count=65537, run_explain=True)
            request.run.priority.names.append("native")
            reply, _ = client.ask(request)
            self.check(reply, wanted, "native")
            self.assertEqual(reply.run.explain.skipped[0].code, REASON_SIZE)
        with self.assertRaisesRegex(Failed, "65537 elements, at most 65536") as caught:
            client.ask(relu_request(1, count=65537)[0])
        self.assertEqual(caught.exception.status, harness.FAILED_PRECONDITION)

    def test_the_daemon_lists_its_devices(self):
        self.assertEqual(self.client().info().devices, ["cpu", "test:0", "test:1"])
        found = {provider["name"]: provider for provider in opctl(self.shared, "providers")}
        self.assertEqual(found["testdev"]["devices"], ["test:0", "test:1"])

    def test_a_second_backend_of_the_kind_is_refused(self):
        self.assertEqual(opctl(self.shared, "module", "load", DEVICE, code=1)["status"], "ALREADY_EXISTS")
        request, wanted = add_request(9)
        self.check(self.client().ask(request)[0], wanted)

    def test_checked_mode_works_on_a_device(self):
        client = self.client(self.daemon("--checked"))
        for make in (add_request, relu_request):
            request, wanted = make(4)
            self.check(client.ask(request)[0], wanted)

    def test_embedded_it_is_the_same(self):
        with tempfile.TemporaryDirectory() as folder:
            with open(folder + "/opd.yaml", "w") as file:
                file.write('modules: ["%s"]\npriorities: {"*": [testdev, cpu, native]}\n' % DEVICE)
            out = command(OPCTL, "--connect", "embedded:" + folder + "/opd.yaml", "--json", "run", "relu", "f32[3]=-1,0,2", "--explain")
            done = json.loads(out)
            self.assertEqual((done["provider"], done["explain"]["device"], done["outputs"][0]["first"]), ("testdev", "test:0", [0, 0, 2]))

    # ---- Many at once

    def test_many_in_flight_from_several_clients_are_each_answered_right(self):
        daemon = self.daemon(delay_us=300, event_us=500)
        failures = []

        def work(number):
            try:
                with Client(daemon.address) as client:
                    wanted = {}
                    for i in range(60):
                        request, values = (add_request if i % 2 else relu_request)(number * 1000 + i, count=1 + (i * 13) % 300)
                        wanted[client.submit(request)] = values
                    for _ in range(60):
                        found, reply, _ = client.read_reply()
                        self.check(reply, wanted.pop(found))
                    self.assertFalse(wanted)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])

    def test_work_spreads_over_both_devices(self):
        daemon = self.daemon(delay_us=2000)
        client = self.client(daemon)
        wanted = {}
        for i in range(20):
            request, values = add_request(i, run_explain=True)
            wanted[client.submit(request)] = values
        used = set()
        for _ in range(20):
            found, reply, _ = client.read_reply()
            self.check(reply, wanted[found])
            used.add(reply.run.explain.device)
        self.assertEqual(used, {"test:0", "test:1"})

    def test_a_late_completion_holds_up_nobody(self):
        daemon = self.daemon("--threads", "1", event_us=2000000)
        slow, other = self.client(daemon), self.client(daemon)
        request, wanted = add_request(1)
        slow.submit(request)
        for _ in range(20):
            fast, payload, values = harness.rms_norm()
            other.ask(fast, payload)
            slow.ping()  # overtakes on its own connection too: its reply comes first
        self.assertFalse(select.select([slow.sock], [], [], 0)[0])
        self.check(slow.read_reply()[1], wanted)

    def test_a_deadline_passes_while_the_device_is_busy(self):
        client = self.client(self.daemon(delay_us=20000))
        for i in range(40):
            client.submit(add_request(i, run_device="test:0")[0])
        late = client.submit(add_request(0, run_device="test:0", run_timeout_us=1000)[0])
        replies = dict(client.read_reply()[:2] for _ in range(41))
        self.assertEqual(replies[late].status, harness.DEADLINE_EXCEEDED)
        self.assertEqual({reply.status for found, reply in replies.items() if found != late}, {harness.OK})

    def test_a_device_is_shared_as_the_cpu_is(self):
        """Another session's flood is before one's request for a job, and not for all that came first; classes, quotas and numbers are the same."""
        daemon = self.daemon(delay_us=20000)
        flood, other = self.client(daemon), self.client(daemon)
        one_at_a_time = flood.ask(add_request(0, run_device="test:0")[0])[0]  # how long they take is known now
        self.assertEqual(one_at_a_time.status, harness.OK)
        sent = [flood.submit(add_request(i, run_device="test:0")[0]) for i in range(40)]
        asked, answers = flood.submit(pb.Request(ping=pb.Empty())), {}  # all of them are there; some may have been answered
        while asked not in answers:
            answers.update([flood.read_reply()[:2]])
        request, wanted = relu_request(1, run_device="test:0", run_explain=True)
        reply = other.ask(request)[0]
        self.check(reply, wanted)
        self.assertLessEqual(reply.run.explain.behind.tenant_jobs, 1)
        request, wanted = relu_request(2, run_device="test:0", run_explain=True, run_service_class=pb.REALTIME)
        reply = other.ask(request)[0]
        self.check(reply, wanted)
        self.assertEqual(reply.run.explain.behind.tenant_jobs, 0)
        lanes = {lane.name: lane for lane in other.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.lanes}
        self.assertGreater(lanes["test:0"].device_ns, 3 * 15000000)
        while len(answers) < len(sent) + 1:
            answers.update([flood.read_reply()[:2]])
        self.assertEqual({answers[number].status for number in sent}, {harness.OK})
        other.ask(pb.Request(set_session=pb.SetSession(session=flood.hello.session, quotas=[pb.Quota(kind=pb.QUOTA_QUEUED, limit=4)])))
        sent = [flood.submit(add_request(i, run_device="test:0")[0]) for i in range(40)]
        refused = [reply for _, reply, _ in (flood.read_reply() for _ in sent) if reply.status != harness.OK]
        self.assertTrue(refused)
        for reply in refused:
            self.assertEqual(reply.status, harness.RESOURCE_EXHAUSTED)
            self.assertRegex(reply.message, r"^add: 4 requests of this session wait for the test:0 lane, at most 4 may: try again in about \d+ us$")
        mine = [state for state in other.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.sessions if state.session == flood.hello.session][0]
        self.assertEqual((mine.queued, mine.running, mine.usage.jobs), (0, 0, 81 - len(refused)))

    def test_those_queued_for_a_device_end_at_once_when_cancelled(self):
        client = Client(self.daemon(delay_us=20000).address, features=["cancel"])
        self.addCleanup(client.close)
        count = 80  # more than both devices take at once
        made = [relu_request(i, run_device="test:0") for i in range(count)]
        frames = [harness.frame(harness.REQUEST, i + 1, request.SerializeToString()) for i, (request, _) in enumerate(made)]
        gone = [i for i in range(count // 2, count) if i % 3 != 0]
        client.send(b"".join(frames) + b"".join(harness.frame(harness.CANCEL, i + 1) for i in gone + gone))
        order = []
        for _ in range(count):
            number, reply, _ = client.read_reply()
            order.append(number - 1)
            if number - 1 in gone:
                self.assertEqual((reply.status, reply.message), (harness.CANCELLED, "relu: the client cancelled the request"))
            else:
                self.check(reply, made[number - 1][1])
        self.assertEqual(sorted(order), list(range(count)))
        self.assertLess(order.index(gone[-1]), count - 10)  # not when its turn would have come

    def test_a_disconnect_in_flight_leaves_nothing(self):
        daemon = self.daemon(delay_us=3000)
        for number in range(3):
            client = Client(daemon.address)
            for i in range(64):
                client.submit(add_request(i)[0])
            if number == 1:
                client.read_reply()
            client.close()
        request, wanted = relu_request(8)
        self.check(self.client(daemon).ask(request)[0], wanted)
        with Client(daemon.address) as client:
            harness.wait_until(lambda: client.info().memory_bytes == 0, "the ledger at zero")

    def test_a_drain_lets_work_in_flight_finish(self):
        daemon = DeviceDaemon(delay_us=20000, event_us=20000)
        client = self.client(daemon)
        wanted = {}
        for i in range(12):
            request, values = add_request(i)
            wanted[client.submit(request)] = values
        found, reply, _ = client.read_reply()
        self.check(reply, wanted.pop(found))
        daemon.signal(15)
        for _ in range(11):
            found, reply, _ = client.read_reply()
            self.check(reply, wanted.pop(found))
        client.close()
        daemon.wait()
        daemon.stop(0)

    def test_a_forced_end_waits_for_nothing(self):
        daemon = DeviceDaemon(fault="kernel:1+", delay_us=30000)
        client = self.client(daemon)
        for i in range(20):
            request, _ = add_request(i, run_retry=True)  # the kernel fails: native would be next, also when the daemon has ended
            request.run.priority.names.append("native")
            client.submit(request)
        client.read_reply()
        daemon.signal(15)
        daemon.wait_log("draining")
        daemon.signal(15)
        daemon.wait()
        Daemon.stop(daemon, 1)  # the device isn't taken apart: a kernel could run for hours

    # ---- Failures

    def fails_once(self, fault, words, make=add_request, status=harness.INTERNAL, **settings):
        """The first request fails with that; the next ones are right."""
        with self.subTest(fault):
            daemon = DeviceDaemon(fault=fault, **settings)
            try:
                with Client(daemon.address) as client:
                    reply, _ = client.call(make(1)[0])
                    self.assertEqual(reply.status, status, reply.message)
                    self.assertIn(words, reply.message)
                    for i in range(3):
                        request, wanted = make(i)
                        self.check(client.ask(request)[0], wanted)
                    harness.check_healthy(self, daemon)
            finally:
                daemon.stop()

    def test_a_failure_of_the_backend_is_that_requests_error(self):
        self.fails_once("stream:1", "add on test:0: stream_create: injected failure", status=harness.UNAVAILABLE)
        self.fails_once("event:1", "add on test:0: event_create: injected failure")
        self.fails_once("record:1", "add on test:0: event_record: injected failure", delay_us=2000)
        self.fails_once("copy_in:1", "add on test:0: copy_in: injected failure")
        self.fails_once("copy_in:2", "add on test:0: copy_in: injected failure")
        self.fails_once("copy_out:1", "add on test:0: copy_out: injected failure")
        for count in (1, 2, 3):  # x, the result, scratch
            self.fails_once("alloc:%d" % count, "relu on test:0: alloc: injected failure", relu_request)

    def test_a_kernels_failure_is_that_requests_error(self):
        """Hardening: providers-fails"""
        self.fails_once("launch:1", "launch: injected failure")
        self.fails_once("kernel:1", "add on test:0: kernel: injected failure")
        self.fails_once("mute:1", "testdev.add failed", status=harness.UNKNOWN)

    def test_one_failure_among_many_in_flight_is_one_failure(self):
        # Events are used again: how many are made depends on how many jobs meet, but the first one always is.
        for fault in ("kernel:4", "launch:4", "record:4", "copy_out:4", "event:1"):
            with self.subTest(fault):
                daemon = DeviceDaemon(fault=fault, delay_us=2000)
                try:
                    with Client(daemon.address) as client:
                        wanted = {}
                        for i in range(10):
                            request, values = add_request(i, run_device="test:1")
                            wanted[client.submit(request)] = values
                        failed = []
                        for _ in range(10):
                            found, reply, _ = client.read_reply()
                            if reply.status == harness.OK:
                                self.check(reply, wanted[found])
                            else:
                                failed.append(found)
                        self.assertEqual(failed, [int(fault[-1])])
                finally:
                    daemon.stop()

    def test_a_backend_that_always_fails_fails_always_and_alone(self):
        """Hardening: promise-containment"""
        for fault in ("stream:1+", "record:1+", "alloc:1+", "kernel:1+"):
            with self.subTest(fault):
                daemon = DeviceDaemon(fault=fault)
                try:
                    with Client(daemon.address) as client:
                        for i in range(5):
                            self.assertIn("injected failure", client.call(add_request(i)[0])[0].message)
                    harness.check_healthy(self, daemon)
                finally:
                    daemon.stop()

    def test_retry_goes_on_with_the_next_provider_after_a_kernels_failure(self):
        client = self.client(self.daemon(fault="kernel:1,launch:3"))
        for _ in range(2):
            request, wanted = relu_request(3, run_retry=True, run_explain=True)
            request.run.priority.names.append("native")
            reply, _ = client.ask(request)
            self.check(reply, wanted, "native")
            self.assertEqual(reply.run.explain.device, "cpu")
            self.assertEqual(reply.run.explain.skipped[0].provider, "testdev")
            self.assertFalse(reply.run.explain.moves)
            self.check(client.ask(relu_request(4)[0])[0], relu_request(4)[1])  # the 2nd launch, the 4th

    def test_a_failed_kept_result_fails_its_dependents_and_names_it(self):
        client = self.client(self.daemon(fault="kernel:1"))
        request, _ = add_request(1)
        request.run.outputs.add(keep=True)
        first = client.submit(request)
        second = client.submit(run("relu", pb.Tensor(result=pb.ResultRef(request=first, output=0)), run_priority=["testdev"]))
        replies = dict(client.read_reply()[:2] for _ in range(2))
        self.assertEqual((replies[first].status, replies[second].status), (harness.INTERNAL, harness.ABORTED))

    def test_more_than_the_device_holds_is_resource_exhausted(self):
        """Hardening: providers-memory"""
        client = self.client(self.daemon(memory=1 << 16))
        for _ in range(2):
            reply, _ = client.call(add_request(1, count=1 << 13)[0])  # two operands and a result of 32 KiB
            self.assertEqual(reply.status, harness.RESOURCE_EXHAUSTED)
            self.assertIn("of at most 65536 in use", reply.message)
            request, wanted = add_request(1, count=1 << 11)
            self.check(client.ask(request)[0], wanted)

    def test_requests_in_flight_share_the_devices_memory_instead_of_failing(self):
        client = self.client(self.daemon(memory=1 << 20, delay_us=10000))
        wanted = {}
        for i in range(24):  # each 300 KiB
            request, values = add_request(i, count=25600, run_device="test:0")
            wanted[client.submit(request)] = values
        for _ in range(24):
            found, reply, _ = client.read_reply()
            self.check(reply, wanted[found])

class Resident(unittest.TestCase):
    """Tensors that live on a device: they stay where they are, move when somebody elsewhere must read them, and every move is told and paid for."""

    def daemon(self, *flags, **settings):
        daemon = DeviceDaemon(*flags, **settings)
        self.addCleanup(daemon.stop)
        return daemon

    def client(self, daemon=None, **settings):
        self.server = daemon or self.daemon(**settings)
        client = Client(self.server.address)
        self.addCleanup(client.close)
        return client

    def upload(self, client, values, shape=None, **fields):
        request = pb.Request(upload=pb.Upload(**fields))
        request.upload.tensor.CopyFrom(inline(shape or [len(values)], f32(*values)))
        return client.ask(request)[0].run.outputs[0].kept

    def fetch(self, client, handle, **view):
        reply, data = client.ask(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=handle, **view))))
        return list(unpack_f32(data))

    def where(self, client):
        return [tensor.device for tensor in client.ask(pb.Request(list_tensors=pb.ListTensors()))[0].tensors.tensors]

    def relu(self, client, operand, keep=False, no_copy=False, **options):
        options.setdefault("run_priority", ["testdev"])
        request = run("relu", operand, run_explain=True, run_inline_results=True, **options)
        request.run.outputs.add(keep=keep, no_copy=no_copy)
        return client.ask(request)[0].run

    def moves(self, reply):
        return [(move.operand, getattr(move, "from"), move.to, move.bytes) for move in reply.explain.moves]

    def test_a_kept_result_stays_on_its_device_and_is_read_there(self):
        client = self.client()
        first = self.relu(client, inline([4], f32(-1, 2, -3, 4)), keep=True, no_copy=True)
        here = first.explain.device
        self.assertEqual(self.moves(first), [("x", "cpu", here, 16)])
        self.assertEqual(self.where(client), [here])
        second = self.relu(client, pb.Tensor(handle=first.outputs[0].kept), keep=True, no_copy=True)
        self.assertEqual((second.explain.device, self.moves(second)), (here, []))  # home decides, and nothing moves
        self.assertEqual(self.fetch(client, second.outputs[0].kept), [0, 2, 0, 4])
        self.assertEqual(self.fetch(client, second.outputs[0].kept, dtype=9, shape=[2], strides=[2], byte_offset=4), [2, 4])
        self.assertEqual(self.fetch(client, second.outputs[0].kept, dtype=9, shape=[1], byte_offset=12), [4])

    def where_they_run(self, client, requests):
        sent = [client.submit(request) for request in requests]
        replies = dict(client.read_reply()[:2] for _ in sent)
        self.assertEqual({reply.status for reply in replies.values()}, {harness.OK})
        return [replies[number].run.explain.device for number in sent]

    def test_work_goes_where_it_is_done_first_by_what_it_has_cost(self):
        client = self.client(self.daemon(slow_us=500000))  # test:0 needs half a second for what test:1 does at once
        for device in ("test:0", "test:1", "test:0", "test:1", "test:1", "test:1"):  # the first time on each isn't believed
            client.ask(add_request(1, run_device=device)[0])
        burst = [add_request(1, run_explain=True)[0] for _ in range(8)]
        self.assertEqual(self.where_they_run(client, burst), ["test:1"] * 8)  # by numbers of jobs it would be four and four
        handle = self.upload(client, [-1, 2], device="test:0")
        self.assertEqual(self.relu(client, pb.Tensor(handle=handle)).explain.device, "test:0")  # but homes come first

    def pin(self, client, device, **more):
        return client.call(pb.Request(set_session=pb.SetSession(device=device, **more)))[0]

    def test_a_session_pins_its_device_and_nobody_elses(self):
        daemon = self.daemon("--listen", "tcp://127.0.0.1:0")
        mine, other = Client(daemon.tcp_addresses()[0]), self.client(daemon)
        self.addCleanup(mine.close)
        for device in ("test:1", "test:0"):
            self.assertEqual(self.pin(mine, device).status, harness.OK)
            self.assertEqual(set(self.where_they_run(mine, [add_request(1, run_explain=True)[0] for _ in range(6)])), {device})
            upload = pb.Request(upload=pb.Upload(tensor=inline([2], f32(1, 2)), device="test"))
            self.assertEqual(mine.call(upload)[0].status, harness.OK)
            self.assertEqual(self.where(mine)[-1], device)
        self.assertEqual(self.where_they_run(mine, [add_request(1, run_explain=True, run_device="test:1")[0]]), ["test:1"])  # the request says more
        shown = {state["session"]: state.get("device") for state in opctl(daemon, "sessions")["sessions"]}
        self.assertEqual((shown[mine.hello.session], shown[other.hello.session]), ("test:0", None))
        opctl(daemon, "session", str(mine.hello.session), "set", "device", "any")
        shown = {state["session"]: state.get("device") for state in opctl(daemon, "sessions")["sessions"]}
        self.assertIsNone(shown[mine.hello.session])
        self.assertEqual(self.pin(mine, "test:7").message, "device test:7: there is none to pin (a device, such as cuda:1, or any)")
        self.assertEqual(self.pin(mine, "cpu").status, harness.FAILED_PRECONDITION)
        for more in ({"session": other.hello.session}, {"weight": 200}, {"service_class": pb.REALTIME}):
            self.assertEqual(self.pin(mine, "test:1", **more).status, harness.PERMISSION_DENIED)

    def test_an_upload_goes_to_the_device_that_it_names(self):
        client = self.client()
        handle = self.upload(client, [1, -2, 3], device="test:1")
        self.assertEqual(self.where(client), ["test:1"])
        reply = self.relu(client, pb.Tensor(handle=handle))
        self.assertEqual((reply.explain.device, self.moves(reply)), ("test:1", [("result", "test:1", "cpu", 12)]))
        self.assertEqual(self.fetch(client, handle), [1, -2, 3])
        self.assertEqual(self.upload(client, [], shape=[0], device="test").index, 1)
        for device, status in (("test:7", harness.FAILED_PRECONDITION), ("gpu", harness.FAILED_PRECONDITION), ("x:y", harness.INVALID_ARGUMENT)):
            with self.assertRaises(Failed) as caught:
                self.upload(client, [1], device=device)
            self.assertEqual(caught.exception.status, status)

    def test_host_memory_that_comes_again_is_locked_and_given_back(self):
        daemon = DeviceDaemon()
        client = Client(daemon.address)
        rows = f32(*[float(i % 97) for i in range(32768)])  # 128 KiB: pages of its own
        self.upload(client, [1.0, -1.0], device="test")
        for _ in range(4):
            reply, data = client.ask(run("relu", harness.tensor([32768], 0, len(rows)), run_priority=["testdev"]), rows)
            self.assertEqual((reply.run.provider, data), ("testdev", rows))
        client.close()
        daemon.stop()
        locked = re.search(r"host memory: locked (\d+) times", daemon.said)
        self.assertGreaterEqual(int(locked[1]), 1)

    def test_an_upload_in_parts_is_written_on_the_device(self):
        client = self.client()
        request = pb.Request(upload=pb.Upload(parts=True, device="test:0"))
        request.upload.tensor.CopyFrom(pb.Tensor(dtype=9, shape=[6]))
        handle = client.ask(request)[0].run.outputs[0].kept
        for part in (1, 0):
            write = pb.Request(write=pb.Write(handle=handle, offset=12 * part))
            write.write.data.CopyFrom(inline([12], f32(*[3 * part + i for i in range(3)]), dtype=2))
            client.ask(write)
        self.assertEqual((self.where(client), self.fetch(client, handle)), (["test:0"], [0, 1, 2, 3, 4, 5]))

    def test_a_provider_of_the_cpu_reads_a_copy_and_the_next_one_the_same(self):
        client = self.client()
        handle = self.upload(client, [-1, 5], device="test:0")
        for moved in ([("x", "test:0", "cpu", 8)], []):
            reply = self.relu(client, pb.Tensor(handle=handle), run_priority=["native"])
            self.assertEqual((reply.provider, self.moves(reply), list(unpack_f32(reply.outputs[0].tensor.inline))), ("native", moved, [0, 5]))
        self.assertEqual(self.where(client), ["test:0"])

    def test_a_tensor_in_host_memory_comes_over_once(self):
        client = self.client()
        handle = self.upload(client, [-1, 5, 7])
        for moved in ([("x", "cpu", "test:0", 12)], []):
            reply = self.relu(client, pb.Tensor(handle=handle), run_device="test:0", no_copy=True, keep=True)
            self.assertEqual(self.moves(reply), moved)
        reply = self.relu(client, pb.Tensor(handle=handle), run_device="test:1", no_copy=True, keep=True)
        self.assertEqual(self.moves(reply), [("x", "cpu", "test:1", 12)])

    def test_from_one_device_to_another_through_the_host(self):
        client = self.client()
        handle = self.upload(client, [-1, 5, 7], device="test:0")
        reply = self.relu(client, pb.Tensor(handle=handle), run_device="test:1")
        self.assertEqual(self.moves(reply)[:2], [("x", "test:0", "cpu", 12), ("x", "cpu", "test:1", 12)])
        self.assertEqual(list(unpack_f32(reply.outputs[0].tensor.inline)), [0, 5, 7])

    def test_a_dry_run_tells_the_moves_of_tensors_that_live_there(self):
        client = self.client()
        handle = self.upload(client, [1, 2], device="test:1")
        request = run("relu", pb.Tensor(handle=handle), run_priority=["testdev"], run_mode=pb.DRY)
        reply = client.ask(request)[0].run
        self.assertEqual((reply.explain.device, self.moves(reply)), ("test:1", [("result", "test:1", "cpu", 8)]))
        request = run("relu", pb.Tensor(handle=handle), run_priority=["native"], run_mode=pb.DRY)
        self.assertEqual(self.moves(client.ask(request)[0].run), [("x", "test:1", "cpu", 8)])

    def fused(self, client, x, residual, **options):
        request = run("fused_add_rms_norm", x, residual, weight=None, epsilon=1e-6, run_priority=["testdev"], run_explain=True, **options)
        for _ in range(2):
            request.run.outputs.add(no_copy=True)
        return client.call(request)[0]

    def test_a_donation_works_in_place_on_the_device(self):
        client = self.client()
        x = self.upload(client, [1, 1, 1, 1], shape=[1, 4], device="test:0")
        residual = self.upload(client, [1, 2, 3, 4], shape=[1, 4], device="test:0")
        for step in range(1, 4):
            reply = self.fused(client, pb.Tensor(handle=x, donate=True), pb.Tensor(handle=residual, donate=True))
            self.assertEqual((reply.status, reply.message), (harness.OK, ""))
            self.assertEqual(self.moves(reply.run), [])
            before, x, residual = residual, reply.run.outputs[0].kept, reply.run.outputs[1].kept
            self.assertEqual(before.index, residual.index)
        self.assertEqual(self.where(client), ["test:0", "test:0"])
        got = self.fetch(client, residual)
        want, add = [1, 2, 3, 4], [1, 1, 1, 1]
        for _ in range(3):
            want = [a + b for a, b in zip(want, add)]
            scale = (sum(v * v for v in want) / 4 + 1e-6) ** -0.5
            add = [v * scale for v in want]
        for a, b in zip(got, want):
            self.assertAlmostEqual(a, b, places=4)
        self.assertEqual(harness.FAILED_PRECONDITION, client.call(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=before))))[0].status)

    def test_a_donation_of_what_the_cpu_has_read_drops_its_copy(self):
        client = self.client()
        x = self.upload(client, [0, 0], shape=[1, 2], device="test:0")
        residual = self.upload(client, [3, 4], shape=[1, 2], device="test:0")
        self.relu(client, pb.Tensor(handle=residual), run_priority=["native"])
        reply = self.fused(client, pb.Tensor(handle=x), pb.Tensor(handle=residual, donate=True))
        reply = self.relu(client, pb.Tensor(handle=reply.run.outputs[1].kept), run_priority=["native"])
        self.assertEqual((list(unpack_f32(reply.outputs[0].tensor.inline)), len(reply.explain.moves)), ([3, 4], 1))

    def test_a_donated_tensor_of_the_host_moves_to_the_device(self):
        client = self.client()
        x, residual = self.upload(client, [0, 0], shape=[1, 2]), self.upload(client, [3, 4], shape=[1, 2])
        reply = self.fused(client, pb.Tensor(handle=x), pb.Tensor(handle=residual, donate=True), run_device="test:1")
        self.assertEqual(reply.status, harness.OK, reply.message)
        self.assertEqual(self.where(client), ["cpu", "test:1"])
        self.assertEqual(self.fetch(client, reply.run.outputs[1].kept), [3, 4])

    def test_a_kernel_that_fails_in_place_loses_the_tensor_and_one_on_a_copy_does_not(self):
        for device, status in (("test:0", harness.DATA_LOSS), ("", harness.OK)):
            with self.subTest(device):
                client = self.client(fault="kernel:1")
                x = self.upload(client, [0, 0], shape=[1, 2], device="test:0")
                residual = self.upload(client, [3, 4], shape=[1, 2], device=device)
                reply = self.fused(client, pb.Tensor(handle=x), pb.Tensor(handle=residual, donate=True))
                self.assertEqual(reply.status, harness.INTERNAL)
                reply, data = client.call(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=residual))))
                self.assertEqual(reply.status, status, reply.message)
                if status == harness.OK:
                    self.assertEqual(list(unpack_f32(data)), [3, 4])

    def test_indices_on_the_device_are_checked_there(self):
        client = self.client()
        table = self.upload(client, [0, 1, 2, 3, 4, 5], shape=[3, 2], device="test:0")
        for ids, wanted in (([2, 0], [4, 5, 0, 1]), ([1, 3], None), ([-1], None), ([], [])):
            request = pb.Request(upload=pb.Upload(device="test:0"))
            request.upload.tensor.CopyFrom(inline([len(ids)], struct.pack("<%dq" % len(ids), *ids), dtype=6))
            handle = client.ask(request)[0].run.outputs[0].kept
            reply = client.call(run("embedding", pb.Tensor(handle=handle), pb.Tensor(handle=table), run_priority=["testdev"],
                                    run_strict=True, run_inline_results=True))[0]
            if wanted is not None:
                self.assertEqual((reply.status, list(unpack_f32(reply.run.outputs[0].tensor.inline))), (harness.OK, wanted), reply.message)
            else:
                self.assertEqual((reply.status, reply.message),
                                 (harness.INVALID_ARGUMENT, "embedding: ids[%d] is %d, expected 0 to 2" % (len(ids) - 1, ids[-1])))
        host = inline([1], struct.pack("<q", 9), dtype=6)  # these the host has, and checks itself
        reply = client.call(run("embedding", host, pb.Tensor(handle=table), run_priority=["testdev"], run_strict=True))[0]
        self.assertEqual(reply.status, harness.INVALID_ARGUMENT)
        self.assertIn("ids[0] is 9, expected 0 to 2", reply.message)

    def test_published_weights_are_held_once_on_the_device(self):
        daemon = self.daemon(memory=5 << 18)
        first = self.client(daemon)
        handle = self.upload(first, numbers(128 * 1024))  # 512 KiB: two copies and a result wouldn't fit
        first.ask(pb.Request(publish=pb.Publish(tensor=pb.Tensor(handle=handle), name="w", lasting=True)))[0]
        clients = [first] + [self.client(daemon) for _ in range(4)]
        moved = []
        for client in clients:
            own = client.ask(pb.Request(open_tensor=pb.OpenTensor(name="w")))[0].publications.items[0].handle
            request = run("add", pb.Tensor(handle=own), pb.Tensor(handle=own), run_priority=["testdev"], run_device="test:0", run_explain=True)
            request.run.outputs.add(no_copy=True)
            moved.append(len(client.ask(request)[0].run.explain.moves))
        self.assertEqual(moved, [1, 0, 0, 0, 0])

    def test_a_tensor_published_from_a_device_stays_there(self):
        client = self.client()
        handle = self.upload(client, [1, 2, 3], device="test:1")
        reply = client.ask(pb.Request(publish=pb.Publish(tensor=pb.Tensor(handle=handle), name="w")))[0]
        self.assertEqual(reply.publications.items[0].sha256, hashlib.sha256(f32(1, 2, 3)).digest())
        other = self.client(self.server)
        own = other.ask(pb.Request(open_tensor=pb.OpenTensor(name="w")))[0].publications.items[0].handle
        self.assertEqual((self.where(other), self.fetch(other, own)), (["test:1"], [1, 2, 3]))

    def test_mirrors_give_way_when_the_device_is_full(self):
        client = self.client(memory=1 << 20)
        handles = [self.upload(client, numbers(64 * 1024, i)) for i in range(6)]  # 256 KiB each: not all of them fit at once
        for round in range(2):
            for i, handle in enumerate(handles):
                reply = self.relu(client, pb.Tensor(handle=handle), run_device="test:0", no_copy=True, run_strict=True)
                self.assertEqual(reply.provider, "testdev")
        self.assertEqual(self.moves(reply)[0][3], 256 * 1024)

    def test_what_lives_there_is_charged_there_and_given_back(self):
        daemon = self.daemon(memory=1 << 20)
        with Client(daemon.address) as client:
            self.upload(client, numbers(192 * 1024), device="test:0")
            self.assertEqual(client.info().session_memory_bytes, 0)
            with self.assertRaises(Failed) as caught:
                self.upload(client, numbers(192 * 1024), device="test:0")
            self.assertEqual(caught.exception.status, harness.RESOURCE_EXHAUSTED)
            self.assertIn("on test:0", caught.exception.text)
            self.upload(client, numbers(192 * 1024), device="test:1")
        with Client(daemon.address) as client:
            self.upload(client, numbers(192 * 1024), device="test:0")  # what the other session had is free again

    def test_a_full_device_lets_the_next_provider_try_where_the_request_says_so(self):
        client = self.client(memory=1 << 16)
        big = inline([1 << 13], f32(*numbers(1 << 13)))
        request = run("add", big, big, run_priority=["testdev", "native"], run_retry=True)
        self.assertEqual(client.ask(request)[0].run.provider, "native")
        request = run("add", big, big, run_priority=["testdev", "native"])
        self.assertEqual(client.call(request)[0].status, harness.RESOURCE_EXHAUSTED)

    def test_a_failed_copy_makes_no_mirror(self):
        client = self.client(fault="kernel:1")
        handle = self.upload(client, [-1, 5])
        request = run("relu", pb.Tensor(handle=handle), run_priority=["testdev"], run_device="test:0")
        self.assertEqual(client.call(request)[0].status, harness.INTERNAL)
        reply = self.relu(client, pb.Tensor(handle=handle), run_device="test:0")
        self.assertEqual((self.moves(reply)[0][0], list(unpack_f32(reply.outputs[0].tensor.inline))), ("x", [0, 5]))

    def test_a_session_that_goes_in_the_middle_leaves_nothing(self):
        daemon = self.daemon(delay_us=3000)
        for _ in range(3):
            client = Client(daemon.address)
            handle = self.upload(client, [-1, 5], device="test:0")
            for i in range(24):
                request = run("relu", pb.Tensor(handle=handle), run_priority=[["testdev"], ["native"]][i % 2])
                request.run.outputs.add(keep=True)
                client.submit(request)
                client.submit(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=handle))))
            client.close()
        with Client(daemon.address) as client:
            harness.wait_until(lambda: client.info().memory_bytes == 0, "the ledger at zero")

    def test_a_graph_of_the_cpu_reads_and_writes_tensors_of_a_device(self):
        client = self.client()
        constant = self.upload(client, [10, 20], device="test:0")
        state = self.upload(client, [1, 2], shape=[1, 2], device="test:1")
        operand = self.upload(client, [100, 200], device="test:0")
        graph = pb.Graph(name="sums")
        graph.inputs.add(name="c", kind=pb.GRAPH_CONSTANT).tensor.handle.CopyFrom(constant)
        graph.inputs.add(name="s", kind=pb.GRAPH_STATE).tensor.handle.CopyFrom(state)
        graph.inputs.add(name="x", kind=pb.GRAPH_INPUT)
        node = graph.nodes.add(name="sum", op="add")
        node.args.add().tensor.graph_input = 0
        node.args.add().tensor.graph_input = 2
        node = graph.nodes.add(name="state", op="fused_add_rms_norm")
        for name, index in (("x", 1), ("x_residual", 1)):
            node.args.add(name=name).tensor.graph_input = index
        node.args.add(name="weight").none.SetInParent()
        node.args.add(name="epsilon").float = 1e-6
        graph.outputs.add(name="sum").node.node = 0
        output = graph.outputs.add(name="twice")
        output.node.node, output.node.output = 1, 1
        request = pb.Request(run_graph=pb.RunGraph(once=graph, inline_results=True))
        request.run_graph.inputs.add().tensor.handle.CopyFrom(operand)
        for _ in range(2):
            reply = client.ask(request)[0]
            self.assertEqual([list(unpack_f32(output.tensor.inline)) for output in reply.run.outputs], [[110, 220], [2, 4]])
        self.assertEqual(self.where(client), ["test:0", "test:1", "test:0"])


class Together(unittest.TestCase):
    """Small kernels of several requests in one launch: each right, each failing alone."""

    daemon, client, upload, fetch = Resident.daemon, Resident.client, Resident.upload, Resident.fetch
    REQUESTS, COLUMNS = 8, 4

    def begin(self, fault="", **settings):
        """The first request is in its launch, and so many others wait behind it; what each must give."""
        folder = tempfile.mkdtemp(prefix="opd-gate-")
        self.addCleanup(shutil.rmtree, folder, True)
        self.addCleanup(lambda: self.assertIn("together: 1 launches of 8 calls", self.server.said))  # after its end
        self.gate = os.path.join(folder, "open")
        client = self.client(self.daemon(config="segment: 1s\n", whole=1, gate2=self.gate, fault="halt:1" + fault, **settings))
        watcher = Client(self.server.address)
        self.addCleanup(watcher.close)
        rows = [[float(i + j + 1) for j in range(self.COLUMNS)] for i in range(1 + self.REQUESTS)]
        requests = [self.norm(self.upload(client, row, device="test:0")) for row in rows]
        numbers = [client.submit(requests[0])]
        self.server.wait_log("a launch halts")
        numbers += [client.submit(request) for request in requests[1:]]
        harness.wait_until(lambda: watcher.info().device_states[0].jobs == len(numbers), "one that halts, and the others in the queue")
        return client, numbers, [[x / math.sqrt(sum(y * y for y in row) / len(row) + 1e-5) for x in row] for row in rows]

    def norm(self, handle):
        request = run("rms_norm", pb.Tensor(handle=handle), weight=None, epsilon=1e-5, run_device="test:0", run_priority=["testdev"], run_strict=True)
        request.run.outputs.add(keep=True, no_copy=True)
        return request

    def replies(self, client, numbers):
        open(self.gate, "w").close()
        replies = {}
        while len(replies) < len(numbers):
            number, reply, _ = client.read_reply()
            replies[number] = reply
        return [replies[number] for number in numbers]

    def right(self, client, reply, wanted):
        self.assertEqual((reply.status, reply.message), (harness.OK, ""))
        for got, want in zip(self.fetch(client, reply.run.outputs[0].kept), wanted):
            self.assertAlmostEqual(got, want, places=5)

    def test_those_that_wait_are_one_launch(self):
        client, numbers, wanted = self.begin()
        for reply, values in zip(self.replies(client, numbers), wanted):
            self.right(client, reply, values)

    def test_what_is_refused_together_runs_alone_and_fails_alone(self):
        client, numbers, wanted = self.begin(",together:1,launch:4")
        for i, (reply, values) in enumerate(zip(self.replies(client, numbers), wanted)):
            if i != 3:
                self.right(client, reply, values)
            else:
                self.assertEqual((reply.status, reply.message), (harness.INTERNAL, "launch: injected failure"))

    def test_a_device_that_is_lost_meanwhile_is_lost_to_all_of_them(self):
        client, numbers, _ = self.begin(",lost:2", instant=1)
        first, *others = self.replies(client, numbers)
        self.assertEqual(first.status, harness.OK)
        self.assertEqual({reply.status for reply in others}, {harness.DATA_LOSS})


class Ahead(unittest.TestCase):
    """Large uploads are copied to their device while their bytes still come."""

    daemon, client, fetch, where = Resident.daemon, Resident.client, Resident.fetch, Resident.where
    BYTES, FIRST = 12 << 20, 6 << 20

    def setUp(self):
        self.payload = struct.pack("<I", 0x3F800000) * (self.BYTES // 8) + struct.pack("<I", 0x40000000) * (self.BYTES // 8)

    def begin(self, client, device="test:0"):
        """Sends half of an upload; its number and the other half."""
        request = pb.Request(upload=pb.Upload(tensor=harness.tensor([self.BYTES // 4]), device=device))
        number, client.next_id = client.next_id, client.next_id + 1
        data = harness.frame(harness.REQUEST, number, request.SerializeToString(), self.payload)
        client.send(data[:-self.FIRST])
        return number, data[-self.FIRST:]

    def on_device(self, client, number=0):
        return client.info().device_states[number].memory_bytes

    def test_it_is_on_its_way_before_all_has_come_and_arrives_whole(self):
        client = self.client()
        watcher = self.client(self.server)
        for i in range(3):  # its host memory is locked from the second on
            number, rest = self.begin(client, device="test:%d" % (i % 2))
            harness.wait_until(lambda: self.on_device(watcher, i % 2) == self.BYTES * (1 + i // 2), "memory on the device")
            client.send(rest)
            reply = client.read_reply(number)[1]
            self.assertEqual(reply.status, harness.OK)
            self.assertEqual(client.ask(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=reply.run.outputs[0].kept))))[1], self.payload)
        self.assertEqual(self.where(client), ["test:0", "test:1", "test:0"])

    def test_nothing_of_it_is_left_when_its_client_goes_or_takes_it_back(self):
        client = self.client(delay_us=1000)
        watcher = self.client(self.server)
        number, rest = self.begin(client)
        harness.wait_until(lambda: self.on_device(watcher) == self.BYTES, "memory on the device")
        client.send(rest[:1 << 20])
        client.close()
        harness.wait_until(lambda: self.on_device(watcher) == 0, "nothing on the device")
        chunking = Client(self.server.address, features=["cancel"])
        self.addCleanup(chunking.close)
        request = pb.Request(upload=pb.Upload(tensor=harness.tensor([self.BYTES // 4]), device="test:0"))
        chunking.send(harness.frame(harness.REQUEST, 1, request.SerializeToString(), flags=harness.CHUNKED, payload_bytes=self.BYTES))
        piece = chunking.hello.chunk_bytes
        for at in range(0, self.FIRST, piece):
            chunking.send(harness.frame(harness.DATA, 1, struct.pack("<Q", at), self.payload[at:at + piece]))
        harness.wait_until(lambda: self.on_device(watcher) == self.BYTES, "memory on the device")
        chunking.send(harness.frame(harness.CANCEL, 1))
        reply = chunking.read_reply(1)[1]
        self.assertEqual((reply.status, reply.message), (harness.CANCELLED, "upload: the client cancelled the request"))
        harness.wait_until(lambda: self.on_device(watcher) == 0, "nothing on the device")

    def test_the_daemon_ends_while_a_piece_of_it_is_on_its_way(self):
        daemon = DeviceDaemon(delay_us=300000)
        client, watcher = Client(daemon.address), Client(daemon.address)
        _, rest = self.begin(client)
        harness.wait_until(lambda: self.on_device(watcher) == self.BYTES, "memory on the device")
        client.send(rest)  # nothing of it follows the piece that is on its way
        watcher.ping()
        client.close()
        watcher.close()
        daemon.stop()

    def test_its_failure_is_told_when_all_has_come(self):
        for settings, status, text in (({"memory": 8 << 20}, harness.RESOURCE_EXHAUSTED, "test:0"), ({"fault": "copy_in:1"}, harness.INTERNAL, "injected failure"),
                                       ({"fault": "copy_in:2"}, harness.INTERNAL, "injected failure")):
            with self.subTest(**settings):
                daemon = DeviceDaemon(**settings)
                try:
                    client = Client(daemon.address)
                    number, rest = self.begin(client)
                    client.send(rest)
                    reply = client.read_reply(number)[1]
                    self.assertEqual((reply.status, text in reply.message), (status, True), reply.message)
                    self.assertEqual((self.on_device(client), self.where(client)), (0, []))
                    client.close()
                finally:
                    daemon.stop()


class DeviceGraphs(unittest.TestCase):
    """Graphs whose nodes all run on one device: one job, intermediates there, captured once and launched from then on."""

    daemon, client, upload, fetch, where, fused = Resident.daemon, Resident.client, Resident.upload, Resident.fetch, Resident.where, Resident.fused

    def graph(self, constant=None, state=None, **node_fields):
        """y = relu(x + c); with a state: residual += y, normalised, in place."""
        graph = pb.Graph(name="step")
        graph.inputs.add(name="x", kind=pb.GRAPH_INPUT)
        graph.inputs.add(name="c", kind=pb.GRAPH_CONSTANT).tensor.handle.CopyFrom(constant)
        node = graph.nodes.add(name="sum", op="add", **node_fields)
        node.args.add().tensor.graph_input = 0
        node.args.add().tensor.graph_input = 1
        graph.nodes.add(name="relu", op="relu").args.add().tensor.node.node = 0
        graph.outputs.add(name="y").node.node = 1
        if state is not None:
            graph.inputs.add(name="s", kind=pb.GRAPH_STATE).tensor.handle.CopyFrom(state)
            node = graph.nodes.add(name="state", op="fused_add_rms_norm")
            node.args.add(name="x").tensor.node.node = 1
            argument = node.args.add(name="x_residual").tensor
            argument.graph_input, argument.donate = 2, True
            node.args.add(name="weight").none.SetInParent()
            node.args.add(name="epsilon").float = 1e-6
            graph.outputs.add(name="normed").node.node = 2
        for node in graph.nodes:
            node.priority.names.append("testdev")
            node.strict = True
        return graph

    def register(self, client, graph):
        return client.ask(pb.Request(register_graph=pb.RegisterGraph(graph=graph)))[0].graph.graph

    def run_graph(self, client, number, x, shape=None, **fields):
        request = pb.Request(run_graph=pb.RunGraph(graph=number, inline_results=True, explain=True, **fields))
        request.run_graph.inputs.add().tensor.CopyFrom(x if isinstance(x, pb.Tensor) else inline(shape or [len(x)], f32(*x)))
        return client.call(request)[0]

    def values(self, reply):
        self.assertEqual((reply.status, reply.message), (harness.OK, ""))
        return [list(unpack_f32(output.tensor.inline)) for output in reply.run.outputs]

    def test_a_graph_runs_on_a_device_and_is_launched_with_new_inputs(self):
        daemon = DeviceDaemon()
        try:
            client = Client(daemon.address)
            number = self.register(client, self.graph(self.upload(client, [10, -20, 5], device="test:1")))
            for i in range(6):
                reply = self.run_graph(client, number, [i, i, -6])
                self.assertEqual(self.values(reply), [[10 + i, 0, 0]])
                self.assertEqual((reply.run.explain.device, reply.run.graph.nodes[0].provider), ("test:1", "testdev"))
            self.assertEqual(self.values(self.run_graph(client, number, pb.Tensor(handle=self.upload(client, [1, 30, 0], device="test:1")))), [[11, 10, 5]])
            self.assertEqual(self.values(self.run_graph(client, number, pb.Tensor(handle=self.upload(client, [2, 30, 0], device="test:0")))), [[12, 10, 5]])
            client.close()
        finally:
            daemon.stop()
        self.assertIn("graphs: 1 captured, 7 launches, 0 left", daemon.said)

    def test_a_state_is_written_in_place_and_stays_at_its_address(self):
        daemon = DeviceDaemon()
        try:
            client = Client(daemon.address)
            state = self.upload(client, [0, 0], shape=[1, 2], device="test:0")
            number = self.register(client, self.graph(self.upload(client, [0, 0], shape=[1, 2], device="test:0"), state))
            want = [0.0, 0.0]
            for i in range(5):
                reply = self.run_graph(client, number, [i, 1], shape=[1, 2])
                want = [want[0] + i, want[1] + 1]
                self.values(reply)
                self.assertEqual(self.fetch(client, reply.run.states[0]), want)
            self.assertEqual(self.where(client), ["test:0", "test:0"])
            client.close()
        finally:
            daemon.stop()
        self.assertIn("graphs: 1 captured, 4 launches, 0 left", daemon.said)

    def test_a_state_of_the_host_moves_to_the_device_with_the_first_run(self):
        client = self.client()
        state = self.upload(client, [5, 6], shape=[1, 2])
        number = self.register(client, self.graph(self.upload(client, [0, 0], shape=[1, 2]), state, device="test:1"))
        for i in range(3):
            reply = self.run_graph(client, number, [1, 1], shape=[1, 2])
            self.values(reply)
        self.assertEqual(self.where(client), ["test:1", "cpu"])
        self.assertEqual(self.fetch(client, reply.run.states[0]), [8, 9])

    def test_kept_results_of_a_graph_are_their_own(self):
        client = self.client()
        number = self.register(client, self.graph(self.upload(client, [0, 0], device="test:0")))
        handles = []
        for i in range(3):
            request = pb.Request(run_graph=pb.RunGraph(graph=number))
            request.run_graph.inputs.add().tensor.CopyFrom(inline([2], f32(i, 2 * i)))
            request.run_graph.outputs.add(keep=True, no_copy=True)
            handles.append(client.ask(request)[0].run.outputs[0].kept)
        self.assertEqual([self.fetch(client, handle) for handle in handles], [[0, 0], [1, 2], [2, 4]])
        self.assertEqual(self.where(client), ["test:0"] * 4)

    def test_shapes_have_graphs_of_their_own(self):
        client = self.client()
        number = self.register(client, self.graph(self.upload(client, [1], device="test:0")))
        reply = self.run_graph(client, number, [1, 2])
        self.assertEqual(reply.status, harness.FAILED_PRECONDITION)  # the device doesn't broadcast
        for _ in range(2):
            self.assertEqual(self.values(self.run_graph(client, number, [4])), [[5]])

    def test_what_cannot_be_captured_is_enqueued(self):
        daemon = DeviceDaemon(fault="capture:1+")
        try:
            client = Client(daemon.address)
            number = self.register(client, self.graph(self.upload(client, [1, 1], device="test:0")))
            for i in range(4):
                self.assertEqual(self.values(self.run_graph(client, number, [i, -9])), [[i + 1, 0]])
            client.close()
        finally:
            daemon.stop()
        self.assertIn("graphs: 0 captured, 0 launches", daemon.said)
        self.assertEqual(daemon.said.count("a graph can't be captured"), 1)

    def test_a_failing_node_fails_the_run_and_a_state_written_in_place_is_lost(self):
        client = self.client(fault="kernel:5")
        state = self.upload(client, [0, 0], shape=[1, 2], device="test:0")
        number = self.register(client, self.graph(self.upload(client, [0, 0], shape=[1, 2], device="test:0"), state))
        self.values(self.run_graph(client, number, [1, 1], shape=[1, 2]))
        reply = self.run_graph(client, number, [1, 1], shape=[1, 2])
        self.assertEqual((reply.status, "kernel: injected failure" in reply.message), (harness.INTERNAL, True))
        self.assertEqual(self.run_graph(client, number, [1, 1], shape=[1, 2]).status, harness.DATA_LOSS)

    def test_nodes_on_two_kinds_of_device_are_refused(self):
        client = self.client()
        graph = self.graph(self.upload(client, [0, 0]))
        graph.nodes[1].priority.names[0] = "native"
        reply = self.run_graph(client, self.register(client, graph), [1, 2])
        self.assertEqual(reply.status, harness.UNIMPLEMENTED)
        self.assertIn("a graph's nodes run on one device", reply.message)

    def test_a_bad_index_names_its_node(self):
        client = self.client()
        graph = pb.Graph(name="rows")
        graph.inputs.add(name="ids", kind=pb.GRAPH_INPUT)
        graph.inputs.add(name="table", kind=pb.GRAPH_CONSTANT).tensor.handle.CopyFrom(self.upload(client, [0, 1, 2, 3], shape=[2, 2]))
        node = graph.nodes.add(name="look", op="embedding", strict=True)
        node.priority.names.append("testdev")
        node.args.add().tensor.graph_input = 0
        node.args.add().tensor.graph_input = 1
        graph.outputs.add(name="y").node.node = 0
        number = self.register(client, graph)
        for ids, wanted in ((1, [[2, 3]]), (2, None), (0, [[0, 1]]), (-1, None)):
            reply = self.run_graph(client, number, inline([1], struct.pack("<q", ids), dtype=6))
            if wanted is not None:
                self.assertEqual(self.values(reply), wanted)
            else:
                self.assertEqual((reply.status, reply.message), (harness.INVALID_ARGUMENT, "node 'look': embedding: ids[0] is %d, expected 0 to 1" % ids))

    def chained(self, client, number, before, **fields):
        """Submits a run whose x is the first result of the one before."""
        request = pb.Request(run_graph=pb.RunGraph(graph=number, inline_results=True, **fields))
        request.run_graph.inputs.add().tensor.CopyFrom(pb.Tensor(result=pb.ResultRef(request=before, output=0)))
        request.run_graph.outputs.add(keep=True)
        return client.submit(request)

    def hanging(self, fault):
        """A client, a graph with a state that is captured, a run of it that hangs in its first kernel, and what lets it go on."""
        folder = tempfile.mkdtemp(prefix="opd-gate-")
        self.addCleanup(shutil.rmtree, folder, True)
        with open(folder + "/config", "w") as file:
            file.write("segment: 1s\n")  # so much may be on the device's stream at once
        client = self.client(self.daemon("--config", folder + "/config", fault="hang:7" + fault, gate=folder + "/gate", tell=1))
        state = self.upload(client, [0, 0], shape=[1, 2], device="test:0")
        number = self.register(client, self.graph(self.upload(client, [1, 1], shape=[1, 2], device="test:0"), state))
        for _ in range(2):  # three kernels each; the second is captured and launched
            self.values(self.run_graph(client, number, [0, 0], shape=[1, 2]))
        request = pb.Request(run_graph=pb.RunGraph(graph=number, inline_results=True))
        request.run_graph.inputs.add().tensor.CopyFrom(inline([1, 2], f32(1, 2)))
        request.run_graph.outputs.add(keep=True)
        return client, number, client.submit(request), lambda: open(folder + "/gate", "w").close()

    def replies(self, client, numbers):
        found = {}
        while len(found) < len(numbers):
            number, reply, _ = client.read_reply()
            found[number] = reply
        return [found[number] for number in numbers]

    def test_runs_that_follow_each_other_are_on_the_device_before_the_first_has_ended(self):
        client, number, first, go_on = self.hanging("")
        self.server.wait_log("a graph is enqueued", count=2)
        second = self.chained(client, number, first)  # while the first runs
        third = self.chained(client, number, second)
        self.server.wait_log("a graph is enqueued", count=4)  # all three, and the first hangs
        go_on()
        replies = self.replies(client, [first, second, third])
        self.assertEqual([self.values(reply)[0] for reply in replies], [[2, 3], [3, 4], [4, 5]])
        self.assertEqual(self.fetch(client, replies[2].run.states[0]), [2 + 2 + 3 + 4, 2 + 3 + 4 + 5])
        self.assertEqual(self.fetch(client, replies[1].run.outputs[0].kept), [3, 4])

    def test_what_is_read_elsewhere_meanwhile_is_what_the_run_writes(self):
        client, number, first, go_on = self.hanging("")
        second = self.chained(client, number, first)
        self.server.wait_log("a graph is enqueued", count=3)
        elsewhere = client.submit(run("relu", pb.Tensor(result=pb.ResultRef(request=first, output=0)), run_priority=["native"], run_inline_results=True))
        go_on()
        replies = self.replies(client, [first, second, elsewhere])
        self.assertEqual([self.values(reply)[0] for reply in replies], [[2, 3], [3, 4], [2, 3]])

    def test_a_failure_is_the_failure_of_those_behind_it_too(self):
        client, number, first, go_on = self.hanging(",kernel:8")
        second = self.chained(client, number, first)
        third = self.chained(client, number, second)
        self.server.wait_log("a graph is enqueued", count=4)
        go_on()
        replies = self.replies(client, [first, second, third])
        self.assertEqual([reply.status for reply in replies], [harness.INTERNAL, harness.ABORTED, harness.ABORTED])
        self.assertIn("kernel: injected failure", replies[0].message)
        self.assertIn("by a run before it, which failed", replies[1].message)
        lost = self.run_graph(client, number, [1, 1], shape=[1, 2])
        self.assertEqual(lost.status, harness.DATA_LOSS)
        self.assertIn("request %d" % first, lost.message)
        after = self.replies(client, [self.chained(client, number, first)])[0]
        self.assertEqual((after.status, "is lost" in after.message), (harness.DATA_LOSS, True))

    def test_runs_that_end_where_they_are_begun_are_not_told_of_twice(self):
        folder = tempfile.mkdtemp(prefix="opd-gate-")
        self.addCleanup(shutil.rmtree, folder, True)
        client = self.client(self.daemon(fault="hang:7", gate=folder + "/gate", instant=1))
        number = self.register(client, self.graph(self.upload(client, [1], device="test:0")))
        for value in range(3):
            self.values(self.run_graph(client, number, [value]))
        # All wait for what hangs on the other device: each that begins has one behind it, and has ended when the loop has enqueued it.
        relu = run("relu", pb.Tensor(handle=self.upload(client, [1], device="test:1")), run_priority=["testdev"], run_strict=True, run_device="test:1")
        relu.run.outputs.add(keep=True)
        before = client.submit(relu)
        numbers = []
        for _ in range(8):
            before = self.chained(client, number, before)
            numbers.append(before)
        client.ping()  # they are read
        with open(folder + "/gate", "w"):
            pass
        found = {}
        while len(found) < len(numbers) + 1:
            answered, reply, _ = client.read_reply()
            found[answered] = reply
        self.assertEqual([self.values(found[answered])[0] for answered in numbers], [[i + 2] for i in range(8)])

    def test_other_shapes_and_a_graph_that_is_freed_leave_what_is_on_the_device_alone(self):
        client = self.client(delay_us=2000)
        number = self.register(client, self.graph(self.upload(client, [1], device="test:0")))
        for _ in range(2):
            self.values(self.run_graph(client, number, [4]))
        numbers = []
        for i in range(24):  # more shapes than a graph is prepared for at once: all but one element are refused, when they are prepared
            request = pb.Request(run_graph=pb.RunGraph(graph=number, inline_results=True))
            rows = 1 if i % 2 == 0 else i + 1
            request.run_graph.inputs.add().tensor.CopyFrom(inline([rows], f32(*[float(i)] * rows)))
            numbers.append(client.submit(request))
        numbers.append(client.submit(pb.Request(free_graph=pb.FreeGraph(graph=number))))
        replies = self.replies(client, numbers)
        for i, reply in enumerate(replies[:-1]):
            if i % 2 == 0:
                self.assertEqual(self.values(reply), [[i + 1]])
            else:
                self.assertEqual(reply.status, harness.FAILED_PRECONDITION)
        self.assertEqual(replies[-1].status, harness.OK)

    def test_an_input_is_brought_again_whenever_its_bytes_are_others(self):
        client = self.client(fault="kernel:31")  # the first behind ten runs, and twice two runs and an op
        number = self.register(client, self.graph(self.upload(client, [0, 0], shape=[1, 2], device="test:0")))
        a, b = (self.upload(client, values, shape=[1, 2], device="test:0") for values in ([1, 2], [3, 4]))
        rows = self.upload(client, [5, 6, 7, 8], shape=[2, 2], device="test:0")
        view = [pb.Tensor(handle=rows, dtype=9, shape=[1, 2], byte_offset=8 * i) for i in range(2)]

        def expect(x, wanted):
            self.assertEqual(self.values(self.run_graph(client, number, x, shape=[1, 2])), [wanted])

        for x, wanted in ((a, [1, 2]), (a, [1, 2]), (a, [1, 2]), (b, [3, 4]), (a, [1, 2]), ([9, 9], [9, 9]), (a, [1, 2]), (view[0], [5, 6]), (view[1], [7, 8]), (view[0], [5, 6])):
            expect(x if isinstance(x, (pb.Tensor, list)) else pb.Tensor(handle=x), wanted)
        ones = self.upload(client, [1, 1], shape=[1, 2], device="test:0")
        for wanted in ([2, 3], [3, 4]):  # written in place
            expect(pb.Tensor(handle=a), [wanted[0] - 1, wanted[1] - 1])
            a = self.fused(client, pb.Tensor(handle=ones), pb.Tensor(handle=a, donate=True)).run.outputs[1].kept
            expect(pb.Tensor(handle=a), wanted)
        failed = self.run_graph(client, number, pb.Tensor(handle=b))
        self.assertEqual(failed.status, harness.INTERNAL)
        expect(pb.Tensor(handle=b), [3, 4])
        expect(pb.Tensor(handle=a), [3, 4])

    def test_a_lone_run_gives_way_to_others_and_may_lose_its_session(self):
        """Begun and looked after by its loop, which keeps the device until somebody else wants it."""
        daemon = self.daemon(delay_us=60)
        client, other = self.client(daemon), self.client(daemon)
        number = self.register(client, self.graph(self.upload(client, [1, 1], device="test:0")))
        for i in range(60):
            request = pb.Request(run_graph=pb.RunGraph(graph=number, inline_results=True))
            request.run_graph.inputs.add().tensor.CopyFrom(inline([2], f32(i, -2)))
            mine = client.submit(request)
            if i % 3 != 0:  # else it is alone to its end
                theirs = other.submit(run("relu", inline([2], f32(i, -i)), run_priority=["testdev"], run_strict=True, run_inline_results=True, run_device="test:0"))
                self.assertEqual(self.values(self.replies(other, [theirs])[0]), [[i, 0]])
            self.assertEqual(self.values(self.replies(client, [mine])[0]), [[i + 1, 0]])
        client.submit(request)
        client.close()
        self.values(other.call(run("relu", inline([1], f32(1)), run_priority=["testdev"], run_strict=True, run_inline_results=True, run_device="test:0"))[0])

    def test_runs_at_once_from_several_sessions(self):
        daemon = self.daemon(delay_us=200)
        clients = [self.client(daemon) for _ in range(3)]
        numbers_of = [self.register(client, self.graph(self.upload(client, [k, k], device="test"))) for k, client in enumerate(clients)]
        wanted = {}
        for i in range(12):
            for k, client in enumerate(clients):
                request = pb.Request(run_graph=pb.RunGraph(graph=numbers_of[k], inline_results=True))
                request.run_graph.inputs.add().tensor.CopyFrom(inline([2], f32(i, -i)))
                wanted[k, client.submit(request)] = [[i + k, max(k - i, 0)]]
        for k, client in enumerate(clients):
            for _ in range(12):
                found, reply, _ = client.read_reply()
                self.assertEqual(self.values(reply), wanted[k, found])


class LostDevice(unittest.TestCase):
    """A device with an error that stays: its work fails, its tensors are lost and say so, everybody else goes on."""

    daemon, client, upload, fetch, relu = Resident.daemon, Resident.client, Resident.upload, Resident.fetch, Resident.relu

    def lose(self, client, device):
        """The first kernel on the device loses it, with others in flight."""
        submitted = [client.submit(add_request(i, run_device=device)[0]) for i in range(6)]
        for reply in dict(client.read_reply()[:2] for _ in submitted).values():
            self.assertIn(reply.status, (harness.DATA_LOSS, harness.UNAVAILABLE, harness.FAILED_PRECONDITION), reply.message)
            self.assertIn("test:1", reply.message)

    def test_it_is_passed_over_and_the_others_go_on(self):
        """Hardening: providers-sticky"""
        client = self.client(fault="lost:1", delay_us=1000)
        other = self.client(self.server)
        there, elsewhere = self.upload(client, [1, -2], device="test:1"), self.upload(client, [3, -4], device="test:0")
        here = self.upload(client, [5, -6])
        self.lose(client, "test:1")
        harness.wait_until(lambda: "device lost" in self.server.log_text(), "the loss in the log")
        for operand, status in ((there, harness.DATA_LOSS), (elsewhere, harness.OK), (here, harness.OK)):
            reply = client.call(run("relu", pb.Tensor(handle=operand), run_priority=["testdev", "native"]))[0]
            self.assertEqual(reply.status, status, reply.message)
        self.assertEqual(client.call(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=there))))[0].status, harness.DATA_LOSS)
        self.assertEqual(self.fetch(client, elsewhere), [3, -4])
        request, wanted = add_request(1, run_explain=True)
        reply = other.ask(request)[0]
        self.assertEqual((inline_result(reply), reply.run.explain.device), (wanted, "test:0"))
        request = add_request(1, run_device="test:1")[0]
        self.assertEqual(other.call(request)[0].status, harness.FAILED_PRECONDITION)
        with self.assertRaises(Failed) as caught:
            self.upload(client, [1], device="test:1")
        self.assertEqual(caught.exception.status, harness.FAILED_PRECONDITION)

    def test_with_no_device_left_its_provider_is_unsupported_and_says_why(self):
        client = self.client(fault="lost:1+")
        for device in ("test:0", "test:1"):
            self.assertEqual(client.call(add_request(1, run_device=device)[0])[0].status, harness.DATA_LOSS)
        harness.wait_until(lambda: self.server.log_text().count("device lost") == 2, "both losses in the log")
        reply = client.ask(run("relu", inline([2], f32(-1, 1)), run_priority=["testdev", "native"], run_explain=True))[0].run
        self.assertEqual(reply.provider, "native")
        self.assertRegex(reply.explain.skipped[0].reason, "test:. is lost: .*fell off the bus")

    def test_after_a_reset_it_is_used_again_with_nothing_on_it(self):
        client = self.client(fault="lost:3", reset=1)
        there = self.upload(client, [1, -2], device="test:1")
        mirrored = self.upload(client, [7, -8])
        for _ in range(2):
            self.relu(client, pb.Tensor(handle=mirrored), run_device="test:1")
        reply = client.call(run("relu", pb.Tensor(handle=there), run_priority=["testdev"], run_device="test:1"))[0]
        self.assertEqual(reply.status, harness.DATA_LOSS)
        harness.wait_until(lambda: "device reset" in self.server.log_text(), "the reset in the log")
        self.assertEqual(client.call(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=there))))[0].status, harness.DATA_LOSS)
        reply = self.relu(client, pb.Tensor(handle=mirrored), run_device="test:1")
        self.assertEqual((list(unpack_f32(reply.outputs[0].tensor.inline)), len(reply.explain.moves)), ([7, 0], 2))
        client.ask(pb.Request(free=pb.Free(tensors=[pb.Tensor(handle=there)])))

    def test_retry_goes_on_elsewhere(self):
        client = self.client(fault="lost:1")
        request, wanted = add_request(1, run_retry=True)
        request.run.priority.names.append("native")
        reply = client.ask(request)[0]
        self.assertEqual((reply.run.provider, inline_result(reply)), ("native", wanted))


class StuckDevice(unittest.TestCase):
    """A kernel that a device doesn't end: answered when its budget is over, its memory kept until it ends, the device passed over meanwhile.

    Hardening: providers-hangs"""

    upload, fetch, relu, graph, register, run_graph = Resident.upload, Resident.fetch, Resident.relu, DeviceGraphs.graph, DeviceGraphs.register, DeviceGraphs.run_graph
    BUDGET = 400000

    def setUp(self):
        self.gate = os.path.join(tempfile.mkdtemp(prefix="opd-gate-"), "open")
        self.addCleanup(shutil.rmtree, os.path.dirname(self.gate), True)

    def open_gate(self):
        open(self.gate, "w").close()

    def client(self, fault="hang:1", config="", code=0):
        """code: what the daemon's end must be."""
        self.daemon = Daemon("--module", DEVICE, config="providers: {testdev: {budget: %dus}}\n%s" % (self.BUDGET, config),
                             environment={"OPD_TEST_DEVICE_FAULT": fault, "OPD_TEST_DEVICE_GATE": self.gate})
        self.addCleanup(self.daemon.stop, code)
        client = Client(self.daemon.address)
        self.addCleanup(client.close)
        return client

    def hangs(self, client, request, text="testdev.add has exceeded its budget of 400000 us and is still running"):
        reply = client.call(request)[0]
        self.assertEqual((reply.status, reply.message), (harness.DEADLINE_EXCEEDED, text))

    def comes_back(self, client):
        self.open_gate()
        harness.wait_until(lambda: (client.info().stuck, client.info().session_memory_bytes) == (0, 0), "the kernel's end, and its memory")
        self.daemon.wait_log("an overdue kernel has returned")
        request, wanted = add_request(7, run_device="test:1")
        self.assertEqual(inline_result(client.ask(request)[0]), wanted)

    def test_a_request_is_answered_while_the_device_works_on(self):
        client = self.client()
        self.hangs(client, add_request(1, run_device="test:1")[0])
        self.daemon.wait_log("kernel exceeds its budget", "provider=testdev", "op=add", "device=test:1")
        self.assertEqual(client.info().stuck, 1)
        self.assertIn("lane: 1 kernels have exceeded their budget and still run", list(client.info().degraded))
        self.assertGreater(client.info().session_memory_bytes, 0)
        self.comes_back(client)

    def test_others_go_to_another_device_or_are_told(self):
        client = self.client()
        handle = self.upload(client, [1, -2], device="test:1")
        self.hangs(client, add_request(1, run_device="test:1")[0])
        request, wanted = add_request(2, run_explain=True)
        reply = client.ask(request)[0]
        self.assertEqual((inline_result(reply), reply.run.explain.device), (wanted, "test:0"))
        for request in (add_request(3, run_device="test:1")[0], pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=handle)))):
            reply = client.call(request)[0]
            self.assertEqual(reply.status, harness.UNAVAILABLE)
            self.assertRegex(reply.message, "a kernel on test:1 has exceeded its budget and still runs")
        self.open_gate()
        harness.wait_until(lambda: client.info().stuck == 0, "the kernel's end")
        self.assertEqual(self.fetch(client, handle), [1, -2])

    def test_where_no_device_is_left_the_next_provider_may_answer(self):
        client = self.client("hang:1+")
        for device in ("test:0", "test:1"):
            self.hangs(client, add_request(1, run_device=device)[0])
        self.assertEqual(client.info().stuck, 2)
        request = run("relu", inline([2], f32(-1, 1)), run_priority=["testdev", "native"], run_inline_results=True)
        self.assertEqual(client.call(request)[0].status, harness.UNAVAILABLE)
        request.run.retry = True
        reply = client.ask(request)[0]
        self.assertEqual((reply.run.provider, unpack_f32(reply.run.outputs[0].tensor.inline)), ("native", (0, 1)))
        self.comes_back(client)

    def test_what_stands_behind_it_has_its_own_time(self):
        client = self.client()
        first = client.submit(add_request(1, run_device="test:1")[0])
        behind = client.submit(add_request(2, run_device="test:1")[0])
        self.assertEqual(client.read_reply(first)[1].status, harness.DEADLINE_EXCEEDED)
        self.open_gate()
        reply = client.read_reply(behind)[1]  # UNAVAILABLE: this test was so slow that it came too late
        self.assertIn(reply.status, (harness.OK, harness.UNAVAILABLE), reply.message)

    def test_a_kernel_that_hangs_before_it_is_enqueued(self):
        client = self.client("stall:1")
        self.hangs(client, add_request(1, run_device="test:1")[0])
        self.comes_back(client)

    def test_it_counts_and_ends_in_quarantine(self):
        client = self.client(config="quarantine: {failures: 1}")
        self.hangs(client, add_request(1, run_device="test:1")[0])
        request = add_request(2, run_explain=True)[0]
        request.run.strict = False
        reply = client.ask(request)[0]
        self.assertEqual((reply.run.provider, reply.run.explain.skipped[0].reason), ("native", "quarantine: 1 failure (hang 1)"))
        self.open_gate()
        harness.wait_until(lambda: client.info().stuck == 0, "the kernel's end")

    def test_a_graph_has_the_time_of_all_its_nodes(self):
        client = self.client("hang:4", config="quarantine: {provider_failures: 1}")
        state = self.upload(client, [1, -2], device="test:1")
        number = self.register(client, self.graph(self.upload(client, [10, -20], device="test:1"), state=state))
        self.assertEqual(self.run_graph(client, number, [1, 1]).status, harness.OK)
        reply = self.run_graph(client, number, [1, 1])
        self.assertEqual((reply.status, reply.message), (harness.DEADLINE_EXCEEDED, "graph 'step' has exceeded the budget of its nodes of 1200000 us on test:1 and is still running"))
        self.daemon.wait_log("provider quarantined", "provider=testdev", "1 failure (hang 1)")
        client.ask(pb.Request(free_graph=pb.FreeGraph(graph=number)))
        self.open_gate()
        harness.wait_until(lambda: client.info().stuck == 0, "the kernel's end")
        self.assertEqual(client.call(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=state))))[0].status, harness.NOT_FOUND)  # it was donated

    def test_a_client_that_leaves_meanwhile_takes_nothing_along(self):
        with self.client() as client:
            self.hangs(client, add_request(1, run_device="test:1")[0])
        with Client(self.daemon.address) as other:
            self.comes_back(other)
            self.assertEqual(other.info().memory_bytes, 0)

    def test_a_drain_does_not_wait_for_it(self):
        client = self.client(code=1)
        self.hangs(client, add_request(1, run_device="test:1")[0])
        client.close()
        self.daemon.signal(signal.SIGTERM)
        self.assertEqual(self.daemon.wait(), 1)
        self.assertIn("kernels that exceed their budget still run", self.daemon.log_text())


if __name__ == "__main__":
    unittest.main(verbosity=2)
