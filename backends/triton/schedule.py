"""The walk over the tiles of a sequence: a program has a block of the state on chip, and stores it at tiles' edges.

Where sequences and heads are few, each sequence is cut into segments. A state is linear in the one it starts from, so
segments are walked over at once from zero, for their last states and for what they decay; a small kernel puts these
together to the states that segments start with; then they are walked over from those. All of it is in the order of
the walk, which for gradients is from the last token to the first."""

from __future__ import annotations

from chunkc.backends.scan import Operand, ScanForm, Side
from chunkc.backends.triton.kernel import Builder, Expr, Kernel, call, dot, maximum, trans, where
from chunkc.backends.triton.tile import FLOOR, SIZE, Tile, block, exp, notes_of, real, scaled
from chunkc.backends.writer import Lines

SIDES: tuple[Side, Side] = ("i", "j")
WALKS = '''
def segment_of(seq: Sequences, H: int, I: int, J: int) -> int:
    """How many tokens a program walks over: whole sequences, or a segment if programs would leave a GPU idle.

    It depends on how many sequences and heads there are, not on tokens: a longer sequence begins alike."""
    return CUT if programs(seq.count * H, I, J) < IDLE else max(seq.most, 1)


def walked_tiles(seq: Sequences, launch: Any, gated: str, initial: Tensor | None, states: Tensor) -> Tensor | None:
    """Fill the states at tiles' edges; the last states. `gated` are the sides that have a gate. Without a state
    to start from it is zero, and no last one is kept."""
    last = None if initial is None else torch.empty_like(initial)
    H, I, J = states.shape[1:]
    segment = segment_of(seq, H, I, J)
    segments = max(-(-seq.most // segment), 1)
    if seq.count == 0:
        return last
    if segments == 1:
        launch(segment, segments, initial, states, last)
        return last
    from_zero = states.new_empty((seq.count * segments, H, I, J), dtype=torch.float32)
    entered = torch.empty_like(from_zero)
    decays = {f"decay_{s}": entered.new_empty((seq.count * segments, H, I if s == "i" else J)) for s in gated}
    launch(segment, segments, None, None, from_zero, **decays)
    joined[(seq.count * H * cdiv(I * J, JOINED),)](
        from_zero, decays.get("decay_i"), decays.get("decay_j"), initial, entered, last, places(seq)[0],
        seq.tokens, segment, segments, H=H, I=I, J=J, D=I * J, BD=JOINED,
    )
    launch(segment, segments, entered, states, None)
    return last
'''


def pass_kernel(form: ScanForm, lines: Lines, spans: dict[str, str], reverse: bool, totals: bool) -> Kernel:
    """The state at each tile's start; reversed, its gradient at each tile's end.

    `totals`: it also keeps the gates' sums over each tile [tiles, H, D], by which other kernels choose their tiles."""
    return _Walk(form, lines, spans, reverse, totals).kernel()


