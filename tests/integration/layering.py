#!/usr/bin/env python3
"""Includes point down only: client → proto; a provider → providers/*.h → proto; server → providers/*.h → proto.

Named exceptions: client/embedded/ sits on top of both sides (and who links it includes opd/embedded.h, which is its own); the daemon and the tools that
load providers see the built-in list. The header that protobuf-c generates is included by proto/codec*.c alone. Public headers (opd/*.h) include nothing
of this tree but each other.

usage: layering.py [root]
"""
import os
import re
import sys
import tempfile

FOLDERS = ("proto", "providers", "server", "client")
SOURCES = (".c", ".h", ".cu", ".cuh", ".cl")
INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.MULTILINE)


def resolve(root, includer, text):
    """The file of this tree that an include means, as a path from the root; None for a system's."""
    for base in (os.path.dirname(includer), "", "proto", "client", "client/embedded", "providers"):
        path = os.path.normpath(os.path.join(base, text))
        if os.path.isfile(os.path.join(root, path)):
            return path
    return None


def layer(path):
    """proto, providers (its headers and the op catalogue's), provider:<name>, server, client, embedded."""
    parts = path.split(os.sep)
    if parts[0] == "providers" and len(parts) > 2 and parts[1] != "ops":
        return "provider:" + parts[1]
    if parts[:2] == ["client", "embedded"]:
        return "embedded"
    return parts[0]


def allowed(includer, included):
    """Whether a file may include another: by layers, then by the exceptions."""
    source, target = layer(includer), layer(included)
    if source == target or target == "proto":
        return True
    if source == "embedded":
        return target in ("client", "server")
    if source == "client":
        return included == "client/embedded/opd/embedded.h"
    if target == "providers" and (source == "server" or source.startswith("provider:")):
        return included.endswith(".h")
    return False


def check_file(root, path):
    with open(os.path.join(root, path), encoding="utf-8", errors="replace") as file:
        text = file.read()
    for match in INCLUDE.finditer(text):
        line = text.count("\n", 0, match.start(1)) + 1
        name = match.group(1)
        if "pb-c.h" in name and name != "protobuf-c/protobuf-c.h":
            if not re.fullmatch(r"proto/codec[^/]*\.[ch]", path):
                yield "%s:%d: includes %s, which only proto/codec*.c may" % (path, line, name)
            continue
        included = resolve(root, path, name)
        if included is None or included.split(os.sep)[0] not in FOLDERS:
            if included is not None:
                yield "%s:%d: includes %s, which is above it" % (path, line, included)
            continue
        if not allowed(path, included):
            yield "%s:%d: %s includes %s of %s" % (path, line, layer(path), included, layer(included))


def check(root):
    """(files seen, violations)"""
    seen, wrong = 0, []
    for folder in FOLDERS:
        for where, _, names in os.walk(os.path.join(root, folder)):
            for name in sorted(names):
                if name.endswith(SOURCES):
                    seen += 1
                    wrong += check_file(root, os.path.relpath(os.path.join(where, name), root))
    return seen, wrong


VIOLATIONS = {
    "proto/a.c": "client/c.h",
    "client/b.c": "server/s.h",
    "server/c.c": "client/c.h",
    "server/d.c": "opd.pb-c.h",
    "server/e.c": "providers/cpu/p.h",
    "providers/cpu/f.c": "server/s.h",
    "providers/cpu/g.c": "providers/other/o.h",
    "providers/ops/h.c": "providers/cpu/p.h",
    "client/i.c": "providers/provider.h",
    "client/embedded/j.c": "tests/t.h",
}


def self_check():
    """That each kind of violation is seen: a check that can't fail is none."""
    with tempfile.TemporaryDirectory() as root:
        for header in ("client/c.h", "server/s.h", "providers/cpu/p.h", "providers/other/o.h", "providers/provider.h", "tests/t.h", *VIOLATIONS):
            os.makedirs(os.path.dirname(os.path.join(root, header)), exist_ok=True)
            with open(os.path.join(root, header), "w", encoding="utf-8") as file:
                if header in VIOLATIONS:
                    file.write('#include <stdio.h>\n#include "%s"\n' % VIOLATIONS[header])
        found = {line.split(":")[0] for line in check(root)[1]}
    return sorted(set(VIOLATIONS) - found)


def main():
    missed = self_check()
    for path in missed:
        print("the check itself misses an include of %s by %s" % (VIOLATIONS[path], path))
    root = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    seen, wrong = check(root)
    for line in wrong:
        print(line)
    print("%d files, %d includes against the layers" % (seen, len(wrong)))
    return 1 if wrong or missed or seen < 50 else 0


if __name__ == "__main__":
    sys.exit(main())
