#!/usr/bin/python3
"""Small requests of several sessions that wait for a lane run as one kernel: each gets what it would have got alone, bit for bit, and is told.

Each test's name is the promise that it checks. The lane has one thread, and a kernel that takes long is in it, so that what comes meanwhile waits and is taken along together.
"""
import os
import shutil
import signal
import tempfile
import unittest

import numpy as np
import opd

from harness import CANCEL, CANCELLED, OK, DaemonCase, ROOT, built_module, f32, frame, pb, run, tensor, wait_until

BUILD = os.environ.get("OPD_BUILD", os.path.join(ROOT, "build"))
FAULTY, DEVICE = (built_module(name) for name in ("faulty", "device"))
OPENCL = os.environ.get("OPD_OPENCL_MODULE", os.path.join(BUILD, "lib", "opd", "opd-provider-opencl.so"))
HIDDEN, OUT = 33, 17  # no multiple of any vector: rows lie at whatever address


def normal(chance, *shape):
    return chance.standard_normal(shape, dtype="float32") * 4


# Of each op whose rows stand for themselves: how many row operands it has, what all of them share, and the other arguments.
ROWS_OPS = {
    "linear": (1, [(OUT, HIDDEN), (OUT,)], {}),
    "rms_norm": (1, [(HIDDEN,)], {"epsilon": 1e-5}),
    "fused_add_rms_norm": (2, [(HIDDEN,)], {"epsilon": 1e-5}),
    "layer_norm": (1, [(HIDDEN,), (HIDDEN,)], {"epsilon": 1e-5}),
    "static_quant_fp8": (1, [(1,)], {}),
    "cast": (1, [], {"dtype": "f16"}),
    "silu": (1, [], {}), "gelu": (1, [], {}), "relu": (1, [], {}), "relu2": (1, [], {}), "sigmoid": (1, [], {}),
    "silu_and_mul": (1, [], {}), "mul_and_silu": (1, [], {}), "gelu_and_mul": (1, [], {"approximate": "tanh"}),
    "gelu_and_mul_sparse": (1, [], {"std_multiplier": 1.5}),
}


class Case(DaemonCase):
    def setUp(self):
        self.watch = self.client()

    def lane(self):
        return self.watch.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.lanes[0]

    def sessions(self, count):
        made = [opd.Client(self.address) for _ in range(count)]
        for client in made:
            self.addCleanup(client.close)
        return made

    def occupy(self):
        """The lane's thread is in a kernel that ends when it is cancelled."""
        holder = self.client(features=["cancel"])
        left, right = (tensor(shape, size=4, strides=[0, 0]) for shape in ([4096, 1 << 16], [1 << 16, 4096]))
        request = run("matmul", left, right, run_priority=["native"])
        request.run.outputs.add(no_copy=True)
        number = holder.submit(request, f32(1))
        wait_until(lambda: self.lane().running == 1 and self.lane().queued == 0, "the thread has the kernel")
        return lambda: holder.send(frame(CANCEL, number))

    def together(self, calls):
        """The results of calls, each a function that submits, that wait together for the thread."""
        release = self.occupy()
        futures = [call() for call in calls]
        wait_until(lambda: self.lane().queued == len(calls), "all of them wait")
        release()
        return [future.result() for future in futures]

    def batched(self, calls):
        return [result.explain.batched for result in self.together(calls)]

    def share(self, clients, value, name):
        """Handles of one tensor, published by the first."""
        made = clients[0].publish(clients[0].upload(value).result(), name)
        self.addCleanup(clients[0].withdraw, name)
        return [client.open(sha256=made.sha256) for client in clients]