class _Walk:
    def __init__(self, form: ScanForm, lines: Lines, spans: dict[str, str], reverse: bool, totals: bool) -> None:
        self.form, self.lines, self.reverse = form, lines, reverse
        self.pairs = form.query_pairs() if reverse else form.write_pairs()
        self.t = Tile(form, notes_of(form, spans))
        self.b = self.t.b
        self.gates = [g for side in SIDES if (g := form.gate(side)) is not None]
        self.wide = [g for g in self.gates if not g.thin] if totals else []

    def kernel(self) -> Kernel:
        b, form = self.b, self.form
        cell, has = self.place()
        whole = (Expr("walk") * "H" + "head") * (Expr("I") * "J")
        state = b.let("state", call("tl.zeros", "(BI, BJ)", "tl.float32"))
        with b.when(Expr("initial_ptr").given):
            b.let("state", real(call("tl.load", Expr("initial_ptr") + whole + cell, mask=has.text(), other="0.0")))
        for g in self.gates:
            b.let(f"decayed_{g.side}", call("tl.zeros", "(1,)" if g.thin else f"({block(g.side)},)", "tl.float32"))
            if g.thin:
                b.note("one number a token is no asynchronous copy: it is loaded a tile ahead")
                first = Expr("first")
                self.ahead(g, maximum(first + (Expr("count") - 1) * "C", first) if self.reverse else first)
        masks_at = len(b.body)
        with b.loop("step", "count", "tiles") as step:
            self.tile(step, cell, has)
        with b.when(Expr("last_ptr").given):
            b.store(Expr("last_ptr") + whole + cell, state, has)
        for g in self.gates:
            with b.when(Expr(f"decay_{g.side}_ptr").given):
                self.store_sums(g, f"decay_{g.side}_ptr", Expr("walk") * "H" + "head", Expr(f"decayed_{g.side}"))
        self.t.masks_at = masks_at
        used = [f"{g.name}_ptr" for g in form.gates] + [f"{x}_ptr" for p in self.pairs for x in (p.i, p.j)]
        doc = (f"The gradient of {form.scan.name} at each tile's end, from the last tile to the first." if self.reverse
               else f"{form.scan.name} at each tile's start.")  # fmt: skip
        numbers = form.numbers() if self.reverse else []
        tail = (*numbers, "initial_ptr", "states_ptr", "last_ptr", "offsets_ptr", "first_tile_ptr", "tokens", "each",
                "segment", "segments")  # fmt: skip
        kept = (*(f"totals_{g.side}_ptr" for g in self.wide), *(f"decay_{g.side}_ptr" for g in self.gates))
        name = f"{form.name}_ends" if self.reverse else f"{form.name}_states"
        return Kernel(name, doc, (*dict.fromkeys(used), *tail, *kept), self.t.closed())

    def place(self) -> tuple[Expr, Expr]:
        """Where the program's tokens lie; the cells of its block of the state, and which of them there are."""
        b = self.b
        program = b.let("program", call("tl.program_id", 0))
        blocks_i, blocks_j = (b.let(f"blocks_{s}", call("tl.cdiv", SIZE[s], block(s))) for s in SIDES)
        b.let("head", program // (blocks_i * blocks_j) % "H")
        walk = b.let("walk", (program // (blocks_i * blocks_j) // "H").to("tl.int64"))
        sequence = b.let("sequence", walk // "segments")
        turn = b.let("turn", walk % "segments", "of a segment, in the order of the walk")
        b.let("row", call("tl.arange", 0, "C"))
        self.t.columns("i", program // blocks_j % blocks_i)
        self.t.columns("j", program % blocks_j)
        begin = b.let("begin", call("sequence_start", "offsets_ptr", sequence, "tokens"))
        end = b.let("end", call("sequence_start", "offsets_ptr", sequence + 1, "tokens"))
        own = b.let("own", maximum(call("tl.cdiv", end - begin, "segment"), 1), "segments of this sequence")
        skipped = b.let("skipped", ((own - 1 - turn) if self.reverse else turn) * "segment")
        first = b.let("first", begin + skipped)
        stop = b.let("stop", where(turn < own, call("tl.minimum", first + "segment", end), first))
        b.let("first_tile", call("sequence_tile", "first_tile_ptr", sequence, "each") + skipped // "C")
        b.let("count", call("tl.cdiv", stop - first, "C"))
        cell = b.let("cell", Expr("col_i").rows * "J" + Expr("col_j").cols)
        return cell, b.let("has", Expr("has_i").rows & Expr("has_j").cols & (turn < own))

    def tile(self, step: Expr, cell: Expr, has: Expr) -> None:
        """One step of the walk."""
        b, t = self.b, self.t
        place = b.let("place", Expr("count") - 1 - step if self.reverse else step)
        start = b.let("start", Expr("first") + place * "C")
        t.cells(start)
        decay = state = Expr("state")
        factors: dict[Side, Expr | None] = {"i": None, "j": None}
        for g in self.gates:
            if g.thin:
                gate = b.let(g.name, call("tl.maximum", real(f"{g.name}_ahead"), FLOOR))
                self.ahead(g, maximum(start - "C", "first") if self.reverse else start + "C")
            else:
                t.gate(g)
                gate = Expr(g.name)
            edge = t.from_start if self.reverse else t.to_end
            factors[g.side] = b.let(f"to_edge_{g.side}", edge(gate, g.thin))
            total = b.let(f"total_{g.side}", call("tl.sum", gate, 1 if g.thin else 0))
            b.add(Expr(f"decayed_{g.side}"), total)
            decay = decay * (exp(total).rows if g.side == "i" else exp(total).cols)
        tile = b.let("tile", (Expr("first_tile") + place) * "H" + "head")
        with b.when(Expr("states_ptr").given):
            b.store(Expr("states_ptr") + tile * (Expr("I") * "J") + cell, state, has)
            for g in self.wide:
                self.store_sums(g, f"totals_{g.side}_ptr", tile, Expr(f"total_{g.side}"))
        new = decay
        for n, p in enumerate(self.pairs):
            found: dict[Side, Expr | None] = dict(factors)
            if self.reverse and (scale := self.form.scales[n]):  # with a decay, where there is one
                side: Side = "i" if factors["i"] is not None or factors["j"] is None else "j"
                found[side] = Expr(scale) if (own := factors[side]) is None else own * scale
            key, value = scaled(t.load(p.i, "i"), found["i"]), scaled(t.load(p.j, "j"), found["j"])
            key = b.let(f"left{n or ''}", key) if found["i"] is not None else key
            value = b.let(f"right{n or ''}", value) if found["j"] is not None else value
            new = new + dot(trans(key), value)
        b.let("state", new, self.lines.place(self.form.scan.span))

    def ahead(self, g: Operand, start: Expr) -> None:
        """Load the gates of a tile that the walk has not come to; at its end, of none or of the last one again."""
        token = self.b.let("token", start + Expr("row").cols)
        pointer = Expr(f"{g.name}_ptr") + token * "H" + "head"
        self.b.load(f"{g.name}_ahead", pointer, token < "stop", self.t.notes.get(g.name, ""))

    def store_sums(self, g: Operand, name: str, row: Expr, sums: Expr) -> None:
        """Store what a gate adds up to [rows, H, D], once for all blocks of the other side."""
        blocks_j, program = Expr("blocks_j"), Expr("program")
        other = program % blocks_j if g.side == "i" else program // blocks_j % "blocks_i"
        mask = Expr(f"has_{g.side}") & other.same(0) & (Expr("turn") < "own")
        self.b.store(Expr(name) + row * SIZE[g.side] + f"col_{g.side}", sums, mask)


def join_kernel() -> Kernel:
    """The states that segments start with, of their last states from zero and of what they decay."""
    b = Builder()
    program = b.let("program", call("tl.program_id", 0))
    blocks = b.let("blocks", call("tl.cdiv", "D", "BD"))
    head = b.let("head", program // blocks % "H")
    sequence = b.let("sequence", (program // blocks // "H").to("tl.int64"))
    cell = b.let("cell", program % blocks * "BD" + call("tl.arange", 0, "BD"))
    has = b.let("has", cell < "D")
    begin = b.let("begin", call("sequence_start", "offsets_ptr", sequence, "tokens"))
    end = b.let("end", call("sequence_start", "offsets_ptr", sequence + 1, "tokens"))
    b.let("own", call("tl.cdiv", end - begin, "segment"), "segments of this sequence")
    whole = (sequence * "H" + head) * "D" + cell
    state = b.let("state", call("tl.zeros", "(BD,)", "tl.float32"))
    with b.when(Expr("initial_ptr").given):
        b.let("state", real(call("tl.load", Expr("initial_ptr") + whole, mask=has.text(), other="0.0")))
    with b.loop("turn", "own", "segments", stages="3") as turn:
        row = b.let("row", (sequence * "segments" + turn) * "H" + head)
        b.store(Expr("entered_ptr") + row * "D" + cell, state, has)
        for side, number in (("i", cell // "J"), ("j", cell % "J")):
            with b.when(Expr(f"decay_{side}_ptr").given):
                pointer = Expr(f"decay_{side}_ptr") + row * SIZE[side] + number
                b.let("state", state * exp(call("tl.load", pointer, mask=has.text(), other="0.0")))
        b.let("state", state + call("tl.load", Expr("from_zero_ptr") + row * "D" + cell, mask=has.text(), other="0.0"))
    with b.when(Expr("last_ptr").given):
        b.store(Expr("last_ptr") + whole, state, has)
    doc = "The states that segments start with, and the last ones, from where each segment comes to from zero."
    arguments = ("from_zero_ptr", "decay_i_ptr", "decay_j_ptr", "initial_ptr", "entered_ptr", "last_ptr", "offsets_ptr",
                 "tokens", "segment", "segments")  # fmt: skip
    return Kernel("joined", doc, arguments, tuple(b.body), ends=(("cell", "D"),))
