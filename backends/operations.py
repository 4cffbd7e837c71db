"""What a unit over a parallel layout sends: an operation for each scan, shift back, convolution and attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chunkc.backends.states import histories
from chunkc.backends.writer import identifier
from chunkc.ir import nodes as N
from chunkc.ir.graph import Unit

Kind = Literal["state_allgather", "halo", "ring"]
PREFIX: dict[Kind, str] = {"state_allgather": "scan", "halo": "halo", "ring": "ring"}


@dataclass(frozen=True)
class Operation:
    """An operation of a plan. `parts` are the axes of the tensors that it sends, each once a piece (state_allgather) or
    once a token: of `tokens` at the end of each piece (halo), of all (ring)."""

    kind: Kind
    node: N.AnyNode
    parts: tuple[tuple[str, ...], ...]
    tokens: str = ""

    @property
    def of(self) -> str:
        """What the spec calls it."""
        return self.node.name if isinstance(self.node, N.Scan) else self.node.id

    def method(self, prefix: str) -> str:
        return f"{PREFIX[self.kind]}_{prefix}{identifier(self.of)}"


def is_sharded(unit: Unit, axis: str | None) -> bool:
    """Whether ranks share the sequence of an axis."""
    return unit.parallel is not None and axis is not None and unit.graph.axis[axis].space == unit.parallel.axis


def operations(unit: Unit) -> list[Operation]:
    """A unit's operations, in the order of the graph."""
    found: list[Operation] = []
    graph, rows = unit.graph, {f.node: f.rows or "" for f in histories(unit.graph)}
    for node in graph.nodes:
        if isinstance(node, N.Scan) and is_sharded(unit, node.axis):
            state = (*node.batch, *node.i, *node.j)
            gates = [tuple(a for a in state if a in node.batch or a in graph[g.arg].axes) for g in node.gates]
            if not (node.i or node.j):
                gates = [state]
            found.append(Operation("state_allgather", node, (*gates, state)))
        elif isinstance(node, N.Shift | N.Conv) and node.id in rows and is_sharded(unit, node.axis):
            own = tuple(a for a in graph[node.arg].axes if a != node.axis)
            found.append(Operation("halo", node, (own,), rows[node.id]))
        elif isinstance(node, N.Attend) and is_sharded(unit, node.query):
            over = {s.axis for s in node.sources if is_sharded(unit, s.axis)}
            moving = {n.outer: tuple(a for a in n.axes if a not in over)
                      for n in node.body.of_kind(N.Capture) if over & set(n.axes)}  # fmt: skip
            found.append(Operation("ring", node, tuple(moving.values())))
    return found
