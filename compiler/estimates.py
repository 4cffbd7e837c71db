"""Which schedule a recurrence has, what that keeps, and at given sizes what the model says of it and of others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from chunkc.artifact import fit_settings
from chunkc.backends.scan import LIMIT, TILE, scan_form
from chunkc.backends.triton.tables import CUT
from chunkc.bench.roles import scan_roles
from chunkc.bench.sizes import BenchError, Sizes, resolve
from chunkc.costs import (
    MACHINES,
    Estimate,
    GateKind,
    Machine,
    Scan,
    cheapest,
    estimates,
    least_bytes,
    least_operations,
    limit,
)
from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.axes import Number
from chunkc.ir.diagnostics import SourceFile
from chunkc.ir.graph import Graph, Unit
from chunkc.ir.ranges import Ranges

WIDTHS = {"bf16": 2, "fp32": 4}
LETTERS = ("B", "T", "H", "K", "V")
# The schedules that are emitted, each in a few words; `passes` is `split` in costs.py where
# sequences are cut.
USED = {
    "passes": "passes: a walk that leaves states at tiles' edges, then programs of one tile each",
    "walk": "walk: a program takes some elements over the tiles of a sequence",
    "tiles": "tiles: PyTorch, all tiles of a sequence at once, then over their edges",
    "steps": "steps: PyTorch, one step after the other",
}

CHANGES = {
    1: "one token, which is a step",
    CUT: f"{CUT} tokens, beyond which sequences of few heads are walked over in segments, and begin alike",
}
BY_TILE = (
    f"in bfloat16 a tile of {TILE} tokens that decays by less than {LIMIT:g} nats is anchored at its start, which "
    "later tokens of the tile may change: prefix_invariant = true forbids it"
)


@dataclass(frozen=True)
class At:
    """Sizes and a machine to estimate for."""

    shape: Mapping[str, int]
    settings: Mapping[str, Number]
    machine: str
    dtype: str


# -- what is used ------------------------------------------------------------------------------------------------------


def schedule(node: N.Scan | N.Recur) -> dict[str, Any]:
    """The schedule that is emitted for a recurrence on a GPU, and its launches."""
    if isinstance(node, N.Recur):
        return {"used": "steps", "forward": [], "backward": []}
    if node.dtype == "complex":
        return {"used": "tiles", "forward": [], "backward": []}
    launches = [
        [k.role for k in g.of_kind(T.Kernel)] if g is not None else [] for g in (node.kernels, node.kernels_backward)
    ]
    used = "passes" if node.i or node.j else "walk"
    return {"used": used, "forward": launches[0], "backward": launches[1]}


def invariance(source: SourceFile, unit: Unit, node: N.Scan | N.Recur) -> dict[str, Any]:
    """Whether a sequence that is cut short keeps, of the same operands, the tokens before bitwise."""
    graph = unit.graph
    chunk = node.within or (node.axis if graph.axis[node.axis].kind == "chunk" else None)
    rules = [n.rule for n in graph.of_kind(N.Segment) if n.chunk == chunk]
    moved = f"the sequence's length says where its chunks {chunk} begin" if "parts" in rules else ""
    used = schedule(node)["used"]
    return {
        "demanded": unit.schedule.prefix_invariant,
        "line": source.place(unit.schedule.span) if unit.schedule.prefix_invariant else "",
        "holds": not moved,
        "because": moved,
        "in_kernels": used in ("passes", "walk"),
        "by_tile": used == "passes" and isinstance(node, N.Scan) and _chosen_by_tile(unit, node),
        "in_pytorch": "always" if used == "walk" else "where products do not depend on how many stand beside them",
        "changes_at": list(CHANGES) if used == "passes" else [],  # the lengths at which another schedule is taken
    }


def _chosen_by_tile(unit: Unit, node: N.Scan) -> bool:
    """Whether kernels treat a tile by what all of its tokens decay by."""
    anchor, proven = scan_form(unit, node).mild()
    return anchor is not None and not proven


def render_schedule(r: Mapping[str, Any]) -> list[str]:
    kept = r["prefix_invariant"]
    kernels = "in kernels" + (f" with products in float32 ({BY_TILE})" if kept["by_tile"] else "")
    where = [*([kernels] if kept["in_kernels"] else []), f"in PyTorch {kept['in_pytorch']}"]
    changes = ", ".join(CHANGES[n] for n in kept["changes_at"]) or "none"
    holds = (
        f"yes, {'; '.join(where)}; the schedule changes at: {changes}" if kept["holds"] else f"no, {kept['because']}"
    )
    demanded = f"; demanded  ({kept['line']})" if kept["demanded"] else ""
    return [f"    schedule    {USED[r['schedule']['used']]}", f"    prefix-invariant: {holds}{demanded}"]


# -- what the model says -----------------------------------------------------------------------------------------------


def sizes_at(units: Iterable[Unit], at: At) -> dict[str, Sizes]:
    """The sizes of each unit that has a recurrence to estimate.

    Raises:
        BenchError: if a name is that of no axis, or a size cannot be had; or if no unit has such a recurrence.
        SettingError: if a setting fits no parameter.
    """
    units = list(units)
    known = {a.name for u in units for a in u.graph.axes} | set(LETTERS)
    if strange := [name for name in at.shape if name not in known]:
        raise BenchError(f"the spec has no axis '{strange[0]}': it has {', '.join(sorted(known - set(LETTERS)))}")
    settings, found = fit_settings(units, at.settings), {}
    for unit in units:
        scans = [n for n in unit.graph.of_kind(N.Scan) if matrix(n)]
        if scans:
            own = {n: v for n, v in settings.items() if any(p.name == n for p in unit.params)}
            shape = {n: v for n, v in at.shape.items() if n in LETTERS or n in unit.graph.axis}
            found[unit.name] = resolve(unit, scan_roles(scans[0]), own, shape, "cuda")
    if not found:
        raise BenchError("no recurrence here has a state over keys and values: there is nothing to estimate")
    return found


def matrix(node: N.AnyNode) -> bool:
    """Whether a recurrence has the schedules of `costs.py` to choose from."""
    return isinstance(node, N.Scan) and bool(node.i or node.j) and node.dtype != "complex"


def estimated(unit: Unit, scan: N.Scan, sizes: Sizes, at: At) -> dict[str, Any]:
    """The model's estimates of a scan, forward and backward."""
    machine, names = MACHINES[at.machine], sizes.named(unit)
    head = {"machine": machine.name, "target": machine.target, "dtype": at.dtype, "sizes": names}
    problem = _problem(unit, scan, sizes, WIDTHS[at.dtype])
    if isinstance(problem, str):
        return {**head, "why_not": problem, "passes": []}
    decay = problem.decay if math.isfinite(problem.decay) else None
    own = schedule(scan)
    passes = [_pass(problem, machine, way, own[way]) for way in ("forward", "backward")]
    return {**head, "why_not": "", "decay": decay, "score_levels": problem.levels, "passes": passes}


