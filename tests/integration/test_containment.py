#!/usr/bin/python3
"""A provider that fails, hangs, crashes or returns garbage hurts its own requests only, and is reported by name: the module tests/modules/faulty does all of it when it is told to.

OPD_BIN names the daemon, OPCTL_BIN opctl, OPD_MODULES the test module.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
from harness import Client, Daemon, f32, inline, pb, run, unpack_f32

BUILD = os.environ.get("OPD_BUILD", os.path.join(harness.ROOT, "build"))
OPCTL = os.environ.get("OPCTL_BIN", os.path.join(BUILD, "bin", "opctl"))
MODULE = harness.built_module("faulty")
ERROR, OVERRUN, SHAPE, VALUE, SCRATCH, SEGV, ABORT, EXIT, KILL, HANG, HANG_POLITE, ARGUMENT, MUTE, ESCAPE, MEET, ALONE, SHARES, HOLD, DEAF, TALK = range(1001, 1021)
REASON_QUARANTINE = 4


def relu(fault=0, op="relu", length=4, **fields):
    """A request that faulty is asked first for, and native second."""
    values = [float(fault)] + [float(i - 1) for i in range(1, length)]
    fields.setdefault("run_priority", ["faulty", "native"])
    return run(op, inline([length], f32(*values)), run_inline_results=True, run_explain=True, **fields)


class Faulty(unittest.TestCase):
    isolated = False

    def daemon(self, config="", flags=(), **environment):
        config = "modules: [{name: faulty, path: %s%s}]\n%s" % (MODULE, ", isolated: true" if self.isolated else "", config)
        daemon = Daemon(*flags, config=config, environment=environment)
        self.addCleanup(self.finish, daemon)
        return daemon

    def finish(self, daemon):
        if daemon.process.poll() is None:
            harness.check_healthy(self, daemon)
        daemon.stop(code=daemon.process.poll() or 0)

    def client(self, daemon):
        client = Client(daemon.address)
        self.addCleanup(client.close)
        return client

    def fails(self, client, fault, status=harness.INTERNAL, **fields):
        reply = client.call(relu(fault, **fields))[0]
        self.assertEqual(reply.status, status, reply.message)
        return reply.message

    def works(self, client, provider="faulty", **fields):
        """relu is right, and `provider` has run it; the reply."""
        reply = client.ask(relu(**fields))[0]
        self.assertEqual((reply.run.provider, list(unpack_f32(reply.run.outputs[0].tensor.inline))), (provider, [0, 0, 1, 2]))
        return reply

    def skipped(self, reply):
        return {skip.provider: (skip.code, skip.reason) for skip in reply.run.explain.skipped}

    def opctl(self, daemon, *words, code=0):
        done = subprocess.run([OPCTL, "--connect", daemon.address, "--json", *words], capture_output=True, text=True, timeout=harness.PATIENCE)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return json.loads(done.stdout) if code == 0 else done.stdout + done.stderr

    def provider(self, daemon, name="faulty"):
        return [one for one in self.opctl(daemon, "providers") if one["name"] == name][0]


class Checked(Faulty):
    """Hardening: providers-overrun, providers-shape"""

    def test_writing_past_a_result_or_the_scratch_is_an_internal_error_that_says_where(self):
        daemon = self.daemon("providers: {faulty: {checked: true}}")
        client = self.client(daemon)
        self.works(client)
        self.assertEqual(self.fails(client, OVERRUN), "faulty.relu wrote past the end of result 0, at byte 16 of 16")
        self.assertEqual(self.fails(client, SCRATCH), "faulty.relu wrote past the end of its scratch, at byte 100 of 100")
        self.works(client)
        self.assertEqual(self.provider(daemon)["failures"], 2)

    def test_a_result_described_otherwise_is_an_internal_error(self):
        client = self.client(self.daemon("providers: {\"*\": {checked: true}}"))
        self.assertRegex(self.fails(client, SHAPE), "faulty.relu changed the dtype, shape or place of a result")
        self.works(client)

    def test_where_the_request_allows_it_the_next_provider_answers(self):
        client = self.client(self.daemon("checked: true"))
        reply = client.ask(relu(OVERRUN, run_retry=True))[0]
        self.assertEqual(reply.run.provider, "native")
        self.assertEqual(unpack_f32(reply.run.outputs[0].tensor.inline), (OVERRUN, 0, 1, 2))

    def test_a_provider_that_is_checked_can_follow_one_that_is_not(self):
        client = self.client(self.daemon("providers: {native: {checked: true}}"))
        reply = client.ask(relu(ERROR, run_retry=True))[0]
        self.assertEqual(reply.run.provider, "native")


class Quarantine(Faulty):
    """Hardening: providers-fails"""

    def test_after_five_failures_it_is_passed_over_with_the_reason(self):
        daemon = self.daemon()
        client, other = self.client(daemon), self.client(daemon)
        for i in range(5):
            self.assertEqual(self.skipped(self.works(other)), {})
            self.fails(client, ERROR if i % 2 == 0 else MUTE)
        reply = self.works(other, "native")
        self.assertEqual(self.skipped(reply), {"faulty": (REASON_QUARANTINE, "quarantine: 5 failures (kernel error 5)")})
        self.assertIn("provider quarantined", daemon.log_text())
        # its other op goes on
        self.assertEqual(other.ask(relu(op="silu"))[0].run.provider, "faulty")
        # a strict request that only wants it is told why
        strict = other.call(relu(run_priority=["faulty"], run_strict=True))[0]
        self.assertEqual(strict.status, harness.FAILED_PRECONDITION)
        self.assertIn("quarantine: 5 failures", strict.message)

    def two_tenants(self, config):
        """A client of the Unix socket's tenant, and one of another, which keeps its session."""
        daemon = self.daemon(config, flags=("--listen", "tcp://127.0.0.1:0"))
        other = Client(daemon.tcp_addresses()[0])
        self.addCleanup(other.close)
        return daemon, self.client(daemon), other

    def test_a_tenant_alone_takes_no_provider_away_from_others(self):
        daemon, client, other = self.two_tenants("quarantine: {failures: 2}")
        for _ in range(10):
            self.fails(client, ERROR)
        daemon.wait_log("provider fails for one tenant only, and stays", "tenant=uid:", "6 failures")
        self.works(other)
        self.works(client)
        self.fails(other, ERROR)
        self.works(client, "native")
        self.works(other, "native")
        self.assertEqual(self.provider(daemon)["quarantined"], ["relu: 11 failures (kernel error 11)"])

    def test_what_is_out_for_one_tenant_comes_back_when_another_is_there(self):
        daemon = self.daemon("quarantine: {failures: 2, cooldown: 1h}", flags=("--listen", "tcp://127.0.0.1:0"))
        client = self.client(daemon)
        for _ in range(2):
            self.fails(client, ERROR)
        self.works(client, "native")
        with Client(daemon.tcp_addresses()[0]) as other:
            daemon.wait_log("on trial after its quarantine")
            self.works(other)
            self.fails(client, ERROR)  # on trial, one failure were enough
            self.works(other)

    def test_what_harms_others_counts_whoever_caused_it(self):
        _, client, other = self.two_tenants("quarantine: {failures: 1}\nproviders: {faulty: {checked: true}}")
        self.fails(client, OVERRUN)
        self.works(other, "native")

    def test_opctl_shows_it_and_ends_it(self):
        daemon = self.daemon("quarantine: {failures: 1}")
        client = self.client(daemon)
        self.fails(client, ERROR)
        self.works(client, "native")
        self.assertEqual(self.provider(daemon)["quarantined"], ["relu: 1 failure (kernel error 1)"])
        self.assertTrue(self.provider(daemon)["available"])
        impl = [one for one in self.opctl(daemon, "describe", "relu")["implementations"] if one["provider"] == "faulty"][0]
        self.assertEqual((impl["supported"], impl["reason"]), (False, "quarantined: 1 failure (kernel error 1)"))
        self.assertIn("nothing of faulty is quarantined for silu", self.opctl(daemon, "provider", "faulty", "restore", "silu", code=1))
        self.assertIn("no provider", self.opctl(daemon, "provider", "nobody", "restore", code=1))
        self.opctl(daemon, "provider", "faulty", "restore")
        self.assertEqual(self.provider(daemon)["quarantined"], [])
        self.works(client)
        self.assertIn("provider restored", daemon.log_text())

    def test_only_an_administrator_ends_it(self):
        daemon = Daemon("--listen", "tcp://127.0.0.1:0")
        self.addCleanup(daemon.stop)
        with Client(daemon.tcp_addresses()[0]) as client:
            reply = client.call(pb.Request(restore_provider=pb.RestoreProvider(provider="cpu")))[0]
            self.assertEqual(reply.status, harness.PERMISSION_DENIED)

    def test_after_the_cool_down_it_is_on_trial_and_one_failure_is_enough(self):
        daemon = self.daemon("quarantine: {failures: 2, cooldown: 1ms, window: 1h}")
        client = self.client(daemon)
        for _ in range(2):
            self.fails(client, ERROR)
        daemon.wait_log("on trial after its quarantine")
        self.works(client)
        self.fails(client, ERROR)
        self.assertEqual(daemon.log_text().count("provider quarantined"), 2)
        self.assertIn("cooldown_us=2000", daemon.log_text().split("provider quarantined")[2])

    def test_many_failures_of_several_ops_take_the_whole_provider_out(self):
        daemon = self.daemon("quarantine: {failures: 0, provider_failures: 3}\nproviders: {faulty: {checked: true}}")
        client = self.client(daemon)
        for fault in (ERROR, OVERRUN, SCRATCH):
            self.fails(client, fault)
        self.works(client, "native")
        self.assertEqual(client.ask(relu(op="silu"))[0].run.provider, "native")
        found = self.provider(daemon)
        self.assertFalse(found["available"])
        self.assertEqual(found["reason"], "quarantined: 3 failures (kernel error 1, overrun 2)")
        self.opctl(daemon, "provider", "faulty", "restore")
        self.works(client)

    def test_what_the_request_is_to_blame_for_does_not_count(self):
        daemon = self.daemon("quarantine: {failures: 1}")
        client = self.client(daemon)
        self.fails(client, ARGUMENT, harness.INVALID_ARGUMENT)
        self.works(client)
        self.assertEqual(self.provider(daemon)["failures"], 0)

    def test_zero_failures_is_never(self):
        client = self.client(self.daemon("quarantine: {failures: 0, provider_failures: 0}"))
        for _ in range(25):
            self.fails(client, ERROR)
        self.works(client)

    def test_a_graph_is_dispatched_anew(self):
        daemon = self.daemon("quarantine: {failures: 1}")
        client = self.client(daemon)
        node = pb.GraphNode(name="r", op="relu", args=[pb.Argument(tensor=pb.Tensor(graph_input=0))], priority=pb.ProviderList(names=["faulty", "native"]))
        graph = pb.Graph(name="g", inputs=[pb.GraphInput(name="x")], nodes=[node], outputs=[pb.GraphOutput(name="y", node=pb.NodeOutput())])
        number = client.ask(pb.Request(register_graph=pb.RegisterGraph(graph=graph)))[0].graph.graph

        def ask(fault):
            request = pb.Request(run_graph=pb.RunGraph(graph=number, inputs=[pb.Argument(tensor=inline([2], f32(fault, 1)))], inline_results=True))
            return client.call(request)[0]

        self.assertEqual(ask(0).status, harness.OK)
        self.assertEqual(ask(ERROR).status, harness.INTERNAL)
        again = ask(ERROR)
        self.assertEqual((again.status, unpack_f32(again.run.outputs[0].tensor.inline)), (harness.OK, (ERROR, 1)))


