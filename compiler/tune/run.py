"""The search for schedules: kernels are launches of their own, so that each has its fastest, whatever the others have.

One trial changes all kernels at once, each to its next candidate, and a profile tells their times apart. Trials are
processes: one that is wrong, dies or does not end is tried again kernel by kernel, and what fails alone is dropped."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chunkc.artifact import pack, replace_folder
from chunkc.backends.package import emit_files, tunable
from chunkc.bench.parts import parts_of
from chunkc.bench.run import Options, Talk, asked, attempt, device_name, unit_of, versions
from chunkc.bench.sizes import BenchError
from chunkc.driver import Compiled
from chunkc.ir.tuning import Schedule, Tuned, Tuning
from chunkc.tune.worker import kernel_of

WORKER = ("-m", "chunkc.tune.worker")
GAIN = 0.98  # of the untuned time: what is nearer is within the scatter of measurements
Table = Mapping[str, Schedule]
Trial = Callable[[str, Table], Mapping[str, Any]]


@dataclass(frozen=True)
class Dropped:
    """A schedule that must not be used, and why."""

    kernel: str
    schedule: Schedule
    reason: str


@dataclass(frozen=True)
class Found:
    """What is written, what was dropped, and the times in ms, untuned and tuned, forward and with backward."""

    tuning: Tuning
    dropped: tuple[Dropped, ...]
    before: tuple[float, float]
    after: tuple[float, float]


def tune(compiled: Compiled, path: Path, options: Options, jobs: int, talk: Talk) -> Found:
    """Search on the GPU at hand, at the sizes of `options`; `compiled` is without a tuning file. `jobs` trials are
    compiled and checked at once.

    Raises:
        BenchError: if there is no GPU, nothing to tune, or what is untuned or what was found is wrong.
    """
    if not torch.cuda.is_available():
        raise BenchError("schedules are tuned on a GPU, and there is none here that torch can use")
    unit = unit_of(compiled, options.unit)
    sizes, base = asked(unit, parts_of(compiled, unit), path, replace(options, dtype="bf16"), "cuda")
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "untuned"
        replace_folder(pack(compiled, emit_files, {}), package)
        request = {**base, "part": 0, "package": str(package), "tuned": False}

        def trial(task: str, table: Table) -> Mapping[str, Any]:
            return attempt({**request, "task": task, "schedules": table}, options.limit_seconds, WORKER)

        rows, dropped, before, after = search(trial, tunable(compiled.checked.source, compiled.units), jobs, talk)
    tuning = Tuning(device=device_name("cuda"), unit=unit.name, settings=dict(sizes.settings), shape=sizes.named(unit),
                    versions=versions(), kernels=rows)  # fmt: skip
    return Found(tuning, dropped, before, after)


Times = tuple[float, float]


def search(trial: Trial, known: Mapping[str, tuple[Schedule, ...]], jobs: int, talk: Talk
           ) -> tuple[dict[str, Tuned], tuple[Dropped, ...], Times, Times]:  # fmt: skip
    """Rows of the file, what was dropped, and the whole times before and after. `known` are a kernel's candidates, the
    untuned one first; `trial` checks or times a table of those that differ."""
    talk("checking and timing the untuned schedules")
    first = _right(trial("check", {}), "the untuned schedules")
    taken = [row for row in first["rows"] if row in known]
    if not taken:
        raise BenchError("nothing here has kernels whose schedules could be others")
    untuned = _right(trial("time", {}), "the untuned schedules")
    most = max(len(known[row]) for row in taken)
    rounds = [{row: known[row][k] for row in taken if k < len(known[row])} for k in range(1, most)]
    talk(f"checking {len(rounds)} tables of other schedules")
    right, dropped = _checked(trial, rounds, jobs, talk)
    times: dict[str, dict[Schedule, float]] = defaultdict(dict)
    for n, table in enumerate(right):
        talk(f"timing {n + 1} of {len(right)}")
        found = trial("time", table)
        for row, schedule in table.items():
            if (ms := found.get("kernels", {}).get(kernel_of(row))) is not None:
                times[row][schedule] = ms
    rows = {row: _best(known[row][0], untuned["kernels"][kernel_of(row)], times[row]) for row in taken}
    chosen = {row: t.schedule for row, t in rows.items() if t.schedule != t.default}
    talk("checking and timing what was chosen")
    after = untuned
    if chosen:
        _right(trial("check", chosen), "what was chosen")
        after = _right(trial("time", chosen), "what was chosen")
    return rows, dropped, _whole(untuned), _whole(after)


def _checked(trial: Trial, rounds: Sequence[Table], jobs: int, talk: Talk) -> tuple[list[Table], tuple[Dropped, ...]]:
    """The tables that are right; those of one row for what is left of others; and what is dropped."""
    right: list[Table] = []
    dropped: list[Dropped] = []
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(partial(trial, "check"), rounds))
    for table, result in zip(rounds, found):
        if "reason" not in result:
            right.append(table)
            continue
        talk(f"a table fails ({result['reason']}): its {len(table)} schedules are checked one by one")
        for row, schedule in table.items():
            alone = trial("check", {row: schedule})
            if "reason" in alone:
                dropped.append(Dropped(row, schedule, str(alone["reason"])))
            else:
                right.append({row: schedule})
    return right, tuple(dropped)


def _best(default: Schedule, default_ms: float, times: Mapping[Schedule, float]) -> Tuned:
    """The fastest, if it is faster than the untuned one."""
    schedule = min(times, key=lambda s: times[s], default=default)
    if times.get(schedule, default_ms) >= GAIN * default_ms:
        schedule = default
    return Tuned(schedule=schedule, ms=times.get(schedule, default_ms), default=default, default_ms=default_ms)


def _right(found: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """
    Raises:
        BenchError: if a trial that must not fail did.
    """
    if "reason" in found:
        raise BenchError(f"{what} cannot be used here: {found['reason']}")
    return found


def _whole(found: Mapping[str, Any]) -> Times:
    return found["forward_ms"], found["both_ms"]