class Bits(Case):
    config = "loops: 2\nthreads: 1\ninline: 0\nbatching: {shared: 0}\n"

    def check(self, op, provider, chance):
        clients = self.sessions(5)
        row_count, shared_shapes, attributes = ROWS_OPS[op]
        shared = [self.share(clients, np.abs(normal(chance, *shape)) + 1, "%s.%s.%d" % (op, provider, i)) for i, shape in enumerate(shared_shapes)]
        width = HIDDEN + 1 if "_and_" in op else HIDDEN
        calls = []
        for number, client in enumerate(clients):
            rows = [normal(chance, 1 + number % 3, width) for _ in range(row_count)]
            arguments = rows + [handles[number] for handles in shared]
            calls.append(lambda client=client, arguments=arguments: client.submit(op, *arguments, priority=[provider], explain=True, **attributes))
        alone = [call().result() for call in calls]
        self.assertEqual([result.explain.batched for result in alone], [0] * 5, op)
        as_one = self.together(calls)
        self.assertEqual([result.explain.batched for result in as_one], [5] * 5, op)
        for before, after in zip(alone, as_one):
            self.assertEqual(after.provider, provider)
            self.assertEqual([bytes(tensor.data) for tensor in after.tensors], [bytes(tensor.data) for tensor in before.tensors], op)

    def test_results_of_a_batch_are_those_of_each_alone_bit_for_bit(self):
        chance = np.random.default_rng(7)
        for op in ROWS_OPS:
            for provider in ("native", "cpu"):
                with self.subTest(op=op, provider=provider):
                    self.check(op, provider, chance)

    def test_what_differs_in_anything_but_its_rows_runs_alone(self):
        chance = np.random.default_rng(8)
        clients = self.sessions(4)
        weights = self.share(clients, normal(chance, 8), "same")
        x = normal(chance, 2, 8)
        own = clients[3].upload(normal(chance, 8)).result()
        submit = [lambda: clients[0].submit("rms_norm", x, weights[0], 1e-5, explain=True, priority=["cpu"]),
                  lambda: clients[1].submit("rms_norm", x, weights[1], 1e-6, explain=True, priority=["cpu"]),  # another epsilon
                  lambda: clients[2].submit("rms_norm", x, weights[2], 1e-5, explain=True, priority=["native"]),  # another provider
                  lambda: clients[3].submit("rms_norm", x, own, 1e-5, explain=True, priority=["cpu"]),  # another tensor
                  lambda: clients[3].submit("rms_norm", x[0], weights[3], 1e-5, explain=True, priority=["cpu"]),  # no rows
                  lambda: clients[3].submit("softmax", x, explain=True, priority=["cpu"]), lambda: clients[2].submit("softmax", x, explain=True, priority=["cpu"])]
        self.assertEqual(self.batched(submit), [0] * len(submit))

    def test_a_batch_has_so_many_rows_and_what_is_left_is_the_next(self):
        clients = self.sessions(20)
        x = np.ones((1, 64), "float32")
        calls = [lambda client=client: client.submit("relu", x, priority=["cpu"], explain=True) for client in clients]
        self.assertEqual(sorted(self.batched(calls)), [4] * 4 + [16] * 16)

    def test_one_that_is_cancelled_or_late_leaves_and_the_others_go_on(self):
        clients = self.sessions(4)
        x = np.full((1, 8), -1, "float32")
        release = self.occupy()
        futures = [client.submit("relu", x, priority=["cpu"], explain=True, timeout=0.01 if client is clients[2] else None) for client in clients]
        with self.assertRaisesRegex(opd.DeadlineExceeded, "not started within its timeout"):
            futures[2].result()
        clients[3].close()
        wait_until(lambda: self.lane().queued == 2, "two are left")
        release()
        self.assertEqual([future.result().explain.batched for future in futures[:2]], [2, 2])

    def test_each_is_charged_its_rows_and_counted(self):
        clients = self.sessions(2)
        x, weights = np.ones((3, 256), "float32"), self.share(clients, np.ones((512, 256), "float32"), "charged")
        stats = lambda: {item.name: item.value for item in self.watch.ask(pb.Request(get_stats=pb.GetStats()))[0].stats.items if item.name.startswith("opd_batche")}
        used = {state.session: state.usage for state in self.watch.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.sessions}
        before = stats()
        calls = [lambda: clients[0].submit("linear", x[:1], weights[0], priority=["native"], explain=True), lambda: clients[1].submit("linear", x, weights[1], priority=["native"], explain=True)]
        self.assertEqual(self.batched(calls), [2, 2])
        after = stats()
        self.assertEqual((after["opd_batches_total"] - before["opd_batches_total"], after["opd_batched_runs_total"] - before["opd_batched_runs_total"]), (1, 2))
        states = {state.session: state.usage for state in self.watch.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.sessions}
        one, three = (states[client.hello.session].device_ns - used[client.hello.session].device_ns for client in clients)
        self.assertGreater(one, 0)
        self.assertAlmostEqual(three / one, 3, delta=0.01)


