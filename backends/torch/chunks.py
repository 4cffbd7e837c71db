"""The chunks of sequences at run time: where they lie, and values chunk by chunk.

Copied into each package as `_chunks.py`. Shapes: N sequences, M chunks in all; a value over chunks is [rows, chunks,
...]: a row a sequence in a dense batch that starts at position 0 (all have as many chunks), else one row with all. How
many there are is read from the device where it does not follow from shapes; where it cannot be read, there are as many
as shapes allow: those behind the last are empty, and values over chunks have copies of the last one's there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from chunkc.backends.torch.runtime import Sequences


class Edges(NamedTuple):
    """Of each sequence [N] whether its first chunk began before the first token (`continues`), whether its last one may
    go on behind the last token (`open`), the number of the first chunk (`start`), the position of the first token."""

    continues: Tensor
    open: Tensor
    start: Tensor
    position: Tensor


class Chunks:
    """The chunks of each sequence.

    `inner` are the same tokens with a chunk for a sequence, `own` the sequences whose tokens are chunks; `anew`:
    whether every sequence is known to begin with its first token. `inner` and `edges` are computed where they are
    wanted. `spans` are chunks for scans, which take a row for each where all are equally long."""

    def __init__(self, seq: Sequences, inner: Callable[[], Sequences], own: Sequences, anew: bool,
                 make: Callable[[], Edges], n: int = 0, spans: Sequences | None = None) -> None:  # fmt: skip
        self.seq, self.own, self.anew, self.n = seq, own, anew, n
        self._cut, self._make, self._spans = inner, make, spans
        self._inner: Sequences | None = None
        self._edges: Edges | None = None

    @property
    def inner(self) -> Sequences:
        if self._inner is None:
            self._inner = self._cut()
        return self._inner

    @property
    def spans(self) -> Sequences:
        return self.inner if self._spans is None else self._spans

    def laid(self, x: Tensor) -> Tensor:
        """A value of tokens [B, T, ...] as scans over `spans` take it."""
        return x if self._spans is None else x.reshape(self._spans.rows, self._spans.tokens, *x.shape[2:])

    @property
    def edges(self) -> Edges:
        if self._edges is None:
            self._edges = self._make()
        return self._edges

    @staticmethod
    def fixed(seq: Sequences, n: int, start: Tensor | None) -> Chunks:
        """Spans of n positions, counted from the sequence's start; `start` [N] is the first token's position."""
        if start is None and not seq.packed:
            count = -(-seq.tokens // n)
            own, spans = Sequences(seq.rows, count, None, seq.like), None
            if not torch.compiler.is_compiling() and seq.tokens % n == 0 and seq.tokens > 0:
                spans = Sequences(seq.rows * count, n, None, seq.like)

            def inner() -> Sequences:
                begins = (torch.arange(count, device=seq.device) * n)[None] + seq.offsets[:-1, None]
                return _cut(seq, begins.reshape(-1), own, n)

            return Chunks(seq, inner, own, True, lambda: _spans(seq, start, n)[0], n, spans)
        edges, lengths, rest = _spans(seq, start, n)
        counts = torch.where(lengths > 0, (rest + lengths + n - 1) // n, 0)
        more = int(start is not None)  # a chunk that goes on is one more
        own = _ragged(seq, counts, -(-seq.most // n) + more, seq.rows * seq.tokens // n + (1 + more) * seq.count)
        owner = own.owner
        begins = seq.offsets[owner] + (own.place * n - rest[owner]).clamp(min=0)
        return Chunks(seq, lambda: _cut(seq, begins, own, n), own, start is None, lambda: edges, n)

    @staticmethod
    def parts(seq: Sequences, n: int) -> Chunks:
        """n spans, equal up to rounding: some are empty where there are fewer tokens."""
        lengths = seq.offsets.diff()
        begins = seq.offsets[:-1, None] + torch.arange(n, device=seq.device) * lengths[:, None] // n
        own = Sequences(seq.rows, n, None, seq.like)
        if seq.packed:
            each = torch.arange(seq.count + 1, device=seq.device) * n
            own = Sequences(1, seq.count * n, each, seq.like, most=n)

        def edges() -> Edges:
            never, zero = torch.zeros_like(lengths, dtype=torch.bool), torch.zeros_like(lengths)
            return Edges(never, never, zero, zero)

        return Chunks(seq, lambda: _cut(seq, begins.reshape(-1), own, -(-seq.most // n)), own, True, edges)

    @staticmethod
    def runs(seq: Sequences, begins: Tensor, start: Tensor | None) -> Chunks:
        """A chunk begins where `begins` [B, T] holds, and with each sequence; the last one may go on."""
        lengths = seq.offsets.diff()
        flat = begins.reshape(-1)
        first = (flat | (seq.place == 0)).long()
        counts = torch.zeros_like(lengths).index_add(0, seq.owner, first)
        own = _ragged(seq, counts, seq.most, flat.shape[0])

        def edges() -> Edges:
            position = torch.zeros_like(lengths) if start is None else start
            goes_on = ~F.pad(flat, (0, 1))[seq.offsets[:-1]]  # a sequence without tokens may stand behind the last one
            return Edges((lengths > 0) & (position > 0) & goes_on, lengths > 0, torch.zeros_like(lengths), position)

        inner = _cut(seq, torch.searchsorted(first.cumsum(0), own.token + 1), own, seq.most)
        return Chunks(seq, lambda: inner, own, start is None, edges)

    # -- where they lie ----------------------------------------------------------------------------------------------

    def _first(self) -> Tensor:
        """Each sequence's first chunk among all [N]."""
        return self.own.offsets[:-1]

    def _own_shape(self, flat: Tensor) -> Tensor:
        if self.own.spare and flat.shape[0]:
            flat = flat[self.own.token]
        return flat.view(self.own.rows, self.own.tokens, *flat.shape[1:])

    def of(self) -> Tensor:
        """The chunk of each token, counted in its sequence [B, T]."""
        local = self.inner.owner - self._first()[self.seq.owner]
        return (local + self.edges.start[self.seq.owner]).view(self.seq.rows, self.seq.tokens)

    def index(self) -> Tensor:
        """Each chunk's place in its sequence."""
        return self.own.positions(self.edges.start)

    def first(self) -> Tensor:
        """Each chunk's first position."""
        owner = self.own.owner
        local = self.inner.offsets[:-1] - self.seq.offsets[owner] + self.edges.position[owner]
        if self.n:
            local = torch.minimum(local, (self.own.place + self.edges.start[owner]) * self.n)
        return self._own_shape(local)

    def last(self) -> Tensor:
        """Each chunk's last position so far."""
        owner = self.own.owner
        return self._own_shape(self.inner.offsets[1:] - 1 - self.seq.offsets[owner] + self.edges.position[owner])

    def length(self) -> Tensor:
        """How many positions each chunk has so far."""
        return self.last() - self.first() + 1

    def flat(self, x: Tensor) -> Tensor:
        """A value over chunks [rows, chunks, ...], all chunks in one dimension."""
        return x.reshape(self.own.rows * self.own.tokens, *x.shape[2:])

    # -- from chunks to sequences ------------------------------------------------------------------------------------

    def enter(self, state: Tensor, fresh: Tensor) -> Tensor:
        """What each chunk starts from [M, ...]: the state given where it goes on, else the initial value."""
        if self.anew and not self.own.packed:
            return fresh.repeat_interleave(self.own.tokens, 0)
        owner = self.own.owner
        goes_on = (self.own.place == 0) & self.edges.continues[owner]
        return torch.where(_wide(goes_on, state), state[owner], fresh[owner])

    def leave(self, last: Tensor, state: Tensor) -> Tensor:
        """The state of each sequence's last chunk [N, ...], the given one of a sequence without tokens."""
        if last.shape[0] == 0:
            return state
        if not self.own.packed:
            return last.reshape(self.own.rows, self.own.tokens, *last.shape[1:])[:, -1]
        some = self.own.offsets.diff() > 0
        return torch.where(_wide(some, state), last[(self.own.offsets[1:] - 1).clamp(min=0)], state)

    def complete(self) -> Tensor:
        """How many chunks of each sequence are complete [N]."""
        counts = self.own.offsets.diff()
        return counts - (self.edges.open & (counts > 0)).long()

    # -- reductions --------------------------------------------------------------------------------------------------

    def reduce(self, x: Tensor, fn: str, so_far: Tensor | None) -> tuple[Tensor, Tensor]:
        """A reducer chunk by chunk [rows, chunks, ...], and what each sequence's last chunk holds so far [N, ...];
        `so_far` is that of the call before. A mean is kept as a sum."""
        out = self.inner.reduce(x, "sum" if fn == "mean" else fn)
        if so_far is None:
            so_far = out.new_zeros((self.seq.count, *out.shape[1:]))
        if not self.anew:
            owner = self.own.owner
            goes_on = _wide((self.own.place == 0) & self.edges.continues[owner], out)
            out = torch.where(goes_on, _joined(out, so_far[owner].to(out.dtype), fn), out)
        kept = self.leave(out, so_far.to(out.dtype))
        if fn == "mean":
            length = self.length().reshape(-1).clamp(min=1)
            out = out / length.view(-1, *[1] * (out.dim() - 1))
        return self._own_shape(out), kept

    def resumed(self, step: int, x: Tensor, so_far: Tensor, fn: str) -> Tensor:
        """A reduction over one chunk of each sequence [N, ...], with what that chunk held before this call."""
        if step or self.anew:
            return x
        return torch.where(_wide(self.edges.continues, x), _joined(x, so_far.to(x.dtype), fn), x)

    def kept(self, step: int, x: Tensor, before: Tensor) -> Tensor:
        """What each sequence's last chunk holds so far, once the loop has passed it."""
        last = self.own.offsets.diff() - 1 == step
        return torch.where(_wide(last, x), x, before.to(x.dtype))

    def averaged(self, step: int, x: Tensor) -> Tensor:
        """The mean of a chunk's positions from their sum [N, ...]."""
        length = self.own.padded(self.length())[:, step].clamp(min=1)
        return x / _wide(length, x)

    def keep_last(self, x: Tensor, count: int, history: Tensor | None) -> Tensor:
        """The last `count` complete chunks of each sequence [N, count, ...], older ones from `history`, else 0."""
        flat = self.flat(x)
        if history is None:
            history = flat.new_zeros((self.seq.count, count, *flat.shape[1:]))
        at = self.complete()[:, None] - count + torch.arange(count, device=x.device)
        old = history.gather(1, _wide((at + count).clamp(0, count - 1), history).expand_as(history)).to(x.dtype)
        if flat.shape[0] == 0:
            return old
        row = (self._first()[:, None] + at).clamp(0, flat.shape[0] - 1)
        return torch.where(_wide(at >= 0, old), flat[row], old)

    # -- a chunk at a time -------------------------------------------------------------------------------------------

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, ...] as chunks [N, chunks, width, ...], 0 beyond their end."""
        return self.own.padded(self._own_shape(self.inner.padded(x)))

    def unrows(self, x: Tensor) -> Tensor:
        """The positions of `rows` back in their places."""
        return self.inner.unpadded(self.flat(self.own.unpadded(x)))

    def valid(self) -> Tensor:
        """Which positions of `rows` are there [N, chunks, width]."""
        width = self.inner.longest()
        there = torch.arange(width, device=self.seq.device) < self.inner.offsets.diff()[:, None]
        return self.own.padded(self._own_shape(there))

    def updates(self, step: int) -> Tensor:
        """Whether a step is a complete chunk of the sequence [N]: an unfinished one updates nothing."""
        return self.complete() > step


def _spans(seq: Sequences, start: Tensor | None, n: int) -> tuple[Edges, Tensor, Tensor]:
    """Of spans of n positions the edges; the sequences' lengths, and how much of their first spans lies before them."""
    lengths = seq.offsets.diff()
    position = torch.zeros_like(lengths) if start is None else start
    rest = position % n
    edges = Edges((lengths > 0) & (rest > 0), (rest + lengths) % n > 0, position // n, position)
    return edges, lengths, rest


def _ragged(seq: Sequences, counts: Tensor, each: int, together: int) -> Sequences:
    """Sequences of as many chunks each, in one row: no more than `each`, and no more than `together` in all."""
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tokens = min(each * seq.count, together) if seq.blind else int(offsets[-1])
    return Sequences(1, tokens, offsets, seq.like, most=each, spare=seq.blind)


def _cut(seq: Sequences, begins: Tensor, own: Sequences, longest: int) -> Sequences:
    """The tokens of the sequences with a chunk for a sequence; a single token a row stays a dense batch.

    No chunk has more than `longest` tokens."""
    if seq.one_token and begins.shape[0] == seq.rows:
        return seq
    total = seq.rows * seq.tokens
    if own.spare:
        begins = begins.masked_fill(torch.arange(begins.shape[0], device=seq.device) >= own.offsets[-1], total)
    return Sequences(seq.rows, seq.tokens, torch.cat([begins, begins.new_full((1,), total)]), seq.like, most=longest)


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    """A mask with as many dimensions as a value, from the left."""
    return mask.view(*mask.shape, *[1] * (like.dim() - mask.dim()))


def _joined(a: Tensor, b: Tensor, fn: str) -> Tensor:
    """Two parts of a reduction as one."""
    if fn in ("sum", "mean"):
        return a + b
    if fn == "any":
        return a | b
    return torch.maximum(a, b) if fn == "max" else torch.minimum(a, b)
