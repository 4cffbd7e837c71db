"""One token of a matrix scan, alone or with the op around it: a program has a block of the state in registers."""

from __future__ import annotations

from collections.abc import Iterable

from chunkc.backends.scan import EMITTED, ScanForm, Side
from chunkc.backends.token import TokenForm, free_side
from chunkc.backends.triton.kernel import Builder, Expr, Kernel, call, where
from chunkc.backends.triton.pairs import FUNCTIONS
from chunkc.backends.triton.tables import MANY
from chunkc.backends.writer import Lines, Writer, identifier, unused
from chunkc.ir import nodes as N

Value = tuple[Expr, str]  # and the sides that it is over


class _Token:
    """A program's statements: indices along both sides, loads and stores, and the values of graphs."""

    def __init__(self, form: ScanForm, own: Side | None, lines: Lines) -> None:
        self.form, self.lines, self.b = form, lines, Builder()
        b = self.b
        self.base = b.let("base", call("tl.program_id", 0).to("tl.int64") * "H" + call("tl.program_id", 1))
        self.col: dict[str, Expr] = {}
        self.has: dict[str, Expr] = {}
        for side in ("i", "j"):
            block, at = f"B{side.upper()}", call("tl.arange", 0, f"B{side.upper()}")
            own_block = call("tl.program_id", 2) * block + at
            self.col[side] = b.let(f"col_{side}", own_block if side == own else at)
            self.has[side] = b.let(f"has_{side}", self.col[side] < side.upper())
        self.col["ij"] = b.let("cell", self.col["i"].rows * "J" + self.col["j"].cols)
        self.has["ij"] = b.let("has", self.has["i"].rows & self.has["j"].cols)

    def at(self, name: str, side: str) -> Expr:
        size = {"i": Expr("I"), "j": Expr("J"), "ij": Expr("I") * "J"}
        return Expr(f"{name}_ptr") + (self.base * size[side] + self.col[side] if side else self.base)

    def load(self, name: str, side: str, note: str = "") -> Value:
        masks = {"mask": self.has[side].text(), "other": "0.0"} if side else {}
        return self.b.let(name, call("tl.load", self.at(name, side), **masks).to("tl.float32"), note), side

    def store(self, name: str, value: Value, side: str) -> None:
        self.b.store(self.at(name, side), value[0], self.has[side])

    def laid(self, value: Value, sides: str) -> Expr:
        """A value where it meets others that are together over these sides."""
        expr, side = value
        return expr if side in ("", sides) else expr.rows if side == "i" else expr.cols

    def map(self, node: N.Map, found: dict[str, Value]) -> Value:
        given = [found[a] for a in node.args]
        sides = "".join(s for s in "ij" if any(s in side for _, side in given))
        args = [self.laid(x, sides) for x in given]
        return FUNCTIONS[node.fn](*args), sides

    def sum(self, value: Value, over: str) -> Value:
        """The sum over a side; what lies beyond it may be anything, also not finite."""
        expr, side = value
        inside = self.has[side]
        total = call("tl.sum", where(inside, expr, 0.0), 0 if over == "i" else len(side) - 1)
        return total, side.replace(over, "")

    def step(self, operands: list[Value]) -> list[Value]:
        """The reads of the state, and the state after the token, from the scan's step as a graph."""
        step = self.form.scan.step
        assert step is not None, "the scan has no step"
        found = {n.id: x for n, x in zip(step.of_kind(N.Input), [*operands, self.load("state", "ij")])}
        *_, (_, last) = step.outputs
        for node in step.nodes:
            if isinstance(node, N.Map):
                found[node.id] = self.map(node, found)
                if node.id == last:
                    found[last] = (self.b.let("new", found[last][0], self.lines.place(self.form.scan.span)), "ij")
            elif isinstance(node, N.Reduce):
                over = "i" if set(node.over) & set(self.form.scan.i) else "j"
                found[node.id] = self.sum(found[node.arg], over)
        return [found[id_] for _, id_ in step.outputs]

    def kernel(self, name: str, doc: str, arguments: list[str], sizes: tuple[str, ...] = (),
               numbers: Iterable[str] = ()) -> Kernel:  # fmt: skip
        pointers = [f"{a}_ptr" for a in [*arguments, "state", "next"]]
        return Kernel(name, doc, (*pointers, *numbers), tuple(self.b.body), sizes=sizes)


def step_kernel(form: ScanForm, lines: Lines) -> Kernel:
    """One token of a scan: its reads, and the state after it."""
    t = _Token(form, free_side(form, []), lines)
    operands = [t.load(o.name, "" if o.thin else o.side) for o in form.operands()]
    *reads, new = t.step(operands)
    for out, (read, side), scale in zip(form.results(), reads, form.scales):
        t.store(out, (read * scale if scale else read, side), side)
    t.store("next", new, "ij")
    names = [*(o.name for o in form.operands()), *form.results()]
    return t.kernel(f"{form.name}_token", f"One token of {form.scan.name}.", names, numbers=form.numbers())


