"""Whether a unit's sequence can be shared by ranks: what its layout demands, and what of the unit stands against it."""

from __future__ import annotations

from collections.abc import Iterator

from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import Diagnostic, Span, error
from chunkc.ir.graph import Graph, Unit

Found = tuple[Span | None, str]


def refusals(unit: Unit) -> list[Diagnostic]:
    """An error for each part of a unit that its parallel layout cannot hold; the unit is at the normal level."""
    if unit.parallel is None:
        return []
    found = dict.fromkeys(_Reasons(unit.graph, unit.parallel.axis).all())
    return [
        error("not-sharded", f"'{unit.name}' cannot be shared over '{unit.parallel.axis}': {why}", span or unit.span,
              related=((unit.parallel.span, "the layout"),),
              hints=("this version shares shifts, convolutions, recurrences in chunk form, and attention",))
        for span, why in found
    ]  # fmt: skip


class _Reasons:
    """What reads a sharded sequence otherwise than token by token, through a scan, a shift or an attention."""

    def __init__(self, graph: Graph, axis: str) -> None:
        self.graph, self.axis, self.users = graph, axis, graph.users()

    def along(self, axis: str | None) -> bool:
        """Whether an axis is the sharded sequence, or chunks of it."""
        if axis is None:
            return False
        home = self.graph.axis[axis]
        return home.space == self.axis or home.kind == "chunk" and self.along(home.parent)

    def all(self) -> Iterator[Found]:
        for node in self.graph.nodes:
            if isinstance(node, N.Scan):
                yield from self.scan(node)
            elif isinstance(node, N.Recur):
                yield from self.recurrence(node)
            elif isinstance(node, N.Attend):
                yield from self.attention(node)
            elif why := self.moves(node):
                yield node.span, why
            elif self.each_sequence(node) and not any(self.each_sequence(self.graph[a]) for a in node.operands()):
                yield node.span, "this is a value for each sequence"

    def moves(self, node: N.AnyNode) -> str:
        """Why a node needs tokens of other ranks; empty if it does not, or gets them. Chunks are a reason where they
        are declared, and not again where they are used."""
        if isinstance(node, N.Segment) and self.along(node.chunk) and not self.counted(node):
            return f"'{node.chunk}' are chunks of it"
        if isinstance(node, N.Reduce | N.Normalize) and node.chunk is not None:
            return ""
        if isinstance(node, N.Reduce) and any(map(self.along, node.over)):
            return "this is a reduction along it"
        if isinstance(node, N.Normalize) and any(map(self.along, node.over)):
            return "this is a normaliser along it"
        if isinstance(node, N.Length) and self.along(node.axis):
            return "this is its length"
        moved = isinstance(node, N.Gather | N.Scatter) and not isinstance(self.graph[node.arg], N.Bounds)
        axis = str(getattr(node, "axis", ""))
        if moved and self.along(axis) and self.graph.axis[axis].kind != "chunk":
            return "this reads computed positions"
        return ""

    def counted(self, chunks: N.Segment) -> bool:
        """Whether chunks only serve to say in which one a position lies, and where that begins: of fixed ones a rank
        knows both by itself."""
        over = [n for n in self.graph.nodes if chunks.chunk in n.axes]
        firsts = all(
            isinstance(n, N.Bounds)
            and n.fn == "first"
            and all(isinstance(u, N.Gather) and isinstance(self.graph[u.index], N.Bounds) for u in self.users[n.id])
            for n in over
        )
        within = any(isinstance(n, N.Scan | N.Recur) and n.within == chunks.chunk for n in self.graph.nodes)
        rows = any(s.axis == chunks.chunk for n in self.graph.of_kind(N.Attend) for s in n.sources)
        whole = any(isinstance(n, N.Normalize) and n.chunk == chunks.chunk for n in self.graph.nodes)
        return chunks.rule == "fixed" and firsts and not (within or rows or whole)

    def each_sequence(self, node: N.AnyNode) -> bool:
        """Whether a value has no sequence, but comes from inputs. A last state only counts where it is used."""
        recurrent = isinstance(node, N.Input | N.Scan | N.Recur)
        if recurrent or any(self.graph.axis[a].is_sequence for a in node.axes):
            return False
        if isinstance(node, N.Out) and not self.users[node.id]:
            return node.id in (id_ for _, id_ in self.graph.outputs)
        return any(isinstance(self.graph[i], N.Input) for i in self.graph.reachable([node.id]))

    def scan(self, node: N.Scan) -> Iterator[Found]:
        if self.from_input(node.initial):
            yield node.span, f"the initial value of {node.name} depends on an input"

    def from_input(self, initial: str | None) -> bool:
        return initial is not None and any(isinstance(self.graph[i], N.Input) for i in self.graph.reachable([initial]))

    def recurrence(self, node: N.Recur) -> Iterator[Found]:
        span = node.carried[0].span or node.span
        if self.along(node.axis):
            yield span, f"its steps are taken one by one ({node.reason})" if node.reason else "its steps are chunks"
            return
        for inner in node.body.nodes:
            moves = isinstance(inner, N.Shift | N.Conv) and self.along(inner.axis)
            if why := "a step of a recurrence reads other positions of it" if moves else self.moves(inner):
                yield inner.span or span, why

    def attention(self, node: N.Attend) -> Iterator[Found]:
        own = any(self.along(s.axis) for s in node.sources)
        if node.query is None or not self.along(node.query):
            if own or node.query is None:
                yield node.span, "an attention reads its rows for queries that are not along it"
            return
        for n in node.body.of_kind(N.Capture):
            sequences = any(self.graph.axis[a].is_sequence for a in self.graph[n.outer].axes)
            if not sequences and self.from_input(n.outer):
                yield n.span or node.span, "an attention reads a value for each sequence"
