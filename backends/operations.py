"""What a unit over a parallel layout sends: an operation for each scan, shift back, convolution and attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chunkc.backends.states import histories
from chunkc.backends.writer import identifier
from chunkc.ir import nodes as N
from chunkc.ir.axes import DType
from chunkc.ir.graph import Unit

Kind = Literal["state_allgather", "halo", "ring"]
PREFIX: dict[Kind, str] = {"state_allgather": "scan", "halo": "halo", "ring": "ring"}


@dataclass(frozen=True)
class Sent:
    """A tensor that is sent: its axes beside the sequence, and its type."""

    axes: tuple[str, ...]
    dtype: DType


@dataclass(frozen=True)
class Operation:
    """An operation of a plan: `sent` goes to all ranks once a piece (state_allgather), for each of `tokens` at an end
    of a piece (halo), or travels with every row (ring)."""

    kind: Kind
    name: str
    node: N.AnyNode
    sent: tuple[Sent, ...]
    tokens: str = ""

    def method(self, prefix: str = "") -> str:
        return f"{PREFIX[self.kind]}_{prefix}{identifier(self.name)}"


def is_sharded(unit: Unit, axis: str | None) -> bool:
    """Whether ranks share the sequence of an axis."""
    return unit.parallel is not None and axis is not None and unit.graph.axis[axis].space == unit.parallel.axis


def ahead(node: N.Shift) -> int:
    """How many tokens a shift looks ahead; 0 if it does not."""
    return 0 if node.by.params() else max(-int(node.by.evaluate({})), 0)


def operations(unit: Unit) -> list[Operation]:
    """A unit's operations, in the order of the graph."""
    found: list[Operation] = []
    graph, kept_tokens = unit.graph, {f.node: f for f in histories(unit.graph)}
    for node in graph.nodes:
        if isinstance(node, N.Scan) and is_sharded(unit, node.axis):
            state = (*node.batch, *node.i, *node.j)
            kept = [tuple(a for a in state if a in node.batch or a in graph[g.arg].axes) for g in node.gates]
            parts = [*(kept if node.i or node.j else [state]), state]
            found.append(Operation("state_allgather", node.name, node, tuple(Sent(axes, node.dtype) for axes in parts)))
        elif isinstance(node, N.Shift | N.Conv) and node.id in kept_tokens and is_sharded(unit, node.axis):
            field = kept_tokens[node.id]
            found.append(Operation("halo", field.name, node, (Sent(field.axes, field.dtype),), field.rows or ""))
        elif isinstance(node, N.Shift) and is_sharded(unit, node.axis) and (count := ahead(node)):
            own = tuple(a for a in node.axes if a != node.axis)
            name, names = f"{node.arg}_after", {op.name for op in found}
            while name in names:
                name += "_"
            found.append(Operation("halo", name, node, (Sent(own, node.dtype),), str(count)))
        elif isinstance(node, N.Attend) and is_sharded(unit, node.query):
            over = {s.axis for s in node.sources if is_sharded(unit, s.axis)}
            moving = {n.outer: Sent(tuple(a for a in n.axes if a not in over), n.dtype)
                      for n in node.body.of_kind(N.Capture) if over & set(n.axes)}  # fmt: skip
            found.append(Operation("ring", node.id, node, tuple(moving.values())))
    return found
