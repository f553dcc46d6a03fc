#!/usr/bin/python3
"""What must not break the daemon: bad frames, envelopes, names, shapes. Each test's name is one line of bad input.

After every test a new client pings, runs an op and gets the right numbers, and the daemon is still the same process.
"""
import fcntl
import os
import random
import signal
import socket
import struct
import time
import unittest

import harness
from harness import (ABORT, CANCEL, CHUNKED, DATA, GOAWAY, HELLO, HELLO_REPLY, INVALID_ARGUMENT, NOT_FOUND, OK, REPLY, REQUEST,
                     RESOURCE_EXHAUSTED, UNIMPLEMENTED, Client, DaemonCase, check_healthy, f32, frame, hello_envelope, inline, pb, rms_norm, run,
                     tensor, unpack_f32, wait_until)


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number, wire_type, data=b""):
    """One protobuf field; wire type 2 gets its length."""
    key = varint(number << 3 | wire_type)
    return key + (varint(len(data)) + data if wire_type == 2 else data)


class Hardening(DaemonCase):
    def expect_refused(self, data, words="", hello=True, address=None):
        """Sends bytes; the connection must end, with INVALID_ARGUMENT that has the words."""
        client = Client(address or self.address, hello=hello)
        self.addCleanup(client.close)
        try:
            client.send(data)
        except (BrokenPipeError, ConnectionResetError):
            pass
        said = client.expect_end()
        self.assertIsNotNone(said, "the daemon closed without a word")
        self.assertEqual(said[0], INVALID_ARGUMENT, said)
        self.assertIn(words, said[1])

    def expect_status(self, status, request, payload=b"", words="", client=None):
        """A request that is answered with that status; the session goes on."""
        own = client is None
        client = client or self.client()
        reply, _ = client.call(request, payload)
        self.assertEqual(reply.status, status, reply)
        self.assertTrue(status == OK or reply.message)
        self.assertIn(words, reply.message)
        client.ping()
        if own:
            client.close()
        return reply.message

    def expect_envelope(self, envelope, statuses=(INVALID_ARGUMENT,), payload=b""):
        """Raw bytes as a request's envelope."""
        client = self.client()
        client.send(frame(REQUEST, 1, envelope, payload))
        client.next_id = 2
        _, reply, _ = client.read_reply(1)
        self.assertIn(reply.status, statuses, reply)
        client.ping()
        client.close()
        return reply


