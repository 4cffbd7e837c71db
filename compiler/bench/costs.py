"""What a part must do at least: bytes that cross memory, and operations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from chunkc.bench.draws import Operand, operands, weights
from chunkc.bench.masks import NotOfPositions, mask_of
from chunkc.bench.parts import Part
from chunkc.bench.roles import attention_roles
from chunkc.bench.sizes import Sizes
from chunkc.costs import BACKWARD, least_seconds
from chunkc.ir import nodes as N


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of the forward pass, and of forward and backward together."""

    bytes_forward: int
    bytes_both: int
    operations_forward: float
    operations_both: float

    def limits_ms(self, bandwidth: float, rate: float) -> tuple[float, float]:
        """The times below which nothing can be."""
        return (
            least_seconds(self.bytes_forward, self.operations_forward, bandwidth, rate) * 1e3,
            least_seconds(self.bytes_both, self.operations_both, bandwidth, rate) * 1e3,
        )


def cost(part: Part, sizes: Sizes, width: int) -> Cost:
    """Each input is read once and each output written once; for the backward pass inputs are read again, with the
    outputs' gradients, and the inputs' gradients are written. `width` is that of a float in bytes."""
    given = [*operands(part.unit, sizes), *weights(part.unit, sizes)]
    read = sum(_bytes(o, width) for o in given)
    gradients = sum(_bytes(o, width) for o in given if o.dtype in ("float", "complex"))
    written = sum(_bytes(o, width) for o in _outputs(part, sizes))
    done = _operations(part, sizes)
    return Cost(read + written, 2 * read + gradients + 2 * written, done, (1 + BACKWARD) * done)


def _bytes(o: Operand, width: int) -> int:
    return math.prod(o.shape) * {"float": width, "complex": 2 * width, "int": 8, "bool": 1}[o.dtype]


def _outputs(part: Part, sizes: Sizes) -> Iterable[Operand]:
    graph = part.unit.graph
    for name, id_ in graph.outputs:
        axes = [a for a in graph[id_].axes if graph.axis[a].kind != "chunk"]
        batch = [sizes.batch] if any(graph.axis[a].is_sequence for a in axes) else []
        yield Operand(name, (*batch, *(sizes.of(part.unit, a) for a in axes)), graph[id_].dtype)


def _operations(part: Part, sizes: Sizes) -> float:
    """Those of every token, and those of each query and row that meet; where a mask depends on inputs, pairs are
    unknown and left out."""
    found = part.facts()
    sequences = [n for n in sizes.lengths.values() if n]
    total = float(_evaluate(part, found["operations"], sizes) * sizes.batch * min(sequences, default=1))
    for node, fact in zip(part.unit.graph.of_kind(N.Attend), found["attentions"]):
        pairs = _pairs(part, node, sizes)
        for source, each in zip(node.sources, fact["sources"]):
            met = pairs if source.axis is not None else 0
            total += sizes.batch * met * _evaluate(part, each["operations"], sizes)
    return total


def _pairs(part: Part, node: N.Attend, sizes: Sizes) -> float:
    """The queries and rows that meet."""
    roles = attention_roles(part.unit.graph, node)
    if roles is None or any(part.unit.graph.axis[a].kind == "chunk" for a in (*roles.axes("T"), *roles.axes("S"))):
        return 0.0
    try:
        mask = mask_of(part.unit, roles, sizes)
    except NotOfPositions:
        return 0.0
    heads = math.prod(sizes.of(part.unit, a) for a in roles.axes("H"))
    return mask.share(heads) * mask.queries * mask.rows


def _evaluate(part: Part, terms: Iterable[Mapping[str, Any]], sizes: Sizes) -> int:
    return sum(t["count"] * math.prod(sizes.of(part.unit, a) for a in t["axes"]) for t in terms)
