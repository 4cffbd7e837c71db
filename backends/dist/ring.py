"""Attention over a sharded sequence: queries stay, rows go round the ring of ranks and are read as they pass.

Copied into each package with a parallel layout that attends as `_ring.py`. Shapes: N documents, D of them have queries
on this rank; a rank's rows travel as [tokens, ...], and are laid out [D, longest, ...] where they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chunkc.backends.dist.ranks import Passing, Ranks
from chunkc.backends.dist.segments import Segments, place_of
from chunkc.backends.torch.attend import Attention, Places, Result, Source, Sums, no_gradients
from chunkc.backends.torch.runtime import Sequences, no_autocast, once, uncast


class Table(Places):
    """A rank's tokens of some documents, one row each: `token` [D, longest] says which stand where. All documents have
    some there; behind a row's end stand copies of its last one."""

    def __init__(self, seq: Segments, rank: int, documents: Tensor) -> None:
        self.seq, self.start, self.cached, self.known = seq, None, None, False
        place = place_of(rank, seq.ranks.size, seq.layout, seq.rows, seq.tokens, seq.device)
        of = seq.document_of(place)
        row = torch.full((seq.documents,), -1, device=seq.device)
        row[documents] = torch.arange(documents.numel(), device=seq.device)
        order = row[of].argsort(stable=True)[int((row[of] < 0).sum()) :]
        counts = torch.bincount(row[of[order]], minlength=documents.numel())
        longest = int(counts.max()) if documents.numel() else 0
        along, first = torch.arange(longest, device=seq.device), counts.cumsum(0) - counts
        self.token: Tensor = order[first[:, None] + torch.minimum(along, counts[:, None] - 1)]
        self.there = along < counts[:, None]
        self.inside = self.there
        self.at = place[self.token] - seq.bounds[documents, None] + seq.first[documents, None]

    def cut(self, chosen: Tensor | None) -> Table:
        """Some of the documents; None are all."""
        if chosen is None:
            return self
        out = object.__new__(Table)
        out.__dict__.update(self.__dict__)
        out.at, out.token, out.there = self.at[chosen], self.token[chosen], self.there[chosen]
        out.inside = out.there
        return out


class Queries(Table):
    """The queries of this rank."""

    def __init__(self, seq: Segments) -> None:
        self.documents = torch.unique(seq.document)
        super().__init__(seq, seq.ranks.rank, self.documents)
        self.slot = torch.empty(seq.rows * seq.tokens, dtype=torch.int64, device=seq.device)
        self.slot[self.token[self.there]] = self.there.flatten().nonzero()[:, 0]

    def lay(self, x: Tensor, cached: Tensor | None = None) -> Tensor:
        return x.flatten(0, 1)[self.token]

    def unlay(self, x: Tensor) -> Tensor:
        assert self.seq is not None
        return x.flatten(0, 1)[self.slot].view(self.seq.rows, self.seq.tokens, *x.shape[2:])


def queries_of(seq: Segments) -> Queries:
    """The same for all attentions of a call."""
    found: Queries = seq._once("queries", lambda: Queries(seq))
    return found


class Travelling(Places):
    """The rows of the sharded sequence. They travel as tokens; in front of them stand those of calls before, which all
    ranks have: `kept` of the queries' documents."""

    def __init__(self, queries: Queries, cached: Tensor | None) -> None:
        assert isinstance(queries.seq, Segments)
        self.seq, self.start, self.queries, self.cached = queries.seq, None, queries, cached
        count, longest = queries.at.shape[0], 0 if cached is None else cached.shape[1]
        self.kept = count * longest
        places = torch.arange(longest, device=queries.at.device)
        self.at, self.known = places.expand(count, -1), False
        self.inside = places < queries.seq.first[queries.documents][:, None]

    def lay(self, x: Tensor, cached: Tensor | None = None) -> Tensor:
        x = x.flatten(0, 1)
        if self.cached is None or cached is None:
            return x
        return torch.cat([cached[self.queries.documents].to(x.dtype).flatten(0, 1), x])


class Whole(Places):
    """The rows of a sequence that all ranks have whole."""

    def __init__(self, queries: Queries, seq: Sequences, start: Tensor | None) -> None:
        super().__init__(seq, start)
        self.documents, self.known = queries.documents, False
        self.at = self.at.expand(seq.count, -1)[self.documents]
        self.inside = None if self.inside is None else self.inside[self.documents]

    def lay(self, x: Tensor, cached: Tensor | None = None) -> Tensor:
        return super().lay(x)[self.documents]


@dataclass(frozen=True)
class Hop:
    """What this rank reads of another's rows: an attention of the documents that both have, `chosen` among the
    queries' (None: all). `rows` says where their tokens stand."""

    attention: Attention
    chosen: Tensor | None
    rows: Table


