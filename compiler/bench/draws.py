"""Random inputs: normal numbers brought into the range that a spec declares or proves; never zeros."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from chunkc.bench.sizes import Sizes
from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph, Unit

DOCUMENTS = 4  # runs of equal integers


@dataclass(frozen=True)
class Operand:
    """What a tensor must be: its shape, type and range; `along` is the dimension of its sequence, if any. `spread`
    is that of the normal numbers; `normed`: of length 1 in its last dimension; `values`: these numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float"
    low: float = -math.inf
    high: float = math.inf
    along: int | None = None
    spread: float = 1.0
    normed: bool = False
    values: tuple[float, ...] | None = None

    def draw(self, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The same values for the same name, shape and seed; floats are rounded to `dtype`."""
        if self.values is not None:
            return torch.tensor(self.values, device=device)
        source = torch.Generator(device).manual_seed(seed + zlib.crc32(self.name.encode()))
        if self.dtype == "bool" or self.dtype == "int" and math.isinf(self.high):
            return self._runs(device)
        if self.dtype == "int":
            low = 0 if math.isinf(self.low) else int(self.low)
            return torch.randint(low, int(self.high) + 1, self.shape, generator=source, device=device)
        x = torch.randn(self.shape, generator=source, device=device) * self.spread
        if not math.isinf(self.low) and not math.isinf(self.high):
            x = self.low + (self.high - self.low) * torch.sigmoid(x)
        elif not math.isinf(self.low):
            x = self.low + F.softplus(x)
        elif not math.isinf(self.high):
            x = self.high + F.logsigmoid(x)
        x = F.normalize(x, dim=-1) if self.normed else x
        return x.to(dtype.to_complex() if self.dtype == "complex" else dtype)

    def _runs(self, device: str) -> Tensor:
        """Documents of equal length for integers; truth values hold in the first of them."""
        dim = self.along if self.along is not None else max(len(self.shape) - 1, 0)
        n = self.shape[dim] if self.shape else 1
        place = torch.arange(n, device=device).view([-1 if k == dim else 1 for k in range(len(self.shape))])
        place = (place * DOCUMENTS // max(n, 1)).expand(self.shape).contiguous()
        return place == 0 if self.dtype == "bool" else place


def operands(unit: Unit, sizes: Sizes, batched: bool = True) -> list[Operand]:
    """The inputs of a unit, in the order of its call: [B, ...], or those of one sequence."""
    graph = unit.graph
    found = {n.name: n for n in graph.of_kind(N.Input)}
    return [_operand(unit, found[name], sizes, [sizes.batch] if batched else []) for name in unit.inputs]


def weights(unit: Unit, sizes: Sizes) -> list[Operand]:
    """The learned tensors of an op."""
    return [_operand(unit, n, sizes, []) for n in unit.graph.of_kind(N.Param)]


def _operand(unit: Unit, node: N.Input | N.Param, sizes: Sizes, before: Sequence[int]) -> Operand:
    graph = unit.graph
    shape = (*before, *(sizes.of(unit, a) for a in node.axes))
    along = next((k + len(before) for k, a in enumerate(node.axes) if graph.axis[a].is_sequence), None)
    low = -math.inf if node.low is None else node.low
    high = math.inf if node.high is None else node.high
    if node.dtype == "int" and math.isinf(high):
        high = min((sizes.of(unit, a) - 1 for a in _read_along(graph, node)), default=math.inf)
    spread = 1.0
    if isinstance(node, N.Param) and node.fan_in is not None:  # as large as a layer's weights are at first
        spread = float(node.fan_in.evaluate(sizes.settings)) ** -0.5
    return Operand(node.name, shape, node.dtype, low, high, along, spread)


def _read_along(graph: Graph, node: N.Input | N.Param) -> list[str]:
    """The axes of fixed size whose positions an integer names."""
    users = [n for n in graph.of_kind(N.Gather) if node.id in graph.reachable([n.index])]
    return [n.axis for n in users if graph.axis[n.axis].kind == "size"]
