"""Reads of values at other positions: `E[a = e]`."""

from __future__ import annotations

from chunkc.dsl import prelude
from chunkc.dsl import tree as T
from chunkc.dsl.scope import AxisName, BodyValue, StateName, Symbol, Value
from chunkc.dsl.sizes import Context
from chunkc.dsl.weights import Weights, listed
from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, DType, Size
from chunkc.ir.diagnostics import Span


class Reads(Weights):
    """Checks reads; a subclass checks the expressions in them."""

    def renamed(self, id_: str, old: str, new: str, span: Span, c: Context) -> str:
        """A value under a second name of one of its axes."""
        node = c.builder.nodes[id_]
        axes = tuple(new if a == old else a for a in node.axes)
        return c.builder.add(N.Rename, "", span, arg=id_, source=old, target=new, axes=axes, dtype=node.dtype)

    def read(self, e: T.Index, c: Context) -> str | None:
        """`E[a = e, ...]`."""
        if isinstance(e.base, T.Name) and (e.base.text in prelude.FUNCTIONS or e.base.text in prelude.LATER):
            self.report.error("not-a-value", f"'{e.base.text}[...]' takes an argument: {e.base.text}[...](x)", e.span)
            return None
        if isinstance(e.base, T.Name):
            symbol: Symbol | None = self.scope.names.get(e.base.text)
            if isinstance(symbol, StateName) and symbol.outer and len(e.entries) == 1 and e.to is None:
                edge = self.state_edge(symbol, e, c)
                if edge is not None:
                    return edge
        id_ = self.expr(e.base, c)
        for ix in e.entries:
            if ix.at is None or e.to is not None:
                self.report.error("bad-read", "a read names a position: x[t = t - 1]", ix.span)
                return None
            if id_ is None:
                return None
            id_ = self.read_one(id_, ix, e.span, c)
            if id_ is not None and isinstance(e.base, T.Name):
                id_ = self.before_first(e.base, id_, e.span, c)
        return id_

    def before_first(self, base: T.Name, id_: str, span: Span, c: Context) -> str:
        """A shifted trajectory, which is the state's initial value before the first token."""
        symbol, node = self.scope.names.get(base.text), c.builder.nodes[id_]
        if not isinstance(symbol, StateName) or symbol.initial is None or c.outer is not None:
            return id_
        if not isinstance(node, N.Shift) or node.arg != symbol.outer or self.axes[node.axis].kind != "time":
            return id_
        b = c.builder
        place = b.add(N.Coord, "", span, axis=node.axis, axes=(node.axis,), dtype="int")
        early = b.map("<", place, b.const(node.by, whole=True), span=span)
        out = b.map("where", early, symbol.initial, id_, span=span)
        return b.add(N.Map, "", span, fn="as", args=(out,), axes=node.axes, dtype=node.dtype)

    def state_edge(self, symbol: StateName, e: T.Index, c: Context) -> str | None:
        """A state's last or initial value; None for any other read of its trajectory."""
        at = e.entries[0].at
        trajectory = (c.outer or c.builder).nodes[symbol.outer]
        if e.entries[0].name.text != trajectory.axes[0]:
            return None  # no read along the recurrence
        if _is_minus_one(at):
            if symbol.initial is not None:
                return self.fetch(symbol.initial, e.span, c)
            zero = c.builder.const(0.0, e.span)
            return c.builder.add(N.Map, "", e.span, fn="as", args=(zero,), axes=symbol.axes)
        if (isinstance(at, T.Binary) and at.op == "-" and isinstance(at.right, T.NumberLit) and at.right.text == "1"
                and isinstance(at.left, T.CallExpr) and isinstance(at.left.fn, T.Name) and at.left.fn.text == "size"
                and [a.value for a in at.left.args] == [e.entries[0].name]):  # fmt: skip
            return self.fetch(symbol.final, e.span, c)
        return None

    def read_one(self, id_: str, ix: T.Ix, span: Span, c: Context) -> str | None:
        axis = self.axis(ix.name)
        if axis is None or ix.at is None:
            return None
        node = c.builder.nodes[id_]
        name = axis.name
        if name == c.bound:
            return self.read_outside(id_, ix, span, c)
        if name not in node.axes:
            self.report.error("no-axis", f"this has no axis '{name}' to read at", ix.span,
                              notes=(f"it is over {listed(node.axes)}",))  # fmt: skip
            return None
        if isinstance(ix.at, T.Name):
            other = self.scope.names.get(ix.at.text)
            if isinstance(other, AxisName) and other.axis.space == axis.space:
                if other.axis.name == name:
                    return id_
                if other.axis.name not in node.axes:
                    return self.renamed(id_, name, other.axis.name, span, c)
        rest = tuple(a for a in node.axes if a != name)
        if not axis.is_sequence:
            if self.mentions_value(ix.at):
                return self.gathered(id_, axis, ix, span, c)
            at = self.whole(ix.at, 0, "bad-read", "a position")
            if at is None:
                return None
            return c.builder.add(N.Slice, "", span, arg=id_, axis=name, at=at, axes=rest, dtype=node.dtype)
        known = len(self.report.errors)
        by = self.shift_of(ix.at, name)
        if by is not None:
            return c.builder.add(N.Shift, "", span, arg=id_, axis=name, by=by, axes=node.axes, dtype=node.dtype)
        if len(self.report.errors) > known:
            return None
        if axis.kind == "unordered":
            self.report.error("bad-read", f"'{name}' has no order: it has no positions to read at", ix.span)
            return None
        back = self.chunks_back(axis, ix.at) if axis.kind == "chunk" else None
        if back is not None:  # of chunks before: moved first, so that the state keeps them
            distance, of = back
            by = self.whole(distance, 0, "bad-read", "a distance")
            if by is None:
                return None
            id_ = c.builder.add(N.Shift, "", span, arg=id_, axis=name, by=by, axes=node.axes, dtype=node.dtype)
            ix = T.Ix(ix.span, ix.name, None, None, of)
        return self.gathered(id_, axis, ix, span, c)

    def chunks_back(self, axis: Axis, at: T.Expr) -> tuple[T.Expr, T.Expr] | None:
        """n and `c(t)` where a position is `c(t) - n`."""
        if not (isinstance(at, T.Binary) and at.op == "-" and isinstance(at.left, T.CallExpr)):
            return None
        called = at.left.fn
        known = isinstance(called, T.Name) and called.text == axis.name and not self.mentions_value(at.right)
        return (at.right, at.left) if known else None

    def gathered(self, id_: str, axis: Axis, ix: T.Ix, span: Span, c: Context) -> str | None:
        """A read at computed positions, which are integers."""
        assert ix.at is not None
        index = self.expr(ix.at, c)
        if index is None:
            return None
        if not self.integer(index, "a position", ix.at.span, c, hints=("write floor(x)",)):
            return None
        return c.builder.gather(id_, index, axis.name, span)

    def integer(self, id_: str, what: str, span: Span, c: Context, hints: tuple[str, ...] = ()) -> bool:
        """Whether a value is an integer; reports one that is not."""
        dtype: DType = c.builder.nodes[id_].dtype
        if dtype != "int":
            self.report.error("type-mismatch", f"{what} is an integer, this is {dtype}", span, hints=hints)
        return dtype == "int"

    def read_outside(self, id_: str, ix: T.Ix, span: Span, c: Context) -> str | None:
        """In a body, a captured tensor read at another step: moved outside, then captured."""
        node = c.builder.nodes[id_]
        assert c.outer is not None and c.bound is not None and ix.at is not None
        known = len(self.report.errors)
        by = self.shift_of(ix.at, c.bound)
        if by is None and len(self.report.errors) > known:
            return None
        if not isinstance(node, N.Capture) or self.mentions_body(ix.at):
            self.later("inside a recurrence, a read at another step of what the recurrence computes", ix.span)
            return None
        outer = c.outer.nodes[node.outer]
        if c.bound not in outer.axes:
            self.report.error("no-axis", f"this has no axis '{c.bound}' to read at", ix.span,
                              notes=(f"it is over {listed(outer.axes)}",))  # fmt: skip
            return None
        if by is not None:
            moved: str | None = c.outer.add(N.Shift, "", span, arg=outer.id, axis=c.bound, by=by, axes=outer.axes,
                                            dtype=outer.dtype)  # fmt: skip
        else:
            moved = self.gathered(outer.id, self.axes[c.bound], ix, span, Context(c.outer))
        return None if moved is None else self.fetch(moved, span, c)

    def shift_of(self, at: T.Expr, axis: str) -> Size | None:
        """n where the position is `axis - n`."""
        if isinstance(at, T.Name) and at.text == axis:
            return Size.of(0)
        if isinstance(at, T.Binary) and at.op in "+-" and isinstance(at.left, T.Name) and at.left.text == axis:
            if self.mentions_value(at.right):
                return None
            by = self.whole(at.right, -(2**31), "bad-read", "a distance")
            return Size(op="neg", args=(by,)) if by is not None and at.op == "+" else by
        return None

    def mentions_body(self, e: T.Expr) -> bool:
        """Whether an expression speaks of what the recurrence around it computes."""
        if isinstance(e, T.Name):
            return isinstance(self.scope.names.get(e.text), StateName | BodyValue)
        parts: list[T.Expr] = []
        if isinstance(e, T.Unary):
            parts = [e.arg]
        elif isinstance(e, T.Binary):
            parts = [e.left, e.right]
        elif isinstance(e, T.Index):
            parts = [e.base, *(x for ix in e.entries for x in (ix.at, ix.cond) if x is not None)]
        elif isinstance(e, T.CallExpr):
            parts = [e.fn, *(a.value for a in e.args)]
        return any(self.mentions_body(x) for x in parts)

    def mentions_value(self, e: T.Expr) -> bool:
        """Whether an expression speaks of tensors or coordinates, and so is no size."""
        if isinstance(e, T.Name):
            return isinstance(self.scope.names.get(e.text), Value | StateName | BodyValue | AxisName)
        if isinstance(e, T.Unary):
            return self.mentions_value(e.arg)
        if isinstance(e, T.Binary):
            return self.mentions_value(e.left) or self.mentions_value(e.right)
        if isinstance(e, T.CallExpr):
            sized = isinstance(e.fn, T.Name) and e.fn.text == "size"
            return not sized and any(self.mentions_value(a.value) for a in e.args)
        return isinstance(e, T.Index)


def _is_minus_one(e: T.Expr | None) -> bool:
    return isinstance(e, T.Unary) and e.op == "-" and isinstance(e.arg, T.NumberLit) and e.arg.text == "1"
