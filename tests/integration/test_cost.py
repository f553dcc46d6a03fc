#!/usr/bin/python3
"""What one client can cost the others: memory that it makes the daemon hold, and requests that wait for each other.

Each test's name is the promise that it checks.
"""
import os
import struct
import time
import unittest

from harness import (ABORT, ABORTED, CANCELLED, CHUNKED, DATA, HELLO, HELLO_REPLY, OK, REQUEST, RESOURCE_EXHAUSTED, Client, Closed, Daemon,
                     DaemonCase, f32, frame, hello_envelope, inline, pb, rms_norm, run, tensor)

FIELD = b"\x78\x00"  # a field of Run that nobody knows, in two bytes: it takes about a hundred, decoded


def fat(request, fields):
    """The envelope of a run request with so many unknown fields."""
    inner = request.run.SerializeToString() + FIELD * fields
    length = len(inner)
    head = b"\x0a"
    while length > 0x7F:
        head += bytes([length & 0x7F | 0x80])
        length >>= 7
    return head + bytes([length]) + inner


def result(request, output=0):
    return pb.Tensor(result=pb.ResultRef(request=request, output=output))


def kept(request):
    request.run.outputs.add(keep=True, no_copy=True)
    return request


def half_sent(client, request_id, keep=False, bytes_=1 << 20):
    """A silu of zeros whose payload is still to come, in DATA frames."""
    request = run("silu", tensor([bytes_ // 4]))
    request.run.outputs.add(keep=keep, no_copy=True)
    client.send(frame(REQUEST, request_id, request.SerializeToString(), flags=CHUNKED, payload_bytes=bytes_))
    client.next_id = request_id + 1


def data(request_id, offset, size):
    return frame(DATA, request_id, struct.pack("<Q", offset), bytes(size))


class Reply(DaemonCase):
    config = "limits: {memory: 1 GiB, session: 256 MiB, request: 256 MiB, envelope: 2 MiB}\n"

    def fat_run(self, client, fields):
        """A small run whose envelope has so many unknown fields."""
        request, payload, _ = rms_norm()
        request.run.explain = True
        request_id = client.next_id
        client.next_id += 1
        client.send(frame(REQUEST, request_id, fat(request, fields), payload))
        return client.read_reply(request_id)[1]

    @unittest.skipIf("thread" in os.environ.get("OPD_TEST_SANITIZED", ""), "arithmetic of one thread, and a minute of ThreadSanitizer's")
    def test_a_reply_that_finds_its_memory_used_up_is_an_error_and_nothing_else(self):
        """A request has 64 MiB, which eight hundred thousand fields fill: each attempt costs."""
        client = self.client()
        low, high = 700000, 900000
        self.assertEqual(self.fat_run(client, low).status, OK)
        self.assertEqual(self.fat_run(client, high).status, RESOURCE_EXHAUSTED)
        while high - low > 8:
            middle = (low + high) // 2
            if self.fat_run(client, middle).status == OK:
                low = middle
            else:
                high = middle
        texts = set()
        for fields in range(high, high + 60, 4):
            reply = self.fat_run(client, fields)
            self.assertEqual(reply.status, RESOURCE_EXHAUSTED)
            texts.add(reply.message)
        self.assertIn("the reply is too large to be encoded", texts)
        self.assertGreater(len(texts), 2)  # and what comes before a reply fails as well
        self.assertEqual(self.fat_run(client, 10).status, OK)


class Memory(DaemonCase):
    config = "limits: {memory: 1 GiB, session: 64 MiB, request: 64 MiB, envelope: 2 MiB}\n"

    def test_what_a_decoded_envelope_takes_while_it_waits_is_charged(self):
        client = self.client()
        half_sent(client, 1, keep=True)
        envelope = fat(run("silu", result(1)), 33000)  # about 3.3 MB each, decoded on a lane
        for request_id in range(2, 102):
            client.send(frame(REQUEST, request_id, envelope))
        client.next_id = 102
        refused = 0
        other = self.client()
        self.assertGreater(other.info().memory_bytes, 32 << 20)
        client.send(frame(ABORT, 1))
        for _ in range(101):
            _, reply, _ = client.read_reply()
            self.assertIn(reply.status, (ABORTED, CANCELLED, RESOURCE_EXHAUSTED))
            refused += reply.status == RESOURCE_EXHAUSTED
        self.assertGreater(refused, 50)
        self.assertLess(other.info().memory_bytes, 1 << 20)


class Waiting(DaemonCase):
    config = "limits: {in_flight: 1024}\n"

    def test_more_dependents_of_a_failure_than_are_remembered(self):
        client = self.client()
        half_sent(client, 1, keep=True)
        batch = b"".join(frame(REQUEST, i, kept(run("silu", result(1))).SerializeToString()) for i in range(2, 1400))
        client.send(batch + frame(ABORT, 1))
        seen = {}
        for _ in range(1399):
            request_id, reply, _ = client.read_reply()
            seen[request_id] = reply.status
        self.assertEqual(seen.pop(1), CANCELLED)
        self.assertEqual(set(seen.values()), {ABORTED})

    def test_a_long_chain_of_dependents_fails_as_a_whole(self):
        client = self.client()
        half_sent(client, 1, keep=True)
        batch = b"".join(frame(REQUEST, i, kept(run("silu", result(i - 1))).SerializeToString()) for i in range(2, 1000))
        client.send(batch + frame(ABORT, 1))
        replies = [client.read_reply() for i in range(1, 1000)]
        self.assertEqual({request_id: reply.status for request_id, reply, _ in replies}, {1: CANCELLED, **{i: ABORTED for i in range(2, 1000)}})

    def test_a_long_chain_ends_with_its_connection(self):
        for _ in range(3):
            client = Client(self.address)
            half_sent(client, 1, keep=True)
            client.send(b"".join(frame(REQUEST, i, kept(run("silu", result(i - 1))).SerializeToString()) for i in range(2, 900)))
            client.close()
        self.assertLess(self.client().info().memory_bytes, 1 << 20)


class InFlight(DaemonCase):
    config = "limits: {in_flight: 8, stall: 2 s}\n"

    def test_uploads_side_by_side_over_the_limit_are_finished(self):
        """Were reading stopped at the limit, the DATA that would lower it could never come."""
        client = self.client()
        for i in range(1, 13):
            half_sent(client, i, bytes_=1 << 16)
        for offset in (0, 1 << 15):
            for i in range(1, 13):
                client.send(data(i, offset, 1 << 15))
        done = {}
        while len(done) < 12:
            request_id, reply, _ = client.read_reply()
            done[request_id] = reply.status
        self.assertTrue(all(status in (OK, RESOURCE_EXHAUSTED) for status in done.values()), done)
        self.assertEqual([done[i] for i in range(1, 9)], [OK] * 8)

    def test_requests_that_wait_for_an_upload_do_not_hold_it_up(self):
        client = self.client()
        half_sent(client, 1, keep=True, bytes_=1 << 16)
        for i in range(2, 13):
            client.submit(run("silu", result(1)), request_id=i)
        client.send(data(1, 0, 1 << 16))
        statuses = {}
        while len(statuses) < 12:
            request_id, reply, _ = client.read_reply()
            statuses[request_id] = reply.status
        self.assertEqual(statuses[1], OK)
        self.assertEqual([statuses[i] for i in range(2, 9)], [OK] * 7)

    def test_a_session_at_the_limit_that_sends_nothing_more_is_closed(self):
        client = self.client()
        for i in range(1, 9):
            half_sent(client, i)
        client.expect_end()
        self.daemon.wait_log("a half-sent request stalled")


class Kept(DaemonCase):
    config = "limits: {kept: 5}\n"

    def test_a_generation_that_cannot_keep_all_keeps_nothing(self):
        client = self.client()
        request = pb.Request(generate=pb.Generate(op="linear", dtype=9, keep=True))
        reply, _ = client.ask(request)
        each = sum(argument.HasField("tensor") for argument in reply.generated.args)
        self.assertIn(each, (2, 3, 4))
        for _ in range(5 // each - 1):
            client.ask(request)
        for _ in range(3):
            self.assertEqual(client.call(request)[0].status, RESOURCE_EXHAUSTED)
        for _ in range(5 % each):
            client.ask(pb.Request(generate=pb.Generate(op="silu", dtype=9, keep=True)))
        self.assertEqual(client.call(pb.Request(generate=pb.Generate(op="silu", dtype=9, keep=True)))[0].status, RESOURCE_EXHAUSTED)


class Compute(DaemonCase):
    flags = ("--threads", "2")

    def test_a_view_is_no_larger_than_what_the_session_may_have(self):
        client = self.client()
        one = inline([1, 1 << 40], f32(1.0), strides=[0, 0])
        reply, _ = client.call(run("linear", one, one))
        self.assertEqual(reply.status, RESOURCE_EXHAUSTED, reply.message)
        self.assertIn("linear: x is a view of 4398046511104 bytes", reply.message)

    def test_a_drain_ends_within_its_limit_whatever_a_kernel_does(self):
        daemon = Daemon("--threads", "2", config="limits: {drain: 1 s}\n")
        try:
            with Client(daemon.address) as client:
                rows = inline([1 << 14, 1 << 14], f32(1.0), strides=[0, 0])  # hours of native's work from four bytes
                client.submit(run("linear", rows, rows, run_priority=["native"]))
                client.ping()
                time.sleep(0.2)
                daemon.signal(15)
                self.assertEqual(daemon.wait(), 1)
            self.assertIn("ended before all work was done", daemon.log_text())
        finally:
            daemon.stop(code=None)


class Hello(DaemonCase):
    def test_a_refused_hello_is_answered_once(self):
        with Client(self.address, hello=False) as client:
            client.send(frame(HELLO, envelope=hello_envelope(version_min=7, version_max=9)) * 500)
            answers = 0
            try:
                while True:
                    answers += client.read_frame()[0] == HELLO_REPLY
            except Closed:
                pass
            self.assertEqual(answers, 1)


if __name__ == "__main__":
    unittest.main()
