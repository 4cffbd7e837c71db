"""Names of a unit and what they stand for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from chunkc.dsl import tree as T
from chunkc.ir.axes import Axis, DType, Size
from chunkc.ir.diagnostics import Report, Span
from chunkc.ir.graph import Unit

MAX_WORK = 40_000
MAX_FOUND = 100
MAX_NEAR = 1000  # names among which a similar one is looked for


@dataclass(frozen=True)
class AxisName:
    axis: Axis
    span: Span


@dataclass(frozen=True)
class Value:
    """A tensor of the unit: a node of the outer graph."""

    id: str
    span: Span


@dataclass
class StateName:
    """A state: inside its recurrence `current` is the body node it stands for; outside, `outer` its trajectory."""

    axes: tuple[str, ...]
    span: Span
    initial: str | None
    current: str = ""
    dtype: DType = "float"
    outer: str = ""
    final: str = ""
    weights_used: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class BodyValue:
    """A tensor defined inside the recurrence that is being checked."""

    id: str
    span: Span


@dataclass(frozen=True)
class Setting:
    """A parameter of the unit."""

    size: Size
    type: str
    span: Span


@dataclass(frozen=True)
class FunctionName:
    """A function, with the functions that its own file knows."""

    decl: T.FnDecl
    span: Span
    known: Mapping[str, Symbol] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class UnitName:
    """A layer or op that can be called."""

    unit: Unit
    span: Span


@dataclass(frozen=True)
class Broken:
    """A name whose definition was reported already: using it is silent."""

    span: Span


class Stop(Exception):
    """Checking ends: the file is too large, or has more errors than anyone reads."""


@dataclass
class Work:
    """What checking a file may cost: names, statements and expressions, those of inlined functions too."""

    report: Report
    left: int = MAX_WORK

    def spend(self, span: Span, amount: int = 1) -> None:
        """Raises Stop beyond the limit."""
        self.left -= amount
        if self.left < 0:
            self.report.error("too-large", f"this file takes over {MAX_WORK} steps to check", span,
                              hints=("split it into several files",))  # fmt: skip
            raise Stop
        if len(self.report.found) >= MAX_FOUND:
            raise Stop


Symbol = AxisName | Value | StateName | BodyValue | Setting | FunctionName | UnitName | Broken


@dataclass
class Scope:
    """One namespace a unit, without shadowing."""

    report: Report
    reserved: frozenset[str]
    silenced: frozenset[str] = frozenset()
    outside: Mapping[str, Symbol] = field(default_factory=dict)  # layers, ops and functions of this and used files
    later: frozenset[str] = frozenset()  # layers and ops that stand further down
    own: T.Name | None = None  # the layer's or op's own
    names: dict[str, Symbol] = field(default_factory=dict)

    def declare(self, name: T.Name, symbol: Symbol) -> bool:
        """Enter a name; reports a clash and keeps the first."""
        if name.text in self.reserved:
            self.report.error("name-taken", f"'{name.text}' is a function of the language", name.span,
                              hints=("choose another name",))  # fmt: skip
            self.names[name.text] = Broken(name.span)
            return False
        old = self.names.get(name.text)
        if old is not None:
            if not isinstance(old, Broken):
                self.report.error("name-taken", f"'{name.text}' is defined twice", name.span,
                                  related=((old.span, "first here"),))  # fmt: skip
            return False
        self.names[name.text] = symbol
        return True

    def known(self, name: str) -> Symbol | None:
        """What the name stands for in the unit, else outside it; None if nothing."""
        return self.names.get(name) or self.outside.get(name)

    def find(self, name: T.Name) -> Symbol | None:
        """What the name stands for; reports an unknown one."""
        symbol = self.known(name.text)
        if symbol is None and name.text not in self.silenced:
            if name.text in self.later:
                self.report.error("unknown-name", f"'{name.text}' is defined further down", name.span,
                                  hints=("define it before it is used",))  # fmt: skip
                return None
            if self.own is not None and name.text == self.own.text:
                self.report.error("recursive", f"'{name.text}' calls itself", name.span,
                                  related=((self.own.span, "declared here"),))  # fmt: skip
                return None
            known = [*self.names, *self.outside, *self.reserved]
            short = len(known) < MAX_NEAR and len(name.text) < 64
            near = difflib.get_close_matches(name.text, known, 1) if short else []
            hints = (f"did you mean '{near[0]}'?",) if near else ()
            self.report.error("unknown-name", f"there is no '{name.text[:64]}' here", name.span, hints=hints)
        return None if isinstance(symbol, Broken) else symbol