class Paying(Case):
    config = "threads: 1\ninline: 0\nbatching: {shared: 16 KiB}\n"

    def test_they_run_together_where_what_they_share_is_large(self):
        clients = self.sessions(3)
        x = np.ones((1, 64), "float32")
        large, small = self.share(clients, np.ones((64, 64), "float32"), "large"), self.share(clients, np.ones(64, "float32"), "small")
        self.assertEqual(self.batched([lambda i=i: clients[i].submit("linear", x, large[i], priority=["cpu"], explain=True) for i in range(3)]), [3] * 3)
        self.assertEqual(self.batched([lambda i=i: clients[i].submit("rms_norm", x, small[i], 1e-5, priority=["cpu"], explain=True) for i in range(3)]), [0] * 3)


class Reloaded(Case):
    config = "threads: 1\ninline: 0\nbatching: {shared: 0}\n"

    def test_a_reload_turns_it_off(self):
        clients = self.sessions(2)
        x, weights = np.ones((1, 64), "float32"), self.share(clients, np.ones((64, 64), "float32"), "off")
        calls = [lambda i=i: clients[i].submit("linear", x, weights[i], priority=["cpu"], explain=True) for i in range(2)]
        for rows, wanted in ((0, [0, 0]), (2, [2, 2])):
            self.daemon.write_config(self.config.replace("shared: 0", "shared: 0, rows: %d" % rows))
            self.daemon.signal(signal.SIGHUP)
            self.daemon.wait_log("key=batching.rows", "new=%d" % rows)
            self.watch.ping()  # the lanes have it behind the log line
            self.assertEqual(self.batched(calls), wanted)


class Failing(Case):
    config = "threads: 1\ninline: 0\nbatching: {shared: 0}\nquarantine: {failures: 1}\nmodules: [{name: faulty, path: %s}]\n" % FAULTY

    def test_what_fails_together_runs_alone(self):
        clients = self.sessions(3)
        calls = [lambda client=client, i=i: client.submit("relu2", np.full((1, 4), i, "float32"), priority=["faulty"], strict=True, explain=True) for i, client in enumerate(clients)]
        results = self.together(calls)
        self.assertEqual([(result.explain.batched, result[0].tolist()) for result in results], [(0, [[i * i] * 4]) for i in range(3)])
        self.assertEqual(calls[0]().result().provider, "faulty")  # that failure was nobody's: it isn't quarantined


class Hanging(Case):
    """Those that were taken along by a kernel that hangs are answered with it; FAULTY_GATE ends it."""

    gate = tempfile.mktemp(prefix="opd-gate-")
    environment = {"FAULTY_GATE": gate}
    flags = ("--loops", "1")  # with a budget, requests of different loops are no batch
    config = "threads: 1\ninline: 0\nbatching: {shared: 0}\nproviders: {faulty: {budget: 100ms}}\nmodules: [{name: faulty, path: %s}]\n" % FAULTY

    def test_all_of_a_batch_are_answered_when_its_budget_is_over(self):
        self.addCleanup(lambda: os.path.exists(self.gate) and os.unlink(self.gate))
        clients = self.sessions(3)
        release = self.occupy()
        futures = [client.submit("relu2", np.full((1, 4), 1010, "float32"), priority=["faulty"], strict=True) for client in clients]
        wait_until(lambda: self.lane().queued == len(futures), "all of them wait")
        release()
        for future in futures:
            with self.assertRaisesRegex(opd.Error, "faulty.relu2 has exceeded its budget of 100000 us and is still running"):
                future.result()
        self.assertEqual(self.watch.info().stuck, 1)
        open(self.gate, "w").close()
        wait_until(lambda: self.watch.info().stuck == 0, "the kernel's end")


