"""Kernels for the gradients of gates that are no logarithms, and of two gates beside each other.

A raw gate may be 0, and its gradient is divided by its value: sums that cancel would be noise there. So each pair's
share goes to the gates that it passes, level by level, as a sum of terms of one sign ([ADR 3] in `docs/adr`). With one
gate the work is shared by two kernels, for registers: from a tile's edges, and from pairs inside it."""

from __future__ import annotations

from dataclasses import dataclass

from chunkc.backends.scan import Operand, Pair, ScanForm, Side
from chunkc.backends.triton.kernel import Expr, Kernel, call, dot, masked_sum, trans, where
from chunkc.backends.triton.tile import SIZE, OneSide, block, columns, real, scaled


@dataclass(frozen=True)
class GatePlan:
    """Which part of the gradient of a side's gate a kernel gives: from a tile's `edges`, from `pairs` inside it."""

    side: Side
    edges: bool
    pairs: bool


class GateKernel(OneSide):
    """Builds the kernel for one part of a gate's gradient."""

    def __init__(self, form: ScanForm, plan: GatePlan, name: str, spans: dict[str, str]) -> None:
        super().__init__(form, plan.side, name, spans)
        self.plan = plan
        own, self.far = form.gate(self.x), form.gate(self.o)
        assert own is not None
        self.own: Operand = own
        self.thin_far = self.far is not None and self.far.thin
        self.pairs = [(m, r) for m in range(len(self.readers)) for r in range(len(self.writers))]

    def build(self) -> Kernel:
        b = self.b
        self.t.program(self.x)
        with b.when(self.t.some):
            self.inside()
        names = [*(g.name for g in self.form.gates), *self.names(self.x), *self.names(self.o)]
        names += ["states", "ends"] if self.plan.edges else []
        arguments = [f"{n}_ptr" for n in dict.fromkeys([*names, self.total.op])]
        places = [*self.form.numbers(), "tile_start_ptr", "tile_stop_ptr", "tokens", "each"]
        doc = f"The gradient of {self.own.name}, from {self.what()} of one tile."
        return Kernel(self.name, doc, (*arguments, *places), self.t.closed())

    def inside(self) -> None:
        """All that is done to a tile."""
        wide = "(1, C)" if self.own.thin else f"(C, {block(self.x)})"
        self.b.let(self.total.op, call("tl.zeros", wide, "tl.float32"))
        if self.plan.pairs:  # in several walks, so that scores and sums over the states are not on chip at once
            self.from_pairs()
        if self.plan.edges:
            self.from_edges()
        self.result()

    def what(self) -> str:
        return " and ".join(["pairs"] * self.plan.pairs + ["the edges"] * self.plan.edges)

    @property
    def total(self) -> Expr:
        return Expr(f"d_{self.own.name}")

    def names(self, side: Side) -> list[str]:
        return list(dict.fromkeys(p.on(side) for p in (*self.writers, *self.readers)))

    def blocks(self) -> Expr:
        return call("tl.cdiv", SIZE[self.o], block(self.o))

    # -- pairs inside the tile -----------------------------------------------------------------------------------------

    def from_pairs(self) -> None:
        b, t, x = self.b, self.t, self.x
        for m, r in self.pairs:
            b.let(f"score_{m}{r}", call("tl.zeros", "(C, C)", "tl.float32"))
        with b.loop("part", self.blocks(), f"blocks of side {self.o}") as part:
            columns(b, self.o, part)
            gate = t.gate(self.far)
            for n in self.names(self.o):
                t.load(n, self.o)
            self.scores(gate)
        for m, r in self.pairs:
            if scale := self.form.scales[m]:
                b.let(f"score_{m}{r}", Expr(f"score_{m}{r}") * scale)
        b.note("pairs inside the tile, by the block whose middle lies between them")
        with b.loop("level", "LEVELS", "levels") as level:
            gate = t.gate(self.own)  # loaded anew for each level, from cache: kept on chip they would spill
            for n in self.names(x):
                t.load(n, x)
            assert gate is not None
            pair, factor = t.level(level, gate, self.own.thin)
            flow: Expr | None = None
            for m, r in self.pairs:
                rows = b.let("rows", where(Expr("upper").rows, *self.operands(m, r, x)))
                crossing = dot(where(pair, Expr(f"score_{m}{r}"), 0.0), rows * factor) * factor
                b.let("crossing", crossing)
                flow = b.let("flow", rows * "crossing" if flow is None else flow + rows * "crossing")
            assert flow is not None
            if self.own.thin:
                b.add(self.total, self.thin_spread(Expr("inner"), flow))
            else:
                behind = t.behind
                outward = Expr("half").rows.same(Expr("half").cols) & where(
                    Expr("upper").rows, behind, t.mask("earlier")
                )
                b.add(self.total, masked_sum(b.let("outward", outward), flow, "PARTS"))

    def operands(self, m: int, r: int, side: Side) -> tuple[Expr, Expr]:
        return real(self.readers[m].on(side)), real(self.writers[r].on(side))

    def scores(self, gate: Expr | None) -> None:
        """Scores of reads with writes over the other side: reads below the diagonal, writes above."""
        b, t = self.b, self.t
        if gate is None:
            for m, r in self.pairs:
                read, write = Expr(self.readers[m].on(self.o)), Expr(self.writers[r].on(self.o))
                low, high = dot(read, trans(write)), dot(write, trans(read))
                b.add(Expr(f"score_{m}{r}"), where(t.mask("earlier"), low, high))
            return
        with b.loop("level", "LEVELS", "levels") as level:
            pair, factor = t.level(level, gate, self.thin_far)
            for m, r in self.pairs:
                rows = b.let(f"rows_{m}{r}", where(Expr("upper").rows, *self.operands(m, r, self.o)) * factor)
                b.add(Expr(f"score_{m}{r}"), where(pair, dot(rows, trans(rows)), 0.0))

    # -- the tile's edges ----------------------------------------------------------------------------------------------

    def from_edges(self) -> None:
        """From what the gate decays on its way from the tile's first state and to its last."""
        b, t = self.b, self.t
        for m in range(len(self.readers)):
            self.edge_walk(f"read_{m}", self.readers[m], "states", edges=False, scale=self.form.scales[m])
        b.let("edges", call("tl.zeros", f"({block(self.x)},)", "tl.float32"))
        for r in range(len(self.writers)):
            self.edge_walk(f"written_{r}", self.writers[r], "ends", edges=r == 0)
        gate = t.gate(self.own)
        assert gate is not None
        edges = Expr("edges") * t.total(gate, self.own.thin)
        b.add(self.total, call("tl.sum", edges.cols, 1, keep_dims="True") if self.own.thin else edges.cols)

    def edge_walk(self, name: str, pair: Pair, state: str, edges: bool, scale: str = "") -> None:
        """What one operand makes of the state at an edge, folded into the gate's gradient.

        With `edges`, also the sum over the other side of the two edges' states, decayed over the tile."""
        b, t, x, o = self.b, self.t, self.x, self.o
        value = b.let(name, call("tl.zeros", f"(C, {block(x)})", "tl.float32"))
        with b.loop("part", self.blocks(), f"blocks of side {o}") as part:
            columns(b, o, part)
            gate = t.gate(self.far)
            operand = t.load(pair.on(o), o)
            self.load_state(state)
            decay = None if gate is None else self.decay(state, gate, self.thin_far)
            b.add(value, dot(scaled(operand, decay), Expr(state)))
            if edges:
                self.load_state("states")
                product = real("states") * real("ends")
                if gate is not None:
                    product = product * t.total(gate, self.thin_far).rows
                b.add(Expr("edges"), call("tl.sum", product, 0))
        gate = t.gate(self.own)
        assert gate is not None
        flow = real(t.load(pair.on(x), x)) * value * self.decay(state, gate, self.own.thin)
        flow = flow * scale if scale else flow
        if self.own.thin:
            mask = t.since if state == "states" else t.mask("later")
            b.add(self.total, self.thin_spread(mask, flow))
        else:
            passed = t.behind if state == "states" else t.mask("earlier")
            b.add(self.total, masked_sum(passed, flow, "PARTS"))

    def decay(self, state: str, gate: Expr, thin: bool) -> Expr:
        return self.t.from_start(gate, thin) if state == "states" else self.t.to_end(gate, thin)

    def load_state(self, which: str) -> None:
        """A block of a state as [other side, own side]."""
        i, j = Expr("col_i"), Expr("col_j")
        cell = i.cols * "J" + j.rows if self.x == "i" else i.rows * "J" + j.cols
        mask = Expr(f"has_{self.o}").rows & Expr(f"has_{self.x}").cols
        self.b.load(which, Expr(f"{which}_ptr") + (Expr("tile") * "H" + "head") * (Expr("I") * "J") + cell, mask)

    @staticmethod
    def thin_spread(mask: Expr, flow: Expr) -> Expr:
        """What flows past each gate of one number a head, [1, C]: sums over the rows that the mask's columns name.

        A gate spreads to the tokens whose decay it is in, so the mask of the decays serves, read by columns."""
        return call("tl.sum", where(mask, call("tl.sum", flow, 1, keep_dims="True"), 0.0), 0, keep_dims="True")

    def result(self) -> None:
        b, x = self.b, self.x
        pointer, mask = self.t.pointer(self.total.op, x)
        if self.own.thin:  # each program's part of it: [tokens, H, blocks]
            cell = (Expr("base") + Expr("row") * "H") * call("tl.cdiv", SIZE[x], block(x)) + "block"
            pointer, mask = Expr(f"{self.total.op}_ptr") + cell.cols, Expr("inside").cols
        if self.plan.pairs and not self.plan.edges:
            b.add(self.total, call("tl.load", pointer, mask=mask.text(), other="0.0"))
        b.store(pointer, self.total, mask)
