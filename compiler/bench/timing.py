"""How long a call takes: medians of repeated runs, after runs that do not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

WARM_MS, TIMED_MS = 50, 200  # on a GPU, where the cache is emptied before each run
TIMED_S, FEWEST, MOST = 0.4, 3, 200  # on a CPU
Results = tuple[Sequence[Tensor], Sequence[Tensor | None]]  # outputs, and gradients
Made = TypeVar("Made")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Call:
    """A function of tensors that are given already, and those of them that have gradients."""

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: Sequence[Tensor]

    def both(self, like: Sequence[Tensor], seed: int, dtype: torch.dtype) -> Callable[[], Results]:
        """Forward and backward: the outputs, and the leaves' gradients. Those of the outputs are random, rounded to
        `dtype` and the same on every device; `like` are outputs of before."""
        source = torch.Generator().manual_seed(seed + 1)
        drawn = [torch.randn(o.shape, generator=source).to(dtype).to(o.device, o.dtype) for o in like]

        def run() -> Results:
            outs = self.forward()
            pairs = [(o, g) for o, g in zip(outs, drawn) if o.requires_grad]
            return outs, torch.autograd.grad([o for o, _ in pairs], list(self.leaves), [g for _, g in pairs],
                                             allow_unused=True)  # fmt: skip

        return run

    def results(self, seed: int, dtype: torch.dtype, backward: bool = True) -> Results:
        """One run: the outputs, and if asked for the leaves' gradients."""
        with torch.no_grad():
            outs = self.forward()
        return self.both(outs, seed, dtype)() if backward and self.leaves else (outs, ())


def seconds(run: Callable[[], Made], device: str) -> tuple[float, Made]:
    """How long a single call takes, and what it gives."""
    wait(device)
    start = time.perf_counter()
    made = run()
    wait(device)
    return time.perf_counter() - start, made


def wait(device: str) -> None:
    """Until the GPU has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def median_ms(run: Callable[[], Any], device: str) -> float:
    """The median time of a call."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=WARM_MS, rep=TIMED_MS, return_mode="median"))
    run()
    taken: list[float] = []
    while len(taken) < FEWEST or sum(taken) < TIMED_S and len(taken) < MOST:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3


def peak_mib(run: Callable[[], Any]) -> float:
    """GPU memory that a call takes at its worst, beside what was taken before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def rates(device: str, dtype: str) -> tuple[float, float]:
    """Bytes a second that a copy moves, and operations a second of a large matrix product."""
    n, side = (2**30, 8192 if dtype == "bf16" else 4096) if device == "cuda" else (2**27, 1024)
    x = torch.ones(n, dtype=torch.int8, device=device)
    y = torch.empty_like(x)
    bandwidth = 2 * n / (median_ms(partial(y.copy_, x), device) * 1e-3)
    a = torch.randn(side, side, device=device).to(DTYPES[dtype])
    return bandwidth, 2 * side**3 / (median_ms(lambda: a @ a, device) * 1e-3)
