"""A mask as a function of a query's and a row's position: what FlexAttention takes, and what counts pairs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from chunkc.bench.roles import Roles
from chunkc.bench.sizes import Sizes
from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph, Unit

Positions = Callable[[Any, Any, Any], Any]  # of head, query and row
SAMPLED = 257  # queries that are looked at where all would be many
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
    "and": operator.and_, "or": operator.or_, "+": operator.add, "-": operator.sub, "*": operator.mul,
    "%": operator.mod, "neg": operator.neg, "not": lambda x: x ^ True,
}  # fmt: skip


class NotOfPositions(ValueError):
    """A mask that depends on more than positions."""


@dataclass(frozen=True)
class Mask:
    """Which rows a query sees; `heads` says whether that differs from head to head."""

    seen: Positions
    heads: bool
    queries: int
    rows: int

    def share(self, heads: int) -> float:
        """The part of all pairs that is seen; of long sequences, of evenly spaced queries."""
        parts = [self._sample(h).float().mean().item() for h in range(heads if self.heads else 1)]
        return sum(parts) / len(parts)

    def rule(self) -> str:
        """`causal`, `full` or `other`."""
        if self.heads:
            return "other"
        sample = self._sample(0)
        if bool(sample.all()):
            return "full"
        q, r = self._places()
        return "causal" if self.queries == self.rows and torch.equal(sample, r <= q) else "other"

    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        q = torch.linspace(0, self.queries - 1, min(self.queries, SAMPLED)).round().long()
        return q[:, None], torch.arange(self.rows)[None, :]

    def _sample(self, head: int) -> torch.Tensor:
        q, r = self._places()
        return torch.as_tensor(self.seen(torch.tensor(head), q, r)).expand(q.shape[0], r.shape[1])


def causal(tokens: int) -> Mask:
    """Every row up to the query's own."""
    return Mask(lambda h, q, r: r <= q, False, tokens, tokens)


def mask_of(unit: Unit, roles: Roles, sizes: Sizes) -> Mask:
    """The mask of an attention's first source of rows.

    Raises:
        NotOfPositions: if it reads inputs, or uses what is not in `FUNCTIONS`.
    """
    node = unit.graph[roles.node]
    assert isinstance(node, N.Attend)
    source = next(s for s in node.sources if s.axis is not None)
    assert node.query is not None and source.axis is not None
    queries, rows = sizes.of(unit, node.query), sizes.of(unit, source.axis)
    if source.mask is None:
        return Mask(lambda h, q, r: (q >= 0) & (r >= 0), False, queries, rows)
    heads = any(isinstance(n, N.Coord) and n.axis in roles.axes("H") for n in _inside(node.body, source.mask))
    return Mask(_function(node.body, source.mask, node.query, source.axis, roles, sizes), heads, queries, rows)


def _inside(body: Graph, id_: str) -> list[N.AnyNode]:
    needed = body.reachable([id_])
    return [n for n in body.nodes if n.id in needed]


def _function(body: Graph, id_: str, query: str, row: str, roles: Roles, sizes: Sizes) -> Positions:
    node = body[id_]
    if isinstance(node, N.Const):
        value = node.size.evaluate(sizes.settings)
        return lambda h, q, r: value
    if isinstance(node, N.Coord) and node.axis == query:
        return lambda h, q, r: q
    if isinstance(node, N.Coord) and node.axis == row:
        return lambda h, q, r: r
    if isinstance(node, N.Coord) and roles.axes("H") == (node.axis,):
        return lambda h, q, r: h
    if isinstance(node, N.Map) and node.fn in FUNCTIONS:
        parts = [_function(body, a, query, row, roles, sizes) for a in node.args]
        return _applied(FUNCTIONS[node.fn], parts)
    raise NotOfPositions(f"the mask reads {getattr(node, 'outer', None) or node.id}")


def _applied(fn: Callable[..., Any], parts: list[Positions]) -> Positions:
    if len(parts) == 1:
        (only,) = parts
        return lambda h, q, r: fn(only(h, q, r))
    first, second, *more = parts

    def both(h: Any, q: Any, r: Any) -> Any:
        return fn(first(h, q, r), second(h, q, r))

    return _applied(fn, [both, *more]) if more else both
