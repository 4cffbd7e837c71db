"""Numbers known at construction, axes by name, and what every part of the checker shares."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from chunkc.dsl import tree as T
from chunkc.dsl.scope import AxisName, Scope, Setting, Work
from chunkc.ir.axes import Axis, Size, SizeError
from chunkc.ir.diagnostics import Report, Span
from chunkc.ir.graph import Builder

CONSTANTS: dict[str, float | bool] = {"pi": math.pi, "inf": math.inf, "true": True, "false": False}
SIZE_FUNCTIONS = {"exp": 1, "log": 1, "floor": 1, "min": 16, "max": 16}  # and their most arguments
MAX_PARTS = 100  # of one number: its formula is repeated wherever it is used
MAX_SIZE = 2**31


@dataclass
class Context:
    """Where an expression stands: the builder, the axis bound by a recurrence, and the definition it belongs to.

    `target` are the axes of the definition, for an arrowless `linear`; `weight` is the prefix of its parameters'
    names; `rename` maps axes to the second names that the definition uses; `initial` allows random numbers."""

    builder: Builder
    outer: Builder | None = None
    bound: str | None = None
    target: tuple[str, ...] | None = None
    weight: str | None = None
    rename: dict[str, str] = field(default_factory=dict)
    initial: bool = False
    weights_used: list[Span] = field(default_factory=list)


def parts(size: Size) -> int:
    """How many constants, parameters and operations a number is made of, counted to just above the limit."""
    count, stack = 0, [size]
    while stack and count <= MAX_PARTS:
        count += 1
        stack.extend(stack.pop().args)
    return count


class Sizes:
    """Checks numbers in a scope. `axes` are the unit's axes by name."""

    def __init__(self, scope: Scope, report: Report, axes: dict[str, Axis], work: Work) -> None:
        self.scope = scope
        self.report = report
        self.axes = axes
        self.work = work

    def later(self, what: str, span: Span) -> None:
        """Report what the language has and this version has not."""
        self.report.error("not-yet", f"{what} is not built by this version", span,
                          notes=("the language has it; docs/language.md lists what is built",))  # fmt: skip

    def axis(self, name: T.Name) -> Axis | None:
        symbol = self.scope.find(name)
        if isinstance(symbol, AxisName):
            return symbol.axis
        if symbol is not None:
            self.report.error("not-an-axis", f"'{name.text}' is no axis", name.span)
        return None

    def number(self, e: T.Expr) -> Size | None:
        """A number known at construction, that has a value as far as that can be told here."""
        size = self.size(e)
        if size is None:
            return None
        if parts(size) > MAX_PARTS:
            self.report.error("too-large", f"this number is made of over {MAX_PARTS} parts", e.span)
            return None
        return size if self.defined(size, e.span) else None

    def defined(self, size: Size, span: Span) -> bool:
        """Whether a number has a value; true where that depends on parameters."""
        try:
            if not size.params() and math.isnan(size.evaluate({})):
                raise SizeError("this is not a number")
        except SizeError as reason:
            self.report.error("bad-size", _short(str(reason)), span)
            return False
        return True

    def whole(self, e: T.Expr, low: int, code: str, what: str) -> Size | None:
        """A number known at construction that is an integer from `low` to 2^31, as far as that can be told here."""
        size = self.number(e)
        if size is None or size.params():
            return size
        value = size.evaluate({})
        inside = low <= value <= MAX_SIZE  # first: infinity is no integer
        if isinstance(value, bool) or not inside or value != int(value):
            shown = value if inside else f"{'below' if value < low else 'above'} that"
            self.report.error(code, f"{what} is an integer from {low} to 2^31, this is {shown}", e.span)
            return None
        return Size.of(int(value)) if isinstance(value, float) else size

    def size(self, e: T.Expr) -> Size | None:
        """A number known at construction: literals, parameters, size(axis) of a fixed axis, arithmetic."""
        self.work.spend(e.span)
        if isinstance(e, T.NumberLit):
            return Size.of(e.value)
        if isinstance(e, T.Name):
            if e.text in CONSTANTS:
                return Size.of(CONSTANTS[e.text])
            symbol = self.scope.find(e)
            if isinstance(symbol, Setting):
                return symbol.size
            if symbol is not None:
                self.no_size(f"'{e.text}' is no number known at construction", e.span)
            return None
        if isinstance(e, T.Unary) and e.op == "-":
            arg = self.size(e.arg)
            return Size(op="neg", args=(arg,)) if arg else None
        if isinstance(e, T.Binary) and e.op in ("+", "-", "*", "/", "%", "^"):
            left, right = self.size(e.left), self.size(e.right)
            return Size(op=e.op, args=(left, right)) if left and right else None  # type: ignore[arg-type]
        if isinstance(e, T.CallExpr) and isinstance(e.fn, T.Name) and e.fn.text in ("size", *SIZE_FUNCTIONS):
            return self.size_call(e.fn.text, e)
        self.no_size("this is no number known at construction", e.span)
        return None

    def size_call(self, name: str, e: T.CallExpr) -> Size | None:
        most = SIZE_FUNCTIONS.get(name, 1)
        if not 1 <= len(e.args) <= most or any(a.name for a in e.args):
            wanted = "one argument" if most == 1 else f"1 to {most} arguments"
            self.report.error("bad-call", f"'{name}' takes {wanted}, without names", e.span)
            return None
        if name != "size":
            sizes = [s for a in e.args if (s := self.size(a.value))]
            return Size(op=name, args=tuple(sizes)) if len(sizes) == len(e.args) else None  # type: ignore[arg-type]
        at = e.args[0].value
        if not isinstance(at, T.Name):
            self.report.error("not-an-axis", "'size' takes the name of an axis", at.span)
            return None
        axis = self.axis(at)
        if axis is None:
            return None
        if axis.size is None:
            self.no_size(f"the length of '{at.text}' is known only when the layer runs", e.span)
        return axis.size

    def no_size(self, message: str, span: Span) -> None:
        self.report.error("not-a-size", message, span, hints=("use literals, parameters and size(axis)",))


def _short(text: str) -> str:
    """A message without the digits of numbers that nobody reads."""
    return text if len(text) < 120 else text[:60] + " … " + text[-50:]
