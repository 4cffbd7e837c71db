"""Kernels of elementwise scans.

A program walks along a sequence, or a segment of one, with the states of a block of channels in
registers. Its loop over whole tiles has no masks over tokens: they would cost more than the scan.
Operands are made of the leaves that are loaded, and the leaves' gradients of the operands'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from chunkc.backends.triton.kernel import Builder, Expr, Kernel, Value, call, lift, maximum, where
from chunkc.backends.triton.pairs import FUNCTIONS
from chunkc.backends.vector import PLAIN, State, VectorForm
from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph

LONG = 60  # characters of an expression that becomes a statement
Wanted = tuple[State, Graph, list[str]]  # values of a graph of a state's


class _Walk:
    """Programs that walk over the tokens of a sequence: places, masks, and tiles of operands in float32.

    `late`: how many tokens at the end of the walk have a neighbour that is not there; whole tiles end before them."""

    def __init__(self, form: VectorForm, reverse: bool, tropical: bool, late: Value) -> None:
        self.known: dict[str, Expr] = {}
        self.form, self.reverse, self.tropical, self.ragged = form, reverse, tropical, False
        self.b = b = Builder()
        self.part = b.let("part", call("tl.program_id", 0).to("tl.int64"))
        b.note("each of W warps has the rows of a part of the tile; two channels a thread, so that it has all of these")
        rows = call("tl.arange", 0, "C")
        self.row = b.let("row", rows % "W" * (Expr("C") // "W") + rows // "W")
        channels = call("tl.program_id", 1) * "BD" + call("tl.arange", 0, "BD")
        self.col = b.let("col", call("tl.max_contiguous", channels, 2))
        self.has = b.let("has", self.col < "D")
        self.start = b.let("start", call("sequence_start", "bounds_ptr", self.part, "tokens"))
        self.stop = b.let("stop", call("sequence_start", "bounds_ptr", self.part + 1, "tokens"))
        self.length = b.let("length", (self.stop - self.start).to("tl.int32"))
        b.note("behind the channels, so that a row is a constant distance")
        self.down = b.let("down", (Expr("C") - 1 - self.row if reverse else self.row) * "D")
        b.let("whole", maximum(self.length - late, 0) // "C")
        b.let("tiles", call("tl.cdiv", self.length, "C"))

    def own(self, name: str) -> Expr:
        """The cells of a tensor with a value a channel."""
        return Expr(f"{name}_ptr") + self.part * "D" + self.col

    def given(self, name: str, source: str) -> Expr:
        """A value a channel; zero where no tensor is given."""
        found = self.b.let(name, call("tl.zeros", "(BD,)", "tl.float32"))
        with self.b.when(Expr(f"{source}_ptr").given):
            self.b.let(name, call("tl.load", self.own(source), mask=self.has.text(), other="0.0").to("tl.float32"))
        return found

    def keep(self, name: str, value: Expr) -> None:
        """Store a value a channel, where somebody wants it."""
        with self.b.when(Expr(f"{name}_ptr").given):
            self.b.store(self.own(name), value, self.has)

    def loops(self, tile: Callable[[], None]) -> None:
        for self.ragged in (False, True):
            stop, over = (Expr("tiles") - "whole", "tiles") if self.ragged else (Expr("whole"), "whole tiles")
            with self.b.loop("step", stop, over, "" if self.ragged else "STAGES") as step:
                done = self.b.let("done", (step + "whole" if self.ragged else step) * "C")
                self.b.let("base", (self.stop - done - "C" if self.reverse else self.start + done) * "D")
                self.b.let("place", done + self.row)
                self.known = {}
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
        return Expr(f"{name}_ptr") + (base + self.col).cols + self.down.rows

    def tile(self, name: str, ahead: Value = 0) -> Expr:
        """A tile of a tensor; what a step has loaded it does not load again."""
        if name not in self.known:
            loaded = call("tl.load", self.at(name, ahead), mask=self.mask(ahead).text(), other="0.0")
            self.known[name] = self.b.let(name, loaded.to("tl.float32"))
        return self.known[name]

    def idle(self, x: Expr, value: Value) -> Expr:
        """An operand; where there is no token such that the state stays."""
        return where(self.mask(), x, value) if self.ragged else x

    # -- operands ------------------------------------------------------------------------------------------------------

    def leaves(self, graphs: Iterable[Wanted], load: Callable[[str], Expr]) -> dict[str, Expr]:
        """The leaves, loaded, that values of graphs are made of."""
        found: dict[str, Expr] = {}
        for state, graph, wanted in graphs:
            reached = graph.reachable(wanted)
            for name, node in zip(state.leaves, graph.of_kind(N.Input)):
                if node.id in reached and name not in found:
                    found[name] = load(name)
        return found

    def operands(self, gates: bool, added: bool) -> list[tuple[Expr, Expr]]:
        """Each state's gate and what is added to it, as far as they are wanted, made of leaves at this token."""
        graphs = [(s, s.prologue.values, [x for x in (s.gate if gates else None, s.add if added else None) if x])
                  for s in self.form.states]  # fmt: skip
        work = _Work(self.b, self.form, self.leaves(graphs, self.tile))
        out = []
        for state, graph, wanted in graphs:
            made = work.values(state, graph, wanted)
            whole = [self.whole(x, graph, made) if x in wanted else self.constant(idle)
                     for x, idle in ((state.gate, 1.0), (state.add, 0.0))]  # fmt: skip
            stays = (lift(0.0), lift('float("-inf")')) if self.tropical else (lift(1.0), lift(0.0))
            pair = [self.named(state.name(role), self.idle(x, stay)) if asked else x
                    for role, x, stay, asked in zip(("gate", "add"), whole, stays, (gates, added))]  # fmt: skip
            out.append((pair[0], pair[1]))
        return out

    def named(self, name: str, x: Expr) -> Expr:
        return self.b.let(name, x) if x.args else x

    def constant(self, value: Value) -> Expr:
        return call("tl.zeros", "(C, BD)", "tl.float32") + value

    def whole(self, id_: str | None, graph: Graph, made: dict[str, Expr]) -> Expr:
        assert id_ is not None
        return self.constant(made[id_]) if isinstance(graph[id_], N.Const) else made[id_]

    def flows(self, d_gates: list[Expr], d_adds: list[Expr]) -> dict[str, Expr]:
        """The leaves' gradients, by name, from those of each state's gate and added value."""
        graphs = [(s, s.prologue.gradients, [id_ for _, id_ in s.prologue.gradients.outputs]) for s in self.form.states]
        work, total = _Work(self.b, self.form, self.leaves(graphs, self.tile), "d_"), dict[str, Expr]()
        for (state, graph, wanted), d_gate, d_add in zip(graphs, d_gates, d_adds):
            given = iter([d_gate] * (state.gate is not None) + [d_add] * (state.add is not None))
            flow = {n.id: next(given) for n in graph.of_kind(N.Input)[len(state.leaves) :]}
            made = work.values(state, graph, wanted, flow)
            for name, id_ in zip(state.leaves, wanted):
                total[name] = total[name] + made[id_] if name in total else made[id_]
        return total

    # -- the walk ------------------------------------------------------------------------------------------------------

    def walk(self, state: State, a: Expr, x: Expr) -> Expr:
        """h after each row; the state is the last one."""
        step = "walk_max" if self.tropical else "walk"
        after = self.b.let(state.name("after"), call(step, a, x, state.name("state"), "W"))
        last = call("tl.sum", where(self.row.same(Expr("C") - 1).rows, after, 0.0), 0)
        self.b.let(state.name("state"), last)
        return after

    def walk_back(self, state: State, a: Expr, g: Expr) -> Expr:
        """The gradients of h after each row; the state is what passes on of it behind the last one."""
        carried = state.name("state")
        flow = self.b.let(state.name("flow"), call("walk_back", a, g, carried, "AFTER", "W"))
        self.b.let(carried, call("passed", a, flow, g, self.row, "C", "AFTER"))
        return flow

    def kernel(self, name: str, doc: str, *roles: str) -> Kernel:
        leaves = list(self.form.leaves.values())
        named = {"leaves": leaves, "d_leaves": [f"d_{x}" for x in leaves]}
        arguments = [*leaves, *(x for r in roles for x in named.get(r) or self.form.names(r)), "bounds"]
        return Kernel(name, doc, (*(f"{a}_ptr" for a in arguments), "tokens"), tuple(self.b.body),
                      sizes=tuple(self.form.numbers.values()), ends=(("row", "length"),))  # fmt: skip


