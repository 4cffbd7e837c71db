"""The kinds of node below the normal level: scans over tiles of tokens.

At the level `chunked` the tokens t of a sequence are split into a tile and a place in it. Elementwise work stays `map`
nodes. A read at a token and a write at an earlier one meet either across tiles, through the state that `Carry` takes
from tile to tile, or inside one, in the block of the `Halving` whose middle lies between them. Exponentials are taken
of `Span` sums of log-gates alone, and no gate is subtracted from a sum, so no exponent is positive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from chunkc.ir.axes import AxisName, Frozen
from chunkc.ir.node import Node, Unary

if TYPE_CHECKING:
    from chunkc.ir.graph import Graph


class Tile(Unary):
    """The tokens of a sequence axis by (tile, place) `to`; places beyond the end are 0 (or `pad`).

    `log`: a gate, as a logarithm. It is given as one, or taken of a gate in [0, 1]: of 0 it is -10000 (`zero`), or
    gates are first raised to 2^-40 (`small`)."""

    kind: Literal["tile"] = "tile"
    axis: AxisName
    to: tuple[AxisName, ...]
    log: Literal["", "given", "zero", "small"] = ""
    pad: float = 0.0


class Untile(Unary):
    """The tokens behind (tile, place) `over`, in order along the sequence axis."""

    kind: Literal["untile"] = "untile"
    axis: AxisName
    over: tuple[AxisName, ...]


class Span(Unary):
    """For each place, the sum over the places `before` it or `after` it (itself excluded), `upto` it or `onward` from
    it (itself included), or over the `whole` axis."""

    kind: Literal["span"] = "span"
    fn: Literal["before", "after", "upto", "onward", "whole"]
    axis: AxisName


class Contract(Node):
    """The sum over named axes of the product of two values."""

    kind: Literal["contract"] = "contract"
    left: str
    right: str
    over: tuple[AxisName, ...]

    def operands(self) -> tuple[str, ...]:
        return (self.left, self.right)

    def renamed(self, names: dict[str, str]) -> Node:
        return self.evolve(left=names.get(self.left, self.left), right=names.get(self.right, self.right))


class Strict(Unary):
    """What lies strictly below the diagonal: `column` is at an earlier place than `row`; elsewhere 0."""

    kind: Literal["strict"] = "strict"
    row: AxisName
    column: AxisName


class Prefix(Node):
    """Maps h -> a h + b (max-plus: h -> max(a + h, b)) composed along the places of a tile.

    Results: a and b of the composition before each place, then those over the whole tile. `reverse`: from the last
    place to the first."""

    kind: Literal["prefix"] = "prefix"
    a: str
    b: str
    axis: AxisName
    algebra: Literal["sum-product", "max-plus"] = "sum-product"
    reverse: bool = False

    def operands(self) -> tuple[str, ...]:
        return (self.a, self.b)

    def renamed(self, names: dict[str, str]) -> Node:
        return self.evolve(a=names.get(self.a, self.a), b=names.get(self.b, self.b))


class Carry(Node):
    """S' = decay S + update (max-plus: max(decay + S, update)) over tiles; without `decay`, it is 1.

    Results: S where each tile starts (for `reverse`: ends), and the last one. `i` and `j` are the state's sides."""

    kind: Literal["carry"] = "carry"
    axis: AxisName
    i: tuple[AxisName, ...] = ()
    j: tuple[AxisName, ...] = ()
    decay: str | None = None
    update: str
    initial: str
    algebra: Literal["sum-product", "max-plus"] = "sum-product"
    reverse: bool = False

    def operands(self) -> tuple[str, ...]:
        return tuple(x for x in (self.decay, self.update, self.initial) if x)

    def renamed(self, names: dict[str, str]) -> Node:
        decay = names.get(self.decay, self.decay) if self.decay else None
        return self.evolve(decay=decay, update=names.get(self.update, self.update),
                           initial=names.get(self.initial, self.initial))  # fmt: skip


class Half(Node):
    """In a halving's body: the earlier or later half of each block of an outer value."""

    kind: Literal["half"] = "half"
    outer: str
    half: Literal["earlier", "later"]


class Part(Frozen):
    """A value of a halving's body, added to one half of each block of total number `total`."""

    total: int
    half: Literal["earlier", "later"]
    value: str


class Halving(Node):
    """The body once for each size of block: a whole tile, its halves, and so on down to two tokens.

    `axis` is the places of a tile; `to` are, in the body, the blocks of a tile and the places in the earlier and in
    the later half of a block. Result k is total k with the body's parts added."""

    kind: Literal["halving"] = "halving"
    axis: AxisName
    to: tuple[AxisName, ...]
    totals: tuple[str, ...]
    parts: tuple[Part, ...]
    body: Graph

    def operands(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([n.outer for n in self.body.nodes if isinstance(n, Half)] + [*self.totals]))

    def renamed(self, names: dict[str, str]) -> Node:
        nodes = tuple(
            n.evolve(outer=names.get(n.outer, n.outer)) if isinstance(n, Half) else n for n in self.body.nodes
        )
        totals = tuple(names.get(t, t) for t in self.totals)
        return self.evolve(body=self.body.evolve(nodes=nodes), totals=totals)


class Kernel(Node):
    """A launch: a graph over tiles (or of one token) computed in one go, with nothing in between in memory.

    A program for each head, each row (a tile or a sequence) and each block of the sides in `blocks`. `reads` are the
    body's inputs by position; each of the body's outputs goes to a `Buffer`."""

    kind: Literal["kernel"] = "kernel"
    role: str
    rows: Literal["sequences", "tiles"]
    blocks: tuple[Literal["i", "j"], ...] = ()
    reads: tuple[str, ...]
    body: Graph

    def operands(self) -> tuple[str, ...]:
        return self.reads

    def renamed(self, names: dict[str, str]) -> Node:
        return self.evolve(reads=tuple(names.get(r, r) for r in self.reads))


class Buffer(Unary):
    """Memory that a kernel's result `index` is written to.

    `life`: a result of the call, saved for the gradient, or temporary. `element`: the type of the operands as given, or
    that of states. `blocks`: a number for each block of that side, which are then added up. `replaces`: it takes the
    place of a temporary buffer that its kernel is the last to read."""

    kind: Literal["buffer"] = "buffer"
    index: int
    life: Literal["result", "saved", "temporary"]
    element: Literal["given", "state"] = "given"
    blocks: Literal["", "i", "j"] = ""
    replaces: str | None = None

    def operands(self) -> tuple[str, ...]:
        return (self.arg, self.replaces) if self.replaces else (self.arg,)

    def renamed(self, names: dict[str, str]) -> Node:
        replaces = names.get(self.replaces, self.replaces) if self.replaces else None
        return self.evolve(arg=names.get(self.arg, self.arg), replaces=replaces)
