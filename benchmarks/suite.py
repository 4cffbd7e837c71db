"""The whole table of speed: `python benchmarks/suite.py --out DIR`, on one GPU in less than eight minutes.

Emitted ops are checked against float64, all at once. Then one process at a time has the GPU, one for each candidate and
shape: first ours, while the kernels that peers choose among are compiled on the CPU, then short calls and peers."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import report as reports
import tasks
import worker
from limits import spec_of
from rows import GROUPS, OURS, Case, Row, rows

import chunkc
from chunkc.bench.run import attempt, versions

HERE = Path(__file__).resolve().parent
SECONDS = 470.0  # what is not begun by then is not run
ALARM_SECONDS = 100  # a process alone on the GPU
SHARES = 14  # of compiling what peers choose among
FRESH = {"FLA_CACHE_RESULTS": "0"}  # what fla chose for one shape is not taken for another
WAITING = 7  # processes that import while another has the GPU
Request = Mapping[str, Any]


class Suite:
    """A run. `alone` keeps every task in this process, for tests: nothing is measured then that means something."""

    def __init__(self, chosen: Sequence[Row], out: Path, scratch: Path, device: str, dtype: str, alone: bool,
                 limit: float = SECONDS) -> None:  # fmt: skip
        self.rows, self.out, self.scratch, self.alone = chosen, out, scratch, alone
        self.begun, self.limit = time.monotonic(), limit
        self.packages, self.dtype = scratch / "packages", dtype
        self.base = {"device": device, "dtype": dtype, "packages": str(self.packages), "quick": alone,
                     "scratch": str(scratch / "exact")}  # fmt: skip
        self.rates: dict[str, Any] = {}
        self.checks: dict[str, Any] = {}
        self.timed: dict[tuple[str, str], Any] = {}
        self.errors: list[dict[str, Any]] = []
        self.first: dict[str, str] = {}
        self.chosen: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        for op in sorted({row.case.op for row in self.rows}):
            chunkc.build(spec_of(op), self.packages)
        self.rates = self.task({"task": "rates"})
        if "rate" not in self.rates:
            raise SystemExit(f"this machine cannot be measured: {self.rates.get('reason')}")
        self.measure()
        return self.save()

    def task(self, request: Request, **environment: str) -> dict[str, Any]:
        """What a task found, in a process of its own, as long as there is time."""
        left = self.limit - self.taken()
        if left < 5:
            return {"reason": "not run: out of time"}
        whole = {**self.base, **request}
        if self.alone:
            found: dict[str, Any] = {}
            worker.perform(whole, found.update)
            return found
        cache = {"TRITON_CACHE_DIR": str(self.scratch / "triton"), **FRESH, **environment}
        return attempt(whole, left, (str(HERE / "worker.py"),), cache)

    def each(self, requests: Sequence[Request], at_once: int, take: Callable[[Request, dict[str, Any]], None]) -> None:
        """Run tasks, at most so many at once, and take what they found as they end."""
        with ThreadPoolExecutor(1 if self.alone else at_once) as pool:
            pending = {
                pool.submit(self.task, request, **request.get("environment", {})): request for request in requests
            }
            for done in as_completed(pending):
                take(pending[done], done.result())

    # -- what is run ---------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Checks; then emitted ops, while what peers choose among is compiled; then peers, which need all of it, and
        calls of ours so short that the CPU has to be idle beside them."""
        shares = 1 if self.alone else SHARES
        with ThreadPoolExecutor(shares) as background:
            compiling = [background.submit(self.task, fill) for fill in tasks.fills(self.rows, shares)]
            self.each(tasks.checks(self.rows), os.cpu_count() or 2, self.take_check)
            timings = tasks.timings(self.rows)
            own = [request for request in timings if request["candidate"] == OURS]
            short, long = list[Request](), list[Request]()
            for request in self.right(own):
                (short if tasks.short(worker.cases_of(request)) else long).append(request)
            self.each([*tasks.cold(self.rows, self.scratch), *long], WAITING, self.take_times)
            self.take_compiled([done.result() for done in compiling])
        self.each([*short, *(self.in_turn(r) for r in timings if r not in own)], WAITING, self.take_times)

    def right(self, own: Sequence[Request]) -> list[Request]:
        """Those whose ops are right; the others are rows that say what is wrong."""
        found = []
        for request in own:
            cases = worker.cases_of(request)
            wrong = next(filter(None, map(self.wrong, cases)), "")
            if wrong:
                self.timed |= {(OURS, case.key()): {"reason": wrong} for case in cases}
            else:
                found.append(self.in_turn(request))
        return found

    def in_turn(self, request: Request) -> Request:
        alone = {"lock": str(self.scratch / "lock"), "alarm_seconds": ALARM_SECONDS}
        return {**request, **({} if self.alone else alone)}

    def take_check(self, request: Request, found: dict[str, Any]) -> None:
        reason = found.pop("reason", None)
        missed = {"reason": reason or "not reached", "right": False}
        self.checks |= {key: found.get(key, missed) for key in request["keys"]}
        self.say(f"checked {request['title']}{f': {reason}' if reason else ''}")

    def take_compiled(self, shares: Sequence[Mapping[str, Any]]) -> None:
        """How long one process would have compiled; what did not compile here does so, or fails, where it is timed."""
        taken: dict[str, float] = {}
        for share in shares:
            for name, value in share.items():
                if isinstance(value, float):
                    taken[name] = taken.get(name, 0) + value
                else:
                    self.say(f"compiling {name}: {value}")
        if taken:
            name = max(taken, key=lambda n: taken[n])
            self.first[f"compiling all that {name} chooses among"] = f"{taken[name]:.0f} s of one core"
        self.say("compiled what peers choose among")

    def wrong(self, case: Case) -> str:
        found = self.checks.get(reports.check_key(case), {})
        if found.get("right", True):
            return ""
        return found.get("reason") or f"wrong: {found['error']:.1e} from float64"

    def take_times(self, request: Request, found: dict[str, Any]) -> None:
        name, reason = request["candidate"], found.pop("reason", None)
        if reason == "killed by SIGALRM":
            reason = f"stopped after {ALARM_SECONDS} s alone on the GPU"
        self.say(f"timed {request['title']}{f': {reason}' if reason else ''}")
        if request["task"] == "cold":
            said = ", ".join(f"{key} {value:.1f}" for key, value in found.items())
            self.first[f"cold, {request['title']}"] = reason or said
            return
        self.chosen |= {request["title"]: found["chosen"]} if found.get("chosen") else {}
        for case in worker.cases_of(request):
            got = found.get(case.key(), {"reason": reason or "not reached"})
            if reason and got.get("reason") == "did not end":
                got = {"reason": reason}
            self.timed[name, case.key()] = got
        for data in request["errors"]:
            case = worker.read_case(data)
            self.errors.append({"name": name, "op": case.op, "gate": case.gate, "widths": case.shape.text("HKV"),
                                "error": found.get(f"error {case.key()}", reason or "not reached")})  # fmt: skip
        self.save()

    # -- what is written -----------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """The report so far, so that a run that is cut off leaves what it has."""
        entries = [reports.entry(row, self.timed, self.checks, self.rates, self.dtype) for row in self.rows]
        found = {
            "device": self.rates["name"], "dtype": self.dtype, "versions": versions(), "rates": self.rates,
            "rows": entries, "mean": reports.mean(entries), "errors": self.errors, "checks": self.checks,
            "first": self.first, "chosen": self.chosen, "seconds": self.taken(),
        }  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "speed.json").write_text(json.dumps(found, indent=1))
        (self.out / "speed.txt").write_text(reports.text(found) + "\n")
        return found

    def taken(self) -> float:
        return time.monotonic() - self.begun

    def say(self, text: str) -> None:
        print(f"{self.taken():5.0f} s  {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder for speed.json and speed.txt")
    parser.add_argument("--only", action="append", choices=GROUPS, help="a group of rows; may be repeated")
    parser.add_argument("--markdown", type=Path, help="write the table as Markdown, too")
    parser.add_argument("--check", action="store_true", help="all of it on the CPU, tiny; times mean nothing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what is not begun by then is not run")
    asked = parser.parse_args(arguments)
    chosen = [row for row in rows(asked.check) if asked.only is None or row.group in asked.only]
    with tempfile.TemporaryDirectory() as scratch:
        device, dtype = ("cpu", "fp32") if asked.check else ("cuda", "bf16")
        found = Suite(chosen, asked.out, Path(scratch), device, dtype, asked.check, asked.seconds).run()
    print(reports.text(found))
    if asked.markdown:
        reports.put_markdown(found, asked.markdown)
    return 1 if any("reason" in row["ours"] for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
