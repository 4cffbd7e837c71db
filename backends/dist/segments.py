"""A rank's part of a batch as sequences of their own, and what each of them needs of those before it.

Copied into each package with a parallel layout as `_segments.py`. Shapes: B rows, T tokens of a row on this rank, N
documents (the batch's sequences), K pieces of a row over all ranks; H, I, J a state's dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from chunkc.backends.dist.ranks import Ranks, gathered
from chunkc.backends.torch.elementwise import vector_scan
from chunkc.backends.torch.runtime import Sequences


def pieces(rank: int, ranks: int, layout: str) -> list[int]:
    """The pieces of a row that a rank has: its own one, or for zigzag one from either end."""
    return [rank] if layout == "contiguous" else [rank, 2 * ranks - 1 - rank]


class Segments(Sequences):
    """A document's run of tokens in one piece is a segment: a sequence that starts at a later position.

    `document` and `start` are each segment's document and first position; `goes_on` says that its document began in an
    earlier piece. All ranks know the places of all tokens."""

    def __init__(self, ranks: Ranks, layout: str, rows: int, tokens: int, cu_seqlens: Tensor | None, like: Tensor,
                 start: Tensor | None) -> None:  # fmt: skip
        self.ranks, self.layout = ranks, layout
        self.own = pieces(ranks.rank, ranks.size, layout)
        if tokens == 0 or tokens % len(self.own):
            raise ValueError(f"a rank's share of a row has {len(self.own)} pieces of equal size, not {tokens} tokens")
        self.size, self.whole = tokens // len(self.own), tokens * ranks.size
        self.pieces = len(self.own) * ranks.size
        device = like.device
        if cu_seqlens is None:
            self.bounds = torch.arange(rows + 1, device=device) * self.whole
        else:
            self.bounds = cu_seqlens.to(device=device, dtype=torch.int64)
            if int(self.bounds[-1]) != self.whole:
                raise ValueError(f"cu_seqlens are those of the whole batch: they end at {int(self.bounds[-1])}, and "
                                 f"{ranks.size} ranks have {tokens} tokens each")  # fmt: skip
        self.documents, self.lengths = self.bounds.numel() - 1, self.bounds.diff()
        self.first = torch.zeros_like(self.lengths) if start is None else start
        at = place_of(ranks.rank, ranks.size, layout, rows, tokens, device)
        document = self.document_of(at)
        begins = torch.arange(at.numel(), device=device) % self.size == 0
        begins[1:] |= document[1:] != document[:-1]
        head = begins.nonzero()[:, 0]
        super().__init__(rows, tokens, F.pad(head, (0, 1), value=rows * tokens), like)
        self.document, self.row = document[head], head // tokens
        self.piece = at[head] % self.whole // self.size
        self.before = at[head] - self.bounds[self.document]  # tokens of its document in earlier pieces
        self.goes_on, self.start = self.before > 0, self.before + self.first[self.document]
        last = self.document_of(self.piece_ends())
        self.last_document, self.through = last, self.bounds[last] < self.piece_ends() - self.size + 1
        mine = last[torch.tensor(self.own, device=device)].T  # [B, pieces of this rank]
        self.late = (document.view(rows, len(self.own), self.size) == mine[..., None]).view(rows * len(self.own), self.size)

    def document_of(self, place: Tensor) -> Tensor:
        return torch.searchsorted(self.bounds[1:].contiguous(), place, right=True)

    def piece_ends(self) -> Tensor:
        """The place of the last token of each piece of each row [K, B]."""
        ends = torch.arange(1, self.pieces + 1, device=self.device) * self.size - 1
        return ends[:, None] + torch.arange(self.rows, device=self.device) * self.whole

    def by_piece(self, x: Tensor) -> Tensor:
        """[B, T, ...] as [B * pieces of this rank, tokens of a piece, ...]."""
        return x.reshape(self.rows * len(self.own), self.size, *x.shape[2:])

    def pooled(self, x: Tensor, what: str) -> Tensor:
        """What each rank has for each of its pieces [B * pieces of a rank, ...], in the order of pieces [K, B, ...]."""
        every = gathered(self.ranks, x, what)
        every = every.view(self.ranks.size, self.rows, len(self.own), *x.shape[1:]).transpose(1, 2).flatten(0, 1)
        order = [p for r in range(self.ranks.size) for p in pieces(r, self.ranks.size, self.layout)]
        return every[torch.tensor(order, device=self.device).argsort()]

    # -- states ------------------------------------------------------------------------------------------------------

    def decay(self, gate: Tensor, log: bool) -> tuple[Tensor, Tensor]:
        """The product of a gate [B, T, H, D] over all tokens behind each one to the end of its piece, 0 for those of
        documents that end before it; and over all tokens of the document there [pieces, H, D]."""
        late = self.late[:, :, None, None]
        if log:
            wide = self.by_piece(gate).to(torch.promote_types(gate.dtype, torch.float64)).masked_fill(~late, 0.0)
            behind = F.pad(wide[:, 1:], (0, 0, 0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
            rest, whole = behind.exp().to(gate.dtype), wide.sum(1).exp().to(gate.dtype)
        else:
            flipped = self.by_piece(gate).masked_fill(~late, 1.0).flip(1)
            ones, places = torch.ones_like(flipped[:, 0]), Sequences(flipped.shape[0], self.size, None, flipped)
            rest, whole = vector_scan(places, flipped, torch.zeros_like(flipped), ones)
            rest = rest.flip(1)
        return rest.masked_fill(~late, 0.0), whole

    def undecayed(self, x: Tensor) -> Tensor:
        """x [B, T, H, D] by pieces, 0 for tokens of documents that end before the piece does."""
        return self.by_piece(x).masked_fill(~self.late[:, :, None, None], 0.0)

    def sums(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """As `decay`, of a gate that is added: its sums, minus infinity for tokens that do not count."""
        late = self.late[:, :, None, None]
        wide = self.by_piece(gate).masked_fill(~late, 0.0)
        behind = F.pad(wide[:, 1:], (0, 0, 0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
        return behind.masked_fill(~late, -math.inf), wide.sum(1)

    def enter(self, what: str, initial: Tensor, across: tuple[Tensor, ...], update: Tensor, tropical: bool = False,
              stop: bool = False) -> Tensor:  # fmt: skip
        """The state that each segment starts from: its document's, `initial` [N, ...], taken through the pieces before.

        A piece makes of a state the product with all of `across`, plus `update` [pieces, ...] (`tropical`: the larger
        of the sum and `update`). One all-gather takes both to every rank. With `stop` only initial states have
        gradients."""
        parts = (*across, update)
        if stop:
            parts = tuple(p.detach() for p in parts)
        payload = torch.cat([p.flatten(1) for p in parts], 1)
        split = torch.split(self.pooled(payload, what), [math.prod(p.shape[1:]) for p in parts], -1)
        *decays, updates = (s.reshape(*s.shape[:2], *p.shape[1:]) for s, p in zip(split, parts))
        known = initial.detach() if stop else initial
        exits: list[Tensor] = []
        for piece in range(self.pieces - 1):
            state = known[self.last_document[piece]]
            if exits:
                through = self.through[piece].view(-1, *[1] * (state.dim() - 1))
                state = torch.where(through, exits[-1], state)
            for decay in decays:
                state = decay[piece] + state if tropical else decay[piece] * state
            exits.append(torch.maximum(state, updates[piece]) if tropical else state + updates[piece])
        earlier = self.documents + (self.piece - 1) * self.rows + self.row
        return torch.cat([initial, *exits])[torch.where(self.goes_on, earlier, self.document)]

    # -- tokens before -----------------------------------------------------------------------------------------------

    def halo(self, what: str, x: Tensor, count: int, history: Tensor | None) -> Tensor | None:
        """The `count` tokens before each segment [segments, count, ...], older ones from `history` [N, count, ...]."""
        if count < 0:
            raise ValueError(f"{what}: over a parallel layout a shift whose distance is a parameter looks back")
        if count == 0:
            return history
        tail = min(count, self.size)
        tails = self.pooled(self.by_piece(x)[:, -tail:], what).transpose(0, 1).flatten(0, 2)  # [B * K * tail, ...]
        back = torch.arange(-count, 0, device=self.device)
        place = (self.piece * self.size)[:, None] + back  # in its row
        inside = self.goes_on[:, None] & (self.before[:, None] + back >= 0)
        index = (self.row[:, None] * self.pieces + place // self.size) * tail + place % self.size - (self.size - tail)
        if history is None:
            history = x.new_zeros((1, count, *x.shape[2:])).expand(self.documents, *[-1] * (x.dim() - 1))
        old = (self.before[:, None] + back + count).clamp(max=count - 1)
        found = tails[torch.where(inside, index, 0)]
        kept = history.to(x.dtype)[self.document[:, None], old]
        return torch.where(inside.view(*inside.shape, *[1] * (found.dim() - 2)), found, kept)

    def halo_behind(self, what: str, x: Tensor, count: int) -> Tensor:
        """The `count` tokens behind each segment [segments, count, ...], 0 behind its document's end."""
        head = min(count, self.size)
        heads = self.pooled(self.by_piece(x)[:, :head], what).transpose(0, 1).flatten(0, 2)  # [B * K * head, ...]
        rest = self.lengths[self.document] - self.before - self.offsets.diff()  # tokens of its document behind it
        further = torch.arange(count, device=self.device)
        place = ((self.piece + 1) * self.size)[:, None] + further  # in its row
        inside = further < rest[:, None]
        index = (self.row[:, None] * self.pieces + place // self.size) * head + place % self.size
        found = heads[torch.where(inside, index, 0)]
        return found.masked_fill(~inside.view(*inside.shape, *[1] * (found.dim() - 2)), 0)

    def shift(self, x: Tensor, by: int, history: Tensor | None) -> Tensor:
        """x[t - by]; `history` are the tokens before each segment, for a shift that looks ahead those behind it."""
        out = super().shift(x, by, history)
        if by >= 0 or history is None:
            return out
        flat = out.flatten(0, 1)
        beyond = self.place - by - self.offsets.diff()[self.owner]
        there = (beyond >= 0).view(-1, *[1] * (flat.dim() - 1))
        return torch.where(there, history[self.owner, beyond.clamp(min=0)].to(x.dtype), flat).view_as(x)

    # -- what a call leaves ------------------------------------------------------------------------------------------

    def last_of(self, what: str, x: Tensor, initial: Tensor | None) -> Tensor:
        """Of a value a segment that of each document's last one [N, ...]; an empty document has its initial one."""
        end = (self.bounds[1:] - 1).clamp(min=0)
        row, place = end // self.whole, end % self.whole
        piece = place // self.size
        owner = piece if len(self.own) == 1 else torch.minimum(piece, self.pieces - 1 - piece)
        filled = self.lengths > 0
        slots = torch.stack([((owner == r) & filled).cumsum(0) - 1 for r in range(self.ranks.size)])
        slot = slots.gather(0, owner[None])[0]
        most = int((slots[:, -1] + 1).max()) if self.documents else 0
        if initial is None:
            initial = x.new_zeros((self.documents, *x.shape[1:]))
        if most == 0:
            return initial.to(x.dtype)
        mine = ((owner == self.ranks.rank) & filled).nonzero()[:, 0]
        second = (piece[mine] != self.own[0]).long()
        token = row[mine] * self.tokens + second * self.size + place[mine] % self.size
        found = x[self.owner[token]]
        found = torch.cat([found, found.new_zeros((most - mine.numel(), *x.shape[1:]))])
        pool = torch.cat([initial.to(x.dtype), gathered(self.ranks, found, what).flatten(0, 1)])
        index = torch.arange(self.documents, device=self.device)
        return pool[torch.where(filled, self.documents + owner * most + slot, index)]

    def rows_of(self, what: str, x: Tensor, cached: Tensor | None) -> Tensor:
        """The rows of an attention, of which those of this call [tokens of this rank, ...] stand last, as one row a
        document [N, rows, ...], behind those of calls before."""
        every = gathered(self.ranks, x[-self.rows * self.tokens :], what).flatten(0, 1)
        places = [place_of(r, self.ranks.size, self.layout, self.rows, self.tokens, self.device)
                  for r in range(self.ranks.size)]  # fmt: skip
        every = every[torch.cat(places).argsort()]
        longest = int(self.lengths.max()) if self.documents else 0
        if cached is None:
            token = self.bounds[:-1, None] + torch.arange(longest, device=self.device)
            return every[torch.minimum(token, (self.bounds[1:, None] - 1).clamp(min=0))]
        owner = self.document_of(torch.arange(every.shape[0], device=self.device))
        place = torch.arange(every.shape[0], device=self.device) - self.bounds[owner] + self.first[owner]
        old = cached.to(x.dtype)
        room = old.new_zeros((self.documents, longest, *old.shape[2:]))
        return torch.cat([old, room], 1).index_put((owner, place), every)


def place_of(rank: int, ranks: int, layout: str, rows: int, tokens: int, device: torch.device) -> Tensor:
    """Where a rank's tokens [B * T] stand in the whole batch, its rows laid end to end."""
    own = torch.tensor(pieces(rank, ranks, layout), device=device)
    size = tokens // own.numel()
    row = torch.arange(rows, device=device)[:, None, None] * (tokens * ranks)
    return (row + own[:, None] * size + torch.arange(size, device=device)).flatten()
