"""The own side of a side kernel: scores times factors, decays of the side's gate, and that gate's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from chunkc.backends.scan import Operand
from chunkc.backends.triton.kernel import Expr, Kernel, call, cumsum, dot, masked_sum, rounded, trans, where
from chunkc.backends.triton.side import ZEROS, SideBase
from chunkc.backends.triton.tile import SIZE, block, exp, real

WHOLE = Expr("PARTS").same(0)  # sums are in float32


class SideKernel(SideBase):
    """Builds one side kernel."""

    def build(self) -> Kernel:
        self.t.program(self.x)
        wanted = self.t.some
        if self.plan.only:
            mild = self.t.is_mild([g for g in (self.own, self.far) if g is not None])
            wanted = wanted & (mild if self.plan.anchor == "start" else mild.same(0))
        with self.b.when(wanted):
            self.inside()
        arguments = [f"{g.name}_ptr" for g in self.form.gates]
        arguments += [f"{n}_ptr" for n in [*self.own_names(), *self.far_names()]]
        arguments += (["states_ptr"] if self.reads else []) + (["ends_ptr"] if self.writes else [])
        arguments += [f"{r}_ptr" for r in [*self.outputs(), *self.score_names()]]
        arguments += [self.form.scales[m] for m in self.scoring if self.form.scales[m]]
        arguments += ["tile_start_ptr", "tile_stop_ptr", "tokens", "each", f"parts_{self.o}"]
        if (self.own or self.far) and self.plan.anchor != "start" and self.scoring:
            arguments.append(self.level_count())
        if self.plan.only:
            arguments += [f"totals_{g.side}_ptr" for g in self.form.gates if not g.thin]
        return Kernel(self.name, self.doc(), tuple(dict.fromkeys(arguments)), self.t.closed())

    def inside(self) -> None:
        """All that is done to a tile."""
        if self.thin is not None:
            self.thin_decays(self.thin)
        for m, r in self.pairs if self.scoring else ():
            self.b.let(f"score_{m}{r}", call(ZEROS, "(C, C)", "tl.float32"))
            if self.diagonals() and not self.on_diagonal():
                self.b.let(f"own_{m}{r}", call(ZEROS, "(C,)", "tl.float32"))
        if self.plan.gate:
            size = block(self.x)
            name, shape = ("edges", f"({size},)") if self.far is not None else ("edge_states", f"({size}, {size})")
            self.b.let(name, call(ZEROS, shape, "tl.float32"))
        if self.own is None:
            self.plain()
        else:
            self.gated()

    def over_blocks(self) -> None:
        """One loop over the other side, for all that is wanted of it."""
        with self.blocks() as part:
            self.across(part)
        for m in self.scoring:
            self.scale(m)
        if self.plan.gate and self.far is None:
            own = Expr(f"col_{self.x}")
            self.b.let("edges", call("tl.sum", where(own.rows.same(own.cols), Expr("edge_states"), 0.0), 0))

    def scale(self, m: int) -> None:
        """The number that a read's result is multiplied by: all that it gives, and its gradient gives, has it once."""
        if not (scale := self.form.scales[m]):
            return
        made = [f"score_{m}{r}" for r in range(len(self.writers))]
        if self.diagonals() and not self.on_diagonal():
            made += [f"own_{m}{r}" for r in range(len(self.writers))]
        for name in [*made, *([self.read_name(m)] if m in self.reads else [])]:
            self.b.let(name, Expr(name) * scale)

    def doc(self) -> str:
        if self.plan.forward:
            text = f"What is read of {self.form.scan.name}: from the tile's first state and from writes inside it"
        else:
            text = f"Gradients over ({', '.join(self.form.scan.i if self.x == 'i' else self.form.scan.j)}) of one tile"
        if self.given:
            return f"{text}, by the scores that forward kept."
        if self.own is None and self.far is None:
            return f"{text}."
        at = {"start": "the tile's start", "blocks": "the start of blocks", "levels": "the middle between them"}
        return f"{text}; pairs are anchored at {at[self.plan.anchor]}."

    def load_own(self) -> None:
        """The own side's operands."""
        for n in self.own_names():
            self.t.load(n, self.x)

    def load_gated(self) -> Expr:
        """The tile of the own side's gate, and the operands."""
        gate = self.t.gate(self.own)
        assert gate is not None, "the side has no gate for each of its numbers"
        self.load_own()
        return gate

    def own_pairs(self, name: str) -> None:
        """What each token's read of its own write, which no gate decays, adds to a read or gradient."""
        if not self.diagonals():
            return
        for m, r in self.pairs:
            read, write = self.operands(m, r, self.x)
            own = Expr(f"own_{m}{r}").rows
            if m in self.reads and name == self.read_name(m):
                self.b.add(Expr(name), own * real(write))
            if r in self.writes and name == self.write_name(r):
                self.b.add(Expr(name), own * real(read))

    def store(self, name: str, value: Expr | None = None) -> None:
        b, x = self.b, self.x
        if self.plan.gate and self.gate_operand().thin and name == f"d_{self.gate_operand().name}":
            blocks = call("tl.cdiv", SIZE[x], block(x))
            cell = (Expr("base") + Expr("row") * "H") * blocks + "block"  # each program's part of its gradient
            b.store(Expr(f"{name}_ptr") + cell.cols, Expr(name), Expr("inside").cols)
        else:
            pointer, mask = self.t.pointer(name, x)
            b.store(pointer, Expr(name) if value is None else value, mask)

    # -- one number a head, or no gate ---------------------------------------------------------------------------------

    def thin_decays(self, g: Operand) -> None:
        """Decays of a gate of one number a head: between two tokens, from the tile's start and to its end."""
        b, t = self.b, self.t
        gate = t.gate(g)
        assert gate is not None
        if self.scoring:
            column = b.let("column", trans(gate), "the gates as a column")
            rows, gates = (t.since, t.mask("earlier")) if self.reads else (t.mask("later"), t.behind)
            gaps = masked_sum(rows, where(gates, column, 0.0), "GATE_PARTS")
            b.let("gaps", exp(gaps), "decays between two tokens")
        if self.reads:
            b.let("from_start", t.from_start(gate, True))
        if self.writes:
            b.let("to_end", t.to_end(gate, True))

    def plain(self) -> None:
        """Without a gate for each of the own side's numbers, scores times factors are all there is."""
        b = self.b
        decays = {self.read_name(m): "from_start" for m in self.reads}
        decays |= {self.write_name(r): "to_end" for r in self.writes}
        for name in decays:
            self.zeros(name)
        self.over_blocks()
        self.load_own()
        low, high = self.halves()
        parts: dict[str, Expr] = {}
        for m, r in self.pairs:
            read, write = self.operands(m, r, self.x)
            wanted = [(self.read_name(m), low, write)] if m in self.reads else []
            wanted += [(self.write_name(r), high, read)] if self.writes else []
            for name, scores, factor in wanted:
                part_of = dot(scores[m, r], factor)
                parts[name] = parts[name] + part_of if name in parts else part_of
        if self.thin is not None:
            for name, decay in decays.items():
                b.let(name, Expr(name) * decay)
        if self.plan.gate:
            self.edge_flows()
        for name, part_of in parts.items():
            b.add(Expr(name), part_of)
        for name in self.outputs()[: len(self.plan.reads) + len(self.plan.writes)]:
            self.store(name)
        if self.plan.gate:
            self.thin_gate()

    def edge_flows(self) -> None:
        """What passes each gate of one number a head on its way from the tile's start and to its end."""
        b = self.b
        b.let("flowing", _total([real(self.readers[m].on(self.x)) * self.read_name(m) for m in self.reads]))
        b.let("before", _total([real(self.writers[r].on(self.x)) * self.write_name(r) for r in self.writes]))
        for name, value in (("flow", "flowing"), ("written", "before")):
            b.let(name, call("tl.sum", value, 1, keep_dims="True"))

    def thin_gate(self) -> None:
        """The gradient of a log-gate of one number a head: what passes it. Reads of the tile's first state behind it,
        writes before it that reach the last one, the first state's own way to the last, and pairs that straddle it:
        all that are read behind it, less those that are written there, too. Both sums are of the same products in
        float32, and a token's read of its own write is in neither."""
        b, t, gate = self.b, self.t, self.gate_operand()
        self.load_own()  # anew, so that it is not kept until here
        arriving: list[Expr] = []
        leaving: list[Expr] = []
        for m, r in self.pairs:
            read, write = self.operands(m, r, self.x)
            decayed = where(t.mask("earlier"), real(f"score_{m}{r}"), 0.0)
            pairs = b.let(f"pairs_{m}{r}", decayed * dot(read, trans(write)))
            arriving.append(call("tl.sum", pairs, 1, keep_dims="True"))
            leaving.append(call("tl.sum", pairs, 0, keep_dims="True"))
        left = b.let("left", trans(_total(leaving)), "of a write, by all pairs")
        flow = b.let("flow", Expr("flow") + _total(arriving) - left)
        passed = where(t.mask("earlier"), flow, 0.0) + where(t.mask("later"), Expr("written"), 0.0)
        b.let("passed", passed, "by each token's own flow, a row, for each gate, a column")
        whole = call("tl.sum", Expr("edges"), 0) * call("tl.sum", t.total(Expr(gate.name), True), 0)
        total = call("tl.sum", "passed", 0, keep_dims="True") + whole + trans(flow if t.late else -left)
        b.let(f"d_{gate.name}", total)
        self.store(f"d_{gate.name}")

    # -- a gate for each number ----------------------------------------------------------------------------------------

    def gated(self) -> None:
        """Products with decayed factors, decayed: pairs inside the tile, and what states give at its edges.

        A log-gate's gradient is what passes it: pairs enter at the read and leave at the write, so that a sum from
        the end has those that straddle a gate; what comes from the tile's start is read behind it; what goes to its end
        was written before, which is all of it less what is written later; the start's own way to the end passes all
        gates. The two terms of a pair have the same rounded factors, so that they cancel to float32's digits. With
        products in float32 that is not enough, and nothing is subtracted: with levels, each pair's share goes to the
        gates between its tokens ([ADR 3] in `docs/adr`)."""
        for name in [*(self.read_name(m) for m in self.reads), *(self.write_name(r) for r in self.writes)]:
            self.zeros(name)
        self.over_blocks()
        if self.plan.anchor == "start":
            self.at_start()
        else:
            self.join_scores()
            gate = self.load_gated()
            self.from_edges(gate)
            self.by_levels(gate)
            if self.plan.anchor == "blocks":
                self.inside_own_blocks(gate)
            for name in self.outputs()[: len(self.plan.reads) + len(self.plan.writes)]:
                self.store(name)
        if self.plan.gate:
            self.log_gate()

    def log_gate(self) -> None:
        """The gradient of the log-gate. The sum from the end is faster by a scan with the one anchor, and by a product
        with the other, which has fewer registers left."""
        b, flow, gradient = self.b, Expr("flow"), Expr(f"d_{self.gate_operand().name}")
        if self.plan.anchor == "start":
            b.let(gradient.op, self.passing(cumsum(flow, reverse=True)))
        else:
            with b.when(WHOLE):
                b.add(gradient, Expr("passed").cols)
            with b.otherwise():
                b.let(gradient.op, self.passing(masked_sum(self.t.mask("later"), flow, "PARTS") + flow))
        self.store(gradient.op)

    def passing(self, onward: Expr) -> Expr:
        """What passes each gate, from the sum of flows from its token on."""
        total = onward + Expr("passed").cols
        return total if self.t.late else total - "flow_of_reads"

    def at_start(self) -> None:
        """Operands are brought to the tile's start: reads by their decay from there, writes by its inverse. What states
        give and what pairs give is one sum there, which is brought back."""
        b, t = self.b, self.t
        low, high = self.halves()
        gate = self.load_gated()
        since = self.since(gate, "near", cumsum(gate))
        decay, inverse = exp(since), exp(-Expr("near"))
        readers, writers = self.brought(decay, inverse)
        if self.writes:
            whole = b.let("whole", t.total(gate, False))
            for r in self.writes:
                b.let(self.write_name(r), Expr(self.write_name(r)) * whole.cols)
        if self.plan.gate:
            before = b.let("before", _total([real(writers[r]) * self.write_name(r) for r in self.writes]))
            b.let("passed", call("tl.sum", before, 0) + Expr("edges") * "whole")
        for r in self.writes:
            for m in self.reading:
                b.add(Expr(self.write_name(r)), dot(high[m, r], readers[m]))
            if r in self.plan.writes:
                self.store(self.write_name(r), Expr(self.write_name(r)) * inverse)
        for m in self.reads:
            for r in range(len(self.writers)):
                b.add(Expr(self.read_name(m)), dot(low[m, r], writers[r]))
            if m in self.plan.reads:
                self.store(self.read_name(m), Expr(self.read_name(m)) * decay)
        if self.plan.gate:
            read = _total([real(readers[m]) * self.read_name(m) for m in self.reads])
            if not t.late:
                read = b.let("flow_of_reads", read)
            b.let("flow", read - _total([real(writers[r]) * self.write_name(r) for r in self.writes]))

    def halves(self) -> tuple[dict[tuple[int, int], Expr], dict[tuple[int, int], Expr]]:
        """Scores of each read's row with all writes, and of each write's row with all reads; of reads they may be
        kept, and of writes given."""
        b, rows = self.b, Expr("inside").rows
        if self.given:
            return {}, {(m, r): trans(b.load(f"score_{m}{r}", self.kept(m, r), rows)) for m, r in self.pairs}
        first = self.half(reads=bool(self.reads))
        scores = {(m, r): b.let(f"score_{m}{r}", self.used(m, r, first).to("DOT")) for m, r in self.pairs}
        for m, r in self.pairs if self.plan.scores else ():
            with b.when(Expr(f"scores_{m}{r}_ptr").given):
                b.store(self.kept(m, r), scores[m, r], rows & Expr("block").same(0))
        return scores, {at: trans(x) for at, x in scores.items()} if self.reads else scores

    def brought(self, decay: Expr, inverse: Expr) -> tuple[dict[int, Expr], dict[int, Expr]]:
        """Factors of reads and writes at their start, in the digits that a product takes, as far as they are used."""
        readers = {m: rounded(real(self.readers[m].on(self.x)) * decay) for m in self.reading if self.writes}
        writers = {r: rounded(real(p.on(self.x)) * inverse) for r, p in enumerate(self.writers) if self.reads}
        return ({m: self.b.let(f"reader_{m}", x) for m, x in readers.items()},
                {r: self.b.let(f"writer_{r}", x) for r, x in writers.items()})  # fmt: skip

    def from_edges(self, gate: Expr) -> None:
        """What states at the tile's edges give, decayed on its way, and what of it passes the gates."""
        b, t = self.b, self.t
        if self.plan.gate:
            self.zeros("flow")
            if not t.late:
                self.zeros("flow_of_reads")
            b.let("passed", Expr("edges") * t.total(gate, False))
            self.zeros(f"d_{self.gate_operand().name}")
        for r in self.writes:
            d_write = b.let(self.write_name(r), Expr(self.write_name(r)) * t.to_end(gate, False))
            if self.plan.gate:
                flow = b.let("flowing", real(self.writers[r].on(self.x)) * d_write)
                with self.cancelling(t.mask("earlier"), flow):
                    b.add(Expr("flow"), -flow)
                    b.add(Expr("passed"), call("tl.sum", flow, 0))
        for m in self.reads:
            d_read = b.let(self.read_name(m), Expr(self.read_name(m)) * t.from_start(gate, False))
            if self.plan.gate:
                flow = b.let("flowing", real(self.readers[m].on(self.x)) * d_read)
                with self.cancelling(t.behind, flow):
                    b.add(Expr("flow"), flow)
                    if not t.late:
                        b.add(Expr("flow_of_reads"), flow)
        for name in [*(self.write_name(r) for r in self.writes), *(self.read_name(m) for m in self.reads)]:
            self.own_pairs(name)

    @contextmanager
    def cancelling(self, passes: Expr, flow: Expr) -> Iterator[None]:
        """What is done of a flow where it may be subtracted; else it goes to the gates whose rows a mask names."""
        with self.b.when(WHOLE):
            self.b.add(Expr(f"d_{self.gate_operand().name}"), masked_sum(passes, flow, "PARTS"))
        with self.b.otherwise():
            yield

    def by_levels(self, gate: Expr) -> None:
        """Each pair in the block whose middle lies between its tokens, from the largest block down."""
        b, t = self.b, self.t
        with self.levels() as step:
            pair, factor = self.level(step, gate)
            upper = Expr("upper").rows
            for m, r in self.pairs:
                read, write = self.operands(m, r, self.x)
                reader = real(read) if self.writes else Expr("0.0")
                writer = real(write) if self.reads else Expr("0.0")
                rows = b.let("rows", rounded(where(upper, reader, writer) * factor))
                part = b.let("crossing", dot(self.used(m, r, pair), rows))
                if m in self.reads:
                    b.add(Expr(self.read_name(m)), where(upper, part * factor, 0.0))
                if self.writes:
                    b.add(Expr(self.write_name(r)), where(upper, 0.0, part * factor))
                if self.plan.gate:
                    flow = b.let("flowing", real(rows) * part)
                    same = Expr("half").rows.same(Expr("half").cols)
                    with self.cancelling(same & where(upper, t.behind, t.mask("earlier")), flow):
                        b.add(Expr("flow"), where(upper, flow, -flow))
                        if not t.late:
                            b.add(Expr("flow_of_reads"), where(upper, flow, 0.0))

    def inside_own_blocks(self, gate: Expr) -> None:
        """Pairs inside a block, anchored at its start."""
        b, t = self.b, self.t
        same = self.same_block()
        since = self.since(gate, "near", masked_sum(t.mask("upto") & same, gate, "GATE_PARTS"))
        decay, inverse = exp(since), exp(-Expr("near"))
        readers, writers = self.brought(decay, inverse)
        for m, r in self.pairs:
            if r in self.writes:
                part = b.let("crossing", dot(self.used(m, r, self.half(reads=False) & same), readers[m]))
                b.add(Expr(self.write_name(r)), part * inverse)
            if m in self.reads:
                part = b.let("crossing", dot(self.used(m, r, self.half(reads=True) & same), writers[r]))
                b.add(Expr(self.read_name(m)), part * decay)


def _total(terms: list[Expr]) -> Expr:
    """The sum of some values."""
    out = terms[0]
    for t in terms[1:]:
        out = out + t
    return out
