"""An attention as both of its halves see it: how its operands and results lie, and the statement that calls it."""

from __future__ import annotations

from dataclasses import dataclass

from chunkc.backends.layout import EACH, LETTERS, NOWHERE, Layout
from chunkc.ir import nodes as N


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
    """A source's functions of a tile: their names (`seen` is None where every tile is), the operands that `seen`
    compares, the sizes that all are given first, and their text."""

    scores: str
    gradients: str
    seen: str
    compared: list[int]
    sizes: list[str]
    text: str


def call(p: Layout, form: Form, tiles: list[Tile], cached: dict[str, tuple[str, str]], start: str,
         ring: str = "") -> None:  # fmt: skip
    """The statements that lay the operands out, and the call; `tiles` are the functions of each source.

    `cached` names, for captures over rows, the tensor of calls before and the variable for the next; `ring` the plan's
    operation, where ranks share the sequence of the queries."""
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
                first = next((cached[n.name][0] for n in form.inputs(source) if n.name in cached), None)
                begin = f"{p.chunks(source.axis)}.start" if p.graph.axis[source.axis].kind == "chunk" else start
                shared = f"_ring.Whole({queries}, {seq}, {'None' if begin == start else begin})"
                if form.query is not None and seq == p.seq(p.graph.axis[form.query].space):
                    shared = f"_ring.Travelling({queries}, {first})"
                w(f"{places[source.axis]} = Places({seq}, {begin}{f', {first}' if first else ''})"
                  f"{f' if plan is None else {shared}' if ring else ''}")  # fmt: skip
            rows = places[source.axis]
        operands = [_operand(p, form, source, n, queries, rows, laid, cached) for n in form.inputs(source)]
        sides = "".join(form.side(source, n.name) for n in form.inputs(source))
        w(f"{(name := p.fresh('source'))} = Source(")
        names = [x if x == "None" else f"_torch.{x}" for x in (tile.scores, tile.gradients, tile.seen)]
        compared = "".join(f"{k}, " for k in tile.compared).rstrip()
        w(f"    {rows}, {', '.join(names)}, ({compared}), ({''.join(s + ', ' for s in tile.sizes).rstrip()}),")
        w(f'    ({"".join(o + ", " for o in operands).rstrip()}), "{sides}", "{form.read(source)}")')
        made.append(name)
    weighted = "".join("w" if a in form.heads else "." for a in form.own)
    name = p.fresh(node.id)
    shape = f"({''.join(a + ', ' for a in form.own).rstrip()})"
    attend = f"(attend if plan is None else plan.{ring})" if ring else "attend"
    w(f'{name} = {attend}({queries}, ({", ".join(made)},), {shape}, "{weighted}", ct)  # {p.lines.place(node.span)}')
    p.names[node.id] = name


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
