"""What is timed: a unit as it stands, and each recurrence or attention of a layer as an op of its own.

Peers are functions of ready operands. A layer computes these first, so that only its core can be their equal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from chunkc.backends.triton.emit import prefix_of
from chunkc.driver import Compiled
from chunkc.facts import facts
from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph, Module, Unit
from chunkc.ir.ranges import Ranges
from chunkc.ir.tuning import Tuning
from chunkc.pipeline import run

TAKEN = frozenset(("check", "cu_seqlens", "initial_state", "output_final_state"))  # arguments of every emitted op


@dataclass(frozen=True)
class Part:
    """A unit that is timed, compiled alone; `title` is what reports call it."""

    title: str
    compiled: Compiled

    @property
    def semantic(self) -> Unit:
        return self.compiled.checked.module.units[0]

    @property
    def unit(self) -> Unit:
        return self.compiled.units[0]

    def facts(self) -> dict[str, Any]:
        return facts(self.compiled)[0]


def parts_of(compiled: Compiled, unit: Unit) -> list[Part]:
    """A unit of a checked file; if it is a layer, its cores too."""
    whole = Part(f"{unit.kind} {unit.name}", _alone(compiled, unit, unit))
    if unit.kind == "op":
        return [whole]
    found = [(node, core(unit, node)) for node in unit.graph.of_kind(N.Recur, N.Attend)]
    return [whole, *(Part(_title(unit, node), _alone(compiled, c, unit)) for node, c in found if c is not None)]


def _title(unit: Unit, node: N.Recur | N.Attend) -> str:
    if isinstance(node, N.Attend):
        return f"attention {node.id} of {unit.name}"
    return f"recurrence {', '.join(c.name for c in node.carried)} of {unit.name}"


def _alone(compiled: Compiled, unit: Unit, owner: Unit) -> Compiled:
    """A unit as if it were the file's only one; `owner` is the file's unit that it is, or is a part of."""
    module = Module(file=compiled.checked.module.file, units=(unit,))
    checked = replace(compiled.checked, module=module, warnings=())
    return Compiled(checked, (unit.evolve(graph=run(unit.graph)),), _tuning(compiled, owner))


def _tuning(compiled: Compiled, owner: Unit) -> Tuning | None:
    """What was found by tuning the file, with the names that a unit's kernels have where it is alone."""
    if compiled.tuning is None:
        return None
    own = prefix_of(owner, compiled.units)
    kernels = {n.removeprefix(own): row for n, row in compiled.tuning.kernels.items() if n.startswith(own)}
    return compiled.tuning.model_copy(update={"kernels": kernels})


def core(unit: Unit, node: N.Recur | N.Attend) -> Unit | None:
    """One recurrence or attention as an op: what it reads are inputs, with the ranges that are proven of them.

    None if no sequence reaches it, if it reads something complex, or if it reads or gives something a chunk: inputs are
    neither."""
    graph = unit.graph
    outputs = _results(graph, node)
    touched = {a for id_ in (*node.operands(), *(id_ for _, id_ in outputs)) for a in graph[id_].axes}
    sequences = {graph.axis[a].kind for a in touched if graph.axis[a].is_sequence}
    if not outputs or _segments_compute(graph) or not sequences or "chunk" in sequences:
        return None
    given = graph.reachable(n.id for n in graph.of_kind(N.Input, N.Param))
    kept = {id_ for id_ in node.operands() if _normed(graph[id_])}  # vectors of length 1 stay such
    made = {graph[id_].operands()[0] if id_ in kept else id_ for id_ in node.operands()}
    made = {id_ for id_ in made if graph.reachable([id_]) & given}
    if any(graph[id_].dtype == "complex" for id_ in made):  # emitted ops take none
        return None
    names, ranges = _names(unit, made), Ranges(graph.by_id)
    fixed = [a for a in node.operands() if a not in made and a not in kept]
    kept |= graph.reachable([*fixed, *(n.id for n in graph.of_kind(N.Segment))])
    nodes: list[N.AnyNode] = []
    for n in graph.nodes:
        if n.id in made:
            nodes.append(_operand(graph, n, names[n.id], ranges))
        elif n.id in kept or n is node or isinstance(n, N.Out) and n.arg == node.id:
            nodes.append(n)
    inputs = tuple(n.name for n in nodes if isinstance(n, N.Input))
    ahead = tuple(n for n, _ in outputs) if unit.looks_ahead else ()
    return Unit(kind="op", name=f"{unit.name}_{outputs[0][0]}", params=unit.params, inputs=inputs, looks_ahead=ahead,
                graph=graph.evolve(nodes=tuple(nodes), outputs=outputs), span=node.span or unit.span)  # fmt: skip


def _results(graph: Graph, node: N.Recur | N.Attend) -> tuple[tuple[str, str], ...]:
    """What the layer reads of a node, by name; final states are none of it."""
    if isinstance(node, N.Attend):
        return ((_name(node.id, 0), node.id),)
    users = graph.users()
    outer = {id_ for _, id_ in graph.outputs}
    outs = [n for n in graph.of_kind(N.Out) if n.arg == node.id and n.index < len(node.body.outputs)]
    return tuple((_name(n.id, k), n.id) for k, n in enumerate(outs) if users[n.id] or n.id in outer)


def _segments_compute(graph: Graph) -> bool:
    """Whether chunks begin where something computed says so."""
    return any(n.begins is not None for n in graph.of_kind(N.Segment))


def _timed(graph: Graph, id_: str) -> bool:
    return any(graph.axis[a].is_sequence for a in graph[id_].axes)


def _name(id_: str, k: int) -> str:
    return id_ if id_.isidentifier() and id_.isascii() else f"x{k}"


def _normed(node: N.AnyNode) -> bool:
    return isinstance(node, N.Normalize) and node.fn == "l2_norm"


def _names(unit: Unit, ids: Iterable[str]) -> dict[str, str]:
    """A Python name for each operand, that of the spec where it has one."""
    taken = TAKEN | {p.name for p in unit.params} | {a.name for a in unit.graph.axes}
    out: dict[str, str] = {}
    for k, id_ in enumerate(sorted(ids)):
        name = _name(id_, k)
        out[id_] = f"{name}_{k}" if name in taken or name in out.values() else name
    return out


def _operand(graph: Graph, node: N.AnyNode, name: str, ranges: Ranges) -> N.AnyNode:
    """An input, or for what belongs to no sequence a parameter, in the place of a computed value."""
    if isinstance(node, N.Param):
        return node.evolve(name=name, init=None)
    low, high = ranges[node.id]
    kind: type[N.Input] | type[N.Param] = N.Input if _timed(graph, node.id) else N.Param
    return kind(id=node.id, span=node.span, axes=node.axes, dtype=node.dtype, name=name,
                low=None if math.isinf(low) else low, high=None if math.isinf(high) else high)  # fmt: skip
