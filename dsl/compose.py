"""Functions of the prelude that are made of others: rotary embeddings, losses, coordinates of one axis in another."""

from __future__ import annotations

from dataclasses import replace

from chunkc.dsl import tree as T
from chunkc.dsl.along import Reducers
from chunkc.dsl.scope import AxisName
from chunkc.dsl.sizes import Context
from chunkc.dsl.weights import listed
from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, Size
from chunkc.ir.diagnostics import Span

ROPE_BASE = 10000.0
LEAST_LOG = -100.0  # of a probability in a loss: that of 0 is no infinity


class Composed(Reducers):
    """Checks calls of composed functions; a subclass checks the expressions in them."""

    def rope(self, x: str, position: str, args: list[T.Arg], axes: list[tuple[str, T.Name]], span: Span,
             c: Context) -> str | None:  # fmt: skip
        """Pairs (n, n + size/2) of an axis turned by position * base^(-2n/size)."""
        b = c.builder
        axis = self.axes[axes[0][0]]
        if len(axes) != 1 or axis.size is None or axis.name not in b.nodes[x].axes:
            self.report.error("no-axis", "rope turns pairs along one axis of fixed size of its argument",
                              axes[0][1].span,
                              related=((args[0].value.span, f"this is over {listed(b.nodes[x].axes)}"),))  # fmt: skip
            return None
        if not self.integer(position, "a position", args[1].value.span, c, hints=("write floor(x)",)):
            return None
        half = Size(op="/", args=(axis.size, Size.of(2)))
        if not self.defined(half, axes[0][1].span):
            return None
        x, position = self.align([x, position], [a.value for a in args], c)
        place = b.add(N.Coord, "", span, axis=axis.name, axes=(axis.name,), dtype="int")
        pair = b.map("%", place, b.const(half, whole=True))
        rate = b.map("exp", b.map("*", pair, b.const(_rate(axis.size))))
        angle = b.map("*", position, rate, span=span)
        other = b.map("%", b.map("+", place, b.const(half, whole=True)), b.const(axis.size, whole=True))
        partner = b.gather(x, other, axis.name, span)
        sign = b.map("where", b.map("<", place, b.const(half, whole=True)), b.const(-1.0), b.const(1.0))
        turned = b.map("*", b.map("*", sign, partner), b.map("sin", angle), span=span)
        return b.map("+", b.map("*", x, b.map("cos", angle), span=span), turned, span=span)

    def ce(self, x: str, label: str, args: list[T.Arg], axes: list[tuple[str, T.Name]], span: Span,
           c: Context) -> str | None:  # fmt: skip
        """log(sum of exp(x)) - x[label], along one axis."""
        b = c.builder
        axis = axes[0][0]
        if len(axes) != 1 or axis not in b.nodes[x].axes or self.axes[axis].is_sequence:
            self.report.error("no-axis", "ce works along one axis of fixed size of its logits", axes[0][1].span,
                              related=((args[0].value.span, f"this is over {listed(b.nodes[x].axes)}"),))  # fmt: skip
            return None
        if not self.integer(label, "a label", args[1].value.span, c):
            return None
        rest = tuple(a for a in b.nodes[x].axes if a != axis)
        most = b.map("stop", b.add(N.Reduce, "", span, fn="max", arg=x, over=(axis,), axes=rest))
        powers = b.map("exp", b.map("-", x, most))
        total = b.map("log", b.add(N.Reduce, "", span, fn="sum", arg=powers, over=(axis,), axes=rest))
        chosen = b.gather(x, label, axis, span)
        return b.map("-", b.map("+", total, most), chosen, span=span)

    def bce(self, args: list[tuple[str | None, T.Expr]], named: dict[str, T.Arg], span: Span,
            c: Context) -> str | None:  # fmt: skip
        """-(y (1 - p)^gamma log p + (1 - y) p^gamma log(1 - p)), logarithms at least -100."""
        b = c.builder
        if any(id_ is None for id_, _ in args):
            return None
        p, y = self.align([id_ for id_, _ in args if id_], [e for _, e in args], c)
        if b.nodes[p].dtype == "bool":
            self.report.error("type-mismatch", "a probability is a number, this is a truth value", args[0][1].span)
            return None
        if b.nodes[y].dtype == "bool":
            y = b.map("where", y, b.const(1.0), b.const(0.0))
        gamma = self.number(named["gamma"].value) if "gamma" in named else Size.of(0)
        if gamma is None:
            return None

        def part(weight: str, chance: str, rest: str) -> str:
            log = b.map("max", b.map("log", chance), b.const(LEAST_LOG))
            out = b.map("*", weight, log)
            return out if gamma == Size.of(0) else b.map("*", out, b.map("pow", rest, b.const(gamma)))

        one = b.const(1.0)
        no, off = b.map("-", one, p), b.map("-", one, y)
        return b.map("neg", b.map("+", part(y, p, no), part(off, no, p)), span=span)

    # -- coordinates -------------------------------------------------------------------------------------------------

    def coordinate_of(self, axis: Axis, e: T.CallExpr, index: T.Index | None, c: Context) -> str | None:
        """`A(x)`: the A-coordinate of x, for the groups of an axis and the chunks of a sequence."""
        if index is not None or len(e.args) != 1 or e.args[0].name is not None:
            self.report.error("bad-call", f"'{axis.name}' takes one position: {axis.name}(x)", e.span)
            return None
        if axis.parent is None:
            self.report.error("not-a-function", f"'{axis.name}' is an axis that divides no other", e.fn.span)
            return None
        arg = e.args[0].value
        if axis.kind == "chunk":
            return self.chunk_of(axis, arg, e.span, c)
        at = self.expr(arg, c)
        parent = self.axes[axis.parent].size
        if at is None or parent is None or axis.size is None:
            return None
        if not self.integer(at, "a position", arg.span, c):
            return None
        run = c.builder.const(Size(op="/", args=(parent, axis.size)), whole=True)
        return c.builder.map("floor", c.builder.map("/", at, run, span=e.span), span=e.span)

    def chunk_of(self, axis: Axis, arg: T.Expr, span: Span, c: Context) -> str | None:
        """The chunk of a position: of each, or of those that a tensor names."""
        assert axis.parent is not None
        outer = c.outer or c.builder
        time = self.axes[axis.parent]
        symbol = self.scope.names.get(arg.text) if isinstance(arg, T.Name) else None
        own = symbol.axis if isinstance(symbol, AxisName) and symbol.axis.space == time.space else None
        if own is not None and c.bound == axis.name:  # inside a recurrence over chunks: the chunk of this step
            return c.builder.add(N.Coord, "", span, axis=axis.name, axes=(), dtype="int")
        of = outer.add(N.Bounds, "", span, fn="of", chunk=axis.name, axes=(time.name,), dtype="int")
        if own is not None:
            target = c.rename.get(own.name, own.name)
            if target != time.name:
                of = self.renamed(of, time.name, target, span, Context(outer))
            return self.fetch(of, span, c)
        if c.outer is not None:
            self.later("inside a recurrence, the chunk of a computed position", span)
            return None
        at = self.expr(arg, c)
        if at is None:
            return None
        if not self.integer(at, "a position", arg.span, c):
            return None
        return c.builder.gather(of, at, time.name, span)

    def span_edge(self, name: str, e: T.CallExpr, c: Context) -> str | None:
        """`first(c)`, `last(c)`, `len(c)`: integers over the chunks; of a tensor's chunk, `first(c(t))`."""
        arg = e.args[0].value
        symbol = self.scope.names.get(arg.text) if isinstance(arg, T.Name) else None
        inner = None
        if isinstance(arg, T.CallExpr) and isinstance(arg.fn, T.Name):
            symbol = self.scope.names.get(arg.fn.text)
            inner = arg
        axis = getattr(symbol, "axis", None)
        if not isinstance(axis, Axis) or axis.kind != "chunk":
            self.report.error("not-an-axis", f"'{name}' takes chunks: {name}(c)", arg.span)
            return None
        fn = {"len": "length"}.get(name, name)
        outer = Context(c.outer) if c.outer is not None else c
        id_ = outer.builder.add(N.Bounds, "", e.span, fn=fn, chunk=axis.name, axes=(axis.name,), dtype="int")
        if inner is None:
            return self.fetch(id_, e.span, c)
        if c.outer is not None:
            outer = replace(c, builder=c.outer, outer=None, bound=None)
        at = self.coordinate_of(axis, inner, None, outer)
        if at is None:
            return None
        out = outer.builder.gather(id_, at, axis.name, e.span)
        return self.fetch(out, e.span, c) if c.outer is not None else out


def _rate(size: Size) -> Size:
    """The exponent's factor: -2 ln(base) / size."""
    log = Size(op="log", args=(Size.of(ROPE_BASE),))
    return Size(op="/", args=(Size(op="*", args=(Size.of(-2.0), log)), size))
