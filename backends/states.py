"""What crosses from one call of a unit to the next: recurrences' states, tokens that shifts look back at, and what the
chunk that may go on holds so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chunkc.backends.layout import generic
from chunkc.backends.writer import is_name
from chunkc.ir import nodes as N
from chunkc.ir.axes import DType, Size
from chunkc.ir.graph import Graph, Unit

WHAT = {
    "state": "a recurrence's state",
    "history": "the last tokens that a shift or convolution reads",
    "running": "a reduction over the chunk that may go on",
    "cache": "the rows that an attention read so far, P of them or fewer",
}


@dataclass(frozen=True)
class StateField:
    """A field of a unit's state [N, (rows,) axes]; `node` is the one whose state it is, or from which it starts.

    A cache has no rows at first, and as many as were seen later."""

    name: str
    axes: tuple[str, ...]
    kind: Literal["state", "history", "running", "cache"] = "state"
    node: str | None = None
    rows: str | None = None
    dtype: DType = "float"


def states(graph: Graph) -> list[StateField]:
    """The states of recurrences over a sequence or its chunks, in declared order; `node` is the initial value."""
    found: dict[str, tuple[tuple[str, int], StateField]] = {}
    for n in graph.nodes:
        carried: list[N.Carried] = []
        if isinstance(n, N.Recur) and graph.axis[n.axis].is_sequence:
            carried = list(n.carried)
        elif isinstance(n, N.Scan):
            carried = [
                N.Carried(name=n.name, axes=n.declared, dtype=n.dtype, initial=n.initial, result="", span=n.span)
            ]
        for c in carried:
            place = (c.span.file, c.span.start) if c.span else ("", 0)
            found.setdefault(c.name, (place, StateField(c.name, c.axes, "state", c.initial, None, c.dtype)))
    return [field for _, field in sorted(found.values(), key=lambda f: f[0])]


def histories(graph: Graph) -> list[StateField]:
    """The tokens, or chunks, before the first that each shift back and convolution reads."""
    out: list[StateField] = []
    for node in graph.nodes:
        if isinstance(node, N.Conv) or isinstance(node, N.Shift) and not _is_zero_or_less(node.by):
            rows = f"{node.width.text(1)} - 1" if isinstance(node, N.Conv) else node.by.text()
            axes = tuple(a for a in node.axes if a != node.axis)
            base = node.id if not generic(node) else f"{node.arg}_before"
            out.append(StateField(_unused(base, "shift", out), axes, "history", node.id, rows, node.dtype))
    return out


def running(graph: Graph) -> list[StateField]:
    """Reductions chunk by chunk: what the chunk that may go on has summed so far."""
    out: list[StateField] = []
    for node in graph.nodes:
        if isinstance(node, N.Reduce) and node.chunk is not None and graph.axis[node.chunk].kind == "chunk":
            axes = tuple(a for a in node.axes if a != node.chunk)
            base = f"{node.arg if generic(node) else node.id}_so_far"
            out.append(StateField(_unused(base, "so_far", out), axes, "running", node.id, None, node.dtype))
        elif isinstance(node, N.Recur) and graph.axis[node.axis].kind == "chunk":
            inner = graph.axis[node.axis].parent
            for n in node.body.nodes:
                if isinstance(n, N.Reduce) and inner in n.over:
                    base = f"{n.arg if generic(n) else n.id}_so_far"
                    out.append(
                        StateField(_unused(base, "so_far", out), n.axes, "running", f"{node.id}/{n.id}", None, n.dtype)
                    )
    return out


def caches(graph: Graph) -> list[StateField]:
    """The rows of attentions: what each of their bodies captures over rows."""
    out: list[StateField] = []
    for node in graph.of_kind(N.Attend):
        over = {s.axis for s in node.sources}
        for n in node.body.of_kind(N.Capture):
            if over & set(n.axes):
                axes = tuple(a for a in n.axes if a not in over)
                base = f"{node.id}_rows" if generic(graph[n.outer]) else n.outer
                out.append(
                    StateField(_unused(base, f"{node.id}_rows", []), axes, "cache", f"{node.id}/{n.id}", "0", n.dtype)
                )
    return out


def fields(graph: Graph) -> list[StateField]:
    """All fields, in the order of a unit's state."""
    out: list[StateField] = []
    for f in [*states(graph), *histories(graph), *running(graph), *caches(graph)]:
        name, n = f.name, 1
        while any(x.name == name for x in out):
            n += 1
            name = f"{f.name}_{n}"
        out.append(StateField(name, f.axes, f.kind, f.node, f.rows, f.dtype))
    return out