def _problem(unit: Unit, scan: N.Scan, sizes: Sizes, width: int) -> Scan | str:
    """A scan as the model takes it, or why it does not."""
    if scan.within is not None:
        return "the model knows no recurrence that starts anew in each chunk"
    sides = {q.side for q in scan.queries}
    if len(sides) != 1:
        return "the model knows reads along one side of the state alone"
    keys, values = (scan.i, scan.j) if sides == {"i"} else (scan.j, scan.i)

    def size(axes: Iterable[str]) -> int:
        return math.prod(sizes.of(unit, a) for a in axes)

    graph = unit.graph
    gates = [graph[g.arg] for g in scan.gates]
    return Scan(
        batch=sizes.batch, tokens=sizes.of(unit, scan.axis), heads=size(scan.batch), i=size(keys), j=size(values),
        width=width, gate_i=_kind(gates, keys, values), gate_j="each" if _over(gates, values) else "none",
        constant=all(scan.axis not in g.axes for g in gates), decay=_decay(graph, scan),
        writes=len(scan.writes), reads=len(scan.queries),
    )  # fmt: skip


def _over(gates: Iterable[N.AnyNode], axes: tuple[str, ...]) -> bool:
    return any(set(g.axes) & set(axes) for g in gates)


def _kind(gates: list[N.AnyNode], keys: tuple[str, ...], values: tuple[str, ...]) -> GateKind:
    """That of the gate on keys; a gate on neither side is one number a head, and stands there."""
    if _over(gates, keys):
        return "each"
    return "head" if any(not set(g.axes) & {*keys, *values} for g in gates) else "none"


