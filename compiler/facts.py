"""What the compiler knows of a unit: `chunkc explain`. Facts are plain data; each names its spec line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from chunkc.backends.operations import is_sharded
from chunkc.backends.operations import operations as layout_operations
from chunkc.backends.package import tunable
from chunkc.backends.scan import LIMIT, scan_form
from chunkc.backends.states import caches, whole_reason
from chunkc.backends.triton.emit import attention_of, prefix_of
from chunkc.backends.triton.pairs import NoKernel
from chunkc.backends.writer import Lines
from chunkc.driver import Compiled
from chunkc.estimates import At, estimated, invariance, matrix, render_estimates, render_schedule, schedule, sizes_at
from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.axes import Number, Size
from chunkc.ir.diagnostics import SourceFile, Span
from chunkc.ir.graph import Graph, Unit
from chunkc.ir.ranges import Ranges
from chunkc.ir.updates import absorbed, scaled_reads
from chunkc.passes.chunk import TILE
from chunkc.tuning import tuning_path

SCHEMA = 1
BYTES = {"bfloat16": 2, "float32": 4}


def facts(compiled: Compiled, mesh: Mapping[str, int] | None = None, at: At | None = None) -> list[dict[str, Any]]:
    """The facts of each unit, in the file's order. The schema is stable: keys are added, never changed.

    `mesh` are sizes of axes of the layout's mesh: then operations say what a rank sends. `at` are sizes and a machine:
    then recurrences have estimates.

    Raises:
        BenchError, SettingError: if there are no such sizes.
    """
    source = compiled.checked.source
    semantic = compiled.checked.module.units
    found = [{**_unit(source, before, after), "tuning": _tuning(compiled, after)}
             for before, after in zip(semantic, compiled.units)]  # fmt: skip
    for layout in (u["parallel"] for u in found if u["parallel"] and mesh is not None):
        _count_ranks(layout, (mesh or {}).get(layout["over"], 1))
    if at is not None:
        _estimate(compiled.units, found, at)
    return found


def _estimate(units: tuple[Unit, ...], found: list[dict[str, Any]], at: At) -> None:
    sizes = sizes_at(units, at)
    for unit, about in zip(units, found):
        for node, fact in zip(unit.graph.of_kind(N.Scan, N.Recur), about["recurrences"]):
            if matrix(node):
                fact["estimates"] = estimated(unit, node, sizes[unit.name], at)


def _place(source: SourceFile, span: Span | None) -> str:
    return source.place(span)


def _unit(source: SourceFile, semantic: Unit, unit: Unit) -> dict[str, Any]:
    graph = unit.graph
    return {
        "schema": SCHEMA,
        "unit": unit.name,
        "kind": unit.kind,
        "line": _place(source, unit.span),
        "inputs": [_tensor(source, graph, n.name, n) for n in graph.of_kind(N.Input)],
        "parameters": [_tensor(source, graph, n.name, n) for n in graph.of_kind(N.Param)],
        "outputs": [
            {**_tensor(source, graph, name, graph[id_]),
             "causality": "looks ahead" if name in unit.looks_ahead else "causal"}
            for name, id_ in graph.outputs
        ],
        "step": not unit.looks_ahead and not whole_reason(unit),
        "resumes": not whole_reason(unit),
        "whole_because": whole_reason(unit),
        "chunks": [{"name": n.chunk, "of": graph.axis[n.chunk].parent, "rule": n.rule, "line": _place(source, n.span)}
                   for n in graph.of_kind(N.Segment)],
        "sizes": {a.name: a.size.text() for a in graph.axes if a.size is not None},
        "schedule": {**unit.schedule.demands(), "set_aside": list(unit.schedule.set_aside)},
        "recurrences": list(_recurrences(source, unit)),
        "attentions": [_attention(source, unit, n) for n in graph.of_kind(N.Attend)],
        "operations": _cost_data(operations(graph)),
        "least_elements": _cost_data(elements(graph)),
        "parallel": None if unit.parallel is None else _parallel(source, unit),
        "least_bytes": {dtype: _cost_data(bytes_moved(graph, size)) for dtype, size in BYTES.items()},
    }  # fmt: skip


def _tuning(compiled: Compiled, unit: Unit) -> dict[str, Any] | None:
    """Where the schedules of a unit's kernels come from, if some of them were tuned."""
    source, tuning, file = compiled.checked.source, compiled.tuning, tuning_path(compiled.checked.source.path)
    if tuning is None or file is None:
        return None
    prefix = prefix_of(unit, compiled.units)
    own = [n for n in tunable(source, compiled.units) if n in tuning.kernels and n.startswith(prefix)]
    changed = [n for n in own if tuning.kernels[n].schedule != tuning.kernels[n].default]
    return {"file": file.name, "device": tuning.device, "shape": tuning.shape, "kernels": len(own),
            "changed": sorted(changed)} if own else None  # fmt: skip


