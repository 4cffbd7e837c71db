"""An attention's kernels: the result, the gradients of what is over queries or neither, those of what is over rows.

Each program has a tile of queries (for rows' gradients, of rows) of one sequence and one index along every axis of the
result but one, and walks over the tiles of the other side that its mask can see. Logits are computed again in the
backward, from the largest logit of each query and the logarithm of its sum of weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from chunkc.backends.attend import Bounds, Form, Seen
from chunkc.backends.triton.kernel import (
    Builder,
    Expr,
    If,
    Kernel,
    Loop,
    Statement,
    call,
    dot,
    exp,
    maximum,
    over,
    trans,
    where,
)
from chunkc.backends.triton.pairs import Frame, NoKernel, Operand, Pairs, Part, Range, Scope, conjunction, full, zeros
from chunkc.backends.triton.text import parse_expr
from chunkc.backends.writer import Lines, is_name
from chunkc.ir import nodes as N
from chunkc.ir.graph import Graph

LEAST, MOST = Expr('float("-inf")'), Expr('float("inf")')
FAR = 1 << 62  # farther than any position or id


@dataclass(frozen=True)
class Step:
    """One step from a gradient at a program's axes to that of the operand: a sum over `axes`, or over each group of
    `axis` that is one of `to`, or `axis` as `to`."""

    kind: str
    axes: tuple[str, ...] = ()
    axis: str = ""
    to: str = ""


@dataclass(frozen=True)
class Term:
    """Part of an operand's gradient: the value over pairs that a kernel sums, and the steps from there.

    Of a table that is read at `index` along `axis`, each of its places has the sum of the pairs that read it."""

    core: str
    steps: tuple[Step, ...] = ()
    axis: str = ""
    index: str = ""

    def then(self, step: Step) -> Term:
        return replace(self, steps=(*self.steps, step))


@dataclass(frozen=True)
class Gradient:
    """A term's sums as a kernel stores them behind `pointer`: [sequence, place, *axes], a tile of queries in place of a
    place where the operand is over neither side."""

    source: int
    operand: str
    side: str
    axes: tuple[str, ...]
    steps: tuple[Step, ...]
    pointer: str


@dataclass(frozen=True)
class Made:
    """A kernel, the pointers of what is a factor of products of matrices and nothing else, and the gradients that it
    stores."""

    kernel: Kernel
    factors: frozenset[str]
    gradients: tuple[Gradient, ...] = ()


@dataclass(frozen=True)
class Kernels:
    """An attention's kernels. A program has an index along each of `axes`, and all of `last`; `names` are what the
    captures are called, `numbers` the constants that a launch computes, by name."""

    form: Form
    axes: tuple[str, ...]
    last: str
    names: dict[str, str]
    numbers: dict[str, str]
    forward: Made
    queries: Made
    rows: dict[int, Made]

    def all(self) -> list[Made]:
        return [self.forward, self.queries, *self.rows.values()]

    def factor(self, name: str) -> bool:
        """Whether an operand is read only as a factor of products of matrices: then in the type of these."""
        pointer = f"{name}_ptr"
        return all(pointer in m.factors for m in self.all() if pointer in m.kernel.arguments)


def attention_kernels(form: Form, name: str, lines: Lines) -> Kernels:
    """The kernels of an attention.

    Raises:
        NoKernel: it is of no form that kernels are made for.
    """
    free = [a for a in form.own if a not in form.heads]
    if not free:
        raise NoKernel("its result has no axis beside those of its weights")
    last = free[-1]
    sources = form.node.sources
    if any(s.axis is not None and form.paired(s) for s in sources):
        raise NoKernel("its values differ from pair to pair")
    axes = tuple(a for a in form.own if a != last)
    numbers: dict[str, str] = {}

    def writer(suffix: str) -> _Writer:
        return _Writer(form, axes, last, f"{name}_{suffix}", lines, numbers)

    many = sum(s.axis is not None for s in sources) > 1
    rows = {
        k: writer(f"rows_{k + 1}" if many else "rows").rows(k)
        for k, s in enumerate(sources)
        if any(form.side(s, n.name) == "r" and terms(s, n.name) for n in form.inputs(s))
    }
    first = writer("forward")
    return Kernels(form, axes, last, first.names, numbers, first.forward(), writer("queries").queries(), rows)


def terms(source: N.Source, name: str) -> list[Term]:
    """An operand's gradient as sums over pairs."""
    graph = source.gradients
    assert graph is not None, "the attention was not differentiated"
    found = dict(graph.outputs).get(f"d_{name}")
    return [] if found is None else _split(graph, found)


