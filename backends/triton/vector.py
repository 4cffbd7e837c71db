"""Kernels without a product: elementwise scans over a sequence, and one token of a matrix scan."""

from __future__ import annotations

from chunkc.backends.scan import Operand, ScanForm
from chunkc.backends.triton.kernel import Builder, Expr, Kernel, call, exp, where
from chunkc.backends.writer import Lines
from chunkc.ir import nodes as N


def vector_kernel(reverse: bool, tropical: bool) -> Kernel:
    """h = a * h + b, or h = max(a + h, b): h before each token, a block of channels a program."""
    name = "max_plus" if tropical else "vector_reverse" if reverse else "vector"
    b = Builder()
    sequence = b.let("sequence", call("tl.program_id", 0).to("tl.int64"))
    block = b.let("block", call("tl.program_id", 1))
    row = b.let("row", call("tl.arange", 0, "C"))
    col = b.let("col", block * "BD" + call("tl.arange", 0, "BD"))
    has = b.let("has", col < "D")
    state = b.load("state", Expr("initial_ptr") + sequence * "D" + col, has)
    first = b.load("first", Expr("first_tile_ptr") + sequence, None)
    count = b.load("count", Expr("tile_count_ptr") + sequence, None)
    with b.loop("step", count, "tiles") as step:
        tile = b.let("tile", first + count - 1 - step if reverse else first + step)
        start = b.load("start", Expr("tile_start_ptr") + tile, None)
        stop = b.load("stop", Expr("tile_stop_ptr") + tile, None)
        token = b.let("token", start + "C" - 1 - row if reverse else start + row)
        b.let("mask", (token < stop).rows & has.cols)
        cell = b.let("cell", token.rows * "D" + col.cols)
        idle = ("0.0", 'float("-inf")') if tropical else ("1.0", "0.0")
        a = call("tl.load", Expr("a_ptr") + cell, mask="mask", other=idle[0])
        if not tropical:
            b.note("in float32, products of a tile's equal decays would all err alike, which adds up over the tiles")
        a = b.let("a", a if tropical else a.to("tl.float64"))
        x = b.let("b", call("tl.load", Expr("b_ptr") + cell, mask="mask", other=idle[1]))
        b.note("blocks of growing size: the later half takes over the end of the earlier one")
        with b.loop("level", "LEVELS", "levels") as level:
            upper = b.let("upper", ((row >> level) & 1).same(1))
            source = where(upper, Expr("<<", (row >> level, level)) - 1, row)
            source = b.let("source", call("tl.broadcast_to", source.rows, "(C, BD)"))
            low_a, low_b = call("tl.gather", a, source, 0), call("tl.gather", x, source, 0)
            low_b, low_a = b.let("low_b", low_b), b.let("low_a", low_a)
            joined = call("tl.maximum", a + low_b, x) if tropical else a.to("tl.float32") * low_b + x
            b.let("b", where(upper.rows, joined, x))
            b.let("a", where(upper.rows, a + low_a if tropical else a * low_a, a))
        entering = state.cols
        after = call("tl.maximum", a + entering, x) if tropical else a.to("tl.float32") * entering + x
        after = b.let("after", after)
        previous = b.let("previous", call("tl.broadcast_to", call("tl.maximum", row - 1, 0).rows, "(C, BD)"))
        before = where(row.same(0).rows, entering, call("tl.gather", after, previous, 0))
        b.store(Expr("out_ptr") + cell, before, Expr("mask"))
        b.let("state", call("tl.sum", where(row.same(Expr("C") - 1).rows, after, 0.0), 0))
    b.store(Expr("last_ptr") + sequence * "D" + col, state, has)
    doc = "h = max(a + h, b)" if tropical else "h = a * h + b"
    doc += ": h after each token, from the last to the first." if reverse else ": h before each token."
    arguments = ("a_ptr", "b_ptr", "initial_ptr", "out_ptr", "last_ptr", "tile_start_ptr", "tile_stop_ptr",
                 "first_tile_ptr", "tile_count_ptr")  # fmt: skip
    return Kernel(name, doc, arguments, tuple(b.body))


