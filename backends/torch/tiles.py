"""Prints a graph over tiles as PyTorch statements: one line a node, short ones inside the line that uses them.

In emitted code a value is a batch of matrices [n tiles, H heads, rows, columns]. Rows and columns are known here by a
symbol each: a place in a tile or in half of a block (the axis's name), a side of the state ("i", "j"), or "1". A graph
does not say how a matrix lies; transposes are put where two of them meet.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from chunkc.backends.writer import Lines, Writer
from chunkc.ir import nodes as N
from chunkc.ir import tiles as T
from chunkc.ir.graph import Graph

Layout = tuple[str, str]
SUM, PRODUCT, ATOM = 1, 2, 3  # how tightly a text binds
FUNCTIONS = frozenset(("seq", "ctx", "before", "after", "upto", "onward", "halves", "half", "levels", "log_gate",
                       "operands", "torch", "Any", "Tensor", "Sequences", "LOG_SMALL"))  # fmt: skip
UNNAMED = {"*": "product", "+": "total", "contract": "product"}
NAMED = ("decay", "reads_i", "reads_j", "written_i", "written_j")  # these have lines even if they are used once
STATES = "what each tile adds to the state, and the state at each tile's start"
ENDS = "the same recurrence, reversed: the gradient of the state at each tile's end"
INSIDE = "writes inside the tile, before the read: by blocks, from the earlier half to the later"
PAIRS = "pairs of a write and a later read inside the tile, by blocks"
RAISED = "gates that are no logarithms: their own value is divided out, so that exact zeros have gradients"


@dataclass(frozen=True)
class Text:
    """An expression: its text, how tightly it binds, how its matrices lie."""

    text: str
    rank: int
    layout: Layout

    def within(self, rank: int) -> str:
        return self.text if self.rank >= rank else f"({self.text})"

    def laid(self, wanted: Layout) -> Text:
        """The same, transposed if only then it broadcasts to this layout."""
        rows, columns = self.layout
        if all(have in (want, "1") for have, want in zip(self.layout, wanted)):
            return self
        assert all(have in (want, "1") for have, want in zip((columns, rows), wanted)), (self, wanted)
        return self.transposed()

    def transposed(self) -> Text:
        return Text(f"{self.within(ATOM)}.mT", ATOM, self.layout[::-1])


class Printer:
    """Prints the statements of one graph; `names` are those of its inputs."""

    def __init__(self, graph: Graph, scan: N.Scan, names: Mapping[str, str], lines: Lines, w: Writer) -> None:
        self.graph, self.scan, self.lines, self.w = graph, scan, lines, w
        self.sides = {a: s for s, axes in (("i", scan.i), ("j", scan.j)) for a in axes}
        self.texts: dict[str, Text] = {}
        self.uses = Counter(x for n in graph.nodes for x in _slots(n))
        self.uses.update(id_ for _, id_ in graph.outputs)
        for node in graph.nodes:
            if self.repeated(node):
                self.uses.update(dict.fromkeys(_slots(node), self.uses[node.id] - 1))
        self.results_by_id = {id_ for _, id_ in graph.outputs}
        self.owner: dict[str, str] = {}  # the name of each statement's value
        self.reserved = FUNCTIONS
        self.blocks = ""
        self.comments = dict(_comments(graph))
        for id_, name in names.items():
            self.owner[id_] = name
            self.texts[id_] = Text(name, ATOM, self.layout(graph[id_].axes))

    def inner(self, halving: T.Halving) -> Printer:
        """A printer for the body of a loop over halves. Names of values around it are not given again."""
        p = Printer(halving.body, self.scan, {}, self.lines, self.w)
        p.uses.update(part.value for part in halving.parts)
        p.reserved = self.reserved | set(self.owner.values())
        p.blocks = halving.to[0]
        return p

    # -- statements ------------------------------------------------------------------------------------------------

    def statements(self) -> None:
        for node in self.graph.nodes:
            if isinstance(node, N.Input | N.Const | T.Prefix):
                continue
            if node.id in self.comments:
                self.w(f"# {self.comments[node.id]}")
            if isinstance(node, T.Carry):
                self.carry(node)
            elif isinstance(node, T.Halving):
                self.halving(node)
            elif isinstance(node, N.Out):
                self.out(node)
            elif self.stands_alone(node):
                self.statement(node)

    def stands_alone(self, node: N.AnyNode) -> bool:
        """Whether a node has a line of its own: used twice, or worth a name."""
        if isinstance(node, N.Rename | T.Untile) or self.repeated(node):
            return False
        if self.uses[node.id] > 1 or isinstance(node, T.Tile) or node.id in self.results_by_id:
            return True
        if isinstance(node, T.Half):
            return not node.id.startswith("half")
        places = [a for a in node.axes if self.is_place(a)]
        if isinstance(node, N.Map) and node.fn == "exp" and places or base(node.id) in NAMED:
            return not self.is_term(node)
        if isinstance(node, T.Contract | T.Strict) and len(places) == 2:
            return not any(isinstance(u, T.Strict) for u in self.users(node.id))
        return any(isinstance(u, T.Carry | T.Halving) or self.grows(u, node.id) for u in self.users(node.id))

    def repeated(self, node: N.AnyNode) -> bool:
        """An operand times a decay is written at each use: that takes no longer than to keep it takes memory."""
        if not (isinstance(node, N.Map) and node.fn == "*"):
            return False
        x, factor = (self.graph[a] for a in node.args)
        return isinstance(x, T.Tile | T.Half) and isinstance(factor, N.Map) and factor.fn == "exp"

    def is_term(self, node: N.AnyNode) -> bool:
        """Whether a node is part of a value of the same name, which has the line."""
        same = [u for u in self.users(node.id) if base(u.id) == base(node.id)]
        return any(isinstance(u, N.Reduce) or isinstance(u, N.Map) and u.args[0] != node.id for u in same)

    def users(self, id_: str) -> list[N.AnyNode]:
        return [n for n in self.graph.nodes if id_ in n.operands()]

    def grows(self, node: N.AnyNode, id_: str) -> bool:
        """Whether a node is the operand with something added, under the same name."""
        return isinstance(node, N.Map) and node.fn == "+" and node.args[0] == id_ and base(node.id) == base(id_)

    def statement(self, node: N.AnyNode) -> None:
        if isinstance(node, N.Map) and self.grows(node, node.args[0]) and self.uses[node.args[0]] == 1:
            name = self.owner[node.args[0]]
            added = self.use(node.args[1]).laid(self.texts[node.args[0]].layout)
            self.w(f"{name} += {added.text}")
            self.named(node.id, name, self.texts[node.args[0]].layout)
            return
        text = self.expression(node)
        text = text if any(self.is_place(a) for a in node.axes) else text.laid(self.layout(node.axes))
        where = self.lines.place(node.span) if isinstance(node, T.Tile) else ""
        name = self.name(node)
        self.w(f"{name} = {text.text}" + (f"  # {where}" if where else ""))
        self.named(node.id, name, text.layout)

    def named(self, id_: str, name: str, layout: Layout) -> None:
        self.owner[id_] = name
        self.texts[id_] = Text(name, ATOM, layout)

    def name(self, node: N.AnyNode) -> str:
        """The node's name, if no value that is still needed has it; else with a number."""
        wanted = base(node.id)
        if isinstance(node, T.Tile) and not node.log:
            wanted = self.owner[node.arg]
        taken = {name for id_, name in self.owner.items() if self.uses[id_] > 0} | self.reserved
        out, n = wanted, 1
        while out in taken:
            n += 1
            out = f"{wanted}{n}"
        return out

    def carry(self, node: T.Carry) -> None:
        decay = self.use(node.decay).text if node.decay is not None else "None"
        arguments = f"{decay}, {self.use(node.update).text}, {self.use(node.initial).text}"
        outs = {n.index: n for n in self.graph.of_kind(N.Out) if n.arg == node.id}
        found = []
        for index in (0, 1):
            name = self.name(outs[index]) if index in outs else "_"
            found.append(name)
            if index in outs:
                self.named(outs[index].id, name, self.layout((*self.scan.i, *self.scan.j)))
        where = self.lines.place(node.span)
        self.w(f"{', '.join(found)} = seq.carry({arguments}{', reverse=True' if node.reverse else ''})  # {where}")

    def halving(self, node: T.Halving) -> None:
        inner = self.inner(node)
        for half in node.body.of_kind(T.Half):
            inner.texts[half.outer] = self.texts[half.outer]
        with self.w.indented("for half in levels():"):
            for n in node.body.nodes:
                if inner.stands_alone(n):
                    inner.statement(n)
                for part in node.parts:
                    if part.value == n.id:
                        total = self.texts[node.totals[part.total]].text
                        added = inner.use(n.id).text
                        self.w(f"halves({total}, half)[{int(part.half == 'later')}].add_({added})")
        for arg in _slots(node):
            self.uses[arg] -= 1

    def out(self, node: N.Out) -> None:
        """A result of a halving is its total, which was added to in place."""
        source = self.graph[node.arg]
        if isinstance(source, T.Halving):
            total = source.totals[node.index]
            assert self.uses[total] == 0, f"'{total}' is read after it was added to"
            self.named(node.id, self.owner[total], self.texts[total].layout)

    # -- expressions -----------------------------------------------------------------------------------------------

    def is_place(self, axis: str) -> bool:
        whole = (*self.scan.batch, *self.sides, self.blocks)
        return axis not in whole and not self.graph.axis[axis].is_sequence

    def layout(self, axes: Iterable[str]) -> Layout:
        """How the matrices of a value over these axes lie: places before sides, i before j."""
        places = [a for a in axes if self.is_place(a)]
        sides = sorted({self.sides[a] for a in axes if a in self.sides})
        if places:
            found = [*places, *sides, "1"]
            return found[0], found[1]
        return ("i" if "i" in sides else "1"), ("j" if "j" in sides else "1")

    def symbol(self, side: str) -> str:
        """The symbol of a side, if it has an axis."""
        return side if side in self.sides.values() else "1"

    def use(self, id_: str) -> Text:
        """A value where it is used: a name, or the whole expression if this is its only use."""
        if id_ in self.texts:
            self.uses[id_] -= 1
            return self.texts[id_]
        return self.expression(self.graph[id_])

    def expression(self, node: N.AnyNode) -> Text:
        if isinstance(node, N.Map):
            return self.map(node)
        if isinstance(node, T.Contract):
            return self.contract(node)
        if isinstance(node, T.Half):
            whole = self.texts[node.outer]
            return Text(f"halves({whole.text}, half)[{int(node.half == 'later')}]", ATOM, self.layout(node.axes))
        if isinstance(node, N.Const):
            return Text(number(node.size.value), ATOM, ("1", "1"))
        if isinstance(node, T.Tile):
            return Text(f"seq.tile({self.tile(node)})", ATOM, self.layout(node.axes))
        assert isinstance(node, T.Untile | T.Span | T.Strict | N.Reduce | N.Rename), node
        x = self.use(node.arg)
        rows, columns = x.layout
        if isinstance(node, T.Untile):
            return Text(f"seq.untile({x.text})", ATOM, ("1", "1"))
        if isinstance(node, T.Strict):
            return Text(f"{x.within(ATOM)}.tril(-1)", ATOM, x.layout)
        if isinstance(node, N.Rename):
            return Text(x.text, x.rank, (node.target if rows == node.source else rows, columns))
        if isinstance(node, N.Reduce):
            gone = {self.sides[a] for a in node.over}
            dims = [d for d, symbol in ((-2, rows), (-1, columns)) if symbol in gone]
            left = ("1" if rows in gone else rows, "1" if columns in gone else columns)
            dim = str(dims[0]) if len(dims) == 1 else str(tuple(dims))
            return Text(f"{x.within(ATOM)}.sum({dim}, keepdim=True)" if dims else x.text, ATOM, left)
        if node.fn == "whole":
            return Text(f"{x.within(ATOM)}.sum(-2, keepdim=True)", ATOM, ("1", columns))
        return Text(f"{node.fn}({x.text})", ATOM, x.layout)

    def tile(self, node: T.Tile) -> str:
        x = self.use(node.arg).text
        return {"zero": f"log_gate({x})", "small": f"log_gate({x}, LOG_SMALL)"}.get(node.log, x)

    def map(self, node: N.Map) -> Text:
        args = [self.use(a) for a in node.args]
        if node.fn == "exp":
            return Text(f"{args[0].within(ATOM)}.exp()", ATOM, args[0].layout)
        if node.fn == "max":
            return Text(f"{args[0].within(ATOM)}.clamp(min={args[1].text})", ATOM, args[0].layout)
        wanted = self.layout(node.axes)
        left, right = (a.laid(wanted) for a in args)
        layout = (wanted[0], wanted[1])
        if node.fn == "+":
            return Text(f"{left.within(SUM)} + {right.within(PRODUCT)}", SUM, layout)
        # A product binds like @, and a * b @ c is hard to read: only products of the same kind are left without.
        bare = left.rank == PRODUCT and " @ " not in left.text
        return Text(f"{left.within(PRODUCT if bare else ATOM)} {node.fn} {right.within(ATOM)}", PRODUCT, layout)

    def contract(self, node: T.Contract) -> Text:
        """A matrix product: the left factor's rows, the right one's columns, and what is summed between them."""
        rows, columns = self.layout(node.axes)
        summed = [a if self.is_place(a) else self.sides[a] for a in node.over] or ["1"]
        left, right = self.use(node.left), self.use(node.right)
        left = left if left.layout == (rows, summed[0]) else left.transposed()
        right = right if right.layout == (summed[0], columns) else right.transposed()
        assert (left.layout, right.layout) == ((rows, summed[0]), (summed[0], columns)), (node, left, right)
        return Text(f"{left.within(ATOM)} @ {right.within(ATOM)}", PRODUCT, (rows, columns))

    def outputs(self) -> list[Text]:
        return [self.use(id_) for _, id_ in self.graph.outputs]

    def results(self) -> list[str]:
        return [x.text for x in self.outputs()]


