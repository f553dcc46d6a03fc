#!/usr/bin/python3
"""The daemon as an operator meets it: starting, listeners, configuration, signals, logs, limits, ending. Each test's name is a promise."""
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import threading
import time
import unittest

import harness
from harness import (HELLO, INVALID_ARGUMENT, NOT_FOUND, OK, PATIENCE, PERMISSION_DENIED, REQUEST, UNAVAILABLE, Client, Daemon,
                     Failed, check_healthy, f32, frame, hello_envelope, inline, pb, rms_norm, run, tensor, wait_until)


def run_opd(*flags, environment=None):
    """(exit code, stdout, stderr) of an opd that is expected to end by itself."""
    done = subprocess.run([harness.OPD, *flags], capture_output=True, timeout=PATIENCE, stdin=subprocess.DEVNULL, env=dict(os.environ, **(environment or {})))
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
        return True
    except OSError:
        return False


def slow_request(size=256):
    """(request, payload) of a matrix product that takes the native provider a while."""
    data = bytes(4 * size * size)
    request = run("matmul", tensor([size, size]), tensor([size, size]), run_priority=["native"])
    return request, data


def listens(path):
    """A socket file is there a moment before it listens."""
    try:
        Client("unix:" + path).close()
        return True
    except OSError:
        return False


class WithFolder(unittest.TestCase):
    def start(self, *flags, **options):
        daemon = Daemon(*flags, **options)
        self.addCleanup(daemon.stop, None)
        return daemon

    def client(self, address, **fields):
        client = Client(address, **fields)
        self.addCleanup(client.close)
        return client


def answers(address):
    """A socket's file is there before anybody listens on it."""
    try:
        with Client(address) as client:
            client.ping()
        return True
    except OSError:
        return False



class Starting(WithFolder):
    def test_start_line_names_listeners_and_providers(self):
        daemon = self.start()
        line = daemon.wait_log("unix:" + daemon.path)
        self.assertIn("native", daemon.log_text())
        self.assertIn("cpu", daemon.log_text())
        self.assertIn(" info ", line)

    def test_all_kinds_of_listeners_serve(self):
        folder_address = "unix:%s/second.sock" % os.path.join("/tmp", "opd-test-%d" % os.getpid())
        os.makedirs(os.path.dirname(folder_address[5:]), exist_ok=True)
        self.addCleanup(lambda: os.rmdir(os.path.dirname(folder_address[5:])))
        tcp = ["tcp://127.0.0.1:0"] + (["tcp://[::1]:0"] if has_ipv6() else [])
        flags = [word for address in [folder_address, *tcp] for word in ("--listen", address)]
        daemon = self.start(*flags)
        found = daemon.tcp_addresses()
        self.assertEqual(len(found), len(tcp))
        for address in [daemon.address, folder_address, *found]:
            self.assertNotIn(":0", address[-2:])
            client = self.client(address)
            client.ping()
            request, payload, _ = rms_norm()
            client.ask(request, payload)
        for address in found:
            daemon.wait_log(address)
        daemon.stop()
        self.assertFalse(os.path.exists(folder_address[5:]))

    def test_tenant_is_the_uid_on_a_unix_socket_and_anonymous_on_tcp(self):
        daemon = self.start("--listen", "tcp://127.0.0.1:0")
        self.assertEqual(self.client(daemon.address).hello.tenant, "uid:%d" % os.getuid())
        self.assertTrue(self.client(daemon.address).hello.admin)
        self.assertEqual(self.client(daemon.tcp_addresses()[0]).hello.tenant, "anonymous")
        self.assertFalse(self.client(daemon.tcp_addresses()[0]).hello.admin)

    def test_stale_socket_of_a_killed_daemon_is_replaced(self):
        """Hardening: operations-sigkill"""
        first = self.start()
        first.process.kill()
        first.wait()
        self.assertTrue(os.path.exists(first.path))
        second = self.start(folder=first.folder)
        check_healthy(self, second)
        second.stop()

    def test_second_daemon_on_a_socket_that_answers_is_refused_with_code_3(self):
        first = self.start()
        second = self.start(folder=first.folder, wait=False)
        self.assertEqual(second.wait(), 3)
        self.assertIn(first.path, second.output())
        check_healthy(self, first)

    def test_a_file_that_is_no_socket_is_not_replaced(self):
        folder = self.start().folder
        path = os.path.join(folder, "precious")
        with open(path, "w") as file:
            file.write("precious")
        code, _, err = run_opd("--listen", "unix:" + path)
        self.assertEqual(code, 3)
        self.assertIn(path, err)
        with open(path) as file:
            self.assertEqual(file.read(), "precious")

    def test_what_cannot_be_listened_on_is_code_3_and_names_it(self):
        taken = socket.socket()
        self.addCleanup(taken.close)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for address in ["unix:/no/such/folder/s", "tcp://127.0.0.1:%d" % taken.getsockname()[1]]:
            code, _, err = run_opd("--listen", address)
            self.assertEqual(code, 3, err)
            self.assertIn(address, err)

    def test_standard_files_may_be_closed(self):
        folder = self.start().folder
        path = os.path.join(folder, "closed.sock")
        process = subprocess.Popen(["sh", "-c", 'exec "$0" --listen "unix:$1" <&- >&- 2>&-', harness.OPD, path])
        self.addCleanup(process.kill)
        wait_until(lambda: answers("unix:" + path))
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(timeout=PATIENCE), 0)

    def test_default_socket_folder_is_made(self):
        folder = self.start().folder
        runtime = os.path.join(folder, "runtime")
        code, out, _ = run_opd("--print-default-socket", environment={"XDG_RUNTIME_DIR": runtime})
        self.assertEqual((code, out), (0, runtime + "/opd.sock\n"))
        daemon = Daemon(listen=[], wait=False, environment={"XDG_RUNTIME_DIR": runtime})
        self.addCleanup(daemon.stop, None)
        daemon.path, daemon.address = runtime + "/opd.sock", "unix:" + runtime + "/opd.sock"
        daemon.wait_ready()
        self.assertEqual(os.stat(runtime).st_mode & 0o777, 0o700)
        check_healthy(self, daemon)


