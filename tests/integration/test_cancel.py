#!/usr/bin/python3
"""Cancelling: at each stage of a request, by CANCEL, by a connection that ends, by the clients.

Each test's name is the promise that it checks. The lane has one thread, so that what stands behind a long kernel is queued, not running.
"""
import os
import random
import signal
import subprocess
import time
import unittest

import opd

from harness import (ABORTED, CANCEL, CANCELLED, CHUNKED, OK, PATIENCE, REQUEST, DaemonCase, f32, frame, inline, pb, run, tensor, wait_until)
from test_cost import data, half_sent, kept, result

OPCTL = os.environ.get("OPCTL_BIN", os.path.join(os.path.dirname(os.environ.get("OPD_BIN", "build/bin/opd")), "opctl"))
SIDE = 4096
DEPTH = 1 << 16


def slow(keep=False):
    """A product of two views of one element: nothing to send, many minutes to compute."""
    left, right = (tensor(shape, size=4, strides=[0, 0]) for shape in ([SIDE, DEPTH], [DEPTH, SIDE]))
    request = run("matmul", left, right, run_priority=["native"])
    request.run.outputs.add(keep=keep, no_copy=True)
    return request


def small():
    return run("silu", inline([2], f32(1, 2)))


class Cancelling(DaemonCase):
    config = "threads: 1\nlimits: {session: 8 GiB, memory: 8 GiB, in_flight: 256}\n"

    def setUp(self):
        self.one = self.client(features=["cancel", "unheard of"])
        self.assertEqual(list(self.one.hello.features), ["cancel"])

    def cancel(self, *requests, client=None):
        (client or self.one).send(b"".join(frame(CANCEL, request) for request in requests))

    def ended(self, count):
        """The next replies' {id: (status, message)}; they are of different requests."""
        replies = {}
        for _ in range(count):
            request, reply, _ = self.one.read_reply()
            self.assertNotIn(request, replies)
            replies[request] = (reply.status, reply.message)
        return replies

    def expect(self, wanted):
        """The next replies are these; texts are patterns, or "" for whatever."""
        replies = self.ended(len(wanted))
        self.assertEqual({request: reply[0] for request, reply in replies.items()}, {request: want[0] for request, want in wanted.items()})
        for request, (_, pattern) in wanted.items():
            self.assertRegex(replies[request][1], pattern or "^")

    def expect_silence(self, client=None):
        """Nothing was answered before this ping."""
        client = client or self.one
        ping = client.submit(pb.Request(ping=pb.Empty()))
        request, reply, _ = client.read_reply()
        self.assertEqual((request, reply.status), (ping, OK))

    def expect_nothing_left(self):
        other = self.client()
        wait_until(lambda: other.info().memory_bytes == 0, "all memory is given back")

    def begin_slow(self, keep=False):
        """The id of a slow request that the lane's thread is in: what comes after it is queued."""
        request = self.one.submit(slow(keep), f32(1))
        self.expect_silence()
        return request

    def test_one_that_waits_for_its_payload_ends_at_once(self):
        half_sent(self.one, 1, keep=True)
        self.one.send(data(1, 0, 65536))
        dependent = self.one.submit(run("silu", result(1)))
        self.cancel(1)
        self.expect({1: (CANCELLED, "silu: the client cancelled the request"), dependent: (ABORTED, "request 1,")})
        self.one.send(data(1, 65536, 65536))  # was on its way: skipped
        self.expect_silence()
        self.expect_nothing_left()

    def test_an_upload_that_waits_for_its_payload_ends_at_once(self):
        request = pb.Request(upload=pb.Upload(tensor=tensor([1 << 18])))
        self.one.send(frame(REQUEST, 1, request.SerializeToString(), flags=CHUNKED, payload_bytes=1 << 20))
        self.one.next_id = 2
        self.cancel(1)
        self.expect({1: (CANCELLED, "upload: the client cancelled the request")})
        self.expect_silence()
        self.expect_nothing_left()

    def test_one_that_waits_for_a_result_ends_at_once_and_what_it_waits_for_goes_on(self):
        half_sent(self.one, 1, keep=True, bytes_=256)
        first = self.one.submit(run("silu", result(1)))
        both = self.one.submit(run("add", result(1), result(1)))
        fetch = self.one.submit(pb.Request(fetch=pb.Fetch(tensor=result(1))))
        last = self.one.submit(run("silu", result(1)))
        self.cancel(both, fetch)
        self.expect({both: (CANCELLED, "^add: the client cancelled"), fetch: (CANCELLED, "^fetch: the client cancelled")})
        self.one.send(data(1, 0, 256))
        self.expect({request: (OK, "") for request in (1, first, last)})

    def test_all_that_wait_for_one_result_can_be_cancelled_in_any_order(self):
        for seed in range(20):
            half_sent(self.one, self.one.next_id, keep=True, bytes_=256)
            begun = self.one.next_id - 1
            waiting = [self.one.submit(run("silu", result(begun))) for _ in range(8)]
            gone = random.Random(seed).sample(waiting, 1 + seed % 8)
            self.cancel(*gone)
            self.expect({request: (CANCELLED, "") for request in gone})
            self.one.send(data(begun, 0, 256))
            self.expect({request: (OK, "") for request in [begun] + waiting if request not in gone})

    def test_one_that_is_queued_ends_at_once_and_its_dependents_are_told(self):
        """Hardening: sessions-cancel-queued"""
        running = self.begin_slow()
        queued = self.one.submit(kept(small()))
        dependent = self.one.submit(kept(run("silu", result(queued))))
        third = self.one.submit(run("silu", result(dependent)))
        generated = self.one.submit(pb.Request(generate=pb.Generate(op="silu", dtype=9)))
        self.cancel(queued, generated)
        self.expect({
            queued: (CANCELLED, "^silu: the client cancelled the request"),
            dependent: (ABORTED, f"request {queued},"),
            third: (ABORTED, f"request {dependent},"),
            generated: (CANCELLED, "^generate: the client cancelled the request"),
        })
        self.cancel(running)
        self.expect({running: (CANCELLED, "")})
        self.expect_silence()
        self.expect_nothing_left()

    def test_those_behind_a_cancelled_one_keep_their_place(self):
        running = self.begin_slow()
        queued = [self.one.submit(small()) for _ in range(9)]
        self.cancel(queued[0], queued[4], queued[8], running)
        left = [request for request in queued if request not in (queued[0], queued[4], queued[8])]
        order = [self.one.read_reply()[0] for _ in range(10)]
        self.assertEqual([request for request in order if request in left], left)

    def test_a_kernel_that_runs_is_stopped(self):
        """Hardening: sessions-cancel-running"""
        for _ in range(50):
            running = self.begin_slow(keep=True)
            time.sleep(0.05)
            dependent = self.one.submit(run("silu", result(running)))
            self.cancel(running)
            replies = self.ended(2)
            self.assertEqual((replies[running][0], replies[dependent][0]), (CANCELLED, ABORTED))
            if "while it ran" in replies[running][1]:
                break  # else the thread hadn't begun it yet
        else:
            self.fail(replies[running][1])
        self.expect_silence()
        self.expect_nothing_left()

    def test_unknown_finished_future_and_twice_are_nothing(self):
        """Hardening: sessions-cancel-unknown, sessions-cancel-finished"""
        finished = self.one.submit(kept(small()))
        self.expect({finished: (OK, "")})
        self.cancel(finished, finished, 0, 999, 2**64 - 1)
        self.expect_silence()
        self.assertEqual(self.one.call(run("silu", result(finished)))[0].status, OK)  # what it kept is still there
        running = self.begin_slow()
        queued = self.one.submit(small())
        self.cancel(queued, queued, running, running, queued, running)
        self.expect({queued: (CANCELLED, ""), running: (CANCELLED, "")})
        self.expect_silence()

    def test_another_sessions_ids_are_nothing(self):
        """Hardening: sessions-cancel-other"""
        running = self.begin_slow()
        queued = self.one.submit(small())
        other = self.client(features=["cancel"])
        self.cancel(running, queued, client=other)
        self.expect_silence(other)
        self.expect_silence()
        self.cancel(running)
        self.expect({running: (CANCELLED, ""), queued: (OK, "")})

    def test_without_the_feature_the_frame_is_ignored(self):
        plain = self.client()
        self.assertEqual(list(plain.hello.features), [])
        half_sent(plain, 1, bytes_=256)
        self.cancel(1, client=plain)
        self.expect_silence(plain)
        plain.send(data(1, 0, 256))
        self.assertEqual(plain.read_reply()[1].status, OK)

    def test_a_free_that_waits_is_not_cancelled(self):
        half_sent(self.one, 1, keep=True, bytes_=256)
        free = self.one.submit(pb.Request(free=pb.Free(tensors=[result(1)])))
        self.cancel(free)
        self.expect_silence()
        self.one.send(data(1, 0, 256))
        self.expect({1: (OK, ""), free: (OK, "")})
        self.expect_nothing_left()

    def test_who_has_as_much_in_flight_as_it_may_can_cancel(self):
        running = self.begin_slow()
        waiting = [self.one.submit(small()) for _ in range(self.one.hello.limits.in_flight - 1)]
        self.cancel(*waiting, running)
        self.expect({request: (CANCELLED, "") for request in [running] + waiting})
        self.expect_nothing_left()

    def test_every_request_has_one_reply_however_it_is_cancelled(self):
        """Hardening: promise-one-reply"""
        dice = random.Random(26)
        for _ in range(30):
            running = self.one.submit(slow(), f32(1)) if dice.random() < 0.5 else None  # None: they run on the loop
            requests, frames = [], []
            for _ in range(60):
                number = self.one.next_id
                self.one.next_id += 1
                source = result(dice.choice(requests)) if requests and dice.random() < 0.5 else inline([2], f32(1, 2))
                frames.append(frame(REQUEST, number, kept(run("silu", source)).SerializeToString()))
                requests.append(number)
                while dice.random() < 0.4:
                    frames.append(frame(CANCEL, dice.choice(requests)))
            if running is not None:
                frames.append(frame(CANCEL, running))
                requests.append(running)
            self.one.send(b"".join(frames))
            replies = self.ended(len(requests))
            self.assertEqual(sorted(replies), sorted(requests))
            self.assertLessEqual({status for status, _ in replies.values()}, {OK, CANCELLED, ABORTED})
            there = [result(number) for number in requests if replies[number][0] == OK]
            free = self.one.submit(pb.Request(free=pb.Free(tensors=there)))
            self.expect({free: (OK, "")})
        self.expect_silence()
        self.expect_nothing_left()

    # ---- Connections that end

    def test_a_connection_that_ends_takes_its_work_with_it(self):
        leaving = self.client()
        half_sent(leaving, 1, keep=True)
        leaving.submit(slow(), f32(1))
        for _ in range(20):
            leaving.submit(slow(), f32(1))
            leaving.submit(run("silu", result(1)))
        leaving.ping()
        leaving.close()
        self.expect_nothing_left()
        self.assertEqual(self.one.call(small())[0].status, OK)

    # ---- The clients

    def python_client(self):
        client = opd.Client(self.address)
        self.addCleanup(client.close)
        return client

    @staticmethod
    def python_operands():
        return [opd.Tensor(f32(1), "f32", shape, strides=[0, 0]) for shape in ([SIDE, DEPTH], [DEPTH, SIDE])]

    def python_slow(self, client):
        return client.submit("matmul", *self.python_operands(), priority=["native"])

    def test_the_python_client_cancels(self):
        client = self.python_client()
        running = self.python_slow(client)
        client.cancel(running)
        client.cancel(running)
        with self.assertRaises(opd.Cancelled):
            running.result()
        self.expect_nothing_left()

    def test_a_python_run_that_gives_up_is_cancelled(self):
        client = self.python_client()
        client.timeout = 0.2
        with self.assertRaises(opd.DeadlineExceeded):
            client.run("matmul", *self.python_operands(), priority=["native"])
        self.expect_nothing_left()

    def test_ctrl_c_in_opctl_run_ends_the_kernel(self):
        shape = f"randn:f32[{SIDE},{SIDE}]"
        opctl = subprocess.Popen([OPCTL, "--connect", self.address, "run", "matmul", shape, shape, "--priority", "native"],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(opctl.wait)
        self.addCleanup(opctl.kill)  # first: it would wait for all of the kernel
        other = self.client()
        wait_until(lambda: opctl.poll() is not None or other.info().memory_bytes >= 3 * 4 * SIDE * SIDE, "the operands and the result are there")
        self.assertIsNone(opctl.poll())
        opctl.send_signal(signal.SIGINT)
        self.assertNotEqual(opctl.wait(PATIENCE), 0)
        self.expect_nothing_left()


if __name__ == "__main__":
    unittest.main()
