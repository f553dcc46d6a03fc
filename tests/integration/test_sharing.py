#!/usr/bin/python3
"""Sharing a lane: order, classes, deadlines, bounded queues.

Each test's name is the promise that it checks. The lane has one thread, and a kernel that takes long is in it, so that what comes meanwhile is queued and its order is the scheduler's.
"""
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time
import unittest

import opd

from harness import (CANCEL, CANCELLED, CHUNKED, DATA, DEADLINE_EXCEEDED, INVALID_ARGUMENT, NOT_FOUND, OK, OPD, PERMISSION_DENIED, REQUEST, RESOURCE_EXHAUSTED, Client, DaemonCase, Failed, f32, frame, inline, pb, run,
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


def products(count, side, chain):
    """A graph of so many products by native, each of the one before (chain) or of the input: a square view of one element."""
    graph = pb.Graph(inputs=[pb.GraphInput(name="x")])
    for i in range(count):
        node = graph.nodes.add(op="matmul")
        node.priority.names.append("native")
        node.args.add().tensor.CopyFrom(pb.Tensor(node=pb.NodeOutput(node=i - 1)) if chain and i > 0 else pb.Tensor(graph_input=0))
        node.args.add().tensor.graph_input = 0
    graph.outputs.add().node.node = count - 1
    request = pb.Request(run_graph=pb.RunGraph(once=graph))
    request.run_graph.inputs.add().tensor.CopyFrom(tensor([side, side], size=4, strides=[0, 0]))
    return request


class Sharing(DaemonCase):
    config = ("threads: 1\ninline: 0\nsegment: 1us\nlimits: {queue: 64, lane_queue: 100}\n"
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
                                     ([str(number), "set", "class", "urgent"], "'urgent', expected realtime, interactive or batch", 2), ([str(number)], "expected session ID set", 2),
                                     (["first", "set", "weight", "7"], "the session is 'first', expected a whole number", 2), (["0", "set", "weight", "7"], "expected the number of one that opctl sessions lists", 2),
                                     (["18446744073709551616", "set", "weight", "7"], "the session is '18446744073709551616', expected a whole number of 64 bits", 2)):
            done = subprocess.run(opctl + ["session"] + wrong, capture_output=True, text=True)
            self.assertRegex(done.stderr, pattern)
            self.assertEqual(done.returncode, code)
        top = subprocess.run(opctl + ["top", "-c", "2", "--duration", "0.01"], check=True, capture_output=True, text=True).stdout
        self.assertEqual(top.count("lane cpu:"), 2)
        self.assertRegex(top, r"(?m)^ +%d +uid" % number)

    def test_an_administrator_sets_a_sessions_list_below_what_it_has_pushed_itself(self):
        number, tcp = str(self.one.hello.session), self.daemon.tcp_addresses()[0]
        opctl = [os.path.join(os.path.dirname(OPD), "opctl"), "--connect", self.address, "session"]

        def ran():
            reply = self.one.ask(run("gelu", inline([2], f32(1, 2)), run_explain=True))[0]
            return reply.run.provider, reply.run.explain.level

        before, other = ran(), self.client()
        self.assertNotEqual(before[0], "native")
        subprocess.run(opctl + [number, "set", "priority", "gelu=native"], check=True, capture_output=True)
        self.assertEqual(ran(), ("native", pb.SESSION))
        self.assertEqual(other.ask(run("gelu", inline([2], f32(1, 2))))[0].run.provider, before[0])
        pushed = pb.Request(push_priority=pb.PriorityMap(entries=[pb.PriorityEntry(op="gelu", list=pb.ProviderList(names=["cpu"]))]))
        self.one.ask(pushed)
        self.assertEqual(ran(), ("cpu", pb.SESSION))
        subprocess.run(opctl + [number, "set", "priority", "*=native"], check=True, capture_output=True)
        self.assertEqual(ran(), ("cpu", pb.SESSION))
        self.one.ask(pb.Request(pop_priority=pb.Empty()))
        self.assertEqual(ran(), ("native", pb.SESSION))  # a pop ends what was pushed and nothing else
        for op in ("gelu", "*"):
            self.assertEqual(ran()[0], "native")
            subprocess.run(opctl + [number, "clear", "priority", op], check=True, capture_output=True)
        self.assertEqual(ran(), before)
        for words, pattern, code in ((["999999", "set", "priority", "gelu=cpu"], "session 999999: there is none", 1), ([number, "set", "priority", "gelu"], "the priority is 'gelu', expected OP=LIST", 2),
                                     ([number, "set", "priority", "=cpu"], "expected OP=LIST", 2), ([number, "set", "priority", "gelu=nobody"], "nobody", 1),
                                     ([number, "set", "priority", "no_such_op=cpu"], "no_such_op", 1), ([number, "clear", "weight", "1"], "expected session ID set", 2)):
            done = subprocess.run(opctl + words, capture_output=True, text=True)
            self.assertRegex(done.stderr, pattern)
            self.assertEqual(done.returncode, code)
        mine = pb.SetPriority(op="gelu", list=pb.ProviderList(names=["native"]), session=self.one.hello.session)
        with Client(tcp) as stranger:
            self.assertEqual(stranger.call(pb.Request(set_priority=mine))[0].status, PERMISSION_DENIED)
        mine.scope = pb.SCOPE_SERVER
        self.assertEqual(other.call(pb.Request(set_priority=mine))[0].status, INVALID_ARGUMENT)
        self.assertEqual(ran(), before)

    def test_who_brings_a_large_graph_pays_for_reading_it(self):
        nodes = 20000
        graph = pb.Graph(inputs=[pb.GraphInput(name="x")])
        for i in range(nodes):
            node = graph.nodes.add(op="relu")
            node.args.add().tensor.CopyFrom(pb.Tensor(node=pb.NodeOutput(node=i - 1)) if i > 0 else pb.Tensor(graph_input=0))
        graph.outputs.add().node.node = nodes - 1
        mine = lambda: {state.session: state.usage.device_ns for state in self.sessions().sessions}[self.one.hello.session]
        before = mine()
        self.one.ask(pb.Request(register_graph=pb.RegisterGraph(graph=graph)))
        self.assertGreater(mine() - before, 1000 * 100)  # 20,000 nodes in less than 5 ns each would be news

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

    def test_a_flood_of_tensors_to_lay_out_holds_up_another_for_one_of_them(self):
        """What a lane does beside kernels is its session's as well."""
        other = self.client()
        self.one.call(product(96, 96), f32(1))
        x = self.one.ask(pb.Request(upload=pb.Upload(tensor=tensor([256, 256]))), bytes(4 * 256 * 256))[0].run.outputs[0].kept
        turned = pb.Request(fetch=pb.Fetch(tensor=pb.Tensor(dtype=pb.F32, shape=[256, 256], strides=[1, 256], handle=x)))
        release = self.occupy()
        flood = [self.one.submit(turned) for _ in range(60)]
        self.one.ping()
        request = product(2, 2)
        request.run.explain = True
        mine = other.submit(request, f32(1))
        other.ping()
        release()
        number, reply, _ = other.read_reply()
        self.assertEqual((number, reply.status), (mine, OK), reply.message)
        self.assertLessEqual(reply.run.explain.behind.tenant_jobs + reply.run.explain.behind.other_jobs, 2)
        self.assertEqual([self.one.read_reply()[0] for _ in range(60)], flood)

    def test_a_graph_yields_between_its_nodes_when_others_wait(self):
        other = self.client()
        request = products(30, 128, chain=True)
        release = self.occupy()
        mine = self.one.submit(request, f32(0.0078125))  # 1/128: each product is the same again
        self.one.ping()
        theirs = other.submit(product(2, 2), f32(1))  # comes later, and is there when the first segment ends
        other.ping()
        release()
        self.assertEqual(other.read_reply()[0], theirs)
        number, reply, data = self.one.read_reply()
        self.assertEqual((number, reply.status), (mine, OK), reply.message)
        self.assertEqual(set(struct.unpack("<16384f", data)), {0.0078125})
        ended = [state for state in self.sessions().tenants if state.name == self.one.hello.tenant][0]
        self.assertEqual((ended.queued, ended.running), (0, 0))

    def test_a_graph_that_has_begun_is_cancelled_between_its_nodes(self):
        client = self.client(features=["cancel"])
        request = products(200, 256, chain=False)
        number = client.submit(request, f32(1))
        waits = self.one.submit(product(2, 2), f32(1))
        self.assertEqual(self.one.read_reply()[0], waits)  # it has yielded at least once, or has ended
        client.send(frame(CANCEL, number))
        self.assertEqual(client.read_reply()[0], number)
        client.ping()

    def test_explain_says_whom_a_request_waited_behind_in_numbers_alone(self):
        other = self.client()
        anonymous = self.client_of(self.daemon.tcp_addresses()[0])
        release = self.occupy()
        for client, count, service_class in ((self.one, 2, REALTIME), (other, 3, REALTIME), (anonymous, 4, 0)):
            for _ in range(count):
                client.submit(product(8, 8, service_class), f32(1))
            client.ping()
        request = product(8, 8, BATCH)
        request.run.explain = True
        mine = self.one.submit(request, f32(1))
        self.one.ping()
        quick = product(8, 8, REALTIME)  # comes later and goes before
        other.submit(quick, f32(1))
        other.ping()
        release()
        before = 0  # of this session's: a batch request doesn't wait for all of them where the kernel before took so long that batch is owed its part
        while (answer := self.one.read_reply())[0] != mine:
            before += 1
        found = answer[1].run.explain
        behind = found.behind
        self.assertEqual((behind.own_jobs, behind.running), (before, 1))
        self.assertLessEqual(behind.tenant_jobs, 4)
        self.assertEqual(behind.realtime_jobs, behind.own_jobs + behind.tenant_jobs)
        self.assertEqual(behind.other_jobs, behind.batch_jobs)  # the anonymous tenant's: as many as came before its turn
        self.assertLessEqual(behind.other_jobs, 4)
        self.assertEqual(behind.own_ns + behind.tenant_ns > 0, behind.realtime_jobs > 0)
        self.assertGreater(found.times.queue, 0)
        for client, count in ((self.one, 2 - before), (other, 4)):
            for _ in range(count):
                client.read_reply()
        alone = self.one.call(request, f32(1))[0].run.explain.behind
        self.assertEqual((alone.own_jobs, alone.tenant_jobs), (0, 0))

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
            self.assertRegex(reply.message, "^matmul: 64 requests of this session wait for the cpu lane, at most 64 may: try again in about %d us$" % reply.retry_after_us)
            self.assertGreater(reply.retry_after_us, 0)
        mine = other.submit(product(2, 2), f32(1))
        other.ping()
        release()
        self.assertEqual(other.read_reply()[0], mine)
        self.assertEqual([self.one.read_reply()[0] for _ in range(64)], sent[:64])

    def test_the_lane_bounds_all_sessions_together(self):
        clients = [self.client() for _ in range(3)]
        release = self.occupy()
        statuses = []
        for client in clients:  # one after the other, whichever loops they are on
            for _ in range(40):
                client.submit(product(2, 2), f32(1))
            ping = client.submit(pb.Request(ping=pb.Empty()))
            found = None
            while found != ping:
                found, reply, _ = client.read_reply()
                statuses.append(reply.status)
        while statuses.count(RESOURCE_EXHAUSTED) < 20:  # of 120, while the kernel goes on
            statuses.append(clients[2].read_reply()[1].status)
        self.assertEqual(statuses.count(OK), 3)
        release()
        for client in clients:
            for _ in range(40 - (20 if client is clients[2] else 0)):
                statuses.append(client.read_reply()[1].status)
        self.assertEqual((statuses.count(OK), len(statuses)), (103, 123))

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


def upload(client, kib):
    return client.call(pb.Request(upload=pb.Upload(tensor=tensor([kib << 10], dtype=pb.U8, size=kib << 10))), bytes(kib << 10))[0]


class Quotas(DaemonCase):
    """One thread in a kernel that ends when it is cancelled; limits of the tenant, and of its sessions."""
    config = ("threads: 1\ninline: 0\n"
              'tenants: {anonymous: {}, "*": {in_flight: 12, queued: 8, memory: 1 MiB, session_in_flight: 6, session_queued: 4, session_memory: 768 KiB}}\n')
    flags = ("--listen", "tcp://127.0.0.1:0")

    def setUp(self):
        self.one = self.client()
        self.two = self.client()

    def occupy(self):
        holder = Client(self.daemon.tcp_addresses()[0], features=["cancel"])
        self.addCleanup(holder.close)
        request = holder.submit(product(4096, 1 << 16), f32(1))
        wait_until(lambda: self.sessions().lanes[0].running == 1, "the thread has the kernel")
        return lambda: holder.send(frame(CANCEL, request))

    def sessions(self):
        return self.one.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions

    def quota(self, kind, session=None):
        """(used, limit, refused) of a session, or of its tenant."""
        state = self.sessions()
        mine = [item for item in (state.tenants if session is None else state.sessions)
                if (item.name == self.one.hello.tenant if session is None else item.session == session.hello.session)][0]
        return [(quota.used, quota.limit, quota.refused) for quota in mine.quotas if quota.kind == kind][0]

    def opctl(self, *words, code=0):
        done = subprocess.run([os.path.join(os.path.dirname(OPD), "opctl"), "--connect", self.address] + list(words), capture_output=True, text=True)
        self.assertEqual(done.returncode, code, done.stderr)
        return done.stdout + done.stderr

    def half(self, client):
        """A request whose payload doesn't come yet."""
        request = client.next_id
        client.next_id += 1
        client.send(frame(REQUEST, request, product(2, 2).SerializeToString(), flags=CHUNKED, payload_bytes=4))
        return request

    def refusals(self, client, count):
        """The messages of so many replies that are refusals; others may be among them."""
        found = []
        while len(found) < count:
            _, reply, _ = client.read_reply()
            if reply.status != OK:
                self.assertEqual(reply.status, RESOURCE_EXHAUSTED)
                found.append(reply.message)
        return found

    def test_a_sessions_queue_and_its_tenants_are_bounded_and_the_error_says_whose(self):
        release = self.occupy()
        for _ in range(5):
            self.one.submit(product(2, 2), f32(1))
        self.assertRegex(self.refusals(self.one, 1)[0], r"^matmul: 4 requests of this session wait for the cpu lane, at most 4 may: try again in about \d+ us$")
        for _ in range(4):
            self.two.submit(product(2, 2), f32(1))
        self.two.ping()
        three = self.client()
        three.submit(product(2, 2), f32(1))
        self.assertRegex(self.refusals(three, 1)[0], r"^matmul: 8 requests of tenant uid:\d+ wait for the cpu lane, at most 8 may: try again in about \d+ us$")
        self.assertEqual(self.quota(pb.QUOTA_QUEUED, self.one), (4, 4, 1))
        self.assertEqual(self.quota(pb.QUOTA_QUEUED), (8, 8, 1))
        told = json.loads(self.opctl("run", "matmul", "ones:f32[2,2]", "ones:f32[2,2]", "--json", code=1).splitlines()[0])
        self.assertEqual(told["status"], "RESOURCE_EXHAUSTED")
        self.assertEqual(told["retry_after_us"], int(told["message"].split("about ")[1].split()[0]))
        release()
        for client in (self.one, self.two):
            self.assertEqual([client.read_reply()[1].status for _ in range(4)], [OK] * 4)
        wait_until(lambda: self.quota(pb.QUOTA_QUEUED)[0] == 0, "the queue is empty")

    def test_what_is_in_flight_is_bounded_for_a_session_and_for_its_tenant(self):
        half = [self.half(self.one) for _ in range(6)]  # their payload is still to come
        self.assertRegex(self.one.call(product(2, 2), f32(1))[0].message,
                         r"^run: quota in_flight of this session: 6 requests are in flight, at most 6 may be: try again in about \d+ us$")
        for _ in range(6):
            self.half(self.two)
        self.two.ping()  # what only asks is never refused
        three = self.client()
        self.assertRegex(three.call(product(2, 2), f32(1))[0].message, r"^run: quota in_flight of tenant uid:\d+: 12 requests are in flight, at most 12 may be: .*$")
        self.assertEqual((self.quota(pb.QUOTA_IN_FLIGHT, self.one), self.quota(pb.QUOTA_IN_FLIGHT)), ((6, 6, 1), (12, 12, 1)))
        self.two.close()
        wait_until(lambda: self.quota(pb.QUOTA_IN_FLIGHT)[0] == 6, "a session's end gives back what it had in flight")
        three.ask(product(2, 2), f32(1))
        for request in half:  # one after the other: only four of them may wait for the lane
            self.one.send(frame(DATA, request, struct.pack("<Q", 0), f32(1)))
            self.assertEqual(self.one.read_reply()[1].status, OK)
        wait_until(lambda: self.quota(pb.QUOTA_IN_FLIGHT)[0] == 0, "nothing is in flight")

    def test_memory_is_bounded_for_a_session_and_for_its_tenant(self):
        first = upload(self.one, 512)
        self.assertEqual(first.status, OK)
        self.assertRegex(upload(self.one, 300).message, r"session memory: 307200 bytes wanted, 524288 of at most 786432 in use")
        self.assertEqual(upload(self.two, 400).status, OK)
        self.assertRegex(upload(self.two, 300).message, r"tenant uid:\d+ memory: 307200 bytes wanted, 933888 of at most 1048576 in use")
        self.assertEqual((self.quota(pb.QUOTA_MEMORY, self.one)[2], self.quota(pb.QUOTA_MEMORY)), (1, (933888, 1048576, 1)))
        self.one.ask(pb.Request(free=pb.Free(tensors=[pb.Tensor(handle=first.run.outputs[0].kept)])))
        self.assertEqual(upload(self.two, 300).status, OK)
        self.two.close()
        wait_until(lambda: self.quota(pb.QUOTA_MEMORY)[0] == 0, "a session's end gives back what it had")

    def test_opctl_sets_a_sessions_quotas_and_shows_them(self):
        number = str(self.one.hello.session)
        self.opctl("session", number, "set", "quota", "in_flight=2")
        self.opctl("session", number, "set", "quota", "memory=64KiB")
        refused = upload(self.one, 65)
        self.assertEqual((refused.status, refused.retry_after_us), (RESOURCE_EXHAUSTED, 0))  # nobody knows when it will free some
        shown = json.loads(self.opctl("sessions", "--json"))
        mine = [state for state in shown["sessions"] if state["session"] == int(number)][0]["quotas"]
        self.assertEqual((mine["in_flight"]["limit"], mine["memory"]["limit"], mine["memory"]["refused"]), (2, 65536, 1))
        self.assertRegex(self.opctl("sessions"), r"(?m)^quota memory +of session %s: 0 used, limit 65536, 1 times refused$" % number)
        self.opctl("session", number, "set", "quota", "memory=0")  # limits.session's again
        self.assertEqual(upload(self.one, 65).status, OK)
        self.opctl("session", number, "set", "quota", "device_time=1ms")
        self.assertEqual(self.quota(pb.QUOTA_DEVICE_TIME, self.one)[1], 1000000)
        for wrong, pattern in (("sessions=1", "the quota is 'sessions=1', expected in_flight, queued"), ("memory=1 parsec", "expected a whole number of 64 bits with a unit, such as 64MiB"),
                               ("in_flight", "the quota is 'in_flight'"), ("in_flight=18446744073709551616", "expected a whole number of 64 bits"), ("memory=18446744073709551616", "64 bits"), ("memory=16777216TiB", "64 bits"), ("device_time=5", "such as 64ms"), ("queued=-1", "the quota is '-1', expected a whole number")):
            self.assertRegex(self.opctl("session", number, "set", "quota", wrong, code=2), pattern)
        reply, _ = self.one.call(pb.Request(set_session=pb.SetSession(session=int(number), quotas=[pb.Quota(kind=pb.QUOTA_SESSIONS, limit=1)])))
        self.assertEqual((reply.status, reply.message), (INVALID_ARGUMENT, "quota sessions is a tenant's: the configuration has it"))

    def set_quota(self, kind, limit):
        return self.two.call(pb.Request(set_session=pb.SetSession(session=self.one.hello.session, quotas=[pb.Quota(kind=kind, limit=limit)])))[0]

    def test_a_limit_that_is_none_is_a_typed_error_and_changes_nothing(self):
        most = (1 << 64) - 1
        for kind, wrong in ((pb.QUOTA_IN_FLIGHT, (1000001, 1 << 32, most)), (pb.QUOTA_QUEUED, (1000001, 1 << 32, most)), (pb.QUOTA_DEVICE_TIME, (1, 999999, 1024000000001, most)),
                            (pb.QUOTA_SESSIONS, (0, 1))):
            name = pb.QuotaKind.Name(kind)[len("QUOTA_"):].lower()
            before = [quota for state in self.sessions().sessions for quota in state.quotas if quota.kind == kind]
            for limit in wrong:
                reply = self.set_quota(kind, limit)
                self.assertEqual(reply.status, INVALID_ARGUMENT)
                self.assertIn("quota " + name, reply.message)
            self.assertEqual([quota for state in self.sessions().sessions for quota in state.quotas if quota.kind == kind], before)
        both = [pb.Quota(kind=pb.QUOTA_IN_FLIGHT, limit=3), pb.Quota(kind=pb.QUOTA_QUEUED, limit=1 << 32)]
        self.assertEqual(self.two.call(pb.Request(set_session=pb.SetSession(session=self.one.hello.session, weight=7, quotas=both)))[0].status, INVALID_ARGUMENT)
        self.assertEqual(self.quota(pb.QUOTA_IN_FLIGHT, self.one)[1], 6)
        self.assertEqual([state.weight for state in self.sessions().sessions if state.session == self.one.hello.session], [100])
        self.assertEqual(self.two.call(pb.Request(set_session=pb.SetSession(session=1 << 63, weight=7)))[0].status, NOT_FOUND)

    def test_the_largest_limits_are_taken_and_0_is_what_the_configuration_has(self):
        most = (1 << 64) - 1
        for kind, limit, configured in ((pb.QUOTA_IN_FLIGHT, 1000000, 6), (pb.QUOTA_QUEUED, 1000000, 4), (pb.QUOTA_MEMORY, most, 768 << 10), (pb.QUOTA_DEVICE_MEMORY, most, 0),
                                        (pb.QUOTA_BYTES_IN, most, 0), (pb.QUOTA_BYTES_OUT, most, 0), (pb.QUOTA_DEVICE_TIME, 1024000000000, 0)):
            self.assertEqual(self.set_quota(kind, limit).status, OK)
            self.assertEqual(self.quota(kind, self.one)[1], limit)
            self.one.ask(product(2, 2), f32(1))
            self.assertEqual(self.set_quota(kind, 0).status, OK)
            mine, = [state for state in self.sessions().sessions if state.session == self.one.hello.session]
            self.assertEqual([quota.limit for quota in mine.quotas if quota.kind == kind and quota.limit != 0], [configured] if configured else [])

    def test_a_session_that_has_used_its_device_time_waits_and_others_go_on(self):
        self.one.ask(product(256, 256), f32(1))
        self.opctl("session", str(self.one.hello.session), "set", "quota", "device_time=1ms")
        reply = self.one.call(products(60, 128, chain=True), f32(0.0078125))[0]  # its bucket is full: this one empties it for many minutes
        self.assertEqual(reply.status, OK, reply.message)
        late = self.one.submit(product(2, 2), f32(1))
        wait_until(lambda: [state.queued for state in self.sessions_by(self.two) if state.session == self.one.hello.session] == [1], "it waits")
        self.assertEqual(self.two.call(product(2, 2), f32(1))[0].status, OK)
        self.assertEqual([state.queued for state in self.sessions_by(self.two) if state.session == self.one.hello.session], [1])
        self.set_rate(0)
        self.assertEqual(self.one.read_reply()[0], late)

    def sessions_by(self, client):
        return client.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.sessions

    def set_rate(self, rate_ns):
        self.two.ask(pb.Request(set_session=pb.SetSession(session=self.one.hello.session, quotas=[pb.Quota(kind=pb.QUOTA_DEVICE_TIME, limit=rate_ns)])))


class Partition(DaemonCase):
    """A thread for anonymous alone, one for everybody else."""
    config = ("threads: 1\ninline: 0\nlimits: {queue: 4}\nlanes: {fast: {threads: 1}}\ntenants: {anonymous: {lane: fast}}\n"
              "providers: {cpu: {compare: native, compare_every: 1}}\n")
    flags = ("--listen", "tcp://127.0.0.1:0")

    def setUp(self):
        self.one = self.client()
        self.other = Client(self.daemon.tcp_addresses()[0], features=["cancel"])
        self.addCleanup(self.other.close)

    def lanes(self):
        return {lane.name: lane for lane in self.one.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.lanes}

    def occupy(self, client, lane):
        request = client.submit(product(4096, 1 << 16), f32(1))
        wait_until(lambda: self.lanes()[lane].running == 1, "the thread has the kernel")
        return lambda: client.send(frame(CANCEL, request))

    def test_a_lane_of_its_own_is_nobody_elses(self):
        lanes = self.lanes()
        self.assertEqual([(name, lanes[name].threads) for name in lanes], [("cpu", 1), ("fast", 1)])
        holder = self.client(features=["cancel"])
        release = self.occupy(holder, "cpu")
        explained = product(64, 64)
        explained.run.explain = True
        reply, _ = self.other.ask(explained, f32(1))
        self.assertEqual(reply.run.explain.behind.running, 0)
        self.assertEqual(self.other.call(products(3, 64, chain=True), f32(1))[0].status, OK)
        release()
        release = self.occupy(self.other, "fast")
        self.assertEqual(self.one.call(product(64, 64), f32(1))[0].status, OK)
        lanes = self.lanes()
        self.assertEqual((lanes["cpu"].running, lanes["fast"].running), (0, 1))
        waiting = [self.other.submit(product(2, 2), f32(1)) for _ in range(6)]
        for request in waiting[4:]:
            found, reply, _ = self.other.read_reply()
            self.assertEqual((found, reply.status), (request, RESOURCE_EXHAUSTED))
            self.assertRegex(reply.message, "^matmul: 4 requests of this session wait for the fast lane, at most 4 may: ")
        self.other.send(frame(CANCEL, waiting[1]))
        found, reply, _ = self.other.read_reply()
        self.assertEqual((found, reply.status), (waiting[1], CANCELLED))
        release()
        self.assertEqual(len({self.other.read_reply()[0] for _ in range(4)} & set(waiting)), 3)

    def test_a_comparison_with_a_second_provider_runs_on_the_lane_of_its_session(self):
        release = self.occupy(self.client(features=["cancel"]), "cpu")
        self.assertEqual(self.other.call(run("relu", inline([2], f32(-1, 1)), run_priority=["cpu"]))[0].status, OK)
        wait_until(lambda: self.one.info().compared == 1, "the comparison")
        self.assertEqual(self.lanes()["cpu"].running, 1)
        release()

    def test_it_is_shown_wherever_lanes_are(self):
        shown = self.opctl("sessions", "--json")
        self.assertEqual([lane["lane"] for lane in json.loads(shown)["lanes"]], ["cpu", "fast"])
        self.assertIn('opd_lane_threads{lane="fast"} 1', self.opctl("stats", "opd_lane"))
        self.assertEqual(json.loads(self.opctl("info", "--json"))["threads"], 2)

    def opctl(self, *words):
        return subprocess.run([os.path.join(os.path.dirname(OPD), "opctl"), "--connect", self.address, *words], check=True, capture_output=True, text=True).stdout

    def test_lanes_are_settled_when_the_daemon_starts(self):
        for old, new, said in (("fast: {threads: 1}", "fast: {threads: 3}", "lanes can't change while running"), ("lane: fast", "lane: slow", "is no lane of `lanes`, nor cpu"),
                               ("lane: fast", "lane: cpu", "key=tenants.anonymous")):
            self.daemon.write_config(self.config.replace(old, new))
            self.daemon.signal(signal.SIGHUP)
            self.daemon.wait_log(said)
        self.daemon.wait_log("configuration reloaded")
        release = self.occupy(self.client(features=["cancel"]), "cpu")
        self.assertEqual(self.other.call(product(64, 64), f32(1))[0].status, OK)  # who is there stays where it is
        release()


class Rates(DaemonCase):
    config = "tenants: {anonymous: {session_bytes_in: 1 MiB, bytes_out: 2 MiB}}\n"
    flags = ("--listen", "tcp://127.0.0.1:0")

    def test_bytes_that_come_and_go_are_bounded_a_second_and_time_heals_it(self):
        anonymous = Client(self.daemon.tcp_addresses()[0])
        self.addCleanup(anonymous.close)
        self.assertEqual(upload(anonymous, 3 << 10).status, OK)  # three seconds' worth at once: whoever has paid may
        refused = upload(anonymous, 1)
        self.assertRegex(refused.message, r"^upload: quota bytes_in of this session: more was sent than 1048576 bytes a second: try again in about \d+ us$")
        self.assertLess(int(refused.message.split("about ")[1].split()[0]), 2000100)
        self.assertEqual(refused.retry_after_us, int(refused.message.split("about ")[1].split()[0]))
        other = Client(self.daemon.tcp_addresses()[0])
        self.addCleanup(other.close)
        big = run("relu", tensor([1 << 20], inline=f32(1), strides=[0]))
        self.assertEqual(other.call(big)[0].status, OK)  # 4 MiB go out
        self.assertRegex(other.call(big)[0].message, r"^run: quota bytes_out of tenant anonymous: more was sent than 2097152 bytes a second: try again in about \d+ us$")
        self.assertEqual(upload(self.client(), 1).status, OK)  # another tenant's
        other.close()
        anonymous.close()
        again = Client(self.daemon.tcp_addresses()[0])  # who comes back finds what it has used up
        self.addCleanup(again.close)
        self.assertRegex(again.call(big)[0].message, r"^run: quota bytes_out of tenant anonymous")


class Full(DaemonCase):
    """Memory fills in steps: uploads are refused first, then sessions, then caches go."""
    config = "limits: {memory: 4 MiB, session: 4 MiB, request: 4 MiB, refuse_uploads: 50, refuse_sessions: 75, drop_caches: 90}\n"
    flags = ("--listen", "tcp://127.0.0.1:0")

    def keep(self, client, kib):
        """A result that stays; not an upload."""
        request = run("relu", tensor([kib << 8], inline=f32(1), strides=[0]))
        request.run.outputs.add(keep=True, no_copy=True)
        return client.call(request)[0]

    def test_uploads_are_refused_first_then_sessions_then_caches_go_and_administrators_come_in(self):
        admin = self.client()
        tcp = self.daemon.tcp_addresses()[0]
        upload = pb.Request(upload=pb.Upload(tensor=tensor([64], dtype=pb.U8, size=64)))
        self.assertEqual(self.keep(admin, 2200).status, OK)
        reply, _ = admin.call(upload, bytes(64))
        self.assertEqual(reply.status, RESOURCE_EXHAUSTED)
        self.assertRegex(reply.message, r"^upload: none is taken while \d+ of at most 4194304 bytes of daemon memory are in use \(50 %\)$")
        Client(tcp).close()
        self.assertEqual(self.keep(admin, 1000).status, OK)
        with self.assertRaises(Failed) as refused:
            Client(tcp)
        self.assertRegex(refused.exception.reply.message, r"^no session is opened while \d+ of at most 4194304 bytes of daemon memory are in use \(75 %\)$")
        last = self.keep(admin, 700)
        self.assertEqual(last.status, OK)
        self.daemon.wait_log("memory is nearly full, caches dropped")
        other = self.client()  # an administrator
        listed = other.ask(pb.Request(info=pb.Empty()))[0].info
        self.assertEqual(listed.memory_bytes, 3900 << 10)
        self.assertRegex(self.keep(admin, 700).message, "memory: .* bytes wanted")
        admin.close()
        wait_until(lambda: other.ask(pb.Request(info=pb.Empty()))[0].info.memory_bytes == 0, "memory is free")
        Client(tcp).close()
        self.assertEqual(other.call(upload, bytes(64))[0].status, OK)


class Slow(DaemonCase):
    config = "limits: {stall: 1s}\n"

    def test_a_client_that_reads_a_byte_at_a_time_is_cut_off(self):
        slow = self.client()
        other = self.client()
        for _ in range(4):
            slow.submit(run("relu", tensor([1 << 22], inline=f32(1), strides=[0])))  # 16 MiB of reply each
        while "the client doesn't read its replies" not in self.daemon.log_text():
            slow.sock.recv(64)
            time.sleep(0.01)  # how slow it is, not how long the test waits
        other.ping()


class Counted(DaemonCase):
    """The daemon's numbers: by opctl, and at the metrics endpoint."""
    folder = tempfile.mkdtemp()
    config = "metrics: unix:%s/metrics\n" % folder
    flags = ("--listen", "tcp://127.0.0.1:0")

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        os.rmdir(cls.folder)  # the daemon has removed its socket

    def http(self, request):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(self.folder + "/metrics")
            for part in request:
                sock.sendall(part)
            answer = b""
            while True:
                try:
                    got = sock.recv(1 << 16)
                except ConnectionResetError:
                    got = b""
                if not got:
                    break
                answer += got
        head, _, body = answer.partition(b"\r\n\r\n")
        if head:
            self.assertIn(b"Content-Length: %d" % len(body), head)
        return head.split(b"\r\n")[0].decode(), body.decode()

    def scrape(self):
        status, body = self.http([b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"])
        self.assertEqual(status, "HTTP/1.1 200 OK")
        return dict(line.rsplit(" ", 1) for line in body.splitlines() if not line.startswith("#"))

    def opctl(self, *words):
        command = [os.path.join(os.path.dirname(OPD), "opctl"), "--connect", self.address] + list(words)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def test_small_graphs_that_run_on_the_loop_are_counted_too(self):
        client = self.client()
        graph = pb.Graph(inputs=[pb.GraphInput(name="x")])
        for i in range(3):
            node = graph.nodes.add(op="relu")
            node.args.add().tensor.CopyFrom(pb.Tensor(node=pb.NodeOutput(node=i - 1)) if i > 0 else pb.Tensor(graph_input=0))
        graph.outputs.add().node.node = 2
        made = client.ask(pb.Request(register_graph=pb.RegisterGraph(graph=graph)))[0].graph.graph
        request = pb.Request(run_graph=pb.RunGraph(graph=made))
        request.run_graph.inputs.add().tensor.CopyFrom(tensor([4]))
        before = self.scrape()
        for _ in range(10):
            client.ask(request, f32(1, 2, 3, 4))
        after = self.scrape()
        grown = lambda name: float(after.get(name, 0)) - float(before.get(name, 0))
        self.assertEqual(grown('opd_runs_total{op="(graph)",provider=""}'), 10)
        self.assertGreater(grown('opd_runs_on_loop_total{op="(graph)",provider=""}'), 0)  # the first at least needs the lane

    def test_what_ran_is_counted_by_op_and_provider_and_told_the_same_both_ways(self):
        client = self.client()
        before = self.scrape()
        for _ in range(5):
            client.ask(product(64, 64), f32(1))
            client.ask(run("relu", tensor([1]), run_priority=["native"]), f32(1))
        client.ask(products(3, 64, chain=True), f32(1))
        bad = run("relu", tensor([1]), run_priority=["nobody"])
        client.call(bad, f32(1))
        after = self.scrape()
        grown = lambda name: float(after.get(name, 0)) - float(before.get(name, 0))
        matmul = '{op="matmul",provider="native"}'
        self.assertEqual(grown("opd_runs_total" + matmul), 5)
        self.assertEqual(grown('opd_runs_total{op="relu",provider="native"}'), 5)
        self.assertEqual(grown("opd_kernel_seconds_count" + matmul), 5)
        self.assertEqual(grown('opd_kernel_seconds_bucket{op="matmul",provider="native",le="+Inf"}'), 5)
        self.assertEqual(grown("opd_run_wait_seconds_count" + matmul), 5)
        self.assertAlmostEqual(grown("opd_kernel_seconds_sum" + matmul), grown("opd_run_device_seconds_total" + matmul))
        self.assertEqual(grown('opd_runs_total{op="(graph)",provider=""}'), 1)
        self.assertEqual(grown('opd_kernel_seconds_count{op="(graph)",provider=""}'), 1)
        self.assertEqual(grown('opd_replies_total{status="NOT_FOUND"}'), 1)
        self.assertEqual(grown('opd_requests_total{kind="run"}'), 11)
        self.assertGreater(grown("opd_request_seconds_count"), 10)
        told = {self.name(stat): stat for stat in json.loads(self.opctl("stats", "--json"))}
        again = self.scrape()
        self.assertEqual(told["opd_runs_total" + matmul]["value"], float(again["opd_runs_total" + matmul]))
        self.assertEqual(told["opd_kernel_seconds" + matmul]["count"], float(again["opd_kernel_seconds_count" + matmul]))
        self.assertAlmostEqual(told["opd_kernel_seconds" + matmul]["sum"], float(again["opd_kernel_seconds_sum" + matmul]))
        tenant = '{tenant="%s"}' % client.hello.tenant
        shown = json.loads(self.opctl("sessions", "--json"))["tenants"]
        mine = [item for item in shown if item["tenant"] == client.hello.tenant][0]
        self.assertEqual(mine["jobs"], told["opd_tenant_jobs_total" + tenant]["value"])
        self.assertAlmostEqual(mine["device_ns"] / 1e9, told["opd_tenant_device_seconds_total" + tenant]["value"])
        self.assertRegex(self.opctl("stats", "opd_kernel"), r'(?m)^opd_kernel_seconds\{op="matmul",provider="native"\} \d+, mean .*, 50 % within .*, 99 % within ')
        self.assertNotIn("opd_runs", self.opctl("stats", "opd_kernel"))

    def name(self, stat):
        labels = ",".join('%s="%s"' % item for item in stat["labels"].items())
        return stat["name"] + ("{%s}" % labels if labels else "")

    def test_skips_are_counted_with_their_reasons(self):
        client = self.client()
        request = run("matmul", tensor([2, 2], dtype=pb.I32, size=16), tensor([2, 2], dtype=pb.I32, size=16), run_priority=["cpu"], run_mode=pb.DRY)
        reply, _ = client.call(request, bytes(16))
        skipped = [skip for skip in reply.run.explain.skipped if skip.provider == "cpu"]
        before = self.scrape()
        for _ in range(20):
            client.call(request, bytes(16))
        after = self.scrape()
        name = 'opd_skips_total{op="matmul",provider="cpu"}'
        if not skipped:
            self.assertEqual(after.get(name), before.get(name))
            return
        self.assertEqual(float(after[name]) - float(before.get(name, 0)), 20)
        reason = lambda numbers: sum(float(value) for key, value in numbers.items() if key.startswith('opd_skip_reasons_total{op="matmul",provider="cpu",reason="dtype"'))
        self.assertEqual(reason(after) - reason(before), 20)  # a dry run asks for them

    def test_a_session_is_told_of_its_own_tenant_alone(self):
        anonymous = Client(self.daemon.tcp_addresses()[0])
        self.addCleanup(anonymous.close)
        mine = self.client()
        stats = anonymous.ask(pb.Request(get_stats=pb.GetStats()))[0].stats
        tenants = {label.value for stat in stats.items for label in stat.labels if label.name == "tenant"}
        self.assertEqual(tenants, {"anonymous"})
        self.assertFalse(stats.cut)
        stats = mine.ask(pb.Request(get_stats=pb.GetStats()))[0].stats
        tenants = {label.value for stat in stats.items for label in stat.labels if label.name == "tenant"}
        self.assertEqual(tenants, {"anonymous", mine.hello.tenant})

    def test_the_endpoint_answers_what_it_has_and_nothing_else(self):
        self.assertEqual(self.http([b"GET / HTTP/1.0\r\n\r\n"])[0], "HTTP/1.1 404 Not Found")
        self.assertEqual(self.http([b"GET /metrics2 HTTP/1.0\r\n\r\n"])[0], "HTTP/1.1 404 Not Found")
        self.assertEqual(self.http([b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"])[0], "HTTP/1.1 405 Method Not Allowed")
        self.assertEqual(self.http([b"G", b"ET /metr", b"ics?x=1 HTTP/1.1\r\n", b"\r", b"\n"])[0], "HTTP/1.1 200 OK")
        self.assertIn(self.http([b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 1000])[0], ("HTTP/1.1 431 Request Header Fields Too Large", ""))
        self.assertEqual(self.http([b"\0\n\n"])[0], "HTTP/1.1 405 Method Not Allowed")
        held = []
        for _ in range(40):  # more than there may be at once: who came first, and said nothing, makes room
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.folder + "/metrics")
            held.append(sock)
        self.client().ping()
        for _ in range(3):
            self.assertEqual(self.http([b"GET /metrics HTTP/1.0\r\n\r\n"])[0], "HTTP/1.1 200 OK")
        for sock in held:
            sock.close()
        self.assertNotIn("/metrics", " ".join(self.client().info().listeners))


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
        self.assertEqual(self.check('tenants: {a: {speed: 1}}\n', r"tenants.a.speed: no such key, expected weight, class, class_max, lane or a quota: sessions, in_flight, queued, .*"), 2)
        self.assertEqual(self.check('tenants:\n  a: {}\n  a: {}\n', r":3: tenants.a: there already, in line 2"), 2)
        self.assertEqual(self.check('tenants: {a: {device_time: 1us}}\n', r'"1us", expected 1ms to 1024s'), 2)
        self.assertEqual(self.check('tenants: {a: {weight: 7, class: batch, class_max: interactive, device_time: 500ms, sessions: 3, session_bytes_in: 1 MiB}}\n',
                                    r"tenant: a = weight 7, class batch \(at most interactive\), sessions 3, device_time 500000000 ns, session_bytes_in 1048576"), 0)
        self.assertEqual(self.check('tenants: {a: {session_sessions: 3}}\n', r"tenants.a.session_sessions: no such key"), 2)
        self.assertEqual(self.check('tenants: {a: {in_flight: 1000001}}\n', r'"1000001", expected a whole number of 0 to 1000000'), 2)
        self.assertEqual(self.check('metrics: "tcp://10.0.0.1:9100"\n', r"metrics: tcp://10.0.0.1:9100 is not a loopback address"), 2)
        self.assertEqual(self.check('metrics: "tcp://127.0.0.1:9100"\n', r"metrics: tcp://127.0.0.1:9100"), 0)
        self.assertEqual(self.check('limits: {refuse_uploads: 101}\n', r"limits.refuse_uploads"), 2)


if __name__ == "__main__":
    unittest.main()
