"""Attention a tile of queries and a tile of rows at a time: no tensor is over all queries and all rows.

Copied into each package that attends as `_attend.py`. Shapes: N sequences, C queries and S rows of a tile, *L the axes
of the weights (heads), *O the axes of the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chunkc.backends.torch.runtime import Sequences, no_autocast, once, uncast

QUERIES, ROWS = 256, 512  # of a tile
WIDEST = 256  # columns of a matrix that a kernel keeps
Number = Tensor | int
Bounds = tuple[Number, Number]  # the least and the most of a tile: tensors [N, 1], or numbers that are known


class Places:
    """Where the queries, or the rows, of each sequence stand: one row of a tensor a sequence [N, longest, ...].

    `at` are positions [N, longest]; `inside` says which are there, None if all. With `cached`, a tensor of the rows of
    calls before [N, P, ...], new ones stand behind the first `start` [N] of these (none without `start`)."""

    def __init__(self, seq: Sequences | None, start: Tensor | None = None, cached: Tensor | None = None,
                 count: int = 0, device: torch.device | None = None) -> None:  # fmt: skip
        if seq is not None and cached is not None and start is None:
            start = seq.offsets.new_zeros(seq.count)
        self.seq, self.start, self.cached = seq, start, cached
        self.known = seq is not None and not seq.packed and start is None  # positions are known without their values
        if seq is None:  # one query a sequence, of no position
            self.at, self.inside = torch.zeros((count, 1), dtype=torch.int64, device=device), None
        elif cached is None:
            self.at = seq.padded(seq.positions(start))
            self.inside = None if not seq.packed else seq._rows()[1]
        else:
            places = torch.arange(cached.shape[1] + seq.longest(), device=seq.device)
            self.at = places.expand(seq.count, -1)
            assert start is not None
            self.inside = places < (start + seq.offsets.diff())[:, None]

    def lay(self, x: Tensor, cached: Tensor | None = None) -> Tensor:
        """A value over the sequence, as one row a sequence; behind what is cached of it."""
        if self.seq is None:
            return x[:, None]
        if self.cached is None or cached is None:
            return self.seq.padded(x)
        assert self.start is not None
        flat = x.reshape(self.seq.rows * self.seq.tokens, *x.shape[2:])
        old = cached.to(x.dtype)
        room = old.new_zeros((old.shape[0], self.at.shape[1] - old.shape[1], *old.shape[2:]))
        owner = self.seq.owner
        return torch.cat([old, room], 1).index_put((owner, self.start[owner] + self.seq.place), flat)

    def unlay(self, x: Tensor) -> Tensor:
        """The tokens of one row a sequence back in their rows."""
        return x[:, 0] if self.seq is None else self.seq.unpadded(x)

    def table(self) -> tuple[Tensor, Tensor, int]:
        """For kernels: the first position of each sequence, and how many places it has [N]; how many most have."""
        if self.seq is None or not self.seq.packed and self.cached is None:
            lengths = self.at.new_full((self.at.shape[0],), self.at.shape[1])
        else:
            lengths = self.seq.offsets.diff()
            lengths = lengths if self.cached is None or self.start is None else self.start + lengths
        begins = self.at[:, 0].contiguous() if self.at.shape[1] else torch.zeros_like(lengths)
        return begins, lengths, self.at.shape[1]

    def tiles(self, size: int) -> list[slice]:
        return [slice(k, min(k + size, self.at.shape[1])) for k in range(0, self.at.shape[1], size)]


@dataclass(frozen=True)
class Source:
    """Rows that queries read. `sides` says what each operand is over: q queries, r rows, else neither.

    `scores(*sizes, at, at_rows, *operands)` gives a tile's logits [N, C, S, *L], values and mask; `gradients`, called
    likewise with the gradients of logits and values, those of the operands. `seen` takes least and most in the place of
    values, of places and of those operands that `compared` numbers: whether some query of a tile may see some row.
    `mask`, where it is more than comparisons, gives which do. `read` sums weights times values, as einsum writes it."""

    rows: Places | None  # None: one row, each query's own
    scores: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    gradients: Callable[..., tuple[Tensor | None, ...]]
    seen: Callable[..., Tensor | bool] | None
    mask: Callable[..., Tensor] | None
    compared: tuple[int, ...]
    sizes: tuple[Any, ...]
    operands: tuple[Tensor, ...]
    sides: str
    read: str


Operands = tuple[tuple[Tensor, ...], ...]  # of each source


@dataclass(frozen=True)
class Kernels:
    """What runs an attention on a GPU: `sizes(attention, operands)` gives its compile-time constants by name; `forward`
    and `backward`, given these too, what those of `Attention` give."""

    sizes: Callable[[Attention, Operands], dict[str, int | float]]
    forward: Callable[[Attention, Operands, dict[str, Any]], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., list[list[Tensor | None]]]

    def fit(self, size: dict[str, int | float]) -> bool:
        """Whether tiles of matrices so wide are kept in a program: else the walk in PyTorch is taken."""
        return all(n <= WIDEST for name, n in size.items() if name.startswith("BLOCK_"))


@dataclass
class Sums:
    """What queries have read so far: the largest logit and the sum of weights relative to it [N, queries, *L], and the
    sum of weights times values [N, queries, *O]."""

    most: Tensor
    total: Tensor
    read: Tensor


@dataclass(frozen=True)
class Result:
    """An attention's result with its gradient, as its backward reads them: `delta` is what weights share of it."""

    top: Tensor
    logs: Tensor
    d_out: Tensor
    delta: Tensor


