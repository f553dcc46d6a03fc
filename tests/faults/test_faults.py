#!/usr/bin/python3
"""The nth allocation, read, write, log line, accept, thread, module of a scripted run fails, in the real daemon: every step ends with its result or a typed error or a closed connection that the log tells of, the
next client is unaffected, nothing is left in the ledger, and the daemon ends with code 0. One that can't start says why and ends with its code.

usage: test_faults.py                    some n of each class (CTest)
       test_faults.py --all [CLASS…]     every n that the run reaches (minutes)
       test_faults.py --one CLASS:N      one, and what it did

OPD_BIN names the daemon, OPD_SHIM the preloaded library, OPD_MODULES the test module.
"""
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "tests", "integration"))
import harness
from harness import Client, Closed, Failed, f32, inline, pb, run, tensor, unpack_f32

BUILD = os.path.join(ROOT, ".build", "release")
SHIM = os.environ.get("OPD_SHIM", os.path.join(BUILD, "tests", "faults", "shim.so"))
os.environ.setdefault("OPD_BUILD", BUILD)
MODULE = harness.built_module("faulty")
SHIMMED = ("alloc", "read", "write", "log", "accept", "thread", "open")
CLASSES = (*SHIMMED, "kernel", "provider")  # the last two by the module itself: the nth kernel, and its open
SAMPLES = 6  # of each class where not all are wanted
# What a daemon that can't start may end with: README.md, "Exit codes".
START_CODES = (1, 2, 3)


class Broken(Exception):
    pass


class Daemon:
    def __init__(self, folder, fault):
        self.folder = folder
        self.address = "unix:" + os.path.join(folder, "sock")
        self.log_path = os.path.join(folder, "log")
        self.counts_path = os.path.join(folder, "counts")
        self.metrics = os.path.join(folder, "metrics")
        config = os.path.join(folder, "opd.yaml")
        with open(config, "w") as file:
            file.write("threads: 2\nmetrics: unix:%s\nmodules: [{name: faulty, path: %s}]\n" % (self.metrics, MODULE))
        self.kernels_path = os.path.join(folder, "kernels")
        environment = dict(os.environ, LD_PRELOAD=SHIM, OPD_FAULT=fault or "", OPD_FAULT_COUNTS=self.counts_path, OPD_FAULT_TRACE="1", FAULTY_COUNT=self.kernels_path)
        kind, _, number = (fault or "").partition(":")
        if kind == "kernel":
            environment["FAULTY_NTH"] = number
        if kind == "provider":
            environment["FAULTY_OPEN"] = "fail"
        # A daemon built with ASan: the shim stands before it, and the loader keeps 56 bytes of a library that `backtrace` has wanted.
        suppressions = os.path.join(folder, "suppressions")
        with open(suppressions, "w") as file:
            file.write("leak:dl_open_worker_begin\n")
        environment["ASAN_OPTIONS"] = os.environ.get("ASAN_OPTIONS", "detect_leaks=1:detect_stack_use_after_return=1") + ":verify_asan_link_order=0"
        environment["LSAN_OPTIONS"] = "print_suppressions=0:suppressions=" + suppressions
        with open(os.path.join(folder, "stderr"), "wb") as err:
            self.process = subprocess.Popen([harness.OPD, "--config", config, "--listen", self.address, "--log-file", self.log_path], stdin=subprocess.DEVNULL,
                                            stdout=err, stderr=err, env=environment)

    def output(self):
        text = ""
        for name in ("log", "stderr"):
            try:
                with open(os.path.join(self.folder, name), errors="replace") as file:
                    text += file.read()
            except OSError:
                pass
        return text

    def ended_by_libuv(self):
        """libuv aborts when the table of its loop's descriptors can't grow (maybe_resize): nothing of ours is asked."""
        callers = [line for line in self.output().splitlines() if "[0x" in line and "shim.so" not in line and "libasan" not in line]
        return self.process.poll() == -signal.SIGABRT and bool(callers) and "libuv" in callers[0]

    def counts(self):
        found = {"provider": 1}
        for path in (self.counts_path, self.kernels_path):
            with open(path) as file:
                found.update((name, int(count)) for name, count in (line.split() for line in file))
        return found

    def wait_listening(self):
        """False: it has ended instead."""
        until = time.monotonic() + harness.PATIENCE
        while time.monotonic() < until:
            if self.process.poll() is not None:
                return False
            try:
                harness.connect("unix:" + self.metrics).close()
                harness.connect(self.address).close()
                return True
            except OSError:
                time.sleep(0.005)
        raise Broken("it neither listens nor ends")


def step(what):
    """A step's result; None where it ended with a typed error or a closed connection."""
    try:
        return what()
    except (Closed, Failed, BrokenPipeError, ConnectionResetError):
        return None


def expect(right, what):
    if not right:
        raise Broken(what)