class Flags(unittest.TestCase):
    def test_help_is_complete_and_grouped(self):
        code, out, err = run_opd("--help")
        self.assertEqual((code, err), (0, ""))
        for flag in ("config check-config listen priority module threads log-level log-format log-file memory session-memory "
                     "insecure-plain-tcp self-signed tls-certificate tls-key tls-client-ca tls-client-certificates tokens allow-anonymous checked inline print-default-socket version help").split():
            self.assertIn("--" + flag, out)
        for group in ("Configuration", "Listening", "Dispatch", "Memory", "Logging", "Signals", "Exit codes"):
            self.assertIn(group, out)

    def test_version(self):
        code, out, _ = run_opd("--version")
        self.assertEqual(code, 0)
        self.assertRegex(out, r"\Aopd \d+\.\d+\.\d+\n\Z")

    def test_wrong_flags_are_code_2_and_say_what_is_wrong(self):
        for flags, words in [
            (["--colour"], "colour"),
            (["word"], "word"),
            (["--threads"], "threads"),
            (["--threads", "x"], 'threads: "x", expected a whole number'),
            (["--memory", "1 MB"], "is not a size"),
            (["--inline", "1s"], "inline"),
            (["--log-level", "loud"], "expected error, warn, info or debug"),
            (["--log-format", "xml"], "expected text or json"),
            (["--log-file", "/no/such/folder/log"], "/no/such/folder/log"),
            (["--priority", "relu"], "expected op=provider,provider"),
            (["--module", "x.so"], "expected an absolute path, or one of openblas, onednn, opencl,"),
            (["--module", "x=all"], 'module "all": expected no name'),
            (["--isolated", "all"], "not isolated"),
            (["--module", "onednn", "--module", "onednn"], 'module "onednn" is named twice'),
            (["--listen", "http://x"], "is not an address"),
            (["--listen", "tcp://0.0.0.0:0"], "not a loopback address"),
            (["--session-memory", "2GiB", "--memory", "1GiB"], "limits.session"),
            (["--config", "/no/such/file"], "/no/such/file: No such file"),
        ]:
            with self.subTest(flags=flags):
                code, out, err = run_opd(*flags)
                self.assertEqual(code, 2, err)
                self.assertIn(words, err)
                self.assertEqual(out, "")

    def test_control_characters_of_a_flag_do_not_reach_the_terminal(self):
        code, _, err = run_opd("--listen", "http://\x1b[31mred\nx")
        self.assertEqual(code, 2)
        self.assertNotIn("\x1b", err)
        self.assertEqual(err.count("\n"), 1)


