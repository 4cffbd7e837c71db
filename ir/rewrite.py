"""Graphs under other names of axes, parameters and states: how one becomes part of another, or of a Python module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, Frozen, Size, axis_fields
from chunkc.ir.graph import Graph


@dataclass(frozen=True)
class Rebinding:
    """New names: of axes, and of parameters (each a size of the new graph); what is not in them keeps its name.

    A graph that becomes part of another has a prefix for its weights and states, and its regions speak of the other
    graph's axes, which are `declared`."""

    axes: dict[str, str]
    sizes: dict[str, Size]
    prefix: str = ""
    declared: tuple[Axis, ...] | None = None

    def node(self, node: N.AnyNode | N.Node) -> N.Node:
        """The node in the new graph; its operands keep their ids."""
        new: N.Node = self.value(node)
        return new

    def graph(self, graph: Graph) -> Graph:
        """The graph with all its regions."""
        new: Graph = self.value(graph)
        return new

    def value(self, value: Any) -> Any:
        if isinstance(value, Size):
            return value.substituted(self.sizes)
        if isinstance(value, tuple):
            return tuple(self.value(v) for v in value) if value and isinstance(value[0], Frozen) else value
        if not isinstance(value, Frozen):
            return value
        own, cls = axis_fields(type(value)), type(value)
        fields = {f: self.axis(v) if f in own else self.value(v) for f in cls.model_fields for v in [getattr(value, f)]}
        if isinstance(value, Graph) and self.declared is not None:
            fields["axes"] = self.declared
        if self.prefix and isinstance(value, N.Param):
            fields["name"] = f"{self.prefix}.{value.name}"
        if self.prefix and isinstance(value, N.State | N.Carried | N.Scan):
            fields["name"] = f"{self.prefix}_{value.name}"
        return cls.model_validate(fields)

    def axis(self, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(value, tuple):
            return tuple(self.axes.get(a, a) for a in value)
        return None if value is None else self.axes.get(value, value)
