"""Axes, the sizes they have, and element types."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict

Number = int | float | bool
DType = Literal["float", "int", "bool", "complex"]
AxisKind = Literal["time", "unordered", "size", "chunk"]
_AXIS = object()
AxisName = Annotated[str, _AXIS]  # a field of this type, or of several, is found by `axis_fields`


class Frozen(BaseModel):
    """Immutable data; `evolve` changes fields and validates again."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    def evolve(self, **changes: object) -> Self:
        """A copy with fields changed, validated again."""
        return type(self).model_validate({f: getattr(self, f) for f in type(self).model_fields} | changes)


@cache
def axis_fields(cls: type[Frozen]) -> tuple[str, ...]:
    """The fields of a class that hold the name of an axis, or several."""
    return tuple(n for n, f in cls.model_fields.items() if _AXIS in f.metadata or _names_axes(f.annotation))


def _names_axes(annotation: Any) -> bool:
    return annotation is AxisName or any(_names_axes(a) for a in get_args(annotation))


class SizeError(Exception):
    """A size that is no positive integer: the message says why."""


class Size(Frozen):
    """A number known when a layer is constructed: a constant, a parameter, or arithmetic over them."""

    op: Literal["const", "param", "+", "-", "*", "/", "%", "^", "neg", "exp", "log", "floor", "min", "max"]
    value: bool | int | float | str = 0
    args: tuple[Size, ...] = ()

    @staticmethod
    def of(value: int | float) -> Size:
        return Size(op="const", value=value)

    def params(self) -> tuple[str, ...]:
        """The names of the parameters that it depends on, in order of appearance."""
        if self.op == "param":
            return (str(self.value),)
        return tuple(dict.fromkeys(name for arg in self.args for name in arg.params()))

    def substituted(self, sizes: Mapping[str, Size]) -> Size:
        """The same number with other sizes in the place of parameters; computed where nothing is left open."""
        if self.op == "param":
            return sizes.get(str(self.value), self)
        if not self.args:
            return self
        new = self.evolve(args=tuple(a.substituted(sizes) for a in self.args))
        try:
            return Size(op="const", value=new.evaluate({})) if not new.params() else new
        except SizeError:
            return new

    def evaluate(self, env: Mapping[str, Number]) -> int | float:
        """Its value. Raises SizeError where `/` leaves a remainder between integers or nothing is defined."""
        if self.op == "const":
            return self.value  # type: ignore[return-value]
        if self.op == "param":
            return env[str(self.value)]
        a = [arg.evaluate(env) for arg in self.args]
        try:
            return _apply(self.op, a)
        except (ArithmeticError, ValueError) as reason:
            raise SizeError(f"{self.text()} is undefined: {reason}") from None

    def text(self, outer: int = 0, known: Mapping[Size, str] | None = None) -> str:
        """Python source for the value over the parameters' names, and the names of `known` sizes; `/` is `exact`."""
        if known and self in known:
            return known[self]
        if self.op == "const":
            text = repr(self.value) if math.isfinite(float(self.value)) else f"float({str(self.value)!r})"
            return f"({text})" if text.startswith("-") and outer else text
        if self.op == "param":
            return str(self.value)
        rank = {"+": 1, "-": 1, "*": 2, "%": 2, "neg": 3, "^": 4}.get(self.op)
        if rank is None:
            name = {"/": "exact", "exp": "math.exp", "log": "math.log", "floor": "math.floor"}.get(self.op, self.op)
            return f"{name}({', '.join(a.text(0, known) for a in self.args)})"
        if self.op == "neg":
            text = "-" + self.args[0].text(rank, known)
        else:
            sign = "**" if self.op == "^" else self.op
            text = f"{self.args[0].text(rank, known)} {sign} {self.args[1].text(rank + 1, known)}"
        return f"({text})" if rank < outer or self.op == "^" and outer == 4 else text


def _apply(op: str, a: list[int | float]) -> int | float:
    if op == "/":
        return exact(a[0], a[1])
    if op == "^":
        if abs(a[1]) > 1024 or abs(a[0]) > 2**31:
            raise OverflowError("the power is too large")
        if a[0] < 0 and a[1] != int(a[1]):
            raise ValueError("a negative number has no such power")
        power: int | float = a[0] ** a[1]
        return float(power) if isinstance(a[1], float) or a[1] < 0 else _bounded(power)
    functions: dict[str, Callable[[], int | float]] = {
        "+": lambda: a[0] + a[1],
        "-": lambda: a[0] - a[1],
        "*": lambda: a[0] * a[1],
        "%": lambda: a[0] % a[1],
        "neg": lambda: -a[0],
        "exp": lambda: math.exp(a[0]),
        "log": lambda: math.log(a[0]),
        "floor": lambda: math.floor(a[0]),
        "min": lambda: min(a),
        "max": lambda: max(a),
    }
    return _bounded(functions[op]())


def _bounded(value: int | float) -> int | float:
    """The value, if a float could hold it."""
    if isinstance(value, int) and value.bit_length() > 1000:
        raise OverflowError("the number is too large")
    return value


def exact(a: int | float, b: int | float) -> int | float:
    """a / b; between integers the remainder must be 0."""
    if isinstance(a, int) and isinstance(b, int):
        if b == 0 or a % b:
            raise SizeError(f"{a} is not divisible by {b}")
        return a // b
    return a / b


class Axis(Frozen):
    """A named axis: a sequence (`time`, `unordered`), a fixed size, or the chunks of another axis.

    `space` is the axis whose index space it shares (itself unless declared as a second name);
    `parent` is the axis that it groups (`hk = 4 groups h`) or cuts (`chunk c of t`).
    """

    name: AxisName
    kind: AxisKind
    size: Size | None = None
    space: AxisName
    parent: AxisName | None = None

    @property
    def is_sequence(self) -> bool:
        return self.kind in ("time", "unordered", "chunk")
