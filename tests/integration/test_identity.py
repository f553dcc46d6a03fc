#!/usr/bin/env python3
"""Who a client is (token, certificate, Unix peer) and what it may do: every right denied and granted, against the real daemon."""
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import certificates
import harness
from harness import Client, Daemon, Failed, check_healthy, pb, rms_norm, run, tensor

OPCTL = os.environ.get("OPCTL_BIN", os.path.join(os.path.dirname(harness.OPD), "opctl"))
RIGHTS = ("publish", "defaults", "modules", "sessions", "log", "drain", "operate")


def token_of(name):
    return "opd_" + hashlib.sha256(b"a test's token of " + name.encode()).hexdigest()


def line_of(name, token=None):
    return "%s sha256:%s\n" % (name, hashlib.sha256((token or token_of(name)).encode()).hexdigest())


def opctl(*words, **environment):
    done = subprocess.run([OPCTL, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=harness.PATIENCE, check=False, env=dict(os.environ, OPD_ADDRESS="", **environment))
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="opd-identity-")
        self.addCleanup(shutil.rmtree, self.folder, True)
        self.tokens = os.path.join(self.folder, "tokens")

    def write_tokens(self, *lines, mode=0o600):
        with open(self.tokens + ".new", "w") as file:
            file.write("# made by a test\n\n" + "".join(lines))
        os.chmod(self.tokens + ".new", mode)
        os.rename(self.tokens + ".new", self.tokens)

    def start(self, config="", *flags, names=()):
        if names:
            self.write_tokens(*(line_of(name) for name in names))
            config += "tokens: %s\n" % self.tokens
        daemon = Daemon(*flags, config=config)
        self.addCleanup(daemon.stop, None)
        return daemon

    def as_(self, name, daemon, address=None, **fields):
        client = Client(address or daemon.address, token=token_of(name), **fields)
        self.addCleanup(client.close)
        return client

    def refused(self, status, words, address, **fields):
        with self.assertRaises(Failed) as caught:
            Client(address, **fields).close()
        self.assertEqual(caught.exception.status, status, caught.exception.text)
        self.assertIn(words, caught.exception.text)

    def denied(self, client, request, words, payload=b""):
        reply, _ = client.call(request, payload)
        self.assertEqual(reply.status, harness.PERMISSION_DENIED, reply.message)
        for word in words if isinstance(words, tuple) else (words,):
            self.assertIn(word, reply.message)

    def granted(self, client, request, payload=b""):
        reply, _ = client.call(request, payload)
        self.assertNotEqual(reply.status, harness.PERMISSION_DENIED, reply.message)
        return reply