class Ring:
    """An attention in parts: what does not travel is read first, then the rows that pass.

    `own` are the operands that stay, `moving` those that travel, each once; `where` says of each source's operands
    which of them it is."""

    def __init__(self, ranks: Ranks, what: str, queries: Queries, sources: tuple[Source, ...], shape: tuple[int, ...],
                 weighted: str, dtype: torch.dtype) -> None:  # fmt: skip
        self.ranks, self.what, self.queries = ranks, what, queries
        self.own: list[Tensor] = []
        self.moving: list[Tensor] = []
        self.where: list[list[tuple[bool, int]]] = []
        for source in sources:
            travels = isinstance(source.rows, Travelling)
            moved = [travels and side == "r" for side in source.sides]
            self.where.append([(m, _place(self.moving if m else self.own, x)) for m, x in zip(moved, source.operands)])
        kept = {id(x): s.rows.kept for s in sources if isinstance(s.rows, Travelling) for x in s.operands}
        self.kept = [kept[id(x)] for x in self.moving]
        self.travelling = [k for k, s in enumerate(sources) if isinstance(s.rows, Travelling)]
        self.resumed = [k for k in self.travelling if getattr(sources[k].rows, "kept", 0)]
        self.staying = [k for k in range(len(sources)) if k not in self.travelling]
        self.shape, self.weighted, self.dtype = shape, weighted, dtype
        self.sources = tuple(replace(s, operands=()) for s in sources)
        self.here = Attention(queries, self.sources, shape, weighted, dtype)
        seq = queries.seq
        assert isinstance(seq, Segments)
        self.hops = [self.hop(seq, (ranks.rank - k) % ranks.size) for k in range(ranks.size if self.travelling else 0)]

    def hop(self, seq: Segments, rank: int) -> Hop | None:
        """What is read of a rank's rows; None if none of its documents is here."""
        met: tuple[Tensor | None, Table] | None = seq._once(f"rows of {rank}", lambda: _meet(self.queries, seq, rank))
        if met is None:
            return None
        chosen, rows = met
        sources = tuple(replace(self.sources[k], rows=rows, operands=()) for k in self.travelling)
        queries = self.queries.cut(chosen)
        return Hop(Attention(queries, sources, self.shape, self.weighted, self.dtype), chosen, rows)

    def operands(
        self, k: int, own: list[Tensor], rows: list[Tensor], chosen: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """A source's operands, for some of the documents."""
        out = []
        for (moved, index), side in zip(self.where[k], self.sources[k].sides):
            x = rows[index] if moved else own[index]
            out.append(x[chosen] if side == "q" and chosen is not None else x)
        return tuple(out)

    def before(self, x: Tensor, kept: int) -> Tensor:
        """The rows of calls before, one row a document: a view of what a travelling operand has in front."""
        count = self.queries.at.shape[0]
        return x[:kept].view(count, kept // max(count, 1), *x.shape[1:])

    def walk(self, rows: list[Tensor], way: str) -> Iterator[tuple[Hop | None, list[Tensor], str]]:
        """Each hop with the rows that are here then, which already go on to the next rank."""
        held = [x[n:] for x, n in zip(rows, self.kept)]
        for k, hop in enumerate(self.hops):
            what = f"{self.what}, {way}, hop {k + 1} of {len(self.hops)}"
            going = self.ranks.pass_on(held, what) if k + 1 < len(self.hops) else None
            yield hop, held, what
            held = going.wait() if going is not None else held

    def forward(self, own: list[Tensor], rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        sums = self.here.start()
        for k in self.staying:
            self.here.add(sums, self.sources[k], self.operands(k, own, []))
        before = [self.before(x, n) for x, n in zip(rows, self.kept)]
        for k in self.resumed:
            self.here.add(sums, self.sources[k], self.operands(k, own, before))
        for hop, held, _ in self.walk(rows, "forward"):
            if hop is None:
                continue
            laid = [x[hop.rows.token] for x in held]
            part = sums if hop.chosen is None else Sums(*(x[hop.chosen] for x in (sums.most, sums.total, sums.read)))
            for k, source in zip(self.travelling, hop.attention.sources):
                hop.attention.add(part, source, self.operands(k, own, laid, hop.chosen))
            if hop.chosen is not None:
                sums.most[hop.chosen], sums.total[hop.chosen], sums.read[hop.chosen] = part.most, part.total, part.read
        return self.here.finish(sums)

    def backward(self, own: list[Tensor], rows: list[Tensor], result: Result) -> list[Tensor | None]:
        """The gradients of all operands; those of rows travel with them, and one hop more to where they belong."""
        d_own, d_rows = no_gradients(tuple(own)), no_gradients(tuple(rows))
        for k in self.staying:
            self.here.add_gradients(self.sources[k], self.operands(k, own, []), self.pick(k, d_own, []), result)
        before = [self.before(x, n) for x, n in zip(rows, self.kept)]
        d_before = [None if d is None else self.before(d, n) for d, n in zip(d_rows, self.kept)]
        for k in self.resumed:
            grads = self.pick(k, d_own, d_before)
            self.here.add_gradients(self.sources[k], self.operands(k, own, before), grads, result)
        going: Passing | None = None
        for hop, held, what in self.walk(rows, "backward"):
            found = [torch.zeros_like(x) for x in held if x.is_floating_point()]
            if hop is not None:
                self.add_hop(hop, own, held, d_own, iter(found), result)
            arrived = going.wait() if going is not None else []
            found = [a + b for a, b in zip(arrived, found)] if arrived else found
            going = self.ranks.pass_on(found, f"{what}, gradients")
        home = iter(going.wait() if going is not None else [])
        for d, n in zip(d_rows, self.kept):
            if d is not None:
                d[n:] = next(home)
        return [*d_own, *d_rows]

    def pick(self, k: int, d_own: list[Tensor | None], d_rows: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients that a source's operands add to."""
        return [(d_rows if moved else d_own)[index] for moved, index in self.where[k]]

    def add_hop(self, hop: Hop, own: list[Tensor], held: list[Tensor], d_own: list[Tensor | None],
                found: Iterator[Tensor], result: Result) -> None:  # fmt: skip
        """Add what a hop gives: to the gradients of what stays, and to `found`, those of the rows here."""
        laid = [x[hop.rows.token] for x in held]
        d_laid = no_gradients(tuple(laid))
        if hop.chosen is not None:
            result = Result(*(x[hop.chosen] for x in (result.top, result.logs, result.d_out, result.delta)))
        for k, source in zip(self.travelling, hop.attention.sources):
            ops, grads = self.operands(k, own, laid, hop.chosen), self.pick(k, d_own, d_laid)
            some = [side == "q" and hop.chosen is not None and g is not None
                    for side, g in zip(source.sides, grads)]  # fmt: skip
            new = [torch.zeros_like(x) if s else g for x, g, s in zip(ops, grads, some)]
            hop.attention.add_gradients(source, ops, new, result)
            for whole, part, s in zip(grads, new, some):
                if s and whole is not None and part is not None and hop.chosen is not None:
                    whole.index_add_(0, hop.chosen, part)
        there = hop.rows.there
        for d in d_laid:
            if d is not None:
                next(found)[hop.rows.token[there]] = d[there]


def _meet(queries: Queries, seq: Segments, rank: int) -> tuple[Tensor | None, Table] | None:
    """The documents that queries and a rank's rows have in common (None: all of the queries'), and these rows."""
    place = place_of(rank, seq.ranks.size, seq.layout, seq.rows, seq.tokens, seq.device)
    common = torch.isin(queries.documents, torch.unique(seq.document_of(place)))
    if not bool(common.any()):
        return None
    chosen = None if bool(common.all()) else common.nonzero()[:, 0]
    return chosen, Table(seq, rank, queries.documents if chosen is None else queries.documents[chosen])


def _place(among: list[Tensor], x: Tensor) -> int:
    """Where a tensor stands, at the end if it did not."""
    found = next((i for i, y in enumerate(among) if x is y), None)
    if found is None:
        among.append(x)
        return len(among) - 1
    return found


class Attend(torch.autograd.Function):
    """An attention over the ring; its backward lets the rows pass once more."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, *flat: Tensor) -> Tensor:
        count = len(ring.own)
        out, top, logs = ring.forward(list(flat[:count]), list(flat[count:]))
        ctx.ring = ring
        ctx.save_for_backward(out, top, logs, *flat)
        return out

    @staticmethod
    @uncast
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        once()
        out, top, logs, *flat = ctx.saved_tensors
        count = len(ctx.ring.own)
        result = Result(top, logs, d_out, ctx.ring.here.lowered(d_out * out))
        return None, *ctx.ring.backward(flat[:count], flat[count:], result)


def ring_attend(ranks: Ranks, what: str, queries: Queries, sources: tuple[Source, ...], shape: tuple[int, ...],
                weighted: str, dtype: torch.dtype) -> Tensor:  # fmt: skip
    """`attend` over a sharded sequence: the result for this rank's queries [B, T, *O]."""
    ring = Ring(ranks, what, queries, sources, shape, weighted, dtype)
    flat = [x.to(dtype) if x.is_floating_point() else x for x in (*ring.own, *ring.moving)]
    ring.own, ring.moving = flat[: len(ring.own)], []
    with no_autocast(queries.at.device):
        out: Tensor = Attend.apply(ring, *flat)  # type: ignore[no-untyped-call]
    return queries.unlay(out)