def _decay(graph: Graph, scan: N.Scan) -> float:
    """The most that a gate is known to take off, in nats a token."""
    ranges, most = Ranges(graph.by_id), 0.0
    for gate in scan.gates:
        low = ranges[gate.arg][0]
        log = low if gate.log else math.log(low) if low > 0 else -math.inf
        most = max(most, -log)
    return most


def _pass(s: Scan, machine: Machine, way: str, emitted: list[str]) -> dict[str, Any]:
    backward = way == "backward"
    found = estimates(s, machine, backward)
    return {
        "pass": way,
        "limit_seconds": limit(s, machine, backward),
        "least_bytes": least_bytes(s, backward),
        "least_operations": least_operations(s, backward),
        "used": "split" if s.segments > 1 else "passes",
        "emitted": emitted,  # the launches that are, which may be more than the model's
        "cheapest": cheapest(found).schedule,
        "schedules": [_data(e, machine) for e in found],
    }


def _data(e: Estimate, machine: Machine) -> dict[str, Any]:
    if e.why_not:
        return {"schedule": e.schedule, "why_not": e.why_not}
    return {
        "schedule": e.schedule,
        "seconds": e.seconds,
        "bound": e.bound,
        "segments": e.segments,
        "bytes": e.total("bytes"),
        "operations": e.total("operations"),
        "exps": e.total("exps"),
        "launches": [
            {"name": x.name, "bytes": x.bytes, "operations": x.operations, "exps": x.exps, "programs": x.programs,
             "waves": x.waves(machine), "steps": x.steps}
            for x in e.launches
        ],
    }  # fmt: skip


def render_estimates(found: Mapping[str, Any]) -> list[str]:
    named = ", ".join(f"{name} {n}" for name, n in found["sizes"].items())
    out = [f"    on {found['machine']}, {found['dtype']}, {named}, by the model of docs/costs.md:"]
    if found["why_not"]:
        return [*out, f"      no estimate: {found['why_not']}"]
    for way in found["passes"]:
        least = f"{way['least_bytes'] / 1e6:.4g} MB, {way['least_operations'] / 1e9:.4g} GFLOP"
        out.append(f"      {way['pass']:9} at least {_ms(way['limit_seconds'])}: {least}")
        for e in way["schedules"]:
            marks = ["cheapest"] if way["cheapest"] == e["schedule"] else []
            marks += [f"used, as {', '.join(way['emitted'])}"] if way["used"] == e["schedule"] else []
            out.append(f"        {e['schedule']:7} {_said(e)}" + (f"  ({'; '.join(marks)})" if marks else ""))
    return out


def _said(e: Mapping[str, Any]) -> str:
    if e.get("why_not"):
        return f"impossible: {e['why_not']}"
    walk = max(e["launches"], key=lambda x: x["steps"])
    cut = f" in {e['segments']} segments" if e["segments"] > 1 else ""
    tiles = f"{walk['programs']} programs{cut} walk {walk['steps']} tiles, {walk['waves']:.2g} a multiprocessor"
    return (f"{_ms(e['seconds'])} by {e['bound']}; launches {len(e['launches'])}, {e['bytes'] / 1e6:.4g} MB, "
            f"{e['operations'] / 1e9:.4g} GFLOP, {e['exps'] / 1e9:.3g} G exps; {tiles}")  # fmt: skip


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
