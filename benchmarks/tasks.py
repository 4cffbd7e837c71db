"""The tasks that rows ask for: a process each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ops import OPS
from rows import LARGE, MILDEST, OURS, Case, Row

Request = dict[str, Any]
FEW = 2**17  # tokens of all heads
FILLED = 256  # tokens that peers compile for; a length that is no multiple of 16 keeps its remainder


def timings(rows: Sequence[Row]) -> list[Request]:
    """One for each candidate, op and shape; gates share it. Peers' errors are found on the way, on all gates for the
    first shape."""
    found: dict[tuple[str, str, str], list[Case]] = {}
    counted = [row.case.key() for row in rows if any(must.kind == "launches" for must in row.musts)]
    for row in rows:
        for name, case in ((OURS, row.case), *row.rivals):
            op = case.op if name == OURS else case.op.removesuffix("_bounded")  # a bound means nothing to peers
            cases = found.setdefault((name, op, case.shape.text()), [])
            if case not in cases:
                cases.append(case)
    return [{**_timing(name, cases), "counted": counted} for (name, _, _), cases in found.items()]


def _timing(name: str, cases: Sequence[Case]) -> Request:
    errors = [] if name == OURS or name.startswith("sdpa") else list(dict.fromkeys(
        Case(c.op, c.shape.short(), gate) for c in cases
        for gate in (OPS[c.op].gates if c.shape == LARGE[0] else (c.gate,))
    ))  # fmt: skip
    return {"task": "time", "candidate": name, "cases": _data(cases), "errors": _data(errors),
            "title": f"{name}, {cases[0].op}, {cases[0].shape.text()}"}  # fmt: skip


def short(cases: Iterable[Case]) -> bool:
    """Whether calls may take the GPU less time than a busy CPU takes to launch them."""
    return any(OPS[c.op].vector or c.mode == "step" or c.shape.B * c.shape.T * c.shape.H <= FEW for c in cases)


def checks(rows: Iterable[Row]) -> list[Request]:
    """One for each op and its widths: all gates it is to be right on, and what rows do beside whole sequences."""
    found: dict[tuple[str, str], dict[Case, None]] = {}
    for row in rows:
        for name, case in ((OURS, row.case), *row.rivals):
            if name != OURS:
                continue
            short = case.shape.short()
            cases = found.setdefault((case.op, short.text()), {})
            gates = OPS[case.op].gates if case.mode == "whole" else ()
            cases |= dict.fromkeys(Case(case.op, short, gate, case.mode) for gate in (case.gate, *gates))
    return [
        {"task": "check", "candidate": OURS, "cases": _data(cases), "keys": [c.key() for c in cases],
         "title": f"{op}, {shape}"}
        for (op, shape), cases in found.items()
    ]  # fmt: skip


def fills(rows: Iterable[Row], shares: int) -> list[Request]:
    """Shares of compiling what peers of fla choose among, for all ops and widths."""
    wanted: dict[tuple[str, Case], None] = {}
    for row in rows:
        for name, case in row.rivals:
            if name.startswith("fla"):
                tokens = case.shape.T % 16 + min(case.shape.T // 16 * 16, FILLED)
                op, gate = case.op.removesuffix("_bounded"), MILDEST if OPS[case.op].gated else ""
                wanted[name, Case(op, replace(case.shape, T=tokens), gate)] = None
    if not wanted:
        return []
    peers, cases = [name for name, _ in wanted], [case for _, case in wanted]
    return [
        {"task": "fill", "candidate": "", "peers": peers, "cases": _data(cases), "share": k, "shares": shares,
         "title": f"share {k} of compiling"}
        for k in range(shares)
    ]  # fmt: skip


def cold(rows: Sequence[Row], scratch: Path) -> list[Request]:
    """The first call of the first op, with nothing compiled."""
    case = next((row.case for row in rows if row.case.mode == "whole"), None)
    if case is None:
        return []
    return [{"task": "cold", "candidate": OURS, "cases": _data([case]), "title": f"{case.op}, {case.shape.text()}",
             "errors": [], "environment": {"TRITON_CACHE_DIR": str(scratch / "cold")}}]  # fmt: skip


def _data(cases: Iterable[Case]) -> list[Mapping[str, Any]]:
    return [asdict(case) for case in cases]