class Configuration(WithFolder):
    def folder(self):
        return self.start().folder

    def check(self, text, *flags):
        path = os.path.join(self.folder(), "checked.yaml")
        with open(path, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        return path, run_opd("--config", path, "--check-config", *flags)

    def test_check_config_prints_what_a_good_file_comes_to(self):
        _, (code, out, err) = self.check("listen: ['tcp://127.0.0.1:7']\npriorities: {rms_norm: [cpu], '*': [native]}\nthreads: 2\n", "--threads", "3")
        self.assertEqual((code, err), (0, ""))
        for words in ("listen: tcp://127.0.0.1:7", "rms_norm = [cpu]", "* = [native]", "threads: 3", "good"):
            self.assertIn(words, out)

    def test_check_config_does_not_listen(self):
        daemon = self.start()
        code, _, err = run_opd("--listen", daemon.address, "--check-config")
        self.assertEqual(code, 0, err)
        check_healthy(self, daemon)

    def test_bad_files_are_code_2_with_file_line_and_key(self):
        """Hardening: operations-malformed, operations-unknown-keys"""
        for text, words in [
            ("colour: red\n", ":1: colour: no such key"),
            ("threads: 1\nlimits:\n  memroy: 1\n", ":3: limits.memroy: no such key"),
            ("threads: 1\nthreads: 1\n", ':2: key "threads" is there twice'),
            ("log: {level: *x}\n", "aliases"),
            ("limits:\n\tmemory: 1\n", ":2: "),
            (b"threads: 1\n\0", "is NUL"),
            (b"log: {file: \"\xff\"}\n", "UTF-8"),
            ("[" * 100000, ":1: "),
            (b"#" * (100 << 20), "at most 1048576"),
            ("priorities: {no_such_op: [cpu]}\n", "no_such_op"),
            ("priorities: {rms_norm: [no_such_provider]}\n", "no_such_provider"),
            ("priorities: {'*': [no_such_provider]}\n", "no_such_provider"),
            ("priorities: {rms_norm/bf16: [cpu]}\n", "priority for rms_norm/bf16: it narrows a list of rms_norm, and there is none"),
            ("priorities: {rms_norm: [cpu], rms_norm/bf16: [no_such_provider]}\n", "no_such_provider"),
            ("priorities: {no_such_op: [cpu], no_such_op/bf16: [cpu]}\n", "no_such_op"),
        ]:
            with self.subTest(words=words):
                path, (code, _, err) = self.check(text)
                self.assertEqual(code, 2, err)
                self.assertIn(words, err)
                code, _, err = run_opd("--config", path, "--listen", "unix:" + path + ".sock")
                self.assertEqual(code, 2, err)
                self.assertIn(words, err)

    def test_a_module_that_cannot_be_loaded_keeps_its_name(self):
        daemon = self.start(config="modules: [{name: mine, path: /no/such/module.so}]\npriorities: {rms_norm: [mine, cpu]}\n")
        client = self.client(daemon.address)
        providers = {p.name: p for p in client.ask(pb.Request(list_providers=pb.Empty()))[0].providers.providers}
        self.assertFalse(providers["mine"].available)
        self.assertIn("/no/such/module.so", providers["mine"].reason)
        reply, _ = client.ask(pb.Request(get_priority=pb.GetPriority(op="rms_norm")))
        self.assertEqual(list(reply.priority.effective)[:1], ["cpu"])

    def test_promise_15_an_ops_list_may_be_narrowed_to_a_dtype_and_few_rows(self):
        daemon = self.start(config="""priorities:
  relu: [native]
  relu/bf16: [cpu, native]
  relu/rows<=2: [cpu]
  relu/bf16/rows<=1: [native, cpu]
  "*": [cpu, native]
""")
        client = self.client(daemon.address)

        def ran(rows, dtype, **more):
            operand = harness.inline([rows, 8], bytes(rows * 8 * (4 if dtype == pb.F32 else 2)), dtype=dtype)
            reply, _ = client.ask(run("relu", operand, run_explain=True, **more))
            return reply.run.provider, reply.run.explain.narrowed, list(reply.run.explain.effective)

        self.assertEqual(ran(2, pb.F32), ("cpu", "relu/rows<=2", ["cpu", "native"]))  # native is appended to each list by itself
        self.assertEqual(ran(3, pb.F32), ("native", "", ["native"]))
        self.assertEqual(ran(1, pb.BF16), ("native", "relu/bf16/rows<=1", ["native"]))
        self.assertEqual(ran(2, pb.BF16), ("cpu", "relu/bf16", ["cpu", "native"]))
        self.assertEqual(ran(2, pb.F32, run_device="cpu"), ("cpu", "relu/rows<=2", ["cpu", "native"]))
        self.assertEqual(ran(2, pb.F32, run_priority=["native"]), ("native", "", ["native"]))  # a nearer list wins whole
        daemon.wait_log("falling back to native is possible", "op=relu")
        reply, _ = client.ask(pb.Request(get_priority=pb.GetPriority(op="relu")))
        self.assertEqual([(case.key, list(case.stored), list(case.effective)) for case in reply.priority.cases],
                         [("relu/bf16/rows<=1", ["native", "cpu"], ["native"]), ("relu/bf16", ["cpu", "native"], ["cpu", "native"]),
                          ("relu/rows<=2", ["cpu"], ["cpu", "native"])])
        self.assertEqual(list(reply.priority.stored), ["native"])
        client.ask(pb.Request(set_priority=pb.SetPriority(op="relu", list=pb.ProviderList(names=["native"]))))
        self.assertEqual(ran(2, pb.F32), ("native", "", ["native"]))
        self.assertFalse(client.ask(pb.Request(get_priority=pb.GetPriority(op="relu")))[0].priority.cases)

    def test_the_lists_that_hold_where_nobody_says_are_those_of_the_table(self):
        with open(os.path.join(harness.ROOT, "providers", "priorities.txt"), encoding="utf-8") as table:
            lists = dict(line.strip().rsplit("=", 1) for line in table if not line.startswith("#"))
        client = self.client(self.start().address)
        for key, names in lists.items():
            with self.subTest(key=key):
                op = "sigmoid" if key == "*" else key.split("/")[0]
                priority = client.ask(pb.Request(get_priority=pb.GetPriority(op=op)))[0].priority
                if "/" in key:
                    self.assertEqual([list(case.stored) for case in priority.cases if case.key == key], [names.split(",")])
                elif key != "*" or "sigmoid" not in lists:
                    self.assertEqual(list(priority.stored), names.split(","))

    def test_flags_go_over_the_file_also_after_a_reload(self):
        daemon = self.start("--priority", "rms_norm=native", config="priorities: {rms_norm: [cpu], softmax: [cpu]}\n")
        client = self.client(daemon.address)

        def effective(op):
            return list(client.ask(pb.Request(get_priority=pb.GetPriority(op=op)))[0].priority.effective)

        self.assertEqual(effective("rms_norm"), ["native"])
        self.assertEqual(effective("softmax")[0], "cpu")
        daemon.write_config("priorities: {rms_norm: [cpu], softmax: [native]}\n")
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("configuration reloaded")
        self.assertEqual(effective("rms_norm"), ["native"])
        self.assertEqual(effective("softmax"), ["native"])

    def test_remote_tcp_works_when_asked_for(self):
        daemon = self.start("--listen", "tcp://0.0.0.0:0", "--insecure-plain-tcp")
        port = daemon.tcp_addresses()[0].rsplit(":", 1)[1]
        self.client("tcp://127.0.0.1:" + port).ping()


class Signals(WithFolder):
    def test_sighup_with_a_bad_file_keeps_the_old_configuration_and_says_why(self):
        """Hardening: operations-malformed"""
        daemon = self.start(config="priorities: {rms_norm: [native]}\n")
        for bad, words in [("priorities: {rms_norm: [no_such]}\n", "no_such"), ("colour: red\n", "colour"), ("[", "")]:
            daemon.write_config(bad)
            daemon.signal(signal.SIGHUP)
            daemon.wait_log("not reloaded", words)
            reply, _ = self.client(daemon.address).ask(pb.Request(get_priority=pb.GetPriority(op="rms_norm")))
            self.assertEqual(list(reply.priority.stored), ["native"])
        os.unlink(os.path.join(daemon.folder, "opd.yaml"))
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("not reloaded", "No such file")
        check_healthy(self, daemon)

    def test_what_cannot_change_while_running_is_refused_and_named(self):
        daemon = self.start(config="threads: 1\n")
        daemon.write_config("threads: 2\npriorities: {relu: [native]}\n")
        daemon.signal(signal.SIGHUP)
        self.assertIn("threads", daemon.wait_log("not reloaded"))
        reply, _ = self.client(daemon.address).ask(pb.Request(get_priority=pb.GetPriority(op="relu")))
        self.assertNotEqual(list(reply.priority.stored), ["native"])
        for text in ("threads: 1\nlog: {format: json}\n", "threads: 1\nlog: {file: elsewhere.log}\n"):
            daemon.write_config(text)
            daemon.signal(signal.SIGHUP)
            daemon.wait_log("not reloaded", "log.file and log.format")

    def test_sighup_changes_level_and_limits(self):
        daemon = self.start(config="log: {level: info}\n")
        daemon.write_config("log: {level: error}\nlimits: {request: 64 KiB}\n")
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: self.client(daemon.address).hello.limits.payload_bytes == 65536)

    def test_a_reload_logs_what_has_changed(self):
        daemon = self.start(config="limits: {stall: 50s, queue: 9}\npriorities: {relu: [cpu]}\ntenants: {anonymous: {weight: 5}}\n")
        daemon.write_config("limits: {stall: 2min}\npriorities: {relu: [native, cpu], silu: []}\ntenants: {anonymous: {weight: 6, class: batch}}\n")
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("configuration reloaded", "changes=5")
        wanted = [
            'key=limits.queue old=9 new=1024',
            'key=limits.stall old=50s new=2min',
            'key=priorities.relu old=[cpu] new="[native, cpu]"',
            'key=priorities.silu old=(none) new=[]',
            'key=tenants.anonymous old="weight: 5" new="weight: 6, class: batch"',
        ]
        found = [line.split("configuration changed ")[1] for line in daemon.log_text().splitlines() if "configuration changed" in line]
        self.assertEqual(found, wanted)
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("configuration reloaded", "changes=0")

    def test_reload_storm_under_load_loses_no_request(self):
        """Hardening: operations-reload-storm"""
        daemon = self.start(config="priorities: {rms_norm: [cpu]}\n")
        stop = threading.Event()
        failures = []

        def work():
            try:
                with Client(daemon.address) as client:
                    request, payload, _ = rms_norm()
                    while not stop.is_set():
                        client.ask(request, payload)
            except Exception as problem:  # any: the main thread reports it
                failures.append(problem)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(60):
            daemon.write_config("priorities: {rms_norm: [%s]}\n" % ("native" if turn % 2 else "cpu"))
            daemon.signal(signal.SIGHUP)
            time.sleep(0.005)
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(failures, [])
        daemon.wait_log("configuration reloaded")
        check_healthy(self, daemon)

    def test_sigusr1_opens_the_log_again(self):
        daemon = self.start()
        old = daemon.log_path + ".1"
        os.rename(daemon.log_path, old)
        daemon.signal(signal.SIGUSR1)
        daemon.wait_log("log opened again")
        size = os.path.getsize(old)
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("configuration reloaded")
        self.assertEqual(os.path.getsize(old), size)

    def test_sigusr1_when_the_file_cannot_be_opened_keeps_the_old_one_and_says_so(self):
        folder = self.start().folder
        logs, moved = os.path.join(folder, "logs"), os.path.join(folder, "moved")
        os.mkdir(logs)
        daemon = self.start("--log-file", os.path.join(logs, "log"), log=False)
        os.rename(logs, moved)
        daemon.log_path = os.path.join(moved, "log")
        daemon.signal(signal.SIGUSR1)
        daemon.wait_log("log not opened again, the old file stays", "No such file")
        check_healthy(self, daemon)

    def test_sigterm_finishes_work_in_flight_and_tells_clients(self):
        """Hardening: promise-drain"""
        daemon = self.start(config="limits: {drain: 10min}\n")  # a sanitizer on a busy machine is slow
        client = self.client(daemon.address)
        request, payload = slow_request()
        ids = {client.submit(request, payload) for _ in range(4)}
        pong = client.submit(pb.Request(ping=pb.Empty()))
        signalled = False
        while ids or not signalled:
            request_id, reply, data = client.read_reply()
            self.assertEqual(reply.status, OK, reply.message)
            if request_id == pong:  # those before it have been accepted
                daemon.signal(signal.SIGTERM)
                signalled = True
            else:
                ids.remove(request_id)
                self.assertEqual(len(data), len(payload))
        said = client.goaway or client.expect_end()
        self.assertIsNotNone(said)
        self.assertEqual(daemon.wait(), 0)
        self.assertFalse(os.path.exists(daemon.path))

    def test_sigterm_with_idle_clients_ends_at_once(self):
        daemon = self.start()
        idle = [self.client(daemon.address) for _ in range(5)] + [self.client(daemon.address, hello=False)]
        daemon.signal(signal.SIGTERM)
        self.assertEqual(daemon.wait(), 0)
        self.assertEqual(idle[0].expect_end()[0], UNAVAILABLE)

    def test_sigint_drains_as_well(self):
        daemon = self.start()
        daemon.signal(signal.SIGINT)
        self.assertEqual(daemon.wait(), 0)

    def flood(self, daemon, count=400):
        client = self.client(daemon.address)
        request, payload = slow_request()
        request.run.outputs.add(no_copy=True)
        for _ in range(count):
            client.submit(request, payload)
        return client

    def test_second_sigterm_ends_at_once_with_code_1(self):
        daemon = self.start("--threads", "1")
        self.flood(daemon)
        daemon.signal(signal.SIGTERM)
        daemon.wait_log("ending")
        time.sleep(0.05)
        daemon.signal(signal.SIGTERM)
        self.assertEqual(daemon.wait(), 1)
        daemon.wait_log("ended before all work was done")

    def test_drain_ends_within_its_limit_with_code_1(self):
        """Hardening: promise-drain"""
        daemon = self.start("--threads", "1", config="limits: {drain: 200ms}\n")
        self.flood(daemon)
        daemon.signal(signal.SIGTERM)
        self.assertEqual(daemon.wait(), 1)
        daemon.wait_log("ended before all work was done")

    def test_new_clients_are_refused_while_draining(self):
        daemon = self.start("--threads", "1")
        self.flood(daemon)
        daemon.signal(signal.SIGTERM)
        daemon.wait_log("ending")

        def refused():
            try:
                self.client(daemon.address)
                return False
            except (OSError, harness.Closed, Failed):
                return True

        wait_until(refused)
        daemon.signal(signal.SIGTERM)
        self.assertIn(daemon.wait(), (0, 1))

    def test_sigterm_at_any_moment_of_the_start_ends_cleanly(self):
        """Hardening: operations-sigterm"""
        chance = random.Random(7)
        for _ in range(harness.LONG and 200 or 25):
            daemon = Daemon(wait=False)
            time.sleep(chance.uniform(0, 0.08))
            daemon.signal(signal.SIGTERM)
            code = daemon.wait()
            output = daemon.output()
            daemon.stop(None)
            self.assertIn(code, (0, -signal.SIGTERM), output)

    def test_sigkill_and_restart_loses_handles_and_says_so(self):
        """Hardening: promise-restart, operations-sigkill"""
        daemon = self.start()
        request = run("relu", inline([4], f32(-1, 0, 1, 2)))
        request.run.outputs.add(keep=True)
        handle = self.client(daemon.address).ask(request)[0].run.outputs[0].kept
        daemon.process.kill()
        daemon.wait()
        daemon = self.start(folder=daemon.folder)
        with self.assertRaises(Failed) as caught:
            self.client(daemon.address).ask(run("relu", pb.Tensor(handle=handle)))
        self.assertEqual(caught.exception.status, NOT_FOUND)
        check_healthy(self, daemon)


