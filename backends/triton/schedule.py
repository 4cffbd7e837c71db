"""How a matrix scan is laid over programs: two schedules, used forward and backward.

*pass*: a program walks over the tiles of one sequence with a block of the state on chip, and keeps the state at each
tile's edge. *side*: a program computes one block of one side of one tile: what is read there, what the writes get as
gradient, and the gate's gradient. Tiles are C = 64 tokens; operands are [tokens, H, D] with D = I or J.
"""

from __future__ import annotations

from dataclasses import dataclass

from chunkc.backends.scan import Operand, Pair, ScanForm, Side, other
from chunkc.backends.triton.kernel import Builder, Expr, Kernel, call, dot, exp, masked_sum, trans, where
from chunkc.backends.writer import Lines

SIDES: tuple[Side, Side] = ("i", "j")
LOG_ZERO = "-10000.0"  # the least logarithm of a gate, as in the runtime
SIZE = {"i": "I", "j": "J"}


def _block(side: Side) -> str:
    return f"B{SIZE[side]}"


def _start(b: Builder) -> None:
    b.let("row", call("tl.arange", 0, "C"))


def _columns(b: Builder, side: Side, block: Expr) -> tuple[Expr, Expr]:
    """A block's columns of a side and which exist."""
    size = SIZE[side]
    cols = b.let(f"col_{side}", block * f"B{size}" + call("tl.arange", 0, f"B{size}"))
    return cols, b.let(f"has_{side}", cols < size)


def _operand(b: Builder, o: Operand | str, side: Side, thin: bool, notes: dict[str, str]) -> Expr:
    """Load a tile of an operand: [C, D], or [1, C] for a gate with one number a head."""
    name = o if isinstance(o, str) else o.name
    base = Expr("token") * "H" + "head"
    if thin:
        pointer = Expr(f"{name}_ptr") + base.cols
        return b.load(name, pointer, Expr("inside").cols, notes.get(name, ""))
    pointer = Expr(f"{name}_ptr") + base.rows * SIZE[side] + Expr(f"col_{side}").cols
    return b.load(name, pointer, Expr("inside").rows & Expr(f"has_{side}").cols, notes.get(name, ""))


def _gate(b: Builder, form: ScanForm, side: Side, notes: dict[str, str]) -> Expr | None:
    g = form.gate(side)
    if g is None:
        return None
    gate = _operand(b, g, side, g.thin, notes)
    if g.raw:  # its logarithm is taken outside, and finite
        return gate
    return b.let(g.name, call("tl.maximum", Expr(g.name), LOG_ZERO), "finite, so that sums are")


def _sums(mask: Expr, gate: Expr, thin: bool) -> Expr:
    """Masked sums of a gate over the tokens of a tile: mask [C, C] times gate."""
    if thin:  # one number a token: no product with it, one sum a row
        return call("tl.sum", where(mask, gate, 0.0), 1, keep_dims="True")
    return masked_sum(mask, gate)


def _total(gate: Expr, thin: bool) -> Expr:
    """The sum of a gate over the tokens of a tile."""
    return call("tl.sum", gate, 1 if thin else 0)


def _scaled(x: Expr, factor: Expr | None) -> Expr:
    return x if factor is None else x * factor


def _notes(form: ScanForm, spans: dict[str, str]) -> dict[str, str]:
    return {o.name: spans[o.node] for o in form.operands() if spans.get(o.node)}


