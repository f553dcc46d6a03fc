#!/usr/bin/env python3
"""opd-llama with the small model of tests/models: every byte as the reference has it, over every way to a daemon.

    OPD_BIN=build/bin/opd test_llama.py"""
import json
import os
import shutil
import signal
import subprocess
import tempfile
import unittest

import harness
from harness import Daemon

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MODEL = os.path.join(ROOT, "tests", "models", "kjv-llama")
OPD = os.environ["OPD_BIN"]
LLAMA = os.path.join(os.path.dirname(OPD), "opd-llama")
with open(os.path.join(MODEL, "reference.json"), encoding="utf-8") as source:
    REFERENCE = json.load(source)
MODULES = os.path.join(os.path.dirname(os.path.dirname(OPD)), "lib", "opd")
# Which bytes come out is the release build's to prove; a sanitizer looks at the ways they take, and is twenty times as slow: one prompt, and a block of the cache more.
SHORT = harness.SANITIZED and not harness.LONG
COUNT = 17 if SHORT else 160
CASES = REFERENCE[:1] if SHORT else REFERENCE
FEW = REFERENCE[:1] if SHORT else REFERENCE[:2]


def llama(*arguments, model=MODEL):
    environment = {key: value for key, value in os.environ.items() if key != "OPD_ADDRESS"}
    return subprocess.run([LLAMA, "--model", model, *arguments], capture_output=True, timeout=600, env=environment, check=False)


