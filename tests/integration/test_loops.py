#!/usr/bin/env python3
"""Several I/O loops (--loops): what belongs to all of them is told whole, changed at once, and ends together."""
import os
import signal
import subprocess
import threading
import unittest

from harness import (
    DEADLINE_EXCEEDED, HELLO, NOT_FOUND, OK, OPD, REQUEST, Client, Daemon, DaemonCase, Failed, connect, f32, frame, hello_envelope, inline, pb, rms_norm, run, tensor,
    unpack_f32, wait_until,
)

LOOPS = 3
CLIENTS = 2 * LOOPS


def slow_request(size=256):
    """(request, payload) of tens of milliseconds on a lane."""
    half = f32(*[1.0] * size * size)
    return run("matmul", tensor([size, size]), tensor([size, size], len(half)), run_priority=["native"]), half + half


def stats(client):
    """Value by name and labels' values."""
    items = client.ask(pb.Request(get_stats=pb.GetStats()))[0].stats.items
    return {(item.name, *[label.value for label in item.labels]): item.value for item in items}


def sessions(client):
    return client.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.sessions


class Loops(DaemonCase):
    flags = ("--loops", str(LOOPS), "--threads", "2")

    def clients(self, count=CLIENTS):
        return [self.client() for _ in range(count)]

    def tearDown(self):
        self.doCleanups()
        super().tearDown()

    def setUp(self):
        """Connections of the test before are gone, so that those of this one are spread evenly."""
        with Client(self.address) as watch:
            wait_until(lambda: watch.info().sessions == 1, "the others are gone")
        wait_until(lambda: self.sessions_alone() == 1, "and so is that one")

    def sessions_alone(self):
        with Client(self.address) as watch:
            return watch.info().sessions

    def test_connections_are_spread_over_all_loops(self):
        clients = self.clients()
        self.assertEqual(clients[0].info().loops, LOOPS)
        self.assertEqual(clients[0].info().sessions, CLIENTS)
        told = stats(clients[-1])
        for loop in range(LOOPS):
            self.assertEqual(told["opd_loop_sessions", str(loop)], CLIENTS / LOOPS, loop)
            self.assertGreater(told["opd_loop_cpu_seconds_total", str(loop)], 0, loop)
        self.assertEqual(told["opd_sessions",], CLIENTS)

    def test_connections_that_do_nothing_do_not_count_when_a_loop_is_chosen(self):
        asking = self.clients()[0]
        told = lambda name: [stats(asking)[name, str(loop)] for loop in range(LOOPS)]

        def go_elsewhere():
            before, busy = told("opd_loop_sessions"), told("opd_loop_busy_sessions")
            if sum(busy) != 1:
                return False
            made = self.clients(LOOPS - 1)
            risen = [after - count for after, count in zip(told("opd_loop_sessions"), before)]
            for client in made:
                client.close()
            wait_until(lambda: told("opd_loop_sessions") == before, "they have gone")
            return risen == [1 - number for number in busy]

        wait_until(go_elsewhere, "one each comes to the loops without busy ones")

    def test_statistics_are_what_all_loops_were_sent_together(self):
        clients = self.clients()
        request, payload, wanted = rms_norm()
        before = stats(clients[0])
        count = 40
        for client in clients:  # many in flight at once
            for _ in range(count):
                client.submit(request, payload)
                client.submit(pb.Request(ping=pb.Empty()))
        for client in clients:
            for _ in range(2 * count):
                _, reply, data = client.read_reply()
                self.assertEqual(reply.status, OK, reply.message)
                if data:
                    for got, want in zip(unpack_f32(data), wanted):
                        self.assertAlmostEqual(got, want, places=5)
        after = stats(clients[-1])
        rise = lambda *key: after.get(key, 0) - before.get(key, 0)
        self.assertEqual(rise("opd_requests_total", "run"), CLIENTS * count)
        self.assertEqual(rise("opd_requests_total", "ping"), CLIENTS * count)
        self.assertEqual(rise("opd_replies_total", "OK"), 2 * CLIENTS * count + 1)  # the first stats are among the second's replies
        self.assertEqual(sum(after[key] - before.get(key, 0) for key in after if key[:2] == ("opd_runs_total", "rms_norm")), CLIENTS * count)

    def test_sessions_of_all_loops_are_listed_in_order_and_can_be_set_from_any(self):
        clients = self.clients()
        ids = sorted(client.hello.session for client in clients)
        for client in clients:
            self.assertEqual([state.session for state in sessions(client)], ids)
        for weight, (client, other) in enumerate(zip(clients, clients[1:] + clients[:1]), 7):  # neighbours are on different loops
            client.ask(pb.Request(set_session=pb.SetSession(session=other.hello.session, weight=weight, service_class=pb.BATCH)))
            state = [state for state in sessions(client) if state.session == other.hello.session][0]
            self.assertEqual((state.weight, state.service_class), (weight, pb.BATCH))
        with self.assertRaises(Failed) as caught:
            clients[0].ask(pb.Request(set_session=pb.SetSession(session=1 << 40, weight=2)))
        self.assertEqual(caught.exception.status, NOT_FOUND)

    def test_lists_and_changes_of_sessions_from_all_loops_at_once_wait_for_each_other(self):
        clients = self.clients()
        ids = sorted(client.hello.session for client in clients)
        for _ in range(30):
            for client in clients:
                client.submit(pb.Request(list_sessions=pb.ListSessions()))
                client.submit(pb.Request(set_session=pb.SetSession(session=ids[0], weight=3)))
            for client in clients:
                listed = client.read_reply()[1]
                self.assertEqual([state.session for state in listed.sessions.sessions], ids)
                self.assertEqual(client.read_reply()[1].status, OK)

    def test_what_one_publishes_sessions_on_other_loops_use(self):
        publisher, *others = self.clients(1 + LOOPS)
        kept, _ = publisher.ask(pb.Request(upload=pb.Upload(tensor=pb.Tensor(dtype=9, shape=[4], inline=f32(1, 2, 3, 4)))))
        publisher.ask(pb.Request(publish=pb.Publish(tensor=pb.Tensor(handle=kept.run.outputs[0].kept), name="four", lasting=True)))
        handles = [other.ask(pb.Request(open_tensor=pb.OpenTensor(name="four")))[0].publications.items[0].handle for other in others]
        publisher.close()
        for _ in range(20):
            for other, handle in zip(others, handles):
                other.submit(run("add", pb.Tensor(handle=handle), inline([4], f32(1, 1, 1, 1))))
            for other in others:
                _, reply, data = other.read_reply()
                self.assertEqual(reply.status, OK, reply.message)
                self.assertEqual(unpack_f32(data), (2, 3, 4, 5))
        others[0].ask(pb.Request(withdraw=pb.Withdraw(name="four")))

    def test_deadlines_and_cancels_are_each_loops_own(self):
        clients = self.clients()
        request, payload = slow_request()
        late = run("add", inline([4], f32(1, 2, 3, 4)), inline([4], f32(1, 1, 1, 1)), run_timeout_us=1)
        for client in clients:
            client.submit(request, payload)
            client.submit(late)
        for client in clients:
            answers = {number: reply.status for number, reply, _ in (client.read_reply(), client.read_reply())}
            self.assertEqual(answers[1], OK)
            self.assertIn(answers[2], (OK, DEADLINE_EXCEEDED))

    def test_clients_that_are_killed_leave_nothing_on_any_loop(self):
        request, payload = slow_request()
        children = []
        for _ in range(CLIENTS):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                client = Client(self.address)
                for _ in range(4):
                    client.submit(request, payload)
                os.write(writing, b"x")
                signal.pause()
            children.append(child)
            self.assertEqual(os.read(reading, 1), b"x")
            os.close(reading)
            os.close(writing)
        with Client(self.address) as watch:
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            wait_until(lambda: watch.info().sessions == 1, "all have ended")
            wait_until(lambda: watch.info().memory_bytes == 0, "what they had is given back")