class Health(WithFolder):
    def conditions(self, client):
        info = client.info()
        return list(info.unhealthy), list(info.degraded)

    def expect(self, client, word):
        """Unhealthy for this one reason."""
        unhealthy, _ = self.conditions(client)
        self.assertEqual([text.split(":")[0] for text in unhealthy], [word], unhealthy)

    def test_a_daemon_that_serves_is_healthy(self):
        self.assertEqual(self.conditions(self.client(self.start().address)), ([], []))

    def test_used_up_memory_is_unhealthy_until_it_is_freed(self):
        daemon = self.start(config="limits: {memory: 4 MiB, session: 4 MiB}")
        client = self.client(daemon.address)
        count = 0
        for size in (1 << 18, 1 << 16, 1 << 12):
            request = run("relu", inline([size], f32(1), strides=[0]))
            request.run.outputs.add(keep=True, no_copy=True)
            while client.call(request)[0].status == OK:
                count += 1
        self.expect(client, "memory")
        client.ask(pb.Request(free=pb.Free(tensors=[pb.Tensor(handle=kept.handle) for kept in client.ask(pb.Request(list_tensors=pb.ListTensors()))[0].tensors.tensors])))
        self.assertEqual(self.conditions(client), ([], []))

    def test_sessions_at_their_limit_are_unhealthy(self):
        daemon = self.start(config="limits: {sessions: 2}")
        client = self.client(daemon.address)
        wait_until(lambda: client.info().sessions == 1)
        with Client(daemon.address):
            self.expect(client, "sessions")

    def test_a_lane_in_which_nothing_ends_is_unhealthy(self):
        daemon = self.start("--threads", "1", config="limits: {stuck: 1ms}")
        client = self.client(daemon.address)
        with Client(daemon.address) as flood:
            request, payload = slow_request(2048)
            for _ in range(2):
                flood.submit(request, payload)
            wait_until(lambda: self.conditions(client)[0])
            self.expect(client, "lane")
        wait_until(lambda: self.conditions(client) == ([], []), "the work of a client that left is over")

    def test_a_provider_that_the_configuration_asks_for_is_missed(self):
        daemon = self.start("--module", "gone=/nowhere/gone.so")
        self.assertEqual(self.conditions(self.client(daemon.address)), ([], ["provider gone: /nowhere/gone.so: No such file or directory"]))
        daemon = self.start("--module", "gone=/nowhere/gone.so", "--priority", "relu=gone,native")
        self.assertEqual(self.conditions(self.client(daemon.address)), (["provider gone: /nowhere/gone.so: No such file or directory"], []))