class Framing(Hardening):
    flags = ("--listen", "tcp://127.0.0.1:0")

    def test_envelope_lengths_at_and_over_the_limit(self):
        """Hardening: framing-lengths"""
        limit = self.client().hello.limits.envelope_bytes
        client = self.client()
        request = pb.Request(ping=pb.Empty()).SerializeToString()
        envelope = request + field(1000, 2, b"x" * (limit - len(request) - 6))
        self.assertLessEqual(abs(limit - len(envelope)), 2)
        client.send(frame(REQUEST, 1, envelope))
        self.assertIn(client.read_reply(1)[1].status, (OK, RESOURCE_EXHAUSTED))
        for length in (limit + 1, 2**31 - 1, 2**32 - 1):
            with self.subTest(length=length):
                self.expect_refused(frame(REQUEST, 1, envelope_bytes=length), "envelope")

    def test_payload_lengths_over_the_limit(self):
        """Hardening: framing-lengths"""
        for length in (2**63, 2**64 - 1, 2**63 - 1, 2**40 + 1):
            with self.subTest(length=length):
                self.expect_refused(frame(REQUEST, 1, payload_bytes=length), "payload")

    def test_payload_over_the_request_limit_is_resource_exhausted_before_it_is_sent(self):
        """Hardening: promise-memory"""
        client = self.client()
        request, _, _ = rms_norm()
        limit = client.hello.limits.payload_bytes
        client.send(frame(REQUEST, 1, request.SerializeToString(), flags=CHUNKED, payload_bytes=min(limit + 1, 2**40)))
        client.next_id = 2
        _, reply, _ = client.read_reply(1)
        self.assertEqual(reply.status, RESOURCE_EXHAUSTED, reply)
        self.assertIn(str(limit), reply.message)
        client.ping()

    def test_empty_envelope_is_a_request_without_a_body(self):
        self.expect_envelope(b"", (INVALID_ARGUMENT, UNIMPLEMENTED))

    def test_eleven_byte_varint(self):
        """Hardening: framing-varint"""
        self.expect_envelope(b"\x0a" + b"\x80" * 10 + b"\x01")
        self.expect_envelope(b"\xff" * 10 + b"\x01\x00")

    def test_truncation_at_every_byte(self):
        """Hardening: framing-truncation"""
        request, payload, _ = rms_norm()
        data = frame(HELLO, envelope=hello_envelope()) + frame(REQUEST, 1, request.SerializeToString(), payload)
        for length in range(len(data)):
            with Client(self.address, hello=False) as client:
                client.send(data[:length])
                client.sock.shutdown(socket.SHUT_WR)
                client.expect_end()

    def test_envelope_truncated_at_every_byte(self):
        """Hardening: framing-truncation"""
        request, payload, _ = rms_norm()
        envelope = request.SerializeToString()
        client = self.client()
        for length in range(len(envelope)):
            client.send(frame(REQUEST, length + 1, envelope[:length], payload))
            _, reply, _ = client.read_reply(length + 1)
            self.assertNotEqual(reply.status, OK, length)
            self.assertTrue(reply.message)
        client.next_id = len(envelope) + 1
        client.ping()

    def test_one_byte_at_a_time_of_a_hello_that_never_ends(self):
        """Hardening: framing-slow"""
        client = self.client(hello=False)
        for byte in frame(HELLO, envelope=hello_envelope())[:20]:
            client.send(bytes([byte]))
            check_healthy(self, self.daemon)

    def test_floods_of_unknown_fields(self):
        """Hardening: framing-unknown-fields"""
        ping = pb.Request(ping=pb.Empty()).SerializeToString()
        flood = b"".join(field(1000 + i % 50000, 0, b"\x01") for i in range(150000))
        reply = self.expect_envelope(ping + flood, (OK, RESOURCE_EXHAUSTED, INVALID_ARGUMENT))
        if reply.status != OK:
            self.assertTrue(reply.message)
        self.expect_envelope(ping + field(1000, 2, b"y" * 1000), (OK,))

    def test_deep_nesting(self):
        """Hardening: framing-nesting"""
        data = b""
        for _ in range(5000):
            data = field(1, 2, data)
        self.expect_envelope(data)
        self.expect_envelope(field(1, 3) * 20000)

    def test_wrong_wire_types(self):
        """Hardening: framing-wire-types"""
        for number in range(1, 16):
            for wire_type, data in ((0, b"\x05"), (1, b"x" * 8), (5, b"x" * 4), (3, b""), (4, b""), (6, b""), (7, b"")):
                self.expect_envelope(field(number, wire_type, data), (INVALID_ARGUMENT, UNIMPLEMENTED))

    def test_bad_utf8_and_embedded_nul(self):
        """Hardening: framing-utf8, framing-nul"""
        for name in (b"\xff\xfe", b"rms\0norm", b"\xc0\x80", b"\xed\xa0\x80"):
            self.expect_envelope(field(1, 2, field(1, 2, name)))
            self.expect_envelope(field(8, 2, field(1, 2, name)))

    def test_http_to_the_plain_port(self):
        """Hardening: framing-http"""
        self.expect_refused(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "HTTP", hello=False)
        self.expect_refused(b"POST /v1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", "HTTP", hello=False)

    def test_the_last_words_arrive_over_tcp_although_the_client_is_still_sending(self):
        address = self.daemon.tcp_addresses()[0]
        for _ in range(20):
            self.expect_refused(b"POST /v1 HTTP/1.1\r\n" + b"x" * 200000, "HTTP", hello=False, address=address)
            self.expect_refused(frame(0, 1) + b"x" * 200000, "type 0", address=address)

    def test_http2_and_ssh_to_the_plain_port(self):
        """Hardening: framing-http"""
        self.expect_refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 32, "HTTP/2", hello=False)
        self.expect_refused(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n".ljust(40), "SSH", hello=False)

    def test_tls_to_the_plain_port(self):
        """Hardening: framing-tls-to-plain"""
        self.expect_refused(bytes.fromhex("16030100c8010000c40303") + bytes(200), "TLS", hello=False)

    def test_more_than_a_few_kb_before_hello(self):
        """Hardening: framing-preauth"""
        self.expect_refused(frame(HELLO, envelope=b"x" * 5000), "4096", hello=False)
        self.expect_refused(frame(HELLO, envelope_bytes=2**32 - 1), hello=False)
        self.expect_refused(frame(HELLO, envelope=hello_envelope(), payload=b"x" * 64), "payload", hello=False)

    def test_every_header_field_wrong(self):
        ping = pb.Request(ping=pb.Empty()).SerializeToString()
        for words, data in [
            ("OPD1", frame(REQUEST, 1, ping, magic=b"OPD2")),
            ("version", frame(REQUEST, 1, ping, version=2)),
            ("type 0", frame(0, 1, ping)),
            ("type 9", frame(9, 1, ping)),
            ("type 255", frame(255, 1, ping)),
            ("flags", frame(REQUEST, 1, ping, flags=2)),
            ("flags", frame(REQUEST, 1, ping, flags=0xFFFF)),
            ("reserved", frame(REQUEST, 1, ping, reserved=1)),
            ("chunked", frame(REQUEST, 1, ping, flags=CHUNKED)),
        ]:
            with self.subTest(words=words):
                self.expect_refused(data, words)

    def test_frames_that_a_client_may_not_send(self):
        for kind in (HELLO_REPLY, REPLY, GOAWAY, HELLO):
            with self.subTest(kind=kind):
                self.expect_refused(frame(kind, 0 if kind != REPLY else 1, hello_envelope()))

    def test_anything_before_hello(self):
        for kind, request_id in ((REQUEST, 1), (ABORT, 1), (GOAWAY, 0)):
            with self.subTest(kind=kind):
                self.expect_refused(frame(kind, request_id), hello=False)

    def test_hello_that_cannot_be_decoded_or_agreed_to(self):
        for envelope in (b"\xff\xff\xff", b"", hello_envelope(version_min=7, version_max=9), hello_envelope(version_min=2, version_max=1)):
            client = Client(self.address, hello=False)
            self.addCleanup(client.close)
            client.send(frame(HELLO, envelope=envelope))
            said = client.expect_end()
            self.assertIsNotNone(said)
            self.assertNotEqual(said[0], OK)
            self.assertTrue(said[1])

    def test_repeated_and_lower_request_ids(self):
        """Hardening: sessions-same-id"""
        client = self.client()
        ping = pb.Request(ping=pb.Empty())
        self.assertEqual(client.call(ping, request_id=7)[0].status, OK)
        for request_id in (7, 3):
            reply, _ = client.call(ping, request_id=request_id)
            self.assertEqual(reply.status, INVALID_ARGUMENT, reply)
            self.assertIn(str(request_id), reply.message)
        self.assertEqual(client.call(ping, request_id=8)[0].status, OK)
        self.assertEqual(client.call(ping, request_id=2**64 - 1)[0].status, OK)
        self.assertEqual(client.call(ping, request_id=2**64 - 1)[0].status, INVALID_ARGUMENT)

    def test_repeated_id_with_a_payload_skips_the_payload(self):
        """Hardening: sessions-same-id"""
        client = self.client()
        request, payload, _ = rms_norm()
        client.ask(request, payload)
        reply, _ = client.call(request, payload, request_id=1)
        self.assertEqual(reply.status, INVALID_ARGUMENT)
        client.ask(request, payload)

    def test_cancel_and_abort_of_unknown_finished_and_future_requests(self):
        client = self.client()
        client.ping()
        for kind in (CANCEL, ABORT):
            for request_id in (1, 999, 2**64 - 1):
                client.send(frame(kind, request_id))
        client.ping()

    def test_data_of_an_id_that_was_never_sent(self):
        self.expect_refused(frame(DATA, 5, struct.pack("<Q", 0), b"x"))

    def start_chunked(self, length):
        client = self.client()
        request = run("relu", tensor([length // 4]))
        client.send(frame(REQUEST, 1, request.SerializeToString(), flags=CHUNKED, payload_bytes=length))
        client.next_id = 2
        return client

    def test_chunks_with_gaps_overlaps_and_too_many_bytes(self):
        for offsets in ([64], [0, 32], [0, 128], [2**64 - 1], [0, 64, 128, 192, 256]):
            with self.subTest(offsets=offsets):
                client = self.start_chunked(256)
                for offset in offsets:
                    client.send(frame(DATA, 1, struct.pack("<Q", offset), bytes(64)))
                _, reply, _ = client.read_reply(1)
                if offsets[-1] == 256:
                    self.assertEqual(reply.status, OK)  # it was whole before the piece too many
                else:
                    self.assertEqual(reply.status, INVALID_ARGUMENT, reply)
                client.ping()

    def test_a_chunk_longer_than_what_is_left(self):
        client = self.start_chunked(256)
        client.send(frame(DATA, 1, struct.pack("<Q", 0), bytes(1024)))
        self.assertEqual(client.read_reply(1)[1].status, INVALID_ARGUMENT)
        client.ping()

    def test_a_chunk_longer_than_agreed(self):
        client = self.start_chunked(64 << 20)
        length = client.hello.chunk_bytes + 64
        client.send(frame(DATA, 1, struct.pack("<Q", 0), bytes(length)))
        self.assertEqual(self.end_or_reply(client, 1), INVALID_ARGUMENT)

    def end_or_reply(self, client, request_id):
        try:
            return client.read_reply(request_id)[1].status
        except harness.Closed as end:
            return end.goaway.status if end.goaway else None

    def test_an_abandoned_upload_frees_its_memory(self):
        """Hardening: sessions-mid-upload"""
        client = self.start_chunked(16 << 20)
        client.send(frame(DATA, 1, struct.pack("<Q", 0), bytes(65536)))
        other = self.client()
        client.send(frame(ABORT, 1))
        self.assertEqual(client.read_reply(1)[1].status, harness.CANCELLED)
        wait_until(lambda: other.info().memory_bytes == 0)
        client = self.start_chunked(16 << 20)
        client.close()
        wait_until(lambda: other.info().memory_bytes == 0)

    def test_random_bytes(self):
        """Hardening: promise-no-harm"""
        chance = random.Random(3)
        for _ in range(200):
            with Client(self.address, hello=False) as client:
                try:
                    client.send(chance.randbytes(chance.randrange(1, 300)))
                    client.sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass
                client.expect_end()

    def test_flipped_bits_in_a_good_request(self):
        """Hardening: promise-no-harm"""
        chance = random.Random(5)
        request, payload, _ = rms_norm()
        good = frame(HELLO, envelope=hello_envelope()) + frame(REQUEST, 1, request.SerializeToString(), payload)
        for _ in range(30000 if harness.LONG else 2000):
            data = bytearray(good)
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            with Client(self.address, hello=False) as client:
                try:
                    client.send(bytes(data))
                    client.sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass
                client.expect_end()


class Memory(Hardening):
    """Floods that must not leave anything behind. What a sanitizer would keep of freed memory is kept small, so that growth is the daemon's."""

    environment = {"ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":quarantine_size_mb=1:thread_local_quarantine_size_kb=16"}

    def settled_memory(self):
        check_healthy(self, self.daemon)
        return self.daemon.memory_kib()

    def test_a_million_empty_frames(self):
        """Hardening: framing-empty-frames"""
        count = 1000000
        before = self.settled_memory()
        client = self.client()
        batch = 10000
        ping = pb.Request(ping=pb.Empty()).SerializeToString()
        for begin in range(0, count, batch):
            client.send(b"".join(frame(CANCEL if i % 2 else ABORT, begin + i + 1) for i in range(batch)))
        client.next_id = count + 1
        client.ping()
        for begin in range(0, count // 20, 500):
            client.send(b"".join(frame(REQUEST, client.next_id + i, ping) for i in range(500)))
            for _ in range(500):
                self.assertEqual(client.read_reply()[1].status, OK)
            client.next_id += 500
        client.close()
        self.assertLess(self.settled_memory() - before, 32 << 10)

    def test_a_slow_drip_does_not_grow_memory(self):
        before = self.settled_memory()
        client = self.client()
        request, _, _ = rms_norm()
        client.send(frame(REQUEST, 1, request.SerializeToString(), payload_bytes=1 << 20)[:-1])
        for _ in range(2000):
            client.send(b"x")
        self.assertLess(self.daemon.memory_kib() - before, 32 << 10)

    def test_answers_that_nobody_reads_do_not_grow_memory(self):
        """A few bytes ask for a megabyte each: no more of them are begun than may wait for their reader, and all are answered once there is one."""
        client, other = self.client(), self.client()
        one = pb.Request(upload=pb.Upload(tensor=inline([1], b"x", dtype=pb.U8)))
        for _ in range(8):
            for _ in range(512):
                client.submit(one)
            for _ in range(512):
                self.assertEqual(client.read_reply()[1].status, OK)
        wanted = pb.Request(list_tensors=pb.ListTensors())
        self.assertEqual(len(client.ask(wanted)[0].tensors.tensors), 4096)
        before = self.settled_memory()
        count = 300
        client.send(b"".join(frame(REQUEST, client.next_id + i, wanted.SerializeToString()) for i in range(count)))
        client.next_id += count
        mine = lambda: [state for state in other.ask(pb.Request(list_sessions=pb.ListSessions()))[0].sessions.sessions if state.session == client.hello.session][0]
        wait_until(lambda: mine().in_flight > 1, "some are answered")
        self.assertLess(mine().in_flight, count)
        self.assertLess(self.settled_memory() - before, 64 << 10)
        for _ in range(count):
            self.assertEqual(len(client.read_reply()[1].tensors.tensors), 4096)
        client.ping()

    def test_many_unique_names_do_not_grow_memory(self):
        """Hardening: names-unique"""
        client = self.client()
        count = 100000
        client.call(run("warm_up"))
        before = self.daemon.memory_kib()
        for begin in range(0, count, 100):
            for index in range(begin, begin + 100):
                client.submit(run("op_%d" % index, run_priority=["provider_%d" % index]))
            for _ in range(100):
                self.assertEqual(client.read_reply()[1].status, NOT_FOUND)
        self.assertLess(self.daemon.memory_kib() - before, 16 << 10)


class Names(Hardening):
    def test_empty_op_name(self):
        """Hardening: names-empty"""
        self.expect_status(NOT_FOUND, run(""))

    def test_names_with_spaces_newlines_and_escape_codes(self):
        """Hardening: names-spaces, names-escapes"""
        for name in (" ", "rms norm", "rms_norm ", "a\nb", "\x1b[31mred", "rms_norm\u202e", "RMS_NORM", "rms-norm"):
            reply, _ = self.client().call(run(name))
            self.assertIn(reply.status, (NOT_FOUND, INVALID_ARGUMENT), reply)

    def test_name_of_a_megabyte(self):
        """Hardening: names-long"""
        request = run("x" * ((1 << 20) - 64))
        self.expect_status(INVALID_ARGUMENT, request)
        self.expect_status(INVALID_ARGUMENT, run("x" * 129))
        self.expect_status(NOT_FOUND, run("x" * 128))

    def test_unknown_providers(self):
        """Hardening: sessions-list-unknown"""
        self.expect_status(NOT_FOUND, run("relu", inline([1], f32(1)), run_priority=["no_such"]), words="no_such")
        request = pb.Request(push_priority=pb.PriorityMap())
        request.push_priority.entries.add(op="relu").list.names.append("no_such")
        self.expect_status(NOT_FOUND, request, words="no_such")

    def test_priority_lists_empty_repeated_and_far_too_long(self):
        """Hardening: sessions-list-empty, sessions-list-long"""
        request = run("relu", inline([1], f32(-1)))
        request.run.priority.SetInParent()
        self.expect_status(OK, request)
        self.expect_status(INVALID_ARGUMENT, run("relu", inline([1], f32(-1)), run_priority=["native"] * 10000))
        client = self.client()
        for _ in range(64):
            client.ask(pb.Request(push_priority=pb.PriorityMap()))
        self.assertEqual(client.call(pb.Request(push_priority=pb.PriorityMap()))[0].status, RESOURCE_EXHAUSTED)

    def test_unknown_devices(self):
        for device in ("quantum", "cpu:7", "cpu:-1", "cpu:99999999999999999999", ":", "cuda:", "x" * 200):
            reply, _ = self.client().call(run("relu", inline([1], f32(1)), run_device=device))
            self.assertNotEqual(reply.status, OK, device)
            self.assertTrue(reply.message)


INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class Shapes(Hardening):
    def test_bad_dimensions(self):
        """Hardening: shapes-negative, shapes-wrap"""
        for shape in ([-1], [INT64_MIN], [2, -1, 2], [INT64_MAX], [2**32, 2**32], [2**62, 2], [2**61], [3037000500, 3037000500], [0, INT64_MAX, INT64_MAX]):
            with self.subTest(shape=shape):
                self.expect_status(INVALID_ARGUMENT, run("relu", tensor(shape, size=64)), bytes(64))
                self.expect_status(INVALID_ARGUMENT, run("relu", inline(shape, bytes(64))))

    def test_products_that_wrap_to_the_payload_size(self):
        """Hardening: shapes-wrap"""
        for shape, dtype in (([2**62 + 4], 9), ([2**63 - 1, 2], 2), ([2**31, 2**31, 4, 4], 9), ([2**32 + 1, 2**32], 9)):
            self.expect_status(INVALID_ARGUMENT, run("relu", tensor(shape, size=16, dtype=dtype)), bytes(16))

    def test_dimension_zero_is_an_empty_tensor(self):
        """Hardening: shapes-zero"""
        client = self.client()
        for shape in ([0], [0, 5], [5, 0], [0, 1 << 40]):
            reply, data = client.ask(run("relu", pb.Tensor(dtype=9, shape=shape, inline=b"")))
            self.assertEqual(list(reply.run.outputs[0].tensor.shape), shape)
            self.assertEqual(data, b"")

    def test_rank_0_and_8_work_and_9_and_65_do_not(self):
        """Hardening: shapes-rank"""
        client = self.client()
        for rank in (0, 1, 8):
            reply, data = client.ask(run("relu", tensor([1] * rank, size=4)), f32(-3))
            self.assertEqual((list(reply.run.outputs[0].tensor.shape), unpack_f32(data)), ([1] * rank, (0.0,)))
        for rank in (9, 65, 10000):
            self.expect_status(INVALID_ARGUMENT, run("relu", tensor([1] * rank, size=4)), f32(1), words="%d" % rank)

    def test_unknown_dtypes(self):
        """Hardening: shapes-dtype"""
        for dtype in (0, 13, 99, -1, 2**31 - 1):
            self.expect_status(INVALID_ARGUMENT, run("relu", tensor([1], dtype=dtype)), f32(1))

    def test_payload_shorter_or_longer_than_the_shape(self):
        """Hardening: shapes-payload"""
        for size, sent in ((12, 12), (20, 20), (16, 12), (16, 8), (16, 0), (0, 16)):
            with self.subTest(size=size, sent=sent):
                self.expect_status(INVALID_ARGUMENT, run("relu", tensor([4], size=size)), bytes(sent))
        for data in (b"", bytes(15), bytes(17)):
            self.expect_status(INVALID_ARGUMENT, run("relu", inline([4], data)))

    def test_payload_that_nobody_needs(self):
        """Hardening: shapes-payload-beside"""
        self.expect_status(INVALID_ARGUMENT, run("relu", inline([1], f32(1))), bytes(4096))
        self.expect_status(INVALID_ARGUMENT, run("relu", tensor([4])), bytes(4096))
        self.expect_status(INVALID_ARGUMENT, pb.Request(ping=pb.Empty()), bytes(4096))
        for size in (64, 16, 16 << 20):  # nor one beside the bytes that an upload has in its message
            self.expect_status(INVALID_ARGUMENT, pb.Request(upload=pb.Upload(tensor=inline([4], f32(1, 2, 3, 4)))), bytes(size), words="inline, expected no payload")
        client = self.client()
        handle = client.ask(pb.Request(upload=pb.Upload(tensor=pb.Tensor(dtype=9, shape=[4]), parts=True)))[0].run.outputs[0].kept
        reply, _ = client.call(pb.Request(write=pb.Write(handle=handle, data=inline([4], bytes(4), dtype=2))), bytes(64))
        self.assertEqual((reply.status, "inline, expected no payload" in reply.message), (INVALID_ARGUMENT, True), reply.message)

    def test_payload_beside_shared_memory(self):
        """Hardening: shapes-payload-beside"""
        client, size = self.client(features=["shm"]), 1 << 20
        memory = os.memfd_create("range", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(memory, size)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        number, client.next_id = client.next_id, client.next_id + 1
        attach = frame(REQUEST, number, pb.Request(attach_memory=pb.AttachMemory(bytes=size)).SerializeToString())
        socket.send_fds(client.sock, [attach], [memory])
        os.close(memory)
        shared = pb.SharedRange(region=client.read_reply(number)[1].memory.region, bytes=size)
        for payload in (bytes(64), bytes(2 * size)):
            self.expect_status(INVALID_ARGUMENT, pb.Request(upload=pb.Upload(tensor=pb.Tensor(dtype=9, shape=[size // 4], shared=shared))), payload,
                               words="shared, expected no payload", client=client)
            request = run("relu", pb.Tensor(dtype=9, shape=[size // 4], shared=shared))
            self.expect_status(INVALID_ARGUMENT, request, payload, client=client)
        handle = client.ask(pb.Request(upload=pb.Upload(tensor=pb.Tensor(dtype=9, shape=[size // 4]), parts=True)))[0].run.outputs[0].kept
        write = pb.Request(write=pb.Write(handle=handle, data=pb.Tensor(dtype=2, shape=[size], shared=shared)))
        self.expect_status(INVALID_ARGUMENT, write, bytes(64), words="shared, expected no payload", client=client)

    def test_ranges_outside_the_payload_and_out_of_line(self):
        for offset, size in ((64, 16), (2**64 - 64, 16), (2**64 - 16, 16), (2**63, 16), (0, 2**64 - 1), (4, 16), (1, 16), (63, 16)):
            with self.subTest(offset=offset, size=size):
                self.expect_status(INVALID_ARGUMENT, run("relu", tensor([4], offset=offset, size=size)), bytes(64))

    def test_strides_negative_past_the_end_and_of_another_rank(self):
        """Hardening: shapes-strides"""
        for shape, strides in (([4], [-1]), ([4], [2]), ([4], [INT64_MAX]), ([2, 2], [INT64_MAX, INT64_MAX]), ([4], [INT64_MIN]), ([4], [1, 1]),
                               ([2, 2], [1]), ([2, 2], [2**62, 1]), ([3], [2**63 - 1])):
            with self.subTest(strides=strides):
                self.expect_status(INVALID_ARGUMENT, run("relu", tensor(shape, size=16, strides=strides)), bytes(16))

    def test_zero_and_overlapping_strides_give_right_answers(self):
        """Hardening: shapes-strides-zero"""
        client = self.client()
        data = f32(-1, 2, -3, 4, 5, -6)
        for shape, strides, wanted in (
            ([4], [0], (0, 0, 0, 0)),
            ([2, 3], [0, 1], (0, 2, 0, 0, 2, 0)),
            ([3, 2], [1, 1], (0, 2, 2, 0, 0, 4)),
            ([3], [2], (0, 0, 5)),
        ):
            _, got = client.ask(run("relu", tensor(shape, size=24, strides=strides)), data)
            self.assertEqual(unpack_f32(got), wanted)

    def test_byte_offsets_unaligned_and_past_the_end(self):
        for offset in (1, 2, 3, 16, 20, 2**64 - 4, 2**63):
            with self.subTest(offset=offset):
                self.expect_status(INVALID_ARGUMENT, run("relu", tensor([4], size=16, byte_offset=offset)), bytes(16))
        _, data = self.client().ask(run("relu", tensor([2], size=16, byte_offset=8)), f32(1, 2, 3, 4))
        self.assertEqual(unpack_f32(data), (3.0, 4.0))

    def test_nan_and_infinite_attributes(self):
        """Hardening: arguments-nan"""
        for epsilon in (float("nan"), float("inf"), float("-inf"), -1.0):
            request, payload, _ = rms_norm()
            request.run.args[-1].float = epsilon
            reply, _ = self.client().call(request, payload)
            self.assertIn(reply.status, (OK, INVALID_ARGUMENT), reply)

    def test_attributes_out_of_range_and_of_the_wrong_kind(self):
        """Hardening: arguments-int"""
        request, payload, _ = rms_norm()
        for value in (0, -1, 5, INT64_MAX, INT64_MIN):
            bad = pb.Request.FromString(request.SerializeToString())
            bad.run.args.add(name="variance_size", int=value)
            self.expect_status(INVALID_ARGUMENT, bad, payload, words="variance_size")
        for kind, value in (("str", "x"), ("float", 1.5), ("bool", True)):
            bad = pb.Request.FromString(request.SerializeToString())
            setattr(bad.run.args.add(name="variance_size"), kind, value)
            self.expect_status(INVALID_ARGUMENT, bad, payload, words="variance_size")
        bad = run("gelu", inline([1], f32(1)), approximate="exactly")
        self.expect_status(INVALID_ARGUMENT, bad, words="approximate")

    def test_arguments_too_many_missing_repeated_and_unknown(self):
        """Hardening: arguments-duplicate"""
        x = inline([1, 4], f32(1, 2, 3, 4))
        for request, words in (
            (run("rms_norm", x), "weight"),
            (run("rms_norm"), "x"),
            (run("relu", x, x), "relu"),
            (run("relu", x, colour=1), "colour"),
            (run("relu", x, x=x), "x"),
            (run("relu", epsilon=1.0), "epsilon"),
        ):
            with self.subTest(words=words):
                self.assertIn("relu" if request.run.op == "relu" else "rms_norm", self.expect_status(INVALID_ARGUMENT, request, words=words))
        repeated = run("relu")
        repeated.run.args.add(name="x").tensor.CopyFrom(x)
        repeated.run.args.add(name="x").tensor.CopyFrom(x)
        self.expect_status(INVALID_ARGUMENT, repeated, words="x")
        late = run("gelu", approximate="none")
        late.run.args.add().tensor.CopyFrom(x)
        self.expect_status(INVALID_ARGUMENT, late)
        empty = run("relu")
        empty.run.args.add(name="x")
        self.expect_status(INVALID_ARGUMENT, empty)

    def test_a_hundred_thousand_arguments(self):
        """Hardening: arguments-many"""
        request = pb.Request()
        request.run.op = "relu"
        for _ in range(100000):
            request.run.args.add(int=1)
        self.expect_status(INVALID_ARGUMENT, request)

    def test_lists_too_long(self):
        self.expect_status(INVALID_ARGUMENT, run("relu", inline([1], f32(1)), run_inline_results=True, x=None))
        request = run("relu", inline([1], f32(1)))
        for _ in range(100):
            request.run.outputs.add(keep=True)
        self.expect_status(INVALID_ARGUMENT, request)
        request = pb.Request(free=pb.Free())
        for index in range(5000):
            request.free.tensors.add(handle=pb.Handle(index=index, generation=1))
        self.expect_status(INVALID_ARGUMENT, request)

    def test_index_contents_out_of_range_in_every_index_operand(self):
        """Hardening: arguments-index"""
        i64 = lambda *values: struct.pack("<%dq" % len(values), *values)
        table = inline([3, 2], f32(1, 2, 3, 4, 5, 6))
        for bad in (3, -1, INT64_MAX, INT64_MIN, 1 << 32):
            self.expect_status(INVALID_ARGUMENT, run("embedding", inline([2], i64(0, bad), dtype=6), table), words=str(bad))
        cache = inline([4, 4], bytes(64))
        for bad in (4, -1, INT64_MAX):
            request = run("rotary_embedding", inline([2], i64(0, bad), dtype=6), inline([2, 4], bytes(32)), inline([2, 4], bytes(32)), head_size=4,
                          cos_sin_cache=cache, is_neox_style=True)
            message = self.client().call(request)[0]
            self.assertEqual(message.status, INVALID_ARGUMENT, message)


class Handles(Hardening):
    def keep(self, client):
        request = run("relu", inline([4], f32(-1, 2, -3, 4)))
        request.run.outputs.add(keep=True, no_copy=True)
        return client.ask(request)[0].run.outputs[0].kept

    def use(self, handle):
        return run("relu", pb.Tensor(handle=handle))

    def test_forged_handles(self):
        """Hardening: handles-forged"""
        client = self.client()
        handle = self.keep(client)
        _, data = client.ask(self.use(handle))
        self.assertEqual(unpack_f32(data), (0.0, 2.0, 0.0, 4.0))
        for index, generation in ((handle.index, handle.generation ^ 1), (handle.index + 1, handle.generation), (2**32 - 1, 1), (0, 0), (handle.index, 0)):
            reply, _ = client.call(self.use(pb.Handle(index=index, generation=generation)))
            self.assertIn(reply.status, (NOT_FOUND, INVALID_ARGUMENT), reply)

    def test_handles_of_another_session_and_after_a_reconnect(self):
        """Hardening: promise-no-peeking, handles-other-session, handles-reconnect"""
        client = self.client()
        handle = self.keep(client)
        self.expect_status(NOT_FOUND, self.use(handle))
        client.close()
        self.expect_status(NOT_FOUND, self.use(handle))

    def test_freed_twice_and_used_after_free(self):
        """Hardening: handles-freed, handles-freed-twice"""
        client = self.client()
        handle = self.keep(client)
        free = pb.Request(free=pb.Free(tensors=[pb.Tensor(handle=handle)]))
        client.ask(free)
        self.assertEqual(client.call(free)[0].status, NOT_FOUND)
        self.assertEqual(client.call(self.use(handle))[0].status, NOT_FOUND)

    def test_freed_while_requests_that_read_it_are_queued(self):
        """Hardening: handles-freed-in-use"""
        client = self.client()
        for _ in range(50):
            handle = self.keep(client)
            uses = [client.submit(self.use(handle)) for _ in range(4)]
            freed = client.submit(pb.Request(free=pb.Free(tensors=[pb.Tensor(handle=handle)])))
            replies = {}
            while len(replies) < 5:
                request_id, reply, data = client.read_reply()
                replies[request_id] = (reply, data)
            for request_id in uses:
                self.assertEqual(replies[request_id][0].status, OK, replies[request_id][0])
                self.assertEqual(unpack_f32(replies[request_id][1]), (0.0, 2.0, 0.0, 4.0))
            self.assertEqual(replies[freed][0].status, OK)

    def test_results_that_were_not_kept_failed_or_never_existed(self):
        client = self.client()
        plain = client.submit(run("relu", inline([4], bytes(16))))
        failed = run("relu", inline([4], bytes(15)))
        failed.run.outputs.add(keep=True)
        failed = client.submit(failed)
        client.read_reply(failed)
        for request_id, output, statuses in (
            (plain, 0, (NOT_FOUND,)),
            (plain, 7, (NOT_FOUND, INVALID_ARGUMENT)),
            (failed, 0, (harness.ABORTED, NOT_FOUND)),
            (999, 0, (NOT_FOUND, INVALID_ARGUMENT)),
            (2**64 - 1, 2**32 - 1, (NOT_FOUND, INVALID_ARGUMENT)),
            (0, 0, (NOT_FOUND, INVALID_ARGUMENT)),
        ):
            reply, _ = client.call(run("relu", pb.Tensor(result=pb.ResultRef(request=request_id, output=output))))
            self.assertIn(reply.status, statuses, reply)
        own = client.next_id
        reply, _ = client.call(run("relu", pb.Tensor(result=pb.ResultRef(request=own))))
        self.assertIn(reply.status, (NOT_FOUND, INVALID_ARGUMENT), reply)
        client.ping()

    def test_views_that_leave_the_kept_tensor(self):
        client = self.client()
        handle = self.keep(client)
        for fields in (
            dict(shape=[5]),
            dict(shape=[4], byte_offset=4),
            dict(shape=[4], strides=[2]),
            dict(shape=[2], strides=[-1]),
            dict(shape=[2], byte_offset=2),
            dict(shape=[2**62]),
            dict(shape=[1], byte_offset=2**64 - 4),
            dict(shape=[4], dtype=2),
        ):
            with self.subTest(fields=fields):
                fields.setdefault("dtype", 9)
                self.expect_status(INVALID_ARGUMENT, run("relu", pb.Tensor(handle=handle, **fields)), client=client)
        _, data = client.ask(run("relu", pb.Tensor(handle=handle, dtype=9, shape=[2], strides=[2], byte_offset=4)))
        self.assertEqual(unpack_f32(data), (2.0, 4.0))

    def test_features_that_were_not_negotiated(self):
        self.expect_status(UNIMPLEMENTED, run("relu", pb.Tensor(dtype=9, shape=[1], shared=pb.SharedRange(bytes=4))))
        client = self.client()
        handle = self.keep(client)
        self.expect_status(INVALID_ARGUMENT, run("relu", pb.Tensor(handle=handle, donate=True)), client=client)


class Storm(Hardening):
    flags = ("--loops", "1")  # who is there lives on the loop that accepts

    def stop(self):
        """The daemon's process stands still; the function lets it go on."""
        self.daemon.signal(signal.SIGSTOP)
        self.addCleanup(self.daemon.signal, signal.SIGCONT)

        def state():
            with open("/proc/%d/stat" % self.daemon.process.pid) as file:
                return file.read().rpartition(")")[2].split()[0]

        wait_until(lambda: state() == "T", "the process stands still")
        return lambda: self.daemon.signal(signal.SIGCONT)

    def test_of_many_who_connect_at_once_a_turn_accepts_a_few_and_serves_who_is_there(self):
        """Hardening: sessions-storm"""
        inside = self.client()
        before = inside.info().sessions
        go_on = self.stop()
        storm = [Client(self.address, hello=False) for _ in range(64)]
        number = inside.submit(pb.Request(info=pb.Empty()))
        go_on()
        there = inside.read_reply(number)[1].info.sessions
        self.assertLessEqual(there, before + 2 * 8)  # all 64 of them, if a turn accepted whoever waits
        for client in storm:
            client.send(frame(HELLO, envelope=hello_envelope()))
        for client in storm:
            self.assertEqual(client.read_frame()[0], HELLO_REPLY)
            client.close()


class Sessions(Hardening):
    def test_a_reset_in_mid_kernel(self):
        """Hardening: sessions-reset"""
        size = 256
        request = run("matmul", tensor([size, size]), tensor([size, size]), run_priority=["native"])
        for _ in range(10):
            client = Client(self.address)
            client.submit(request, bytes(4 * size * size))
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        other = self.client()
        wait_until(lambda: other.info().memory_bytes == 0)

    def test_a_handshake_storm(self):
        """Hardening: sessions-storm"""
        before = self.daemon.descriptors()
        for _ in range(5):
            storm = []
            for _ in range(100):
                client = Client(self.address, hello=False)
                client.send(frame(HELLO, envelope=hello_envelope()))
                storm.append(client)
            check_healthy(self, self.daemon)
            for client in storm:
                client.close()
        wait_until(lambda: self.daemon.descriptors() <= before + 2)

    def test_more_requests_in_flight_than_allowed_are_answered_all_the_same(self):
        """Hardening: promise-one-reply"""
        client = self.client()
        limit = client.hello.limits.in_flight
        request, payload, _ = rms_norm()
        count = 3 * limit
        data = b"".join(frame(REQUEST, index + 1, request.SerializeToString(), payload) for index in range(count))
        sent, seen = 0, set()
        client.sock.setblocking(False)
        until = time.monotonic() + harness.PATIENCE
        while len(seen) < count and time.monotonic() < until:
            try:
                sent += client.sock.send(data[sent : sent + 65536])
            except BlockingIOError:
                pass
            try:
                client.buffer += client.sock.recv(1 << 20)
            except BlockingIOError:
                time.sleep(0.001)
            while len(client.buffer) >= 32:
                envelope_bytes = struct.unpack_from("<I", client.buffer, 16)[0]
                payload_bytes = struct.unpack_from("<Q", client.buffer, 24)[0]
                if len(client.buffer) < 32 + envelope_bytes + payload_bytes:
                    break
                seen.add(client.read_reply()[0])
        self.assertEqual(len(seen), count)

    def test_deadlines_in_the_past_and_near_wrap_around(self):
        """Hardening: sessions-deadline-past, sessions-deadline-wrap"""
        for timeout in (1, 2**64 - 1, 2**63):
            reply, _ = self.client().call(run("relu", inline([1], f32(1)), run_timeout_us=timeout))
            self.assertIn(reply.status, (OK, harness.DEADLINE_EXCEEDED), reply)
        reply, _ = self.client().call(run("relu", inline([1], f32(1)), run_timeout_us=2**64 - 1))
        self.assertEqual(reply.status, OK, reply)

    def test_generate_with_absurd_sizes(self):
        client = self.client()
        for dims in ([2**40, 2**40], [-1], [0], [INT64_MAX], [1] * 100, [2**20, 2**20]):
            reply, _ = client.call(pb.Request(generate=pb.Generate(op="relu", dtype=9, dims=dims)))
            self.assertTrue(reply.status == OK or reply.message, dims)
        for fields in (dict(op="no_such"), dict(op="relu", dtype=99), dict(op="relu", variant=2**32 - 1), dict(op="relu", values=77)):
            reply, _ = client.call(pb.Request(generate=pb.Generate(**fields)))
            self.assertNotEqual(reply.status, OK, fields)
        client.ping()

    def test_modules_that_are_no_modules(self):
        client = self.client()
        for path in ("", "relative.so", "/no/such.so", "/dev/zero", "/etc/passwd", "/", "x" * 60000, "/tmp/../etc/passwd"):
            reply, _ = client.call(pb.Request(load_module=pb.LoadModule(path=path)))
            self.assertNotEqual(reply.status, OK, path)
            self.assertTrue(reply.message)
        client.ping()


if __name__ == "__main__":
    unittest.main(verbosity=2)
