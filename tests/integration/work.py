"""Clients in the middle of everything, and clients that mean harm: what the tests of ends and tests/soak let loose on a daemon."""
import socket
import struct

from harness import CHUNKED, DATA, HELLO, REQUEST, Client, Closed, f32, frame, hello_envelope, inline, pb, rms_norm, run, tensor


def slow(client, size=384):
    request = run("matmul", tensor([size, size]), tensor([size, size]), run_priority=["native"])
    return client.submit(request, bytes(4 * size * size))


def keep(client):
    request = run("relu", inline([1 << 18], f32(1), strides=[0]))
    request.run.outputs.add(keep=True, no_copy=True)
    return client.ask(request)[0].run.outputs[0].kept


class Work:
    """Clients in the middle of everything; nobody waits for them."""

    def __init__(self, address, chance):
        self.address = address
        self.chance = chance
        self.clients = []
        for step in (self.half_a_hello, self.half_a_frame, self.half_an_upload, self.published, self.kernels, self.kept, self.waits_for_a_result, self.gone_in_mid_kernel):
            for _ in range(chance.randint(0, 2)):
                step()

    def open(self, hello=True, **fields):
        client = Client(self.address, hello=hello, **fields)
        self.clients.append(client)
        return client

    def half_a_hello(self):
        self.open(hello=False).send(frame(HELLO, envelope=hello_envelope())[: self.chance.randint(1, 31)])

    def half_a_frame(self):
        request, payload, _ = rms_norm(rows=64, columns=256)
        data = frame(REQUEST, 1, request.SerializeToString(), payload)
        self.open().send(data[: self.chance.randint(1, len(data) - 1)])

    def half_an_upload(self):
        client = self.open(chunk_bytes=65536)
        request = pb.Request(upload=pb.Upload(tensor=tensor([1 << 19])))
        client.send(frame(REQUEST, 1, request.SerializeToString(), flags=CHUNKED, payload_bytes=1 << 21))
        for index in range(self.chance.randint(1, 20)):
            client.send(frame(DATA, 1, struct.pack("<Q", index << 16), bytes(1 << 16)))

    def published(self):
        client = self.open()
        handle = keep(client)
        client.submit(pb.Request(publish=pb.Publish(tensor=pb.Tensor(handle=handle), name="w%d" % len(self.clients), lasting=True)))

    def kernels(self):
        client = self.open()
        for _ in range(self.chance.randint(1, 6)):
            slow(client)

    def kept(self):
        client = self.open()
        handle = keep(client)
        client.submit(run("relu", pb.Tensor(handle=handle)))

    def waits_for_a_result(self):
        client = self.open()
        request = run("matmul", tensor([256, 256]), tensor([256, 256]), run_priority=["native"])
        request.run.outputs.add(keep=True, no_copy=True)
        first = client.submit(request, bytes(4 * 256 * 256))
        client.submit(run("relu", pb.Tensor(result=pb.ResultRef(request=first))))

    def gone_in_mid_kernel(self):
        client = self.open()
        slow(client)
        client.close()

    def close(self):
        for client in self.clients:
            client.close()


def reset(client):
    """Ends the connection by a reset, with whatever is under way."""
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def tolerant(step):
    """A step against a daemon that may end the connection in the middle of it."""

    def run_step(*arguments):
        try:
            step(*arguments)
        except (OSError, Closed):
            pass

    run_step.__name__ = step.__name__
    return run_step


@tolerant
def random_bytes(address, chance):
    with Client(address, hello=chance.random() < 0.5) as client:
        client.send(bytes(chance.randrange(256) for _ in range(chance.randint(1, 2000))))


@tolerant
def flipped_bits(address, chance):
    request, payload, _ = rms_norm(rows=8, columns=64)
    data = bytearray(frame(REQUEST, 1, request.SerializeToString(), payload))
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    with Client(address) as client:
        client.send(bytes(data))
        client.sock.settimeout(0.2)
        client.expect_end()


@tolerant
def cut_short(address, chance):
    request, payload, _ = rms_norm(rows=32, columns=256)
    data = frame(REQUEST, 1, request.SerializeToString(), payload)
    client = Client(address)
    client.send(data[: chance.randint(1, len(data) - 1)])
    (reset if chance.random() < 0.5 else Client.close)(client)


@tolerant
def never_reads(address, chance):
    with Client(address) as client:
        client.sock.settimeout(0.2)
        request = run("relu", inline([1 << 16], f32(1), strides=[0]))
        for _ in range(chance.randint(1, 200)):
            client.submit(request)


@tolerant
def leaves_in_mid_kernel(address, chance):
    client = Client(address)
    slow(client, chance.choice((64, 256, 512)))
    reset(client)


@tolerant
def connects_and_vanishes(address, chance):
    Client(address, hello=chance.random() < 0.5).close()


HARM = [random_bytes, flipped_bits, cut_short, never_reads, leaves_in_mid_kernel, connects_and_vanishes]
