"""Nodes under other names of axes, sizes, parameters and states: how one graph becomes part of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, Frozen, Size
from chunkc.ir.graph import Graph

AXIS_FIELDS = frozenset(("axes", "over", "to", "axis", "source", "target", "chunk", "within"))


@dataclass(frozen=True)
class Rebinding:
    """New names: of axes, of parameters (each a size of the new graph), and a prefix for weights and states."""

    axes: dict[str, str]
    sizes: dict[str, Size]
    prefix: str
    declared: tuple[Axis, ...]

    def node(self, node: N.AnyNode | N.Node) -> N.Node:
        """The node in the graph that it becomes part of; its operands keep their ids."""
        changes: dict[str, Any] = {}
        for name in type(node).model_fields:
            value = getattr(node, name)
            changes[name] = self.axis(value) if name in AXIS_FIELDS else self.value(value)
        if isinstance(node, N.Param):
            changes["name"] = f"{self.prefix}.{node.name}"
        if isinstance(node, N.State):
            changes["name"] = f"{self.prefix}_{node.name}"
        return type(node).model_validate(changes)

    def axis(self, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(value, tuple):
            return tuple(self.axes[a] for a in value)
        return None if value is None else self.axes[value]

    def value(self, value: Any) -> Any:
        if isinstance(value, Size):
            return value.substituted(self.sizes)
        if isinstance(value, Graph):
            nodes = tuple(self.node(n) for n in value.nodes)
            return Graph.model_validate(
                {"level": value.level, "nodes": nodes, "outputs": value.outputs, "axes": self.declared}
            )
        if isinstance(value, N.Carried):
            fields = {f: getattr(value, f) for f in type(value).model_fields}
            fields |= {"axes": self.axis(value.axes), "name": f"{self.prefix}_{value.name}"}
            return N.Carried.model_validate(fields)
        if isinstance(value, tuple) and value and isinstance(value[0], Frozen):
            return tuple(self.value(v) for v in value)
        return value