class Tokens(Case):
    def test_a_token_says_who_the_client_is(self):
        daemon = self.start("identities:\n  alice: {tenant: research, rights: [publish, log]}\n", names=["alice", "bob"])
        hello = self.as_("alice", daemon).hello
        self.assertEqual((hello.identity, hello.tenant, list(hello.rights), hello.admin), ("alice", "research", ["publish", "log"], True))
        hello = self.as_("bob", daemon).hello  # no entry: a user
        self.assertEqual((hello.identity, hello.tenant, list(hello.rights), hello.admin), ("bob", "bob", ["publish"], False))
        check_healthy(self, daemon)

    def test_a_wrong_token_is_nobody_and_not_anonymous(self):
        daemon = self.start(names=["alice"])
        good = token_of("alice")
        for token in (good[:-1], good + "0", good.upper(), "x", " " + good, "opd_" + "0" * 64):
            self.refused(harness.UNAUTHENTICATED, "not one that this server knows", daemon.address, token=token)
        self.refused(harness.UNAUTHENTICATED, "at most 256", daemon.address, token="x" * 257)
        self.refused(harness.UNAUTHENTICATED, "not one that this server knows", self.start().address, token=good)  # a daemon without tokens
        self.assertNotIn(good, daemon.log_text())
        check_healthy(self, daemon)

    def fails(self, *words):
        code = subprocess.run([harness.OPD, "--listen", "unix:" + self.folder + "/s", "--tokens", self.tokens], stderr=subprocess.PIPE, timeout=harness.PATIENCE, check=False)
        self.assertEqual(code.returncode, 2)
        for word in words:
            self.assertIn(word, code.stderr.decode())

    def test_a_file_that_others_may_read_or_write_is_refused(self):
        for mode in (0o644, 0o660, 0o602, 0o601):
            self.write_tokens(line_of("alice"), mode=mode)
            self.fails(self.tokens, "0%o" % mode, "0600")
        if os.geteuid() == 0:
            self.write_tokens(line_of("alice"))
            os.chown(self.tokens, 12345, 12345)
            self.fails("belongs to user 12345")
        os.unlink(self.tokens)
        self.fails(self.tokens, "No such file")
        os.mkdir(self.tokens)
        self.fails("is not a regular file")

    def test_lines_that_are_no_tokens_are_named(self):
        good = line_of("alice")
        for bad in ("alice\n", good[:-2] + "\n", good.replace("sha256:", ""), good.upper(), "x" * 64 + good[5:], good[:-1] + " more\n", "anonymous" + good[5:], "*" + good[5:]):
            self.write_tokens(good, bad)
            self.fails(self.tokens + ":4:")
        self.write_tokens(good + "\0")
        self.fails("NUL")

    def test_opctl_makes_one_that_works(self):
        code, out, _ = opctl("token", "new", "carol")
        self.assertEqual(code, 0)
        token, line = (row.split(None, 1)[1] for row in out.splitlines())
        self.assertNotIn(token, line)
        self.assertNotEqual(opctl("token", "new", "carol")[1], out)
        self.write_tokens(line + "\n")
        daemon = self.start("tokens: %s\n" % self.tokens)
        path = os.path.join(self.folder, "mine")
        with open(path, "w") as file:
            file.write(token + "\n")
        os.chmod(path, 0o600)
        self.assertIn("identity   carol, rights: publish", opctl("info", "--connect", daemon.address, "--token-file", path)[1])
        self.assertIn("identity   carol", opctl("info", "--connect", daemon.address, OPD_TOKEN=token)[1])
        os.chmod(path, 0o640)
        self.assertIn("0640", opctl("info", "--connect", daemon.address, "--token-file", path)[2])
        code, _, err = opctl("info", "--connect", daemon.address, OPD_TOKEN=token + "x")
        self.assertEqual(code, 3)
        self.assertIn("UNAUTHENTICATED", err)
        for name in ("", "a b", "*", "anonymous", "x" * 64, "#"):
            self.assertEqual(opctl("token", "new", name)[0], 1, name)
        self.python_client(daemon, token, path)

    def python_client(self, daemon, token, path):
        try:
            import opd
        except ImportError:
            return
        with opd.Client(daemon.address, token=token) as client:
            self.assertEqual(client.hello.identity, "carol")
        with self.assertRaisesRegex(opd.InvalidArgument, "0600"):
            opd.Client(daemon.address, token_file=path)
        with self.assertRaises(opd.Unauthenticated):
            opd.Client(daemon.address, token="wrong")


