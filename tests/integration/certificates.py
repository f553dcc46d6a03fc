"""Certificates for tests, made by the openssl program: authorities, servers, clients, good ones and bad ones."""
import os
import subprocess

_DAY = "2"


def _run(*command):
    made = subprocess.run(["openssl", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if made.returncode != 0:
        raise AssertionError("openssl %s: %s" % (" ".join(command), made.stdout.decode(errors="replace")))


class Authority:
    """A folder with a certificate authority's certificate (`ca`), which signs others."""

    def __init__(self, folder, name="ca"):
        self.folder, self.name = folder, name
        self.ca, self._key = self.path(name + ".pem"), self.path(name + ".key")
        _run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", _DAY, "-subj", "/CN=test " + name, "-keyout", self._key, "-out", self.ca)

    def path(self, name):
        return os.path.join(self.folder, name)

    def issue(self, name, subject, extensions="", days=_DAY):
        """(certificate, key) as paths. days may be negative: it has expired."""
        key, request, certificate, config = (self.path(name + end) for end in (".key", ".csr", ".pem", ".cnf"))
        with open(config, "w") as file:
            file.write(extensions)
        _run("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", subject, "-keyout", key, "-out", request)
        _run("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._key, "-set_serial", str(int.from_bytes(os.urandom(8), "big") >> 1), "-days", days, "-extfile", config,
             "-out", certificate)
        return certificate, key

    def server(self, name="server", names="DNS:localhost,IP:127.0.0.1", days=_DAY):
        return self.issue(name, "/CN=" + name, "subjectAltName=%s\nextendedKeyUsage=serverAuth\n" % names, days)

    def client(self, name, subject=None, days=_DAY):
        return self.issue(name, subject or "/CN=" + name, "extendedKeyUsage=clientAuth\n", days)


def fingerprint(certificate):
    found = subprocess.run(["openssl", "x509", "-in", certificate, "-noout", "-fingerprint", "-sha256"], stdout=subprocess.PIPE, check=True)
    return found.stdout.decode().strip().partition("=")[2]
