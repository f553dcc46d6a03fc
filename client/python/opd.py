"""Run tensor ops on an opd daemon.

    import numpy, opd

    with opd.Client("unix:/run/opd/opd.sock") as client:
        x = numpy.random.rand(2, 4096).astype("float32")
        result = client.run("rms_norm", x, numpy.ones(4096, "float32"), epsilon=1e-5, priority=["cuda", "cpu"])
        print(result.provider, result[0])

Written from proto/README.md and proto/opd.proto alone. Needs Python's protobuf and an opd_pb2.py, made from opd.proto by
`protoc --python_out`, beside this file or in the folder that OPD_PB2 names. NumPy is used where it is installed.

A client is one connection and one session; it belongs to one thread at a time. See README.md here.
"""
import collections
import contextlib
import fcntl
import hashlib
import hmac
import ipaddress
import mmap
import os
import select
import socket
import ssl
import struct
import sys
import threading
import time

try:
    import numpy
except ImportError:  # tensors are then opd.Tensor, and operands anything with a buffer
    numpy = None

if os.environ.get("OPD_PB2"):
    sys.path.insert(0, os.environ["OPD_PB2"])
try:
    import opd_pb2 as pb
except ImportError as error:
    raise ImportError("opd needs opd_pb2.py, made by `protoc --python_out=FOLDER opd.proto`, beside opd.py or in $OPD_PB2: "
                      f"{error}") from error

__all__ = ["Client", "Graph", "Registered", "Tensor", "Memory", "Handle", "Future", "Result", "Error", "Resumption", "bf16_from_float32", "float32_from_bf16"]

VERSION = "0.1.0"

# ---- Errors --------------------------------------------------------------------------------------------------------------


class Error(Exception):
    """A request failed, or the connection did. `status` is the code's name, the text is the server's."""

    status = "UNKNOWN"
    code = 2
    explain = None  # of a failed run that asked for it
    retry_after = None  # of a ResourceExhausted that time heals: seconds until it may be tried again, as the server estimates

    def __init__(self, message, explain=None, retry_after=None):
        super().__init__(message)
        self.explain = explain
        self.retry_after = retry_after


def _error_class(code, status):
    name = "".join(part.capitalize() for part in status.split("_"))
    return type(name, (Error,), {"status": status, "code": code, "__doc__": f"{status} ({code})", "__module__": __name__})


STATUS = ("OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED RESOURCE_EXHAUSTED "
          "FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED").split()
_ERRORS = {code: _error_class(code, status) for code, status in enumerate(STATUS) if code != 0}
globals().update({made.__name__: made for made in _ERRORS.values()})  # opd.InvalidArgument, opd.NotFound, ...
__all__ += [made.__name__ for made in _ERRORS.values()]
Unavailable, InvalidArgument = _ERRORS[14], _ERRORS[3]
FailedPrecondition, Unauthenticated = _ERRORS[9], _ERRORS[16]
DeadlineExceeded, DataLoss = _ERRORS[4], _ERRORS[15]


def _fail(code, message, explain=None, retry_after_us=0):
    return _ERRORS.get(code, _ERRORS[2])(message, explain, retry_after_us / 1e6 or None)


# ---- Tensors -------------------------------------------------------------------------------------------------------------

# name: (number, bytes, NumPy's name or None, struct's letter)
DTYPES = {"bool": (pb.BOOL, 1, "bool", "?"), "u8": (pb.U8, 1, "uint8", "B"), "i8": (pb.I8, 1, "int8", "b"),
          "i16": (pb.I16, 2, "int16", "h"), "i32": (pb.I32, 4, "int32", "i"), "i64": (pb.I64, 8, "int64", "q"),
          "f16": (pb.F16, 2, "float16", "e"),
          "bf16": (pb.BF16, 2, None, "H"), "f32": (pb.F32, 4, "float32", "f"), "f64": (pb.F64, 8, "float64", "d"),
          "f8_e4m3fn": (pb.F8_E4M3FN, 1, None, "B"), "f8_e5m2": (pb.F8_E5M2, 1, None, "B")}
_NAMES = {row[0]: name for name, row in DTYPES.items()}
_FROM_NUMPY = {row[2]: name for name, row in DTYPES.items() if row[2]}
# By what a buffer says of itself. `l` is 8 bytes where Python's array module is likely to run; itemsize decides.
_FROM_FORMAT = {"?": "bool", "B": "u8", "b": "i8", "h": "i16", "i": "i32", "q": "i64", "l": "i64", "e": "f16", "f": "f32",
                "d": "f64"}


def _elements(shape):
    count = 1
    for extent in shape:
        count *= extent
    return count


def _bytes_of(data):
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")  # an empty view with shape can't be cast