def _tensor(source: SourceFile, graph: Graph, name: str, node: N.AnyNode) -> dict[str, Any]:
    return {"name": name, "axes": list(node.axes), "type": node.dtype, "line": _place(source, node.span)}


# -- recurrences -------------------------------------------------------------------------------------------------------


def _recurrences(source: SourceFile, unit: Unit) -> Iterable[dict[str, Any]]:
    graph = unit.graph
    ranges = Ranges(graph.by_id)
    for node in graph.of_kind(N.Scan, N.Recur):
        own = _scan(source, unit, node, ranges) if isinstance(node, N.Scan) else _steps(source, graph, node)
        yield {**own, "schedule": schedule(node), "prefix_invariant": invariance(source, unit, node)}


def _steps(source: SourceFile, graph: Graph, node: N.Recur) -> dict[str, Any]:
    return {
        "states": [c.name for c in node.carried],
        "line": _place(source, node.span),
        "form": "sequential",
        "over": node.axis,
        "within": node.within,
        "reason": node.reason,
        "state": [_state(graph, c.name, c.axes) for c in node.carried],
    }


def _scan(source: SourceFile, unit: Unit, scan: N.Scan, ranges: Ranges) -> dict[str, Any]:
    graph = unit.graph
    gates = [graph[g.arg] for g in scan.gates]
    constant = all(scan.axis not in g.axes for g in gates)
    return {
        "states": [scan.name],
        "line": _place(source, scan.span),
        "form": "chunk",
        "over": scan.axis,
        "within": scan.within,
        "transition": {
            "algebra": scan.algebra,
            "structure": _structure(scan, gates),
            "dependence": "constant" if constant else "by token",
            "field": "complex" if scan.dtype == "complex" else "real",
            "gates": [_place(source, g.span) for g in gates],
        },
        "writes": len(scan.writes) or int(scan.add is not None),
        "reads": len(scan.queries) or 1,
        "operands": _made(source, unit, scan),
        "scaled_at": sorted({_place(source, n.span) for n, _ in scaled_reads(unit, scan).values()}),
        "numerics": _licence(unit, scan, gates, ranges),
        "state": [_state(graph, scan.name, scan.declared)],
        "kernels": list(_kernels(scan)),
    }


def _made(source: SourceFile, unit: Unit, scan: N.Scan) -> dict[str, list[str]] | None:
    """The lines of the work by which a scan's kernels make its operands, and those of what they load for it."""
    if scan.prologue is None or is_sharded(unit, scan.axis):
        return None

    def places(ids: Iterable[str]) -> list[str]:
        return sorted({_place(source, unit.graph[id_].span) for id_ in ids} - {""}, key=lambda p: int(p.split(":")[-1]))

    work = [n.id for n in absorbed(unit.graph, scan) if isinstance(n, N.Map)]
    return {"made_at": places(work), "loaded_from": places(scan.prologue.leaves)} if work else None


