"""An attention as both of its halves see it: how its operands and results lie, and the statement that calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chunkc.backends.layout import EACH, LETTERS, NOWHERE, Layout
from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph


class Form:
    """An attention's sources by their captures. `outer` is the layout of the graph around it."""

    def __init__(self, outer: Layout, node: N.Attend) -> None:
        self.outer, self.node = outer, node
        self.query = node.query
        self.heads = node.logit_axes()
        self.own = tuple(a for a in node.axes if a != node.query)

    def inputs(self, source: N.Source) -> list[N.Input]:
        """What a source's functions take, in order: the captures of its part of the body, by their names."""
        assert source.scores is not None, "the attention was not differentiated"
        return source.scores.of_kind(N.Input)

    def captured(self) -> list[str]:
        return [n.id for n in self.node.body.of_kind(N.Capture)]

    def capture(self, name: str) -> N.Capture:
        node = self.node.body[name]
        assert isinstance(node, N.Capture)
        return node

    def shared(self, name: str) -> bool:
        """Whether a capture is the same for all sequences."""
        return self.outer.home(self.outer.graph, self.capture(name).outer) == NOWHERE

    def side(self, source: N.Source, name: str) -> str:
        """What a capture is over: q queries, r rows, else a dot."""
        axes = self.capture(name).axes
        return "q" if self.query in axes else "r" if source.axis in axes else "."

    def paired(self, source: N.Source) -> bool:
        """Whether a source's value differs from query to query."""
        return source.axis is None or source.value is not None and self.query in self.node.body[source.value].axes

    def value_axes(self, source: N.Source) -> tuple[str, ...]:
        """A value's dimensions behind the sequences': an empty name where it has none of that kind."""
        axes = () if source.value is None else self.node.body[source.value].axes
        own = tuple(a for a in axes if a not in (self.query, source.axis))
        return (*([self.query or ""] if self.paired(source) else []), source.axis or "", *own)

    def read(self, source: N.Source) -> str:
        """The sum of weights times values, as einsum writes it."""
        letter = dict(zip(self.own, (x for x in LETTERS if x not in "nts")))
        weights = "nts" + "".join(letter[a] for a in self.heads)
        value = ("nts" if self.paired(source) else "ns") + "".join(
            letter[a] for a in self.value_axes(source) if a in letter
        )
        return f"{weights}, {value} -> nt{''.join(letter.values())}"


@dataclass(frozen=True)
class Tile:
    """A source's functions of a tile: their names (`seen` is None where every tile is, `mask` where `seen` decides),
    the operands that `seen` compares, the sizes that all are given first, and their text."""

    scores: str
    gradients: str
    seen: str
    mask: str
    compared: list[int]
    sizes: list[str]
    text: str


@dataclass(frozen=True)
class Bounds:
    """Texts of the least and the most value of a tile."""

    least: str
    most: str


COMPARED = ("<", "<=", ">", ">=", "==", "!=")


@dataclass(frozen=True)
class Seen:
    """Whether a mask may hold of some pair of two tiles, by the bounds of what it compares, as the text of a condition.

    `leaf` gives the bounds of a capture or a position, None if they are not known; `number` the text of a constant;
    `larger` is the name of the function that gives the larger of two."""

    graph: Graph
    leaf: Callable[[N.AnyNode], Bounds | None]
    number: Callable[[N.Const], str]
    larger: str

    def holds(self, id_: str, may: bool = True) -> str:
        """Whether a mask may hold of some pair, or else must of all; `True` or `False` where nothing is known."""
        node, unknown = self.graph[id_], str(may)
        if isinstance(node, N.Input):
            found = self.leaf(node)
            return unknown if found is None else f"({found.most if may else found.least} > 0)"
        if not isinstance(node, N.Map):
            return unknown
        if node.fn == "as":
            return self.holds(node.args[0], may)
        if node.fn == "not":
            inner = self.holds(node.args[0], not may)
            return {"True": "False", "False": "True"}.get(inner, f"({inner} ^ True)")
        if node.fn in ("and", "or"):
            idle, final = ("True", "False") if node.fn == "and" else ("False", "True")
            parts = [x for x in (self.holds(a, may) for a in node.args) if x != idle]
            if final in parts or not parts:
                return final if parts else idle
            return f"({(' & ' if node.fn == 'and' else ' | ').join(parts)})" if len(parts) > 1 else parts[0]
        if node.fn not in COMPARED:
            return unknown
        left, right = (self.bounds(a) for a in node.args)
        return unknown if left is None or right is None else compared(node.fn, left, right, may)

    def opaque(self, id_: str) -> bool:
        """Whether some part of a mask is decided by its values alone."""
        node = self.graph[id_]
        if isinstance(node, N.Map) and node.fn in ("as", "not", "and", "or"):
            return any(self.opaque(a) for a in node.args)
        if isinstance(node, N.Map) and node.fn in COMPARED:
            return any(self.bounds(a) is None for a in node.args)
        return not isinstance(node, N.Const) and self.leaf(node) is None

    def bounds(self, id_: str) -> Bounds | None:
        """The bounds of a value; None where they are not known."""
        node = self.graph[id_]
        if isinstance(node, N.Const):
            return Bounds(self.number(node), self.number(node))
        if not isinstance(node, N.Map):
            return self.leaf(node) if node.dtype != "bool" else None
        if node.fn not in ("+", "-", "neg", "as", "abs") or len(node.args) > 2:
            return None
        parts = [b for a in node.args if (b := self.bounds(a)) is not None]
        if len(parts) < len(node.args):
            return None
        if node.fn == "as":
            return parts[0]
        if node.fn == "abs":
            least, most = parts[0].least, parts[0].most
            return Bounds(f"{self.larger}({self.larger}({least}, -{most}), 0)", f"{self.larger}(-{least}, {most})")
        if node.fn == "neg":
            return Bounds(f"(-{parts[0].most})", f"(-{parts[0].least})")
        a, b = parts
        if node.fn == "+":
            return Bounds(f"({a.least} + {b.least})", f"({a.most} + {b.most})")
        return Bounds(f"({a.least} - {b.most})", f"({a.most} - {b.least})")