def call_kernel(token: TokenForm, lines: Lines) -> Kernel:
    """One token of an op."""
    form, graph = token.form, token.graph
    t, names, found = _Token(form, token.own, lines), operand_names(token), dict[str, Value]()

    def keep(node: N.AnyNode, value: Value) -> None:
        found[node.id] = (t.b.let(names[node.id], value[0], lines.place(node.span)), value[1])

    for node in graph.nodes:
        if node.id in token.numbers:
            found[node.id] = (Expr(names[node.id]), "")
        elif isinstance(node, N.Input):
            found[node.id] = t.load(names[node.id], token.sides[node.id], lines.code(node.span))
        elif isinstance(node, N.Scan):
            results = t.step([found[id_] for id_ in node.arguments()])
            found |= {out.id: results[out.index] for out in graph.of_kind(N.Out)}
        elif isinstance(node, N.Map):
            keep(node, t.map(node, found))
        elif isinstance(node, N.Reduce):
            (over,) = set(token.sides[node.arg]) - set(token.sides[node.id])
            keep(node, t.sum(found[node.arg], over))
    outs = [f"out_{k}" for k in range(len(graph.outputs))]
    for out, (_, id_) in zip(outs, graph.outputs):
        t.store(out, found[id_], token.own)
    t.store("next", (Expr("new"), "ij"), "ij")
    sizes = tuple(names[id_] for id_ in token.numbers)
    arguments = [*(names[n.id] for n in token.inputs()), *outs]
    return t.kernel(f"{form.name}_call_token", f"One token of the op around {form.scan.name}.", arguments, sizes)


def operand_names(token: TokenForm) -> dict[str, str]:
    """What a kernel calls the values of an op, by id."""
    taken, names = {*EMITTED, "next", "math"}, {}
    for node in token.graph.nodes:
        if not isinstance(node, N.Scan | N.Out):
            number = node.id in token.numbers
            hint = node.name if isinstance(node, N.Input) else "number" if number else node.id
            names[node.id] = unused(identifier(hint) if hint.isidentifier() else "x", taken)
    return names


def emit_step(form: ScanForm, kernel: Kernel, lines: Lines, w: Writer) -> None:
    """One token of a scan as a function of a state that stays, or of one that is written over."""
    names, own = [o.name for o in form.operands()], free_side(form, [])
    typed = ", ".join(f"{n}: Tensor" for n in names)
    with w.indented(
        f"def {form.name}_step(seq: Sequences, {typed}, state: Tensor{form.typed_numbers()}) -> tuple[Tensor, ...]:"
    ):
        w('"""One token of each sequence in one launch: the reads, and the state after it."""')
        w(f"{', '.join(names)}, state = {', '.join(f'{n}.contiguous()' for n in names)}, state.contiguous()")
        i, j = form.writes[0]
        w(f"H, I, J = {i.name}.shape[2], {i.name}.shape[3], {j.name}.shape[3]")
        for q, out in zip(form.queries, form.results()):
            size = "J" if q.side == "i" else "I"
            w(f"{out} = state.new_empty((*{names[0]}.shape[:3], {size}))")
        w("new = state if seq.in_place else torch.empty_like(state)")
        _launch(kernel, own, w)
        w(f"return {', '.join([*form.results(), 'new'])}")


def emit_call(token: TokenForm, kernel: Kernel, lines: Lines, w: Writer) -> None:
    """One token of an op."""
    form, names, scan = token.form, operand_names(token), token.form.scan
    inputs = [names[n.id] for n in token.inputs()]
    typed = ", ".join([*(f"{n}: Tensor" for n in [*inputs, "state"]), *(f"{n}: float" for n in kernel.sizes)])
    outs, place = [f"out_{k}" for k in range(len(token.graph.outputs))], lines.place(scan.span)
    with w.indented(f"def {form.name}_call(seq: Sequences, {typed}) -> tuple[Tensor, ...]:"):
        w(f'"""One token of each sequence in one launch: results, and the state after it ({place})."""')
        w(f"{', '.join([*inputs, 'state'])} = {', '.join(f'{n}.contiguous()' for n in [*inputs, 'state'])}")
        first, second = 1 + len(scan.batch), 1 + len(scan.batch) + len(scan.i)
        w(f"batch, side_i, side_j = state.shape[1:{first}], state.shape[{first}:{second}], state.shape[{second}:]")
        w("H, I, J = math.prod(batch), math.prod(side_i), math.prod(side_j)")
        for out in outs:
            w(f"{out} = {inputs[0]}.new_empty((*{inputs[0]}.shape[:2], *batch, *side_{token.own}))")
        w("new = state if seq.in_place else torch.empty_like(state, dtype=torch.float32)")
        _launch(kernel, token.own, w)
        w(f"return {', '.join([*outs, 'new'])}")


def _launch(kernel: Kernel, own: Side | None, w: Writer) -> None:
    """Programs over sequences, heads, and blocks of the side that no sum is over; without one all of the state."""
    arguments = ", ".join(a.removesuffix("_ptr").replace("next", "new") for a in kernel.arguments)
    given = {"H": "H", "I": "I", "J": "J", **{f"B{s}": f"power_of_two({s})" for s in "IJ"}}
    if own is not None:
        given[f"B{own.upper()}"] = "block"
        w(f"block, warps = (64, 4) if seq.count * H >= {MANY} else (32, 4)")
    blocks = f"cdiv({own.upper()}, block)" if own is not None else "1"
    constants = ", ".join(f"{c}={given.get(c, c)}" for c in kernel.constants)
    with w.indented("if seq.count:"):
        w(f"{kernel.name}[(seq.count, H, {blocks})](")
        w(f"    {arguments},")
        w(f"    {constants}, num_warps={'warps' if own is not None else 8},")
        w(")")
