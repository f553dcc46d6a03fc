#!/usr/bin/env python3
"""A real model as two registered graphs: prefill and decode of tests/models/kjv-llama share a KV cache of donated states, every step names the one before's argmax, and
each byte is the reference's.

    OPD_BIN=build/bin/opd PYTHONPATH=build/python test_graph_model.py"""
import json
import os
import signal
import struct
import subprocess
import tempfile
import time
import unittest

import numpy as np

import opd
from harness import LONG, SANITIZED

MODEL = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models", "kjv-llama")
BLOCKS, BLOCK = 32, 16
COUNT = 32 if SANITIZED and not LONG else 160
EVERYTHING = {"*": ["native"]}


def weights():
    """All tensors as f32."""
    with open(os.path.join(MODEL, "model.safetensors"), "rb") as file:
        size, = struct.unpack("<Q", file.read(8))
        header, data = json.loads(file.read(size)), file.read()
    made = {}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == "BF16"
            begin, end = entry["data_offsets"]
            made[name] = (np.frombuffer(data[begin:end], "uint16").astype("uint32") << 16).view("float32").reshape(entry["shape"])
    return made


class Model:
    """Weights and caches of one session, and its two graphs."""

    def __init__(self, client):
        with open(os.path.join(MODEL, "config.json"), encoding="utf-8") as file:
            self.config = json.load(file)
        self.client = client
        c = self.config
        self.weights = {name: client.upload(value).result() for name, value in weights().items()}
        angles = np.outer(np.arange(c["max_position_embeddings"]), c["rope_theta"] ** (-np.arange(0, c["head_dim"], 2) / c["head_dim"]))
        self.rotary = client.upload(np.concatenate([np.cos(angles), np.sin(angles)], 1).astype("float32")).result()
        empty = np.zeros((BLOCKS, BLOCK, c["num_key_value_heads"], c["head_dim"]), "float32")
        self.caches = [[client.upload(empty).result() for _ in "kv"] for _ in range(c["num_hidden_layers"])]
        self.graphs = [client.register(self.describe(name)) for name in ("prefill", "decode")]

    def describe(self, name):
        c, graph = self.config, opd.Graph(name)
        given = {key: graph.input(key) for key in ("ids", "positions", "slots", "table", "lengths", "starts")}
        last = graph.input("last") if name == "prefill" else None
        weight = {key: graph.constant(key, handle) for key, handle in self.weights.items()}
        rotary = graph.constant("rotary", self.rotary)
        eps, heads, kv, dim = c["rms_norm_eps"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        residual = graph.node("embedding", given["ids"], weight["model.embed_tokens.weight"], name="embed")
        x = graph.node("rms_norm", residual, weight["model.layers.0.input_layernorm.weight"], eps, name="first_norm")
        for layer in range(c["num_hidden_layers"]):
            own, place = f"model.layers.{layer}.", f"layer{layer}."
            q, k, v = (graph.node("linear", x, weight[own + f"self_attn.{part}_proj.weight"], name=place + part) for part in "qkv")
            turned = graph.node("rotary_embedding", given["positions"], q.donate(), k.donate(), dim, rotary, name=place + "rotary")
            keys, values = (graph.state(f"{place}{part}_cache", handle) for part, handle in zip("kv", self.caches[layer]))
            cache = graph.node("reshape_and_cache", turned.output(1).view("f32", [-1, kv, dim]), v.view("f32", [-1, kv, dim]), keys.donate(),
                               values.donate(), given["slots"], name=place + "cache")
            seen = graph.node("paged_attention", turned.view("f32", [-1, heads, dim]), cache, cache.output(1), given["table"], given["lengths"],
                              given["starts"], dim ** -0.5, name=place + "attention")
            out = graph.node("linear", seen.view("f32", [-1, heads * dim]), weight[own + "self_attn.o_proj.weight"], name=place + "out")
            normed = graph.node("fused_add_rms_norm", out.donate(), residual.donate(), weight[own + "post_attention_layernorm.weight"], eps,
                                name=place + "norm")
            x, residual = normed, normed.output(1)
            gate, up = (graph.node("linear", x, weight[own + f"mlp.{part}_proj.weight"], name=place + part) for part in ("gate", "up"))
            act = graph.node("mul", graph.node("silu", gate, name=place + "silu"), up, name=place + "act")
            down = graph.node("linear", act, weight[own + "mlp.down_proj.weight"], name=place + "down")
            after = f"model.layers.{layer + 1}.input_layernorm.weight" if layer + 1 < c["num_hidden_layers"] else "model.norm.weight"
            normed = graph.node("fused_add_rms_norm", down.donate(), residual.donate(), weight[after], eps, name=place + "after")
            x, residual = normed, normed.output(1)
        if last is not None:
            x = graph.node("embedding", last, x, name="last_row")
        logits = graph.node("linear", x, weight["lm_head.weight"], name="head")
        graph.output(graph.node("argmax", logits, name="next"), "next")
        graph.output(logits, "logits")
        return graph

    def step(self, graph, ids, first, count, **more):
        positions = np.arange(first, first + count, dtype="int64")
        return graph.submit(ids=ids, positions=positions, slots=positions, table=np.arange(BLOCKS, dtype="int32")[None, :],
                            lengths=np.array([first + count], "int32"), starts=np.array([0, count], "int32"), keep=[0], **more)

    def generate(self, prompt, count):
        """The bytes, and the logits behind the prompt. Steps are in flight before their ids are known."""
        prefill, decode = self.graphs
        ids = np.frombuffer(prompt, "uint8").astype("int64")
        futures = [self.step(prefill, ids, 0, len(ids), attrs={"last": np.array([len(ids) - 1], "int64")})]
        for i in range(count - 1):
            futures.append(self.step(decode, futures[-1].output(0), len(ids) + i, 1))
        results = [future.result() for future in futures]
        self.client.free(*(result.handles[0] for result in results))
        return bytes(int(result[0][0]) for result in results), results[0][1][0]


class KjvLlama(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.address = "unix:" + os.path.join(folder.name, "opd.sock")
        self.daemon = subprocess.Popen([os.environ["OPD_BIN"], "--listen", self.address], stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        self.addCleanup(self.stop)
        limit = time.monotonic() + 20
        while True:
            try:
                self.client = opd.Client(self.address, timeout=120)
                break
            except opd.Unavailable:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.02)
        self.addCleanup(self.client.close)
        with open(os.path.join(MODEL, "reference.json"), encoding="utf-8") as file:
            self.reference = json.load(file)

    def stop(self):
        self.daemon.send_signal(signal.SIGTERM)
        self.assertEqual(self.daemon.wait(40), 0)

    def check(self, model, cases):
        for case in cases:
            wanted = case["greedy"].encode("latin-1")[:COUNT]
            text, logits = model.generate(case["prompt"].encode("latin-1"), len(wanted))
            np.testing.assert_allclose(logits, case["prompt_logits_last"], atol=2e-3)
            self.assertEqual(text, wanted)

    def test_every_byte_is_the_references_with_the_default_priorities(self):
        model = Model(self.client)
        self.check(model, self.reference)
        info = self.client.info()
        lengths = {len(case["prompt"]) for case in self.reference}
        self.assertEqual(info.graph_dispatches, len(lengths) + 1)  # a prefill for each length, one decode for all
        self.assertEqual(info.graph_runs, sum(min(len(case["greedy"]), COUNT) for case in self.reference))

    def test_every_byte_is_the_references_through_native_alone(self):
        with self.client.push_priority(EVERYTHING):
            self.check(Model(self.client), self.reference[:2])


if __name__ == "__main__":
    unittest.main()
