"""Runs the tests that are marked `gpu` in many processes at once: what takes time is compiling kernels on the CPU.

    python tests/shards.py [SECONDS [PART/PARTS]]

Tests of one spec stay together. `1/2` runs every other group of them. Prints
what fails and a summary; exits with 1 if a test failed or did not end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent
SPLIT = 6  # tests a process at most: each begins with some seconds of imports


def collected() -> list[str]:
    """The ids of the tests that need a GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        str(TESTS / "test_gpu.py"),
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line for line in text.splitlines() if "::" in line]


def groups(ids: list[str]) -> list[list[str]]:
    """Tests by the spec that they name, in pieces."""
    found: dict[str, list[str]] = {}
    for test in ids:
        words = re.findall(r"[A-Za-z]\w+", test.partition("[")[2])
        name = next((w for w in words if w not in ("torch", "float32", "float16", "bfloat16")), test)
        found.setdefault(name, []).append(test)
    pieces = [tests[k : k + SPLIT] for tests in found.values() for k in range(0, len(tests), SPLIT)]
    return sorted(pieces, key=len, reverse=True)


def run(tests: list[str], until: float) -> tuple[list[str], int, str]:
    """The tests that did not pass, how many did, and what was printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--tb=short", *tests]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=TESTS.parent,
                              timeout=max(until - time.time(), 1))  # fmt: skip
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else ""
    passed = set(re.findall(r"^PASSED (\S+)", text, re.M))
    return [t for t in tests if t.split("/")[-1] not in {p.split("/")[-1] for p in passed}], len(passed), text


def main() -> int:
    until = time.time() + (float(sys.argv[1]) if len(sys.argv) > 1 else 3600.0)
    part, _, parts = (sys.argv[2] if len(sys.argv) > 2 else "1/1").partition("/")
    chosen = groups(collected())[int(part) - 1 :: int(parts)]
    wanted = sum(map(len, chosen))
    begun, passed, missed = time.time(), 0, []
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 4) - 1)) as pool:
        for failed, count, text in pool.map(lambda tests: run(tests, until), chosen):
            passed += count
            missed += failed
            if failed:
                print(text[-3000:], flush=True)
    for test in missed:
        print(f"NOT PASSED {test}")
    print(f"{passed} of {wanted} passed in {time.time() - begun:.0f} s, {len(missed)} did not")
    return 1 if missed or passed != wanted else 0


if __name__ == "__main__":
    sys.exit(main())
