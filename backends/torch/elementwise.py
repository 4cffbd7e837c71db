"""Scans without a product: h = a * h + b, and h = max(a + h, b), tile by tile.

Copied into each package as `_elementwise.py`. Operands are [B, T, H, D], initial values [N, H, D], as in `_runtime.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chunkc.backends.torch.runtime import Sequences, halves, levels, once, uncast


def tile_scan(
    seq: Sequences, a: Tensor, b: Tensor, initial: Tensor, reverse: bool, tropical: bool
) -> tuple[Tensor, Tensor]:
    """The state before each token (for `reverse`: after it, from the end) and the last one."""
    a, b = seq.tile(a), seq.tile(b)  # [n, H, C, D]; a token beyond the end must leave the state alone
    _, inside, _, _ = seq._tiling()
    beyond = ~inside[:, None, :, None]
    a = a.masked_fill(beyond, 0.0 if tropical else 1.0)
    if tropical:
        b = b.masked_fill(beyond, -math.inf)
    if reverse:
        a, b = a.flip(2), b.flip(2)
    if not tropical:  # in float32, products of a tile's equal decays would all err alike, which adds up over the tiles
        a = a.to(torch.promote_types(a.dtype, torch.float64))
    for half in reversed(list(levels())):  # inclusive scans of growing blocks
        (_, a_up), (_, b_up) = halves(a, half), halves(b, half)
        a_low, b_low = halves(a, half)[0][..., -1:, :], halves(b, half)[0][..., -1:, :]
        if tropical:
            b_up.copy_(torch.maximum(a_up + b_low, b_up))
            a_up.add_(a_low)
        else:
            b_up.addcmul_(a_up.to(b.dtype), b_low)
            a_up.mul_(a_low)
    state, whole = initial.clone(), a[:, :, -1]
    a, states = a.to(b.dtype), torch.empty_like(b[:, :, 0])
    for tile, active in seq.steps(reverse):
        states[tile] = state[active]
        last_a, last_b = whole[tile], b[tile, :, -1]
        new = torch.maximum(last_a + state[active], last_b) if tropical else last_a * state[active] + last_b
        state[active] = new.to(b.dtype)
    entering = states[:, :, None]
    inner = torch.maximum(a + entering, b) if tropical else a * entering + b
    out = torch.cat([entering, inner[:, :, :-1]], 2)
    return seq.untile(out.flip(2) if reverse else out), state


class VectorScan(torch.autograd.Function):
    """h = a * h + b for each channel: h before each token [B, T, H, D] and the last h [N, H, D]."""

    @staticmethod
    def forward(ctx: Any, seq: Sequences, a: Tensor, b: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        out, last = tile_scan(seq, a, b, initial, False, False)
        ctx.seq = seq
        ctx.save_for_backward(a, out)
        return out, last

    @staticmethod
    @uncast
    def backward(ctx: Any, d_out: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        once()
        a, out = ctx.saved_tensors
        d_b, d_initial = tile_scan(ctx.seq, a.conj().resolve_conj(), d_out, d_last, True, False)
        return None, d_b * out.conj(), d_b, d_initial


Scan = Callable[[Sequences, Tensor, Tensor, Tensor, bool, bool], tuple[Tensor, Tensor]]


class MaxPlusScan(torch.autograd.Function):
    """h = max(a + h, b) for each channel; the gradient goes to the larger one, half to each where they are equal."""

    @staticmethod
    def forward(ctx: Any, seq: Sequences, a: Tensor, b: Tensor, initial: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        out, last = scan(seq, a, b, initial, False, True)
        kept = a + out
        ctx.seq, ctx.scan = seq, scan
        ctx.save_for_backward((kept > b).to(a.dtype) + 0.5 * (kept == b).to(a.dtype))
        return out, last

    @staticmethod
    @uncast
    def backward(ctx: Any, d_out: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        once()
        (share,) = ctx.saved_tensors
        d_h, d_initial = ctx.scan(ctx.seq, share, d_out, d_last, True, False)
        return None, d_h * share, d_h * (1 - share), d_initial, None


@uncast
def vector_scan(
    seq: Sequences, a: Tensor, b: Tensor, initial: Tensor | None, after: bool = False, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """h = a * h + b: h before each token, or after it, in `dtype`, and the last one; from zero if it is given none."""
    initial = a.new_zeros((seq.count, *a.shape[2:])) if initial is None else initial
    if seq.one_token:
        before, last = initial[:, None], a[:, 0] * initial + b[:, 0]
    else:
        before, last = VectorScan.apply(seq, a, b, initial)  # type: ignore[no-untyped-call]
    out = a * before + b if after else before
    return out if dtype is None else out.to(dtype), last


@uncast
def max_plus_scan(
    seq: Sequences, a: Tensor, b: Tensor, initial: Tensor, scan: Scan = tile_scan
) -> tuple[Tensor, Tensor]:
    """h = max(a + h, b): h before each token, and the last one; `scan` does the work."""
    if seq.one_token:
        return initial[:, None], torch.maximum(a[:, 0] + initial, b[:, 0])
    result: tuple[Tensor, Tensor] = MaxPlusScan.apply(seq, a, b, initial, scan)  # type: ignore[no-untyped-call]
    return result


def stopped(seq: Sequences, before: Tensor, last: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """A scan whose update passes no gradient: only the state before the first token depends on `initial`."""
    first = (seq.place == 0).view(seq.rows, seq.tokens, 1, 1)
    empty = (seq.offsets.diff() == 0)[:, None, None]
    return torch.where(first, seq.spread(initial), before.detach()), torch.where(empty, initial, last.detach())