class Logs(WithFolder):
    def test_full_disk_under_the_log_stops_nothing(self):
        """Hardening: operations-disk"""
        daemon = self.start("--log-file", "/dev/full", "--log-level", "debug", log=False)
        for _ in range(20):
            check_healthy(self, daemon)

    def test_a_reader_of_stderr_that_is_gone_stops_nothing(self):
        folder = self.start().folder
        path = os.path.join(folder, "pipe.sock")
        process = subprocess.Popen([harness.OPD, "--listen", "unix:" + path, "--log-level", "debug"], stderr=subprocess.PIPE)
        self.addCleanup(process.kill)
        process.stderr.readline()
        process.stderr.close()
        wait_until(lambda: os.path.exists(path))
        for _ in range(20):
            with Client("unix:" + path) as client:
                client.ping()
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(timeout=PATIENCE), 0)

    def test_a_reader_of_stderr_that_sleeps_stops_nothing(self):
        folder = self.start().folder
        path = os.path.join(folder, "pipe.sock")
        process = subprocess.Popen([harness.OPD, "--listen", "unix:" + path, "--log-level", "debug"], stderr=subprocess.PIPE)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.kill)
        wait_until(lambda: listens(path))
        for _ in range(600):  # more lines than a pipe of 64 KiB holds
            with Client("unix:" + path) as client:
                client.call(run("no_such_op_%s" % ("x" * 90)))
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(timeout=PATIENCE), 0)

    def test_json_lines_all_parse(self):
        daemon = self.start("--log-format", "json", "--log-level", "debug")
        check_healthy(self, daemon)
        with Client(daemon.address, client='a "quoted"\n\x1b[31m name\\') as client:
            client.call(run("no\nsuch\x1b[0m op"))
        lines = [json.loads(line) for line in daemon.log_text().splitlines()]
        self.assertGreater(len(lines), 1)
        for line in lines:
            self.assertIn(line["level"], ("error", "warn", "info", "debug"))
            self.assertTrue(line["event"])

    def test_what_clients_say_never_reaches_the_log_raw(self):
        """Hardening: names-escapes"""
        for log_format in ("text", "json"):
            daemon = self.start("--log-format", log_format, "--log-level", "debug")
            with Client(daemon.address, client="evil\n2026-01-01T00:00:00Z error forged\x1b[2J\u202e") as client:
                client.call(run("bad\nname\x1b[31m"))
                client.call(pb.Request(load_module=pb.LoadModule(path="/x\n\x1b[31m.so")))
                request = run("rms_norm")
                request.run.priority.names.append("x\ny\x1b")
                client.call(request)
            check_healthy(self, daemon)
            with open(daemon.log_path, "rb") as file:
                data = file.read()
            self.assertNotIn(b"\x1b", data)
            self.assertNotIn("\u202e".encode(), data)
            self.assertFalse([line for line in data.splitlines() if line.startswith(b"2026-01-01T00:00:00Z")])

    def test_level_can_be_set_while_running(self):
        daemon = self.start()
        client = self.client(daemon.address)
        client.ask(pb.Request(set_log_level=pb.SetLogLevel(level="error")))
        client.ask(pb.Request(set_log_level=pb.SetLogLevel(level="debug")))
        reply, _ = client.call(pb.Request(set_log_level=pb.SetLogLevel(level="loud")))
        self.assertEqual(reply.status, INVALID_ARGUMENT)
        self.assertIn("loud", reply.message)


