"""A source's graphs as values of a tile of queries and rows inside a kernel.

A value is over the rows of a *frame*, its columns, both or neither: a pair's frame is queries by rows, an operand's is
queries, or rows, by one more axis, the columns of a matrix. Each program has one index along every other axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce

from chunkc.backends.attend import Form
from chunkc.backends.layout import generic
from chunkc.backends.triton.kernel import Builder, Expr, Loop, call, dot, lift, maximum, minimum, over, trans, where
from chunkc.backends.writer import is_name, unused
from chunkc.ir import nodes as N
from chunkc.ir.axes import Size
from chunkc.ir.graph import Graph

INFINITE = ("inf", "-inf")


class NoKernel(Exception):
    """Why an attention has no kernels, as half a sentence."""


@dataclass(frozen=True)
class Range:
    """An axis that a tile's rows or columns are over: the variables of its indices and of which of them are there, and
    the constant that says how many a tile has. `moves`: each step of the kernel's loop takes others."""

    axis: str
    index: str
    has: str
    block: str
    moves: bool


@dataclass(frozen=True)
class Part:
    """A value in a frame: whether it is over the frame's rows, its columns, a tile that moves, and which loops over an
    axis it is inside of. What is over rows or columns is a matrix, with 1 for what it is not over."""

    expr: Expr
    rows: bool = False
    cols: bool = False
    moves: bool = False
    loops: frozenset[str] = frozenset()

    def like(self, expr: Expr) -> Part:
        return replace(self, expr=expr)


def joined(expr: Expr, parts: list[Part]) -> Part:
    """A value made of others elementwise."""
    return Part(expr, any(p.rows for p in parts), any(p.cols for p in parts), any(p.moves for p in parts),
                frozenset().union(*(p.loops for p in parts)))  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """What rows and columns are over, and where a program stands along other axes."""

    rows: Range | None
    cols: Range | None
    at: tuple[tuple[str, Part], ...] = ()

    def index(self, axis: str) -> Part | Range:
        for r in (self.rows, self.cols):
            if r is not None and r.axis == axis:
                return r
        found = dict(self.at).get(axis)
        if found is None:
            raise NoKernel(f"it reads along {axis} what differs from pair to pair")
        return found

    def put(self, axis: str, index: Part | Range) -> Frame:
        """The frame with an axis where another one is, or a program's own."""
        if isinstance(index, Range):
            renamed = replace(index, axis=axis)
            return replace(self, rows=renamed) if self.rows == index else replace(self, cols=renamed)
        return replace(self, at=(*(x for x in self.at if x[0] != axis), (axis, index)))


class Scope:
    """A kernel's statements before its loop, inside of it and inside of loops over an axis; its names and constants.

    `constants` are names that the spec gives; `numbers` what launches compute, by name, of all kernels together."""

    def __init__(self, constants: set[str], numbers: dict[str, str]) -> None:
        self.before, self.inside = Builder(), Builder()
        self.deep: list[tuple[str, Builder]] = []
        self.taken = {*constants, "tl"}
        self.reserved: set[str] = set()
        self.blocks: dict[str, Range] = {}
        self.loaded: dict[Expr, Expr] = {}  # before the loop, by what is read
        self.computed: set[str] = set()  # pointers of what is more than a factor of products of matrices
        self.sizes: dict[str, None] = {}
        self.numbers = numbers
        self.ends: dict[str, str] = {}
        self.pointers: dict[str, None] = {}

    def fresh(self, hint: str) -> str:
        return unused(hint, self.taken)

    def offered(self, name: str) -> str:
        """A name that was kept free for this, or one like it if it is used already."""
        if name in self.reserved:
            self.reserved.remove(name)
            return name
        return self.fresh(name)

    def size(self, name: str) -> Expr:
        self.sizes[name] = None
        return Expr(name)

    def number(self, text: str) -> Expr:
        """A constant that the launch computes."""
        name = next((n for n, known in self.numbers.items() if known == text), None)
        if name is None:
            name = self.fresh("number")
            while name in self.numbers:
                name = self.fresh("number")
            self.numbers[name] = text
        self.taken.add(name)
        return self.size(name)

    def pointer(self, name: str) -> Expr:
        self.pointers[name] = None
        return Expr(name)

    def place(self, part: Part) -> Builder:
        """Where a value's statement stands: as far out as what it is made of allows."""
        for axis, builder in reversed(self.deep):
            if axis in part.loops:
                return builder
        return self.inside if part.moves else self.before

    def let(self, hint: str, part: Part) -> Part:
        return part.like(self.place(part).let(self.fresh(hint), part.expr))

    def block(self, axis: str) -> Range:
        """All of an axis as the columns of a matrix."""
        if axis not in self.blocks:
            index, has, block = (self.fresh(f"{x}_{axis}") for x in ("at", "has", "BLOCK"))
            self.before.let(index, call("tl.arange", 0, self.size(block)))
            self.before.let(has, Expr(index) < self.size(axis))
            self.ends[index] = axis
            self.blocks[axis] = Range(axis, index, has, block, moves=False)
        return self.blocks[axis]

    @contextmanager
    def loop(self, axis: str, around: Part) -> Iterator[Expr]:
        """A loop over an axis, in the place of a value that it adds to."""
        name = self.fresh(f"each_{axis}")
        builder = Builder()
        outer = self.place(around)
        self.deep.append((name, builder))
        yield Expr(name)
        self.deep.pop()
        stop = self.size(axis)
        outer.body.append(Loop(name, stop, over(stop.op, (stop.op,)), tuple(builder.body)))


