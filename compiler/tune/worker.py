"""The process of one trial: `python -m chunkc.tune.worker REQUEST RESULT`, two JSON files.

A trial is a package whose table of schedules is changed for some kernels. It is checked or timed."""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chunkc.bench.sizes import Sizes
from chunkc.bench.timing import DTYPES, Results, median_ms
from chunkc.bench.worker import SHORT, TOLERANCE, Emitted, Say, answer, apart, compared
from chunkc.ir.tuning import Schedule

RUNS = 12  # of a profile; medians of kernels are of so many
FLUSHED = 1 << 28  # bytes written before each, more than a cache holds


class Looked(dict[str, Schedule]):
    """A table that keeps by kernel which row was looked up last: a walk may take its narrow one."""

    def __init__(self, table: Mapping[str, Schedule]) -> None:
        super().__init__(table)
        self.rows: dict[str, str] = {}

    def __getitem__(self, name: str) -> Schedule:
        self.rows[kernel_of(name)] = name
        return super().__getitem__(name)


def kernel_of(row: str) -> str:
    """The kernel of a row of the table."""
    return row.removesuffix("_narrow")


def check(runs: Emitted, sizes: Sizes, request: Mapping[str, Any], say: Say) -> None:
    """A short sequence against float64; at the size that is tuned for, against the untuned package."""
    module: Any = import_module(f"{runs.module.__name__}._kernels")
    seed, dtype, untuned = request["seed"], DTYPES[request["dtype"]], dict(module.SCHEDULES)
    call = runs.call(sizes)
    wanted = call.results(seed, dtype) if request["schedules"] else None
    table = Looked({**untuned, **{name: tuple(s) for name, s in request["schedules"].items()}})
    module.SCHEDULES = table
    have = call.results(seed, dtype)
    say(rows=sorted(table.rows.values()))
    if wanted is not None and not (off := _apart(have, wanted)) <= TOLERANCE[dtype]:
        say(reason=f"wrong: {off:.1e} from what the untuned schedules give")
        return
    error, allowed = compared(runs, sizes.short(SHORT), seed, dtype, True)
    if not error <= allowed:
        say(reason=f"wrong: {error:.1e} from float64 on {SHORT} tokens")


def _apart(have: Results, wanted: Results) -> float:
    """The largest difference of an output or a gradient, in parts of its norm, found where they are."""
    pairs = [[(x.float(), y.float()) for x, y in zip(a, b) if x is not None and y is not None]
             for a, b in zip(have, wanted)]  # fmt: skip
    return max(map(apart, pairs), default=0.0)


def time(runs: Emitted, sizes: Sizes, request: Mapping[str, Any], say: Say) -> None:
    """What each kernel takes, and the whole of it forward and with backward."""
    module: Any = import_module(f"{runs.module.__name__}._kernels")
    module.SCHEDULES |= {name: tuple(s) for name, s in request["schedules"].items()}
    call, dtype = runs.call(sizes), DTYPES[request["dtype"]]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return call.forward()

    both = call.both(forward(), request["seed"], dtype)
    names = {kernel_of(row) for row in module.SCHEDULES}
    say(kernels=kernel_times(both, names), forward_ms=median_ms(forward, "cuda"), both_ms=median_ms(both, "cuda"))


def kernel_times(run: Callable[[], object], names: set[str]) -> dict[str, float]:
    """The time of each of these kernels in one run, in ms: the median of a launch, times how many there are."""
    from torch.profiler import ProfilerActivity, profile

    cache = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(RUNS):
            cache.zero_()
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA" and event.name in names:
            found[event.name].append(event.device_time / 1e3)
    return {name: statistics.median(taken) * len(taken) / RUNS for name, taken in found.items()}


TASKS = {"check": check, "time": time}


def perform(request: Mapping[str, Any], say: Say) -> None:
    runs = Emitted(request, Path(request["package"]), built=True)
    runs.prepare()
    TASKS[request["task"]](runs, Sizes(request["settings"], request["lengths"], request["batch"]), request, say)


if __name__ == "__main__":
    answer(sys.argv[1], sys.argv[2], perform)
