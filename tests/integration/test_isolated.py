#!/usr/bin/python3
"""Isolated modules: a provider's code in worker processes. A crash there is one request's error, the worker starts again, the daemon is the same process.

OPD_BIN names the daemon, OPCTL_BIN opctl, OPD_MODULES the test modules.
"""
import ctypes
import glob
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
from harness import Client, Daemon, f32, inline, pb, run, tensor, unpack_f32
from test_containment import ABORT, ALONE, DEAF, ERROR, ESCAPE, EXIT, Faulty, HANG, HANG_POLITE, HOLD, KILL, MEET, MODULE, MUTE, OVERRUN, SCRATCH, SEGV, SHAPE, SHARES, TALK, relu

LENGTHS = PREDICATE_SEGV, PREDICATE_HANG, PREDICATE_NO, PLAN_SEGV, PLAN_NO, PLAN_ERROR, PLAN_HUGE = range(101, 108)
QUARANTINE_OFF = "quarantine: {failures: 0, provider_failures: 0}\n"
# A sanitizer turns a signal into its own exit.
DIED = r"its worker process (died of signal \d+|exited with code \d+)"


def workers(daemon):
    """The daemon's worker processes, zombies too."""
    found = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path) as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == daemon.process.pid:
            found.append(int(path.split("/")[2]))
    return found


