"""Whether an emitted op is right: against float64 on hard gates, on a shorter sequence, and run twice."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from candidates import Candidate, packed, state_of
from ops import OPS, Operands
from rows import Case
from torch import Tensor

from chunkc.bench.timing import Call, Results
from chunkc.bench.worker import TOLERANCE, worst

SEED = 0


def checked(candidate: Candidate, case: Case, scratch: Path, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The error of a case on few tokens, in parts of the norm; whether a second run and a shorter sequence give the
    same bits."""
    x = OPS[case.op].draw(case.shape, case.gate, device, dtype, case.mode != "step")
    have = candidate.call(case, x).results(SEED, dtype)
    again = candidate.call(case, x).results(SEED, dtype)
    error = worst(have, exact(case, x, scratch, dtype))
    return {"error": error, "repeats": _same(have, again), "prefix": _prefix(candidate, case, x, have),
            "right": error <= TOLERANCE[dtype]}  # fmt: skip


def error_of(candidate: Candidate, case: Case, scratch: Path, device: str, dtype: torch.dtype) -> float:
    """The error of another library's function on the same operands."""
    x = OPS[case.op].draw(case.shape, case.gate, device, dtype)
    return worst(candidate.call(case, x).results(SEED, dtype), exact(case, x, scratch, dtype))


def _same(a: Results, b: Results) -> bool:
    return all(x is y or x is not None and y is not None and torch.equal(x, y) for m, n in zip(a, b)
               for x, y in zip(m, n))  # fmt: skip


def _prefix(candidate: Candidate, case: Case, x: Mapping[str, Tensor], have: Results) -> bool | None:
    """Whether the outputs of a part of the tokens are the first of all outputs; packed rows and steps have no part."""
    if case.mode != "whole":
        return None
    tokens = case.shape.T
    fewer = tokens - 64 if tokens > 64 else tokens // 2
    with torch.no_grad():
        part = candidate.call(case, {n: v[:, :fewer].contiguous() for n, v in x.items()}).forward()
    return all(torch.equal(p, whole[:, :fewer]) for p, whole in zip(part, have[0]))


# -- float64 -----------------------------------------------------------------------------------------------------------


def exact(case: Case, x: Mapping[str, Tensor], scratch: Path, dtype: torch.dtype) -> Results:
    """Outputs and gradients in float64, a token at a time; computed once for all candidates that are given the same."""
    known = scratch / f"{case.key().replace('/', '_')} {dtype}.pt"
    if known.exists():
        found: Results = torch.load(known)
        return found
    doubles = {n: v.detach().double().requires_grad_(v.requires_grad) for n, v in x.items()}
    found = _call(case, doubles).results(SEED, dtype)
    scratch.mkdir(parents=True, exist_ok=True)
    part = known.with_suffix(f".{os.getpid()}")
    torch.save(found, part)
    part.rename(known)
    return found


def _call(case: Case, x: Mapping[str, Tensor]) -> Call:
    meaning = OPS[case.op].meaning
    if case.mode == "step":
        return Call(lambda: _step(case, x), ())
    if case.packed:
        row, offsets = packed(case, x)
        ends = offsets.tolist()
        return Call(lambda: _joined(meaning, row, ends), list(row.values()))
    return Call(lambda: meaning(x), list(x.values()))


def _joined(meaning: Any, row: Operands, ends: list[int]) -> tuple[Tensor, ...]:
    parts = [meaning({n: v[:, a:b] for n, v in row.items()}) for a, b in zip(ends, ends[1:])]
    return tuple(torch.cat(found, 1) for found in zip(*parts))


def _step(case: Case, x: Operands) -> tuple[Tensor, ...]:
    """One token of gated linear attention, and the state after it."""
    state = state_of(case.shape, x["q"].device).double()
    state = state * torch.exp(x["g"][:, 0, :, :, None]) + x["k"][:, 0, :, :, None] * x["v"][:, 0, :, None]
    return torch.einsum("bhk,bhkv->bhv", x["q"][:, 0], state)[:, None] * case.shape.K**-0.5, state
