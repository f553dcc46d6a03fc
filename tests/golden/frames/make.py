#!/usr/bin/env python3
"""Writes the .hex files of this folder: one frame each, made by Google's protobuf for Python, which shares no code with opd.

    make.py <folder with an opd_pb2.py made from proto/opd.proto>

test_proto decodes every file with opd's codec, encodes what it got, and wants the same bytes: a field that one of the two
would drop, or number differently, shows. Frames named `every-…` set every field of their messages.
"""
import os
import struct
import sys
import textwrap

sys.path.insert(0, sys.argv[1])
import opd_pb2 as pb  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
HELLO, HELLO_REPLY, REQUEST, REPLY, DATA, ABORT, CANCEL, GOAWAY = range(1, 9)
CHUNKED = 1


def hex_lines(data):
    return [" ".join(f"{b:02x}" for b in data[i:i + 16]) for i in range(0, len(data), 16)]


def write(name, note, kind, message=None, request=0, payload=b"", flags=0, declared=None):
    envelope = message or b""
    if not isinstance(envelope, bytes):
        envelope = message.SerializeToString(deterministic=True)
    header = struct.pack("<4sBBHQIIQ", b"OPD1", 1, kind, flags, request, len(envelope), 0,
                         len(payload) if declared is None else declared)
    with open(os.path.join(HERE, name + ".hex"), "w", encoding="utf-8") as out:
        for line in textwrap.wrap(note, 110):
            out.write("# " + line + "\n")
        for title, part in (("header", header), ("envelope", envelope), ("payload", payload)):
            if part:
                out.write(f"# {title}, {len(part)} bytes\n")
                out.write("\n".join(hex_lines(part)) + "\n")


def tensor(dtype, shape, **source):
    made = pb.Tensor(dtype=dtype, shape=shape)
    for key, value in source.items():
        if isinstance(value, (bytes, int, bool)):
            setattr(made, key, value)
        elif isinstance(value, list):
            getattr(made, key).extend(value)
        else:
            getattr(made, key).CopyFrom(value)
    return made


def none(name):
    made = pb.Argument(name=name)
    made.none.SetInParent()
    return made


def empty(field, reply=False):
    made = pb.Reply() if reply else pb.Request()
    getattr(made, field).SetInParent()
    return made


def floats(*values):
    return struct.pack(f"<{len(values)}f", *values)


def session():
    write("hello", "A client that speaks version 1 and takes the server's chunk size.", HELLO,
          pb.Hello(version_min=1, version_max=1, client="example 1.0"))
    write("every-hello", "Hello with every field that may be set.", HELLO,
          pb.Hello(version_min=1, version_max=3, features=["shm", "cancel"], client="client 2.1", chunk_bytes=65536,
                   no_chunks=True))
    write("every-hello-reply", "HelloReply with every field.", HELLO_REPLY, pb.HelloReply(
        status=14, message="draining", version=1, features=["cancel", "x"], server="opd 0.1.0", chunk_bytes=1 << 20,
        limits=pb.Limits(envelope_bytes=1 << 20, payload_bytes=1 << 32, session_bytes=1 << 33, in_flight=1024),
        session=77, tenant="uid:1000", admin=True))
    write("every-goaway", "The server is about to close.", GOAWAY, pb.Goaway(status=14, message="draining: shutting down"))


