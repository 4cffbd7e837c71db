"""What kernels of a scan have in common: where a tile lies, its operands, sums of gates, decays.

Operands are [tokens, H, D] with D = I or J. In a dense batch every row has `each` tiles of C tokens, and no table is
read; in a packed one tables say where a tile starts and where its sequence ends. Values are loaded as they are stored:
what is computed of them is float32, factors of products are in the operand type that the launcher chose."""

from __future__ import annotations

from dataclasses import dataclass, field

from chunkc.backends.scan import Operand, Pair, ScanForm, Side, other
from chunkc.backends.triton.kernel import Builder, Expr, Let, Statement, call, masked_sum, where

SIZE = {"i": "I", "j": "J"}
FLOOR = "-128.0"  # of a log-gate: exp of it is 0 in float32, and sums of a tile's stay small enough to be subtracted

# Pairs of tokens as matrices of truth values, a row's place against a column's.
MASKS = {"earlier": "<", "upto": "<=", "later": ">", "onward": ">="}


def block(side: Side) -> str:
    return f"B{SIZE[side]}"


def notes_of(form: ScanForm, spans: dict[str, str]) -> dict[str, str]:
    """For each operand the statement that defines it."""
    return {o.name: spans[o.node] for o in form.operands() if spans.get(o.node)}


def real(x: Expr | str) -> Expr:
    """A loaded value in float32."""
    return (x if isinstance(x, Expr) else Expr(x)).to("tl.float32")


def columns(b: Builder, side: Side, number: Expr) -> None:
    """A block's columns of a side and which exist."""
    cols = b.let(f"col_{side}", number * block(side) + call("tl.arange", 0, block(side)))
    b.let(f"has_{side}", cols < SIZE[side])


def scaled(x: Expr | str, factor: Expr | None) -> Expr:
    """An operand times a decay: as it was loaded, if there is none."""
    x = x if isinstance(x, Expr) else Expr(x)
    return x if factor is None else real(x) * factor


def exp(x: Expr) -> Expr:
    """A decay, by the function beside the kernels."""
    return call("exp", x)


