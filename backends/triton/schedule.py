"""How a matrix scan is laid over programs: two schedules, used forward and backward.

*pass*: a program walks over the tiles of one sequence with a block of the state on chip, and keeps the state at each
tile's edge. *side*: a program computes one block of one side of one tile: what is read there, what the writes get as
gradient, and the gradient of a log-gate of that side.

A pair of tokens is anchored in one of two ways. If the rows decay by less than `LIMIT` from the tile's start to a read,
one product holds all that the read takes: its own decay from the start, times the inverse of each write's. Else each
pair is anchored in the block whose middle lies between them, at that middle, level by level, and no exponent is
positive. A forward kernel chooses for each read by what lies before it, so that later tokens change nothing of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from chunkc.backends.scan import Operand, Pair, ScanForm, Side, other
from chunkc.backends.triton.kernel import Expr, Kernel, call, dot, exp, masked_sum, trans, where
from chunkc.backends.triton.tile import SIZE, Tile, block, notes_of, real, scaled
from chunkc.backends.writer import Lines

SIDES: tuple[Side, Side] = ("i", "j")
ZEROS = "tl.zeros"


def pass_kernel(form: ScanForm, lines: Lines, spans: dict[str, str], reverse: bool) -> Kernel:
    """The state at each tile's start; reversed, its gradient at each tile's end."""
    pairs = form.query_pairs() if reverse else form.write_pairs()
    t = Tile(form, notes_of(form, spans))
    b, start = t.b, Expr("start")
    program = b.let("program", call("tl.program_id", 0))
    blocks_i, blocks_j = (b.let(f"blocks_{s}", call("tl.cdiv", SIZE[s], block(s))) for s in SIDES)
    head = b.let("head", program // (blocks_i * blocks_j) % "H")
    sequence = b.let("sequence", (program // (blocks_i * blocks_j) // "H").to("tl.int64"))
    b.let("row", call("tl.arange", 0, "C"))
    t.columns("i", program // blocks_j % blocks_i)
    t.columns("j", program % blocks_j)
    cell = b.let("cell", Expr("col_i").rows * "J" + Expr("col_j").cols)
    has = b.let("has", Expr("has_i").rows & Expr("has_j").cols)
    whole = (sequence * "H" + head) * (Expr("I") * "J")
    state = b.load("state", Expr("initial_ptr") + whole + cell, has)
    b.let("state", real(state))
    b.let("first", call("sequence_start", "offsets_ptr", sequence, "tokens"))
    stop = b.let("stop", call("sequence_start", "offsets_ptr", sequence + 1, "tokens"))
    first_tile = b.let("first_tile", call("sequence_tile", "first_tile_ptr", sequence, "each"))
    count = b.let("count", call("tl.cdiv", stop - "first", "C"))
    masks_at = len(b.body)
    with b.loop("step", count, "tiles") as step:
        place = b.let("place", count - 1 - step if reverse else step)
        there = Expr("states_ptr") + ((first_tile + place) * "H" + head) * (Expr("I") * "J") + cell
        b.store(there, state, has)
        b.let("start", Expr("first") + place * "C")
        t.cells(start)
        decay: Expr = state
        factors: dict[Side, Expr | None] = {"i": None, "j": None}
        for side in SIDES:
            g = form.gate(side)
            gate = t.gate(g)
            if g is None or gate is None:
                continue
            edge = t.from_start if reverse else t.to_end
            factors[side] = b.let(f"to_edge_{side}", edge(gate, g.thin))
            total = t.total(gate, g.thin)
            decay = decay * (total.rows if side == "i" else total.cols)
        new = decay
        for n, p in enumerate(pairs):
            key, value = scaled(t.load(p.i, "i"), factors["i"]), scaled(t.load(p.j, "j"), factors["j"])
            key = b.let(f"left{n or ''}", key) if factors["i"] is not None else key
            value = b.let(f"right{n or ''}", value) if factors["j"] is not None else value
            new = new + dot(trans(key), value)
        b.let("state", new, lines.place(form.scan.span))
    b.store(Expr("last_ptr") + whole + cell, state, has)
    t.masks_at = masks_at
    used = [f"{g.name}_ptr" for g in form.gates] + [f"{x}_ptr" for p in pairs for x in (p.i, p.j)]
    doc = (f"The gradient of {form.scan.name} at each tile's end, from the last tile to the first." if reverse
           else f"{form.scan.name} at each tile's start.")  # fmt: skip
    tail = ("initial_ptr", "states_ptr", "last_ptr", "offsets_ptr", "first_tile_ptr", "tokens", "each")
    name = f"{form.name}_ends" if reverse else f"{form.name}_states"
    return Kernel(name, doc, (*dict.fromkeys(used), *tail), t.closed())


@dataclass(frozen=True)
class SidePlan:
    """What a side kernel gives: reads of these queries, gradients of these writes, of a log-gate of the side.

    Forward, reads are results; backward a read is a query's gradient. A gate's gradient is made of all reads and
    writes, also of those that are no results."""

    side: Side
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    forward: bool = False
    gate: bool = False


class SideKernel:
    """Builds one side kernel. Pairs of a read at token t and a write at j <= t meet in scores over the other side.

    A reader's factors are (c, d r) or, for a query of the other kind, (d r, c); forward only the c of queries over
    the other side is known, and what is read there is the result. Where reads and writes are both wanted, one matrix
    has the scores of both: its lower half belongs to reads, its upper half to writes."""

    def __init__(self, form: ScanForm, plan: SidePlan, name: str, spans: dict[str, str]) -> None:
        self.form, self.plan, self.name = form, plan, name
        self.x, self.o = plan.side, other(plan.side)
        self.t = Tile(form, notes_of(form, spans))
        self.b = self.t.b
        self.readers: list[Pair] = form.query_pairs()
        self.writers: list[Pair] = form.write_pairs()
        own, far = form.gate(self.x), form.gate(self.o)
        self.thin = next((g for g in (own, far) if g is not None and g.thin), None)
        self.own = None if own is None or own.thin else own
        self.far = None if far is None or far.thin else far
        self.reads = tuple(range(len(self.readers))) if plan.gate else plan.reads
        self.writes = tuple(range(len(self.writers))) if plan.gate else plan.writes
        self.pairs = [(m, r) for m in self.reading() for r in range(len(self.writers))]

    def reading(self) -> tuple[int, ...]:
        """The queries whose scores are needed."""
        return tuple(range(len(self.readers))) if self.writes else self.reads

    @property
    def both(self) -> bool:
        return bool(self.reads and self.writes)

    @property
    def inner(self) -> Expr:
        """The pairs that scores are used for, where they are of reads or of writes alone."""
        return self.t.since if self.reads else self.t.mask("onward" if self.t.late else "later")

    # Names of operands that the kernel takes: on its own side, and on the other.
    def own_names(self) -> list[str]:
        names = [p.on(self.x) for p in self.writers] if self.reads else []
        names += [self.readers[m].on(self.x) for m in self.reading()] if self.writes else []
        return list(dict.fromkeys(names))

    def far_names(self) -> list[str]:
        return list(dict.fromkeys([*(self.readers[m].on(self.o) for m in self.reading()),
                                   *(p.on(self.o) for p in self.writers)]))  # fmt: skip

    def build(self) -> Kernel:
        self.t.program(self.x)
        if self.thin is not None:
            self.thin_decays(self.thin)
        self.accumulators()
        if self.own is None:
            with self.blocks() as part:
                self.across(part, self.far_names(), scores=True, reads=self.reads, writes=self.writes)
            self.load_own()
            self.plain()
            for name in self.outputs():
                self.store(name)
        else:
            with self.blocks() as part:
                self.across(part, self.far_names(), scores=True)
            self.gated(self.load_own())
        arguments = [f"{g.name}_ptr" for g in self.form.gates]
        arguments += [f"{n}_ptr" for n in [*self.own_names(), *self.far_names()]]
        arguments += (["states_ptr"] if self.reads else []) + (["ends_ptr"] if self.writes else [])
        arguments += [f"{r}_ptr" for r in self.outputs()]
        arguments += ["tile_start_ptr", "tile_stop_ptr", "tokens", "each"]
        return Kernel(self.name, self.doc(), tuple(dict.fromkeys(arguments)), self.t.closed())

    def blocks(self) -> AbstractContextManager[Expr]:
        """A loop over blocks of the other side."""
        return self.b.loop("part", call("tl.cdiv", SIZE[self.o], block(self.o)), f"blocks of side {self.o}")

    def load_own(self) -> Expr | None:
        gate = self.t.gate(self.own)
        for n in self.own_names():
            self.t.load(n, self.x)
        return gate

    def doc(self) -> str:
        if self.plan.forward:
            return f"What is read of {self.form.scan.name}: from the tile's first state and from writes inside it."
        return f"Gradients over ({', '.join(self.form.scan.i if self.x == 'i' else self.form.scan.j)}) of one tile."

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

    def accumulators(self) -> None:
        """Sums over the other side: what states give, scores, and for gradients own pairs and the edges' product."""
        b = self.b
        if self.own is None:
            for name in [*(self.read_name(m) for m in self.reads), *(self.write_name(r) for r in self.writes)]:
                self.zeros(name)
        for m, r in self.pairs:
            b.let(f"score_{m}{r}", call(ZEROS, "(C, C)", "tl.float32"))
            if self.diagonals():
                b.let(f"own_{m}{r}", call(ZEROS, "(C,)", "tl.float32"))
        if self.plan.gate:
            b.let("edges", call(ZEROS, f"({block(self.x)},)", "tl.float32"))

    def zeros(self, name: str) -> Expr:
        """A sum over this side's columns, [C, D], at its start."""
        return self.b.let(name, call(ZEROS, f"(C, {block(self.x)})", "tl.float32"))

    def diagonals(self) -> bool:
        """Whether a token's read of its own write is kept apart: scores of both halves have no place for it, and a
        gate's gradient has no part in it."""
        return self.t.late and (self.both or self.own is not None)

    # -- over blocks of the other side -------------------------------------------------------------------------------

    def across(self, part: Expr, names: list[str], scores: bool = False, reads: tuple[int, ...] = (),
               writes: tuple[int, ...] = (), edges: bool = False) -> None:  # fmt: skip
        """One block of the other side: what it adds to the scores, to these reads and gradients of writes from the
        states, and to the product of the edges."""
        b, t, o = self.b, self.t, self.o
        t.columns(o, part)
        gate = t.gate(self.far)
        for n in names:
            t.load(n, o)
        since: Expr | None = None
        if gate is not None:
            b.let(f"sums_{o}", t.sums(t.mask("upto"), gate, False), "of gates from the tile's start, a token's own too")
            since = b.let(f"since_{o}", Expr(f"sums_{o}") if t.late else Expr(f"sums_{o}") - gate)
        wanted = self.reading() if scores else reads
        reading = {m: scaled(self.readers[m].on(o), None if since is None else exp(since)) for m in wanted}
        if since is not None:
            reading = {m: b.let(f"reading_{m}", x) for m, x in reading.items()}
        for m in reads:
            b.add(Expr(self.read_name(m)), dot(reading[m], self.state("states")))
        for r in writes:
            written = scaled(self.writers[r].on(o), None if gate is None else t.to_end(gate, False))
            b.add(Expr(self.write_name(r)), dot(written, self.state("ends")))
        if edges or self.plan.gate and self.own is None:
            b.add(Expr("edges"), call("tl.sum", self.product_of_edges(gate), 0))
        if scores and (gate is None or since is None):
            self.scores()
        elif scores:
            self.gated_scores(reading, gate, since)

    def state(self, which: str) -> Expr:
        """A block of a state as [other side, own side], loaded once."""
        if any(getattr(s, "name", "") == which for s in self.b.body):
            return Expr(which)
        i, j = Expr("col_i"), Expr("col_j")
        cell = i.cols * "J" + j.rows if self.x == "i" else i.rows * "J" + j.cols
        mask = Expr(f"has_{self.o}").rows & Expr(f"has_{self.x}").cols
        base = (Expr("tile") * "H" + "head") * (Expr("I") * "J")
        return self.b.load(which, Expr(f"{which}_ptr") + base + cell, mask)

    def product_of_edges(self, gate: Expr | None) -> Expr:
        product = real(self.state("states")) * real(self.state("ends"))
        return product if gate is None else product * self.t.total(gate, False).rows

    def operands(self, m: int, r: int, side: Side) -> tuple[Expr, Expr]:
        return Expr(self.readers[m].on(side)), Expr(self.writers[r].on(side))

    def halves(self, read: Expr, write: Expr) -> Expr:
        """Products of reads with writes: of each read's row with all writes, of each write's row with all reads."""
        low, high = dot(read, trans(write)), dot(write, trans(read))
        return where(self.t.mask("earlier"), low, high) if self.both else low if self.reads else high

    def scores(self) -> None:
        for m, r in self.pairs:
            read, write = self.operands(m, r, self.o)
            self.own_pair(m, r, read, write)
            self.b.add(Expr(f"score_{m}{r}"), self.halves(read, write))

    def own_pair(self, m: int, r: int, read: Expr, write: Expr) -> None:
        if self.diagonals():
            self.b.add(Expr(f"own_{m}{r}"), call("tl.sum", real(read) * real(write), 1))

    def gated_scores(self, reading: dict[int, Expr], gate: Expr, since: Expr) -> None:
        """Scores with decays over the other side: from the tile's start; where a read decays too much for that, by
        levels down to its block of `LEVELS - 2`, from that block's start; where even that is too much, by all levels."""
        b, t, o = self.b, self.t, self.o
        least = b.let("least", call("tl.min", since, 1), "the strongest decay from the start to each token")
        b.let("inverse", exp(call("tl.minimum", -Expr(f"sums_{o}"), "LIMIT")))
        for m, r in self.pairs:
            read, write = self.operands(m, r, o)
            self.own_pair(m, r, read, write)
            b.let(f"part_{m}{r}", self.halves(reading[m], real(write) * "inverse"))
        with b.when(call("tl.min", least, 0) <= -Expr("LIMIT")):
            same = self.same_block(Expr("LEVELS") - 2)
            sums = b.let("near_sums", masked_sum(t.mask("upto") & same, gate, "GATE_PARTS"))
            since = b.let("near_since", sums if t.late else sums - gate)
            b.let("shift", where(call("tl.min", since, 1) > -Expr("LIMIT"), Expr("LEVELS") - 2, 0),
                  "the block that each read is anchored in, by its size's logarithm")  # fmt: skip
            lowest = b.let("lowest", call("tl.min", "shift", 0))
            shifts = b.let("shifts", self.by_read(Expr("shift")))
            for m, r in self.pairs:
                b.let(f"exact_{m}{r}", call(ZEROS, "(C, C)", "tl.float32"))
            with b.loop("step", Expr("LEVELS") - lowest, "levels") as step:
                pair, factor = self.level(Expr("LEVELS") - 1 - step, gate)
                pair = b.let("pair", pair & (Expr("level") >= shifts))
                for m, r in self.pairs:
                    read, write = self.operands(m, r, o)
                    rows = b.let(f"rows_{m}{r}", where(Expr("upper").rows, real(read), real(write)) * factor)
                    b.add(Expr(f"exact_{m}{r}"), where(pair, dot(rows, trans(rows)), 0.0))
            inverse = exp(call("tl.minimum", -sums, "LIMIT"))
            for m, r in self.pairs:
                read, write = self.operands(m, r, o)
                near = self.halves(real(read) * exp(since), real(write) * inverse)
                exact = where(same & (shifts > 0), near, Expr(f"exact_{m}{r}"))
                if t.late and not self.diagonals():
                    own = call("tl.sum", real(read) * real(write), 1)
                    exact = where(Expr("row").rows.same(Expr("row").cols) & shifts.same(0), own.rows, exact)
                mild = self.by_read(least) > -Expr("LIMIT")
                b.let(f"part_{m}{r}", where(mild, Expr(f"part_{m}{r}"), exact))
        for m, r in self.pairs:
            b.add(Expr(f"score_{m}{r}"), Expr(f"part_{m}{r}"))

    def by_read(self, value: Expr) -> Expr:
        """A value of each read, for each pair."""
        if self.both:
            return where(self.t.mask("earlier"), value.rows, value.cols)
        return value.rows if self.reads else value.cols

    def same_block(self, shift: Expr) -> Expr:
        """Pairs of tokens in one block of 2^shift."""
        block_of = Expr("row") >> shift
        return self.b.let("same", block_of.rows.same(block_of.cols))

    def level(self, level: Expr, gate: Expr) -> tuple[Expr, Expr]:
        """Which pairs a level anchors, and each token's decay to or from the middle of its block."""
        b, t, row = self.b, self.t, Expr("row")
        level = b.let("level", level)
        half = b.let("half", row >> level)
        upper = b.let("upper", (half & 1).same(1), "in the later half of its block")
        pair = b.let("pair", Expr("^", (half.rows, half.cols)).same(1), "across the middle of a block")
        middle = b.let("middle", Expr("<<", (half | 1, level)), "the first token of that half")
        first = b.let("first", where(upper, middle, row + 1))
        last = b.let("last", where(upper, row if t.late else row - 1, middle - 1))
        inner = (row.cols >= first.rows) & (row.cols <= last.rows)
        b.let("inner", inner, "gates between a token and the middle")
        return pair, b.let("decay", exp(masked_sum(Expr("inner"), gate, "GATE_PARTS")))

    # -- on the own side ---------------------------------------------------------------------------------------------

    def thin_decays(self, g: Operand) -> None:
        """Decays of a gate of one number a head: between two tokens, from the tile's start and to its end."""
        b, t = self.b, self.t
        gate = t.gate(g)
        assert gate is not None
        column = b.let("column", trans(gate), "the gates as a column")
        gaps: Expr | None = None
        if self.reads:
            gaps = masked_sum(t.since, where(t.mask("earlier"), column, 0.0), "GATE_PARTS")
        if self.writes:
            behind = t.mask("onward" if t.late else "later")
            upward = masked_sum(t.mask("later"), where(behind, column, 0.0), "GATE_PARTS")
            gaps = upward if gaps is None else gaps + upward
        assert gaps is not None
        b.let("gaps", exp(gaps), "decays between two tokens")
        if self.reads:
            b.let("from_start", t.from_start(gate, True))
        if self.writes:
            b.let("to_end", t.to_end(gate, True))

    def used(self, m: int, r: int, mask: Expr) -> Expr:
        """Scores of the pairs that a mask names."""
        score = Expr(f"score_{m}{r}")
        return where(mask, score if self.thin is None else score * "gaps", 0.0)

    def plain(self) -> None:
        """Without a gate for each of the own side's numbers, scores times factors are all there is."""
        b = self.b
        reads, writes = self.t.mask("earlier"), self.t.mask("later")
        parts: dict[str, Expr] = {}
        for m, r in self.pairs:
            read, write = self.operands(m, r, self.x)
            wanted = [(self.read_name(m), write, reads)] if m in self.reads else []
            wanted += [(self.write_name(r), read, writes)] if self.writes else []
            for name, factor, mask in wanted:
                part = dot(self.used(m, r, mask if self.both else self.inner), factor)
                parts[name] = parts[name] + part if name in parts else part
        decays = {self.read_name(m): "from_start" for m in self.reads} if self.thin else {}
        decays |= {self.write_name(r): "to_end" for r in self.writes} if self.thin else {}
        for name, decay in decays.items():
            b.let(name, Expr(name) * decay)
        if self.plan.gate:
            self.thin_flows(parts)
        for name, part in parts.items():
            b.add(Expr(name), part)
        self.own_pairs()

    def own_pairs(self, prefix: str = "") -> None:
        """Each token's read of its own write, which no gate decays."""
        if not self.diagonals():
            return
        for m, r in self.pairs:
            read, write = self.operands(m, r, self.x)
            own = Expr(f"own_{m}{r}").rows
            if m in self.reads:
                self.b.add(Expr(f"{prefix}{self.read_name(m)}"), own * real(write))
            if self.writes:
                self.b.add(Expr(f"{prefix}{self.write_name(r)}"), own * real(read))

    def gated(self, gate: Expr | None) -> None:
        """With a gate for each of the own side's numbers: products with decayed factors, decayed. First pairs, then what
        states give, one after the other, so that few sums are on chip at once."""
        b, t = self.b, self.t
        assert self.own is not None and gate is not None
        names = [*(self.read_name(m) for m in self.reads), *(self.write_name(r) for r in self.writes)]
        for name in names:
            self.zeros(f"near_{name}")
        if self.plan.gate:
            self.zeros("flow")
            if not t.late:
                self.zeros("flow_in")
        sums = b.let("sums", t.sums(t.mask("upto"), gate, False))
        since = b.let("since", sums if t.late else sums - gate)
        if self.plan.forward:
            self.near_by_read(gate, sums, since)
        else:
            self.near(gate, sums, since)
        self.own_pairs("near_")
        total = f"d_{self.own.name}"
        if self.plan.gate and not t.late:
            b.let(total, -Expr("flow_in"))
        for r in self.writes:
            name = self.write_name(r)
            self.zeros(name)
            with self.blocks() as part:
                self.across(part, [self.writers[r].on(self.o)], writes=(r,))
            b.let(name, Expr(name) * t.to_end(gate, False))
            if self.plan.gate:
                before = masked_sum(t.mask("earlier"), real(self.writers[r].on(self.x)) * name, Expr("PARTS") // 2)
                known = r > 0 or not t.late
                b.let(total, Expr(total) + before if known else before)
            self.finish(name)
        for m in self.reads:
            name = self.read_name(m)
            self.zeros(name)
            with self.blocks() as part:
                self.across(part, [self.readers[m].on(self.o)], reads=(m,), edges=self.plan.gate and m == 0)
            b.let(name, Expr(name) * t.from_start(gate, False))
            if self.plan.gate:
                b.add(Expr("flow"), real(self.readers[m].on(self.x)) * name)
            self.finish(name)
        if self.plan.gate:
            behind = masked_sum(t.mask("later"), Expr("flow"), "PARTS")
            through = (Expr("edges") * t.total(gate, False)).cols
            b.add(Expr(total), behind + Expr("flow") + through if t.late else behind + through)
            self.store(total)

    def finish(self, name: str) -> None:
        """Add the pairs inside the tile and store, if it is a result."""
        if name in self.outputs():
            self.b.add(Expr(name), Expr(f"near_{name}"))
            self.store(name)

    def near(self, gate: Expr, sums: Expr, since: Expr) -> None:
        """Pairs inside the tile, for gradients: by levels down to blocks that decay by less than `LIMIT`, where all pairs
        are anchored at the block's start. A gradient knows what comes later anyway, so the whole tile goes one way."""
        b, t = self.b, self.t
        mild = where(self.strongest(since) > -Expr("LIMIT"), "LEVELS", 0)
        b.let("shift", mild, "the blocks that pairs are anchored in, by their size's logarithm")
        with b.when(Expr("shift").same(0)):
            same = self.same_block(Expr("LEVELS") - 2)
            b.let("sums", t.sums(t.mask("upto") & same, gate, False))
            b.let("since", sums if t.late else sums - gate)
            b.let("shift", where(self.strongest(since) > -Expr("LIMIT"), Expr("LEVELS") - 2, 0))
        self.by_levels(gate, Expr("LEVELS") - "shift")
        with b.when(Expr("shift") > 0):
            self.at_start(sums, since, self.same_block(Expr("shift")))

    @staticmethod
    def strongest(since: Expr) -> Expr:
        return call("tl.min", call("tl.min", since, 1), 0)

    def near_by_read(self, gate: Expr, sums: Expr, since: Expr) -> None:
        """Pairs inside the tile, each read as what lies before it allows."""
        b = self.b
        least = b.let("least", call("tl.min", since, 1), "the strongest decay from the start to each token")
        self.at_start(sums, since, None)
        with b.when(call("tl.min", least, 0) <= -Expr("LIMIT")):
            kept = {name: b.let(f"mild_{name}", Expr(f"near_{name}")) for name in map(self.read_name, self.reads)}
            for name in kept:
                self.zeros(f"near_{name}")
            self.by_levels(gate, Expr("LEVELS"))
            for name, mild in kept.items():
                b.let(f"near_{name}", where(least.rows > -Expr("LIMIT"), mild, Expr(f"near_{name}")))

    def at_start(self, sums: Expr, since: Expr, same: Expr | None) -> None:
        """Pairs of a block, all anchored at its start."""
        b, t = self.b, self.t
        decay = b.let("decay", exp(since))
        inverse = b.let("inverse", exp(call("tl.minimum", -sums, "LIMIT")))
        low, high = (t.mask(m) if same is None else t.mask(m) & same for m in ("earlier", "later"))
        for m, r in self.pairs:
            read, write = self.operands(m, r, self.x)
            if self.writes:
                reading = b.let("reading", (real(read) * decay).to("DOT"))
            if self.reads:
                writing = b.let("writing", (real(write) * inverse).to("DOT"))
            if m in self.reads:
                part = b.let("crossing", dot(self.used(m, r, low), writing))
                b.add(Expr(f"near_{self.read_name(m)}"), part * decay)
                if self.plan.gate:
                    b.add(Expr("flow"), real(reading) * part)
            if self.writes:
                part = b.let("crossing", dot(self.used(m, r, high), reading))
                b.add(Expr(f"near_{self.write_name(r)}"), part * inverse)
                if self.plan.gate:
                    b.add(Expr("flow"), -(real(writing) * part))
                    if not t.late:
                        b.add(Expr("flow_in"), real(writing) * part)

    def by_levels(self, gate: Expr, count: Expr) -> None:
        """Each pair in the block whose middle lies between its tokens, from the largest block down."""
        b = self.b
        with b.loop("step", count, "levels") as step:
            pair, factor = self.level(Expr("LEVELS") - 1 - step, gate)
            upper = Expr("upper").rows
            for m, r in self.pairs:
                read, write = self.operands(m, r, self.x)
                reader = real(read) if self.writes else Expr("0.0")
                writer = real(write) if self.reads else Expr("0.0")
                rows = b.let("rows", (where(upper, reader, writer) * factor).to("DOT"))
                part = b.let("crossing", dot(self.used(m, r, pair), rows))
                if m in self.reads:
                    b.add(Expr(f"near_{self.read_name(m)}"), where(upper, part * factor, 0.0))
                if self.writes:
                    b.add(Expr(f"near_{self.write_name(r)}"), where(upper, 0.0, part * factor))
                if self.plan.gate:
                    flow = b.let("flowing", real(rows) * part)
                    b.add(Expr("flow"), where(upper, flow, -flow))
                    if not self.t.late:
                        b.add(Expr("flow_in"), where(upper, 0.0, flow))

    # -- a log-gate's gradient -----------------------------------------------------------------------------------------

    def thin_flows(self, parts: dict[str, Expr]) -> None:
        """The gradient of a log-gate of one number a head: what passes it. Pairs in the tile enter at the read and leave
        at the write, so that a sum from the end has those that straddle a gate; what comes from the tile's start is read
        behind it, what goes to its end was written before; the start's own way to the end passes all gates.

        The two terms of a pair have the same rounded factors, so that they cancel to float32's accuracy."""
        b, t, gate = self.b, self.t, self.gate_operand()
        flow = before = inward = Expr("0.0")
        for m in self.reads:
            name, own = self.read_name(m), real(self.readers[m].on(self.x))
            parts[name] = b.let(f"near_{name}", parts[name])
            flow = flow + own * (Expr(name) + parts[name])
        for r in self.writes:
            name, own = self.write_name(r), real(self.writers[r].on(self.x))
            parts[name] = b.let(f"near_{name}", parts[name])
            before, inward = before + own * name, inward + own * parts[name]
        flow, before, inward = (call("tl.sum", x, 1, keep_dims="True") for x in (flow - inward, before, inward))
        b.let("flow", flow)
        passed = b.let("passed", where(t.mask("earlier"), Expr("flow"), 0.0) + where(t.mask("later"), before, 0.0),
                       "by each token's own flow, a row, for each gate, a column")  # fmt: skip
        whole = call("tl.sum", Expr("edges"), 0) * call("tl.sum", t.total(Expr(gate.name), True), 0)
        b.let(f"d_{gate.name}", call("tl.sum", passed, 0, keep_dims="True") + whole
              + trans(Expr("flow") if t.late else -inward))  # fmt: skip

    def store(self, name: str) -> None:
        b, x = self.b, self.x
        if self.plan.gate and self.gate_operand().thin and name == f"d_{self.gate_operand().name}":
            blocks = call("tl.cdiv", SIZE[x], block(x))
            cell = (Expr("base") + Expr("row") * "H") * blocks + "block"  # each program's part of its gradient
            b.store(Expr(f"{name}_ptr") + cell.cols, Expr(name), Expr("inside").cols)
        else:
            pointer, mask = self.t.pointer(name, x)
            b.store(pointer, Expr(name), mask)