def worked_example():
    x = floats(1, 2, 3, 4, 5, 6, 7, 8)
    weight = floats(1, 1, 0.5, 2)
    run = pb.Run(op="rms_norm", args=[
        pb.Argument(tensor=tensor(pb.F32, [2, 4], payload=pb.Range(offset=0, bytes=32))),
        pb.Argument(tensor=tensor(pb.F32, [4], payload=pb.Range(offset=64, bytes=16))),
        pb.Argument(name="epsilon", float=1e-5)])
    write("request-rms-norm", "The worked example of proto/README.md: rms_norm of x = [[1, 2, 3, 4], [5, 6, 7, 8]] with weight "
          "[1, 1, 0.5, 2]; x at payload offset 0, weight at 64, 32 bytes of gap between.", REQUEST, pb.Request(run=run), 1,
          x + bytes(32) + weight)
    rows = []
    for row in ((1, 2, 3, 4), (5, 6, 7, 8)):
        scale = (sum(v * v for v in row) / 4 + 1e-5) ** -0.5
        rows += [v * scale * w for v, w in zip(row, (1, 1, 0.5, 2))]
    write("reply-rms-norm", "Its reply, from provider cpu.", REPLY, pb.Reply(run=pb.RunReply(provider="cpu", outputs=[
        pb.Result(tensor=tensor(pb.F32, [2, 4], payload=pb.Range(offset=0, bytes=32)))])), 1, floats(*rows))
    write("request-chunked", "A request whose 2 MiB of payload follow in DATA frames.", REQUEST, pb.Request(run=pb.Run(
        op="relu", args=[pb.Argument(tensor=tensor(pb.F32, [512, 1024], payload=pb.Range(offset=0, bytes=1 << 21)))])), 9,
        flags=CHUNKED, declared=1 << 21)
    write("data", "The 16 bytes at offset 1 MiB of request 9's payload.", DATA, struct.pack("<Q", 1 << 20), 9, bytes(range(16)))
    write("abort", "The rest of request 9's payload won't come.", ABORT, None, 9)
    write("cancel", "Request 9's result isn't wanted.", CANCEL, None, 9)


def every_run():
    tensors = [
        tensor(pb.BF16, [2, 3], strides=[3, 1], byte_offset=2, inline=bytes(range(14)), donate=True),
        tensor(pb.F64, [], payload=pb.Range(offset=128, bytes=8)),
        tensor(pb.DTYPE_NONE, [], handle=pb.Handle(index=5, generation=0xfedcba9876543210)),
        tensor(pb.I64, [1, 2, 3, 4, 5, 6, 7, 0], result=pb.ResultRef(request=1 << 40, output=2)),
        tensor(pb.F8_E5M2, [0, -1, -(1 << 63)], shared=pb.SharedRange(region=3, offset=1 << 50, bytes=9)),
        tensor(pb.U8, [7], strides=[0])]
    args = [
        pb.Argument(tensor=tensors[0]),
        pb.Argument(name="list", tensors=pb.TensorList(items=tensors)),
        pb.Argument(name="none_at_all", tensors=pb.TensorList()),
        pb.Argument(name="int", int=-(1 << 63)),
        pb.Argument(name="float", float=-0.1),
        pb.Argument(name="bool", bool=True),
        pb.Argument(name="no", bool=False),
        pb.Argument(name="str", str="grüße, 世界 \U0001f600"),
        pb.Argument(name="ints", ints=pb.IntList(items=[0, -1, 1 << 62])),
        none("none")]
    write("every-run", "Run with every field, every kind of argument and every source of a tensor.", REQUEST, pb.Request(
        run=pb.Run(op="some_op", args=args, priority=pb.ProviderList(names=["onednn", "cpu"]), strict=True, mode=pb.DRY,
        explain=True,
        device="cuda:1", outputs=[pb.OutputOption(keep=True), pb.OutputOption(no_copy=True), pb.OutputOption(),
            pb.OutputOption(shared=pb.SharedRange(region=1, offset=1 << 40, bytes=64))], retry=True,
        allow_tf32=True, timeout_us=1 << 63, uuid=True, inline_results=True, service_class=pb.BATCH)), (1 << 64) - 1)
    write("run-empty-list", "A priority list that is there and empty: native, with a warning.", REQUEST,
          pb.Request(run=pb.Run(op="relu", priority=pb.ProviderList(), mode=pb.FAKE)), 2)