@dataclass
class Tile:
    """Statements over one tile of tokens. `late`: reads come after the update, and so behind the token's own gate."""

    form: ScanForm
    notes: dict[str, str]
    b: Builder = field(default_factory=Builder)
    masks: dict[str, None] = field(default_factory=dict)
    masks_at: int = 0

    @property
    def late(self) -> bool:
        return self.form.scan.start == "gate"

    # -- where it lies -------------------------------------------------------------------------------------------------

    def program(self, side: Side) -> None:
        """A program has one block of a side of one tile and head; those of a tile are neighbours, for the cache."""
        b, size = self.b, SIZE[side]
        program = b.let("program", call("tl.program_id", 0))
        blocks = b.let("blocks", call("tl.cdiv", size, block(side)))
        b.let("block", program % blocks)
        b.let("head", program // blocks % "H")
        tile = b.let("tile", (program // blocks // "H").to("tl.int64"))
        start = b.let("start", call("tile_start", "tile_start_ptr", tile, "tokens", "each", "C"))
        b.let("stop", call("tile_stop", "tile_stop_ptr", tile, "tokens", "each"))
        b.let("row", call("tl.arange", 0, "C"))
        self.cells(start)
        columns(self.b, side, Expr("block"))

    def cells(self, start: Expr) -> None:
        """Which tokens there are, and the tile's first one among the heads of all tokens."""
        self.b.let("inside", start + "row" < "stop")
        self.b.let("base", start * "H" + "head")
        self.masks_at = len(self.b.body)

    def mask(self, name: str) -> Expr:
        """Pairs of tokens; defined once, before all loops."""
        self.masks[name] = None
        return Expr(name)

    @property
    def since(self) -> Expr:
        """The gates that a read at a token is behind, from the tile's start."""
        return self.mask("upto" if self.late else "earlier")

    @property
    def behind(self) -> Expr:
        """The reads that are behind a token's gate: that at the token, too, if reads come after the update."""
        return self.mask("onward" if self.late else "later")

    def closed(self) -> tuple[Statement, ...]:
        """All statements, with the masks that are used."""
        row = Expr("row")
        lets = [Let(m, Expr(MASKS[m], (row.cols, row.rows))) for m in MASKS if m in self.masks]
        return (*self.b.body[: self.masks_at], *lets, *self.b.body[self.masks_at :])

    @property
    def some(self) -> Expr:
        """Whether a tile has tokens: a packed batch has as many tiles as there may be."""
        return Expr("start") < "stop"

    def is_mild(self, gates: list[Operand]) -> Expr:
        """Whether the tile decays by less than `LIMIT` in each of the gates' numbers."""
        found: Expr | None = None
        for g in gates:
            size = SIZE[g.side]
            mild = call("is_mild", f"totals_{g.side}_ptr", Expr("tile") * "H" + "head", size, f"A{size}", "LIMIT")
            found = mild if found is None else found & mild
        assert found is not None, "only a gate for each number of a side is mild or not"
        return found

    # -- operands ------------------------------------------------------------------------------------------------------

    def pointer(self, name: str, side: Side) -> tuple[Expr, Expr]:
        """Where a tile's rows of an operand lie in this side's columns, and which there are."""
        size, col = SIZE[side], Expr(f"col_{side}")
        cell = Expr("row").rows * (Expr("H") * size) + col.cols
        return Expr(f"{name}_ptr") + Expr("base") * size + cell, Expr("inside").rows & Expr(f"has_{side}").cols

    def load(self, name: str, side: Side) -> Expr:
        """A tile of an operand [C, D], in the type that it is stored in."""
        pointer, mask = self.pointer(name, side)
        return self.b.load(name, pointer, mask, self.notes.get(name, ""))

    def gate(self, g: Operand | None) -> Expr | None:
        """A tile of a log-gate in float32 [C, D]; [1, C] if it is one number a head; finite, so that sums are."""
        if g is None:
            return None
        if g.thin:
            pointer = Expr(f"{g.name}_ptr") + Expr("base") + Expr("row").cols * "H"
            self.b.load(g.name, pointer, Expr("inside").cols, self.notes.get(g.name, ""))
        else:
            self.load(g.name, g.side)
        return self.b.let(g.name, call("tl.maximum", real(g.name), FLOOR))

    # -- decays --------------------------------------------------------------------------------------------------------

    @staticmethod
    def sums(mask: Expr, gate: Expr, thin: bool) -> Expr:
        """For each token the sum of the gates that a mask names, [C, D] or [C, 1]."""
        if thin:  # one number a token: no product with it, one sum a row
            return call("tl.sum", where(mask, gate, 0.0), 1, keep_dims="True")
        return masked_sum(mask, gate, "GATE_PARTS")

    def from_start(self, gate: Expr, thin: bool) -> Expr:
        """The decay from the tile's start to each token's read."""
        return exp(self.sums(self.since, gate, thin))

    def to_end(self, gate: Expr, thin: bool) -> Expr:
        """The decay from each token's write to the tile's end."""
        return exp(self.sums(self.mask("later"), gate, thin))

    @staticmethod
    def total(gate: Expr, thin: bool) -> Expr:
        """The decay over the whole tile, [D] or [1]."""
        return exp(call("tl.sum", gate, 1 if thin else 0))

    def level(self, level: Expr, gate: Expr, thin: bool) -> tuple[Expr, Expr]:
        """Which pairs a level anchors, and each token's decay to or from the middle of its block."""
        b, row = self.b, Expr("row")
        half = b.let("half", row >> level)
        upper = b.let("upper", (half & 1).same(1), "in the later half of its block")
        pair = b.let("pair", Expr("^", (half.rows, half.cols)).same(1), "across the middle of a block")
        first = b.let("first", where(upper, row if self.late else row + 1, Expr("<<", (half, level))))
        last = b.let("last", where(upper, Expr("<<", (half + 1, level)) - 1, row - 1))
        inner = (row.rows >= first.cols) & (row.rows <= last.cols)
        b.let("inner", inner, "gates between a token and the middle")
        return pair, b.let("decay", exp(self.sums(Expr("inner"), gate, thin)))


class OneSide:
    """A kernel over one side of a tile: the side, the other one, and the pairs of factors of reads and writes."""

    def __init__(self, form: ScanForm, side: Side, name: str, spans: dict[str, str]) -> None:
        self.form, self.name = form, name
        self.x, self.o = side, other(side)
        self.t = Tile(form, notes_of(form, spans))
        self.b = self.t.b
        self.readers: list[Pair] = form.query_pairs()
        self.writers: list[Pair] = form.write_pairs()
