"""Causality: which outputs depend on later tokens.

A value over a sequence may depend on tokens up to its own. One over chunks may need its *whole* chunk, or only what
stands before the chunk and its first token: then every token of the chunk may read it."""

from __future__ import annotations

from dataclasses import dataclass

from chunkc.ir import nodes as N
from chunkc.ir.axes import Size, SizeError
from chunkc.ir.diagnostics import Span
from chunkc.ir.graph import Graph, Unit
from chunkc.ir.ranges import Ranges

NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "!=": "=="}
Blame = tuple[Span, str]


class Horizon:
    """What nodes depend on: `blame` says why one looks ahead; `whole` are those that need their whole chunk."""

    def __init__(self, graph: Graph, span: Span, outer: Horizon | None = None, inner: str = "") -> None:
        self.graph, self.span, self.outer, self.inner = graph, span, outer, inner
        self.blame: dict[str, Blame | None] = {}
        self.whole: dict[str, bool] = {}
        self.bodies: dict[str, Horizon] = outer.bodies if outer else {}
        self.segments: dict[str, N.Segment] = (
            {n.chunk: n for n in graph.of_kind(N.Segment)} if outer is None else outer.segments
        )
        self.ranges = Ranges(graph.by_id)
        for node in graph.nodes:
            self.whole[node.id] = self.needs_chunk(node)
            found = next((b for a in node.operands() if (b := self.blame.get(a))), None)
            why = "" if found else self.why(node)
            self.blame[node.id] = (node.span or span, why) if why else found or self.inside(node)

    def kind(self, axis: str) -> str:
        return self.graph.axis[axis].kind

    def cut_by_length(self, chunk: str | None) -> bool:
        """Whether where these chunks lie depends on the sequence's length."""
        return chunk in self.segments and self.segments[chunk].rule == "parts"

    def needs_chunk(self, node: N.AnyNode) -> bool:
        if isinstance(node, N.Capture) and self.outer is not None:
            return self.outer.whole[node.outer]
        if isinstance(node, N.Reduce) and (node.chunk is not None and self.kind(node.chunk) == "chunk"
                                           or self.inner in node.over):  # fmt: skip
            return True
        if isinstance(node, N.Bounds):
            return node.fn in ("last", "length")
        if isinstance(node, N.Gather) and self.kind(node.axis) in ("time", "chunk"):
            return self.is_bound(node.index, "last")
        if isinstance(node, N.Shift) and self.kind(node.axis) == "chunk":
            return False
        if isinstance(node, N.Attend):
            return node.query is not None and self.kind(node.query) == "chunk"
        if isinstance(node, N.Out):
            source = self.graph[node.arg]
            if (
                isinstance(source, N.Recur)
                and self.kind(source.axis) == "chunk"
                and node.index < len(source.body.outputs)
            ):
                return self.body(source).whole[source.body.outputs[node.index][1]]
            return False
        return any(self.whole.get(a, False) for a in node.operands()) and not isinstance(node, N.Recur)

    def body(self, node: N.Recur) -> Horizon:
        if node.id not in self.bodies:
            inner = self.graph.axis[node.axis].parent or ""
            self.bodies[node.id] = Horizon(node.body, self.span, self, inner)
        return self.bodies[node.id]

    def why(self, node: N.AnyNode) -> str:
        """Why a node itself looks ahead; empty if it does not."""
        if isinstance(node, N.Reduce | N.Normalize | N.Recur) and self.cut_by_length(
            node.within if isinstance(node, N.Recur) else node.chunk
        ):
            return "where these chunks lie depends on the sequence's length"
        if isinstance(node, N.Bounds) and self.cut_by_length(node.chunk):
            return "where these chunks lie depends on the sequence's length"
        if isinstance(node, N.Reduce) and node.chunk is None and any(self.kind(a) != "size" for a in node.over):
            return "" if self.inner in node.over else "this is over the whole sequence"
        if isinstance(node, N.Normalize) and any(self.kind(a) != "size" for a in node.over):
            return "this is over the whole sequence" if node.chunk is None else "this is over a whole chunk"
        if isinstance(node, N.Shift) and _negative(node.by):
            return "this reads a later position"
        if isinstance(node, N.Length):
            return "this depends on the sequence's length"
        if isinstance(node, N.Gather):
            return self.why_gather(node)
        if isinstance(node, N.Attend):
            return next((why for s in node.sources if (why := Rows(self, node, s).why())), "")
        if (
            self.inner
            and self.inner in node.axes
            and any(self.whole[a] and self.inner not in self.graph[a].axes for a in node.operands())
        ):
            return "this needs the whole chunk, and its first position reads it"
        if isinstance(node, N.Out):
            source = self.graph[node.arg]
            if isinstance(source, N.Recur) and node.index >= len(source.body.outputs):
                return "this is the last state" if self.kind(source.axis) != "size" else ""
        return ""

    def inside(self, node: N.AnyNode) -> Blame | None:
        """What looks ahead in a recurrence's body: in the result itself, or in a state, which later steps read."""
        source = self.graph[node.arg] if isinstance(node, N.Out) else None
        if not isinstance(source, N.Recur) or not isinstance(node, N.Out):
            return None
        body, results = self.body(source), [c.result for c in source.carried]
        if node.index < len(source.body.outputs):
            results.insert(0, source.body.outputs[node.index][1])
        return next((b for r in results if (b := body.blame[r])), None)

    def why_gather(self, node: N.Gather) -> str:
        kind = self.kind(node.axis)
        if kind == "size":
            return ""
        if kind == "chunk":
            earlier = self.is_earlier_chunk(node.index)
            if earlier or self.is_bound(node.index, "of") and not self.whole[node.arg]:
                return ""
            return "this needs the whole chunk, and its first position reads it" if self.is_bound(
                node.index, "of") else "this reads a chunk at a computed position"  # fmt: skip
        if self.is_bound(node.index, "first") or self.is_bound(node.index, "last") or self.never_after(node.index):
            return ""
        return "this reads a computed position, which may be a later one"

    def is_bound(self, id_: str, fn: str) -> bool:
        node = self.graph[id_]
        if isinstance(node, N.Capture) and self.outer is not None:
            return self.outer.is_bound(node.outer, fn)
        return isinstance(node, N.Bounds) and node.fn == fn

    def is_earlier_chunk(self, id_: str) -> bool:
        """Whether an index is `c(t) - n` with n at least 1."""
        node = self.graph[id_]
        if isinstance(node, N.Capture) and self.outer is not None:
            return self.outer.is_earlier_chunk(node.outer)
        if not (isinstance(node, N.Map) and node.fn == "-" and self.is_bound(node.args[0], "of")):
            return False
        return self.ranges[node.args[1]][0] >= 1

    def never_after(self, id_: str) -> bool:
        """Whether a position over a sequence is proven to be at most the token's own."""
        node = self.graph[id_]
        if isinstance(node, N.Capture) and self.outer is not None:
            return self.outer.never_after(node.outer)
        if isinstance(node, N.Coord):
            return True
        if isinstance(node, N.Map) and node.fn == "min":
            return any(self.never_after(a) for a in node.args)
        if isinstance(node, N.Map) and node.fn == "-":
            return self.never_after(node.args[0]) and self.ranges[node.args[1]][0] >= 0
        if isinstance(node, N.Gather):
            return self.is_bound(node.arg, "first") and self.is_bound(node.index, "of")
        return False