def _split(graph: Graph, id_: str) -> list[Term]:
    node = graph[id_]
    if isinstance(node, N.Map) and node.fn == "+" and not _of_pairs(graph, id_):
        return [t for a in node.args for t in _split(graph, a)]
    if isinstance(node, N.Map) and node.fn == "as" and not _of_pairs(graph, id_):
        return _split(graph, node.args[0])
    if isinstance(node, N.Rename):
        return [t.then(Step("rename", axis=node.source, to=node.target)) for t in _split(graph, node.arg)]
    if isinstance(node, N.Reduce) and node.fn == "sum":
        if node.chunk is not None:
            (axis,) = node.over
            return [t.then(Step("groups", axis=axis, to=node.chunk)) for t in _split(graph, node.arg)]
        axes = tuple(a for a in node.over if not graph.axis[a].is_sequence)
        inner = [Term(node.arg)] if len(axes) < len(node.over) else _split(graph, node.arg)
        return [t.then(Step("sum", axes)) for t in inner] if axes else inner
    if isinstance(node, N.Scatter):
        return [_read(t, node) for t in _split(graph, node.arg)]
    return [Term(id_)]


def _read(term: Term, node: N.Scatter) -> Term:
    if term.axis:
        raise NoKernel("a table that it reads by pairs has two computed indices")
    return replace(term, axis=node.axis, index=node.index)


def _of_pairs(graph: Graph, id_: str) -> bool:
    return sum(graph.axis[a].is_sequence for a in graph[id_].axes) > 1


