#!/usr/bin/python3
"""Sharing a lane: order, classes, deadlines, bounded queues.

Each test's name is the promise that it checks. The lane has one thread, and a kernel that takes long is in it, so that what comes meanwhile is queued and its order is the scheduler's.
"""
import json
import os
import struct
import subprocess
import tempfile
import unittest

import opd

from harness import (CANCEL, CHUNKED, DATA, DEADLINE_EXCEEDED, INVALID_ARGUMENT, OK, OPD, PERMISSION_DENIED, REQUEST, RESOURCE_EXHAUSTED, Client, DaemonCase, Failed, f32, frame, pb, run,
                     tensor, wait_until)

REALTIME, INTERACTIVE, BATCH = pb.REALTIME, pb.INTERACTIVE, pb.BATCH


def product(side, depth, service_class=0, timeout_us=0):
    """A product of two views of one element, by native: nothing to send, side² · depth multiplications to do."""
    left, right = (tensor(shape, size=4, strides=[0, 0]) for shape in ([side, depth], [depth, side]))
    request = run("matmul", left, right, run_priority=["native"])
    request.run.outputs.add(no_copy=True)
    request.run.service_class = service_class
    request.run.timeout_us = timeout_us
    return request


class Sharing(DaemonCase):
    config = ("threads: 1\ninline: 0\nlimits: {queue: 64, lane_queue: 100}\n"
              'tenants: {anonymous: {class: batch, class_max: batch, weight: 300}, "*": {weight: 100}}\n')
    flags = ("--listen", "tcp://127.0.0.1:0")

    def setUp(self):
        self.one = self.client()

    def occupy(self):
        """The lane's thread is in a kernel that ends when it is cancelled."""
        holder = self.client(features=["cancel"])
        request = holder.submit(product(4096, 1 << 16), f32(1))
        wait_until(lambda: self.lane().running == 1 and self.lane().queued == 0, "the thread has the kernel")
        return lambda: holder.send(frame(CANCEL, request))

    def lane(self):
        return self.sessions().lanes[0]

    def sessions(self, client=None):
        reply, _ = (client or self.one).ask(pb.Request(list_sessions=pb.ListSessions()))
        return reply.sessions

    def test_sessions_say_what_they_have_had_and_what_they_wait_for(self):
        other = self.client()
        release = self.occupy()
        sent = [self.one.submit(product(64, 64), f32(1)) for _ in range(5)]
        mine = {state.session: state for state in self.sessions(other).sessions}[self.one.hello.session]
        self.assertEqual((mine.queued, mine.running, mine.in_flight, mine.usage.jobs, mine.weight), (5, 0, 5, 0, 100))
        self.assertEqual((mine.service_class, mine.tenant), (INTERACTIVE, self.one.hello.tenant))
        release()
        for request in sent:
            self.assertEqual(self.one.read_reply()[0], request)
        after = self.sessions(other)
        mine = {state.session: state for state in after.sessions}[self.one.hello.session]
        self.assertEqual((mine.queued, mine.running, mine.usage.jobs), (0, 0, 5))
        self.assertGreater(mine.usage.device_ns, 0)
        self.assertGreater(mine.usage.wait_max_ns, 0)
        self.assertLessEqual(mine.usage.device_ns, after.lanes[0].device_ns)

    def test_a_session_sees_its_tenants_sessions_and_an_administrator_all(self):
        anonymous = self.client_of(self.daemon.tcp_addresses()[0])
        self.assertEqual([state.session for state in self.sessions(anonymous).sessions], [anonymous.hello.session])
        self.assertEqual([tenant.name for tenant in self.sessions(anonymous).tenants], ["anonymous"])
        both = {anonymous.hello.session, self.one.hello.session}
        self.assertLessEqual(both, {state.session for state in self.sessions().sessions})
        reply, _ = anonymous.call(pb.Request(set_session=pb.SetSession(session=anonymous.hello.session, weight=1000)))
        self.assertEqual(reply.status, PERMISSION_DENIED)

    def test_an_administrator_changes_weight_and_class(self):
        number = self.one.hello.session
        opctl = [os.path.join(os.path.dirname(OPD), "opctl"), "--connect", self.address]
        for change in (["weight", "700"], ["class", "batch"]):
            subprocess.run(opctl + ["session", str(number), "set"] + change, check=True, capture_output=True)
        shown = json.loads(subprocess.run(opctl + ["sessions", "--json"], check=True, capture_output=True, text=True).stdout)
        mine = [state for state in shown["sessions"] if state["session"] == number][0]
        self.assertEqual((mine["weight"], mine["class"]), (700, "batch"))
        self.assertEqual(shown["lanes"][0]["threads"], 1)
        release = self.occupy()
        other = self.client()
        slow = self.one.submit(product(96, 96), f32(1))
        self.one.ping()
        fast = other.submit(product(96, 96), f32(1))
        other.ping()
        tail = other.submit(product(96, 96), f32(1))
        other.ping()
        release()
        self.assertEqual([other.read_reply()[0] for _ in range(2)], [fast, tail])
        self.assertEqual(self.one.read_reply()[0], slow)
        for wrong, pattern, code in ((["999999", "set", "weight", "1"], "session 999999: there is none", 1), ([str(number), "set", "weight", "0"], "expected 1 to 1000000", 2),
                                     ([str(number), "set", "class", "urgent"], "'urgent', expected realtime, interactive or batch", 2), ([str(number)], "expected session ID set", 2)):
            done = subprocess.run(opctl + ["session"] + wrong, capture_output=True, text=True)
            self.assertRegex(done.stderr, pattern)
            self.assertEqual(done.returncode, code)
        top = subprocess.run(opctl + ["top", "-c", "2", "--duration", "0.01"], check=True, capture_output=True, text=True).stdout
        self.assertEqual(top.count("lane cpu:"), 2)
        self.assertRegex(top, r"(?m)^ +%d +uid" % number)

    def test_a_session_is_served_in_the_order_of_its_requests(self):
        release = self.occupy()
        sent = [self.one.submit(product(2, 2), f32(1)) for _ in range(20)]
        release()
        self.assertEqual([self.one.read_reply()[0] for _ in sent], sent)

    def test_a_realtime_request_goes_before_batch_work_that_came_first(self):
        release = self.occupy()
        batch = [self.one.submit(product(64, 64, BATCH), f32(1)) for _ in range(20)]
        urgent = self.one.submit(product(2, 2, REALTIME), f32(1))
        normal = self.one.submit(product(2, 2), f32(1))
        release()
        self.assertEqual([self.one.read_reply()[0] for _ in range(22)], [urgent, normal] + batch)

    def test_a_flood_of_one_session_holds_up_another_for_one_of_its_kernels(self):
        other = self.client()
        release = self.occupy()
        flood = [self.one.submit(product(96, 96), f32(1)) for _ in range(60)]
        self.one.ping()
        mine = other.submit(product(96, 96), f32(1))
        other.ping()
        release()
        self.assertEqual(other.read_reply()[0], mine)
        self.assertEqual([self.one.read_reply()[0] for _ in range(60)], flood)

    def test_a_late_request_is_answered_at_its_time_and_not_at_its_turn(self):
        release = self.occupy()
        late = self.one.submit(product(2, 2, timeout_us=20000), f32(1))
        request, reply, _ = self.one.read_reply()  # the lane is still occupied
        self.assertEqual((request, reply.status), (late, DEADLINE_EXCEEDED))
        self.assertEqual(reply.message, "matmul: not started within its timeout of 20000 us")
        after = self.one.submit(product(2, 2, timeout_us=60000000), f32(1))
        release()
        self.assertEqual(self.one.read_reply()[0], after)

    def test_deadlines_come_in_their_own_order(self):
        release = self.occupy()
        times = [90000, 30000, 60000, 120000, 30001]
        sent = {self.one.submit(product(2, 2, timeout_us=time), f32(1)): time for time in times}
        ended = [self.one.read_reply() for _ in times]
        release()
        self.assertEqual([sent[request] for request, _, _ in ended], sorted(times))
        self.assertEqual({reply.status for _, reply, _ in ended}, {DEADLINE_EXCEEDED})

    def test_one_that_waits_for_its_payload_is_answered_at_its_time(self):
        request = product(2, 2, timeout_us=10000)
        envelope = request.SerializeToString()
        self.one.send(frame(REQUEST, 1, envelope, flags=CHUNKED, payload_bytes=4))
        self.one.next_id = 2
        request, reply, _ = self.one.read_reply()
        self.assertEqual((request, reply.status), (1, DEADLINE_EXCEEDED))
        self.one.send(frame(DATA, 1, struct.pack("<Q", 0), f32(1)))  # was on its way: skipped
        self.one.ping()
        self.one.send(frame(REQUEST, 3, envelope, payload_bytes=4) + b"\0")  # the first of four bytes, in the frame itself
        self.one.next_id = 4
        request, reply, _ = self.one.read_reply()
        self.assertEqual((request, reply.status), (3, DEADLINE_EXCEEDED))
        self.one.send(b"\0\0\0")
        self.one.ping()

    def test_a_full_queue_is_a_typed_error_at_once_and_others_go_on(self):
        other = self.client()
        release = self.occupy()
        sent = [self.one.submit(product(2, 2), f32(1)) for _ in range(70)]
        refused = [self.one.read_reply() for _ in range(6)]
        self.assertEqual([request for request, _, _ in refused], sent[64:])
        for _, reply, _ in refused:
            self.assertEqual(reply.status, RESOURCE_EXHAUSTED)
            self.assertRegex(reply.message, "^matmul: 64 requests of this session wait for the cpu lane, at most 64 may, .*try again in about [0-9]+ us$")
        mine = other.submit(product(2, 2), f32(1))
        other.ping()
        release()
        self.assertEqual(other.read_reply()[0], mine)
        self.assertEqual([self.one.read_reply()[0] for _ in range(64)], sent[:64])

    def test_the_lane_bounds_all_sessions_together(self):
        clients = [self.client() for _ in range(3)]
        release = self.occupy()
        for client in clients:
            for _ in range(40):
                client.submit(product(2, 2), f32(1))
            client.submitted = client.submit(pb.Request(ping=pb.Empty()))
        statuses = []
        refused = 0
        while refused < 20:  # of 120
            _, reply, _ = clients[2].read_reply()
            refused += reply.status == RESOURCE_EXHAUSTED
        release()
        for client in clients:
            for _ in range(41 - (21 if client is clients[2] else 0)):
                statuses.append(client.read_reply()[1].status)
        self.assertEqual(set(statuses), {OK})

    def test_a_tenant_gets_nothing_more_urgent_than_it_may(self):
        anonymous = self.client_of(self.daemon.tcp_addresses()[0])
        release = self.occupy()
        theirs = [anonymous.submit(product(96, 96, REALTIME), f32(1)) for _ in range(5)]
        anonymous.ping()
        mine = self.one.submit(product(96, 96, INTERACTIVE), f32(1))
        watch = self.one.submit(product(2, 2, BATCH), f32(1))
        self.one.ping()
        release()
        self.assertEqual(self.one.read_reply()[0], mine)
        self.assertEqual([anonymous.read_reply()[0] for _ in theirs], theirs)
        self.assertEqual(self.one.read_reply()[0], watch)

    def client_of(self, address):
        client = Client(address)
        self.addCleanup(client.close)
        return client

    def test_an_unknown_class_is_a_typed_error(self):
        reply, _ = self.one.call(product(2, 2, 7), f32(1))
        self.assertEqual(reply.status, INVALID_ARGUMENT)
        self.assertRegex(reply.message, r"service_class: 7, expected 0 \(normal\), 1 \(realtime\), 2 \(interactive\) or 3 \(batch\)")

    def test_clients_say_the_class_by_name(self):
        with opd.Client(self.daemon.address) as client:
            self.assertEqual(client.run("relu", opd.Tensor(f32(1, -1), "f32", (2,)), service_class="batch")[0].tolist(), [1.0, 0.0])
            with self.assertRaises(ValueError):
                client.run("relu", opd.Tensor(f32(1), "f32", (1,)), service_class="urgent")