def requests():
    handle = tensor(pb.DTYPE_NONE, [], handle=pb.Handle(index=1, generation=2))
    ref = tensor(pb.DTYPE_NONE, [], result=pb.ResultRef(request=3, output=1))
    lists = [pb.PriorityEntry(op="*", list=pb.ProviderList(names=["cpu"])), pb.PriorityEntry(op="relu", list=pb.ProviderList())]
    for number, (name, note, message) in enumerate([
            ("free", "Free of a handle and of a result.", pb.Request(free=pb.Free(tensors=[handle, ref]))),
            ("push-priority", "A pushed map.", pb.Request(push_priority=pb.PriorityMap(entries=lists))),
            ("pop-priority", "And back.", empty("pop_priority")),
            ("set-priority", "Every field of SetPriority.", pb.Request(set_priority=pb.SetPriority(
                scope=pb.SCOPE_SERVER, op="relu", list=pb.ProviderList(names=["cpu", "native"]), session=7))),
            ("clear-priority", "SetPriority without a list.", pb.Request(set_priority=pb.SetPriority(op="relu"))),
            ("get-priority", "GetPriority.", pb.Request(get_priority=pb.GetPriority(op="relu"))),
            ("list-ops", "ListOps.", empty("list_ops")),
            ("describe", "Describe.", pb.Request(describe=pb.Describe(op="rms_norm"))),
            ("list-providers", "ListProviders.", empty("list_providers")),
            ("ping", "Ping.", empty("ping")),
            ("info", "Info.", empty("info")),
            ("generate", "Every field of Generate.", pb.Request(generate=pb.Generate(
                op="linear", dtype=pb.F16, dims=[3, 0, 5], variant=2, seed=1 << 63, values=1, keep=True))),
            ("load-module", "LoadModule.", pb.Request(load_module=pb.LoadModule(path="/usr/lib/opd/provider.so"))),
            ("set-log-level", "SetLogLevel.", pb.Request(set_log_level=pb.SetLogLevel(level="debug"))),
            ("drain", "Drain.", pb.Request(drain=pb.Drain(timeout_us=5000000))),
            ("no-body", "A request without a body.", pb.Request()),
            ("upload", "An upload in parts.", pb.Request(upload=pb.Upload(tensor=tensor(pb.F32, [1 << 20, 64]), parts=True))),
            ("write", "The payload's 16 bytes go to byte 4 GiB of the tensor.", pb.Request(write=pb.Write(
                handle=pb.Handle(index=1, generation=2), offset=1 << 32, data=tensor(pb.U8, [16], payload=pb.Range(offset=0, bytes=16))))),
            ("fetch", "A view of a kept tensor: its second row of four.", pb.Request(fetch=pb.Fetch(tensor=tensor(
                pb.F32, [1, 4], strides=[4, 1], byte_offset=16, handle=pb.Handle(index=1, generation=2))))),
            ("list-tensors", "The second page.", pb.Request(list_tensors=pb.ListTensors(first=4096))),
            ("attach-memory", "1 GiB of a memfd, which a real one would have with it.", pb.Request(attach_memory=pb.AttachMemory(bytes=1 << 30))),
            ("detach-memory", "And away.", pb.Request(detach_memory=pb.DetachMemory(region=7))),
            ("publish", "Every field of Publish.", pb.Request(publish=pb.Publish(tensor=handle, name="llama/layer0.qkv", all=True, lasting=True))),
            ("open-name", "OpenTensor by name.", pb.Request(open_tensor=pb.OpenTensor(name="llama/norm"))),
            ("open-contents", "OpenTensor by contents.", pb.Request(open_tensor=pb.OpenTensor(sha256=bytes(range(32))))),
            ("withdraw", "Withdraw.", pb.Request(withdraw=pb.Withdraw(name="llama/norm"))),
            ("list-publications", "ListPublications.", empty("list_publications")),
            ("attach-rings", "256 KiB each way, polled for 20 us; a memfd would come with it.",
             pb.Request(attach_rings=pb.AttachRings(request_bytes=1 << 18, reply_bytes=1 << 18, poll_us=20)))]):
        write("request-" + name, note, REQUEST, message, 10 + number)


def op_description():
    return pb.OpDescription(
        name="rms_norm", schema="rms_norm(Tensor x) -> Tensor", doc="Root mean square.", implementations=[
            pb.Implementation(provider="native", supported=True),
            pb.Implementation(provider="cuda", supported=True, reason="why", predicate=True, plan_may_refuse=True, in_place=True,
                              thread_invariant=True, batch_invariant=True, device="cuda", schema="s", uuid="ab" * 32,
                              bf16_denormals_zero=True)],
        effective=["cuda", "native"], level=pb.SERVER, activations="x", in_place=[pb.InPlace(param="x", result=1)],
        dims=["rows", "hidden"], default_dims=[32, 4096])


