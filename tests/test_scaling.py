"""The PyTorch path takes time and memory in proportion to the number of tokens, and walks over tiles, not tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import cases
import pytest
import torch
from emitted import Case, draw, emit
from torch import Tensor

from chunkc.ir.graph import Unit

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from Linux")
OPS = ["gated", "raw_product", "vector", "no_gate"]
SETTINGS = {"heads": 2, "dk": 16, "dv": 16, "scale": 0.5}
SHORT, LONG = 8192, 16384
FACTOR = 2.3


def values(unit: Unit, tokens: int) -> dict[str, Tensor]:
    """Inputs of one sequence that want gradients."""
    inputs, _ = draw(unit, Case(SETTINGS, [tokens]))
    return {n: (-x if n in cases.LOG_GATES else x)[None].requires_grad_() for n, x in inputs.items()}


def both_ways(module: ModuleType, unit: Unit, inputs: dict[str, Tensor]) -> None:
    """Forward and backward."""
    own = {k: v for k, v in SETTINGS.items() if any(p.name == k for p in unit.params)}
    out = getattr(module, unit.name)(**inputs, **own)
    out[0].sum().backward()
    for x in inputs.values():
        assert x.grad is not None
        x.grad = None


def peak() -> float:
    """Peak MiB of this process. (`ru_maxrss` would do, but for what a large parent leaves in it.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(name: str) -> dict[str, list[float]]:
    """Seconds of the processor and peak MiB beyond those of a short sequence, for the two lengths."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        module, units, _ = emit(cases.OPS[name], Path(folder), f"{name}.spec")
    both_ways(module, units[0], values(units[0], 512))
    base, memory = peak(), []
    for tokens in (SHORT, LONG):
        both_ways(module, units[0], values(units[0], tokens))
        memory.append(peak() - base)
    given = [values(units[0], tokens) for tokens in (SHORT, LONG)]
    taken: list[list[float]] = [[], []]
    for _ in range(7):  # by turns, so that a busy machine slows both down; the least is what the work itself takes
        for times, inputs in zip(taken, given):
            start = time.process_time()
            both_ways(module, units[0], inputs)
            times.append(time.process_time() - start)
    return {"seconds": [min(times) for times in taken], "memory": memory}


def measured(name: str) -> dict[str, list[float]]:
    """`measure` in a process of its own, whose peak memory nothing else has raised."""
    code = f"import json, test_scaling; print(json.dumps(test_scaling.measure({name!r})))"
    path = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", OPS)
def test_time_and_memory_are_linear(name: str) -> None:
    """Twice the tokens take less than 2.3 times as much; two retries, as the machine may be busy."""
    for last in (False, False, True):
        found = measured(name)
        ratios = {what: long / short for what, (short, long) in found.items()}
        assert found["memory"][0] > 1, found  # MiB: enough to compare
        if max(ratios.values()) < FACTOR:
            return
        assert not last, (ratios, found)


@pytest.mark.parametrize("name", OPS)
def test_no_loop_runs_over_tokens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk takes a step a tile, and no line of the package runs more often than T / 16 times."""
    tokens = LONG
    module, units, _ = emit(cases.OPS[name], tmp_path, f"{name}.spec")
    inputs = values(units[0], tokens)
    sequences = module._runtime.Sequences
    walk = sequences.steps
    walks: list[int] = []

    def counted(self: Any, reverse: bool) -> Iterator[tuple[Tensor, Tensor]]:
        walks.append(0)
        for step in walk(self, reverse):
            walks[-1] += 1
            yield step

    lines: Counter[tuple[str, int]] = Counter()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if Path(frame.f_code.co_filename).parent.parent != tmp_path:
            return None
        if event == "line":
            lines[frame.f_code.co_name, frame.f_lineno] += 1
        return trace

    monkeypatch.setattr(sequences, "steps", counted)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        both_ways(module, units[0], inputs)
    finally:
        sys.settrace(before)
    assert walks and max(walks) <= tokens // module._runtime.TILE
    assert lines
    assert max(lines.values()) <= tokens // 16, lines.most_common(3)