class _Writer:
    """Writes one kernel."""

    def __init__(self, form: Form, axes: tuple[str, ...], last: str, name: str, lines: Lines,
                 numbers: dict[str, str]) -> None:  # fmt: skip
        self.form, self.axes, self.last, self.name, self.lines = form, axes, last, name, lines
        node = form.node
        sizes = {a.name for a in node.body.axes if not a.is_sequence}
        params = {p for n in node.body.of_kind(N.Const) for p in n.size.params()}
        self.scope = Scope(
            {*sizes, *params, "out", "top", "logs", "delta", "d_out", "size", "types", "heads", "count"}, numbers
        )
        self.names = {}
        for c in form.captured():
            self.names[c] = self.scope.fresh(c if is_name(c) else "x")
        self.scope.reserved = set(self.names.values())
        self.n, self.tile = self.scope.fresh("n"), self.scope.fresh("tile")
        self.counts: dict[str, None] = {}
        self.tiles: list[Statement] = []
        self.conditions: list[tuple[int, Expr]] = []
        self.visible: Expr | None = None
        self.first = self.all = Expr("")
        self.program: tuple[tuple[str, Part], ...] = ()
        self.after = Builder()
        self.bounded: dict[str, Bounds] = {}
        self.begins: dict[str, Expr] = {}
        self.sums: dict[str, Expr] = {}
        self.made: list[Gradient] = []
        self.given: list[Expr] = []

    # -- the three kernels -------------------------------------------------------------------------------------------

    def forward(self) -> Made:
        """The result, the largest logit, and the logarithm of the sum of weights relative to it."""
        query, place = self.start(None)
        b, block = self.scope.before, self.scope.block(self.last)
        most = b.let(self.scope.fresh("most"), call("tl.zeros", "(BQ,)", "tl.float32") + LEAST)
        total = b.let(self.scope.fresh("total"), call("tl.zeros", "(BQ,)", "tl.float32"))
        read = b.let(self.scope.fresh("read"), zeros(Frame(query, block)))
        for k, source in enumerate(self.form.node.sources):
            row, places = self.rows_of(source)
            assert source.scores is not None
            pairs = self.pairs(k, source.scores, {**place, **places})
            frame = Frame(query, row, self.program)
            self.look(source, pairs, frame)
            logit, u = self.logit(pairs, frame, queries=False), self.updates(frame)
            new = u.let(self.scope.fresh("new"), maximum(most, call("tl.max", logit, 1)))
            safe = u.let(self.scope.fresh("safe"), where(new.same(LEAST), 0.0, new))
            weight = u.let(self.scope.fresh("weight"), exp(logit - safe.rows))
            kept = u.let(self.scope.fresh("kept"), exp(most - safe))
            u.let(total.op, total * kept + call("tl.sum", weight, 1))
            value, reduced = self.value(pairs, frame), read * kept.rows
            add = None if value is None else dot(weight, value) if row is not None else weight * value
            u.let(read.op, reduced if add is None else reduced + add)
            u.let(most.op, new)
            if row is not None:
                self.close(row)
        a = self.after
        empty = a.let("empty", total.same(0.0))
        self.store("out", read / where(empty, 1.0, total).rows, query, block)
        self.store("top", where(empty, 0.0, most), query, None)
        self.store("logs", where(empty, MOST, call("tl.log", total)), query, None)
        return self.finish("The result, each query's largest logit, and the logarithm of its sum of weights.")

    def queries(self) -> Made:
        """The gradients of operands over queries, and of those over neither queries nor rows, by tiles of queries."""
        query, place = self.start(None)
        for k, source in enumerate(self.form.node.sources):
            if not any(self.form.side(source, n.name) != "r" and terms(source, n.name)
                       for n in self.form.inputs(source)):  # fmt: skip
                continue
            row, places = self.rows_of(source)
            self.gradients(k, {**place, **places}, Frame(query, row, self.program), ("q", "."))
            if row is not None:
                self.close(row)
        for g in self.made:
            total = self.sums[g.pointer]
            along = self.scope.block(g.axes[-1]) if len(g.axes) > len(self.axes) else None
            if g.side == "q":
                self.store(g.pointer, total, query, along)
            else:
                self.store(g.pointer, call("tl.sum", total, 0), None, along)
        return self.finish("Gradients of what is over queries, and sums over tiles of queries of others.")

    def rows(self, k: int) -> Made:
        """The gradients of the operands of source k over its rows."""
        source = self.form.node.sources[k]
        row, places = self.start(source)
        query, place = self.side(None, moves=True)
        self.gradients(k, {**place, **places}, Frame(query, row, self.program), ("r",))
        self.close(query)
        for g in self.made:
            along = self.scope.block(g.axes[-1]) if len(g.axes) > len(self.axes) else None
            self.store(g.pointer, self.sums[g.pointer], row, along)
        return self.finish("Gradients of what is over rows.")

    # -- where a program stands ------------------------------------------------------------------------------------

    def start(self, source: N.Source | None) -> tuple[Range, dict[str, Part]]:
        """A program's sequence, its index along other axes, and its tile of queries, or of a source's rows."""
        b, axis = self.scope.before, None if source is None else source.axis
        tiles = b.let(self.scope.fresh("tiles"), call("tl.cdiv", self.count(axis), "BQ" if source is None else "BR"))
        b.let(self.n, (call("tl.program_id", 0) // tiles).to("tl.int64"), "the sequence")
        self.first, self.all = b.let(self.scope.fresh("first"), call("tl.program_id", 0) % tiles), tiles
        if self.axes:
            head = b.let(self.scope.fresh("head"), call("tl.program_id", 1))
        for k, a in enumerate(self.axes):
            index = head
            for inner in reversed(self.axes[k + 1 :]):
                index = index // self.scope.size(inner)
            index = index % self.scope.size(a) if k else index
            self.program = (*self.program, (a, Part(b.let(self.scope.fresh(f"at_{a}"), index))))
        return self.side(axis, moves=False)

    def count(self, axis: str | None) -> Expr:
        """How many places there are for a sequence: of queries without an axis, else of its rows."""
        name = "queries" if axis is None else f"rows_{axis}"
        self.counts[name] = None
        return Expr(name)

    def side(self, axis: str | None, moves: bool) -> tuple[Range, dict[str, Part]]:
        """A tile of queries, or of the rows of an axis, and the positions of its places."""
        what, block = ("query", "BQ") if axis is None else (f"row_{axis}", "BR")
        index, has = self.scope.fresh(what), self.scope.fresh(f"has_{what}")
        lengths = self.scope.pointer(f"{what}_lengths_ptr")
        length = self.scope.before.let(self.scope.fresh(f"length_{what}"), call("tl.load", lengths + self.n))
        b = self.scope.inside if moves else self.scope.before
        b.let(index, (Expr(self.tile) if moves else self.first) * block + call("tl.arange", 0, block))
        b.let(has, Expr(index) < length)
        self.scope.ends[index] = length.op
        found = Range(axis or self.form.query or "", index, has, block, moves)
        name = self.form.query if axis is None else axis
        if name is None:
            return found, {}
        begins = self.scope.pointer(f"{what}_begins_ptr")
        begin = self.scope.before.let(self.scope.fresh(f"begin_{what}"), call("tl.load", begins + self.n))
        self.begins[index] = begin
        return found, {name: Part(b.let(self.scope.fresh(f"place_{what}"), begin + Expr(index)), moves=moves)}

    def rows_of(self, source: N.Source) -> tuple[Range | None, dict[str, Part]]:
        return (None, {}) if source.axis is None else self.side(source.axis, moves=True)

    def close(self, side: Range) -> None:
        """Puts what stands inside of the loop there: behind conditions what they are for."""
        body = self.scope.inside.body
        for at, condition in reversed(self.conditions):
            body = [*body[:at], If(condition, tuple(body[at:]))]
        self.conditions = []
        length = call("tl.cdiv", self.scope.ends[side.index], side.block)
        self.tiles.append(Loop(self.tile, length, over(length.text(), ()), tuple(body)))
        self.scope.inside = Builder()

    # -- a source's values -------------------------------------------------------------------------------------------

    def pairs(self, k: int, graph: Graph, places: dict[str, Part]) -> Pairs:
        source = self.form.node.sources[k]
        operands = {n.id: self.operand(source, n.name) for n in self.form.inputs(source)}
        notes = {n.name: self.lines.code(self.form.capture(n.name).span) for n in self.form.inputs(source)}
        known = {a.size: a.name for a in reversed(self.form.node.body.axes) if a.size is not None and a.size.args}
        return Pairs(graph, self.form, self.scope, operands, places, known, notes, self.names)

    def operand(self, source: N.Source, name: str) -> Operand:
        side, pointer = self.form.side(source, name), f"{self.names[name]}_ptr"
        axes = tuple(a for a in self.form.capture(name).axes if a not in (self.form.query, source.axis))
        if side == ".":
            return Operand(pointer, None if self.form.shared(name) else Expr(self.n), None, "", axes)
        axis = None if side == "q" else source.axis
        return Operand(pointer, Expr(self.n), axis or self.form.query, self.count(axis).op, axes)

    def look(self, source: N.Source, pairs: Pairs, frame: Frame) -> None:
        """Conditions that a tile is seen at all: by the bounds of what the mask compares, and where some part of it is
        no comparison, by the mask's values. What follows is for such tiles alone."""
        self.visible = None
        mask = dict(pairs.graph.outputs).get("mask")
        if mask is None or frame.rows is None or frame.cols is None:
            return
        self.bounded = {k: b for k, b in self.bounded.items() if not k.startswith("moving ")}
        leaf, number = (lambda n: self.bounds(n, pairs, frame)), (lambda n: pairs.constant(n).text(9))
        seen, inside = Seen(pairs.graph, leaf, number, "tl.maximum"), self.scope.inside
        text = seen.holds(mask)
        if text not in ("True", "False"):
            self.condition(inside.let(self.scope.fresh("seen"), parse_expr(text)))
        if seen.opaque(mask):
            places = Expr(frame.rows.has).rows & Expr(frame.cols.has).cols
            self.visible = inside.let(self.scope.fresh("visible"), places & pairs.value(mask, frame).expr)
            some = call("tl.max", call("tl.max", where(self.visible, 1, 0), 1), 0)
            self.condition(inside.let(self.scope.fresh("some"), some > 0))

    def condition(self, condition: Expr) -> None:
        self.conditions.append((len(self.scope.inside.body), condition))

    def bounds(self, node: N.AnyNode, pairs: Pairs, frame: Frame) -> Bounds | None:
        """The least and the most of a capture or of positions."""
        if not isinstance(node, N.Input | N.Coord | N.Bounds):
            return None
        part = pairs.value(node.id, frame)
        if part.rows and part.cols:
            return None
        if not part.rows and not part.cols:
            value = part.expr.to("tl.int32") if node.dtype == "bool" else part.expr
            return Bounds(value.text(9), value.text(9))
        side, key = frame.rows if part.rows else frame.cols, f"{'moving ' if part.moves else ''}{part.expr.text()}"
        assert side is not None
        if key not in self.bounded:
            (vector,) = part.expr.args
            hint, b = vector.text(), self.scope.place(part)
            if not isinstance(node, N.Input):  # positions follow each other
                first, begin = (Expr(self.tile) if side.moves else self.first) * side.block, self.begins[side.index]
                last = call("tl.minimum", first + side.block, self.scope.ends[side.index]) + (begin - 1)
                names = (self.scope.fresh(f"{what}_{hint}") for what in ("least", "most"))
                ends = [b.let(name, end) for name, end in zip(names, (begin + first, last))]
                self.bounded[key] = Bounds(ends[0].op, ends[1].op)
                return self.bounded[key]
            vector = vector.to("tl.int32") if node.dtype == "bool" else vector
            none = {"float": (MOST, LEAST), "bool": (Expr("1"), Expr("0"))}  # what a tile of no places has
            far = none.get(node.dtype, (Expr(str(FAR)), Expr(str(-FAR))))
            ends = [
                b.let(self.scope.fresh(f"{what}_{hint}"), call(f"tl.{fn}", where(Expr(side.has), vector, end), 0))
                for what, fn, end in (("least", "min", far[0]), ("most", "max", far[1]))
            ]
            self.bounded[key] = Bounds(ends[0].op, ends[1].op)
        return self.bounded[key]

    def logit(self, pairs: Pairs, frame: Frame, queries: bool) -> Expr:
        """The logits of a tile, minus infinity where a row is not seen."""
        found = dict(pairs.graph.outputs)
        logit = self.floating(pairs, found["logit"], frame)
        masks = [Expr(frame.rows.has).rows] if queries and frame.rows is not None else []
        masks += [Expr(frame.cols.has).cols] if frame.cols is not None else []
        if "mask" in found:
            masks.append(pairs.value(found["mask"], frame).expr)
        mask = conjunction(masks) if self.visible is None else self.visible
        u = self.updates(frame)
        return u.let(self.scope.fresh("logit"), logit if mask is None else where(mask, logit, LEAST))

    def value(self, pairs: Pairs, frame: Frame) -> Expr | None:
        """The values of a tile as a matrix of rows, or of queries where each has its own; None if they are 0."""
        found = dict(pairs.graph.outputs).get("value")
        if found is None:
            return None
        across = Frame(frame.cols or frame.rows, self.scope.block(self.last), self.program)
        pairs.whole = frame.cols is not None and pairs.loads(found)
        out = self.floating(pairs, found, across)
        pairs.whole = False
        return out

    def floating(self, pairs: Pairs, id_: str, frame: Frame) -> Expr:
        out = full(pairs.value(id_, frame), frame)
        return out if pairs.graph[id_].dtype == "float" else out.to("tl.float32")

    def updates(self, frame: Frame) -> Builder:
        """Where a source's sums are added to: in its loop, or once where it is one row."""
        return self.scope.inside if frame.cols is not None else self.scope.before

    # -- gradients ---------------------------------------------------------------------------------------------------

    def cotangents(self, query: Range) -> tuple[Expr, ...]:
        """The result's gradient; of each query the largest logit, the logarithm of its sum, and what all weights'
        gradients are less: the gradient times the result."""
        block = self.scope.block(self.last)
        b = self.scope.inside if query.moves else self.scope.before
        if not self.given:
            masks = Expr(query.has).rows & Expr(block.has).cols
            self.given = [b.load("d_out", self.slot("d_out_ptr", query, block), masks)]
            for name in ("top", "logs", "delta"):
                slot = self.slot(f"{name}_ptr", query, None)
                self.given.append(b.load(name, slot, Expr(query.has)))
        return tuple(self.given)

    def gradients(self, k: int, places: dict[str, Part], frame: Frame, sides: tuple[str, ...]) -> None:
        """Adds a source's part of the gradients of the operands on some sides."""
        source = self.form.node.sources[k]
        assert source.scores is not None and source.gradients is not None and frame.rows is not None
        pairs = self.pairs(k, source.scores, places)
        self.look(source, pairs, frame)
        u = self.updates(frame)
        d_out, top, logs, delta = self.cotangents(frame.rows)
        logit = self.logit(pairs, frame, queries=True)
        weight = u.let(self.scope.fresh("weight"), exp(logit - top.rows - logs.rows))
        value, less = self.value(pairs, frame), delta.rows
        if value is None:
            d_weight = -less
        elif frame.cols is not None:
            d_weight = dot(d_out, trans(value)) - less
        else:
            d_weight = call("tl.sum", d_out * value, 1).rows - less
            self.scope.computed.add("d_out_ptr")
        # A row alone has weight 1, whatever its logit: what rounding leaves of its gradient is 0.
        alone = weight.same(1.0) & logs.same(0.0).rows
        d_logit = u.let(self.scope.fresh("d_logit"), where(alone, 0.0, weight * d_weight))
        back = self.pairs(k, source.gradients, places)
        for n in source.gradients.of_kind(N.Input):
            if n.id not in back.operands and n.name == "d_logit":
                back.given[n.id] = Part(d_logit, True, frame.cols is not None, moves=frame.cols is not None)
        same = {n.id for n in source.scores.nodes if n in source.gradients.nodes}
        back.memo.update({key: part for key, part in pairs.memo.items() if key[0] in same})
        for n in self.form.inputs(source):
            if n.dtype == "float" and self.form.side(source, n.name) in sides:
                for term in terms(source, n.name):
                    self.term(k, n.name, term, back, frame, weight, d_out)

    def term(self, k: int, name: str, term: Term, pairs: Pairs, frame: Frame, weight: Expr, d_out: Expr) -> None:
        """Adds a tile's part of a term to its sum."""
        core, source = pairs.graph[term.core], self.form.node.sources[k]
        side = self.form.side(source, name)
        from_value = isinstance(core, N.Input) and core.id not in pairs.given
        own = [a for a in core.axes if a not in self.axes and not pairs.graph.axis[a].is_sequence]
        own = [self.last] if from_value else [*own, *([term.axis] if term.axis else [])]
        if len(own) > 1 or term.axis and from_value:
            raise NoKernel(f"the gradient of {name} has more than one axis of its own")
        pointer = self.scope.fresh(f"d_{self.names[name]}")
        self.made.append(Gradient(k, name, side, (*self.axes, *own), term.steps, pointer))
        along = self.scope.block(own[0]) if own else None
        fixed = frame.cols if side == "r" else frame.rows
        assert fixed is not None
        start = zeros(Frame(fixed, along)) if along else call("tl.zeros", f"({fixed.block},)", "tl.float32")
        total = self.sums[pointer] = self.scope.before.let(self.scope.fresh(f"sum_{pointer}"), start)
        if from_value:
            if side == "r":
                part = dot(trans(weight), d_out)
            else:
                part = (weight if frame.cols is None else call("tl.sum", weight, 1).rows) * d_out
                self.scope.computed.add("d_out_ptr")
            self.updates(frame).add(total, part)
        elif along is None:
            tile = full(pairs.value(core.id, frame), frame)
            self.updates(frame).add(total, call("tl.sum", tile, 0 if side == "r" else 1))
        elif not term.index and (product := self.product(pairs, core.id, frame, along, side)) is not None:
            self.updates(frame).add(total, product)
        else:
            self.each(pairs, term, frame, along, side, total)

    def product(self, pairs: Pairs, core: str, frame: Frame, along: Range, side: str) -> Expr | None:
        """A term with an axis of its own as a product of matrices; None if it is none."""
        found = pairs.factors(core, along.axis)
        if found is None:
            return None
        pair: Expr | None = None
        for id_ in found.pairs:
            x = pairs.value(id_, frame).expr
            pair = x if pair is None else pair * x
        assert pair is not None and frame.rows is not None, "a gradient has no factor over pairs"
        near: Range | None = frame.rows
        far, own, other, tile = frame.cols, found.queries, found.rows, pair
        if side == "r":
            near, far, own, other, tile = frame.cols, frame.rows, found.rows, found.queries, trans(pair)
        if frame.cols is None:
            out = pair
        elif other:
            out = dot(tile, pairs.matrix(other, Frame(far, along, self.program)).expr)
        else:
            out = call("tl.sum", tile, 1).rows
        for id_ in (*own, *found.neither):
            out = out * pairs.plain(id_, Frame(near, along, self.program)).expr
        return out

    def each(self, pairs: Pairs, term: Term, frame: Frame, along: Range, side: str, total: Expr) -> None:
        """A term with an axis of its own, index by index."""
        around = Part(total, moves=frame.cols is not None)
        read = pairs.value(term.index, frame).expr if term.index else None
        outer = full(pairs.value(term.core, frame), frame) if term.index else None
        with self.scope.loop(along.axis, around) as index:
            if read is not None and outer is not None:
                tile = where(read.same(index), outer, 0.0)
            else:
                inner = frame.put(along.axis, Part(index, loops=frozenset({index.op})))
                tile = full(pairs.value(term.core, inner), frame)
            column = call("tl.sum", tile, 0 if side == "r" else 1)
            self.scope.deep[-1][1].add(total, where(Expr(along.index).same(index).cols, column.rows, 0.0))

    # -- memory ------------------------------------------------------------------------------------------------------

    def slot(self, pointer: str, side: Range | None, along: Range | None) -> Expr:
        """Where a result of this program lies: [sequence, place, *axes, along]; without places the tile's number."""
        matrix = side is not None and along is not None
        if side is None:
            at = Expr(self.n) * self.all + self.first
        else:
            axis = None if side.block == "BQ" else side.axis
            at = Expr(self.n) * self.count(axis) + (Expr(side.index).rows if matrix else Expr(side.index))
        for a, index in self.program:
            at = at * self.scope.size(a) + index.expr
        if along is not None:
            at = at * self.scope.size(along.axis) + (Expr(along.index).cols if matrix else Expr(along.index))
        return self.scope.pointer(pointer) + at

    def store(self, name: str, value: Expr, side: Range | None, along: Range | None) -> None:
        matrix = side is not None and along is not None
        masks = [] if side is None else [Expr(side.has).rows if matrix else Expr(side.has)]
        masks += [] if along is None else [Expr(along.has).cols if matrix else Expr(along.has)]
        self.after.store(self.slot(f"{name}_ptr", side, along), value, conjunction(masks))

    def finish(self, doc: str) -> Made:
        scope = self.scope
        body = (*scope.before.body, *self.tiles, *self.after.body)
        place = self.lines.place(self.form.node.span)
        kernel = Kernel(self.name, f"{doc} ({place})", (*scope.pointers, *self.counts), body,
                        sizes=tuple(scope.sizes), ends=tuple(scope.ends.items()))  # fmt: skip
        factors = frozenset(p for p in scope.pointers if p not in scope.computed)
        return Made(kernel, factors, tuple(self.made))
