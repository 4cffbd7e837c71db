"""The base of all kinds of node."""

from __future__ import annotations

from chunkc.ir.axes import AxisName, DType, Frozen
from chunkc.ir.diagnostics import Span


class Node(Frozen):
    """What all kinds share: a unique id, the axes and element type of the value, and where it stands in the spec."""

    id: str
    axes: tuple[AxisName, ...] = ()
    dtype: DType = "float"
    span: Span | None = None

    def operands(self) -> tuple[str, ...]:
        """The ids that it reads, in order."""
        return ()

    def renamed(self, names: dict[str, str]) -> Node:
        """The same node reading other ids."""
        return self


class Unary(Node):
    arg: str

    def operands(self) -> tuple[str, ...]:
        return (self.arg,)

    def renamed(self, names: dict[str, str]) -> Node:
        return self.evolve(arg=names.get(self.arg, self.arg))