def base(id_: str) -> str:
    """The name that a node's id was made of."""
    stem = re.sub(r"_\d+$", "", id_)
    return UNNAMED.get(stem, stem)


def number(value: object) -> str:
    """A number as text; powers of two are shown as such."""
    if isinstance(value, float) and value > 0:
        mantissa, exponent = math.frexp(value)
        if mantissa == 0.5 and not 1e-4 < value < 1e4:
            return f"2.0**{exponent - 1}"
    return repr(value)


def _slots(node: N.AnyNode) -> list[str]:
    """The ids that a node reads, as often as its text does."""
    if isinstance(node, N.Map):
        return list(node.args)
    if isinstance(node, T.Contract):
        return [node.left, node.right]
    return list(node.operands()) if not isinstance(node, N.Out) else []


def _comments(graph: Graph) -> Iterable[tuple[str, str]]:
    """A comment before some nodes, by their ids."""
    backward = any(c.reverse for c in graph.of_kind(T.Carry))
    for carry in graph.of_kind(T.Carry):
        first = graph[carry.update]
        while isinstance(first, N.Map):  # a sum of terms starts with the first one
            first = graph[first.args[0]]
        yield first.id, ENDS if carry.reverse else STATES
    for node in graph.of_kind(T.Halving, T.Strict):
        yield node.id, PAIRS if backward else INSIDE
        break
    for tile in graph.of_kind(T.Tile):
        if tile.log == "small":
            yield tile.id, RAISED
            break