class Watchdog(Faulty):
    """Hardening: providers-hangs"""

    def setUp(self):
        self.gate = os.path.join(tempfile.mkdtemp(prefix="opd-gate-"), "open")
        self.addCleanup(shutil.rmtree, os.path.dirname(self.gate), True)

    def open_gate(self):
        open(self.gate, "w").close()

    def close_gate(self):
        os.unlink(self.gate)

    def watched(self, config=""):
        return self.daemon("threads: 1\nproviders: {faulty: {budget: 100ms}}\n" + config, FAULTY_GATE=self.gate)

    def test_a_request_is_answered_when_its_kernels_budget_is_over_and_the_lane_goes_on(self):
        """Hardening: providers-hangs"""
        daemon = self.watched()
        client = self.client(daemon)
        for turn in range(1, 3):  # the second time the thread that has come back is used again
            text = self.fails(client, HANG, harness.DEADLINE_EXCEEDED)
            self.assertEqual(text, "faulty.relu has exceeded its budget of 100000 us and is still running")
            self.works(client)  # on a lane of one thread
            self.assertEqual(client.info().stuck, 1)
            self.assertGreater(client.info().session_memory_bytes, 0)  # what the kernel may still write
            self.assertIn("kernel exceeds its budget", daemon.log_text())
            self.open_gate()
            daemon.wait_log("an overdue kernel has returned", count=turn)
            harness.wait_until(lambda: (client.info().stuck, client.info().session_memory_bytes) == (0, 0), "its memory is given back")
            self.close_gate()
        self.assertEqual(self.provider(daemon)["failures"], 2)

    def test_a_kernel_that_looks_ends_by_itself(self):
        daemon = self.watched()
        client = self.client(daemon)
        self.fails(client, HANG_POLITE, harness.DEADLINE_EXCEEDED)
        harness.wait_until(lambda: client.info().stuck == 0, "the kernel's end")

    def test_a_client_that_leaves_meanwhile_takes_nothing_along(self):
        daemon = self.watched()
        with Client(daemon.address) as client:
            self.fails(client, HANG, harness.DEADLINE_EXCEEDED)
        other = self.client(daemon)
        self.works(other)
        harness.wait_until(lambda: other.info().sessions == 1, "the session's end")
        self.open_gate()
        harness.wait_until(lambda: (other.info().stuck, other.info().memory_bytes) == (0, 0), "the ledger at zero")

    def test_a_provider_that_hangs_is_quarantined(self):
        daemon = self.watched("quarantine: {failures: 1}")
        client = self.client(daemon)
        self.fails(client, HANG, harness.DEADLINE_EXCEEDED)
        self.works(client, "native")
        self.assertEqual(self.provider(daemon)["quarantined"], ["relu: 1 failure (hang 1)"])
        self.open_gate()
        harness.wait_until(lambda: client.info().stuck == 0, "the kernel's end")

    def graph(self, state=None):
        """y = relu(x) of faulty."""
        graph = pb.Graph(name="g", inputs=[pb.GraphInput(name="x")])
        if state is not None:
            graph.inputs.add(name="s", kind=pb.GRAPH_STATE).tensor.handle.CopyFrom(state)
        graph.nodes.add(name="r", op="relu", args=[pb.Argument(tensor=pb.Tensor(graph_input=0))], priority=pb.ProviderList(names=["faulty"]))
        graph.outputs.add(name="y", node=pb.NodeOutput())
        return graph

    def with_state(self, state, first):
        """Its state is written by a node before faulty's (first), or behind it."""
        graph = self.graph(state)
        node = pb.GraphNode(name="n", op="fused_add_rms_norm", priority=pb.ProviderList(names=["native"]))
        node.args.add(name="x").tensor.CopyFrom(pb.Tensor(graph_input=0) if first else pb.Tensor(node=pb.NodeOutput(node=0)))
        argument = node.args.add(name="x_residual").tensor
        argument.graph_input, argument.donate = 1, True
        node.args.add(name="weight").none.SetInParent()
        node.args.add(name="epsilon").float = 1e-6
        if first:
            graph.nodes[0].args[0].tensor.CopyFrom(pb.Tensor(node=pb.NodeOutput(node=0, output=1)))
            graph.nodes.insert(0, node)
            graph.outputs[0].node.node = 1
        else:
            graph.nodes.append(node)
        return graph

    def run_graph(self, client, number, x, **fields):
        return client.call(pb.Request(run_graph=pb.RunGraph(graph=number, inputs=[pb.Argument(tensor=inline([2], f32(*x)))], inline_results=True, **fields)))[0]

    def register(self, client, graph):
        return client.ask(pb.Request(register_graph=pb.RegisterGraph(graph=graph)))[0].graph.graph

    def upload(self, client, values):
        return client.ask(pb.Request(upload=pb.Upload(tensor=inline([len(values)], f32(*values)))))[0].run.outputs[0].kept

    def fetch(self, client, handle):
        return unpack_f32(client.ask(pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(handle=handle))))[1])

    def test_a_graphs_run_is_answered_during_the_node_and_counted(self):
        """Hardening: providers-hangs"""
        daemon = self.watched("quarantine: {failures: 1}")
        client = self.client(daemon)
        reply = client.call(pb.Request(run_graph=pb.RunGraph(once=self.graph(), inputs=[pb.Argument(tensor=inline([2], f32(HANG, 1)))])))[0]
        self.assertEqual((reply.status, reply.message), (harness.DEADLINE_EXCEEDED, "node 'r': faulty.relu has exceeded its budget of 100000 us and is still running"))
        self.works(client, "native")
        self.assertEqual(self.provider(daemon)["quarantined"], ["relu: 1 failure (hang 1)"])
        self.assertGreater(client.info().session_memory_bytes, 0)
        self.open_gate()
        harness.wait_until(lambda: (client.info().stuck, client.info().session_memory_bytes) == (0, 0), "the kernel's end, and its memory")

    def test_later_runs_of_the_graph_pass_the_one_that_hangs(self):
        daemon = self.watched()
        client = self.client(daemon)
        number = self.register(client, self.graph())
        self.assertEqual(self.run_graph(client, number, [-1, 1]).status, harness.OK)
        self.assertEqual(self.run_graph(client, number, [HANG, 1]).status, harness.DEADLINE_EXCEEDED)
        for _ in range(2):
            reply = self.run_graph(client, number, [-1, 1])
            self.assertEqual((reply.status, unpack_f32(reply.run.outputs[0].tensor.inline)), (harness.OK, (0, 1)))
        client.ask(pb.Request(free_graph=pb.FreeGraph(graph=number)))  # what the kernel uses stays
        self.assertEqual(client.info().stuck, 1)
        self.open_gate()
        harness.wait_until(lambda: (client.info().stuck, client.info().session_memory_bytes) == (0, 0), "the kernel's end, and its memory")

    def test_a_state_that_it_had_not_begun_to_write_is_whole(self):
        daemon = self.watched()
        client = self.client(daemon)
        state = self.upload(client, [3, 4])
        number = self.register(client, self.with_state(state, first=False))
        self.assertEqual(self.run_graph(client, number, [HANG, 1]).status, harness.DEADLINE_EXCEEDED)
        self.assertEqual(self.fetch(client, state), (3, 4))
        reply = self.run_graph(client, number, [-1, 1])  # into a copy: the other may still read it
        self.assertEqual(reply.status, harness.OK, reply.message)
        self.open_gate()
        harness.wait_until(lambda: client.info().stuck == 0, "the kernel's end")
        self.assertEqual(self.fetch(client, reply.run.states[0]), (3, 5))

    def test_a_state_that_it_had_written_is_lost_and_says_so(self):
        daemon = self.watched()
        client = self.client(daemon)
        state = self.upload(client, [0, 4])
        number = self.register(client, self.with_state(state, first=True))
        self.assertEqual(self.run_graph(client, number, [HANG, 1]).status, harness.DEADLINE_EXCEEDED)
        reply = self.run_graph(client, number, [-1, 1])
        self.assertEqual(reply.status, harness.DATA_LOSS, reply.message)
        self.open_gate()
        harness.wait_until(lambda: client.info().stuck == 0, "the kernel's end")

    def test_a_session_that_ends_while_its_graph_hangs_leaves_nothing(self):
        daemon = self.watched()
        with Client(daemon.address) as client:
            number = self.register(client, self.with_state(self.upload(client, [3, 4]), first=False))
            self.assertEqual(self.run_graph(client, number, [HANG, 1]).status, harness.DEADLINE_EXCEEDED)
        other = self.client(daemon)
        self.works(other)
        self.open_gate()
        harness.wait_until(lambda: (other.info().stuck, other.info().memory_bytes) == (0, 0), "the ledger at zero")

    def test_a_drain_does_not_wait_for_it(self):
        daemon = self.watched()
        with Client(daemon.address) as client:
            self.fails(client, HANG, harness.DEADLINE_EXCEEDED)
        daemon.signal(signal.SIGTERM)
        self.assertEqual(daemon.wait(), 1)
        self.assertIn("kernels that exceed their budget still run", daemon.log_text())


class Configuration(unittest.TestCase):
    def test_wrong_values_are_refused_by_name(self):
        for text, wanted in (
            ("quarantine: {failures: 65}", "quarantine.failures"),
            ("quarantine: {window: 0}", "quarantine.window"),
            ("providers: {cpu: {budget: 1us}}", "providers.cpu.budget"),
            ("providers: {cpu: {nonsense: 1}}", "no such key, expected checked"),
            ("providers: {Cpu: {}}", "no provider's name"),
            ("providers: {cpu: {}, cpu: {}}", "there already"),
        ):
            daemon = Daemon("--check-config", config=text, wait=False)
            self.assertEqual(daemon.wait(), 2, text)
            self.assertIn(wanted, daemon.err_text())
            daemon.stop(code=2)


if __name__ == "__main__":
    unittest.main(verbosity=2)
