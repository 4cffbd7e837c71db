"""The first calls of a package on a GPU, as JSON: how long they take, what they give, what was warned of.

    python tests/first_call.py FOLDER PACKAGE SETTINGS [--no-compiler]

With `--no-compiler` Triton's compiler and the C compiler fail: what runs was compiled ahead."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from typing import Any

import torch


def fail(*args: Any, **more: Any) -> None:
    raise AssertionError("something is compiled")


def main(folder: str, package: str, settings: str, *options: str) -> dict[str, Any]:
    torch.zeros(1, device="cuda").sum().item()  # the GPU is set up by whoever uses it first
    torch.mm(*torch.zeros(2, 8, 8, device="cuda", dtype=torch.bfloat16).unbind()).sum().item()
    start = time.perf_counter()
    if "--no-compiler" in options:
        os.environ["CC"] = "/bin/false"
        importlib.import_module("triton.compiler").compile = fail  # type: ignore[attr-defined]
    sys.path.insert(0, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(package)
        name = module.__all__[-1]
        layer = getattr(module, name)(**json.loads(settings), device="cuda", dtype=torch.bfloat16)
        for n, weight in enumerate(layer.parameters()):
            torch.manual_seed(n)
            torch.nn.init.normal_(weight, std=weight.shape[0] ** -0.5)
        torch.manual_seed(0)
        x = torch.randn(2, 200, layer._given_d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y, state = layer(x, layer.init_state(2))
        first = float(y.float().norm())
        forward = time.perf_counter() - start
        y.sum().backward()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        both = time.perf_counter() - start
        with torch.no_grad():
            token, _ = layer.step(x[:, 0], state)
        packed = layer(x[:1], cu_seqlens=torch.tensor([0, 30, 30, 200], device="cuda"))
        packed = packed[0] if isinstance(packed, tuple) else packed
        values = [first, *(float(v.float().norm()) for v in (x.grad, token, packed) if v is not None)]
    said = [str(w.message) for w in caught if "compiled ahead" in str(w.message)]
    return {"forward_s": forward, "both_s": both, "all_s": time.perf_counter() - start, "values": values, "said": said}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