class OnDevice(Case):
    """Requests wait for the device because their tenant has used up its time, until a reload gives it as much as it likes."""

    provider = None
    device = None

    def lane(self):
        return next(lane for lane in self.watch.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.lanes if lane.name == self.device)

    def reload(self, text):
        before = self.daemon.log_text().count("configuration reloaded")
        self.daemon.write_config(self.config + text)
        self.daemon.signal(signal.SIGHUP)
        wait_until(lambda: self.daemon.log_text().count("configuration reloaded") > before, "the reload")
        self.watch.ping()  # the lanes have it behind the log line

    def use_up(self):
        """One op that takes longer than what its tenant has: what comes next waits for a minute at least."""
        raise NotImplementedError

    def occupy(self):
        self.reload('tenants: {"*": {device_time: 1ms}}\n')
        self.use_up()
        return lambda: self.reload("")

    def submit(self, client, x, weight, **options):
        return lambda: client.submit("rms_norm", x, weight, 1e-5, priority=[self.provider], strict=True, device=self.device, explain=True, **options)

    def operands(self, count, width=64):
        """Sessions, rows of each, and the weight that they share."""
        clients = self.sessions(count)
        chance = np.random.default_rng(count)
        weights = self.share(clients, normal(chance, width), "weight")
        return clients, [normal(chance, 1 + i % 3, width) for i in range(count)], weights


class TestDevice(OnDevice):
    """Its kernels take a tenth of a second; the second one that it is given is what a test holds, fails or loses."""

    provider, device = "testdev", "test:0"
    environment = {"OPD_TEST_DEVICE_DELAY_US": "100000"}
    gate = tempfile.mktemp(prefix="opd-gate-")
    config = "threads: 1\ninline: 0\nmodules: [{name: testdev, path: %s}]\n" % DEVICE

    @classmethod
    def tearDownClass(cls):
        folder, cls.daemon.own_folder = cls.daemon.folder, False
        try:
            cls.daemon.stop()
            assert "closed clean: 0 allocations, 0 streams, 0 events, 0 plans were left" in cls.daemon.log_text(), cls.daemon.output()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if os.path.exists(cls.gate):
                os.unlink(cls.gate)

    def open_gate(self):
        open(self.gate, "w").close()

    def use_up(self):
        self.sessions(1)[0].submit("rms_norm", np.ones((1, 5), "float32"), None, 1e-5, priority=["testdev"], strict=True, device=self.device).result()


class Together(TestDevice):
    config = "loops: 2\n" + TestDevice.config

    def test_results_are_those_of_each_alone_and_each_is_charged_its_rows(self):
        clients, rows, weights = self.operands(4)
        calls = [self.submit(*each) for each in zip(clients, rows, weights)]
        alone = [call().result() for call in calls]
        self.assertEqual([result.explain.batched for result in alone], [0] * 4)
        used = {state.session: state.usage for state in self.watch.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.sessions}
        together = self.together(calls)
        self.assertEqual([result.explain.batched for result in together], [4] * 4)
        self.assertEqual([result[0].tobytes() for result in together], [result[0].tobytes() for result in alone])
        self.assertEqual([(move.operand, move.bytes) for move in together[1].explain.moves], [("x", rows[1].nbytes), ("result", rows[1].nbytes)])
        states = {state.session: state.usage for state in self.watch.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.sessions}
        spent = [states[client.hello.session].device_ns - used[client.hello.session].device_ns for client in clients]
        self.assertGreater(spent[0], 0)
        self.assertAlmostEqual(spent[1] / spent[0], 2, delta=0.01)
        self.assertAlmostEqual(spent[2] / spent[0], 3, delta=0.01)

    def test_what_is_not_the_same_or_stays_on_the_device_runs_alone(self):
        clients, rows, weights = self.operands(4)
        kept = clients[2].upload(rows[2]).result()
        own = clients[3].upload(np.ones(64, "float32")).result()
        calls = [self.submit(clients[0], rows[0], weights[0]), self.submit(clients[1], rows[1], weights[1], keep=True), self.submit(clients[2], kept, weights[2]), self.submit(clients[3], rows[3], own)]
        self.assertEqual(self.batched(calls), [0] * 4)


class TurnedOff(TestDevice):
    config = TestDevice.config + "batching: {devices: false}\n"

    def test_each_runs_alone_where_devices_batch_nothing(self):
        self.assertEqual(self.batched([self.submit(*each) for each in zip(*self.operands(3))]), [0] * 3)