def compared(fn: str, a: Bounds, b: Bounds, may: bool) -> str:
    """Whether a comparison may hold of some values, or must of all."""
    if fn in (">", ">="):
        return compared({">": "<", ">=": "<="}[fn], b, a, may)
    if fn in ("<", "<="):
        return f"({a.least} {fn} {b.most})" if may else f"({a.most} {fn} {b.least})"
    apart = f"(({a.most} < {b.least}) | ({b.most} < {a.least}))"
    if fn == "==":
        return f"({apart} ^ True)" if may else f"(({a.least} == {b.most}) & ({a.most} == {b.least}))"
    return f"(({a.least} != {b.most}) | ({a.most} != {b.least}))" if may else apart


def call(p: Layout, form: Form, tiles: list[Tile], cached: dict[str, tuple[str, str]], start: str, name: str,
         ring: str = "") -> None:  # fmt: skip
    """The statements that lay the operands out, and the call; `tiles` are the functions of each source.

    `cached` names, for captures over rows, the tensor of calls before and the variable for the next; `name` is what
    the function is called that runs it, `ring` the plan's operation, where ranks share the sequence of the queries."""
    node, w = form.node, p.w
    w(f"# {node.id}: {p.lines.code(node.span)}")
    queries, made = p.fresh("queries"), []
    if form.query is None:
        w(f"{queries} = Places(None, count={p.main}.count, device=device)")
    else:
        own = p.seq(p.graph.axis[form.query].space)
        w(f"{queries} = Places({own}, {start}){f' if plan is None else _ring.queries_of({own})' if ring else ''}")
    places: dict[str, str] = {}
    laid: dict[tuple[str, str], str] = {}
    for source, tile in zip(node.sources, tiles):
        rows = "None"
        if source.axis is not None:
            if source.axis not in places:
                places[source.axis] = p.fresh("rows")
                seq = p.seq(p.graph.axis[source.axis].space)
                beside = [n.name for s in node.sources if s.axis == source.axis for n in form.inputs(s)]
                first = next((cached[name][0] for name in beside if name in cached), None)
                begin = f"{p.chunks(source.axis)}.edges.start" if p.graph.axis[source.axis].kind == "chunk" else start
                shared = f"_ring.Whole({queries}, {seq}, {'None' if begin == start else begin})"
                if form.query is not None and seq == p.seq(p.graph.axis[form.query].space):
                    shared = f"_ring.Travelling({queries}, {first})"
                w(f"{places[source.axis]} = Places({seq}, {begin}{f', {first}' if first else ''})"
                  f"{f' if plan is None else {shared}' if ring else ''}")  # fmt: skip
            rows = places[source.axis]
        operands = [_operand(p, form, source, n, queries, rows, laid, cached) for n in form.inputs(source)]
        sides = "".join(form.side(source, n.name) for n in form.inputs(source))
        made.append(p.fresh("source"))
        w(f"{made[-1]} = Source(")
        names = [x if x == "None" else f"_torch.{x}" for x in (tile.scores, tile.gradients, tile.seen, tile.mask)]
        compared = "".join(f"{k}, " for k in tile.compared).rstrip()
        w(f"    {rows}, {', '.join(names)}, ({compared}), ({''.join(s + ', ' for s in tile.sizes).rstrip()}),")
        w(f'    ({"".join(o + ", " for o in operands).rstrip()}), "{sides}", "{form.read(source)}")')
    weighted = "".join("w" if a in form.heads else "." for a in form.own)
    result = p.fresh(node.id)
    shape = f"({''.join(a + ', ' for a in form.own).rstrip()})"
    run = f"(scans.{name} if plan is None else plan.{ring})" if ring else f"scans.{name}"
    given = f'{queries}, ({", ".join(made)},), {shape}, "{weighted}", ct'
    w(f"{result} = {run}({given})  # {p.lines.place(node.span)}")
    p.names[node.id] = result


def _operand(p: Layout, form: Form, source: N.Source, n: N.Input, queries: str, rows: str,
             laid: dict[tuple[str, str], str], cached: dict[str, tuple[str, str]]) -> str:  # fmt: skip
    """The text of an operand: one row a sequence where it is over queries or rows."""
    outer, side = form.capture(n.name).outer, form.side(source, n.name)
    home = p.home(p.graph, outer)
    text, _ = p.aligned(p.graph, outer, n.axes, home)
    if side == ".":
        return text if home in (NOWHERE, EACH) else f"{p.seq(home)}.spread({text})"
    at = queries if side == "q" else rows
    if (at, outer) not in laid:
        laid[at, outer] = p.fresh(f"{n.name}_at")
        before, after = cached.get(n.name, ("None", "")) if side == "r" else ("None", "")
        p.w(f"{laid[at, outer]} = {at}.lay({text}{f', {before}' if after else ''})")
        if after:
            p.w(f"{after} = {laid[at, outer]}")
    return laid[at, outer]