def step_kernel(form: ScanForm, lines: Lines) -> Kernel:
    """One token: the reads of the state before the update, and the state after it. A program a sequence and head."""
    b = Builder()
    sequence = b.let("sequence", call("tl.program_id", 0).to("tl.int64"))
    head = b.let("head", call("tl.program_id", 1))
    base = b.let("base", sequence * "H" + head)
    col_i = b.let("col_i", call("tl.arange", 0, "BI"))
    has_i = b.let("has_i", col_i < "I")

    def operand(o: Operand) -> None:
        cols, has, size = (col_i, has_i, "I") if o.side == "i" else (Expr("col_j"), Expr("has_j"), "J")
        offset = base if o.thin else base * size + cols
        b.load(o.name, Expr(f"{o.name}_ptr") + offset, None if o.thin else has)

    for o in form.operands():
        if o.side == "i":
            operand(o)
    for q in form.queries:
        if q.side == "j":
            b.let(f"out_{q.name}", call("tl.zeros", "(BI,)", "tl.float32"))
    with b.loop("part", call("tl.cdiv", "J", "BJ"), "blocks of side j") as part:
        col_j = b.let("col_j", part * "BJ" + call("tl.arange", 0, "BJ"))
        has_j = b.let("has_j", col_j < "J")
        for o in form.operands():
            if o.side == "j":
                operand(o)
        cell = b.let("cell", base * (Expr("I") * "J") + col_i.rows * "J" + col_j.cols)
        has = b.let("has", has_i.rows & has_j.cols)
        b.load("state", Expr("state_ptr") + cell, has)
        *reads, new = _step_values(form)
        for q, read in zip(form.queries, reads):
            if q.side == "i":
                b.store(Expr(f"out_{q.name}_ptr") + base * "J" + col_j, call("tl.sum", read, 0), has_j)
            else:
                b.add(Expr(f"out_{q.name}"), call("tl.sum", read, 1))
        b.store(Expr("next_ptr") + cell, b.let("new", new, lines.place(form.scan.span)), has)
    for q in form.queries:
        if q.side == "j":
            b.store(Expr(f"out_{q.name}_ptr") + base * "I" + col_i, Expr(f"out_{q.name}"), has_i)
    names = [*(f"{o.name}_ptr" for o in form.operands()), *(f"out_{q.name}_ptr" for q in form.queries)]
    return Kernel(f"{form.name}_token", f"One token of {form.scan.name}.", (*names, "state_ptr", "next_ptr"),
                  tuple(b.body))  # fmt: skip


def _step_values(form: ScanForm) -> list[Expr]:
    """From the scan's step as a graph: what each read sums over its side, and the state after the token."""
    step = form.scan.step
    assert step is not None, "the scan has no step"
    # A value is a number, a vector over side i (a column where it meets the state) or j (a row), or like the state.
    found: dict[str, tuple[Expr, str]] = {}
    for node, o in zip(step.of_kind(N.Input), form.operands()):
        found[node.id] = (Expr(o.name), "" if o.thin else o.side)
    found[step.of_kind(N.Input)[-1].id] = (Expr("state"), "ij")

    def laid(id_: str, alone: bool) -> Expr:
        value, side = found[id_]
        return value if alone or side in ("", "ij") else value.rows if side == "i" else value.cols

    for node in step.nodes:
        if isinstance(node, N.Map):
            sides = {found[a][1] for a in node.args}
            args = [laid(a, len(sides) == 1) for a in node.args]
            value = exp(args[0]) if node.fn == "exp" else Expr(node.fn, tuple(args))
            found[node.id] = (value, sides.pop() if len(sides) == 1 else "ij")
        elif isinstance(node, N.Reduce):
            found[node.id] = found[node.arg]
    return [found[id_][0] for _, id_ in step.outputs]
