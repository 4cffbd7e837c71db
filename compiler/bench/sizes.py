"""The sizes of what is timed: parameters that make the axes as long as the user wants, and lengths of sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from chunkc.artifact import fit_settings
from chunkc.bench.roles import Roles
from chunkc.ir.axes import Number, Size, SizeError, exact
from chunkc.ir.graph import Unit

LARGEST = 1 << 31  # of any size in the language
OPEN = 64  # an integer parameter that nothing sets
USUAL = {"cuda": {"B": 8, "T": 4096, "H": 16, "K": 128, "V": 128}, "cpu": {"B": 1, "T": 512, "H": 4, "K": 64, "V": 64}}


class BenchError(ValueError):
    """Something that cannot be timed as asked."""


@dataclass(frozen=True)
class Sizes:
    """Parameters by name, the length of each sequence by its axis, and how many sequences there are."""

    settings: Mapping[str, Number]
    lengths: Mapping[str, int]
    batch: int

    def of(self, unit: Unit, axis: str) -> int:
        a = unit.graph.axis[axis]
        return self.lengths[a.space] if a.size is None else int(a.size.evaluate(self.settings))

    def named(self, unit: Unit) -> dict[str, int]:
        """The batch and every axis of a unit, by the spec's names; chunks have no length of their own."""
        return {"B": self.batch} | {
            a.name: self.of(unit, a.name) for a in unit.graph.axes if a.size is not None or a.space in self.lengths
        }

    def short(self, tokens: int) -> Sizes:
        """One short sequence of the same widths."""
        return Sizes(self.settings, {space: min(n, tokens) for space, n in self.lengths.items()}, 1)


def read_shape(text: str) -> dict[str, int]:
    """`B=8,T=4096,h=16` as numbers by name."""
    out: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value.isdecimal() or len(value) > len(str(LARGEST)) or not 1 <= int(value) <= LARGEST:
            raise BenchError(f"'{item[:64]}' is not an axis and its size, from 1 to 2^31, as in 'T=4096'")
        out[name] = int(value)
    return out


def resolve(unit: Unit, roles: Roles | None, settings: Mapping[str, Number], shape: Mapping[str, int], device: str
            ) -> Sizes:  # fmt: skip
    """The sizes that settings and shape ask for, the rest by default.

    Raises:
        BenchError: if an axis is unknown, or cannot have the size that is asked for.
    """
    usual = USUAL[device]
    known: dict[str, Number] = dict(fit_settings([unit], settings))
    default = {p.name: p.default for p in unit.params if p.default is not None}
    targets = _targets(unit, roles, shape)
    axes, spaces = unit.graph.axis, {a.space for a in unit.graph.axes if a.kind in ("time", "unordered")}
    lengths = dict.fromkeys(spaces, shape.get("T", usual["T"]) if "T" not in axes else usual["T"])
    lengths |= {axes[a].space: n for a, n in targets.items() if axes[a].size is None}
    _solve(unit, {a: n for a, n in targets.items() if axes[a].size is not None}, known, default)
    known = {**default, **known}
    for letter in "HKV" if roles else "":
        for axis in roles.axes(letter) if roles else ():
            _solve(unit, {axis: usual[letter]}, known, {})
    for p in unit.params:
        if p.name not in known:
            if p.type != "int":
                raise BenchError(f"the parameter '{p.name}' is open: give it by --set {p.name}=...")
            known[p.name] = OPEN
    sizes = Sizes(known, lengths, shape.get("B", usual["B"]) if "B" not in axes else usual["B"])
    _verify(unit, sizes, targets)
    return sizes


def _targets(unit: Unit, roles: Roles | None, shape: Mapping[str, int]) -> dict[str, int]:
    """The size that each named axis shall have; H, K and V stand for the only axis of that role."""
    axes, out = unit.graph.axis, {}
    for name, n in shape.items():
        if name in axes:
            if axes[name].kind == "chunk":
                raise BenchError(f"'{name}' cuts '{axes[name].parent}': its chunks are as long as the spec says")
            out[name] = n
        elif name in ("H", "K", "V") and roles is not None and len(roles.axes(name)) == 1:
            out[roles.axes(name)[0]] = n
        elif name not in ("B", "T"):
            known = ", ".join(a.name for a in unit.graph.axes if a.kind != "chunk")
            raise BenchError(f"the spec has no axis '{name}': it has {known}; B is the batch and T the tokens")
    return out


def _solve(unit: Unit, targets: Mapping[str, int], known: dict[str, Number], default: Mapping[str, Number]) -> None:
    """Add to `known` parameters that make the axes so long, where one alone is missing; where more are, the default of
    one is taken, and so on."""
    pending = dict(targets)
    while pending:
        missing = {a: [p for p in _size(unit, a).params() if p not in known] for a in pending}
        axis = next((a for a, names in missing.items() if len(names) <= 1), None)
        if axis is not None:
            n, names = pending.pop(axis), missing[axis]
            found = _inverse(_size(unit, axis), n, names[0], known) if names else None
            if found is not None:
                known[names[0]] = found
            continue
        loose = [p for names in missing.values() for p in names if p in default]
        if not loose:
            return
        known[loose[0]] = default[loose[0]]


def _size(unit: Unit, axis: str) -> Size:
    size = unit.graph.axis[axis].size
    assert size is not None
    return size


def _inverse(size: Size, wanted: int | float, name: str, known: Mapping[str, Number]) -> int | None:
    """The value of a parameter that makes a size what is wanted; None if there is none, or it is hard to find."""
    if size.op == "param":
        return int(wanted) if wanted == int(wanted) else None
    if size.op not in ("+", "-", "*", "/"):
        return None
    left, right = size.args
    open_, other = (left, right) if name in left.params() else (right, left)
    if name in other.params():
        return None
    try:
        b = other.evaluate(known)
        inner = {
            "+": lambda: wanted - b,
            "-": lambda: wanted + b if open_ is left else b - wanted,
            "*": lambda: exact(wanted, b),
            "/": lambda: wanted * b if open_ is left else exact(b, wanted),
        }[size.op]()
    except (SizeError, ArithmeticError):
        return None
    return _inverse(open_, inner, name, known)


def _verify(unit: Unit, sizes: Sizes, targets: Mapping[str, int]) -> None:
    for a in unit.graph.axes:
        if a.size is None:
            continue
        try:
            n = a.size.evaluate(sizes.settings)
        except SizeError as reason:
            raise BenchError(f"axis '{a.name}' has no size: {reason}; --set or --shape can change that") from None
        if n != int(n) or n < 1 or not math.isfinite(n):
            raise BenchError(f"axis '{a.name}' would have the size {n}")
        if targets.get(a.name, n) != n:
            raise BenchError(
                f"axis '{a.name}' is {a.size.text()}: with these parameters it is {n}, not {targets[a.name]}"
            )
