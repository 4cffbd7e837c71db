"""What an emitted package needs beside its own text: sequences in tiles, and what scans and attentions share.

Copied into each package as `_runtime.py`; it imports torch alone. Shapes: B batch rows, T tokens a row, N sequences
(N = B in a dense batch; a packed batch has B = 1), n tiles of C = 64 tokens, H heads (all batch axes together).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from chunkc.backends.torch.functions import take

TILE = 64
LOG_ZERO = -1e4  # the logarithm of a gate of 0: finite, so that sums of it stay finite, and exp of it is exactly 0
LOG_SMALL = -27.725887222397812  # log 2**-40: the least gate that the direct gate gradient divides by


def exact(a: int | float, b: int | float) -> int | float:
    """a / b; between integers the remainder must be 0 (ValueError)."""
    if isinstance(a, int) and isinstance(b, int):
        if b == 0 or a % b:
            raise ValueError(f"{a} is not divisible by {b}")
        return a // b
    return a / b


def axis_size(name: str, value: int | float) -> int:
    """A size that was computed from parameters: a whole number from 1 to 2**31 (ValueError)."""
    if value != int(value) or not 1 <= value <= 2**31:
        raise ValueError(f"axis '{name}' has size {value}; a size is a whole number from 1 to 2**31")
    return int(value)


class Weights(torch.nn.Module):
    """The parameters of one library call, or of a layer that was called, under their dotted names."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        inner: dict[str, dict[str, Tensor]] = {}
        for name, value in parameters.items():
            first, _, rest = name.partition(".")
            if rest:
                inner.setdefault(first, {})[rest] = value
            else:
                self.register_parameter(name, torch.nn.Parameter(value))
        for name, own in inner.items():
            self.add_module(name, Weights(**own))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class Sequences:
    """Where each sequence of a batch lies, and how its tokens fall into tiles.

    A dense batch is a packed one with equal lengths: `offsets` [N + 1] counts tokens of all rows laid end to end.

    Where values cannot be read (`blind`: torch.compile, torch.export, meta tensors), shapes bound what there may be:
    tiles beyond the last are empty, rows are as long as the longest sequence may be (`most`, else all tokens). With
    `spare` there may be fewer tokens than places for them: those behind the last are copies of it.
    """

    def __init__(self, rows: int, tokens: int, cu_seqlens: Tensor | None, like: Tensor, most: int | None = None,
                 spare: bool = False) -> None:  # fmt: skip
        self.rows, self.tokens, self.device, self.given = rows, tokens, like.device, like.dtype
        self.blind = torch.compiler.is_compiling() or like.is_meta
        self.most, self.spare = tokens if most is None else min(most, tokens), spare
        self.like = like.new_empty(0)
        device = like.device
        self.packed = cu_seqlens is not None
        self.count = rows if cu_seqlens is None else cu_seqlens.numel() - 1
        self.in_place = False  # whether one token's state is written over the one before
        self._cache: dict[str, Any] = {}
        if cu_seqlens is not None:
            self._cache["offsets"] = cu_seqlens.to(device=device, dtype=torch.int64)

    @property
    def offsets(self) -> Tensor:
        """Between which tokens the sequences lie [N + 1]; one token of each does not need to know."""
        made: Tensor = self._once("offsets", lambda: torch.arange(self.rows + 1, device=self.device) * self.tokens)
        return made

    @property
    def one_token(self) -> bool:
        return self.tokens == 1 and not self.packed

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    @property
    def token(self) -> Tensor:
        """The B*T tokens' numbers."""

        def make() -> Tensor:
            tokens = torch.arange(self.rows * self.tokens, device=self.device)
            return torch.minimum(tokens, self.offsets[-1:] - 1).clamp(min=0) if self.spare else tokens

        token: Tensor = self._once("token", make)
        return token

    @property
    def owner(self) -> Tensor:
        """For each of the B*T tokens the sequence it belongs to."""

        def make() -> Tensor:
            owner = torch.searchsorted(self.offsets[1:].contiguous(), self.token, right=True)
            return owner.clamp(max=max(self.count - 1, 0)) if self.spare else owner  # there may be no token at all

        owner: Tensor = self._once("owner", make)
        return owner

    @property
    def place(self) -> Tensor:
        """For each of the B*T tokens its position in its sequence."""
        place: Tensor = self._once("place", lambda: self.token - self.offsets[self.owner])
        return place

    def positions(self, start: Tensor | None) -> Tensor:
        """Positions [B, T]; `start` [N] are those of the first tokens of resumed sequences."""
        place = self.place if start is None else self.place + start[self.owner]
        return place.view(self.rows, self.tokens)

    def spread(self, x: Tensor) -> Tensor:
        """A value a sequence [N, ...] repeated over its tokens [B, T, ...]."""
        return x[self.owner].view(self.rows, self.tokens, *x.shape[1:])

    # -- tiles -------------------------------------------------------------------------------------------------------

    def _tiling(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token of each place of each tile [n, C], whether there is one, and the first tile and tile count [N].

        The last tile of a packed batch is empty if values cannot be read: `steps` needs one."""

        def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            start, stop, first, counts = self._tile_table()
            if self.packed and not self.blind:  # a dense batch's are known without its values
                used = int(counts.sum())
                start, stop = start[:used], stop[:used]
            elif self.packed and start.shape[0]:
                start, stop = F.pad(start, (0, 1)), F.pad(stop, (0, 1))
            token = start[:, None] + torch.arange(TILE, device=self.device)
            return token, token < stop[:, None], first, counts

        result: tuple[Tensor, Tensor, Tensor, Tensor] = self._once("tiling", make)
        return result

    def most_tiles(self, size: int) -> int:
        """How many tiles of so many tokens there may be, by shapes: those beyond the last are empty."""
        tokens, most = self.rows * self.tokens, -(-self.most // size) * self.count
        return min(most, tokens // size + min(self.count, tokens)) if self.packed else most

    def _tile_table(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each tile's first token and its sequence's end, each sequence's first tile and tile count."""
        counts = (self.offsets.diff() + TILE - 1) // TILE
        if not self.count:
            return counts, counts, counts, counts
        ends = counts.cumsum(0)
        tiles = torch.arange(self.most_tiles(TILE), device=self.device)
        owner = torch.searchsorted(ends, tiles, right=True)
        known = owner.clamp(max=self.count - 1)
        start = self.offsets[known] + (tiles - (ends - counts)[known]) * TILE
        stop = torch.where(owner < self.count, self.offsets[known + 1], start)
        return start, stop, ends - counts, counts

    def tile(self, x: Tensor) -> Tensor:
        """[B, T, H, D] in tiles [n, H, C, D], 0 where a tile goes beyond its sequence."""
        if not self.packed:
            each = -(-self.tokens // TILE)
            padded = F.pad(x, (0, 0, 0, 0, 0, each * TILE - self.tokens))
            return padded.reshape(self.rows * each, TILE, *x.shape[2:]).transpose(1, 2).contiguous()
        token, inside, _, _ = self._tiling()
        flat = x.reshape(self.rows * self.tokens, *x.shape[2:])
        picked = flat[token.clamp(max=max(flat.shape[0] - 1, 0))].masked_fill(~inside[:, :, None, None], 0)
        return picked.transpose(1, 2).contiguous()

    def untile(self, x: Tensor) -> Tensor:
        """[n, H, C, D] back to [B, T, H, D]."""
        if not self.packed:
            whole = x.transpose(1, 2).reshape(self.rows, -(-self.tokens // TILE) * TILE, x.shape[1], x.shape[3])
            return whole[:, : self.tokens]
        _, _, first, _ = self._tiling()
        tile = first[self.owner] + self.place // TILE
        out = x.transpose(1, 2)[tile.clamp(max=max(x.shape[0] - 1, 0)), self.place % TILE]
        return out.view(self.rows, self.tokens, *out.shape[1:])

    def steps(self, reverse: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Walk over all sequences at once, a tile each: (tiles, their sequences)."""
        if not self.packed:
            each, row = -(-self.tokens // TILE), torch.arange(self.rows, device=self.device)
            for step in range(each):
                yield row * each + (each - 1 - step if reverse else step), row
            return
        token, _, first, counts = self._tiling()
        if self.blind:  # every sequence walks as far as the longest may go: behind its end over the empty tile
            everyone = torch.arange(self.count, device=self.device)
            for step in range(-(-self.most // TILE)):
                tile = first + (counts - 1 - step if reverse else step)
                yield torch.where(counts > step, tile, token.shape[0] - 1), everyone
            return
        longest = int(counts.max()) if self.count else 0
        for step in range(longest):
            active = (counts > step).nonzero()[:, 0]
            tile = first[active] + (counts[active] - 1 - step if reverse else step)
            yield tile, active

    def carry(
        self, decay: Tensor | None, update: Tensor, initial: Tensor, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """S' = decay * S + update over the tiles of each sequence: S where each tile starts (for `reverse`: ends),
        and the last one. decay broadcasts to update [n, ...], None is 1; initial is [N, ...]."""
        states = torch.empty_like(update)
        state = initial.clone()
        for tile, active in self.steps(reverse):
            states[tile] = state[active]
            kept = state[active] if decay is None else decay[tile] * state[active]
            state[active] = kept + update[tile]
        return states, state

    # -- neighbours --------------------------------------------------------------------------------------------------

    def shift(self, x: Tensor, by: int, history: Tensor | None) -> Tensor:
        """x[t - by] within each sequence; `history` [N, R, ...] holds the R tokens before its first, else 0."""
        flat = x.reshape(self.rows * self.tokens, *x.shape[2:])
        index = torch.arange(flat.shape[0], device=self.device) - by
        at = self.place - by
        inside = (at >= 0) & (index < self.offsets[self.owner + 1])
        wide = (-1, *[1] * (flat.dim() - 1))
        out = torch.where(inside.view(wide), flat[index.clamp(0, max(flat.shape[0] - 1, 0))], flat.new_zeros(()))
        if history is not None and by > 0:
            row = (at + history.shape[1]).clamp(0, history.shape[1] - 1)
            before = history[self.owner, row].to(x.dtype)
            out = torch.where((at < 0).view(wide), before, out)
        return out.view_as(x)

    def last(self, x: Tensor, count: int, history: Tensor | None) -> Tensor:
        """The last `count` tokens of each sequence [N, count, ...], older ones from `history`, else 0."""
        flat = x.reshape(self.rows * self.tokens, *x.shape[2:])
        lengths = self.offsets.diff()
        at = lengths[:, None] - count + torch.arange(count, device=self.device)
        index = (self.offsets[:-1, None] + at).clamp(0, max(flat.shape[0] - 1, 0))
        wide = (self.count, count, *[1] * (flat.dim() - 1))
        if history is None:
            history = x.new_zeros((self.count, count, *x.shape[2:]))
        old = history.gather(1, (at + count).clamp(0, count - 1).view(wide).expand_as(history))
        if flat.shape[0] == 0:
            return old.to(x.dtype)
        return torch.where((at >= 0).view(wide), flat[index], old.to(x.dtype))

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None) -> Tensor:
        """Causal depthwise convolution: sum over m of weight[..., m] x[t - width + 1 + m]."""
        width = weight.shape[-1]
        out = weight[..., width - 1] * x
        for m in range(width - 1):
            out = out + weight[..., m] * self.shift(x, width - 1 - m, history)
        return out if bias is None else out + bias

    # -- a token at a time -------------------------------------------------------------------------------------------

    def padded(self, x: Tensor) -> Tensor:
        """[B, T, ...] as one row a sequence [N, longest, ...].

        Beyond a sequence's end stand copies of its last token, where there is one: what is computed of them is left
        out afterwards, and zeros may have gradients that are not finite."""
        if not self.packed:
            return x
        token, _ = self._rows()
        flat = x.reshape(self.rows * self.tokens, *x.shape[2:])
        last = (self.offsets[1:] - 1).clamp(min=0)
        return flat[torch.minimum(token, last[:, None])]

    def unpadded(self, x: Tensor) -> Tensor:
        """The tokens of `padded` back in their rows."""
        if not self.packed:
            return x
        return x[self.owner, self.place].view(self.rows, self.tokens, *x.shape[2:])

    def _rows(self) -> tuple[Tensor, Tensor]:
        def make() -> tuple[Tensor, Tensor]:
            token = self.offsets[:-1, None] + torch.arange(self.longest(), device=self.device)
            return token, token < self.offsets[1:, None]

        result: tuple[Tensor, Tensor] = self._once("rows", make)
        return result

    def longest(self) -> int:
        """The tokens of the longest sequence, or as many as it may have."""
        if self.blind or not self.packed:
            return self.most
        return int(self.offsets.diff().max()) if self.count else 0

    def alive(self, step: int) -> Tensor:
        """Which sequences have a token at this position [N]."""
        return self.offsets.diff() > step

    def reduce(self, x: Tensor, fn: str) -> Tensor:
        """A reducer over the whole of each sequence [N, ...]; of nothing it is 0."""
        if fn == "any":
            return self.reduce(x.to(torch.int8), "max").bool()
        flat, owner = x.reshape(self.rows * self.tokens, *x.shape[2:]), self.owner
        if self.spare:  # copies of the last token count for no sequence
            copies = torch.arange(flat.shape[0], device=self.device) >= self.offsets[-1]
            owner = owner.masked_fill(copies, self.count)
        zero = flat.new_zeros((self.count + self.spare, *flat.shape[1:]))
        if fn in ("sum", "mean"):
            total = zero.index_add(0, owner, flat)[: self.count]
            length = self.offsets.diff().clamp(min=1).view(-1, *[1] * (flat.dim() - 1))
            return total if fn == "sum" else total / length
        index = owner.view(-1, *[1] * (flat.dim() - 1)).expand_as(flat)
        fn = "amax" if fn == "max" else "amin"
        return zero.scatter_reduce(0, index, flat, fn, include_self=False)[: self.count]

    def normalize(self, x: Tensor, fn: str, dims: tuple[int, ...]) -> Tensor:
        """A normaliser along each sequence, and along `dims` of each token."""

        def over(y: Tensor, kind: str) -> Tensor:
            if dims and kind == "max":
                y = y.amax(dims, keepdim=True)
            elif dims:
                y = y.mean(dims, keepdim=True) if kind == "mean" else y.sum(dims, keepdim=True)
            return self.spread(self.reduce(y, kind))

        if fn == "softmax":
            most = over(x, "max").detach()
            e = torch.exp(x - most.masked_fill(most == -math.inf, 0.0))
            total = over(e, "sum")
            return e / total.masked_fill(total == 0, 1.0)
        if fn == "l2_norm":
            return x * torch.rsqrt(over(x.square(), "sum") + 1e-6)
        if fn == "layer_norm":
            x = x - over(x, "mean")
        return x * torch.rsqrt(over(x.square(), "mean") + 1e-5)

    def at(self, x: Tensor, index: Tensor, owner: Tensor, start: Tensor | None, shared: int, lead: int) -> Tensor:
        """x at the positions of `index`, whose rows belong to the sequences `owner`; 0 outside.

        Behind their leading dimensions x has `shared` ones of index's, and then its own; index has `lead` leading ones,
        the shared ones, and then its own. The result: index's leading, shared, index's own, x's own."""
        flat = x.reshape(self.rows * self.tokens, *x.shape[2:])
        rows = index.reshape(owner.shape[0], *index.shape[lead:])
        wide = (-1, *[1] * (rows.dim() - 1))
        place = rows if start is None else rows - start[owner].view(wide)
        inside = (place >= 0) & (place < self.offsets.diff()[owner].view(wide))
        token = torch.where(inside, place + self.offsets[owner].view(wide), -1)
        token, last = token.movedim(0, shared), flat.movedim(0, -1)
        out = take(last, token, shared).movedim(shared, 0)
        return out.reshape(*index.shape[:lead], *out.shape[1:])


# -- sums inside a tile, [..., C, D] -----------------------------------------------------------------------------------


def before(x: Tensor) -> Tensor:
    """Exclusive prefix sums along the tokens of a tile."""
    return F.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def after(x: Tensor) -> Tensor:
    """Exclusive suffix sums along the tokens of a tile."""
    return F.pad(x[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def upto(x: Tensor) -> Tensor:
    """Prefix sums along the tokens of a tile, each token's own value included."""
    return x.cumsum(-2)


def onward(x: Tensor) -> Tensor:
    """Suffix sums along the tokens of a tile, each token's own value included."""
    return x.flip(-2).cumsum(-2).flip(-2)


def levels() -> Iterator[int]:
    """Half sizes of the blocks in which pairs of tokens are anchored: each pair lies across one block's middle."""
    half = TILE // 2
    while half:
        yield half
        half //= 2


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Views of the earlier and later half of each block of 2 * half tokens: [..., C / (2 half), half, D]."""
    blocks = x.view(*x.shape[:-2], x.shape[-2] // (2 * half), 2, half, x.shape[-1])
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def log_gate(gate: Tensor, least: float = LOG_ZERO) -> Tensor:
    """The logarithm of a gate in [0, 1], at least `least`: of exact zeros it is `least`."""
    return torch.where(gate > 0, gate, 1.0).log().masked_fill(gate <= 0, least).clamp(min=least)


Function = TypeVar("Function", bound=Callable[..., Any])


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where autocast chooses no types; meta tensors have none. What is compiled may run, backward, where it is on."""
    if device.type == "meta" or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type)):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def uncast(function: Function) -> Function:
    """The function without autocast, which chooses no types for products inside: operands in the widest of theirs,
    float32 at least."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        wide = functools.reduce(torch.promote_types, (x.dtype for x in tensors if x.is_floating_point()), torch.float32)
        real = [x.to(wide) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        with no_autocast(tensors[0].device):
            return function(*real)

    return run  # type: ignore[return-value]


def tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd follows what is computed of any of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


State = TypeVar("State")


def overwrite(state: State, new: State) -> State:
    """A state with the values of the new one, in its own tensors."""
    with torch.no_grad():
        for own, value in zip(tree_leaves(state), tree_leaves(new)):
            own.copy_(value)
    return state


def as_given(function: Function) -> Function:
    """The function without autocast, operands as they are."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with no_autocast(next(x for x in args if isinstance(x, Tensor)).device):
            return function(*args)

    return run  # type: ignore[return-value]


def once() -> None:
    """Refuse a backward that is to be differentiated itself: a scan's gradient has no derivative."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "scans and attentions have no second derivative: their backward cannot run with create_graph=True"
        )


def lay(x: Tensor, shape: tuple[int, ...], heads: int) -> Tensor:
    """Repeat x to [B, T, *axes], then join the first `heads` axes to H and the others to D: [B, T, H, D]."""
    laid = (*shape[:2], math.prod(shape[2 : 2 + heads]), math.prod(shape[2 + heads :]))
    if x.shape == shape == laid:  # each view costs host time, forward and backward
        return x
    return (x if x.shape == shape else x.expand(shape)).reshape(laid)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32: what elementwise work and states are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def complex_type(real: torch.dtype) -> torch.dtype:
    """The complex type whose parts have this type."""
    return torch.complex128 if real == torch.float64 else torch.complex64


def interpreted() -> bool:
    """Whether Triton's interpreter is switched on."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def use_kernels(x: Tensor) -> bool:
    """Whether tensors like x take the Triton path: on a GPU, or in Triton's interpreter; float64 never does."""
    return (x.is_cuda or x.device.type == "cpu" and interpreted()) and x.dtype != torch.float64