class Life(unittest.TestCase):
    def start(self, *flags, **options):
        daemon = Daemon("--loops", str(LOOPS), "--threads", "2", *flags, **options)
        self.addCleanup(daemon.stop, None)
        return daemon

    def test_a_drain_finishes_what_is_in_flight_on_all_loops(self):
        daemon = self.start(config="limits: {drain: 10min}\n")
        clients = [Client(daemon.address) for _ in range(CLIENTS)]
        request, payload = slow_request()
        for client in clients:
            self.addCleanup(client.close)
            client.submit(request, payload)
            client.submit(request, payload)
        for client in clients:
            client.ping()  # it has read what came before
        daemon.signal(signal.SIGTERM)
        daemon.wait_log("draining")
        for client in clients:
            client.goaway = None
        for client in clients:
            self.assertEqual(client.expect_end()[0], 14)
        self.assertEqual(daemon.wait(), 0)
        self.assertIn("result=clean", daemon.log_text())

    def test_a_drain_that_is_cut_off_ends_all_loops(self):
        daemon = self.start(config="limits: {drain: 50ms}\n")
        clients = [Client(daemon.address) for _ in range(CLIENTS)]
        request, payload = slow_request(1024)
        for client in clients:
            self.addCleanup(client.close)
            client.submit(request, payload)
        for client in clients:
            client.ping()
        daemon.signal(signal.SIGTERM)
        self.assertEqual(daemon.wait(), 1)

    def test_reloads_under_load_lose_nothing(self):
        lines = "log: {lines: %d}\ntenants: {'*': {weight: %d}}\n"
        daemon = self.start(config=lines % (10, 1))
        request, payload, wanted = rms_norm()
        ended, failures, counts = threading.Event(), [], []

        def work():
            try:
                with Client(daemon.address) as client:
                    count = 0
                    while not ended.is_set():
                        reply, data = client.ask(request, payload)
                        count += 1
                        if abs(unpack_f32(data)[0] - wanted[0]) > 1e-5:
                            raise AssertionError("wrong: %r" % (unpack_f32(data),))
                        if count % 7 == 0:  # connections come and go meanwhile
                            with Client(daemon.address) as other:
                                other.ping()
                    counts.append(count)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for round in range(1, 11):
            daemon.write_config(lines % (10 + round, 1 + round))
            daemon.signal(signal.SIGHUP)
            daemon.wait_log("configuration reloaded", count=round)
        ended.set()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])
        self.assertEqual(len(counts), CLIENTS)

    def test_connections_that_end_at_every_byte_wherever_they_are_then_harm_nobody(self):
        """Hardening: framing-truncation"""
        lines = "tenants: {'*': {weight: %d}}\n"
        daemon = self.start(config=lines % 1)
        request, payload, wanted = rms_norm()
        good = frame(HELLO, envelope=hello_envelope()) + frame(REQUEST, 1, request.SerializeToString(), payload)
        with Client(daemon.address) as watch:
            there = [Client(daemon.address) for _ in range(CLIENTS)]  # each loop keeps one descriptor in reserve from its first connection on
            descriptors = daemon.descriptors() - CLIENTS
            for client in there:
                client.close()
            for cut in range(0, len(good) + 1, 3):
                with connect(daemon.address) as sock:
                    sock.sendall(good[:cut])
                if cut % 30 == 0:  # all loops stand still meanwhile
                    daemon.write_config(lines % (1 + cut))
                    daemon.signal(signal.SIGHUP)
                    sessions(watch)
            wait_until(lambda: watch.info().sessions == 1 and watch.info().memory_bytes == 0, "nothing is left of them")
            wait_until(lambda: daemon.descriptors() == descriptors, "their descriptors are closed")
        for client in [Client(daemon.address) for _ in range(CLIENTS)]:
            with client:
                _, data = client.ask(request, payload)
                self.assertAlmostEqual(unpack_f32(data)[0], wanted[0], places=5)

    def test_the_number_of_loops_stays_what_it_was(self):
        daemon = Daemon("--threads", "1", config="loops: 2\n")
        self.addCleanup(daemon.stop, None)
        daemon.write_config("loops: 3\n")
        daemon.signal(signal.SIGHUP)
        self.assertIn("loops can't change while running (2 to 3)", daemon.wait_log("not reloaded"))
        with Client(daemon.address) as client:
            self.assertEqual(client.info().loops, 2)

    def test_a_session_is_told_on_its_loop_when_its_identity_has_changed(self):
        user = "uid:%d" % os.getuid()
        daemon = self.start(config="identities: {'%s': {tenant: one}}\n" % user)
        clients = [Client(daemon.address) for _ in range(CLIENTS)]
        for client in clients:
            self.addCleanup(client.close)
        daemon.write_config("identities: {'%s': {tenant: two}}\n" % user)
        daemon.signal(signal.SIGHUP)
        for client in clients:
            self.assertIn("has changed", client.expect_end()[1])

    def test_wrong_numbers_are_refused(self):
        for number in ("33", "-1", "two"):
            ended = subprocess.run([OPD, "--loops", number, "--check-config"], capture_output=True, text=True)
            self.assertEqual(ended.returncode, 2, number)
            self.assertIn("--loops: loops: \"%s\", expected a whole number of 0 to 32" % number, ended.stderr)
        ended = subprocess.run([OPD, "--loops", "0", "--check-config"], capture_output=True, text=True)
        self.assertIn("loops: 0 (by the machine)", ended.stdout)
        ended = subprocess.run([OPD, "--loops", "4", "--check-config"], capture_output=True, text=True)
        self.assertEqual(ended.returncode, 0, ended.stderr)
        self.assertIn("loops: 4", ended.stdout)


if __name__ == "__main__":
    unittest.main()
