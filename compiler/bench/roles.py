"""Which axes of a recurrence or attention are heads, keys and values, and which values are its operands.

Peers take operands [B, T, H, K] and [B, T, H, V]; what these letters are in a spec follows from its graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph

Letter = str  # T or S for the query's and the rows' sequence, H or G for heads and their groups, K, V


@dataclass(frozen=True)
class Roles:
    """The axes behind each letter. `kind` says of what: a scan, a recurrence that has no chunk form, an attention."""

    kind: str
    node: str
    letters: tuple[tuple[Letter, tuple[str, ...]], ...]

    def axes(self, letter: Letter) -> tuple[str, ...]:
        return dict(self.letters).get(letter, ())


def roles_of(graph: Graph) -> Roles | None:
    """Those of the first attention of a graph at the normal level, else of its first state with two sides."""
    for node in graph.of_kind(N.Attend):
        found = attention_roles(graph, node)
        if found is not None:
            return found
    for node in graph.of_kind(N.Scan):
        if node.i and node.j:
            return scan_roles(node)
    for node in graph.of_kind(N.Recur):
        for carried in node.carried:
            if len(carried.axes) >= 2 and graph.axis[node.axis].kind == "time":
                *heads, key, value = carried.axes
                return _named("recurrence", node.id, T=(node.axis,), H=tuple(heads), K=(key,), V=(value,))
    return None


def scan_roles(node: N.Scan) -> Roles:
    """Those of a state with two sides."""
    return _named("scan", node.id, T=(node.axis,), H=node.batch, K=node.i, V=node.j)


def _named(kind: str, node: str, **letters: tuple[str, ...]) -> Roles:
    return Roles(kind, node, tuple(letters.items()))


def attention_roles(graph: Graph, node: N.Attend) -> Roles | None:
    """An attention of one source whose logit is summed over something; None for others."""
    rows = [s for s in node.sources if s.axis is not None]
    if node.query is None or not rows or rows[0].axis is None:
        return None
    body, source = node.body, rows[0]
    inside = body.reachable([source.logit])
    over = {a for n in body.of_kind(N.Reduce) if n.id in inside for a in n.over}
    heads = node.logit_axes()
    value = tuple(a for a in node.axes if a != node.query and a not in heads)
    keys = [n for n in body.of_kind(N.Capture) if n.id in inside and source.axis in n.axes]
    groups = tuple(a for n in keys[:1] for a in n.axes if a != source.axis and a not in over)
    if not over or not value:
        return None
    return _named(
        "attention", node.id, T=(node.query,), S=(rows[0].axis,), H=heads, G=groups, K=tuple(sorted(over)), V=value
    )


def factors(graph: Graph, id_: str) -> Iterator[str]:
    """A value, and what it is a product of."""
    yield id_
    node = graph[id_]
    if isinstance(node, N.Map) and node.fn in ("*", "/"):
        for arg in node.args:
            yield from factors(graph, arg)


def timed(graph: Graph, ids: Iterable[str]) -> list[str]:
    """Those of the values that belong to a sequence."""
    return [i for i in ids if any(graph.axis[a].is_sequence for a in graph[i].axes)]