def refuse_filters():
    """In the daemon before it is executed, for it and its workers: prctl(PR_SET_SECCOMP) is EINVAL, as in a kernel that was built without."""
    libc = ctypes.CDLL(None, use_errno=True)
    number, architecture = {"x86_64": (157, 0xC000003E), "aarch64": (167, 0xC00000B7)}[os.uname().machine]
    load, equal, give_back = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    code = [(load, 0, 0, 4), (equal, 0, 4, architecture), (load, 0, 0, 0), (equal, 0, 2, number), (load, 0, 0, 16), (equal, 1, 0, 22), (give_back, 0, 0, 0x7FFF0000), (give_back, 0, 0, 0x50000 | 22)]
    program = b"".join(struct.pack("<HBBI", *each) for each in code)
    text = ctypes.create_string_buffer(program, len(program))
    filters = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(text)))
    if libc.prctl(38, 1, 0, 0, 0) != 0 or libc.prctl(22, 2, filters, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no filter")


class Isolated(Faulty):
    isolated = True


class Calls(Isolated):
    def test_it_is_a_provider_like_any_other(self):
        daemon = self.daemon()
        client = self.client(daemon)
        for _ in range(3):
            self.works(client)
        found = self.provider(daemon)
        self.assertEqual((found["version"], found["available"], found["isolated"], found["deaths"], sorted(found["ops"])), ("1.0", True, True, 0, ["relu", "relu2", "sigmoid", "silu"]))
        self.assertEqual(len(workers(daemon)), 1)
        self.assertIn("faulty is open", daemon.log_text())
        with open("/proc/%d/maps" % daemon.process.pid) as file:
            self.assertNotIn("faulty.so", file.read())

    def test_its_predicate_and_its_plan_refuse_with_their_reasons(self):
        client = self.client(self.daemon())
        for length, reason in ((PREDICATE_NO, "size: 103 elements"), (PLAN_NO, "plan: 105 elements")):
            for _ in range(2):  # then from the cache
                reply = client.ask(relu(op="silu", length=length))[0]
                self.assertEqual((reply.run.provider, self.skipped(reply)["faulty"][1]), ("native", reason))
        x = inline([4], b"\0" * 8, dtype=8)
        reply = client.ask(run("relu", x, run_priority=["faulty", "native"], run_explain=True))[0]
        self.assertRegex(self.skipped(reply)["faulty"][1], "^dtype: x ")
        dry = client.ask(relu(op="silu", length=PLAN_NO, run_mode=pb.DRY))[0]
        self.assertEqual(dry.run.provider, "native")

    def test_large_and_empty_tensors_and_many_at_once(self):
        daemon = self.daemon("threads: 3\n")
        client = self.client(daemon)
        count = 1 << 16
        data = f32(*[float(i % 5 - 2) for i in range(count)])
        for _ in range(2):
            _, got = client.ask(run("relu", tensor([count]), run_priority=["faulty"], run_strict=True), data)
            self.assertEqual(got, f32(*[float(max(i % 5 - 2, 0)) for i in range(count)]))
        _, got = client.ask(run("relu", inline([0, 3], b""), run_priority=["faulty"], run_strict=True))
        self.assertEqual(got, b"")
        for _ in range(60):
            client.submit(relu())
        for _ in range(60):
            self.assertEqual(client.read_reply()[1].status, harness.OK)
        self.assertLessEqual(len(workers(daemon)), 3)

    def test_in_a_graph(self):
        client = self.client(self.daemon())
        nodes = [
            pb.GraphNode(op="relu", args=[pb.Argument(tensor=pb.Tensor(graph_input=0))], priority=pb.ProviderList(names=["faulty"]), strict=True),
            pb.GraphNode(op="silu", args=[pb.Argument(tensor=pb.Tensor(node=pb.NodeOutput(node=0)))], priority=pb.ProviderList(names=["faulty"]), strict=True),
        ]
        graph = pb.Graph(inputs=[pb.GraphInput(name="x")], nodes=nodes, outputs=[pb.GraphOutput(node=pb.NodeOutput(node=1))])

        def ask(first):
            return client.call(pb.Request(run_graph=pb.RunGraph(once=graph, inputs=[pb.Argument(tensor=inline([2], f32(first, 1)))], inline_results=True)))[0]

        self.assertAlmostEqual(unpack_f32(ask(0).run.outputs[0].tensor.inline)[1], 0.7310586, places=5)
        reply = ask(SEGV)
        self.assertEqual(reply.status, harness.INTERNAL)
        self.assertRegex(reply.message, DIED)
        self.assertEqual(ask(0).status, harness.OK)

    def test_the_others_kernels_errors_are_as_they_would_be_here(self):
        client = self.client(self.daemon(QUARANTINE_OFF))
        self.assertEqual(self.fails(client, ERROR), "faulty.relu: told to fail")
        self.assertEqual(self.fails(client, MUTE), "faulty.relu failed")
        self.assertEqual(self.fails(client, OVERRUN), "faulty.relu wrote past the end of result 0, at byte 16 of 16")
        self.assertEqual(self.fails(client, SCRATCH), "faulty.relu wrote past the end of its scratch, at byte 100 of 100")
        self.works(client)
        self.assertEqual(client.call(relu(op="silu", length=PLAN_ERROR))[0].message, "faulty.silu: no plan for 106")
        self.assertEqual(client.call(relu(SHAPE))[0].status, harness.OK)  # it has changed its own copy


class Kept(Isolated):
    """Large operands whose contents stay are mapped by a worker once, read-only, and let go of when they end."""

    COUNT = 1 << 17

    def setUp(self):
        self.server = self.daemon(QUARANTINE_OFF)
        self.user = self.client(self.server)

    def upload(self, value):
        return self.user.ask(pb.Request(upload=pb.Upload(tensor=tensor([self.COUNT]))), f32(*[float(value)] * self.COUNT))[0].run.outputs[0].kept

    def relu(self, handle, wanted):
        _, got = self.user.ask(run("relu", pb.Tensor(handle=handle), run_priority=["faulty"], run_strict=True))
        self.assertEqual(got, f32(*[float(wanted)] * self.COUNT))

    def mapped(self):
        """The permissions of what the workers have mapped of constants."""
        lines = []
        for pid in workers(self.server):
            with open("/proc/%d/maps" % pid) as file:
                lines += [line.split()[1] for line in file if "opd-constant" in line]
        return lines

    def test_it_is_mapped_when_it_comes_again_and_once(self):
        handle = self.upload(3)
        self.relu(handle, 3)
        self.assertEqual(self.mapped(), [])  # what comes once isn't worth it
        for _ in range(4):
            self.relu(handle, 3)
        self.assertEqual(self.mapped(), ["r--s"])
        info = self.user.info()
        self.assertEqual((info.derived_copies, info.derived_bytes, info.derived_made, info.derived_found), (1, 4 * self.COUNT, 1, 3))

    def test_it_ends_with_the_tensor(self):
        handle = self.upload(3)
        for _ in range(3):
            self.relu(handle, 3)
        self.user.ask(pb.Request(free=pb.Free(tensors=[pb.Tensor(handle=handle)])))
        self.assertEqual(self.user.info().derived_copies, 0)
        harness.wait_until(lambda: self.mapped() == [], "the worker lets go of it")

    def test_a_new_worker_has_it_again(self):
        handle = self.upload(3)
        for _ in range(3):
            self.relu(handle, 3)
        before = workers(self.server)
        self.fails(self.user, KILL)
        self.relu(handle, 3)
        self.assertNotEqual(workers(self.server), before)
        self.assertEqual(self.mapped(), ["r--s"])

    def test_a_session_that_ends_leaves_none(self):
        handle = self.upload(3)
        for _ in range(3):
            self.relu(handle, 3)
        self.user.close()
        other = self.client(self.server)
        harness.wait_until(lambda: other.info().derived_copies == 0 and self.mapped() == [], "nothing is left of it")


def sigmoid(fault, length=64):
    values = [float(fault or 0.5)] + [i / 7 - 4 for i in range(1, length)]
    return run("sigmoid", inline([length], f32(*values)), run_priority=["faulty"], run_strict=True, run_inline_results=True)


class Threads(Isolated):
    """A kernel's loops have as many threads in a worker as in the daemon, and no more run than the lane has."""

    def setUp(self):
        self.gate = os.path.join(tempfile.mkdtemp(prefix="opd-gate-"), "open")
        self.addCleanup(shutil.rmtree, os.path.dirname(self.gate), True)

    def start(self, threads, config=""):
        daemon = self.daemon("threads: %d\n%s%s" % (threads, QUARANTINE_OFF, config), FAULTY_GATE=self.gate)
        return daemon, self.client(daemon)

    def running(self, client):
        return client.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.lanes[0].running

    def result(self, client, fault):
        return client.ask(sigmoid(fault))[0].run.outputs[0].tensor.inline

    def test_bits_and_shares_are_those_of_the_same_module_in_the_daemon(self):
        for threads in range(1, 5):
            here = Daemon("--module", MODULE, config="threads: %d\n" % threads)
            self.addCleanup(here.stop)
            _, there = self.start(threads)
            with Client(here.address) as client:
                for fault in (0, SHARES):
                    self.assertEqual(self.result(there, fault), self.result(client, fault))
                self.assertEqual(len(set(unpack_f32(self.result(client, SHARES)))), 1 if threads == 1 else 16 * threads)

    def test_threads_without_work_help_again_and_again(self):
        _, client = self.start(2)
        for _ in range(5):
            self.result(client, MEET)

    def test_threads_with_work_do_not(self):
        daemon, client = self.start(2)
        other = self.client(daemon)
        self.works(other)
        other.submit(relu(HANG, run_priority=["faulty"]))
        harness.wait_until(lambda: self.running(client) == 1, "the other thread has work")
        self.assertEqual(unpack_f32(self.result(client, ALONE))[0], 1)
        with open(self.gate, "w"):
            pass
        self.assertEqual(other.read_reply()[1].status, harness.OK)
        self.result(client, MEET)

    def test_many_at_once(self):
        daemon, client = self.start(3)
        for _ in range(24):
            client.submit(sigmoid(ALONE))
        for _ in range(24):
            self.assertEqual(client.read_reply()[1].status, harness.OK)
        self.assertLessEqual(len(workers(daemon)), 3)
        self.result(client, MEET)

    def test_a_crash_in_a_helper_is_that_requests_error(self):
        """Hardening: providers-crashes"""
        _, client = self.start(2)
        for fault in (SEGV, ABORT, EXIT, KILL):
            reply = client.call(sigmoid(fault))[0]
            self.assertEqual(reply.status, harness.INTERNAL)
            self.assertRegex(reply.message, "^faulty.sigmoid: " + DIED)
            self.result(client, MEET)

    def test_a_worker_killed_while_its_threads_are_in_a_loop(self):
        daemon, client = self.start(2)
        self.result(client, MEET)
        pid, = workers(daemon)
        client.submit(sigmoid(HANG))
        harness.wait_until(lambda: "a helper hangs" in daemon.log_text(), "a second thread is in the loop")
        os.kill(pid, signal.SIGKILL)
        reply = client.read_reply()[1]
        self.assertEqual((reply.status, reply.message), (harness.INTERNAL, "faulty.sigmoid: its worker process died of signal 9 (Killed)"))
        self.result(client, MEET)

    def test_a_helper_that_hangs_is_ended_by_the_budget_and_when_nobody_wants_the_result(self):
        """Hardening: providers-hangs"""
        daemon, client = self.start(2, "providers: {faulty: {budget: 500ms}}\n")
        reply = client.call(sigmoid(HANG))[0]
        self.assertEqual(reply.status, harness.DEADLINE_EXCEEDED)
        self.works(client)
        daemon, _ = self.start(2)
        with Client(daemon.address) as leaving:
            leaving.submit(sigmoid(HANG))
            leaving.ping()
        self.result(self.client(daemon), MEET)  # both of the lane's threads are free again


class Crashes(Isolated):
    """Hardening: providers-crashes"""

    def test_a_crash_is_that_requests_error_and_the_next_is_served(self):
        """Hardening: providers-crashes, promise-containment"""
        daemon = self.daemon(QUARANTINE_OFF)
        client, other = self.client(daemon), self.client(daemon)
        harness.wait_until(lambda: client.info().sessions == 2, "the one that saw it start has gone")
        self.works(other)
        descriptors = daemon.descriptors()
        for turn, fault in enumerate((SEGV, ABORT, EXIT, KILL), 1):
            text = self.fails(client, fault)
            self.assertRegex(text, "^faulty.relu: " + DIED)
            self.works(other)
            self.assertEqual(self.provider(daemon)["deaths"], turn)
        self.assertRegex(text, r"died of signal 9 \(Killed\)")
        self.assertEqual(daemon.log_text().count("worker died"), 4)
        harness.wait_until(lambda: (daemon.descriptors(), len(workers(daemon))) == (descriptors, 1), "what opctl's connections and the dead had is closed")
        harness.wait_until(lambda: client.info().session_memory_bytes == 0, "its memory is given back")

    def test_a_crash_in_a_predicate_or_a_plan_is_too(self):
        daemon = self.daemon(QUARANTINE_OFF)
        client = self.client(daemon)
        for length in (PREDICATE_SEGV, PLAN_SEGV):
            reply = client.call(relu(op="silu", length=length))[0]
            self.assertEqual(reply.status, harness.INTERNAL)
            self.assertRegex(reply.message, "^faulty.silu: " + DIED)
            self.works(client)

    def test_the_next_provider_answers_where_the_request_allows_it(self):
        client = self.client(self.daemon())
        reply = client.ask(relu(SEGV, run_retry=True))[0]
        self.assertEqual((reply.run.provider, unpack_f32(reply.run.outputs[0].tensor.inline)), ("native", (SEGV, 0, 1, 2)))

    def test_crash_after_crash_isnt_started_at_once_and_ends_in_quarantine(self):
        daemon = self.daemon("quarantine: {failures: 5, cooldown: 1h}")
        client = self.client(daemon)
        statuses, crashes = set(), 0
        while crashes < 5:
            reply = client.call(relu(SEGV))[0]
            crashes += reply.status == harness.INTERNAL
            statuses.add(reply.status)
            if reply.status == harness.UNAVAILABLE:
                self.assertRegex(reply.message, "its last \\d+ worker processes died: the next starts in \\d+ ms")
        self.assertEqual(statuses, {harness.INTERNAL, harness.UNAVAILABLE})
        reply = self.works(client, "native")
        self.assertEqual(self.skipped(reply)["faulty"][1], "quarantine: 5 failures (crash 5)")

    def test_a_plan_that_was_made_by_a_worker_that_died_is_made_again(self):
        client = self.client(self.daemon(QUARANTINE_OFF))
        self.works(client)
        self.fails(client, KILL)
        self.works(client)

    def test_a_worker_killed_from_outside_costs_one_request_at_most(self):
        daemon = self.daemon(QUARANTINE_OFF)
        client = self.client(daemon)
        self.works(client)
        for pid in workers(daemon):
            os.kill(pid, signal.SIGKILL)
        reply = client.call(relu())[0]
        self.assertIn(reply.status, (harness.OK, harness.INTERNAL))
        self.works(client)

    def test_a_module_that_crashes_when_it_is_opened_is_not_there(self):
        daemon = self.daemon("", FAULTY_OPEN="segv")
        self.assertRegex(daemon.log_text(), "module not loaded.*its worker process .* while it opened the module")
        client = self.client(daemon)
        reply = self.works(client, "native")
        self.assertRegex(self.skipped(reply)["faulty"][1], "^module: .*its worker process")
        self.assertEqual(workers(daemon), [])


class Hangs(Isolated):
    """Hardening: providers-hangs"""

    def setUp(self):
        self.gate = os.path.join(tempfile.mkdtemp(prefix="opd-gate-"), "open")
        self.addCleanup(shutil.rmtree, os.path.dirname(self.gate), True)

    def test_a_kernel_that_exceeds_its_budget_is_killed(self):
        """Hardening: providers-hangs"""
        daemon = self.daemon(QUARANTINE_OFF + "providers: {faulty: {budget: 100ms}}", FAULTY_GATE=self.gate)
        client = self.client(daemon)
        for request in (relu(HANG), relu(op="silu", length=PREDICATE_HANG)):
            reply = client.call(request)[0]
            self.assertEqual(reply.status, harness.DEADLINE_EXCEEDED, reply.message)
            self.assertRegex(reply.message, "has exceeded its budget of 100000 us, and its worker process was ended")
            self.works(client)
        self.assertEqual(client.info().stuck, 0)
        harness.wait_until(lambda: client.info().session_memory_bytes == 0, "its memory is given back")

    def test_a_cancelled_kernel_is_told_and_ended_if_it_doesnt_listen(self):
        daemon = self.daemon("threads: 1\n" + QUARANTINE_OFF, FAULTY_GATE=self.gate)
        for fault in (HANG_POLITE, HANG):
            with Client(daemon.address) as client:
                client.submit(relu(fault))
                client.ping()
            other = self.client(daemon)
            self.works(other)  # on the one thread
        self.assertEqual(self.provider(daemon)["failures"], 0)

    def test_nothing_is_left_when_the_daemon_is_killed_in_mid_kernel(self):
        daemon = self.daemon("", FAULTY_GATE=self.gate)
        client = self.client(daemon)
        pid, = workers(daemon)
        client.submit(relu(HANG))
        client.ping()
        daemon.process.kill()
        daemon.process.wait()
        harness.wait_until(lambda: not os.path.exists("/proc/%d" % pid), "the worker's end")


class Hostile(Isolated):
    """Workers that don't keep to what was agreed: the daemon waits for none of them."""

    def test_one_that_answers_without_reading_is_ended(self):
        """Hardening: providers-hangs"""
        client = self.client(self.daemon("threads: 1\n" + QUARANTINE_OFF))
        self.works(client)
        reply = client.ask(relu(DEAF))[0]
        for _ in range(5000):  # more than the system queues for it
            if reply.status == harness.OK:
                reply = client.call(relu())[0]
        self.assertEqual((reply.status, reply.message), (harness.INTERNAL, "faulty.relu: its worker process doesn't read what it is sent, and was ended"))
        self.works(client)

    def test_one_that_keeps_a_helping_thread_is_ended(self):
        """Hardening: providers-hangs"""
        client = self.client(self.daemon("threads: 2\n" + QUARANTINE_OFF))
        reply = client.call(sigmoid(HOLD))[0]
        self.assertEqual((reply.status, reply.message), (harness.INTERNAL, "faulty.sigmoid: its worker process keeps threads that have helped it, and was ended"))
        client.ask(sigmoid(MEET))  # both of the lane's threads are free again

    def test_an_idle_one_that_stands_still_holds_up_nobody(self):
        """… however much there is that it should let go of."""
        daemon = self.daemon("threads: 1\n" + QUARANTINE_OFF)
        other = self.client(daemon)
        with Client(daemon.address) as client:
            for i in range(300):
                handle = client.ask(pb.Request(upload=pb.Upload(tensor=tensor([1 << 14]))), f32(float(i)) * (1 << 14))[0].run.outputs[0].kept
                for _ in range(2):
                    client.ask(run("relu", pb.Tensor(handle=handle), run_priority=["faulty"], run_strict=True))
            pid, = workers(daemon)
            self.assertEqual(self.constants(pid), 300)
            os.kill(pid, signal.SIGSTOP)
        harness.wait_until(lambda: other.info().sessions == 1 and not self.constant_descriptors(daemon), "the daemon has let go of them")
        self.assertEqual(self.constants(pid), 300)
        os.kill(pid, signal.SIGCONT)
        harness.wait_until(lambda: self.constants(pid) == 0, "so has the worker")
        self.works(other)
        self.assertEqual(workers(daemon), [pid])

    def constants(self, pid):
        with open("/proc/%d/maps" % pid) as file:
            return sum("opd-constant" in line for line in file)

    def constant_descriptors(self, daemon):
        found = []
        for path in glob.glob("/proc/%d/fd/*" % daemon.process.pid):
            try:
                found.append(os.readlink(path))
            except FileNotFoundError:
                pass  # closed meanwhile
        return [link for link in found if "opd-constant" in link]

    def test_a_plan_that_wants_more_scratch_than_there_is_address_space_is_refused(self):
        client = self.client(self.daemon(QUARANTINE_OFF))
        reply = client.call(relu(op="silu", length=PLAN_HUGE, run_strict=True))[0]
        self.assertEqual((reply.status, reply.message), (harness.RESOURCE_EXHAUSTED, "faulty.silu: the call is too large for a worker process"))
        self.works(client)

    def test_one_that_talks_without_end_doesnt_fill_the_log(self):
        daemon = self.daemon()
        client = self.client(daemon)
        for _ in range(5):
            client.ask(relu(TALK))
        self.assertLess(daemon.log_text().count("faulty talks"), 2500)  # so many were said; 600 are written in each minute that they took


class Sandbox(Isolated):
    def test_a_worker_has_no_descriptors_of_the_daemons_no_new_privileges_and_no_core_files(self):
        daemon = self.daemon("threads: 2\n")
        with Client(daemon.address) as client:
            self.works(client)
            pid, = workers(daemon)
            links = {name: os.readlink("/proc/%d/fd/%s" % (pid, name)) for name in os.listdir("/proc/%d/fd" % pid)}
            self.assertEqual((links.pop("0"), links.pop("1")), ("/dev/null", "/dev/null"))
            links.pop("2")
            self.assertEqual({link.split(":")[0] for link in links.values()}, {"socket"})
            self.assertEqual(len(links), 2)  # for calls, and for help with their loops
            with open("/proc/%d/status" % pid) as file:
                self.assertIn("NoNewPrivs:\t1", file.read())
            with open("/proc/%d/limits" % pid) as file:
                self.assertRegex(file.read(), r"Max core file size\s+0\s+0")

    def test_a_worker_gets_no_process_no_network_and_no_file_to_write(self):
        """… all of which the same module does where it isn't isolated."""
        request = relu(ESCAPE, run_priority=["faulty"])
        with Client(self.daemon().address) as client:
            self.assertEqual(unpack_f32(client.ask(request)[0].run.outputs[0].tensor.inline)[0], 0)
        here = Daemon("--module", MODULE)
        self.addCleanup(here.stop)
        with Client(here.address) as client:
            self.assertEqual(unpack_f32(client.ask(request)[0].run.outputs[0].tensor.inline)[0], 255)

    def unfiltered(self, isolated):
        """A daemon whose kernel has no seccomp filters, as far as its processes can see."""
        config = "modules: [{name: faulty, path: %s, isolated: %s}]\n" % (MODULE, isolated)
        daemon = Daemon(config=config, limits=refuse_filters)
        self.addCleanup(daemon.stop)
        client = Client(daemon.address)
        self.addCleanup(client.close)
        return daemon, client

    def test_a_kernel_that_confines_no_worker_is_told_of_in_the_log_and_by_opctl(self):
        daemon, client = self.unfiltered("true")
        self.assertRegex(daemon.log_text(), "warn the workers of an isolated module aren't confined provider=faulty missing=\"seccomp filter: Invalid argument\"")
        self.assertEqual(self.provider(daemon)["unconfined"], "seccomp filter: Invalid argument")
        self.works(client)  # its faults are contained all the same
        confined = self.daemon()
        self.assertEqual(self.provider(confined)["unconfined"], "")
        self.assertNotIn("confined", confined.log_text())

    def test_where_confinement_is_demanded_the_module_is_not_there_without_it(self):
        daemon, client = self.unfiltered("confined")
        reply = self.works(client, "native")
        self.assertRegex(self.skipped(reply)["faulty"][1], "^module: .*faulty.so: it must be confined, and this kernel doesn't: seccomp filter: Invalid argument$")
        self.assertEqual(workers(daemon), [])
        confined = Daemon(config="modules: [{name: faulty, path: %s, isolated: confined}]\n" % MODULE)
        self.addCleanup(confined.stop)
        with Client(confined.address) as other:
            self.works(other)
        self.assertEqual(len(workers(confined)), 1)

    def test_it_ends_with_the_daemon(self):
        daemon = self.daemon()
        pid, = workers(daemon)
        daemon.signal(signal.SIGTERM)
        self.assertEqual(daemon.wait(), 0)
        self.assertFalse(os.path.exists("/proc/%d" % pid))


class Modules(unittest.TestCase):
    def load(self, path):
        daemon = Daemon("--isolated", path)
        self.addCleanup(daemon.stop)
        return daemon

    def test_what_an_isolated_module_cant_have_is_refused_by_name(self):
        log = self.load(harness.built_module("device")).log_text()
        self.assertRegex(log, "module not loaded.*an isolated module can't bring devices")

    def test_bad_modules_are_refused_as_they_would_be_here(self):
        for name, reason in (("wrong_abi", "provider ABI"), ("no_symbol", "no symbol"), ("open_fails", "open"), ("bad_schema", "schema"), ("unknown_op", "no op")):
            self.assertRegex(self.load(harness.built_module(name)).log_text(), "module not loaded.*" + reason)

    def test_a_configured_name_must_be_the_modules(self):
        self.assertRegex(self.load("other=" + MODULE).log_text(), "module not loaded.*its provider is called faulty, configured as other")


if __name__ == "__main__":
    unittest.main(verbosity=2)