class Limited(DaemonCase):
    config = 'tenants: {"*": {sessions: 3}, anonymous: {sessions: 1}}\n'
    flags = ("--listen", "tcp://127.0.0.1:0")

    def test_a_tenant_opens_no_more_sessions_than_it_may_and_others_still_can(self):
        tcp = self.daemon.tcp_addresses()[0]
        first, second, third = (self.client() for _ in range(3))
        with self.assertRaises(Failed) as refused:
            self.client()
        self.assertEqual(refused.exception.reply.status, RESOURCE_EXHAUSTED)
        self.assertRegex(refused.exception.reply.message, r"^3 sessions of tenant uid:\d+ are open, no more may be$")
        other = Client(tcp)
        other.ping()
        other.close()
        third.close()
        second.close()
        wait_until(self.can_connect, "a closed session makes room")
        first.close()

    def can_connect(self):
        try:
            self.client().close()
            return True
        except Failed:
            return False


class Configured(unittest.TestCase):
    def check(self, text, pattern):
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(text)
            file.flush()
            done = subprocess.run([OPD, "--config", file.name, "--check-config"], capture_output=True, text=True)
        self.assertRegex(done.stdout + done.stderr, pattern)
        return done.returncode

    def test_tenants_are_checked_and_named(self):
        self.assertEqual(self.check('tenants: {"uid:7": {weight: 0}}\n', r':1: tenants.uid:7.weight: "0", expected a whole number of 1 to 1000000'), 2)
        self.assertEqual(self.check('tenants: {a: {class: urgent}}\n', r'"urgent", expected realtime, interactive or batch'), 2)
        self.assertEqual(self.check('tenants: {a: {class: realtime, class_max: batch}}\n', r"a: class realtime, expected one no more urgent than class_max batch"), 2)
        self.assertEqual(self.check('tenants: {a: {speed: 1}}\n', r"tenants.a.speed: no such key, expected weight, class, class_max, device_time or sessions"), 2)
        self.assertEqual(self.check('tenants:\n  a: {}\n  a: {}\n', r":3: tenants.a: there already, in line 2"), 2)
        self.assertEqual(self.check('tenants: {a: {device_time: 1us}}\n', r'"1us", expected 1ms to 1024s'), 2)
        self.assertEqual(self.check('tenants: {a: {weight: 7, class: batch, class_max: interactive, device_time: 500ms, sessions: 3}}\n', r"tenant: a = weight 7, class batch \(at most interactive\), 500 ms of device time a second, 3 sessions"), 0)


if __name__ == "__main__":
    unittest.main()
