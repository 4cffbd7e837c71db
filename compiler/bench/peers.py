"""What an emitted op is compared with: PyTorch's attention, and functions of fla.

A peer has operands by letter (B is understood: 'THK' is [B, T, H, K]), a definition for float64, and how it is called.
Whether it is the same function as an op is not read off names: `compiler/bench/match.py` runs the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chunkc.bench.masks import Mask

Operands = Mapping[str, Tensor]


@dataclass(frozen=True)
class Extra:
    """What a peer is given beside operands."""

    scale: float
    mask: Mask | None = None


@dataclass(frozen=True)
class Peer:
    """A function of another library, in `module`."""

    name: str
    kind: str
    operands: Mapping[str, str]
    definition: Callable[[Operands, Extra], Tensor]
    make: Callable[[Extra], Callable[[Operands], Tensor]]
    module: str


# -- definitions -------------------------------------------------------------------------------------------------------


def recurrence(x: Operands, scale: float, before: bool = False) -> Tensor:
    """S = exp(g) S + k (v - k S) beta, o = scale q S, one token at a time; without beta, S = exp(g) S + k v.

    `before`: o reads S before the update, and the bonus u of the token's own k v."""
    q, k, v = x["q"], x["k"], x["v"]
    state = q.new_zeros((*q.shape[:1], q.shape[2], q.shape[3], v.shape[3]))
    out = []
    for t in range(q.shape[1]):
        key, value = k[:, t, :, :, None], v[:, t, :, None, :]
        if before:
            out.append(_read(q[:, t], state + x["u"][:, :, None] * key * value))
        if "g" in x:
            state = state * torch.exp(_gate(x["g"], t))
        if "beta" in x:
            value = x["beta"][:, t, :, None, None] * (value - (key * state).sum(2, keepdim=True))
        state = state + key * value
        if not before:
            out.append(_read(q[:, t], state))
    return torch.stack(out, 1) * scale


def _read(q: Tensor, state: Tensor) -> Tensor:
    return (q[..., None] * state).sum(2)


def _gate(g: Tensor, t: int) -> Tensor:
    """A gate [H], [B, T, H] or [B, T, H, K] at a token, over heads, keys and values."""
    if g.dim() == 1:
        return g[None, :, None, None]
    return g[:, t, :, :, None] if g.dim() == 4 else g[:, t, :, None, None]


def falling_decays(heads: int) -> Tensor:
    """The logarithms of the decays of the paper: 1 - 2^(-5 - head)."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float64)))


def attention(x: Operands, extra: Extra) -> Tensor:
    """Softmax of scale q k over the rows that the mask shows, times v; heads share the rows of their group."""
    q, (k, v) = x["q"], (_grouped(x[n], x["q"].shape[2]) for n in "kv")
    logit = torch.einsum("bthk,bshk->bhts", q, k) * extra.scale
    if extra.mask is not None:
        h, t, s = (torch.arange(n) for n in logit.shape[1:])
        seen = torch.as_tensor(extra.mask.seen(h[:, None, None], t[None, :, None], s[None, None, :]))
        logit = logit.masked_fill(~seen, -math.inf)
    return torch.einsum("bhts,bshv->bthv", torch.softmax(logit, -1), v)


def _grouped(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], 2)


# -- calls -------------------------------------------------------------------------------------------------------------


def _fla(function: str, *arguments: str, **more: Any) -> Callable[[Extra], Callable[[Operands], Tensor]]:
    """A function of fla that takes these operands in this order, [B, T, H, ...], and gives its output first."""

    def make(extra: Extra) -> Callable[[Operands], Tensor]:
        call = getattr(import_module(f"fla.ops.{function.removeprefix('chunk_')}"), function)
        return lambda x: call(*(x[a] for a in arguments), scale=extra.scale, **more)[0]

    return make


def _constant_gate(extra: Extra) -> Callable[[Operands], Tensor]:
    call = import_module("fla.ops.simple_gla").chunk_simple_gla
    return lambda x: call(x["q"], x["k"], x["v"], g_gamma=x["g"], scale=extra.scale)[0]


def _sdpa(backend: str) -> Callable[[Extra], Callable[[Operands], Tensor]]:
    """PyTorch's attention with one of its implementations, or the one that it picks; heads stand before tokens."""

    def make(extra: Extra) -> Callable[[Operands], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        causal = extra.mask is not None and extra.mask.rule() == "causal"

        def call(x: Operands) -> Tensor:
            q, k, v = (x[n].transpose(1, 2) for n in "qkv")
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=extra.scale, enable_gqa=grouped
            ).transpose(1, 2)

        def chosen(x: Operands) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return call(x)

        return chosen if backend else call

    return make