class Llama(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.unix = "unix:" + os.path.join(cls.folder, "opd.sock")
        cls.daemon = Daemon(listen=[cls.unix, "tcp://127.0.0.1:0"], folder=cls.folder)
        cls.addClassCleanup(cls.stop)
        cls.tcp, = cls.daemon.tcp_addresses()

    @classmethod
    def stop(cls):
        cls.daemon.signal(signal.SIGTERM)
        code = cls.daemon.wait()
        if code != 0:
            raise AssertionError(f"the daemon ended with {code}: {cls.daemon.output()}")

    def expect(self, case, *arguments, count=COUNT):
        done = llama("--prompt", case["prompt"], "-n", str(count), *arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.decode("latin-1"), case["greedy"][:count])
        return done.stderr.decode()

    def test_every_prompt_over_a_unix_socket(self):
        for case in CASES:
            self.assertEqual(self.expect(case, "--connect", self.unix), "")

    def test_over_tcp_and_in_this_process(self):
        for case in FEW:
            self.expect(case, "--connect", self.tcp)
            self.expect(case, "--connect", "embedded:")

    def test_with_inputs_in_shared_memory(self):
        for case in FEW:
            self.expect(case, "--connect", self.unix, "--shm")
        done = llama("--connect", self.tcp, "--prompt", "x", "--shm")
        self.assertEqual((done.returncode, done.stdout), (1, b""))
        self.assertIn("FAILED_PRECONDITION", done.stderr.decode())

    def test_through_rings_asleep_and_polling(self):
        for case in FEW:
            self.expect(case, "--connect", self.unix, "--rings")
        self.expect(REFERENCE[2], "--connect", self.unix, "--shm", "--rings", "--poll", "50")
        self.expect(REFERENCE[3], "--connect", self.unix + "?rings&poll=1ms&shm", "--shm")

    def test_native_alone(self):
        for case in CASES:
            self.expect(case, "--connect", self.unix, "--provider", "native")

    def test_through_the_default_lists_with_the_libraries_that_they_name(self):
        """Products go to whichever module the lists prefer for so many rows: prompts to one, single tokens to another."""
        names = [name for name in ("onednn", "openblas") if os.path.exists(os.path.join(MODULES, f"opd-provider-{name}.so"))]
        if not names or "thread" in os.environ.get("OPD_TEST_SANITIZED", ""):
            self.skipTest("no module is built here, or its library's threads aren't ThreadSanitizer's to judge")
        daemon = Daemon(*(word for name in names for word in ("--module", f"{name}={MODULES}/opd-provider-{name}.so")))
        self.addCleanup(daemon.stop)
        for case in CASES:
            self.expect(case, "--connect", daemon.address)

    def test_one_step_at_a_time_and_many(self):
        for ahead in ("1", "2", "64"):
            self.expect(REFERENCE[2], "--connect", self.unix, "--ahead", ahead)
        self.expect(REFERENCE[3], "--connect", self.unix, count=1)

    def test_a_token_at_a_time_or_a_whole_prompt_are_the_same(self):
        """A longer prompt, part of which the model itself has made."""
        case = REFERENCE[0]
        for cut in (1, COUNT // 4, COUNT - 10):
            done = llama("--connect", self.unix, "--prompt", case["prompt"] + case["greedy"][:cut], "-n", str(COUNT - cut))
            self.assertEqual(done.stdout.decode("latin-1"), case["greedy"][cut:COUNT], done.stderr)

    def test_trace_and_stats_go_to_stderr(self):
        words = self.expect(REFERENCE[0], "--connect", self.unix, "--trace", "--stats", count=3)
        for word in ("layer3.attention", "paged_attention", "layer0.cache", "cpu", "tokens/s", "outside"):
            self.assertIn(word, words)
        words = self.expect(REFERENCE[0], "--connect", self.unix, "--trace", "--provider", "native", count=2)
        self.assertNotIn(" cpu ", words)

    def test_a_random_model_is_made_from_its_seed(self):
        folder = tempfile.mkdtemp(dir=self.folder)
        config = os.path.join(folder, "tiny.json")
        with open(config, "w", encoding="utf-8") as file:
            json.dump({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
                       "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}, file)
        os.symlink(config, os.path.join(folder, "config.json"))

        def made(*arguments, where=config):
            done = subprocess.run([LLAMA, "--connect", self.unix, "--random", where, "--ids", "1,2,3", "-n", "12", *arguments], capture_output=True, timeout=600, check=False)
            self.assertEqual(done.returncode, 0, done.stderr)
            return done.stdout.split(), done.stderr.decode()

        ids, words = made("--stats")
        self.assertEqual(len(ids), 12)
        layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96 + 2 * 64
        self.assertIn(f"weights {(2 * layer + 302 * 64) * 4 / 1e6:.1f} MB a token", words)
        self.assertIn("threads read here", words)
        self.assertEqual(made(where=folder)[0], ids)
        self.assertEqual(len(made("--provider", "native")[0]), 12)
        self.assertNotEqual(made("--seed", "2")[0], ids)
        for dtype in ("bf16", "f16"):
            self.assertEqual(len(made("--dtype", dtype)[0]), 12)
        self.assertEqual(subprocess.run([LLAMA, "--random", config, "--model", folder, "--ids", "1"], capture_output=True, check=False).returncode, 2)

    def test_clients_share_published_weights(self):
        """The second finds what the first has published, and memory is taken once."""
        opctl = os.environ["OPCTL_BIN"]

        def ask(*words):
            return json.loads(subprocess.run([opctl, "--connect", self.unix, "--json", *words], capture_output=True, check=True, timeout=60).stdout)

        for case in REFERENCE[:2]:
            self.expect(case, "--connect", self.unix, "--share", "kjv")
            listed = ask("tensors")
            held = sum(item["bytes"] for item in listed)
            self.assertEqual(len(listed), 4 * 6 + 3)
        both = [subprocess.Popen([LLAMA, "--connect", self.unix, "--model", MODEL, "--share", "kjv", "--prompt", case["prompt"], "-n", str(COUNT)],
                                 stdout=subprocess.PIPE) for case in REFERENCE[2:4]]
        for process, case in zip(both, REFERENCE[2:4]):
            self.assertEqual(process.communicate(timeout=300)[0].decode("latin-1"), case["greedy"][:COUNT])
        self.assertEqual(sum(item["bytes"] for item in ask("tensors")), held)
        ask("rm", "kjv/")
        self.assertEqual(ask("tensors"), [])

    def test_ids_in_place_of_text(self):
        case = REFERENCE[1]
        done = llama("--connect", self.unix, "--ids", ",".join(str(byte) for byte in case["prompt"].encode("latin-1")), "-n", "20")
        self.assertEqual(done.stdout.decode("latin-1"), case["greedy"][:20], done.stderr)

    def test_what_is_wrong_is_named(self):
        prompt = ["--connect", self.unix, "--prompt", "x"]
        for arguments, code, words in [
                (["--connect", self.unix, "--prompt", ""], 1, "prompt is empty"),
                ([*prompt, "-n", "600"], 1, "512 positions"),
                ([*prompt, "-n", "0"], 2, "-n"),
                ([*prompt, "--ids", "1"], 2, "either --prompt or --ids"),
                (["--connect", self.unix, "--ids", "1,256"], 1, "number 2"),
                ([*prompt, "--provider", "nobody"], 1, "nobody"),
                ([*prompt, "--dtype", "i8"], 2, "--dtype"),
                (["--connect", "unix:/nonexistent/s", "--prompt", "x"], 1, "/nonexistent/s")]:
            done = llama(*arguments)
            self.assertEqual((done.returncode, done.stdout), (code, b""), arguments)
            self.assertIn(words, done.stderr.decode())
        done = llama(*prompt, model="/nonexistent")
        self.assertEqual(done.returncode, 1)
        self.assertIn("/nonexistent/config.json", done.stderr.decode())

    def test_models_that_do_not_fit_are_refused_by_name(self):
        folder = tempfile.mkdtemp(dir=self.folder)
        with open(os.path.join(MODEL, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        for change, words in [({"hidden_size": None}, "hidden_size"), ({"rope_scaling": {"factor": 8}}, "rope_scaling"), ({"hidden_act": "gelu"}, "hidden_act"),
                              ({"num_key_value_heads": 4}, "heads"), ({"num_hidden_layers": 1.5}, "whole number"), ({"vocab_size": 300}, "model.embed_tokens.weight"),
                              ({"num_hidden_layers": 5}, "model.layers.4.input_layernorm.weight")]:
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                json.dump({**config, **change}, file)
            weights = os.path.join(folder, "model.safetensors")
            if not os.path.exists(weights):
                os.symlink(os.path.join(MODEL, "model.safetensors"), weights)
            done = llama("--connect", self.unix, "--prompt", "x", model=folder)
            self.assertEqual(done.returncode, 1, words)
            self.assertIn(words, done.stderr.decode())
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            file.write("{")
        self.assertIn("no JSON object", llama("--connect", self.unix, "--prompt", "x", model=folder).stderr.decode())


if __name__ == "__main__":
    unittest.main()