def pass_kernel(form: ScanForm, lines: Lines, spans: dict[str, str], reverse: bool) -> Kernel:
    """The state at each tile's start; reversed, its gradient at each tile's end."""
    pairs = form.query_pairs() if reverse else form.write_pairs()
    name = f"{form.name}_ends" if reverse else f"{form.name}_states"
    b = Builder()
    notes = _notes(form, spans)
    sequence = b.let("sequence", call("tl.program_id", 0).to("tl.int64"))
    block = b.let("block", call("tl.program_id", 1))
    b.let("head", call("tl.program_id", 2))
    blocks = b.let("blocks_j", call("tl.cdiv", "J", "BJ"))
    _start(b)
    col_i, has_i = _columns(b, "i", block // blocks)
    col_j, has_j = _columns(b, "j", block % blocks)
    cell = b.let("cell", col_i.rows * "J" + col_j.cols)
    has = b.let("has", has_i.rows & has_j.cols)
    whole = (sequence * "H" + "head") * (Expr("I") * "J")
    state = b.load("state", Expr("initial_ptr") + whole + cell, has)
    first = b.load("first", Expr("first_tile_ptr") + sequence, None)
    count = b.load("count", Expr("tile_count_ptr") + sequence, None)
    with b.loop("step", count, "tiles") as step:
        tile = b.let("tile", first + count - 1 - step if reverse else first + step)
        b.store(Expr("states_ptr") + (tile * "H" + "head") * (Expr("I") * "J") + cell, state, has)
        start = b.load("start", Expr("tile_start_ptr") + tile, None)
        stop = b.load("stop", Expr("tile_stop_ptr") + tile, None)
        token = b.let("token", start + "row")
        b.let("inside", token < stop)
        mask = b.let("others", Expr("row").cols < Expr("row").rows if reverse else Expr("row").cols > Expr("row").rows,
                     "gates before each token" if reverse else "gates after each token")  # fmt: skip
        decay = state
        factors: dict[str, Expr | None] = {"i": None, "j": None}
        for side in SIDES:
            gate = _gate(b, form, side, notes)
            if gate is None:
                continue
            g = form.gate(side)
            assert g is not None
            factors[side] = b.let(f"to_edge_{side}", exp(_sums(mask, gate, g.thin)))
            total = exp(_total(gate, g.thin))
            decay = decay * (total.rows if side == "i" else total.cols)
        new = decay
        for n, p in enumerate(pairs):
            i = _operand(b, p.i, "i", False, notes)
            j = _operand(b, p.j, "j", False, notes)
            left, right = _scaled(i, factors["i"]), _scaled(j, factors["j"])
            key = b.let(f"left{n or ''}", left) if factors["i"] is not None else left
            value = b.let(f"right{n or ''}", right) if factors["j"] is not None else right
            new = new + dot(trans(key), value)
        b.let("state", new, lines.place(form.scan.span))
    b.store(Expr("last_ptr") + whole + cell, state, has)
    used = [f"{g.name}_ptr" for g in form.gates]
    used += [f"{x}_ptr" for p in pairs for x in (p.i, p.j)]
    doc = (f"The gradient of {form.scan.name} at each tile's end, from the last tile to the first." if reverse
           else f"{form.scan.name} at each tile's start.")  # fmt: skip
    tail = ("initial_ptr", "states_ptr", "last_ptr", "tile_start_ptr", "tile_stop_ptr", "first_tile_ptr",
            "tile_count_ptr")  # fmt: skip
    return Kernel(name, doc, (*dict.fromkeys(used), *tail), tuple(b.body))


@dataclass(frozen=True)
class SidePlan:
    """What a side kernel gives: reads of these queries, gradients of these writes, the gate's gradient.

    The gate's gradient has two parts: from a tile's `edges` (its first and last state) and from `pairs` inside it."""

    side: Side
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    forward: bool = False
    edges: bool = False
    pairs: bool = False

    @property
    def gate(self) -> bool:
        return self.edges or self.pairs


class SideKernel:
    """Builds one side kernel. Pairs of a read at token t and a write at token j < t meet in scores over the other side.

    A reader's factors are (c, d r) or, for a query of the other kind, (d r, c); forward only the c of queries over
    the other side is known, and what is read there is the result."""

    def __init__(self, form: ScanForm, plan: SidePlan, name: str, spans: dict[str, str]) -> None:
        self.form, self.plan, self.name = form, plan, name
        self.x, self.o = plan.side, other(plan.side)
        self.notes = _notes(form, spans)
        self.readers: list[Pair] = form.query_pairs()
        self.writers: list[Pair] = form.write_pairs()
        self.reads = tuple(range(len(self.readers))) if plan.gate else plan.reads
        self.writes = tuple(range(len(self.writers))) if plan.gate else plan.writes
        self.own = form.gate(self.x)
        self.far = form.gate(self.o)
        self.b = Builder()
        self.own_gate: Expr | None = None
        self.thin_far = self.far is not None and self.far.thin

    # Names of operands that the kernel takes: on its own side, and on the other.
    def own_names(self) -> list[str]:
        names = [self.writers[r].on(self.x) for r in range(len(self.writers)) if self.reads]
        names += [self.readers[m].on(self.x) for m in range(len(self.readers)) if self.writes]
        return list(dict.fromkeys(names))

    def far_names(self) -> list[str]:
        names = [self.readers[m].on(self.o) for m in (range(len(self.readers)) if self.writes else self.reads)]
        names += [p.on(self.o) for p in self.writers]
        return list(dict.fromkeys(names))

    def build(self) -> Kernel:
        b = self.b
        tile = b.let("tile", call("tl.program_id", 0).to("tl.int64"))
        block = b.let("block", call("tl.program_id", 1))
        b.let("head", call("tl.program_id", 2))
        _start(b)
        _columns(b, self.x, block)
        start = b.load("start", Expr("tile_start_ptr") + tile, None)
        stop = b.load("stop", Expr("tile_stop_ptr") + tile, None)
        token = b.let("token", start + "row")
        b.let("inside", token < stop)
        b.let("earlier", Expr("row").cols < Expr("row").rows)
        b.let("later", Expr("row").cols > Expr("row").rows)
        blocks = call("tl.cdiv", SIZE[self.o], _block(self.o))
        if self.plan.gate:  # in several walks, so that scores and sums over the states are not on chip at once
            assert self.own is not None
            wide = "(1, C)" if self.own.thin else f"(C, {_block(self.x)})"
            b.let(f"d_{self.own.name}", call("tl.zeros", wide, "tl.float32"))
            if self.plan.pairs:
                self.zero_scores()
                with b.loop("part", blocks, f"blocks of side {self.o}") as part:
                    self.across(part, edges=False)
                self.own_pairs()
            if self.plan.edges:
                self.gate_edges(blocks)
        else:
            self.accumulators()
            self.zero_scores()
            with b.loop("part", blocks, f"blocks of side {self.o}") as part:
                self.across(part, edges=True)
            self.own_edges()
            self.own_pairs()
        self.results()
        arguments = [f"{g.name}_ptr" for g in self.form.gates]
        arguments += [f"{n}_ptr" for n in [*self.own_names(), *self.far_names()]]
        arguments += self.state_arguments() + [f"{r}_ptr" for r in self.outputs()]
        arguments += ["tile_start_ptr", "tile_stop_ptr"]
        return Kernel(self.name, self.doc(), tuple(dict.fromkeys(arguments)), tuple(b.body), warps=8)

    def doc(self) -> str:
        if self.plan.forward:
            return f"What is read of {self.form.scan.name}: from the tile's first state and from writes inside it."
        return f"Gradients over ({', '.join(self.form.scan.i if self.x == 'i' else self.form.scan.j)}) of one tile."

    def state_arguments(self) -> list[str]:
        if self.plan.gate and not self.plan.edges:
            return []
        return (["states_ptr"] if self.reads else []) + (["ends_ptr"] if self.writes else [])

    def outputs(self) -> list[str]:
        out = [self.read_name(m) for m in self.plan.reads] + [self.write_name(r) for r in self.plan.writes]
        return out + ([f"d_{self.own.name}"] if self.plan.gate and self.own is not None else [])

    def read_name(self, m: int) -> str:
        """The value that a read gives on this side: the query's result, or the query's own gradient."""
        q = self.form.queries[m]
        return f"d_{q.name}" if q.side == self.x else f"out_{q.name}"

    def write_name(self, r: int) -> str:
        return f"d_{self.form.writes[r][0 if self.x == 'i' else 1].name}"

    def accumulators(self) -> None:
        b, wide = self.b, f"(C, {_block(self.x)})"
        for m in self.reads:
            b.let(self.read_name(m), call("tl.zeros", wide, "tl.float32"))
        for r in self.writes:
            b.let(self.write_name(r), call("tl.zeros", wide, "tl.float32"))

    def zero_scores(self) -> None:
        for m, r in self.pairs():
            self.b.let(f"score_{m}{r}", call("tl.zeros", "(C, C)", "tl.float32"))

    def pairs(self) -> list[tuple[int, int]]:
        readers = range(len(self.readers)) if self.writes else self.reads
        return [(m, r) for m in readers for r in range(len(self.writers))]

    # -- over blocks of the other side -------------------------------------------------------------------------------

    def across(self, part: Expr, edges: bool) -> None:
        """One block of the other side: what it adds to reads and gradients from the states, and to the scores."""
        b, o = self.b, self.o
        _columns(b, o, part)
        gate = _gate(b, self.form, o, self.notes)
        thin = self.thin_far
        for n in self.far_names():
            _operand(b, n, o, False, self.notes)
        if edges:
            self.from_states(gate, thin)
        self.scores(gate, thin)

    def from_states(self, gate: Expr | None, thin: bool) -> None:
        b, o = self.b, self.o
        from_start = to_end = None
        if gate is not None:
            if self.reads:
                from_start = b.let(f"from_start_{o}", exp(_sums(Expr("earlier"), gate, thin)))
            if self.writes:
                to_end = b.let(f"to_end_{o}", exp(_sums(Expr("later"), gate, thin)))
        for which, wanted in (("states", self.reads), ("ends", self.writes)):
            if wanted:
                self.load_state(which)
        for m in self.reads:
            left = _scaled(Expr(self.readers[m].on(o)), from_start)
            b.add(Expr(self.read_name(m)), dot(left, Expr("states")))
        for r in self.writes:
            left = _scaled(Expr(self.writers[r].on(o)), to_end)
            b.add(Expr(self.write_name(r)), dot(left, Expr("ends")))

    def load_state(self, which: str) -> None:
        """A block of a state as [other side, own side]."""
        i, j = Expr("col_i"), Expr("col_j")
        cell = i.cols * "J" + j.rows if self.x == "i" else i.rows * "J" + j.cols
        mask = Expr(f"has_{self.o}").rows & Expr(f"has_{self.x}").cols
        base = (Expr("tile") * "H" + "head") * (Expr("I") * "J")
        self.b.load(which, Expr(f"{which}_ptr") + base + cell, mask)

    def scores(self, gate: Expr | None, thin: bool) -> None:
        """Scores of reads with writes over the other side, as a matrix that is the same for (t, j) and (j, t).

        A gate there anchors each pair at its block's middle: the later half's rows are readers, the earlier half's
        writers, and one product of the rows with themselves holds all pairs of a level."""
        b, o = self.b, self.o
        if gate is None:
            for m, r in self.pairs():
                read, write = Expr(self.readers[m].on(o)), Expr(self.writers[r].on(o))
                if self.reads:
                    b.add(Expr(f"score_{m}{r}"), where(Expr("earlier"), dot(read, trans(write)), 0.0))
                if self.writes:
                    b.add(Expr(f"score_{m}{r}"), where(Expr("later"), dot(write, trans(read)), 0.0))
            return
        with b.loop("level", "LEVELS", "levels") as level:
            pair, factor = self.level(level, gate, thin, o)
            for m, r in self.pairs():
                read, write = Expr(self.readers[m].on(o)), Expr(self.writers[r].on(o))
                rows = b.let(f"rows_{m}{r}", where(Expr("upper").rows, read, write) * factor)
                b.add(Expr(f"score_{m}{r}"), where(pair, dot(rows, trans(rows)), 0.0))

    def level(self, level: Expr, gate: Expr, thin: bool, side: Side) -> tuple[Expr, Expr]:
        """Which pairs a level anchors, and each token's decay to or from the middle of its block."""
        b, row = self.b, Expr("row")
        upper = b.let("upper", ((row >> level) & 1).same(1), "in the later half of its block")
        half = b.let("half", row >> level)
        pair = b.let("pair", Expr("^", (half.rows, half.cols)).same(1), "across the middle of a block")
        inner = b.let("inner", half.rows.same(half.cols) & where(upper.rows, Expr("earlier"), Expr("later")),
                      "gates between a token and the middle")  # fmt: skip
        return pair, b.let(f"decay_{side}", exp(_sums(inner, gate, thin)))

    # -- on the own side ---------------------------------------------------------------------------------------------

    def own_operands(self) -> Expr | None:
        """Load the own side's operands; the gate's tile."""
        gate = _gate(self.b, self.form, self.x, self.notes)
        for n in self.own_names():
            _operand(self.b, n, self.x, False, self.notes)
        return gate

    def own_edges(self) -> None:
        """The own side's operands, and its decay of what came from the states."""
        self.own_gate = self.own_operands()
        if self.own_gate is not None and self.own is not None:
            self.edges(self.own_gate, self.own.thin)

    def own_pairs(self) -> None:
        if self.own is None:
            self.products(None)
            return
        self.b.note("pairs inside the tile, by the block whose middle lies between them")
        with self.b.loop("level", "LEVELS", "levels") as level:
            if self.plan.gate:  # loaded anew for each level, from cache: kept on chip they would spill
                self.own_gate = self.own_operands()
            assert self.own_gate is not None
            self.products(self.level(level, self.own_gate, self.own.thin, self.x))

    def edges(self, gate: Expr, thin: bool) -> None:
        """Decay of what comes from the tile's edges, and its part of the gate's gradient."""
        b = self.b
        if self.reads:
            decay = b.let(f"from_start_{self.x}", exp(_sums(Expr("earlier"), gate, thin)))
            for m in self.reads:
                b.let(self.read_name(m), Expr(self.read_name(m)) * decay)
        if self.writes:
            decay = b.let(f"to_end_{self.x}", exp(_sums(Expr("later"), gate, thin)))
            for r in self.writes:
                b.let(self.write_name(r), Expr(self.write_name(r)) * decay)

    def gate_edges(self, blocks: Expr) -> None:
        """The gate's gradient from what it decays on its way from the tile's first state and to its last."""
        b, x = self.b, self.x
        assert self.own is not None
        total = Expr(f"d_{self.own.name}")
        for m in self.reads:
            self.edge_walk(blocks, self.read_name(m), self.readers[m], "states", total, edges=False)
        b.let("edges", call("tl.zeros", f"({_block(x)},)", "tl.float32"))
        for r in self.writes:
            self.edge_walk(blocks, self.write_name(r), self.writers[r], "ends", total, edges=r == 0)
        gate = _gate(b, self.form, x, self.notes)
        assert gate is not None
        edges = Expr("edges") * exp(_total(gate, self.own.thin))
        b.add(total, call("tl.sum", edges.cols, 1, keep_dims="True") if self.own.thin else edges.cols)

    def edge_walk(self, blocks: Expr, name: str, pair: Pair, state: str, total: Expr, edges: bool) -> None:
        """What one operand makes of the state at an edge, folded into the gate's gradient.

        With `edges`, also the sum over the other side of the two edges' states, decayed over the tile."""
        b, x, o = self.b, self.x, self.o
        decayed, spread = ("earlier", "later") if state == "states" else ("later", "earlier")
        value = b.let(name, call("tl.zeros", f"(C, {_block(x)})", "tl.float32"))
        with b.loop("part", blocks, f"blocks of side {o}") as part:
            _columns(b, o, part)
            gate = _gate(b, self.form, o, self.notes)
            operand = _operand(b, pair.on(o), o, False, self.notes)
            self.load_state(state)
            decay = None if gate is None else exp(_sums(Expr(decayed), gate, self.thin_far))
            b.add(value, dot(_scaled(operand, decay), Expr(state)))
            if edges:
                self.load_state("states")
                product = Expr("states") * "ends"
                if gate is not None:
                    product = product * exp(_total(gate, self.thin_far)).rows
                b.add(Expr("edges"), call("tl.sum", product, 0))
        self.fold(value, pair.on(x), decayed, spread, total)

    def fold(self, value: Expr, operand: str, decayed: str, spread: str, total: Expr) -> None:
        """Decay a value on the own side, times its operand, to every gate that decays it."""
        b, x = self.b, self.x
        assert self.own is not None
        gate = _gate(b, self.form, x, self.notes)
        assert gate is not None
        decay = exp(_sums(Expr(decayed), gate, self.own.thin))
        factor = _operand(b, operand, x, False, self.notes)
        if self.own.thin:
            b.add(total, self.thin_spread(Expr(decayed), factor * value * decay))
        else:
            b.add(total, masked_sum(Expr(spread), factor * value * decay))

    @staticmethod
    def thin_spread(mask: Expr, flow: Expr) -> Expr:
        """What flows past each gate of one number a head, [1, C]: sums over the rows that the mask's columns name.

        A gate spreads to the tokens whose decay it is in, so the mask of the decays serves, read by columns."""
        return call("tl.sum", where(mask, call("tl.sum", flow, 1, keep_dims="True"), 0.0), 0, keep_dims="True")

    def products(self, level: tuple[Expr, Expr] | None) -> None:
        """Scores times the own side's factors: reads take writes, and gradients of writes take reads."""
        b, x = self.b, self.x
        if level is None:
            for m, r in self.pairs():
                score = Expr(f"score_{m}{r}")
                if m in self.plan.reads:
                    value = Expr(self.writers[r].on(x))
                    b.add(Expr(self.read_name(m)), dot(where(Expr("earlier"), score, 0.0), value))
                if self.writes:
                    value = Expr(self.readers[m].on(x))
                    b.add(Expr(self.write_name(r)), dot(where(Expr("later"), score, 0.0), value))
            return
        pair, factor = level
        upper = Expr("upper").rows
        flow: Expr | None = None
        for m, r in self.pairs():
            reader = Expr(self.readers[m].on(x)) if self.writes else Expr("0.0")
            writer = Expr(self.writers[r].on(x)) if self.reads else Expr("0.0")
            rows = b.let("rows", where(upper, reader, writer))
            part = b.let("crossing", dot(where(pair, Expr(f"score_{m}{r}"), 0.0), rows * factor) * factor)
            if m in self.plan.reads:
                b.add(Expr(self.read_name(m)), where(upper, part, 0.0))
            if self.plan.writes:
                b.add(Expr(self.write_name(r)), where(upper, 0.0, part))
            if self.plan.gate:
                flow = b.let("flow", rows * part if flow is None else flow + rows * part)
        if flow is not None and self.own is not None:
            if self.own.thin:
                b.add(Expr(f"d_{self.own.name}"), self.thin_spread(Expr("inner"), flow))
                return
            outward = Expr("half").rows.same(Expr("half").cols) & where(upper, Expr("later"), Expr("earlier"))
            b.add(Expr(f"d_{self.own.name}"), masked_sum(b.let("outward", outward), flow))

    def results(self) -> None:
        b, x = self.b, self.x
        base = Expr("token") * "H" + "head"
        mask = Expr("inside").rows & Expr(f"has_{x}").cols
        for name in self.outputs():
            value = Expr(name)
            if self.plan.pairs and not self.plan.edges:
                value = self.with_edges(name)
            if self.own is not None and self.own.thin and name == f"d_{self.own.name}":
                b.store(Expr(f"{name}_ptr") + self.thin_cell(), value, Expr("inside").cols)
            else:
                b.store(Expr(f"{name}_ptr") + base.rows * SIZE[x] + Expr(f"col_{x}").cols, value, mask)

    def thin_cell(self) -> Expr:
        """Where a gate of one number a head keeps this program's part of its gradient: [tokens, H, blocks]."""
        base = Expr("token") * "H" + "head"
        return (base * call("tl.cdiv", SIZE[self.x], _block(self.x)) + "block").cols

    def with_edges(self, name: str) -> Expr:
        """The sum of a gate's gradient from pairs and what the kernel for the edges stored."""
        b, x = self.b, self.x
        assert self.own is not None
        base = Expr("token") * "H" + "head"
        if self.own.thin:
            pointer, mask = self.thin_cell(), Expr("inside").cols
        else:
            pointer = base.rows * SIZE[x] + Expr(f"col_{x}").cols
            mask = Expr("inside").rows & Expr(f"has_{x}").cols
        b.add(Expr(name), call("tl.load", Expr(f"{name}_ptr") + pointer, mask=mask.text(), other="0.0"))
        return Expr(name)