class Administration(WithFolder):
    def test_administrative_requests_over_tcp_are_permission_denied(self):
        daemon = self.start("--listen", "tcp://127.0.0.1:0")
        client = self.client(daemon.tcp_addresses()[0])
        for request in [
            pb.Request(set_log_level=pb.SetLogLevel(level="debug")),
            pb.Request(load_module=pb.LoadModule(path="/tmp/x.so")),
            pb.Request(drain=pb.Drain()),
            pb.Request(set_priority=pb.SetPriority(scope=pb.SCOPE_SERVER, op="relu", list=pb.ProviderList(names=["native"]))),
        ]:
            reply, _ = client.call(request)
            self.assertEqual(reply.status, PERMISSION_DENIED, reply)
        client.ask(pb.Request(set_priority=pb.SetPriority(scope=pb.SCOPE_SESSION, op="relu", list=pb.ProviderList(names=["native"]))))
        check_healthy(self, daemon)

    def test_a_drain_request_ends_the_daemon_with_code_0(self):
        daemon = self.start()
        self.client(daemon.address).ask(pb.Request(drain=pb.Drain()))
        self.assertEqual(daemon.wait(), 0)

    def test_server_default_holds_for_other_sessions_until_cleared(self):
        daemon = self.start()
        admin, other = self.client(daemon.address), self.client(daemon.address)

        def level():
            return other.ask(pb.Request(get_priority=pb.GetPriority(op="relu")))[0].priority.level

        admin.ask(pb.Request(set_priority=pb.SetPriority(scope=pb.SCOPE_SERVER, op="relu", list=pb.ProviderList(names=["native"]))))
        self.assertEqual(level(), pb.SERVER)
        admin.ask(pb.Request(set_priority=pb.SetPriority(scope=pb.SCOPE_SERVER, op="relu")))
        self.assertNotEqual(level(), pb.SERVER)

    def test_info_tells_what_the_daemon_is_doing(self):
        daemon = self.start("--memory", "64MiB", "--threads", "3")
        client = self.client(daemon.address)
        info = client.info()
        self.assertEqual(info.pid, daemon.process.pid)
        self.assertEqual(info.threads, 3)
        self.assertEqual(info.memory_limit_bytes, 64 << 20)
        self.assertGreaterEqual(info.sessions, 1)
        self.assertIn(daemon.address, info.listeners)
        self.assertFalse(info.draining)


