#!/usr/bin/env python3
"""Whether every line of hardening.txt has a test that names it, and every test that server/SECURITY.md names is there.

A test names what it holds as "Hardening: id, id": in Python in the docstring of the test or its class, in C in the comment above START_TEST.

usage: hardening.py [--table] [root]
  --table  prints which tests hold which line
"""
import ast
import glob
import os
import re
import sys

MARK = re.compile(r"Hardening:\s*([a-z0-9-]+(?:\s*,\s*[a-z0-9-]+)*)")
C_TEST = re.compile(r"/\*((?:[^*]|\*(?!/))*)\*/\s*START_TEST\((\w+)\)")
C_NAME = re.compile(r"START_TEST\((\w+)\)")
LINE = re.compile(r"(\? )?([a-z0-9-]+): (.+)")
NAMED = re.compile(r"`(tests/[\w/]+\.(?:py|c))`: ((?:`\w+`(?:, )?)+)")


def read_list(root):
    """[(section, id, text, waits)] in order."""
    lines, section = [], ""
    with open(os.path.join(root, "tests", "hardening.txt")) as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\n")
            if line.startswith("## "):
                section = line[3:]
            elif line and not line.startswith("#"):
                found = LINE.fullmatch(line)
                if found is None:
                    sys.exit("tests/hardening.txt:%d: expected `id: text`, found %r" % (number, line))
                lines.append((section, found.group(2), found.group(3), found.group(1) is not None))
    return lines


def ids_of(text):
    return [name.strip() for found in MARK.finditer(text or "") for name in found.group(1).split(",")]


def python_tests(text):
    """(test, ids) of every test function; a class's ids are its first test's: all of them hold it together."""
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef):
            continue
        tests = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name.startswith("test")]
        for index, item in enumerate(tests):
            own = ids_of(ast.get_docstring(node)) if index == 0 else []
            yield item.name, own + ids_of(ast.get_docstring(item))


def c_tests(text):
    """The same of libcheck's tests."""
    named = {found.group(2): ids_of(found.group(1)) for found in C_TEST.finditer(text)}
    for name in C_NAME.findall(text):
        yield name, named.get(name, [])


def read_tests(root):
    """{path: {test: ids}}"""
    tests = {}
    for pattern, reader in (("tests/**/test_*.py", python_tests), ("tests/**/test_*.c", c_tests), ("client/**/test_*.py", python_tests)):
        for path in sorted(glob.glob(os.path.join(root, pattern), recursive=True)):
            with open(path, encoding="utf-8") as file:
                tests[os.path.relpath(path, root)] = dict(reader(file.read()))
    return tests


def check(root, lines, tests):
    """What is wrong, a sentence each."""
    wrong = []
    known = [name for _, name, _, _ in lines]
    held = {name for found in tests.values() for ids in found.values() for name in ids}
    wrong += ["tests/hardening.txt: %s is there twice" % name for name in sorted({name for name in known if known.count(name) > 1})]
    wrong += ["no test names %s: %s" % (name, text) for _, name, text, waits in lines if not waits and name not in held]
    for path, found in tests.items():
        for test, ids in found.items():
            wrong += ["%s: %s names %s, which tests/hardening.txt doesn't have" % (path, test, name) for name in ids if name not in known]
    return wrong + check_security(root, tests)


def check_security(root, tests):
    path = os.path.join(root, "server", "SECURITY.md")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        text = file.read()
    wrong = []
    for found in NAMED.finditer(text):
        for test in re.findall(r"`(\w+)`", found.group(2)):
            if test not in tests.get(found.group(1), {}):
                wrong.append("server/SECURITY.md: %s has no test %s" % (found.group(1), test))
    return wrong


def print_table(lines, tests):
    section = None
    for found, name, text, _ in lines:
        if found != section:
            section = found
            print("\n%s" % section)
        print("  %s" % text)
        holders = ["%s: %s" % (path, test) for path, named in tests.items() for test, ids in named.items() if name in ids]
        for holder in holders or ["(no test yet)"]:
            print("      %s" % holder)


def main(arguments):
    table = "--table" in arguments
    rest = [word for word in arguments if word != "--table"]
    root = rest[0] if rest else os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    lines, tests = read_list(root), read_tests(root)
    if table:
        print_table(lines, tests)
    wrong = check(root, lines, tests)
    for text in wrong:
        print(text)
    waiting = [name for _, name, _, waits in lines if waits]
    print("%d lines, %d of them wait for a test%s" % (len(lines), len(waiting), ": " + ", ".join(waiting) if waiting else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
