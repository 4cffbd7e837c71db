"""What a scan's derived graphs share: their inputs, one a slot of the scan, under the spec's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import Span
from chunkc.ir.graph import Builder, Graph

Side = Literal["i", "j"]
SIDES: tuple[Side, Side] = ("i", "j")


def other(side: Side) -> Side:
    return "j" if side == "i" else "i"


# What derived graphs call their own values: an operand of such a name goes by its role.
_MADE = re.compile(r"(scan|expand|map)\w*|states?|last|before|initial|new|(d|out|score)_\w+|\w+_(ptr|tiles|tokens)")


@dataclass(frozen=True)
class Slot:
    """An operand of a scan: its id in the graph around, the name and axes of the input that stands for it."""

    arg: str
    name: str
    axes: tuple[str, ...]
    span: Span | None


def side_axes(scan: N.Scan, side: Side) -> tuple[str, ...]:
    return scan.i if side == "i" else scan.j


def state_axes(scan: N.Scan) -> tuple[str, ...]:
    return (*scan.batch, *scan.i, *scan.j)


def _roles(graph: Graph, scan: N.Scan) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Each operand's id, what it is called if the spec has no name, and its axes beyond the token's and the batch's.

    A gate without an axis of its side is one number a head; all else is laid out over the whole side."""
    for g in scan.gates:
        have = graph[g.arg].axes
        side = next((axes for axes in (scan.j, scan.i) if set(axes) & set(have)), ())
        yield g.arg, "gate" if g.log else "decay_gate", side
    for w in scan.writes:
        yield w.i, "key", scan.i
        yield w.j, "value", scan.j
    if scan.add is not None:
        yield scan.add, "add", ()
    for q in scan.queries:
        yield q.arg, "query", side_axes(scan, q.side)


def slots(graph: Graph, scan: N.Scan) -> tuple[Slot, ...]:
    """The scan's operands, in the order of `arguments`."""
    taken = {"initial"}
    found = []
    for arg, role, side in _roles(graph, scan):
        named = re.fullmatch(r"[A-Za-z]\w*", arg) and not _MADE.fullmatch(arg)
        base = arg if named else role
        name, n = base, 1
        while name in taken:
            n += 1
            name = f"{base}{n}"
        taken.add(name)
        found.append(Slot(arg, name, (scan.axis, *scan.batch, *side), graph[arg].span))
    return tuple(found)


def inputs(b: Builder, graph: Graph, scan: N.Scan) -> tuple[str, ...]:
    """Add an input for each operand; their ids, which are their names."""
    return tuple(b.add(N.Input, s.name, s.span, name=s.name, axes=s.axes) for s in slots(graph, scan))


def result_names(scan: N.Scan, operands: tuple[str, ...]) -> list[str]:
    """The scan's results by name: what each query reads, the trajectory of a scan without sides, the last state."""
    read = [f"out_{q}" for q in operands[len(operands) - len(scan.queries) :]] if scan.queries else []
    return [*read, *([] if scan.i or scan.j else ["before"]), "last"]


def renumbered(scan: N.Scan, operands: tuple[str, ...], initial: str) -> N.Scan:
    """The scan over these operands, one a slot, without derived graphs and without work around it."""
    given = iter(operands)
    gates = tuple(g.evolve(arg=next(given)) for g in scan.gates)
    writes = tuple(N.Write(i=next(given), j=next(given)) for _ in scan.writes)
    add = next(given) if scan.add is not None else None
    queries = tuple(q.evolve(arg=next(given)) for q in scan.queries)
    bare = dict.fromkeys([*scan.regions(), "prologue"])
    return scan.evolve(gates=gates, writes=writes, add=add, queries=queries, initial=initial, **bare)


def with_regions(graph: Graph, derive: Callable[[Graph, N.Scan], dict[str, Graph]]) -> Graph:
    """The graph, each scan with the graphs that are derived from it."""
    nodes = tuple(n.evolve(**derive(graph, n)) if isinstance(n, N.Scan) else n for n in graph.nodes)
    return graph.evolve(nodes=nodes)