def _kernels(scan: N.Scan) -> Iterable[dict[str, Any]]:
    """The launches of a scan, and the elements that each moves at least for a tile of tokens, or for the one token."""
    passes = (("forward", scan.kernels), ("backward", scan.kernels_backward), ("step", scan.kernel_step))
    for way, graph in passes:
        for kernel in graph.of_kind(T.Kernel) if graph is not None else ():
            cost: Cost = {}
            values = [graph[r].axes for r in kernel.reads] if graph is not None else []
            for axes in [*values, *(kernel.body[id_].axes for _, id_ in kernel.body.outputs)]:
                if way == "step" or any(kernel.body.axis[a].is_sequence for a in axes):  # else once a sequence
                    _add(cost, TILE if scan.axis in axes else 1, kernel.body, axes)
            yield {"name": kernel.role, "pass": way, "elements": _cost_data(cost)}


def _structure(scan: N.Scan, gates: list[N.AnyNode]) -> str:
    if not gates:
        return "none"
    axes = {a for g in gates for a in g.axes}
    if not (scan.i or scan.j):
        return "elementwise"
    key, value = bool(axes & set(scan.i)), bool(axes & set(scan.j))
    if key and value:
        return "a product of both sides"
    if key or value:
        return f"by {', '.join(scan.i if key else scan.j)}"
    return f"by {', '.join(a for a in scan.batch if a in axes)}" if axes - {scan.axis} else "by step"


def _licence(unit: Unit, scan: N.Scan, gates: list[N.AnyNode], ranges: Ranges) -> dict[str, Any]:
    """What is proven of the gate, and how exponents are anchored on that proof."""
    if scan.algebra == "max-plus":
        return {"gate": "max-plus", "anchoring": "none", "gate_gradient": "by the larger argument"}
    if scan.dtype == "complex" and gates:
        return {"gate": "modulus at most 1", "anchoring": "none: states are multiplied", "gate_gradient": "direct"}
    if not gates:
        return {"gate": "1", "anchoring": "none", "gate_gradient": "none"}
    logs = all(g.log for g in scan.gates)
    bounds = [ranges[g.id] for g in gates]
    if not (scan.i or scan.j):
        return {"gate": "in [0, 1]", "anchoring": "none: states are multiplied", "gate_gradient": "direct"}
    proven = "log-gate at most 0" if logs else "in [0, 1]"
    least = min(low for low, _ in bounds)
    return {
        "gate": proven,
        "least": least if least > float("-inf") else None,
        **_anchoring(unit, scan, logs),
    }


def _anchoring(unit: Unit, scan: N.Scan, logs: bool) -> dict[str, str]:
    """How pairs of tokens are anchored, and what a gate's gradient is summed from, by the kernels too."""
    form = scan_form(unit, scan)
    anchor, proven = form.mild()
    halves = "halves: every exponent is at most 0, for any gate"
    sums = "sums over straddling pairs" if logs else "direct gate gradient"
    if anchor is None:
        return {"anchoring": halves, "gate_gradient": sums}
    at = {"start": "the tile's start", "blocks": "the start of blocks of 16 tokens"}[anchor]
    which = "all tiles" if proven else f"tiles that decay by less than {LIMIT:g} nats"
    several = not logs or len(scan.gates) > 1
    return {
        "anchoring": f"{halves}; in bfloat16 on a GPU {which} at {at}",
        "gate_gradient": sums if several else f"{sums}; in bfloat16 on a GPU suffix sums of reads less writes",
    }


def _state(graph: Graph, name: str, axes: tuple[str, ...]) -> dict[str, Any]:
    return {"name": name, "axes": list(axes), "elements": _cost_data({_fixed(graph, axes): 1})}


