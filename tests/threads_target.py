#!/usr/bin/env python3
"""Whether the target `threads`, which is all that a build for ThreadSanitizer makes, has every file that the tests labelled "threads" start or are told of: what their commands, environments and lists of modules name
in the build folder.

usage: threads_target.py ctest ninja build-folder
"""
import json
import os
import subprocess
import sys


def output(*words):
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout


def named(test):
    """The words that a test's command and environment consist of, lists taken apart."""
    yield from test["command"]
    for item in test["properties"]:
        if item["name"] == "ENVIRONMENT":
            for setting in item["value"]:
                yield from setting.partition("=")[2].split(":")


def lacks(test, build, made):
    """What keeps a test from a build of `made` alone, a text each."""
    if "command" not in test:
        return ["its program isn't built here, so nobody can tell"]
    paths = {os.path.relpath(word, build) for word in named(test) if word.startswith(build + os.sep) and os.path.isfile(word)}
    return ["%s isn't part of the target `threads`: expected opd_threads or opd_test_modules to name it" % path for path in sorted(paths - made)]


def main():
    ctest, ninja, build = sys.argv[1:]
    tests = json.loads(output(ctest, "--test-dir", build, "-L", "^threads$", "--show-only=json-v1"))["tests"]
    made = {line.strip().lstrip("| ") for line in output(ninja, "-C", build, "-t", "query", "threads").splitlines()}
    problems = ["%s: %s" % (test["name"], text) for test in tests for text in lacks(test, build, made)]
    for line in problems:
        print(line)
    if not tests:
        print("no test is labelled threads")
    print("threads_target: %d tests, %d problems" % (len(tests), len(problems)))
    return 1 if problems or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