@dataclass(frozen=True)
class Place:
    """What stands for a position in a mask: of a query, of a row, or the chunk that one lies in."""

    side: str
    chunk: str


class Rows:
    """Which rows of a source a query sees: whether its mask proves them to stand before it, or where it stands."""

    def __init__(self, outer: Horizon, node: N.Attend, source: N.Source) -> None:
        self.outer, self.graph, self.node, self.source, self.body = outer, outer.graph, node, source, node.body
        self.ranges = Ranges(node.body.by_id)

    def why(self) -> str:
        """Why a query may see a later row; empty if it does not."""
        axis, query = self.source.axis, self.node.query
        if axis is None:
            return ""
        if query is None or self.home(axis) != self.home(query):
            return "this is over the whole sequence"
        if self.source.mask is not None and self.proves(self.source.mask):
            return ""
        if self.body.axis[axis].kind == "chunk":
            return f"this may read a chunk that is not over: its mask does not say {axis} < {axis}({query})"
        return f"this may read later rows: its mask does not say {axis} <= {query}"

    def home(self, axis: str) -> str:
        """The sequence that an axis is, or whose chunks it has."""
        a = self.body.axis[axis]
        return self.home(a.parent) if a.kind == "chunk" and a.parent else a.space

    def proves(self, id_: str, holds: bool = True) -> bool:
        """Whether no later row is seen where this holds, or does not hold."""
        node = self.body[id_]
        if not isinstance(node, N.Map):
            return False
        if node.fn in ("not", "as"):
            return self.proves(node.args[0], holds != (node.fn == "not"))
        if node.fn in ("and", "or"):
            found = [self.proves(a, holds) for a in node.args]
            return any(found) if (node.fn == "and") == holds else all(found)
        fn = node.fn if holds else NEGATED.get(node.fn, "")
        if fn not in ("<", "<=", ">", ">=", "=="):
            return False
        less, more = node.args if fn in ("<", "<=", "==") else node.args[::-1]
        left, (low, _) = self.linear(less, 1)
        right, (other, _) = self.linear(more, -1)
        total = {p: n for p in {*left, *right} if (n := left.get(p, 0) + right.get(p, 0))}
        least = low + other + (fn in ("<", ">"))  # row - query + least <= 0, if these are the places left
        if sorted(total.values()) != [-1, 1]:
            return False
        row, query = sorted(total, key=lambda p: -total[p])
        if (row.side, query.side) != ("row", "query") or row.chunk != query.chunk:
            return False
        # A row's own position may be the query's; a chunk, unless the query is one too, must be over.
        chunks = row.chunk or self.body.axis[self.source.axis or ""].kind == "chunk"
        whole = chunks and self.body.axis[self.node.query or ""].kind != "chunk"
        return least >= (1 if whole else 0)

    def linear(self, id_: str, sign: int, side: str = "", outside: bool = False
               ) -> tuple[dict[Place, int], tuple[float, float]]:  # fmt: skip
        """A number as places with their signs, and the range of what is left; what bodies capture is looked up outside.

        On the larger side, which `sign` says, what is at most the query's position may stand for it."""
        graph, ranges = (self.graph, self.outer.ranges) if outside else (self.body, self.ranges)
        node = graph[id_]
        if not side and len(node.axes) == 1:
            side = {self.source.axis: "row", self.node.query: "query"}.get(node.axes[0], "other")
        if isinstance(node, N.Capture):
            return self.linear(node.outer, sign, side, outside=True)
        if isinstance(node, N.Rename):
            return self.linear(node.arg, sign, side, outside)
        place = self.place(node, side)
        if place is not None:
            return {place: sign}, (0, 0)
        if isinstance(node, N.Map) and node.fn in ("+", "-") and len(node.args) == 2:
            signs = (sign, sign if node.fn == "+" else -sign)
            (a, (a0, a1)), (b, (b0, b1)) = (self.linear(x, n, side, outside) for x, n in zip(node.args, signs))
            return {p: a.get(p, 0) + b.get(p, 0) for p in {*a, *b}}, (a0 + b0, a1 + b1)
        if isinstance(node, N.Map) and node.fn == ("min" if sign < 0 else "max"):  # at most, or at least, each argument
            placed = [x for a in node.args if (x := self.linear(a, sign, side, outside))[0]]
            if placed:
                return placed[0]
        if side == "query" and sign < 0 and outside and self.outer.never_after(id_):
            return {Place("query", ""): sign}, (0, 0)
        low, high = ranges[id_]
        return {}, (low, high) if sign > 0 else (-high, -low)

    def place(self, node: N.AnyNode, side: str) -> Place | None:
        if side not in ("row", "query"):
            return None
        if isinstance(node, N.Bounds) and node.fn in ("of", "index"):
            return Place(side, self.body.axis[node.chunk].space)
        edge = isinstance(node, N.Bounds) and (node.fn, side) in (("last", "row"), ("first", "query"))
        return Place(side, "") if edge or isinstance(node, N.Coord) and node.axes else None


def looks_ahead(unit: Unit) -> dict[str, Blame]:
    """The outputs that depend on later tokens, with the span that looks ahead and why."""
    horizon = Horizon(unit.graph, unit.span)
    return {name: b for name, id_ in unit.graph.outputs if (b := horizon.blame[id_]) is not None}


def _negative(size: Size) -> bool:
    try:
        return size.evaluate({}) < 0
    except (SizeError, KeyError):
        return Ranges.of_size(size)[0] < 0
