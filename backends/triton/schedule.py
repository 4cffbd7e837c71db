"""The walk over the tiles of a sequence: a program has a block of the state on chip, and stores it at tiles' edges."""

from __future__ import annotations

from chunkc.backends.scan import ScanForm, Side
from chunkc.backends.triton.kernel import Expr, Kernel, call, dot, trans
from chunkc.backends.triton.tile import SIZE, Tile, block, notes_of, real, scaled
from chunkc.backends.writer import Lines

SIDES: tuple[Side, Side] = ("i", "j")
ZEROS = "tl.zeros"


def pass_kernel(form: ScanForm, lines: Lines, spans: dict[str, str], reverse: bool, totals: bool) -> Kernel:
    """The state at each tile's start; reversed, its gradient at each tile's end.

    `totals`: it also keeps the gates' sums over each tile [tiles, H, D], by which other kernels choose their tiles."""
    pairs = form.query_pairs() if reverse else form.write_pairs()
    t = Tile(form, notes_of(form, spans))
    b, start = t.b, Expr("start")
    wide = [g for g in form.gates if not g.thin] if totals else []
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
            if g in wide:
                first_block = (program % blocks_j if side == "i" else program // blocks_j % blocks_i).same(0)
                base = (Expr("first_tile") + place) * "H" + head
                pointer = Expr(f"totals_{side}_ptr") + base * SIZE[side] + Expr(f"col_{side}")
                b.store(pointer, call("tl.sum", gate, 0), Expr(f"has_{side}") & first_block)
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
    return Kernel(name, doc, (*dict.fromkeys(used), *tail, *(f"totals_{g.side}_ptr" for g in wide)), t.closed())
