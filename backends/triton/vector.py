"""Kernels of elementwise scans.

A program walks along a sequence, or a segment of one, with the states of a block of channels in
registers. Its loop over whole tiles has no masks over tokens: they would cost more than the scan.
"""

from __future__ import annotations

from collections.abc import Callable

from chunkc.backends.triton.kernel import Builder, Expr, Kernel, Value, call, lift, maximum, where

STAGES = 4  # tiles of which one is walked over while the others come from memory


class _Walk:
    """Programs that walk over the tokens of a sequence: places, masks, and tiles of operands in float32.

    `late`: how many tokens at the end of the walk have a neighbour that is not there; whole tiles end before them."""

    def __init__(self, reverse: bool, tropical: bool, late: Expr) -> None:
        self.reverse, self.tropical, self.ragged = reverse, tropical, False
        self.b = b = Builder()
        self.part = b.let("part", call("tl.program_id", 0).to("tl.int64"))
        self.row = b.let("row", call("tl.arange", 0, "C"))
        b.note("two channels a thread, so that it has all rows of a tile of them")
        channels = call("tl.program_id", 1) * "BD" + call("tl.arange", 0, "BD")
        self.col = b.let("col", call("tl.max_contiguous", channels, 2))
        self.has = b.let("has", self.col < "D")
        self.start = b.load("start", Expr("bounds_ptr") + self.part, None)
        self.stop = b.load("stop", Expr("bounds_ptr") + self.part + 1, None)
        self.length = b.let("length", (self.stop - self.start).to("tl.int32"))
        self.cell = b.let("cell", (Expr("C") - 1 - self.row if reverse else self.row).rows * "D" + self.col.cols)
        b.let("whole", maximum(self.length - late, 0) // "C")
        b.let("tiles", call("tl.cdiv", self.length, "C"))

    def own(self, name: str) -> Expr:
        """The cells of a tensor with a value a channel."""
        return Expr(f"{name}_ptr") + self.part * "D" + self.col

    def vector(self, name: str, pointer: Expr, mask: Expr) -> Expr:
        return self.b.let(name, call("tl.load", pointer, mask=mask.text(), other="0.0").to("tl.float32"))

    def edge(self) -> Expr:
        """Where the walk starts."""
        return self.b.let("edge", (self.stop - 1 if self.reverse else self.start) * "D" + self.col)

    def loops(self, tile: Callable[[], None]) -> None:
        for self.ragged in (False, True):
            stop, over = (Expr("tiles") - "whole", "tiles") if self.ragged else (Expr("whole"), "whole tiles")
            with self.b.loop("step", stop, over, 0 if self.ragged else STAGES) as step:
                done = self.b.let("done", (step + "whole" if self.ragged else step) * "C")
                self.b.let("base", (self.stop - done - "C" if self.reverse else self.start + done) * "D")
                self.b.let("place", done + self.row)
                tile()

    def mask(self, ahead: Value = 0) -> Expr:
        """Which tokens there are so far ahead of the rows'."""
        if not self.ragged:
            return self.has.cols
        place = Expr("place") if ahead == 0 else Expr("place") + ahead
        return (place < self.length).rows & self.has.cols

    def at(self, name: str, ahead: Value = 0) -> Expr:
        by = lift(ahead) * "D"
        base = Expr("base") if ahead == 0 else Expr("base") - by if self.reverse else Expr("base") + by
        return Expr(f"{name}_ptr") + base + self.cell

    def tile(self, name: str, ahead: Value = 0, other: str = "0.0") -> Expr:
        loaded = call("tl.load", self.at(name, ahead), mask=self.mask(ahead).text(), other=other)
        return self.b.let(name, loaded.to("tl.float32"))

    def operands(self, added: str, ahead: Value = 0) -> tuple[Expr, Expr]:
        """The gate and what is added, where there is no token such that the state stays."""
        idle = ("0.0", 'float("-inf")') if self.tropical else ("1.0", "0.0")
        if not self.ragged:
            idle = ("0.0", "0.0")
        return self.tile("a", other=idle[0]), self.tile(added, ahead, idle[1])

    def walk(self, a: Expr, x: Expr) -> Expr:
        """h after each row; the state is the last one."""
        after = self.b.let("after", call("walk_max" if self.tropical else "walk", a, x, "state", self.row))
        self.b.let("state", call("tl.sum", where(self.row.same(Expr("C") - 1).rows, after, 0.0), 0))
        return after

    def kernel(self, name: str, doc: str, arguments: str) -> Kernel:
        pointers = tuple(f"{a}_ptr" for a in [*arguments.split(), "bounds"])
        return Kernel(name, doc, pointers, tuple(self.b.body), warps=1, ends=(("row", "length"),))


def vector_kernels() -> list[Kernel]:
    """All kernels of elementwise scans."""
    plain, tropical = (False, False), (False, True)
    scans = [vector_kernel(*plain), vector_kernel(True, False), vector_kernel(*tropical)]
    return [*scans, backward_kernel(), totals_kernel(*plain), totals_kernel(True, False), totals_kernel(*tropical)]


def vector_kernel(reverse: bool, tropical: bool) -> Kernel:
    """h = a * h + b, or h = max(a + h, b): h before or after each token, and the last one."""
    before = lift(1) - "AFTER"
    w = _Walk(reverse, tropical, before)
    state = w.vector("state", w.own("initial"), w.has)
    w.b.store(Expr("out_ptr") + w.edge(), state, w.has & (Expr("0") < w.length * before))

    def tile() -> None:
        after = w.walk(*w.operands("b"))
        w.b.store(w.at("out", before), after, w.mask(before))

    w.loops(tile)
    w.b.store(w.own("last"), state, w.has)
    doc = "h = max(a + h, b)" if tropical else "h = a * h + b"
    doc += f"{' from the last token to the first' if reverse else ''}: h before each token, or after it."
    name = "max_plus" if tropical else "vector_reverse" if reverse else "vector"
    return w.kernel(name, doc, "a b initial out last")


def _last_gradient(w: _Walk) -> tuple[Expr, Expr]:
    """Where a walk backward starts, and the gradient of the last h but for what is read of it before the update."""
    edge = w.edge()
    return edge, w.vector("read", Expr("g_ptr") + edge, w.has & (Expr("0") < w.length * "AFTER"))


def backward_kernel() -> Kernel:
    """The gradients of h = a * h + b, where g are those of h before each token, or after it."""
    w = _Walk(True, False, lift(1) + "AFTER")
    b, further = w.b, lift(1) + "AFTER"
    initial = w.vector("initial", w.own("initial"), w.has)
    edge, read = _last_gradient(w)
    state = b.let("state", w.vector("d_last", w.own("d_last"), w.has) + read)
    some = w.has & (Expr("0") < w.length)
    further_back = lift("AFTER") < w.length
    h = w.vector("h_before", Expr("h_ptr") + (edge - lift("AFTER") * "D"), w.has & further_back)
    before = b.let("before", where(further_back, h, initial))
    b.store(Expr("d_b_ptr") + edge, state, some)
    b.store(Expr("d_a_ptr") + edge, state * before, some)

    def tile() -> None:
        a, g = w.operands("g", "AFTER")
        h = w.tile("h", further)
        if w.ragged:
            first = (Expr("place") + further).same(w.length)
            h = b.let("h", where(first.rows, initial.cols, h))
        after = w.walk(a, g)
        b.store(w.at("d_b", 1), after, w.mask(1))
        b.store(w.at("d_a", 1), after * h, w.mask(1))

    w.loops(tile)
    b.store(w.own("d_initial"), state, w.has)
    doc = "The gradients of h = a * h + b: g are those of h before each token, or after it, as h is."
    return w.kernel("vector_backward", doc, "a g h initial d_last d_a d_b d_initial")


def totals_kernel(reverse: bool, tropical: bool) -> Kernel:
    """What a segment does to the state that it is entered with: times `decay` (plus, in max-plus), then `total`."""
    w = _Walk(reverse, tropical, lift(1) + "AFTER" if reverse else lift(1) - "AFTER")
    b = w.b
    b.note("in float32, products of equal decays would all err alike, which adds up over the segments")
    decay = b.let("decay", call("tl.zeros", "(BD,)", "tl.float64") + (0.0 if tropical else 1.0))
    if reverse:
        b.let("state", _last_gradient(w)[1])
    else:
        b.let("state", call("tl.zeros", "(BD,)", "tl.float32") + (lift('float("-inf")') if tropical else 0.0))

    def tile() -> None:
        a, x = w.operands("g", "AFTER") if reverse else w.operands("b")
        w.walk(a, x)
        wide = a.to("tl.float64")
        b.let("decay", decay + call("tl.sum", wide, 0) if tropical else decay * call("product", wide))

    w.loops(tile)
    b.store(w.own("decay"), decay, w.has)
    b.store(w.own("total"), Expr("state"), w.has)
    name = "max_plus_totals" if tropical else "vector_totals_reverse" if reverse else "vector_totals"
    doc = "What a segment does to the state before it: h = max(decay + h, total)." if tropical else (
        "What a segment does to the state before it: h = decay * h + total.")  # fmt: skip
    return w.kernel(name, doc, f"a {'g' if reverse else 'b'} decay total")
