#!/usr/bin/env python3
"""Makes the seeds under corpus/ from what the tree has: golden frames, schemas, configurations, tensor files; sessions are random scripts."""
import glob
import os
import random
import re
import struct

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


def write(target, name, data):
    folder = os.path.join(HERE, "corpus", target)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "wb") as file:
        file.write(data)


def codec():
    kinds = {3: 0, 4: 1, 1: 2, 2: 2, 8: 2}
    for path in sorted(glob.glob(os.path.join(ROOT, "tests", "golden", "frames", "*.hex"))):
        name = os.path.basename(path)[:-4]
        with open(path) as file:
            data = bytes.fromhex("".join(re.sub(r"#.*", "", line) for line in file))
        size = struct.unpack_from("<I", data, 16)[0]
        write("codec", name + "-header", b"\3" + data[:40])
        if data[5] in kinds:
            write("codec", name, bytes([kinds[data[5]]]) + data[32 : 32 + size])


def schema():
    texts = [
        "rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor",
        'f(Tensor[] xs, int[] dims=[1, -2], bool flag=True, str mode="sum", float? scale=1e-5) -> (Tensor, Tensor, Tensor[])',
        "g() -> ()", "h( Tensor  x ,int n = 9223372036854775807 )->Tensor", "a(Tensor x, *, int n) -> Tensor", "b(float x=-inf, float y=nan) -> Tensor",
        'c(str s="a\\"b") -> Tensor', "d(int[] i=[]) -> Tensor[]",
    ]
    for i, text in enumerate(texts):
        write("schema", "%02d" % i, text.encode())


def config():
    texts = [
        "listen: [unix:/tmp/a.sock, tcp://127.0.0.1:0]\npriorities:\n  '*': [cpu, native]\n  rms_norm: []\nlimits: {memory: 1 GiB, in_flight: 8}\n",
        "modules:\n  onednn: /usr/lib/x.so\nlog: {level: debug, format: json}\nthreads: 4\nchecked: true\ninline: 5us\n",
        "a: &a [*a]\n", "limits: {memory: 99999999999999999999 GiB}\n", "listen: tcp://[::1]:70000\n", "? [complex]\n: key\n", "--- a\n--- b\n", "\xff\xfe".encode("latin1").decode("latin1"),
    ]
    for i, text in enumerate(texts):
        write("config", "%02d" % i, text.encode("utf-8"))


def files():
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
    for major, form in ((1, "<H"), (2, "<I"), (3, "<I")):
        text = header + b" " * 3 + b"\n"
        write("files", "npy-%d" % major, b"\0" + b"\x93NUMPY" + bytes([major, 0]) + struct.pack(form, len(text)) + text + bytes(24))
    text = b"{'descr': '<u2', 'fortran_order': True, 'shape': (3,), }\n"
    write("files", "npy-raw", b"\2" + b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + bytes(6))
    text = b'{"__metadata__":{"format":"pt"},"x":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"y":{"dtype":"BF16","shape":[],"data_offsets":[16,18]}}'
    write("files", "safetensors", b"\1" + struct.pack("<Q", len(text)) + text + bytes(18))
    for path in sorted(glob.glob(os.path.join(ROOT, "tests", "golden", "*-00.safetensors")))[:4]:
        with open(path, "rb") as file:
            data = file.read()
        if len(data) < 4096:
            write("files", os.path.basename(path), b"\1" + data)


def session():
    random.seed(1)
    for i in range(48):
        write("session", "random-%02d" % i, bytes([random.randrange(32)]) + bytes(random.randrange(256) for _ in range(random.choice((40, 200, 800)))))
    for i in range(96):  # each op: generated arguments, then a run of them
        write("session", "op-%02d" % i, b"\1" + b"".join(bytes([4, i, 128 + variant, dtype]) + bytes(8) + bytes([255, 2]) for variant in range(0, 6) for dtype in (9, 7, 8, 3)))
    for i in range(24):  # generated inputs of an op, then graphs that may bind them
        script = b"\1" + bytes([4, i, 128, 9]) + bytes(8) + bytes([255, 2])
        for _ in range(6):
            script += bytes([224]) + bytes(random.randrange(240) for _ in range(random.choice((60, 150, 300))))
        write("session", "graph-%02d" % i, script)
    for i in range(48):  # calls checked in several ways, of both daemons, with and without shared memory
        script = bytes([(0x21, 0xE1, 0x61, 0xFD)[i % 4]])
        for provider, dtype in ((i // 4, 9), (i, 7), (i + 1, 9), (i + 2, 8)):
            script += bytes([15, 2, provider % 4 + 128, i, random.randrange(32, 232), dtype]) + bytes(random.randrange(1, 6) for _ in range(8)) + bytes(random.randrange(256) for _ in range(24))
        write("session", "check-%02d" % i, script)
    for i in range(16):  # anything, beside anything
        write("session", "beside-%02d" % i, bytes([0xE1 if i % 2 else 0x61]) + bytes(random.randrange(256) for _ in range(600)))


def ranges():
    random.seed(2)
    for i in range(4):
        write("ranges", "random-%02d" % i, bytes(random.randrange(256) for _ in range(400)))


def ring():
    random.seed(3)
    for i in range(6):
        write("ring", "random-%02d" % i, bytes(random.randrange(256) for _ in range(300)))
    # What a good client does: bytes, an index moved, read; room given back, written.
    write("ring", "good", bytes([2, 5]) + bytes(8) + bytes(64) + bytes([0, 2, 0, 1, 200, 0]) + (bytes([0]) + bytes(8) + bytes([0])) * 4 + (bytes([1]) + bytes(8) + bytes([7, 0])) * 4)


def bind():
    random.seed(4)
    for op in range(29):  # operands of equal shape, of which most ops take some
        for i in range(2):
            write("bind", "op-%02d-%d" % (op, i), bytes([op]) + bytes([1, 1, 2, 4, 4] + [2, 2] * (4 + i)) + bytes(random.randrange(240) for _ in range(120)))


def wire():
    """The golden requests one by one, and in one session."""
    frames = []
    for path in sorted(glob.glob(os.path.join(ROOT, "tests", "golden", "frames", "request-*.hex"))):
        with open(path) as file:
            data = bytes.fromhex("".join(re.sub(r"#.*", "", line) for line in file))
        size = struct.unpack_from("<I", data, 16)[0]
        payload = min(struct.unpack_from("<Q", data, 24)[0] // 16, 255)
        frames.append(bytes([0, payload, size >> 8, size & 255]) + data[32 : 32 + size])
        write("wire", os.path.basename(path)[:-4], b"\1" + frames[-1])
    write("wire", "all", b"\1" + b"".join(frames))
    random.seed(5)
    for i in range(6):
        write("wire", "random-%02d" % i, bytes(random.randrange(256) for _ in range(200)))


if __name__ == "__main__":
    for make in (codec, ranges, ring, schema, config, bind, files, wire, session):
        make()
