"""Definitions: a name, its axes, and a value brought to them."""

from __future__ import annotations

from dataclasses import replace

from chunkc.dsl import tree as T
from chunkc.dsl.express import Expressions
from chunkc.dsl.scope import BodyValue, Broken, Scope, Value, Work
from chunkc.dsl.sizes import Context
from chunkc.ir import nodes as N
from chunkc.ir.axes import Axis, DType
from chunkc.ir.diagnostics import Report, Span
from chunkc.ir.graph import Builder


class Definitions:
    """The namespace, the axes and the graph of a unit, and the definitions in it."""

    def __init__(self, report: Report, work: Work, scope: Scope) -> None:
        self.report, self.work, self.scope = report, work, scope
        self.builder = Builder()
        self.axes: dict[str, Axis] = self.builder.axes
        self.x = Expressions(scope, report, self.axes, work)

    def axis_list(self, names: tuple[T.Name, ...] | None) -> tuple[str, ...] | None:
        """The declared axes, each once; None if one is unknown."""
        out: list[str] = []
        good = True
        for n in names or ():
            self.work.spend(n.span)
            axis = self.x.axis(n)
            if axis is None:
                good = False
            elif axis.name in out:
                self.report.error("axis-twice", f"axis '{axis.name}' is named twice", n.span)
                good = False
            else:
                out.append(axis.name)
        return tuple(out) if good else None

    def real_or_complex(self, bind: T.Bind, what: str) -> DType:
        """The declared type, float if unsaid; reports others, and a range where it has no meaning."""
        if bind.range is not None:
            self.report.error("bad-range", f"{what} has no range: it is computed",
                              bind.range[0].span.to(bind.range[1].span))  # fmt: skip
        if bind.type is None or bind.type.text == "float":
            return "float"
        if bind.type.text == "complex":
            return "complex"
        self.report.error("bad-type", f"{what} is float or complex, not '{bind.type.text}'", bind.type.span)
        return "float"

    def define(self, name: T.Name, axes: tuple[T.Name, ...] | None, value: T.Expr, c: Context) -> str | None:
        """A definition: its node, entered in the scope."""
        target = self.axis_list(axes) if axes is not None else None
        id_: str | None = None
        before = len(c.builder.nodes)
        if axes is None or target is not None:
            c = replace(c, target=target, weight=name.text, rename=self.renames(target or (), name), weights_used=[])
            id_ = self.x.expr(value, c)
            if id_ is not None and target is not None:
                wanted = tuple(a for a in target if a != c.bound)
                id_ = self.as_axes(id_, wanted, value.span, c)
        if id_ is None:
            self.scope.names.setdefault(name.text, Broken(name.span))
            return None
        if len(c.builder.nodes) > before:  # else it is a second name of something
            id_ = _named(c.builder, id_, name.text)
        self.scope.declare(name, Value(id_, name.span) if c.outer is None else BodyValue(id_, name.span))
        return id_

    def renames(self, target: tuple[str, ...], name: T.Name) -> dict[str, str]:
        """Other names of the definition's sequences, which it reads under its own."""
        out = {}
        for a in target:
            if self.axes[a].is_sequence:
                self.work.spend(name.span, 1 + len(self.axes) // 16)
                same = [o.name for o in self.axes.values() if o.space == self.axes[a].space and o.name not in target]
                out.update(dict.fromkeys(same, a))
        return out

    def as_axes(self, id_: str, wanted: tuple[str, ...], span: Span, c: Context) -> str | None:
        """The value over just these axes, in this order: missing ones are brought by repetition."""
        b = c.builder
        for a in b.nodes[id_].axes:
            parent = self.axes[a].parent
            if a not in wanted and parent is not None and parent in wanted and self.axes[a].kind == "size":
                id_ = self.x.expand(id_, a, parent, span, c)
        have = b.nodes[id_].axes
        extra = [a for a in have if a not in wanted]
        if extra:
            self.report.error("axis-mismatch", f"this is over {', '.join(have) or 'no axis'}: "
                              f"'{extra[0]}' is not among the declared axes", span,
                              notes=(f"declared: {', '.join(wanted) or 'none'}",),
                              hints=(f"reduce over '{extra[0]}', or declare it",))  # fmt: skip
            return None
        if have == wanted:
            return id_
        return b.add(N.Map, "", span, fn="as", args=(id_,), axes=wanted, dtype=b.nodes[id_].dtype)


def _named(builder: Builder, id_: str, name: str) -> str:
    """Give the newest node the definition's name as its id; a node that has a name keeps it."""
    node = builder.nodes[id_]
    newest = next(reversed(builder.nodes)) == id_
    if not newest or isinstance(node, N.Input | N.Param | N.Capture | N.State | N.Out) or name in builder.nodes:
        return id_
    del builder.nodes[id_]
    new = builder.fresh(name)
    builder.nodes[new] = node.evolve(id=new)
    for key in reversed(builder._known):
        if builder._known[key] == id_:  # soon found: the newest node is among the last
            builder._known[key] = new
            break
    return new