def positioned(graph: Graph) -> bool:
    """Whether results depend on the position of the first token."""
    regions = [graph, *(n.body for n in graph.of_kind(N.Recur))]
    return any(
        isinstance(n, N.Segment | N.Attend) or isinstance(n, N.Coord) and graph.axis[n.axis].kind in ("time", "chunk")
        for g in regions for n in g.nodes
    )  # fmt: skip


def whole_reason(unit: Unit) -> str:
    """Why a unit runs over whole sequences only, and cannot go on from a state; empty if it can."""
    graph = unit.graph
    for state in states(graph):
        if state.node is not None and any(isinstance(graph[i], N.Input) for i in graph.reachable([state.node])):
            return f"the initial value of {state.name} depends on an input"
    rules = {n.chunk: n.rule for n in graph.of_kind(N.Segment)}
    for node in graph.nodes:
        if isinstance(node, N.Reduce) and node.chunk is None and any(graph.axis[a].is_sequence for a in node.over):
            return "a reduction is over the whole sequence"
        if isinstance(node, N.Normalize) and any(graph.axis[a].is_sequence for a in node.over):
            return "a normaliser is along the sequence"
        if isinstance(node, N.Attend) and (why := _attend_reason(unit, node)):
            return why
        if isinstance(node, N.Length):
            return "it depends on the sequence's length"
        if why := _chunk_reason(graph, node, rules):
            return why
        if isinstance(node, N.Gather) and graph.axis[node.axis].is_sequence:
            index = graph[node.index]
            bound = index.fn if isinstance(index, N.Bounds) else ""  # a chunk's last position so far is in the call
            if bound != ("of" if graph.axis[node.axis].kind == "chunk" else "last"):
                return "it reads the sequence at computed positions"
        if isinstance(node, N.Recur) and graph.axis[node.axis].kind == "chunk" and _nested(graph, node):
            return "a reduction over a chunk depends on another"
        if isinstance(node, N.Recur) and graph.axis[node.axis].kind == "size" and _moves(graph, node.body):
            return "a step of a recurrence reads other positions of the sequence"
    return ""


def _attend_reason(unit: Unit, node: N.Attend) -> str:
    """Why the rows of the calls before are not enough for an attention."""
    own = "" if node.query is None else unit.graph.axis[node.query].space
    rules = {n.chunk: n.rule for n in unit.graph.of_kind(N.Segment)}
    for axis in (s.axis for s in node.sources if s.axis is not None):
        home = unit.graph.axis[axis]
        cut = unit.graph.axis[home.parent].space if home.kind == "chunk" and home.parent else home.space
        if cut != own or rules.get(home.space, "fixed") != "fixed":
            return f"an attention reads rows over {axis}"
        if not any(axis in n.axes for n in node.body.of_kind(N.Capture)):
            return f"an attention reads nothing but places over {axis}, so no rows are kept"
    return "an attention looks ahead" if unit.looks_ahead else ""


def _chunk_reason(graph: Graph, node: N.AnyNode, rules: dict[str, str]) -> str:
    """Why a node's chunks are known only with the whole sequence."""
    if isinstance(node, N.Segment):
        return ""
    chunk = str(getattr(node, "chunk", None) or getattr(node, "axis", ""))
    within = str(getattr(node, "within", None))
    if "parts" in (rules.get(chunk), rules.get(within)):
        return "its chunks depend on the sequence's length"
    return "a run is complete only when the next one begins" if rules.get(chunk) == "runs" else ""


def _nested(graph: Graph, node: N.Recur) -> bool:
    """Whether a reduction over a chunk's positions depends on another: then what is summed so far is not enough."""
    inner = graph.axis[node.axis].parent
    reduced = {n.id for n in node.body.nodes if isinstance(n, N.Reduce) and inner in n.over}
    return any((node.body.reachable([id_]) - {id_}) & reduced for id_ in reduced)


def _moves(graph: Graph, body: Graph) -> bool:
    """Whether a body combines positions of a sequence; nothing keeps for it those of the calls before."""

    def along(node: N.AnyNode) -> bool:
        if isinstance(node, N.Reduce | N.Normalize):
            return any(graph.axis[a].is_sequence for a in node.over)
        return isinstance(node, N.Shift | N.Gather | N.Conv) and graph.axis[node.axis].is_sequence

    return any(along(node) for node in body.nodes)


def declared_axes(graph: Graph, state: str) -> tuple[str, ...]:
    """A state's axes as the spec declares them; a scan has them as batch, i, j."""
    return next(s.axes for s in states(graph) if s.name == state)


def _unused(base: str, plain: str, out: list[StateField]) -> str:
    """A name for a field: the base if it is a name, else the plain one, with a number where it is taken."""
    base = base if is_name(base) else plain
    name, n = base, 1
    while any(h.name == name for h in out):
        n += 1
        name = f"{base}_{n}"
    return name


def _is_zero_or_less(size: Size) -> bool:
    return not size.params() and size.evaluate({}) <= 0