class Tensor:
    """A dtype (its name in opd's catalogue), a shape, and bytes: for bf16 and f8, which NumPy lacks, for strided operands, and
    for everything where NumPy isn't installed. `data` None: dtype and shape only, for fake and dry runs.

    strides are in elements, byte_offset is where element 0 lies in data."""

    memory, offset = None, 0  # of one that lies in a Memory

    def __init__(self, data, dtype, shape, strides=None, byte_offset=0):
        if dtype not in DTYPES:
            raise InvalidArgument(f"dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
        self.dtype = dtype
        self.shape = tuple(int(extent) for extent in shape)
        self.strides = None if strides is None else tuple(int(stride) for stride in strides)
        self.byte_offset = int(byte_offset)
        self.data = None if data is None else _bytes_of(data)
        if self.data is not None and self.strides is None and not self.byte_offset and len(self.data) != self.nbytes:
            raise InvalidArgument(f"{self!r} has {len(self.data)} bytes of data, expected {self.nbytes}")

    @property
    def nbytes(self):
        """Of the row-major tensor."""
        return _elements(self.shape) * DTYPES[self.dtype][1]

    def __repr__(self):
        return f"Tensor({self.dtype}{list(self.shape)})"

    def numpy(self):
        """Shares memory. bf16 as uint16, f8 as uint8: the bits."""
        _, size, name, _ = DTYPES[self.dtype]
        flat = numpy.frombuffer(self.data, dtype=name or f"uint{8 * size}", offset=self.byte_offset)
        if self.strides is None:
            return flat.reshape(self.shape)
        return numpy.lib.stride_tricks.as_strided(flat, self.shape, [stride * size for stride in self.strides], writeable=False)

    def float32(self):
        """A float32 array of the values: exact for f16, bf16 and f8."""
        bits = self.numpy()
        if self.dtype == "bf16":
            return float32_from_bf16(bits)
        if self.dtype in _F8:
            return _f8_table(self.dtype)[bits]
        return bits.astype("float32")

    def tolist(self):
        """The elements in a flat list, without NumPy; bf16 and f8 as their bits. Row-major tensors only."""
        return [row[0] for row in struct.iter_unpack("<" + DTYPES[self.dtype][3], self.data)]

    def __array__(self, dtype=None):
        made = self.numpy()
        return made if dtype is None else made.astype(dtype)

    def __dlpack__(self, **options):
        return self.numpy().__dlpack__(**options)

    def __dlpack_device__(self):
        return (1, 0)


class Memory:
    """Memory that this process and a daemon on this host both map, made by Client.memory: its tensors are operands that nobody
    sends, and places where results go (`out=`). A range that a running request reads or writes is to be left alone."""

    def __init__(self, client, nbytes):
        self._client, self.nbytes, self._used, self.region = client, nbytes, 0, 0
        descriptor = os.memfd_create("opd-python", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, nbytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(descriptor, nbytes)
            self.region = client._attach(descriptor, nbytes)
        finally:
            os.close(descriptor)

    def tensor(self, dtype, shape, offset=None):
        """A row-major Tensor in it, zeroed when new, at `offset` (a multiple of 64) or behind the last one made without an offset.
        `.numpy()` shares its memory."""
        made = Tensor(None, dtype, shape)
        begin = self._used if offset is None else offset
        if begin % 64 or not 0 <= begin <= self.nbytes - made.nbytes:
            raise InvalidArgument(f"{made!r} at byte {begin} of a memory of {self.nbytes}, expected a multiple of 64 with room")
        if offset is None:
            self._used = min(begin + made.nbytes + -made.nbytes % 64, self.nbytes + -self.nbytes % 64)
        return self._at(begin, dtype, shape)

    def _at(self, offset, dtype, shape):
        made = Tensor(None, dtype, shape)
        made.data = memoryview(self._map)[offset:offset + made.nbytes]
        made.memory, made.offset = self, offset
        return made

    def array(self, dtype, shape, offset=None):
        """The same as a NumPy array to work with. As an operand give the Tensor: an array is sent."""
        return self.tensor(dtype, shape, offset).numpy()

    def close(self):
        """No later request may name it; what is in flight isn't disturbed. Its tensors stay, as plain memory."""
        if self.region and self._client._dead is None:
            self._client._detach(self.region)
        self.region = 0


def bf16_from_float32(array):
    """A bf16 Tensor, rounded to nearest even; NaN stays NaN."""
    array = numpy.ascontiguousarray(array, dtype="float32")
    bits = array.view("uint32").astype("uint64")
    rounded = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype("uint16")
    quiet = ((bits >> 16).astype("uint16") & 0x8000) | 0x7fc0
    return Tensor(numpy.where(numpy.isnan(array), quiet, rounded).astype("uint16"), "bf16", array.shape)


def float32_from_bf16(bits):
    """float32 of an array of bf16 bits (uint16) or of a bf16 Tensor."""
    if isinstance(bits, Tensor):
        bits = bits.numpy()
    return (bits.astype("uint32") << 16).view("float32")


_F8 = {"f8_e4m3fn": (4, 3, False), "f8_e5m2": (5, 2, True)}
_F8_TABLES = {}


def _f8_value(bits, exponent_bits, mantissa_bits, infinite):
    exponent, mantissa = bits >> mantissa_bits & ((1 << exponent_bits) - 1), bits & ((1 << mantissa_bits) - 1)
    sign, bias = (-1.0 if bits & 0x80 else 1.0), (1 << (exponent_bits - 1)) - 1
    if exponent == (1 << exponent_bits) - 1 and infinite:
        return sign * float("inf") if mantissa == 0 else float("nan")
    if bits & 0x7f == 0x7f:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def _f8_table(dtype):
    if dtype not in _F8_TABLES:
        _F8_TABLES[dtype] = numpy.array([_f8_value(bits, *_F8[dtype]) for bits in range(256)], "float32")
    return _F8_TABLES[dtype]


class Handle:
    """A kept tensor of this session, usable as an operand. `view` names a part of it, without copying."""

    def __init__(self, index, generation, dtype=None, shape=(), view=None, donated=False):
        self.index, self.generation, self._donated = index, generation, donated
        self.dtype, self.shape = dtype, tuple(shape)
        self._view = view

    def view(self, shape, strides=None, byte_offset=0, dtype=None):
        return Handle(self.index, self.generation, dtype or self.dtype, shape, (strides, byte_offset))

    def donate(self):
        """The operand whose result takes its place: the handle isn't good any more, the result's is, in the same memory if the implementation can."""
        return Handle(self.index, self.generation, self.dtype, self.shape, self._view, True)

    def __repr__(self):
        return f"Handle({self.index}, {self.dtype}{list(self.shape)})"

    def _write(self, tensor):
        tensor.handle.index, tensor.handle.generation = self.index, self.generation
        tensor.donate = self._donated
        _write_view(tensor, self)


class Ref:
    """Output `output` of a request in flight, which keeps it: an operand of later requests, before its reply has come."""

    def __init__(self, request, output, dtype=None, shape=(), view=None):
        self.request, self.output = request, output
        self.dtype, self.shape, self._view = dtype, tuple(shape), view

    def view(self, dtype, shape, strides=None, byte_offset=0):
        return Ref(self.request, self.output, dtype, shape, (strides, byte_offset))

    def _write(self, tensor):
        tensor.result.request, tensor.result.output = self.request, self.output
        _write_view(tensor, self)


class Value:
    """Within a graph: an input, or output `output` of a node. An operand of nodes: whole, as a view, or donated."""

    def __init__(self, graph, node, output=0, dtype=None, shape=(), view=None, donated=False):
        self.graph, self.node, self._output = graph, node, output
        self.dtype, self.shape, self._view, self._donated = dtype, tuple(shape), view, donated

    def output(self, index):
        """Another output of the same node."""
        return Value(self.graph, self.node, index)

    def view(self, dtype, shape, strides=None, byte_offset=0):
        return Value(self.graph, self.node, self._output, dtype, shape, (strides, byte_offset))

    def donate(self):
        """The operand of a node whose result takes its place: a state, or another node's output."""
        return Value(self.graph, self.node, self._output, self.dtype, self.shape, self._view, True)

    def _write(self, tensor):
        if self.node is None:
            tensor.graph_input = self._output
        else:
            tensor.node.node, tensor.node.output = self.node, self._output
        tensor.donate = self._donated
        _write_view(tensor, self)


def _write_view(tensor, source):
    if source._view is None:
        return
    strides, byte_offset = source._view
    tensor.dtype = DTYPES[source.dtype][0]
    tensor.shape.extend(source.shape)
    tensor.strides.extend(strides or ())
    tensor.byte_offset = byte_offset


def _tensor_of(value):
    """A Tensor of anything that has a buffer; None for what is no tensor."""
    if isinstance(value, Tensor):
        return value
    if numpy is not None and not isinstance(value, numpy.ndarray) and hasattr(value, "__dlpack__"):
        value = numpy.from_dlpack(value)
    if numpy is not None and isinstance(value, numpy.ndarray):
        if value.dtype.name not in _FROM_NUMPY:
            raise InvalidArgument(f"an array of {value.dtype.name}, expected one of {', '.join(_FROM_NUMPY)}, or an opd.Tensor")
        shape = value.shape  # ascontiguousarray makes rank 0 into rank 1
        little = numpy.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        return Tensor(little.reshape(-1).view("uint8"), _FROM_NUMPY[value.dtype.name], shape)
    if isinstance(value, (str, bytes, bytearray)):
        return None
    try:
        view = memoryview(value)
    except TypeError:
        return None
    dtype = _FROM_FORMAT.get(view.format)
    if dtype is None or DTYPES[dtype][1] != view.itemsize or not view.c_contiguous:
        raise InvalidArgument(f"a buffer of format {view.format!r}, expected a contiguous one of {' '.join(_FROM_FORMAT)}")
    return Tensor(view, dtype, view.shape)


# ---- Requests ------------------------------------------------------------------------------------------------------------


class _Payload:
    """The pieces of a payload under construction; ranges start at multiples of 64."""

    def __init__(self):
        self.pieces, self.bytes = [], 0

    def add(self, data):
        gap = -self.bytes % 64
        if gap:
            self.pieces.append(memoryview(bytes(gap)))
        offset = self.bytes + gap
        self.pieces.append(data)
        self.bytes = offset + len(data)
        return offset


def _write_tensor(out, value, payload, bare):
    if isinstance(value, (Handle, Ref, Value)):
        value._write(out)
        return
    out.dtype = DTYPES[value.dtype][0]
    out.shape.extend(value.shape)
    out.strides.extend(value.strides or ())
    out.byte_offset = value.byte_offset
    if bare or value.data is None:
        return
    if len(value.data) == 0:
        out.inline = b""
        return
    if value.memory is not None and value.memory.region:
        out.shared.region, out.shared.offset, out.shared.bytes = value.memory.region, value.offset, len(value.data)
        return
    out.payload.offset = payload.add(value.data)
    out.payload.bytes = len(value.data)


def _write_out(run, out):
    """Where results go: Tensors of a Memory, None for those that are sent."""
    for index, place in enumerate([out] if isinstance(out, Tensor) else out):
        if len(run.outputs) == index:
            run.outputs.add()
        if place is None:
            continue
        _write_range(run.outputs[index].shared, place)


def _write_range(shared, place):
    if not isinstance(place, Tensor) or place.memory is None or not place.memory.region:
        raise InvalidArgument(f"out: {place!r}, expected a Tensor of an open Memory, or None")
    shared.region, shared.offset, shared.bytes = place.memory.region, place.offset, len(place.data)


def _operand(value):
    return value if isinstance(value, (Handle, Ref, Value)) else _tensor_of(value)


def _write_list(arg, values, payload, bare):
    if all(isinstance(value, int) for value in values):
        arg.ints.SetInParent()
        arg.ints.items.extend(values)
        return
    arg.tensors.SetInParent()
    for value in values:
        operand = _operand(value)
        if operand is None:
            raise InvalidArgument(f"a list with a {type(value).__name__}, expected tensors or ints")
        _write_tensor(arg.tensors.items.add(), operand, payload, bare)


def _write_value(arg, value, payload, bare):
    if numpy is not None and isinstance(value, numpy.generic):
        value = value.item()
    if value is None:
        arg.none.SetInParent()
    elif isinstance(value, bool):
        arg.bool = value
    elif isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise InvalidArgument(f"int {value} doesn't fit 64 bits")
        arg.int = value
    elif isinstance(value, float):
        arg.float = value
    elif isinstance(value, str):
        arg.str = value
    elif isinstance(value, (list, tuple)):
        _write_list(arg, value, payload, bare)
    else:
        operand = _operand(value)
        if operand is None:
            raise InvalidArgument(f"an argument of type {type(value).__name__}, which no op takes")
        arg.tensor.SetInParent()
        _write_tensor(arg.tensor, operand, payload, bare)


def _write_args(run, args, attrs, payload, bare):
    for name, value in [("", value) for value in args] + list(attrs.items()):
        _write_value(run.args.add(name=name), value, payload, bare)


def _service_class(name):
    if name is None:
        return pb.NORMAL
    if name not in ("realtime", "interactive", "batch"):
        raise ValueError(f"service_class is {name!r}, expected 'realtime', 'interactive' or 'batch'")
    return pb.ServiceClass.Value(name.upper())


class Graph:
    """Ops that run as one request. Described here, registered by Client.register, run by what that gives:

        graph = opd.Graph("mlp")
        x, w = graph.input("x"), graph.constant("w", weights)
        graph.output(graph.node("linear", x, w, name="up"), "y")
        mlp = client.register(graph)
        y, = mlp(x=array)
    """

    def __init__(self, name=""):
        self.message = pb.Graph(name=name)

    def _input(self, name, kind, kept=None):
        made = self.message.inputs.add(name=name, kind=kind)
        if kept is not None:
            kept._write(made.tensor)
        return Value(self, None, len(self.message.inputs) - 1)

    def input(self, name):
        """Given at each run; at most 64."""
        return self._input(name, pb.GRAPH_INPUT)

    def state(self, name, kept):
        """A kept tensor (Handle or Future.output()) that a node donates; what becomes of it is what the next run sees."""
        return self._input(name, pb.GRAPH_STATE, kept)

    def constant(self, name, kept):
        """A kept tensor as it is when the graph is registered; it may be freed afterwards."""
        return self._input(name, pb.GRAPH_CONSTANT, kept)

    def node(self, op, *args, name="", priority=None, strict=False, device="", allow_tf32=False, attrs=None, **named):
        """Adds an op on Values; arguments and options are those of Client.run. Its output 0, a Value."""
        payload = _Payload()
        node = self.message.nodes.add(name=name, op=op, strict=strict, device=device, allow_tf32=allow_tf32)
        _write_args(node, args, {**named, **(attrs or {})}, payload, False)
        if payload.bytes:
            raise InvalidArgument(f"node {name or op!r} has an operand in memory: give it as an input of the graph")
        if priority is not None:
            node.priority.SetInParent()
            node.priority.names.extend(priority)
        return Value(self, len(self.message.nodes) - 1)

    def output(self, value, name=""):
        """What a run returns, in the order of the calls: outputs of nodes."""
        if value.node is None:
            raise InvalidArgument(f"output {name!r} is an input: outputs are what nodes give")
        self.message.outputs.add(name=name, node=pb.NodeOutput(node=value.node, output=value._output))


class Registered:
    """A graph that a session has: call it with its inputs, by position or name. `submit` doesn't wait; runs are ordered."""

    def __init__(self, client, id, outputs):
        self.client, self.id, self._outputs = client, id, outputs

    def __call__(self, *args, **options):
        return self.submit(*args, **options).result()

    def submit(self, *args, explain=False, keep=False, copy=True, out=(), timeout=None, service_class=None, inline_results=False, mode=pb.RUN, attrs=None, **named):
        """A Future of the Result: options as of Client.run; its `graph` (with explain) and `states` are the graph's."""
        payload = _Payload()
        run = pb.RunGraph(graph=self.id, explain=explain, inline_results=inline_results, mode=mode)
        for name, value in [("", value) for value in args] + list({**named, **(attrs or {})}.items()):
            _write_value(run.inputs.add(name=name), value, payload, mode != pb.RUN)
        if timeout is not None:
            run.timeout_us = max(1, int(timeout * 1e6))
        run.service_class = _service_class(service_class)
        wanted = range(self._outputs) if keep is True else keep or ()
        for index in range(max(wanted, default=-1) + 1):
            run.outputs.add(keep=index in wanted, no_copy=index in wanted and not copy)
        _write_out(run, out)
        return self.client._submit(pb.Request(run_graph=run), self.client._result, payload)

    def free(self):
        self.client._call(pb.Request(free_graph=pb.FreeGraph(graph=self.id)))


class Result:
    """What a run gave: `outputs` (NumPy arrays, or Tensors for bf16, f8 and without NumPy; None where nothing was sent),
    `tensors` (always Tensors, also where nothing was sent), `handles` (None where an output isn't kept), `provider`, `uuid`,
    `explain`; of a graph `graph`, its explain record, and `states`, the Handles of its states from now on."""

    def __init__(self, reply, payload, memories=None):
        run = reply.run
        self.provider, self.uuid = run.provider, run.uuid
        self.explain = run.explain if run.HasField("explain") else None
        self.tensors = [_read_tensor(result.tensor, payload, memories) for result in run.outputs]
        self.handles = [_read_handle(result.kept, result.tensor) if result.HasField("kept") else None for result in run.outputs]
        self.outputs = [_present(tensor) for tensor in self.tensors]
        self.graph = run.graph if run.HasField("graph") else None
        self.states = [Handle(handle.index, handle.generation) for handle in run.states]

    def __getitem__(self, index):
        return self.outputs[index]

    def __len__(self):
        return len(self.outputs)

    def __iter__(self):
        return iter(self.outputs)


def _present(tensor):
    if tensor.data is None or numpy is None or DTYPES[tensor.dtype][2] is None:
        return None if tensor.data is None else tensor
    return tensor.numpy()


def _read_handle(handle, tensor):
    return Handle(handle.index, handle.generation, _NAMES.get(tensor.dtype), tensor.shape)


def _read_shared(tensor, made, memories):
    place, memory = tensor.shared, (memories or {}).get(tensor.shared.region)
    if memory is None:
        return made  # closed meanwhile
    if place.bytes != made.nbytes or place.offset % 64 or place.offset + place.bytes > memory.nbytes:
        raise DataLoss(f"malformed answer from the server: {made!r} at {place.offset} of a memory of {memory.nbytes} bytes")
    return memory._at(place.offset, made.dtype, made.shape)


def _read_tensor(tensor, payload, memories=None):
    if tensor.dtype not in _NAMES:
        raise DataLoss(f"malformed answer from the server: dtype {tensor.dtype}")
    made = Tensor(None, _NAMES[tensor.dtype], tensor.shape)
    source = tensor.WhichOneof("source")
    if source == "inline":
        return Tensor(tensor.inline, made.dtype, made.shape)
    if source == "payload":
        begin, end = tensor.payload.offset, tensor.payload.offset + tensor.payload.bytes
        if end > len(payload) or tensor.payload.bytes != made.nbytes:
            raise DataLoss(f"malformed answer from the server: {made!r} at {begin} to {end} of a payload of {len(payload)} bytes")
        return Tensor(payload[begin:end], made.dtype, made.shape)
    if source == "shared":
        return _read_shared(tensor, made, memories)
    if made.nbytes == 0 and source is None:
        return Tensor(b"", made.dtype, made.shape)
    return made


# ---- Connection ----------------------------------------------------------------------------------------------------------

_HEADER = struct.Struct("<4sBBHQIIQ")
_HELLO, _HELLO_REPLY, _REQUEST, _REPLY, _DATA, _ABORT, _CANCEL, _GOAWAY = range(1, 9)
_CHUNKED = 1
_PIECE = 256 << 10  # of an upload, between which other frames may go
_STAGE = 256 << 10
_HELLO_BYTES = 64 << 10  # more than any server has to say before we know its limits
_ENVELOPE_BYTES = 16 << 20


def _header(kind, request, envelope, payload, flags=0):
    return _HEADER.pack(b"OPD1", 1, kind, flags, request, envelope, 0, payload)


def _allocate(count):
    """Memory that a socket reads into; NumPy's isn't zeroed first."""
    if numpy is not None and count:
        return memoryview(numpy.empty(count, "uint8"))
    return memoryview(bytearray(count))


class Future:
    """A request in flight. `result(timeout)` waits and gives the Result or raises its error; `output(i)` is an operand for later
    requests, if the request keeps that output."""

    def __init__(self, client, request, convert):
        self.client, self.request = client, request
        self._convert = convert
        self.reply = self.payload = None  # once answered
        self.received = 0
        self.answered = False
        self.forgotten = False
        self.upload = None

    def output(self, index=0):
        return Ref(self.request, index)

    def done(self):
        """Whether the reply is here; looks at the socket, doesn't wait."""
        self.client._pump_until(lambda: self.answered, time.monotonic(), False)
        return self.answered

    def result(self, timeout=None):
        return self.client.wait(self, timeout)

    def _take(self):
        reply = self.reply
        if reply.status != 0:
            explain = reply.run.explain if reply.WhichOneof("body") == "run" and reply.run.HasField("explain") else None
            raise _fail(reply.status, reply.message, explain, reply.retry_after_us)
        return self._convert(reply, self.payload)


class _Upload:
    """A payload that goes out in DATA frames."""

    def __init__(self, request, pieces, chunk):
        self.request, self.pieces = request, collections.deque(pieces)
        self.chunk, self.offset = min(chunk, _PIECE), 0

    def next(self):
        taken, room = [], self.chunk
        while room and self.pieces:
            piece = self.pieces.popleft()
            if len(piece) > room:
                self.pieces.appendleft(piece[room:])
                piece = piece[:room]
            taken.append(piece)
            room -= len(piece)
        count = self.chunk - room
        head = _header(_DATA, self.request, 8, count) + struct.pack("<Q", self.offset)
        self.offset += count
        return [memoryview(head)] + taken


def _dial(address, timeout, tls):
    scheme, separator, rest = address.partition(":")
    given = [name for name in tls if tls[name] and name != "token_file"]
    if scheme != "tls" and given:
        raise InvalidArgument(f"address {address!r}: {', '.join(given)} given, for tls:// addresses only")
    if scheme == "unix" and rest:
        return _dial_unix(rest, timeout)
    if scheme in ("tcp", "tls") and separator and rest.startswith("//"):
        place, _, options = rest[2:].partition("?") if scheme == "tls" else (rest[2:], "", "")
        host, colon, port = place.rpartition(":")
        if not colon or not port.isdigit():
            raise InvalidArgument(f"address {address!r} has no port, expected {scheme}://host:port")
        host = host.strip("[]")
        if scheme == "tcp":
            return _dial_tcp(host, int(port), timeout)
        _tls_options(address, options, tls)
        ticket = tls["resumption"]._take(place, tls) if tls["resumption"] else _Ticket(_tls_context(tls))  # before anything is dialled
        return _Sealed(_dial_tcp(host, int(port), timeout), ticket, host, tls)
    raise InvalidArgument(f"address {address!r}, expected unix:/path, tls://host:port or tcp://host:port")


def _tls_options(address, text, given):
    """Adds to `given` what stands behind the address's question mark."""
    options, names = given, {"ca": "ca", "cert": "cert", "key": "key", "server-name": "server_name", "fingerprint": "fingerprint", "token-file": "token_file"}
    for part in text.split("&") if text else ():
        name, _, value = part.partition("=")
        if name not in names or not value:
            raise InvalidArgument(f"address {address!r}: option {part!r}, expected {', '.join(key + '=' for key in names)}")
        options[names[name]] = options[names[name]] or value
    return options


def _fingerprint(text):
    """The 32 bytes that "sha256:…" means."""
    with contextlib.suppress(ValueError):
        digest = bytes.fromhex(text[7 if text.startswith("sha256:") else 0:].replace(":", ""))
        if len(digest) == 32:
            return digest
    raise InvalidArgument(f"fingerprint {text!r}, expected sha256: and 64 hexadecimal digits")


def _tls_context(tls):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["opd/1"])
    if tls["fingerprint"]:
        _fingerprint(tls["fingerprint"])
    if bool(tls["cert"]) != bool(tls["key"]):
        raise InvalidArgument("TLS: a client certificate needs both cert and key")
    try:
        if tls["fingerprint"] and not tls["ca"]:  # that is the one, whoever signed it and whatever its name
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        elif tls["ca"]:
            context.load_verify_locations(tls["ca"])
        else:
            context.load_default_certs()
        if tls["cert"]:
            context.load_cert_chain(tls["cert"], tls["key"], lambda: "")  # no terminal is asked for a passphrase
    except OSError as error:
        raise InvalidArgument(f"TLS: {tls['cert'] or tls['ca']}: {error.strerror or error}") from error
    return context


def _read_token(path):
    try:
        with open(path, encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise InvalidArgument(f"token file {path}: others may read or write it, expected mode 0600")
            token = file.readline(258).strip()
    except (OSError, UnicodeError) as error:
        raise InvalidArgument(f"token file {path}: {error}") from error
    if not 0 < len(token) <= 256:
        raise InvalidArgument(f"token file {path}: a first line of {len(token)} characters, expected a token of 1 to 256")
    return token


def _is_private(sock):
    """Nobody on the way reads what it sends."""
    if isinstance(sock, _Sealed) or sock.family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(sock.getpeername()[0].partition("%")[0]).is_loopback


def _tls_failed(error):
    """The typed error of a failed handshake, or of a read that brings the server's alert."""
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if isinstance(error, ssl.SSLCertVerificationError):
        unknown = error.verify_code in (2, 18, 19, 20, 21)  # X509_V_ERR_: of its issuer
        hint = '; who has signed it is said by ca="FILE", or the certificate is pinned by fingerprint="sha256:…"' if unknown else ""
        return Unauthenticated(f"TLS: the server's certificate: {error.verify_message}{hint}")
    if "certificate" in reason or "unknown ca" in reason or "access denied" in reason:
        return Unauthenticated(f"TLS: the server refuses our certificate: {reason}")
    if "protocol" in reason or "version" in reason or "http request" in reason:
        return FailedPrecondition(f"TLS: the server doesn't speak TLS 1.3 and opd/1: {reason}")
    return Unavailable(f"TLS: {reason}")


class _Ticket:
    """An SSLContext, and what the server gave at an earlier connection of it; each is used once."""

    def __init__(self, context, put=None):
        self.context, self.session, self.put = context, None, put


class Resumption:
    """For programs that connect often by TLS: give one to each Client. A handshake then goes on where an earlier connection to the same address, with the same verification, was: the server isn't verified anew.

        resumption = opd.Resumption()
        with opd.Client("tls://host:7777", ca="ca.pem", resumption=resumption) as client: ...
    """

    def __init__(self):
        self._lock, self._kept = threading.Lock(), {}

    def _take(self, place, tls):
        key = (place, *(tls[name] for name in ("ca", "cert", "key", "server_name", "fingerprint")))
        with self._lock:
            context, session = self._kept.pop(key, (None, None))
        ticket = _Ticket(context or _tls_context(tls), lambda made: self._put(key, made))
        ticket.session = session
        return ticket

    def _put(self, key, ticket):
        with self._lock:
            self._kept[key] = (ticket.context, ticket.session)


class _Sealed:
    """A TLS socket that behaves as _Connection wants one: sendmsg, recv_into, BlockingIOError."""

    def __init__(self, sock, ticket, host, tls):
        self.ticket = ticket
        try:
            self.sock = ticket.context.wrap_socket(sock, server_hostname=tls["server_name"] or host, session=ticket.session)
            self._check_fingerprint(tls["fingerprint"])
            if self.sock.selected_alpn_protocol() != "opd/1":
                raise FailedPrecondition("TLS: the server agrees to no application protocol, expected opd/1 (ALPN)")
        except ssl.SSLError as error:
            sock.close()
            raise _tls_failed(error) from error
        except BaseException:
            sock.close()
            raise

    def remember(self):
        """The ticket has come, before the first answer."""
        self.ticket.session = self.sock.session
        if self.ticket.put and self.ticket.session is not None and self.ticket.session.has_ticket:
            self.ticket.put(self.ticket)

    def _check_fingerprint(self, wanted):
        if not wanted:
            return
        found = hashlib.sha256(self.sock.getpeercert(True)).digest()
        if not hmac.compare_digest(found, _fingerprint(wanted)):
            self.sock.close()
            raise Unauthenticated(f"TLS: the server's certificate has the fingerprint sha256:{found.hex()}, expected {wanted}")

    def sendmsg(self, pieces, ancillary=(), flags=0):
        del ancillary, flags
        piece = pieces[0]
        if len(piece) < 16384 and len(pieces) > 1:  # small ones in one record; a retry finds the same bytes
            joined, room = [], 65536
            for each in pieces:
                joined.append(each[:room])
                room -= len(joined[-1])
                if not room:
                    break
            piece = b"".join(joined)
        return self._try(self.sock.send, piece)

    def recv_into(self, memory):
        return self._try(self.sock.recv_into, memory)

    @staticmethod
    def _try(call, data):
        try:
            return call(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error
        except ssl.SSLEOFError:
            return 0
        except ssl.SSLError as error:
            raise _tls_failed(error) from error

    def __getattr__(self, name):  # fileno, setblocking, pending, close
        return getattr(self.sock, name)


def _dial_unix(path, timeout):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def _dial_tcp(host, port, timeout):
    sock = socket.create_connection((host, port), timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class _Connection:
    """Frames in and out of one socket, never blocking but in `pump`. Tells its owner through on_frame and on_payload."""

    def __init__(self, sock):
        self.sock = sock
        sock.setblocking(False)
        self.ready = collections.deque()   # memoryviews of whole frames
        self.uploads = collections.deque()  # round robin
        self.writing = collections.deque()  # what the last sendmsg left
        self.stage, self.begin, self.end = memoryview(bytearray(_STAGE)), 0, 0
        self.sink, self.sink_done = None, None  # memory that bytes go to before anything is parsed

    # Sending

    def send(self, pieces):
        self.ready.extend(pieces)

    def pending(self):
        return bool(self.writing or self.ready or self.uploads)

    def _batch(self):
        size = 0
        while self.ready and size < _PIECE and len(self.writing) < 256:
            piece = self.ready.popleft()
            size += len(piece)
            self.writing.append(piece)
        for _ in range(len(self.uploads)):
            if size >= _PIECE:
                break
            upload = self.uploads.popleft()
            for piece in upload.next():
                size += len(piece)
                self.writing.append(piece)
            if upload.pieces:
                self.uploads.append(upload)

    def pass_descriptor(self, descriptor, frame):
        """Nothing else is being sent: the frame, with a descriptor at its first byte. False: the socket is full."""
        try:
            sent = self.sock.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))], socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        if sent < len(frame):
            self.send([memoryview(frame)[sent:]])
        return True

    def flush(self):
        while self.pending():
            if not self.writing:
                self._batch()
            try:
                sent = self.sock.sendmsg(list(self.writing)[:512], [], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            while self.writing and sent >= len(self.writing[0]):
                sent -= len(self.writing.popleft())
            if sent:
                self.writing[0] = self.writing[0][sent:]

    # Receiving

    def receive_into(self, memory, done):
        """The next len(memory) bytes go there (None: dropped), then done() is called."""
        self.sink, self.sink_done = memory, done
        self._drain_sink()

    def _drain_sink(self):
        while self.sink is not None:
            take = min(len(self.sink), self.end - self.begin)
            self.sink[:take] = self.stage[self.begin:self.begin + take]
            self.begin += take
            self.sink = self.sink[take:]
            if len(self.sink):
                return
            self.sink, done = None, self.sink_done
            done()

    def fill(self):
        """Reads what is there; False at the end of the stream."""
        if self.sink is not None and len(self.sink) >= 4096:
            count = self.sock.recv_into(self.sink)
            self.sink = self.sink[count:]
            if count and not len(self.sink):
                self._drain_sink()
            return count > 0
        if self.begin:
            left = self.end - self.begin
            self.stage[:left] = bytes(self.stage[self.begin:self.end])
            self.begin, self.end = 0, left
        count = self.sock.recv_into(self.stage[self.end:])
        self.end += count
        self._drain_sink()
        return count > 0


class Client:
    """One connection and one session. `timeout`: seconds to connect, and to wait for any answer (None: without limit).

    tls:// addresses: ca, cert and key are PEM files (without ca: the system's authorities), server_name is the name that the server's
    certificate must have (None: the address's host), fingerprint pins it instead, whoever signed it (with ca: both). They may
    also stand in the address: tls://host:7777?ca=FILE&fingerprint=sha256:…

    token, or the first line of token_file (which only its owner may read), says who the client is; it is sent over TLS and on this
    machine only."""

    def __init__(self, address, timeout=30.0, chunk_bytes=0, no_chunks=False, name="opd-python " + VERSION, shared_memory=False, ca=None, cert=None, key=None,
                 server_name=None, fingerprint=None, token=None, token_file=None, resumption=None):
        self._memories = {}
        self.address, self.timeout = address, timeout
        self._futures, self._last, self._outputs = {}, 0, {}
        self._goaway, self._dead, self.hello = None, None, None
        try:
            tls = dict(ca=ca, cert=cert, key=key, server_name=server_name, fingerprint=fingerprint, token_file=token_file, resumption=resumption)
            self._link = _Connection(_dial(address, timeout, tls))
            token = self._token_for(token, tls["token_file"])
        except (OSError, UnicodeError) as error:
            raise Unavailable(f"{address}: {error}") from error
        hello = pb.Hello(version_min=1, version_max=1, features=["cancel"] + ["shm"] * shared_memory, client=name, chunk_bytes=chunk_bytes, no_chunks=no_chunks, token=token)
        envelope = hello.SerializeToString()
        self._link.send([memoryview(_header(_HELLO, 0, len(envelope), 0) + envelope)])
        try:
            self._pump_until(lambda: self.hello is not None, self._deadline(timeout))
        except Unavailable:  # refused before it has asked: the server answers and closes, and the Hello finds nobody
            if self.hello is None:
                raise
        if self.hello.status != 0:
            self.close()
            raise _fail(self.hello.status, self.hello.message)
        self.resumed = isinstance(self._link.sock, _Sealed) and self._link.sock.sock.session_reused
        if isinstance(self._link.sock, _Sealed):
            self._link.sock.remember()

    def _token_for(self, token, path):
        """What Hello says of who this client is, if the way is one for it."""
        try:
            token = token or (_read_token(path) if path else "")
            if token and not _is_private(self._link.sock):
                raise FailedPrecondition(f"{self.address}: a token would be read by anyone on the way: use a tls:// address")
        except Error:
            self._link.sock.close()
            raise
        return token

    def close(self):
        """Ends the session: kept tensors are freed, requests in flight dropped."""
        self._dead = self._dead or "the client is closed"
        self._link.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # ---- Running

    def run(self, op, *args, **options):
        """Runs an op and waits. Positional arguments and those that are no option go to the op; `attrs` is a dict of more of
        them, for names that are taken here.

        priority: list of providers, for this request. strict: no fallback. explain, uuid: more in the result. keep: True, or the
        indices of outputs that stay in the session. copy: False leaves kept outputs out of the reply. out: Tensors of a Memory that
        the outputs go to (None: sent). device: "cpu", "cuda:1".
        timeout: seconds, the server's. service_class: "realtime", "interactive", "batch" (None: the session's). retry, allow_tf32, inline_results: as in the protocol."""
        future = self.submit(op, *args, **options)
        try:
            return future.result()
        except (KeyboardInterrupt, DeadlineExceeded):
            self.cancel(future)  # nobody else has it
            raise

    def fake(self, op, *args, **options):
        """The results' dtypes and shapes, as Tensors without data; no tensor byte is sent."""
        return self.submit(op, *args, mode=pb.FAKE, **options).result().tensors

    def dry_run(self, op, *args, **options):
        """What would run and why, without running it: the result has provider and explain, its tensors no data."""
        return self.submit(op, *args, mode=pb.DRY, explain=True, **options).result()

    def submit(self, op, *args, priority=None, strict=False, explain=False, uuid=False, keep=False, copy=True, out=(), device="",
               timeout=None, service_class=None, retry=False, allow_tf32=False, inline_results=False, mode=pb.RUN, attrs=None, **named):
        """As run, without waiting: a Future."""
        payload, bare = _Payload(), mode != pb.RUN
        run = pb.Run(op=op, strict=strict, mode=mode, explain=explain, uuid=uuid, device=device, retry=retry,
                     allow_tf32=allow_tf32, inline_results=inline_results)
        _write_args(run, args, {**named, **(attrs or {})}, payload, bare)
        if priority is not None:
            run.priority.SetInParent()
            run.priority.names.extend(priority)
        if timeout is not None:
            run.timeout_us = max(1, int(timeout * 1e6))
        run.service_class = _service_class(service_class)
        if keep is not False:
            self._write_keep(run, keep, copy)
        _write_out(run, out)
        return self._submit(pb.Request(run=run), self._result, payload)

    def _result(self, reply, payload):
        return Result(reply, payload, self._memories)

    def _write_keep(self, run, keep, copy):
        wanted = range(self._output_count(run.op)) if keep is True else keep
        for index in range(max(wanted, default=-1) + 1):
            run.outputs.add(keep=index in wanted, no_copy=index in wanted and not copy)

    def _output_count(self, op):
        if op not in self._outputs:
            results = self.describe(op).schema.rpartition("->")[2]
            self._outputs[op] = results.count("Tensor")
        return self._outputs[op]

    def wait(self, future, timeout=None):
        """The future's result. With a timeout in seconds DeadlineExceeded says that it is still in flight."""
        limit = self.timeout if timeout is None else timeout
        self._pump_until(lambda: future.answered, self._deadline(limit))
        if self._dead is None:
            self._guard(self._link.flush)
        return future._take()

    def cancel(self, future):
        """Forgets a request: its reply is dropped when it comes. A server that can is told: it doesn't begin it, and asks its
        kernel to stop if that runs. Never blocks."""
        if future.answered or future.forgotten or self._dead is not None:
            return
        future.forgotten = True
        if future.upload in self._link.uploads:
            self._link.uploads.remove(future.upload)
            self._link.send([memoryview(_header(_ABORT, future.request, 0, 0))])
        elif "cancel" in self.hello.features:
            self._link.send([memoryview(_header(_CANCEL, future.request, 0, 0))])
        self._guard(self._link.flush)

    # ---- Shared memory

    def memory(self, nbytes):
        """A Memory of so many bytes: over a Unix socket, with `shared_memory=True`."""
        if "shm" not in self.hello.features:
            raise _fail(9, "shared memory: this session can't: it needs a Unix socket, shared_memory=True, and a server with the feature \"shm\"")
        if nbytes <= 0:
            raise InvalidArgument(f"shared memory of {nbytes} bytes, expected at least 1")
        made = Memory(self, nbytes)
        self._memories[made.region] = made
        return made

    def _attach(self, descriptor, nbytes):
        envelope = pb.Request(attach_memory=pb.AttachMemory(bytes=nbytes)).SerializeToString()
        deadline = self._deadline(self.timeout)
        self._pump_until(lambda: not self._link.pending(), deadline)
        self._last += 1
        future = self._futures[self._last] = Future(self, self._last, lambda reply, payload: reply.memory.region)
        frame = _header(_REQUEST, self._last, len(envelope), 0) + envelope
        self._pump_until(lambda: self._guard(lambda: self._link.pass_descriptor(descriptor, frame)), deadline)
        return future.result()

    def _detach(self, region):
        del self._memories[region]
        self._call(pb.Request(detach_memory=pb.DetachMemory(region=region)))

    # ---- Graphs

    def register(self, graph):
        """Checks a Graph and keeps it for this session: a Registered."""
        request = pb.Request(register_graph=pb.RegisterGraph(graph=graph.message))
        return Registered(self, self._call(request).graph.graph, len(graph.message.outputs))

    # ---- Kept tensors, generated inputs

    def upload(self, value, device=""):
        """A tensor that stays: a Future of its Handle. `future.output()` is an operand before that is here. device: where it is to live, as "cuda:0"."""
        tensor, payload = _tensor_of(value), _Payload()
        if tensor is None or tensor.data is None:
            raise InvalidArgument(f"upload of a {type(value).__name__}, expected a tensor with data")
        if tensor.strides is not None or tensor.byte_offset:
            raise InvalidArgument("upload of a tensor with strides or a byte offset, expected it row-major")
        request = pb.Request(upload=pb.Upload(device=device))
        _write_tensor(request.upload.tensor, tensor, payload, False)
        return self._submit(request, _read_uploaded, payload)

    def upload_parts(self, dtype, shape, device=""):
        """A Handle without bytes, which `write` brings; FAILED_PRECONDITION to use until all are there."""
        request = pb.Request(upload=pb.Upload(parts=True, device=device))
        _write_tensor(request.upload.tensor, Tensor(None, dtype, shape), _Payload(), True)
        return self._submit(request, _read_uploaded, _Payload()).result()

    def write(self, handle, offset, data):
        """Bytes of a tensor uploaded in parts, from `offset` on: a Future of None. Any order; again, if one was refused."""
        payload, data = _Payload(), _bytes_of(data)
        request = pb.Request(write=pb.Write(offset=offset))
        request.write.handle.index, request.write.handle.generation = handle.index, handle.generation
        _write_tensor(request.write.data, Tensor(data, "u8", [len(data)]), payload, False)
        return self._submit(request, lambda reply, payload: None, payload)

    def fetch(self, operand, out=None):
        """A kept tensor (Handle or Future.output(), whole or a view) back: a Future of an array or Tensor. out: a Tensor of a
        Memory, where it goes instead of being sent."""
        request = pb.Request(fetch=pb.Fetch())
        operand._write(request.fetch.tensor)
        if out is not None:
            _write_range(request.fetch.into, out)
        return self._submit(request, lambda reply, payload: self._result(reply, payload)[0], _Payload())

    def publish(self, handle, name, all=False, lasting=False):
        """Publishes a kept tensor by name, read-only: a protobuf Publication with handle and sha256."""
        request = pb.Request(publish=pb.Publish(name=name, all=all, lasting=lasting))
        handle._write(request.publish.tensor)
        return self._call(request).publications.items[0]

    def open(self, name=None, sha256=None):
        """A Handle of what is published to this tenant, by name or by the SHA-256 of its bytes."""
        request = pb.Request(open_tensor=pb.OpenTensor(name=name or "", sha256=sha256 or b""))
        made = self._call(request).publications.items[0]
        return Handle(made.handle.index, made.handle.generation, _NAMES.get(made.dtype), made.shape)

    def withdraw(self, name):
        self._call(pb.Request(withdraw=pb.Withdraw(name=name)))

    def publications(self):
        """What this session may open, as protobuf Publications, oldest first."""
        request = pb.Request()
        request.list_publications.SetInParent()
        return list(self._call(request).publications.items)

    def tensors(self):
        """This session's kept tensors, as protobuf KeptTensors: handle, dtype, shape, bytes, received, request, output."""
        made, first = [], 0
        while True:
            page = self._call(pb.Request(list_tensors=pb.ListTensors(first=first))).tensors
            made += page.tensors
            if not page.next:
                return made
            first = page.next

    def free(self, *handles):
        request = pb.Request(free=pb.Free())
        for handle in handles:
            handle._write(request.free.tensors.add())
        self._call(request)

    def generate(self, op, dtype="f32", dims=(), variant=0, seed=0, values="random", keep=False):
        """Arguments made by the daemon, by name: client.run(op, **client.generate(op)). values: random, extreme or small."""
        request = pb.Request(generate=pb.Generate(op=op, dtype=DTYPES[dtype][0], dims=dims, variant=variant, seed=seed,
                                                  values=("random", "extreme", "small").index(values), keep=keep))
        return self._submit(request, _read_generated, _Payload()).result()

    # ---- Priorities

    @contextlib.contextmanager
    def push_priority(self, lists):
        """`with client.push_priority({"rms_norm": ["cuda", "cpu"], "*": ["cpu"]}):` holds for the requests inside."""
        request = pb.Request(push_priority=pb.PriorityMap())
        for op, names in lists.items():
            entry = request.push_priority.entries.add(op=op)
            entry.list.SetInParent()
            entry.list.names.extend(names)
        self._call(request)
        try:
            yield self
        finally:
            if self._dead is None:
                request = pb.Request()
                request.pop_priority.SetInParent()
                self._call(request)

    def set_priority(self, op, names, server=False):
        """In the newest pushed map, or the session's base; server: for all sessions (administrators)."""
        request = pb.Request(set_priority=pb.SetPriority(op=op, scope=pb.SCOPE_SERVER if server else pb.SCOPE_SESSION))
        request.set_priority.list.SetInParent()
        request.set_priority.list.names.extend(names)
        self._call(request)

    def clear_priority(self, op, server=False):
        self._call(pb.Request(set_priority=pb.SetPriority(op=op, scope=pb.SCOPE_SERVER if server else pb.SCOPE_SESSION)))

    def get_priority(self, op):
        """PriorityReply: effective, level, stored."""
        return self._call(pb.Request(get_priority=pb.GetPriority(op=op))).priority

    # ---- Inspecting

    def ops(self):
        """OpDescriptions with name, schema and doc."""
        return list(self._empty("list_ops").ops.ops)

    def describe(self, op):
        return self._call(pb.Request(describe=pb.Describe(op=op))).op

    def providers(self):
        return list(self._empty("list_providers").providers.providers)

    def info(self):
        return self._empty("info").info

    def ping(self):
        """Seconds that it took."""
        start = time.monotonic()
        self._empty("ping")
        return time.monotonic() - start

    # ---- Administration

    def restore_provider(self, provider, op=""):
        """Ends its quarantine, or (op) that of one implementation."""
        self._call(pb.Request(restore_provider=pb.RestoreProvider(provider=provider, op=op)))

    def load_module(self, path):
        self._call(pb.Request(load_module=pb.LoadModule(path=path)))

    def set_log_level(self, level):
        self._call(pb.Request(set_log_level=pb.SetLogLevel(level=level)))

    def drain(self, timeout=0.0):
        self._call(pb.Request(drain=pb.Drain(timeout_us=int(timeout * 1e6))))

    # ---- Requests in flight

    def _empty(self, body):
        request = pb.Request()
        getattr(request, body).SetInParent()
        return self._call(request)

    def _call(self, request):
        return self._submit(request, lambda reply, payload: reply, _Payload()).result()

    def _submit(self, request, convert, payload):
        if self._dead is not None:
            raise Unavailable(self._dead)
        envelope = request.SerializeToString()
        chunk, limits = self.hello.chunk_bytes, self.hello.limits
        if len(envelope) > (limits.envelope_bytes or _ENVELOPE_BYTES):  # the server would end the connection
            raise _fail(8, f"the request's envelope has {len(envelope)} bytes, the server takes {limits.envelope_bytes}")
        self._last += 1
        chunked = bool(chunk) and payload.bytes > chunk
        future = self._futures[self._last] = Future(self, self._last, convert)
        head = _header(_REQUEST, self._last, len(envelope), payload.bytes, _CHUNKED if chunked else 0)
        self._link.send([memoryview(head + envelope)] + ([] if chunked else payload.pieces))
        if chunked:
            future.upload = _Upload(self._last, payload.pieces, chunk)
            self._link.uploads.append(future.upload)
        self._guard(self._link.flush)
        return future

    # ---- The socket

    @staticmethod
    def _deadline(timeout):
        return None if timeout is None else time.monotonic() + timeout

    def _lost(self, why):
        self._dead = f"{self.address}: {why}" if self._goaway is None else f"{self.address}: {self._goaway}"
        self._link.sock.close()
        return Unavailable(self._dead)

    def _guard(self, action):
        """OSErrors of the socket end the client; what a peer said before it left is read first."""
        try:
            return action()
        except BlockingIOError:
            return True
        except OSError as error:
            self._read_rest()
            raise self._lost(error.strerror or str(error)) from error

    def _read_rest(self):
        with contextlib.suppress(OSError):
            while self._link.fill():
                self._parse()

    def _poll(self, seconds):
        """The events of the socket that came within the time (None: whenever); 0: none."""
        if isinstance(self._link.sock, _Sealed) and self._link.sock.pending():
            return select.POLLIN  # opened already: the socket would not tell
        poll = select.poll()
        poll.register(self._link.sock, select.POLLIN | (select.POLLOUT if self._link.pending() else 0))
        events = poll.poll(None if seconds is None else max(0, int(seconds * 1000 + 0.999)))
        return events[0][1] if events else 0

    def _pump_until(self, done, deadline, raises=True):
        while not done():
            if self._dead is not None:
                raise Unavailable(self._dead)
            self._guard(self._link.flush)
            left = None if deadline is None else deadline - time.monotonic()
            if self._poll(left) & ~select.POLLOUT:
                if not self._guard(self._link.fill):
                    raise self._lost("the server closed the connection")
                self._parse()
            elif left is not None and left <= 0:
                if raises:
                    raise DeadlineExceeded(f"{self.address}: no answer in time")
                return

    def _parse(self):
        link = self._link
        while link.sink is None and link.end - link.begin >= _HEADER.size:
            magic, version, kind, flags, request, envelope, _, payload = _HEADER.unpack_from(link.stage, link.begin)
            if magic != b"OPD1" or version != 1:
                raise self._malformed(f"a frame that begins with {bytes(link.stage[link.begin:link.begin + 5])!r}")
            if envelope > (_ENVELOPE_BYTES if self.hello is not None else _HELLO_BYTES):
                raise self._malformed(f"an envelope of {envelope} bytes")
            link.begin += _HEADER.size
            memory = _allocate(envelope)
            link.receive_into(memory, lambda m=memory, f=(kind, flags, request, payload): self._on_frame(m, *f))

    def _malformed(self, what):
        self._lost(f"malformed answer from the server: {what}")
        return DataLoss(self._dead)

    def _on_frame(self, envelope, kind, flags, request, payload):
        if kind == _HELLO_REPLY and self.hello is None:
            self.hello = pb.HelloReply.FromString(bytes(envelope))
        elif kind == _GOAWAY:
            goaway = pb.Goaway.FromString(bytes(envelope))
            self._goaway = f"{STATUS[goaway.status] if goaway.status < len(STATUS) else 'UNKNOWN'}: {goaway.message}"
        elif kind == _REPLY and request in self._futures and self._futures[request].reply is None:
            self._on_reply(self._futures[request], pb.Reply.FromString(bytes(envelope)), flags, payload)
        elif kind == _DATA and request in self._futures and self._futures[request].payload is not None and len(envelope) == 8:
            self._on_data(self._futures[request], struct.unpack("<Q", envelope)[0], payload)
        else:
            raise self._malformed(f"a frame of type {kind} for request {request}, which isn't due")

    def _on_reply(self, future, reply, flags, payload):
        if future.upload in self._link.uploads:  # answered before all was sent: the rest isn't wanted
            self._link.uploads.remove(future.upload)
            self._link.send([memoryview(_header(_ABORT, future.request, 0, 0))])
        future.reply, future.payload = reply, _allocate(payload)
        if payload == 0:
            self._on_answered(future)
        elif not flags & _CHUNKED:
            self._link.receive_into(future.payload, lambda: self._on_answered(future))

    def _on_data(self, future, offset, count):
        if offset != future.received or count > len(future.payload) - offset:
            raise self._malformed(f"{count} bytes of data at {offset} for request {future.request}, {future.received} are here")
        future.received += count
        done = (lambda: self._on_answered(future)) if future.received == len(future.payload) else (lambda: None)
        self._link.receive_into(future.payload[offset:offset + count], done)

    def _on_answered(self, future):
        future.answered = True
        del self._futures[future.request]


def _read_argument(arg, payload):
    kind = arg.WhichOneof("value")
    if kind == "tensor":
        return _read_operand(arg.tensor, payload)
    if kind == "tensors":
        return [_read_operand(tensor, payload) for tensor in arg.tensors.items]
    if kind == "ints":
        return list(arg.ints.items)
    return None if kind in (None, "none") else getattr(arg, kind)


def _read_operand(tensor, payload):
    if tensor.WhichOneof("source") == "handle":
        return _read_handle(tensor.handle, tensor)
    return _present(_read_tensor(tensor, payload))


def _read_uploaded(reply, payload):
    del payload
    return _read_handle(reply.run.outputs[0].kept, reply.run.outputs[0].tensor)


def _read_generated(reply, payload):
    return {arg.name: _read_argument(arg, payload) for arg in reply.generated.args}
