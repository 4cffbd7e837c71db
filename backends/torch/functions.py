"""Functions of an emitted package: products with weights, reads at indices, norms, functions of rows that are there.

Copied into packages that need them as `_functions.py`; it imports torch alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, over: int, compute: torch.dtype) -> Tensor:
    """x's last `over` axes times the weight's first; computed in the weight's dtype, given in `compute`."""
    size = math.prod(weight.shape[:over])
    flat = x.reshape(*x.shape[: x.dim() - over], size).to(weight.dtype)
    out = flat @ weight.reshape(size, -1)
    out = out.reshape(*flat.shape[:-1], *weight.shape[over:])
    return (out if bias is None else out + bias).to(compute)


def row_of(x: Tensor, dim: int, index: int) -> Tensor:
    """x at one position of a dimension; outside it, 0."""
    return x.select(dim, index) if 0 <= index < x.shape[dim] else torch.zeros_like(x.select(dim, 0))


class Picked(torch.autograd.Function):
    """x at indices of its last dimension, half precision as float32: so is the sum of what goes back to one place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.save_for_backward(index)
        out = x.index_select(-1, index)
        return out.float() if x.dtype in (torch.bfloat16, torch.float16) else out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return d_out.new_zeros(ctx.shape).index_add(-1, index, d_out).to(ctx.dtype), None


def take(x: Tensor, index: Tensor, shared: int) -> Tensor:
    """x [*shared, *own, n] at integers [*shared, *new]: [*shared, *new, *own], 0 where they are outside 0 to n - 1.

    Shared dimensions of size 1 broadcast."""
    n, own, new = x.shape[-1], x.shape[shared:-1], index.shape[shared:]
    both = [max(a, b) if min(a, b) else 0 for a, b in zip(x.shape[:shared], index.shape[:shared])]
    inside = (index >= 0) & (index < n)
    rows = index.clamp(0, max(n - 1, 0)).reshape(*index.shape[:shared], math.prod(new))
    if n == 0:
        return x.new_zeros((*both, *new, *own))
    out: Tensor
    if all(size == 1 for size in index.shape[:shared]):
        out = Picked.apply(x, rows.reshape(-1))  # type: ignore[no-untyped-call]
    else:
        wide = rows.view(*rows.shape[:shared], *[1] * len(own), rows.shape[-1])
        out = x.expand(*both, *own, n).gather(-1, wide.expand(*both, *own, rows.shape[-1]))
    out = out.movedim(-1, shared).reshape(*out.shape[:shared], *new, *own)
    beyond = ~inside.view(*inside.shape, *[1] * len(own))
    return out.masked_fill(beyond, 0)


def scatter(x: Tensor, index: Tensor, size: int, kept: int) -> Tensor:
    """x [*kept, ...] added up at the integers of index, which broadcasts to x: [*kept, size]; others are left out."""
    index = index.expand(x.shape).reshape(*x.shape[:kept], -1)
    inside = (index >= 0) & (index < size)
    flat = x.reshape(*x.shape[:kept], -1).masked_fill(~inside, 0)
    return flat.new_zeros((*x.shape[:kept], size)).scatter_add(-1, index.clamp(0, size - 1), flat)


def rms_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + 1e-5)


def l2_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dims, keepdim=True) + 1e-6)


def layer_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + 1e-5)


def softmax(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    most = x.amax(dims, keepdim=True).detach()
    e = torch.exp(x - most.masked_fill(most == -math.inf, 0.0))  # over nothing but -inf it is 0
    total = e.sum(dims, keepdim=True)
    return e / total.masked_fill(total == 0, 1.0)


def masked(x: Tensor, valid: Tensor) -> Tensor:
    """x [N, width, ...], 0 at the positions that are not there."""
    return x.masked_fill(~valid.view(*valid.shape, *[1] * (x.dim() - 2)), 0)


def over_valid(x: Tensor, fn: str, valid: Tensor) -> Tensor:
    """A reducer over the positions of a chunk that are there: x [N, width, ...], valid [N, width]. A mean gives the
    sum: what the chunk held before this call is added to it first."""
    there = valid.view(*valid.shape, *[1] * (x.dim() - 2))
    if fn == "any":
        return (x & there).any(1)
    if fn in ("sum", "mean"):
        return masked(x, valid).sum(1)
    idle = -math.inf if fn == "max" else math.inf
    best = x.masked_fill(~there, idle) if x.dtype.is_floating_point else x.masked_fill(~there, 0)
    best = best.amax(1) if fn == "max" else best.amin(1)
    return torch.where(there.any(1), best, torch.zeros_like(best))


def along_valid(x: Tensor, fn: str, dims: tuple[int, ...], valid: Tensor) -> Tensor:
    """A normaliser along the positions of a chunk that are there, and along `dims`: x [N, width, ...]."""
    there = valid.view(*valid.shape, *[1] * (x.dim() - 2))
    along = (1, *(x.dim() + d for d in dims))
    if fn == "softmax":
        return softmax(x.masked_fill(~there, -math.inf), along).masked_fill(~there, 0)
    x = x.masked_fill(~there, 0)
    count = there.expand_as(x).sum(along, keepdim=True).clamp(min=1)
    if fn == "l2_norm":
        return x * torch.rsqrt(x.square().sum(along, keepdim=True) + 1e-6)
    if fn == "layer_norm":
        x = (x - x.sum(along, keepdim=True) / count).masked_fill(~there, 0)
    return x * torch.rsqrt(x.square().sum(along, keepdim=True) / count + 1e-5)


def inv_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