class Remote(Case):
    """A TLS listener that other machines reach serves only those who say who they are."""

    def setUp(self):
        super().setUp()
        self.ca = certificates.Authority(self.folder)
        certificate, key = self.ca.server()
        self.flags = ("--listen", "tls://0.0.0.0:0", "--tls-certificate", certificate, "--tls-key", key)

    def tls(self, cert=None):
        made = harness_context(self.ca.ca)
        if cert:
            made.load_cert_chain(*cert)
        return made

    def address(self, daemon):
        return daemon.tls_address().replace("0.0.0.0", "127.0.0.1")

    def test_without_a_token_nobody_is_served_unless_asked_for(self):
        daemon = self.start("", *self.flags, names=["alice"])
        address = self.address(daemon)
        self.refused(harness.UNAUTHENTICATED, "connect with a token", address, tls=self.tls())
        self.assertEqual(self.as_("alice", daemon, address, tls=self.tls()).hello.identity, "alice")
        for config, flags in (("identities: {anonymous: {ops: [relu]}}\n", ()), ("", ("--allow-anonymous",))):
            other = self.start(config, *self.flags, *flags)
            with Client(self.address(other), tls=self.tls()) as client:
                self.assertEqual(client.hello.identity, "anonymous")
        check_healthy(self, daemon)

    def test_nobody_in_particular_ends_with_the_reload_that_serves_no_such_client(self):
        daemon = self.start("identities: {anonymous: {}}\n", *self.flags)
        address = self.address(daemon)
        client = Client(address, tls=self.tls())
        self.addCleanup(client.close)
        with Client(daemon.address) as local:
            daemon.write_config("")
            daemon.signal(signal.SIGHUP)
            status, words = client.expect_end()
            self.assertEqual(status, harness.UNAVAILABLE)
            self.assertIn("connect again", words)
            local.ping()
        self.refused(harness.UNAUTHENTICATED, "connect with a token", address, tls=self.tls())
        check_healthy(self, daemon)

    def test_a_certificate_says_who_it_is(self):
        config = "identities:\n  alice: {certificate: \"CN=alice,O=Example\", rights: [drain]}\n  \"*\": {rights: [], tenant: others}\n"
        daemon = self.start(config, *self.flags, "--tls-client-ca", self.ca.ca, names=["bob"])
        address = self.address(daemon)
        alice, eve = self.ca.client("alice", "/O=Example/CN=alice"), self.ca.client("eve")
        with Client(address, tls=self.tls(alice)) as client:
            self.assertEqual((client.hello.identity, client.hello.tenant, list(client.hello.rights)), ("alice", "alice", ["drain"]))
        with Client(address, tls=self.tls(eve)) as client:
            self.assertEqual((client.hello.identity, client.hello.tenant, list(client.hello.rights)), ("cert:CN=eve", "others", []))
        with Client(address, tls=self.tls(alice), token=token_of("bob")) as client:  # a token goes first
            self.assertEqual(client.hello.identity, "bob")
        self.refused(harness.UNAUTHENTICATED, "not one that", address, tls=self.tls(alice), token="wrong")
        self.refused(harness.UNAUTHENTICATED, "needs an entry", address, tls=self.tls(self.ca.client("long", "/CN=" + "x" * 60)))
        check_healthy(self, daemon)

    def test_a_token_is_not_sent_in_the_clear_to_another_machine(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # which address this machine has; nothing is sent
            try:
                probe.connect(("192.0.2.1", 9))
                own = probe.getsockname()[0]
            except OSError:
                self.skipTest("no address but loopback")
        if own.startswith("127."):
            self.skipTest("no address but loopback")
        daemon = self.start("", "--listen", "tcp://0.0.0.0:0", "--insecure-plain-tcp")
        address = daemon.tcp_addresses()[0].replace("0.0.0.0", own)
        self.assertIn("use a tls:// address", opctl("ping", "--connect", address, OPD_TOKEN="opd_secret")[2])
        self.assertEqual(opctl("ping", "--connect", address)[0], 0)


def harness_context(ca):
    import ssl

    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(ca)
    made.set_alpn_protocols(["opd/1"])
    return made


def relu(**fields):
    return run("relu", tensor([2]), **fields), harness.f32(-1.0, 2.0)


def graph(*ops, priority=None):
    made = pb.Graph(inputs=[pb.GraphInput(name="x")], outputs=[pb.GraphOutput(node=pb.NodeOutput(node=len(ops) - 1))])
    for index, op in enumerate(ops):
        node = made.nodes.add(op=op)
        operand = node.args.add().tensor
        if index == 0:
            operand.graph_input = 0
        else:
            operand.node.node = index - 1
        if priority is not None:
            node.priority.names.extend(priority)
    return made


class Rights(Case):
    config = "identities:\n  nobody: {rights: []}\n" + "".join("  may-%s: {rights: [%s]}\n" % (right, right) for right in RIGHTS)

    def requests(self, session):
        """right: a request that needs it."""
        server = pb.SetPriority(scope=pb.SCOPE_SERVER, op="relu", list=pb.ProviderList(names=["native"]))
        return {
            "publish": pb.Request(withdraw=pb.Withdraw(name="nothing")),
            "defaults": pb.Request(set_priority=server),
            "modules": pb.Request(load_module=pb.LoadModule(path="/nonexistent.so")),
            "sessions": pb.Request(set_session=pb.SetSession(session=session, weight=7)),
            "log": pb.Request(set_log_level=pb.SetLogLevel(level="info")),
            "operate": pb.Request(restore_provider=pb.RestoreProvider(provider="cpu")),
            "drain": pb.Request(drain=pb.Drain()),
        }

    def test_each_right_is_needed_and_is_enough(self):
        daemon = self.start(self.config, names=["nobody"] + ["may-" + right for right in RIGHTS])
        nobody = self.as_("nobody", daemon)
        requests = self.requests(nobody.hello.session)
        self.assertEqual(set(requests), set(RIGHTS))
        for right, request in requests.items():
            self.denied(nobody, request, ("right " + right, "nobody"))
        for right in RIGHTS:
            if right == "drain":
                continue
            client = self.as_("may-" + right, daemon)
            self.granted(client, requests[right])
            for other in RIGHTS:
                if other != right:
                    self.denied(client, requests[other], "right " + other)
        self.granted(nobody, *relu())
        check_healthy(self, daemon)
        self.granted(self.as_("may-drain", daemon), requests["drain"])
        self.assertEqual(daemon.wait(), 0)

    def test_root_and_the_daemons_user_have_all_rights_unless_an_entry_says_otherwise(self):
        with Client(self.start().address) as client:
            self.assertEqual(sorted(client.hello.rights), sorted(RIGHTS))
        daemon = self.start("identities: {\"uid:%d\": {rights: [log]}}\n" % os.geteuid())
        with Client(daemon.address) as client:
            self.assertEqual((client.hello.identity, list(client.hello.rights)), ("uid:%d" % os.geteuid(), ["log"]))
            self.denied(client, pb.Request(drain=pb.Drain()), "right drain")
        daemon = self.start("identities: {ops-team: {uid: %d, rights: [admin], tenant: \"uid:7\"}}\n" % os.geteuid())
        with Client(daemon.address) as client:
            self.assertEqual((client.hello.identity, client.hello.tenant, sorted(client.hello.rights)), ("ops-team", "uid:7", sorted(RIGHTS)))

    def test_denials_are_logged_once_a_minute_for_each_identity(self):
        daemon = self.start(self.config, names=["nobody", "may-log"])
        for name in ("nobody", "may-log"):
            client = self.as_(name, daemon)
            for _ in range(50):
                self.denied(client, pb.Request(drain=pb.Drain()), "right drain")
        lines = [line for line in daemon.log_text().splitlines() if " denied " in line]
        self.assertIn(len(lines), (2, 3, 4), lines)  # one for each of 50; a minute may end meanwhile
        self.assertIn('missing="right drain"', lines[0])
        self.assertIn("identity=nobody", lines[0])

    def test_others_sessions_are_seen_with_the_right_alone(self):
        daemon = self.start(self.config, names=["nobody", "may-sessions"])
        nobody, manager = self.as_("nobody", daemon), self.as_("may-sessions", daemon)
        listed = pb.Request(list_sessions=pb.ListSessions())
        self.assertEqual(len(nobody.ask(listed)[0].sessions.sessions), 1)
        self.assertEqual(len(manager.ask(listed)[0].sessions.sessions), 2)


class Limits(Case):
    config = "identities:\n  alice: {ops: [relu, add], providers: [cpu], classes: [interactive, batch]}\n  bare: {ops: [], providers: []}\n  few: {providers: []}\n"

    def start_limited(self):
        daemon = self.start(self.config, names=["alice", "bare", "few"])
        return daemon, self.as_("alice", daemon)

    def test_ops(self):
        daemon, alice = self.start_limited()
        self.granted(alice, *relu())
        request, payload, _ = rms_norm()
        self.denied(alice, request, ("op rms_norm", "alice"), payload)
        fake = run("rms_norm", tensor([2, 4]), tensor([4]), epsilon=0.0, run_mode=pb.FAKE)
        self.denied(alice, fake, "op rms_norm")
        self.denied(self.as_("bare", daemon), relu()[0], "op relu", relu()[1])
        check_healthy(self, daemon)

    def test_graphs_are_no_way_around(self):
        daemon, alice = self.start_limited()
        self.assertEqual(self.granted(alice, pb.Request(register_graph=pb.RegisterGraph(graph=graph("relu", "relu")))).status, harness.OK)
        self.denied(alice, pb.Request(register_graph=pb.RegisterGraph(graph=graph("relu", "silu"))), "op silu")
        once = pb.Request(run_graph=pb.RunGraph(once=graph("relu", "silu")))
        once.run_graph.inputs.add().tensor.CopyFrom(tensor([2]))
        self.denied(alice, once, "op silu", relu()[1])
        self.denied(self.as_("few", daemon), pb.Request(register_graph=pb.RegisterGraph(graph=graph("relu", priority=["cpu"]))), "provider cpu")
        graph_id = alice.submit(pb.Request(register_graph=pb.RegisterGraph(graph=graph("relu"))))
        self.assertEqual(alice.read_reply(graph_id)[1].status, harness.OK)
        request = pb.Request(run_graph=pb.RunGraph(graph=graph_id))
        request.run_graph.inputs.add().tensor.CopyFrom(tensor([2]))
        self.assertEqual(self.granted(alice, request, relu()[1]).status, harness.OK)
        check_healthy(self, daemon)

    def test_providers(self):
        daemon, alice = self.start_limited()
        self.assertEqual(self.granted(alice, *relu(run_priority=["cpu", "native"])).run.provider, "cpu")
        self.assertEqual(self.granted(alice, *relu(run_priority=["native"])).run.provider, "native")  # everybody's
        self.denied(alice, relu(run_priority=["onednn", "cpu"])[0], ("provider onednn", "alice"), relu()[1])
        names = pb.ProviderList(names=["onednn"])
        self.denied(alice, pb.Request(set_priority=pb.SetPriority(scope=pb.SCOPE_SESSION, op="relu", list=names)), "provider onednn")
        self.denied(alice, pb.Request(push_priority=pb.PriorityMap(entries=[pb.PriorityEntry(op="relu", list=names)])), "provider onednn")
        daemon.stop()
        daemon = self.start("identities: {bare: {providers: []}}\npriorities: {relu: [cpu], \"*\": [cpu]}\n", names=["bare"])
        reply = self.granted(self.as_("bare", daemon), *relu(run_explain=True))  # of a list that it didn't choose: passed over
        self.assertEqual(reply.run.provider, "native")
        self.assertEqual([(skip.provider, skip.reason) for skip in reply.run.explain.skipped], [("cpu", "permission: not for bare")])
        self.assertEqual(self.granted(self.as_("bare", daemon), relu(run_strict=True)[0], relu()[1]).status, harness.FAILED_PRECONDITION)
        once = pb.Request(run_graph=pb.RunGraph(once=graph("relu"), explain=True))
        once.run_graph.inputs.add().tensor.CopyFrom(tensor([2]))
        reply = self.granted(self.as_("bare", daemon), once, relu()[1])
        self.assertEqual(reply.status, harness.OK, reply.message)
        self.assertNotIn("cpu", {node.provider for node in reply.run.graph.nodes})
        check_healthy(self, daemon)

    def test_classes(self):
        daemon, alice = self.start_limited()
        for asked, allowed in ((pb.REALTIME, False), (pb.INTERACTIVE, True), (pb.BATCH, True)):
            request, payload = relu(run_service_class=asked)
            if allowed:
                self.assertEqual(self.granted(alice, request, payload).status, harness.OK)
            else:
                self.denied(alice, request, "class realtime", payload)
        check_healthy(self, daemon)


class Reload(Case):
    def test_whoever_may_do_something_else_now_must_connect_again_and_the_others_stay(self):
        config = "identities:\n  alice: {rights: [publish%s]}\ntokens: %s\n"
        self.write_tokens(*(line_of(name) for name in ("alice", "bob", "carol")))
        daemon = self.start(config % (", log", self.tokens))
        alice, bob, carol = (self.as_(name, daemon) for name in ("alice", "bob", "carol"))
        with Client(daemon.address) as local:
            self.write_tokens(line_of("alice"), line_of("bob"))
            daemon.write_config(config % ("", self.tokens))
            daemon.signal(signal.SIGHUP)
            for gone in (alice, carol):
                status, words = gone.expect_end()
                self.assertEqual(status, harness.UNAVAILABLE)
                self.assertIn("connect again", words)
            bob.ping()
            local.ping()
        self.assertEqual(list(self.as_("alice", daemon).hello.rights), ["publish"])
        self.refused(harness.UNAUTHENTICATED, "not one that", daemon.address, token=token_of("carol"))
        self.assertNotIn(hashlib.sha256(token_of("carol").encode()).hexdigest(), daemon.log_text())
        check_healthy(self, daemon)

    def test_a_bad_tokens_file_changes_nothing(self):
        daemon = self.start("limits: {kept: 7}\n", names=["alice"])
        alice = self.as_("alice", daemon)
        for count, (lines, mode) in enumerate(((["garbage\n"], 0o600), ([], 0o644)), 1):
            self.write_tokens(*lines, mode=mode)
            daemon.signal(signal.SIGHUP)
            daemon.wait_log("configuration not reloaded", self.tokens, count=count)
        alice.ping()
        self.as_("alice", daemon).ping()


class Configuration(Case):
    def test_mistakes_are_named(self):
        for text, words in (
            ("identities: {alice: {colour: red}}", "no such key"),
            ("identities: {alice: {rights: [fly]}}", "expected publish"),
            ("identities: {alice: {rights: publish}}", "expected a list"),
            ("identities: {alice: {classes: [urgent]}}", "expected realtime"),
            ("identities: {alice: {ops: [\"a b\"]}}", "no op's name"),
            ("identities: {alice: {certificate: alice}}", "CN=alice"),
            ("identities: {anonymous: {certificate: \"CN=x\"}}", "no certificate of its own"),
            ("identities: {alice: {uid: root}}", "expected a number"),
            ("identities: {alice: {}, alice: {}}", "there already"),
            ("identities: {%s: {}}" % ("x" * 64), "64 bytes"),
        ):
            path = os.path.join(self.folder, "opd.yaml")
            with open(path, "w") as file:
                file.write(text + "\n")
            done = subprocess.run([harness.OPD, "--config", path, "--check-config"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=harness.PATIENCE, check=False)
            self.assertEqual(done.returncode, 2, text)
            self.assertIn(words, done.stderr.decode())


if __name__ == "__main__":
    unittest.main()