class LaunchFails(TestDevice):
    environment = dict(TestDevice.environment, OPD_TEST_DEVICE_FAULT="launch:2")

    def test_what_fails_together_runs_alone(self):
        """However it fails: when its kernel is enqueued, or when it runs."""
        clients, rows, weights = self.operands(3)
        results = self.together([self.submit(*each) for each in zip(clients, rows, weights)])
        self.assertEqual([(result.explain.batched, result.provider) for result in results], [(0, "testdev")] * 3)
        for x, result, each in zip(rows, results, zip(clients, rows, weights)):
            self.assertEqual(self.submit(*each)().result()[0].tobytes(), result[0].tobytes())
        self.assertEqual(self.watch.info().devices, ["cpu", "test:0", "test:1"])


class KernelFails(LaunchFails):
    environment = dict(TestDevice.environment, OPD_TEST_DEVICE_FAULT="kernel:2")


class DeviceLost(TestDevice):
    environment = dict(TestDevice.environment, OPD_TEST_DEVICE_FAULT="lost:2")

    def test_all_of_a_batch_are_told_that_their_device_was_lost(self):
        release = self.occupy()
        clients, rows = self.sessions(3), np.ones((1, 64), "float32")
        futures = [self.submit(client, rows, None)() for client in clients]
        wait_until(lambda: self.lane().queued == 3, "all of them wait")
        release()
        for future in futures:
            with self.assertRaisesRegex(opd.DataLoss, "fell off the bus"):
                future.result()


class InFlight(TestDevice):
    """The batch's kernel is held by a gate while it is enqueued."""

    gate = tempfile.mktemp(prefix="opd-gate-")
    environment = dict(TestDevice.environment, OPD_TEST_DEVICE_FAULT="stall:2", OPD_TEST_DEVICE_GATE=gate)

    def test_one_that_is_cancelled_late_or_gone_in_flight_leaves_the_others_theirs(self):
        self.addCleanup(self.open_gate)
        release = self.occupy()
        clients, rows = self.sessions(3), [np.full((1 + i, 64), 1 + i, "float32") for i in range(3)]
        futures = [self.submit(client, x, None, timeout=timeout)() for client, x, timeout in zip(clients, rows, (None, 120, None))]
        canceller = self.client(features=["cancel"])
        request = run("rms_norm", tensor([1, 64]), weight=None, epsilon=1e-5, run_priority=["testdev"], run_strict=True, run_device=self.device)
        number = canceller.submit(request, f32(*[1] * 64))
        wait_until(lambda: self.lane().queued == 4, "all of them wait")
        release()
        wait_until(lambda: self.lane().queued == 0 and self.lane().running == 4, "they are in flight")
        canceller.send(frame(CANCEL, number))
        clients[2].close()
        self.watch.ping()
        self.open_gate()
        self.assertEqual([future.result().explain.batched for future in futures[:2]], [4, 4])
        for future, x in zip(futures, rows[:2]):
            np.testing.assert_allclose(future.result()[0], x / np.sqrt(x * x + 1e-5), rtol=1e-6)
        self.assertIn(canceller.read_reply()[1].status, (0, 1))  # it was begun: either answer is right
        wait_until(lambda: self.lane().running == 0, "nothing is left of the others")


