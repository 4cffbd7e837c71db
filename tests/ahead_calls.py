"""First calls of packages with kernels compiled ahead, where no GPU is: run in a process of its own by test_ahead.py.

    python tests/ahead_calls.py REQUESTS RESULT

For each request a package is imported, told which GPU is there, and called. Triton's compiler is replaced by one that
notes what it is asked for, and launches end where the kernel is known."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from chunkc.ahead.calls import Caller, with_kernels
from chunkc.ahead.worker import Absent, compile_only
from chunkc.backends.triton.ahead import jitted


def first_calls(request: dict[str, Any]) -> dict[str, list[str]]:
    """What Triton was asked to compile, and what was warned of."""
    asked: list[str] = []

    def compiler(source: Any, **more: Any) -> SimpleNamespace:
        asked.append(source.fn.__name__)
        return SimpleNamespace()

    triton.compiler.compile = compiler
    triton.__version__ = request["triton"] or VERSION
    driver.set_active(Absent(GPUTarget(*request["target"])))
    sys.path.insert(0, request["folder"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(request["package"])
        for kernel in jitted(vars(with_kernels(module))):
            kernel.run = partial(compile_only, kernel)
        for unit in request["units"]:
            calls(Caller(module, unit, torch.bfloat16))
    sys.path.pop(0)
    return {"compiled": sorted(set(asked)), "said": [str(w.message) for w in caught]}


def calls(caller: Caller) -> None:
    """Whole sequences, then more of them; packed; one token."""
    for gradients, batch, first, more in itertools.product((True, False), (1, 3), (1, 64, 250, 255), (1, 7, 16)):
        with torch.set_grad_enabled(gradients and first > 1 and more > 1):
            caller.both({"t": first}, {"t": more}, batch)
    for keeps in (True, False):
        caller.call({"t": 5000}, 1, keeps=keeps)
        caller.call({"t": 100}, 1, packed=True, keeps=keeps)
        caller.call({"t": 5000}, 1, packed=True, keeps=keeps)


VERSION = triton.__version__

if __name__ == "__main__":
    requests = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([first_calls(r) for r in requests]))
