"""The syntax tree: what the text says, each node with its span. Equality ignores spans."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from chunkc.ir.diagnostics import Span


@dataclass(frozen=True)
class Syntax:
    """Every node has the span of its text."""

    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Name(Syntax):
    """An identifier."""

    text: str


@dataclass(frozen=True)
class NumberLit(Syntax):
    """A number as written: an int unless it has a point or an exponent."""

    text: str

    @property
    def value(self) -> int | float:
        return float(self.text) if any(c in self.text for c in ".e") else int(self.text)


@dataclass(frozen=True)
class Unary(Syntax):
    op: str
    arg: Expr


@dataclass(frozen=True)
class Binary(Syntax):
    """Arithmetic, `and`, `or`, a comparison, or `in`."""

    op: str
    left: Expr
    right: Expr


@dataclass(frozen=True)
class Ix(Syntax):
    """One entry between brackets: `a`, `a in c`, `a if E`, or `a = E`."""

    name: Name
    within: Name | None = None
    cond: Expr | None = None
    at: Expr | None = None


@dataclass(frozen=True)
class Index(Syntax):
    """`E[...]`: a reducer's axes or a read; `to` is what follows an arrow (None: no arrow)."""

    base: Expr
    entries: tuple[Ix, ...]
    to: tuple[Name, ...] | None = None


@dataclass(frozen=True)
class Arg(Syntax):
    name: Name | None
    value: Expr


@dataclass(frozen=True)
class CallExpr(Syntax):
    fn: Expr
    args: tuple[Arg, ...]


Expr = Name | NumberLit | Unary | Binary | Index | CallExpr


@dataclass(frozen=True)
class AxisDecl(Syntax):
    """`t: time`, `d = EXPR`, `s = t`, `hk = 4 groups h`."""

    name: Name
    kind: Name | None
    size: Expr | None
    groups: Name | None


@dataclass(frozen=True)
class Axes(Syntax):
    axes: tuple[AxisDecl, ...]


@dataclass(frozen=True)
class Bind(Syntax):
    """A declared tensor: name[axes]: type in [low, high] = value."""

    name: Name
    axes: tuple[Name, ...] | None
    type: Name | None = None
    range: tuple[Expr, Expr] | None = None
    value: Expr | None = None


@dataclass(frozen=True)
class Declare(Syntax):
    what: Literal["input", "output", "state", "param"]
    binds: tuple[Bind, ...]


@dataclass(frozen=True)
class Define(Syntax):
    name: Name
    axes: tuple[Name, ...] | None
    value: Expr


@dataclass(frozen=True)
class Doc(Syntax):
    text: str


@dataclass(frozen=True)
class Chunk(Syntax):
    name: Name
    of: Name
    rule: Expr


@dataclass(frozen=True)
class Recurrence(Syntax):
    over: Name
    within: Name | None
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class Source(Syntax):
    """Rows that an attention reads: `over s { ... }`, or one row, `row { ... }`."""

    over: Name | None
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class Attention(Syntax):
    """`attention o[axes] { SOURCE ... }`; with one source, `attention o[axes] over s { ... }`."""

    name: Name
    axes: tuple[Name, ...] | None
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class Pin(Syntax):
    """A setting of a schedule: `prefix_invariant = true`."""

    name: Name
    value: Expr


@dataclass(frozen=True)
class Schedule(Syntax):
    """`schedule { ... }`: what is demanded of how a layer or op is computed."""

    pins: tuple[Pin, ...]


@dataclass(frozen=True)
class Later(Syntax):
    """A statement of the language that this version does not build: order, pick.

    `defines` are the names that it would define."""

    what: str
    defines: tuple[Name, ...] = ()


Statement = Axes | Declare | Define | Doc | Chunk | Recurrence | Attention | Source | Schedule | Later


@dataclass(frozen=True)
class Parameter(Syntax):
    name: Name
    type: Name | None
    default: Expr | None


@dataclass(frozen=True)
class UnitDecl(Syntax):
    kind: Literal["layer", "op"]
    causal: bool
    name: Name
    params: tuple[Parameter, ...]
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class FnDecl(Syntax):
    name: Name
    axes: tuple[Name, ...]
    params: tuple[Parameter, ...]
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class Setting(Syntax):
    """A line of a parallel layout, as words, brackets and commas; `inner` are those of its own block."""

    words: tuple[Name, ...]
    inner: tuple[Setting, ...] | None = None


@dataclass(frozen=True)
class Parallel(Syntax):
    """`parallel { ... }`: how the ranks of a mesh share the sequences of the file's units."""

    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Use(Syntax):
    path: str


@dataclass(frozen=True)
class File(Syntax):
    """A parsed spec file; `comments` are the `#` comments in order, for the formatter."""

    items: tuple[UnitDecl | FnDecl | Use | Parallel, ...]
    comments: tuple[tuple[int, str], ...] = field(default=(), compare=False)
