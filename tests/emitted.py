"""Emitted packages against the reference interpreter: build, run both, compare."""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.stateless import _reparametrize_module

from chunkc.backends.package import emit_files
from chunkc.driver import compile_source
from chunkc.interp import Interpreter, Run, interpret
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import SourceFile
from chunkc.ir.graph import Unit

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def emit(text: str, folder: Path, name: str = "case.spec") -> tuple[ModuleType, tuple[Unit, ...], tuple[Unit, ...]]:
    """The emitted module of a spec, its units at the semantic and at the normal level."""
    source = SourceFile(name, text)
    compiled = compile_source(source)
    package = f"{Path(name).stem}_{uuid.uuid4().hex}"
    home = folder / package
    home.mkdir(parents=True)
    for file, content in emit_files(source, compiled.units, {}).items():
        (home / file).write_text(content)
    spec = importlib.util.spec_from_file_location(package, home / "__init__.py", submodule_search_locations=[str(home)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    spec.loader.exec_module(module)
    return module, compiled.checked.module.units, compiled.units


@dataclass
class Case:
    """One comparison: a unit, its settings, the lengths of its sequences, the inputs' dtype; whether it goes on from a
    state, and `keeps` the one after it."""

    settings: Mapping[str, Any]
    lengths: Sequence[int]
    packed: bool = False
    dtype: torch.dtype = torch.float32
    resume: bool = False
    keeps: bool = True
    seed: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"


def draw(unit: Unit, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs a token for all sequences together [tokens, ...] and parameters, rounded to the dtype."""
    torch.manual_seed(case.seed)
    sizes = Interpreter(unit.graph, Run(settings=case.settings, lengths={a.name: 0 for a in unit.graph.axes}))
    inputs: dict[str, Tensor] = {}
    for n in unit.graph.of_kind(N.Input):
        shape = [sum(case.lengths), *(sizes.size(a) for a in n.axes[1:])]
        make = case.values.get(n.name)
        value = make(shape) if make else torch.rand(shape) if n.low is not None else torch.randn(shape)
        inputs[n.name] = value.to(case.dtype) if n.dtype == "float" else value
    weights = {}
    for n in unit.graph.of_kind(N.Param):
        shape = [sizes.size(a) for a in n.axes]
        make = case.values.get(n.name)
        weights[n.name] = (make(shape) if make else torch.randn(shape) * 0.3).to(case.dtype)
    return inputs, weights


def state_shapes(unit: Unit, case: Case) -> dict[str, list[int]]:
    sizes = Interpreter(unit.graph, Run(settings=case.settings))
    recurrences = [n for n in unit.graph.of_kind(N.Recur) if unit.graph.axis[n.axis].is_sequence]
    return {c.name: [sizes.size(a) for a in c.axes] for n in recurrences for c in n.carried}


def reference(unit: Unit, case: Case, inputs: dict[str, Tensor], weights: dict[str, Tensor],
              initial: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """float64, a sequence and a token at a time: outputs [tokens, ...] and final states [N, ...]."""
    outputs: dict[str, list[Tensor]] = {}
    finals: dict[str, list[Tensor]] = {}
    start, shapes = 0, state_shapes(unit, case)
    for k, length in enumerate(case.lengths):
        tensors = {name: x[start : start + length] for name, x in inputs.items()}
        run = Run(case.settings, {**tensors, **weights}, {a.space: length for a in unit.graph.axes},
                  {name: s[k] for name, s in initial.items()})  # fmt: skip
        out, fin = interpret(unit, run)
        for name, x in out.items():
            axes = unit.graph[dict(unit.graph.outputs)[name]].axes
            timed = [k for k, a in enumerate(axes) if unit.graph.axis[a].is_sequence]
            outputs.setdefault(name, []).append(x.movedim(timed[0], 0) if timed else x[None])
        for name, x in fin.items():
            if name not in shapes:
                continue
            finals.setdefault(name, []).append(x[None])
        start += length
    return ({n: torch.cat(x) for n, x in outputs.items()}, {n: torch.cat(x) for n, x in finals.items()})


def call(module: ModuleType, unit: Unit, case: Case, inputs: dict[str, Tensor], weights: dict[str, Tensor],
         initial: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """The emitted unit on the same values, in the same layout as `reference`."""
    count = len(case.lengths)
    rows = (1, sum(case.lengths)) if case.packed else (count, case.lengths[0])
    shaped = {n: x.reshape(*rows, *x.shape[1:]) for n, x in inputs.items()}
    extra: dict[str, Any] = {}
    if case.packed:
        ends = torch.tensor(list(case.lengths)).cumsum(0)
        extra["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(case.device)
    if unit.kind == "op":
        open_ = {k: v for k, v in case.settings.items() if any(p.name == k for p in unit.params)}
        if initial:
            extra["initial_state"] = next(iter(initial.values())) if len(initial) == 1 else tuple(initial.values())
        fields = state_shapes(unit, case)
        result = getattr(module, unit.name)(**shaped, **weights, **open_, **extra,
                                            **({"output_final_state": case.keeps} if fields else {}))  # fmt: skip
        result = result if isinstance(result, tuple) else (result,)
        state = result[-1] if fields else None
        kept = fields if case.keeps else {}
        finals = dict(zip(kept, state if isinstance(state, tuple) else [state]))  # type: ignore[list-item]
    else:
        own = {k: v for k, v in case.settings.items() if any(p.name == k for p in unit.params)}
        layer = getattr(module, unit.name)(**own, device=case.device, dtype=case.dtype)
        named = dict(layer.named_parameters())
        assert {n.rstrip("_") for n in named} == {n.rstrip("_") for n in weights}, (sorted(named), sorted(weights))
        fields = state_shapes(unit, case)
        with _reparametrize_module(layer, weights):  # states may start from weights
            if not case.keeps or not hasattr(layer, "init_state"):
                result = layer(*shaped.values(), **extra)
                return by_name(unit, result if isinstance(result, tuple) else (result,)), {}
            start = layer.init_state(count, next(iter(initial.values())).dtype if initial else torch.float32)
            start = start.__class__(**{**start.__dict__, **initial})
            *result, state = layer(*shaped.values(), start, **extra)
        finals = {n: getattr(state, n) for n in fields}
    return by_name(unit, result), finals


def by_name(unit: Unit, result: Sequence[Tensor]) -> dict[str, Tensor]:
    """A call's outputs, [tokens, ...] where they are over a sequence."""
    outputs = {}
    for (name, id_), x in zip(unit.graph.outputs, result):
        timed = any(unit.graph.axis[a].is_sequence for a in unit.graph[id_].axes)
        outputs[name] = x.reshape(-1, *x.shape[2:]) if timed else x
    return outputs


def differs_when_cut(module: ModuleType, unit: Unit, case: Case, lengths: Sequence[int]) -> list[tuple[int, str]]:
    """Lengths at which the rows of a dense batch are cut, and outputs that are then not bitwise as they were before."""
    rows, whole = len(case.lengths), case.lengths[0]
    inputs, weights = draw(unit, case)
    inputs = {n: x.to(case.device) for n, x in inputs.items()}
    weights = {n: x.to(case.device) for n, x in weights.items()}
    found = []
    with torch.no_grad():
        uncut, _ = call(module, unit, case, inputs, weights, {})
        for length in lengths:
            part = {n: x.unflatten(0, (rows, whole))[:, :length].flatten(0, 1) for n, x in inputs.items()}
            cut, _ = call(module, unit, replace(case, lengths=[length] * rows), part, weights, {})
            for name, x in cut.items():
                before = uncut[name].unflatten(0, (rows, whole))[:, :length]
                if not torch.equal(x.unflatten(0, (rows, length)), before):
                    found.append((length, name))
    return found


def over_chunks(unit: Unit, output: str) -> bool:
    """Whether an output's rows are chunks, of which there are more places than chunks where values cannot be read."""
    axes = unit.graph[dict(unit.graph.outputs)[output]].axes
    return any(unit.graph.axis[a].kind == "chunk" for a in axes)


def leaves(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, device: str) -> dict[str, Tensor]:
    out = {}
    for name, x in tensors.items():
        y = x.detach().clone().to(device)
        if y.is_floating_point():
            y = (y.to(dtype) if dtype else y).requires_grad_()
        out[name] = y
    return out


def errors(module: ModuleType, semantic: Unit, case: Case) -> dict[str, float]:
    """For each output, final state and gradient, ‖x − ref‖ − 1e-30 √n over tol ‖ref‖, the worst of its heads."""
    inputs, weights = draw(semantic, case)
    initial: dict[str, Tensor] = {}
    if case.resume:
        make = case.values.get("initial", torch.randn)
        initial = {n: make([len(case.lengths), *s]) for n, s in state_shapes(semantic, case).items()}
    exact = [leaves(x, torch.float64, "cpu") for x in (inputs, weights, initial)]
    wanted = reference(semantic, case, *exact)
    keep = torch.float64 if case.dtype == torch.float64 else None
    given = [leaves(x, None, case.device) for x in (inputs, weights)] + [leaves(initial, keep, case.device)]
    have = call(module, semantic, case, *given)
    torch.manual_seed(case.seed + 1)
    total_w, total_h = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    found: dict[str, float] = {}
    for kind, ref, got in (("out", wanted[0], have[0]), ("state", wanted[1] if case.keeps else {}, have[1])):
        for name, x in ref.items():
            y = got[name].to("cpu", torch.complex128 if x.is_complex() else torch.float64)
            y = y.expand(x.shape) if y.shape == x.shape[1:] else y  # made of parameters alone
            y = y[: len(x)] if kind == "out" and over_chunks(semantic, name) else y  # behind the last are copies
            assert y.shape == x.shape, (name, y.shape, x.shape)
            found[f"{kind} {name}"] = worst(y, x, case.dtype)
            if x.requires_grad and y.requires_grad:
                if x.is_complex():
                    x, y = torch.view_as_real(x), torch.view_as_real(y)
                grad = torch.randn(x.shape).to(case.dtype).double()
                total_w, total_h = total_w + (x * grad).sum(), total_h + (y * grad).sum()
    total_w.backward()  # type: ignore[no-untyped-call]
    total_h.backward()  # type: ignore[no-untyped-call]
    for ref, got in zip(exact, given):
        for name, x in ref.items():
            if x.requires_grad:
                a = x.grad if x.grad is not None else torch.zeros_like(x)
                g = got[name].grad
                b = torch.zeros_like(x) if g is None else g.to("cpu", torch.float64)
                found[f"grad {name}"] = worst(b, a, case.dtype, per_head=name in inputs)
    return found


def worst(got: Tensor, ref: Tensor, dtype: torch.dtype, per_head: bool = True) -> float:
    """The error in units of the tolerance, over each head (dimension 1) where there is one."""
    if got.numel() == 0:
        return 0.0
    if got.dim() < 3 or not per_head:
        got, ref = got.reshape(1, 1, -1), ref.reshape(1, 1, -1)
    got, ref = got.detach(), ref.detach()
    got, ref = (x if x.is_complex() else x.double() for x in (got, ref))
    if bool(torch.isinf(ref).any()):
        same = torch.isinf(ref) & (got == ref)
        got, ref = got.masked_fill(same, 0), ref.masked_fill(same, 0)
    result = 0.0
    for h in range(got.shape[1]):
        a, b = got[:, h], ref[:, h]
        error = (a - b).norm().item() - 1e-30 * a.numel() ** 0.5
        error = float("inf") if error != error else max(error, 0.0)
        scale = TOLERANCE[dtype] * b.norm().item()
        result = max(result, 0.0 if error == 0 else error / scale if scale else float("inf"))
    return result
