"""What the kinds over tiles mean, in plain PyTorch: tiles of one sequence, without a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chunkc.ir import nodes as N
from chunkc.ir import tiles as T

if TYPE_CHECKING:
    from chunkc.interp import Interpreter

KINDS = (T.Tile, T.Untile, T.Span, T.Contract, T.Strict)
SEVERAL = (T.Prefix, T.Carry, T.Halving, T.Kernel)


def value_of(m: Interpreter, node: T.Tile | T.Untile | T.Span | T.Contract | T.Strict) -> Tensor:
    """The value of a node over tiles, from the values that the machine holds."""
    if isinstance(node, T.Tile):
        return _tile(m, node)
    if isinstance(node, T.Untile):
        have = m.graph[node.arg].axes
        x = m.values[node.arg].movedim([have.index(a) for a in node.over], (0, 1))
        return x.flatten(0, 1)[: m.size(node.axis)]
    if isinstance(node, T.Contract):
        letters = {a: chr(97 + n) for n, a in enumerate(dict.fromkeys([*m.graph[node.left].axes,
                                                                      *m.graph[node.right].axes]))}  # fmt: skip
        terms = ["".join(letters[a] for a in axes) for axes in (m.graph[node.left].axes, m.graph[node.right].axes)]
        return torch.einsum(f"{','.join(terms)}->{''.join(letters[a] for a in node.axes)}",
                            m.values[node.left], m.values[node.right])  # fmt: skip
    have = m.graph[node.arg].axes
    x = m.values[node.arg]
    if isinstance(node, T.Strict):
        row, column = (torch.arange(x.shape[have.index(a)]) for a in (node.row, node.column))
        below = column < row[:, None] if have.index(node.row) < have.index(node.column) else column[:, None] < row
        shape = [x.shape[n] if a in (node.row, node.column) else 1 for n, a in enumerate(have)]
        return torch.where(below.reshape(shape), x, torch.zeros((), dtype=x.dtype))
    along = have.index(node.axis)
    if node.fn == "whole":
        return x.sum(along)
    places = torch.arange(x.shape[along])
    mask = {"before": torch.gt, "upto": torch.ge, "after": torch.lt, "onward": torch.le}[node.fn](
        places[:, None], places
    )
    sums: Tensor = torch.tensordot(mask.to(x.dtype), x.movedim(along, 0), 1)
    return sums.movedim(0, along)


def _tile(m: Interpreter, node: T.Tile) -> Tensor:
    have = m.graph[node.arg].axes
    x = m.values[node.arg].movedim(have.index(node.axis), 0).to(m.run.dtype)
    if node.log in ("zero", "small"):
        least = -1e4 if node.log == "zero" else -40 * torch.log(torch.tensor(2.0, dtype=x.dtype)).item()
        x = torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), least).clamp(min=least)
    size = m.size(node.to[1])
    tiles = -(-x.shape[0] // size)
    beyond = x.new_full((tiles * size - x.shape[0], *x.shape[1:]), node.pad)
    x = torch.cat([x, beyond]).reshape(tiles, size, *x.shape[1:])
    laid = (*node.to, *(a for a in have if a != node.axis))
    return x.permute([laid.index(a) for a in node.axes])


def results_of(m: Interpreter, node: T.Prefix | T.Carry | T.Halving | T.Kernel) -> list[Tensor]:
    """The results of a node over tiles that has several."""
    if isinstance(node, T.Kernel):
        given = {n.name: m.values[arg] for n, arg in zip(node.body.of_kind(N.Input), node.reads)}
        body = m.inner(node.body, given)
        return [body.value(id_) for _, id_ in node.body.outputs]
    if isinstance(node, T.Prefix):
        return _prefix(m, node)
    if isinstance(node, T.Carry):
        return _carry(m, node)
    return _halving(m, node)


def _prefix(m: Interpreter, node: T.Prefix) -> list[Tensor]:
    along = m.graph[node.a].axes.index(node.axis)
    rows = list(zip(m.values[node.a].unbind(along), m.values[node.b].unbind(along)))
    tropical = node.algebra == "max-plus"
    one, zero = (0.0, float("-inf")) if tropical else (1.0, 0.0)
    a, b = torch.full_like(rows[0][0], one), torch.full_like(rows[0][1], zero)
    entering = []
    for row_a, row_b in reversed(rows) if node.reverse else rows:
        entering.append((a, b))
        a, b = (row_a + a, torch.maximum(row_a + b, row_b)) if tropical else (row_a * a, row_a * b + row_b)
    ordered = entering[::-1] if node.reverse else entering
    return [torch.stack([x for x, _ in ordered], along), torch.stack([x for _, x in ordered], along), a, b]


def _carry(m: Interpreter, node: T.Carry) -> list[Tensor]:
    axes = m.graph[node.update].axes
    along = axes.index(node.axis)
    update = m.values[node.update].unbind(along)
    decay = [None] * len(update) if node.decay is None else m.aligned(node.decay, axes).unbind(along)
    state = m.aligned(node.initial, tuple(a for a in axes if a != node.axis)).to(m.run.dtype)
    edges: list[Tensor] = []
    for d, u in reversed(list(zip(decay, update))) if node.reverse else zip(decay, update):
        edges.append(state)
        if node.algebra == "max-plus":
            state = torch.maximum(state if d is None else d + state, u)
        else:
            state = (state if d is None else d * state) + u
    ordered = edges[::-1] if node.reverse else edges
    none = m.values[node.update]  # no tile: an empty result
    return [torch.stack(ordered, along) if ordered else none, state]


def _halves(x: Tensor, along: int, half: int) -> tuple[Tensor, Tensor]:
    """The earlier and the later half of each block along a dimension, which becomes (block, place)."""
    shape = (*x.shape[:along], x.shape[along] // (2 * half), 2, half, *x.shape[along + 1 :])
    blocks = x.reshape(shape)
    return blocks.select(along + 1, 0), blocks.select(along + 1, 1)


def _halving(m: Interpreter, node: T.Halving) -> list[Tensor]:
    totals = [m.values[t].contiguous().clone() for t in node.totals]
    half = m.size(node.axis) // 2
    while half:
        body = m.inner(node.body)
        for n in node.body.of_kind(T.Half):
            along = m.graph[n.outer].axes.index(node.axis)
            body.values[n.id] = _halves(m.values[n.outer], along, half)[n.half == "later"]
        for part in node.parts:
            axes = m.graph[node.totals[part.total]].axes
            pair = (node.to[0], node.to[1] if part.half == "earlier" else node.to[2])
            wanted = tuple(x for a in axes for x in (pair if a == node.axis else (a,)))
            body.value(part.value)
            to = _halves(totals[part.total], axes.index(node.axis), half)[part.half == "later"]
            to += body.aligned(part.value, wanted)
        half //= 2
    return totals