class Neighbours(WithFolder):
    """Clients that misbehave, and the others who must not notice."""

    def serve_while(self, daemon, rounds=20):
        for _ in range(rounds):
            check_healthy(self, daemon)

    def test_idle_and_half_open_clients_hold_nobody_up(self):
        daemon = self.start()
        half = [self.client(daemon.address, hello=False) for _ in range(30)]
        for index, client in enumerate(half):
            client.send(frame(HELLO, envelope=hello_envelope())[: index + 1])
        idle = [self.client(daemon.address) for _ in range(30)]
        self.serve_while(daemon)
        idle[0].ping()

    def test_a_client_that_sends_one_byte_at_a_time_is_served_and_holds_nobody_up(self):
        """Hardening: framing-slow"""
        daemon = self.start()
        slow = self.client(daemon.address, hello=False)
        request, payload, _ = rms_norm()
        data = frame(HELLO, envelope=hello_envelope()) + frame(REQUEST, 1, request.SerializeToString(), payload)
        for index in range(len(data)):
            slow.send(data[index : index + 1])
            if index % 40 == 0:
                self.serve_while(daemon, 1)
        _, reply, _ = slow.read_reply(1)
        self.assertEqual(reply.status, OK, reply.message)

    def test_a_client_that_never_reads_holds_nobody_up_and_is_closed(self):
        """Hardening: promise-no-harm, sessions-no-reader"""
        daemon = self.start(config="limits: {stall: 500ms}\n")
        deaf = self.client(daemon.address)
        deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = run("relu", inline([256, 256], bytes(256 * 256 * 4)))
        data = frame(REQUEST, 1, request.SerializeToString())
        deaf.sock.setblocking(False)
        number, rest = 1, b""

        def closed():
            nonlocal number, rest
            try:
                while True:
                    if not rest:
                        rest = data[:8] + struct.pack("<Q", number) + data[16:]
                        number += 1
                    rest = rest[deaf.sock.send(rest) :]
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                return True

        def closed_after_serving():
            self.serve_while(daemon, 1)
            return closed()

        wait_until(closed_after_serving, "the deaf client is closed")
        wait_until(lambda: self.client(daemon.address).info().memory_bytes == 0, "its memory is released")

    def test_a_connection_that_never_says_hello_is_closed(self):
        daemon = self.start(config="limits: {handshake: 200ms}\n")
        silent, partial = self.client(daemon.address, hello=False), self.client(daemon.address, hello=False)
        partial.send(b"OPD1\x01\x01")
        silent.expect_end()
        partial.expect_end()
        with Client(daemon.address) as served:
            time.sleep(1.5)
            served.ping()  # a session that said hello may be idle as long as it likes

    def test_a_frame_that_stops_in_the_middle_is_closed(self):
        """Hardening: framing-slow"""
        daemon = self.start(config="limits: {stall: 300ms}\n")
        client, idle = self.client(daemon.address), self.client(daemon.address)
        client.send(frame(REQUEST, 1, rms_norm()[0].SerializeToString(), rms_norm()[1])[:-7])
        client.expect_end()
        idle.ping()

    def test_sessions_over_the_limit_are_refused_and_come_in_later(self):
        daemon = self.start(config="limits: {sessions: 4}\n")
        clients = [self.client(daemon.address) for _ in range(4)]
        with self.assertRaises((Failed, harness.Closed)) as caught:
            Client(daemon.address)
        if isinstance(caught.exception, Failed):
            self.assertIn(caught.exception.status, (UNAVAILABLE, harness.RESOURCE_EXHAUSTED))
            self.assertIn("4", caught.exception.text)
        clients[0].ping()
        clients.pop().close()

        def comes_in():
            try:
                Client(daemon.address).close()
                return True
            except (Failed, harness.Closed):
                return False

        wait_until(comes_in)

    def test_out_of_descriptors_sessions_go_on_and_new_ones_come_later(self):
        """Hardening: sessions-descriptors"""
        def limits():
            resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))

        daemon = self.start(limits=limits)
        session = self.client(daemon.address)
        storm = []
        for _ in range(80):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(PATIENCE)
            try:
                sock.connect(daemon.path)
            except OSError:
                sock.close()
                break
            storm.append(sock)
        for _ in range(20):
            session.ping()
        for sock in storm:
            sock.close()
        wait_until(lambda: daemon.descriptors() < 40, "the storm's descriptors are closed")
        check_healthy(self, daemon)
        session.ping()

    def test_connection_churn_leaves_no_descriptor_no_memory_and_no_session(self):
        daemon = self.start()
        check_healthy(self, daemon)
        with Client(daemon.address):
            before = daemon.descriptors()
        for turn in range(300):
            client = Client(daemon.address, hello=turn % 3 != 0)
            if turn % 3 == 1:
                request, payload, _ = rms_norm(64, 64)
                request.run.outputs.add(keep=True)
                client.submit(request, payload)
            if turn % 3 == 2:
                client.send(frame(REQUEST, 1, b"", b"x" * 100, payload_bytes=1 << 20))
            client.close()
        client = self.client(daemon.address)
        wait_until(lambda: client.info().sessions == 1, "the sessions are gone")
        wait_until(lambda: daemon.descriptors() <= before, "the descriptors are closed")
        wait_until(lambda: client.info().memory_bytes == 0, "the ledger is back to zero")

    def test_a_session_over_its_memory_is_refused_and_others_are_not(self):
        """Hardening: promise-memory"""
        daemon = self.start("--memory", "8MiB", "--session-memory", "2MiB")
        greedy = self.client(daemon.address)
        request = run("relu", tensor([1 << 19]))
        request.run.outputs.add(keep=True, no_copy=True)
        reply, _ = greedy.call(request, bytes(2 << 20))
        self.assertEqual(reply.status, harness.RESOURCE_EXHAUSTED, reply)
        self.assertRegex(reply.message, r"\d")
        check_healthy(self, daemon)
        greedy.ping()


if __name__ == "__main__":
    unittest.main(verbosity=2)