def replies():
    explain = pb.Explain(
        skipped=[pb.Skip(provider="onednn", code=5, reason="dtype: weight bf16, x f32"), pb.Skip(provider="cuda", code=1)],
        effective=["onednn", "cpu"], level=pb.SESSION,
        times=pb.Times(decode=1, dispatch=2, queue=3, kernel=1 << 40, moves=5, pack=6),
        moves=[pb.Move(operand="x", to="cuda:0", bytes=99, **{"from": "cpu"})], device="cpu", on_loop=True)
    outputs = [pb.Result(tensor=tensor(pb.F32, [3], inline=bytes(12)), kept=pb.Handle(index=9, generation=1 << 63)),
               pb.Result(tensor=tensor(pb.I64, [1, 1]))]
    generated = [pb.Argument(name="x", tensor=tensor(pb.F32, [4], payload=pb.Range(offset=64, bytes=16))), none("weight"),
                 pb.Argument(name="epsilon", float=1e-6)]
    for number, (name, note, message) in enumerate([
            ("run", "RunReply with every field, explain among them.", pb.Reply(run=pb.RunReply(
                provider="cpu", outputs=outputs, explain=explain, uuid="0123456789abcdef"))),
            ("error", "A failure.", pb.Reply(status=3, message="rms_norm: weight has shape [4095], expected [4096]")),
            ("priority", "PriorityReply with every field.", pb.Reply(priority=pb.PriorityReply(
                effective=["cpu", "native"], level=pb.CONFIGURATION, stored=["gone", "cpu"]))),
            ("ops", "OpList.", pb.Reply(ops=pb.OpList(ops=[
                pb.OpDescription(name="relu", schema="s", doc="d"), op_description()]))),
            ("op", "OpDescription with every field.", pb.Reply(op=op_description())),
            ("providers", "Providers with every field.", pb.Reply(providers=pb.Providers(providers=[pb.Provider(
                name="cuda", version="12.4", available=True, reason="libcuda.so.1 not found", source="/lib/opd/cuda.so",
                ops=["relu", "add"], devices=["cuda:0", "cuda:1"])]))),
            ("info", "Info with every field.", pb.Reply(info=pb.Info(
                version="0.1.0", uptime_us=1, listeners=["unix:/run/opd.sock", "tcp://127.0.0.1:7777"], loops=2, threads=3,
                devices=["cpu"], sessions=4, requests=5, memory_bytes=6, memory_limit_bytes=7, session_memory_bytes=8, pid=9,
                draining=True, graph_runs=10, graph_dispatches=11, derived_copies=12, derived_bytes=13, derived_found=14,
                derived_made=15, unhealthy=["memory: full", "lane: stuck"], degraded=["device cuda:1: lost"],
                stuck=16, compared=17, diverged=18, left_out=19, device_states=[pb.DeviceState(
                    name="cuda:1", memory_bytes=20, cached_bytes=21, memory_limit_bytes=22, jobs=23, lost="illegal access")]))),
            ("generated", "Generated.", pb.Reply(generated=pb.Generated(args=generated))),
            ("empty", "Nothing more to say than OK.", empty("empty", reply=True)),
            ("tensors", "KeptTensors with every field.", pb.Reply(tensors=pb.KeptTensors(tensors=[
                pb.KeptTensor(handle=pb.Handle(index=7, generation=1 << 63), dtype=pb.BF16, shape=[2, 0, 3], bytes=12, received=4, request=5,
                              output=1),
                pb.KeptTensor(handle=pb.Handle(index=9, generation=3), dtype=pb.U8)], next=10))),
            ("memory", "MemoryAttached.", pb.Reply(memory=pb.MemoryAttached(region=7, bytes=1 << 30))),
            ("publications", "Publications with every field.", pb.Reply(publications=pb.Publications(items=[
                pb.Publication(name="w", sha256=bytes(range(32)), dtype=pb.BF16, shape=[2, 3], bytes=12, all=True, lasting=True,
                               tenant="uid:1000", holders=4, handle=pb.Handle(index=7, generation=1 << 63))]))),
            ("rings", "RingsAttached; two descriptors would come with it.", pb.Reply(rings=pb.RingsAttached(poll_us=20))),
            ("exhausted", "A failure that time heals.", pb.Reply(status=8, message="quota", retry_after_us=1 << 20))]):
        write("every-reply-" + name, note, REPLY, message, 40 + number)