class Behind(TestDevice):
    """A launch that halts, and a batch that was taken out of the queue with it."""

    gate, second = tempfile.mktemp(prefix="opd-gate-"), tempfile.mktemp(prefix="opd-gate-")
    environment = {"OPD_TEST_DEVICE_FAULT": "stall:1,halt:2", "OPD_TEST_DEVICE_GATE": gate, "OPD_TEST_DEVICE_GATE2": second}

    def open_second(self):
        open(self.second, "w").close()
        self.addCleanup(lambda: os.path.exists(self.second) and os.unlink(self.second))

    def norm(self, width, **options):
        client = self.client(features=["cancel"])
        request = run("rms_norm", tensor([1, width]), weight=None, epsilon=1e-5, run_priority=["testdev"], run_strict=True, run_device=self.device, run_explain=True, **options)
        return client, client.submit(request, f32(*[1] * width))

    def test_whoever_leads_it_or_was_taken_along_can_still_leave(self):
        first, _ = self.norm(5)
        wait_until(lambda: self.lane().running == 1, "the first one stalls")
        halted, _ = self.norm(7, run_service_class=pb.REALTIME)
        batch = [self.norm(64) for _ in range(4)]
        wait_until(lambda: self.lane().queued == 5, "all of them wait")
        self.open_gate()
        self.daemon.wait_log("a launch halts")
        for client, number in (batch[0], batch[2]):
            client.send(frame(CANCEL, number))
            self.assertEqual(client.read_reply()[1].status, CANCELLED)
        self.open_second()
        self.assertEqual([client.read_reply()[1].status for client in (first, halted)], [OK, OK])
        for client, _ in (batch[1], batch[3]):
            _, reply, data = client.read_reply()
            self.assertEqual((reply.status, reply.run.explain.batched), (OK, 2))
            np.testing.assert_allclose(np.frombuffer(data, "float32"), [1 / np.sqrt(1 + 1e-5)] * 64, rtol=1e-6)


class Overdue(TestDevice):
    flags = ("--loops", "1")  # with a budget, requests of different loops are no batch
    gate = tempfile.mktemp(prefix="opd-gate-")
    environment = dict(TestDevice.environment, OPD_TEST_DEVICE_FAULT="stall:2", OPD_TEST_DEVICE_GATE=gate)
    config = TestDevice.config + "providers: {testdev: {budget: 500ms}}\n"

    def test_all_of_a_batch_are_answered_when_its_budget_is_over(self):
        self.addCleanup(self.open_gate)
        release = self.occupy()
        futures = [self.submit(client, np.ones((1, 64), "float32"), None)() for client in self.sessions(3)]
        wait_until(lambda: self.lane().queued == 3, "all of them wait")
        release()
        for future in futures:
            with self.assertRaisesRegex(opd.Error, "testdev.rms_norm has exceeded its budget of 500000 us and is still running"):
                future.result()
        self.open_gate()
        wait_until(lambda: self.lane().running == 0, "the kernel's end")


@unittest.skipUnless(os.path.exists(OPENCL), "no module for OpenCL")
class OpenCL(OnDevice):
    """On whatever OpenCL device there is: without a GPU PoCL's."""

    provider, device = "opencl", "opencl:0"
    config = "threads: 1\ninline: 0\nmodules: [{name: opencl, path: %s}]\n" % OPENCL

    def setUp(self):
        super().setUp()
        if self.device not in self.watch.info().devices:
            self.skipTest("no OpenCL device here")

    def use_up(self):
        before = self.lane().device_ns
        self.sessions(1)[0].submit("linear", np.ones((512, 2048), "float32"), np.ones((1024, 2048), "float32"), priority=["opencl"], strict=True).result()
        if self.lane().device_ns - before < 60e6:
            self.skipTest("the device is too fast to use up its time")

    def test_results_of_a_batch_are_those_of_each_alone_bit_for_bit(self):
        chance, clients, calls = np.random.default_rng(9), self.sessions(5), []
        ops = ("rms_norm", "fused_add_rms_norm", "layer_norm", "silu", "gelu", "silu_and_mul")
        for op in ops:
            row_count, shared_shapes, attributes = ROWS_OPS[op]
            shared = [self.share(clients, normal(chance, *shape), "%s.%d" % (op, i)) for i, shape in enumerate(shared_shapes)]
            for number, client in enumerate(clients):
                rows = [normal(chance, 1 + number % 3, HIDDEN + ("_and_" in op)) for _ in range(row_count)]
                arguments = rows + [handles[number] for handles in shared]
                calls.append(lambda client=client, op=op, arguments=arguments, attributes=attributes: client.submit(op, *arguments, priority=["opencl"], strict=True, explain=True, **attributes))
        alone = [call().result() for call in calls]
        self.assertEqual({result.explain.batched for result in alone}, {0})
        as_one = self.together(calls)
        self.assertEqual([result.explain.batched for result in as_one], [5] * len(calls))
        for before, after in zip(alone, as_one):
            self.assertEqual([bytes(tensor.data) for tensor in after.tensors], [bytes(tensor.data) for tensor in before.tensors])


if __name__ == "__main__":
    unittest.main()