class _Work:
    """Elementwise work as statements; what two states make alike is made once."""

    def __init__(self, b: Builder, form: VectorForm, leaves: dict[str, Expr], prefix: str = "") -> None:
        self.b, self.form, self.loaded, self.prefix = b, form, leaves, prefix
        self.known: dict[Expr, Expr] = {}

    def values(self, state: State, graph: Graph, wanted: Iterable[str],
               more: dict[str, Expr] | None = None) -> dict[str, Expr]:  # fmt: skip
        """The nodes of a graph that some are made of; `more` are inputs behind the leaves."""
        found = dict(more or {})
        found |= {n.id: self.loaded[x] for x, n in zip(state.leaves, graph.of_kind(N.Input)) if x in self.loaded}
        reached, uses = graph.reachable(wanted), graph.users()
        for node in graph.nodes:
            if node.id not in reached or node.id in found:
                continue
            if isinstance(node, N.Const):
                found[node.id] = lift(self.form.number(node))
                continue
            assert isinstance(node, N.Map), "a prologue is elementwise"
            value = FUNCTIONS[node.fn](*(found[a] for a in node.args))
            often = sum(u.id in reached for u in uses[node.id]) > 1 or len(value.text()) > LONG
            if often and value not in self.known:
                self.known[value] = self.b.let(f"{self.prefix}x_{len(self.known)}", value)
            found[node.id] = self.known.get(value, value)
        return found