class Attention:
    """The queries, their sources, and which of the result's axes the weights have."""

    def __init__(self, queries: Places, sources: tuple[Source, ...], shape: tuple[int, ...], weighted: str,
                 dtype: torch.dtype) -> None:  # fmt: skip
        self.queries, self.sources, self.shape, self.weighted, self.dtype = queries, sources, shape, weighted, dtype
        own = [p.seq for p in (queries, *(s.rows for s in sources if s.rows is not None)) if p.seq is not None]
        self.given = own[0].given if own else dtype  # the type of the inputs
        self.bounds: dict[int, tuple[Bounds, dict[int, Bounds]]] = {}
        self.heads = tuple(n for n, w in zip(shape, weighted) if w == "w")

    def lifted(self, x: Tensor) -> Tensor:
        """Weights [N, C, *L] over the axes of the result."""
        for k, w in enumerate(self.weighted):
            if w != "w":
                x = x.unsqueeze(2 + k)
        return x

    def lowered(self, x: Tensor) -> Tensor:
        """A product over the result's axes summed to those of the weights."""
        gone = [2 + k for k, w in enumerate(self.weighted) if w != "w"]
        return x.sum(gone) if gone else x

    def tiles(self, source: Source, part: slice, operands: tuple[Tensor, ...]) -> Iterator[slice]:
        """The tiles of rows that some query of a tile may see."""
        if source.rows is None:
            yield slice(0, 1)
            return
        tiles = source.rows.tiles(ROWS)
        known = self.queries.known and source.rows.known
        blind = self.blind()
        if source.seen is None or not tiles or not known and blind:
            yield from tiles
            return
        if known and (blind or not source.compared):
            at = part.start, part.stop - 1
            for tile in tiles:
                wide = [(-math.inf, math.inf)] * len(source.compared)
                if source.seen(*source.sizes, at, (tile.start, tile.stop - 1), *wide):
                    yield tile
            return
        if id(source) not in self.bounds:  # of what is not over queries: the same for each of their tiles
            compared = {k: _bounds(operands[k], tiles if source.sides[k] == "r" else None)
                        for k in source.compared if source.sides[k] != "q"}  # fmt: skip
            self.bounds[id(source)] = _bounds(source.rows.at, tiles), compared
        below, fixed = self.bounds[id(source)]
        given = [fixed[k] if k in fixed else _bounds(operands[k], [part]) for k in source.compared]
        some = source.seen(*source.sizes, _bounds(self.queries.at, [part]), below, *given)
        seen = torch.as_tensor(some).expand(self.queries.at.shape[0], len(tiles)).any(0)
        yield from (tile for tile, found in zip(tiles, seen.tolist()) if found)

    def some(self, source: Source, given: list[Tensor]) -> bool:
        """Whether a pair of a tile is seen, or that cannot be known."""
        if source.mask is None or self.blind():
            return True
        return bool(source.mask(*source.sizes, *given).any())

    def blind(self) -> bool:
        """Whether values must not be read."""
        at = self.queries.at
        return torch.compiler.is_compiling() or at.is_meta or at.is_cuda and torch.cuda.is_current_stream_capturing()

    def tile(self, source: Source, part: slice, tile: slice, operands: tuple[Tensor, ...]) -> list[Tensor]:
        """The operands of one tile, places first."""
        cut = {"q": part, "r": tile}
        rows = self.queries.at[:, part] if source.rows is None else source.rows.at[:, tile]
        return [self.queries.at[:, part], rows,
                *(x[:, cut[side]] if side in cut else x for x, side in zip(operands, source.sides))]  # fmt: skip

    def scores(self, source: Source, tile: slice, given: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Logits [N, C, S, *L], minus infinity where a row is not seen, and values."""
        logit, value, mask = source.scores(*source.sizes, *given)
        logit, value = logit.to(self.dtype), None if value is None else value.to(self.dtype)
        if source.rows is not None and source.rows.inside is not None:
            inside = source.rows.inside[:, None, tile].view(-1, 1, tile.stop - tile.start, *[1] * len(self.heads))
            mask = inside if mask is None else mask & inside
        return logit if mask is None else logit.masked_fill(~mask, -math.inf), value

    def start(self) -> Sums:
        """Sums of no rows."""
        like = torch.empty((), dtype=self.dtype, device=self.queries.at.device)
        most = like.new_full((*self.queries.at.shape, *self.heads), -math.inf)
        return Sums(most, torch.zeros_like(most), like.new_zeros((*self.queries.at.shape, *self.shape)))

    def add(self, sums: Sums, source: Source, operands: tuple[Tensor, ...]) -> None:
        """Read the rows of a source."""
        for part in self.queries.tiles(QUERIES):
            most, total, read = sums.most[:, part], sums.total[:, part], sums.read[:, part]
            for tile in self.tiles(source, part, operands):
                given = self.tile(source, part, tile, operands)
                if not self.some(source, given):
                    continue
                logit, value = self.scores(source, tile, given)
                new = torch.maximum(most, logit.amax(2))
                safe = new.masked_fill(new == -math.inf, 0.0)
                weight = torch.exp(logit - safe[:, :, None]).expand(*most.shape[:2], -1, *self.heads)
                kept = torch.exp(most - safe)
                total = total * kept + weight.sum(2)
                read = read * self.lifted(kept)
                if value is not None:
                    read = read + torch.einsum(source.read, weight, value)
                most = new
            sums.most[:, part], sums.total[:, part], sums.read[:, part] = most, total, read

    def finish(self, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
        """The result [N, queries, *O]; the largest logit [N, queries, *L], and the logarithm of the sum of weights
        relative to it: infinite where no row is seen. Together in one number they would lose the digits of weights."""
        empty = sums.total == 0
        out = sums.read / self.lifted(sums.total.masked_fill(empty, 1.0))
        return out, sums.most.masked_fill(empty, 0.0), sums.total.log().masked_fill(empty, math.inf)

    def forward(self, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
        """What `finish` gives, of all sources."""
        sums = self.start()
        for source, ops in zip(self.sources, operands):
            self.add(sums, source, ops)
        return self.finish(sums)

    def backward(self, operands: Operands, result: Result) -> list[list[Tensor | None]]:
        """The gradients of all operands, added up over tiles."""
        found = [no_gradients(ops) for ops in operands]
        for source, ops, grads in zip(self.sources, operands, found):
            self.add_gradients(source, ops, grads, result)
        return found

    def add_gradients(self, source: Source, operands: tuple[Tensor, ...], grads: list[Tensor | None],
                      result: Result) -> None:  # fmt: skip
        """Add to the gradients of a source's operands what its rows give."""
        to_weights, to_value = _sides(source.read)
        for part in self.queries.tiles(QUERIES):
            top, logs, d_out = result.top[:, part, None], result.logs[:, part, None], result.d_out[:, part]
            for tile in self.tiles(source, part, operands):
                given = self.tile(source, part, tile, operands)
                if not self.some(source, given):
                    continue
                logit, value = self.scores(source, tile, given)
                weight = torch.exp(logit - top - logs)
                d_value, d_weight = None, -result.delta[:, part, None]
                if value is not None:
                    d_value = torch.einsum(to_value, weight, d_out)
                    d_weight = d_weight + torch.einsum(to_weights, d_out, value)
                # A row alone has weight 1, whatever its logit: what rounding leaves of its gradient is 0.
                alone = (weight == 1) & (logs == 0)
                d_logit = (weight * d_weight).masked_fill(alone, 0.0)
                new = source.gradients(*source.sizes, *given, d_logit, d_value)
                for k, (d, side) in enumerate(zip(new, source.sides)):
                    grad = grads[k]
                    if d is not None and grad is not None:
                        (grad[:, part if side == "q" else tile] if side in ("q", "r") else grad).add_(d)


def no_gradients(operands: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients of zeros, for operands that have any."""
    return [torch.zeros_like(x) if x.is_floating_point() else None for x in operands]


def _sides(read: str) -> tuple[str, str]:
    """From `weights, values -> result` the sums that give the gradients of weights and of values."""
    terms, result = read.replace(" ", "").split("->")
    weights, values = terms.split(",")
    return f"{result},{values}->{weights}", f"{weights},{result}->{values}"


def larger(a: Number, b: Number) -> Number:
    """The larger one."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    return max(a, b)


def _bounds(x: Tensor, tiles: list[slice] | None) -> Bounds:
    """The least and the most of each tile [N, tiles], of a value of neither side [1, 1]."""
    if x.dtype == torch.bool:
        x = x.to(torch.int8)
    if tiles is None:
        return x.amin().view(1, 1), x.amax().view(1, 1)
    rows = [x[:, tile].reshape(x.shape[0], -1) for tile in tiles]
    return torch.stack([r.amin(1) for r in rows], 1), torch.stack([r.amax(1) for r in rows], 1)


class Attend(torch.autograd.Function):
    """An attention; its backward computes each tile again from the operands and the logarithms of the sums."""

    @staticmethod
    def forward(ctx: Any, attention: Attention, kernels: Kernels | None, *flat: Tensor) -> Tensor:
        operands = _grouped(attention, flat)
        size = {} if kernels is None else kernels.sizes(attention, operands)
        kernels = kernels if kernels is not None and kernels.fit(size) else None
        out, top, logs = attention.forward(operands) if kernels is None else kernels.forward(attention, operands, size)
        ctx.attention, ctx.kernels, ctx.size = attention, kernels, size
        ctx.save_for_backward(out, top, logs, *flat)
        return out

    @staticmethod
    @uncast
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        once()
        out, top, logs, *flat = ctx.saved_tensors
        operands = _grouped(ctx.attention, tuple(flat))
        if ctx.kernels is None:
            found = ctx.attention.backward(operands, Result(top, logs, d_out, ctx.attention.lowered(d_out * out)))
        else:
            found = ctx.kernels.backward(ctx.attention, operands, ctx.size, out, top, logs, d_out)
        return None, None, *(d for grads in found for d in grads)


def _grouped(attention: Attention, flat: tuple[Tensor, ...]) -> Operands:
    given = iter(flat)
    return tuple(tuple(next(given) for _ in source.operands) for source in attention.sources)


def wide(x: Tensor, dims: int) -> Tensor:
    """x with so many dimensions, new ones in front."""
    return x[(None,) * (dims - x.dim())]


def attend(queries: Places, sources: tuple[Source, ...], shape: tuple[int, ...], weighted: str, dtype: torch.dtype,
           kernels: Kernels | None = None) -> Tensor:  # fmt: skip
    """The softmax over the rows of all sources, times their values: [B, T, *O], for one query a sequence [N, *O].

    `shape` is O's; `weighted` has a w for each of its axes that weights have, else a dot. `kernels` run it, if any."""
    attention = Attention(queries, sources, shape, weighted, dtype)
    flat: list[Tensor] = []
    for x in (x for source in sources for x in source.operands):
        x = x.to(dtype) if x.is_floating_point() else x
        flat.append(x.view_as(x) if any(x is y for y in flat) else x)  # torch.compile wants each once
    with no_autocast(queries.at.device):
        out: Tensor = Attend.apply(attention, kernels, *flat)  # type: ignore[no-untyped-call]
    return queries.unlay(out)