def _attention(source: SourceFile, unit: Unit, node: N.Attend) -> dict[str, Any]:
    """An attention: its sources, the operations for each query and row that meet, and what runs it on a GPU."""
    graph, sources = unit.graph, []
    for s in node.sources:
        parts = {n.id: n for n in node.body.nodes}
        mask = None if s.mask is None else _place(source, parts[s.mask].span)
        needed = node.body.reachable(id_ for id_ in (s.logit, s.value, s.mask) if id_ is not None)
        cost = operations(node.body.evolve(nodes=tuple(n for n in node.body.nodes if n.id in needed)))
        if s.value is not None:
            _add(cost, 2, graph, {*node.logit_axes(), *parts[s.value].axes})
        sources.append({"rows": s.axis, "mask": mask, "operations": _cost_data(cost)})
    kept = [{"name": f.name, "axes": list(f.axes)} for f in caches(graph) if (f.node or "").startswith(f"{node.id}/")]
    made = attention_of(unit, node, node.id, Lines(source))
    kernels = [] if isinstance(made, NoKernel) else [m.kernel.name.removeprefix(f"{node.id}_") for m in made.all()]
    return {"name": node.id, "line": _place(source, node.span), "queries": node.query, "sources": sources,
            "keeps": kept, "kernels": kernels,
            "no_kernels_because": str(made) if isinstance(made, NoKernel) else ""}  # fmt: skip


# -- parallel layouts --------------------------------------------------------------------------------------------------

SENT = {"float": 4, "complex": 8, "int": 8, "bool": 1}  # bytes of an element; layouts send what is computed in


def _parallel(source: SourceFile, unit: Unit) -> dict[str, Any]:
    """How ranks share the unit's sequences, and the bytes that each operation sends to one other rank."""
    layout = unit.parallel
    assert layout is not None
    found = []
    for op in layout_operations(unit):
        cost: Cost = {}
        for s in op.sent:
            _add(cost, SENT[s.dtype], unit.graph, s.axes)
        per = {"state_allgather": "piece", "halo": "token of a halo", "ring": "row"}[op.kind]
        found.append({"name": op.method(), "kind": op.kind, "line": _place(source, op.node.span), "tokens": op.tokens,
                      "per": per, "bytes": _cost_data(cost)})  # fmt: skip
    return {"mesh": list(layout.mesh), "axis": layout.axis, "over": layout.over, "layout": layout.layout,
            "line": _place(source, layout.span), "operations": found}  # fmt: skip


# What the bytes that a rank sends are counted by.
SENDS = {
    "state_allgather": "row of the batch",
    "halo": "row of the batch and token of the halo",
    "ring": "row that it has",
}


def _count_ranks(layout: dict[str, Any], ranks: int) -> None:
    """What a rank sends in a forward; a backward sends as much, of a ring also the gradients of its floats."""
    layout["ranks"] = ranks
    for op in layout["operations"]:
        own = 2 if layout["layout"] == "zigzag" and op["kind"] != "ring" else 1
        op["sends"] = [{"count": t["count"] * own * (ranks - 1), "axes": t["axes"]} for t in op["bytes"]]
        op["sends_per"] = SENDS[op["kind"]]


def _render_parallel(p: dict[str, Any]) -> list[str]:
    ranks = f"{p['ranks']} ranks" if "ranks" in p else "ranks"
    out = [f"  {ranks} along {p['over']} share {p['axis']}, {p['layout']}  ({p['line']})"]
    for op in p["operations"]:
        tokens = f", {op['tokens']} tokens" if op["tokens"] else ""
        out.append(f"    {op['name']}: {op['kind']}{tokens}, {_cost_text(op['bytes'])} bytes a {op['per']}"
                   f"  ({op['line']})")  # fmt: skip
        if "sends" in op:
            out.append(f"      a rank sends {_cost_text(op['sends'])} bytes a {op['sends_per']}, forward")
    return out


# -- cost --------------------------------------------------------------------------------------------------------------

Cost = dict[tuple[str, ...], int]  # how many times the product of these axes' sizes


