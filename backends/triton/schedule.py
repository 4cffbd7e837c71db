"""The walk over the tiles of a sequence: a program has a block of the state on chip, and stores it at tiles' edges.

Where sequences and heads are few, each sequence is cut into segments, which are walked over at once. The first starts
with the sequence's state, the others from zero. A state is linear in the one it starts from, so a second kernel puts
together the state that a segment starts with, of what those before come to and what they decay, and adds what is left
of it to the segment's states at tiles' edges, as far in as anything is. All of it is in the order of the walk, which
for gradients is from the last token to the first."""

from __future__ import annotations

from chunkc.backends.scan import Operand, ScanForm, Side
from chunkc.backends.triton.kernel import Builder, Expr, Kernel, call, dot, maximum, minimum, trans, where
from chunkc.backends.triton.tile import FLOOR, SIZE, Tile, block, columns, exp, notes_of, real, scaled
from chunkc.backends.writer import Lines

SIDES: tuple[Side, Side] = ("i", "j")
FADED = 104  # nats after which nothing is left of a float32
# What a walk over segments keeps of a side's gate: its sums over each segment, and up to each of a segment's tiles, and
# at how many of these something is left.
SUMS = ("decay", "passed", "alive")
WALKS = '''
def segment_of(seq: Sequences, H: int, I: int, J: int, enough: int) -> int:
    """How many tokens a program walks over: whole sequences, or a segment if these are not enough programs.

    It depends on how many sequences and heads there are, not on tokens: a longer sequence begins alike."""
    return CUT if programs(seq.count * H, I, J) < enough else max(seq.most, 1)


def walked_tiles(
    seq: Sequences, launch: Any, gated: str, enough: int, initial: Tensor | None, states: Tensor, back: bool
) -> Tensor | None:
    """Fill the states at tiles' edges; the last states. `gated` are the sides that have a gate; `back`: from the last
    token to the first. Without a state to start from it is zero, and no last one is kept."""
    last = None if initial is None else torch.empty_like(initial)
    H, I, J = states.shape[1:]
    segment = segment_of(seq, H, I, J, enough)
    segments = max(-(-seq.most // segment), 1)
    if seq.count == 0:
        return last
    if segments == 1:
        launch(segment, segments, initial, states, last)
        return last
    walks, size, real = seq.count * segments, {"i": I, "j": J}, torch.float32
    reached = states.new_empty((walks, H, I, J), dtype=real)
    decay = {f"decay_{s}": states.new_empty((walks, H, size[s]), dtype=real) for s in gated}
    passed = {f"passed_{s}": states.new_empty((len(states), H, size[s]), dtype=real) for s in gated}
    alive = {f"alive_{s}": states.new_empty((walks, H, size[s]), dtype=torch.int32) for s in gated}
    launch(segment, segments, initial, states, reached, **decay, **passed, **alive)
    offsets, _, _, first, tokens, each, _ = places(seq)
    completed[(programs(walks * H, I, J),)](
        states, reached, last, decay.get("decay_i"), decay.get("decay_j"), passed.get("passed_i"),
        passed.get("passed_j"), alive.get("alive_i"), alive.get("alive_j"), offsets, first, tokens, each,
        segment, segments, H=H, I=I, J=J, C=TILE, BI=BLOCK, BJ=BLOCK, BACK=int(back),
    )
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
            own = Expr("initial_ptr") + (Expr("sequence") * "H" + "head") * (Expr("I") * "J") + cell
            starts = has & Expr("turn").same(0)
            b.let("state", real(call("tl.load", own, mask=starts.text(), other="0.0")))
        for g in self.gates:
            shape = "(1,)" if g.thin else f"({block(g.side)},)"
            b.let(f"decayed_{g.side}", call("tl.zeros", shape, "tl.float32"))
            b.let(f"tiles_{g.side}", call("tl.zeros", shape, "tl.int32"))
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
                self.store_sums(g, f"alive_{g.side}_ptr", Expr("walk") * "H" + "head", Expr(f"tiles_{g.side}"))
        self.t.masks_at = masks_at
        used = [f"{g.name}_ptr" for g in form.gates] + [f"{x}_ptr" for p in self.pairs for x in (p.i, p.j)]
        doc = (f"The gradient of {form.scan.name} at each tile's end, from the last tile to the first." if self.reverse
               else f"{form.scan.name} at each tile's start.")  # fmt: skip
        numbers = form.numbers() if self.reverse else []
        tail = (*numbers, "initial_ptr", "states_ptr", "last_ptr", "offsets_ptr", "first_tile_ptr", "tokens", "each",
                "segment", "segments")  # fmt: skip
        kept = (*(f"totals_{g.side}_ptr" for g in self.wide), *(f"{n}_{g.side}_ptr" for g in self.gates for n in SUMS))
        name = f"{form.name}_ends" if self.reverse else f"{form.name}_states"
        return Kernel(name, doc, (*dict.fromkeys(used), *tail, *kept), self.t.closed())

    def place(self) -> tuple[Expr, Expr]:
        """Where the program's tokens lie; the cells of its block of the state, and which of them there are."""
        self.b.let("row", call("tl.arange", 0, "C"))
        turn, own = _walk_of(self.b)
        skipped = self.b.let("skipped", ((own - 1 - turn) if self.reverse else turn) * "segment")
        return _tokens(self.b, skipped, turn < own)

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
            decay = decay * (exp(total).rows if g.side == "i" else exp(total).cols)
        tile = b.let("tile", (Expr("first_tile") + place) * "H" + "head")
        b.store(Expr("states_ptr") + tile * (Expr("I") * "J") + cell, state, has)
        for g in self.wide:
            self.store_sums(g, f"totals_{g.side}_ptr", tile, Expr(f"total_{g.side}"))
        for g in self.gates:
            with b.when(Expr(f"passed_{g.side}_ptr").given):
                passed = Expr(f"decayed_{g.side}")
                self.store_sums(g, f"passed_{g.side}_ptr", tile, passed)
                b.add(Expr(f"tiles_{g.side}"), where(passed > -FADED, 1, 0))
                b.add(passed, Expr(f"total_{g.side}"))
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


def _walk_of(b: Builder) -> tuple[Expr, Expr]:
    """Which segment of which sequence and head a program walks over, and its columns of the state: the segment's turn,
    and how many the sequence has."""
    program = b.let("program", call("tl.program_id", 0))
    blocks_i, blocks_j = (b.let(f"blocks_{s}", call("tl.cdiv", SIZE[s], block(s))) for s in SIDES)
    b.let("head", program // (blocks_i * blocks_j) % "H")
    walk = b.let("walk", (program // (blocks_i * blocks_j) // "H").to("tl.int64"))
    sequence = b.let("sequence", walk // "segments")
    turn = b.let("turn", walk % "segments", "of a segment, in the order of the walk")
    columns(b, "i", program // blocks_j % blocks_i)
    columns(b, "j", program % blocks_j)
    begin = b.let("begin", call("sequence_start", "offsets_ptr", sequence, "tokens"))
    end = b.let("end", call("sequence_start", "offsets_ptr", sequence + 1, "tokens"))
    own = b.let("own", maximum(call("tl.cdiv", end - begin, "segment"), 1), "segments of this sequence")
    return turn, own


def _tokens(b: Builder, skipped: Expr, wanted: Expr) -> tuple[Expr, Expr]:
    """The tiles of a segment behind so many tokens, none if it is not wanted; the program's cells of the state, and
    which there are."""
    first = b.let("first", Expr("begin") + skipped)
    stop = b.let("stop", where(wanted, minimum(first + "segment", "end"), first))
    b.let("first_tile", call("sequence_tile", "first_tile_ptr", "sequence", "each") + skipped // "C")
    b.let("count", call("tl.cdiv", stop - first, "C"))
    cell = b.let("cell", Expr("col_i").rows * "J" + Expr("col_j").cols)
    return cell, b.let("has", Expr("has_i").rows & Expr("has_j").cols & (Expr("turn") < "own"))


def complete_kernel() -> Kernel:
    """What is left of the state that a segment starts with, added to its states at tiles' edges; the last state."""
    b, back = Builder(), Expr("BACK").same(1)
    turn, own = _walk_of(b)
    skipped = b.let("skipped", where(back, own - 1 - turn, turn) * "segment")
    cell, has = _tokens(b, skipped, (turn > 0) & (turn < own))
    state = b.let("state", call("tl.zeros", "(BI, BJ)", "tl.float32"))
    with b.loop("earlier", turn, "segments", stages="2") as earlier:
        row = b.let("row", (Expr("sequence") * "segments" + earlier) * "H" + "head")
        _over_segment(b, row, cell, has)
    alive = b.let("alive", Expr("count"), "tiles that anything of it is left at")
    row = b.let("row", Expr("walk") * "H" + "head")
    for side in SIDES:
        with b.when(Expr(f"alive_{side}_ptr").given):
            b.let("alive", minimum(alive, call("tl.max", _of_gate(f"alive_{side}", row, side, "0"), 0)))
    with b.loop("step", "alive", "tiles", stages="3") as step:
        tile = b.let("tile", (Expr("first_tile") + where(back, Expr("count") - 1 - step, step)) * "H" + "head")
        left = _decayed(b, b.let("left", state), "passed", tile)
        pointer = Expr("states_ptr") + tile * (Expr("I") * "J") + cell
        b.store(pointer, left + real(call("tl.load", pointer, mask=has.text(), other="0.0")), has)
    with b.when(Expr("last_ptr").given), b.when(turn.same(own - 1)):
        _over_segment(b, row, cell, has)
        b.store(Expr("last_ptr") + (Expr("sequence") * "H" + "head") * (Expr("I") * "J") + cell, state, has)
    kept = [f"{name}_{side}_ptr" for name in SUMS for side in SIDES]
    arguments = ("states_ptr", "reached_ptr", "last_ptr", *kept, "offsets_ptr", "first_tile_ptr", "tokens", "each",
                 "segment", "segments")  # fmt: skip
    doc = "The states at tiles' edges of segments that were walked over from zero, and the last ones."
    return Kernel("completed", doc, arguments, tuple(b.body))


def _over_segment(b: Builder, row: Expr, cell: Expr, has: Expr) -> None:
    """Take the state over a segment: what it decays, and what it comes to without."""
    state = _decayed(b, Expr("state"), "decay", row)
    pointer = Expr("reached_ptr") + row * (Expr("I") * "J") + cell
    b.let("state", state + call("tl.load", pointer, mask=has.text(), other="0.0"))


def _decayed(b: Builder, state: Expr, sums: str, row: Expr) -> Expr:
    """A block of the state times what each side's gate, if there is one, adds up to."""
    for side in SIDES:
        with b.when(Expr(f"{sums}_{side}_ptr").given):
            decay = exp(_of_gate(f"{sums}_{side}", row, side, "0.0"))
            b.let(state.op, state * (decay.rows if side == "i" else decay.cols))
    return state


def _of_gate(name: str, row: Expr, side: Side, other: str) -> Expr:
    """The numbers of a side's columns that are kept for a row."""
    pointer = Expr(f"{name}_ptr") + row * SIZE[side] + f"col_{side}"
    return call("tl.load", pointer, mask=f"has_{side}", other=other)