def node(place, output=0, **view):
    return tensor(view.pop("dtype", pb.DTYPE_NONE), view.pop("shape", []), node=pb.NodeOutput(node=place, output=output), **view)


def graph_input(place, **view):
    made = tensor(pb.DTYPE_NONE, [], **view)
    made.graph_input = place
    return made


def graphs():
    graph = pb.Graph(
        name="decode", inputs=[
            pb.GraphInput(name="x"),
            pb.GraphInput(name="cache", kind=pb.GRAPH_STATE, tensor=tensor(pb.DTYPE_NONE, [], handle=pb.Handle(index=1, generation=2))),
            pb.GraphInput(name="w", kind=pb.GRAPH_CONSTANT, tensor=tensor(pb.DTYPE_NONE, [], result=pb.ResultRef(request=3, output=1)))],
        nodes=[
            pb.GraphNode(name="layer0.norm", op="rms_norm", args=[
                pb.Argument(tensor=graph_input(0)), pb.Argument(tensor=graph_input(2)), pb.Argument(name="epsilon", float=1e-5)],
                priority=pb.ProviderList(names=["cpu", "native"]), strict=True, device="cpu", allow_tf32=True),
            pb.GraphNode(op="add", args=[pb.Argument(tensor=graph_input(1, donate=True)),
                                         pb.Argument(tensor=node(0, dtype=pb.F32, shape=[4, 2], strides=[1, 4], byte_offset=8))])],
        outputs=[pb.GraphOutput(name="y", node=pb.NodeOutput(node=1)), pb.GraphOutput(node=pb.NodeOutput(node=0, output=2))])
    write("request-register-graph", "A graph with every field, every kind of input, a view and a donation.", REQUEST,
          pb.Request(register_graph=pb.RegisterGraph(graph=graph)), 60)
    write("request-run-graph", "A run of it with every field of a registered graph's.", REQUEST, pb.Request(run_graph=pb.RunGraph(
        graph=60, inputs=[pb.Argument(name="x", tensor=tensor(pb.F32, [2, 4], payload=pb.Range(offset=0, bytes=32)))],
        outputs=[pb.OutputOption(keep=True), pb.OutputOption(no_copy=True)], mode=pb.DRY, explain=True, timeout_us=7, service_class=pb.REALTIME,
        inline_results=True)), 61, bytes(32))
    write("request-run-graph-once", "A run of a graph that isn't registered.", REQUEST,
          pb.Request(run_graph=pb.RunGraph(once=graph)), 62)
    write("request-free-graph", "FreeGraph.", REQUEST, pb.Request(free_graph=pb.FreeGraph(graph=60)), 63)
    write("every-reply-graph", "GraphRegistered.", REPLY, pb.Reply(graph=pb.GraphRegistered(graph=60, nodes=2, bytes=4096)), 60)
    explain = pb.Explain(skipped=[pb.Skip(provider="onednn", code=5, reason="dtype: x f64")], effective=["cpu"], level=pb.NODE,
                         times=pb.Times(kernel=700), device="cpu")
    write("every-reply-run-graph", "A run's reply with what graphs have.", REPLY, pb.Reply(run=pb.RunReply(
        outputs=[pb.Result(tensor=tensor(pb.F32, [1], inline=bytes(4)))], graph=pb.GraphExplain(
            nodes=[pb.NodeExplain(node="layer0.norm", op="rms_norm", provider="cpu", explain=explain)], node_count=2, dispatched=True,
            arena_bytes=128, unshared_bytes=256, prepare_ns=999), states=[pb.Handle(index=1, generation=3)])), 61)


session()
worked_example()
every_run()
requests()
replies()
graphs()