def _fixed(graph: Graph, axes: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(a for a in axes if graph.axis[a].size is not None))


def _add(cost: Cost, count: int, graph: Graph, axes: Iterable[str]) -> None:
    key = _fixed(graph, axes)
    cost[key] = cost.get(key, 0) + count


def operations(graph: Graph) -> Cost:
    """Floating-point operations a token: 2 for each product summed, 1 for each element of an elementwise function.

    A scan counts in its recurrent form: 1 for each gate, 2 for each write and each read, an element of the state."""
    cost: Cost = {}
    for node in graph.nodes:
        if isinstance(node, N.Scan):
            count = len(node.gates) + 2 * len(node.writes) + 2 * len(node.queries) + int(node.add is not None)
            _add(cost, count, graph, (*node.batch, *node.i, *node.j))
        elif isinstance(node, N.Linear):
            _add(cost, 2, graph, (*graph[node.arg].axes, *node.to))
        elif isinstance(node, N.Conv):
            _add(cost, 2, graph, graph[node.weight].axes)
        elif isinstance(node, N.Map) and node.fn not in ("as", "stop") and _timed(graph, node):
            _add(cost, 1, graph, node.axes)
        elif isinstance(node, N.Reduce) and _timed(graph, graph[node.arg]):
            _add(cost, 1, graph, graph[node.arg].axes)
        elif isinstance(node, N.Recur):
            for axes, count in operations(node.body).items():
                _add(cost, count, graph, axes)
    return cost


def _timed(graph: Graph, node: N.AnyNode) -> bool:
    """Whether a value is computed anew for each token; in a recurrence's body all are."""
    return any(graph.axis[a].is_sequence for a in node.axes) or bool(graph.of_kind(N.State))


def elements(graph: Graph) -> Cost:
    """Elements that cross memory at least, a token: each input read once and each output written once."""
    cost: Cost = {}
    for node in [*graph.of_kind(N.Input), *(graph[id_] for _, id_ in graph.outputs)]:
        _add(cost, 1, graph, node.axes)
    return cost


def bytes_moved(graph: Graph, size: int) -> Cost:
    """Bytes that cross memory at least, a token, for elements of this size."""
    return {axes: size * count for axes, count in elements(graph).items()}


def evaluate(cost: Cost, graph: Graph, settings: Mapping[str, Number]) -> int:
    """The number behind a cost for these parameters."""
    return sum(n * math.prod(_value(graph.axis[a].size, settings) for a in axes) for axes, n in cost.items())


def _value(size: Size | None, settings: Mapping[str, Number]) -> int:
    return 1 if size is None else int(size.evaluate(settings))


def _cost_data(cost: Cost) -> list[dict[str, Any]]:
    return [{"count": n, "axes": list(axes)} for axes, n in sorted(cost.items(), key=lambda c: (-len(c[0]), c[0]))]


def _cost_text(data: list[dict[str, Any]]) -> str:
    terms = [" ".join([*([str(t["count"])] if t["count"] != 1 or not t["axes"] else []), *t["axes"]]) for t in data]
    return " + ".join(terms) or "0"


# -- text --------------------------------------------------------------------------------------------------------------