def plain_kernels() -> list[Kernel]:
    """Of h = a * h + b, and of h = max(a + h, b), for tensors a and b."""
    scans = [walk_kernel(PLAIN), walk_kernel(PLAIN, reverse=True), walk_kernel(PLAIN, tropical=True)]
    return [*scans, totals_kernel(PLAIN, True), totals_kernel(PLAIN), totals_kernel(PLAIN, tropical=True),
            backward_kernel(PLAIN)]  # fmt: skip


def own_kernels(form: VectorForm) -> list[Kernel]:
    """Of scans with leaves of their own."""
    return [walk_kernel(form), totals_kernel(form), backward_kernel(form), totals_kernel(form, True)]


def walk_kernel(form: VectorForm, reverse: bool = False, tropical: bool = False) -> Kernel:
    """h = a * h + b, or h = max(a + h, b): h before or after each token, and the last one."""
    before = lift(1) - "AFTER"
    w = _Walk(form, reverse, tropical, before)
    edge = w.b.let("edge", (w.stop - 1 if reverse else w.start) * "D" + w.col)
    for s in form.states:
        state = w.given(s.name("state"), s.name("initial"))
        w.b.store(Expr(f"{s.name('out')}_ptr") + edge, state, w.has & (Expr("0") < w.length * before))

    def tile() -> None:
        for s, (a, x) in zip(form.states, w.operands(True, True)):
            after = w.walk(s, a, x)
            w.b.store(w.at(s.name("out"), before), after, w.mask(before))

    w.loops(tile)
    for s in form.states:
        w.keep(s.name("last"), Expr(s.name("state")))
    doc = "h = max(a + h, b)" if tropical else "h = a * h + b"
    doc += f"{' from the last token to the first' if reverse else ''}: h before each token, or after it."
    name = "max_plus" if tropical else f"{form.name}_reverse" if reverse else form.name
    return w.kernel(name if form is PLAIN else f"{form.name}_walk", doc, "initial", "out", "last")


def backward_kernel(form: VectorForm) -> Kernel:
    """The gradients of the leaves of h = a * h + b, where g are those of h before each token, or after it."""
    w = _Walk(form, True, False, "AFTER")
    b = w.b
    for s in form.states:
        w.given(s.name("initial"), s.name("initial"))
        w.given(s.name("state"), s.name("d_last"))

    def tile() -> None:
        flows, d_gates = [], []
        for s, (a, _) in zip(form.states, w.operands(True, False)):
            g, h = w.tile(s.name("g")), w.tile(s.name("h"), "AFTER")
            if w.ragged:
                first = (Expr("place") + "AFTER").same(w.length)
                h = b.let(s.name("h"), where(first.rows, Expr(s.name("initial")).cols, h))
            flows.append(w.walk_back(s, a, g))
            d_gates.append(flows[-1] * h)
        for name, flow in w.flows(d_gates, flows).items():
            b.store(w.at(f"d_{name}"), flow, w.mask())

    w.loops(tile)
    for s in form.states:
        w.keep(s.name("d_initial"), Expr(s.name("state")))
    doc = "The gradients of h = a * h + b: g are those of h before each token, or after it, as h is."
    return w.kernel(f"{form.name}_backward", doc, "g", "h", "initial", "d_last", "d_leaves", "d_initial")


def totals_kernel(form: VectorForm, reverse: bool = False, tropical: bool = False) -> Kernel:
    """What a segment does to the state that it is entered with: times `decay` (plus, in max-plus), then `total`."""
    w = _Walk(form, reverse, tropical, 0 if reverse else lift(1) - "AFTER")
    b = w.b
    b.note("in float32, products of equal decays would all err alike, which adds up over the segments")
    for s in form.states:
        b.let(s.name("decay"), call("tl.zeros", "(BD,)", "tl.float64") + (0.0 if tropical else 1.0))
    for s in form.states:
        nothing = call("tl.zeros", "(BD,)", "tl.float32") + (lift('float("-inf")') if tropical else 0.0)
        b.let(s.name("state"), nothing)

    def tile() -> None:
        for s, (a, x) in zip(form.states, w.operands(True, not reverse)):
            if reverse:
                w.walk_back(s, a, w.tile(s.name("g")))
            else:
                w.walk(s, a, x)
            wide, decay = a.to("tl.float64"), Expr(s.name("decay"))
            b.let(decay.op, decay + call("tl.sum", wide, 0) if tropical else decay * call("product", wide))

    w.loops(tile)
    for s in form.states:
        b.store(w.own(s.name("decay")), Expr(s.name("decay")), w.has)
        b.store(w.own(s.name("total")), Expr(s.name("state")), w.has)
    name = "max_plus_totals" if tropical else f"{form.name}_totals_reverse" if reverse else f"{form.name}_totals"
    doc = "What a segment does to the state before it: h = max(decay + h, total)." if tropical else (
        "What a segment does to the state before it: h = decay * h + total.")  # fmt: skip
    return w.kernel(name, doc, *(["g"] if reverse else []), "decay", "total")
