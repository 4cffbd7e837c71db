"""Kernels as values: programs, loops, loads, dots and stores, printed once as Triton.

The tests look at these values, not at text: what a loop runs over, which contractions are dots, what is stored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from chunkc.backends.writer import Writer

RANKS = {"|": 1, "^": 2, "&": 3, "<": 0, "<=": 0, "==": 0, "!=": 0, ">": 0, ">=": 0, "is not": 0, ">>": 4, "<<": 4,
         "+": 5, "-": 5, "*": 6, "/": 6, "//": 6, "%": 6}  # fmt: skip


# What a loop may run over, by its number of steps; a size of the spec is one too.
OVER = {
    "count": "tiles",
    "whole": "whole tiles",  # of which all rows are there
    "tiles - whole": "tiles",
    "turn": "segments",
    "alive": "tiles",
    "LEVELS": "levels",
    "levels": "levels",
    "upper_levels": "levels",
    "parts_i": "blocks of side i",
    "parts_j": "blocks of side j",
    "tl.cdiv(sequence, BT)": "blocks of sequences",
    "tl.cdiv(last - first, BT)": "blocks of tiles",
    "tl.cdiv(I, BI)": "blocks of side i",
    "tl.cdiv(J, BJ)": "blocks of side j",
}
TILES = re.compile(r"tl\.cdiv\(length\w*, B([QR])\)")
CONSTANTS = ("H", "I", "J", "D", "C", "LEVELS", "BI", "BJ", "BD", "BQ", "BR", "BT", "AI", "AJ", "DOT", "PRECISION",
             "PARTS", "GATE_PARTS", "LIMIT", "AFTER", "BACK", "STAGES", "W")  # fmt: skip


def over(stop: str, sizes: tuple[str, ...]) -> str:
    """What a loop with so many steps runs over; empty if it is nothing that a loop may run over."""
    if found := TILES.fullmatch(stop):
        return "tiles of queries" if found[1] == "Q" else "tiles of rows"
    return OVER.get(stop, f"axis {stop}" if stop in sizes else "")


@dataclass(frozen=True)
class Expr:
    """An expression: a name or literal (`op` its text), an infix operator, an index, or a call of `op`."""

    op: str
    args: tuple[Expr, ...] = ()
    keywords: tuple[tuple[str, str], ...] = ()

    def text(self, outer: int = -1) -> str:
        if not self.args and not self.keywords:
            return self.op
        if self.op == "index":
            return f"{self.args[0].text(9)}[{self.keywords[0][1]}]"
        if self.op == ".to":
            return f"{self.args[0].text(9)}.to({self.args[1].text()})"
        if self.op in RANKS and len(self.args) == 2:
            rank = RANKS[self.op]
            right = rank if self.op in "+*&|" and self.args[1].op == self.op else rank + 1
            text = f"{self.args[0].text(rank)} {self.op} {self.args[1].text(max(right, 1))}"
            return f"({text})" if rank < outer or rank == 0 and outer >= 0 else text
        if self.op == "neg":
            return f"-{self.args[0].text(8)}" if outer <= 7 else f"(-{self.args[0].text(8)})"
        inner = [a.text() for a in self.args] + [f"{k}={v}" for k, v in self.keywords]
        return f"{self.op}({', '.join(inner)})"

    def _infix(self, op: str, other: Value) -> Expr:
        """Sums and products associate to the left, as their text reads."""
        right = lift(other)
        if op == right.op and op in "+*&" and len(right.args) == 2:
            return Expr(op, (self._infix(op, right.args[0]), right.args[1]))
        return Expr(op, (self, right))

    def __add__(self, other: Value) -> Expr:
        return self._infix("+", other)

    def __sub__(self, other: Value) -> Expr:
        return self._infix("-", other)

    def __mul__(self, other: Value) -> Expr:
        return self._infix("*", other)

    def __truediv__(self, other: Value) -> Expr:
        return self._infix("/", other)

    def __neg__(self) -> Expr:
        return Expr("neg", (self,))

    def __floordiv__(self, other: Value) -> Expr:
        return self._infix("//", other)

    def __mod__(self, other: Value) -> Expr:
        return self._infix("%", other)

    def __rshift__(self, other: Value) -> Expr:
        return self._infix(">>", other)

    def __and__(self, other: Value) -> Expr:
        return self._infix("&", other)

    def __or__(self, other: Value) -> Expr:
        return self._infix("|", other)

    def __xor__(self, other: Value) -> Expr:
        return self._infix("^", other)

    def __le__(self, other: Value) -> Expr:
        return self._infix("<=", other)

    def __ge__(self, other: Value) -> Expr:
        return self._infix(">=", other)

    def __lt__(self, other: Value) -> Expr:
        return self._infix("<", other)

    def __gt__(self, other: Value) -> Expr:
        return self._infix(">", other)

    def same(self, other: Value) -> Expr:
        return self._infix("==", other)

    def differs(self, other: Value) -> Expr:
        return self._infix("!=", other)

    @property
    def given(self) -> Expr:
        """Whether an argument is there: constant, so that a kernel has no code for what is not."""
        return self._infix("is not", "None")

    def to(self, dtype: str) -> Expr:
        """The value in another element type."""
        return Expr(".to", (self, lift(dtype)))

    @property
    def rows(self) -> Expr:
        """A vector as a column: one value a row."""
        return Expr("index", (self,), (("at", ":, None"),))

    @property
    def cols(self) -> Expr:
        """A vector as a row: one value a column."""
        return Expr("index", (self,), (("at", "None, :"),))

    def walk(self) -> Iterator[Expr]:
        yield self
        for a in self.args:
            yield from a.walk()


Value = Expr | str | int | float


def lift(x: Value) -> Expr:
    return x if isinstance(x, Expr) else Expr(str(x) if not isinstance(x, float) else repr(x))


def call(fn: str, *args: Value, **keywords: str) -> Expr:
    return Expr(fn, tuple(lift(a) for a in args), tuple(keywords.items()))


def where(cond: Expr, a: Value, b: Value) -> Expr:
    return call("tl.where", cond, a, b)


def maximum(a: Value, b: Value) -> Expr:
    return call("tl.maximum", a, b)


def minimum(a: Value, b: Value) -> Expr:
    return call("tl.minimum", a, b)


def exp(x: Expr) -> Expr:
    return call("tl.exp", x)


def cumsum(x: Expr, reverse: bool = False) -> Expr:
    """For each row, the sum of the rows up to it and itself, or from it on."""
    return call("tl.cumsum", x, 0, **({"reverse": "True"} if reverse else {}))


def trans(x: Expr) -> Expr:
    return call("tl.trans", x)


def dot(a: Expr, b: Expr) -> Expr:
    """A product of tiles in the operand type that the launcher chose, summed in float32."""
    return call("tl.dot", a.to("DOT"), b.to("DOT"), input_precision="PRECISION")


def rounded(x: Expr) -> Expr:
    """A factor of a product in the digits that the product takes of it."""
    return call("rounded", x, "DOT", "PRECISION")


def masked_sum(mask: Expr, x: Expr, parts: Value) -> Expr:
    """For each row, the sum of the rows of x that its mask names: a product with zeros and ones, in so many parts."""
    return call("masked_sum", mask, x, parts)


@dataclass(frozen=True)
class Let:
    """name = value, or name += value."""

    name: str
    value: Expr
    add: bool = False
    note: str = ""


@dataclass(frozen=True)
class Store:
    pointer: Expr
    value: Expr
    mask: Expr | None


@dataclass(frozen=True)
class Loop:
    """for name in range(stop): `over` says what it runs over: tiles, levels, or blocks of a side.

    With `stages`, a number or a constant, what later steps load is on its way while one is computed."""

    name: str
    stop: Expr
    over: str
    body: tuple[Statement, ...]
    stages: str = ""


@dataclass(frozen=True)
class If:
    """if cond, else: of a scalar that is the same for the whole program."""

    cond: Expr
    body: tuple[Statement, ...]
    orelse: tuple[Statement, ...] = ()


@dataclass(frozen=True)
class Note:
    text: str


Statement = Let | Store | Loop | If | Note


@dataclass(frozen=True)
class Kernel:
    """A kernel: pointers and lengths as arguments, and statements.

    `sizes` are compile-time constants that the spec names, beside `CONSTANTS`; `ends` says by which each range of
    theirs is bounded."""

    name: str
    doc: str
    arguments: tuple[str, ...]
    body: tuple[Statement, ...]
    sizes: tuple[str, ...] = ()
    ends: tuple[tuple[str, str], ...] = field(default=(), compare=False)  # for checking alone

    @property
    def constants(self) -> tuple[str, ...]:
        """The compile-time constants that a statement reads: sizes, blocks and operand types."""
        w = Writer()
        _print_body(self.body, w)
        words = set(re.findall(r"\w+", w.text()))
        return tuple(c for c in (*self.sizes, *CONSTANTS) if c in words)

    def statements(self) -> Iterator[Statement]:
        def walk(body: tuple[Statement, ...]) -> Iterator[Statement]:
            for s in body:
                yield s
                if isinstance(s, Loop | If):
                    yield from walk(s.body)
                if isinstance(s, If):
                    yield from walk(s.orelse)

        return walk(self.body)

    def expressions(self) -> Iterator[Expr]:
        for s in self.statements():
            if isinstance(s, Let):
                yield from s.value.walk()
            elif isinstance(s, Store):
                yield from s.pointer.walk()
                yield from s.value.walk()
            elif isinstance(s, Loop):
                yield from s.stop.walk()
            elif isinstance(s, If):
                yield from s.cond.walk()

    def print(self, w: Writer) -> None:
        lengths = [a for a in self.arguments if not a.endswith("_ptr")]  # of which none makes Triton compile again
        w(f"@triton.jit(do_not_specialize={lengths})".replace("'", '"') if lengths else "@triton.jit")
        arguments = [*self.arguments, *(f"{c}: tl.constexpr" for c in self.constants)]
        with w.indented(f"def {self.name}("):
            line = ""
            for a in arguments:
                if len(line) + len(a) > 100:
                    w(line.rstrip())
                    line = ""
                line += f"{a}, "
            w(line.rstrip())
        with w.indented("):"):
            w(f'"""{self.doc}"""')
            _print_body(self.body, w)


def _print_body(body: tuple[Statement, ...], w: Writer) -> None:
    for s in body:
        if isinstance(s, Note):
            w(f"# {s.text}")
        elif isinstance(s, Let):
            w(f"{s.name} {'+=' if s.add else '='} {s.value.text()}" + (f"  # {s.note}" if s.note else ""))
        elif isinstance(s, Store):
            mask = f", mask={s.mask.text()}" if s.mask is not None else ""
            w(f"tl.store({s.pointer.text()}, {s.value.text()}{mask})")
        elif isinstance(s, If):
            with w.indented(f"if {s.cond.text()}:"):
                _print_body(s.body, w)
            if s.orelse:
                with w.indented("else:"):
                    _print_body(s.orelse, w)
        else:
            steps = f"tl.range({s.stop.text()}, num_stages={s.stages})" if s.stages else f"range({s.stop.text()})"
            with w.indented(f"for {s.name} in {steps}:"):
                _print_body(s.body, w)


@dataclass
class Builder:
    """Collects a kernel's statements."""

    body: list[Statement] = field(default_factory=list)

    def let(self, name: str, value: Value, note: str = "") -> Expr:
        self.body.append(Let(name, lift(value), note=note))
        return Expr(name)

    def add(self, name: Expr, value: Expr) -> None:
        self.body.append(Let(name.op, value, add=True))

    def note(self, text: str) -> None:
        self.body.append(Note(text))

    def load(self, name: str, pointer: Expr, mask: Expr | None, note: str = "") -> Expr:
        arguments: tuple[Value, ...] = (pointer,)
        keywords = {} if mask is None else {"mask": mask.text(), "other": "0.0"}
        return self.let(name, call("tl.load", *arguments, **keywords), note)

    def store(self, pointer: Expr, value: Expr, mask: Expr | None) -> None:
        self.body.append(Store(pointer, value, mask))

    @contextmanager
    def loop(self, name: str, stop: Value, over: str, stages: str = "") -> Iterator[Expr]:
        outer, self.body = self.body, []
        yield Expr(name)
        outer.append(Loop(name, lift(stop), over, tuple(self.body), stages))
        self.body = outer

    @contextmanager
    def when(self, cond: Expr) -> Iterator[None]:
        """What is done if a scalar is true."""
        outer, self.body = self.body, []
        yield
        outer.append(If(cond, tuple(self.body)))
        self.body = outer

    @contextmanager
    def otherwise(self) -> Iterator[None]:
        """What is done else; right behind `when`."""
        outer, self.body = self.body, []
        yield
        last = outer.pop()
        assert isinstance(last, If) and not last.orelse, "there is nothing to be done otherwise"
        outer.append(If(last.cond, last.body, tuple(self.body)))
        self.body = outer