def _flex(extra: Extra) -> Callable[[Operands], Tensor]:
    """FlexAttention, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = extra.mask
    blocks: list[Any] = []
    assert mask is not None

    def call(x: Operands) -> Tensor:
        q, k, v = (x[n].transpose(1, 2) for n in "qkv")
        if not blocks:
            blocks.append(create_block_mask(
                lambda b, h, i, j: mask.seen(h, i, j), None, q.shape[1] if mask.heads else None, q.shape[2], k.shape[2],
                device=str(q.device),
            ))  # fmt: skip
        grouped = q.shape[1] != k.shape[1]
        out = compiled(q, k, v, block_mask=blocks[0], scale=extra.scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    return call


# -- the list ----------------------------------------------------------------------------------------------------------

QKV = {"q": "THK", "k": "THK", "v": "THV"}
ROWS = {"q": "THK", "k": "SGK", "v": "SGV"}


def _plain(x: Operands, extra: Extra) -> Tensor:
    return recurrence(x, extra.scale)


def _retention(x: Operands, extra: Extra) -> Tensor:
    return recurrence({**x, "g": falling_decays(x["q"].shape[2]).to(x["q"])}, extra.scale)


def _bonus(x: Operands, extra: Extra) -> Tensor:
    return recurrence(x, extra.scale, before=True)


def _of_fla(kind: str, function: str, more: Mapping[str, str], definition: Callable[[Operands, Extra], Tensor],
            make: Callable[[Extra], Callable[[Operands], Tensor]]) -> Peer:  # fmt: skip
    module = f"fla.ops.{function.removeprefix('chunk_')}"
    return Peer(f"fla.{function}", kind, {**QKV, **more}, definition, make, module)


PEERS = (
    _of_fla("scan", "chunk_linear_attn", {}, _plain, _fla("chunk_linear_attn", "q", "k", "v", normalize=False)),
    _of_fla("scan", "chunk_retention", {}, _retention, _fla("chunk_retention", "q", "k", "v")),
    _of_fla("scan", "chunk_simple_gla", {"g": "H"}, _plain, _constant_gate),
    _of_fla("scan", "chunk_simple_gla", {"g": "TH"}, _plain, _fla("chunk_simple_gla", "q", "k", "v", "g")),
    _of_fla("scan", "chunk_gla", {"g": "THK"}, _plain, _fla("chunk_gla", "q", "k", "v", "g")),
    _of_fla("scan", "chunk_rwkv6", {"g": "THK", "u": "HK"}, _bonus, _fla("chunk_rwkv6", "q", "k", "v", "g", "u")),
    _of_fla("recurrence", "chunk_delta_rule", {"beta": "TH"}, _plain, _fla("chunk_delta_rule", "q", "k", "v", "beta")),
    _of_fla("recurrence", "chunk_gated_delta_rule", {"g": "TH", "beta": "TH"}, _plain,
            _fla("chunk_gated_delta_rule", "q", "k", "v", "g", "beta")),
    _of_fla("recurrence", "chunk_kda", {"g": "THK", "beta": "TH"}, _plain,
            _fla("chunk_kda", "q", "k", "v", "g", "beta")),
    Peer("sdpa", "attention", ROWS, attention, _sdpa(""), "torch.nn.attention"),
    Peer("sdpa.flash", "attention", ROWS, attention, _sdpa("FLASH_ATTENTION"), "torch.nn.attention"),
    Peer("sdpa.cudnn", "attention", ROWS, attention, _sdpa("CUDNN_ATTENTION"), "torch.nn.attention"),
    Peer("flex", "attention", ROWS, attention, _flex, "torch.nn.attention.flex_attention"),
)  # fmt: skip
