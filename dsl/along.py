"""Functions along named axes: reducers and normalisers, whole, chunk by chunk, or where a condition holds."""

from __future__ import annotations

from dataclasses import dataclass

from chunkc.dsl import prelude
from chunkc.dsl import tree as T
from chunkc.dsl.reads import Reads
from chunkc.dsl.sizes import Context
from chunkc.dsl.weights import listed
from chunkc.ir import nodes as N
from chunkc.ir.diagnostics import Span


@dataclass(frozen=True)
class Along:
    """An axis between a function's brackets: `a`, `a in c`, `a if B`."""

    axis: str
    at: T.Name
    chunk: str | None = None
    cond: T.Expr | None = None


class Reducers(Reads):
    """Checks reducers and normalisers; a subclass checks the expressions in them."""

    def align(self, ids: list[str], exprs: list[T.Expr], c: Context) -> list[str]:
        """Operands with grouped axes expanded that stand beside their members."""
        union = {a for i in ids for a in c.builder.nodes[i].axes}
        out = []
        for id_, e in zip(ids, exprs):
            node = c.builder.nodes[id_]
            for a in node.axes:
                parent = self.axes[a].parent if self.axes[a].kind == "size" else None
                if parent is not None and parent in union and parent not in node.axes:
                    id_ = self.expand(id_, a, parent, e.span, c)
                    node = c.builder.nodes[id_]
            out.append(id_)
        return out

    def expand(self, id_: str, source: str, target: str, span: Span, c: Context) -> str:
        """A tensor over groups read over their members."""
        node = c.builder.nodes[id_]
        axes = tuple(target if a == source else a for a in node.axes)
        return c.builder.add(N.Expand, "", span, arg=id_, source=source, target=target, axes=axes, dtype=node.dtype)

    def along(self, index: T.Index) -> list[Along] | None:
        """The axes between a function's brackets."""
        out: list[Along] = []
        for ix in index.entries:
            if ix.at is not None:
                self.report.error("bad-read", "a reducer names axes, not positions", ix.span)
                return None
            axis = self.axis(ix.name)
            if axis is None:
                return None
            if any(a.axis == axis.name for a in out):
                self.report.error("axis-twice", f"axis '{axis.name}' is named twice", ix.name.span)
                return None
            chunk = self.members(axis.name, ix) if ix.within is not None else None
            if ix.within is not None and chunk is None:
                return None
            out.append(Along(axis.name, ix.name, chunk, ix.cond))
        return out

    def members(self, axis: str, ix: T.Ix) -> str | None:
        """The axis that `axis in X` brings: the chunks of a sequence, or the groups of an axis."""
        assert ix.within is not None
        whole = self.axis(ix.within)
        if whole is None:
            return None
        parent = None if whole.parent is None else self.axes[whole.parent]
        if parent is None or parent.space != self.axes[axis].space:
            self.report.error("not-an-axis", f"'{whole.name}' does not divide '{axis}' into chunks or groups",
                              ix.within.span, hints=(f"declare 'chunk {whole.name} of {axis} = ...'",))  # fmt: skip
            return None
        return whole.name

    def plain_axes(self, index: T.Index) -> list[tuple[str, T.Name]] | None:
        """Axes of which nothing more is said, as `linear`, `conv` and functions of the file want them."""
        found = self.along(index)
        if found is None:
            return None
        for a in found:
            if a.chunk is not None or a.cond is not None:
                self.report.error("bad-call", "this names axes alone, without 'in' or 'if'", a.at.span)
                return None
        return [(a.axis, a.at) for a in found]

    def over_axes(self, name: str, ids: list[str], exprs: list[T.Expr], axes: list[Along],
                  span: Span, c: Context) -> str | None:  # fmt: skip
        """A reducer or normaliser over checked operands."""
        b = c.builder
        for id_, e in zip(ids, exprs):
            if (b.nodes[id_].dtype == "bool") != (name in ("any", "count")):
                takes = "truth values" if name in ("any", "count") else "numbers, not truth values"
                self.report.error("type-mismatch", f"'{name}' takes {takes}", e.span)
                return None
            if b.nodes[id_].dtype == "complex" and name not in ("sum", "mean", "dot"):
                self.report.error("type-mismatch", f"'{name}' takes real numbers, this is complex", e.span)
                return None
        ids = self.align(ids, exprs, c)
        if name == "dot":
            ids = [b.map("*", *ids, span=span)]
        arg: str | None = ids[0]
        for a in axes:
            arg = self.brought(arg, a, exprs[0], span, c) if arg is not None else None
        mask = self.condition(axes, c)
        if arg is None or mask == "":
            return None
        if len({a.chunk for a in axes if a.chunk}) > 1 or sum(self.axes[a.axis].is_sequence for a in axes) > 1:
            self.later(f"'{name}' along two sequences at once", span)
            return None
        if name in prelude.NORMALISERS:
            return self.normalised(name, arg, mask, axes, span, c)
        return self.reduced(name, arg, mask, axes, span, c)

    def brought(self, arg: str, a: Along, e: T.Expr, span: Span, c: Context) -> str | None:
        """The operand with the axis to work along: groups expand to it."""
        node = c.builder.nodes[arg]
        if a.axis in node.axes:
            return arg
        groups = [x for x in node.axes if self.axes[x].parent == a.axis and self.axes[x].kind == "size"]
        if groups:
            return self.expand(arg, groups[0], a.axis, span, c)
        what = "the step of the recurrence" if a.axis == c.bound else f"over {listed(node.axes)}"
        self.report.error("no-axis", f"there is no axis '{a.axis}' here to work along", a.at.span,
                          related=((e.span, f"this is {what}"),))  # fmt: skip
        return None

    def condition(self, axes: list[Along], c: Context) -> str | None:
        """All conditions together; None without one, empty where one was reported."""
        mask: str | None = None
        for a in axes:
            if a.cond is None:
                continue
            id_ = self.expr(a.cond, c)
            if id_ is None:
                return ""
            if c.builder.nodes[id_].dtype != "bool":
                self.report.error("type-mismatch", f"a condition is a truth value, this is "
                                  f"{c.builder.nodes[id_].dtype}", a.cond.span)  # fmt: skip
                return ""
            mask = id_ if mask is None else c.builder.map("and", mask, id_, span=a.cond.span)
        return mask

    def reduce(self, fn: str, arg: str, axes: list[Along], span: Span, c: Context) -> str:
        """The reducing node; groups of an axis are reduced run by run."""
        b = c.builder
        over = tuple(a.axis for a in axes)
        chunk = next((a.chunk for a in axes if a.chunk), None)
        have = b.nodes[arg].axes
        missing = tuple(a for a in over if a not in have)
        if missing:  # a condition or number alone: it counts once for each position
            arg = b.add(N.Map, "", span, fn="as", args=(arg,), axes=(*have, *missing), dtype=b.nodes[arg].dtype)
            have = b.nodes[arg].axes
        rest = ((chunk,) if chunk else ()) + tuple(a for a in have if a not in over)
        kind = b.nodes[arg].dtype
        dtype = (
            kind
            if fn in ("sum", "max", "min")
            else "bool"
            if fn == "any"
            else "complex"
            if kind == "complex"
            else "float"
        )
        return b.add(N.Reduce, fn, span, fn=fn, arg=arg, over=over, axes=rest, dtype=dtype, chunk=chunk)

    def reduced(self, name: str, arg: str, mask: str | None, axes: list[Along], span: Span, c: Context) -> str:
        b = c.builder
        if name == "norm":
            arg = b.map("*", arg, arg, span=span)
        if name == "count":
            arg = b.map("where", arg, b.const(1), b.const(0), span=span)
        fn = {"dot": "sum", "count": "sum", "norm": "sum"}.get(name, name)
        if mask is None:
            out = self.reduce(fn, arg, axes, span, c)
        elif fn == "any":
            out = self.reduce("any", b.map("and", mask, arg, span=span), axes, span, c)
        elif fn in ("sum", "mean"):
            out = self.reduce("sum", b.map("where", mask, arg, b.const(0), span=span), axes, span, c)
            if fn == "mean":
                ones = self.filled(mask, arg, span, c)
                count = self.reduce("sum", b.map("where", ones, b.const(1), b.const(0)), axes, span, c)
                out = b.map("/", out, b.map("max", count, b.const(1)), span=span)
        else:
            idle = b.const(float("-inf") if fn == "max" else float("inf"))
            best = self.reduce(fn, b.map("where", mask, arg, idle, span=span), axes, span, c)
            some = self.reduce("any", self.filled(mask, arg, span, c), axes, span, c)
            out = b.map("where", some, best, b.const(0.0), span=span)
        return b.map("pow", out, b.const(0.5), span=span) if name == "norm" else out

    def filled(self, mask: str, arg: str, span: Span, c: Context) -> str:
        """A condition over all axes of the value that it is about."""
        b = c.builder
        axes = b.union([arg, mask])
        return b.add(N.Map, "", span, fn="as", args=(mask,), axes=axes, dtype="bool")

    def normalised(self, name: str, arg: str, mask: str | None, axes: list[Along], span: Span,
                   c: Context) -> str | None:  # fmt: skip
        b = c.builder
        over, chunk = tuple(a.axis for a in axes), next((a.chunk for a in axes if a.chunk), None)
        if mask is not None:
            if name != "softmax":
                self.report.error("bad-call", f"'{name}' takes no condition; softmax does", span)
                return None
            arg = b.map("where", mask, arg, b.const(float("-inf")), span=span)
        return b.add(N.Normalize, name, span, fn=name, arg=arg, over=over, axes=b.nodes[arg].axes, chunk=chunk)