def use(client):
    """What one client does; a value that comes back is right, whatever else fails."""
    request, payload, wanted = harness.rms_norm()
    got = step(lambda: client.ask(request, payload))
    expect(got is None or all(abs(a - b) < 1e-4 for a, b in zip(unpack_f32(got[1]), wanted)), "a wrong result")
    relu = run("relu", inline([3], f32(-1, 0, 2)), run_priority=["faulty", "native"], run_inline_results=True, run_explain=True)
    got = step(lambda: client.ask(relu))
    expect(got is None or unpack_f32(got[0].run.outputs[0].tensor.inline) == (0, 0, 2), "a wrong result of relu")
    retried = run("relu", inline([3], f32(-1, 0, 2)), run_priority=["faulty", "native"], run_inline_results=True, run_retry=True)
    got = step(lambda: client.ask(retried))
    expect(got is None or unpack_f32(got[0].run.outputs[0].tensor.inline) == (0, 0, 2), "a wrong result where the next provider may answer")
    kept = step(lambda: client.ask(pb.Request(upload=pb.Upload(tensor=tensor([512]))), f32(*[1.0] * 512))[0].run.outputs[0].kept)
    if kept is not None:
        got = step(lambda: client.ask(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=kept)))))
        expect(got is None or got[1] == f32(*[1.0] * 512), "other bytes came back")
        keeping = run("relu", pb.Tensor(handle=kept), run_priority=["faulty"])
        keeping.run.outputs.add(keep=True, no_copy=True)
        step(lambda: client.ask(keeping))
    faulty = pb.ProviderList(names=["faulty", "native"])
    nodes = [pb.GraphNode(op="relu", args=[pb.Argument(tensor=source)], priority=faulty) for source in (pb.Tensor(graph_input=0), pb.Tensor(node=pb.NodeOutput()))]
    graph = pb.Graph(inputs=[pb.GraphInput(name="x")], nodes=nodes, outputs=[pb.GraphOutput(node=pb.NodeOutput(node=1))])
    got = step(lambda: client.ask(pb.Request(run_graph=pb.RunGraph(once=graph, inputs=[pb.Argument(tensor=inline([2], f32(-1, 1)))], inline_results=True))))
    expect(got is None or unpack_f32(got[0].run.outputs[0].tensor.inline) == (0, 1), "a wrong result of a graph")
    step(lambda: client.ask(pb.Request(list_providers=pb.Empty())))
    step(client.ping)


def scrape(daemon):
    """The metrics endpoint's answer; b"" where the connection ends without one."""
    answer = b""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(harness.PATIENCE)
        with contextlib.suppress(ConnectionError):
            sock.connect(daemon.metrics)
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            while got := sock.recv(1 << 16):
                answer += got
    return answer


def script(daemon):
    client = step(lambda: Client(daemon.address))
    if client is not None:
        with client:
            use(client)
    scrape(daemon)
    return client is not None


def served(daemon):
    """A client that nothing fails for. One call fails in all, but libuv then closes every connection that it finds until there is none (uv__emfile_trick): who comes back at once may be among them."""
    for _ in range(20):
        try:
            with Client(daemon.address) as client:
                client.ping()
                request, payload, wanted = harness.rms_norm()
                _, data = client.ask(request, payload)
                expect(all(abs(a - b) < 1e-4 for a, b in zip(unpack_f32(data), wanted)), "a wrong result afterwards")
                harness.wait_until(lambda: client.info().sessions == 1, "the first session's end")
                harness.wait_until(lambda: client.info().memory_bytes == 0, "the ledger at zero")
                if b"opd_uptime_seconds" not in scrape(daemon):
                    raise Closed("no metrics came")
                return
        except (Closed, Failed, OSError) as failure:
            last = failure
            time.sleep(0.01)
    raise Broken("the next client isn't served: %s" % last)


def end(daemon):
    daemon.process.send_signal(signal.SIGTERM)
    code = daemon.process.wait(timeout=harness.PATIENCE)
    expect(code == 0, "it ended with %d after a drain" % code)


def attempt(fault):
    """One run; how it went, in a word."""
    with tempfile.TemporaryDirectory(prefix="opd-fault-") as folder:
        daemon = Daemon(folder, fault)
        try:
            if not daemon.wait_listening():
                code = daemon.process.returncode
                expect(code in START_CODES, "it ended with %d when it started" % code)
                expect("error" in daemon.output() or "opd: " in daemon.output(), "it didn't say why it can't start")
                return "not started"
            done = script(daemon)
            served(daemon)
            end(daemon)
            return "served" if done else "refused"
        except (Broken, AssertionError, subprocess.TimeoutExpired) as failure:
            if daemon.ended_by_libuv():
                return "aborted by libuv"
            raise Broken("%s: %s\n%s" % (fault, failure, daemon.output()[-3000:]))
        finally:
            if daemon.process.poll() is None:
                daemon.process.kill()
            daemon.process.wait()


def reached():
    """How often each class is called in a run without a fault."""
    with tempfile.TemporaryDirectory(prefix="opd-fault-") as folder:
        daemon = Daemon(folder, None)
        expect(daemon.wait_listening(), "it doesn't start: " + daemon.output())
        script(daemon)
        served(daemon)
        end(daemon)
        counts = daemon.counts()
        expect(all(counts[name] > 0 for name in CLASSES), "a class of calls isn't seen at all: %s" % counts)
        return counts


def chosen(count, everything):
    if everything or count <= SAMPLES:
        return range(1, count + 1)
    # the last calls of a run, which are its requests', matter most: half of the sample is among the last tenth
    half = SAMPLES // 2
    return sorted({1 + i * count // half for i in range(half)} | {count - i * (count // 10) // half for i in range(half)})


def main(arguments):
    if arguments[:1] == ["--one"]:
        print(arguments[1], attempt(arguments[1]))
        return 0
    if not os.path.exists(SHIM):
        sys.exit("%s isn't there: build test_fault_shim, or set OPD_SHIM" % SHIM)
    everything = arguments[:1] == ["--all"]
    classes = arguments[1:] or CLASSES
    counts, broken = reached(), []
    for name in classes:
        went = {}
        for n in chosen(counts[name], everything):
            try:
                how = attempt("%s:%d" % (name, n))
            except Broken as failure:
                how = "BROKEN"
                broken.append(str(failure))
            went[how] = went.get(how, 0) + 1
        print("%-7s %5d calls: %s" % (name, counts[name], ", ".join("%d %s" % (count, how) for how, count in sorted(went.items()))), flush=True)
    for text in broken[:10]:
        print(text)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
