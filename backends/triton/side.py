"""The kernels over one side of one tile: what is read there, what writes get as gradient, a log-gate's gradient.

Pairs of a read at token t and a write at j <= t meet in *scores* over the other side, and scores meet the own side's
factors. A gate for each number of a side decays each pair there; how a kernel takes that decay apart into a factor of
the read and one of the write is its *anchor*:

`start`: at the tile's start. One product holds all pairs: the read's decay from the start, times the inverse of the
write's. The tile must not decay by more than `LIMIT`.
`blocks`: at the start of blocks of a quarter, and for pairs of different blocks as `levels`. A block must not decay by
more than `LIMIT`.
`levels`: in the block whose middle lies between the two, at that middle, level by level: no exponent is positive."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from chunkc.backends.scan import Anchor, Operand, ScanForm, Side
from chunkc.backends.triton.kernel import Expr, call, dot, masked_sum, trans, where
from chunkc.backends.triton.tile import OneSide, block, columns, exp, real, scaled

ZEROS = "tl.zeros"
BLOCK = Expr("LEVELS") - 2  # the logarithm of a block's size


@dataclass(frozen=True)
class SidePlan:
    """What a side kernel gives: reads of these queries, gradients of these writes, of a log-gate of the side.

    Forward, reads are results; backward a read is a query's gradient. A gate's gradient is made of all reads and
    writes, also of those that are no results. `only`: whether it leaves the tiles alone that are too much for its
    anchor, or mild enough for another one's. `scores`: whether it keeps its pairs' decayed scores, if it is given a
    place for them, or is given those that another one kept."""

    side: Side
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    forward: bool = False
    gate: bool = False
    anchor: Anchor = "levels"
    only: bool = False
    scores: Literal["", "kept", "given"] = ""


class SideBase(OneSide):
    """The names of a side kernel, and what it takes from the other side: states and scores.

    A reader's factors are (c, d r) or, for a query of the other kind, (d r, c); forward only the c of queries over
    the other side is known, and what is read there is the result. Where reads and writes are both wanted, one matrix
    has the scores of both: its lower half belongs to reads, its upper half to writes."""

    def __init__(self, form: ScanForm, plan: SidePlan, name: str, spans: dict[str, str]) -> None:
        super().__init__(form, plan.side, name, spans)
        self.plan = plan
        own, far = form.gate(self.x), form.gate(self.o)
        self.thin = next((g for g in (own, far) if g is not None and g.thin), None)
        self.own = None if own is None or own.thin else own
        self.far = None if far is None or far.thin else far
        self.reads = tuple(range(len(self.readers))) if plan.gate else plan.reads
        self.writes = tuple(range(len(self.writers))) if plan.gate else plan.writes
        self.reading = tuple(range(len(self.readers))) if self.writes else self.reads  # whose scores are needed
        self.pairs = [(m, r) for m in self.reading for r in range(len(self.writers))]
        self.both = bool(self.reads and self.writes)
        self.given = plan.scores == "given"
        self.scoring = () if self.given else self.reading  # whose scores are made here

    # Names of operands that the kernel takes: on its own side, and on the other.
    def own_names(self) -> list[str]:
        names = [p.on(self.x) for p in self.writers] if self.reads else []
        names += [self.readers[m].on(self.x) for m in self.reading] if self.writes else []
        return list(dict.fromkeys(names))

    def far_names(self) -> list[str]:
        names = [self.readers[m].on(self.o) for m in self.scoring]
        return list(dict.fromkeys([*names, *(p.on(self.o) for p in self.writers)]))

    def outputs(self) -> list[str]:
        out = [self.read_name(m) for m in self.plan.reads] + [self.write_name(r) for r in self.plan.writes]
        return out + ([f"d_{self.gate_operand().name}"] if self.plan.gate else [])

    def gate_operand(self) -> Operand:
        gate = self.own or self.thin
        assert gate is not None, "a side without a gate has no gradient of one"
        return gate

    def read_name(self, m: int) -> str:
        """The value that a read gives on this side: the query's result, or the query's own gradient."""
        q = self.form.queries[m]
        return f"d_{q.name}" if q.side == self.x else f"out_{q.name}"

    def write_name(self, r: int) -> str:
        return f"d_{self.form.writes[r][0 if self.x == 'i' else 1].name}"

    def operands(self, m: int, r: int, side: Side) -> tuple[Expr, Expr]:
        return Expr(self.readers[m].on(side)), Expr(self.writers[r].on(side))

    # -- sums and pairs ------------------------------------------------------------------------------------------------

    def zeros(self, name: str) -> Expr:
        """A sum over this side's columns, [C, D], at its start."""
        return self.b.let(name, call(ZEROS, f"(C, {block(self.x)})", "tl.float32"))

    def diagonals(self) -> bool:
        """Whether a token's read of its own write is kept apart: no level has a place for it."""
        return self.t.late and self.own is not None and self.plan.anchor == "levels"

    def on_diagonal(self) -> bool:
        """Whether a token's read of its own write stands in the scores."""
        return self.far is None

    def add_scores(self, m: int, r: int, read: Expr, write: Expr, mask: Expr | None = None) -> None:
        """Products of reads with writes, of the pairs that a mask names."""
        product = dot(read, trans(write)) if self.reads else dot(write, trans(read))
        self.b.add(Expr(f"score_{m}{r}"), product if mask is None else where(mask, product, 0.0))

    def join_scores(self) -> None:
        """Of both kinds of scores one matrix: its lower half belongs to reads, its upper half to writes."""
        b, row = self.b, Expr("row")
        for m, r in self.pairs:
            score = Expr(f"score_{m}{r}")
            if self.diagonals() and self.on_diagonal():
                b.let(f"own_{m}{r}", call("tl.sum", where(row.rows.same(row.cols), score, 0.0), 1))
            if self.both:
                b.let(score.op, score.to("DOT"))
                b.let(score.op, where(self.t.mask("earlier"), score, trans(score)))

    def half(self, reads: bool) -> Expr:
        """The pairs of reads, a row's with all writes; or of writes, a row's with all reads."""
        return self.t.since if reads else self.t.behind

    def score_names(self) -> list[str]:
        """The matrices of scores [tiles, H, C, C] that the kernel keeps or is given."""
        return [f"scores_{m}{r}" for m, r in self.pairs] if self.plan.scores else []

    def kept(self, m: int, r: int) -> Expr:
        """Where a tile's scores are kept [C, C], a read a row and a write a column."""
        cell = Expr("row").rows * "C" + Expr("row").cols
        return Expr(f"scores_{m}{r}_ptr") + (Expr("tile") * "H" + "head") * (Expr("C") * "C") + cell

    def used(self, m: int, r: int, mask: Expr) -> Expr:
        """Scores of the pairs that a mask names."""
        score = Expr(f"score_{m}{r}")
        return where(mask, score if self.thin is None else score * "gaps", 0.0)

    def same_block(self) -> Expr:
        """Pairs of tokens in one block."""
        block_of = Expr("row") >> BLOCK
        return self.b.let("same", block_of.rows.same(block_of.cols))

    def levels(self) -> AbstractContextManager[Expr]:
        """A loop over the levels that pairs are anchored in, from the largest block down; unrolled it would spill."""
        return self.b.loop("step", self.level_count(), "levels")

    def level_count(self) -> str:
        return "levels" if self.plan.anchor == "levels" else "upper_levels"

    def level(self, step: Expr, gate: Expr) -> tuple[Expr, Expr]:
        """Which pairs a level anchors, and each token's decay to or from the middle of its block."""
        return self.t.level(self.b.let("level", Expr("LEVELS") - 1 - step), gate, thin=False)

    # -- over blocks of the other side -------------------------------------------------------------------------------

    def blocks(self) -> AbstractContextManager[Expr]:
        """A loop over blocks of the other side."""
        return self.b.loop("part", f"parts_{self.o}", f"blocks of side {self.o}")

    def across(self, part: Expr) -> None:
        """One block of the other side: what it adds to the scores, to reads and gradients of writes from the states,
        and to the product of the edges."""
        b, t, o = self.b, self.t, self.o
        columns(b, o, part)
        gate = t.gate(self.far)
        for n in self.far_names():
            t.load(n, o)
        since = None
        if gate is not None and self.scoring:
            since = self.since(gate, f"sums_{o}", masked_sum(t.mask("upto"), gate, "GATE_PARTS"))
        reading = {m: scaled(self.readers[m].on(o), None if since is None else exp(since)) for m in self.scoring}
        if since is not None:
            reading = {m: b.let(f"reading_{m}", x) for m, x in reading.items()}
        for m in self.reads:
            b.add(Expr(self.read_name(m)), dot(reading[m], self.from_far(self.state("states"))))
        for r in self.writes:
            written = scaled(self.writers[r].on(o), None if gate is None else t.to_end(gate, False))
            b.add(Expr(self.write_name(r)), dot(written, self.from_far(self.state("ends"))))
        if self.plan.gate:
            self.add_edges(gate)
        if self.scoring:
            self.scores(reading, gate)

    def since(self, gate: Expr, name: str, upto: Expr) -> Expr:
        """For each token the sum of gates up to its read, from the tile's start or its block's; and `name`, up to its
        write."""
        sums = self.b.let(name, upto)
        return sums if self.t.late else self.b.let(f"{name}_read", sums - gate)

    def add_edges(self, gate: Expr | None) -> None:
        """The product of the states at the tile's edges, summed over the other side: of a product of matrices the
        diagonal, since what is loaded ahead for products may not be read as anything else."""
        b, states, ends = self.b, self.state("states"), self.state("ends")
        if gate is None:
            b.add(Expr("edge_states"), dot(states if self.x == "i" else trans(states), self.from_far(ends)))
            return
        total = self.t.total(gate, False)
        product = real(states) * real(ends) * (total.rows if self.o == "i" else total.cols)
        b.add(Expr("edges"), call("tl.sum", product, 0 if self.o == "i" else 1))

    def state(self, which: str) -> Expr:
        """A block of a state [BI, BJ], loaded once."""
        if any(getattr(s, "name", "") == which for s in self.b.body):
            return Expr(which)
        cell = Expr("col_i").rows * "J" + Expr("col_j").cols
        base = (Expr("tile") * "H" + "head") * (Expr("I") * "J")
        mask = Expr("has_i").rows & Expr("has_j").cols
        return self.b.load(which, Expr(f"{which}_ptr") + base + cell, mask)

    def from_far(self, state: Expr) -> Expr:
        """A block of a state as [other side, own side]."""
        return state if self.o == "i" else trans(state)

    def scores(self, reading: dict[int, Expr], gate: Expr | None) -> None:
        """Scores of reads with writes over a block of the other side; `reading` are reads decayed from the start."""
        b = self.b
        for m, r in self.pairs:
            read, write = self.operands(m, r, self.o)
            if self.diagonals() and not self.on_diagonal():
                b.add(Expr(f"own_{m}{r}"), call("tl.sum", real(read) * real(write), 1))
            if gate is None:
                self.add_scores(m, r, read, write)
        if gate is None:
            return
        if self.plan.anchor == "start":
            inverse = b.let("inverse", exp(-Expr(f"sums_{self.o}")))
            for m, r in self.pairs:
                self.add_scores(m, r, reading[m], real(self.writers[r].on(self.o)) * inverse)
            return
        with self.levels() as step:
            pair, factor = self.level(step, gate)
            for m, r in self.pairs:
                read, write = self.operands(m, r, self.o)
                rows = b.let(f"rows_{m}{r}", where(Expr("upper").rows, real(read), real(write)) * factor)
                product = b.let("crossing", where(pair, dot(rows, trans(rows)), 0.0))
                b.add(Expr(f"score_{m}{r}"), product)
        self.inside_blocks(gate)

    def inside_blocks(self, gate: Expr) -> None:
        """Scores of pairs inside a block; of all levels only the token's own write is left."""
        b = self.b
        if self.plan.anchor == "blocks":
            same = self.same_block()
            since = self.since(gate, "near", masked_sum(self.t.mask("upto") & same, gate, "GATE_PARTS"))
            inverse = b.let("inverse", exp(-Expr("near")))
            for m, r in self.pairs:
                read, write = self.operands(m, r, self.o)
                self.add_scores(m, r, real(read) * exp(since), real(write) * inverse, same)
        elif self.t.late and not self.diagonals():
            for m, r in self.pairs:
                read, write = self.operands(m, r, self.o)
                own = call("tl.sum", real(read) * real(write), 1)
                b.add(Expr(f"score_{m}{r}"), where(Expr("row").rows.same(Expr("row").cols), own.rows, 0.0))
