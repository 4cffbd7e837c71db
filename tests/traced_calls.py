"""Calls of emitted layers with kernels, traced by torch.compile where no GPU is: run in a process of its own by
test_pytorch.py.

    python tests/traced_calls.py SPEC...

Tensors are on the CPU, and nothing is computed by kernels: what counts is that they are traced without a break, and
that a compiled call launches what a call launches."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.utils._triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import chunkc
from chunkc.ahead.calls import with_kernels
from chunkc.ahead.worker import Absent
from chunkc.artifact import load_package
from chunkc.backends.triton.ahead import divert, jitted


class Idle:
    """A compiled kernel that does nothing when it is launched."""

    function = packed_metadata = None

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        self.launched.append(self.name)


def traced(spec: Path, folder: Path) -> list[dict[str, list[str]]]:
    """What a dense and a packed call, forward and backward, launch as they are and compiled."""
    module, launched = load_package(chunkc.build(spec, folder)), list[str]()
    for kernel in jitted(vars(with_kernels(module))):
        divert(kernel, lambda compile_, source, **more: Idle(source.fn.__name__, launched))
    layer = getattr(module, module.__all__[-1])(d_model=32)
    lengths, found = torch.tensor([13, 0, 1, 66, 1200]), []
    for x, more in (
        (torch.randn(2, 70, 32), {}),
        (torch.randn(1, int(lengths.sum()), 32), {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}),
    ):
        torch._dynamo.reset()
        own: dict[str, list[str]] = {}
        for name, call in (("eager", layer), ("compiled", torch.compile(layer, fullgraph=True, backend="aot_eager"))):
            launched.clear()
            y = call(x, **more)
            assert isinstance(y, Tensor) and y.shape == x.shape
            y.sum().backward()  # type: ignore[no-untyped-call]
            own[name] = sorted(launched)
        found.append(own)
    return found


if __name__ == "__main__":
    driver.set_active(Absent(GPUTarget("cuda", 90, 32)))
    torch.utils._triton.has_triton = lambda: True
    with tempfile.TemporaryDirectory() as home:
        print(json.dumps([traced(Path(spec), Path(home)) for spec in sys.argv[1:]]))