@dataclass(frozen=True)
class Operand:
    """How an operand lies: its pointer, its leading dimensions' number as far as a program has one of its own (None:
    it has none), the axis of its places and how many there are of a sequence, and its own axes in order."""

    pointer: str
    lead: Expr | None
    place: str | None
    count: str
    axes: tuple[str, ...]


@dataclass
class Pairs:
    """Evaluates a graph of a source; `given` are values that are there already, by the node's id."""

    graph: Graph
    form: Form
    scope: Scope
    operands: dict[str, Operand]
    places: dict[str, Part]
    known: dict[Size, str]
    notes: dict[str, str]
    names: dict[str, str]
    given: dict[str, Part] = field(default_factory=dict)
    memo: dict[tuple[str, Frame], Part] = field(default_factory=dict)
    whole: bool = False  # whether what is loaded is a factor of a product of matrices, as it is

    def __post_init__(self) -> None:
        self.uses: dict[str, int] = {}
        for n in self.graph.nodes:
            for a in n.operands():
                self.uses[a] = self.uses.get(a, 0) + 1

    def value(self, id_: str, frame: Frame) -> Part:
        if id_ in self.given:
            return self.given[id_]
        key = (id_, frame)
        if key not in self.memo:
            node = self.graph[id_]
            part = self.compute(node, frame)
            if isinstance(node, N.Map) and (
                self.uses.get(id_, 0) > 1 or len(part.expr.text()) > 60 or not generic(node)
            ):
                part = self.scope.let("x" if generic(node) or not is_name(node.id) else node.id, part)
            self.memo[key] = part
        return self.memo[key]

    def compute(self, node: N.AnyNode, frame: Frame) -> Part:
        if isinstance(node, N.Input):
            return self.load(node, frame)
        if isinstance(node, N.Const):
            return Part(self.constant(node))
        if isinstance(node, N.Coord | N.Bounds):
            return self.coordinate(node, frame)
        if isinstance(node, N.Map):
            return self.map(node, frame)
        if isinstance(node, N.Reduce):
            return self.reduce(node, frame)
        if isinstance(node, N.Rename):
            return self.value(node.arg, frame.put(node.source, frame.index(node.target)))
        if isinstance(node, N.Expand):
            return self.value(node.arg, frame.put(node.source, self.group(node, frame)))
        if isinstance(node, N.Gather):
            index = self.scope.let("at", self.value(node.index, frame))
            if not isinstance(self.graph[node.arg], N.Input):
                raise NoKernel("it reads a computed value at computed positions")
            return self.value(node.arg, frame.put(node.axis, index))
        raise NoKernel(f"it has {node.kind} of what differs from pair to pair")

    # -- memory ------------------------------------------------------------------------------------------------------

    def load(self, node: N.Input, frame: Frame) -> Part:
        """An operand where the frame stands."""
        operand = self.operands[node.id]
        found = [(a, frame.index(a)) for a in (*((operand.place,) if operand.place else ()), *operand.axes)]
        ranges = [x for _, x in found if isinstance(x, Range)]
        parts = [x for _, x in found if isinstance(x, Part)]
        matrix = len(ranges) > 1 or any(p.rows or p.cols for p in parts)
        at, masks = operand.lead, []
        for axis, x in found:
            index = self.oriented(x, frame, matrix) if isinstance(x, Range) else x.expr
            if isinstance(x, Range):
                masks.append(self.oriented(replace(x, index=x.has), frame, matrix))
            elif x.rows or x.cols:
                masks += [x.expr >= 0, x.expr < self.scope.size(axis)]
            count = Expr(operand.count) if axis == operand.place else self.scope.size(axis)
            at = index if at is None else at * count + index
        if len(ranges) + len(parts) and any(p.rows or p.cols for p in parts):
            masks += self.inside(frame, [p for p in parts if p.rows or p.cols])
        pointer = self.scope.pointer(operand.pointer)
        if not self.whole:
            self.scope.computed.add(operand.pointer)
        rows = any(r == frame.rows for r in ranges) or any(p.rows for p in parts)
        cols = any(r == frame.cols for r in ranges) or any(p.cols for p in parts)
        moves = any(r.moves for r in ranges) or any(p.moves for p in parts)
        part = Part(pointer, rows, cols, moves, frozenset().union(*(p.loops for p in parts)))
        builder = self.scope.place(part)
        place = pointer if at is None else pointer + at
        if builder is not self.scope.before or (value := self.scope.loaded.get(place)) is None:
            name = self.scope.offered(self.names[node.name])
            value = builder.load(name, place, conjunction(masks), self.notes.get(node.name, ""))
            self.scope.loaded |= {place: value} if builder is self.scope.before else {}
        if not matrix and (rows or cols):
            value = value.rows if rows else value.cols
        return part.like(value)

    def inside(self, frame: Frame, parts: list[Part]) -> list[Expr]:
        """That the places which a computed index is made of are there."""
        out = []
        for flag, r, column in (("rows", frame.rows, True), ("cols", frame.cols, False)):
            if r is not None and any(getattr(p, flag) for p in parts):
                out.append(Expr(r.has).rows if column else Expr(r.has).cols)
        return out

    def oriented(self, r: Range, frame: Frame, matrix: bool) -> Expr:
        if not matrix:
            return Expr(r.index)
        return Expr(r.index).rows if frame.rows is not None and frame.rows.axis == r.axis else Expr(r.index).cols

    def constant(self, node: N.Const) -> Expr:
        """A number, a size by its name, or what the launch computes."""
        size = node.size
        text = size.text(9, self.known)
        if size.op == "param" and text in self.scope.taken:
            return self.scope.size(text)
        if text.replace(".", "").isdigit():
            return lift(text)
        return self.scope.number(text)

    def coordinate(self, node: N.Coord | N.Bounds, frame: Frame) -> Part:
        axis = node.axes[0]
        index = frame.index(axis)
        if axis in self.places:
            place = self.places[axis]
            assert isinstance(index, Range)
            rows = index == frame.rows
            return replace(place, expr=place.expr.rows if rows else place.expr.cols, rows=rows, cols=not rows)
        if isinstance(index, Range):
            rows = index == frame.rows
            return Part(self.oriented(index, frame, True), rows, not rows, index.moves)
        return index

    def group(self, node: N.Expand, frame: Frame) -> Part:
        """Which group an index is in."""
        index = frame.index(node.target)
        if isinstance(index, Range):
            raise NoKernel(f"{node.source} are groups of what a matrix is over")
        each = self.scope.size(node.target) // self.scope.size(node.source)
        return index.like(index.expr // each)

    # -- elementwise -------------------------------------------------------------------------------------------------

    def map(self, node: N.Map, frame: Frame) -> Part:
        if (text := self.computed(node.id)) is not None:
            return Part(self.scope.number(text))
        if node.fn == "pow":
            return self.power(node, frame)
        parts = [self.value(a, frame) for a in node.args]
        args = [p.expr for p in parts]
        whole = all(self.graph[a].dtype == "int" for a in node.args)
        if whole and node.fn in REAL:
            args = [a.to("tl.float32") for a in args]
        if node.fn == "%" and whole:  # a kernel's remainder has the sign of what is divided
            return joined((args[0] % args[1] + args[1]) % args[1], parts)
        if node.fn in FUNCTIONS:
            return joined(FUNCTIONS[node.fn](*args), parts)
        raise NoKernel(f"it has {node.fn} of what differs from pair to pair")

    def computed(self, id_: str) -> str | None:
        """The text of a number that the launch computes: a function of constants. None for all else."""
        node = self.graph[id_]
        if isinstance(node, N.Const):
            return node.size.text(9, self.known)
        if not isinstance(node, N.Map) or node.fn not in NUMBERS:
            return None
        args = [self.computed(a) for a in node.args]
        return None if None in args else NUMBERS[node.fn].format(*args)

    def power(self, node: N.Map, frame: Frame) -> Part:
        exponent, base = self.fixed(node.args[1]), self.value(node.args[0], frame)
        if exponent == 0.5:
            return base.like(call("tl.sqrt", base.expr))
        if exponent is None or exponent != int(exponent) or not 1 <= abs(exponent) <= 8:
            if exponent == 0:
                return base.like(lift("1.0"))
            raise NoKernel("it has a power of what differs from pair to pair")
        base = self.scope.let("x", base)
        out = base.expr
        for _ in range(int(abs(exponent)) - 1):
            out = out * base.expr
        return base.like(out if exponent > 0 else lift("1.0") / out)

    def fixed(self, id_: str) -> float | None:
        """A number that is known now."""
        node = self.graph[id_]
        if isinstance(node, N.Const):
            size = node.size
            return None if size.params() else float(size.evaluate({}))
        if isinstance(node, N.Map) and node.fn in ("-", "+", "neg"):
            args = [self.fixed(a) for a in node.args]
            if all(a is not None for a in args):
                a, *b = (a for a in args if a is not None)
                return -a if node.fn == "neg" else a - b[0] if node.fn == "-" else a + b[0]
        return None

    # -- sums --------------------------------------------------------------------------------------------------------

    def reduce(self, node: N.Reduce, frame: Frame) -> Part:
        if node.fn not in ("sum", "mean") or node.chunk is not None:
            raise NoKernel(f"it has {node.fn} of what differs from pair to pair")
        out = self.sum(node.arg, node.over, frame)
        if node.fn == "mean":
            for a in node.over:
                out = out.like(out.expr / self.scope.size(a))
        return self.scope.let("sum", out)

    def sum(self, arg: str, axes: tuple[str, ...], frame: Frame) -> Part:
        """A sum over axes of fixed size: of a product of what is over queries and what is over rows one of matrices,
        else term by term."""
        axis, *rest = axes
        if not rest and (product := self.product(arg, axis, frame)) is not None:
            return product
        around = Part(lift(0), True, True, True, frozenset().union(*(p.loops for _, p in frame.at)))
        total = self.scope.place(around).let(self.scope.fresh("total"), zeros(frame))
        with self.scope.loop(axis, around) as index:
            inner = frame.put(axis, Part(index, loops=frozenset({index.op})))
            term = self.sum(arg, tuple(rest), inner) if rest else self.value(arg, inner)
            self.scope.deep[-1][1].add(total, term.expr)
        return around.like(total)

    def product(self, arg: str, axis: str, frame: Frame) -> Part | None:
        """The sum over an axis of a product, as a product of matrices; None if it is none."""
        sides = self.factors(arg, axis)
        if sides is None or not sides.queries or not sides.rows or frame.rows is None or frame.cols is None:
            return None
        block = self.scope.block(axis)
        a = self.matrix([*sides.queries, *sides.neither], Frame(frame.rows, block, frame.at))
        b = self.matrix(sides.rows, Frame(frame.cols, block, frame.at))
        out = Part(dot(a.expr, trans(b.expr)), True, True, a.moves or b.moves, a.loops | b.loops)
        for id_ in sides.pairs:
            p = self.value(id_, frame)
            out = joined(out.expr * p.expr, [out, p])
        return out

    def matrix(self, factors: list[str], frame: Frame) -> Part:
        """A factor of a product of matrices: a product in a frame of an operand."""
        out: Part | None = None
        whole = len(factors) == 1 and self.loads(factors[0])
        for id_ in factors:
            self.whole = whole
            p = self.value(id_, frame)
            self.whole = False
            out = p if out is None else joined(out.expr * p.expr, [out, p])
        assert out is not None
        if not (out.rows and out.cols):
            raise NoKernel("a factor of a sum is not over the axis that it is summed along")
        return out

    def loads(self, id_: str) -> bool:
        """Whether a value is an operand as it lies in memory."""
        node = self.graph[id_]
        return isinstance(node, N.Input) or isinstance(node, N.Rename | N.Expand) and self.loads(node.arg)

    def plain(self, id_: str, frame: Frame) -> Part:
        """A value that is computed with: its operands are read in full precision."""
        self.scope.computed |= {self.operands[n].pointer for n in self.graph.reachable([id_]) if n in self.operands}
        return self.value(id_, frame)

    def factors(self, arg: str, axis: str) -> Sides | None:
        """The factors of a product by what they are over; None where one is over pairs and the axis at once."""
        out = Sides()
        todo = [arg]
        while todo:
            node = self.graph[todo.pop()]
            if isinstance(node, N.Map) and node.fn == "*" and node.id not in self.given:
                todo += reversed(node.args)
                continue
            t, s = self.form.query in node.axes, any(a in self.rows for a in node.axes)
            if axis not in node.axes:
                out.pairs.append(node.id)
            elif t and s or node.id in self.given:
                return None
            else:
                (out.queries if t else out.rows if s else out.neither).append(node.id)
        return out

    @property
    def rows(self) -> set[str]:
        return {a for a in self.places if a != self.form.query}


@dataclass
class Sides:
    """A product's factors: over the axis and queries, over it and rows, over it alone, and without it."""

    queries: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    neither: list[str] = field(default_factory=list)
    pairs: list[str] = field(default_factory=list)


def zeros(frame: Frame) -> Expr:
    blocks = [r.block if r is not None else "1" for r in (frame.rows, frame.cols)]
    return call("tl.zeros", f"({', '.join(blocks)})", "tl.float32")


def full(part: Part, frame: Frame) -> Expr:
    """A value over all of a frame."""
    has = (part.rows or frame.rows is None, part.cols or frame.cols is None)
    return part.expr if all(has) and (part.rows or part.cols) else zeros(frame) + part.expr


def conjunction(masks: list[Expr]) -> Expr | None:
    out: Expr | None = None
    for m in masks:
        out = m if out is None else out & m
    return out


def _softplus(x: Expr) -> Expr:
    return maximum(x, 0.0) + call("tl.log", call("tl.exp", -call("tl.abs", x)) + 1.0)


def _sigmoid(x: Expr) -> Expr:
    return call("tl.sigmoid", x)


NUMBERS = {"+": "({} + {})", "-": "({} - {})", "*": "({} * {})", "/": "({} / {})", "pow": "({} ** {})", "neg": "(-{})",
           "exp": "math.exp({})", "log": "math.log({})", "as": "{}"}  # fmt: skip
REAL = ("exp", "log", "tanh", "sigmoid", "silu", "gelu", "relu", "softplus", "logsigmoid", "sin", "cos", "erf")
FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b,
    "%": lambda a, b: a - call("tl.floor", a / b) * b,
    "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
    "==": lambda a, b: a.same(b), "!=": lambda a, b: a.differs(b),
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "not": lambda a: a ^ "True",
    "neg": lambda a: -a, "as": lambda a: a, "stop": lambda a: a, "where": where,
    "exp": lambda a: call("tl.exp", a), "log": lambda a: call("tl.log", a),
    "tanh": lambda a: _sigmoid(a * 2.0) * 2.0 - 1.0, "sigmoid": _sigmoid, "silu": lambda a: a * _sigmoid(a),
    "gelu": lambda a: a * 0.5 * (call("tl.erf", a * 0.7071067811865476) + 1.0),
    "relu": lambda a: maximum(a, 0.0), "softplus": _softplus, "logsigmoid": lambda a: -_softplus(-a),
    "abs": lambda a: call("tl.abs", a), "floor": lambda a: call("tl.floor", a).to("tl.int64"),
    "min": lambda *a: reduce(minimum, a), "max": lambda *a: reduce(maximum, a),
    "sin": lambda a: call("tl.sin", a), "cos": lambda a: call("tl.cos", a), "erf": lambda a: call("tl.erf", a),
}  # fmt: skip