def render_facts(found: list[dict[str, Any]]) -> str:
    """The facts as a person reads them."""
    out: list[str] = []
    for unit in found:
        out.append(f"{unit['kind']} {unit['unit']}  ({unit['line']})")
        for t in unit["inputs"]:
            out.append(f"  input   {t['name']}[{', '.join(t['axes'])}]  ({t['line']})")
        for t in unit["outputs"]:
            out.append(f"  output  {t['name']}[{', '.join(t['axes'])}]: {t['causality']}  ({t['line']})")
        for c in unit["chunks"]:
            out.append(f"  chunks  {c['name']} of {c['of']}: {c['rule']}  ({c['line']})")
        for r in unit["recurrences"]:
            out += _render_recurrence(r)
        for a in unit["attentions"]:
            out += _render_attention(a, bool(unit["whole_because"]))
        if unit["parallel"]:
            out += _render_parallel(unit["parallel"])
        if tuned := unit["tuning"]:
            at = ", ".join(f"{name}={n}" for name, n in tuned["shape"].items())
            share = f"{len(tuned['changed'])} of {tuned['kernels']}"
            out.append(f"  tuned on {tuned['device']} at {at}: {share} schedules are others  ({tuned['file']})")
        if aside := unit["schedule"]["set_aside"]:
            out.append(f"  the schedule here governs, and that of {', '.join(aside)} is set aside")
        out.append(f"  a token takes {_cost_text(unit['operations'])} operations")
        out.append(f"  and moves at least {_cost_text(unit['least_elements'])} elements: "
                   f"{_cost_text(unit['least_bytes']['bfloat16'])} bytes in bfloat16")  # fmt: skip
        why = unit["whole_because"] or "an output looks ahead"
        out.append(f"  step(): {'yes' if unit['step'] else f'no, {why}'}")
        out.append("")
    return "\n".join(out).rstrip() + "\n"


def _render_attention(a: dict[str, Any], whole: bool) -> list[str]:
    out = [f"  {a['name']}: attention  ({a['line']})"]
    for s in a["sources"]:
        rows = f"over {s['rows']}" if s["rows"] else "one row"
        mask = f", those that the mask lets be seen  ({s['mask']})" if s["mask"] else ""
        out.append(f"    rows        {rows}{mask}")
        out.append(f"                {_cost_text(s['operations'])} operations for a query and a row")
    why = a["no_kernels_because"]
    out.append(f"    on a GPU    {f'PyTorch, tile by tile, as {why}' if why else 'kernels ' + ', '.join(a['kernels'])}")
    if a["keeps"] and not whole:
        kept = ", ".join(f"{k['name']}[{', '.join(k['axes'])}]" for k in a["keeps"])
        out.append(f"    state       {kept} of every token so far")
    return out


def _render_recurrence(r: dict[str, Any]) -> list[str]:
    names = " and ".join(r["states"])
    within = f", anew in each chunk {r['within']}" if r["within"] else ""
    if r["form"] == "sequential":
        out = [f"  {names}: one step of {r['over']} at a time{within}  ({r['line']})",
               f"    reason      {r['reason']}"]  # fmt: skip
    else:
        t, n = r["transition"], r["numerics"]
        gates = f"  ({', '.join(g for g in t['gates'] if g)})" if any(t["gates"]) else ""
        out = [
            f"  {names}: chunk form{within}  ({r['line']})",
            f"    transition  {t['algebra']}, {t['structure']}, {t['dependence']}, {t['field']}{gates}",
            f"    numerics    gate {n['gate']}; anchoring {n['anchoring']}; gradient {n['gate_gradient']}",
        ]
        if made := r["operands"]:
            loaded, at = ", ".join(made["loaded_from"]), ", ".join(made["made_at"])
            out.append(f"    operands    made in its kernels ({at}) of what is loaded ({loaded})")
        if r["scaled_at"]:
            out.append(f"    results     multiplied by a number in its kernels ({', '.join(r['scaled_at'])})")
    for way in dict.fromkeys(k["pass"] for k in r.get("kernels", ())):
        own = [k for k in r["kernels"] if k["pass"] == way]
        moved = "; ".join(f"{k['name']} {_cost_text(k['elements'])}" for k in own)
        out.append(f"    {way:11} {moved} elements a {'token' if way == 'step' else 'tile'}")
    out += render_schedule(r)
    if "estimates" in r:
        out += render_estimates(r["estimates"])
    for s in r["state"]:
        out.append(f"    state       {s['name']}[{', '.join(s['axes'])}]: {_cost_text(s['elements'])} elements")
    return out
